"""What a network should predict: the target of a parameterisation, and DREAM's noised input and target."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import checks
from ..checks import like, promote, samples
from ..coefficients import Level, level_for
from ..primitives import LevelOp
from .losses import AnyNoise
from .noising import operands
from .parameterisation import Parameterisation, check_name, conversion, mix

__all__ = ["dream", "target"]


def target(x0: Tensor, noise: AnyNoise, level: Level, to: Parameterisation) -> Tensor:
    """p0 * x0 + p1 * eps: what a network of parameterisation `to` should predict.

    x0: (B, ...) fp16/bf16/fp32/fp64      noise: Noise, OffsetNoise, PyramidNoise, or a tensor like x0
    level: Level      to: "eps", "x0", "v", "score", "flow" or an EDM      returns: like x0; x0 itself for "x0"
    One launch, but for the score of a Noise. It is for a loss of one's own: denoising_loss makes the same inside its
    pass and stores nothing.
    Gradient: p0 and p1 times the upstream one, and those of a level's tensors.
    Raises ValueError on a shape mismatch, a level outside the schedule, or the score where sigma = 0.
    Ho et al. 2020; v: Salimans and Ho 2022, appendix D.
    """
    op = "target"
    check_name(op, "to", to)
    samples(op, "x0", x0)
    level_for(op, level)
    y, eps, of_y, of_eps = operands(op, noise, x0)
    if to == "x0":
        level._check(op, x0)
        return promote(x0, y)[0]
    if y is None and eps is not None and to in ("eps", "score"):  # a map has a tensor that it reads
        y, eps, of_y = eps.normal(x0.shape, dtype=x0.dtype, device=x0.device), None, of_eps
    given = tuple(t for t in (x0, y, eps) if t is not None)
    return _target_op(to, of_y if y is not None else 0.0, of_eps if eps is not None else 0.0).run(level, given)


def _target_op(to: Parameterisation, of_y: float, of_eps: float) -> LevelOp[Tensor]:
    return (_made_target if is_dynamo_compiling() else _kept_target)(to, of_y, of_eps)


def shares(of_y: float, of_eps: float) -> dict[str, float]:
    """The noise is of_y*y + of_eps*eps, 0 for none."""
    return {name: factor for name, factor in (("noise", of_y), ("eps", of_eps)) if factor}


def _made_target(to: Parameterisation, of_y: float, of_eps: float) -> LevelOp[Tensor]:
    alone = isinstance(to, str) and to in ("eps", "score")

    def coefficients(alpha: Any, sigma: Any) -> dict[str, Any]:
        p0, p1 = mix(to, alpha, sigma)
        return {"x0": None if alone else p0, **{name: p1 * factor for name, factor in shares(of_y, of_eps).items()}}

    return LevelOp("target", coefficients)


_kept_target = lru_cache(maxsize=64)(_made_target)


def dream(
    x0: Tensor,
    noise: AnyNoise,
    pred: Tensor,
    level: Level,
    *,
    predict: Parameterisation = "eps",
    p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(x_t, target) of eps + s^p * (eps - eps_hat), s = sigma / sqrt(alpha^2 + sigma^2): DREAM's rectified noise.

    x0: (B, ...) fp16/bf16/fp32/fp64      noise: what the first x_t was made with, as in add_noise
    pred: like x0, what the network said of that x_t, without gradient; eps_hat is the noise in it
    level: Level      predict: as in denoising_loss, of pred and of the target
    p: >= 0, how far the noise is left as it was: 0 rectifies it whole, and large p where sigma is near 1 alone
    returns: like x0 and pred promoted: alpha * x0 + sigma * that noise, and p0 * x0 + p1 * that noise
    One launch with two outputs; x_t is not read again. Then residual_loss(net(x_t, t), (1.0, target)) trains.
    Gradient: of x0, a tensor noise and a level's tensors. Raises ValueError on a shape mismatch, or a level where pred
    does not determine eps. Zhou et al. 2024, section 4.2 (lambda = sqrt(1 - alpha_bar)^p).
    """
    op = "dream"
    check_name(op, "predict", predict)
    p = checks.number(op, "p", p, "finite and not negative")
    samples(op, "x0", x0)
    like(op, "pred", pred, "x0", x0)
    level_for(op, level)
    y, eps, of_y, of_eps = operands(op, noise, x0)
    made = _made_dream if is_dynamo_compiling() else _kept_dream
    run = made(predict, p, of_y if y is not None else 0.0, of_eps if eps is not None else 0.0).run
    return run(level, tuple(t for t in (x0, y, eps, pred.detach()) if t is not None))


def _made_dream(predict: Parameterisation, p: float, of_y: float, of_eps: float) -> LevelOp[tuple[Tensor, Tensor]]:
    def rectified(alpha: Any, sigma: Any) -> tuple[Any, Any, Any]:
        """Of x0, eps and pred in the new noise."""
        a, b = conversion(predict, "eps")(alpha, sigma)  # eps_hat = a*x_t + b*pred
        s = (sigma / (alpha**2 + sigma**2) ** 0.5) ** p
        return -s * a * alpha, 1 + s - s * a * sigma, -s * b

    def parts(of: Any, scale: Any, alpha: Any, sigma: Any) -> dict[str, Any]:
        """of*x0 + scale*that noise."""
        x0, eps, pred = rectified(alpha, sigma)
        of_noise = {name: scale * eps * factor for name, factor in shares(of_y, of_eps).items()}
        return {"x0": of + scale * x0, **of_noise, "pred": scale * pred}

    return LevelOp(
        "dream",
        lambda alpha, sigma: parts(alpha, sigma, alpha, sigma),
        also=lambda alpha, sigma: parts(*mix(predict, alpha, sigma), alpha, sigma),
    )


_kept_dream = lru_cache(maxsize=64)(_made_dream)
