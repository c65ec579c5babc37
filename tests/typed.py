"""What the type checkers must make of the library: read by tests/test_types.py, and not run."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

import dae_fast as df

Pair = tuple[Tensor, Tensor]


def ops(x: Tensor, noise: df.Noise, level: df.Level) -> None:
    assert_type(df.add_noise(x, noise, level), Tensor)
    assert_type(df.add_noise(x, noise, level, target="v"), Pair)
    for convert in (df.to_x0, df.to_eps, df.to_score, df.to_v):
        assert_type(convert(x, x, level), Tensor)
    assert_type(df.noise_mse(x, noise), Tensor)
    assert_type(df.noise_mse(x, noise, level=level, return_x0_mse=True), Pair)
    assert_type(df.denoising_loss(x, x, noise, level), Tensor)
    assert_type(df.denoising_loss(x, x, noise, level, return_per_sample=True), Pair)
    assert_type(df.langevin_step(x, x, 0.1, noise), Tensor)
    assert_type(df.reparameterise(x, x, noise), Pair)
    assert_type(df.corrupt(x, df.Masking(0.3, noise)), Tensor)


def primitives(x: Tensor, level: df.Level) -> None:
    assert_type(df.weighted_sum((1.0, x)), Tensor)
    assert_type(df.weighted_sum((1.0, x), also=(2.0,)), Pair)
    assert_type(df.residual_loss(x, (1.0, x)), Tensor)
    one = df.LevelOp("one", lambda alpha, sigma: {"x": alpha})
    two = df.LevelOp("two", lambda alpha, sigma: {"x": alpha}, also=lambda alpha, sigma: {"x": sigma})
    assert_type(one(level, x=x), Tensor)
    assert_type(two(level, x=x), Pair)


def modules(x: Tensor, noise: df.Noise) -> None:
    out = df.nn.DenoisingLoss(df.Schedule.linear())(lambda x, t: x, x, noise)
    assert_type(out["loss"], Tensor)
    assert_type(df.nn.EDMPreconditioner(lambda x, t: x)(x, 0.5), Tensor)


def schedules(noise: df.Noise) -> None:
    assert_type(df.ContinuousSchedule.flow().discretise(9).times, Tensor)
    assert_type(df.Schedule.linear().times, Tensor | None)
    assert_type(df.Schedule.linear().draw(noise, 4), Tensor)


def samplers(noise: df.Noise) -> None:
    assert_type(df.samplers.ddim(lambda x, t: x, (2, 3), df.Schedule.linear(), noise), Tensor)
