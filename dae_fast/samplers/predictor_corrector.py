"""Predictor-corrector sampling: a step of the reverse SDE, then Langevin steps at the level it comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..coefficients import stack_rows
from ..kernels.spec import ABSENT, Coefficients, Residual, compute_dtype, loss_of, map_of
from ..noise import Noise
from ..ops.parameterisation import conversion
from ..primitives.residuals import sample_means
from ..primitives.sums import affine
from ..schedule import Schedule
from .base import More, Sampler, Walk
from .steps import Place, Step, forward_variance, implicit_step, in_order, posterior_std
from .x0_clip import X0Clip

PREDICTORS = "reverse_diffusion", "ancestral"
NORMS = "sample", "batch"


@dataclass(eq=False, repr=False, kw_only=True)
class PredictorCorrector(Sampler):
    """Song et al. 2021: from each level a predictor's step, and at the next `corrector_steps` of Langevin.

    steps: None is one per level; `levels`, as they are read, have the correctors' looks before the predictor's
    predictor: from t to s, with f = alpha_t/alpha_s and v = sigma_t^2 - f^2 sigma_s^2, "reverse_diffusion",
        (2 - f) x + v * score + sqrt(v) z, or "ancestral", DDPM's step with its small variance
    corrector_steps: >= 0, each x + h * score + sqrt(2h) z with h = 2 f^2 (snr * |z| / |score|)^2, f that of the
        predictor's next step: f^2 is the paper's alpha_i, 1 - beta_i of a variance-preserving schedule and 1 of a
        variance-exploding one
    snr: >= 0, the paper's r
    norm: "sample" takes |z| and |score| of each sample, so that what it becomes depends on its own noise alone,
        however the batch is cut; "batch" takes their means over the batch, as the paper's code does, which suits
        samples of few elements: there one sample's |z| says little, and h varies with it
    noise: the predictor from level t uses noise.fold_in(t), corrector k at level t
        noise.fold_in(T + 1 + t * corrector_steps + k)
    Other arguments and the errors as in Sampler. The last predictor's step is x0_hat.
    |z| comes from a pass that makes the noise again and reads nothing, |score| from one over the prediction; h stays
    on the device. Where the score vanishes h is 0. Under guidance the corrector combines the predictions, and with
    limits of x0 it makes the limited eps, in a launch of its own. Algorithms 2 to 5; the step size: appendix G.
    """

    op: ClassVar[str] = "predictor_corrector"
    checks: ClassVar = {"predictor": checks.one_of(*PREDICTORS), "norm": checks.one_of(*NORMS)}

    predictor: str = "reverse_diffusion"
    corrector_steps: int = 1
    snr: float = 0.16
    norm: str = "sample"

    def coefficients(self, t: Place, s: Place) -> Step:
        return (
            reverse_diffusion(t, s) if self.predictor == "reverse_diffusion" else implicit_step(s, posterior_std(t, s))
        )

    def walk(self, schedule: Schedule) -> Walk:
        chosen, K, T = self._grid(schedule), self.corrector_steps, len(schedule)
        N, level = len(chosen), Place(schedule.alpha[chosen], schedule.sigma[chosen])
        # There is no corrector at the first level, which may be pure noise.
        order = [0, *(k for i in range(1, N) for k in (*[N + i] * K, i))]
        places = [k % N for k in order]
        to_eps = Step(eps=torch.ones(N, dtype=torch.float64))
        tags = [chosen[0]]
        for t in chosen[1:]:
            tags += [*(T + 1 + t * K + k for k in range(K)), t]
        told = self._told(schedule, chosen)
        return Walk(
            tuple(chosen[k] for k in places),
            level.at(places),
            tuple(told[k] for k in places),
            in_order((self.coefficients(level, self._after(schedule, level)), to_eps), order),
            tags=tuple(tags),
        )

    def _corrects(self, i: int) -> bool:
        K = self.corrector_steps
        return i > 0 and (i - 1) % (K + 1) < K

    def _is_gaussian(self, i: int) -> bool:
        return not self._corrects(i)  # whose step size is by the size of the noise

    def _is_one_launch(self) -> bool:
        return self.corrector_steps == 0

    def _more(self, schedule: Schedule, walk: Walk) -> More | None:
        """Of the correctors 1, q_x/q_p, -1, 2 (f snr / q_p)^2, q_x and q_p, score = q_x * x + q_p * what is read."""
        if not self.corrector_steps:
            return None
        corrects = [i for i in range(len(walk.levels)) if self._corrects(i)]
        predictors = [i for i in range(len(walk.levels)) if not self._corrects(i)]
        level = walk.at.at(predictors)
        f = (level.alpha / self._after(schedule, level).alpha)[1:].repeat_interleave(self.corrector_steps)
        at = walk.at.at(corrects)
        kind = self.predict if self._clip == X0Clip() else "eps"
        q_x, q_p = (torch.as_tensor(c, dtype=torch.float64).expand_as(at.alpha) for c in conversion(kind, "score")(*at))
        one = torch.ones_like(at.alpha)
        sizes = torch.stack((one, q_x / q_p, -one, 2 * (f * self.snr / q_p).square(), q_x, q_p), 1)
        made = sizes.new_zeros(len(walk.levels), 6)
        made[corrects] = sizes
        return More(made, [bool((q_x != 0).any())])

    def _extra(self) -> object:
        return self.corrector_steps, self.norm, self._reads_x()

    def _reads_x(self) -> bool:
        return bool(self._plan.facts and self._plan.facts[0])

    def _advance(
        self,
        i: int,
        x: Tensor,
        prediction: tuple[Tensor, ...],
        noise: Any,
        history: tuple[Tensor, ...],
        table: Tensor,
        wants_x0: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        if not self._corrects(i):
            return super()._advance(i, x, prediction, noise, history, table, wants_x0)
        launches = self._plan.launches
        x0 = launches(table, i, x, prediction, None, (), "x0")[1] if wants_x0 else None
        if launches.bounds is not None:
            (pred,) = launches(table, i, x, prediction, None)
        else:
            pred = launches.combined(table, i, prediction)
        row = launches.first_row(i)
        return self._langevin(x, pred, self._drawn(i, noise, x), table[row : row + 1, -6:]), (), x0

    def _langevin(self, x: Tensor, pred: Tensor, noise: Noise | Tensor, row: Tensor) -> Tensor:
        """x + h * score + sqrt(2h) z, score = q_x * x + q_p * pred and h = scale * |z|^2 / |score / q_p|^2.

        row: (1, 6): the first three weigh the residuals pred + q_x/q_p * x and 0 - z, whose mean squares are the two
        norms over the number of elements.
        """
        op, weights = self.op, Coefficients(row[:, :3], None)
        z, drawn = (noise, None) if isinstance(noise, Tensor) else (None, noise)
        zero = x.new_zeros(()).expand(x.shape)
        of_noise = sample_means(loss_of(op), Residual(zero, None, z, drawn), weights).double()
        of_score = sample_means(
            loss_of(op), Residual(pred, x if self._reads_x() else None, None, None), weights
        ).double()
        if self.norm == "batch":
            of_noise, of_score = (square.sqrt().mean().square() for square in (of_noise, of_score))
        scale, q_x, q_p = row[0, 3:].double().unbind()
        h = torch.where(of_score > 0, scale * of_noise / of_score, 0.0)
        rows = stack_rows(op, (1 + h * q_x, h * q_p, (2 * h).sqrt()), x, compute_dtype(x.dtype))
        return affine(map_of(op, (0, 1, 2, ABSENT)), (x, pred, z, None), drawn, rows)[0]


def reverse_diffusion(t: Place, s: Place) -> Step:
    """(2 - f) x_t + v * score + sqrt(v) z, score = -eps_hat/sigma_t; to a level without noise x0_hat itself."""
    f, v = t.alpha / s.alpha, forward_variance(t, s)
    noisy = s.sigma > 0
    columns = (2 - f, -v / t.sigma, v.sqrt())
    x, eps, noise = (torch.where(noisy, c, 0.0) for c in columns)
    return Step(x, torch.where(noisy, 0.0, s.alpha), eps, noise)
