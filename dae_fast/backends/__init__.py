"""Which code runs an op: native kernels where they exist, plain torch elsewhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference

try:
    from . import native
except ImportError as error:
    native_module: Any = None
    native_missing = str(error)
else:
    native_module = native
    native_missing = ""

NAMES = ("reference", "native")
_forced: str | None = None


def fold_in(seed: int, offset: int, data: int) -> tuple[int, int]:
    """A host key folded: the same integers from every backend."""
    if native_module is not None:
        return native_module.fold_in(seed, offset, data)
    return reference.fold_in(seed, offset, data)


def use_native(x: Tensor, op: str) -> bool:
    """Whether `op` on x's device runs the native kernels; the reference runs it otherwise."""
    if _forced is None:
        return native_module is not None and (x.is_cpu or x.is_meta)
    if _forced == "native" and not (x.is_cpu or x.is_meta):
        raise RuntimeError(f"{op}: backend 'native' runs on the CPU, the tensors are on {x.device}")
    return _forced == "native"


class _Choice:
    """Undoes use_backend when used as a context manager."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._previous


def use_backend(name: str | None) -> _Choice:
    """Force one backend for every op, "reference" or "native"; None chooses by device again.

    Takes effect at once, and as `with use_backend(...):` until the block ends. A forced backend never
    falls back: an op that it cannot run raises. Raises ValueError for an unknown name and RuntimeError
    for a backend that is not here, saying why.
    """
    global _forced
    if name is not None and name not in NAMES:
        raise ValueError(f"use_backend: name must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")
    if name == "native" and native_module is None:
        raise RuntimeError(f"use_backend: 'native' is not available: {native_missing}")
    choice = _Choice(_forced)
    _forced = name
    return choice


def backend_names() -> tuple[str, ...]:
    """The backends that can run here."""
    return NAMES if native_module is not None else ("reference",)
