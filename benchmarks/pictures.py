"""The pictures of the README, from the CSV files alone; each for a light and for a dark page.

A picture says in its metadata which data it shows (`digest`), so that a test can tell whether it is of the
committed files without drawing it with the same matplotlib.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from .growth import CHAIN, FIXED_CHAINS, FIXED_STEPS, OURS_COMPILED, Point, fit
from .peers import CLONE, COMPILE, COPY_INTO, EAGER
from .report import Group, Row, by_setting, described, ratio, read_csv
from .suite import FLAT, LATENT, MAIN

THEMES = ("light", "dark")
_INK = {"light": "#24292f", "dark": "#d1d7e0"}
_GRID = {"light": "#d8dee4", "dark": "#3d444d"}
# Read on white and on near black alike.
_EAGER, _COMPILE, _OURS, _LOSS, _COMPILED_OURS = "#8b949e", "#e08a1e", "#2f81f7", "#e5484d", "#8957e5"
_NAMES = {"flat": "x".join(map(str, FLAT)), "latent": "x".join(map(str, LATENT))}

Draw = Callable[[Figure, Any], None]


class Results:
    """The suite's rows and the growth points of one device."""

    def __init__(self, source: Path) -> None:
        self.files = [source, growth_file(source)]
        self.rows, self.environment = read_csv(source)
        self.points, self.growth_environment = read_csv(growth_file(source), Point)
        self.groups = by_setting(self.rows)
        self.ours = self.environment["backend"]

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(b"".join(file.read_bytes() for file in self.files)).hexdigest()

    def of(self, shape: str, mode: str | None = None, dtype: str = "float32") -> Iterator[tuple[str, Group]]:
        """(case, its rows); without a mode what a step does: losses with the gradient of the prediction."""
        modes = ("forward", "loss and gradient") if mode is None else (mode,)
        for (case, of_mode, of_shape, of_dtype), group in self.groups.items():
            if (of_shape, of_dtype) == (shape, dtype) and of_mode in modes:
                yield case, group


def growth_file(source: Path) -> Path:
    return source.with_name(f"{source.stem}-growth.csv")


def picture_file(source: Path, name: str, theme: str) -> Path:
    return source.with_name(f"{source.stem}-{name}-{theme}.svg")


def draw_all(source: Path) -> list[Path]:
    """Every picture beside its CSV."""
    results, written = Results(source), []
    for name, (draw, size, _) in PICTURES.items():
        for theme in THEMES:
            path = picture_file(source, name, theme)
            _draw(results, draw, size, theme, path)
            written.append(path)
    return written


def shown_digest(picture: Path) -> str:
    """Which data the picture says that it shows."""
    _, found, rest = picture.read_text().partition("data sha256:")
    return f"sha256:{rest[:64]}" if found else ""


def _draw(results: Results, draw: Draw, size: tuple[float, float], theme: str, path: Path) -> None:
    ink, grid = _INK[theme], _GRID[theme]
    style = {
        "svg.hashsalt": "dae_fast",  # the same bytes from every run
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "axes.grid": True,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, results)
        where = results.growth_environment if draw in (_memory, _growth) else results.environment
        figure.text(0.0, -0.005, described(where), fontsize=6.5, va="top", alpha=0.8)
        metadata = {"Date": None, "Description": f"data {results.digest}"}
        figure.savefig(path, transparent=True, metadata=metadata, bbox_inches="tight")


# What the first screen shows.
FIVE = {
    "add_noise-fresh": "add_noise, noise made inside",
    "langevin_step-fresh": "langevin_step, noise made inside",
    "noise_mse-fresh": "noise_mse and its gradient, noise made again",
    "to_x0-eps": "to_x0",
    "add_noise-tensor": "add_noise on a tensor of noise",
}


def _bars(figure: Figure, results: Results) -> None:
    """Five bars against eager; beside each what it is against torch.compile."""
    ax = figure.subplots()
    groups = dict(results.of(_NAMES["latent"]))
    for y, (case, label) in enumerate(FIVE.items()):
        over_eager, over_compile = (ratio(groups[case], peer, results.ours) for peer in (EAGER, COMPILE))
        assert over_eager is not None and over_compile is not None
        ax.barh(y, over_eager, 0.62, color=_colour(over_eager))
        ax.text(over_eager + 0.1, y, f"{over_eager:.1f}×  ({over_compile:.1f}× torch.compile)", va="center", fontsize=9)
        ax.text(-0.1, y, label, va="center", ha="right", fontsize=9)
    ax.axvline(1, color=mpl.rcParams["axes.edgecolor"], linewidth=1)
    ax.set(xlim=(0, 1.45 * ax.get_xlim()[1]), ylim=(len(FIVE) - 0.5, -0.5), yticks=[])
    ax.set_xlabel(f"times as fast as eager PyTorch, {_NAMES['latent']} float32")
    ax.grid(axis="y", visible=False)


def _colour(times: float) -> str:
    """Of a bar; what reads 1.0 is neither won nor lost."""
    return _EAGER if f"{times:.1f}" == "1.0" else (_OURS if times > 1 else _LOSS)


def _speedup(figure: Figure, results: Results) -> None:
    """Bars of ours against eager and torch.compile: what we lose is as plain to see as what we win."""
    panels = (
        (f"{_NAMES['latent']}", None, _NAMES["latent"]),
        (f"{_NAMES['flat']}", None, _NAMES["flat"]),
        (f"{_NAMES['flat']}, with the gradients of all inputs", "with all gradients", _NAMES["flat"]),
    )
    cases = list(dict.fromkeys(case for _, mode, shape in panels for case, _ in results.of(shape, mode)))
    height = 0.38
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (title, mode, shape) in zip(axes, panels, strict=True):
        for case, group in results.of(shape, mode):
            for offset, over, alpha in ((-height / 2, EAGER, 1.0), (height / 2, COMPILE, 0.45)):
                times = ratio(group, over, results.ours)
                if times is None:
                    continue
                y, colour = cases.index(case) + offset, _colour(times)
                ax.barh(y, times - 1, height, left=1, color=colour, alpha=alpha)
                ax.text(max(times, 1) * 1.06, y, f"{times:.1f}", va="center", fontsize=6.5)
        ax.set_xscale("log")
        ax.set_xlim(left=min(0.4, ax.get_xlim()[0]), right=2 * ax.get_xlim()[1])  # room for the last number
        ax.axvline(1, color=mpl.rcParams["axes.edgecolor"], linewidth=1)
        ax.set_title(title)
        ax.set_xticks([0.5, 1, 2, 5, 10, 50], ["½", "1", "2", "5", "10", "50"])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(cases)), cases)
    axes[0].set_ylim(len(cases) - 0.4, -0.6)
    keys = [Patch(color=_OURS, label="faster than eager"), Patch(color=_OURS, alpha=0.45, label="than torch.compile")]
    keys += [Patch(color=_LOSS, label="slower than eager"), Patch(color=_LOSS, alpha=0.45, label="than torch.compile")]
    keys += [Patch(color=_EAGER, label="1.0: as fast")]
    figure.legend(handles=keys, loc="outside upper center", ncols=5)
    figure.supxlabel("times as fast, float32")


def _roofline(figure: Figure, results: Results) -> None:
    """Values a second over the bytes moved for each, against what copying and drawing noise allow."""
    ax = figure.subplots()
    groups = [(case, group) for case, group in results.of(_NAMES["latent"]) if case in MAIN]
    copies = [group[name] for _, group in groups for name in (CLONE, COPY_INTO)]
    bandwidth = max(row.gigabytes_per_s or 0 for row in copies) * 1e9
    x = [1.5, 120]
    ax.plot(x, [bandwidth / bytes_ for bytes_ in x], color=_OURS, linewidth=1.2)
    ax.annotate(
        f"copying: {bandwidth / 1e9:.0f} GB/s", (40, bandwidth / 40), rotation=-35, color=_OURS, xytext=(4, 4),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    normal = dict(results.of(_NAMES["latent"]))["normal-fresh"]
    for peer, colour, label in ((results.ours, _OURS, "our noise alone"), (EAGER, _EAGER, "torch.randn_like alone")):
        rate = normal[peer].values_per_s
        assert rate is not None
        ax.axhline(rate, color=colour, linewidth=1, linestyle="--")
        ax.annotate(
            f"{label}: {rate / 1e9:.2g} G/s", (1.6, rate), xytext=(0, 3), textcoords="offset points", fontsize=8
        )
    for number, (_, group) in enumerate(groups, 1):
        for peer, colour in ((EAGER, _EAGER), (COMPILE, _COMPILE), (results.ours, _OURS)):
            row = group.get(peer)
            if row and row.moved_bytes and row.values_per_s:
                point = row.moved_bytes / row.values, row.values_per_s
                ax.plot(*point, "o", color=colour, markersize=11)
                ax.annotate(str(number), point, ha="center", va="center", fontsize=7, color="white", weight="bold")
    ax.set(xscale="log", yscale="log", xlim=x, xlabel="bytes moved per value", ylabel="values per second")
    ax.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    ax.xaxis.set_minor_locator(NullLocator())
    keys = [Patch(color=c, label=name) for c, name in ((_EAGER, EAGER), (_COMPILE, COMPILE), (_OURS, "dae_fast"))]
    keys += [Patch(alpha=0, label=f"{number}  {case}") for number, (case, _) in enumerate(groups, 1)]
    ax.legend(handles=keys, loc="upper left", bbox_to_anchor=(1, 1), handlelength=1)
    ax.set_title(f"Main ops at {_NAMES['latent']}, float32")


def _size(figure: Figure, results: Results) -> None:
    """Time over the number of values, from tiny to large, and the line through ours."""
    axes = figure.subplots(2, 4, sharex=True, sharey=True)
    for ax, case in zip(axes.flat, MAIN, strict=False):
        for peer, colour, marker in ((EAGER, _EAGER, "s"), (COMPILE, _COMPILE, "^"), (results.ours, _OURS, "o")):
            rows = sorted((row for row in results.rows if _is_of_size(row, case, peer)), key=lambda row: row.values)
            values, seconds = [row.values for row in rows], [row.median_ms / 1e3 for row in rows if row.median_ms]
            ax.plot(values, seconds, marker, color=colour, markersize=4, label=peer, linestyle="-", linewidth=1)
            if peer == results.ours and len(rows) > 2:
                line = fit(values, seconds)
                ax.plot(values, [line.fixed + line.slope * v for v in values], ":", color=mpl.rcParams["text.color"])
                ax.text(
                    0.03, 0.93, f"{line.fixed * 1e6:.3g} µs + {line.slope * 1e9:.2g} ns/value", va="top",
                    transform=ax.transAxes, fontsize=8,
                )  # fmt: skip
        ax.set(xscale="log", yscale="log", title=case)
        ax.yaxis.set_major_formatter(FuncFormatter(_seconds))
        ax.yaxis.set_minor_formatter(NullFormatter())
    spare = axes.flat[-1]
    spare.axis("off")
    handles, _ = axes.flat[0].get_legend_handles_labels()
    spare.legend(handles, [EAGER, COMPILE, "dae_fast"], loc="center", title="dotted: the fitted line", fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel("values")


def _is_of_size(row: Row, case: str, peer: str) -> bool:
    shown = row.mode != "with all gradients" and row.dtype == "float32"
    return shown and row.case == case and row.peer == peer and row.median_ms is not None


def _memory(figure: Figure, results: Results) -> None:
    """What one training step allocates at its peak."""
    ax = figure.subplots()
    for peer, colour, label in _peers(results):
        points = _along(results.points, "training step", "batch", peer)
        # Two may lie on each other.
        style = {"linestyle": "--", "markersize": 3} if peer == OURS_COMPILED else {"linestyle": "-", "markersize": 6}
        peaks = [(p.peak_bytes or 0) / 2**20 for p in points]
        ax.plot([p.at for p in points], peaks, "o", color=colour, label=label, **style)
    ax.set(
        xlabel="batch of 4x64x64 float32 latents", ylabel="MiB at the peak of a step", xlim=(0, None), ylim=(0, None)
    )
    ax.set_title("Noising, one convolution, loss and backward pass")
    ax.legend()


def _growth(figure: Figure, results: Results) -> None:
    """Threads, chains and steps."""
    (threads, chains), (steps, ddim) = figure.subplots(2, 2)
    points = results.points
    styles = ("-", "--", ":")
    for style, study in zip(styles, dict.fromkeys(p.study for p in points if p.along == "threads"), strict=False):
        for peer, colour, label in _peers(results):
            along = _along(points, study, "threads", peer)
            if along:
                gain = [along[0].median_ms / p.median_ms for p in along]
                threads.plot([p.at for p in along], gain, f"o{style}", color=colour, label=f"{label}, {study}")
    most = max(p.at for p in points if p.along == "threads")
    threads.plot([1, most], [1, most], color=mpl.rcParams["axes.edgecolor"], linewidth=0.6)
    threads.set(xlabel="threads", ylabel="times as fast as with one", title="Thread scaling")
    threads.set_xticks(range(1, most + 1))
    threads.legend(fontsize=6.5)
    fixed = {
        "chains": f"chains of {CHAIN} values, {FIXED_STEPS} steps",
        "steps": f"steps of {FIXED_CHAINS}x{CHAIN} values",
    }
    for ax, study, along in ((chains, "langevin", "chains"), (steps, "langevin", "steps"), (ddim, "ddim", "steps")):
        for peer, colour, label in _peers(results):
            found = _along(points, study, along, peer)
            if found:
                at, seconds = [p.at for p in found], [p.median_ms / 1e3 for p in found]
                line = fit(at, seconds)
                each = f"{line.fixed * 1e6:.3g} µs + {line.slope * 1e6:.3g} µs each"
                ax.plot(at, seconds, "o", color=colour, label=f"{label}: {each}")
                ax.plot(at, [line.fixed + line.slope * a for a in at], ":", color=colour)
        ax.set(xscale="log", yscale="log", xlabel=fixed[along], title=f"samplers.{study}")
        ax.yaxis.set_major_formatter(FuncFormatter(_seconds))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.legend(fontsize=7.5)


def _peers(results: Results) -> tuple[tuple[str, str, str], ...]:
    """Peer, colour, label."""
    return (
        (EAGER, _EAGER, EAGER),
        (COMPILE, _COMPILE, COMPILE),
        (results.ours, _OURS, "dae_fast"),
        (OURS_COMPILED, _COMPILED_OURS, "dae_fast in torch.compile"),
    )


def _along(points: Sequence[Point], study: str, along: str, peer: str) -> list[Point]:
    return [p for p in points if (p.study, p.along, p.peer) == (study, along, peer)]


def _seconds(value: float, _: object) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value / 1e-9:g} ns"


# How it is drawn, inches, and what it is for whoever cannot see it.
PICTURES: dict[str, tuple[Draw, tuple[float, float], str]] = {
    "bars": (_bars, (8, 2.3), "How many times as fast as eager PyTorch five ops are"),
    "speedup": (_speedup, (10, 8.5), "How many times as fast as eager PyTorch and torch.compile every op is"),
    "roofline": (_roofline, (7.5, 4.2), "Values per second over bytes moved per value, against the measured limits"),
    "size": (_size, (10, 4.6), "Time of the main ops over the number of values, tiny to large"),
    "memory": (_memory, (6, 3.4), "Peak memory of a training step over the batch size"),
    "growth": (_growth, (9, 6), "Thread scaling, and the samplers over chains and steps"),
}
