"""Which of its ways an op takes. The plain eager call is the fast one: it skips torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends

_PLAIN = (Tensor, torch.nn.Parameter)


def _no_core(*_: Any) -> None:
    """Where there is no native core no call is plain."""


# A plain call, straight from Python's objects to the kernel: the result, or None for everything else. Guard it with
# torch.compiler.is_compiling(), which cannot look inside.
_native = backends.module("native")
plain_affine: Callable[..., Any] = _no_core if _native is None else _native.plain_affine
plain_loss: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | int | None] | None] = (
    _no_core if _native is None else _native.plain_loss
)
is_one: Callable[[Tensor], bool | None] = _no_core if _native is None else _native.is_one


def differentiate_with(function: Callable[..., Any]) -> None:
    """What a plain call of the affine map becomes where a gradient is wanted."""
    if _native is not None:
        _native.use_gradients(function)


class Route(Enum):
    REFERENCE = 0  # plain torch
    DIRECT = 1  # straight to the kernels
    DISPATCHER = 2  # torch.library ops: compile, export, torch.func, fake tensors, modes, subclasses


def route(op: str, first: Tensor, *others: Tensor | None) -> Route:
    if not backends.has_kernels(first, op):
        return Route.REFERENCE
    if torch.compiler.is_compiling():
        return Route.DISPATCHER
    if forward_ad._current_level >= 0:
        return Route.REFERENCE  # dual tensors: torch differentiates the plain formula
    if torch._C._are_functorch_transforms_active():
        return Route.DISPATCHER
    if torch._C._len_torch_dispatch_stack() or torch._C._is_torch_function_mode_enabled() or first.is_meta:
        return Route.DISPATCHER
    for t in (first, *others):
        # A negated view (of a conjugate's imaginary part) does not hold what lies in its memory.
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or is_functorch_wrapped_tensor(t)):
            return Route.DISPATCHER
    return Route.DIRECT


def wants_grad(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


class DirectFunction(torch.autograd.Function):
    """Of eager calls that take the direct route, which torch's `apply` spends a third of its time on looking for.

    The old style, without setup_context, costs a quarter; fewer arguments cost less.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]


class _ToDispatcher(TorchDispatchMode):
    """Only a reason for `route` to take the dispatcher."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def batchable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Of an eager Function: gradients that is_grads_batched=True batches have no memory for a kernel to read."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if any(g is not None and is_legacy_batchedtensor(g) for g in grads):
            with _ToDispatcher():
                return backward(ctx, *grads)
        return backward(ctx, *grads)

    return run
