"""Modules: a whole training objective at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backends.reference import coefficients, compute_dtype
from .noise import Noise
from .ops.checks import like, noise_for, promote, samples
from .ops.loss import check, loss_mask, loss_weight
from .ops.noising import add_noise
from .ops.parameterisation import MIXES, check_name, error_ratio
from .ops.residual import residual_loss
from .schedule import Schedule, stack_rows

# Levels are drawn from a stream of their own, so that they are independent of the noise they scale.
LEVEL_TAG = 0x6C6576656C  # "level"


class DenoisingLoss(torch.nn.Module):
    """The denoising objective: draw a level, noise the data, compare the network with its target.

    schedule: Schedule      predict: what the network predicts, "eps", "x0", "v", "score" or "flow"
    level_weight: (T,) a weight for each level, or None

    loss(net, x0, noise) calls net(x_t, t) and returns {"loss", "noise_mse", "x0_mse"}: the objective,
    with its gradient, and the mean squared errors of the implied noise and x0 estimates, without, all
    from one pass. With a Noise the levels too are a function of (seed, step, sample), and neither the
    noise nor the target is stored. Ho et al. 2020, algorithm 1.
    """

    level_weight: Tensor | None

    def __init__(self, schedule: Schedule, predict: str = "eps", *, level_weight: Tensor | None = None) -> None:
        super().__init__()
        check_name("DenoisingLoss", "predict", predict)
        self.schedule = schedule
        self.predict = predict
        self.register_buffer("level_weight", level_weight)
        schedule._table("DenoisingLoss", f"errors from {predict}", self._errors, torch.float32, torch.device("cpu"))

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
        """x0: (B, ...); noise: Noise or a tensor like x0; t: (B,) levels, required with a tensor.

        weight (B,) and mask are those of noise_mse; further arguments go to the network.
        """
        op, predict = "DenoisingLoss", self.predict
        samples(op, "x0", x0)
        z, generated = noise_for(op, noise, x0, "x0")
        if t is None:
            if generated is None:
                raise ValueError(f"{op}: t must be given when noise is a tensor")
            t = self.draw_levels(generated, x0)
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
            rows = level._rows(op, f"target {predict}", self._target, pred_, compute)
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
        errors = level._rows(op, f"errors from {predict}", self._errors, mse, mse.dtype)
        noise_mse, x0_mse = (mse @ coefficients(errors.table, errors.t, op) / mse.shape[0]).unbind()
        return {"loss": loss, "noise_mse": noise_mse, "x0_mse": x0_mse}

    def _target(self, alpha: Any, sigma: Any) -> tuple[Any, ...]:
        p0, p1 = MIXES[self.predict](alpha, sigma)
        return 1.0, -p0, -p1

    def _errors(self, alpha: Any, sigma: Any) -> tuple[Any, ...]:
        return *error_ratio(self.predict, "eps")(alpha, sigma), *error_ratio(self.predict, "x0")(alpha, sigma)
