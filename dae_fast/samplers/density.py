"""The log-probability of a stochastic step: of x_s under N(mean(x_t, prediction), std^2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..primitives import residual_loss
from .launch import Launches

REDUCTIONS = "mean", "sum"
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Density:
    """Of the steps of one plan; of each look what multiplies x, the prediction and the noise, float64, rounded nowhere.

    The mean over a sample's elements is worked out in one pass, which also makes the gradient of the prediction:
    (x_s - mean)^2 / 2 std^2 = w * (pred - x_s/c_p + c_x/c_p * x_t)^2, w = c_p^2 / 2 std^2, where the mean is
    c_x*x_t + c_p*pred. Where the mean is more, limited, guided or of what was kept, a launch makes it first.
    """

    def __init__(self, launches: Launches) -> None:
        self.launches = launches
        affine = launches.is_plain and launches.bounds is None
        self._rows: list[tuple[float, float, float]] = launches.affine_rows() if affine else []

    def __call__(
        self,
        table: Tensor,
        i: int,
        x_t: Tensor,
        x_s: Tensor,
        prediction: Sequence[Tensor],
        history: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """(B,), fp32 or fp64, the mean over a sample's elements."""
        launches = self.launches
        c_x, c_p, std = self._rows[i] if self._rows and not history else (0.0, 0.0, launches.std(i))
        if c_p:
            terms: list[tuple[Any, Any]] = [(1 / c_p, x_s), (-c_x / c_p, x_t)]
            pred, weight = prediction[0], c_p**2 / (2 * std**2)
        else:
            (pred,) = launches(table, i, x_t, prediction, None, history, "mean")
            terms, weight = [(1.0, x_s)], 1 / (2 * std**2)
        return -residual_loss(pred, *terms, weight=weight, reduction="none") - (math.log(std) + HALF_LOG_2PI)


def of_learned_variance(x_s: Tensor, mean: Tensor, v: Tensor, middle: Tensor, half_width: Tensor) -> Tensor:
    """log N(x_s; mean, e^(middle + half_width*v)), (B,), the mean over a sample's elements; three passes and torch's.

    The mean of v is that of (v + 1)^2 - (v - 1)^2, over 4, as those passes add up a row alike in any batch.
    """
    away = (x_s - mean) * (-0.5 * torch.addcmul(middle, half_width, v)).exp()
    one = torch.ones_like(v)
    of_v = residual_loss(v, (-1.0, one), reduction="none") - residual_loss(v, (1.0, one), reduction="none")
    log_std = 0.5 * middle + 0.125 * half_width * of_v
    return -residual_loss(away, weight=0.5, reduction="none") - log_std - HALF_LOG_2PI
