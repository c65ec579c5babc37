"""`python -m benchmarks.samplers`: every sampler against its loop by hand and diffusers' scheduler. Three minutes.

The networks cost one pass, so that what is left is the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import dae_fast as df

from . import external, schedulers
from .environment import RESULTS, environment, results_name
from .growth import CHAIN, FIXED_CHAINS, OURS, Point, Study, measured
from .loops import LOOPS, fresh
from .peers import EAGER
from .report import write_csv
from .suite import LATENT

BUDGET_S = 2.0
SHAPES = ((FIXED_CHAINS, CHAIN), LATENT)
DIFFUSERS = "diffusers"


def studies() -> Iterator[Study]:
    """(sampler, "values", how many the samples have, the peers), made one at a time: they hold memory."""
    runs = schedulers.runs()
    for loop in LOOPS:
        for shape in SHAPES:
            x = torch.randn(shape)
            peers = {
                EAGER: partial(loop.by_hand(x.dtype), loop.net, x, fresh),
                OURS: partial(loop.ours, loop.net, x, df.Noise(0)),
            }
            if loop.name in runs:
                peers[DIFFUSERS] = partial(runs[loop.name], loop.net, x, fresh)
            yield loop.name, "values", x.numel(), peers


def table(points: Sequence[Point]) -> Table:
    """Milliseconds of a whole run, and how many times as long as ours the others take."""
    names = EAGER, DIFFUSERS, OURS
    shown = Table("sampler", "values", *(f"{n}, ms" for n in names), *(f"{n} / {OURS}" for n in names[:2]))
    found = {(p.study, p.at, p.peer): p.median_ms for p in points}
    for study, at in dict.fromkeys((p.study, p.at) for p in points):
        times = [found.get((study, at, name)) for name in names]
        ours = found[study, at, OURS]
        ratios = [None if t is None else t / ours for t in times[:2]]
        shown.add_row(study, str(at), *("" if n is None else f"{n:.3g}" for n in (*times, *ratios)))
    return shown


def main(
    csv: Annotated[Path | None, typer.Option(help="Default: results/, beside the suite's.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for each sampler and size.")] = BUDGET_S,
) -> None:
    """Measure every sampler's loop on the CPU."""
    path = csv or RESULTS / f"{results_name()}-samplers.csv"
    points = measured(studies(), budget_s=budget)
    write_csv(path, points, environment())
    console = Console()
    # Piped into a file there is no width to keep to.
    (console if console.is_terminal else Console(width=200)).print(table(points))
    if DIFFUSERS in external.missing():
        typer.echo(f"not measured: {DIFFUSERS}: {external.missing()[DIFFUSERS]}")
    typer.echo(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
