"""Predictor-corrector sampling: a step of the reverse SDE, then Langevin steps at the level it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..coefficients import stack_rows
from ..continuous import ContinuousSchedule
from ..kernels.spec import ABSENT, Coefficients, Residual, compute_dtype, loss_of, map_of
from ..noise import Noise
from ..ops.conversions import Bounds
from ..ops.parameterisation import OfLevel, Parameterisation, conversion
from ..primitives.residuals import sample_means
from ..primitives.sums import affine
from ..schedule import Schedule
from .common import (
    Limits,
    Look,
    Network,
    Update,
    begin,
    conditions,
    grid,
    limits,
    mix,
    mixed,
    progressed,
    run,
    sampler,
    stepped,
)
from .tables import estimate, following, reverse

PREDICTORS = "reverse_diffusion", "ancestral"
NORMS = "sample", "batch"


@sampler(predictor=checks.one_of(*PREDICTORS), norm=checks.one_of(*NORMS))
def predictor_corrector(
    net: Network,
    x: Tensor | Sequence[int],
    schedule: Schedule | ContinuousSchedule,
    noise: Noise,
    *,
    steps: int | None = None,
    levels: Sequence[int] | None = None,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    norm: str = "sample",
    predict: Parameterisation = "eps",
    conditioning: str | None = None,
    clamp: Bounds | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    net_arguments: Mapping[str, Any] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Tensor:
    """Song et al. 2021: from each level a predictor's step, and at the next `corrector_steps` of Langevin.

    steps: None is one per level
    predictor: from t to s, with f = alpha_t/alpha_s and v = sigma_t^2 - f^2 sigma_s^2, "reverse_diffusion",
        (2 - f) x + v * score + sqrt(v) z, or "ancestral", ddpm's step with its small variance
    corrector_steps: >= 0, each x + h * score + sqrt(2h) z with h = 2 f^2 (snr * |z| / |score|)^2, f that of the
        predictor's next step: f^2 is the paper's alpha_i, 1 - beta_i of a variance-preserving schedule and 1 of a
        variance-exploding one
    snr: >= 0, the paper's r
    norm: "sample" takes |z| and |score| of each sample, so that what it becomes depends on its own noise alone,
        however the batch is cut; "batch" takes their means over the batch, as the paper's code does, which suits
        samples of few elements: there one sample's |z| says little, and h varies with it
    noise: Noise; the predictor from level t uses noise.fold_in(t), corrector k at level t
        noise.fold_in(T + 1 + t * corrector_steps + k)
    Other arguments, the result and the errors as in ddim and ddpm. The last predictor's step is x0_hat.
    |z| comes from a pass that makes the noise again and reads nothing, |score| from one over the prediction; h stays
    on the device. Where the score vanishes h is 0. Under guidance the corrector combines the predictions, and with
    limits of x0 it makes the limited eps, in a launch of its own. Algorithms 2 to 5; the step size: appendix G.
    """
    op = "predictor_corrector"
    schedule = stepped(op, schedule, steps, levels)
    chosen = grid(op, schedule, len(schedule) if steps is None else steps, levels)
    told = conditions(op, schedule, chosen, conditioning)
    limit = limits(op, clamp, threshold)
    alpha, sigma = schedule.alpha[chosen], schedule.sigma[chosen]
    alpha_s, sigma_s = following(alpha, sigma)
    step = _reverse_diffusion if predictor == "reverse_diffusion" else partial(reverse, eta=1.0)
    of_x0 = estimate(op, predict, alpha, sigma)
    predicting = Update(op, of_x0, step(alpha, sigma, alpha_s, sigma_s), guidance=guidance, limits=limit)
    # There is no corrector at the first level, which may be pure noise.
    f, alpha, sigma, of_x0 = (alpha / alpha_s)[1:], alpha[1:], sigma[1:], of_x0[1:]
    limited = limit != Limits()
    kind = "eps" if limited else predict
    to_eps = Update(op, of_x0, _columns(conversion("x0", "eps"), alpha, sigma), guidance=guidance, limits=limit)
    q_x, q_p = _columns(conversion(kind, "score"), alpha, sigma)[:, :2].unbind(1)
    one = torch.ones_like(q_x)
    sizes = torch.stack((one, q_x / q_p, -one, 2 * (f * snr / q_p).square(), q_x, q_p), 1)
    correcting = torch.cat((to_eps.table, sizes, mix(guidance, f)), 1)
    table = torch.cat((predicting.table, torch.nn.functional.pad(correcting, (0, 0, 1, 0))), 1)
    schedule._require_finite(op, table, chosen)
    reads_x = bool((q_x != 0).any())

    def loop(look: Look, x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        parts = table.split([predicting.table.shape[1], correcting.shape[1]], 1)
        of_predictor, of_corrector = (part.contiguous() for part in parts)
        for i, t in enumerate(progressed(chosen, progress, op)):
            for k in range(corrector_steps if i else 0):
                prediction = look(x, told[i], predicting.parts)
                if limited:
                    (pred,) = to_eps(of_corrector[1:], i - 1, x, prediction)
                else:
                    pred = mixed(op, of_corrector[i : i + 1, -2:], prediction)
                fresh = noise.fold_in(len(schedule) + 1 + t * corrector_steps + k)
                x = _langevin(op, x, pred, fresh, of_corrector[i : i + 1, -8:-2], reads_x, norm)
            prediction = look(x, told[i], predicting.parts)
            (x,) = predicting(of_predictor, i, x, prediction, noise=noise.fold_in(t))
        return x

    x = begin(op, x, schedule, noise, chosen, graph)
    options = (*chosen, *told, predicting.options, corrector_steps, norm, reads_x)
    return run(op, net, loop, x, noise, table, options, progress, graph)


def _langevin(op: str, x: Tensor, pred: Tensor, noise: Noise, row: Tensor, reads_x: bool, norm: str) -> Tensor:
    """x + h * score + sqrt(2h) z, score = q_x * x + q_p * pred and h = scale * |z|^2 / |score / q_p|^2.

    row: (1, 6), 1, q_x/q_p, -1, scale, q_x and q_p: the first three weigh the residuals pred + q_x/q_p * x and 0 - z,
    whose mean squares are the two norms over the number of elements.
    """
    weights = Coefficients(row[:, :3], None)
    zero = x.new_zeros(()).expand(x.shape)
    of_noise = sample_means(loss_of(op), Residual(zero, None, None, noise), weights).double()
    of_score = sample_means(loss_of(op), Residual(pred, x if reads_x else None, None, None), weights).double()
    if norm == "batch":
        of_noise, of_score = (square.sqrt().mean().square() for square in (of_noise, of_score))
    scale, q_x, q_p = row[0, 3:].double().unbind()
    h = torch.where(of_score > 0, scale * of_noise / of_score, 0.0)
    rows = stack_rows(op, (1 + h * q_x, h * q_p, (2 * h).sqrt()), x, compute_dtype(x.dtype))
    return affine(map_of(op, (0, 1, 2, ABSENT)), (x, pred, None, None), noise, rows)[0]


def _reverse_diffusion(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """(steps, 3), as `reverse`: (2 - f) x_t + v * score + sqrt(v) z, score = (alpha_t * x0_hat - x_t) / sigma_t^2.

    To a level without noise the step is x0_hat itself.
    """
    f = alpha_t / alpha_s
    v = (sigma_t.square() - (f * sigma_s).square()).clamp(min=0)
    share = v / sigma_t.square()
    step = torch.stack((2 - f - share, alpha_t * share, v.sqrt()), -1)
    zero = torch.zeros_like(alpha_s)
    return torch.where(sigma_s[:, None] > 0, step, torch.stack((zero, alpha_s, zero), -1))


def _columns(coefficients: OfLevel, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(steps, 3) from those of x and a second tensor; none of the noise."""
    of_x, of_second = (torch.as_tensor(c, dtype=alpha.dtype).expand_as(alpha) for c in coefficients(alpha, sigma))
    return torch.stack((of_x, of_second, torch.zeros_like(alpha)), -1)
