"""A variational autoencoder against probabilistic PCA, in nats.

q(z | x) and p(x | z) are networks, p(z) = N(0, 1) and p(x | z) = N(decoder(z), sigma^2), sigma learned and the same
for all pixels; trained by the evidence lower bound (Kingma and Welling 2014). Probabilistic PCA (Tipping and Bishop
1999) is the same model with a linear decoder: its best weights and its exact log-likelihood are known in closed form,
so a bound above it shows that the curved decoder is worth something. Both are densities of the images in [-1, 1],
and are compared on held-out digits at several sizes of the latent z.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from digits import Digits, finish, load, mlp, save, show_tiles, train
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from torch import Tensor, nn

import dae_fast as df

STEPS = 1000  # of each network
WIDTH = 256
LATENTS = (2, 4, 8)
NOISES = 64  # to average the bound of an image over


class VAE(nn.Module):
    def __init__(self, latent: int, D: int = 64, width: int = WIDTH) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(D, width, 2 * latent), mlp(latent, width, D)
        self.log_sigma = nn.Parameter(torch.tensor(-1.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log_var of q(z | x), (B, latent) each."""
        mu, log_var = self.encoder(x).chunk(2, 1)
        return mu, log_var

    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x | z), (B, D)."""
        return self.decoder(z)

    def elbo(self, x: Tensor, noise: df.Noise) -> tuple[Tensor, Tensor]:
        """(log p(x | z) - kl, kl), (B,) each, in nats, for one z ~ q(z | x): E elbo <= log p(x)."""
        z, kl = df.reparameterise(*self.encode(x), noise)
        error = df.denoising_loss(self.decode(z), x, None, None, predict="x0", reduction="none")
        square = error * torch.exp(-2 * self.log_sigma)
        log_likelihood = -0.5 * x.shape[1] * (math.log(2 * math.pi) + 2 * self.log_sigma + square)
        return log_likelihood - kl, kl


@dataclass(frozen=True)
class Bound:
    """Means of the held-out images, nats an image."""

    elbo: float
    kl: float
    sigma: float
    pca: float  # log p of probabilistic PCA


def learn(images: Tensor, latent: int, steps: int, noise: df.Noise) -> VAE:
    vae = VAE(latent, images.shape[1])
    D = images.shape[1]
    title = f"latent of {latent}"
    train(vae, lambda step: -vae.elbo(images, noise.fold_in(step))[0].mean() / D, steps, title=title)
    return vae


@torch.no_grad()
def judge(vae: VAE, latent: int, digits: Digits, noise: df.Noise) -> Bound:
    elbo, kl = torch.stack([torch.stack(vae.elbo(digits.test, noise.fold_in(k))) for k in range(NOISES)]).mean((0, 2))
    pca = PCA(latent).fit(digits.train).score(digits.test)
    return Bound(elbo.item(), kl.item(), vae.log_sigma.exp().item(), float(pca))


def print_table(bounds: dict[int, Bound]) -> None:
    table = Table(
        title="Log-density of held-out digits, nats an image",
        caption="a lower bound for the VAE, exact for probabilistic PCA",
    )
    for column in ("size of z", "VAE: ELBO", "KL(q | prior)", "sigma", "probabilistic PCA", "VAE is ahead by"):
        table.add_column(column, justify="right" if table.columns else "left")
    for latent, each in bounds.items():
        figures = f"{each.elbo:.2f}", f"{each.kl:.2f}", f"{each.sigma:.3f}", f"{each.pca:.2f}"
        table.add_row(str(latent), *figures, f"{each.elbo - each.pca:.2f}")
    Console().print(table)


@torch.no_grad()
def draw_figure(out: Path, vaes: dict[int, VAE], digits: Digits, noise: df.Noise) -> None:
    small, large = min(vaes), max(vaes)
    figure, (codes, plane, samples) = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    mu = vaes[small].encode(digits.test)[0]
    points = codes.scatter(*mu.T, c=digits.test_labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=14)
    figure.colorbar(points, ax=codes, ticks=range(10), label="digit", shrink=0.7)
    codes.set(title=f"Held-out digits in the plane of z, size {small}", aspect="equal")

    # Equally probable under the prior, row by row from the top.
    grid = math.sqrt(2) * torch.erfinv(2 * (torch.arange(16) + 0.5) / 16 - 1)
    across, up = torch.meshgrid(grid, grid.flip(0), indexing="xy")
    decoded = vaes[small].decode(torch.stack((across, up), -1).reshape(-1, 2))
    show_tiles(plane, decoded, 16, "The plane decoded, at quantiles of the prior")
    z = noise.normal((144, large))
    show_tiles(samples, vaes[large].decode(z), 12, f"Samples, z of size {large}")
    save(figure, out)


def failures(bounds: dict[int, Bound]) -> list[str]:
    return [
        f"with a latent of {latent}, the bound {each.elbo:.2f} is not above the {each.pca:.2f} of probabilistic PCA"
        for latent, each in bounds.items()
        if not each.elbo > each.pca
    ]


def main(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps of a network; the claim is judged from the default on.")
    ] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("vae.png"),
) -> None:
    """A variational autoencoder of digits and its bound."""
    begin = time.perf_counter()
    digits = load()
    vaes, bounds = {}, {}
    for latent in LATENTS:
        torch.manual_seed(seed)
        noise = df.Noise(seed).fold_in(latent)
        vaes[latent] = learn(digits.train, latent, steps, noise)
        bounds[latent] = judge(vaes[latent], latent, digits, noise.fold_in(-1))
    print_table(bounds)
    draw_figure(out, vaes, digits, df.Noise(seed).fold_in(-1))
    finish("vae", failures(bounds) if steps >= STEPS else [], begin, out)


if __name__ == "__main__":
    typer.run(main)
