"""A denoising autoencoder at one level of noise has learned the score of the noised density.

The best f for E|f(x + s*eps) - x|^2 is E[x | x_t], and (f(x_t) - x_t) / s^2 is then grad log p of the noised
density: Tweedie's formula, shown for denoising autoencoders by Vincent (2011, "A connection between score matching
and denoising autoencoders") and Alain and Bengio (2014, "What regularized auto-encoders learn from the data
generating distribution"). Here the data are a mixture of Gaussians, so the exact score is known: a small network is
held against it, point by point and as the force of Langevin chains that all start in one mode. The baseline is the
best linear f, which knows the mean and the covariance alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from digits import BLUE, INK, ORANGE, denoising_loss, finish, mlp, save, train
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dae_fast as df

STEPS = 3000
BATCH = 2048
SIGMA = 0.4
LEVEL = df.Level(alpha=1.0, sigma=SIGMA)
POINTS = 20_000
CHAINS, CHAIN_STEPS, STEP_SIZE = 2000, 1500, 0.02
WORST_ERROR = 0.1

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mixture:
    """Gaussians N(means_i, stds_i^2 I), drawn with probability weights_i; noise adds sigma^2 to each variance."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, D)
    stds: Tensor  # (K,)

    def sample(self, n: int, noise: df.Noise) -> Tensor:
        """(n, D), without noise of level sigma."""
        u = noise.fold_in(1).bits((n,)) * 2.0**-32
        i = torch.bucketize(u, self.weights.cumsum(0)[:-1], right=True)
        return df.add_noise(self.means[i], noise.fold_in(2), df.Level(1.0, self.stds[i]))

    def log_joint(self, x: Tensor, sigma: float) -> Tensor:
        """log p(x_t, component), (B, K)."""
        variances = self.stds**2 + sigma**2
        square = (x[:, None] - self.means).square().sum(-1)
        return self.weights.log() - 0.5 * x.shape[1] * (2 * math.pi * variances).log() - square / (2 * variances)

    def score(self, x: Tensor, sigma: float) -> Tensor:
        """grad log p(x_t), (B, D): the components' pulls, each by p(component | x_t)."""
        pull = (self.means - x[:, None]) / (self.stds**2 + sigma**2)[:, None]
        return (self.log_joint(x, sigma).softmax(1)[..., None] * pull).sum(1)


MIXTURE = Mixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[-1.2, -0.7], [1.3, -0.4], [0.0, 1.6]]),
    torch.tensor([0.4, 0.2, 0.3]),
)


def learn_score(steps: int, seed: int) -> Score:
    """Train f on fresh samples, and read the score off it."""
    torch.manual_seed(seed)
    f = mlp(2, 64, 64, 64, 2)
    noise = df.Noise(seed)

    def loss(step: int) -> Tensor:
        x0 = MIXTURE.sample(BATCH, noise.fold_in(step).fold_in(1))
        return denoising_loss(f, x0, noise.fold_in(step), LEVEL)

    train(f, loss, steps, rate=1e-2, title="training the denoiser")
    return lambda x: df.to_score(x, f(x), LEVEL, predict="x0")


def linear_score(x_t: Tensor) -> Score:
    """That of the Gaussian with the mean and covariance of x_t."""
    mean, precision = x_t.mean(0), torch.cov(x_t.T).inverse()
    return lambda x: (mean - x) @ precision


def compare(scores: dict[str, Score], x_t: Tensor) -> dict[str, tuple[float, float]]:
    """Over the points x_t: error relative to the exact score, root mean square, and mean cosine."""
    exact = scores["exact"](x_t)
    judged = {}
    for name, score in scores.items():
        error = (score(x_t) - exact).square().mean() / exact.square().mean()
        judged[name] = error.sqrt().item(), torch.cosine_similarity(score(x_t), exact).mean().item()
    return judged


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, which is 0 for equal distributions alone (Szekely and Rizzo 2013)."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def print_table(judged: dict[str, tuple[float, float]], ends: dict[str, Tensor], distances: dict[str, float]) -> None:
    table = Table(
        title=f"Score of a mixture of {len(MIXTURE.weights)} Gaussians with noise of level {SIGMA}",
        caption=f"{CHAINS} Langevin chains of {CHAIN_STEPS} steps, all from the last mode; "
        "energy distance to other exact samples",
    )
    for column in ("score", "relative error", "cosine", "energy distance", "modes, %"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, x in ends.items():
        figures = (f"{judged[name][0]:.4f}", f"{judged[name][1]:.4f}") if name in judged else ("", "")
        share = MIXTURE.log_joint(x, SIGMA).softmax(1).mean(0)
        table.add_row(name, *figures, f"{distances[name]:.4f}", " ".join(f"{100 * each:.1f}" for each in share))
    Console().print(table)


def draw_figure(out: Path, scores: dict[str, Score], ends: Tensor) -> None:
    axis = torch.linspace(-3, 3, 200)
    fine = torch.cartesian_prod(axis, axis)
    density = MIXTURE.log_joint(fine, SIGMA).logsumexp(1).exp().reshape(200, 200).T
    x = torch.cartesian_prod(axis[5::14], axis[5::14])
    exact, learned = scores["exact"](x), scores["learned"](x)
    figure, axes = plt.subplots(1, 4, figsize=(14, 4), layout="constrained", sharey=True)
    fields = (
        ("exact score", exact, INK),
        ("learned: (f(x) - x) / s²", learned, BLUE),
        ("learned - exact, 5 times as long", 5 * (learned - exact), ORANGE),
    )
    for panel, (title, field, colour) in zip(axes, fields, strict=False):
        panel.quiver(*x.T, *field.T, color=colour, angles="xy", scale=90, width=0.005)
        panel.set_title(title)
    axes[3].scatter(*ends.T, s=1, color=BLUE, alpha=0.5, lw=0)
    axes[3].set_title("ends of Langevin chains, learned score")
    for panel in axes:
        panel.contourf(axis, axis, density, levels=8, cmap="Greys", alpha=0.5, zorder=0)
        panel.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    save(figure, out)


@torch.no_grad()
def judge(learned: Score, seed: int, out: Path) -> list[str]:
    noise = df.Noise(seed).fold_in(-1)
    x_t = df.add_noise(MIXTURE.sample(POINTS, noise.fold_in(0)), noise.fold_in(1), LEVEL)
    scores = {"exact": lambda x: MIXTURE.score(x, SIGMA), "learned": learned, "linear": linear_score(x_t)}
    judged = compare(scores, x_t)
    start = MIXTURE.means[-1].expand(CHAINS, -1)
    ends = {"(exact samples)": x_t[:CHAINS]} | {
        name: df.samplers.langevin(score, start, STEP_SIZE, CHAIN_STEPS, noise.fold_in(2))
        for name, score in scores.items()
    }
    reference = x_t[-CHAINS:]
    distances = {name: energy_distance(x, reference) for name, x in ends.items()}
    print_table(judged, ends, distances)
    draw_figure(out, scores, ends["learned"])
    return failures(judged["learned"][0], distances)


def failures(error: float, distances: dict[str, float]) -> list[str]:
    problems = []
    if not error < WORST_ERROR:
        problems.append(f"the learned score is off by {error:.1%}, not less than {WORST_ERROR:.0%}")
    if not distances["learned"] < distances["linear"] / 2:
        problems.append(
            f"chains on the learned score end at energy distance {distances['learned']:.4f}, "
            f"not below half of the linear score's {distances['linear']:.4f}"
        )
    return problems


def main(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps; the claim is judged from the default on.")
    ] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("mixture_score.png"),
) -> None:
    """A denoising autoencoder against the exact score of a Gaussian mixture."""
    begin = time.perf_counter()
    problems = judge(learn_score(steps, seed), seed, out)
    finish("mixture_score", problems if steps >= STEPS else [], begin, out)


if __name__ == "__main__":
    typer.run(main)
