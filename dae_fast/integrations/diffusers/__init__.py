"""diffusers' schedulers with fused steps: one line before the loop that is there.

from dae_fast.integrations import diffusers as fused
fused.fuse(pipe)
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from .facts import Facts
from .fused import COVERED, METHODS, Fused, fused_class

__all__ = ["COVERED", "fuse", "unfuse"]

T = TypeVar("T")


def fuse(pipe_or_scheduler: T, noise: Literal["torch", "fused"] = "torch") -> T:
    """Makes add_noise, get_velocity, scale_model_input and step of a scheduler one launch each; returns what it got.

    pipe_or_scheduler: a pipeline, whose `scheduler` is taken, or a scheduler of those in COVERED
    noise: "torch": drawn by torch through the caller's generator, the numbers of upstream. "fused": keyed and never
        stored; `generator` is then a list of torch.Generators or ints, a seed for each sample, and an image does not
        depend on its batch; of one generator the seed is the first sample's, the next the next's
    The object stays what it was: its class has the name and the signatures of upstream's, and configs are saved, loaded
    and copied as before. Coefficients come from upstream's own float32 tables, in float64, rounded once; bf16 and fp16
    are computed in fp32. In a loop over scheduler.timesteps no step waits for the device. Noise, where a method takes
    it, may be a df.Noise.
    Raises TypeError for an object without a covered scheduler, NotImplementedError for a config that has no fused step.
    """
    scheduler = _scheduler_of(pipe_or_scheduler)
    if noise not in ("torch", "fused"):
        raise ValueError(f"fuse: noise must be 'torch' or 'fused', got {noise!r}")
    upstream = scheduler.upstream if isinstance(scheduler, Fused) else type(scheduler)
    if upstream.__name__ not in COVERED or not upstream.__module__.startswith("diffusers."):
        raise TypeError(
            f"fuse: {upstream.__module__}.{upstream.__name__} is not covered; these are: {', '.join(COVERED)}"
        )
    for kind in METHODS[upstream.__name__].values():
        what = kind.not_covered(scheduler.config)
        if what is not None:  # a formula that is not written here: upstream's step would be no fused one, in silence
            raise NotImplementedError(
                f"fuse: {upstream.__name__} with {what} is not covered: no fused step has its formula; use it as it is"
            )
    if isinstance(scheduler, Fused) and scheduler.noise_source != noise:
        unfuse(scheduler)  # what was drawn of the other is not gone on with
    if not isinstance(scheduler, Fused):
        for kind in METHODS[upstream.__name__].values():
            kind.adopt(scheduler)
    scheduler.__class__ = fused_class(upstream, noise)
    Facts.of(scheduler)
    return pipe_or_scheduler


def unfuse(pipe_or_scheduler: T) -> T:
    """Undoes `fuse`, in the middle of a loop too; returns what it was given."""
    scheduler = _scheduler_of(pipe_or_scheduler)
    if isinstance(scheduler, Fused):
        for kind in METHODS[scheduler.upstream.__name__].values():
            kind.release(scheduler)
        for own in ("_facts", "_corrections"):
            scheduler.__dict__.pop(own, None)
        scheduler.__class__ = scheduler.upstream
    return pipe_or_scheduler


def _scheduler_of(given: Any) -> Any:
    scheduler = getattr(given, "scheduler", given)
    if not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"fuse: must be a pipeline or a scheduler of diffusers, got {type(given).__name__}")
    return scheduler
