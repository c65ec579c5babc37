"""Checks of a tensor that an op writes in place."""

from __future__ import annotations

from torch import Tensor

from ..checks import like
from ..routing import Route, route

Dimensions = list[tuple[int, int]]  # (stride, size) of those longer than 1, the widest stride first


def check_out(op: str, out: Tensor, **inputs: Tensor | None) -> None:
    """out is like the first input, has no element twice, and shares memory with an input wholly or not at all."""
    x_name, x = next(iter(inputs.items()))
    assert x is not None
    like(op, "out", out, x_name, x)
    if out.dtype != x.dtype:
        raise TypeError(f"{op}: out must be {x.dtype} like {x_name}, got {out.dtype}")
    if route(op, out, *inputs.values()) is Route.DISPATCHER:
        return  # no memory to look at; what is traced reads all before it writes
    if overlaps_itself(out):
        raise ValueError(f"{op}: out has several elements in one place of memory (an expanded tensor?); clone it first")
    for name, t in inputs.items():
        if t is not None and t is not out and partly_overlap(out, t):
            raise ValueError(f"{op}: out and {name} partly overlap in memory; clone one of them")


def _dimensions(t: Tensor) -> Dimensions:
    return sorted(((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1), reverse=True)


def overlaps_itself(t: Tensor) -> bool:
    """Each dimension must step over all that the narrower ones span."""
    span = 1
    for stride, size in reversed(_dimensions(t)):
        if stride < span:
            return True
        span += stride * (size - 1)
    return False


def partly_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether some element of `a` lies where another element of `b` does. a does not overlap itself.

    Exact for equal strides; different strides count when their ranges meet. By addresses: storages may share memory.
    """
    (first, last), (first_b, last_b) = _range(a), _range(b)
    if not a.numel() or not b.numel() or not (first < last_b and first_b < last):
        return False
    distance, rest = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    if a.stride() == b.stride() and not rest:
        return distance != 0 and _is_sum_of_steps(distance, _dimensions(a))
    return True


def _range(t: Tensor) -> tuple[int, int]:
    elements = 1 + sum(stride * (size - 1) for stride, size in _dimensions(t))
    return t.data_ptr(), t.data_ptr() + t.element_size() * elements


def _is_sum_of_steps(distance: int, dimensions: Dimensions) -> bool:
    """Whether distance = sum of k_d * stride_d with every |k_d| < size_d."""
    if not dimensions:
        return distance == 0
    (stride, size), *narrower = dimensions
    nearest = distance // stride  # the narrower ones span less than a stride: no other k can do
    return any(abs(k) < size and _is_sum_of_steps(distance - k * stride, narrower) for k in (nearest, nearest + 1))
