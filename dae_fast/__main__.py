"""`python -m dae_fast`."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from .info import info as facts

app = typer.Typer(help="dae_fast: fused kernels for denoising autoencoders and diffusion models.")


@app.callback()
def main() -> None:
    """Keeps `info` a subcommand although it is the only one."""


@app.command()
def info() -> None:
    """Show versions, backends, and what is missing and why."""
    table = Table(show_header=False, box=None)
    for name, value in facts().items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    app()
