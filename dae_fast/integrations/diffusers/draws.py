"""The noise of a step: torch's own, through the caller's generator, or a key."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...noise import Noise, to_signed

STEPS_TAG = 0x7374657073  # "steps"


def keyed(generator: Any, step: int, batch: int, device: torch.device) -> Noise:
    """The noise of a step of samples that have a seed each, whatever they are batched with.

    generator: a list of torch.Generators or ints, a seed for each sample; one of either, whose seed is the first
        sample's and the next the next's; None: a key from torch's global generator, which torch.manual_seed governs
    A generator says its seed (initial_seed) and is not drawn from.
    """
    return Noise.from_generator() if generator is None else seeded(generator, batch, device).fold_in(step)


def seeded(generator: Any, batch: int, device: torch.device) -> Noise:
    """The noise of all steps."""
    if isinstance(generator, (list, tuple)):
        if len(generator) not in (1, batch):
            raise ValueError(
                f"step: generator must be one, or {batch} of them, one for each sample, got {len(generator)}"
            )
        if len(generator) == batch:
            ids = _ids(tuple(_seed(g) for g in generator), device)
            return Noise(STEPS_TAG, sample=ids)
        generator = generator[0]
    return Noise(STEPS_TAG, first_sample=_seed(generator))


def _seed(generator: Any) -> int:
    if isinstance(generator, torch.Generator):
        return to_signed(generator.initial_seed())
    if type(generator) is not int:
        raise TypeError(
            f"step: generator must be a torch.Generator or an int, or a list, got {type(generator).__name__}"
        )
    return to_signed(generator)


@lru_cache(maxsize=64)
def _ids(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Kept, so that a loop copies them to its device once."""
    return torch.tensor(seeds, dtype=torch.int64, device=device)
