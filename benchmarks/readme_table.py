"""`python -m benchmarks.readme_table`: writes the main results between the markers of README.md.

With --check nothing is written, and the command fails if the file and the CSV differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .environment import ROOT, results_name
from .peers import COMPILE, EAGER, OURS
from .report import Row, by_setting, ratio, read_csv
from .suite import MAIN

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SHOWN = "float32"  # the other dtypes are in the CSV
COLUMNS = (
    "op",
    "shape",
    "eager ms",
    "torch.compile ms",
    "dae_fast ms",
    "times eager",
    "times torch.compile",
    "of copy bandwidth",
)


class MarkerError(ValueError):
    """The file does not have the two markers, once each and in order."""


def markdown(rows: Sequence[Row], environment: dict[str, str]) -> str:
    lines = [
        "{device}, {threads} threads; dae_fast {dae_fast} at {commit}, torch {torch}, Python {python}; {date}. "
        "Medians, float32; losses with the gradient of the prediction.".format(**environment),
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * 2}{' ---: |' * (len(COLUMNS) - 2)}",
    ]
    for (case, mode, shape, dtype), group in by_setting(rows).items():
        if case in MAIN and dtype == SHOWN and mode in ("forward", "loss and gradient"):
            ours = group.get(OURS)
            cells = [
                case,
                shape,
                *(_milliseconds(group.get(name)) for name in (EAGER, COMPILE, OURS)),
                *(_times(ratio(group, name)) for name in (EAGER, COMPILE)),
                f"{ours.copy_share:.0%}" if ours and ours.copy_share else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replaced(text: str, table: str) -> str:
    """`text` with `table` between its markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise MarkerError(f"the file must have {BEGIN} and, after it, {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    return "wrong" if row.median_ms is None else f"{row.median_ms:.3g}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main(
    source: Annotated[Path | None, typer.Option("--csv", help="Default: this device's file in results/.")] = None,
    readme: Annotated[Path, typer.Option(help="The file with the markers.")] = ROOT / "README.md",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the file is out of date.")] = False,
) -> None:
    """Put the benchmark table of a CSV into a Markdown file."""
    source = source or ROOT / "benchmarks" / "results" / results_name()
    if not source.exists():
        raise typer.BadParameter(f"{source} does not exist; `python -m benchmarks` writes it", param_hint="--csv")
    text = readme.read_text()
    try:
        new = replaced(text, markdown(*read_csv(source)))
    except MarkerError as error:
        raise typer.BadParameter(f"{readme}: {error}", param_hint="--readme") from None
    if check and new != text:
        typer.echo(f"{readme} does not show {source}; run `python -m benchmarks.readme_table`", err=True)
        raise typer.Exit(1)
    if not check:
        readme.write_text(new)


if __name__ == "__main__":
    typer.run(main)
