"""Limits of the x0 estimate in a step: fixed ones, or those of its own quantile."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.conversions import Bounds, bounds
from ..routing import beside, on_mesh


class X0Clip(NamedTuple):
    """[low, high]; with a quantile, of a sample's estimate divided by that quantile where it is above 1."""

    low: float = -math.inf
    high: float = math.inf
    quantile: float | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """None where nothing is limited."""
        return None if self == X0Clip() else (self.low, self.high)


def x0_clip(op: str, clamp: Bounds | None, threshold: float | None) -> X0Clip:
    if threshold is None:
        return X0Clip() if clamp is None else X0Clip(*bounds(op, clamp))
    if clamp is not None:
        raise ValueError(f"{op}: give clamp or threshold, not both, got {clamp} and {threshold}")
    if not 0 < threshold <= 1:
        raise ValueError(f"{op}: threshold must be a quantile in (0, 1], got {threshold}")
    return X0Clip(-1.0, 1.0, float(threshold))


def thresholded(row: Tensor, x0_hat: Tensor, quantile: float) -> Tensor:
    """(B, K): the row of each sample, so that its clamp to [-1, 1] is dynamic thresholding.

    clamp(x0_hat, -s, s)/s = clamp(x0_hat/s, -1, 1), s = max(1, the quantile of |x0_hat|).
    Saharia et al. 2022, section 2.3.
    """
    mesh = on_mesh(x0_hat)
    x0_hat = x0_hat if mesh is None else mesh.whole_samples(x0_hat)
    s = quantile_of_samples(x0_hat.abs(), quantile).to(row.dtype).clamp(min=1)
    row = beside(row, s)
    return torch.cat((row[:, :3] / s[:, None], row[:, 3:].expand(len(s), -1)), 1)


def quantile_of_samples(x: Tensor, q: float) -> Tensor:
    """(B,), linear between neighbours: torch.quantile, which stops at 2^24 values and sorts them all."""
    values = x.flatten(1) if x.dim() > 1 else x[:, None]
    N = values.shape[1]
    if N == 0:
        return values.new_zeros(len(x))
    place = q * (N - 1)
    below = math.floor(place)
    largest = values.topk(N - below).values
    return torch.lerp(largest[:, -1], largest[:, max(-2, below - N)], place - below)
