"""What a sampler keeps between its steps, what it starts from, and what it tells the network."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch

import dae_fast as df
from dae_fast import samplers

from . import exact

N0 = df.Noise(0)
LINEAR = df.Schedule.linear(1000)
START = 0x7374617274

# Every sampler on a schedule of T levels, with options under which few steps do.
BY_SCHEDULE = {
    "ddpm": samplers.ddpm,
    "ddpm-learned": partial(samplers.ddpm, variance="learned"),
    "ddim": samplers.ddim,
    "ddim-clamp": partial(samplers.ddim, clamp=3.0),
    "euler": samplers.euler,
    "euler_ancestral": samplers.euler_ancestral,
    "heun": samplers.heun,
    "flow_euler": samplers.flow_euler,
    "flow_midpoint": samplers.flow_midpoint,
    "dpm_solver_pp_2m": samplers.dpm_solver_pp_2m,
    "dpm_solver_pp_2m_sde": samplers.dpm_solver_pp_2m_sde,
    "predictor_corrector": samplers.predictor_corrector,
}


def few(name: str, T: int) -> dict[str, int]:
    if name.startswith("ddpm"):
        return {}
    return {"steps": T // 2 if name == "flow_midpoint" else T}


# The state.


class Narrow:
    """Data N(2, 0.1^2): the exact predictions, of x's dtype, in float64 inside."""

    mean, std = 2.0, 0.1

    def __init__(self, schedule: df.Schedule) -> None:
        self.schedule = schedule

    def __call__(self, what: str, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (c[t][:, None] for c in (self.schedule.alpha, self.schedule.sigma))
        away, variance = x.double() - alpha * self.mean, (alpha * self.std) ** 2 + sigma**2
        eps = sigma * away / variance
        x0 = self.mean + alpha * self.std**2 / variance * away
        return {"eps": eps, "flow": eps - x0}[what].to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["flow_euler", "ddim", "heun", "dpm_solver_pp_2m", "euler_ancestral", "ddpm"])
def test_small_steps_are_not_lost_in_half(name, dtype):
    """1000 steps of a state in bf16 ended at means of 1.48 to 1.80: each step was less than half an ulp of x."""
    schedule, what = (df.Schedule.flow(1000), "flow") if name == "flow_euler" else (LINEAR, "eps")
    x = torch.randn(2, 8192, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run(x):
        options = {} if name == "ddpm" else {"steps": 1000}
        return getattr(samplers, name)(partial(Narrow(schedule), what), x, schedule, N0, predict=what, **options)

    got, wide = run(x), run(x.double())
    assert got.dtype == dtype
    # Samples lie at 2, where an ulp of bf16 is 2^-7; 16,384 of them have a standard error of 8e-4.
    assert abs(got.double().mean() - 2) < 0.004 and abs(got.double().std() - 0.1) < 0.005
    assert abs(got.double().mean() - wide.mean()) < 0.003 and abs(got.double().std() - wide.std()) < 0.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_langevin_keeps_its_state(dtype):
    """x' = x - h x of a step below half an ulp: 0.9^20 in 2000 of them."""
    x = torch.full((1, 5), 3.0, dtype=dtype)
    h = 20 * 0.1053605156578263 / 2000
    got = samplers.langevin(lambda x: -x, x, h, 2000, N0, noise_scale=0.0)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), torch.full((1, 5), 3 * (1 - h) ** 2000).double(), rtol=4e-3, atol=0)


@pytest.mark.parametrize("name", BY_SCHEDULE)
def test_the_network_is_handed_its_dtype_and_the_caller_too(name):
    seen = []

    def net(x, t):
        seen.append(x.dtype)
        return (x / 2, 0 * x) if "learned" in name else x / 2

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        got = BY_SCHEDULE[name](
            net, torch.ones(2, 3, dtype=dtype), LINEAR, N0, **({} if "ddpm" in name else few(name, 8))
        )
        assert got.dtype == dtype and set(seen) == {dtype}
        seen.clear()


def test_an_estimate_beyond_half_precision():
    """At a cosine schedule's first level x0_hat = (x - sigma*eps)/alpha is some 1e4 times the prediction's error."""
    x = df.Noise(1).normal((4, 3, 32, 32)).half()
    cosine = df.Schedule.cosine()
    got = samplers.ddim(lambda x, t: 0.1 * x, x, cosine, N0, threshold=0.995)
    wanted = samplers.ddim(lambda x, t: 0.1 * x, x.float(), cosine, N0, threshold=0.995)
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=2e-3)

    def zero_first(x, t):
        return torch.where((t == 999)[:, None, None, None], 0.0, x)

    got = samplers.dpm_solver_pp_2m(zero_first, x, cosine, N0)
    wanted = samplers.dpm_solver_pp_2m(zero_first, x.float(), cosine, N0)
    assert wanted.abs().max() > 3000
    torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "run",
    [
        lambda keep: samplers.langevin(keep, torch.full((1, 1), 5.0), 0.1, 4, N0, noise_scale=0.0),
        lambda keep: samplers.annealed_langevin(
            lambda x, t: keep(x),
            torch.full((1, 1), 5.0),
            df.Schedule.geometric(2, 0.1, 1.0),
            N0,
            step_size=1e-2,
            steps_per_level=2,
            denoise=False,
        ),
        lambda keep: samplers.predictor_corrector(
            lambda x, t: keep(x), torch.full((1, 1), 5.0), df.Schedule.linear(3), N0, corrector_steps=2
        ),
    ],
    ids=["langevin", "annealed_langevin", "predictor_corrector"],
)
def test_what_was_handed_out_stays(run):
    kept, copies = [], []

    def keep(x):
        kept.append(x)
        copies.append(x.clone())
        return -x

    run(keep)
    assert len(kept) >= 4 and all(torch.equal(k, c) for k, c in zip(kept, copies, strict=True))


def test_langevin_hands_out_its_chain():
    kept = []

    def score(x):
        kept.append(x)
        return -x

    samplers.langevin(score, torch.full((1, 1), 5.0), 0.1, 4, N0, noise_scale=0.0)
    torch.testing.assert_close(torch.cat(kept).flatten(), torch.tensor([5.0, 4.5, 4.05, 3.645]))


def test_coefficients_that_overflow_are_refused():
    """In float64 they fit."""
    schedule = df.Schedule(torch.tensor([1.0, 1e-40], dtype=torch.float64), torch.tensor([0.5, 1.0]))
    for dtype, fits in ((torch.float32, False), (torch.bfloat16, False), (torch.float64, True)):
        call = partial(samplers.ddim, lambda x, t: x, torch.zeros(2, 3, dtype=dtype), schedule, N0, steps=2)
        if fits:
            assert call().isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"ddim: a coefficient of 1e\+40 overflows torch.float32"):
                call()


# The start.


def first_of(name, schedule, T, noise=N0, shape=(2, 3)):
    """What the network sees first."""
    seen = []

    def net(x, t):
        seen.append(x.clone())
        return (x / 2, 0 * x) if "learned" in name else x / 2

    BY_SCHEDULE[name](net, shape, schedule, noise, predict="x0", **few(name, T))
    return seen[0]


@pytest.mark.parametrize("name", BY_SCHEDULE)
def test_one_key_one_start(name):
    """However many levels there are, and whatever the sampler."""
    z = N0.fold_in(START).normal((2, 3))
    for T in (18, 36):
        torch.testing.assert_close(first_of(name, df.Schedule.karras(T=T), T), 80 * z)
        assert torch.equal(first_of(name, df.Schedule.cosine(T), T), z)
    continuous = samplers.probability_flow(
        lambda x, t: torch.zeros_like(x), (2, 3), df.ContinuousSchedule.edm(), N0, steps=3, denoise=False, predict="eps"
    )
    torch.testing.assert_close(continuous, 80 * z)


@pytest.mark.parametrize("name", BY_SCHEDULE)
def test_a_start_of_another_law_is_warned_of(name):
    with pytest.warns(UserWarning, match=r"of pure noise is not the law .* alpha = 0.603 .* zero_terminal_snr\(\)"):
        first_of(name, df.Schedule.linear(100), 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for schedule in (
            df.Schedule.scaled_linear(),
            df.Schedule.linear(),
            df.Schedule.linear(100).zero_terminal_snr(),
        ):
            if (len(schedule) == 1000 and "ddpm" not in name) or name == "ddim":  # heun has no step from alpha = 0
                first_of(name, schedule, 10)
        first_of(name, df.Schedule.karras(), 18)
        BY_SCHEDULE["ddim"](
            lambda x, t: x, torch.zeros(2, 3), df.Schedule.linear(100), N0, steps=5
        )  # a tensor is theirs


# What the network is told.


@pytest.mark.parametrize("name", [*BY_SCHEDULE, "annealed_langevin"])
def test_a_network_trained_on_times_is_told_times(name):
    continuous = df.ContinuousSchedule.ve(0.1, 10.0) if name == "annealed_langevin" else df.ContinuousSchedule.flow()
    grid = continuous.discretise(times=[0.2, 0.4, 0.6, 0.8, 0.9, 0.95])
    T = len(grid)
    told = []

    def net(x, t):
        told.append(t)
        return (x / 2, 0 * x) if "learned" in name else x / 2

    def run(**options):
        told.clear()
        x = torch.ones(2, 3)
        if name == "annealed_langevin":
            samplers.annealed_langevin(net, x, grid, N0, steps_per_level=1, denoise=False, **options)
        else:
            BY_SCHEDULE[name](net, x, grid, N0, predict="x0", **few(name, T), **options)
        assert all(t.shape == (2,) and (t == t[0]).all() for t in told)
        return [t[0] for t in told]

    times = run()
    assert all(t.dtype == torch.float32 for t in told)
    looks = list(dict.fromkeys(float(t) for t in times))  # heun and a corrector look twice
    assert looks == pytest.approx([0.95, 0.9, 0.8, 0.6, 0.4, 0.2])
    assert [float(t) for t in run(conditioning="time")] == [float(t) for t in times]
    assert list(dict.fromkeys(int(t) for t in run(conditioning="level"))) == [5, 4, 3, 2, 1, 0]
    assert all(t.dtype == torch.int64 for t in told)


def test_times_are_of_the_dtype_of_the_arithmetic():
    grid, told = df.ContinuousSchedule.flow().discretise(4), []
    for dtype, wanted in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
    ):
        samplers.flow_euler(lambda x, t: told.append(t) or x, torch.ones(2, 3, dtype=dtype), grid, N0, steps=4)
        assert {t.dtype for t in told} == {wanted}
        told.clear()


def test_a_trained_flow_in_continuous_time_samples_its_data():
    """The exact velocity, a function of the time that training draws."""
    law, schedule = exact.Gaussian([2.0], [0.1]), df.ContinuousSchedule.flow()

    def velocity(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return law.flow(x, alpha[:, None], sigma[:, None]).to(x.dtype)

    x = samplers.flow_euler(velocity, (64, 64, 1), schedule.discretise(200), N0, steps=200)
    assert abs(x.double().mean() - 2) < 5 * 0.1 / math.sqrt(x.numel()) and abs(x.double().std() - 0.1) < 0.005


def test_the_loss_tells_what_the_samplers_tell():
    grid, told = df.ContinuousSchedule.flow().discretise(5), []
    t = torch.tensor([0, 1, 4])

    def net(x, t):
        told.append(t)
        return x

    df.nn.DenoisingLoss(grid, "flow")(net, torch.ones(3, 2), N0, t)
    assert torch.equal(told[0], grid.times[t].float())
    df.nn.DenoisingLoss(df.Schedule.flow(5), "flow")(net, torch.ones(3, 2), N0, t)
    assert torch.equal(told[1], t)
    compiled = torch.compile(
        lambda t: df.nn.DenoisingLoss(grid, "flow")(lambda x, t: x * t[:, None], torch.ones(3, 2), N0, t)["loss"],
        backend="eager",
        fullgraph=True,
    )
    wanted = df.nn.DenoisingLoss(grid, "flow")(lambda x, t: x * t[:, None], torch.ones(3, 2), N0, t)["loss"]
    torch.testing.assert_close(compiled(t), wanted)
