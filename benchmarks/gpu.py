"""`python -m benchmarks.gpu`: the suite on the GPU, both backends beside each other, as far as the time goes.

Needs torch alone; the picture is left out, and said to be, where matplotlib is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from . import memory, suite
from .environment import RESULTS, backends_on, environment, results_name
from .peers import COMPILE, EAGER
from .report import Environment, Group, Row, by_setting, described, write_csv
from .suite import MAIN, Measurement

BUDGET_S = 0.3  # of a setting
LARGE = (256, 16, 128, 128)  # beyond the cache in every type: 128 MiB in bf16
COLOURS = {EAGER: "#8b949e", COMPILE: "#e08a1e", "native": "#2f81f7", "triton": "#8957e5"}


def plan(device: torch.device) -> list[Measurement]:
    """The main ops on large tensors, then the quick suite, the main ops from the largest down, and all the rest."""
    ours = tuple(name for name in backends_on(device) if name != "reference")

    def with_ours(measurement: Measurement) -> Measurement:
        return Measurement(measurement.setting, tuple(dict.fromkeys((*measurement.peers, *ours))))

    def lateness(measurement: Measurement) -> tuple[bool, bool, int]:
        setting = measurement.setting
        return setting.case.name not in MAIN, setting.mode == "with all gradients", -setting.sample_bytes

    main = [case for case in suite.CASES if case.name in MAIN]
    large = suite.settings(main, (LARGE,), suite.DTYPES, device, gradients=False)
    first = [*(Measurement(setting, (EAGER, COMPILE)) for setting in large), *suite.quick(device)]
    done = {m.setting for m in first}
    rest = sorted((m for m in suite.full(device) if m.setting not in done), key=lateness)
    return [with_ours(m) for m in (*first, *rest)]


def measure(found: Sequence[Measurement], seconds: float, path: Path, here: Environment) -> tuple[list[Row], list[str]]:
    """What could be measured, written as it comes, and what went wrong."""
    deadline = time.monotonic() + seconds
    rows: list[Row] = []
    errors: list[str] = []
    for number, (setting, names) in enumerate(found):
        if time.monotonic() > deadline:
            print(f"not measured: {len(found) - number} of {len(found)} settings, for want of time")
            break
        try:
            made = suite.run(setting, names, budget_s=BUDGET_S)
        except Exception as error:  # one setting must not cost the others; it fails the run in the end
            errors.append(f"{setting}: {type(error).__name__}: {error}")
            print(errors[-1], flush=True)
            continue
        errors += [row.error for row in made if row.error]
        rows += made
        write_csv(path, rows, here)
        print(f"{setting}: {', '.join(map(described_row, made))}", flush=True)
    return rows, errors


def described_row(row: Row) -> str:
    if row.median_ms is None:
        return f"{row.peer} WRONG"
    share = f" ({row.copy_share:.0%} of copy)" if row.copy_share else ""
    return f"{row.peer} {row.median_ms:.4g} ms{share}"


def draw(rows: Sequence[Row], here: Environment, path: Path) -> None:
    """The share of the copy bandwidth that each peer reaches in the main ops, at the largest tensors of a dtype."""
    from matplotlib.figure import Figure

    panels = list(largest(rows))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (title, groups) in zip(axes, panels, strict=True):
        for k, name in enumerate(COLOURS):
            share = [(g[name].copy_share or 0.0) if name in g else 0.0 for g in groups.values()]
            places = [place + (k - 1.5) * 0.2 for place in range(len(groups))]
            bars = ax.barh(places, share, 0.2, color=COLOURS[name], label=name)
            ax.bar_label(bars, [f"{s:.0%}" if s else "" for s in share], fontsize=6.5, padding=2)
        ax.axvline(0.9, color="#24292f", linewidth=0.8, linestyle="--")
        ax.set_yticks(range(len(groups)), list(groups))
        ax.set(title=title, xlabel="of the copy bandwidth, counting the least bytes; dashed: 90 %")
    axes[0].invert_yaxis()
    axes[-1].legend(frameon=False)
    figure.suptitle(described(here), fontsize=7)
    figure.savefig(path, facecolor="white")


def largest(rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, Group]]]:
    """For each dtype of the quick suite and the next: (title, case -> rows by peer)."""
    main = [row for row in rows if row.case in MAIN and row.mode != "with all gradients" and row.copy_share]
    for dtype in dict.fromkeys(row.dtype for row in main):
        shape = max((row for row in main if row.dtype == dtype), key=lambda row: row.values).shape
        groups = by_setting(row for row in main if (row.dtype, row.shape) == (dtype, shape))
        yield f"{shape} {dtype}", {case: group for (case, *_), group in groups.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no setting is begun")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to fill; benchmarks/results by default")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    device = torch.device("cuda")
    path, here = options.out / f"{results_name(device)}.csv", environment(device)
    memory.warm_up(device)
    rows, errors = measure(plan(device), options.seconds, path, here)
    for error in errors:
        print(error)
    if not rows:
        print("nothing was measured")
        return 1
    picture = path.with_name(f"{path.stem}-copy-share.svg")
    try:
        draw(rows, here, picture)
    except (ImportError, ValueError) as error:  # without matplotlib; without a row of the main ops
        print(f"left out: {picture.name}: {error}")
    settings = len({row.setting for row in rows})
    print(f"{settings} settings in {path}, {len(errors)} errors")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
