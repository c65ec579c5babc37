"""Latent diffusion: a diffusion model in the code of a variational autoencoder.

A VAE's prior N(0, 1) is where its codes are asked to lie, not where they do lie: between them are codes that decode
to no digit. A diffusion model is trained on the codes themselves, standardised, and its samples are decoded (Rombach
et al. 2022, "High-resolution image synthesis with latent diffusion models"). The VAE is the one of vae.py; the
quality is judged as in multi_scale.py, next to codes drawn from the prior and from a Gaussian with the mean and
covariance of the codes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
import vae
from digits import BLUE, MUTED, finish, load, save, show_tiles, train
from matplotlib import pyplot as plt
from multi_scale import Critic, Quality, gaussian
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dae_fast as df

STEPS = 1000  # of each of the two networks
LATENT, WIDTH, FEATURES = 8, 192, 32
SCHEDULE = df.Schedule.cosine(1000)
SAMPLING_STEPS = 20
SAMPLES = 1500  # as many as there are training images
MARGIN = 0.5  # of the Frechet distance of the others


class Denoiser(nn.Module):
    """v(z_t, t): an MLP of the code beside the level's sinusoids."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(LATENT + FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, LATENT)

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        h = torch.cat((z_t, df.timestep_embedding(t, FEATURES)), 1)
        return self.last(F.silu(self.middle(F.silu(self.first(h)))))


class Standardiser:
    """Codes to mean 0 and variance 1 in every direction of z, and back."""

    def __init__(self, codes: Tensor) -> None:
        self.mean, self.scale = codes.mean(0), codes.std(0)

    def __call__(self, codes: Tensor) -> Tensor:
        return (codes - self.mean) / self.scale

    def back(self, codes: Tensor) -> Tensor:
        return codes * self.scale + self.mean


def learn(autoencoder: vae.VAE, images: Tensor, standardise: Standardiser, steps: int, noise: df.Noise) -> Denoiser:
    """Diffusion on fresh codes z ~ q(z | x) in every step."""
    net, objective = Denoiser(), df.nn.DenoisingLoss(SCHEDULE, predict="v")
    with torch.no_grad():
        mu, log_var = autoencoder.encode(images)

    def loss(step: int) -> Tensor:
        fresh = noise.fold_in(step)
        z, _ = df.reparameterise(mu, log_var, fresh.fold_in(-1))
        return objective(net, standardise(z), fresh)["loss"]

    train(net, loss, steps, rate=1e-2, title="training the diffusion of codes")
    return net


@torch.no_grad()
def draw(net: Denoiser, codes: Tensor, standardise: Standardiser, noise: df.Noise) -> dict[str, Tensor]:
    """Codes from three densities, (SAMPLES, LATENT) each."""
    shape = SAMPLES, LATENT
    z = df.samplers.dpm_solver_pp_2m(net, shape, SCHEDULE, noise, steps=SAMPLING_STEPS, predict="v")
    return {
        "diffusion of codes": standardise.back(z),
        "Gaussian of codes": gaussian(codes, SAMPLES, noise),
        "prior N(0, 1)": noise.normal(shape),
    }


def print_table(qualities: dict[str, Quality]) -> None:
    table = Table(
        title=f"Digits decoded from codes of {LATENT} numbers, judged by a classifier of real ones",
        caption=f"{SAMPLES} of each; the reconstructions, of the training images, are what the decoder can do",
    )
    for column in ("codes from", "confidence", "classes, exp(entropy)", "Frechet distance"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, each in qualities.items():
        table.add_row(name, f"{each.confidence:.1%}", f"{each.spread:.1f} of 10", f"{each.frechet:.3f}")
    Console().print(table)


def draw_figure(out: Path, codes: dict[str, Tensor], images: dict[str, Tensor], qualities: dict[str, Quality]) -> None:
    """Codes in the plane of the two directions in which the data's vary most, and what they decode to."""
    figure, axes = plt.subplots(2, len(codes), figsize=(14, 7.6), layout="constrained", height_ratios=(1, 1.2))
    data = codes["(reconstructions)"]
    plane = torch.linalg.eigh(torch.cov(data.T)).eigenvectors[:, -2:]
    limit = 1.1 * (data @ plane).abs().max()
    for (above, below), (name, z) in zip(axes.T, codes.items(), strict=True):
        above.scatter(*(z @ plane).T, s=2, color=MUTED if name.startswith("(") else BLUE, lw=0)
        above.set(
            title=f"{name}: {qualities[name].frechet:.2f}", aspect="equal", xlim=(-limit, limit), ylim=(-limit, limit)
        )
        show_tiles(below, images[name][:100].clamp(-1, 1), 10)
    figure.suptitle("Codes, in the plane of their main directions, and what they decode to: Frechet distance")
    save(figure, out)


def failures(qualities: dict[str, Quality]) -> list[str]:
    ours, *others = (name for name in qualities if not name.startswith("("))
    return [
        f"Frechet distance {qualities[ours].frechet:.3f} of the {ours} is not below {MARGIN} of "
        f"{qualities[other].frechet:.3f} of the {other}"
        for other in others
        if not qualities[ours].frechet < MARGIN * qualities[other].frechet
    ]


def main(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps of a network; the claim is judged from the default on.")
    ] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("latent_diffusion.png"),
) -> None:
    """Diffusion in the code of a variational autoencoder of digits."""
    begin = time.perf_counter()
    digits, noise = load(), df.Noise(seed)
    torch.manual_seed(seed)
    autoencoder = vae.learn(digits.train, LATENT, steps, noise.fold_in(0))
    with torch.no_grad():
        data, _ = df.reparameterise(*autoencoder.encode(digits.train), noise.fold_in(1))
    standardise = Standardiser(data)
    net = learn(autoencoder, digits.train, standardise, steps, noise.fold_in(2))
    codes = draw(net, data, standardise, noise.fold_in(3)) | {"(reconstructions)": data}
    with torch.no_grad():
        images = {name: autoencoder.decode(z) for name, z in codes.items()}
    critic = Critic(digits)
    qualities = {name: critic(each) for name, each in images.items()}
    print_table(qualities)
    draw_figure(out, codes, images, qualities)
    finish("latent_diffusion", failures(qualities) if steps >= STEPS else [], begin, out)


if __name__ == "__main__":
    typer.run(main)
