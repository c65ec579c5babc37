"""One step between any two levels, for loops that own their levels."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks
from .._torch import outside_modes
from ..checks import can_read
from ..coefficients import LARGEST, Level, all_within, alpha_sigma_pairs, keep, level_for, singular, traced
from ..kernels import reference
from ..noise import Noise
from ..ops.brownian import BrownianNoise
from ..ops.conversions import Bounds, bounds
from ..ops.parameterisation import Parameterisation, check_name
from ..primitives import clamped, weighted_sum
from ..routing import beside, wants_grad
from .arguments import Noises
from .launch import estimate, times
from .steps import Place, library_of, path_times, posterior_std

__all__ = ["step"]

ETA = {"ddim": 0.0, "ddpm": 1.0, "euler": 0.0, "euler_ancestral": 1.0}  # unless given
_SOLVER = checks.one_of(*ETA)
MOST = {"ddim": 1.0, "ddpm": 1.0, "euler": 0.0, "euler_ancestral": math.inf}


class _Row(NamedTuple):
    """x_s = x*x + y*y + z*z, y the prediction, or the limited x0_hat = a_x*x + a_p*pred."""

    x: Any
    y: Any
    z: Any
    a_x: Any
    a_p: Any


@overload
def step(
    x: Tensor,
    pred: Tensor,
    level: Level,
    next_level: Level,
    noise: Noises | Tensor | None = None,
    *,
    solver: str = "ddim",
    eta: float | None = None,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    return_x0: Literal[False] = False,
) -> Tensor: ...
@overload
def step(
    x: Tensor,
    pred: Tensor,
    level: Level,
    next_level: Level,
    noise: Noises | Tensor | None = None,
    *,
    solver: str = "ddim",
    eta: float | None = None,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    return_x0: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def step(
    x: Tensor,
    pred: Tensor,
    level: Level,
    next_level: Level,
    noise: Noises | Tensor | None = None,
    *,
    solver: str = "ddim",
    eta: float | None = None,
    predict: Parameterisation = "eps",
    clamp: Bounds | None = None,
    return_x0: bool = False,
) -> Any:
    """x_s = alpha_s * x0_hat + sqrt(sigma_s^2 - std^2) * eps_hat + std * z, from x at `level` to `next_level`.

    x: (B, ...) fp16/bf16/fp32/fp64      pred: like x, what `predict` says
    level, next_level: Levels, of all samples, of each, or of each frame, the one or the other the noisier;
        Level(1.0, 0.0) is the data. Up, where next_level is the noisier, std is 0
    noise: a Noise or a tensor like x, taken as it is, or a BrownianNoise, of which levels that are numbers take the
        increment between their sigma/alpha (sigma where alpha + sigma = 1); wanted where eta > 0
    solver: "ddim", eta in [0, 1], 0 unless given; "ddpm", eta 1; "euler", eta 0, which "flow" paths are as well;
        "euler_ancestral", eta >= 0, 1 unless given: std = min(eta * that of the posterior, sigma_s)
    clamp: c or (low, high), the limits of x0_hat; eps_hat is then that of the limited one
    return_x0: also x0_hat      returns: like x, or (x, x0_hat), in one launch
    Numbers as levels cost no tensor arithmetic. Gradient: of x, pred and the noise, and of levels that are tensors.
    Raises ValueError on a mismatch, or a level where x0_hat or eps_hat is not finite, TypeError without a noise.
    Song, Meng and Ermon 2021, eq. 12.
    """
    op = "step"
    _SOLVER(op, "solver", solver)
    check_name(op, "predict", predict)
    level_for(op, level)
    if not isinstance(next_level, Level):
        raise TypeError(f"{op}: next_level must be a Level, got {checks.kind_of(next_level)}")
    size = ETA[solver] if eta is None else checks.number(op, "eta", eta, "finite and not negative")
    if size > MOST[solver] or (solver == "ddpm" and size != 1):
        raise ValueError(
            f"{op}: eta of {solver!r} must be {'1' if solver == 'ddpm' else f'at most {MOST[solver]}'}, got {eta}"
        )
    checks.samples(op, "x", x)
    checks.like(op, "pred", pred, "x", x)
    if noise is None and size:
        raise TypeError(f"{op}: noise must be a Noise or a tensor like x, got None")
    if isinstance(noise, BrownianNoise):
        noise = _increment(op, noise, x, (level, next_level)) if size else None
    elif noise is not None and not isinstance(noise, Noise):
        checks.like(op, "noise", noise, "x", x)
    return_x0 = checks.flag(op, "return_x0", return_x0)
    row = _row_of(op, x, (level, next_level), (predict, size, clamp is not None))
    noisy = [(row.z, noise)] if size else []
    y: Any = pred
    also = [row.a_x, row.a_p]
    if clamp is not None:
        low, high = bounds(op, clamp)
        y, also = clamped((row.a_x, x), (row.a_p, pred), low=low, high=high), [0.0, 1.0]
    terms = [(row.x, x), (row.y, y), *noisy]
    return weighted_sum(*terms, also=[*also, *[0.0] * len(noisy)]) if return_x0 else weighted_sum(*terms)


Options = tuple[Parameterisation, float, bool]  # predict, eta, whether x0_hat is limited


def _pair(level: Level) -> tuple[float, float] | None:
    """Its alpha and sigma, where those are numbers; in a trace a table's are none."""
    if is_compiling() or isinstance(level.t, Tensor):
        return None
    alpha, sigma = level.alpha, level.sigma
    return None if isinstance(alpha, Tensor) or isinstance(sigma, Tensor) else (alpha, sigma)


def _increment(op: str, path: BrownianNoise, x: Tensor, levels: tuple[Level, Level]) -> Tensor | None:
    pairs = [pair for pair in map(_pair, levels) if pair is not None]
    if len(pairs) < 2:
        raise ValueError(f"{op}: noise may be a BrownianNoise where level and next_level are numbers, outside a trace")
    t, s = path_times(pairs)
    return beside(path.increment(t, s, x.shape, dtype=x.dtype, device=x.device), x)


def _row_of(op: str, x: Tensor, levels: tuple[Level, Level], options: Options) -> _Row:
    t, s = pairs = tuple(map(_pair, levels))
    if t is not None and s is not None:
        return _row_of_numbers(op, t, s, options)
    if s is not None and levels[0]._schedule is not None and not is_compiling():
        return _row_of_table(op, x, levels[0], s, options)
    dims = max(level._dims() for level in levels)

    def place(level: Level, values: Any) -> Place:
        return Place(*(_leading(values[..., k], level._dims(), dims, x) for k in (0, 1)))

    found = [pair or alpha_sigma_pairs(op, level, x) for level, pair in zip(levels, pairs, strict=True)]
    tensors = [values for values in found if isinstance(values, Tensor)]
    if not all(map(can_read, tensors)) or wants_grad(*tensors):
        at, after = (place(level, alpha_sigma_pairs(op, level, x)) for level in levels)
        return _row(at, after, options)
    at, after = (place(level, np.asarray(values)) for level, values in zip(levels, found, strict=True))
    with np.errstate(all="ignore"):
        made = _row(at, after, options)
    row = np.empty((len(made), *np.broadcast(*made).shape))
    for k, column in enumerate(made):
        row[k] = column
    if not np.isfinite(row).all():
        sample = tuple(np.argwhere(~np.isfinite(row).all(0))[0].tolist())
        raise ValueError(singular(op, f"sample {sample or 0}, a level of {levels}"))
    return _Row(*torch.from_numpy(row).unbind())


def _leading(value: Any, own: int, dims: int, x: Tensor) -> Any:
    """A level's alpha or sigma, () or of its rows, broadcastable to x's first `dims` dimensions."""
    if not value.shape or (dims == 1 and value.shape != (1,)):
        return value
    return value.reshape(()) if value.shape == (1,) else value.reshape(*x.shape[:own], *[1] * (dims - own))


def _row_of_table(op: str, x: Tensor, level: Level, s: tuple[float, float], options: Options) -> _Row:
    """From levels of a schedule to one level that is numbers: looked up, of what is made for all of its levels once."""
    schedule: Any = level._schedule
    key = s, options, x.device
    table = schedule._tables.get(key)
    if table is None:
        with outside_modes():
            after = Place(*(torch.full_like(schedule.alpha, v) for v in s))
            columns = _row(Place(schedule.alpha, schedule.sigma), after, options)
            table = keep(schedule._tables, key, torch.stack(columns, -1).to(x.device))
    row = reference.coefficients(*traced(level._rows(op, table, x)), op, x)
    if not all_within(row, -LARGEST, LARGEST) and can_read(row):
        for sample in (~row.isfinite()).nonzero()[:1, 0].tolist():
            raise ValueError(singular(op, f"sample {sample}, {level}"))
    dims = level._dims()
    return _Row(*(_leading(c, dims, dims, x) for c in row.t().contiguous().unbind()))


@lru_cache(maxsize=1024)
def _row_of_numbers(op: str, t: tuple[float, float], s: tuple[float, float], options: Options) -> _Row:
    with outside_modes():
        at, after = (Place(*torch.tensor(pair, dtype=torch.float64, device="cpu")) for pair in (t, s))
        row = _Row(*(float(c) for c in _row(at, after, options)))
    if not all(map(math.isfinite, row)):
        raise ValueError(singular(op, f"alpha = {t[0]}, sigma = {t[1]}"))
    return row


def _row(t: Place, s: Place, options: Options) -> _Row:
    predict, eta, clips = options
    std = library_of(t.sigma).minimum(eta * posterior_std(t, s), s.sigma) if eta else 0 * (s.sigma + t.sigma)
    keep = (s.sigma**2 - std**2).clip(min=0) ** 0.5
    (a_x, a_p), (b_x, b_p) = estimate(predict, t, "x0"), estimate(predict, t, "eps")
    if clips:
        x = times(keep, 1 / t.sigma)
        return _Row(x, s.alpha - x * t.alpha, std, a_x, a_p)
    return _Row(s.alpha * a_x + times(keep, b_x), s.alpha * a_p + times(keep, b_p), std, a_x, a_p)
