"""Langevin chains of a Gaussian mixture, every step in one launch: beside the stepped loop, and beside each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dae_fast as df
from dae_fast.info import build_error
from dae_fast.kernels import native
from dae_fast.kernels.spec import Update
from dae_fast.samplers import DoubleWell, GaussianMixture, langevin

from . import cuda_on_cpu, cuda_sass
from .conftest import BACKENDS
from .exact import Mixture

NOISE = df.Noise(11).fold_in(2)
LENGTHS = (1, 2, 3, 4, 5, 8, 31, 32, 33, 64, 127, 128)  # from one lane to a warp, whole lanes and not
STEPS = 13
needs_native = pytest.mark.skipif("native" not in df.backend_names(), reason="needs the native backend")


def mixture(K: int, D: int) -> GaussianMixture:
    g = torch.Generator().manual_seed(K + D)
    means, stds = torch.randn(K, D, generator=g), 0.5 + torch.rand(K, D, generator=g)
    return GaussianMixture(torch.rand(K, generator=g) + 0.1, means, stds)


def starts(B: int, D: int) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(D))


def stepped(score: Callable[[Tensor], Tensor], x: Tensor, noise: df.Noise = NOISE) -> Tensor:
    """By the loop: a function is not recognised."""
    return langevin(lambda at: score(at), x, 0.05, STEPS, noise, noise_scale=0.9)


def chained(score: Callable[[Tensor], Tensor], x: Tensor, noise: df.Noise = NOISE) -> Tensor:
    before = x.clone()
    moved = langevin(score, x, 0.05, STEPS, noise, noise_scale=0.9)
    assert torch.equal(x, before) and moved is not x
    return moved


def double_well(D: int) -> DoubleWell:
    """Of any D, and not so steep that a chain leaves it."""
    return DoubleWell(0.3, 0.9)


EXACT = {"one Gaussian": partial(mixture, 1), "double well": double_well}  # whose chains have the loop's bits


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of each launch of a chain."""
    found: list[int] = []

    def counted(chain: Callable[..., None], x: Tensor, score: Any, update: Update, *rest: Any) -> None:
        found.append(update.steps)
        chain(x, score, update, *rest)

    for name in ("chain", "well_chain"):
        monkeypatch.setattr(native, name, partial(counted, getattr(native, name)))
    return found


class TestScore:
    @pytest.mark.parametrize("K", [1, 3])
    def test_is_the_exact_one(self, K: int) -> None:
        g = torch.Generator().manual_seed(K)
        weights, means = torch.rand(K, generator=g, dtype=torch.float64) + 0.1, torch.randn(K, 4, generator=g).double()
        stds = 0.5 + torch.rand(K, 4, generator=g, dtype=torch.float64)
        law = Mixture((weights / weights.sum()).tolist(), means.tolist(), stds.tolist())
        x = starts(50, 4).double()
        got = GaussianMixture(weights, means, stds)(x.view(50, 2, 2))
        torch.testing.assert_close(got.view(50, 4), law.score(x, 1.0, 0.0), rtol=1e-12, atol=1e-12)

    def test_one_width_for_each_component(self) -> None:
        x = starts(9, 3)
        wide = GaussianMixture([1, 2], torch.eye(2, 3), [[0.5] * 3, [2.0] * 3])
        assert torch.equal(GaussianMixture([1, 2], torch.eye(2, 3), [0.5, 2.0])(x), wide(x))

    def test_bad_input(self) -> None:
        for weights, means, stds, message in (
            ([1.0], [[0.0]] * 2, [1.0], r"weights must be \(K,\) and means \(K, D\), got \(1,\) and \(2, 1\)"),
            ([1.0, 1.0], [[0.0]] * 2, [1.0], r"stds must have shape \(2, 1\) or \(2,\), got \(1,\)"),
            ([1.0, -1.0], [[0.0]] * 2, [1.0, 1.0], "weights and stds must be positive"),
            ([1.0], [[0.0]], [0.0], "weights and stds must be positive"),
        ):
            with pytest.raises(ValueError, match=f"GaussianMixture: {message}"):
                GaussianMixture(weights, means, stds)
        with pytest.raises(ValueError, match="x must have 1 elements a row, got 2"):
            langevin(GaussianMixture([1.0], [[0.0]], [1.0]), torch.ones(3, 2), 0.1, 2, NOISE)


@needs_native
class TestChain:
    @pytest.mark.parametrize("D", LENGTHS)
    @pytest.mark.parametrize("known", EXACT)
    def test_has_the_loops_bits(self, launches: list[int], D: int, known: str) -> None:
        score, x = EXACT[known](D), starts(67, D)
        assert torch.equal(chained(score, x), stepped(score, x))
        assert launches == [STEPS]

    @pytest.mark.parametrize("D", LENGTHS)
    def test_of_a_mixture_is_as_good_as_the_loop(self, launches: list[int], D: int) -> None:
        """The score's sums have another order, and e^x is a polynomial of our own: held to the loop in fp64."""
        score, x = mixture(5, D), starts(67, D)
        exact = stepped(score, x.double())
        error, allowed = ((found - exact).abs().max() for found in (chained(score, x), stepped(score, x)))
        assert error <= 2 * allowed + 1e-6
        assert launches == [STEPS]

    def test_on_every_instruction_set(self, restore_isa: None) -> None:
        score, x = mixture(5, 33), starts(67, 33)
        wanted = chained(score, x)
        for isa in native.isas():
            native.use_isa(isa)
            assert torch.equal(chained(score, x), wanted)

    def test_a_batch_in_parts(self) -> None:
        score, x = mixture(3, 6), starts(40, 6)
        parts = [chained(score, x[k : k + 10], df.Noise(5, first_sample=k)) for k in range(0, 40, 10)]
        assert torch.equal(torch.cat(parts), chained(score, x, df.Noise(5)))
        ids = torch.arange(40)
        assert torch.equal(chained(score, x, df.Noise(5, sample=ids).to("cpu")), chained(score, x, df.Noise(5)))

    def test_of_images_and_views(self) -> None:
        score, x = mixture(3, 12), starts(20, 12)
        wanted = chained(score, x)
        assert torch.equal(chained(score, x.view(20, 3, 4)).view(20, 12), wanted)
        assert torch.equal(chained(score, torch.stack((x, x), -1)[..., 0]), wanted)

    def test_what_has_no_kernel_is_stepped(self, launches: list[int]) -> None:
        for x in (starts(4, 129), starts(4, 8).double(), starts(4, 8).bfloat16(), torch.empty(0, 8)):
            score = mixture(2, x.shape[1])
            assert torch.equal(chained(score, x), stepped(score, x))
        score, x = mixture(2, 8), starts(4, 8)
        langevin(score, x, torch.tensor(0.1), 2, NOISE)
        with df.use_backend("reference"):
            chained(score, x)
        assert not launches
        assert torch.equal(langevin(score, x, 0.1, 0, NOISE), x)

    def test_a_double_well_settles_at_its_law(self) -> None:
        """exp(-h (x^2 - b^2)^2), by the moments that quadrature finds; the step's bias is of order h."""
        x = langevin(DoubleWell(1.0, 0.8), starts(2048, 8), 0.005, 1500, df.Noise(3)).double()
        grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)
        density = torch.exp(-((grid.square() - 0.64) ** 2))
        for power in (1, 2, 4):
            wanted = float((grid**power * density).sum() / density.sum())
            assert abs(float(x.pow(power).mean()) - wanted) < 0.03, power

    def test_settles_at_its_law(self) -> None:
        """Long chains of a mixture whose law is known; the step's bias is of order h."""
        law = Mixture([0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], [[0.6, 0.7], [0.5, 0.8]])
        score = GaussianMixture(law.weights, law.means, law.stds)
        x = langevin(score, starts(4096, 2), 0.01, 2000, df.Noise(3))
        assert law.distance(x) < 3 * law.yardstick(4096)


@needs_native
@pytest.mark.parametrize("K", [0, 1, 5])
@pytest.mark.parametrize("D", LENGTHS)
def test_cuda_has_the_cpus_bits(cuda_on_cpu_library: Path, D: int, K: int) -> None:
    """More rows than a thread block holds, and the last one alone in its own. K = 0: a double well."""
    score, x = mixture(K, D) if K else double_well(D), starts(257 if D <= 8 else 19, D)
    wanted = chained(score, x)
    with cuda_on_cpu.running(cuda_on_cpu_library):
        assert torch.equal(chained(score, x), wanted)


@needs_native
@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")
@pytest.mark.parametrize("K", [0, 1, 4])
@pytest.mark.parametrize("D", [3, 33, 128])
def test_triton_has_the_chain(D: int, K: int) -> None:
    """The native one's, but for the order of a mixture's sums; tests/triton_ptx.py compares what it compiles to."""
    score, x = mixture(K, D) if K else double_well(D), starts(19, D)
    ids = df.Noise(5, sample=torch.arange(19) + 7).fold_in(1)
    for noise in (NOISE, ids, NOISE.to("cpu")):
        wanted = chained(score, x, noise)
        with df.use_backend("triton"):
            torch.testing.assert_close(chained(score, x, noise), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(build_error("cuda") is not None, reason=f"no CUDA library: {build_error('cuda')}")
def test_instructions_a_step() -> None:
    """Of a lane's four elements, one Gaussian; the keys, made once for as many steps as a row has lanes, left out."""
    pytest.importorskip("triton", reason="its disassembler is used")
    (kernel,) = (f for f in cuda_sass.functions("sm_90") if "chain_kernelILi1E" in f.mangled)
    branches = [(at, re.search(r"\bBRA.*?0x([0-9a-f]+)", text)) for at, text in kernel.lines]
    loops = [(at - start) // 16 + 1 for at, b in branches if b and (start := int(b[1], 16)) < at]
    assert min(loops) <= 195
    assert kernel.registers <= 48
