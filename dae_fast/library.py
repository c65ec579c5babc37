"""torch.library ops: what torch.compile, export, torch.func, dual numbers, fake tensors, modes and subclasses see.

Plain eager calls do not come here (primitives/routing.py). A key is always a tensor, so that a compiled function holds
no constant; the noise of an op is absent when its key is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ._torch import register_autograd, unwrap_dead_wrappers
from .kernels import reference
from .kernels.dispatch import kernels_of
from .kernels.spec import ABSENT, BLEND, Coefficients, Kind, Reduction, Residual, Wanted, compute_dtype, loss_of, map_of
from .noise import FlatNoise, Noise
from .ops.reparameterisation import gradients as gaussian_gradients
from .primitives.batching import rule
from .primitives.masks import FlatMask
from .primitives.residuals import gradients as residual_gradients
from .primitives.residuals import pred_gradient_in_torch
from .primitives.sums import gradients as affine_gradients
from .primitives.sums import table_gradient

_NOISE = "Tensor? key, Tensor? sample, SymInt first_sample, SymInt rows_per_sample, SymInt first_element"
_ROWS = "Tensor table, Tensor? index"
_AFFINE = f"(Tensor x, Tensor? y, Tensor? z, Tensor? w, Tensor? v, {_ROWS}, {_NOISE}, int[] columns, str op)"
_MASK = "Tensor? mask, Tensor? mask_key, Tensor? mask_sample, SymInt mask_first_sample, Tensor? thresholds, bool keeps"
_RESIDUAL = f"Tensor pred, Tensor? y, Tensor? z, {_ROWS}, {_MASK}, {_NOISE}, int kind, int[] columns, str op"
_SCHEMAS = {
    "affine": f"{_AFFINE} -> Tensor",
    "affine2": f"{_AFFINE} -> (Tensor, Tensor)",
    "sample_means": f"({_RESIDUAL}) -> Tensor",
    "residual_grad": f"(Tensor upstream, {_RESIDUAL}) -> Tensor",
    "corrupt": f"(Tensor x, Tensor thresholds, {_NOISE}, float low, float high, str op) -> Tensor",
    "gaussian": f"(Tensor mu, Tensor log_var, Tensor? eps, {_NOISE}, str op) -> (Tensor, Tensor)",
    "gaussian_grad": f"(Tensor? z_grad, Tensor? kl_grad, Tensor mu, Tensor log_var, Tensor? eps, {_NOISE}, str op)"
    " -> (Tensor, Tensor)",
    "embedding": "(Tensor x, Tensor W, SymInt D, bool flip, str op) -> Tensor",
    "fold_in": "(Tensor key, Tensor data) -> Tensor",
    "fill": f"(str op, {_NOISE}, SymInt B, SymInt D, ScalarType dtype, int below=4294967296) -> Tensor",
}
_OF_NOISE = 5  # arguments

_library = Library("dae_fast", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)


def _dense(*tensors: Tensor | None) -> list[Any]:
    """What the kernels read through a bare address: a table, an index, a key, sample ids."""
    return [None if t is None else t.contiguous() for t in tensors]


def _noise(key: Tensor | None, sample: Tensor | None, *rest: int) -> Noise | None:
    return FlatNoise(*_dense(key, sample), *rest).whole()


def _affine_arguments(x: Any, y: Any, z: Any, w: Any, v: Any, table: Any, index: Any, *rest: Any) -> tuple[Any, ...]:
    """As a backend's affine takes them."""
    *noise, columns, op = rest
    return (
        map_of(op, tuple(columns)),
        (x, y, z, w),
        _noise(*noise) if v is None else v,
        Coefficients(*_dense(table, index)),
    )


def _affine2(*args: Any) -> Any:
    spec, inputs, noise, rows = _affine_arguments(*args)
    return kernels_of(inputs[0], spec.op).affine(spec, inputs, noise, rows)


def _affine(*args: Any) -> Tensor:
    result: Tensor = _affine2(*args)[0]
    return result


def _residual_arguments(pred: Any, y: Any, z: Any, table: Any, index: Any, *rest: Any) -> tuple[Any, ...]:
    """The loss, its operands and rows."""
    *of_mask_and_noise, kind, columns, op = rest
    stored, mask_key, mask_sample, first, thresholds, keeps, *noise = of_mask_and_noise
    mask_key, mask_sample, thresholds = _dense(mask_key, mask_sample, thresholds)
    mask = FlatMask(stored, mask_key, mask_sample, first, thresholds, keeps).whole()
    spec = loss_of(op, Kind(kind), Reduction.none, (*columns, ABSENT, ABSENT, ABSENT))
    return spec, Residual(pred, y, z, _noise(*noise), mask), Coefficients(*_dense(table, index))


def _sample_means(*args: Any) -> Tensor:
    spec, operands, rows = _residual_arguments(*args)
    means: Tensor = kernels_of(operands.pred, spec.op).residual(spec, operands, rows, Wanted()).means
    return means


def _residual_grad(upstream: Any, *args: Any) -> Tensor:
    spec, operands, rows = _residual_arguments(*args)
    wanted = Wanted(grad=True, weight=upstream)
    grad: Tensor = kernels_of(operands.pred, spec.op).residual(spec, operands, rows, wanted).grad
    return grad


def _corrupt(x: Tensor, thresholds: Tensor, *rest: Any) -> Tensor:
    *noise, low, high, op = rest
    replaced: Tensor = kernels_of(x, op).corrupt(x, _noise(*noise), *_dense(thresholds), (low, high))
    return replaced


def _gaussian(mu: Tensor, log_var: Tensor, eps: Any, *rest: Any) -> Any:
    *noise, op = rest
    return kernels_of(mu, op).gaussian(mu, log_var, eps, _noise(*noise))


def _gaussian_grad(z_grad: Any, kl_grad: Any, mu: Tensor, log_var: Tensor, eps: Any, *rest: Any) -> Any:
    *noise, op = rest
    return kernels_of(mu, op).gaussian_grad(mu, log_var, eps, _noise(*noise), z_grad, kl_grad)


def _embedding(x: Tensor, W: Tensor, D: int, flip: bool, op: str) -> Tensor:
    made = _fake_embedding(x, W, D)
    kernels_of(x, op).embedding(x, W, flip, made)
    return made


def _fake_embedding(x: Tensor, _: Tensor, D: int, *__: Any) -> Tensor:
    return x.new_empty((x.shape[0], D), dtype=torch.float32)


def _fill(op: str, *rest: Any) -> Tensor:
    flat, (B, D, dtype), below = rest[:_OF_NOISE], rest[_OF_NOISE:][:3], (*rest[_OF_NOISE + 3 :], 2**32)[0]
    noise, device = _noise(*flat), flat[0].device
    backend = kernels_of(flat[0], op)
    made: Tensor = (
        backend.words(noise, (B, D), device, below=below)
        if op == "bits"
        else backend.normal(noise, (B, D), dtype, device)
    )
    return made


def _fold_in(key: Tensor, data: Tensor) -> Tensor:
    folded: Tensor = kernels_of(key, "fold_in").fold_in_tensor(_noise(key, None, 0), data)
    return folded


def _fake_means(pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(pred.shape[0], dtype=compute_dtype(pred.dtype))


def _fake_fill(op: str, key: Tensor, *rest: Any) -> Tensor:
    B, D, dtype = rest[_OF_NOISE - 1 :][:3]
    return key.new_empty((B, D), dtype=dtype)


_KERNELS: dict[str, tuple[Any, Any]] = {
    "affine": (_affine, lambda x, *_: torch.empty_like(x)),
    "affine2": (_affine2, lambda x, *_: (torch.empty_like(x), torch.empty_like(x))),
    "sample_means": (_sample_means, _fake_means),
    "residual_grad": (_residual_grad, lambda _upstream, pred, *_: torch.empty_like(pred)),
    "corrupt": (_corrupt, lambda x, *_: torch.empty_like(x)),
    "gaussian": (_gaussian, lambda mu, *_: (torch.empty_like(mu), _fake_means(mu))),
    "gaussian_grad": (_gaussian_grad, lambda _z, _kl, mu, v, *_: (torch.empty_like(mu), torch.empty_like(v))),
    "embedding": (_embedding, _fake_embedding),
    "fold_in": (_fold_in, lambda key, data: torch.empty_like(key)),
    "fill": (_fill, _fake_fill),
}
for _name, (_kernel, _fake) in _KERNELS.items():
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"dae_fast::{_name}", _fake, lib=_library)


# What torch differentiates forward: the same in its own operations, of which only the tangents are taken. The noise is
# filled as everywhere.


def _filled(noise: Noise | None, like: Tensor) -> Tensor | None:
    return None if noise is None else noise.normal(like.shape, dtype=compute_dtype(like.dtype), device=like.device)


def _affine_in_torch(x: Any, y: Any, z: Any, w: Any, v: Any, table: Any, index: Any, *rest: Any) -> tuple[Tensor, ...]:
    spec, _, noise, _ = _affine_arguments(x, y, z, w, v, table, index, *rest)
    eps = _filled(noise, x) if isinstance(noise, Noise) else noise
    inputs = (x, y, z, w) if spec.fifth or eps is None else (x, y, eps, w)
    return reference.affine(spec, inputs, eps if spec.fifth else None, Coefficients(table, index))


def _means_in_torch(*args: Any) -> Tensor:
    spec, operands, rows = _residual_arguments(*args)
    if operands.noise is not None:
        operands = operands._replace(z=_filled(operands.noise, operands.pred), noise=None)
    sums, kept = reference.residual_sums(spec, operands, rows)
    return sums / kept.clamp(min=1)


def _residual_grad_in_torch(upstream: Tensor, *args: Any) -> Tensor:
    spec, operands, rows = _residual_arguments(*args)
    return pred_gradient_in_torch(spec, upstream, operands, rows)


def _corrupt_in_torch(x: Tensor, thresholds: Tensor, *rest: Any) -> Tensor:
    *noise, low, high, _ = rest
    stream = _noise(*noise)
    assert stream is not None
    return reference.corrupt(x, stream, thresholds, (low, high))


def _gaussian_in_torch(mu: Tensor, log_var: Tensor, eps: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    *noise, _ = rest
    stream = _noise(*noise)
    return reference.gaussian(mu, log_var, eps if stream is None else _filled(stream, mu), None)


def _gaussian_grad_in_torch(z_grad: Any, kl_grad: Any, mu: Tensor, log_var: Tensor, eps: Any, *rest: Any) -> Any:
    *noise, _ = rest
    stream = _noise(*noise)
    return reference.gaussian_grad(mu, log_var, eps if stream is None else _filled(stream, mu), None, z_grad, kl_grad)


def _embedding_in_torch(x: Tensor, W: Tensor, D: int, flip: bool, _: str) -> Tensor:
    return reference.waves(x, W, D, flip)


def _setup_affine(ctx: Any, inputs: Any) -> None:
    x, y, z, w, v, table, index, key, sample, *rest = inputs
    ctx.set_materialize_grads(False)
    # For the table's gradient, and those of a blend.
    read = (x, y, z, w, v) if ctx.needs_input_grad[6] or rest[-2][1] == BLEND else (None,) * 5
    ctx.save_for_backward(*read, table, index, key, sample)
    ctx.rest = rest


def _backward_affine(ctx: Any, *grads: Tensor | None) -> Any:
    x, y, z, w, v, table, index, key, sample = unwrap_dead_wrappers(ctx.saved_tensors)
    *place, columns, op = ctx.rest
    noise: Any = FlatNoise(key, sample, *place).whole() if v is None else v
    spec = map_of(op, tuple(columns))
    rows = Coefficients(table, index)
    *found, sums = affine_gradients(ctx.needs_input_grad[1:], grads, spec, (x, y, z, w), noise, rows)
    return (None, *found, table_gradient(sums, rows), *[None] * 8)


def _setup_means(ctx: Any, inputs: Any) -> None:
    pred, y, z, table, index, mask, mask_key, mask_sample, first, thresholds, keeps, key, sample, *rest = inputs
    ctx.save_for_backward(pred, y, z, table, index, mask, mask_key, mask_sample, thresholds, key, sample)
    ctx.rest = first, keeps, rest


def _backward_means(ctx: Any, upstream: Tensor) -> Any:
    pred, y, z, table, index, stored, mask_key, mask_sample, thresholds, key, sample = unwrap_dead_wrappers(
        ctx.saved_tensors
    )
    first, keeps, (*place, kind, columns, op) = ctx.rest
    noise, rows = FlatNoise(key, sample, *place).whole(), Coefficients(table, index)
    mask = FlatMask(stored, mask_key, mask_sample, first, thresholds, keeps).whole()
    spec = loss_of(op, Kind(kind), Reduction.none, (*columns, ABSENT, ABSENT, ABSENT))
    operands = Residual(pred, y, z, noise, mask)
    return (None, *residual_gradients(ctx.needs_input_grad[1:], spec, upstream, operands, rows), *[None] * 15)


def _setup_corrupt(ctx: Any, inputs: Any) -> None:
    _, thresholds, key, sample, *rest = inputs
    ctx.save_for_backward(thresholds, key, sample)
    ctx.rest = rest


def _backward_corrupt(ctx: Any, g: Tensor) -> Any:
    (thresholds, key, sample), (*place, _, _, op) = unwrap_dead_wrappers(ctx.saved_tensors), ctx.rest
    return None, torch.ops.dae_fast.corrupt(g, thresholds, key, sample, *place, 0.0, 0.0, op), *[None] * 9


def _setup_gaussian(ctx: Any, inputs: Any) -> None:
    mu, log_var, eps, key, sample, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mu, log_var, eps, key, sample)
    ctx.rest = rest


def _backward_gaussian(ctx: Any, z_grad: Tensor | None, kl_grad: Tensor | None) -> Any:
    mu, log_var, eps, key, sample = unwrap_dead_wrappers(ctx.saved_tensors)
    *place, op = ctx.rest
    noise = FlatNoise(key, sample, *place).whole()
    found = gaussian_gradients(op, ctx.needs_input_grad[1:], (z_grad, kl_grad), mu, log_var, eps, noise)
    return (None, *found, *[None] * 6)


def _setup_embedding(ctx: Any, inputs: Any) -> None:
    x, W, _, ctx.flip, _ = inputs
    ctx.save_for_backward(x, W)


def _backward_embedding(ctx: Any, g: Tensor) -> Any:
    x, W = unwrap_dead_wrappers(ctx.saved_tensors)
    return None, reference.waves_gradient(g, x, W, ctx.flip), *[None] * 4


_DIFFERENTIABLE: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "affine": (lambda *args: _affine_in_torch(*args)[0], _setup_affine, _backward_affine),
    "affine2": (_affine_in_torch, _setup_affine, _backward_affine),
    "sample_means": (_means_in_torch, _setup_means, _backward_means),
    "residual_grad": (_residual_grad_in_torch, None, None),
    "corrupt": (_corrupt_in_torch, _setup_corrupt, _backward_corrupt),
    "gaussian": (_gaussian_in_torch, _setup_gaussian, _backward_gaussian),
    "gaussian_grad": (_gaussian_grad_in_torch, None, None),
    "embedding": (_embedding_in_torch, _setup_embedding, _backward_embedding),
}
for _name, (_in_torch, _setup, _backward) in _DIFFERENTIABLE.items():
    register_autograd(_library, _name, _in_torch, _setup, _backward)
for _name in _KERNELS:
    torch.library.register_vmap(f"dae_fast::{_name}", rule(getattr(torch.ops.dae_fast, _name).default), lib=_library)
