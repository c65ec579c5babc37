"""Flow matching: Euler and midpoint along dx' = (eps - x0) dtau, x' = x/(alpha + sigma), tau = sigma/(alpha + sigma).

With Schedule.flow x' is x and tau the time of the flow, from 1, noise, to 0, data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..continuous import ContinuousSchedule
from ..noise import Noise
from ..ops.conversions import Bounds
from ..ops.parameterisation import Parameterisation
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
def flow_euler(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule | ContinuousSchedule,
    noise: Noise,
    *,
    steps: int = 50,
    levels: Sequence[int] | None = None,
    predict: Parameterisation = "flow",
    conditioning: str | None = None,
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """Euler steps x' + (tau_s - tau_t) * u, u = eps - x0 the velocity; net predicts u unless `predict` says otherwise.

    schedule: Schedule.flow, or any: x' and tau of the module make its path straight. A ContinuousSchedule stands for
        its levels discretise(steps), of which the network is told the times
    steps: in [1, T], evenly spaced in index from T-1 to the data one below level 0, so evenly in tau for Schedule.flow
    noise: makes the start when x is a shape; the steps are deterministic
    The step is `euler`'s, which is the same along every straight path: x_s = alpha_s*x0_hat + sigma_s*eps_hat.
    Other arguments, the result and the errors as in ddim and ddpm.
    Liu et al. 2022; Lipman et al. 2023 (their t is 1 - tau).
    """
    op = "flow_euler"
    schedule = stepped(op, schedule, steps, levels)
    chosen = grid(op, schedule, steps, levels, last=-1)
    told = conditions(op, schedule, chosen, conditioning)
    limit = limits(op, clamp, threshold)
    update = reverse_plan(op, schedule, tuple(chosen), predict, 0.0, 1.0, False, guidance, limit)
    return descend(op, net, begin(op, x, schedule, noise, chosen, graph), noise, chosen, update, progress, graph, told)


@sampler()
def flow_midpoint(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule | ContinuousSchedule,
    noise: Noise,
    *,
    steps: int = 25,
    levels: Sequence[int] | None = None,
    predict: Parameterisation = "flow",
    conditioning: str | None = None,
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """Midpoint steps: x' + (tau_s - tau_t) * u, u the velocity at the level in the middle, where an Euler step leads.

    steps: in [1, T/2], of two looks by the network each, at 2*steps levels spaced as in flow_euler
    levels: instead of steps, one's own, decreasing, an even number: start and middle of each step in turn
    A middle level at tau_t + c*(tau_s - tau_t) with c other than 1/2 (a shifted schedule, a rounded index) takes
    (1 - 1/2c) of the slope at the start and 1/2c of its own, which is of second order for every c.
    Other arguments, the result and the errors as in flow_euler. Lipman et al. 2023, section 6.
    """
    op = "flow_midpoint"
    schedule = stepped(op, schedule, 2 * steps, levels)
    if levels is None:
        steps = checks.integer(op, "steps", steps, 1, len(schedule) // 2)
    chosen = grid(op, schedule, 2 * steps, levels, last=-1)
    if len(chosen) % 2:
        raise ValueError(f"{op}: levels must be an even number, a start and a middle for each step, got {chosen}")
    N, told = len(chosen) // 2, conditions(op, schedule, chosen, conditioning)
    starts, middles = chosen[::2], chosen[1::2]
    update = _midpoints(op, schedule, tuple(starts), tuple(middles), predict, guidance, limits(op, clamp, threshold))

    def loop(look: Look, x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for i in progressed(range(N), progress, op):
            (middle,) = update(table, i, x, look(x, told[2 * i], update.parts))
            (x,) = update(table, N + i, middle, look(middle, told[2 * i + 1], update.parts), z=x)
        return x

    options = (*chosen, *told, update.options)
    x = begin(op, x, schedule, noise, chosen, graph)
    return run(op, net, loop, x, noise, update.table, options, progress, graph)


@planned
def _midpoints(
    op: str,
    schedule: Schedule,
    starts: tuple[int, ...],
    middles: tuple[int, ...],
    predict: Parameterisation,
    guidance: float | None,
    limit: Limits,
) -> Update:
    """The steps to the middles, then those from there to the ends."""
    t, m = ((schedule.alpha[list(part)], schedule.sigma[list(part)]) for part in (starts, middles))
    read = limit.read_as(predict)
    update = Update(
        op,
        torch.cat((estimate(op, predict, *t), estimate(op, predict, *m, read))),
        torch.cat((reverse(*t, *m), corrected("flow", read, t, m, following(*t)))),
        guidance=guidance,
        limits=limit,
    )
    schedule._require_finite(op, update.table, [*starts, *middles])
    return update
