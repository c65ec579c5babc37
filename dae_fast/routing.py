"""Which of its ways an op takes. The plain eager call is the fast one: it skips torch's dispatcher."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ._torch import dispatch_modes, dual_level, function_modes, in_functorch, is_dtensor, is_wrapped, jit_tracing
from .kernels import dispatch

_PLAIN = (Tensor, torch.nn.Parameter)


def _no_core(*_: Any) -> None:
    """Where there is no native core no call is plain."""


# A plain call, straight from Python's objects to the kernel: the result, or None for everything else. Guard it with
# torch.compiler.is_compiling(), which cannot look inside.
_native = dispatch.module("native")
fast_map: Any = _no_core if _native is None else _native.fast_map
fast_step: Any = _no_core if _native is None else _native.fast_step
fast_loss: Any = _no_core if _native is None else _native.fast_loss
fast_loss_grad: Any = _no_core if _native is None else _native.fast_loss_grad
fast_normal: Any = _no_core if _native is None else _native.fast_normal
is_one: Any = _no_core if _native is None else _native.is_one
_are_plain: Any = _no_core if _native is None else _native.are_plain


class Route(Enum):
    REFERENCE = 0  # plain torch
    DIRECT = 1  # straight to the kernels
    DISPATCHER = 2  # torch.library ops: compile, export, torch.func, dual numbers, fake tensors, modes, subclasses


def route(op: str, first: Tensor, *others: Tensor | None) -> Route:
    if not torch.compiler.is_compiling() and _are_plain(first, *others):
        return Route.DIRECT  # as what follows finds too, in five times as long
    if not dispatch.has_kernels(first, op):
        return Route.REFERENCE
    if torch.compiler.is_compiling() or dual_level() or in_functorch() or jit_tracing() is not None:
        return Route.DISPATCHER
    if dispatch_modes() or function_modes() or first.is_meta:
        return Route.DISPATCHER
    for t in (first, *others):
        # A negated view (of a conjugate's imaginary part) does not hold what lies in its memory.
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or is_wrapped(t)):
            return Route.DISPATCHER
    return Route.DIRECT


def on_mesh(*tensors: Any) -> Any:
    """dae_fast.dtensor, which runs an op on the parts of DTensors, where one of them is a DTensor; else None."""
    if not any(map(is_dtensor, tensors)):
        return None
    from . import dtensor

    return dtensor


def beside(t: Tensor, x: Tensor) -> Tensor:
    """t for torch's own arithmetic with x: a DTensor where x is one."""
    mesh = on_mesh(x)
    return t if mesh is None or is_dtensor(t) else mesh.beside(t, x)


def wants_grad(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    for t in tensors:  # noqa: SIM110  # a generator would take twice the time
        if t is not None and t.requires_grad:
            return True
    return False
