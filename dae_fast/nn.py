"""Modules: a whole training objective at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from ._torch import gathered
from .checks import Array, can_read, like, samples
from .coefficients import Formula, Level, gather
from .continuous import ContinuousSchedule, Density
from .kernels.spec import KindName, compute_dtype
from .noise import Noise, noise_for
from .ops.conversions import to_x0
from .ops.losses import (
    MSE,
    AnyNoise,
    Compared,
    Delta,
    LossColumns,
    Penalty,
    Selecting,
    against_target,
    check_level_weight,
    fast_against_target,
    formula_of,
    loss_weight,
    product,
)
from .ops.noising import add_noise
from .ops.parameterisation import EDM, Parameterisation, check_name
from .ops.structured import StructuredNoise
from .ops.weighting import Weight, Weighting, check_weighting, weight_for
from .primitives import LevelOp, kind_of, mask_of, reduction_of
from .primitives.residuals import Summed
from .schedule import Schedule

SELF_TAG = 0x73656C66  # "self"; whether a batch is conditioned on its own estimate

__all__ = ["DenoisingLoss", "EDMPreconditioner", "LevelStatistics"]


class DenoisingLoss(torch.nn.Module):
    """The denoising objective: draw a level, noise the data, compare the network with its target.

    schedule: Schedule or ContinuousSchedule
    predict: what the network predicts, "eps", "x0", "v", "score", "flow", or EDM's F as EDM(sigma_data)
    weighting: what each level counts, as denoising_loss's weight without a tensor
    level_weight: (T,) a weight for each level of a Schedule, or None; a buffer, so it moves with the module
    kind, delta: the penalty, as denoising_loss's
    density: of a ContinuousSchedule, how its times are drawn instead of by its own
    self_condition: in [0, 1], how often net sees its own estimate of x0 from a look without gradient as x_self_cond=,
        like x_t; it is zeros else, and at that look; 0: there is no such argument. The noise's key decides, under
        SELF_TAG, for the whole batch; a key in memory costs the look always. Chen et al. 2023 have 0.5

    loss(net, x0, noise) calls net(x_t, t) and returns {"loss", "noise_mse", "x0_mse"}: the objective,
    with its gradient, and the mean squared errors of the implied noise and x0 estimates, without, all
    from one pass. Of a discretised ContinuousSchedule the network is told the times. With a Noise the
    levels too are a function of (seed, step, sample), and neither the noise nor the target is stored.
    Raises ValueError for a Schedule with a level where the prediction does not determine both x0 and
    eps (eps where alpha = 0, x0 or score where sigma = 0): predict v there. A kind other than "mse" takes a pass
    more, for the two errors. Ho et al. 2020, algorithm 1.
    """

    level_weight: Tensor | None
    __call__: Callable[..., dict[str, Tensor]]

    def __init__(
        self,
        schedule: Schedule | ContinuousSchedule,
        predict: Parameterisation = "eps",
        *,
        weighting: Weight = None,
        level_weight: Tensor | Array | None = None,
        kind: KindName = "mse",
        delta: Delta | None = None,
        density: Density | None = None,
        self_condition: float = 0.0,
    ) -> None:
        super().__init__()
        op = "DenoisingLoss"
        check_name(op, "predict", predict)
        if isinstance(weighting, Tensor):
            raise TypeError(f"{op}: weighting must be no tensor; give level_weight, or weight with the batch")
        if not isinstance(schedule, (Schedule, ContinuousSchedule)):
            got = type(schedule).__name__
            raise TypeError(f"{op}: schedule must be a Schedule or a ContinuousSchedule, got {got}")
        if weighting is not None and not (isinstance(weighting, str) and weighting == "uniform"):
            check_weighting(op, weighting)
        counts: Tensor | None = checks.as_tensor(level_weight)
        if counts is not None:
            if not isinstance(schedule, Schedule):
                raise ValueError(f"{op}: level_weight needs a Schedule, whose levels are counted")
            check_level_weight(op, schedule, counts)
        kind_of(op, kind, delta)
        if delta is not None and not callable(delta):
            delta = checks.number(op, "delta", delta, "positive and finite")
        if density is not None:
            if not isinstance(schedule, ContinuousSchedule):
                raise ValueError(f"{op}: density needs a ContinuousSchedule, whose times it draws")
            checks.function(op, "density", density)
        self.self_condition = checks.number(op, "self_condition", self_condition, "in [0, 1]")
        self.schedule = schedule
        self.predict = predict
        self.weighting = weighting
        self.kind, self.delta, self.density = kind, delta, density
        self.register_buffer("level_weight", counts)
        self._columns, self._formula = self._planned()
        if isinstance(schedule, Schedule) and self._formula.key:  # none where this is traced
            self._formula.table(schedule, torch.float32, torch.device("cpu"), op)

    def _planned(self) -> tuple[LossColumns, Formula]:
        """The table's columns, and what they are of a level."""
        plain = self.weighting is None or self.weighting == "uniform"
        named = None if plain else check_weighting("DenoisingLoss", self.weighting)
        columns = LossColumns(self.predict, named if isinstance(named, Weighting) else None, errors=True)
        return columns, formula_of(columns)

    def __getstate__(self) -> dict[str, Any]:
        """Plain data, which torch.load(weights_only=True) takes: what is worked out of it is made again."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_columns", "_formula")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._columns, self._formula = self._planned()

    def draw_levels(self, noise: Noise, x0: Tensor) -> Tensor:
        """(B,) schedule.draw: int64 levels or float32 times, a function of the noise's key and sample ids."""
        if isinstance(self.schedule, ContinuousSchedule):
            return self.schedule.draw(noise, x0.shape[0], density=self.density, device=x0.device)
        return self.schedule.draw(noise, x0.shape[0], device=x0.device)

    def forward(
        self,
        net: Callable[..., Tensor],
        x0: Tensor,
        noise: AnyNoise,
        t: Tensor | Array | None = None,
        *,
        weight: Tensor | None = None,
        mask: Tensor | Selecting | None = None,
        **net_arguments: Any,
    ) -> dict[str, Tensor]:
        """The objective at the levels t of x_t = alpha * x0 + sigma * eps.

        net(x_t, t, **net_arguments): the prediction, like x0 (its dtype may differ)
        x0: (B, ...) fp16/bf16/fp32/fp64      noise: Noise, OffsetNoise, PyramidNoise, or a tensor like x0
        t: (B,) int32/int64 levels, or floating times; None draws them, and needs a Noise
        weight: (B,) and mask, as in noise_mse
        returns: "loss" = mean_b w_b * mse_b of the prediction, with its gradient; "noise_mse" and
        "x0_mse", unweighted and without; scalars, fp32 (fp64 for fp64)
        Raises ValueError on a shape mismatch, a level outside the schedule or an empty batch.
        """
        op = "DenoisingLoss"
        checks.function(op, "net", net)
        samples(op, "x0", x0)
        if not isinstance(noise, StructuredNoise):
            noise_for(op, noise, x0, "x0")
        t = checks.as_tensor(t)
        if t is None:
            if not isinstance(noise, Noise):
                raise ValueError(f"{op}: t must be given unless noise is a Noise")
            t = self.draw_levels(noise, x0)
        elif not isinstance(t, Tensor):
            raise TypeError(f"{op}: t must be a tensor (B,), got {type(t).__name__}")
        elif t.device != x0.device:
            raise ValueError(f"{op}: t must be on {x0.device} like x0, got {t.device}")
        level = self.schedule[t]
        x_t = add_noise(x0, noise, level)
        if self.self_condition:
            net_arguments["x_self_cond"] = self._own_estimate(net, x_t, noise, t, level, net_arguments)
        pred = net(x_t, self._told(t), **net_arguments)
        like(op, "the network's output", pred, "x0", x0)
        w = loss_weight(op, pred, level, weight, self.level_weight)
        _, by_level = weight_for(op, self.weighting, level, pred, self.predict)
        if by_level is not None:
            w = product(w, by_level)
        compared = Compared(pred, x0, noise, level)
        if self.kind == "mse":
            loss, errors = _loss(compared, self._columns, w, mask)
        else:
            columns = LossColumns(self.predict, self._columns.weighting)
            loss, _ = _loss(compared, columns, w, mask, Penalty(self.kind, self.delta))
            with torch.no_grad():
                _, errors = _loss(compared, self._columns, None, mask)
        assert errors is not None
        noise_mse, x0_mse = errors.unbind()
        return {"loss": loss, "noise_mse": noise_mse, "x0_mse": x0_mse}

    def _own_estimate(
        self,
        net: Callable[..., Tensor],
        x_t: Tensor,
        noise: AnyNoise,
        t: Tensor,
        level: Level,
        net_arguments: dict[str, Any],
    ) -> Tensor:
        """x0 as the network sees it without an estimate before, or zeros; without gradient."""
        op, nothing = "DenoisingLoss", torch.zeros_like(x_t, requires_grad=False)
        stream = noise._noise if isinstance(noise, StructuredNoise) else noise
        if not isinstance(stream, Noise):
            raise ValueError(f"{op}: self_condition needs a Noise, whose key decides, got a tensor")
        key = stream.fold_in(SELF_TAG).key
        chosen = (key[0] & 0xFFFF_FFFF) < self.self_condition * 2.0**32
        if chosen is False:
            return nothing
        with torch.no_grad():
            pred = net(x_t, self._told(t), x_self_cond=nothing, **net_arguments)
            like(op, "the network's output", pred, "x0", x_t)
            estimate = to_x0(x_t, pred, level, predict=self.predict).to(x_t.dtype)
        return estimate if chosen is True else torch.where(chosen.to(x_t.device), estimate, nothing)

    def extra_repr(self) -> str:
        parts = [f"{self.schedule}, predict={self.predict!r}"]
        if self.weighting is not None:
            parts.append(f"weighting={self.weighting!r}")
        if self.level_weight is not None:
            parts.append(f"level_weight={tuple(self.level_weight.shape)}")
        if self.self_condition:
            parts.append(f"self_condition={self.self_condition}")
        if self.kind != "mse":
            parts.append(f"kind={self.kind!r}")
        parts += [f"{name}={value}" for name in ("delta", "density") if (value := getattr(self, name)) is not None]
        return ", ".join(parts)

    def _told(self, t: Tensor) -> Tensor:
        return self.schedule._told(t) if isinstance(self.schedule, Schedule) else t


def _loss(
    compared: Compared,
    columns: LossColumns,
    weight: Tensor | None,
    mask: Tensor | Selecting | None,
    penalty: Penalty = MSE,
) -> Summed:
    """The mean over the batch, and the errors of eps and x0 where the columns have them."""
    op = "DenoisingLoss"
    if mask is None and penalty.delta is None:
        summed = fast_against_target(op, compared, columns, weight, "mean", penalty.kind)
        if summed is not None:
            return summed
    chosen, how = mask_of(op, compared.pred, mask), reduction_of(op, compared.pred, "mean")
    loss, _, errors = against_target(op, compared, columns, weight, chosen, how, penalty)
    return loss, errors


class EDMPreconditioner(torch.nn.Module):
    """D(x_t, level) = c_skip * x_t + c_out * net(c_in * x_t, c_noise), an estimate of x0 (Karras et al. 2022).

    net(x, c_noise, **arguments): its output like x (its dtype may differ), c_noise (B,) or (1,) = log(sigma/alpha)/4
    sigma_data: > 0, the standard deviation of the data
    With s = sqrt(sigma^2 + (alpha sigma_data)^2): c_skip = alpha sigma_data^2/s^2, c_out = sigma sigma_data/s,
    c_in = 1/s; table 1 where alpha = 1. The network is called between two fused passes.

    Train D with predict="x0", weight=weighting.EDM(sigma_data), or, a pass less, F with predict=EDM(sigma_data) and
    no weight: the same loss.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, net: Callable[..., Tensor], sigma_data: float = 0.5) -> None:
        super().__init__()
        checks.function("EDMPreconditioner", "net", net)
        self.net = net
        self.predict = EDM(sigma_data)
        self._skip, self._scale, self._noise = _preconditioning(self.predict)

    def __getstate__(self) -> dict[str, Any]:
        """Plain data, as of DenoisingLoss."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_skip", "_scale", "_noise")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._skip, self._scale, self._noise = _preconditioning(self.predict)

    def forward(self, x_t: Tensor, level: Level | Tensor | float, **arguments: Any) -> Tensor:
        """The estimate of x0, like x_t, or of the wider dtype where the network's output is wider.

        x_t: (B, ...) fp16/bf16/fp32/fp64      level: Level, or sigma of alpha = 1: a float, or a tensor () or (B,)
        Raises ValueError on a shape mismatch, or where alpha or sigma is 0 (c_noise is infinite).
        """
        level = self._level(level)
        return self._skip.run(level, (x_t, self.raw(x_t, level, **arguments)))

    def extra_repr(self) -> str:
        return f"sigma_data={self.predict.sigma_data}"

    def raw(self, x_t: Tensor, level: Level | Tensor | float, **arguments: Any) -> Tensor:
        """F = net(c_in * x_t, c_noise), what a loss with predict=EDM(sigma_data) compares."""
        op, level = "EDMPreconditioner", self._level(level)
        samples(op, "x_t", x_t)
        scaled = self._scale.run(level, (x_t,))
        noise_level = gather(op, self._noise.rows(level, x_t, compute_dtype(x_t.dtype)), x_t)[:, 0]
        dims = level._dims()
        F = self.net(scaled, noise_level.reshape(x_t.shape[:dims]) if dims > 1 else noise_level, **arguments)
        like(op, "the network's output", F, "x_t", x_t)
        return F

    @staticmethod
    def _level(level: Level | Tensor | float) -> Level:
        if isinstance(level, Level):
            return level
        if not checks.is_number(level) and not (isinstance(level, Tensor) and level.is_floating_point()):
            got = level.dtype if isinstance(level, Tensor) else type(level).__name__
            raise TypeError(f"EDMPreconditioner: level must be a Level or sigma, a number or floats (B,), got {got}")
        return Level(1.0, level)


@lru_cache(maxsize=16)
def _preconditioning(predict: EDM) -> tuple[LevelOp[Tensor], LevelOp[Tensor], Formula]:
    """c_skip * x_t + c_out * F, c_in * x_t, and c_noise."""
    op, of = "EDMPreconditioner", predict.preconditioning

    def skip(alpha: Any, sigma: Any) -> dict[str, Any]:
        c_skip, c_out, _, _ = of(alpha, sigma)
        return {"x_t": c_skip, "F": c_out}

    return (
        LevelOp(op, skip),
        LevelOp(op, lambda alpha, sigma: {"x_t": of(alpha, sigma)[2]}),
        Formula(op, ("c_noise",), lambda alpha, sigma: (of(alpha, sigma)[3],)),
    )


class LevelStatistics(torch.nn.Module):
    """Count, mean and second moment of the loss at each level, gathered where the losses are: nothing synchronises.

    bins: T, one for each level of a Schedule, or their edges (N + 1,), increasing: bin i holds edges[i] <= t <
            edges[i + 1] (continuous times, sigmas, log-SNRs), and the last its right edge too
    decay: in (0, 1], by which every update multiplies what was there before

    update(t, loss_b) with denoising_loss(..., return_per_sample=True). The sums are float64 buffers, `count`, `total`
    and `squares` (N,): they move with the module, and add up over processes (all_reduce each, and `seen`, how many
    losses each bin was ever given, without decay). A loss that is not finite is left out, and counted in `left_out`.
    After to_empty(), as of every module, reset_parameters(). Raises TypeError or ValueError for other arguments.
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    seen: Tensor
    left_out: Tensor
    edges: Tensor | None

    def __init__(self, bins: int | Tensor | Array | Sequence[float], *, decay: float = 1.0) -> None:
        super().__init__()
        op = "LevelStatistics"
        self._edges: tuple[float, ...] | None = None
        if isinstance(bins, np.integer):
            bins = int(bins)
        if isinstance(bins, int):
            if isinstance(bins, bool) or bins < 1:
                raise ValueError(f"{op}: bins must be a positive int or edges (N + 1,), got {bins}")
        else:
            edges = checks.float64(op, "bins", bins)
            if edges.dim() != 1 or len(edges) < 2 or not (edges[1:] > edges[:-1]).all():
                raise ValueError(f"{op}: edges must be (N + 1,) and increase, got {bins}")
            self._edges = tuple(edges.tolist())
        self.decay = checks.number(op, "decay", decay)
        if not 0 < self.decay <= 1:
            raise ValueError(f"{op}: decay must be in (0, 1], got {decay}")
        N = bins if isinstance(bins, int) else len(bins) - 1
        self.register_buffer("edges", None if self._edges is None else torch.empty(N + 1, dtype=torch.float64))
        for name in ("count", "total", "squares", "seen"):
            self.register_buffer(name, torch.empty(N, dtype=torch.float64))
        self.register_buffer("left_out", torch.empty((), dtype=torch.float64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget every loss."""
        for buffer in (self.count, self.total, self.squares, self.seen, self.left_out):
            buffer.zero_()
        if self.edges is not None and self._edges is not None:
            self.edges.copy_(torch.tensor(self._edges, dtype=torch.float64, device="cpu"))

    def extra_repr(self) -> str:
        return f"{len(self.count)} bins, decay={self.decay}"

    @torch.no_grad()
    def update(self, t: Tensor, loss: Tensor) -> None:
        """Add the losses (B,) of samples at levels t (B,), on the buffers' device.

        A t outside the bins raises ValueError on the CPU; on a GPU it is left out.
        """
        op, N = "LevelStatistics", len(self.count)
        t, loss = gathered(t), gathered(loss)
        for name, value in (("t", t), ("loss", loss)):
            if not isinstance(value, Tensor) or value.dim() != 1 or value.shape != t.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{op}: {name} must be a tensor (B,), t and loss of one length, got {got}")
            if value.is_complex() or value.dtype == torch.bool or value.device != self.count.device:
                raise TypeError(
                    f"{op}: {name} must be of real numbers on {self.count.device}, got {value.dtype} on {value.device}"
                )
        if self.edges is None:
            if t.is_floating_point():
                raise TypeError(f"{op}: t must be of integers where bins are counted, got {t.dtype}")
            place, inside = t.long(), (t >= 0) & (t < N)
        else:
            wide = t.double()
            inside = (wide >= self.edges[0]) & (wide <= self.edges[-1])
            place = torch.bucketize(wide, self.edges, right=True) - 1
        if can_read(t) and not inside.all():
            b = int((~inside).nonzero()[0, 0])
            raise ValueError(f"{op}: t must lie in the bins, got {t[b].item()} for sample {b}")
        value = loss.double()
        finite = value.square().isfinite()
        self.left_out += (inside & ~finite).sum()
        counts = inside & finite
        place, one, value = place.clamp(0, N - 1), counts.double(), torch.where(counts, value, 0.0)
        for buffer, added in ((self.count, one), (self.total, value), (self.squares, value.square())):
            buffer.mul_(self.decay).index_add_(0, place, added)
        self.seen.index_add_(0, place, one)

    @property
    def mean(self) -> Tensor:
        """(N,) float64, of the loss; NaN for a bin without any."""
        return self.total / self.count

    @property
    def second_moment(self) -> Tensor:
        """(N,) float64, of the loss; NaN for a bin without any."""
        return self.squares / self.count

    def probabilities(self, *, least: float = 10.0, uniform: float = 0.001) -> Tensor:
        """(N,) p, (1 - uniform) sqrt(second_moment) normalised, + uniform/N: levels drawn by the size of their loss.

        Uniform until every bin has seen at least `least` losses, however much of them has faded since; and where one
        has faded to nothing. t = torch.multinomial(p, B, replacement=True), and the loss keeps its mean with
        weight=1 / (N * p[t]). Nichol and Dhariwal 2021, section 3.3.
        """
        least = checks.number("LevelStatistics", "least", least, "finite and not negative")
        uniform = checks.number("LevelStatistics", "uniform", uniform, "in [0, 1]")
        N = len(self.count)
        known = (self.seen >= least) & (self.count > 0)
        size = torch.where(known, self.second_moment, 1.0).sqrt()
        p = (1 - uniform) * size / size.sum() + uniform / N
        return torch.where(known.all() & (size.sum() > 0), p, 1 / N)
