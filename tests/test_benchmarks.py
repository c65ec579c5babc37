"""The benchmark suite's machinery. No test looks at a time."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from benchmarks import __main__ as cli
from benchmarks import readme_table
from benchmarks.gate import Gate, WrongResultError
from benchmarks.measure import MIN_ROUNDS, interleave
from benchmarks.memory import allocations
from benchmarks.peers import EAGER, OURS, Setting, own_leaves, peer
from benchmarks.report import Row, by_setting, ratio, read_csv, write_csv
from benchmarks.suite import run, settings

from .cases import CASES

SHAPE = (8, 16)
BY_NAME = {case.name: case for case in CASES}
TINY = [
    Setting(case, SHAPE, dtype, leaves)
    for case in CASES
    for dtype in (torch.float32, torch.bfloat16)
    for leaves in dict.fromkeys((own_leaves(case), case.grads))
]


def wrong_by(setting: Setting, factor: float, name: str = OURS):
    right = peer(setting, name)
    return lambda: tuple(result * factor for result in right())


@pytest.mark.parametrize("setting", TINY, ids=str)
def test_gate_passes_ours_and_eager(setting):
    gate = Gate(setting)
    for name in (OURS, EAGER):
        assert len(gate.check(name, peer(setting, name))) >= 1 + len(setting.leaves)


@pytest.mark.parametrize("setting", TINY, ids=str)
def test_gate_refuses_a_wrong_op(setting):
    with pytest.raises(WrongResultError, match=f"{setting.case.name} 8x16 .* is wrong"):
        Gate(setting).check(OURS, wrong_by(setting, 1.1))


def test_gate_refuses_a_peer_with_too_much_noise():
    setting = Setting(BY_NAME["add_noise-fresh"], (64, 784), torch.float32)
    with pytest.raises(WrongResultError, match="rms"):
        Gate(setting).check(EAGER, wrong_by(setting, 1.1, EAGER))


def test_gate_refuses_nan_and_other_shapes():
    setting = Setting(BY_NAME["to_x0-eps"], SHAPE, torch.float32)
    gate = Gate(setting)
    with pytest.raises(WrongResultError, match="is wrong"):
        gate.check(OURS, wrong_by(setting, float("nan")))
    with pytest.raises(WrongResultError, match="shapes"):
        gate.check(OURS, lambda: (torch.zeros(8, 15),))


def test_a_refused_peer_gets_no_speed(monkeypatch):
    case = BY_NAME["to_x0-eps"]
    wrong = dataclasses.replace(case, ours=lambda inputs: 1.1 * case.ours(inputs))
    rows = {row.peer: row for row in run(Setting(wrong, SHAPE, torch.float32), (EAGER, OURS), budget_s=0)}
    assert "is wrong" in rows[OURS].error
    assert rows[OURS].median_ms is None
    assert rows[EAGER].median_ms is not None
    assert ratio(rows, EAGER) is None


def test_every_peer_takes_the_same_number_of_turns():
    calls: Counter[str] = Counter()
    peers = {name: lambda name=name: calls.update((name,)) for name in "abc"}
    timings = interleave(peers, budget_s=0, sample_s=0)
    assert len(set(calls.values())) == 1
    assert {len(timing.seconds) for timing in timings.values()} == {MIN_ROUNDS}


def test_peers_take_turns_within_a_round():
    order: list[str] = []
    peers = {name: lambda name=name: order.append(name) for name in "abc"}
    interleave(peers, budget_s=0, sample_s=0)
    turns = order[-6 * MIN_ROUNDS :]  # an untimed call and a timed one in each turn
    for k in range(0, len(turns), 6):
        assert Counter(turns[k : k + 6]) == {"a": 2, "b": 2, "c": 2}


def test_memory_counts_what_one_call_allocates():
    x = torch.randn(64, 784)
    memory = allocations(lambda: (x.exp().neg(), torch.empty(3)), x.nbytes)
    assert memory.tensors == 2
    assert memory.peak_bytes == pytest.approx(2 * x.nbytes, rel=0.01)
    assert 12 <= memory.small_bytes <= 100


def test_settings_cover_every_case():
    found = settings()
    assert {s.case for s in found} == set(CASES)
    assert len(found) == len(set(found))
    assert {(s.case, frozenset(s.leaves)) for s in found} >= {(case, frozenset(case.grads)) for case in CASES}


ROWS = [
    Row("to_x0-eps", "forward", "8x16", "float32", EAGER, median_ms=3.0, q1_ms=2.5, q3_ms=4.0, rounds=7),
    Row("to_x0-eps", "forward", "8x16", "float32", OURS, median_ms=1.0, q1_ms=1.0, q3_ms=1.25, copy_share=0.5),
    Row("to_x0-eps", "forward", "8x16", "bfloat16", OURS, error='wrong, by "a lot"'),
]
ENVIRONMENT = {
    "device": "A CPU, large",
    "threads": "2",
    "torch": "2.13.0",
    "dae_fast": "0.1.0",
    "python": "3.11",
    "commit": "abc",
    "date": "2026-01-01",
}


def test_csv_round_trip(tmp_path):
    path = tmp_path / "results" / "cpu.csv"
    write_csv(path, ROWS, ENVIRONMENT)
    assert read_csv(path) == (ROWS, ENVIRONMENT)


def test_ratio_is_of_medians():
    first, second = by_setting(ROWS).values()
    assert ratio(first, EAGER) == 3.0
    assert ratio(second, EAGER) is None


def command(main) -> Typer:
    app = Typer()
    app.command()(main)
    return app


def test_readme_table_writes_and_checks(tmp_path):
    source, readme = tmp_path / "cpu.csv", tmp_path / "README.md"
    refused = [dataclasses.replace(row, dtype="float32", shape="4x4") for row in ROWS if row.dtype == "bfloat16"]
    write_csv(source, [*ROWS, *refused], ENVIRONMENT)
    readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    call = ["--csv", str(source), "--readme", str(readme)]
    runner, app = CliRunner(), command(readme_table.main)

    assert runner.invoke(app, [*call, "--check"]).exit_code == 1
    assert "old" in readme.read_text()
    assert runner.invoke(app, call).exit_code == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| to_x0-eps | 8x16 | 3 |  | 1 | 3.0 |  | 50% |" in text
    assert "| to_x0-eps | 4x4 |  |  | wrong |  |  |  |" in text
    assert text.count("to_x0-eps") == 2, "only the dtype shown"
    assert runner.invoke(app, [*call, "--check"]).exit_code == 0

    write_csv(source, [dataclasses.replace(ROWS[0], median_ms=3.5), *ROWS[1:]], ENVIRONMENT)
    assert runner.invoke(app, [*call, "--check"]).exit_code == 1


@pytest.mark.parametrize("text", ["", readme_table.BEGIN, f"{readme_table.END} {readme_table.BEGIN}"])
def test_readme_table_needs_its_markers(text):
    with pytest.raises(readme_table.MarkerError, match="once each"):
        readme_table.replaced(text, "")


def test_command_line(tmp_path: Path):
    path = tmp_path / "tiny.csv"
    arguments = ["--quick", "--case", "add_noise-fresh", "--shape", "8x16", "--peer", "eager", "--peer"]
    result = CliRunner().invoke(command(cli.main), [*arguments, OURS, "--csv", str(path)])
    assert result.exit_code == 0, result.output
    assert "add_noise-fresh" in result.output
    rows, environment = read_csv(path)
    assert {row.peer for row in rows} >= {EAGER, OURS, "torch.randn_like", "x.clone()"}
    assert all(row.median_ms is not None for row in rows)
    assert environment["torch"] == torch.__version__


@pytest.mark.parametrize(
    "arguments", [["--case", "nothing"], ["--shape", "8by16"], ["--dtype", "int8"], ["--peer", "jax"]]
)
def test_command_line_refuses_unknown_names(arguments):
    assert CliRunner().invoke(command(cli.main), arguments).exit_code == 2
