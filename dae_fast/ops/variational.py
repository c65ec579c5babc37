"""The variational bound of a model that learns its variance, and the hybrid loss that trains it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import checks
from ..checks import can_read, like, samples
from ..coefficients import Formula, Level, gather, level_for, stack_rows
from ..kernels.spec import ABSENT, Kind, ReductionName, Residual, compute_dtype, loss_of
from ..primitives import LevelOp, loss_of_rows, reduction_of
from .losses import AnyNoise, denoising_loss
from .noising import operands
from .parameterisation import Parameterisation, check_name, conversion, mix
from .targets import shares
from .weighting import Weight, weight_for

__all__ = ["hybrid_loss", "variational_bound"]

Variance = Literal["range", "log"]
HALF_BIN = 1 / 255  # of data in [-1, 1] that have 256 values
_COLUMNS = (ABSENT,) * 6
EDGE = 0.999  # beyond it is the outermost bin, which has no far side


def variational_bound(
    pred: Tensor,
    v: Tensor,
    x0: Tensor,
    noise: AnyNoise,
    level: Level,
    *,
    predict: Parameterisation = "eps",
    variance: Variance = "range",
    reduction: ReductionName = "mean",
) -> Tensor:
    """mean_b L_b / (N ln 2), L = KL(q(x_s|x_t, x0) || p(x_s|x_t)), and -log p(x0|x_0) at level 0: bits an element.

    pred: (B, ...) fp16/bf16/fp32/fp64, the network's output      x0: like pred, 256 values in [-1, 1] for level 0
    v: like pred, the network's second output: "range", in [-1, 1] from the logarithm of the posterior's variance to
            that of beta_t, as samplers.ddpm(variance="learned") has it; "log", the log-variance itself
    noise: what x_t was made with: Noise, OffsetNoise, PyramidNoise, or a tensor like pred
    level: schedule[t], s being t - 1      predict: as in denoising_loss
    reduction: "mean"; "sum" (over all elements); "none" (of each sample)
    returns: fp32 (fp64 for fp64) scalar, or (B,)
    T times the mean over uniform levels bounds -log2 p(x0), but for the prior's term. x0_hat - x0 is
    one launch, x_t being no input; exponentials are torch's, the sum and its gradient a launch. Bins are integrals of
    the Gaussian, whose logarithm is finite however unlikely they are.
    Gradient: of pred and v, and all else that is a tensor. Raises ValueError on a shape mismatch, a level that is not a
    Schedule's, or one where pred does not determine x0. Ho et al. 2020, eq. 5 and 13; Nichol and Dhariwal 2021, eq. 4
    and 15.
    """
    op = "variational_bound"
    check_name(op, "predict", predict)
    checks.one_of("range", "log")(op, "variance", variance)
    how = reduction_of(op, pred, reduction)
    like(op, "v", v, "pred", pred)
    like(op, "x0", x0, "pred", pred)
    level_for(op, level)
    if level.t is None:
        raise ValueError(f"{op}: is of a step between levels and needs level=schedule[t]")
    compute = torch.promote_types(compute_dtype(torch.promote_types(pred.dtype, x0.dtype)), compute_dtype(v.dtype))
    pred, v, x0 = (t.to(compute) for t in (pred, v, x0))
    y, eps, of_y, of_eps = operands(op, noise, x0)
    shared = of_y if y is not None else 0.0, of_eps if eps is not None else 0.0
    difference = (_made if is_dynamo_compiling() else _kept)(predict, *shared)
    away = difference.run(level, tuple(t for t in (pred, x0, y, eps) if t is not None))
    small, middle, half_width, share = _columns(op, level, pred)
    log_variance = v if variance == "log" else torch.addcmul(middle, half_width, v)
    ratio = small - log_variance
    nats = torch.addcmul(torch.expm1(ratio) - ratio, (share * away).square(), torch.exp(-log_variance)) * 0.5
    at_data = _at_data(level, pred)
    if at_data is not None:
        nats = torch.where(at_data, -_log_likelihood(x0, away, log_variance), nats)
    summed = loss_of(op, Kind.l1, how, _COLUMNS)  # none is negative but by rounding
    rows = stack_rows(op, (1.0, 0.0, 0.0), nats, nats.dtype)
    return loss_of_rows(summed, Residual(nats, None, None, None), rows, None, 1)[0] / math.log(2)


def hybrid_loss(
    pred: Tensor,
    v: Tensor,
    x0: Tensor,
    noise: AnyNoise,
    level: Level,
    *,
    predict: Parameterisation = "eps",
    weight: Weight = None,
    variance: Variance = "range",
    bound_weight: float = 0.001,
) -> Tensor:
    """denoising_loss(pred, ...) + bound_weight * T * variational_bound(pred, v, ...), the bound of a detached pred.

    pred, v, x0, noise, level, predict, variance: as in variational_bound      weight: as in denoising_loss
    bound_weight: lambda      returns: fp32 (fp64 for fp64) scalar
    So the means learn of the simple loss alone, and the variances of the bound. Raises as the two do.
    Nichol and Dhariwal 2021, eq. 16, in the units of their code: bits an element.
    """
    op = "hybrid_loss"
    bound_weight = checks.number(op, "bound_weight", bound_weight, "finite and not negative")
    samples(op, "pred", pred)
    like(op, "x0", x0, "pred", pred)
    like(op, "v", v, "pred", pred)
    level_for(op, level)
    if level.t is None or level._schedule is None:
        raise ValueError(f"{op}: is of a step between levels and needs level=schedule[t]")
    check_name(op, "predict", predict)
    weighting, of_sample = weight_for(op, weight, level, pred, predict)
    simple = denoising_loss(
        pred, x0, noise, level, predict=predict, weight=of_sample if weighting is None else weighting
    )
    bound = variational_bound(pred.detach(), v, x0, noise, level, predict=predict, variance=variance)
    return simple + bound_weight * len(level._schedule) * bound


def _made(predict: Parameterisation, of_y: float, of_eps: float) -> LevelOp[Tensor]:
    """x0_hat - x0."""
    alone = isinstance(predict, str) and predict in ("eps", "score")

    def coefficients(alpha: Any, sigma: Any) -> dict[str, Any]:
        scale = conversion(predict, "x0")(alpha, sigma)[1]
        p0, p1 = mix(predict, alpha, sigma)
        of_noise = {name: -scale * p1 * factor for name, factor in shares(of_y, of_eps).items()}
        return {"pred": scale, "x0": None if alone else -scale * p0, **of_noise}

    return LevelOp("variational_bound", coefficients)


_kept = lru_cache(maxsize=64)(_made)


def _logarithms(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
    """Of the posterior's variance, level 0 having that of level 1; the middle and half width from there to beta_t's.

    Then what the posterior's mean has of x0, which is 1 at level 0.
    """
    alpha_s, sigma_s = (torch.cat((torch.full_like(c[:1], value), c[:-1])) for c, value in ((alpha, 1.0), (sigma, 0.0)))
    added = sigma.square() - (alpha / alpha_s * sigma_s).square()
    posterior = added * (sigma_s / sigma).square()
    small = torch.cat((posterior[1:2], posterior[1:])).log()
    large = added.log()
    return small, (small + large) / 2, (large - small) / 2, alpha_s * added / sigma.square()


_LOGARITHMS = Formula("variational_bound", ("small", "middle", "half width", "share"), _logarithms)


def _columns(op: str, level: Level, pred: Tensor) -> tuple[Tensor, ...]:
    """Of each sample or row, shaped to multiply pred."""
    table = gather(op, _LOGARITHMS.rows(level, pred, pred.dtype, op), pred)
    dims = level._dims() if len(table) > 1 else 1
    shape = (*(pred.shape[:dims] if len(table) > 1 else (1,)), *[1] * (pred.dim() - dims))
    return tuple(c.reshape(shape) for c in table.unbind(1))


def _at_data(level: Level, pred: Tensor) -> Tensor | None:
    """Whether it is the first level, shaped to select in pred; None where it is known to be nowhere."""
    t = level.t
    first = torch.full((), t == 0, device=pred.device) if isinstance(t, int) else torch.as_tensor(t) == 0
    if t != 0 if isinstance(t, int) else can_read(first) and not first.any():
        return None
    return first.reshape(*first.shape, *[1] * (pred.dim() - first.dim()))


def _log_likelihood(x0: Tensor, away: Tensor, log_variance: Tensor) -> Tensor:
    """log of what N(x0 + away, exp(log_variance)) gives the bin of x0; of a tail the left one is taken."""
    scale = torch.exp(-0.5 * log_variance)
    upper, lower = scale * (HALF_BIN - away), scale * (-HALF_BIN - away)
    size = away.abs()
    above, below = torch.special.log_ndtr(scale * (HALF_BIN - size)), torch.special.log_ndtr(scale * (-HALF_BIN - size))
    inside = above + torch.log(-torch.expm1(below - above))
    at_edge = torch.special.log_ndtr(torch.where(x0 < 0, upper, -lower))
    return torch.where(x0.abs() > EDGE, at_edge, inside)
