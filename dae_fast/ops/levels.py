"""What a level's pair (alpha, sigma) gives: rows of coefficients, and values of a caller's functions of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..backends.reference import coefficients
from ..level import Level
from ..rows import Coefficients, Rows
from .flat import seen


def rows_for(op: str, level: Level, key: tuple[Any, ...], made: Coefficients, x: Tensor, dtype: torch.dtype) -> Rows:
    """level._rows of coefficients that may hold parameters; `key` names them all, and so the schedule's table.

    A traced function takes no table that depends on an object, only on names: with an object the rows of the batch
    are worked out from its alpha and sigma.
    """
    if is_dynamo_compiling() and not all(isinstance(part, str) for part in key):
        own = level if level.t is None else Level(*alpha_sigma(op, level, x))
        return own._rows(op, "", made, x, dtype)  # a level made by hand has no tables, and needs no key
    return level._rows(op, " ".join(map(str, key)), made, x, dtype)


def look_up(op: str, rows: Rows, x: Tensor) -> Tensor:
    """(1 or B, K) on x's device, for torch's own arithmetic."""
    return coefficients(*seen(rows), op, x)


def alpha_sigma(op: str, level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """float64 on x's device, () or (B,), of batch x."""
    rows = level._rows(op, "alpha, sigma", lambda alpha, sigma: (alpha, sigma), x, torch.float64)
    pairs = look_up(op, rows, x)
    if rows.t is None and pairs.shape[0] == 1:
        pairs = pairs[0]
    alpha, sigma = pairs.unbind(-1)
    return alpha, sigma


def value_at(op: str, name: str, function: Callable[..., Any], level: Level, x: Tensor) -> Tensor:
    """function(alpha, sigma), float64 () or (B,), a constant. Raises where it returns something else."""
    value = function(*alpha_sigma(op, level, x))
    if isinstance(value, (int, float)):
        value = torch.full((), value, dtype=torch.float64, device=x.device)  # a copy from the host would wait
    elif not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=torch.float64, device=x.device)
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            raise TypeError(f"{op}: {name}(alpha, sigma) must be a number or (B,) like them, got {kind}") from None
    if value.shape not in ((), (1,), x.shape[:1]):
        got = tuple(value.shape)
        raise ValueError(f"{op}: {name}(alpha, sigma) must be a number or (B,) like them, got shape {got}")
    return value.detach().double()
