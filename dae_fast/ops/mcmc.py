"""Steps of Markov chains beyond the plain Langevin update: preconditioned, with acceptance, with momentum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..checks import can_read, check_per_sample, like, samples
from ..coefficients import all_within
from ..kernels.spec import compute_dtype
from ..noise import Noise, noise_for
from ..primitives import Use, summed, summed_twice, weighted_sum
from ..primitives.sums import row_dots, widened
from ..routing import beside

__all__ = ["mala_step", "sgld_step", "underdamped_step"]

SMALLEST = math.ulp(0.0)  # above 0
ACCEPTANCE_TAG = 0x616363  # "acc"; the words that decide on a proposal


def _positive(op: str, name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or float64 (B,)."""
    found = check_per_sample(op, name, value, x)
    if isinstance(found, Tensor):
        found = found.double()
        if not all_within(found, SMALLEST, math.inf) and can_read(found) and not bool((found > 0).all()):
            raise ValueError(f"{op}: {name} must be positive, got {float(found.min())}")
    elif not 0 < found < math.inf:
        raise ValueError(f"{op}: {name} must be positive and finite, got {found}")
    return found


def _root(value: float | Tensor) -> float | Tensor:
    return value**0.5


def sgld_step(
    x: Tensor,
    score: Tensor,
    step_size: float | Tensor,
    noise: Noise | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    preconditioner: Tensor | None = None,
) -> Tensor:
    """x + h * P * score + sqrt(2 h T P) * eps: Langevin dynamics at temperature T, each element with its own step.

    x, score: (B, ...) fp16/bf16/fp32/fp64, the score perhaps of a minibatch      noise: Noise, or a tensor like x
    step_size: h > 0, a float or a tensor () or (B,)      temperature: T > 0, the same; the law is p^(1/T)
    preconditioner: P > 0, like x, or None for 1: of RMSprop 1 / (delta + sqrt(V)), V = a V + (1 - a) score^2, whose
            change from step to step is taken to be slow (the paper's Gamma is left out)
    returns: like x
    Without P one launch. With it the normals' launch and torch's arithmetic; eps is stored where P wants a gradient.
    Gradient: of all but the numbers. Raises ValueError on a shape mismatch or a step size that is not positive.
    Welling and Teh 2011; P: Li et al. 2016, algorithm 1.
    """
    op = "sgld_step"
    samples(op, "x", x)
    like(op, "score", score, "x", x)
    noise_for(op, noise, x, "x")
    h, T = (_positive(op, name, v, x) for name, v in (("step_size", step_size), ("temperature", temperature)))
    if preconditioner is None:
        return summed(op, ("x", "score", "noise"), (x, score, noise), (1.0, h, _root(2 * h * T)), None)
    like(op, "preconditioner", preconditioner, "x", x)
    P, h, spread = widened(preconditioner), _beside(h, x), _beside(2 * h * T, x)
    if isinstance(noise, Tensor):
        eps = widened(noise)
    else:
        eps = beside(noise.normal(x.shape, dtype=compute_dtype(x.dtype), device=x.device), x)
    drifted = torch.addcmul(widened(x), h * P, widened(score))
    return torch.addcmul(drifted, (spread * P).sqrt(), eps).to(x.dtype)


def _beside(value: float | Tensor, x: Tensor) -> Any:
    """Shaped to multiply x, in the dtype of the arithmetic."""
    if not isinstance(value, Tensor):
        return value
    return value.to(compute_dtype(x.dtype)).reshape(*value.shape, *[1] * (x.dim() - value.dim()))


_UNDERDAMPED = Use(0), Use(1, 4), Use(2, 5), Use(3, 6)  # of x, v, score and noise, in x and in v


def underdamped_step(
    x: Tensor,
    v: Tensor,
    score: Tensor,
    step_size: float,
    noise: Noise | Tensor,
    *,
    friction: float = 1.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(x, v) of a step of dx = v dt, dv = (score - friction * v) dt + sqrt(2 friction T) dW, in one launch.

    x, v, score: (B, ...) fp16/bf16/fp32/fp64, score at x      noise: Noise, or a tensor like x
    step_size: h > 0      friction: >= 0; 0 is a leapfrog step, without noise      temperature: T >= 0, of v too
    returns: like x, both
    BAOAB, whose two half kicks between two steps are one: w = v + h * score; x + h/2 * w; w = c * w +
    sqrt((1 - c^2) T) * eps, c = e^(-friction h); x + h/2 * w. So v is what it is between two kicks: start with a draw
    of N(0, T) less h/2 * score, and add h/2 * score for the velocity at x.
    Gradient: of x, v, score and a tensor noise. Raises ValueError on a shape mismatch or a number out of its range.
    Leimkuhler and Matthews 2013.
    """
    op = "underdamped_step"
    samples(op, "x", x)
    for name, t in (("v", v), ("score", score)):
        like(op, name, t, "x", x)
    noise_for(op, noise, x, "x")
    h = checks.number(op, "step_size", step_size, "positive and finite")
    friction = checks.number(op, "friction", friction, "finite and not negative")
    T = checks.number(op, "temperature", temperature, "finite and not negative")
    c, spread = math.exp(-friction * h), (-math.expm1(-2 * friction * h) * T) ** 0.5
    drift = 0.5 * h * (1 + c)
    row = 1.0, drift, drift * h, 0.5 * h * spread, c, c * h, spread
    return summed_twice(op, ("x", "v", "score", "noise"), (x, v, score, noise), row, _UNDERDAMPED)


class Mala(NamedTuple):
    """What mala_step returns: where the chains are, with log p and its gradient there, and which of them moved."""

    x: Tensor
    log_prob: Tensor
    score: Tensor
    accepted: Tensor


def mala_step(
    target: Callable[[Tensor], Any],
    x: Tensor,
    log_prob: Tensor,
    score: Tensor,
    step_size: float | Tensor,
    noise: Noise,
) -> Mala:
    """A Langevin proposal y = x + h * score + sqrt(2h) * eps, taken with probability min(1, p(y) q(x|y) / p(x) q(y|x)).

    target(y): (log_prob, score), log p (B,) up to a constant and its gradient, like x
    x: (B, ...) fp16/bf16/fp32/fp64      log_prob, score: of x, as target gives them
    step_size: h > 0, a float or a tensor () or (B,)
    noise: Noise; eps is its normals, and the uniform numbers are words of fold_in(ACCEPTANCE_TAG)
    returns: Mala(x, log_prob, score, accepted (B,) bool), the next step's arguments
    Without bias, whatever h. With d the sum of the two scores, log q(x|y) - log q(y|x) is
    -sqrt(h/2) d.eps - h/4 d.d: both products are one launch, in which eps is made again. No gradient.
    Raises ValueError on a shape mismatch or a step size that is not positive; a log p that is NaN is not taken.
    Roberts and Tweedie 1996.
    """
    op = "mala_step"
    checks.function(op, "target", target)
    samples(op, "x", x)
    like(op, "score", score, "x", x)
    _check_log_prob(op, log_prob, x)
    checks.instance(Noise, "a Noise")(op, "noise", noise)
    h = _positive(op, "step_size", step_size, x)
    if isinstance(h, Tensor) and h.dim() > 1:
        raise ValueError(f"{op}: step_size must be a float or have shape ({len(x)},), got {tuple(h.shape)}")
    with torch.no_grad():
        y = summed(op, ("x", "score", "noise"), (x, score, noise), (1.0, h, _root(2 * h)), None)
        made = target(y)
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError(f"{op}: target must return (log_prob, score), got {type(made).__name__}")
        log_prob_y, score_y = made
        _check_log_prob(op, log_prob_y, x)
        like(op, "the target's score", score_y, "x", x)
        d = weighted_sum((1.0, widened(score)), (1.0, widened(score_y)))
        squares, _, along = row_dots(op, d, (d, None, None, None), noise).unbind(1)
        of_log_prob = log_prob_y.double() - log_prob.double()
        log_ratio = of_log_prob - _root(h / 2) * along - h / 4 * squares
        words = noise.fold_in(ACCEPTANCE_TAG).bits((len(x), 1), device=x.device)[:, 0]
        accepted = ((words.double() + 0.5) * 2.0**-32).log() < log_ratio
        taken = accepted.reshape(-1, *[1] * (x.dim() - 1))
        return Mala(
            torch.where(taken, y, x),
            torch.where(accepted, log_prob_y, log_prob),
            torch.where(taken, score_y, score),
            accepted,
        )


def _check_log_prob(op: str, log_prob: Any, x: Tensor) -> None:
    if not isinstance(log_prob, Tensor) or not log_prob.is_floating_point() or log_prob.shape != x.shape[:1]:
        got = tuple(log_prob.shape) if isinstance(log_prob, Tensor) else type(log_prob).__name__
        raise ValueError(f"{op}: log_prob must be floating and have shape ({len(x)},), got {got}")
