"""A denoising autoencoder trained at many levels of noise is a diffusion model.

One network with one objective, EDM's (Karras et al. 2022), is trained at a single sigma and at sigmas drawn from a
log-normal distribution; nothing else differs. A denoiser of one level knows the score of one noised density (see
mixture_score.py): with little noise Langevin's chains do not find their way between the digits, and with much noise
the details are gone (Song and Ermon 2019). The many-level network goes from pure noise to a digit level by level. On
images this small a level chosen well comes near it, by eight times as many looks of the network.

What is drawn is judged by a classifier of real digits: how sure it is, over how many classes the samples spread, and
the Frechet distance to the training images of its hidden features (Heusel et al. 2017), for which held-out digits
are the floor and a Gaussian with the images' mean and covariance a ceiling.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from digits import Digits, finish, load, save, show_tiles, train
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from train_digits import judge

import dae_fast as df
from dae_fast.continuous import LogNormal

STEPS = 2400  # of each network
BATCH = 300
WIDTH, FEATURES = 256, 32
SIGMA_DATA = 0.75
SCHEDULE = df.ContinuousSchedule.edm(sigma_min=0.02, sigma_max=20.0)
TRAINING_SIGMAS = LogNormal(P_mean=-0.8, P_std=1.0)  # EDM's mean is -1.2 for its sigma_data of 0.5
SAMPLING_STEPS = 32
SINGLE = (0.35, 0.7, 1.4)  # sigmas of the one-level networks
CHAIN_STEPS, STEP_SIZE = 500, 0.05  # of Langevin, the size in sigma^2
SAMPLES = 1000
MARGIN = 0.9  # of the Frechet distance of the others


class Network(nn.Module):
    """F(c_in * x_t, c_noise): an MLP whose hidden units are scaled by the level, from its Fourier features."""

    def __init__(self, D: int = 64) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(D, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, D)
        self.scales = nn.Sequential(nn.Linear(FEATURES, 64), nn.SiLU(), nn.Linear(64, 2 * WIDTH))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        by_level = 1 + self.scales(df.fourier_embedding(c_noise, df.Noise(0), FEATURES))
        first, middle = by_level.chunk(2, 1)
        return self.last(F.silu(self.middle(F.silu(self.first(x) * first)) * middle))


@dataclass(frozen=True)
class Quality:
    confidence: float
    spread: float
    frechet: float


class Critic:
    """A classifier of real digits, and its opinion of others."""

    def __init__(self, digits: Digits) -> None:
        self.classifier = MLPClassifier((64,), alpha=1.0, max_iter=500, random_state=0)
        self.classifier.fit(digits.train, digits.train_labels)
        self.reference = self.features(digits.train)

    def features(self, images: Tensor) -> Tensor:
        """(B, 64) float64, of the hidden layer."""
        weight, bias = (
            torch.from_numpy(each[0]).double() for each in (self.classifier.coefs_, self.classifier.intercepts_)
        )
        return torch.relu(images.clamp(-1, 1).double() @ weight + bias)

    def __call__(self, images: Tensor) -> Quality:
        judged = judge(self.classifier, images)
        return Quality(judged.confidence, judged.spread, frechet_distance(self.features(images), self.reference))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^1/2): squared, between Gaussians of these moments."""
    C_x, C_y = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(C_x @ C_y).real.clamp(min=0).sqrt().sum()  # similar to a positive semidefinite one
    return ((x.mean(0) - y.mean(0)).square().sum() + C_x.trace() + C_y.trace() - 2 * root).item()


def learn(images: Tensor, sigma: float | None, steps: int, seed: int) -> df.nn.EDMPreconditioner:
    """D(x_t, level) trained at sigma, or at a fresh log-normal sigma for every image."""
    torch.manual_seed(seed)
    D, noise = df.nn.EDMPreconditioner(Network(), SIGMA_DATA), df.Noise(seed)
    order = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        fresh, x0 = noise.fold_in(step), images[torch.randint(len(images), (BATCH,), generator=order)]
        if sigma is None:
            level = SCHEDULE[SCHEDULE.draw(fresh, BATCH, density=TRAINING_SIGMAS)]
        else:
            level = df.Level(alpha=1.0, sigma=sigma)
        x_t = df.add_noise(x0, fresh, level)
        return df.denoising_loss(D.raw(x_t, level), x0, fresh, level, predict=D.predict)

    train(D, loss, steps, title="many levels" if sigma is None else f"sigma = {sigma}")
    return D


def heun(D: df.nn.EDMPreconditioner, shape: tuple[int, int], noise: df.Noise) -> Tensor:
    grid = SCHEDULE.discretise(SAMPLING_STEPS, rho=7)
    return df.samplers.heun(D, shape, grid, noise, steps=SAMPLING_STEPS, predict="x0", conditioning="sigma")


@torch.no_grad()
def langevin(D: df.nn.EDMPreconditioner, sigma: float, start: Tensor, noise: df.Noise) -> Tensor:
    """Chains in the noised density from noised means of the images, and the denoiser's word on their ends."""
    level = df.Level(alpha=1.0, sigma=sigma)
    x = df.add_noise(start, noise.fold_in(-1), level)
    x = df.samplers.langevin(
        lambda x: df.to_score(x, D(x, level), level, predict="x0"), x, STEP_SIZE * sigma**2, CHAIN_STEPS, noise
    )
    return D(x, level)


def gaussian(images: Tensor, n: int, noise: df.Noise) -> Tensor:
    """n samples with the images' mean and covariance."""
    variances, axes = torch.linalg.eigh(torch.cov(images.T))
    return images.mean(0) + noise.normal((n, images.shape[1])) * variances.clamp(min=0).sqrt() @ axes.T


def print_table(qualities: dict[str, Quality]) -> None:
    table = Table(title="Digits drawn from noise, judged by a classifier of real ones", caption=f"{SAMPLES} of each")
    for column in ("trained at, sampler", "confidence", "classes, exp(entropy)", "Frechet distance"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, each in qualities.items():
        table.add_row(name, f"{each.confidence:.1%}", f"{each.spread:.1f} of 10", f"{each.frechet:.2f}")
    Console().print(table)


def draw_figure(out: Path, drawn: dict[str, Tensor], qualities: dict[str, Quality]) -> None:
    figure, axes = plt.subplots(2, (len(drawn) + 1) // 2, figsize=(14, 7.6), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, images) in zip(axes.flat, drawn.items(), strict=False):
        show_tiles(axis, images[:100].clamp(-1, 1), 10, f"{name}: {qualities[name].frechet:.2f}")
    figure.suptitle("What it was trained at, sampler: Frechet distance")
    save(figure, out)


def failures(qualities: dict[str, Quality]) -> list[str]:
    ours, *others = (name for name in qualities if name != "(held out)")
    return [
        f"Frechet distance {qualities[ours].frechet:.2f} of {ours} is not below {MARGIN} of "
        f"{qualities[other].frechet:.2f} of {other}"
        for other in others
        if not qualities[ours].frechet < MARGIN * qualities[other].frechet
    ]


def main(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps of a network; the claim is judged from the default on.")
    ] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("multi_scale.png"),
) -> None:
    """A denoising autoencoder at one level and at many, as generators of digits."""
    begin = time.perf_counter()
    digits = load()
    critic, noise, shape = Critic(digits), df.Noise(seed).fold_in(-1), (SAMPLES, digits.train.shape[1])
    start = digits.train.mean(0).expand(shape)

    drawn = {"many levels, Heun": heun(learn(digits.train, None, steps, seed), shape, noise)}
    for sigma in SINGLE:
        D = learn(digits.train, sigma, steps, seed)
        drawn[f"sigma = {sigma}, Heun"] = heun(D, shape, noise)
        drawn[f"sigma = {sigma}, Langevin"] = langevin(D, sigma, start, noise)
    drawn["(Gaussian)"] = gaussian(digits.train, SAMPLES, noise)

    qualities = {name: critic(images) for name, images in drawn.items()} | {"(held out)": critic(digits.test)}
    print_table(qualities)
    draw_figure(out, drawn, qualities)
    finish("multi_scale", failures(qualities) if steps >= STEPS else [], begin, out)


if __name__ == "__main__":
    typer.run(main)
