"""The probability-flow ODE of an SDE in continuous time."""

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
from .common import Limits, Look, Network, Update, check_start, draw_start, limits, planned, progressed, run, sampler
from .tables import estimate


@sampler(
    schedule=checks.instance(ContinuousSchedule, "a ContinuousSchedule"),
    method=checks.one_of("euler", "heun"),
    steps=checks.whole(1),
)
def probability_flow(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: ContinuousSchedule,
    noise: Noise,
    *,
    steps: int = 50,
    times: Tensor | Sequence[float] | None = None,
    method: str = "heun",
    denoise: bool = True,
    predict: Parameterisation = "score",
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """dx/dt = f(t)*x - g(t)^2/2 * score(x, t) from t_max down, f the schedule's drift and g its diffusion.

    net(x, t): the score (or what `predict` says), like x, at times t (B,) fp32 (fp64 for fp64)
    x: (B, ...) fp16/bf16/fp32/fp64 at the first time, or a shape: then noise.fold_in(START_TAG).normal(shape),
       fp32 on the CPU (with graph on the current CUDA device), times sigma unless alpha^2 + sigma^2 = 1 there
    noise: makes the start when x is a shape; the steps are deterministic
    steps: >= 1, over the times of schedule.discretise(steps + 1)
    times: instead of steps, one's own, two or more, decreasing
    method: "euler", of first order, or "heun", of second with two looks by the network
    denoise: end with Tweedie's estimate of x0 at the last time (one look more), else with x there
    Other arguments as in ddpm; progress counts the steps      returns: like x
    Raises ValueError for a shape mismatch, or a time where f, g or the score of the prediction is not finite:
    alpha = 0 (ContinuousSchedule.flow(), cosine() and laplace() at t = 1; start below it) or sigma = 0.
    Song et al. 2021, eq. 13.
    """
    op = "probability_flow"
    down: tuple[float, ...] | None = None
    if times is not None:
        chosen = checks.float64(op, "times", times)
        if chosen.dim() != 1 or len(chosen) < 2 or not bool((chosen[1:] < chosen[:-1]).all()):
            raise ValueError(f"{op}: times must be two or more and decrease, got {times}")
        down = tuple(chosen.tolist())
    limit = limits(op, clamp, threshold)
    update, told, start = _flow(op, schedule, steps, down, method, denoise, predict, guidance, limit)
    N = len(told) - 1

    def loop(look: Look, x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for i in progressed(range(N), progress, op):
            (ahead,) = update(table, i, x, look(x, told[i], update.parts))
            if method == "euler":
                x = ahead
            else:
                prediction = look(ahead, told[i + 1], update.parts)
                (x,) = update(table, N + i, ahead, prediction, z=x)
        if denoise:
            (x,) = update(table, len(table) - 1, x, look(x, told[-1], update.parts))
        return x

    if not isinstance(x, Tensor):
        x = draw_start(op, x, noise, *start, graph)
    check_start(op, x, noise)
    return run(op, net, loop, x, noise, update.table, (*told, method, denoise, update.options), progress, graph)


@planned
def _flow(
    op: str,
    schedule: ContinuousSchedule,
    steps: int,
    times: tuple[float, ...] | None,
    method: str,
    denoise: bool,
    predict: Parameterisation,
    guidance: float | None,
    limit: Limits,
) -> tuple[Update, list[float], tuple[float, float]]:
    """The Euler steps, the corrections of Heun's, the last estimate; the times; alpha and sigma of the start."""
    if times is None:
        levels = schedule.discretise(steps + 1)
    else:
        levels = schedule.discretise(times=torch.tensor(times, dtype=torch.float64, device="cpu").flip(0))
    t, alpha, sigma = (c.flip(0) for c in (levels.times, levels.alpha, levels.sigma))
    N = len(t) - 1
    f, half_square = schedule.drift(t), schedule.diffusion(t).square() / 2
    read = limit.read_as(predict)
    # F(x, t) = slope_x * x + slope_y * y, y what is read.
    score_x, score_y = estimate(op, read, alpha, sigma, "score").unbind(1)
    slope_x, slope_y, h = f - half_square * score_x, -half_square * score_y, t[1:] - t[:-1]
    none, half = torch.zeros_like(h), torch.full_like(h, 0.5)
    # x_m = x + h*F(x, t), x_s = (x + x_m)/2 + h/2 * F(x_m, s), which does not read F(x, t) again; and x0_hat.
    ahead = torch.stack((1 + h * slope_x[:-1], h * slope_y[:-1], none), -1)
    corrected = torch.stack((half + h / 2 * slope_x[1:], h / 2 * slope_y[1:], half), -1)
    x0_hat = torch.nn.functional.pad(estimate(op, read, alpha, sigma), (0, 1))
    y = estimate(op, predict, alpha, sigma, read)
    places, rows = list(range(N, -1, -1)), [(y[:-1], ahead)]
    at = places[:-1]
    if method == "heun":
        rows.append((y[1:], corrected))
        at += places[1:]
    if denoise:
        rows.append((y[-1:], x0_hat[-1:]))
        at += places[-1:]
    update = Update(op, *(torch.cat(part) for part in zip(*rows, strict=True)), guidance=guidance, limits=limit)
    levels._require_finite(op, update.table, at)
    return update, t.tolist(), (float(alpha[0]), float(sigma[0]))
