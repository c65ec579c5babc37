"""Noise and rows as the plain arguments that torch.library takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import fake_mode
from ..noise import Noise
from ..rows import Rows


class FlatNoise(NamedTuple):
    """The key is always a tensor, so that a traced function holds no constant; None: no noise."""

    key: Tensor | None
    sample: Tensor | None
    first_sample: int


def flatten(noise: Noise | None) -> FlatNoise:
    if noise is None:
        return FlatNoise(None, None, 0)
    return FlatNoise(noise._as_tensor(), noise._sample, noise._first_sample)


def unflatten(key: Tensor | None, sample: Tensor | None, first_sample: int) -> Noise | None:
    return None if key is None else Noise._make(0, 0, key, sample, first_sample)


def seen(rows: Rows) -> Rows:
    """As a FakeTensorMode around the call sees them: it takes no real tensor, and a cached table is one."""
    if torch.compiler.is_compiling() or type(rows.table) is not Tensor:
        return rows
    fake = fake_mode()
    return rows if fake is None else Rows(fake.from_tensor(rows.table), rows.t)
