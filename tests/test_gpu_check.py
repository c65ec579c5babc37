"""`make gpu-check` without a GPU: its steps, its time limits, its exit code; and the suite that it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_check
from benchmarks.environment import CPU, environment
from benchmarks.gpu_check import Outcome, Step
from benchmarks.report import Row, read_csv
from benchmarks.suite import MAIN

ROOT = Path(__file__).parent.parent
# What a bare machine with torch may lack (mpmath and numpy come with it).
OPTIONAL = ("rich", "typer", "matplotlib", "scipy", "sklearn", "hypothesis", "diffusers")


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    return tmp_path


def shell(name: str, script: str) -> Step:
    return Step(name, ["sh", "-c", script])


class TestSteps:
    def test_what_they_printed_last_and_how_they_ended(self, capsys: pytest.CaptureFixture[str]) -> None:
        good, bad = gpu_check.run([shell("good", "echo one; echo two"), shell("bad", "echo no >&2; exit 3")], 60)
        assert (good.result, good.what) == ("passed", "two")
        assert (bad.result, bad.what) == ("failed", "no")
        assert "one\ntwo" in capsys.readouterr().out

    def test_they_run_at_once(self) -> None:
        meet = "touch {0}; for i in $(seq 200); do [ -e {1} ] && exit 0; sleep 0.1; done; exit 1"
        place = gpu_check.LOGS.parent
        steps = [shell("a", meet.format(place / "a", place / "b")), shell("b", meet.format(place / "b", place / "a"))]
        assert [o.result for o in gpu_check.run(steps, 60)] == ["passed", "passed"]

    def test_one_that_takes_too_long_may_say_what_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_check, "LEAST_S", 0.0)
        code = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('two failed')"
        (slow,) = gpu_check.run([Step("slow", [sys.executable, "-c", code])], 3.0)
        assert slow.result == "failed"
        assert slow.what.startswith("killed after") and slow.what.endswith("two failed")

    def test_one_that_takes_too_long_is_killed_with_its_children(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_check, "LEAST_S", 0.0)
        child = gpu_check.LOGS.parent / "child"
        (slow,) = gpu_check.run([shell("slow", f"echo begun; sleep 600 & echo $! > {child}; wait")], 1.0)
        assert slow.result == "failed"
        assert slow.what.startswith("killed after") and slow.what.endswith("begun")
        pid = int(child.read_text())
        for _ in range(100):
            # Gone, or a zombie that nobody has waited for.
            state = Path(f"/proc/{pid}/stat")
            if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
                return
            time.sleep(0.1)
        pytest.fail("the child is alive")

    def test_none_begins_without_time(self) -> None:
        (late,) = gpu_check.run([shell("late", "exit 1")], gpu_check.LEAST_S - 1)
        assert (late.result, late.what) == ("skipped", "no time left")

    def test_the_interpreter_is_not_inherited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        step = Step("env", ["sh", "-c", "echo ${TRITON_INTERPRET-unset} $MORE"], {"MORE": "more"})
        assert gpu_check.run([step], 60)[0].what == "unset more"


class TestWhatIsRun:
    @pytest.mark.parametrize(
        ("results", "code"),
        [(["passed", "skipped"], 0), (["passed", "failed", "passed"], 1)],
    )
    def test_the_exit_code(self, capsys: pytest.CaptureFixture[str], results: list[str], code: int) -> None:
        outcomes = [Outcome(shell(f"step {k}", ""), result, 1.0, "") for k, result in enumerate(results)]
        assert gpu_check.main([], lambda python, minutes: outcomes) == code
        assert [line.split()[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("step")] == [
            ["step", str(k), result] for k, result in enumerate(results)
        ]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_stops_at_once(self) -> None:
        outcomes = gpu_check.check(sys.executable, 1.0)
        assert [(o.step.name, o.result) for o in outcomes] == [("GPU", "failed")]
        assert "sees no GPU" in outcomes[0].what

    def python(self, failing: str = "nothing of it") -> str:
        """A stand-in that writes down how it was called, and fails for one of the calls."""
        place = gpu_check.LOGS.parent
        stand_in = place / "python"
        # One write to a call: some run side by side.
        called = f"""printf '%s\\n' "$(echo "$@" | tr '\\n' ' ')" >> {place}/calls"""
        broken = f'case "$*" in *"{failing}"*) echo broken; exit 1;; esac'
        stand_in.write_text(f"#!/bin/sh\n{called}\n{broken}\necho fine\n")
        stand_in.chmod(0o755)
        return str(stand_in)

    def calls(self) -> list[str]:
        return (gpu_check.LOGS.parent / "calls").read_text().splitlines()

    def sanitizer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        place = gpu_check.LOGS.parent / "bin"
        place.mkdir()
        tool = place / "compute-sanitizer"
        called = f'echo "sanitizer $@ $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {place.parent}/calls'
        tool.write_text(f"#!/bin/sh\n{called}\necho fine\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")

    def test_everything_in_its_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sanitizer(monkeypatch)
        outcomes = gpu_check.check(self.python(), 9.5)
        assert {o.result for o in outcomes} == {"passed"}
        names = [o.step.name for o in outcomes]
        assert names[:3] == ["GPU", "build", "backends"]
        assert names[-4:] == ["host time", "benchmarks", "memcheck", "racecheck"]
        calls = self.calls()
        assert "pip install" in calls[1] and "--no-build-isolation --no-deps -e ." in calls[1]
        tests = [call for call in calls if "-m pytest -m gpu" in call and not call.startswith("sanitizer")]
        assert len(tests) == len(gpu_check.SHARDS) + 2  # the other files, and the host time
        (seconds,) = (float(call.split()[-1]) for call in calls if "benchmarks.gpu" in call)
        # What is left of nine and a half minutes when nothing else took any.
        assert seconds == pytest.approx(9.5 * 60 - 2 * gpu_check.SANITIZER_S - gpu_check.GRACE_S, abs=20)
        for call, tool in zip(calls[-2:], ("memcheck", "racecheck"), strict=True):
            assert f"--tool {tool} --error-exitcode 1" in call
            assert call.endswith("short_run 1")

    def test_a_failing_step_does_not_cost_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sanitizer(monkeypatch)
        outcomes = gpu_check.check(self.python(failing="benchmarks.gpu"), 9.5)
        assert [o.step.name for o in outcomes if o.result != "passed"] == ["benchmarks"]
        assert outcomes[-1].step.name == "racecheck"

    def test_nothing_runs_without_a_build(self) -> None:
        outcomes = gpu_check.check(self.python(failing="pip install"), 9.5)
        assert [(o.step.name, o.result) for o in outcomes] == [("GPU", "passed"), ("build", "failed")]

    def test_a_missing_sanitizer_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setenv("CUDA_HOME", "/nowhere")
        (outcome,) = gpu_check.run([gpu_check.sanitizer_step(sys.executable, "memcheck")], 60)
        assert outcome.result == "skipped"
        assert outcome.what == "compute-sanitizer is neither on the PATH nor in /nowhere/bin"

    def test_the_probes_are_code(self) -> None:
        done = subprocess.run([sys.executable, "-c", gpu_check.BACKENDS], capture_output=True, text=True, cwd=ROOT)
        assert "native: built" in done.stdout
        if not torch.cuda.is_available():
            assert done.returncode == 1
            assert done.stderr.strip() == "missing: cuda, triton"

    def test_make_runs_it_with_the_given_python(self) -> None:
        command = ["make", "-n", "--no-print-directory", "gpu-check", "PYTHON=some-python"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "some-python -m benchmarks.gpu_check"


# Those of the first argument are not to be found.
BARE = """
import sys
from functools import partial
from importlib.machinery import PathFinder

def search(missing, find_spec, name, *rest):
    return None if name.partition(".")[0] in missing else find_spec(name, *rest)

PathFinder.find_spec = partial(search, sys.argv.pop(1).split(","), PathFinder.find_spec)
"""


def bare(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE + code, ",".join(OPTIONAL), *arguments], cwd=ROOT, capture_output=True, text=True
    )


def collected(*options: str) -> list[str]:
    done = bare(
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))",
        *("--collect-only", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *options),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


class TestOnABareMachine:
    def test_the_shards_are_all_the_tests_once(self) -> None:
        parts = [collected(gpu_check.TESTS, "-k", which) for which in (*gpu_check.SHARDS.values(), "host_cost")]
        assert all(parts)
        assert sorted(test for part in parts for test in part) == sorted(collected(gpu_check.TESTS))

    def test_the_other_files_can_be_read(self) -> None:
        others = gpu_check.other_tests()
        assert "tests/test_triton.py" in others  # which says at once that there is no GPU
        assert {test.partition("::")[0] for test in collected(*others)} >= {"tests/test_schedule.py"}

    def test_the_script_needs_no_package(self) -> None:
        """It runs before the build: importing it must not import dae_fast, nor torch."""
        done = bare("import benchmarks.gpu_check; sys.exit('torch' in sys.modules or 'dae_fast' in sys.modules)")
        assert done.returncode == 0, done.stderr

    def test_the_suite_is_there(self) -> None:
        done = bare("import benchmarks.gpu")
        assert done.returncode == 0, done.stderr


class TestSuite:
    def test_the_plan(self) -> None:
        plan = gpu.plan(CPU)
        settings = [m.setting for m in plan]
        assert len(set(settings)) == len(settings)
        assert {s.case.name for s in settings[:14]} == set(MAIN)
        main = [s.sample_bytes for s in settings[14:] if s.case.name in MAIN and s.mode != "with all gradients"]
        assert main == sorted(main, reverse=True)
        assert all("native" in m.peers for m in plan)

    def test_what_is_measured_is_written_and_drawn(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        plan = [m for m in gpu.plan(CPU) if m.setting.shape_name == "64x64"][:2]
        path = tmp_path / "results" / "gpu.csv"
        rows, errors = gpu.measure(plan, 60.0, path, environment())
        assert not errors
        assert read_csv(path)[0][0].setting == rows[0].setting
        assert {row.setting for row in rows} == {
            (m.setting.case.name, m.setting.mode, "64x64", "float32") for m in plan
        }
        gpu.draw(rows, environment(), tmp_path / "picture.svg")
        assert "64x64 float32" in (tmp_path / "picture.svg").read_text() or (tmp_path / "picture.svg").stat().st_size

    def test_time_that_runs_out_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows, errors = gpu.measure(gpu.plan(CPU), -1.0, tmp_path / "gpu.csv", environment())
        assert (rows, errors) == ([], [])
        assert "not measured: " in capsys.readouterr().out

    def test_one_broken_setting_does_not_cost_the_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = gpu.plan(CPU)[:2]
        row = Row("case", "forward", "64x784", "float32", "native", median_ms=1.0, copy_share=0.5)

        def run(setting: object, names: object, *, budget_s: float) -> list[Row]:
            if setting == plan[0].setting:
                raise RuntimeError("no kernel image")
            return [row]

        monkeypatch.setattr(gpu.suite, "run", run)
        rows, errors = gpu.measure(plan, 60.0, tmp_path / "gpu.csv", environment())
        assert rows == [row]
        assert len(errors) == 1 and "RuntimeError: no kernel image" in errors[0]

    @pytest.mark.parametrize("wrong", [False, True])
    def test_main_without_matplotlib(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: bool
    ) -> None:
        row = Row("add_noise-fresh", "forward", "64x784", "float32", "native", median_ms=1.0, copy_share=0.5)
        made = [row, *[Row("add_noise-fresh", "forward", "64x784", "float32", "triton", error="is wrong")] * wrong]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu, "RESULTS", tmp_path / "benchmarks" / "results")
        monkeypatch.setattr(gpu, "results_name", lambda device: "cuda-some-gpu")
        monkeypatch.setattr(gpu, "environment", lambda device: environment())
        monkeypatch.setattr(gpu, "plan", lambda device: gpu_plan)
        monkeypatch.setattr(gpu.memory, "warm_up", lambda device: None)
        monkeypatch.setattr(gpu.suite, "run", lambda setting, names, *, budget_s: made)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert gpu.main(["--seconds", "5"]) == int(wrong)
        out = capsys.readouterr().out
        assert "left out: cuda-some-gpu-copy-share.svg" in out
        assert out.splitlines()[-1] == f"1 settings in benchmarks/results/cuda-some-gpu.csv, {int(wrong)} errors"
        assert read_csv(tmp_path / "benchmarks" / "results" / "cuda-some-gpu.csv")[0] == made


gpu_plan = gpu.plan(CPU)[:1]
