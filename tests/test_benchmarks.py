"""The benchmark suite's machinery. No test looks at a time."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

import dae_fast as df
from benchmarks import __main__ as cli
from benchmarks import normals, pictures, readme_table, suite, tables
from benchmarks.cases import CASES
from benchmarks.environment import CPU, RESULTS, backends_on, default_backend, environment
from benchmarks.gate import Gate, WrongResultError
from benchmarks.growth import OURS_COMPILED, Point, fit
from benchmarks.measure import MIN_ROUNDS, interleave
from benchmarks.memory import usage
from benchmarks.peers import CLONE, COMPILE, EAGER, Setting, own_leaves, peer
from benchmarks.report import Row, by_setting, ratio, read_csv, write_csv, write_json
from benchmarks.suite import run, settings
from benchmarks.traffic import compiled_bytes, moved_bytes
from dae_fast.__main__ import main as command_line

from .conftest import LONGER

OURS = default_backend(CPU)
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


def test_normals_beside_the_libraries_that_are_here(capsys, monkeypatch, restore_threads):
    monkeypatch.setattr(normals, "SAMPLE_S", 1e-4)
    monkeypatch.setattr(normals, "one_thread", lambda isa: torch.set_num_threads(1))
    normals.main(["--seconds", "0"])
    printed = capsys.readouterr().out
    for name in (f"dae_fast, {df.kernels.native.isa()}", "torch, normal_", "numpy, Philox"):
        assert re.search(rf"{name} +\d+\.\d+ \(", printed), printed
    assert "oneMKL Philox" in printed or "not measured: onemkl: ImportError: no libmkl_rt.so" in printed


@pytest.mark.parametrize("setting", TINY, ids=str)
def test_gate_passes_ours_and_eager(setting):
    torch.manual_seed(0)  # of eager's noise, whose moments over so few values may differ by much
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
    assert ratio(rows, EAGER, OURS) is None


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
    memory = usage(lambda: (x.exp().neg(), torch.empty(3)), x.nbytes)
    assert memory.tensors == 2
    assert memory.peak_bytes == pytest.approx(2 * x.nbytes, rel=0.01)
    assert 12 <= memory.small_bytes <= 100


@pytest.mark.parametrize(
    ("call", "tensors"),
    [
        (lambda x: x.exp().neg(), 4),  # each reads one and writes one
        (lambda x: torch.randn_like(x), 1),
        (lambda x: x.add_(1), 2),
        (lambda x: x.view(-1).t(), 0),
        (lambda x: torch.zeros(1).expand_as(x) + x, 2),  # what is expanded is one element
        (lambda x: x.sum(), 1),
    ],
)
def test_moved_bytes_of_torch(call, tensors):
    x = torch.randn(64, 784)
    assert moved_bytes(lambda: call(x), x.numel()) == pytest.approx(tensors * x.nbytes, rel=1e-3)


@pytest.mark.parametrize("name", ["add_noise-fresh", "add_noise-target", "to_x0-clamp", "noise_mse-tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(OURS == "reference", reason="the reference makes several passes")
def test_our_ops_move_the_least(name, dtype):
    setting = Setting(BY_NAME[name], (64, 784), dtype, own_leaves(BY_NAME[name]))
    with torch.set_grad_enabled(bool(setting.leaves)):
        call = peer(setting, OURS)
        assert moved_bytes(call, 64 * 784) == suite.least_bytes(setting, call())


def test_moved_bytes_of_eager_and_compiled():
    setting = Setting(BY_NAME["to_x0-eps"], (64, 784), torch.float32)
    assert moved_bytes(peer(setting, EAGER), 64 * 784) == 7 * setting.sample_bytes, "sigma * pred, x_t - that, / alpha"
    with compiled_bytes() as compiled:
        peer(setting, COMPILE)()
    assert compiled.count == pytest.approx(3 * setting.sample_bytes, rel=0.1)


def test_buffers_of_the_cpu_are_the_inputs_that_all_peers_share():
    setting = Setting(BY_NAME["to_x0-eps"], SHAPE, torch.float32)
    (only,) = setting.buffers()
    assert only["pred"] is setting.inputs()["pred"]


def test_settings_cover_every_case():
    found = settings(CASES)
    assert {s.case for s in found} == set(CASES)
    assert len(found) == len(set(found))
    assert {(s.case, frozenset(s.leaves)) for s in found} >= {(case, frozenset(case.grads)) for case in CASES}


def test_plans():
    quick, full = suite.quick(), suite.full()
    assert {m.setting.case.name for m in quick} == set(suite.MAIN)
    assert len({m.setting for m in full}) == len(full)
    assert {m.setting.case for m in full} == set(suite.CASES)
    assert {m.setting.dtype for m in full} == {torch.float32, torch.bfloat16, torch.float16, torch.float64}
    sizes = [m.setting.sample_bytes for m in full if m.setting.dtype == torch.float32]
    assert (min(sizes), max(sizes)) == (16 * 2 * 4, 256 * 2**20)
    for measurement in (*quick, *full):
        assert {EAGER, OURS} <= set(measurement.peers)
    for measurement in quick:
        assert COMPILE in measurement.peers


def row(name: str, median: float | None = None, **fields) -> Row:
    defaults = {"case": "to_x0-eps", "mode": "forward", "shape": "64x784", "dtype": "float32", "peer": name}
    if median is not None:
        defaults |= {"median_ms": median, "q1_ms": round(0.9 * median, 4), "q3_ms": round(1.2 * median, 4)}
    return Row(**{**defaults, **fields})


ROWS = [
    row(EAGER, 3.0, rounds=7),
    row(OURS, 1.0, copy_share=0.5, least_bytes=300, moved_bytes=600),
    row("diffusers", 0.5),
    row(OURS, dtype="bfloat16", error='wrong, by "a lot"'),
]
ENVIRONMENT = {
    "device": "A CPU, large",
    "results": "cpu",
    "backend": OURS,
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


@pytest.mark.parametrize("text", ["", "case,peer\nto_x0-eps,eager\n"])
def test_another_csv_is_refused(tmp_path, text):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.csv is no file of these results"):
        read_csv(path)


def test_json(tmp_path):
    path = tmp_path / "cpu.json"
    write_json(path, ROWS, ENVIRONMENT)
    read = json.loads(path.read_text())
    assert read["environment"] == ENVIRONMENT
    assert [Row(**line) for line in read["rows"]] == ROWS


def test_environment_says_where():
    here = environment()
    assert here.keys() >= ENVIRONMENT.keys() | {"cpu_flags"}
    assert here["torch"] == torch.__version__
    assert here["backend"] in backends_on(CPU)


def test_ratio_is_of_medians():
    first, second = by_setting(ROWS).values()
    assert ratio(first, EAGER, OURS) == 3.0
    assert ratio(second, EAGER, OURS) is None


def test_row_facts():
    assert ROWS[1].passes == 2.0
    assert ROWS[0].passes is None
    assert ROWS[0].values == 64 * 784
    assert ROWS[0].sample_bytes == 4 * 64 * 784
    assert ROWS[3].sample_bytes == 2 * 64 * 784


def printed(table, **options) -> str:
    file = io.StringIO()
    Console(width=200, file=file, **options).print(table)
    return file.getvalue()


def test_summary_colours_losses_like_wins():
    text = printed(tables.summary(ROWS, ENVIRONMENT), force_terminal=True, color_system="standard")
    assert re.search(r"\x1b\[1;32m *3\.00", text), "a win over eager"
    assert re.search(r"\x1b\[1;31m *0\.50", text), "a loss to a library"
    assert re.search(r"\x1b\[1;31m *wrong", text)


@pytest.mark.parametrize("make", [tables.summary, tables.detail])
def test_tables_show_every_setting_and_the_machine(make):
    text = printed(make(ROWS, ENVIRONMENT))
    for shown in ("bfloat16", "float32", "diffusers", "A CPU, large", "abc", "2026-01-01", "2.0", "50%", "1 ±15%"):
        assert shown in text


def test_changes_are_those_beyond_the_spreads():
    slower = dataclasses.replace(ROWS[1], median_ms=2.0, q1_ms=1.9, q3_ms=2.2)
    within = dataclasses.replace(ROWS[0], median_ms=3.2, q1_ms=3.0, q3_ms=3.4)
    faster = dataclasses.replace(ROWS[2], median_ms=0.2, q1_ms=0.19, q3_ms=0.21)
    found = tables.changes(ROWS, [slower, within, faster, dataclasses.replace(slower, shape="1x1")])
    assert [(change.after.peer, change.beyond_spread) for change in found] == [
        (OURS, True),
        (EAGER, False),
        ("diffusers", True),
    ]
    text = printed(tables.comparison(found, ENVIRONMENT, ENVIRONMENT))
    assert "2.00" in text and "0.40" in text
    assert "1.07" in text, "eager's own change stands beside ours"


def test_compare_on_the_command_line(tmp_path):
    before, after = tmp_path / "a.csv", tmp_path / "b.csv"
    write_csv(before, ROWS, ENVIRONMENT)
    write_csv(after, [dataclasses.replace(ROWS[1], median_ms=9.0, q1_ms=8.9, q3_ms=9.1)], ENVIRONMENT)
    result = CliRunner().invoke(cli.app, ["--compare", str(before), str(after)])
    assert result.exit_code == 0, result.output
    assert "9.00" in result.output
    refused = CliRunner().invoke(cli.app, ["--compare", str(before), str(tmp_path / "none.csv")])
    assert refused.exit_code == 2


@pytest.mark.parametrize(("fixed", "slope"), [(2e-6, 3e-9), (0.0, 1e-9), (5e-6, 0.0)])
def test_fit_finds_the_line(fixed, slope):
    sizes = [10.0, 1e3, 1e5, 1e7]
    line = fit(sizes, [fixed + slope * x for x in sizes])
    assert line.fixed == pytest.approx(fixed, abs=1e-12)
    assert line.slope == pytest.approx(slope, abs=1e-15)


def test_fit_keeps_both_parts_from_going_below_zero():
    assert fit([1.0, 10.0], [1.0, 20.0]).fixed == 0.0
    assert fit([1.0, 10.0], [2.0, 1.0]).slope == 0.0


def drawn_results(folder: Path) -> Path:
    """A CSV with growth points beside it, as small as every picture allows."""
    source = folder / "cpu.csv"
    rows = [
        row(name, median, case=case, shape=shape, moved_bytes=10**6, values_per_s=1e9, gigabytes_per_s=50.0)
        for case in (*suite.MAIN, "normal-fresh")
        for shape in ("16x2", "64x784", "256x4x64x64")
        for name, median in ((EAGER, 2.0), (COMPILE, 0.5), (OURS, 1.0), (CLONE, 0.1), ("out.copy_(x)", 0.1))
    ]
    write_csv(source, rows, ENVIRONMENT)
    studies = [
        ("a", "threads"),
        ("langevin", "chains"),
        ("langevin", "steps"),
        ("ddim", "steps"),
        ("training step", "batch"),
    ]
    points = [
        Point(study, along, at, name, 1.0 * at, 0.9 * at, 1.1 * at, 10**6 * at)
        for study, along in studies
        for at in (1, 2)
        for name in (EAGER, COMPILE, OURS, OURS_COMPILED)
    ]
    write_csv(pictures.growth_file(source), points, ENVIRONMENT)
    return source


@LONGER
def test_pictures_are_the_same_bytes_from_every_process(tmp_path):
    source = drawn_results(tmp_path)
    drawn = pictures.draw_all(source)
    assert len(drawn) == 2 * len(pictures.PICTURES)
    first = [path.read_bytes() for path in drawn]
    script = (
        "import sys; from pathlib import Path; from benchmarks import pictures; pictures.draw_all(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", script, str(source)], cwd=Path(__file__).parent.parent, check=True)
    assert [path.read_bytes() for path in drawn] == first


def test_pictures_of_other_data_are_outdated(tmp_path):
    source = drawn_results(tmp_path)
    assert len(readme_table.outdated(source)) == 2 * len(pictures.PICTURES)
    pictures.draw_all(source)
    assert readme_table.outdated(source) == []
    growth = pictures.growth_file(source)
    growth.write_text(growth.read_text().replace("0.9", "0.8"))
    assert len(readme_table.outdated(source)) == 2 * len(pictures.PICTURES)


def test_committed_pictures_show_the_committed_results():
    sources = [path for path in RESULTS.glob("*.csv") if pictures.growth_file(path).exists()]
    assert sources
    for source in sources:
        assert readme_table.outdated(source) == []


def command(main) -> Typer:
    app = Typer()
    app.command()(main)
    return app


def test_readme_table_writes_and_checks(tmp_path, monkeypatch):
    two = {name: pictures.PICTURES[name] for name in ("bars", "roofline")}
    monkeypatch.setattr(pictures, "PICTURES", two)  # all are drawn above
    source, readme = drawn_results(tmp_path), tmp_path / "README.md"
    write_csv(source, [*ROWS, row(OURS, shape="256x4x64x64", error="wrong"), *read_csv(source)[0]], ENVIRONMENT)
    readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    call = ["--csv", str(source), "--readme", str(readme)]
    runner, app = CliRunner(), command(readme_table.main)

    assert runner.invoke(app, [*call, "--check"]).exit_code == 1
    assert "old" in readme.read_text()
    result = runner.invoke(app, call)
    assert result.exit_code == 0, result.output
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| add_noise-fresh | 64x784 | 2 | 0.5 | 1 | 2.0 | 0.5 |  |  |" in text
    assert "bfloat16" not in text, "only the dtype shown"
    assert "benchmarks/results/cpu-roofline-dark.svg" in text
    assert runner.invoke(app, [*call, "--check"]).exit_code == 0

    (tmp_path / "cpu-roofline-dark.svg").unlink()
    assert runner.invoke(app, [*call, "--check"]).exit_code == 1
    assert runner.invoke(app, call).exit_code == 0
    rows, _ = read_csv(source)
    write_csv(source, [dataclasses.replace(r, median_ms=r.median_ms and 2 * r.median_ms) for r in rows], ENVIRONMENT)
    assert runner.invoke(app, [*call, "--check"]).exit_code == 1


def test_readme_table_shows_what_is_wrong_and_the_other_libraries():
    refused = row(OURS, shape="256x4x64x64", error="wrong")
    text = readme_table.markdown([*ROWS, refused], ENVIRONMENT)
    assert "| to_x0-eps | 64x784 | 3 |  | 1 | 3.0 |  | diffusers 0.5 | 50% |" in text
    assert "| to_x0-eps | 256x4x64x64 |  |  | wrong |  |  |  |  |" in text


@pytest.mark.parametrize("text", ["", readme_table.BEGIN, f"{readme_table.END} {readme_table.BEGIN}"])
def test_readme_table_needs_its_markers(text):
    with pytest.raises(readme_table.MarkerError, match="once each"):
        readme_table.replaced(text, "")


def test_command_line(tmp_path: Path):
    path = tmp_path / "tiny.csv"
    arguments = ["--quick", "--case", "add_noise-fresh", "--shape", "8x16", "--peer", "eager", "--peer"]
    result = CliRunner().invoke(cli.app, [*arguments, OURS, "--csv", str(path)])
    assert result.exit_code == 0, result.output
    assert "add_noise-fresh" in result.output
    rows, environment = read_csv(path)
    assert {row.peer for row in rows} >= {EAGER, OURS, "torch.randn_like", "x.clone()"}
    assert all(row.median_ms is not None for row in rows)
    assert environment["torch"] == torch.__version__


@pytest.mark.parametrize(
    "arguments",
    [["--case", "nothing"], ["--shape", "8by16"], ["--dtype", "int8"], ["--peer", "jax"], ["--device", "tpu"]],
)
def test_command_line_refuses_unknown_names(arguments):
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_bench_is_a_command_of_the_package(capsys):
    with pytest.raises(SystemExit) as done:
        command_line(["bench", "--case", "nothing"])
    assert done.value.code == 2
    assert "no case starts with nothing" in capsys.readouterr().err


def test_bench_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "benchmarks.__main__", raising=False)
    assert command_line(["bench", "--quick"]) == 2
    assert "`pip install 'dae-fast[cli]'` brings what it needs" in capsys.readouterr().err


def test_pytest_form(tmp_path):
    """One group for each setting, named by its peers; saved, and compared with the saved."""
    call = [sys.executable, "-m", "pytest", "benchmarks/", "-p", "no:cacheprovider", f"--benchmark-storage={tmp_path}"]
    call += ["--case", "add_noise-tensor", "--shape", "8x16", "--dtype", "float32", "--peer", "eager", "--peer", OURS]
    call += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    root = Path(__file__).parent.parent
    # Beside other tests pytest-benchmark would measure nothing.
    alone = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}
    saved = subprocess.run([*call, "--benchmark-save=first"], cwd=root, env=alone, capture_output=True, text=True)
    assert saved.returncode == 0, saved.stdout
    assert "benchmark 'add_noise-tensor 8x16 float32, forward': 2 tests" in saved.stdout
    (file,) = tmp_path.rglob("*first.json")
    found = json.loads(file.read_text())["benchmarks"]
    assert {benchmark["name"] for benchmark in found} == {EAGER, OURS}
    compared = subprocess.run([*call, "--benchmark-compare=0001"], cwd=root, env=alone, capture_output=True, text=True)
    assert compared.returncode == 0, compared.stdout
    assert f"{OURS} (0001_first)" in compared.stdout and f"{OURS} (NOW)" in compared.stdout


def test_pytest_form_refuses_a_wrong_op(monkeypatch):
    from benchmarks import test_ops

    setting = Setting(BY_NAME["to_x0-eps"], SHAPE, torch.float32)
    monkeypatch.setattr(test_ops, "peer", lambda setting, name: wrong_by(setting, 1.1, name))
    benchmark = SimpleNamespace(extra_info={})
    with pytest.raises(WrongResultError):
        test_ops.test_op(benchmark, setting, OURS)


def test_a_peer_that_fails_leaves_the_others(monkeypatch):
    """A compiler's error, say, is its own row's."""
    setting = Setting(BY_NAME["to_x0-eps"], SHAPE, torch.float32)
    original = suite.peer

    def broken(setting, name):
        if name == OURS:
            raise RuntimeError("no such register")
        return original(setting, name)

    monkeypatch.setattr(suite, "peer", broken)
    rows = {row.peer: row for row in suite.run(setting, (EAGER, OURS), budget_s=0)}
    assert rows[OURS].error == "RuntimeError: no such register" and rows[OURS].median_ms is None
    assert rows[EAGER].error == "" and rows[EAGER].median_ms > 0
