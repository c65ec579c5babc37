"""`python -m dae_fast`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .info import info as facts

app = typer.Typer(help="dae_fast: fused kernels for denoising autoencoders and diffusion models.")


@app.command()
def info() -> None:
    """Show versions, backends, and what is missing and why."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts().items():
        table.add_row(name, Text(value))  # as it is: a compiler's message may hold what rich takes for markup
    Console().print(table)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure every op beside eager torch, torch.compile and other libraries; `bench --help` lists the options."""
    clone = Path(__file__).resolve().parent.parent
    if not (clone / "benchmarks" / "suite.py").exists():
        typer.echo(
            "bench: the benchmarks are in the repository, not in the package: run this in a clone of it", err=True
        )
        raise typer.Exit(2)
    sys.path.insert(0, str(clone))
    try:
        benchmarks = import_module("benchmarks.__main__")
    except ModuleNotFoundError as error:
        typer.echo(f"bench: {error}: `pip install -e .[test]` brings what the benchmarks need", err=True)
        raise typer.Exit(2) from None
    benchmarks.app(context.args, prog_name="python -m dae_fast bench")


if __name__ == "__main__":
    app()
