"""Losses on the network's prediction, against the noise or a target p0*x0 + p1*eps, which is made inside the pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from ..checks import as_number, can_read, flag, like, per_sample, promote, samples
from ..coefficients import Formula, Level, gather, is_one, leading, level_for, stack_rows, value_at
from ..kernels.spec import (
    ABSENT,
    KINDS,
    REDUCTIONS,
    Coefficients,
    Kind,
    KindName,
    Loss,
    Reduction,
    ReductionName,
    Residual,
    compute_dtype,
    loss_of,
    rows_at,
)
from ..noise import Noise, noise_for
from ..primitives import in_rows, kind_of, loss_of_rows, mask_of, reduction_of, weighted_sum
from ..primitives.masks import Drawn, Mask, kept_elements
from ..primitives.residuals import Summed, Weighed, fast_residual_loss
from ..routing import beside
from ..schedule import Schedule
from .noising import operands
from .parameterisation import Parameterisation, check_name, error_ratio, errors, mix
from .structured import StructuredNoise
from .weighting import Weight, Weighting, by_errors, weight_for

__all__ = ["denoising_loss", "noise_mse"]

Normalise = Literal["sum", "count"]
Delta = float | Callable[[Tensor, Tensor], Any]
AnyNoise = Noise | Tensor | StructuredNoise
MINUS_TARGET = (1.0, -1.0, -1.0)  # a table's row for pred - y, pred - z and pred - noise
AGAINST_NOISE = (ABSENT, 2, ABSENT, ABSENT, ABSENT, ABSENT)  # columns of a loss in it
_NOISE_MSE = {name: loss_of("noise_mse", Kind.mse, how, AGAINST_NOISE) for name, how in REDUCTIONS.items()}


def _either(noise: Any) -> tuple[Any, Noise | None]:
    """(tensor, None) or (None, Noise), unchecked."""
    return (None, noise) if type(noise) is Noise else (noise, None)


def _is_sum(normalise: Any) -> bool:
    return type(normalise) is str and normalise == "sum"


class Compared(NamedTuple):
    """A prediction, and what its target is made of."""

    pred: Tensor
    x0: Tensor
    noise: AnyNoise | None
    level: Level | None


class Penalty(NamedTuple):
    """rho by its name, and the delta of a Huber kind, as a caller gives it."""

    kind: str = "mse"
    delta: Delta | None = None


MSE = Penalty()


class Selecting(Protocol):
    """A corruption, or what it masked or left visible: elements that are drawn, not stored."""

    def _drawn(self, op: str, x: Tensor) -> Drawn: ...


@overload
def noise_mse(
    pred: Tensor,
    noise: Noise | Tensor,
    *,
    level: Level | None = None,
    weight: Tensor | None = None,
    level_weight: Tensor | None = None,
    mask: Tensor | Selecting | None = None,
    normalise: Normalise = "sum",
    reduction: ReductionName = "mean",
    return_x0_mse: Literal[False] = False,
) -> Tensor: ...
@overload
def noise_mse(
    pred: Tensor,
    noise: Noise | Tensor,
    *,
    level: Level | None = None,
    weight: Tensor | None = None,
    level_weight: Tensor | None = None,
    mask: Tensor | Selecting | None = None,
    normalise: Normalise = "sum",
    reduction: ReductionName = "mean",
    return_x0_mse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def noise_mse(
    pred: Tensor,
    noise: Noise | Tensor,
    *,
    level: Level | None = None,
    weight: Tensor | None = None,
    level_weight: Tensor | None = None,
    mask: Tensor | Selecting | None = None,
    normalise: Normalise = "sum",
    reduction: ReductionName = "mean",
    return_x0_mse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """mean_b w_b * mse_b, mse_b = mean((pred_b - eps_b)^2): the simple loss, and its gradient in one pass.

    pred: (B, ...) fp16/bf16/fp32/fp64      noise: Noise (eps is regenerated), or a tensor like pred
    weight: (B,), or (B, F) for each frame, multiplies each one's mean before the mean over the batch
    level_weight: (T,) a weight per level, looked up at level = schedule[t]; multiplies with `weight`
    mask: bool, broadcastable to pred and of as many dimensions: the elements that count; mse_b is over those (0 if
            there are none). Or a Masking or SaltAndPepper, or its .masked or .visible, whose elements are drawn again
            and never stored. Or floating, how much each element counts: 0 times a NaN is NaN, and a sample whose
            weights add up to 0 has 0; with gradient, by a launch more
    normalise: what mse_b of a mask m is divided by: "sum", sum(m_b), the elements that count; "count", all of them
    reduction: "mean"; "sum" (sum_b w_b * sum of squares); "none" (w_b * mse_b, one value per sample)
    return_x0_mse: also return mse_b of the denoised estimate, (sigma/alpha)^2 * mse_b, from the same
            sums: (loss, (B,) without gradient); needs `level`
    returns: fp32 (fp64 for fp64) scalar, or (B,) for "none"
    Reads pred once and writes its gradient in the same pass (fp16, and "none", make it in backward,
    when the scale is known). Gradient: 2 w_b / (B N_b) * (pred - eps), and those of a tensor noise and
    weight. Raises ValueError on a shape mismatch or the mean of an empty batch.
    Ho et al. 2020, eq. 14.
    """
    op = "noise_mse"
    how = _NOISE_MSE.get(reduction) if isinstance(reduction, str) else None
    alone = level is None and level_weight is None and return_x0_mse is False and _is_sum(normalise)
    if how is not None and alone and (weight is None or type(weight) is Tensor):
        tensor, generated = _either(noise)
        chosen = None
        if mask is not None and not is_compiling():
            samples(op, "pred", pred)
            chosen = mask_of(op, pred, mask)
        done = fast_residual_loss(how, Residual(pred, None, tensor, generated, chosen), MINUS_TARGET, None, weight)
        if done is not None:
            return done[0]
    by = reduction_of(op, pred, reduction)
    z, generated = noise_for(op, noise, pred, "pred")
    pred, z = promote(pred, z)
    dims = 1
    if level is not None:
        level_for(op, level)
        dims = level._dims()
    rows = stack_rows(op, MINUS_TARGET, pred, compute_dtype(pred.dtype))
    w = loss_weight(op, pred, level, weight, level_weight)
    fixed = loss_of(op, Kind.mse, by, AGAINST_NOISE)
    chosen = mask_of(op, pred, mask)
    share = over_all(op, pred, chosen, normalise, max(dims, leading(w)))
    scaled = w if by is Reduction.sum else product(w, share)
    operands_of = Residual(pred, None, z, generated, chosen)
    loss, mse, _ = loss_of_rows(fixed, operands_of, rows, scaled, max(dims, leading(scaled)))
    if not flag(op, "return_x0_mse", return_x0_mse):
        return loss
    if level is None:
        raise ValueError(f"{op}: return_x0_mse needs level")
    mse = mse if share is None else mse * share.to(mse.dtype)
    factor = error_factor(op, "eps", "x0", level, pred, mse.dtype).reshape(-1, *mse.shape[1:])
    return loss, mse * beside(factor, mse)


@overload
def denoising_loss(
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    *,
    predict: Parameterisation = "eps",
    weight: Weight = None,
    kind: KindName = "mse",
    delta: Delta | None = None,
    mask: Tensor | Selecting | None = None,
    normalise: Normalise = "sum",
    reduction: ReductionName = "mean",
    log_variance: Tensor | None = None,
    return_per_sample: Literal[False] = False,
) -> Tensor: ...
@overload
def denoising_loss(
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    *,
    predict: Parameterisation = "eps",
    weight: Weight = None,
    kind: KindName = "mse",
    delta: Delta | None = None,
    mask: Tensor | Selecting | None = None,
    normalise: Normalise = "sum",
    reduction: ReductionName = "mean",
    log_variance: Tensor | None = None,
    return_per_sample: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def denoising_loss(
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    *,
    predict: Parameterisation = "eps",
    weight: Weight = None,
    kind: KindName = "mse",
    delta: Delta | None = None,
    mask: Tensor | Selecting | None = None,
    normalise: Normalise = "sum",
    reduction: ReductionName = "mean",
    log_variance: Tensor | None = None,
    return_per_sample: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """mean_b w_b * loss_b, loss_b = mean(rho(pred_b - target_b)), target = p0 * x0 + p1 * eps, and its gradient.

    pred: (B, ...) fp16/bf16/fp32/fp64, the network's output      x0: like pred
    noise: what x_t was made with: Noise, OffsetNoise, PyramidNoise, or a tensor like pred
    level: Level. noise, or level, may be None where nothing depends on it: a classical denoising autoencoder has
            predict="x0", noise=None, level=None
    predict: "eps", "x0", "v", "score", "flow", or EDM's F as EDM(sigma_data)
    weight: None or "uniform"; "snr", "truncated_snr", "min_snr", "soft_min_snr", "p2", "edm", "cosmap",
            "inverse_variance", "likelihood", or one of dae_fast.weighting, right for `predict` and finite at zero
            terminal SNR; a function of (alpha, sigma), float64 tensors () or (B,); a tensor (B,), or (B, F) for each
            frame. All but the tensor are constants, without gradient
    kind: rho(r): "mse" r^2; "l1" |r|; "huber" r^2/2, and delta (|r| - delta/2) beyond delta;
            "pseudo_huber" 2 delta (sqrt(r^2 + delta^2) - delta)
    delta: > 0, of the Huber kinds: a float, or a function of (alpha, sigma). The schedule of Khrapov et al. 2024 is
            lambda alpha, sigma: (1 - c) * (alpha / (alpha + sigma)) ** 2 + c, c = 0.1
    mask, normalise: the elements that count, or their weights, as in noise_mse
    reduction: "mean"; "sum" (sum_b w_b * sum of rho); "none" (w_b * loss_b, one value per sample)
    log_variance: u, (B,), a learned log-variance: w_b * loss_b * exp(-u_b) + u_b takes the place of w_b * loss_b
    return_per_sample: also return loss_b, (B,), unweighted and without gradient, from the same sums: for
            LevelStatistics
    returns: fp32 (fp64 for fp64) scalar, or (B,) for "none"
    Reads pred and x0 once (x0 not at all for eps and score) and writes the gradient of pred in the same pass, unless
    another gradient is wanted too: of x0, a tensor noise or level; fp16 and "none" make theirs in backward too.
    Neither the target nor eps is stored. Raises ValueError on a shape mismatch, the mean of an empty
    batch, or a level where target or weight is not finite; TypeError for what is no such thing.
    Ho et al. 2020; Hang et al. 2023; Khrapov et al. 2024; log_variance: Karras et al. 2024, eq. 21.
    """
    op = "denoising_loss"
    check_name(op, "predict", predict)
    if not isinstance(pred, Tensor):
        samples(op, "pred", pred)
    if level is not None and not isinstance(level, Level):
        level_for(op, level)
    weighting, w = weight_for(op, weight, level, pred, predict)
    alone = log_variance is None and return_per_sample is False and _is_sum(normalise)
    chosen = None
    if mask is not None:
        samples(op, "pred", pred)
        chosen = mask_of(op, pred, mask)
    if alone and not is_compiling():
        known = _fast_loss(op, predict, weighting, _name(kind), _name(reduction))
        done = None if known is None else _run_plain(known, Compared(pred, x0, noise, level), w, delta, chosen)
        if done is not None:
            return done[0]
    columns = LossColumns(predict, weighting)
    samples(op, "pred", pred)
    like(op, "x0", x0, "pred", pred)
    if level is not None:
        level._check(op, pred)
    how = reduction_of(op, pred, reduction)
    u = None
    share = over_all(op, pred, chosen, normalise, max(1 if level is None else level._dims(), leading(w)))
    w = w if how is Reduction.sum else product(w, share)
    if log_variance is not None:
        u = _log_variance(op, log_variance, pred)
        w = product(w, torch.exp(-u))
    compared = Compared(pred, x0, noise, level)
    loss, per_sample, _ = against_target(op, compared, columns, w, chosen, how, Penalty(kind, delta))
    if u is not None:
        u = beside(u, loss)
        if reduction == "mean":
            loss = loss + u.mean().to(loss.dtype)
        else:
            each = u.reshape(-1, *[1] * (loss.dim() - 1)) if loss.dim() else u
            loss = loss + (each if reduction == "none" else (u * kept_elements(pred, chosen)).sum()).to(loss.dtype)
    if not flag(op, "return_per_sample", return_per_sample):
        return loss
    return loss, per_sample if share is None else per_sample * share.to(per_sample.dtype)


CONSTANT = ("eps", "x0", "flow")  # targets that are the same mixture at every level


@dataclass(frozen=True)
class LossColumns:
    """The table of a denoising loss: a residual's (1, n1, n2) of pred, y and noise in pred - p0*x0 - p1*noise, then
    a weighting's column, then the mean squared errors of eps and of x0 for each unit of the prediction's.

    of_y, of_eps: the noise is of_y*y + of_eps*eps, y standing for x0 as well.
    """

    predict: Parameterisation
    weighting: Weighting | None = None
    errors: bool = False
    of_y: float = 0.0
    of_eps: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        weight = () if self.weighting is None else ("weight",)
        return "pred", "y", "noise", *weight, *(("eps error", "x0 error") if self.errors else ())

    @property
    def row(self) -> tuple[float, ...] | None:
        """The one row where all levels have the same."""
        same = self.predict in CONSTANT and self.weighting is None and not self.errors
        return _row_of(self)(1.0, 1.0) if same else None

    def loss(self, op: str, kind: Kind, reduction: Reduction) -> Loss:
        """Its columns, a kind's delta coming after the first three."""
        names = self.names if not kind.has_delta else (*self.names[:3], "delta", *self.names[3:])

        def column(name: str, wanted: bool = True) -> int:
            return names.index(name) if wanted and name in names else ABSENT

        of_x0, of_noise = self.predict not in ("eps", "score"), self.predict != "x0"
        found = (column("y", of_x0 or self.of_y != 0), column("noise", of_noise), column("delta"), column("weight"))
        return loss_of(op, kind, reduction, (*found, column("eps error"), column("x0 error")))


def _row_of(columns: LossColumns) -> Callable[[Any, Any], tuple[Any, ...]]:
    predict, of_y, of_eps = columns.predict, columns.of_y, columns.of_eps  # torch.compile takes these, not columns
    weight = None if columns.weighting is None else by_errors(columns.weighting, predict)
    further = errors(predict) if columns.errors else None

    def row(alpha: Any, sigma: Any) -> tuple[Any, ...]:
        p0, p1 = mix(predict, alpha, sigma)
        constants = [v.detach() if isinstance(v, Tensor) else v for v in (alpha, sigma)]
        made = [f(*constants) for f in (weight, further) if f is not None]
        return 1.0, -p0 - p1 * of_y, -p1 * of_eps, *(c for columns in made for c in columns)

    return row


def formula_of(columns: LossColumns) -> Formula:
    return _made_formula(columns) if is_dynamo_compiling() else _kept_formula(columns)


def _made_formula(columns: LossColumns) -> Formula:
    return Formula("denoising_loss", columns.names, _row_of(columns))


_kept_formula = lru_cache(maxsize=64)(_made_formula)


class _Plain:
    """What a plain call needs, worked out once."""

    __slots__ = ("formula", "loss", "needs_noise", "row")

    def __init__(self, op: str, columns: LossColumns, kind: Kind, reduction: Reduction) -> None:
        self.loss, self.row, self.formula = columns.loss(op, kind, reduction), columns.row, formula_of(columns)
        self.needs_noise = self.loss.columns[1] != ABSENT


@lru_cache(maxsize=128)
def _plain(op: str, columns: LossColumns, kind: str, reduction: str) -> _Plain | None:
    """None for what is not plain, or wrong: a delta has its column in a row of constants alone."""
    if kind not in KINDS or reduction not in REDUCTIONS or (KINDS[kind].has_delta and columns.row is None):
        return None
    return _Plain(op, columns, Kind[kind], REDUCTIONS[reduction])


@lru_cache(maxsize=128)
def _fast_loss(
    op: str, predict: Parameterisation, weighting: Weighting | None, kind: str, reduction: str
) -> _Plain | None:
    return _plain(op, LossColumns(predict, weighting), kind, reduction)


def _name(argument: Any) -> str:
    """Which can be looked up."""
    return argument if isinstance(argument, str) else ""


def fast_against_target(
    op: str, compared: Compared, columns: LossColumns, weight: Tensor | None, reduction: str, kind: str = "mse"
) -> Summed | None:
    """against_target of a plain call; None where that has to look."""
    if is_compiling():
        return None
    known = _plain(op, columns, _name(kind), _name(reduction))
    return None if known is None else _run_plain(known, compared, weight)


def _run_plain(
    known: _Plain, compared: Compared, weight: Tensor | None, delta: Delta | None = None, mask: Mask = None
) -> Summed | None:
    pred, x0, noise, level = compared
    generated: Noise | None = None
    z: Any = None
    if type(noise) is Noise:
        generated = noise
    elif noise is None:
        if known.needs_noise:
            return None
    elif isinstance(noise, StructuredNoise):
        return None
    else:
        z = noise
    if not isinstance(x0, Tensor):
        return None
    source: Any = known.row
    if known.loss.columns[2] != ABSENT:
        if type(delta) is not float or not 0 < delta < math.inf:
            return None
        source = *source[:3], delta, *source[3:]
    elif delta is not None:
        return None
    if source is None:
        if type(level) is not Level:
            return None
        source = level
    elif level is not None:
        level._check(known.loss.op, pred)
        if level._dims() > 1:
            return None
    return fast_residual_loss(known.loss, Residual(pred, x0, z, generated, mask), source, known.formula, weight)


def against_target(
    op: str,
    compared: Compared,
    columns: LossColumns,
    weight: Tensor | None,
    mask: Mask,
    reduction: Reduction,
    penalty: Penalty,
) -> Weighed:
    """As loss_of_rows: pred against p0*x0 + p1*noise. All but noise and the penalty is checked."""
    (pred, x0, noise, level), predict = compared, columns.predict
    y = None if predict in ("eps", "score") else x0
    z = generated = None
    if noise is not None:
        z, generated, of_z, of_eps = operands(op, noise, x0)
    elif predict != "x0":
        raise ValueError(f"{op}: noise must be given for predict={predict!r}")
    if predict == "x0":
        z = generated = None
    pred, y, z = promote(pred, y, z)
    if z is not None and generated is not None:  # structured noise
        if y is None:
            y, z = z, None
            columns = replace(columns, of_y=of_z, of_eps=of_eps)
        else:
            z = weighted_sum((of_z, z), (of_eps, generated))
            generated = None
    elif generated is not None and of_eps != 1:
        columns = replace(columns, of_eps=of_eps)
    known, delta_at = _penalty(op, pred, level, penalty)
    rows = _rows(op, pred, level, columns, delta_at)
    own = 1 if level is None else level._dims()
    dims = max(own, leading(weight))
    if dims > own:
        rows = _for_each(rows, math.prod(pred.shape[own:dims]))
    fixed = columns.loss(op, known, reduction)
    return loss_of_rows(fixed, Residual(pred, y, z, generated, mask), rows, weight, dims)


def _rows(
    op: str, pred: Tensor, level: Level | None, columns: LossColumns, delta: float | Tensor | None
) -> Coefficients:
    """What a residual reads, with delta as its fourth column where it is given."""
    compute, row = compute_dtype(pred.dtype), columns.row
    if row is not None:
        if not isinstance(delta, Tensor):
            return stack_rows(op, row if delta is None else (*row, delta), pred, compute)
        rows = stack_rows(op, row, pred, compute)
    elif level is None:
        raise ValueError(f"{op}: level must be given for predict={columns.predict!r}")
    else:
        rows = formula_of(columns).rows(level, pred, compute, op)
    if delta is None:
        return rows
    # Not in the schedule's table, which would be another for every delta of a loop that changes it.
    table = gather(op, rows, pred)
    column = (
        delta.to(compute) if isinstance(delta, Tensor) else torch.full((), delta, dtype=compute, device=pred.device)
    )
    column = column.reshape(-1, 1)
    (B,) = torch.broadcast_shapes(table.shape[:1], column.shape[:1])
    table = table.expand(B, -1)
    return Coefficients(torch.cat((table[:, :3], column.expand(B, -1), table[:, 3:]), 1), None)


def _for_each(rows: Coefficients, times: int) -> Coefficients:
    """The coefficients of each row, for `times` rows: a weight of each frame at a level of the whole sample."""
    if rows.t is not None:
        return Coefficients(rows.table, rows.t.repeat_interleave(times))
    table = rows.tensor
    return rows if table is None or table.shape[0] == 1 else Coefficients(table.repeat_interleave(times, 0), None)


def _penalty(op: str, pred: Tensor, level: Level | None, penalty: Penalty) -> tuple[Kind, float | Tensor | None]:
    """rho, and its delta: a float, or of the levels."""
    kind, delta = penalty
    known = kind_of(op, kind, delta)
    if delta is None:
        return known, None
    if callable(delta):
        if level is None:
            raise ValueError(f"{op}: level must be given, of which this delta is a function")
        value = value_at(op, "delta", delta, level, pred)
        if can_read(value) and not (value > 0).all():
            raise ValueError(f"{op}: delta must be positive, got {float(value.min())} from the function")
        return known, value
    return known, as_number(op, "delta", delta)


def _log_variance(op: str, u: Tensor, pred: Tensor) -> Tensor:
    """(B,) float64: x0 may be wider than pred."""
    if not isinstance(u, Tensor):
        raise TypeError(f"{op}: log_variance must be a tensor (B,), got {type(u).__name__}")
    u = per_sample(op, "log_variance", u, pred)
    if u.dim() > 1:
        raise ValueError(f"{op}: log_variance must have shape ({pred.shape[0]},), got {tuple(u.shape)}")
    return u.double().expand(pred.shape[0])


def loss_weight(
    op: str, pred: Tensor, level: Level | None, weight: Tensor | None, level_weight: Tensor | None
) -> Tensor | None:
    """Of each sample or row: the product of what is given."""
    if weight is not None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{op}: weight must be a tensor (B,), got {type(weight).__name__}")
        weight = per_sample(op, "weight", weight, pred)
        weight = weight.expand(pred.shape[:1]) if is_one(weight) else weight
    if level_weight is None:
        return weight
    t = None if level is None else level.t
    if t is None or level is None or level._schedule is None:
        raise ValueError(f"{op}: level_weight is looked up by level and needs level=schedule[t]")
    check_level_weight(op, level._schedule, level_weight)
    level._check(op, pred)
    flat = t if isinstance(t, int) else t.reshape(-1)
    looked_up = gather(op, rows_at(level_weight[:, None], flat), pred)[:, 0]
    shape = pred.shape[: level._dims()]
    looked_up = looked_up.expand(shape) if looked_up.shape[0] == 1 else looked_up.reshape(shape)
    return product(weight, looked_up)


def product(weight: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Of weights of each sample and of each of its rows, (B,) and (B, F); None is 1."""
    if weight is None or other is None:
        return other if weight is None else weight
    dims = max(weight.dim(), other.dim())
    weight, other = (w.reshape(*w.shape, *[1] * (dims - w.dim())) for w in (weight, other))
    return weight * other


def over_all(op: str, pred: Tensor, mask: Mask, normalise: str, dims: int) -> Tensor | None:
    """The factor with which the mean of a sample or row over the mask becomes that over all its elements; None is 1."""
    if not isinstance(normalise, str) or normalise not in ("sum", "count"):
        raise ValueError(f"{op}: normalise must be 'sum' or 'count', got {normalise!r}")
    if normalise == "sum" or mask is None:
        return None
    rows = in_rows(pred, dims)
    kept = kept_elements(rows, in_rows(mask.on(pred) if isinstance(mask, Drawn) else mask, dims))
    assert isinstance(kept, Tensor)
    return (kept / (rows.numel() // max(rows.shape[0], 1) or 1)).reshape(pred.shape[:dims])


def check_level_weight(op: str, schedule: Schedule, level_weight: Tensor) -> None:
    """One weight for each level."""
    if not isinstance(level_weight, Tensor) or level_weight.shape != (len(schedule),):
        got = tuple(level_weight.shape) if isinstance(level_weight, Tensor) else type(level_weight).__name__
        raise ValueError(f"{op}: level_weight must be a tensor of shape ({len(schedule)},), got {got}")


def error_factor(op: str, predict: str, to: str, level: Level, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) or (1,): squared error of `to` for each unit of that of the prediction."""
    rows = _ERRORS[predict, to].rows(level, x, dtype, op)
    return gather(op, rows, x)[:, 0]


_ERRORS = {("eps", "x0"): Formula("noise_mse", ("x0 error",), error_ratio("eps", "x0"))}
