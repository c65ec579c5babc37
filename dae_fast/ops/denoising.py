"""The denoising loss: a prediction against its target p0*x0 + p1*eps, which is made inside the pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..backends.reference import compute_dtype
from ..level import Level, as_number, can_read, check_per_sample
from ..noise import Noise
from ..rows import Coefficients, Rows, stack_rows
from .affine import ABSENT, affine
from .checks import level_for, like, promote, samples
from .levels import look_up, rows_for, value_at
from .loss import Selecting, check, loss_mask
from .noising import operands
from .parameterisation import Parameterisation, check_name, mix
from .residual import KINDS, Mask, Reduction, kept_elements, penalty_columns, residual_loss
from .structured import StructuredNoise
from .weighting import Weight, weight_for

Kind = Literal["mse", "l1", "huber", "pseudo_huber"]
Delta = float | Callable[[Tensor, Tensor], Any]
AnyNoise = Noise | Tensor | StructuredNoise


@overload
def denoising_loss(
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    *,
    predict: Parameterisation = "eps",
    weight: Weight = None,
    kind: Kind = "mse",
    delta: Delta | None = None,
    mask: Tensor | Selecting | None = None,
    reduction: Reduction = "mean",
    log_variance: Tensor | None = None,
    return_per_sample: Literal[False] = False,
) -> Tensor: ...
@overload
def denoising_loss(
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    *,
    predict: Parameterisation = "eps",
    weight: Weight = None,
    kind: Kind = "mse",
    delta: Delta | None = None,
    mask: Tensor | Selecting | None = None,
    reduction: Reduction = "mean",
    log_variance: Tensor | None = None,
    return_per_sample: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def denoising_loss(
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    *,
    predict: Parameterisation = "eps",
    weight: Weight = None,
    kind: Kind = "mse",
    delta: Delta | None = None,
    mask: Tensor | Selecting | None = None,
    reduction: Reduction = "mean",
    log_variance: Tensor | None = None,
    return_per_sample: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """mean_b w_b * loss_b, loss_b = mean(rho(pred_b - target_b)), target = p0 * x0 + p1 * eps, and its gradient.

    pred: (B, ...) fp16/bf16/fp32/fp64, the network's output      x0: like pred
    noise: what x_t was made with: Noise, OffsetNoise, PyramidNoise, or a tensor like pred
    level: Level. noise, or level, may be None where nothing depends on it: a classical denoising autoencoder has
            predict="x0", noise=None, level=None
    predict: "eps", "x0", "v", "score", "flow", or EDM's F as EDM(sigma_data)
    weight: None or "uniform"; "snr", "truncated_snr", "min_snr", "soft_min_snr", "p2", "edm", "likelihood", or one of
            dae_fast.weighting, right for `predict` and finite at zero terminal SNR; a function of (alpha, sigma),
            float64 tensors () or (B,); a tensor (B,). All but the tensor are constants, without gradient
    kind: rho(r): "mse" r^2; "l1" |r|; "huber" r^2/2, and delta (|r| - delta/2) beyond delta;
            "pseudo_huber" 2 delta (sqrt(r^2 + delta^2) - delta)
    delta: > 0, of the Huber kinds: a float, or a function of (alpha, sigma). The schedule of Khrapov et al. 2024 is
            lambda alpha, sigma: (1 - c) * (alpha / (alpha + sigma)) ** 2 + c, c = 0.1
    mask: the elements that count, as in noise_mse
    reduction: "mean"; "sum" (sum_b w_b * sum of rho); "none" (w_b * loss_b, one value per sample)
    log_variance: u, (B,), a learned log-variance: w_b * loss_b * exp(-u_b) + u_b takes the place of w_b * loss_b
    return_per_sample: also return loss_b, (B,), unweighted and without gradient, from the same sums: for
            LevelStatistics
    returns: fp32 (fp64 for fp64) scalar, or (B,) for "none"
    Reads pred and x0 once (x0 not at all for eps and score) and writes the gradient of pred in the same pass, unless
    another gradient is wanted too: of x0, a tensor noise or level; fp16 and "none" make theirs in backward too.
    Neither the target nor eps is stored. Raises ValueError on a shape mismatch, the mean of an empty
    batch, or a level where target or weight is not finite; TypeError for what is no such thing.
    Ho et al. 2020; Hang et al. 2023; Khrapov et al. 2024; log_variance: Karras et al. 2024, eq. 21.
    """
    op = "denoising_loss"
    samples(op, "pred", pred)
    like(op, "x0", x0, "pred", pred)
    check_name(op, "predict", predict)
    if level is not None:
        level_for(op, level)
        level._check(op, pred)
    check(op, pred, reduction)
    w = weight_for(op, weight, level, pred, predict)
    chosen = loss_mask(op, pred, mask)
    if log_variance is None:
        loss, per_sample = against_target(op, pred, x0, noise, level, predict, w, chosen, reduction, kind, delta)
    else:
        u = _log_variance(op, log_variance, pred)
        w = torch.exp(-u) if w is None else w * torch.exp(-u)
        loss, per_sample = against_target(op, pred, x0, noise, level, predict, w, chosen, reduction, kind, delta)
        if reduction == "mean":
            loss = loss + u.mean()
        else:
            loss = loss + (u if reduction == "none" else (u * kept_elements(pred, chosen)).sum())
    return (loss, per_sample) if return_per_sample else loss


def against_target(
    op: str,
    pred: Tensor,
    x0: Tensor,
    noise: AnyNoise | None,
    level: Level | None,
    predict: Parameterisation,
    weight: Tensor | None,
    mask: Mask,
    reduction: Reduction,
    kind: Kind = "mse",
    delta: Delta | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, mean of rho of each sample): pred against p0*x0 + p1*noise. All but noise, kind and delta is checked."""
    y = None if predict in ("eps", "score") else x0
    z = generated = None
    of_y, of_eps = 0.0, 1.0  # shares of the noise that y and the generated eps are
    if noise is not None:
        z, generated, of_z, of_eps = operands(op, noise, x0)
    elif predict != "x0":
        raise ValueError(f"{op}: noise must be given for predict={predict!r}")
    if predict == "x0":
        z = generated = None
    pred, y, z = promote(pred, y, z)
    if z is not None and generated is not None:  # structured noise
        if y is None:
            y, z, of_y = z, None, of_z
        else:
            shares = stack_rows(op, (of_z, of_eps), z, compute_dtype(z.dtype))
            (z,) = affine(op, z, None, None, generated, shares, (0, ABSENT, 1, ABSENT))
            generated, of_eps = None, 1.0
    number, delta_at = _penalty(op, pred, level, kind, delta)
    rows = _target_rows(op, pred, level, predict, of_y, of_eps, delta_at)
    return residual_loss(op, pred, y, z, generated, rows, weight, mask, reduction, number)


def target_coefficients(predict: Parameterisation, of_y: float = 0.0, of_eps: float = 1.0) -> Coefficients:
    """A residual's row: of pred, y and noise in pred - p0*x0 - p1*(of_y*y + of_eps*eps), y standing for x0 as well."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, ...]:
        p0, p1 = mix(predict, alpha, sigma)
        return 1.0, -p0 - p1 * of_y, -p1 * of_eps

    return coefficients


def _target_rows(
    op: str,
    pred: Tensor,
    level: Level | None,
    predict: Parameterisation,
    of_y: float,
    of_eps: float,
    delta: float | Tensor | None,
) -> Rows:
    """What a residual reads: target_coefficients, then delta where it is given."""
    coefficients = target_coefficients(predict, of_y, of_eps)
    compute = compute_dtype(pred.dtype)
    if predict in ("eps", "x0"):  # the same at every level
        columns = coefficients(1.0, 1.0)
        if not isinstance(delta, Tensor):
            return stack_rows(op, columns if delta is None else (*columns, delta), pred, compute)
        rows = stack_rows(op, columns, pred, compute)
    elif level is None:
        raise ValueError(f"{op}: level must be given for predict={predict!r}")
    else:
        shares = () if (of_y, of_eps) == (0.0, 1.0) else (of_y, of_eps)
        rows = rows_for(op, level, ("target", predict, *shares), coefficients, pred, compute)
    if delta is None:
        return rows
    # Not in the schedule's table, which would be another for every delta of a loop that changes it.
    table = look_up(op, rows)
    column = torch.as_tensor(delta, dtype=compute, device=pred.device).reshape(-1, 1)
    B = max(len(table), len(column))
    return Rows(torch.cat((table.expand(B, -1), column.expand(B, -1)), 1), None)


def _penalty(
    op: str, pred: Tensor, level: Level | None, kind: Kind, delta: Delta | None
) -> tuple[int, float | Tensor | None]:
    """rho's place in KINDS, and its delta: a float, or of the levels."""
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    number = KINDS.index(kind)
    if (penalty_columns(number)[2] == ABSENT) != (delta is None):
        wanted = "must be given" if delta is None else "must be None"
        raise ValueError(f"{op}: delta {wanted} for kind={kind!r}")
    if delta is None:
        return number, None
    if callable(delta):
        if level is None:
            raise ValueError(f"{op}: level must be given, of which this delta is a function")
        value = value_at(op, "delta", delta, level, pred)
        if can_read(value) and not (value > 0).all():
            raise ValueError(f"{op}: delta must be positive, got {float(value.min())} from the function")
        return number, value
    delta = as_number(op, "delta", delta)
    if not 0 < delta < math.inf:
        raise ValueError(f"{op}: delta must be positive and finite, got {delta}")
    return number, delta


def _log_variance(op: str, u: Tensor, pred: Tensor) -> Tensor:
    """(B,) in pred's compute dtype."""
    if not isinstance(u, Tensor):
        raise TypeError(f"{op}: log_variance must be a tensor (B,), got {type(u).__name__}")
    check_per_sample(op, "log_variance", u, pred)
    return u.to(compute_dtype(pred.dtype)).expand(pred.shape[0])
