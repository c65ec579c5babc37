"""`python -m dae_fast`."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .info import info as facts

app = typer.Typer(help="dae_fast: fused kernels for denoising autoencoders and diffusion models.")


@app.callback()
def main() -> None:
    """Keeps `info` a subcommand although it is the only one."""


@app.command()
def info() -> None:
    """Show versions, backends, and what is missing and why."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts().items():
        table.add_row(name, Text(value))  # as it is: a compiler's message may hold what rich takes for markup
    Console().print(table)


if __name__ == "__main__":
    app()
