"""Sparse denoising autoencoders: of many units, few are active for any one image.

The network restores digits from masking noise (Vincent et al. 2008), and a penalty of its code keeps most units
quiet: the KL divergence of each sigmoid unit's mean activation from a small target rate (Ng 2011, "Sparse
autoencoder", CS294A lecture notes), or the L1 norm of rectified units (Ranzato et al. 2008). Each is next to the same
network without a penalty: how sparse the code became, and what that cost.

The weights are tied, so that a small code cannot hide behind a large decoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from digits import (
    BLUE,
    MUTED,
    ORANGE,
    DenoisingLayer,
    Digits,
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

STEPS = 1000  # of each network
WIDTH = 196
MASKED = 0.3  # of the pixels, which become paper
RATE = 0.05  # the target
PER_CLASS, DRAWS = 10, 10
STILL_ACTIVE, COST = 0.6, 0.2  # of the unpenalised: what may be active at most, and how much error may be added


@dataclass(frozen=True)
class Kind:
    activation: Callable[[Tensor], Tensor]
    penalty: Callable[[Tensor], Tensor] | None = None
    weight: float = 0.0


KINDS = {
    "sigmoid": Kind(torch.sigmoid),
    "sigmoid, KL": Kind(torch.sigmoid, lambda h: df.kl_sparsity(h, RATE), 0.01),
    "ReLU": Kind(F.relu),
    "ReLU, L1": Kind(F.relu, df.l1_penalty, 0.3),
}


class SparseLayer(DenoisingLayer):
    def __init__(self, D: int, H: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__(D, H)
        self.activation = activation

    def encode(self, x: Tensor) -> Tensor:
        return self.activation(F.linear(x, self.filters, self.hidden_bias))


@dataclass(frozen=True)
class Result:
    filters: Tensor  # (H, 64)
    rates: Tensor  # (H,) mean activation
    active: float
    error: float
    accuracy: float


def mask(images: Tensor, noise: df.Noise) -> Tensor:
    return df.corrupt(images, df.Masking(MASKED, noise), value=-1.0)


def active_share(h: Tensor) -> float:
    """mean_b (mean_j h)^2 / mean_j h^2: of codes of zeros and equal values, the share that is not zero.

    1 when all units of a code are equal. A code's scale does not matter. h: (B, H) >= 0. Treves and Rolls 1991.
    """
    return (h.mean(1).square() / h.square().mean(1).clamp(min=torch.finfo(h.dtype).tiny)).mean().item()


def learn(name: str, digits: Digits, draws: list[Tensor], steps: int, seed: int) -> Result:
    """The same start and the same noise for every kind."""
    kind, x0, noise = KINDS[name], digits.train, df.Noise(seed)
    torch.manual_seed(seed)
    layer = SparseLayer(64, WIDTH, kind.activation)

    def loss(step: int) -> Tensor:
        h = layer.encode(mask(x0, noise.fold_in(step)))
        error = df.denoising_loss(layer.decode(h), x0, None, None, predict="x0")
        return error if kind.penalty is None else error + kind.weight * kind.penalty(h)

    train(layer, loss, steps, rate=2e-2, title=name)
    with torch.no_grad():
        h = layer.encode(mask(digits.test, noise.fold_in(-1)))
        features = layer.encode(x0), layer.encode(digits.test)
        return Result(
            filters=layer.filters.detach(),
            rates=h.mean(0),
            active=active_share(h),
            error=df.denoising_loss(layer.decode(h), digits.test, None, None, predict="x0").item(),
            accuracy=probe(features[0], digits.train_labels, features[1], digits.test_labels, draws).mean().item(),
        )


def print_table(results: dict[str, Result], pixels: float) -> None:
    table = Table(
        title=f"{WIDTH} units restore digits of which {MASKED:.0%} is masked",
        caption=f"held-out images; the KL penalty's target for the mean activation is {RATE}; error: mean square; "
        f"accuracy: of a linear classifier, {PER_CLASS} labels a class, mean of {DRAWS} draws",
    )
    for column in ("units, penalty", "mean activation", "active, %", "error", "accuracy, %"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, each in results.items():
        figures = f"{each.rates.mean():.3f}", f"{100 * each.active:.1f}", f"{each.error:.4f}"
        table.add_row(name, *figures, f"{100 * each.accuracy:.1f}")
    table.add_section()
    table.add_row("(pixels)", "", "", "", f"{100 * pixels:.1f}")
    Console().print(table)


def draw_figure(out: Path, results: dict[str, Result]) -> None:
    figure, axes = plt.subplots(1, len(results) + 1, figsize=(15, 3.6), layout="constrained")
    for axis, (name, each) in zip(axes[:-1], results.items(), strict=True):
        show_filters(axis, each.filters, 7, f"{name}: {each.active:.0%} active")
    for name, colour in (("sigmoid", ORANGE), ("sigmoid, KL", BLUE)):
        axes[-1].plot(results[name].rates.sort().values, color=colour, label=name)
    axes[-1].axhline(RATE, color=MUTED, lw=0.8, ls=":", label="target")
    axes[-1].set(title="Mean activation of each sigmoid unit", xlabel="unit", yscale="log")
    axes[-1].legend(frameon=False)
    save(figure, out)


def failures(results: dict[str, Result], pixels: float) -> list[str]:
    problems = []
    rate = results["sigmoid, KL"].rates.mean().item()
    if not abs(rate - RATE) < 0.2 * RATE:
        problems.append(f"the mean activation under the KL penalty is {rate:.3f}, not within a fifth of {RATE}")
    for plain, sparse in (("sigmoid", "sigmoid, KL"), ("ReLU", "ReLU, L1")):
        without, penalised = results[plain], results[sparse]
        if not penalised.active < STILL_ACTIVE * without.active:
            problems.append(
                f"{penalised.active:.1%} active with {sparse} is not below {STILL_ACTIVE} of {without.active:.1%}"
            )
        if not penalised.error < (1 + COST) * without.error:
            problems.append(
                f"error {penalised.error:.4f} with {sparse} is not within {COST:.0%} of {without.error:.4f} without"
            )
        if not penalised.accuracy > pixels:
            problems.append(f"accuracy {penalised.accuracy:.1%} on {sparse} is not above {pixels:.1%} on pixels")
    return problems


def main(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps of a network; the claim is judged from the default on.")
    ] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("sparse.png"),
) -> None:
    """Sparse denoising autoencoders on digits, and what the sparsity costs."""
    begin = time.perf_counter()
    digits = load(n_train=1000)
    draws = label_draws(digits.train_labels, PER_CLASS, DRAWS, seed)
    results = {name: learn(name, digits, draws, steps, seed) for name in KINDS}
    pixels = probe(digits.train, digits.train_labels, digits.test, digits.test_labels, draws).mean().item()
    print_table(results, pixels)
    draw_figure(out, results)
    finish("sparse", failures(results, pixels) if steps >= STEPS else [], begin, out)


if __name__ == "__main__":
    typer.run(main)
