"""Ancestral and implicit sampling: DDPM and DDIM."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.reference import compute_dtype
from ..graphs import replayed, start_device
from ..noise import Noise
from ..ops.affine import ABSENT, affine
from ..ops.conversions import Bounds, bounds
from ..ops.parameterisation import check_name, conversion
from ..rows import Rows
from ..schedule import Schedule
from .common import Network, at, check_start, progressed, start


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
    graph: bool = False,
) -> Tensor:
    """Ancestral sampling, one step per level.

    net(x_t, t): the network, like x_t, at levels t (B,) int64
    x: x_T (B, ...) fp16/bf16/fp32/fp64, or a shape: then noise.fold_in(T).normal(shape), fp32 on the CPU
       (with graph on the current CUDA device; times sigma_T when the schedule is not variance preserving)
    noise: Noise; the step from level t uses noise.fold_in(t)
    predict: what net predicts, "eps", "x0", "v", "score" or "flow"
    clamp: c or (low, high), the limits of the x0 estimate in every step
    variance: of the step, "small" (the posterior's) or "large" (that of q(x_t | x_{t-1}), beta_t)
    progress: show a bar      graph: replay the loop as a CUDA graph      returns: like x_T
    Raises ValueError for a shape mismatch or a level from which `predict` gives no step: eps where
    alpha = 0 (predict v there). Ho et al. 2020, algorithm 2.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"ddpm: variance must be 'small' or 'large', got {variance!r}")
    levels = list(reversed(range(len(schedule))))
    table = _reverse_table("ddpm", schedule, levels, predict, 1.0, variance == "large")
    return _reverse("ddpm", net, x, schedule, noise, levels, table, clamp, progress, graph)


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
    graph: bool = False,
) -> Tensor:
    """Denoising diffusion implicit sampling over `steps` evenly spaced levels, the noisiest first.

    steps: in [1, T]      eta: in [0, 1], 0 is deterministic, 1 is ancestral
    Other arguments, the result and the errors as in ddpm. Song, Meng and Ermon 2021, eq. 12.
    """
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"ddim: steps must be in [1, {len(schedule)}], got {steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be in [0, 1], got {eta}")
    levels = torch.linspace(len(schedule) - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    table = _reverse_table("ddim", schedule, levels, predict, eta, False)
    return _reverse("ddim", net, x, schedule, noise, levels, table, clamp, progress, graph)


def _reverse(
    op: str,
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule,
    noise: Noise,
    levels: list[int],
    table: Tensor,
    clamp: Bounds | None,
    progress: bool,
    graph: bool,
) -> Tensor:
    """x_s = c_x * x_t + c_m * x0_hat + c_z * z down the levels: one fused launch each."""
    limits = (-math.inf, math.inf) if clamp is None else bounds(op, clamp)
    if not isinstance(x, Tensor):
        x = start(op, x, schedule, noise, start_device(op) if graph else torch.device("cpu"))
    check_start(op, x, noise)
    noisy = (table[:, 2] > 0).tolist()
    table = table.to(compute_dtype(x.dtype))

    def descend(x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for i, t in enumerate(progressed(levels, progress, op)):
            pred = at(op, "the network's output", net, x, t)
            fresh, columns = (noise.fold_in(t), (0, 1, 2, ABSENT)) if noisy[i] else (None, (0, 1, ABSENT, ABSENT))
            (x,) = affine(op, x, pred, None, fresh, Rows(table[i : i + 1], None), columns, (3, 4, ABSENT, *limits))
        return x

    if graph:
        return replayed(op, net, descend, x, noise, progress, table=table, options=(*levels, *limits))
    return descend(x, noise, table.to(x.device))


def _reverse_table(op: str, schedule: Schedule, levels: list[int], predict: str, eta: float, large: bool) -> Tensor:
    """(steps, 5) float64: c_x, c_m, c_z and the two coefficients of the x0 estimate, for each step t to s.

    q(x_t | x_s) has variance v = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2 and the posterior's is
    v sigma_s^2/sigma_t^2 (Kingma et al. 2021). The step keeps the direction x_t - alpha_t x0_hat as far
    as x_s must have variance sigma_s^2. The last s is the data: alpha_s = 1, sigma_s = 0.
    """
    check_name(op, "predict", predict)
    alpha_t, sigma_t = schedule.alpha[levels], schedule.sigma[levels]
    alpha_s = torch.cat((alpha_t[1:], alpha_t.new_ones(1)))
    sigma_s = torch.cat((sigma_t[1:], sigma_t.new_zeros(1)))
    v = (sigma_t.square() - (alpha_t / alpha_s * sigma_s).square()).clamp(min=0)
    ratio = torch.where(sigma_s > 0, sigma_s / sigma_t, 0.0)
    posterior = v.sqrt() * ratio
    keep = (sigma_s.square() - (eta * posterior).square()).clamp(min=0).sqrt()
    c_x = torch.where(sigma_s > 0, keep / sigma_t, 0.0)
    c_z = torch.where(sigma_s > 0, v.sqrt() if large else eta * posterior, 0.0)
    zero, one = torch.zeros_like(alpha_t), torch.ones_like(alpha_t)
    estimate = (zero, one) if predict == "x0" else conversion(predict, "x0")(alpha_t, sigma_t)
    table = torch.stack((c_x, alpha_s - c_x * alpha_t, c_z, *estimate), -1)
    schedule._require_finite(op, table, levels)
    return table
