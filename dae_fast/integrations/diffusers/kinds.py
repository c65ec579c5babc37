"""What the kinds of schedulers have in common: how a step is keyed, planned and remembered."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...noise import Noise
from .draws import keyed
from .facts import Facts
from .sums import Plan


class Kind:
    """One method of a scheduler, `step` of most.

    key(): what the coefficients of this call depend on; plan(): the launches of a key, made once
    history(): tensors of earlier steps by name; advance(): keeps what later steps need
    """

    options: ClassVar[tuple[str, ...]] = ()  # arguments of upstream's method that are known here
    second: ClassVar[str | None] = None  # the other output that upstream returns
    casts = ""  # of what upstream's result has the type, where the two differ: "model_output" or "sample"
    counts = True  # whether upstream counts steps, in _step_index
    set_first = True  # whether set_timesteps must have been called
    whole_timesteps = True  # whether an integer is a timestep
    elsewhere_last = False  # whether the last step stands for timesteps that are none of scheduler.timesteps
    by_timestep = False  # whether a level's place is its timestep, an integer
    scales = False  # whether scale_model_input does anything
    output: ClassVar[str | None] = None  # upstream's name of what it returns, where it is not the scheduler's
    tables: ClassVar[tuple[str, ...]] = ()  # attributes that are read besides those that all have

    def not_covered(self, config: Any) -> str | None:
        """Which option of a config has no fused step."""
        return None

    def columns(self, f: Facts) -> tuple[Any, Any]:
        """alpha and sigma of every level, as add_noise uses them."""
        raise NotImplementedError

    def input_sigma(self, s: Any, f: Facts) -> Any:
        """Of the sample that the network is about to see."""
        return f.sigmas[s._step_index]

    def scale(self, f: Facts, sigma: Any) -> Any:
        """What scale_model_input multiplies with."""
        return 1 / np.sqrt(sigma**2 + 1)

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        return (s._step_index,)

    def plan(self, f: Facts, *key: Any) -> Plan:
        raise NotImplementedError

    def noise_type(self, output: Tensor, sample: Tensor) -> torch.dtype:
        """In which upstream has torch draw: another one is other noise."""
        return output.dtype

    def drawn(self, s: Any, given: dict[str, Any]) -> Tensor:
        """By torch, as upstream draws."""
        from diffusers.utils.torch_utils import randn_tensor

        output = given["model_output"]
        dtype = self.noise_type(output, given["sample"])
        made: Tensor = randn_tensor(output.shape, generator=given["generator"], device=output.device, dtype=dtype)
        return made

    def keyed(self, s: Any, given: dict[str, Any], key: tuple[Any, ...]) -> Noise:
        output = given["model_output"]
        return keyed(given["generator"], int(key[0]), len(output), output.device)

    def history(self, s: Any) -> dict[str, Any]:
        return {}

    def run(self, plan: Plan, streams: dict[str, Any], f: Facts, given: dict[str, Any]) -> None:
        for launch in plan.launches:
            launch(streams)

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        if self.counts:
            s._step_index += 1

    def adopt(self, s: Any) -> None:
        """Raises where upstream has left in the middle of a step what is not read here."""

    def release(self, s: Any) -> None:
        """Leaves nothing that upstream cannot read."""


class OfBar(Kind):
    """Levels by alpha_bar, at timesteps that are integers."""

    by_timestep = True

    def columns(self, f: Facts) -> tuple[Any, Any]:
        return np.sqrt(f.bar), np.sqrt(1 - f.bar)


class OfSigma(Kind):
    """Levels by sigma, in steps; x = x0 + sigma*eps."""

    whole_timesteps = False
    set_first = False
    casts = "model_output"
    scales = True

    def columns(self, f: Facts) -> tuple[Any, Any]:
        return np.ones_like(f.sigmas), f.sigmas


class OfSigmaPairs(Kind):
    """Levels by sigma, in steps; x = alpha*x0 + sigma*eps, alpha found from sigma. The last step stands for others."""

    elsewhere_last = True

    def pair(self, config: Any, sigma: Any) -> tuple[Any, Any]:
        if config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        alpha = 1 / np.sqrt(sigma**2 + 1)
        return alpha, sigma * alpha

    def columns(self, f: Facts) -> tuple[Any, Any]:
        return self.pair(f.config, f.sigmas)
