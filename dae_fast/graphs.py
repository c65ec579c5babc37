"""A sampler's whole loop as one CUDA graph: captured at the first call of its kind, replayed from then on.

A graph reads and writes memory by address. So a captured loop has buffers of its own for everything that
differs between calls (the start, the noise's key and sample ids, step sizes), which a call fills and then
replays; nothing on that way waits for the device. Network parameters are read where they lie: updated in
place they are seen by the next replay, and where a module has new tensors the loop is captured again.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .kernels import dispatch
from .noise import Noise

DEVICE = "cuda"  # the type; torch has ROCm under the same name
CAPTURES = 8  # kept for one network; the one unused longest goes first

Argument = Tensor | float
Loop = Callable[..., Tensor]


def start_device(op: str) -> torch.device:
    """Where a start is made that is given as a shape: the current CUDA device."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"{op}: graph=True needs a CUDA device, and torch sees none")
    return torch.device(DEVICE, torch.cuda.current_device())


def replayed(
    op: str,
    network: Callable[..., Any],
    loop: Loop,
    x: Tensor,
    noise: Noise,
    progress: bool,
    *,
    arguments: tuple[Argument, ...] = (),
    table: Tensor | None = None,
    options: Hashable = (),
) -> Tensor:
    """loop(x, noise, *arguments, table), from a graph; loop calls `network` and may write x.

    arguments: tensors on x's device, copied at every call, and floats, constants of the graph
    table: on the host; a constant on x's device      options: what else the loop depends on
    The captured loop lives as long as the network, so neither it nor its key may hold the network.
    """
    if progress:
        raise ValueError(f"{op}: progress=True shows each step and graph=True runs all as one; leave one of them out")
    if x.device.type != DEVICE:
        raise ValueError(f"{op}: graph=True needs x on a CUDA device, got x on {x.device}")
    owner, function = (network.__self__, network.__func__) if isinstance(network, MethodType) else (network, None)
    given = tuple((_layout(a) if isinstance(a, Tensor) else a) for a in arguments)
    constant = None if table is None else (table.shape, table.dtype, table.numpy().tobytes())
    place = _layout(x), noise._first_sample, noise._span, noise._sample is None
    autocast = torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)
    reads = tuple(_read_through(network, set()))
    key = op, options, function, place, given, constant, autocast, dispatch._choice(x, op), reads
    with _lock:
        try:
            kept = _captured.setdefault(owner, OrderedDict())
        except TypeError as error:
            raise TypeError(
                f"{op}: graph=True keeps the captured loop with the network, which must be hashable and allow weak "
                f"references, got {type(owner).__name__}"
            ) from error
        if key not in kept:
            kept[key] = _Captured(op, loop, x, noise, arguments, table)
            # Not before the capture: it has waited for the replays that may still be running.
            if len(kept) > CAPTURES:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key].replay(x, noise, arguments)


class _Captured:
    """One captured loop, its buffers and its result."""

    def __init__(
        self,
        op: str,
        loop: Loop,
        x: Tensor,
        noise: Noise,
        arguments: tuple[Argument, ...],
        table: Tensor | None,
    ) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # An inference tensor could not be filled outside inference mode, which a later call may be.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device):
            self.done = torch.cuda.Event()
            self.tables = () if table is None else (table.to(x.device),)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what the first run of a network sets up must not be captured
                loop(x.clone(), noise.to(x.device), *arguments, *self.tables)
            torch.cuda.current_stream().wait_stream(side)
            torch.clear_autocast_cache()  # casts of the parameters belong into the graph, to see updates
            try:
                # Thread-local: what a data loader's thread allocates meanwhile is none of the capture's business.
                with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                    self.x = torch.empty_like(x)
                    self.key = torch.empty(2, dtype=torch.int64, device=x.device)
                    self.sample = None if noise._sample is None else torch.empty_like(noise._sample)
                    self.arguments = tuple(torch.empty_like(a) if isinstance(a, Tensor) else a for a in arguments)
                    own = Noise._make(0, 0, self.key, self.sample, noise._first_sample, noise._span)
                    self.result = loop(self.x, own, *self.arguments, *self.tables)
            except Exception as error:
                raise RuntimeError(
                    f"{op}: graph=True could not capture the loop; the network must not wait for the device "
                    "(.item(), branches on values, copies from or to the host): pass graph=False, or change it"
                ) from error
            finally:
                torch.clear_autocast_cache()  # casts made in a capture hold nothing yet

    def replay(self, x: Tensor, noise: Noise, arguments: tuple[Argument, ...]) -> Tensor:
        with torch.cuda.device(x.device):
            self.done.wait()  # an earlier call may be running on another stream
            self.x.copy_(x)
            self._set_key(noise)
            if self.sample is not None and noise._sample is not None:
                self.sample.copy_(noise._sample)
            for own, given in zip(self.arguments, arguments, strict=True):
                if isinstance(own, Tensor) and isinstance(given, Tensor):
                    own.copy_(given)
            self.graph.replay()
            result = self.result.clone()
            self.done.record()
        return result

    def _set_key(self, noise: Noise) -> None:
        key = noise._as_tensor()
        if key.device == self.key.device and noise._key_tensor is not None:
            self.key.copy_(key)
        else:  # a copy from the host would wait for the device; an argument of a kernel does not
            for own, bits in zip(self.key, key.tolist(), strict=True):
                own.fill_(bits)


_captured: WeakKeyDictionary[object, OrderedDict[Hashable, _Captured]] = WeakKeyDictionary()
_lock = threading.RLock()  # from filling a graph's buffers to its launch, and while capturing


_VALUES = int, float, str, torch.dtype
_LEAVES = *_VALUES, Tensor, torch.nn.Module, MethodType, partial, FunctionType


def _layout(t: Tensor) -> Hashable:
    return t.shape, t.stride(), t.dtype, t.device


def _read_through(held: object, seen: set[int]) -> Iterator[Hashable]:
    """What a graph has as constants from a network: addresses of tensors, modes of modules, numbers.

    Looked for in the modules, closures, globals, bound and partial arguments and attributes of a callable;
    not in lists, nor in the functions that it calls.
    """
    if isinstance(held, Tensor):
        yield held.data_ptr(), _layout(held)
    elif isinstance(held, torch.nn.Module):
        yield tuple(module.training for module in held.modules())
        for t in (*held.parameters(), *held.buffers()):
            yield t.data_ptr(), _layout(t)
    elif isinstance(held, _VALUES):
        yield type(held), held
    elif id(held) not in seen:
        seen.add(id(held))
        for part in _parts(held):
            yield from _read_through(part, seen)


def _parts(held: object) -> tuple[object, ...]:
    if isinstance(held, MethodType):
        return held.__self__, held.__func__
    if isinstance(held, partial):
        return held.func, *held.args, *held.keywords.values()
    if isinstance(held, FunctionType):
        named = inspect.getclosurevars(held)
        # Other functions' globals would lead through whole libraries.
        variables = (v for v in named.globals.values() if not isinstance(v, FunctionType))
        return *(held.__defaults__ or ()), *named.nonlocals.values(), *variables
    if isinstance(held, (type, ModuleType)):
        return ()
    # Not through every object: a network may hold its trainer.
    return tuple(v for v in getattr(held, "__dict__", {}).values() if isinstance(v, _LEAVES))
