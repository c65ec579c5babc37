"""Laws known in closed form, in float64: mixtures of Gaussians and what noise makes of them.

The data are vectors of D elements, the last dimension of a tensor (..., D); x_t = alpha * x0 + sigma * eps.
alpha and sigma are floats, or tensors that broadcast against x without its last dimension.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import dae_fast as df

DIRECTIONS = 16  # of the sliced distance


class Mixture:
    """sum_k weights_k N(means_k, diag stds_k^2): weights (K,), means (K, D), stds (K, D) or (K, 1)."""

    def __init__(self, weights, means, stds):
        self.weights, self.means, stds = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        self.weights = self.weights / self.weights.sum()
        self.stds = stds.expand_as(self.means)

    def sample(self, n: int, seed: int) -> Tensor:
        """(n, D)"""
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=g)
        z = torch.randn(n, self.means.shape[1], generator=g, dtype=torch.float64)
        return self.means[k] + self.stds[k] * z

    def _parts(self, x: Tensor, alpha, sigma) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p(k | x), x's distances from the noised means, their variances and alpha, to broadcast as (..., K, D)."""
        alpha, sigma = (torch.as_tensor(c, dtype=torch.float64)[..., None, None] for c in (alpha, sigma))
        variance = (alpha * self.stds) ** 2 + sigma**2
        away = x.double()[..., None, :] - alpha * self.means
        log_joint = self.weights.log() - 0.5 * (away**2 / variance + variance.log()).sum(-1)
        return log_joint.softmax(-1)[..., None], away, variance, alpha

    def score(self, x: Tensor, alpha, sigma) -> Tensor:
        """grad log p(x_t)"""
        share, away, variance, _ = self._parts(x, alpha, sigma)
        return (share * -away / variance).sum(-2)

    def x0(self, x: Tensor, alpha, sigma) -> Tensor:
        """E[x0 | x_t], by each component's own, so that alpha may be 0."""
        share, away, variance, alpha = self._parts(x, alpha, sigma)
        return (share * (self.means + alpha * self.stds**2 / variance * away)).sum(-2)

    def eps(self, x: Tensor, alpha, sigma) -> Tensor:
        """E[eps | x_t]"""
        return -torch.as_tensor(sigma, dtype=torch.float64)[..., None] * self.score(x, alpha, sigma)

    def v(self, x: Tensor, alpha, sigma) -> Tensor:
        """E[alpha * eps - sigma * x0 | x_t]"""
        a, s = (torch.as_tensor(c, dtype=torch.float64)[..., None] for c in (alpha, sigma))
        return a * self.eps(x, alpha, sigma) - s * self.x0(x, alpha, sigma)

    def flow(self, x: Tensor, alpha, sigma) -> Tensor:
        """E[eps - x0 | x_t]"""
        return self.eps(x, alpha, sigma) - self.x0(x, alpha, sigma)

    def network(self, schedule: df.Schedule, predict: str = "eps"):
        """net(x_t, t) with the best prediction there is, of x's dtype."""
        function = getattr(self, predict)

        def net(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = (c[t].reshape(-1, *[1] * (x.dim() - 2)) for c in (schedule.alpha, schedule.sigma))
            return function(x, alpha, sigma).to(x.dtype)

        return net

    def noised(self, alpha: float, sigma: float) -> Mixture:
        """The law of x_t."""
        return Mixture(
            self.weights.tolist(),
            (alpha * self.means).tolist(),
            ((alpha * self.stds) ** 2 + sigma**2).sqrt().tolist(),
        )

    # How far samples are from the law: the mean over DIRECTIONS of the Wasserstein-1 distance of their projections.
    # A projection of the law is a mixture in one dimension, whose quantiles are known: there is one sample, not two.

    @lru_cache  # noqa: B019  (a handful of laws, as long as the tests)
    def _quantiles(self, n: int) -> tuple[Tensor, Tensor]:
        """Unit vectors (D, R) and, in order, the n middle quantiles of the law's projections on them, (R, n)."""
        D = self.means.shape[1]
        g = torch.Generator().manual_seed(0)
        unit = torch.nn.functional.normalize(torch.randn(D, DIRECTIONS, generator=g, dtype=torch.float64), dim=0)
        mean, std = self.means @ unit, (self.stds**2 @ unit**2).sqrt()  # (K, R)
        p = (np.arange(n) + 0.5) / n
        quantiles = []
        for r in range(DIRECTIONS):
            low, high = (mean[:, r] - 9 * std[:, r]).min(), (mean[:, r] + 9 * std[:, r]).max()
            grid = torch.linspace(float(low), float(high), 4096, dtype=torch.float64)
            below = self.weights @ torch.special.ndtr((grid - mean[:, r : r + 1]) / std[:, r : r + 1])
            quantiles.append(torch.from_numpy(np.interp(p, below.numpy(), grid.numpy())))
        return unit, torch.stack(quantiles)

    def distance(self, x: Tensor) -> float:
        """Of samples (..., D)."""
        x = x.double().reshape(-1, x.shape[-1])
        assert x.isfinite().all()
        unit, quantiles = self._quantiles(len(x))
        return float(((x @ unit).T.sort(1).values - quantiles).abs().mean())

    @lru_cache  # noqa: B019
    def yardstick(self, n: int) -> float:
        """What n exact samples give, on average over 8 draws."""
        return sum(self.distance(self.sample(n, seed)) for seed in range(8)) / 8


class Gaussian(Mixture):
    """N(mean, diag std^2), each a list of D."""

    def __init__(self, mean, std):
        super().__init__([1.0], [mean], [std])

    def flow_map(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """Where the probability-flow ODE leads from x_t at `start` (alpha, sigma): x_t keeps its place in the law.

        The ODE's field is affine, so x - alpha * mean grows as the standard deviation of x_t
        (Song et al. 2021, section 4.3; Karras et al. 2022, appendix B.1).
        """
        (a, s), (a_end, s_end) = start, end
        mean, std = self.means[0], self.stds[0]
        grown = ((a_end * std) ** 2 + s_end**2).sqrt() / ((a * std) ** 2 + s**2).sqrt()
        return a_end * mean + grown * (x.double() - a * mean)

    def denoised(self, x: Tensor, levels: list[tuple[float, float]]) -> Tensor:
        """The exact ODE from the first of `levels` to the last, then E[x0 | x_t] there: a sampler's last step."""
        return self.x0(self.flow_map(x, levels[0], levels[-1]), *levels[-1])


def log_snr_levels(T: int, kind: str, low: float = -4.0, high: float = 4.0) -> df.Schedule:
    """T levels evenly spaced in log(alpha/sigma), from `high` at level 0: as even as a solver's steps can be."""
    half = torch.linspace(high, low, T, dtype=torch.float64)
    if kind == "vp":
        return df.Schedule(torch.sigmoid(2 * half).sqrt(), torch.sigmoid(-2 * half).sqrt(), name="vp")
    if kind == "ve":
        return df.Schedule(torch.ones_like(half), torch.exp(-half), name="ve")
    assert kind == "flow"
    return df.Schedule(torch.sigmoid(half), torch.sigmoid(-half), name="flow")


def order(errors: list[float]) -> list[float]:
    """Of convergence, from errors at T, 2T, 4T ... steps."""
    return [math.log2(a / b) for a, b in pairwise(errors)]
