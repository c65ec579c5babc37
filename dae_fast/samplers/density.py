"""The log-probability of a stochastic step: of x_s under N(mean(x_t, prediction), std^2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..primitives import residual_loss
from .launch import Launches

REDUCTIONS = "mean", "sum"


class Density:
    """Of the steps of one plan; of each look what multiplies x, the prediction and the noise, float64, rounded nowhere.

    The mean over a sample's elements is worked out in one pass, which also makes the gradient of the prediction:
    (x_s - mean)^2 / 2 std^2 = w * (pred - x_s/c_p + c_x/c_p * x_t)^2, w = c_p^2 / 2 std^2, where the mean is
    c_x*x_t + c_p*pred. Where the mean is more, limited or guided, a launch makes it first.
    """

    def __init__(self, launches: Launches) -> None:
        self.launches = launches
        affine = launches.is_plain and launches.bounds is None
        self._rows: list[tuple[float, float, float]] = launches.affine_rows() if affine else []

    def __call__(
        self, table: Tensor, i: int, x_t: Tensor, x_s: Tensor, prediction: Sequence[Tensor], reduction: str
    ) -> Tensor:
        """(B,), fp32 or fp64."""
        launches = self.launches
        c_x, c_p, std = self._rows[i] if self._rows else (0.0, 0.0, launches.std(i))
        if c_p:
            terms: list[tuple[Any, Any]] = [(1 / c_p, x_s), (-c_x / c_p, x_t)]
            pred, weight = prediction[0], c_p**2 / (2 * std**2)
        else:
            (pred,) = launches(table, i, x_t, prediction, None, (), "mean")
            terms, weight = [(1.0, x_s)], 1 / (2 * std**2)
        mean = -residual_loss(pred, *terms, weight=weight, reduction="none") - (
            math.log(std) + 0.5 * math.log(2 * math.pi)
        )
        return mean if reduction == "mean" else mean * (x_t[0].numel() if len(x_t) else 0)
