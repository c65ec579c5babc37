"""Which levels a sampler walks through, and what the network is told of each."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, overload

import torch

from .. import checks
from .._torch import outside_modes
from ..schedule import Schedule
from .arguments import Schedules

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


def grid(op: str, schedule: Schedule, steps: int | None, levels: Sequence[int] | None, last: int = 0) -> list[int]:
    """`levels` if given; else `steps` of them evenly spaced in index from T-1 to `last`; all for None.

    last = -1 is the data, one below level 0: the grid comes to it after its last level.
    """
    T = len(schedule)
    if levels is None:
        return list(_spaced(T, T if steps is None else checks.integer(op, "steps", steps, 1, T), last))
    try:
        chosen = [operator.index(t) for t in levels]
    except TypeError:
        raise TypeError(f"{op}: levels must be ints, got {levels!r}") from None
    if not chosen or chosen[0] >= T or chosen[-1] < 0 or any(s >= t for t, s in pairwise(chosen)):
        raise ValueError(f"{op}: levels must decrease within [0, {T}), got {chosen}")
    return chosen


@lru_cache(maxsize=64)
def _spaced(T: int, steps: int, last: int) -> tuple[int, ...]:
    with outside_modes():
        points = torch.linspace(T - 1, last, steps - last, dtype=torch.float64, device="cpu")
        return tuple(int(t) for t in points[:steps].round().tolist())


def model_times(op: str, schedule: Schedule, levels: list[int], conditioning: str | None) -> Told:
    """What the network is told at each of `levels`: the level, its time or its sigma."""
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


CONDITIONING = checks.one_of("level", "time", "sigma")
