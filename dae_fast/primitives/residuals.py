"""The weighted residual, reduced: rho(r), r = pred - target, target an affine map of y and noise (or z).

The loss and its gradient come from one pass over pred; neither the noise nor the target is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._torch import DirectFunction, batchable
from ..coefficients import gather, traced
from ..kernels import reference
from ..kernels.dispatch import extended, kernels
from ..kernels.reference import row_of
from ..kernels.spec import (
    ABSENT,
    Coefficients,
    Loss,
    Reduction,
    Residual,
    Wanted,
    compute_dtype,
    loss_of,
    map_of,
    rows_at,
)
from ..noise import FlatNoise, Noise
from ..routing import Route, beside, fast_loss, fast_loss_grad, is_one, on_mesh, route, wants_grad
from . import elementwise
from .elementwise import COLUMNS
from .masks import Drawn, FlatMask, has_weights, kept_elements, tensors_of
from .sums import Gradients, affine, row_dots, widened

Summed = tuple[Tensor, Tensor | None]  # the loss, and `also`
Weighed = tuple[Tensor, Tensor, Tensor | None]  # the loss, the samples' means, `also`


def fast_residual_loss(
    spec: Loss, operands: Residual, source: Any, key: Any, weight: Tensor | None = None
) -> Summed | None:
    """The loss of a plain call; None where residual_loss has to look.

    source, key: as of fast_loss
    """
    if is_compiling():
        return None
    found = fast_loss(spec.core, operands, source, key, weight)
    if found is None:
        return None
    loss, grad, also, table, t, kept, means = found
    if grad is None and means is None and spec.reduction is not Reduction.none:
        return loss, also
    rows = rows_at(table, t)
    if spec.reduction is Reduction.none:
        means = loss if grad is None else _sample_means(spec, operands, rows, (loss, kept))
        return _weighted(spec, means, weight, rows), None
    made = loss, None if grad is False else grad
    return _keep_gradient(spec, operands, rows, weight, made, (means, kept)), also


def _keep_gradient(
    spec: Loss, operands: Residual, rows: Coefficients, weight: Tensor | None, made: Any, counted: Any
) -> Tensor:
    """The loss, whose gradient of pred was made with it. counted: the samples' means; how many of each count."""
    pred, y, z, noise, mask = operands
    y = None if spec.columns[0] == ABSENT else y
    if spec.columns[1] == ABSENT:
        z = noise = None
    read_again = () if noise is None and mask is None else _read_again(noise, mask)
    others = weight, y, z, rows.t, mask if isinstance(mask, Tensor) else None, *counted, *read_again
    learned: Any = ()  # each argument costs
    if wants_grad(weight, y, z):
        learned = [t if t is not None and t.requires_grad else None for t in (weight, y, z)]
    call = spec, noise, rows.table, mask if isinstance(mask, Drawn) else None
    # In a tuple: of an argument that is returned autograd makes a view.
    return _Loss.apply(pred, made, others, call, *learned)


def _read_again(noise: Noise | None, mask: Any) -> list[Tensor | None]:
    """Keys and ids that backward reads: saved, so that torch notices where they change before."""
    streams = noise, mask.noise if isinstance(mask, Drawn) else None
    return [t for stream in streams if stream is not None for t in (stream._key_tensor, stream._sample)]


def residual_loss(spec: Loss, operands: Residual, rows: Coefficients, weight: Tensor | None) -> Weighed:
    """(loss, mean of rho(r) of each sample without weight or gradient, `also` (2,) or None without its columns).

    weight: (B,). mask: True where an element counts; the mean is over those. delta, and what else is read from the
    table when a loss is summed, is taken as a constant.
    """
    pred, y, z, noise, mask = operands
    op, summed = spec.op, spec.reduction is not Reduction.none
    mesh = on_mesh(pred, y, z, mask)
    if mesh is None and noise is not None and not noise._whole_blocks(math.prod(pred.shape[1:])):
        return residual_loss(spec, _filled(operands), rows, weight)
    also = pred.new_empty(2, dtype=compute_dtype(pred.dtype)) if spec.has_also else None
    assert summed or also is None, "further means are those of a loss that is summed"
    way = None if mesh is not None else route(op, pred, y, z, rows.tensor, weight, *tensors_of(mask))
    if way is Route.DIRECT and (not has_weights(mask) or _in_one_pass(op, pred, mask)):
        if not wants_grad(pred, y, z, rows.tensor, weight):
            wanted = Wanted(loss=summed, weight=weight, also=also)
            means, loss, *_ = kernels(pred, op).residual(spec, operands, rows, wanted)
            return loss if summed else _weighted(spec, means, weight, rows), means, also
        if summed and not wants_grad(rows.tensor):
            # fp16's is left to backward: a loss scale must reach the gradient before it is rounded.
            now = wants_grad(pred, y, z) and pred.dtype != torch.float16
            wanted = Wanted(loss=True, grad=now, weight=weight, also=also)
            means, loss, grad, kept = kernels(pred, op).residual(spec, operands, rows, wanted)
            return _keep_gradient(spec, operands, rows, weight, (loss, grad), (means, kept)), means, also
    means = sample_means(spec, operands, rows)
    loss = _reduced(spec, operands, _weighted(spec, means, weight, rows))
    means = means.detach()
    if also is not None:
        factors = beside(gather(op, rows, pred).detach()[:, list(spec.columns[4:])], means)
        also = (means[:, None] * factors).mean(0)
    return loss, means, also


def _reduced(spec: Loss, operands: Residual, each: Tensor) -> Tensor:
    """The loss of the samples' weighted means."""
    if spec.reduction is Reduction.none:
        return each
    if spec.reduction is Reduction.mean:
        return each.mean()
    return (each * kept_elements(operands.pred, operands.mask)).sum()


def _in_one_pass(op: str, pred: Tensor, weights: Tensor) -> bool:
    """Whether the kernels take a mask of weights; none makes a gradient of them."""
    return not wants_grad(weights) and extended(pred, op)


def _filled(operands: Residual) -> Residual:
    """Of rows that do not begin with a block, as in affine: the noise filled, all as wide as a kernel computes."""
    pred, y, z, noise, mask = operands
    assert noise is not None and z is None, "noise takes z's place"
    dtype = compute_dtype(pred.dtype)
    eps = noise.normal(pred.shape, dtype=dtype, device=pred.device)
    return Residual(pred.to(dtype), None if y is None else y.to(dtype), eps, None, mask)


def sample_means(spec: Loss, operands: Residual, rows: Coefficients) -> Tensor:
    """(B,) mean of rho(r) over each sample's kept elements (0 if none); the gradient is made in backward.

    A floating mask holds weights of the elements.
    """
    pred, y, z, noise, mask = operands
    spec = loss_of(spec.op, spec.kind, Reduction.none, (*spec.columns[:3], *[ABSENT] * 3))
    if (mesh := on_mesh(pred, y, z, mask)) is not None:
        return mesh.sample_means(spec, operands, rows)
    if has_weights(mask):
        return elementwise.sample_means(spec, operands, rows)
    if noise is not None and not noise._whole_blocks(math.prod(pred.shape[1:])):
        operands = _filled(operands)
        pred, y, z, noise, mask = operands
    way = route(spec.op, pred, y, z, rows.tensor, *tensors_of(mask))
    if way is Route.DIRECT:
        means, _, _, kept = kernels(pred, spec.op).residual(spec, operands, rows, Wanted())
        wanted = wants_grad(pred, y, z, rows.tensor)
        return _sample_means(spec, operands, rows, (means, kept)) if wanted else means
    if way is Route.REFERENCE:
        sums, kept = reference.residual_sums(spec, operands, rows)
        return sums / kept.clamp(min=1)
    table, index = traced(rows.dense(spec.op, compute_dtype(pred.dtype)))
    flat = FlatNoise() if noise is None else noise._flat()
    return torch.ops.dae_fast.sample_means(
        pred, y, z, table, index, *FlatMask.of(mask), *flat, int(spec.kind), spec.columns[:3], spec.op
    )


def _weighted(spec: Loss, means: Tensor, weight: Tensor | None, rows: Coefficients) -> Tensor:
    """Torch's own arithmetic."""
    if weight is not None:
        means = means * beside(weight.to(means.dtype), means)
    factor = _factor(spec, rows, means)
    return means if factor is None else means * beside(factor, means)


def _factor(spec: Loss, rows: Coefficients, x: Tensor) -> Tensor | None:
    """(B,) or (1,), a constant."""
    column = spec.columns[3]
    return None if column == ABSENT else gather(spec.op, rows, x).detach()[:, column]


def _pred_gradient(
    spec: Loss, upstream: Tensor, operands: Residual, rows: Coefficients, kept: Tensor | None = None
) -> Tensor:
    """upstream[b] / kept[b] * rho'(r), upstream (B,) being the gradient of the sample means."""
    pred, y, z, noise, mask = operands
    way = route(spec.op, pred, y, z, upstream)
    if way is Route.DIRECT and not torch.is_grad_enabled():
        each = loss_of(spec.op, spec.kind, Reduction.none, (*spec.columns[:3], *[ABSENT] * 3))
        return _made_gradient(each, operands, rows, Wanted(grad=True, weight=upstream, kept=kept))
    if way is Route.DISPATCHER and not torch.is_grad_enabled():
        table, index = traced(rows.dense(spec.op, compute_dtype(pred.dtype)))
        flat = FlatNoise() if noise is None else noise._flat()
        return torch.ops.dae_fast.residual_grad(
            upstream, pred, y, z, table, index, *FlatMask.of(mask), *flat, int(spec.kind), spec.columns[:3], spec.op
        )
    return pred_gradient_in_torch(spec, upstream, operands, rows)


def _made_gradient(spec: Loss, operands: Residual, rows: Coefficients, wanted: Wanted) -> Tensor:
    """Of pred, in one pass that makes nothing else; eager."""
    _, _, weight, _, upstream, made, kept = wanted
    found: Tensor | None = fast_loss_grad(spec.core, *operands, *rows, weight, upstream, kept, made)
    if found is None:
        found = kernels(operands.pred, spec.op).residual(spec, operands, rows, wanted).grad
        assert found is not None
    return found


def pred_gradient_in_torch(spec: Loss, upstream: Tensor, operands: Residual, rows: Coefficients) -> Tensor:
    """Differentiable in turn, for double backward and transforms: torch's arithmetic around a fused r."""
    pred, y, z, noise, mask = operands
    if isinstance(mask, Drawn):
        mask = mask.on(pred)
    r = affine(map_of(spec.op, COLUMNS), (pred, y, z, None), noise, rows)[0]
    kept = kept_elements(pred, mask)
    scale = upstream / (torch.where(kept == 0, 1, kept) if isinstance(kept, Tensor) else max(kept, 1))
    if mask is not None and not has_weights(mask):
        r = torch.where(mask, r, 0)
    column = spec.columns[2]
    delta = None if column == ABSENT else row_of(gather(spec.op, rows, r).detach(), column, r)
    slope = reference.slope(r.to(scale.dtype), spec.kind, delta)
    if has_weights(mask):
        slope = slope * mask
    return (scale.reshape(-1, *[1] * (pred.dim() - 1)) * slope).to(pred.dtype)


def _are_signs(rows: Coefficients, columns: Sequence[int]) -> bool:
    """Whether all are the number 1 or -1, by which nothing is rounded."""
    return isinstance(rows.table, tuple) and all(abs(rows.table[c]) == 1 for c in columns)


def _multiples(op: str, g: Tensor, columns: Sequence[int], rows: Coefficients) -> tuple[Tensor, ...]:
    """g times each of the columns, two at the most, in one launch."""
    maps = tuple(c for column in columns for c in (column, ABSENT, ABSENT, ABSENT))
    return affine(map_of(op, maps), (g, None, None, None), None, rows) if maps else ()


def gradients(
    needs: Any, spec: Loss, upstream: Tensor, operands: Residual, rows: Coefficients, kept: Tensor | None = None
) -> Gradients:
    """Of pred, y, z and the table, from the gradient (B,) of the sample means; kept: of a mask, once it is counted."""
    dtype = operands.pred.dtype
    others = [k for k in (1, 2) if needs[k]]
    exact = _are_signs(rows, others) and not torch.is_grad_enabled()
    # Those of the others are made of pred's, that would overflow in fp16 where they do not.
    if dtype != compute_dtype(dtype) and (needs[3] or (others and not exact)):
        operands = operands._replace(**{name: widened(getattr(operands, name)) for name in ("pred", "y", "z")})
    _, y, z, noise, _ = operands
    found: Gradients = [None] * 4
    g = _pred_gradient(spec, upstream, operands, rows, kept)
    found[0] = g.to(dtype)
    for k, t in zip(others, _multiples(spec.op, g, others, rows), strict=True):
        found[k] = t.to(dtype)
    if needs[3]:
        dots = row_dots(spec.op, g, (None, y, z, None), noise).to(rows.table.dtype)
        dots = torch.nn.functional.pad(dots, (0, rows.table.shape[1] - dots.shape[1]))  # none for a delta
        if rows.t is not None:
            found[3] = torch.zeros_like(rows.table).index_add(0, rows.t, dots)
        else:
            found[3] = dots.sum(0, keepdim=True) if rows.table.shape[0] == 1 else dots
    return found


def _sample_means(spec: Loss, operands: Residual, rows: Coefficients, made: tuple[Any, Any]) -> Tensor:
    """Means that were made, with gradients. made: they, and how many elements of each sample count."""
    pred, y, z, noise, mask = operands
    return _SampleMeans.apply(pred, y, z, rows.table, (made, rows.t, spec, noise, mask))


class _SampleMeans(DirectFunction):
    """Eager; the gradient is made in backward, when its scale is known."""

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, y: Tensor | None, z: Tensor | None, table: Any, rest: tuple[Any, ...]
    ) -> Tensor:
        (means, kept), index, spec, noise, mask = rest
        stored = mask if isinstance(mask, Tensor) else None
        read = _read_again(noise, mask)
        ctx.save_for_backward(pred, y, z, table if isinstance(table, Tensor) else None, index, stored, kept, *read)
        ctx.rest = spec, noise, mask if isinstance(mask, Drawn) else None, table if isinstance(table, tuple) else None
        made: Tensor = means
        return made

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        pred, y, z, table, index, mask, kept, *_ = ctx.saved_tensors
        spec, noise, drawn, row = ctx.rest
        operands, rows = Residual(pred, y, z, noise, drawn or mask), Coefficients(table if row is None else row, index)
        return (*gradients(ctx.needs_input_grad, spec, upstream, operands, rows, kept), None)


class _Loss(DirectFunction):
    """Eager; gives the loss the gradient of pred that was made with it, for an upstream gradient of 1.

    That gradient is a saved tensor, which torch's hooks see (checkpointing, offloading), until it is given away.
    """

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, made: tuple[Tensor, Tensor | None], others: Any, call: Any, *learned: Tensor | None
    ) -> Tensor:
        loss, grad = made
        ctx.save_for_backward(pred, grad, *others)
        ctx.call = call
        ctx.given_away = False
        return loss

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        pred, grad, weight, y, z, index, mask, means, kept, *_ = ctx.saved_tensors
        if grad is not None and ctx.given_away:
            grad = None  # what it was given to may have changed it
        ctx.given_away = True
        of_pred, *learned = ctx.needs_input_grad
        stands = grad is not None and is_one(upstream) and not torch.is_grad_enabled()
        if stands and len(learned) == 3:
            return grad.data, None, None, None  # a tensor of its own, which pred.grad takes without a copy
        of_weight, of_y, of_z = learned[3:] or (False, False, False)
        spec, noise, table, drawn = ctx.call
        operands, rows = Residual(pred, y, z, noise, drawn or mask), Coefficients(table, index)
        in_torch = torch.is_grad_enabled() or route(spec.op, upstream, pred) is not Route.DIRECT
        made_of_weight = None
        if in_torch or of_weight:
            mean = spec.reduction is Reduction.mean
            each = upstream / pred.shape[0] if mean else upstream * kept_elements(pred, operands.mask)
        if of_weight:
            if in_torch:  # differentiable in turn
                means = sample_means(spec, operands, rows)
            made_of_weight = each * means
            factor = _factor(spec, rows, pred)
            made_of_weight = (made_of_weight if factor is None else made_of_weight * factor).to(weight.dtype)
        found: Gradients = [None] * 4
        if in_torch and (of_pred or of_y or of_z):
            by_sample = _weighted(spec, each.expand(pred.shape[0]), weight, rows)
            found = gradients((of_pred, of_y, of_z, False), spec, by_sample, operands, rows)
        elif of_pred or of_y or of_z:
            if not stands:
                # Where upstream is not 1 it is made again, not multiplied: as many bytes, and one rounding.
                wanted = Wanted(grad=True, weight=weight, upstream=upstream, made=grad, kept=kept)
                grad = _made_gradient(spec, operands, rows, wanted)
            again = Wanted(grad=True, weight=weight, upstream=upstream, kept=kept)
            found[1:3] = _target_gradients((of_y, of_z), spec, grad, operands, rows, again)
            found[0] = grad.data if stands else grad
        further = (made_of_weight, *found[1:3]) if len(learned) > 3 else ()
        return found[0], None, None, None, *further


def _target_gradients(
    needs: tuple[bool, bool], spec: Loss, g: Tensor, operands: Residual, rows: Coefficients, again: Wanted
) -> list[Tensor | None]:
    """Of y and z, from that of pred, g: n1*g and n2*g. again: what made g.

    Of a half type, which is rounded, and in fp16 perhaps infinite, it is made again with the factor in the weight.
    """
    found: list[Tensor | None] = [None, None]
    wanted = [k for k in (0, 1) if needs[k]]
    columns = [spec.columns[k] for k in wanted]
    if _are_signs(rows, columns) or g.dtype == compute_dtype(g.dtype):
        for k, t in zip(wanted, _multiples(spec.op, g, columns, rows), strict=True):
            found[k] = t
        return found
    for k in wanted:
        factor = gather(spec.op, rows, g)[:, spec.columns[k]]
        weight = (factor if again.weight is None else factor * again.weight).expand(g.shape[0]).contiguous()
        found[k] = _made_gradient(spec, operands, rows, again._replace(weight=weight))
    return found
