"""The affine map, sample by sample: c0[b]*x + c1[b]*y + c2[b]*z + c3[b]*w, with z noise or a tensor, or with both.

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
from torch.compiler import is_compiling, is_dynamo_compiling

from .._torch import DirectFunction, batchable, outside_modes
from ..coefficients import changing, stack_rows, traced
from ..kernels import dispatch, reference
from ..kernels.dispatch import extended, kernels
from ..kernels.spec import ABSENT, BLEND, NOISE, Bounds, Coefficients, Inputs, Map, Z, compute_dtype, map_of, rows_at
from ..noise import FlatNoise, Noise
from ..routing import Route, fast_map, on_mesh, route, wants_grad

At = tuple[Any, Any]  # as Coefficients; or a table and the number of the one row for all samples
Columns = tuple[int, ...]  # of the table: c0, c1, c2, c3 of the output, then those of a second one


def affine(
    spec: Map, inputs: Inputs, noise: Noise | Tensor | None, rows: Coefficients | At, bounds: Bounds | None = None
) -> tuple[Tensor, ...]:
    """The outputs of a map with ALL_SLOTS. inputs: one shape, dtype and device; z or noise or neither.

    noise: of a map of five streams besides z, and perhaps a tensor
    bounds: where the map has an inner one, y is replaced by clamp(a0*x + a1*y + a3*w, low, high).
    """
    table, t = rows
    if not is_compiling():
        made = fast_map(spec.core, (*inputs, noise), table, t, bounds, None)
        if made is not None:
            return made if spec.outputs > 1 else (made,)
    return general_affine(spec, inputs, noise, rows_at(table, t), bounds)


def general_affine(
    spec: Map, inputs: Inputs, noise: Noise | Tensor | None, rows: Coefficients, bounds: Bounds | None = None
) -> tuple[Tensor, ...]:
    """affine of a call that the core has refused, or has not been asked of."""
    x = inputs[0]
    assert x is not None
    if (mesh := on_mesh(*inputs)) is not None:
        return mesh.affine(spec, inputs, noise, rows, bounds)
    if isinstance(noise, Noise) and not noise._whole_blocks(math.prod(x.shape[1:])):
        return _with_filled_noise(spec, inputs, noise, rows, bounds)
    v = noise if isinstance(noise, Tensor) else None
    way = route(spec.op, *inputs, v, rows.tensor)  # type: ignore[arg-type]
    if way is Route.REFERENCE:
        return reference.affine(spec, inputs, noise, rows, bounds)
    if way is Route.DIRECT:
        made: tuple[Tensor, ...] = kernels(x, spec.op).affine(spec, inputs, noise, rows, bounds)
        if not wants_grad(*inputs, v, rows.tensor):
            return made
        made = with_gradients(made, spec, inputs, noise, rows, bounds)
        return made if isinstance(made, tuple) else (made,)
    if spec.inner is not None:
        assert bounds is not None
        return _clamped_by_torch(spec, inputs, noise, rows, bounds)
    table, index = traced(rows.dense(spec.op, compute_dtype(x.dtype)))
    flat = noise._flat() if isinstance(noise, Noise) else FlatNoise()
    if spec.outputs == 1:
        return (torch.ops.dae_fast.affine(*inputs, v, table, index, *flat, spec.all_columns, spec.op),)
    return torch.ops.dae_fast.affine2(*inputs, v, table, index, *flat, spec.all_columns, spec.op)


def affine_into(
    spec: Map,
    out: Tensor,
    inputs: Inputs,
    noise: Noise | Tensor | None,
    rows: Coefficients,
    bounds: Bounds | None = None,
) -> Tensor:
    """The same with one output, written to `out`, which may be an input. No gradient."""
    x = inputs[0]
    assert x is not None
    whole = not isinstance(noise, Noise) or noise._whole_blocks(math.prod(x.shape[1:]))
    v = noise if isinstance(noise, Tensor) else None
    if not whole or route(spec.op, out, *inputs, v, rows.tensor) is not Route.DIRECT:
        return out.copy_(affine(spec, inputs, noise, rows, bounds)[0])
    kernels(x, spec.op).affine(spec, inputs, noise, rows, bounds, out)
    written(out)
    return out


def written(out: Tensor) -> None:
    """Tells autograd that a kernel wrote to it."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _with_filled_noise(
    spec: Map, inputs: Inputs, noise: Noise, rows: Coefficients, bounds: Bounds | None
) -> tuple[Tensor, ...]:
    """Rows that do not begin with a block: the noise is filled, and all of it computed as wide as in a kernel."""
    x, y, z, w = inputs
    assert x is not None
    dtype = compute_dtype(x.dtype)
    eps = noise.normal(x.shape, dtype=dtype, device=x.device)
    if spec.fifth:
        made = affine(spec, (widened(x), widened(y), widened(z), widened(w)), eps, rows, bounds)
    else:
        made = affine(spec, (widened(x), widened(y), eps, widened(w)), None, rows, bounds)
    return tuple(t.to(x.dtype) for t in made)


def _clamped_by_torch(
    spec: Map, inputs: Inputs, noise: Noise | Tensor | None, rows: Coefficients, bounds: Bounds
) -> tuple[Tensor, ...]:
    """Where a call is traced or transformed the clamp is torch's own, between two fused passes in the compute type:
    rounded to half in between, it would clamp other elements."""
    assert spec.inner is not None and inputs[0] is not None
    dtype = inputs[0].dtype
    x, y, z, w = (widened(t) for t in inputs)
    estimate = affine(of_estimate(spec), (x, y, None, w), None, rows)[0]
    low, high = (changing(bound, estimate) for bound in bounds)
    outer = map_of(spec.op, spec.all_columns)
    made = affine(outer, (x, estimate.clamp(low, high), z, w), _wide_noise(noise), rows)
    return tuple(t.to(dtype) for t in made)


def of_estimate(spec: Map) -> Map:
    """The map to the estimate that is clamped."""
    assert spec.inner is not None
    a0, a1, a3 = spec.inner
    return map_of(spec.op, (a0, a1, ABSENT, a3))


Gradients = list[Any]  # of tensors, None where not wanted; last the sums by column that the table's is made of
Given = list[tuple[Tensor, Columns]]  # gradients of outputs, each with the five columns of its output
_NOT_GIVEN = ((None, (ABSENT,) * 5),) * 2


def gradients(
    needs: Sequence[Any],
    grads: Sequence[Tensor | None],
    spec: Map,
    inputs: Inputs,
    noise: Noise | Tensor | None,
    rows: Coefficients,
    bounds: Bounds | None = None,
) -> Gradients:
    """Of x, y, z, w and a tensor as `noise`; then by column sums over each sample, (B,), of gradient times input.

    needs: which of the five; then the columns wanted, True for all
    inputs: read for a clamp and for the sums
    """
    given = [(g, spec.columns_of(k)) for k, g in enumerate(grads) if g is not None]
    if not given:
        return [None] * 6
    if spec.blends:
        return _blended_gradients(needs, given[0][0], spec, inputs, noise, rows)
    if spec.inner is not None:
        assert bounds is not None
        return _clamped_gradients(needs, given, spec, inputs, noise, rows, bounds)
    sums = _column_sums(needs[5], given, inputs, noise, spec) if needs[5] else None
    return [*_input_gradients(needs, given, rows, spec.op), sums]


def _blended_gradients(
    needs: Sequence[Any], g: Tensor, spec: Map, inputs: Inputs, noise: Noise | Tensor | None, rows: Coefficients
) -> Gradients:
    """Of w + m*(v - w): v, the sum of x and z, has m*g, w the rest of g, and m (v - w)*g."""
    c0, _, c2, _ = spec.columns
    of_sum = map_of(spec.op, (c0, ABSENT, c2, ABSENT))
    found: list[Any] = [None] * 5
    sums = None
    if needs[3]:
        found[3] = affine(map_of(spec.op, (ABSENT, BLEND, ABSENT, BLEND)), (g, inputs[1], None, g), None, rows)[0]
    direct = not needs[5] and not torch.is_grad_enabled() and route(spec.op, g, *inputs) is Route.DIRECT
    widens = not direct or not extended(g, spec.op)
    if widens or needs[1]:
        x, m, z, w, wide = (widened(t) for t in (*inputs, g))
    if widens:
        found[0], _, found[2], _, found[4], sums = gradients(
            (needs[0], False, needs[2], False, *needs[4:]), (m * wide,), of_sum, (x, None, z, None), noise, rows
        )
    else:
        for k, c in ((0, c0), (2, c2)):  # blended into nothing, which is 0
            if needs[k]:
                found[k] = affine(map_of(spec.op, (c, BLEND, ABSENT, BLEND)), (g, inputs[1], None, None), None, rows)[0]
    if needs[1]:
        found[1] = (affine(of_sum, (x, None, z, None), noise, rows)[0] - w) * wide
    return [*(None if t is None else t.to(g.dtype) for t in found), sums]


def _input_gradients(needs: Sequence[Any], given: Given, rows: Coefficients, op: str) -> Gradients:
    """Of the five streams, from one to three gradients: affine maps of them; where c0 is the number 1, g."""
    result: Gradients = [None] * 5
    (g1, columns1), (g2, columns2), (g3, columns3) = (*given, *_NOT_GIVEN)[:3]
    assert g1 is not None
    wanted = needs[0], needs[1], needs[2], needs[3], needs[4]
    if len(given) == 1 and isinstance(rows.table, tuple):
        ones = [need and rows.table[c] == 1 for need, c in zip(wanted, columns1, strict=True)]
        if True in ones:
            result = [g1 if one else None for one in ones]
            wanted = tuple(need and not one for need, one in zip(wanted, ones, strict=True))  # type: ignore[assignment]
    for spec, slots in _gradient_maps(op, wanted, (columns1, columns2, columns3)):
        for k, gradient in zip(slots, affine(spec, (g1, g2, g3, None), None, rows), strict=True):
            result[k] = gradient
    return result


def _made_gradient_maps(
    op: str, wanted: tuple[Any, ...], columns: tuple[Columns, Columns, Columns]
) -> list[tuple[Map, list[int]]]:
    """d x = c0 * g, and so on, two inputs to a pass: the maps of the gradients, and what each is of."""
    slots = [k for k in range(5) if wanted[k]]
    pairs = [slots[first : first + 2] for first in range(0, len(slots), 2)]
    of_pair = [tuple(c for k in pair for c in (*(of[k] for of in columns), ABSENT)) for pair in pairs]
    return [(map_of(op, maps), pair) for maps, pair in zip(of_pair, pairs, strict=True)]


_kept_gradient_maps = lru_cache(maxsize=512)(_made_gradient_maps)


def _gradient_maps(op: str, wanted: tuple[Any, ...], columns: tuple[Columns, Columns, Columns]) -> Any:
    return (_made_gradient_maps if is_dynamo_compiling() else _kept_gradient_maps)(op, wanted, columns)


def _clamped_gradients(
    needs: Sequence[Any],
    given: Given,
    spec: Map,
    inputs: Inputs,
    noise: Noise | Tensor | None,
    rows: Coefficients,
    bounds: Bounds,
) -> Gradients:
    """The estimate counts as one more output, the only one that reads y. All in the compute type."""
    dtype, op, estimate = given[0][0].dtype, spec.op, of_estimate(spec)
    found = _gated_gradients(needs, given, spec, inputs, rows, bounds)
    if found is not None and not needs[5]:
        return [*found, None]
    given = [(widened(g), columns) for g, columns in given]
    inner: Given = [(_estimate_gradient(given, inputs, rows, estimate, bounds), estimate.columns_of(0))]
    outer = _besides_estimate(given)
    if found is None:
        found = [None if t is None else t.to(dtype) for t in _input_gradients(needs, outer + inner, rows, op)]
    if not needs[5]:
        return [*found, None]
    x, y, z, w = (widened(t) for t in inputs)
    clamped = affine(estimate, (x, y, None, w), None, rows)[0].clamp(*bounds)
    sums = _column_sums(needs[5], given, (x, clamped, z, w), _wide_noise(noise), spec)
    for c, of_inner in _column_sums(needs[5], inner, (x, y, None, w), None, estimate).items():
        sums[c] = sums[c] + of_inner if c in sums else of_inner
    return [*found, sums]


def _besides_estimate(given: Given) -> Given:
    return [(g, (c0, ABSENT, *others)) for g, (c0, _, *others) in given]


def _gated_gradients(
    needs: Sequence[Any], given: Given, spec: Map, inputs: Inputs, rows: Coefficients, bounds: Bounds
) -> list[Any] | None:
    """Of the five streams, where a kernel makes those of the estimate's in one pass; else None."""
    (g1, columns1), (g2, columns2) = given[0], (*given, *_NOT_GIVEN)[1]
    x, y, _, w = inputs
    if torch.is_grad_enabled() or route(spec.op, g1, g2, *inputs) is not Route.DIRECT or not extended(g1, spec.op):
        return None
    found = _input_gradients((False, False, needs[2], False, needs[4]), _besides_estimate(given), rows, spec.op)
    a0, a1, _, a3 = of_estimate(spec).columns
    of_inputs = [(slot, a) for slot, a in ((0, a0), (1, a1), (3, a3)) if needs[slot]]
    for first in range(0, len(of_inputs), 2):
        pair = of_inputs[first : first + 2]
        outer = [(columns1[k], columns2[k]) if k != 1 else (ABSENT, ABSENT) for k, _ in pair]
        maps = tuple(c for (_, a), (c1, _) in zip(pair, outer, strict=True) for c in (ABSENT, a, c1, ABSENT))
        fifth = () if g2 is None else tuple(c2 for _, c2 in outer)
        gated = map_of(spec.op, maps + fifth, (a0, a1, a3, columns1[1], columns2[1]))
        for (k, _), gradient in zip(pair, affine(gated, (x, y, g1, w), g2, rows, bounds), strict=True):
            found[k] = gradient
    return found


def _estimate_gradient(given: Given, inputs: Inputs, rows: Coefficients, estimate: Map, bounds: Bounds) -> Tensor:
    """0 outside the bounds and for NaN, as torch.clamp's: lo <= estimate <= hi decides.

    Without a bool tensor: on a CPU torch.where takes ten times as long for one as all of this.
    """
    x, y, _, w = inputs
    # Made again, and not rounded: other elements would be within the bounds.
    value = affine(estimate, (widened(x), widened(y), None, widened(w)), None, rows)[0].detach()
    low, high, neginf, posinf = _open_interval(*bounds, value.dtype)
    value.nan_to_num_(math.inf, posinf, neginf)
    g = _input_gradients((False, True, False, False, False), given, rows, estimate.op)[1]
    return torch.ops.aten.hardtanh_backward(g, value, low, high)


def widened(t: Any) -> Any:
    """In the dtype of the arithmetic."""
    return None if t is None else t.to(compute_dtype(t.dtype))


def _wide_noise(noise: Any) -> Any:
    return widened(noise) if isinstance(noise, Tensor) else noise


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


def _column_sums(
    wanted: Any, given: Given, inputs: Inputs, noise: Noise | Tensor | None, spec: Map
) -> dict[int, Tensor]:
    streams: list[Any] = [*inputs, None]
    if noise is not None:
        streams[NOISE if spec.fifth else Z] = noise
    sums: dict[int, Tensor] = {}
    for g, columns in given:
        slots = [
            k
            for k, c in enumerate(columns)
            if c != ABSENT and streams[k] is not None and (wanted is True or c in wanted)
        ]
        slots.sort(key=lambda k: isinstance(streams[k], Noise))  # whose place in a launch is the third
        for some in (slots[:3], slots[3:]):
            tensors = [streams[k] for k in some if isinstance(streams[k], Tensor)]
            drawn = streams[some[-1]] if len(tensors) < len(some) else None
            if some:
                operands: Any = (*tensors, *[None] * (4 - len(tensors)))
                dots = row_dots(spec.op, g, operands, drawn).to(compute_dtype(g.dtype)).unbind(1)
                for k, dot in zip(some, (*dots[: len(tensors)], dots[2]), strict=False):
                    c = columns[k]
                    sums[c] = sums[c] + dot if c in sums else dot
    return sums


def table_gradient(sums: dict[int, Tensor] | None, rows: Coefficients) -> Tensor | None:
    """Of the columns' sums, gathered to the table's rows."""
    if not sums:
        return None
    table, index = rows
    zero = torch.zeros_like(next(iter(sums.values())))
    per_row = torch.stack([sums.get(c, zero) for c in range(table.shape[1])], -1)
    if index is not None:
        return torch.zeros_like(table).index_add(0, index, per_row)
    return per_row.sum(0, keepdim=True) if table.shape[0] == 1 else per_row


def row_dots(op: str, g: Tensor, inputs: Inputs, noise: Noise | None) -> Tensor:
    """(B, 3) sums over each sample of g*x, g*y, g*z."""
    if route(op, g, *inputs) is Route.DIRECT and not wants_grad(g, *inputs):
        return kernels(g, op).row_dots(g, inputs, noise)
    compute = compute_dtype(g.dtype)
    wide = g.to(compute)
    x, y, z, _ = inputs
    if noise is not None:
        z = noise.normal(g.shape, dtype=compute, device=g.device)
    sums = [torch.zeros_like(wide) if t is None else wide * t for t in (x, y, z)]
    return torch.stack([reference.per_sample_sum(s) for s in sums], -1)


class _Affine(DirectFunction):
    """Eager: outputs that were made get their gradients.

    The noise's key and ids are saved as tensors are, for a change before backward to be noticed.

    columns: numbers and tensors, of which the core has worked the table out, where one of them wants a gradient
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        z: Tensor | None,
        w: Tensor | None,
        v: Tensor | None,
        table: Any,
        rest: tuple[Any, ...],
        *columns: Any,
    ) -> Any:
        made, index, spec, noise, bounds = rest
        ctx.set_materialize_grads(False)
        inputs = x, y, z, w
        read: tuple[Tensor | None, ...] = ()
        constants = type(table) is tuple
        if spec.blends or columns or (not constants and table.requires_grad):
            read = *inputs, v
        elif spec.inner is not None:
            read = x, y, None, w, None
        learned = [c if isinstance(c, Tensor) else None for c in columns]
        in_memory = () if noise is None else tuple(t for t in (noise._key_tensor, noise._sample) if t is not None)
        ctx.save_for_backward(None if constants else table, index, *learned, *read, *in_memory)
        numbers = [None if isinstance(c, Tensor) else c for c in columns]
        ctx.rest = noise, spec, bounds, table if constants else None, len(read), numbers
        return made

    @staticmethod
    @batchable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        table, index, *saved = ctx.saved_tensors
        noise, spec, bounds, row, count, numbers = ctx.rest
        learned, read = saved[: len(numbers)], saved[len(numbers) :]
        inputs: Any = tuple(read[:4]) if count else (None,) * 4
        v = read[4] if count else None
        rows, noise = Coefficients(table if row is None else row, index), noise if v is None else v
        needs = ctx.needs_input_grad
        if not numbers:
            *found, sums = gradients(needs, grads, spec, inputs, noise, rows, bounds)
            return (*found, table_gradient(sums, rows), None)
        if torch.is_grad_enabled():  # differentiable in turn
            columns = tuple(n if c is None else c for n, c in zip(numbers, learned, strict=True))
            rows = stack_rows(spec.op, columns, inputs[0], table.dtype)
        wanted = [k for k, needed in enumerate(needs[7:]) if needed]
        *found, sums = gradients((*needs[:5], wanted), grads, spec, inputs, noise, rows, bounds)
        return (*found, None, None, *_column_gradients(learned, sums or {}, rows))


def _column_gradients(columns: Sequence[Any], sums: dict[int, Tensor], rows: Coefficients) -> list[Tensor | None]:
    """Of those of the columns that have sums."""
    found: list[Tensor | None] = [None] * len(columns)
    if rows.table.shape[0] == 1 and (of_one := table_gradient(sums, rows)) is not None:
        sums = {k: of_one[:, k] for k in sums}
    for k, each in sums.items():
        if each.numel() > columns[k].numel():  # one number for all samples
            each = each.double().sum()
        found[k] = each.to(columns[k].dtype).reshape(columns[k].shape)
    return found


def with_gradients(
    made: Any, spec: Map, inputs: Inputs, noise: Noise | Tensor | None, rows: Any, bounds: Bounds | None
) -> Any:
    """The output, or the outputs, of a call that wants gradients. The core calls it for plain ones, whose t may be a
    row's number, or the columns of a table that it has worked out of tensors that want gradients."""
    table, t = rows
    columns = t if isinstance(t, tuple) else ()
    if isinstance(t, int):
        table, t = rows_at(table, t)
    v, drawn = (noise, None) if isinstance(noise, Tensor) else (None, noise)
    index = None if columns else t
    made = made[0] if isinstance(made, tuple) and len(made) == 1 else made
    return _Affine.apply(*inputs, v, table, (made, index, spec, drawn, bounds), *columns)


if (_core := dispatch.module("native")) is not None:
    _core.use_gradients(with_gradients)
