"""Measurements as rows: the CSV that is kept, and the table that is read."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .peers import BACKENDS, COMPILE, EAGER, OURS, RANDN

# Nearer to 1 than this a ratio is called a draw.
DRAW = 0.05


@dataclass(frozen=True)
class Row:
    """One peer in one setting. Fields are None where they do not apply, all of them for a wrong result."""

    case: str
    mode: str
    shape: str
    dtype: str
    peer: str
    error: str = ""  # why the gate refused the peer
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    rounds: int | None = None
    calls_per_round: int | None = None
    least_bytes: int | None = None  # that must be moved between the caches and memory
    gigabytes_per_s: float | None = None  # least_bytes over the median
    copy_share: float | None = None  # of the copy bandwidth measured in the same rounds
    values_per_s: float | None = None  # elements of a sample tensor
    peak_bytes: int | None = None  # allocated in one call, results included
    tensors_allocated: int | None = None  # of at least half a sample tensor
    small_bytes_allocated: int | None = None

    @property
    def setting(self) -> tuple[str, str, str, str]:
        return self.case, self.mode, self.shape, self.dtype


_FIELDS = dataclasses.fields(Row)
_PARSERS = {"str": str, "int | None": int, "float | None": float}


def write_csv(path: Path, rows: Iterable[Row], environment: dict[str, str]) -> None:
    """Every line carries the environment: a line alone says where it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(f.name for f in _FIELDS), *environment])
        for row in rows:
            writer.writerow([*(_text(getattr(row, f.name)) for f in _FIELDS), *environment.values()])


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    names = {f.name for f in _FIELDS}
    environment = {name: value for name, value in (lines[0] if lines else {}).items() if name not in names}
    return [Row(**{f.name: _parse(str(f.type), line[f.name]) for f in _FIELDS}) for line in lines], environment


def _text(value: str | float | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _parse(kind: str, text: str) -> Any:
    return None if kind != "str" and not text else _PARSERS[kind](text)


def by_setting(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], dict[str, Row]]:
    """Rows of each setting by peer, in the order they came."""
    groups: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row.setting, {})[row.peer] = row
    return groups


def ratio(group: dict[str, Row], over: str, under: str = OURS) -> float | None:
    """How many times `under` is as fast as `over`: a ratio of medians."""
    slow, fast = (group[name].median_ms if name in group else None for name in (over, under))
    return slow / fast if slow and fast else None


def table(rows: Sequence[Row], environment: dict[str, str]) -> Table:
    """One line per setting. Wins and losses of ours are coloured alike strongly."""
    versions = (f"{name} {environment[name]}" for name in ("torch", "dae_fast", "python", "commit"))
    facts = (environment["device"], f"{environment['threads']} threads", *versions, environment["date"])
    result = Table(
        title=f"milliseconds: median ± half the interquartile range; ratios of medians to {OURS}",
        caption=", ".join(facts),
        header_style="bold",
    )
    others = [name for name in BACKENDS if name != OURS]
    for name in ("case", "shape", "dtype"):
        result.add_column(name, no_wrap=True)
    for name in (EAGER, COMPILE, *others, OURS, f"x {EAGER}", f"x {COMPILE}", "x randn", "copy share", "Gvalues/s"):
        result.add_column(name, justify="right", no_wrap=name == OURS)
    result.add_column("tensors", justify="right")
    previous_mode = None
    for (case, mode, shape, dtype), group in by_setting(rows).items():
        if mode != previous_mode:
            result.add_section()
            result.add_row(Text(mode, style="italic"))
            previous_mode = mode
        ours = group.get(OURS)
        result.add_row(
            case,
            shape,
            dtype,
            *(_milliseconds(group.get(name)) for name in (EAGER, COMPILE, *others, OURS)),
            *(_coloured(ratio(group, name)) for name in (EAGER, COMPILE, RANDN)),
            f"{ours.copy_share:.0%}" if ours and ours.copy_share else "",
            f"{ours.values_per_s / 1e9:.2f}" if ours and ours.values_per_s else "",
            str(ours.tensors_allocated) if ours and ours.tensors_allocated is not None else "",
        )
    return result


def _milliseconds(row: Row | None) -> Text:
    if row is None:
        return Text("")
    if row.median_ms is None or row.q1_ms is None or row.q3_ms is None:
        return Text("wrong", style="bold red")
    spread = (row.q3_ms - row.q1_ms) / 2 / row.median_ms
    return Text(f"{row.median_ms:.3g} ±{spread:.0%}")


def _coloured(value: float | None) -> Text:
    if value is None:
        return Text("")
    style = "green" if value > 1 + DRAW else "bold red" if value < 1 - DRAW else "yellow"
    return Text(f"{value:.2f}", style=style)
