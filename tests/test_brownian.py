"""BrownianNoise: its law worked out from the nodes' coefficients, and its values."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import dae_fast as df

from . import cuda_on_cpu
from .test_graphs import Net, tapes  # noqa: F401  a fixture

NOISE = df.Noise(3)
PATH = df.BrownianNoise(NOISE, -1.0, 3.0)
SHAPE = (3, 2, 5)


def covariance(path: df.BrownianNoise, first: tuple[float, float], second: tuple[float, float]) -> float:
    """Of two increments: the nodes' normals are independent."""
    a, b = path._moved("between", *first)[0], path._moved("between", *second)[0]
    return sum(c * b.get(node, 0.0) for node, c in a.items())


@pytest.mark.parametrize("depth", [1, 4, 24, 52])
def test_the_law_is_brownian(depth: int) -> None:
    """Cov(W(s), W(t)) = min(s, t) exactly where times are places of the tree; increments that do not overlap are
    independent."""
    path = df.BrownianNoise(NOISE, -1.0, 3.0, depth=depth)
    places = sorted({-1 + 4 * round(u * 2**depth) / 2**depth for u in (0.0, 0.07, 0.3, 0.31, 0.5, 0.77, 1.0)})
    for s in places:
        for t in places:
            found = covariance(path, (-1.0, s), (-1.0, t))
            assert abs(found - (min(s, t) + 1)) < 1e-12, (s, t)
    for a, b, c in zip(places, places[1:], places[2:], strict=False):
        assert abs(covariance(path, (a, b), (b, c))) < 1e-12
        assert abs(covariance(path, (a, b), (a, b)) - (b - a)) < 1e-12


def test_values_are_those_of_the_tree(backend: str) -> None:
    """Level by level as Levy has it: the middle of an interval is the mean of its ends and a normal of its own."""
    path = df.BrownianNoise(NOISE, 0.0, 1.0, depth=2)
    z = [NOISE.fold_in(0x77696E72).fold_in(n).normal(SHAPE, dtype=torch.float64) for n in range(4)]
    half = z[0] / 2 + z[1] / 2
    quarter, last = half / 2 + z[2] / 8**0.5, (half + z[0]) / 2 + z[3] / 8**0.5
    for t, wanted in ((0.25, quarter), (0.5, half), (0.75, last), (1.0, z[0])):
        torch.testing.assert_close(path.between(0.0, t, SHAPE, dtype=torch.float64), wanted)
        assert torch.equal(path.between(t, 0.0, SHAPE), -path.between(0.0, t, SHAPE))
    found = path.increment(0.75, 0.25, SHAPE, dtype=torch.float64)
    torch.testing.assert_close(found, (quarter - last) / 0.5**0.5)


@pytest.mark.parametrize("gpu_code", [False, True], ids=["cpu", "cuda on cpu"])
@pytest.mark.skipif("native" not in df.backend_names(), reason="needs the native backend")
def test_one_launch_has_the_bits_of_a_launch_a_normal(request: pytest.FixtureRequest, gpu_code: bool) -> None:
    place = request.getfixturevalue("cuda_on_cpu_library") if gpu_code else None
    for shape in ((3, 2, 5), (2, 1300), (1, 7), (40, 1)):
        ids = df.Noise(3, sample=torch.arange(shape[0]) + 9)
        for noise in (NOISE, ids, ids.to("cpu")):
            path, total = df.BrownianNoise(noise, 0.0, 1.0), torch.zeros(shape)
            stream = noise.fold_in(0x77696E72)
            for node, c in path._moved("between", 0.9, 0.3)[0].items():
                total = df.weighted_sum((1.0, total), (c, stream.fold_in(node)))
            with cuda_on_cpu.running(place) if place else nullcontext():
                assert torch.equal(path.between(0.9, 0.3, shape), total)
                assert not path.between(0.3, 0.3, shape).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_increments_add_up_whatever_the_steps(dtype: torch.dtype) -> None:
    whole = PATH.between(2.9, -0.9, (40, 30), dtype=torch.float64)
    for steps in (1, 3, 10):
        times = torch.linspace(2.9, -0.9, steps + 1, dtype=torch.float64).tolist()
        total = sum(PATH.between(t, s, (40, 30), dtype=dtype).double() for t, s in itertools.pairwise(times))
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 30 * torch.finfo(dtype).eps)
        torch.testing.assert_close(total, whole, rtol=0, atol=tolerance)


def test_increments_are_standard_and_independent() -> None:
    """Samples of the distribution: variance 1, no correlation between steps or elements, Gaussian fourth moment."""
    times = [3.0, 2.4, 0.1, 0.0999, -1.0]
    steps = torch.stack([PATH.increment(t, s, (1000, 40)) for t, s in itertools.pairwise(times)]).flatten(1)
    torch.testing.assert_close(torch.cov(steps), torch.eye(4), rtol=0, atol=0.03)
    assert (steps.pow(4).mean(1) - 3).abs().max() < 0.2
    elements = torch.stack([PATH.increment(2.0, 1.0, (2000, 4)), PATH.fold_in(1).increment(2.0, 1.0, (2000, 4))], 2)
    torch.testing.assert_close(torch.cov(elements.flatten(1).T), torch.eye(8), rtol=0, atol=0.12)


def test_a_time_is_rounded_at_the_ends_too() -> None:
    beyond = PATH.between(3.0 + 4e-16, -1.0 - 2.0**-27, SHAPE)
    assert torch.equal(beyond, PATH.between(3.0, -1.0, SHAPE))


def test_a_sample_knows_nothing_of_its_batch() -> None:
    whole = PATH.increment(2.0, 1.3, (8, 6))
    part = df.BrownianNoise(df.Noise(3, first_sample=5), -1.0, 3.0)
    assert torch.equal(part.increment(2.0, 1.3, (3, 6)), whole[5:])
    in_memory = df.BrownianNoise(NOISE.to("cpu"), -1.0, 3.0)
    assert torch.equal(in_memory.increment(2.0, 1.3, (8, 6)), whole)
    assert torch.equal(copy.deepcopy(PATH).increment(2.0, 1.3, (8, 6)), whole)
    assert torch.equal(PATH.increment(2.0, 1.3, (8, 2, 3)).flatten(1), whole)


def test_as_the_noise_of_a_stochastic_sampler_steps_converge_on_one_path() -> None:
    """Euler-Maruyama of dx = -x dt + sqrt(2) dW: halving the step halves the distance to the fine solution."""

    def end(steps: int) -> torch.Tensor:
        path, x = df.BrownianNoise(NOISE, 0.0, 1.0), torch.ones(500, 4)
        times = torch.linspace(0, 1, steps + 1).tolist()
        for t, s in itertools.pairwise(times):
            x = df.langevin_step(x, -x, s - t, path.increment(t, s, x.shape))
        return x

    fine = end(256)
    errors = [float((end(steps) - fine).square().mean().sqrt()) for steps in (8, 16, 32)]
    assert all(1.7 < a / b < 2.6 for a, b in itertools.pairwise(errors)), errors


def test_bad_input() -> None:
    for call, error, message in (
        (lambda: df.BrownianNoise(3, 0.0, 1.0), TypeError, "BrownianNoise: noise must be a Noise, got int"),
        (lambda: df.BrownianNoise(NOISE, 1.0, 1.0), ValueError, "t1 must be above t0, got 1.0 and 1.0"),
        (lambda: df.BrownianNoise(NOISE, 0.0, 1.0, depth=53), ValueError, r"depth must be in \[1, 52\], got 53"),
        (lambda: PATH.between(0.0, 3.5, SHAPE), ValueError, r"between: s must be in \[-1.0, 3.0\], got 3.5"),
        (lambda: PATH.between(0.0, 3.0 + 2.0**-22, SHAPE), ValueError, r"between: s must be in \[-1.0, 3.0\], got 3.0"),
        (lambda: PATH.increment(0.5, 0.5, SHAPE), ValueError, "increment: t and s must differ at depth 24, got 0.5"),
        (lambda: PATH.between(0.0, 1.0, SHAPE, dtype=torch.int64), TypeError, "between: dtype must be float16"),
    ):
        with pytest.raises(error, match=message):
            call()


SIGMAS = df.Schedule.karras(T=160)
FLOW = df.Schedule.flow(160)


def denoised(x: Tensor, t: Tensor) -> Tensor:
    """x0 of data N(0, 0.5^2)."""
    return x * 0.25 / (0.25 + SIGMAS.sigma[t, None].to(x.dtype) ** 2)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = (c[t, None].to(x.dtype) for c in (FLOW.alpha, FLOW.sigma))
    return (sigma - 0.25 * alpha) / (0.25 * alpha**2 + sigma**2) * x


@pytest.mark.parametrize("name", ["EulerAncestral", "DPMSolverPP2MSDE", "FlowSDE"])
def test_a_sampler_takes_it_as_its_noise(name: str) -> None:
    """20, 40 and 80 steps are of one path and come closer; with a plain Noise they are samples apart."""
    of_flow = name == "FlowSDE"
    net, schedule, options = (velocity, FLOW, {}) if of_flow else (denoised, SIGMAS, {"predict": "x0"})
    path = df.BrownianNoise(NOISE, 0.0, 1.0 if of_flow else 80.0)

    def sample(steps: int, noise: Any) -> Tensor:
        return getattr(df.samplers, name)(schedule, steps=steps, **options).sample(net, (100, 4), noise)

    def apart(noise: Any) -> list[float]:
        found = [sample(steps, noise) for steps in (20, 40, 80)]
        return [float((b - a).std()) for a, b in itertools.pairwise(found)]

    near, far = apart(path), apart(NOISE)
    assert far[1] > 6 * near[1] and near[0] > (1.1 if of_flow else 1.5) * near[1], (near, far)


def test_the_noise_of_a_step_is_the_increment_between_its_sigmas() -> None:
    ancestral = df.samplers.EulerAncestral(SIGMAS, steps=5, predict="x0")
    path = df.BrownianNoise(NOISE, 0.0, 80.0)
    sigma = [*SIGMAS.sigma[list(ancestral.levels)].tolist(), 0.0]
    x = ancestral.start((6, 4), path)
    assert torch.equal(x, ancestral.start((6, 4), NOISE))
    for i, t in enumerate(ancestral.model_times(x)):
        z = path.increment(sigma[i], sigma[i + 1], x.shape)
        by_hand, x = ancestral.step(i, x, denoised(x, t), z), ancestral.step(i, x, denoised(x, t), path)
        assert torch.equal(x, by_hand)
    assert torch.equal(x, ancestral.sample(denoised, (6, 4), path))
    part = df.BrownianNoise(df.Noise(3, first_sample=4), 0.0, 80.0)
    assert torch.equal(ancestral.sample(denoised, (2, 4), part), x[4:])
    short = df.samplers.euler_ancestral(denoised, (6, 4), SIGMAS, path, steps=5, predict="x0")
    assert torch.equal(short, x)
    leaf = path.increment(80.0, 1.0, (6, 4)).requires_grad_()
    ancestral.sample(denoised, leaf, path, gradients=True).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


class Told(Net):  # type: ignore[misc]
    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor) -> Tensor:
        return super().forward(x, 0 * t) + 0.1 * x_self_cond


def test_a_graph_replays_the_paths_of_other_keys(tapes: list[Any]) -> None:  # noqa: F811
    """With self-conditioning besides; another span of time is another graph."""
    sampler, net = df.samplers.EulerAncestral(SIGMAS, steps=4, predict="x0", self_condition=True), Told()
    x = torch.ones(3, 4, 5)
    for noise, t1 in ((NOISE, 80.0), (df.Noise(4).to("cpu"), 80.0), (NOISE, 81.0)):
        path = df.BrownianNoise(noise, 0.0, t1)
        assert torch.equal(sampler.sample(net, x, path, graph=True), sampler.sample(net, x, path))
    assert [tape.replays for tape in tapes] == [2, 1]


def test_where_a_sampler_has_no_use_for_a_path() -> None:
    x, path = torch.ones(2, 3), df.BrownianNoise(NOISE, 0.0, 80.0)
    vp, ve = df.Schedule.linear(20, 0.005, 0.4), df.Schedule.geometric(5, 0.1, 2.0)
    churned = df.samplers.Heun(SIGMAS, steps=3, S_churn=1.0, conditioning="sigma", predict="x0")
    zero = df.samplers.DDPM(vp.zero_terminal_snr(), predict="v")
    for call, error, message in (
        (
            lambda: df.samplers.AnnealedLangevin(ve).step(0, x, x, path),
            ValueError,
            "annealed_langevin: step 0 moves at one level, where a path has no increment: noise must be a Noise",
        ),
        (lambda: df.samplers.PredictorCorrector(ve).step(1, x, x, path), ValueError, "step 1 moves at one level"),
        (
            lambda: churned.churned(0, x, path),
            TypeError,
            "heun: S_churn goes back .* must be a Noise, got BrownianNoise",
        ),
        (lambda: zero.step(0, x, x, path), ValueError, "ddpm: step 0 is from a level without signal"),
        (
            lambda: df.samplers.EulerAncestral(SIGMAS).step(0, x, x, df.BrownianNoise(NOISE, 0.0, 9.0)),
            ValueError,
            r"increment: t must be in \[0.0, 9.0\], got 80",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
