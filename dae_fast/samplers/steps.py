"""The steps of a method as its paper writes them: columns of coefficients, one entry for each look by the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Place(NamedTuple):
    """alpha and sigma (L,) float64 of some levels: x_t = alpha*x0 + sigma*eps; of `step`, numpy's arrays too."""

    alpha: Tensor
    sigma: Tensor

    def to_data(self) -> Place:
        """Of the level after each, the data after the last."""
        return self.to_level(1.0, 0.0)

    def to_level(self, alpha: float, sigma: float) -> Place:
        """Of the level after each, that one after the last."""
        ends = self.alpha.new_tensor([alpha]), self.sigma.new_tensor([sigma])
        return Place(torch.cat((self.alpha[1:], ends[0])), torch.cat((self.sigma[1:], ends[1])))

    def at(self, looks: Sequence[int] | slice) -> Place:
        return Place(self.alpha[looks], self.sigma[looks])


def path_times(levels: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """Of a path of noise at (alpha, sigma): sigma/alpha, as k-diffusion's sigma, or sigma where alpha + sigma = 1."""
    if all(abs(alpha + sigma - 1) < 1e-9 for alpha, sigma in levels):
        return tuple(sigma for _, sigma in levels)
    return tuple(sigma / alpha if alpha else math.inf for alpha, sigma in levels)


class Step(NamedTuple):
    """x_s = x*x_t + x0*x0_hat + eps*eps_hat + noise*z + before[0]*b_1 + before[1]*b_2 + ..., a column (L,) of each.

    before: of what the looks before kept, the latest first
    raw: where x0_hat is limited, eps_hat is what the network says, not the eps that belongs to the limited x0_hat
    """

    x: Tensor | None = None
    x0: Tensor | None = None
    eps: Tensor | None = None
    noise: Tensor | None = None
    before: tuple[Tensor, ...] = ()
    raw: bool = False


def in_order(steps: Sequence[Step], order: Sequence[int]) -> Step:
    """The rows of several steps, one after the other, then in that order."""
    rows = [next(len(c) for c in (step.x, step.x0, step.eps) if c is not None) for step in steps]
    depth = max(len(step.before) for step in steps)

    def joined(columns: Sequence[Tensor | None]) -> Tensor:
        filled = [torch.zeros(n, dtype=torch.float64) if c is None else c for n, c in zip(rows, columns, strict=True)]
        return torch.cat(filled)[list(order)]

    return Step(
        joined([step.x for step in steps]),
        joined([step.x0 for step in steps]),
        joined([step.eps for step in steps]),
        joined([step.noise for step in steps]),
        tuple(joined([step.before[k] if k < len(step.before) else None for step in steps]) for k in range(depth)),
        any(step.raw for step in steps),
    )


# Formulas that several methods share.


def library_of(column: Any) -> Any:
    """Numpy for its arrays, a batch of which takes it 0.3 us an operation where torch takes 2; else torch."""
    return torch if isinstance(column, Tensor) else np


def forward_variance(t: Place, s: Place) -> Tensor:
    """Of q(x_t | x_s), sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2 (Kingma et al. 2021)."""
    return (t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2).clip(min=0)


def posterior_std(t: Place, s: Place) -> Tensor:
    """Of q(x_s | x_t, x0); 0 to or from a level without noise, and to a noisier one."""
    where = library_of(t.sigma).where
    std: Tensor = forward_variance(t, s) ** 0.5 * where((s.sigma > 0) & (t.sigma > 0), s.sigma / t.sigma, 0.0)
    return std


def implicit_step(s: Place, std: Tensor | float = 0.0, noise: Tensor | None = None) -> Step:
    """x_s = alpha_s * x0_hat + sqrt(sigma_s^2 - std^2) * eps_hat + noise * z, the noise of size std unless given.

    The direction eps_hat is kept as far as x_s must have variance sigma_s^2. Song, Meng and Ermon 2021, eq. 12.
    """
    std = torch.as_tensor(std, dtype=torch.float64).expand_as(s.sigma)
    keep = (s.sigma.square() - std.square()).clamp(min=0).sqrt()
    return Step(x0=s.alpha, eps=keep, noise=std if noise is None else noise)


# The variables r, tau in which x/r of a straight path x_t = alpha*x0 + sigma*eps moves at a constant slope: eps
# (Karras et al. 2022), or eps - x0 (Lipman et al. 2023).
STRAIGHT: dict[str, Callable[[Place], tuple[Tensor, Tensor]]] = {
    "eps": lambda t: (t.alpha, t.sigma / t.alpha),
    "flow": lambda t: (t.alpha + t.sigma, t.sigma / (t.alpha + t.sigma)),
}


def corrected_step(slope: str, t: Place, m: Place, s: Place) -> Step:
    """x_s from x_m, where the Euler step from t leads, from the slope there, and from x_t, which was kept.

    With c = (tau_m - tau_t)/(tau_s - tau_t), h = tau_s - tau_t and k the slope, in x/r:
    x_s = x_t + h * ((1 - 1/2c) * k_t + 1/2c * k_m), of second order: Heun for c = 1, midpoint for c = 1/2
    (the two-stage Runge-Kutta family). k_t is not read again: it is (x_m - x_t)/(c*h).
    """
    (r_t, tau_t), (r_m, tau_m), (r_s, tau_s) = (STRAIGHT[slope](place) for place in (t, m, s))
    h = tau_s - tau_t
    c = (tau_m - tau_t) / h
    of_m = (1 - 1 / (2 * c)) / c
    k = r_s * h / (2 * c)
    return Step(
        x=r_s * of_m / r_m,
        x0=-k if slope == "flow" else None,
        eps=k,
        before=(r_s * (1 - of_m) / r_t,),
    )
