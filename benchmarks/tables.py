"""The tables on the terminal: what was measured, and how two runs differ. Losses are coloured like wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from .peers import CLONE, COMPILE, COPY_INTO, EAGER, RANDN
from .report import Environment, Group, Row, by_setting, described, ratio

# Nearer to 1 than this a ratio is called a draw.
DRAW = 0.05
_BASELINES = (CLONE, COPY_INTO, RANDN)


def summary(rows: Sequence[Row], environment: Environment) -> Table:
    """One line per setting: torch's two, ours, and what ours is times the others."""
    ours = environment["backend"]
    result = _table(
        "milliseconds: median ± half the interquartile range; x: times as fast as; bytes: moved, against the least",
        environment,
    )
    for name in ("case", "shape", "dtype"):
        result.add_column(name, no_wrap=True)
    for name in (EAGER, COMPILE, ours, "x eager", "x compile", "bytes", "copy", "Gval/s", "launches", "peak"):
        result.add_column(name, justify="right", no_wrap=name == ours)
    result.add_column("x others")
    previous_mode = None
    for (case, mode, shape, dtype), group in by_setting(rows).items():
        if mode != previous_mode:
            result.add_section()
            result.add_row(Text(mode, style="italic"))
            previous_mode = mode
        others = [name for name in group if name not in (EAGER, COMPILE, ours, *_BASELINES)]
        result.add_row(
            case,
            shape,
            dtype,
            *(_milliseconds(group.get(name)) for name in (EAGER, COMPILE, ours)),
            *(_coloured(ratio(group, name, ours)) for name in (EAGER, COMPILE)),
            *_facts(group.get(ours)),
            Text(", ").join(_other(group, name, ours) for name in others),
        )
    return result


def detail(rows: Sequence[Row], environment: Environment) -> Table:
    """One line per peer. The ratios are of ours to that peer: above 1 we are faster."""
    ours = environment["backend"]
    result = _table("milliseconds: median ± half the interquartile range", environment)
    result.add_column("peer", no_wrap=True)
    for name in ("ms", f"{ours} is x", "bytes", "copy", "Gval/s", "launches", "peak"):
        result.add_column(name, justify="right")
    for setting, group in by_setting(rows).items():
        result.add_section()
        result.add_row(Text(" ".join((setting[0], *setting[2:], setting[1])), style="italic"))
        for name, row in group.items():
            result.add_row(f"  {name}", _milliseconds(row), _coloured(ratio(group, name, ours)), *_facts(row))
    return result


@dataclass(frozen=True)
class Change:
    """One peer in one setting, in two runs."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """Above 1: slower than before."""
        return _median(self.after) / _median(self.before)

    @property
    def beyond_spread(self) -> bool:
        """The quartiles do not overlap, and the medians differ by more than a draw."""
        (low, high), (was_low, was_high) = _quartiles(self.after), _quartiles(self.before)
        return (low > was_high or high < was_low) and abs(self.ratio - 1) > DRAW


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Of every peer that both runs timed, the worst first."""
    known = {(*row.setting, row.peer): row for row in before if row.median_ms}
    pairs = [Change(known[key], row) for row in after if row.median_ms and (key := (*row.setting, row.peer)) in known]
    return sorted(pairs, key=lambda change: -change.ratio)


def comparison(found: Sequence[Change], before: Environment, after: Environment) -> Table:
    """What changed beyond the spreads. The last column is how much eager torch moved in the same setting."""
    eager = {change.after.setting: change.ratio for change in found if change.after.peer == EAGER}
    result = Table(
        title="milliseconds; times the old time: above 1 is slower",
        caption=f"before: {described(before)}\nafter: {described(after)}",
        header_style="bold",
    )
    for name in ("case", "mode", "shape", "dtype", "peer"):
        result.add_column(name, no_wrap=name == "case")
    for name in ("before", "after", "times", "eager's times"):
        result.add_column(name, justify="right")
    for change in found:
        if change.beyond_spread:
            style = "bold red" if change.ratio > 1 else "bold green"
            machine = eager.get(change.after.setting)
            result.add_row(
                *change.after.setting,
                change.after.peer,
                _milliseconds(change.before),
                _milliseconds(change.after),
                Text(f"{change.ratio:.2f}", style=style),
                f"{machine:.2f}" if machine else "",
            )
    return result


def _table(title: str, environment: Environment) -> Table:
    caption = f"{described(environment)}; copy: share of the copy bandwidth; peak: of memory, in sample tensors"
    return Table(title=title, caption=caption, header_style="bold")


def _median(row: Row) -> float:
    assert row.median_ms is not None
    return row.median_ms


def _quartiles(row: Row) -> tuple[float, float]:
    assert row.q1_ms is not None and row.q3_ms is not None
    return row.q1_ms, row.q3_ms


def _milliseconds(row: Row | None) -> Text:
    if row is None:
        return Text("")
    if row.median_ms is None:
        return Text("wrong", style="bold red")
    low, high = _quartiles(row)
    return Text(f"{row.median_ms:.3g} ±{(high - low) / 2 / row.median_ms:.0%}")


def _facts(row: Row | None) -> list[str]:
    if row is None or row.median_ms is None:
        return [""] * 5
    peak = row.peak_bytes is not None and row.sample_bytes and row.peak_bytes / row.sample_bytes
    return [
        f"{row.passes:.1f}" if row.passes else "",
        f"{row.copy_share:.0%}" if row.copy_share else "",
        f"{row.values_per_s / 1e9:.3g}" if row.values_per_s else "",
        "" if row.launches is None else str(row.launches),
        f"{peak:.1f}" if peak else "",
    ]


def _coloured(value: float | None) -> Text:
    if value is None:
        return Text("")
    style = "bold green" if value > 1 + DRAW else "bold red" if value < 1 - DRAW else "bold yellow"
    return Text(f"{value:.2f}", style=style)


def _other(group: Group, name: str, ours: str) -> Text:
    if group[name].error:
        return Text.assemble(f"{name} ", ("wrong", "bold red"))
    return Text.assemble(f"{name} ", _coloured(ratio(group, name, ours)))
