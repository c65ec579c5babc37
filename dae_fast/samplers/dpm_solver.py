"""DPM-Solver++, the multistep solver of second order, of the ODE and of the SDE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import checks
from .base import Sampler
from .steps import Place, Step


@dataclass(eq=False, repr=False, kw_only=True)
class DPMSolverPP2M(Sampler):
    """DPM-Solver++ 2M: the probability-flow ODE to second order at one look by the network a step.

    The step also writes its x0 estimate, which the next one reads. The first step has none to read, and the last,
    to the data, is the estimate itself: both are of first order (lower_order_final in the paper's code).
    Arguments and errors as in Sampler. Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    op: ClassVar[str] = "dpm_solver_pp_2m"
    keeps: ClassVar[str] = "x0"

    steps: int | None = 20

    def coefficients(self, t: Place, s: Place) -> Step:
        return second_order(t, s)

    def _goes_up(self) -> bool:
        return True


@dataclass(eq=False, repr=False, kw_only=True)
class DPMSolverPP2MSDE(Sampler):
    """SDE-DPM-Solver++ 2M: the reverse SDE, its linear part and its noise exactly, the x0 estimate to second order.

    eta: >= 0, how much of the SDE's noise is added: 1 is the paper's, 0 is DPMSolverPP2M
    Other arguments and the errors as in Sampler.
    Lu et al. 2022 (DPM-Solver++), eq. 15 and appendix B; eta as in k-diffusion (Crowson 2022).
    """

    op: ClassVar[str] = "dpm_solver_pp_2m_sde"
    checks: ClassVar = {"eta": checks.real("finite and not negative")}
    keeps: ClassVar[str] = "x0"

    steps: int | None = 20
    eta: float = 1.0

    def coefficients(self, t: Place, s: Place) -> Step:
        return second_order(t, s, self.eta)


def second_order(t: Place, s: Place, eta: float = 0.0) -> Step:
    """With lambda = log(alpha/sigma), h = lambda_s - lambda_t and r = (h of the step before) / h:

    x_s = sigma_s/sigma_t e^(-eta h) x_t + alpha_s (1 - e^(-(1 + eta) h)) D + sigma_s sqrt(1 - e^(-2 eta h)) z,
    D = x0_hat + (x0_hat - x0_hat before) / 2r. e^-h is taken from the ratios, for lambda is infinite where there
    is no noise or no signal. A step from or to there has no r, and D = x0_hat.
    """
    shrunk = torch.where(s.sigma > 0, s.sigma / t.sigma, 0.0)
    decay = torch.where(s.sigma > 0, t.alpha / s.alpha * shrunk, 0.0)  # e^-h
    h = -decay.log()
    before = torch.cat((h.new_zeros(1), h[:-1]))
    slope = torch.where((before * h > 0) & h.isfinite(), h / (2 * before), 0.0)  # 1/2r
    of_D = s.alpha * (1 - decay ** (1 + eta))
    return Step(
        x=shrunk * decay**eta,
        x0=of_D * (1 + slope),
        before=(-of_D * slope,),
        noise=s.sigma * (1 - decay ** (2 * eta)).clamp(min=0).sqrt(),
    )
