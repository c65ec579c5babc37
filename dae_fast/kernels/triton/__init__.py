"""The Triton kernels of kernels.py: tensors in, one launch out.

Functions here take checked tensors of one shape, dtype and device, and allocate the results. Kernels are
compiled from types alone, never from a value: a new seed, batch or pointer runs what is there. Nothing
reads device memory on the host.
"""

from __future__ import annotations

import functools
import math
import operator
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import current_raw_stream
from ..reference import embedding as embedding  # few numbers, made by torch
from ..scratch import workspace
from ..spec import (
    ABSENT,
    Bounds,
    Coefficients,
    Found,
    Inputs,
    Kind,
    Loss,
    Map,
    Reduction,
    Residual,
    Update,
    Wanted,
    compute_dtype,
    on_device,
    rows_at,
)

try:
    import triton
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error}); pip install triton") from error
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import chains, kernels
from . import gaussian as gaussians

if TYPE_CHECKING:
    from ...noise import Noise

INTERPRETED: bool = triton.knobs.runtime.interpret
# Whose square root the kernels use (sqrt_rn).
_NVIDIA = not INTERPRETED and torch.version.hip is None

BLOCK = 4  # elements of a Philox block
THREADS = 128  # of a program, one lane each
# Enough programs to fill the largest GPUs (132 SMs of 16); beyond that a program takes more steps, which
# share its row's key and coefficients. The running sums of a loss are fp32: no more than 64 terms each.
_PROGRAMS = 2048
_STEPS_MAP, _STEPS_SUM = 8, 64

_NO_NOISE, _FOLDED, _RAW, _SPANNED = 0, 1, 2, 3

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
_LANE = {torch.float32: 4, torch.float64: 2, torch.bfloat16: 8, torch.float16: 8, torch.int64: 2, torch.bool: 8}

Key = tuple[Any, ...]
Grid = tuple[int, int, int]
Operands = tuple[Tensor | None, ...]
# The last two of a row's three sizes, then channels and lanes of each where those lie side by side (kernels.logical);
# and for each operand the strides of the batch and of those three. None where contiguous.
Layout = tuple[tuple[int, ...] | None, tuple[tuple[int, ...] | None, ...]]
CONTIGUOUS: Layout = (None, (None,) * 7)  # of as many as a kernel may have
# A row that does not merge to three dimensions (or is beyond 32-bit indices): its operands are copied.
SCATTERED: Layout = (None, ())


class Batch(NamedTuple):
    """What a launch is planned from: the samples, and how their tensors lie in memory.

    aligned: whether every contiguous operand is on 16 bytes
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool
    layout: Layout

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, the elements D of a row, and those of a lane."""
        return self.shape[0], _row(self.shape), _LANE[self.dtype]


def available() -> str:
    """ "" when the kernels can run here, else the reason."""
    if INTERPRETED or torch.cuda.is_available():
        return ""
    return "Triton needs a CUDA or HIP device, and torch sees none (TRITON_INTERPRET=1 runs the kernels on the CPU)"


def describe() -> str:
    """For df.info()."""
    return f"{triton.__version__}, {'interpreted on the CPU' if INTERPRETED else torch.cuda.get_device_name()}"


def supports(device: torch.device) -> bool:
    """Whether tensors on `device` can be given to the kernels."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def source(kernel: Any, args: tuple[Any, ...]) -> ASTSource:
    """What the compiler is given for a kernel called with `args`: their types, and which are aligned."""
    values = dict(zip(kernel.arg_names, args, strict=True))
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature: dict[str, Any] = {}
    for name, value in values.items():
        signature[name] = "constexpr" if name in constexprs else _type(value)
    operands = [n for n in values if isinstance(values[n], Tensor) and values.get(f"{n}_strides") is None]
    aligned = [n for n in operands if n == "out" or f"{n}_strides" in values] if values.get("ALIGNED") else []
    return ASTSource(
        kernel,
        signature,
        {n: v for n, v in values.items() if signature[n] == "constexpr"},
        {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )


def _type(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(v) for v in value)
    return "constexpr" if value is None else "i64"


def _may_take_64_registers(per_sample: Any = None, thresholds: Any = None, **others: Any) -> bool:
    """Losses that need no more, and that ptxas would fit into 40, making Philox's keys again for every block."""
    if per_sample is None or others["KIND"] == Kind.pseudo_huber or (thresholds is not None and others["NOISE"]):
        return False
    return others["ALIGNED"] and others["sizes"] is None and others["LANES"] >= 32


def compile_for(target: GPUTarget, kernel: Any, args: tuple[Any, ...]) -> Any:
    options = {"num_warps": THREADS // target.warp_size, "num_stages": 1, "enable_fp_fusion": False}
    if _may_take_64_registers(**dict(zip(kernel.arg_names, args, strict=True))):
        options["maxnreg"] = 64
    return triton.compile(source(kernel, args), target=target, options=options)


class _Call:
    """All of a launch that its tensors' types and shapes decide: made once for each, looked up by each call."""

    __slots__ = ("compiled", "device", "fixed", "grid", "kernel", "key", "parts")

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        grid: Grid,
        types: Key,
        runtime: tuple[Any, ...],
        spec: Key,
        parts: int = 0,
    ) -> None:
        self.kernel, self.device, self.grid = kernel, device, grid
        self.fixed = (*runtime, *spec)  # the last of the kernel's arguments
        self.key = kernel.__name__, device, types, spec  # what the code depends on
        # Doubles that the programs of a loss leave for the last one: few sizes, which torch's cache then has.
        self.parts = parts and triton.next_power_of_2(parts)
        self.compiled: Any = None


_compiled: dict[Key, Any] = {}


def _launch(call: _Call, args: tuple[Any, ...]) -> None:
    """Runs the kernel on the device's current stream.

    Triton's own kernel[grid](...) would look at every argument again in each call.
    """
    if INTERPRETED:
        call.kernel[call.grid](*args, *call.fixed)
        return
    index = call.device.index
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            _launch(call, args)
        return
    args = (*args, *call.fixed)
    compiled = call.compiled
    if compiled is None:
        compiled = call.compiled = _compiled.get(call.key) or _compile(call, args)
    run = compiled.run  # loads the kernel, and so comes before compiled.function
    stream = current_raw_stream(index)
    run(*call.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


def _compile(call: _Call, args: tuple[Any, ...]) -> Any:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{call.kernel.__name__} is not compiled yet for these dtypes, layouts and options, and no kernel can be "
            "loaded while a CUDA stream is captured; make the same call once before the capture"
        )
    target = triton.runtime.driver.active.get_current_target()
    # Another thread may have been the first.
    return _compiled.setdefault(call.key, compile_for(target, call.kernel, args))


def _plan(B: int, D: int, V: int, most_steps: int) -> tuple[Grid, int, int, int]:
    """(grid, steps, ROWS, LANES): programs along a row, then row groups, in two numbers as each is 16 bits."""
    lanes = -(-D // V)
    LANES = THREADS if lanes >= 4 * THREADS else min(32, triton.next_power_of_2(lanes))
    ROWS = THREADS // LANES
    groups, tiles = -(-B // ROWS), -(-lanes // LANES)
    steps = max(1, min(most_steps, groups * tiles // _PROGRAMS, tiles))
    if most_steps == _STEPS_SUM and groups >= _PROGRAMS // 2:
        steps = min(most_steps, tiles)  # enough programs without cutting rows: nothing left to add up
    along = -(-tiles // steps)
    z = -(-groups // 65535)
    return (along, -(-groups // z), z), -(-tiles // along), ROWS, LANES


def _bits(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


# Of a kernel: seed, offset, key, sample and first_sample; and, where words choose elements, thresholds and
# threshold_step.
Address = tuple[int | None, int | None, Tensor | None, Tensor | None, Any]
Choice = tuple[int | None, int | None, Tensor | None, Tensor | None, int | None, Tensor | None, int | None]
_NO_KEY: Address = (None,) * 5
_NO_CHOICE: Choice = (None,) * 7


def _noise(noise: Noise | None, device: torch.device, row: int) -> Address:
    """row: the elements of one row of the batch."""
    if noise is None:
        return _NO_KEY
    key = noise._key_tensor
    first_sample: Any = noise._first_sample
    if noise._span is not None:
        rows, first = noise._span
        first_sample = (first_sample, rows, first // BLOCK, row // BLOCK)
    if key is not None and key.device != device:
        seed, offset = key.tolist()  # in host memory: nothing waits for a device
        return seed, offset, None, noise._sample, first_sample
    return noise._seed, noise._offset, key, noise._sample, first_sample


def _row(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _mode(noise: Noise | None) -> int:
    if noise is None:
        return _NO_NOISE
    return _FOLDED if noise._span is None else _SPANNED


def _choice(noise: Noise, thresholds: Tensor, device: torch.device) -> Choice:
    return (*_noise(noise, device, 0), _on(device, thresholds.contiguous()), 2 if thresholds.shape[0] > 1 else 0)


def _on(device: torch.device, table: Tensor) -> Tensor:
    """A row of constants, which lies in host memory, where the kernels read it."""
    if table.device == device:
        return table
    if torch.cuda.is_current_stream_capturing():
        return on_device(table, device)  # the graph's own memory
    # By stream: what is dropped with the row may still be read there, and is used again after that.
    copies: dict[tuple[int, int], Tensor] = vars(table).setdefault("_copies", {})
    stream = device.index, current_raw_stream(device.index)
    if stream not in copies:
        copies[stream] = on_device(table, device)
    return copies[stream]


def _batch(operands: Operands, ordered: bool) -> Batch:
    """Of operands like the first.

    ordered: elements are told apart by their logical place (noise). Where they are not, operands that all
    lie densely in one other order (channels_last) are as good as contiguous.
    """
    first = operands[0]
    assert first is not None
    places = 0
    strided = False
    for t in operands:
        if t is not None:
            if t.is_contiguous():
                places |= t.data_ptr()
            else:
                strided = True
    layout = CONTIGUOUS
    if strided:
        layout = _strided(operands, ordered)
        if layout is CONTIGUOUS:  # dense in another order
            places = functools.reduce(operator.or_, (t.data_ptr() for t in operands if t is not None))
    return Batch(first.shape, first.dtype, first.device, places & 15 == 0, layout)


def _strided(operands: Operands, ordered: bool) -> Layout:
    given = [t for t in operands if t is not None]
    first = given[0]
    if not ordered and all(t.stride() == first.stride() for t in given):
        for memory_format, rank in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if first.dim() == rank and first.is_contiguous(memory_format=memory_format):
                return CONTIGUOUS
    sizes = list(first.shape[1:])
    strides = [None if t is None or t.is_contiguous() else list(t.stride()) for t in operands]
    merge_dimensions(sizes, strides)
    if len(sizes) > 3 or math.prod(sizes) >= 2**31:
        return SCATTERED
    missing = 3 - len(sizes)
    sizes = [1] * missing + sizes
    whole = [None if s is None else (s[0], *[0] * missing, *s[1:]) for s in strides]
    guide, V = next(s for s in whole if s is not None), _LANE[first.dtype]
    by_channels = 0 < guide[2] < guide[3] and sizes[2] % V == 0
    order = (sizes[1], sizes[2] // V) if by_channels else ()
    return (sizes[1], sizes[2], *order), tuple(whole)


def merge_dimensions(sizes: list[int], strides: list[list[int] | None]) -> None:
    """Makes neighbouring dimensions that every strided operand walks as one into one, in place.

    sizes: of a row's dimensions; strides: the batch stride first.
    """
    d = 0
    while d + 1 < len(sizes):
        if sizes[d] != 1 and any(s is not None and s[d + 1] != s[d + 2] * sizes[d + 1] for s in strides):
            d += 1
            continue
        sizes[d + 1] *= sizes[d]
        del sizes[d]
        for s in strides:
            if s is not None:
                del s[d + 1]


def _contiguous(*operands: Tensor | None) -> Operands:
    return tuple(None if t is None else t.contiguous() for t in operands)


def _copy_back(written: Operands, results: Operands) -> None:
    for made, result in zip(written, results, strict=False):
        if result is not None and made is not None and result is not made:
            result.copy_(made)


def _types_of(layout: Layout) -> Key:
    """What of a layout the code depends on."""
    return len(layout[0] or ()), *(s is None for s in layout[1])


@functools.lru_cache(maxsize=4096)
def _affine_call(
    spec: Map,
    bounds: Bounds | None,
    batch: Batch,
    absent: tuple[bool, ...],
    index: torch.dtype | None,
    table: tuple[int, int],
    noise: int,
) -> _Call:
    B, D, V = batch.sizes
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_MAP)
    levels, K = table
    columns, inner = spec.columns, spec.inner
    constexprs = (
        columns[:4],
        columns[4:],
        None if inner is None else (inner[0], inner[1], ABSENT, inner[2]),
        (*spec.fifth, *[ABSENT] * (4 - spec.outputs)) if spec.fifth else None,
        K,
        levels == 1 and index is None,
        noise,
        batch.aligned and D % V == 0,
        ROWS,
        LANES,
        V,
        _NVIDIA,
    )
    low, high = (None, None) if bounds is None else (_bits(bounds[0]), _bits(bounds[1]))
    sizes, strides = batch.layout
    runtime = levels, low, high, B, D, steps, sizes, *strides
    types = batch.dtype, absent, index, _types_of(batch.layout)
    return _Call(kernels.affine_kernel, batch.device, grid, types, runtime, constexprs)


# Of csrc/call.cpp: whether its tensors, which are contiguous, are on 16 bytes; B and D; their dtype.
Plain = tuple[bool, tuple[int, int], torch.dtype]


def _plain_batch(plain: Plain, device: torch.device) -> Batch:
    aligned, shape, dtype = plain
    return Batch(shape, dtype, device, aligned, CONTIGUOUS)


def fast_map(
    plain: Plain,
    spec: Map,
    inputs: Inputs,
    noise: Noise | Tensor | None,
    rows: tuple[Any, Any],
    bounds: Bounds | None,
    outs: tuple[Tensor, ...],
) -> None:
    """For csrc/call.cpp, which has checked that the tensors are contiguous. A row's number is of one row for all."""
    v, noise = (noise, None) if isinstance(noise, Tensor) else (None, noise)
    operands = (*inputs, v, *outs, *[None] * (2 - len(outs)))
    _run_affine(spec, bounds, _plain_batch(plain, outs[0].device), operands, noise, rows_at(*rows))


def affine(
    spec: Map,
    inputs: Inputs,
    noise: Noise | Tensor | None,
    rows: Coefficients,
    bounds: Bounds | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As reference.affine, in one launch. `out` is written instead of a new tensor; it may be an input."""
    x = inputs[0]
    assert x is not None
    if out is None:
        out = torch.empty_like(x)
    results: tuple[Tensor, ...] = (out, torch.empty_like(x)) if spec.outputs == 2 else (out,)
    if 0 in x.shape:
        return results
    v, noise = (noise, None) if isinstance(noise, Tensor) else (None, noise)
    operands: Operands = (*inputs, v, out, results[1] if spec.outputs == 2 else None)
    batch = _batch(operands, noise is not None)
    copied = batch.layout is SCATTERED
    if copied:
        operands = _contiguous(*operands)
        batch = _batch(operands, noise is not None)
    _run_affine(spec, bounds, batch, operands, noise, rows)
    if copied:
        _copy_back(operands[5:], results)
    return results


def _run_affine(
    spec: Map,
    bounds: Bounds | None,
    batch: Batch,
    operands: Operands,
    noise: Noise | None,
    rows: Coefficients,
) -> None:
    """operands: x, y, z, w, v, out and a second or None."""
    x, y, z, w, v, out, second = operands
    table, index = rows.dense(spec.op, compute_dtype(batch.dtype))
    table = _on(batch.device, table)
    address = _noise(noise, batch.device, _row(batch.shape))
    _, _, key, sample, _ = address
    call = _affine_call(
        spec,
        bounds,
        batch,
        (y is None, z is None, w is None, v is None, key is None, sample is None),
        None if index is None else index.dtype,
        table.shape,
        _mode(noise),
    )
    _launch(call, (x, y, z, w, v, out, second, table, index, *address))


# Of a loss: whether a drawn mask counts what it leaves, and whether the gradient was made before.
Terms = tuple[bool, bool]


def _final_rows(B: int, tiles: int) -> int:
    """The shape with which the last program of a loss takes the fewest turns, of few: each is compiled by itself."""
    at_once = kernels.FINAL.value * kernels.TILES_AT_ONCE.value
    return min((1, 16, 128), key=lambda rows: -(-B // rows) * -(-tiles * rows // at_once))


@functools.lru_cache(maxsize=4096)
def _residual_call(
    fixed: Loss,
    batch: Batch,
    absent: tuple[bool, ...],
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
    table: tuple[int, int],
    noise: int,
    terms: Terms,
) -> _Call:
    """absent: grad, kept and loss, then all whose absence changes nothing but the code
    dtypes: of the index and the weight, None for none
    """
    no_grad, all_count, no_loss = absent[:3]
    columns, kind, reduction = fixed.columns, int(fixed.kind), int(fixed.reduction)
    keeps, made = terms
    B, D, V = batch.sizes
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_SUM)
    tiles = grid[0]
    summed = no_grad or not no_loss
    levels, K = table
    # Of the gradient, without what differs from row to row.
    each = 1.0 / D if reduction != Reduction.sum and all_count else 1.0
    factor = 2.0 * each / (B if reduction == Reduction.mean else 1)  # rounded as gradient_scale of csrc/args.h
    spec = (
        (ABSENT, *columns[:3]),
        (*columns[3:], ABSENT),
        kind,
        keeps,
        K,
        levels == 1 and dtypes[0] is None,
        noise,
        reduction,
        made,
        _final_rows(B, tiles) if summed and tiles > 1 else 0,
        batch.aligned and D % V == 0,
        ROWS,
        LANES,
        V,
        _NVIDIA,
    )
    sizes, strides = batch.layout
    types = batch.dtype, absent, *dtypes, _types_of(batch.layout)
    parts = 0
    if summed and tiles > 1:
        parts = B * tiles
    elif not no_loss:
        parts = -(-B // ROWS) * (1 if columns[4] == ABSENT else 3)  # a sum of each program, and two more for `also`
    runtime = levels, _bits(factor), B, D, steps, sizes, *strides[:5]
    return _Call(kernels.residual_kernel, batch.device, grid, types, runtime, spec, parts)


def residual(spec: Loss, operands: Residual, rows: Coefficients, wanted: Wanted) -> Found:
    """One pass over pred: the unweighted mean of each sample, the weighted loss, its gradient.

    The kernel reads an upstream gradient. A gradient that was made before is left as it is when upstream is 1 and made
    again in place otherwise. None for the means when only the gradient is wanted, and for the loss unless it is wanted.
    A mask costs a second launch: how many elements count must be known first.
    """
    pred, y, z, noise, mask = operands
    shape, device = pred.shape, pred.device
    table, index = rows.dense(spec.op, compute_dtype(pred.dtype))
    table, upstream, made = _on(device, table), wanted.upstream, wanted.made
    means = table.new_empty(shape[0]) if wanted.loss or not wanted.grad else None
    loss = table.new_empty(()) if wanted.loss else None
    grad = (torch.empty_like(pred) if made is None else made) if wanted.grad else None
    if made is not None and upstream is None:
        return Found(means, loss, made)
    if 0 in shape:
        for nothing in (means, loss, wanted.also):
            if nothing is not None:
                nothing.zero_()
        return Found(means, loss, grad)
    drawn, stored = (None, mask) if mask is None or isinstance(mask, Tensor) else (mask, None)
    ordered = noise is not None or drawn is not None
    lying: Operands = (pred, y, z, stored, grad)
    batch = _batch(lying, ordered)
    copied = batch.layout is SCATTERED
    if copied:
        lying = _contiguous(*lying)
        batch = _batch(lying, ordered)
    choice, keeps, kept = _NO_CHOICE, False, wanted.kept
    unless_one = None if made is None else upstream
    if drawn is not None:
        choice, keeps = _choice(drawn.noise, drawn.thresholds, device), drawn.visible
        kept = _count_drawn(shape, choice, keeps, device, unless_one) if kept is None else kept
    elif lying[3] is not None and kept is None:
        kept = _count_stored(lying[3], unless_one)
    weight = None if wanted.weight is None else wanted.weight.contiguous()
    per_row, terms = (table, index, weight, kept, upstream), (keeps, made is not None)
    streams = _noise(noise, device, _row(shape)), choice, _mode(noise)
    _run_residual(spec, batch, terms, lying, streams, per_row, (means, loss, wanted.also))
    if copied:
        _copy_back(lying[4:], (grad,))
    return Found(means, loss, grad, kept)


def fast_loss(
    plain: Plain,
    spec: Loss,
    operands: tuple[Any, ...],
    rows: tuple[Any, Any],
    weight: Tensor | None,
    results: Operands,
) -> None:
    """For csrc/call.cpp, as fast_map. operands: pred, y, z, noise; results: loss, gradient, also."""
    (pred, y, z, noise), (loss, grad, also) = operands, results
    batch = _plain_batch(plain, pred.device)
    B, D, _ = batch.sizes
    table, index = rows_at(*rows).dense(spec.op, compute_dtype(batch.dtype))
    table = _on(batch.device, table)
    per_row, made = (table, index, weight, None, None), (table.new_empty(B), loss, also)
    streams = _noise(noise, batch.device, D), _NO_CHOICE, _mode(noise)
    _run_residual(spec, batch, (False, False), (pred, y, z, None, grad), streams, per_row, made)


def _run_residual(
    spec: Loss,
    batch: Batch,
    terms: Terms,
    operands: Operands,
    streams: tuple[Address, Choice, int],
    per_row: Operands,
    results: Operands,
) -> None:
    """operands: pred, y, z, mask, grad; streams: of the noise and of what draws the mask, and the noise's mode;
    per_row: table, index, weight, kept, upstream; results: means, loss, also."""
    _, y, z, mask, grad = operands
    table, index, weight, kept, upstream = per_row
    _, loss, _ = results
    assert table is not None
    address, choice, mode = streams
    _, _, key, sample, _ = address
    call = _residual_call(
        spec,
        batch,
        (
            grad is None,
            kept is None,
            loss is None,
            y is None,
            z is None,
            mask is None,
            upstream is None,
            key is None,
            sample is None,
            choice[5] is None,
            choice[2] is None,
            choice[3] is None,
        ),
        (None if index is None else index.dtype, None if weight is None else weight.dtype),
        (table.shape[0], table.shape[1]),
        mode,
        terms,
    )
    room = workspace(batch.device, call.parts) if call.parts else (None, None)
    _launch(call, operands + per_row + address + choice + room + results)


@functools.lru_cache(maxsize=4096)
def _count_call(batch: Batch, types: Key, V: int, keeps: bool, times: int) -> _Call:
    B, D, _ = batch.sizes
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_SUM)
    sizes, strides = batch.layout
    spec = keeps, batch.aligned and D % V == 0, ROWS, LANES, V
    types = *types, _types_of(batch.layout)
    return _Call(kernels.count_kernel, batch.device, grid, types, (B, D, steps, times, sizes, strides[0]), spec)


def _count_drawn(
    shape: tuple[int, ...], choice: Choice, keeps: bool, device: torch.device, unless_one: Tensor | None = None
) -> Tensor:
    """(B,) int64: how many elements of each sample a drawn mask has. Nothing is counted where unless_one holds 1."""
    kept = torch.zeros(shape[0], dtype=torch.int64, device=device)
    types = True, choice[2] is None, choice[3] is None, None if unless_one is None else unless_one.dtype
    batch = Batch(shape, torch.bool, device, False, CONTIGUOUS)
    call = _count_call(batch, types, BLOCK, keeps, 1)
    _launch(call, (kept, None, *choice, unless_one))
    return kept


def _count_stored(mask: Tensor, unless_one: Tensor | None = None) -> Tensor:
    """The same of a mask in memory; what is expanded along a row is read once."""
    kept = torch.zeros(mask.shape[0], dtype=torch.int64, device=mask.device)
    times = 1
    for d in range(1, mask.dim()):
        if mask.stride(d) == 0:
            times *= mask.shape[d]
            mask = mask.narrow(d, 0, 1)
    types = False, None if unless_one is None else unless_one.dtype
    call = _count_call(_batch((mask,), False), types, _LANE[torch.bool], False, times)
    _launch(call, (kept, mask, *_NO_CHOICE, unless_one))
    return kept


@functools.lru_cache(maxsize=4096)
def _corrupt_call(batch: Batch, present: tuple[bool, ...]) -> _Call:
    B, D, V = batch.sizes
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_MAP)
    sizes, strides = batch.layout
    runtime = B, D, steps, sizes, *strides[:2]
    spec = batch.aligned and D % V == 0, ROWS, LANES, V
    types = batch.dtype, present, _types_of(batch.layout)
    return _Call(kernels.corrupt_kernel, batch.device, grid, types, runtime, spec)


def corrupt(x: Tensor, noise: Noise, thresholds: Tensor, values: Bounds) -> Tensor:
    """As reference.corrupt, in one launch."""
    out = torch.empty_like(x)
    if 0 in x.shape:
        return out
    batch = _batch((x, out), True)
    if batch.layout is SCATTERED:
        return corrupt(x.contiguous(), noise, thresholds, values)
    choice = _choice(noise, thresholds, x.device)
    call = _corrupt_call(batch, (choice[2] is None, choice[3] is None))
    _launch(call, (x, out, *choice, *map(_bits, values)))
    return out


@functools.lru_cache(maxsize=4096)
def _row_dots_call(batch: Batch, present: tuple[bool, ...], noise: int) -> _Call:
    B, D, V = batch.sizes
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_SUM)
    spec = noise, batch.aligned and D % V == 0, ROWS, LANES, V, _NVIDIA
    sizes, strides = batch.layout
    runtime = B, D, steps, sizes, *strides[:4]
    types = batch.dtype, present, _types_of(batch.layout)
    return _Call(kernels.row_dots_kernel, batch.device, grid, types, runtime, spec)


def row_dots(g: Tensor, inputs: Inputs, noise: Noise | None) -> Tensor:
    """(B, 3) fp64: the sums over each row of g*x, g*y and g*z."""
    shape, device, (x, y, z, w) = g.shape, g.device, inputs
    if 0 in shape:
        return torch.zeros(shape[0], 3, dtype=torch.float64, device=device)
    batch = _batch((g, x, y, z), noise is not None)
    if batch.layout is SCATTERED:
        x, y, z = _contiguous(x, y, z)
        return row_dots(g.contiguous(), (x, y, z, w), noise)
    seed, offset, key, sample, first = _noise(noise, device, _row(shape))
    present = x is None, y is None, z is None, key is None, sample is None
    call = _row_dots_call(batch, present, _mode(noise))
    tiles = call.grid[0]
    out = torch.empty(shape[0], tiles, 3, dtype=torch.float64, device=device)
    _launch(call, (g, x, y, z, out, seed, offset, key, sample, first))
    return out[:, 0] if tiles == 1 else out.sum(1)


@functools.lru_cache(maxsize=4096)
def _gaussian_call(kernel: Any, batch: Batch, present: tuple[bool, ...], noise: int, operands: int) -> _Call:
    B, D, V = batch.sizes
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_SUM)
    spec = noise, batch.aligned and D % V == 0, ROWS, LANES, V, _NVIDIA
    sizes, strides = batch.layout
    runtime = B, D, steps, sizes, *strides[:operands]
    types = batch.dtype, present, _types_of(batch.layout), grid[0] == 1
    return _Call(kernel, batch.device, grid, types, runtime, spec)


def gaussian(mu: Tensor, log_var: Tensor, eps: Tensor | None, noise: Noise | None) -> tuple[Tensor, Tensor]:
    """As reference.gaussian, in one launch; where a row is cut, the parts of its divergence are added after it."""
    z, shape, device = torch.empty_like(mu), mu.shape, mu.device
    compute = torch.float64 if mu.dtype == torch.float64 else torch.float32
    if 0 in shape:
        return z, torch.zeros(shape[0], dtype=compute, device=device)
    batch = _batch((mu, log_var, eps, z), noise is not None)
    if batch.layout is SCATTERED:
        dense, *rest = _contiguous(mu, log_var, eps)
        assert dense is not None and rest[0] is not None
        return gaussian(dense, rest[0], rest[1], noise)
    address = _noise(noise, device, _row(shape))
    present = eps is None, address[2] is None, address[3] is None
    call = _gaussian_call(gaussians.gaussian_kernel, batch, present, _mode(noise), 4)
    tiles = call.grid[0]
    kl = torch.empty(shape[0], tiles, dtype=compute if tiles == 1 else torch.float64, device=device)
    _launch(call, (mu, log_var, eps, z, kl, *address))
    return z, kl[:, 0] if tiles == 1 else kl.sum(1).to(compute)


def gaussian_grad(
    mu: Tensor,
    log_var: Tensor,
    eps: Tensor | None,
    noise: Noise | None,
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As native.gaussian_grad, in one launch."""
    mu_grad, log_var_grad = torch.empty_like(mu), torch.empty_like(log_var)
    if 0 in mu.shape:
        return mu_grad, log_var_grad
    operands = mu, log_var, eps, z_grad, mu_grad, log_var_grad
    batch = _batch(operands, noise is not None)
    if batch.layout is SCATTERED:
        dense, *rest = _contiguous(mu, log_var, eps, z_grad)
        assert dense is not None and rest[0] is not None
        return gaussian_grad(dense, rest[0], rest[1], noise, rest[2], kl_grad)
    address = _noise(noise, mu.device, _row(mu.shape))
    kl_grad = None if kl_grad is None else kl_grad.contiguous()
    present = eps is None, z_grad is None, kl_grad is None, address[2] is None, address[3] is None
    call = _gaussian_call(gaussians.gaussian_grad_kernel, batch, present, _mode(noise), 6)
    _launch(call, (*operands, kl_grad, *address))
    return mu_grad, log_var_grad


@functools.lru_cache(maxsize=4096)
def _fill_call(
    B: int, D: int, dtype: torch.dtype, device: torch.device, mode: int, present: tuple[bool, ...], below: int
) -> _Call:
    V = _LANE[dtype]
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_MAP)
    spec = mode, D % V == 0, ROWS, LANES, V, _NVIDIA
    return _Call(kernels.fill_kernel, device, grid, (dtype, present), (B, D, steps, below), spec)


def _fill(
    noise: Noise, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fold: bool, below: int = 2**32
) -> Tensor:
    B, D = shape
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.numel():
        seed, offset, key, sample, first = _noise(noise, out.device, D)
        mode = _mode(noise) if fold else _RAW
        call = _fill_call(B, D, dtype, out.device, mode, (key is None, sample is None), below)
        _launch(call, (out, seed, offset, key, sample, first))
    return out


def normal(noise: Noise, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fold: bool = True) -> Tensor:
    """(B, D) normals; with fold=False every row is the raw stream of the key."""
    return _fill(noise, shape, dtype, device, fold)


def words(noise: Noise, shape: tuple[int, int], device: torch.device, fold: bool = True, below: int = 2**32) -> Tensor:
    """(B, D) words w as floor(w * below / 2^32), int64."""
    return _fill(noise, shape, torch.int64, device, fold, below)


def fold_in_tensor(noise: Noise, data: Tensor | int) -> Tensor:
    """The key (2,) of noise.fold_in(data), data an int64 tensor () or an int; one of them is on the device."""
    place = data if isinstance(data, Tensor) else noise._key_tensor
    assert place is not None
    folded = torch.empty(2, dtype=torch.int64, device=place.device)
    seed, offset, key, _, _ = _noise(noise, folded.device, 0)
    types = key is None, isinstance(data, int)
    _launch(_Call(kernels.fold_in_kernel, folded.device, (1, 1, 1), types, (), ()), (seed, offset, key, data, folded))
    return folded


@functools.lru_cache(maxsize=256)
def _chain_call(B: int, D: int, device: torch.device, kind: int, noise: int, present: tuple[bool, ...]) -> _Call:
    grid, _, ROWS, LANES = _plan(B, D, BLOCK, 1)
    spec = noise, kind, ROWS, LANES, BLOCK, _NVIDIA
    return _Call(chains.chain_kernel, device, grid, (kind, present), (B, D), spec)


def _chain(x: Tensor, score: tuple[Any, ...], update: Update, noise: Noise, out: Tensor, kind: int) -> None:
    """score: means, precisions, log_weights, or a double well's slope and square, None for the others."""
    B, D = x.shape
    step, spread, steps = update
    *tables, slope, square = score
    address = _noise(noise, x.device, D)
    call = _chain_call(B, D, x.device, kind, _mode(noise), (address[2] is None, address[3] is None))
    numbers = (
        _bits(step),
        _bits(spread),
        None if slope is None else _bits(slope),
        None if square is None else _bits(square),
    )
    _launch(call, (x, out, *tables, *address, *numbers, steps, 0 if tables[0] is None else len(tables[0])))


def chain(x: Tensor, score: tuple[Tensor, Tensor, Tensor], update: Update, noise: Noise, out: Tensor) -> None:
    """As native.chain."""
    _chain(x, (*score, None, None), update, noise, out, 1 if len(score[0]) == 1 else 2)


def well_chain(x: Tensor, score: tuple[float, float], update: Update, noise: Noise, out: Tensor) -> None:
    """As native.well_chain."""
    _chain(x, (None, None, None, *score), update, noise, out, 0)
