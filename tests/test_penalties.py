"""Penalties of a code against the formulas in plain torch and against exact Jacobians in fp64."""

from __future__ import annotations

import fractions
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import dae_fast as df
from benchmarks.cases import DTYPES
from dae_fast.ops.penalties import CONTRACTION_TAG

NOISE = df.Noise(12).fold_in(1)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
REDUCE = {"mean": lambda each: each.mean(), "sum": lambda each: each.sum(), "none": lambda each: each}
reductions = pytest.mark.parametrize("reduction", REDUCE)


class TestL1:
    @dtypes
    @reductions
    def test_value_and_gradient(self, backend: str, dtype: torch.dtype, reduction: str) -> None:
        h = torch.randn(6, 3, 41).to(dtype)
        h[0, 0, :5] = 0
        h.requires_grad_()
        got = df.l1_penalty(h, reduction=reduction)
        wide = h.detach().double().requires_grad_()
        each = wide.abs().flatten(1)
        wanted = {"mean": each.mean(), "sum": each.sum(), "none": each.mean(1)}[reduction]
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(got.sum(), h)
        (exact,) = torch.autograd.grad(wanted.sum(), wide)
        assert (gradient[0, 0, :5] == 0).all()
        # sign / (B N), rounded once: in fp16 near its smallest numbers.
        torch.testing.assert_close(gradient.double(), exact, rtol=torch.finfo(dtype).eps, atol=3e-8)

    def test_one_pass_makes_the_gradient_too(self) -> None:
        h = torch.randn(6, 40, requires_grad=True)
        for given in (h, h.detach().t().contiguous().t().requires_grad_()):  # a plain call, and another
            loss = df.l1_penalty(given)
            torch.testing.assert_close(loss, h.abs().mean())
            torch.testing.assert_close(loss.grad_fn.saved_tensors[1], h.sign() / 240)  # before backward

    def test_compile_and_vmap(self) -> None:
        h = torch.randn(6, 5, requires_grad=True)
        torch._dynamo.reset()
        got = torch.autograd.grad(torch.compile(df.l1_penalty, fullgraph=True, backend="aot_eager")(h), h)
        torch._dynamo.reset()
        torch.testing.assert_close(got[0], h.sign() / 30)
        each = torch.vmap(torch.func.grad(df.l1_penalty))(h.detach().reshape(3, 2, 5))
        torch.testing.assert_close(each, h.detach().sign().reshape(3, 2, 5) / 10)


class TestKlSparsity:
    def test_is_the_divergence_of_bernoullis(self) -> None:
        h = torch.rand(9, 4, 5, dtype=torch.float64, requires_grad=True)
        rate = 0.2
        Bernoulli = torch.distributions.Bernoulli
        units = torch.distributions.kl_divergence(Bernoulli(torch.full((4, 5), rate).double()), Bernoulli(h.mean(0)))
        torch.testing.assert_close(df.kl_sparsity(h, rate), units.sum(), rtol=1e-7, atol=0)
        assert torch.autograd.gradcheck(lambda h: df.kl_sparsity(h, rate), h)
        assert torch.autograd.gradgradcheck(lambda h: df.kl_sparsity(h, rate), h)

    def test_zero_where_the_rate_is_met(self) -> None:
        h = torch.full((8, 3), 0.05, dtype=torch.float64)
        torch.testing.assert_close(df.kl_sparsity(h, 0.05), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-15)

    @dtypes
    def test_half_precision_is_averaged_in_fp32(self, dtype: torch.dtype) -> None:
        """A thousand samples of 0.01: a mean in bf16 would stall."""
        h = torch.full((1000, 3), 0.01).to(dtype)
        got = df.kl_sparsity(h, 0.05)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), df.kl_sparsity(h.double(), 0.05), rtol=1e-5, atol=0)

    def test_units_that_are_always_on_or_off_cost_much_and_not_infinity(self) -> None:
        h = torch.rand(6, 3)
        h[:, 0], h[:, 1] = 0, 1
        h.requires_grad_()
        loss = df.kl_sparsity(h, 0.05)
        assert loss > 10
        (gradient,) = torch.autograd.grad(loss, h)
        assert gradient.isfinite().all()
        assert gradient[:, 2].all()

    def test_outside_is_nan_where_nobody_looks(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(df.kl_sparsity, fullgraph=True, backend="aot_eager")
        assert compiled(torch.full((3, 2), 1.5)).isnan()
        h = torch.rand(3, 2)
        torch.testing.assert_close(compiled(h), df.kl_sparsity(h))
        torch._dynamo.reset()


def jacobians(f, x: Tensor) -> Tensor:
    """(B,) squared norms of each sample's own Jacobian, exact."""
    jacobian = torch.vmap(torch.func.jacrev(lambda row: f(row[None])[0]))
    return jacobian(x).square().flatten(1).sum(1)


class TestSigmoidContraction:
    @reductions
    def test_equals_the_jacobian(self, reduction: str) -> None:
        torch.manual_seed(0)
        layer = torch.nn.Linear(7, 5).double()
        x = torch.randn(6, 7, dtype=torch.float64)
        got = df.sigmoid_contraction(layer(x).sigmoid(), layer.weight, reduction=reduction)
        wanted = REDUCE[reduction](jacobians(lambda x: layer(x).sigmoid(), x))
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)

    def test_gradients(self) -> None:
        h, W = torch.rand(4, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        h.requires_grad_(), W.requires_grad_()
        assert torch.autograd.gradcheck(df.sigmoid_contraction, (h, W))
        assert torch.autograd.gradgradcheck(df.sigmoid_contraction, (h, W))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_and_autocast(self, dtype: torch.dtype) -> None:
        """fp32 inside: 1 - h of a rounded h is exact, and nothing is rounded again."""
        h, W = torch.rand(64, 30).to(dtype), torch.randn(30, 50).to(dtype)
        exact = df.sigmoid_contraction(h.double(), W.double())
        with torch.autocast("cpu", torch.bfloat16):
            got = df.sigmoid_contraction(h, W)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("of_h", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("shape", [(70, 37), (5, 2500)], ids=str)
    def test_kernels(self, of_h: torch.dtype, shape: tuple[int, int], restore_isa, restore_threads) -> None:
        """Against fp64, and the same bits from every instruction set and number of threads."""
        torch.manual_seed(2)
        h = torch.rand(shape[::-1]).to(of_h).t().requires_grad_()  # strided
        W = torch.randn(shape[1], 3).to(torch.promote_types(of_h, torch.float32)).requires_grad_()
        scale = torch.rand(shape[0], dtype=W.dtype)
        wide, weight = (t.detach().double().requires_grad_() for t in (h, W))
        slope = wide * (1 - wide)
        exact = (slope**2) @ (weight**2).sum(1)
        right = exact, *torch.autograd.grad(exact, (wide, weight), scale.double())
        found = set()
        for isa in df.kernels.native.isas():
            df.kernels.native.use_isa(isa)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                each = df.sigmoid_contraction(h, W, reduction="none")
                got = each.detach(), *torch.autograd.grad(each, (h, W), scale)
                found.add(b"".join(g.contiguous().view(torch.uint8).numpy().tobytes() for g in got))
        assert len(found) == 1
        for g, r in zip(got, right, strict=True):
            rounding = torch.finfo(g.dtype).eps * r.abs() + (1e-14 if of_h == torch.float64 else 1e-6) * r.abs().max()
            assert ((g.double() - r).abs() <= rounding).all()


class TestContraction:
    def encoder(self) -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()

    def test_one_draw_is_the_product_with_its_noise(self) -> None:
        f, x = self.encoder(), torch.randn(5, 6, dtype=torch.float64)
        got = df.contraction(f, x, NOISE, samples=2, reduction="none")
        J = torch.vmap(torch.func.jacrev(lambda row: f(row[None])[0]))(x)
        stream = NOISE.fold_in(CONTRACTION_TAG)
        wanted = 0
        for k in range(2):
            v = stream.fold_in(k).normal((5, 4), dtype=torch.float64)
            wanted = wanted + torch.einsum("bij,bi->bj", J, v).square().sum(1) / 2
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)

    def test_unbiased(self) -> None:
        """The mean over many draws is the exact Frobenius norm, within its own known error."""
        f, x = self.encoder(), torch.randn(1, 6, dtype=torch.float64)
        J = torch.func.jacrev(lambda row: f(row[None])[0])(x[0])
        draws = 100_000
        many = x.expand(draws, 6)  # every row has draws of its own
        estimate = df.contraction(f, many, NOISE, reduction="mean")
        error = math.sqrt(2 * float((J @ J.T).square().sum()) / draws)
        assert abs(estimate - J.square().sum()) < stats.norm.isf(1e-9) * error

    def test_each_sample_has_its_own(self) -> None:
        f, x = self.encoder(), torch.randn(5, 6, dtype=torch.float64)
        many = 4000
        estimate = df.contraction(f, x, NOISE, samples=many, reduction="none")
        J = torch.vmap(torch.func.jacrev(lambda row: f(row[None])[0]))(x)
        error = (2 * (J @ J.mT).square().flatten(1).sum(1) / many).sqrt()
        assert ((estimate - J.square().flatten(1).sum(1)).abs() < stats.norm.isf(1e-9) * error).all()

    def test_gradients_reach_the_encoder_and_x(self) -> None:
        f = self.encoder()
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        df.contraction(f, x, NOISE).backward()
        weights = f[0].weight, f[2].weight
        found = x.grad, weights[0].grad, weights[1].grad
        step = 1e-6
        for leaf, gradient in zip((x, *weights), found, strict=True):
            direction = torch.randn_like(leaf)
            with torch.no_grad():
                values = []
                for sign in (1, -1):
                    leaf += sign * step * direction
                    values.append(df.contraction(f, x, NOISE))
                    leaf -= sign * step * direction
            numeric = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-9)

    def test_images_and_reductions(self) -> None:
        torch.manual_seed(2)
        f = torch.nn.Conv2d(2, 3, 3)
        x = torch.randn(4, 2, 6, 6)
        each = df.contraction(f, x, NOISE, reduction="none")
        assert each.shape == (4,)
        for reduction, wanted in (("mean", each.mean()), ("sum", each.sum())):
            torch.testing.assert_close(df.contraction(f, x, NOISE, reduction=reduction), wanted)

    def test_independent_of_the_noise_of_the_same_key(self) -> None:
        """f(x) = x corrupted with the same key: were v its eps, E ||v||^2 would still hold, and E <v, eps> not."""
        v = NOISE.fold_in(CONTRACTION_TAG).fold_in(0).normal((1, 100_000))
        eps = NOISE.normal((1, 100_000))
        assert abs((v * eps).mean()) < stats.norm.isf(1e-9) / math.sqrt(100_000)

    def test_compile(self) -> None:
        f, x = self.encoder(), torch.randn(5, 6, dtype=torch.float64)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: df.contraction(f, x, NOISE), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), df.contraction(f, x, NOISE))
        torch._dynamo.reset()


# Sums.


@pytest.mark.parametrize("shape", [(1_000_000, 1), (1, 1_000_000), (1000, 1000), (3, 777_777)])
def test_sums_of_doubles(shape):
    """A million equal values were off by 1.7e-11, as many roundings one after another."""
    x = torch.full(shape, 0.1, dtype=torch.float64)
    exact = fractions.Fraction(0.1)
    for reduction, count in (("mean", 1), ("sum", x.numel())):
        got = float(df.l1_penalty(x, reduction=reduction))
        assert abs(fractions.Fraction(got) / (count * exact) - 1) < 2e-15
    got = df.l1_penalty(x, reduction="none")
    assert max(abs(fractions.Fraction(float(v)) / exact - 1) for v in got[:10]) < 2e-15
    zero = torch.zeros(shape, dtype=torch.float64)
    level = df.Level(torch.tensor(0.5, dtype=torch.float64, requires_grad=True), 1.0)
    df.add_noise(x, zero, level).sum().backward()
    assert abs(fractions.Fraction(float(level.alpha.grad)) / (x.numel() * exact) - 1) < 2e-15


def test_kl_sparsity_is_the_same_for_every_number_of_threads(restore_threads):
    h = torch.rand(300, 40_000, generator=torch.Generator().manual_seed(0))
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(float(df.kl_sparsity(h)))
    assert len(found) == 1
    rho = h.double().mean(0)
    wanted = (0.05 * (0.05 / rho).log() + 0.95 * (0.95 / (1 - rho)).log()).sum()
    assert found.pop() == pytest.approx(float(wanted), rel=1e-6)
    for B in range(1, 20):  # every way of halving
        h = torch.rand(B, 3, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(df.kl_sparsity, h)
