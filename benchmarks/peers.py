"""The peers of a case as callables: what a user writes in torch, eager and compiled, and our backends.

Whatever a training or sampling loop makes anew at each step is made inside the call: the eager peers draw
their noise and look their levels up, ours make the key and the level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dae_fast as df
from tests.cases import SCHEDULE, Case, Inputs, Result, widen

from .measure import Peer

EAGER, COMPILE = "eager", "torch.compile"
RANDN = "torch.randn_like"
CLONE, COPY_INTO = "x.clone()", "out.copy_(x)"
BACKENDS = df.backend_names()
OURS = "native" if "native" in BACKENDS else "reference"  # what a user gets who forces nothing
PEERS = (EAGER, COMPILE, *BACKENDS)
STEP = 3

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Setting:
    """One comparison: a case on inputs of one kind, with or without gradients."""

    case: Case
    shape: tuple[int, ...]
    dtype: torch.dtype
    leaves: tuple[str, ...] = ()  # the inputs whose gradients are made too; none: forward alone

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

    def __str__(self) -> str:
        return f"{self.case.name} {self.shape_name} {self.dtype_name}, {self.mode}"

    def inputs(self, *, wide: bool = False) -> Inputs:
        """wide: the same values in fp64, for the judge."""
        made = self.case.inputs(self.shape, self.dtype)
        made = widen(made) if wide else made
        for name in self.leaves:
            made[name] = made[name].requires_grad_()
        return made


def own_leaves(case: Case) -> tuple[str, ...]:
    """A loss is there for the gradient of its prediction."""
    return case.tensors[:1] if case.loss else ()


def peer(setting: Setting, name: str) -> Callable[[], Tensors]:
    """Returns the outputs, then the gradients."""
    inputs, case = setting.inputs(), setting.case
    if name == EAGER:
        call = _plain(case, inputs)
    elif name == COMPILE:
        # All peers of this kind share their code objects, whose compiled forms would pile up.
        torch._dynamo.reset()
        call = _plain(case, inputs, compiled=True)
    elif name == OURS:
        call = lambda: case.ours(this_step(inputs))  # noqa: E731
    else:
        call = _forced(case, inputs, name)
    return results(call, [inputs[leaf] for leaf in setting.leaves], setting.dtype)


def baselines(setting: Setting) -> dict[str, Peer]:
    """What bounds the others: copying a sample tensor, and drawing the noise alone."""
    x = setting.case.first(setting.inputs()).detach()
    out = torch.empty_like(x)
    found: dict[str, Peer] = {CLONE: x.clone, COPY_INTO: lambda: out.copy_(x)}
    if setting.case.fresh:
        found[RANDN] = lambda: torch.randn_like(x)
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
        return drawn.to(dtype).to(output.dtype)

    upstreams = [upstream(output) for output in _as_tuple(call())]

    def call_with_gradients() -> Tensors:
        outputs = _as_tuple(call())
        return outputs + torch.autograd.grad(outputs, leaves, upstreams)

    return call_with_gradients


def _as_tuple(result: Result) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


def _plain(case: Case, inputs: Inputs, *, compiled: bool = False) -> Callable[[], Result]:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in inputs.items() if isinstance(value, float)}
    names, values = tuple(tensors), tuple(tensors.values())
    # Captured one by one: what torch.compile sees is tensors in, tensors out, and constants.
    plain, fresh, first = case.plain, case.fresh, case.tensors[0]

    def step(*values: Tensor) -> Result:
        given: Inputs = {**constants, **dict(zip(names, values, strict=True))}
        eps: Any = torch.randn_like(given[first]) if fresh else given.get("noise")
        return plain(given, eps)

    function = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
    return lambda: function(*values)


def _forced(case: Case, inputs: Inputs, backend: str) -> Callable[[], Result]:
    def call() -> Result:
        with df.use_backend(backend):
            return case.ours(this_step(inputs))

    return call
