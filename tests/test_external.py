"""Other libraries as peers: each does the maths of its case where it installs, and says why it is absent elsewhere."""

from __future__ import annotations

import builtins

import pytest
import torch

import dae_fast as df
from benchmarks import composed, external
from benchmarks.cases import CASES
from benchmarks.gate import Gate, WrongResultError
from benchmarks.peers import STEP, Setting, own_leaves, peer

OWN = (*external.CASES, *composed.CASES)
BY_NAME = {case.name: case for case in (*CASES, *OWN)}
SHAPE = (16, 3, 16, 16)
# What each library has one call for.
OFFERED = {
    "diffusers": {"add_noise-fresh", "add_noise-tensor", "add_noise-target", "ddpm_step-fresh", "ddim_step"},
    "denoising-diffusion-pytorch": {
        "add_noise-fresh",
        "add_noise-tensor",
        "to_x0-eps",
        "to_x0-v",
        "to_eps-x0",
        "objective-fresh",
    },
    "torchsde": {"brownian_increment"},
    "torch.func._random": {"normal-fresh", "add_noise-fresh"},
    "numpy": {"normal-fresh", "add_noise-fresh", "add_noise-tensor", "to_x0-eps"},
}
MISSING = external.missing()


def setting(name: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Setting:
    return Setting(BY_NAME[name], shape, dtype, own_leaves(BY_NAME[name]))


def require(library: str) -> None:
    if library in MISSING:
        pytest.skip(f"{library}: {MISSING[library]}")


@pytest.mark.parametrize(
    ("library", "name"), [(each, name) for each, names in OFFERED.items() for name in sorted(names)]
)
def test_a_library_does_the_maths_of_the_case(library: str, name: str) -> None:
    require(library)
    where = setting(name)
    call = external.peers(where)[library]
    gate = Gate(where)
    with torch.set_grad_enabled(bool(where.leaves)):
        results = gate.check(library, call) if where.case.fresh else call()
    if not where.case.fresh:
        for result, right in zip(results, gate.right, strict=True):
            assert (result.double() - right).abs().max() <= external.TABLE_ERROR * right.abs().max()
    assert all(result.dtype == torch.float32 for result in results)
    again = call()[0]
    assert torch.equal(results[0], again) == (not where.case.fresh or library == "torch.func._random"), (
        "fresh noise is drawn in every call"
    )


@pytest.mark.parametrize("case", OWN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["eager", *df.backend_names()])
def test_own_cases_pass_the_gate(case, dtype: torch.dtype, name: str) -> None:
    where = setting(case.name, dtype)
    with torch.set_grad_enabled(bool(where.leaves)):
        Gate(where).check(name, peer(where, name))


def test_the_gate_holds_libraries_to_the_maths() -> None:
    where = setting("add_noise-tensor")
    right = external.peers(where)["numpy"]
    with pytest.raises(WrongResultError, match="is wrong"):
        Gate(where).check("numpy", lambda: (right()[0] * 1.01,))


def test_the_sampler_steps_are_those_of_the_samplers() -> None:
    """A network that returns the given output: the sampler's own loop comes to the same tensor."""
    schedule = df.Schedule.linear(1000)
    inputs = setting("ddim_step").inputs()
    x, pred = inputs["x"], inputs["pred"]
    seen = []

    def net(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x_t)
        return pred if int(t[0]) == external.STEP_LEVEL else torch.zeros_like(x_t)

    short = df.Schedule.from_alpha_bar(schedule.alpha_bar[: external.STEP_LEVEL + 1])
    df.samplers.ddim(net, x, short, df.Noise(0), steps=len(short))
    torch.testing.assert_close(BY_NAME["ddim_step"].ours(inputs), seen[1], rtol=0, atol=0)


def test_torch_random_is_our_stream() -> None:
    require("torch.func._random")
    where = setting("normal-fresh")
    ours = df.Noise(0).fold_in(STEP).normal(SHAPE)
    # Torch's own logarithm is off by up to 2e-5 near u = 1.
    torch.testing.assert_close(external.peers(where)["torch.func._random"]()[0], ours, rtol=0, atol=2e-5)


def test_nothing_is_offered_where_it_does_not_fit() -> None:
    assert "numpy" not in external.peers(setting("add_noise-fresh", torch.bfloat16))
    assert "numpy" not in external.peers(Setting(BY_NAME["to_x0-eps"], SHAPE, torch.float32, ("pred",)))
    assert external.peers(setting("objective-fresh", shape=(64, 784))).keys() <= {"diffusers"}
    assert external.peers(setting("noise_mse-mask")) == {}


@pytest.mark.parametrize("error", [ImportError("No module named 'x'"), RuntimeError("operator y does not exist\nmore")])
def test_a_library_that_does_not_import_is_absent_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = builtins.__import__

    def broken(name: str, *rest):
        if name.split(".")[0] in ("diffusers", "denoising_diffusion_pytorch"):
            raise error
        return real(name, *rest)

    caches = (external._why_missing, external._diffusers, external._lucidrains)
    for cache in caches:
        cache.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "__import__", broken)
            reasons = external.missing()
            offered = external.peers(setting("add_noise-tensor"))
    finally:
        for cache in caches:
            cache.cache_clear()
    first_line = str(error).splitlines()[0]
    assert reasons["diffusers"] == f"{first_line} (pip install .[peers])"
    assert reasons["denoising-diffusion-pytorch"].startswith(f"{first_line} (pip install .[peers-torchvision]")
    assert set(offered) == {"numpy"}
