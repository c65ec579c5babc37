"""The normals of torch's own generators, CUDA's without a GPU: seeds that people share give the same noise anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .kernels.reference import philox4x32_10

BLOCK_SIZE = 256  # threads of a block in ATen's distribution kernels
UNROLL = 4  # normals that a thread takes of each Philox block
_MASK = 0xFFFF_FFFF


class TorchNoise:
    """What torch.randn draws after manual_seed, as Noise.like_torch gives it; a value, which drawing leaves as it is.

    noise.normal(shape) is the draw, noise.after(shape) what the generator draws after it.
    """

    __slots__ = ("_before", "_device_type", "_offset", "_seed", "_threads")

    def __init__(self, seed: int, device_type: str, multiprocessors: int, threads_per_multiprocessor: int) -> None:
        self._seed = checks.integer("like_torch", "seed", seed)
        if device_type not in ("cpu", "cuda"):
            raise ValueError(f"like_torch: device_type must be 'cpu' or 'cuda', got {device_type!r}")
        self._device_type = device_type
        number = checks.integer("like_torch", "multiprocessors", multiprocessors, 1)
        each = checks.integer("like_torch", "threads_per_multiprocessor", threads_per_multiprocessor, BLOCK_SIZE)
        self._threads = number * (each // BLOCK_SIZE) * BLOCK_SIZE  # that a launch has at the most
        self._offset = 0  # blocks that CUDA's generator has given each thread
        self._before: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()  # the draws that the CPU's has made

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """As torch.randn(shape, dtype=dtype), which `device` then holds.

        dtype: float32, float16 or bfloat16; of the CPU's generator float64 too
        """
        shape, dtype = self._asked(shape, dtype)
        place = checks.device("normal", device)
        if self._device_type == "cuda":
            return self._of_cuda(math.prod(shape), place).to(dtype).reshape(shape)
        generator = torch.Generator().manual_seed(self._seed)
        for earlier, its_dtype in self._before:
            torch.randn(earlier, generator=generator, dtype=its_dtype)
        return torch.randn(shape, generator=generator, dtype=dtype).to(place)

    def after(self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> TorchNoise:
        """The noise of the next draw, where one of `shape` came before."""
        shape, dtype = self._asked(shape, dtype)
        made = object.__new__(TorchNoise)
        made._seed, made._device_type, made._threads = self._seed, self._device_type, self._threads
        made._before = (*self._before, (shape, dtype))
        made._offset = self._offset + self._rounds(math.prod(shape))
        return made

    def _asked(self, shape: Sequence[int], dtype: Any) -> tuple[tuple[int, ...], torch.dtype]:
        known = (torch.float32, torch.float16, torch.bfloat16, *((torch.float64,) * (self._device_type == "cpu")))
        if dtype not in known:
            names = ", ".join(str(d).removeprefix("torch.") for d in known)
            raise TypeError(f"like_torch: dtype must be one of {names}, got {dtype}")
        return checks.shape("normal", shape), dtype

    def _grid(self, count: int) -> int:
        """Threads of ATen's launch for so many elements."""
        return max(BLOCK_SIZE, min(self._threads, -(-count // BLOCK_SIZE) * BLOCK_SIZE))

    def _rounds(self, count: int) -> int:
        """Philox blocks that each thread takes."""
        return -(-count // (self._grid(count) * UNROLL))

    def _of_cuda(self, count: int, device: torch.device) -> Tensor:
        """Element i is value (i // threads) % 4 of block offset + i // (4 threads) of subsequence i % threads."""
        threads = self._grid(count)
        element = torch.arange(count, dtype=torch.int64, device=device)
        block = self._offset + element // (UNROLL * threads)
        zero = torch.zeros_like(element)
        seed = [torch.full_like(zero, part) for part in (self._seed & _MASK, self._seed >> 32 & _MASK)]
        words = philox4x32_10((block & _MASK, block >> 32, element % threads, zero), (seed[0], seed[1]))
        which = element // threads % UNROLL
        pair = which >= 2
        u, v = (torch.where(pair, b, a).float() for a, b in (words[0::2], words[1::2]))
        # cuRAND's Box-Muller: the sine first. Its u and angle are float32, the rest is rounded once here.
        u = u * 2.0**-32 + 2.0**-33
        angle = (v * (2.0**-31 * math.pi) + 2.0**-32 * math.pi).double()
        turned = torch.where(which % 2 == 0, angle.sin(), angle.cos())
        return (torch.sqrt(-2 * u.double().log()) * turned).float()

    def __repr__(self) -> str:
        return f"TorchNoise(seed={self._seed}, device_type={self._device_type!r}, draws before: {len(self._before)})"
