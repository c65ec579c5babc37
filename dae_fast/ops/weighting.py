"""Weights of a loss by its level, right for whatever the network predicts.

At one level the errors of eps, x0, v, ... are one error in different units. So a weighting is defined once, as a
function of (eps_error, x0_error): the squared errors of eps and of x0 for each unit of the prediction's own. It is what
multiplies that own error: eps_error weighs every sample by its error of eps, x0_error by that of x0, and their ratio is
the SNR. Each is proportional to the two together, so that the weighted loss does not depend on the parameterisation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import per_sample
from ..coefficients import Formula, Level, changing, gather, is_one, value_at
from ..schedule import finite_numbers
from .parameterisation import OfLevel, Parameterisation, check_name, error_ratio, errors

__all__ = [
    "EDM",
    "P2",
    "SNR",
    "CosMap",
    "InverseVariance",
    "Likelihood",
    "MinSNR",
    "OnError",
    "SoftMinSNR",
    "TruncatedSNR",
]


class Weighting(ABC):
    """What `weight=` takes besides names, functions of (alpha, sigma) and tensors.

    Called with (eps_error, x0_error), float64 tensors that may be 0 or infinite, it gives the weight of the
    prediction's squared error. One of your own is a frozen dataclass, whose repr names its table to a schedule.
    """

    positive: ClassVar[tuple[str, ...]] = ()  # parameters that must be

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in self.positive}
        finite_numbers(type(self).__name__, **values)
        for name, value in values.items():
            if not value > 0:
                raise ValueError(f"{type(self).__name__}: {name} must be positive, got {value}")

    @abstractmethod
    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SNR(Weighting):
    """SNR on the error of x0: the plain loss on eps, whatever is predicted (Ho et al. 2020)."""

    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor:
        return eps_error


@dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """max(SNR, 1) on the error of x0 (Salimans and Ho 2022, section 4)."""

    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor:
        return torch.maximum(eps_error, x0_error)


@dataclass(frozen=True)
class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x0; min(SNR, gamma)/SNR on eps, /(SNR + 1) on v (Hang et al. 2023)."""

    gamma: float = 5.0
    positive = ("gamma",)

    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor:
        return torch.minimum(eps_error, self.gamma * x0_error)


@dataclass(frozen=True)
class SoftMinSNR(Weighting):
    """SNR gamma/(SNR + gamma) on the error of x0, 1/(sigma^2 + 1/gamma) where alpha = 1 (Crowson et al. 2024).

    gamma = 1/sigma_data^2 makes it what the authors' code has: 4 is for EDM's sigma_data.
    """

    gamma: float = 4.0
    positive = ("gamma",)

    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor:
        return 1 / (1 / eps_error + 1 / (self.gamma * x0_error))


@dataclass(frozen=True)
class P2(Weighting):
    """1/(k + SNR)^gamma on the error of eps (Choi et al. 2022)."""

    k: float = 1.0
    gamma: float = 1.0
    positive = ("k", "gamma")

    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor:
        snr, gamma = eps_error / x0_error, changing(self.gamma, eps_error)
        # x0 without noise: the error of eps is infinite for each unit of that of x0, and so is the SNR.
        noiseless = x0_error * snr ** (1 - gamma)
        return torch.where(eps_error.isinf(), noiseless, eps_error / (self.k + snr) ** gamma)


@dataclass(frozen=True)
class EDM(Weighting):
    """(sigma^2 + sigma_data^2)/(sigma sigma_data)^2 on the error of x0, sigma being that over alpha; 1 on EDM's F.

    Karras et al. 2022, table 1.
    """

    sigma_data: float = 0.5
    positive = ("sigma_data",)

    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor:
        return eps_error + x0_error / self.sigma_data**2


@dataclass(frozen=True)
class CosMap(Weighting):
    """2/(pi (1 - 2 sigma + 2 sigma^2)) on the error of the flow, where alpha = 1 - sigma (Esser et al. 2024, eq. 21).

    Elsewhere it is that of sigma/(alpha + sigma), of x_t brought to such a schedule. Given to uniform times, the weight
    is what the density's draws would be.
    """

    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor:
        return 2 / math.pi * _straight(eps_error, x0_error) / (eps_error + x0_error)


@dataclass(frozen=True)
class InverseVariance(Weighting):
    """1/sigma^2 on the error of the flow, where alpha = 1 - sigma: diffusers' "sigma_sqrt" of Stable Diffusion 3.

    Infinite without noise; elsewhere that of sigma/(alpha + sigma). Esser et al. 2024, section 3.
    """

    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor:
        return _straight(eps_error, x0_error) / x0_error


def _straight(eps_error: Tensor, x0_error: Tensor) -> Tensor:
    """The square of the flow's error where alpha = 1 - sigma, from alpha^2 and sigma^2 times it: of degree two."""
    return (eps_error.sqrt() + x0_error.sqrt()) ** 4


@dataclass(frozen=True)
class Likelihood:
    """g^2 on the error of the score, that of one step between levels: the loss bounds the negative log-likelihood.

    g_t^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2, s = t - 1 and level -1 the data: the variance that the step adds,
    beta_t of a variance-preserving schedule, sigma_t^2 - sigma_s^2 of an exploding one. On the error of eps it is
    g_t^2/sigma_t^2 = 1 - SNR_t/SNR_s. For level = schedule[t] of a Schedule; in continuous time it is
    OnError("score", schedule.diffusion(t) ** 2).
    Song et al. 2021b, theorem 1, with the integral of g^2 over each step; Kingma et al. 2021 have SNR_s - SNR_t on the
    error of x0, which is this over 1 - g_t^2/sigma_t^2 and has no value at level 0.
    """


@dataclass(frozen=True)
class OnError:
    """A weight of the error of `of`, "x0" say, whatever the network predicts.

    of: "eps", "x0", "v", "score", "flow" or an EDM     weight: a function of (alpha, sigma), or a tensor () or (B,)
    """

    of: Parameterisation
    weight: Callable[[Tensor, Tensor], Any] | Tensor

    def __post_init__(self) -> None:
        check_name("OnError", "of", self.of)
        w = self.weight
        if not callable(w) and not (isinstance(w, Tensor) and w.is_floating_point() and w.layout == torch.strided):
            got = self.weight.dtype if isinstance(self.weight, Tensor) else type(self.weight).__name__
            raise TypeError(f"OnError: weight must be a function of (alpha, sigma) or floats (B,), got {got}")


NAMES: dict[str, Weighting | Likelihood] = {
    "snr": SNR(),
    "truncated_snr": TruncatedSNR(),
    "min_snr": MinSNR(),
    "soft_min_snr": SoftMinSNR(),
    "p2": P2(),
    "edm": EDM(),
    "cosmap": CosMap(),
    "inverse_variance": InverseVariance(),
    "likelihood": Likelihood(),
}

Function = Callable[[Tensor, Tensor], Any]
Weight = str | Weighting | Likelihood | OnError | Function | Tensor | None


def weight_for(
    op: str, weight: Weight, level: Level | None, pred: Tensor, predict: Parameterisation
) -> tuple[Weighting | None, Tensor | None]:
    """Of a prediction like pred: a weighting, which is to be a column of the loss's table, or (B,).

    Neither: every sample counts the same. A constant, unless a tensor is given.
    """
    if weight is None or (isinstance(weight, str) and weight == "uniform"):
        return None, None
    if isinstance(weight, Tensor):
        weight = per_sample(op, "weight", weight, pred)
        return None, weight.expand(pred.shape[:1]) if is_one(weight) else weight
    found = check_weighting(op, weight)
    if level is None:
        raise ValueError(f"{op}: level must be given, of which this weight is a function")
    if isinstance(found, Weighting):
        return found, None
    if isinstance(found, Likelihood):
        value = _step(op, level, pred) * _error("eps", op, level, pred, predict)
    elif isinstance(found, OnError):
        value = _of_error(op, found.weight, level, pred) * _error(found.of, op, level, pred, predict)
    else:
        value = value_at(op, "weight", found, level, pred)
    return None, value.expand(pred.shape[:1]) if is_one(value) else value  # not rounded: x0 may be wider


def check_weighting(op: str, weight: Any) -> Weighting | Likelihood | OnError | Function:
    """What a name stands for, or the weighting or function itself."""
    if isinstance(weight, str):
        if weight not in NAMES:
            names = ", ".join(map(repr, ("uniform", *NAMES)))
            raise ValueError(f"{op}: weight must be one of {names}, got {weight!r}")
        return NAMES[weight]
    if not isinstance(weight, (Weighting, Likelihood, OnError)) and not callable(weight):
        raise TypeError(
            f"{op}: weight must be a name, a weighting, a function of (alpha, sigma) or a tensor (B,), "
            f"got {type(weight).__name__}"
        )
    return weight


def _of_error(op: str, weight: Function | Tensor, level: Level, pred: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return per_sample(op, "weight", weight, pred).double()
    return value_at(op, "weight", weight, level, pred)


def _step(op: str, level: Level, pred: Tensor) -> Tensor:
    if level.t is None:
        raise ValueError(
            f"{op}: the likelihood's weight is that of a step between levels and needs level=schedule[t]; in "
            "continuous time give OnError('score', schedule.diffusion(t) ** 2)"
        )
    return _column(op, level, pred, _LIKELIHOOD)


def _steps(alpha: Tensor, sigma: Tensor) -> tuple[Tensor]:
    """1 - SNR_t / SNR_{t-1} of all levels of a schedule."""
    snr = (alpha / sigma).square()
    before = torch.cat((torch.full_like(snr[:1], math.inf), snr[:-1]))
    ratio = torch.where(before.isinf(), 0.0, snr / before)
    return ((1 - ratio).clamp(min=0),)


_LIKELIHOOD = Formula("likelihood", ("weight",), _steps)


def by_errors(weighting: Weighting, predict: Parameterisation) -> OfLevel:
    """Its column of a loss's table."""

    def weight(alpha: Tensor, sigma: Tensor) -> Tensor:
        pair = errors(predict)(alpha, sigma)
        return weighting(*(k if isinstance(k, Tensor) else torch.full_like(alpha, k) for k in pair))

    return _in_float64(weight)


def _error(of: Parameterisation, op: str, level: Level, pred: Tensor, predict: Parameterisation) -> Tensor:
    """Squared error of `of` for each unit of the prediction's."""
    made = _made_error(of, predict) if torch.compiler.is_dynamo_compiling() else _kept_error(of, predict)
    return _column(op, level, pred, made)


def _made_error(of: Parameterisation, predict: Parameterisation) -> Formula:
    ratio = error_ratio(predict, of)
    return Formula("weight", ("error",), _in_float64(lambda alpha, sigma: ratio(alpha, sigma)[0]))


_kept_error = lru_cache(maxsize=64)(_made_error)


def _in_float64(function: Function) -> OfLevel:
    """One column; numbers are made tensors, which divide by 0 to infinity where floats raise."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any]:
        if isinstance(alpha, Tensor) or isinstance(sigma, Tensor):
            return (function(alpha, sigma),)
        one = torch.ones((), dtype=torch.float64, device="cpu")
        value = function(one * alpha, one * sigma)
        return (value if torch.compiler.is_compiling() else float(value),)

    return coefficients


def _column(op: str, level: Level, pred: Tensor, formula: Formula) -> Tensor:
    """(1,), or of the level's shape, float64, a constant."""
    values = gather(op, formula.rows(level, pred, torch.float64, op), pred)[:, 0].detach()
    return values if len(values) == 1 or level._dims() == 1 else values.reshape(pred.shape[: level._dims()])
