"""A scheduler's step written as sums over named tensors, and the launches that work them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...noise import Noise
from ...primitives import clamped, weighted_sum

TERMS = 5  # that one launch reads, one of them perhaps a Noise


class Sum(dict[str, float]):
    """Coefficients by the name of what they multiply; arithmetic on it is arithmetic on the sums, in float64."""

    __array_ufunc__ = None  # so that numpy's floats leave the arithmetic to this class

    def __add__(self, other: Mapping[str, float]) -> Sum:
        return Sum({name: self.get(name, 0.0) + other.get(name, 0.0) for name in {**self, **other}})

    def __mul__(self, c: float) -> Sum:
        return Sum({name: value * c for name, value in self.items()})

    __rmul__ = __mul__

    def __truediv__(self, c: float) -> Sum:
        return Sum({name: value / c for name, value in self.items()})

    def __sub__(self, other: Sum) -> Sum:
        return self + other * -1.0

    def where(self, name: str, stands_for: Sum) -> Sum:
        """With `stands_for` in the place of what has that name."""
        rest = Sum({n: c for n, c in self.items() if n != name})
        return rest + stands_for * self[name] if name in self else rest


X, P, Z = Sum(sample=1.0), Sum(model_output=1.0), Sum(noise=1.0)
X0 = Sum(x0=1.0)  # the estimate of the clean sample, after the limits that a scheduler sets it


class Launch:
    """One or two sums over the same tensors, with an estimate "x0" between them that may be clipped."""

    def __init__(self, outputs: Mapping[str, Sum], estimate: Sum | None = None, bound: float = 0.0) -> None:
        self.outputs = tuple(outputs)
        read = {n for made in outputs.values() for n, c in made.items() if c != 0}
        self.names = tuple(n for n in {**X, **P, **dict.fromkeys(sorted(read))} if n in read and n != "x0")
        if estimate is None and "x0" in read:
            self.names = (*self.names, "x0")  # a tensor that an earlier launch made
        self.rows = tuple(tuple(float(made.get(n, 0.0)) for n in self.names) for made in outputs.values())
        self.of_estimate = tuple(float(made.get("x0", 0.0)) for made in outputs.values())
        self.estimate, self.bound = estimate, bound

    @property
    def fits(self) -> bool:
        """Whether it is one launch."""
        return self.estimate is not None or len(self.names) <= TERMS

    def __call__(self, streams: dict[str, Any]) -> None:
        """Puts the outputs beside what they are made of."""
        given = [streams[n] for n in self.names]
        if not self.fits:
            made = tuple(_wide(row, given) for row in self.rows)
        else:
            row, *also = self.rows
            terms = list(zip(row, given, strict=True))
            weights = list(also[0]) if also else None
            if self.estimate is not None:
                inner = [(float(c), streams[n]) for n, c in self.estimate.items() if c != 0]
                terms.append((self.of_estimate[0], clamped(*inner, low=-self.bound, high=self.bound)))
                if weights is not None:
                    weights.append(self.of_estimate[1])
            both: Any = weighted_sum(*terms, also=weights)
            made = both if also else (both,)
        dtype = streams["dtype"]  # of samples and outputs; noise may be drawn in another
        streams.update(zip(self.outputs, (m if m.dtype == dtype else m.to(dtype) for m in made), strict=True))


def _wide(row: tuple[float, ...], given: list[Any]) -> Tensor:
    """More than one launch reads: two, with what the first makes, and the second, in the type of the arithmetic."""
    first = [(c, v) for c, v in zip(row, given, strict=True) if type(v) is not Noise][: TERMS - 1]
    rest = [(c, v) for c, v in zip(row, given, strict=True) if not any(v is known for _, known in first)]
    if given[0].dtype in (torch.float16, torch.bfloat16):
        first = [(c, v.float()) for c, v in first]
    made: Tensor = weighted_sum((1.0, weighted_sum(*first)), *rest)
    return made


class Plan(NamedTuple):
    """What one call of `step` does."""

    launches: tuple[Callable[[dict[str, Any]], None], ...]
    draws: bool = False  # noise, even where its coefficient is 0: torch's generator must go on as upstream's does
