"""Named ranges around every op, as NVTX tools and torch.profiler receive them; `make profile`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import profile as torch_profile
from typer import Typer
from typer.testing import CliRunner

import dae_fast as df
from benchmarks import profile, trace_picture
from benchmarks.cases import CASES
from benchmarks.end_to_end import TASKS
from benchmarks.trace_picture import Event
from dae_fast import profiling
from dae_fast.kernels import dispatch

pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# A process of its own: a tool attaches with a process's first NVTX call.
EVERY_CASE = """
import torch
import dae_fast as df
from dae_fast import profiling
from dae_fast.kernels import dispatch
from dae_fast.profiling import span
from benchmarks.cases import CASES

for case in CASES:
    inputs = case.inputs((4, 3, 8, 5), torch.bfloat16)
    for name in case.grads:
        inputs[name] = inputs[name].requires_grad_()
    with span(case.name, 7):
        result = case.ours(inputs)
        outputs = [r for r in (result if isinstance(result, tuple) else (result,)) if r.requires_grad]
        with span("backward"):
            torch.autograd.grad([o.sum() for o in outputs], [inputs[name] for name in case.grads])
with span("noise"):
    df.Noise(0).normal((4, 6))
    df.Noise(0).bits((4, 6))
    try:
        df.add_noise(torch.zeros(2, 3), df.Noise(0), df.Schedule.linear(10)[torch.tensor([0, 10])])
    except ValueError:
        pass
with span("compiled"):
    torch.compile(df.add_noise, backend="eager")(torch.zeros(2, 3), torch.zeros(2, 3), df.Level(1.0, 0.5))
"""


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a tool is told of EVERY_CASE, line by line."""
    native = pytest.importorskip("dae_fast._core", reason="no native core")
    if not native.nvtx_built:
        pytest.skip("built without the NVTX headers")
    folder = tmp_path_factory.mktemp("nvtx")
    tool, record = folder / "recorder.so", folder / "record"
    compiler = os.environ.get("CC", "cc")
    command = [*compiler.split(), "-shared", "-fPIC", str(ROOT / "tests" / "nvtx_recorder.c"), "-o", str(tool)]
    subprocess.run(command, check=True)
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(tool), "NVTX_RECORD": str(record)}
    subprocess.run([sys.executable, "-c", EVERY_CASE], check=True, cwd=ROOT, env=environment)
    return record.read_text().splitlines()


def tree(lines: list[str]) -> list[tuple[tuple[str, ...], int]]:
    """Every range as the names from the outermost to itself, and its payload."""
    found, open_names = [], []
    for line in lines:
        kind, _, rest = line.partition(" ")
        domain, *event = rest.split("|")
        assert domain == "dae_fast"
        if kind == "push":
            name, payload = event
            open_names.append(name)
            found.append((tuple(open_names), int(payload)))
        else:
            open_names.pop()
    assert not open_names, "every range is closed"
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op_is_a_range_with_name_shape_and_dtype(received: list[str], case) -> None:
    op = case.launches or case.name.split("-")[0]
    mine = [(names[1:], payload) for names, payload in tree(received) if names[0] == case.name]
    assert mine[0] == ((), 7), "the user's own range is the outermost"
    if op == "normal":  # the rest is torch's
        assert mine[1] == (("normal 4x120 float32",), 1920)
        return
    wide = f"{op} 4x3x8x5 float32"  # a clamp's backward too
    widens = case.widens and case.name != "noise_mse-weights"  # which is one pass on a CPU
    name = wide if widens else f"{op} 4x3x8x5 bfloat16"
    assert mine[1] == ((name,), 1920 if widens else 960)
    backward = [names for names, _ in mine if names[:1] == ("backward",)]
    named = {name, wide} | ({f"{op} 4x120 bfloat16"} if op == "variational_bound" else set())  # its kernel takes rows
    assert set(backward) <= {("backward",), *(("backward", each) for each in named)} and len(backward) > 1


def test_noise_alone_and_failing_ops_are_ranges_too(received: list[str]) -> None:
    found = [(names[1:], payload) for names, payload in tree(received) if names[0] == "noise"]
    assert found[1:] == [(("normal 4x6 float32",), 96), (("bits 4x6 int64",), 192), (("add_noise 2x3 float32",), 24)]


def test_compiled_ops_are_ranges_too(received: list[str]) -> None:
    assert (("compiled", "add_noise 2x3 float32"), 24) in tree(received)


def test_torch_profiler_sees_the_same_names() -> None:
    x = torch.randn(4, 3, 8, 5)
    with torch_profile() as recorded, profiling.span("step"):
        df.add_noise(x, df.Noise(0), df.Level(1.0, 0.5))
    events = {event.name: event for event in recorded.events()}
    op = events["dae_fast::add_noise 4x3x8x5 float32"]
    assert op.cpu_parent is events["dae_fast::step"]


def test_without_a_listener_an_op_goes_straight_to_its_backend() -> None:
    assert not profiling.listening()
    x = torch.randn(4)
    native = dispatch.kernels(x, "add_noise")
    assert native is sys.modules["dae_fast.kernels.native"]
    with torch_profile():
        assert profiling.listening()
        assert isinstance(dispatch.kernels(x, "add_noise"), profiling.Named)


def command(main) -> Typer:
    app = Typer()
    app.command()(main)
    return app


# Records its arguments; "profile" runs the loop, "stats" prints what nsys 2025 prints.
STAND_IN = f"""#!{sys.executable}
import subprocess, sys
arguments = sys.argv[1:]
with open("{{record}}", "a") as record:
    print(*arguments, file=record, sep="\\t")
if arguments[0] == "profile":
    sys.exit(subprocess.run(arguments[arguments.index("-o") + 2 :]).returncode)
if "nvtx_gpu_proj_sum" in arguments:
    print('''Generating SQLite file dae_fast.sqlite from dae_fast.nsys-rep
Processing [dae_fast.sqlite] with [/opt/nsys/reports/nvtx_gpu_proj_sum.py]...
Range,Style,Total Proj Time (ns),Total Range Time (ns),Range Instances
dae_fast:step,PushPop,900000,1000000,2
"dae_fast:add_noise 64x784 float32",PushPop,30000,50000,2
''')
else:
    print('''Processing [dae_fast.sqlite] with [/opt/nsys/reports/nvtx_pushpop_sum.py]...
 ** NVTX Push/Pop Range Summary (nvtx_pushpop_sum):

Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Range
90.0,1000000,2,500000.0,500000.0,1,1,0.0,dae_fast:step
5.0,50000,2,25000.0,25000.0,1,1,0.0,dae_fast:add_noise 64x784 float32
5.0,50000,2,25000.0,25000.0,1,1,0.0,:somebody else's
''')
"""


@pytest.fixture
def nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for nsys on the PATH; returns where it records its arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program, record = folder / "nsys", tmp_path / "arguments"
    program.write_text(STAND_IN.format(record=record))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return record


def calls(record: Path) -> list[list[str]]:
    return [line.split("\t") for line in record.read_text().splitlines()]


def test_make_profile_runs_nsys_and_its_stats(nsys: Path, tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    out = tmp_path / "out"
    arguments = f"--steps 2 --device cpu --out {out}"
    make = ["make", "--old-file=.venv/test", "profile", f"BIN={Path(sys.executable).parent}", f"PROFILE={arguments}"]
    result = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = calls(nsys)
    line = ["profile", "-t", "nvtx,osrt", "-s", "none", "--cpuctxsw=none", "--force-overwrite=true"]
    line += ["-o", f"{out}/dae_fast"]
    assert first[: len(line)] == line
    assert first[len(line) + 1 :] == [
        *("-m", "benchmarks.profile", "--loop", "--task", "MLP", "--steps", "2", "--device", "cpu")
    ]
    assert second == [
        *("stats", "--report", "nvtx_pushpop_sum", "--format", "csv", "--output", "-", "--force-export=true"),
        f"{out}/dae_fast.nsys-rep",
    ]
    assert "add_noise 64x784 float32" in result.stdout and "somebody" not in result.stdout
    assert "nsys profile -t nvtx,osrt" in result.stdout


def test_on_a_gpu_nsys_waits_for_the_profiler_api(nsys: Path, tmp_path: Path) -> None:
    line = profile.nsys_line(tmp_path / "dae_fast", TASKS[1], 5, CUDA)
    assert line[: line.index("-o")] == [
        *("nsys", "profile", "-t", "cuda,nvtx,osrt", "-c", "cudaProfilerApi", "--capture-range-end=stop"),
        *("-s", "none", "--cpuctxsw=none", "--force-overwrite=true"),
    ]
    assert line[-4:] == ["--steps", "5", "--device", "cuda"]
    nothing = [*line[: line.index("-o") + 2], "true"]
    found = profile.under_nsys(nothing, tmp_path / "dae_fast", CUDA)
    assert found == [
        profile.Range("step", 2, 1000.0, 900.0),
        profile.Range("add_noise 64x784 float32", 2, 50.0, 30.0),
    ]
    assert [call[0] for call in calls(nsys)] == ["profile", "stats", "stats"]


def test_the_gpu_is_recorded_between_start_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[object] = []
    for module, name in ((torch.cuda, "synchronize"), (torch.cuda.profiler, "start"), (torch.cuda.profiler, "stop")):
        monkeypatch.setattr(module, name, lambda name=name: order.append(name))
    profile.run_loop(order.append, 2, CUDA)
    assert order == ["synchronize", "start", profile.WARM_UP, profile.WARM_UP + 1, "synchronize", "stop"]


def test_without_stats_nsys_output_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = subprocess.CompletedProcess([], 0, "SKIPPED: dae_fast.sqlite does not contain NVTX data.\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: empty)
    with pytest.raises(RuntimeError, match=r"no nvtx_pushpop_sum or nvtxppsum:\nSKIPPED: .* does not contain NVTX"):
        profile.nsys_stats(tmp_path / "dae_fast", profile.PUSH_POP)


def test_nsys_is_never_waited_for_without_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(profile, "LIMIT_S", 0.1)
    with pytest.raises(RuntimeError, match="sleep did not end within 0 s and was killed"):
        profile.under_nsys(["sleep", "60"], tmp_path / "dae_fast", torch.device("cpu"))


def test_a_recording_that_nothing_imports_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    (tmp_path / "dae_fast.qdstrm").touch()
    with pytest.raises(RuntimeError, match=r"nsys left .*dae_fast\.qdstrm and no QdstrmImporter was found"):
        profile.imported(tmp_path / "dae_fast")


@pytest.mark.skipif(not shutil.which("nsys"), reason="Nsight Systems is not installed")
def test_under_the_real_nsys(tmp_path: Path) -> None:
    """The table and the picture, from a loop that it recorded."""
    report = tmp_path / "dae_fast"
    line = profile.nsys_line(report, TASKS[0], 3, torch.device("cpu"))
    found = {r.name: r for r in profile.under_nsys(line, report, torch.device("cpu"))}
    steps = 3 + profile.WARM_UP
    assert found["step"].calls == found["add_noise 64x784 float32"].calls == steps
    assert found["noise_mse 64x784 float32"].calls == 2 * steps  # forward, and where backward asks for its gradient
    assert 0 < found["add_noise 64x784 float32"].host_us < found["step"].host_us
    events = trace_picture.nsys_events(tmp_path / "dae_fast.sqlite")
    assert [e.name for e in events].count("step") == steps
    trace_picture.main(tmp_path / "dae_fast.sqlite", tmp_path / "trace")
    assert {path.name for path in tmp_path.glob("*.png")} == {"trace-light.png", "trace-dark.png"}


def test_without_nsys_torch_profiler_makes_the_table_and_the_trace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    arguments = ["--steps", "3", "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(command(profile.main), arguments)
    assert result.exit_code == 0, result.output
    line = f"nsys profile -t nvtx,osrt -s none --cpuctxsw=none --force-overwrite=true -o {tmp_path}/dae_fast"
    assert line in result.output
    for name in ("step", "backward", "add_noise 64x784 float32", "noise_mse 64x784 float32"):
        assert name in result.output

    events = trace_picture.our_events(json.loads((tmp_path / "trace.json").read_text()))
    assert [e.name for e in events].count("step") == 3
    step = trace_picture.median_step(events)
    assert step[0].name == "step" and step[0].start == 0
    names = dict(zip([e.name for e in step], trace_picture.depths(step), strict=True))
    assert (names["step"], names["network"], names["add_noise 64x784 float32"]) == (0, 1, 1)
    trace_picture.main(tmp_path / "trace.json", tmp_path / "trace")
    assert {path.name for path in tmp_path.glob("*.png")} == {"trace-light.png", "trace-dark.png"}


def test_the_median_step_is_drawn() -> None:
    lengths = (5.0, 1.0, 3.0)
    events = [Event(name, 10.0 * k, length) for k, length in enumerate(lengths) for name in ("step", f"op {k}")]
    assert trace_picture.median_step(events) == [Event("step", 0.0, 3.0), Event("op 2", 0.0, 3.0)]


def test_unknown_task_is_refused() -> None:
    result = CliRunner().invoke(command(profile.main), ["--task", "GAN"])
    assert result.exit_code == 2 and "no such task: GAN" in result.output
