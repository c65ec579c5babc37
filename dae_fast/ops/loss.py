"""Losses on the network's prediction."""

from __future__ import annotations

from typing import Literal, Protocol, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends.reference import compute_dtype
from ..checks import flag
from ..level import Level, check_per_sample
from ..noise import Noise
from ..rows import Rows, rows_at, stack_rows
from ..schedule import Schedule
from .checks import level_for, noise_for, promote, samples
from .flat import seen
from .levels import look_up
from .masks import Drawn, Mask
from .parameterisation import error_ratio
from .residual import MINUS_TARGET, REDUCTIONS, Reduction, plain_residual_loss, residual_loss


@overload
def noise_mse(
    pred: Tensor,
    noise: Noise | Tensor,
    *,
    level: Level | None = None,
    weight: Tensor | None = None,
    level_weight: Tensor | None = None,
    mask: Tensor | Selecting | None = None,
    reduction: Reduction = "mean",
    return_x0_mse: Literal[False] = False,
) -> Tensor: ...
@overload
def noise_mse(
    pred: Tensor,
    noise: Noise | Tensor,
    *,
    level: Level | None = None,
    weight: Tensor | None = None,
    level_weight: Tensor | None = None,
    mask: Tensor | Selecting | None = None,
    reduction: Reduction = "mean",
    return_x0_mse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def noise_mse(
    pred: Tensor,
    noise: Noise | Tensor,
    *,
    level: Level | None = None,
    weight: Tensor | None = None,
    level_weight: Tensor | None = None,
    mask: Tensor | Selecting | None = None,
    reduction: Reduction = "mean",
    return_x0_mse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """mean_b w_b * mse_b, mse_b = mean((pred_b - eps_b)^2): the simple loss, and its gradient in one pass.

    pred: (B, ...) fp16/bf16/fp32/fp64      noise: Noise (eps is regenerated), or a tensor like pred
    weight: (B,) multiplies each sample's mean before the mean over the batch
    level_weight: (T,) a weight per level, looked up at level = schedule[t]; multiplies with `weight`
    mask: bool, broadcastable to pred and of as many dimensions: the elements that count; mse_b is over those (0 if
            there are none). Or a Masking or SaltAndPepper, or its .struck or .kept, whose elements are drawn again
            and never stored
    reduction: "mean"; "sum" (sum_b w_b * sum of squares); "none" (w_b * mse_b, one value per sample)
    return_x0_mse: also return mse_b of the denoised estimate, (sigma/alpha)^2 * mse_b, from the same
            sums: (loss, (B,) without gradient); needs `level`
    returns: fp32 (fp64 for fp64) scalar, or (B,) for "none"
    Reads pred once and writes its gradient in the same pass (fp16, and "none", make it in backward,
    when the scale is known). Gradient: 2 w_b / (B N_b) * (pred - eps), and those of a tensor noise and
    weight. Raises ValueError on a shape mismatch or the mean of an empty batch.
    Ho et al. 2020, eq. 14.
    """
    op = "noise_mse"
    plain = weight is None and level is None and level_weight is None and mask is None and return_x0_mse is False
    if plain and not is_compiling():
        done = plain_residual_loss(op, pred, None, noise, reduction)
        if done is not None:
            return done[0]
    samples(op, "pred", pred)
    z, generated = noise_for(op, noise, pred, "pred")
    if z is not None and z.dtype != pred.dtype:
        pred, z = promote(pred, z)
    if level is not None:
        level_for(op, level)
    rows = stack_rows(op, MINUS_TARGET, pred, compute_dtype(pred.dtype))
    weight = loss_weight(op, pred, level, weight, level_weight)
    loss, mse, _ = residual_loss(
        op, pred, z, None, generated, rows, weight, loss_mask(op, pred, mask), check(op, pred, reduction)
    )
    if not flag(op, "return_x0_mse", return_x0_mse):
        return loss
    if level is None:
        raise ValueError(f"{op}: return_x0_mse needs level")
    return loss, mse * error_factor(op, "eps", "x0", level, mse)


def check(op: str, pred: Tensor, reduction: Reduction) -> Reduction:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if reduction == "mean" and pred.numel() == 0:
        raise ValueError(f"{op}: the mean over an empty batch {tuple(pred.shape)} is not defined; use reduction='sum'")
    return reduction


class Selecting(Protocol):
    """A corruption, or what it struck or kept: elements that are drawn, not stored."""

    def _drawn(self, op: str, x: Tensor) -> Drawn: ...


def loss_mask(op: str, pred: Tensor, mask: Tensor | Selecting | None) -> Mask:
    """Of pred's shape, expanded without a copy."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) and hasattr(mask, "_drawn"):
        drawn = mask._drawn(op, pred)
        return drawn._replace(thresholds=seen(Rows(drawn.thresholds, None)).table)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be a bool tensor or a corruption, got {got}")
    if mask.device != pred.device:
        raise ValueError(f"{op}: mask must be on {pred.device} like pred, got {mask.device}")
    if mask.dim() not in (0, pred.dim()):
        # (B, H, W) would be taken for (C, H, W) where B = C.
        raise ValueError(
            f"{op}: mask must have as many dimensions as {tuple(pred.shape)}, 1 where it is broadcast (mask[:, None], "
            f"say), got {tuple(mask.shape)}"
        )
    try:
        return mask.expand(pred.shape)
    except RuntimeError:
        raise ValueError(f"{op}: mask must be broadcastable to {tuple(pred.shape)}, got {tuple(mask.shape)}") from None


def loss_weight(
    op: str, pred: Tensor, level: Level | None, weight: Tensor | None, level_weight: Tensor | None
) -> Tensor | None:
    """(B,): the product of what is given."""
    if weight is not None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{op}: weight must be a tensor (B,), got {type(weight).__name__}")
        check_per_sample(op, "weight", weight, pred)
        weight = weight.expand(pred.shape[0])
    if level_weight is None:
        return weight
    t = None if level is None else level.t
    if t is None or level is None or level._schedule is None:
        raise ValueError(f"{op}: level_weight is looked up by level and needs level=schedule[t]")
    check_level_weight(op, level._schedule, level_weight)
    level._check(op, pred)
    looked_up = look_up(op, rows_at(level_weight[:, None], t), pred)[:, 0].expand(pred.shape[0])
    return looked_up if weight is None else weight * looked_up


def check_level_weight(op: str, schedule: Schedule, level_weight: Tensor) -> None:
    """One weight for each level."""
    if not isinstance(level_weight, Tensor) or level_weight.shape != (len(schedule),):
        got = tuple(level_weight.shape) if isinstance(level_weight, Tensor) else type(level_weight).__name__
        raise ValueError(f"{op}: level_weight must be a tensor of shape ({len(schedule)},), got {got}")


def error_factor(op: str, predict: str, to: str, level: Level, mse: Tensor) -> Tensor:
    """(B,) or (1,): squared error of `to` for each unit of that of the prediction."""
    rows = level._rows(op, f"error of {to} from {predict}", error_ratio(predict, to), mse, mse.dtype)
    return look_up(op, rows, mse)[:, 0]
