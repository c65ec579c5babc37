"""Offset and pyramid noise, input perturbation and out= of add_noise: exact laws, and the same as by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import dae_fast as df
from benchmarks.cases import DTYPES, SCHEDULE
from dae_fast.ops.noising import PERTURBATION_TAG
from dae_fast.ops.structured import OFFSET_TAG, PYRAMID_TAG, enlarge

NOISE = df.Noise(2**62 + 5).fold_in(3)
LEVEL = SCHEDULE[torch.tensor([0, 300, 999, 700])]
SHAPE = (4, 3, 9, 8)
NOISES: dict[str, Any] = {
    "offset": df.OffsetNoise(NOISE, 0.3),
    "pyramid": df.PyramidNoise(NOISE, 0.7),
    "pyramid of two": df.PyramidNoise(NOISE, 0.9, levels=2),
}
noises = pytest.mark.parametrize("name", NOISES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
SURE = 1e-9  # the probability that a right law fails a statistical test


def by_hand(name: str, shape: tuple[int, ...]) -> Tensor:
    """fp64, from plain normals alone."""
    eps = NOISE.normal(shape, dtype=torch.float64)
    if name == "offset":
        n = NOISE.fold_in(OFFSET_TAG).normal(shape[:2], dtype=torch.float64)
        return eps + 0.3 * n.reshape(*shape[:2], *[1] * (len(shape) - 2))
    discount, levels = (0.7, 99) if name == "pyramid" else (0.9, 2)
    total, k, size = eps.clone(), 0, shape[2:]
    weights = [1.0]
    while max(size) > 1 and k + 1 < levels:
        k, size = k + 1, tuple(max(1, s // 2) for s in size)
        n = NOISE.fold_in(PYRAMID_TAG).fold_in(k).normal((*shape[:2], *size), dtype=torch.float64)
        for d, (s, S) in enumerate(zip(size, shape[2:], strict=True), 2):
            W = weights_of(s, S)
            n = torch.tensordot(n, W, ([d], [1])).movedim(-1, d)
        total += discount**k * n
        weights.append(discount**k)
    return total / math.sqrt(sum(w * w for w in weights))


def weights_of(s: int, S: int) -> Tensor:
    """(S, s): linear interpolation between the centres of s cells, edges held, every row of norm 1."""
    W = torch.zeros(S, s, dtype=torch.float64)
    for i in range(S):
        place = min(max((i + 0.5) * s / S - 0.5, 0), s - 1)
        left = min(int(place), s - 1)
        right = min(left + 1, s - 1)
        W[i, left] += 1 - (place - left)
        W[i, right] += place - left
    return W / W.norm(dim=1, keepdim=True)


class TestNormal:
    @noises
    @dtypes
    def test_equals_the_sum_by_hand(self, backend: str, name: str, dtype: torch.dtype) -> None:
        got = NOISES[name].normal(SHAPE, dtype=dtype)
        assert got.dtype == dtype
        # fp32's roundings of the parts, then one to dtype; fp64 widens fp32 normals that are 2^-23 near exact.
        torch.testing.assert_close(got.double(), by_hand(name, SHAPE), rtol=torch.finfo(dtype).eps, atol=2e-6)

    @noises
    @pytest.mark.parametrize("shape", [(4, 2, 7), (2, 1, 4, 5, 6)], ids=str)
    def test_one_and_three_spatial_dimensions(self, name: str, shape: tuple[int, ...]) -> None:
        torch.testing.assert_close(NOISES[name].normal(shape).double(), by_hand(name, shape), rtol=0, atol=2e-6)

    @noises
    def test_batch_splits_and_sample_ids(self, backend: str, name: str) -> None:
        def of(noise: df.Noise) -> Any:
            if name == "offset":
                return df.OffsetNoise(noise.fold_in(3), 0.3)
            return df.PyramidNoise(noise.fold_in(3), *((0.7,) if name == "pyramid" else (0.9, 2)))

        whole = NOISES[name].normal(SHAPE)
        shard = of(df.Noise(2**62 + 5, first_sample=2)).normal((2, *SHAPE[1:]))
        assert torch.equal(whole[2:], shard)
        ids = torch.tensor([3, 1])
        assert torch.equal(of(df.Noise(2**62 + 5, sample=ids)).normal((2, *SHAPE[1:])), whole[ids])

    @noises
    def test_fold_in(self, name: str) -> None:
        assert not torch.equal(NOISES[name].fold_in(1).normal(SHAPE), NOISES[name].normal(SHAPE))
        folded = {
            "offset": df.OffsetNoise(NOISE.fold_in(1), 0.3),
            "pyramid": df.PyramidNoise(NOISE.fold_in(1), 0.7),
            "pyramid of two": df.PyramidNoise(NOISE.fold_in(1), 0.9, levels=2),
        }[name]
        assert torch.equal(NOISES[name].fold_in(1).normal(SHAPE), folded.normal(SHAPE))

    def test_one_level_is_plain_noise(self) -> None:
        assert torch.equal(df.PyramidNoise(NOISE, levels=1).normal(SHAPE), NOISE.normal(SHAPE))
        assert torch.equal(df.PyramidNoise(NOISE).normal((4, 3, 1, 1)), NOISE.normal((4, 3, 1, 1)))


class TestLaws:
    def test_offset_covariance(self) -> None:
        """1 + s^2 on the diagonal, s^2 within a channel, 0 across."""
        B, s = 40_000, 0.5
        z = df.OffsetNoise(NOISE, s).normal((B, 2, 3)).flatten(1).double()
        channel = torch.arange(6) // 3
        wanted = torch.eye(6, dtype=torch.float64) + s**2 * (channel[:, None] == channel)
        # Of a covariance: (c_ii c_jj + c_ij^2) / B.
        scale = torch.sqrt((wanted.diag()[:, None] * wanted.diag() + wanted**2) / B)
        assert ((z.T @ z / B - wanted).abs() < stats.norm.isf(SURE) * scale).all()

    @pytest.mark.parametrize("smaller, larger", [((1,), (5,)), ((4,), (9,)), ((3, 2), (7, 5)), ((2, 1, 3), (4, 3, 7))])
    def test_enlarged_variance_is_exactly_one(self, smaller: tuple[int, ...], larger: tuple[int, ...]) -> None:
        """Over all impulses the squared answers add up to the variance of every element."""
        n = math.prod(smaller)
        impulses = torch.eye(n, dtype=torch.float64).reshape(n, 1, *smaller)
        variance = enlarge(impulses, larger).square().sum(0)
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("levels", [None, 3])
    def test_pyramid_variance_is_one(self, levels: int | None) -> None:
        B = 20_000
        z = df.PyramidNoise(NOISE, 0.8, levels=levels).normal((B, 1, 5, 6)).double()
        bound = stats.norm.isf(SURE) * math.sqrt(2 / B)
        assert ((z.square().mean(0) - 1).abs() < bound).all()
        neighbours = (z[..., 1:] * z[..., :-1]).mean(0)
        assert (neighbours > 0.1).all()  # they share the lower levels

    def test_perturbation_variance(self) -> None:
        """sigma^2 (1 + gamma^2) about alpha x0; correlated with the target at 1 / sqrt(1 + gamma^2)."""
        B, gamma, alpha, sigma = 200_000, 0.5, 0.6, 0.8
        x_t, eps = df.add_noise(torch.ones(B, 1), NOISE, df.Level(alpha, sigma), target="eps", perturbation=gamma)
        r = (x_t - alpha).double() / sigma
        wanted = 1 + gamma**2
        assert abs(r.square().mean() - wanted) < stats.norm.isf(SURE) * wanted * math.sqrt(2 / B)
        covariance = (r * eps).mean()
        assert abs(covariance - 1) < stats.norm.isf(SURE) * math.sqrt((wanted + 1) / B)


def alpha_sigma() -> tuple[Tensor, Tensor]:
    return tuple(v.double()[:, None, None, None] for v in (LEVEL.alpha, LEVEL.sigma))


class TestAddNoise:
    @noises
    @dtypes
    def test_structured(self, backend: str, name: str, dtype: torch.dtype) -> None:
        x0 = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
        alpha, sigma = alpha_sigma()
        z = by_hand(name, SHAPE)
        got = df.add_noise(x0, NOISES[name], LEVEL)
        # The shared part is rounded to dtype before it is added: two roundings there, one of the sum.
        bound = {"rtol": torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps + 2e-6}
        torch.testing.assert_close(got.double(), alpha * x0.double() + sigma * z, **bound)
        x_t, v = df.add_noise(x0, NOISES[name], LEVEL, target="v")
        assert torch.equal(x_t, got)
        torch.testing.assert_close(v.double(), alpha * z - sigma * x0.double(), **bound)
        x_t, eps = df.add_noise(x0, NOISES[name], LEVEL, target="eps")
        torch.testing.assert_close(eps.double(), z, **bound)

    def test_the_offset_is_not_made_in_full(self) -> None:
        y, *_ = df.OffsetNoise(NOISE).as_operands(torch.empty(SHAPE))
        assert y.shape == SHAPE
        assert y.untyped_storage().nbytes() == 4 * 3 * 4

    @noises
    def test_operands_say_what_the_noise_is(self, name: str) -> None:
        """What a loss does with them: factor_y * y + factor_eps * eps."""
        y, noise, factor_y, factor_eps = NOISES[name].as_operands(torch.empty(SHAPE))
        z = factor_y * y + factor_eps * noise.normal(SHAPE)
        torch.testing.assert_close(z, NOISES[name].normal(SHAPE))

    @noises
    def test_gradients(self, backend: str, name: str) -> None:
        x0 = torch.randn(4, 1, 3, 2, dtype=torch.float64, requires_grad=True)
        sigma = torch.rand(4, dtype=torch.float64, requires_grad=True)

        def f(x0: Tensor, sigma: Tensor) -> Any:
            return df.add_noise(x0, NOISES[name], df.Level(1 - sigma, sigma), target="v", perturbation=0.2)

        assert torch.autograd.gradcheck(f, (x0, sigma))

    @pytest.mark.parametrize("learned", [False, True])
    @pytest.mark.parametrize("target", [None, "eps", "x0", "v"])
    def test_perturbation(self, backend: str, target: str | None, learned: bool) -> None:
        """The same target, x_t moved by sigma * gamma * xi; with and without a gradient to pass on."""
        x0 = torch.randn(SHAPE, requires_grad=learned)
        xi = NOISE.fold_in(PERTURBATION_TAG).normal(SHAPE)
        plain = df.add_noise(x0, NOISE, LEVEL, target=target)
        got = df.add_noise(x0, NOISE, LEVEL, target=target, perturbation=0.1)
        if target:
            assert torch.equal(plain[1], got[1])
            plain, got = plain[0], got[0]
        sigma = LEVEL.sigma[:, None, None, None]
        torch.testing.assert_close(got, plain + 0.1 * sigma * xi)
        if learned:
            (gradient,) = torch.autograd.grad(got.sum(), x0)
            torch.testing.assert_close(gradient, LEVEL.alpha[:, None, None, None].expand(SHAPE))

    def test_a_perturbation_of_zero_is_none(self, backend: str) -> None:
        x0 = torch.randn(SHAPE)
        assert torch.equal(df.add_noise(x0, NOISE, LEVEL, perturbation=0.0), df.add_noise(x0, NOISE, LEVEL))

    @noises
    def test_compile_and_vmap(self, name: str) -> None:
        x0 = torch.randn(SHAPE)
        f = lambda x0: df.add_noise(x0, NOISES[name], LEVEL, target="v", perturbation=0.3)  # noqa: E731
        torch._dynamo.reset()
        for got, want in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(x0), f(x0), strict=True):
            torch.testing.assert_close(got, want)
        torch._dynamo.reset()
        two = torch.randn(2, *SHAPE)
        for got, *want in zip(torch.vmap(f)(two), f(two[0]), f(two[1]), strict=True):
            torch.testing.assert_close(got, torch.stack(want))


class TestOut:
    @dtypes
    @pytest.mark.parametrize("perturbation", [None, 0.2])
    def test_equals_a_new_tensor(self, backend: str, dtype: torch.dtype, perturbation: float | None) -> None:
        x0, z = (torch.randn(SHAPE).to(dtype) for _ in range(2))
        noises = [NOISE, *NOISES.values()] + [z] * (perturbation is None)
        for noise in noises:
            want = df.add_noise(x0, noise, LEVEL, perturbation=perturbation)
            buffer = torch.full((4, 5, 9, 16), 7.0, dtype=dtype)
            out = buffer[:, 1:4, :, ::2]
            assert df.add_noise(x0, noise, LEVEL, perturbation=perturbation, out=out) is out
            assert torch.equal(out, want)
            assert (buffer[:, [0, 4]] == 7).all()
            assert (buffer[..., 1::2] == 7).all()
            inside = x0.clone()
            assert torch.equal(df.add_noise(inside, noise, LEVEL, perturbation=perturbation, out=inside), want)
            assert torch.equal(inside, want)

    def test_bumps_the_version(self, backend: str) -> None:
        out = torch.empty(SHAPE)
        before = out._version
        df.add_noise(torch.randn(SHAPE), NOISE, LEVEL, out=out)
        assert out._version > before

    def test_compile(self) -> None:
        def f(x0: Tensor, buffer: Tensor) -> Tensor:
            df.add_noise(x0, NOISE, LEVEL, out=buffer[:, :3])
            return buffer

        x0 = torch.randn(SHAPE)
        torch._dynamo.reset()
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(x0, torch.zeros(4, 5, 9, 8))
        assert torch.equal(got, f(x0, torch.zeros(4, 5, 9, 8)))
        torch._dynamo.reset()


def test_target_of_edm(backend: str) -> None:
    """F of Karras et al. 2022, table 1: (x0 - c_skip x_t) / c_out."""
    x0, sigma, data = torch.randn(SHAPE, dtype=torch.float64), 0.7, 0.5
    x_t, F = df.add_noise(x0, NOISE, df.Level(1.0, sigma), target=df.EDM(data))
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
    torch.testing.assert_close(F, (x0 - c_skip * x_t) / c_out, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [df.OffsetNoise, df.PyramidNoise])
def test_a_part_of_a_samples_channels_has_the_noise_of_the_whole(kind: type) -> None:
    whole = kind(df.Noise(3), 0.5).normal((2, 6, 4, 8))
    for first in (0, 2, 3):
        part = kind(df.Noise(3, first_element=first * 32), 0.5).normal((2, 3, 4, 8))
        torch.testing.assert_close(part, whole[:, first : first + 3], rtol=0.0, atol=1e-6)
    with pytest.raises(ValueError, match=f"{kind.__name__}: first_element must be a multiple of 32, .*, got 16"):
        kind(df.Noise(3, first_element=16), 0.5).normal((2, 3, 4, 8))
