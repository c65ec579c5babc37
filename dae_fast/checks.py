"""Checks of arguments: each says what was called, the argument, what was expected and what came.

`arguments` is the one table of them: a name means one thing in the whole library, so it is checked alike everywhere.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from ._torch import dispatch_modes, gathered, in_functorch, jit_tracing

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, str, Any], Any]  # of (what was called, the argument, its value): what to use instead, or None


def kind_of(value: object) -> str:
    return type(value).__name__


def integer(op: str, name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The int that it is: a numpy integer too, no bool."""
    try:
        if isinstance(value, (bool, type)):
            raise TypeError
        found = operator.index(value)
    except (TypeError, RuntimeError):  # torch says of a tensor without a value that it is no int by the latter
        raise TypeError(f"{op}: {name} must be an int, got {kind_of(value)}") from None
    if most is not None and least is not None:
        if not least <= found <= most:
            raise ValueError(f"{op}: {name} must be in [{least}, {most}], got {found}")
    elif least is not None and found < least:
        bound = {0: "not be negative", 1: "be positive"}.get(least, f"be at least {least}")
        raise ValueError(f"{op}: {name} must {bound}, got {found}")
    return found


def is_number(value: object) -> bool:
    """Of real ones; a bool is none."""
    return type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool))  # float at once


def number(op: str, name: str, value: Any, which: str = "") -> float:
    """The float that it is: an int or a numpy scalar too; no bool, no tensor.

    which: the kind that it must be, one of NUMBERS.
    """
    if not is_number(value):
        raise TypeError(f"{op}: {name} must be a number, got {kind_of(value)}")
    try:
        found = float(value)
    except OverflowError:  # an int or a fraction of more than 1e308
        raise ValueError(f"{op}: {name} must be within float64, got a {kind_of(value)} beyond it") from None
    if which and not NUMBERS[which](found):
        raise ValueError(f"{op}: {name} must be {which}, got {found}")
    return found


NUMBERS: dict[str, Callable[[float], bool]] = {
    "no NaN": lambda v: v == v,  # math.isnan and isfinite are not what torch.compile takes of a float that changes
    "finite": lambda v: -math.inf < v < math.inf,
    "finite and not negative": lambda v: 0 <= v < math.inf,
    "positive and finite": lambda v: 0 < v < math.inf,
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in (0, 1]": lambda v: 0 < v <= 1,
    "in (0, 1)": lambda v: 0 < v < 1,
}


def plain_number(op: str, name: str, value: Any, which: str = "") -> int | float:
    """As number, but an int stays one, as it was written, where float64 can tell it."""
    found = number(op, name, value, which)
    return int(value) if isinstance(value, int) and abs(value) <= 2**53 else found


def a_number(op: str, name: str, value: Any) -> float:
    """Its range is its function's own."""
    return number(op, name, value)


def shape(op: str, value: Any) -> tuple[int, ...]:
    """(B, ...), no size negative."""
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1):
        raise TypeError(f"{op}: shape must be (B, ...), got {kind_of(value)}")
    sizes = tuple(integer(op, "shape (B, ...)", n) for n in value)
    if not sizes or any(n < 0 for n in sizes):
        raise ValueError(f"{op}: shape must be (B, ...), got {sizes}")
    return sizes


def device(op: str, value: Any) -> torch.device:
    """Of a torch.device, a name or a number."""
    try:
        if isinstance(value, bool) or not isinstance(value, (torch.device, str, int)):
            raise TypeError
        return torch.device(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{op}: device must be a torch.device or its name, got {value!r}") from None


def a_device(op: str, name: str, value: Any) -> torch.device:
    return device(op, value)


Array = np.ndarray[Any, Any]


def as_tensor(value: Any) -> Any:
    """A tensor on the CPU, of its own memory, of a numpy array of real numbers; anything else as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        return value
    try:
        return torch.tensor(np.ascontiguousarray(value).reshape(value.shape))
    except TypeError:  # a type that torch has not: its check says so
        return value


def float64(op: str, name: str, value: Any) -> Tensor:
    """A new float64 tensor on the CPU, of a tensor, an array or nested sequences of real numbers."""
    value = as_tensor(value)
    try:
        if isinstance(value, np.ndarray):  # of what are no real numbers
            raise TypeError
        given = isinstance(value, Tensor)
        found = value.detach() if given else torch.as_tensor(value, dtype=torch.float64, device="cpu")
        if found.is_complex() or found.dtype == torch.bool or found.is_quantized or found.layout != torch.strided:
            raise TypeError
        return found.to("cpu", torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        got = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else kind_of(value)
        raise TypeError(f"{op}: {name} must be a tensor or a sequence of numbers, got {got}") from None


def flag(op: str, name: str, value: Any) -> bool:
    """True or False; 0 and 1 as well."""
    if not isinstance(value, (int, np.bool_)) or value not in (0, 1):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")
    return bool(value)


def word(op: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a str, got {kind_of(value)}")


def function(op: str, name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{op}: {name} must be callable, got {kind_of(value)}")


def instance(what: type | tuple[type, ...], described: str) -> Check:
    """That an argument is `described`, of a class of `what`."""

    def check(op: str, name: str, value: Any) -> None:
        if not isinstance(value, what):
            got = "a tensor" if isinstance(value, Tensor) else kind_of(value)
            raise TypeError(f"{op}: {name} must be {described}, got {got}")

    return check


def one_of(*names: str) -> Check:
    *others, last = map(repr, names)
    described = f"{', '.join(others)} or {last}" if others else last

    def check(op: str, name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"{op}: {name} must be {described}, got {value!r}")

    return check


def whole(least: int | None = None) -> Check:
    """An int of at least that."""
    return lambda op, name, value: integer(op, name, value, least)


def real(which: str) -> Check:
    """A number of NUMBERS' kind."""
    return lambda op, name, value: number(op, name, value, which)


def arguments(**checks: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Looks at a function's arguments of these names before it runs, and hands it what their checks return.

    A default needs no look.
    """

    def checking(make: Callable[P, R]) -> Callable[P, R]:
        parameters = list(signature(make).parameters.values())
        op = make.__qualname__.removesuffix(".__init__")
        looks = [(p.name, checks[p.name], p.default) for p in parameters if p.name in checks]
        unknown = set(checks) - {p.name for p in parameters}
        assert not unknown, f"{op} has no argument {unknown}"
        places = [p.name for p in parameters if p.kind is not Parameter.KEYWORD_ONLY]

        @wraps(make)
        def checked(*given: P.args, **named: P.kwargs) -> R:
            if len(given) > len(places):
                return make(*given, **named)  # which Python refuses
            found: dict[str, Any] = {**dict(zip(places, given, strict=False)), **named}
            for name, check, default in looks:
                value = found.get(name, default)
                if value is default:
                    continue
                seen = check(op, name, value)
                if seen is not None:
                    found[name] = seen
            return make(**found)  # type: ignore[call-arg]

        return checked

    return checking


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
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a float or a tensor, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be within float64, got one beyond it") from None


def check_per_sample(op: str, name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number (returned as a float), a () tensor, or one entry per sample, or for more of x's leading dimensions.

    Returns a plain tensor, of a DTensor all of it.
    """
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES or value.layout != torch.strided:
            got = value.dtype if value.layout == torch.strided else value.layout
            raise TypeError(f"{op}: {name} must be floating, got {got}")
        if value.dim() and value.shape not in ((1,), x.shape[: value.dim()]):
            raise ValueError(
                f"{op}: {name} must be a float or have shape ({x.shape[0]},), one per sample, got {tuple(value.shape)}"
            )
        if value.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like the samples, got {value.device}")
        return gathered(value)
    return as_number(op, name, value)


def per_sample(op: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    """check_per_sample of a tensor."""
    found = check_per_sample(op, name, value, x)
    assert isinstance(found, Tensor)
    return found


def can_read(value: Tensor) -> bool:
    """Whether looking at the values costs nothing: on the CPU, outside tracing and transforms."""
    return (
        value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not in_functorch()
        and not dispatch_modes()
        and jit_tracing() is None
    )
