"""Ancestral and implicit sampling: DDPM, DDIM and the Euler ancestral step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..ops.reparameterisation import reparameterise
from ..schedule import Schedule
from .arguments import ONE_OF_LEVELS
from .base import More, Sampler, Walk
from .density import of_learned_variance
from .steps import Place, Step, forward_variance, implicit_step, posterior_std


@dataclass(eq=False, repr=False, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling, one step per level unless `steps` or `levels` says otherwise.

    variance: of the step, "small" (the posterior's), "large" (that of q(x_t | x_s), beta_t), or "learned":
        net returns v in [-1, 1] too, as in Sampler, which interpolates between their logarithms element by element
        (Nichol and Dhariwal 2021, eq. 15); the noise is added by a launch of its own, never stored
    Other arguments and the errors as in Sampler. Ho et al. 2020, algorithm 2.
    """

    op: ClassVar[str] = "ddpm"
    checks: ClassVar = {"variance": checks.one_of("small", "large", "learned"), "schedule": ONE_OF_LEVELS}

    reads_variance: ClassVar[bool] = True

    schedule: Schedule = field(kw_only=False)
    variance: str = "small"

    def coefficients(self, t: Place, s: Place) -> Step:
        small, large = posterior_std(t, s), torch.where(s.sigma > 0, forward_variance(t, s).sqrt(), 0.0)
        return implicit_step(s, small, {"small": small, "large": large, "learned": 0 * small}[self.variance])

    def _more(self, schedule: Schedule, walk: Walk) -> More | None:
        """ln var = (1 + v) ln std_large + (1 - v) ln std_small = middle + half_width * v."""
        if self.variance != "learned":
            return None
        t, s = walk.at, self._after(schedule, walk.at)
        small, large = posterior_std(t, s), forward_variance(t, s).sqrt()
        noisy = small > 0
        middle, half_width = (large * small).log(), (large / small).log()
        columns = [torch.where(noisy, c, 0.0) for c in (middle, half_width)]
        return More(torch.stack(columns, 1), noisy.tolist())

    def _is_one_launch(self) -> bool:
        return self.variance != "learned"

    def _log_density(
        self, i: int, x_t: Tensor, x_s: Tensor, prediction: tuple[Tensor, ...], history: tuple[Tensor, ...]
    ) -> Tensor:
        if self.variance != "learned" or not (self._plan.facts and self._plan.facts[i]):
            return super()._log_density(i, x_t, x_s, prediction, history)
        launches, table = self._plan.launches, self._table(x_t)
        x_t, x_s, *read = (t.to(table.dtype) for t in (x_t, x_s, *prediction))
        (mean,) = launches(table, i, x_t, read[:-1], None, (), "mean")
        return of_learned_variance(x_s, mean, read[-1], *table[launches.first_row(i), -2:])

    def _extra(self) -> object:
        return self.variance

    def _advance(
        self,
        i: int,
        x: Tensor,
        prediction: tuple[Tensor, ...],
        noise: Any,
        history: Any,
        table: Tensor,
        wants_x0: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        if self.variance != "learned":
            return super()._advance(i, x, prediction, noise, history, table, wants_x0)
        x, history, x0 = super()._advance(i, x, prediction[:-1], None, history, table, wants_x0)
        if self._plan.facts and self._plan.facts[i]:
            # The affine map has one factor a sample; here each element has its own.
            middle, half_width = table[self._plan.launches.first_row(i), -2:]
            log_var = torch.addcmul(middle, half_width, prediction[-1])
            x, _ = reparameterise(x, log_var, self._drawn(i, noise, x))
        return x, history, x0


@dataclass(eq=False, repr=False, kw_only=True)
class DDIM(Sampler):
    """Denoising diffusion implicit sampling.

    eta: in [0, 1], 0 is deterministic, 1 is ancestral
    clamp, threshold: of the x0 estimate alone, and the step goes on along the eps that net predicts, as diffusers'
        clip_sample has it. use_clipped_model_output, diffusers' name: along the eps of the limited x0 instead, as
        in Dhariwal and Nichol's code and k-diffusion, and in all other samplers here
    Other arguments and the errors as in Sampler. Song, Meng and Ermon 2021, eq. 12.
    """

    op: ClassVar[str] = "ddim"
    checks: ClassVar = {"eta": checks.real("in [0, 1]")}

    steps: int | None = 50
    eta: float = 0.0
    use_clipped_model_output: bool = False

    def coefficients(self, t: Place, s: Place) -> Step:
        step = implicit_step(s, std=self.eta * posterior_std(t, s))
        return step._replace(raw=not self.use_clipped_model_output)

    def _goes_up(self) -> bool:
        return self.eta == 0


@dataclass(eq=False, repr=False, kw_only=True)
class EulerAncestral(Sampler):
    """Euler ancestral sampling: an Euler step in (x/alpha, sigma/alpha) to sigma_down, then noise of sigma_up.

    sigma_up = min(sigma_s, eta * sigma_s * sqrt(1 - sigma_s^2/sigma_t^2)), sigma_down^2 = sigma_s^2 - sigma_up^2,
    all over alpha; the step is DDIM's, whose eta ends at 1.
    eta: >= 0      noise_scale: >= 0, k-diffusion's s_noise, a factor of the noise added
    Other arguments and the errors as in Sampler. k-diffusion's sample_euler_ancestral (Crowson 2022).
    """

    op: ClassVar[str] = "euler_ancestral"
    checks: ClassVar = {name: checks.real("finite and not negative") for name in ("eta", "noise_scale")}

    steps: int | None = 50
    eta: float = 1.0
    noise_scale: float = 1.0

    def coefficients(self, t: Place, s: Place) -> Step:
        sigma_up = torch.minimum(self.eta * posterior_std(t, s), s.sigma)
        return implicit_step(s, sigma_up, noise=self.noise_scale * sigma_up)
