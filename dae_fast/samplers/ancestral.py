"""Ancestral and implicit sampling: DDPM, DDIM and the Euler ancestral step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..continuous import ContinuousSchedule
from ..noise import Noise
from ..ops.conversions import Bounds
from ..ops.parameterisation import Parameterisation
from ..ops.reparameterisation import reparameterise
from ..schedule import Schedule
from .common import (
    ONE_OF_LEVELS,
    Limits,
    Look,
    Network,
    Update,
    begin,
    conditions,
    descend,
    grid,
    guided,
    limits,
    mixed,
    planned,
    progressed,
    raw_plan,
    reverse_plan,
    run,
    sampler,
    stepped,
)
from .tables import reverse_table


@sampler(variance=checks.one_of("small", "large", "learned"), schedule=ONE_OF_LEVELS)
def ddpm(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule,
    noise: Noise,
    *,
    predict: Parameterisation = "eps",
    conditioning: str | None = None,
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    variance: str = "small",
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """Ancestral sampling, one step per level.

    net(x_t, t): the network, like x_t, at levels t (B,), as `conditioning` says
    x: x_T (B, ...) fp16/bf16/fp32/fp64, or a shape: then noise.fold_in(START_TAG).normal(shape), fp32 on the CPU
       (with graph on the current CUDA device; times sigma_T when the schedule is not variance preserving), which is
       warned of where the first level is not nearly pure noise
    noise: Noise; the step from level t uses noise.fold_in(t)
    predict: what net predicts, "eps", "x0", "v", "score", "flow" or an EDM
    conditioning: what net is told of a level: "level", t int64; "time", that of ContinuousSchedule.discretise; or
        "sigma", where alpha = 1 (Schedule.karras); both fp32 (fp64 for fp64). None: the time where there is one
    clamp: c or (low, high), the limits of the x0 estimate in every step
    threshold: dynamic thresholding instead, the quantile (0.995) of a sample's |x0 estimate| that becomes 1
        where it is more (Saharia et al. 2022, section 2.3)
    guidance: g, for a net that returns (conditional, unconditional): the prediction is u + g*(c - u), g = 1
        being the conditional one (Ho and Salimans 2022)
    net_arguments: {name: value}, class labels say, which net is handed by name at every look; with graph bind them to
        the network instead (functools.partial), and keep that
    variance: of the step, "small" (the posterior's), "large" (that of q(x_t | x_{t-1}), beta_t), or "learned":
        net returns one more tensor, v in [-1, 1], which interpolates between their logarithms element by
        element (Nichol and Dhariwal 2021, eq. 15); the noise is added by a launch of its own, and never stored
    progress: show a bar      graph: replay the loop as a CUDA graph      returns: like x_T
    Raises ValueError for a shape mismatch or a level from which `predict` gives no step: eps where
    alpha = 0 (predict v there). Ho et al. 2020, algorithm 2.
    """
    op = "ddpm"
    levels = list(reversed(range(len(schedule))))
    told = conditions(op, schedule, levels, conditioning)
    limit = limits(op, clamp, threshold)
    if variance != "learned":
        large = variance == "large"
        update = reverse_plan(op, schedule, tuple(levels), predict, 1.0, 1.0, large, guidance, limit)
        x = begin(op, x, schedule, noise, levels, graph)
        return descend(op, net, x, noise, levels, update, progress, graph, told)
    update, table, noisy = _learned(op, schedule, tuple(levels), predict, guidance, limit)
    parts = (*(update.parts or ("prediction",)), "v")

    def loop(look: Look, x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for i, t in enumerate(progressed(levels, progress, op)):
            *prediction, v = look(x, told[i], parts)
            (x,) = update(table, i, x, tuple(prediction))
            if noisy[i]:
                # The affine map has one factor a sample; here each element has its own.
                log_var = torch.addcmul(table[i, -2], table[i, -1], v)
                x, _ = reparameterise(x, log_var, noise.fold_in(t))
        return x

    x = begin(op, x, schedule, noise, levels, graph)
    return run(op, net, loop, x, noise, table, ("learned", *levels, *told, update.options), progress, graph)


@sampler()
def ddim(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule | ContinuousSchedule,
    noise: Noise,
    *,
    steps: int = 50,
    levels: Sequence[int] | None = None,
    eta: float = 0.0,
    predict: Parameterisation = "eps",
    conditioning: str | None = None,
    clamp: Bounds | None = None,
    threshold: float | None = None,
    use_clipped_model_output: bool = False,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """Denoising diffusion implicit sampling over `steps` evenly spaced levels, the noisiest first.

    steps: in [1, T]      levels: instead of steps, one's own, decreasing; a start of a shape is of the first
    eta: in [0, 1], 0 is deterministic, 1 is ancestral
    clamp, threshold: of the x0 estimate alone, and the step goes on along the eps that net predicts, as diffusers'
        clip_sample has it. use_clipped_model_output, diffusers' name: along the eps of the limited x0 instead, as
        in Dhariwal and Nichol's code and k-diffusion, and in all other samplers here
    Other arguments, the result and the errors as in ddpm. Song, Meng and Ermon 2021, eq. 12.
    """
    op = "ddim"
    schedule = stepped(op, schedule, steps, levels)
    if not 0 <= eta <= 1:
        raise ValueError(f"{op}: eta must be in [0, 1], got {eta}")
    chosen = grid(op, schedule, steps, levels)
    limit = limits(op, clamp, threshold)
    told = conditions(op, schedule, chosen, conditioning)
    if limit == Limits() or use_clipped_model_output:
        update = reverse_plan(op, schedule, tuple(chosen), predict, eta, 1.0, False, guidance, limit)
        x = begin(op, x, schedule, noise, chosen, graph)
        return descend(op, net, x, noise, chosen, update, progress, graph, told)
    update, table = raw_plan(op, schedule, tuple(chosen), predict, eta, guidance, limit)
    # The launch reads the prediction twice, limited and as it is, and so has no room for a second one.
    parts = guided(op, guidance)

    def loop(look: Look, x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for i, t in enumerate(progressed(chosen, progress, op)):
            pred = mixed(op, table[i : i + 1, -2:], look(x, told[i], parts))
            fresh = noise.fold_in(t) if update.reads_z[i] else None
            (x,) = update(table, i, x, (pred,), noise=fresh, w=pred)
        return x

    x = begin(op, x, schedule, noise, chosen, graph)
    return run(op, net, loop, x, noise, table, ("raw", *chosen, *told, parts, update.options), progress, graph)


@sampler()
def euler_ancestral(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule | ContinuousSchedule,
    noise: Noise,
    *,
    steps: int = 50,
    levels: Sequence[int] | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    predict: Parameterisation = "eps",
    conditioning: str | None = None,
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """Euler ancestral sampling: an Euler step in (x/alpha, sigma/alpha) to sigma_down, then noise of sigma_up.

    sigma_up = min(sigma_s, eta * sigma_s * sqrt(1 - sigma_s^2/sigma_t^2)), sigma_down^2 = sigma_s^2 - sigma_up^2,
    all over alpha; the step is ddim's, whose eta ends at 1.
    eta: >= 0      noise_scale: >= 0, k-diffusion's s_noise, a factor of the noise added
    Other arguments, the result and the errors as in ddim and ddpm. k-diffusion's sample_euler_ancestral (Crowson 2022).
    """
    op = "euler_ancestral"
    schedule = stepped(op, schedule, steps, levels)
    for name, value in (("eta", eta), ("noise_scale", noise_scale)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{op}: {name} must be finite and not negative, got {value}")
    chosen = grid(op, schedule, steps, levels)
    told = conditions(op, schedule, chosen, conditioning)
    limit = limits(op, clamp, threshold)
    update = reverse_plan(op, schedule, tuple(chosen), predict, eta, noise_scale, False, guidance, limit)
    return descend(op, net, begin(op, x, schedule, noise, chosen, graph), noise, chosen, update, progress, graph, told)


@planned
def _learned(
    op: str,
    schedule: Schedule,
    levels: tuple[int, ...],
    predict: Parameterisation,
    guidance: float | None,
    limit: Limits,
) -> tuple[Update, Tensor, list[bool]]:
    """The means; their table, with middle and half width of ln var at its end; which steps add noise."""
    small, large = (reverse_table(op, schedule, list(levels), predict, 1.0, wide) for wide in (False, True))
    std_small, std_large = small[:, 2:3], large[:, 2:3]
    update = Update(op, small[:, 3:], small[:, :2], guidance=guidance, limits=limit)
    # ln var = (1 + v) ln std_large + (1 - v) ln std_small = middle + half_width * v
    table = torch.cat((update.table, (std_large * std_small).log(), (std_large / std_small).log()), 1)
    return update, table, (std_small > 0).flatten().tolist()
