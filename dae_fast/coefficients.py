"""Levels of noise, the pair (alpha, sigma) of each sample, and the coefficients that formulas make of them.

A schedule's coefficients are worked out in float64 for all its levels, rounded once, and kept under their formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from ._torch import fake_mode, gathered, outside_modes
from .checks import DTYPES, Array, as_number, as_tensor, can_read, check_per_sample
from .kernels import dispatch, reference
from .kernels.spec import Coefficients, constant_rows, rows_at

if TYPE_CHECKING:
    from .schedule import Schedule

__all__ = ["Level"]

Function = Callable[[Any, Any], Any]
TableKey = tuple["Formula", torch.dtype, torch.device]  # of a table in a schedule's cache
TABLES = 64  # kept by one schedule; the oldest goes first

_native = dispatch.module("native")
_FORMULAS: WeakValueDictionary[str, Formula] = WeakValueDictionary()


class Formula:
    """Coefficients as a function of (alpha, sigma), by name; a schedule keeps their table under this object.

    function(alpha, sigma) -> a tuple, floats of floats or float64 tensors of such tensors, one for each of `names`
    key: by which a traced function finds it: a string, the only constant that torch.compile takes
    """

    __slots__ = ("__weakref__", "function", "key", "names", "op")
    _made = 0

    def __init__(self, op: str, names: tuple[str, ...], function: Function) -> None:
        self.op, self.names, self.function = op, names, function
        self.key = ""
        if not is_dynamo_compiling():
            Formula._made += 1
            self.key = f"{op} {Formula._made}"
            _FORMULAS[self.key] = self

    def column(self, name: str) -> int:
        return self.names.index(name)

    def _columns(self, alpha: float | Tensor, sigma: float | Tensor) -> tuple[Any, ...] | None:
        """For a level made by hand, as the core asks; None where that has no finite value."""
        try:
            return self.at(alpha, sigma)
        except (ZeroDivisionError, OverflowError, ValueError):
            return None

    def at(self, alpha: float | Tensor, sigma: float | Tensor) -> tuple[Any, ...]:
        """Floats for floats, else float64; tensors keep their gradients."""
        if not isinstance(alpha, Tensor) and not isinstance(sigma, Tensor):
            try:
                made = self.function(alpha, sigma)
            except TypeError:  # a function of torch's: it takes tensors
                made = self.function(*(torch.full((), v, dtype=torch.float64) for v in (alpha, sigma)))
            return tuple(float(c) if isinstance(c, Tensor) and not is_compiling() else c for c in made)
        device = alpha.device if isinstance(alpha, Tensor) else sigma.device  # type: ignore[union-attr]
        wide = [
            v.double() if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float64, device=device)
            for v in (alpha, sigma)
        ]
        return tuple(self.function(*wide))

    def build(self, schedule: Schedule, dtype: torch.dtype, device: torch.device, op: str) -> Tensor:
        """(T, K) for all levels of a schedule."""
        with outside_modes():
            columns = self.function(schedule.alpha, schedule.sigma)
            wide = [c if isinstance(c, Tensor) else torch.full_like(schedule.alpha, c) for c in columns]
            table = torch.stack(wide, -1)
            schedule._require_finite(op, table, range(len(schedule)))
            narrow = table.to(dtype)
            for t in (~narrow.isfinite().all(1)).nonzero()[:1, 0].tolist():
                largest = float(table[t].abs().max())
                raise ValueError(
                    f"{op}: a coefficient of {largest:.3g} overflows {dtype} at {schedule._at(t)}: "
                    "leave that level out, predict='v', or use samples in float64"
                )
            return narrow.to(device)

    def table(self, schedule: Schedule, dtype: torch.dtype, device: torch.device, op: str = "") -> Tensor:
        """(T, K), made once. Raises ValueError where a level has no finite coefficients."""
        if is_dynamo_compiling():
            name = f"{self.key} {dtype} {device}".replace(".", " ")  # Dynamo takes a dot for a path
            schedule._make_table(self.key, dtype, device, op or self.op, name)
            return getattr(schedule._traced, name)
        found = schedule._tables.get((self, dtype, device))
        if found is None:
            found = keep(schedule._tables, (self, dtype, device), self.build(schedule, dtype, device, op or self.op))
        return found

    def rows(self, level: Level, x: Tensor, dtype: torch.dtype, op: str = "") -> Coefficients:
        """Of batch x; a level of several dimensions has a row for each of its entries. op: who asks."""
        op = op or self.op
        if is_dynamo_compiling() and not self.key and level.t is not None:
            level = Level._by_hand(*alpha_sigma(op, level, x))
        if level._schedule is not None:
            return level._rows(op, self.table(level._schedule, dtype, x.device, op), x)
        return self._rows_by_hand(level, x, dtype, op)

    def _rows_by_hand(self, level: Level, x: Tensor, dtype: torch.dtype, op: str) -> Coefficients:
        alpha, sigma = level._alpha, level._sigma
        if not isinstance(alpha, Tensor) and not isinstance(sigma, Tensor):
            try:
                return stack_rows(op, self.at(alpha, sigma), x, dtype)
            except (ZeroDivisionError, OverflowError, ValueError):
                raise ValueError(singular(op, f"alpha = {alpha}, sigma = {sigma}")) from None
        check_per_sample(op, "level.alpha", alpha, x)
        check_per_sample(op, "level.sigma", sigma, x)
        rows = stack_rows(op, self.at(alpha, sigma), x, dtype)
        if can_read(rows.table):
            finite = torch.isfinite(rows.table.detach()).all(1)
            if not finite.all():
                b = int((~finite).nonzero()[0, 0])
                pair = [v.detach() if isinstance(v, Tensor) else torch.tensor(v) for v in (alpha, sigma)]
                a, s = (float(v.reshape(-1)[b if v.numel() > 1 else 0]) for v in pair)
                raise ValueError(singular(op, f"sample {b}, alpha = {a}, sigma = {s}"))
            return rows
        return Coefficients(torch.where(torch.isinf(rows.table), torch.nan, rows.table), None)


def keep(tables: dict[Any, Any], key: Any, made: Any) -> Any:
    """Puts it into a cache that is bounded; the oldest goes first."""
    if key not in tables and len(tables) >= TABLES:
        tables.pop(next(iter(tables)))
    tables[key] = made
    return made


def formula_of(key: str) -> Formula:
    return _FORMULAS[key]


def stack_rows(op: str, columns: tuple[Any, ...], x: Tensor, dtype: torch.dtype) -> Coefficients:
    """Rows from columns that are floats or tensors (), (B,) or of more leading dimensions, worked out in float64 on
    x's device."""
    if not any(isinstance(c, Tensor) for c in columns) and not is_compiling():
        return constant_rows(op, columns, dtype)
    # As a factor, a float that changes is an input of a compiled graph; in torch.tensor it is a constant.
    one = torch.ones((), dtype=torch.float64, device=x.device)
    wide = [c.double() if isinstance(c, Tensor) else one * c for c in columns]
    dims = leading(*wide)
    wide = [c.reshape(*c.shape, *[1] * (dims - c.dim())) if 0 < c.dim() < dims else c for c in wide]
    return Coefficients(torch.stack(torch.broadcast_tensors(*wide), -1).reshape(-1, len(columns)).to(dtype), None)


def traced(rows: Coefficients) -> Coefficients:
    """As a FakeTensorMode around the call sees them: it takes no real tensor, and a cached table is one."""
    if is_compiling() or type(rows.table) is not Tensor or fake_mode() is None:
        return rows
    with outside_modes():
        values, dtype, device = rows.table.tolist(), rows.table.dtype, rows.table.device
    return Coefficients(torch.tensor(values, dtype=dtype, device=device), rows.t)


def gather(op: str, rows: Coefficients, x: Tensor) -> Tensor:
    """(1 or B, K) on x's device, for torch's own arithmetic."""
    dense = rows.dense(op, torch.float64 if x.dtype == torch.float64 else torch.float32)
    return reference.coefficients(*traced(dense), op, x)


class Level:
    """The pair (alpha, sigma) of each sample: x_t = alpha * x0 + sigma * eps.

    alpha, sigma: floats, or tensors or arrays (), (B,) or of more leading dimensions, (B, F) for samples (B, F, ...):
        each frame its own level; gradients reach tensors that require them. A classical denoising autoencoder is
        Level(alpha=1.0, sigma=0.5). `schedule[t]` makes the other kind, a lazy look-up: nothing is computed until an op
        needs it.
    Raises TypeError for anything else and ValueError for values that are negative, infinite or NaN
    (looked at on the CPU alone).
    """

    __slots__ = ("_alpha", "_schedule", "_sigma", "_t")

    def __init__(self, alpha: float | Tensor | Array = 1.0, sigma: float | Tensor | Array = 0.0) -> None:
        self._alpha = _checked("alpha", gathered(alpha))
        self._sigma = _checked("sigma", gathered(sigma))
        self._schedule: Schedule | None = None
        self._t: int | Tensor = 0

    @classmethod
    def _of(cls, schedule: Schedule, t: int | Tensor) -> Level:
        level = cls.__new__(cls)
        level._schedule, level._t = schedule, t
        level._alpha = level._sigma = 0.0
        return level

    @classmethod
    def _by_hand(cls, alpha: float | Tensor, sigma: float | Tensor) -> Level:
        """Unchecked."""
        level = cls.__new__(cls)
        level._schedule, level._t = None, 0
        level._alpha, level._sigma = alpha, sigma
        return level

    @property
    def t(self) -> int | Tensor | None:
        """The index into the schedule, or None for a level made by hand."""
        return None if self._schedule is None else self._t

    @property
    def alpha(self) -> float | Tensor:
        """The factor of the data: as given, or looked up: a float, or fp32 like t on its device."""
        return self._alpha if self._schedule is None else self._schedule._gather("alpha", self._t)

    @property
    def sigma(self) -> float | Tensor:
        """The factor of the noise, as alpha."""
        return self._sigma if self._schedule is None else self._schedule._gather("sigma", self._t)

    def _dims(self) -> int:
        """How many leading dimensions a row of the batch stands for: 1, or more where each frame has its level."""
        return leading(self._t) if self._schedule is not None else leading(self._alpha, self._sigma)

    def _check(self, op: str, x: Tensor) -> None:
        """An index tensor has one entry per sample, on their device."""
        t = self._t
        if isinstance(t, Tensor):
            if not is_one(t) and t.shape != x.shape[: t.dim()]:
                if t.dim() > 1:
                    wanted = f"level must have shape {tuple(x.shape[: t.dim()])}"
                    raise ValueError(f"{op}: {wanted}, as the samples begin, got {tuple(t.shape)}")
                raise ValueError(f"{op}: level must have one entry per sample ({x.shape[0]}), got {t.shape[0]}")
            if t.device != x.device:
                raise ValueError(f"{op}: level must be on {x.device} like the samples, got {t.device}")

    def _rows(self, op: str, table: Tensor, x: Tensor) -> Coefficients:
        """Of batch x, of a table of the schedule's levels."""
        self._check(op, x)
        t = self._t
        if not isinstance(t, Tensor):
            return rows_at(table, t)
        if t.dim() != 1:
            t = t.reshape(-1)
        return Coefficients(table, (t.expand(x.shape[0]) if t.shape[0] == 1 else t).contiguous())

    def __repr__(self) -> str:
        if self._schedule is None:
            return f"Level(alpha={self._alpha}, sigma={self._sigma})"
        return f"{self._schedule!r}[{self._t}]"


def changing(value: float, x: Tensor) -> Any:
    """The number; where torch.compile traces, a () tensor: as a factor, a float that changes is an input of the graph,
    and anywhere else a constant, of which each value has a graph of its own."""
    return torch.ones((), dtype=torch.float64, device=x.device) * value if is_compiling() else value


def leading(*values: Any) -> int:
    """How many dimensions a row stands for: as many as the largest of the tensors has, and at least 1."""
    found = 1
    for value in values:
        if isinstance(value, Tensor) and value.dim() > found:
            found = value.dim()
    return found


def is_one(t: Tensor) -> bool:
    """Whether it is of shape () or (1,): the same for all samples."""
    return t.shape in ((), (1,))


def level_for(op: str, level: Level) -> None:
    if not isinstance(level, Level):
        got = type(level).__name__
        raise TypeError(f"{op}: level must be a Level, as schedule[t] or Level(alpha, sigma), got {got}")


PAIR = Formula("Level", ("alpha", "sigma"), lambda alpha, sigma: (alpha, sigma))


def alpha_sigma(op: str, level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """float64 on x's device, () or one for each row of batch x."""
    alpha, sigma = alpha_sigma_pairs(op, level, x).unbind(-1)
    return alpha, sigma


def alpha_sigma_pairs(op: str, level: Level, x: Tensor) -> Tensor:
    """The same in one tensor, (2,) or (B, 2)."""
    rows = PAIR.rows(level, x, torch.float64, op)
    pairs = reference.coefficients(*traced(rows), op, x)
    return pairs[0] if rows.t is None and pairs.shape[0] == 1 else pairs


def value_at(op: str, name: str, function: Callable[..., Any], level: Level, x: Tensor) -> Tensor:
    """function(alpha, sigma), float64 () or of the level's shape, a constant. Raises where it returns another."""
    alpha, sigma = alpha_sigma(op, level, x)
    dims = level._dims()
    if dims > 1:
        alpha, sigma = (v if not v.dim() else v.reshape(x.shape[:dims]) for v in (alpha, sigma))
    value = function(alpha, sigma)
    if isinstance(value, (int, float)):
        value = torch.full((), value, dtype=torch.float64, device=x.device)  # a copy from the host would wait
    elif not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=torch.float64, device=x.device)
        except (TypeError, ValueError, RuntimeError):
            what = type(value).__name__
            raise TypeError(f"{op}: {name}(alpha, sigma) must be a number or (B,) like them, got {what}") from None
    if value.shape not in ((), (1,), x.shape[:1], x.shape[:dims]):
        got = tuple(value.shape)
        raise ValueError(f"{op}: {name}(alpha, sigma) must be a number or (B,) like them, got shape {got}")
    return value.detach().double()


def all_within(value: Tensor, low: float, high: float) -> bool:
    """Whether a plain tensor's values are known to lie in [low, high], without an operation of torch."""
    return not is_compiling() and _native is not None and bool(_native.all_within(value, low, high))


LARGEST = float(torch.finfo(torch.float64).max)


def _checked(name: str, value: float | Tensor | Array) -> float | Tensor:
    """Of a Level: a number or a floating tensor, finite and not negative."""
    if isinstance(value, np.ndarray):
        value = as_tensor(value)
    if not isinstance(value, Tensor):
        value = as_number("Level", name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"Level: {name} must be finite and not negative, got {value}")
    elif value.dtype not in DTYPES or value.layout != torch.strided:
        got = f"{value.dtype} of {tuple(value.shape)}" if value.layout == torch.strided else value.layout
        raise ValueError(f"Level: {name} must be a float or a floating tensor () or (B,), got {got}")
    elif all_within(value, 0.0, LARGEST):
        pass
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
