"""Steps that read what earlier ones left; kept where upstream keeps it, so that what reads those lists goes on."""

from __future__ import annotations

from typing import Any

import numpy as np

from .facts import Facts
from .kinds import Kind, OfBar, OfSigma
from .single import denoised
from .sums import Launch, P, Plan, Sum, X

M0, M1, M2, M3, M4 = (Sum({f"m{k}": 1.0}) for k in range(5))  # converted outputs, the newest first
LAST = Sum(last=1.0)


class LMS(OfSigma):
    """Linear multistep (k-diffusion's sample_lms): derivatives as a polynomial of sigma, integrated."""

    options = ("order",)
    second = "pred_original_sample"
    casts = ""
    whole_timesteps = True

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        del s.derivatives[: max(0, len(s.derivatives) + 1 - given["order"])]
        return s._step_index, min(s._step_index + 1, given["order"]), len(s.derivatives) + 1

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, order, kept = key
        sigma = f.sigmas[i]
        x0 = denoised(f, X, sigma)
        first = Launch({"pred_original_sample": x0, "m0": (X - x0) / sigma})
        nodes = f.sigmas[i - np.arange(order)]
        prev = X
        for k, node in enumerate(nodes[:kept]):
            others = np.delete(nodes, k)
            whole = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(node - others))
            prev = prev + Sum({f"m{k}": float(np.polyval(whole, f.sigmas[i + 1]) - np.polyval(whole, sigma))})
        return Plan((first, Launch({"prev_sample": prev})))

    def history(self, s: Any) -> dict[str, Any]:
        return {f"m{k}": value for k, value in enumerate(reversed(s.derivatives), 1)}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        s.derivatives.append(made["m0"])
        super().advance(s, made)


class PseudoNumerical(OfBar):
    """Liu et al. 2022, eq. 11: DDIM's step along a combination of outputs."""

    counts = False

    def transfer(self, f: Facts, t: float, s: float, x: Sum, output: Sum) -> Sum:
        a_t, a_s = f.bar[int(t)], f.bar_at(s)
        eps = output
        if f.config["prediction_type"] == "v_prediction":
            eps = output * np.sqrt(a_t) + x * np.sqrt(1 - a_t)
        divisor = a_t * np.sqrt(1 - a_s) + np.sqrt(a_t * (1 - a_t) * a_s)
        return x * np.sqrt(a_s / a_t) - eps * ((a_s - a_t) / divisor)

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        s.counter += 1


class RungeKutta(PseudoNumerical):
    """step_prk: the first three steps, of four outputs each, which are summed in cur_model_output."""

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        t = f.timestep(given["timestep"])
        half = 0 if s.counter % 2 else f.config["num_train_timesteps"] // f.steps // 2
        return int(s.prk_timesteps[s.counter // 4 * 4]), t - half, s.counter % 4, s.cur_sample is not None

    def plan(self, f: Facts, *key: Any) -> Plan:
        t, s, part, has_start = key
        start = LAST if has_start and part else X
        weighed = P * (1 / 6, 1 / 3, 1 / 3, 1 / 6)[part] + (Sum(total=1.0) if part else Sum())
        outputs = {"prev_sample": self.transfer(f, t, s, start, weighed if part == 3 else P)}
        if part < 3:
            outputs["total"] = weighed
        return Plan((Launch(outputs),))

    def history(self, s: Any) -> dict[str, Any]:
        return {"last": s.cur_sample, "total": s.cur_model_output}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        part = s.counter % 4
        if part == 0:
            s.ets.append(made["model_output"])
            s.cur_sample = made["sample"]
        s.cur_model_output = made["total"] if part < 3 else 0
        super().advance(s, made)


# Of the newest output and those before it (Adams-Bashforth), by how many there are.
ADAMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class LinearMultistep(PseudoNumerical):
    """step_plms: the steps after those, or all of them, the first of which is then taken twice."""

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        if not f.config["skip_prk_steps"] and len(s.ets) < 3:
            raise ValueError("step_plms: three steps of step_prk, twelve calls of it, come first")
        t, size = f.timestep(given["timestep"]), f.config["num_train_timesteps"] // f.steps
        if s.counter == 1:  # from the first step's start again
            return t + size, t, min(len(s.ets), 4), True
        return t, t - size, min(len(s.ets) + 1, 4), False

    def plan(self, f: Facts, *key: Any) -> Plan:
        t, s, count, again = key
        if again and count == 1:
            return Plan((Launch({"prev_sample": self.transfer(f, t, s, LAST, (P + M1) / 2)}),))
        output = Sum()
        for c, m in zip(ADAMS[count], (M1, M2, M3, M4) if again else (P, M1, M2, M3), strict=False):
            output = output + m * c
        return Plan((Launch({"prev_sample": self.transfer(f, t, s, X, output)}),))

    def history(self, s: Any) -> dict[str, Any]:
        return {"last": s.cur_sample, **{f"m{k}": value for k, value in enumerate(reversed(s.ets), 1)}}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        if s.counter != 1:
            s.ets = [*s.ets[-3:], made["model_output"]]
        if len(s.ets) == 1:
            s.cur_sample = made["sample"] if s.counter == 0 else None
        super().advance(s, made)


class IPNDM(Kind):
    """Zhang and Chen 2023's iPNDM: the same sums, of outputs v that are converted to eps; x = alpha*x0 + beta*eps."""

    tables = "alphas", "betas"

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        return s._step_index, min(len(s.ets) + 1, 4)

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, count = key
        alphas, betas = f.tables["alphas"], f.tables["betas"]
        m = X * betas[i] + P * alphas[i]
        output = Sum()
        for c, old in zip(ADAMS[count], (m, M1, M2, M3), strict=False):
            output = output + old * c
        x0 = (X - output * betas[i]) / max(alphas[i], 1e-8)
        return Plan((Launch({"prev_sample": x0 * alphas[i + 1] + output * betas[i + 1], "m0": m}),))

    def history(self, s: Any) -> dict[str, Any]:
        return {f"m{k}": value for k, value in enumerate(reversed(s.ets), 1)}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        s.ets = [*s.ets[-3:], made["m0"]]
        super().advance(s, made)


KINDS: dict[str, Kind] = {"LMSDiscreteScheduler": LMS(), "IPNDMScheduler": IPNDM()}
# PNDMScheduler.step chooses between these two methods.
PNDM: dict[str, Kind] = {"step_plms": LinearMultistep(), "step_prk": RungeKutta()}
