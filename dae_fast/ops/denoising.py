"""The denoising loss: a prediction against its target p0*x0 + p1*eps, which is made inside the pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends.reference import compute_dtype
from ..checks import flag
from ..level import Level, as_number, can_read, check_per_sample
from ..noise import Noise
from ..rows import Coefficients, Rows, stack_rows
from .affine import ABSENT, affine
from .checks import level_for, like, promote, samples
from .levels import look_up, rows_for, value_at
from .loss import Selecting, check, loss_mask
from .masks import Mask, kept_elements
from .noising import operands
from .parameterisation import Parameterisation, check_name, errors, mix
from .residual import (
    KINDS,
    UNWEIGHED,
    Looked,
    Plan,
    Reduction,
    Weighing,
    penalty_columns,
    plain_residual_loss,
    residual_loss,
)
from .structured import StructuredNoise
from .weighting import NAMES, Weight, Weighting, by_errors, weight_for

Kind = Literal["mse", "l1", "huber", "pseudo_huber"]
Delta = float | Callable[[Tensor, Tensor], Any]
AnyNoise = Noise | Tensor | StructuredNoise


@overload
def denoising_loss(
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    *,
    predict: Parameterisation = "eps",
    weight: Weight = None,
    kind: Kind = "mse",
    delta: Delta | None = None,
    mask: Tensor | Selecting | None = None,
    reduction: Reduction = "mean",
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
    kind: Kind = "mse",
    delta: Delta | None = None,
    mask: Tensor | Selecting | None = None,
    reduction: Reduction = "mean",
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
    kind: Kind = "mse",
    delta: Delta | None = None,
    mask: Tensor | Selecting | None = None,
    reduction: Reduction = "mean",
    log_variance: Tensor | None = None,
    return_per_sample: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """mean_b w_b * loss_b, loss_b = mean(rho(pred_b - target_b)), target = p0 * x0 + p1 * eps, and its gradient.

    pred: (B, ...) fp16/bf16/fp32/fp64, the network's output      x0: like pred
    noise: what x_t was made with: Noise, OffsetNoise, PyramidNoise, or a tensor like pred
    level: Level. noise, or level, may be None where nothing depends on it: a classical denoising autoencoder has
            predict="x0", noise=None, level=None
    predict: "eps", "x0", "v", "score", "flow", or EDM's F as EDM(sigma_data)
    weight: None or "uniform"; "snr", "truncated_snr", "min_snr", "soft_min_snr", "p2", "edm", "likelihood", or one of
            dae_fast.weighting, right for `predict` and finite at zero terminal SNR; a function of (alpha, sigma),
            float64 tensors () or (B,); a tensor (B,). All but the tensor are constants, without gradient
    kind: rho(r): "mse" r^2; "l1" |r|; "huber" r^2/2, and delta (|r| - delta/2) beyond delta;
            "pseudo_huber" 2 delta (sqrt(r^2 + delta^2) - delta)
    delta: > 0, of the Huber kinds: a float, or a function of (alpha, sigma). The schedule of Khrapov et al. 2024 is
            lambda alpha, sigma: (1 - c) * (alpha / (alpha + sigma)) ** 2 + c, c = 0.1
    mask: the elements that count, as in noise_mse
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
    if (
        mask is None
        and log_variance is None
        and delta is None
        and return_per_sample is False
        and (weight is None or (isinstance(weight, str) and weight in _NAMED))
        and not is_compiling()
    ):
        done = plain_against_target(op, pred, x0, noise, level, _plan(predict, _NAMED[weight]), reduction, kind)
        if done is not None:
            return done[0]
    samples(op, "pred", pred)
    like(op, "x0", x0, "pred", pred)
    if level is not None:
        level_for(op, level)
        level._check(op, pred)
    check(op, pred, reduction)
    weighting, w = weight_for(op, weight, level, pred, predict)
    chosen, u = loss_mask(op, pred, mask), None
    if log_variance is not None:
        u = _log_variance(op, log_variance, pred)
        w = torch.exp(-u) if w is None else w * torch.exp(-u)
    columns = LossColumns(predict, weighting)
    loss, per_sample, _ = against_target(op, pred, x0, noise, level, columns, w, chosen, reduction, kind, delta)
    if u is not None:
        if reduction == "mean":
            loss = loss + u.mean().to(loss.dtype)
        else:
            loss = loss + (u if reduction == "none" else (u * kept_elements(pred, chosen)).sum()).to(loss.dtype)
    return (loss, per_sample) if flag(op, "return_per_sample", return_per_sample) else loss


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
    def coefficients(self) -> Coefficients:
        predict, of_y, of_eps = self.predict, self.of_y, self.of_eps  # torch.compile takes these, and not self
        weight = None if self.weighting is None else by_errors(self.weighting, predict)
        further = errors(predict) if self.errors else None

        def row(alpha: Any, sigma: Any) -> tuple[Any, ...]:
            p0, p1 = mix(predict, alpha, sigma)
            constants = [v.detach() if isinstance(v, Tensor) else v for v in (alpha, sigma)]
            made = [f(*constants) for f in (weight, further) if f is not None]
            return 1.0, -p0 - p1 * of_y, -p1 * of_eps, *(c for columns in made for c in columns)

        return row

    @property
    def key(self) -> tuple[Any, ...]:
        """As rows_for takes it."""
        shares = () if (self.of_y, self.of_eps) == (0.0, 1.0) else (self.of_y, self.of_eps)
        weight = () if self.weighting is None else ("weighted by", self.weighting)
        return "loss of", self.predict, *shares, *weight, *(("with errors",) if self.errors else ())

    @property
    def name(self) -> str:
        """The table's, as a schedule keeps it."""
        return " ".join(map(str, self.key))

    @property
    def row(self) -> tuple[float, ...] | None:
        """The one row where all levels have the same."""
        same = self.predict in CONSTANT and self.weighting is None and not self.errors
        return self.coefficients(1.0, 1.0) if same else None

    def weighing(self, kind: int) -> Weighing:
        """Where the columns lie, a kind's delta coming in between."""
        last = 2 if penalty_columns(kind)[2] == ABSENT else 3
        factor = ABSENT if self.weighting is None else (last := last + 1)
        return Weighing(factor, (last + 1, last + 2) if self.errors else UNWEIGHED.also)

    @property
    def plan(self) -> Plan:
        """Of a plain call, which has no delta."""
        of_x0, of_noise = ABSENT if self.predict in ("eps", "score") else 1, ABSENT if self.predict == "x0" else 2
        factor, also = self.weighing(0)
        return Plan(self.row, self.name, (of_x0, of_noise, ABSENT, factor, *also))


@lru_cache(maxsize=64)
def _plan(predict: Parameterisation, weighting: Weighting | None) -> Plan:
    return LossColumns(predict, weighting).plan


# Weights that a plain call may have; the others of weighting.NAMES are no columns.
_NAMED: dict[str | None, Weighting | None] = {
    None: None,
    "uniform": None,
    **{name: w for name, w in NAMES.items() if isinstance(w, Weighting)},
}


def plain_against_target(
    op: str,
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    plan: Plan,
    reduction: Reduction,
    kind: Kind = "mse",
) -> Looked | None:
    """against_target of a plain call; None where that has to look."""
    if (
        not isinstance(kind, str)
        or kind not in ("mse", "l1")
        or not isinstance(pred, Tensor)
        or not isinstance(x0, Tensor)
    ):
        return None
    if noise is None and plan.columns[1] != ABSENT:
        return None
    if plan.row is None:
        if type(level) is not Level:
            return None
    elif level is not None:
        level_for(op, level)
        level._check(op, pred)
    return plain_residual_loss(op, pred, x0, noise, reduction, plan, level, KINDS.index(kind))


def against_target(
    op: str,
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    columns: LossColumns,
    weight: Tensor | None,
    mask: Mask,
    reduction: Reduction,
    kind: Kind = "mse",
    delta: Delta | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As residual_loss: pred against p0*x0 + p1*noise. All but noise, kind and delta is checked."""
    predict = columns.predict
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
            shares = stack_rows(op, (of_z, of_eps), z, compute_dtype(z.dtype))
            (z,) = affine(op, z, None, None, generated, shares, (0, ABSENT, 1, ABSENT))
            generated = None
    elif generated is not None and of_eps != 1:
        columns = replace(columns, of_eps=of_eps)
    number, delta_at = _penalty(op, pred, level, kind, delta)
    rows = _rows(op, pred, level, columns, delta_at)
    return residual_loss(op, pred, y, z, generated, rows, weight, mask, reduction, number, columns.weighing(number))


def _rows(op: str, pred: Tensor, level: Level | None, columns: LossColumns, delta: float | Tensor | None) -> Rows:
    """What a residual reads, with delta as its fourth column where it is given."""
    compute, row = compute_dtype(pred.dtype), columns.row
    if row is not None:
        if not isinstance(delta, Tensor):
            return stack_rows(op, row if delta is None else (*row, delta), pred, compute)
        rows = stack_rows(op, row, pred, compute)
    elif level is None:
        raise ValueError(f"{op}: level must be given for predict={columns.predict!r}")
    else:
        rows = rows_for(op, level, columns.key, columns.coefficients, pred, compute)
    if delta is None:
        return rows
    # Not in the schedule's table, which would be another for every delta of a loop that changes it.
    table = look_up(op, rows, pred)
    column = (
        delta.to(compute) if isinstance(delta, Tensor) else torch.full((), delta, dtype=compute, device=pred.device)
    )
    column = column.reshape(-1, 1)
    B = max(len(table), len(column))
    table = table.expand(B, -1)
    return Rows(torch.cat((table[:, :3], column.expand(B, -1), table[:, 3:]), 1), None)


def _penalty(
    op: str, pred: Tensor, level: Level | None, kind: Kind, delta: Delta | None
) -> tuple[int, float | Tensor | None]:
    """rho's place in KINDS, and its delta: a float, or of the levels."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    number = KINDS.index(kind)
    if (penalty_columns(number)[2] == ABSENT) != (delta is None):
        wanted = "must be given" if delta is None else "must be None"
        raise ValueError(f"{op}: delta {wanted} for kind={kind!r}")
    if delta is None:
        return number, None
    if callable(delta):
        if level is None:
            raise ValueError(f"{op}: level must be given, of which this delta is a function")
        value = value_at(op, "delta", delta, level, pred)
        if can_read(value) and not (value > 0).all():
            raise ValueError(f"{op}: delta must be positive, got {float(value.min())} from the function")
        return number, value
    delta = as_number(op, "delta", delta)
    if not 0 < delta < math.inf:
        raise ValueError(f"{op}: delta must be positive and finite, got {delta}")
    return number, delta


def _log_variance(op: str, u: Tensor, pred: Tensor) -> Tensor:
    """(B,) float64: x0 may be wider than pred."""
    if not isinstance(u, Tensor):
        raise TypeError(f"{op}: log_variance must be a tensor (B,), got {type(u).__name__}")
    check_per_sample(op, "log_variance", u, pred)
    return u.double().expand(pred.shape[0])
