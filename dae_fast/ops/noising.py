"""Noising: the forward process q(x_t | x_0)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, overload

from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from ..checks import as_number, samples
from ..coefficients import Level, level_for
from ..noise import Noise, noise_for
from ..primitives import LevelOp
from ..routing import wants_grad
from .parameterisation import Parameterisation, check_name, mix
from .structured import StructuredNoise

__all__ = ["add_noise"]

PERTURBATION_TAG = 0x7869  # "xi"; the input perturbation's stream


@overload
def add_noise(
    x0: Tensor,
    noise: Noise | Tensor | StructuredNoise,
    level: Level,
    *,
    target: None = None,
    perturbation: float | None = None,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def add_noise(
    x0: Tensor,
    noise: Noise | Tensor | StructuredNoise,
    level: Level,
    *,
    target: Parameterisation,
    perturbation: float | None = None,
    out: None = None,
) -> tuple[Tensor, Tensor]: ...
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
    alone = target is None and perturbation is None
    if alone and (type(noise) is Noise or not isinstance(noise, StructuredNoise)):  # which takes a while to say
        return _ADD_NOISE.run(level, (x0, noise), None, out)
    samples(op, "x0", x0)
    level_for(op, level)
    y, generated, factor_y, factor_eps = operands(op, noise, x0)
    if target is not None:
        check_name(op, "target", target)
        if out is not None:
            raise ValueError(f"{op}: out= is of x_t alone; give no target with it")
    gamma = 0.0 if perturbation is None else as_number(op, "perturbation", perturbation)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"{op}: perturbation must be finite and not negative, got {gamma}")
    if gamma and generated is None:
        raise ValueError(f"{op}: a perturbation is drawn from the noise's key: noise must not be a tensor")
    made = None if target in (None, "x0") else target  # x0 is there already
    # Of a tensor noise y is what eps is elsewhere.
    of_y, of_eps = (factor_y if y is not None else 0.0), (factor_eps if generated is not None else 0.0)
    x_t = _mixture(made, of_y, of_eps).run(level, tuple(t for t in (x0, y, generated) if t is not None), None, out)
    wanted: Tensor | None = x0 if target == "x0" else None
    if made is not None:
        x_t, wanted = x_t
    if gamma:
        assert generated is not None
        x_t = _perturbed(x_t, generated, level, gamma)
    return x_t if wanted is None else (x_t, wanted)


_ADD_NOISE = LevelOp("add_noise", lambda alpha, sigma: {"x0": alpha, "noise": sigma})


def operands(
    op: str, noise: Noise | Tensor | StructuredNoise, x0: Tensor
) -> tuple[Tensor | None, Noise | None, float, float]:
    """As StructuredNoise.as_operands, of any noise: checked, fit for batch x0."""
    if isinstance(noise, StructuredNoise):
        noise._check(op, x0.shape[0], x0.device)
        return noise.as_operands(x0)
    y, generated = noise_for(op, noise, x0, "x0")
    return y, generated, 1.0, 1.0


def _mixture(target: Parameterisation | None, of_y: float, of_eps: float) -> LevelOp[Any]:
    """x_t, and perhaps the target, of x0, a tensor y and a Noise eps: the noise is of_y*y + of_eps*eps, 0 for none."""
    return _made_mixture(target, of_y, of_eps) if is_dynamo_compiling() else _kept_mixture(target, of_y, of_eps)


def _made_mixture(target: Parameterisation | None, of_y: float, of_eps: float) -> LevelOp[Any]:
    def parts(p0: Any, p1: Any) -> dict[str, Any]:
        shares = {name: p1 * factor for name, factor in (("noise", of_y), ("eps", of_eps)) if factor}
        return {"x0": p0, **shares}

    def coefficients(alpha: Any, sigma: Any) -> dict[str, Any]:
        return parts(alpha, sigma)

    def of_target(alpha: Any, sigma: Any) -> dict[str, Any]:
        assert target is not None
        return parts(*mix(target, alpha, sigma))

    return LevelOp("add_noise", coefficients, also=None if target is None else of_target)


_kept_mixture = lru_cache(maxsize=64)(_made_mixture)


def _perturbed(x_t: Tensor, noise: Noise, level: Level, gamma: float) -> Tensor:
    """x_t + sigma * gamma * xi, in place where no gradient has to pass."""
    perturb = _made_perturbation(gamma) if is_dynamo_compiling() else _kept_perturbation(gamma)
    given = x_t, noise.fold_in(PERTURBATION_TAG)
    by_hand = (c for c in (level._alpha, level._sigma) if isinstance(c, Tensor))
    in_place = not is_compiling() and not wants_grad(x_t, *by_hand)
    return perturb.run(level, given, None, x_t if in_place else None)


def _made_perturbation(gamma: float) -> LevelOp[Tensor]:
    return LevelOp("add_noise", lambda alpha, sigma: {"x_t": 1.0, "xi": sigma * gamma})


_kept_perturbation = lru_cache(maxsize=64)(_made_perturbation)
