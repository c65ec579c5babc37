"""A sampler as an object: its step is the loop's, its state is explicit, its short form is written from it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import dae_fast as df
from dae_fast.samplers import launch

from . import short_forms
from .misuse import OPTIONS, sampler_classes
from .test_samplers import network, start

S = df.Schedule.linear(12, 0.005, 0.4)
NOISE = df.Noise(3)
FEW = {"flow_midpoint": 4, "flow_sde": 4, "probability_flow": 4}


def made(cls, **options):
    own = {"schedule": S, **OPTIONS.get(cls.op, {}), **options}
    schedule = own.pop("schedule")
    if "steps" not in own and cls.op != "annealed_langevin":
        own["steps"] = FEW.get(cls.op, 7)
    return cls(schedule, **own)


each = pytest.mark.parametrize("cls", sampler_classes(), ids=lambda cls: cls.__name__)


def stepped(sampler, x, net=network, noise=NOISE, **options):
    """A loop of one's own."""
    x0s = []
    for i, t in enumerate(sampler.model_times(x)):
        x = sampler.step(i, x, net(x, t), noise, **options)
        if options:
            x, x0 = x
            x0s.append(x0)
    return (x, x0s) if options else x


@each
@pytest.mark.parametrize("clamp", [None, 0.8])
def test_the_steps_are_the_loop(cls, clamp, backend):
    """Bit for bit, with a plain step or one that also gives x0, with the history that was kept."""
    sampler, x = made(cls, clamp=clamp), start(3, 5, dtype=torch.float32)
    seen = []
    whole = sampler.sample(network, x, NOISE)
    assert torch.equal(stepped(sampler, x), whole)
    assert torch.equal(stepped(sampler, x), whole)  # anew at i = 0
    again = sampler.sample(network, x, NOISE, callback=lambda i, t, x, x0: seen.append(x0))
    last, x0s = stepped(sampler, x, return_x0=True)
    assert torch.equal(again, whole) and torch.equal(last, whole)
    assert all(torch.equal(a, b) for a, b in zip(seen, x0s, strict=True))
    if clamp is not None:
        assert all(x0.abs().max() <= clamp for x0 in x0s)
    assert len(x0s) == len(sampler.model_times(x)) > 1


@each
def test_what_it_keeps_is_copied_and_pickled(cls):
    sampler, x = made(cls), start(3, 5, dtype=torch.float32)
    times = sampler.model_times(x)
    for i, t in enumerate(times[:3]):
        x = sampler.step(i, x, network(x, t), NOISE)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert repr(other) == repr(sampler) and len(other.history) == len(sampler.history)
        y = x
        for i, t in enumerate(times[3:], 3):
            y = other.step(i, y, network(y, t), NOISE)
        assert torch.equal(y, sampler.sample(network, start(3, 5, dtype=torch.float32), NOISE))


@pytest.mark.parametrize("name", ["DPMSolverPP2M", "Heun", "FlowMidpoint"])
def test_a_step_without_the_one_before(name):
    sampler, x = made(getattr(df.samplers, name)), start(3, 5)
    with pytest.raises(ValueError, match="step 1 reads what the steps before it keep"):
        sampler.step(1, x, x, NOISE)


def test_one_launch_a_step(monkeypatch):
    launches = []

    def counted(*args):
        launches.append(args)
        return original(*args)

    original = launch.affine
    monkeypatch.setattr(launch, "affine", counted)
    x = start(3, 5)
    for cls in sampler_classes():
        if cls.op != "predictor_corrector":  # whose corrector measures two norms
            sampler = made(cls, guidance=2.0, clamp=1.0)
            launches.clear()
            stepped(sampler, x, net=lambda x, t: (network(x, t), torch.cos(x)))
            assert len(launches) == len(sampler.model_times(x)), cls


def test_the_first_step_again_is_the_quick_one():
    """The second step of a kind goes straight to the core; other dtypes, and a gradient, find their way."""
    sampler, x = df.samplers.DDIM(S, steps=5, eta=1.0), start(3, 5, dtype=torch.float32)
    pred = network(x, torch.full((3,), 11))
    first = sampler.step(0, x, pred, NOISE)
    assert torch.equal(sampler.step(0, x, pred, NOISE), first)
    wide = sampler.step(0, x.double(), pred.double(), NOISE)
    torch.testing.assert_close(first.double(), wide, rtol=1e-5, atol=1e-6)
    assert torch.equal(sampler.step(0, x, pred.bfloat16(), NOISE), sampler.step(0, x, pred.bfloat16().float(), NOISE))
    leaf = pred.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: sampler.step(0, x.double(), p, NOISE), leaf)


def test_the_noise_of_a_step_may_be_a_tensor():
    sampler, x = df.samplers.DDIM(S, steps=5, eta=1.0), start(3, 5)
    z = NOISE.fold_in(sampler.levels[1]).normal(x.shape, dtype=x.dtype)
    torch.testing.assert_close(sampler.step(1, x, x, z), sampler.step(1, x, x, NOISE), rtol=1e-12, atol=1e-12)
    multistep = df.samplers.DPMSolverPP2MSDE(S, steps=5, guidance=2.0)  # there it is a fifth stream
    for i in (0, 1):
        got = [
            copy.deepcopy(multistep).step(i, x, (x, 2 * x), noise)
            for noise in (NOISE, NOISE.fold_in(multistep.levels[i]).normal(x.shape, dtype=x.dtype))
        ]
        torch.testing.assert_close(*got, rtol=1e-12, atol=1e-12)
        multistep.step(i, x, (x, 2 * x), NOISE)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda d, x: d.step(5, x, x, NOISE), ValueError, r"ddim: i must be in \[0, 4\], got 5"),
        (lambda d, x: d.step("1", x, x, NOISE), TypeError, "ddim: i must be an int, got str"),
        (lambda d, x: d.step(0, x, x[:1], NOISE), ValueError, r"ddim: the network's output must have shape \(3, 5\)"),
        (lambda d, x: d.step(0, x, x), TypeError, "ddim: step 0 adds noise: noise must be a Noise or a tensor"),
        (lambda d, x: d.step(0, x, x, x[:1]), ValueError, r"ddim: noise must have shape \(3, 5\), got \(1, 5\)"),
        (lambda d, x: d.step(0, x, x, 1), TypeError, "ddim: noise must be a tensor, got int"),
        (lambda d, x: d.step(0, (3, 5), x, NOISE), TypeError, "ddim: x must be a tensor, got tuple"),
        (lambda d, x: d.start(5, NOISE), TypeError, r"ddim: x must be a tensor or a shape \(B, ...\), got int"),
        (lambda d, x: d.sample(network, x, NOISE, callback=1), TypeError, "ddim: callback must be callable, got int"),
        (
            lambda d, x: d.sample(network, x, NOISE, callback=lambda *_: x[:1]),
            ValueError,
            r"ddim: what callback returned must have shape \(3, 5\)",
        ),
        (lambda d, x: d.sample(network, x, NOISE, callback=print, graph=True), ValueError, "leave out callback"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(df.samplers.DDIM(S, steps=5, eta=1.0), start(3, 5))


def test_what_a_callback_returns_goes_on():
    seen = []

    def callback(i, t, x, x0):
        seen.append((i, t))
        return torch.zeros_like(x) if i == 1 else None

    sampler, x = df.samplers.DDIM(S, steps=4), start(3, 5)
    got = sampler.sample(network, x, NOISE, callback=callback)
    assert seen == list(enumerate(sampler.levels))
    assert torch.equal(got, sampler.sample(network, 2 * x, NOISE, callback=callback))


def test_two_times_the_channels_are_a_learned_variance():
    x = start(3, 4, 5)

    def pair(x, t):
        return network(x, t), torch.tanh(x)

    ddpm = df.samplers.DDPM(S, variance="learned", clamp=1.0)
    got = ddpm.sample(lambda x, t: torch.cat(pair(x, t), 1), x, NOISE)
    assert torch.equal(got, ddpm.sample(pair, x, NOISE))


def test_churn_in_a_loop_of_ones_own():
    karras = df.Schedule.karras(8, 0.05, 5.0)
    heun, x = df.samplers.Heun(karras, steps=5, S_churn=2.0, conditioning="sigma", predict="x0"), start(3, 5)
    y = x
    for i, t in enumerate(heun.model_times(x)):
        y = heun.churned(i, y, NOISE)
        y = heun.step(i, y, network(y, t), NOISE)
    assert torch.equal(y, heun.sample(network, x, NOISE))
    assert heun.levels == (7, 5, 5, 4, 4, 2, 2, 0, 0)


def test_the_short_forms_are_written_from_the_classes():
    """`python -m tests.short_forms` writes them."""
    assert short_forms.FILE.read_text() == short_forms.source()


def test_representation():
    sampler = df.samplers.DDIM(S, levels=[5, 2], predict=df.EDM(1.0))
    assert repr(sampler) == f"DDIM({S!r}, predict=EDM(sigma_data=1.0), levels=[5, 2])"
    assert sampler.levels == (5, 2)
