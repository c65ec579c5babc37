"""Few-step samplers of distilled networks: to the data in one look, and noised again to the next level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import checks
from ..schedule import Schedule
from .base import Sampler, Walk
from .steps import Place, Step


def positive(op: str, name: str, value: Any) -> float:
    """With a square within float64."""
    found = checks.number(op, name, value, "positive and finite")
    if not 1e-150 < found < 1e150:
        raise ValueError(f"{op}: {name} must have a square within float64, got {found}")
    return found


def positive_or_none(op: str, name: str, value: Any) -> float | None:
    return None if value is None else positive(op, name, value)


def least_sigma(op: str, name: str, value: Any) -> float:
    return 0.0 if checks.is_number(value) and value == 0 else positive(op, name, value)


@dataclass(eq=False, repr=False, kw_only=True)
class Consistency(Sampler):
    """Multistep consistency sampling: f = c_skip*x + c_out*x0_hat, then x_s = alpha_s*f + sqrt(sigma_s^2 - e^2) z.

    sigma_data: > 0, then c_skip = sigma_data^2/((r - e)^2 + sigma_data^2) and c_out = sigma_data (r - e)/sqrt(r^2 +
        sigma_data^2), r = sigma/alpha, for a network whose x0_hat (predict="x0") is the paper's F; None: x0_hat is f
    epsilon: e, the least sigma, to which the network leads; the last step adds no noise
    Other arguments and the errors as in Sampler. Song et al. 2023 (Consistency models), algorithm 1 and eq. 5.
    """

    op: ClassVar[str] = "consistency"
    checks: ClassVar = {
        "sigma_data": positive_or_none,
        "epsilon": least_sigma,
    }

    steps: int | None = 2
    sigma_data: float | None = None
    epsilon: float = 0.0

    def coefficients(self, t: Place, s: Place) -> Step:
        noise = (s.sigma.square() - self.epsilon**2).clamp(min=0).sqrt()
        if self.sigma_data is None:
            return Step(x0=s.alpha, noise=noise)
        r, data = t.sigma / t.alpha, self.sigma_data
        c_skip = data**2 / ((r - self.epsilon).square() + data**2)
        c_out = data * (r - self.epsilon) / (r.square() + data**2).sqrt()
        return Step(x=s.alpha * c_skip / t.alpha, x0=s.alpha * c_out, noise=noise)


@dataclass(eq=False, repr=False, kw_only=True)
class LCM(Sampler):
    """Latent consistency: f = c_skip*x + c_out*x0_hat, then x_s = alpha_s*f + sigma_s*z; the last step is f.

    With u = timestep_scaling * t of level t, c_skip = sigma_data^2/(u^2 + sigma_data^2) and
    c_out = u/sqrt(u^2 + sigma_data^2).
    sigma_data: > 0      timestep_scaling: > 0      spacing: "trailing" or "leading" levels of the teacher, as it was
        distilled      Other arguments and the errors as in Sampler. Luo et al. 2023, algorithm 3 and its code.
    """

    op: ClassVar[str] = "lcm"
    checks: ClassVar = {
        "sigma_data": positive,
        "timestep_scaling": positive,
    }

    steps: int | None = 4
    spacing: str = "trailing"
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def walk(self, schedule: Schedule) -> Walk:
        walk = super().walk(schedule)
        u = self.timestep_scaling * torch.tensor(walk.levels, dtype=torch.float64)
        s, size = self._after(schedule, walk.at), (u.square() + self.sigma_data**2).sqrt()
        step = Step(x=s.alpha * (self.sigma_data / size).square(), x0=s.alpha * u / size, noise=s.sigma)
        return walk._replace(step=step)

    def coefficients(self, t: Place, s: Place) -> Step:
        return Step(x0=s.alpha, noise=s.sigma)


@dataclass(eq=False, repr=False, kw_only=True)
class TCD(Sampler):
    """Trajectory consistency: along the ODE to level s' = floor((1 - gamma) s), then noised from s' to s.

    x_s = a (alpha_s' x0_hat + sigma_s' eps_hat) + sqrt(sigma_s^2 - (a sigma_s')^2) z, a = alpha_s/alpha_s'
    gamma: in [0, 1], 0 is DDIM, 1 is multistep consistency sampling up to the level 0 it leads to
    Other arguments and the errors as in Sampler. Zheng et al. 2024, algorithm 4 and its code (eta there).
    """

    op: ClassVar[str] = "tcd"
    checks: ClassVar = {"gamma": checks.real("in [0, 1]")}

    steps: int | None = 4
    spacing: str = "trailing"
    gamma: float = 0.3

    def walk(self, schedule: Schedule) -> Walk:
        walk = super().walk(schedule)
        s = self._after(schedule, walk.at)
        later = [*walk.levels[1:], *([] if self.to_level is None else [self.to_level])]
        between = [int((1 - self.gamma) * level) for level in later]
        m = Place(schedule.alpha[between], schedule.sigma[between])
        if self.to_level is None:
            m = Place(torch.cat((m.alpha, s.alpha[-1:])), torch.cat((m.sigma, s.sigma[-1:])))
        a = s.alpha / m.alpha
        noise = (s.sigma.square() - (a * m.sigma).square()).clamp(min=0).sqrt()
        return walk._replace(step=Step(x0=s.alpha, eps=a * m.sigma, noise=noise))

    def coefficients(self, t: Place, s: Place) -> Step:
        return Step(x0=s.alpha, eps=s.sigma)
