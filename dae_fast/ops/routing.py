"""Which of its ways an op takes. The plain eager call is the fast one: it skips torch's dispatcher."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends

_PLAIN = (Tensor, torch.nn.Parameter)


class Route(Enum):
    REFERENCE = 0  # plain torch
    DIRECT = 1  # straight to the kernels
    TRANSFORM = 2  # inside torch.func: an autograd.Function with a vmap rule
    DISPATCHER = 3  # torch.library ops: compile, export, fake tensors, modes, subclasses


def route(op: str, first: Tensor, *others: Tensor | None) -> Route:
    if not backends.use_native(first.device, op):
        return Route.REFERENCE
    if torch.compiler.is_compiling():
        return Route.DISPATCHER
    if forward_ad._current_level >= 0:
        return Route.REFERENCE  # dual tensors: torch differentiates the plain formula
    if torch._C._are_functorch_transforms_active():
        return Route.TRANSFORM
    if torch._C._len_torch_dispatch_stack() or torch._C._is_torch_function_mode_enabled() or first.is_meta:
        return Route.DISPATCHER
    if type(first) not in _PLAIN:
        return Route.DISPATCHER
    for t in others:
        if t is not None and type(t) not in _PLAIN:
            return Route.DISPATCHER
    return Route.DIRECT


def wants_grad(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)
