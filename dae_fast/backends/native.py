"""The CPU kernels of csrc/: tensors in, addresses out.

Functions here take checked tensors of one shape, dtype and device, and allocate the results.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .reference import compute_dtype, raise_bad_level

try:
    # torch first: it loads the OpenMP runtime that the kernels look up.
    from dae_fast import _core
except ImportError as error:
    from dae_fast.info import build_error

    raise ImportError(build_error() or f"the extension module did not load: {error}") from error

if TYPE_CHECKING:
    from ..noise import Noise


def available() -> str:
    """What keeps this backend from running here: nothing, once the module has loaded."""
    return ""


def describe() -> str:
    """For df.info()."""
    return (
        f"built; instruction set {isa()} of {', '.join(isas())}; "
        f"{max_threads()} threads (torch.set_num_threads governs it)"
    )


def supports(device: torch.device) -> bool:
    """The CPU's memory."""
    return device.type == "cpu"


_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_NOISE = (0, 0, 0, 0, 0, 0)
_ROWS, _RAW = 1, 2

fold_in = _core.fold_in
isa = _core.isa
isas = _core.isas
use_isa = _core.use_isa
max_threads = _core.max_threads
philox4x32_10 = _core.philox4x32_10

if (_wanted := os.environ.get("DAE_FAST_CPU_ISA")) is not None:
    try:
        use_isa(_wanted)
    except ValueError as error:
        raise RuntimeError(f"DAE_FAST_CPU_ISA={_wanted}: {error}; there are {', '.join(isas())}") from error


def _noise(noise: Noise | None, mode: int = _ROWS) -> tuple[int, int, int, int, int, int]:
    if noise is None:
        return _NO_NOISE
    key, sample = noise._key_tensor, noise._sample
    return (
        mode,
        noise._seed,
        noise._offset,
        0 if key is None else key.data_ptr(),
        0 if sample is None else sample.data_ptr(),
        noise._first_sample,
    )


def _table(table: Tensor, index: Tensor | None) -> tuple[int, int, int, int, bool]:
    rows, columns = table.shape
    if index is None:
        return table.data_ptr(), rows, columns, 0, False
    return table.data_ptr(), rows, columns, index.data_ptr(), index.dtype == torch.int64


def _layout(*operands: Tensor | None) -> tuple[tuple[int, ...], list[tuple[int, ...]]] | None:
    """None where all are contiguous, else a row's sizes and each operand's strides (() if contiguous)."""
    for t in operands:
        if t is not None and not t.is_contiguous():
            sizes = tuple(t.shape[1:])
            return sizes, [() if o is None or o.is_contiguous() else o.stride() for o in operands]
    return None


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(x: Tensor) -> tuple[int, int]:
    """B and the elements of one row; a batch of no rows has D = 0, there being nothing to do."""
    B = x.shape[0]
    return B, x.numel() // B if B else 0


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
    """As reference.affine, in one pass. `out` is written instead of a new tensor; it may be x, y or z."""
    two = len(columns) == 6
    if out is None:
        out = torch.empty_like(x)
    out2 = torch.empty_like(x) if two else None
    B, D = _rows(x)
    bad = _core.affine(
        _DTYPES[x.dtype],
        B,
        D,
        x.data_ptr(),
        0 if y is None else y.data_ptr(),
        0 if z is None else z.data_ptr(),
        out.data_ptr(),
        0 if out2 is None else out2.data_ptr(),
        _noise(noise),
        _table(table, index),
        columns if two else (*columns, -1, -1, -1),
        clamp,
        _layout(x, y, z, out, out2),
    )
    if bad >= 0 and index is not None:
        raise_bad_level(op, table, index, bad)
    return (out,) if out2 is None else (out, out2)


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

    weight: (B,). reduction: 0 none, 1 mean, 2 sum. grad is upstream (), or 1, times d loss / d pred; `made` is
    the one for 1, returned when that is what upstream turns out to be and written anew otherwise.
    """
    compute = compute_dtype(pred.dtype)
    factor = 1.0 if upstream is None else upstream.item()
    B, D = _rows(pred)
    per_sample = torch.empty(B, dtype=compute, device="cpu")
    loss = torch.empty((), dtype=compute, device="cpu")
    if made is not None and factor == 1.0:
        return per_sample, loss, made
    grad = torch.empty_like(pred) if want_grad and made is None else made
    wide = None if weight is None else weight.double().contiguous()
    bad = _core.residual(
        _DTYPES[pred.dtype],
        B,
        D,
        pred.data_ptr(),
        _ptr(y),
        _ptr(z),
        _ptr(mask),
        _ptr(grad),
        _noise(noise),
        _table(table, index),
        columns,
        _ptr(wide),
        factor,
        reduction,
        per_sample.data_ptr(),
        loss.data_ptr() if want_loss else 0,
        _layout(pred, y, z, mask, grad),
    )
    if bad >= 0 and index is not None:
        raise_bad_level(op, table, index, bad)
    return per_sample, loss, grad


def row_dots(g: Tensor, x: Tensor | None, y: Tensor | None, z: Tensor | None, noise: Noise | None) -> Tensor:
    """(B, 3) fp64: the sums over each row of g*x, g*y and g*z."""
    B, D = _rows(g)
    out = torch.zeros(B, 3, dtype=torch.float64, device="cpu")
    _core.row_dots(
        _DTYPES[g.dtype],
        B,
        D,
        g.data_ptr(),
        _ptr(x),
        _ptr(y),
        _ptr(z),
        _noise(noise),
        out.data_ptr(),
        _layout(g, x, y, z),
    )
    return out


def fold_in_tensor(noise: Noise, data: Tensor | int) -> Tensor:
    """The key (2,) of noise.fold_in(data), data an int64 tensor () or an int."""
    key = noise._key_tensor
    seed, offset = (noise._seed, noise._offset) if key is None else key.tolist()
    return torch.tensor(fold_in(seed, offset, int(data)), device="cpu")


def normal(noise: Noise, B: int, D: int, dtype: torch.dtype, device: torch.device, fold: bool = True) -> Tensor:
    """(B, D) normals; with fold=False every row is the raw stream of the key."""
    out = torch.empty(B, D, dtype=dtype, device="cpu")
    one = torch.ones(1, 1, dtype=compute_dtype(dtype), device="cpu")
    _core.affine(
        _DTYPES[dtype],
        B,
        D,
        0,
        0,
        0,
        out.data_ptr(),
        0,
        _noise(noise, _ROWS if fold else _RAW),
        _table(one, None),
        (-1, -1, 0, -1, -1, -1),
        None,
        None,
    )
    return out


def words(noise: Noise, B: int, D: int, device: torch.device, fold: bool = True) -> Tensor:
    """(B, D) words, int64 in [0, 2**32)."""
    out = torch.empty(B, D, dtype=torch.int64, device="cpu")
    _core.bits(B, D, _noise(noise, _ROWS if fold else _RAW), out.data_ptr())
    return out
