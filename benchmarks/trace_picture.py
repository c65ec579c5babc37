"""`python -m benchmarks.trace_picture profile/dae_fast.sqlite docs/trace`: one training step of a trace as a picture.

Writes docs/trace-light.png and docs/trace-dark.png from our ranges in what nsys exported, or in torch.profiler's JSON.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import typer

from dae_fast.profiling import PREFIX

OURS, PARTS = "#c2410c", "#64748b"
INK = {"light": "#1f2328", "dark": "#e6edf3"}


@dataclass(frozen=True)
class Event:
    name: str
    start: float  # milliseconds
    length: float

    @property
    def end(self) -> float:
        return self.start + self.length


def nsys_events(export: Path) -> list[Event]:
    """The same of the SQLite file that `nsys stats` leaves beside its report."""
    query = """
        SELECT coalesce(range.text, named.value), range.start, range.end FROM NVTX_EVENTS range
        JOIN NVTX_EVENTS domain ON domain.eventType = 75 AND domain.domainId = range.domainId
        LEFT JOIN StringIds named ON named.id = range.textId
        WHERE range.eventType = 59 AND range.end IS NOT NULL AND domain.text = 'dae_fast'
    """
    with closing(sqlite3.connect(export)) as database:
        rows = database.execute(query).fetchall()
    found = [Event(name, start / 1e6, (end - start) / 1e6) for name, start, end in rows]
    return sorted(found, key=lambda e: (e.start, -e.length))


def our_events(trace: dict[str, list[dict]]) -> list[Event]:
    """In the order of their starts, outer ones first."""
    found = [
        Event(e["name"].removeprefix(PREFIX), e["ts"] / 1e3, e["dur"] / 1e3)
        for e in trace["traceEvents"]
        if e.get("ph") == "X" and e["name"].startswith(PREFIX) and e.get("cat") == "user_annotation"
    ]
    return sorted(found, key=lambda e: (e.start, -e.length))


def median_step(events: Sequence[Event]) -> list[Event]:
    """The step of median length, with what lies in it; times from its start."""
    steps = sorted((e for e in events if e.name == "step"), key=lambda e: e.length)
    step = steps[len(steps) // 2]
    inside = (e for e in events if step.start <= e.start and e.end <= step.end)
    return [Event(e.name, e.start - step.start, e.length) for e in inside]


def depths(events: Sequence[Event]) -> list[int]:
    """How many of the others each lies in."""
    return [sum(o.start <= e.start and e.end <= o.end for o in events if o is not e) for e in events]


def draw(events: Sequence[Event], path: Path, ink: str) -> None:
    """What lies in what, downwards; our ops are too short for a name inside, and have theirs below."""
    bottom = max(depths(events)) + 1
    figure, axis = plt.subplots(figsize=(9, 2.9))
    lines = sum(" " in event.name for event in events)  # ours: a name with a shape
    named = 0
    for event, depth in zip(events, depths(events), strict=True):
        ours = " " in event.name
        middle = event.start + event.length / 2
        axis.barh(depth, event.length, left=event.start, height=0.8, color=OURS if ours else PARTS)
        if ours:
            text = f" {event.name}: {1e3 * event.length:.0f} us"
            height = bottom + 0.6 * (lines - 1 - named)  # the first lowest: its line crosses no later name
            axis.plot((middle, middle), (depth + 0.4, height + 0.2), color=OURS, linewidth=1)
            axis.text(middle, height, text, va="center", color=ink, fontsize=9)
            named += 1
        else:
            axis.text(middle, depth, event.name, ha="center", va="center", color="white", fontsize=9)
    axis.set_xlim(0, events[0].length)
    axis.set_ylim(bottom + 0.6 * lines, -0.5)
    axis.set_yticks([])
    axis.tick_params(colors=ink, labelsize=8)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(ink)
    axis.set_xlabel("ms from the start of the step", color=ink, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, transparent=True)
    plt.close(figure)


def main(trace: Path, out: Path) -> None:
    """Draw one step of TRACE, to OUT-light.png and OUT-dark.png."""
    matplotlib.use("Agg")
    read = nsys_events if trace.suffix == ".sqlite" else lambda path: our_events(json.loads(path.read_text()))
    events = median_step(read(trace))
    for mode, ink in INK.items():
        draw(events, out.with_name(f"{out.name}-{mode}.png"), ink)


if __name__ == "__main__":
    typer.run(main)
