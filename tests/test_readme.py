"""What the README says, run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dae_fast as df
from benchmarks import readme_table

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What a reader's loop has at hand."""
    schedule, logged = df.Schedule.linear(1000), []
    x0 = torch.randn(4, 3, 8, 8)
    net = torch.nn.Conv2d(3, 3, 1)
    return {
        "torch": torch,
        "df": df,
        "step": 3,
        "x0": x0,
        "t": torch.randint(1000, (4,)),
        "alpha": schedule.alpha.float(),
        "sigma": schedule.sigma.float(),
        "batches": [x0, x0],
        "net": lambda x, t: net(x),
        "optimizer": torch.optim.SGD(net.parameters(), 0.1),
        "log": lambda *values: logged.append(values),
        "seen": SimpleNamespace(net=net, logged=logged),
    }


def test_the_op_and_its_equivalent(names: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    op, equivalent = BLOCKS[0], BLOCKS[1]
    exec(op, names)
    ours = names["x_t"]
    monkeypatch.setattr(torch, "randn_like", lambda x: names["noise"].normal(x.shape))
    exec(equivalent, names)
    torch.testing.assert_close(ours, names["x_t"])


def test_the_guarantee(names: dict) -> None:
    exec(BLOCKS[2], names)


def test_the_training_loop(names: dict) -> None:
    seen = names["seen"]
    before = seen.net.weight.clone()
    exec(BLOCKS[3], names)
    assert len(seen.logged) == 2
    assert not torch.equal(seen.net.weight, before)


def test_an_op_of_your_own(names: dict) -> None:
    exec(BLOCKS[0], names)
    names["pred"] = pred = torch.randn_like(names["x0"])
    exec(BLOCKS[4], names)
    assert torch.equal(names["x0_hat"], df.to_x0(names["x_t"], pred, names["schedule"][names["t"]]))
    assert names["x_half"].shape == names["x0"].shape


def test_every_block_is_run_here() -> None:
    assert len(BLOCKS) == 5


def test_named_ops_exist() -> None:
    for name in re.findall(r"`df\.([a-z_0-9.]+)", TEXT):
        thing = df
        for part in name.split("."):
            thing = getattr(thing, part)


def test_links_lead_somewhere() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / path).exists(), path


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_table_is_that_of_the_committed_results() -> None:
    (source,) = re.findall(r"\]\((benchmarks/results/.*?\.csv)\)", TEXT)
    assert readme_table.renewed(TEXT, ROOT / source) == TEXT
