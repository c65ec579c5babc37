"""The small examples in a short form: each runs, prints its table and writes its picture; the exact maths is exact."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dae_fast as df

from .conftest import LONGER

pytest.importorskip("sklearn")
pyplot = pytest.importorskip("matplotlib.pyplot")

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, folder: Path, steps: int) -> str:
    """Standard output of a short run that went well and left a picture."""
    picture = folder / f"{name}.png"
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", str(steps), "--out", str(picture)]
    # One thread: on a busy machine small parallel loops wait for one another.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(rf"{name}: done in \d+ s; picture in {re.escape(str(picture))}", last), result.stdout
    image = pyplot.imread(picture)[..., :3]
    assert min(image.shape[:2]) > 400
    assert image.std() > 0.05
    assert len(set(image.reshape(-1, 3).round(1).sum(1))) > 10
    return result.stdout


def figures(output: str, row: str) -> list[float]:
    """The numbers in a table's row."""
    cells = re.search(rf"^│ {re.escape(row)} +│(.*)", output, re.MULTILINE)
    assert cells, output
    return [float(number) for number in re.findall(r"\d+\.\d+", cells[1])]


@LONGER
def test_mixture_score_runs(tmp_path: Path) -> None:
    output = run("mixture_score", tmp_path, steps=200)
    error, cosine, *_ = figures(output, "learned")
    linear_error, linear_cosine, *_ = figures(output, "linear")
    assert figures(output, "exact")[:2] == [0, 1]
    assert error < linear_error / 2  # 0.29 against 0.87; 0.03 in a full run
    assert cosine > linear_cosine


@LONGER
def test_stacked_runs(tmp_path: Path) -> None:
    output = run("stacked", tmp_path, steps=20)
    pixels = figures(output, "pixels")
    assert pixels == sorted(pixels)  # more labels, better
    assert 70 < pixels[0] < 90  # ten classes: chance is 10
    assert figures(output, "untrained 2") != figures(output, "trained 2")


@LONGER
def test_anomaly_runs(tmp_path: Path) -> None:
    output = run("anomaly", tmp_path, steps=20)
    by_class = torch.tensor([figures(output, str(c)) for c in range(10)])
    # Rounded to three places, each class and the mean.
    torch.testing.assert_close(by_class.mean(0), torch.tensor(figures(output, "mean")), atol=1.01e-3, rtol=0)
    linear, pca = by_class.mean(0)[2:]  # need no training
    assert 0.8 < linear < 0.9
    assert 0.8 < pca < 0.9


@LONGER
def test_noise_levels_runs(tmp_path: Path) -> None:
    output = run("noise_levels", tmp_path, steps=20)
    white = 8 * torch.hypot(torch.fft.fftfreq(8)[:, None], torch.fft.fftfreq(8)).mean()
    assert abs(figures(output, "untrained")[0] - white) < 0.1  # 144 * 64 random values
    assert figures(output, "pixels")[0] < white / 2  # strokes
    losses = [figures(output, f"sigma = {sigma}")[-1] for sigma in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)]
    assert losses == sorted(losses, reverse=True)  # more noise, more of it to be had


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Imports one as `python examples/NAME.py` finds it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_mixture_score_is_the_gradient_of_the_log_density(example) -> None:
    mixture, sigma = example("mixture_score").MIXTURE, 0.4
    weights, means, stds = (v.double() for v in (mixture.weights, mixture.means, mixture.stds))
    weights = weights / weights.sum()  # 1 but for the rounding of fp32
    component = torch.distributions.MultivariateNormal(
        means, (stds**2 + sigma**2)[:, None, None] * torch.eye(2, dtype=torch.float64)
    )
    density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights), component)
    x = (3 * torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    log_density = density.log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    exact = type(mixture)(weights, means, stds)
    # fp64 on both sides: a few roundings of numbers up to 1e2.
    torch.testing.assert_close(exact.score(x.detach(), sigma), score, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        exact.log_joint(x.detach(), sigma).logsumexp(1), log_density.detach(), rtol=1e-10, atol=0
    )


def test_mixture_samples_have_its_moments(example) -> None:
    mixture = example("mixture_score").MIXTURE
    n = 200_000
    x = mixture.sample(n, df.Noise(0))
    mean = mixture.weights @ mixture.means
    second = (mixture.weights[:, None, None] * mixture.means[:, :, None] * mixture.means[:, None]).sum(0)
    cov = second + (mixture.weights * mixture.stds**2).sum() * torch.eye(2) - mean[:, None] * mean
    # Five standard errors of a mean, and of a variance of what is no wider than a Gaussian.
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=5 * (cov.max() / n).sqrt().item())
    torch.testing.assert_close(torch.cov(x.T), cov, rtol=0, atol=5 * cov.max().item() * (2 / n) ** 0.5)


def test_linear_denoiser_gives_the_score_of_a_gaussian(example) -> None:
    """Tweedie: (E[x | x_t] - x_t) / sigma^2 = -(C + sigma^2 I)^-1 (x_t - mean)."""
    anomaly = example("anomaly")
    g = torch.Generator().manual_seed(0)
    images = torch.randn(500, 64, generator=g) @ torch.randn(64, 64, generator=g) / 8
    x_t = torch.randn(100, 64, generator=g)
    score = df.to_score(x_t, anomaly.linear_denoiser(images)(x_t), anomaly.LEVEL, predict="x0")
    images, x_t = images.double(), x_t.double()
    noised = torch.cov(images.T) + anomaly.SIGMA**2 * torch.eye(64)
    exact = torch.linalg.solve(noised, (images.mean(0) - x_t).T).T
    # fp32, scores up to 4.5, a condition number of ten; 4e-6 was seen.
    torch.testing.assert_close(score.double(), exact, rtol=0, atol=2e-5)


def test_denoising_loss_is_the_squared_error_over_sigma_squared(example) -> None:
    x0 = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    noise, sigma = df.Noise(3), 0.25
    loss = example("digits").denoising_loss(torch.tanh, x0, noise, df.Level(1.0, sigma), reduction="none")
    error = (torch.tanh(x0 + sigma * noise.normal(x0.shape)) - x0).square().mean(1)
    torch.testing.assert_close(loss, error / sigma**2, rtol=1e-5, atol=0)  # fp32, 64 terms


def test_mean_frequency_of_waves(example) -> None:
    mean_frequency = example("noise_levels").mean_frequency
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    wave = torch.cos(2 * torch.pi * (3 * row + 2 * column) / 8).reshape(1, 64)
    assert mean_frequency(wave) == pytest.approx(13**0.5, rel=1e-5)
    assert mean_frequency(torch.ones(1, 64)) == pytest.approx(0, abs=1e-5)
    assert mean_frequency(torch.cat((wave, torch.ones(1, 64)))) == pytest.approx(13**0.5 / 3, rel=1e-5)


NAN = float("nan")


@pytest.mark.parametrize(
    ("error", "learned", "complaint"),
    [
        (0.03, 0.002, None),
        (0.2, 0.002, "off by 20"),
        (NAN, 0.002, "off by"),
        (0.03, 0.03, "energy distance"),
        (0.03, NAN, "energy distance"),
    ],
)
def test_mixture_score_verdict(example, error: float, learned: float, complaint: str | None) -> None:
    expect(example("mixture_score").failures(error, {"learned": learned, "linear": 0.04}), complaint)


@pytest.mark.parametrize(
    ("accuracy", "complaint"), [(0.9, None), (0.7, "is not above 80.0% on pixels"), (NAN, "is not above")]
)
def test_stacked_verdict(example, accuracy: float, complaint: str | None) -> None:
    stacked = example("stacked")
    others = dict.fromkeys(
        ("pixels", "untrained 1", "untrained 2"), dict.fromkeys(stacked.PER_CLASS, torch.tensor(0.8))
    )
    expect(
        stacked.failures({**others, "trained 2": dict.fromkeys(stacked.PER_CLASS, torch.tensor(accuracy))}), complaint
    )


@pytest.mark.parametrize(("area", "complaint"), [(0.95, None), (0.85, "of the PCA"), (NAN, "is not above")])
def test_anomaly_verdict(example, area: float, complaint: str | None) -> None:
    means = {"denoising autoencoder": area, "plain autoencoder": 0.8, "linear denoiser": 0.8, "PCA": 0.87}
    expect(example("anomaly").failures(means), complaint)


@pytest.mark.parametrize(
    ("frequency", "accuracy", "complaint"),
    [
        (2.0, 0.9, None),
        (3.5, 0.9, "does not fall"),
        (NAN, 0.9, "does not fall"),
        (2.0, 0.8, "of pixels"),
        (2.0, NAN, "of pixels"),
    ],
)
def test_noise_levels_verdict(example, frequency: float, accuracy: float, complaint: str | None) -> None:
    """By the frequency at the last level, and the accuracy at the middle levels."""
    module = example("noise_levels")
    features = {
        sigma: module.Features(torch.eye(64), 3 - 0.1 * i, accuracy if sigma in (0.5, 1.0) else 0.7)
        for i, sigma in enumerate(module.SIGMAS)
    }
    features[4.0] = module.Features(torch.eye(64), frequency, 0.7)
    expect(module.failures(features, module.Features(torch.eye(64), 1.3, 0.85)), complaint)


def expect(problems: list[str], complaint: str | None) -> None:
    assert bool(problems) == (complaint is not None), problems
    assert complaint is None or any(complaint in problem for problem in problems), problems
