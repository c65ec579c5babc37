"""Every case of the shared list on every backend: forward, gradient, layouts, lengths, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import dae_fast as df
from benchmarks.cases import CASES, DTYPES, Case, Inputs, widen
from dae_fast.kernels import native

from .conftest import ISAS
from .flat import Flat

SHAPE = (40, 3, 17, 16)
SMALL = (3, 3, 9, 8)  # for Triton's interpreter, which takes a second for what others do in a millisecond
LENGTHS = (1, 3, 4, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4097)

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
all_isas = pytest.mark.parametrize("isa", ISAS)
maps = pytest.mark.parametrize("case", [c for c in CASES if not c.loss], ids=str)
losses = pytest.mark.parametrize("case", [c for c in CASES if c.loss], ids=str)


@pytest.fixture(autouse=True)
def poison():
    """New memory is NaN, so that an element which is never written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def require_grads(case: Case, inputs: Inputs) -> list[Tensor]:
    wanted = []
    for name in case.grads:
        inputs[name] = inputs[name].detach().clone().requires_grad_()
        wanted.append(inputs[name])
    return wanted


def assert_as_good(ours: Tensor, plain: Tensor, exact: Tensor, what: str, *, clamped: bool = False) -> None:
    """Per sample: error at most twice plain torch's, plus one unit in the last place.

    Over the batch instead where a sample has so few elements that plain torch may be right by luck.
    clamped: what lies within the bounds has cancelled from terms up to 157 times as large. There ours has
    three roundings (two coefficients, a product) to the one and a half of (x_t - sigma * eps) / alpha.
    """
    one = clamped or ours.dim() < 2
    a, b, e = (t.detach().double().reshape(1 if one else t.shape[0], -1) for t in (ours, plain, exact))
    assert torch.isfinite(a).all(), what
    info = torch.finfo(ours.dtype)
    ulp = (e.abs().amax(1) * info.eps).clamp(min=info.smallest_normal * info.eps)
    limit = (4 if clamped else 2) * (b - e).abs().amax(1) + ulp
    if ours.dtype == torch.float64:
        # Here the judge rounds as well; the conversions magnify that by up to 1/alpha = 157.
        limit = 1e-12 * e.abs().amax(1).clamp(min=1)
    worst = ((a - e).abs().amax(1) / limit).max()
    assert worst <= 1, f"{what}: {worst:.2f} times the limit"


def run(backend: str, case: Case, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], ...]:
    inputs = case.inputs(SMALL if backend == "triton" else SHAPE, dtype)
    wide = widen(inputs)
    exact = outputs(case.plain(wide, case.eps(wide, torch.float64)))
    plain = outputs(case.plain(inputs, case.eps(inputs, dtype)))
    return outputs(case.ours(inputs)), plain, exact


@all_cases
@all_dtypes
def test_forward(backend: str, case: Case, dtype: torch.dtype) -> None:
    for k, (ours, plain, exact) in enumerate(zip(*run(backend, case, dtype), strict=True)):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert ours.dtype == (compute if case.loss or k in case.sums else dtype)
        assert ours.shape == exact.shape
        assert_as_good(ours, plain, exact, f"output {k}", clamped="clamp" in case.name)


# A map's gradient is linear in what comes; a loss's, made in forward, stands for 1 and is made again else.
@pytest.mark.parametrize(
    ("case", "scale"),
    [(case, scale) for case in CASES for scale in ((1.0, 3.7) if case.loss else (3.7,))],
    ids=str,
)
@all_dtypes
def test_gradient(backend: str, case: Case, dtype: torch.dtype, scale: float) -> None:
    """With random upstream gradients; `scale` is what a loss scale or a sum of losses does to them."""
    inputs = case.inputs(SMALL if backend == "triton" else SHAPE, dtype)
    wide = widen(inputs)
    by_dtype = dict(inputs)
    eps = case.eps(inputs, dtype)
    eps_wide = case.eps(wide, torch.float64)

    def gradients(values: Inputs, result) -> list[Tensor]:
        wanted = require_grads(case, values)
        made = outputs(result(values))
        g = torch.Generator().manual_seed(1)
        upstream = [scale * (torch.ones(()) if not m.dim() else torch.randn(m.shape, generator=g)) for m in made]
        return torch.autograd.grad(made, wanted, [u.to(m.dtype) for u, m in zip(upstream, made, strict=True)])

    ours = gradients(inputs, case.ours)
    exact = gradients(wide, lambda i: case.plain(i, i["noise"] if not case.fresh and "noise" in i else eps_wide))
    plain = gradients(by_dtype, lambda i: case.plain(i, i["noise"] if not case.fresh and "noise" in i else eps))
    for name, a, b, e in zip(case.grads, ours, plain, exact, strict=True):
        assert a.dtype == inputs[name].dtype
        assert a.shape == inputs[name].shape
        assert_as_good(a, b, e, f"gradient of {name}", clamped="clamp" in case.name)


@maps
@all_isas
@pytest.mark.usefixtures("restore_isa")
def test_instruction_sets_agree_bit_for_bit(case: Case, isa: str) -> None:
    for dtype in DTYPES:
        inputs = case.inputs((9, 1300), dtype)
        native.use_isa(ISAS[0])
        expected = outputs(case.ours(inputs))
        native.use_isa(isa)
        for a, b in zip(outputs(case.ours(inputs)), expected, strict=True):
            assert torch.equal(a, b)


@losses
@all_isas
@pytest.mark.usefixtures("restore_isa")
def test_losses_are_the_same_on_every_instruction_set_and_thread_count(case: Case, isa: str) -> None:
    inputs = case.inputs((9, 3000), torch.float32)
    native.use_isa(ISAS[0])
    expected = case.ours(inputs)
    native.use_isa(isa)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(case.ours(inputs), expected)
    finally:
        torch.set_num_threads(before)


@all_cases
@pytest.mark.usefixtures("restore_isa")
def test_outputs_that_go_past_the_caches_have_the_same_bits(case: Case) -> None:
    """In whole lines and what is before and after them: 1300 elements are no whole number of those."""

    def found(dtype: torch.dtype, share: float) -> list[Tensor]:
        native.use_cache_share(share)
        inputs = case.inputs((9, 1300), dtype)
        wanted = require_grads(case, inputs)
        made = outputs(case.ours(inputs))
        return [*made, *torch.autograd.grad([m.sum() for m in made], wanted)]

    for isa in ISAS:
        native.use_isa(isa)
        for dtype in DTYPES:
            for a, b in zip(found(dtype, 0), found(dtype, math.inf), strict=True):
                assert torch.equal(a, b)


def cut(inputs: Inputs, D: int) -> Inputs:
    return {k: v[:, :D].contiguous() if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in inputs.items()}


@maps
@all_isas
@pytest.mark.usefixtures("restore_isa")
def test_every_length(case: Case, isa: str) -> None:
    """An element does not know how long its row is, nor how many rows there are."""
    native.use_isa(isa)
    for dtype in DTYPES:
        inputs = case.inputs((19, LENGTHS[-1]), dtype)
        whole = outputs(case.ours(inputs))
        for D in LENGTHS:
            for k, (a, b) in enumerate(zip(outputs(case.ours(cut(inputs, D))), whole, strict=True)):
                if k not in case.sums:
                    assert torch.equal(a, b[:, :D]), (dtype, D)


@losses
@all_isas
@pytest.mark.usefixtures("restore_isa")
def test_every_length_of_a_loss(case: Case, isa: str) -> None:
    native.use_isa(isa)
    inputs = case.inputs((19, LENGTHS[-1]), torch.float32)
    for D in LENGTHS:
        part = cut(inputs, D)
        part["pred"].requires_grad_()
        wide = widen({k: v.detach() if isinstance(v, Tensor) else v for k, v in part.items()})
        wide["pred"].requires_grad_()
        ours, exact = case.ours(part), case.plain(wide, case.eps(wide, torch.float64))
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
        (a,) = torch.autograd.grad(ours.sum(), part["pred"])
        (b,) = torch.autograd.grad(exact.sum(), wide["pred"])
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 3).contiguous().transpose(1, 3)


def _batch_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def _sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _misaligned(x: Tensor) -> Tensor:
    buffer = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    buffer[1:] = x.flatten()
    return buffer[1:].view(x.shape)


def _rows_apart(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0] * 2, *x.shape[1:]), float("nan"), dtype=x.dtype)
    wide[::2] = x
    return wide[::2]


LAYOUTS = (_channels_last, _transposed, _batch_last, _sliced, _misaligned, _rows_apart)


@all_cases
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__[1:])
def test_layouts(backend: str, case: Case, layout) -> None:
    """The same bits whatever the strides, of all inputs or of one; in the types by turns."""
    dtype = (torch.float32, torch.bfloat16)[(LAYOUTS.index(layout) + CASES.index(case)) % 2]
    inputs = case.inputs((6, 3, 17, 16), dtype)
    expected = outputs(case.ours(inputs))
    for changed in [case.tensors, *((name,) for name in case.tensors)]:
        moved = {k: layout(v) if k in changed else v for k, v in inputs.items()}
        # Sums are taken in memory order, torch's own and those of a loss without fresh noise in their launch.
        rtol = 1e-6 if (case.loss or case.sums) and (backend == "reference" or not case.fresh or case.widens) else 0
        for a, b in zip(outputs(case.ours(moved)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=0)


@all_cases
def test_gradients_in_channels_last(backend: str, case: Case) -> None:
    inputs = case.inputs((6, 3, 17, 16), torch.float32)
    moved = {k: _channels_last(v) if k in case.tensors else v for k, v in inputs.items()}

    def gradients(values: Inputs) -> tuple[Tensor, ...]:
        wanted = require_grads(case, values)
        made = outputs(case.ours(values))
        upstream = [torch.arange(m.numel(), dtype=m.dtype).reshape(m.shape) for m in made]
        return torch.autograd.grad(made, wanted, upstream)

    for a, b in zip(gradients(moved), gradients(inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@all_cases
def test_expanded_inputs(backend: str, case: Case) -> None:
    inputs = case.inputs((6, 3, 17, 16), torch.float32)
    one = {k: v[:, :1].expand(v.shape) if k in case.tensors else v for k, v in inputs.items()}
    dense = {k: v.contiguous() if k in case.tensors else v for k, v in one.items()}
    for a, b in zip(outputs(case.ours(one)), outputs(case.ours(dense)), strict=True):
        assert torch.equal(a, b)


def test_channels_last_is_kept() -> None:
    x = _channels_last(torch.randn(2, 3, 8, 8))
    assert df.add_noise(x, df.Noise(0), df.Level(1.0, 0.5)).is_contiguous(memory_format=torch.channels_last)


@all_cases
@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (0,), (3,), (2, 1, 1, 1), (1, 2, 1, 3, 1, 2, 1)], ids=str)
def test_odd_shapes(backend: str, case: Case, shape: tuple[int, ...]) -> None:
    inputs = case.inputs(shape, torch.float32)
    if case.loss and 0 in shape:
        if "none" not in case.name:
            with pytest.raises(ValueError, match="the mean over an empty batch"):
                case.ours(inputs)
        return
    wide = widen(inputs)
    exact = outputs(case.plain(wide, case.eps(wide, torch.float64)))
    for a, e in zip(outputs(case.ours(inputs)), exact, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-4)


@all_cases
def test_inputs_are_left_alone(backend: str, case: Case) -> None:
    inputs = case.inputs((6, 333), torch.float32)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    case.ours(inputs)
    for name, value in before.items():
        assert torch.equal(inputs[name], value)


@all_cases
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_propagate(backend: str, case: Case, bad: float) -> None:
    """To the elements that they reach in plain torch, and to no others."""
    inputs = case.inputs((6, 333), torch.float32)
    if "mask" in inputs:
        inputs["mask"][2, 100] = True
    for name in case.tensors:
        poisoned = {k: v.clone() if k == name else v for k, v in inputs.items()}
        poisoned[name][2, 100] = bad
        wide = widen(poisoned)
        expected = outputs(case.plain(wide, case.eps(wide, torch.float64)))
        for a, e in zip(outputs(case.ours(poisoned)), expected, strict=True):
            assert torch.equal(a.isnan(), e.isnan()), name
            assert torch.equal(a.isinf(), e.isinf()), name


def test_a_masked_out_nan_does_not_reach_the_loss(backend: str) -> None:
    pred = torch.randn(4, 9)
    pred[1, 2] = float("nan")
    pred.requires_grad_()
    mask = ~pred.isnan()
    loss = df.noise_mse(pred, df.Noise(0), mask=mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(pred.grad).all()
    assert pred.grad[1, 2] == 0


def test_extreme_values_round_as_torch_does(backend: str) -> None:
    """Overflow, subnormals and ties on the way to fp16 and bf16."""
    values = torch.tensor(
        [65504.0, 65519.9, 65520.0, 1e38, 3.4e38, 6e-8, 2.9e-8, 5.96e-8, 1e-40, 0.0, -0.0, 2049.0, 2051.0]
    )
    values = torch.cat((values, -values, torch.randn(1000) * 1e-5, torch.randn(1000) * 3e4))[None]
    for dtype in (torch.float16, torch.bfloat16):
        x = values.to(dtype)
        for scale in (1.0, 1.0001, 0.4997):
            expected = (x.float() * torch.tensor(scale)).to(dtype)
            got = df.add_noise(x, torch.zeros_like(x), df.Level(scale, 0.0))
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levelled", [False, True])
def test_loss_definition(backend: str, reduction: str, masked: bool, weighted: bool, levelled: bool) -> None:
    pred, noise = torch.randn(7, 3, 50, dtype=torch.float64), df.Noise(3)
    eps = noise.normal(pred.shape, dtype=torch.float64)
    schedule = df.Schedule.cosine(20)
    t = torch.randint(20, (7,))
    mask = torch.rand(7, 1, 50) < 0.3 if masked else None
    if masked:
        mask[2] = False  # a sample of which nothing is kept counts as 0
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    table = torch.rand(20, dtype=torch.float64) if levelled else None
    got = df.noise_mse(
        pred, noise, level=schedule[t], weight=weight, level_weight=table, mask=mask, reduction=reduction
    )
    square = (pred - eps) ** 2
    keep = torch.ones_like(pred) if mask is None else mask.expand(pred.shape).double()
    sums, kept = (square * keep).sum((1, 2)), keep.sum((1, 2))
    w = (1 if weight is None else weight) * (1 if table is None else table[t])
    mean = w * sums / kept.clamp(min=1)
    expected = {"mean": mean.mean(), "sum": (w * sums).sum(), "none": mean}[reduction]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_x0_error_from_the_same_sums(backend: str) -> None:
    schedule, noise = df.Schedule.linear(100), df.Noise(3)
    x0, t = torch.randn(16, 64), torch.randint(100, (16,))
    level = schedule[t]
    x_t = df.add_noise(x0, noise, level)
    pred = torch.randn(16, 64)
    loss, x0_mse = df.noise_mse(pred, noise, level=level, return_x0_mse=True)
    torch.testing.assert_close(loss, df.noise_mse(pred, noise))
    expected = (df.to_x0(x_t, pred, level) - x0).square().mean(1)
    torch.testing.assert_close(x0_mse, expected, rtol=1e-3, atol=1e-6)
    assert not x0_mse.requires_grad


def test_conversions_are_consistent(backend: str) -> None:
    """Whatever the network predicts, the four conversions agree with the truth it was made from."""
    level = df.Schedule.linear(100)[torch.randint(100, (8,))]
    x0, noise = torch.randn(8, 33, dtype=torch.float64), df.Noise(1)
    eps = noise.normal(x0.shape, dtype=torch.float64)
    alpha, sigma = (v.double()[:, None] for v in (level.alpha, level.sigma))
    truth = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma, "flow": eps - x0}
    x_t = df.add_noise(x0, noise, level)
    for predict, pred in truth.items():
        x_t_again, made = df.add_noise(x0, noise, level, target=predict)
        torch.testing.assert_close(made, pred, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x_t_again, x_t)
        for to in ("x0", "eps", "v", "score"):
            converted = getattr(df, f"to_{to}")(x_t, pred, level, predict=predict)
            torch.testing.assert_close(converted, truth[to], rtol=1e-4, atol=1e-4)
            wide = getattr(df, f"to_{to}")(x_t, pred, level, predict=predict, clamp=1e9)
            torch.testing.assert_close(wide, truth[to], rtol=1e-4, atol=1e-4)


@all_isas
@pytest.mark.usefixtures("restore_isa")
def test_nothing_is_written_outside(isa: str) -> None:
    """Outputs inside larger buffers; the elements around them keep their value."""
    native.use_isa(isa)
    noise, level = df.Noise(0), torch.tensor([[1.0, 0.3, 0.4]])
    for dtype in DTYPES:
        table = level.double() if dtype == torch.float64 else level
        for B, D in [(1, 1), (3, 5), (2, 63), (5, 65), (3, 1023), (2, 1025), (2, 5000)]:
            buffer = torch.full((B * D + 64,), 7.0, dtype=dtype)
            x = torch.randn(B, D).to(dtype)
            out = buffer[32 : 32 + B * D].view(B, D)
            Flat(native).affine("test", x, None, None, noise, table, None, (0, -1, 2, -1), out=out)
            assert (buffer[:32] == 7).all()
            assert (buffer[32 + B * D :] == 7).all()
            strided = torch.full((B, 2 * D + 3), 7.0, dtype=dtype)
            Flat(native).affine(
                "test", x, None, None, noise, table, None, (0, -1, 2, -1), out=strided[:, 1 : 2 * D : 2]
            )
            assert torch.equal(strided[:, 1 : 2 * D : 2], out)
            assert (strided[:, 0 : 2 * D : 2] == 7).all()
            assert (strided[:, 2 * D :] == 7).all()


class TestLangevinInPlace:
    def test_equal_to_out_of_place(self, backend: str) -> None:
        x, score, noise = torch.randn(5, 130), torch.randn(5, 130), df.Noise(0)
        expected = df.langevin_step(x, score, 0.1, noise, 0.5)
        other = torch.empty_like(x)
        assert df.langevin_step(x, score, 0.1, noise, 0.5, out=other) is other
        assert torch.equal(other, expected)
        score_target = score.clone()
        df.langevin_step(x, score_target, 0.1, noise, 0.5, out=score_target)
        assert torch.equal(score_target, expected)
        assert df.langevin_step(x, score, 0.1, noise, 0.5, out=x) is x
        assert torch.equal(x, expected)

    def test_strided_targets(self, backend: str) -> None:
        wide, score, noise = torch.randn(5, 260), torch.randn(5, 130), df.Noise(0)
        x = wide[:, ::2]
        expected = df.langevin_step(x, score, 0.1, noise)
        untouched = wide[:, 1::2].clone()
        df.langevin_step(x, score, 0.1, noise, out=x)
        assert torch.equal(x, expected)
        assert torch.equal(wide[:, 1::2], untouched)

    def test_zero_noise_scale_is_gradient_ascent(self, backend: str) -> None:
        x, score = torch.randn(5, 130), torch.randn(5, 130)
        got = df.langevin_step(x, score, 0.25, df.Noise(0), 0.0)
        torch.testing.assert_close(got, x + 0.25 * score)


def test_level_by_hand_equals_the_schedule(backend: str) -> None:
    schedule, t = df.Schedule.linear(50), torch.randint(50, (6,))
    x0, noise = torch.randn(6, 40), df.Noise(0)
    by_hand = df.Level(schedule.alpha[t], schedule.sigma[t])
    assert torch.equal(df.add_noise(x0, noise, by_hand), df.add_noise(x0, noise, schedule[t]))
    assert torch.equal(df.add_noise(x0, noise, schedule[t.int()]), df.add_noise(x0, noise, schedule[t]))
    same = df.add_noise(x0, noise, schedule[7])
    assert torch.equal(same, df.add_noise(x0, noise, schedule[torch.full((6,), 7)]))
    floats = df.Level(float(schedule.alpha[7]), float(schedule.sigma[7]))
    assert torch.equal(same, df.add_noise(x0, noise, floats))


def test_mixed_dtypes_promote_as_torch_does(backend: str) -> None:
    x0, noise = torch.randn(4, 9), torch.randn(4, 9).bfloat16()
    level = df.Level(0.6, 0.8)
    assert df.add_noise(x0, noise, level).dtype == torch.float32
    assert df.add_noise(x0.half(), noise, level).dtype == torch.promote_types(torch.float16, torch.bfloat16)
    torch.testing.assert_close(df.add_noise(x0, noise, level), 0.6 * x0 + 0.8 * noise.float())
    assert df.noise_mse(noise, x0).dtype == torch.float32
