"""The affine map, sample by sample: c0[b]*x + c1[b]*y + c2[b]*z + c3[b]*w, with z noise or a tensor.

Noising, the Tweedie conversions, Langevin, DDPM and DDIM steps are rows of coefficients for it, and so
is its own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._torch import DirectFunction, batchable, outside_modes
from ..kernels import reference
from ..kernels.dispatch import kernels
from ..noise import Noise
from ..rows import Rows, rows_at
from .flat import flatten, seen
from .routing import Route, differentiate_with, plain_affine, route, wants_grad

Columns = tuple[int, ...]  # of the table: c0, c1, c2, c3 of the output, then those of a second one
Clamp = tuple[int, int, int, float, float]
ABSENT = -1  # the column of a coefficient that is 0


def affine(
    op: str,
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    columns: Columns,
    clamp: Clamp | None = None,
    w: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One output for each four of `columns`. x, y, z, w: one shape, dtype and device; z or noise or neither.

    clamp (a0, a1, a3, lo, hi): y is replaced by clamp(a0*x + a1*y + a3*w, lo, hi).
    """
    if not is_compiling():
        made = plain_affine(op, columns, x, y, z, noise, rows.t, rows.table, w, clamp)
        if made is not None:
            return _tuple(made)
    way = route(op, x, y, z, w, rows.table)
    if way is Route.REFERENCE:
        return reference.affine(op, x, y, z, noise, *rows, columns, clamp, w)
    if way is Route.DIRECT:
        if wants_grad(x, y, z, w, rows.table):
            return _tuple(_Affine.apply(x, y, z, w, rows.table, (rows.t, op, noise, columns, clamp)))
        return kernels(x, op).affine(op, x, y, z, noise, *rows, columns, clamp, w=w)
    if clamp is not None:
        # Where a call is traced or transformed the clamp is torch's own, between two fused passes
        # in the compute type: rounded to half in between, it would clamp other elements.
        a0, a1, a3, lo, hi = clamp
        dtype, compute = x.dtype, reference.compute_dtype(x.dtype)
        wide_y, wide_z, wide_w = (None if t is None else t.to(compute) for t in (y, z, w))
        estimate = affine(op, x.to(compute), wide_y, None, None, rows, (a0, a1, ABSENT, a3), w=wide_w)[0]
        made = affine(op, x.to(compute), estimate.clamp(lo, hi), wide_z, noise, rows, columns, w=wide_w)
        return tuple(t.to(dtype) for t in made)
    call = torch.ops.dae_fast.affine if len(columns) == 4 else torch.ops.dae_fast.affine2
    return _tuple(call(x, y, z, w, *seen(rows), *flatten(noise), columns, op))


def affine_into(
    op: str,
    out: Tensor,
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    rows: Rows,
    columns: Columns,
    clamp: Clamp | None = None,
    w: Tensor | None = None,
) -> Tensor:
    """The same with one output, written to `out`, which may be an input. No gradient."""
    if route(op, out, x, y, z, w, rows.table) is not Route.DIRECT:
        return out.copy_(affine(op, x, y, z, noise, rows, columns, clamp, w)[0])
    kernels(x, op).affine(op, x, y, z, noise, *rows, columns, clamp, out=out, w=w)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


Gradients = list[Tensor | None]
Given = list[tuple[Tensor, Columns]]  # gradients of outputs, each with the four columns of its output
_NOT_GIVEN = ((None, (ABSENT,) * 4),) * 2


def _gradients(
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    noise: Noise | None,
    rows: Rows,
    columns: Columns,
    op: str,
    clamp: Clamp | None = None,
) -> Gradients:
    """Of x, y, z, w and the table; `needs` says which. inputs (x, y, z, w) are read for a clamp and for the table's."""
    given = [(g, columns[4 * k : 4 * k + 4]) for k, g in enumerate(grads) if g is not None]
    if not given:
        return [None] * 5
    if clamp is not None:
        return _clamped_gradients(needs, given, inputs, noise, rows, op, clamp)
    of_table = _table_gradient(given, inputs, noise, rows, op) if needs[4] else None
    return [*_input_gradients(needs, given, rows, op), of_table]


def _input_gradients(needs: Sequence[bool], given: Given, rows: Rows, op: str) -> Gradients:
    """Of x, y, z and w, from one to three gradients.

    d x = c0 * g, and so on: affine maps of the output gradients, two inputs to a pass.
    """
    result: Gradients = [None] * 4
    (g1, columns1), (g2, columns2), (g3, columns3) = (*given, *_NOT_GIVEN)[:3]
    assert g1 is not None
    wanted = [k for k in range(4) if needs[k]]
    for first in range(0, len(wanted), 2):
        pair = wanted[first : first + 2]
        maps = tuple(c for k in pair for c in (columns1[k], columns2[k], columns3[k], ABSENT))
        for k, gradient in zip(pair, affine(op, g1, g2, g3, None, rows, maps), strict=True):
            result[k] = gradient
    return result


def _clamped_gradients(
    needs: Sequence[bool],
    given: Given,
    inputs: Sequence[Tensor | None],
    noise: Noise | None,
    rows: Rows,
    op: str,
    clamp: Clamp,
) -> Gradients:
    """The estimate counts as one more output, the only one that reads y. All in the compute type."""
    dtype = given[0][0].dtype
    a0, a1, a3, lo, hi = clamp
    of_estimate = (a0, a1, ABSENT, a3)
    given = [(_wide(g), columns) for g, columns in given]
    inner: Given = [(_estimate_gradient(given, inputs, rows, op, clamp), of_estimate)]
    outer: Given = [(g, (c0, ABSENT, c2, c3)) for g, (c0, _, c2, c3) in given]
    found = [None if t is None else t.to(dtype) for t in _input_gradients(needs, outer + inner, rows, op)]
    if not needs[4]:
        return [*found, None]
    x, y, z, w = (_wide(t) for t in inputs)
    clamped = affine(op, x, y, None, None, rows, of_estimate, w=w)[0].clamp(lo, hi)
    of_outer = _table_gradient(given, (x, clamped, z, w), noise, rows, op)
    return [*found, of_outer + _table_gradient(inner, (x, y, None, w), None, rows, op)]


def _estimate_gradient(given: Given, inputs: Sequence[Tensor | None], rows: Rows, op: str, clamp: Clamp) -> Tensor:
    """0 outside the bounds and for NaN, as torch.clamp's: lo <= estimate <= hi decides.

    Without a bool tensor: on a CPU torch.where takes ten times as long for one as all of this.
    """
    a0, a1, a3, lo, hi = clamp
    x, y, _, w = inputs
    # Made again, and not rounded: other elements would be within the bounds.
    estimate = affine(op, _wide(x), _wide(y), None, None, rows, (a0, a1, ABSENT, a3), w=_wide(w))[0].detach()
    low, high, neginf, posinf = _open_interval(lo, hi, estimate.dtype)
    estimate.nan_to_num_(math.inf, posinf, neginf)
    g = _input_gradients((False, True, False, False), given, rows, op)[1]
    return torch.ops.aten.hardtanh_backward(g, estimate, low, high)


def _wide(t: Any) -> Any:
    return None if t is None else t.to(reference.compute_dtype(t.dtype))


@lru_cache(maxsize=64)
def _open_interval(lo: float, hi: float, dtype: torch.dtype) -> tuple[float, float, float | None, float | None]:
    """(low, high, neginf, posinf): hardtanh_backward is 0 at low and high and beyond, and inside for lo <= t <= hi.

    Of a NaN it makes one thing or another, so a NaN becomes infinite, never inside. What is infinite stays so,
    but within an infinite bound it becomes the largest number (None), which is.
    """
    with outside_modes():
        infinite = torch.tensor([-math.inf, math.inf], dtype=dtype)
        low, high = torch.tensor([lo, hi], dtype=dtype).nextafter(infinite).tolist()
    return low, high, None if lo == -math.inf else -math.inf, None if hi == math.inf else math.inf


def _table_gradient(given: Given, inputs: Sequence[Tensor | None], noise: Noise | None, rows: Rows, op: str) -> Tensor:
    """Sums over each sample of output gradient times input, gathered to the table's rows."""
    table, index = rows
    B = given[0][0].shape[0]
    columns_of = [table.new_zeros(B) for _ in range(table.shape[1])]
    for g, columns in given:
        x, y, z, w = inputs
        dots = row_dots(op, g, x, y, z, noise).to(table.dtype)
        if w is not None:
            dots = torch.cat((dots, row_dots(op, g, w, None, None, None)[:, :1].to(table.dtype)), 1)
        for k, c in enumerate(columns):
            if c != ABSENT:
                columns_of[c] = columns_of[c] + dots[:, k]
    per_row = torch.stack(columns_of, -1)
    if index is not None:
        return torch.zeros_like(table).index_add(0, index, per_row)
    return per_row.sum(0, keepdim=True) if table.shape[0] == 1 else per_row


def row_dots(op: str, g: Tensor, x: Tensor | None, y: Tensor | None, z: Tensor | None, noise: Noise | None) -> Tensor:
    """(B, 3) sums over each sample of g*x, g*y, g*z."""
    if route(op, g, x, y, z) is Route.DIRECT and not wants_grad(g, x, y, z):
        return kernels(g, op).row_dots(g, x, y, z, noise)
    compute = reference.compute_dtype(g.dtype)
    wide = g.to(compute)
    if noise is not None:
        z = noise.normal(g.shape, dtype=compute, device=g.device)
    sums = [torch.zeros_like(wide) if t is None else wide * t for t in (x, y, z)]
    return torch.stack([reference.per_sample_sum(s) for s in sums], -1)


class _Affine(DirectFunction):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        z: Tensor | None,
        w: Tensor | None,
        table: Tensor,
        rest: tuple[Any, ...],
    ) -> Any:
        index, op, noise, columns, clamp = rest
        ctx.set_materialize_grads(False)
        if table.requires_grad:
            ctx.save_for_backward(table, index, x, y, z, w)
        elif clamp is not None:
            ctx.save_for_backward(table, index, x, y, None, w)
        else:
            ctx.save_for_backward(table, index)
        ctx.rest = noise, columns, clamp, op
        outputs = affine(op, x, y, z, noise, Rows(table, index), columns, clamp, w)
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @batchable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        table, index, *inputs = ctx.saved_tensors
        noise, columns, clamp, op = ctx.rest
        rows, needs = Rows(table, index), ctx.needs_input_grad
        return (*_gradients(needs, grads, inputs, noise, rows, columns, op, clamp), None)


def _with_gradients(
    op: str,
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    table: Tensor,
    t: Tensor | int | None,
    columns: Columns,
    clamp: Clamp | None,
    w: Tensor | None,
) -> Any:
    """Of a plain call."""
    rows = rows_at(table, t)
    return _Affine.apply(x, y, z, w, rows.table, (rows.t, op, noise, columns, clamp))


differentiate_with(_with_gradients)
