"""The bytes a call moves: every tensor of the samples' size that a kernel reads or writes, counted each time.

A count of what the kernels are given, not a reading of the memory's own counters: what a cache saves is in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import dae_fast as df
from dae_fast import routing

from .measure import Peer

_KERNELS = ("affine", "residual", "row_dots", "corrupt", "gaussian", "gaussian_grad", "normal")


def moved_bytes(peer: Peer, values: int) -> int:
    """By one call of eager torch or of one of our backends, on samples of so many values."""
    counter = _Counter(values)
    backends = [df.kernels.dispatch.module(name) for name in df.backend_names() if name != "reference"]
    with ExitStack() as patches:
        for module in backends:
            for name in _KERNELS:
                patches.enter_context(mock.patch.object(module, name, counter.of_kernel(getattr(module, name))))
        # Or our ops would see the mode and take another way than the one that is measured.
        patches.enter_context(mock.patch.object(routing, "dispatch_modes", lambda: 0))
        with counter:
            peer()
    return counter.bytes


class _Counter(TorchDispatchMode):
    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values
        self.bytes = 0
        self._in_kernel = False

    def add(self, tensors: Any) -> None:
        for t in tree_iter(tensors):
            if isinstance(t, Tensor) and t.numel() == self.values:
                # An expanded tensor is read once.
                self.bytes += min(t.nbytes, t.untyped_storage().nbytes())

    def of_kernel(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(kernel)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._in_kernel = True
            try:
                result = kernel(*args, **kwargs)
            finally:
                self._in_kernel = False
            # The loss's gradient is handed back as it is where it was right already.
            if not any(a is r for a in tree_iter(args) if isinstance(a, Tensor) for r in tree_iter(result)):
                self.add([args, [v for k, v in kwargs.items() if k != "out"], result])
            return result

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._in_kernel or func.is_view or func.overloadpacket.__name__.startswith("empty"):
            return result
        if func.overloadpacket.__name__ not in _WRITES_ALONE:
            self.add([args, kwargs])
        self.add(result)
        return result


_WRITES_ALONE = ("normal_", "zero_", "fill_", "zeros_like", "ones_like", "full_like", "new_zeros", "randn_like")


@dataclass
class CompiledBytes:
    count: int = 0


@contextmanager
def compiled_bytes() -> Iterator[CompiledBytes]:
    """By one call of the graphs that torch.compile compiles in this block, by inductor's own count."""
    from torch._functorch import config as functorch_config
    from torch._inductor import compile_fx, config, metrics

    found, before = CompiledBytes(), metrics.num_bytes_accessed
    log = compile_fx.inductor_metrics_log
    level = log.level
    silence: Callable[[logging.LogRecord], bool] = lambda record: False  # noqa: E731
    log.addFilter(silence)
    log.setLevel(logging.INFO)  # inductor counts for its log alone
    try:
        # A graph from a cache has no count.
        with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
            yield found
    finally:
        log.setLevel(level)
        log.removeFilter(silence)
        found.count = metrics.num_bytes_accessed - before
