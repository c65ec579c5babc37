"""`make gpu-pack` and `make gpu-check` without a GPU: steps, limits, what is left behind; facts, suite on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_check, gpu_facts, gpu_pack
from benchmarks.environment import CPU, environment
from benchmarks.gpu_check import Results, Step
from benchmarks.report import Row, read_csv
from benchmarks.suite import MAIN

ROOT = Path(__file__).parent.parent
# What a bare machine with torch may lack (mpmath and numpy come with it).
OPTIONAL = ("rich", "typer", "matplotlib", "scipy", "sklearn", "hypothesis", "diffusers")


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "out", tmp_path / "logs")


def shell(name: str, script: str) -> Step:
    return Step(name, ["sh", "-c", script])


def is_gone(pid: int) -> bool:
    """Or a zombie that nobody has waited for."""
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


class TestSteps:
    def test_what_they_printed_last_and_how_they_ended(
        self, results: Results, capsys: pytest.CaptureFixture[str]
    ) -> None:
        steps = shell("good", "echo one; echo two"), shell("bad", "echo no; echo why >&2; exit 3")
        assert not gpu_check.run(steps, 60, results)
        found = {o.step.name: (o.result, o.what) for o in results.outcomes}
        assert found == {"good": ("passed", "two"), "bad": ("failed", "why")}
        printed = capsys.readouterr().out
        assert "    no\n    why\n" in printed and "one" not in printed

    def test_what_is_left_behind(self, results: Results) -> None:
        assert gpu_check.run([shell("a, b", "echo one; echo two")], 60, results)
        assert "a, b" in (results.out / "summary.txt").read_text()
        with tarfile.open(results.out / "logs.tgz") as archive:
            file = archive.extractfile("logs/a-b.log")
            assert file is not None and file.read() == b"one\ntwo\n"
        assert sorted(path.name for path in results.out.iterdir()) == ["logs.tgz", "summary.txt"]

    def test_they_run_at_once(self, results: Results) -> None:
        meet = "touch {0}; for i in $(seq 200); do [ -e {1} ] && exit 0; sleep 0.1; done; exit 1"
        a, b = results.out / "a", results.out / "b"
        assert gpu_check.run([shell("a", meet.format(a, b)), shell("b", meet.format(b, a))], 60, results)

    def test_one_that_takes_too_long_may_say_what_failed(
        self, results: Results, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_check, "LEAST_S", 0.0)
        code = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('two failed')"
        gpu_check.run([Step("slow", [sys.executable, "-c", code])], 3.0, results)
        (slow,) = results.outcomes
        assert slow.result == "failed"
        assert slow.what.startswith("killed after") and slow.what.endswith("two failed")

    def test_one_that_takes_too_long_is_killed_with_its_children(
        self, results: Results, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_check, "LEAST_S", 0.0)
        child = results.out / "child"
        gpu_check.run([shell("slow", f"echo begun; sleep 600 & echo $! > {child}; wait")], 1.0, results)
        (slow,) = results.outcomes
        assert slow.result == "failed"
        assert slow.what.startswith("killed after") and slow.what.endswith("begun")
        assert is_gone(int(child.read_text()))

    def test_none_begins_without_time(self, results: Results) -> None:
        assert not gpu_check.run([shell("late", "exit 0")], gpu_check.LEAST_S - 1, results)
        assert [(o.result, o.what) for o in results.outcomes] == [("skipped", "no time left")]

    def test_the_interpreter_is_not_inherited(self, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        step = Step("env", ["sh", "-c", "echo ${TRITON_INTERPRET-unset} $MORE"], {"MORE": "more"})
        assert gpu_check.run([step], 60, results)
        assert results.outcomes[0].what == "unset more"


KILLED = """
import sys
from pathlib import Path
from benchmarks import gpu_check

gpu_check.SAVE_S = 0.1
place = Path(sys.argv[1])
steps = [gpu_check.Step("slow", ["sh", "-c", f"echo begun; echo $$ > {place}/pid; exec sleep 600"])]
steps.append(gpu_check.Step("quick", ["sh", "-c", "echo done"]))
results = gpu_check.Results(place / "out", place / "logs")
gpu_check.signal.signal(gpu_check.signal.SIGTERM, lambda *_: sys.exit("terminated"))
gpu_check.run(steps, 600, results)
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_what_is_there_is_whole_when_it_is_killed(tmp_path: Path, by: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    summary = tmp_path / "out" / "summary.txt"
    for _ in range(200):
        if summary.exists() and "quick" in summary.read_text() and "running" in summary.read_text():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(by)
    process.wait()
    with tarfile.open(tmp_path / "out" / "logs.tgz") as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        texts = {name: file.read() for name, file in files.items() if file is not None}
    assert texts == {"logs/slow.log": b"begun\n", "logs/quick.log": b"done\n"}
    pid = int((tmp_path / "pid").read_text())
    if by == signal.SIGKILL:  # nobody is left to end it
        os.kill(pid, signal.SIGKILL)
    assert is_gone(pid)


class TestCalls:
    """With a stand-in for Python that writes down how it was called, and fails for one of the calls."""

    @pytest.fixture
    def call(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
        # One write to a call: some run side by side.
        called = f"""printf '%s\\n' "$(echo "$@" | tr '\\n' ' ')" >> {tmp_path}/calls"""
        for name in ("compute-sanitizer", "ncu"):
            tool = tmp_path / "bin" / name
            tool.parent.mkdir(exist_ok=True)
            tool.write_text(f'#!/bin/sh\nset -- {name} "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING\n{called}\n')
            tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        monkeypatch.setattr(gpu_pack, "unpack", lambda: "")

        def make(name: str, failing: str = "nothing of it") -> tuple[int, list[str]]:
            python = tmp_path / "python"
            broken = f'case "$*" in *"{failing}"*) echo broken; exit 1;; esac'
            python.write_text(f"#!/bin/sh\n{called}\n{broken}\necho fine\n")
            python.chmod(0o755)
            code = gpu_check.main([name, "--out", str(tmp_path / "out")], str(python))
            return code, [line.rstrip() for line in (tmp_path / "calls").read_text().splitlines()]

        return make

    def test_a(self, call: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
        code, calls = call("a")
        assert code == 0
        assert "dae_fast.info()" in calls[1] and "benchmarks.gpu_facts" in calls[2]
        assert calls[2].endswith(f"--out {tmp_path}/out/facts.txt")
        tests = [line for line in calls[3:] if "-m pytest -m gpu" in line]
        assert len(tests) == len(calls) - 3 == len(gpu_check.SHARDS) + 1  # the other files
        assert (tmp_path / "out" / "summary.txt").read_text().count("passed") == len(calls)

    def test_b(self, call: Callable[..., tuple[int, list[str]]]) -> None:
        code, calls = call("b")
        assert code == 0
        for tool in ("memcheck", "racecheck"):
            (line,) = (line for line in calls[2:4] if f"--tool {tool} --error-exitcode 1" in line)
            assert line.startswith("compute-sanitizer ") and line.endswith("short_run 1")
        assert calls[4].startswith("ncu ") and "smsp__inst_executed.sum" in calls[4]
        assert "benchmarks.gpu_facts --host" in calls[5]
        (seconds,) = (float(line.split()[-3]) for line in calls[6:])
        # What is left of the call when nothing else took any.
        assert seconds == pytest.approx(gpu_check.SECONDS["b"] - 2 * gpu_check.GRACE_S, abs=20)

    def test_a_failing_step_does_not_cost_the_others(self, call: Callable[..., tuple[int, list[str]]]) -> None:
        code, calls = call("b", failing="gpu_facts")
        assert code == 1
        assert "benchmarks.gpu " in calls[-1]

    def test_what_does_not_load_is_built(self, call: Callable[..., tuple[int, list[str]]]) -> None:
        code, calls = call("b", failing="dae_fast.info()")
        assert code == 1
        # And then it does not load either.
        assert ["gpu_pack --here" in line for line in calls] == [False, False, True, False]

    def test_nothing_runs_without_a_build(
        self, call: Callable[..., tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_pack, "unpack", lambda: "there is none")
        code, calls = call("a", failing="--here")
        assert code == 1
        assert ["gpu_pack --here" in line for line in calls] == [False, True]

    def test_a_missing_tool_is_said(self, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setenv("CUDA_HOME", "/nowhere")
        steps = gpu_check.sanitizer_step(sys.executable, "memcheck"), gpu_check.profiler_step(sys.executable, ROOT)
        gpu_check.run(steps, 60, results)
        assert [(o.result, o.what) for o in results.outcomes] == [
            ("skipped", f"{name} is neither on the PATH nor in /nowhere/bin") for name in ("compute-sanitizer", "ncu")
        ]

    def test_make_runs_it_with_the_given_python(self) -> None:
        command = ["make", "-n", "--no-print-directory", "gpu-check", "PYTHON=some-python", "CALL=a --out there"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "some-python -m benchmarks.gpu_check a --out there"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_stops_at_once(self, tmp_path: Path) -> None:
        assert gpu_check.main(["a", "--out", str(tmp_path)]) == 1
        (line,) = (tmp_path / "summary.txt").read_text().splitlines()
        assert line.startswith("GPU ") and "sees no GPU" in line

    def test_the_probe_of_backends_is_code(self, results: Results) -> None:
        gpu_check.run([Step("backends", [sys.executable, "-c", gpu_check.BACKENDS])], 60, results)
        if not torch.cuda.is_available():
            assert results.outcomes[0].what == "missing: cuda, triton"


class TestPack:
    @pytest.fixture
    def tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A copy of the sources, with a pack of two files that are no libraries."""
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / "dae_fast").mkdir()
        monkeypatch.setattr(gpu_pack, "ROOT", tmp_path)
        monkeypatch.setattr(gpu_pack, "PACK", tmp_path / "build" / "gpu-pack")
        gpu_pack.PACK.mkdir(parents=True)
        for name in (gpu_pack.CORE, gpu_pack.CUDA, gpu_pack.NOTE):
            (gpu_pack.PACK / name).write_text(name)
        (gpu_pack.PACK / gpu_pack.MANIFEST).write_text(json.dumps({"sources": gpu_pack.sources_hash()}))
        return tmp_path

    def test_a_pack_of_these_sources(self, tree: Path) -> None:
        assert gpu_pack.unpack() == ""
        assert sorted(path.name for path in (tree / "dae_fast").iterdir()) == sorted(
            (gpu_pack.CORE, gpu_pack.CUDA, gpu_pack.NOTE)
        )

    def test_no_other(self, tree: Path) -> None:
        (gpu_pack.PACK / gpu_pack.CORE).unlink()
        assert sysconfig.get_config_var("EXT_SUFFIX") in gpu_pack.unpack()
        with (tree / "csrc" / "math.h").open("a") as file:
            file.write(" ")
        assert gpu_pack.unpack() == "the pack is of other sources"
        (gpu_pack.PACK / gpu_pack.MANIFEST).unlink()
        assert "there is no " in gpu_pack.unpack()
        assert not list((tree / "dae_fast").iterdir())

    def test_tritons_cache_is_found_elsewhere(self, tree: Path, tmp_path: Path) -> None:
        """In another place, by another process, without the compiler."""
        pytest.importorskip("triton")
        one = "gpu_triton.calls = lambda: [lambda: df.Noise(1).bits((9, 64))]"
        script = f"import sys, dae_fast as df; from benchmarks import gpu_triton; {one}; gpu_triton.main()"

        def of(place: Path) -> dict[str, str]:
            names = os.environ.keys() - {"TRITON_INTERPRET"}
            return {**{name: os.environ[name] for name in names}, "TRITON_CACHE_DIR": str(place)}

        def compiled(place: Path, *before: str) -> str:
            command = [sys.executable, "-c", "; ".join((*before, script)), str(place)]
            done = subprocess.run(command, cwd=ROOT, env=of(place), capture_output=True, text=True)
            return done.stdout + done.stderr

        without = "from triton.compiler import ASTSource", "del ASTSource.make_ir"
        packed, opened = gpu_pack.PACK / gpu_pack.TRITON, gpu_pack.opened_triton()
        assert "1 kernels" in compiled(packed)
        assert gpu_pack.unpack() == ""
        shutil.rmtree(packed)
        assert "1 kernels" in compiled(opened, *without)
        assert "make_ir" in compiled(tmp_path / "empty", *without)

    @pytest.mark.parametrize("name", gpu_pack.VARIANTS)
    def test_variants_change_what_is_there(self, tree: Path, name: str) -> None:
        before = gpu_pack.sources_hash()
        gpu_pack.changed(tree / "csrc", gpu_pack.VARIANTS[name])
        assert gpu_pack.sources_hash() != before
        with pytest.raises(ValueError, match="0 times what a variant changes"):
            gpu_pack.changed(tree / "csrc", gpu_pack.VARIANTS[name])

    @pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
    def test_the_build_needs_no_metadata(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """There is no pyproject.toml in this tree. With a stand-in for nvcc, which makes empty files."""
        monkeypatch.setenv("CXX", str(self.compiler(tree, "cxx")))
        monkeypatch.setenv("CUDACXX", str(self.compiler(tree, "nvcc")))
        monkeypatch.setenv("DAE_CUDA_ARCHS", "90")
        gpu_pack.compile_into(tree / "dae_fast")
        notes = json.loads((tree / "dae_fast" / "_build.json").read_text())
        assert (notes["native"], notes["cuda"]) == (None, None)
        gpu_pack.compile_variant("8 values", gpu_pack.VARIANTS["8 values"])
        assert (gpu_pack.PACK / "_cuda-8-values.so").exists()
        (rules,) = (tree / "build").glob("ninja-*/cuda/build.ninja")
        flags = rules.read_text()
        assert "sm_90" in flags and "sm_80" not in flags

    def compiler(self, place: Path, name: str) -> Path:
        path = place / name
        path.write_text(
            '#!/bin/sh\ncase "$*" in *--list-gpu-code*) echo sm_80 sm_90; exit;; esac\n'
            'while [ $# -gt 0 ]; do case "$1" in -o) touch "$2";; -MF) echo "x:" > "$2";; esac; shift; done\n'
        )
        path.chmod(0o755)
        return path


class TestFacts:
    def facts(self, tmp_path: Path, *options: str) -> tuple[int, str]:
        path = tmp_path / "facts.txt"
        command = ["--device", "cpu", "--backends", "native", "--out", str(path), *options]
        return gpu_facts.main(command), path.read_text()

    def test_on_the_cpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_facts, "NORMALS", (2, 64))
        code, text = self.facts(tmp_path, "--log2", "14")
        assert code == 0 and text.rstrip().endswith("0 failures")
        assert text.count("the CPU's bits: native: ") == 2 + len(gpu_facts.DTYPES) * len(gpu_facts.SHAPES) + 4
        for name in gpu_facts.operations(torch.ones(1, 4, 64, 64), torch.ones(1, 4, 64, 64)):
            assert text.count(f"{name}: native ") == 2

    def test_host_time(self, tmp_path: Path) -> None:
        code, text = self.facts(tmp_path, "--host")
        assert code == 0
        assert "host, native, noise_mse, with gradient: " in text and "ddim, 50 steps, graph=False: " in text

    def test_other_bits_are_a_failure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_facts, "NORMALS", (2, 64))
        add_noise = gpu_facts.df.add_noise
        calls = []

        def every_second_is_off(*inputs: object) -> torch.Tensor:
            calls.append(inputs)
            return add_noise(*inputs) * (1 + 1e-6 * (len(calls) % 2 == 0))

        monkeypatch.setattr(gpu_facts.df, "add_noise", every_second_is_off)
        code, text = self.facts(tmp_path, "--log2")
        assert code == 1 and "OTHER BITS than the CPU's: native: add_noise torch.float32 (64, 784)" in text

    def test_an_error_does_not_cost_the_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_facts, "NORMALS", (2, 64))

        def broken(*inputs: object) -> None:
            raise RuntimeError("no kernel image")

        monkeypatch.setattr(gpu_facts.df, "add_noise", broken)
        code, text = self.facts(tmp_path, "--log2", "14")
        assert code == 1
        assert "ERROR in add_noise, fresh, native RuntimeError no kernel image" in text
        assert "to_x0: native " in text

    def test_a_backend_that_is_missing_is_a_failure(self, tmp_path: Path) -> None:
        code, text = self.facts(tmp_path, "--log2", "--backends", "triton", "native")
        assert code == int("triton" not in gpu_facts.df.backend_names())
        assert code == 0 or "triton is missing: " in text


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


def collected(*selections: tuple[str, ...]) -> list[list[str]]:
    """By each selection of options, in one process: torch is imported once."""
    usual = "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"
    each = "for options in json.loads(sys.argv[1]):\n    print('next'); assert not pytest.main(options)"
    done = bare(f"import json, pytest\n{each}", json.dumps([[*usual, *options] for options in selections]))
    assert done.returncode == 0, done.stdout + done.stderr
    return [[line for line in part.splitlines() if "::" in line] for part in done.stdout.split("next\n")[1:]]


class TestOnABareMachine:
    def test_the_shards_are_all_the_tests_once(self) -> None:
        shards = [(gpu_check.TESTS, "-k", which) for which in gpu_check.SHARDS.values()]
        whole, *parts = collected((gpu_check.TESTS,), *shards)
        assert all(parts)
        assert sorted(test for part in parts for test in part) == sorted(whole)

    def test_the_other_files_can_be_read(self) -> None:
        others = gpu_check.other_tests()
        assert "tests/test_triton.py" in others  # which says at once that there is no GPU
        (found,) = collected(tuple(others))
        assert {test.partition("::")[0] for test in found} >= {"tests/test_schedule.py"}

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
        large, quick = settings[: 2 * len(MAIN)], settings[2 * len(MAIN) : 4 * len(MAIN)]
        assert {s.case.name for s in large} == {s.case.name for s in quick} == set(MAIN)
        assert min(s.sample_bytes for s in large) == 128 << 20  # beyond any cache, in bf16 too
        rest = settings[4 * len(MAIN) :]
        main = [s.sample_bytes for s in rest if s.case.name in MAIN and s.mode != "with all gradients"]
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
        monkeypatch.setattr(gpu, "results_name", lambda device: "cuda-some-gpu")
        monkeypatch.setattr(gpu, "environment", lambda device: environment())
        monkeypatch.setattr(gpu, "plan", lambda device: gpu_plan)
        monkeypatch.setattr(gpu.memory, "warm_up", lambda device: None)
        monkeypatch.setattr(gpu.suite, "run", lambda setting, names, *, budget_s: made)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert gpu.main(["--seconds", "5", "--out", str(tmp_path)]) == int(wrong)
        out = capsys.readouterr().out
        assert "left out: cuda-some-gpu-copy-share.svg" in out
        assert out.splitlines()[-1] == f"1 settings in {tmp_path}/cuda-some-gpu.csv, {int(wrong)} errors"
        assert read_csv(tmp_path / "cuda-some-gpu.csv")[0] == made


gpu_plan = gpu.plan(CPU)[:1]
