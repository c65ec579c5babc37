"""The network in a sampler's loop: what it is handed, what it returns, and guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


def call_model(net: Network, dtype: torch.dtype, x: Tensor, t: float, estimate: Tensor | None) -> Any:
    """net(x, t) of the state x in `dtype`, for all samples at t; x_self_cond=estimate too, where there is one."""
    told = {} if estimate is None else {"x_self_cond": estimate.to(dtype)}
    return net(x if x.dtype == dtype else x.to(dtype), model_time(x, t), **told)


def with_variance(made: Any, x: Tensor, guided: bool) -> Any:
    """The parts of what a network of a learned variance returned as twice the channels; v is the conditional's."""

    def is_double(t: Any) -> bool:
        return isinstance(t, Tensor) and t.dim() > 1 and x.dim() > 1 and t.shape[1] == 2 * x.shape[1]

    if is_double(made):
        return made.chunk(2, 1)
    if guided and isinstance(made, (tuple, list)) and len(made) == 2 and all(map(is_double, made)):
        (conditional, v), (unconditional, _) = (t.chunk(2, 1) for t in made)
        return conditional, unconditional, v
    return made


def outputs(op: str, made: Any, x: Tensor, parts: tuple[str, ...], what: str) -> tuple[Tensor, ...]:
    """What a network returned, in x's dtype: one tensor, or a tuple with one for each of `parts`."""
    if not parts:
        like(op, what, made, "x", x)
        return (made if made.dtype == x.dtype else made.to(x.dtype),)
    if not isinstance(made, (tuple, list)) or len(made) != len(parts):
        got = f"{len(made)} of them" if isinstance(made, (tuple, list)) else type(made).__name__
        doubled = ""
        if parts[-1] == "v" and isinstance(made, Tensor):
            doubled, got = f" or of twice the channels of {tuple(x.shape)}", str(tuple(made.shape))
        raise TypeError(f"{op}: {what} must be a tuple ({', '.join(parts)}){doubled}, got {got}")
    for part, value in zip(parts, made, strict=True):
        like(op, f"{what} ({part})", value, "x", x)
    return tuple(value.to(x.dtype) for value in made)


Guidance = float | Tensor | Sequence[float] | Callable[[int, float], float] | None


def guidance_scale(op: str, guidance: Any) -> float | None:
    """A finite number or None."""
    if guidance is None:
        return None
    if not checks.is_number(guidance) or abs(guidance) > 1e300 or not math.isfinite(guidance):
        raise ValueError(f"{op}: guidance must be None or a finite number, got {guidance!r}")
    return float(guidance)


def guidance_scales(op: str, guidance: Guidance, told: Sequence[float]) -> Tensor | None:
    """(L,) for looks at which the network is told `told`; (L, B) for one of each sample; float64 on the host."""
    if isinstance(guidance, Tensor):
        g = checks.float64(op, "guidance", guidance)
        if g.dim() > 1 or not g.numel() or not bool(g.isfinite().all()):
            raise ValueError(f"{op}: guidance must be finite and have shape (B,), got {tuple(g.shape)}")
        return g.expand(len(told)) if g.numel() == 1 else g.expand(len(told), -1)
    if callable(guidance):
        guidance = [guidance(i, t) for i, t in enumerate(told)]
    if isinstance(guidance, (list, tuple)):
        if len(guidance) != len(told):
            raise ValueError(f"{op}: guidance must be one, or {len(told)}, one for each look, got {len(guidance)}")
        for g in guidance:
            if g is None or isinstance(g, Tensor):
                raise TypeError(f"{op}: guidance of a look must be a number, got {type(g).__name__}")
        return torch.tensor([guidance_scale(op, g) for g in guidance], dtype=torch.float64)
    one = guidance_scale(op, guidance)
    return None if one is None else torch.full((len(told),), one, dtype=torch.float64)


def rescaled(combined: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """Towards the conditional prediction's standard deviation in each sample, by phi (Lin et al. 2024, section 3.4)."""
    dims = list(range(1, combined.dim()))
    ratio = conditional.std(dims, keepdim=True) / combined.std(dims, keepdim=True)
    return combined * torch.lerp(torch.ones_like(ratio), ratio, phi)


def cfg_combine(op: str, row: Tensor, prediction: Sequence[Tensor]) -> Tensor:
    """The prediction; under guidance g * conditional + (1 - g) * unconditional, in a launch of its own.

    row: (1 or B, 2), g and 1 - g
    """
    first, *second = prediction
    if not second:
        return first
    return affine(map_of(op, (0, 1, ABSENT, ABSENT)), (first, second[0], None, None), None, Coefficients(row, None))[0]
