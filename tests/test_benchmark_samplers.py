"""The loops that the samplers are measured against, by hand and diffusers', are the samplers themselves.

No test looks at a time.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

import dae_fast as df
from benchmarks import external, growth, loops, samplers, schedulers
from benchmarks.cases import SCHEDULE
from benchmarks.growth import OURS, Point
from benchmarks.loops import LOOPS, Loop, fresh
from benchmarks.peers import EAGER
from benchmarks.report import read_csv

from .test_samplers import network, same, start

# diffusers makes its tables so that numpy 2 complains at every call.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NOISE = df.Noise(3)
BY_NAME = {loop.name: loop for loop in LOOPS}
# Which sampler each scheduler of diffusers is; the others have none.
OFFERED = (
    "ddpm",
    "ddpm-learned",
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_sde",
    "flow_euler",
)
DRAWING = {
    "ddpm": "scheduling_ddpm",
    "ddpm-learned": "scheduling_ddpm",
    "euler_ancestral": "scheduling_euler_ancestral_discrete",
    "dpm_solver_pp_2m_sde": "scheduling_dpmsolver_multistep",
}
each_loop = pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)


def given(x: torch.Tensor, key: int) -> torch.Tensor:
    return NOISE.fold_in(key).normal(x.shape, dtype=x.dtype)


def told(loop: Loop, first: int = 0) -> loops.Network:
    """Of the kind that the loop needs, and it reads what it is told; `first`: the name of level 0."""

    def net(x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        eps = network(x, torch.zeros(len(x)) if t is None else t - first)
        return torch.cat((eps, torch.sin(3 * x)), 1) if loop.name == "ddpm-learned" else eps

    return net


def test_every_sampler_has_a_loop() -> None:
    """But MALA's, whose uniform numbers are no normals."""
    assert {name.split("-")[0] for name in BY_NAME} == {n for n in df.samplers.__all__ if n.islower()} - {"mala"}


@each_loop
def test_by_hand_is_the_sampler(loop: Loop) -> None:
    x = start(5, 7)
    same(loop.by_hand(x.dtype)(told(loop), x, given), loop.ours(told(loop), x, NOISE))


@each_loop
def test_the_networks_measured_fit(loop: Loop) -> None:
    """In the dtype measured, whose rounding grows over the steps to some 1e-6 of the largest value."""
    x = start(4, 9, dtype=torch.float32)
    got, ours = loop.by_hand(x.dtype)(loop.net, x, given), loop.ours(loop.net, x, NOISE)
    assert got.dtype == ours.dtype == x.dtype
    assert (got - ours).abs().max() <= external.TABLE_ERROR * ours.abs().max()


@pytest.mark.parametrize("name", [loop.name for loop in LOOPS])
def test_by_hand_draws_noise_where_the_sampler_does(name: str) -> None:
    loop, x = BY_NAME[name], start(5, 7)
    run = loop.by_hand(x.dtype)
    draws = not torch.equal(loop.ours(loop.net, x, df.Noise(0)), loop.ours(loop.net, x, df.Noise(1)))
    assert torch.equal(run(loop.net, x, fresh), run(loop.net, x, fresh)) != draws


@pytest.mark.parametrize("name", OFFERED)
def test_a_scheduler_is_the_sampler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same noise; its tables are in float32."""
    if "diffusers" in external.missing():
        pytest.skip(external.missing()["diffusers"])
    loop, x = BY_NAME[name], start(5, 7, dtype=torch.float32)
    run = schedulers.runs()[name]
    if name in DRAWING:
        levels = iter(range(len(loops.TEN) - 1, -1, -1))
        module = import_module(f"diffusers.schedulers.{DRAWING[name]}")
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: given(x, next(levels)))
    # FlowMatchEulerDiscreteScheduler tells T times the time: T at the first level, 1 at the last.
    got = run(told(loop, first=int(name == "flow_euler")), x, fresh)
    wanted = loop.ours(told(loop), x, NOISE)
    assert got.dtype == x.dtype
    assert (got - wanted).abs().max() <= external.TABLE_ERROR * wanted.abs().max()


@pytest.mark.parametrize("name", DRAWING)
def test_a_scheduler_draws_its_own_noise(name: str) -> None:
    if "diffusers" in external.missing():
        pytest.skip(external.missing()["diffusers"])
    loop, x = BY_NAME[name], start(5, 7, dtype=torch.float32)
    run = schedulers.runs()[name]
    assert not torch.equal(run(loop.net, x, fresh), run(loop.net, x, fresh))


def test_no_scheduler_is_left_untested() -> None:
    assert set(schedulers.runs()) == (set() if "diffusers" in external.missing() else set(OFFERED))


def test_without_diffusers_there_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "missing", lambda: {"diffusers": "gone"})
    monkeypatch.setattr(samplers, "SHAPES", ((2, 3),))
    assert all(set(peers) == {EAGER, OURS} for *_, peers in samplers.studies())


def test_growth_of_ddim_is_between_equals() -> None:
    """The by-hand loop takes the sampler's levels; float32 loses more where alpha is small."""
    for _, _, steps, peers in growth._ddim():
        ours, by_hand = peers[OURS](), peers[EAGER]()
        assert (ours - by_hand).abs().max() <= 1e-4 * ours.abs().max(), steps


@pytest.mark.parametrize("levels", [[999, 500, 20], [999]])
def test_ddim_by_hand_on_other_levels(levels: list[int]) -> None:
    x = start(5, 7)
    got = loops.ddim(SCHEDULE, levels, x.dtype)(network, x, fresh)
    same(got, df.samplers.ddim(network, x, SCHEDULE, NOISE, levels=levels))


def test_command_line(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samplers.csv"
    monkeypatch.setattr(samplers, "SHAPES", ((2, 3),))
    app = Typer()
    app.command()(samplers.main)
    result = CliRunner().invoke(app, ["--csv", str(path), "--budget", "0"])
    assert result.exit_code == 0, result.output
    points, _ = read_csv(path, Point)
    runs = schedulers.runs()
    assert {(p.study, p.along, p.at, p.peer) for p in points} == {
        (loop.name, "values", values, name)
        for loop in LOOPS
        for values in (6,)
        for name in (EAGER, OURS, *(("diffusers",) if loop.name in runs else ()))
    }
    for shown in ("euler_ancestral", "diffusers / native", "eager / native"):
        assert shown.replace("native", OURS) in result.output
