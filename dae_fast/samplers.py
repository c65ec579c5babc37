"""Samplers: each one flat loop around the fused step. One Noise makes the whole run reproducible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .backends.reference import compute_dtype
from .noise import Noise
from .ops.affine import ABSENT, affine
from .ops.checks import samples
from .ops.conversions import Bounds, bounds
from .ops.langevin import langevin_step
from .ops.parameterisation import check_name, conversion
from .schedule import Rows, Schedule

Network = Callable[[Tensor, Tensor], Tensor]
Step = TypeVar("Step")


@torch.no_grad()
def langevin(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    step_size: float | Tensor,
    steps: int,
    noise: Noise,
    *,
    noise_scale: float = 1.0,
    progress: bool = False,
) -> Tensor:
    """`steps` unadjusted Langevin updates of all rows of x: x + h*score(x) + noise_scale*sqrt(2h)*eps.

    x: (B, ...) the chains' starts, left as they are      returns: like x
    Step k uses noise.fold_in(k). Welling and Teh 2011.
    """
    samples("langevin", "x", x)
    x = x.clone()
    for k in _steps(range(steps), progress, "Langevin"):
        langevin_step(x, score(x), step_size, noise.fold_in(k), noise_scale, out=x)
    return x


@torch.no_grad()
def annealed_langevin(
    score: Network,
    x: Tensor,
    schedule: Schedule,
    noise: Noise,
    *,
    step_size: float = 2e-5,
    steps_per_level: int = 100,
    denoise: bool = True,
    progress: bool = False,
) -> Tensor:
    """NCSN sampling: Langevin at each level from the noisiest down, h_t = step_size/2 * (sigma_t/sigma_0)^2.

    score(x, t): the score at levels t (B,)      x: (B, ...) the starts, left as they are
    step_size: the paper's epsilon      denoise: end with Tweedie's step x + sigma_0^2 * score
    Song and Ermon 2019, algorithm 1; the last step is Jolicoeur-Martineau et al. 2021.
    """
    op = "annealed_langevin"
    samples(op, "x", x)
    if not (schedule.sigma[0] > 0 and bool((schedule.alpha == 1).all())):
        raise ValueError(
            f"{op}: schedule must be variance exploding with sigma > 0 (Schedule.geometric), got {schedule}"
        )
    x = x.clone()
    sigma = schedule.sigma.tolist()
    plan = [(t, k) for t in reversed(range(len(schedule))) for k in range(steps_per_level)]
    for t, k in _steps(plan, progress, "annealed Langevin"):
        h = 0.5 * step_size * (sigma[t] / sigma[0]) ** 2
        levels = torch.full(x.shape[:1], t, device=x.device)
        langevin_step(x, score(x, levels), h, noise.fold_in(t * steps_per_level + k), out=x)
    if denoise:
        x = x + sigma[0] ** 2 * score(x, torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device))
    return x


@torch.no_grad()
def ddpm(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule,
    noise: Noise,
    *,
    predict: str = "eps",
    clamp: Bounds | None = None,
    variance: str = "small",
    progress: bool = False,
) -> Tensor:
    """Ancestral sampling, one step per level.

    net(x_t, t): the network, t (B,) int64      x: x_T (B, ...), or a shape, then x_T is noise
    predict: what net predicts      clamp: limits of the x0 estimate in every step
    variance: "small" (the posterior's) or "large" (that of q(x_t | x_{t-1}))
    Ho et al. 2020, algorithm 2.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"ddpm: variance must be 'small' or 'large', got {variance!r}")
    levels = list(reversed(range(len(schedule))))
    return _reverse("ddpm", net, x, schedule, noise, levels, 1.0, variance == "large", predict, clamp, progress)


@torch.no_grad()
def ddim(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule,
    noise: Noise,
    *,
    steps: int = 50,
    eta: float = 0.0,
    predict: str = "eps",
    clamp: Bounds | None = None,
    progress: bool = False,
) -> Tensor:
    """Denoising diffusion implicit sampling over `steps` evenly spaced levels, the noisiest first.

    eta: 0 is deterministic, 1 is ancestral      other arguments as in ddpm
    Song, Meng and Ermon 2021, eq. 12.
    """
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"ddim: steps must be in [1, {len(schedule)}], got {steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be in [0, 1], got {eta}")
    levels = torch.linspace(len(schedule) - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    return _reverse("ddim", net, x, schedule, noise, levels, eta, False, predict, clamp, progress)


def _reverse(
    op: str,
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule,
    noise: Noise,
    levels: list[int],
    eta: float,
    large: bool,
    predict: str,
    clamp: Bounds | None,
    progress: bool,
) -> Tensor:
    """x_s = c_x * x_t + c_m * x0_hat + c_z * z down the levels: one fused step each."""
    check_name(op, "predict", predict)
    limits = (-math.inf, math.inf) if clamp is None else bounds(op, clamp)
    if not isinstance(x, Tensor):
        x = noise.fold_in(len(schedule)).normal(x)
    samples(op, "x", x)
    table = _reverse_table(op, schedule, levels, eta, large, predict).to(x.device, compute_dtype(x.dtype))
    for i, t in enumerate(_steps(levels, progress, op)):
        pred = net(x, torch.full(x.shape[:1], t, device=x.device))
        last = i + 1 == len(levels)
        fresh = None if last or eta == 0 else noise.fold_in(t)
        columns = (0, 1, 2) if fresh is not None else (0, 1, ABSENT)
        (x,) = affine(op, x, pred, None, fresh, Rows(table[i : i + 1], None), columns, (3, 4, *limits))
    return x


def _reverse_table(op: str, schedule: Schedule, levels: list[int], eta: float, large: bool, predict: str) -> Tensor:
    """(steps, 5): c_x, c_m, c_z and the x0 estimate's two coefficients, all in float64.

    From t to s, with alpha_ts = alpha_t/alpha_s: q(x_t | x_s) has variance
    v = sigma_t^2 - alpha_ts^2 sigma_s^2, and the posterior's is v sigma_s^2/sigma_t^2 (Kingma et al. 2021).
    """
    table = torch.empty(len(levels), 5, dtype=torch.float64)
    for i, t in enumerate(levels):
        alpha_t, sigma_t = float(schedule.alpha[t]), float(schedule.sigma[t])
        last = i + 1 == len(levels)
        alpha_s, sigma_s = (
            (1.0, 0.0) if last else (float(schedule.alpha[levels[i + 1]]), float(schedule.sigma[levels[i + 1]]))
        )
        if sigma_t == 0 or (predict == "eps" and alpha_t == 0):
            raise ValueError(
                f"{op}: predict={predict!r} gives no step from level {t} (alpha = {alpha_t}, sigma = {sigma_t})"
            )
        v = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        small = math.sqrt(max(v, 0.0)) * sigma_s / sigma_t
        std = eta * small
        direction = math.sqrt(max(sigma_s**2 - std**2, 0.0)) / sigma_t  # of x_t - alpha_t x0_hat
        shown = math.sqrt(max(v, 0.0)) if large and not last else std
        a0, a1 = (0.0, 1.0) if predict == "x0" else conversion(predict, "x0")(alpha_t, sigma_t)
        table[i] = torch.tensor([direction, alpha_s - direction * alpha_t, shown, a0, a1], dtype=torch.float64)
    return table


def _steps(plan: Sequence[Step], progress: bool, what: str) -> Iterable[Step]:
    if not progress:
        return plan
    from rich.progress import track

    return track(plan, description=what)
