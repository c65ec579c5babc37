"""Noise schedules: x_t = alpha * x0 + sigma * eps at every level t."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from ._torch import constant_result, saveable
from .checks import Array
from .coefficients import PAIR, Formula, Level, TableKey, formula_of, keep, singular
from .kernels import reference
from .noise import Noise

__all__ = ["Schedule", "TimedSchedule"]

# Levels and times are drawn from a stream of their own, so that they are independent of the noise they scale.
LEVEL_TAG = 0x6C6576656C  # "level"


class Schedule:
    """T levels of noise, level 0 the least: float64 master columns alpha and sigma.

    schedule[t], t an int or an int32/int64 tensor (), (1,), (B,) or, a level for each frame of samples (B, F, ...),
    (B, F), is a Level. Tables of coefficients are made from the masters once per op and device, in float64, and
    rounded once to float32 (float64 for fp64 samples).
    An int level out of range raises ValueError here; one in a tensor raises it in the op, or on a GPU
    becomes NaN there. Numpy's arrays and scalars are taken wherever a schedule takes tensors and numbers.
    Schedule(alpha, sigma) takes columns (T,) of one's own, finite and not negative, the
    noisiest level last: sigma/alpha must not fall from one level to the next.
    times: (T,) float64, the continuous times of the levels where ContinuousSchedule.discretise made them,
    for a network that was trained on those, which samplers and DenoisingLoss then tell it; else None.
    """

    def __init__(
        self,
        alpha: Tensor | Array,
        sigma: Tensor | Array,
        *,
        name: str = "Schedule",
        times: Tensor | Array | None = None,
    ) -> None:
        checks.word("Schedule", "name", name)
        a, s, given = (checks.as_tensor(column) for column in (alpha, sigma, times))
        for column, values in (("alpha", a), ("sigma", s), *([("times", given)] if given is not None else [])):
            check_column(name, column, values)
            if values.shape != a.shape or not values.numel():
                wanted = "(T,), T > 0" if column != "times" else f"{tuple(a.shape)}"
                raise ValueError(f"{name}: {column} must have shape {wanted}, got {tuple(values.shape)}")
            if not (torch.isfinite(values).all() and (column == "times" or (values >= 0).all())):
                wanted = "finite" if column == "times" else "finite and not negative"
                raise ValueError(f"{name}: {column} must be {wanted}")
        self.alpha: Tensor = a.detach().to("cpu", torch.float64, copy=True)
        self.sigma: Tensor = s.detach().to("cpu", torch.float64, copy=True)
        self._times: Tensor | None = None if given is None else given.detach().to("cpu", torch.float64, copy=True)
        self._name = name
        self._tables: dict[TableKey, Tensor] = {}
        self._traced = SimpleNamespace()
        self._of_times = None if self._times is None else _formula_of_times(self._times)
        _check_order(name, self.alpha, self.sigma)
        if self._times is not None and not (self._times[1:] > self._times[:-1]).all():
            raise ValueError(f"{name}: times must increase, the noisiest level last")

    @classmethod
    def from_alpha_bar(
        cls, alpha_bar: Tensor | Array | Sequence[float], *, name: str = "Schedule.from_alpha_bar"
    ) -> Schedule:
        """alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar): variance preserving (Ho et al. 2020)."""
        checks.word("Schedule.from_alpha_bar", "name", name)
        bar = checks.float64(name, "alpha_bar", alpha_bar)
        if not ((bar >= 0) & (bar <= 1)).all():
            raise ValueError(f"{name}: alpha_bar must lie in [0, 1], got values from {bar.min()} to {bar.max()}")
        return cls(bar.sqrt(), (1 - bar).sqrt(), name=name)

    @classmethod
    def from_betas(cls, betas: Tensor | Array | Sequence[float], *, name: str = "Schedule.from_betas") -> Schedule:
        """alpha_bar_t = prod_{s<=t} (1 - beta_s) (Ho et al. 2020, eq. 4)."""
        checks.word("Schedule.from_betas", "name", name)
        beta = checks.float64(name, "betas", betas)
        if not ((beta >= 0) & (beta <= 1)).all():
            raise ValueError(f"{name}: betas must lie in [0, 1], got values from {beta.min()} to {beta.max()}")
        return cls.from_alpha_bar(torch.cumprod(1 - beta, 0), name=name)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """DDPM: betas evenly spaced (Ho et al. 2020, section 4)."""
        beta_start, beta_end = finite_numbers("Schedule.linear", beta_start=beta_start, beta_end=beta_end)
        name = f"Schedule.linear({levels('Schedule.linear', T)}, {beta_start}, {beta_end})"
        return cls.from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64, device="cpu"), name=name)

    @classmethod
    def scaled_linear(cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """Latent diffusion: square roots of the betas evenly spaced (Rombach et al. 2022)."""
        beta_start, beta_end = finite_numbers("Schedule.scaled_linear", beta_start=beta_start, beta_end=beta_end)
        name = f"Schedule.scaled_linear({levels('Schedule.scaled_linear', T)}, {beta_start}, {beta_end})"
        if beta_start < 0 or beta_end < 0:
            raise ValueError(f"{name}: betas must lie in [0, 1]")
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64, device="cpu")
        return cls.from_betas(roots.square(), name=name)

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
        """alpha_bar(t) = cos^2((t/T + s)/(1 + s) * pi/2), betas clipped (Nichol and Dhariwal 2021, eq. 17)."""
        s, max_beta = finite_numbers("Schedule.cosine", s=s, max_beta=max_beta)
        name = f"Schedule.cosine({levels('Schedule.cosine', T)}, {s}, {max_beta})"
        u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
        bar = torch.cos((u + s) / (1 + s) * (math.pi / 2)).square()
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta), name=name)

    @classmethod
    def sigmoid(
        cls, T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
    ) -> Schedule:
        """alpha_bar(u) = (S(end) - S(start + u (end - start))) / (S(end) - S(start)), S(x) = sigmoid(x / tau).

        u = t/T from 0 to 1      start < end      tau: > 0, the smaller the steeper      max_beta: limit of the betas
        Raises ValueError for other values, TypeError for what is no number.
        Jabri, Fleet and Chen 2022; Chen 2023.
        """
        start, end, tau, max_beta = finite_numbers("Schedule.sigmoid", start=start, end=end, tau=tau, max_beta=max_beta)
        name = f"Schedule.sigmoid({levels('Schedule.sigmoid', T)}, {start}, {end}, {tau}, {max_beta})"
        if not (start < end and tau > 0):
            raise ValueError(f"{name}: needs start < end and tau > 0")
        x = (start + (end - start) * torch.arange(T + 1, dtype=torch.float64, device="cpu") / T) / tau
        tail = torch.sigmoid(-x)  # S(end) - S(x) from the complements, which keep their digits near the end
        bar = tail - tail[-1]
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta), name=name)

    @classmethod
    def geometric(cls, T: int = 10, sigma_min: float = 0.01, sigma_max: float = 1.0) -> Schedule:
        """NCSN: alpha = 1, sigmas in geometric progression, level T-1 the largest (Song and Ermon 2019)."""
        sigma_min, sigma_max = finite_numbers("Schedule.geometric", sigma_min=sigma_min, sigma_max=sigma_max)
        name = f"Schedule.geometric({levels('Schedule.geometric', T)}, {sigma_min}, {sigma_max})"
        if not 0 < sigma_min <= sigma_max < math.inf:
            raise ValueError(f"{name}: needs 0 < sigma_min <= sigma_max")
        sigma = torch.logspace(math.log10(sigma_min), math.log10(sigma_max), T, dtype=torch.float64, device="cpu")
        return cls(torch.ones(T, dtype=torch.float64, device="cpu"), sigma, name=name)

    @classmethod
    def karras(cls, T: int = 18, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Schedule:
        """EDM: alpha = 1, sigma^(1/rho) evenly spaced, level T-1 the largest (Karras et al. 2022, eq. 5).

        0 < sigma_min <= sigma_max; rho > 0: 1 is even spacing, more puts more levels at little noise.
        T = 1 is sigma_max. Raises ValueError for other values, TypeError for what is no number.
        """
        sigma_min, sigma_max, rho = finite_numbers("Schedule.karras", sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
        name = f"Schedule.karras({levels('Schedule.karras', T)}, {sigma_min}, {sigma_max}, {rho})"
        if not (0 < sigma_min <= sigma_max and rho > 0):
            raise ValueError(f"{name}: needs 0 < sigma_min <= sigma_max and rho > 0")
        sigma = karras_spacing(unit_grid(T), sigma_min, sigma_max, rho)
        return cls(torch.ones_like(sigma), sigma, name=name)

    @classmethod
    def laplace(cls, T: int = 1000, mu: float = 0.0, b: float = 0.5) -> Schedule:
        """Variance preserving, logSNR = mu - b * sign(1/2 - t) * log(1 - 2|t - 1/2|) (Hang et al. 2024).

        mu: the logSNR where the levels are densest      b: > 0, how far they spread
        t = (i + 1/2) / T, the middles of T equal parts, so that every prediction is defined at every level;
        the last one keeps some signal, an SNR of e^mu / T^b: sample from pure noise with zero_terminal_snr().
        Raises ValueError for other values, TypeError for what is no number.
        """
        mu, b = finite_numbers("Schedule.laplace", mu=mu, b=b)
        name = f"Schedule.laplace({levels('Schedule.laplace', T)}, {mu}, {b})"
        if not b > 0:
            raise ValueError(f"{name}: needs b > 0")
        log_snr = laplace_log_snr((torch.arange(T, dtype=torch.float64, device="cpu") + 0.5) / T, mu, b)
        return cls(alpha_from_log_snr(log_snr), alpha_from_log_snr(-log_snr), name=name)

    @classmethod
    def flow(cls, T: int = 1000, shift: float = 1.0) -> Schedule:
        """Rectified flow: alpha = 1 - t, sigma = t on t = 1/T, 2/T, ..., 1 (Liu et al. 2022; Lipman et al. 2023).

        shift: > 0, moves the grid to t' = shift * t / (1 + (shift - 1) * t), towards the noise where it is
        more than 1, as larger images need (Esser et al. 2024, eq. 23).
        The last level is pure noise, from which eps says nothing about x0: predict "flow" (or v, x0).
        Raises ValueError for other values, TypeError for what is no number.
        """
        shift = finite_numbers("Schedule.flow", shift=shift)
        name = f"Schedule.flow({levels('Schedule.flow', T)}, {shift})"
        if not shift > 0:
            raise ValueError(f"{name}: needs shift > 0")
        t = shifted_time(torch.arange(1, T + 1, dtype=torch.float64, device="cpu") / T, shift)
        return cls(1 - t, t, name=name)

    def shifted(self, shift: float) -> Schedule:
        """The SNR of every level divided by shift^2: logSNR - 2 log(shift), variance preserving as before.

        shift: > 0; d/64 for images of size d whose noise was tuned at 64 (Hoogeboom et al. 2023, section 3.1).
        Raises ValueError for other values or a schedule that is not variance preserving.
        """
        self._require_variance_preserving("shifted")
        shift = finite_numbers(f"{self._name}.shifted", shift=shift)
        if not shift > 0:
            raise ValueError(f"{self._name}.shifted: shift must be positive, got {shift}")
        sigma = shift * self.sigma  # sigmoid(logSNR - 2 log(shift)) = alpha^2 / (alpha^2 + shift^2 sigma^2)
        total = torch.hypot(self.alpha, sigma)
        return Schedule(self.alpha / total, sigma / total, name=f"{self._name}.shifted({shift})")

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

    def draw(self, noise: Noise, B: int, *, device: torch.device | str = "cpu") -> Tensor:
        """(B,) int64 levels to train at, uniform: a function of the noise's key and sample ids alone.

        Entry b is floor(w T / 2^32), w word 0 of sample b in the stream noise.fold_in(LEVEL_TAG).
        Raises TypeError unless noise is a Noise, ValueError where its sample ids are not (B,).
        """
        what = f"{self._name}.draw"
        B, place = checks.integer(what, "B", B, 0), checks.device(what, device)
        return level_stream(what, noise).bits((B,), below=len(self), device=place)

    @property
    def times(self) -> Tensor | None:
        """(T,) float64, or None: the levels' times in a continuous schedule."""
        return self._times

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

    def __getitem__(self, t: int | Tensor | Array) -> Level:
        if isinstance(t, np.ndarray):
            t = checks.as_tensor(t)
        if isinstance(t, Tensor):
            if t.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"{self._name}: t must be int32 or int64, got {t.dtype}")
            return Level._of(self, saveable(t))
        if isinstance(t, numbers.Integral) and not isinstance(t, bool):
            level = int(t)
            if not 0 <= level < len(self):
                raise ValueError(f"{self._name}: level must be in [0, {len(self)}), got {level}")
            return Level._of(self, level)
        raise TypeError(f"{self._name}: t must be an int or an integer tensor (B,), got {type(t).__name__}")

    def __iter__(self) -> Iterator[Level]:
        return (self[t] for t in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        """Tensors and a name, which torch.load(weights_only=True) takes; tables are made again."""
        return {"alpha": self.alpha, "sigma": self.sigma, "times": self.times, "name": self._name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return self._name if "(" in self._name else f"{self._name}(<{len(self)} levels>)"

    # Run, not traced: torch.compile then finds the table as an attribute, an input of its graph. An entry
    # that a dict gained while tracing it would not see.
    @constant_result
    def _make_table(self, key: str, dtype: torch.dtype, device: torch.device, op: str, name: str) -> None:
        """Puts a formula's table among the attributes."""
        formula = formula_of(key)
        place = formula, dtype, device
        if place not in self._tables:
            keep(self._tables, place, formula.build(self, dtype, device, op))
        setattr(self._traced, name, self._tables[place])

    def _require_finite(self, op: str, table: Tensor, levels: Sequence[int]) -> None:
        """Row i of the float64 table belongs to levels[i]."""
        for i in (~table.isfinite().all(1)).nonzero()[:1, 0].tolist():
            raise ValueError(singular(op, self._at(levels[i])))

    def _at(self, t: int) -> str:
        return f"level {t} of {self._name}, alpha = {float(self.alpha[t])}, sigma = {float(self.sigma[t])}"

    def _told(self, t: Tensor) -> Tensor:
        """What a network is told at levels t: their times, float32 on t's device, or where there are none t."""
        return t if self._of_times is None else self._look_up(self._of_times, 0, t, "Level.times")

    def _gather(self, column: str, t: int | Tensor) -> float | Tensor:
        values: Tensor = getattr(self, column)
        if isinstance(t, int):
            return float(values[t])
        return self._look_up(PAIR, PAIR.column(column), t, f"Level.{column}")

    def _look_up(self, formula: Formula, column: int, t: Tensor, op: str) -> Tensor:
        """float32 like t, on its device."""
        table = formula.table(self, torch.float32, t.device, op)
        return reference.coefficients(table, t.reshape(-1), op, t)[:, column].reshape(t.shape)


class TimedSchedule(Schedule):
    """A Schedule whose levels have `times`: what ContinuousSchedule.discretise makes."""

    def __init__(
        self, alpha: Tensor | Array, sigma: Tensor | Array, *, times: Tensor | Array, name: str = "TimedSchedule"
    ) -> None:
        checks.word("TimedSchedule", "name", name)
        times = checks.as_tensor(times)
        check_column(name, "times", times)
        super().__init__(alpha, sigma, name=name, times=times)

    @property
    def times(self) -> Tensor:
        """(T,) float64, the times of the levels, which samplers and DenoisingLoss tell a network."""
        assert self._times is not None
        return self._times


def _formula_of_times(times: Tensor) -> Formula:
    return Formula("Level.times", ("times",), lambda alpha, sigma: (times,))


def check_column(name: str, column: str, values: Any) -> None:
    """A tensor (T,) of real numbers."""
    if not isinstance(values, Tensor) or values.dtype == torch.bool or values.is_complex():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name}: {column} must be a tensor (T,) of real numbers, got {got}")
    if values.dim() != 1:
        raise ValueError(f"{name}: {column} must have shape (T,), T > 0, got {tuple(values.shape)}")


def _check_order(name: str, alpha: Tensor, sigma: Tensor) -> None:
    """sigma/alpha must not fall, but for what float32 columns may have been rounded by."""
    before, after = alpha[1:] * sigma[:-1], alpha[:-1] * sigma[1:]
    for t in (before > after * (1 + 1e-6)).nonzero()[:1, 0].tolist():
        pairs = " and ".join(f"alpha = {float(alpha[k]):.6g}, sigma = {float(sigma[k]):.6g}" for k in (t, t + 1))
        raise ValueError(
            f"{name}: levels must be in order, the least noisy first: sigma/alpha falls from level {t} to {t + 1} "
            f"({pairs}); flip the columns"
        )


def levels(what: str, T: int | None) -> int:
    if isinstance(T, bool) or not isinstance(T, numbers.Integral) or T < 1:
        raise ValueError(f"{what}: T must be a positive int, got {T!r}")
    return int(T)


def finite_numbers(what: str, **arguments: Any) -> Any:
    """The one, or a tuple of them, as plain ints and floats."""
    found = tuple(checks.plain_number(what, argument, value, "finite") for argument, value in arguments.items())
    return found[0] if len(found) == 1 else found


def unit_grid(T: int) -> Tensor:
    """(T,) from 0 to 1; a single level is the noisiest."""
    return torch.linspace(1, 0, T, dtype=torch.float64, device="cpu").flip(0)


def karras_spacing(u: Tensor, low: float, high: float, rho: float) -> Tensor:
    """From low at u = 0 to high at u = 1, evenly spaced in the rho-th root (Karras et al. 2022, eq. 5)."""
    first, last = torch.tensor([low, high], dtype=torch.float64, device="cpu") ** (1 / rho)
    return ((first + u * (last - first)) ** rho).where(u > 0, low).where(u < 1, high)


def shifted_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23), which keeps 0 and 1."""
    return shift * t / ((1 - t) + shift * t)


def laplace_log_snr(t: Tensor, mu: float, b: float) -> Tensor:
    """mu - b * sign(1/2 - t) * log(1 - 2|t - 1/2|) (Hang et al. 2024), with its derivative at t = 1/2 too."""
    return mu - b * torch.where(t < 0.5, torch.log(2 * t), -torch.log(2 * (1 - t)))


def alpha_from_log_snr(log_snr: Tensor) -> Tensor:
    """Of a variance-preserving schedule; sigma is that of -log_snr."""
    return torch.sigmoid(log_snr).sqrt()


def level_stream(what: str, noise: Noise) -> Noise:
    """What levels are drawn from: words or normals of the key folded with LEVEL_TAG, one row for each sample."""
    if not isinstance(noise, Noise):
        raise TypeError(f"{what}: noise must be a Noise, got {type(noise).__name__}")
    return noise._at(0).fold_in(LEVEL_TAG)  # a part of a sample has the level of the whole
