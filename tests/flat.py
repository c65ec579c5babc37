"""A backend's functions with one argument for each operand, as tests of their combinations call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dae_fast.kernels.spec import ABSENT, Coefficients, Kind, Reduction, Residual, Wanted, loss_of, map_of
from dae_fast.primitives import residuals as losses
from dae_fast.primitives import sums as primitive

KINDS = tuple(Kind.__members__)
Clamp = tuple[int, int, int, float, float]


def _map(op: str, columns: Any, clamp: Clamp | None) -> tuple[Any, Any]:
    spec = map_of(op, tuple(columns), None if clamp is None else tuple(clamp[:3]))
    return spec, None if clamp is None else tuple(clamp[3:])


def _loss(op: str, kind: int, reduction: int, columns: tuple[int, ...]) -> Any:
    return loss_of(op, Kind(kind), Reduction(reduction), (*columns, *[ABSENT] * (6 - len(columns))))


class Flat:
    """Of a module; what else it has is its own."""

    _module: Any

    def __init__(self, module: Any) -> None:
        vars(self)["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)

    def affine(
        self,
        op: str,
        x: Any,
        y: Any,
        z: Any,
        noise: Any,
        table: Tensor,
        index: Any,
        columns: Any,
        clamp: Clamp | None = None,
        w: Any = None,
        out: Any = None,
    ) -> tuple[Tensor, ...]:
        spec, bounds = _map(op, columns, clamp)
        return self._module.affine(spec, (x, y, z, w), noise, Coefficients(table, index), bounds, out)

    def residual(
        self,
        op: str,
        pred: Tensor,
        y: Any,
        z: Any,
        noise: Any,
        table: Tensor,
        index: Any,
        columns: tuple[int, ...],
        mask: Any = None,
        weight: Any = None,
        reduction: int = 1,
        want_loss: bool = True,
        want_grad: bool = False,
        upstream: Any = None,
        made: Any = None,
        kind: int = 0,
        also: Any = None,
    ) -> Any:
        spec = _loss(op, kind, reduction, columns)
        wanted = Wanted(want_loss, want_grad, weight, also, upstream, made)
        return self._module.residual(spec, Residual(pred, y, z, noise, mask), Coefficients(table, index), wanted)[:3]

    def row_dots(self, g: Tensor, x: Any, y: Any, z: Any, noise: Any) -> Tensor:
        return self._module.row_dots(g, (x, y, z, None), noise)

    def corrupt(self, x: Tensor, noise: Any, thresholds: Tensor, low: float, high: float) -> Tensor:
        return self._module.corrupt(x, noise, thresholds, (low, high))

    def normal(self, noise: Any, B: int, D: int, dtype: torch.dtype, device: Any, fold: bool = True) -> Tensor:
        return self._module.normal(noise, (B, D), dtype, torch.device(device), fold)

    def words(self, noise: Any, B: int, D: int, device: Any, fold: bool = True, below: int = 2**32) -> Tensor:
        return self._module.words(noise, (B, D), torch.device(device), fold, below)


def sums_of(
    op: str,
    pred: Tensor,
    y: Any,
    z: Any,
    noise: Any,
    table: Tensor,
    index: Any,
    columns: tuple[int, ...],
    mask: Any,
    kind: int = 0,
) -> tuple[Tensor, Tensor]:
    """The reference's (B,) sums, and how many elements each has."""
    from dae_fast.kernels import reference

    spec = _loss(op, kind, 0, columns)
    return reference.residual_sums(spec, Residual(pred, y, z, noise, mask), Coefficients(table, index))


def affine(
    op: str,
    x: Any,
    y: Any,
    z: Any,
    noise: Any,
    rows: Any,
    columns: Any,
    clamp: Clamp | None = None,
    w: Any = None,
) -> tuple[Tensor, ...]:
    """The primitive with its routes and gradients."""
    spec, bounds = _map(op, columns, clamp)
    return primitive.affine(spec, (x, y, z, w), noise, rows, bounds)


def residual_loss(
    op: str,
    pred: Tensor,
    y: Any,
    z: Any,
    noise: Any,
    rows: Any,
    weight: Any,
    mask: Any,
    reduction: str,
    kind: int = 0,
) -> Any:
    columns = (1, 2, 3 if Kind(kind).has_delta else ABSENT)
    spec = _loss(op, kind, Reduction[reduction], columns)
    return losses.residual_loss(spec, Residual(pred, y, z, noise, mask), rows, weight)
