"""Noise as a value: sixteen bytes that say what every normal of a batch is."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import checks
from ._torch import saveable
from .checks import Array, like
from .kernels import dispatch, reference
from .kernels.dispatch import kernels
from .routing import Route, fast_normal, route
from .torch_noise import TorchNoise

__all__ = ["Noise"]

Span = tuple[int, int]  # rows of one sample, and the sample's element at which the first of them begins
BLOCK = 4  # elements of a Philox block


def to_signed(value: int) -> int:
    """The signed int64 with the bits of `value` modulo 2**64; torch has no uint64 arithmetic."""
    if -(2**63) <= value < 2**63:
        return value
    value &= 0xFFFF_FFFF_FFFF_FFFF
    return value - (value >> 63 << 64)


def _index(expected: str, value: object) -> int:
    """The int that a numpy integer, say, stands for."""
    try:
        if isinstance(value, (bool, type)) or not hasattr(value, "__index__"):
            raise TypeError
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{expected}, got {type(value).__name__}") from None


def _ids(sample: Array) -> Any:
    """int64 of an array of integers."""
    found = checks.as_tensor(sample)
    return found.long() if sample.dtype.kind == "i" else found


class FlatNoise(NamedTuple):
    """A noise as schema arguments; all absent where the key is."""

    key: Tensor | None = None
    sample: Tensor | None = None
    first_sample: int = 0
    rows_per_sample: int = 1
    first_element: int = 0

    def whole(self) -> Noise | None:
        if self.key is None:
            return None
        span = (self.rows_per_sample, self.first_element)
        return Noise._make(0, 0, self.key, self.sample, self.first_sample, None if span == (1, 0) else span)


class Noise:
    """Gaussian noise addressed by a key: never stored, regenerated wherever it is wanted.

    seed: int, taken modulo 2**64; or a key: (seed, offset), as `key` gives it, or an int64 tensor (2,) that
          holds their bits in memory, so that a captured CUDA graph or a compiled function sees new keys
          without a change
    sample: int64 tensor, or array of signed ints, (B,), the id of each row (a data-set index, say); None: first_sample
          + row
    first_sample: id of row 0 when there is no `sample`: a shard's place in the global batch
    first_element: where the rows begin in their samples: a shard's place in the sample (whole blocks of 4 are made in
          the kernel; from any other place the noise is filled in a launch of its own)

    Element i of row b depends on (seed, every fold_in, id of b, i) alone: never on batch size, shard,
    strides, dtype, threads, instruction set or device. The stream is Philox4x32-10 (Salmon et al.
    2011) with Box-Muller normals, the one of torch.func._random. fp32 is the master value: fp16 and
    bf16 are its rounding, fp64 its exact widening; |z| reaches 6.76.

    Equal are those of one key, ids and first element; a key in memory, which may change, is equal to itself alone.
    """

    __slots__ = ("_first_sample", "_key_tensor", "_offset", "_sample", "_seed", "_span")

    def __init__(
        self,
        seed: int | tuple[int, int] | Tensor | Array,
        *,
        sample: Tensor | Array | None = None,
        first_sample: int = 0,
        first_element: int = 0,
    ) -> None:
        self._seed = self._offset = 0
        self._key_tensor: Tensor | None = None
        if isinstance(seed, np.ndarray):
            seed = checks.as_tensor(seed)
        if isinstance(seed, Tensor):
            if seed.dtype != torch.int64 or seed.shape != (2,):
                raise ValueError(
                    f"Noise: a key tensor must be int64 of shape (2,), got {seed.dtype} of {tuple(seed.shape)}"
                )
            self._key_tensor = saveable(seed).contiguous()
        elif isinstance(seed, tuple):
            if len(seed) != 2:
                raise ValueError(f"Noise: a key must be (seed, offset), got {len(seed)} of them")
            self._seed, self._offset = (to_signed(_index("Noise: a key must be of two ints", part)) for part in seed)
        else:
            self._seed = to_signed(
                seed if type(seed) is int else _index("Noise: seed must be an int or an int64 tensor (2,)", seed)
            )
        if isinstance(sample, np.ndarray):
            sample = _ids(sample)
        if sample is not None:
            if not isinstance(sample, Tensor) or sample.dtype != torch.int64 or sample.dim() != 1:
                got = (
                    f"{sample.dtype} of {tuple(sample.shape)}" if isinstance(sample, Tensor) else type(sample).__name__
                )
                raise ValueError(f"Noise: sample must be an int64 tensor (B,), got {got}")
            if first_sample != 0:
                raise ValueError("Noise: give sample or first_sample, not both")
        self._sample = None if sample is None else saveable(sample).contiguous()
        if type(first_sample) is not int:
            first_sample = _index("Noise: first_sample must be an int", first_sample)
        self._first_sample = to_signed(first_sample)
        first_element = checks.integer("Noise", "first_element", first_element)
        if first_element < 0:
            raise ValueError(f"Noise: first_element must not be negative, got {first_element}")
        self._span: Span | None = (1, first_element) if first_element else None

    @classmethod
    def _make(
        cls,
        seed: int,
        offset: int,
        key: Tensor | None = None,
        sample: Tensor | None = None,
        first_sample: int = 0,
        span: Span | None = None,
    ) -> Noise:
        """From signed bits, unchecked."""
        noise = cls.__new__(cls)
        noise._seed, noise._offset, noise._key_tensor = seed, offset, key
        noise._sample, noise._first_sample, noise._span = sample, first_sample, span
        return noise

    def _in_rows(self, rows: int) -> Noise:
        """The same noise of a batch in which each sample is so many rows."""
        if rows == 1:
            return self
        first = self._span[1] if self._span else 0
        return Noise._make(self._seed, self._offset, self._key_tensor, self._sample, self._first_sample, (rows, first))

    def _whole_blocks(self, row: int) -> bool:
        """Whether rows of so many elements begin with a block, as kernels take them."""
        return self._span is None or not (self._span[1] % BLOCK or (self._span[0] > 1 and row % BLOCK))

    @classmethod
    def from_generator(
        cls,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
        sample: Tensor | None = None,
        first_sample: int = 0,
    ) -> Noise:
        """A key drawn from a torch generator (None: the global one), so that torch.manual_seed governs it.

        On the CPU the key lives on the host; on another device it stays there as a tensor and nothing
        synchronises.
        """
        bits = torch.empty(2, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
        noise = cls(bits, sample=sample, first_sample=first_sample)
        if bits.device.type == "cpu" and not torch.compiler.is_compiling():
            noise._seed, noise._offset = bits.tolist()
            noise._key_tensor = None
        return noise

    @staticmethod
    def like_torch(
        seed: int,
        device_type: Literal["cuda", "cpu"] = "cuda",
        *,
        multiprocessors: int = 132,
        threads_per_multiprocessor: int = 2048,
    ) -> TorchNoise:
        """What torch.randn gives with a generator of that device type after manual_seed(seed), on any device.

        multiprocessors, threads_per_multiprocessor: of the GPU whose noise it is, an H100's here (A100: 108, 2048; RTX
            4090: 128, 1536). Torch launches that many threads at most: tensors of more elements depend on it, others do
            not
        noise.normal(shape, dtype=, device=) is the first draw, a tensor, and noise.after(shape) the noise of the next.
        CUDA's is cuRAND's Philox, within the rounding of a GPU's fast sine (1e-6 or so) and in float32, float16 and
        bfloat16; the CPU's is torch's Mersenne Twister itself. Such a tensor is what a saved picture's seed means; a
        Noise is what does not depend on shapes. Raises TypeError or ValueError for other arguments.
        """
        return TorchNoise(seed, device_type, multiprocessors, threads_per_multiprocessor)

    @property
    def key(self) -> tuple[int, int] | Tensor:
        """(seed, offset) as unsigned ints, or the int64 tensor (2,) that holds their bits."""
        if self._key_tensor is not None:
            return self._key_tensor
        return self._seed & 0xFFFF_FFFF_FFFF_FFFF, self._offset & 0xFFFF_FFFF_FFFF_FFFF

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint: Noise.from_state_dict(noise.state_dict()) is the same noise."""
        state = {"key": self.key, "sample": self._sample, "first_sample": self._first_sample}
        return state if self._span is None else {**state, "first_element": self._span[1]}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Noise:
        """Raises ValueError unless it is what state_dict() gives."""
        names = {"key", "sample", "first_sample"}
        if not isinstance(state, dict) or set(state) - {"first_element"} != names:
            raise ValueError(
                "Noise.from_state_dict: state must have key, sample and first_sample, as state_dict() gives"
            )
        rest = {name: value for name, value in state.items() if name != "key"}
        return cls(state["key"], **rest)

    def to(self, device: torch.device | str) -> Noise:
        """The same noise with its key (and sample ids) in memory on `device`."""
        device = checks.device("Noise.to", device)
        sample = None if self._sample is None else self._sample.to(device)
        return Noise._make(0, 0, self._as_tensor().to(device), sample, self._first_sample, self._span)

    def _as_tensor(self) -> Tensor:
        if self._key_tensor is not None:
            return self._key_tensor
        return torch.tensor([self._seed, self._offset], dtype=torch.int64, device="cpu")

    def _on(self, device: torch.device) -> Noise:
        """With its key in memory there."""
        key = self._as_tensor().to(device)
        return Noise._make(0, 0, key, self._sample, self._first_sample, self._span)

    def _flat(self) -> FlatNoise:
        """As the arguments that torch.library takes; the key a tensor, so that a traced function has no constant."""
        return FlatNoise(self._as_tensor(), self._sample, self._first_sample, *(self._span or (1, 0)))

    def _check(self, op: str, B: int, device: torch.device) -> None:
        """Raises ValueError unless the noise fits a batch of B rows on `device`."""
        sample, key = self._sample, self._key_tensor
        if sample is not None:
            rows = self._span[0] if self._span else 1
            if sample.shape[0] * rows != B:
                raise ValueError(f"{op}: noise.sample must have shape ({B // rows},), got {tuple(sample.shape)}")
            if sample.device != device:
                raise ValueError(f"{op}: noise.sample must be on {device}, got {sample.device}")
        if key is not None and key.device != device and key.device.type != "cpu":
            raise ValueError(f"{op}: the noise key must be on {device} or the CPU, got {key.device}")

    def fold_in(self, data: int | Tensor) -> Noise:
        """An independent stream for each `data` (a step, a rank, an epoch), taken modulo 2**64.

        data: int, or an int64 tensor of one element, which makes the new key a tensor on its device.
        """
        if type(data) is not int and not isinstance(data, Tensor):
            data = _index("Noise.fold_in: data must be an int or an int64 tensor", data)
        if isinstance(data, int) and self._key_tensor is None and not torch.compiler.is_compiling():
            seed, offset = dispatch.fold_in(self._seed, self._offset, to_signed(data))
            return Noise._make(seed, offset, None, self._sample, self._first_sample, self._span)
        if isinstance(data, Tensor):
            if data.dtype != torch.int64 or data.numel() != 1:
                raise ValueError(
                    f"Noise.fold_in: a tensor must be int64 with one element, got {data.dtype} of {tuple(data.shape)}"
                )
            data = data.reshape(())
        else:
            data = to_signed(data)
        return Noise._make(0, 0, _fold(self, data), self._sample, self._first_sample, self._span)

    def normal(
        self, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The noise as a tensor: row b, element i of `shape` (B, ...), standard normal.

        noise.normal(shape).numpy() is the same memory as a numpy array.
        Raises ValueError when `shape` has no batch dimension or `sample` is not (B,).
        """
        if not is_compiling():
            made: Tensor | None = fast_normal(self, shape, dtype, device)
            if made is not None:
                return made
        return fill("normal", self, checks.shape("normal", shape), dtype, checks.device("normal", device))

    def bits(self, shape: Sequence[int], *, below: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The words behind the noise, int64 in [0, 2**32): element i of row b is word i of its stream.

        below: in [1, 2**31]: word w becomes floor(w * below / 2**32), uniform in [0, below) but for below / 2**32
        Use a key of their own (fold_in a tag) for decisions that must not depend on the normals.
        """
        if below is not None:
            below = _index("bits: below must be an int in [1, 2**31]", below)
        if below is not None and not 1 <= below <= 2**31:
            raise ValueError(f"bits: below must be in [1, 2**31], got {below}")
        place = checks.device("bits", device)
        return fill("bits", self, checks.shape("bits", shape), torch.int64, place, below or 2**32)

    def _place(self) -> tuple[Any, ...]:
        """All but the ids."""
        key = (self._seed, self._offset) if self._key_tensor is None else id(self._key_tensor)
        return key, self._first_sample, self._span or (1, 0), self._sample is None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Noise):
            return NotImplemented
        if self is other:
            return True
        mine, theirs = self._sample, other._sample
        if self._place() != other._place():
            return False
        return mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))

    def __hash__(self) -> int:
        return hash(self._place())

    def _at(self, first: int) -> Noise:
        """The same noise, rows beginning at that element of their samples."""
        return Noise._make(
            self._seed, self._offset, self._key_tensor, self._sample, self._first_sample, (1, first) if first else None
        )

    def _cut(self, op: str, B: int, D: int, dtype: torch.dtype, device: torch.device, below: int) -> Tensor:
        """(B, D) of rows that do not begin with a block: cut out of whole samples that do."""
        assert self._span is not None
        rows, first = self._span
        skip = first % BLOCK
        filled = fill(op, self._at(first - skip), (B // rows, skip + rows * D), dtype, device, below)
        return filled[:, skip:].reshape(B, D)

    def __repr__(self) -> str:
        ids = f", sample={tuple(self._sample.shape)}" if self._sample is not None else ""
        first = f", first_sample={self._first_sample}" if self._first_sample else ""
        element = f", first_element={self._span[1]}" if self._span and self._span[1] else ""
        return f"Noise(key={self.key}{ids}{first}{element})"


def noise_for(op: str, noise: Noise | Tensor, x: Tensor, x_name: str) -> tuple[Tensor | None, Noise | None]:
    """(tensor, None) or (None, Noise), fit for batch x."""
    if isinstance(noise, Tensor):
        like(op, "noise", noise, x_name, x)
        return noise, None
    if not isinstance(noise, Noise):
        raise TypeError(f"{op}: noise must be a Noise or a tensor like {x_name}, got {type(noise).__name__}")
    noise._check(op, x.shape[0], x.device)
    return None, noise


def _fold(noise: Noise, data: Tensor | int) -> Tensor:
    """The folded key, on data's device, or the key's for an int."""
    place = data if isinstance(data, Tensor) else noise._as_tensor()
    way = route("fold_in", place, noise._key_tensor)
    if way is Route.DIRECT:
        return kernels(place, "fold_in").fold_in_tensor(noise, data)
    if not isinstance(data, Tensor):
        data = torch.full((), data, dtype=torch.int64, device=place.device)  # torch.tensor would wait for a copy
    if way is Route.REFERENCE:
        return reference.fold_in_tensor(noise, data)
    return torch.ops.dae_fast.fold_in(noise._as_tensor().to(place.device), data)


def fill(
    op: str, noise: Noise, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, below: int = 2**32
) -> Tensor:
    """`shape` full of the noise's normals or words."""
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if op == "normal" and (not isinstance(dtype, torch.dtype) or dtype not in floats):
        raise TypeError(f"{op}: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    B, D = shape[0], math.prod(shape[1:])
    place = torch.empty(0, device=device)
    device = place.device  # "cuda" with its number
    noise._check(op, B, device)
    if not noise._whole_blocks(D):
        return noise._cut(op, B, D, dtype, device, below).reshape(shape)
    way = route(op, place, noise._key_tensor, noise._sample)
    if way is not Route.DISPATCHER:
        module = reference if way is Route.REFERENCE else kernels(place, op)
        if op == "bits":
            return module.words(noise, (B, D), device, below=below).reshape(shape)
        return module.normal(noise, (B, D), dtype, device).reshape(shape)
    flat: Tensor = torch.ops.dae_fast.fill(op, *noise._on(device)._flat(), B, D, dtype, below)
    return flat.reshape(shape)
