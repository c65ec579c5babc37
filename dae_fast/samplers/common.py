"""What the samplers share: the start, the levels, what a network returns, and the fused step."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache, partial, wraps
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import checks
from .._torch import outside_modes
from ..checks import can_read, like, samples
from ..continuous import ContinuousSchedule
from ..graphs import replayed, start_device
from ..kernels.spec import ABSENT, Coefficients, Map, compute_dtype, map_of
from ..noise import Noise, noise_for
from ..ops.conversions import Bounds, bounds
from ..ops.parameterisation import Parameterisation, check_name
from ..primitives.sums import affine
from ..routing import beside, on_mesh
from ..schedule import Schedule
from .tables import estimate, following, reverse_table

Network = Callable[[Tensor, Tensor], Any]
Look = Callable[..., tuple[Tensor, ...]]  # by the network, of (x, t, parts), as `predicted`
Told = Sequence[int] | Sequence[float]  # what the network is told at each level
START_TAG = 0x7374617274  # "start"
UNNOISED = 0.1  # alpha/sigma from which a start of pure noise is not the law of x_t
GUIDED = "conditional", "unconditional"  # what a network returns under guidance
OUTPUT = "the network's output"
Plan = TypeVar("Plan")
P = ParamSpec("P")

ARGUMENTS: dict[str, checks.Check] = {
    "net": checks.function,
    "score": checks.function,
    "schedule": checks.instance((Schedule, ContinuousSchedule), "a Schedule or a ContinuousSchedule"),
    "noise": checks.instance(Noise, "a Noise"),
    "predict": check_name,
    "steps": checks.whole(),
    "steps_per_level": checks.whole(1),
    "corrector_steps": checks.whole(0),
    "threshold": checks.a_number,
    "eta": checks.a_number,
    "noise_scale": checks.a_number,
    "step_size": checks.a_number,
    "snr": checks.real("finite and not negative"),
    "S_churn": checks.real("finite and not negative"),
    "S_tmin": checks.real("no NaN"),
    "S_tmax": checks.real("no NaN"),
    "S_noise": checks.real("finite and not negative"),
    "use_clipped_model_output": checks.flag,
    "denoise": checks.flag,
    "progress": checks.flag,
    "graph": checks.flag,
}


ONE_OF_LEVELS = checks.instance(Schedule, "a Schedule")  # of samplers that take a step for each level


def sampler(**own: checks.Check) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """A sampler's face: its arguments looked at, no gradients. own: checks that are not those of ARGUMENTS."""

    def made(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        table = {**ARGUMENTS, **own}
        chosen = {name: table[name] for name in signature(function).parameters if name in table}
        checked: Callable[..., Tensor] = torch.no_grad()(checks.arguments(**chosen)(function))
        network = next(iter(signature(function).parameters))

        @wraps(function)
        def faced(*given: Any, **named: Any) -> Tensor:
            further = named.pop("net_arguments", None)
            if further is not None:
                net = given[0] if given else named.get(network)
                bound = _bound(function.__name__, net, further, bool(named.get("graph")))
                given, named = (bound, *given[1:]) if given else given, named if given else {**named, network: bound}
            return checked(*given, **named)

        return faced

    return made


def _bound(op: str, net: Any, further: Any, graph: bool) -> Any:
    """The network with its further arguments; what is no network is left to the check of it."""
    if not isinstance(further, Mapping) or not all(isinstance(name, str) for name in further):
        raise TypeError(f"{op}: net_arguments must be a dict of arguments by name, got {checks.kind_of(further)}")
    if graph:
        raise ValueError(
            f"{op}: graph=True keeps the captured loop with the network: give it functools.partial(net, ...), kept "
            "from call to call, and no net_arguments"
        )
    return partial(net, **further) if callable(net) else net


def stepped(op: str, schedule: Schedule | ContinuousSchedule, steps: Any, levels: Sequence[int] | None) -> Schedule:
    """What a sampler walks down: of a ContinuousSchedule as many levels as it takes steps."""
    if isinstance(schedule, Schedule):
        return schedule
    if levels is not None:
        raise ValueError(f"{op}: levels are those of a Schedule: give {schedule}.discretise(times=...), or steps")
    return _sampling_grid(schedule, checks.integer(op, "steps", steps, 1))


def begin(
    op: str, x: Tensor | Sequence[int], schedule: Schedule, noise: Noise, levels: Sequence[int], graph: bool
) -> Tensor:
    """The start, checked; of a shape, pure noise of the size that it has at the first of `levels`."""
    if not isinstance(x, Tensor):
        alpha, sigma = float(schedule.alpha[levels[0]]), float(schedule.sigma[levels[0]])
        if alpha > UNNOISED * sigma and not is_compiling():
            warnings.warn(
                f"{op}: a start of pure noise is not the law of x_t at level {levels[0]} of {schedule}, which keeps "
                f"alpha = {alpha:.3g} of the data beside sigma = {sigma:.3g}: use zero_terminal_snr() or a schedule "
                "that ends in noise, or give x = alpha*x0 + sigma*eps",
                stacklevel=6,
            )
        x = draw_start(op, x, noise, alpha, sigma, graph)
    check_start(op, x, noise)
    return x


def draw_start(op: str, shape: Sequence[int], noise: Noise, alpha: float, sigma: float, graph: bool) -> Tensor:
    """noise.fold_in(START_TAG), times sigma unless alpha^2 + sigma^2 = 1; with graph on the CUDA device.

    So one key is one start, whatever the schedule, its levels and the sampler.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{op}: x must be a tensor or a shape (B, ...), got {type(shape).__name__}")
    if not isinstance(noise, Noise):
        raise TypeError(f"{op}: noise must be a Noise, got {type(noise).__name__}")
    shape = checks.shape(f"{op}: x must be a tensor or a shape", shape)
    z = noise.fold_in(START_TAG).normal(shape, device=start_device(op) if graph else torch.device("cpu"))
    return z if abs(alpha**2 + sigma**2 - 1) < 1e-9 else z * sigma


def check_start(op: str, x: Tensor, noise: Noise) -> None:
    samples(op, "x", x)
    if isinstance(noise, Tensor):
        raise TypeError(f"{op}: noise must be a Noise, of which every step takes its own, got a tensor")
    noise_for(op, noise, x, "x")


def grid(op: str, schedule: Schedule, steps: int, levels: Sequence[int] | None, last: int = 0) -> list[int]:
    """`levels` if given; else `steps` of them evenly spaced in index from T-1 to `last`.

    last = -1 is the data, one below level 0: the grid comes to it after its last level.
    """
    T = len(schedule)
    if levels is None:
        steps = checks.integer(op, "steps", steps, 1, T)
        return list(_spaced(T, steps, last))
    try:
        chosen = [operator.index(t) for t in levels]
    except TypeError:
        raise TypeError(f"{op}: levels must be ints, got {levels!r}") from None
    if not chosen or chosen[0] >= T or chosen[-1] < 0 or any(s >= t for t, s in pairwise(chosen)):
        raise ValueError(f"{op}: levels must decrease within [0, {T}), got {chosen}")
    return chosen


@lru_cache(maxsize=64)
def _spaced(T: int, steps: int, last: int) -> tuple[int, ...]:
    with outside_modes():
        points = torch.linspace(T - 1, last, steps - last, dtype=torch.float64, device="cpu")
        return tuple(int(t) for t in points[:steps].round().tolist())


def conditions(op: str, schedule: Schedule, levels: list[int], conditioning: str | None) -> Told:
    """What the network is told at each of `levels`: the level, its time or its sigma."""
    if conditioning is None:  # the times, where the schedule has them: a network was trained on those
        conditioning = "level" if schedule.times is None else "time"
    CONDITIONING(op, "conditioning", conditioning)
    if conditioning == "level":
        return levels
    if conditioning == "time":
        if schedule.times is None:
            raise ValueError(
                f"{op}: conditioning='time' needs a schedule with times (ContinuousSchedule.discretise), got {schedule}"
            )
        return schedule.times[levels].tolist()
    if not bool((schedule.alpha == 1).all()):
        raise ValueError(
            f"{op}: conditioning='sigma' needs a schedule with alpha = 1 (Schedule.karras), got {schedule}"
        )
    return schedule.sigma[levels].tolist()


CONDITIONING = checks.one_of("level", "time", "sigma")


def predicted(
    op: str,
    net: Network,
    dtype: torch.dtype,
    x: Tensor,
    t: float,
    parts: tuple[str, ...] = (),
    what: str = OUTPUT,
) -> tuple[Tensor, ...]:
    """net(x, t) of the state x in `dtype`, for all samples at t: an int as int64, a float in x's dtype."""
    told = torch.full(x.shape[:1], t, dtype=torch.int64 if isinstance(t, int) else x.dtype, device=x.device)
    return checked(op, net(x if x.dtype == dtype else x.to(dtype), beside(told, x)), x, parts, what)


def checked(op: str, made: Any, x: Tensor, parts: tuple[str, ...], what: str) -> tuple[Tensor, ...]:
    """What a network returned, in x's dtype: one tensor, or a tuple with one for each of `parts`."""
    if not parts:
        like(op, what, made, "x", x)
        return (made if made.dtype == x.dtype else made.to(x.dtype),)
    if not isinstance(made, (tuple, list)) or len(made) != len(parts):
        got = f"{len(made)} of them" if isinstance(made, (tuple, list)) else type(made).__name__
        raise TypeError(f"{op}: {what} must be a tuple ({', '.join(parts)}), got {got}")
    for part, value in zip(parts, made, strict=True):
        like(op, f"{what} ({part})", value, "x", x)
    return tuple(value.to(x.dtype) for value in made)


def guided(op: str, guidance: float | None) -> tuple[str, ...]:
    """The parts that a network returns, `guidance` being checked."""
    if guidance is None:
        return ()
    if not checks.is_number(guidance) or abs(guidance) > 1e300 or not math.isfinite(guidance):
        raise ValueError(f"{op}: guidance must be None or a finite number, got {guidance!r}")
    return GUIDED


def mix(guidance: float | None, alpha: Tensor) -> Tensor:
    """(steps, 2) like alpha (steps,): what `mixed` weighs the predictions with."""
    g = 1.0 if guidance is None else float(guidance)
    return alpha.new_tensor([[g, 1 - g]]).expand(len(alpha), 2)


def mixed(op: str, row: Tensor, prediction: Sequence[Tensor]) -> Tensor:
    """The prediction; under guidance g * conditional + (1 - g) * unconditional, in a launch of its own."""
    first, *second = prediction
    if not second:
        return first
    return affine(map_of(op, (0, 1, ABSENT, ABSENT)), (first, second[0], None, None), None, Coefficients(row, None))[0]


class Limits(NamedTuple):
    """Of the x0 estimate: fixed ones, or those of its own quantile."""

    low: float = -math.inf
    high: float = math.inf
    quantile: float | None = None

    def read_as(self, predict: Parameterisation) -> Parameterisation:
        """What a step that divides by sigma should read: x0 where it is limited, else the prediction as it is.

        From the prediction to x0 and back, float32 would lose what cancels where there is little noise.
        """
        return predict if self == Limits() else "x0"


def limits(op: str, clamp: Bounds | None, threshold: float | None) -> Limits:
    if threshold is None:
        return Limits() if clamp is None else Limits(*bounds(op, clamp))
    if clamp is not None:
        raise ValueError(f"{op}: give clamp or threshold, not both, got {clamp} and {threshold}")
    if not 0 < threshold <= 1:
        raise ValueError(f"{op}: threshold must be a quantile in (0, 1], got {threshold}")
    return Limits(-1.0, 1.0, float(threshold))


class Update:
    """Step i of a sampler in one launch, from row i of a table: o_x*x + o_m*x0_hat + o_z*z + o_w*w.

    estimate: (steps, 2) float64, a_x and a_p of x0_hat = a_x*x + a_p*prediction, which `limits` limit; without
        limits it may stand for what Limits.read_as says
    outputs: one or two of (steps, 2 to 4) float64: o_x, o_m, o_z (0) and o_w (0)
    reads_z: by step, whether o_z is not 0; else z and the noise are not read
    guidance g: the prediction is u + g*(c - u) = g*c + (1 - g)*u of a conditional c and an unconditional u
        (Ho and Salimans 2022), both read by the launch: u takes the place of w.
    Without limits the estimate's coefficients are multiplied into the outputs': no estimate is made.
    """

    def __init__(self, op: str, estimate: Tensor, *outputs: Tensor, guidance: float | None, limits: Limits) -> None:
        self.op, self.limits, self.parts = op, limits, guided(op, guidance)
        a_x, a_p = estimate.unbind(1)
        a_c, a_u = (mix(guidance, a_x) * a_p[:, None]).unbind(1)
        outer = [torch.nn.functional.pad(o, (0, 4 - o.shape[1])) for o in outputs]
        self.reads_z: list[bool] = torch.stack([o[:, 2] != 0 for o in outer]).any(0).tolist()
        self._estimates = limits != Limits()
        if self._estimates:
            self.table = torch.cat((torch.stack((a_x, a_c, a_u), 1), *outer), 1)
        else:
            self.table = torch.cat([self._direct(o, a_x, a_c, a_u) for o in outer], 1)
        self._outputs = len(outputs)
        self._maps = {(z, w): self._map(z, w) for z in (False, True) for w in (False, True)}
        self._bounds = (limits.low, limits.high) if self._estimates else None

    def _direct(self, output: Tensor, a_x: Tensor, a_c: Tensor, a_u: Tensor) -> Tensor:
        """(steps, 4): of x, the prediction, z and w."""
        o_x, o_m, o_z, o_w = output.unbind(1)
        return torch.stack((o_x + o_m * a_x, o_m * a_c, o_z, o_m * a_u if self.parts else o_w), 1)

    @property
    def options(self) -> object:
        """What a captured loop depends on besides the table."""
        return self.limits, self.parts, self._outputs

    def _map(self, reads_z: bool, reads_w: bool) -> Map:
        of_w = reads_w and not (self.parts and self._estimates)  # there u is read by the estimate alone
        of_output = 0, 1, 2 if reads_z else ABSENT, 3 if of_w else ABSENT
        first = 3 if self._estimates else 0
        columns = tuple(c if c == ABSENT else first + 4 * k + c for k in range(self._outputs) for c in of_output)
        return map_of(self.op, columns, (0, 1, 2 if self.parts else ABSENT) if self._estimates else None)

    def __call__(
        self,
        table: Tensor,
        i: int,
        x: Tensor,
        prediction: Sequence[Tensor],
        z: Tensor | None = None,
        noise: Noise | None = None,
        w: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """table: self.table in the dtype of the arithmetic, on x's device; prediction: (p,) or (c, u)."""
        p, *u = prediction
        w = u[0] if u else w
        reads_z, quantile = self.reads_z[i], self.limits.quantile
        z, noise = (z, noise) if reads_z else (None, None)
        spec, inputs = self._maps[reads_z, w is not None], (x, p, z, w)
        if quantile is None:
            return affine(spec, inputs, noise, (table, i), self._bounds)
        row, of_u = table[i : i + 1], 2 if u else ABSENT
        (x0_hat,) = affine(map_of(self.op, (0, 1, ABSENT, of_u)), (x, p, None, w), None, Coefficients(row, None))
        row = _thresholded(row, x0_hat, quantile)
        return affine(spec, inputs, noise, Coefficients(row, None), self._bounds)


def planned(make: Callable[..., Plan]) -> Callable[..., Plan]:
    """For what a sampler works out before its loop: made once for equal arguments.

    The last 64 are kept, and with them their schedules.
    """

    @lru_cache(maxsize=64, typed=True)
    def kept(*arguments: Any) -> Plan:
        with outside_modes():
            return make(*arguments)

    @wraps(make)
    def plan(*arguments: Any) -> Plan:
        # What cannot be a key is wrong: `make` says so.
        if is_compiling() or not all(isinstance(a, Hashable) for a in arguments):
            return make(*arguments)
        return kept(*arguments)

    return plan


@planned
def _sampling_grid(schedule: ContinuousSchedule, steps: int) -> Schedule:
    return schedule._sampling_grid(steps)


@planned
def reverse_plan(
    op: str,
    schedule: Schedule,
    levels: tuple[int, ...],
    predict: Parameterisation,
    eta: float,
    noise_scale: float,
    large: bool,
    guidance: float | None,
    limit: Limits,
) -> Update:
    """Of the samplers with one look a step, from each of `levels` to the next and from the last to the data."""
    table = reverse_table(op, schedule, list(levels), predict, eta, large)
    table[:, 2] *= noise_scale
    return Update(op, table[:, 3:], table[:, :3], guidance=guidance, limits=limit)


@planned
def raw_plan(
    op: str,
    schedule: Schedule,
    levels: tuple[int, ...],
    predict: Parameterisation,
    eta: float,
    guidance: float | None,
    limit: Limits,
) -> tuple[Update, Tensor]:
    """As reverse_plan, of alpha_s * (the limited x0 estimate) + keep * (eps of the prediction as it is) + the noise.

    Then the table, with what weighs the predictions under guidance: of one prediction the launch has two uses.
    """
    table = reverse_table(op, schedule, list(levels), predict, eta, False)
    alpha, sigma = schedule.alpha[list(levels)], schedule.sigma[list(levels)]
    alpha_s, _ = following(alpha, sigma)
    keep = table[:, 0] * sigma
    eps = torch.where(keep[:, None] > 0, estimate(op, predict, alpha, sigma, "eps"), 0.0) * keep[:, None]
    output = torch.stack((eps[:, 0], alpha_s, table[:, 2], eps[:, 1]), 1)
    update = Update(op, table[:, 3:], output, guidance=None, limits=limit)
    guided(op, guidance)
    table = torch.cat((update.table, mix(guidance, alpha)), 1)
    schedule._require_finite(op, table, levels)
    return update, table


def _thresholded(row: Tensor, x0_hat: Tensor, quantile: float) -> Tensor:
    """(B, K): the row of each sample, so that its clamp to [-1, 1] is dynamic thresholding.

    clamp(x0_hat, -s, s)/s = clamp(x0_hat/s, -1, 1), s = max(1, the quantile of |x0_hat|).
    Saharia et al. 2022, section 2.3.
    """
    mesh = on_mesh(x0_hat)
    x0_hat = x0_hat if mesh is None else mesh.whole_samples(x0_hat)
    s = quantile_of_samples(x0_hat.abs(), quantile).to(row.dtype).clamp(min=1)
    row = beside(row, s)
    return torch.cat((row[:, :3] / s[:, None], row[:, 3:].expand(len(s), -1)), 1)


def quantile_of_samples(x: Tensor, q: float) -> Tensor:
    """(B,), linear between neighbours: torch.quantile, which stops at 2^24 values and sorts them all."""
    values = x.flatten(1) if x.dim() > 1 else x[:, None]
    N = values.shape[1]
    if N == 0:
        return values.new_zeros(len(x))
    place = q * (N - 1)
    below = math.floor(place)
    largest = values.topk(N - below).values
    return torch.lerp(largest[:, -1], largest[:, max(-2, below - N)], place - below)


def descend(
    op: str,
    net: Network,
    x: Tensor,
    noise: Noise,
    levels: list[int],
    update: Update,
    progress: bool,
    graph: bool,
    told: Told,
) -> Tensor:
    """One look by the network and one launch for each of `levels`; `told`: what the network is told there."""

    def loop(look: Look, x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        for i, t in enumerate(progressed(levels, progress, op)):
            fresh = noise.fold_in(t) if update.reads_z[i] else None
            (x,) = update(table, i, x, look(x, told[i], update.parts), noise=fresh)
        return x

    return run(op, net, loop, x, noise, update.table, (*levels, *told, update.options), progress, graph)


def run(
    op: str,
    net: Network,
    loop: Callable[[Look, Tensor, Noise, Tensor], Tensor],
    x: Tensor,
    noise: Noise,
    table: Tensor,
    options: object,
    progress: bool,
    graph: bool,
    what: str = OUTPUT,
) -> Tensor:
    """loop(look, x, noise, table), with graph replayed. options: what else the loop depends on.

    The state, and all that a step keeps, is of the dtype of the arithmetic, as the table is, rounded once: in half
    precision a small step would be lost in x. The network is handed x's own dtype, and so is the caller.
    """
    dtype, compute = x.dtype, compute_dtype(x.dtype)
    table = rounded(op, table, compute)

    def whole(x: Tensor, noise: Noise, table: Tensor) -> Tensor:
        look = partial(predicted, op, net, dtype, what=what)
        return _narrowed(op, loop(look, x.to(compute), noise, table), dtype)

    if graph:
        # By repr, for a network told level 1 is not one told sigma 1.0.
        return replayed(op, net, whole, x, noise, progress, table=table, options=repr(options))
    return whole(x, noise, table.to(x.device))


def _narrowed(op: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the caller's dtype; what fp16 cannot hold becomes infinite, as torch rounds, and is warned of where it can be
    read."""
    narrow = x.to(dtype)
    if dtype == torch.float16 and can_read(narrow):
        beyond = int((narrow.isinf() & x.isfinite()).sum())
        if beyond:
            warnings.warn(
                f"{op}: {beyond} of {x.numel()} values are beyond float16, the largest {float(x.abs().max()):.3g}, and "
                "are infinite: give x in bfloat16 or float32, or a clamp",
                RuntimeWarning,
                stacklevel=2,
            )
    return narrow


def rounded(op: str, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Of float64 coefficients, none of which may overflow; kept with the table, which a plan keeps."""
    if is_compiling():
        return table.to(dtype)
    kept: dict[torch.dtype, Tensor] = vars(table).setdefault("_rounded", {})
    if dtype not in kept:
        kept[dtype] = _rounded(op, table, dtype)
    return kept[dtype]


def _rounded(op: str, table: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = table.to(dtype)
    if can_read(narrow):
        for beyond in table[table.isfinite() & ~narrow.isfinite()][:1].tolist():
            raise ValueError(
                f"{op}: a coefficient of {beyond:.3g} overflows {dtype}: give x in float64, or other levels"
            )
    return narrow


def progressed(plan: Sequence[Plan], progress: bool, what: str) -> Iterable[Plan]:
    if not progress:
        return plan
    from tqdm.auto import tqdm  # takes a moment, and is wanted by few

    return tqdm(plan, desc=what)
