"""What a network predicts, as a row (p0, p1): prediction = p0*x0 + p1*eps.

With x_t = alpha*x0 + sigma*eps this is a 2x2 system; its solution gives every conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ..rows import Coefficients

Parameterisation = Literal["eps", "x0", "v", "score", "flow"]

# x0 and eps themselves; v of Salimans and Ho 2022; score = -eps/sigma (Vincent 2011);
# flow velocity eps - x0 of Lipman et al. 2023 (x_t runs from data to noise).
MIXES: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "eps": lambda alpha, sigma: (0.0, 1.0),
    "x0": lambda alpha, sigma: (1.0, 0.0),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "score": lambda alpha, sigma: (0.0, -1 / sigma),
    "flow": lambda alpha, sigma: (-1.0, 1.0),
}


def check_name(op: str, argument: str, name: str) -> None:
    if name not in MIXES:
        raise ValueError(f"{op}: {argument} must be one of {', '.join(map(repr, MIXES))}, got {name!r}")


def conversion(predict: str, to: str) -> Coefficients:
    """(a, b) with to = a*x_t + b*prediction."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, Any]:
        p0, p1 = MIXES[predict](alpha, sigma)
        q0, q1 = MIXES[to](alpha, sigma)
        det = alpha * p1 - sigma * p0
        return (q0 * p1 - q1 * p0) / det, (alpha * q1 - sigma * q0) / det

    return coefficients


def error_ratio(predict: str, to: str) -> Coefficients:
    """(k,) with mean squared error of `to` = k * that of the prediction: the square of b above."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any]:
        _, b = conversion(predict, to)(alpha, sigma)
        return (b * b,)

    return coefficients
