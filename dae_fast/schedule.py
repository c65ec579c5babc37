"""Noise schedules and levels: x_t = alpha * x0 + sigma * eps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Coefficients of an op from (alpha, sigma): works on floats and on float64 tensors alike.
Coefficients = Callable[[Any, Any], tuple[Any, ...]]


class Rows(NamedTuple):
    """Coefficients of a batch: row b is table[t[b]], or without t table[b], or table[0] when there is one."""

    table: Tensor
    t: Tensor | None


@lru_cache(maxsize=4096)
def _constant_rows(columns: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    return Rows(torch.tensor([columns], dtype=torch.float64).to(device, dtype), None)


def stack_rows(op: str, columns: tuple[Any, ...], x: Tensor, dtype: torch.dtype) -> Rows:
    """Rows from columns that are floats, () tensors or (B,) tensors, worked out in float64."""
    tensors = [c for c in columns if isinstance(c, Tensor)]
    if not tensors:
        if torch.compiler.is_compiling():
            return Rows(torch.tensor([columns], dtype=torch.float64).to(x.device, dtype), None)
        return _constant_rows(columns, dtype, x.device)
    B = max((c.shape[0] for c in tensors if c.dim()), default=1)
    wide = [
        (c if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float64, device=x.device)).double().expand(B)
        for c in columns
    ]
    return Rows(torch.stack(wide, -1).to(dtype), None)


def check_per_sample(op: str, name: str, value: float | Tensor, x: Tensor) -> None:
    """A float, a () tensor, or one entry per sample."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating, got {value.dtype}")
        if value.dim() and value.shape != x.shape[:1]:
            raise ValueError(
                f"{op}: {name} must be a float or have shape ({x.shape[0]},), one per sample, got {tuple(value.shape)}"
            )
        if value.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like the samples, got {value.device}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a float or a tensor, got {type(value).__name__}")


def can_read(value: Tensor) -> bool:
    """Whether looking at the values costs nothing: on the CPU, outside tracing and transforms."""
    return (
        value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class Level:
    """The pair (alpha, sigma) of each sample: x_t = alpha * x0 + sigma * eps.

    alpha, sigma: floats, or tensors () or (B,); gradients reach tensors that require them. A classical
    denoising autoencoder is Level(alpha=1.0, sigma=0.5). `schedule[t]` makes the other kind, a lazy
    look-up: nothing is computed until an op needs it.
    """

    __slots__ = ("_alpha", "_schedule", "_sigma", "_t")

    def __init__(self, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> None:
        for name, value in (("alpha", alpha), ("sigma", sigma)):
            if isinstance(value, Tensor):
                if not value.is_floating_point() or value.dim() > 1:
                    raise ValueError(
                        f"Level: {name} must be a float or a floating tensor () or (B,), "
                        f"got {value.dtype} of {tuple(value.shape)}"
                    )
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Level: {name} must be a float or a tensor, got {type(value).__name__}")
            elif not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Level: {name} must be finite and not negative, got {value}")
        self._alpha, self._sigma = alpha, sigma
        self._schedule: Schedule | None = None
        self._t: int | Tensor = 0

    @classmethod
    def _of(cls, schedule: Schedule, t: int | Tensor) -> Level:
        level = cls.__new__(cls)
        level._schedule, level._t = schedule, t
        level._alpha = level._sigma = 0.0
        return level

    @property
    def t(self) -> int | Tensor | None:
        """The index into the schedule, or None for a level made by hand."""
        return None if self._schedule is None else self._t

    @property
    def alpha(self) -> float | Tensor:
        return self._alpha if self._schedule is None else self._schedule._gather("alpha", self._t)

    @property
    def sigma(self) -> float | Tensor:
        return self._sigma if self._schedule is None else self._schedule._gather("sigma", self._t)

    def _check(self, op: str, x: Tensor) -> None:
        """An index tensor has one entry per sample, on their device."""
        t = self._t
        if isinstance(t, Tensor):
            if t.shape[0] != x.shape[0]:
                raise ValueError(f"{op}: level must have one entry per sample ({x.shape[0]}), got {t.shape[0]}")
            if t.device != x.device:
                raise ValueError(f"{op}: level must be on {x.device} like the samples, got {t.device}")

    def _rows(self, op: str, key: str, coefficients: Coefficients, x: Tensor, dtype: torch.dtype) -> Rows:
        """The op's coefficients for batch x in `dtype`; `key` names the function in the table cache."""
        if self._schedule is not None:
            table = self._schedule._table(op, key, coefficients, dtype, x.device)
            t = self._t
            if isinstance(t, int):
                return Rows(table[t : t + 1], None)
            self._check(op, x)
            return Rows(table, t.contiguous())
        alpha, sigma = self._alpha, self._sigma
        if not isinstance(alpha, Tensor) and not isinstance(sigma, Tensor):
            try:
                columns = coefficients(float(alpha), float(sigma))
            except ZeroDivisionError:
                raise ValueError(_singular(op, f"alpha = {alpha}, sigma = {sigma}")) from None
            return stack_rows(op, columns, x, dtype)
        check_per_sample(op, "level.alpha", alpha, x)
        check_per_sample(op, "level.sigma", sigma, x)
        wide = [
            v.double() if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64, device=x.device)
            for v in (alpha, sigma)
        ]
        rows = stack_rows(op, coefficients(*wide), x, dtype)
        if can_read(rows.table):
            finite = torch.isfinite(rows.table.detach()).all(1)
            if not finite.all():
                b = int((~finite).nonzero()[0, 0])
                a, s = (float(v.reshape(-1)[b if v.dim() else 0]) for v in wide)
                raise ValueError(_singular(op, f"sample {b}, alpha = {a}, sigma = {s}"))
            return rows
        return Rows(torch.where(torch.isinf(rows.table), torch.nan, rows.table), None)

    def __repr__(self) -> str:
        if self._schedule is None:
            return f"Level(alpha={self._alpha}, sigma={self._sigma})"
        return f"{self._schedule!r}[{self._t}]"


def _singular(op: str, where: str) -> str:
    return (
        f"{op}: has no finite value at {where}; x0 from eps needs alpha > 0, eps or score from x0 need sigma > 0: "
        "use predict='v', which is defined everywhere, or leave that level out"
    )


class Schedule:
    """T levels of noise, level 0 the least: float64 master columns alpha and sigma.

    schedule[t], t an int or an int32/int64 tensor (B,), is a Level. Tables of coefficients are made from
    the masters once per op and device, in float64, and rounded once to float32 (float64 for fp64 samples).
    """

    def __init__(self, alpha: Tensor, sigma: Tensor, *, name: str = "Schedule") -> None:
        for column, values in (("alpha", alpha), ("sigma", sigma)):
            if values.dim() != 1 or values.shape != alpha.shape or not values.numel():
                raise ValueError(f"{name}: {column} must have shape (T,), T > 0, got {tuple(values.shape)}")
            if not (torch.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"{name}: {column} must be finite and not negative")
        self.alpha = alpha.detach().to("cpu", torch.float64)
        self.sigma = sigma.detach().to("cpu", torch.float64)
        self._name = name
        self._tables: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Tensor | list[float], *, name: str = "Schedule.from_alpha_bar") -> Schedule:
        """alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar): variance preserving (Ho et al. 2020)."""
        bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
        if not ((bar >= 0) & (bar <= 1)).all():
            raise ValueError(f"{name}: alpha_bar must lie in [0, 1], got values from {bar.min()} to {bar.max()}")
        return cls(bar.sqrt(), (1 - bar).sqrt(), name=name)

    @classmethod
    def from_betas(cls, betas: Tensor | list[float], *, name: str = "Schedule.from_betas") -> Schedule:
        """alpha_bar_t = prod_{s<=t} (1 - beta_s) (Ho et al. 2020, eq. 4)."""
        beta = torch.as_tensor(betas, dtype=torch.float64)
        if not ((beta >= 0) & (beta <= 1)).all():
            raise ValueError(f"{name}: betas must lie in [0, 1], got values from {beta.min()} to {beta.max()}")
        return cls.from_alpha_bar(torch.cumprod(1 - beta, 0), name=name)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """DDPM: betas evenly spaced (Ho et al. 2020, section 4)."""
        name = f"Schedule.linear({_levels('linear', T)}, {beta_start}, {beta_end})"
        return cls.from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64), name=name)

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """Latent diffusion: square roots of the betas evenly spaced (Rombach et al. 2022)."""
        name = f"Schedule.scaled_linear({_levels('scaled_linear', T)}, {beta_start}, {beta_end})"
        if beta_start < 0 or beta_end < 0:
            raise ValueError(f"{name}: betas must lie in [0, 1]")
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64)
        return cls.from_betas(roots.square(), name=name)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """alpha_bar(t) = cos^2((t/T + s)/(1 + s) * pi/2), betas clipped (Nichol and Dhariwal 2021, eq. 17)."""
        name = f"Schedule.cosine({_levels('cosine', T)}, {s})"
        u = torch.arange(T + 1, dtype=torch.float64) / T
        bar = torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta), name=name)

    @classmethod
    def geometric(cls, sigma_min: float = 0.01, sigma_max: float = 1.0, T: int = 10) -> Schedule:
        """NCSN: alpha = 1, sigmas in geometric progression, level T-1 the largest (Song and Ermon 2019)."""
        name = f"Schedule.geometric({sigma_min}, {sigma_max}, {_levels('geometric', T)})"
        if not 0 < sigma_min <= sigma_max < math.inf:
            raise ValueError(f"{name}: needs 0 < sigma_min <= sigma_max")
        sigma = torch.logspace(math.log10(sigma_min), math.log10(sigma_max), T, dtype=torch.float64)
        return cls(torch.ones(T, dtype=torch.float64), sigma, name=name)

    def zero_terminal_snr(self) -> Schedule:
        """sqrt(alpha_bar) shifted and scaled so that the last level is pure noise (Lin et al. 2024, algorithm 1)."""
        self._require_variance_preserving("zero_terminal_snr")
        alpha = self.alpha
        if len(self) < 2 or alpha[0] == alpha[-1]:
            raise ValueError(f"{self._name}.zero_terminal_snr: needs a first and a last level that differ")
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
        return 1 - bar / torch.cat((torch.ones(1, dtype=torch.float64), bar[:-1]))

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
        elif isinstance(t, int) and not isinstance(t, bool):
            if not 0 <= t < len(self):
                raise ValueError(f"{self._name}: level must be in [0, {len(self)}), got {t}")
        else:
            raise TypeError(f"{self._name}: t must be an int or an integer tensor (B,), got {type(t).__name__}")
        return Level._of(self, t)

    def __repr__(self) -> str:
        return self._name

    def _gather(self, column: str, t: int | Tensor) -> float | Tensor:
        values: Tensor = getattr(self, column)
        if isinstance(t, int):
            return float(values[t])
        return self._table("level", column, lambda a, s: (a if column == "alpha" else s,), torch.float32, t.device)[
            t.long(), 0
        ]

    def _table(self, op: str, key: str, coefficients: Coefficients, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(T, K), made once. Raises ValueError where a level has no finite coefficients."""
        place = (key, dtype, device)
        table = self._tables.get(place)
        if table is None:
            table = self._tables[place] = self._make_table(op, coefficients).to(device, dtype)
        return table

    def _make_table(self, op: str, coefficients: Coefficients) -> Tensor:
        columns = coefficients(self.alpha, self.sigma)
        wide = [c if isinstance(c, Tensor) else torch.full_like(self.alpha, c) for c in columns]
        table = torch.stack(wide, -1)
        finite = torch.isfinite(table).all(1)
        if not finite.all():
            t = int((~finite).nonzero()[0, 0])
            where = f"level {t} of {self._name}, alpha = {float(self.alpha[t])}, sigma = {float(self.sigma[t])}"
            raise ValueError(_singular(op, where))
        return table


def _levels(name: str, T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"Schedule.{name}: T must be a positive int, got {T!r}")
    return T
