"""Markov chains of ops/mcmc.py as loops: SGLD, MALA and underdamped Langevin, of a score or a target of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..kernels.spec import compute_dtype
from ..noise import Noise
from ..ops.mcmc import mala_step, sgld_step, underdamped_step
from ..primitives import summed
from .langevin import SCORE
from .network import outputs
from .running import called_back, narrowed, progressed
from .start import START_TAG, check_start

Score = Callable[[Tensor], Any]
ChainCallback = Callable[[int, Tensor], Any]
_checked = partial(
    checks.arguments,
    noise=checks.instance(Noise, "a Noise"),
    steps=checks.whole(0),
    progress=checks.flag,
    callback=checks.function,
)


@torch.no_grad()
@_checked(score=checks.function)
def sgld(
    score: Score,
    x: Tensor,
    step_size: float | Tensor | Callable[[int], float | Tensor],
    steps: int,
    noise: Noise,
    *,
    temperature: float | Tensor = 1.0,
    preconditioner: Tensor | Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
    callback: ChainCallback | None = None,
) -> Tensor:
    """`steps` of sgld_step: x + h P score + sqrt(2 h T P) eps, for all rows of x.

    score(x): grad log p, like x, perhaps of a minibatch      x: (B, ...), the chains' starts
    step_size: h as in sgld_step, or a function of the step's number, for h that decreases
    temperature: T > 0      preconditioner: P as in sgld_step, or a function of the score, RMSprop's, say
    noise: Noise; step k uses noise.fold_in(k)      progress: show a bar
    callback(k, x): called after step k; a tensor that it returns goes on as x
    returns: like x; the state is of the dtype of the arithmetic, fp32 for halves
    At a constant h a unit Gaussian settles at variance T/(1 - h/2). No gradient. Errors as in sgld_step.
    Welling and Teh 2011; P: Li et al. 2016.
    """
    op = "sgld"
    check_start(op, x, noise)
    dtype = x.dtype
    x = x.to(compute_dtype(dtype), copy=True)
    for k in progressed(range(steps), progress, op):
        (slope,) = outputs(op, score(x if x.dtype == dtype else x.to(dtype)), x, (), SCORE)
        h = step_size(k) if callable(step_size) else step_size
        P: Any = preconditioner
        if callable(P) and not isinstance(P, type):
            P = P(slope)
        x = sgld_step(x, slope, h, noise.fold_in(k), temperature=temperature, preconditioner=P)
        x = x if callback is None else called_back(op, callback, x, k, x)
    return narrowed(op, x, dtype)


@torch.no_grad()
@_checked(score=checks.function)
def underdamped(
    score: Score,
    x: Tensor,
    step_size: float,
    steps: int,
    noise: Noise,
    *,
    v: Tensor | None = None,
    friction: float = 1.0,
    temperature: float = 1.0,
    progress: bool = False,
    callback: ChainCallback | None = None,
) -> tuple[Tensor, Tensor]:
    """`steps` of underdamped_step (BAOAB) from (x, v) to (x, v), both at one time, for all rows of x.

    score(x): grad log p, like x, called steps + 1 times      x: (B, ...), the chains' starts
    v: like x, the velocity there; None: sqrt(T) times noise.fold_in(START_TAG)
    step_size: h > 0      friction: >= 0      temperature: T >= 0
    noise: Noise; step k uses noise.fold_in(k)      progress: show a bar
    callback(k, x): called after step k; a tensor that it returns goes on as x
    returns: like x, both; two calls of n steps, the second with noise.fold_in of its own, are a chain of 2n
    The positions of a Gaussian settle without bias at any h < 2/omega. No gradient. Errors as in underdamped_step.
    Leimkuhler and Matthews 2013.
    """
    op = "underdamped"
    check_start(op, x, noise)
    h = checks.number(op, "step_size", step_size, "positive and finite")
    T = checks.number(op, "temperature", temperature, "finite and not negative")
    dtype = x.dtype
    x = x.to(compute_dtype(dtype), copy=True)
    if v is None:
        v = math.sqrt(T) * noise.fold_in(START_TAG).normal(x.shape, dtype=x.dtype, device=x.device)
    else:
        checks.like(op, "v", v, "x", x)

    def slope() -> Tensor:
        return outputs(op, score(x if x.dtype == dtype else x.to(dtype)), x, (), SCORE)[0]

    def kicked(v: Tensor, h: float) -> Tensor:
        return summed(op, ("v", "score"), (v, slope()), (1.0, h), None)

    v = kicked(v.to(x.dtype), -h / 2)  # back, to what it is between two steps
    for k in progressed(range(steps), progress, op):
        x, v = underdamped_step(x, v, slope(), h, noise.fold_in(k), friction=friction, temperature=T)
        x = x if callback is None else called_back(op, callback, x, k, x)
    v = kicked(v, h / 2)
    return narrowed(op, x, dtype), narrowed(op, v, dtype)


@torch.no_grad()
@_checked(target=checks.function)
def mala(
    target: Callable[[Tensor], Any],
    x: Tensor,
    step_size: float | Tensor,
    steps: int,
    noise: Noise,
    *,
    progress: bool = False,
    callback: ChainCallback | None = None,
) -> tuple[Tensor, Tensor]:
    """`steps` of mala_step for all rows of x: Langevin's proposals, accepted so that the law has no bias.

    target(x): (log_prob, score), log p (B,) up to a constant and its gradient, like x; called steps + 1 times
    x: (B, ...), the chains' starts      step_size: h as in mala_step
    noise: Noise; step k uses noise.fold_in(k)      progress: show a bar
    callback(k, x): called after step k; a tensor that it returns goes on as x, of which target is asked again
    returns: x, like x, and (B,) fp32, the share of each chain's proposals that was taken; nothing waits for the device
    No gradient. Errors as in mala_step. Roberts and Tweedie 1996.
    """
    op = "mala"
    check_start(op, x, noise)
    dtype = x.dtype
    x = x.to(compute_dtype(dtype), copy=True)

    def seen(y: Tensor) -> Any:
        made = target(y if y.dtype == dtype else y.to(dtype))
        if not isinstance(made, tuple) or len(made) != 2:
            raise TypeError(f"{op}: target must return (log_prob, score), got {type(made).__name__}")
        return made[0], outputs(op, made[1], y, (), "the target's score")[0]

    log_prob, score = seen(x)
    taken = torch.zeros(len(x), device=x.device)
    for k in progressed(range(steps), progress, op):
        x, log_prob, score, accepted = mala_step(seen, x, log_prob, score, step_size, noise.fold_in(k))
        taken += accepted
        changed = x if callback is None else called_back(op, callback, x, k, x)
        if changed is not x:
            x = changed
            log_prob, score = seen(x)
    return narrowed(op, x, dtype), taken / max(steps, 1)
