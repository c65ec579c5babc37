"""A method's steps as launches: rows of one table, and for each look the map that reads what is not 0 in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.spec import ABSENT, Coefficients, Map, map_of
from ..noise import Noise
from ..ops.parameterisation import Parameterisation, conversion
from ..primitives.sums import At, affine
from .network import GUIDED, cfg_combine, rescaled
from .steps import Place, Step, library_of
from .x0_clip import X0Clip, thresholded

NOTHING, NOISE, RAW, UNCONDITIONAL, KEPT = range(5)  # what is read besides x and the prediction; KEPT + k: b_(k + 1)
OUTPUTS = "x", "kept", "x0", "mean"  # x_s; x_s and what is kept; x_s and the x0 estimate; x_s without its noise


class Look(NamedTuple):
    """The launch of one look.

    maps: by OUTPUTS      z, w, v: what those tensors are, v a fifth stream
    five: whether there is one, which is the noise where the look adds some beside two tensors; else the noise is z
    noisy: whether it reads noise      reads: how many of those kept it needs
    """

    maps: tuple[Map | None, ...]
    z: int
    w: int
    v: int
    five: bool
    noisy: bool
    reads: int

    def map(self, outputs: str) -> Map:
        found = self.maps[OUTPUTS.index(outputs)]
        assert found is not None
        return found


def estimate(predict: Parameterisation, at: Place, to: Parameterisation) -> tuple[Tensor, Tensor]:
    """`to` = a_x * x_t + a_p * prediction: the columns."""
    a_x, a_p = conversion(predict, to)(*at)
    zero = 0 * at.alpha
    return zero + a_x, zero + a_p


class Guided(NamedTuple):
    """Guidance g, (L,), or (L, B) for samples with their own, and how far the result is rescaled."""

    g: Tensor
    rescale: float


class Launches:
    """One launch a look: x_s, and with `keeps` what later looks read ("x0" or "eps"; "x" is kept as it is).

    at: where x_t is at each look
    guided: the prediction is g*c + (1 - g)*u of a conditional c and an unconditional u (Ho and Salimans 2022), both
        read by the launch while it has room: else combined before it, as where it is rescaled
    table: (L, K) float64, or (L*B, K)
    Where x0_hat is not limited its coefficients are multiplied into those of x and the prediction: none is made.
    """

    def __init__(
        self,
        op: str,
        at: Place,
        step: Step,
        predict: Parameterisation,
        clip: X0Clip,
        guided: Guided | None = None,
        keeps: str = "",
    ) -> None:
        guidance, self.rescale = (None, 0.0) if guided is None else guided
        self.op, self.clip, self.keeps, self.bounds = op, clip, keeps, clip.bounds
        self.parts = () if guidance is None else GUIDED
        self.batch = guidance.shape[1] if guidance is not None and guidance.dim() == 2 else None
        self.depth = len(step.before)
        self._columns = columns = _folded(at, step, predict, clip.bounds is not None, keeps)
        self.noisy: list[bool] = (columns["noise"] != 0).tolist()
        streams = [self._streams(i, guidance is not None) for i in range(len(at.alpha))]
        self.combines = self.rescale != 0 or any(len(s) > 3 for s in streams)
        if guidance is not None:
            g = guidance if guidance.dim() == 2 else guidance[:, None]
            for name in ("y", "a_y", "k_y", "m_y", "raw"):
                if name in columns:
                    factor = torch.ones_like(g) if self.combines or _of_estimate(name, self.bounds) else g
                    columns[name], columns[f"{name}_u"] = (
                        columns[name][:, None] * factor,
                        columns[name][:, None] * (1 - g),
                    )
            columns["g"], columns["not_g"] = g, 1 - g
        if self.combines:
            streams = [[s for s in those if s != UNCONDITIONAL] for those in streams]
        wide = [c if c.dim() == 2 else c[:, None] for c in columns.values()]
        self.table = torch.stack(torch.broadcast_tensors(*wide), -1).flatten(0, 1).contiguous()
        self._place = {name: k for k, name in enumerate(columns)}
        self.looks = [self._look(i, those) for i, those in enumerate(streams)]

    def _streams(self, i: int, guided: bool) -> list[int]:
        """What look i reads besides x and the prediction, in the order of z, w and a fifth stream."""
        read = [KEPT + k for k in range(self.depth) if self._columns[f"before{k}"][i] != 0]
        if "raw" in self._columns and self._columns["raw"][i] != 0:
            read.append(RAW)
        if guided:
            read.append(UNCONDITIONAL)
        return read + [NOISE] * self.noisy[i]

    def _look(self, i: int, streams: list[int]) -> Look:
        noisy = NOISE in streams
        tensors = [s for s in streams if s != NOISE]
        # The estimate reads x, y and w alone, so u is w; noise beside one tensor is z, as in a map of four streams.
        slots = [NOTHING] * 3
        if UNCONDITIONAL in tensors:
            slots[1] = UNCONDITIONAL
        free = [k for k in (0, 1, 2) if slots[k] == NOTHING]
        if noisy:
            at = 0 if len(tensors) < 2 else 2
            slots[at] = NOISE
            free.remove(at)
        for s in tensors:
            if s != UNCONDITIONAL:
                slots[free.pop(0)] = s
        guided = bool(self.parts) and not self.combines
        z, w, v = slots
        return Look(
            tuple(self._map(slots, guided, outputs) for outputs in OUTPUTS),
            NOTHING if z == NOISE else z,
            w,
            NOTHING if v == NOISE else v,
            v != NOTHING,
            noisy,
            max((s - KEPT + 1 for s in streams if s >= KEPT), default=0),
        )

    def _map(self, slots: list[int], guided: bool, outputs: str) -> Map | None:
        if outputs == "kept" and self.keeps not in ("x0", "eps"):
            return None
        if outputs == "mean":
            slots = [NOTHING if s == NOISE else s for s in slots]
        place = self._place
        inner = None if self.bounds is None else (place["a_x"], place["a_y"], place["a_y_u"] if guided else ABSENT)
        names = {NOTHING: "", NOISE: "noise", RAW: "raw", UNCONDITIONAL: "raw_u" if self.bounds else "y_u"}

        made = [[place["x"], place["y"], *(place.get(names.get(s, f"before{s - KEPT}"), ABSENT) for s in slots)]]
        if outputs in ("kept", "x0"):
            head = "k" if outputs == "kept" else "m"
            of_u = ABSENT if self.bounds else place.get(f"{head}_y_u", ABSENT)
            made.append(
                [place[f"{head}_x"], place[f"{head}_y"], *(of_u if s == UNCONDITIONAL else ABSENT for s in slots)]
            )
        five = slots[2] != NOTHING
        flat = [c for output in made for c in output[:4]] + [output[4] for output in made if five]
        return map_of(self.op, tuple(flat), inner)

    @property
    def is_plain(self) -> bool:
        """Whether every look is a launch of x, one prediction, noise and what was kept."""
        return not (self.parts or self.clip.quantile)

    def affine_rows(self) -> list[tuple[float, float, float]]:
        """Of each look what multiplies x, the prediction and the noise, where nothing is limited."""
        columns = (self._columns[name].tolist() for name in ("x", "y", "noise"))
        return list(zip(*columns, strict=True))

    def std(self, i: int) -> float:
        """Of the noise of a look."""
        return float(self._columns["noise"][i])

    def rows(self, table: Tensor, i: int) -> At:
        return (table, i) if self.batch is None else (table[i * self.batch : (i + 1) * self.batch], None)

    def first_row(self, i: int) -> int:
        """Of look i, whose rows differ in guidance alone."""
        return i * (self.batch or 1)

    def __call__(
        self,
        table: Tensor,
        i: int,
        x: Tensor,
        prediction: Sequence[Tensor],
        noise: Noise | Tensor | None,
        kept: tuple[Tensor, ...] = (),
        outputs: str = "x",
    ) -> tuple[Tensor, ...]:
        """`outputs`, of OUTPUTS. table: self.table in the dtype of the arithmetic, on x's device."""
        look, rows = self.looks[i], self.rows(table, i)
        if self.combines:
            prediction = (self.combined(table, i, prediction),)
        p, u = prediction if len(prediction) == 2 else (prediction[0], None)
        streams = (None, None, p, u, *kept)
        z, w = streams[look.z], streams[look.w]
        if isinstance(noise, Tensor) and not look.five:
            z, noise = noise, None
        if look.v:
            noise = streams[look.v]
        spec = look.map(outputs)
        if self.clip.quantile is None:
            return affine(spec, (x, p, z, w), noise, rows, self.bounds)
        row = rows[0] if rows[1] is None else table[i : i + 1]
        of_x0 = map_of(self.op, (0, 1, ABSENT, ABSENT if u is None else 2))
        (x0_hat,) = affine(of_x0, (x, p, None, u), None, Coefficients(row[:, :3].contiguous(), None))
        row = thresholded(row, x0_hat, self.clip.quantile)
        return affine(spec, (x, p, z, w), noise, Coefficients(row, None), self.bounds)

    def combined(self, table: Tensor, i: int, prediction: Sequence[Tensor]) -> Tensor:
        """The prediction under guidance, in a launch of its own."""
        if len(prediction) == 1:
            return prediction[0]
        row, first = self.rows(table, i)
        row = row if first is None else row[first : first + 1]
        g = self._place["g"]  # beside 1 - g
        made = cfg_combine(self.op, row[:, g : g + 2].contiguous(), prediction)
        return rescaled(made, prediction[0], self.rescale) if self.rescale else made


def _of_estimate(name: str, bounds: object) -> bool:
    """Whether a column multiplies the limited estimate, in which guidance is already."""
    return bounds is not None and name in ("y", "k_y", "m_y")


def times(column: Tensor | None, factor: Tensor) -> Tensor:
    """0 where the column is 0, whatever the factor."""
    if column is None:
        return torch.zeros_like(factor)
    product: Tensor = library_of(factor).where(column == 0, 0.0, column * factor)
    return product


def _folded(at: Place, step: Step, predict: Parameterisation, clips: bool, keeps: str) -> dict[str, Tensor]:
    """The columns of the table: a_x, a_y of the estimate, first; x and y, the prediction or the limited estimate;
    those of what is kept, k, and of x0_hat, m."""
    zero = torch.zeros_like(at.alpha)
    of_x0, of_eps = estimate(predict, at, "x0"), estimate(predict, at, "eps")
    x, noise = (zero if c is None else c for c in (step.x, step.noise))
    columns: dict[str, Tensor] = {}
    if not clips:
        columns["x"] = x + times(step.x0, of_x0[0]) + times(step.eps, of_eps[0])
        columns["y"] = times(step.x0, of_x0[1]) + times(step.eps, of_eps[1])
        kept = of_x0 if keeps == "x0" else of_eps
        shown = of_x0
    else:
        columns |= {"a_x": of_x0[0], "a_y": of_x0[1], "a_y_u": zero}
        if step.raw:
            columns["x"], columns["y"] = x + times(step.eps, of_eps[0]), times(step.x0, zero + 1)
            columns["raw"] = times(step.eps, of_eps[1])
        else:
            columns["x"] = x + times(step.eps, 1 / at.sigma)
            columns["y"] = times(step.x0, zero + 1) - times(step.eps, at.alpha / at.sigma)
        kept = (zero, zero + 1) if keeps == "x0" else (1 / at.sigma, -at.alpha / at.sigma)
        shown = (zero, zero + 1)
    if keeps in ("x0", "eps"):
        columns["k_x"], columns["k_y"] = kept
    columns["m_x"], columns["m_y"] = shown
    return columns | {"noise": noise, **{f"before{k}": b for k, b in enumerate(step.before)}}
