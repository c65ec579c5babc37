"""Samplers against the papers' steps in plain torch, and against distributions known in closed form.

For Gaussian data the best predictor is linear, so mean and variance of what a sampler returns follow
from a recursion; samples must agree with it within FOUR standard errors (seeds are fixed).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dae_fast as df
from dae_fast.samplers import (
    annealed_langevin,
    ddim,
    ddpm,
    euler,
    euler_ancestral,
    flow_euler,
    flow_midpoint,
    heun,
    langevin,
    launch,
    probability_flow,
)
from dae_fast.samplers.x0_clip import quantile_of_samples

FOUR = 4.0
START = 0x7374617274  # the tag of a start's noise
SCHEDULE = df.Schedule.linear(20, 0.005, 0.4)
BAR = SCHEDULE.alpha_bar.tolist()


def start(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(x, t):
    """Any smooth function of both; it mixes no samples."""
    return torch.sin(1.3 * x) * 0.8 + 0.05 * t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype) - 0.3


def check_moments(values, mean, variance):
    """N independent Gaussian values: standard errors sqrt(var/N) and var*sqrt(2/N)."""
    N = values.numel()
    assert values.isfinite().all()
    assert abs(values.double().mean().item() - mean) < FOUR * math.sqrt(variance / N)
    assert abs(values.double().var().item() - variance) < FOUR * variance * math.sqrt(2 / N)


class Gaussian:
    """Data N(mean, std^2), every element by itself."""

    mean, std = 0.7, 0.4

    def __init__(self, schedule):
        self.alpha, self.sigma = schedule.alpha, schedule.sigma

    def eps(self, x, t):
        """E[eps | x_t]."""
        alpha, sigma = (c[t].reshape(-1, *[1] * (x.dim() - 1)) for c in (self.alpha, self.sigma))
        slope = sigma / (alpha**2 * self.std**2 + sigma**2)
        return slope.to(x.dtype) * x - (slope * alpha * self.mean).to(x.dtype)

    def v(self, x, t):
        alpha, sigma = (c[t].reshape(-1, *[1] * (x.dim() - 1)) for c in (self.alpha, self.sigma))
        slope = alpha * sigma * (1 - self.std**2) / (alpha**2 * self.std**2 + sigma**2)
        rest = sigma * self.mean / (alpha**2 * self.std**2 + sigma**2)
        return slope.to(x.dtype) * x - rest.to(x.dtype)

    def after(self, levels, eta, large=False):
        """Mean and variance of the samples: Song et al. 2021, eq. 12 on N(mean, variance), from N(0, 1)."""
        mean, variance = 0.0, 1.0
        for i, t in enumerate(levels):
            last = i + 1 == len(levels)
            a, s = float(self.alpha[t]), float(self.sigma[t])
            a_next, s_next = (
                (1.0, 0.0) if last else (float(self.alpha[levels[i + 1]]), float(self.sigma[levels[i + 1]]))
            )
            gain = a * self.std**2 / (a**2 * self.std**2 + s**2)  # x0_hat = mean + gain (x - a mean)
            beta = 1 - a**2 / a_next**2
            std = eta * s_next / s * math.sqrt(beta)
            keep = math.sqrt(s_next**2 - std**2) / s
            slope = keep + (a_next - keep * a) * gain
            constant = (a_next - keep * a) * (1 - gain * a) * self.mean
            shown = math.sqrt(beta) if large and not last else std
            mean, variance = slope * mean + constant, slope**2 * variance + shown**2
        return mean, variance


# One step after the other, as the papers write them.


def limited(x0, clamp):
    return clamp(x0) if callable(clamp) else x0.clamp(*clamp)


def plain_ddpm(net, x, noise, variance, clamp=None):
    """Ho et al. 2020, algorithm 2; with a clamp, eq. 7 with the clipped x0."""
    T = len(BAR)
    for t in reversed(range(T)):
        bar, before = BAR[t], BAR[t - 1] if t else 1.0
        alpha, beta = bar / before, 1 - bar / before
        eps = net(x, torch.full(x.shape[:1], t))
        if clamp is None:
            mean = (x - beta / math.sqrt(1 - bar) * eps) / math.sqrt(alpha)
        else:
            x0 = limited((x - math.sqrt(1 - bar) * eps) / math.sqrt(bar), clamp)
            mean = (math.sqrt(before) * beta * x0 + math.sqrt(alpha) * (1 - before) * x) / (1 - bar)
        std = math.sqrt(beta if variance == "large" else beta * (1 - before) / (1 - bar))
        x = mean + (std * noise.fold_in(t).normal(x.shape, dtype=x.dtype) if t else 0)
    return x


def plain_ddim(net, x, noise, steps, eta, clamp=None, levels=None, clipped=False):
    """Song et al. 2021, eqs. 12 and 16; with a clamp, eps stays the network's, or is that of the clipped x0."""
    levels = levels or np.round(np.linspace(len(BAR) - 1, 0, steps)).astype(int).tolist()
    for t, s in zip(levels, [*levels[1:], None], strict=True):
        bar, before = BAR[t], 1.0 if s is None else BAR[s]
        eps = net(x, torch.full(x.shape[:1], t))
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        if clamp is not None:
            x0 = limited(x0, clamp)
            eps = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar) if clipped else eps
        std = eta * math.sqrt((1 - before) / (1 - bar)) * math.sqrt(1 - bar / before)
        z = noise.fold_in(t).normal(x.shape, dtype=x.dtype)
        x = math.sqrt(before) * x0 + math.sqrt(max(1 - before - std**2, 0)) * eps + std * z
    return x


def same(got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clamp", [None, (-1.0, 1.0), (-0.2, 0.6)])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_algorithm_2(backend, variance, clamp):
    x, noise = start(5, 7), df.Noise(3)
    given = 1.0 if clamp == (-1.0, 1.0) else clamp
    same(
        ddpm(network, x, SCHEDULE, noise, variance=variance, clamp=given),
        plain_ddpm(network, x, noise, variance, clamp),
    )


@pytest.mark.parametrize("clamp, clipped", [(None, False), ((-0.2, 0.6), False), ((-0.2, 0.6), True)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_ddim_is_equation_12(backend, steps, eta, clamp, clipped):
    x, noise = start(5, 7), df.Noise(3)
    got = ddim(network, x, SCHEDULE, noise, steps=steps, eta=eta, clamp=clamp, use_clipped_model_output=clipped)
    same(got, plain_ddim(network, x, noise, steps, eta, clamp, clipped=clipped))


def test_ddim_with_eta_1_and_all_steps_is_ddpm():
    x = start(4, 33, dtype=torch.float32)
    wanted = ddpm(network, x, SCHEDULE, df.Noise(3))
    assert torch.equal(ddim(network, x, SCHEDULE, df.Noise(3), steps=20, eta=1.0), wanted)


def test_ddim_with_eta_0_is_deterministic():
    x = start(4, 33, dtype=torch.float32)
    assert torch.equal(
        ddim(network, x, SCHEDULE, df.Noise(3), steps=7), ddim(network, x, SCHEDULE, df.Noise(4), steps=7)
    )
    assert not torch.equal(
        ddim(network, x, SCHEDULE, df.Noise(3), steps=7, eta=0.1),
        ddim(network, x, SCHEDULE, df.Noise(4), steps=7, eta=0.1),
    )


def test_levels_that_the_network_sees():
    seen = []

    def net(x, t):
        assert t.dtype == torch.int64 and t.shape == (3,) and (t == t[0]).all()
        seen.append(int(t[0]))
        return x

    for T in range(1, 40):
        for steps in range(1, T + 1):
            seen.clear()
            ddim(net, torch.zeros(3, 1), df.Schedule.linear(T), df.Noise(0), steps=steps)
            assert seen[0] == T - 1 and len(seen) == steps and (np.diff(seen) < 0).all()
            assert steps == 1 or seen[-1] == 0
    seen.clear()
    ddpm(net, torch.zeros(3, 1), df.Schedule.linear(9), df.Noise(0))
    assert seen == list(range(9))[::-1]


@pytest.mark.parametrize("noise_scale", [1.0, 0.5])
def test_langevin_steps(backend, noise_scale):
    x, noise, h = start(4, 6), df.Noise(1), 0.07
    wanted = x
    for k in range(5):
        z = noise.fold_in(k).normal(x.shape, dtype=x.dtype)
        wanted = wanted - h * torch.tanh(wanted) + noise_scale * math.sqrt(2 * h) * z
    same(langevin(lambda x: -torch.tanh(x), x, h, 5, noise, noise_scale=noise_scale), wanted)
    assert torch.equal(langevin(torch.tanh, x, h, 0, noise), x)


@pytest.mark.parametrize("denoise", [False, True])
def test_annealed_langevin_is_algorithm_1(backend, denoise):
    """Song and Ermon 2019: sigma_1 > ... > sigma_L, alpha_i = epsilon sigma_i^2 / sigma_L^2."""
    schedule, x, noise, epsilon, steps = df.Schedule.geometric(4, 0.1, 1.0), start(3, 5), df.Noise(2), 1e-3, 3

    def score(x, t):
        assert t.shape == (3,) and t.dtype == torch.int64
        return -torch.tanh(x) / schedule.sigma[t][:, None].to(x.dtype)

    sigmas = np.geomspace(1.0, 0.1, 4)
    wanted = x
    for i, sigma in enumerate(sigmas):
        level = torch.full((3,), 3 - i)
        alpha = epsilon * sigma**2 / sigmas[-1] ** 2
        for k in range(steps):
            z = noise.fold_in((3 - i) * steps + k).normal(x.shape, dtype=x.dtype)
            wanted = wanted + alpha / 2 * score(wanted, level) + math.sqrt(alpha) * z
    if denoise:
        wanted = wanted + 0.1**2 * score(wanted, torch.zeros(3, dtype=torch.int64))
    same(
        annealed_langevin(score, x, schedule, noise, step_size=epsilon, steps_per_level=steps, denoise=denoise), wanted
    )


def test_variance_exploding_ancestral_step(backend):
    """Song et al. 2021 (SDE), eq. 47, the reverse of SMLD."""
    schedule, x, noise = df.Schedule.geometric(5, 0.1, 3.0), start(3, 5), df.Noise(2)
    sigma = [0.0, *np.geomspace(0.1, 3.0, 5)]
    wanted = x
    for t in reversed(range(5)):
        less = sigma[t + 1] ** 2 - sigma[t] ** 2
        z = noise.fold_in(t).normal(x.shape, dtype=x.dtype)
        score = network(wanted, torch.full((3,), t))
        wanted = wanted + less * score + math.sqrt(sigma[t] ** 2 * less) / sigma[t + 1] * z
    same(ddpm(network, x, schedule, noise, predict="score"), wanted)
    from_shape = ddpm(network, (3, 5), schedule, noise, predict="score")
    assert torch.equal(
        from_shape, ddpm(network, noise.fold_in(START).normal((3, 5)) * 3.0, schedule, noise, predict="score")
    )


def test_ddim_on_levels_of_ones_own(backend):
    x, noise, levels = start(5, 7), df.Noise(3), [17, 16, 9, 2]
    got = ddim(network, x, SCHEDULE, noise, levels=levels, eta=0.5)
    same(got, plain_ddim(network, x, noise, 4, 0.5, levels=levels))
    assert torch.equal(ddim(network, x, SCHEDULE, noise, levels=np.array(levels), eta=0.5), got)
    assert torch.equal(ddim(network, x, SCHEDULE, noise, levels=torch.tensor(levels), eta=0.5), got)


# Guidance.


def other(x, t=None):
    """A second network, the unconditional one."""
    return torch.cos(0.9 * x) * 0.4 - 0.1


def score(x, t=None):
    return -torch.tanh(x)


GUIDED = {
    "langevin": lambda net, x, **o: langevin(lambda x: net(x, torch.zeros(len(x))), x, 0.1, 5, df.Noise(3), **o),
    "langevin-steps": lambda net, x, **o: langevin(
        lambda x: net(x, torch.zeros(len(x))), x, torch.linspace(0.1, 0.2, len(x)), 5, df.Noise(3), **o
    ),
    "annealed_langevin": lambda net, x, **o: annealed_langevin(
        net, x, VE, df.Noise(3), step_size=1e-2, steps_per_level=3, **o
    ),
    "ddpm": lambda net, x, **o: ddpm(net, x, SCHEDULE, df.Noise(3), **o),
    "ddim": lambda net, x, **o: ddim(net, x, SCHEDULE, df.Noise(3), steps=6, eta=0.5, predict="v", **o),
    "euler": lambda net, x, **o: euler(net, x, SCHEDULE, df.Noise(3), steps=6, **o),
    "euler_ancestral": lambda net, x, **o: euler_ancestral(net, x, SCHEDULE, df.Noise(3), steps=6, **o),
    "heun": lambda net, x, **o: heun(
        net, x, VE, df.Noise(3), steps=4, S_churn=1.0, predict="x0", conditioning="sigma", **o
    ),
    "flow_euler": lambda net, x, **o: flow_euler(net, x, SCHEDULE, df.Noise(3), steps=6, **o),
    "flow_midpoint": lambda net, x, **o: flow_midpoint(net, x, SCHEDULE, df.Noise(3), steps=5, **o),
    "probability_flow": lambda net, x, **o: probability_flow(net, x, VP, df.Noise(3), steps=5, **o),
}
LIMITED = [name for name in GUIDED if "langevin" not in name]


def limits_of(name):
    return [{}, {"clamp": (-0.2, 0.6)}, {"threshold": 0.8}] if name in LIMITED else [{}]


@pytest.mark.parametrize("g", [0, 3.5])
@pytest.mark.parametrize("name", GUIDED)
def test_guidance_is_the_combined_network(backend, name, g):
    """u + g (c - u), Ho and Salimans 2022, under every kind of limits too."""
    x, run = start(5, 7), GUIDED[name]
    for options in limits_of(name):
        got = run(lambda x, t: (network(x, t), other(x, t)), x, guidance=g, **options)
        same(got, run(lambda x, t: other(x, t) + g * (network(x, t) - other(x, t)), x, **options))


@pytest.mark.parametrize("name", LIMITED)
def test_one_launch_for_each_look(name, monkeypatch):
    """Whatever is folded in; a threshold needs the estimate first, and churn raises x before the look."""
    looks, launches = [], []

    def net(x, t):
        looks.append(t)
        return network(x, t), other(x, t)

    def counted(original):
        def call(*args, **kwargs):
            made = original(*args, **kwargs)
            launches.extend([args] * (made is not None))
            return made

        return call

    monkeypatch.setattr(launch, "affine", counted(launch.affine))
    GUIDED[name](net, start(2, 3), guidance=2.0, clamp=1.0)
    assert len(launches) == len(looks) > 0
    looks.clear(), launches.clear()
    GUIDED[name](net, start(2, 3), guidance=2.0, threshold=0.9)
    assert len(launches) == 2 * len(looks) > 0


# Dynamic thresholding.


def thresholded(x0, q):
    """Saharia et al. 2022, section 2.3 and figure A.10."""
    s = torch.quantile(x0.abs().flatten(1), q, 1).clamp(min=1.0).reshape(-1, *[1] * (x0.dim() - 1))
    return torch.minimum(torch.maximum(x0, -s), s) / s


@pytest.mark.parametrize("q", [0.3, 0.8, 0.995, 1.0])
def test_thresholding_is_the_formula(backend, q):
    """On samples that exceed 1, and one that does not."""
    x, noise = start(5, 3, 4), df.Noise(3)
    x[2] *= 0.01
    sizes = []

    def limit(x0):
        sizes.append(x0.abs().flatten(1).quantile(q, 1))
        return thresholded(x0, q)

    same(ddpm(network, x, SCHEDULE, noise, threshold=q), plain_ddpm(network, x, noise, "small", limit))
    got = ddim(network, x, SCHEDULE, noise, steps=6, eta=0.5, threshold=q)
    same(got, plain_ddim(network, x, noise, 6, 0.5, limit))
    clipped = ddim(network, x, SCHEDULE, noise, steps=6, eta=0.5, threshold=q, use_clipped_model_output=True)
    same(clipped, plain_ddim(network, x, noise, 6, 0.5, limit, clipped=True))
    sizes = torch.stack(sizes)
    assert (sizes > 1.1).any() and (sizes < 0.9).any()
    assert got.abs().max() <= 1


def test_a_threshold_that_never_acts():
    """s = 1 for a quantile below 1: a clamp."""
    x, tiny = 0.1 * start(4, 33), lambda x, t: 0.0 * x
    short = df.Schedule.linear(5, 0.01, 0.1)
    assert torch.equal(ddpm(tiny, x, short, N0, threshold=0.9), ddpm(tiny, x, short, N0, clamp=1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_quantiles(dtype):
    """Linear between neighbours; what interpolates in half precision rounds once more, to its own ulp."""
    ulp = torch.finfo(dtype).eps
    for shape in ((3, 1), (3, 2), (2, 7, 5), (4, 200), (5,)):
        x = start(*shape, dtype=dtype).abs()
        for q in (1e-3, 0.25, 0.5, 0.9, 0.995, 1.0):
            wanted = torch.quantile(x.double().reshape(shape[0], -1), q, 1)
            got = quantile_of_samples(x, q)
            assert got.shape == shape[:1]
            torch.testing.assert_close(got.double(), wanted, rtol=2 * ulp, atol=2 * ulp)


@pytest.mark.parametrize("shape", [(4,), (1, 1)])
def test_thresholding_of_scalars(shape):
    x = 30 * start(*shape)
    got = ddpm(network, x, SCHEDULE, df.Noise(3), threshold=0.9)
    same(
        got, plain_ddpm(network, x, df.Noise(3), "small", lambda x0: thresholded(x0.reshape(-1, 1), 0.9).reshape(shape))
    )


# Learned variance.


def plain_learned(net, x, noise, clamp=None):
    """Nichol and Dhariwal 2021, eq. 15, as p_mean_variance and p_sample of their code have it."""
    T = len(BAR)
    for t in reversed(range(T)):
        bar, before = BAR[t], BAR[t - 1] if t else 1.0
        alpha, beta = bar / before, 1 - bar / before
        eps, v = net(x, torch.full(x.shape[:1], t))
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        x0 = x0 if clamp is None else limited(x0, clamp)
        mean = (math.sqrt(before) * beta * x0 + math.sqrt(alpha) * (1 - before) * x) / (1 - bar)
        if t:
            min_log, max_log = math.log(beta * (1 - before) / (1 - bar)), math.log(beta)
            frac = (v + 1) / 2
            log_variance = frac * max_log + (1 - frac) * min_log
            mean = mean + torch.exp(0.5 * log_variance) * noise.fold_in(t).normal(x.shape, dtype=x.dtype)
        x = mean
    return x


def with_variance(x, t):
    return network(x, t), torch.sin(3 * x)


@pytest.mark.parametrize("clamp", [None, (-0.2, 0.6)])
def test_learned_variance_is_equation_15(backend, clamp):
    x, noise = start(5, 7), df.Noise(3)
    got = ddpm(with_variance, x, SCHEDULE, noise, variance="learned", clamp=clamp)
    same(got, plain_learned(with_variance, x, noise, clamp))


@pytest.mark.parametrize("v, variance", [(-1.0, "small"), (1.0, "large")])
def test_learned_variance_at_its_ends(backend, v, variance):
    x, noise = start(5, 7), df.Noise(3)
    got = ddpm(lambda x, t: (network(x, t), torch.full_like(x, v)), x, SCHEDULE, noise, variance="learned")
    same(got, ddpm(network, x, SCHEDULE, noise, variance=variance))


def test_learned_variance_under_guidance(backend):
    """(conditional, unconditional, v)."""
    x, noise = start(5, 7), df.Noise(3)

    def net(x, t):
        return network(x, t), other(x, t), torch.sin(3 * x)

    def combined(x, t):
        return other(x, t) + 2.5 * (network(x, t) - other(x, t)), torch.sin(3 * x)

    for clamp in (None, (-0.2, 0.6)):
        got = ddpm(net, x, SCHEDULE, noise, variance="learned", guidance=2.5, clamp=clamp)
        same(got, plain_learned(combined, x, noise, clamp))


def test_learned_variance_where_nothing_is_added():
    """Two levels alike have a posterior without variance, whose logarithm must not come in."""
    schedule = df.Schedule.from_betas([0.1, 0.0, 0.2])
    wanted = ddpm(network, X, schedule, N0)
    got = ddpm(lambda x, t: (network(x, t), -torch.ones_like(x)), X, schedule, N0, variance="learned")
    assert wanted.isfinite().all()
    torch.testing.assert_close(got, wanted)


def test_learned_variance_stores_no_noise(monkeypatch):
    """Where there are kernels, they make it."""
    if df.kernels.dispatch.default_name("cpu") == "reference":
        pytest.skip("plain torch makes the noise as a tensor")
    x, noise = start(5, 7), df.Noise(3)
    wanted = ddpm(with_variance, x, SCHEDULE, noise, variance="learned")
    monkeypatch.setattr(df.Noise, "normal", None)
    assert torch.equal(ddpm(with_variance, x, SCHEDULE, noise, variance="learned"), wanted)


# What a network predicts.


def predicting(what, schedule, eps):
    """The same network under another parameterisation."""

    def net(x, t):
        alpha, sigma = (c[t].reshape(-1, *[1] * (x.dim() - 1)) for c in (schedule.alpha, schedule.sigma))
        e = eps(x, t)
        x0 = (x - sigma * e) / alpha
        return {"eps": e, "x0": x0, "v": alpha * e - sigma * x0, "score": -e / sigma, "flow": e - x0}[what]

    return net


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("what", ["x0", "v", "score", "flow"])
def test_every_parameterisation_gives_the_same_samples(backend, what, clamp):
    x, noise, net = start(3, 11), df.Noise(8), predicting(what, SCHEDULE, network)
    same(ddpm(net, x, SCHEDULE, noise, predict=what, clamp=clamp), ddpm(network, x, SCHEDULE, noise, clamp=clamp), 1e-9)
    same(
        ddim(net, x, SCHEDULE, noise, steps=6, eta=0.5, predict=what, clamp=clamp),
        ddim(network, x, SCHEDULE, noise, steps=6, eta=0.5, clamp=clamp),
        1e-9,
    )


def test_clamp_limits_the_result():
    """The last step returns the x0 estimate itself."""
    x = 3 * start(4, 100, dtype=torch.float32)
    for clamp, low, high in ((0.25, -0.25, 0.25), ((-0.1, 0.6), -0.1, 0.6)):
        for result in (
            ddpm(network, x, SCHEDULE, df.Noise(0), clamp=clamp),
            ddim(network, x, SCHEDULE, df.Noise(0), steps=5, clamp=clamp, use_clipped_model_output=True),
        ):
            assert result.min() == pytest.approx(low) and result.max() == pytest.approx(high)
        raw = ddim(network, x, SCHEDULE, df.Noise(0), steps=5, clamp=clamp)
        assert low - 1e-6 < raw.min() and raw.max() == pytest.approx(high)


# Distributions.

LONG = df.Schedule.linear(100, 1e-3, 0.2)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_on_gaussian_data(variance):
    data = Gaussian(LONG)
    x = ddpm(data.eps, (16, 4096), LONG, df.Noise(11), variance=variance)
    mean, var = data.after(list(range(100))[::-1], 1.0, variance == "large")
    check_moments(x, mean, var)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_on_gaussian_data(eta):
    data = Gaussian(LONG)
    levels = np.round(np.linspace(99, 0, 50)).astype(int).tolist()
    x = ddim(data.eps, (16, 4096), LONG, df.Noise(12), steps=50, eta=eta)
    mean, var = data.after(levels, eta)
    check_moments(x, mean, var)


def test_the_recursion_comes_to_the_data():
    """The judge of the tests above has an error of the first order in the step, and ends at the true moments."""
    for eta, large in ((0.0, False), (1.0, False), (1.0, True)):
        errors = []
        for T in (500, 1000, 2000):
            data = Gaussian(df.Schedule.linear(T, 0.1 / T, 20 / T))
            mean, var = data.after(list(range(T))[::-1], eta, large)
            assert abs(mean - data.mean) < 2e-3  # x_T is not quite N(0, 1)
            errors.append(abs(math.sqrt(var) - data.std))
        assert errors[1] < 4e-3
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.15) == errors[1] / errors[2]


def test_zero_terminal_schedule_with_v():
    schedule = LONG.zero_terminal_snr()
    data = Gaussian(schedule)
    x = ddpm(data.v, (16, 4096), schedule, df.Noise(13), predict="v")
    check_moments(x, *data.after(list(range(100))[::-1], 1.0))
    x = ddim(data.v, (16, 4096), schedule, df.Noise(13), predict="v", steps=100)
    check_moments(x, *data.after(list(range(100))[::-1], 0.0))
    # alpha_T = 0: the first step forgets x_T, and x0_hat is -v, the data's mean
    one = ddim(data.v, (2, 3), schedule, df.Noise(13), predict="v", steps=1)
    torch.testing.assert_close(one, torch.full((2, 3), data.mean))


class Mixture:
    """0.3 N(-1, std^2) + 0.7 N(1, std^2). A sampler's law in one dimension is a density on a grid."""

    weight = 0.3

    def __init__(self, std, reach=5.0, points=600):
        self.std = std
        # Half of a kernel's std is spacing enough. 0 lies between two points.
        self.grid = torch.linspace(-reach, reach, points, dtype=torch.float64)

    def score(self, x, alpha, sigma):
        """Of alpha * data + sigma * eps."""
        variance = alpha**2 * self.std**2 + sigma**2
        logit = math.log(1 / self.weight - 1) + 2 * alpha * x / variance
        return (alpha * (2 * torch.sigmoid(logit) - 1) - x) / variance

    def normal(self, std):
        density = torch.exp(-((self.grid / std) ** 2) / 2)
        return density / density.sum()

    def kernel(self, mean, std):
        """To the density of mean(x) + std * z from that of x."""
        columns = torch.exp(-(((self.grid[:, None] - mean(self.grid)) / std) ** 2) / 2)
        return columns / columns.sum(0)

    def check(self, x, density, last=lambda x: x):
        """Samples x against last(X), X of that density: the weight of the left mode and three moments."""
        image = last(self.grid)
        for f in (lambda v: (v < 0).double(), lambda v: v, torch.square, lambda v: v**3):
            mean = float(density @ f(image))
            error = math.sqrt((float(density @ f(image) ** 2) - mean**2) / x.numel())
            assert abs(float(f(x.double()).mean()) - mean) < FOUR * error
        return float(density @ (image < 0).double()), float(density @ image), float(density @ image**2)


def mixture_eps(schedule, data):
    def eps(x, t):
        alpha, sigma = float(schedule.alpha[t[0]]), float(schedule.sigma[t[0]])
        return -sigma * data.score(x, alpha, sigma)

    return eps


def test_ddpm_on_a_mixture():
    data, bar = Mixture(0.2), LONG.alpha_bar.tolist()
    eps = mixture_eps(LONG, data)

    def mean(x, t):  # Ho et al. 2020, eq. 11
        beta = 1 - bar[t] / (bar[t - 1] if t else 1.0)
        return (x - beta / math.sqrt(1 - bar[t]) * eps(x, [t])) / math.sqrt(1 - beta)

    density = data.normal(1.0)
    for t in range(99, 0, -1):
        std = math.sqrt((1 - bar[t] / bar[t - 1]) * (1 - bar[t - 1]) / (1 - bar[t]))
        density = data.kernel(lambda x, t=t: mean(x, t), std) @ density
    x = ddpm(eps, (16, 2048), LONG, df.Noise(21))
    weight, first, second = data.check(x, density, lambda x: mean(x, 0))
    # and 100 steps come near the data: E x = 0.4, E x^2 = 1.04
    assert abs(weight - 0.3) < 0.01 and abs(first - 0.4) < 0.01 and abs(second - 1.04) < 0.02


@pytest.mark.parametrize("steps", [10, 100])
def test_ddim_on_a_mixture(steps):
    """Deterministic: its law is the image of the start's."""
    data = Mixture(0.2)
    eps = mixture_eps(LONG, data)
    x = ddim(eps, (16, 2048), LONG, df.Noise(22), steps=steps)
    levels = np.round(np.linspace(99, 0, steps)).astype(int).tolist()

    def image(x):  # Song et al. 2021, eq. 13: a straight step in x / alpha and sigma / alpha
        ratio = (LONG.sigma / LONG.alpha).tolist()
        x = x / float(LONG.alpha[99])
        for t, s in zip(levels, [*levels[1:], None], strict=True):
            x = x + ((0.0 if s is None else ratio[s]) - ratio[t]) * eps(x * float(LONG.alpha[t]), [t])
        return x

    weight, first, second = data.check(x, data.normal(1.0), image)
    if steps == 100:
        assert abs(weight - 0.3) < 0.005 and abs(first - 0.4) < 0.005 and abs(second - 1.04) < 0.02


def test_stationary_variance_of_langevin():
    """x' = (1 - h) x + sqrt(2h) z: the variance settles at 2h / (1 - (1 - h)^2) = 1 / (1 - h/2)."""
    steps = torch.tensor([0.1, 0.5, 1.0, 1.5])
    x = langevin(lambda x: -x, torch.zeros(4, 32768), steps, 100, df.Noise(31))
    for row, h in zip(x, steps.tolist(), strict=True):
        check_moments(row, 0.0, 1 / (1 - h / 2))
    x = langevin(lambda x: -x, torch.ones(4, 32768), 0.1, 3, df.Noise(32), noise_scale=0.5)
    check_moments(x, 0.9**3, 0.5**2 * (1 - 0.9**6) / (1 - 0.1 / 2))


@pytest.mark.parametrize("denoise", [False, True])
def test_annealed_langevin_on_a_mixture(denoise):
    schedule, data = df.Schedule.geometric(10, 0.2, 2.0), Mixture(0.1, 9.0, 300)
    sigma, ratio, steps = schedule.sigma.tolist(), 0.2, 100

    def score(x, t):
        return data.score(x, 1.0, sigma[t[0]])

    density = data.normal(2.0)
    for t in range(9, -1, -1):
        h = ratio * sigma[t] ** 2
        kernel = data.kernel(lambda x, t=t, h=h: x + h * score(x, [t]), math.sqrt(2 * h))
        density = torch.linalg.matrix_power(kernel, steps) @ density
    x = annealed_langevin(
        score,
        2 * start(4, 2048, dtype=torch.float32),
        schedule,
        df.Noise(41),
        step_size=2 * ratio * sigma[0] ** 2,
        steps_per_level=steps,
        denoise=denoise,
    )
    weight, _, _ = data.check(x, density, (lambda x: x + sigma[0] ** 2 * score(x, [0])) if denoise else lambda x: x)
    assert abs(weight - 0.3) < 0.01  # both modes; the chain ends a little before its levels' balance


# One seed, any batch, any dtype.


def polynomial(x, t):
    """Sums and products alone: the same bits wherever a value lies in memory."""
    return 0.5 * x - 0.1 * x * x


def two(x, t):
    """The prediction and a second tensor, the unconditional prediction or v."""
    return polynomial(x, t), 0.3 * x


VE = df.Schedule.geometric(4, 0.1, 2.0)
VP = df.ContinuousSchedule.vp(0.1, 5.0)
SAMPLERS = {
    "langevin": lambda x, noise: langevin(lambda x: -0.5 * x, x, 0.1, 5, noise),
    "annealed_langevin": lambda x, noise: annealed_langevin(
        lambda x, t: -0.5 * x, x, VE, noise, step_size=1e-3, steps_per_level=3
    ),
    "ddpm": lambda x, noise: ddpm(polynomial, x, SCHEDULE, noise, clamp=2.0),
    "ddpm-threshold": lambda x, noise: ddpm(polynomial, x, SCHEDULE, noise, threshold=0.9),
    "ddpm-learned": lambda x, noise: ddpm(two, x, SCHEDULE, noise, variance="learned", clamp=2.0),
    "ddim": lambda x, noise: ddim(polynomial, x, SCHEDULE, noise, steps=6, eta=0.5),
    "ddim-guided": lambda x, noise: ddim(two, x, SCHEDULE, noise, steps=6, eta=0.5, guidance=1.5, clamp=2.0),
    "euler_ancestral": lambda x, noise: euler_ancestral(polynomial, x, SCHEDULE, noise, steps=6, clamp=2.0),
    "heun": lambda x, noise: heun(
        polynomial, x, VE, noise, steps=4, S_churn=1.0, predict="x0", conditioning="sigma", clamp=2.0
    ),
}
DETERMINISTIC = {
    "euler": lambda x, noise: euler(polynomial, x, SCHEDULE, noise, steps=6, clamp=2.0),
    "heun": lambda x, noise: heun(polynomial, x, SCHEDULE, noise, steps=6, clamp=2.0),
    "flow_euler": lambda x, noise: flow_euler(polynomial, x, SCHEDULE, noise, steps=6, clamp=2.0),
    "flow_midpoint": lambda x, noise: flow_midpoint(polynomial, x, SCHEDULE, noise, steps=5),
    "probability_flow": lambda x, noise: probability_flow(lambda x, t: -0.5 * polynomial(x, t), x, VP, noise, steps=5),
}
each_drawing_sampler = pytest.mark.parametrize("run", SAMPLERS.values(), ids=SAMPLERS)
each_sampler = pytest.mark.parametrize(
    "run", [*SAMPLERS.values(), *DETERMINISTIC.values()], ids=[*SAMPLERS, *(f"{name}-ode" for name in DETERMINISTIC)]
)


@each_sampler
def test_one_seed_one_result(run, backend):
    x = start(4, 3, 5, 5, dtype=torch.float32)
    before, state = x.clone(), torch.get_rng_state()
    first = run(x, df.Noise(1))
    assert first.shape == x.shape and first.dtype == x.dtype and first.isfinite().all()
    assert not first.requires_grad
    assert torch.equal(x, before)  # as it was given
    assert torch.equal(run(x, df.Noise(1)), first)
    assert torch.equal(torch.get_rng_state(), state)


@each_drawing_sampler
def test_another_key_another_result(run, backend):
    x = start(4, 3, 5, 5, dtype=torch.float32)
    first = run(x, df.Noise(1))
    assert not torch.equal(run(x, df.Noise(2)), first)
    assert not torch.equal(run(x, df.Noise(1).fold_in(0)), first)


@pytest.mark.parametrize("run", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_steps_without_noise(run):
    x = start(4, 3, 5, 5, dtype=torch.float32)
    assert torch.equal(run(x, df.Noise(1)), run(x, df.Noise(2)))


@each_sampler
def test_a_batch_in_parts_is_the_batch_at_once(run):
    x = start(8, 3, 5, dtype=torch.float32)
    whole = run(x, df.Noise(5))
    parts = [run(x[:4], df.Noise(5)), run(x[4:], df.Noise(5, first_sample=4))]
    assert torch.equal(torch.cat(parts), whole)
    ids = torch.tensor([6, 1, 3])
    assert torch.equal(run(x[ids], df.Noise(5, sample=ids)), whole[ids])


@each_sampler
def test_memory_format_does_not_matter(run):
    x = start(4, 3, 6, 6, dtype=torch.float32)
    assert torch.equal(run(x.to(memory_format=torch.channels_last), df.Noise(1)), run(x, df.Noise(1)))
    assert torch.equal(run(x[:1].expand(4, -1, -1, -1), df.Noise(1)), run(x[:1].repeat(4, 1, 1, 1), df.Noise(1)))


@each_sampler
@pytest.mark.parametrize("dtype, ulp", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)])
def test_dtypes(run, dtype, ulp):
    """Every step rounds x to its dtype once, and the network's output once: some 20 steps of an ulp or two."""
    x = start(4, 65, dtype=dtype)
    wanted = run(x.double(), df.Noise(1))
    got = run(x, df.Noise(1))
    assert got.dtype == dtype and wanted.dtype == torch.float64
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 20 * ulp


@each_sampler
def test_batches_of_nothing(run):
    assert run(torch.zeros(0, 3), df.Noise(1)).shape == (0, 3)
    assert run(torch.zeros(2, 0), df.Noise(1)).shape == (2, 0)


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_a_shape_starts_from_noise(sampler):
    x_T = df.Noise(9).fold_in(START).normal((3, 2, 4, 4))
    assert torch.equal(
        sampler(network, (3, 2, 4, 4), SCHEDULE, df.Noise(9), **_few(sampler)),
        sampler(network, x_T, SCHEDULE, df.Noise(9), **_few(sampler)),
    )
    assert torch.equal(
        sampler(network, torch.Size([3, 5]), SCHEDULE, df.Noise(9), **_few(sampler)),
        sampler(network, [3, 5], SCHEDULE, df.Noise(9), **_few(sampler)),
    )


def _few(sampler):
    return {"steps": 5} if sampler is ddim else {}


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_network_may_answer_in_another_dtype(dtype, other):
    """Under autocast, say. Its output is cast to the dtype of x."""
    x = start(3, 65, dtype=dtype)

    def run(*casts):
        def net(x, t=None):
            y = -0.5 * x
            for cast in casts:
                y = y.to(cast)
            return y

        return ddpm(net, x, SCHEDULE, df.Noise(0)), langevin(net, x, 0.1, 3, df.Noise(0))

    for got, wanted in zip(run(other), run(other, dtype), strict=True):
        assert got.dtype == dtype and torch.equal(got, wanted) and got.isfinite().all()


def test_a_network_with_parameters_runs_without_gradients():
    net = torch.nn.Linear(3, 3)
    x = start(4, 3, dtype=torch.float32).requires_grad_()
    for result in (
        ddpm(lambda x, t: net(x), x, SCHEDULE, df.Noise(0)),
        langevin(net, x, 0.01, 3, df.Noise(0)),
    ):
        assert not result.requires_grad
    with torch.inference_mode():
        inferred = ddpm(lambda x, t: net(x), x.detach(), SCHEDULE, df.Noise(0))
    assert torch.equal(inferred, ddpm(lambda x, t: net(x), x, SCHEDULE, df.Noise(0)))


# The progress bar.


@each_sampler
def test_no_progress_bar_by_default(run, capfd):
    run(torch.zeros(2, 3), df.Noise(0))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name, run",
    [
        ("langevin", lambda x: langevin(torch.neg, x, 0.1, 4, df.Noise(0), progress=True)),
        (
            "annealed_langevin",
            lambda x: annealed_langevin(lambda x, t: -x, x, VE, df.Noise(0), steps_per_level=2, progress=True),
        ),
        ("ddpm", lambda x: ddpm(polynomial, x, SCHEDULE, df.Noise(0), progress=True)),
        ("ddpm", lambda x: ddpm(two, x, SCHEDULE, df.Noise(0), variance="learned", progress=True)),
        ("ddim", lambda x: ddim(polynomial, x, SCHEDULE, df.Noise(0), steps=5, progress=True)),
        ("heun", lambda x: heun(polynomial, x, SCHEDULE, df.Noise(0), steps=5, progress=True)),
        ("flow_midpoint", lambda x: flow_midpoint(polynomial, x, SCHEDULE, df.Noise(0), steps=5, progress=True)),
        ("probability_flow", lambda x: probability_flow(polynomial, x, VP, df.Noise(0), steps=5, progress=True)),
    ],
)
def test_progress_bar_on_request(name, run, capsys):
    result = run(torch.ones(2, 3))
    assert result.shape == (2, 3)
    out = capsys.readouterr().err  # as tqdm does it
    assert name in out and "100%" in out


# Bad input.

X = torch.zeros(2, 3)
N0 = df.Noise(0)
STILL = df.Schedule.from_betas([0.0, 0.0, 0.1])


def bad(sampler, *, net=network, x=X, schedule=SCHEDULE, noise=N0, **options):
    return lambda: sampler(net, x, schedule, noise, **options)


def bad_chain(*, score=torch.neg, x=X, step_size=0.1, steps=2, noise=N0):
    return lambda: langevin(score, x, step_size, steps, noise)


THREE_IDS = df.Noise(0, sample=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (bad(ddpm, variance="tiny"), ValueError, "ddpm: variance must be 'small', 'large' or 'learned', got 'tiny'"),
        (bad(ddpm, predict="epsilon"), ValueError, "ddpm: predict must be one of 'eps', .* got 'epsilon'"),
        (bad(ddpm, clamp=-1.0), ValueError, "ddpm: clamp must be"),
        (bad(ddim, clamp=(1.0, 0.0), steps=2), ValueError, "ddim: clamp must be"),
        (bad(ddpm, x=X.int()), TypeError, "ddpm: x must be float16, .* or float64, got torch.int32"),
        (bad(ddpm, x=X.sum()), ValueError, r"ddpm: x must have a batch dimension, got shape \(\)"),
        (bad(ddpm, x=5), TypeError, r"ddpm: x must be a tensor or a shape \(B, ...\), got int"),
        (bad(ddim, x="ab", steps=2), TypeError, r"ddim: x must be a tensor or a shape \(B, ...\), got str"),
        (bad(ddpm, noise=X), TypeError, "ddpm: noise must be a Noise, .*got a tensor"),
        (bad(ddpm, noise=0, x=(2, 3)), TypeError, "ddpm: noise must be a Noise, got int"),
        (bad(ddpm, noise=0), TypeError, "ddpm: noise must be a Noise.*, got int"),
        (bad(ddpm, noise=THREE_IDS), ValueError, r"ddpm: noise.sample must have shape \(2,\), got \(3,\)"),
        (
            bad(ddpm, net=lambda x, t: x[:, :2]),
            ValueError,
            r"the network's output must have shape \(2, 3\), got \(2, 2\)",
        ),
        (bad(ddpm, net=lambda x, t: x[0]), ValueError, r"the network's output must have shape \(2, 3\), got \(3,\)"),
        (bad(ddpm, net=lambda x, t: (x,)), TypeError, "ddpm: the network's output must be a tensor, got tuple"),
        (
            bad(ddpm, guidance=2.0),
            TypeError,
            r"ddpm: the network's output must be a tuple \(conditional, unconditional\), got Tensor",
        ),
        (
            bad(ddim, steps=2, guidance=2.0, net=lambda x, t: (x, x, x)),
            TypeError,
            r"ddim: the network's output must be a tuple \(conditional, unconditional\), got 3 of them",
        ),
        (
            bad(ddim, steps=2, guidance=2.0, net=lambda x, t: (x, x[:1])),
            ValueError,
            r"the network's output \(unconditional\) must have shape \(2, 3\), got \(1, 3\)",
        ),
        (bad(ddpm, guidance=math.inf), ValueError, "ddpm: guidance must be None or a finite number, got inf"),
        (bad(ddpm, guidance="7"), ValueError, "ddpm: guidance must be None or a finite number, got '7'"),
        (
            bad(ddpm, variance="learned"),
            TypeError,
            r"ddpm: the network's output must be a tuple \(prediction, v\) or of twice",
        ),
        (
            bad(ddpm, variance="learned", guidance=1.0, net=lambda x, t: (x, x)),
            TypeError,
            r"must be a tuple \(conditional, unconditional, v\), got 2 of them",
        ),
        (
            bad(ddpm, clamp=1.0, threshold=0.9),
            ValueError,
            "ddpm: give clamp or threshold, not both, got 1.0 and 0.9",
        ),
        (bad(ddpm, threshold=0.0), ValueError, r"ddpm: threshold must be a quantile in \(0, 1\], got 0.0"),
        (bad(ddpm, threshold=99.5), ValueError, r"ddpm: threshold must be a quantile in \(0, 1\], got 99.5"),
        (bad(annealed_langevin, schedule=VE, guidance=2.0), TypeError, "the score must be a tuple"),
        (
            bad(ddpm, net=lambda x, t: x.int()),
            TypeError,
            "ddpm: the network's output must be float16.* got torch.int32",
        ),
        (bad(ddim), ValueError, r"ddim: steps must be in \[1, 20\], got 50"),
        (bad(ddim, steps=0), ValueError, r"ddim: steps must be in \[1, 20\], got 0"),
        (bad(ddim, steps=5, eta=1.5), ValueError, r"ddim: eta must be in \[0, 1\], got 1.5"),
        (bad(ddim, steps=5, eta=float("nan")), ValueError, r"ddim: eta must be in \[0, 1\], got nan"),
        (bad_chain(score=lambda x: x[:1]), ValueError, r"langevin: the score must have shape \(2, 3\), got \(1, 3\)"),
        (bad_chain(score=lambda x: 0.0), TypeError, "langevin: the score must be a tensor, got float"),
        (bad_chain(step_size=-0.1), ValueError, "step_size must not be negative, got -0.1"),
        (bad_chain(step_size=torch.tensor([0.1, -0.2])), ValueError, "step_size must not be negative, got -0.2"),
        (bad_chain(step_size=float("nan")), ValueError, "step_size must not be negative, got nan"),
        (bad_chain(step_size=torch.ones(3)), ValueError, r"step_size must be a float or have shape \(2,\)"),
        (bad_chain(steps=-1), ValueError, "langevin: steps must not be negative, got -1"),
        (bad_chain(x=(2, 3)), TypeError, "langevin: x must be a tensor, got tuple"),
        (bad_chain(noise=X), TypeError, "langevin: noise must be a Noise, .*got a tensor"),
        (bad(annealed_langevin), ValueError, "schedule must be variance exploding .* got Schedule.linear"),
        (bad(annealed_langevin, schedule=VE, net=lambda x, t: x[:1]), ValueError, "the score must have shape"),
        (
            bad(annealed_langevin, schedule=VE, step_size=-1e-5),
            ValueError,
            "annealed_langevin: step_size must be finite and not negative, got -1e-05",
        ),
        (bad(annealed_langevin, schedule=VE, steps_per_level=0), ValueError, "steps_per_level must be positive, got 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("sampler", [ddpm, ddim])
@pytest.mark.parametrize("predict", ["eps", "score"])
def test_no_step_from_pure_noise_by_eps(sampler, predict):
    schedule = SCHEDULE.zero_terminal_snr()
    where = r"level 19 of Schedule.linear\(20, 0.005, 0.4\).zero_terminal_snr\(\), alpha = 0.0, sigma = 1.0"
    message = f"{sampler.__name__}: has no finite value at {where}.*use predict='v'"
    with pytest.raises(ValueError, match=message):
        sampler(network, X, schedule, N0, predict=predict, **_few(sampler))
    x0 = sampler(lambda x, t: torch.full_like(x, 0.5), X, schedule, N0, predict="x0", **_few(sampler))
    assert torch.equal(x0, torch.full_like(X, 0.5))


def test_levels_without_noise_pass():
    """Where sigma = 0 already, the step to another such level, or to the data, is x0_hat = x."""
    result = ddpm(lambda x, t: torch.where(t[:, None] > 1, 0.25, 9.0) + 0 * x, X, STILL, N0)
    x0 = -math.sqrt(0.1) * 0.25 / math.sqrt(0.9)
    torch.testing.assert_close(result, torch.full_like(X, x0))


# What is worked out before the loop.


def test_plans_are_made_once_for_equal_arguments(monkeypatch):
    made, original = [], df.samplers.DDIM.coefficients

    def counted(*args):
        made.append(args)
        return original(*args)

    monkeypatch.setattr(df.samplers.DDIM, "coefficients", counted)
    schedule, x = df.Schedule.linear(30), start(2, 3)

    def run(schedule=schedule, **options):
        return df.samplers.ddim(network, x, schedule, df.Noise(1), **{"steps": 5, **options})

    first = run()
    assert torch.equal(run(), first)
    assert len(made) == 1
    assert torch.equal(run(levels=[29, 22, 14, 7, 0]), first)
    assert len(made) == 2
    for k, options in enumerate(({"eta": 0.5}, {"clamp": 0.1}, {"predict": "v"}, {"steps": 4}), 3):
        assert not torch.equal(run(**options), first)
        assert len(made) == k
    assert torch.equal(run(df.Schedule.linear(30)), first)  # another object may hold other levels
    assert len(made) == 7
    assert torch.equal(run(), first)
    assert len(made) == 7


def test_plans_are_plain_tensors_whatever_is_around():
    schedule, x = df.Schedule.linear(30), start(2, 3)
    with torch.inference_mode():
        inferred = df.samplers.euler(network, x, schedule, df.Noise(1), steps=3)
    assert torch.equal(df.samplers.euler(network, x, schedule, df.Noise(1), steps=3), inferred)
    pushed = torch.func.vmap(lambda x: df.samplers.euler(network, x, schedule, df.Noise(1), steps=4))(x[None])[0]
    torch.testing.assert_close(pushed, df.samplers.euler(network, x, schedule, df.Noise(1), steps=4))


def test_a_plan_that_was_made_hides_no_error():
    schedule, x = df.Schedule.linear(30), start(2, 3)

    def both(x, t):
        return network(x, t), other(x, t)

    df.samplers.ddim(both, x, schedule, df.Noise(1), steps=3, guidance=1.0)
    for wrong in (True, "1", [1.0], torch.ones(1, 1)):
        for _ in range(2):
            with pytest.raises(ValueError, match="guidance must be"):
                df.samplers.ddim(both, x, schedule, df.Noise(1), steps=3, guidance=wrong)
    for _ in range(2):
        with pytest.raises(ValueError, match="predict must be one of"):
            df.samplers.ddim(both, x, schedule, df.Noise(1), steps=3, predict=["eps"])
