"""Named ranges around the ops, for whoever listens: Nsight Systems (NVTX domain dae_fast) and torch.profiler.

A range is called "add_noise 64x784 float32" and carries the bytes of a sample tensor as its payload. While nobody
listens an op pays one question. NVTX tools attach when the process starts; torch.profiler may come and go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from ._torch import profiling

try:
    from dae_fast import _core
except ImportError:  # backends.native keeps the reason
    _nvtx = False
else:
    _nvtx = _core.nvtx_listens()

__all__ = ["span"]

PREFIX = "dae_fast::"  # of the names in torch.profiler, which has no domains


def listening() -> bool:
    return _nvtx or profiling()


@contextmanager
def span(name: str, payload: int = 0) -> Iterator[None]:
    """A range of that name around a block, also of a user's own: a step, a network."""
    if _nvtx:
        _core.nvtx_push(name, payload)
    try:
        if profiling():
            with record_function(PREFIX + name):
                yield
        else:
            yield
    finally:
        if _nvtx:
            _core.nvtx_pop()


class Named:
    """A backend module whose functions each run in a range named after the op and what it is given."""

    def __init__(self, module: Any, op: str) -> None:
        self._module, self._op = module, op

    def __getattr__(self, function: str) -> Callable[..., Any]:
        call = getattr(self._module, function)

        def in_range(*args: Any, **kwargs: Any) -> Any:
            with span(*_label(self._op, args)):
                return call(*args, **kwargs)

        return in_range


def _label(op: str, args: tuple[Any, ...]) -> tuple[str, int]:
    """Name and payload, from the arguments of a backend's function: its first tensor, or noise, a shape and a dtype."""
    match args:
        case (_, (int(), int()) as shape, torch.dtype() as dtype, *_):
            return _sample_label(op, shape, dtype)
        case (_, (int(), int()) as shape, torch.device(), *_):
            return _sample_label(op, shape, torch.int64)  # words
    given = (t for a in args for t in (a if isinstance(a, tuple) else (a,)))
    x = next((t for t in given if isinstance(t, Tensor) and t.dim()), None)
    return (op, 0) if x is None else _sample_label(op, tuple(x.shape), x.dtype)  # without one: of a key


@lru_cache(maxsize=1024)
def _sample_label(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, int]:
    return f"{op} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}", math.prod(shape) * dtype.itemsize
