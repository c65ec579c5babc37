"""DPM-Solver++, the multistep solver of second order, of the ODE and of the SDE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..continuous import ContinuousSchedule
from ..noise import Noise
from ..ops.conversions import Bounds
from ..ops.parameterisation import Parameterisation
from ..schedule import Schedule
from .common import (
    Limits,
    Look,
    Network,
    Told,
    Update,
    begin,
    conditions,
    grid,
    guided,
    limits,
    mix,
    mixed,
    planned,
    progressed,
    run,
    sampler,
    stepped,
)
from .tables import estimate, following


@sampler()
def dpm_solver_pp_2m(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule | ContinuousSchedule,
    noise: Noise,
    *,
    steps: int = 20,
    levels: Sequence[int] | None = None,
    predict: Parameterisation = "eps",
    conditioning: str | None = None,
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """DPM-Solver++ 2M: the probability-flow ODE to second order at one look by the network a step.

    noise: Noise; of a start given as a shape alone, the steps have none
    Other arguments, the result and the errors as in ddim and ddpm.
    The step also writes its x0 estimate, which the next one reads. The first step has none to read, and the last,
    to the data, is the estimate itself: both are of first order (lower_order_final in the paper's code).
    Under guidance the prediction is combined in a launch of its own. Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """
    op = "dpm_solver_pp_2m"
    schedule = stepped(op, schedule, steps, levels)
    chosen = grid(op, schedule, steps, levels)
    told = conditions(op, schedule, chosen, conditioning)
    limit = limits(op, clamp, threshold)
    return _multistep(op, net, x, schedule, noise, chosen, told, 0.0, predict, limit, guidance, progress, graph)


@sampler()
def dpm_solver_pp_2m_sde(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule | ContinuousSchedule,
    noise: Noise,
    *,
    steps: int = 20,
    levels: Sequence[int] | None = None,
    eta: float = 1.0,
    predict: Parameterisation = "eps",
    conditioning: str | None = None,
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """SDE-DPM-Solver++ 2M: the reverse SDE, its linear part and its noise exactly, the x0 estimate to second order.

    eta: >= 0, how much of the SDE's noise is added: 1 is the paper's, 0 is dpm_solver_pp_2m
    noise: Noise; the step from level t uses noise.fold_in(t)
    Other arguments, the result and the errors as in dpm_solver_pp_2m.
    Lu et al. 2022 (DPM-Solver++), eq. 15 and appendix B; eta as in k-diffusion (Crowson 2022).
    """
    op = "dpm_solver_pp_2m_sde"
    schedule = stepped(op, schedule, steps, levels)
    if not 0 <= eta < math.inf:
        raise ValueError(f"{op}: eta must be finite and not negative, got {eta}")
    chosen = grid(op, schedule, steps, levels)
    told = conditions(op, schedule, chosen, conditioning)
    limit = limits(op, clamp, threshold)
    return _multistep(op, net, x, schedule, noise, chosen, told, eta, predict, limit, guidance, progress, graph)


def _multistep(
    op: str,
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule,
    noise: Noise,
    levels: list[int],
    told: Told,
    eta: float,
    predict: Parameterisation,
    limit: Limits,
    guidance: float | None,
    progress: bool,
    graph: bool,
) -> Tensor:
    """x_s and x0_hat from x_t, the prediction, the noise and the x0_hat of the step before: one launch a step."""
    update, table, looks_back = _multistep_plan(op, schedule, tuple(levels), eta, predict, limit, guidance)
    # The launch has no room for a second prediction beside the x0_hat of the step before.
    parts = guided(op, guidance)

    def loop(look: Look, x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        x0_hat = None
        for i, t in enumerate(progressed(levels, progress, op)):
            pred = mixed(op, table[i : i + 1, -2:], look(x, told[i], parts))
            before = x0_hat if looks_back[i] else None
            x, x0_hat = update(table, i, x, (pred,), noise=noise.fold_in(t), w=before)
        return x

    x = begin(op, x, schedule, noise, levels, graph)
    return run(op, net, loop, x, noise, table, (*levels, *told, parts, update.options), progress, graph)


@planned
def _multistep_plan(
    op: str,
    schedule: Schedule,
    levels: tuple[int, ...],
    eta: float,
    predict: Parameterisation,
    limit: Limits,
    guidance: float | None,
) -> tuple[Update, Tensor, list[bool]]:
    """The steps; their table, with what weighs the predictions under guidance; which of them look back."""
    alpha, sigma = schedule.alpha[list(levels)], schedule.sigma[list(levels)]
    step = _second_order(alpha, sigma, *following(alpha, sigma), eta)
    kept = alpha.new_tensor([[0.0, 1.0, 0.0]]).expand(len(levels), 3)
    update = Update(op, estimate(op, predict, alpha, sigma), step, kept, guidance=None, limits=limit)
    guided(op, guidance)
    table = torch.cat((update.table, mix(guidance, alpha)), 1)
    schedule._require_finite(op, table, levels)
    return update, table, (step[:, 3] != 0).tolist()


def _second_order(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, eta: float) -> Tensor:
    """(steps, 4): x_s = c_x * x_t + c_m * x0_hat + c_z * z + c_w * (x0_hat of the step before).

    With lambda = log(alpha/sigma), h = lambda_s - lambda_t and r = (h of the step before) / h:
    x_s = sigma_s/sigma_t e^(-eta h) x_t + alpha_s (1 - e^(-(1 + eta) h)) D + sigma_s sqrt(1 - e^(-2 eta h)) z,
    D = x0_hat + (x0_hat - x0_hat before) / 2r. e^-h is taken from the ratios, for lambda is infinite where there
    is no noise or no signal. A step from or to there has no r, and D = x0_hat.
    """
    noisy = sigma_s > 0
    shrunk = torch.where(noisy, sigma_s / sigma_t, 0.0)
    decay = torch.where(noisy, alpha_t / alpha_s * shrunk, 0.0)  # e^-h
    h = -decay.log()
    before = torch.cat((h.new_zeros(1), h[:-1]))
    slope = torch.where((before > 0) & h.isfinite(), h / (2 * before), 0.0)  # 1/2r
    c_m = alpha_s * (1 - decay ** (1 + eta))
    c_z = sigma_s * (1 - decay ** (2 * eta)).clamp(min=0).sqrt()
    return torch.stack((shrunk * decay**eta, c_m * (1 + slope), c_z, -c_m * slope), -1)
