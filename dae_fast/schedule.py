"""Noise schedules and levels: x_t = alpha * x0 + sigma * eps."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from .backends.reference import coefficients as look_up

# Coefficients of an op from (alpha, sigma): works on floats and on float64 tensors alike.
Coefficients = Callable[[Any, Any], tuple[Any, ...]]
Place = tuple[str, torch.dtype, torch.device]  # of a table in a schedule's cache


class Rows(NamedTuple):
    """Coefficients of a batch: row b is table[t[b]], or without t table[b], or table[0] when there is one."""

    table: Tensor
    t: Tensor | None


@contextmanager
def _outside_modes() -> Iterator[None]:
    """What is cached must be a plain tensor, whatever traces, transforms or infers around the call."""
    with (
        torch.inference_mode(False),
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
    ):
        yield


@lru_cache(maxsize=16)
def _constant_rows(columns: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Rows:
    with _outside_modes():
        table = torch.tensor([columns], dtype=torch.float64).to(dtype)
        if not table.isfinite().all():
            raise ValueError(f"coefficients must be finite in {dtype}, got {columns}")
        return Rows(table.to(device), None)


def stack_rows(op: str, columns: tuple[Any, ...], x: Tensor, dtype: torch.dtype) -> Rows:
    """Rows from columns that are floats, () tensors or (B,) tensors, worked out in float64."""
    if not any(isinstance(c, Tensor) for c in columns) and not torch.compiler.is_compiling():
        try:
            return _constant_rows(columns, dtype, x.device)
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None
    # As a factor, a float that changes is an input of a compiled graph; in torch.tensor it is a constant.
    one = torch.ones((), dtype=torch.float64, device=x.device)
    wide = [c.double() if isinstance(c, Tensor) else one * c for c in columns]
    return Rows(torch.stack(torch.broadcast_tensors(*wide), -1).reshape(-1, len(columns)).to(dtype), None)


def check_per_sample(op: str, name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number (returned as a float), a () tensor, or one entry per sample."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating, got {value.dtype}")
        if value.dim() and value.shape != x.shape[:1]:
            raise ValueError(
                f"{op}: {name} must be a float or have shape ({x.shape[0]},), one per sample, got {tuple(value.shape)}"
            )
        if value.device != x.device:
            raise ValueError(f"{op}: {name} must be on {x.device} like the samples, got {value.device}")
        return value
    return _number(op, name, value)


def _number(op: str, name: str, value: Any) -> float:
    """int, float or a numpy scalar."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a float or a tensor, got {type(value).__name__}")
    return float(value)


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
    Raises TypeError for anything else and ValueError for values that are negative, infinite or NaN
    (looked at on the CPU alone).
    """

    __slots__ = ("_alpha", "_schedule", "_sigma", "_t")

    def __init__(self, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> None:
        self._alpha = _checked("alpha", alpha)
        self._sigma = _checked("sigma", sigma)
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
        """The factor of the data: as given, or looked up: a float, or (B,) fp32 on t's device."""
        return self._alpha if self._schedule is None else self._schedule._gather("alpha", self._t)

    @property
    def sigma(self) -> float | Tensor:
        """The factor of the noise, as alpha."""
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
            table = table_of(self._schedule, op, key, coefficients, dtype, x.device)
            t = self._t
            if isinstance(t, int):
                return Rows(table[t : t + 1], None)
            self._check(op, x)
            return Rows(table, t.contiguous())
        alpha, sigma = self._alpha, self._sigma
        if not isinstance(alpha, Tensor) and not isinstance(sigma, Tensor):
            try:
                return stack_rows(op, coefficients(alpha, sigma), x, dtype)
            except (ZeroDivisionError, ValueError):
                raise ValueError(singular(op, f"alpha = {alpha}, sigma = {sigma}")) from None
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
                raise ValueError(singular(op, f"sample {b}, alpha = {a}, sigma = {s}"))
            return rows
        return Rows(torch.where(torch.isinf(rows.table), torch.nan, rows.table), None)

    def __repr__(self) -> str:
        if self._schedule is None:
            return f"Level(alpha={self._alpha}, sigma={self._sigma})"
        return f"{self._schedule!r}[{self._t}]"


def _checked(name: str, value: float | Tensor) -> float | Tensor:
    """Of a Level: a number or a floating tensor () or (B,), finite and not negative."""
    if not isinstance(value, Tensor):
        value = _number("Level", name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"Level: {name} must be finite and not negative, got {value}")
    elif not value.is_floating_point() or value.dim() > 1:
        raise ValueError(
            f"Level: {name} must be a float or a floating tensor () or (B,), got {value.dtype} of {tuple(value.shape)}"
        )
    elif can_read(value):
        good = (value >= 0) & (value < math.inf)
        if not good.all():
            b = int((~good).reshape(-1).nonzero()[0, 0])
            raise ValueError(
                f"Level: {name} must be finite and not negative, got {float(value.reshape(-1)[b])} for sample {b}"
            )
    return value


def singular(op: str, where: str) -> str:
    return (
        f"{op}: has no finite value at {where}; x0 from eps needs alpha > 0, eps or score from x0 need sigma > 0: "
        "use predict='v', which is defined everywhere, or leave that level out"
    )


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


def table_of(
    schedule: Schedule, op: str, key: str, coefficients: Coefficients, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(T, K), made once. Raises ValueError where a level has no finite coefficients."""
    place = (key, dtype, device)
    if torch.compiler.is_dynamo_compiling():
        name = f"{key} {dtype} {device}".replace(".", " ")  # Dynamo takes a dot for a path
        _make_table(schedule, op, place, name, coefficients)
        return getattr(schedule._traced, name)
    table = schedule._tables.get(place)
    if table is None:
        _make_table(schedule, op, place, "", coefficients)
        table = schedule._tables[place]
    return table


# Run, not traced: torch.compile then finds the table as an attribute, an input of its graph. An entry
# that a dict gained while tracing it would not see.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_table(schedule: Schedule, op: str, place: Place, name: str, coefficients: Coefficients) -> None:
    if place not in schedule._tables:
        schedule._tables[place] = _build_table(schedule, op, place, coefficients)
    if name:
        setattr(schedule._traced, name, schedule._tables[place])


def _build_table(schedule: Schedule, op: str, place: Place, coefficients: Coefficients) -> Tensor:
    with _outside_modes():
        columns = coefficients(schedule.alpha, schedule.sigma)
        wide = [c if isinstance(c, Tensor) else torch.full_like(schedule.alpha, c) for c in columns]
        _, dtype, device = place
        table = torch.stack(wide, -1).to(dtype)
        schedule._require_finite(op, table, range(len(schedule)))
        return table.to(device)


def _levels(name: str, T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"Schedule.{name}: T must be a positive int, got {T!r}")
    return T
