"""Noising: the forward process q(x_t | x_0)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from ..kernels.reference import compute_dtype
from ..level import Level, as_number
from ..noise import Noise
from ..rows import Coefficients
from .affine import ABSENT, Columns, affine, affine_into
from .checks import level_for, noise_for, promote, samples
from .levels import rows_for
from .memory import check_out
from .parameterisation import Parameterisation, check_name, mix
from .routing import plain_affine, wants_grad
from .structured import StructuredNoise

PERTURBATION_TAG = 0x7869  # "xi"; the input perturbation's stream


def add_noise(
    x0: Tensor,
    noise: Noise | Tensor | StructuredNoise,
    level: Level,
    *,
    target: Parameterisation | None = None,
    perturbation: float | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_t = alpha * x0 + sigma * eps, eps ~ N(0, 1).

    x0: (B, ...) fp16/bf16/fp32/fp64      noise: Noise, OffsetNoise, PyramidNoise, or a tensor like x0
    level: Level, alpha and sigma of each sample     returns: like x0, or (x_t, target)
    target: "eps", "x0", "v", "score", "flow" or an EDM: what a network with that parameterisation should
            predict, written in the same pass.
    perturbation: gamma >= 0 of Ning et al. 2023: x_t = alpha * x0 + sigma * (eps + gamma * xi), while the target
            stays that of eps; a second pass over x_t, in place. xi ~ N(0, 1) is noise.fold_in(PERTURBATION_TAG), so
            noise cannot be a tensor. A schedule keeps a table for each gamma.
    out: written instead of a new tensor, of any strides: a slice of a wider buffer, say. Not with target
    Reads x0 once, writes x_t once; with a Noise, eps is never stored (unless it is the target).
    Gradient: d x0 = alpha * d x_t; d noise = sigma * d x_t for a tensor; alpha and sigma given as
    tensors get theirs. Raises ValueError on a shape mismatch, a level outside the schedule, or an `out` that
    overlaps itself, partly overlaps an input, or would need a gradient.
    Ho et al. 2020, eq. 4.
    """
    op = "add_noise"
    plain = target is None and perturbation is None and out is None
    if plain and type(level) is Level and not is_compiling():
        if type(noise) is Noise:
            done = plain_affine(op, _FRESH, x0, None, None, noise, op, level, None, None)
        else:
            done = plain_affine(op, _READ, x0, noise, None, None, op, level, None, None)
        if done is not None:
            return done
    samples(op, "x0", x0)
    level_for(op, level)
    y, generated, factor_y, factor_eps = operands(op, noise, x0)
    x, y = promote(x0, y)
    if target is not None:
        check_name(op, "target", target)
    gamma = 0.0 if perturbation is None else as_number(op, "perturbation", perturbation)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"{op}: perturbation must be finite and not negative, got {gamma}")
    if gamma and generated is None:
        raise ValueError(f"{op}: a perturbation is drawn from the noise's key: noise must not be a tensor")
    made = None if target in (None, "x0") else target  # x0 is there already
    compute = compute_dtype(x.dtype)
    if made is None and factor_y == factor_eps == 1:
        rows, last = level._rows(op, op, _noising, x, compute), 1
    else:
        factors = () if factor_y == factor_eps == 1 else (factor_y, factor_eps)
        key = (op, made or "alone", *factors)
        rows, last = rows_for(op, level, key, _mixture(made, factor_y, factor_eps), x, compute), 2
    of_y, of_eps = y is not None, generated is not None
    columns: Columns = (0, 1 if of_y else ABSENT, last if of_eps else ABSENT, ABSENT)
    wanted: Tensor | None = x0 if target == "x0" else None
    if out is not None:
        if target is not None:
            raise ValueError(f"{op}: out= is of x_t alone; give no target with it")
        check_out(op, out, x0=x, noise=y)
        if wants_grad(x, y, rows.table, out):
            raise ValueError(f"{op}: out= has no gradient; call it under torch.no_grad() or without out")
        x_t = affine_into(op, out, x, y, None, generated, rows, columns)
    elif made is None:
        (x_t,) = affine(op, x, y, None, generated, rows, columns)
    else:
        of_x0 = made not in ("eps", "score")
        columns += (3 if of_x0 else ABSENT, 4 if of_y else ABSENT, 5 if of_eps else ABSENT, ABSENT)
        x_t, wanted = affine(op, x, y, None, generated, rows, columns)
    if gamma and generated is not None:
        x_t = _perturbed(op, x_t, generated, level, gamma)
    return x_t if wanted is None else (x_t, wanted)


# Noise as the second operand, or made in the third's place.
_READ, _FRESH = (0, 1, ABSENT, ABSENT), (0, ABSENT, 1, ABSENT)


def operands(
    op: str, noise: Noise | Tensor | StructuredNoise, x0: Tensor
) -> tuple[Tensor | None, Noise | None, float, float]:
    """As StructuredNoise.as_operands, of any noise: checked, fit for batch x0."""
    if isinstance(noise, StructuredNoise):
        noise._check(op, x0.shape[0], x0.device)
        return noise.as_operands(x0)
    y, generated = noise_for(op, noise, x0, "x0")
    return y, generated, 1.0, 1.0


def _noising(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    return alpha, sigma


def _mixture(target: Parameterisation | None, factor_y: float, factor_eps: float) -> Coefficients:
    """Of x0, y and eps in x_t, then in the target."""

    def coefficients(alpha: Any, sigma: Any) -> tuple[Any, ...]:
        mixes = [(alpha, sigma)] if target is None else [(alpha, sigma), mix(target, alpha, sigma)]
        return tuple(c for p0, p1 in mixes for c in (p0, p1 * factor_y, p1 * factor_eps))

    return coefficients


def _perturbed(op: str, x_t: Tensor, noise: Noise, level: Level, gamma: float) -> Tensor:
    """x_t + sigma * gamma * xi, in place where no gradient has to pass."""
    key = (op, "perturbation", gamma)
    rows = rows_for(op, level, key, lambda alpha, sigma: (1.0, sigma * gamma), x_t, compute_dtype(x_t.dtype))
    xi = noise.fold_in(PERTURBATION_TAG)
    if wants_grad(x_t, rows.table):
        return affine(op, x_t, None, None, xi, rows, _FRESH)[0]
    return affine_into(op, x_t, x_t, None, None, xi, rows, _FRESH)
