"""As test_example_family.py, for the sparse, contractive, variational and masked autoencoders and what draws digits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.func import jacrev, vmap

import dae_fast as df

from . import test_example_family as family
from .conftest import LONGER

example, expect, figures, run = family.example, family.expect, family.figures, family.run
NAN = float("nan")


@LONGER
def test_sparse_runs(tmp_path: Path) -> None:
    output = run("sparse", tmp_path, steps=60)
    plain, penalised = figures(output, "sigmoid"), figures(output, "sigmoid, KL")
    assert penalised[0] < 0.8 * plain[0]  # mean activation, on its way down
    assert plain[0] == pytest.approx(0.5, abs=0.05)  # and not
    assert 80 < figures(output, "(pixels)")[0] < 95


@LONGER
def test_contractive_runs(tmp_path: Path) -> None:
    """The two sides of its formula and the estimates, of networks that are hardly trained."""
    output = run("contractive", tmp_path, steps=60)
    for name in ("plain", "contractive code", "contractive f", "denoising"):
        _, code, code_estimate, f, f_estimate, excess = figures(output, name)
        assert code_estimate == pytest.approx(code, rel=0.05)
        assert f_estimate == pytest.approx(f, rel=0.05)
        assert excess == pytest.approx(f, rel=0.05)


@LONGER
def test_vae_runs(tmp_path: Path) -> None:
    output = run("vae", tmp_path, steps=20)
    bounds = [figures(output, str(latent)) for latent in (2, 4, 8)]
    pca = [abs(each[-2]) for each in bounds]
    assert pca == sorted(pca, reverse=True)  # the larger the better, and it needs no training
    for elbo, _, _, of_pca, ahead in bounds:
        assert abs(elbo - of_pca) == pytest.approx(abs(ahead), abs=0.011)  # rounded to two places


@LONGER
def test_mae_runs(tmp_path: Path) -> None:
    output = run("mae", tmp_path, steps=20)
    linear, mean = figures(output, "linear"), figures(output, "mean patch")
    assert linear == sorted(linear)  # the less is seen, the worse
    assert max(linear) < min(mean)


@LONGER
def test_multi_scale_runs(tmp_path: Path) -> None:
    output = run("multi_scale", tmp_path, steps=20)
    gaussian, held_out = figures(output, "(Gaussian)"), figures(output, "(held out)")
    assert held_out[0] > 90 > gaussian[0]  # the classifier's confidence
    assert held_out[-1] < gaussian[-1] / 4  # and distance


@LONGER
def test_latent_diffusion_runs(tmp_path: Path) -> None:
    output = run("latent_diffusion", tmp_path, steps=60)
    confidence = figures(output, "(reconstructions)")[0]
    for name in ("diffusion of codes", "Gaussian of codes", "prior N(0, 1)"):
        assert figures(output, name)[0] < confidence


def test_active_share_of_binary_codes(example) -> None:
    active_share = example("sparse").active_share
    codes = torch.zeros(3, 20)
    codes[0, :2], codes[1, :4], codes[2] = 1.0, 0.3, 7.0
    assert active_share(codes) == pytest.approx((0.1 + 0.2 + 1) / 3, rel=1e-6)
    assert active_share(torch.zeros(3, 20)) == 0


def test_masked_pixels_are_paper(example) -> None:
    sparse = example("sparse")
    x, noise = torch.rand(50, 64), df.Noise(3)
    masked = df.Masking(sparse.MASKED, noise).mask(x.shape)
    assert torch.equal(sparse.mask(x, noise), torch.where(masked, -1.0, x))


def test_contractive_norms_are_those_of_the_jacobians(example) -> None:
    contractive = example("contractive")
    torch.manual_seed(0)
    f, x = contractive.SigmoidLayer(64, 20), torch.randn(6, 64)
    with torch.no_grad():
        f.filters.mul_(5)
        judged = contractive.judge(f, x, df.Noise(0))
        of_code, of_f = (vmap(jacrev(each))(x).square().sum((1, 2)).mean().item() for each in (f.encode, f))
    assert judged.code.exact == pytest.approx(of_code, rel=1e-5)  # fp32, thousands of terms
    assert judged.f.exact == pytest.approx(of_f, rel=1e-5)
    assert judged.singular_values.square().sum() <= of_f * (1 + 1e-5)  # their means' squares: Jensen


def test_hutchinson_has_the_standard_error_that_it_is_held_to(example, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 400 repetitions, whose spread is known to 1/sqrt(2 * 400), times five."""
    contractive = example("contractive")
    monkeypatch.setattr(contractive, "SAMPLES", 3)
    torch.manual_seed(0)
    W, x = torch.randn(5, 8) / 3, torch.randn(4, 8)
    repetitions = [df.contraction(lambda x: x @ W.T, x, df.Noise(k), samples=contractive.SAMPLES) for k in range(400)]
    J = W.expand(4, 5, 8)
    norm = contractive.norm(J.square().sum((1, 2)), J, repetitions[0])
    assert torch.stack(repetitions).std().item() == pytest.approx(norm.standard_error, rel=5 / math.sqrt(800))


def test_elbo_of_a_linear_vae_is_its_likelihood(example) -> None:
    """With the posterior as q(z | x) the bound is tight, whatever z is drawn: log N(x; c, W W^T + sigma^2)."""
    vae = example("vae")
    torch.manual_seed(0)
    D, latent = 6, 2
    W, c, sigma = torch.randn(D, latent).double(), torch.randn(D).double(), 0.5
    # Orthogonal columns, so that the posterior's covariance is diagonal, as q's must be.
    W = torch.linalg.qr(W).Q * torch.tensor([2.0, 0.7])
    precision = W.T @ W / sigma**2 + torch.eye(latent)
    model = vae.VAE(latent, D).double()
    model.log_sigma.data.fill_(math.log(sigma))
    model.encode = lambda x: (
        torch.linalg.solve(precision, (x - c) @ W / sigma**2, left=False),
        -precision.diagonal().log().expand(len(x), latent),
    )
    model.decode = lambda z: c + z @ W.T
    x = torch.randn(5, D).double()
    elbo = torch.stack([model.elbo(x, df.Noise(k))[0] for k in range(4000)]).mean(0)
    exact = torch.distributions.MultivariateNormal(c, W @ W.T + sigma**2 * torch.eye(D)).log_prob(x)
    # E_q of |x - decode(z)|^2 is a mean of 4000: a standard deviation of a nat at most, times five.
    torch.testing.assert_close(elbo.detach(), exact, rtol=0, atol=5 / math.sqrt(4000))


def test_patches_of_an_image_and_back(example) -> None:
    mae = example("mae")
    images = torch.arange(2 * 64.0).reshape(2, 64)
    patches = mae.to_patches(images)
    assert patches[0, 0].tolist() == [0, 1, 8, 9]
    assert patches[1, 5].tolist() == [64 + each for each in (18, 19, 26, 27)]
    assert torch.equal(mae.to_images(patches), images)


@pytest.mark.parametrize("name", ["masked autoencoder", "linear"])
def test_a_fill_does_not_look_at_removed_patches(example, name: str) -> None:
    mae = example("mae")
    torch.manual_seed(0)
    patches = torch.randn(100, 16, 4)
    fill = mae.LinearFill(patches) if name == "linear" else mae.MaskedAutoencoder().eval()
    removed = df.patch_mask(df.Noise(0), 100, 16, 0.5)
    changed = torch.where(removed.mask[:, :, None], 7.0, patches)
    with torch.no_grad():
        assert torch.equal(fill(patches, removed), fill(changed, removed))
        moved = fill(patches + 1.0, removed) - fill(patches, removed)
    assert (moved.abs().amax((1, 2)) > 0.01).all()  # and does look at the others


def test_decoder_sees_codes_in_place_and_tokens_elsewhere(example) -> None:
    mae = example("mae")
    torch.manual_seed(0)
    net, patches = mae.MaskedAutoencoder(), torch.randn(30, 16, 4)
    net.encoder = torch.nn.Identity()  # so that a patch's code is its own
    seen = []
    net.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    removed = df.patch_mask(df.Noise(2), 30, 16, 0.75)
    with torch.no_grad():
        net(patches, removed)
        codes = net.to_code(net.embed(patches) + net.position)
    expected = torch.where(removed.mask[:, :, None], net.token, codes).flatten(1)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)  # products of other shapes


def test_linear_fill_is_the_conditional_mean(example) -> None:
    mae = example("mae")
    torch.manual_seed(0)
    patches = torch.randn(500, 16, 4) @ torch.randn(4, 4) + torch.randn(500, 1, 4)
    removed = df.patch_mask(df.Noise(1), 500, 16, 0.75)
    filled = mae.LinearFill(patches)(patches, removed).flatten(1)
    pixels = patches.flatten(1).double()
    mean, C = pixels.mean(0), torch.cov(pixels.T) + mae.RIDGE * torch.eye(64)
    for b in (0, 17):
        seen = ~removed.mask[b].repeat_interleave(4)
        exact = mean + C[:, seen] @ torch.linalg.solve(C[seen][:, seen], (pixels[b] - mean)[seen])
        torch.testing.assert_close(filled[b].double(), exact, rtol=0, atol=1e-5)  # worked out in fp64, kept in fp32


def test_frechet_distance_of_gaussians(example) -> None:
    """Between N(0, diag(a)) and N(m, diag(b)): |m|^2 + sum (sqrt a - sqrt b)^2, of the sample's moments."""
    frechet_distance = example("multi_scale").frechet_distance
    torch.manual_seed(0)
    x = torch.randn(50, 4).double()
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(49)  # mean 0, covariance 1, exactly
    a, b, m = torch.tensor([[1.0, 2.0, 0.5, 0.0], [3.0, 0.2, 0.5, 1.0], [0.0, 1.0, 0.0, 0.3]]).double()
    exact = (m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()).item()
    assert frechet_distance(x * a.sqrt(), m + x * b.sqrt()) == pytest.approx(exact, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)  # square roots of roundings of 1e-16, at 1


def test_gaussian_has_the_images_moments(example) -> None:
    gaussian = example("multi_scale").gaussian
    torch.manual_seed(0)
    images, n = torch.randn(300, 8) @ torch.randn(8, 8) + torch.randn(8), 100_000
    drawn, C = gaussian(images, n, df.Noise(0)), torch.cov(images.T)
    # Five standard errors of a mean, and of a covariance.
    torch.testing.assert_close(drawn.mean(0), images.mean(0), rtol=0, atol=5 * (C.max() / n).sqrt().item())
    torch.testing.assert_close(torch.cov(drawn.T), C, rtol=0, atol=5 * C.max().item() * (2 / n) ** 0.5)


def test_standardised_codes(example) -> None:
    latent_diffusion = example("latent_diffusion")
    torch.manual_seed(0)
    codes = torch.randn(500, 8) * torch.arange(1.0, 9) + 3
    standardise = latent_diffusion.Standardiser(codes)
    z = standardise(codes)
    torch.testing.assert_close(z.mean(0), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var(0), torch.ones(8), rtol=1e-5, atol=0)
    torch.testing.assert_close(standardise.back(z), codes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({}, None),
        ({"rate": 0.07}, "mean activation"),
        ({"rate": NAN}, "mean activation"),
        ({"active": 0.4}, "is not below 0.6 of 50.0%"),
        ({"error": 0.13}, "is not within 20%"),
        ({"error": NAN}, "is not within 20%"),
        ({"accuracy": 0.8}, "is not above 85.0% on pixels"),
    ],
)
def test_sparse_verdict(example, changed: dict[str, float], complaint: str | None) -> None:
    sparse = example("sparse")
    value = {"rate": 0.05, "active": 0.2, "error": 0.11, "accuracy": 0.9, **changed}

    def result(rate: float, active: float, error: float, accuracy: float) -> object:
        return sparse.Result(torch.eye(64), torch.full((4,), rate), active, error, accuracy)

    plain, penalised = result(0.4, 0.5, 0.1, 0.8), result(**value)
    results = {"sigmoid": plain, "sigmoid, KL": penalised, "ReLU": plain, "ReLU, L1": result(0.1, 0.1, 0.1, 0.9)}
    expect(sparse.failures(results, 0.85), complaint)


@pytest.mark.parametrize(
    ("changed", "trained", "complaint"),
    [
        ({}, True, None),
        ({"estimate": 6.2}, False, "five standard errors"),
        ({"estimate": NAN}, False, "five standard errors"),
        ({"code": 7.0}, True, "not below 0.85"),
        ({"code": 7.0}, False, None),
        ({"f": 23.0}, True, "within 5% of the penalty's"),
        ({"excess": 18.0}, True, "noise adds"),
        ({"excess": NAN}, True, "noise adds"),
    ],
)
def test_contractive_verdict(example, changed: dict[str, float], trained: bool, complaint: str | None) -> None:
    contractive = example("contractive")

    def result(code: float, f: float, estimate: float | None = None, excess: float | None = None) -> object:
        return contractive.Result(
            1.0,
            contractive.Norm(code, code if estimate is None else estimate, 0.01),
            contractive.Norm(f, f, 0.01),
            {contractive.SIGMA: f if excess is None else excess},
            torch.ones(64),
        )

    of_denoising = {"code": 6.0, "f": 20.0} | {k: v for k, v in changed.items() if k != "code"}
    results = {
        "plain": result(8.0, 30.0),
        "contractive code": result(changed.get("code", 4.0), 18.0),
        "contractive f": result(6.0, 20.0),
        "denoising": result(**of_denoising),
    }
    expect(contractive.failures(results, trained=trained), complaint)


@pytest.mark.parametrize(("elbo", "complaint"), [(-20.0, None), (-40.0, "probabilistic PCA"), (NAN, "is not above")])
def test_vae_verdict(example, elbo: float, complaint: str | None) -> None:
    vae = example("vae")
    expect(vae.failures({2: vae.Bound(-20.0, 5.0, 0.3, -30.0), 8: vae.Bound(elbo, 5.0, 0.3, -30.0)}), complaint)


@pytest.mark.parametrize(("error", "complaint"), [(0.1, None), (0.2, "of the linear"), (NAN, "of the mean patch")])
def test_mae_verdict(example, error: float, complaint: str | None) -> None:
    mae = example("mae")
    errors = {name: dict.fromkeys(mae.RATIOS, value) for name, value in zip(mae.COLOURS, (0.1, 0.15, 0.3), strict=True)}
    errors["masked autoencoder"][0.5] = error
    expect(mae.failures(errors), complaint)


@pytest.mark.parametrize(
    ("name", "ours", "other"),
    [
        ("multi_scale", "many levels, Heun", "sigma = 0.7, Langevin"),
        ("latent_diffusion", "diffusion of codes", "prior"),
    ],
)
@pytest.mark.parametrize(("frechet", "fails"), [(0.2, False), (0.6, True), (NAN, True)])
def test_generators_verdict(example, name: str, ours: str, other: str, frechet: float, fails: bool) -> None:
    """What is in brackets is no rival, but for the Gaussian."""
    quality = example("multi_scale").Quality
    qualities = {ours: quality(0.9, 10.0, frechet), other: quality(0.9, 10.0, 0.6)}
    aside = "(held out)" if name == "multi_scale" else "(reconstructions)"
    problems = example(name).failures(qualities | {aside: quality(0.9, 10.0, 0.1)})
    expect(problems, other if fails else None)
