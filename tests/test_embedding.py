"""Embeddings of a level: the formula in fp64, diffusers' numbers, and no concatenation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dae_fast as df

from . import cuda_on_cpu

NOISE = df.Noise(8)
T = torch.tensor([0, 1, 17, 500, 999])


def by_hand(t: Tensor, dim: int, max_period: float, flip: bool, shift: float) -> Tensor:
    half = dim // 2
    angles = [[float(v) * max_period ** (-i / (half - shift)) for i in range(half)] for v in t]
    sin, cos = ([[wave(a) for a in row] for row in angles] for wave in (math.sin, math.cos))
    parts = (cos, sin) if flip else (sin, cos)
    rows = [a + b + [0.0] * (dim % 2) for a, b in zip(*parts, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("dim, shift", [(4, 1), (7, 0), (32, 1), (33, 0.5), (2, 0)])
@pytest.mark.parametrize("flip", [False, True])
def test_formula(dtype: torch.dtype, dim: int, shift: float, flip: bool) -> None:
    for period in (10000.0, 100.0):
        got = df.timestep_embedding(T.to(dtype), dim, max_period=period, flip=flip, freq_shift=shift)
        assert got.dtype == torch.float32
        wanted = by_hand(T, dim, period, flip, shift)
        # Angles up to 1000 in fp64, then one rounding of numbers in [-1, 1].
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2.0**-24)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dim", [32, 33])
def test_diffusers(flip: bool, shift: int, dim: int) -> None:
    """Which makes its angles in fp32: off by half an ulp of 1000, and by the frequency's."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    wanted = embeddings.get_timestep_embedding(T, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    got = df.timestep_embedding(T, dim, flip=flip, freq_shift=shift)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2 * 1000 * 2.0**-24 * 2)


def test_fractional_levels_and_their_gradient() -> None:
    t = torch.tensor([0.25, 0.5], dtype=torch.float64, requires_grad=True)
    got = df.timestep_embedding(t, 6)
    torch.testing.assert_close(got.double(), by_hand(t.detach(), 6, 10000.0, False, 1), rtol=0, atol=2.0**-24)
    (gradient,) = torch.autograd.grad(got.sum(), t)
    w = torch.tensor([1.0, 1e-2, 1e-4]).double()
    torch.testing.assert_close(
        gradient, (w * ((t[:, None] * w).cos() - (t[:, None] * w).sin())).sum(1), rtol=1e-6, atol=0
    )


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an op returned in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in known:
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_beside_the_noised_input_without_a_concatenation(backend: str, dtype: torch.dtype) -> None:
    """One buffer (B, D + F): the bits of the concatenation, and no tensor of the samples' size."""
    B, D, F = 5, 4000, 33
    x0, level = torch.randn(B, D).to(dtype), df.Schedule.linear(1000)[T]
    x_t, features = df.add_noise(x0, NOISE, level), df.timestep_embedding(T, F)
    wanted = torch.cat((x_t, features.to(dtype)), 1)
    buffer = torch.full((B, D + F), float("nan"), dtype=dtype)
    df.add_noise(x0, NOISE, level, out=buffer[:, :D])
    with Largest() as embedding:
        assert df.timestep_embedding(T, F, out=buffer[:, D:]).data_ptr() == buffer[:, D:].data_ptr()
    assert torch.equal(buffer, wanted)
    assert embedding.bytes <= 8 * B * F


def test_noising_into_a_buffer_allocates_nothing_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native backend makes its results with empty_like: with out, none."""
    made = []
    original = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: made.append(a) or original(*a, **k))
    buffer = torch.empty(5, 4033)
    with df.use_backend("native"):
        df.add_noise(torch.randn(5, 4000), NOISE, df.Level(0.6, 0.8), out=buffer[:, :4000])
        assert not made
        df.add_noise(torch.randn(5, 4000)[:, ::2], NOISE, df.Level(0.6, 0.8))
        assert made


class TestFourier:
    def test_formula(self, backend: str) -> None:
        x = torch.tensor([-1.5, 0.0, 0.25, 3.0], dtype=torch.float64)
        W = NOISE.normal((1, 6), dtype=torch.float64)[0] * 4
        angle = 2 * math.pi * x[:, None] * W
        wanted = torch.cat((angle.sin(), angle.cos()), 1)
        torch.testing.assert_close(df.fourier_embedding(x, NOISE, 12, scale=4.0).double(), wanted, rtol=0, atol=1e-7)
        flipped = torch.cat((angle.cos(), angle.sin()), 1)
        got = df.fourier_embedding(x, NOISE, 12, scale=4.0, flip=True)
        torch.testing.assert_close(got.double(), flipped, rtol=0, atol=1e-7)

    def test_coordinates(self) -> None:
        x = torch.randn(7, 3)
        W = NOISE.normal((3, 8), dtype=torch.float64)
        angle = 2 * math.pi * x.double() @ W
        got = df.fourier_embedding(x, NOISE, 16)
        torch.testing.assert_close(got.double(), torch.cat((angle.sin(), angle.cos()), 1), rtol=0, atol=1e-6)

    def test_its_inner_product_is_a_gaussian_kernel(self) -> None:
        """E cos(2 pi w (x - y)) = exp(-2 pi^2 scale^2 (x - y)^2): Bochner, as in Rahimi and Recht 2007."""
        x = torch.linspace(0, 0.4, 9)
        m = 200_000
        features = df.fourier_embedding(x, NOISE, 2 * m).double()
        kernel = features @ features.T / m
        wanted = torch.exp(-2 * math.pi**2 * (x[:, None] - x).double() ** 2)
        assert (kernel - wanted).abs().max() < 6.5 / math.sqrt(2 * m)  # a cosine's variance is at most 1/2

    def test_out_and_gradient(self) -> None:
        x = torch.randn(4)
        buffer = torch.full((4, 20), 7.0)
        df.fourier_embedding(x, NOISE, 12, out=buffer[:, 3:15])
        assert torch.equal(buffer[:, 3:15], df.fourier_embedding(x, NOISE, 12))
        assert (buffer[:, :3] == 7).all() and (buffer[:, 15:] == 7).all()
        x = x.double().requires_grad_()
        (gradient,) = torch.autograd.grad(df.fourier_embedding(x, NOISE, 4).sum(), x)
        assert gradient.all()


@pytest.mark.parametrize("isa", df.kernels.native.isas())
def test_accuracy_and_the_same_bits_everywhere(isa: str, cuda_on_cpu_library: Path, restore_isa) -> None:
    """Against 80-bit arithmetic: of t up to 1e6, of large and of tiny angles."""
    t = torch.cat((torch.arange(2000), 10 ** (torch.rand(2000, dtype=torch.float64) * 12 - 6)))
    W = torch.cat((torch.rand(1, 20).double() * 50, df.ops.embedding._kept_frequencies(32, 1e4, 1.0, t.device)), 1)
    made, reference = torch.empty(4000, 105), torch.empty(4000, 105)
    df.kernels.reference.embedding(t[:, None], W, True, reference)
    df.kernels.native.use_isa(isa)
    df.kernels.native.embedding(t[:, None], W, True, made)
    u = (t[:, None] * W).numpy().astype(np.longdouble)
    angle = (u - np.round(u)) * (2 * np.pi + np.longdouble(1.2246467991473532e-16) * 2)
    for got, bound in ((made, 0.82), (reference, 0.501)):
        assert np.abs(got[:, :52].numpy() - np.cos(angle)).max() <= bound * 2.0**-24
        error = np.abs(got[:, 52:104].numpy() - np.sin(angle))
        assert error.max() <= bound * 2.0**-24
        assert (error / np.spacing(np.abs(np.sin(angle)).astype(np.float32)))[np.abs(u) < 0.1].max() <= 0.82
        assert (got[:, 104] == 0).all()
    on_gpu = torch.empty(4000, 105)
    with cuda_on_cpu.running(cuda_on_cpu_library):
        df.kernels.native.embedding(t[:, None], W, True, on_gpu)
    assert torch.equal(on_gpu, made)


def test_compile_and_vmap() -> None:
    def f(t: Tensor) -> Tensor:
        buffer = torch.zeros(5, 40)
        df.timestep_embedding(t, 33, out=buffer[:, 7:])
        return buffer + df.fourier_embedding(t.float(), NOISE, 40)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(T), f(T))
    torch._dynamo.reset()
    t = torch.rand(3, 4)
    got = torch.vmap(lambda t: df.timestep_embedding(t, 8))(t)
    assert torch.equal(got, torch.stack([df.timestep_embedding(row, 8) for row in t]))
    ids = torch.arange(3)[:, None]
    got = torch.vmap(lambda t, i: df.fourier_embedding(t, df.Noise(0, sample=i), 8))(t, ids)
    assert torch.equal(got, torch.stack([df.fourier_embedding(t[k], df.Noise(0, sample=ids[k]), 8) for k in range(3)]))
    _, rate = torch.func.jvp(lambda t: df.timestep_embedding(t, 8), (t[0],), (torch.ones(4),))
    expected = torch.func.vmap(torch.func.jacrev(lambda t: df.timestep_embedding(t[None], 8)[0]))(t[0])
    torch.testing.assert_close(rate, expected)


def test_double_backward() -> None:
    x = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    W = torch.rand(2, 3, dtype=torch.float64)
    (g,) = torch.autograd.grad(
        torch.ops.dae_fast.embedding(x, W, 7, True, "f").double()[:, 1].sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(g[:, 0].sum(), x)
    angle = 2 * math.pi * (x @ W)[:, 1]
    torch.testing.assert_close(second[:, 1], -((2 * math.pi) ** 2) * W[0, 1] * W[1, 1] * angle.cos())


@pytest.mark.parametrize(
    "call",
    [
        lambda: df.fourier_embedding(torch.zeros(0), df.Noise(0), 8),
        lambda: df.fourier_embedding(torch.zeros(0, 3), df.Noise(0), 8),
        lambda: df.timestep_embedding(torch.zeros(0), 8),
        lambda: df.timestep_embedding(torch.zeros(0, dtype=torch.int64), 8, out=torch.empty(0, 8)),
    ],
)
def test_of_an_empty_batch(call):
    assert call().shape == (0, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: df.timestep_embedding(torch.zeros(2), 8, max_period=float("nan")), "max_period must be positive and"),
        (lambda: df.timestep_embedding(torch.zeros(2), 8, max_period=-1), "max_period must be positive and finite"),
        (lambda: df.timestep_embedding(torch.zeros(2), 8, freq_shift="0"), "freq_shift must be a number, got str"),
        (lambda: df.timestep_embedding(torch.zeros(2), 8.0), "dim must be an int, got float"),
        (lambda: df.timestep_embedding(torch.zeros(2), True), "dim must be an int, got bool"),
        (lambda: df.timestep_embedding(torch.zeros(2), 8, flip="no"), "flip must be True or False, got 'no'"),
        (lambda: df.fourier_embedding(torch.zeros(2), df.Noise(0), 8, scale=1j), "scale must be a number, got complex"),
        (lambda: df.fourier_embedding(torch.zeros(2), df.Noise(0), 8, scale=float("inf")), "scale must be finite"),
        (lambda: df.fourier_embedding(torch.zeros(2), df.Noise(0), "8"), "dim must be an int, got str"),
    ],
)
def test_nonsense(call, message):
    with pytest.raises((TypeError, ValueError), match=f"_embedding: {message}"):
        call()
