"""Every way to a result gives the same bits: eager, dual numbers, torch.func, tracing, compilation, fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import dae_fast as df

SCHEDULE = df.Schedule.linear(50, 1e-3, 0.2)
T = torch.tensor([0, 7, 20, 49, 33])
NOISE = df.Noise(4).fold_in(2)
SHAPE = (5, 3, 8)
X, V, Y = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)) for k in range(3))
EPS = NOISE.normal(SHAPE)


def _huber(p: Tensor, eps: Any = NOISE) -> Tensor:
    return df.denoising_loss(p, Y, eps, SCHEDULE[T], predict="v", kind="huber", delta=0.3)


# Each of one tensor; and the same with eps in memory, which torch can be asked to differentiate by itself.
CALLS: dict[str, Callable[..., Tensor]] = {
    "add_noise": lambda x, eps=NOISE: df.add_noise(x, eps, SCHEDULE[T]),
    "target": lambda x, eps=NOISE: torch.stack(df.add_noise(x, eps, SCHEDULE[T], target="v")),
    "to_eps, clamp": lambda x, eps=NOISE: df.to_eps(x, Y, SCHEDULE[T], predict="v", clamp=0.5),
    "langevin_step": lambda x, eps=NOISE: df.langevin_step(x, 2 * x, 0.1, eps),
    "weighted_sum": lambda x, eps=NOISE: df.weighted_sum((0.3, x), (torch.ones(5), Y), (-0.5, eps)),
    "noise_mse": lambda p, eps=NOISE: df.noise_mse(p, eps),
    "noise_mse, none": lambda p, eps=NOISE: df.noise_mse(p, eps, reduction="none"),
    "huber": _huber,
    "reparameterise": lambda x, eps=NOISE: df.reparameterise(x, 0.1 * x, eps)[0],
    "corrupt": lambda x, eps=NOISE: df.corrupt(x, df.Masking(0.3, NOISE)),
}
calls = pytest.mark.parametrize("name", CALLS)
elementwise = [name for name in CALLS if name not in ("noise_mse", "huber", "noise_mse, none")]


@calls
def test_forward_mode(name: str) -> None:
    """The plain call's values; tangents by jvp, by dual numbers and by differences are one."""
    f = CALLS[name]
    value, tangent = torch.func.jvp(f, (X,), (V,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(X, V)))
    if name in elementwise:  # a loss is summed by torch there
        assert torch.equal(value, f(X)) and torch.equal(dual.primal, f(X))
    torch.testing.assert_close(value, f(X))
    torch.testing.assert_close(dual.tangent, tangent)
    assert tangent.abs().sum() > 0
    wide, h = X.double(), 1e-6
    differences = (f(wide + h * V.double()) - f(wide - h * V.double())) / (2 * h)
    torch.testing.assert_close(tangent.double(), differences, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name, backend_name", [*((name, "aot_eager") for name in CALLS), (next(iter(CALLS)), "eager")])
def test_compiled_forward_mode(name: str, backend_name: str) -> None:
    """Not zeros, as they once were."""
    f = CALLS[name]
    torch._dynamo.reset()

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(f, (x,), (V,))[1]

    torch.testing.assert_close(torch.compile(tangent, backend=backend_name)(X), tangent(X))


@pytest.mark.parametrize("name", ["noise_mse", "huber"])
def test_forward_over_reverse(name: str) -> None:
    """The second derivative, along V: of the formula with eps in memory by torch's own operations."""
    f = CALLS[name]
    got = torch.func.jvp(torch.func.grad(f), (X,), (V,))
    if name == "noise_mse":
        torch.testing.assert_close(got, (2 * (X - EPS) / X.numel(), 2 * V / X.numel()))
    else:
        h = 1e-5
        gradient = torch.func.grad(lambda p: f(p, EPS.double()))
        differences = (gradient(X.double() + h * V) - gradient(X.double() - h * V)) / (2 * h)
        torch.testing.assert_close(got[1].double(), differences, rtol=1e-3, atol=1e-6)
    assert got[1].abs().sum() > 0


@calls
def test_traced(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        return CALLS[name](x)

    wanted = f(X)
    for mode in ("real", "fake", "symbolic"):
        if mode != "real" and name not in ("noise_mse", "corrupt"):
            continue  # they close over tensors that are no inputs, which torch's own operations refuse as well
        torch.testing.assert_close(make_fx(f, tracing_mode=mode)(X)(X), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(f, (X,))  # twice, the second time with every table made
    torch.testing.assert_close(traced(X), wanted, rtol=0, atol=0 if name in elementwise else 1e-6)
    torch.testing.assert_close(traced(V), f(V))


def test_fake_tensors_with_one_level() -> None:
    with FakeTensorMode():
        x = torch.empty(SHAPE)
        for level in (SCHEDULE[3], df.Level(0.5, 0.5)):
            assert df.add_noise(x, NOISE, level).shape == SHAPE
            assert df.to_x0(x, x, level, clamp=1.0).shape == SHAPE
            assert df.denoising_loss(x, x, NOISE, level, predict="v").shape == ()


@pytest.mark.parametrize("way", [torch.vmap, lambda f: torch.func.functionalize(f)], ids=["vmap", "functionalize"])
@calls
def test_transformed(name: str, way: Any) -> None:
    f, batched = CALLS[name], way is torch.vmap
    got = way(f)(torch.stack((X, V)) if batched else X)
    wanted = torch.stack((f(X), f(V))) if batched else f(X)
    if name in elementwise:
        assert torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted)


def test_bounds_that_change_under_compilation() -> None:
    torch._dynamo.reset()
    x = 9 * X
    f = torch.compile(lambda x, c: df.to_x0(x, x, SCHEDULE[T], clamp=c), backend="aot_eager")
    for c in (0.5, 1.0, 0.25, 2.0):
        assert float(f(x, c).max()) == c


@pytest.mark.parametrize("which", ["key", "sample"])
@pytest.mark.parametrize("name", ["noise_mse", "noise_mse, none", "reparameterise", "add_noise"])
def test_noise_changed_before_backward(name: str, which: str) -> None:
    """As of any tensor that backward reads, torch says that it was modified."""
    key, ids = torch.tensor([7, 0]), torch.arange(5)
    noise = df.Noise(key) if which == "key" else df.Noise(7, sample=ids)
    leaf = X.clone().requires_grad_()
    level = df.Level(torch.tensor(0.5, requires_grad=True), torch.tensor(0.4, requires_grad=True))
    made = df.add_noise(leaf, noise, level) if name == "add_noise" else CALLS[name](leaf, noise)
    (key if which == "key" else ids)[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (made.sum() / 4).backward()


def test_saved_tensor_hooks_see_the_kept_gradient() -> None:
    """Checkpointing and offloading reach it, and pred.grad still takes it without a copy."""
    packed: list[int] = []
    leaf = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t.numel()), t)[1], lambda t: t):
        loss = df.noise_mse(leaf, NOISE)
    assert packed.count(X.numel()) == 2  # pred and its gradient
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * (X - EPS) / X.numel())
    again = df.noise_mse(leaf, NOISE)
    first = torch.autograd.grad(again, leaf, retain_graph=True)[0]
    first.mul_(5)  # what was handed out is the caller's
    torch.testing.assert_close(torch.autograd.grad(again, leaf)[0], 2 * (X - EPS) / X.numel())


def test_out_that_overlaps_through_another_storage() -> None:
    import numpy as np

    memory = np.zeros(65, dtype=np.float32)
    x, out = (torch.from_numpy(memory[k : k + 64]).view(4, 16) for k in (0, 1))
    with pytest.raises(ValueError, match="out and x0 partly overlap"):
        df.add_noise(x, NOISE, SCHEDULE[3], out=out)


@pytest.mark.parametrize("name", ["x0", "noise"])
def test_none_is_no_tensor(name: str) -> None:
    """Neither before the table is made nor after."""
    for _ in range(2):
        given: dict[str, Any] = {"x0": X, "noise": NOISE, "level": SCHEDULE[T]}
        df.add_noise(**given)
        with pytest.raises(TypeError, match=f"{name} must be a"):
            df.add_noise(**{**given, name: None})


def test_caches_are_bounded() -> None:
    schedule = df.Schedule.linear(20)
    for k in range(200):
        df.add_noise(X, NOISE, schedule[T.clamp(max=19)], perturbation=k / 1000 + 0.001)
        weight = df.weighting.MinSNR(1 + k / 10)
        df.denoising_loss(X, Y, NOISE, schedule[3], predict="v", weight=weight)
    assert len(schedule._tables) <= 64
