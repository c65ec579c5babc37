"""The weighted residual, reduced: r = pred - target, target an affine map of y and noise (or z).

The loss and its gradient come from one pass over pred; neither the noise nor the target is stored.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..backends import kernels, reference
from ..noise import Noise
from ..rows import Rows, stack_rows
from .affine import ABSENT, Gradients, affine, row_dots
from .flat import flatten, seen
from .routing import Route, batchable, plain_loss, route, wants_grad

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("none", "mean", "sum")  # a reduction's place here is its number in the native core
MINUS_TARGET = (1.0, -1.0, -1.0)  # a table's row for pred - y, pred - z and pred - noise
COLUMNS = (0, 1, 2)  # a table holds (1, n1, n2): r = 1*pred + n1*y + n2*z


def plain_residual_loss(op: str, pred: Tensor, target: Noise | Tensor, reduction: str) -> Tensor | None:
    """The loss of a plain call, pred - target unweighted; None where residual_loss has to look."""
    if reduction not in REDUCTIONS[1:] or not isinstance(pred, Tensor):
        return None
    z, noise = (None, target) if type(target) is Noise else (target, None)
    number = REDUCTIONS.index(reduction)
    table, _ = stack_rows(op, MINUS_TARGET, pred, reference.compute_dtype(pred.dtype))
    made = plain_loss(pred, z, noise, table, number)
    if made is None or made[1] is None:
        return made and made[0]
    return _Loss.apply(pred, made, (None, z, None, None, None), (op, noise, table, number))


def residual_loss(
    op: str,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    weight: Tensor | None,
    mask: Tensor | None,
    reduction: Reduction,
) -> tuple[Tensor, Tensor]:
    """(loss, mean of r^2 of each sample without weight or gradient).

    weight: (B,). mask: bool like pred, True where an element counts; the mean is over those.
    """
    number = REDUCTIONS.index(reduction)
    if route(op, pred, y, z, rows.table, weight, mask) is Route.DIRECT:
        if not wants_grad(pred, y, z, rows.table, weight):
            per_sample, loss, _ = kernels(pred, op).residual(
                op, pred, y, z, noise, *rows, COLUMNS[1:], mask, weight, number, number > 0, False
            )
            return (loss, per_sample) if number else (_weighted(per_sample, weight), per_sample)
        # fp16 is left to the lazy way: a loss scale must reach the gradient before it is rounded.
        if number and pred.dtype != torch.float16 and not wants_grad(y, z, rows.table, weight):
            call = op, noise, rows.table, number
            per_sample, loss, grad = kernels(pred, op).residual(
                op, pred, y, z, noise, *rows, COLUMNS[1:], mask, weight, number, True, True
            )
            return _Loss.apply(pred, (loss, grad), (y, z, rows.t, weight, mask), call), per_sample
    per_sample = sample_means(op, pred, y, z, noise, rows, mask)
    loss = _weighted(per_sample, weight)
    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = (loss * _kept(pred, mask)).sum()
    return loss, per_sample.detach()


def sample_means(
    op: str,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    mask: Tensor | None,
) -> Tensor:
    """(B,) mean of r^2 over each sample's kept elements (0 if none); the gradient is made in backward."""
    way = route(op, pred, y, z, rows.table, mask)
    if way is Route.REFERENCE:
        sums, kept = reference.residual(op, pred, y, z, noise, *rows, COLUMNS[1:], mask)
        return sums / kept.clamp(min=1)
    if way is Route.DIRECT:
        return _SampleMeans.apply(pred, y, z, rows.table, (rows.t, op, noise, mask))
    return torch.ops.dae_fast.sample_means(pred, y, z, *seen(rows), mask, *flatten(noise), op)


def _weighted(per_sample: Tensor, weight: Tensor | None) -> Tensor:
    return per_sample if weight is None else per_sample * weight.to(per_sample.dtype)


def _kept(pred: Tensor, mask: Tensor | None) -> Tensor | int:
    B = pred.shape[0]
    if mask is None:
        return pred.numel() // B if B else 0
    return reference.per_sample_sum(mask)


def _pred_gradient(
    op: str,
    upstream: Tensor,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    mask: Tensor | None,
) -> Tensor:
    """2 * upstream[b] / kept[b] * r, upstream (B,) being the gradient of the sample means."""
    way = route(op, pred, y, z, upstream)
    if way is Route.DIRECT and not torch.is_grad_enabled():
        _, _, grad = kernels(pred, op).residual(
            op, pred, y, z, noise, *rows, COLUMNS[1:], mask, upstream, REDUCTIONS.index("none"), False, True
        )
        assert grad is not None
        return grad
    if way is Route.DISPATCHER and not torch.is_grad_enabled():
        return torch.ops.dae_fast.residual_grad(upstream, pred, y, z, *seen(rows), mask, *flatten(noise), op)
    # Differentiable in turn, for double backward and transforms: torch's arithmetic around a fused r.
    r = affine(op, pred, y, z, noise, rows, COLUMNS)[0]
    kept = _kept(pred, mask)
    scale = 2 * upstream / (kept.clamp(min=1) if isinstance(kept, Tensor) else max(kept, 1))
    if mask is not None:
        r = torch.where(mask, r, 0)
    return (scale.reshape(-1, *[1] * (pred.dim() - 1)) * r.to(scale.dtype)).to(pred.dtype)


def gradients(
    op: str,
    needs: Any,
    upstream: Tensor,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    mask: Tensor | None,
) -> Gradients:
    """Of pred, y, z and the table, from the gradient (B,) of the sample means."""
    found: Gradients = [None] * 4
    found[0] = g = _pred_gradient(op, upstream, pred, y, z, noise, rows, mask)
    for k in (1, 2):
        if needs[k]:
            found[k] = affine(op, g, None, None, None, rows, (k, ABSENT, ABSENT))[0]
    if needs[3]:
        dots = row_dots(op, g, None, y, z, noise).to(rows.table.dtype)
        if rows.t is not None:
            found[3] = torch.zeros_like(rows.table).index_add(0, rows.t, dots)
        else:
            found[3] = dots.sum(0, keepdim=True) if rows.table.shape[0] == 1 else dots
    return found


class _SampleMeans(torch.autograd.Function):
    """Eager; the gradient is made in backward, when its scale is known."""

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, y: Tensor | None, z: Tensor | None, table: Tensor, rest: tuple[Any, ...]
    ) -> Tensor:
        index, op, noise, mask = rest
        ctx.save_for_backward(pred, y, z, table, index, mask)
        ctx.rest = op, noise
        per_sample, _, _ = kernels(pred, op).residual(
            op, pred, y, z, noise, table, index, COLUMNS[1:], mask, None, REDUCTIONS.index("none"), False, False
        )
        return per_sample

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        pred, y, z, table, index, mask = ctx.saved_tensors
        op, noise = ctx.rest
        found = gradients(op, ctx.needs_input_grad, upstream, pred, y, z, noise, Rows(table, index), mask)
        return (*found, None)


class _Loss(torch.autograd.Function):
    """Eager; gives the loss the gradient of pred that was made with it, for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, made: tuple[Tensor, Tensor], others: tuple[Any, ...], call: Any) -> Tensor:
        loss, ctx.grad = made
        ctx.save_for_backward(pred, *others)
        ctx.call = call
        return loss

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        pred, y, z, index, weight, mask = ctx.saved_tensors
        op, noise, table, reduction = ctx.call
        # Given away at its first use: held any longer, it would be copied into pred.grad.
        grad, ctx.grad = ctx.grad, None
        if torch.is_grad_enabled() or route(op, upstream, pred) is not Route.DIRECT:
            kept = _kept(pred, mask)
            each = upstream / pred.shape[0] if REDUCTIONS[reduction] == "mean" else upstream * kept
            per_sample = each.expand(pred.shape[0]) if weight is None else each * weight.to(upstream.dtype)
            grad = _pred_gradient(op, per_sample, pred, y, z, noise, Rows(table, index), mask)
        else:
            # Where upstream is not 1 it is made again, not multiplied: as many bytes, and one rounding.
            _, _, grad = kernels(pred, op).residual(
                op, pred, y, z, noise, table, index, COLUMNS[1:], mask, weight, reduction, False, True, upstream, grad
            )
        return grad, None, None, None
