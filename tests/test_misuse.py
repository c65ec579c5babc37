"""Errors come from the surface: of every public callable, with every argument wrong in every way of misuse.WRONG."""

from __future__ import annotations

import inspect

import pytest

import dae_fast as df

from . import misuse

OUTCOMES: list[misuse.Outcome] = []


@pytest.fixture(scope="module")
def outcomes():
    return list(misuse.outcomes())


def test_every_error_names_the_function_or_the_argument(outcomes):
    """Of 20,473 calls 1,227 did not: an AttributeError, a torch error from the depths, a pybind signature."""
    assert len(outcomes) > 20_000
    assert [str(o) for o in outcomes if o.error is not None and not misuse.is_named(o)] == []


# What is right for some argument of these names.
RIGHT = {
    "None": {
        *("target", "perturbation", "out", "level", "weight", "level_weight", "mask", "delta", "log_variance", "clamp"),
        *("levels", "sample", "below", "times", "density", "weighting", "t", "name", "conditioning", "threshold"),
        *("guidance", "net_arguments", "steps", "noise", "pred", "score", "also", "estimate", "clamp_log_var"),
        *("preconditioner", "callback", "from_level", "to_level", "eta", "sigma_data", "variance", "v"),
    },
    "True": {
        *("return_x0_mse", "return_per_sample", "flip", "progress", "denoise", "use_clipped_model_output", "kl"),
        *("return_x0", "gradients", "exact", "corrected_x", "self_condition"),
    },
}
NEVER = (
    "1j",
    "bytes",
    "an object",
    "a dtype",
    "a layout",
    "{}",
    "an iterator",
    "nothing",
    "('a',)",
    "complex",
    "sparse",
)


EMPTY = (("name", "nothing"), ("net_arguments", "{}"))


def test_nonsense_is_refused(outcomes):
    """Whatever the argument, these are nothing that it could mean; and None and True only for some."""
    accepted = [o for o in outcomes if o.error is None]
    assert [o for o in accepted if o.wrong in NEVER and (o.argument, o.wrong) not in EMPTY] == []
    for wrong, right in RIGHT.items():
        assert [o for o in accepted if o.wrong == wrong and o.argument not in right] == []


def test_numbers_that_are_none_are_refused(outcomes):
    """A NaN is a value to put in the place of others, or one of a tensor; else it is nowhere right."""
    fine = {"value", "low", "high"}
    assert [o for o in outcomes if o.error is None and o.wrong == "nan" and o.argument not in fine] == []


def test_every_public_callable_is_called():
    """By name, classes by their making."""
    called = {getattr(c.function, "__self__", c.function).__class__.__name__ for c in misuse.calls()}
    called |= {getattr(c.function, "__name__", "") for c in misuse.calls()}
    public = {n for n in df.__all__ if callable(getattr(df, n))} | set(df.samplers.__all__)
    assert public - called <= {"info", "backend_names", "Sampler"}  # the last is what samplers share


def test_every_argument_is_given():
    """Those with a default that misuse.calls leaves out would not be looked at."""
    for call in misuse.calls():
        names = {
            p.name
            for p in inspect.signature(call.function).parameters.values()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        assert names <= set(call.arguments), (call.name, names - set(call.arguments))
