"""Steps of two halves, the second of which goes from where the first began; what is kept between stands in `sample`."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...noise import Noise
from .draws import seeded
from .facts import Facts
from .kinds import Kind, OfSigma
from .single import denoised
from .sums import X0, Launch, Plan, Sum, X, Z

KEPT_X0, KEPT_X = Sum(kept_x0=1.0), Sum(kept_sample=1.0)


class Heun(OfSigma):
    """Karras et al. 2022, algorithm 1; every level but the first stands twice in `sigmas`.

    Between its two halves the sample and the estimate are kept: the derivative is (sample - x0)/sigma.
    """

    second = "pred_original_sample"
    casts = ""
    whole_timesteps = True

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        return s._step_index, s.dt is None

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, first = key
        sigma, sigma_next = (f.sigmas[i], f.sigmas[i + 1]) if first else (f.sigmas[i - 1], f.sigmas[i])
        dt = sigma_next - sigma
        if first:
            prev = X + (X - X0) * (dt / sigma)
        else:
            prev = KEPT_X + (KEPT_X - KEPT_X0) * (dt / (2 * sigma)) + (X - X0) * (dt / (2 * sigma_next))
        x0 = denoised(f, X, sigma if first else sigma_next)
        return Plan(f.launches(x0, {"prev_sample": prev, "pred_original_sample": X0}))

    def adopt(self, s: Any) -> None:
        if s.dt is not None:
            raise ValueError("fuse: the scheduler is between the two halves of a step: fuse it after the second")

    def release(self, s: Any) -> None:
        """Between the halves, where upstream keeps a derivative and the length of the step."""
        if s.dt is not None:
            sigma, sigma_next = s.sigmas[s._step_index - 1 : s._step_index + 1]
            s.prev_derivative, s.dt = (s.sample - s.prev_derivative) / sigma, sigma_next - sigma

    def history(self, s: Any) -> dict[str, Any]:
        return {} if s.dt is None else {"kept_sample": s.sample, "kept_x0": s.prev_derivative}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        if s.dt is None:  # upstream's names, which set_timesteps clears
            s.sample, s.prev_derivative, s.dt = made["sample"], made["pred_original_sample"], True
        else:
            s.sample = s.prev_derivative = s.dt = None
        super().advance(s, made)


class TwoHalves(OfSigma):
    """What the others have in common: only the sample is kept."""

    second = "pred_original_sample"
    casts = ""
    whole_timesteps = True

    def not_covered(self, config: Any) -> str | None:
        return "prediction_type='sample'" if config["prediction_type"] == "sample" else None  # upstream neither

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        return s._step_index, s.sample is None

    def history(self, s: Any) -> dict[str, Any]:
        return {"kept_sample": s.sample}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        s.sample = made["sample"] if s.sample is None else None
        super().advance(s, made)


class KDPM2(TwoHalves):
    """Karras et al. 2022's second order as DPM-Solver-2 has it: the derivative of the middle, from the start."""

    tables: ClassVar[tuple[str, ...]] = ("sigmas_interpol",)
    draws = False
    before = 0  # how many places before a step's its middle level stands, in the second half

    def input_sigma(self, s: Any, f: Facts) -> Any:
        i = s._step_index
        return f.sigmas[i] if s.sample is None else f.tables["sigmas_interpol"][i - self.before]

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, first = key
        sigma = f.sigmas[i] if first else f.sigmas[i - 1]
        middle = f.tables["sigmas_interpol"][(i + 1 if first else i) - self.before]
        x0 = denoised(f, X, sigma if first else middle)
        if first:
            prev, noise = X + (X - x0) * ((middle - sigma) / sigma), Sum()
        else:
            sigma_to, noise = self.end(f, i)
            prev = KEPT_X + (X - x0) * ((sigma_to - sigma) / middle)
        draws = self.draws and not first
        return Plan((Launch({"prev_sample": prev + noise, "pred_original_sample": x0}),), draws)

    def end(self, f: Facts, i: int) -> tuple[Any, Sum]:
        """The level that a step comes to, and its noise."""
        return f.sigmas[i], Sum()


class KDPM2Ancestral(KDPM2):
    """The same to sigma_down, and noise of size sigma_up."""

    tables = "sigmas_interpol", "sigmas_up", "sigmas_down"
    before = 1
    draws = True

    def end(self, f: Facts, i: int) -> tuple[Any, Sum]:
        return f.tables["sigmas_down"][i - 1], Z * f.tables["sigmas_up"][i - 1]


class DPMSolverSDE(TwoHalves):
    """k-diffusion's sample_dpmpp_sde: to the geometric mean of two levels, and with its x0 from the start to the end.

    "torch": upstream's Brownian tree, torchsde's. "fused": its increments, keyed, by noise_sampler_seed: a seed of each
    sample or the first's; None: a key from torch's global generator, drawn at the first step.
    """

    options = ("s_noise",)

    def input_sigma(self, s: Any, f: Facts) -> Any:
        i = s._step_index
        return f.sigmas[i] if s.sample is None else np.sqrt(f.sigmas[i - 1] * f.sigmas[i])

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        return *super().key(s, f, given), float(given["s_noise"]), s.noise_source == "fused"

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, first, s_noise, keyed = key
        sigma, sigma_to = (f.sigmas[i], f.sigmas[i + 1]) if first else (f.sigmas[i - 1], f.sigmas[i])
        middle = np.sqrt(sigma * sigma_to)
        x0 = denoised(f, X, sigma if first else middle)
        if sigma_to == 0:
            return Plan((Launch({"prev_sample": x0, "pred_original_sample": x0}),))
        to = middle if first else sigma_to
        up = min(to, np.sqrt(to**2 * (sigma**2 - to**2) / sigma**2))
        keep = np.sqrt(to**2 - up**2) / sigma
        up, start, estimate = up * s_noise, X if first else KEPT_X, x0 * (1 - keep)
        if first or not keyed:
            outputs = {"prev_sample": start * keep + estimate + Z * up, "pred_original_sample": x0}
            return Plan((Launch(outputs),), draws=True)
        # The increment of a whole step is that of its halves.
        of_first, of_second = (up * np.sqrt(part / (sigma - to)) for part in (sigma - middle, middle - to))
        begun = Launch({"begun": start * keep + Sum(first_noise=1.0) * of_first})
        outputs = {"prev_sample": Sum(begun=1.0) + estimate + Z * of_second, "pred_original_sample": x0}
        return Plan((begun, Launch(outputs)), draws=True)

    def drawn(self, s: Any, given: dict[str, Any]) -> Tensor:
        if s.noise_sampler is None:
            upstreams = sys.modules[s.upstream.__module__].BrownianTreeNoiseSampler
            low, high = s.sigmas[s.sigmas > 0].min().item(), s.sigmas.max().item()
            s.noise_sampler = upstreams(given["sample"], low, high, s.noise_sampler_seed)
        i = s._step_index
        first = s.sample is None
        t, t_to = (-s.sigmas[k].log() for k in ((i, i + 1) if first else (i - 1, i)))  # as upstream, in its type
        made: Tensor = s.noise_sampler((-t).exp(), (-(t + (t_to - t) * 0.5 if first else t_to)).exp())
        return made

    def keyed(self, s: Any, given: dict[str, Any], key: tuple[Any, ...]) -> Noise:
        if not isinstance(s.noise_sampler, Noise):  # torchsde's, of a loop that begun with torch's noise
            seed, output = s.noise_sampler_seed, given["model_output"]
            s.noise_sampler = Noise.from_generator() if seed is None else seeded(seed, len(output), output.device)
        made: Noise = s.noise_sampler.fold_in(key[0])
        return made

    def history(self, s: Any) -> dict[str, Any]:
        known = s.noise_sampler
        first_noise = known.fold_in(s._step_index - 1) if isinstance(known, Noise) else None
        return {**super().history(s), "first_noise": first_noise}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        i, sigmas = s._step_index, Facts.of(s).sigmas
        super().advance(s, made)
        if sigmas[i + 1 : i + 2] == 0:
            s.sample = None
        s.mid_point_sigma = None if s.sample is None else torch.tensor(np.sqrt(sigmas[i] * sigmas[i + 1]))

    def release(self, s: Any) -> None:
        if isinstance(s.noise_sampler, Noise):
            s.noise_sampler = None


KINDS: dict[str, Kind] = {
    "HeunDiscreteScheduler": Heun(),
    "KDPM2DiscreteScheduler": KDPM2(),
    "KDPM2AncestralDiscreteScheduler": KDPM2Ancestral(),
    "DPMSolverSDEScheduler": DPMSolverSDE(),
}
