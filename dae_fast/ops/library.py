"""torch.library ops: what torch.compile, export, torch.func, fake tensors, modes and subclasses see.

Eager calls do not come here (routing.py). A key is always a tensor, so that a compiled function holds
no constant; the noise of an op is absent when its key is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .._torch import register_autograd, unwrap_dead_wrappers
from ..kernels.dispatch import kernels_of
from ..noise import Noise
from ..rows import Rows
from .affine import _gradients as affine_gradients
from .batching import rule
from .flat import unflatten
from .masks import FlatMask
from .reparameterisation import gradients as gaussian_gradients
from .residual import REDUCTIONS, penalty_columns
from .residual import gradients as residual_gradients

_NOISE = "Tensor? key, Tensor? sample, SymInt first_sample"
_ROWS = "Tensor table, Tensor? index"
_AFFINE = f"(Tensor x, Tensor? y, Tensor? z, Tensor? w, {_ROWS}, {_NOISE}, int[] columns, str op)"
_MASK = "Tensor? mask, Tensor? mask_key, Tensor? mask_sample, SymInt mask_first_sample, Tensor? thresholds, bool keeps"
_RESIDUAL = f"Tensor pred, Tensor? y, Tensor? z, {_ROWS}, {_MASK}, {_NOISE}, int kind, str op"
_SCHEMAS = {
    "affine": f"{_AFFINE} -> Tensor",
    "affine2": f"{_AFFINE} -> (Tensor, Tensor)",
    "sample_means": f"({_RESIDUAL}) -> Tensor",
    "residual_grad": f"(Tensor upstream, {_RESIDUAL}) -> Tensor",
    "corrupt": f"(Tensor x, Tensor thresholds, {_NOISE}, float low, float high, str op) -> Tensor",
    "gaussian": f"(Tensor mu, Tensor log_var, Tensor? eps, {_NOISE}, str op) -> (Tensor, Tensor)",
    "gaussian_grad": f"(Tensor? z_grad, Tensor? kl_grad, Tensor mu, Tensor log_var, Tensor? eps, {_NOISE}, str op)"
    " -> (Tensor, Tensor)",
    "fold_in": "(Tensor key, Tensor data) -> Tensor",
    # A default, for graphs that torch.compile kept from before there was a limit.
    "fill": "(str op, Tensor key, Tensor? sample, SymInt first_sample, SymInt B, SymInt D, ScalarType dtype, "
    "int below=4294967296) -> Tensor",
}

_library = Library("dae_fast", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)


def _dense(*tensors: Tensor | None) -> list[Any]:
    """What the kernels read through a bare address: a table, an index, a key, sample ids."""
    return [None if t is None else t.contiguous() for t in tensors]


def _noise(key: Tensor | None, sample: Tensor | None, first_sample: int) -> Noise | None:
    key, sample = _dense(key, sample)
    return unflatten(key, sample, first_sample)


def _affine2(
    x: Any, y: Any, z: Any, w: Any, table: Any, index: Any, key: Any, sample: Any, first: Any, columns: Any, op: Any
) -> Any:
    noise, rows = _noise(key, sample, first), _dense(table, index)
    return kernels_of(x, op).affine(op, x, y, z, noise, *rows, tuple(columns), w=w)


def _affine(*args: Any) -> Tensor:
    result: Tensor = _affine2(*args)[0]
    return result


def _residual(pred: Any, y: Any, z: Any, table: Any, index: Any, *rest: Any, upstream: Any = None) -> Any:
    """(sample means, None, gradient or None)."""
    (*mask, key, sample, first, kind, op), number = rest, REDUCTIONS.index("none")
    stored, mask_key, mask_sample, mask_first, thresholds, keeps = mask
    mask_key, mask_sample, thresholds = _dense(mask_key, mask_sample, thresholds)
    whole = FlatMask(stored, mask_key, mask_sample, mask_first, thresholds, keeps).whole()
    return kernels_of(pred, op).residual(
        op,
        pred,
        y,
        z,
        _noise(key, sample, first),
        *_dense(table, index),
        penalty_columns(kind),
        whole,
        upstream,
        number,
        False,
        upstream is not None,
        kind=kind,
    )


def _sample_means(*args: Any) -> Tensor:
    means: Tensor = _residual(*args)[0]
    return means


def _residual_grad(upstream: Any, *args: Any) -> Tensor:
    grad: Tensor = _residual(*args, upstream=upstream)[2]
    return grad


def _corrupt(
    x: Tensor, thresholds: Tensor, key: Any, sample: Any, first: int, low: float, high: float, op: str
) -> Tensor:
    replaced: Tensor = kernels_of(x, op).corrupt(x, _noise(key, sample, first), *_dense(thresholds), low, high)
    return replaced


def _gaussian(mu: Tensor, log_var: Tensor, eps: Any, key: Any, sample: Any, first: int, op: str) -> Any:
    return kernels_of(mu, op).gaussian(mu, log_var, eps, _noise(key, sample, first))


def _gaussian_grad(
    z_grad: Any, kl_grad: Any, mu: Tensor, log_var: Tensor, eps: Any, key: Any, sample: Any, first: int, op: str
) -> Any:
    return kernels_of(mu, op).gaussian_grad(mu, log_var, eps, _noise(key, sample, first), z_grad, kl_grad)


def _fill(
    op: str, key: Tensor, sample: Tensor | None, first: int, B: int, D: int, dtype: torch.dtype, below: int = 2**32
) -> Tensor:
    noise = _noise(key, sample, first)
    assert noise is not None
    module = kernels_of(key, op)
    made: Tensor = (
        module.words(noise, B, D, key.device, below=below)
        if op == "bits"
        else module.normal(noise, B, D, dtype, key.device)
    )
    return made


def _fold_in(key: Tensor, data: Tensor) -> Tensor:
    noise = _noise(key, None, 0)
    folded: Tensor = kernels_of(key, "fold_in").fold_in_tensor(noise, data)
    return folded


def _fake_means(pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(pred.shape[0], dtype=torch.float64 if pred.dtype == torch.float64 else torch.float32)


_KERNELS: dict[str, tuple[Any, Any]] = {
    "affine": (_affine, lambda x, *_: torch.empty_like(x)),
    "affine2": (_affine2, lambda x, *_: (torch.empty_like(x), torch.empty_like(x))),
    "sample_means": (_sample_means, _fake_means),
    "residual_grad": (_residual_grad, lambda _upstream, pred, *_: torch.empty_like(pred)),
    "corrupt": (_corrupt, lambda x, *_: torch.empty_like(x)),
    "gaussian": (_gaussian, lambda mu, *_: (torch.empty_like(mu), _fake_means(mu))),
    "gaussian_grad": (_gaussian_grad, lambda _z, _kl, mu, v, *_: (torch.empty_like(mu), torch.empty_like(v))),
    "fold_in": (_fold_in, lambda key, data: torch.empty_like(key)),
    "fill": (_fill, lambda op, key, sample, first, B, D, dtype, *_: key.new_empty((B, D), dtype=dtype)),
}
for _name, (_kernel, _fake) in _KERNELS.items():
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"dae_fast::{_name}", _fake, lib=_library)


def _setup_affine(ctx: Any, inputs: Any) -> None:
    x, y, z, w, table, index, key, sample, *rest = inputs
    ctx.set_materialize_grads(False)
    read = (x, y, z, w) if ctx.needs_input_grad[5] else (None,) * 4  # for the table's gradient alone
    ctx.save_for_backward(*read, table, index, key, sample)
    ctx.rest = rest


def _backward_affine(ctx: Any, *grads: Tensor | None) -> Any:
    x, y, z, w, table, index, key, sample = unwrap_dead_wrappers(ctx.saved_tensors)
    first, columns, op = ctx.rest
    found = affine_gradients(
        ctx.needs_input_grad[1:], grads, (x, y, z, w), unflatten(key, sample, first), Rows(table, index), columns, op
    )
    return (None, *found, *[None] * 6)


def _setup_means(ctx: Any, inputs: Any) -> None:
    *tensors, mask_first, thresholds, keeps, key, sample, first, kind, op = inputs
    ctx.save_for_backward(*tensors, thresholds, key, sample)
    ctx.rest = mask_first, keeps, first, kind, op


def _backward_means(ctx: Any, upstream: Tensor) -> Any:
    pred, y, z, table, index, stored, mask_key, mask_sample, thresholds, key, sample = unwrap_dead_wrappers(
        ctx.saved_tensors
    )
    mask_first, keeps, first, kind, op = ctx.rest
    noise, rows = unflatten(key, sample, first), Rows(table, index)
    mask = FlatMask(stored, mask_key, mask_sample, mask_first, thresholds, keeps).whole()
    found = residual_gradients(op, ctx.needs_input_grad[1:], upstream, pred, y, z, noise, rows, mask, kind)
    return (None, *found, *[None] * 12)


def _setup_corrupt(ctx: Any, inputs: Any) -> None:
    _, thresholds, key, sample, first, _, _, op = inputs
    ctx.save_for_backward(thresholds, key, sample)
    ctx.rest = first, op


def _backward_corrupt(ctx: Any, g: Tensor) -> Any:
    (thresholds, key, sample), (first, op) = unwrap_dead_wrappers(ctx.saved_tensors), ctx.rest
    return None, torch.ops.dae_fast.corrupt(g, thresholds, key, sample, first, 0.0, 0.0, op), *[None] * 7


def _setup_gaussian(ctx: Any, inputs: Any) -> None:
    *tensors, first, op = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.rest = first, op


def _backward_gaussian(ctx: Any, z_grad: Tensor | None, kl_grad: Tensor | None) -> Any:
    mu, log_var, eps, key, sample = unwrap_dead_wrappers(ctx.saved_tensors)
    first, op = ctx.rest
    noise = unflatten(key, sample, first)
    found = gaussian_gradients(op, ctx.needs_input_grad[1:], z_grad, kl_grad, mu, log_var, eps, noise)
    return (None, *found, *[None] * 4)


for _name in ("affine", "affine2"):
    register_autograd(_library, _name, _setup_affine, _backward_affine)
register_autograd(_library, "sample_means", _setup_means, _backward_means)
register_autograd(_library, "gaussian", _setup_gaussian, _backward_gaussian)
register_autograd(_library, "corrupt", _setup_corrupt, _backward_corrupt)
for _name in _KERNELS:
    torch.library.register_vmap(f"dae_fast::{_name}", rule(getattr(torch.ops.dae_fast, _name).default), lib=_library)
