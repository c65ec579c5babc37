"""Every sampler beside its loop as a user writes it in plain torch: eager, with tables ready in the samples' dtype.

A loop written by hand is made in two parts: a function of the schedule makes the tables, worked out in float64, and
returns the loop. Levels go down from T - 1 to 0, and the data comes after 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

import dae_fast as df
from dae_fast import samplers

from .cases import column

START_TAG = 0x7374617274  # the key of a sampler's first draw

Network = Callable[..., Tensor]  # net(x, t), or score(x)
Normal = Callable[[Tensor, int], Tensor]  # noise like x; the int is the key that the sampler folds in
Run = Callable[[Network, Tensor, Normal], Tensor]

TEN = df.Schedule.linear(10, 0.005, 0.4)
FLOW = df.Schedule.flow(10)
EXPLODING = df.Schedule.geometric(10, 0.01, 1.0)
VP = df.ContinuousSchedule.vp()
STEPS = 10
STEP_SIZE = 0.01
SNR = 0.16


def fresh(x: Tensor, key: int) -> Tensor:
    return torch.randn_like(x)


def langevin(step_size: float, steps: int) -> Run:
    """Welling and Teh 2011."""

    def run(score: Network, x: Tensor, normal: Normal) -> Tensor:
        for k in range(steps):
            x = x + step_size * score(x) + (2 * step_size) ** 0.5 * normal(x, k)
        return x

    return run


def sgld(step_size: float, steps: int, temperature: float) -> Run:
    """Welling and Teh 2011."""

    def run(score: Network, x: Tensor, normal: Normal) -> Tensor:
        for k in range(steps):
            x = x + step_size * score(x) + (2 * step_size * temperature) ** 0.5 * normal(x, k)
        return x

    return run


def underdamped(step_size: float, steps: int, friction: float) -> Run:
    """BAOAB (Leimkuhler and Matthews 2013)."""
    h, c = step_size, math.exp(-friction * step_size)

    def run(score: Network, x: Tensor, normal: Normal) -> Tensor:
        v, force = normal(x, START_TAG), score(x)
        for k in range(steps):
            v = v + h / 2 * force
            x = x + h / 2 * v
            v = c * v + (1 - c * c) ** 0.5 * normal(x, k)
            x = x + h / 2 * v
            force = score(x)
            v = v + h / 2 * force
        return x

    return run


def annealed_langevin(schedule: df.Schedule, step_size: float, steps_per_level: int, dtype: torch.dtype) -> Run:
    """Song and Ermon 2019, algorithm 1, and Tweedie's step."""
    h = step_size / 2 * (schedule.sigma / schedule.sigma[0]) ** 2
    sizes, spreads, last = (c.to(dtype) for c in (h, (2 * h).sqrt(), schedule.sigma[0] ** 2))

    def run(score: Network, x: Tensor, normal: Normal) -> Tensor:
        for t in reversed(range(len(sizes))):
            for k in range(steps_per_level):
                x = x + sizes[t] * score(x, _at(t, x)) + spreads[t] * normal(x, t * steps_per_level + k)
        return x + last * score(x, _at(0, x))

    return run


def ddpm(schedule: df.Schedule, dtype: torch.dtype) -> Run:
    """Ho et al. 2020, algorithm 2."""
    _, sigma_s = _next(schedule)
    beta = schedule.betas
    share, kept, std = (
        c.to(dtype) for c in (beta / schedule.sigma, (1 - beta).sqrt(), beta.sqrt() * sigma_s / schedule.sigma)
    )

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        for t in reversed(range(len(std))):
            x = (x - share[t] * net(x, _at(t, x))) / kept[t]
            if t:
                x = x + std[t] * normal(x, t)
        return x

    return run


def ddpm_learned(schedule: df.Schedule, dtype: torch.dtype) -> Run:
    """Nichol and Dhariwal 2021, eq. 15, of a network with twice the channels."""
    _, sigma_s = _next(schedule)
    beta = schedule.betas
    share, kept, small, large = (
        c.to(dtype)
        for c in (
            beta / schedule.sigma,
            (1 - beta).sqrt(),
            (beta * sigma_s**2 / schedule.sigma**2).log(),
            beta.log(),
        )
    )

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        for t in reversed(range(len(kept))):
            eps, v = net(x, _at(t, x)).chunk(2, 1)
            x = (x - share[t] * eps) / kept[t]
            if t:
                fraction = (v + 1) / 2
                log_variance = fraction * large[t] + (1 - fraction) * small[t]
                x = x + (0.5 * log_variance).exp() * normal(x, t)
        return x

    return run


def ddim(schedule: df.Schedule, levels: Sequence[int], dtype: torch.dtype) -> Run:
    """Song, Meng and Ermon 2021, eq. 12, without noise."""
    alphas, sigmas = schedule.alpha.to(dtype), schedule.sigma.to(dtype)

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        for t, s in pairwise((*levels, None)):
            eps = net(x, _at(t, x))
            x0 = (x - sigmas[t] * eps) / alphas[t]
            x = x0 if s is None else alphas[s] * x0 + sigmas[s] * eps
        return x

    return run


def euler(schedule: df.Schedule, dtype: torch.dtype) -> Run:
    """Song, Meng and Ermon 2021, eq. 13: in x/alpha a step is eps times the change of sigma/alpha."""
    ratio, ratio_s = _ratios(schedule)
    alphas, moves = schedule.alpha.to(dtype), (ratio_s - ratio).to(dtype)

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        x = x / alphas[-1]
        for t in reversed(range(len(alphas))):
            x = x + moves[t] * net(x * alphas[t], _at(t, x))
        return x

    return run


def euler_ancestral(schedule: df.Schedule, dtype: torch.dtype) -> Run:
    """k-diffusion's sample_euler_ancestral (Crowson 2022), in x/alpha."""
    ratio, ratio_s = _ratios(schedule)
    up = (ratio_s**2 * (ratio**2 - ratio_s**2) / ratio**2).sqrt()
    moves, ups = ((ratio_s**2 - up**2).sqrt() - ratio).to(dtype), up.to(dtype)
    alphas = schedule.alpha.to(dtype)

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        x = x / alphas[-1]
        for t in reversed(range(len(alphas))):
            x = x + moves[t] * net(x * alphas[t], _at(t, x))
            if t:
                x = x + ups[t] * normal(x, t)
        return x

    return run


def heun(schedule: df.Schedule, dtype: torch.dtype) -> Run:
    """Karras et al. 2022, algorithm 1, in x/alpha."""
    ratio, ratio_s = _ratios(schedule)
    alphas, moves, halves = (c.to(dtype) for c in (schedule.alpha, ratio_s - ratio, (ratio_s - ratio) / 2))

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        x = x / alphas[-1]
        for t in reversed(range(len(alphas))):
            eps = net(x * alphas[t], _at(t, x))
            ahead = x + moves[t] * eps
            x = x + halves[t] * (eps + net(ahead * alphas[t - 1], _at(t - 1, x))) if t else ahead
        return x

    return run


def dpm_solver_pp_2m(schedule: df.Schedule, dtype: torch.dtype, *, sde: bool = False) -> Run:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, or for the SDE its appendix B."""
    alpha_s, sigma_s = _next(schedule)
    h = (alpha_s / sigma_s).log() - (schedule.alpha / schedule.sigma).log()
    share = torch.exp(-2 * h) if sde else torch.exp(-h)
    shrunk = sigma_s / schedule.sigma * (torch.exp(-h) if sde else 1)
    gain, spread = alpha_s * (1 - share), sigma_s * (1 - torch.exp(-2 * h)).sqrt()
    slope = h[:-1] / (2 * h[1:])  # 1/2r
    alphas, sigmas, shrinks, gains, slopes, spreads = (
        c.to(dtype) for c in (schedule.alpha, schedule.sigma, shrunk, gain, slope, spread)
    )

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        before = None
        for t in reversed(range(len(alphas))):
            x0 = (x - sigmas[t] * net(x, _at(t, x))) / alphas[t]
            if t == 0:
                return x0
            D = x0 if before is None else x0 + slopes[t] * (x0 - before)
            x = shrinks[t] * x + gains[t] * D
            if sde:
                x = x + spreads[t] * normal(x, t)
            before = x0
        return x

    return run


def probability_flow(schedule: df.ContinuousSchedule, steps: int, dtype: torch.dtype) -> Run:
    """Song et al. 2021, eq. 13, with Heun's method, and Tweedie's estimate at the end."""
    grid = schedule.discretise(steps + 1)
    times = grid.times.flip(0)
    told, h = times.tolist(), times.diff()
    moves, halves, drifts, pulls = (
        c.to(dtype) for c in (h, h / 2, schedule.drift(times), schedule.diffusion(times) ** 2 / 2)
    )
    alpha, variance = grid.alpha[0].to(dtype), (grid.sigma[0] ** 2).to(dtype)

    def run(score: Network, x: Tensor, normal: Normal) -> Tensor:
        def slope(x: Tensor, i: int) -> Tensor:
            return drifts[i] * x - pulls[i] * score(x, _at(told[i], x))

        for i in range(steps):
            first = slope(x, i)
            x = x + halves[i] * (first + slope(x + moves[i] * first, i + 1))
        return (x + variance * score(x, _at(told[-1], x))) / alpha

    return run


def flow_euler(schedule: df.Schedule, dtype: torch.dtype) -> Run:
    """Liu et al. 2022."""
    _, sigma_s = _next(schedule)
    moves = (sigma_s - schedule.sigma).to(dtype)

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        for t in reversed(range(len(moves))):
            x = x + moves[t] * net(x, _at(t, x))
        return x

    return run


def flow_midpoint(schedule: df.Schedule, dtype: torch.dtype) -> Run:
    """Lipman et al. 2023, section 6: every second level is the middle of a step."""
    _, sigma_s = _next(schedule)
    halves, wholes = (c.to(dtype) for c in (sigma_s - schedule.sigma, 2 * (sigma_s - schedule.sigma)))

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        for t in reversed(range(1, len(halves), 2)):
            middle = x + halves[t] * net(x, _at(t, x))
            x = x + wholes[t] * net(middle, _at(t - 1, x))
        return x

    return run


def predictor_corrector(schedule: df.Schedule, snr: float, dtype: torch.dtype) -> Run:
    """Song et al. 2021, algorithms 2 to 5: reverse diffusion, and one Langevin step with norms of each sample."""
    alpha_s, sigma_s = _next(schedule)
    f = schedule.alpha / alpha_s
    v = schedule.sigma**2 - (f * sigma_s) ** 2
    alphas, sigmas, sizes, kept, shares, stds = (
        c.to(dtype) for c in (schedule.alpha, schedule.sigma, f * snr, 2 - f, v / schedule.sigma, v.sqrt())
    )
    T = len(schedule)

    def norm(x: Tensor) -> Tensor:
        return column(x.flatten(1).norm(dim=1), x)

    def run(net: Network, x: Tensor, normal: Normal) -> Tensor:
        for t in reversed(range(T)):
            if t < T - 1:
                score = -net(x, _at(t, x)) / sigmas[t]
                z = normal(x, T + 1 + t)
                h = 2 * (sizes[t] * norm(z) / norm(score)) ** 2
                x = x + h * score + (2 * h).sqrt() * z
            eps = net(x, _at(t, x))
            if t == 0:
                return (x - sigmas[t] * eps) / alphas[t]
            x = kept[t] * x - shares[t] * eps + stds[t] * normal(x, t)
        return x

    return run


def _at(t: float, x: Tensor) -> Tensor:
    """What the network is told: a level, or a time."""
    return torch.full(x.shape[:1], t, dtype=torch.int64 if isinstance(t, int) else x.dtype)


def _next(schedule: df.Schedule) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the level after each, which is one below."""
    one = schedule.alpha.new_ones(1)
    return torch.cat((one, schedule.alpha[:-1])), torch.cat((0 * one, schedule.sigma[:-1]))


def _ratios(schedule: df.Schedule) -> tuple[Tensor, Tensor]:
    """sigma/alpha of each level, and of the one after it."""
    ratio = schedule.sigma / schedule.alpha
    return ratio, torch.cat((ratio.new_zeros(1), ratio[:-1]))


# Networks that cost one pass: what is left is the loop.


def half(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


def half_twice(x: Tensor, t: Tensor) -> Tensor:
    """eps and the v of a learned variance, as the channels of one tensor."""
    return 0.5 * torch.cat((x, x), 1)


def score(x: Tensor, t: Tensor | None = None) -> Tensor:
    return -x


@dataclass(frozen=True)
class Loop:
    """A sampler, and the same written by hand."""

    name: str
    ours: Callable[[Network, Tensor, df.Noise], Tensor]
    by_hand: Callable[[torch.dtype], Run]
    net: Network = half


def _learned(net: Network, x: Tensor, noise: df.Noise) -> Tensor:
    return samplers.ddpm(lambda x, t: net(x, t).chunk(2, 1), x, TEN, noise, variance="learned")


def _over(schedule: df.Schedule, sampler: Callable[..., Tensor]) -> Callable[[Network, Tensor, df.Noise], Tensor]:
    return lambda net, x, noise: sampler(net, x, schedule, noise, steps=len(schedule))


LOOPS = (
    Loop(
        "langevin",
        lambda net, x, noise: samplers.langevin(net, x, STEP_SIZE, STEPS, noise),
        lambda dtype: langevin(STEP_SIZE, STEPS),
        score,
    ),
    Loop(
        "sgld",
        lambda net, x, noise: samplers.sgld(net, x, STEP_SIZE, STEPS, noise, temperature=0.5),
        lambda dtype: sgld(STEP_SIZE, STEPS, 0.5),
        score,
    ),
    Loop(
        "underdamped",
        lambda net, x, noise: samplers.underdamped(net, x, 0.1, STEPS, noise, friction=2.0)[0],
        lambda dtype: underdamped(0.1, STEPS, 2.0),
        score,
    ),
    Loop(
        "annealed_langevin",
        lambda net, x, noise: samplers.annealed_langevin(net, x, EXPLODING, noise, steps_per_level=2),
        lambda dtype: annealed_langevin(EXPLODING, 2e-5, 2, dtype),
        score,
    ),
    Loop("ddpm", lambda net, x, noise: samplers.ddpm(net, x, TEN, noise), partial(ddpm, TEN)),
    Loop("ddpm-learned", _learned, partial(ddpm_learned, TEN), half_twice),
    Loop("ddim", _over(TEN, samplers.ddim), partial(ddim, TEN, range(len(TEN) - 1, -1, -1))),
    Loop("euler", _over(TEN, samplers.euler), partial(euler, TEN)),
    Loop("euler_ancestral", _over(TEN, samplers.euler_ancestral), partial(euler_ancestral, TEN)),
    Loop("heun", _over(TEN, samplers.heun), partial(heun, TEN)),
    Loop("dpm_solver_pp_2m", _over(TEN, samplers.dpm_solver_pp_2m), partial(dpm_solver_pp_2m, TEN)),
    Loop("dpm_solver_pp_2m_sde", _over(TEN, samplers.dpm_solver_pp_2m_sde), partial(dpm_solver_pp_2m, TEN, sde=True)),
    Loop(
        "probability_flow",
        lambda net, x, noise: samplers.probability_flow(net, x, VP, noise, steps=STEPS),
        partial(probability_flow, VP, STEPS),
        score,
    ),
    Loop("flow_euler", _over(FLOW, samplers.flow_euler), partial(flow_euler, FLOW)),
    Loop(
        "flow_midpoint",
        lambda net, x, noise: samplers.flow_midpoint(net, x, FLOW, noise, steps=len(FLOW) // 2),
        partial(flow_midpoint, FLOW),
    ),
    Loop("predictor_corrector", _over(TEN, samplers.predictor_corrector), partial(predictor_corrector, TEN, SNR)),
)
