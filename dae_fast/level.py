"""Levels of noise: the pair (alpha, sigma) of each sample."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rows import Coefficients, Rows, rows_at, stack_rows, table_of

if TYPE_CHECKING:
    from .schedule import Schedule


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
    return as_number(op, name, value)


def as_number(op: str, name: str, value: Any) -> float:
    """int, float or a numpy scalar."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a float or a tensor, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be within float64, got one beyond it") from None


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
            self._check(op, x)
            t = self._t
            return rows_at(table, t.contiguous() if isinstance(t, Tensor) else t)
        alpha, sigma = self._alpha, self._sigma
        if not isinstance(alpha, Tensor) and not isinstance(sigma, Tensor):
            try:
                return stack_rows(op, coefficients(alpha, sigma), x, dtype)
            except (ZeroDivisionError, ValueError, OverflowError):
                raise ValueError(singular(op, f"alpha = {alpha}, sigma = {sigma}")) from None
        check_per_sample(op, "level.alpha", alpha, x)
        check_per_sample(op, "level.sigma", sigma, x)
        wide = [
            v.double() if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=x.device)
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
        value = as_number("Level", name, value)
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
