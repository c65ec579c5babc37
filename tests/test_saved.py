"""What a checkpoint holds of the library's values, and that torch.load takes it with weights_only."""

from __future__ import annotations

import io
import pickle
import pickletools

import pytest
import torch

import dae_fast as df

N0 = df.Noise(0)
S = df.Schedule.linear(20)
C = df.ContinuousSchedule
IDS = torch.tensor([4, 1])


def loaded(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True, **options)


@pytest.mark.parametrize(
    "noise",
    [df.Noise(3), df.Noise(2**64 - 1, sample=IDS), df.Noise(torch.tensor([1, -2])), df.Noise(5, first_sample=-7)],
)
def test_noise(noise):
    wanted = noise.fold_in(3).normal((2, 5))
    for again in (
        loaded(noise),
        df.Noise.from_state_dict(noise.state_dict()),
        df.Noise.from_state_dict(loaded(noise.state_dict())),
    ):
        assert torch.equal(again.fold_in(3).normal((2, 5)), wanted)


@pytest.mark.parametrize("noise", [df.Noise(2**64 - 1).fold_in(3), df.Noise(torch.tensor([1, -2]))])
def test_a_key_makes_its_noise(noise):
    again = df.Noise(noise.key)
    assert torch.equal(again.normal((3, 5)), noise.normal((3, 5)))
    assert torch.equal(df.Noise(noise.key, first_sample=1).normal((2, 5)), noise.normal((3, 5))[1:])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: df.Noise((1,)), r"a key must be \(seed, offset\), got 1 of them"),
        (lambda: df.Noise((1, 2.5)), "a key must be of two ints, got float"),
        (lambda: df.Noise((True, 2)), "a key must be of two ints, got bool"),
        (lambda: df.Noise.from_state_dict({}), "state must have key, sample and first_sample"),
        (lambda: df.Noise.from_state_dict(None), "state must have key, sample and first_sample"),
    ],
)
def test_what_is_no_key(call, message):
    with pytest.raises((TypeError, ValueError), match=f"Noise.*: {message}"):
        call()


X = torch.linspace(-1, 1, 6).reshape(2, 3)


@pytest.mark.parametrize(
    "value",
    [
        S,
        S.zero_terminal_snr(),
        S.shifted(2.0),
        C.edm().discretise(5),
        S[3],
        S[IDS],
        df.Level(0.5, torch.tensor([0.1, 0.2])),
        C.flow(3.0),
        C.vp(),
        C.sub_vp(),
        C.ve(),
        C.edm(),
        C.cosine(),
        C.laplace(),
        df.EDM(0.4),
        df.Masking(0.5, N0),
        df.Masking(torch.tensor([0.1, 0.9]), N0).visible,
        df.SaltAndPepper(0.5, N0, salt=0.2),
        df.OffsetNoise(N0),
        df.PyramidNoise(N0),
        df.weighting.P2(2.0),
        *df.weighting.NAMES.values(),
        df.weighting.OnError("x0", torch.ones(2)),
    ],
    ids=repr,
)
def test_values(value):
    again = loaded(value)
    assert type(again) is type(value) and repr(again) == repr(value)
    if isinstance(value, df.Schedule):
        assert torch.equal(again.alpha, value.alpha) and torch.equal(again.sigma, value.sigma)
        assert (again.times is None) == (value.times is None)
        assert value.times is None or torch.equal(again.times, value.times)
    if isinstance(value, C):
        t = torch.tensor([0.3, 0.7])
        assert torch.equal(again.alpha(t), value.alpha(t)) and torch.equal(again.sigma(t), value.sigma(t))
        assert torch.equal(again.draw(N0, 4), value.draw(N0, 4))
    if isinstance(value, df.Level):
        assert torch.equal(df.add_noise(X, N0, again), df.add_noise(X, N0, value))
    if isinstance(value, (df.Masking, df.SaltAndPepper)):
        assert torch.equal(df.corrupt(X, again), df.corrupt(X, value))


@pytest.mark.parametrize("schedule", [S, C.flow(), C.flow().discretise(6)], ids=repr)
@pytest.mark.parametrize("predict", ["v", df.EDM(0.5)], ids=str)
@pytest.mark.parametrize("weighting", [None, "min_snr", df.weighting.EDM(0.4)], ids=str)
def test_modules(schedule, predict, weighting):
    loss = df.nn.DenoisingLoss(schedule, predict, weighting=weighting)
    got, wanted = loaded(loss)(lambda x, t: x, X, N0), loss(lambda x, t: x, X, N0)
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)


def test_statistics():
    statistics = df.LevelStatistics(4, decay=0.9)
    statistics.update(torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 3.0]))
    again = loaded(statistics)
    assert torch.equal(again.total, statistics.total) and again.decay == 0.9


def test_hyperparameters_beside_weights():
    """As Lightning's save_hyperparameters writes them."""
    file = {"state_dict": torch.nn.Linear(2, 2).state_dict(), "hyper_parameters": {"schedule": S, "noise": N0}}
    again = loaded(file)
    assert again["hyper_parameters"]["noise"].key == N0.key


def test_a_file_names_no_code_but_torch_s_and_its_own():
    """A functools.partial, say, would call whatever it is given."""
    named = set()
    for value in (S, C.vp(), C.laplace(), df.nn.DenoisingLoss(C.ve(), "eps", weighting="p2")):
        for opcode, argument, _ in pickletools.genops(pickle.dumps(value, protocol=2)):
            if opcode.name == "GLOBAL":
                named.add(argument.split(".")[0].split()[0])
    assert named <= {"dae_fast", "torch", "collections", "copy_reg", "copyreg", "_codecs", "__builtin__"}
