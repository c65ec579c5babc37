"""ScoreSdeVe's two methods: a predictor, and a corrector whose step size comes from norms that stay on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...noise import Noise
from ...primitives import residual_loss, weighted_sum
from .draws import keyed
from .facts import Facts
from .kinds import Kind
from .sums import Launch, P, Plan, X, Z

CORRECTIONS = 1 << 32  # added to the number of a correction: the predictor's noise is keyed by its level


class ReverseDiffusion(Kind):
    """Song et al. 2021, algorithm 2's predictor, variance exploding."""

    second = "prev_sample_mean"
    output = "SdeVeOutput"
    tables = ("discrete_sigmas",)
    counts = set_first = False
    by_timestep = True

    def columns(self, f: Facts) -> tuple[Any, Any]:
        sigmas = f.tables["discrete_sigmas"]
        return np.ones_like(sigmas), sigmas

    def noise_type(self, output: Tensor, sample: Tensor) -> torch.dtype:
        return sample.dtype

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        _require_timesteps(f)
        t = np.float32(f.timestep(given["timestep"]))
        return (int(t * np.float32(len(f.timesteps) - 1)),)  # in upstream's float32

    def plan(self, f: Facts, *key: Any) -> Plan:
        (i,) = key
        sigmas = f.tables["discrete_sigmas"]
        variance = sigmas[i] ** 2 - (sigmas[i - 1] ** 2 if i > 0 else 0.0)
        mean = X + P * variance
        return Plan((Launch({"prev_sample": mean + Z * np.sqrt(variance), "prev_sample_mean": mean}),), draws=True)


class LangevinCorrection(Kind):
    """The same paper's corrector, x + h*score + sqrt(2h)*z, h = 2 (snr |z|/|score|)^2.

    |z| and |score| are means over the batch, upstream's; with keyed noise of each sample, which then does not depend on
    what it is batched with.
    """

    counts = set_first = False

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        _require_timesteps(f)
        return ()

    def plan(self, f: Facts, *key: Any) -> Plan:
        return Plan((), draws=True)

    def drawn(self, s: Any, given: dict[str, Any]) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        x = given["sample"]
        made: Tensor = randn_tensor(x.shape, layout=x.layout, generator=given["generator"]).to(x.device)
        return made

    def keyed(self, s: Any, given: dict[str, Any], key: tuple[Any, ...]) -> Noise:
        output = given["model_output"]
        return keyed(given["generator"], CORRECTIONS + s._corrections, len(output), output.device)

    def run(self, plan: Plan, streams: dict[str, Any], f: Facts, given: dict[str, Any]) -> None:
        x, score, z = streams["sample"], streams["model_output"], streams["noise"]
        if isinstance(z, Noise):
            zero = score.new_zeros(()).expand(score.shape)
            of_noise = residual_loss(zero, (1.0, z), reduction="none").double()
            of_score = residual_loss(score.detach(), reduction="none").double()
        else:
            of_noise, of_score = (t.flatten(1).double().norm(dim=-1).mean().square() for t in (z, score))
        h = 2 * f.config["snr"] ** 2 * of_noise / of_score
        made = weighted_sum((1.0, x), (h, score), ((2 * h).sqrt(), z))
        streams["prev_sample"] = made

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        s._corrections += 1


def _require_timesteps(f: Facts) -> None:
    if not f.timesteps:
        raise ValueError("`timesteps` is not set: call set_timesteps before a step")


# The pipeline calls both.
SCORE_SDE_VE: dict[str, Kind] = {"step_pred": ReverseDiffusion(), "step_correct": LangevinCorrection()}
