"""The peers of a case as callables: what a user writes in torch, eager and compiled, and our backends.

Whatever a training or sampling loop makes anew at each step is made inside the call: the eager peers draw
their noise and look their levels up, ours make the key and the level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import dae_fast as df

from .cases import SCHEDULE, Case, Inputs, Result, widen
from .environment import CPU, backends_on, default_backend
from .measure import Peer

EAGER, COMPILE = "eager", "torch.compile"
RANDN = "torch.randn_like"
CLONE, COPY_INTO = "x.clone()", "out.copy_(x)"
STEP = 3
# Sets of inputs in turn, at the most: the profit of a cache is gone long before.
MOST_BUFFERS = 128

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Setting:
    """One comparison: a case on inputs of one kind, with or without gradients."""

    case: Case
    shape: tuple[int, ...]
    dtype: torch.dtype
    leaves: tuple[str, ...] = ()  # the inputs whose gradients are made too; none: forward alone
    device: torch.device = CPU

    @property
    def mode(self) -> str:
        if not self.leaves:
            return "forward"
        return "loss and gradient" if self.leaves == own_leaves(self.case) else "with all gradients"

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def sample_bytes(self) -> int:
        """Of one tensor of the samples' shape."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.case.name} {self.shape_name} {self.dtype_name}, {self.mode}"

    def inputs(self, *, wide: bool = False) -> Inputs:
        """wide: the same values in fp64, for the judge. All peers of a setting get the same tensors."""
        return dict(_inputs(self, wide))

    def buffers(self) -> list[Inputs]:
        """The inputs, and on a GPU so many copies that a round of them does not fit its cache."""
        first = self.inputs()
        held = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.type == "cuda" else 0
        copies = min(MOST_BUFFERS, max(1, 2 * cache // max(held, 1)))
        return [first, *({name: _copy(value) for name, value in first.items()} for _ in range(copies - 1))]


# Two: what a peer runs on, and the judge's.
@lru_cache(maxsize=2)
def _inputs(setting: Setting, wide: bool) -> Inputs:
    made = setting.case.inputs(setting.shape, setting.dtype)
    made = widen(made) if wide else made
    made = {name: value.to(setting.device) if isinstance(value, Tensor) else value for name, value in made.items()}
    made["level"] = SCHEDULE[made["t"]]
    for name in setting.leaves:
        made[name] = made[name].requires_grad_()
    return made


def _copy(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def own_leaves(case: Case) -> tuple[str, ...]:
    """A loss is there for the gradient of its prediction."""
    return case.tensors[:1] if case.loss else ()


def names(device: torch.device) -> tuple[str, ...]:
    """Torch's two peers and our backends."""
    return (EAGER, COMPILE, *backends_on(device))


def peer(setting: Setting, name: str) -> Callable[[], Tensors]:
    """Returns the outputs, then the gradients."""
    case, buffers = setting.case, setting.buffers()
    if name in (EAGER, COMPILE):
        calls = _plain(case, buffers, compiled=name == COMPILE)
    else:
        calls = [lambda inputs=inputs: case.ours(this_step(inputs)) for inputs in buffers]
    leaves = [[inputs[leaf] for leaf in setting.leaves] for inputs in buffers]
    found = [results(call, of, setting.dtype) for call, of in zip(calls, leaves, strict=True)]
    forced = name not in (EAGER, COMPILE, default_backend(setting.device))
    return in_turn([_forced(call, name) for call in found] if forced else found)


def in_turn(calls: Sequence[Callable[[], Tensors]]) -> Callable[[], Tensors]:
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def baselines(setting: Setting) -> dict[str, Peer]:
    """What bounds the others: copying a sample tensor, and drawing the noise alone."""
    xs = [setting.case.first(inputs).detach() for inputs in setting.buffers()]
    turn, out = itertools.cycle(xs), torch.empty_like(xs[0])
    found: dict[str, Peer] = {CLONE: lambda: next(turn).clone(), COPY_INTO: lambda: out.copy_(next(turn))}
    if setting.case.fresh:
        found[RANDN] = lambda: torch.randn_like(xs[0])
    return found


def this_step(inputs: Inputs) -> Inputs:
    """What a loop makes anew at each step: the level from t, the key from the step."""
    made = {**inputs, "level": SCHEDULE[inputs["t"]]}
    if isinstance(inputs.get("noise"), df.Noise):
        made["noise"] = inputs["noise"].fold_in(STEP)
    return made


def results(call: Callable[[], Result], leaves: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], Tensors]:
    """The call, with the gradients of `leaves` for random gradients of its outputs (1 for a scalar)."""
    if not leaves:
        return lambda: _as_tuple(call())
    generator = torch.Generator().manual_seed(1)

    def upstream(output: Tensor) -> Tensor | None:
        if not output.dim():
            return None
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).to(output)

    upstreams = [upstream(output) for output in _as_tuple(call())]

    def call_with_gradients() -> Tensors:
        outputs = _as_tuple(call())
        return outputs + torch.autograd.grad(outputs, leaves, upstreams)

    return call_with_gradients


def _as_tuple(result: Result) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


def _plain(case: Case, buffers: Sequence[Inputs], *, compiled: bool = False) -> list[Callable[[], Result]]:
    tensors = tuple(name for name, value in buffers[0].items() if isinstance(value, Tensor))
    constants = {name: value for name, value in buffers[0].items() if isinstance(value, float)}
    # Captured one by one: what torch.compile sees is tensors in, tensors out, and constants.
    plain, fresh, first = case.plain, case.fresh, case.tensors[0]

    def step(*values: Tensor) -> Result:
        given: Inputs = {**constants, **dict(zip(tensors, values, strict=True))}
        eps: Any = case.law.drawn(given[first]) if fresh else given.get("noise")
        return plain(given, eps)

    if compiled:
        # All peers of this kind share their code objects, whose compiled forms would pile up.
        torch._dynamo.reset()
    function = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
    values = [tuple(inputs[name] for name in tensors) for inputs in buffers]
    return [lambda of=of: function(*of) for of in values]  # type: ignore[misc]


def _forced(call: Callable[[], Tensors], backend: str) -> Callable[[], Tensors]:
    """Forward and backward on one backend."""

    def forced() -> Tensors:
        with df.use_backend(backend):
            return call()

    return forced
