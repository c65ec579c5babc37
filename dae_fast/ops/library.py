"""torch.library ops: what torch.compile, export, fake tensors, modes and subclasses see.

Eager calls do not come here (routing.py). A key is always a tensor, so that a compiled function holds
no constant; the noise of an op is absent when its key is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ..backends import native_module as native
from ..noise import Noise
from ..schedule import Rows
from .affine import _gradients as affine_gradients
from .residual import COLUMNS, REDUCTIONS
from .residual import gradients as residual_gradients

_NOISE = "Tensor? key, Tensor? sample, SymInt first_sample"
_ROWS = "Tensor table, Tensor? index"
_SCHEMAS = {
    "affine": f"(Tensor x, Tensor? y, Tensor? z, {_ROWS}, {_NOISE}, int[] columns, str op) -> Tensor",
    "affine2": f"(Tensor x, Tensor? y, Tensor? z, {_ROWS}, {_NOISE}, int[] columns, str op) -> (Tensor, Tensor)",
    "sample_means": f"(Tensor pred, Tensor? y, Tensor? z, {_ROWS}, Tensor? mask, {_NOISE}, str op) -> Tensor",
    "residual_grad": f"(Tensor upstream, Tensor pred, Tensor? y, Tensor? z, {_ROWS}, Tensor? mask, {_NOISE}, str op)"
    " -> Tensor",
    "fill": "(str op, Tensor key, Tensor? sample, SymInt first_sample, SymInt B, SymInt D, ScalarType dtype) -> Tensor",
}

_library = Library("dae_fast", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)


def _noise(key: Tensor | None, sample: Tensor | None, first_sample: int) -> Noise | None:
    return None if key is None else Noise._make(0, 0, key, sample, first_sample)


def _affine2(
    x: Any, y: Any, z: Any, table: Any, index: Any, key: Any, sample: Any, first: Any, columns: Any, op: Any
) -> Any:
    return native.affine(op, x, y, z, _noise(key, sample, first), table, index, tuple(columns))


def _affine(*args: Any) -> Tensor:
    result: Tensor = _affine2(*args)[0]
    return result


def _sample_means(
    pred: Any, y: Any, z: Any, table: Any, index: Any, mask: Any, key: Any, sample: Any, first: Any, op: Any
) -> Tensor:
    noise = _noise(key, sample, first)
    number = REDUCTIONS.index("none")
    means, _, _ = native.residual(
        op, pred, y, z, noise, table, index, COLUMNS[1:], mask, None, 1.0, number, False, False
    )
    return means


def _residual_grad(
    upstream: Any,
    pred: Any,
    y: Any,
    z: Any,
    table: Any,
    index: Any,
    mask: Any,
    key: Any,
    sample: Any,
    first: Any,
    op: Any,
) -> Tensor:
    noise, weight = _noise(key, sample, first), upstream.double().contiguous()
    number = REDUCTIONS.index("none")
    _, _, grad = native.residual(
        op, pred, y, z, noise, table, index, COLUMNS[1:], mask, weight, 1.0, number, False, True
    )
    assert grad is not None
    return grad


def _fill(op: str, key: Tensor, sample: Tensor | None, first: int, B: int, D: int, dtype: torch.dtype) -> Tensor:
    noise = Noise._make(0, 0, key, sample, first)
    return native.words(noise, B, D) if op == "bits" else native.normal(noise, B, D, dtype)


def _fake_means(pred: Tensor, *_: Any) -> Tensor:
    return pred.new_empty(pred.shape[0], dtype=torch.float64 if pred.dtype == torch.float64 else torch.float32)


_KERNELS: dict[str, tuple[Any, Any]] = {
    "affine": (_affine, lambda x, *_: torch.empty_like(x)),
    "affine2": (_affine2, lambda x, *_: (torch.empty_like(x), torch.empty_like(x))),
    "sample_means": (_sample_means, _fake_means),
    "residual_grad": (_residual_grad, lambda _upstream, pred, *_: torch.empty_like(pred)),
    "fill": (_fill, lambda op, key, sample, first, B, D, dtype: key.new_empty((B, D), dtype=dtype)),
}
for _name, (_kernel, _fake) in _KERNELS.items():
    _library.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"dae_fast::{_name}", _fake, lib=_library)


def _setup_affine(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, z, table, index, key, sample, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, z, table, index, key, sample)
    ctx.rest = rest


def _backward_affine(ctx: Any, *grads: Tensor | None) -> Any:
    x, y, z, table, index, key, sample = ctx.saved_tensors
    first, columns, op = ctx.rest
    found = affine_gradients(
        ctx.needs_input_grad, grads, (x, y, z), _noise(key, sample, first), Rows(table, index), tuple(columns), op
    )
    return (*found, *[None] * 6)


def _setup_means(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, first, op = inputs
    ctx.save_for_backward(*tensors)
    ctx.rest = first, op


def _backward_means(ctx: Any, upstream: Tensor) -> Any:
    pred, y, z, table, index, mask, key, sample = ctx.saved_tensors
    first, op = ctx.rest
    found = residual_gradients(
        op, ctx.needs_input_grad, upstream, pred, y, z, _noise(key, sample, first), Rows(table, index), mask
    )
    return (*found, *[None] * 6)


for _name in ("affine", "affine2"):
    torch.library.register_autograd(f"dae_fast::{_name}", _backward_affine, setup_context=_setup_affine, lib=_library)
torch.library.register_autograd("dae_fast::sample_means", _backward_means, setup_context=_setup_means, lib=_library)
