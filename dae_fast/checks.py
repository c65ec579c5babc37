"""Argument checks that the ops share: each says the op, the argument, what was expected and what came."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ._torch import in_functorch

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def samples(op: str, name: str, x: Tensor) -> None:
    """A floating tensor (B, ...)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {x.layout}")
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must have a batch dimension, got shape ()")


def like(op: str, name: str, t: Tensor, ref_name: str, ref: Tensor) -> None:
    """A floating tensor of ref's shape and device."""
    samples(op, name, t)
    if t.shape != ref.shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(ref.shape)}, got {tuple(t.shape)}")
    if t.device != ref.device:
        raise ValueError(f"{op}: {name} must be on {ref.device} like {ref_name}, got {t.device}")


def promote(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors (None stays None) to their common dtype, as torch's own arithmetic would."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) <= 1:
        return tensors
    common = dtypes.pop()
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return tuple(None if t is None else t.to(common) for t in tensors)


def as_number(op: str, name: str, value: Any) -> float:
    """int, float or a numpy scalar."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a float or a tensor, got {type(value).__name__}")
    return float(value)


def check_per_sample(op: str, name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number (returned as a float), a () tensor, or one entry per sample, or for more of x's leading dimensions."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating, got {value.dtype}")
        if value.dim() and value.shape not in ((1,), x.shape[: value.dim()]):
            raise ValueError(
                f"{op}: {name} must be a float or have shape ({x.shape[0]},), one per sample, got {tuple(value.shape)}"
            )
        if value.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like the samples, got {value.device}")
        return value
    return as_number(op, name, value)


def can_read(value: Tensor) -> bool:
    """Whether looking at the values costs nothing: on the CPU, outside tracing and transforms."""
    return (
        value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not in_functorch()
    )
