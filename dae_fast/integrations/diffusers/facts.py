"""What a scheduler says of itself, in float64 on the host, read once per set_timesteps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sums import Launch, P, Plan, Sum, X

READ = "timesteps", "sigmas", "alphas_cumprod"


def _stamp(scheduler: Any) -> tuple[Any, ...]:
    """What tells whether anything that was read has changed since."""
    tensors = [scheduler.__dict__.get(name) for name in (*READ, *scheduler.kind.tables)]
    versions = [None if t is None or t.is_inference() else t._version for t in tensors]
    others = scheduler.config, scheduler.__dict__.get("final_alpha_cumprod")
    return (*map(id, (*tensors, *others)), *versions, scheduler.__dict__.get("num_inference_steps"))


class Facts:
    """Upstream's own float32 tables, taken as they are: a network was trained on those.

    sigmas, bar (alpha_bar), tables (others that the kind names): float64; timesteps: numbers
    plans: by what a step depends on, made when first asked for
    """

    def __init__(self, scheduler: Any) -> None:
        self.stamp = _stamp(scheduler)
        self.kind = scheduler.kind
        # Kept alive: the stamp has their ids.
        self.tensors = [scheduler.__dict__.get(name) for name in (*READ, *self.kind.tables)]
        timesteps, sigmas, bar, *others = self.tensors
        self.config = scheduler.config
        self.timesteps: list[float] = [] if timesteps is None else timesteps.tolist()
        self.sigmas = _float64(sigmas)
        self.bar = _float64(bar)
        self.tables = {name: _float64(table) for name, table in zip(self.kind.tables, others, strict=True)}
        self.final_bar = np.float64(float(scheduler.__dict__.get("final_alpha_cumprod", 1.0)))
        self.steps = scheduler.__dict__.get("num_inference_steps")
        self.plans: dict[Any, Plan] = {}
        self._sigmas_on: dict[torch.device, Tensor] = {}
        self.levels: dict[Any, Any] = {}  # of add_noise, by kind

    @staticmethod
    def of(scheduler: Any) -> Facts:
        facts: Facts | None = scheduler._facts
        if facts is None or facts.stamp != _stamp(scheduler):
            known, facts = facts, Facts(scheduler)
            if known is not None and facts.contents() == known.contents():  # a pipeline sets timesteps at every call
                facts.plans, facts.levels, facts._sigmas_on = known.plans, known.levels, known._sigmas_on
            scheduler._facts = facts
        return facts

    def contents(self) -> tuple[Any, ...]:
        """What plans are made of."""
        tables = (self.sigmas, self.bar, *self.tables.values())
        return self.timesteps, self.steps, float(self.final_bar), [t.tobytes() for t in tables], dict(self.config)

    def timestep(self, t: Any) -> float:
        """A timestep as a number. One that is a view of `timesteps`, as in a loop over them, is not read from memory:
        its place says what it is, and a GPU is not waited for."""
        if not isinstance(t, Tensor):
            return t
        if t.numel() != 1:
            raise ValueError(f"timestep must be one number, got a tensor of shape {tuple(t.shape)}")
        known = self.tensors[0]
        if known is not None and t.dtype == known.dtype and t.device == known.device and known.is_contiguous():
            place, beside = divmod(t.data_ptr() - known.data_ptr(), known.element_size())
            if not beside and 0 <= place < len(self.timesteps):
                return self.timesteps[place]
        return t.item()

    def index(self, t: Any) -> int:
        """Where a timestep stands; the second place of those that stand twice, as upstream counts."""
        value = self.timestep(t)
        places = [k for k, known in enumerate(self.timesteps) if known == value]
        if not places:
            raise IndexError(f"timestep {value} is none of scheduler.timesteps")
        return places[1] if len(places) > 1 else places[0]

    def on(self, device: torch.device) -> Tensor:
        """`sigmas` in memory there."""
        if device not in self._sigmas_on:
            self._sigmas_on[device] = torch.from_numpy(self.sigmas).to(device)
        return self._sigmas_on[device]

    def bar_at(self, t: float) -> Any:
        """alpha_bar; of the data, final_alpha_cumprod, where t is negative."""
        return self.bar[int(t)] if t >= 0 else self.final_bar

    def pair(self, i: int) -> tuple[Any, Any]:
        """alpha and sigma of the i-th of `sigmas`."""
        alpha, sigma = self.kind.pair(self.config, self.sigmas[i])
        return alpha, sigma

    def log_snr(self, i: int) -> Any:
        """log(alpha/sigma), infinite at the data."""
        alpha, sigma = self.pair(i)
        return np.log(alpha) - np.log(sigma)

    def launches(self, x0: Sum, outputs: dict[str, Sum]) -> tuple[Any, ...]:
        """Of outputs in which the estimate x0 may stand, limited as the config says."""
        if self.config.get("thresholding"):
            return Launch({"x0": x0}), _threshold, Launch(outputs)
        if self.config.get("clip_sample"):
            return (Launch(outputs, x0, float(self.config["clip_sample_range"])),)
        return (Launch({name: made.where("x0", x0) for name, made in outputs.items()}),)


def _threshold(streams: dict[str, Any]) -> None:
    streams["x0"] = streams["threshold"](streams["x0"])


def _float64(table: Tensor | None) -> Any:
    return np.zeros(0) if table is None else table.detach().to("cpu", torch.float64).numpy().copy()


def estimate(f: Facts, alpha: Any, sigma: Any) -> Sum:
    """x0 of what the network predicts, x = alpha*x0 + sigma*eps."""
    return {
        "epsilon": (X - P * sigma) / alpha,
        "sample": P,
        "v_prediction": X * alpha - P * sigma,
        "flow_prediction": X - P * sigma,
    }[f.config["prediction_type"]]


def noise_of(f: Facts, alpha: Any, sigma: Any) -> Sum:
    """eps of what the network predicts."""
    predicts = f.config["prediction_type"]
    if predicts == "epsilon":
        return P
    if predicts == "v_prediction":
        return P * alpha + X * sigma
    return (X - estimate(f, alpha, sigma) * alpha) / sigma
