"""What the samplers share: the start, the network's output, the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..noise import Noise
from ..ops.checks import like, noise_for, samples
from ..schedule import Schedule

Network = Callable[[Tensor, Tensor], Tensor]
Step = TypeVar("Step")


def start(op: str, shape: Sequence[int], schedule: Schedule, noise: Noise, device: torch.device) -> Tensor:
    """x_T of `shape`: pure noise, of the last level's size where the schedule adds it to the data."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{op}: x must be a tensor or a shape (B, ...), got {type(shape).__name__}")
    if not isinstance(noise, Noise):
        raise TypeError(f"{op}: noise must be a Noise, got {type(noise).__name__}")
    z = noise.fold_in(len(schedule)).normal(shape, device=device)
    return z if schedule.variance_preserving else z * float(schedule.sigma[-1])


def check_start(op: str, x: Tensor, noise: Noise) -> None:
    samples(op, "x", x)
    if isinstance(noise, Tensor):
        raise TypeError(f"{op}: noise must be a Noise, of which every step takes its own, got a tensor")
    noise_for(op, noise, x, "x")


def at(op: str, name: str, net: Network, x: Tensor, t: int) -> Tensor:
    """The network at level t for all samples."""
    return output(op, name, net(x, torch.full(x.shape[:1], t, device=x.device)), x)


def output(op: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    like(op, name, value, "x", x)
    return value.to(x.dtype)


def progressed(plan: Sequence[Step], progress: bool, what: str) -> Iterable[Step]:
    if not progress:
        return plan
    from rich.progress import track

    return track(plan, description=what)
