"""Steps that need nothing of the steps before, or as Heun's of one: coefficients in the papers' notation."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...primitives import weighted_sum
from .facts import Facts, estimate, noise_of
from .kinds import Kind, OfBar, OfSigma
from .sums import X0, Launch, P, Plan, Sum, X, Z

CHURN = "s_churn", "s_tmin", "s_tmax", "s_noise"


class DDPM(OfBar):
    """Ho et al. 2020, eq. 7, and its variances."""

    second = "pred_original_sample"
    counts = set_first = False

    def not_covered(self, config: Any) -> str | None:
        variance = config["variance_type"]
        return None if variance in ("fixed_small", "fixed_small_log", "fixed_large") else f"variance_type={variance!r}"

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        t = f.timestep(given["timestep"])
        if not (s.custom_timesteps or f.steps):
            return t, t - 1
        place = f.index(t)
        return t, f.timesteps[place + 1] if place + 1 < len(f.timesteps) else -1

    def plan(self, f: Facts, *key: Any) -> Plan:
        t, s = key
        a_t, a_s = f.bar[int(t)], f.bar[int(s)] if s >= 0 else np.float64(1)
        alpha = a_t / a_s
        beta = 1 - alpha
        variance = max(beta * (1 - a_s) / (1 - a_t), 1e-20) if f.config["variance_type"] != "fixed_large" else beta
        mean = X0 * (np.sqrt(a_s) * beta / (1 - a_t)) + X * (np.sqrt(alpha) * (1 - a_s) / (1 - a_t))
        outputs = {"prev_sample": mean + Z * np.sqrt(variance) if t > 0 else mean, "pred_original_sample": X0}
        return Plan(f.launches(estimate(f, np.sqrt(a_t), np.sqrt(1 - a_t)), outputs), draws=t > 0)


class DDIM(OfBar):
    """Song et al. 2021, eq. 12."""

    options = "eta", "use_clipped_model_output"
    second = "pred_original_sample"
    counts = False

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        if given["eta"] > 0 and given["variance_noise"] is not None and given["generator"] is not None:
            raise ValueError("step: give generator or variance_noise, not both")
        return f.timestep(given["timestep"]), float(given["eta"]), bool(given["use_clipped_model_output"])

    def plan(self, f: Facts, *key: Any) -> Plan:
        t, eta, use_clipped = key
        a_t, a_s = f.bar[int(t)], f.bar_at(t - f.config["num_train_timesteps"] // f.steps)
        alpha, sigma = np.sqrt(a_t), np.sqrt(1 - a_t)
        std = eta * np.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        eps = (X - X0 * alpha) / sigma if use_clipped else noise_of(f, alpha, sigma)
        prev = X0 * np.sqrt(a_s) + eps * np.sqrt(1 - a_s - std**2)
        outputs = {"prev_sample": prev + Z * std if eta > 0 else prev, "pred_original_sample": X0}
        return Plan(f.launches(estimate(f, alpha, sigma), outputs), draws=eta > 0)


class LCM(OfBar):
    """Luo et al. 2023: the consistency function, noised again."""

    second = "denoised"

    def noise_type(self, output: Tensor, sample: Tensor) -> torch.dtype:
        return torch.promote_types(output.dtype, sample.dtype)

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        return f.timestep(given["timestep"]), s._step_index

    def plan(self, f: Facts, *key: Any) -> Plan:
        t, i = key
        a_t = f.bar[int(t)]
        a_s = f.bar_at(f.timesteps[i + 1] if i + 1 < len(f.timesteps) else t)
        scaled, of_data = t * f.config["timestep_scaling"], 0.5
        c_skip = of_data**2 / (scaled**2 + of_data**2)
        denoised = X0 * (scaled / np.sqrt(scaled**2 + of_data**2)) + X * c_skip
        last = i == f.steps - 1
        outputs = {
            "prev_sample": denoised if last else denoised * np.sqrt(a_s) + Z * np.sqrt(1 - a_s),
            "denoised": denoised,
        }
        return Plan(f.launches(estimate(f, np.sqrt(a_t), np.sqrt(1 - a_t)), outputs), draws=not last)


class TCD(OfBar):
    """Zheng et al. 2024, strategic stochastic sampling."""

    options = ("eta",)
    second = "pred_noised_sample"

    def noise_type(self, output: Tensor, sample: Tensor) -> torch.dtype:
        return torch.promote_types(output.dtype, sample.dtype)

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        if not 0 <= given["eta"] <= 1:
            raise AssertionError("gamma must be less than or equal to 1.0")  # what upstream raises
        return f.timestep(given["timestep"]), s._step_index, float(given["eta"])

    def plan(self, f: Facts, *key: Any) -> Plan:
        t, i, eta = key
        next_t = f.timesteps[i + 1] if i + 1 < len(f.timesteps) else 0
        a_t, a_next, a_s = f.bar[int(t)], f.bar_at(next_t), f.bar[int(np.floor((1 - eta) * next_t))]
        alpha, sigma = np.sqrt(a_t), np.sqrt(1 - a_t)
        noised = estimate(f, alpha, sigma) * np.sqrt(a_s) + noise_of(f, alpha, sigma) * np.sqrt(1 - a_s)
        draws = eta > 0 and i != f.steps - 1
        prev = noised * np.sqrt(a_next / a_s) + Z * np.sqrt(1 - a_next / a_s) if draws else noised
        return Plan((Launch({"prev_sample": prev, "pred_noised_sample": noised}),), draws)


def denoised(f: Facts, x: Sum, sigma: Any) -> Sum:
    """x0 of what the network predicts, x = x0 + sigma*eps; x may be more than the sample."""
    predicts = f.config["prediction_type"]
    if predicts == "epsilon":
        return x - P * sigma
    if predicts == "v_prediction":
        return P * (-sigma / np.sqrt(sigma**2 + 1)) + x / (sigma**2 + 1)
    return P


class Euler(OfSigma):
    """Karras et al. 2022, algorithm 2 without its second order."""

    options: ClassVar[tuple[str, ...]] = CHURN
    second = "pred_original_sample"

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        return (s._step_index, *(float(given[name]) for name in CHURN))

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, s_churn, s_tmin, s_tmax, s_noise = key
        sigma, sigma_next = f.sigmas[i], f.sigmas[i + 1]
        gamma = min(s_churn / (len(f.sigmas) - 1), np.sqrt(2.0) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (gamma + 1)
        x = X + Z * (s_noise * np.sqrt(sigma_hat**2 - sigma**2)) if gamma > 0 else X
        x0 = self.denoised(f, x, sigma, sigma_hat)
        prev = x + (x - x0) * ((sigma_next - sigma_hat) / sigma_hat)
        return Plan((Launch({"prev_sample": prev, "pred_original_sample": x0}),), draws=gamma > 0)

    def denoised(self, f: Facts, x: Sum, sigma: Any, sigma_hat: Any) -> Sum:
        """Upstream's v is of the level before it is churned."""
        return denoised(f, x, sigma if f.config["prediction_type"] == "v_prediction" else sigma_hat)


class EDMEuler(Euler):
    """The same of a preconditioned network (Karras et al. 2022, table 1), or of an estimate that is given."""

    options = (*CHURN, "pred_original_sample")

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        numbers = (float(given[name]) for name in CHURN)
        return (s._step_index, *numbers, given["pred_original_sample"] is not None)

    def plan(self, f: Facts, *key: Any) -> Plan:
        *numbers, is_given = key
        if not is_given:
            return super().plan(f, *numbers)
        i, *_ = numbers
        ratio = f.sigmas[i + 1] / f.sigmas[i]
        return Plan((Launch({"prev_sample": X * ratio + Sum(given_x0=1.0) * (1 - ratio)}),))

    def run(self, plan: Plan, streams: dict[str, Any], f: Facts, given: dict[str, Any]) -> None:
        if given["pred_original_sample"] is not None:
            streams["given_x0"] = streams["pred_original_sample"] = given["pred_original_sample"]
        super().run(plan, streams, f, given)

    def denoised(self, f: Facts, x: Sum, sigma: Any, sigma_hat: Any) -> Sum:
        return preconditioned(f, x, sigma_hat)

    def scale(self, f: Facts, sigma: Any) -> Any:
        return scale_of_preconditioned(f, sigma)


def preconditioned(f: Facts, x: Sum, sigma: Any) -> Sum:
    """x0 of a preconditioned network (Karras et al. 2022, table 1)."""
    of_data = f.config["sigma_data"]
    total = sigma**2 + of_data**2
    c_out = sigma * of_data / np.sqrt(total)
    return x * (of_data**2 / total) + P * (-c_out if f.config["prediction_type"] == "v_prediction" else c_out)


def scale_of_preconditioned(f: Facts, sigma: Any) -> Any:
    return 1 / np.sqrt(sigma**2 + f.config["sigma_data"] ** 2)


class Consistency(OfSigma):
    """Song et al. 2023, algorithm 1: the consistency function, noised again."""

    casts = ""

    def scale(self, f: Facts, sigma: Any) -> Any:
        return scale_of_preconditioned(f, sigma)

    def plan(self, f: Facts, *key: Any) -> Plan:
        (i,) = key
        c = f.config
        sigma, low, of_data = f.sigmas[i], c["sigma_min"], c["sigma_data"]
        sigma_to = np.clip(f.sigmas[i + 1] if i + 1 < c["num_train_timesteps"] else f.sigmas[-1], low, c["sigma_max"])
        c_skip = of_data**2 / ((sigma - low) ** 2 + of_data**2)
        c_out = (sigma - low) * of_data / np.sqrt(sigma**2 + of_data**2)
        x0, draws = X * c_skip + P * c_out, len(f.timesteps) > 1
        outputs = {"prev_sample": X0 + Z * (c["s_noise"] * np.sqrt(sigma_to**2 - low**2)) if draws else X0}
        if c["clip_denoised"]:
            return Plan((Launch(outputs, x0, 1.0),), draws)
        return Plan((Launch({"prev_sample": outputs["prev_sample"].where("x0", x0)}),), draws)


class EulerAncestral(OfSigma):
    """Euler to sigma_down, and noise of size sigma_up."""

    second = "pred_original_sample"

    def not_covered(self, config: Any) -> str | None:
        return "prediction_type='sample'" if config["prediction_type"] == "sample" else None

    def plan(self, f: Facts, *key: Any) -> Plan:
        (i,) = key
        sigma, sigma_to = f.sigmas[i], f.sigmas[i + 1]
        up = np.sqrt(sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2)
        down = np.sqrt(sigma_to**2 - up**2)
        x0 = denoised(f, X, sigma)
        prev = X + (X - x0) * ((down - sigma) / sigma) + Z * up
        return Plan((Launch({"prev_sample": prev, "pred_original_sample": x0}),), draws=True)


class FlowMatchEuler(OfSigma):
    """x + (sigma_next - sigma)*v, or x0 noised again; per token where each has its own time."""

    options = (*CHURN, "per_token_timesteps")  # upstream reads the last alone

    def noise_type(self, output: Tensor, sample: Tensor) -> torch.dtype:
        return torch.float32

    def columns(self, f: Facts) -> tuple[Any, Any]:
        return 1 - f.sigmas, f.sigmas

    def plan(self, f: Facts, *key: Any) -> Plan:
        (i,) = key
        sigma, sigma_next = f.sigmas[i], f.sigmas[i + 1]
        if not f.config["stochastic_sampling"]:
            return Plan((Launch({"prev_sample": X + P * (sigma_next - sigma)}),))
        prev = (X - P * sigma) * (1 - sigma_next) + Z * sigma_next
        return Plan((Launch({"prev_sample": prev}),), draws=True)

    def run(self, plan: Plan, streams: dict[str, Any], f: Facts, given: dict[str, Any]) -> None:
        if given["per_token_timesteps"] is None:
            super().run(plan, streams, f, given)
            return
        sigma = given["per_token_timesteps"].double() / f.config["num_train_timesteps"]
        sigma_next = _below(f, sigma)
        x = streams["sample"]
        x = x if x.dtype == torch.float64 else x.float()  # what upstream returns
        if plan.draws:
            terms = [(1 - sigma_next, x), ((sigma_next - 1) * sigma, streams["model_output"])]
            terms.append((sigma_next, streams["noise"]))
        else:
            terms = [(torch.ones_like(sigma), x), (sigma - sigma_next, streams["model_output"])]  # upstream's sign
        streams["prev_sample"] = weighted_sum(*terms)


def _below(f: Facts, sigma: Tensor) -> Tensor:
    """The largest of `sigmas` below each sigma, 0 where none is; a margin, as upstream's, for its float32."""
    table = f.on(sigma.device)
    return torch.where(table < (sigma - 1e-6)[..., None], table, 0.0).amax(-1)


KINDS: dict[str, Kind] = {
    "DDPMScheduler": DDPM(),
    "DDIMScheduler": DDIM(),
    "LCMScheduler": LCM(),
    "TCDScheduler": TCD(),
    "EulerDiscreteScheduler": Euler(),
    "EulerAncestralDiscreteScheduler": EulerAncestral(),
    "EDMEulerScheduler": EDMEuler(),
    "CMStochasticIterativeScheduler": Consistency(),
    "FlowMatchEulerDiscreteScheduler": FlowMatchEuler(),
}
