"""UniPC: a predictor and a corrector of one form, at one look by the network a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .. import checks
from .base import Sampler
from .steps import Place, Step


@dataclass(eq=False, repr=False, kw_only=True)
class UniPC(Sampler):
    """UniPC in x0_hat: UniP-p from the corrected x, of which the look's own x0_hat made UniC-p.

    order: p in [1, 3], reached step by step; the corrected x is of one order more
    variant: B(h) is "bh1", h, or "bh2", e^h - 1, as in the paper's and diffusers' code, h negative
    corrected_x: without it the steps are UniP's alone
    Correction and prediction are one launch: the corrected x is x plus a sum of x0_hat, the look's own and those kept.
    The last step, to the data, is x0_hat itself, and one from where there is no signal is of first order.
    Other arguments and the errors as in Sampler. Zhao et al. 2023, algorithms 5 to 8.
    """

    op: ClassVar[str] = "unipc"
    checks: ClassVar = {
        "order": lambda op, name, value: checks.integer(op, name, value, 1, 3),
        "variant": checks.one_of("bh1", "bh2"),
        "corrected_x": checks.flag,
    }
    keeps: ClassVar[str] = "x0"

    steps: int | None = 20
    order: int = 2
    variant: str = "bh2"
    corrected_x: bool = True

    def coefficients(self, t: Place, s: Place) -> Step:
        """x_(i+1) = A*c_i + sum_j P_(i+1)j m_(i-j), c_i = x_i + C_i m_i + sum_j (C_ij - P_ij) m_(i-1-j).

        m_i: x0_hat of look i      c_i: the corrected x      P, C: the predictor's and the corrector's weights
        """
        lambdas = (t.alpha / t.sigma).log().tolist()
        end = (s.alpha / s.sigma).log().tolist()
        A = torch.where(s.sigma > 0, s.sigma / t.sigma, 0.0).tolist()
        N, depth = len(lambdas), self.order
        rows = np.zeros((N, depth + 1))  # what multiplies m_i, m_(i-1), ...
        correction = np.zeros(depth + 1)  # of c_i - x_i
        for i in range(N):
            order = self._order_at(i, lambdas, end[i])
            predictor, corrector = self._weights(lambdas, i, end[i], float(s.alpha[i]), order)
            rows[i] = A[i] * correction
            rows[i, : len(predictor)] += predictor
            correction = np.zeros(depth + 1)
            if self.corrected_x and math.isfinite(end[i]) and math.isfinite(lambdas[i]):
                correction[: len(corrector)] = corrector
                correction[1 : len(predictor) + 1] -= predictor
        columns = torch.from_numpy(rows)
        return Step(x=torch.tensor(A, dtype=torch.float64), x0=columns[:, 0], before=tuple(columns[:, 1:].unbind(1)))

    def _order_at(self, i: int, lambdas: list[float], end: float) -> int:
        finite = [math.isfinite(v) for v in lambdas[max(0, i - self.order + 1) : i + 1]]
        return sum(finite) if math.isfinite(end) and all(finite[-1:]) else 1

    def _weights(
        self, lambdas: list[float], i: int, end: float, alpha: float, order: int
    ) -> tuple[list[float], list[float]]:
        """Of m_i, m_(i-1), ...: the predictor's; and of m_(i+1), m_i, ...: the corrector's."""
        if not (math.isfinite(end) and math.isfinite(lambdas[i])):
            return [alpha], []
        h = end - lambdas[i]
        hh = -h
        ratios = [(lambdas[i - k] - lambdas[i]) / h for k in range(1, order)]
        B = hh if self.variant == "bh1" else math.expm1(hh)
        base = math.expm1(hh)
        phi, factorial, b = base / hh - 1, 1, []
        for k in range(1, order + 1):
            b.append(phi * factorial / B)
            factorial *= k + 1
            phi = phi / hh - 1 / factorial
        R = np.array([[r**k for r in [*ratios, 1.0]] for k in range(order)])
        of_predictor = np.array([0.5]) if order == 2 else np.linalg.solve(R[:-1, :-1], b[:-1])
        of_corrector = np.array([0.5]) if order == 1 else np.linalg.solve(R, b)

        def in_m(weights: np.ndarray, nodes: list[float]) -> list[float]:
            """-alpha * (base*m_i + B * sum_k weights_k (m_k - m_i)/nodes_k), of m_i and the m_k."""
            shares = [-alpha * B * float(w) / r for w, r in zip(weights, nodes, strict=True)]
            return [-alpha * base - sum(shares), *shares]

        predictor = in_m(of_predictor[: len(ratios)], ratios)
        of_i, *others = in_m(of_corrector, [*ratios, 1.0])
        return predictor, [others[-1], of_i, *others[:-1]]

    def _goes_up(self) -> bool:
        return True
