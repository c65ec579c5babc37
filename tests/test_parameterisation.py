"""EDM's F beside the named parameterisations: its definition, every conversion, limits, compile."""

from __future__ import annotations

import itertools

import pytest
import torch

import dae_fast as df
from dae_fast.ops.parameterisation import MIXES

from .cpu_backends import cpu_backends
from .test_compile import Recorder

EVERY = (*MIXES, df.EDM(0.5), df.EDM(1.0))
# (alpha, sigma) of variance-preserving, variance-exploding and flow levels.
PAIRS = torch.tensor(
    [[0.6, 0.8], [0.999, (1 - 0.999**2) ** 0.5], [1.0, 0.002], [1.0, 80.0], [0.3, 0.7]], dtype=torch.float64
)
ALPHA, SIGMA = PAIRS.unbind(1)
LEVEL = df.Level(ALPHA, SIGMA)
SCHEDULE = df.Schedule.linear(20)


def made(shape=(5, 2, 3)):
    x0, eps = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = ALPHA[:, None, None], SIGMA[:, None, None]
    x_t = alpha * x0 + sigma * eps
    predictions = {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "flow": eps - x0,
        **{df.EDM(s): edm_target(x0, x_t, alpha, sigma, s) for s in (0.5, 1.0)},
    }
    return x0, eps, x_t, predictions


def edm_target(x0, x_t, alpha, sigma, s):
    """Karras et al. 2022, table 1, of x_t / alpha with noise sigma / alpha: D = c_skip * x + c_out * F."""
    x, noise = x_t / alpha, sigma / alpha
    c_skip = s**2 / (noise**2 + s**2)
    c_out = noise * s / (s**2 + noise**2).sqrt()
    return (x0 - c_skip * x) / c_out


def test_f_is_the_papers():
    """Its cancellation at sigma = 0.002 leaves 1e-11."""
    x0, eps, _, predictions = made()
    for s in (0.5, 1.0):
        p0, p1 = df.EDM(s).mix(ALPHA[:, None, None], SIGMA[:, None, None])
        torch.testing.assert_close(p0 * x0 + p1 * eps, predictions[df.EDM(s)], rtol=1e-10, atol=1e-10)


def test_preconditioning_is_the_papers():
    s, noise = 0.5, SIGMA / ALPHA
    c_skip, c_out, c_in, c_noise = df.EDM(s).preconditioning(ALPHA, SIGMA)
    torch.testing.assert_close(c_skip * ALPHA, s**2 / (noise**2 + s**2))
    torch.testing.assert_close(c_out, noise * s / (s**2 + noise**2).sqrt())
    torch.testing.assert_close(c_in * ALPHA, 1 / (noise**2 + s**2).sqrt())
    torch.testing.assert_close(c_noise, noise.log() / 4)
    for k, value in enumerate(df.EDM(s).preconditioning(0.6, 0.8)):
        assert value == pytest.approx(float((c_skip, c_out, c_in, c_noise)[k][0]), rel=1e-12)


def test_f_of_unit_data_is_minus_v():
    """Variance preserving, at every level: c_skip = alpha, c_out = sigma."""
    schedule = df.Schedule.linear(1000).zero_terminal_snr()
    x_t, v = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    level = schedule[torch.arange(1000)]
    F = df.convert(x_t, v, level, predict="v", to=df.EDM(1.0))
    torch.testing.assert_close(F, -v, rtol=1e-12, atol=1e-12)


@cpu_backends
@pytest.mark.parametrize("predict, to", list(itertools.product(EVERY, EVERY)), ids=str)
def test_every_pair_converts(backend, predict, to):
    """x0 and eps lie a factor of sigma = 80 or 0.002 apart."""
    _, _, x_t, predictions = made()
    got = df.convert(x_t, predictions[predict], LEVEL, predict=predict, to=to)
    torch.testing.assert_close(got, predictions[to], rtol=1e-7, atol=1e-8)
    named = {"x0": df.to_x0, "eps": df.to_eps, "score": df.to_score, "v": df.to_v}
    if to in named:
        assert torch.equal(got, named[to](x_t, predictions[predict], LEVEL, predict=predict))


@cpu_backends
@pytest.mark.parametrize("to", ["x0", "eps", "score", df.EDM(1.0)], ids=str)
def test_clamped(backend, to):
    """By the x0 estimate, limited."""
    _, _, x_t, predictions = made()
    level, predict = df.Level(0.6, 0.8), df.EDM(0.5)
    estimate = df.to_x0(x_t, predictions[predict], level, predict=predict).clamp(-0.5, 0.5)
    wanted = df.convert(x_t, estimate, level, predict="x0", to=to)
    got = df.convert(x_t, predictions[predict], level, predict=predict, to=to, clamp=0.5)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


X_T, PRED = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@cpu_backends
@pytest.mark.parametrize(
    "alpha, sigma, predict, to, wanted",
    [
        (0.0, 1.0, "eps", "score", -PRED),
        (0.0, 1.0, "score", "eps", -PRED),
        (0.0, 1.0, "v", "x0", -PRED),
        (0.0, 1.0, "x0", df.EDM(0.5), 2 * PRED),
        (0.0, 1.0, df.EDM(0.5), "x0", 0.5 * PRED),
        (0.0, 1.0, df.EDM(0.5), "eps", X_T),
        (0.0, 1.0, df.EDM(0.5), "flow", X_T - 0.5 * PRED),
        (1.0, 0.0, "score", "x0", X_T),
        (1.0, 0.0, "score", "eps", torch.zeros_like(PRED)),
        (1.0, 0.0, "eps", df.EDM(0.5), -PRED),
        (1.0, 0.0, df.EDM(0.5), "eps", -PRED),
        (1.0, 0.0, df.EDM(0.5), "x0", X_T),
        (1.0, 0.0, df.EDM(0.5), "v", -PRED),
    ],
    ids=str,
)
def test_finite_limits(backend, alpha, sigma, predict, to, wanted):
    torch.testing.assert_close(df.convert(X_T, PRED, df.Level(alpha, sigma), predict=predict, to=to), wanted)
    each = df.Level(torch.tensor([alpha, 0.6, alpha]).double(), torch.tensor([sigma, 0.8, sigma]).double())
    torch.testing.assert_close(df.convert(X_T, PRED, each, predict=predict, to=to)[::2], wanted[::2])


@pytest.mark.parametrize("alpha, sigma, predict", [(0.0, 1.0, "eps"), (0.0, 1.0, "score"), (1.0, 0.0, "x0")])
def test_what_does_not_determine_f_is_refused(alpha, sigma, predict):
    with pytest.raises(ValueError, match=f"convert: has no finite value at alpha = {alpha}, sigma = {sigma}"):
        df.convert(X_T, PRED, df.Level(alpha, sigma), predict=predict, to=df.EDM(0.5))


def test_gradients():
    x_t, pred = (t.clone().requires_grad_() for t in (X_T, PRED))
    alpha, sigma = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.6, 1, 0.3], [0.8, 2, 0.1]))

    def converted(x_t, pred, alpha, sigma):
        return df.convert(x_t, pred, df.Level(alpha, sigma), predict=df.EDM(0.5), to="flow")

    assert torch.autograd.gradcheck(converted, (x_t, pred, alpha, sigma))


@cpu_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(backend, dtype):
    x_t, pred = X_T.to(dtype), PRED.to(dtype)
    got = df.convert(x_t, pred, df.Level(0.6, 0.8), predict=df.EDM(0.5), to="x0")
    wanted = df.convert(x_t.double(), pred.double(), df.Level(0.6, 0.8), predict=df.EDM(0.5), to="x0")
    torch.testing.assert_close(got.double(), wanted, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)


def test_each_sigma_data_has_its_own_table():
    schedule, t = df.Schedule.linear(20), torch.tensor([3, 7, 19])
    for s in (0.5, 0.25, 0.5):
        alpha, sigma = (c[t][:, None] for c in (schedule.alpha, schedule.sigma))
        size = (sigma**2 + (alpha * s) ** 2).sqrt()
        wanted = alpha * s**2 / size**2 * X_T + sigma * s / size * PRED
        torch.testing.assert_close(df.to_x0(X_T, PRED, schedule[t], predict=df.EDM(s)), wanted)
    assert len(schedule._tables) == 2


class TestCompile:
    T = torch.tensor([3, 7, 19])

    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_made_inside(self):
        def f(x_t, pred, t):
            return df.to_x0(x_t, pred, SCHEDULE[t], predict=df.EDM(0.5), clamp=1.0)

        torch.testing.assert_close(Recorder().compile(f)(X_T, PRED, self.T), f(X_T, PRED, self.T))

    @pytest.mark.parametrize("level", [SCHEDULE[torch.tensor([3, 7, 19])], SCHEDULE[4], df.Level(0.6, 0.8)], ids=str)
    def test_an_argument(self, level):
        def f(x_t, pred, predict):
            return df.convert(x_t, pred, level, predict=predict, to="v")

        compiled = Recorder().compile(f)
        for predict in (df.EDM(0.5), df.EDM(0.7), "eps"):
            torch.testing.assert_close(compiled(X_T, PRED, predict), f(X_T, PRED, predict))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: df.EDM(0.0), ValueError, "EDM: sigma_data must be positive, got 0.0"),
        (lambda: df.EDM(float("inf")), ValueError, "EDM: sigma_data must be finite, got inf"),
        (lambda: df.EDM("1"), TypeError, "EDM: sigma_data must be a number, got str"),
        (
            lambda: df.convert(X_T, PRED, LEVEL, predict="v", to="epsilon"),
            ValueError,
            "convert: to must be one of 'eps', .*, 'flow' or an EDM, got 'epsilon'",
        ),
        (
            lambda: df.convert(X_T, PRED, LEVEL, predict=df.EDM, to="x0"),
            ValueError,
            "convert: predict must be one of 'eps', .*, 'flow' or an EDM, got <class",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
