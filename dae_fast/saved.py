"""What torch.load(weights_only=True) may make of a file: the library's values, which are plain data."""

from __future__ import annotations

from typing import Any

import torch

from . import continuous
from .coefficients import Level
from .nn import DenoisingLoss, EDMPreconditioner, LevelStatistics
from .noise import Noise
from .ops import weighting
from .ops.brownian import BrownianNoise
from .ops.corruption import Corruption, Selection
from .ops.parameterisation import EDM
from .ops.structured import OffsetNoise, PyramidNoise
from .schedule import Schedule, TimedSchedule

VALUES: list[Any] = [
    Noise,
    BrownianNoise,
    Schedule,
    TimedSchedule,
    Level,
    EDM,
    DenoisingLoss,
    EDMPreconditioner,
    LevelStatistics,
    *Corruption.__subclasses__(),
    Selection,
    OffsetNoise,
    PyramidNoise,
    weighting.OnError,
    *{type(named) for named in weighting.NAMES.values()},
    *continuous.PLAIN,
]


def allow() -> None:
    """Adds them to torch's list: a checkpoint with a schedule among its hyperparameters, say, loads as it is."""
    torch.serialization.add_safe_globals(VALUES)
