"""Which levels a sampler walks through, and what the network is told of each."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, overload

import torch

from .. import checks
from .._torch import outside_modes
from ..continuous import ContinuousSchedule
from ..schedule import Schedule

Schedules = Schedule | ContinuousSchedule
Conditioning = str | Callable[[Any, Any], Any] | None
SIGMAS = "karras", "exponential"
SPACINGS = "linspace", "leading", "trailing", *SIGMAS
Told = tuple[int, ...] | tuple[float, ...]


class Levels:
    """The field `levels`: given as ints or None, for `steps` of them; read, the level of each look by the network."""

    @overload
    def __get__(self, sampler: None, owner: type) -> None: ...
    @overload
    def __get__(self, sampler: object, owner: type) -> tuple[int, ...]: ...
    def __get__(self, sampler: Any, owner: type) -> tuple[int, ...] | None:
        return None if sampler is None else sampler._plan.levels

    def __set__(self, sampler: Any, given: Sequence[int] | None) -> None:
        sampler._levels = given


def walked(op: str, schedule: Schedules, steps: Any, levels: Sequence[int] | None) -> Schedule:
    """The levels that a sampler walks through: of a ContinuousSchedule as many as it takes steps."""
    if isinstance(schedule, Schedule):
        return schedule
    if levels is not None:
        raise ValueError(f"{op}: levels are those of a Schedule: give {schedule}.discretise(times=...), or steps")
    return schedule._sampling_grid(checks.integer(op, "steps", steps, 1))


class Route(NamedTuple):
    """Which levels of a schedule: given, or spaced from one level towards another, or to the data (None)."""

    steps: int | None
    levels: Sequence[int] | None
    spacing: str
    from_level: int | None
    to_level: int | None


def grid(op: str, schedule: Schedule, route: Route, last: int, up: bool) -> list[int]:
    """The levels of the looks. last: the level to which "linspace" goes, -1 the data; up: whether they may increase."""
    T = len(schedule)
    end = -1 if route.to_level is None else checks.integer(op, "to_level", route.to_level, 0, T - 1)
    if route.levels is not None:
        if route.from_level is not None:
            raise ValueError(f"{op}: levels are given as they are: leave out from_level")
        return _given(op, T, route, up)
    first = T - 1 if route.from_level is None else checks.integer(op, "from_level", route.from_level, 0, T - 1)
    if first <= end:
        raise ValueError(f"{op}: from_level must be above to_level, got {first} and {end}; for the way up give levels")
    N = first - end
    steps = N if route.steps is None else checks.integer(op, "steps", route.steps, 1, N)
    if route.spacing in SIGMAS:
        return _by_sigma(schedule, first, end, steps, route.spacing)
    return list(_spaced(first, end, steps, last, route.spacing))


def _given(op: str, T: int, route: Route, up: bool) -> list[int]:
    assert route.levels is not None
    try:
        chosen = [operator.index(t) for t in route.levels]
    except TypeError:
        raise TypeError(f"{op}: levels must be ints, got {route.levels!r}") from None
    whole = chosen if route.to_level is None else [*chosen, route.to_level]
    rises = up and len(whole) > 1 and all(s > t for t, s in pairwise(whole))
    falls = all(s < t for t, s in pairwise(whole))
    if not chosen or min(whole) < 0 or max(whole) >= T or not (rises or falls):
        raise ValueError(f"{op}: levels must decrease within [0, {T}), got {whole}")
    if rises and route.to_level is None:
        raise ValueError(f"{op}: levels must decrease within [0, {T}), got {chosen}; to go up give to_level")
    return chosen


@lru_cache(maxsize=64)
def _spaced(first: int, end: int, steps: int, last: int, spacing: str) -> tuple[int, ...]:
    """Evenly in index. To the data, linspace ends at level `last`; to a level, a step before it."""
    N = first - end
    if spacing == "leading":
        return tuple(end + 1 + k * (N // steps) for k in reversed(range(steps)))
    if spacing == "trailing":
        return tuple(round(first - k * N / steps) for k in range(steps))
    stop, points = (last, steps - last) if end < 0 else (end, steps + 1)
    with outside_modes():
        return tuple(
            int(t)
            for t in torch.linspace(first, stop, points, dtype=torch.float64, device="cpu")[:steps].round().tolist()
        )


def _by_sigma(schedule: Schedule, first: int, end: int, steps: int, spacing: str) -> list[int]:
    """The levels nearest, in log(sigma/alpha), to sigmas spaced as in Karras et al. 2022, eq. 5, or in their logarithm.

    Levels without noise or without signal have no place there; `first` is kept, and no level is taken twice.
    """
    with outside_modes():
        ratio = (schedule.sigma / schedule.alpha).log()
        within = [t for t in range(max(end, 0), first + 1) if bool(ratio[t].isfinite())]
        high, low = float(ratio[within[-1]]), float(ratio[within[0]])
        u = torch.linspace(0, 1, steps + (end >= 0), dtype=torch.float64, device="cpu")[:steps]
        if spacing == "karras":
            wanted = 7 * (math.exp(high / 7) + u * (math.exp(low / 7) - math.exp(high / 7))).log()
        else:
            wanted = high + u * (low - high)
        nearest = [within[int((ratio[within] - w).abs().argmin())] for w in wanted]
    chosen = [first]
    for k, t in enumerate(nearest[1:], 1):
        chosen.append(max(min(t, chosen[-1] - 1), end + steps - k))
    return chosen


def model_times(op: str, schedule: Schedule, levels: list[int], conditioning: Conditioning) -> Told:
    """What the network is told at each of `levels`: the level, its time, sigma, log-SNR or a function's value."""
    alpha, sigma = schedule.alpha[levels], schedule.sigma[levels]
    if callable(conditioning) or (isinstance(conditioning, str) and conditioning == "log_snr"):
        values = conditioning(alpha, sigma) if callable(conditioning) else 2 * (alpha / sigma).log()
        found = checks.float64(op, "conditioning(alpha, sigma)", values)
        if found.shape != alpha.shape or not bool(found.isfinite().all()):
            raise ValueError(
                f"{op}: conditioning must give {len(levels)} finite values, one for each look, got {found}"
            )
        return tuple(found.tolist())
    if conditioning is None:  # the times, where the schedule has them: a network was trained on those
        conditioning = "level" if schedule.times is None else "time"
    CONDITIONING(op, "conditioning", conditioning)
    if conditioning == "level":
        return tuple(levels)
    if conditioning == "time":
        if schedule.times is None:
            raise ValueError(
                f"{op}: conditioning='time' needs a schedule with times (ContinuousSchedule.discretise), got {schedule}"
            )
        return tuple(schedule.times[levels].tolist())
    if not bool((schedule.alpha == 1).all()):
        raise ValueError(
            f"{op}: conditioning='sigma' needs a schedule with alpha = 1 (Schedule.karras), got {schedule}"
        )
    return tuple(schedule.sigma[levels].tolist())


CONDITIONING = checks.one_of("level", "time", "sigma", "log_snr")
