"""torch.func._random's keys: the stream of a Noise is torch's own stateless one, and its keys go both ways.

from dae_fast.integrations import torch_random
noise = torch_random.from_key(torch.func._random.key(0))
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise import BLOCK, Noise, to_signed

__all__ = ["from_key", "sample_keys", "to_key"]


def from_key(key: Tensor, *, sample: Tensor | None = None, first_sample: int = 0) -> Noise:
    """The Noise of a key that torch.func._random's key, split or fold_in gave.

    key: uint64 (2,); one on a GPU stays there, one on the CPU becomes two ints      sample, first_sample: as Noise's
    noise.fold_in(n) is from_key(torch.func._random.fold_in(key, n)). Raises ValueError for another tensor.
    """
    if not isinstance(key, Tensor) or key.dtype != torch.uint64 or key.shape != (2,):
        got = f"{key.dtype} of {tuple(key.shape)}" if isinstance(key, Tensor) else type(key).__name__
        raise ValueError(f"from_key: key must be uint64 of shape (2,), got {got}")
    bits = key.view(torch.int64)
    if bits.device.type != "cpu":
        return Noise(bits, sample=sample, first_sample=first_sample)
    seed, offset = bits.tolist()
    return Noise((seed, offset), sample=sample, first_sample=first_sample)


def to_key(noise: Noise) -> Tensor:
    """The key (2,), uint64, of a noise; on the CPU where the noise has it on the host. Ids are not part of it."""
    return noise._as_tensor().clone().view(torch.uint64)


def sample_keys(noise: Noise, samples: int) -> Tensor:
    """(B, 2) uint64, a key of each sample: torch.func._random.normal(keys[:, None], (B, D)) is noise.normal((B, D)).

    Within torch's rounding of ln u: 2e-5, below 1.5e-6 in all but 0.01 % of values. The keys are on the CPU; a noise
    that has its key or ids in a GPU's memory is waited for. Raises ValueError where its first element does not begin a
    block of four.
    """
    noise._check("sample_keys", samples, torch.device("cpu") if noise._sample is None else noise._sample.device)
    first = noise._span[1] if noise._span else 0
    if first % BLOCK:
        raise ValueError(f"sample_keys: first_element must be a multiple of {BLOCK}, got {first}")
    known = noise._sample
    ids = range(noise._first_sample, noise._first_sample + samples) if known is None else known.tolist()
    keys = torch.stack([noise.fold_in(to_signed(b))._as_tensor().cpu() for b in ids]) if samples else torch.zeros(0, 2)
    keys = keys.long()
    keys[:, 1] += first // BLOCK
    return keys.view(torch.uint64)
