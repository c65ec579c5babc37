"""`python -m benchmarks.fused_schedulers`: loops of diffusers' schedulers, upstream's and ours. Three minutes.

A loop of twenty steps, set_timesteps included, without a network; a step of two halves is two calls. A sampler's levels
are its own, and its object is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import dae_fast as df

from . import external
from .environment import RESULTS, environment, results_name
from .growth import Point, Study, measured
from .report import write_csv

BUDGET_S = 6.0
SHAPE = (2, 4, 128, 128)
UPSTREAM, TORCH, KEYED = "diffusers", "fused, torch's noise", "fused, keyed"
PEERS = UPSTREAM, TORCH, KEYED
SAMPLER = "sampler"
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
_SCHEDULE = df.Schedule.linear(1000)
_SIGMAS = df.Schedule.karras(100)
_OF_SIGMA: dict[str, Any] = {"steps": LOOP, "conditioning": "sigma"}
SAMPLERS: dict[str, df.samplers.Sampler] = {
    "DDPM": df.samplers.DDPM(_SCHEDULE, steps=LOOP, clamp=1.0),
    "DDIM": df.samplers.DDIM(_SCHEDULE, steps=LOOP),
    "DDIM, eta 1": df.samplers.DDIM(_SCHEDULE, steps=LOOP, eta=1.0),
    "Euler": df.samplers.Euler(_SCHEDULE, steps=LOOP),
    "Euler ancestral": df.samplers.EulerAncestral(_SCHEDULE, steps=LOOP),
    "Heun": df.samplers.Heun(_SCHEDULE, steps=LOOP),
    "DPM-Solver++ 2M": df.samplers.DPMSolverPP2M(_SCHEDULE, steps=LOOP),
    "DPM-Solver++ 3M": df.samplers.DPMSolverPP3M(_SCHEDULE, steps=LOOP),
    "DPM-Solver++ 2M SDE": df.samplers.DPMSolverPP2MSDE(_SCHEDULE, steps=LOOP),
    "UniPC": df.samplers.UniPC(_SCHEDULE, steps=LOOP),
    "DEIS": df.samplers.DEIS(_SCHEDULE, steps=LOOP, order=2),
    "PNDM": df.samplers.PLMS(_SCHEDULE, steps=LOOP),
    "LMS": df.samplers.LMS(_SCHEDULE, steps=LOOP),
    "LCM": df.samplers.LCM(_SCHEDULE, steps=LOOP),
    "TCD": df.samplers.TCD(_SCHEDULE, steps=LOOP),
    "EDM Euler": df.samplers.Euler(_SIGMAS, **_OF_SIGMA),
    "EDM DPM-Solver++ 2M": df.samplers.DPMSolverPP2M(_SIGMAS, **_OF_SIGMA),
    "consistency": df.samplers.Consistency(_SIGMAS, **_OF_SIGMA),
    "flow-match Euler": df.samplers.FlowEuler(df.Schedule.flow(1000), steps=LOOP),
}


def studies() -> Iterator[Study]:
    """(scheduler, "values", how many the samples have, the peers)."""
    for name, of in CONFIGS.items():
        x, output = torch.randn(SHAPE), torch.randn(SHAPE)
        peers = {source: _peer(source, *of, x, output) for source in PEERS}
        if name in SAMPLERS:
            peers[SAMPLER] = partial(_stepped, SAMPLERS[name], x, output)
        yield name, "values", x.numel(), peers


def _stepped(sampler: df.samplers.Sampler, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    noise = df.Noise(0)
    for i in range(len(sampler.levels)):
        x = sampler.step(i, x, output, noise)
    return x


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
    """Milliseconds of a loop, and how many times as long as ours upstream's takes."""
    names = *PEERS, SAMPLER
    shown = Table("scheduler", *(f"{n}, ms" for n in names), *(f"{UPSTREAM} / {n}" for n in names[1:]))
    found = {(p.study, p.peer): p.median_ms for p in points}
    for study in dict.fromkeys(p.study for p in points):
        times = [found.get((study, peer)) for peer in names]
        ratios = [None if t is None else found[study, UPSTREAM] / t for t in times[1:]]
        shown.add_row(
            study, *("" if t is None else f"{t:.3g}" for t in times), *("" if r is None else f"{r:.1f}" for r in ratios)
        )
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
