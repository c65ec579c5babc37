"""A double well in each element: a score that is known, and far from Gaussian."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..kernels.spec import Update
from ..noise import Noise
from .mixture import chained


class DoubleWell:
    """The score of exp(-height * sum_i (x_i^2 - b^2)^2): wells at -b and b in every element, height * b^4 deep.

    height, b: > 0, numbers
    double_well(x): the score at x (B, ...), fp16/bf16/fp32/fp64: like x
    samplers.langevin takes it as any score. A chain of up to 128 elements in fp32 is then one launch for all of its
    steps, x in registers, with the bits of the stepped loop.
    Raises TypeError or ValueError for other numbers.
    """

    __slots__ = ("_slope", "_square")

    def __init__(self, height: float = 2.0, b: float = 1.0) -> None:
        op = "DoubleWell"
        height, b = (checks.number(op, name, v, "positive and finite") for name, v in (("height", height), ("b", b)))
        self._slope, self._square = -4 * height, b * b

    def __repr__(self) -> str:
        return f"DoubleWell(height={-self._slope / 4}, b={self._square**0.5})"

    def __call__(self, x: Tensor) -> Tensor:
        return (x * (x * x - self._square)) * self._slope

    def chain(self, x: Tensor, step: float, spread: float, steps: int, noise: Noise) -> Tensor | None:
        """`steps` updates x + step * score + spread * eps in one launch; None where there is no kernel for that."""
        return chained("well_chain", x, (self._slope, self._square), Update(step, spread, steps), noise)
