"""The training target, DREAM, weights of elements and frames, self-conditioning: against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dae_fast as df
from dae_fast.nn import SELF_TAG

SCHEDULE = df.Schedule.linear(100)
T = torch.tensor([3, 50, 99])
LEVEL = SCHEDULE[T]
ALPHA, SIGMA = (v[T].reshape(-1, 1, 1, 1) for v in (SCHEDULE.alpha, SCHEDULE.sigma))
KINDS = ("eps", "x0", "v", "score", "flow", df.EDM(0.5))
NOISE = df.Noise(1)


def drawn(count: int, shape: tuple[int, ...] = (3, 4, 6, 5)) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


EPS = drawn(1)[0]
NOISES = (EPS, NOISE, df.OffsetNoise(NOISE), df.PyramidNoise(NOISE))


def target_of(to: str | df.EDM, x0: Tensor, eps: Tensor) -> Tensor:
    size = (SIGMA**2 + (0.5 * ALPHA) ** 2).sqrt()
    known = {"eps": eps, "x0": x0, "v": ALPHA * eps - SIGMA * x0, "score": -eps / SIGMA, "flow": eps - x0}
    return known[to] if isinstance(to, str) else (2 * SIGMA * x0 - 0.5 * ALPHA * eps) / size


@pytest.mark.parametrize("to", KINDS, ids=str)
@pytest.mark.parametrize("noise", NOISES, ids=lambda n: type(n).__name__)
def test_target(to: str | df.EDM, noise: Tensor | df.Noise) -> None:
    x0 = drawn(2)[1]
    eps = noise if isinstance(noise, Tensor) else noise.normal(x0.shape, dtype=torch.float64)
    torch.testing.assert_close(df.target(x0, noise, LEVEL, to), target_of(to, x0, eps), rtol=1e-12, atol=1e-12)
    half = df.target(x0.bfloat16(), noise, LEVEL, to)
    assert half.dtype == (torch.float64 if isinstance(noise, Tensor) else torch.bfloat16)


@pytest.mark.parametrize("to", KINDS, ids=str)
@pytest.mark.parametrize("noise", NOISES, ids=lambda n: type(n).__name__)
def test_dream(to: str | df.EDM, noise: Tensor | df.Noise) -> None:
    """eps + lambda (eps - eps_hat) in the place of eps, as the paper's algorithm and diffusers' training_utils."""
    _, x0, pred = drawn(3)
    eps = noise if isinstance(noise, Tensor) else noise.normal(x0.shape, dtype=torch.float64)
    first = ALPHA * x0 + SIGMA * eps
    eps_hat = pred if to == "eps" else df.to_eps(first, pred, LEVEL, predict=to)
    rectified = eps + SIGMA**1.5 * (eps - eps_hat)
    x_t, target = df.dream(x0, noise, pred, LEVEL, predict=to, p=1.5)
    torch.testing.assert_close(x_t, ALPHA * x0 + SIGMA * rectified, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(target, target_of(to, x0, rectified), rtol=1e-10, atol=1e-10)


def test_dream_is_without_gradient_of_the_prediction() -> None:
    x0, pred = (x.clone().requires_grad_() for x in drawn(2))
    x_t, target = df.dream(x0, NOISE, pred, LEVEL)
    of_x0, of_pred = torch.autograd.grad((x_t.sum(), target.sum()), (x0, pred), allow_unused=True)
    torch.testing.assert_close(of_x0, ALPHA.expand_as(x0))
    assert of_pred is None


def rho(r: Tensor, kind: str) -> Tensor:
    if kind == "huber":
        return torch.nn.functional.huber_loss(r, torch.zeros_like(r), delta=0.4, reduction="none")
    return {"mse": r**2, "l1": r.abs(), "pseudo_huber": 0.8 * ((r**2 + 0.16).sqrt() - 0.4)}[kind]


WHOLE, ONE_CHANNEL, ONE_FOR_ALL = (3, 4, 6, 5), (3, 1, 6, 5), (1, 1, 6, 5)


@pytest.mark.parametrize(
    ("shape", "kind", "reduction", "normalise"),
    [
        (WHOLE, "mse", "mean", "sum"),
        (ONE_CHANNEL, "mse", "none", "count"),
        (ONE_FOR_ALL, "mse", "sum", "count"),
        (ONE_CHANNEL, "l1", "mean", "count"),
        (ONE_CHANNEL, "huber", "sum", "sum"),
        (WHOLE, "pseudo_huber", "none", "sum"),
    ],
    ids=str,
)
def test_weights_of_elements(backend: str, shape: tuple[int, ...], kind: str, reduction: str, normalise: str) -> None:
    """Value and gradients of prediction, data and weights; a sample of the first two shapes has no weight at all."""
    x0, pred = (x.clone().requires_grad_() for x in drawn(2))
    m = 1e-3 * torch.rand(
        shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )  # whose sum is below 1
    m[1:2] = 0
    m.requires_grad_()
    w = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    delta = 0.4 if "huber" in kind else None
    options = {"kind": kind, "delta": delta, "reduction": reduction, "normalise": normalise}
    found = df.denoising_loss(pred, x0, NOISE, LEVEL, predict="v", mask=m, weight=w, **options)
    eps = NOISE.normal(x0.shape, dtype=torch.float64)
    each = m.expand(x0.shape)
    total = (each * rho(pred - (ALPHA * eps - SIGMA * x0), kind)).sum((1, 2, 3))
    means = w * total / (each.sum((1, 2, 3)) + (each == 0).flatten(1).all(1) if normalise == "sum" else 120)
    wanted = {"mean": means.mean(), "sum": (w * total).sum(), "none": means}[reduction]
    torch.testing.assert_close(found, wanted)
    for name, mine, theirs in zip(
        ("pred", "x0", "m"),
        torch.autograd.grad(found.sum(), (pred, x0, m)),
        torch.autograd.grad(wanted.sum(), (pred, x0, m), retain_graph=True),
        strict=True,
    ):
        where = slice(None) if name != "m" or shape[0] == 1 else [0, 2]  # of no weight at all there is no gradient
        torch.testing.assert_close(mine[where], theirs[where])
    # With a gradient of the prediction alone, one pass on the CPU; first and second order.
    alone, (x0, m) = pred.detach().requires_grad_(), (t.detach() for t in (x0, m))
    again = df.denoising_loss(alone, x0, NOISE, LEVEL, predict="v", mask=m, weight=w, **options)
    torch.testing.assert_close(again, wanted)
    (mine,), (theirs,) = (
        torch.autograd.grad(loss.sum(), leaf, create_graph=True) for loss, leaf in ((again, alone), (wanted, pred))
    )
    torch.testing.assert_close(mine, theirs)
    if kind != "l1":  # whose slope is constant
        torch.testing.assert_close(
            torch.autograd.grad(mine.square().sum(), alone), torch.autograd.grad(theirs.square().sum(), pred)
        )
    (lazy,) = torch.autograd.grad(
        2 * df.denoising_loss(alone, x0, NOISE, LEVEL, predict="v", mask=m, weight=w, **options).sum(), alone
    )
    torch.testing.assert_close(lazy, 2 * theirs)


def test_a_mask_of_zeros_and_ones_is_a_mask() -> None:
    x = drawn(1)[0]
    kept = x > 0.3
    for normalise in ("sum", "count"):
        found = df.noise_mse(x, NOISE, mask=kept.float(), normalise=normalise)
        torch.testing.assert_close(found, df.noise_mse(x, NOISE, mask=kept, normalise=normalise))
    by_words = df.Masking(0.3, NOISE)
    wanted = (by_words.mask(x.shape) * (x - NOISE.normal(x.shape, dtype=torch.float64)) ** 2).mean()
    torch.testing.assert_close(df.noise_mse(x, NOISE, mask=by_words, normalise="count"), wanted)
    terms = (0.5, x), (0.1, NOISE)
    torch.testing.assert_close(
        df.residual_loss(x, *terms, mask=kept.double()), df.residual_loss(x, *terms, mask=kept), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("level", [LEVEL, SCHEDULE[4], df.Level(SCHEDULE.alpha[T], SCHEDULE.sigma[T])], ids=str)
def test_weights_of_frames(level: df.Level) -> None:
    """At one level for each sample; a count is a frame's."""
    x0, pred = drawn(2)
    w = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m = torch.rand(3, 4, 6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alpha, sigma = (torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1, 1, 1) for v in (level.alpha, level.sigma))
    square = (pred - (alpha * EPS - sigma * x0)) ** 2
    loss = {"pred": pred, "x0": x0, "noise": EPS, "level": level, "predict": "v", "weight": w}
    close = {"rtol": 1e-6, "atol": 0.0}  # a level says alpha in fp32
    torch.testing.assert_close(df.denoising_loss(**loss), (w * square.mean((2, 3))).mean(), **close)
    torch.testing.assert_close(df.denoising_loss(**loss, reduction="none"), w * square.mean((2, 3)), **close)
    weighed = df.denoising_loss(**loss, mask=m, normalise="count", reduction="none")
    torch.testing.assert_close(weighed, w * (m * square).mean((2, 3)), **close)


def test_weights_of_frames_and_of_levels() -> None:
    w, by_level = torch.rand(3, 4).double(), torch.rand(100)
    square = (EPS - NOISE.normal(EPS.shape, dtype=torch.float64)) ** 2
    found = df.noise_mse(EPS, NOISE, level=LEVEL, weight=w, level_weight=by_level)
    torch.testing.assert_close(found, (w * by_level[T].double()[:, None] * square.mean((2, 3))).mean())


class TestSelfConditioning:
    @staticmethod
    def look(self_condition: float, noise: df.Noise) -> tuple[dict[str, Tensor], list[Tensor]]:
        seen: list[Tensor] = []

        def net(x_t: Tensor, t: Tensor, x_self_cond: Tensor) -> Tensor:
            seen.append(x_self_cond)
            assert torch.is_grad_enabled() == (len(seen) == 2 or not chosen(self_condition, noise))
            return 0.3 * x_t + 0.1 * x_self_cond

        loss = df.nn.DenoisingLoss(SCHEDULE, "v", self_condition=self_condition)
        return loss(net, EPS, noise, T), seen

    @pytest.mark.parametrize("p", [0.3, 1.0])
    def test_is_seen_as_often(self, p: float) -> None:
        often = 0
        for step in range(40):
            noise = df.Noise(5).fold_in(step)
            _, seen = self.look(p, noise)
            assert len(seen) == 1 + chosen(p, noise) and not seen[0].any()
            if len(seen) == 2:
                often += 1
                x_t = df.add_noise(EPS, noise, LEVEL)
                torch.testing.assert_close(seen[1], df.to_x0(x_t, 0.3 * x_t, LEVEL, predict="v"))
        assert abs(often / 40 - p) < 0.25

    def test_a_key_in_memory_decides_alike(self) -> None:
        for step in range(8):
            noise = df.Noise(5).fold_in(step)
            wanted, _ = self.look(0.5, noise)
            found = df.nn.DenoisingLoss(SCHEDULE, "v", self_condition=0.5)(
                lambda x, t, x_self_cond: 0.3 * x + 0.1 * x_self_cond, EPS, noise.to("cpu"), T
            )
            torch.testing.assert_close(found, wanted)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"self_condition must be in \[0, 1\], got 2.0"):
            df.nn.DenoisingLoss(SCHEDULE, self_condition=2.0)
        with pytest.raises(ValueError, match="self_condition needs a Noise, whose key decides, got a tensor"):
            df.nn.DenoisingLoss(SCHEDULE, self_condition=0.5)(lambda x, t: x, EPS, EPS, T)


def chosen(p: float, noise: df.Noise) -> bool:
    seed, _ = noise.fold_in(SELF_TAG).key
    return (seed & 0xFFFF_FFFF) / 2**32 < p


def test_bad_input() -> None:
    for call, message in (
        (lambda: df.target(EPS, NOISE, LEVEL, "w"), "target: to must be one of 'eps'"),
        (lambda: df.target(EPS, EPS[:1], LEVEL, "v"), r"target: noise must have shape \(3, 4, 6, 5\), got \(1, 4"),
        (lambda: df.dream(EPS, NOISE, EPS[:1], LEVEL), r"dream: pred must have shape \(3, 4, 6, 5\), got \(1, 4"),
        (lambda: df.dream(EPS, NOISE, EPS, LEVEL, p=-1.0), "dream: p must be finite and not negative, got -1.0"),
        (lambda: df.noise_mse(EPS, NOISE, normalise="all"), "noise_mse: normalise must be 'sum' or 'count', got 'all'"),
        (lambda: df.noise_mse(EPS, NOISE, mask=EPS[:2]), r"noise_mse: mask must be broadcastable to \(3, 4, 6, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
