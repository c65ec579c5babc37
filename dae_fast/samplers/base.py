"""A sampler: its options, the step, and the loop around it. A method adds its paper's coefficients alone."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from .. import checks
from .._torch import outside_modes
from ..coefficients import Level
from ..kernels.spec import compute_dtype
from ..noise import Noise
from ..ops.brownian import BrownianNoise
from ..ops.conversions import Bounds
from ..ops.parameterisation import Parameterisation
from ..routing import beside, fast_step
from ..schedule import Schedule
from .arguments import ARGUMENTS, Network, Noises, Start, looked_at
from .density import REDUCTIONS, Density
from .launch import Guided, Launches
from .levels import Conditioning, Levels, Route, Schedules, Told, grid, model_times, walked
from .network import OUTPUT, Guidance, bound, call_model, guidance_scales, model_time, outputs, with_variance
from .running import Capture, called_back, progressed, rounded, run
from .start import check_start, device_of_start, draw_start, stream_of, warn_of_signal
from .steps import Place, Step, path_times
from .x0_clip import x0_clip

Callback = Callable[[int, float, Tensor, Tensor], Any]
PLANS = 64  # kept, and with them their schedules


class Walk(NamedTuple):
    """The looks of a sampler and their coefficients.

    levels: of each look      at: where x_t is there      tags: what the noise of a look is folded with, its level
    told: what the network is told      step: the coefficients      keeps: what a look keeps for later ones: "x0",
        "eps", or "x", x_t itself where the look is one of `holds`      where: the name of the first level
    """

    levels: tuple[int, ...]
    at: Place
    told: Told
    step: Step
    keeps: str = ""
    holds: tuple[bool, ...] = ()
    tags: tuple[int, ...] = ()
    where: str = ""


HOLDS = -1  # x itself is kept
Quick = tuple[Any, Any, int, int, int, "int | None", int, int]  # core, bounds, z, w, v, tag, reads, keeps


class Plan(NamedTuple):
    """What is worked out once for a sampler.

    quick: of each look what a plain step needs, where a step is one launch      where: the name of the first level
    facts: what else a method wants to know of each look      times: of a path of noise, at each look and at the end
    """

    levels: tuple[int, ...]
    told: Told
    tags: tuple[int, ...]
    holds: tuple[bool, ...]
    launches: Launches
    table: Tensor
    first: tuple[float, float]
    where: str = ""
    quick: list[Quick] | None = None
    facts: list[bool] | None = None
    times: tuple[float, ...] = ()


class Asked(NamedTuple):
    """The network of a loop, the dtype that it takes, and whether the loop wants its estimates of x0."""

    net: Network
    dtype: torch.dtype
    wants_x0: bool


class More(NamedTuple):
    """What a method adds to its plan: (L, ...) columns of the table besides those of the launches, and facts."""

    columns: Tensor
    facts: list[bool]


def planned(walk: Walk, launches: Launches, one_launch: bool, more: More | None = None) -> Plan:
    table = launches.table
    if more is not None:
        table = torch.cat((table, more.columns.repeat_interleave(launches.batch or 1, 0)), 1)
    tags = walk.tags or walk.levels
    quick = None
    if launches.is_plain and one_launch:
        kept = launches.depth if launches.keeps in ("x0", "eps") else 0
        keeps = [HOLDS if held else kept for held in walk.holds or [False] * len(tags)]
        quick = [
            (
                look.map("kept" if kept else "x").core,
                launches.bounds,
                look.z,
                look.w,
                look.v,
                tag if look.noisy else None,
                look.reads,
                keep,
            )
            for look, tag, keep in zip(launches.looks, tags, keeps, strict=True)
        ]
    first = float(walk.at.alpha[0]), float(walk.at.sigma[0])
    return Plan(
        walk.levels,
        walk.told,
        tags,
        walk.holds,
        launches,
        table,
        first,
        walk.where,
        quick,
        more.facts if more else None,
    )


@dataclass(eq=False, repr=False)
class Base:
    """What all samplers share."""

    op: ClassVar[str] = "Sampler"
    checks: ClassVar[Mapping[str, checks.Check]] = {}  # of arguments, where not those of ARGUMENTS
    net_name: ClassVar[str] = "net"
    what: ClassVar[str] = OUTPUT  # what the network's output is called
    keeps: ClassVar[str] = ""  # what a look keeps for later ones, as in Walk
    reads_variance: ClassVar[bool] = False  # a learned one; else it is left out

    schedule: Schedules
    _: KW_ONLY
    predict: Parameterisation = "eps"
    clamp: Bounds | None = None
    threshold: float | None = None
    guidance: Guidance = None
    guidance_rescale: float = 0.0
    self_condition: bool = False
    variance: str | None = None
    history: tuple[Tensor, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        table = {**ARGUMENTS, **self.checks}
        for f in fields(self):
            if f.init and f.name != "levels":
                value = getattr(self, f.name)
                if value is not f.default:
                    setattr(self, f.name, looked_at(self.op, f.name, value, table))
        self._prepare()

    def _prepare(self) -> None:
        self._clip = x0_clip(self.op, self.clamp, self.threshold)
        self._plan = self._planned()
        self._density = Density(self._plan.launches)
        self._tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def _planned(self) -> Plan:
        """Made once for equal options."""
        options = tuple(v if not isinstance(v, list) else tuple(v) for v in self._options().values())
        key = type(self), *options, *map(type, options)
        # What cannot be a key is wrong: the plan says so. A tensor or a function may give something else next time.
        if is_compiling() or not all(
            isinstance(v, Hashable) and not (isinstance(v, Tensor) or callable(v)) for v in options
        ):
            with outside_modes():
                return self._make_plan()
        if key not in _plans:
            with outside_modes():
                made = self._make_plan()
            _plans[key] = made
            if len(_plans) > PLANS:
                _plans.popitem(last=False)
        _plans.move_to_end(key)
        return _plans[key]

    def _make_plan(self) -> Plan:
        raise NotImplementedError

    def _launches(self, walk: Walk) -> Launches:
        g = guidance_scales(self.op, self.guidance, walk.told)
        guided = None if g is None else Guided(g, self.guidance_rescale)
        return Launches(self.op, walk.at, walk.step, self.predict, self._clip, guided, walk.keeps)

    def _options(self) -> dict[str, Any]:
        """As they were given."""
        return {f.name: vars(self).get(f.name, vars(self).get(f"_{f.name}")) for f in fields(self) if f.init}

    def __repr__(self) -> str:
        default = {f.name: f.default for f in fields(self)}
        given = {name: v for name, v in self._options().items() if name != "schedule" and v is not default[name]}
        named = [f"{name}={value!r}" for name, value in given.items() if value != default[name]]
        return f"{type(self).__name__}({', '.join([repr(self.schedule), *named])})"

    def __getstate__(self) -> dict[str, Any]:
        """The options and the history; the rest is made again."""
        return {**self._options(), "history": self.history}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._prepare()

    # A loop of one's own.

    def model_times(self, x: Tensor) -> list[Tensor]:
        """What the network is told at each look, (B,) on x's device: a level as int64, else of x's dtype or fp32."""
        wide = x.to(compute_dtype(x.dtype))
        return [model_time(wide, t) for t in self._plan.told]

    def start(self, shape: Any, noise: Noises, *, device: torch.device | str | None = None) -> Tensor:
        """Pure noise of the size that x has at the first level, (B, ...) fp32: noise.fold_in(START_TAG).

        Warns where the first level is not nearly pure noise.
        """
        alpha, sigma = self._plan.first
        x = draw_start(self.op, shape, noise, alpha, sigma, "cpu" if device is None else device)
        if self._plan.where:
            warn_of_signal(self.op, self._plan.where, alpha, sigma)
        return x

    @overload
    def step(self, i: int, x: Tensor, pred: Any, noise: Noises | Tensor | None = None) -> Tensor: ...
    @overload
    def step(
        self, i: int, x: Tensor, pred: Any, noise: Noises | Tensor | None = None, *, return_x0: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def step(
        self,
        i: int,
        x: Tensor,
        pred: Any,
        noise: Noises | Tensor | None = None,
        *,
        return_log_prob: Literal[True],
        reduction: str = "mean",
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def step(
        self,
        i: int,
        x: Tensor,
        pred: Any,
        noise: Noises | Tensor | None = None,
        *,
        return_x0: Literal[True],
        return_log_prob: Literal[True],
        reduction: str = "mean",
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def step(
        self,
        i: int,
        x: Tensor,
        pred: Any,
        noise: Noises | Tensor | None = None,
        *,
        return_x0: bool = False,
        return_log_prob: bool = False,
        reduction: str = "mean",
    ) -> Any:
        """x after look i of `levels`, from x there and what the network returned: one launch.

        i: in [0, len(levels)); a sampler that keeps something from look to look (`history`) starts anew at 0
        x: (B, ...) fp16/bf16/fp32/fp64, in a half-precision loop best kept in fp32
        pred: like x, or under guidance a tuple (conditional, unconditional), whatever the dtype
        noise: a Noise, of which the look takes noise.fold_in(its level); a BrownianNoise, of which it takes the
            increment from its time to the next; or one tensor like x for this look
        return_x0: the x0 estimate, limited as the options say, too
        return_log_prob, reduction: log_prob(i, x, the result, pred), too, of a step that adds noise
        returns: like x, or a tuple of it and what is asked for besides, in this order
        Gradient: of x and pred. Raises ValueError or TypeError on a mismatch, or where noise is wanted and missing.
        """
        quick = not (return_x0 or return_log_prob)
        if quick and not is_compiling():
            done = fast_step(self._plan.quick, self._tables, self.history, i, x, pred, noise)
            if done is not None:
                x_s, self.history = done
                return x_s
        i = checks.integer(self.op, "i", i, 0, len(self._plan.told) - 1)
        checks.samples(self.op, "x", x)
        prediction = self._read(pred, x)
        if isinstance(noise, Noise):
            noise._check(self.op, x.shape[0], x.device)
        elif isinstance(noise, BrownianNoise):
            noise._noise._check(self.op, x.shape[0], x.device)
        elif noise is not None:
            checks.like(self.op, "noise", noise, "x", x)
            noise = noise.to(x.dtype)
        self._check_batch(x)
        history = self.history if i else ()
        if len(history) < self._plan.launches.looks[i].reads:
            raise ValueError(
                f"{self.op}: step {i} reads what the steps before it keep, and they were not taken: start at i=0"
            )
        x_s, self.history, x0 = self._advance(i, x, prediction, noise, history, self._table(x), return_x0)
        if quick:
            return x_s
        more = (x0,) if return_x0 else ()
        if not return_log_prob:
            return (x_s, *more)
        return (x_s, *more, self._log_prob(i, x, x_s, prediction, history, reduction))

    def log_prob(
        self,
        i: int,
        x_t: Tensor,
        x_s: Tensor,
        pred: Any,
        *,
        history: Sequence[Tensor] = (),
        reduction: str = "mean",
    ) -> Tensor:
        """log p(x_s | x_t) of step i where it led from x_t to x_s: log N(x_s; mean(x_t, pred), std^2).

        i: of a step that adds noise      x_t, x_s: (B, ...), as they were stored, whatever the dtype
        pred: what the network returns now, as in `step`
        history: of a step that reads what those before it keep, `sampler.history` as it was then: the density is that
            given x_t and it
        reduction: over a sample's elements, "mean" (Flow-GRPO, DDPO) or "sum" (the density)
        returns: (B,) fp32 (fp64 for fp64)
        One pass where the mean is an affine map of x_t and pred, which then gives the gradient of pred too; two under
        guidance, limits of x0 or of what was kept, more of a learned variance. Of the same stored tensors and
        predictions it is what `step` gave, bit for bit, so the ratio exp(log_prob - old) is 1 exactly, however the
        batch is split (in fp64 on a GPU: of the same batch).
        Gradient: of pred, x_t, x_s and history. Raises ValueError for a step without noise or a Gaussian density.
        Black et al. 2024 (DDPO), eq. 6; Liu et al. 2025 (Flow-GRPO).
        """
        i = checks.integer(self.op, "i", i, 0, len(self._plan.told) - 1)
        checks.samples(self.op, "x_t", x_t)
        checks.like(self.op, "x_s", x_s, "x_t", x_t)
        self._check_batch(x_t)
        for kept in history:
            checks.like(self.op, "what history keeps", kept, "x_t", x_t)
        read = tuple(kept.to(x_t.dtype) for kept in history)
        return self._log_prob(i, x_t, x_s.to(x_t.dtype), self._read(pred, x_t), read, reduction)

    def _log_prob(
        self,
        i: int,
        x_t: Tensor,
        x_s: Tensor,
        prediction: tuple[Tensor, ...],
        history: tuple[Tensor, ...],
        reduction: str,
    ) -> Tensor:
        checks.one_of(*REDUCTIONS)(self.op, "reduction", reduction)
        reads = self._plan.launches.looks[i].reads
        if len(history) < reads:
            raise ValueError(
                f"{self.op}: step {i} reads what the steps before it keep: history must have {reads}, as "
                f"sampler.history before the step, got {len(history)}"
            )
        mean = self._log_density(i, x_t, x_s, prediction, history[:reads])
        return mean if reduction == "mean" else mean * (x_t[0].numel() if len(x_t) else 0)

    def _log_density(
        self, i: int, x_t: Tensor, x_s: Tensor, prediction: tuple[Tensor, ...], history: tuple[Tensor, ...]
    ) -> Tensor:
        """(B,), the mean over a sample's elements."""
        if not self._is_gaussian(i):
            raise ValueError(f"{self.op}: step {i} has no density: it is no Gaussian of x_t and the prediction")
        if not self._plan.launches.looks[i].noisy:
            raise ValueError(f"{self.op}: step {i} has no density: it adds no noise")
        return self._density(self._table(x_t), i, x_t, x_s, prediction, history)

    def _is_gaussian(self, i: int) -> bool:
        """Whether a step that adds noise has a mean and a size of it that depend on x_t and the prediction alone."""
        return True

    def _check_batch(self, x: Tensor) -> None:
        B = self._plan.launches.batch
        if B is not None and x.shape[0] != B:
            raise ValueError(f"{self.op}: guidance must have shape ({x.shape[0]},), one for each sample, got ({B},)")

    def _table(self, x: Tensor) -> Tensor:
        """In the dtype of the arithmetic, on x's device: copied once."""
        key = compute_dtype(x.dtype), x.device
        if key not in self._tables:
            table = rounded(self.op, self._plan.table, key[0]).to(x.device)
            if is_compiling():
                return table
            self._tables[key] = table
        return self._tables[key]

    def _parts(self) -> tuple[str, ...]:
        """What the network returns, where that is a tuple."""
        parts = self._plan.launches.parts
        return (*(parts or ("prediction",)), "v") if self.variance == "learned" else parts

    def _read(self, made: Any, x: Tensor) -> tuple[Tensor, ...]:
        """What a network returned, checked, in x's dtype."""
        if self.variance != "learned":
            return outputs(self.op, made, x, self._parts(), self.what)
        parts = self._parts()
        read = outputs(self.op, with_variance(made, x, len(parts) > 2), x, parts, self.what)
        return read if self.reads_variance else read[:-1]

    def _is_one_launch(self) -> bool:
        """Whether _advance is that of this class: a step is one launch."""
        return True

    def _drawn(self, i: int, noise: Noises | Tensor | None, x: Tensor) -> Noise | Tensor:
        """The noise of a look that adds some."""
        if noise is None:
            raise TypeError(f"{self.op}: step {i} adds noise: noise must be a Noise or a tensor like x, got None")
        if isinstance(noise, Noise):
            return noise.fold_in(self._plan.tags[i])
        return self._increment(i, noise, x) if isinstance(noise, BrownianNoise) else noise

    def _increment(self, i: int, path: BrownianNoise, x: Tensor) -> Tensor:
        t, s = self._plan.times[i : i + 2]
        if t == s or not math.isfinite(t):
            why = "moves at one level" if t == s else "is from a level without signal"
            raise ValueError(f"{self.op}: step {i} {why}, where a path has no increment: noise must be a Noise")
        return beside(path.increment(t, s, x.shape, dtype=x.dtype, device=x.device), x)

    def _advance(
        self,
        i: int,
        x: Tensor,
        prediction: tuple[Tensor, ...],
        noise: Noises | Tensor | None,
        history: tuple[Tensor, ...],
        table: Tensor,
        wants_x0: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        """x after look i, what is kept then, and the x0 estimate where wanted. No state is changed."""
        plan, launches = self._plan, self._plan.launches
        fresh, keeps = self._drawn(i, noise, x) if launches.looks[i].noisy else None, launches.keeps
        if keeps in ("x0", "eps"):
            x_s, kept = launches(table, i, x, prediction, fresh, history, "kept")
            x0 = kept
            if wants_x0 and keeps != "x0":
                x0 = launches(table, i, x, prediction, fresh, history, "x0")[1]
            return x_s, (kept, *history)[: launches.depth], x0
        held = (x,) if plan.holds and plan.holds[i] else ()
        if not wants_x0:
            return launches(table, i, x, prediction, fresh, history)[0], held, None
        x_s, x0 = launches(table, i, x, prediction, fresh, history, "x0")
        return x_s, held, x0

    def _before_look(self, i: int, x: Tensor, noise: Noises, table: Tensor) -> Tensor:
        """x as the network sees it at look i."""
        return x

    # The closed loop.

    def sample(
        self,
        net: Network,
        x: Start,
        noise: Noises,
        *,
        net_arguments: Mapping[str, Any] | None = None,
        progress: bool = False,
        graph: bool = False,
        gradients: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """The loop: net(x, t) and a step for every look.

        net(x_t, t): the network, like x_t, told t (B,), as `conditioning` says
        x: x_T (B, ...) fp16/bf16/fp32/fp64, or a shape: then `start`'s, on the CPU (with graph on the current CUDA
            device)
        noise: Noise; the step from level t uses noise.fold_in(t). Or a BrownianNoise, whose path is the same for any
            number of steps: its times are sigma/alpha, as k-diffusion's sigma, sigma alone in a flow, and a step takes
            the increment between its two, over the root of their distance; a start of a shape is its Noise's
        net_arguments: {name: value}, class labels say, which net is handed by name at every look; with graph bind them
            to the network instead (functools.partial), and keep that
        progress: show a bar      graph: replay the loop as a CUDA graph
        gradients: make the result differentiable with respect to x and what the network learns. Of each look x and
            what is kept are stored, no noise; the network runs again in backward (checkpointed). Not with graph
        callback(i, t, x, x0): called after look i, at which the network was told t, with x and the x0 estimate, which
            the same launch makes; a tensor that it returns goes on as x. Not with graph
        returns: like x_T: worked out in fp32 (fp64 for fp64) and rounded once, so that what is beyond 65504 is infinite
            in fp16, which is warned of on the CPU. `history` is left alone
        Raises ValueError for a shape mismatch.
        """
        op = self.op
        progress, graph = checks.flag(op, "progress", progress), checks.flag(op, "graph", graph)
        gradients = checks.flag(op, "gradients", gradients)
        net = bound(op, net, net_arguments, graph)
        checks.function(op, self.net_name, net)
        if callback is not None:
            checks.function(op, "callback", callback)
        if graph and (gradients or callback is not None):
            raise ValueError(f"{op}: graph=True runs the loop without Python: leave out callback and gradients")
        with torch.set_grad_enabled(gradients):
            if not isinstance(x, Tensor):
                x = self.start(x, noise, device=device_of_start(op, graph))
            check_start(op, x, noise)
            self._check_batch(x)
            path = (lambda key: key) if isinstance(noise, Noise) else noise._of
            wants_x0 = callback is not None or self.self_condition
            looked = partial(self._looked, Asked(net, x.dtype, wants_x0))
            loop = partial(self._loop, looked, progress, callback, path)
            ends = None if isinstance(noise, Noise) else (noise._t0, noise._t1, noise._depth)
            options = self.op, self._clip, self._plan.told, self._plan.launches.looks, self._extra(), wants_x0, ends
            capture = Capture(net, options, progress) if graph else None
            return run(op, loop, x, stream_of(noise), self._plan.table, capture)

    def _extra(self) -> object:
        """What the loop depends on besides the table, the launches and what the network is told."""
        return ()

    def _looked(
        self,
        asked: Asked,
        i: int,
        x: Tensor,
        history: tuple[Tensor, ...],
        noise: Noises,
        table: Tensor,
        estimate: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        """Look i and its step, a function of its arguments alone. estimate: of x0, that the network is told."""
        net, dtype, wants_x0 = asked
        x = self._before_look(i, x, noise, table)
        prediction = self._read(call_model(net, dtype, x, self._plan.told[i], estimate), x)
        if not (wants_x0 or is_compiling()):
            done = fast_step(self._plan.quick, table, history, i, x, prediction[0], noise)
            if done is not None:
                return *done, None
        return self._advance(i, x, prediction, noise, history, table, wants_x0)

    def _loop(
        self,
        looked: Callable[..., Any],
        progress: bool,
        callback: Callback | None,
        path: Callable[[Noise], Noises],
        x: Tensor,
        key: Noise,
        table: Tensor,
    ) -> Tensor:
        noise = path(key)
        if torch.is_grad_enabled():
            looked = partial(checkpoint, looked, use_reentrant=False)
        history: tuple[Tensor, ...] = ()
        x0 = torch.zeros_like(x) if self.self_condition else None
        for i in progressed(range(len(self._plan.told)), progress, self.op):
            x, history, x0 = looked(i, x, history, noise, table, x0 if self.self_condition else None)
            if callback is not None:
                x = called_back(self.op, callback, x, i, self._plan.told[i], x, x0)
        return x


_plans: OrderedDict[Hashable, Plan] = OrderedDict()


@dataclass(eq=False, repr=False)
class Sampler(Base):
    """A sampler over levels of a schedule, with one look by the network at each.

    schedule: Schedule, or a ContinuousSchedule, which stands for its levels discretise(steps)
    steps: in [1, T], levels from the noisiest down; None is all
    levels: instead of steps, one's own, decreasing; a start of a shape is of the first. A deterministic sampler may go
        up too (inversion), to `to_level`. Read, the level of each look
    spacing: of `steps` levels: "linspace", "leading" and "trailing" in index, as diffusers' DDIM has them (leading
        without its offset); "karras" (rho = 7) and "exponential" in sigma/alpha, the nearest levels
    from_level: the first level, T - 1 unless given, of an image that is noised to there, say
    to_level: where the last step ends, a level instead of the data
    predict: what net predicts, "eps", "x0", "v", "score", "flow" or an EDM
    conditioning: what net is told of a level: "level", t int64; "time", that of ContinuousSchedule.discretise; or
        "sigma", where alpha = 1 (Schedule.karras); "log_snr", 2 log(alpha/sigma); or a function of
        (alpha, sigma), float64 (L,) of L looks; all fp32 (fp64 for fp64). None: the time where there is one
    clamp: c or (low, high), the limits of the x0 estimate in every step
    threshold: dynamic thresholding instead, the quantile (0.995) of a sample's |x0 estimate| that becomes 1
        where it is more (Saharia et al. 2022, section 2.3)
    guidance: g, for a net that returns (conditional, unconditional): the prediction is u + g*(c - u), g = 1
        being the conditional one (Ho and Salimans 2022). A number; a sequence, one for each look; a function g(i, t) of
        the look and what the network is told; or a tensor (B,), one for each sample, read once
    guidance_rescale: phi in [0, 1], how far the prediction gets the conditional one's standard deviation in each sample
        (Lin et al. 2024, section 3.4), in passes of their own
    self_condition: net is called by `sample` with x_self_cond= the x0 estimate of the look before, zeros at first, as
        nn.DenoisingLoss(self_condition=) trains it (Chen, Zhang and Hinton 2023)
    variance: "learned", net returns one tensor more, v, or twice the channels, under guidance in both of its
        predictions; DDPM steps by it, the others leave it out, as guided-diffusion's ddim_sample
    Raises ValueError for a level from which `predict` gives no step: eps where alpha = 0 (predict v there).
    """

    last: ClassVar[int] = 0  # the level to which `steps` are spaced; -1 is the data

    _levels: ClassVar[Any]  # as they were given
    steps: int | None = None
    levels: Levels = Levels()  # noqa: RUF009
    spacing: str = "linspace"
    from_level: int | None = None
    to_level: int | None = None
    conditioning: Conditioning = None

    def coefficients(self, t: Place, s: Place) -> Step:
        """Of the steps from t to s, alpha and sigma (L,) of L levels and of what comes after each."""
        raise NotImplementedError

    def walk(self, schedule: Schedule) -> Walk:
        chosen = self._grid(schedule)
        at = Place(schedule.alpha[chosen], schedule.sigma[chosen])
        step = self.coefficients(at, self._after(schedule, at))
        return Walk(tuple(chosen), at, self._told(schedule, chosen), step, self.keeps)

    def inverted(self) -> Self:
        """The sampler that takes the same levels from the last up to the first, where a deterministic one came from.

        It starts from x at `to_level`; without, from the data, which stands for x at the last level. DDIM inversion
        (Song, Meng and Ermon 2021).
        """
        if not self._goes_up():
            raise ValueError(f"{self.op}: inverted needs a deterministic sampler, got {self!r}")
        schedule = walked(self.op, self.schedule, self._looks(), self._levels)
        first, *others = dict.fromkeys(self._passed())
        return replace(
            self,
            schedule=schedule,
            steps=None,
            levels=others[::-1],
            spacing=type(self).spacing,
            from_level=None,
            to_level=first,
        )

    def _passed(self) -> tuple[int, ...]:
        """The levels at which x is, one after the other."""
        return self.levels if self.to_level is None else (*self.levels, self.to_level)

    def reached(self) -> list[Level]:
        """Where each look's step leads."""
        return self.stops()[1:]

    def stops(self) -> list[Level]:
        """Where x is at each look, and after the last."""
        schedule = walked(self.op, self.schedule, self._looks(), self._levels)
        ends = (
            [1.0, 0.0] if self.to_level is None else [float(c[self.to_level]) for c in (schedule.alpha, schedule.sigma)]
        )
        levels = list(self.levels)
        pairs = zip(schedule.alpha[levels].tolist(), schedule.sigma[levels].tolist(), strict=True)
        return [Level(alpha, sigma) for alpha, sigma in (*pairs, ends)]

    def _goes_up(self) -> bool:
        """Whether it is deterministic, and so may raise x to noisier levels."""
        return False

    def _after(self, schedule: Schedule, at: Place) -> Place:
        """Of what comes after each level."""
        end = self.to_level
        return at.to_data() if end is None else at.to_level(float(schedule.alpha[end]), float(schedule.sigma[end]))

    def _looks(self) -> int | None:
        """How many levels `steps` of them have."""
        return self.steps

    def _grid(self, schedule: Schedule) -> list[int]:
        if self._levels is not None and self.spacing != type(self).spacing:
            raise ValueError(f"{self.op}: levels are given as they are: leave out spacing")
        route = Route(self._looks(), self._levels, self.spacing, self.from_level, self.to_level)
        return grid(self.op, schedule, route, self.last, self._goes_up())

    def _told(self, schedule: Schedule, levels: list[int]) -> Told:
        return model_times(self.op, schedule, levels, self.conditioning)

    def _make_plan(self) -> Plan:
        schedule = walked(self.op, self.schedule, self._looks(), self._levels)
        walk = self.walk(schedule)
        walk = walk._replace(where=f"level {walk.levels[0]} of {schedule}")
        one_launch = self._is_one_launch() and self.variance != "learned"
        plan = planned(walk, self._launches(walk), one_launch, self._more(schedule, walk))
        after = self._after(schedule, walk.at).at([-1])
        stops = [pair for place in (walk.at, after) for pair in zip(*(c.tolist() for c in place), strict=True)]
        plan = plan._replace(times=path_times(stops))
        schedule._require_finite(self.op, plan.table, [t for t in walk.levels for _ in range(plan.launches.batch or 1)])
        return plan

    def _more(self, schedule: Schedule, walk: Walk) -> More | None:
        return None
