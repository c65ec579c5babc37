"""Stacked denoising autoencoders: features learned without labels, layer by layer.

Each layer is trained alone, to denoise the clean codes of the layer below (the pixels, for the first) from Gaussian
corruption; then it is frozen and the next one is put on top. Vincent et al. 2010, "Stacked denoising autoencoders:
learning useful representations in a deep network with a local denoising criterion". What the features are worth is
what a linear classifier can make of them with few labels, next to the pixels themselves and to the same network as
it was before training.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Annotated

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
    show_tiles,
    train,
)
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dae_fast as df

STEPS = 800  # of each layer
WIDTH, DEPTH = 256, 2
CORRUPTION = 1.0  # sigma, in standard deviations of the layer's input
PER_CLASS = (3, 10, 30)  # labels
DRAWS = 10  # of the labelled images

Accuracies = dict[str, dict[int, Tensor]]  # features -> labels per class -> (DRAWS,)


def codes(layers: list[DenoisingLayer], x: Tensor) -> list[Tensor]:
    """x and its code in each layer."""
    found = [x]
    for layer in layers:
        found.append(layer.encode(found[-1]))
    return found


def train_layer(layer: DenoisingLayer, x0: Tensor, steps: int, noise: df.Noise, title: str) -> None:
    level = df.Level(alpha=1.0, sigma=CORRUPTION * x0.var(0).mean().sqrt().item())
    train(layer, lambda step: denoising_loss(layer, x0, noise.fold_in(step), level), steps, title=title)


def train_stack(layers: list[DenoisingLayer], x: Tensor, steps: int, noise: df.Noise) -> None:
    for depth, layer in enumerate(layers):
        with torch.no_grad():
            x0 = codes(layers[:depth], x)[-1]
        train_layer(layer, x0, steps, noise.fold_in(depth), f"training layer {depth + 1}")


@torch.no_grad()
def probe_all(stacks: dict[str, list[DenoisingLayer]], digits: Digits, seed: int) -> Accuracies:
    features = {"pixels": (digits.train, digits.test)}
    for name, layers in stacks.items():
        pairs = zip(codes(layers, digits.train), codes(layers, digits.test), strict=True)
        features |= {f"{name} {depth}": pair for depth, pair in enumerate(pairs) if depth}
    draws = {n: label_draws(digits.train_labels, n, DRAWS, seed) for n in PER_CLASS}
    return {
        name: {n: probe(x, digits.train_labels, x_test, digits.test_labels, draws[n]) for n in PER_CLASS}
        for name, (x, x_test) in features.items()
    }


def print_table(accuracies: Accuracies) -> None:
    table = Table(
        title="A linear classifier with few labels",
        caption=f"test accuracy, mean of {DRAWS} draws of the labelled images; in brackets: "
        "in how many of them better than on pixels",
    )
    table.add_column("features, layer")
    for n in PER_CLASS:
        table.add_column(f"{n} labels a class", justify="right")
    for name, by_labels in accuracies.items():
        cells = []
        for n, accuracy in by_labels.items():
            wins = "" if name == "pixels" else f" ({(accuracy > accuracies['pixels'][n]).sum()})"
            cells.append(f"{accuracy.mean():.1%}{wins}")
        table.add_row(name, *cells)
    Console().print(table)


@torch.no_grad()
def draw_figure(out: Path, accuracies: Accuracies, layers: list[DenoisingLayer], images: Tensor) -> None:
    figure, (curves, filters, decoded) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    styles = {"pixels": (MUTED, "-"), "untrained": (ORANGE, "--"), "trained": (BLUE, "-")}
    for name, by_labels in accuracies.items():
        colour, style = styles[name.split()[0]]
        accuracy = [by_labels[n].mean() for n in PER_CLASS]
        curves.plot(PER_CLASS, accuracy, style, color=colour, marker="os"[name.endswith("2")], label=name)
    curves.set(xscale="log", xlabel="labels of each class", title="Test accuracy of a linear classifier")
    curves.set_xticks(PER_CLASS, PER_CLASS)
    curves.minorticks_off()
    curves.legend(frameon=False)

    show_filters(filters, layers[0].filters, 10, "First layer: the 100 largest filters")
    rows = [images]
    for depth in range(1, DEPTH + 1):
        x = codes(layers[:depth], images)[-1]
        for layer in reversed(layers[:depth]):
            x = layer.decode(x)
        rows.append(x.clamp(-1, 1))
    show_tiles(decoded, torch.cat(rows), len(images), "Held out; decoded from layer 1; from layer 2")
    save(figure, out)


def failures(accuracies: Accuracies) -> list[str]:
    """The second layer adds little on images this small, so that nothing is asked of it against the first."""
    problems = []
    top = f"trained {DEPTH}"
    for other in ("pixels", "untrained 1", f"untrained {DEPTH}"):
        for n in PER_CLASS:
            ours, theirs = (accuracies[name][n].mean().item() for name in (top, other))
            if not ours > theirs:
                problems.append(f"with {n} labels a class, {ours:.1%} on {top} is not above {theirs:.1%} on {other}")
    return problems


def main(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps of a layer; the claim is judged from the default on.")
    ] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("stacked.png"),
) -> None:
    """Stacked denoising autoencoders on digits, and what a linear classifier makes of their features."""
    begin = time.perf_counter()
    digits = load(n_train=1000)
    torch.manual_seed(seed)
    untrained = [DenoisingLayer(64 if depth == 0 else WIDTH, WIDTH) for depth in range(DEPTH)]
    trained = copy.deepcopy(untrained)
    train_stack(trained, digits.train, steps, df.Noise(seed))
    accuracies = probe_all({"untrained": untrained, "trained": trained}, digits, seed)
    print_table(accuracies)
    draw_figure(out, accuracies, trained, digits.test[:8])
    finish("stacked", failures(accuracies) if steps >= STEPS else [], begin, out)


if __name__ == "__main__":
    typer.run(main)
