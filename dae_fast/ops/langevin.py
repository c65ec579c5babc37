"""The Langevin update."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from ..kernels.reference import compute_dtype
from ..level import can_read, check_per_sample
from ..noise import Noise
from ..rows import constant_rows, stack_rows
from .affine import ABSENT, affine, affine_into
from .checks import like, noise_for, promote, samples
from .memory import check_out
from .routing import plain_affine, wants_grad


def langevin_step(
    x: Tensor,
    score: Tensor,
    step_size: float | Tensor,
    noise: Noise | Tensor,
    noise_scale: float | Tensor = 1.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """x + h * score + noise_scale * sqrt(2h) * eps, eps ~ N(0, 1): unadjusted Langevin dynamics.

    x, score: (B, ...) fp16/bf16/fp32/fp64      noise: Noise, or a tensor like x
    step_size: h >= 0, a float or a tensor () or (B,)      noise_scale: the same; 0 is gradient ascent
    out: written instead of a new tensor; out=x steps in place      returns: like x, or out
    Reads x and score once, writes once; with a Noise, eps is never stored.
    Gradient: d x = g, d score = h * g, and those of a tensor noise, step_size and noise_scale.
    Raises ValueError on a shape mismatch, a negative step size, or an `out` that overlaps itself or
    partly overlaps an input. Welling and Teh 2011; Song and Ermon 2019, algorithm 1.
    """
    op = "langevin_step"
    numbers = type(step_size) is type(noise_scale) is float
    if numbers and step_size >= 0 and out is None and isinstance(x, Tensor) and not is_compiling():
        rows = constant_rows(op, _coefficients(step_size, noise_scale), compute_dtype(x.dtype))
        tensor, generated = (None, noise) if type(noise) is Noise else (noise, None)
        stepped = plain_affine(op, _COLUMNS, x, score, tensor, generated, None, rows.table, None, None)
        if stepped is not None:
            return stepped
    samples(op, "x", x)
    like(op, "score", score, "x", x)
    tensor, generated = noise_for(op, noise, x, "x")
    step_size = check_per_sample(op, "step_size", step_size, x)
    noise_scale = check_per_sample(op, "noise_scale", noise_scale, x)
    if isinstance(step_size, Tensor):
        if can_read(step_size) and not bool((step_size >= 0).all()):
            raise ValueError(f"{op}: step_size must not be negative, got {float(step_size.min())}")
        step_size = step_size.double()
    elif not step_size >= 0:
        raise ValueError(f"{op}: step_size must not be negative, got {step_size}")
    if isinstance(noise_scale, Tensor):
        noise_scale = noise_scale.double()
    if not x.dtype == score.dtype == (x.dtype if tensor is None else tensor.dtype):
        if out is x:
            raise ValueError(f"{op}: in place, score and noise must be {x.dtype} like x")
        x, score, tensor = promote(x, score, tensor)
    rows = stack_rows(op, _coefficients(step_size, noise_scale), x, compute_dtype(x.dtype))
    if out is None:
        return affine(op, x, score, tensor, generated, rows, _COLUMNS)[0]
    check_out(op, out, x=x, score=score, noise=tensor)
    if wants_grad(x, score, tensor, rows.table, out):
        raise ValueError(f"{op}: out= has no gradient; call it under torch.no_grad() or without out")
    return affine_into(op, out, x, score, tensor, generated, rows, _COLUMNS)


_COLUMNS = (0, 1, 2, ABSENT)  # of x, score and noise


def _coefficients(step_size: Any, noise_scale: Any) -> tuple[Any, Any, Any]:
    return 1.0, step_size, noise_scale * (2 * step_size) ** 0.5
