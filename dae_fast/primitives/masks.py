"""Which elements of a loss count: a bool tensor, weights, or words of a noise stream, which are not stored."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.reference import per_sample_sum, row_of
from ..kernels.spec import on_device
from ..noise import FlatNoise, Noise
from ..routing import beside, on_mesh
from . import elementwise


class Drawn(NamedTuple):
    """A mask that is words of a noise stream, made in the kernel: what a corruption strikes, or leaves.

    thresholds: int64 (1 or B, 2); masked are the elements whose word is below the second.
    """

    noise: Noise
    thresholds: Tensor
    visible: bool  # counts what is left

    def on(self, x: Tensor) -> Tensor:
        """As a bool tensor like x."""
        if (mesh := on_mesh(x)) is not None:
            return mesh.drawn(self, x)
        below = self.noise.bits(x.shape, device=x.device) < row_of(on_device(self.thresholds, x.device), 1, x)
        return ~below if self.visible else below


Mask = Tensor | Drawn | None


class FlatMask(NamedTuple):
    """A mask as the plain arguments that torch.library takes."""

    mask: Tensor | None
    key: Tensor | None = None
    sample: Tensor | None = None
    first_sample: int = 0
    thresholds: Tensor | None = None
    keeps: bool = False

    @classmethod
    def of(cls, mask: Mask) -> FlatMask:
        if not isinstance(mask, Drawn):
            return cls(mask)
        key, sample, first_sample, *_ = mask.noise._flat()
        return cls(None, key, sample, first_sample, mask.thresholds, mask.visible)

    def whole(self) -> Mask:
        noise = FlatNoise(self.key, self.sample, self.first_sample).whole()
        if noise is None or self.thresholds is None:
            return self.mask
        return Drawn(noise, self.thresholds, self.keeps)


def tensors_of(mask: Mask) -> tuple[Tensor | None, ...]:
    """What decides an op's route."""
    return (mask.thresholds,) if isinstance(mask, Drawn) else (mask,)


def has_weights(mask: Any) -> bool:
    """Whether it is not which elements count, but how much each does."""
    return isinstance(mask, Tensor) and mask.is_floating_point()


def kept_elements(pred: Tensor, mask: Mask) -> Tensor | int:
    """How many of each sample count: (B,), or one number for all; of weights their sum."""
    B = pred.shape[0]
    if mask is None:
        return pred.numel() // B if B else 0
    if isinstance(mask, Tensor) and has_weights(mask) and on_mesh(pred) is None:
        return elementwise.totals(mask)
    return per_sample_sum(mask.on(pred) if isinstance(mask, Drawn) else beside(mask, pred))
