"""The Triton kernels of triton_kernels.py: tensors in, one launch out.

Functions here take checked tensors of one shape, dtype and device, and allocate the results. Kernels are
compiled from types alone, never from a value: a new seed, batch or pointer runs what is there. Nothing
reads device memory on the host.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .reference import compute_dtype, per_sample_sum

try:
    import triton
except ImportError as error:
    raise ImportError(f"Triton is not installed ({error}); pip install triton") from error
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_kernels as kernels

if TYPE_CHECKING:
    from ..noise import Noise

INTERPRETED: bool = triton.knobs.runtime.interpret
# Whose square root the kernels use (sqrt_rn).
_NVIDIA = not INTERPRETED and torch.version.hip is None

THREADS = 128  # of a program, one lane each
# Enough programs to fill the largest GPUs (132 SMs of 16); beyond that a program takes more steps, which
# share its row's key and coefficients. The running sums of a loss are fp32: no more than 64 terms each.
_PROGRAMS = 2048
_STEPS_MAP, _STEPS_SUM = 8, 64

_NONE, _MEAN, _SUM = 0, 1, 2
_NO_NOISE, _FOLDED, _RAW = 0, 1, 2

_TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
_LANE = {torch.float32: 4, torch.float64: 2, torch.bfloat16: 8, torch.float16: 8, torch.int64: 2}

Key = tuple[Any, ...]
Grid = tuple[int, int, int]
Operands = tuple[Tensor | None, ...]
# The last two of a row's three sizes, and the strides of the batch and of those three for each operand;
# None where contiguous.
Layout = tuple[tuple[int, int] | None, tuple[tuple[int, ...] | None, ...]]


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


def compile_for(target: GPUTarget, kernel: Any, args: tuple[Any, ...]) -> Any:
    options = {"num_warps": THREADS // target.warp_size, "num_stages": 1, "enable_fp_fusion": False}
    return triton.compile(source(kernel, args), target=target, options=options)


_compiled: dict[Key, Any] = {}


def _launch(kernel: Any, key: Key, device: torch.device, grid: Grid, args: tuple[Any, ...]) -> None:
    """Runs kernel(*args) on the device's current stream. `key` says all that compiling depends on.

    Triton's own kernel[grid](...) looks at every argument again in each call.
    """
    if INTERPRETED:
        kernel[grid](*args)
        return
    index = device.index
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            _launch(kernel, key, device, grid, args)
        return
    key = (kernel.__name__, index, key)
    compiled = _compiled.get(key)
    if compiled is None:
        target = triton.runtime.driver.active.get_current_target()
        compiled = _compiled[key] = compile_for(target, kernel, args)
    run = compiled.run  # loads the kernel, and so comes before compiled.function
    stream = torch._C._cuda_getCurrentRawStream(index)
    run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


@functools.lru_cache(maxsize=1024)
def _plan(B: int, D: int, V: int, most_steps: int) -> tuple[Grid, int, int, int]:
    """(grid, steps, ROWS, LANES): programs along a row, then row groups, in two numbers as each is 16 bits."""
    lanes = -(-D // V)
    LANES = THREADS if lanes >= 4 * THREADS else min(32, triton.next_power_of_2(lanes))
    ROWS = THREADS // LANES
    groups, tiles = -(-B // ROWS), -(-lanes // LANES)
    steps = max(1, min(most_steps, groups * tiles // _PROGRAMS, tiles))
    along = -(-tiles // steps)
    z = -(-groups // 65535)
    return (along, -(-groups // z), z), -(-tiles // along), ROWS, LANES


@functools.lru_cache(maxsize=1024)
def _bits(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _noise(noise: Noise | None, device: torch.device) -> tuple[int, int, Tensor | None, Tensor | None, int]:
    if noise is None:
        return 0, 0, None, None, 0
    key = noise._key_tensor
    if key is not None and key.device != device:
        seed, offset = key.tolist()  # in host memory: nothing waits for a device
        return seed, offset, None, noise._sample, noise._first_sample
    return noise._seed, noise._offset, key, noise._sample, noise._first_sample


_CONTIGUOUS: Layout = (None, (None,) * 5)


def _layout(operands: Operands, ordered: bool) -> Layout | None:
    """How the operands lie; None where a row does not merge to three dimensions (or is beyond 32-bit indices).

    ordered: elements are told apart by their logical place (noise). Where they are not, operands that all
    lie densely in one other order (channels_last) are as good as contiguous.
    """
    for t in operands:
        if t is not None and not t.is_contiguous():
            return _strided(operands, ordered)
    return _CONTIGUOUS


def _strided(operands: Operands, ordered: bool) -> Layout | None:
    given = [t for t in operands if t is not None]
    first = given[0]
    if not ordered and all(t.stride() == first.stride() for t in given):
        for memory_format, rank in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if first.dim() == rank and first.is_contiguous(memory_format=memory_format):
                return _CONTIGUOUS
    sizes = list(first.shape[1:])
    strides = [None if t is None or t.is_contiguous() else list(t.stride()) for t in operands]
    merge_dimensions(sizes, strides)
    if len(sizes) > 3 or math.prod(sizes) >= 2**31:
        return None
    missing = 3 - len(sizes)
    sizes = [1] * missing + sizes
    return (sizes[1], sizes[2]), tuple(None if s is None else (s[0], *[0] * missing, *s[1:]) for s in strides)


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


def _aligned(D: int, V: int, operands: Operands, layout: Layout) -> bool:
    """Whether the lanes of every contiguous operand are whole, aligned 16 bytes (V of a mask)."""
    if D % V:
        return False
    for t, strides in zip(operands, layout[1], strict=False):
        if t is not None and strides is None and t.data_ptr() % 16:
            return False
    return True


def _contiguous(operands: Operands) -> Operands:
    return tuple(None if t is None else t.contiguous() for t in operands)


def affine(
    op: str,
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    table: Tensor,
    index: Tensor | None,
    columns: tuple[int, ...],
    clamp: tuple[int, int, float, float] | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As reference.affine, in one launch. `out` is written instead of a new tensor; it may be x, y or z."""
    if out is None:
        out = torch.empty_like(x)
    out2 = torch.empty_like(x) if len(columns) == 6 else None
    results = (out,) if out2 is None else (out, out2)
    if not x.numel():
        return results
    B = x.shape[0]
    D = x.numel() // B
    dtype, device = x.dtype, x.device
    # An input that no coefficient multiplies is not read.
    used = columns if clamp is None else (*columns, clamp[0], -1, -1)
    operands: Operands = (
        x if max(used[::3]) >= 0 else None,
        y if clamp is not None or max(used[1::3]) >= 0 else None,
        z if max(used[2::3]) >= 0 else None,
        out,
        out2,
    )
    drawn = noise if max(used[2::3]) >= 0 else None
    layout = _layout(operands, drawn is not None)
    if layout is None:
        y, z = _contiguous((y, z))
        made = affine(op, x.contiguous(), y, z, noise, table, index, columns, clamp)
        return (out.copy_(made[0]), *made[1:])
    V = _LANE[dtype]
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_MAP)
    seed, offset, key, sample, first = _noise(drawn, device)
    low, high = (None, None) if clamp is None else (_bits(clamp[2]), _bits(clamp[3]))
    levels, K = table.shape
    spec = (
        columns,
        None if clamp is None else clamp[:2],
        K,
        levels == 1 and index is None,
        _NO_NOISE if drawn is None else _FOLDED,
        _aligned(D, V, operands, layout),
        ROWS,
        LANES,
        V,
        _NVIDIA,
    )
    sizes, strides = layout
    which = None if sizes is None else tuple(s is None for s in strides)
    present = operands[0] is None, operands[1] is None, operands[2] is None, key is None, sample is None
    _launch(
        kernels.affine_kernel,
        (dtype, spec, present, None if index is None else index.dtype, which),
        device,
        grid,
        (
            *operands,
            table,
            index,
            levels,
            seed,
            offset,
            key,
            sample,
            first,
            low,
            high,
            B,
            D,
            steps,
            sizes,
            *strides,
            *spec,
        ),
    )
    return results


def residual(
    op: str,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    table: Tensor,
    index: Tensor | None,
    columns: tuple[int, int],
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    want_loss: bool,
    want_grad: bool,
    upstream: Tensor | None = None,
    made: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One pass over pred: the unweighted mean of each sample, the weighted loss, its gradient.

    weight: (B,) fp32 or fp64. reduction: 0 none, 1 mean, 2 sum. upstream: () on the device, multiplies
    the gradient; the kernel reads it. made: the gradient for an upstream of 1, left as it is when
    upstream is 1 and made again in place otherwise.
    The means are left unwritten when only the gradient is wanted, the loss unless it is wanted.
    A mask costs a second launch: how many elements count must be known first.
    """
    compute, dtype, device = compute_dtype(pred.dtype), pred.dtype, pred.device
    B = pred.shape[0]
    want_sums = want_loss or not want_grad
    per_sample = torch.empty(B, dtype=compute, device=device)
    loss = torch.empty((), dtype=compute, device=device)
    grad = (torch.empty_like(pred) if made is None else made) if want_grad else None
    if grad is made is not None and upstream is None:
        return per_sample, loss, made
    if not pred.numel():
        return per_sample.zero_(), loss.zero_(), grad
    D = pred.numel() // B
    operands: Operands = (
        pred,
        y if columns[0] >= 0 else None,
        z if columns[1] >= 0 else None,
        mask,
        grad,
    )
    drawn = noise if columns[1] >= 0 else None
    layout = _layout(operands, drawn is not None)
    if layout is None:
        y, z, mask, dense = _contiguous((y, z, mask, made))
        per_sample, loss, new = residual(
            op,
            pred.contiguous(),
            y,
            z,
            noise,
            table,
            index,
            columns,
            mask,
            weight,
            reduction,
            want_loss,
            want_grad,
            upstream,
            dense,
        )
        return per_sample, loss, new if made is None or new is None else made.copy_(new)
    V = _LANE[dtype]
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_SUM)
    groups = -(-B // ROWS)
    one_tile = grid[0] == 1
    seed, offset, key, sample, first = _noise(drawn, device)
    kept = None if mask is None else per_sample_sum(mask).to(torch.int64)
    factor = 2.0 / (B if reduction == _MEAN else 1) / (1 if reduction == _SUM or kept is not None else D)
    sums = ticket = None
    if want_sums and (want_loss or not one_tile):
        sums = torch.empty(groups if one_tile else B * grid[0], dtype=torch.float64, device=device)
        ticket = _ticket(device)
    levels, K = table.shape
    spec = (
        *columns,
        K,
        levels == 1 and index is None,
        _NO_NOISE if drawn is None else _FOLDED,
        reduction,
        made is not None,
        one_tile,
        _aligned(D, V, operands, layout),
        ROWS,
        LANES,
        V,
        _NVIDIA,
    )
    sizes, strides = layout
    which = None if sizes is None else tuple(s is None for s in strides)
    present = (
        operands[1] is None,
        operands[2] is None,
        mask is None,
        upstream is None,
        key is None,
        sample is None,
        want_loss,
        want_grad,
    )
    types = dtype, None if index is None else index.dtype, None if weight is None else weight.dtype
    _launch(
        kernels.residual_kernel,
        (types, spec, present, which),
        device,
        grid,
        (
            *operands,
            table,
            index,
            levels,
            None if weight is None else weight.contiguous(),
            kept,
            upstream,
            seed,
            offset,
            key,
            sample,
            first,
            _bits(factor),
            sums,
            ticket,
            per_sample if want_sums else None,
            loss if want_loss else None,
            B,
            D,
            steps,
            sizes,
            *strides,
            *spec,
        ),
    )
    return per_sample, loss, grad


_tickets: dict[tuple[int | None, int], Tensor] = {}


def _ticket(device: torch.device) -> Tensor:
    """A zeroed int32 that the kernel leaves at zero; one for each stream, as two losses may run at once.

    A CUDA graph may be replayed on any stream, beside others: it gets one of its own.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    ticket = _tickets.get(stream)
    if ticket is None:
        ticket = _tickets[stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return ticket


def row_dots(g: Tensor, x: Tensor | None, y: Tensor | None, z: Tensor | None, noise: Noise | None) -> Tensor:
    """(B, 3) fp64: the sums over each row of g*x, g*y and g*z."""
    B, device = g.shape[0], g.device
    operands: Operands = (g, x, y, z)
    layout = _layout(operands, noise is not None)
    if layout is None:
        operands = _contiguous(operands)
        layout = _CONTIGUOUS
    if not g.numel():
        return torch.zeros(B, 3, dtype=torch.float64, device=device)
    D = g.numel() // B
    V = _LANE[g.dtype]
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_SUM)
    seed, offset, key, sample, first = _noise(noise, device)
    out = torch.zeros(B, grid[0], 3, dtype=torch.float64, device=device)
    NOISE = _NO_NOISE if noise is None else _FOLDED
    spec = NOISE, _aligned(D, V, operands, layout), ROWS, LANES, V, _NVIDIA
    sizes, strides = layout
    which = None if sizes is None else tuple(s is None for s in strides)
    present = x is None, y is None, z is None, key is None, sample is None
    _launch(
        kernels.row_dots_kernel,
        (g.dtype, spec, present, which),
        device,
        grid,
        (*operands, out, seed, offset, key, sample, first, B, D, steps, sizes, *strides[:4], *spec),
    )
    return out.sum(1)


def _fill(noise: Noise, B: int, D: int, dtype: torch.dtype, device: torch.device, fold: bool) -> Tensor:
    out = torch.empty(B, D, dtype=dtype, device=device)
    if not out.numel():
        return out
    V = _LANE[dtype]
    grid, steps, ROWS, LANES = _plan(B, D, V, _STEPS_MAP)
    seed, offset, key, sample, first = _noise(noise, out.device)
    spec = _FOLDED if fold else _RAW, D % V == 0, ROWS, LANES, V, _NVIDIA
    _launch(
        kernels.fill_kernel,
        (dtype, spec, key is None, sample is None),
        out.device,
        grid,
        (out, seed, offset, key, sample, first, B, D, steps, *spec),
    )
    return out


def normal(noise: Noise, B: int, D: int, dtype: torch.dtype, device: torch.device | str, fold: bool = True) -> Tensor:
    """(B, D) normals; with fold=False every row is the raw stream of the key."""
    return _fill(noise, B, D, dtype, torch.device(device), fold)


def words(noise: Noise, B: int, D: int, device: torch.device | str, fold: bool = True) -> Tensor:
    """(B, D) words, int64 in [0, 2**32)."""
    return _fill(noise, B, D, torch.int64, torch.device(device), fold)


def fold_in_tensor(noise: Noise, data: Tensor | int) -> Tensor:
    """The key (2,) of noise.fold_in(data), data an int64 tensor () or an int; one of them is on the device."""
    key = data if isinstance(data, Tensor) else noise._key_tensor
    assert key is not None
    folded = torch.empty(2, dtype=torch.int64, device=key.device)
    seed, offset, key, _, _ = _noise(noise, folded.device)
    _launch(
        kernels.fold_in_kernel,
        (key is None, isinstance(data, int)),
        folded.device,
        (1, 1, 1),
        (seed, offset, key, data, folded),
    )
    return folded
