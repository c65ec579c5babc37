"""Which code runs an op: kernels where a device has them, plain torch elsewhere.

A backend module has the functions of native.py; available() says what keeps it from running here ("" if nothing
does) and supports(device) where it can.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._torch import constant_result
from ..profiling import Named, listening
from . import reference

__all__ = ["backend_names", "use_backend"]

NAMES = ("reference", "native", "triton")
_loaded: dict[str, tuple[ModuleType | None, str]] = {}
_forced: str | None = None
_default: dict[str, str] = {}


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module, or why it cannot run here. Imported when first asked for: triton takes a second."""
    if name not in _loaded:
        try:
            module = import_module(f"{__package__}.{name}")
            missing: str = module.available()
            _loaded[name] = (None, missing) if missing else (module, "")
        except ImportError as error:
            _loaded[name] = None, str(error)
        _choose_launchers()
    return _loaded[name]


def missing(name: str) -> str:
    """Why a backend cannot run here; "" when it can."""
    return _load(name)[1]


def module(name: str) -> Any:
    """A backend that can run here."""
    return _load(name)[0]


@constant_result  # which GPUs there are is not Dynamo's to trace
def default_name(device_type: str) -> str:
    """The backend that runs where none is forced."""
    if device_type == "cuda" and "cuda" not in _default:  # not before there is a tensor: native.py says why
        _default["cuda"] = _default_on_gpu()
        _choose_launchers()
    return _default.get(device_type, "reference")


def _default_on_gpu() -> str:
    native = module("native")
    # The HIP library has run on no GPU yet: on AMD's it is used where it is forced.
    if native is not None and native.GPU == "cuda" and not native.library_missing("cuda"):
        return "native"
    # Not asked of triton itself, which is imported when used.
    return "triton" if (torch.version.cuda or torch.version.hip) and find_spec("triton") else "reference"


def _choice(x: Tensor, op: str) -> str:
    if _forced is None:
        return default_name(x.device.type)
    if not x.is_meta and not supports(_forced, x.device):
        raise RuntimeError(f"{op}: backend {_forced!r} does not run on {x.device}")
    return _forced


@constant_result
def supports(name: str, device: torch.device) -> bool:
    """Whether a backend that can run here runs on `device`."""
    module, _ = _loaded[name]
    return module is not None and bool(module.supports(device))


def has_kernels(x: Tensor, op: str) -> bool:
    """Whether kernels run `op` on x's device, rather than plain torch."""
    return _choice(x, op) != "reference"


def kernels(x: Tensor, op: str) -> Any:
    """The backend module that runs `op` on x's device, which has one."""
    module = _required(_choice(x, op), op, x.device)
    return Named(module, op) if listening() else module


def extended(x: Tensor, op: str) -> bool:
    """Whether the kernels that run `op` on x's device do what only the CPU's do: native.extended says what."""
    module = _required(_choice(x, op), op, x.device)
    return hasattr(module, "extended") and bool(module.extended(x))


def kernels_of(x: Tensor, op: str) -> Any:
    """What a traced op calls when it runs: there is no way back to plain torch by then."""
    forced = _forced not in (None, "reference") and supports(str(_forced), x.device)
    module = _required(_forced if forced else default_name(x.device.type), op, x.device)
    return Named(module, op) if listening() else module


def _required(name: str | None, op: str, device: torch.device) -> Any:
    module, why = (None, "none was built") if name in (None, "reference") else _load(name)
    if module is None:
        raise RuntimeError(f"{op}: no kernels for {device} in this process: {why}")
    return module


def fold_in(seed: int, offset: int, data: int) -> tuple[int, int]:
    """A host key folded: the same integers from every backend."""
    native, _ = _load("native")
    folded: tuple[int, int] = (native or reference).fold_in(seed, offset, data)
    return folded


class _Choice:
    """Undoes use_backend when used as a context manager."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _force(self._previous)


def use_backend(name: str | None) -> _Choice:
    """Force one backend for every op: "reference", "native" or "triton"; None chooses by device again.

    Takes effect at once, and as `with use_backend(...):` until the block ends. A forced backend never
    falls back: an op that it cannot run raises. Raises ValueError for an unknown name and RuntimeError
    for a backend that is not here, saying why. On AMD's GPUs "native" is the HIP library, which nothing
    but this chooses.
    """
    if name is not None and not (isinstance(name, str) and name in NAMES):
        raise ValueError(f"use_backend: name must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")
    if name is not None and missing(name):
        raise RuntimeError(f"use_backend: {name!r} is not available: {missing(name)}")
    choice = _Choice(_forced)
    _force(name)
    return choice


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    _choose_launchers()


def _choose_launchers() -> None:
    """Tells the native core, which recognises plain calls on every device, what launches them there."""
    native, _ = _loaded.get("native", (None, ""))
    if native is not None:
        native.use_fast(*(_launcher(torch.device(kind)) for kind in ("cpu", "cuda")))


def _launcher(device: torch.device) -> Any:
    """As csrc/call.cpp takes it: True, the core itself; a backend; None: no call is plain."""
    name = _forced or _default.get(device.type, "reference")
    if name == "native":
        return True
    module, _ = _loaded.get(name, (None, ""))
    return module if name == "triton" and module is not None and module.supports(device) else None


def backend_names() -> tuple[str, ...]:
    """The backends that can run here, on one device or another."""
    return tuple(name for name in NAMES if not missing(name))


if not missing("native"):
    _default |= {"cpu": "native", "meta": "native"}
else:
    why = missing("native")
    warnings.warn(f"dae_fast has no kernels here and runs as plain torch, only slower: {why}", RuntimeWarning, 2)
_choose_launchers()
