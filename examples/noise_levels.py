"""What a denoising autoencoder learns depends on the level of the noise.

The same network is trained at six levels. A little noise asks for detail, one pixel against the next; much noise
leaves only strokes and whole shapes to go by, and the filters get coarser from level to level: their energy moves
to lower spatial frequencies (Vincent et al. 2010, section 5, saw local detectors turn into strokes). Features to
classify by are best in between (Chen et al. 2024, "Deconstructing denoising diffusion models for self-supervised
learning"): enough noise that the network must know digits, not so much that it forgets one from another.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from digits import (
    BLUE,
    MUTED,
    ORANGE,
    DenoisingLayer,
    Digits,
    denoising_loss,
    finish,
    label_draws,
    load,
    probe,
    save,
    show_filters,
    train,
)
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dae_fast as df

STEPS = 1000  # at each level
WIDTH = 144
SIGMAS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)  # of images in [-1, 1]
PER_CLASS, DRAWS = 10, 10


@dataclass(frozen=True)
class Features:
    filters: Tensor  # (H, 64)
    frequency: float  # cycles across the image
    accuracy: float  # of a linear classifier
    test_loss: float | None = None  # 1 is no denoising


def mean_frequency(images: Tensor) -> float:
    """Of the images' energy, in cycles across the 8 pixels: 0 for a constant, about 3 for white noise."""
    energy = torch.fft.fft2(images.reshape(-1, 8, 8)).abs().square().mean(0)
    cycles = 8 * torch.fft.fftfreq(8)
    return (energy * torch.hypot(cycles[:, None], cycles)).sum().div(energy.sum()).item()


@torch.no_grad()
def judge(layer: DenoisingLayer, digits: Digits, draws: list[Tensor], test_loss: float | None = None) -> Features:
    accuracy = probe(
        layer.encode(digits.train), digits.train_labels, layer.encode(digits.test), digits.test_labels, draws
    )
    filters = layer.filters.detach()
    return Features(filters, mean_frequency(filters), accuracy.mean().item(), test_loss)


def learn(sigma: float, digits: Digits, draws: list[Tensor], steps: int, seed: int) -> Features:
    """The same start and the same noise, times sigma, at every level."""
    torch.manual_seed(seed)
    layer, noise, level = DenoisingLayer(64, WIDTH), df.Noise(seed), df.Level(alpha=1.0, sigma=sigma)
    train(
        layer, lambda k: denoising_loss(layer, digits.train, noise.fold_in(k), level), steps, title=f"sigma = {sigma}"
    )
    with torch.no_grad():
        test_loss = denoising_loss(layer, digits.test, noise.fold_in(steps), level).item()
    return judge(layer, digits, draws, test_loss)


def print_table(levels: dict[float, Features], untrained: Features, pixels: Features) -> None:
    table = Table(
        title=f"One hidden layer of {WIDTH}, trained at one level of noise",
        min_width=78,
        caption="frequency: mean over the filters' energy, in cycles across the image (of the images, for pixels); "
        f"accuracy: of a linear classifier, {PER_CLASS} labels a class, mean of {DRAWS} draws; "
        "loss: 1 is no denoising",
    )
    for column in ("features", "frequency", "accuracy", "test loss"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, each in {"pixels": pixels, "untrained": untrained}.items():
        table.add_row(name, f"{each.frequency:.2f}", f"{each.accuracy:.1%}", "")
    table.add_section()
    for sigma, each in levels.items():
        table.add_row(f"sigma = {sigma}", f"{each.frequency:.2f}", f"{each.accuracy:.1%}", f"{each.test_loss:.3f}")
    Console().print(table)


def draw_figure(out: Path, levels: dict[float, Features], untrained: Features, pixels: Features) -> None:
    figure = plt.figure(figsize=(12, 8), layout="constrained")
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 0.8)))
    shown = SIGMAS[0], SIGMAS[2], SIGMAS[-1]
    for axis, sigma in zip(top.subplots(1, len(shown)), shown, strict=True):
        show_filters(axis, levels[sigma].filters, 6, f"the 36 largest filters, sigma = {sigma}")
    frequency, accuracy = bottom.subplots(1, 2)
    for axis, field, title in (
        (frequency, "frequency", "Filters: mean frequency, cycles across the image"),
        (accuracy, "accuracy", f"Accuracy of a linear classifier, {PER_CLASS} labels a class"),
    ):
        axis.semilogx(SIGMAS, [getattr(each, field) for each in levels.values()], "o-", color=BLUE, label="trained")
        axis.axhline(getattr(untrained, field), color=ORANGE, ls="--", label="untrained")
        axis.axhline(getattr(pixels, field), color=MUTED, ls=":", label="pixels")
        axis.set(title=title, xlabel="sigma")
        axis.set_xticks(SIGMAS, [f"{sigma:g}" for sigma in SIGMAS])
        axis.minorticks_off()
        axis.legend(frameon=False)
    save(figure, out)


def failures(levels: dict[float, Features], pixels: Features) -> list[str]:
    problems = []
    frequencies = [each.frequency for each in levels.values()]
    if not all(higher > lower for higher, lower in pairwise(frequencies)):
        problems.append(f"the filters' frequency does not fall with sigma: {[round(each, 2) for each in frequencies]}")
    middle = max(levels[0.5].accuracy, levels[1.0].accuracy)
    for other, accuracy in {
        "pixels": pixels.accuracy,
        f"sigma = {SIGMAS[0]}": levels[SIGMAS[0]].accuracy,
        f"sigma = {SIGMAS[-1]}": levels[SIGMAS[-1]].accuracy,
    }.items():
        if not middle > accuracy:
            problems.append(f"accuracy at middle levels, {middle:.1%}, is not above the {accuracy:.1%} of {other}")
    return problems


def main(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps at a level; the claim is judged from the default on.")
    ] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("noise_levels.png"),
) -> None:
    """The filters and features of a denoising autoencoder by its level of noise."""
    begin = time.perf_counter()
    digits = load(n_train=1000)
    draws = label_draws(digits.train_labels, PER_CLASS, DRAWS, seed)
    accuracy = probe(digits.train, digits.train_labels, digits.test, digits.test_labels, draws)
    pixels = Features(torch.eye(64), mean_frequency(digits.train), accuracy.mean().item())
    torch.manual_seed(seed)
    untrained = judge(DenoisingLayer(64, WIDTH), digits, draws)
    levels = {sigma: learn(sigma, digits, draws, steps, seed) for sigma in SIGMAS}
    print_table(levels, untrained, pixels)
    draw_figure(out, levels, untrained, pixels)
    finish("noise_levels", failures(levels, pixels) if steps >= STEPS else [], begin, out)


if __name__ == "__main__":
    typer.run(main)
