"""DTensors: every op runs on the local parts, the noise moved to where they lie in the global samples.

Imported when a DTensor is met, not with the package. Plain tensors beside DTensors are global, the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from .kernels.spec import Bounds, Coefficients, Inputs, Loss, Map, Residual
from .noise import Noise, fill, to_signed
from .primitives import residuals, sums
from .primitives.masks import Drawn, kept_elements

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard

Box = list[tuple[int, int]]  # of each dimension, where the local part begins and how long it is


def _cut(p: Any) -> TypeGuard[Shard]:
    """Whether it is a Shard in torch.chunk's order, as an FSDP shard of a tensor-parallel one is not."""
    return bool(p.is_shard()) and not hasattr(p, "split_factor")


class Layout:
    """How the samples of a call lie on a mesh: as the first of its DTensors that is sharded."""

    def __init__(self, op: str, *given: Tensor | None) -> None:
        tensors = [t for t in given if isinstance(t, DTensor)]
        first = next((t for t in tensors if any(map(_cut, t.placements))), tensors[0])
        self.op, self.shape, self.mesh = op, first.shape, first.device_mesh
        for t in tensors:
            if t.device_mesh != self.mesh:
                raise ValueError(f"{op}: all DTensors must be on one mesh, got {self.mesh} and {t.device_mesh}")
            for p in t.placements:
                if not (_cut(p) or p.is_replicate() or p.is_partial()):  # nobody says which elements its parts are
                    raise NotImplementedError(
                        f"{op}: a DTensor may be Shard, Replicate or Partial, got {p}: nothing says which elements a "
                        "rank has of it, and so which noise; redistribute it"
                    )
        self.placements = tuple(p if _cut(p) else Replicate() for p in first.placements)
        self.box = self._box()
        if [n for _, n in self.box] != list(self.local(first).shape):
            # FSDP over tensor parallel, say: its parts are interleaved, and their noise would be other elements'.
            raise NotImplementedError(
                f"{op}: a DTensor must be cut as distribute_tensor cuts it, got {tuple(first.to_local().shape)} of "
                f"{tuple(self.shape)} on this rank: interleaved parts would get other elements' noise; redistribute it"
            )

    def _box(self) -> Box:
        box = [(0, n) for n in self.shape]
        coordinates = self.mesh.get_coordinate()
        if coordinates is None:
            raise ValueError(f"{self.op}: this rank is not in the mesh {self.mesh}")
        for place, parts, p in zip(coordinates, self.mesh.shape, self.placements, strict=True):
            if _cut(p):
                first, n = box[p.dim]
                each = -(-n // parts)
                begin = min(place * each, n)
                box[p.dim] = first + begin, min(each, n - begin)
        return box

    def sharded(self, dims: Sequence[int]) -> bool:
        return any(_cut(p) and p.dim in dims for p in self.placements)

    def of_leading(self, shape: Sequence[int]) -> list[Placement]:
        """Of a tensor whose dimensions are the samples' first ones: where it has another size, it is whole."""
        return [
            p if _cut(p) and p.dim < len(shape) and shape[p.dim] == self.shape[p.dim] else Replicate()
            for p in self.placements
        ]

    def sums(self, dims: int) -> list[Placement]:
        """Of what each part gives its share of: the samples' first dimensions are there, the others summed."""
        return [Partial() if _cut(p) and p.dim >= dims else p for p in self.placements]

    def local(self, t: Any, dims: int | None = None) -> Any:
        """The part of t that belongs to the local samples; dims: how many of its dimensions are theirs.

        Where t is whole and the samples are not, its gradient is a sum over the parts.
        """
        if not isinstance(t, Tensor):
            return t
        t = t if isinstance(t, DTensor) else DTensor.from_local(t, self.mesh, self._whole(), run_check=False)
        cut = self.of_leading(t.shape[:dims])
        pairs = zip(cut, self.placements, strict=True)
        grads = [Partial() if _cut(p) and not _cut(c) else c for c, p in pairs]
        return t.redistribute(placements=cut).to_local(grad_placements=grads)

    def _whole(self) -> list[Placement]:
        return [Replicate()] * self.mesh.ndim

    def joined(self, t: Tensor, shape: Sequence[int], placements: Sequence[Placement] | None = None) -> Tensor:
        """The DTensor of such parts; the stride that of a contiguous one."""
        stride = tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))
        found: Tensor = DTensor.from_local(
            t, self.mesh, placements or self.placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
        return found

    def rows(self, rows: Coefficients) -> Coefficients:
        """Of the local samples."""
        if isinstance(rows.table, tuple):
            return rows
        return Coefficients(self.local(rows.table, 1 if rows.t is None else 0), self.local(rows.t, 1))

    def noise(self, noise: Noise | None) -> Noise | None:
        """The noise of the local samples, the same as if they were not cut."""
        if noise is None:
            return None
        (b, B), *inner = self.box
        rows, first = noise._span or (1, 0)
        if b % rows or B % rows:  # a Noise is moved by whole samples: a part's rows may begin within one
            raise NotImplementedError(
                f"{self.op}: levels of several dimensions need whole samples on every rank, a Noise being moved by "
                "whole samples: redistribute the batch"
            )
        ids = noise._sample
        ids = None if ids is None else ids[b // rows : (b + B) // rows]
        at = noise._first_sample if ids is not None else to_signed(noise._first_sample + b // rows)
        span = None if noise._span is None else (rows, first)
        moved = Noise._make(noise._seed, noise._offset, noise._key_tensor, ids, at, span)
        if not self.sharded(range(1, len(self.shape))):
            return moved
        pieces = _runs([rows, *self.shape[1:]], [(0, rows), *inner])
        if len(pieces) == 1 and rows == 1:
            moved._span = (1, first + pieces[0][0])
            return moved
        return Pieces.of(moved, first, pieces)

    def mask(self, mask: Any) -> Any:
        """Of the local samples."""
        if not isinstance(mask, Drawn):
            return self.local(mask)
        noise = self.noise(mask.noise)
        assert noise is not None
        return Drawn(noise, self.local(mask.thresholds, 1), mask.visible)


class Pieces(Noise):
    """The noise of samples that are several runs of elements of the global ones: filled, a launch for each run."""

    __slots__ = ("_pieces",)
    _pieces: list[tuple[int, int]]

    @classmethod
    def of(cls, noise: Noise, first: int, pieces: list[tuple[int, int]]) -> Pieces:
        made = cls.__new__(cls)
        made._seed, made._offset, made._key_tensor = noise._seed, noise._offset, noise._key_tensor
        made._sample, made._first_sample = noise._sample, noise._first_sample
        made._span = (noise._span[0] if noise._span else 1, 1)  # no kernel takes rows that begin at element 1
        made._pieces = [(first + begin, n) for begin, n in pieces]
        return made

    def _cut(self, op: str, B: int, D: int, dtype: torch.dtype, device: torch.device, below: int) -> Tensor:
        assert self._span is not None
        samples = B // self._span[0]
        filled = [fill(op, self._at(begin), (samples, n), dtype, device, below) for begin, n in self._pieces]
        return torch.cat(filled, 1).reshape(B, D)


def _runs(shape: Sequence[int], box: Box) -> list[tuple[int, int]]:
    """(begin, length) of the runs of elements that a part of a sample has, in their order."""
    last = max((k for k, (n, (_, size)) in enumerate(zip(shape, box, strict=True)) if size != n), default=0)
    inner = math.prod(shape[last + 1 :])
    begin, n = box[last]
    strides = [math.prod(shape[k + 1 :]) for k in range(last)]
    return [
        (sum(i * s for i, s in zip(outer, strides, strict=True)) + begin * inner, n * inner)
        for outer in product(*(range(b, b + size) for b, size in box[:last]))
    ]


def affine(
    spec: Map, inputs: Inputs, noise: Noise | Tensor | None, rows: Coefficients, bounds: Bounds | None
) -> tuple[Tensor, ...]:
    """sums.affine of DTensors."""
    stored = noise if isinstance(noise, Tensor) else None
    layout = Layout(spec.op, *inputs, stored)
    parts: Any = tuple(layout.local(t) for t in inputs)
    fifth = layout.local(stored) if isinstance(noise, Tensor) else layout.noise(noise)
    made = sums.affine(spec, parts, fifth, layout.rows(rows), bounds)
    return tuple(layout.joined(t, layout.shape) for t in made)


def sample_means(spec: Loss, operands: Residual, rows: Coefficients) -> Tensor:
    """residuals.sample_means of DTensors: of a cut sample, each part's share of its mean."""
    pred, y, z, noise, mask = operands
    layout = Layout(spec.op, pred, y, z, mask if isinstance(mask, Tensor) else None)
    part = layout.local(pred)
    chosen = layout.mask(mask)
    if isinstance(chosen, Drawn) and chosen.noise._span is not None:
        chosen = chosen.on(part)
    found = Residual(part, layout.local(y), layout.local(z), layout.noise(noise), chosen)
    means = residuals.sample_means(spec, found, layout.rows(rows))
    shape, place = layout.shape[:1], layout.sums(1)
    if layout.sharded(range(1, len(layout.shape))):
        kept = kept_elements(part, chosen)
        if isinstance(kept, Tensor):
            kept = kept.to(means.dtype)
            whole = layout.local(layout.joined(kept, shape, place), 1)
            whole = torch.where(whole > 0, whole, 1)
        else:
            whole = max(math.prod(layout.shape[1:]), 1)
        means = means * (kept / whole)
    return layout.joined(means, shape, place)


def drawn(mask: Drawn, x: Tensor) -> Tensor:
    """Drawn.on of a DTensor."""
    layout = Layout("mask", x)
    return layout.joined(layout.mask(mask).on(layout.local(x)), layout.shape)


def replaced(
    run: Callable[..., Tensor], op: str, x: Tensor, noise: Noise, thresholds: Tensor, *values: float
) -> Tensor:
    """A corruption of a DTensor."""
    layout = Layout(op, x)
    return layout.joined(run(op, layout.local(x), layout.noise(noise), layout.local(thresholds, 1), *values), x.shape)


def gaussian(run: Callable[..., Any], op: str, mu: Tensor, log_var: Tensor, noise: Any) -> tuple[Tensor, Tensor]:
    """reparameterise of DTensors."""
    layout = Layout(op, mu, log_var, noise if isinstance(noise, Tensor) else None)
    eps = layout.local(noise) if isinstance(noise, Tensor) else layout.noise(noise)
    z, kl = run(layout.local(mu), layout.local(log_var), eps)
    return layout.joined(z, layout.shape), layout.joined(kl, layout.shape[:1], layout.sums(1))


def whole_samples(x: Tensor) -> Tensor:
    """x with no sample cut."""
    layout = Layout("threshold", x)
    cut = [p if _cut(p) and p.dim == 0 else Replicate() for p in layout.placements]
    found: Tensor = x.redistribute(placements=cut)  # type: ignore[attr-defined]
    return found


def of_samples(run: Callable[[Tensor], Tensor], op: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    """What is made of whole samples, each by itself."""
    whole = whole_samples(x)
    layout = Layout(op, whole)
    return layout.joined(run(layout.local(whole)), shape)


def check_rows(op: str, dims: int, *tensors: Tensor | None) -> None:
    """Where each row of so many dimensions has its level, the rows of a sample are together."""
    if dims > 1 and Layout(op, *tensors).sharded(range(1, dims)):
        # A rank has the levels of whole samples, as they are gathered by the batch alone.
        raise NotImplementedError(
            f"{op}: levels of {dims} dimensions need samples that are whole in those, as every rank has the levels of "
            "whole samples: redistribute the samples"
        )


def beside(t: Tensor, x: Tensor) -> Tensor:
    """A plain tensor as a replicated DTensor on x's mesh, for torch's own arithmetic between the two."""
    mesh = x.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
