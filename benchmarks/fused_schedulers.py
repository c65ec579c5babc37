"""`python -m benchmarks.fused_schedulers`: loops of diffusers' schedulers, upstream's and fused. Three minutes.

A loop of twenty steps, set_timesteps included, without a network; a step of two halves is two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from . import external
from .environment import RESULTS, environment, results_name
from .growth import Point, Study, measured
from .report import write_csv

BUDGET_S = 6.0
SHAPE = (2, 4, 128, 128)
UPSTREAM, TORCH, KEYED = "diffusers", "fused, torch's noise", "fused, keyed"
PEERS = UPSTREAM, TORCH, KEYED
LOOP = 20

CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DDPM": ("DDPMScheduler", {}, {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, {}),
    "DDIM, eta 1": ("DDIMScheduler", {"clip_sample": False}, {"eta": 1.0}),
    "Euler": ("EulerDiscreteScheduler", {}, {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "Heun": ("HeunDiscreteScheduler", {}, {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {}, {}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
    "DPM-Solver++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "DPM-Solver++ singlestep": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, {}),
    "UniPC": ("UniPCMultistepScheduler", {}, {}),
    "DEIS": ("DEISMultistepScheduler", {}, {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "IPNDM": ("IPNDMScheduler", {}, {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}, {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}, {}),
    "SASolver": ("SASolverScheduler", {}, {}),
    "LMS": ("LMSDiscreteScheduler", {}, {}),
    "LCM": ("LCMScheduler", {}, {}),
    "TCD": ("TCDScheduler", {}, {}),
    "EDM Euler": ("EDMEulerScheduler", {}, {}),
    "EDM DPM-Solver++ 2M": ("EDMDPMSolverMultistepScheduler", {}, {}),
    "consistency": ("CMStochasticIterativeScheduler", {"num_train_timesteps": 100}, {}),
    "flow-match Euler": ("FlowMatchEulerDiscreteScheduler", {}, {}),
}


def studies() -> Iterator[Study]:
    """(scheduler, "values", how many the samples have, the peers)."""
    for name, of in CONFIGS.items():
        x, output = torch.randn(SHAPE), torch.randn(SHAPE)
        yield name, "values", x.numel(), {source: _peer(source, *of, x, output) for source in PEERS}


def _peer(
    source: str, kind: str, config: dict[str, Any], arguments: dict[str, Any], x: torch.Tensor, output: torch.Tensor
) -> Callable[[], Any]:
    import diffusers

    from dae_fast.integrations.diffusers import fuse

    scheduler = getattr(diffusers, kind)(**config)
    if source != UPSTREAM:
        fuse(scheduler, noise="torch" if source == TORCH else "fused")
    keyed = source == KEYED and "generator" in signature(scheduler.step).parameters
    return _loop(scheduler, x, output, {**arguments, **({"generator": [1, 2]} if keyed else {})})


def _loop(scheduler: Any, x: torch.Tensor, output: torch.Tensor, arguments: dict[str, Any]) -> Callable[[], Any]:
    """As a pipeline has it, but for the network."""
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.is_scale_input_called = True  # a line of its own, which is not measured

    def loop() -> Any:
        scheduler.set_timesteps(LOOP)
        made = x
        for t in scheduler.timesteps:
            made = scheduler.step(output, t, x, return_dict=False, **arguments)[0]
        return made

    return loop


def table(points: list[Point]) -> Table:
    """Milliseconds of a loop, and how many times as long as the fused ones upstream's takes."""
    shown = Table("scheduler", *(f"{n}, ms" for n in PEERS), *(f"{UPSTREAM} / {n}" for n in PEERS[1:]))
    found = {(p.study, p.peer): p.median_ms for p in points}
    for study in dict.fromkeys(p.study for p in points):
        upstream, *ours = (found[study, peer] for peer in PEERS)
        shown.add_row(study, *(f"{t:.3g}" for t in (upstream, *ours)), *(f"{upstream / t:.1f}" for t in ours))
    return shown


def main(
    csv: Annotated[Path | None, typer.Option(help="Default: results/, beside the suite's.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for each scheduler.")] = BUDGET_S,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """Measure a loop of every scheduler on the CPU."""
    if "diffusers" in external.missing():
        typer.echo(f"not measured: diffusers: {external.missing()['diffusers']}")
        raise typer.Exit(1)
    torch.set_num_threads(threads)
    path = csv or RESULTS / f"{results_name()}-schedulers.csv"
    with torch.no_grad():
        points = measured(studies(), budget_s=budget)
    write_csv(path, points, environment())
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table(points))
    typer.echo(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
