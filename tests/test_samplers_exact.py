"""Samplers against laws known in closed form: how fast they come to them, and how near.

And DPM-Solver++ and the predictor-corrector against the papers' steps in plain torch. What every sampler must do
besides is in test_samplers.py.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import dae_fast as df
from dae_fast.samplers import (
    annealed_langevin,
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    euler,
    euler_ancestral,
    flow_euler,
    flow_midpoint,
    heun,
    langevin,
    predictor_corrector,
    probability_flow,
)

from . import test_graphs, test_samplers
from .exact import Gaussian, Mixture, log_snr_levels, order
from .test_graphs import Net, tapes  # noqa: F401  a fixture

FOUR = 4.0  # standard errors; seeds are fixed
VP = df.Schedule.linear(20, 0.005, 0.4)
VE = df.Schedule.geometric(9, 0.1, 3.0)
FLOW = df.Schedule.flow(12)
GAUSSIAN = Gaussian([0.7, -0.3], [0.4, 1.2])
MIXTURE = Mixture([0.5, 0.3, 0.2], [[-1.2, -0.7], [1.3, -0.4], [0.0, 1.6]], [[0.3, 0.3], [0.2, 0.4], [0.3, 0.15]])


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(x, t):
    """Any smooth function of both; it mixes no samples."""
    return torch.sin(1.3 * x) * 0.8 + 0.05 * t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype) - 0.3


def same(got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def pairs(schedule, levels):
    """(alpha, sigma) of each level."""
    return [(float(schedule.alpha[t]), float(schedule.sigma[t])) for t in levels]


def downwards(schedule):
    return list(reversed(range(len(schedule))))


# The order of deterministic samplers: the largest error at the end of the exact path of a Gaussian.


def of_levels(sampler, kind, T):
    """From the first level to E[x0 | x_t] at the last, which all grids of a kind have in common."""
    schedule = log_snr_levels(T, kind)
    ends = pairs(schedule, (T - 1, 0))
    x = draw(3, 16, 2) * ends[0][1]
    got = sampler(GAUSSIAN.network(schedule), x, schedule, df.Noise(0), levels=downwards(schedule), predict="eps")
    return got - GAUSSIAN.denoised(x, ends)


def of_flow(sampler, T):
    """From pure noise to the data."""
    schedule, x = df.Schedule.flow(T), draw(3, 16, 2)
    got = sampler(GAUSSIAN.network(schedule, "flow"), x, schedule, df.Noise(0), levels=downwards(schedule))
    return got - GAUSSIAN.flow_map(x, (0.0, 1.0), (1.0, 0.0))


def of_probability_flow(schedule, method, T):
    t = torch.linspace(0.98, 0.05, T + 1, dtype=torch.float64)
    ends = [(schedule.alpha(u), schedule.sigma(u)) for u in (0.98, 0.05)]
    x = draw(3, 16, 2) * ends[0][1]

    def score(x, t):
        return GAUSSIAN.score(x, *(c(t)[:, None] for c in (schedule.alpha, schedule.sigma)))

    got = probability_flow(score, x, schedule, df.Noise(0), times=t, method=method)
    return got - GAUSSIAN.denoised(x, ends)


LEVELS = {
    f"{sampler.__name__}-{kind}": (partial(of_levels, sampler, kind), wanted)
    for sampler, wanted in ((ddim, 1), (euler, 1), (flow_euler, 1), (heun, 2), (dpm_solver_pp_2m, 2))
    for kind in ("vp", "ve", "flow")
}
TIMES = {
    f"probability_flow-{method}-{name}": (partial(of_probability_flow, schedule, method), wanted)
    for name, schedule in (("vp", df.ContinuousSchedule.vp()), ("cosine", df.ContinuousSchedule.cosine()))
    for method, wanted in (("euler", 1), ("heun", 2))
}
ORDERS = {
    **LEVELS,
    **TIMES,
    "flow_euler": (partial(of_flow, flow_euler), 1),
    "flow_midpoint": (partial(of_flow, flow_midpoint), 3),  # of a Gaussian; else 2: tests/test_samplers_ode.py
}


@pytest.mark.parametrize("error, wanted", ORDERS.values(), ids=ORDERS)
def test_order_of_convergence(error, wanted):
    errors = [float(error(T).abs().max()) for T in (40, 80, 160)]
    assert errors[-1] < {1: 0.1, 2: 0.003, 3: 1e-5}[wanted]
    assert order(errors) == pytest.approx([wanted] * 2, abs=0.12), errors


def test_2m_starts_with_a_step_of_first_order():
    """Two steps, the second to the data: ddim with eta = 0."""
    x, net = draw(3, 8, 2), GAUSSIAN.network(VP)
    got = dpm_solver_pp_2m(net, x, VP, df.Noise(0), levels=[19, 8])
    same(got, ddim(net, x, VP, df.Noise(0), levels=[19, 8]))


# The law of the samples: how far from the mixture, against what as many exact samples give.

POINTS = 16, 128, 2
EVEN = {kind: log_snr_levels(40, kind) for kind in ("vp", "ve", "flow")}
NCSN = df.Schedule.geometric(10, 0.05, 5.0)
EDM = df.ContinuousSchedule.edm(0.02, 50.0).discretise(40, rho=7)
SDE = df.ContinuousSchedule.vp()
SEED = df.Noise(7)


def pure(schedule):
    return SEED.fold_in(-1).normal(POINTS) * float(schedule.sigma[-1])


def every_level(sampler, kind, **options):
    schedule = EVEN[kind]
    if sampler not in (ddpm, predictor_corrector):
        options["levels"] = downwards(schedule)
    return sampler(MIXTURE.network(schedule), pure(schedule), schedule, SEED, predict="eps", **options)


def edm_denoiser(x, sigma):
    return MIXTURE.x0(x, 1.0, sigma[:, None]).to(x.dtype)


def sde_score(x, t):
    return MIXTURE.score(x, SDE.alpha(t)[:, None], SDE.sigma(t)[:, None]).to(x.dtype)


def flow_net(sampler, steps):
    schedule = df.Schedule.flow(40)
    return sampler(MIXTURE.network(schedule, "flow"), pure(schedule), schedule, SEED, steps=steps)


LAWS = {
    **{
        f"{sampler.__name__}-{kind}": partial(every_level, sampler, kind)
        for sampler in (ddpm, ddim, euler, euler_ancestral, heun, dpm_solver_pp_2m, dpm_solver_pp_2m_sde)
        for kind in ("vp", "ve")
    },
    "ddim-eta": lambda: every_level(ddim, "flow", eta=0.5),
    "dpm_solver_pp_2m_sde-eta": lambda: every_level(dpm_solver_pp_2m_sde, "flow", eta=0.5),
    "heun-churn": lambda: heun(
        edm_denoiser, pure(EDM), EDM, SEED, steps=40, predict="x0", conditioning="sigma", S_churn=20.0
    ),
    "dpm_solver_pp_2m-sigma": lambda: dpm_solver_pp_2m(
        edm_denoiser, pure(EDM), EDM, SEED, predict="x0", conditioning="sigma"
    ),
    "flow_euler": lambda: flow_net(flow_euler, 40),
    "flow_midpoint": lambda: flow_net(flow_midpoint, 20),
    "probability_flow": lambda: probability_flow(
        sde_score, SEED.fold_in(-1).normal(POINTS), SDE, SEED, times=torch.linspace(1.0, 0.003, 30)
    ),
    "annealed_langevin": lambda: annealed_langevin(
        MIXTURE.network(NCSN, "score"), pure(NCSN), NCSN, SEED, step_size=2 * 0.2 * 0.05**2, steps_per_level=20
    ),
    "predictor_corrector-vp": lambda: every_level(predictor_corrector, "vp"),
    "predictor_corrector-ve": lambda: every_level(predictor_corrector, "ve", norm="batch"),
    "predictor_corrector-ancestral": lambda: every_level(predictor_corrector, "vp", predictor="ancestral"),
}


@pytest.mark.parametrize("run", LAWS.values(), ids=LAWS)
def test_samples_have_the_law_of_the_data(run):
    """At most twice the distance of exact samples. Without a mode, or a quarter wider, it is about ten times."""
    assert MIXTURE.distance(run()) < 2 * MIXTURE.yardstick(16 * 128)


def test_langevin_keeps_the_law():
    """Of noise at sigma = 0.5; h = 0.02 of a variance of 0.27 biases by 4 %, a fortieth of the spread."""
    law = MIXTURE.noised(1.0, 0.5)
    x = law.sample(16 * 128, 0).float().reshape(POINTS)
    x = langevin(lambda x: MIXTURE.score(x, 1.0, 0.5).to(x.dtype), x, 0.02, 50, SEED)
    assert law.distance(x) < 2 * law.yardstick(16 * 128)


def test_every_sampler_is_here():
    """The chains of ops/mcmc.py are in tests/test_mcmc.py."""
    functions = {name for name in df.samplers.__all__ if name.islower()} - {"sgld", "underdamped", "mala"}
    assert {name.split("-")[0] for name in LAWS} | {"langevin"} == functions


def test_the_distance_sees_what_is_wrong():
    exact, yardstick = MIXTURE.sample(16 * 128, 9), MIXTURE.yardstick(16 * 128)
    assert MIXTURE.distance(exact) < 1.6 * yardstick
    assert MIXTURE.distance(exact + 0.1) > 2 * yardstick
    assert MIXTURE.distance(1.1 * exact) > 2 * yardstick
    fewer = Mixture([0.6, 0.2, 0.2], MIXTURE.means.tolist(), MIXTURE.stds.tolist())
    assert MIXTURE.distance(fewer.sample(16 * 128, 9)) > 2 * yardstick


def test_the_exact_predictions():
    """The score is the gradient of the log density, and the five predictions hang together."""
    for alpha, sigma in ((1.0, 0.5), (0.6, 0.8)):
        x, law = draw(50, 2).requires_grad_(), MIXTURE.noised(alpha, sigma)
        parts = torch.distributions.Independent(torch.distributions.Normal(law.means, law.stds), 1)
        density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(law.weights), parts)
        (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
        x = x.detach()
        same(MIXTURE.score(x, alpha, sigma), score)
        same(MIXTURE.x0(x, alpha, sigma), (x + sigma**2 * score) / alpha)
        level = df.Level(alpha, sigma)
        for name in ("eps", "v", "flow"):
            same(df.to_score(x, getattr(MIXTURE, name)(x, alpha, sigma), level, predict=name), score)


# DPM-Solver++, one step after the other as Lu et al. 2022 write it: in lambda = log(alpha/sigma).


def plain_2m(net, x, schedule, levels, noise, *, eta=0.0, estimate=lambda x0: x0):
    """Algorithm 2 (eta 0) and its SDE form (eta 1); eps is predicted, and the last step returns x0_hat."""
    lam = [math.log(a / s) for a, s in pairs(schedule, levels)]
    previous = None
    for i, t in enumerate(levels):
        ((a, s),) = pairs(schedule, [t])
        x0 = estimate((x - s * net(x, torch.full(x.shape[:1], t))) / a)
        if i + 1 == len(levels):
            break
        h, (a_next, s_next) = lam[i + 1] - lam[i], pairs(schedule, [levels[i + 1]])[0]
        D = x0
        if previous is not None:
            r = (lam[i] - lam[i - 1]) / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        z = noise.fold_in(t).normal(x.shape, dtype=x.dtype)
        x = s_next / s * math.exp(-eta * h) * x - a_next * math.expm1(-(1 + eta) * h) * D
        x = x + s_next * math.sqrt(-math.expm1(-2 * eta * h)) * z
        previous = x0
    return x0


@pytest.mark.parametrize("clamp", [None, (-0.2, 0.6)])
@pytest.mark.parametrize("schedule", [VP, VE], ids=["vp", "ve"])
@pytest.mark.parametrize("levels", [[7], [7, 0], [7, 4, 3], [7, 5, 4, 1, 0]], ids=len)
def test_2m_is_algorithm_2(backend, levels, schedule, clamp):
    """Steps of all ratios."""
    x, noise = draw(5, 7), df.Noise(3)
    estimate = (lambda x0: x0) if clamp is None else (lambda x0: x0.clamp(*clamp))
    got = dpm_solver_pp_2m(network, x, schedule, noise, levels=levels, clamp=clamp)
    same(got, plain_2m(network, x, schedule, levels, noise, estimate=estimate))
    for eta in (0.5, 1.0):
        got = dpm_solver_pp_2m_sde(network, x, schedule, noise, levels=levels, eta=eta, clamp=clamp)
        same(got, plain_2m(network, x, schedule, levels, noise, eta=eta, estimate=estimate))


def moments_of_2m(schedule, data, eta):
    """Mean and variance of the samples, by the formula above for a Gaussian in one dimension, x_T of its law.

    x_t and the x0_hat before are a Gaussian vector that each step maps affinely.
    """
    levels, m, c = downwards(schedule), float(data.means), float(data.stds)
    lam = [math.log(a / s) for a, s in pairs(schedule, levels)]
    ((a, s),) = pairs(schedule, levels[:1])
    mean = torch.tensor([a * m, 0.0], dtype=torch.float64)
    covariance = torch.diag(torch.tensor([(a * c) ** 2 + s**2, 0.0], dtype=torch.float64))
    for i, t in enumerate(levels):
        ((a, s),) = pairs(schedule, [t])
        gain = a * c**2 / ((a * c) ** 2 + s**2)  # x0_hat = gain * x + rest
        rest = m - gain * a * m
        of_x, of_D, of_z, slope = 0.0, 1.0, 0.0, 0.0
        if i + 1 < len(levels):
            ((a_next, s_next),), h = pairs(schedule, [levels[i + 1]]), lam[i + 1] - lam[i]
            of_x, of_D = s_next / s * math.exp(-eta * h), -a_next * math.expm1(-(1 + eta) * h)
            of_z = s_next * math.sqrt(-math.expm1(-2 * eta * h))
            slope = h / (2 * (lam[i] - lam[i - 1])) if i else 0.0
        step = [[of_x + of_D * (1 + slope) * gain, -of_D * slope], [gain, 0.0]]
        step = torch.tensor(step, dtype=torch.float64)
        mean = step @ mean + torch.tensor([of_D * (1 + slope) * rest, rest], dtype=torch.float64)
        covariance = step @ covariance @ step.T
        covariance[0, 0] += of_z**2
    return float(mean[0]), float(covariance[0, 0])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_2m_sde_on_gaussian_data(eta):
    """The recursion comes to the data's variance with order 2, and the samples are as it says."""
    data = Gaussian([0.7], [0.4])
    errors = []
    for T in (40, 80, 160):
        schedule = log_snr_levels(T, "vp")
        ((a, s),) = pairs(schedule, [0])
        mean, variance = moments_of_2m(schedule, data, eta)
        assert mean == pytest.approx(0.7, abs=1e-12)
        errors.append(abs(variance - (a * 0.4**2) ** 2 / ((a * 0.4) ** 2 + s**2)))  # that of E[x0 | x_t]
    assert order(errors) == pytest.approx([2, 2], abs=0.1)

    schedule = log_snr_levels(12, "vp")
    ((a, s),) = pairs(schedule, [11])
    x = (a * 0.7 + math.sqrt((a * 0.4) ** 2 + s**2) * df.Noise(5).normal((16, 4096))).unsqueeze(-1)
    got = dpm_solver_pp_2m_sde(data.network(schedule), x, schedule, df.Noise(6), steps=12, eta=eta)
    mean, variance = moments_of_2m(schedule, data, eta)
    test_samplers.check_moments(got, mean, variance)
    assert abs(variance - 0.4**2) > FOUR * 0.4**2 * math.sqrt(2 / got.numel())  # which the data's own would not pass


def test_2m_with_eta_0_is_the_ode():
    x = draw(4, 33, dtype=torch.float32)
    ode = dpm_solver_pp_2m(network, x, VP, df.Noise(3), steps=7)
    assert torch.equal(dpm_solver_pp_2m_sde(network, x, VP, df.Noise(4), steps=7, eta=0.0), ode)


@pytest.mark.parametrize("sampler", [dpm_solver_pp_2m, dpm_solver_pp_2m_sde])
def test_2m_without_signal_or_noise(sampler):
    """lambda is infinite at both ends: from pure noise the first step is to x0_hat, and x_T has a part in the ODE's."""
    schedule = VP.zero_terminal_snr()
    x, noise, net = draw(3, 8, 2), df.Noise(1), GAUSSIAN.network(schedule, "v")
    one = sampler(net, x, schedule, noise, levels=[19], predict="v")
    same(one, GAUSSIAN.means[0].expand_as(x))
    ((a, s),) = pairs(schedule, [8])
    z = noise.fold_in(19).normal(x.shape, dtype=x.dtype)
    x_8 = a * GAUSSIAN.means[0] + s * (x if sampler is dpm_solver_pp_2m else z)
    same(sampler(net, x, schedule, noise, levels=[19, 8], predict="v"), GAUSSIAN.x0(x_8, a, s))
    still = df.Schedule.from_betas([0.0, 0.0, 0.1])
    same(sampler(network, x, still, noise, steps=3), sampler(network, x, still, noise, levels=[2, 0]))


# The predictor-corrector, one step after the other as Song et al. 2021 write it, with the noise and its norm in memory.


def plain_pc(eps, x, schedule, noise, *, corrector_steps=1, snr=0.16, norm="sample", estimate=lambda x0: x0):
    """Algorithms 2 and 3, step sizes of algorithms 4 and 5, and Tweedie's step at the end."""
    T, is_vp = len(schedule), schedule.variance_preserving

    def score(x, t):
        ((a, s),) = pairs(schedule, [t])
        x0 = estimate((x - s * eps(x, torch.full(x.shape[:1], t))) / a)
        return (a * x0 - x) / s**2

    def size(v):
        norms = v.flatten(1).norm(dim=1)
        return norms.mean() if norm == "batch" else norms.reshape(-1, *[1] * (v.dim() - 1))

    for t in reversed(range(T)):
        (a, s), beta = pairs(schedule, [t])[0], float(schedule.betas[t]) if is_vp else 0.0
        for k in range(corrector_steps if t < T - 1 else 0):
            g, z = score(x, t), noise.fold_in(T + 1 + t * corrector_steps + k).normal(x.shape, dtype=x.dtype)
            epsilon = 2 * (1 - beta) * (snr * size(z) / size(g)) ** 2
            x = x + epsilon * g + torch.sqrt(2 * epsilon) * z
        g, z = score(x, t), noise.fold_in(t).normal(x.shape, dtype=x.dtype)
        if t == 0:
            x = (x + s**2 * g) / a
        elif is_vp:
            x = (2 - math.sqrt(1 - beta)) * x + beta * g + math.sqrt(beta) * z
        else:
            less = s**2 - float(schedule.sigma[t - 1]) ** 2
            x = x + less * g + math.sqrt(less) * z
    return x


@pytest.mark.parametrize("clamp", [None, (-0.2, 0.6)])
@pytest.mark.parametrize("norm", ["sample", "batch"])
@pytest.mark.parametrize("schedule", [VP, VE], ids=["vp", "ve"])
def test_predictor_corrector_is_algorithms_2_and_3(backend, schedule, norm, clamp):
    """In fp64, where the norms are summed in fp64: the step sizes are those of torch's norms of what it would store."""
    x, noise, options = draw(4, 3, 7), df.Noise(3), {"norm": norm, "corrector_steps": 2, "snr": 0.3}
    estimate = (lambda x0: x0) if clamp is None else (lambda x0: x0.clamp(*clamp))
    got = predictor_corrector(network, x, schedule, noise, clamp=clamp, **options)
    same(got, plain_pc(network, x, schedule, noise, estimate=estimate, **options), 1e-9)


def test_ancestral_predictor_without_corrector_is_ddpm():
    x = draw(4, 33, dtype=torch.float32)
    for schedule in (VP, VE):
        got = predictor_corrector(network, x, schedule, df.Noise(3), predictor="ancestral", corrector_steps=0)
        assert torch.equal(got, ddpm(network, x, schedule, df.Noise(3)))
    got = predictor_corrector(network, x, VE, df.Noise(3), corrector_steps=0)  # eq. 46 and 47 differ in the noise alone
    same(got, ddpm(network, x, VE, df.Noise(3), variance="large"), 1e-5)


def test_sizes_of_the_batch_are_of_the_batch():
    """The default's are each sample's own."""
    x = draw(8, 15, dtype=torch.float32)
    for norm, wanted in (("sample", True), ("batch", False)):
        whole = predictor_corrector(network, x, VP, df.Noise(5), norm=norm)
        assert torch.equal(predictor_corrector(network, x[:4], VP, df.Noise(5), norm=norm), whole[:4]) == wanted


def test_no_score_no_step():
    """h would be infinite."""
    zero = predictor_corrector(lambda x, t: torch.zeros_like(x), draw(4, 15), VE, df.Noise(5), predict="score")
    plain = predictor_corrector(
        lambda x, t: torch.zeros_like(x), draw(4, 15), VE, df.Noise(5), predict="score", corrector_steps=0
    )
    same(zero, plain)


# What they share with the other samplers.

THREE = {
    "dpm_solver_pp_2m": partial(dpm_solver_pp_2m, steps=6),
    "dpm_solver_pp_2m_sde": partial(dpm_solver_pp_2m_sde, steps=6),
    "predictor_corrector": predictor_corrector,
    "predictor_corrector-batch": partial(predictor_corrector, norm="batch", corrector_steps=2),
}
each = pytest.mark.parametrize("sampler", THREE.values(), ids=THREE)


@each
@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("what", ["x0", "v", "score", "flow"])
def test_every_parameterisation_gives_the_same_samples(sampler, what, clamp):
    x, noise, net = draw(3, 11), df.Noise(8), test_samplers.predicting(what, VP, network)
    same(sampler(net, x, VP, noise, predict=what, clamp=clamp), sampler(network, x, VP, noise, clamp=clamp), 1e-9)


@each
@pytest.mark.parametrize("limit", [{}, {"clamp": 0.5}, {"threshold": 0.8}])
def test_guidance(sampler, limit):
    """As with the combined prediction."""
    x, noise = draw(3, 11), df.Noise(8)

    def conditional(x, t):
        return network(x, t), torch.cos(x)

    def combined(x, t):
        c, u = conditional(x, t)
        return u + 1.7 * (c - u)

    got = sampler(conditional, x, VP, noise, guidance=1.7, **limit)
    same(got, sampler(combined, x, VP, noise, **limit), 1e-9)
    assert not torch.equal(got, sampler(combined, x, VP, noise)) or not limit


def thresholded(x0, quantile):
    """Saharia et al. 2022, section 2.3."""
    s = x0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=1)[:, None]
    return x0.clamp(-s, s) / s


def test_threshold():
    x, noise = 2 * draw(3, 11), df.Noise(8)
    levels, estimate = [19, 12, 5, 0], partial(thresholded, quantile=0.7)
    for eta in (0.0, 1.0):
        got = dpm_solver_pp_2m_sde(network, x, VP, noise, levels=levels, eta=eta, threshold=0.7)
        same(got, plain_2m(network, x, VP, levels, noise, eta=eta, estimate=estimate))
    got = predictor_corrector(network, x, VP, noise, threshold=0.7)
    same(got, plain_pc(network, x, VP, noise, estimate=estimate), 1e-9)


def run_of(sampler, net=test_samplers.polynomial):
    return lambda x, noise: sampler(net, x, VP, noise, clamp=2.0)


@each
def test_one_seed_one_result(sampler, backend):
    if sampler is not THREE["dpm_solver_pp_2m"]:  # which is deterministic
        test_samplers.test_one_seed_one_result(run_of(sampler), backend)


@each
def test_a_batch_in_parts_and_other_formats(sampler):
    if sampler is not THREE["predictor_corrector-batch"]:
        test_samplers.test_a_batch_in_parts_is_the_batch_at_once(run_of(sampler))
    test_samplers.test_batches_of_nothing(run_of(sampler))
    x = draw(4, 3, 6, 6, dtype=torch.float32)
    if sampler in (THREE["dpm_solver_pp_2m"], THREE["dpm_solver_pp_2m_sde"]):
        test_samplers.test_memory_format_does_not_matter(run_of(sampler))
    else:  # the norm of the score is summed in memory order
        got = run_of(sampler)(x.to(memory_format=torch.channels_last), df.Noise(1))
        same(got, run_of(sampler)(x, df.Noise(1)), 1e-5)


@each
@pytest.mark.parametrize("dtype, ulp", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)])
def test_dtypes(sampler, dtype, ulp):
    test_samplers.test_dtypes(run_of(sampler), dtype, ulp)


@each
def test_a_shape_starts_from_noise(sampler):
    x_T = df.Noise(9).fold_in(0x7374617274).normal((3, 2, 4))
    assert torch.equal(sampler(network, (3, 2, 4), VP, df.Noise(9)), sampler(network, x_T, VP, df.Noise(9)))


@each
def test_progress_bar_on_request(sampler, capfd):
    sampler(network, torch.ones(2, 3), VP, df.Noise(0))
    assert capfd.readouterr() == ("", "")
    sampler(network, torch.ones(2, 3), VP, df.Noise(0), progress=True)
    assert "100%" in capfd.readouterr().err


@each
def test_graph(sampler, tapes, monkeypatch):  # noqa: F811
    def run(net, x, noise, **options):
        return sampler(net, x, VP, noise, clamp=2.0, **options)

    test_graphs.test_the_result_of_the_loop(run, None, tapes)
    tapes.clear()
    test_graphs.test_nothing_is_read_that_may_go(run, tapes, monkeypatch)
    guided = Guided()
    x = draw(3, 5, dtype=torch.float32)
    for options in ({}, {"threshold": 0.9}):
        wanted = sampler(guided, x, VP, df.Noise(1), guidance=2.0, **options)
        assert torch.equal(sampler(guided, x, VP, df.Noise(1), guidance=2.0, graph=True, **options), wanted)


class Guided(Net):
    def forward(self, x, t):
        return super().forward(x, t), 0.5 * x


# Bad input.


def call(sampler, *, schedule=VP, x=None, **options):
    return lambda: sampler(network, draw(2, 3) if x is None else x, schedule, df.Noise(0), **options)


ZERO = VP.zero_terminal_snr()


@pytest.mark.parametrize(
    "run, error, message",
    [
        (call(dpm_solver_pp_2m, steps=21), ValueError, r"dpm_solver_pp_2m: steps must be in \[1, 20\], got 21"),
        (call(dpm_solver_pp_2m, levels=[3, 3]), ValueError, "dpm_solver_pp_2m: levels must decrease"),
        (call(dpm_solver_pp_2m, predict="epsilon"), ValueError, "dpm_solver_pp_2m: predict must be one of"),
        (call(dpm_solver_pp_2m, conditioning="sigma"), ValueError, "dpm_solver_pp_2m: conditioning='sigma' needs"),
        (call(dpm_solver_pp_2m, guidance=2.0), TypeError, r"dpm_solver_pp_2m: the network's output must be a tuple"),
        (call(dpm_solver_pp_2m, clamp=1.0, threshold=0.9), ValueError, "dpm_solver_pp_2m: give clamp or threshold"),
        (call(dpm_solver_pp_2m, x=5), TypeError, "dpm_solver_pp_2m: x must be a tensor or a shape"),
        (call(dpm_solver_pp_2m, schedule=ZERO), ValueError, "dpm_solver_pp_2m: has no finite value at level 19"),
        (call(dpm_solver_pp_2m_sde, eta=-0.5), ValueError, "dpm_solver_pp_2m_sde: eta must be finite and not neg"),
        (call(dpm_solver_pp_2m_sde, eta=math.nan), ValueError, "dpm_solver_pp_2m_sde: eta must be finite .* got nan"),
        (call(predictor_corrector, steps=0), ValueError, r"predictor_corrector: steps must be in \[1, 20\], got 0"),
        (
            call(predictor_corrector, predictor="euler"),
            ValueError,
            "predictor_corrector: predictor must be 'reverse_diffusion' or 'ancestral', got 'euler'",
        ),
        (
            call(predictor_corrector, norm="l2"),
            ValueError,
            "predictor_corrector: norm must be 'sample' or 'batch', got 'l2'",
        ),
        (call(predictor_corrector, corrector_steps=-1), ValueError, "corrector_steps must not be negative, got -1"),
        (call(predictor_corrector, snr=-0.1), ValueError, "snr must be finite and not negative, got -0.1"),
        (call(predictor_corrector, snr=math.inf), ValueError, "snr must be finite and not negative, got inf"),
        (call(predictor_corrector, schedule=ZERO), ValueError, "predictor_corrector: has no finite value at level 19"),
    ],
)
def test_bad_input(run, error, message):
    with pytest.raises(error, match=message):
        run()


def test_predictor_corrector_from_pure_noise():
    """There is no corrector at the level without signal, where v has no score to measure it by."""
    x = draw(16, 128, 2)
    got = predictor_corrector(GAUSSIAN.network(ZERO, "v"), x, ZERO, df.Noise(2), predict="v")
    assert got.isfinite().all()
