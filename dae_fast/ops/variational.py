"""The variational bound of a model that learns its variance, and the hybrid loss that trains it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import checks
from .._torch import DirectFunction, batchable, gradients_in_torch
from ..checks import can_read, like, samples
from ..coefficients import Formula, Level, gather, level_for, stack_rows
from ..kernels.dispatch import kernels
from ..kernels.spec import ABSENT, Kind, Reduction, ReductionName, Residual, compute_dtype, loss_of
from ..primitives import LevelOp, loss_of_rows, reduction_of
from ..routing import Route, route, wants_grad
from .losses import AnyNoise, denoising_loss
from .noising import operands
from .parameterisation import Parameterisation, check_name, conversion, mix
from .targets import shares
from .weighting import Weight, weight_for

__all__ = ["hybrid_loss", "variational_bound"]

Variance = Literal["range", "log"]
Columns = tuple[Tensor, ...]
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
    T times the mean over uniform levels bounds -log2 p(x0), but for the prior's term. x0_hat - x0 is one launch, x_t
    being no input, and on the CPU the divergence and its gradients are one each; else, and at level 0, exponentials are
    torch's. Bins are integrals of the Gaussian, whose logarithm is finite however unlikely they are.
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
    pred, x0 = pred.to(compute), x0.to(compute)
    y, eps, of_y, of_eps = operands(op, noise, x0)
    shared = of_y if y is not None else 0.0, of_eps if eps is not None else 0.0
    difference = (_made if is_dynamo_compiling() else _kept)(predict, *shared)
    away = difference.run(level, tuple(t for t in (pred, x0, y, eps) if t is not None))
    table, is_log = gather(op, _LOGARITHMS.rows(level, pred, pred.dtype, op), pred), variance == "log"
    v = v if compute_dtype(v.dtype) == compute else v.to(compute)
    in_kernel = pred.device.type == "cpu" and pred.numel() and route(op, away, v, table) is Route.DIRECT
    if in_kernel and hasattr(kernels(away, op), "bound"):
        each = _summed_in_kernel(x0, away, v, table, level, is_log)
        bits = 1 / math.log(2) if reduction == "sum" else 1 / (math.log(2) * pred[0].numel())
        if reduction == "none":
            return (each.reshape(len(pred), -1).sum(1) * bits).to(compute)
        total = each.sum() * bits
        return (total if reduction == "sum" else total / len(pred)).to(compute)
    dims = level._dims() if len(table) > 1 else 1
    shape = (*(pred.shape[:dims] if len(table) > 1 else (1,)), *[1] * (pred.dim() - dims))
    columns, v = tuple(c.reshape(shape) for c in table.unbind(1)), v.to(compute)
    nats = _nats(columns, away, v, is_log)
    at_data = _at_data(level, pred)
    if at_data is not None:
        nats = torch.where(at_data, -_log_likelihood(x0, away, _log_variance(columns, v, is_log)), nats)
    return _summed(nats, how) / math.log(2)


def _summed(nats: Tensor, how: Reduction) -> Tensor:
    op = "variational_bound"
    summed = loss_of(op, Kind.l1, how, _COLUMNS)  # none is negative but by rounding
    rows = stack_rows(op, (1.0, 0.0, 0.0), nats, nats.dtype)
    return loss_of_rows(summed, Residual(nats, None, None, None), rows, None, 1)[0]


def _log_variance(columns: Columns, v: Tensor, is_log: bool) -> Tensor:
    return v if is_log else torch.addcmul(columns[1], columns[2], v)


def _nats(columns: Columns, away: Tensor, v: Tensor, is_log: bool) -> Tensor:
    """KL(q || p) of each element."""
    small, _, _, share, _ = columns
    log_variance = _log_variance(columns, v, is_log)
    ratio = small - log_variance
    return torch.addcmul(torch.expm1(ratio) - ratio, (share * away).square(), torch.exp(-log_variance)) * 0.5


def _summed_in_kernel(x0: Tensor, away: Tensor, v: Tensor, table: Tensor, level: Level, is_log: bool) -> Tensor:
    """Nats of each row of the table, or of each sample where it has one, in fp64; those at level 0 by torch."""
    table = table if len(table) > 1 else table.expand(len(away), -1).contiguous()
    x0, away, v = (t.reshape(len(table), -1) for t in (x0, away, v))
    away = away.contiguous()
    sums = _Bound.apply(away, v, table, is_log) if wants_grad(away, v) else _bound(away, v, table, is_log)
    t = torch.as_tensor(level.t).reshape(-1)
    at_data = (t == 0).expand(len(table)).nonzero()[:, 0]
    if not len(at_data):
        return sums
    columns = tuple(c[:, None] for c in table[at_data].unbind(1))
    log_variance = _log_variance(columns, v[at_data].to(away.dtype), is_log)
    each = _summed(-_log_likelihood(x0[at_data], away[at_data], log_variance), Reduction.none)
    return sums.index_copy(0, at_data, each.double() * x0.shape[1])


def _bound(away: Tensor, v: Tensor, table: Tensor, is_log: bool) -> Tensor:
    made: Tensor = kernels(away, "variational_bound").bound(v, away, table, is_log)
    return made


class _Bound(DirectFunction):
    """Eager, on the CPU: a row's divergence in nats, in fp64."""

    @staticmethod
    def forward(ctx: Any, away: Tensor, v: Tensor, table: Tensor, is_log: bool) -> Tensor:
        ctx.save_for_backward(away, v, table)
        ctx.is_log = is_log
        return _bound(away, v, table, is_log)

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        away, v, table = ctx.saved_tensors
        op, nothing = "variational_bound", (None, None)
        if torch.is_grad_enabled() or route(op, upstream, away, v) is not Route.DIRECT:
            columns = tuple(c[:, None] for c in table.unbind(1))

            def again(away: Tensor, v: Tensor) -> Tensor:
                return _nats(columns, away, v.to(away.dtype), ctx.is_log).sum(1)

            return *gradients_in_torch(again, (away, v), ctx.needs_input_grad[:2], upstream), *nothing
        of_v, of_away = kernels(away, op).bound_grad(v, away, table, ctx.is_log, upstream)
        return of_away, of_v, *nothing


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

    Then what the posterior's mean has of x0, which is 1 at level 0; and that over the posterior's standard deviation.
    """
    alpha_s, sigma_s = (torch.cat((torch.full_like(c[:1], value), c[:-1])) for c, value in ((alpha, 1.0), (sigma, 0.0)))
    added = sigma.square() - (alpha / alpha_s * sigma_s).square()
    posterior = added * (sigma_s / sigma).square()
    small = torch.cat((posterior[1:2], posterior[1:])).log()
    large = added.log()
    share = alpha_s * added / sigma.square()
    return small, (small + large) / 2, (large - small) / 2, share, share * torch.exp(-0.5 * small)


_LOGARITHMS = Formula("variational_bound", ("small", "middle", "half width", "share", "scale"), _logarithms)


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
