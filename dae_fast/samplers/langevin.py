"""Langevin dynamics, at one level and down a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..checks import can_read, check_per_sample
from ..coefficients import stack_rows
from ..graphs import replayed
from ..kernels.spec import ABSENT, Coefficients, compute_dtype, map_of
from ..noise import Noise
from ..ops.parameterisation import Parameterisation
from ..primitives.sums import affine
from ..schedule import Schedule
from .common import ONE_OF_LEVELS, Look, Network, check_start, checked, conditions, guided, progressed, run, sampler
from .mixture import GaussianMixture
from .tables import estimate

SCORE = "the score"


def _per_sample(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        checks.number(op, name, value)


@sampler(step_size=_per_sample, noise_scale=_per_sample, steps=checks.whole(0))
def langevin(
    score: Callable[[Tensor], Any],
    x: Tensor,
    step_size: float | Tensor,
    steps: int,
    noise: Noise,
    *,
    noise_scale: float | Tensor = 1.0,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """`steps` unadjusted Langevin updates of all rows of x: x + h*score(x) + noise_scale*sqrt(2h)*eps.

    score(x): grad log p, like x; a GaussianMixture's chain may be one launch      x: (B, ...), the chains' starts
    step_size: h >= 0, a float or a tensor () or (B,)      noise_scale: the same; 0 is gradient ascent
    noise: Noise; step k uses noise.fold_in(k)      progress: show a bar      returns: like x
    guidance: g, for a score that returns (conditional, unconditional): u + g*(c - u) (Ho and Salimans 2022)
    net_arguments: as in ddpm, for the score
    graph: replay the loop as a CUDA graph; x must be on a CUDA device
    With a unit Gaussian the chain settles at variance 1/(1 - h/2): the bias of the discrete step.
    Raises ValueError on a negative step size or a score of another shape. Welling and Teh 2011.
    """
    op = "langevin"
    check_start(op, x, noise)
    step_size = check_per_sample(op, "step_size", step_size, x)
    noise_scale = check_per_sample(op, "noise_scale", noise_scale, x)
    readable = not isinstance(step_size, Tensor) or can_read(step_size)
    if readable and not bool(torch.as_tensor(step_size >= 0).all()):
        raise ValueError(f"{op}: step_size must not be negative, got {float(torch.as_tensor(step_size).min())}")
    parts = guided(op, guidance)
    tensors = isinstance(step_size, Tensor) or isinstance(noise_scale, Tensor)
    if isinstance(score, GaussianMixture) and guidance is None and not progress and not tensors:
        moved = score.chain(x, float(step_size), float(noise_scale * (2 * step_size) ** 0.5), steps, noise)
        if moved is not None:
            return moved
    g = 1.0 if guidance is None else float(guidance)
    dtype, compute = x.dtype, compute_dtype(x.dtype)

    def chain(x: Tensor, noise: Noise, step_size: float | Tensor, noise_scale: float | Tensor) -> Tensor:
        h, scale = (c.double() if isinstance(c, Tensor) else c for c in (step_size, noise_scale))
        rows = stack_rows(op, (1.0, g * h, scale * (2 * h) ** 0.5, (1 - g) * h), x, compute)
        x = x.to(compute, copy=True)
        for k in progressed(range(steps), progress, op):
            c, *u = checked(op, score(x if dtype == compute else x.to(dtype)), x, parts, SCORE)
            of_u, w = (3, u[0]) if u else (ABSENT, None)
            (x,) = affine(map_of(op, (0, 1, 2, of_u)), (x, c, None, w), noise.fold_in(k), rows)
        return x.to(dtype)

    if not graph:
        return chain(x, noise, step_size, noise_scale)

    given = step_size, noise_scale
    return replayed(op, score, chain, x, noise, progress, arguments=given, options=(steps, guidance))


@sampler(schedule=ONE_OF_LEVELS)
def annealed_langevin(
    score: Network,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    *,
    step_size: float = 2e-5,
    steps_per_level: int = 100,
    denoise: bool = True,
    predict: Parameterisation = "score",
    conditioning: str | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """NCSN sampling: Langevin at each level from the noisiest down, h_t = step_size/2 * (sigma_t/sigma_0)^2.

    score(x, t): the score at levels t (B,), or what `predict` says, like x      x: (B, ...) the starts
    conditioning: as in ddpm
    schedule: variance exploding, Schedule.geometric      step_size: the paper's epsilon
    noise: Noise; step k of level t uses noise.fold_in(t*steps_per_level + k)
    denoise: end with Tweedie's step x + sigma_0^2 * score      guidance: as in langevin
    progress: show a bar      graph: replay the loop as a CUDA graph; x must be on a CUDA device
    returns: like x. Raises ValueError for a schedule with alpha != 1 or sigma = 0, or a negative step size.
    Song and Ermon 2019, algorithm 1; the last step is Jolicoeur-Martineau et al. 2021.
    """
    op = "annealed_langevin"
    check_start(op, x, noise)
    if not (bool((schedule.alpha == 1).all()) and bool((schedule.sigma > 0).all())):
        raise ValueError(
            f"{op}: schedule must be variance exploding with sigma > 0 (Schedule.geometric), got {schedule}"
        )
    if not 0 <= step_size < math.inf:
        raise ValueError(f"{op}: step_size must be finite and not negative, got {step_size}")
    parts = guided(op, guidance)
    g = 1.0 if guidance is None else float(guidance)
    h = 0.5 * step_size * (schedule.sigma / schedule.sigma[0]).square()
    # One row for each level, and the last for Tweedie's step.
    size = torch.cat((h, schedule.sigma[:1].square()))
    spread = torch.cat(((2 * h).sqrt(), h.new_zeros(1)))
    at = [*range(len(schedule)), 0]
    of_x, of_prediction = estimate(op, predict, schedule.alpha[at], schedule.sigma[at], "score").unbind(1)
    slope = size * of_prediction
    table = torch.stack((1 + size * of_x, g * slope, spread, (1 - g) * slope), -1)
    plan = [(t, t, k) for t in reversed(range(len(schedule))) for k in range(steps_per_level)]  # level, row, step
    if denoise:
        plan.append((0, len(schedule), steps_per_level))

    told = conditions(op, schedule, list(range(len(schedule))), conditioning)

    def descend(look: Look, x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for t, row, k in progressed(plan, progress, op):
            c, *u = look(x, told[t], parts)
            fresh = noise.fold_in(t * steps_per_level + k) if row == t else None
            spec = map_of(op, (0, 1, ABSENT if fresh is None else 2, 3 if u else ABSENT))
            (x,) = affine(spec, (x, c, None, u[0] if u else None), fresh, Coefficients(table, row))  # type: ignore[arg-type]
        return x

    options = (*told, steps_per_level, denoise, guidance)
    return run(op, score, descend, x, noise, table, options, progress, graph, SCORE)
