"""DPM-Solver++, the multistep solvers of second and third order, of the ODE and of the SDE.

With lambda = log(alpha/sigma), h = lambda_s - lambda_t and k = 1 + eta, eta how much noise it has, the reverse SDE is
x_s = sigma_s/sigma_t e^(-eta h) x_t + alpha_s * integral of k e^(-k (h - u)) x0_hat(lambda_t + u) du, u in [0, h],
      + sigma_s sqrt(1 - e^(-2 eta h)) z,
and a method is a polynomial for x0_hat. e^-h is taken from the ratios, for lambda is infinite where there is no
noise or no signal; a step from or to there is of first order, x0_hat itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from .base import Sampler
from .steps import Place, Step

SOLVERS = checks.one_of("midpoint", "heun")


@dataclass(eq=False, repr=False, kw_only=True)
class DPMSolverPP2M(Sampler):
    """DPM-Solver++ 2M: the probability-flow ODE to second order at one look by the network a step.

    solver_type: "midpoint", the paper's, or "heun", which integrates the straight line through two x0_hat exactly
    The step also writes its x0 estimate, which the next one reads. The first step has none to read, and the last,
    to the data, is the estimate itself: both are of first order (lower_order_final in the paper's code).
    Other arguments and the errors as in Sampler. Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    op: ClassVar[str] = "dpm_solver_pp_2m"
    checks: ClassVar = {"solver_type": SOLVERS}
    keeps: ClassVar[str] = "x0"

    steps: int | None = 20
    solver_type: str = "midpoint"

    def coefficients(self, t: Place, s: Place) -> Step:
        return second_order(t, s, 0.0, self.solver_type)

    def _goes_up(self) -> bool:
        return True


@dataclass(eq=False, repr=False, kw_only=True)
class DPMSolverPP2MSDE(Sampler):
    """SDE-DPM-Solver++ 2M: the reverse SDE, its linear part and its noise exactly, the x0 estimate to second order.

    eta: >= 0, how much of the SDE's noise is added: 1 is the paper's, 0 is DPMSolverPP2M
    solver_type: as in DPMSolverPP2M
    Other arguments and the errors as in Sampler.
    Lu et al. 2022 (DPM-Solver++), eq. 15 and appendix B; eta and solver_type as in k-diffusion (Crowson 2022).
    """

    op: ClassVar[str] = "dpm_solver_pp_2m_sde"
    checks: ClassVar = {"eta": checks.real("finite and not negative"), "solver_type": SOLVERS}
    keeps: ClassVar[str] = "x0"

    steps: int | None = 20
    eta: float = 1.0
    solver_type: str = "midpoint"

    def coefficients(self, t: Place, s: Place) -> Step:
        return second_order(t, s, self.eta, self.solver_type)


@dataclass(eq=False, repr=False, kw_only=True)
class DPMSolverPP3M(Sampler):
    """DPM-Solver++ 3M, of the ODE or, with eta, of the SDE: a parabola through the last three x0_hat.

    eta: >= 0, how much of the SDE's noise is added
    exact: integrate the parabola exactly. The published update has half of that for its last term, (1 - 2 phi)/2 * D2
        where (1 - 2 phi) * D2 is the integral, and so is of second order; as published unless this is True
    The first steps are of first and second order, and the last, to the data, is x0_hat itself.
    Other arguments and the errors as in Sampler.
    Lu et al. 2022 (DPM-Solver++), appendix B; k-diffusion's sample_dpmpp_3m_sde (Crowson 2022).
    """

    op: ClassVar[str] = "dpm_solver_pp_3m"
    checks: ClassVar = {"eta": checks.real("finite and not negative"), "exact": checks.flag}
    keeps: ClassVar[str] = "x0"

    steps: int | None = 20
    eta: float = 0.0
    exact: bool = False

    def coefficients(self, t: Place, s: Place) -> Step:
        first, h = first_order(t, s, self.eta)
        h_1, h_2 = earlier(h, 1), earlier(h, 2)
        has_1 = (h_1 * h > 0) & h.isfinite()
        has_2 = has_1 & (h_2 * h > 0)
        r_0, r_1 = torch.where(has_1, h_1 / h, 1.0), torch.where(has_2, h_2 / h, 1.0)
        k = (1 + self.eta) * torch.where(h.isfinite(), h, 1.0)
        phi_2 = torch.expm1(-k) / k + 1
        phi_3 = (2.0 if self.exact else 1.0) * (phi_2 / k - 0.5)
        # phi_2 * D_1 - phi_3 * D_2, D_1 = d_0 + r_0*D_2, D_2 = (d_0 - d_1)/(r_0 + r_1), d_0 and d_1 the differences
        of_D2 = torch.where(has_2, (phi_2 * r_0 - phi_3) / (r_0 + r_1), 0.0)
        of_d0 = s.alpha * (torch.where(has_1, phi_2, 0.0) + of_D2) / r_0
        of_d1 = -s.alpha * of_D2 / r_1
        assert first.x0 is not None
        return first._replace(x0=first.x0 + of_d0, before=(of_d1 - of_d0, -of_d1))

    def _goes_up(self) -> bool:
        return self.eta == 0


def first_order(t: Place, s: Place, eta: float) -> tuple[Step, Tensor]:
    """The step of a constant x0_hat, and h."""
    shrunk = torch.where(s.sigma > 0, s.sigma / t.sigma, 0.0)
    decay = torch.where(s.sigma > 0, t.alpha / s.alpha * shrunk, 0.0)  # e^-h
    step = Step(
        x=shrunk * decay**eta,
        x0=s.alpha * (1 - decay ** (1 + eta)),
        noise=s.sigma * (1 - decay ** (2 * eta)).clamp(min=0).sqrt(),
    )
    return step, -decay.log()


def earlier(h: Tensor, k: int) -> Tensor:
    """That of k steps before, 0 where there is none or it is infinite."""
    before = torch.cat((h.new_zeros(k), h))[: len(h)]
    return torch.where(before.isfinite(), before, 0.0)


def second_order(t: Place, s: Place, eta: float, solver_type: str) -> Step:
    """x0_hat a straight line: D = x0_hat + (x0_hat - x0_hat before) / 2r, r = (h of the step before) / h, midpoint."""
    step, h = first_order(t, s, eta)
    before = earlier(h, 1)
    slope = torch.where((before * h > 0) & h.isfinite(), h / before, 0.0)  # 1/r
    k = (1 + eta) * torch.where(h.isfinite() & (h != 0), h, 1.0)
    assert step.x0 is not None
    of_slope = step.x0 / 2 if solver_type == "midpoint" else s.alpha * (torch.expm1(-k) / k + 1)
    return step._replace(x0=step.x0 + of_slope * slope, before=(-of_slope * slope,))
