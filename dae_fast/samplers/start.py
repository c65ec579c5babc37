"""What a sampler starts from."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks
from ..checks import samples
from ..graphs import start_device
from ..noise import Noise, noise_for
from ..ops.brownian import BrownianNoise
from .arguments import Noises

START_TAG = 0x7374617274  # "start"
UNNOISED = 0.1  # alpha/sigma from which a start of pure noise is not the law of x_t
PACKAGE = str(Path(__file__).parents[1])


def draw_start(
    op: str, shape: Sequence[int], noise: Noises, alpha: float, sigma: float, device: torch.device | str
) -> Tensor:
    """noise.fold_in(START_TAG), of a path that of its Noise, times sigma unless alpha^2 + sigma^2 = 1.

    So one key is one start, whatever the schedule, its levels and the sampler.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{op}: x must be a tensor or a shape (B, ...), got {type(shape).__name__}")
    noise = stream_of(noise)
    if not isinstance(noise, Noise):
        raise TypeError(f"{op}: noise must be a Noise, got {type(noise).__name__}")
    shape = checks.shape(f"{op}: x must be a tensor or a shape", shape)
    z = noise.fold_in(START_TAG).normal(shape, device=device)
    return z if abs(alpha**2 + sigma**2 - 1) < 1e-9 else z * sigma


def device_of_start(op: str, graph: bool) -> torch.device:
    return start_device(op) if graph else torch.device("cpu")


def stream_of(noise: Any) -> Any:
    """The Noise of a path; anything else as it is."""
    return noise._noise if isinstance(noise, BrownianNoise) else noise


def check_start(op: str, x: Tensor, noise: Noises) -> None:
    samples(op, "x", x)
    if isinstance(noise, Tensor):
        raise TypeError(f"{op}: noise must be a Noise, of which every step takes its own, got a tensor")
    noise_for(op, stream_of(noise), x, "x")


def warn_of_signal(op: str, where: str, alpha: float, sigma: float) -> None:
    """That pure noise is not what x_t is there."""
    if alpha > UNNOISED * sigma and not is_compiling():
        warnings.warn(
            f"{op}: a start of pure noise is not the law of x_t at {where}, which keeps "
            f"alpha = {alpha:.3g} of the data beside sigma = {sigma:.3g}: use zero_terminal_snr() or a schedule "
            "that ends in noise, or give x = alpha*x0 + sigma*eps",
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """Of the first frame outside this package, for a warning by the function that asks."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
