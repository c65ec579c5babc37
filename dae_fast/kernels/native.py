"""The kernels of csrc/, for the CPU and, through the CUDA library or the HIP library, for GPUs.

Functions here take checked tensors of one shape, dtype and device, and allocate the results.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import spec as specs
from .reference import raise_bad_level
from .scratch import workspace
from .spec import (
    ABSENT,
    Bounds,
    Coefficients,
    Found,
    Inputs,
    Loss,
    Map,
    Residual,
    Update,
    Wanted,
    compute_dtype,
    constant_rows,
    map_of,
)

try:
    # torch first: it loads the OpenMP runtime that the kernels look up.
    from dae_fast import _core
except ImportError as error:
    from dae_fast.info import build_error

    raise ImportError(build_error("native") or f"the extension module did not load: {error}") from error

if TYPE_CHECKING:
    from ..noise import Noise

if specs.ENUMERATIONS != _core.ENUMERATIONS:
    raise ImportError(f"the extension module knows {_core.ENUMERATIONS}, not {specs.ENUMERATIONS}: build it again")
specs.make_core_map, specs.make_core_loss = _core.Map, _core.Loss

fold_in = _core.fold_in
isa = _core.isa
isas = _core.isas
use_isa = _core.use_isa
use_cache_share = _core.use_cache_share
max_threads = _core.max_threads
philox4x32_10 = _core.philox4x32_10
fast_loss_grad = _core.fast_loss_grad
fast_normal = _core.fast_normal
all_within = _core.all_within
are_plain = _core.are_plain
is_one = _core.is_one
use_fast = _core.use_fast
use_gradients = _core.use_gradients
nvtx_built = _core.nvtx_built

if _wanted := os.environ.get("DAE_FAST_CPU_ISA"):  # empty is not set
    try:
        use_isa(_wanted)
    except ValueError as error:
        raise RuntimeError(f"DAE_FAST_CPU_ISA={_wanted}: {error}; there are {', '.join(isas())}") from error


# Whose tensors are on devices of the type "cuda".
GPU = "hip" if torch.version.hip else "cuda"


@cache
def library_missing(name: str) -> str:
    """What keeps the library "cuda", or "hip", from being used; "" when nothing does.

    Asks the driver, and so not before there is a tensor on a GPU: a process that has asked cannot fork, and looks at
    CUDA_VISIBLE_DEVICES no more.
    """
    from dae_fast.info import build_error

    title, version = ("ROCm", torch.version.hip) if name == "hip" else ("CUDA", torch.version.cuda)
    if not version:  # it has no tensors for the library
        return f"torch {torch.__version__} is not built for {title}"
    library = Path(__file__).parents[1] / f"_{name}.so"
    if not library.exists():
        return build_error(name) or f"the {name} library was not built"
    try:
        _core.load_cuda(str(library))
        return "" if _core.cuda_devices() else "no GPU"
    except RuntimeError as error:
        return str(error)


def available() -> str:
    """What keeps this backend from running here: a torch whose tensors the module cannot read."""
    try:
        _core.on_gpu(torch.empty(0))
    except RuntimeError as error:
        return str(error).removeprefix("dae_fast: ")
    return ""


def describe() -> str:
    """For df.info()."""
    return (
        f"built; instruction set {isa()} of {', '.join(isas())}; "
        f"{max_threads()} threads (torch.set_num_threads governs it)"
    )


def supports(device: torch.device) -> bool:
    """The CPU, and GPUs where their library runs."""
    return device.type == "cpu" or (device.type == "cuda" and not library_missing(GPU))


def _rows(x: Tensor) -> tuple[int, int]:
    """B and the elements of one row."""
    B = x.shape[0]
    return B, x.numel() // B if B else 0


def _dense(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Copies where strides are more than a GPU's kernels walk: 8 dimensions and 2^31 elements to a row."""
    first = tensors[0]
    if first is None or (first.dim() <= 9 and (first.numel() < 2**31 or _rows(first)[1] < 2**31)):
        return tensors
    return tuple(None if t is None else t.contiguous() for t in tensors)


# A plain call of a weighted sum, from Python's objects to the kernel in one step; None where it is not plain.
fast_map = _core.fast_map
# The same of a sampler's step.
fast_step = _core.fast_step


def fast_loss(
    core: Any, operands: Residual, source: Any, key: Any, weight: Tensor | None
) -> tuple[Tensor, Tensor | bool | None, Tensor | None, Any, Tensor | int | None, Tensor | None, Tensor | None] | None:
    """(loss, gradient of pred or None, also or None, table, t, kept or None, means or None) of a plain call; else None.

    The gradient is False where it is wanted and made in backward, of fp16; True where `loss` is the samples' means, of
    a loss that is not summed, whose gradients are made there. means: the samples', where weight wants a gradient.
    """
    return _core.fast_loss(core, *operands, source, key, weight, workspace)


def _scratch(x: Tensor, columns: int = 1) -> tuple[Tensor | None, Tensor | None]:
    """What a reduction on x's device needs: room for partial sums, and a counter that its kernels leave at 0."""
    if not _core.on_gpu(x):
        return None, None
    return workspace(x.device, _core.scratch_doubles(*_rows(x), columns))


def affine(
    spec: Map,
    inputs: Inputs,
    noise: Noise | Tensor | None,
    rows: Coefficients,
    bounds: Bounds | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As reference.affine, in one pass. `out` is written instead of a new tensor; it may be an input."""
    x, *others, v = _dense(*inputs, noise if isinstance(noise, Tensor) else None)
    last = noise if v is None else v
    if out is None:
        assert x is not None
        out = torch.empty_like(x)
    elif _dense(out)[0] is not out:
        return (out.copy_(affine(spec, inputs, noise, rows, bounds)[0]),)
    table, index = rows.dense(spec.op, compute_dtype(out.dtype))
    out2 = torch.empty_like(out) if spec.outputs == 2 else None
    bad = _core.affine(spec.core, (x, *others), last, False, (table, index), bounds, (out, out2))
    if bad >= 0 and index is not None:
        raise_bad_level(spec.op, table, index, bad)
    return (out,) if out2 is None else (out, out2)


def residual(spec: Loss, operands: Residual, rows: Coefficients, wanted: Wanted) -> Found:
    """One pass over pred: the unweighted mean of each sample, the weighted loss, its gradient.

    With an upstream gradient only the gradient, times upstream, is made.
    """
    pred, y, z, noise, mask = operands
    in_memory = mask if isinstance(mask, Tensor) else None
    drawn: tuple[Any, Any, bool] = (None, None, False) if mask is None or in_memory is not None else tuple(mask)
    pred, y, z, in_memory = _dense(pred, y, z, in_memory)
    of_mask = (*drawn, in_memory)
    compute = compute_dtype(pred.dtype)
    table, index = rows.dense(spec.op, compute)
    again = wanted.upstream is not None  # for a gradient alone
    means = None if again else pred.new_empty(pred.shape[0], dtype=compute)
    loss = pred.new_empty((), dtype=compute) if wanted.loss and not again else None
    grad = torch.empty_like(pred) if wanted.grad and wanted.made is None else wanted.made
    room = _scratch(pred, 1)
    kept, weight = wanted.kept, wanted.weight
    if kept is None and mask is not None and not (in_memory is not None and in_memory.is_floating_point()):
        kept = pred.new_empty(pred.shape[0], dtype=torch.float64)
        upstream = None if wanted.made is None else wanted.upstream  # 1: what was made stands, and no counts are needed
        _core.mask_count(pred if in_memory is None else in_memory, of_mask, upstream, kept, room)
    if weight is not None:
        weight = (weight if weight.dtype in (torch.float32, torch.float64) else weight.float()).contiguous()
    factors, results = (kept, weight, wanted.upstream, wanted.made is not None), (means, loss, wanted.also, grad)
    bad = _core.residual(spec.core, (pred, y, z, noise), (table, index), of_mask, factors, results, room)
    if bad >= 0 and index is not None:
        raise_bad_level(spec.op, table, index, bad)
    return Found(means, loss, grad, kept)


def extended(x: Tensor) -> bool:
    """Whether `residual` takes a mask of weights, in the dtype of x's arithmetic, and `affine` a map with a gate."""
    return not _core.on_gpu(x)


def corrupt(x: Tensor, noise: Noise, thresholds: Tensor, values: Bounds) -> Tensor:
    """As reference.corrupt, in one pass."""
    (x,) = _dense(x)
    out = torch.empty_like(x)
    _core.corrupt(x, noise, thresholds, *values, out)
    return out


def gaussian(mu: Tensor, log_var: Tensor, eps: Tensor | None, noise: Noise | None) -> tuple[Tensor, Tensor]:
    """As reference.gaussian, in one pass."""
    mu, log_var, eps = _dense(mu, log_var, eps)
    z = torch.empty_like(mu)
    kl = mu.new_empty(mu.shape[0], dtype=compute_dtype(mu.dtype))
    _core.gaussian(mu, log_var, eps, noise, z, kl, _scratch(mu, 1))
    return z, kl


def gaussian_grad(
    mu: Tensor,
    log_var: Tensor,
    eps: Tensor | None,
    noise: Noise | None,
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of mu and log_var, in one pass. kl_grad: (B,) of the compute type."""
    mu, log_var, eps, z_grad = _dense(mu, log_var, eps, z_grad)
    mu_grad, log_var_grad = torch.empty_like(mu), torch.empty_like(log_var)
    kl_grad = None if kl_grad is None else kl_grad.contiguous()
    _core.gaussian_grad(mu, log_var, eps, noise, z_grad, kl_grad, (mu_grad, log_var_grad))
    return mu_grad, log_var_grad


def chain(x: Tensor, score: tuple[Tensor, Tensor, Tensor], update: Update, noise: Noise, out: Tensor) -> None:
    """`update.steps` updates of x into out; step k has the noise of noise.fold_in(k).

    x, out: (B, D) fp32, contiguous, D at most 128. The score is a mixture's: means and precisions (K, W), W the first
    of 4, 8, 16, ... that D fits into, filled up with zeros; log_weights (K,).
    """
    _core.chain(x, score, update, noise, out)


def well_chain(x: Tensor, score: tuple[float, float], update: Update, noise: Noise, out: Tensor) -> None:
    """The same of a double well in each element, whose score is slope * x * (x^2 - square): (slope, square)."""
    _core.well_chain(x, score, update, noise, out)


def normal_sum(noise: Noise, nodes: list[int], weights: list[float], out: Tensor) -> None:
    """out (B, D), fp32 and contiguous: weights[0] times the normals of noise.fold_in(nodes[0]), and so on, in order.

    At most 128 nodes, from 0 on.
    """
    _core.normal_sum(noise, nodes, weights, out)


def embedding(x: Tensor, W: Tensor, flip: bool, out: Tensor) -> None:
    """As reference.embedding, in one pass."""
    _core.embedding(x.contiguous(), W.contiguous(), flip, out)


def kl_sparsity(h: Tensor, rate: float, with_slope: bool) -> tuple[Tensor, Tensor | None, float]:
    """On the CPU: the sum over the units of KL(rate || a unit's mean), its gradient in each sample, and 0 or a mean
    outside [0, 1]."""
    compute = compute_dtype(h.dtype)
    loss = torch.empty((), dtype=compute)
    slope = torch.empty(h.shape[1:], dtype=compute) if with_slope else None
    return loss, slope, _core.kl_sparsity(h, rate, loss, slope)


def contraction(h: Tensor, squares: Tensor) -> Tensor:
    """On the CPU: (B,) fp64, sum_j squares_j (h_bj (1 - h_bj))^2. h: (B, D); squares: (D,) of the compute type."""
    out = torch.empty(h.shape[0], dtype=torch.float64)
    _core.contraction(h, squares, out)
    return out


def contraction_grad(
    h: Tensor, squares: Tensor, upstream: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of h, and of squares in fp64, those that are wanted, from the gradient (B,), fp64, of the sums."""
    of_h = torch.empty_like(h) if wanted[0] else None
    of_squares = torch.empty(h.shape[1], dtype=torch.float64) if wanted[1] else None
    _core.contraction_grad(h, squares, upstream.contiguous(), of_h, of_squares)
    return of_h, of_squares


def bound(v: Tensor, away: Tensor, table: Tensor, is_log: bool) -> Tensor:
    """On the CPU: (B,) fp64, a step's divergence summed over each row (StepDivergence in csrc/ops.h), in nats.

    v, away: (B, D), away contiguous and of the compute type; table: (B, 5), as ops.variational has it
    """
    out = torch.empty(v.shape[0], dtype=torch.float64)
    _core.bound(v, away, table, is_log, out)
    return out


def bound_grad(v: Tensor, away: Tensor, table: Tensor, is_log: bool, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of v and away, from the gradient (B,), fp64, of the sums."""
    grads = torch.empty_like(v), torch.empty_like(away)
    _core.bound_grad(v, away, table, is_log, upstream.contiguous(), grads)
    return grads


def row_dots(g: Tensor, inputs: Inputs, noise: Noise | None) -> Tensor:
    """(B, 3) fp64: the sums over each row of g*x, g*y and g*z."""
    g, x, y, z = _dense(g, *inputs[:3])
    out = g.new_empty((g.shape[0], 3), dtype=torch.float64)
    _core.row_dots(g, x, y, z, noise, out, _scratch(g, 3))
    return out


def fold_in_tensor(noise: Noise, data: Tensor | int) -> Tensor:
    """The key (2,) of noise.fold_in(data), data an int64 tensor () or an int; on data's device, or the key's."""
    place: Any = data if isinstance(data, Tensor) else noise._key_tensor
    out = torch.empty(2, dtype=torch.int64, device=place.device)
    _core.fold_in_tensor(noise, data, out)
    return out


_NORMAL = map_of("normal", (ABSENT, ABSENT, 0, ABSENT))


def normal(noise: Noise, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fold: bool = True) -> Tensor:
    """(B, D) normals; with fold=False every row is the raw stream of the key."""
    out = torch.empty(shape, dtype=dtype, device=device)
    one = constant_rows("normal", (1.0,), compute_dtype(dtype)).table
    _core.affine(_NORMAL.core, (None,) * 4, noise, not fold, (one, None), None, (out, None))
    return out


def words(noise: Noise, shape: tuple[int, int], device: torch.device, fold: bool = True, below: int = 2**32) -> Tensor:
    """(B, D) words w as floor(w * below / 2^32), int64."""
    out = torch.empty(shape, dtype=torch.int64, device=device)
    _core.bits(noise, not fold, below, out)
    return out
