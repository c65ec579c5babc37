"""What a backend is told: enumerations that C++, Triton and Python share, the static side of an op, and its operands.

The functions of a backend are those of `Backend`, with identical signatures in native, triton and reference.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from .._torch import dispatch_modes, outside_modes

if TYPE_CHECKING:
    from ..noise import Noise

ABSENT = -1  # the column of a coefficient that is 0: its operand is not read
BLEND = -2  # that of y and of w in blend(y, c0*x + c2*z, w)
NOTHING_MORE = (1, 2, ABSENT, ABSENT, ABSENT, ABSENT)  # columns of a loss in a table (1, n1, n2)


class Kind(IntEnum):
    """rho(r) of a residual: r^2, |r|, Huber's, 2 delta (sqrt(r^2 + delta^2) - delta). As Penalty in csrc/args.h."""

    mse = 0
    l1 = 1
    huber = 2
    pseudo_huber = 3

    @property
    def has_delta(self) -> bool:
        return self in (Kind.huber, Kind.pseudo_huber)


KindName = Literal["mse", "l1", "huber", "pseudo_huber"]


class Reduction(IntEnum):
    """What becomes of the samples' losses. As in csrc/args.h."""

    none = 0
    mean = 1
    sum = 2


ReductionName = Literal["none", "mean", "sum"]


# By name; not __members__, through which Dynamo of torch 2.11 does not see.
KINDS = {kind.name: kind for kind in Kind}
REDUCTIONS = {reduction.name: reduction for reduction in Reduction}

# In csrc/args.h's order.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ENUMERATIONS = {
    "Dtype": ("f32", "f64", "bf16", "f16"),
    "Penalty": tuple(k.name for k in Kind),
    "Reduction": tuple(r.name for r in Reduction),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that coefficients, sums and arithmetic have: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Coefficients(NamedTuple):
    """Coefficients of a batch: row b is table[t[b]], or without t table[b], or table[0] when there is one.

    table: a tuple is one row of floats, which becomes a tensor where a kernel wants one.
    """

    table: Any
    t: Tensor | None

    def dense(self, op: str, dtype: torch.dtype) -> Coefficients:
        """With a table that is a tensor."""
        return constant_rows(op, self.table, dtype) if isinstance(self.table, tuple) else self

    @property
    def tensor(self) -> Tensor | None:
        return None if isinstance(self.table, tuple) else self.table


def rows_at(table: Any, t: Tensor | int | None) -> Coefficients:
    """With an int, that row for all samples."""
    if not isinstance(t, int):
        return Coefficients(table, t)
    if (
        not is_compiling() and dispatch_modes() and type(table) is Tensor
    ):  # a cached one, which a FakeTensorMode would not take
        with outside_modes():
            return Coefficients(table[t : t + 1], None)
    return Coefficients(table[t : t + 1], None)


@lru_cache(maxsize=64)
def _constant_rows(columns: tuple[float, ...], dtype: torch.dtype) -> Coefficients:
    with outside_modes():
        table = torch.tensor([columns], dtype=torch.float64, device="cpu").to(dtype)
        if not table.isfinite().all():
            raise ValueError(f"coefficients must be finite in {dtype}, got {columns}")
        return Coefficients(table, None)


def constant_rows(op: str, columns: tuple[float, ...], dtype: torch.dtype) -> Coefficients:
    """One row of floats; not for what torch.compile traces.

    In host memory, whatever the samples' device: a launch takes it along, so that nothing is copied to a GPU, and a
    captured graph holds it.
    """
    try:
        return _constant_rows(columns, dtype)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A table that may be a row in host memory: that is filled on the device, as a copy would wait for a GPU."""
    if table.device == device:
        return table
    if type(table) is not Tensor or table.shape[0] != 1:
        return table.to(device)
    return torch.stack([torch.full((), v, dtype=table.dtype, device=device) for v in table[0].tolist()])[None]


Bounds = tuple[float, float]
Inputs = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # x, y, z, w
X, Y, Z, W, NOISE = range(5)  # the slots of a weighted sum; of five streams the last may be a tensor
ALL_SLOTS = (X, Y, Z, W, NOISE)


class Map:
    """The static side of a weighted sum: an output c0*x + c1*y + c2*z + c3*w, or two, z perhaps noise.

    columns: of c0, c1, c2, c3 in the table, then of a second output. BLEND as those of y and w: the only output is
        w + y*(c0*x + c2*z - w), which is the one or the other, whatever the other holds, where y is 0 or 1
    fifth: of five streams, the column of c4 in each output, whose stream is the noise, drawn or a tensor; z is then a
        tensor. Else ()
    all_columns: both, as map_of takes them
    inner: where y is a clamped estimate, the columns of x, y and w in it. With two more, where kernels are `extended`,
        a clamp's gradient: y is then the sum of the gradients z and v by those columns, 0 where the estimate is outside
    slots: of the inputs in the order in which an op has them
    reads: whether an output or the estimate reads x, y, z and w
    given_by_slot: the map of the same columns whose inputs are x, y, z, w and the noise
    core: the same, parsed by the native core
    """

    __slots__ = ("all_columns", "columns", "core", "fifth", "given_by_slot", "inner", "op", "outputs", "reads", "slots")

    def __init__(
        self, op: str, columns: tuple[int, ...], inner: tuple[int, ...] | None, slots: tuple[int, ...]
    ) -> None:
        self.op, self.all_columns, self.inner, self.slots = op, columns, inner, slots
        self.outputs = len(columns) // 4
        self.columns, self.fifth = columns[: 4 * self.outputs], columns[4 * self.outputs :]
        inside = (ABSENT,) * 4 if inner is None else (inner[0], inner[1], (*inner, ABSENT)[3], inner[2])
        self.reads = tuple(inside[k] != ABSENT or any(c != ABSENT for c in self.columns[k::4]) for k in range(4))
        self.given_by_slot: Map = self if slots == ALL_SLOTS else map_of(op, columns, inner)
        self.core: Any = (
            None if make_core_map is None or is_dynamo_compiling() else make_core_map(op, columns, inner, slots, self)
        )

    @property
    def blends(self) -> bool:
        return self.columns[1] == BLEND

    def columns_of(self, output: int) -> tuple[int, ...]:
        """Of c0, c1, c2, c3, c4."""
        return (*self.columns[4 * output : 4 * output + 4], self.fifth[output] if self.fifth else ABSENT)

    def __repr__(self) -> str:
        return f"Map({self.op!r}, {self.all_columns}, {self.inner}, {self.slots})"


make_core_map: Any = None  # of the native core, where there is one


def map_of(
    op: str, columns: tuple[int, ...], inner: tuple[int, ...] | None = None, slots: tuple[int, ...] = ALL_SLOTS
) -> Map:
    """The same object for equal arguments; a traced function makes its own, as Dynamo looks into no cache."""
    return Map(op, columns, inner, slots) if is_dynamo_compiling() else _kept_map(op, columns, inner, slots)


_kept_map = lru_cache(maxsize=512)(Map)


class Loss:
    """The static side of a residual's loss.

    columns: of n1 and n2 in r = pred + n1*y + n2*z, z perhaps noise, and of rho's delta; that of one more factor of
        each sample's weight; those of two factors of the samples' means, for two further means over the batch
    core: the same, parsed by the native core
    """

    __slots__ = ("columns", "core", "kind", "op", "reduction")

    def __init__(self, op: str, kind: Kind, reduction: Reduction, columns: tuple[int, ...]) -> None:
        self.op, self.kind, self.reduction, self.columns = op, kind, reduction, columns
        self.core: Any = (
            None
            if make_core_loss is None or is_dynamo_compiling()
            else make_core_loss(int(kind), int(reduction), columns, self)
        )

    @property
    def has_also(self) -> bool:
        return self.columns[4] != ABSENT

    def __repr__(self) -> str:
        return f"Loss({self.op!r}, {self.kind.name}, {self.reduction.name}, {self.columns})"


make_core_loss: Any = None


def loss_of(
    op: str, kind: Kind = Kind.mse, reduction: Reduction = Reduction.mean, columns: tuple[int, ...] = NOTHING_MORE
) -> Loss:
    """As map_of."""
    return Loss(op, kind, reduction, columns) if is_dynamo_compiling() else _kept_loss(op, kind, reduction, columns)


_kept_loss = lru_cache(maxsize=512)(Loss)


class Residual(NamedTuple):
    """The operands of a residual: pred, y, z or noise, and which elements count."""

    pred: Tensor
    y: Tensor | None
    z: Tensor | None
    noise: Noise | None
    mask: Any = None  # a bool tensor like pred, a Drawn, or None for all


class Wanted(NamedTuple):
    """What a residual's pass is to give, and what it is weighed by.

    weight: (B,)      loss, grad: whether they are made      also: (2,), written      upstream: () times the gradient
    made: the gradient for an upstream of 1, kept where that is what upstream turns out to be and written anew else
    kept: what a pass over the same mask has found
    """

    loss: bool = False
    grad: bool = False
    weight: Tensor | None = None
    also: Tensor | None = None
    upstream: Tensor | None = None
    made: Tensor | None = None
    kept: Tensor | None = None


class Found(NamedTuple):
    """What the pass gave: the samples' unweighted means, the loss, the gradient of pred; None where not wanted.

    kept: how many elements of each sample a mask keeps, where they were counted
    """

    means: Tensor | None
    loss: Tensor | None
    grad: Tensor | None
    kept: Tensor | None = None


class Update(NamedTuple):
    """Of a chain: x + step * score + spread * eps, `steps` times."""

    step: float
    spread: float
    steps: int


class Backend(Protocol):
    """What every backend can do, for checked tensors of one shape, dtype and device."""

    def affine(
        self,
        spec: Map,
        inputs: Inputs,
        noise: Noise | Tensor | None,
        rows: Coefficients,
        bounds: Bounds | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, ...]: ...

    def residual(self, spec: Loss, operands: Residual, rows: Coefficients, wanted: Wanted) -> Found: ...

    def row_dots(self, g: Tensor, inputs: Inputs, noise: Noise | None) -> Tensor: ...

    def corrupt(self, x: Tensor, noise: Noise, thresholds: Tensor, values: Bounds) -> Tensor: ...

    def gaussian(
        self, mu: Tensor, log_var: Tensor, eps: Tensor | None, noise: Noise | None
    ) -> tuple[Tensor, Tensor]: ...

    def gaussian_grad(
        self,
        mu: Tensor,
        log_var: Tensor,
        eps: Tensor | None,
        noise: Noise | None,
        z_grad: Tensor | None,
        kl_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...

    def normal(
        self, noise: Noise, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fold: bool = True
    ) -> Tensor: ...

    def words(
        self, noise: Noise, shape: tuple[int, int], device: torch.device, fold: bool = True, below: int = 2**32
    ) -> Tensor: ...

    def embedding(self, x: Tensor, W: Tensor, flip: bool, out: Tensor) -> None: ...

    def fold_in_tensor(self, noise: Noise, data: Tensor | int) -> Tensor: ...

    def available(self) -> str: ...

    def supports(self, device: torch.device) -> bool: ...


FUNCTIONS = tuple(name for name in vars(Backend) if not name.startswith("_"))
