"""Noise schedules in continuous time: x_t = alpha(t) * x0 + sigma(t) * eps for every t of an interval."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checks
from ._torch import gathered
from .checks import Array, as_tensor, can_read
from .coefficients import Level, all_within
from .noise import Noise
from .schedule import (
    TimedSchedule,
    alpha_from_log_snr,
    finite_numbers,
    karras_spacing,
    laplace_log_snr,
    level_stream,
    levels,
    shifted_time,
    unit_grid,
)

__all__ = ["ContinuousSchedule", "LogNormal", "LogitNormal", "Mode", "Uniform"]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Function = Callable[[Tensor], Tensor]
Density = Callable[[Noise, int, torch.device], Tensor]
Time = TypeVar("Time", float, Tensor)
F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Uniform:
    """t = low + (high - low) u, u = (w + 1/2) / 2^32 from word 0 of each sample."""

    low: float
    high: float

    def __post_init__(self) -> None:
        finite_numbers("Uniform", low=self.low, high=self.high)
        if not self.low < self.high:
            raise ValueError(f"Uniform: low must be less than high, got {self.low} and {self.high}")

    def __call__(self, noise: Noise, B: int, device: torch.device) -> Tensor:
        u = (noise.bits((B,), device=device).double() + 0.5) * 2.0**-32
        return self.low + (self.high - self.low) * u


@dataclass(frozen=True)
class LogNormal:
    """ln t = P_mean + P_std z, z normal 0 of each sample: EDM's training sigmas (Karras et al. 2022, table 1)."""

    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self) -> None:
        finite_numbers("LogNormal", P_mean=self.P_mean, P_std=self.P_std)
        if not self.P_std > 0:
            raise ValueError(f"LogNormal: P_std must be positive, got {self.P_std}")

    def __call__(self, noise: Noise, B: int, device: torch.device) -> Tensor:
        return torch.exp(self.P_mean + self.P_std * noise.normal((B,), dtype=torch.float64, device=device))


@dataclass(frozen=True)
class LogitNormal:
    """ln t/(1 - t) = mean + std z, z normal 0 of each sample: the middle of a flow (Esser et al. 2024, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        finite_numbers("LogitNormal", mean=self.mean, std=self.std)
        if not self.std > 0:
            raise ValueError(f"LogitNormal: std must be positive, got {self.std}")

    def __call__(self, noise: Noise, B: int, device: torch.device) -> Tensor:
        return torch.sigmoid(self.mean + self.std * noise.normal((B,), dtype=torch.float64, device=device))


@dataclass(frozen=True)
class Mode:
    """t = 1 - u - s (cos^2(pi u/2) - 1 + u), u uniform: the middle of a flow, with heavy tails (Esser et al. 2024).

    s: in [-1, 2/(pi - 2)], 0 is uniform and below the ends are favoured; their section 3.1 has s = 1.29
    """

    s: float = 1.29

    def __post_init__(self) -> None:
        finite_numbers("Mode", s=self.s)
        if not -1 <= self.s <= 2 / (math.pi - 2):
            raise ValueError(f"Mode: s must be in [-1, 2/(pi - 2)], got {self.s}")

    def __call__(self, noise: Noise, B: int, device: torch.device) -> Tensor:
        u = Uniform(0.0, 1.0)(noise, B, device)
        return 1 - u - self.s * (_quarter_cosine(u).square() - 1 + u)


class ContinuousSchedule:
    """Levels of noise for every t in [t_min, t_max], the noise growing with t.

    alpha, sigma: functions of a float64 tensor of times, elementwise, that torch can differentiate
    density: how `draw` takes the times of training: df.LogitNormal, df.LogNormal, df.Mode, df.Uniform, or any function
        (noise, B, device) -> (B,); None: Uniform(t_min, t_max), of edm LogNormal(-1.2, 1.2)
    shift: > 0, moves the times that `draw` and `discretise` choose to s t / (1 + (s - 1) t), and alpha and
        sigma as functions of t not at all; for t in [0, 1] (Esser et al. 2024, eq. 23)

    schedule[t], t a number or a floating tensor (B,), is a Level, worked out in float64 and rounded once
    by the op. A t out of range (by more than the rounding of its dtype) raises ValueError on the CPU; on a
    GPU, or traced or transformed, nobody looks and that sample is NaN. Gradients reach a t that wants them.
    In a compiled function a number t becomes a tensor on the CPU, so samples on a GPU need a tensor t.
    Raises TypeError and ValueError for other arguments, functions that do not keep the shape and float64,
    or noise that does not grow. Song et al. 2021; Kingma et al. 2021.
    """

    def __init__(
        self,
        alpha: Function,
        sigma: Function,
        *,
        t_min: float = 0.0,
        t_max: float = 1.0,
        density: Density | None = None,
        shift: float = 1.0,
        name: str = "ContinuousSchedule",
    ) -> None:
        checks.word("ContinuousSchedule", "name", name)
        t_min, t_max, shift = finite_numbers(name, t_min=t_min, t_max=t_max, shift=shift)
        if not t_min < t_max:
            raise ValueError(f"{name}: t_min must be less than t_max, got {t_min} and {t_max}")
        if not shift > 0 or (shift != 1 and not 0 <= t_min < t_max <= 1):
            raise ValueError(f"{name}: shift must be positive, and 1 unless t lies in [0, 1], got {shift}")
        self.t_min, self.t_max, self.shift = float(t_min), float(t_max), float(shift)
        self.density = Uniform(self.t_min, self.t_max) if density is None else _callable(name, "density", density)
        self._alpha = _callable(name, "alpha", alpha)
        self._sigma = _callable(name, "sigma", sigma)
        self._name = name
        self._rho = 1.0
        self._inner = _inner_floats(self.t_min, self.t_max)
        self._check_ends()

    @classmethod
    def flow(cls, shift: float = 1.0, *, density: Density | None = None) -> ContinuousSchedule:
        """Rectified flow: alpha = 1 - t, sigma = t on [0, 1] (Liu et al. 2022; Lipman et al. 2023).

        shift: as in the class: of drawn times and of grids alone, t stays the fraction of noise.
        density: as in the class, here and below
        """
        return cls(_one_minus, _identity, shift=shift, density=density, name=_name("flow", shift, density=density))

    @classmethod
    def vp(
        cls, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5, *, density: Density | None = None
    ) -> ContinuousSchedule:
        """Variance preserving SDE: alpha = exp(-I/2), sigma = sqrt(1 - exp(-I)) on [t_min, 1].

        I(t) = beta_min t + (beta_max - beta_min) t^2 / 2      0 <= beta_min <= beta_max, 0 < t_min < 1
        drift = -beta/2, diffusion = sqrt(beta). Song et al. 2021, eq. 11, 29 and 33, appendix C.
        """
        name = _betas("vp", beta_min, beta_max, t_min, density)
        return cls(
            _VpAlpha(float(beta_min), float(beta_max)),
            _VpSigma(float(beta_min), float(beta_max)),
            t_min=t_min,
            density=density,
            name=name,
        )

    @classmethod
    def sub_vp(
        cls, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5, *, density: Density | None = None
    ) -> ContinuousSchedule:
        """Sub-VP SDE: alpha = exp(-I/2), sigma = 1 - exp(-I) on [t_min, 1], I and the arguments as in vp.

        drift = -beta/2, diffusion = sqrt(beta (1 - exp(-2I))). Song et al. 2021, eq. 12 and 29.
        """
        name = _betas("sub_vp", beta_min, beta_max, t_min, density)
        return cls(
            _VpAlpha(float(beta_min), float(beta_max)),
            _SubVpSigma(float(beta_min), float(beta_max)),
            t_min=t_min,
            density=density,
            name=name,
        )

    @classmethod
    def ve(
        cls, sigma_min: float = 0.01, sigma_max: float = 50.0, *, density: Density | None = None
    ) -> ContinuousSchedule:
        """Variance exploding SDE: alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t on [0, 1].

        0 < sigma_min < sigma_max      diffusion = sigma sqrt(2 ln(sigma_max/sigma_min)). Song et al. 2021, appendix C.
        """
        name = _sigmas("ve", sigma_min, sigma_max, density)
        return cls(_one, _VeSigma(float(sigma_min), float(sigma_max)), density=density, name=name)

    @classmethod
    def edm(
        cls, sigma_min: float = 0.002, sigma_max: float = 80.0, *, density: Density | None = None
    ) -> ContinuousSchedule:
        """EDM: t is sigma itself, alpha = 1; drawn from LogNormal(-1.2, 1.2) (Karras et al. 2022, table 1).

        0 < sigma_min < sigma_max      diffusion = sqrt(2 t). discretise(T, rho=7) gives its sampling steps,
        and a sampler that is given the schedule itself takes those.
        """
        name = _sigmas("edm", sigma_min, sigma_max, density)
        chosen = LogNormal() if density is None else density
        made = cls(_one, _identity, t_min=sigma_min, t_max=sigma_max, density=chosen, name=name)
        made._rho = 7.0
        return made

    @classmethod
    def cosine(cls, *, density: Density | None = None) -> ContinuousSchedule:
        """alpha = cos(pi t/2), sigma = sin(pi t/2) on [0, 1]: logSNR = -2 ln tan(pi t/2).

        Variance preserving. Hoogeboom et al. 2023; as TrigFlow with its time over pi/2 (Lu and Song 2025).
        """
        return cls(_quarter_cosine, _quarter_sine, density=density, name=_name("cosine", density=density))

    @classmethod
    def laplace(cls, mu: float = 0.0, b: float = 0.5, *, density: Density | None = None) -> ContinuousSchedule:
        """logSNR = mu - b sign(1/2 - t) ln(1 - 2|t - 1/2|) on [0, 1], variance preserving; b > 0.

        A uniform t has a Laplace logSNR, of mean mu and scale b. Hang et al. 2024.
        """
        mu, b = finite_numbers("ContinuousSchedule.laplace", mu=mu, b=b)
        name = _name("laplace", mu, b, density=density)
        if not b > 0:
            raise ValueError(f"{name}: needs b > 0")
        return cls(_Laplace(mu, b, 1), _Laplace(mu, b, -1), density=density, name=name)

    def alpha(self, t: Time) -> Time:
        """The factor of the data at t, a number or a floating tensor of any shape: a float, or float64 like t."""
        return self._evaluate(".alpha", t, self._alpha)[0]

    def sigma(self, t: Time) -> Time:
        """The factor of the noise, as alpha."""
        return self._evaluate(".sigma", t, self._sigma)[0]

    def drift(self, t: Time) -> Time:
        """d ln alpha / dt: the f of dx = f(t) x dt + g(t) dw, whose marginals this schedule has.

        t as in alpha, which must be > 0. Raises ValueError where it is not finite, or on a GPU gives NaN.
        The derivative is torch's, of alpha in float64. Song et al. 2021, eq. 5; Kingma et al. 2021.
        """
        return self._finite(".drift", t, *self._evaluate(".drift", t, self._drift))

    def diffusion(self, t: Time) -> Time:
        """g(t), g^2 = d sigma^2 / dt - 2 (d ln alpha / dt) sigma^2, as drift."""
        return self._finite(".diffusion", t, *self._evaluate(".diffusion", t, self._diffusion))

    def discretise(
        self, T: int | None = None, *, rho: float = 1.0, times: Tensor | Array | Sequence[float] | None = None
    ) -> TimedSchedule:
        """A TimedSchedule of T levels, level 0 the least noisy, that keeps its `times` (T,).

        T: evenly spaced from t_min to t_max; where sigma(t_min) = 0, the data, from one T-th above it
        rho: > 0, t^(1/rho) evenly spaced instead, for t >= 0 (Karras et al. 2022, eq. 5; t is edm's sigma)
        times: (T,) increasing, instead of T
        `shift` moves T's grid and not the times given. Raises ValueError and TypeError for other values.
        """
        what = f"{self._name}.discretise"
        if (T is None) == (times is None) or (times is not None and rho != 1):
            raise ValueError(f"{what}: give T, and rho, or times, got T={T!r}, rho={rho!r}, times={times!r}")
        if times is None:
            chosen = self._grid(what, levels(what, T), rho)
            name = f"{what}({T})" if rho == 1 else f"{what}({T}, rho={rho})"
        else:
            times = as_tensor(times)
            given = torch.as_tensor(times, dtype=None if isinstance(times, Tensor) else torch.float64).detach().cpu()
            if given.dim() != 1 or not (given[1:] > given[:-1]).all():
                raise ValueError(f"{what}: times must have shape (T,) and increase, got {times}")
            self._inside(".discretise", given)
            chosen, name = given.double().clamp(self.t_min, self.t_max), f"{what}(<{len(given)} times>)"
        alpha, sigma = self._evaluate(".discretise", chosen, self._alpha, self._sigma)
        return TimedSchedule(alpha, sigma, name=name, times=chosen)

    def draw(
        self, noise: Noise, B: int, *, density: Density | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """(B,) float32 times to train at: a function of the noise's key and sample ids alone.

        density: instead of the schedule's own. It reads the stream noise.fold_in(LEVEL_TAG) of schedule.py;
        what it gives is shifted where the schedule shifts, and rounded once to the floats strictly between
        t_min and t_max: what falls outside becomes the nearest.
        Raises TypeError unless noise is a Noise, ValueError where its sample ids are not (B,).
        """
        what = f"{self._name}.draw"
        chosen = self.density if density is None else _callable(what, "density", density)
        B, place = checks.integer(what, "B", B, 0), checks.device(what, device)
        t = chosen(level_stream(what, noise), B, place)
        if not isinstance(t, Tensor) or t.shape != (B,) or not t.is_floating_point():
            got = f"{t.dtype} of {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{what}: density must give floats of shape ({B},), got {got}")
        return self._shifted(t).float().clamp(*self._inner)

    def __getitem__(self, t: float | Tensor | Array) -> Level:
        return Level(*self._evaluate("", gathered(t), self._alpha, self._sigma))

    def __repr__(self) -> str:
        if "(" in self._name:
            return self._name
        return f"{self._name}(t_min={self.t_min}, t_max={self.t_max}, density={self.density}, shift={self.shift})"

    def _sampling_grid(self, steps: int) -> TimedSchedule:
        """What a sampler walks down that is given the schedule itself."""
        return self.discretise(steps, rho=self._rho)

    def _grid(self, what: str, T: int, rho: float) -> Tensor:
        rho = finite_numbers(what, rho=rho)
        if not rho > 0 or (rho != 1 and self.t_min < 0):
            raise ValueError(f"{what}: rho must be positive, and 1 unless t >= 0, got {rho}")
        is_data = self.sigma(self.t_min) == 0
        u = torch.arange(1, T + 1, dtype=torch.float64, device="cpu") / T if is_data else unit_grid(T)
        return self._shifted(karras_spacing(u, self.t_min, self.t_max, rho))

    def _shifted(self, t: Tensor) -> Tensor:
        return t if self.shift == 1 else shifted_time(t, self.shift)

    def _drift(self, t: Tensor) -> Tensor:
        return _derivative(lambda u: self._alpha(u).log(), t)

    def _diffusion(self, t: Tensor) -> Tensor:
        growth = _derivative(lambda u: self._sigma(u).square(), t)
        return (growth - 2 * self._drift(t) * self._sigma(t).square()).sqrt()

    def _check_ends(self) -> None:
        name, ends = self._name, torch.tensor([self.t_min, self.t_max], dtype=torch.float64, device="cpu")
        values = []
        for column, function in (("alpha", self._alpha), ("sigma", self._sigma)):
            value = function(ends)
            if not isinstance(value, Tensor) or value.dtype != torch.float64 or value.shape != (2,):
                got = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name}: {column}(t) must be a float64 tensor of t's shape (2,), got {got}")
            if not (torch.isfinite(value) & (value >= 0)).all():
                got = f"{value.tolist()} at {ends.tolist()}"
                raise ValueError(f"{name}: {column}(t) must be finite and not negative, got {got}")
            values.append(value.tolist())
        (alpha_min, alpha_max), (sigma_min, sigma_max) = values
        if not alpha_min * sigma_max > alpha_max * sigma_min:
            got = f"alpha = {values[0]}, sigma = {values[1]} at {ends.tolist()}"
            raise ValueError(f"{name}: sigma/alpha must be larger at t_max than at t_min, got {got}")

    def _finite(self, what: str, t: float | Tensor | Array, value: Any) -> Any:
        if not isinstance(value, Tensor):
            if not math.isfinite(value):
                raise ValueError(f"{self._name}{what}: has no finite value at t = {t}")
            return value
        finite = value.isfinite()
        if isinstance(t, Tensor) and can_read(t) and not finite.all():
            b = int((~finite).reshape(-1).nonzero()[0, 0])
            raise ValueError(f"{self._name}{what}: has no finite value at t = {float(t.detach().reshape(-1)[b])}")
        return torch.where(finite, value, math.nan)

    def _inside(self, what: str, t: Tensor) -> Tensor:
        """Which t lie in the interval, as far as their dtype can tell; where they can be read, all must."""
        if t.dtype not in FLOATS or t.layout != torch.strided:
            kind = t.dtype if t.layout == torch.strided else t.layout
            raise TypeError(f"{self._name}{what}: t must be floating, got {kind}")
        inside = (t >= self.t_min) & (t <= self.t_max)
        if can_read(t) and not inside.all():
            b = int((~inside).reshape(-1).nonzero()[0, 0])
            got = f"{float(t.detach().reshape(-1)[b])} for sample {b}"
            raise ValueError(f"{self._name}{what}: t must be in [{self.t_min}, {self.t_max}], got {got}")
        return inside

    def _evaluate(self, what: str, t: float | Tensor | Array, *functions: Function) -> list[Any]:
        """Floats for a number, float64 tensors for a tensor; NaN where t is out of range and cannot be read."""
        t = as_tensor(t)
        if isinstance(t, Tensor):
            if all_within(t, self.t_min, self.t_max):
                wide = t.double()
                return [f(wide) for f in functions]
            inside = self._inside(what, t)
            wide = t.double().clamp(self.t_min, self.t_max)
            return [torch.where(inside, f(wide), math.nan) for f in functions]
        if isinstance(t, bool) or not isinstance(t, numbers.Real):
            raise TypeError(f"{self._name}{what}: t must be a number or a floating tensor, got {type(t).__name__}")
        if not self.t_min <= t <= self.t_max:
            raise ValueError(f"{self._name}{what}: t must be in [{self.t_min}, {self.t_max}], got {t}")
        # As a factor, a float that changes is an input of a compiled graph; in torch.tensor it is a constant.
        wide = torch.ones((), dtype=torch.float64, device="cpu") * float(t)
        values = [f(wide) for f in functions]
        return values if torch.compiler.is_compiling() else [float(v) for v in values]


def _callable(name: str, argument: str, value: F) -> F:
    if not callable(value):
        raise TypeError(f"{name}: {argument} must be callable, got {type(value).__name__}")
    return value


def _inner_floats(low: float, high: float) -> tuple[float, float]:
    """The first and the last float32 strictly between low and high."""
    first, last = torch.tensor([low, high], dtype=torch.float32, device="cpu")
    if float(first) <= low:
        first = torch.nextafter(first, torch.full_like(first, math.inf))
    if float(last) >= high:
        last = torch.nextafter(last, torch.full_like(last, -math.inf))
    return float(first), float(last)


def _derivative(function: Function, t: Tensor) -> Tensor:
    """Of an elementwise function."""
    with torch.inference_mode(False):  # in it, and of a tensor made in it, torch 2.11's derivatives are silently 0
        return torch.func.grad(lambda u: function(u).sum())(t.clone())


# The closed forms: functions of the module and classes of numbers, so that a schedule is plain data in a file.


def _identity(t: Tensor) -> Tensor:
    return t


def _one(t: Tensor) -> Tensor:
    return torch.ones_like(t)


def _one_minus(t: Tensor) -> Tensor:
    return 1 - t


def _quarter_sine(t: Tensor) -> Tensor:
    return torch.sin((math.pi / 2) * t)


def _quarter_cosine(t: Tensor) -> Tensor:
    """0 at t = 1, which torch.cos misses by 6e-17: a signal that a division would blow up."""
    return _quarter_sine(1 - t)


@dataclass(frozen=True)
class _Integral:
    """Of beta(s) = beta_min + s (beta_max - beta_min) from 0 to t."""

    beta_min: float
    beta_max: float

    def integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + (0.5 * (self.beta_max - self.beta_min)) * t.square()


class _VpAlpha(_Integral):
    def __call__(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integral(t))


class _SubVpSigma(_Integral):
    def __call__(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.integral(t))


class _VpSigma(_Integral):
    def __call__(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self.integral(t))).sqrt()


@dataclass(frozen=True)
class _VeSigma:
    sigma_min: float
    sigma_max: float

    def __call__(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t


@dataclass(frozen=True)
class _Laplace:
    """alpha for sign = 1, sigma for -1."""

    mu: float
    b: float
    sign: int

    def __call__(self, t: Tensor) -> Tensor:
        return alpha_from_log_snr(self.sign * laplace_log_snr(t, self.mu, self.b))


def _name(constructor: str, *arguments: Any, density: Density | None) -> str:
    given = [*map(str, arguments), *([] if density is None else [f"density={density}"])]
    return f"ContinuousSchedule.{constructor}({', '.join(given)})"


def _betas(constructor: str, beta_min: float, beta_max: float, t_min: float, density: Density | None) -> str:
    name = f"ContinuousSchedule.{constructor}"
    beta_min, beta_max, t_min = finite_numbers(name, beta_min=beta_min, beta_max=beta_max, t_min=t_min)
    name = _name(constructor, beta_min, beta_max, t_min, density=density)
    if not (0 <= beta_min <= beta_max and beta_max > 0 and 0 < t_min < 1):
        raise ValueError(f"{name}: needs 0 <= beta_min <= beta_max, beta_max > 0 and 0 < t_min < 1")
    return name


def _sigmas(constructor: str, sigma_min: float, sigma_max: float, density: Density | None) -> str:
    name = f"ContinuousSchedule.{constructor}"
    sigma_min, sigma_max = finite_numbers(name, sigma_min=sigma_min, sigma_max=sigma_max)
    name = _name(constructor, sigma_min, sigma_max, density=density)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"{name}: needs 0 < sigma_min < sigma_max")
    return name


PLAIN = (
    _identity,
    _one,
    _one_minus,
    _quarter_sine,
    _quarter_cosine,
    _VpAlpha,
    _SubVpSigma,
    _VpSigma,
    _VeSigma,
    _Laplace,
    Uniform,
    LogNormal,
    LogitNormal,
    Mode,
    ContinuousSchedule,
)  # what one is made of
