"""The class that a fused scheduler is of: upstream's, with methods that are one or two launches."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...noise import Noise
from ...primitives import weighted_sum
from . import halves, multistep, score, single, solvers
from .facts import Facts
from .kinds import Kind, OfSigma
from .levels import ADD_NOISE, VELOCITY, Levels, places
from .sums import Plan

STEPS: dict[str, Kind] = {**single.KINDS, **halves.KINDS, **solvers.KINDS, **multistep.KINDS}
# By the name of a scheduler, its methods that step; the first is also the kind of its levels.
METHODS: dict[str, dict[str, Kind]] = {
    **{name: {"step": kind} for name, kind in STEPS.items()},
    "PNDMScheduler": multistep.PNDM,
    "ScoreSdeVeScheduler": score.SCORE_SDE_VE,
}
COVERED = tuple(METHODS)
ARGUMENTS = {"model_output", "timestep", "sample", "generator", "variance_noise", "return_dict"}  # of every `step`


class Fused:
    """What is put before upstream's class. noise_source: "torch" or "fused"."""

    noise_source: ClassVar[str]
    upstream: ClassVar[type]
    kind: ClassVar[Kind]  # of the levels, and of `step` where upstream has one way to step
    _facts: Facts | None = None
    _corrections = 0  # calls of step_correct since set_timesteps
    # Upstream's, where it has them.
    timesteps: Any
    _step_index: Any
    _begin_index: Any
    _threshold_sample: Any

    def __reduce__(self) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_facts"}
        return _restored, (self.upstream, self.noise_source, state)

    def _begin(self, f: Facts, timestep: Any) -> None:
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self._place(f, timestep) if begin is None else begin

    def _place(self, f: Facts, timestep: Any) -> int:
        try:
            return f.index(timestep)
        except IndexError:
            if not self.kind.elsewhere_last:
                raise
            return len(f.timesteps) - 1

    def _take(self, kind: Kind, given: dict[str, Any]) -> Any:
        """One call of a method of that kind."""
        output, sample = given["model_output"], given["sample"]
        f = Facts.of(self)
        if kind.set_first and f.steps is None:
            raise ValueError("Number of inference steps is 'None': call set_timesteps before step")
        if not kind.whole_timesteps and _is_whole(given["timestep"]):
            raise ValueError("step: timestep must be one of scheduler.timesteps, integer indices are not supported")
        if self.__dict__.get("is_scale_input_called") is False:
            logging.getLogger(self.upstream.__module__).warning("scale_model_input should be called before step")
        if kind.counts:
            self._begin(f, given["timestep"])
        key = kind.key(self, f, given)
        plan = f.plans.get((kind, key)) or _planned(kind, f, key)
        streams = {**given, **kind.history(self), "dtype": torch.promote_types(output.dtype, sample.dtype)}
        if plan.draws:
            own = given.get("variance_noise")
            if own is not None:
                streams["noise"] = own.to(output.device)
            else:
                draw = kind.keyed(self, given, key) if self.noise_source == "fused" else kind.drawn(self, given)
                streams["noise"] = draw
        if f.config.get("thresholding"):
            streams["threshold"] = self._threshold_sample
        kind.run(plan, streams, f, given)
        kind.advance(self, streams)
        previous = streams["prev_sample"]
        if kind.casts and given.get("per_token_timesteps") is None:
            previous = previous.to(given[kind.casts].dtype)
        both = (previous,) if kind.second is None else (previous, streams[kind.second])
        if not given["return_dict"]:
            return both
        return _output_class(self.upstream, kind.output)(*both)

    def _level(self, f: Facts, timesteps: Tensor, device: torch.device) -> Any:
        levels = Levels.of(f, self.kind)
        timesteps = timesteps.to(device)
        if self.kind.by_timestep:
            return levels.at(timesteps.long(), device)
        if self._begin_index is not None:
            index = self._begin_index if self._step_index is None else self._step_index
            return levels.at(index, device)
        known = self.timesteps.to(device)
        return levels.at(places(self.kind, known, timesteps.reshape(-1)), device)


def _add_noise(self: Any, original_samples: Tensor, noise: Tensor | Noise, timesteps: Tensor) -> Tensor:
    if noise is None:  # ScoreSdeVe then draws it itself
        noise = torch.randn_like(original_samples)
    level = self._level(Facts.of(self), timesteps, original_samples.device)
    made: Tensor = ADD_NOISE(level, sample=original_samples, noise=noise)
    return made


def _scale_noise(self: Any, sample: Tensor, timestep: Tensor, noise: Tensor | Noise) -> Tensor:
    return _add_noise(self, sample, noise, timestep)


def _get_velocity(self: Any, sample: Tensor, noise: Tensor | Noise, timesteps: Tensor) -> Tensor:
    f = Facts.of(self)
    timesteps = timesteps.to(sample.device)
    if isinstance(self.kind, OfSigma):
        if _is_whole(timesteps):
            raise ValueError("get_velocity: timesteps must be of scheduler.timesteps, integers are not supported")
        timesteps = places(self.kind, self.timesteps.to(sample.device), timesteps.reshape(-1))
    level = Levels.of(f, single.KINDS["DDPMScheduler"]).at(timesteps.long(), sample.device)
    made: Tensor = VELOCITY(level, sample=sample, noise=noise)
    return made


def _scale_model_input(self: Any, sample: Tensor, timestep: Any) -> Tensor:
    f = Facts.of(self)
    self._begin(f, timestep)
    if "is_scale_input_called" in self.__dict__:
        self.is_scale_input_called = True
    made: Tensor = weighted_sum((float(self.kind.scale(f, self.kind.input_sigma(self, f))), sample))
    return made


def _is_whole(timestep: Any) -> bool:
    if isinstance(timestep, Tensor):
        return timestep.dtype in (torch.int32, torch.int64)
    return isinstance(timestep, int)


def _planned(kind: Kind, f: Facts, key: tuple[Any, ...]) -> Plan:
    with np.errstate(all="ignore"):  # at the ends infinite and 0/0, of what is then not read
        made = f.plans[kind, key] = kind.plan(f, *key)
    return made


@functools.cache
def _output_class(upstream: type, name: str | None) -> Any:
    module = sys.modules[upstream.__module__]
    return getattr(module, name or f"{upstream.__name__}Output", None) or module.SchedulerOutput


def _method(upstream: type, name: str, kind: Kind) -> Callable[..., Any]:
    """Upstream's signature around _take. Raises NotImplementedError where it has arguments that are not known here."""
    theirs = getattr(upstream, name)
    _, *parameters = signature(theirs).parameters.values()
    names = [p.name for p in parameters]
    unknown = set(names) - ARGUMENTS - set(kind.options)
    if unknown:  # of a later diffusers: left aside, they would change nothing, and nobody would know
        raise NotImplementedError(
            f"fuse: {upstream.__name__}.{name} has arguments unknown here, which would be ignored: {sorted(unknown)}"
        )
    defaults = {p.name: p.default for p in parameters if p.default is not Parameter.empty}

    @functools.wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        if len(given) != len(names) or len(args) > len(names) or not kwargs.keys().isdisjoint(names[: len(args)]):
            signature(theirs).bind(self, *args, **kwargs)  # says what is wrong
        return self._take(kind, given)

    return method


def _as_signed(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own with upstream's signature, which pipelines inspect."""

    @functools.wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(self, *args, **kwargs)

    return method


def _set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
    self.upstream.set_timesteps(self, *args, **kwargs)
    self._corrections = 0
    Facts.of(self)  # here, so that no step has to read tables from a device


@functools.cache
def fused_class(upstream: type, noise_source: str) -> type:
    """A class of the same name, so that configs are saved under it."""
    methods = METHODS[upstream.__name__]
    kind = next(iter(methods.values()))
    own: dict[str, Any] = {name: _method(upstream, name, of) for name, of in methods.items()}
    replaced: dict[str, Callable[..., Any]] = {
        "set_timesteps": _set_timesteps,
        "add_noise": _add_noise,
        "scale_noise": _scale_noise,
        "get_velocity": _get_velocity,
    }
    if kind.scales:  # elsewhere it returns what it is given
        replaced["scale_model_input"] = _scale_model_input
    for name, ours in replaced.items():
        if hasattr(upstream, name):
            own[name] = _as_signed(getattr(upstream, name), ours)
    about = {"__module__": upstream.__module__, "__qualname__": upstream.__qualname__, "__doc__": upstream.__doc__}
    facts = {"upstream": upstream, "noise_source": noise_source, "kind": kind}
    return type(upstream.__name__, (Fused, upstream), {**own, **about, **facts})


def _restored(upstream: type, noise_source: str, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(fused_class(upstream, noise_source))
    made.__dict__.update(state)
    return made
