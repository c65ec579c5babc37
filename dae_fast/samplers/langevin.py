"""Langevin dynamics, at one level and down a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..checks import can_read, check_per_sample
from ..coefficients import stack_rows
from ..graphs import replayed
from ..kernels.spec import ABSENT, compute_dtype, map_of
from ..noise import Noise
from ..ops.parameterisation import Parameterisation
from ..primitives.sums import affine
from ..schedule import Schedule
from .arguments import ONE_OF_LEVELS
from .base import Sampler, Walk
from .double_well import DoubleWell
from .mixture import GaussianMixture
from .network import GUIDED, bound, guidance_scale, outputs
from .running import called_back, progressed
from .start import check_start
from .steps import Place, Step

SCORE = "the score"


def _per_sample(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        checks.number(op, name, value)


@torch.no_grad()
@checks.arguments(
    score=checks.function,
    noise=checks.instance(Noise, "a Noise"),
    step_size=_per_sample,
    noise_scale=_per_sample,
    steps=checks.whole(0),
    progress=checks.flag,
    graph=checks.flag,
    callback=checks.function,
)
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
    callback: Callable[[int, Tensor], Any] | None = None,
) -> Tensor:
    """`steps` unadjusted Langevin updates of all rows of x: x + h*score(x) + noise_scale*sqrt(2h)*eps.

    score(x): grad log p, like x; the chain of a GaussianMixture or DoubleWell may be one launch
    x: (B, ...), the chains' starts
    step_size: h >= 0, a float or a tensor () or (B,)      noise_scale: the same; 0 is gradient ascent
    noise: Noise; step k uses noise.fold_in(k)      progress: show a bar      returns: like x
    guidance: g, for a score that returns (conditional, unconditional): u + g*(c - u) (Ho and Salimans 2022)
    net_arguments: as in ddpm, for the score
    graph: replay the loop as a CUDA graph; x must be on a CUDA device
    callback(k, x): called after step k; a tensor that it returns goes on as x. Not with graph
    With a unit Gaussian the chain settles at variance 1/(1 - h/2): the bias of the discrete step.
    Raises ValueError on a negative step size or a score of another shape. Welling and Teh 2011.
    """
    op = "langevin"
    check_start(op, x, noise)
    score = bound(op, score, net_arguments, graph)
    if graph and callback is not None:
        raise ValueError(f"{op}: graph=True runs the loop without Python: leave out callback")
    step_size = check_per_sample(op, "step_size", step_size, x)
    noise_scale = check_per_sample(op, "noise_scale", noise_scale, x)
    readable = not isinstance(step_size, Tensor) or can_read(step_size)
    if readable and not bool(torch.as_tensor(step_size >= 0).all()):
        raise ValueError(f"{op}: step_size must not be negative, got {float(torch.as_tensor(step_size).min())}")
    g = guidance_scale(op, guidance)
    tensors = isinstance(step_size, Tensor) or isinstance(noise_scale, Tensor)
    if isinstance(score, (GaussianMixture, DoubleWell)) and guidance is None and not (progress or tensors or callback):
        moved = score.chain(x, float(step_size), float(noise_scale * (2 * step_size) ** 0.5), steps, noise)
        if moved is not None:
            return moved
    parts, g = ((), 1.0) if g is None else (GUIDED, g)
    dtype, compute = x.dtype, compute_dtype(x.dtype)

    def chain(x: Tensor, noise: Noise, step_size: float | Tensor, noise_scale: float | Tensor) -> Tensor:
        h, scale = (c.double() if isinstance(c, Tensor) else c for c in (step_size, noise_scale))
        rows = stack_rows(op, (1.0, g * h, scale * (2 * h) ** 0.5, (1 - g) * h), x, compute)
        x = x.to(compute, copy=True)
        for k in progressed(range(steps), progress, op):
            c, *u = outputs(op, score(x if dtype == compute else x.to(dtype)), x, parts, SCORE)
            of_u, w = (3, u[0]) if u else (ABSENT, None)
            (x,) = affine(map_of(op, (0, 1, 2, of_u)), (x, c, None, w), noise.fold_in(k), rows)
            if callback is not None:
                x = called_back(op, callback, x, k, x)
        return x.to(dtype)

    if not graph:
        return chain(x, noise, step_size, noise_scale)

    given = step_size, noise_scale
    return replayed(op, score, chain, x, noise, progress, arguments=given, options=(steps, guidance))


@dataclass(eq=False, repr=False, kw_only=True)
class AnnealedLangevin(Sampler):
    """NCSN sampling: Langevin at each level from the noisiest down, h_t = step_size/2 * (sigma_t/sigma_0)^2.

    schedule: variance exploding, Schedule.geometric      step_size: the paper's epsilon
    steps_per_level: >= 1, so many looks at each level, which `levels` have, as they are read
    denoise: end with Tweedie's step x + sigma_0^2 * score
    noise: step k of level t uses noise.fold_in(t*steps_per_level + k)
    Other arguments as in Sampler. Raises ValueError for a schedule with alpha != 1 or sigma = 0, or a negative step
    size. Song and Ermon 2019, algorithm 1; the last step is Jolicoeur-Martineau et al. 2021.
    """

    op: ClassVar[str] = "annealed_langevin"
    checks: ClassVar = {"schedule": ONE_OF_LEVELS, "step_size": checks.real("finite and not negative")}
    net_name: ClassVar[str] = "score"
    what: ClassVar[str] = SCORE

    schedule: Schedule = field(kw_only=False)
    step_size: float = 2e-5
    steps_per_level: int = 100
    denoise: bool = True
    predict: Parameterisation = "score"

    def walk(self, schedule: Schedule) -> Walk:
        if not (bool((schedule.alpha == 1).all()) and bool((schedule.sigma > 0).all())):
            raise ValueError(
                f"{self.op}: schedule must be variance exploding with sigma > 0 (Schedule.geometric), got {schedule}"
            )
        if self.to_level is not None:
            raise ValueError(
                f"{self.op}: to_level must be None, as it moves at its levels, not between; end `levels` there"
            )
        chosen, K = self._grid(schedule), self.steps_per_level
        levels = [t for t in chosen for _ in range(K)] + [chosen[-1]] * self.denoise
        tags = [t * K + k for t in chosen for k in range(K)] + [0] * self.denoise
        at = Place(schedule.alpha[levels], schedule.sigma[levels])
        h = 0.5 * self.step_size * (at.sigma / schedule.sigma[chosen[-1]]).square()
        spread = (2 * h).sqrt()
        if self.denoise:
            h[-1], spread[-1] = at.sigma[-1].square(), 0.0
        step = Step(x=torch.ones_like(h), eps=-h / at.sigma, noise=spread)  # score = -eps_hat/sigma
        return Walk(tuple(levels), at, self._told(schedule, levels), step, tags=tuple(tags))
