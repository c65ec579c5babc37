"""`python -m benchmarks.readme_table`: the README's tables and pictures, from the CSV files alone.

With --check nothing is written, and the command fails if README.md, the pictures and the CSV files differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from . import pictures
from .environment import RESULTS, ROOT, results_name
from .peers import CLONE, COMPILE, COPY_INTO, EAGER, RANDN
from .report import Environment, Group, Row, by_setting, described, ratio, read_csv
from .suite import FLAT, LATENT, MAIN

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
SHOWN = "float32"  # the other dtypes and shapes are in the CSV
SHAPES = tuple("x".join(map(str, shape)) for shape in (FLAT, LATENT))
COLUMNS = (
    "op",
    "shape",
    "eager ms",
    "torch.compile ms",
    "dae_fast ms",
    "times eager",
    "times torch.compile",
    "times others",
    "of copy bandwidth",
)


class MarkerError(ValueError):
    """The file does not have the two markers, once each and in order."""


def markdown(rows: Sequence[Row], environment: Environment) -> str:
    ours = environment["backend"]
    lines = [
        *_picture(environment, "bars"),
        "",
        f"{described(environment)}. Medians of one run in which all took turns.",
        "",
        "<details><summary>The table, every op, and what limits them</summary>",
        "",
        "Medians, float32; losses with the gradient of the prediction.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' --- |' * 2}{' ---: |' * (len(COLUMNS) - 2)}",
    ]
    for (case, mode, shape, dtype), group in by_setting(rows).items():
        if case in MAIN and shape in SHAPES and dtype == SHOWN and mode in ("forward", "loss and gradient"):
            row = group.get(ours)
            cells = [
                case,
                shape,
                *(_milliseconds(group.get(name)) for name in (EAGER, COMPILE, ours)),
                *(_times(ratio(group, name, ours)) for name in (EAGER, COMPILE)),
                _others(group, ours),
                f"{row.copy_share:.0%}" if row and row.copy_share else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for name in pictures.PICTURES:
        if name != "bars":
            lines += ["", f"{pictures.PICTURES[name][2]}:", "", *_picture(environment, name)]
    return "\n".join([*lines, "", "</details>"])


def gpu_markdown(rows: Sequence[Row], environment: Environment) -> str:
    """Every setting of a GPU's file: what eager, torch.compile and each backend take, and their shares of a copy."""
    peers = {EAGER: "eager", COMPILE: "torch.compile", "native": "CUDA", "triton": "Triton"}
    lines = [
        "{device}, torch {torch}, Python {python}; {date}. Medians in ms, and the share of the copy bandwidth.".format(
            **environment
        ),
        "",
        f"| op | shape | type | {' | '.join(peers.values())} | times eager | times torch.compile |",
        f"|{' --- |' * 3}{' ---: |' * (len(peers) + 2)}",
    ]
    for (case, _, shape, dtype), group in by_setting(rows).items():
        cells = [case, shape, dtype, *(_with_share(group.get(name)) for name in peers)]
        cells += [_times(ratio(group, name, "native")) for name in (EAGER, COMPILE)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replaced(text: str, block: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `block` between its markers."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise MarkerError(f"the file must have {begin} and, after it, {end}, once each")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{block}\n{end}{after}"


def renewed(text: str, source: Path) -> str:
    """`text` with what `source` says and, where it has the markers, what the GPUs' files beside it say."""
    new = replaced(text, markdown(*read_csv(source)))
    if GPU_BEGIN not in text:
        return new
    tables = [gpu_markdown(*read_csv(path)) for path in sorted(source.parent.glob("cuda-*.csv"))]
    return replaced(new, "\n\n".join(tables), GPU_BEGIN, GPU_END)


def outdated(source: Path) -> list[Path]:
    """The pictures of a CSV that are missing or show other data."""
    digest = pictures.Results(source).digest
    expected = [pictures.picture_file(source, n, theme) for n in pictures.PICTURES for theme in pictures.THEMES]
    return [path for path in expected if not path.exists() or pictures.shown_digest(path) != digest]


def _picture(environment: Environment, name: str) -> list[str]:
    stem = Path("benchmarks/results") / f"{environment['results']}.csv"
    light, dark = (pictures.picture_file(stem, name, theme).as_posix() for theme in pictures.THEMES)
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">',
        f'  <img alt="{pictures.PICTURES[name][2]}" src="{light}">',
        "</picture>",
    ]


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    return "wrong" if row.median_ms is None else f"{row.median_ms:.3g}"


def _with_share(row: Row | None) -> str:
    share = f" ({row.copy_share:.0%})" if row and row.copy_share else ""
    return _milliseconds(row) + share


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _others(group: Group, ours: str) -> str:
    """Libraries alone: the reference is ours, the copies and draws are no op."""
    known = (EAGER, COMPILE, CLONE, COPY_INTO, RANDN, "reference", "native", "cuda", "triton")
    found = ((name, ratio(group, name, ours)) for name in group if name not in known)
    return ", ".join(f"{name} {_times(times) or 'wrong'}" for name, times in found)


def main(
    source: Annotated[Path | None, typer.Option("--csv", help="Default: this device's file in results/.")] = None,
    readme: Annotated[Path, typer.Option(help="The file with the markers.")] = ROOT / "README.md",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if anything is out of date.")] = False,
) -> None:
    """Put the benchmark table of a CSV into a Markdown file, and draw the pictures beside the CSV."""
    source = source or RESULTS / f"{results_name()}.csv"
    for needed, writer in ((source, "dae_fast bench"), (pictures.growth_file(source), "benchmarks.growth")):
        if not needed.exists():
            raise typer.BadParameter(f"{needed} does not exist; `python -m {writer}` writes it", param_hint="--csv")
    text = readme.read_text()
    try:
        new = renewed(text, source)
    except MarkerError as error:
        raise typer.BadParameter(f"{readme}: {error}", param_hint="--readme") from None
    if check:
        old = [*([readme] if new != text else []), *outdated(source)]
        for path in old:
            typer.echo(f"{path} does not show {source}; run `python -m benchmarks.readme_table`", err=True)
        raise typer.Exit(1 if old else 0)
    readme.write_text(new)
    pictures.draw_all(source)


if __name__ == "__main__":
    typer.run(main)
