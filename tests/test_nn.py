"""DenoisingLoss against the objective written in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy import stats

import dae_fast as df
from dae_fast.nn import DenoisingLoss, EDMPreconditioner, LevelStatistics

from .conftest import BACKENDS

T = 50
SCHEDULE = df.Schedule.linear(T, 1e-3, 0.2)
F_OF = df.EDM(0.5)
PREDICT = ("eps", "x0", "v", "score", "flow", F_OF)


class Network(torch.nn.Module):
    """A small one that looks at x_t, t and a label."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter((torch.randn(6, 6, generator=g, dtype=torch.float64) / 2).to(dtype))
        self.bias = torch.nn.Parameter(torch.randn(6, generator=g, dtype=torch.float64).to(dtype))

    def forward(self, x_t, t, label=None, *, gain=1.0):
        dtype = self.weight.dtype
        out = torch.tanh(x_t.to(dtype) @ self.weight + t.to(dtype)[:, None, None] / T) * self.bias * gain
        return out if label is None else out + label.to(dtype)[:, None, None]


def make(B=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, B, 3, 6, generator=g, dtype=torch.float64).to(dtype)
    return x0, eps, torch.randint(T, (B,), generator=g)


def plain(net, x0, eps, t, predict, schedule=SCHEDULE, weight=None, level_weight=None, mask=None, **arguments):
    """The three values, in fp64."""
    alpha, sigma = (c[t][:, None, None] for c in (schedule.alpha, schedule.sigma))
    x_t = alpha * x0.double() + sigma * eps.double()
    pred = net(x_t.to(x0.dtype), t, **arguments).double()
    x0, eps = x0.double(), eps.double()
    size = (sigma**2 + (0.5 * alpha) ** 2).sqrt()
    c_skip, c_out = alpha * 0.25 / size**2, sigma * 0.5 / size
    target = {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "flow": eps - x0,
        F_OF: (x0 - c_skip * (alpha * x0 + sigma * eps)) / c_out,
    }[predict]
    # x_t = alpha x0 + sigma eps, solved with the prediction for x0 and eps.
    x0_hat = {
        "eps": lambda: (x_t - sigma * pred) / alpha,
        "x0": lambda: pred,
        "v": lambda: (alpha * x_t - sigma * pred) / (alpha**2 + sigma**2),
        "score": lambda: (x_t + sigma**2 * pred) / alpha,
        "flow": lambda: (x_t - sigma * pred) / (alpha + sigma),
        F_OF: lambda: c_skip * x_t + c_out * pred,
    }[predict]()
    eps_hat = (x_t - alpha * x0_hat) / sigma

    def mean(square):
        if mask is None:
            return square.flatten(1).mean(1)
        kept = mask.expand(square.shape).flatten(1)
        return torch.where(kept, square.flatten(1), 0).sum(1) / kept.sum(1).clamp(min=1)

    w = torch.ones(len(x0), dtype=torch.float64)
    if weight is not None:
        w = w * weight
    if level_weight is not None:
        w = w * level_weight[t]
    return {
        "loss": (w * mean((pred - target) ** 2)).mean(),
        "noise_mse": mean((eps_hat - eps) ** 2).mean().detach(),
        "x0_mse": mean((x0_hat - x0) ** 2).mean().detach(),
    }


def compare(got, wanted, got_net, wanted_net, tolerance=1e-10):
    assert list(got) == ["loss", "noise_mse", "x0_mse"]
    for name, value in got.items():
        assert value.shape == () and value.requires_grad == (name == "loss")
        torch.testing.assert_close(value.double(), wanted[name], rtol=tolerance, atol=tolerance, msg=name)
    got["loss"].backward()
    wanted["loss"].backward()
    for ours, theirs in zip(got_net.parameters(), wanted_net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad.double(), rtol=tolerance, atol=tolerance)


WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
LEVEL_WEIGHTS = torch.rand(T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
MASK = torch.rand(5, 3, 6, generator=torch.Generator().manual_seed(3)) < 0.6
MASK[1] = False


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": WEIGHTS},
        {"level_weight": LEVEL_WEIGHTS},
        {"mask": MASK},
        {"mask": MASK[:1, :, :1]},
        {"weight": WEIGHTS, "level_weight": LEVEL_WEIGHTS, "mask": MASK},
    ],
    ids=["plain", "weight", "level_weight", "mask", "broadcast-mask", "all"],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["Noise", "tensor"])
@pytest.mark.parametrize("predict", PREDICT)
def test_value_and_gradient(backend, predict, fresh, options):
    x0, eps, t = make()
    ours, theirs = Network(), Network()
    objective = DenoisingLoss(SCHEDULE, predict, level_weight=options.get("level_weight"))
    call = {k: v for k, v in options.items() if k != "level_weight"}
    if fresh:
        noise = df.Noise(4).fold_in(9)
        eps, t = noise.normal(x0.shape, dtype=x0.dtype), objective.draw_levels(noise, x0)
        got = objective(ours, x0, noise, **call)
    else:
        got = objective(ours, x0, eps, t, **call)
    compare(got, plain(theirs, x0, eps, t, predict, **options), ours, theirs)


@pytest.mark.parametrize("predict", PREDICT)
def test_variance_exploding_schedule(predict):
    x0, eps, t = make()
    schedule = df.Schedule.geometric(T, 0.1, 5.0)
    ours, theirs = Network(), Network()
    got = DenoisingLoss(schedule, predict)(ours, x0, eps, t.int())
    compare(got, plain(theirs, x0, eps, t, predict, schedule), ours, theirs)


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize(
    "data, net, tolerance",
    [
        (torch.float32, torch.float32, 2e-5),
        (torch.float32, torch.bfloat16, 2e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.bfloat16, torch.float32, 2e-5),
        (torch.float16, torch.float16, 4e-3),
    ],
)
def test_dtypes(predict, data, net, tolerance):
    """The network sees x_t rounded to its own dtype in both; sigma keeps away from 0, where score explodes."""
    schedule = df.Schedule.geometric(T, 0.5, 2.0)
    x0, _, t = make(dtype=data)
    ours, theirs, noise = Network(net), Network(net), df.Noise(4)
    eps = noise.normal(x0.shape, dtype=torch.float32)
    got = DenoisingLoss(schedule, predict)(ours, x0, noise, t)
    assert all(v.dtype == torch.float32 for v in got.values())
    assert ours.weight.grad is None
    if data == torch.bfloat16 and predict != "eps":  # the target is made from x0, in fp32
        tolerance = max(tolerance, 1e-4)
    compare(got, plain(theirs, x0, eps, t, predict, schedule), ours, theirs, tolerance)


def test_gradient_of_the_data(backend):
    """x0 may be an encoder's output: both x_t and the target depend on it."""
    x0, eps, t = make()
    net = Network()
    leaves = []
    for value in (lambda x: DenoisingLoss(SCHEDULE, "v")(net, x, eps, t), lambda x: plain(net, x, eps, t, "v")):
        leaf = x0.clone().requires_grad_()
        value(leaf)["loss"].backward()
        leaves.append(leaf.grad)
    torch.testing.assert_close(*leaves, rtol=1e-10, atol=1e-12)
    assert leaves[0].abs().min() > 0


def test_arguments_for_the_network():
    x0, eps, t = make()
    label = torch.arange(5)
    ours, theirs = Network(), Network()
    got = DenoisingLoss(SCHEDULE)(ours, x0, eps, t, label=label, gain=0.5)
    compare(got, plain(theirs, x0, eps, t, "eps", label=label, gain=0.5), ours, theirs)


def test_the_network_sees_x_t_and_t():
    x0, _, _ = make(dtype=torch.float32)
    noise, objective, seen = df.Noise(4), DenoisingLoss(SCHEDULE), []

    def net(x_t, t):
        seen.append((x_t, t))
        return x_t

    objective(net, x0, noise)
    x_t, t = seen[0]
    assert t.dtype == torch.int64 and torch.equal(t, objective.draw_levels(noise, x0))
    assert torch.equal(x_t, df.add_noise(x0, noise, SCHEDULE[t]))


@pytest.mark.parametrize("weighting", ["min_snr", df.weighting.MinSNR(2.0), lambda alpha, sigma: alpha])
def test_weighting(weighting):
    """What each level counts, times what the caller gives."""
    x0, eps, t = make()
    ours, theirs = Network(), Network()
    got = DenoisingLoss(SCHEDULE, "v", weighting=weighting, level_weight=LEVEL_WEIGHTS)(
        ours, x0, eps, t, weight=WEIGHTS
    )
    snr = SCHEDULE.snr
    gamma = 5.0 if weighting == "min_snr" else 2.0
    by_level = SCHEDULE.alpha if callable(weighting) and not isinstance(weighting, df.weighting.MinSNR) else None
    by_level = snr.clamp(max=gamma) / (snr + 1) if by_level is None else by_level
    wanted = plain(theirs, x0, eps, t, "v", weight=WEIGHTS, level_weight=LEVEL_WEIGHTS * by_level)
    compare(got, wanted, ours, theirs)


@pytest.mark.parametrize("noise", [df.OffsetNoise(df.Noise(4)), df.PyramidNoise(df.Noise(4))], ids=str)
def test_structured_noise(noise):
    x0, _, t = make()
    x0 = x0[:, :, :, None]
    found = []
    for given in (noise, noise.normal(x0.shape, dtype=torch.float64)):
        pred = x0.clone().requires_grad_()
        loss = DenoisingLoss(SCHEDULE, "v")(lambda x_t, t, p=pred: p * x_t, x0, given, t)["loss"]
        found.append((loss, *torch.autograd.grad(loss, pred)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_drawn_masks():
    x0, _, t = make()
    masking, net = df.Masking(0.4, df.Noise(8)), Network()
    drawn = DenoisingLoss(SCHEDULE)(net, x0, df.Noise(4), t, mask=masking)
    stored = DenoisingLoss(SCHEDULE)(net, x0, df.Noise(4), t, mask=masking.mask(x0.shape))
    for name, value in drawn.items():
        torch.testing.assert_close(value, stored[name], rtol=1e-12, atol=0)


# Levels.


@pytest.mark.parametrize("levels", [2, 10, 1000])
def test_levels_are_uniform(levels):
    """Chi-square over consecutive samples and over steps; p is uniform, and the seed is fixed."""
    objective, N = DenoisingLoss(df.Schedule.cosine(levels)), 200_000
    x0 = torch.empty(N, 0)
    over_samples = objective.draw_levels(df.Noise(5).fold_in(0), x0)
    over_steps = torch.cat([objective.draw_levels(df.Noise(6).fold_in(k), x0[:100]) for k in range(500)])
    for t in (over_samples, over_steps):
        assert t.dtype == torch.int64 and t.min() == 0 and t.max() == levels - 1
        counts = torch.bincount(t, minlength=levels).numpy()
        assert 0.001 < stats.chisquare(counts).pvalue < 0.999


def test_levels_are_independent_of_neighbours_and_of_the_noise():
    objective, N = DenoisingLoss(SCHEDULE), 100_000
    noise, x0 = df.Noise(7), torch.empty(100_000, 0)
    t = objective.draw_levels(noise, x0).double()
    z = noise.normal((N, 1))[:, 0].double()
    next_step = objective.draw_levels(df.Noise(7).fold_in(1), x0).double()
    for other in (z, z.abs(), next_step, t.roll(1)):
        correlation = torch.corrcoef(torch.stack((t, other)))[0, 1]
        assert abs(correlation) < 4 / N**0.5


def test_levels_depend_on_seed_step_and_sample_alone():
    objective = DenoisingLoss(SCHEDULE)
    noise, x0 = df.Noise(7).fold_in(3), torch.zeros(64, 2)
    t = objective.draw_levels(noise, x0)
    assert torch.equal(objective.draw_levels(noise, torch.zeros(64, 5, 5, dtype=torch.bfloat16)), t)
    assert torch.equal(objective.draw_levels(noise, x0[:7]), t[:7])
    assert torch.equal(objective.draw_levels(df.Noise(7, first_sample=60).fold_in(3), x0[:4]), t[60:])
    ids = torch.tensor([63, 0, 5])
    assert torch.equal(objective.draw_levels(df.Noise(7, sample=ids).fold_in(3), x0[:3]), t[ids])
    assert not torch.equal(objective.draw_levels(df.Noise(7).fold_in(4), x0), t)
    assert not torch.equal(objective.draw_levels(df.Noise(8).fold_in(3), x0), t)
    state = torch.get_rng_state()
    objective(lambda x, t: x, x0, noise)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif("native" not in BACKENDS, reason="the reference is many operations")
@pytest.mark.parametrize("weighting", [None, "min_snr"])
@pytest.mark.parametrize("predict", ["eps", "v", F_OF], ids=str)
def test_a_training_step_is_three_launches(predict, weighting):
    """Levels, noising, and the loss with its weights, errors and gradient: all else allocates, or is a view."""
    objective, x0 = DenoisingLoss(SCHEDULE, predict, weighting=weighting), torch.randn(5, 3, 6)
    net = Network(torch.float32)
    pred = torch.randn(5, 3, 6, requires_grad=True)
    objective(net, x0, df.Noise(0))  # tables are made
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        objective(lambda x, t: pred, x0, df.Noise(1))
    views = {"view", "reshape", "unbind", "select", "as_strided", "empty", "empty_like", "empty_strided", "new_empty"}
    launches = [e.name for e in seen.events() if e.name.removeprefix("aten::") not in {*views, "_Loss"}]
    assert [name.split()[0] for name in launches] == [f"dae_fast::{n}" for n in ("bits", "add_noise", "DenoisingLoss")]


def test_shards_make_the_whole_batch():
    x0, net, objective = make(8)[0], Network(), DenoisingLoss(SCHEDULE, "v")
    whole = objective(net, x0, df.Noise(1))
    parts = [objective(net, x0[:4], df.Noise(1)), objective(net, x0[4:], df.Noise(1, first_sample=4))]
    for name, value in whole.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value, rtol=1e-12, atol=0)


def test_continuous_levels():
    """EDM's training in one call: sigmas drawn log-normal, the preconditioned network, its weight."""
    schedule, net = df.ContinuousSchedule.edm(), Network()
    denoiser = EDMPreconditioner(lambda x, c_noise: net(x, c_noise))
    objective, x0, noise = DenoisingLoss(schedule, "x0", weighting="edm"), make()[0], df.Noise(3)
    got = objective(denoiser, x0, noise)
    sigma = schedule.draw(noise, 5)
    assert torch.equal(objective.draw_levels(noise, x0), sigma)
    eps, s = noise.normal(x0.shape, dtype=torch.float64), sigma.double()[:, None, None]
    error = (denoiser(x0 + s * eps, sigma) - x0).square()
    weight = (s**2 + 0.25) / (0.5 * s) ** 2
    torch.testing.assert_close(got["loss"], (weight * error).mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(got["x0_mse"], error.mean().detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(got["noise_mse"], (error / s**2).mean().detach(), rtol=1e-9, atol=0)
    given = torch.tensor([0.1, 1.0, 2.0, 50.0, 0.002])
    assert objective(denoiser, x0, noise, given)["loss"].isfinite()


# The module.


def test_state():
    assert dict(DenoisingLoss(SCHEDULE).state_dict()) == {}
    objective = DenoisingLoss(SCHEDULE, level_weight=LEVEL_WEIGHTS)
    assert list(objective.state_dict()) == ["level_weight"]
    other = DenoisingLoss(SCHEDULE, level_weight=torch.zeros(T, dtype=torch.float64))
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.level_weight, LEVEL_WEIGHTS)
    assert list(objective.parameters()) == []
    assert objective.to(torch.float32).level_weight.dtype == torch.float32
    assert objective.to("meta").level_weight.device.type == "meta"


def test_copies_and_compositions():
    x0, eps, t = make()
    net = Network()
    objective = DenoisingLoss(SCHEDULE, "v", level_weight=LEVEL_WEIGHTS)
    wanted = objective(net, x0, eps, t)["loss"]
    assert torch.equal(copy.deepcopy(objective)(net, x0, eps, t)["loss"], wanted)
    assert torch.equal(objective.train()(net, x0, eps, t)["loss"], objective.eval()(net, x0, eps, t)["loss"])
    holder = torch.nn.Module()
    holder.objective, holder.net = objective, net
    assert "objective.level_weight" in holder.state_dict()


def test_without_gradients():
    x0, eps, t = make()
    with torch.no_grad():
        values = DenoisingLoss(SCHEDULE)(Network(), x0, eps, t)
    assert not any(v.requires_grad for v in values.values())
    wanted = plain(Network(), x0, eps, t, "eps")
    for name, value in values.items():
        torch.testing.assert_close(value, wanted[name].detach())


def test_it_trains():
    """Linear regression of eps on x_t at one level: plain gradient descent comes to the closed form."""
    schedule = df.Schedule.from_alpha_bar([0.5])
    objective, net = DenoisingLoss(schedule), torch.nn.Linear(1, 1).double()
    data = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(40):
        step.zero_grad()
        objective(lambda x, t: net(x), data, df.Noise(0))["loss"].backward()
        step.step()
    x_t = df.add_noise(data, df.Noise(0), schedule[0])
    eps = df.Noise(0).normal(data.shape, dtype=torch.float64)
    fit = torch.linalg.lstsq(torch.cat((x_t, torch.ones_like(x_t)), 1), eps).solution[:, 0]
    torch.testing.assert_close(torch.stack((net.weight[0, 0], net.bias[0])).detach(), fit, rtol=1e-6, atol=1e-6)
    assert abs(fit[0] - 0.5**0.5) < 4 * (0.5 / 20_000) ** 0.5


# EDM's preconditioning.


def precondition(net, x, sigma, sigma_data=0.5):
    """EDMPrecond of Karras et al.'s code."""
    s = sigma.reshape(-1, 1, 1)
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma_data**2 + s**2).sqrt()
    return c_skip * x + c_out * net(c_in * x, (s.log() / 4).flatten())


@pytest.mark.parametrize("sigma_data", [0.5, 1.5])
def test_preconditioner(backend, sigma_data):
    x, _, _ = make()
    sigma = torch.tensor([0.002, 0.3, 1.0, 7.0, 80.0], dtype=torch.float64)
    nets = Network(), Network()
    denoiser = EDMPreconditioner(nets[0], sigma_data)
    assert {name for name, _ in denoiser.named_parameters()} == {"net.weight", "net.bias"}
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = denoiser(leaves[0], sigma), precondition(nets[1], leaves[1], sigma, sigma_data)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    got.square().sum().backward()
    want.square().sum().backward()
    for a, b in zip((leaves[0], *nets[0].parameters()), (leaves[1], *nets[1].parameters()), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    for level in (df.Level(1.0, sigma), df.Level(torch.ones(5).double(), sigma)):
        assert torch.equal(denoiser(x, level), got)
    one = denoiser(x, 0.3)
    torch.testing.assert_close(denoiser(x, sigma[1]), one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one[1], got[1], rtol=1e-12, atol=1e-12)


def test_preconditioner_of_any_schedule():
    """D of x_t / alpha at sigma / alpha."""
    x, _, t = make()
    net = Network()
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    got = EDMPreconditioner(net)(x, SCHEDULE[t])
    want = precondition(net, x / alpha[:, None, None], sigma / alpha)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "data, net, out",
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_preconditioner_dtypes(data, net, out):
    x, sigma = make(dtype=data)[0], torch.tensor([0.1, 0.3, 1.0, 7.0, 80.0])
    got = EDMPreconditioner(Network(net))(x, sigma, gain=0.5)
    assert got.dtype == out and got.isfinite().all()


def test_compiled_preconditioner():
    x, net, sigma = make()[0], Network(), torch.tensor([0.1, 0.3, 1.0, 7.0, 80.0])
    denoiser = EDMPreconditioner(net)
    compiled = torch.compile(denoiser, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, sigma), denoiser(x, sigma))
    torch.testing.assert_close(compiled(x, SCHEDULE[LEVELS]), denoiser(x, SCHEDULE[LEVELS]))


# Statistics of the levels.


def test_statistics():
    stats = LevelStatistics(4)
    t, loss = torch.tensor([0, 2, 2, 3, 0, 2]), torch.tensor([1.0, 2.0, 4.0, 5.0, 3.0, 6.0])
    for part in (slice(0, 2), slice(2, 6)):
        stats.update(t[part], loss[part])
    assert stats.count.tolist() == [2, 0, 3, 1]
    assert stats.mean[[0, 2, 3]].tolist() == [2, 4, 5] and stats.mean[1].isnan()
    torch.testing.assert_close(stats.second_moment[[0, 2, 3]], torch.tensor([5, 56 / 3, 25]).double())
    other = LevelStatistics(4)
    other.load_state_dict(stats.state_dict())
    assert torch.equal(other.total, stats.total) and list(stats.parameters()) == []


def test_statistics_in_bins():
    edges = torch.tensor([0.1, 1.0, 10.0])
    stats = LevelStatistics(edges)
    stats.update(torch.tensor([0.1, 0.99, 1.0, 10.0]), torch.tensor([1.0, 3.0, 5.0, 9.0], dtype=torch.bfloat16))
    assert stats.count.tolist() == [2, 2] and stats.mean.tolist() == [2, 7]
    stats = LevelStatistics([0, 500, 1000])
    stats.update(torch.tensor([0, 499, 500, 999]), torch.ones(4))
    assert stats.count.tolist() == [2, 2]


def test_statistics_fade():
    stats = LevelStatistics(2, decay=0.5)
    for value in (8.0, 2.0):
        stats.update(torch.tensor([0]), torch.tensor([value]))
    assert stats.count[0] == 1.5 and stats.mean[0] == pytest.approx((0.5 * 8 + 2) / 1.5)


def test_statistics_of_a_loss():
    """What the loss is at each level, from its own pass."""
    x0, eps, t = make()
    pred, stats = eps * 2, LevelStatistics(T)
    _, each = df.denoising_loss(pred, x0, eps, SCHEDULE[t], weight="min_snr", return_per_sample=True)
    stats.update(t, each)
    for k, level in enumerate(t):
        torch.testing.assert_close(stats.mean[level], eps[k].square().mean())


def test_probabilities():
    """weights() of improved-diffusion's LossSecondMomentResampler, of all losses there were."""
    stats = LevelStatistics(3)
    losses = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.5, 0.1]])
    stats.update(torch.arange(3).repeat(2), losses.T.reshape(-1))
    assert stats.probabilities().tolist() == [1 / 3] * 3, "too few yet"
    weights = (losses**2).mean(1).sqrt().double()
    weights /= weights.sum()
    weights = weights * (1 - 0.001) + 0.001 / 3
    torch.testing.assert_close(stats.probabilities(least=2), weights, rtol=1e-7, atol=0)
    nothing = LevelStatistics(2)
    nothing.update(torch.tensor([0, 1]), torch.zeros(2))
    assert nothing.probabilities(least=1).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf"), 1e200])
def test_a_loss_that_is_not_finite_is_left_out(bad):
    """One made the probabilities NaN, or uniform for good. The square of the last is infinite."""
    stats, wanted = LevelStatistics(2), LevelStatistics(2)
    t, loss = torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, bad], dtype=torch.float64)
    for _ in range(10):
        stats.update(t, loss)
        wanted.update(t[:2], loss[:2])
    assert stats.left_out == 10 and wanted.left_out == 0
    for name in ("count", "total", "squares", "seen"):
        assert torch.equal(getattr(stats, name), getattr(wanted, name))
    assert torch.equal(stats.probabilities(), wanted.probabilities()) and stats.probabilities()[1] > 0.6


def test_statistics_that_fade_come_to_say_something():
    """16 samples an update over 1000 levels: with decay 0.999 some level's count was always below 10."""
    g = torch.Generator().manual_seed(0)
    stats = LevelStatistics(1000, decay=0.999)
    for _ in range(2500):
        t = torch.randint(1000, (16,), generator=g)
        stats.update(t, 1.0 + t / 100)
    assert stats.count.min() < 10 <= stats.seen.min()
    p = stats.probabilities()
    assert p.sum() == pytest.approx(1) and p[999] > 5 * p[0]
    faded = LevelStatistics(2, decay=0.5)
    faded.update(torch.tensor([0, 1]), torch.ones(2))
    for _ in range(1100):
        faded.update(torch.tensor([0]), torch.ones(1))
    assert faded.probabilities(least=1).tolist() == [0.5, 0.5]  # nothing is left of level 1


@pytest.mark.parametrize("bins", [3, [0.0, 1.0, 5.0]])
def test_statistics_materialised(bins):
    with torch.device("meta"):
        stats = LevelStatistics(bins)
    stats.to_empty(device="cpu").reset_parameters()
    wanted = LevelStatistics(bins)
    for s in (stats, wanted):
        s.update(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    assert all(torch.equal(stats.state_dict()[k], v) for k, v in wanted.state_dict().items())


def test_statistics_traced():
    """One graph: nothing looks at a value."""
    stats, wanted = LevelStatistics(3), LevelStatistics(3)
    t, loss = torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0, 4.0])
    torch.compile(stats.update, fullgraph=True, backend="aot_eager")(t, loss)
    wanted.update(t, loss)
    assert torch.equal(stats.squares, wanted.squares)
    torch.compile(stats.update, fullgraph=True, backend="aot_eager")(torch.tensor([0, 3, -1]), torch.full((3,), 5.0))
    # What is outside is left out where nobody looks.
    assert stats.count.tolist() == [2, 0, 2] and stats.total.tolist() == [6, 0, 6]


# Refusals.

ZERO_TERMINAL = SCHEDULE.zero_terminal_snr()
CLEAN_FIRST = df.Schedule.from_betas([0.0, 0.1])


@pytest.mark.parametrize(
    "schedule, predict, t",
    [(ZERO_TERMINAL, "eps", 49), (ZERO_TERMINAL, "score", 49), (CLEAN_FIRST, "x0", 0), (CLEAN_FIRST, "score", 0)],
    ids=str,
)
def test_singular_schedules_are_refused_at_construction(schedule, predict, t):
    with pytest.raises(ValueError, match=f"DenoisingLoss: has no finite value at level {t} of .*use predict='v'"):
        DenoisingLoss(schedule, predict)


@pytest.mark.parametrize("predict", ["v", "flow", "x0"])
def test_zero_terminal_schedule(predict):
    x0, eps, _ = make()
    t = torch.tensor([49, 49, 0, 10, 48])
    ours, theirs = Network(), Network()
    got = DenoisingLoss(ZERO_TERMINAL, predict)(ours, x0, eps, t)
    compare(got, plain(theirs, x0, eps, t, predict, ZERO_TERMINAL), ours, theirs)


X0, EPS, LEVELS = make()


def bad(net=lambda x, t: x, x0=X0, noise=EPS, t=LEVELS, **options):
    return lambda: DenoisingLoss(SCHEDULE, "v")(net, x0, noise, t, **options)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: DenoisingLoss(SCHEDULE, "epsilon"),
            ValueError,
            "DenoisingLoss: predict must be one of 'eps', .*'epsilon'",
        ),
        (
            lambda: DenoisingLoss(SCHEDULE, level_weight=torch.ones(3)),
            ValueError,
            r"DenoisingLoss: level_weight must be a tensor of shape \(50,\), got \(3,\)",
        ),
        (
            lambda: DenoisingLoss(SCHEDULE, level_weight=[1.0] * T),
            ValueError,
            r"DenoisingLoss: level_weight must be a tensor of shape \(50,\), got list",
        ),
        (
            bad(net=lambda x, t: x[:, :2]),
            ValueError,
            r"DenoisingLoss: the network's output must have shape \(5, 3, 6\), got \(5, 2, 6\)",
        ),
        (bad(net=lambda x, t: {}), TypeError, "DenoisingLoss: the network's output must be a tensor, got dict"),
        (bad(net=lambda x, t: x.long()), TypeError, "the network's output must be float16, .* got torch.int64"),
        (bad(t=None), ValueError, "DenoisingLoss: t must be given unless noise is a Noise"),
        (bad(t=3), TypeError, r"DenoisingLoss: t must be a tensor \(B,\), got int"),
        (bad(t=LEVELS.float()), TypeError, "t must be int32 or int64, got torch.float32"),
        (bad(t=LEVELS[:2]), ValueError, r"level must have one entry per sample \(5\), got 2"),
        (bad(t=LEVELS + 100), ValueError, r"level must be in \[0, 50\), got 1\d\d for sample 0 of the batch"),
        (bad(noise=EPS[:2]), ValueError, r"DenoisingLoss: noise must have shape \(5, 3, 6\), got \(2, 3, 6\)"),
        (bad(noise=3), TypeError, "DenoisingLoss: noise must be a Noise or a tensor like x0, got int"),
        (bad(x0=[1.0]), TypeError, "DenoisingLoss: x0 must be a tensor, got list"),
        (bad(weight=torch.ones(3)), ValueError, r"weight must be .* shape \(5,\), one per sample, got \(3,\)"),
        (
            bad(mask=torch.ones(5, 3, 6, dtype=torch.int64)),
            TypeError,
            "DenoisingLoss: mask must be a bool tensor, weights or a corruption, got torch.int64",
        ),
        (bad(mask=MASK[:2]), ValueError, r"DenoisingLoss: mask must be broadcastable to \(5, 3, 6\), got \(2, 3, 6\)"),
        (bad(x0=X0[:0], noise=EPS[:0], t=LEVELS[:0]), ValueError, "the mean over an empty batch .* is not defined"),
        (
            lambda: DenoisingLoss(SCHEDULE, weighting="minsnr"),
            ValueError,
            "DenoisingLoss: weight must be one of 'uniform', 'snr', .* got 'minsnr'",
        ),
        (lambda: DenoisingLoss(SCHEDULE, weighting=WEIGHTS), TypeError, "DenoisingLoss: weighting must be no tensor"),
        (
            lambda: DenoisingLoss(df.ContinuousSchedule.vp(), level_weight=LEVEL_WEIGHTS),
            ValueError,
            "DenoisingLoss: level_weight needs a Schedule",
        ),
        (lambda: EDMPreconditioner(Network(), 0.0), ValueError, "EDM: sigma_data must be positive, got 0.0"),
        (
            lambda: EDMPreconditioner(Network())(X0, 0.0),
            ValueError,
            "EDMPreconditioner: has no finite value at alpha = 1.0, sigma = 0.0",
        ),
        (
            lambda: EDMPreconditioner(Network())(X0, df.Level(torch.ones(5), torch.tensor([1.0, 0, 1, 1, 1]))),
            ValueError,
            "EDMPreconditioner: has no finite value at sample 1, alpha = 1.0, sigma = 0.0",
        ),
        (
            lambda: EDMPreconditioner(Network())([1.0], 1.0),
            TypeError,
            "EDMPreconditioner: x_t must be a tensor, got list",
        ),
        (
            lambda: EDMPreconditioner(lambda x, c: x[:2])(X0, 1.0),
            ValueError,
            r"EDMPreconditioner: the network's output must have shape \(5, 3, 6\), got \(2, 3, 6\)",
        ),
        (
            lambda: LevelStatistics(0),
            ValueError,
            r"LevelStatistics: bins must be a positive int or edges \(N \+ 1,\), got 0",
        ),
        (lambda: LevelStatistics([1.0, 1.0]), ValueError, r"LevelStatistics: edges must be \(N \+ 1,\) and increase"),
        (lambda: LevelStatistics(3, decay=0.0), ValueError, r"LevelStatistics: decay must be in \(0, 1\], got 0.0"),
        (
            lambda: LevelStatistics(3).update(torch.tensor([0, 3]), torch.ones(2)),
            ValueError,
            "LevelStatistics: t must lie in the bins, got 3 for sample 1",
        ),
        (
            lambda: LevelStatistics(3).update(torch.tensor([0.5]), torch.ones(1)),
            TypeError,
            "LevelStatistics: t must be of integers where bins are counted, got torch.float32",
        ),
        (
            lambda: LevelStatistics(3).update(torch.tensor([0, 1]), torch.ones(3)),
            ValueError,
            r"LevelStatistics: loss must be a tensor \(B,\), t and loss of one length, got \(3,\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
