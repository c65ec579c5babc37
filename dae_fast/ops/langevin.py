"""The Langevin update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import as_number, can_read, check_per_sample, samples
from ..coefficients import all_within
from ..noise import Noise
from ..primitives import summed

__all__ = ["langevin_step"]


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
    h, scale = step_size, noise_scale
    if not (type(h) is type(scale) is float and h >= 0):
        h, scale = _checked(op, x, h, scale)
    spread = (2 * h) ** 0.5
    if not (type(scale) is float and scale == 1):
        spread = scale * spread
    return summed(op, ("x", "score", "noise"), (x, score, noise), (1.0, h, spread), out)


def _checked(
    op: str, x: Tensor, step_size: float | Tensor, noise_scale: float | Tensor
) -> tuple[float | Tensor, float | Tensor]:
    if isinstance(step_size, Tensor) or isinstance(noise_scale, Tensor):
        samples(op, "x", x)
    h = _factor(op, "step_size", step_size, x)
    scale = _factor(op, "noise_scale", noise_scale, x)
    if not isinstance(h, Tensor):
        negative = not h >= 0
    else:
        negative = not all_within(h, 0.0, math.inf) and can_read(h) and bool((h < 0).any())
    if negative:
        raise ValueError(f"{op}: step_size must not be negative, got {float(torch.as_tensor(h).min())}")
    return h, scale


def _factor(op: str, name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A float, or float64."""
    if not isinstance(value, Tensor):
        return as_number(op, name, value)
    value = check_per_sample(op, name, value, x)
    assert isinstance(value, Tensor)
    return value.double()
