"""Euler, Heun, flow matching and the probability-flow ODE: against the papers' steps in plain torch, and their order.

The exact maps are those of tests/exact.py for Gaussian data, and for a mixture scipy's solution of the ODE with the
exact field, to 1e-10. An order is the slope of log error over log steps.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import dae_fast as df
from dae_fast.samplers import ddim, euler, euler_ancestral, flow_euler, flow_midpoint, heun, probability_flow

from .exact import Gaussian, Mixture
from .test_samplers import FOUR, SCHEDULE, network, same, start

N0 = df.Noise(0)
KARRAS = df.Schedule.karras(9, 0.02, 5.0)
FLOW = df.Schedule.flow(24)
GAUSSIAN = Gaussian([0.7, -0.3, 0.1], [0.4, 1.3, 0.05])
MIXTURE = Mixture([0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], [[0.5], [0.7]])


def order(steps, errors):
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def far(got, wanted):
    return float((got - wanted).abs().max())


def of_sigma(x, sigma):
    """EDM's D, told sigma (B,)."""
    assert sigma.shape == x.shape[:1] and sigma.dtype == x.dtype
    column = sigma.reshape(-1, *[1] * (x.dim() - 1))
    return torch.tanh(x / (1 + column)) * 0.8 - 0.1 * column


# The papers' steps.


@pytest.mark.parametrize("options", [{}, {"clamp": (-0.2, 0.6)}, {"threshold": 0.9}, {"predict": "v"}])
def test_euler_is_ddim(backend, options):
    x = start(5, 7)
    for own in ({"steps": 1}, {"steps": 6}, {"steps": 20}, {"levels": [19, 11, 4, 3]}):
        wanted = ddim(network, x, SCHEDULE, N0, use_clipped_model_output=True, **own, **options)
        assert torch.equal(euler(network, x, SCHEDULE, N0, **own, **options), wanted)


def test_euler_is_euler(backend):
    """Song et al. 2021 (DDIM), eq. 13: x/alpha moves by eps times the change of sigma/alpha."""
    x, levels = start(5, 7), [19, 13, 6, 0]
    ratio = (SCHEDULE.sigma / SCHEDULE.alpha).tolist()
    wanted = x / float(SCHEDULE.alpha[19])
    for t, s in zip(levels, [*levels[1:], None], strict=True):
        eps = network(wanted * float(SCHEDULE.alpha[t]), torch.full((5,), t))
        wanted = wanted + ((0.0 if s is None else ratio[s]) - ratio[t]) * eps
    same(euler(network, x, SCHEDULE, N0, steps=4), wanted)


@pytest.mark.parametrize("eta, noise_scale", [(0.0, 1.0), (0.6, 1.0), (1.0, 0.9), (1.7, 1.0)])
def test_euler_ancestral_is_k_diffusions(backend, eta, noise_scale):
    """get_ancestral_step and sample_euler_ancestral, in x/alpha and sigma/alpha."""
    levels, noise = [19, 13, 6, 0], df.Noise(4)
    for schedule in (SCHEDULE, df.Schedule.karras(20, 0.02, 5.0)):
        x, alpha = start(5, 7), schedule.alpha.tolist()
        ratio = (schedule.sigma / schedule.alpha).tolist()
        wanted = x / alpha[19]
        for t, s in zip(levels, [*levels[1:], None], strict=True):
            sigma_from, sigma_to = ratio[t], 0.0 if s is None else ratio[s]
            up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
            down = (sigma_to**2 - up**2) ** 0.5
            d = network(wanted * alpha[t], torch.full((5,), t))
            wanted = wanted + d * (down - sigma_from)
            wanted = wanted + noise.fold_in(t).normal(x.shape, dtype=x.dtype) * noise_scale * up
        same(euler_ancestral(network, x, schedule, noise, steps=4, eta=eta, noise_scale=noise_scale), wanted)


def test_euler_ancestral_is_ddim_up_to_eta_1():
    x = start(4, 33, dtype=torch.float32)
    for eta in (0.3, 1.0):
        wanted = ddim(network, x, SCHEDULE, df.Noise(3), steps=7, eta=eta)
        assert torch.equal(euler_ancestral(network, x, SCHEDULE, df.Noise(3), steps=7, eta=eta), wanted)


def edm(D, x, sigmas, keys, noise, S_churn=0.0, S_tmin=0.0, S_tmax=math.inf, S_noise=1.0, clip=lambda x0: x0):
    """Karras et al. 2022, algorithm 2, line by line."""
    N = len(sigmas)

    def slope(x, sigma):
        return (x - clip(D(x, torch.full(x.shape[:1], sigma, dtype=x.dtype)))) / sigma

    for key, t, t_next in zip(keys, sigmas, [*sigmas[1:], 0.0], strict=True):
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_tmin <= t <= S_tmax else 0.0
        eps = S_noise * noise.fold_in(key).normal(x.shape, dtype=x.dtype)
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * eps
        d = slope(x_hat, t_hat)
        x = x_hat + (t_next - t_hat) * d
        if t_next != 0:
            x = x_hat + (t_next - t_hat) * (0.5 * d + 0.5 * slope(x, t_next))
    return x


@pytest.mark.parametrize(
    "churn",
    [
        {},
        {"S_churn": 2.0},
        {"S_churn": 80.0, "S_noise": 1.01},  # more than sqrt(2) - 1 a step
        {"S_churn": 2.0, "S_tmin": 0.05, "S_tmax": 2.0, "S_noise": 0.9},
    ],
)
def test_heun_is_algorithm_2(backend, churn):
    x, noise = 5 * start(5, 7), df.Noise(6)
    sigmas = KARRAS.sigma.flip(0).tolist()
    keys = list(range(8, -1, -1))
    options = {"steps": 9, "predict": "x0", "conditioning": "sigma", **churn}
    same(heun(of_sigma, x, KARRAS, noise, **options), edm(of_sigma, x, sigmas, keys, noise, **churn))
    got = heun(of_sigma, x, KARRAS, noise, clamp=(-0.3, 0.5), **options)
    same(got, edm(of_sigma, x, sigmas, keys, noise, clip=lambda x0: x0.clamp(-0.3, 0.5), **churn))


def test_heun_without_churn_is_deterministic():
    x = start(3, 5, dtype=torch.float32)
    assert torch.equal(heun(network, x, SCHEDULE, df.Noise(1)), heun(network, x, SCHEDULE, df.Noise(2)))
    options = {"conditioning": "sigma", "steps": 9, "predict": "x0"}
    wanted = heun(of_sigma, x, KARRAS, df.Noise(1), **options)
    assert torch.equal(heun(of_sigma, x, KARRAS, df.Noise(2), S_churn=9.0, S_tmin=6.0, **options), wanted)
    assert not torch.equal(heun(of_sigma, x, KARRAS, df.Noise(2), S_churn=9.0, **options), wanted)


@pytest.mark.parametrize("sampler", [euler, euler_ancestral, heun])
def test_conditioning(sampler):
    """A network that looks its level up in the sigma that it is told gives what one told the level gives."""
    told = []

    def by_sigma(x, sigma):
        told.append(float(sigma[0]))
        t = (KARRAS.sigma[:, None] - sigma.double()).abs().argmin(0)
        return network(x, t)

    x = start(3, 5)
    got = sampler(by_sigma, x, KARRAS, N0, steps=9, conditioning="sigma")
    assert torch.equal(got, sampler(network, x, KARRAS, N0, steps=9))
    assert set(told) == set(KARRAS.sigma.tolist())


def test_what_the_network_is_told():
    """Levels as int64 (B,), sigmas and times in the dtype of the arithmetic."""
    seen = []

    def net(x, t):
        seen.append((t.dtype, t.shape))
        return 0.1 * x

    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = start(3, 2, dtype=dtype)
        seen.clear()
        heun(net, x, KARRAS, N0, steps=2, conditioning="sigma", S_churn=1.0)
        probability_flow(net, x, df.ContinuousSchedule.ve(), N0, steps=1)
        assert seen == [(wide, (3,))] * 6
        seen.clear()
        heun(net, x, KARRAS, N0, steps=2)
        flow_midpoint(net, x, FLOW, N0, steps=1)
        flow_euler(net, x, FLOW, N0, steps=1)
        assert seen == [(torch.int64, (3,))] * 6


def velocity(x, t):
    return torch.cos(x) * 0.7 - 0.02 * t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def test_flow_euler_is_euler(backend):
    """x + dt * u on t = 1, 1 - 1/N, ..., 1/N."""
    wanted = x = start(5, 7)
    for steps in (24, 6):
        wanted = x
        for i in range(steps):
            wanted = wanted - velocity(wanted, torch.full((5,), 23 - i * 24 // steps)) / steps
        same(flow_euler(velocity, x, FLOW, N0, steps=steps), wanted)
    own = flow_euler(velocity, x, FLOW, N0, levels=[23, 5])
    half = x - 0.75 * velocity(x, torch.full((5,), 23))
    same(own, half - 0.25 * velocity(half, torch.full((5,), 5)))


def test_flow_midpoint_is_midpoint(backend):
    x = start(5, 7)
    for steps in (12, 3):
        wanted = x
        for i in range(steps):
            first = 23 - i * 24 // steps
            middle = wanted - velocity(wanted, torch.full((5,), first)) / (2 * steps)
            wanted = wanted - velocity(middle, torch.full((5,), first - 12 // steps)) / steps
        same(flow_midpoint(velocity, x, FLOW, N0, steps=steps), wanted)


def test_a_middle_level_off_the_middle(backend):
    """x + h ((1 - 1/2c) k_t + k_m/2c)."""
    x, levels = start(5, 7), [23, 18, 8, 2]  # t = 1, 19/24, 9/24, 3/24, and 0 at last
    wanted = x
    for t, m, s in ((24, 19, 9), (9, 3, 0)):
        c = (t - m) / (t - s)
        k_t = velocity(wanted, torch.full((5,), t - 1))
        k_m = velocity(wanted - (t - m) / 24 * k_t, torch.full((5,), m - 1))
        wanted = wanted - (t - s) / 24 * ((1 - 1 / (2 * c)) * k_t + k_m / (2 * c))
    same(flow_midpoint(velocity, x, FLOW, N0, levels=levels), wanted)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("denoise", [False, True])
def test_probability_flow_is_equation_13(backend, method, denoise):
    schedule, x, times = df.ContinuousSchedule.vp(0.1, 5.0), start(5, 7), [1.0, 0.6, 0.35, 0.1]

    def score(x, t):
        return -torch.tanh(x) * (1 + t[:, None])

    def slope(x, t):
        beta = 0.1 + t * 4.9
        return -beta / 2 * x - beta / 2 * score(x, torch.full((5,), t, dtype=x.dtype))

    wanted = x
    for t, s in pairwise(times):
        k = slope(wanted, t)
        ahead = wanted + (s - t) * k
        wanted = ahead if method == "euler" else wanted + (s - t) / 2 * (k + slope(ahead, s))
    if denoise:
        integral = 0.1 * 0.1 + 4.9 / 2 * 0.1**2
        variance = -math.expm1(-integral)
        last = score(wanted, torch.full((5,), 0.1, dtype=x.dtype))
        wanted = (wanted + variance * last) / math.exp(-integral / 2)
    same(probability_flow(score, x, schedule, N0, times=times, method=method, denoise=denoise), wanted, 1e-9)


# What a network predicts.


@pytest.mark.parametrize("what", ["eps", "x0", "v", "score", "flow", df.EDM(0.5)], ids=str)
def test_every_parameterisation_gives_the_same_samples(backend, what):
    """Without limits the second-order steps read the prediction itself, with limits x0 made of it."""
    x = start(3, 11)

    def of(schedule):
        """The network with eps = sin(x), as `what`."""
        return lambda x, t: df.convert(x, torch.sin(x), schedule[t], predict="eps", to=what)

    for limits in ({}, {"clamp": 0.5}, {"threshold": 0.7}):
        for sampler, schedule in (
            (euler, KARRAS),
            (euler_ancestral, KARRAS),
            (heun, KARRAS),
            (heun, SCHEDULE),
            (flow_euler, SCHEDULE),
            (flow_midpoint, SCHEDULE),
            (probability_flow, df.ContinuousSchedule.vp(0.1, 5.0, 0.01)),
        ):
            by_eps, run = {**limits, "steps": 4, "predict": "eps"}, sampler
            wanted = run(lambda x, t: torch.sin(x), x, schedule, N0, **by_eps)
            same(run(of(schedule), x, schedule, N0, **{**by_eps, "predict": what}), wanted, 1e-9)


# Order of convergence.


STEPS = (20, 40, 80, 160)


def solved(field, x, begin, end):
    """dx/dt = field(x, t) from begin to end, each row by itself in one system."""
    shape = x.shape

    def flat(t, y):
        return field(torch.from_numpy(y).reshape(shape), t).reshape(-1).numpy()

    found = solve_ivp(flat, (begin, end), x.reshape(-1).numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.from_numpy(found.y[:, -1]).reshape(shape)


@pytest.mark.parametrize("sampler, expected", [(euler, 1), (heun, 2)])
def test_order_on_a_mixture(sampler, expected):
    x, errors = 5 * start(6, 2), []
    exact = solved(lambda x, sigma: MIXTURE.eps(x, 1.0, sigma), x, 5.0, 0.1)
    for steps in STEPS:
        schedule = df.Schedule.karras(steps, 0.1, 5.0)
        got = sampler(MIXTURE.network(schedule), x, schedule, N0, steps=steps)
        errors.append(far(got, MIXTURE.x0(exact, 1.0, 0.1)))
    assert order(STEPS, errors) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(
    "sampler, expected, shift", [(flow_euler, 1, 3.0), (flow_midpoint, 2, 1.0), (flow_midpoint, 2, 3.0)]
)
def test_order_of_flows(sampler, expected, shift):
    """Shifted, the middle level is not in the middle; without its correction the order would be 1."""
    x, schedule, errors = start(6, 2), df.Schedule.flow(1600, shift), []
    exact = solved(lambda x, t: MIXTURE.flow(x, 1 - t, t), x, 1.0, 0.0)
    steps = (50, 100, 200)
    for n in steps:
        errors.append(far(sampler(MIXTURE.network(schedule, "flow"), x, schedule, N0, steps=n), exact))
    assert order(steps, errors) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(
    "schedule",
    [df.ContinuousSchedule.sub_vp(), df.ContinuousSchedule.ve(), df.ContinuousSchedule.edm()],
    ids=str,
)
def test_order_of_the_probability_flow(schedule):
    """Of the schedules that ORDERS of tests/test_samplers_exact.py has not."""
    x, errors, steps = start(4, 3), [], (100, 200)
    begin, end = (schedule.t_min + (schedule.t_max - schedule.t_min) * part for part in (0.9, 0.1))

    def score(x, t):
        return GAUSSIAN.score(x, schedule.alpha(t), schedule.sigma(t))

    places = [(schedule.alpha(t), schedule.sigma(t)) for t in (begin, end)]
    for n in steps:
        times = torch.linspace(begin, end, n + 1, dtype=torch.float64)
        got = probability_flow(score, x, schedule, N0, times=times, denoise=False)
        errors.append(far(got, GAUSSIAN.flow_map(x, *places)))
    assert order(steps, errors) == pytest.approx(2, abs=0.1)


def test_probability_flow_comes_to_the_data():
    """From its own start, by its own times."""
    schedule, data = df.ContinuousSchedule.vp(), Gaussian([0.7] * 64, [0.4] * 64)

    def score(x, t):
        return data.score(x, schedule.alpha(t), schedule.sigma(t)).to(x.dtype)

    x = probability_flow(score, (512, 64), schedule, df.Noise(5), steps=200).double()
    assert (
        abs(float(x.mean()) - 0.7) < FOUR * 0.4 / math.sqrt(x.numel()) + 5e-3
    )  # alpha(1) = 0.0066 of the mean is lost
    assert abs(float(x.std()) - 0.4) < FOUR * 0.4 / math.sqrt(2 * x.numel()) + 1e-3  # the order's error at 200 steps


def test_churn_on_gaussian_data():
    """Every step is affine in x and z, so mean and variance follow from algorithm 2; and they come to the data's."""
    mean, std, options = 0.7, 0.4, {"S_churn": 20.0, "S_tmin": 0.05, "S_tmax": 10.0, "S_noise": 1.0}
    schedule = df.Schedule.karras(80, 0.01, 20.0)
    sigmas = schedule.sigma.flip(0).tolist()

    def denoiser(x, sigma):
        gain = std**2 / (std**2 + sigma.double() ** 2)
        return (mean + gain[:, None] * (x.double() - mean)).to(x.dtype)

    x = heun(
        denoiser, (64, 4096), schedule, df.Noise(8), steps=80, predict="x0", conditioning="sigma", **options
    ).double()

    class Draws:
        """In place of the noise: column k is 1 in the k-th of the 80 draws alone, so that they stay apart."""

        def __init__(self, place=None):
            self.place = place

        def fold_in(self, key):
            return Draws(79 - key)

        def normal(self, shape, dtype):
            z = torch.zeros(shape, dtype=dtype)
            z[:, 2 + self.place] = 1
            return z

    probe = torch.zeros(1, 82, dtype=torch.float64)
    probe[0, 1] = 1.0
    ends = edm(denoiser, probe, sigmas, range(79, -1, -1), Draws(), **options)[0]
    of_start, of_draws = ends[1] - ends[0], ends[2:] - ends[0]
    expected_variance = float((of_start * 20) ** 2 + of_draws.square().sum())
    assert abs(float(x.mean()) - float(ends[0])) < FOUR * math.sqrt(expected_variance / x.numel())
    assert abs(float(x.var()) - expected_variance) < FOUR * expected_variance * math.sqrt(2 / x.numel())
    assert float(ends[0]) == pytest.approx(mean, abs=0.02)
    assert expected_variance == pytest.approx(std**2, rel=0.03)
    assert float(of_draws.abs().max()) > 0.05  # the noise is in the result


# Bad input.

X = torch.zeros(2, 3)
CONTINUOUS = df.ContinuousSchedule.vp()


def bad(sampler, schedule=KARRAS, net=network, x=X, noise=N0, **options):
    return lambda: sampler(net, x, schedule, noise, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (bad(euler), r"euler: steps must be in \[1, 9\], got 50"),
        (bad(heun, steps=0), r"heun: steps must be in \[1, 9\], got 0"),
        (bad(euler, levels=[3, 5]), r"euler: levels must decrease within \[0, 9\), got \[3, 5\]"),
        (bad(euler, levels=[9, 5]), r"euler: levels must decrease within \[0, 9\), got \[9, 5\]"),
        (bad(euler, levels=[5, -1]), r"euler: levels must decrease within \[0, 9\), got \[5, -1\]"),
        (bad(euler, levels=[]), r"euler: levels must decrease within \[0, 9\), got \[\]"),
        (
            bad(euler, steps=3, conditioning="t"),
            "euler: conditioning must be 'level', 'time', 'sigma' or 'log_snr', got 't'",
        ),
        (bad(euler, steps=3, conditioning="time"), "euler: conditioning='time' needs a schedule with times"),
        (
            bad(euler_ancestral, SCHEDULE, steps=3, conditioning="sigma"),
            r"euler_ancestral: conditioning='sigma' needs a schedule with alpha = 1 .* got Schedule.linear",
        ),
        (bad(euler_ancestral, steps=3, eta=-0.1), "euler_ancestral: eta must be finite and not negative, got -0.1"),
        (
            bad(euler_ancestral, steps=3, noise_scale=math.inf),
            "euler_ancestral: noise_scale must be finite and not negative, got inf",
        ),
        (bad(heun, steps=3, S_churn=-1.0), "heun: S_churn must be finite and not negative, got -1.0"),
        (bad(heun, steps=3, S_noise=math.nan), "heun: S_noise must be finite and not negative, got nan"),
        (bad(heun, steps=3, S_churn=1.0), "heun: S_churn needs conditioning='sigma'"),
        (
            bad(heun, SCHEDULE.zero_terminal_snr(), predict="v"),
            r"heun: has no finite value at level 19 of .*, alpha = 0.0",
        ),
        (bad(flow_euler, FLOW, steps=25), r"flow_euler: steps must be in \[1, 24\], got 25"),
        (bad(flow_midpoint, FLOW, steps=13), r"flow_midpoint: steps must be in \[1, 12\], got 13"),
        (bad(flow_midpoint, FLOW, levels=[4, 2, 1]), r"flow_midpoint: levels must be an even number, .* \[4, 2, 1\]"),
        (bad(flow_euler, FLOW, predict="eps", steps=2), "flow_euler: has no finite value at level 23 of Schedule.flow"),
        (bad(probability_flow, CONTINUOUS, steps=0), "probability_flow: steps must be positive, got 0"),
        (bad(probability_flow, CONTINUOUS, method="rk4"), "method must be 'euler' or 'heun', got 'rk4'"),
        (bad(probability_flow, CONTINUOUS, times=[0.1, 0.5, 0.3]), "times must be two or more and decrease"),
        (bad(probability_flow, CONTINUOUS, times=[0.1, 0.5]), "denoise must be False where times increase"),
        (bad(probability_flow, CONTINUOUS, times=[0.5]), "times must be two or more and decrease"),
        (bad(probability_flow, CONTINUOUS, times=[1.5, 0.5]), r"t must be in \[1e-05, 1.0\], got 1.5"),
        (bad(probability_flow, df.ContinuousSchedule.flow()), "drift: has no finite value at t = 1.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_levels_that_are_no_ints():
    with pytest.raises(TypeError, match=r"euler: levels must be ints, got \[3.5, 1\]"):
        euler(network, X, KARRAS, N0, levels=[3.5, 1])


def test_starts_of_a_shape():
    noise = df.Noise(9)
    z = noise.fold_in(0x7374617274).normal((2, 3))
    same(euler(network, (2, 3), KARRAS, noise, steps=4), euler(network, 5.0 * z, KARRAS, noise, steps=4))
    at = float(KARRAS.sigma[6])
    own = {"levels": [6, 3, 1]}
    same(heun(network, (2, 3), KARRAS, noise, **own), heun(network, at * z, KARRAS, noise, **own))
    same(euler(network, (2, 3), SCHEDULE, noise, levels=[9, 3]), euler(network, z, SCHEDULE, noise, levels=[9, 3]))
    same(flow_midpoint(velocity, (2, 3), FLOW, noise, steps=3), flow_midpoint(velocity, z, FLOW, noise, steps=3))
    for schedule, scale in ((df.ContinuousSchedule.ve(), 50.0), (CONTINUOUS, 1.0)):
        wanted = probability_flow(velocity, scale * z, schedule, noise, steps=3)
        same(probability_flow(velocity, (2, 3), schedule, noise, steps=3), wanted)
