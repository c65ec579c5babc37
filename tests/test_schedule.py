"""Schedules against formulas written anew, and levels of both kinds."""

from __future__ import annotations

import copy
import pickle

import mpmath as mp
import numpy as np
import pytest
import torch

import dae_fast as df

from .conftest import GPU_CODE

mp.mp.dps = 40


def products(betas):
    """alpha_bar in 40 digits."""
    bar, result = mp.mpf(1), []
    for beta in betas:
        bar *= 1 - beta
        result.append(bar)
    return result


def linear(T, first="1e-4", last="0.02"):
    return products(mp.linspace(mp.mpf(first), mp.mpf(last), T))


def scaled_linear(T, first="0.00085", last="0.012"):
    return products(b**2 for b in mp.linspace(mp.sqrt(mp.mpf(first)), mp.sqrt(mp.mpf(last)), T))


def cosine(T, s="0.008", most="0.999"):
    f = [mp.cos((mp.mpf(t) / T + mp.mpf(s)) / (1 + mp.mpf(s)) * mp.pi / 2) ** 2 for t in range(T + 1)]
    return products(min(1 - f[t + 1] / f[t], mp.mpf(most)) for t in range(T))


def sigmoid(T, start="-3", end="3", tau="1", most="0.999"):
    def s(x):
        return 1 / (1 + mp.exp(-x / mp.mpf(tau)))

    start, end = mp.mpf(start), mp.mpf(end)
    f = [(s(end) - s(start + (end - start) * mp.mpf(t) / T)) / (s(end) - s(start)) for t in range(T + 1)]
    return products(min(1 - f[t + 1] / f[t], mp.mpf(most)) for t in range(T))


def close(values, wanted, relative=1e-12):
    """cumprod rounds T times, each by 1.1e-16; the root of 1 - alpha_bar loses digits near 0."""
    wanted = torch.tensor([float(w) for w in wanted], dtype=torch.float64)
    assert values.dtype == torch.float64 and values.device.type == "cpu"
    torch.testing.assert_close(values, wanted, rtol=relative, atol=0)


FORMULAS = [("linear", linear), ("scaled_linear", scaled_linear), ("cosine", cosine), ("sigmoid", sigmoid)]


@pytest.mark.parametrize("T", [2, 50, 1000])
@pytest.mark.parametrize("name, formula", FORMULAS)
def test_variance_preserving_schedules(name, formula, T):
    schedule, bar = getattr(df.Schedule, name)(T), formula(T)
    assert len(schedule) == T and schedule.variance_preserving
    close(schedule.alpha_bar, bar)
    close(schedule.alpha, [mp.sqrt(b) for b in bar])
    close(schedule.sigma, [mp.sqrt(1 - b) for b in bar], 1e-11)
    close(schedule.snr, [b / (1 - b) for b in bar], 1e-11)
    close(schedule.betas, [1 - b / a for a, b in zip([mp.mpf(1), *bar], bar, strict=False)], 1e-11)


def test_arguments_of_the_constructors():
    close(df.Schedule.linear(20, 0.001, 0.3).alpha_bar, linear(20, "0.001", "0.3"))
    close(df.Schedule.scaled_linear(20, 0.001, 0.3).alpha_bar, scaled_linear(20, "0.001", "0.3"))
    close(df.Schedule.cosine(20, 0.02, 0.9).alpha_bar, cosine(20, "0.02", "0.9"))
    close(df.Schedule.sigmoid(20, 0, 3, 0.5, 0.9).alpha_bar, sigmoid(20, "0", "3", "0.5", "0.9"))
    # Where the sigmoid is flat: at the noisy end alpha_bar keeps its digits, at the other 1 - alpha_bar = 1e-11 five.
    close(df.Schedule.sigmoid(20, tau=0.1).alpha_bar, sigmoid(20, tau="0.1"))
    close(df.Schedule.sigmoid(20, tau=0.1).sigma, [mp.sqrt(1 - b) for b in sigmoid(20, tau="0.1")], 1e-4)


def test_published_values():
    bar = df.Schedule.linear().alpha_bar
    assert bar[0] == 1 - 1e-4  # Ho et al. 2020
    assert f"{bar[999]:.2e}" == "4.04e-05"
    assert f"{df.Schedule.scaled_linear().alpha_bar[999]:.4f}" == "0.0047"  # Lin et al. 2024, table 1: 0.068265 ** 2
    assert f"{df.Schedule.scaled_linear().alpha[999]:.6f}" == "0.068265"
    assert f"{df.Schedule.linear().alpha[999]:.6f}" == "0.006353"
    assert df.Schedule.cosine().betas[999] == pytest.approx(0.999, rel=1e-9)  # clipped, Nichol and Dhariwal 2021


@pytest.mark.parametrize("low, high, T", [(0.01, 1.0, 10), (0.01, 50.0, 232), (0.3, 0.3, 3), (0.5, 2.0, 1)])
def test_geometric(low, high, T):
    schedule = df.Schedule.geometric(T, low, high)
    low_, high_ = mp.mpf(low), mp.mpf(high)
    close(schedule.sigma, [low_ * (high_ / low_) ** (mp.mpf(t) / max(T - 1, 1)) for t in range(T)], 1e-13)
    assert (schedule.alpha == 1).all()
    assert schedule.variance_preserving is False
    with pytest.raises(ValueError, match="betas: defined for variance-preserving schedules only"):
        _ = schedule.betas


@pytest.mark.parametrize("low, high, T, rho", [(0.002, 80.0, 18, 7.0), (0.1, 3.0, 5, 1.0), (0.5, 2.0, 1, 3.0)])
def test_karras(low, high, T, rho):
    schedule = df.Schedule.karras(T, low, high, rho)
    # Eq. 5 of Karras et al. 2022, whose step 0 is the noisiest.
    first, last, power = mp.mpf(high) ** (1 / mp.mpf(rho)), mp.mpf(low) ** (1 / mp.mpf(rho)), mp.mpf(rho)
    steps = [(first + mp.mpf(i) / max(T - 1, 1) * (last - first)) ** power for i in range(T)]
    close(schedule.sigma, steps[::-1], 1e-13)
    assert schedule.sigma[-1] == high and (T == 1 or schedule.sigma[0] == low)
    assert (schedule.alpha == 1).all() and (schedule.alpha_bar == 1).all()
    close(schedule.snr, [1 / s**2 for s in steps[::-1]], 1e-13)
    assert df.Schedule.karras().sigma.shape == (18,)


def log_snr(schedule):
    return [
        mp.log(mp.mpf(a) / mp.mpf(s)) * 2 for a, s in zip(schedule.alpha.tolist(), schedule.sigma.tolist(), strict=True)
    ]


@pytest.mark.parametrize("T, mu, b", [(1000, 0.0, 0.5), (7, 0.3, 1.5), (2, -1.0, 0.25), (1, 0.7, 2.0)])
def test_laplace(T, mu, b):
    schedule = df.Schedule.laplace(T, mu, b)
    t = [(mp.mpf(i) + 0.5) / T for i in range(T)]
    wanted = [mp.mpf(mu) - mp.mpf(b) * mp.sign(0.5 - u) * mp.log(1 - 2 * abs(u - 0.5)) for u in t]
    # The rounding of t near 1, 1e-16, against 1 - t >= 1/2000.
    assert max(abs(a - w) for a, w in zip(log_snr(schedule), wanted, strict=True)) < 1e-12
    assert schedule.variance_preserving and (schedule.betas >= 0).all()
    close(schedule.snr[-1:], [mp.exp(mp.mpf(mu)) / mp.mpf(T) ** mp.mpf(b)], 1e-12)


def test_laplace_has_the_law_of_its_name():
    schedule = df.Schedule.laplace(1000, 0.2, 0.8)
    stats = pytest.importorskip("scipy.stats")
    law = stats.laplace(0.2, 0.8)
    # The levels are the law's quantiles at (i + 1/2)/T: no point of the distribution function is further off than 1/2T.
    assert stats.kstest(schedule.snr.log(), law.cdf).statistic == pytest.approx(0.5 / 1000, rel=1e-9)


@pytest.mark.parametrize("T, shift", [(1000, 1.0), (10, 3.0), (4, 0.1), (1, 5.0)])
def test_flow(T, shift):
    schedule = df.Schedule.flow(T, shift)
    s = mp.mpf(shift)
    t = [s * u / (1 + (s - 1) * u) for u in (mp.mpf(k) / T for k in range(1, T + 1))]
    close(schedule.sigma, t, 1e-15)
    torch.testing.assert_close(
        schedule.alpha, torch.tensor([float(1 - u) for u in t], dtype=torch.float64), rtol=0, atol=3e-16
    )
    assert schedule.alpha[-1] == 0 and schedule.sigma[-1] == 1 and schedule.snr[-1] == 0  # exactly, whatever the shift
    assert torch.equal(schedule.alpha_bar, schedule.alpha.square())
    if T > 1:
        with pytest.raises(ValueError, match=r"betas: defined for variance-preserving schedules only"):
            _ = schedule.betas


@pytest.mark.parametrize("schedule", [df.Schedule.cosine(), df.Schedule.linear(50), df.Schedule.laplace(9)], ids=str)
@pytest.mark.parametrize("d", [32, 64, 256])
def test_shifted(schedule, d):
    shifted = schedule.shifted(d / 64)
    assert repr(shifted) == f"{schedule}.shifted({d / 64})" and shifted.variance_preserving
    for a, sigma, before in zip(shifted.alpha.tolist(), shifted.sigma.tolist(), log_snr(schedule), strict=True):
        after = before + 2 * mp.log(mp.mpf(64) / d)  # Hoogeboom et al. 2023
        assert abs(a / mp.sqrt(1 / (1 + mp.exp(-after))) - 1) < 1e-14
        assert abs(sigma / mp.sqrt(1 / (1 + mp.exp(after))) - 1) < 1e-14
    close(schedule.shifted(2.0).shifted(3.0).snr, schedule.shifted(6.0).snr.tolist())


def test_shifted_keeps_what_has_no_noise_or_no_signal():
    schedule = df.Schedule.from_alpha_bar([1.0, 0.36, 0.0]).shifted(4.0)
    assert schedule.alpha[[0, 2]].tolist() == [1, 0] and schedule.sigma[[0, 2]].tolist() == [0, 1]


def test_from_betas_and_from_alpha_bar():
    betas = np.random.default_rng(0).uniform(0, 0.5, 7)
    for given in (betas, betas.tolist(), torch.tensor(betas)):
        schedule = df.Schedule.from_betas(given)
        close(schedule.alpha_bar, np.cumprod(1 - betas))
        close(schedule.betas, betas, 1e-11)
    again = df.Schedule.from_alpha_bar(schedule.alpha_bar)
    assert torch.equal(again.alpha, schedule.alpha) and torch.equal(again.sigma, schedule.sigma)
    close(df.Schedule.from_betas(torch.tensor([0.5, 0.25], dtype=torch.float32)).alpha_bar, [0.5, 0.375])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: df.Schedule([0.5], [0.5]), r"Schedule: alpha must be a tensor \(T,\) of real numbers, got list"),
        (
            lambda: df.Schedule(torch.ones(1), None),
            r"Schedule: sigma must be a tensor \(T,\) of real numbers, got None",
        ),
        (lambda: df.Schedule(torch.ones(1), torch.ones(1) + 0j), "sigma must be .* got torch.complex64"),
        (lambda: df.Schedule(torch.ones(1), torch.ones(1), times=[0.5]), r"times must be a tensor .* got list"),
        (lambda: df.Schedule.from_betas("0.1"), "from_betas: betas must be a tensor or a sequence of numbers, got str"),
        (lambda: df.Schedule.from_alpha_bar([None]), "alpha_bar must be a tensor or a sequence of numbers, got list"),
        (lambda: df.Schedule.linear(9, None), "Schedule.linear: beta_start must be a number, got NoneType"),
        (lambda: df.Schedule.cosine(9, "s"), "Schedule.cosine: s must be a number, got str"),
        (lambda: df.nn.DenoisingLoss(None), "DenoisingLoss: schedule must be a Schedule or a Cont.*, got NoneType"),
    ],
)
def test_what_is_no_column(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_columns_rounded_to_float32_are_in_order():
    """Level 0 and 1 may come out the wrong way round by a rounding."""
    for schedule in (df.Schedule.linear(4000), df.Schedule.cosine(), df.Schedule.sigmoid(), df.Schedule.flow(3000)):
        df.Schedule(schedule.alpha.float(), schedule.sigma.float())
        df.Schedule.from_alpha_bar(schedule.alpha.float().square().clamp(max=1))
    df.Schedule.from_betas([0.0, 0.0, 0.1, 0.0])  # levels alike


def test_a_table_that_overflows_says_so():
    """alpha = 5.4e-20 > 0 is no reason to refuse a level: its square beneath a fraction is."""
    message = r"DenoisingLoss: a coefficient of 3.45e\+38 overflows torch.float32 at level 9363 of .*alpha = 5.38.*e-20"
    with pytest.raises(ValueError, match=message):
        df.nn.DenoisingLoss(df.Schedule.linear(10000))
    df.nn.DenoisingLoss(df.Schedule.linear(10000), "v")
    x = torch.ones(1, 2, dtype=torch.float64)
    assert df.to_x0(x, x, df.Schedule.linear(10000)[9999]).isfinite().all()


def test_schedule_of_own_columns_keeps_a_copy():
    alpha = torch.tensor([1.0, 0.5], dtype=torch.float64)
    schedule = df.Schedule(alpha, torch.tensor([0.0, 3.0]))
    alpha.zero_()
    assert schedule.alpha.tolist() == [1.0, 0.5]
    assert schedule.sigma.tolist() == [0.0, 3.0] and schedule.sigma.dtype == torch.float64
    assert schedule.snr.tolist() == [float("inf"), (0.5 / 3) ** 2]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: df.Schedule.linear(0), "Schedule.linear: T must be a positive int, got 0"),
        (lambda: df.Schedule.cosine(2.5), "Schedule.cosine: T must be a positive int, got 2.5"),
        (lambda: df.Schedule.linear(True), "Schedule.linear: T must be a positive int, got True"),
        (lambda: df.Schedule.linear(10, -0.1), r"Schedule.linear\(10, -0.1, 0.02\): betas must lie in \[0, 1\], got"),
        (lambda: df.Schedule.scaled_linear(10, -0.1), r"betas must lie in \[0, 1\]"),
        (lambda: df.Schedule.from_betas([0.1, float("nan")]), r"betas must lie in \[0, 1\], got values from nan"),
        (lambda: df.Schedule.from_alpha_bar([0.1, 1.5]), r"alpha_bar must lie in \[0, 1\], got values from 0.1 to 1.5"),
        (lambda: df.Schedule.from_betas([]), r"alpha must have shape \(T,\), T > 0, got \(0,\)"),
        (lambda: df.Schedule.from_betas(torch.zeros(2, 2)), r"alpha must have shape \(T,\), T > 0, got \(2, 2\)"),
        (lambda: df.Schedule(torch.ones(3), torch.ones(2)), r"sigma must have shape \(T,\), T > 0, got \(2,\)"),
        (lambda: df.Schedule(torch.ones(2), -torch.ones(2)), "sigma must be finite and not negative"),
        (
            lambda: df.Schedule(torch.ones(3), torch.tensor([0.5, 2.0, 1.0])),
            r"Schedule: levels must be in order, .*sigma/alpha falls from level 1 to 2 \(alpha = 1, sigma = 2 and",
        ),
        (
            lambda: df.Schedule.from_alpha_bar([0.01, 0.5, 0.99]),
            "from_alpha_bar: levels must be in order, .*level 0 to 1",
        ),
        (
            lambda: df.Schedule(torch.ones(2), torch.ones(2), times=torch.tensor([0.2, 0.1])),
            "Schedule: times must increase",
        ),
        (
            lambda: df.Schedule(torch.ones(2), torch.ones(2), times=torch.tensor([0.2, float("nan")])),
            "Schedule: times must be finite",
        ),
        (lambda: df.Schedule.geometric(10, 0.0, 1.0), "needs 0 < sigma_min <= sigma_max"),
        (lambda: df.Schedule.geometric(10, 2.0, 1.0), "needs 0 < sigma_min <= sigma_max"),
        (lambda: df.Schedule.sigmoid(0), "Schedule.sigmoid: T must be a positive int, got 0"),
        (lambda: df.Schedule.sigmoid(9, 1, -1), r"sigmoid\(9, 1, -1, 1.0, 0.999\): needs start < end and tau > 0"),
        (lambda: df.Schedule.sigmoid(9, tau=0), r"sigmoid\(9, -3.0, 3.0, 0, 0.999\): needs start < end and tau > 0"),
        (lambda: df.Schedule.sigmoid(9, tau=float("nan")), "Schedule.sigmoid: tau must be finite, got nan"),
        (lambda: df.Schedule.geometric(0.01, 1.0, 10), "Schedule.geometric: T must be a positive int, got 0.01"),
        (
            lambda: df.Schedule.karras(sigma_min=0.0),
            r"karras\(18, 0.0, 80.0, 7.0\): needs 0 < sigma_min <= sigma_max and rho > 0",
        ),
        (lambda: df.Schedule.karras(18, 2.0, 1.0), "needs 0 < sigma_min <= sigma_max and rho > 0"),
        (lambda: df.Schedule.karras(rho=-7), r"karras\(18, 0.002, 80.0, -7\): needs 0 < sigma_min"),
        (lambda: df.Schedule.karras(rho=1e-3), r"karras\(18, 0.002, 80.0, 0.001\): sigma must be finite"),
        (lambda: df.Schedule.karras(sigma_max=float("inf")), "Schedule.karras: sigma_max must be finite, got inf"),
        (lambda: df.Schedule.karras(T=0), "Schedule.karras: T must be a positive int, got 0"),
        (lambda: df.Schedule.laplace(0), "Schedule.laplace: T must be a positive int, got 0"),
        (lambda: df.Schedule.laplace(9, b=0), r"Schedule.laplace\(9, 0.0, 0\): needs b > 0"),
        (lambda: df.Schedule.laplace(9, mu=float("inf")), "Schedule.laplace: mu must be finite, got inf"),
        (lambda: df.Schedule.flow(1.5), "Schedule.flow: T must be a positive int, got 1.5"),
        (lambda: df.Schedule.flow(9, 0), r"Schedule.flow\(9, 0\): needs shift > 0"),
        (
            lambda: df.Schedule.linear(9).shifted(-1),
            r"Schedule.linear\(9, .*\).shifted: shift must be positive, got -1",
        ),
        (lambda: df.Schedule.linear(9).shifted(float("nan")), "shifted: shift must be finite, got nan"),
        (lambda: df.Schedule.flow(9).shifted(2), r"shifted: defined for variance-preserving schedules only"),
        (
            lambda: df.Schedule(torch.ones(2), torch.ones(2), times=torch.ones(3)),
            r"Schedule: times must have shape \(2,\), got \(3,\)",
        ),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: df.Schedule.sigmoid(9, start="a"), "Schedule.sigmoid: start must be a number, got str"),
        (lambda: df.Schedule.karras(sigma_max=None), "Schedule.karras: sigma_max must be a number, got NoneType"),
        (lambda: df.Schedule.laplace(9, b=True), "Schedule.laplace: b must be a number, got bool"),
        (lambda: df.Schedule.flow(9, "3"), "Schedule.flow: shift must be a number, got str"),
        (lambda: df.Schedule.linear(9).shifted([2]), "shifted: shift must be a number, got list"),
    ],
)
def test_arguments_that_are_no_numbers(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# Zero terminal SNR.


@pytest.mark.parametrize(
    "schedule", [df.Schedule.linear(), df.Schedule.scaled_linear(), df.Schedule.linear(2)], ids=str
)
def test_zero_terminal_snr_is_algorithm_1(schedule):
    def enforce_zero_terminal_snr(betas):  # as printed by Lin et al. 2024
        alphas_bar_sqrt = np.sqrt(np.cumprod(1 - betas))
        first, last = alphas_bar_sqrt[0], alphas_bar_sqrt[-1]
        alphas_bar_sqrt = (alphas_bar_sqrt - last) * first / (first - last)
        alphas_bar = alphas_bar_sqrt**2
        return 1 - np.concatenate([alphas_bar[0:1], alphas_bar[1:] / alphas_bar[:-1]])

    rescaled = schedule.zero_terminal_snr()
    assert rescaled.alpha[-1] == 0 and rescaled.sigma[-1] == 1 and rescaled.snr[-1] == 0
    assert rescaled.alpha[0] == pytest.approx(float(schedule.alpha[0]), rel=1e-15)
    assert rescaled.variance_preserving
    close(rescaled.betas, enforce_zero_terminal_snr(schedule.betas.numpy()), 1e-9)
    assert repr(rescaled) == f"{schedule}.zero_terminal_snr()"


def test_zero_terminal_snr_refuses():
    with pytest.raises(ValueError, match="zero_terminal_snr: defined for variance-preserving schedules only"):
        df.Schedule.geometric().zero_terminal_snr()
    for betas in ([0.1], [0.1, 0.0, 0.0]):
        with pytest.raises(ValueError, match="the last level must be the noisiest of two or more"):
            df.Schedule.from_betas(betas).zero_terminal_snr()


ZERO_TERMINAL = df.Schedule.linear(50).zero_terminal_snr()
CLEAN_FIRST = df.Schedule.from_betas([0.0, 0.1, 0.2])  # sigma = 0 at level 0
AT_49 = r"has no finite value at level 49 of Schedule.linear\(50, 0.0001, 0.02\).zero_terminal_snr\(\), alpha = 0.0"
AT_0 = "has no finite value at level 0 of Schedule.from_betas, alpha = 1.0, sigma = 0.0"


@pytest.mark.parametrize(
    "schedule, convert, predict, where",
    [
        (ZERO_TERMINAL, df.to_x0, "eps", AT_49),
        (ZERO_TERMINAL, df.to_x0, "score", AT_49),
        (ZERO_TERMINAL, df.to_v, "eps", AT_49),
        (CLEAN_FIRST, df.to_score, "eps", AT_0),
        (CLEAN_FIRST, df.to_score, "x0", AT_0),
        (CLEAN_FIRST, df.to_score, "v", AT_0),
        (CLEAN_FIRST, df.to_eps, "x0", AT_0),
    ],
)
def test_singular_conversions_are_refused(backend, schedule, convert, predict, where):
    """Whatever the levels of the batch: the table is refused."""
    x = torch.zeros(2, 3)
    for t in (1, torch.tensor([1, 1])):
        with pytest.raises(ValueError, match=f"{convert.__name__}: {where}.*use predict='v'"):
            convert(x, x, schedule[t], predict=predict)


def test_score_target_is_refused_where_sigma_is_0():
    with pytest.raises(ValueError, match=f"add_noise: {AT_0}"):
        df.add_noise(torch.zeros(2, 3), df.Noise(0), CLEAN_FIRST[1], target="score")


@pytest.mark.parametrize("alpha, sigma, convert", [(0.0, 1.0, df.to_x0), (1e-40, 1.0, df.to_x0), (1.0, 0, df.to_score)])
def test_singular_levels_by_hand_are_refused(backend, alpha, sigma, convert):
    """1e-40: its inverse is finite in float64 and infinite in float32."""
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"has no finite value at alpha = {alpha}.*use predict='v'"):
        convert(x, x, df.Level(alpha, sigma))
    pair = [torch.tensor([0.5, v], dtype=torch.float64) for v in (alpha, sigma)]
    with pytest.raises(ValueError, match=f"has no finite value at sample 1, alpha = {alpha}.*use predict='v'"):
        convert(x, x, df.Level(*pair))


@pytest.mark.parametrize("schedule, t", [(ZERO_TERMINAL, 49), (CLEAN_FIRST, 0)], ids=str)
def test_v_works_everywhere(backend, schedule, t):
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = schedule[torch.full((5,), t)]
    x_t, v = df.add_noise(x0, eps, level, target="v")
    torch.testing.assert_close(df.to_x0(x_t, v, level, predict="v"), x0, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(df.to_eps(x_t, v, level, predict="v"), eps, rtol=1e-12, atol=1e-14)


def test_x0_works_at_zero_terminal_and_eps_at_sigma_0(backend):
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(df.to_eps(x, torch.ones_like(x), ZERO_TERMINAL[49], predict="x0"), x)
    torch.testing.assert_close(df.to_x0(x, torch.ones_like(x), CLEAN_FIRST[0]), x)


# Levels are drawn: a function of key and ids.


def test_draw_is_uniform_and_says_where_it_comes_from():
    schedule, noise = df.Schedule.linear(7), df.Noise(3)
    t = schedule.draw(noise, 70_000)
    assert t.dtype == torch.int64 and t.shape == (70_000,)
    assert pytest.importorskip("scipy.stats").chisquare(torch.bincount(t, minlength=7)).pvalue > 1e-3
    words = noise.fold_in(0x6C6576656C).bits((70_000,))
    assert torch.equal(t, torch.tensor([(w * 7) >> 32 for w in words.tolist()]))


def test_draw_depends_on_key_and_ids_alone():
    schedule, noise = df.Schedule.linear(), df.Noise(0).fold_in(5)
    whole = schedule.draw(noise, 100)
    parts = [schedule.draw(df.Noise(0, first_sample=first).fold_in(5), n) for first, n in ((0, 1), (1, 62), (63, 37))]
    assert torch.equal(torch.cat(parts), whole)
    ids = torch.tensor([99, 3, 3])
    assert torch.equal(schedule.draw(df.Noise(0, sample=ids).fold_in(5), 3), whole[ids])
    assert not torch.equal(schedule.draw(df.Noise(0).fold_in(6), 100), whole)
    assert schedule.draw(noise, 0).shape == (0,)


def test_bad_draws():
    schedule = df.Schedule.linear(10)
    with pytest.raises(TypeError, match=r"Schedule.linear\(10, .*\).draw: noise must be a Noise, got Tensor"):
        schedule.draw(torch.zeros(3), 3)
    with pytest.raises(ValueError, match=r"noise.sample must have shape \(4,\), got \(3,\)"):
        schedule.draw(df.Noise(0, sample=torch.arange(3)), 4)


# diffusers 0.42 writes the same formulas in float32.


def test_betas_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for theirs, ours in (
        (diffusers.DDPMScheduler(), df.Schedule.linear()),
        (diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), df.Schedule.cosine()),
        (
            diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
            df.Schedule.scaled_linear(),
        ),
    ):
        # 1 - beta is rounded to 6e-8, 1000 times; where beta = 0.999 that is 6e-5 of it.
        torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.alpha_bar, rtol=1e-4, atol=0)


def test_zero_terminal_snr_is_that_of_diffusers():
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    schedule = df.Schedule.scaled_linear()
    close(schedule.zero_terminal_snr().betas, ddpm.rescale_zero_terminal_snr(schedule.betas).tolist(), 1e-9)


def test_karras_sigmas_are_those_of_diffusers():
    edm = pytest.importorskip("diffusers").EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    theirs = edm._compute_karras_sigmas(torch.linspace(0, 1, 30, dtype=torch.float64))
    close(df.Schedule.karras(30, 0.01, 50.0, 5.0).sigma, theirs.flip(0).tolist(), 1e-13)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_is_that_of_diffusers(shift):
    flow = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(1000, shift)
    torch.testing.assert_close(flow.sigmas.double().flip(0), df.Schedule.flow(1000, shift).sigma, rtol=5e-7, atol=0)


# schedule[t].

S = df.Schedule.linear(1000)


def test_t_of_every_kind_gives_the_same(backend):
    x0, noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), df.Noise(1)
    t = torch.tensor([0, 999, 500, 3])
    wanted = torch.cat([df.add_noise(x0[b : b + 1], df.Noise(1, first_sample=b), S[int(t[b])]) for b in range(4)])
    strided = torch.stack((t, t + 1), 1)[:, 0]
    for index in (t, t.int(), strided, strided.int()):
        assert torch.equal(df.add_noise(x0, noise, S[index]), wanted)
    for one in (7, np.int64(7), np.int32(7)):
        assert torch.equal(df.add_noise(x0, noise, S[one]), df.add_noise(x0, noise, S[torch.full((4,), 7)]))
        assert type(S[one].t) is int


@pytest.mark.parametrize("bad, b", [([0, 1, 2, 1000], 3), ([-1, 0, 0, 0], 0), ([0, 2**40, 1000, -1], 1)])
def test_level_out_of_range_in_a_tensor(backend, bad, b):
    x0, t = torch.zeros(4, 3), torch.tensor(bad)
    message = rf"level must be in \[0, 1000\), got {bad[b]} for sample {b} of the batch"
    if backend in GPU_CODE:  # nobody looks at a GPU's levels: the sample is NaN
        outside = [not 0 <= level < 1000 for level in bad]
        for x in (df.add_noise(x0, df.Noise(0), S[t]), df.to_x0(x0, x0, S[t])):
            assert x.isnan().any(1).tolist() == x.isnan().all(1).tolist() == outside
        return
    with pytest.raises(ValueError, match=f"^add_noise: {message}$"):
        df.add_noise(x0, df.Noise(0), S[t])
    with pytest.raises(ValueError, match=f"^to_x0: {message}$"):
        df.to_x0(x0, x0, S[t])
    if max(bad) < 2**31:
        with pytest.raises(ValueError, match=f"^add_noise: {message}$"):
            df.add_noise(x0, df.Noise(0), S[t.int()])
    for column in ("alpha", "sigma"):
        with pytest.raises(ValueError, match=f"^Level.{column}: {message}$"):
            getattr(S[t], column)


@pytest.mark.parametrize("t", [1000, -1])
def test_level_out_of_range_as_an_int(t):
    with pytest.raises(
        ValueError, match=rf"Schedule.linear\(1000, 0.0001, 0.02\): level must be in \[0, 1000\), got {t}"
    ):
        S[t]


@pytest.mark.parametrize(
    "t, error, message",
    [
        (torch.tensor([0.0]), TypeError, "t must be int32 or int64, got torch.float32"),
        (torch.tensor([True]), TypeError, "t must be int32 or int64, got torch.bool"),
        (torch.tensor([1], dtype=torch.uint8), TypeError, "t must be int32 or int64, got torch.uint8"),
        (0.5, TypeError, r"t must be an int or an integer tensor \(B,\), got float"),
        (True, TypeError, r"t must be an int or an integer tensor \(B,\), got bool"),
        ([0, 1], TypeError, r"t must be an int or an integer tensor \(B,\), got list"),
        (None, TypeError, r"t must be an int or an integer tensor \(B,\), got NoneType"),
    ],
)
def test_bad_t(t, error, message):
    with pytest.raises(error, match=message):
        S[t]


def test_t_must_have_one_entry_per_sample(backend):
    with pytest.raises(ValueError, match=r"add_noise: level must have one entry per sample \(4\), got 3"):
        df.add_noise(torch.zeros(4, 2), df.Noise(0), S[torch.zeros(3, dtype=torch.int64)])


def test_a_schedule_is_a_sequence_of_levels():
    assert [level.t for level in df.Schedule.linear(4)] == [0, 1, 2, 3]


def test_schedule_level_attributes():
    t = torch.tensor([3, 999], dtype=torch.int32)
    level = S[t]
    assert level.t is t
    for column in ("alpha", "sigma"):
        values = getattr(level, column)
        assert values.dtype == torch.float32
        assert torch.equal(values, getattr(S, column)[[3, 999]].float())
        assert getattr(S[3], column) == float(getattr(S, column)[3])
    assert repr(S[3]) == "Schedule.linear(1000, 0.0001, 0.02)[3]"
    assert "[tensor([  3, 999]" in repr(level)


# Tables.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_coefficients_are_rounded_once(backend, dtype):
    """alpha*0 + sigma*1 over all levels: sigma, worked out in float64, through fp32 (fp64) to the dtype."""
    table = torch.float64 if dtype == torch.float64 else torch.float32
    x0, level = torch.zeros(1000, 2, dtype=dtype), S[torch.arange(1000)]
    wanted = S.sigma.to(table).to(dtype)[:, None].expand(1000, 2)
    assert torch.equal(df.add_noise(x0, torch.ones_like(x0), level), wanted)
    assert (wanted > 0).all()


def test_tables_are_made_once(backend):
    calls = []

    def counted(alpha, sigma):
        calls.append(alpha)
        return {"x0": alpha, "noise": sigma}

    op = df.LevelOp("add_noise", counted)
    calls.clear()  # of its making
    schedule, other = df.Schedule.linear(10), df.Schedule.linear(10)
    for step in range(5):
        B = 2 + step
        t = torch.arange(B)
        for x in (torch.zeros(B, 3), torch.zeros(B, 3).bfloat16(), torch.zeros(B, 2, 2).half()):
            op(schedule[t], x0=x, noise=df.Noise(step))
            op(schedule[t.int()], x0=x, noise=df.Noise(step))
            op(schedule[step], x0=x, noise=df.Noise(step))
    assert len(calls) == 1
    assert calls[0] is schedule.alpha  # in float64
    op(schedule[0], x0=torch.zeros(2, 3).double(), noise=df.Noise(0))
    assert len(calls) == 2
    op(other[0], x0=torch.zeros(2, 3), noise=df.Noise(0))
    assert len(calls) == 3 and calls[2] is other.alpha


def test_level_is_lazy(monkeypatch):
    """schedule[t] itself computes nothing."""

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr("dae_fast.coefficients.Formula.table", fail)
    level = df.Schedule.linear(10)[torch.tensor([100])]
    assert level.t is not None
    with pytest.raises(AssertionError):
        _ = level.alpha


def test_tables_made_under_inference_mode_serve_training(backend):
    schedule, x = df.Schedule.linear(10), torch.ones(2, 3)
    with torch.inference_mode():
        df.add_noise(x, df.Noise(0), schedule[3])
        df.langevin_step(x, x, 0.01234, df.Noise(0))
        assert schedule[torch.tensor([3])].alpha.shape == (1,)
    x.requires_grad_()
    df.add_noise(x, df.Noise(0), schedule[3]).sum().backward()
    df.langevin_step(x, x, 0.01234, df.Noise(0)).sum().backward()
    (schedule[torch.tensor([3, 3])].alpha[:, None] * x).sum().backward()
    wanted = 2 * schedule.alpha[3].float() + 1.01234
    torch.testing.assert_close(x.grad, wanted.expand(2, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    schedule = df.Schedule.linear(10)
    x, t = torch.ones(3, 2), torch.tensor([0, 5, 9])
    wanted = df.add_noise(x, df.Noise(0), schedule[t])  # and so has a table
    again = copied(schedule)
    assert repr(again) == repr(schedule) and torch.equal(again.alpha, schedule.alpha)
    assert torch.equal(df.add_noise(x, df.Noise(0), again[t]), wanted)
    assert torch.equal(df.add_noise(x, df.Noise(0), copied(schedule[t])), wanted)
    by_hand = df.Level(0.5, torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(df.add_noise(x, df.Noise(0), copied(by_hand)), df.add_noise(x, df.Noise(0), by_hand))
    assert len(pickle.dumps(schedule)) == len(pickle.dumps(df.Schedule.linear(10)))  # tables are not written


# Levels by hand.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "alpha, sigma",
    [
        (0.5, 0.25),
        (1, 2),
        (np.float32(0.3), np.float64(0.7)),
        (np.float16(0.5), np.int64(2)),
        (torch.tensor(0.3), torch.tensor(0.7, dtype=torch.float64)),
        (torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)),
        (0.9, torch.tensor([0.4, 0.5, 0.6])),
        (torch.tensor([0.1, 0.2, 0.3]), torch.tensor(2.0)),
        (torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16), 1.5),
    ],
)
def test_levels_by_hand(backend, alpha, sigma, dtype):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 2, 2, generator=g, dtype=torch.float64).to(dtype)
    level = df.Level(alpha, sigma)
    assert level.t is None
    wide = [
        v.double() if isinstance(v, torch.Tensor) else torch.tensor(float(v), dtype=torch.float64)
        for v in (alpha, sigma)
    ]
    a, s = (v.reshape(-1, 1, 1) for v in wide)
    wanted = a * x0.double() + s * eps.double()
    tolerance = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 2**-8}[dtype]
    got = df.add_noise(x0, eps, level)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


def test_level_attributes():
    sigma = torch.tensor([1.0, 2.0])
    level = df.Level(alpha=np.float32(0.5), sigma=sigma)
    assert level.alpha == 0.5 and type(level.alpha) is float
    assert level.sigma is sigma
    assert repr(df.Level(1, 0.5)) == "Level(alpha=1.0, sigma=0.5)"
    assert repr(df.Level()) == "Level(alpha=1.0, sigma=0.0)"


def test_gradients_reach_alpha_and_sigma(backend):
    g = torch.Generator().manual_seed(0)
    x0, eps, upstream = torch.randn(3, 4, 5, generator=g, dtype=torch.float64)
    alpha = torch.rand(4, generator=g, dtype=torch.float64).requires_grad_()
    sigma = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    df.add_noise(x0, eps, df.Level(alpha, sigma)).backward(upstream)
    torch.testing.assert_close(alpha.grad, (upstream * x0).sum(1))
    torch.testing.assert_close(sigma.grad, (upstream * eps).sum())


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((float("nan"), 1.0), ValueError, "Level: alpha must be finite and not negative, got nan"),
        ((1.0, -0.5), ValueError, "Level: sigma must be finite and not negative, got -0.5"),
        ((1.0, float("inf")), ValueError, "Level: sigma must be finite and not negative, got inf"),
        ((np.float32("nan"), 1.0), ValueError, "Level: alpha must be finite and not negative, got nan"),
        ((torch.tensor([1.0, float("nan")]), 1.0), ValueError, "Level: alpha must be finite .* got nan for sample 1"),
        ((1.0, torch.tensor([-0.5, 1.0])), ValueError, "Level: sigma must be finite .* got -0.5 for sample 0"),
        ((torch.tensor(-1.0), 1.0), ValueError, "Level: alpha must be finite and not negative, got -1.0"),
        (
            (torch.tensor([1]), 1.0),
            ValueError,
            r"Level: alpha must be a float or a floating .* got torch.int64 of \(1,\)",
        ),
        ((True, 1.0), TypeError, "Level: alpha must be a float or a tensor, got bool"),
        ((1.0, "0.5"), TypeError, "Level: sigma must be a float or a tensor, got str"),
        ((1.0, None), TypeError, "Level: sigma must be a float or a tensor, got NoneType"),
        ((1.0, [0.5]), TypeError, "Level: sigma must be a float or a tensor, got list"),
    ],
)
def test_bad_levels(arguments, error, message):
    with pytest.raises(error, match=message):
        df.Level(*arguments)


def test_level_of_the_wrong_length(backend):
    x0 = torch.zeros(4, 2)
    for level in (df.Level(torch.ones(3), 1.0), df.Level(torch.ones(3), torch.ones(4))):
        message = r"add_noise: level.alpha must be a float or have shape \(4,\), one per sample, got \(3,\)"
        with pytest.raises(ValueError, match=message):
            df.add_noise(x0, df.Noise(0), level)


@pytest.mark.gpu
def test_on_a_gpu_a_level_out_of_range_is_nan():
    t = torch.tensor([0, 1000, -1, 999], device="cuda")
    x0, eps = torch.randn(2, 4, 3, device="cuda")
    x_t = df.add_noise(x0, eps, S[t])
    assert x_t.isnan().any(1).tolist() == [False, True, True, False]
    assert S[t].alpha.isnan().tolist() == [False, True, True, False]
    assert S[t].alpha.device.type == "cuda"


def test_a_part_of_a_sample_is_drawn_the_level_of_the_whole() -> None:
    ids = torch.tensor([4, 9, 1])
    for make in (lambda **part: df.Noise(3, sample=ids, **part), lambda **part: df.Noise(3, first_sample=7, **part)):
        for schedule in (df.Schedule.linear(1000), df.ContinuousSchedule.edm()):
            assert torch.equal(schedule.draw(make(first_element=64), 3), schedule.draw(make(), 3))
