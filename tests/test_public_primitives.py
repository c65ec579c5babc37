"""The primitives as anybody calls them: weighted_sum, clamped, residual_loss and LevelOp, against plain torch."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import dae_fast as df

NOISE = df.Noise(3).fold_in(1)
SCHEDULE = df.Schedule.linear(50, 1e-3, 0.2)
B = 5
SHAPE = (B, 3, 8)


def randn(seed: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def column(c: Any, like: Tensor) -> Any:
    return c.reshape(*c.shape, *[1] * (like.dim() - c.dim())) if isinstance(c, Tensor) else c


COEFFICIENTS: dict[str, Any] = {
    "floats": (0.5, -2.0, 1.5, 3, -0.25),
    "a tensor ()": (torch.tensor(0.5), -2.0, torch.tensor(1.5).double(), 0.0, torch.tensor(2.0)),
    "(B,)": (randn(11, (B,)), randn(12, (B,)).float(), -1.0, randn(13, (B,)), randn(14, (B,))),
    "(1,)": (randn(11, (1,)), randn(12, (B,)), 2.0, randn(13, (1,)), 0.5),
    "(B, F)": (randn(11, (B, 3)), randn(12, (B,)), -1.0, randn(13, (B, 3)), randn(14, (B, 3))),
}


@pytest.mark.parametrize("fresh", [False, True], ids=["tensor", "Noise"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_sums(backend: str, name: str, count: int, fresh: bool) -> None:
    """Of one to five terms, the last perhaps a Noise, and their gradients."""
    row = [c.clone().requires_grad_() if isinstance(c, Tensor) else c for c in COEFFICIENTS[name][:count]]
    tensors = [randn(k).requires_grad_() for k in range(count)]
    eps = NOISE.normal(SHAPE, dtype=torch.float64)
    given: list[Any] = list(tensors)
    if fresh and count > 1:
        given[-1], tensors[-1] = NOISE, eps
    got = df.weighted_sum(*zip(row, given, strict=True))
    wanted = sum(column(c, t) * t for c, t in zip(row, tensors, strict=True))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    leaves = [t for t in (*tensors, *row) if isinstance(t, Tensor) and t.requires_grad]
    g = randn(40)
    for ours, theirs in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(df.weighted_sum(*zip(row, given, strict=True)), got)


def test_a_second_output_and_out(backend: str) -> None:
    x, y = randn(0), randn(1)
    first, second = df.weighted_sum((0.5, x), (2.0, y), (1.0, NOISE), also=(1.0, torch.full((B,), -1.0), 0.25))
    eps = NOISE.normal(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(first, 0.5 * x + 2 * y + eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second, x - y + 0.25 * eps, rtol=1e-6, atol=1e-6)
    wanted = df.weighted_sum((0.5, x), (2.0, y))
    for out in (torch.empty_like(x), x):
        version = out._version
        assert df.weighted_sum((0.5, x.clone()), (2.0, y), out=out) is out
        assert torch.equal(out, wanted)
        assert out._version > version


@pytest.mark.parametrize("fresh", [False, True], ids=["tensor", "Noise"])
@pytest.mark.parametrize("clamps", [False, True], ids=["plain", "clamped"])
def test_five_streams_are_one_launch_on_every_route(
    monkeypatch: pytest.MonkeyPatch, backend: str, clamps: bool, fresh: bool
) -> None:
    tensors = [randn(k, dtype=torch.float32) for k in range(5)]
    last = NOISE if fresh else tensors[4]

    def call(x: Tensor, y: Tensor, z: Tensor, w: Tensor, v: Any = last) -> Tensor:
        second: Any = df.clamped((0.4, x), (2.0, y), (-0.7, w), low=-0.5, high=0.6) if clamps else y
        more = () if clamps else ((1.25, w),)
        return df.weighted_sum((0.5, x), (-1.5, second), (0.75, z), *more, (0.3, v))

    plain = call(*tensors[:4])
    eps = NOISE.normal(SHAPE) if fresh else tensors[4]
    x, y, z, w = tensors[:4]
    second = (0.4 * x + 2 * y - 0.7 * w).clamp(-0.5, 0.6) if clamps else y
    wanted = 0.5 * x - 1.5 * second + 0.75 * z + 0.3 * eps + (0 if clamps else 1.25 * w)
    torch.testing.assert_close(plain, wanted, rtol=1e-5, atol=1e-5)
    with monkeypatch.context() as patched:  # the general way
        patched.setattr("dae_fast.primitives.fast_map", lambda *_: None)
        assert torch.equal(call(*tensors[:4]), plain)
    out = tensors[1].clone()
    if not clamps:
        df.weighted_sum((0.5, x), (-1.5, out), (0.75, z), (1.25, w), (0.3, last), out=out)
        assert torch.equal(out, plain)
    batched = torch.func.vmap(call)(*(t.unsqueeze(0) for t in tensors[:4]), *(() if fresh else (last.unsqueeze(0),)))
    torch.testing.assert_close(batched[0], plain, rtol=1e-6, atol=1e-6)
    _, tangent = torch.func.jvp(call, tuple(tensors[:4]), tuple(torch.ones_like(t) for t in tensors[:4]))
    inside = (0.4 * x + 2 * y - 0.7 * w).abs() if clamps else None
    assert tangent.isfinite().all() and (inside is not None or torch.allclose(tangent, torch.full_like(x, 1.0)))
    wide = [t[:2, :, :3].double().requires_grad_() for t in tensors]  # a few: each element costs two calls
    assert torch.autograd.gradcheck(call, wide[:4] if fresh else wide)


@pytest.mark.parametrize("fresh", [False, True], ids=["tensor", "Noise"])
def test_where_and_otherwise_on_every_route(monkeypatch: pytest.MonkeyPatch, backend: str, fresh: bool) -> None:
    known, x, z = (randn(k, dtype=torch.float32) for k in range(3))
    m = randn(4, (B, 1, 8), torch.float32).clamp(0, 1)
    alpha, second = randn(5, (B,)), NOISE if fresh else z
    eps = NOISE.normal(SHAPE) if fresh else z

    def call(known: Tensor, x: Tensor, m: Tensor, z: Any = second, **out: Tensor) -> Tensor:
        return df.weighted_sum((alpha, known), (0.5, z), where=m, otherwise=x, **out)

    plain = call(known, x, m)
    torch.testing.assert_close(plain, x.lerp(column(alpha, x).float() * known + 0.5 * eps, m), rtol=1e-5, atol=1e-6)
    assert torch.equal(call(known, x, m.expand(SHAPE).contiguous()), plain)
    swapped = df.weighted_sum((0.5, second), (alpha, known), where=m, otherwise=x)
    torch.testing.assert_close(swapped, plain, rtol=1e-5, atol=1e-6)
    chosen = df.weighted_sum((1.0, known), where=m > 0.5, otherwise=x)
    assert torch.equal(chosen, torch.where(m > 0.5, known, x))
    assert df.weighted_sum((1.0, known.half()), where=m, otherwise=x.half()).dtype == torch.float16
    with monkeypatch.context() as patched:  # the general way
        patched.setattr("dae_fast.primitives.fast_map", lambda *_: None)
        assert torch.equal(call(known, x, m), plain)
    out = x.clone()
    assert torch.equal(call(known, out, m, out=out), plain) and torch.equal(out, plain)
    per_frame = df.weighted_sum((alpha[:, None].expand(B, 3), known), (0.5, second), where=m, otherwise=x)
    torch.testing.assert_close(per_frame, plain, rtol=1e-6, atol=1e-6)
    batched = torch.func.vmap(call, (0, None, None))(torch.stack((known, x)), x, m)
    assert torch.equal(batched, torch.stack((plain, call(x, x, m))))
    wide = [t.double().requires_grad_() for t in (known, x, m, *(() if fresh else (z,)))]
    assert torch.autograd.gradcheck(call, wide, check_forward_ad=True, fast_mode=True)
    half = [t.detach().bfloat16().requires_grad_() for t in wide]
    for g, judge in zip(*(torch.autograd.grad(call(*t).sum(), t) for t in (half, wide)), strict=True):
        torch.testing.assert_close(g.double(), judge, rtol=0.02, atol=0.05)


def test_where_is_refused() -> None:
    x, m = randn(0), torch.ones(B, 1, 8)
    for arguments, message in (
        ({"where": m}, "weighted_sum: where and otherwise are given together"),
        ({"otherwise": x}, "weighted_sum: where and otherwise are given together"),
        ({"where": m, "otherwise": x, "also": (1.0,)}, "weighted_sum: with where there is one output, of a tensor or"),
        ({"where": m.long(), "otherwise": x}, "weighted_sum: where must be a bool or floating tensor, got torch.int64"),
        ({"where": m[0], "otherwise": x}, "weighted_sum: where must have as many dimensions as (5, 3, 8), 1 where it"),
        (
            {"where": m[..., :3], "otherwise": x},
            "weighted_sum: where must be broadcastable to (5, 3, 8), got (5, 1, 3)",
        ),
        ({"where": m, "otherwise": x[:2]}, "weighted_sum: otherwise must have shape (5, 3, 8), got (2, 3, 8)"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
            df.weighted_sum((1.0, x), **arguments)
    with pytest.raises(ValueError, match="of a tensor or of two terms, none clamped"):
        df.weighted_sum((1.0, NOISE), where=m, otherwise=x)


def test_dtypes_are_promoted(backend: str) -> None:
    x, y = randn(0, dtype=torch.bfloat16), randn(1, dtype=torch.float32)
    got = df.weighted_sum((2.0, x), (0.5, y))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, 2 * x.float() + 0.5 * y)


@pytest.mark.parametrize("outside", [False, True], ids=["one launch", "two"])
def test_a_clamped_estimate(backend: str, outside: bool) -> None:
    """The step of a sampler whose x0 estimate is limited; what the estimate reads may be a term too."""
    x, pred = (randn(k).requires_grad_() for k in range(2))
    a, c = randn(5, (B,)).abs(), randn(6, (B,))
    terms: list[Any] = [(c, x), (0.7, df.clamped((a, x), (-0.5, pred), low=-1, high=0.5)), (0.2, NOISE)]
    estimate = (column(a, x) * x - 0.5 * pred).clamp(-1, 0.5)
    wanted = column(c, x) * x + 0.7 * estimate + 0.2 * NOISE.normal(SHAPE, dtype=torch.float64)
    if outside:
        terms.append((1.5, pred))
        wanted = wanted + 1.5 * pred
    got = df.weighted_sum(*terms)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    g = randn(9)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, pred), g), torch.autograd.grad(wanted, (x, pred), g), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mse", "l1", "huber", "pseudo_huber"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_residual_losses(backend: str, count: int, reduction: Any, kind: Any) -> None:
    pred, x0, y = (randn(k).requires_grad_() for k in range(3))
    terms: list[Any] = [(0.8, NOISE), (randn(7, (B,)), x0), (-0.5, y)][:count]
    weight, mask = randn(8, (B,)).abs(), randn(9) > -1
    delta = 0.4 if "huber" in kind else None
    got = df.residual_loss(pred, *terms, weight=weight, kind=kind, delta=delta, mask=mask, reduction=reduction)
    plain = [NOISE.normal(SHAPE, dtype=torch.float64), x0, y]
    r = pred - sum(column(c, pred) * t for (c, _), t in zip(terms, plain, strict=False))
    rho = {
        "mse": r**2,
        "l1": r.abs(),
        "huber": torch.nn.functional.huber_loss(r, torch.zeros_like(r), reduction="none", delta=0.4),
        "pseudo_huber": 0.8 * (torch.hypot(r, torch.tensor(0.4).double()) - 0.4),
    }[kind]
    sums = torch.where(mask, rho, 0).flatten(1).sum(1)
    each = weight * (sums if reduction == "sum" else sums / mask.flatten(1).sum(1))
    wanted = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    leaves = [pred, *([x0] if count > 1 else []), *([y] if count > 2 else [])]
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_op_of_ones_own(backend: str) -> None:
    """The built-in one, said again; its table is made once."""
    schedule = df.Schedule.linear(20, 1e-3, 0.2)
    made = []

    def coefficients(alpha: Any, sigma: Any) -> dict[str, Any]:
        made.append(type(alpha))
        return {"x_t": 1 / alpha, "pred": -sigma / alpha}

    op = df.LevelOp("mine", coefficients)
    assert op.inputs == ("x_t", "pred")
    x_t, pred, t = randn(0), randn(1), torch.tensor([0, 3, 19, 7, 7])
    for level in (schedule[t], schedule[4], df.Level(0.6, 0.8), df.Level(torch.tensor(0.6), torch.rand(B) + 0.1)):
        assert torch.equal(op(level, x_t=x_t, pred=pred), df.to_x0(x_t, pred, level))
    calls = len(made)
    op(schedule[t], x_t=x_t, pred=pred)
    assert len(made) == calls
    with pytest.raises(TypeError, match="mine: inputs must be x_t, pred, got x"):
        op(schedule[t], x=x_t)
    with pytest.raises(ValueError, match=r"mine: pred must have shape \(5, 3, 8\), got \(4, 3, 8\)"):
        op(schedule[t], x_t=x_t, pred=pred[:4])
    with pytest.raises(ValueError, match="mine: has no finite value at alpha = 0"):
        op(df.Level(0.0, 1.0), x_t=x_t, pred=pred)


def test_an_op_of_torchs_functions_and_two_outputs(backend: str) -> None:
    op = df.LevelOp(
        "both",
        lambda alpha, sigma: {"x": torch.sqrt(alpha), "estimate": -1.0, "noise": sigma},
        also=lambda alpha, sigma: {"estimate": torch.ones_like(alpha)},
        estimate=lambda alpha, sigma: {"x": alpha, "pred": torch.exp(-sigma)},
    )
    x, pred = randn(0), randn(1)
    level = df.Level(0.5, 0.25)
    first, second = op(level, x=x, pred=pred, noise=NOISE, low=-0.3, high=0.4)
    estimate = (0.5 * x + math.exp(-0.25) * pred).clamp(-0.3, 0.4)
    torch.testing.assert_close(second, estimate, rtol=1e-6, atol=1e-6)
    eps = NOISE.normal(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(first, 0.5**0.5 * x - estimate + 0.25 * eps, rtol=1e-6, atol=1e-6)


def test_errors_name_the_term() -> None:
    x = randn(0)
    for call, error, match in (
        (lambda: df.weighted_sum(), ValueError, "weighted_sum: needs a term"),
        (lambda: df.weighted_sum((1.0, x), x), TypeError, r"term 1 must be a pair \(coefficient, tensor or Noise\)"),
        (lambda: df.weighted_sum((1.0, x), (1.0, None)), TypeError, "term 1 must be a tensor, got NoneType"),
        (lambda: df.weighted_sum((1.0, x), (1.0, x[:2])), ValueError, r"term 1 must have shape \(5, 3, 8\)"),
        (lambda: df.weighted_sum((1.0, x), ("a", x)), TypeError, "coefficient of term 1 must be a float or a tensor"),
        (
            lambda: df.weighted_sum((torch.ones(4), x)),
            ValueError,
            r"coefficient of term 0 must be a float or have shape \(5,\)",
        ),
        (lambda: df.weighted_sum((1.0, NOISE)), TypeError, "needs a tensor besides the noise"),
        (lambda: df.weighted_sum((1.0, x), (1.0, NOISE), (1.0, NOISE)), ValueError, "takes one Noise, got 2"),
        (lambda: df.weighted_sum(*[(1.0, randn(k)) for k in range(6)]), ValueError, "at most five terms"),
        (lambda: df.weighted_sum((1.0, x), also=(1.0, 2.0)), ValueError, "also must have 1 coefficients"),
        (lambda: df.clamped((1.0, x), low=2, high=1), ValueError, "clamped: low must not be above high, got 2.0"),
        (lambda: df.residual_loss(x, (1.0, x[:2])), ValueError, r"residual_loss: term 0 must have shape"),
        (lambda: df.residual_loss(x, kind="l3"), ValueError, "kind must be one of 'mse'"),  # type: ignore[arg-type]
        (lambda: df.residual_loss(x, kind="huber"), ValueError, "delta must be given for kind='huber'"),
    ):
        with pytest.raises(error, match=match):
            call()


class TestLevelsOfFrames:
    """A level for each frame: rows are (sample, frame), and the noise is that of the whole sample."""

    T = torch.randint(50, (4, 3), generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("length", [(8,), (4, 2, 3), (5,), ()], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_each_frame_is_noised_alone(self, backend: str, length: tuple[int, ...], dtype: torch.dtype) -> None:
        x = randn(0, (4, 3, *length), dtype)
        got = df.add_noise(x, NOISE, SCHEDULE[self.T])
        eps = NOISE.normal(x.shape, dtype=torch.float64)
        alpha, sigma = (c.float().double()[self.T] for c in (SCHEDULE.alpha, SCHEDULE.sigma))
        wanted = column(alpha, x) * x.double() + column(sigma, x) * eps
        assert got.dtype == dtype and got.shape == x.shape
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=max(rounding / 4, 1e-6))
        # The same bits from a level of each made by hand, from strides, and of one level as of samples alone.
        by_hand = df.Level(SCHEDULE.alpha[self.T], SCHEDULE.sigma[self.T])
        assert torch.equal(df.add_noise(x, NOISE, by_hand), got)
        strided = torch.empty(3, 4, *length, dtype=dtype).transpose(0, 1).copy_(x)
        assert torch.equal(df.add_noise(strided, NOISE, SCHEDULE[self.T]), got)
        one = SCHEDULE[torch.full((4, 3), 7)]
        assert torch.equal(df.add_noise(x, NOISE, one), df.add_noise(x, NOISE, SCHEDULE[7]))

    def test_every_op_takes_them(self, backend: str) -> None:
        x, y = randn(0, (4, 3, 8)), randn(1, (4, 3, 8))
        level, rows = SCHEDULE[self.T], SCHEDULE[self.T.flatten()]
        flat = [t.flatten(0, 1) for t in (x, y)]
        for op in (df.to_x0, df.to_eps, df.to_score, df.to_v):
            for clamp in (None, 0.5):
                got = op(x, y, level, predict="flow", clamp=clamp)
                assert torch.equal(got.flatten(0, 1), op(*flat, rows, predict="flow", clamp=clamp))
        x_t, v = df.add_noise(x, NOISE, level, target="v")
        eps = NOISE.normal(x.shape, dtype=torch.float64).flatten(0, 1)
        wanted = df.add_noise(flat[0], eps, rows, target="v")
        torch.testing.assert_close((x_t.flatten(0, 1), v.flatten(0, 1)), wanted)
        h = randn(3, (4, 3)).abs()
        stepped = df.langevin_step(x, y, h, NOISE)
        torch.testing.assert_close(stepped.flatten(0, 1), df.langevin_step(*flat, h.flatten(), eps))

    @pytest.mark.parametrize("shape", [(4, 3, 8), (4, 3, 5)], ids=str)
    @pytest.mark.parametrize("options", [{}, {"weight": "min_snr"}, {"kind": "huber", "delta": 0.3}], ids=str)
    def test_losses(self, backend: str, options: Any, shape: tuple[int, ...]) -> None:
        pred, x0 = (randn(k, shape).requires_grad_() for k in range(2))
        rows = SCHEDULE[self.T.flatten()]
        eps = NOISE.normal(shape, dtype=torch.float64).flatten(0, 1)
        for reduction in ("mean", "sum", "none"):
            got = df.denoising_loss(pred, x0, NOISE, SCHEDULE[self.T], predict="v", reduction=reduction, **options)
            flat = [t.flatten(0, 1) for t in (pred, x0)]
            wanted = df.denoising_loss(*flat, eps, rows, predict="v", reduction=reduction, **options)
            assert got.shape == ((4, 3) if reduction == "none" else ())
            torch.testing.assert_close(got.flatten(), wanted.flatten())
            for ours, theirs in zip(
                torch.autograd.grad(got.sum(), (pred, x0)), torch.autograd.grad(wanted.sum(), (pred, x0)), strict=True
            ):
                torch.testing.assert_close(ours, theirs)

    def test_gradients_and_tracing(self) -> None:
        x = randn(0, (4, 3, 8)).requires_grad_()
        alpha, sigma = (randn(k, (4, 3)).abs().requires_grad_() for k in (1, 2))
        assert torch.autograd.gradcheck(lambda x, a, s: df.add_noise(x, NOISE, df.Level(a, s)), (x, alpha, sigma))
        t = self.T

        def f(x: Tensor, t: Tensor) -> Tensor:
            return df.add_noise(x, NOISE, SCHEDULE[t])

        for traced in (torch.compile(f, backend="eager", fullgraph=True), torch.func.functionalize(f)):
            assert torch.equal(traced(x.detach(), t), f(x.detach(), t))
        got = torch.vmap(f)(x.detach()[None].expand(2, -1, -1, -1), t[None].expand(2, -1, -1))
        assert torch.equal(got[1], f(x.detach(), t))

    def test_bad_shapes(self) -> None:
        x = randn(0, (4, 3, 8))
        with pytest.raises(ValueError, match=r"level must have shape \(4, 3\), as the samples begin, got \(4, 2\)"):
            df.add_noise(x, NOISE, SCHEDULE[self.T[:, :2]])
        with pytest.raises(ValueError, match=r"level must be in \[0, 50\)"):
            df.add_noise(x, NOISE, SCHEDULE[self.T + 40])


@pytest.mark.parametrize("t", [3, torch.tensor(3), torch.tensor([3]), torch.tensor([3], dtype=torch.int32)], ids=str)
def test_one_level_for_all(backend: str, t: Any) -> None:
    x = randn(0)
    wanted = df.add_noise(x, NOISE, SCHEDULE[torch.full((B,), 3)])
    assert torch.equal(df.add_noise(x, NOISE, SCHEDULE[t]), wanted)
    assert torch.equal(df.add_noise(x[:1], NOISE, SCHEDULE[t]), wanted[:1])
    loss = df.denoising_loss(x, x, NOISE, SCHEDULE[t], predict="v")
    torch.testing.assert_close(loss, df.denoising_loss(x, x, NOISE, SCHEDULE[torch.full((B,), 3)], predict="v"))


@pytest.mark.parametrize("first", [0, 4, 64, 3, 17, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_shard_of_a_sample_has_its_part_of_the_noise(backend: str, first: int, dtype: torch.dtype) -> None:
    whole = df.Noise(9).fold_in(2)
    shard = df.Noise(whole.key, first_element=first)
    for D in (1, 5, 64, 130, 1500):
        wanted = whole.normal((3, first + D), dtype=dtype)[:, first:]
        assert torch.equal(shard.normal((3, D), dtype=dtype), wanted)
        assert torch.equal(shard.bits((3, D)), whole.bits((3, first + D))[:, first:])
        x = randn(0, (3, D), dtype)
        padded = torch.cat((torch.zeros(3, first, dtype=dtype), x), 1)
        level = SCHEDULE[torch.tensor([1, 30, 2])]
        part = df.add_noise(padded, whole, level)[:, first:]
        assert torch.equal(df.add_noise(x, shard, level), part)
        masking, of_shard = (df.Masking(0.4, n) for n in (whole, shard))
        assert torch.equal(df.corrupt(x, of_shard), df.corrupt(padded, masking)[:, first:])


def test_noise_with_a_first_element_is_a_value() -> None:
    shard = df.Noise(5, first_element=12)
    again = df.Noise.from_state_dict(shard.state_dict())
    assert torch.equal(again.normal((2, 9)), shard.normal((2, 9)))
    assert "first_element=12" in repr(shard) and torch.equal(
        shard.fold_in(3).to("cpu").normal((2, 9)), shard.fold_in(3).normal((2, 9))
    )
    with pytest.raises(ValueError, match="first_element must not be negative"):
        df.Noise(0, first_element=-1)
    with pytest.raises(TypeError, match=r"device must be a torch\.device or its name"):
        df.Noise(5).to(torch.int8)  # type: ignore[arg-type]
