"""Noise of one Brownian path: what a stochastic sampler adds does not depend on how many steps it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..checks import DTYPES
from ..kernels.dispatch import kernels
from ..kernels.spec import compute_dtype
from ..noise import Noise
from ..primitives import summed
from ..routing import Route, route

__all__ = ["BrownianNoise"]

BROWNIAN_TAG = 0x77696E72  # "winr", Wiener; the stream whose fold_in(n) is node n of the tree


class BrownianNoise:
    """Increments of one Brownian path W on [t0, t1] for each element, between any two times, and nothing stored.

    noise: Noise, whose key and sample ids make the path      t0 < t1: numbers, the ends of its time, sigma say
    depth: in [1, 52]; times are rounded to multiples of (t1 - t0) / 2^depth

    W is a sum over the dyadic tree of bridges (Levy's construction): its end is sqrt(t1 - t0) times the normal of
    fold_in(BROWNIAN_TAG).fold_in(0), and the middle of cell k of 2^l moves from the mean of the cell's ends by
    sqrt(t1 - t0) 2^(-l/2) / 2 times that of fold_in(2^l + k). An increment has at most 1 + 2 depth of these normals;
    what two times have in common counts once. In fp32, and for the halves, the native kernels add them in one launch;
    elsewhere a launch each adds to one tensor. `between` is W(s) - W(t),
    whose sum over 10 steps and over 1000 is the same, to rounding; `increment` is that over its standard deviation.
    Raises TypeError or ValueError for arguments that are no such path.
    Levy 1948; as virtual Brownian trees in samplers: Li et al. 2020; Crowson 2022.
    """

    __slots__ = ("_depth", "_noise", "_t0", "_t1")

    def __init__(self, noise: Noise, t0: float, t1: float, *, depth: int = 24) -> None:
        op = "BrownianNoise"
        checks.instance(Noise, "a Noise")(op, "noise", noise)
        self._noise = noise
        self._t0, self._t1 = (checks.number(op, name, t, "finite") for name, t in (("t0", t0), ("t1", t1)))
        if not self._t0 < self._t1:
            raise ValueError(f"{op}: t1 must be above t0, got {t0} and {t1}")
        self._depth = checks.integer(op, "depth", depth, 1, 52)

    def fold_in(self, data: int | Tensor) -> BrownianNoise:
        """Another path for each `data`, as Noise.fold_in."""
        return self._of(self._noise.fold_in(data))

    def _of(self, noise: Noise) -> BrownianNoise:
        """The path of another key."""
        return BrownianNoise(noise, self._t0, self._t1, depth=self._depth)

    def between(
        self,
        t: float,
        s: float,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """W(s) - W(t), of `shape` (B, ...), variance |s - t|; between(a, b) + between(b, c) is between(a, c).

        t, s: in [t0, t1], either one the larger. Worked out in fp32 (fp64 for fp64), rounded once. No gradient.
        """
        return self._summed("BrownianNoise.between", self._moved("between", t, s)[0], shape, dtype, device)

    def increment(
        self,
        t: float,
        s: float,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """(W(s) - W(t)) / sqrt(|s - t|), standard normal: the noise of a step from t to s, as a tensor.

        As between. Raises ValueError for times that are one at this depth.
        """
        moved, apart = self._moved("increment", t, s)
        if not apart:
            raise ValueError(f"BrownianNoise.increment: t and s must differ at depth {self._depth}, got {t} and {s}")
        scaled = {node: c / apart**0.5 for node, c in moved.items()}
        return self._summed("BrownianNoise.increment", scaled, shape, dtype, device)

    def _moved(self, name: str, t: float, s: float) -> tuple[dict[int, float], float]:
        """W(s) - W(t) as coefficients of the nodes' normals, and |s - t|, of the times as they are rounded."""
        i, j = (self._place(f"BrownianNoise.{name}", *given) for given in (("t", t), ("s", s)))
        length, moved = self._t1 - self._t0, self._nodes(j)
        for node, c in self._nodes(i).items():
            moved[node] = moved.get(node, 0.0) - c
        return {node: c for node, c in moved.items() if c}, math.ldexp(length * abs(j - i), -self._depth)

    def _place(self, op: str, name: str, t: float) -> int:
        """The multiple of the finest cell that t is rounded to; a schedule's sigma may be an ulp beyond its end."""
        value = checks.number(op, name, t, "finite")
        share, half_a_cell = (value - self._t0) / (self._t1 - self._t0), math.ldexp(1.0, -self._depth - 1)
        if not -half_a_cell <= share <= 1 + half_a_cell:
            raise ValueError(f"{op}: {name} must be in [{self._t0}, {self._t1}], got {value}")
        return min(max(round(math.ldexp(share, self._depth)), 0), 1 << self._depth)

    def _nodes(self, i: int) -> dict[int, float]:
        """W at place i as coefficients: a line to the end, and a tent in the cell of each level."""
        length = self._t1 - self._t0
        found = {0: math.ldexp(length**0.5 * i, -self._depth)}
        for level in range(self._depth):
            cell = self._depth - level
            k, x = i >> cell, i & ((1 << cell) - 1)
            if not x:
                break
            tent = math.ldexp(min(x, (1 << cell) - x), 1 - cell)
            found[(1 << level) + k] = 0.5 * math.ldexp(length, -level) ** 0.5 * tent
        return found

    def _summed(
        self, op: str, terms: dict[int, float], shape: Sequence[int], dtype: torch.dtype, device: Any
    ) -> Tensor:
        shape, device = checks.shape(op, shape), checks.device(op, device)
        if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
            raise TypeError(f"{op}: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        stream, total = self._noise.fold_in(BROWNIAN_TAG), torch.zeros(shape, dtype=compute_dtype(dtype), device=device)
        if not _in_one_launch(stream, terms, total):
            for node, c in terms.items():
                total = summed(op, ("W", "noise"), (total, stream.fold_in(node)), (1.0, c), total)
        return total.to(dtype)

    def __repr__(self) -> str:
        return f"BrownianNoise({self._noise}, {self._t0}, {self._t1}, depth={self._depth})"


def _in_one_launch(noise: Noise, terms: dict[int, float], out: Tensor) -> bool:
    """Writes the sum to `out`, where a backend has a kernel for that."""
    op, B = "BrownianNoise", out.shape[0]
    D = out.numel() // B if B else 0
    if out.dtype != torch.float32 or not D or not noise._whole_blocks(D):
        return False
    noise._check(op, B, out.device)
    if route(op, out, noise._key_tensor, noise._sample) is not Route.DIRECT:
        return False
    module = kernels(out, op)
    if not hasattr(module, "normal_sum"):
        return False
    module.normal_sum(noise, list(terms), list(terms.values()), out.view(B, D))
    return True
