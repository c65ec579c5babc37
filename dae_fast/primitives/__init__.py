"""The two primitives, of which all ops are made, open to everybody: a weighted sum, and a weighted residual's loss.

Each call goes one way: the core's, for a plain call; else the arguments are checked, a level of several dimensions
makes its entries rows of the batch, and sums.py or residuals.py dispatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from .. import checks
from ..checks import as_number, check_per_sample, like, promote, samples
from ..coefficients import Formula, Level, changing, leading, level_for, stack_rows
from ..kernels.spec import (
    ABSENT,
    BLEND,
    KINDS,
    NOISE,
    REDUCTIONS,
    Bounds,
    Coefficients,
    Kind,
    KindName,
    Map,
    Reduction,
    ReductionName,
    Residual,
    W,
    X,
    Y,
    Z,
    compute_dtype,
    loss_of,
    map_of,
)
from ..noise import Noise
from ..routing import fast_map, on_mesh, wants_grad
from .masks import Drawn, Mask
from .memory import check_out
from .residuals import Weighed, fast_residual_loss
from .residuals import residual_loss as residual
from .sums import affine_into, general_affine, written

__all__ = ["LevelOp", "clamped", "residual_loss", "weighted_sum"]

Coefficient = float | Tensor
Made = TypeVar("Made", Tensor, tuple[Tensor, Tensor], covariant=True)
Term = tuple[Coefficient, Any]  # a coefficient, and a tensor, a Noise or what `clamped` returns
ESTIMATE = "estimate"
MASKS = frozenset((torch.bool, *checks.DTYPES))


class Use(NamedTuple):
    """The columns that an input of a weighted sum has: in the output, in a second one, in the clamped estimate."""

    out: int = ABSENT
    also: int = ABSENT
    inner: int = ABSENT


def plan(op: str, uses: tuple[Use, ...], estimate: Use | None, noise: int, also: bool) -> Map | None:
    """As _made_plan; the same object for equal arguments."""
    return (_made_plan if is_dynamo_compiling() else _kept_plan)(op, uses, estimate, noise, also)


def _made_plan(op: str, uses: tuple[Use, ...], estimate: Use | None, noise: int, also: bool) -> Map | None:
    """The map of an op's inputs, the one at `noise` being a Noise (-1: none); None where no one launch does it.

    estimate: the columns of the clamped one, which takes the place of an input that nothing else reads.
    """
    if len(uses) > 5:
        return None
    five = len(uses) == 5
    columns, inner = [[ABSENT] * 5 for _ in range(2 if also else 1)], [ABSENT] * 3
    slots, free = [NOISE] * len(uses), [X, Y, Z, W, NOISE]
    if noise >= 0:
        free.remove(NOISE if five else Z)
    if not five:
        free = [s for s in free if s != NOISE]
    if estimate is not None:
        alone = [k for k, use in enumerate(uses) if use.inner != ABSENT and use.out == use.also == ABSENT]
        if not alone or noise in alone:
            return None
        slots[alone[-1]] = Y
        free.remove(Y)
        inner[1] = uses[alone[-1]].inner
        for output, column in zip(columns, (estimate.out, estimate.also), strict=False):
            output[Y] = column
    for k in sorted(range(len(uses)), key=lambda k: uses[k] == Use()):  # last what is not read
        use = uses[k]
        if k == noise:
            if use.inner != ABSENT:
                return None
            slot = NOISE if five else Z
        elif slots[k] == Y:
            continue
        else:
            outside = [s for s in free if s in (Z, NOISE)]  # for what the estimate does not read
            fitting = free if use.inner == ABSENT else [s for s in free if s not in outside]
            if not fitting:
                return None
            prefers_outside = outside and use.inner == ABSENT and estimate is not None and X not in free
            slot = slots[k] = outside[0] if prefers_outside else fitting[0]
            free.remove(slot)
            if use.inner != ABSENT:
                inner[0 if slot == X else 2] = use.inner
        for output, column in zip(columns, (use.out, use.also), strict=False):
            output[slot] = column
    if X in free:
        return None
    flat = [c for output in columns for c in output[:NOISE]] + [output[NOISE] for output in columns if five]
    return map_of(op, tuple(flat), None if estimate is None else tuple(inner), tuple(slots))


_kept_plan = lru_cache(maxsize=512)(_made_plan)


class LevelOp(Generic[Made]):
    """An op over a schedule: a weighted sum whose coefficients are functions of the level, in one launch.

    name: for errors and profilers
    coefficients(alpha, sigma) -> {input: coefficient, or None for one that is checked and not read}; called with
        floats, or with float64 tensors of all levels, once: a schedule keeps the table
    also: the same for a second output, of the same inputs
    estimate: the same for an estimate that is clamped, which `coefficients` and `also` then have as an input "estimate"

        to_x0 = df.LevelOp("to_x0", lambda alpha, sigma: {"x_t": 1 / alpha, "pred": -sigma / alpha})
        x0_hat = to_x0(level, x_t=x_t, pred=pred)

    Inputs: tensors (B, ...) of one shape, one perhaps a Noise, five at the most; mixed dtypes are promoted. Gradients
    reach all that want them, and an alpha and sigma given as tensors. The ops of this package are such objects.
    Raises ValueError on a shape mismatch, a level outside the schedule, or one where a coefficient is not finite.
    """

    __slots__ = ("_clamped", "_cores", "_estimate", "_plans", "_uses", "formula", "inputs", "name")

    @overload
    def __init__(
        self: LevelOp[Tensor],
        name: str,
        coefficients: Callable[[Any, Any], dict[str, Any]],
        *,
        also: None = None,
        estimate: Callable[[Any, Any], dict[str, Any]] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: LevelOp[tuple[Tensor, Tensor]],
        name: str,
        coefficients: Callable[[Any, Any], dict[str, Any]],
        *,
        also: Callable[[Any, Any], dict[str, Any]],
        estimate: Callable[[Any, Any], dict[str, Any]] | None = None,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        coefficients: Callable[[Any, Any], dict[str, Any]],
        *,
        also: Callable[[Any, Any], dict[str, Any]] | None = None,
        estimate: Callable[[Any, Any], dict[str, Any]] | None = None,
    ) -> None:
        checks.word("LevelOp", "name", name)
        checks.function("LevelOp", "coefficients", coefficients)
        for argument, part in (("also", also), ("estimate", estimate)):
            if part is not None:
                checks.function("LevelOp", argument, part)
        parts = tuple(part for part in (coefficients, also, estimate) if part is not None)

        def row(alpha: Any, sigma: Any) -> tuple[Any, ...]:
            return tuple(c for part in parts for c in part(alpha, sigma).values() if c is not None)

        probed = [_probe(name, part) for part in parts]
        named = [tuple(n for n, c in made.items() if c is not None) for made in probed]
        self.name = name
        self.formula = Formula(name, tuple(n for names in named for n in names), row)
        self.inputs = tuple(dict.fromkeys(n for made in probed for n in made if n != ESTIMATE))
        first, uses = 0, {n: [ABSENT] * 3 for n in (*self.inputs, ESTIMATE)}
        for place, part in enumerate((coefficients, also, estimate)):
            if part is None:
                continue
            names = named.pop(0)
            for k, n in enumerate(names):
                uses[n][place] = first + k
            first += len(names)
        self._clamped = estimate is not None
        self._uses = tuple(Use(*uses[n]) for n in self.inputs)
        self._estimate = Use(*uses[ESTIMATE]) if self._clamped else None
        self._plans = tuple(
            plan(name, self._uses, self._estimate, noise, also is not None) for noise in range(-1, len(self.inputs))
        )
        self._cores = tuple(None if spec is None else spec.core for spec in self._plans)

    def __call__(
        self, level: Level, *, low: float = -math.inf, high: float = math.inf, out: Tensor | None = None, **inputs: Any
    ) -> Made:
        """The result, like the first input, or two of them; low and high: of a clamped estimate."""
        missing = [n for n in self.inputs if n not in inputs]
        unknown = [n for n in inputs if n not in self.inputs]
        if missing or unknown:
            raise TypeError(f"{self.name}: inputs must be {', '.join(self.inputs)}, got {', '.join(inputs) or 'none'}")
        return self.run(level, tuple(inputs[n] for n in self.inputs), (low, high) if self._clamped else None, out)

    def __repr__(self) -> str:
        return f"LevelOp({self.name!r}: {', '.join(self.inputs)})"

    def run(
        self, level: Level, given: tuple[Any, ...], bounds: Bounds | None = None, out: Tensor | None = None
    ) -> Made:
        """As a call, the inputs in their order."""
        if not is_compiling():
            done = fast_map(self._cores, given, level, self.formula, bounds, out)
            if done is not None:
                if out is not None:
                    written(out)
                return done
        level_for(self.name, level)
        x, given, noise = checked(self.name, self.inputs, given)
        spec = self._plans[noise + 1]
        if spec is None:
            raise ValueError(f"{self.name}: at most five inputs fit one launch, got {len(given)}")

        def rows() -> Coefficients:
            return self.formula.rows(level, x, compute_dtype(x.dtype))

        return launched(spec, self.inputs, given, rows, level._dims(), bounds, out)


def _probe(name: str, part: Callable[[Any, Any], dict[str, Any]]) -> dict[str, Any]:
    try:
        made = part(0.6, 0.8)
    except TypeError:  # a function of torch's
        made = part(torch.full((1,), 0.6, dtype=torch.float64), torch.full((1,), 0.8, dtype=torch.float64))
    if not isinstance(made, dict) or not made or not all(isinstance(n, str) for n in made):
        raise TypeError(f"{name}: coefficients must return a dict from names of inputs, got {made!r}")
    return made


def checked(op: str, names: Sequence[str], given: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...], int]:
    """The first tensor; all inputs, tensors promoted to one dtype and a Noise fit for its batch; its place, or -1."""
    first: Tensor | None = None
    first_name, noise, drawn = "", -1, 0
    for k, (name, value) in enumerate(zip(names, given, strict=True)):
        if isinstance(value, Noise):
            noise, drawn = k, drawn + 1
        elif first is None:
            samples(op, name, value)
            first, first_name = value, name
        elif not isinstance(value, Tensor) and "noise" in name:
            raise TypeError(f"{op}: {name} must be a Noise or a tensor like {first_name}, got {type(value).__name__}")
        else:
            like(op, name, value, first_name, first)
    if first is None:
        raise TypeError(f"{op}: needs a tensor besides the noise, whose shape the result has")
    if drawn > 1:
        raise ValueError(f"{op}: takes one Noise, got {drawn}; give the others as tensors, noise.normal(x.shape)")
    if noise < 0:
        given = promote(*given)
        return given[0], given, noise
    given[noise]._check(op, first.shape[0], first.device)
    tensors = promote(*given[:noise], *given[noise + 1 :])
    return tensors[0], (*tensors[:noise], given[noise], *tensors[noise:]), noise


def launched(
    spec: Map,
    names: Sequence[str],
    given: tuple[Any, ...],
    rows: Callable[[], Coefficients],
    dims: int,
    bounds: Bounds | None,
    out: Tensor | None,
) -> Any:
    """A checked weighted sum. dims: how many dimensions its rows stand for."""
    slots: list[Any] = [None] * 5
    for slot, value in zip(spec.slots, given, strict=True):
        slots[slot] = value
    *inputs, noise = slots
    if dims > 1 and (mesh := on_mesh(*inputs)) is not None:
        mesh.check_rows(spec.op, dims, *inputs)
    coefficients, shape = rows(), inputs[0].shape
    by_slot = spec.given_by_slot
    if out is not None:
        if spec.outputs > 1:
            raise ValueError(f"{spec.op}: out= is of one output; this op has two")
        read = {n: value for n, value in zip(names, given, strict=True) if not isinstance(value, Noise)}
        check_out(spec.op, out, **read)
        if wants_grad(*inputs, noise if isinstance(noise, Tensor) else None, coefficients.tensor, out):
            raise ValueError(f"{spec.op}: out= has no gradient; call it under torch.no_grad() or without out")
    flat: Any = tuple([in_rows(t, dims) if read else None for t, read in zip(inputs, spec.reads, strict=True)])
    if dims > 1 and noise is not None:
        noise = in_rows(noise, dims) if isinstance(noise, Tensor) else noise._in_rows(math.prod(shape[1:dims]))
    if out is not None:
        target = in_rows(out, dims)
        affine_into(by_slot, target, flat, noise, coefficients, bounds)
        if dims > 1 and target.data_ptr() != out.data_ptr():
            out.copy_(target.reshape(shape))
        return out
    made = general_affine(by_slot, flat, noise, coefficients, bounds)
    if dims > 1:
        made = tuple(t.unflatten(0, shape[:dims]) for t in made)
    return made if len(made) > 1 else made[0]


def in_rows(t: Tensor | None, dims: int) -> Any:
    """With its leading dimensions as one."""
    return t if t is None or dims == 1 else t.flatten(0, dims - 1)


class Clamped(NamedTuple):
    """What `clamped` returns, for one term of a weighted sum."""

    terms: tuple[Term, ...]
    low: float
    high: float


def clamped(*terms: Term, low: float = -math.inf, high: float = math.inf) -> Clamped:
    """A sum of (coefficient, tensor) terms limited to [low, high], as a term of weighted_sum: a clipped estimate.

    low, high: floats, low <= high      Raises TypeError or ValueError for other terms or bounds.
    """
    low, high = as_number("clamped", "low", low), as_number("clamped", "high", high)
    if not low <= high:
        raise ValueError(f"clamped: low must not be above high, got {low} and {high}")
    return Clamped(_terms("clamped", terms), low, high)


def _terms(op: str, terms: Sequence[Any]) -> tuple[Term, ...]:
    for k, term in enumerate(terms):
        if not isinstance(term, tuple) or len(term) != 2:
            raise TypeError(f"{op}: term {k} must be a pair (coefficient, tensor or Noise), got {type(term).__name__}")
    if not terms:
        raise ValueError(f"{op}: needs a term (coefficient, tensor or Noise)")
    return tuple(terms)


@overload
def weighted_sum(
    *terms: Term,
    also: None = None,
    out: Tensor | None = None,
    where: Tensor | None = None,
    otherwise: Tensor | None = None,
) -> Tensor: ...
@overload
def weighted_sum(*terms: Term, also: Sequence[Coefficient], out: None = None) -> tuple[Tensor, Tensor]: ...
def weighted_sum(
    *terms: Term,
    also: Sequence[Coefficient] | None = None,
    out: Tensor | None = None,
    where: Tensor | None = None,
    otherwise: Tensor | None = None,
) -> Any:
    """c_0*x_0 + c_1*x_1 + ..., sample by sample, in one launch.

    terms: (coefficient, what): a coefficient is a float or a tensor (), (B,) or of more leading dimensions (B, F), of
        any sign, with or without gradient; what it multiplies is a tensor (B, ...), a Noise, or clamped(...). Up to
        five tensors, one of them perhaps a Noise; one of the terms clamped
    also: as many coefficients, of a second output of the same terms
    out: written instead of a new tensor; may be one of the terms. Not with `also`
    where, otherwise: the sum is mixed into `otherwise`, like the terms: otherwise + where * (sum - otherwise), in the
        same launch. `where`: bool, or floating in [0, 1], of as many dimensions, (B, 1, H, W) say; where it is 0 or 1
        the one or the other, whatever the other holds. Of a tensor or of two terms, none clamped, and not with `also`
    returns: like the tensors, mixed dtypes promoted; with `also` a pair
    Reads each tensor once; a Noise is never stored. Arithmetic is in fp32 (fp64 for fp64), rounded once.
    Gradient: of every tensor and every coefficient that is one. Raises TypeError or ValueError, naming the term.
    """
    op = "weighted_sum"
    if where is not None or otherwise is not None:
        return _blended(op, terms, where, otherwise, also, out)
    if not is_compiling():
        # The usual form: numbers or tensors times tensors and a Noise.
        coefficients, given, noise = [], [], -1
        for k, term in enumerate(terms):
            if type(term) is not tuple or len(term) != 2 or type(term[1]) is Clamped:
                break
            coefficients.append(term[0])
            given.append(term[1])
            if type(term[1]) is Noise:
                noise = k
        else:
            fits = given and (also is None or (isinstance(also, (tuple, list)) and len(also) == len(given)))
            spec = _simple_plan(len(given), noise, also is not None) if fits else None
            if spec is not None:
                row = tuple(coefficients) if also is None else (*coefficients, *also)
                done = fast_map(spec.core, tuple(given), row, None, None, out)
                if done is not None:
                    if out is not None:
                        written(out)
                    return done
    parsed = _parse(op, terms, also)
    return _sum(op, parsed, also is not None, out)


@lru_cache(maxsize=64)
def _simple_plan(count: int, noise: int, also: bool) -> Map | None:
    uses = tuple(Use(k, count + k if also else ABSENT) for k in range(count))
    return plan("weighted_sum", uses, None, noise, also)


def _blended(op: str, terms: Sequence[Any], where: Any, otherwise: Any, also: Any, out: Tensor | None) -> Any:
    """A weighted sum with `where` and `otherwise`."""
    coefficients, given = zip(*_terms(op, terms), strict=True)
    drawn = [isinstance(value, Noise) for value in given]
    if also is not None or len(given) > 2 or all(drawn) or any(isinstance(value, Clamped) for value in given):
        raise ValueError(f"{op}: with where there is one output, of a tensor or of two terms, none clamped")
    if where is None or otherwise is None:
        raise ValueError(f"{op}: where and otherwise are given together")
    spec = (_made_blend if is_dynamo_compiling() else _kept_blend)(op, tuple(drawn))
    if not is_compiling():
        mask = where
        if type(where) is type(otherwise) is Tensor and where.dtype != otherwise.dtype:
            mask = where.to(otherwise.dtype) if where.dtype in MASKS and otherwise.dtype in checks.DTYPES else where
        done = fast_map(spec.core, (*given, mask, otherwise), coefficients, None, None, out)
        if done is not None:
            if out is not None:
                written(out)
            return done
    names = *(f"term {k}" for k in range(len(given))), "otherwise"
    if not isinstance(otherwise, Tensor):
        raise TypeError(f"{op}: otherwise must be a tensor, got {type(otherwise).__name__}")
    x, given, _ = checked(op, names, (*given, otherwise))
    if not isinstance(where, Tensor) or where.dtype not in MASKS:
        got = where.dtype if isinstance(where, Tensor) else type(where).__name__
        raise TypeError(f"{op}: where must be a bool or floating tensor, got {got}")
    mask = spread(op, "where", where.to(x.dtype), x)
    row = [check_per_sample(op, f"the coefficient of term {k}", c, x) for k, c in enumerate(coefficients)]

    def rows() -> Coefficients:
        return stack_rows(op, tuple(row), x, compute_dtype(x.dtype))

    names = *names[:-1], "where", "otherwise"
    return launched(spec, names, (*given[:-1], mask, given[-1]), rows, leading(*row), None, out)


def _made_blend(op: str, drawn: tuple[bool, ...]) -> Map:
    """The map of one or two terms, the mask and what stands elsewhere."""
    slots, columns = [X, Z], [ABSENT, BLEND, ABSENT, BLEND]
    of_terms = [Z if d else slots.pop(0) for d in drawn]
    for column, slot in enumerate(of_terms):
        columns[slot] = column
    given = [NOISE if d else slot for d, slot in zip(drawn, of_terms, strict=True)]
    return map_of(op, tuple(columns), None, (*given, Y, W))


_kept_blend = lru_cache(maxsize=8)(_made_blend)


def summed(op: str, names: tuple[str, ...], given: tuple[Any, ...], row: tuple[Any, ...], out: Tensor | None) -> Any:
    """weighted_sum for an op of that name whose coefficients are its own."""
    noise = -1
    for k, value in enumerate(given):
        if type(value) is Noise:
            noise = k
    if not is_compiling():
        spec = _kept_plan_of(op, len(given), noise)
        done = None if spec is None else fast_map(spec.core, given, row, None, None, out)
        if done is not None:
            if out is not None:
                written(out)
            return done
    parsed = _Parsed(names, given, tuple(zip(names, row, strict=True)), _each_its_column(len(given)), None, None)
    return _sum(op, parsed, False, out)


def summed_twice(
    op: str, names: tuple[str, ...], given: tuple[Any, ...], row: tuple[Any, ...], uses: tuple[Use, ...]
) -> tuple[Tensor, Tensor]:
    """As summed, of two outputs: `uses` says which of the row's coefficients an input has in each."""
    noise = next((k for k, value in enumerate(given) if type(value) is Noise), -1)
    if not is_compiling() and (spec := _kept_plan(op, uses, None, noise, True)) is not None:
        done = fast_map(spec.core, given, row, None, None, None)
        if done is not None:
            return done
    return _sum(op, _Parsed(names, given, tuple(("a coefficient", c) for c in row), uses, None, None), True, None)


def _each_its_column(count: int) -> tuple[Use, ...]:
    return _COLUMN_EACH[:count]


_COLUMN_EACH = tuple(Use(k) for k in range(5))


@lru_cache(maxsize=128)
def _kept_plan_of(op: str, count: int, noise: int) -> Map | None:
    return _kept_plan(op, _each_its_column(count), None, noise, False)


class _Parsed(NamedTuple):
    names: tuple[str, ...]  # of the inputs
    given: tuple[Any, ...]
    coefficients: tuple[tuple[str, Any], ...]  # by column, each with what it is called
    uses: tuple[Use, ...]
    estimate: Use | None
    bounds: Bounds | None


def _parse(op: str, terms: Sequence[Any], also: Sequence[Coefficient] | None) -> _Parsed:
    """The inputs, one for each tensor, and what multiplies them."""
    outer = _terms(op, terms)
    if also is not None and not isinstance(also, (tuple, list)):
        raise TypeError(f"{op}: also must be a tuple of coefficients, got {type(also).__name__}")
    if also is not None and len(also) != len(outer):
        raise ValueError(f"{op}: also must have {len(outer)} coefficients, one for each term, got {len(also)}")
    columns: list[tuple[str, Any]] = []
    inputs: list[tuple[str, Any, Use]] = []
    estimate, bounds = None, None

    def column(of: str, c: Any) -> int:
        columns.append((of, c))
        return len(columns) - 1

    for k, (c, what) in enumerate(outer):
        second = ABSENT if also is None else column(f"also's coefficient of term {k}", also[k])
        use = Use(column(f"the coefficient of term {k}", c), second)
        if not isinstance(what, Clamped):
            inputs.append((f"term {k}", what, use))
            continue
        if bounds is not None:
            raise ValueError(f"{op}: one term may be clamped, got a second one as term {k}")
        estimate, bounds = use, (what.low, what.high)
        for j, (a, inner) in enumerate(what.terms):
            if isinstance(inner, (Noise, Clamped)):
                raise TypeError(f"{op}: term {k}: a clamped sum is of tensors, got {type(inner).__name__}")
            name = f"term {j} of the clamped term {k}"
            inputs.append((name, inner, Use(inner=column(f"the coefficient of {name}", a))))
    merged: list[tuple[str, Any, Use]] = []
    for name, what, use in inputs:
        for i, (other_name, other, known) in enumerate(merged):
            if other is what and (known.inner == ABSENT) != (use.inner == ABSENT):
                merged[i] = other_name, other, Use(*(max(pair) for pair in zip(known, use, strict=True)))
                break
        else:
            merged.append((name, what, use))
    names, given, uses = zip(*merged, strict=True)
    return _Parsed(names, given, tuple(columns), uses, estimate, bounds)


def _sum(op: str, parsed: _Parsed, also: bool, out: Tensor | None) -> Any:
    x, given, noise = checked(op, parsed.names, parsed.given)
    coefficients = [check_per_sample(op, name, c, x) for name, c in parsed.coefficients]
    dims = leading(*coefficients)
    spec = plan(op, parsed.uses, parsed.estimate, noise, also)

    def rows() -> Coefficients:
        return stack_rows(op, tuple(coefficients), x, compute_dtype(x.dtype))

    if spec is not None:
        return launched(spec, parsed.names, given, rows, dims, parsed.bounds, out)
    if parsed.estimate is None:
        raise ValueError(f"{op}: at most five terms fit one launch, got {len(given)}")
    return _in_two_launches(op, parsed._replace(given=given), x, also, out)


def _in_two_launches(op: str, parsed: _Parsed, x: Tensor, also: bool, out: Tensor | None) -> Any:
    """Where a tensor of the clamped estimate is read outside it too: the estimate first, in the compute type."""
    assert parsed.estimate is not None and parsed.bounds is not None
    dtype, compute = x.dtype, compute_dtype(x.dtype)
    wide = [value if isinstance(value, Noise) else value.to(compute) for value in parsed.given]
    inside = [(parsed.coefficients[u.inner][1], v) for u, v in zip(parsed.uses, wide, strict=True) if u.inner != ABSENT]
    estimate = weighted_sum(*inside).clamp(*parsed.bounds)
    pairs = [(u, v) for u, v in zip(parsed.uses, wide, strict=True) if u.out != ABSENT]
    pairs.append((parsed.estimate, estimate))
    terms = [(parsed.coefficients[u.out][1], v) for u, v in pairs]
    if also:
        both = weighted_sum(*terms, also=[parsed.coefficients[u.also][1] for u, _ in pairs])
        return tuple(t.to(dtype) for t in both)
    made = weighted_sum(*terms)
    if out is not None:
        check_out(op, out, x=x)
        return out.copy_(made)
    return made.to(dtype)


def residual_loss(
    pred: Tensor,
    *terms: Term,
    weight: Tensor | float | None = None,
    kind: KindName = "mse",
    delta: Coefficient | None = None,
    mask: Any = None,
    reduction: ReductionName = "mean",
) -> Tensor:
    """mean_b w_b * mean_i rho(r), r = pred - c_0*x_0 - c_1*x_1 - ..., and its gradient of pred in the same pass.

    pred: (B, ...) fp16/bf16/fp32/fp64      terms: (coefficient, tensor or Noise), as in weighted_sum, of the target
    weight: a float, () or (B,) or of more leading dimensions      kind: rho(r), delta: > 0, as in denoising_loss
    mask: the elements that count, or their weights, as in noise_mse
    reduction: "mean"; "sum"; "none", one value for each row
    returns: fp32 (fp64 for fp64) scalar, or for "none" (B,), (B, F) where a coefficient has F for each sample
    Neither the target nor a Noise is stored. One launch for two terms; what is more is summed before. Gradient: of pred
    in the same pass; of terms, coefficients and weights in backward. Raises TypeError or ValueError, naming the term.
    """
    op = "residual_loss"
    known = kind_of(op, kind, delta)
    how = reduction_of(op, pred, reduction)
    parsed = _terms(op, terms) if terms else ()
    names = ("pred", *(f"term {k}" for k in range(len(parsed))))
    _, (pred, *given), _ = checked(op, names, (pred, *(what for _, what in parsed)))
    coefficients = [check_per_sample(op, f"the coefficient of term {k}", c, pred) for k, (c, _) in enumerate(parsed)]
    if len(given) > 2 or (len(given) == 2 and isinstance(given[0], Noise)):
        coefficients, given = _two_terms(coefficients, given, pred)
    y, z, noise, n = _operands(given)
    of_y, of_z = (-coefficients[k] if k >= 0 else 0.0 for k in n)
    row = (1.0, of_y, of_z) if delta is None else (1.0, of_y, of_z, check_per_sample(op, "delta", delta, pred))
    columns = (1 if y is not None else ABSENT, 2 if n[1] >= 0 else ABSENT, 3 if known.has_delta else ABSENT)
    w = None if weight is None else check_per_sample(op, "weight", weight, pred)
    spec = loss_of(op, known, how, (*columns, ABSENT, ABSENT, ABSENT))
    if isinstance(w, float):
        at = changing(checks.number(op, "weight", w, "finite"), pred)
        w = at if isinstance(at, Tensor) else torch.full((), at, dtype=torch.float64, device=pred.device)
    dims, operands = leading(*row, w), Residual(pred, y, z, noise, mask_of(op, pred, mask))
    done = fast_residual_loss(spec, operands, row, None, w) if dims == 1 else None
    if done is not None:
        return done[0]
    rows = stack_rows(op, row, pred, compute_dtype(pred.dtype))
    return loss_of_rows(spec, operands, rows, w, dims)[0]


def _operands(given: Sequence[Any]) -> tuple[Any, Any, Any, tuple[int, int]]:
    """y, z, noise of a residual, and which terms y and z or noise are."""
    if not given:
        return None, None, None, (-1, -1)
    if len(given) == 1:
        return (None, None, given[0], (-1, 0)) if isinstance(given[0], Noise) else (given[0], None, None, (0, -1))
    if isinstance(given[1], Noise):
        return given[0], None, given[1], (0, 1)
    return given[0], given[1], None, (0, 1)


def _two_terms(coefficients: list[Any], given: list[Any], pred: Tensor) -> tuple[list[Any], list[Any]]:
    """The noise last, and all tensors but one summed, in the compute type of what is rounded nowhere."""
    order = sorted(range(len(given)), key=lambda k: isinstance(given[k], Noise))
    coefficients, given = [coefficients[k] for k in order], [given[k] for k in order]
    if len(given) <= 2:
        return coefficients, given
    last = isinstance(given[-1], Noise)
    summed = given[:-1] if last else given
    total = weighted_sum(*((c, t) for c, t in zip(coefficients, summed, strict=False)))
    return ([1.0, coefficients[-1]], [total, given[-1]]) if last else ([1.0], [total])


def kind_of(op: str, kind: str, delta: Any) -> Kind:
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    known = KINDS[kind]
    if known.has_delta != (delta is not None):
        wanted = "must be given" if delta is None else "must be None"
        raise ValueError(f"{op}: delta {wanted} for kind={kind!r}")
    if isinstance(delta, (int, float)) and not 0 < delta < math.inf:
        raise ValueError(f"{op}: delta must be positive and finite, got {delta}")
    return known


def reduction_of(op: str, pred: Tensor, reduction: str) -> Reduction:
    samples(op, "pred", pred)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if reduction == "mean" and pred.numel() == 0:
        raise ValueError(f"{op}: the mean over an empty batch {tuple(pred.shape)} is not defined; use reduction='sum'")
    return REDUCTIONS[reduction]


def mask_of(op: str, pred: Tensor, mask: Any) -> Mask:
    """Of pred's shape, expanded without a copy; weights in the dtype of the arithmetic."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) and hasattr(mask, "_drawn"):
        drawn: Drawn = mask._drawn(op, pred)
        return drawn if drawn.noise._span is None else drawn.on(pred)
    if not isinstance(mask, Tensor) or (mask.dtype != torch.bool and mask.dtype not in checks.DTYPES):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{op}: mask must be a bool tensor, weights or a corruption, got {got}")
    if mask.is_floating_point():
        mask = mask.to(compute_dtype(pred.dtype))
    return spread(op, "mask", mask, pred)


def spread(op: str, name: str, mask: Tensor, x: Tensor) -> Tensor:
    """Of x's shape, expanded without a copy."""
    if mask.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like the samples, got {mask.device}")
    if mask.dim() not in (0, x.dim()):
        # (B, H, W) would be taken for (C, H, W) where B = C.
        raise ValueError(
            f"{op}: {name} must have as many dimensions as {tuple(x.shape)}, 1 where it is broadcast ({name}[:, None], "
            f"say), got {tuple(mask.shape)}"
        )
    try:
        return mask.expand(x.shape)
    except RuntimeError:
        raise ValueError(f"{op}: {name} must be broadcastable to {tuple(x.shape)}, got {tuple(mask.shape)}") from None


def loss_of_rows(spec: Any, operands: Residual, rows: Coefficients, weight: Tensor | None, dims: int) -> Weighed:
    """A checked loss; its values of rows get their dimensions back. weight: () or (B,), or of the rows' dimensions."""
    pred, y, z, noise, mask = operands
    if (mesh := on_mesh(pred, y, z)) is not None:
        mesh.check_rows(spec.op, dims, pred, y, z)
    shape = pred.shape[:dims]
    if weight is not None:
        weight = weight.reshape(*weight.shape, *[1] * (dims - weight.dim())) if weight.dim() else weight
        weight = weight.expand(shape).reshape(-1)
    if dims > 1:
        if noise is not None:
            noise = noise._in_rows(math.prod(shape[1:]))
        stored: Any = mask.on(pred) if isinstance(mask, Drawn) else mask
        pred, y, z, stored = (in_rows(t, dims) for t in (pred, y, z, stored))
        operands = Residual(pred, y, z, noise, stored)
    loss, means, also = residual(spec, operands, rows, weight)
    if dims > 1:
        means = means.unflatten(0, shape)
        loss = loss.unflatten(0, shape) if loss.dim() else loss
    return loss, means, also
