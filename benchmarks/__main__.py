"""`python -m dae_fast bench`: the table on the terminal, the CSV and JSON beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import dae_fast as df

from . import external, memory, peers, suite, tables
from .environment import RESULTS, default_backend, environment, results_name
from .report import Row, read_csv, write_csv, write_json
from .suite import Measurement

FULL_BUDGET_S, QUICK_BUDGET_S = 0.6, 0.3
# What was asked for by name is measured longer.
CHOSEN_BUDGET_S = 1.0

app = typer.Typer(add_completion=False)


@app.command()
def main(
    full: Annotated[bool, typer.Option("--full/--quick", help="Quick: the main cases in float32, a minute.")] = True,
    case: Annotated[list[str] | None, typer.Option(help="A case, or the start of its name; repeatable.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Such as 256x4x64x64; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Such as bfloat16; repeatable.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="Such as eager, native or diffusers; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    detail: Annotated[bool, typer.Option("--detail", help="A line for every peer rather than every setting.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Default: results/ after a full run, else none.")] = None,
    json: Annotated[Path | None, typer.Option(help="The same as JSON.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two CSV files: what got slower or faster. Measures nothing.")
    ] = None,
) -> None:
    """Measure dae_fast beside eager torch, torch.compile and other libraries, after a correctness gate."""
    console = Console()
    # Piped into a file there is no width to keep to.
    console = console if console.is_terminal else Console(width=200)
    if compare:
        console.print(_comparison(*compare))
        return
    where = chosen_device(device)
    refuse_plain_torch(where, peer)
    everything = not (case or shape or dtype or peer)
    if everything:
        plan = suite.full(where) if full else suite.quick(where)
    else:
        plan = chosen_plan(case, shape, dtype, peer, where, full=full)
    budget = (FULL_BUDGET_S if full else QUICK_BUDGET_S) if everything else CHOSEN_BUDGET_S
    rows = measured(plan, where, budget_s=budget)

    here = environment(where)
    console.print((tables.detail if detail else tables.summary)(rows, here))
    for library, why in external.missing().items():
        console.print(f"not measured: {library}: {why}", style="yellow", markup=False, highlight=False)
    if csv is None and full and everything:
        csv = (RESULTS if RESULTS.exists() else Path.cwd()) / f"{results_name(where)}.csv"  # a wheel has no results
    for path, write in ((csv, write_csv), (json, write_json)):
        if path is not None:
            write(path, rows, here)
            console.print(f"written to {path}")
    errors = [row.error for row in rows if row.error]
    for error in errors:
        console.print(error, style="bold red", markup=False, highlight=False)
    ours = peers.backends_on(where)
    if any(row.error and row.peer in ours for row in rows):
        raise typer.Exit(1)


def refuse_plain_torch(device: torch.device, peer: Sequence[str] | None) -> None:
    """Measured as dae_fast, the reference would pass for what it is only the judge of."""
    if default_backend(device) == "reference" and "reference" not in (peer or ()):
        why = df.kernels.dispatch.missing("native") or df.info().get("cuda", "")
        raise typer.BadParameter(
            f"no kernels run on {device} here, only plain torch ({why}); `--peer reference` measures that all the same",
            param_hint="--device",
        )


def measured(plan: Sequence[Measurement], device: torch.device, *, budget_s: float) -> list[Row]:
    memory.warm_up(device)
    rows: list[Row] = []
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(plan))
        for setting, names in plan:
            progress.update(task, description=str(setting))
            rows += suite.run(setting, names, budget_s=budget_s)
            progress.advance(task)
    return rows


def chosen_plan(
    case: list[str] | None,
    shape: list[str] | None,
    dtype: list[str] | None,
    peer: list[str] | None,
    device: torch.device,
    *,
    full: bool,
) -> list[Measurement]:
    wanted = case or (None if full else list(suite.MAIN))
    cases = [c for c in suite.CASES if wanted is None or c.name.startswith(tuple(wanted))]
    if not cases:
        raise typer.BadParameter(f"no case starts with {' or '.join(wanted or [])}", param_hint="--case")
    shapes = [parse_shape(s) for s in shape] if shape else suite.SHAPES
    dtypes = [parse_dtype(d) for d in dtype] if dtype else suite.DTYPES if full else (torch.float32,)
    plan = suite.chosen(cases, shapes, dtypes, peer, device)
    can = {name for measurement in suite.chosen(cases, shapes, dtypes, None, device) for name in measurement.peers}
    if unknown := set(peer or ()) - can:
        missing = external.missing()
        why = "; ".join(f"{name}: {missing.get(name, 'not a peer of these cases')}" for name in sorted(unknown))
        raise typer.BadParameter(f"{why} (there are {', '.join(sorted(can))})", param_hint="--peer")
    return plan


def _comparison(before: Path, after: Path) -> Table:
    try:
        (old, was), (new, now) = read_csv(before), read_csv(after)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--compare") from None
    return tables.comparison(tables.changes(old, new), was, now)


def parse_shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise typer.BadParameter(f"a shape is written like 64x784, not {text!r}", param_hint="--shape") from None
    return sizes


def parse_dtype(text: str) -> torch.dtype:
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise typer.BadParameter(f"no floating dtype {text!r}", param_hint="--dtype")
    return found


def chosen_device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise typer.BadParameter(f"cpu or cuda, not {text!r}", param_hint="--device")
    if text == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here", param_hint="--device")
    return torch.device(text)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
