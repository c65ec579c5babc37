"""The training loops that are measured end to end do the same maths. No test looks at a time."""

from __future__ import annotations

import csv

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

import dae_fast as df
from benchmarks import end_to_end
from benchmarks.end_to_end import ALONE, EAGER, FUSED, SCHEDULE, TASKS
from benchmarks.measure import Timing

from .conftest import LONGER

pytest.importorskip("sklearn")


@pytest.fixture(params=TASKS, ids=lambda task: task.name)
def task(request):
    torch.manual_seed(0)
    return request.param


def test_data_is_what_its_description_says(task):
    x0 = task.data()
    assert x0.is_contiguous() and x0.dtype == torch.float32
    assert x0.shape == {"MLP": (64, 784), "U-Net": (32, 3, 32, 32), "DiT": (8, 4, 32, 32)}[task.name]
    if "synthetic" not in task.source:
        assert x0.min() >= -1 and x0.max() <= 1
        assert x0.flatten(1).std(1).min() > 0.01, "no blank images"
        assert len(x0.unique(dim=0)) == len(x0), "no image twice"


def test_networks_read_the_sample_and_the_level(task):
    net, x = task.network(), task.data()[:2]
    t = torch.tensor([10, 900])
    # Gates start near zero; at random weights every path is open.
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.05)
    out = net(x, t)
    assert out.shape == x.shape
    assert not torch.allclose(out, net(x + 0.1, t))
    assert not torch.allclose(out[0], net(x, t.flip(0))[0])
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_objectives_are_the_same(task):
    net, x0 = task.network(), task.data()[:4]
    t, noise = torch.tensor([0, 300, 600, 999]), df.Noise(3)
    alphas, sigmas = SCHEDULE.alpha.float(), SCHEDULE.sigma.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: noise.normal(x.shape))
        plain = end_to_end.plain_objective(net, x0, t, alphas, sigmas)
    fused = end_to_end.fused_objective(net, x0, t, noise)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)
    parameters = list(net.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(fused, parameters), torch.autograd.grad(plain, parameters), strict=True
    ):
        # Sums over a batch in another order: fp32's error there is relative to the largest gradient.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-9)


def test_every_loop_trains_its_own_copy():
    net, x0 = TASKS[0].network(), TASKS[0].data()
    before = [p.clone() for p in net.parameters()]
    steps = end_to_end.loops(net, x0, compiled=False)
    assert list(steps) == [EAGER, FUSED, ALONE]
    first = {name: float(step()) for name, step in steps.items() if name != ALONE}
    steps[ALONE]()
    for _ in range(60):
        last = {name: float(steps[name]()) for name in first}
    assert all(last[name] < 0.95 * first[name] for name in first), "the loss falls"
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@LONGER
def test_compiled_loops_run():
    net, x0 = TASKS[0].network(), TASKS[0].data()
    for name, step in end_to_end.loops(net, x0).items():
        assert torch.isfinite(step()).all(), name


def test_the_share_outside_is_taken_round_by_round():
    timings = {
        EAGER: Timing((3.0, 6.0, 4.0), 1),
        FUSED: Timing((1.0, 2.0, 3.0), 1),
        ALONE: Timing((1.0, 2.0, 3.0), 1),
    }
    facts = ("MLP", "data", "2x2", 7)
    eager, fused, alone = (end_to_end._row(facts, name, timings, 0) for name in timings)
    assert (eager.outside_ms, eager.outside_share) == (2000.0, 0.5)
    assert (fused.outside_ms, fused.outside_share) == (0.0, 0.0)
    assert alone.outside_ms is None and alone.outside_share is None
    assert eager.steps_per_s == 0.25


def command() -> Typer:
    app = Typer()
    app.command()(end_to_end.main)
    return app


def test_command_line(tmp_path):
    path = tmp_path / "end.csv"
    result = CliRunner().invoke(command(), ["--quick", "--task", "mlp", "--budget", "0.1", "--csv", str(path)])
    assert result.exit_code == 0, result.output
    assert "network alone" in result.output
    rows = list(csv.DictReader(path.open()))
    assert [row["loop"] for row in rows] == [EAGER, FUSED, ALONE]
    assert all(float(row["steps_per_s"]) > 0 and int(row["peak_bytes"]) > 4 * 64 * 784 for row in rows)
    assert rows[0]["torch"] == torch.__version__ and rows[0]["commit"] and rows[0]["date"]


def test_command_line_refuses_an_unknown_task():
    result = CliRunner().invoke(command(), ["--task", "GAN"])
    assert result.exit_code == 2 and "no such task: GAN" in result.output
