"""Schedules in continuous time: closed forms, levels, the SDE, grids and drawn times."""

from __future__ import annotations

import copy
import math
import pickle

import mpmath as mp
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dae_fast as df
from dae_fast import ContinuousSchedule
from dae_fast.continuous import LogitNormal, LogNormal, Uniform

mp.mp.dps = 40


def integral(t, low="0.1", high="20"):
    return mp.quad(lambda s: mp.mpf(low) + s * (mp.mpf(high) - mp.mpf(low)), [0, t])


def beta(t):
    return 0.1 + t * (20 - 0.1)


def from_log_snr(value):
    """alpha^2 / sigma^2 = e^value, alpha^2 + sigma^2 = 1."""
    return mp.sqrt(1 / (1 + mp.exp(-value))), mp.sqrt(1 / (1 + mp.exp(value)))


def laplace(t, mu=0.0, b=0.5):
    return from_log_snr(mp.mpf(mu) - mp.mpf(b) * mp.sign(0.5 - t) * mp.log(1 - 2 * abs(t - 0.5)))


# (alpha, sigma) of the papers at t, in 40 digits.
CLOSED_FORMS = {
    "flow": lambda t: (1 - t, t),
    "vp": lambda t: (mp.exp(-integral(t) / 2), mp.sqrt(1 - mp.exp(-integral(t)))),
    "sub_vp": lambda t: (mp.exp(-integral(t) / 2), 1 - mp.exp(-integral(t))),
    "ve": lambda t: (mp.mpf(1), mp.mpf("0.01") * (mp.mpf(50) / mp.mpf("0.01")) ** t),
    "edm": lambda t: (mp.mpf(1), t),
    "cosine": lambda t: from_log_snr(-2 * mp.log(mp.tan(mp.pi * t / 2))),
    "laplace": laplace,
}
# drift and squared diffusion of the papers.
SDES = {
    "flow": lambda t: (-1 / (1 - t), 2 * t / (1 - t)),  # Lipman et al. 2023 through Albergo et al. 2023
    "vp": lambda t: (-beta(t) / 2, beta(t)),  # Song et al. 2021, eq. 11
    "sub_vp": lambda t: (-beta(t) / 2, beta(t) * (1 - math.exp(-2 * (0.1 * t + 9.95 * t * t)))),  # eq. 12
    "ve": lambda t: (0.0, 2 * math.log(5000) * (0.01 * 5000**t) ** 2),  # eq. 9
    "edm": lambda t: (0.0, 2 * t),  # Karras et al. 2022, eq. 1 at sigma(t) = t
    "cosine": lambda t: (-math.pi / 2 * math.tan(math.pi / 2 * t), math.pi * math.tan(math.pi / 2 * t)),
    # -sigma^2 dlogSNR/dt / 2 and its opposite twice, with dlogSNR/dt = -b / min(t, 1 - t).
    "laplace": lambda t: (
        -(float(laplace(mp.mpf(t))[1]) ** 2) * 0.25 / min(t, 1 - t),
        float(laplace(mp.mpf(t))[1]) ** 2 * 0.5 / min(t, 1 - t),
    ),
}
NAMES = tuple(CLOSED_FORMS)


def made(name):
    return getattr(ContinuousSchedule, name)()


def some_times(schedule, n=9):
    """Inside the interval and away from where alpha or sigma is 0."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return schedule.t_min + u * (schedule.t_max - schedule.t_min)


# alpha, sigma and schedule[t].


@pytest.mark.parametrize("name", NAMES)
def test_closed_forms(name):
    schedule = made(name)
    t = torch.cat((some_times(schedule), torch.tensor([schedule.t_min + 1e-4, schedule.t_max - 1e-4]).double()))
    for column, got in enumerate((schedule.alpha(t), schedule.sigma(t))):
        assert got.dtype == torch.float64 and got.shape == t.shape
        wanted = torch.tensor([float(CLOSED_FORMS[name](mp.mpf(v))[column]) for v in t.tolist()], dtype=torch.float64)
        # A few roundings, and that of 1 - t against 1e-4.
        torch.testing.assert_close(got, wanted, rtol=3e-12, atol=0)


@pytest.mark.parametrize("name", ["flow", "cosine", "laplace"])
def test_ends_are_exactly_data_and_noise(name):
    schedule = made(name)
    assert (schedule.alpha(0.0), schedule.sigma(0.0)) == (1, 0)
    assert (schedule.alpha(1.0), schedule.sigma(1.0)) == (0, 1)


def test_arguments_of_the_constructors():
    vp, sub_vp = ContinuousSchedule.vp(1.0, 3.0, 0.1), ContinuousSchedule.sub_vp(1.0, 3.0, 0.1)
    decay = math.exp(-0.75)  # I(1/2) = 1/2 + (3 - 1)/8
    assert vp.alpha(0.5) == pytest.approx(decay**0.5, rel=1e-14)
    assert vp.sigma(0.5) == pytest.approx((1 - decay) ** 0.5, rel=1e-14)
    assert sub_vp.sigma(0.5) == pytest.approx(1 - decay, rel=1e-14)
    assert vp.t_min == sub_vp.t_min == 0.1
    assert ContinuousSchedule.ve(0.5, 2.0).sigma(0.5) == pytest.approx(1.0, rel=1e-14)
    edm = ContinuousSchedule.edm(0.1, 3.0)
    assert (edm.t_min, edm.t_max, edm.sigma(2.0), edm.density) == (0.1, 3.0, 2.0, LogNormal(-1.2, 1.2))
    alpha, sigma = laplace(mp.mpf("0.25"), 1.0, 2.0)
    assert ContinuousSchedule.laplace(1.0, 2.0).alpha(0.25) == pytest.approx(float(alpha), rel=1e-14)
    assert ContinuousSchedule.laplace(1.0, 2.0).sigma(0.25) == pytest.approx(float(sigma), rel=1e-14)
    # shift moves drawn times and grids, not what t means.
    assert ContinuousSchedule.flow(3.0).sigma(0.25) == 0.25


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_times_of_every_kind_give_the_same(name, dtype):
    schedule = made(name)
    t = some_times(schedule).to(dtype)
    level = schedule[t]
    for column in ("alpha", "sigma"):
        of, values = getattr(schedule, column), getattr(level, column)
        assert values.dtype == torch.float64 and values.shape == t.shape
        assert torch.equal(values, of(t)) and torch.equal(of(t.reshape(3, 3)), values.reshape(3, 3))
        one = [of(v) for v in t.double().tolist()]
        assert all(type(v) is float for v in one)
        # torch's vector and scalar functions may differ in the last bits.
        torch.testing.assert_close(torch.tensor(one, dtype=torch.float64), values, rtol=1e-15, atol=0)
        assert getattr(schedule[float(t[3])], column) == one[3]
    assert schedule[t].t is None


@pytest.mark.parametrize("name", ["vp", "edm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_coefficients_are_rounded_once(backend, name, dtype):
    """alpha*0 + sigma*1: sigma, worked out in float64, through fp32 (fp64) to the dtype."""
    schedule = made(name)
    t = some_times(schedule, 1000)
    table = torch.float64 if dtype == torch.float64 else torch.float32
    zero, one = torch.zeros(1000, 2, dtype=dtype), torch.ones(1000, 2, dtype=dtype)
    sigma, alpha = (v.to(table).to(dtype)[:, None].expand(1000, 2) for v in (schedule.sigma(t), schedule.alpha(t)))
    assert torch.equal(df.add_noise(zero, one, schedule[t]), sigma)
    assert torch.equal(df.add_noise(one, zero, schedule[t]), alpha)
    assert torch.equal(df.add_noise(zero[:1], one[:1], schedule[float(t[7])]), sigma[7:8])


def test_conversions_invert_noising(backend):
    schedule, noise = ContinuousSchedule.cosine(), df.Noise(1)
    x0 = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = schedule[some_times(schedule)]
    x_t, v = df.add_noise(x0, noise, level, target="v")
    torch.testing.assert_close(df.to_x0(x_t, v, level, predict="v"), x0, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match=r"to_x0: has no finite value at alpha = 0.0, sigma = 1.0"):
        df.to_x0(x_t, v, schedule[1.0])
    with pytest.raises(ValueError, match=r"to_score: has no finite value at sample 1, alpha = 1.0, sigma = 0.0"):
        df.to_score(x_t[:2], v[:2], schedule[torch.tensor([0.5, 0.0])])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_a_time_that_wants_them(name):
    schedule = made(name)
    t = some_times(schedule).requires_grad_()
    x_t = df.add_noise(torch.ones(9, 2), df.Noise(0), schedule[t])
    x_t.sum().backward()
    eps = df.Noise(0).normal((9, 2)).double().sum(1)
    drift, diffusion, alpha, sigma = (
        f(t.detach()) for f in (schedule.drift, schedule.diffusion, schedule.alpha, schedule.sigma)
    )
    of_sigma = (diffusion.square() + 2 * drift * sigma.square()) / (2 * sigma)
    torch.testing.assert_close(t.grad, 2 * drift * alpha + of_sigma * eps, rtol=1e-5, atol=1e-6)  # x_t is fp32


# Out of range.


@pytest.mark.parametrize("name", NAMES)
def test_rounded_ends_are_in_range(name):
    schedule = made(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
        level = schedule[ends.to(dtype)]
        assert level.sigma.isfinite().all() and level.alpha.isfinite().all()
    assert float(torch.tensor(1e-5)) < 1e-5  # as for vp
    assert made("vp")[torch.tensor([1e-5])].sigma == made("vp").sigma(1e-5)


@pytest.mark.parametrize("call", ["__getitem__", "alpha", "sigma", "drift", "diffusion"])
@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), float("inf")])
def test_time_out_of_range(call, bad):
    schedule = ContinuousSchedule.ve()
    where = "" if call == "__getitem__" else rf"\.{call}"
    message = rf"^ContinuousSchedule.ve\(0.01, 50.0\){where}: t must be in \[0.0, 1.0\], got "
    with pytest.raises(ValueError, match=rf"{message}{bad}$"):
        getattr(schedule, call)(bad)
    t = torch.tensor([0.5, 0.0, bad, 7.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"{message}{bad} for sample 2$"):
        getattr(schedule, call)(t)


EDM = ContinuousSchedule.edm()


def levels_of(t):
    level = EDM[t]
    return level.alpha, level.sigma


def test_where_times_cannot_be_read_those_out_of_range_are_nan():
    t = torch.tensor([0.5, -1.0, 81.0, float("nan"), 80.0])
    outside = [False, True, True, True, False]
    torch._dynamo.reset()
    compiled = torch.compile(levels_of, fullgraph=True, backend="aot_eager")(t)
    mapped = torch.func.vmap(levels_of)(t[:, None])
    for alpha, sigma in (compiled, mapped):
        assert alpha.flatten().isnan().tolist() == sigma.flatten().isnan().tolist() == outside
        assert sigma.flatten()[[0, 4]].tolist() == [0.5, 80.0]


@pytest.mark.parametrize(
    "t, error, message",
    [
        (torch.tensor([1]), TypeError, "t must be floating, got torch.int64"),
        (True, TypeError, "t must be a number or a floating tensor, got bool"),
        ("0.5", TypeError, "t must be a number or a floating tensor, got str"),
        ([0.5], TypeError, "t must be a number or a floating tensor, got list"),
        (None, TypeError, "t must be a number or a floating tensor, got NoneType"),
    ],
)
def test_bad_t(t, error, message):
    with pytest.raises(error, match=rf"^ContinuousSchedule.flow\(1.0\): {message}$"):
        ContinuousSchedule.flow()[t]


# The SDE.


@pytest.mark.parametrize("name", NAMES)
def test_drift_and_diffusion_are_those_of_the_papers(name):
    schedule = made(name)
    t = torch.cat((some_times(schedule), torch.tensor([(schedule.t_min + schedule.t_max) / 2]).double()))
    wanted = torch.tensor([SDES[name](v) for v in t.tolist()], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(schedule.drift(t), wanted[:, 0], rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(schedule.diffusion(t).square(), wanted[:, 1], rtol=1e-11, atol=0)
    with torch.inference_mode():
        assert schedule.drift(float(t[2])) == pytest.approx(float(wanted[2, 0]), rel=1e-11, abs=1e-14)
        assert schedule.diffusion(float(t[2])) ** 2 == pytest.approx(float(wanted[2, 1]), rel=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_the_sde_are_alpha_and_sigma(name):
    """dm/dt = f m and dv/dt = 2 f v + g^2, from t_min (or just above) on."""
    schedule = made(name)
    first, *_, last = some_times(schedule, 50).tolist()

    def moments(t, y):
        f, g = schedule.drift(t), schedule.diffusion(t)
        return f * y[0], 2 * f * y[1] + g * g

    start = schedule.alpha(first), schedule.sigma(first) ** 2
    mean, variance = scipy.integrate.solve_ivp(moments, (first, last), start, rtol=1e-9, atol=1e-12).y[:, -1]
    assert mean == pytest.approx(schedule.alpha(last), rel=1e-6)
    assert variance == pytest.approx(schedule.sigma(last) ** 2, rel=1e-6)


def test_marginal_of_the_vp_sde():
    """Song et al. 2021, eq. 11, with beta(t) written here: independent of drift and diffusion."""

    def moments(t, y):
        return -beta(t) / 2 * y[0], beta(t) * (1 - y[1])

    solution = scipy.integrate.solve_ivp(moments, (0, 1), (1.0, 0.0), rtol=1e-10, atol=1e-13, dense_output=True).sol
    schedule = ContinuousSchedule.vp()
    for t in (0.01, 0.2, 0.5, 1.0):
        mean, variance = solution(t)
        assert schedule.alpha(t) == pytest.approx(mean, rel=1e-6)
        assert schedule.sigma(t) ** 2 == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize(
    "call, t",
    [
        (ContinuousSchedule.flow().drift, 1.0),
        (ContinuousSchedule.cosine().diffusion, 1.0),
        (ContinuousSchedule.laplace().diffusion, 0.0),
    ],
)
def test_where_the_sde_is_singular(call, t):
    name = call.__self__
    with pytest.raises(ValueError) as error:
        call(t)
    assert str(error.value) == f"{name}.{call.__name__}: has no finite value at t = {t}"
    with pytest.raises(ValueError) as error:
        call(torch.tensor([0.5, t]))
    assert str(error.value) == f"{name}.{call.__name__}: has no finite value at t = {t}"
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(torch.tensor([0.5, t]))
    assert compiled.isnan().tolist() == [False, True]


# Schedules of one's own.


def arc_alpha(t):
    return (1 - t * t).sqrt()


def arc_sigma(t):
    return t + 0


def test_a_schedule_from_two_functions():
    schedule = ContinuousSchedule(arc_alpha, arc_sigma, t_min=0.1, t_max=0.9, density=Uniform(0.2, 0.3))
    assert repr(schedule).startswith("ContinuousSchedule(t_min=0.1, t_max=0.9, density=Uniform(low=0.2, high=0.3)")
    assert schedule.alpha(0.6) == pytest.approx(0.8, rel=1e-15) and schedule.sigma(0.6) == 0.6
    assert schedule.drift(0.6) == pytest.approx(-0.6 / 0.64, rel=1e-14)
    assert schedule.diffusion(0.6) ** 2 == pytest.approx(2 * 0.6 + 2 * 0.6 / 0.64 * 0.36, rel=1e-14)
    t = schedule.draw(df.Noise(0), 1000)
    assert 0.2 < t.min() < 0.21 and 0.29 < t.max() < 0.3


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: ContinuousSchedule(1.0, arc_sigma), TypeError, "alpha must be callable, got float"),
        (lambda: ContinuousSchedule(arc_alpha, None), TypeError, "sigma must be callable, got NoneType"),
        (lambda: ContinuousSchedule(arc_alpha, arc_sigma, density="uniform"), TypeError, "density must be callable"),
        (
            lambda: ContinuousSchedule(lambda t: 1.0, arc_sigma),
            TypeError,
            r"alpha\(t\) must be a float64 tensor of t's shape \(2,\), got float",
        ),
        (
            lambda: ContinuousSchedule(arc_alpha, lambda t: t.float()),
            TypeError,
            r"sigma\(t\) must be a float64 tensor of t's shape \(2,\), got torch.float32 of \(2,\)",
        ),
        (lambda: ContinuousSchedule(arc_alpha, lambda t: t.sum()), TypeError, r"got torch.float64 of \(\)"),
        (
            lambda: ContinuousSchedule(arc_alpha, arc_sigma, t_max=2.0),
            ValueError,
            r"alpha\(t\) must be finite and not negative, got \[1.0, nan\] at \[0.0, 2.0\]",
        ),
        (
            lambda: ContinuousSchedule(arc_sigma, arc_alpha),
            ValueError,
            r"sigma/alpha must be larger at t_max than at t_min, got alpha = \[0.0, 1.0\], sigma = \[1.0, 0.0\] at",
        ),
        (
            lambda: ContinuousSchedule(arc_alpha, arc_sigma, t_min=0.5, t_max=0.5),
            ValueError,
            "t_min must be less than t_max, got 0.5 and 0.5",
        ),
        (lambda: ContinuousSchedule(arc_alpha, arc_sigma, t_max=float("inf")), ValueError, "t_max must be finite"),
        (
            lambda: ContinuousSchedule(torch.ones_like, arc_sigma, t_max=2.0, shift=3.0),
            ValueError,
            r"shift must be positive, and 1 unless t lies in \[0, 1\], got 3.0",
        ),
        (lambda: ContinuousSchedule.flow(0), ValueError, r"flow\(0\): shift must be positive"),
        (lambda: ContinuousSchedule.flow("a"), TypeError, r"flow\(a\): shift must be a number, got str"),
        (
            lambda: ContinuousSchedule.vp(2.0, 1.0),
            ValueError,
            r"vp\(2.0, 1.0, 1e-05\): needs 0 <= beta_min <= beta_max",
        ),
        (lambda: ContinuousSchedule.vp(0, 0), ValueError, "beta_max > 0"),
        (lambda: ContinuousSchedule.vp(t_min=0), ValueError, r"vp\(0.1, 20.0, 0\): needs .* and 0 < t_min < 1"),
        (lambda: ContinuousSchedule.sub_vp(-1.0), ValueError, r"sub_vp\(-1.0, 20.0, 1e-05\): needs 0 <= beta_min"),
        (lambda: ContinuousSchedule.sub_vp(None), TypeError, "sub_vp: beta_min must be a number, got NoneType"),
        (lambda: ContinuousSchedule.ve(0.0), ValueError, r"ve\(0.0, 50.0\): needs 0 < sigma_min < sigma_max"),
        (lambda: ContinuousSchedule.edm(3.0, 3.0), ValueError, r"edm\(3.0, 3.0\): needs 0 < sigma_min < sigma_max"),
        (lambda: ContinuousSchedule.edm(0.1, float("inf")), ValueError, "edm: sigma_max must be finite, got inf"),
        (lambda: ContinuousSchedule.laplace(b=0), ValueError, r"laplace\(0.0, 0\): needs b > 0"),
        (lambda: ContinuousSchedule.laplace(mu="0"), TypeError, "laplace: mu must be a number, got str"),
        (lambda: Uniform(1.0, 1.0), ValueError, "Uniform: low must be less than high, got 1.0 and 1.0"),
        (lambda: Uniform(0.0, float("nan")), ValueError, "Uniform: high must be finite, got nan"),
        (lambda: LogNormal(P_std=0), ValueError, "LogNormal: P_std must be positive, got 0"),
        (lambda: LogNormal("a"), TypeError, "LogNormal: P_mean must be a number, got str"),
        (lambda: LogitNormal(std=-1), ValueError, "LogitNormal: std must be positive, got -1"),
        (lambda: LogitNormal(mean=float("inf")), ValueError, "LogitNormal: mean must be finite, got inf"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Grids.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 2, 10])
def test_discretise(name, T):
    schedule = made(name)
    grid = schedule.discretise(T)
    assert isinstance(grid, df.Schedule) and len(grid) == T and repr(grid) == f"{schedule}.discretise({T})"
    if name in ("flow", "cosine", "laplace"):
        wanted = [k / T for k in range(1, T + 1)]  # at 0 there is no noise
    else:
        step = (schedule.t_max - schedule.t_min) / max(T - 1, 1)
        wanted = [schedule.t_max - k * step for k in reversed(range(T))]
    torch.testing.assert_close(
        grid.times, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-15 * schedule.t_max
    )
    assert grid.times[-1] == schedule.t_max
    assert torch.equal(grid.alpha, schedule.alpha(grid.times)) and torch.equal(grid.sigma, schedule.sigma(grid.times))
    assert (grid.snr[1:] < grid.snr[:-1]).all()


def test_grids_are_the_schedules_of_the_same_name():
    for T, shift in ((1000, 1.0), (10, 3.0), (4, 0.5)):
        grid, flow = ContinuousSchedule.flow(shift).discretise(T), df.Schedule.flow(T, shift)
        assert torch.equal(grid.alpha, flow.alpha) and torch.equal(grid.sigma, flow.sigma)
        assert torch.equal(grid.times, flow.sigma) and flow.times is None
    edm, karras = ContinuousSchedule.edm(0.01, 50.0).discretise(30, rho=5), df.Schedule.karras(30, 0.01, 50.0, 5)
    assert torch.equal(edm.sigma, karras.sigma) and torch.equal(edm.alpha, karras.alpha)
    assert repr(edm) == "ContinuousSchedule.edm(0.01, 50.0).discretise(30, rho=5)"
    middles, laplace = (torch.arange(9, dtype=torch.float64) + 0.5) / 9, df.Schedule.laplace(9, 0.1, 0.7)
    grid = ContinuousSchedule.laplace(0.1, 0.7).discretise(times=middles)
    assert torch.equal(grid.alpha, laplace.alpha) and torch.equal(grid.sigma, laplace.sigma)


def test_the_vp_sde_is_the_limit_of_ddpm():
    """Song et al. 2021, appendix B: beta_i = beta(i/T)/T. By T = 100000 their logSNR agree to beta_max/T/2."""
    T = 100_000
    ddpm = df.Schedule.linear(T, 0.1 / T, 20 / T)
    vp = ContinuousSchedule.vp().discretise(times=(torch.arange(T, dtype=torch.float64) + 1) / T)
    torch.testing.assert_close(ddpm.alpha_bar.log(), vp.alpha_bar.log(), rtol=1e-3, atol=0)


def test_flow_times_are_those_that_diffusers_feeds_the_network():
    theirs = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(1000, 3.0)
    times = ContinuousSchedule.flow(3.0).discretise(1000).times
    torch.testing.assert_close(theirs.timesteps.double().flip(0) / 1000, times, rtol=5e-7, atol=0)


def test_given_times():
    schedule = ContinuousSchedule.vp()
    for times in ([0.1, 0.5, 1.0], torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)):
        grid = schedule.discretise(times=times)
        assert grid.times.tolist() == [0.1, 0.5, 1.0] and grid.alpha[1] == schedule.alpha(0.5)
        assert repr(grid) == f"{schedule}.discretise(<3 times>)"
    rounded = schedule.discretise(times=torch.tensor([1e-5, 1.0]))  # float32: just below t_min
    assert rounded.times.tolist() == [1e-5, 1.0]
    # Not shifted again.
    assert ContinuousSchedule.flow(3.0).discretise(times=[0.25, 0.5]).sigma.tolist() == [0.25, 0.5]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "give T, and rho, or times, got T=None, rho=1.0, times=None"),
        ({"T": 3, "times": [0.5]}, ValueError, r"give T, and rho, or times, got T=3, rho=1.0, times=\[0.5\]"),
        ({"times": [0.5], "rho": 7.0}, ValueError, "give T, and rho, or times, got T=None, rho=7.0"),
        ({"T": 0}, ValueError, "T must be a positive int, got 0"),
        ({"T": 2.0}, ValueError, "T must be a positive int, got 2.0"),
        ({"T": 3, "rho": 0}, ValueError, "rho must be positive, and 1 unless t >= 0, got 0"),
        ({"T": 3, "rho": "7"}, TypeError, "rho must be a number, got str"),
        ({"times": [0.5, 0.5]}, ValueError, r"times must have shape \(T,\) and increase, got \[0.5, 0.5\]"),
        ({"times": [0.5, 0.4]}, ValueError, r"times must have shape \(T,\) and increase, got \[0.5, 0.4\]"),
        ({"times": torch.ones(1, 1)}, ValueError, r"times must have shape \(T,\) and increase"),
        ({"times": [0.5, 1.5]}, ValueError, r"t must be in \[0.0, 1.0\], got 1.5 for sample 1"),
        ({"times": [float("nan")]}, ValueError, r"t must be in \[0.0, 1.0\], got nan for sample 0"),
        ({"times": torch.tensor([0, 1])}, TypeError, "t must be floating, got torch.int64"),
    ],
)
def test_bad_grids(arguments, error, message):
    with pytest.raises(error, match=rf"ContinuousSchedule.flow\(1.0\).discretise: {message}"):
        ContinuousSchedule.flow().discretise(**arguments)


def test_the_times_go_with_copies():
    grid = ContinuousSchedule.edm().discretise(5, rho=7)
    for again in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
        assert torch.equal(again.times, grid.times) and torch.equal(again.sigma, grid.sigma)
    for other in (df.Schedule.linear(5), ContinuousSchedule.vp().discretise(5).zero_terminal_snr()):
        assert other.times is None


# Drawn times.


def shifted_back(t, s):
    return t / (s - (s - 1) * t)


@pytest.mark.parametrize(
    "schedule, density, law",
    [
        (ContinuousSchedule.vp(), None, scipy.stats.uniform(1e-5, 1 - 1e-5).cdf),
        (ContinuousSchedule.ve(), None, scipy.stats.uniform().cdf),
        (ContinuousSchedule.cosine(), None, scipy.stats.uniform().cdf),
        (ContinuousSchedule.flow(), None, scipy.stats.uniform().cdf),
        (ContinuousSchedule.flow(3.0), None, lambda t: scipy.stats.uniform().cdf(shifted_back(t, 3.0))),
        (ContinuousSchedule.edm(), None, scipy.stats.lognorm(s=1.2, scale=math.exp(-1.2)).cdf),
        (ContinuousSchedule.edm(), LogNormal(-0.4, 1.0), scipy.stats.lognorm(s=1.0, scale=math.exp(-0.4)).cdf),
        (ContinuousSchedule.edm(), Uniform(1.0, 3.0), scipy.stats.uniform(1.0, 2.0).cdf),
        (ContinuousSchedule.flow(), LogitNormal(), lambda t: scipy.stats.norm.cdf(scipy.special.logit(t))),
        (
            ContinuousSchedule.flow(3.0),
            LogitNormal(0.5, 0.7),
            lambda t: scipy.stats.norm(0.5, 0.7).cdf(scipy.special.logit(shifted_back(t, 3.0))),
        ),
    ],
    ids=lambda v: repr(v) if isinstance(v, ContinuousSchedule | Uniform | LogNormal | LogitNormal) else "",
)
def test_law_of_the_drawn_times(schedule, density, law):
    t = schedule.draw(df.Noise(11), 50_000, density=density)
    assert t.dtype == torch.float32 and t.shape == (50_000,)
    # Fixed seed; a law off by 1 % of its range would have p < 1e-4.
    assert scipy.stats.kstest(t.double().numpy(), law).pvalue > 1e-2
    assert schedule.t_min < t.min() and t.max() < schedule.t_max


def test_uniform_times_of_the_laplace_schedule_have_its_law():
    schedule = ContinuousSchedule.laplace(0.3, 0.8)
    t = schedule.draw(df.Noise(5), 50_000)
    log_snr = 2 * (schedule.alpha(t) / schedule.sigma(t)).log()
    assert scipy.stats.kstest(log_snr.numpy(), scipy.stats.laplace(0.3, 0.8).cdf).pvalue > 1e-2


def test_draws_are_words_and_normals_of_the_tagged_stream():
    stream = df.Noise(7).fold_in(0x6C6576656C)
    u = (stream.bits((50,)).double() + 0.5) / 2**32
    assert torch.equal(ContinuousSchedule.flow().draw(df.Noise(7), 50), u.float())
    z = stream.normal((50, 1), dtype=torch.float64)[:, 0]
    assert torch.equal(ContinuousSchedule.edm().draw(df.Noise(7), 50), (-1.2 + 1.2 * z).exp().float())


@pytest.mark.parametrize("density", [Uniform(0.1, 0.9), LogNormal(), LogitNormal()], ids=repr)
def test_draws_depend_on_key_and_ids_alone(density):
    schedule = ContinuousSchedule.flow(2.0)

    def draw(noise, B):
        return schedule.draw(noise.fold_in(5), B, density=density)

    whole = draw(df.Noise(0), 100)
    parts = [draw(df.Noise(0, first_sample=first), n) for first, n in ((0, 1), (1, 62), (63, 37))]
    # torch's vector and scalar exp may differ in the last bit of float64, and so once in 1e8 in that of float32.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1.2e-7, atol=0)
    ids = torch.tensor([99, 3, 3])
    torch.testing.assert_close(draw(df.Noise(0, sample=ids), 3), whole[ids], rtol=1.2e-7, atol=0)
    assert not torch.equal(schedule.draw(df.Noise(0).fold_in(6), 100, density=density), whole)
    assert draw(df.Noise(0), 0).shape == (0,)


def test_draws_stay_strictly_inside():
    values = torch.tensor([-1.0, 0.0, 1e-60, 0.5, 1 - 1e-12, 1.0, 2.0], dtype=torch.float64)
    t = ContinuousSchedule.flow().draw(df.Noise(0), 7, density=lambda noise, B, device: values)
    low, high = 2.0**-149, 1 - 2.0**-24
    assert t.tolist() == [low, low, low, 0.5, high, high, high]
    t = ContinuousSchedule.vp().draw(df.Noise(0), 2, density=lambda noise, B, device: values[[0, -1]])
    assert 1e-5 < float(t[0]) < 1.0000001e-5  # float32's neighbour below is less than t_min


def test_bad_draws():
    schedule = ContinuousSchedule.flow()
    with pytest.raises(TypeError, match=r"^ContinuousSchedule.flow\(1.0\).draw: noise must be a Noise, got Tensor$"):
        schedule.draw(torch.zeros(3), 3)
    with pytest.raises(TypeError, match=r"flow\(1.0\).draw: density must be callable, got str"):
        schedule.draw(df.Noise(0), 3, density="uniform")
    with pytest.raises(ValueError, match=r"noise.sample must have shape \(4,\), got \(3,\)"):
        schedule.draw(df.Noise(0, sample=torch.arange(3)), 4)


# Copies and compilation.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_copies(name, copied):
    schedule = made(name)
    again = copied(schedule)
    assert repr(again) == repr(schedule) and repr(schedule).startswith(f"ContinuousSchedule.{name}(")
    t = some_times(schedule)
    assert torch.equal(again.alpha(t), schedule.alpha(t)) and torch.equal(again.sigma(t), schedule.sigma(t))
    assert torch.equal(again.draw(df.Noise(0), 9), schedule.draw(df.Noise(0), 9))
    x = torch.ones(9, 2)
    wanted = df.add_noise(x, df.Noise(0), schedule[t])
    assert torch.equal(df.add_noise(x, df.Noise(0), copied(schedule[t])), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name):
    schedule = made(name)

    def f(x, t):
        return df.add_noise(x, df.Noise(3), schedule[t])

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    t = some_times(schedule)
    for times in (t, t.flip(0)):
        assert torch.equal(compiled(x, times), f(x, times))
    assert counter.frame_count == 1
    for one in t.tolist():
        assert torch.equal(compiled(x, one), f(x, one))
    assert counter.frame_count <= 3  # the first number is a constant of its graph, those after are inputs


def test_drawing_compiles():
    schedule = ContinuousSchedule.flow(3.0)

    def f(x, key):
        noise = df.Noise(key)
        t = schedule.draw(noise, x.shape[0], density=LogitNormal())
        return df.add_noise(x, noise, schedule[t]), schedule.drift(t), schedule.diffusion(t)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        x, key = torch.ones(4, 3), torch.tensor([seed, 0])
        for got, wanted in zip(compiled(x, key), f(x, key), strict=True):
            assert torch.equal(got, wanted)
