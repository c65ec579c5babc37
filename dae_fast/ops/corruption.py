"""Masking noise, salt-and-pepper and patch masks: corruptions that are values, drawn again wherever they are wanted.

An element is masked when its word of the noise's stream, under a tag of its own, is below a threshold: a comparison
of integers, so that every device, dtype and layout strikes the same elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks
from .._torch import DirectFunction, batchable
from ..checks import as_number, can_read, check_per_sample, samples
from ..coefficients import changing, stack_rows, traced
from ..kernels import reference
from ..kernels.dispatch import kernels
from ..kernels.spec import Bounds, on_device
from ..noise import Noise
from ..primitives.masks import Drawn
from ..routing import Route, on_mesh, route, wants_grad

__all__ = ["Masking", "PatchMask", "SaltAndPepper", "corrupt", "patch_mask"]

# Streams of their own, so that what is masked does not depend on the normals of the same noise.
MASK_TAG = 0x6D61736B  # "mask"
PATCH_TAG = 0x7061746368  # "patch"
USUAL = (0.0, 0.0), (0.0, 1.0)  # what masked elements become by default


class Corruption:
    """What Masking and SaltAndPepper share: which elements are masked, each with probability p."""

    __slots__ = ("_noise", "_p")

    def __init__(self, p: float | Tensor, noise: Noise) -> None:
        name = type(self).__name__
        if not isinstance(noise, Noise):
            raise TypeError(f"{name}: noise must be a Noise, got {type(noise).__name__}")
        self._p = _probability(name, "p", p)
        self._noise = noise.fold_in(MASK_TAG)

    @property
    def masked(self) -> Selection:
        """For a loss's mask=: the elements that were replaced count."""
        return Selection(self, visible=False)

    @property
    def visible(self) -> Selection:
        """For a loss's mask=: the elements that were left as they are count. The same as ~corruption."""
        return Selection(self, visible=True)

    def __invert__(self) -> Selection:
        return self.visible

    def mask(self, shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
        """A bool tensor of `shape` (B, ...), True where an element is masked, for code that needs one stored."""
        op = f"{type(self).__name__}.mask"
        like = torch.empty((), device=checks.device(op, device)).expand(checks.shape(op, shape))
        return self._drawn(op, like).on(like)

    def _drawn(self, op: str, x: Tensor) -> Drawn:
        """As a loss on x takes it: the masked elements count."""
        return self.masked._drawn(op, x)

    def _shares(self) -> tuple[float, float]:
        """Of the masked elements: those that become `low`, and all."""
        return 1.0, 1.0

    def _low_high(self, value: float) -> Bounds:
        """What they become, given corrupt's `value`."""
        return value, value

    def _thresholds(self, op: str, x: Tensor) -> Tensor:
        """int64 (1 or B, 2) on x's device: p * 2^32, to the nearest integer, of each of the shares."""
        self._noise._check(op, x.shape[0], x.device)
        p = check_per_sample(op, f"{type(self).__name__}'s p", self._p, x)
        p = p.double() if isinstance(p, Tensor) else p
        columns = tuple(share * p * 2.0**32 + 0.5 for share in self._shares())
        return traced(stack_rows(op, columns, x, torch.int64)).table  # int64: what follows the point is cut off


class Masking(Corruption):
    """Masking noise: each element is masked with probability p, on its own. A value; no mask is stored.

    p: float, or a tensor () or (B,), in [0, 1]: 0 strikes nothing, 1 everything
    noise: Noise; the words under its MASK_TAG decide: element i of row b is masked when word i is below p * 2^32

    corrupt(x, masking) puts a value in the place of what is masked. A loss takes masking.masked (or masking) and
    masking.visible (or ~masking) as its mask=, and so counts these elements alone. How many are masked is binomial:
    p * n expected. Raises TypeError, or ValueError for p outside [0, 1] (looked at on the CPU alone).
    Vincent et al. 2008.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Masking(p={self._p}, noise={self._noise})"


class SaltAndPepper(Corruption):
    """Each element is masked with probability p, and becomes `high` (salt) or `low` (pepper). A value.

    p, noise: as of Masking, with which it strikes the same elements      low, high: float
    salt: in [0, 1], the share of the masked elements that become `high`
    Used, and raises, as Masking. Vincent et al. 2010, section 5.2.
    """

    __slots__ = ("_high", "_low", "_salt")

    def __init__(
        self, p: float | Tensor, noise: Noise, *, low: float = 0.0, high: float = 1.0, salt: float = 0.5
    ) -> None:
        super().__init__(p, noise)
        name = type(self).__name__
        self._low, self._high = as_number(name, "low", low), as_number(name, "high", high)
        if isinstance(salt, Tensor):
            raise TypeError(f"{name}: salt must be a float, got a tensor")
        self._salt: float = _probability(name, "salt", salt)  # type: ignore[assignment]

    def _shares(self) -> tuple[float, float]:
        return 1.0 - self._salt, 1.0

    def _low_high(self, value: float) -> Bounds:
        if value != 0.0:
            raise ValueError(f"corrupt: value is for a Masking; SaltAndPepper has low and high, got value={value}")
        return self._low, self._high

    def __repr__(self) -> str:
        return f"SaltAndPepper(p={self._p}, noise={self._noise}, low={self._low}, high={self._high}, salt={self._salt})"


@dataclass(frozen=True, slots=True)
class Selection:
    """The elements that a loss counts: those that a corruption masked, or left visible. No tensor."""

    corruption: Corruption
    visible: bool

    def __invert__(self) -> Selection:
        return Selection(self.corruption, not self.visible)

    def _drawn(self, op: str, x: Tensor) -> Drawn:
        """As residual_loss takes it, for the samples x."""
        return Drawn(self.corruption._noise, self.corruption._thresholds(op, x), self.visible)


def corrupt(x: Tensor, corruption: Corruption, value: float = 0.0) -> Tensor:
    """x with its masked elements replaced: by `value`, or by the low and high of a SaltAndPepper.

    x: (B, ...) fp16/bf16/fp32/fp64      corruption: Masking or SaltAndPepper
    value: float, of a Masking alone      returns: like x
    Reads x once, and nothing of it where it is masked (a NaN there is gone); writes once; no mask is stored.
    Gradient: that of the output where x is kept, 0 where it is masked, by the same kernel.
    Raises ValueError when p or the noise's sample ids do not fit the batch, or for a value with SaltAndPepper.
    Vincent et al. 2008.
    """
    op = "corrupt"
    samples(op, "x", x)
    if not isinstance(corruption, Corruption):
        raise TypeError(f"{op}: corruption must be a Masking or a SaltAndPepper, got {type(corruption).__name__}")
    low, high = corruption._low_high(as_number(op, "value", value))
    return _replaced(op, x, corruption._noise, corruption._thresholds(op, x), low, high)


def _replaced(op: str, x: Tensor, noise: Noise, thresholds: Tensor, low: float, high: float) -> Tensor:
    """x with `low` where its word is below the first threshold of its row, `high` where below the second."""
    if (mesh := on_mesh(x)) is not None:
        return mesh.replaced(_replaced, op, x, noise, thresholds, low, high)
    if not noise._whole_blocks(math.prod(x.shape[1:])):
        words = noise.bits(x.shape, device=x.device)
        first, second = (reference.row_of(on_device(thresholds, x.device), k, x) for k in (0, 1))
        return torch.where(words < first, low, torch.where(words < second, high, x)).to(x.dtype)
    way = route(op, x, thresholds)
    if way is Route.REFERENCE:
        return reference.corrupt(x, noise, thresholds, (low, high))
    if way is Route.DIRECT:
        if wants_grad(x):
            return _Replaced.apply(x, thresholds, (op, noise, low, high))
        return kernels(x, op).corrupt(x, noise, thresholds, (low, high))
    fixed = not is_compiling() or (low, high) in USUAL
    given, values = (x, (low, high)) if fixed else (x.new_zeros(()).expand(x.shape), (1.0, 2.0))
    replaced: Tensor = torch.ops.dae_fast.corrupt(given, thresholds, *noise._flat(), *values, op)
    if fixed:
        return replaced
    # The op's own values are constants of a graph, which would be another for each of them.
    pepper, salt = (changing(value, x).to(x.dtype) for value in (low, high))
    return torch.where(replaced == 1, pepper, torch.where(replaced == 2, salt, x))


class _Replaced(DirectFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, thresholds: Tensor, rest: tuple[Any, ...]) -> Tensor:
        op, noise, low, high = rest
        ctx.save_for_backward(thresholds, noise._key_tensor, noise._sample)
        ctx.rest = op, noise
        return kernels(x, op).corrupt(x, noise, thresholds, (low, high))

    @staticmethod
    @batchable
    def backward(ctx: Any, g: Tensor) -> Any:
        thresholds, *_ = ctx.saved_tensors
        op, noise = ctx.rest
        return _replaced(op, g, noise, thresholds, 0.0, 0.0), None, None


class PatchMask(NamedTuple):
    """What patch_mask returns."""

    ids_keep: Tensor  # (B, K) int64, the kept patches, in random order
    ids_restore: Tensor  # (B, N) int64, where each patch stands among the kept, then the removed
    mask: Tensor  # (B, N) bool, True where a patch was removed


def patch_mask(noise: Noise, B: int, patches: int, ratio: float, *, device: torch.device | str = "cpu") -> PatchMask:
    """A masked autoencoder's random masking: of every image exactly K = floor(patches * (1 - ratio)) patches are kept.

    noise: Noise; the patches are sorted by their words under its PATCH_TAG, ties by index      B: images
    patches: N to an image      ratio: in [0, 1], the share that is removed; what is within 1e-6 of a patch more keeps
            it, so that a decimal fraction is exact: 0.9 of 10 patches leaves 1
    returns: ids_keep (B, K), ids_restore (B, N), mask (B, N) bool, True = removed

    With x (B, N, D): visible = x.gather(1, ids_keep[:, :, None].expand(-1, -1, D)); the decoder's input, mask tokens
    after the encoded, goes back in place by gather(1, ids_restore[:, :, None].expand(-1, -1, D)). A loss on the
    removed patches takes mask=mask[:, :, None]: it is expanded with stride 0, no full mask is made.
    An image's masks depend on the noise's key and its sample id alone. Raises ValueError for a ratio outside [0, 1].
    He et al. 2022, section 3 and its code's random_masking.
    """
    op = "patch_mask"
    if not isinstance(noise, Noise):
        raise TypeError(f"{op}: noise must be a Noise, got {type(noise).__name__}")
    if isinstance(ratio, Tensor):
        raise TypeError(f"{op}: ratio must be a float, got a tensor")
    ratio = checks.number(op, "ratio", ratio, "in [0, 1]")
    B, patches = checks.integer(op, "B", B), checks.integer(op, "patches", patches)
    if B < 0 or patches < 0:
        raise ValueError(f"{op}: B and patches must not be negative, got {B} and {patches}")
    noise._check(op, B, torch.empty(0, device=checks.device(op, device)).device)
    words = noise.fold_in(PATCH_TAG).bits((B, patches), device=device)
    order = words.argsort(dim=1, stable=True)
    place = torch.arange(patches, device=device).expand(B, patches)
    ids_restore = torch.empty_like(order).scatter_(1, order, place)
    K = math.floor(patches * (1 - ratio) + 1e-6)  # 10 * (1 - 0.9) is 0.9999999999999998 in floats
    return PatchMask(order[:, :K], ids_restore, ids_restore >= K)


def _probability(op: str, name: str, value: float | Tensor) -> float | Tensor:
    """A number, or a floating tensor () or (B,), in [0, 1]."""
    if not isinstance(value, Tensor):
        value = as_number(op, name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{op}: {name} must be in [0, 1], got {value}")
    elif not value.is_floating_point() or value.dim() > 1:
        raise ValueError(
            f"{op}: {name} must be a float or a floating tensor () or (B,), got {value.dtype} of {tuple(value.shape)}"
        )
    elif can_read(value) and not ((value >= 0) & (value <= 1)).all():
        bad = value[~((value >= 0) & (value <= 1))].reshape(-1)
        raise ValueError(f"{op}: {name} must be in [0, 1], got {float(bad[0])}")
    return value
