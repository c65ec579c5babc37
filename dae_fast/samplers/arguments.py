"""What the samplers' arguments must be: one table, as a name means one thing in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import checks
from ..continuous import ContinuousSchedule
from ..noise import Noise
from ..ops.brownian import BrownianNoise
from ..ops.parameterisation import check_name
from ..schedule import Schedule
from .levels import SPACINGS

Network = Callable[..., Any]
Start = Tensor | Sequence[int]
Noises = Noise | BrownianNoise  # of a whole loop

ONE_OF_LEVELS = checks.instance(Schedule, "a Schedule")  # of samplers that take a step for each level


def some_steps(op: str, name: str, value: Any) -> int | None:
    """None is one per level."""
    return None if value is None else checks.integer(op, name, value)


def some_variance(op: str, name: str, value: Any) -> None:
    """None is none."""
    if value is not None:
        checks.one_of("learned")(op, name, value)


ARGUMENTS: dict[str, checks.Check] = {
    "net": checks.function,
    "score": checks.function,
    "schedule": checks.instance((Schedule, ContinuousSchedule), "a Schedule or a ContinuousSchedule"),
    "noise": checks.instance(Noise, "a Noise"),
    "predict": check_name,
    "steps": some_steps,
    "steps_per_level": checks.whole(1),
    "corrector_steps": checks.whole(0),
    "threshold": checks.a_number,
    "eta": checks.a_number,
    "noise_scale": checks.a_number,
    "step_size": checks.a_number,
    "snr": checks.real("finite and not negative"),
    "S_churn": checks.real("finite and not negative"),
    "S_tmin": checks.real("no NaN"),
    "S_tmax": checks.real("no NaN"),
    "S_noise": checks.real("finite and not negative"),
    "guidance_rescale": checks.real("in [0, 1]"),
    "self_condition": checks.flag,
    "variance": some_variance,
    "spacing": checks.one_of(*SPACINGS),
    "use_clipped_model_output": checks.flag,
    "denoise": checks.flag,
    "progress": checks.flag,
    "graph": checks.flag,
}


def looked_at(op: str, name: str, value: Any, table: dict[str, checks.Check]) -> Any:
    """The value, or what its check in `table` makes of it."""
    seen = table[name](op, name, value) if name in table else None
    return value if seen is None else seen
