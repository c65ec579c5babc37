"""A score that is known: chains of it need no network, and so no launch for each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..kernels.dispatch import kernels
from ..kernels.spec import Update, compute_dtype
from ..noise import Noise
from ..routing import Route, route

MOST_ELEMENTS = 128  # of a chain that is run in one launch: csrc/chain.h


class GaussianMixture:
    """The score of a mixture of Gaussians with diagonal covariances: grad log sum_k w_k N(x; mean_k, diag std_k^2).

    weights: (K,), positive, of any sum      means: (K, D)      stds: (K, D) or (K,), positive; sequences or tensors
    mixture(x): the score at x (B, ...), D elements a row, fp16/bf16/fp32/fp64: like x
    samplers.langevin takes it as any score. A chain of up to 128 elements in fp32 is then one launch of the native
    kernels for all of its steps, x in registers; with one component it has the bits of the stepped loop.
    Raises ValueError on shapes that do not fit, or numbers that are not positive.
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Sequence[float]] | Tensor,
        stds: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    ) -> None:
        op = "GaussianMixture"
        given = {"weights": weights, "means": means, "stds": stds}
        w, m, s = (checks.float64(op, name, value) for name, value in given.items())
        if w.dim() != 1 or m.dim() != 2 or m.shape[0] != w.shape[0] or not m.numel():
            raise ValueError(f"{op}: weights must be (K,) and means (K, D), got {tuple(w.shape)} and {tuple(m.shape)}")
        if s.shape not in (w.shape, m.shape):
            raise ValueError(f"{op}: stds must have shape {tuple(m.shape)} or {tuple(w.shape)}, got {tuple(s.shape)}")
        if not (bool((w > 0).all()) and bool((s > 0).all())):
            raise ValueError(f"{op}: weights and stds must be positive")
        precisions = (s if s.dim() == 2 else s[:, None].expand_as(m)).square().reciprocal()
        log_weights = w.log() + 0.5 * precisions.log().sum(1)
        self._tables = m, precisions, log_weights  # the last: what of log(w_k N(x; ...)) does not depend on x
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"GaussianMixture(<{' x '.join(map(str, self._tables[0].shape))} means>)"

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(1) if x.dim() > 1 else x[:, None]
        compute = compute_dtype(x.dtype)
        means, precisions, log_weights = self._on(x.device, compute, rows.shape[1])
        away = means - rows.to(compute)[:, None]
        pull = away * precisions
        if len(log_weights) > 1:
            weights = torch.softmax(log_weights - 0.5 * (away * pull).sum(2), 1)
            pull = weights[:, :, None] * pull
        return pull.sum(1).to(x.dtype).reshape(x.shape)

    def _on(self, device: torch.device, dtype: torch.dtype, D: int, width: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Means, precisions and log weights there, the first two filled up to `width` columns with zeros."""
        if self._tables[0].shape[1] != D:
            raise ValueError(f"GaussianMixture: x must have {self._tables[0].shape[1]} elements a row, got {D}")
        key = device, dtype, width
        if key not in self._made:
            more = (0, max(width - D, 0))
            means, precisions = (torch.nn.functional.pad(t, more) for t in self._tables[:2])
            made = tuple(t.to(device=device, dtype=dtype) for t in (means, precisions, self._tables[2]))
            self._made[key] = made[0], made[1], made[2]
        return self._made[key]

    def chain(self, x: Tensor, step: float, spread: float, steps: int, noise: Noise) -> Tensor | None:
        """`steps` updates x + step * score + spread * eps in one launch; None where there is no kernel for that."""
        D = x[0].numel() if x.shape[0] else 0
        width = 4
        while width < D:
            width *= 2
        tables = partial(self._on, x.device, torch.float32, D, width)
        return chained("chain", x, tables, Update(step, spread, steps), noise)


def chained(
    kernel: str,
    x: Tensor,
    score: tuple[float, ...] | Callable[[], tuple[Tensor, ...]],
    update: Update,
    noise: Noise,
) -> Tensor | None:
    """What a backend's chain of that name makes of x; None where it has none.

    score: its numbers, or what makes its tables
    """
    D = x[0].numel() if x.shape[0] else 0
    if x.dtype != torch.float32 or not 0 < D <= MOST_ELEMENTS or not noise._whole_blocks(D):
        return None
    if route("langevin", x, noise._key_tensor, noise._sample) is not Route.DIRECT:
        return None
    module = kernels(x, "langevin")
    if not hasattr(module, kernel):
        return None
    known = score if isinstance(score, tuple) else score()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    getattr(module, kernel)(x.contiguous().view(len(x), D), known, update, noise, out.view(len(x), D))
    return out
