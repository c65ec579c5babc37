"""A loop as a whole: its table in the dtype of the arithmetic, its progress bar, its CUDA graph, its result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks
from ..checks import can_read
from ..graphs import replayed
from ..kernels.spec import compute_dtype
from ..noise import Noise
from .arguments import Network

T = TypeVar("T")


class Capture(NamedTuple):
    """What a CUDA graph of a loop is kept under, besides its tensors: options, whatever else the loop depends on."""

    net: Network
    options: object
    progress: bool


def run(
    op: str,
    loop: Callable[[Tensor, Noise, Tensor], Tensor],
    x: Tensor,
    noise: Noise,
    table: Tensor,
    capture: Capture | None,
) -> Tensor:
    """loop(x, noise, table), with `capture` replayed.

    The state, and all that a step keeps, is of the dtype of the arithmetic, as the table is, rounded once: in half
    precision a small step would be lost in x. The caller is handed x's own dtype.
    """
    dtype, compute = x.dtype, compute_dtype(x.dtype)
    table = rounded(op, table, compute)

    def whole(x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        return narrowed(op, loop(x.to(compute), noise, table), dtype)

    if capture is not None:
        net, options, progress = capture
        # By repr, for a network told level 1 is not one told sigma 1.0.
        return replayed(op, net, whole, x, noise, progress, table=table, options=repr(options))
    return whole(x, noise, table.to(x.device))


def narrowed(op: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the caller's dtype; what fp16 cannot hold becomes infinite, as torch rounds, and is warned of where it can be
    read."""
    narrow = x.to(dtype)
    if dtype == torch.float16 and can_read(narrow):
        beyond = int((narrow.isinf() & x.isfinite()).sum())
        if beyond:
            warnings.warn(
                f"{op}: {beyond} of {x.numel()} values are beyond float16, the largest {float(x.abs().max()):.3g}, and "
                "are infinite: give x in bfloat16 or float32, or a clamp",
                RuntimeWarning,
                stacklevel=2,
            )
    return narrow


def rounded(op: str, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Of float64 coefficients, none of which may overflow; kept with the table, which a plan keeps."""
    if is_compiling():
        return table.to(dtype)
    kept: dict[torch.dtype, Tensor] = vars(table).setdefault("_rounded", {})
    if dtype not in kept:
        kept[dtype] = _rounded(op, table, dtype)
    return kept[dtype]


def _rounded(op: str, table: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = table.to(dtype)
    if can_read(narrow):
        for beyond in table[table.isfinite() & ~narrow.isfinite()][:1].tolist():
            raise ValueError(
                f"{op}: a coefficient of {beyond:.3g} overflows {dtype}: give x in float64, or other levels"
            )
    return narrow


def called_back(op: str, callback: Callable[..., Any], x: Tensor, i: int, *seen: Any) -> Tensor:
    """What goes on as x after callback(i, *seen): what it returned, or x."""
    changed = callback(i, *seen)
    if changed is None:
        return x
    checks.like(op, "what callback returned", changed, "x", x)
    return changed.to(x.dtype)


def progressed(plan: Sequence[T], progress: bool, what: str) -> Iterable[T]:
    if not progress:
        return plan
    from tqdm.auto import tqdm  # takes a moment, and is wanted by few

    return tqdm(plan, desc=what)
