"""Plain eager calls, which the native core recognises: the bits of the general way, and what that refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dae_fast as df
from benchmarks.cases import DTYPES
from dae_fast import primitives
from dae_fast.kernels.spec import Coefficients, map_of
from dae_fast.primitives import residuals, sums
from dae_fast.routing import fast_map

from .conftest import BACKENDS
from .flat import affine as flat_affine

pytestmark = pytest.mark.skipif("native" not in BACKENDS, reason="there is no native core")

SCHEDULE = df.Schedule.linear(50, 1e-3, 0.2)
SHAPE = (5, 3, 8)
LEVELS = torch.tensor([0, 7, 20, 49, 33])
Call = Callable[..., Any]


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    return tuple(torch.randn(SHAPE, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))


LOSSES: dict[str, Call] = {
    "huber": lambda p, x, n, level: df.denoising_loss(p, x, n, level, kind="huber", delta=0.7),
    "pseudo-Huber of x0": lambda p, x, n, level: df.denoising_loss(
        p, x, n, level, predict="x0", kind="pseudo_huber", delta=0.2
    ),
    "noise_mse": lambda p, x0, noise, level: df.noise_mse(p, noise),
    "noise_mse, sum": lambda p, x0, noise, level: df.noise_mse(p, noise, reduction="sum"),
    "l1_penalty": lambda p, x0, noise, level: df.l1_penalty(p),
    "l1_penalty, sum": lambda p, x0, noise, level: df.l1_penalty(p, reduction="sum"),
    "eps": df.denoising_loss,
    "eps without level": lambda p, x0, noise, level: df.denoising_loss(p, x0, noise, None),
    "x0": lambda p, x0, noise, level: df.denoising_loss(p, x0, noise, level, predict="x0"),
    "x0 alone": lambda p, x0, noise, level: df.denoising_loss(p, x0, None, None, predict="x0"),
    "v, l1": lambda *a: df.denoising_loss(*a, predict="v", kind="l1"),
    "v, sum": lambda *a: df.denoising_loss(*a, predict="v", reduction="sum"),
    "flow": lambda *a: df.denoising_loss(*a, predict="flow", weight="uniform"),
    "F": lambda *a: df.denoising_loss(*a, predict=df.EDM(0.5)),
    "score, snr": lambda *a: df.denoising_loss(*a, predict="score", weight="snr"),
    "eps, min_snr": lambda *a: df.denoising_loss(*a, weight="min_snr"),
    "x0, min_snr": lambda *a: df.denoising_loss(*a, predict="x0", weight="min_snr"),
    "v, p2, sum": lambda *a: df.denoising_loss(*a, predict="v", weight="p2", reduction="sum"),
}
FORMS = {"each its level": LEVELS, "int32 levels": LEVELS.int(), "one level": 7}


class Spy:
    """fast_loss and fast_map, counted; or refusing, also to what the general way makes of a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        self.refuses = False
        monkeypatch.setattr(residuals, "fast_loss", self._around(residuals.fast_loss))
        monkeypatch.setattr(primitives, "fast_map", self._around(fast_map))
        monkeypatch.setattr(sums, "fast_map", self._around(fast_map, inside=True))

    def _around(self, original: Call, inside: bool = False) -> Call:
        def call(*arguments: Any) -> Any:
            made = None if self.refuses else original(*arguments)
            self.taken += made is not None and not inside
            return made

        return call


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def both_ways(spy: Spy, call: Callable[[], tuple[Tensor, ...]]) -> None:
    """Equal bits; the first call may have to make a table."""
    call()
    spy.taken = 0
    plain = call()
    assert spy.taken == 1
    spy.refuses = True
    general = call()
    spy.refuses = False
    assert len(plain) == len(general)
    for ours, theirs in zip(plain, general, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.fixture
def with_kernels(backend: str) -> str:
    if backend == "reference":
        pytest.skip("it has no plain calls")
    return backend


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fresh", [True, False], ids=["Noise", "tensor"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(with_kernels: str, spy: Spy, name: str, fresh: bool, form: str) -> None:
    pred, x0, eps = tensors()
    noise: Any = df.Noise(4).fold_in(9) if fresh else eps
    level = SCHEDULE[FORMS[form]]
    both_ways(spy, lambda: (LOSSES[name](pred, x0, noise, level),))
    leaf = pred.clone().requires_grad_()

    def with_gradient() -> tuple[Tensor, ...]:
        loss = LOSSES[name](leaf, x0, noise, level)
        return loss.detach(), *torch.autograd.grad(loss, leaf), *torch.autograd.grad(2 * loss_again(), leaf)

    def loss_again() -> Tensor:
        spy.taken -= 1  # of the second, whose upstream gradient is not 1
        return LOSSES[name](leaf, x0, noise, level)

    def counted() -> tuple[Tensor, ...]:
        results = with_gradient()
        if spy.refuses:
            spy.taken = 0
        return results

    both_ways(spy, counted)


MAPS: dict[str, Call] = {
    "add_noise": lambda x, y, noise, level: df.add_noise(x, noise, level),
    "to_x0": lambda x, y, noise, level: df.to_x0(x, y, level),
    "to_x0, clamp": lambda x, y, noise, level: df.to_x0(x, y, level, clamp=0.5),
    "to_eps, clamp": lambda x, y, noise, level: df.to_eps(x, y, level, predict="x0", clamp=0.5),
    "to_score": lambda x, y, noise, level: df.to_score(x, y, level),
    "langevin_step": lambda x, y, noise, level: df.langevin_step(x, y, 0.1, noise),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanting", [(0,), (1,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_maps_with_gradients(
    with_kernels: str, spy: Spy, name: str, wanting: tuple[int, ...], form: str, dtype: torch.dtype
) -> None:
    """Of x, y and a tensor noise; what an op does not read gets none."""
    g = tensors(dtype)[0].flip(0)
    inputs = [t.requires_grad_(k in wanting) for k, t in enumerate(tensors(dtype))]
    noise: Any = inputs[2] if 2 in wanting else df.Noise(4).fold_in(9)
    leaves = [inputs[k] for k in wanting]

    def call() -> tuple[Tensor, ...]:
        made = MAPS[name](*inputs[:2], noise, SCHEDULE[FORMS[form]])
        if not made.requires_grad:
            return (made,)
        found = torch.autograd.grad(made, leaves, g, allow_unused=True)
        return made.detach(), *(torch.full_like(g, 99) if t is None else t for t in found)

    if name == "to_score" and 0 in wanting:  # x_t, which it does not read, is left to the general way
        unused = len(wanting) > 1
        assert (call()[1] == 99).all() if unused else len(call()) == 1
    else:
        both_ways(spy, call)


def test_graphs_that_are_walked_again(with_kernels: str) -> None:
    x, y, _ = (t.double().requires_grad_() for t in tensors())
    level = df.Level(0.6, 0.8)
    assert torch.autograd.gradgradcheck(lambda x, y: df.to_x0(x, y, level).square(), (x, y))
    loss = df.noise_mse(x, df.Noise(1))
    first = torch.autograd.grad(loss, x, retain_graph=True)
    again = torch.autograd.grad(loss, x, retain_graph=True)
    tripled = torch.autograd.grad(loss, x, torch.tensor(3.0, dtype=torch.float64))
    assert torch.equal(first[0], again[0])
    torch.testing.assert_close(tripled[0], 3 * first[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_dtypes(with_kernels: str, spy: Spy, dtype: torch.dtype) -> None:
    pred, x0, eps = tensors(dtype)
    level, noise = SCHEDULE[LEVELS], df.Noise(1)
    for call in (
        lambda: df.denoising_loss(pred, x0, noise, level, predict="v", weight="min_snr"),
        lambda: df.add_noise(x0, noise, level),
        lambda: df.to_x0(x0, pred, level),
        lambda: df.to_x0(x0, pred, level, clamp=0.5),
        lambda: df.to_eps(x0, pred, level, predict="x0", clamp=(-0.2, 0.7)),
        lambda: df.langevin_step(x0, pred, 0.1, eps),
    ):
        both_ways(spy, lambda call=call: (call(),))


def test_the_gradient_of_a_scaled_loss_in_fp16(with_kernels: str, spy: Spy) -> None:
    """Made in backward, where the scale is known: 2 / N times a residual may be 0 in fp16."""
    pred, x0, _ = tensors(torch.float16)
    small = (x0 + 1e-3 * pred).requires_grad_()

    def call() -> tuple[Tensor, ...]:
        loss = df.noise_mse(small, x0)
        return loss.detach(), *torch.autograd.grad(2.0**14 * loss, small)

    both_ways(spy, call)
    exact = 2**15 * (small.detach().double() - x0.double()) / x0.numel()
    torch.testing.assert_close(call()[1].double(), exact, rtol=2**-10, atol=0)


@pytest.mark.parametrize("weighting", [None, "min_snr", df.weighting.MinSNR(3.0)], ids=str)
@pytest.mark.parametrize("predict", ["eps", "x0", "v", df.EDM(0.5)], ids=str)
def test_the_objective_and_its_errors(with_kernels: str, spy: Spy, predict: Any, weighting: Any) -> None:
    pred, x0, _ = tensors()
    pred.requires_grad_()
    objective = df.nn.DenoisingLoss(SCHEDULE, predict, weighting=weighting)

    def call() -> tuple[Tensor, ...]:
        values = objective(lambda x, t: pred, x0, df.Noise(2))
        spy.taken -= not spy.refuses  # of add_noise
        return tuple(v.detach() for v in values.values())

    both_ways(spy, call)


def test_samples_ids_and_keys_in_memory(with_kernels: str, spy: Spy) -> None:
    pred, x0, _ = tensors()
    level, ids = SCHEDULE[LEVELS], torch.tensor([9, 2**40, 3, 3, -1])
    for noise in (df.Noise(7, sample=ids), df.Noise(7, first_sample=11), df.Noise(7).to("cpu")):
        both_ways(spy, lambda noise=noise: (df.denoising_loss(pred, x0, noise, level, predict="v"),))
        both_ways(spy, lambda noise=noise: (df.add_noise(x0, noise, level),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("fresh", [True, False], ids=["Noise", "tensor"])
@pytest.mark.parametrize(
    ("columns", "clamp"),
    [
        ((0, 1, 2, 3), None),
        ((0, 1, -1, 3), (4, 5, 6, -0.5, 0.7)),
        ((0, 1, 2, -1), (4, 5, -1, -0.5, 0.7)),
        ((-1, 1, -1, -1), (-1, 5, -1, -0.5, 0.7)),
        ((0, 1, 2, -1, 3, 4, -1, 5), None),
        ((0, 1, 2, 3, -1, 1, -1, -1), (4, 5, 6, -0.5, 0.7)),
    ],
    ids=str,
)
def test_steps(
    monkeypatch: pytest.MonkeyPatch, with_kernels: str, columns: Any, clamp: Any, fresh: bool, dtype: torch.dtype
) -> None:
    """What the samplers call: a row of a table by its number, four tensors, a clamp, two outputs."""
    x, y, z, w = (*tensors(dtype), tensors(dtype)[0].flip(0))
    g = torch.Generator().manual_seed(0)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.randn(4, 7, generator=g, dtype=torch.float64).to(compute)
    noise, z = (df.Noise(3), None) if fresh else (None, z)
    unwanted = x.clone()
    unwanted[:] = torch.nan  # of an operand without a column nothing is read
    given = [t if wanted_at(columns, clamp, k) else unwanted for k, t in enumerate((x, y, z, w))]
    inner, bounds = (None, None) if clamp is None else (tuple(clamp[:3]), tuple(clamp[3:]))
    spec = map_of("convert", columns, inner)
    made = fast_map(spec.core, (*given[:3], given[3], noise), table, 2, bounds, None)
    monkeypatch.setattr(sums, "fast_map", lambda *_: None)
    general = flat_affine("op", *given[:3], noise, Coefficients(table[2:3], None), columns, clamp, given[3])
    made = made if isinstance(made, tuple) else (made,)
    assert len(made) == len(general) == len(columns) // 4
    for ours, theirs in zip(made, general, strict=True):
        assert torch.isfinite(ours).all()
        assert torch.equal(ours, theirs)
    strided = torch.randn(4, 8, generator=g).to(compute)[:, 1:]
    assert fast_map(spec.core, (*given[:3], given[3], noise), strided, 2, bounds, None) is None


def wanted_at(columns: tuple[int, ...], clamp: Any, k: int) -> bool:
    inner = () if clamp is None else (clamp[0], clamp[1], -1, clamp[2])
    return k == 2 or any(part[k] != -1 for part in (columns[:4], columns[4:], inner) if part)


def test_misaligned_samples(with_kernels: str, spy: Spy) -> None:
    held = torch.randn(1 + 2 * 5 * 24)
    pred, x0 = held[1:121].reshape(SHAPE), held[121:].reshape(SHAPE)
    level = SCHEDULE[LEVELS]
    both_ways(spy, lambda: (df.denoising_loss(pred, x0, df.Noise(0), level, predict="v"),))
    both_ways(spy, lambda: (df.add_noise(x0, df.Noise(0), level),))


def test_levels_by_hand_and_weights(with_kernels: str, spy: Spy) -> None:
    """Coefficients that are no table, and weights of each sample, on the CPU worked out by the core."""
    pred, x0, _ = tensors()
    level, noise, w = SCHEDULE[LEVELS], df.Noise(0), torch.rand(5)
    by_hand = [df.Level(0.6, 0.8)]
    if with_kernels == "native":
        by_hand += [df.Level(torch.rand(5), torch.rand(5).double() + 0.1), df.Level(torch.tensor(0.5), torch.rand(1))]
    for own in by_hand:
        both_ways(spy, lambda own=own: (df.add_noise(x0, noise, own),))
        both_ways(spy, lambda own=own: (df.to_x0(x0, pred, df.Level(own.alpha + 0.1, own.sigma), clamp=0.5),))
        both_ways(spy, lambda own=own: (df.denoising_loss(pred, x0, noise, own, predict="v"),))
    for weight in (w, w.double(), "likelihood", lambda alpha, sigma: alpha * sigma):
        both_ways(spy, lambda weight=weight: (df.denoising_loss(pred, x0, noise, level, predict="v", weight=weight),))


STRUCK = df.Masking(0.3, df.Noise(5))
# Of (pred, x0, noise, weight): losses whose gradients are made in backward, and losses with a mask.
IN_BACKWARD: dict[str, Call] = {
    "none": lambda p, x, n, w: df.noise_mse(p, n, reduction="none"),
    "none, weight": lambda p, x, n, w: df.noise_mse(p, n, weight=w, reduction="none"),
    "v": lambda p, x, n, w: df.denoising_loss(p, x, n, SCHEDULE[LEVELS], predict="v"),
    "v, weights": lambda p, x, n, w: df.denoising_loss(p, x, n, SCHEDULE[7], predict="v", weight=w, reduction="sum"),
    "v, none, min_snr": lambda p, x, n, w: df.denoising_loss(
        p, x, n, SCHEDULE[LEVELS], predict="v", weight="min_snr", reduction="none"
    ),
    "residual_loss": lambda p, x, n, w: df.residual_loss(p, (0.5, x), (w.detach(), n), weight=2.0, reduction="none"),
    "stored mask": lambda p, x, n, w: df.noise_mse(p, n, mask=x > 0),
    "drawn mask": lambda p, x, n, w: df.noise_mse(p, n, mask=STRUCK.visible, reduction="sum"),
    "drawn mask, none": lambda p, x, n, w: df.noise_mse(p, n, mask=STRUCK, reduction="none"),
    "drawn mask, x0": lambda p, x, n, w: df.denoising_loss(p, x, None, None, predict="x0", mask=STRUCK),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("wanting", [(), (0,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", IN_BACKWARD)
def test_losses_of_rows_and_masks(
    with_kernels: str, spy: Spy, name: str, wanting: tuple[int, ...], dtype: torch.dtype
) -> None:
    if with_kernels != "native":
        pytest.skip("these are general calls there")
    inputs = [t.requires_grad_(k in wanting) for k, t in enumerate(tensors(dtype))]
    noise: Any = inputs[2] if 2 in wanting else df.Noise(4).fold_in(9)
    weight = torch.rand(5, generator=torch.Generator().manual_seed(1))

    def call() -> tuple[Tensor, ...]:
        loss = IN_BACKWARD[name](*inputs[:2], noise, weight)
        if not loss.requires_grad:
            return (loss,)
        leaves, upstream = [inputs[k] for k in wanting], torch.full_like(loss, 3.0)
        found = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
        return loss.detach(), *(torch.full((), 99.0) if t is None else t for t in found)

    both_ways(spy, call)


@pytest.mark.parametrize("wanting", ["numbers", "rows", "one for all"])
def test_coefficients_with_gradients(with_kernels: str, spy: Spy, wanting: str) -> None:
    """The table is worked out by the core, and each coefficient has the sum of its rows' gradients."""
    if with_kernels != "native":
        pytest.skip("these are general calls there")
    x, y, eps = (t.requires_grad_() for t in tensors())
    h: Any = torch.rand(5, generator=torch.Generator().manual_seed(1)) + 0.1
    h = {"numbers": h, "rows": h.requires_grad_(), "one for all": h[:1].reshape(()).requires_grad_()}[wanting]
    leaves = [x, y, *([h] if h.requires_grad else [])]
    for made in (
        lambda: df.langevin_step(x, y, h, df.Noise(2)),
        lambda: df.langevin_step(x, y, h, eps.detach(), noise_scale=0.5),
        lambda: df.weighted_sum((h, x), (0.25, y), (h, eps), (2.0, x), (h, df.Noise(2)), also=(1.0, h, 0.5, h, 2.0)),
        lambda: df.weighted_sum((h, x), (torch.linspace(1, 2, 5), y)),
        lambda: df.add_noise(x, eps, df.Level(h, 0.5)) + 0 * y,
        lambda: df.to_x0(x, y, df.Level(h, 0.5), clamp=0.5),
    ):

        def call(made: Any = made) -> tuple[Tensor, ...]:
            outputs = made()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(o.detach() for o in outputs) + torch.autograd.grad(
                outputs, leaves, [o.detach() for o in outputs]
            )

        both_ways(spy, call)
    assert torch.autograd.gradgradcheck(
        lambda *t: df.langevin_step(t[0], t[1], t[2], df.Noise(2)),
        [t.detach().double().requires_grad_() for t in (x, y, h)],
    )


def test_what_is_not_plain(with_kernels: str, spy: Spy) -> None:
    """Another layout, type or gradient goes the general way; what is wrong is refused, and read by nobody."""
    pred, x0, eps = tensors()
    level, noise = SCHEDULE[LEVELS], df.Noise(0)
    loss = df.denoising_loss
    loss(pred, x0, noise, level, predict="v")
    spy.taken = 0
    strided = pred.transpose(1, 2).contiguous().transpose(1, 2)
    for call in (
        lambda: loss(strided, x0, noise, level, predict="v"),
        lambda: loss(pred, strided, noise, level, predict="v"),
        lambda: loss(pred, x0.double(), noise, level, predict="v"),
        lambda: loss(pred, x0, df.OffsetNoise(noise), level),
        lambda: loss(pred, x0, noise, level, predict="v", kind="huber", delta=1.0),
        lambda: loss(pred, x0, noise, level, kind="huber", delta=lambda alpha, sigma: alpha),
        lambda: loss(pred, x0, noise, level, mask=x0[:, :1] > 0),
        lambda: loss(pred, x0, noise, level, mask=x0.abs()),
        lambda: df.l1_penalty(strided),
    ):
        assert torch.isfinite(call()).all()
    for error, match, call in (
        (ValueError, r"x0 must have shape \(5, 3, 8\), got \(5, 3, 7\)", lambda: loss(pred, x0[..., :7], noise, level)),
        (TypeError, "x0 must be a tensor, got NoneType", lambda: loss(pred, None, noise, level)),
        (ValueError, "noise must have shape", lambda: loss(pred, x0, eps[:3], level)),
        (ValueError, "noise must be given", lambda: loss(pred, x0, None, level)),
        (TypeError, "noise must be a Noise", lambda: loss(pred, x0, 3, level, predict="x0")),
        (ValueError, "noise.sample must", lambda: loss(pred, x0, df.Noise(0, sample=LEVELS[:3]), level, predict="x0")),
        (ValueError, "one entry per sample", lambda: loss(pred, x0, noise, SCHEDULE[LEVELS[:3]])),
        (ValueError, "one entry per sample", lambda: loss(pred, x0, noise, SCHEDULE[LEVELS[:3]], predict="v")),
        (TypeError, "level must be a Level", lambda: loss(pred, x0, noise, LEVELS)),
        (ValueError, "kind must be one of", lambda: loss(pred, x0, noise, level, kind="l2")),
        (ValueError, "reduction must be", lambda: loss(pred, x0, noise, level, reduction="max")),
        (TypeError, "pred must be a tensor", lambda: loss([1.0], x0, noise, level)),
    ):
        with pytest.raises(error, match=match):
            call()
    if with_kernels == "native":  # a GPU's levels nobody looks at
        with pytest.raises(ValueError, match=r"level must be in \[0, 50\)"):
            loss(pred, x0, noise, SCHEDULE[LEVELS + 30], predict="v")
    assert spy.taken == 0


def test_backends_launch_their_own(spy: Spy) -> None:
    """A forced backend runs the plain calls too; the reference has none."""
    pred, x0, _ = tensors()
    for name in BACKENDS:
        with df.use_backend(name):
            df.add_noise(x0, df.Noise(0), SCHEDULE[LEVELS])
            spy.taken = 0
            df.add_noise(x0, df.Noise(0), SCHEDULE[LEVELS])
            df.noise_mse(pred, df.Noise(0))
            assert spy.taken == (0 if name == "reference" else 2)
    assert sums.kernels(x0, "op") is df.kernels.native
