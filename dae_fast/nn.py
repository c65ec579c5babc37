"""Modules: a whole training objective at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends.reference import coefficients, compute_dtype
from .noise import Noise
from .ops.checks import like, noise_for, promote, samples
from .ops.loss import check, check_level_weight, loss_mask, loss_weight
from .ops.noising import add_noise
from .ops.parameterisation import MIXES, check_name, error_ratio
from .ops.residual import residual_loss
from .rows import Coefficients, stack_rows, table_of
from .schedule import Schedule

# Levels are drawn from a stream of their own, so that they are independent of the noise they scale.
LEVEL_TAG = 0x6C6576656C  # "level"


class DenoisingLoss(torch.nn.Module):
    """The denoising objective: draw a level, noise the data, compare the network with its target.

    schedule: Schedule      predict: what the network predicts, "eps", "x0", "v", "score" or "flow"
    level_weight: (T,) a weight for each level, or None; a buffer, so it moves with the module

    loss(net, x0, noise) calls net(x_t, t) and returns {"loss", "noise_mse", "x0_mse"}: the objective,
    with its gradient, and the mean squared errors of the implied noise and x0 estimates, without, all
    from one pass. With a Noise the levels too are a function of (seed, step, sample), and neither the
    noise nor the target is stored.
    Raises ValueError for a schedule with a level where the prediction does not determine both x0 and
    eps (eps where alpha = 0, x0 or score where sigma = 0): predict v there. Ho et al. 2020, algorithm 1.
    """

    level_weight: Tensor | None

    def __init__(self, schedule: Schedule, predict: str = "eps", *, level_weight: Tensor | None = None) -> None:
        super().__init__()
        op = "DenoisingLoss"
        check_name(op, "predict", predict)
        if level_weight is not None:
            check_level_weight(op, schedule, level_weight)
        self.schedule = schedule
        self.predict = predict
        self.register_buffer("level_weight", level_weight)
        for key, made in ((f"target {predict}", _target(predict)), (f"errors from {predict}", _errors(predict))):
            table_of(schedule, op, key, made, torch.float32, torch.device("cpu"))

    def draw_levels(self, noise: Noise, x0: Tensor) -> Tensor:
        """(B,) int64, uniform over the schedule, a function of the noise's key and sample ids."""
        words = noise.fold_in(LEVEL_TAG).bits(x0.shape[:1], device=x0.device)
        return (words * len(self.schedule)) >> 32

    def forward(
        self,
        net: Callable[..., Tensor],
        x0: Tensor,
        noise: Noise | Tensor,
        t: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
        **net_arguments: Any,
    ) -> dict[str, Tensor]:
        """The objective at the levels t of x_t = alpha * x0 + sigma * eps.

        net(x_t, t, **net_arguments): the prediction, like x0 (its dtype may differ)
        x0: (B, ...) fp16/bf16/fp32/fp64      noise: Noise, or a tensor like x0
        t: (B,) int32/int64 levels; None draws them from the Noise, and a tensor needs them given
        weight: (B,) and mask: bool, broadcastable to x0, as in noise_mse
        returns: "loss" = mean_b w_b * mse_b of the prediction, with its gradient; "noise_mse" and
        "x0_mse", unweighted and without; scalars, fp32 (fp64 for fp64)
        Raises ValueError on a shape mismatch, a level outside the schedule or an empty batch.
        """
        op, predict = "DenoisingLoss", self.predict
        samples(op, "x0", x0)
        z, generated = noise_for(op, noise, x0, "x0")
        if t is None:
            if generated is None:
                raise ValueError(f"{op}: t must be given when noise is a tensor")
            t = self.draw_levels(generated, x0)
        elif not isinstance(t, Tensor):
            raise TypeError(f"{op}: t must be an int32 or int64 tensor (B,), got {type(t).__name__}")
        level = self.schedule[t]
        x_t = add_noise(x0, noise, level)
        assert isinstance(x_t, Tensor)
        pred = net(x_t, t, **net_arguments)
        like(op, "the network's output", pred, "x0", x0)

        y = None if predict in ("eps", "score") else x0
        if predict == "x0":
            z = generated = None
        y, z, pred_ = promote(y, z, pred)
        assert pred_ is not None
        compute = compute_dtype(pred_.dtype)
        if predict in ("eps", "x0"):  # the same at every level
            one_target = (1.0, 0.0, -1.0) if predict == "eps" else (1.0, -1.0, 0.0)
            rows = stack_rows(op, one_target, pred_, compute)
        else:
            rows = level._rows(op, f"target {predict}", _target(predict), pred_, compute)
        loss, mse = residual_loss(
            op,
            pred_,
            y,
            z,
            generated,
            rows,
            loss_weight(op, pred_, level, weight, self.level_weight),
            loss_mask(op, pred_, mask),
            check(op, pred_, "mean"),
        )
        errors = level._rows(op, f"errors from {predict}", _errors(predict), mse, mse.dtype)
        noise_mse, x0_mse = (mse @ coefficients(errors.table, errors.t, op) / mse.shape[0]).unbind()
        return {"loss": loss, "noise_mse": noise_mse, "x0_mse": x0_mse}


def _target(predict: str) -> Coefficients:
    """A residual's row: 1*pred - p0*x0 - p1*eps."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, ...]:
        p0, p1 = MIXES[predict](alpha, sigma)
        return 1.0, -p0, -p1

    return coefficients


def _errors(predict: str) -> Coefficients:
    """Squared error of eps and of x0 for each unit of the prediction's."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, ...]:
        return *error_ratio(predict, "eps")(alpha, sigma), *error_ratio(predict, "x0")(alpha, sigma)

    return coefficients
