"""Noise.like_torch against known values of torch.randn, and against torch where a GPU is at hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dae_fast as df

# torch.randn(8, device="cuda") after torch.manual_seed(seed), as printed on GPUs.
ON_CUDA = {
    0: [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284],
    42: [0.1940, 2.1614, -0.1721, 0.8491, -1.9244, 0.6530, -0.6494, -0.8175],
}


@pytest.mark.parametrize("seed", ON_CUDA)
def test_known_values_on_cuda(seed: int) -> None:
    noise = df.Noise.like_torch(seed)
    torch.testing.assert_close(noise.normal((8,)), torch.tensor(ON_CUDA[seed]), rtol=0.0, atol=6e-5)
    assert torch.equal(noise.normal((2, 4)).flatten(), noise.normal((8,)))
    assert torch.equal(noise.normal((4, 2), dtype=torch.bfloat16), noise.normal((4, 2)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_on_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    first, second = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((3, 5), (40,)))
    noise = df.Noise.like_torch(7, "cpu")
    assert torch.equal(noise.normal((3, 5), dtype=dtype), first)
    assert torch.equal(noise.after((3, 5), dtype=dtype).normal((40,), dtype=dtype), second)
    known = df.Noise.like_torch(0, "cpu").normal((4,))
    torch.testing.assert_close(known, torch.tensor([1.5410, -0.2934, -2.1788, 0.5684]), rtol=0.0, atol=6e-5)


def by_the_kernel(seed: int, offset: int, count: int, threads: int) -> np.ndarray:
    """ATen's loop, thread by thread, in Python's integers."""
    out, grid = np.zeros(count), min(threads, -(-count // 256) * 256)
    for thread in range(grid):
        for block, start in enumerate(range(thread, count, 4 * grid), offset):
            c, k = [block & 0xFFFFFFFF, block >> 32, thread, 0], [seed & 0xFFFFFFFF, seed >> 32]
            for _ in range(10):
                p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
                c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
                k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
            for ii in range(4):
                if start + grid * ii < count:
                    u, v = (c[2 * (ii // 2) + j] * 2.0**-32 + 2.0**-33 for j in (0, 1))
                    turned = math.sin(2 * math.pi * v) if ii % 2 == 0 else math.cos(2 * math.pi * v)
                    out[start + grid * ii] = math.sqrt(-2 * math.log(u)) * turned
    return out


@pytest.mark.parametrize("count", [1, 300, 512, 513, 2048, 2049, 5000])
def test_more_elements_than_threads(count: int) -> None:
    """Of a card of 2 multiprocessors with 256 threads each, at the first draw and after one."""
    noise = df.Noise.like_torch(2**40 + 3, multiprocessors=2, threads_per_multiprocessor=256)
    later = noise.after((3000,))
    for offset, made in ((0, noise), (2, later)):
        wanted = by_the_kernel(2**40 + 3, offset, count, 512)
        # Its u is a float32: near u = 1 the normal is off by some 1e-4.
        np.testing.assert_allclose(made.normal((count,)).numpy(), wanted, rtol=0, atol=3e-4)
        assert np.abs(made.normal((count,)).numpy() - wanted).mean() < 1e-6


def test_it_is_normal() -> None:
    made = df.Noise.like_torch(3, multiprocessors=4, threads_per_multiprocessor=1024).normal((100_000,))
    below = torch.special.ndtr(made.double().sort().values)
    assert (below - torch.linspace(0, 1, 100_000, dtype=torch.float64)).abs().max() < 2.2 / math.sqrt(100_000)


def test_errors() -> None:
    with pytest.raises(ValueError, match="like_torch: device_type must be 'cpu' or 'cuda', got 'mps'"):
        df.Noise.like_torch(0, "mps")
    with pytest.raises(TypeError, match="like_torch: seed must be an int"):
        df.Noise.like_torch(0.5)
    with pytest.raises(ValueError, match="like_torch: multiprocessors must be positive, got 0"):
        df.Noise.like_torch(0, multiprocessors=0)
    with pytest.raises(TypeError, match=r"dtype must be one of float32, float16, bfloat16, got torch\.float64"):
        df.Noise.like_torch(0).normal((2,), dtype=torch.float64)
    assert repr(df.Noise.like_torch(3).after((2,))) == "TorchNoise(seed=3, device_type='cuda', draws before: 1)"


@pytest.mark.gpu
def test_it_is_torchs_on_a_gpu() -> None:
    card = torch.cuda.get_device_properties(0)
    noise = df.Noise.like_torch(
        11,
        multiprocessors=card.multi_processor_count,
        threads_per_multiprocessor=card.max_threads_per_multi_processor,
    )
    generator = torch.Generator("cuda").manual_seed(11)
    for shape in ((5,), (1, 4, 64, 64), (3_000_001,), (7,)):
        theirs = torch.randn(shape, generator=generator, device="cuda")
        torch.testing.assert_close(noise.normal(shape, device="cuda"), theirs, rtol=0.0, atol=2e-5)
        noise = noise.after(shape)
