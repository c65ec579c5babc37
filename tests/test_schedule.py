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


def close(values, wanted, relative=1e-12):
    """cumprod rounds T times, each by 1.1e-16; the root of 1 - alpha_bar loses digits near 0."""
    wanted = torch.tensor([float(w) for w in wanted], dtype=torch.float64)
    assert values.dtype == torch.float64 and values.device.type == "cpu"
    torch.testing.assert_close(values, wanted, rtol=relative, atol=0)


@pytest.mark.parametrize("T", [2, 50, 1000])
@pytest.mark.parametrize("name, formula", [("linear", linear), ("scaled_linear", scaled_linear), ("cosine", cosine)])
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
    schedule = df.Schedule.geometric(low, high, T)
    low_, high_ = mp.mpf(low), mp.mpf(high)
    close(schedule.sigma, [low_ * (high_ / low_) ** (mp.mpf(t) / max(T - 1, 1)) for t in range(T)], 1e-13)
    assert (schedule.alpha == 1).all()
    assert schedule.variance_preserving is False
    with pytest.raises(ValueError, match="betas: defined for variance-preserving schedules only"):
        _ = schedule.betas


def test_from_betas_and_from_alpha_bar():
    betas = np.random.default_rng(0).uniform(0, 0.5, 7)
    for given in (betas, betas.tolist(), torch.tensor(betas)):
        schedule = df.Schedule.from_betas(given)
        close(schedule.alpha_bar, np.cumprod(1 - betas))
        close(schedule.betas, betas, 1e-11)
    again = df.Schedule.from_alpha_bar(schedule.alpha_bar)
    assert torch.equal(again.alpha, schedule.alpha) and torch.equal(again.sigma, schedule.sigma)
    close(df.Schedule.from_betas(torch.tensor([0.5, 0.25], dtype=torch.float32)).alpha_bar, [0.5, 0.375])


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
        (lambda: df.Schedule.geometric(0.0, 1.0), "needs 0 < sigma_min <= sigma_max"),
        (lambda: df.Schedule.geometric(2.0, 1.0), "needs 0 < sigma_min <= sigma_max"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
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
        (CLEAN_FIRST, df.to_x0, "score", AT_0),
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
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"t must have shape \(B,\), got \(2, 2\)"),
        (torch.tensor(3), ValueError, r"t must have shape \(B,\), got \(\)"),
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


def test_tables_are_made_once(monkeypatch, backend):
    calls = []

    def counted(alpha, sigma):
        calls.append(alpha)
        return alpha, sigma

    monkeypatch.setattr("dae_fast.ops.noising._noising", counted)
    schedule, other = df.Schedule.linear(10), df.Schedule.linear(10)
    for step in range(5):
        B = 2 + step
        t = torch.arange(B)
        for x in (torch.zeros(B, 3), torch.zeros(B, 3).bfloat16(), torch.zeros(B, 2, 2).half()):
            df.add_noise(x, df.Noise(step), schedule[t])
            df.add_noise(x, df.Noise(step), schedule[t.int()])
            df.add_noise(x, df.Noise(step), schedule[step])
    assert len(calls) == 1
    assert calls[0] is schedule.alpha  # in float64
    df.add_noise(torch.zeros(2, 3).double(), df.Noise(0), schedule[0])
    assert len(calls) == 2
    df.add_noise(torch.zeros(2, 3), df.Noise(0), other[0])
    assert len(calls) == 3 and calls[2] is other.alpha


def test_level_is_lazy(monkeypatch):
    """schedule[t] itself computes nothing."""

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr("dae_fast.schedule.table_of", fail)
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
        ((torch.ones(2, 2), 1.0), ValueError, r"Level: alpha must be .* got torch.float32 of \(2, 2\)"),
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
    for level in (df.Level(torch.ones(3), 1.0), df.Level(torch.ones(3), torch.ones(4)), df.Level(torch.ones(1), 1.0)):
        message = r"add_noise: level.alpha must be a float or have shape \(4,\), one per sample, got \([13],\)"
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
