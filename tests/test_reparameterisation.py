"""The VAE's sample and divergence: exact laws, gradients of all orders, and the exponential in the kernels."""

from __future__ import annotations

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


def test_bad_input() -> None:
    mu = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"reparameterise: log_var must have shape \(4, 3\), got \(4, 2\)"):
        df.reparameterise(mu, torch.zeros(4, 2), NOISE)
    with pytest.raises(TypeError, match="reparameterise: mu must be float16"):
        df.reparameterise(mu.long(), mu, NOISE)
    with pytest.raises(TypeError, match="reparameterise: noise must be a Noise"):
        df.reparameterise(mu, mu, 3)  # type: ignore[arg-type]
