"""What the small examples share: the digits, networks, the denoising loss, training, a probe, tiles, the last line.

Each of them is a script of its own, run as `python examples/NAME.py`, which puts this folder on the path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import matplotlib
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm import tqdm

import dae_fast as df

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, BLUE, ORANGE = "#222222", "#9a9a9a", "#1f5fa8", "#e07b1a"
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


@dataclass(frozen=True)
class Digits:
    """1797 handwritten digits of 8x8 pixels (scikit-learn's, from UCI), in a fixed random order."""

    train: Tensor  # (1500, 64) fp32, -1 paper to 1 ink
    train_labels: Tensor  # (1500,) int64, 0 to 9
    test: Tensor  # (297, 64)
    test_labels: Tensor


def load(n_train: int = 1500) -> Digits:
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(pixels / 8 - 1, dtype=torch.float32)[order], torch.tensor(digits)[order]
    return Digits(images[:n_train], labels[:n_train], images[n_train:], labels[n_train:])


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with SiLU between them."""
    layers = [layer for D, H in pairwise(widths) for layer in (nn.Linear(D, H), nn.SiLU())]
    return nn.Sequential(*layers[:-1])


class DenoisingLayer(nn.Module):
    """f(x) = W^T relu(W x + b) + c: an autoencoder with one hidden layer and tied weights (Vincent et al. 2010).

    W starts small, so that what it is in the end was learned.
    """

    def __init__(self, D: int, H: int) -> None:
        super().__init__()
        self.filters = nn.Parameter(0.1 * torch.randn(H, D) / math.sqrt(D))
        self.hidden_bias, self.visible_bias = nn.Parameter(torch.zeros(H)), nn.Parameter(torch.zeros(D))

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.filters, self.hidden_bias))

    def decode(self, code: Tensor) -> Tensor:
        return F.linear(code, self.filters.T, self.visible_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def denoising_loss(
    net: Callable[[Tensor], Tensor],
    x0: Tensor,
    noise: df.Noise,
    level: df.Level,
    *,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """A denoising autoencoder's |f(x_t) - x0|^2 over sigma^2 / alpha^2: the error in eps that its x0 implies.

    1 is what f(x_t) = x_t / alpha, no denoising at all, has at every level. x0: (B, ...)
    returns: the mean over the batch, or (B,) with reduction="none". Vincent et al. 2010.
    """
    x_t = df.add_noise(x0, noise, level)
    return df.noise_mse(df.to_eps(x_t, net(x_t), level, predict="x0"), noise, reduction=reduction)


def train(net: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: float = 5e-3, *, title: str) -> None:
    """Adam on loss(step), the rate warmed up over the first tenth of the steps and then lowered to nothing."""
    adam = torch.optim.Adam(net.parameters(), rate, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    for step in tqdm(range(steps), title, leave=False, mininterval=1):
        adam.zero_grad()
        loss(step).backward()
        adam.step()
        rates.step()


def label_draws(labels: Tensor, per_class: int, draws: int, seed: int) -> list[Tensor]:
    """Indices of `per_class` random samples of every class, `draws` times."""
    g = torch.Generator().manual_seed(seed)
    of_class = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    return [torch.cat([i[torch.randperm(len(i), generator=g)[:per_class]] for i in of_class]) for _ in range(draws)]


def probe(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, chosen: list[Tensor], C: float = 1.0
) -> Tensor:
    """Test accuracy of a linear classifier trained on each choice of labelled samples, (draws,).

    The features (N, H) are centred and brought to unit mean variance by the unlabelled training set, so that
    C, the inverse strength of the penalty, means the same for all.
    """
    mean, scale = train.mean(0), train.var(0).mean().sqrt()
    train, test = (train - mean) / scale, (test - mean) / scale
    fitted = (LogisticRegression(C=C, max_iter=2000).fit(train[i], labels[i]) for i in chosen)
    return torch.tensor([classifier.score(test, test_labels) for classifier in fitted])


def tiles(images: Tensor, columns: int, margin: float = -1.0) -> Tensor:
    """Square images (N, side*side) laid out in rows of `columns`, which divides N, a pixel of margin around each."""
    side = math.isqrt(images.shape[1])
    squares = F.pad(images.reshape(-1, columns, side, side), (1, 1, 1, 1), value=margin)
    return squares.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def show_tiles(axis: Axes, images: Tensor, columns: int, title: str = "") -> None:
    """Images with values from -1 to 1, as ink on paper."""
    axis.imshow(tiles(images, columns), cmap="gray_r", vmin=-1, vmax=1)
    axis.axis("off")
    axis.set_title(title)


def show_filters(axis: Axes, filters: Tensor, columns: int, title: str = "") -> None:
    """The columns^2 largest filters of (H, 64), the largest first, each scaled by itself; 0 is white."""
    largest = filters[filters.norm(dim=1).argsort(descending=True)[: columns**2]]
    scaled = largest / largest.abs().amax(1, keepdim=True)
    axis.imshow(tiles(scaled, columns, margin=0.0), cmap="RdBu", vmin=-1, vmax=1)
    axis.axis("off")
    axis.set_title(title)


def save(figure: Figure, out: Path) -> None:
    figure.savefig(out, dpi=130)
    plt.close(figure)


def finish(name: str, problems: list[str], begin: float, out: Path) -> None:
    """The verdict: what does not hold and exit status 1, or the last line."""
    for problem in problems:
        Console(stderr=True).print(f"{name}: FAILED: {problem}", style="red")
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{name}: done in {time.perf_counter() - begin:.0f} s; picture in {out}")
