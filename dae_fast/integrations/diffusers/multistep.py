"""Steps that read what earlier ones left; kept where upstream keeps it, so that what reads those lists goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .facts import Facts, estimate, noise_of
from .kinds import Kind, OfBar, OfSigma, OfSigmaPairs
from .single import denoised
from .sums import X0, Launch, P, Plan, Sum, X, Z

M0, M1, M2, M3, M4 = (Sum({f"m{k}": 1.0}) for k in range(5))  # converted outputs, the newest first
LAST = Sum(last=1.0)
SHORT = 15  # upstream lowers the order at the end of a loop of fewer steps


def shifted(values: list[Any], new: Any) -> None:
    """Upstream's list of a fixed length, the newest last."""
    values[:-1] = values[1:]
    values[-1] = new


class Solver(OfSigmaPairs):
    """A multistep solver over converted outputs: estimates of x0, or eps."""

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        return s._step_index, self.order(s, f)

    def order(self, s: Any, f: Facts) -> int:
        """Of this step: what has been kept, and less at the end."""
        order = f.config["solver_order"]
        left = len(f.timesteps) - s._step_index
        if left == 1 and self.first_at_end(f):
            return 1
        short = f.config["lower_order_final"] and len(f.timesteps) < SHORT
        return min(order, s.lower_order_nums + 1, 2 if left == 2 and short else 3)

    def first_at_end(self, f: Facts) -> bool:
        return bool(f.config["lower_order_final"] and len(f.timesteps) < SHORT)

    def history(self, s: Any) -> dict[str, Any]:
        return {f"m{k}": value for k, value in enumerate(reversed(s.model_outputs), 1)}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        shifted(s.model_outputs, made["m0"])
        s.lower_order_nums = min(s.lower_order_nums + 1, s.config.solver_order)
        super().advance(s, made)

    def planned(self, f: Facts, i: int, m: Sum, prev: Sum, draws: bool = False) -> Plan:
        """Of a sum that reads m0, which is m, and m, which may read the estimate."""
        alpha, sigma = f.pair(i)
        outputs = {"prev_sample": prev.where("m0", m), "m0": m}
        return Plan(f.launches(estimate(f, alpha, sigma), outputs), draws)


class DPMSolver(Solver):
    """Lu et al. 2022 (DPM-Solver, of eps) and 2023 (DPM-Solver++, of x0), orders 1 to 3, and their SDEs."""

    def noise_type(self, output: Tensor, sample: Tensor) -> torch.dtype:
        return torch.float32

    def not_covered(self, config: Any) -> str | None:
        if config["variance_type"] is not None:
            return f"variance_type={config['variance_type']!r}"
        third = config["algorithm_type"] == "sde-dpmsolver" and config["solver_order"] == 3
        return "algorithm_type='sde-dpmsolver' of order 3" if third else None  # upstream has no formula either

    def first_at_end(self, f: Facts) -> bool:
        c = f.config
        return bool(c["euler_at_final"] or c["final_sigmas_type"] == "zero" or super().first_at_end(f))

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, order = key
        c = f.config
        (a_t, s_t), (a_s, s_s) = f.pair(i + 1), f.pair(i)
        h = f.log_snr(i + 1) - f.log_snr(i)
        sde, of_x0 = c["algorithm_type"].startswith("sde"), c["algorithm_type"].endswith("++")
        times = 2 if sde else 1
        if of_x0:
            H = times * h
            keep = s_t / s_s * (np.exp(-h) if sde else 1)
            gain = -a_t * np.expm1(-H)
            of_slope = a_t * (np.expm1(-H) / H + 1)
            half = 0.5 if sde else -0.5  # upstream's sign of the SDE's third order
            of_curvature = -a_t * ((np.expm1(-H) + H) / H**2 + half)
            of_noise = s_t * np.sqrt(-np.expm1(-2 * h))
            m = X0
        else:
            keep = a_t / a_s
            gain = -times * s_t * np.expm1(h)
            of_slope = -times * s_t * (np.expm1(h) / h - 1)
            of_curvature = -s_t * ((np.expm1(h) - h) / h**2 - 0.5)
            of_noise = s_t * np.sqrt(np.expm1(2 * h))
            m = (X - X0 * a_s) / s_s if c["thresholding"] else noise_of(f, a_s, s_s)
        prev = X * keep + M0 * gain
        if order > 1:
            r0 = (f.log_snr(i) - f.log_snr(i - 1)) / h
            slope = (M0 - M1) / r0
            if order == 2:
                prev = prev + slope * (0.5 * gain if c["solver_type"] == "midpoint" else of_slope)
            else:
                r1 = (f.log_snr(i - 1) - f.log_snr(i - 2)) / h
                change = (slope - (M1 - M2) / r1) / (r0 + r1)
                prev = prev + (slope + change * r0) * of_slope + change * of_curvature
        return self.planned(f, i, m, prev + Z * of_noise if sde else prev, draws=sde)


class DEIS(Solver):
    """Zhang and Chen 2023: eps as a polynomial of log(rho), rho = sigma/alpha, integrated over rho."""

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, order = key
        (a_t, s_t), (a_s, s_s) = f.pair(i + 1), f.pair(i)
        if order == 1:
            prev = X * (a_t / a_s) - M0 * (s_t * np.expm1(f.log_snr(i + 1) - f.log_snr(i)))
        else:
            nodes = np.array([-f.log_snr(i - k) for k in range(order)])
            weights = _log_integrals(nodes, np.exp(nodes[0]), s_t / a_t)
            prev = X * (a_t / a_s)
            for w, m in zip(weights, (M0, M1, M2), strict=False):
                prev = prev + m * (a_t * w)
        m = (X - X0 * a_s) / s_s if f.config["thresholding"] else noise_of(f, a_s, s_s)
        return self.planned(f, i, m, prev)


def _log_integrals(nodes: Any, low: Any, high: Any) -> list[Any]:
    """The integrals over rho of the Lagrange polynomials of log(rho) at `nodes`."""

    def integral(rho: Any, power: int) -> Any:  # of log(rho)^power, by parts
        return rho if power == 0 else rho * np.log(rho) ** power - power * integral(rho, power - 1)

    moments = [integral(high, k) - integral(low, k) for k in range(len(nodes))]
    made = []
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        polynomial = np.poly(others) / np.prod(node - others)  # the highest power first
        made.append(sum(c * moment for c, moment in zip(polynomial[::-1], moments, strict=True)))
    return made


class UniPC(Solver):
    """Zhao et al. 2023: the last step corrected by this step's output, then a step from there."""

    def not_covered(self, config: Any) -> str | None:
        if config["solver_p"] is not None:
            return "solver_p"
        return f"solver_order={config['solver_order']}" if config["solver_order"] > 3 else None

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        i = s._step_index
        corrects = i > 0 and i - 1 not in s.disable_corrector and s.last_sample is not None
        order = f.config["solver_order"]
        if f.config["lower_order_final"]:
            order = min(order, len(f.timesteps) - i)
        corrected_order = s.this_order if corrects else 0
        s.this_order = min(order, s.lower_order_nums + 1)
        return i, s.this_order, corrected_order

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, order, corrected_order = key
        alpha, sigma = f.pair(i)
        of_x0 = f.config["predict_x0"]
        x = X
        if corrected_order:
            # The step before began at i - 1, from outputs that are one place older by now.
            x, gain, rho, slopes = self._step(f, i, i - 1, corrected_order, LAST, (M1, M2, M3), corrects=True)
            for r, slope in zip(rho, (*slopes, M0 - M1), strict=True):
                x = x - slope * (gain * r)
        prev, gain, rho, slopes = self._step(f, i + 1, i, order, x, (M0, M1, M2), corrects=False)
        for r, slope in zip(rho, slopes, strict=True):
            prev = prev - slope * (gain * r)
        first = f.launches(estimate(f, alpha, sigma), {"m0": X0}) if of_x0 else ()
        if not of_x0:
            first = (Launch({"m0": noise_of(f, alpha, sigma)}),)
        second = {"prev_sample": prev, "corrected": x} if corrected_order else {"prev_sample": prev}
        return Plan((*first, Launch(second)))

    def _step(
        self, f: Facts, t: int, s: int, order: int, x: Sum, outputs: tuple[Sum, ...], *, corrects: bool
    ) -> tuple[Sum, Any, Any, list[Sum]]:
        """The first-order step from s to t, and what the differences of the outputs are weighed with."""
        (a_t, s_t), (a_s, s_s) = f.pair(t), f.pair(s)
        h = f.log_snr(t) - f.log_snr(s)
        of_x0 = f.config["predict_x0"]
        H = -h if of_x0 else h
        phi = np.expm1(H)
        outer, keep = (a_t, s_t / s_s) if of_x0 else (s_t, a_t / a_s)
        r = [(f.log_snr(s - k) - f.log_snr(s)) / h for k in range(1, order)]
        slopes = [(m - outputs[0]) / r_k for m, r_k in zip(outputs[1:], r, strict=False)]
        B = H if f.config["solver_type"] == "bh1" else phi
        values, factorial, phi_k = [], 1.0, phi / H - 1
        for k in range(1, order + 1):
            values.append(phi_k * factorial / B)
            factorial *= k + 1
            phi_k = phi_k / H - 1 / factorial
        powers = np.array([[r_k**k for r_k in (*r, 1.0)] for k in range(order)])
        if not corrects:
            rho = np.array([0.5]) if order == 2 else np.linalg.solve(powers[:-1, :-1], values[:-1])
        else:
            rho = np.array([0.5]) if order == 1 else np.linalg.solve(powers, values)
        return x * keep - outputs[0] * (outer * phi), outer * B, rho, slopes

    def history(self, s: Any) -> dict[str, Any]:
        return {**super().history(s), "last": s.last_sample}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        s.last_sample = made.get("corrected", made["sample"])
        shifted(s.timestep_list, made["timestep"])
        super().advance(s, made)


class LMS(OfSigma):
    """Linear multistep (k-diffusion's sample_lms): derivatives as a polynomial of sigma, integrated."""

    options = ("order",)
    second = "pred_original_sample"
    casts = False
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


KINDS: dict[str, Kind] = {
    "DPMSolverMultistepScheduler": DPMSolver(),
    "DEISMultistepScheduler": DEIS(),
    "UniPCMultistepScheduler": UniPC(),
    "LMSDiscreteScheduler": LMS(),
}
# PNDMScheduler.step chooses between these two methods.
PNDM: dict[str, Kind] = {"step_prk": RungeKutta(), "step_plms": LinearMultistep()}
