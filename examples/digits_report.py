"""The picture, the table and the verdict of train_digits.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import SubFigure

AGREEMENT = 1e-4  # relative, of the loss, at every step; other noise makes it 1e-2
INK, MUTED, BLUE, ORANGE = "#222222", "#9a9a9a", "#1f5fa8", "#e07b1a"


@dataclass
class Judgement:
    confidence: float
    spread: float


@dataclass
class Results:
    curves: dict[str, Tensor]  # (2, steps) loss and noise-MSE: "fused", "plain", "same noise"
    seconds: dict[str, Tensor]  # of a step, one reading for each block
    network_mse: float
    linear_mse: float
    judgements: dict[str, Judgement]

    def difference(self, name: str) -> Tensor:
        """Of a plain loss curve from the fused one, relative, step by step."""
        fused = self.curves["fused"][0]
        return (self.curves[name][0] - fused).abs() / fused

    @property
    def speedup(self) -> float:
        """Median over the blocks, each fused block against the plain one that ran next to it."""
        return (self.seconds["plain"] / self.seconds["fused"]).median().item()


def failures(results: Results, *, trained: bool) -> list[str]:
    """What should hold and does not; `trained`: long enough to be held to the linear denoiser."""
    problems = []
    worst = results.difference("same noise").max().item()
    if not worst <= AGREEMENT:
        problems.append(f"on the same noise the two loss curves differ by {worst:.1e}, more than {AGREEMENT:.0e}")
    if trained and not results.network_mse < results.linear_mse:
        problems.append(
            f"test noise-MSE {results.network_mse:.4f} is not below the linear denoiser's {results.linear_mse:.4f}"
        )
    return problems


def print_table(results: Results) -> None:
    steps = results.curves["fused"].shape[1]
    rate = {name: _quartiles(1 / each) for name, each in results.seconds.items()}
    table = Table(
        title="dae_fast on 8x8 digits", caption="timed in alternating blocks of steps; plain draws its own noise"
    )
    for column in ("", "fused", "plain PyTorch"):
        table.add_column(column)
    fused, plain = ("{1:.0f} ({0:.0f} to {2:.0f})".format(*rate[name]) for name in ("fused", "plain"))
    table.add_row("steps per second, median (quartiles)", fused, plain)
    table.add_row(
        f"seconds for {steps} steps at that rate", *(f"{steps / rate[name][1]:.1f}" for name in ("fused", "plain"))
    )
    table.add_row("speed-up of the step", f"{results.speedup:.2f}x", "1")
    last = {name: curve[0, -100:].mean().item() for name, curve in results.curves.items()}
    table.add_row("last 100 losses, same noise", f"{last['fused']:.6f}", f"{last['same noise']:.6f}")
    table.add_section()
    same, own = (results.difference(name) for name in ("same noise", "plain"))
    table.add_row("[b]loss curves, relative difference", "[b]same noise", "[b]noise of its own")
    table.add_row("first 10 steps, largest", f"{same[:10].max():.1e}", f"{own[:10].max():.1e}")
    table.add_row("all steps, largest", f"{same.max():.1e}", f"{own.max():.1e}")
    table.add_section()
    table.add_row("[b]held-out images", "[b]network", "[b]best linear denoiser")
    table.add_row("noise-MSE over all levels", f"{results.network_mse:.4f}", f"{results.linear_mse:.4f}")
    table.add_section()
    table.add_row("[b]a classifier of real digits on", "[b]confidence", "[b]classes, exp(entropy)")
    for name, judgement in results.judgements.items():
        table.add_row(name, f"{judgement.confidence:.1%}", f"{judgement.spread:.1f} of 10")
    Console().print(table)


def _quartiles(values: Tensor) -> list[float]:
    return values.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def draw_figure(
    out: Path, results: Results, clean: Tensor, pairs: dict[int, tuple[Tensor, Tensor]], ddim: Tensor, langevin: Tensor
) -> None:
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 8), layout="constrained")
    rows = np.asarray(figure.subfigures(3, 1, height_ratios=(1, 0.54, 0.42)))
    curve_axis, difference_axis = rows[0].subplots(1, 2)
    _curves(curve_axis, results)
    _differences(difference_axis, results)
    _pairs(rows[1], clean, pairs)
    left, right = rows[2].subplots(1, 2)
    _gallery(left, ddim, "Samples: DDIM, 100 steps")
    _gallery(right, langevin, "Samples: annealed Langevin")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def draw_strip(folder: Path, noisy: Tensor, denoised: Tensor, samples: Tensor) -> None:
    """digits-light.png and digits-dark.png: ink on a transparent ground, for a page of either colour."""
    rows = {"noised": noisy, "denoised in one look": denoised, "drawn from noise": samples}
    for theme, ink in (("light", "#1f2328"), ("dark", "#e6edf3")):
        figure, axes = plt.subplots(len(rows), 1, figsize=(7.2, 1.5), layout="constrained")
        tones = LinearSegmentedColormap.from_list("ink", [(*to_rgb(ink), 0.0), (*to_rgb(ink), 1.0)])
        for axis, (name, images) in zip(axes, rows.items(), strict=True):
            axis.imshow(_tiles(images[:20], 20), cmap=tones, vmin=-1, vmax=1)
            axis.axis("off")
            axis.text(-2, 5, name, ha="right", va="center", color=ink, fontsize=8)
        figure.savefig(folder / f"digits-{theme}.png", dpi=110, transparent=True)
        plt.close(figure)


def _curves(axis: Axes, results: Results) -> None:
    curves = {name: curve[1] for name, curve in results.curves.items()}
    axis.semilogy(curves["plain"], color=MUTED, lw=0.7, label="plain PyTorch, noise of its own")
    axis.semilogy(curves["fused"], color=BLUE, lw=2.2, label="fused")
    axis.semilogy(curves["same noise"], color=ORANGE, lw=0.9, ls=(0, (4, 4)), label="plain PyTorch, same noise")
    axis.axhline(results.linear_mse, color=INK, lw=0.8, ls=":", label="best linear denoiser, held-out images")
    axis.plot(
        len(curves["fused"]) - 1, results.network_mse, "o", color=BLUE, ms=5, label="trained network, held-out images"
    )
    axis.set(title="Training: noise-MSE", xlabel="step")
    ticks = [0.1, 0.12, 0.15, 0.2, 0.3]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False)


def _differences(axis: Axes, results: Results) -> None:
    axis.semilogy(results.difference("plain"), color=MUTED, lw=0.7, label="plain PyTorch, noise of its own")
    axis.semilogy(
        results.difference("same noise").clamp(min=1e-9), color=ORANGE, lw=0.9, label="plain PyTorch, same noise"
    )
    axis.axhline(2**-24, color=INK, lw=0.8, ls=":", label="one rounding of fp32")
    axis.set(title="Loss: relative difference from the fused curve", xlabel="step", ylim=(1e-9, 10))
    axis.legend(frameon=False, loc="upper right", ncols=2)


def _pairs(panel: SubFigure, clean: Tensor, pairs: dict[int, tuple[Tensor, Tensor]]) -> None:
    panel.suptitle("Held-out images: clean, noised, denoised in one evaluation", fontsize=11)
    for axis, (t, (noisy, denoised)) in zip(panel.subplots(1, len(pairs)), pairs.items(), strict=True):
        _show(axis, _tiles(torch.cat((clean, noisy, denoised)), len(clean)))
        axis.set_title(f"level t = {t}")


def _gallery(axis: Axes, images: Tensor, title: str) -> None:
    _show(axis, _tiles(images[:64], 16))
    axis.set_title(title, fontsize=11)


def _show(axis: Axes, image: Tensor) -> None:
    axis.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
    axis.axis("off")


def _tiles(images: Tensor, columns: int) -> Tensor:
    """(N, 64) laid out in rows of `columns`, with a margin of one white pixel."""
    squares = torch.nn.functional.pad(images.reshape(-1, columns, 8, 8), (1, 1, 1, 1), value=-1.0)
    return squares.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
