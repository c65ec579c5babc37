"""numpy's arrays and scalars are taken wherever schedules, levels, betas and sample ids are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dae_fast as df

X, NOISE, LINEAR, FLOW = torch.ones(3, 2), df.Noise(0), df.Schedule.linear(10), df.ContinuousSchedule.flow()
T, TIMES = np.array([1, 4, 9]), np.array([0.1, 0.5, 0.9])
IDS = np.array([7, 1, 2**40])


def noised(level):
    return df.add_noise(X, NOISE, level)


def read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


PAIRS = {
    "columns": lambda a: df.Schedule(a(np.ones(3)), a(np.arange(1.0, 4))).sigma,
    "times": lambda a: df.Schedule(a(np.ones(3)), a(np.arange(1.0, 4)), times=a(TIMES)).times,
    "betas": lambda a: df.Schedule.from_betas(a(np.linspace(0.1, 0.3, 5))).alpha,
    "alpha_bar backwards": lambda a: df.Schedule.from_alpha_bar(a(np.linspace(0.1, 0.9, 5)[::-1])).alpha,
    "discretise": lambda a: FLOW.discretise(times=a(TIMES)).times,
    "levels": lambda a: noised(LINEAR[a(T)]),
    "levels int32": lambda a: noised(LINEAR[a(T.astype(np.int32))]),
    "a level": lambda a: noised(LINEAR[a(np.array(4))]),
    "read-only levels": lambda a: noised(LINEAR[a(read_only(T))]),
    "continuous": lambda a: noised(FLOW[a(TIMES)]),
    "alpha(t)": lambda a: FLOW.alpha(a(TIMES)),
    "drift(t)": lambda a: df.ContinuousSchedule.vp().drift(a(TIMES)),
    "by hand": lambda a: noised(df.Level(a(np.linspace(0.1, 1, 3)), a(TIMES))),
    "ids": lambda a: df.Noise(0, sample=a(IDS)).normal((3, 2)),
    "key": lambda a: df.Noise(a(np.array([3, 4]))).normal((3, 2)),
    "told levels": lambda a: df.nn.DenoisingLoss(LINEAR)(lambda x, t: x, X, NOISE, a(T))["loss"],
    "level_weight": lambda a: df.nn.DenoisingLoss(LINEAR, level_weight=a(np.arange(10.0))).level_weight,
    "edges": lambda a: df.LevelStatistics(a(TIMES)).edges,
    "embedding": lambda a: df.timestep_embedding(a(T), 8),
}


@pytest.mark.parametrize("name", PAIRS)
def test_arrays_are_tensors(name):
    made = PAIRS[name](lambda array: array)
    assert torch.equal(made, PAIRS[name](lambda array: torch.tensor(np.ascontiguousarray(array).reshape(array.shape))))


def test_an_array_is_copied():
    t = T.copy()
    level = LINEAR[t]
    wanted = noised(level)
    t[:] = 0
    assert torch.equal(noised(level), wanted)


def test_narrow_ids_are_widened():
    ids = np.array([7, 1, 3], dtype=np.int16)
    assert df.Noise(0, sample=ids) == df.Noise(0, sample=torch.tensor([7, 1, 3]))


def test_scalars():
    assert repr(df.Schedule.linear(np.int64(10), np.float64(1e-4), 0.02)) == repr(LINEAR)
    assert len(FLOW.discretise(np.int32(4))) == 4 and len(df.LevelStatistics(np.int64(5)).count) == 5
    assert torch.equal(noised(LINEAR[np.int64(4)]), noised(LINEAR[4]))
    assert torch.equal(noised(FLOW[np.float64(0.5)]), noised(FLOW[0.5]))
    assert torch.equal(noised(df.Level(np.float32(0.5), np.float64(0.5))), noised(df.Level(0.5, 0.5)))
    made = df.samplers.ddim(lambda x, t: 0.5 * x, X, LINEAR, NOISE, levels=np.array([9, 4, 0]))
    assert torch.equal(made, df.samplers.ddim(lambda x, t: 0.5 * x, X, LINEAR, NOISE, levels=[9, 4, 0]))


def test_the_way_out_is_the_same_memory():
    normals = NOISE.normal((3, 2))
    assert normals.numpy().ctypes.data == normals.data_ptr() and normals.numpy().dtype == np.float32


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LINEAR[np.array(["a"])], "Schedule.linear.*t must be an int or an integer tensor"),
        (lambda: LINEAR[TIMES], "Schedule.linear.*t must be int32 or int64, got torch.float64"),
        (lambda: df.Schedule(np.ones(3, bool), np.ones(3)), "Schedule: alpha must be a tensor .* got ndarray"),
        (lambda: df.Noise(0, sample=TIMES), "Noise: sample must be an int64 tensor"),
        (lambda: df.Schedule.from_betas(np.array([1j])), "from_betas: betas must be a tensor or a sequence"),
    ],
)
def test_bad_arrays(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
