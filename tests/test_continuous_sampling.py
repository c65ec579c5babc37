"""Continuous time end to end: a network is trained and sampled with one ContinuousSchedule, and told the same times."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch

import dae_fast as df
from dae_fast.samplers import (
    annealed_langevin,
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    dpm_solver_pp_2m_sde,
    euler,
    euler_ancestral,
    flow_euler,
    flow_midpoint,
    heun,
    langevin,
    predictor_corrector,
    probability_flow,
)

FLOW, EDM, VP = (df.ContinuousSchedule.flow(), df.ContinuousSchedule.edm(), df.ContinuousSchedule.vp())
WITH_STEPS = {
    "ddim": (ddim, VP, "eps"),
    "euler": (euler, EDM, "eps"),
    "euler_ancestral": (euler_ancestral, EDM, "eps"),
    "heun": (heun, EDM, "eps"),
    "dpm_solver_pp_2m": (dpm_solver_pp_2m, VP, "eps"),
    "dpm_solver_pp_2m_sde": (dpm_solver_pp_2m_sde, VP, "eps"),
    "predictor_corrector": (predictor_corrector, VP, "eps"),
    "flow_euler": (flow_euler, FLOW, "flow"),
    "flow_midpoint": (flow_midpoint, FLOW, "flow"),
}


class Recording(torch.nn.Module):
    """Half of x; keeps the times that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[torch.Tensor] = []

    def forward(self, x, t):
        self.told.append(t)
        return 0.5 * x


@pytest.mark.parametrize("name", WITH_STEPS)
def test_the_schedule_itself_is_its_grid(name):
    sampler, schedule, predict = WITH_STEPS[name]
    levels = 8 if name == "flow_midpoint" else 4  # a middle for each step
    grid = schedule.discretise(levels, rho=7 if schedule is EDM else 1)
    net = Recording()
    direct = sampler(net, (3, 5), schedule, df.Noise(1), steps=4, predict=predict)
    told = list(net.told)
    wanted = sampler(net, (3, 5), grid, df.Noise(1), steps=4, predict=predict)
    assert torch.equal(direct, wanted)
    for ours, theirs in zip(told, net.told[len(told) :], strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == torch.float32
    assert {float(t[0]) for t in told} == {float(t) for t in grid.times.float()}


def test_trained_and_sampled_with_one_schedule():
    """A line of data, x0 = (u, -u): the velocity is linear in x at each t, and a table over t learns it."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.SiLU(), torch.nn.Linear(64, 4))

        def forward(self, x, t):
            assert t.dtype == torch.float32 and (t > 0).all() and (t <= 1).all()
            return torch.einsum("bij,bj->bi", self.table(t[:, None]).view(-1, 2, 2), x)

    torch.manual_seed(0)
    net = Linear()
    objective = df.nn.DenoisingLoss(FLOW, "flow", density=df.LogitNormal())
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(400):
        noise = df.Noise(0).fold_in(step)
        u = noise.fold_in(1).normal((256, 1))
        loss = objective(net, torch.cat((u, -u), 1), noise)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = flow_euler(net, (2000, 2), FLOW, df.Noise(1), steps=50)
    assert float(x.sum(1).std()) < 0.15  # on the line
    assert float(x[:, 0].std()) == pytest.approx(1.0, abs=0.15)


def test_what_does_not_fit_a_continuous_schedule():
    net = Recording()
    with pytest.raises(ValueError, match=r"ddim: levels are those of a Schedule: give ContinuousSchedule.vp\("):
        ddim(net, (2, 3), VP, df.Noise(0), levels=[3, 1])
    with pytest.raises(ValueError, match="euler: steps must be positive, got 0"):
        euler(net, (2, 3), EDM, df.Noise(0), steps=0)
    with pytest.raises(TypeError, match="predictor_corrector: steps must be an int, got NoneType"):
        predictor_corrector(net, (2, 3), VP, df.Noise(0))
    with pytest.raises(TypeError, match="ddpm: schedule must be a Schedule, got ContinuousSchedule"):
        ddpm(net, (2, 3), VP, df.Noise(0))


# Densities.

CONSTRUCTORS = [
    getattr(df.ContinuousSchedule, name) for name in ("flow", "vp", "sub_vp", "ve", "edm", "cosine", "laplace")
]


@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=lambda c: c.__name__)
def test_every_constructor_takes_a_density(constructor):
    density = df.LogitNormal(0.1, 0.5)
    schedule = constructor(density=density)
    assert schedule.density is density and "density=LogitNormal(mean=0.1, std=0.5)" in repr(schedule)
    assert torch.equal(schedule.draw(df.Noise(0), 9), constructor().draw(df.Noise(0), 9, density=density))
    with pytest.raises(TypeError, match="density must be callable, got str"):
        constructor(density="uniform")


def test_the_law_of_mode():
    """Esser et al. 2024: t = f(u), f falling from 1 to 0, so P(t <= f(u)) = 1 - u."""
    for s in (-1.0, 0.0, 0.81, 2 / (np.pi - 2)):
        u = np.linspace(0, 1, 20001)
        f = 1 - u - s * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
        assert (np.diff(f) <= 1e-15).all()
        t = FLOW.draw(df.Noise(4), 50_000, density=df.Mode(s)).double().numpy()
        assert scipy.stats.kstest(t, lambda x, f=f, u=u: 1 - np.interp(x, f[::-1], u[::-1])).pvalue > 1e-2
    for s in (-1.1, 1.8):
        with pytest.raises(ValueError, match=r"Mode: s must be in \[-1, 2/\(pi - 2\)\], got"):
            df.Mode(s)


def test_the_loss_draws_by_its_density():
    x0 = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    loss = df.nn.DenoisingLoss(EDM, "x0", density=df.LogNormal(-0.4, 1.0))
    assert torch.equal(loss.draw_levels(df.Noise(1), x0), EDM.draw(df.Noise(1), 50, density=df.LogNormal(-0.4, 1.0)))
    with pytest.raises(ValueError, match="DenoisingLoss: density needs a ContinuousSchedule"):
        df.nn.DenoisingLoss(df.Schedule.linear(9), density=df.LogNormal())
    with pytest.raises(TypeError, match="DenoisingLoss: density must be callable, got str"):
        df.nn.DenoisingLoss(EDM, "x0", density="normal")


# Kinds of the loss.


@pytest.mark.parametrize(
    "kind, delta", [("l1", None), ("huber", 0.3), ("pseudo_huber", lambda alpha, sigma: 0.2 * sigma)]
)
@pytest.mark.parametrize("weighting", [None, "min_snr", lambda alpha, sigma: sigma])
def test_kinds(kind, delta, weighting):
    schedule, noise = df.Schedule.linear(50), df.Noise(3)
    x0 = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 9, 20, 30, 40, 49])
    pred = torch.randn(6, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    options = {"weighting": weighting}
    out = df.nn.DenoisingLoss(schedule, "v", kind=kind, delta=delta, **options)(lambda x, t: pred, x0, noise, t)
    wanted = df.denoising_loss(pred, x0, noise, schedule[t], predict="v", weight=weighting, kind=kind, delta=delta)
    torch.testing.assert_close(out["loss"], wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, pred)[0] for loss in (out["loss"], wanted)))
    plain = df.nn.DenoisingLoss(schedule, "v", **options)(lambda x, t: pred, x0, noise, t)
    for name in ("noise_mse", "x0_mse"):
        assert torch.equal(out[name], plain[name]) and not out[name].requires_grad


def test_bad_kinds():
    with pytest.raises(ValueError, match="DenoisingLoss: kind must be one of 'mse', 'l1'"):
        df.nn.DenoisingLoss(df.Schedule.linear(9), kind="l2")
    with pytest.raises(ValueError, match="DenoisingLoss: delta must be given for kind='huber'"):
        df.nn.DenoisingLoss(df.Schedule.linear(9), kind="huber")


# Predictions in annealed Langevin, and the network's own arguments.

VE = df.Schedule.geometric(5, 0.1, 2.0)


@pytest.mark.parametrize("predict", ["eps", "x0", "score", "v", "flow"])
def test_annealed_langevin_of_any_prediction(predict):
    x = df.Noise(5).normal((3, 4), dtype=torch.float64)

    def score(x, t):
        return -x / (1 + VE.sigma[t][:, None] ** 2)  # of unit Gaussian data

    def net(x, t):
        return df.convert(x, score(x, t), VE[t], predict="score", to=predict)

    options = {"steps_per_level": 3, "step_size": 0.01}
    made = annealed_langevin(net, x, VE, df.Noise(0), predict=predict, **options)
    torch.testing.assert_close(made, annealed_langevin(score, x, VE, df.Noise(0), **options), rtol=1e-10, atol=1e-10)


EVERY = {
    **{name: partial(s, x=(2, 3), schedule=c, noise=df.Noise(0), steps=3) for name, (s, c, _) in WITH_STEPS.items()},
    "ddpm": partial(ddpm, x=(2, 3), schedule=df.Schedule.cosine(5), noise=df.Noise(0)),
    "probability_flow": partial(probability_flow, x=(2, 3), schedule=VP, noise=df.Noise(0), steps=3),
    "annealed_langevin": partial(
        annealed_langevin, x=torch.ones(2, 3), schedule=VE, noise=df.Noise(0), steps_per_level=2
    ),
}


@pytest.mark.parametrize("name", EVERY)
def test_the_network_gets_its_own_arguments(name):
    labels, seen = torch.tensor([3, 1]), []

    def net(x, t, y=None, scale=1.0):
        seen.append(y)
        return scale * 0.5 * x

    predict = {"predict": WITH_STEPS[name][2]} if name in WITH_STEPS else {}
    run = partial(EVERY[name], **predict)
    network = "score" if name == "annealed_langevin" else "net"
    made = run(**{network: net}, net_arguments={"y": labels, "scale": 0.5})
    assert seen and all(y is labels for y in seen)
    assert torch.equal(made, run(**{network: partial(net, scale=0.5)}))


def test_langevin_gets_them_too():
    def score(x, shift):
        return shift - x

    made = langevin(score, torch.zeros(2, 3), 0.1, 4, df.Noise(0), net_arguments={"shift": 2.0})
    assert torch.equal(made, langevin(partial(score, shift=2.0), torch.zeros(2, 3), 0.1, 4, df.Noise(0)))


def test_bad_net_arguments():
    net = Recording()
    with pytest.raises(TypeError, match="ddim: net_arguments must be a dict of arguments by name, got list"):
        ddim(net, (2, 3), VP, df.Noise(0), net_arguments=[1])
    with pytest.raises(ValueError, match="ddim: graph=True keeps the captured loop with the network"):
        ddim(net, (2, 3), VP, df.Noise(0), net_arguments={"y": 1}, graph=True)
    with pytest.raises(TypeError, match="ddim: net must be callable, got int"):
        ddim(3, (2, 3), VP, df.Noise(0), net_arguments={"y": 1})


# Noise as a value, and what things say of themselves.


def test_equality_and_hash_of_noise():
    ids = torch.tensor([4, 2])
    same = [
        (df.Noise(3).fold_in(1), df.Noise(3).fold_in(1)),
        (df.Noise(3, first_sample=2), df.Noise(3, first_sample=2)),
        (df.Noise(3, sample=ids), df.Noise(3, sample=ids.clone())),
        (df.Noise(-1), df.Noise(2**64 - 1)),
        (df.Noise(3), df.Noise((3, 0))),
    ]
    for a, b in same:
        assert a == b and hash(a) == hash(b)
    others = [df.Noise(3), df.Noise(4), df.Noise(3).fold_in(1), df.Noise(3, first_sample=1), df.Noise(3, sample=ids)]
    others += [df.Noise(3, first_element=4), df.Noise(3, sample=ids.flip(0)), df.Noise(3, sample=torch.tensor([4]))]
    for a, b in pairwise((*others, others[0])):
        assert a != b
    assert len(set(others)) == len(others) and df.Noise(3) != 3
    key = torch.tensor([3, 0])
    assert df.Noise(key) == df.Noise(key) != df.Noise(key.clone()) and df.Noise(key) != df.Noise(3)
    assert hash(df.Noise(key)) == hash(df.Noise(key))


def test_one_level_in_a_tensor():
    schedule, x = df.Schedule.linear(10), torch.ones(3, 2)
    for t in (torch.tensor(5), torch.tensor([5]), np.int64(5), torch.full((3,), 5)):
        assert torch.equal(df.add_noise(x, df.Noise(0), schedule[t]), df.add_noise(x, df.Noise(0), schedule[5]))


@pytest.mark.parametrize(
    "value, said",
    [
        (df.Noise(7, first_sample=3), "Noise(key=(7, 0), first_sample=3)"),
        (df.Schedule.karras(18), "Schedule.karras(18, 0.002, 80.0, 7.0)"),
        (df.Schedule(torch.ones(3), torch.arange(1.0, 4)), "Schedule(<3 levels>)"),
        (df.Schedule.from_betas([0.1, 0.2]), "Schedule.from_betas(<2 levels>)"),
        (df.ContinuousSchedule.cosine(density=df.Mode()), "ContinuousSchedule.cosine(density=Mode(s=1.29))"),
        (
            df.ContinuousSchedule(torch.ones_like, lambda t: t),
            "ContinuousSchedule(t_min=0.0, t_max=1.0, density=Uniform(low=0.0, high=1.0), shift=1.0)",
        ),
        (df.Schedule.linear(10)[3], "Schedule.linear(10, 0.0001, 0.02)[3]"),
        (df.LevelOp("half", lambda alpha, sigma: {"x": 0.5, "y": sigma}), "LevelOp('half': x, y)"),
        (
            df.nn.DenoisingLoss(df.Schedule.linear(10), "v", weighting="min_snr", kind="l1"),
            "DenoisingLoss(Schedule.linear(10, 0.0001, 0.02), predict='v', weighting='min_snr', kind='l1')",
        ),
        (df.LevelStatistics(10), "LevelStatistics(10 bins, decay=1.0)"),
        (df.samplers.GaussianMixture([1.0, 1.0], [[0.0], [1.0]], [1.0, 1.0]), "GaussianMixture(<2 x 1 means>)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_reprs(value, said):
    assert repr(value) == said
