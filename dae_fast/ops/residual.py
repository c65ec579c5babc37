"""The weighted residual, reduced: rho(r), r = pred - target, target an affine map of y and noise (or z).

The loss and its gradient come from one pass over pred; neither the noise nor the target is stored.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..backends import kernels, reference
from ..backends.reference import row_of
from ..level import Level
from ..noise import Noise
from ..rows import Rows, constant_rows, rows_at
from .affine import ABSENT, Gradients, affine, row_dots
from .flat import flatten, seen
from .levels import look_up
from .masks import Drawn, FlatMask, Mask, kept_elements, tensors_of
from .routing import DirectFunction, Route, batchable, is_one, plain_loss, route, wants_grad

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("none", "mean", "sum")  # a reduction's place here is its number in the native core
_REDUCED = {"mean": 1, "sum": 2}
MINUS_TARGET = (1.0, -1.0, -1.0)  # a table's row for pred - y, pred - z and pred - noise
COLUMNS = (0, 1, 2, ABSENT)  # a table holds (1, n1, n2): r = 1*pred + n1*y + n2*z; then rho's delta where it has one
KINDS = reference.KINDS


class Weighing(NamedTuple):
    """Columns of a residual's table that are read when a loss is summed."""

    factor: int = ABSENT  # multiplies each sample's weight
    also: tuple[int, int] = (ABSENT, ABSENT)  # multiply the samples' means, in two further means over the batch


UNWEIGHED = Weighing()


def penalty_columns(kind: int) -> tuple[int, int, int]:
    """Of n1, n2 and delta."""
    return 1, 2, 3 if KINDS[kind] in ("huber", "pseudo_huber") else ABSENT


Looked = tuple[Tensor, Tensor | None]  # the loss, and `also`


class Plan(NamedTuple):
    """Of plain calls: a table, and its columns as the kernels take them, worked out once.

    row: the table's one row; None: the table is what the level's schedule has under `name`
    columns: ABSENT for y or the target: it is looked at, and not read
    """

    row: tuple[float, ...] | None = MINUS_TARGET
    name: str | None = None
    columns: tuple[int, ...] = (1, 2, ABSENT, ABSENT, ABSENT, ABSENT)


AGAINST_NOISE = Plan()


def plain_residual_loss(
    op: str,
    pred: Tensor,
    y: Tensor | None,
    target: Any,
    reduction: str,
    plan: Plan = AGAINST_NOISE,
    level: Level | None = None,
    kind: int = 0,
) -> Looked | None:
    """The loss of a plain call, without weight, mask or delta; None where residual_loss has to look."""
    number = _REDUCED.get(reduction) if isinstance(reduction, str) else None
    if number is None or not isinstance(pred, Tensor):
        return None
    row, name, columns = plan
    z, noise = (None, target) if type(target) is Noise else (target, None)
    source: Any = level
    if row is not None:
        source, _ = constant_rows(op, row, reference.compute_dtype(pred.dtype))
    made = plain_loss(pred, y, z, noise, columns, kind, number, None if row else name, source)
    if made is None:
        return None
    loss, grad, also, table, t = made
    if grad is None:
        return loss, also
    rows = rows_at(table, t)
    if columns[0] == ABSENT:
        y = None
    if columns[1] == ABSENT:
        z = noise = None
    call = op, noise, rows.table, number, kind, None, columns[3]
    return _Loss.apply(pred, None, (loss, grad), (y, z, rows.t, None, None), call), also


def residual_loss(
    op: str,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    weight: Tensor | None,
    mask: Mask,
    reduction: Reduction,
    kind: int = 0,
    weighing: Weighing = UNWEIGHED,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, mean of rho(r) of each sample without weight or gradient, `also` (2,) or None without its columns).

    weight: (B,). mask: bool like pred, True where an element counts; the mean is over those.
    kind: rho's place in KINDS; where it has a delta, that is the table's fourth column, taken as a constant, as those
    of `weighing` are.
    """
    number = REDUCTIONS.index(reduction)
    columns = *penalty_columns(kind), weighing.factor, *weighing.also
    also = None if weighing.also == UNWEIGHED.also else pred.new_empty(2, dtype=reference.compute_dtype(pred.dtype))
    assert number or also is None, "further means are those of a loss that is summed"
    wanted = {"kind": kind, "also": also}
    if route(op, pred, y, z, rows.table, weight, *tensors_of(mask)) is Route.DIRECT:
        if not wants_grad(pred, y, z, rows.table, weight):
            per_sample, loss, _ = kernels(pred, op).residual(
                op, pred, y, z, noise, *rows, columns, mask, weight, number, number > 0, False, **wanted
            )
            return loss if number else _weighted(op, per_sample, weight, rows, weighing), per_sample, also
        # fp16 is left to the lazy way: a loss scale must reach the gradient before it is rounded.
        if number and pred.dtype != torch.float16 and not wants_grad(y, z, rows.table):
            per_sample, loss, grad = kernels(pred, op).residual(
                op,
                pred,
                y,
                z,
                noise,
                *rows,
                columns,
                mask,
                weight,
                number,
                True,
                wants_grad(pred),
                kind=kind,
                also=also,
            )
            call = op, noise, rows.table, number, kind, mask if isinstance(mask, Drawn) else None, weighing.factor
            others = y, z, rows.t, mask if isinstance(mask, Tensor) else None, per_sample
            return _Loss.apply(pred, weight, (loss, grad), others, call), per_sample, also
    per_sample = sample_means(op, pred, y, z, noise, rows, mask, kind)
    loss = _weighted(op, per_sample, weight, rows, weighing)
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = (loss * kept_elements(pred, mask)).sum()
    means = per_sample.detach()
    if also is not None:
        factors = look_up(op, rows, pred).detach()[:, list(weighing.also)]
        also = (means[:, None] * factors).mean(0)
    return loss, means, also


def sample_means(
    op: str,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    mask: Mask,
    kind: int = 0,
) -> Tensor:
    """(B,) mean of rho(r) over each sample's kept elements (0 if none); the gradient is made in backward."""
    way = route(op, pred, y, z, rows.table, *tensors_of(mask))
    if way is Route.DIRECT:
        return _SampleMeans.apply(pred, y, z, rows.table, (rows.t, op, noise, mask, kind))
    if way is Route.REFERENCE:
        stored = mask.on(pred) if isinstance(mask, Drawn) else mask
        sums, kept = reference.residual(op, pred, y, z, noise, *rows, penalty_columns(kind), stored, kind)
        return sums / kept.clamp(min=1)
    return torch.ops.dae_fast.sample_means(pred, y, z, *seen(rows), *FlatMask.of(mask), *flatten(noise), kind, op)


def _weighted(op: str, per_sample: Tensor, weight: Tensor | None, rows: Rows, weighing: Weighing) -> Tensor:
    """Torch's own arithmetic."""
    if weight is not None:
        per_sample = per_sample * weight.to(per_sample.dtype)
    factor = _factor(op, rows, weighing.factor, per_sample)
    return per_sample if factor is None else per_sample * factor


def _factor(op: str, rows: Rows, column: int, x: Tensor) -> Tensor | None:
    """(B,) or (1,), a constant."""
    return None if column == ABSENT else look_up(op, rows, x).detach()[:, column]


def _pred_gradient(
    op: str,
    upstream: Tensor,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    mask: Mask,
    kind: int,
) -> Tensor:
    """upstream[b] / kept[b] * rho'(r), upstream (B,) being the gradient of the sample means."""
    way = route(op, pred, y, z, upstream)
    if way is Route.DIRECT and not torch.is_grad_enabled():
        columns, none = penalty_columns(kind), REDUCTIONS.index("none")
        _, _, grad = kernels(pred, op).residual(
            op, pred, y, z, noise, *rows, columns, mask, upstream, none, False, True, kind=kind
        )
        assert grad is not None
        return grad
    if way is Route.DISPATCHER and not torch.is_grad_enabled():
        return torch.ops.dae_fast.residual_grad(
            upstream, pred, y, z, *seen(rows), *FlatMask.of(mask), *flatten(noise), kind, op
        )
    if isinstance(mask, Drawn):
        mask = mask.on(pred)
    # Differentiable in turn, for double backward and transforms: torch's arithmetic around a fused r.
    r = affine(op, pred, y, z, noise, rows, COLUMNS)[0]
    kept = kept_elements(pred, mask)
    scale = upstream / (kept.clamp(min=1) if isinstance(kept, Tensor) else max(kept, 1))
    if mask is not None:
        r = torch.where(mask, r, 0)
    column = penalty_columns(kind)[2]
    delta = None if column == ABSENT else row_of(reference.coefficients(*rows, op, r).detach(), column, r)
    return (scale.reshape(-1, *[1] * (pred.dim() - 1)) * reference.slope(r.to(scale.dtype), kind, delta)).to(pred.dtype)


def gradients(
    op: str,
    needs: Any,
    upstream: Tensor,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    mask: Mask,
    kind: int = 0,
) -> Gradients:
    """Of pred, y, z and the table, from the gradient (B,) of the sample means."""
    found: Gradients = [None] * 4
    found[0] = g = _pred_gradient(op, upstream, pred, y, z, noise, rows, mask, kind)
    for k in (1, 2):
        if needs[k]:
            found[k] = affine(op, g, None, None, None, rows, (k, ABSENT, ABSENT, ABSENT))[0]
    if needs[3]:
        dots = row_dots(op, g, None, y, z, noise).to(rows.table.dtype)
        dots = torch.nn.functional.pad(dots, (0, rows.table.shape[1] - dots.shape[1]))  # none for a delta
        if rows.t is not None:
            found[3] = torch.zeros_like(rows.table).index_add(0, rows.t, dots)
        else:
            found[3] = dots.sum(0, keepdim=True) if rows.table.shape[0] == 1 else dots
    return found


class _SampleMeans(DirectFunction):
    """Eager; the gradient is made in backward, when its scale is known."""

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, y: Tensor | None, z: Tensor | None, table: Tensor, rest: tuple[Any, ...]
    ) -> Tensor:
        index, op, noise, mask, kind = rest
        ctx.save_for_backward(pred, y, z, table, index, mask if isinstance(mask, Tensor) else None)
        ctx.rest = op, noise, kind, mask if isinstance(mask, Drawn) else None
        columns, none = penalty_columns(kind), REDUCTIONS.index("none")
        per_sample, _, _ = kernels(pred, op).residual(
            op, pred, y, z, noise, table, index, columns, mask, None, none, False, False, kind=kind
        )
        return per_sample

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        pred, y, z, table, index, mask = ctx.saved_tensors
        op, noise, kind, drawn = ctx.rest
        found = gradients(
            op, ctx.needs_input_grad, upstream, pred, y, z, noise, Rows(table, index), drawn or mask, kind
        )
        return (*found, None)


class _Loss(DirectFunction):
    """Eager; gives the loss the gradient of pred that was made with it, for an upstream gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, weight: Tensor | None, made: tuple[Tensor, Tensor | None], others: Any, call: Any
    ) -> Tensor:
        loss, ctx.grad = made
        ctx.save_for_backward(pred, weight, *others)
        ctx.call = call
        return loss

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        pred, weight, y, z, index, mask, per_sample = ctx.saved_tensors
        op, noise, table, reduction, kind, drawn, factor_column = ctx.call
        mask, rows = drawn or mask, Rows(table, index)
        # Given away at its first use: held any longer, it would be copied into pred.grad.
        grad, ctx.grad = ctx.grad, None
        if grad is not None and not ctx.needs_input_grad[1] and is_one(upstream) and not torch.is_grad_enabled():
            return grad, None, None, None, None
        in_torch = torch.is_grad_enabled() or route(op, upstream, pred) is not Route.DIRECT
        of_weight = None
        if in_torch or ctx.needs_input_grad[1]:
            mean = REDUCTIONS[reduction] == "mean"
            each = upstream / pred.shape[0] if mean else upstream * kept_elements(pred, mask)
        if ctx.needs_input_grad[1]:
            if in_torch:  # differentiable in turn
                per_sample = sample_means(op, pred, y, z, noise, rows, mask, kind)
            of_weight = each * per_sample
            factor = _factor(op, rows, factor_column, pred)
            of_weight = (of_weight if factor is None else of_weight * factor).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None, None
        if in_torch:
            by_sample = _weighted(op, each.expand(pred.shape[0]), weight, rows, Weighing(factor_column))
            grad = _pred_gradient(op, by_sample, pred, y, z, noise, rows, mask, kind)
        else:
            # Where upstream is not 1 it is made again, not multiplied: as many bytes, and one rounding.
            _, _, grad = kernels(pred, op).residual(
                op,
                pred,
                y,
                z,
                noise,
                table,
                index,
                (*penalty_columns(kind), factor_column),
                mask,
                weight,
                reduction,
                False,
                True,
                upstream,
                grad,
                kind=kind,
            )
        return grad, of_weight, None, None, None
