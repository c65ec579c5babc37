"""Tweedie conversions between what a network predicts and what a loop needs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.compiler import is_compiling

from ..backends.reference import compute_dtype
from ..checks import is_number, number
from ..level import Level
from ..rows import Coefficients
from .affine import ABSENT, Clamp, Columns, affine
from .checks import level_for, like, promote, samples
from .levels import rows_for
from .parameterisation import MIXES, Parameterisation, check_name, conversion
from .routing import plain_affine

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
    if type(level) is Level and not is_compiling() and isinstance(predict, str) and (predict, to) in _PLAIN:
        converted = _plainly(op, x_t, pred, level, _PLAIN[predict, to], clamp)
        if converted is not None:
            return converted
    samples(op, "x_t", x_t)
    like(op, "pred", pred, "x_t", x_t)
    level_for(op, level)
    check_name(op, "predict", predict)
    if pred.dtype != x_t.dtype:
        x_t, pred = promote(x_t, pred)
    compute = compute_dtype(x_t.dtype)
    if clamp is None:
        if predict == to:
            return pred
        columns = _columns(predict, to)
        rows = rows_for(op, level, (predict, "to", to), conversion(predict, to), x_t, compute)
        if columns[0] == ABSENT:  # x_t is neither read nor given a gradient
            return affine(op, pred, None, None, None, rows, (1, ABSENT, ABSENT, ABSENT))[0]
        return affine(op, x_t, pred, None, None, rows, columns)[0]
    low, high = bounds(op, clamp)
    if predict == "x0" and to == "x0":
        return pred.clamp(low, high)
    rows = rows_for(op, level, (predict, "to", to, "by x0"), _by_x0(predict, to), x_t, compute)
    outer, inner = _clamped_columns(predict, to)
    return affine(op, x_t, pred, None, None, rows, outer, (*inner, low, high))[0]


def _columns(predict: Parameterisation, to: Parameterisation) -> Columns:
    """Between eps and score x_t has no part."""
    named = isinstance(predict, str) and isinstance(to, str)  # Dynamo of torch 2.11 cannot compare a str with an EDM
    return (ABSENT if named and {predict, to} == {"eps", "score"} else 0, 1, ABSENT, ABSENT)


def _clamped_columns(predict: Parameterisation, to: Parameterisation) -> tuple[Columns, tuple[int, int, int]]:
    """Of the result, and of the x0 that the clamp is about."""
    return (0 if to != "x0" else ABSENT, 1, ABSENT, ABSENT), (2 if predict != "x0" else ABSENT, 3, ABSENT)


class _Plain(NamedTuple):
    """A conversion between names, as a plain call looks it up."""

    name: str
    columns: Columns
    outer: Columns
    inner: tuple[int, int, int]


_PLAIN: dict[tuple[Parameterisation, Parameterisation], _Plain] = {
    (predict, to): _Plain(f"{predict} to {to}", _columns(predict, to), *_clamped_columns(predict, to))
    for predict in MIXES
    for to in MIXES
    if predict != to
}


def _plainly(op: str, x_t: Tensor, pred: Tensor, level: Level, plain: _Plain, clamp: Bounds | None) -> Tensor | None:
    """The result of a plain call; None where _convert has to look."""
    converted: Tensor | None
    if clamp is None:
        converted = plain_affine(op, plain.columns, x_t, pred, None, None, plain.name, level, None, None)
    else:
        limits: Clamp = (*plain.inner, *bounds(op, clamp))
        converted = plain_affine(op, plain.outer, x_t, pred, None, None, f"{plain.name} by x0", level, None, limits)
    return converted


def _by_x0(predict: Parameterisation, to: Parameterisation) -> Coefficients:
    """Outer coefficients on (x_t, x0), then those of x0 on (x_t, pred)."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, ...]:
        return *conversion("x0", to)(alpha, sigma), *conversion(predict, "x0")(alpha, sigma)

    return coefficients


def bounds(op: str, clamp: Bounds) -> tuple[float, float]:
    pair = clamp if isinstance(clamp, tuple) else (-clamp, clamp) if is_number(clamp) else ()
    if len(pair) != 2 or not all(map(is_number, pair)):
        raise TypeError(f"{op}: clamp must be a number c or a tuple (low, high), got {clamp!r}")
    low, high = (number(op, "clamp", value) for value in pair)
    if not low <= high:
        raise ValueError(f"{op}: clamp must be c >= 0 or (low, high) with low <= high, got {clamp}")
    return low, high
