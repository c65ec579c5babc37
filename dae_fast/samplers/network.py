"""The network in a sampler's loop: what it is handed, what it returns, and guidance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..checks import like
from ..kernels.spec import ABSENT, Coefficients, map_of
from ..primitives.sums import affine
from ..routing import beside
from .arguments import Network

GUIDED = "conditional", "unconditional"  # what a network returns under guidance
OUTPUT = "the network's output"


def bound(op: str, net: Any, further: Mapping[str, Any] | None, graph: bool) -> Any:
    """The network with its further arguments; what is no network is left to the check of it."""
    if further is None:
        return net
    if not isinstance(further, Mapping) or not all(isinstance(name, str) for name in further):
        raise TypeError(f"{op}: net_arguments must be a dict of arguments by name, got {checks.kind_of(further)}")
    if graph:
        raise ValueError(
            f"{op}: graph=True keeps the captured loop with the network: give it functools.partial(net, ...), kept "
            "from call to call, and no net_arguments"
        )
    return partial(net, **further) if callable(net) else net


def model_time(x: Tensor, t: float) -> Tensor:
    """(B,): an int as int64, a float in x's dtype."""
    return beside(torch.full(x.shape[:1], t, dtype=torch.int64 if isinstance(t, int) else x.dtype, device=x.device), x)


def call_model(net: Network, dtype: torch.dtype, x: Tensor, t: float) -> Any:
    """net(x, t) of the state x in `dtype`, for all samples at t."""
    return net(x if x.dtype == dtype else x.to(dtype), model_time(x, t))


def outputs(op: str, made: Any, x: Tensor, parts: tuple[str, ...], what: str) -> tuple[Tensor, ...]:
    """What a network returned, in x's dtype: one tensor, or a tuple with one for each of `parts`."""
    if not parts:
        like(op, what, made, "x", x)
        return (made if made.dtype == x.dtype else made.to(x.dtype),)
    if not isinstance(made, (tuple, list)) or len(made) != len(parts):
        got = f"{len(made)} of them" if isinstance(made, (tuple, list)) else type(made).__name__
        raise TypeError(f"{op}: {what} must be a tuple ({', '.join(parts)}), got {got}")
    for part, value in zip(parts, made, strict=True):
        like(op, f"{what} ({part})", value, "x", x)
    return tuple(value.to(x.dtype) for value in made)


def guidance_scale(op: str, guidance: float | None) -> float | None:
    if guidance is None:
        return None
    if not checks.is_number(guidance) or abs(guidance) > 1e300 or not math.isfinite(guidance):
        raise ValueError(f"{op}: guidance must be None or a finite number, got {guidance!r}")
    return float(guidance)


def cfg_combine(op: str, row: Tensor, prediction: Sequence[Tensor]) -> Tensor:
    """The prediction; under guidance g * conditional + (1 - g) * unconditional, in a launch of its own.

    row: (1 or B, 2), g and 1 - g
    """
    first, *second = prediction
    if not second:
        return first
    return affine(map_of(op, (0, 1, ABSENT, ABSENT)), (first, second[0], None, None), None, Coefficients(row, None))[0]
