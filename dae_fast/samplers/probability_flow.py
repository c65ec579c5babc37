"""The probability-flow ODE of an SDE in continuous time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from .. import checks
from ..continuous import ContinuousSchedule
from ..ops.parameterisation import Parameterisation
from .base import Base, Plan, Walk, planned
from .steps import Place, Step, in_order


@dataclass(eq=False, repr=False, kw_only=True)
class ProbabilityFlow(Base):
    """dx/dt = f(t)*x - g(t)^2/2 * score(x, t) from t_max down, f the schedule's drift and g its diffusion.

    net(x, t) gives the score (or what `predict` says) at times t (B,) fp32 (fp64 for fp64); a start of a shape is pure
    noise at the first time; the steps are deterministic.
    steps: >= 1, over the times of schedule.discretise(steps + 1)
    times: instead of steps, one's own, two or more, decreasing; or increasing, from x at the first up (inversion), with
        denoise=False
    method: "euler", of first order, or "heun", of second with two looks by the network
    denoise: end with Tweedie's estimate of x0 at the last time (one look more), else with x there
    Other arguments as in Sampler.
    Raises ValueError for a time where f, g or the score of the prediction is not finite:
    alpha = 0 (ContinuousSchedule.flow(), cosine() and laplace() at t = 1; start below it) or sigma = 0.
    Song et al. 2021, eq. 13.
    """

    op: ClassVar[str] = "probability_flow"
    checks: ClassVar = {
        "schedule": checks.instance(ContinuousSchedule, "a ContinuousSchedule"),
        "method": checks.one_of("euler", "heun"),
        "steps": checks.whole(1),
    }

    schedule: ContinuousSchedule = field(kw_only=False)
    steps: int = 50
    times: Tensor | Sequence[float] | None = None
    method: str = "heun"
    denoise: bool = True
    predict: Parameterisation = "score"

    def _make_plan(self) -> Plan:
        rises = False
        if self.times is None:
            levels = self.schedule.discretise(self.steps + 1)
        else:
            chosen = checks.float64(self.op, "times", self.times)
            apart = chosen.diff() if chosen.dim() == 1 else chosen.new_empty(0)
            rises = len(apart) > 0 and bool((apart > 0).all())
            if not rises and (not len(apart) or not bool((apart < 0).all())):
                raise ValueError(f"{self.op}: times must be two or more and decrease, or increase, got {self.times}")
            if rises and self.denoise:
                raise ValueError(f"{self.op}: denoise must be False where times increase, as the end is no data")
            levels = self.schedule.discretise(times=chosen if rises else chosen.flip(0))
        N = len(levels) - 1
        where = [*range(N + 1)] if rises else [*reversed(range(N + 1))]
        t, alpha, sigma = (c[where] for c in (levels.times, levels.alpha, levels.sigma))
        order = [k for i in range(N) for k in ((i,) if self.method == "euler" else (i, N + i))]
        order += [2 * N] if self.denoise else []
        places = [*range(N), *range(1, N + 1), N]
        looks = [places[k] for k in order]
        holds = tuple(k < N and self.method == "heun" for k in order)
        step = in_order(self._steps(t, sigma), order)
        walk = Walk(
            (), Place(alpha[looks], sigma[looks]), tuple(t[looks].tolist()), step, "x", holds, tags=(0,) * len(looks)
        )
        plan = planned(walk, self._launches(walk), self.variance != "learned")
        levels._require_finite(self.op, plan.table, [where[k] for k in looks])
        return plan

    def inverted(self) -> Self:
        """The sampler that takes the same times from the last up to the first, from x at the last."""
        times = self.schedule.discretise(self.steps + 1).times if self.times is None else self.times
        chosen = checks.float64(self.op, "times", times)
        return replace(self, times=chosen if self.times is None else chosen.flip(0), denoise=False)

    def _steps(self, t: Tensor, sigma: Tensor) -> tuple[Step, Step, Step]:
        """x_m = x + h*F(x, t); x_s = (x + x_m)/2 + h/2 * F(x_m, s), which does not read F(x, t) again; and x0_hat.

        F(x, t) = f*x + g^2/(2 sigma) * eps_hat, score = -eps_hat/sigma
        """
        of_x = self.schedule.drift(t)
        of_eps = self.schedule.diffusion(t).square() / (2 * sigma)
        h = t[1:] - t[:-1]
        half = torch.full_like(h, 0.5)
        ahead = Step(x=1 + h * of_x[:-1], eps=h * of_eps[:-1])
        corrected = Step(x=half + h / 2 * of_x[1:], eps=h / 2 * of_eps[1:], before=(half,))
        return ahead, corrected, Step(x0=t.new_ones(1))
