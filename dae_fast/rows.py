"""Coefficients of a batch: rows of a small table, worked out in float64 and rounded once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._torch import outside_modes

if TYPE_CHECKING:
    from .schedule import Schedule

Coefficients = Callable[[Any, Any], tuple[Any, ...]]
Place = tuple[str, torch.dtype, torch.device]  # of a table in a schedule's cache


class Rows(NamedTuple):
    """Coefficients of a batch: row b is table[t[b]], or without t table[b], or table[0] when there is one."""

    table: Tensor
    t: Tensor | None


def rows_at(table: Tensor, t: Tensor | int | None) -> Rows:
    """With an int, that row for all samples."""
    return Rows(table[t : t + 1], None) if isinstance(t, int) else Rows(table, t)


@lru_cache(maxsize=16)
def _constant_rows(columns: tuple[float, ...], dtype: torch.dtype) -> Rows:
    with outside_modes():
        table = torch.tensor([columns], dtype=torch.float64, device="cpu").to(dtype)
        if not table.isfinite().all():
            raise ValueError(f"coefficients must be finite in {dtype}, got {columns}")
        return Rows(table, None)


def constant_rows(op: str, columns: tuple[float, ...], dtype: torch.dtype) -> Rows:
    """One row of floats; not for what torch.compile traces.

    In host memory, whatever the samples' device: a launch takes it along, so that nothing is copied to a GPU, and a
    captured graph holds it.
    """
    try:
        return _constant_rows(columns, dtype)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A table that may be a row in host memory: that is filled on the device, as a copy would wait for a GPU."""
    if table.device == device:
        return table
    if type(table) is not Tensor or table.shape[0] != 1:
        return table.to(device)
    return torch.stack([torch.full((), v, dtype=table.dtype, device=device) for v in table[0].tolist()])[None]


def stack_rows(op: str, columns: tuple[Any, ...], x: Tensor, dtype: torch.dtype) -> Rows:
    """Rows from columns that are floats, () tensors or (B,) tensors, worked out in float64 on x's device."""
    if not any(isinstance(c, Tensor) for c in columns) and not torch.compiler.is_compiling():
        return constant_rows(op, columns, dtype)
    # As a factor, a float that changes is an input of a compiled graph; in torch.tensor it is a constant.
    one = torch.ones((), dtype=torch.float64, device=x.device)
    wide = [c.double() if isinstance(c, Tensor) else one * c for c in columns]
    return Rows(torch.stack(torch.broadcast_tensors(*wide), -1).reshape(-1, len(columns)).to(dtype), None)


def table_of(
    schedule: Schedule, op: str, key: str, coefficients: Coefficients, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(T, K), made once. Raises ValueError where a level has no finite coefficients."""
    place = (key, dtype, device)
    if torch.compiler.is_dynamo_compiling():
        name = f"{key} {dtype} {device}".replace(".", " ")  # Dynamo takes a dot for a path
        schedule._make_table(op, place, name, coefficients)
        return getattr(schedule._traced, name)
    table = schedule._tables.get(place)
    if table is None:
        schedule._make_table(op, place, "", coefficients)
        table = schedule._tables[place]
    return table
