"""Noise and rows as plain arguments, and the merging of a vmapped dimension into the batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..noise import Noise
from ..schedule import Rows


class FlatNoise(NamedTuple):
    """A Noise as autograd.Function and torch.library take it; `present` is False for no noise."""

    present: bool
    key: Tensor | None
    sample: Tensor | None
    seed: int
    offset: int
    first_sample: int


def flatten(noise: Noise | None, *, in_memory: bool = False) -> FlatNoise:
    """in_memory: the key as a tensor, the only form that a dispatcher op knows."""
    if noise is None:
        return FlatNoise(False, None, None, 0, 0, 0)
    if in_memory:
        return FlatNoise(True, noise._as_tensor(), noise._sample, 0, 0, noise._first_sample)
    return FlatNoise(True, noise._key_tensor, noise._sample, noise._seed, noise._offset, noise._first_sample)


def unflatten(flat: FlatNoise) -> Noise | None:
    if not flat.present:
        return None
    return Noise._make(flat.seed, flat.offset, flat.key, flat.sample, flat.first_sample)


def seen(rows: Rows) -> Rows:
    """As a FakeTensorMode around the call sees them: it takes no real tensor, and a cached table is one."""
    if torch.compiler.is_compiling():
        return rows
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return rows if fake is None else Rows(fake.from_tensor(rows.table), rows.t)


def merge(t: Tensor | None, dim: int | None, V: int) -> Any:
    """(V, B, ...) with the vmapped dimension first, or (B, ...) shared by all, to (V * B, ...)."""
    if t is None:
        return None
    spread = t.unsqueeze(0).expand(V, *t.shape) if dim is None else t.movedim(dim, 0)
    return spread.flatten(0, 1)


def merge_rows_and_noise(
    V: int, x: Tensor, rows: Rows, rows_dims: tuple[Any, ...], flat: FlatNoise, noise_dims: tuple[Any, ...]
) -> tuple[Rows, Noise | None]:
    """For merged samples x (V * B, ...). Every vmapped instance gets the noise that it would get alone."""
    B = x.shape[0] // V
    table, index = rows
    table_dim, index_dim = rows_dims
    if index is not None:
        levels = table.shape[0] if table_dim is None else table.movedim(table_dim, 0).shape[1]
        index = merge(index, index_dim, V)
        if table_dim is not None:
            own = torch.arange(V, device=x.device).repeat_interleave(B) * levels
            outside = (index < 0) | (index >= levels)  # must stay outside the longer table
            index = torch.where(outside, V * levels, index + own)
            table = table.movedim(table_dim, 0).flatten(0, 1)
    elif table_dim is not None:
        table = table.movedim(table_dim, 0)
        table = table.expand(V, B, table.shape[-1]).flatten(0, 1)
    elif table.shape[0] != 1:
        table = merge(table, None, V)
    if not flat.present:
        return Rows(table, index), None
    _, key_dim, sample_dim, *_ = noise_dims
    ids = flat.sample
    if ids is None:
        ids = torch.arange(B, device=x.device) + flat.first_sample
    ids = merge(ids, sample_dim, V)
    if key_dim is None:
        return Rows(table, index), Noise._make(flat.seed, flat.offset, flat.key, ids)
    raise ValueError(
        "vmap over noise keys is not supported: share one key and vmap over its sample ids, Noise(seed, sample=ids)"
    )
