"""Langevin dynamics, at one level and down a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.reference import compute_dtype
from ..graphs import replayed
from ..noise import Noise
from ..ops.affine import ABSENT, affine_into
from ..ops.langevin import _coefficients, langevin_step
from ..rows import Rows, stack_rows
from ..schedule import Schedule
from .common import Network, at, check_start, output, progressed


@torch.no_grad()
def langevin(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    step_size: float | Tensor,
    steps: int,
    noise: Noise,
    *,
    noise_scale: float | Tensor = 1.0,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """`steps` unadjusted Langevin updates of all rows of x: x + h*score(x) + noise_scale*sqrt(2h)*eps.

    score(x): grad log p, like x      x: (B, ...) fp16/bf16/fp32/fp64, the chains' starts
    step_size: h >= 0, a float or a tensor () or (B,)      noise_scale: the same; 0 is gradient ascent
    noise: Noise; step k uses noise.fold_in(k)      progress: show a bar      returns: like x
    graph: replay the loop as a CUDA graph; x must be on a CUDA device
    With a unit Gaussian the chain settles at variance 1/(1 - h/2): the bias of the discrete step.
    Raises ValueError on a negative step size or a score of another shape. Welling and Teh 2011.
    """
    op = "langevin"
    check_start(op, x, noise)
    if steps < 0:
        raise ValueError(f"{op}: steps must not be negative, got {steps}")

    def chain(x: Tensor, noise: Noise, step_size: float | Tensor, noise_scale: float | Tensor) -> Tensor:
        for k in progressed(range(steps), progress, op):
            langevin_step(x, output(op, "the score", score(x), x), step_size, noise.fold_in(k), noise_scale, out=x)
        return x

    if not graph:
        return chain(x.clone(), noise, step_size, noise_scale)

    def coefficients() -> Rows | None:
        """Of numbers they lie in a cache, which may drop them."""
        if isinstance(step_size, Tensor) or isinstance(noise_scale, Tensor):
            return None
        return stack_rows(op, _coefficients(float(step_size), float(noise_scale)), x, compute_dtype(x.dtype))

    given = step_size, noise_scale
    return replayed(op, score, chain, x, noise, progress, arguments=given, options=steps, keep=coefficients)


@torch.no_grad()
def annealed_langevin(
    score: Network,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    *,
    step_size: float = 2e-5,
    steps_per_level: int = 100,
    denoise: bool = True,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """NCSN sampling: Langevin at each level from the noisiest down, h_t = step_size/2 * (sigma_t/sigma_0)^2.

    score(x, t): the score at levels t (B,) int64, like x      x: (B, ...) the starts
    schedule: variance exploding, Schedule.geometric      step_size: the paper's epsilon
    noise: Noise; step k of level t uses noise.fold_in(t*steps_per_level + k)
    denoise: end with Tweedie's step x + sigma_0^2 * score      progress: show a bar
    graph: replay the loop as a CUDA graph; x must be on a CUDA device
    returns: like x. Raises ValueError for a schedule with alpha != 1 or sigma = 0, or a negative step size.
    Song and Ermon 2019, algorithm 1; the last step is Jolicoeur-Martineau et al. 2021.
    """
    op = "annealed_langevin"
    check_start(op, x, noise)
    if not (bool((schedule.alpha == 1).all()) and bool((schedule.sigma > 0).all())):
        raise ValueError(
            f"{op}: schedule must be variance exploding with sigma > 0 (Schedule.geometric), got {schedule}"
        )
    if steps_per_level < 1:
        raise ValueError(f"{op}: steps_per_level must be positive, got {steps_per_level}")
    if not 0 <= step_size < math.inf:
        raise ValueError(f"{op}: step_size must be finite and not negative, got {step_size}")
    h = 0.5 * step_size * (schedule.sigma / schedule.sigma[0]).square()
    # One row for each level, and the last for Tweedie's step.
    table = torch.stack((torch.ones_like(h), h, (2 * h).sqrt()), -1)
    table = torch.cat((table, table.new_tensor([[1.0, float(schedule.sigma[0].square()), 0.0]])))
    table = table.to(compute_dtype(x.dtype))
    plan = [(t, k) for t in reversed(range(len(schedule))) for k in range(steps_per_level)]

    def descend(x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for t, k in progressed(plan, progress, op):
            pred, fresh = at(op, "the score", score, x, t), noise.fold_in(t * steps_per_level + k)
            affine_into(op, x, x, pred, None, fresh, Rows(table[t : t + 1], None), (0, 1, 2, ABSENT))
        if denoise:
            pred = at(op, "the score", score, x, 0)
            affine_into(op, x, x, pred, None, None, Rows(table[-1:], None), (0, 1, ABSENT, ABSENT))
        return x

    if graph:
        return replayed(op, score, descend, x, noise, progress, table=table, options=(steps_per_level, denoise))
    return descend(x.clone(), noise, table.to(x.device))
