"""SGLD, MALA and underdamped Langevin: their formulas, and the laws at which their chains settle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import dae_fast as df
from dae_fast.ops.mcmc import ACCEPTANCE_TAG

NOISE = df.Noise(3)
SHAPE = (5, 3, 4)


def drawn(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


EPS = NOISE.normal(SHAPE, dtype=torch.float64)


class TestSGLD:
    @pytest.mark.parametrize("h", [0.1, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])], ids=["one", "each"])
    def test_formula(self, backend: str, h: float | Tensor) -> None:
        x, score, P = drawn(3)
        P = P.exp()
        size = h.double()[:, None, None] if isinstance(h, Tensor) else h
        plain = df.sgld_step(x, score, h, NOISE, temperature=0.3)
        torch.testing.assert_close(plain, x + size * score + (0.6 * size) ** 0.5 * EPS)
        found = df.sgld_step(x, score, h, NOISE, temperature=0.3, preconditioner=P)
        torch.testing.assert_close(found, x + size * P * score + (0.6 * size * P).sqrt() * EPS)
        torch.testing.assert_close(df.sgld_step(x, score, h, EPS, temperature=0.3, preconditioner=P), found)
        half = df.sgld_step(*(t.bfloat16() for t in (x, score)), h, NOISE, temperature=0.3, preconditioner=P.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), found, rtol=0.02, atol=0.02)

    def test_gradients(self) -> None:
        x, score, P = (t[:2].clone().requires_grad_() for t in drawn(3).exp())

        def step(x: Tensor, score: Tensor, P: Tensor) -> Tensor:
            return df.sgld_step(x, score, 0.1, NOISE, preconditioner=P)

        assert torch.autograd.gradcheck(step, (x, score, P))

    def test_settles_at_its_law(self) -> None:
        """Of a Gaussian whose variances span 10^4, P being them: x' = (1 - h) x + sqrt(2 h T) std eps."""
        variance = torch.tensor([1e-2, 1.0, 1e2]).expand(20_000, 3)
        x, h, T = torch.zeros(20_000, 3), 0.1, 0.5
        for k in range(60):
            x = df.sgld_step(x, -x / variance, h, NOISE.fold_in(k), temperature=T, preconditioner=variance)
        wanted = T * variance[0] / (1 - h / 2)
        assert ((x.var(0) / wanted).log().abs() < 0.04).all()


class TestUnderdamped:
    def test_is_baoab(self, backend: str) -> None:
        x, v, score = drawn(3)
        h, friction, T = 0.2, 1.5, 0.7
        got_x, got_v = df.underdamped_step(x, v, score, h, NOISE, friction=friction, temperature=T)
        w, at = v + h * score, x
        at = at + h / 2 * w
        c = math.exp(-friction * h)
        w = c * w + math.sqrt((1 - c * c) * T) * EPS
        at = at + h / 2 * w
        torch.testing.assert_close(got_x, at)
        torch.testing.assert_close(got_v, w)

    def test_without_friction_energy_stays(self) -> None:
        """A leapfrog step around a harmonic well: reversible, of second order in h."""
        x, h = drawn(1)[0], 0.05
        v = -h / 2 * -x
        start = x.square() / 2
        for k in range(200):
            x, v = df.underdamped_step(x, v, -x, h, NOISE.fold_in(k), friction=0.0)
        energy = x.square() / 2 + (v - h / 2 * x).square() / 2
        torch.testing.assert_close(energy, start, rtol=2 * h**2, atol=1e-12)

    def test_settles_at_its_law(self) -> None:
        """BAOAB has the positions of a Gaussian without bias, at a step at which Langevin's variance is 2."""
        x = torch.zeros(40_000, 2)
        v, h = df.Noise(9).normal(x.shape), 1.0
        for k in range(40):
            x, v = df.underdamped_step(x, v, -x, h, NOISE.fold_in(k), temperature=0.5)
        torch.testing.assert_close(x.var(0), torch.full((2,), 0.5), rtol=0.03, atol=0)


class TestMALA:
    @staticmethod
    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        """A double well in each element."""
        return -(x.square() - 1).square().flatten(1).sum(1), -4 * x * (x.square() - 1)

    @pytest.mark.parametrize("h", [0.05, torch.tensor([0.02, 0.05, 0.1, 0.2, 0.01])], ids=["one", "each"])
    def test_accepts_by_the_ratio_of_densities(self, backend: str, h: float | Tensor) -> None:
        """Worked out by the proposals' own densities."""
        x = drawn(1)[0]
        log_prob, score = self.target(x)
        size = h.double() if isinstance(h, Tensor) else torch.full((5,), h, dtype=torch.float64)
        each = size[:, None, None]
        words = NOISE.fold_in(ACCEPTANCE_TAG).bits((5, 1))[:, 0]
        y = x + each * score + (2 * each).sqrt() * EPS
        log_prob_y, score_y = self.target(y)
        forth = torch.distributions.Normal(x + each * score, (2 * each).sqrt()).log_prob(y).sum((1, 2))
        back = torch.distributions.Normal(y + each * score_y, (2 * each).sqrt()).log_prob(x).sum((1, 2))
        wanted = (words + 0.5).log() - math.log(2**32) < log_prob_y - log_prob + back - forth
        assert wanted.any() and not wanted.all()
        state = df.mala_step(self.target, x, log_prob, score, h, NOISE)
        assert torch.equal(state.accepted, wanted)
        torch.testing.assert_close(state.x, torch.where(wanted[:, None, None], y, x))
        torch.testing.assert_close(state.log_prob, self.target(state.x)[0])
        torch.testing.assert_close(state.score, self.target(state.x)[1])

    def test_settles_without_bias(self) -> None:
        """Where the unadjusted chain is 1/3 too wide: h = 0.5 of a unit Gaussian."""
        x, taken = torch.zeros(20_000, 1), 0.0

        def target(x: Tensor) -> tuple[Tensor, Tensor]:
            return -0.5 * x.square().sum(1), -x

        log_prob, score = target(x)
        for k in range(60):
            x, log_prob, score, accepted = df.mala_step(target, x, log_prob, score, 0.5, NOISE.fold_in(k))
            taken += float(accepted.float().mean()) / 60
        assert abs(float(x.var()) - 1) < 0.04 and abs(float(x.pow(4).mean()) - 3) < 0.3
        assert 0.8 < taken < 0.99

    def test_a_proposal_without_a_density_is_not_taken(self) -> None:
        x = drawn(1)[0]
        state = df.mala_step(lambda y: (torch.full((5,), math.nan), y), x, torch.zeros(5), x, 0.1, NOISE)
        assert not state.accepted.any() and torch.equal(state.x, x)


def test_bad_input() -> None:
    x = torch.zeros(2, 3)
    target, at = TestMALA.target, torch.zeros(2)
    for call, error, message in (
        (lambda: df.sgld_step(x, x[:1], 0.1, NOISE), ValueError, r"sgld_step: score must have shape \(2, 3\)"),
        (lambda: df.sgld_step(x, x, 0.0, NOISE), ValueError, "step_size must be positive and finite, got 0.0"),
        (
            lambda: df.sgld_step(x, x, 0.1, NOISE, temperature=-1.0),
            ValueError,
            "temperature must be positive and finite, got -1.0",
        ),
        (
            lambda: df.sgld_step(x, x, torch.tensor([0.1, -0.2]), NOISE),
            ValueError,
            "step_size must be positive, got -0.2",
        ),
        (lambda: df.sgld_step(x, x, 0.1, NOISE, preconditioner=x[:1]), ValueError, "preconditioner must have shape"),
        (lambda: df.underdamped_step(x, x[:1], x, 0.1, NOISE), ValueError, r"underdamped_step: v must have shape"),
        (
            lambda: df.underdamped_step(x, x, x, 0.1, NOISE, friction=-1.0),
            ValueError,
            "friction must be finite and not",
        ),
        (
            lambda: df.mala_step(target, x, x, x, 0.1, NOISE),
            ValueError,
            r"log_prob must be .* shape \(2,\), got \(2, 3\)",
        ),
        (lambda: df.mala_step(target, x, at, x, 0.1, x), TypeError, "mala_step: noise must be a Noise, got a tensor"),
        (
            lambda: df.mala_step(torch.neg, x, at, x, 0.1, NOISE),
            TypeError,
            r"must return \(log_prob, score\), got Tensor",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


# The loops.

GAUSSIAN = torch.tensor([0.25, 4.0])  # variances


def test_sgld_is_its_steps_and_has_their_law() -> None:
    """P the variances: every direction settles at T/(1 - h/2) of its own; h may decrease, and a callback changes x."""

    def score(x: Tensor) -> Tensor:
        return -x / GAUSSIAN.to(x.dtype)

    start, P, path = torch.zeros(4000, 2), GAUSSIAN.expand(4000, 2), df.samplers.Trajectory()
    x = df.samplers.sgld(score, start, 0.4, 30, NOISE, temperature=0.5, preconditioner=P, callback=path)
    torch.testing.assert_close(x.var(0) / GAUSSIAN, torch.full((2,), 0.5 / 0.8), rtol=0.1, atol=0)
    assert torch.equal(path.x[-1], x) and len(path.x) == 30 and not path.x0 and not start.any()
    by_hand = drawn(1)[0, :, 0, :2]
    chain = df.samplers.sgld(
        score,
        by_hand,
        lambda k: 0.1 / (k + 1),
        3,
        NOISE,
        preconditioner=lambda score: 1 / (1 + score.abs()),
        callback=lambda k, x: x.clamp(-1, 1) if k == 1 else None,
    )
    for k in range(3):
        slope = score(by_hand)
        by_hand = df.sgld_step(
            by_hand, slope, 0.1 / (k + 1), NOISE.fold_in(k), preconditioner=1 / (1 + slope.abs())
        ).clamp(*((-1, 1) if k == 1 else (None, 100)))
    assert torch.equal(chain, by_hand)
    half = df.samplers.sgld(score, x[:5].bfloat16(), 0.1, 2, NOISE)
    assert half.dtype == torch.bfloat16


def test_underdamped_comes_to_x_and_v_of_one_time() -> None:
    """Of N(0, 1) at T = 0.5 both have variance 0.5 at any h; without friction energy stays, and back is the start."""
    x, v = df.samplers.underdamped(torch.neg, torch.zeros(4000, 2), 1.0, 30, NOISE, temperature=0.5)
    torch.testing.assert_close(x.var(0), torch.full((2,), 0.5), rtol=0.1, atol=0)
    torch.testing.assert_close(v.var(0), torch.full((2,), 0.5 * 0.75), rtol=0.1, atol=0)  # h/2 beside x: 1 - h^2/4
    start, speed = drawn(2)
    x, v = df.samplers.underdamped(torch.neg, start, 0.1, 7, NOISE, v=speed, friction=0.0)
    back, _ = df.samplers.underdamped(torch.neg, x, 0.1, 7, NOISE, v=-v, friction=0.0)
    torch.testing.assert_close(back, start)
    moved = x - start
    assert moved.abs().max() > 0.1


def test_mala_is_its_steps_and_has_no_bias() -> None:
    """h = 0.5 of a unit Gaussian, where Langevin's variance is 4/3."""

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * x.square().sum(1), -x

    x, share = df.samplers.mala(target, torch.zeros(8000, 1), 0.5, 40, NOISE)
    assert abs(float(x.var()) - 1) < 0.06 and 0.8 < float(share.mean()) < 0.99
    state, at = df.mala_step(target, x, *target(x), 0.5, NOISE.fold_in(0)), []
    moved, share = df.samplers.mala(target, x, 0.5, 1, NOISE, callback=lambda k, x: at.append(x))
    assert torch.equal(moved, state.x) and torch.equal(at[0], moved) and torch.equal(share, state.accepted.float())
    far, _ = df.samplers.mala(target, x[:9], 0.5, 2, NOISE, callback=lambda k, x: x + 5 if k == 0 else None)
    asked = df.samplers.mala(target, x[:9], 0.5, 1, NOISE)[0] + 5
    assert torch.equal(far, df.mala_step(target, asked, *target(asked), 0.5, NOISE.fold_in(1)).x)
    half, _ = df.samplers.mala(target, x[:5].bfloat16(), 0.5, 2, NOISE)
    assert half.dtype == torch.bfloat16


def test_langevin_calls_back() -> None:
    path = df.samplers.Trajectory()
    x = df.samplers.langevin(torch.neg, torch.ones(3, 4), 0.1, 3, NOISE, callback=path)
    assert torch.equal(x, df.samplers.langevin(torch.neg, torch.ones(3, 4), 0.1, 3, NOISE))
    assert torch.equal(path.x[1], df.samplers.langevin(torch.neg, torch.ones(3, 4), 0.1, 2, NOISE))


def test_bad_input_of_the_loops() -> None:
    x = torch.zeros(2, 3)
    for call, error, message in (
        (lambda: df.samplers.sgld(torch.neg, x, -0.1, 2, NOISE), ValueError, "step_size must be positive and finite"),
        (lambda: df.samplers.sgld(lambda x: x[:1], x, 0.1, 2, NOISE), ValueError, r"sgld: the score must have shape"),
        (lambda: df.samplers.sgld(torch.neg, x, 0.1, 2, x), TypeError, "sgld: noise must be a Noise, got a tensor"),
        (
            lambda: df.samplers.sgld(torch.neg, x, 0.1, 2, NOISE, callback=lambda k, x: x[0]),
            ValueError,
            "sgld: what callback returned must have shape",
        ),
        (lambda: df.samplers.underdamped(torch.neg, x, 0.1, 2, NOISE, v=x[:1]), ValueError, "underdamped: v must have"),
        (lambda: df.samplers.mala(torch.neg, x, 0.1, 2, NOISE), TypeError, r"mala: target must return \(log_prob, sc"),
    ):
        with pytest.raises(error, match=message):
            call()
