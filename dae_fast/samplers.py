"""Samplers: each one flat loop around the fused step. One Noise makes the whole run reproducible.

They run without gradients, leave a start given as a tensor as it is, and keep its dtype: what the
network returns is cast to it. Row b of the result depends on the noise's id of sample b alone, so a
batch sampled in parts (Noise(seed, first_sample=...)) is the batch sampled at once.

graph=True runs the whole loop as one CUDA graph, with the same result and no work of the host between
the steps. The first call of a kind (network, shape, dtype, schedule, options) runs the network once more
and captures; later calls, with whatever x and noise, replay. The capture lives as long as the network
object: keep one, as a lambda written in the call is a new network each time. The network must not wait
for the device (.item(), copies from or to the host); parameters updated in place, or replaced, are seen,
but what it does in Python besides is done at capture alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .backends.reference import compute_dtype
from .graphs import replayed, start_device
from .noise import Noise
from .ops.affine import ABSENT, affine, affine_into
from .ops.checks import like, noise_for, samples
from .ops.conversions import Bounds, bounds
from .ops.langevin import _coefficients, langevin_step
from .ops.parameterisation import check_name, conversion
from .rows import Rows, stack_rows
from .schedule import Schedule

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
    noise_scale: float | Tensor = 1.0,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """`steps` unadjusted Langevin updates of all rows of x: x + h*score(x) + noise_scale*sqrt(2h)*eps.

    score(x): grad log p, like x      x: (B, ...) fp16/bf16/fp32/fp64, the chains' starts
    step_size: h >= 0, a float or a tensor () or (B,)      noise_scale: the same; 0 is gradient ascent
    noise: Noise; step k uses noise.fold_in(k)      progress: show a bar      returns: like x
    graph: replay the loop as a CUDA graph; x must be on a CUDA device
    With a unit Gaussian the chain settles at variance 1/(1 - h/2): the bias of the discrete step.
    Raises ValueError on a negative step size or a score of another shape. Welling and Teh 2011.
    """
    op = "langevin"
    _check_start(op, x, noise)
    if steps < 0:
        raise ValueError(f"{op}: steps must not be negative, got {steps}")

    def chain(x: Tensor, noise: Noise, step_size: float | Tensor, noise_scale: float | Tensor) -> Tensor:
        for k in _steps(range(steps), progress, op):
            langevin_step(x, _output(op, "the score", score(x), x), step_size, noise.fold_in(k), noise_scale, out=x)
        return x

    if not graph:
        return chain(x.clone(), noise, step_size, noise_scale)

    def coefficients() -> Rows | None:
        """Of numbers they lie in a cache, which may drop them."""
        if isinstance(step_size, Tensor) or isinstance(noise_scale, Tensor):
            return None
        return stack_rows(op, _coefficients(float(step_size), float(noise_scale)), x, compute_dtype(x.dtype))

    given = step_size, noise_scale
    return replayed(op, score, chain, x, noise, progress, arguments=given, options=steps, keep=coefficients)


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
    graph: bool = False,
) -> Tensor:
    """NCSN sampling: Langevin at each level from the noisiest down, h_t = step_size/2 * (sigma_t/sigma_0)^2.

    score(x, t): the score at levels t (B,) int64, like x      x: (B, ...) the starts
    schedule: variance exploding, Schedule.geometric      step_size: the paper's epsilon
    noise: Noise; step k of level t uses noise.fold_in(t*steps_per_level + k)
    denoise: end with Tweedie's step x + sigma_0^2 * score      progress: show a bar
    graph: replay the loop as a CUDA graph; x must be on a CUDA device
    returns: like x. Raises ValueError for a schedule with alpha != 1 or sigma = 0, or a negative step size.
    Song and Ermon 2019, algorithm 1; the last step is Jolicoeur-Martineau et al. 2021.
    """
    op = "annealed_langevin"
    _check_start(op, x, noise)
    if not (bool((schedule.alpha == 1).all()) and bool((schedule.sigma > 0).all())):
        raise ValueError(
            f"{op}: schedule must be variance exploding with sigma > 0 (Schedule.geometric), got {schedule}"
        )
    if steps_per_level < 1:
        raise ValueError(f"{op}: steps_per_level must be positive, got {steps_per_level}")
    if not 0 <= step_size < math.inf:
        raise ValueError(f"{op}: step_size must be finite and not negative, got {step_size}")
    h = 0.5 * step_size * (schedule.sigma / schedule.sigma[0]).square()
    # One row for each level, and the last for Tweedie's step.
    table = torch.stack((torch.ones_like(h), h, (2 * h).sqrt()), -1)
    table = torch.cat((table, table.new_tensor([[1.0, float(schedule.sigma[0].square()), 0.0]])))
    table = table.to(compute_dtype(x.dtype))
    plan = [(t, k) for t in reversed(range(len(schedule))) for k in range(steps_per_level)]

    def descend(x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for t, k in _steps(plan, progress, op):
            pred, fresh = _at(op, "the score", score, x, t), noise.fold_in(t * steps_per_level + k)
            affine_into(op, x, x, pred, None, fresh, Rows(table[t : t + 1], None), (0, 1, 2, ABSENT))
        if denoise:
            pred = _at(op, "the score", score, x, 0)
            affine_into(op, x, x, pred, None, None, Rows(table[-1:], None), (0, 1, ABSENT, ABSENT))
        return x

    if graph:
        return replayed(op, score, descend, x, noise, progress, table=table, options=(steps_per_level, denoise))
    return descend(x.clone(), noise, table.to(x.device))


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
        x = _start(op, x, schedule, noise, start_device(op) if graph else torch.device("cpu"))
    _check_start(op, x, noise)
    noisy = (table[:, 2] > 0).tolist()
    table = table.to(compute_dtype(x.dtype))

    def descend(x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for i, t in enumerate(_steps(levels, progress, op)):
            pred = _at(op, "the network's output", net, x, t)
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


def _start(op: str, shape: Sequence[int], schedule: Schedule, noise: Noise, device: torch.device) -> Tensor:
    """x_T of `shape`: pure noise, of the last level's size where the schedule adds it to the data."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{op}: x must be a tensor or a shape (B, ...), got {type(shape).__name__}")
    if not isinstance(noise, Noise):
        raise TypeError(f"{op}: noise must be a Noise, got {type(noise).__name__}")
    z = noise.fold_in(len(schedule)).normal(shape, device=device)
    return z if schedule.variance_preserving else z * float(schedule.sigma[-1])


def _check_start(op: str, x: Tensor, noise: Noise) -> None:
    samples(op, "x", x)
    if isinstance(noise, Tensor):
        raise TypeError(f"{op}: noise must be a Noise, of which every step takes its own, got a tensor")
    noise_for(op, noise, x, "x")


def _at(op: str, name: str, net: Network, x: Tensor, t: int) -> Tensor:
    """The network at level t for all samples."""
    return _output(op, name, net(x, torch.full(x.shape[:1], t, device=x.device)), x)


def _output(op: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    like(op, name, value, "x", x)
    return value.to(x.dtype)


def _steps(plan: Sequence[Step], progress: bool, what: str) -> Iterable[Step]:
    if not progress:
        return plan
    from rich.progress import track

    return track(plan, description=what)
