"""`python -m benchmarks`: the table on the terminal and the CSV beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from tests.cases import CASES

from . import memory, peers, report, suite
from .environment import ROOT, environment, results_name

RESULTS = ROOT / "benchmarks" / "results"
FULL_BUDGET_S, QUICK_BUDGET_S = 1.0, 0.3


def main(
    full: Annotated[bool, typer.Option("--full/--quick", help="Quick: the main cases in float32, a minute.")] = True,
    case: Annotated[list[str] | None, typer.Option(help="A case, or the start of its name; repeatable.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Such as 256x4x64x64; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Such as bfloat16; repeatable.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(peers.PEERS)}; repeatable.")] = None,
    path: Annotated[Path | None, typer.Option("--csv", help="Default: results/ after a full run, else none.")] = None,
) -> None:
    """Measure dae_fast beside eager torch and torch.compile, after a correctness gate."""
    wanted = case or (None if full else list(suite.MAIN))
    cases = [c for c in CASES if wanted is None or c.name.startswith(tuple(wanted))]
    if not cases:
        raise typer.BadParameter(f"no case starts with {' or '.join(wanted or [])}", param_hint="--case")
    if unknown := set(peer or ()) - set(peers.PEERS):
        raise typer.BadParameter(f"no such peer: {', '.join(sorted(unknown))}", param_hint="--peer")
    shapes = [_shape(s) for s in shape] if shape else suite.SHAPES
    dtypes = [_dtype(d) for d in dtype] if dtype else suite.DTYPES if full else (torch.float32,)
    settings = suite.settings(cases, shapes, dtypes)

    memory.warm_up()
    rows: list[report.Row] = []
    budget = FULL_BUDGET_S if full else QUICK_BUDGET_S
    for setting in track(settings, "measuring", console=Console(stderr=True), transient=True):
        rows += suite.run(setting, peer or suite.default_peers(setting, full=full), budget_s=budget)

    where = environment()
    console = Console()
    # Piped into a file there is no width to keep to.
    console = console if console.is_terminal else Console(width=200)
    console.print(report.table(rows, where))
    if path is None and full and not (case or shape or dtype or peer):
        path = RESULTS / results_name()
    if path is not None:
        report.write_csv(path, rows, where)
        console.print(f"written to {path}")
    errors = [row.error for row in rows if row.error]
    for error in errors:
        console.print(error, style="bold red", highlight=False)
    if errors:
        raise typer.Exit(1)


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise typer.BadParameter(f"a shape is written like 64x784, not {text!r}", param_hint="--shape") from None
    return sizes


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise typer.BadParameter(f"no floating dtype {text!r}", param_hint="--dtype")
    return found


if __name__ == "__main__":
    typer.run(main)
