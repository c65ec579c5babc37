"""What people's own loops need: levels in any spacing and either way, guidance of all kinds, gradients, inpainting."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import dae_fast as df

from .test_samplers import network, same, start

S = df.Schedule.linear(100, 1e-3, 0.1)
NOISE = df.Noise(3)


# Levels.


def levels(cls=df.samplers.DDIM, schedule=S, **options):
    return list(cls(schedule, **options).levels)


def test_spacings_are_diffusers():
    """As its timestep_spacing in 0.42."""
    for steps in (1, 7, 10, 100):
        wanted = {
            "linspace": np.linspace(0, 99, steps).round()[::-1] if steps > 1 else np.array([99]),
            "leading": (np.arange(steps) * (100 // steps)).round()[::-1],
            "trailing": np.round(np.arange(100, 0, -100 / steps)) - 1,
        }
        for spacing, those in wanted.items():
            assert levels(steps=steps, spacing=spacing) == those.astype(int).tolist(), (steps, spacing)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [1, 2, 9, 60, 100])
def test_spacings_in_sigma(spacing, steps):
    ratio = (S.sigma / S.alpha).numpy()
    u = np.linspace(0, 1, steps)
    high, low = ratio[-1], ratio[0]
    wanted = (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if spacing == "exponential":
        wanted = np.exp(np.log(high) + u * np.log(low / high))
    got = levels(steps=steps, spacing=spacing)
    assert len(got) == steps and got[0] == 99 and all(s < t for t, s in pairwise(got))
    if steps == 9:  # so few that no two want one level
        assert got == [int(np.abs(np.log(ratio) - np.log(w)).argmin()) for w in wanted]
    flat = df.Schedule.flow(20)  # of which the last level has no signal
    assert levels(schedule=flat, steps=5, spacing=spacing, predict="v")[0] == 19


def test_from_a_level_to_a_level():
    assert levels(steps=3, from_level=40) == [40, 20, 0]
    assert levels(steps=3, from_level=40, to_level=10) == [40, 30, 20]
    assert levels(steps=5, from_level=40, to_level=10, spacing="leading") == [35, 29, 23, 17, 11]
    assert levels(steps=5, from_level=40, to_level=10, spacing="trailing") == [40, 34, 28, 22, 16]
    assert levels(cls=df.samplers.DDPM, from_level=4, to_level=1) == [4, 3, 2]
    assert levels(cls=df.samplers.FlowEuler, steps=4, from_level=39, predict="v") == [39, 29, 19, 9]
    got = levels(steps=4, from_level=80, to_level=10, spacing="karras")
    assert got[0] == 80 and got[-1] > 10


@pytest.mark.parametrize(
    "name, options",
    [
        ("DDIM", {"eta": 0.7}),
        ("Heun", {}),
        ("DPMSolverPP2M", {}),
        ("FlowMidpoint", {}),
        ("PredictorCorrector", {}),
        ("EulerAncestral", {"clamp": 1.0}),
    ],
)
def test_two_parts_are_the_whole(name, options):
    """Down to a level, and from there; a multistep method starts anew, so its second part does."""
    cls, x = getattr(df.samplers, name), start(3, 5)
    whole = [90, 70, 50, 30, 20, 10]
    got = cls(S, levels=whole[:4], to_level=20, **options).sample(network, x, NOISE)
    assert not torch.allclose(got, x)
    got = cls(S, levels=whole[4:], **options).sample(network, got, NOISE)
    wanted = cls(S, levels=whole, **options).sample(network, x, NOISE)
    if name == "PredictorCorrector":  # whose first level has no corrector
        assert got.shape == wanted.shape
    elif name != "DPMSolverPP2M":
        same(got, wanted)


@pytest.mark.parametrize("name, order", [("DDIM", 1), ("Euler", 1), ("Heun", 2), ("DPMSolverPP2M", 2)])
def test_inversion_comes_back(name, order):
    """From level 0 up and down again, the error falling as the steps double."""
    x, cls, schedule = start(3, 5), getattr(df.samplers, name), df.Schedule.linear(1000)

    def net(x, t):
        return 0.3 * torch.sin(x)

    def error(steps):
        sampler = cls(schedule, steps=steps, predict="v")
        up = sampler.inverted()
        assert up.levels[0] == 0 and up.to_level == 999
        there = up.sample(net, x, NOISE)
        assert not torch.allclose(there, x, atol=0.1)
        levels = list(dict.fromkeys(sampler.levels))
        down = cls(schedule, levels=levels[:-1], to_level=0, predict="v")
        return float((down.sample(net, there, NOISE) - x).abs().max())

    assert math.log2(error(50) / error(100)) > order - 0.2


def test_what_the_network_is_told():
    told = []

    def net(x, t):
        told.append(float(t[0]))
        return x / 2

    def run(conditioning):
        told.clear()
        df.samplers.DDIM(S, levels=[90, 50, 3], conditioning=conditioning).sample(net, start(2, 3), NOISE)
        return told

    at = [90, 50, 3]
    assert run("log_snr") == pytest.approx((2 * (S.alpha[at] / S.sigma[at]).log()).tolist())
    assert run(lambda alpha, sigma: 0.25 * (sigma / alpha).log()) == pytest.approx(
        (0.25 * (S.sigma[at] / S.alpha[at]).log()).tolist()
    )


# Guidance.


def pair(x, t):
    return network(x, t), torch.cos(x)


def combined(g):
    def net(x, t):
        c, u = pair(x, t)
        return u + g(t, x) * (c - u)

    return net


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverPP2MSDE", "Heun", "PredictorCorrector"])
@pytest.mark.parametrize("options", [{}, {"clamp": 0.7}, {"threshold": 0.8}])
def test_guidance_of_each_sample_and_step(name, options, backend):
    cls, x = getattr(df.samplers, name), start(3, 5)
    scale = torch.tensor([0.0, 1.5, 4.0], dtype=torch.float64)
    got = cls(S, steps=4, guidance=scale, **options).sample(pair, x, NOISE)
    same(got, cls(S, steps=4, **options).sample(combined(lambda t, x: scale[:, None]), x, NOISE), 1e-9)

    looks = len(cls(S, steps=4).levels)
    each = [1.0 + i for i in range(looks)]
    calls = iter(each)
    got = cls(S, steps=4, guidance=each, **options).sample(pair, x, NOISE)
    same(got, cls(S, steps=4, **options).sample(combined(lambda t, x: next(calls)), x, NOISE), 1e-9)
    function = cls(S, steps=4, guidance=lambda i, t: each[i], **options)
    assert torch.equal(function.sample(pair, x, NOISE), got)


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescaled_guidance(phi, backend):
    """Lin et al. 2024, eqs. 15 and 16."""
    x = start(3, 4, 5)

    def net(x, t):
        c, u = pair(x, t)
        cfg = u + 3.0 * (c - u)
        factor = c.std((1, 2), keepdim=True) / cfg.std((1, 2), keepdim=True)
        return phi * cfg * factor + (1 - phi) * cfg

    for options in ({}, {"clamp": 0.7}):
        got = df.samplers.DDIM(S, steps=4, guidance=3.0, guidance_rescale=phi, **options).sample(pair, x, NOISE)
        same(got, df.samplers.DDIM(S, steps=4, **options).sample(net, x, NOISE), 1e-9)


# Gradients.


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverPP2MSDE", "Heun", "PredictorCorrector"])
def test_gradients_through_the_loop(name):
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = start(2, 3).requires_grad_()
    looks = []

    def net(x, t):
        looks.append(t)
        return weight * torch.sin(x)

    sampler = getattr(df.samplers, name)(S, steps=3)

    def run(x, w):
        nonlocal weight
        weight = w
        return sampler.sample(net, x, NOISE, gradients=True)

    result = run(x, weight)
    assert result.requires_grad and len(looks) == len(sampler.levels)
    looks.clear()
    result.sum().backward()
    assert len(looks) == len(sampler.levels)  # again, once each
    assert torch.autograd.gradcheck(run, (x, weight))
    assert not sampler.sample(net, x, NOISE).requires_grad


def test_inversion_of_middles_and_from_a_level():
    midpoint = df.samplers.FlowMidpoint(df.Schedule.flow(1000), steps=20)
    up = midpoint.inverted()
    assert up.levels == midpoint.levels[1:-1][::-1] and up.to_level == 999
    x = start(3, 5)
    there = up.sample(network, x, NOISE)
    down = df.samplers.FlowMidpoint(midpoint.schedule, levels=midpoint.levels[:-2], to_level=midpoint.levels[-2])
    assert down.inverted().levels == up.levels
    same(down.sample(network, there, NOISE), x, 4e-3)
    ddim = df.samplers.DDIM(S, levels=[90, 60, 30], to_level=10)
    assert ddim.inverted().levels == (10, 30, 60) and ddim.inverted().to_level == 90


def test_inversion_of_the_probability_flow():
    """Along the flow of data N(0, 1/4) and back, and as its exact solution has it."""
    vp = df.ContinuousSchedule.vp(0.1, 5.0)

    def score(x, t):
        return -x / (0.25 * vp[t].alpha.to(x) ** 2 + vp[t].sigma.to(x) ** 2)[:, None]

    down = df.samplers.ProbabilityFlow(vp, times=torch.linspace(1.0, 0.1, 60, dtype=torch.float64), denoise=False)
    x = start(3, 5)
    there = down.inverted().sample(score, x, NOISE)
    (a, s), (b, r) = ((float(vp[t].alpha), float(vp[t].sigma)) for t in (0.1, 1.0))
    same(there, x * math.sqrt((0.25 * b * b + r * r) / (0.25 * a * a + s * s)), 1e-3)
    same(down.sample(score, there, NOISE), x, 1e-3)
    assert torch.equal(down.inverted().inverted()._plan.table, down._plan.table)


# What a network is told and returns besides.


@pytest.mark.parametrize("name, options", [("DDIM", {"clamp": 0.7}), ("Heun", {}), ("DPMSolverPP2MSDE", {})])
def test_self_conditioning(name, options):
    """The network sees the estimate of the look before, zeros at first."""

    def net(x, t, x_self_cond, y=0.0):
        told.append(x_self_cond)
        return network(x, t) + 0.3 * x_self_cond + y

    told, x = [], start(3, 5)
    sampler = getattr(df.samplers, name)(S, steps=4, self_condition=True, **options)
    got = sampler.sample(net, x, NOISE, net_arguments={"y": 0.1})
    seen, state, x0 = told.copy(), x, torch.zeros_like(x)
    for i, t in enumerate(sampler.model_times(x)):
        assert torch.equal(seen[i], x0)
        state, x0 = sampler.step(i, state, net(state, t, x0, 0.1), NOISE, return_x0=True)
    assert torch.equal(got, state)
    half = sampler.sample(net, x.bfloat16(), NOISE)
    assert half.dtype == told[-1].dtype == torch.bfloat16
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    sampler.sample(lambda x, t, x_self_cond: weight * net(x, t, x_self_cond), x, NOISE, gradients=True).sum().backward()
    assert weight.grad != 0


@pytest.mark.parametrize("name", ["DDIM", "Heun", "DPMSolverPP2MSDE", "DDPM"])
def test_a_learned_variance_is_left_out_or_stepped_by(name):
    """A tuple, or twice the channels, of both predictions under guidance."""
    x, cls = start(3, 2, 5), getattr(df.samplers, name)
    v = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)

    def doubled(x, t):
        return torch.cat((network(x, t), v), 1)

    def guided(x, t):
        return doubled(x, t), torch.cat((0.5 * network(x, t), 0 * v), 1)

    plain, learned = (cls(S, steps=4, clamp=0.8, **o) for o in ({}, {"variance": "learned"}))
    got = learned.sample(doubled, x, NOISE)
    assert torch.equal(got, learned.sample(lambda x, t: (network(x, t), v), x, NOISE))
    assert torch.equal(learned.step(0, x, torch.cat((0.3 * x, v), 1), NOISE), learned.step(0, x, (0.3 * x, v), NOISE))
    if name != "DDPM":
        assert torch.equal(got, plain.sample(network, x, NOISE))
    three = cls(S, steps=4, variance="learned", guidance=3.0)
    parts = three.sample(lambda x, t: (network(x, t), 0.5 * network(x, t), v), x, NOISE)
    assert torch.equal(three.sample(guided, x, NOISE), parts)


# Trajectory and inpainting.


def test_trajectory():
    path, sampler, x = df.samplers.Trajectory(), df.samplers.DDIM(S, steps=4, eta=1.0), start(3, 5)
    for _ in range(2):
        got = sampler.sample(network, x, NOISE, callback=path)
    assert len(path.x) == len(path.x0) == 4 and torch.equal(path.x[-1], got) and torch.equal(path.x0[-1], got)
    for i, t in enumerate(sampler.model_times(x)):
        before = path.x[i - 1] if i else x
        after, x0 = sampler.step(i, before, network(before, t), NOISE, return_x0=True)
        assert torch.equal(after, path.x[i]) and torch.equal(x0, path.x0[i])


@pytest.mark.parametrize("soft", [False, True])
def test_inpainting(soft):
    sampler, x, known = df.samplers.DDPM(S, steps=5), start(3, 2, 4), start(3, 2, 4, seed=1)
    mask = torch.tensor([0.0, 1.0, 0.25, 1.0]) if soft else torch.tensor([False, True, False, True])
    paint, path = df.samplers.Inpainting(sampler, known, mask, NOISE), []

    def callback(i, t, x, x0):
        made = paint(i, t, x, x0)
        path.append((x, made))
        return made

    got = sampler.sample(network, x, NOISE, callback=callback)
    ends = [*sampler.levels[1:], None]
    for (before, made), t, s in zip(path, sampler.levels, ends, strict=True):
        z = NOISE.fold_in(0x6B6E6F776E).fold_in(t).normal(x.shape, dtype=x.dtype)
        noised = known if s is None else S.alpha[s] * known + S.sigma[s] * z
        same(made, mask.double() * noised + (1 - mask.double()) * before)
    assert torch.equal(got[..., 1], known[..., 1])
    assert torch.equal(got, sampler.sample(network, x, NOISE, callback=paint))


def papers_times(T, length, times):
    """RePaint's code: the levels, -1 the data, one up or down from each to the next."""
    jumps = dict.fromkeys(range(0, T - length, length), times - 1)
    t, found = T, []
    while t >= 1:
        t -= 1
        found.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            found += range(t + 1, t + length + 1)
            t += length
    return [*found, -1]


@pytest.mark.parametrize("T, length, times", [(7, 2, 3), (10, 3, 2), (6, 6, 4), (9, 1, 2)])
def test_repaint_goes_up_where_its_paper_does(T, length, times):
    repaint = df.samplers.RePaint(
        df.samplers.DDPM(S, steps=T), X, X > 0, NOISE, jump_length=length, jump_n_sample=times
    )
    wanted = papers_times(T, length, times)
    assert [T - 1 - i for i in repaint.looks] == [t for t, s in pairwise(wanted) if s < t]


def test_repaint_is_its_loop():
    """Of DDPM's steps; up level by level, each by the variance of q(x_t | x_s), and every noise its own."""
    sampler, x, known = df.samplers.DDPM(S, steps=5), start(3, 4), start(3, 4, seed=1)
    mask, options = torch.tensor([True, False, False, True]), {"jump_length": 2, "jump_n_sample": 2}
    repaint = df.samplers.RePaint(sampler, known, mask, NOISE, **options)
    levels, state, visits, shown = [*sampler.levels, None], x, dict.fromkeys(range(5), 0), []

    def again(noise, k):
        return noise.fold_in(0x6A756D70).fold_in(k) if k else noise

    def up(x, i):
        a_t, a_s = S.alpha_bar[levels[i]], S.alpha_bar[levels[i + 2]]
        z = again(NOISE, visits[i]).fold_in(0x7570).fold_in(levels[i]).normal(x.shape, dtype=x.dtype)
        return (a_t / a_s).sqrt() * x + (1 - a_t / a_s).sqrt() * z

    last = 0
    for i in (0, 1, "up", 0, 1, 2, 3, "up", 2, 3, 4):
        if i == "up":
            state = up(state, last - 1)
            continue
        t = levels[i]
        fresh, of_known = again(NOISE, visits[i]), again(NOISE.fold_in(0x6B6E6F776E), visits[i])
        state = sampler.step(i, state, network(state, torch.full((3,), t)), fresh)
        z = of_known.fold_in(t).normal(x.shape, dtype=x.dtype)
        s = levels[i + 1]
        noised = known if s is None else S.alpha[s] * known + S.sigma[s] * z
        state = torch.where(mask, noised, state)
        visits[i], last = visits[i] + 1, i
    same(repaint.sample(network, x, NOISE, callback=lambda *a: shown.append(a[0])), state)
    assert repaint.looks == (0, 1, 0, 1, 2, 3, 2, 3, 4) and shown == list(range(9))
    once = df.samplers.RePaint(sampler, known, mask, NOISE, jump_n_sample=1)
    paint = df.samplers.Inpainting(sampler, known, mask, NOISE)
    assert torch.equal(once.sample(network, x, NOISE), sampler.sample(network, x, NOISE, callback=paint))


def test_repaint_draws_nearer_to_the_conditional_law():
    """Of a Gaussian with correlation 0.9, painted beside 1.5: the mean must be 1.35, and without jumps is far below."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    variances, axes = torch.linalg.eigh(covariance)

    def net(x, t):
        alpha, sigma = (float(c[t[0]]) for c in (S.alpha, S.sigma))
        return sigma * (x @ axes) / (alpha**2 * variances + sigma**2) @ axes.T

    def mean(**options):
        known, sampler = torch.full((2000, 2), 1.5), df.samplers.DDPM(S, steps=20)
        repaint = df.samplers.RePaint(sampler, known, torch.tensor([True, False]), df.Noise(5), **options)
        return float(repaint.sample(net, known.shape, NOISE)[:, 1].mean())

    assert mean(jump_n_sample=1) < 0.9
    assert 1.1 < mean(jump_length=2, jump_n_sample=4) < 1.4


# One step between any two levels.


def plain_step(x, pred, t, s, eta, z, clamp):
    alpha_t, sigma_t, alpha_s, sigma_s = (c.reshape(*c.shape, *[1] * (x.dim() - c.dim())) for c in (*t, *s))
    x0 = (x - sigma_t * pred) / alpha_t
    if clamp is not None:
        x0 = x0.clamp(-clamp, clamp)
    eps = (x - alpha_t * x0) / sigma_t
    variance = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0)
    std = torch.minimum(eta * variance.sqrt() * sigma_s / sigma_t, sigma_s + 0 * variance)
    return alpha_s * x0 + (sigma_s**2 - std**2).sqrt() * eps + std * z, x0


@pytest.mark.parametrize("clamp", [None, 0.6])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(), (4,), (4, 3)])
def test_a_step_between_any_levels(shape, eta, clamp, backend):
    """Levels of the batch, of each sample and of each frame, up as well as down."""
    x, pred = start(4, 3, 5), start(4, 3, 5, seed=1)
    g = torch.Generator().manual_seed(0)
    t, s = (torch.randint(0, 100, shape, generator=g) for _ in range(2))
    z = NOISE.normal(x.shape, dtype=x.dtype)
    wanted = plain_step(x, pred, (S.alpha[t], S.sigma[t]), (S.alpha[s], S.sigma[s]), eta, z, clamp)
    numbers = (int(t), int(s)) if shape == () else (t, s)
    level, after = (S[v] for v in numbers)
    options = {"eta": eta, "clamp": clamp, "solver": "ddim"}
    for noise in (NOISE, z):
        got = df.step(x, pred, level, after, noise, return_x0=True, **options)
        same(got[0], wanted[0], 1e-9), same(got[1], wanted[1], 1e-9)
        same(df.step(x, pred, level, after, noise, **options), wanted[0], 1e-9)
    by_hand = df.Level(S.alpha[t], S.sigma[t]) if shape else df.Level(float(S.alpha[t]), float(S.sigma[t]))
    same(df.step(x, pred, by_hand, after, NOISE, **options), wanted[0], 1e-9)
    fixed = torch.tensor([0.9, 0.4], dtype=torch.float64)
    wanted = plain_step(x, pred, (S.alpha[t], S.sigma[t]), fixed, eta, z, clamp)
    same(df.step(x, pred, level, df.Level(0.9, 0.4), NOISE, **options), wanted[0], 1e-9)


def test_a_level_that_has_no_step_is_refused_where_it_is_asked_for():
    terminal, x = S.zero_terminal_snr(), start(2, 3)
    data, last = df.Level(1.0, 0.0), len(S) - 1
    wanted = (x - terminal.sigma[[3, 50], None] * x) / terminal.alpha[[3, 50], None]
    same(df.step(x, x, terminal[torch.tensor([3, 50])], data), wanted, 1e-9)
    with pytest.raises(ValueError, match="step: has no finite value at sample 1"):
        df.step(x, x, terminal[torch.tensor([3, last])], data)


def test_a_step_is_the_samplers():
    x, pred, path = start(4, 3, 5), start(4, 3, 5, seed=1), df.BrownianNoise(NOISE, 0.0, 20.0)
    for name, solver, options in (
        ("DDPM", "ddpm", {}),
        ("DDIM", "ddim", {"eta": 0.5}),
        ("Euler", "euler", {}),
        ("EulerAncestral", "euler_ancestral", {"eta": 1.3}),
    ):
        sampler = getattr(df.samplers, name)(S, levels=[90, 40], **options)
        wanted = sampler.step(0, x, pred, NOISE)
        same(df.step(x, pred, S[90], S[40], NOISE.fold_in(90), solver=solver, **options), wanted)
        on_path = df.step(x, pred, S[90], S[40], path, solver=solver, **options)
        same(on_path, sampler.step(0, x, pred, path))
    sigma = [float(S.sigma[t] / S.alpha[t]) for t in (90, 40)]
    z = path.increment(*sigma, x.shape, dtype=x.dtype)
    assert torch.equal(df.step(x, pred, S[90], S[40], path, eta=0.5), df.step(x, pred, S[90], S[40], z, eta=0.5))
    up = df.step(x, pred, df.Level(1.0, 0.0), S[40])  # from the data, eps given
    same(up, S.alpha[40] * x + S.sigma[40] * pred)
    assert torch.equal(df.step(x, pred, S[40], df.Level(1.0, 0.0), predict="x0"), pred)


def test_a_step_is_traced():
    x = start(4, 3)

    def step(x):
        return df.step(x, 0.3 * x, S[90], S[40], NOISE, eta=0.5, clamp=1.0)

    same(torch.compile(step, fullgraph=True, backend="eager")(x), step(x))


def test_gradients_of_a_step():
    x, pred = start(2, 3).requires_grad_(), start(2, 3, seed=1).requires_grad_()
    alpha = torch.tensor([0.5, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, p, a: df.step(x, p, df.Level(a, 0.6), S[20], NOISE, eta=0.5, return_x0=True), (x, pred, alpha)
    )


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: levels(steps=3, spacing="even"), ValueError, "ddim: spacing must be 'linspace', .*, got 'even'"),
        (lambda: levels(steps=3, from_level=10, to_level=20), ValueError, "from_level must be above to_level"),
        (lambda: levels(steps=30, from_level=10), ValueError, r"ddim: steps must be in \[1, 11\], got 30"),
        (lambda: levels(levels=[3, 1], spacing="karras"), ValueError, "levels are given as they are"),
        (lambda: levels(levels=[1, 3]), ValueError, "ddim: levels must decrease .* to go up give to_level"),
        (lambda: levels(levels=[1, 3], to_level=2), ValueError, r"levels must decrease within \[0, 100\)"),
        (lambda: levels(levels=[1, 3], to_level=5, eta=0.5), ValueError, r"levels must decrease within \[0, 100\)"),
        (lambda: levels(levels=[3], to_level=100), ValueError, r"to_level must be in \[0, 99\], got 100"),
        (lambda: df.samplers.DDPM(S, steps=5).inverted(), ValueError, "ddpm: inverted needs a deterministic sampler"),
        (
            lambda: levels(steps=3, guidance=[1.0, 2.0]),
            ValueError,
            "ddim: guidance must be one, or 3, one for each look, got 2",
        ),
        (lambda: levels(steps=3, guidance=lambda i, t: math.nan), ValueError, "guidance must be None or a finite"),
        (
            lambda: df.samplers.DDIM(S, steps=3, guidance=torch.ones(5)).sample(pair, X, NOISE),
            ValueError,
            r"ddim: guidance must have shape \(2,\), one for each sample, got \(5,\)",
        ),
        (
            lambda: df.samplers.RePaint(df.samplers.DPMSolverPP2M(S, steps=5), X, X > 0, NOISE),
            ValueError,
            "RePaint: sampler must step from x and the prediction alone .*, got DPMSolverPP2M",
        ),
        (
            lambda: df.samplers.RePaint(df.samplers.DDPM(S), X, X > 0, NOISE, jump_length=0),
            ValueError,
            "RePaint: jump_length must be positive, got 0",
        ),
        (
            lambda: df.samplers.RePaint(df.samplers.DDPM(S), X, X > 0, NOISE).sample(network, X, X),
            TypeError,
            "RePaint: noise must be a Noise, got a tensor",
        ),
        (lambda: levels(steps=3, variance="small"), ValueError, "ddim: variance must be 'learned', got 'small'"),
        (
            lambda: df.samplers.DDIM(S, steps=3, variance="learned").step(0, X, X),
            TypeError,
            r"must be a tuple \(prediction, v\) or of twice the channels of \(2, 3\), got \(2, 3\)",
        ),
        (lambda: levels(steps=3, guidance_rescale=2.0), ValueError, r"guidance_rescale must be in \[0, 1\], got 2.0"),
        (lambda: levels(steps=3, conditioning=lambda a, s: a[:1]), ValueError, "conditioning must give 3 finite"),
        (lambda: df.step(X, X, S[3], S[1], eta=1.0), TypeError, "step: noise must be a Noise or a tensor like x"),
        (
            lambda: df.step(X, X, S[torch.tensor([3, 4])], S[1], df.BrownianNoise(NOISE, 0.0, 20.0), eta=1.0),
            ValueError,
            "step: noise may be a BrownianNoise where level and next_level are numbers",
        ),
        (lambda: df.step(X, X, S[3], 1), TypeError, "step: next_level must be a Level, got int"),
        (lambda: df.step(X, X, S[3], S[1], solver="ode"), ValueError, "step: solver must be 'ddim', .*, got 'ode'"),
        (lambda: df.step(X, X, S[3], S[1], NOISE, eta=2.0), ValueError, "eta of 'ddim' must be at most 1.0, got 2.0"),
        (lambda: df.step(X, X, df.Level(0.0, 1.0), S[1]), ValueError, "step: has no finite value at alpha = 0.0"),
        (
            lambda: df.step(X, X, df.Level(torch.tensor([1.0, 0.0]), 1.0), S[1]),
            ValueError,
            "step: has no finite value at sample",
        ),
        (
            lambda: df.samplers.Inpainting(df.samplers.DDIM(S, steps=2), X, torch.ones(5), NOISE),
            ValueError,
            r"Inpainting: mask must be broadcastable to \(2, 3\), got \(5,\)",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_cannot_be_inverted_says_so() -> None:
    with pytest.raises(ValueError, match=r"ddim: inverted needs a deterministic sampler, got DDIM\(.*eta=1"):
        df.samplers.DDIM(df.Schedule.linear(100), steps=5, eta=1.0).inverted()


def test_a_scale_of_guidance_that_is_none() -> None:
    with pytest.raises(TypeError, match="ddim: guidance of a look must be a number, got NoneType"):
        df.samplers.DDIM(df.Schedule.linear(100), steps=5, guidance=lambda i, t: None).levels  # noqa: B018
