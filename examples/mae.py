"""A masked autoencoder fills in patches that it has never seen.

Of the sixteen 2x2 patches of a digit a random share is removed. The encoder, a small transformer, sees the
others alone; the decoder gets their codes back in place, with a learned token where a patch is missing, and the loss
counts the removed patches alone (He et al. 2022, "Masked autoencoders are scalable vision learners"; an MLP stands in
for their decoder, which on images this small does as well for less).

Baselines: the mean of each removed patch over the training images, and the best linear prediction from the visible
pixels, the conditional mean of a Gaussian with the training images' mean and covariance.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from digits import BLUE, MUTED, ORANGE, finish, load, mlp, save, show_tiles, train
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dae_fast as df
from dae_fast.ops.corruption import PatchMask

STEPS = 1000
BATCH = 500
RATIOS = (0.25, 0.5, 0.75)  # removed, in turn
PATCHES, PIXELS = 16, 4  # of an image, of a patch
WIDTH, CODE = 32, 16
SHOWN = 0.75
DRAWS = 8  # of masks for each held-out image
RIDGE = 1e-3  # added to the covariance, whose corner pixels hardly vary

COLOURS = {"masked autoencoder": BLUE, "linear": ORANGE, "mean patch": MUTED}
Fill = Callable[[Tensor, PatchMask], Tensor]  # patches (B, 16, 4), of which the visible are read -> all of them


def to_patches(images: Tensor) -> Tensor:
    """(B, 64) -> (B, 16, 4), row by row."""
    return images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, PATCHES, PIXELS)


def to_images(patches: Tensor) -> Tensor:
    return patches.reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, PATCHES * PIXELS)


def pick(x: Tensor, ids: Tensor) -> Tensor:
    """x[b, ids[b]]: (B, N, D) and (B, K) -> (B, K, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


class MaskedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(PATCHES, WIDTH))
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.to_code = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CODE))
        self.token = nn.Parameter(0.1 * torch.randn(CODE))
        self.decoder = mlp(PATCHES * CODE, 256, 256, PATCHES * PIXELS)

    def forward(self, patches: Tensor, removed: PatchMask) -> Tensor:
        visible = self.embed(pick(patches, removed.ids_keep)) + self.position[removed.ids_keep]
        codes = self.to_code(self.encoder(visible))
        B, K = removed.ids_keep.shape
        in_place = pick(torch.cat((codes, self.token.expand(B, PATCHES - K, CODE)), 1), removed.ids_restore)
        return self.decoder(in_place.flatten(1)).reshape(patches.shape)


class LinearFill:
    """E[x | visible pixels v] of a Gaussian: mean + C[:, v] C[v, v]^-1 (x - mean)[v]."""

    def __init__(self, patches: Tensor) -> None:
        pixels = patches.flatten(1).double()
        self.mean, self.C = pixels.mean(0), torch.cov(pixels.T) + RIDGE * torch.eye(pixels.shape[1])

    def __call__(self, patches: Tensor, removed: PatchMask) -> Tensor:
        seen = (~removed.mask).repeat_interleave(PIXELS, 1).double()
        # Each image's own C[v, v], with ones on the diagonal in place of the removed pixels.
        visible = seen[:, :, None] * self.C * seen[:, None] + torch.diag_embed(1 - seen)
        weights = torch.linalg.solve(visible, seen * (patches.flatten(1) - self.mean))
        return (self.mean + weights @ self.C).to(patches.dtype).reshape(patches.shape)


def removed_error(fill: Fill, patches: Tensor, removed: PatchMask) -> Tensor:
    """Mean square over the removed patches."""
    return df.denoising_loss(fill(patches, removed), patches, None, None, predict="x0", mask=removed.mask[:, :, None])


def learn(patches: Tensor, steps: int, seed: int) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    net, noise = MaskedAutoencoder(), df.Noise(seed)
    order = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        batch = patches[torch.randint(len(patches), (BATCH,), generator=order)]
        return removed_error(net, batch, df.patch_mask(noise.fold_in(step), BATCH, PATCHES, RATIOS[step % len(RATIOS)]))

    train(net, loss, steps, title="training the masked autoencoder")
    return net.eval()


@torch.no_grad()
def judge(fills: dict[str, Fill], patches: Tensor, noise: df.Noise) -> dict[str, dict[float, float]]:
    """method -> ratio -> error, each with the same masks for all."""
    errors: dict[str, dict[float, float]] = {name: {} for name in fills}
    for ratio in RATIOS:
        masks = [df.patch_mask(noise.fold_in(k), len(patches), PATCHES, ratio) for k in range(DRAWS)]
        for name, fill in fills.items():
            drawn = [removed_error(fill, patches, removed) for removed in masks]
            errors[name][ratio] = torch.stack(drawn).mean().item()
    return errors


def print_table(errors: dict[str, dict[float, float]]) -> None:
    table = Table(
        title="Removed 2x2 patches of held-out digits",
        caption="mean square error of the removed pixels, which lie in [-1, 1]",
    )
    table.add_column("filled in by")
    for ratio in RATIOS:
        table.add_column(f"{ratio:.0%} removed", justify="right")
    for name, by_ratio in errors.items():
        table.add_row(name, *(f"{error:.4f}" for error in by_ratio.values()))
    Console().print(table)


@torch.no_grad()
def draw_figure(
    out: Path, fills: dict[str, Fill], errors: dict[str, dict[float, float]], patches: Tensor, noise: df.Noise
) -> None:
    figure, (bars, examples) = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained", width_ratios=(1, 1.6))
    for i, (name, by_ratio) in enumerate(errors.items()):
        at = [place + 0.27 * (i - 1) for place in range(len(RATIOS))]
        bars.bar(at, by_ratio.values(), 0.25, color=COLOURS[name], label=name)
    bars.set_xticks(range(len(RATIOS)), [f"{ratio:.0%}" for ratio in RATIOS])
    bars.set(title="Error of removed patches, held-out images", xlabel="removed", ylim=(0, 0.4))
    bars.legend(frameon=False)

    removed = df.patch_mask(noise, len(patches), PATCHES, SHOWN)
    gone = removed.mask[:, :, None]
    rows = [patches, torch.where(gone, 0.0, patches)]
    rows += [torch.where(gone, fill(patches, removed), patches).clamp(-1, 1) for fill in fills.values()]
    title = f"Held out; {SHOWN:.0%} removed (grey); filled in by " + ", ".join(fills)
    show_tiles(examples, to_images(torch.cat(rows)), len(patches), title)
    save(figure, out)


def failures(errors: dict[str, dict[float, float]]) -> list[str]:
    ours, *others = COLOURS
    return [
        f"with {ratio:.0%} removed, error {errors[ours][ratio]:.4f} of the {ours} is not below "
        f"{errors[other][ratio]:.4f} of the {other}"
        for ratio in RATIOS
        for other in others
        if not errors[ours][ratio] < errors[other][ratio]
    ]


def main(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps; the claim is judged from the default on.")
    ] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("mae.png"),
) -> None:
    """A masked autoencoder of digits against a linear prediction."""
    begin = time.perf_counter()
    digits = load()
    patches, held_out = to_patches(digits.train), to_patches(digits.test)
    net, mean = learn(patches, steps, seed), patches.mean(0)
    fills: dict[str, Fill] = {
        "masked autoencoder": net,
        "linear": LinearFill(patches),
        "mean patch": lambda patches, _: mean.expand_as(patches),
    }
    noise = df.Noise(seed).fold_in(-1)
    errors = judge(fills, held_out, noise)
    print_table(errors)
    draw_figure(out, fills, errors, held_out[:12], noise.fold_in(-1))
    finish("mae", failures(errors) if steps >= STEPS else [], begin, out)


if __name__ == "__main__":
    typer.run(main)
