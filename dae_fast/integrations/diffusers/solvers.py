"""Solvers over outputs converted to estimates of x0, or to eps: exponential integrators in log(alpha/sigma)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...noise import Noise
from .facts import Facts, estimate, noise_of
from .kinds import Kind, OfSigmaPairs
from .single import preconditioned, scale_of_preconditioned
from .sums import X0, Launch, Plan, Sum, X, Z

M0, M1, M2, M3 = (Sum({f"m{k}": 1.0}) for k in range(4))  # converted outputs, the newest first
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
        s.lower_order_nums = min(s.lower_order_nums + 1, len(s.model_outputs))
        super().advance(s, made)

    def estimate(self, f: Facts, i: int) -> Sum:
        return estimate(f, *f.pair(i))

    def eps(self, f: Facts, i: int) -> Sum:
        alpha, sigma = f.pair(i)
        return (X - X0 * alpha) / sigma if f.config["thresholding"] else noise_of(f, alpha, sigma)

    def launches(self, f: Facts, i: int, m: Sum, name: str, value: Sum) -> tuple[Any, ...]:
        """Of m0, which is m, which may read the estimate, and of a sum that reads m0: together where that fits."""
        made = f.launches(self.estimate(f, i), {name: value.where("m0", m), "m0": m})
        return made if made[-1].fits else (*f.launches(self.estimate(f, i), {"m0": m}), Launch({name: value}))


class Integrals:
    """What DPM-Solver's formulas weigh with, from level s to t: x, m0, and derivatives of m by log(alpha/sigma)."""

    def __init__(self, f: Facts, t: int, s: int) -> None:
        (a_t, s_t), (a_s, s_s) = f.pair(t), f.pair(s)
        self.h = h = f.log_snr(t) - f.log_snr(s)
        algorithm = f.config["algorithm_type"]
        sde, self.of_x0 = algorithm.startswith("sde"), algorithm.endswith("++")
        times = 2 if sde else 1
        if self.of_x0:
            H = times * h
            self.keep = s_t / s_s * (np.exp(-h) if sde else 1)
            self.gain = -a_t * np.expm1(-H)
            self.of_slope = a_t * (np.expm1(-H) / H + 1)
            half = 0.5 if sde else -0.5  # upstream's sign of the SDE's third order
            self.of_curvature = -a_t * ((np.expm1(-H) + H) / H**2 + half)
            of_noise = s_t * np.sqrt(-np.expm1(-2 * h))
        else:
            self.keep = a_t / a_s
            self.gain = -times * s_t * np.expm1(h)
            self.of_slope = -times * s_t * (np.expm1(h) / h - 1)
            self.of_curvature = -s_t * ((np.expm1(h) - h) / h**2 - 0.5)
            of_noise = s_t * np.sqrt(np.expm1(2 * h))
        self.noise = Z * of_noise if sde else Sum()
        self.draws = sde
        self.of_second = 0.5 * self.gain if f.config["solver_type"] == "midpoint" else self.of_slope


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
        w = Integrals(f, i + 1, i)
        prev = X * w.keep + M0 * w.gain + w.noise
        if order > 1:
            r0 = (f.log_snr(i) - f.log_snr(i - 1)) / w.h
            slope = (M0 - M1) / r0
            if order == 2:
                prev = prev + slope * w.of_second
            else:
                r1 = (f.log_snr(i - 1) - f.log_snr(i - 2)) / w.h
                change = (slope - (M1 - M2) / r1) / (r0 + r1)
                prev = prev + (slope + change * r0) * w.of_slope + change * w.of_curvature
        return Plan(self.launches(f, i, X0 if w.of_x0 else self.eps(f, i), "prev_sample", prev), w.draws)


class EDMDPMSolver(DPMSolver):
    """DPM-Solver++ of a preconditioned network (Karras et al. 2022, table 1), x = x0 + sigma*eps."""

    scales = True

    def noise_type(self, output: Tensor, sample: Tensor) -> torch.dtype:
        return torch.promote_types(output.dtype, sample.dtype)

    def not_covered(self, config: Any) -> str | None:
        if config["prediction_type"] == "sample":
            return "prediction_type='sample'"  # upstream has no formula either
        third = config["algorithm_type"].startswith("sde") and config["solver_order"] == 3
        return "algorithm_type='sde-dpmsolver++' of order 3" if third else None  # nor here

    def pair(self, config: Any, sigma: Any) -> tuple[Any, Any]:
        return np.ones_like(sigma), sigma

    def scale(self, f: Facts, sigma: Any) -> Any:
        return scale_of_preconditioned(f, sigma)

    def estimate(self, f: Facts, i: int) -> Sum:
        return preconditioned(f, X, f.sigmas[i])


class Singlestep(Solver):
    """The same papers' solvers of one step: from a start, of order 1, 2, 3, 1, ..., each order from that start."""

    def not_covered(self, config: Any) -> str | None:
        if config["variance_type"] is not None:
            return f"variance_type={config['variance_type']!r}"
        limited = config["thresholding"] and not config["algorithm_type"].endswith("++")
        return "thresholding of algorithm_type='dpmsolver'" if limited else None  # upstream has no formula either

    def noise_type(self, output: Tensor, sample: Tensor) -> torch.dtype:
        return torch.promote_types(output.dtype, sample.dtype)

    def order(self, s: Any, f: Facts) -> int:
        order: int = s.order_list[s._step_index]
        while order > 1 and s.model_outputs[1 - order] is None:  # a loop that began in the middle
            order -= 1
        return order

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, order = key
        w = Integrals(f, i + 1, i + 1 - order)
        start = X if order == 1 else LAST
        first = (M0, M1, M2)[order - 1]  # the output at the start
        prev = start * w.keep + first * w.gain + w.noise
        if order > 1:
            r0 = (f.log_snr(i) - f.log_snr(i + 1 - order)) / w.h
            slope = (M0 - first) / r0
            if order == 2:
                prev = prev + slope * w.of_second
            elif f.config["solver_type"] == "midpoint":
                prev = prev + slope * w.of_slope
            else:
                r1 = (f.log_snr(i - 1) - f.log_snr(i - 2)) / w.h
                change = (slope - (M1 - M2) / r1) / (r0 - r1)
                prev = prev + (slope - change * r0) * w.of_slope + change * (2 * w.of_curvature)
        return Plan(self.launches(f, i, X0 if w.of_x0 else self.eps(f, i), "prev_sample", prev), w.draws)

    def history(self, s: Any) -> dict[str, Any]:
        return {**super().history(s), "last": s.sample}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        if self.order(s, Facts.of(s)) == 1:
            s.sample = made["sample"]
        shifted(s.model_outputs, made["m0"])
        s._step_index += 1


class DEIS(Solver):
    """Zhang and Chen 2023: eps as a polynomial of log(rho), rho = sigma/alpha, integrated over rho."""

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, order = key
        (a_t, s_t), (a_s, _) = f.pair(i + 1), f.pair(i)
        if order == 1:
            prev = X * (a_t / a_s) - M0 * (s_t * np.expm1(f.log_snr(i + 1) - f.log_snr(i)))
        else:
            nodes = np.array([-f.log_snr(i - k) for k in range(order)])
            weights = _log_integrals(nodes, np.exp(nodes[0]), s_t / a_t)
            prev = X * (a_t / a_s)
            for w, m in zip(weights, (M0, M1, M2), strict=False):
                prev = prev + m * (a_t * w)
        return Plan(self.launches(f, i, self.eps(f, i), "prev_sample", prev))


def _log_integrals(nodes: Any, low: Any, high: Any) -> list[Any]:
    """The integrals over rho of the Lagrange polynomials of log(rho) at `nodes`."""

    def integral(rho: Any, power: int) -> Any:  # of log(rho)^power, by parts
        return rho if power == 0 else rho * np.log(rho) ** power - power * integral(rho, power - 1)

    return lagrange(nodes, [integral(high, k) - integral(low, k) for k in range(len(nodes))])


def lagrange(nodes: Any, moments: list[Any]) -> list[Any]:
    """The integrals of the Lagrange polynomials at `nodes`, from those of the powers."""
    made = []
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        polynomial = np.atleast_1d(np.poly(others)) / np.prod(node - others)  # the highest power first
        made.append(sum(c * moment for c, moment in zip(polynomial[::-1], moments, strict=True)))
    return made


class UniPC(Solver):
    """Zhao et al. 2023: the last step corrected by this step's output, then a step from there."""

    casts = "sample"

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


class SASolver(Solver):
    """Xue et al. 2023: stochastic Adams, the last step corrected with its own noise, then a step with new noise.

    Of x0: x_t = e^(-tau^2 h) (sigma_t/sigma_s) x_s + k alpha_t * sum_i w_i m_i + noise, k = 1 + tau^2, where w_i is the
    integral of e^(ku) by the i-th Lagrange polynomial over u = log(alpha/sigma) below that of t, in [-h, 0].
    """

    casts = "sample"
    by_timestep = True

    def columns(self, f: Facts) -> tuple[Any, Any]:
        return np.sqrt(f.bar), np.sqrt(1 - f.bar)

    def not_covered(self, config: Any) -> str | None:
        if config["variance_type"] is not None:
            return f"variance_type={config['variance_type']!r}"
        limited = config["thresholding"] and config["algorithm_type"] == "noise_prediction"
        return "thresholding of algorithm_type='noise_prediction'" if limited else None  # upstream has no formula

    def key(self, s: Any, f: Facts, given: dict[str, Any]) -> tuple[Any, ...]:
        i, c = s._step_index, f.config
        tau = float(s.tau_func(f.timestep(given["timestep"])))
        corrected = (0, 0.0)
        if i > 0 and s.last_sample is not None:
            corrected = s.this_corrector_order, float(s.tau_func(f.timestep(s.timestep_list[-1])))
        left = len(f.timesteps) - i if c["lower_order_final"] else 4
        s.this_predictor_order = min(c["predictor_order"], left, s.lower_order_nums + 1)
        s.this_corrector_order = min(c["corrector_order"], left + 1, s.lower_order_nums + 2)
        return i, s.this_predictor_order, tau, *corrected

    def plan(self, f: Facts, *key: Any) -> Plan:
        i, order, tau, corrected_order, last_tau = key
        m = X0 if f.config["algorithm_type"] == "data_prediction" else self.eps(f, i)
        if not corrected_order:
            return Plan(self.launches(f, i, m, "prev_sample", self._adams(f, i + 1, i, order, X, Z, tau)), draws=True)
        corrected = self._adams(f, i, i - 1, corrected_order, LAST, Sum(last_noise=1.0), last_tau)
        first = self.launches(f, i, m, "corrected", corrected)
        prev = self._adams(f, i + 1, i, order, Sum(corrected=1.0), Z, tau)
        return Plan((*first, Launch({"prev_sample": prev})), draws=True)

    def _adams(self, f: Facts, t: int, s: int, order: int, x: Sum, noise: Sum, tau: float) -> Sum:
        """From s to t, by the newest `order` outputs: those from s back for the predictor, from t for the corrector."""
        (a_t, s_t), (a_s, s_s) = f.pair(t), f.pair(s)
        h, k = f.log_snr(t) - f.log_snr(s), 1 + tau**2
        of_x0 = f.config["algorithm_type"] == "data_prediction"
        corrects = x is LAST
        nodes = np.array([f.log_snr((t if corrects else s) - j) - f.log_snr(t) for j in range(order)])
        weights = lagrange(nodes, _exponential_moments(k if of_x0 else -1.0, h, order))
        if of_x0 and order == 2:
            change = h**2 / 2 - (h * k - 1 + np.exp(-k * h)) / k**2
            change = change / h if corrects else change / (nodes[0] - nodes[1])
            weights = [weights[0] + change, weights[1] - change]
        if of_x0:
            made = x * (np.exp(-(tau**2) * h) * s_t / s_s) + noise * (s_t * np.sqrt(-np.expm1(-2 * tau**2 * h)))
        else:
            made = x * (a_t / a_s) + noise * (tau * s_t * np.sqrt(np.expm1(2 * h)))
        for w, output in zip(weights, (M0, M1, M2, M3), strict=False):
            made = made + output * (k * a_t * w if of_x0 else -k * s_t * w)
        return made

    def history(self, s: Any) -> dict[str, Any]:
        return {**super().history(s), "last": s.last_sample, "last_noise": s.__dict__.get("last_noise")}

    def advance(self, s: Any, made: dict[str, Any]) -> None:
        s.last_sample, s.last_noise = made.get("corrected", made["sample"]), made["noise"]
        shifted(s.timestep_list, made["timestep"])
        super().advance(s, made)

    def release(self, s: Any) -> None:
        if isinstance(s.__dict__.get("last_noise"), Noise):
            x = s.last_sample
            s.last_noise = s.last_noise.normal(x.shape, dtype=x.dtype, device=x.device)


def _exponential_moments(k: float, h: Any, count: int) -> list[Any]:
    """The integrals of u^n e^(ku) over [-h, 0], by parts."""
    moments = [-np.expm1(-k * h) / k]
    for n in range(1, count):
        moments.append((-((-h) ** n) * np.exp(-k * h) - n * moments[-1]) / k)
    return moments


KINDS: dict[str, Kind] = {
    "DPMSolverMultistepScheduler": DPMSolver(),
    "DPMSolverSinglestepScheduler": Singlestep(),
    "EDMDPMSolverMultistepScheduler": EDMDPMSolver(),
    "DEISMultistepScheduler": DEIS(),
    "UniPCMultistepScheduler": UniPC(),
    "SASolverScheduler": SASolver(),
}
