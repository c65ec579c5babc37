"""`make gpu-check`: what this machine's GPU shows, in two calls of a few minutes, offline.

`python -m benchmarks.gpu_check a`: equal bits, first speeds (gpu_facts.py), then every test marked gpu, side by side.
`python -m benchmarks.gpu_check b`: compute-sanitizer, ncu, host time, then benchmarks until the time is up.

Knows nothing but the standard library: it may have to build the package first. `make gpu-pack` (gpu_pack.py) builds
it beforehand, on a machine without a GPU. What does not fit in the time, or needs a tool that is not here, is said so
in the summary; all that is to be kept is in one folder, and what is there is whole, whenever this is killed. The exit
code is 0 when everything that ran passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import gpu_pack

ROOT = Path(__file__).resolve().parent.parent
OUT, LOGS = ROOT / "build" / "gpu-check", ROOT / "build" / "gpu-check-logs"
SECONDS = {"a": 320.0, "b": 260.0}
LEAST_S = 10.0  # a step that has less than this is not begun
BUILD_S, FACTS_S, SANITIZER_S, PROFILER_S, HOST_S = 240.0, 100.0, 90.0, 45.0, 30.0
INTERRUPTED_S = 10.0  # in which an interrupted pytest says what has failed so far
GRACE_S = 15.0  # for what the benchmarks are measuring when their time is up, and for the last file to be written
SAVE_S = 15.0  # between two savings of what running steps have printed
TAIL_LINES = 12  # of a step that failed, printed
THREADS = "2"  # of a step's tensors on the CPU: many steps run at once

GPU = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU")
free, total = torch.cuda.mem_get_info()
name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
print(f"{name}, sm_{major}{minor}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free; torch {torch.__version__}")
"""
BACKENDS = """
import sys, dae_fast
facts = dae_fast.info()
print("\\n".join(f"{name}: {what}" for name, what in facts.items()))
missing = [name for name in ("cuda", "triton") if facts.get(name, "missing").startswith("missing")]
sys.exit(f"missing: {', '.join(missing)}" if missing else 0)
"""
# What ncu looks at: the two main ops, in the two types, on tensors beyond the cache.
PROFILED = """
import torch, dae_fast as df
noise, level = df.Noise(5), df.Schedule.linear(1000)[torch.arange(512, device="cuda")]
for dtype in (torch.float32, torch.bfloat16):
    x = torch.randn(512, 16, 128, 128, device="cuda", dtype=dtype)
    pred = x.clone().requires_grad_()
    df.add_noise(x, noise, level)
    torch.autograd.grad(df.noise_mse(pred, noise), pred)
torch.cuda.synchronize()
"""
METRICS = (
    "gpu__time_duration.sum",
    "smsp__inst_executed.sum",
    "smsp__cycles_active.avg",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_not_selected_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_dispatch_stall_per_issue_active.ratio",
)
TESTS = "tests/test_gpu.py"
# Triton compiles most of what each of these needs for itself: side by side it takes a quarter of the time. Between
# them they run every test of the file once.
SHARDS = {
    "native": "native",
    "triton, ops": "not native and (test_forward or test_gradient)",
    "triton, lengths": "not native and test_every_length",
    "triton, layouts": "not native and test_layouts",
    "triton, bits": "not native and TheSameBits",
    "triton, others": "not native and not "
    "(test_forward or test_gradient or test_every_length or test_layouts or TheSameBits)",
}


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""  # why it cannot run here


@dataclass(frozen=True)
class Outcome:
    step: Step
    result: str  # passed, failed, skipped
    seconds: float
    what: str  # the last line that it printed, or why there is none


def pytest(python: str, *arguments: str) -> list[str]:
    return [python, "-m", "pytest", "-m", "gpu", "-rsfE", "--tb=short", "-p", "no:cacheprovider", *arguments]


def other_tests() -> list[str]:
    """The further files that have tests for a GPU. Not all of tests/: many need packages that may not be here."""
    marked = (path for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    return sorted(name for path in marked if (name := str(path.relative_to(ROOT))) != TESTS)


def steps_of_tests(python: str) -> list[Step]:
    shards = {**{name: [TESTS, "-k", which] for name, which in SHARDS.items()}, "other files": other_tests()}
    limits = {"OMP_NUM_THREADS": THREADS}
    return [Step(f"tests, {name}", pytest(python, *options), limits) for name, options in shards.items()]


def benchmark_step(python: str, seconds: float, out: Path) -> Step:
    command = [python, "-m", "benchmarks.gpu", "--seconds", f"{seconds:.0f}", "--out", str(out)]
    return Step("benchmarks", command)


def facts_step(python: str, name: str, out: Path, *options: str) -> Step:
    return Step(name, [python, "-m", "benchmarks.gpu_facts", *options, "--out", str(out / f"{name}.txt")])


def toolkit_tool(name: str) -> tuple[str | None, str]:
    """Where it is, or why there is none."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    found = shutil.which(name) or shutil.which(name, path=home)
    return found, "" if found else f"{name} is neither on the PATH nor in {home}"


def profiler_step(python: str, out: Path) -> Step:
    """What a kernel executes, moves and waits for; of the native backend, whose kernels the counts are about."""
    profiler, missing = toolkit_tool("ncu")
    if not profiler:
        return Step("ncu", [], missing=missing)
    options = ["--csv", "--kernel-name", "regex:affine|residual", "--metrics", ",".join(METRICS)]
    return Step("ncu", [profiler, *options, "--log-file", str(out / "ncu.csv"), python, "-c", PROFILED])


def sanitizer_step(python: str, tool: str) -> Step:
    sanitizer, missing = toolkit_tool("compute-sanitizer")
    if not sanitizer:
        return Step(tool, [], missing=missing)
    # application-only: not Triton's assembler. Errors of the API are torch's own business: it asks and looks.
    options = ["--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    # Without the cache every tensor is an allocation of its own, whose ends memcheck knows.
    return Step(
        tool,
        [sanitizer, *options, *pytest(python, TESTS, "-k", "short_run")],
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


class Results:
    """A folder with a summary and an archive of what each step printed, whole at any moment."""

    def __init__(self, out: Path, logs: Path = LOGS) -> None:
        self.out, self.logs = out, logs
        self.outcomes: list[Outcome] = []
        self.running: list[Step] = []
        shutil.rmtree(self.logs, ignore_errors=True)
        for folder in (out, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def log(self, step: Step) -> Path:
        return self.logs / f"{step.name.replace(', ', '-').replace(' ', '-')}.log"

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(line(outcome), flush=True)
        if outcome.result == "failed":
            printed = self.log(outcome.step).read_text(errors="replace").splitlines()
            print("\n".join(f"    {text[:200]}" for text in printed[-TAIL_LINES:]), flush=True)

    def save(self) -> None:
        """Each file under another name first, then in place of the one before."""
        unfinished = [f"{step.name}: still running" for step in self.running]
        text = "\n".join([*map(line, self.outcomes), *unfinished]) + "\n"
        summary, archive = (self.out / f".new-{name}" for name in ("summary.txt", "logs.tgz"))
        summary.write_text(text)
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(self.logs, "logs")
        for new in (summary, archive):
            new.replace(self.out / new.name.removeprefix(".new-"))


def line(outcome: Outcome) -> str:
    return f"{outcome.step.name:20} {outcome.result:7} {outcome.seconds:4.0f} s  {outcome.what[:200]}"


def run(steps: Sequence[Step], limit_s: float, results: Results) -> bool:
    """The steps at once, each killed when it has taken `limit_s`. True where all passed."""
    began = saved = time.monotonic()
    able = [step for step in steps if not step.missing and limit_s >= LEAST_S]
    for step in steps:
        if step not in able:
            results.add(Outcome(step, "skipped", 0.0, step.missing or "no time left"))
    # The interpreter compiles nothing.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    first = len(results.outcomes)
    results.running = list(able)
    try:
        for step in able:
            with results.log(step).open("wb") as file:
                processes[step.name] = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env={**inherited, "PYTHONUNBUFFERED": "1", **step.environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=heed_interrupts,
                )
        while results.running:
            seconds = time.monotonic() - began
            late = seconds > limit_s
            done = [step for step in results.running if late or processes[step.name].poll() is not None]
            for step in done:
                results.running.remove(step)
                results.add(finish(step, processes[step.name], seconds, results.log(step)))
            if done or time.monotonic() - saved > SAVE_S:
                results.save()
                saved = time.monotonic()
            time.sleep(0.05)
    finally:
        for process in processes.values():
            kill(process)
        results.running = []
        results.save()
    return all(outcome.result == "passed" for outcome in results.outcomes[first:]) and len(able) == len(steps)


def heed_interrupts() -> None:
    """Where this runs in the background of a shell it ignores them, and what it starts would as well."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(step: Step, process: subprocess.Popen[bytes], seconds: float, log: Path) -> Outcome:
    killed = process.poll() is None
    kill(process)
    lines = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
    what = lines[-1] if lines else f"exit code {process.returncode}"
    if killed:
        what = f"killed after {seconds:.0f} s: {what}"
    return Outcome(step, "failed" if killed or process.returncode else "passed", seconds, what)


def kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(INTERRUPTED_S)
    with suppress(ProcessLookupError):  # a shell's children in the background do not look at an interrupt
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Check:
    """A call: its steps, each within its own limit and the call's."""

    def __init__(self, python: str, results: Results, seconds: float) -> None:
        self.python, self.results, self.deadline = python, results, time.monotonic() + seconds

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def do(self, limit_s: float, *steps: Step) -> bool:
        return run(steps, min(limit_s, self.left()), self.results)

    def prepare(self) -> bool:
        """What was packed, if it is of these sources and loads; else a build, here. Nothing where there is no GPU."""
        if not self.do(60, Step("GPU", [self.python, "-c", GPU])):
            return False
        backends = Step("backends", [self.python, "-c", BACKENDS])
        why = gpu_pack.unpack()
        if not why and gpu_pack.opened_triton().exists():
            os.environ["TRITON_CACHE_DIR"] = str(gpu_pack.opened_triton())
        if not why and self.do(60, backends):
            return True
        print(f"built here: {why or 'what was packed does not load'}", flush=True)
        build = Step("build", [self.python, "-m", "benchmarks.gpu_pack", "--here"])
        return self.do(BUILD_S, build) and self.do(60, backends)

    def a(self) -> None:
        """Facts alone, as nothing else may be in their way; then all tests."""
        libraries = [str(gpu_pack.PACK / gpu_pack.variant_library(name)) for name in gpu_pack.VARIANTS]
        there = [path for path in libraries if os.path.exists(path)]
        options = ["--libraries", *there] if there else []
        self.do(FACTS_S, facts_step(self.python, "facts", self.results.out, *options))
        self.do(self.left() - GRACE_S, *steps_of_tests(self.python))

    def b(self) -> None:
        self.do(SANITIZER_S, *(sanitizer_step(self.python, tool) for tool in ("memcheck", "racecheck")))
        self.do(PROFILER_S, profiler_step(self.python, self.results.out))
        self.do(HOST_S, facts_step(self.python, "host", self.results.out, "--host"))
        seconds = self.left() - 2 * GRACE_S
        self.do(seconds + GRACE_S, benchmark_step(self.python, seconds, self.results.out))


def main(arguments: Sequence[str] | None = None, python: str = sys.executable) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("calls", nargs="*", choices=[*SECONDS, []], help="a, b; by default one after the other")
    parser.add_argument("--seconds", type=float, help="for each call; 320 for a and 260 for b by default")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to fill; build/gpu-check by default")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and so what was started ends too
    failed = False
    for call in options.calls or SECONDS:
        results = Results(options.out.resolve() / call if len(options.calls) != 1 else options.out.resolve())
        check = Check(python, results, options.seconds or SECONDS[call])
        if check.prepare():
            getattr(check, call)()
        results.save()
        failed |= any(outcome.result == "failed" for outcome in results.outcomes)
        print(f"call {call}: {results.out}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
