"""`python -m benchmarks.end_to_end`: whole training steps, and what share of them is outside the network.

The same network from the same start, trained by four loops that take turns: eager torch, torch.compile around the
whole objective, our ops, and our ops around a compiled network. Two more run the network alone (forward, backward
from a given gradient, optimiser step): what a loop takes beyond that is its share outside the network.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import dae_fast as df

from . import memory
from .cases import column
from .environment import RESULTS, environment, results_name
from .measure import Peer, Timing, interleave
from .models import MLP, DiT, UNet
from .report import described, write_csv

SCHEDULE = df.Schedule.linear(1000)
EAGER, COMPILE = "eager", "torch.compile"
FUSED, FUSED_COMPILED = "dae_fast", "dae_fast, compiled network"
ALONE, ALONE_COMPILED = "network alone", "network alone, compiled"
# What a loop's network costs by itself.
ALONE_OF = {EAGER: ALONE, FUSED: ALONE, COMPILE: ALONE_COMPILED, FUSED_COMPILED: ALONE_COMPILED}
BUDGET_S, QUICK_BUDGET_S = 40.0, 4.0

Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    name: str
    network: Callable[[], nn.Module]
    data: Callable[[], Tensor]  # a batch; the same one in every step, which costs what any other would
    source: str


def digits() -> Tensor:
    """(64, 784) in [-1, 1]: handwritten digits of 8x8 enlarged to 28x28."""
    from sklearn.datasets import load_digits

    small = torch.tensor(load_digits().images[:64] / 8 - 1, dtype=torch.float32)[:, None]
    return F.interpolate(small, size=28, mode="bilinear").flatten(1)


def photographs() -> Tensor:
    """(32, 3, 32, 32) in [-1, 1]: squares cut from two photographs."""
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    squares = images.permute(0, 3, 1, 2).unfold(2, 32, 120).unfold(3, 32, 150)  # (2, 3, 4, 5, 32, 32)
    return (squares.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)[:32] / 127.5 - 1).contiguous()


def latents() -> Tensor:
    """(8, 4, 32, 32) unit Gaussian, as an autoencoder's latents nearly are."""
    return torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(0))


TASKS = (
    Task("MLP", lambda: MLP(784), digits, "scikit-learn's digits, enlarged"),
    Task("U-Net", lambda: UNet(3), photographs, "squares of scikit-learn's two photographs"),
    Task("DiT", lambda: DiT(4, 32), latents, "synthetic: Gaussian latents"),
)


@dataclass(frozen=True)
class Row:
    """One loop of one task."""

    task: str
    data: str
    shape: str
    parameters: int
    loop: str
    steps_per_s: float  # of the median step
    median_ms: float
    q1_ms: float
    q3_ms: float
    outside_ms: float | None  # median of (step - network alone), taken round by round
    outside_share: float | None  # that of the median step
    peak_bytes: int  # allocated in one step, beyond what is held between steps
    rounds: int


def plain_objective(net: Network, x0: Tensor, t: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
    """What one writes in torch; with torch.compile around it, the network included."""
    eps = torch.randn_like(x0)
    x_t = column(alphas[t], x0) * x0 + column(sigmas[t], x0) * eps
    return F.mse_loss(net(x_t, t), eps)


def fused_objective(net: Network, x0: Tensor, t: Tensor, noise: df.Noise) -> Tensor:
    x_t = df.add_noise(x0, noise, SCHEDULE[t])
    return df.noise_mse(net(x_t, t), noise)


def loops(net: nn.Module, x0: Tensor, *, compiled: bool = True) -> dict[str, Peer]:
    """One training step of each loop, every loop with its own copy of the network. Each step returns its loss."""
    torch._dynamo.reset()
    names = (EAGER, FUSED, ALONE, *((COMPILE, FUSED_COMPILED, ALONE_COMPILED) if compiled else ()))
    return {name: _loop(name, deepcopy(net), x0) for name in names}


def _loop(name: str, net: nn.Module, x0: Tensor) -> Peer:
    adam = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    alphas, sigmas = (table.float().to(x0.device) for table in (SCHEDULE.alpha, SCHEDULE.sigma))
    network: Network = torch.compile(net, dynamic=False) if name in (FUSED_COMPILED, ALONE_COMPILED) else net
    plain = torch.compile(plain_objective, dynamic=False) if name == COMPILE else plain_objective
    seed, count = df.Noise(0), 0
    x_t, levels, given = torch.randn_like(x0), _levels(x0), torch.randn_like(x0) / x0.numel()

    def backward() -> Tensor:
        nonlocal count
        count += 1
        if name in (ALONE, ALONE_COMPILED):
            pred = network(x_t, levels)
            pred.backward(given)
            return pred
        t = _levels(x0)
        if name in (EAGER, COMPILE):
            loss = plain(net, x0, t, alphas, sigmas)
        else:
            loss = fused_objective(network, x0, t, seed.fold_in(count))
        loss.backward()
        return loss

    def step() -> Tensor:
        result = backward()
        adam.step()
        adam.zero_grad()
        return result.detach()

    return step


def _levels(x0: Tensor) -> Tensor:
    return torch.randint(len(SCHEDULE), x0.shape[:1], device=x0.device)


def run(task: Task, device: torch.device, *, compiled: bool, budget_s: float) -> list[Row]:
    torch.manual_seed(0)
    net, x0 = task.network().to(device), task.data().to(device)
    steps = loops(net, x0, compiled=compiled)
    for step in steps.values():
        for _ in range(2):
            step()  # compiled, and its optimiser's state made, before anything is measured
    peaks = {name: memory.usage(step, x0.nbytes, device).peak_bytes for name, step in steps.items()}
    timings = interleave(steps, budget_s=budget_s, device=device)
    facts = (task.name, task.source, "x".join(map(str, x0.shape)), sum(p.numel() for p in net.parameters()))
    return [_row(facts, name, timings, peaks[name]) for name in steps]


def _row(facts: tuple[str, str, str, int], name: str, timings: dict[str, Timing], peak: int) -> Row:
    timing = timings[name]
    q1, median, q3 = timing.quartiles
    outside = None
    if name in ALONE_OF:
        alone = timings[ALONE_OF[name]]
        outside = statistics.median(a - b for a, b in zip(timing.seconds, alone.seconds, strict=True))
    return Row(
        *facts,
        name,
        steps_per_s=1 / median,
        median_ms=median * 1e3,
        q1_ms=q1 * 1e3,
        q3_ms=q3 * 1e3,
        outside_ms=None if outside is None else outside * 1e3,
        outside_share=None if outside is None else outside / median,
        peak_bytes=peak,
        rounds=len(timing.seconds),
    )


def table(rows: list[Row], where: dict[str, str]) -> Table:
    result = Table(
        title="training steps; outside: of the step, what the network alone and the optimiser do not take",
        caption=described(where),
        header_style="bold",
    )
    for name in ("task", "loop"):
        result.add_column(name, no_wrap=True)
    for name in ("steps/s", "ms", "x eager", "outside", "ms outside", "peak MB"):
        result.add_column(name, justify="right")
    eager = {row.task: row.median_ms for row in rows if row.loop == EAGER}
    task = None
    for row in rows:
        if row.task != task:
            result.add_section()
            result.add_row(Text(f"{row.task}, {row.shape}, {row.parameters / 1e6:.1f} M parameters", style="italic"))
            task = row.task
        result.add_row(
            "",
            row.loop,
            f"{row.steps_per_s:.3g}",
            f"{row.median_ms:.3g} ±{(row.q3_ms - row.q1_ms) / 2 / row.median_ms:.0%}",
            _coloured(eager[row.task] / row.median_ms) if row.loop in ALONE_OF else "",
            "" if row.outside_share is None else f"{row.outside_share:.1%}",
            "" if row.outside_ms is None else f"{row.outside_ms:.3g}",
            f"{row.peak_bytes / 1e6:.3g}",
        )
    return result


def _coloured(value: float) -> Text:
    style = "bold green" if value > 1.05 else "bold red" if value < 0.95 else "bold yellow"
    return Text(f"{value:.2f}", style=style)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Eager and ours alone, a few seconds for each task.")] = False,
    task: Annotated[list[str] | None, typer.Option(help="MLP, U-Net or DiT; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    csv: Annotated[Path | None, typer.Option(help="Default: results/ after a full run, else none.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds of measuring for each task.")] = None,
) -> None:
    """Measure training steps of three networks: eager, torch.compile and dae_fast, taking turns."""
    known = {each.name.lower(): each for each in TASKS}
    if unknown := {name for name in task or () if name.lower() not in known}:
        raise typer.BadParameter(f"no such task: {', '.join(sorted(unknown))}", param_hint="--task")
    wanted = [known[name.lower()] for name in task] if task else list(TASKS)
    place = torch.device(device)
    seconds = budget or (QUICK_BUDGET_S if quick else BUDGET_S)

    memory.warm_up(place)
    rows: list[Row] = []
    for each in track(wanted, "measuring", console=Console(stderr=True), transient=True):
        rows += run(each, place, compiled=not quick, budget_s=seconds)
    where = environment(place)
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    console.print(table(rows, where))
    if csv is None and not (quick or task):
        csv = RESULTS / f"{results_name(place)}-end-to-end.csv"
    if csv is not None:
        write_csv(csv, rows, where)
        console.print(f"written to {csv}")


if __name__ == "__main__":
    typer.run(main)
