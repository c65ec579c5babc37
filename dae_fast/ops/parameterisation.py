"""What a network predicts, as a row (p0, p1): prediction = p0*x0 + p1*eps.

With x_t = alpha*x0 + sigma*eps this is a 2x2 system; its solution gives every conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..schedule import finite_numbers

__all__ = ["EDM"]

OfLevel = Callable[[Any, Any], tuple[Any, ...]]  # of (alpha, sigma)


@dataclass(frozen=True)
class EDM:
    """EDM's F as what a network predicts: x0 = c_skip * x_t + c_out * F. `predict=` takes one like a name.

    sigma_data: > 0, the standard deviation of the data
    F = (sigma/sigma_data * x0 - alpha*sigma_data * eps) / sqrt(sigma^2 + (alpha*sigma_data)^2), which with
    sigma_data = 1 and a variance-preserving schedule is -v. Defined at every level, sigma = 0 and alpha = 0 too.
    Raises TypeError or ValueError for another sigma_data.
    Karras et al. 2022, table 1 and appendix B.6, with sigma/alpha for their sigma.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        finite_numbers("EDM", sigma_data=self.sigma_data)
        if not self.sigma_data > 0:
            raise ValueError(f"EDM: sigma_data must be positive, got {self.sigma_data}")
        if not 1e-150 < self.sigma_data < 1e150:
            raise ValueError(f"EDM: sigma_data must have a square within float64, got {self.sigma_data}")

    def mix(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        size = self._size(alpha, sigma)
        return sigma / (self.sigma_data * size), -alpha * self.sigma_data / size

    def preconditioning(self, alpha: Any, sigma: Any) -> tuple[Any, ...]:
        """(c_skip, c_out, c_in, c_noise)."""
        size, ratio = self._size(alpha, sigma), sigma / alpha
        log = ratio.log() if isinstance(ratio, Tensor) else math.log(ratio)
        return alpha * self.sigma_data**2 / size**2, sigma * self.sigma_data / size, 1 / size, log / 4

    def _size(self, alpha: Any, sigma: Any) -> Any:
        """The standard deviation of x_t."""
        return (sigma**2 + (alpha * self.sigma_data) ** 2) ** 0.5


Parameterisation = str | EDM

# x0 and eps themselves; v of Salimans and Ho 2022; score = -eps/sigma (Vincent 2011);
# flow velocity eps - x0 of Lipman et al. 2023 (x_t runs from data to noise).
MIXES: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "score": lambda alpha, sigma: (0.0, -1 / sigma),
    "flow": lambda alpha, sigma: (-1.0, 1.0),
}


def check_name(op: str, argument: str, name: Parameterisation) -> None:
    if not isinstance(name, EDM) and not (isinstance(name, str) and name in MIXES):
        raise ValueError(f"{op}: {argument} must be one of {', '.join(map(repr, MIXES))} or an EDM, got {name!r}")


def mix(predict: Parameterisation, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """(p0, p1) of the prediction."""
    return predict.mix(alpha, sigma) if isinstance(predict, EDM) else MIXES[predict](alpha, sigma)


def conversion(predict: Parameterisation, to: Parameterisation) -> OfLevel:
    """(a, b) with to = a*x_t + b*prediction, finite wherever the prediction determines the result."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, Any]:
        if predict == to:
            return 0.0, 1.0
        # eps and score determine each other whether or not they determine x0, so score goes by eps.
        if predict == "score":
            a, b = conversion("eps", to)(alpha, sigma)
            return a, -sigma * b
        if to == "score":
            a, b = conversion(predict, "eps")(alpha, sigma)
            return -a / sigma, -b / sigma
        p0, p1 = mix(predict, alpha, sigma)
        q0, q1 = mix(to, alpha, sigma)
        det = alpha * p1 - sigma * p0
        return (q0 * p1 - q1 * p0) / det, (alpha * q1 - sigma * q0) / det

    return coefficients


def error_ratio(predict: Parameterisation, to: Parameterisation) -> OfLevel:
    """(k,) with mean squared error of `to` = k * that of the prediction: the square of b above."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any]:
        _, b = conversion(predict, to)(alpha, sigma)
        return (b * b,)

    return coefficients


def errors(predict: Parameterisation) -> OfLevel:
    """Squared errors of eps and of x0 for each unit of the prediction's. The first over the second is the SNR."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, ...]:
        return *error_ratio(predict, "eps")(alpha, sigma), *error_ratio(predict, "x0")(alpha, sigma)

    return coefficients
