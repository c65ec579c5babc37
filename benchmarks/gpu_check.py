"""`make gpu-check`: build, tests, benchmarks and compute-sanitizer on this machine's GPU, in ten minutes and offline.

Knows nothing but the standard library: it runs before the package is built. What does not fit in the time, or needs
a tool that is not here, is said so in the table at the end; the exit code is 0 when everything that ran passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"
MINUTES = 9.5
LEAST_S = 10.0  # a step that has less than this is not begun
BENCHMARKS_LEAST_S, SANITIZER_S = 60.0, 75.0
INTERRUPTED_S = 10.0  # in which an interrupted pytest says what has failed so far
GRACE_S = 30.0  # for what the benchmarks are measuring when their time is up

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
TESTS = "tests/test_gpu.py"
# Triton compiles most of what each of these needs for itself: side by side it takes a quarter of the time. Between
# them they run every test of the file once.
SHARDS = {
    "native": "native and not host_cost",
    "triton, ops": "not native and (test_forward or test_gradient)",
    "triton, lengths": "not native and test_every_length",
    "triton, layouts": "not native and test_layouts",
    "triton, bits": "not native and TheSameBits",
    "triton, others": "not native and not "
    "(test_forward or test_gradient or test_every_length or test_layouts or TheSameBits or host_cost)",
}
HOST_COST = "host_cost"  # alone: the others would be in its way


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
    return [python, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *arguments]


def other_tests() -> list[str]:
    """The further files that have tests for a GPU. Not all of tests/: many need packages that may not be here."""
    marked = (path for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    return sorted(name for path in marked if (name := str(path.relative_to(ROOT))) != TESTS)


def steps_of_tests(python: str) -> list[Step]:
    shards = [Step(f"tests, {name}", pytest(python, TESTS, "-k", which)) for name, which in SHARDS.items()]
    return [*shards, Step("tests, other files", pytest(python, *other_tests()))]


def benchmark_step(python: str, seconds: float) -> Step:
    return Step("benchmarks", [python, "-m", "benchmarks.gpu", "--seconds", f"{seconds:.0f}"])


def sanitizer_step(python: str, tool: str) -> Step:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=home)
    if not sanitizer:
        return Step(tool, [], missing=f"compute-sanitizer is neither on the PATH nor in {home}")
    # application-only: not Triton's assembler. Errors of the API are torch's own business: it asks and looks.
    options = ["--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    # Without the cache every tensor is an allocation of its own, whose ends memcheck knows.
    return Step(
        tool,
        [sanitizer, *options, *pytest(python, TESTS, "-k", "short_run")],
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def run(steps: Sequence[Step], limit_s: float) -> list[Outcome]:
    """The steps at once, each killed when it has taken `limit_s`; their output, one after the other."""
    LOGS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    able = [step for step in steps if not step.missing and limit_s >= LEAST_S]
    for step in able:
        print(f"== {step.name}, for at most {limit_s:.0f} s", flush=True)
    # The interpreter compiles nothing.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    outcomes = []
    try:
        for step in able:
            with log(step).open("wb") as file:
                processes[step.name] = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env={**inherited, **step.environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=heed_interrupts,
                )
        for step in steps:
            if step in able:
                outcomes.append(finish(step, processes[step.name], began, limit_s))
            else:
                outcomes.append(Outcome(step, "skipped", 0.0, step.missing or "no time left"))
    finally:
        for process in processes.values():
            kill(process)
    return outcomes


def heed_interrupts() -> None:
    """Where this runs in the background of a shell it ignores them, and what it starts would as well."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(step: Step, process: subprocess.Popen[bytes], began: float, limit_s: float) -> Outcome:
    killed = False
    try:
        process.wait(max(0.0, began + limit_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        killed = True
        kill(process)
    seconds = time.monotonic() - began
    output = log(step).read_text(errors="replace")
    print(f"== {step.name}\n{output}", flush=True)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
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


def log(step: Step) -> Path:
    return LOGS / f"{step.name.replace(', ', '-').replace(' ', '-')}.log"


def check(python: str, minutes: float) -> list[Outcome]:
    """The most valuable first; nothing else can run where there is no GPU or no build."""
    deadline = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []

    def do(limit_s: float, *steps: Step) -> bool:
        made = run(steps, min(limit_s, deadline - time.monotonic()))
        outcomes.extend(made)
        return all(outcome.result == "passed" for outcome in made)

    if not do(60, Step("GPU", [python, "-c", GPU])):
        return outcomes
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-build-isolation",
        "--no-deps",
        "-e",
        ".",
    ]
    if not do(240, Step("build", pip)):
        return outcomes
    do(60, Step("backends", [python, "-c", BACKENDS]))
    do(240, *steps_of_tests(python))
    do(60, Step("host time", pytest(python, TESTS, "-k", HOST_COST)))
    left = deadline - time.monotonic()
    budget = max(BENCHMARKS_LEAST_S, left - 2 * SANITIZER_S - GRACE_S)
    do(budget + GRACE_S, benchmark_step(python, min(budget, left - GRACE_S)))
    for tool in ("memcheck", "racecheck"):
        do(2 * SANITIZER_S, sanitizer_step(python, tool))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    width = max(len(outcome.step.name) for outcome in outcomes)
    return "\n".join(f"{o.step.name:{width}}  {o.result:7}  {o.seconds:4.0f} s  {o.what}" for o in outcomes)


def main(arguments: Sequence[str] | None = None, check: Callable[[str, float], list[Outcome]] = check) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything; {MINUTES} by default")
    outcomes = check(sys.executable, parser.parse_args(arguments).minutes)
    print(f"\n{table(outcomes)}\nlogs: {LOGS}")
    return int(any(outcome.result == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
