"""The VAE's sample and divergence: exact laws, gradients of all orders, and the exponential in the kernels."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

import dae_fast as df
from benchmarks.cases import DTYPES
from dae_fast.kernels import reference
from dae_fast.kernels.spec import compute_dtype

from .conftest import ISAS, module_of

SHAPES = ((5, 7), (3, 1301), (2, 3, 5, 4), (0, 4), (3, 0), (4,))
NOISE = df.Noise(2).fold_in(1)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))  # type: ignore[return-value]


def judge(mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    eps = NOISE.normal(mu.shape, dtype=torch.float64)
    return reference.gaussian(mu, log_var, eps, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fresh", [True, False])
def test_forward_and_gradient(backend: str, fresh: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mu, log_var = (t.requires_grad_() for t in inputs(shape, dtype))
    wide = [t.detach().double().requires_grad_() for t in (mu, log_var)]
    noise = NOISE if fresh else NOISE.normal(shape, dtype=dtype)
    z, kl = df.reparameterise(mu, log_var, noise)
    eps = NOISE.normal(shape, dtype=torch.float64) if fresh else noise.double()
    exact_z, exact_kl = reference.gaussian(*wide, eps, None)
    compute = compute_dtype(dtype)
    assert (z.dtype, kl.dtype, kl.shape) == (dtype, compute, shape[:1])
    # A rounding to dtype, and a few of the terms in the compute type.
    eps_out, eps_in = torch.finfo(dtype).eps, 8 * torch.finfo(compute).eps
    torch.testing.assert_close(z.double(), exact_z, rtol=eps_out, atol=8 * eps_in)
    torch.testing.assert_close(kl.double(), exact_kl, rtol=4 * eps_in, atol=4 * eps_in)
    upstream = inputs(shape, dtype)[0], torch.randn(shape[:1], dtype=compute)
    got = torch.autograd.grad((z, kl), (mu, log_var), upstream)
    exact = torch.autograd.grad((exact_z, exact_kl), wide, [u.double() for u in upstream])
    for g, e in zip(got, exact, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=eps_out, atol=64 * eps_in)


@pytest.mark.parametrize("output", [0, 1])
def test_the_gradient_of_one_output(backend: str, output: int) -> None:
    """The other's is absent: it is neither read nor taken for NaN."""
    mu, log_var = (t.requires_grad_() for t in inputs((4, 33), torch.float64))
    found = torch.autograd.grad(df.reparameterise(mu, log_var, NOISE)[output].sum(), (mu, log_var))
    exact = torch.autograd.grad(judge(mu, log_var)[output].sum(), (mu, log_var))
    for g, e in zip(found, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_gradcheck(backend: str) -> None:
    mu, log_var = (t.requires_grad_() for t in inputs((2, 3), torch.float64))
    eps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(df.reparameterise, (mu, log_var, eps))
    assert torch.autograd.gradgradcheck(df.reparameterise, (mu, log_var, eps))
    assert torch.autograd.gradgradcheck(lambda m, v: df.reparameterise(m, v, NOISE), (mu, log_var))


def test_divergence_is_the_library_one() -> None:
    mu, log_var = inputs((6, 50), torch.float64)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mu, (0.5 * log_var).exp()), normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(df.reparameterise(mu, log_var, NOISE)[1], wanted)
    nothing = torch.zeros(3, 50)
    z, kl = df.reparameterise(nothing, nothing, NOISE)
    assert (kl == 0).all()
    assert torch.equal(z, NOISE.normal((3, 50)))


def exact_kl(mu: Tensor, log_var: Tensor) -> list[float]:
    """Of each sample, to 40 digits."""
    with mpmath.workdps(40):
        return [
            float(
                sum(
                    (mpmath.mpf(m) ** 2 + mpmath.expm1(mpmath.mpf(v)) - mpmath.mpf(v)) / 2
                    for m, v in zip(*row, strict=True)
                )
            )
            for row in zip(mu.tolist(), log_var.tolist(), strict=True)
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_divergence_near_the_prior_and_far_from_it(backend: str, dtype: torch.dtype) -> None:
    """e^v - 1 - v cancels: at v = 1e-4 it gave -5.0e-5 where 2.5e-6 is right."""
    values = [0.0, 1e-12, 1e-8, 1e-4, 3e-4, 1e-2, 0.3, 1.0, 1.9999, 2.0, 2.1, 5.0, 20.0, 80.0]
    log_var = torch.tensor([s * v for v in values for s in (1, -1)], dtype=dtype)[:, None].expand(-1, 1000)
    kl = df.reparameterise(torch.zeros_like(log_var), log_var, NOISE)[1]
    exact = exact_kl(torch.zeros_like(log_var[:, :1]), log_var[:, :1])
    torch.testing.assert_close(
        kl.double(), 1000 * torch.tensor(exact, dtype=torch.float64), rtol=4 * torch.finfo(dtype).eps, atol=0
    )
    v = torch.full((1, 1000), 1e-4)
    assert float(df.reparameterise(0 * v, v, NOISE)[1]) == pytest.approx(500 * (math.expm1(1e-4) - 1e-4), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_gradient_of_the_divergence(backend: str, dtype: torch.dtype) -> None:
    """expm1(v)/2."""
    values = [0.0, 1e-12, 1e-7, 1e-4, 0.3, 1.0, 1.9999, 2.0, 2.1, 20.0]
    log_var = torch.tensor([[s * v for v in values for s in (1, -1)]], dtype=dtype, requires_grad=True)
    df.reparameterise(torch.zeros_like(log_var), log_var, NOISE)[1].sum().backward()
    exact = [math.expm1(v) / 2 for v in log_var[0].tolist()]
    torch.testing.assert_close(
        log_var.grad.double(), torch.tensor([exact], dtype=torch.float64), rtol=4 * torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("v", [88.5, 90.0, 120.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_divergence_that_is_not_used(backend: str, v: float, dtype: torch.dtype) -> None:
    """It overflows from log_var = 88.8, and 0 * inf is NaN: right is 0.5 * e^(v/2) * eps."""
    log_var = torch.full((2, 5), v, dtype=dtype, requires_grad=True)
    z, kl = df.reparameterise(torch.zeros_like(log_var), log_var, NOISE)
    wanted = 0.5 * math.exp(v / 2) * NOISE.normal((2, 5), dtype=torch.float64)
    (found,) = torch.autograd.grad(z.float().sum(), log_var, retain_graph=True)
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
    (found,) = torch.autograd.grad(z.float().sum() + 0 * kl.sum(), log_var)
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_sample_that_is_not_used(backend: str) -> None:
    """e^(v/2) overflows at 180, the divergence there too: its gradient is infinite, not NaN."""
    log_var = torch.full((1, 3), 180.0, requires_grad=True)
    df.reparameterise(torch.zeros(1, 3), log_var, NOISE)[1].sum().backward()
    assert (log_var.grad == float("inf")).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e30])
def test_a_mean_without_end(backend: str, value: float) -> None:
    """d z / d mu = 1 whatever mu is."""
    mu = torch.full((1, 3), value, requires_grad=True)
    z, _ = df.reparameterise(mu, torch.zeros(1, 3), NOISE)
    z.sum().backward()
    assert (mu.grad == 1).all()


def test_unused_outputs_when_traced_and_twice_differentiated() -> None:
    """There torch hands zeros for what is not used."""
    mu, log_var = torch.full((2, 3), float("inf")), torch.full((2, 3), 90.0)
    wanted = 0.5 * math.exp(45) * NOISE.normal((2, 3), dtype=torch.float64)

    def z(m: Tensor, v: Tensor) -> Tensor:
        return df.reparameterise(m, v, NOISE)[0].sum()

    for grad in (torch.func.grad(z, (0, 1)), torch.compile(torch.func.grad(z, (0, 1)), backend="aot_eager")):
        of_mu, of_log_var = grad(mu, log_var)
        assert (of_mu == 1).all()
        torch.testing.assert_close(of_log_var.double(), wanted, rtol=1e-6, atol=0)
    v = log_var.clone().requires_grad_()
    (first,) = torch.autograd.grad(z(torch.zeros(2, 3), v), v, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), v)
    torch.testing.assert_close(second.double(), wanted / 2, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gradient_of_eps_in_half_precision(backend: str) -> None:
    """e^(v/2) of 1e5 times an upstream gradient of 1e-3 fits into fp16; the first alone does not."""
    eps = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    log_var = torch.full((2, 3), 2 * math.log(1e5)).half()
    z, _ = df.reparameterise(torch.zeros(2, 3).half(), log_var, eps)
    upstream = torch.full((2, 3), 1e-3).half()
    (found,) = torch.autograd.grad(z, eps, upstream)
    torch.testing.assert_close(found.double(), upstream.double() * (log_var.double() / 2).exp(), rtol=1e-3, atol=0)


def test_layouts(backend: str) -> None:
    mu, log_var = inputs((3, 4, 6, 5), torch.float32)
    z, kl = df.reparameterise(mu, log_var, NOISE)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (mu, log_var)]
    for given in (last, (last[0], log_var), (mu, last[1])):
        assert torch.equal(df.reparameterise(*given, NOISE)[0], z)
        torch.testing.assert_close(df.reparameterise(*given, NOISE)[1], kl, rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("restore_isa")
def test_instruction_sets_agree_bit_for_bit(isa: str) -> None:
    native = module_of("native")
    mu, log_var = inputs((7, 1300), torch.float32)
    native.use_isa(ISAS[0])
    expected = df.reparameterise(mu, 10 * log_var, NOISE)
    native.use_isa(isa)
    for got, e in zip(df.reparameterise(mu, 10 * log_var, NOISE), expected, strict=True):
        assert torch.equal(got, e)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow, numpy's, in Triton's interpreter
def test_the_exponential(backend: str) -> None:
    """Within 2 ulp wherever the result is normal; overflow, underflow and NaN as exp has them."""
    if backend == "reference":
        pytest.skip("torch's own")
    x = torch.cat((torch.linspace(-110, 95, 100_001), torch.tensor([float("nan"), float("inf"), -float("inf")])))
    log_var = (2 * x)[None]
    got = df.reparameterise(torch.zeros_like(log_var), log_var, torch.ones_like(log_var))[0][0]
    exact = x.double().exp()
    rounded = exact.float()
    normal = torch.isfinite(rounded) & (rounded >= torch.finfo(torch.float32).smallest_normal)
    assert ((got[normal] / exact[normal] - 1).abs() <= 2 * torch.finfo(torch.float32).eps).all()
    rest = ~normal
    torch.testing.assert_close(got[rest], rounded[rest], rtol=0, atol=3e-45, equal_nan=True)


def test_compiled_and_vectorised() -> None:
    mu, log_var = inputs((4, 33), torch.float32)
    expected = df.reparameterise(mu, log_var, NOISE)
    compiled = torch.compile(lambda m, v: df.reparameterise(m, v, NOISE), fullgraph=True)
    for got, e in zip(compiled(mu, log_var), expected, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-6)
    grad = torch.func.grad(lambda m: df.reparameterise(m, log_var, NOISE)[1].sum())(mu)
    torch.testing.assert_close(grad, mu)


def test_latents_as_a_diffusion_model_takes_them() -> None:
    """DiagonalGaussianDistribution's clamp and a pipeline's (z - shift) * scale; no gradient beyond the limits."""
    mu, log_var = (x.double().requires_grad_() for x in inputs((4, 33), torch.float64))
    limits = {"clamp_log_var": (-0.5, 0.4)}
    z, kl = df.reparameterise(mu, log_var, NOISE, scale=0.18, shift=0.06, **limits)
    limited = log_var.clamp(-0.5, 0.4)
    eps = NOISE.normal(mu.shape, dtype=torch.float64)
    torch.testing.assert_close(z, (mu + (limited / 2).exp() * eps - 0.06) * 0.18, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl, 0.5 * (mu**2 + limited.exp() - 1 - limited).sum(1), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(z.sum() + kl.sum(), log_var)
    assert torch.equal(grad == 0, (log_var < -0.5) | (log_var > 0.4))
    alone = df.reparameterise(mu, log_var, NOISE, scale=0.18, shift=0.06, kl=False, **limits)
    assert torch.equal(alone, z)


def test_bad_input() -> None:
    mu = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"clamp_log_var must be \(low, high\) with low <= high, got \(1, 0\)"):
        df.reparameterise(mu, mu, NOISE, clamp_log_var=(1, 0))
    with pytest.raises(TypeError, match=r"reparameterise: clamp_log_var must be a pair \(low, high\), got 3"):
        df.reparameterise(mu, mu, NOISE, clamp_log_var=3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"reparameterise: log_var must have shape \(4, 3\), got \(4, 2\)"):
        df.reparameterise(mu, torch.zeros(4, 2), NOISE)
    with pytest.raises(TypeError, match="reparameterise: mu must be float16"):
        df.reparameterise(mu.long(), mu, NOISE)
    with pytest.raises(TypeError, match="reparameterise: noise must be a Noise"):
        df.reparameterise(mu, mu, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("log_var", [90.0, 178.0, 1500.0])
def test_what_a_zero_multiplies_has_no_gradient(backend: str, log_var: float) -> None:
    """0 * inf would be NaN: of a divergence that is weighed by 0, and of a z that is."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        mu = torch.full((2, 5), 0.5, dtype=dtype, requires_grad=True)
        lv = torch.full((2, 5), log_var, dtype=dtype, requires_grad=True)
        z, kl = df.reparameterise(mu, lv, df.Noise(0))
        weights = torch.tensor([0.0, 1.0])
        of_mu, of_lv = torch.autograd.grad((0 * z.sum(1) + weights * kl).sum(), (mu, lv))
        assert torch.equal(of_mu, torch.tensor([[0.0], [0.5]], dtype=dtype).expand(2, 5))
        assert torch.equal(of_lv[0], torch.zeros(5, dtype=dtype))
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        right = (0.5 * torch.expm1(torch.tensor(log_var, dtype=torch.float64))).to(compute).to(dtype)
        torch.testing.assert_close(of_lv[1], right.expand(5))


def test_the_gradient_of_a_gradient_where_a_weight_is_0(backend: str) -> None:
    """d/dw of d(w kl)/d log_var is (e^log_var - 1)/2 at w = 0, too."""
    mu, lv = torch.zeros(2, 3, dtype=torch.float64), torch.full((2, 3), 0.7, dtype=torch.float64, requires_grad=True)
    w, u = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z, kl = df.reparameterise(mu, lv, df.Noise(0))
    (of_lv,) = torch.autograd.grad((w * kl + u * z.sum(1)).sum(), lv, create_graph=True)
    of_w, of_u = torch.autograd.grad(of_lv.sum(), (w, u))
    torch.testing.assert_close(of_w, torch.full((2,), 3 * 0.5 * math.expm1(0.7), dtype=torch.float64))
    eps = df.Noise(0).normal((2, 3), dtype=torch.float64)
    torch.testing.assert_close(of_u, 0.5 * math.exp(0.35) * eps.sum(1))
