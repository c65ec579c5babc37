"""Weights by level: against formulas written independently, the same loss in every parameterisation, limits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

import dae_fast as df
from dae_fast import weighting
from dae_fast.ops.parameterisation import MIXES

from .cpu_backends import cpu_backends
from .test_compile import Recorder

T = 50
SCHEDULE = df.Schedule.linear(T, 1e-3, 0.2)
EXPLODING = df.Schedule.geometric(T, 0.05, 20.0)
ZERO_TERMINAL = SCHEDULE.zero_terminal_snr()
CLEAN_FIRST = df.Schedule.from_betas([0.0, 0.1, 0.2])
EVERY = (*MIXES, df.EDM(0.5), df.EDM(1.0))
ALL = (*weighting.NAMES.values(), weighting.MinSNR(1.0), weighting.P2(2.0, 0.5), weighting.EDM(1.3))


def weights(weight, level, B, predict="eps", dtype=torch.float64):
    """(B,): a prediction that is off by 1 everywhere loses its weight."""
    x0, eps = torch.randn(2, B, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    _, target = df.add_noise(x0, eps, level, target=predict)
    return df.denoising_loss(
        target + 1, x0, eps, level, predict=predict, weight=weight, reduction="none", mask=torch.ones(B, 4).bool()
    )


def of_schedule(weight, schedule, predict="eps"):
    """(T,), at every level."""
    return weights(weight, schedule[torch.arange(len(schedule))], len(schedule), predict)


# As training scripts write them.


def compute_snr(schedule):
    """The training scripts of diffusers."""
    alphas_cumprod = schedule.alpha.square()
    sqrt_alphas_cumprod = alphas_cumprod**0.5
    sqrt_one_minus_alphas_cumprod = (1.0 - alphas_cumprod) ** 0.5
    return (sqrt_alphas_cumprod / sqrt_one_minus_alphas_cumprod) ** 2


def min_snr(schedule, prediction_type, gamma):
    snr = compute_snr(schedule)
    base_weight = torch.stack([snr, gamma * torch.ones(T)], dim=1).min(dim=1)[0]
    if prediction_type == "v":
        return base_weight / (snr + 1)
    return base_weight / snr if prediction_type == "eps" else base_weight


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("predict", ["eps", "v", "x0"])
def test_min_snr_is_that_of_the_training_scripts(predict, gamma):
    got = of_schedule(weighting.MinSNR(gamma), SCHEDULE, predict)
    torch.testing.assert_close(got, min_snr(SCHEDULE, predict, gamma), rtol=1e-9, atol=0)
    if gamma == 5:
        assert torch.equal(of_schedule("min_snr", SCHEDULE, predict), got)


def test_truncated_snr():
    """max(SNR, 1) on x0, and SNR + 1 too many on v (Salimans and Ho 2022)."""
    snr = compute_snr(SCHEDULE)
    torch.testing.assert_close(of_schedule("truncated_snr", SCHEDULE, "x0"), snr.clamp(min=1), rtol=1e-9, atol=0)
    got = of_schedule("truncated_snr", SCHEDULE, "v")
    torch.testing.assert_close(got, snr.clamp(min=1) / (1 + snr), rtol=1e-9, atol=0)


def test_snr_is_the_plain_loss_on_eps():
    torch.testing.assert_close(of_schedule("snr", SCHEDULE, "eps"), torch.ones(T).double())
    torch.testing.assert_close(of_schedule("snr", SCHEDULE, "x0"), compute_snr(SCHEDULE), rtol=1e-9, atol=0)


@pytest.mark.parametrize("k, gamma", [(1.0, 1.0), (1.0, 0.5), (2.0, 3.0)])
def test_p2_is_that_of_its_authors(k, gamma):
    """Their code multiplies the loss on eps by 1 / (p2_k + snr) ** p2_gamma."""
    snr = 1.0 / (1 - SCHEDULE.alpha_bar) - 1
    got = of_schedule(weighting.P2(k, gamma), SCHEDULE, "eps")
    torch.testing.assert_close(got, 1 / (k + snr) ** gamma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_is_that_of_the_paper(sigma_data):
    sigma = EXPLODING.sigma
    weight = weighting.EDM(sigma_data)
    on_d = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    torch.testing.assert_close(of_schedule(weight, EXPLODING, "x0"), on_d, rtol=1e-9, atol=0)
    got = of_schedule(weight, EXPLODING, df.EDM(sigma_data))
    torch.testing.assert_close(got, torch.ones(T).double(), rtol=1e-12, atol=0)


def test_those_of_stable_diffusion_3():
    """diffusers' compute_loss_weighting_for_sd3, on the flow."""
    sigmas = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    level = df.Level(1 - sigmas, sigmas)
    bot = 1 - 2 * sigmas + 2 * sigmas**2
    torch.testing.assert_close(weights("cosmap", level, 19, "flow"), 2 / (torch.pi * bot), rtol=1e-9, atol=0)
    torch.testing.assert_close(weights("inverse_variance", level, 19, "flow"), sigmas**-2.0, rtol=1e-9, atol=0)


def test_soft_min_snr_is_that_of_k_diffusion():
    """On F: (sigma sigma_data)^2 / (sigma^2 + sigma_data^2)^2; and as the paper has it, 1/(sigma^2 + 1/gamma) on x0."""
    sigma, sigma_data = EXPLODING.sigma, 0.5
    got = of_schedule("soft_min_snr", EXPLODING, df.EDM(sigma_data))
    wanted = (sigma * sigma_data) ** 2 / (sigma**2 + sigma_data**2) ** 2
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)
    got = of_schedule(weighting.SoftMinSNR(3.0), EXPLODING, "x0")
    torch.testing.assert_close(got, 1 / (sigma**2 + 1 / 3), rtol=1e-9, atol=0)


def test_likelihood_is_the_variance_that_a_step_adds():
    """On the score: beta_t of a VP chain, sigma_t^2 - sigma_{t-1}^2 of a VE one, from the data on."""
    torch.testing.assert_close(of_schedule("likelihood", SCHEDULE, "score"), SCHEDULE.betas, rtol=1e-9, atol=0)
    added = torch.diff(EXPLODING.sigma.square(), prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(of_schedule("likelihood", EXPLODING, "score"), added, rtol=1e-9, atol=0)


def test_likelihood_of_many_levels_is_that_of_continuous_time():
    """g(t)^2 dt on the score, to the first order in beta dt < 0.005; diffusion(t) knows nothing of levels."""
    continuous = df.ContinuousSchedule.vp()
    schedule, chosen = continuous.discretise(4000), torch.arange(399, 4000, 400)
    t = schedule.times[chosen]
    on_score = weighting.OnError("score", continuous.diffusion(t).square())
    for predict in ("score", "v"):
        steps = weights("likelihood", schedule[chosen], 10, predict) * 4000
        torch.testing.assert_close(steps, weights(on_score, continuous[t], 10, predict), rtol=5e-3, atol=0)


# One loss, whatever is predicted.


@cpu_backends
@pytest.mark.parametrize("weight", ALL, ids=str)
@pytest.mark.parametrize("schedule", [SCHEDULE, EXPLODING, df.Schedule.flow(10)], ids=str)
def test_the_loss_does_not_depend_on_the_parameterisation(backend, schedule, weight):
    """Predictions of one denoiser. The last level of a flow is pure noise, from which eps and score give no x0."""
    B = len(schedule)
    g = torch.Generator().manual_seed(0)
    x0, eps, estimate = torch.randn(3, B, 4, generator=g, dtype=torch.float64)
    level = schedule[torch.arange(B)]
    x_t = df.add_noise(x0, eps, level)
    ends, losses = schedule.alpha[-1] == 0, []
    for predict in EVERY:
        if not (ends and predict in ("eps", "score")):
            pred = df.convert(x_t, estimate, level, predict="x0", to=predict)
            losses.append(df.denoising_loss(pred, x0, eps, level, predict=predict, weight=weight))
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(len(losses)), rtol=1e-8, atol=0)


def test_uniform_is_no_weight():
    x = torch.randn(2, 3)
    for weight in (None, "uniform"):
        got = df.denoising_loss(x, x, df.Noise(0), df.Level(0.6, 0.8), predict="v", weight=weight)
        assert torch.equal(got, df.denoising_loss(x, x, df.Noise(0), df.Level(0.6, 0.8), predict="v"))


# The ends.

ENDS = {
    # weight: of (eps, x0, v) at alpha = 0, then at sigma = 0; None: infinite
    weighting.SNR(): ((1, 0, 0), (1, None, 1)),
    weighting.TruncatedSNR(): ((None, 1, 1), (1, None, 1)),
    weighting.MinSNR(5.0): ((1, 0, 0), (0, 5, 0)),
    weighting.SoftMinSNR(4.0): ((1, 0, 0), (0, 4, 0)),
    weighting.P2(2.0, 1.0): ((0.5, 0, 0), (0, 1, 0)),
    weighting.P2(1.0, 2.0): ((1, 0, 0), (0, 0, 0)),
    weighting.P2(1.0, 0.5): ((1, 0, 0), (0, None, 0)),
    weighting.EDM(0.5): ((None, 4, 4), (1, None, 1)),
    weighting.CosMap(): ((None, 2 / torch.pi, 2 / torch.pi), (2 / torch.pi, None, 2 / torch.pi)),
    weighting.InverseVariance(): ((None, 1, 1), (None, None, None)),
}


@cpu_backends
@pytest.mark.parametrize("weight", ENDS, ids=str)
@pytest.mark.parametrize("end", [0, 1], ids=["pure noise", "no noise"])
def test_finite_where_the_product_is(backend, weight, end):
    schedule, t = ((ZERO_TERMINAL, T - 1), (CLEAN_FIRST, 0))[end]
    x0, eps = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = schedule[torch.tensor([t, t])], schedule[t], df.Level(float(end), 1.0 - end)
    levels = (*levels, df.Level(torch.full((2,), float(end)), torch.full((2,), 1.0 - end)))
    targets = {"eps": eps, "x0": x0, "v": (-x0, eps)[end]}
    for (predict, target), wanted in zip(targets.items(), ENDS[weight][end], strict=True):
        for level in levels:
            loss = partial(df.denoising_loss, target + 1, x0, eps, level, predict=predict, reduction="none")
            if wanted is None:
                with pytest.raises(ValueError, match="denoising_loss: has no finite value at"):
                    loss(weight=weight)
            else:
                torch.testing.assert_close(loss(weight=weight), torch.full((2,), float(wanted), dtype=torch.float64))


@pytest.mark.parametrize("predict", ["eps", "x0", "v", "flow", df.EDM(0.5)], ids=str)
def test_likelihood_at_zero_terminal_snr(predict):
    """The last step adds all the noise there is: g^2 / sigma^2 = 1 on eps."""
    level = ZERO_TERMINAL[torch.tensor([T - 1])]
    ratio = {"eps": 1.0}.get(predict, 0.0)  # x_t says all about eps, so whatever is predicted eps has no error
    torch.testing.assert_close(weights("likelihood", level, 1, predict), torch.tensor([ratio]).double())


def test_likelihood_between_two_levels_of_pure_noise_is_refused():
    """What the step adds is not to be seen there."""
    schedule = df.Schedule.from_betas([0.1, 1.0, 0.5])
    with pytest.raises(ValueError, match=r"denoising_loss: has no finite value at level 2 of .*, alpha = 0.0"):
        weights("likelihood", schedule[0], 2)


# Levels of every kind.


@cpu_backends
@pytest.mark.parametrize("weight", [w for w in ALL if not isinstance(w, weighting.Likelihood)], ids=str)
@pytest.mark.parametrize("predict", ["x0", "v", df.EDM(0.5)], ids=str)
def test_levels_by_hand(backend, weight, predict):
    t = torch.tensor([0, 7, 30, 49])
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    wanted = weights(weight, SCHEDULE[t], 4, predict)
    torch.testing.assert_close(weights(weight, df.Level(alpha, sigma), 4, predict), wanted, rtol=1e-12, atol=0)
    one = weights(weight, df.Level(float(alpha[1]), float(sigma[1])), 4, predict)
    torch.testing.assert_close(one, wanted[1].expand(4), rtol=1e-12, atol=0)
    mixed = weights(weight, df.Level(1.0, sigma), 4, predict)
    torch.testing.assert_close(mixed, weights(weight, df.Level(torch.ones(()), sigma), 4, predict), rtol=1e-12, atol=0)
    torch.testing.assert_close(weights(weight, SCHEDULE[7], 4, predict), wanted[1].expand(4), rtol=1e-12, atol=0)


def test_continuous_levels():
    schedule = df.ContinuousSchedule.edm()
    sigma = torch.tensor([0.01, 1.0, 60.0], dtype=torch.float64)
    got = weights("edm", schedule[sigma], 3, "x0")
    torch.testing.assert_close(got, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    cosine = df.ContinuousSchedule.cosine()
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    snr = torch.tan(torch.pi / 2 * t) ** -2
    torch.testing.assert_close(
        weights("min_snr", cosine[t], 3, "v"), snr.clamp(max=5) / (snr + 1), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_worked_out_in_float64_and_rounded_once(dtype):
    """To float32, whatever the samples; a prediction of 1 against 0 has the weight as its loss."""
    zero, one, t = torch.zeros(T, 4, dtype=dtype), torch.ones(T, 4, dtype=dtype), torch.arange(T)
    got = df.denoising_loss(one, zero, zero, SCHEDULE[t], predict="v", weight="min_snr", reduction="none")
    assert got.dtype == torch.float32
    assert (
        torch.equal(got, min_snr(SCHEDULE, "v", 5.0).float())
        or (got.double() / min_snr(SCHEDULE, "v", 5.0) - 1).abs().max() < 2**-23
    )


# What a caller brings.


@cpu_backends
def test_functions_of_the_level(backend):
    t = torch.tensor([0, 20, 49])
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    seen = []

    def weight(a: Tensor, s: Tensor) -> Tensor:
        seen.append((a, s))
        return a / (1 + s)

    torch.testing.assert_close(weights(weight, SCHEDULE[t], 3), alpha / (1 + sigma), rtol=1e-12, atol=0)
    assert all(torch.equal(got, want) for got, want in zip(seen[0], (alpha, sigma), strict=True))
    torch.testing.assert_close(weights(lambda a, s: 2, SCHEDULE[t], 3), torch.full((3,), 2.0).double())
    hand = df.Level(1.0, 0.5)
    torch.testing.assert_close(weights(weight, hand, 3), torch.full((3,), 1 / 1.5).double())
    with pytest.raises(
        ValueError, match=r"denoising_loss: weight\(alpha, sigma\) must be a number or \(B,\).*\(3, 2\)"
    ):
        weights(lambda a, s: torch.stack((a, s), 1), SCHEDULE[t], 3)


def test_on_an_error_of_ones_choice():
    t = torch.tensor([0, 20, 49])
    snr = SCHEDULE.snr[t]
    on_x0 = weighting.OnError("x0", lambda alpha, sigma: (alpha / sigma) ** 2 / (1 + (alpha / sigma) ** 2))
    torch.testing.assert_close(weights(on_x0, SCHEDULE[t], 3, "v"), snr / (1 + snr) ** 2, rtol=1e-9, atol=0)
    given = torch.tensor([1.0, 2.0, 3.0])
    got = weights(weighting.OnError("x0", given), SCHEDULE[t], 3, "eps")
    torch.testing.assert_close(got, given / snr, rtol=1e-9, atol=0)
    got = weights(weighting.OnError(df.EDM(0.5), given), SCHEDULE[t], 3, df.EDM(0.5))
    torch.testing.assert_close(got, given.double())


@dataclass(frozen=True)
class Sigmoid(weighting.Weighting):
    """sigmoid(bias - logSNR) on eps (Hoogeboom et al. 2024): one of a caller's own."""

    bias: float = 2.0

    def __call__(self, eps_error: Tensor, x0_error: Tensor) -> Tensor:
        return eps_error / (1 + eps_error / x0_error * torch.e**-self.bias)


def test_a_weighting_of_ones_own():
    torch.testing.assert_close(
        of_schedule(Sigmoid(1.0), SCHEDULE), torch.sigmoid(1.0 - SCHEDULE.snr.log()), rtol=1e-9, atol=0
    )


def test_constants_have_no_gradient():
    sigma = torch.tensor([0.5, 1.0], requires_grad=True)
    x, pred = torch.randn(2, 2, 3)
    for weight in ("min_snr", lambda alpha, sigma: 1 / sigma, weighting.OnError("x0", lambda alpha, sigma: sigma)):
        loss = df.denoising_loss(pred, x, df.Noise(0), df.Level(1.0, sigma), weight=weight)
        assert not loss.requires_grad
    loss = df.denoising_loss(pred, x, df.Noise(0), df.Level(1.0, sigma), predict="v", weight="min_snr")
    (got,) = torch.autograd.grad(loss, sigma)  # that of the target alone
    weight = weights("min_snr", df.Level(1.0, sigma.detach()), 2, "v").float()
    same = df.denoising_loss(pred, x, df.Noise(0), df.Level(1.0, sigma), predict="v", weight=weight)
    torch.testing.assert_close(got, torch.autograd.grad(same, sigma)[0])


def test_tables_are_made_once_and_for_no_function():
    schedule, x = df.Schedule.linear(20), torch.randn(3, 4)
    level = schedule[torch.tensor([1, 5, 9])]

    def tables(weight):
        df.denoising_loss(x, x, df.Noise(0), level, weight=weight)
        return len(schedule._tables)

    first = tables("min_snr")
    assert tables(weighting.MinSNR(5.0)) == first  # the same weighting
    assert tables(weighting.MinSNR(4.0)) == first + 1
    count = tables(lambda alpha, sigma: alpha)
    for k in range(5):
        assert tables(lambda alpha, sigma, k=k: alpha + k) == count


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    INSIDE = (
        lambda: "min_snr",
        lambda: "likelihood",
        lambda: weighting.MinSNR(3.0),
        lambda: weighting.P2(2.0, 0.5),
        lambda: weighting.OnError("x0", lambda alpha, sigma: alpha),
        lambda: lambda alpha, sigma: alpha / sigma,
    )

    @pytest.mark.parametrize("make", INSIDE, ids=range(len(INSIDE)))
    @pytest.mark.parametrize("predict", ["v", df.EDM(0.5)], ids=str)
    def test_inside(self, predict, make):
        def f(pred, x0, t):
            return df.denoising_loss(pred, x0, df.Noise(3), SCHEDULE[t], predict=predict, weight=make())

        pred, x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
        recorder, t = Recorder(), torch.tensor([0, 20, 49])
        compiled = recorder.compile(f)
        for shift in (0, -1):
            torch.testing.assert_close(compiled(pred, x0, (t + shift) % T), f(pred, x0, (t + shift) % T))
        assert recorder.compilations == 1

    def test_as_an_argument_and_at_levels_by_hand(self):
        def f(pred, x0, level, weight):
            return df.denoising_loss(pred, x0, df.Noise(3), level, predict="v", weight=weight)

        pred, x0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
        compiled = Recorder().compile(f)
        for level in (SCHEDULE[torch.tensor([0, 20, 49])], df.Level(0.6, 0.8), df.Level(torch.rand(3), torch.rand(3))):
            for weight in (weighting.MinSNR(3.0), weighting.SoftMinSNR()):
                torch.testing.assert_close(compiled(pred, x0, level, weight), f(pred, x0, level, weight))


X, EPS = torch.zeros(3, 4), torch.zeros(3, 4)


def bad(weight, level=SCHEDULE[torch.tensor([1, 2, 3])]):  # noqa: B008
    return lambda: df.denoising_loss(X, X, EPS, level, weight=weight)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (bad("minsnr"), ValueError, "denoising_loss: weight must be one of 'uniform', 'snr', .* got 'minsnr'"),
        (bad(2.0), TypeError, r"denoising_loss: weight must be a name, a weighting, .* or a tensor \(B,\), got float"),
        (bad(torch.ones(2)), ValueError, r"denoising_loss: weight must be a float or have shape \(3,\).*got \(2,\)"),
        (bad("snr", None), ValueError, "denoising_loss: level must be given, of which this weight is a function"),
        (
            bad("likelihood", df.Level(0.6, 0.8)),
            ValueError,
            r"denoising_loss: the likelihood's weight is that of a step .* level=schedule\[t\]; .*OnError\('score'",
        ),
        (
            bad(weighting.OnError("x0", torch.ones(2))),
            ValueError,
            r"denoising_loss: weight must be .*\(3,\).*got \(2,\)",
        ),
        (lambda: weighting.OnError("epsilon", X), ValueError, "OnError: of must be one of 'eps', .* got 'epsilon'"),
        (lambda: weighting.MinSNR(0.0), ValueError, "MinSNR: gamma must be positive, got 0.0"),
        (lambda: weighting.P2(k=-1.0), ValueError, "P2: k must be positive, got -1.0"),
        (lambda: weighting.EDM("a"), TypeError, "EDM: sigma_data must be a number, got str"),
        (lambda: weighting.SoftMinSNR(float("nan")), ValueError, "SoftMinSNR: gamma must be finite, got nan"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
