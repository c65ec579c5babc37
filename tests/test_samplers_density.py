"""The log-probability of a step: against torch.distributions in float64, and the ratio of equal policies, exactly 1."""

from __future__ import annotations

import math

import pytest
import torch

import dae_fast as df
from dae_fast.samplers import launch

from . import exact
from .test_samplers import same, start

NOISE = df.Noise(3)
S = df.Schedule.linear(20, 0.005, 0.4)
FLOW = df.Schedule.flow(20)


def flow_grpo(x, v, t, s, a):
    """sd3_sde_with_logprob of Flow-GRPO's code: the mean and the standard deviation."""
    dt, std = s - t, a * math.sqrt(t / (1 - (t if t < 1 else s)))
    mean = x * (1 + std**2 / (2 * t) * dt) + v * (1 + std**2 * (1 - t) / (2 * t)) * dt
    return mean, std * math.sqrt(-dt)


def dance_grpo(x, v, t, s, eta):
    """flux_step of DanceGRPO's code."""
    dsigma, delta = s - t, t - s
    mean, std = x + dsigma * v, eta * math.sqrt(delta)
    score = -(x - (x - t * v) * (1 - t)) / t**2
    return mean - 0.5 * eta**2 * score * dsigma, std


def cps(x, v, t, s, eta):
    """Wang and Yu 2025: Flow-GRPO's code of it."""
    std = s * math.sin(eta * math.pi / 2)
    return (x - t * v) * (1 - s) + (x + v * (1 - t)) * math.sqrt(s**2 - std**2), std


def ddim(x, eps, t, s, eta):
    """Song et al. 2021, eqs. 12 and 16."""
    bar, before = float(S.alpha_bar[t]), float(S.alpha_bar[s])
    std = eta * math.sqrt((1 - before) / (1 - bar) * (1 - bar / before))
    x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
    return math.sqrt(before) * x0 + math.sqrt(1 - before - std**2) * eps, std


def of_flow(cls_form, plain, eta):
    def mean_of(x, pred, i, levels):
        t, s = (float(FLOW.sigma[k]) for k in levels[i : i + 2])
        return plain(x, pred, t, s, eta)

    return df.samplers.FlowSDE(FLOW, steps=5, form=cls_form, eta=eta), mean_of


CASES = {
    "ddpm": (df.samplers.DDPM(S), lambda x, p, i, levels: ddim(x, p, levels[i], levels[i + 1], 1.0)),
    "ddim": (df.samplers.DDIM(S, steps=5, eta=0.6), lambda x, p, i, levels: ddim(x, p, levels[i], levels[i + 1], 0.6)),
    "sde": of_flow("sde", flow_grpo, 0.7),
    "constant": of_flow("constant", dance_grpo, 0.3),
    "cps": of_flow("cps", cps, 0.8),
}
each = pytest.mark.parametrize("name", CASES)


@each
def test_the_density_is_torchs(name, backend):
    sampler, mean_of = CASES[name]
    x_t, pred = start(3, 4, 5), start(3, 4, 5, seed=1)
    for i in (0, 2):
        mean, std = mean_of(x_t, pred, i, sampler.levels)
        law = torch.distributions.Normal(mean, std)
        x_s, mean_log_prob = sampler.step(i, x_t, pred, NOISE, return_log_prob=True)
        z = NOISE.fold_in(sampler.levels[i]).normal(x_t.shape, dtype=x_t.dtype)
        same(x_s, mean + std * z)
        same(mean_log_prob, law.log_prob(x_s).mean((1, 2)))
        elsewhere = x_s + 0.1 * start(3, 4, 5, seed=2)
        same(sampler.log_prob(i, x_t, elsewhere, pred, reduction="sum"), law.log_prob(elsewhere).sum((1, 2)))


@pytest.mark.parametrize(
    "options", [{"clamp": 0.5}, {"guidance": 2.0}, {"threshold": 0.8}, {"guidance": [3.0, 1.0, 2.0, 4.0, 0.0]}]
)
def test_the_density_of_what_is_no_affine_map(options, backend):
    """The mean is a step with noise of zeros."""
    sampler = df.samplers.DDIM(S, steps=5, eta=0.6, **options)
    x_t, pred = 2 * start(3, 4, 5), start(3, 4, 5, seed=1)
    given = (pred, 0.5 * pred) if "guidance" in options else pred
    for i in (0, 2):
        mean = sampler.step(i, x_t, given, torch.zeros_like(x_t))
        std = CASES["ddim"][1](x_t, pred, i, sampler.levels)[1]
        x_s, log_prob = sampler.step(i, x_t, given, NOISE, return_log_prob=True)
        same(log_prob, torch.distributions.Normal(mean, std).log_prob(x_s).mean((1, 2)), 1e-9)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_ratio_of_equal_policies_is_1(name, dtype, backend):
    """Bit for bit: of the whole batch or parts of it, with gradients or without, and of what was stored alone."""
    sampler, _ = CASES[name]
    x_t, pred = start(6, 3, 37, dtype=dtype), start(6, 3, 37, dtype=dtype, seed=1)
    for reduction in ("mean", "sum"):
        x_s, x0, old = sampler.step(1, x_t, pred, NOISE, return_x0=True, return_log_prob=True, reduction=reduction)
        assert x_s.dtype == x0.dtype == dtype and old.shape == (6,)
        assert old.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # A GPU cuts the sums of a row by the batch's size; in double its last bit is one or another.
        wide_on_gpu = backend == "cuda on cpu" and dtype == torch.float64
        for rows in (slice(0, 6), slice(0, 1), slice(2, 5), slice(5, 6))[: 1 if wide_on_gpu else 4]:
            leaf = pred[rows].clone().requires_grad_()
            new = sampler.log_prob(1, x_t[rows], x_s[rows], leaf, reduction=reduction)
            assert torch.equal((new - old[rows]).exp(), torch.ones_like(new))
            assert torch.equal(sampler.log_prob(1, x_t[rows], x_s[rows], pred[rows], reduction=reduction), old[rows])
            new.sum().backward()
            assert leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0
    assert torch.equal(sampler.step(1, x_t, pred, NOISE), x_s)


@pytest.mark.parametrize("options", [{}, {"clamp": 0.5}, {"guidance": 2.0}])
def test_the_density_of_a_learned_variance(options):
    """Eq. 15 of Nichol and Dhariwal, and torch's law of it; in parts of the batch bit for bit."""
    ddpm = df.samplers.DDPM(S, variance="learned", **options)
    x_t, pred, v = start(3, 4, 5), start(3, 4, 5, seed=1), start(3, 4, 5, seed=2)
    given = (pred, 0.5 * pred, v) if "guidance" in options else (pred, v)
    t, s = S.alpha_bar[ddpm.levels[2]], S.alpha_bar[ddpm.levels[3]]
    beta = 1 - t / s
    log_var = (v + 1) / 2 * beta.log() + (1 - v) / 2 * (beta * (1 - s) / (1 - t)).log()
    law = torch.distributions.Normal(ddpm.step(2, x_t, given, torch.zeros_like(x_t)), (log_var / 2).exp())
    x_s, old = ddpm.step(2, x_t, given, NOISE, return_log_prob=True)
    same(old, law.log_prob(x_s).mean((1, 2)))
    same(ddpm.log_prob(2, x_t, x_s, given, reduction="sum"), law.log_prob(x_s).sum((1, 2)))
    x_s, *given = (c.float() for c in (x_s, *given))
    old = ddpm.log_prob(2, x_t.float(), x_s, tuple(given))
    part = ddpm.log_prob(2, x_t[1:2].float(), x_s[1:2], tuple(c[1:2] for c in given))
    assert torch.equal(part, old[1:2])


def test_the_density_of_a_predictor():
    """Of PredictorCorrector, between correctors."""
    predictor = df.samplers.PredictorCorrector(S, levels=[9, 5, 2], predictor="ancestral")
    x_t, x_s, pred = (start(3, 4, 5, seed=k) for k in range(3))
    wanted = torch.distributions.Normal(*ddim(x_t, pred, 5, 2, 1.0)).log_prob(x_s).mean((1, 2))
    same(predictor.log_prob(2, x_t, x_s, pred), wanted)


def test_the_density_of_a_step_that_reads_what_was_kept():
    """Given x_t and that: the mean is the step with noise of zeros."""
    sde = df.samplers.DPMSolverPP3M(S, steps=5, eta=0.8)
    x, pred = start(3, 4, 5), [start(3, 4, 5, seed=k) for k in range(3)]
    for i in (0, 1):
        x = sde.step(i, x, pred[i], NOISE)
    kept = sde.history
    mean = sde.step(2, x, pred[2], torch.zeros_like(x))
    sde.history = kept
    std = sde._plan.launches.std(2)
    x_s, log_prob = sde.step(2, x, pred[2], NOISE, return_log_prob=True)
    same(log_prob, torch.distributions.Normal(mean, std).log_prob(x_s).mean((1, 2)))
    assert torch.equal(sde.log_prob(2, x, x_s, pred[2], history=kept), log_prob)
    z = NOISE.fold_in(sde.levels[2]).normal(x.shape, dtype=x.dtype)
    same(x_s, mean + std * z)


@pytest.mark.parametrize("options", [{}, {"clamp": 0.9}, {"guidance": 2.0}, {"variance": "learned"}])
def test_gradients(options):
    learned = "variance" in options
    sampler = df.samplers.DDPM(S, **options) if learned else df.samplers.DDIM(S, steps=5, eta=0.6, **options)
    x_t, x_s, pred, other = (start(2, 3, seed=k).requires_grad_() for k in range(4))

    def run(x_t, x_s, pred, other):
        return sampler.log_prob(1, x_t, x_s, (pred, other) if "guidance" in options or learned else pred + 0 * other)

    assert torch.autograd.gradcheck(run, (x_t, x_s, pred, other))


def test_one_pass(monkeypatch):
    """The mean is not made where the density says what the prediction's residual is."""
    sampler, _ = CASES["sde"]
    x_t, x_s, pred = start(2, 3), start(2, 3, seed=1), start(2, 3, seed=2)
    monkeypatch.setattr(launch, "affine", None)
    sampler.log_prob(1, x_t, x_s, pred)
    with pytest.raises(TypeError):
        df.samplers.FlowSDE(FLOW, steps=5, clamp=1.0).log_prob(1, x_t, x_s, pred)


@pytest.mark.parametrize("options", [{}, {"form": "constant", "eta": 0.5}])
def test_a_stochastic_flow_has_the_law_of_the_data(options):
    """The exact velocity of Gaussian data; the error of the first order in the step."""
    law = exact.Gaussian([0.7], [0.4])
    schedule = df.Schedule.flow(400)

    def velocity(x, t):
        alpha, sigma = (c[t][:, None] for c in (schedule.alpha, schedule.sigma))
        return law.flow(x, alpha, sigma).to(x.dtype)

    x = df.samplers.FlowSDE(schedule, steps=400, **options).sample(velocity, (256, 64, 1), NOISE).double()
    assert abs(x.mean() - 0.7) < 4 * 0.4 / math.sqrt(x.numel()) + 0.004
    assert abs(x.std() - 0.4) < 4 * 0.4 / math.sqrt(2 * x.numel()) + 0.008


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: CASES["ddim"][0].log_prob(4, X, X, X), ValueError, "ddim: step 4 has no density: it adds no noise"),
        (
            lambda: df.samplers.DDIM(S, steps=3).step(0, X, X, return_log_prob=True),
            ValueError,
            "ddim: step 0 has no density",
        ),
        (
            lambda: df.samplers.DDPM(S, variance="learned").log_prob(19, X, X, (X, X)),
            ValueError,
            "ddpm: step 19 has no density: it adds no noise",
        ),
        (
            lambda: df.samplers.PredictorCorrector(S).log_prob(1, X, X, X),
            ValueError,
            "predictor_corrector: step 1 has no density: it is no Gaussian of x_t and the prediction",
        ),
        (
            lambda: df.samplers.DPMSolverPP2MSDE(S, steps=5).log_prob(1, X, X, X),
            ValueError,
            "step 1 reads what the steps before it keep: history must have 1, as .*, got 0",
        ),
        (lambda: CASES["ddim"][0].log_prob(0, X, X[:1], X), ValueError, r"ddim: x_s must have shape \(2, 3\)"),
        (
            lambda: CASES["ddim"][0].log_prob(0, X, X, X, reduction="none"),
            ValueError,
            "ddim: reduction must be 'mean' or 'sum', got 'none'",
        ),
        (lambda: df.samplers.FlowSDE(S, steps=3), ValueError, r"flow_sde: schedule must have alpha \+ sigma = 1"),
        (
            lambda: df.samplers.FlowSDE(FLOW, steps=3, form="cps", eta=1.5),
            ValueError,
            r"flow_sde: eta must be in \[0, 1\] for form='cps', got 1.5",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
