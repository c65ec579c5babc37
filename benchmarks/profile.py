"""`python -m benchmarks.profile` (`make profile`): a short training loop under a profiler, and a table of our ranges.

With nsys on the PATH the loop runs under it and `nsys stats` fills the table; without it the nsys line is printed, and
torch.profiler fills the table and writes a Chrome trace.
"""

from __future__ import annotations

import csv
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import dae_fast as df
from dae_fast.profiling import PREFIX, span

from . import memory  # quietens the profiler's announcements
from .end_to_end import SCHEDULE, TASKS, Task

DOMAIN = "dae_fast:"  # nsys puts the domain before a range's name
# The names of a report in releases from 2023 on and before. Of GPUs the old one lists every range: it is not read.
PUSH_POP, ON_GPU = ("nvtx_pushpop_sum", "nvtxppsum"), ("nvtx_gpu_proj_sum",)
LIMIT_S = 300.0  # for each thing that nsys does
WARM_UP = 3
CUDA_AVAILABLE = torch.cuda.is_available()


@dataclass(frozen=True)
class Range:
    """All ranges of one name."""

    name: str
    calls: int
    host_us: float
    gpu_us: float | None  # of the kernels launched in it; None where nothing was launched


def training_loop(task: Task, device: torch.device) -> Callable[[int], None]:
    """One step of the fused loop, its parts named; a few steps have run."""
    torch.manual_seed(0)
    net, x0 = task.network().to(device), task.data().to(device)
    adam = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    seed = df.Noise(0)

    def step(k: int) -> None:
        with span("step"):
            noise = seed.fold_in(k)
            t = torch.randint(len(SCHEDULE), x0.shape[:1], device=device)
            x_t = df.add_noise(x0, noise, SCHEDULE[t])
            with span("network"):
                pred = net(x_t, t)
            loss = df.noise_mse(pred, noise)
            with span("backward"):
                loss.backward()
            with span("optimizer"):
                adam.step()
                adam.zero_grad()

    for k in range(WARM_UP):
        step(k)
    return step


def run_loop(step: Callable[[int], None], steps: int, device: torch.device) -> None:
    """The steps between cudaProfilerStart and Stop, which is what nsys -c cudaProfilerApi waits for."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for k in range(steps):
        step(WARM_UP + k)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def nsys_line(report: Path, task: Task, steps: int, device: torch.device) -> list[str]:
    """Without a GPU nothing calls cudaProfilerStart, and the whole process is recorded, the warm-up with it.

    No sampling of the processor: nsys 2022 takes minutes to write the samples down, and the table has none of them.
    """
    if device.type == "cuda":
        what = ["-t", "cuda,nvtx,osrt", "-c", "cudaProfilerApi", "--capture-range-end=stop"]
    else:
        what = ["-t", "nvtx,osrt"]
    loop = [sys.executable, "-m", "benchmarks.profile", "--loop"]
    loop += ["--task", task.name, "--steps", str(steps), "--device", device.type]
    quiet = ["-s", "none", "--cpuctxsw=none", "--force-overwrite=true"]
    return ["nsys", "profile", *what, *quiet, "-o", str(report), *loop]


def under_nsys(line: list[str], report: Path, device: torch.device) -> list[Range]:
    report.with_suffix(".nsys-rep").unlink(missing_ok=True)
    limited(line)
    imported(report)
    gpu = {}
    if device.type == "cuda":
        gpu = {r["Range"]: float(r["Total Proj Time (ns)"]) / 1e3 for r in nsys_stats(report, ON_GPU)}
    return [
        Range(
            row["Range"].removeprefix(DOMAIN),
            int(row["Instances"]),
            float(row["Total Time (ns)"]) / 1e3,
            gpu.get(row["Range"]),
        )
        for row in nsys_stats(report, PUSH_POP)
        if row["Range"].startswith(DOMAIN)
    ]


def limited(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, check=True, text=True, timeout=LIMIT_S, **options)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{Path(command[0]).name} did not end within {LIMIT_S:.0f} s and was killed") from None


def imported(report: Path) -> None:
    """Turns what nsys recorded into a report, where it did not find its own importer, as Debian's does not."""
    recording = report.with_suffix(".qdstrm")
    if report.with_suffix(".nsys-rep").exists() or not recording.exists():
        return
    nsys = shutil.which("nsys")
    homes = [Path(nsys).resolve().parents[1], Path(nsys).parents[1] / "lib" / "nsight-systems"] if nsys else []
    importers = [home / "host-linux-x64" / "QdstrmImporter" for home in homes]
    importer = next((path for path in importers if path.exists()), None)
    if importer is None:
        raise RuntimeError(f"nsys left {recording} and no QdstrmImporter was found to read it; open it in nsys-ui")
    limited([importer, "-i", recording], capture_output=True)


def nsys_stats(report: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """The lines of one of nsys's reports, under the first name that it knows; it prints what it does before the CSV."""
    outputs = []
    for name in names:
        command = ["nsys", "stats", "--report", name, "--format", "csv", "--output", "-", "--force-export=true"]
        output = limited([*command, f"{report}.nsys-rep"], capture_output=True).stdout
        lines = output.splitlines()
        headers = [number for number, line in enumerate(lines) if "Range" in line.split(",")]
        if headers:
            return [row for row in csv.DictReader(lines[headers[0] :]) if row["Range"]]
        outputs.append(output)
    raise RuntimeError(f"nsys stats has no {' or '.join(names)}:\n{''.join(outputs)}")


def under_torch(step: Callable[[int], None], steps: int, device: torch.device, trace: Path) -> list[Range]:
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        run_loop(step, steps, device)
    recorded.export_chrome_trace(str(trace))
    return [
        Range(
            event.key.removeprefix(PREFIX),
            event.count,
            event.cpu_time_total,
            event.device_time_total if on_gpu else None,
        )
        for event in recorded.key_averages()
        if event.key.startswith(PREFIX) and event.device_type == torch.autograd.DeviceType.CPU
    ]


def table(ranges: Iterable[Range], title: str) -> Table:
    """The longest first. Shares are of the steps' host time."""
    ranges = sorted(ranges, key=lambda r: -r.host_us)
    whole = next((r.host_us for r in ranges if r.name == "step"), None)
    result = Table(title=title, header_style="bold")
    result.add_column("range", no_wrap=True)
    for name in ("calls", "host ms", "us a call", "of the steps", "GPU ms"):
        result.add_column(name, justify="right")
    for r in ranges:
        result.add_row(
            r.name,
            str(r.calls),
            f"{r.host_us / 1e3:.3g}",
            f"{r.host_us / r.calls:.3g}",
            f"{r.host_us / whole:.1%}" if whole else "",
            "" if r.gpu_us is None else f"{r.gpu_us / 1e3:.3g}",
        )
    return result


def main(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(each.name for each in TASKS)}.")] = "MLP",
    steps: Annotated[int, typer.Option(min=1, help="Steps recorded, after a few that are not.")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if CUDA_AVAILABLE else "cpu",
    out: Annotated[Path, typer.Option(help="The folder for the report or the trace.")] = Path("profile"),
    loop: Annotated[bool, typer.Option("--loop", hidden=True, help="The loop alone: what nsys runs.")] = False,
) -> None:
    """Profile a training loop with Nsight Systems, or with torch.profiler where there is no nsys."""
    known = {each.name.lower(): each for each in TASKS}
    if task.lower() not in known:
        raise typer.BadParameter(f"no such task: {task}", param_hint="--task")
    wanted, place = known[task.lower()], torch.device(device)
    if loop:
        run_loop(training_loop(wanted, place), steps, place)
        return
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    out.mkdir(parents=True, exist_ok=True)
    report = out / "dae_fast"
    line = nsys_line(report, wanted, steps, place)
    if shutil.which("nsys"):
        console.print(shlex.join(line), soft_wrap=True, highlight=False)
        ranges, made = under_nsys(line, report, place), f"{report}.nsys-rep"
    else:
        console.print("nsys is not on the PATH: torch.profiler records instead. Where it is, this line runs:")
        console.print(shlex.join(line), soft_wrap=True, highlight=False)
        memory.warm_up(place)
        trace = out / "trace.json"
        ranges, made = under_torch(training_loop(wanted, place), steps, place, trace), str(trace)
    console.print(table(ranges, f"{wanted.name}, {steps} steps on {place.type}: ranges of dae_fast"))
    console.print(f"written to {made}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    typer.run(main)
