"""Flow matching: Euler and midpoint along dx' = (eps - x0) dtau, x' = x/(alpha + sigma), tau = sigma/(alpha + sigma).

With Schedule.flow x' is x and tau the time of the flow, from 1, noise, to 0, data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import checks
from ..ops.parameterisation import Parameterisation
from ..schedule import Schedule
from .base import Sampler, Walk
from .steps import Place, Step, corrected_step, implicit_step, in_order


@dataclass(eq=False, repr=False, kw_only=True)
class FlowEuler(Sampler):
    """Euler steps x' + (tau_s - tau_t) * u, u = eps - x0 the velocity; net predicts u unless `predict` says otherwise.

    schedule: Schedule.flow, or any: x' and tau of the module make its path straight. A ContinuousSchedule stands for
        its levels discretise(steps), of which the network is told the times
    steps: in [1, T], evenly spaced in index from T-1 to the data one below level 0, so evenly in tau for Schedule.flow
    The step is Euler's, which is the same along every straight path: x_s = alpha_s*x0_hat + sigma_s*eps_hat.
    Other arguments and the errors as in Sampler.
    Liu et al. 2022; Lipman et al. 2023 (their t is 1 - tau).
    """

    op: ClassVar[str] = "flow_euler"
    last: ClassVar[int] = -1

    steps: int | None = 50
    predict: Parameterisation = "flow"

    def coefficients(self, t: Place, s: Place) -> Step:
        return implicit_step(s)

    def _goes_up(self) -> bool:
        return True


@dataclass(eq=False, repr=False, kw_only=True)
class FlowSDE(Sampler):
    """Stochastic steps of a flow, alpha = 1 - t and sigma = t, with a density: for policy gradients (`log_prob`).

    form: "sde", g = eta * sqrt(t/(1 - t)) (Flow-GRPO); "constant", g = eta (DanceGRPO): with dt = t_s - t < 0,
        x + (u + g^2/2t * eps_hat) dt + g sqrt(-dt) z; or "cps", coefficients preserving:
        (1 - t_s) x0_hat + t_s cos(eta pi/2) eps_hat + t_s sin(eta pi/2) z, of which the noise has the level's size
        (how much is added goes by the number of steps: it is no discretisation of one SDE, and its law is its own)
    eta: >= 0, and in [0, 1] for "cps"      schedule: with alpha + sigma = 1, Schedule.flow
    g at t = 1 is that of the next level. The last step, to the data, is x0_hat and adds no noise.
    Other arguments and the errors as in FlowEuler. Liu et al. 2025 (Flow-GRPO), eq. 9; Xue et al. 2025 (DanceGRPO);
    Wang and Yu 2025 (coefficients-preserving sampling).
    """

    op: ClassVar[str] = "flow_sde"
    checks: ClassVar = {
        "form": checks.one_of("sde", "constant", "cps"),
        "eta": checks.real("finite and not negative"),
    }
    last: ClassVar[int] = -1

    steps: int | None = 50
    form: str = "sde"
    eta: float = 0.7
    predict: Parameterisation = "flow"

    def walk(self, schedule: Schedule) -> Walk:
        if not bool(((schedule.alpha + schedule.sigma - 1).abs() < 1e-9).all()):
            raise ValueError(f"{self.op}: schedule must have alpha + sigma = 1 (Schedule.flow), got {schedule}")
        if self.form == "cps" and self.eta > 1:
            raise ValueError(f"{self.op}: eta must be in [0, 1] for form='cps', got {self.eta}")
        return super().walk(schedule)

    def coefficients(self, t: Place, s: Place) -> Step:
        if self.form == "cps":
            return implicit_step(s, std=s.sigma * math.sin(self.eta * math.pi / 2))
        dt, g = s.sigma - t.sigma, torch.full_like(t.sigma, self.eta)
        if self.form == "sde":
            g = self.eta * (t.sigma / torch.where(t.sigma < 1, 1 - t.sigma, 1 - s.sigma)).sqrt()
        noisy = s.sigma > 0
        g = torch.where(noisy, g, 0.0)
        return Step(
            x=torch.ones_like(dt),
            x0=-dt,
            eps=dt * (1 + g.square() / (2 * t.sigma)),
            noise=g * (-dt).clamp(min=0).sqrt(),
        )


@dataclass(eq=False, repr=False, kw_only=True)
class FlowMidpoint(Sampler):
    """Midpoint steps: x' + (tau_s - tau_t) * u, u the velocity at the level in the middle, where an Euler step leads.

    steps: in [1, T/2], of two looks by the network each, at 2*steps levels spaced as in FlowEuler
    levels: instead of steps, one's own, decreasing, an even number: start and middle of each step in turn
    A middle level at tau_t + c*(tau_s - tau_t) with c other than 1/2 (a shifted schedule, a rounded index) takes
    (1 - 1/2c) of the slope at the start and 1/2c of its own, which is of second order for every c.
    Other arguments and the errors as in FlowEuler. Lipman et al. 2023, section 6.
    """

    op: ClassVar[str] = "flow_midpoint"
    last: ClassVar[int] = -1

    steps: int | None = 25
    predict: Parameterisation = "flow"

    def _goes_up(self) -> bool:
        return True

    def _looks(self) -> int | None:
        return None if self.steps is None else 2 * self.steps

    def _passed(self) -> tuple[int, ...]:
        passed = super()._passed()
        return passed[:-1] if self.to_level is None else passed  # not the middle of the step to the data

    def walk(self, schedule: Schedule) -> Walk:
        if self._levels is None and self.steps is not None:
            checks.integer(self.op, "steps", self.steps, 1, len(schedule) // 2)
        chosen = self._grid(schedule)
        if len(chosen) % 2:
            raise ValueError(
                f"{self.op}: levels must be an even number, a start and a middle for each step, got {chosen}"
            )
        at, N = Place(schedule.alpha[chosen], schedule.sigma[chosen]), len(chosen) // 2
        t, m, s = at.at(slice(0, None, 2)), at.at(slice(1, None, 2)), self._after(schedule, at).at(slice(1, None, 2))
        steps_of_both = implicit_step(m), corrected_step("flow", t, m, s)
        step = in_order(steps_of_both, [k for i in range(N) for k in (i, N + i)])
        return Walk(tuple(chosen), at, self._told(schedule, chosen), step, "x", (True, False) * N)
