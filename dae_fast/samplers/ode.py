"""Euler and Heun along the probability-flow ODE, in the variables of EDM: dx' = eps dsigma', x' = x/alpha."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.spec import ABSENT, map_of
from ..noise import Noise
from ..primitives.sums import affine
from ..schedule import Schedule
from .arguments import Noises
from .base import More, Sampler, Walk
from .steps import Place, corrected_step, implicit_step, in_order


@dataclass(eq=False, repr=False, kw_only=True)
class Churned(Sampler):
    """What Euler and Heun share: noise that raises a level before the step from it.

    S_churn: >= 0; before a step from sigma in [S_tmin, S_tmax] noise of size S_noise >= 0 raises it to
        sigma*(1 + min(S_churn/N, sqrt(2) - 1)), which is no level of the schedule: needs conditioning="sigma"
    Raising level t uses noise.fold_in(t), in a launch of its own: `churned`, which a loop of one's own calls before a
    look. Karras et al. 2022, algorithm 2.
    """

    S_churn: float = 0.0
    S_tmin: float = 0.0
    S_tmax: float = math.inf
    S_noise: float = 1.0

    def _goes_up(self) -> bool:
        return self.S_churn == 0

    def _tells_sigma(self) -> bool:
        return isinstance(self.conditioning, str) and self.conditioning == "sigma"

    def _check_churn(self) -> None:
        if self.S_churn > 0 and not self._tells_sigma():
            raise ValueError(f"{self.op}: S_churn needs conditioning='sigma', as it leads between the levels")

    def _raised(self, sigma: Tensor, N: int) -> Tensor:
        gamma = min(self.S_churn / N, math.sqrt(2) - 1)
        return sigma * (1 + gamma * ((sigma >= self.S_tmin) & (sigma <= self.S_tmax)).double())

    def _more(self, schedule: Schedule, walk: Walk) -> More:
        """1 and the size of the noise that raises x before a look, 0 where none does."""
        sigma = schedule.sigma[list(walk.levels)]
        spread = self.S_noise * (walk.at.sigma.square() - sigma.square()).clamp(min=0).sqrt()
        return More(torch.stack((torch.ones_like(spread), spread), -1), (spread > 0).tolist())

    def churned(self, i: int, x: Tensor, noise: Noise) -> Tensor:
        """x as the network is to see it at look i: raised by S_churn where a step begins, else as it is."""
        return self._before_look(i, x, noise, self._table(x))

    def _before_look(self, i: int, x: Tensor, noise: Noises, table: Tensor) -> Tensor:
        if not (self._plan.facts and self._plan.facts[i]):
            return x
        if not isinstance(noise, Noise):
            got = type(noise).__name__
            raise TypeError(f"{self.op}: S_churn goes back along the levels: noise must be a Noise, got {got}")
        # A launch of its own: the network must see the raised x.
        width = table.shape[1]
        raising = map_of(self.op, (width - 2, ABSENT, width - 1, ABSENT))
        fresh = noise.fold_in(self._plan.tags[i])
        return affine(raising, (x, None, None, None), fresh, (table, self._plan.launches.first_row(i)))[0]


@dataclass(eq=False, repr=False, kw_only=True)
class Euler(Churned):
    """Euler steps x' + (sigma'_s - sigma'_t) * eps in x' = x/alpha and sigma' = sigma/alpha: DDIM with eta = 0.

    conditioning: "sigma" is for a network as EDM's and k-diffusion's; predict="x0" is EDM's D
    S_churn and the others: as in Heun      Other arguments and the errors as in Sampler.
    Song, Meng and Ermon 2021, eq. 13; Karras et al. 2022, section 3 (k-diffusion's sample_euler).
    """

    op: ClassVar[str] = "euler"

    steps: int | None = 50

    def walk(self, schedule: Schedule) -> Walk:
        self._check_churn()
        chosen = self._grid(schedule)
        level = Place(schedule.alpha[chosen], schedule.sigma[chosen])
        t = Place(level.alpha, self._raised(level.sigma, len(chosen)))
        told = tuple(t.sigma.tolist()) if self._tells_sigma() else self._told(schedule, chosen)
        if self._tells_sigma():
            self._told(schedule, chosen)  # which says where sigma is none
        return Walk(tuple(chosen), t, told, implicit_step(self._after(schedule, level)))


@dataclass(eq=False, repr=False, kw_only=True)
class Heun(Churned):
    """EDM's sampler: Euler steps as in Euler, each corrected by the slope where it leads (the last one is not).

    steps: N, with 2N - 1 looks by the network, each an entry of `levels` as it is read: the slopes at t, then at s
    S_churn: >= 0; before a step from sigma in [S_tmin, S_tmax] noise of size S_noise >= 0 raises it to
        sigma*(1 + min(S_churn/N, sqrt(2) - 1)), which is no level of the schedule: needs conditioning="sigma"
    Raising level t uses noise.fold_in(t), in `churned`, which a loop of one's own calls before a look.
    Other arguments and the errors as in Euler; alpha > 0 at every level.
    Karras et al. 2022, algorithms 1 and 2.
    """

    op: ClassVar[str] = "heun"

    steps: int | None = 18

    def walk(self, schedule: Schedule) -> Walk:
        self._check_churn()
        chosen = self._grid(schedule)
        level, N = Place(schedule.alpha[chosen], schedule.sigma[chosen]), len(chosen)
        t, s = Place(level.alpha, self._raised(level.sigma, N)), self._after(schedule, level)
        schedule._require_finite(self.op, (t.sigma / t.alpha)[:, None], chosen)
        corrects = (s.sigma > 0).tolist()
        order = [k for i in range(N) for k in ((i, N + i) if corrects[i] else (i,))]
        stops = chosen if self.to_level is None else [*chosen, self.to_level]
        told = self._told(schedule, stops)
        at_start = tuple(t.sigma.tolist()) if self._tells_sigma() else told[:N]
        levels, both = [*chosen, *stops[1:]], (*at_start, *told[1:])
        return Walk(
            tuple(levels[k] for k in order),
            Place(torch.cat((t.alpha, s.alpha)), torch.cat((t.sigma, s.sigma))).at(order),
            tuple(both[k] for k in order),
            in_order((implicit_step(s), corrected_step("eps", t, s, s)), order),
            "x",
            tuple(k < N and corrects[k] for k in order),
        )
