"""docs/clients.md: each client's own training and conversions beside the page's lines; skipped where not installed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import dae_fast as df

PAGE = (Path(__file__).parents[1] / "docs" / "clients.md").read_text()
SHAPE, STEPS = (4, 3, 8, 8), 50
pytestmark = pytest.mark.filterwarnings("ignore")  # the clients'


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    torch.set_num_threads(1)


def client(name: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def section(title: str) -> SimpleNamespace:
    """What the page's blocks under a heading define."""
    names: dict = {"torch": torch, "df": df}
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    for block in re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE):
        exec(block, names)
    return SimpleNamespace(**names)


class Network(torch.nn.Module):
    """What the clients ask for beside: denoising-diffusion-pytorch's attributes."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self, random: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.random_or_learned_sinusoidal_cond = random
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8))

    def forward(self, x: Tensor, t: Tensor, *_: object) -> Tensor:
        return self.layers(x + torch.sin(t.float().flatten())[:, None, None, None])


def trains_alike(theirs: Callable, ours: Callable, networks: tuple, lr: float = 0.05, rtol: float = 1e-4) -> None:
    """theirs(x, u, eps) and ours(x, u, noise), u uniform: 50 losses, and the weights they end in."""
    before = [p.detach().clone() for p in networks[0].parameters()]
    optimizers = [torch.optim.SGD(net.parameters(), lr) for net in networks]
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x, u = torch.rand(SHAPE, generator=generator), torch.rand(SHAPE[0], generator=generator)
        noise = df.Noise(5).fold_in(step)
        losses = [f(x, u, n) for f, n in ((theirs, noise.normal(SHAPE)), (ours, noise))]
        torch.testing.assert_close(losses[1], losses[0], rtol=rtol, atol=0.0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, mine, start in zip(*(net.parameters() for net in networks), before, strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-3, atol=1e-5)
        assert (p - start).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("pred_noise", {}),
        ("pred_v", {"min_snr_loss_weight": True, "beta_schedule": "cosine"}),
        ("pred_x0", {"min_snr_loss_weight": True, "beta_schedule": "linear"}),
    ],
)
def test_denoising_diffusion_pytorch(objective: str, options: dict) -> None:
    client("denoising_diffusion_pytorch")
    page = section("denoising-diffusion-pytorch")
    options = {"image_size": 8, "objective": objective, "timesteps": 100, "sampling_timesteps": 12, **options}
    theirs, ours = page.GaussianDiffusion(Network(), **options), page.FusedDiffusion(Network(), **options)

    def step(diffusion):
        return lambda x, u, noise: diffusion(x, times=(u * 100).long(), noise=noise)

    trains_alike(step(theirs), step(ours), (theirs, ours))
    x, y, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 20, 60, 90])
    for method, arguments in (
        ("q_sample", (x, t, y)),
        ("predict_start_from_noise", (x, t, y)),
        ("predict_noise_from_start", (x, t, y)),
        ("predict_v", (x, t, y)),
        ("predict_start_from_v", (x, t, y)),
        ("q_posterior", (x, y, t)),
        ("p_losses", (x, t, y.clone(), 0.0, "none")),
    ):
        wanted, got = (getattr(d, method)(*arguments) for d in (theirs, ours))
        ours.model = theirs.model
        for mine, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, wanted)), strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-3 if method == "p_losses" else 1e-4, atol=1e-4)


def test_ddim_of_denoising_diffusion_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one start, eta 0: the client's loop, its loop on the fused methods, and the sampler."""
    client("denoising_diffusion_pytorch")
    page = section("denoising-diffusion-pytorch")
    options = {"image_size": 8, "objective": "pred_v", "timesteps": 100, "sampling_timesteps": 12}
    theirs, ours = page.GaussianDiffusion(Network(), **options), page.FusedDiffusion(Network(), **options)
    x = torch.randn(SHAPE)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", lambda *_, **__: x)
        wanted, fused = (d.ddim_sample(SHAPE) for d in (theirs, ours))
    torch.testing.assert_close(fused, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(page.ddim_sample(ours, x, df.Noise(0)), wanted, rtol=1e-4, atol=1e-4)


def test_offset_noise_of_denoising_diffusion_pytorch() -> None:
    client("denoising_diffusion_pytorch")
    page = section("denoising-diffusion-pytorch")
    options = {"image_size": 8, "objective": "pred_v", "timesteps": 100}
    theirs, ours = page.GaussianDiffusion(Network(), **options), page.FusedDiffusion(Network(), **options)
    x, t, noise = torch.randn(SHAPE), torch.tensor([0, 20, 60, 90]), df.Noise(2)
    stored = df.OffsetNoise(noise, 0.1).normal(SHAPE)
    torch.testing.assert_close(ours.p_losses(x, t, noise, 0.1), theirs.p_losses(x, t, stored, 0.0), rtol=1e-4, atol=0.0)


def test_elucidated_diffusion(monkeypatch: pytest.MonkeyPatch) -> None:
    client("denoising_diffusion_pytorch")
    page = section("denoising-diffusion-pytorch")
    theirs = page.ElucidatedDiffusion(Network(random=True), image_size=8)
    ours = page.FusedElucidated(Network(random=True), image_size=8)

    def sigma(u: Tensor) -> Tensor:
        return (3 * (u - 0.5)).exp()

    def of_theirs(x, u, eps):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn_like", lambda _: eps)
            return theirs(x, sigma=sigma(u))

    trains_alike(of_theirs, lambda x, u, noise: ours(x, noise, sigma(u)), (theirs, ours))


@pytest.mark.parametrize("weighting", ["karras", "soft-min-snr", "snr"])
def test_k_diffusion_denoiser(weighting: str) -> None:
    client("k_diffusion")
    page = section("k-diffusion")
    theirs, ours = (d(Network(), sigma_data=0.5, weighting=weighting) for d in (page.K.Denoiser, page.FusedDenoiser))

    def step(denoiser):
        return lambda x, u, noise: denoiser.loss(x, noise, (3 * (u - 0.5)).exp()).mean()

    trains_alike(step(theirs), step(ours), (theirs, ours))
    x, sigma = torch.randn(SHAPE), torch.tensor([0.1, 1.0, 5.0, 40.0])
    ours.inner_model = theirs.inner_model
    torch.testing.assert_close(ours(x, sigma), theirs(x, sigma), rtol=1e-4, atol=1e-5)


def test_k_diffusion_eps_denoiser() -> None:
    client("k_diffusion")
    page = section("k-diffusion")
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    made = page.K.external.DiscreteEpsDDPMDenoiser, page.FusedEpsDenoiser
    theirs, ours = (d(Network(), alpha_bar, quantize=False) for d in made)

    def step(denoiser):
        return lambda x, u, noise: denoiser.loss(x, noise, (3 * (u - 0.5)).exp()).mean()

    trains_alike(step(theirs), step(ours), (theirs, ours))
    x, sigma = torch.randn(SHAPE), torch.tensor([0.1, 1.0, 5.0, 40.0])
    ours.inner_model = theirs.inner_model
    torch.testing.assert_close(ours(x, sigma), theirs(x, sigma), rtol=1e-4, atol=1e-4)


def test_k_diffusion_samplers() -> None:
    """The client's samplers with keyed noise, and one launch a step with the same; its callback sees every step."""
    client("k_diffusion")
    page = section("k-diffusion")
    denoiser = page.FusedDenoiser(Network(), sigma_data=0.5)
    schedule, noise, steps = df.Schedule.karras(6, 0.1, 10.0), df.Noise(4), []
    sigmas = torch.cat([schedule.sigma.flip(0), torch.zeros(1, dtype=torch.float64)]).float()
    x = 10 * torch.randn(SHAPE)

    levels = iter(range(5, -1, -1))  # which the samplers here fold in, not the number of the step
    with torch.no_grad():
        wanted = page.K.sampling.sample_euler_ancestral(
            denoiser,
            x,
            sigmas,
            noise_sampler=lambda *_: noise.fold_in(next(levels)).normal(SHAPE),
            callback=steps.append,
            disable=True,
        )
        one_launch = df.samplers.euler_ancestral(
            denoiser, x, schedule, noise, steps=6, predict="x0", conditioning="sigma"
        )
        whole, part = (
            page.K.sampling.sample_euler_ancestral(
                denoiser, start, sigmas, noise_sampler=page.keyed_sampler(start, noise), disable=True
            )
            for start in (x, x[:2])
        )
        heun = page.K.sampling.sample_heun(denoiser, x, sigmas, disable=True)
        ours = df.samplers.heun(denoiser, x, schedule, noise, steps=6, predict="x0", conditioning="sigma")
    torch.testing.assert_close(one_launch, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours, heun, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(part, whole[:2], rtol=1e-5, atol=1e-5)
    assert [s["i"] for s in steps] == list(range(6))


@pytest.mark.parametrize("loss", ["edm", "vp", "ve"])
def test_edm_losses(loss: str) -> None:
    """The losses as the paper's code writes them, out of its formulas."""
    page = section("EDM")

    def sigmas(u: Tensor) -> Tensor:
        u = u.view(-1, 1, 1, 1)
        if loss == "edm":
            return (1.2 * torch.special.ndtri(u * 0.98 + 0.01) - 1.2).exp()
        if loss == "vp":
            t = 1 + u * (1e-5 - 1)
            return ((0.5 * 19.9 * t**2 + 0.1 * t).exp() - 1).sqrt()
        return 0.02 * (100 / 0.02) ** u

    nets = Network(), Network()

    def precondition(net: Network, x: Tensor, sigma: Tensor) -> Tensor:
        total = (sigma**2 + 0.25).sqrt()
        return 0.25 / total**2 * x + sigma * 0.5 / total * net(x / total, sigma.log() / 4)

    def theirs(x, u, eps):
        sigma = sigmas(u)
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 if loss == "edm" else 1 / sigma**2
        return (weight * (precondition(nets[0], x + eps * sigma, sigma) - x) ** 2).sum()

    def ours(x, u, noise):
        made = page.edm_loss if loss == "edm" else page.vp_or_ve_loss
        return made(lambda x_t, sigma: precondition(nets[1], x_t, sigma), x, noise, sigmas(u))

    trains_alike(theirs, ours, nets, lr=2e-5, rtol=1e-3)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_torchcfm(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    client("torchcfm")
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    page, matcher, nets = section("torchcfm"), ConditionalFlowMatcher(sigma=sigma), (Network(), Network())
    source = torch.randn(SHAPE)

    def theirs(x, u, eps):
        with monkeypatch.context() as patched:
            patched.setattr(matcher, "sample_noise_like", lambda _: eps)
            t, xt, ut = matcher.sample_location_and_conditional_flow(source if sigma else eps, x, t=u)
        return torch.mean((nets[0](xt, t) - ut) ** 2)

    def ours(x, u, noise):
        if sigma:
            return page.coupled_cfm_loss(nets[1], source, x, noise, u, sigma)
        return page.cfm_loss(nets[1], x, noise, u)

    trains_alike(theirs, ours, nets)


@pytest.mark.parametrize("name", ["CondOTScheduler", "VPScheduler", "CosineScheduler"])
def test_flow_matching(name: str) -> None:
    client("flow_matching")
    from flow_matching.path import AffineProbPath
    from flow_matching.path import scheduler as schedulers

    page, path, nets = section("flow_matching"), AffineProbPath(getattr(schedulers, name)()), (Network(), Network())

    def theirs(x, u, eps):
        sample = path.sample(x_0=eps, x_1=x, t=u)
        return torch.pow(nets[0](sample.x_t, u) - sample.dx_t, 2).mean()

    trains_alike(theirs, lambda x, u, noise: page.path_loss(nets[1], path, x, noise, u), nets, lr=0.01)
    x_t, velocity, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0.1, 0.3, 0.5, 0.9])
    per_sample = SimpleNamespace(scheduler=lambda _: path.scheduler(t.view(-1, 1, 1, 1)))
    wanted = path.velocity_to_target(velocity, x_t, t.view(-1, 1, 1, 1))
    assert per_sample.scheduler(t).alpha_t.shape == (4, 1, 1, 1)
    torch.testing.assert_close(page.velocity_to_target(path, velocity, x_t, t), wanted, rtol=1e-4, atol=1e-5)


def test_the_sign_of_a_flow() -> None:
    """Ours is the noise less the data; theirs is its negative, at 1 - t."""
    x1, noise, t = torch.randn(SHAPE), df.Noise(1), torch.tensor([0.1, 0.3, 0.5, 0.9])
    x_t, target = df.add_noise(x1, noise, df.Level(alpha=t, sigma=1 - t), target="flow")
    eps = noise.normal(SHAPE)
    torch.testing.assert_close(target, -(x1 - eps))
    torch.testing.assert_close(x_t, t.view(-1, 1, 1, 1) * x1 + (1 - t).view(-1, 1, 1, 1) * eps)
