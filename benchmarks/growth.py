"""`python -m benchmarks.growth`: how cost grows with threads, chains, steps and the batch. Three minutes.

The growth with size is in the suite's own rows; `fit` puts a line through it. All samplers: benchmarks.samplers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import dae_fast as df

from . import loops, memory
from .cases import SCHEDULE, TABLES, column
from .environment import CPU, RESULTS, default_backend, environment, results_name
from .measure import Peer, interleave
from .peers import COMPILE, EAGER, Setting, own_leaves, peer
from .report import write_csv
from .suite import CASES, LATENT

BUDGET_S = 1.0
OURS = default_backend(CPU)
OURS_COMPILED = f"{OURS} in torch.compile"
THREADS_OF = ("add_noise-fresh", "to_x0-eps", "noise_mse-fresh")
CHAIN = 784  # values of one chain, or of one image
CHAINS, STEPS = (1, 4, 16, 64, 256), (1, 3, 10, 30, 100)
FIXED_CHAINS, FIXED_STEPS = 64, 10
BATCHES = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Point:
    """One peer where `along` is `at`."""

    study: str
    along: str
    at: int
    peer: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    peak_bytes: int | None = None  # allocated in one call


@dataclass(frozen=True)
class Line:
    """seconds = fixed + slope * x."""

    fixed: float
    slope: float


def fit(x: list[float], seconds: list[float]) -> Line:
    """Least squares of the relative errors, so that the small sizes count as much; neither part below zero."""
    xs, ys = np.asarray(x, float), np.asarray(seconds, float)
    both, _, _, _ = np.linalg.lstsq(np.stack((1 / ys, xs / ys), 1), np.ones_like(ys), rcond=None)
    fixed, slope = both
    if fixed < 0:
        fixed, slope = 0.0, (xs / ys).sum() / ((xs / ys) ** 2).sum()
    elif slope < 0:
        fixed, slope = (1 / ys).sum() / (1 / ys**2).sum(), 0.0
    return Line(float(fixed), float(slope))


Study = tuple[str, str, int, dict[str, Peer]]


def studies() -> Iterator[Study]:
    """(study, what varies, its value, the peers), made one at a time: some set the threads, all hold memory."""
    yield from _threads()
    yield from _langevin()
    yield from _ddim()
    yield from _training_step()


def _threads() -> Iterator[Study]:
    usual = torch.get_num_threads()
    try:
        for threads in range(1, len(os.sched_getaffinity(0)) + 1):
            torch.set_num_threads(threads)
            for case in (c for c in CASES if c.name in THREADS_OF):
                setting = Setting(case, LATENT, torch.float32, own_leaves(case))
                yield case.name, "threads", threads, {name: peer(setting, name) for name in (EAGER, OURS)}
    finally:
        torch.set_num_threads(usual)


def _langevin() -> Iterator[Study]:
    """A Gaussian's score, which costs one pass: what is left is the loop."""
    sizes = [(chains, FIXED_STEPS, "chains") for chains in CHAINS] + [(FIXED_CHAINS, s, "steps") for s in STEPS]
    for chains, steps, along in sizes:
        x = torch.randn(chains, CHAIN)
        ours = partial(df.samplers.langevin, loops.score, x, loops.STEP_SIZE, steps, df.Noise(0))
        by_hand = partial(loops.langevin(loops.STEP_SIZE, steps), loops.score, x, loops.fresh)
        yield "langevin", along, chains if along == "chains" else steps, {EAGER: by_hand, OURS: ours}


def _ddim() -> Iterator[Study]:
    """The exact eps of Gaussian data; deterministic steps, whose noise nobody draws."""
    for steps in STEPS:
        x = torch.randn(FIXED_CHAINS, CHAIN)
        levels = torch.linspace(len(SCHEDULE) - 1, 0, steps, dtype=torch.float64).round().long().tolist()
        by_hand = partial(loops.ddim(SCHEDULE, levels, x.dtype), loops.half, x, loops.fresh)
        ours = partial(df.samplers.ddim, loops.half, x, SCHEDULE, df.Noise(0), steps=steps)
        yield "ddim", "steps", steps, {EAGER: by_hand, OURS: ours}


def _training_step() -> Iterator[Study]:
    """Noising, one convolution for the network, the loss, the backward pass: what the step allocates."""
    net = torch.nn.Conv2d(LATENT[1], LATENT[1], 3, padding=1)
    alphas, sigmas = TABLES[torch.float32, "cpu"]

    def plain(x0: Tensor, t: Tensor) -> Tensor:
        eps = torch.randn_like(x0)
        x_t = column(alphas[t], x0) * x0 + column(sigmas[t], x0) * eps
        return torch.nn.functional.mse_loss(net(x_t), eps)

    def fused(x0: Tensor, t: Tensor) -> Tensor:
        noise = df.Noise(0).fold_in(1)
        x_t = df.add_noise(x0, noise, SCHEDULE[t])
        return df.noise_mse(net(x_t), noise)

    def step(loss: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor) -> Peer:
        return lambda: torch.autograd.grad(loss(x0, t), list(net.parameters()))

    for batch in BATCHES:
        x0, t = torch.randn(batch, *LATENT[1:]), torch.randint(len(SCHEDULE), (batch,))
        torch._dynamo.reset()
        compiled, both = (torch.compile(loss, fullgraph=True, dynamic=False) for loss in (plain, fused))
        losses = {EAGER: plain, COMPILE: compiled, OURS: fused, OURS_COMPILED: both}
        yield "training step", "batch", batch, {name: step(loss, x0, t) for name, loss in losses.items()}


def measured(found: Iterator[Study], *, budget_s: float) -> list[Point]:
    memory.warm_up()
    points = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        for study, along, at, calls in found:
            progress.update(task, description=f"{study}, {along} {at}")
            for call in calls.values():
                call()  # compiled before its memory is counted
            peaks = {name: memory.usage(call, 1).peak_bytes for name, call in calls.items()}
            for name, timing in interleave(calls, budget_s=budget_s).items():
                q1, median, q3 = (1e3 * q for q in timing.quartiles)
                points.append(Point(study, along, at, name, median, q1, q3, peaks[name]))
    return points


def main(
    csv: Annotated[Path | None, typer.Option(help="Default: results/, beside the suite's.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for each point.")] = BUDGET_S,
) -> None:
    """Measure how cost grows with threads, chains, steps and the batch, on the CPU."""
    path = csv or RESULTS / f"{results_name()}-growth.csv"
    write_csv(path, measured(studies(), budget_s=budget), environment())
    typer.echo(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
