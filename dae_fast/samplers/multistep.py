"""Linear multistep methods in eps: LMS, DEIS and PLMS. Adams and Bashforth along dx' = eps drho, x' = x/alpha.

A step is x'_s = x'_t + sum_j w_j eps_j, rho = sigma/alpha, eps_0 what is predicted at t and the others what was kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .. import checks
from ..schedule import Schedule
from .base import Sampler, Walk
from .steps import Place, Step

Weights = list[list[float]]  # of each step, for eps_0, eps_1, ...


@dataclass(eq=False, repr=False, kw_only=True)
class LMS(Sampler):
    """Adams and Bashforth in rho: the polynomial through the last `order` eps_hat, integrated exactly.

    order: in [1, 4], reached step by step      Other arguments and the errors as in Sampler; alpha > 0.
    k-diffusion's sample_lms (Crowson 2022), and the rho-AB of Zhang and Chen 2023.
    """

    op: ClassVar[str] = "lms"
    checks: ClassVar = {"order": lambda op, name, value: checks.integer(op, name, value, 1, 4)}
    keeps: ClassVar[str] = "eps"

    steps: int | None = 50
    order: int = 4

    def coefficients(self, t: Place, s: Place) -> Step:
        rho, end = (t.sigma / t.alpha).tolist(), (s.sigma / s.alpha).tolist()
        return along_eps(t, s, [lagrange(rho[max(0, i - self.order + 1) : i + 1], end[i]) for i in range(len(rho))])

    def _goes_up(self) -> bool:
        return True


@dataclass(eq=False, repr=False, kw_only=True)
class DEIS(Sampler):
    """tAB-DEIS with the polynomial of eps_hat in log rho, as diffusers has it, integrated exactly over rho.

    order: in [1, 4], reached step by step; a step to the data, where log rho is infinite, is of first order
    Other arguments and the errors as in Sampler; alpha > 0. Zhang and Chen 2023, eq. 15.
    """

    op: ClassVar[str] = "deis"
    checks: ClassVar = {"order": lambda op, name, value: checks.integer(op, name, value, 1, 4)}
    keeps: ClassVar[str] = "eps"

    steps: int | None = 20
    order: int = 3

    def coefficients(self, t: Place, s: Place) -> Step:
        rho, end = (t.sigma / t.alpha).tolist(), (s.sigma / s.alpha).tolist()
        weights = []
        for i in range(len(rho)):
            order = self.order if end[i] > 0 and min(rho[max(0, i - self.order + 1) : i + 1]) > 0 else 1
            weights.append(lagrange(rho[max(0, i - order + 1) : i + 1], end[i], np.log if order > 1 else None))
        return along_eps(t, s, weights)

    def _goes_up(self) -> bool:
        return True


@dataclass(eq=False, repr=False, kw_only=True)
class PLMS(Sampler):
    """Pseudo linear multistep: Adams and Bashforth's weights of even steps, whatever the levels.

    steps: N, with N + 1 looks: the first step takes the mean of the slopes at both ends, which are looked at in turn
    Other arguments and the errors as in Sampler; alpha > 0. Liu et al. 2022 (PNDM), eqs. 11 and 12, whose transfer is
    DDIM's; its start as in latent diffusion's PLMSSampler (Rombach et al. 2022).
    """

    op: ClassVar[str] = "plms"
    keeps: ClassVar[str] = "eps"

    steps: int | None = 50

    def walk(self, schedule: Schedule) -> Walk:
        chosen = self._grid(schedule)
        level = Place(schedule.alpha[chosen], schedule.sigma[chosen])
        after, N = self._after(schedule, level), len(chosen)
        h = (after.sigma / after.alpha - level.sigma / level.alpha).tolist()
        if N == 1:
            return Walk(tuple(chosen), level, self._told(schedule, chosen), along_eps(level, after, [h]), self.keeps)
        looks = [0, 1, *range(1, N)]
        t = level.at(looks)
        # The second look is at the end of the first step: x'_s = x'_m + h/2 (eps_m - eps_0), which is no eps of a step.
        weights = [[h[0]], [h[0] / 2, -h[0] / 2]]
        for i in range(1, N):
            first, *others = ADAMS[min(i, 3)]
            kept = [h[i] * w for w in others]
            place = i - 1  # where what the second look kept comes among those of the looks before
            weights.append([h[i] * first, *kept[:place], 0.0, *kept[place:]] if place <= 3 else [h[i] * first, *kept])
        s = Place(torch.cat((after.alpha[:1], after.alpha)), torch.cat((after.sigma[:1], after.sigma)))
        levels = [chosen[k] for k in looks]
        step = along_eps(t, s, weights, stays=1)
        return Walk(tuple(levels), t, self._told(schedule, levels), step, self.keeps)

    def _goes_up(self) -> bool:
        return True


ADAMS = ([1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])


def along_eps(t: Place, s: Place, weights: Sequence[Sequence[float]], stays: int = -1) -> Step:
    """x_s = alpha_s*x0_hat + sigma_s*eps_hat, the step of first order, and what the weights add to it, in alpha_s.

    stays: the look whose x is at s already, to which the weights add
    """
    depth = max(map(len, weights))
    w = torch.tensor([[*row, *[0.0] * (depth - len(row))] for row in weights], dtype=torch.float64)
    h = s.sigma / s.alpha - t.sigma / t.alpha
    stay = torch.arange(len(h)) == stays
    first = torch.where(stay, w[:, 0], w[:, 0] - h)
    return Step(
        x=stay.double(),
        x0=torch.where(stay, 0.0, s.alpha),
        eps=torch.where(stay, 0.0, s.sigma) + s.alpha * first,
        before=tuple(s.alpha * c for c in w[:, 1:].unbind(1)),
    )


def lagrange(nodes: list[float], end: float, of: Callable[..., np.ndarray] | None = None) -> list[float]:
    """Integrals over rho from the last of `nodes` to `end` of the Lagrange polynomials through them, in of(rho).

    The last node's first. By Gauss and Legendre: exact for the polynomials in rho, to rounding for those in log rho.
    """
    if not np.isfinite(nodes).all():  # the table has no finite row then, and is refused
        return [math.nan] * len(nodes)
    start = nodes[-1]
    points, parts = np.polynomial.legendre.leggauss(24)
    if of is None:
        rho = start + (end - start) * (points + 1) / 2
        parts = parts * (end - start) / 2
        places, at = rho, np.array(nodes)
    else:
        places = np.log(start) + np.log(end / start) * (points + 1) / 2
        parts = parts * np.log(end / start) / 2 * np.exp(places)
        at = of(np.array(nodes))
    found = []
    for j in reversed(range(len(nodes))):
        others = np.delete(at, j)
        basis = np.prod((places[:, None] - others) / (at[j] - others), axis=1)
        found.append(float((basis * parts).sum()))
    return found
