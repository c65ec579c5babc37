"""Tweedie conversions between what a network predicts and what a loop needs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..checks import is_number, like, number, promote, samples
from ..coefficients import Level, level_for
from ..primitives import ESTIMATE, LevelOp
from .parameterisation import EDM, MIXES, OfLevel, Parameterisation, check_name, conversion

__all__ = ["convert", "to_eps", "to_score", "to_v", "to_x0"]

Bounds = float | tuple[float, float]


def to_x0(
    x_t: Tensor, pred: Tensor, level: Level, *, predict: Parameterisation = "eps", clamp: Bounds | None = None
) -> Tensor:
    """The denoised estimate E[x0 | x_t]: (x_t - sigma * eps) / alpha from eps.

    x_t: (B, ...) fp16/bf16/fp32/fp64      pred: like x_t, the network's output
    level: Level      predict: what pred is: "eps", "x0", "v", "score", "flow", or EDM's F as EDM(sigma_data)
    clamp: c or (low, high): the x0 estimate is limited to [-c, c] or [low, high]
    returns: like x_t (pred itself when it is x0 already and nothing is clamped)
    Reads x_t and pred once. Gradient: the coefficients, 0 where the clamp is active.
    Raises ValueError on a shape mismatch, a level outside the schedule, or a level where the
    prediction does not determine the result (eps to x0 where alpha = 0).
    Tweedie's formula; Ho et al. 2020, eq. 15; v: Salimans and Ho 2022.
    """
    return _convert("to_x0", "x0", x_t, pred, level, predict, clamp)


def to_eps(
    x_t: Tensor, pred: Tensor, level: Level, *, predict: Parameterisation = "eps", clamp: Bounds | None = None
) -> Tensor:
    """The noise estimate: (x_t - alpha * x0) / sigma from x0.

    Arguments, gradient and errors as to_x0. clamp limits the x0 estimate from which eps is then made,
    which keeps (x0, eps) consistent with x_t (the clipped step of DDIM).
    """
    return _convert("to_eps", "eps", x_t, pred, level, predict, clamp)


def to_score(
    x_t: Tensor, pred: Tensor, level: Level, *, predict: Parameterisation = "eps", clamp: Bounds | None = None
) -> Tensor:
    """The score grad log p(x_t): -eps / sigma, or (alpha * x0 - x_t) / sigma^2.

    Arguments, gradient and errors as to_x0; clamp as in to_eps. Vincent 2011; Song et al. 2021.
    """
    return _convert("to_score", "score", x_t, pred, level, predict, clamp)


def to_v(
    x_t: Tensor, pred: Tensor, level: Level, *, predict: Parameterisation = "eps", clamp: Bounds | None = None
) -> Tensor:
    """The velocity v = alpha * eps - sigma * x0.

    Arguments, gradient and errors as to_x0; clamp as in to_eps. Salimans and Ho 2022, appendix D.
    """
    return _convert("to_v", "v", x_t, pred, level, predict, clamp)


def convert(
    x_t: Tensor,
    pred: Tensor,
    level: Level,
    *,
    predict: Parameterisation,
    to: Parameterisation,
    clamp: Bounds | None = None,
) -> Tensor:
    """What a network with parameterisation `predict` says, in the parameterisation `to`.

    Arguments, gradient and errors as to_x0; to: as predict; clamp as in to_eps.
    convert(x_t, F, level, predict=EDM(0.5), to="flow"), say. Kingma and Gao 2023, appendix D.
    """
    check_name("convert", "to", to)
    return _convert("convert", to, x_t, pred, level, predict, clamp)


def _convert(
    op: str,
    to: Parameterisation,
    x_t: Tensor,
    pred: Tensor,
    level: Level,
    predict: Parameterisation,
    clamp: Bounds | None,
) -> Tensor:
    limits = None if clamp is None else bounds(op, clamp)
    named = _NAMED.get((op, predict, to, clamp is not None)) if type(predict) is str else None
    if named is not None:
        return named.run(level, (x_t, pred), limits)
    if isinstance(predict, (str, EDM)) and predict == to and (limits is None or predict == "x0"):
        samples(op, "x_t", x_t)
        like(op, "pred", pred, "x_t", x_t)
        level_for(op, level)
        check_name(op, "predict", predict)
        _, pred = promote(x_t, pred)
        return pred if limits is None else pred.clamp(*limits)
    if not isinstance(predict, EDM) and not isinstance(to, EDM):
        check_name(op, "predict", predict)
    make = _made if is_dynamo_compiling() else _kept
    return make(op, predict, to, limits is not None).run(level, (x_t, pred), limits)


def _made(op: str, predict: Parameterisation, to: Parameterisation, clamped: bool) -> LevelOp[Tensor]:
    """Of x_t and pred; between eps and score x_t is checked, and neither read nor given a gradient."""
    check_name(op, "predict", predict)
    if clamped:
        return LevelOp(op, _of_estimate(to), estimate=_named(conversion(predict, "x0"), predict == "x0"))
    names = isinstance(predict, str) and isinstance(to, str)  # Dynamo of torch 2.11 cannot compare a str with an EDM
    return LevelOp(op, _named(conversion(predict, to), names and {predict, to} == {"eps", "score"}))


def _named(coefficients: OfLevel, without_x_t: bool) -> Any:
    def by_name(alpha: Any, sigma: Any) -> dict[str, Any]:
        of_x_t, of_pred = coefficients(alpha, sigma)
        return {"x_t": None if without_x_t else of_x_t, "pred": of_pred}

    return by_name


def _of_estimate(to: Parameterisation) -> Any:
    """The result from x_t and the limited x0, which keeps the two consistent."""

    def by_name(alpha: Any, sigma: Any) -> dict[str, Any]:
        of_x_t, of_x0 = conversion("x0", to)(alpha, sigma)
        return {"x_t": None if to == "x0" else of_x_t, ESTIMATE: of_x0}

    return by_name


_kept = lru_cache(maxsize=64)(_made)
_OPS: dict[str, Parameterisation] = {"to_x0": "x0", "to_eps": "eps", "to_score": "score", "to_v": "v"}
_NAMED = {
    (op, predict, to, clamped): _made(op, predict, to, clamped)
    for op, to in (*_OPS.items(), *(("convert", to) for to in MIXES))
    for predict in MIXES
    for clamped in (False, True)
    if predict != to or (clamped and predict != "x0")
}


def bounds(op: str, clamp: Bounds) -> tuple[float, float]:
    if type(clamp) is float and clamp >= 0:
        return -clamp, clamp
    if type(clamp) is tuple and len(clamp) == 2 and type(clamp[0]) is type(clamp[1]) is float and clamp[0] <= clamp[1]:
        return clamp
    pair = clamp if isinstance(clamp, tuple) else (-clamp, clamp) if is_number(clamp) else ()
    if len(pair) != 2 or not all(map(is_number, pair)):
        raise TypeError(f"{op}: clamp must be a number c or a tuple (low, high), got {clamp!r}")
    low, high = (number(op, "clamp", value) for value in pair)
    if not low <= high:
        raise ValueError(f"{op}: clamp must be c >= 0 or (low, high) with low <= high, got {clamp}")
    return low, high
