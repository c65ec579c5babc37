"""Every private name of torch that dae_fast uses, each with why; csrc/ takes its callables from here too.

tests/test_torch_fence.py holds the rest of the package to public names, and runs with the oldest and the newest torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch._C._functorch import is_legacy_batchedtensor as is_batched
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import _profiler_enabled as profiling  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# What surrounds a call. torch tells it only so; a public torch.compiler-like question for each would replace them.
in_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
function_modes: Callable[[], bool] = torch._C._is_torch_function_mode_enabled
jit_tracing: Callable[[], Any] = torch._C._get_tracing_state

# The table of C functions behind __dlpack__, from which csrc/tensor.cpp reads a tensor in a tenth of the time; DLPack's
# own standard, whose place in torch has no public name yet.
dlpack_exchange: Any = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)

# torch.cuda.current_stream() makes an object at every call; this is its number.
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", int)  # none without CUDA

any_requires_grad: Callable[..., bool] = torch._C._any_requires_grad

__all__ = [
    "DirectFunction",
    "any_requires_grad",
    "batchable",
    "constant_result",
    "current_raw_stream",
    "dispatch_modes",
    "dlpack_exchange",
    "dual_level",
    "fake_mode",
    "forward_ad",
    "function_modes",
    "gathered",
    "in_functorch",
    "is_batched",
    "is_dtensor",
    "is_wrapped",
    "jit_tracing",
    "outside_modes",
    "profiling",
    "register_autograd",
    "saveable",
    "unwrap_dead_wrappers",
]


F = TypeVar("F", bound=Callable[..., Any])


def constant_result(function: F) -> F:
    """As torch.compiler.assume_constant_result, which imports all of Dynamo, seconds of it, to set this mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def dual_level() -> bool:
    """Whether forward-mode AD is under way; torch.autograd.forward_ad keeps it to itself."""
    return forward_ad._current_level >= 0


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor; without an import of torch.distributed.tensor, which takes a while."""
    if type(value) is Tensor or not isinstance(value, Tensor):
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def gathered(value: Any) -> Any:
    """A DTensor as the plain tensor that it is on every rank: of levels, weights and ids, which are small."""
    return value.full_tensor() if is_dtensor(value) else value


def saveable(value: Tensor) -> Tensor:
    """An index, key or ids that backward can read, plain: one made in inference mode autograd would not save."""
    if not is_compiling() and value.is_inference() and not torch.is_inference_mode_enabled():
        return value.clone()
    found: Tensor = gathered(value)
    return found


def fake_mode() -> Any:
    """The FakeTensorMode around the call, or None."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


@contextmanager
def outside_modes() -> Iterator[None]:
    """What is cached must be a plain tensor, whatever traces, transforms or infers around the call."""
    tracing = jit_tracing()
    if tracing is not None:  # else not even touched: within a kernel of torch.library there may be no tracer
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # or only the first trace would see how it is made
    try:
        with (
            torch.inference_mode(False),
            temporarily_clear_interpreter_stack(),
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
        ):
            yield
    finally:
        if tracing is not None:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


class DirectFunction(torch.autograd.Function):
    """A Function of eager calls that skips torch's search for transforms, a third of what `apply` takes.

    The old style, without setup_context, costs a quarter; fewer arguments cost less. A faster public apply would
    replace it.
    """

    apply: Callable[..., Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]


def gradients_in_torch(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], upstream: Tensor
) -> list[Tensor | None]:
    """Of function(*inputs), in torch's own arithmetic, for the inputs that need one: differentiable in turn."""
    with torch.enable_grad():
        made = function(*inputs)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(made, wanted, upstream.to(made.dtype), create_graph=True))
    return [next(found) if need else None for need in needs]


class _ToDispatcher(TorchDispatchMode):
    """Is only a reason to take the dispatcher."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def batchable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Of an eager Function: gradients that is_grads_batched=True batches have no memory for a kernel to read."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        for g in grads:  # any() of a generator takes three times as long
            if g is not None and is_batched(g):
                with _ToDispatcher():
                    return backward(ctx, *grads)
        return backward(ctx, *grads)

    return run


def register_autograd(library: Any, name: str, in_torch: Callable[..., Any], setup: Any, backward: Any) -> None:
    """As torch.library.register_autograd, whose ops refuse to run inside torch.func; it will replace this when they do.

    Each level of torch.func comes here in its turn, so what is wanted is a Function of one level; setup None: of an op
    that is part of a gradient there is none. Dual numbers come here too: the primal is the op's own, the tangent that
    of in_torch, the same op in torch's operations. torch.library has no rule for those.
    """
    op = getattr(torch.ops.dae_fast, name).default

    def below(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, keyset: Any, *arguments: Any) -> Any:
        # For the levels of torch.func around this one; without it they get zeros.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            outputs = below(keyset, arguments)
        setup(ctx, arguments)
        return outputs

    function: Any = type(
        f"_{name}_backward",
        (torch.autograd.function._SingleLevelFunction,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if (dual_level() or in_functorch()) and any(is_dual(a) for a in arguments):
            primal = op(*(torch._VF._unpack_dual(a, level=0).primal if is_dual(a) else a for a in arguments))
            tangents = in_torch(*arguments)
            if isinstance(primal, Tensor):
                return _with_tangent(primal, tangents)
            return tuple(_with_tangent(p, t) for p, t in zip(primal, tangents, strict=True))
        if setup is not None and torch.is_grad_enabled() and any_requires_grad(*arguments):
            with enable_single_level_autograd_function():
                return function.apply(keyset, *arguments)
        return below(keyset, arguments)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def is_dual(value: Any) -> bool:
    """Whether a tensor carries a tangent. There is one level of them, and a compiled graph does not tell forward_ad."""
    return isinstance(value, Tensor) and torch._VF._unpack_dual(value, level=0).tangent is not None


def _with_tangent(primal: Tensor, of: Tensor) -> Tensor:
    tangent = torch._VF._unpack_dual(of, level=0).tangent
    return primal if tangent is None else torch._VF._make_dual(primal, tangent, level=0)
