"""Noise schedules: x_t = alpha * x0 + sigma * eps at every level t."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .backends.reference import coefficients as look_up
from .level import Level, singular
from .rows import Place, table_of


class Schedule:
    """T levels of noise, level 0 the least: float64 master columns alpha and sigma.

    schedule[t], t an int or an int32/int64 tensor (B,), is a Level. Tables of coefficients are made from
    the masters once per op and device, in float64, and rounded once to float32 (float64 for fp64 samples).
    An int level out of range raises ValueError here; one in a tensor raises it in the op, or on a GPU
    becomes NaN there. Schedule(alpha, sigma) takes columns (T,) of one's own, finite and not negative.
    """

    def __init__(self, alpha: Tensor, sigma: Tensor, *, name: str = "Schedule") -> None:
        for column, values in (("alpha", alpha), ("sigma", sigma)):
            if values.dim() != 1 or values.shape != alpha.shape or not values.numel():
                raise ValueError(f"{name}: {column} must have shape (T,), T > 0, got {tuple(values.shape)}")
            if not (torch.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"{name}: {column} must be finite and not negative")
        self.alpha = alpha.detach().to("cpu", torch.float64, copy=True)
        self.sigma = sigma.detach().to("cpu", torch.float64, copy=True)
        self._name = name
        self._tables: dict[Place, Tensor] = {}
        self._traced = SimpleNamespace()

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Tensor | Sequence[float], *, name: str = "Schedule.from_alpha_bar") -> Schedule:
        """alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar): variance preserving (Ho et al. 2020)."""
        bar = torch.as_tensor(alpha_bar, dtype=torch.float64, device="cpu")
        if not ((bar >= 0) & (bar <= 1)).all():
            raise ValueError(f"{name}: alpha_bar must lie in [0, 1], got values from {bar.min()} to {bar.max()}")
        return cls(bar.sqrt(), (1 - bar).sqrt(), name=name)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], *, name: str = "Schedule.from_betas") -> Schedule:
        """alpha_bar_t = prod_{s<=t} (1 - beta_s) (Ho et al. 2020, eq. 4)."""
        beta = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if not ((beta >= 0) & (beta <= 1)).all():
            raise ValueError(f"{name}: betas must lie in [0, 1], got values from {beta.min()} to {beta.max()}")
        return cls.from_alpha_bar(torch.cumprod(1 - beta, 0), name=name)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """DDPM: betas evenly spaced (Ho et al. 2020, section 4)."""
        name = f"Schedule.linear({_levels('linear', T)}, {beta_start}, {beta_end})"
        return cls.from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64, device="cpu"), name=name)

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """Latent diffusion: square roots of the betas evenly spaced (Rombach et al. 2022)."""
        name = f"Schedule.scaled_linear({_levels('scaled_linear', T)}, {beta_start}, {beta_end})"
        if beta_start < 0 or beta_end < 0:
            raise ValueError(f"{name}: betas must lie in [0, 1]")
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64, device="cpu")
        return cls.from_betas(roots.square(), name=name)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """alpha_bar(t) = cos^2((t/T + s)/(1 + s) * pi/2), betas clipped (Nichol and Dhariwal 2021, eq. 17)."""
        name = f"Schedule.cosine({_levels('cosine', T)}, {s}, {max_beta})"
        u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
        bar = torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta), name=name)

    @classmethod
    def geometric(cls, sigma_min: float = 0.01, sigma_max: float = 1.0, T: int = 10) -> Schedule:
        """NCSN: alpha = 1, sigmas in geometric progression, level T-1 the largest (Song and Ermon 2019)."""
        name = f"Schedule.geometric({sigma_min}, {sigma_max}, {_levels('geometric', T)})"
        if not 0 < sigma_min <= sigma_max < math.inf:
            raise ValueError(f"{name}: needs 0 < sigma_min <= sigma_max")
        sigma = torch.logspace(math.log10(sigma_min), math.log10(sigma_max), T, dtype=torch.float64, device="cpu")
        return cls(torch.ones(T, dtype=torch.float64, device="cpu"), sigma, name=name)

    def zero_terminal_snr(self) -> Schedule:
        """sqrt(alpha_bar) shifted and scaled: the last level is pure noise and the first stays as it is.

        There eps says nothing about x0: predict v (or x0). Raises ValueError for a schedule that is not
        variance preserving or whose last level is not the noisiest. Lin et al. 2024, algorithm 1.
        """
        self._require_variance_preserving("zero_terminal_snr")
        alpha = self.alpha
        if not (alpha[:-1] > alpha[-1]).all() or len(self) < 2:
            raise ValueError(f"{self._name}.zero_terminal_snr: the last level must be the noisiest of two or more")
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        return Schedule.from_alpha_bar(alpha.square(), name=f"{self._name}.zero_terminal_snr()")

    @property
    def variance_preserving(self) -> bool:
        """alpha^2 + sigma^2 = 1 at every level."""
        return bool(((self.alpha.square() + self.sigma.square() - 1).abs() < 1e-9).all())

    def _require_variance_preserving(self, what: str) -> None:
        if not self.variance_preserving:
            raise ValueError(f"{self._name}.{what}: defined for variance-preserving schedules only")

    @property
    def alpha_bar(self) -> Tensor:
        """(T,) float64, alpha^2."""
        return self.alpha.square()

    @property
    def betas(self) -> Tensor:
        """(T,) float64, 1 - alpha_bar_t / alpha_bar_{t-1} with alpha_bar_{-1} = 1."""
        self._require_variance_preserving("betas")
        bar = self.alpha_bar
        return 1 - bar / torch.cat((torch.ones(1, dtype=torch.float64, device="cpu"), bar[:-1]))

    @property
    def snr(self) -> Tensor:
        """(T,) float64, (alpha / sigma)^2; infinite where sigma = 0."""
        return (self.alpha / self.sigma).square()

    def __len__(self) -> int:
        return self.alpha.shape[0]

    def __getitem__(self, t: int | Tensor) -> Level:
        if isinstance(t, Tensor):
            if t.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{self._name}: t must be int32 or int64, got {t.dtype}")
            if t.dim() != 1:
                raise ValueError(f"{self._name}: t must have shape (B,), got {tuple(t.shape)}")
        elif isinstance(t, numbers.Integral) and not isinstance(t, bool):
            t = int(t)
            if not 0 <= t < len(self):
                raise ValueError(f"{self._name}: level must be in [0, {len(self)}), got {t}")
        else:
            raise TypeError(f"{self._name}: t must be an int or an integer tensor (B,), got {type(t).__name__}")
        return Level._of(self, t)

    def __iter__(self) -> Iterator[Level]:
        return (self[t] for t in range(len(self)))

    def __reduce__(self) -> Any:
        return partial(Schedule, name=self._name), (self.alpha, self.sigma)

    def __repr__(self) -> str:
        return self._name

    def _require_finite(self, op: str, table: Tensor, levels: Sequence[int]) -> None:
        """Row i of the table belongs to levels[i]."""
        for i in (~table.isfinite().all(1)).nonzero()[:1, 0].tolist():
            t = levels[i]
            where = f"level {t} of {self}, alpha = {float(self.alpha[t])}, sigma = {float(self.sigma[t])}"
            raise ValueError(singular(op, where))

    def _gather(self, column: str, t: int | Tensor) -> float | Tensor:
        values: Tensor = getattr(self, column)
        if isinstance(t, int):
            return float(values[t])
        op = f"Level.{column}"
        table = table_of(self, op, column, lambda a, s: (a if column == "alpha" else s,), torch.float32, t.device)
        return look_up(table, t, op)[:, 0]


def _levels(name: str, T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"Schedule.{name}: T must be a positive int, got {T!r}")
    return T
