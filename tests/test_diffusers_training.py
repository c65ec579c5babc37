"""The lines of docs/diffusers.md for diffusers' training scripts, beside the scripts' own: equal losses in training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dae_fast as df

diffusers = pytest.importorskip("diffusers")
from diffusers import training_utils as upstreams  # noqa: E402

from dae_fast.ops.noising import PERTURBATION_TAG  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SHAPE, STEPS = (4, 2, 8, 8), 10
scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other cost these small tensors 70 ms at every backward."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lines() -> dict:
    """What the page defines."""
    page = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text()
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layers(x + t.view(-1, 1, 1, 1) / 1000)


def trains_alike(theirs: Callable, ours: Callable, rtol: float = 2e-5, lr: float = 0.05) -> None:
    """theirs(model, x0, noise) with the tensor, ours with the Noise: the losses of ten steps, and the weights."""
    models = [Network(), Network()]
    optimizers = [torch.optim.SGD(m.parameters(), lr) for m in models]
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x0 = torch.randn(SHAPE, generator=generator)
        u = torch.rand(SHAPE[0], generator=generator)
        noise = df.Noise(5).fold_in(step)
        losses = [f(m, x0, u, noise) for f, m in zip((theirs, ours), models, strict=True)]
        torch.testing.assert_close(losses[1], losses[0].to(losses[1].dtype), rtol=rtol, atol=0.0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def timesteps(u: torch.Tensor) -> torch.Tensor:
    return (u * 1000).long()


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_unconditional(lines: dict, prediction: str) -> None:
    def theirs(model, x0, u, noise):
        t, eps = timesteps(u), noise.normal(SHAPE)
        output = model(scheduler.add_noise(x0, eps, t), t)
        if prediction == "epsilon":
            return F.mse_loss(output.float(), eps.float())
        alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (alpha_bar / (1 - alpha_bar) * F.mse_loss(output.float(), x0.float(), reduction="none")).mean()

    def ours(model, x0, u, noise):
        return lines["unconditional_loss"](model, x0, timesteps(u), noise, prediction)

    if prediction == "epsilon":
        trains_alike(theirs, ours)
    else:
        trains_alike(theirs, ours, 1e-4, 1e-5)  # weights to 1e4, of upstream's 1 - alpha_bar in float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("options", [{}, {"noise_offset": 0.1}, {"input_perturbation": 0.1}, {"snr_gamma": 5.0}])
def test_text_to_image(lines: dict, prediction: str, options: dict) -> None:
    def theirs(model, x0, u, noise):
        t, eps = timesteps(u), noise.normal(SHAPE)
        if "noise_offset" in options:
            eps = df.OffsetNoise(noise, options["noise_offset"]).normal(SHAPE)
        fed = eps + options.get("input_perturbation", 0.0) * noise.fold_in(PERTURBATION_TAG).normal(SHAPE)
        noisy = scheduler.add_noise(x0, fed, t)
        target = eps if prediction == "epsilon" else scheduler.get_velocity(x0, eps, t)
        pred = model(noisy, t)
        if "snr_gamma" not in options:
            return F.mse_loss(pred.float(), target.float())
        snr = upstreams.compute_snr(scheduler, t)
        weights = torch.stack([snr, options["snr_gamma"] * torch.ones_like(t)], dim=1).min(dim=1)[0]
        weights = weights / (snr if prediction == "epsilon" else snr + 1)
        return (F.mse_loss(pred, target, reduction="none").mean(dim=[1, 2, 3]) * weights).mean()

    def ours(model, x0, u, noise):
        return lines["text_to_image_loss"](model, x0, timesteps(u), noise, prediction, **options)

    trains_alike(theirs, ours)


def test_dream(lines: dict) -> None:
    def theirs(model, x0, u, noise):
        t, eps = timesteps(u), noise.normal(SHAPE)

        def unet(x, t, _):
            return SimpleNamespace(sample=model(x, t))

        noisy, target = upstreams.compute_dream_and_update_latents(
            unet, scheduler, t, eps, scheduler.add_noise(x0, eps, t), eps, None, 2.0
        )
        return F.mse_loss(model(noisy, t).float(), target.float())

    def ours(model, x0, u, noise):
        return lines["dream_loss"](model, x0, timesteps(u), noise, detail_preservation=2.0)

    trains_alike(theirs, ours)


def test_offset_noise_is_the_scripts() -> None:
    noise = df.Noise(3)
    added = df.OffsetNoise(noise, 0.1).normal(SHAPE) - noise.normal(SHAPE)
    torch.testing.assert_close(added, added[:, :, :1, :1].expand(SHAPE), rtol=0.0, atol=1e-6)
    assert 0.02 < added[:, :, 0, 0].std().item() < 0.3


@pytest.mark.parametrize("prior", [None, 0.7])
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("scheme", ["logit_normal", "sigma_sqrt", "cosmap"])
def test_sd3(lines: dict, scheme: str, precondition: bool, prior: float | None) -> None:
    def theirs(model, x0, u, noise):
        indices, eps = timesteps(u), noise.normal(SHAPE)
        sigmas = flow.sigmas[indices].view(-1, 1, 1, 1)
        noisy = (1.0 - sigmas) * x0 + sigmas * eps
        pred = model(noisy, flow.timesteps[indices])
        pred = pred * (-sigmas) + noisy if precondition else pred
        target = x0 if precondition else eps - x0
        weighting = upstreams.compute_loss_weighting_for_sd3(scheme, sigmas)
        each = torch.mean((weighting.float() * (pred.float() - target.float()) ** 2).reshape(len(x0), -1), 1)
        if prior is None:
            return each.mean()
        instance, of_prior = each.chunk(2)  # the weights with them, which upstream's lines do not chunk
        return instance.mean() + prior * of_prior.mean()

    def ours(model, x0, u, noise):
        return lines["sd3_loss"](model, x0, timesteps(u), noise, scheme, precondition, prior)

    trains_alike(theirs, ours, 1e-4)


@pytest.mark.parametrize(
    ("scheme", "options", "density"),
    [
        ("logit_normal", {"logit_mean": 0.4, "logit_std": 0.8}, df.LogitNormal(-0.4, 0.8)),
        ("mode", {"mode_scale": 1.29}, df.Mode(1.29)),
        ("none", {}, df.Uniform(0.0, 1.0)),
    ],
)
def test_densities(scheme: str, options: dict, density: object) -> None:
    """Upstream's u and 1 - t are of one law: no two distribution functions are far apart."""
    n = 40_000
    u = upstreams.compute_density_for_timestep_sampling(
        scheme, n, **options, generator=torch.Generator().manual_seed(0)
    )
    t = df.ContinuousSchedule.flow(density=density).draw(df.Noise(0), n)
    grid = torch.linspace(0.02, 0.98, 25)[:, None]
    apart = ((u < grid).double().mean(1) - (1 - t < grid).double().mean(1)).abs().max()
    assert apart < 2.2 * math.sqrt(2 / n)  # Kolmogorov-Smirnov at 1e-4
