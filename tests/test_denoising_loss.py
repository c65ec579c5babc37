"""denoising_loss: every combination against plain torch in fp64, EDM's loss, learned variances, masks, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dae_fast as df
from dae_fast import weighting
from dae_fast.ops.parameterisation import MIXES

from .cpu_backends import cpu_backends
from .test_compile import Recorder

SCHEDULE = df.Schedule.linear(50, 1e-3, 0.2)
NOISE = df.Noise(4).fold_in(9)
SHAPE = (5, 3, 6)
EVERY = (*MIXES, df.EDM(0.5))
KINDS = ("mse", "l1", "huber", "pseudo_huber")
LEVELS = torch.tensor([0, 7, 20, 49, 33])
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
MASK = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.6
MASK[1] = False


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def target_of(predict, x0, eps, alpha, sigma):
    if isinstance(predict, df.EDM):
        s = predict.sigma_data
        c_skip, c_out = alpha * s**2 / (sigma**2 + (alpha * s) ** 2), sigma * s / (sigma**2 + (alpha * s) ** 2).sqrt()
        return (x0 - c_skip * (alpha * x0 + sigma * eps)) / c_out
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "score": -eps / sigma, "flow": eps - x0}[predict]


def rho(r, kind, delta):
    """torch's own, and pseudo-Huber as Khrapov et al. write it."""
    zero = torch.zeros_like(r)
    if kind == "mse":
        return r**2
    if kind == "l1":
        return torch.nn.functional.l1_loss(r, zero, reduction="none")
    if kind == "huber":
        return torch.nn.functional.huber_loss(r, zero, reduction="none", delta=delta)
    return 2 * delta * ((r**2 + delta**2).sqrt() - delta)


def plain(pred, x0, eps, predict="eps", kind="mse", delta=None, weight=None, mask=None, reduction="mean"):
    alpha, sigma = (c[LEVELS][:, None, None] for c in (SCHEDULE.alpha, SCHEDULE.sigma))
    each = rho(pred - target_of(predict, x0, eps, alpha, sigma), kind, delta).flatten(1)
    kept = torch.ones_like(each) if mask is None else mask.expand(pred.shape).flatten(1).double()
    w = torch.ones(len(pred)).double() if weight is None else weight
    means = w * (each * kept).sum(1) / kept.sum(1).clamp(min=1)
    return {"mean": means.mean(), "sum": (means * kept.sum(1)).sum(), "none": means}[reduction]


def delta_of(kind: str) -> float | None:
    return 0.7 if kind in ("huber", "pseudo_huber") else None


WAYS = (
    ("mean", True, {}),
    ("sum", False, {"mask": MASK, "weight": WEIGHT}),
    ("none", True, {"mask": MASK[:1, :, :1], "weight": WEIGHT}),
    ("mean", True, {"mask": MASK}),
)


@cpu_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_the_target(dtype, backend):
    """Of x0, of a stored noise and of the weight, with those of pred or alone, and for an upstream gradient."""
    pred, x0, eps = (randn(*SHAPE, seed=k, dtype=dtype).requires_grad_() for k in (1, 2, 3))
    weight = WEIGHT.float().requires_grad_()
    for leaves in ((pred, x0, eps, weight), (x0, eps), (weight,)):
        wide = {
            t: t.detach().double().requires_grad_(any(t is leaf for leaf in leaves)) for t in (pred, x0, eps, weight)
        }
        given = [t if any(t is leaf for leaf in leaves) else t.detach() for t in (pred, x0, eps, weight)]
        options = {"predict": "v", "mask": MASK, "reduction": "sum"}
        for upstream in (1.0, -3.7):
            loss = df.denoising_loss(*given[:3], SCHEDULE[LEVELS], weight=given[3], **options)
            found = torch.autograd.grad(upstream * loss, leaves)
            p, y, z, w = wide.values()
            wanted = torch.autograd.grad(upstream * plain(p, y, z, weight=w, **options), [wide[t] for t in leaves])
            for t, got, exact in zip(leaves, found, wanted, strict=True):
                assert got.dtype == t.dtype
                eps_of = torch.finfo(t.dtype).eps
                torch.testing.assert_close(got.double(), exact, rtol=eps_of + 1e-5, atol=1e-5)


@cpu_backends
@pytest.mark.parametrize("reduction, fresh, options", WAYS, ids=range(len(WAYS)))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("predict", EVERY, ids=str)
def test_value_and_gradient(backend, predict, kind, reduction, fresh, options):
    pred, x0 = randn(*SHAPE), randn(*SHAPE, seed=2)
    eps = NOISE.normal(SHAPE, dtype=torch.float64) if fresh else randn(*SHAPE, seed=3)
    penalty = {"kind": kind, "delta": delta_of(kind), "reduction": reduction, "predict": predict, **options}
    found = []
    for call in (
        lambda p, x: df.denoising_loss(p, x, NOISE if fresh else eps, SCHEDULE[LEVELS], **penalty),
        lambda p, x: plain(p, x, eps, **penalty),
    ):
        for of_x0 in (False, True):  # of pred alone the gradient is made with the loss
            leaves = pred.clone().requires_grad_(), x0.clone().requires_grad_(of_x0)
            loss = call(*leaves)
            wanted = leaves if of_x0 and predict not in ("eps", "score") else leaves[:1]
            found.append((loss.detach(), *torch.autograd.grad(loss.sum(), wanted)))
    for got, want in zip(found[:2], found[2:], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@cpu_backends
def test_is_noise_mse(backend):
    """The same bits, and of the other target too, where that is what it is."""
    pred, x0 = randn(*SHAPE, dtype=torch.float32), randn(*SHAPE, seed=2, dtype=torch.float32)
    level = SCHEDULE[LEVELS]
    assert torch.equal(df.denoising_loss(pred, x0, NOISE, level), df.noise_mse(pred, NOISE))
    denoised = df.denoising_loss(pred, x0, None, None, predict="x0")
    torch.testing.assert_close(denoised, torch.nn.functional.mse_loss(pred, x0))


@pytest.mark.parametrize("predict, reads", [("eps", False), ("score", False), ("v", True), ("x0", True)])
def test_x0_is_read_where_the_target_has_it(predict, reads):
    pred, nothing = randn(*SHAPE), torch.full(SHAPE, torch.nan).double()
    assert df.denoising_loss(pred, nothing, NOISE, SCHEDULE[LEVELS], predict=predict).isnan() == reads


def test_edm_loss():
    """EDMLoss and EDMPrecond of Karras et al.'s code, written out."""
    P_mean, P_std, sigma_data = -1.2, 1.2, 0.5
    images, net = randn(4, 2, 5, 5), torch.nn.Conv2d(2, 2, 3, padding=1).double()
    sigma = (randn(4, seed=5) * P_std + P_mean).exp()
    noise = randn(4, 2, 5, 5, seed=6)

    s = sigma[:, None, None, None]
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma_data**2 + s**2).sqrt()
    D_yn = c_skip * (images + s * noise) + c_out * net(c_in * (images + s * noise))
    wanted = (weight * (D_yn - images) ** 2).mean()
    gradient = torch.autograd.grad(wanted, list(net.parameters()))

    denoiser = df.nn.EDMPreconditioner(lambda x, c_noise: net(x), sigma_data)
    level = df.Level(1.0, sigma)
    x_t = df.add_noise(images, noise, level)
    for loss in (
        df.denoising_loss(denoiser(x_t, level), images, noise, level, predict="x0", weight=weighting.EDM(sigma_data)),
        df.denoising_loss(denoiser.raw(x_t, level), images, noise, level, predict=df.EDM(sigma_data)),
        df.denoising_loss(denoiser.raw(x_t, level), images, noise, level, predict=df.EDM(sigma_data), weight="edm"),
    ):
        torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
        for got, want in zip(torch.autograd.grad(loss, list(net.parameters())), gradient, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


# Deltas.


@cpu_backends
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_scheduled_pseudo_huber(backend, predict):
    """huber_c of diffusers' training scripts, schedule "snr"; a column of the residual's rows."""
    huber_c = 0.1
    alphas_cumprod = SCHEDULE.alpha_bar[LEVELS]
    sigmas = ((1.0 - alphas_cumprod) / alphas_cumprod) ** 0.5
    delta = ((1 - huber_c) / (1 + sigmas) ** 2 + huber_c)[:, None, None]
    pred, x0, eps = randn(*SHAPE), randn(*SHAPE, seed=2), NOISE.normal(SHAPE, dtype=torch.float64)
    got = df.denoising_loss(
        pred,
        x0,
        NOISE,
        SCHEDULE[LEVELS],
        predict=predict,
        kind="pseudo_huber",
        delta=lambda alpha, sigma: (1 - huber_c) * (alpha / (alpha + sigma)) ** 2 + huber_c,
    )
    torch.testing.assert_close(got, plain(pred, x0, eps, predict, "pseudo_huber", delta), rtol=1e-10, atol=0)


def test_deltas_are_no_tables():
    """A loop may change its delta at every step."""
    schedule, x = df.Schedule.linear(20), randn(3, 4)
    counts = set()
    for k in range(4):
        for delta in (0.1 + k, lambda alpha, sigma, k=k: alpha + k):
            df.denoising_loss(x, x, NOISE, schedule[torch.tensor([1, 2, 3])], predict="v", kind="huber", delta=delta)
        counts.add(len(schedule._tables))
    assert len(counts) == 1


@cpu_backends
def test_delta_at_one_level_and_at_levels_by_hand(backend):
    pred, x0 = randn(*SHAPE), randn(*SHAPE, seed=2)
    t, alpha, sigma = 7, SCHEDULE.alpha[7], SCHEDULE.sigma[7]
    same = (SCHEDULE[t], SCHEDULE[torch.full((5,), t)], df.Level(float(alpha), float(sigma)), df.Level(alpha, sigma))
    losses = [
        df.denoising_loss(pred, x0, NOISE, level, predict="v", kind="huber", delta=delta)
        for level in same
        for delta in (float(alpha / 2), lambda alpha, sigma: alpha / 2)
    ]
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(len(losses)), rtol=1e-12, atol=0)


# Learned log-variance.


@cpu_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_log_variance(backend, reduction, masked):
    """w loss / e^u + u (Karras et al. 2024, eq. 21); a sum has it once for each element that counts."""
    pred, x0, u = randn(*SHAPE), randn(*SHAPE, seed=2), randn(5, seed=3)
    eps, mask = NOISE.normal(SHAPE, dtype=torch.float64), MASK if masked else None
    found = []
    for ours in (True, False):
        p, v = pred.clone().requires_grad_(), u.clone().requires_grad_()
        if ours:
            loss = df.denoising_loss(
                p,
                x0,
                NOISE,
                SCHEDULE[LEVELS],
                predict="v",
                weight=WEIGHT,
                mask=mask,
                reduction=reduction,
                log_variance=v,
            )
        else:
            each = plain(p, x0, eps, "v", weight=WEIGHT, mask=mask, reduction="none") / v.exp() + v
            kept = 18 if mask is None else mask.flatten(1).sum(1)
            loss = {"mean": each.mean(), "sum": (each * kept).sum(), "none": each}[reduction]
        found.append((loss, *torch.autograd.grad(loss.sum(), (p, v))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_log_variance_learns_the_log_of_the_loss():
    pred, x0 = randn(*SHAPE), randn(*SHAPE, seed=2)
    _, each = df.denoising_loss(pred, x0, NOISE, SCHEDULE[LEVELS], predict="v", return_per_sample=True)
    u = each.log().requires_grad_()
    loss = df.denoising_loss(pred, x0, NOISE, SCHEDULE[LEVELS], predict="v", log_variance=u)
    torch.testing.assert_close(loss, 1 + each.log().mean())
    assert torch.autograd.grad(loss, u)[0].abs().max() < 1e-15


# Gradients of everything.


@pytest.mark.parametrize("predict", EVERY, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(predict, kind):
    """Of every floating input, first and second order, those of a level made by hand too."""
    B = 2
    inputs = [randn(B, 3, seed=k) for k in range(3)]
    inputs += [torch.tensor([0.6, 0.9]), torch.tensor([0.8, 0.5]), torch.tensor([0.7, 1.5]), torch.tensor([0.3, -0.2])]
    inputs = [t.double().requires_grad_() for t in inputs]

    def loss(pred, x0, noise, alpha, sigma, weight, u):
        return df.denoising_loss(
            pred,
            x0,
            noise,
            df.Level(alpha, sigma),
            predict=predict,
            weight=weight,
            kind=kind,
            delta=delta_of(kind),
            log_variance=u,
        )

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


# Masks, noise, values of each sample.


@cpu_backends
@pytest.mark.parametrize("predict", ["x0", "v"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_drawn_masks(backend, predict, reduction):
    corruption = df.Masking(0.4, df.Noise(8))
    pred, x0 = randn(*SHAPE), randn(*SHAPE, seed=2)
    for drawn, stored in (
        (corruption, corruption.mask(SHAPE)),
        (corruption.masked, corruption.mask(SHAPE)),
        (~corruption, ~corruption.mask(SHAPE)),
    ):
        found = []
        for mask in (drawn, stored):
            p = pred.clone().requires_grad_()
            loss = df.denoising_loss(p, x0, NOISE, SCHEDULE[LEVELS], predict=predict, mask=mask, reduction=reduction)
            found.append((loss, *torch.autograd.grad(loss, p)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@cpu_backends
@pytest.mark.parametrize("predict", EVERY, ids=str)
def test_structured_noise(backend, predict):
    """Offset noise is the eps of the target, and pyramid noise."""
    shape = (5, 2, 4, 4)
    pred, x0 = randn(*shape), randn(*shape, seed=2)
    for noise in (df.OffsetNoise(NOISE, 0.3), df.PyramidNoise(NOISE), df.PyramidNoise(NOISE, levels=1)):
        eps = noise.normal(shape, dtype=torch.float64)
        found = []
        for given in (noise, eps):
            p = pred.clone().requires_grad_()
            loss = df.denoising_loss(p, x0, given, SCHEDULE[LEVELS], predict=predict, weight=WEIGHT)
            found.append((loss, *torch.autograd.grad(loss, p)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@cpu_backends
def test_per_sample(backend):
    """Unweighted, without gradient, and from the pass that makes the loss."""
    pred, x0 = randn(*SHAPE).requires_grad_(), randn(*SHAPE, seed=2)
    options = {"predict": "v", "kind": "l1", "mask": MASK}
    loss, each = df.denoising_loss(pred, x0, NOISE, SCHEDULE[LEVELS], weight=WEIGHT, return_per_sample=True, **options)
    assert loss.requires_grad and not each.requires_grad
    wanted = df.denoising_loss(pred.detach(), x0, NOISE, SCHEDULE[LEVELS], reduction="none", **options)
    assert torch.equal(each, wanted) and each[1] == 0
    torch.testing.assert_close(loss, (WEIGHT * each).mean())


@pytest.mark.parametrize("predict", EVERY, ids=str)
def test_one_pass_with_the_gradient(predict, monkeypatch):
    """The kernel of the loss runs once, and once more where the gradient that it made does not serve."""
    with df.use_backend("native"):
        calls = []

        def count(module, name):
            function = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args: (calls.append(args), function(*args))[1])

        count(df.kernels.native, "residual")
        count(df.primitives.residuals, "fast_loss_grad")
        pred, x0 = randn(*SHAPE, dtype=torch.float32).requires_grad_(), randn(*SHAPE, seed=2, dtype=torch.float32)
        loss = df.denoising_loss(pred, x0, NOISE, SCHEDULE[LEVELS], predict=predict, weight="min_snr")
        loss.backward(retain_graph=True)
        assert len(calls) == 1
        (2 * loss).backward()
    assert len(calls) == 2


@cpu_backends
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-6), (torch.float16, 2e-6)])
@pytest.mark.parametrize("predict", ["eps", "x0", "v", "flow", df.EDM(0.5)], ids=str)
def test_dtypes(backend, predict, dtype, tolerance):
    """Sums are of fp32: only the inputs and the gradient are rounded."""
    pred, x0 = randn(*SHAPE, dtype=dtype).requires_grad_(), randn(*SHAPE, seed=2, dtype=dtype)
    eps = NOISE.normal(SHAPE, dtype=torch.float32).double()
    got = df.denoising_loss(pred, x0, NOISE, SCHEDULE[LEVELS], predict=predict, kind="huber", delta=0.5)
    wide = pred.detach().double().requires_grad_()
    want = plain(wide, x0.double(), eps, predict, "huber", 0.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=0)
    a, b = torch.autograd.grad(got, pred)[0], torch.autograd.grad(want, wide)[0]
    assert a.dtype == dtype
    small = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-6 * float(b.abs().max()) + small)


def test_mixed_dtypes():
    """A bf16 network on fp32 data: compared in fp32, the gradient in bf16."""
    pred, x0 = randn(*SHAPE, dtype=torch.bfloat16).requires_grad_(), randn(*SHAPE, seed=2, dtype=torch.float32)
    loss = df.denoising_loss(pred, x0, NOISE, SCHEDULE[LEVELS], predict="v")
    wide = df.denoising_loss(pred.detach().float(), x0, NOISE, SCHEDULE[LEVELS], predict="v")
    assert torch.equal(loss.detach(), wide) and torch.autograd.grad(loss, pred)[0].dtype == torch.bfloat16


def test_zero_terminal_snr_trains():
    """v with min-SNR, and x0: finite, gradients too, where eps has none."""
    schedule = SCHEDULE.zero_terminal_snr()
    x0 = randn(*SHAPE)
    for predict in ("v", "x0", "flow", df.EDM(0.5)):
        pred = randn(*SHAPE, seed=2).requires_grad_()
        loss = df.denoising_loss(pred, x0, NOISE, schedule[LEVELS], predict=predict, weight="min_snr")
        assert loss.isfinite() and torch.autograd.grad(loss, pred)[0].isfinite().all()


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    OPTIONS = (
        {"predict": df.EDM(0.5), "mask": MASK},
        {"kind": "pseudo_huber", "delta": lambda alpha, sigma: alpha + 0.1},
        {"predict": "v", "kind": "huber", "delta": 0.5, "reduction": "sum"},
        {"predict": "x0", "reduction": "none"},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(map(str, o)))
    def test_as_eager(self, options):
        """Values and gradients, with fresh noise, a learned variance and the values of each sample."""

        def f(pred, x0, noise, t, u):
            return df.denoising_loss(pred, x0, noise, SCHEDULE[t], log_variance=u, return_per_sample=True, **options)

        recorder = Recorder()
        compiled, x0 = recorder.compile(f), randn(*SHAPE, seed=2)
        for step in range(3):
            found = []
            for g in (f, compiled):
                leaves = randn(*SHAPE).requires_grad_(), randn(5, seed=3).requires_grad_()
                loss, each = g(leaves[0], x0, NOISE.fold_in(step), (LEVELS + step) % 50, leaves[1])
                found.append((loss, each, *torch.autograd.grad(loss.sum(), leaves)))
            for want, got in zip(*found, strict=True):
                torch.testing.assert_close(got, want)
        assert recorder.compilations <= 2 and "sample_means" in recorder.ops

    def test_drawn_mask_and_inductor(self):
        def f(pred, x0, noise, t):
            return df.denoising_loss(
                pred, x0, noise, SCHEDULE[t], predict="v", weight="min_snr", mask=df.Masking(0.5, df.Noise(3))
            )

        pred, x0 = randn(*SHAPE), randn(*SHAPE, seed=2)
        want = f(pred, x0, NOISE, LEVELS)
        torch.testing.assert_close(torch.compile(f, fullgraph=True)(pred, x0, NOISE, LEVELS), want)


def test_weights_of_doubles():
    """pred in fp32 and x0 in fp64: the loss is of doubles, and so are the weights of functions and log_variance."""
    g = torch.Generator().manual_seed(0)
    pred, x0 = torch.randn(3, 5, generator=g), torch.randn(3, 5, generator=g, dtype=torch.float64)
    level, u = SCHEDULE[torch.tensor([0, 3, 7])], torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    w = 1 / (3 + level._schedule.sigma[level.t])
    each = (pred.double() - x0).square().mean(1)
    for got, wanted in (
        (
            df.denoising_loss(pred, x0, None, level, predict="x0", weight=lambda alpha, sigma: 1 / (3 + sigma)),
            (w * each).mean(),
        ),
        (df.denoising_loss(pred, x0, None, level, predict="x0", log_variance=u), (each * torch.exp(-u) + u).mean()),
    ):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)
    for reduction in ("mean", "sum", "none"):
        loss = df.denoising_loss(pred, x0.float(), None, level, predict="x0", log_variance=u, reduction=reduction)
        assert loss.dtype == torch.float32


def test_a_small_residual_keeps_its_slope(backend: str) -> None:
    """The pseudo-Huber's is 2 delta r / sqrt(r^2 + delta^2), to a few roundings however small r is."""
    r = torch.tensor([[3e-7, -2e-4, 0.05, 40.0, 3e19]], requires_grad=True)
    loss = df.residual_loss(r, kind="pseudo_huber", delta=3.0, reduction="sum")
    (got,) = torch.autograd.grad(loss, r)
    wide = r.detach().double()
    torch.testing.assert_close(got.double(), 6 * wide / torch.hypot(wide, torch.tensor(3.0)), rtol=4e-7, atol=0)


@pytest.mark.parametrize("delta", [0.5, torch.full((0,), 0.5)], ids=["a float", "a tensor"])
def test_an_empty_batch_has_a_delta(backend: str, delta: float | Tensor) -> None:
    nothing, level = torch.empty(0, 3), df.Level(torch.empty(0), torch.empty(0))
    loss = df.denoising_loss(nothing, nothing, df.Noise(0), level, kind="huber", delta=0.5, reduction="sum")
    assert loss == 0
    if isinstance(delta, Tensor):
        assert df.residual_loss(nothing, (1.0, nothing), kind="huber", delta=delta, reduction="sum") == 0


def test_weights_that_are_nan_or_negative() -> None:
    """Nothing hides a NaN, and what is negative is divided by its sum as anything else."""
    pred = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    weights = torch.ones(4, 3)
    assert torch.equal(df.noise_mse(pred, NOISE, mask=-weights), df.noise_mse(pred, NOISE, mask=weights))
    weights[1, 2] = float("nan")
    for wants in (False, True):
        each = df.noise_mse(pred.clone().requires_grad_(wants), NOISE, mask=weights, reduction="none")
        assert each.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("weighing", [lambda m: m, lambda m: m > 0.5], ids=["weights", "bool"])
def test_samples_losses_are_normalised_as_the_loss_is(weighing: Any) -> None:
    g = torch.Generator().manual_seed(3)
    pred, mask, level = torch.randn(4, 3, generator=g), weighing(torch.rand(4, 3, generator=g)), df.Level(0.6, 0.8)
    given = {"mask": mask, "normalise": "count"}
    for how in ("mean", "sum"):
        _, each = df.denoising_loss(pred, pred, NOISE, level, reduction=how, return_per_sample=True, **given)
        torch.testing.assert_close(each, df.denoising_loss(pred, pred, NOISE, level, reduction="none", **given))
    _, of_x0 = df.noise_mse(pred, NOISE, level=level, return_x0_mse=True, **given)
    torch.testing.assert_close(of_x0, (0.8 / 0.6) ** 2 * df.noise_mse(pred, NOISE, reduction="none", **given))
