"""The variational bound and the hybrid loss: against the formulas of improved-diffusion's code in numpy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr, ndtr

import dae_fast as df

T = 20
SCHEDULE = df.Schedule.linear(T, 1e-3, 0.2)
LEVELS = torch.tensor([0, 1, 7, 19, 0])


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    pred, v = torch.randn(2, 5, 3, 4, generator=g, dtype=torch.float64)
    x0 = torch.randint(0, 256, (5, 3, 4), generator=g).double() / 127.5 - 1
    x0[0, 0, :2] = torch.tensor([-1.0, 1.0])
    eps = torch.randn(5, 3, 4, generator=g, dtype=torch.float64)
    return pred.to(dtype), v.tanh().to(dtype), x0.to(dtype), eps.to(dtype)


def upstream(t, pred, v, x0, eps, predict, variance):
    """GaussianDiffusion's p_mean_variance, q_posterior_mean_variance and _vb_terms_bpd, with the exact normal law."""
    betas = SCHEDULE.betas.numpy()
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    posterior = betas * (1 - before) / (1 - bar)
    small = np.log(np.append(posterior[1], posterior[1:]))

    def at(a):
        return a[t][:, None, None]

    x_t = np.sqrt(at(bar)) * x0 + np.sqrt(1 - at(bar)) * eps
    if predict == "eps":
        x0_hat = np.sqrt(1 / at(bar)) * x_t - np.sqrt(1 / at(bar) - 1) * pred
    else:
        x0_hat = {"x0": pred, "v": np.sqrt(at(bar)) * x_t - np.sqrt(1 - at(bar)) * pred}[predict]
    c1 = at(betas * np.sqrt(before) / (1 - bar))
    c2 = at((1 - before) * np.sqrt(1 - betas) / (1 - bar))
    true_mean, mean = c1 * x0 + c2 * x_t, c1 * x0_hat + c2 * x_t
    frac = (v + 1) / 2
    log_var = frac * at(np.log(betas)) + (1 - frac) * at(small) if variance == "range" else v
    kl = 0.5 * (-1 + log_var - at(small) + np.exp(at(small) - log_var) + (true_mean - mean) ** 2 * np.exp(-log_var))
    centred, inv = x0 - mean, np.exp(-0.5 * log_var)
    plus, minus = inv * (centred + 1 / 255), inv * (centred - 1 / 255)
    with np.errstate(divide="ignore"):
        middle = np.log(np.where(centred > 0, ndtr(-minus) - ndtr(-plus), ndtr(plus) - ndtr(minus)))
    nll = -np.where(x0 < -0.999, log_ndtr(plus), np.where(x0 > 0.999, log_ndtr(-minus), middle))
    return np.where(t[:, None, None] == 0, nll, kl).mean((1, 2)) / np.log(2)


@pytest.mark.parametrize("variance", ["range", "log"])
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_is_that_of_its_authors(predict: str, variance: str) -> None:
    given = inputs()
    if predict == "x0":  # near enough for the reference's differences of probabilities not to vanish
        given = (given[2] + 0.02 * given[0], *given[1:])
    wanted = torch.from_numpy(upstream(LEVELS.numpy(), *(x.numpy() for x in given), predict, variance))
    pred, v, x0, eps = given
    bound = {"predict": predict, "variance": variance}
    found = df.variational_bound(pred, v, x0, eps, SCHEDULE[LEVELS], **bound, reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    mean = df.variational_bound(pred, v, x0, eps, SCHEDULE[LEVELS], **bound)
    torch.testing.assert_close(mean, wanted.mean(), rtol=1e-9, atol=0)
    for t in (0, 7):
        found = df.variational_bound(pred, v, x0, eps, SCHEDULE[t], **bound, reduction="none")
        every = upstream(np.full(5, t), *(x.numpy() for x in given), predict, variance)
        torch.testing.assert_close(found, torch.from_numpy(every), rtol=1e-9, atol=0)


def test_noise_is_regenerated() -> None:
    pred, v, x0, _ = inputs()
    noise = df.Noise(3)
    for drawn in (noise, df.OffsetNoise(noise)):
        eps = drawn.normal(x0.shape, dtype=torch.float64)
        found = df.variational_bound(pred, v, x0, drawn, SCHEDULE[LEVELS])
        torch.testing.assert_close(found, df.variational_bound(pred, v, x0, eps, SCHEDULE[LEVELS]), rtol=1e-12, atol=0)


def test_half_precision_and_frames() -> None:
    exact = df.variational_bound(*inputs(), SCHEDULE[LEVELS], reduction="none")
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        found = df.variational_bound(*inputs(dtype), SCHEDULE[LEVELS], reduction="none")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=0)
    framed = [x[None] for x in inputs()]
    found = df.variational_bound(*framed, SCHEDULE[LEVELS[None]])
    torch.testing.assert_close(found, exact.mean())


def test_a_bin_that_has_no_chance_has_a_finite_loss_and_gradient() -> None:
    pred = torch.full((1, 2), 1e3, dtype=torch.float32, requires_grad=True)
    v = torch.zeros(1, 2, requires_grad=True)
    loss = df.variational_bound(pred, v, torch.zeros(1, 2), torch.zeros(1, 2), SCHEDULE[0], predict="x0")
    assert loss > 1e6 and all(g.isfinite().all() and (g != 0).any() for g in torch.autograd.grad(loss, (pred, v)))


def test_gradients() -> None:
    pred, v, x0, eps = inputs()
    x0 = x0.clamp(-0.99, 0.99)  # the edges' law changes there

    def bound(pred, v, eps):
        return df.variational_bound(pred, v, x0, eps, SCHEDULE[LEVELS])

    assert torch.autograd.gradcheck(bound, [x.clone().requires_grad_() for x in (pred, v, eps)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variance", ["range", "log"])
@pytest.mark.parametrize("levels", [LEVELS[:, None].expand(5, 2), LEVELS, torch.tensor(7)], ids=["BF", "B", "one"])
def test_kernels(dtype: torch.dtype, variance: str, levels: torch.Tensor, restore_isa, restore_threads) -> None:
    """Against torch's formulas in fp64; the same bits from every instruction set and number of threads."""
    g = torch.Generator().manual_seed(1)
    pred, v, eps = torch.randn(3, 5, 2, 1300, generator=g).to(dtype)
    x0 = (torch.randint(0, 256, (5, 2, 1300), generator=g).double() / 127.5 - 1).to(dtype)
    v = v.float().tanh().to(dtype) if variance == "range" else v - 3

    def bound(pred, v):
        return df.variational_bound(pred, v, x0.to(pred), eps.to(pred), SCHEDULE[levels], variance=variance)

    right = torch.func.grad_and_value(bound, argnums=(0, 1))(pred.double(), v.double())
    found = set()
    pred.requires_grad_(), v.requires_grad_()
    for isa in df.kernels.native.isas():
        df.kernels.native.use_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            loss = bound(pred, v)
            grads = torch.autograd.grad(loss, (pred, v))
            found.add(b"".join(t.detach().view(-1).view(torch.uint8).numpy().tobytes() for t in (loss, *grads)))
    assert len(found) == 1 or (levels == 0).any()  # where torch's logarithms of the normal law take part
    torch.testing.assert_close(loss.double(), right[1], rtol=1e-5, atol=0)
    for got, wanted in zip(grads, right[0], strict=True):
        largest = wanted.abs().flatten(1).amax(1)[:, None, None]
        rounding = torch.finfo(dtype).eps * wanted.abs() + 1e-5 * largest
        assert ((got.double() - wanted).abs() <= rounding).all()


def test_small_divergences_keep_their_digits() -> None:
    """Of a model that is nearly right: e^r - 1 - r cancels where r is small."""
    _, _, x0, eps = inputs(torch.float32)
    v = torch.linspace(-0.999, -0.98, 60).reshape(5, 3, 4)
    t = np.full(5, 7)
    wide = (x.double().numpy() for x in (eps, v, x0, eps))
    wanted = torch.from_numpy(upstream(t, *wide, "eps", "range"))
    found = df.variational_bound(eps, v, x0, eps, SCHEDULE[7], reduction="none")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_hybrid_loss() -> None:
    """The bound teaches the variance alone, and the simple loss the mean."""
    pred, v, x0, eps = (x.clone().requires_grad_() for x in inputs())
    level = SCHEDULE[LEVELS]
    loss = df.hybrid_loss(pred, v, x0.detach(), eps.detach(), level, bound_weight=0.01)
    simple = df.noise_mse(pred, eps.detach())
    bound = df.variational_bound(pred.detach(), v, x0.detach(), eps.detach(), level)
    torch.testing.assert_close(loss, simple + 0.01 * T * bound)
    of_pred, of_v = torch.autograd.grad(loss, (pred, v))
    torch.testing.assert_close(of_pred, torch.autograd.grad(simple, pred)[0])
    torch.testing.assert_close(of_v, 0.01 * T * torch.autograd.grad(bound, v)[0])


def test_the_bound_of_the_true_model_of_gaussian_data_is_its_entropy() -> None:
    """Of x0 ~ N(0, s^2) the best eps is linear: T mean L_t and the prior's term are -log2 p of a bin, on average."""
    s, each = 0.25, 500
    g = torch.Generator().manual_seed(0)
    schedule = df.Schedule.linear(400, 1e-4, 0.04)
    t = torch.arange(400).repeat_interleave(each)
    x0 = (s * torch.randn(len(t), 1, generator=g, dtype=torch.float64) * 127.5 + 127.5).round() / 127.5 - 1
    alpha, sigma = schedule.alpha[t, None], schedule.sigma[t, None]
    x_t = df.add_noise(x0, df.Noise(1), schedule[t])
    pred = sigma * x_t / (alpha**2 * s**2 + sigma**2)
    before = torch.cat((torch.ones(1, dtype=torch.float64), schedule.alpha_bar[:-1]))[t, None]
    exact = (1 - alpha**2 / before) * (before * s**2 + 1 - before) / (alpha**2 * s**2 + sigma**2)
    found = df.variational_bound(pred, exact.log(), x0, df.Noise(1), schedule[t], variance="log")
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s**2) - math.log2(2 / 255)
    assert abs(400 * float(found) - entropy) < 0.05


def test_bad_input() -> None:
    x = torch.zeros(2, 3)
    for call, message in (
        (lambda: df.variational_bound(x, x[:1], x, x, SCHEDULE[3]), r"variational_bound: v must have shape \(2, 3\)"),
        (lambda: df.variational_bound(x, x, x, x, df.Level(0.6, 0.8)), r"needs level=schedule\[t\]"),
        (lambda: df.variational_bound(x, x, x, x, SCHEDULE[3], variance="big"), "variance must be 'range' or 'log'"),
        (lambda: df.hybrid_loss(x, x, x, x, df.Level(0.6, 0.8)), r"hybrid_loss: .* needs level=schedule\[t\]"),
        (lambda: df.hybrid_loss(x, x, x, x, SCHEDULE[3], bound_weight=-1.0), "bound_weight must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
