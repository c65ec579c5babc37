"""Gaussian noise with a part that neighbouring elements share, taken where add_noise and the losses take a Noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import interpolate

from .. import checks as numbers
from .._torch import dispatch_modes, outside_modes
from ..checks import DTYPES, as_number
from ..kernels.spec import compute_dtype
from ..noise import Noise
from ..primitives import summed

__all__ = ["OffsetNoise", "PyramidNoise"]

# Streams of the shared parts.
OFFSET_TAG = 0x6F6666736574  # "offset"
PYRAMID_TAG = 0x707972616D6964  # "pyramid"

Operands = tuple[Tensor | None, Noise, float, float]


class StructuredNoise(ABC):
    """What OffsetNoise and PyramidNoise share: factor_y * y + factor_eps * eps, eps fresh and independent of y."""

    __slots__ = ("_noise",)

    def __init__(self, noise: Noise) -> None:
        if not isinstance(noise, Noise):
            raise TypeError(f"{type(self).__name__}: noise must be a Noise, got {type(noise).__name__}")
        self._noise = noise

    @abstractmethod
    def as_operands(self, x: Tensor) -> Operands:
        """(y, noise, factor_y, factor_eps) for samples x: the noise is factor_y * y + factor_eps * eps, and eps is
        what `noise` is for x's shape. y is like x, perhaps of stride 0, and has no gradient; None where it is 0.

        So it is one more tensor in an op's affine map, whose kernel makes eps.
        """

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The noise as a tensor of `shape` (B, ...)."""
        op = f"{type(self).__name__}.normal"
        shape, device = numbers.shape(op, shape), numbers.device(op, device)
        if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
            raise TypeError(f"{op}: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        like = torch.empty((), dtype=compute_dtype(dtype), device=device).expand(shape)
        self._check(op, shape[0], like.device)
        y, noise, factor_y, factor_eps = self.as_operands(like)
        if y is None:  # alone, eps is of unit variance
            return noise.normal(shape, dtype=dtype, device=device)
        return summed(op, ("y", "noise"), (y, noise), (factor_y, factor_eps), None).to(dtype)

    def _check(self, op: str, B: int, device: torch.device) -> None:
        self._noise._check(op, B, device)

    def _first_channel(self, x: Tensor) -> int:
        """Of samples x (B, C, ...) that are a part of larger ones, a number of whole channels."""
        first, size = self._noise._span[1] if self._noise._span else 0, max(1, math.prod(x.shape[2:]))
        if first % size:
            name = type(self).__name__
            raise ValueError(f"{name}: first_element must be a multiple of {size}, a channel's elements, got {first}")
        return first // size


class OffsetNoise(StructuredNoise):
    """eps + strength * n, one normal n to each sample and channel: it moves a channel's mean as well.

    noise: Noise; n is that under its OFFSET_TAG, a (B, C) tensor      strength: float
    Of samples (B, C, ...). Variance 1 + strength^2, and strength^2 between the elements of a channel. In add_noise
    the (B, C) normals are read with stride 0 and eps is made in the kernel: one pass. Guttenberg 2023, "Diffusion
    with offset noise".
    """

    __slots__ = ("_strength",)

    def __init__(self, noise: Noise, strength: float = 0.1) -> None:
        super().__init__(noise)
        self._strength = numbers.number("OffsetNoise", "strength", strength, "finite")

    def fold_in(self, data: int | Tensor) -> OffsetNoise:
        """As Noise.fold_in."""
        return OffsetNoise(self._noise.fold_in(data), self._strength)

    def as_operands(self, x: Tensor) -> Operands:
        if x.dim() < 2:
            raise ValueError(f"OffsetNoise: samples must be (B, C, ...), got shape {tuple(x.shape)}")
        B, C = x.shape[:2]
        stream = self._noise._at(self._first_channel(x)).fold_in(OFFSET_TAG)
        n = stream.normal((B, C), dtype=compute_dtype(x.dtype), device=x.device)
        # The strength is not left to factor_y: every factor is a table to a schedule.
        y = (self._strength * n).to(x.dtype).reshape(B, C, *[1] * (x.dim() - 2))
        return y.expand(x.shape), self._noise, 1.0, 1.0

    def __repr__(self) -> str:
        return f"OffsetNoise({self._noise}, strength={self._strength})"


class PyramidNoise(StructuredNoise):
    """Noise at several resolutions: sum_k discount^k n_k, level k at a half of level k - 1's size, of unit variance.

    noise: Noise; level 0 is its eps, level k that of fold_in(PYRAMID_TAG).fold_in(k)
    discount: float >= 0      levels: how many, the full size included; None: down to one element
    Of samples (B, C, ...) with one to three spatial dimensions of size S; level k has S // 2^k elements along each, at
    least 1, brought to full size by linear interpolation. Every element of every level has variance 1 (what the
    interpolation averages away is put back), and the sum is divided by sqrt(sum_k discount^2k). The levels below the
    first are one tensor like the samples, made by torch, so the last bits are those of the device; eps is made in the
    kernel. Whitaker 2023, "Multi-resolution noise for diffusion model training".
    """

    __slots__ = ("_discount", "_levels")

    def __init__(self, noise: Noise, discount: float = 0.8, levels: int | None = None) -> None:
        super().__init__(noise)
        self._discount = as_number("PyramidNoise", "discount", discount)
        if not 0 <= self._discount < math.inf:
            raise ValueError(f"PyramidNoise: discount must be finite and not negative, got {discount}")
        self._levels = None if levels is None else numbers.integer("PyramidNoise", "levels", levels)
        if self._levels is not None and self._levels < 1:
            raise ValueError(f"PyramidNoise: levels must be at least 1, got {levels}")

    def fold_in(self, data: int | Tensor) -> PyramidNoise:
        """As Noise.fold_in."""
        return PyramidNoise(self._noise.fold_in(data), self._discount, self._levels)

    def as_operands(self, x: Tensor) -> Operands:
        if not 3 <= x.dim() <= 5:
            raise ValueError(
                "PyramidNoise: samples must be (B, C, ...) with one to three spatial dimensions, "
                f"got shape {tuple(x.shape)}"
            )
        size = tuple(x.shape[2:])
        sizes = _below(size, self._levels)
        norm = sum(self._discount ** (2 * k) for k in range(len(sizes) + 1)) ** -0.5
        if not sizes or not x.numel():
            return None, self._noise, norm, norm
        compute, stream, first = compute_dtype(x.dtype), self._noise.fold_in(PYRAMID_TAG), self._first_channel(x)
        total = torch.zeros((), dtype=compute, device=x.device)
        for k, smaller in enumerate(sizes, 1):
            own = stream._at(first * math.prod(smaller)).fold_in(k)
            n = own.normal((*x.shape[:2], *smaller), dtype=compute, device=x.device)
            total = torch.add(total, enlarge(n, size), alpha=self._discount**k)
        return total.to(x.dtype), self._noise, norm, norm

    def __repr__(self) -> str:
        return f"PyramidNoise({self._noise}, discount={self._discount}, levels={self._levels})"


def _below(size: tuple[int, ...], levels: int | None) -> list[tuple[int, ...]]:
    """The sizes of the levels below the first."""
    found: list[tuple[int, ...]] = []
    while max(size) > 1 and (levels is None or len(found) + 1 < levels):
        size = tuple(max(1, s // 2) for s in size)
        found.append(size)
    return found


def enlarge(n: Tensor, size: tuple[int, ...]) -> Tensor:
    """Independent normals (B, C, ...) interpolated linearly to `size`, every element of variance 1."""
    mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
    made = interpolate(n, size, mode=mode)
    # An element is a weighted sum, along each dimension: it is divided by the norm of the weights.
    norms = _norms if is_compiling() or dispatch_modes() else _kept_norms
    for d, (smaller, larger) in enumerate(zip(n.shape[2:], size, strict=True)):
        made = made / norms(smaller, larger, n.dtype, n.device).reshape(-1, *[1] * (len(size) - 1 - d))
    return made


def _norms(smaller: int, larger: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    one_by_one = torch.eye(smaller, dtype=dtype, device=device)[None]
    return interpolate(one_by_one, larger, mode="linear").norm(dim=1)[0]


@lru_cache(maxsize=256)
def _kept_norms(*of: Any) -> Tensor:
    with outside_modes():
        return _norms(*of)
