"""A denoising autoencoder of little noise is a contractive one.

A contractive autoencoder pays for the Frobenius norm of a Jacobian: of its code, which is exact and cheap for a
sigmoid layer (Rifai et al. 2011, "Contractive auto-encoders: explicit invariance during feature extraction"), or of
the whole reconstruction f, estimated by vector-Jacobian products (Hutchinson). To first order in sigma^2 that is what
noise asks for (Alain and Bengio 2014, "What regularized auto-encoders learn from the data generating distribution"):

    E |f(x + sigma * eps) - x|^2 = |f(x) - x|^2 + sigma^2 |df/dx|_F^2 + sigma^2 (f(x) - x) . laplace f(x) + ...,

whose last term vanishes with the error of f. The same network is trained in four ways from the same start: to
reconstruct, with either penalty, and by denoising. Every Jacobian is also worked out in full, and the two sides of
the formula are compared on held-out images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from digits import BLUE, INK, MUTED, ORANGE, DenoisingLayer, finish, load, save, train
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import jacrev, vmap

import dae_fast as df

STEPS = 1000  # of each network
WIDTH = 128
SIGMA = 0.2
CODE_WEIGHT = 0.005  # of the code's Jacobian; that of f has sigma^2, per pixel as the error
SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)
HELD_OUT = 300  # images
SAMPLES = 64  # noises, and directions of the estimates, for each of them
COLOURS = {"plain": MUTED, "contractive code": ORANGE, "contractive f": INK, "denoising": BLUE}


class SigmoidLayer(DenoisingLayer):
    def encode(self, x: Tensor) -> Tensor:
        return torch.sigmoid(torch.nn.functional.linear(x, self.filters, self.hidden_bias))


@dataclass(frozen=True)
class Norm:
    """mean_b |J_b|_F^2 in two ways."""

    exact: float
    estimate: float
    standard_error: float  # of the estimate


@dataclass(frozen=True)
class Result:
    error: float  # |f(x) - x|^2, mean of the images
    code: Norm
    f: Norm
    excess: dict[float, float]  # sigma -> (E |f(x + sigma * eps) - x|^2 - |f(x) - x|^2) / sigma^2
    singular_values: Tensor  # (64,) of df/dx, mean of the images


def reconstruction_error(f: Callable[[Tensor], Tensor], x: Tensor, noisy: Tensor) -> Tensor:
    return df.denoising_loss(f(noisy), x, None, None, predict="x0")


def objective(name: str, f: SigmoidLayer, x: Tensor, noise: df.Noise) -> Tensor:
    if name == "denoising":
        return reconstruction_error(f, x, df.add_noise(x, noise, df.Level(alpha=1.0, sigma=SIGMA)))
    error = reconstruction_error(f, x, x)
    if name == "contractive code":
        return error + CODE_WEIGHT * df.sigmoid_contraction(f.encode(x), f.filters)
    if name == "contractive f":
        return error + SIGMA**2 / x.shape[1] * df.contraction(f, x, noise)
    return error


def norm(exact: Tensor, J: Tensor, estimate: Tensor) -> Norm:
    """exact (B,), J (B, H, D), whose gradients have the variance 2 |J J^T|_F^2 a direction."""
    variance = 2 * (J @ J.mT).square().sum((1, 2)) / SAMPLES
    return Norm(exact.mean().item(), estimate.item(), (variance.mean() / len(J)).sqrt().item())


@torch.no_grad()
def judge(f: SigmoidLayer, x: Tensor, noise: df.Noise) -> Result:
    J_code, J = vmap(jacrev(f.encode))(x), vmap(jacrev(f))(x)
    code = df.sigmoid_contraction(f.encode(x), f.filters, reduction="none")
    estimates = (df.contraction(each, x, noise, samples=SAMPLES) for each in (f.encode, f))
    D, excess, clean = x.shape[1], {}, reconstruction_error(f, x, x)
    for sigma in SIGMAS:
        level = df.Level(alpha=1.0, sigma=sigma)
        noisy = [reconstruction_error(f, x, df.add_noise(x, noise.fold_in(k), level)) for k in range(SAMPLES)]
        excess[sigma] = D * (torch.stack(noisy).mean() - clean).item() / sigma**2
    return Result(
        error=D * clean.item(),
        code=norm(code, J_code, next(estimates)),
        f=norm(J.square().sum((1, 2)), J, next(estimates)),
        excess=excess,
        singular_values=torch.linalg.svdvals(J).mean(0),
    )


def learn(name: str, images: Tensor, held_out: Tensor, steps: int, seed: int) -> Result:
    torch.manual_seed(seed)
    f, noise = SigmoidLayer(images.shape[1], WIDTH), df.Noise(seed)
    train(f, lambda step: objective(name, f, images, noise.fold_in(step)), steps, rate=1e-2, title=name)
    return judge(f, held_out, noise.fold_in(-1))


def print_table(results: dict[str, Result]) -> None:
    table = Table(
        title="Squared Jacobians at held-out digits, of the code and of the reconstruction f",
        caption=f"Hutchinson: {SAMPLES} directions an image; excess: what noise of sigma = {SIGMA} adds to the error "
        "|f(x) - x|², over sigma²",
    )
    columns = "training", "error", "code: exact", "Hutchinson", "f: full Jacobian", "Hutchinson", "excess"
    for column in columns:
        table.add_column(column, justify="right" if table.columns else "left")
    for name, each in results.items():
        norms = each.code.exact, each.code.estimate, each.f.exact, each.f.estimate, each.excess[SIGMA]
        table.add_row(name, f"{each.error:.3f}", *(f"{value:.3f}" for value in norms))
    Console().print(table)


def draw_figure(out: Path, results: dict[str, Result]) -> None:
    figure, (spectrum, formula) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, each in results.items():
        style = {"color": COLOURS[name], "label": name, "ls": "--" if name == "contractive f" else "-"}
        spectrum.plot(range(1, len(each.singular_values) + 1), each.singular_values, **style)
        formula.semilogx(SIGMAS, [value / each.f.exact for value in each.excess.values()], marker="o", **style)
    spectrum.set(title="Singular values of df/dx, mean of held-out images", xlabel="number", ylim=0)
    formula.axhline(1, color=MUTED, lw=0.8, ls=":")
    formula.set(title="What noise adds to the error, over sigma² |df/dx|²", xlabel="sigma")
    formula.set_xticks(SIGMAS, [f"{sigma:g}" for sigma in SIGMAS])
    formula.minorticks_off()
    for axis in (spectrum, formula):
        axis.legend(frameon=False)
    save(figure, out)


def failures(results: dict[str, Result], *, trained: bool) -> list[str]:
    problems = []
    for name, each in results.items():
        for of, both in {"code": each.code, "f": each.f}.items():
            if not abs(both.estimate - both.exact) < 5 * both.standard_error:
                problems.append(
                    f"{name}: Hutchinson's {both.estimate:.4f} of the {of} is not within five standard errors, "
                    f"{both.standard_error:.4f}, of {both.exact:.4f}"
                )
    if not trained:
        return problems
    for name, part in {"contractive code": "code", "contractive f": "f", "denoising": "f"}.items():
        with_it, without = (getattr(results[each], part).exact for each in (name, "plain"))
        if not with_it < 0.85 * without:
            problems.append(f"{name}: the {part}'s {with_it:.2f} is not below 0.85 of {without:.2f}, the plain one's")
    penalised, denoising = results["contractive f"].f.exact, results["denoising"]
    if not abs(denoising.f.exact / penalised - 1) < 0.05:
        problems.append(f"denoising: the f's {denoising.f.exact:.2f} is not within 5% of the penalty's {penalised:.2f}")
    if not abs(denoising.excess[SIGMA] / denoising.f.exact - 1) < 0.05:
        problems.append(
            f"denoising: noise adds {denoising.excess[SIGMA]:.2f} sigma², not within 5% of {denoising.f.exact:.2f}"
        )
    return problems


def main(
    steps: Annotated[
        int, typer.Option(min=20, help="Training steps of a network; the claim is judged from the default on.")
    ] = STEPS,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("contractive.png"),
) -> None:
    """Contractive autoencoders and a denoising one on digits, by their Jacobians."""
    begin = time.perf_counter()
    digits = load(n_train=1000)
    results = {name: learn(name, digits.train, digits.test[:HELD_OUT], steps, seed) for name in COLOURS}
    print_table(results)
    draw_figure(out, results)
    finish("contractive", failures(results, trained=steps >= STEPS), begin, out)


if __name__ == "__main__":
    typer.run(main)
