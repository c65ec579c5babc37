"""Train a denoiser on scikit-learn's digits with the fused ops and with plain PyTorch, then use it.

Three trainings of the same network from the same start run in turn, a block of steps each:
fused, plain PyTorch on the very same noise (to compare the curves), and plain PyTorch on noise of its own
(what one would write without this library: the one that is timed against the fused loop).
Then: held-out images denoised, samples by DDIM and by annealed Langevin, and a classifier's opinion of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from digits import load
from digits_report import Judgement, Results, draw_figure, draw_strip, failures, print_table
from rich.console import Console
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from tqdm import tqdm

import dae_fast as df

SCHEDULE = df.Schedule.linear(1000)
T = len(SCHEDULE)
STEPS = 1200
DRAWS = 6  # noise levels at which every image is seen in each step
BLOCK = 10  # steps between two readings of the clock
LEARNING_RATE = 7e-3  # 1e-2 trains a little better, but there a rounding can grow until the curves part

Draw = Callable[[int], tuple[Tensor, Tensor]]  # step -> (t, eps)
Step = Callable[[int], tuple[float, float]]  # step -> (loss, noise-MSE), to be logged


class Denoiser(nn.Module):
    """v(x_t, t): an MLP whose hidden units are scaled by the level, from its sinusoidal embedding.

    v = alpha * eps - sigma * x0 gives eps, x0 and the score alike, and suits a small network better than
    eps itself (Salimans and Ho 2022). Without the SiLU this could be any linear denoiser V diag(g_t) V^T.
    """

    def __init__(self, D: int = 64, width: int = 128, features: int = 32) -> None:
        super().__init__()
        frequency = torch.logspace(0, -3, features // 2)
        angle = torch.arange(T)[:, None] * frequency
        self.register_buffer("embedding", torch.cat((angle.sin(), angle.cos()), 1))  # (T, features)
        self.scale = nn.Sequential(nn.Linear(features, 64), nn.SiLU(), nn.Linear(64, width))
        self.first, self.last = nn.Linear(D, width), nn.Linear(width, D)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        scale = 1 + self.scale(self.embedding)  # of all T levels, which are fewer than the samples
        return self.last(F.silu(self.first(x_t) * F.embedding(t, scale)))


def optimiser(net: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    adam = torch.optim.Adam(net.parameters(), LEARNING_RATE, fused=True)
    return adam, torch.optim.lr_scheduler.OneCycleLR(
        adam, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )


def fused_loop(net: nn.Module, x0: Tensor, noise: df.Noise, steps: int) -> Step:
    """The training step with dae_fast."""
    objective = df.nn.DenoisingLoss(SCHEDULE, predict="v")
    adam, rate = optimiser(net, steps)

    def step(k: int) -> tuple[float, float]:
        errors = objective(net, x0, noise.fold_in(k))
        adam.zero_grad()
        errors["loss"].backward()
        adam.step()
        rate.step()
        return errors["loss"].item(), errors["noise_mse"].item()  # errors["x0_mse"] is there too

    return step


def plain_loop(net: nn.Module, x0: Tensor, draw: Draw, steps: int) -> Step:
    """The same step in plain PyTorch."""
    alphas, sigmas = SCHEDULE.alpha.float()[:, None], SCHEDULE.sigma.float()[:, None]
    adam, rate = optimiser(net, steps)

    def step(k: int) -> tuple[float, float]:
        t, eps = draw(k)
        alpha, sigma = alphas[t], sigmas[t]
        x_t = alpha * x0 + sigma * eps
        pred = net(x_t, t)
        loss = F.mse_loss(pred, alpha * eps - sigma * x0)
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        with torch.no_grad():
            noise_mse = F.mse_loss(alpha * pred + sigma * x_t, eps)
            F.mse_loss(alpha * x_t - sigma * pred, x0)  # x0_mse
        return loss.item(), noise_mse.item()

    return step


def fresh_draw(x0: Tensor, seed: int) -> Draw:
    """Noise as one draws it in PyTorch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(k: int) -> tuple[Tensor, Tensor]:
        t = torch.randint(T, x0.shape[:1], generator=generator)
        return t, torch.randn(x0.shape, generator=generator)

    return draw


def same_draw(x0: Tensor, noise: df.Noise) -> Draw:
    """The fused loop's levels and noise, made into tensors."""
    levels = df.nn.DenoisingLoss(SCHEDULE).draw_levels
    return lambda k: (levels(noise.fold_in(k), x0), noise.fold_in(k).normal(x0.shape))


def train(images: Tensor, steps: int, seed: int) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The network trained with the fused ops, the three curves, and the seconds of every block of steps."""
    x0 = images.repeat(DRAWS, 1)
    nets = []
    for _ in range(3):
        torch.manual_seed(seed)
        nets.append(Denoiser())
    noise = df.Noise(seed)
    loops = {
        "fused": fused_loop(nets[0], x0, noise, steps),
        "plain": plain_loop(nets[1], x0, fresh_draw(x0, seed), steps),
        "same noise": plain_loop(nets[2], x0, same_draw(x0, noise), steps),
    }
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for start in tqdm(range(0, steps, BLOCK), f"training, {steps} steps, three loops in turn", mininterval=1):
        block = range(start, min(start + BLOCK, steps))
        for name, step in loops.items():
            begin = time.perf_counter()
            curves[name] += [step(k) for k in block]
            seconds[name].append((time.perf_counter() - begin) / len(block))
    return (
        nets[0],
        {name: torch.tensor(curve).T for name, curve in curves.items()},
        {name: torch.tensor(each) for name, each in seconds.items()},
    )


class LinearDenoiser:
    """The best linear estimate of eps at every level: sigma * (alpha^2 C + sigma^2 I)^-1 (x_t - alpha * mean)."""

    def __init__(self, images: Tensor) -> None:
        images = images.double()
        self.mean = images.mean(0)
        self.variances, self.axes = torch.linalg.eigh(torch.cov(images.T))

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.alpha[t, None], SCHEDULE.sigma[t, None]
        along = (x_t.double() - alpha * self.mean) @ self.axes
        return sigma * (along / (alpha**2 * self.variances + sigma**2)) @ self.axes.T


@torch.no_grad()
def test_mse(net: nn.Module, linear: LinearDenoiser, images: Tensor, noise: df.Noise) -> tuple[float, float]:
    """Noise-MSE of the network and of the best linear denoiser: every image at 16 levels, all levels alike."""
    x0 = images.repeat(16, 1)
    t = torch.arange(len(x0)) * T // len(x0)
    t = t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))]
    level = SCHEDULE[t]
    x_t = df.add_noise(x0, noise, level)
    eps_hat = df.to_eps(x_t, net(x_t, t), level, predict="v")
    return df.noise_mse(eps_hat, noise).item(), df.noise_mse(linear(x_t, t), noise).item()


def langevin_samples(net: nn.Module, shape: tuple[int, ...], noise: df.Noise) -> Tensor:
    """Annealed Langevin with a network trained on the variance-preserving x_t.

    NCSN's states are x0 + sigma' * eps. Multiplied by alpha they are the x_t of the level where
    sigma / alpha = sigma', and the score there, times alpha, is theirs.
    """
    ncsn = df.Schedule.geometric(sigma_min=0.05, sigma_max=20.0, T=24)
    ratio = SCHEDULE.sigma / SCHEDULE.alpha
    nearest = (ratio.log()[None] - ncsn.sigma.log()[:, None]).abs().argmin(1)
    alpha = SCHEDULE.alpha.float()[:, None]

    def score(x: Tensor, i: Tensor) -> Tensor:
        t = nearest[i]
        x_t = alpha[t] * x
        return alpha[t] * df.to_score(x_t, net(x_t, t), SCHEDULE[t], predict="v")

    x = ncsn.sigma[-1].item() * noise.fold_in(-1).normal(shape)
    return df.samplers.annealed_langevin(score, x, ncsn, noise, step_size=0.2 * 0.05**2, steps_per_level=20)


def judge(classifier: MLPClassifier, images: Tensor) -> Judgement:
    """How sure the classifier is of each image, and over how many classes they spread: exp(entropy)."""
    probability = torch.from_numpy(classifier.predict_proba(images.clamp(-1, 1).numpy()))
    spread = torch.special.entr(probability.mean(0)).sum().exp()
    return Judgement(probability.max(1).values.mean().item(), spread.item())


@torch.no_grad()
def denoised(net: nn.Module, images: Tensor, levels: list[int], noise: df.Noise) -> dict[int, tuple[Tensor, Tensor]]:
    """The images noised and denoised at each level."""
    pairs = {}
    for t in levels:
        x_t = df.add_noise(images, noise.fold_in(t), SCHEDULE[t])
        v = net(x_t, torch.full((len(images),), t))
        pairs[t] = x_t, df.to_x0(x_t, v, SCHEDULE[t], predict="v")
    return pairs


def main(
    steps: Annotated[int, typer.Option(min=10, help="Training steps of each loop.")] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
    strip: Annotated[
        Path | None, typer.Option(help="A folder for digits-light.png and -dark.png, the README's.")
    ] = None,
) -> None:
    """Denoising digits with dae_fast and with plain PyTorch."""
    begin = time.perf_counter()
    digits = load()
    training, held_out = digits.train, digits.test

    net, curves, seconds = train(training, steps, seed)
    network_mse, linear_mse = test_mse(net, LinearDenoiser(training), held_out, df.Noise(seed).fold_in(steps))

    shape, noise = tuple(held_out.shape), df.Noise(seed + 1)
    ddim = df.samplers.ddim(net, shape, SCHEDULE, noise, steps=100, predict="v", clamp=1.0)
    langevin = langevin_samples(net, shape, noise)
    classifier = MLPClassifier((64,), alpha=1.0, max_iter=500, random_state=0).fit(training, digits.train_labels)
    judged = {
        "real, held out": held_out,
        "DDIM": ddim,
        "annealed Langevin": langevin,
        "pure noise": noise.normal(shape),
    }

    results = Results(
        curves=curves,
        seconds=seconds,
        network_mse=network_mse,
        linear_mse=linear_mse,
        judgements={name: judge(classifier, each) for name, each in judged.items()},
    )
    draw_figure(out, results, held_out[:8], denoised(net, held_out[:8], [100, 250, 500], noise), ddim, langevin)
    if strip is not None:
        noisy, clean = denoised(net, held_out[:20], [500], noise)[500]
        draw_strip(strip, noisy, clean, ddim)
    print_table(results)
    problems = failures(results, trained=steps >= STEPS)
    for problem in problems:
        Console(stderr=True).print(f"demo: FAILED: {problem}", style="red")
    if problems:
        raise typer.Exit(1)
    typer.echo(f"demo: done in {time.perf_counter() - begin:.0f} s; picture in {out}")


if __name__ == "__main__":
    typer.run(main)
