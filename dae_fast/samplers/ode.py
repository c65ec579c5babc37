"""Euler and Heun along the probability-flow ODE, in the variables of EDM: dx' = eps dsigma', x' = x/alpha."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..continuous import ContinuousSchedule
from ..kernels.spec import ABSENT, Coefficients, map_of
from ..noise import Noise
from ..ops.conversions import Bounds
from ..ops.parameterisation import Parameterisation
from ..primitives.sums import affine
from ..schedule import Schedule
from .common import (
    Limits,
    Look,
    Network,
    Update,
    begin,
    conditions,
    descend,
    grid,
    limits,
    planned,
    progressed,
    reverse_plan,
    run,
    sampler,
    stepped,
)
from .tables import corrected, estimate, following, reverse


@sampler()
def euler(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule | ContinuousSchedule,
    noise: Noise,
    *,
    steps: int = 50,
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
    """Euler steps x' + (sigma'_s - sigma'_t) * eps in x' = x/alpha and sigma' = sigma/alpha: ddim with eta = 0.

    noise: makes the start when x is a shape; the steps are deterministic
    conditioning: "sigma" is for a network as EDM's and k-diffusion's; predict="x0" is EDM's D
    Other arguments, the result and the errors as in ddim and ddpm.
    Song, Meng and Ermon 2021, eq. 13; Karras et al. 2022, section 3 (k-diffusion's sample_euler without churn).
    """
    op = "euler"
    schedule = stepped(op, schedule, steps, levels)
    chosen = grid(op, schedule, steps, levels)
    told = conditions(op, schedule, chosen, conditioning)
    limit = limits(op, clamp, threshold)
    update = reverse_plan(op, schedule, tuple(chosen), predict, 0.0, 1.0, False, guidance, limit)
    return descend(op, net, begin(op, x, schedule, noise, chosen, graph), noise, chosen, update, progress, graph, told)


@sampler()
def heun(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule | ContinuousSchedule,
    noise: Noise,
    *,
    steps: int = 18,
    levels: Sequence[int] | None = None,
    S_churn: float = 0.0,
    S_tmin: float = 0.0,
    S_tmax: float = math.inf,
    S_noise: float = 1.0,
    predict: Parameterisation = "eps",
    conditioning: str | None = None,
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """EDM's sampler: Euler steps as in `euler`, each corrected by the slope where it leads (the last one is not).

    steps: N, with 2N - 1 looks by the network      noise: Noise; raising level t uses noise.fold_in(t)
    S_churn: >= 0; before a step from sigma in [S_tmin, S_tmax] noise of size S_noise >= 0 raises it to
        sigma*(1 + min(S_churn/N, sqrt(2) - 1)), which is no level of the schedule: needs conditioning="sigma"
    Other arguments, the result and the errors as in euler; alpha > 0 at every level.
    Karras et al. 2022, algorithms 1 and 2.
    """
    op = "heun"
    schedule = stepped(op, schedule, steps, levels)
    if S_churn > 0 and conditioning != "sigma":
        raise ValueError(f"{op}: S_churn needs conditioning='sigma', as it leads between the levels")
    chosen = grid(op, schedule, steps, levels)
    N, told = len(chosen), conditions(op, schedule, chosen, conditioning)
    limit = limits(op, clamp, threshold)
    churn = float(S_churn), float(S_tmin), float(S_tmax), float(S_noise)
    update, table, raised, is_raised, corrects = _heun(op, schedule, tuple(chosen), churn, predict, guidance, limit)
    at_start = raised if conditioning == "sigma" else told
    width = table.shape[1] - 2
    raising = map_of(op, (width, ABSENT, width + 1, ABSENT))

    def loop(look: Look, x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for i, t in enumerate(progressed(chosen, progress, op)):
            if is_raised[i]:
                # A launch of its own: the network must see the raised x, and the step before has no place for noise.
                (x,) = affine(raising, (x, None, None, None), noise.fold_in(t), Coefficients(table, i))  # type: ignore[arg-type]
            (ahead,) = update(table, i, x, look(x, at_start[i], update.parts))
            if corrects[i]:
                prediction = look(ahead, told[i + 1], update.parts)
                (x,) = update(table, N + i, ahead, prediction, z=x)
            else:
                x = ahead
        return x

    options = (*chosen, *told, *at_start, *is_raised, update.options)
    return run(op, net, loop, begin(op, x, schedule, noise, chosen, graph), noise, table, options, progress, graph)


HeunPlan = tuple[Update, Tensor, list[float], list[bool], list[bool]]


@planned
def _heun(
    op: str,
    schedule: Schedule,
    levels: tuple[int, ...],
    churn: tuple[float, float, float, float],
    predict: Parameterisation,
    guidance: float | None,
    limit: Limits,
) -> HeunPlan:
    """The Euler steps, then the corrections; their table, with what raises x in two columns more; the raised sigmas;
    which steps raise x, and which are corrected."""
    S_churn, S_tmin, S_tmax, S_noise = churn
    N = len(levels)
    alpha, sigma = schedule.alpha[list(levels)], schedule.sigma[list(levels)]
    alpha_s, sigma_s = following(alpha, sigma)
    gamma = min(S_churn / N, math.sqrt(2) - 1) * ((sigma >= S_tmin) & (sigma <= S_tmax)).double()
    raised = sigma * (1 + gamma)
    spread = S_noise * (raised.square() - sigma.square()).sqrt()
    has_slope = sigma_s > 0
    read = limit.read_as(predict)
    first = reverse(alpha, raised, alpha_s, sigma_s)
    second = corrected("eps", read, (alpha, raised), (alpha_s, sigma_s), (alpha_s, sigma_s))
    second = torch.where(has_slope[:, None], second, 0.0)
    of_second = torch.where(has_slope[:, None], estimate(op, predict, alpha_s, sigma_s, read), 0.0)
    update = Update(
        op,
        torch.cat((estimate(op, predict, alpha, raised), of_second)),
        torch.cat((first, second)),
        guidance=guidance,
        limits=limit,
    )
    raising = torch.stack((torch.ones_like(spread), spread), -1)
    table = torch.cat((update.table, torch.cat((raising, raising))), 1)
    schedule._require_finite(op, table, [*levels, *levels])
    return update, table, raised.tolist(), (spread > 0).tolist(), has_slope.tolist()
