"""Noising: the forward process q(x_t | x_0)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from ..backends.reference import compute_dtype
from ..level import Level
from ..noise import Noise
from .affine import ABSENT, affine
from .checks import level_for, noise_for, promote, samples
from .parameterisation import MIXES, check_name
from .routing import plain_affine


def add_noise(
    x0: Tensor, noise: Noise | Tensor, level: Level, *, target: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x_t = alpha * x0 + sigma * eps, eps ~ N(0, 1).

    x0: (B, ...) fp16/bf16/fp32/fp64      noise: Noise, or a tensor like x0
    level: Level, alpha and sigma of each sample     returns: like x0, or (x_t, target)
    target: "eps", "x0", "v", "score" or "flow": what a network with that parameterisation should
            predict, written in the same pass.
    Reads x0 once, writes x_t once; with a Noise, eps is never stored (unless it is the target).
    Gradient: d x0 = alpha * d x_t; d noise = sigma * d x_t for a tensor; alpha and sigma given as
    tensors get theirs. Raises ValueError on a shape mismatch or a level outside the schedule.
    Ho et al. 2020, eq. 4.
    """
    op = "add_noise"
    if target is None and type(level) is Level and not is_compiling():
        fresh = type(noise) is Noise
        columns, y, z = (_FRESH, None, noise) if fresh else (_READ, noise, None)
        x_t = plain_affine(columns, x0, y, None, z, op, level)
        if x_t is not None:
            return x_t
    samples(op, "x0", x0)
    level_for(op, level)
    z, generated = noise_for(op, noise, x0, "x0")
    if z is not None and z.dtype != x0.dtype:
        x0, z = promote(x0, z)
    if target is None:
        rows = level._rows(op, op, _noising, x0, compute_dtype(x0.dtype))
        if z is not None:
            return affine(op, x0, z, None, None, rows, _READ)[0]
        return affine(op, x0, None, None, generated, rows, _FRESH)[0]
    check_name(op, "target", target)
    if target == "x0":
        return add_noise(x0, noise, level), x0  # type: ignore[return-value]
    rows = level._rows(op, f"add_noise {target}", _noising_and(target), x0, compute_dtype(x0.dtype))
    of_x0 = ABSENT if target in ("eps", "score") else 2
    x_t_columns, made = (_READ, (of_x0, 3, ABSENT, ABSENT)) if z is not None else (_FRESH, (of_x0, ABSENT, 3, ABSENT))
    x_t, wanted = affine(op, x0, z, None, generated, rows, (*x_t_columns, *made))
    return x_t, wanted


_READ, _FRESH = (
    (0, 1, ABSENT, ABSENT),
    (0, ABSENT, 1, ABSENT),
)  # noise as the second operand, or made in the third's place


def _noising(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    return alpha, sigma


def _noising_and(target: str) -> Any:
    return lambda alpha, sigma: (alpha, sigma, *MIXES[target](alpha, sigma))
