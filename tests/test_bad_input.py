"""Bad input gets an error that names the op, the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

import dae_fast as df

from .conftest import GPU_CODE

NOISE = df.Noise(0)
LEVEL = df.Level(0.6, 0.8)
SCHEDULE = df.Schedule.linear(1000)
X = torch.zeros(8, 4)

pytestmark = pytest.mark.usefixtures("backend")

# What is called, the error, its message.
CALLS = {
    "shape": (
        lambda: df.add_noise(X, torch.zeros(8, 3), LEVEL),
        ValueError,
        r"add_noise: noise must have shape \(8, 4\), got \(8, 3\)",
    ),
    "no batch": (
        lambda: df.add_noise(torch.tensor(1.0), NOISE, LEVEL),
        ValueError,
        r"add_noise: x0 must have a batch dimension, got shape \(\)",
    ),
    "integers": (
        lambda: df.add_noise(torch.zeros(8, 4, dtype=torch.int64), NOISE, LEVEL),
        TypeError,
        "add_noise: x0 must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "bool": (
        lambda: df.noise_mse(torch.zeros(8, 4, dtype=torch.bool), NOISE),
        TypeError,
        "noise_mse: pred must be float16, bfloat16, float32 or float64, got torch.bool",
    ),
    "complex": (
        lambda: df.to_x0(X, torch.zeros(8, 4, dtype=torch.complex64), LEVEL),
        TypeError,
        "to_x0: pred must be float16, bfloat16, float32 or float64, got torch.complex64",
    ),
    "float8": (
        lambda: df.add_noise(X.to(torch.float8_e4m3fn), NOISE, LEVEL),
        TypeError,
        "add_noise: x0 must be float16, bfloat16, float32 or float64, got torch.float8_e4m3fn",
    ),
    "sparse": (
        lambda: df.add_noise(X.to_sparse(), NOISE, LEVEL),
        TypeError,
        "add_noise: x0 must be a dense tensor, got torch.sparse_coo",
    ),
    "not a tensor": (
        lambda: df.add_noise([1.0], NOISE, LEVEL),
        TypeError,
        "add_noise: x0 must be a tensor, got list",
    ),
    "not noise": (
        lambda: df.add_noise(X, 3, LEVEL),
        TypeError,
        "add_noise: noise must be a Noise or a tensor like x0, got int",
    ),
    "not a level": (
        lambda: df.add_noise(X, NOISE, 3),
        TypeError,
        "add_noise: level must be a Level, as schedule\\[t\\] or Level\\(alpha, sigma\\), got int",
    ),
    "device": (
        lambda: df.add_noise(X, torch.zeros(8, 4, device="meta"), LEVEL),
        ValueError,
        "add_noise: noise must be on cpu like x0, got meta",
    ),
    "level device": (
        lambda: df.add_noise(X, NOISE, SCHEDULE[torch.zeros(8, dtype=torch.int64, device="meta")]),
        ValueError,
        "add_noise: level must be on cpu like the samples, got meta",
    ),
    "level length": (
        lambda: df.add_noise(X, NOISE, SCHEDULE[torch.zeros(5, dtype=torch.int64)]),
        ValueError,
        r"add_noise: level must have one entry per sample \(8\), got 5",
    ),
    "level above": (
        lambda: df.add_noise(X, NOISE, SCHEDULE[torch.tensor([0, 1, 2, 1000, 4, 5, 6, 7])]),
        ValueError,
        r"add_noise: level must be in \[0, 1000\), got 1000 for sample 3 of the batch",
    ),
    "level below": (
        lambda: df.to_x0(X, X, SCHEDULE[torch.tensor([0, 1, 2, 3, 4, 5, 6, -1], dtype=torch.int32)]),
        ValueError,
        r"to_x0: level must be in \[0, 1000\), got -1 for sample 7 of the batch",
    ),
    "level above, in a gradient": (
        lambda: df.add_noise(X.clone().requires_grad_(), NOISE, SCHEDULE[torch.full((8,), 2**62)]),
        ValueError,
        r"add_noise: level must be in \[0, 1000\), got 4611686018427387904 for sample 0",
    ),
    "level above, look-up": (
        lambda: df.noise_mse(X, NOISE, level=SCHEDULE[torch.full((8,), 1000)], level_weight=torch.ones(1000)),
        ValueError,
        r"noise_mse: level must be in \[0, 1000\), got 1000 for sample 0",
    ),
    "target": (
        lambda: df.add_noise(X, NOISE, LEVEL, target="noise"),
        ValueError,
        "add_noise: target must be one of 'eps', 'x0', 'v', 'score', 'flow' or an EDM, got 'noise'",
    ),
    "predict": (
        lambda: df.to_x0(X, X, LEVEL, predict="epsilon"),
        ValueError,
        "to_x0: predict must be one of 'eps', 'x0', 'v', 'score', 'flow' or an EDM, got 'epsilon'",
    ),
    "clamp": (
        lambda: df.to_x0(X, X, LEVEL, clamp=(1.0, -1.0)),
        ValueError,
        r"to_x0: clamp must be c >= 0 or \(low, high\) with low <= high, got \(1.0, -1.0\)",
    ),
    "negative clamp": (
        lambda: df.to_eps(X, X, LEVEL, clamp=-1.0),
        ValueError,
        "to_eps: clamp must be c >= 0",
    ),
    "alpha is 0": (
        lambda: df.to_x0(X, X, df.Level(0.0, 1.0)),
        ValueError,
        r"to_x0: .*alpha = 0.0, sigma = 1.0.*predict='v'",
    ),
    "sigma is 0": (
        lambda: df.to_score(X, X, df.Level(1.0, 0.0)),
        ValueError,
        r"to_score: .*alpha = 1.0, sigma = 0.0",
    ),
    "sigma is 0 in a tensor": (
        lambda: df.to_score(X, X, df.Level(torch.ones(8), torch.tensor([1.0, 1, 1, 1, 1, 0, 1, 1]))),
        ValueError,
        r"to_score: .*sample 5, alpha = 1.0, sigma = 0.0",
    ),
    "step size": (
        lambda: df.langevin_step(X, X, -0.1, NOISE),
        ValueError,
        "langevin_step: step_size must not be negative, got -0.1",
    ),
    "step size NaN": (
        lambda: df.langevin_step(X, X, float("nan"), NOISE),
        ValueError,
        "langevin_step: step_size must not be negative, got nan",
    ),
    "step sizes": (
        lambda: df.langevin_step(X, X, torch.tensor([1.0, 1, 1, 1, 1, 1, 1, -2]), NOISE),
        ValueError,
        "langevin_step: step_size must not be negative, got -2.0",
    ),
    "step sizes' shape": (
        lambda: df.langevin_step(X, X, torch.ones(3), NOISE),
        ValueError,
        r"langevin_step: step_size must be a float or have shape \(8,\), one per sample, got \(3,\)",
    ),
    "step size of integers": (
        lambda: df.langevin_step(X, X, torch.ones(8, dtype=torch.int64), NOISE),
        TypeError,
        "langevin_step: step_size must be floating, got torch.int64",
    ),
    "score": (
        lambda: df.langevin_step(X, X[:4], 0.1, NOISE),
        ValueError,
        r"langevin_step: score must have shape \(8, 4\), got \(4, 4\)",
    ),
    "out dtype": (
        lambda: df.langevin_step(X, X, 0.1, NOISE, out=X.double()),
        TypeError,
        "langevin_step: out must be torch.float32 like x, got torch.float64",
    ),
    "out with gradient": (
        lambda: df.langevin_step(X.clone().requires_grad_(), X, 0.1, NOISE, out=torch.zeros(8, 4)),
        ValueError,
        "langevin_step: out= has no gradient",
    ),
    "reduction": (
        lambda: df.noise_mse(X, NOISE, reduction="avg"),
        ValueError,
        "noise_mse: reduction must be 'mean', 'sum' or 'none', got 'avg'",
    ),
    "empty mean": (
        lambda: df.noise_mse(torch.zeros(0, 4), NOISE),
        ValueError,
        r"noise_mse: the mean over an empty batch \(0, 4\) is not defined; use reduction='sum'",
    ),
    "weight shape": (
        lambda: df.noise_mse(X, NOISE, weight=torch.ones(4)),
        ValueError,
        r"noise_mse: weight must be .*\(8,\).*got \(4,\)",
    ),
    "weight type": (
        lambda: df.noise_mse(X, NOISE, weight=2.0),
        TypeError,
        r"noise_mse: weight must be a tensor \(B,\), got float",
    ),
    "level_weight without level": (
        lambda: df.noise_mse(X, NOISE, level_weight=torch.ones(1000)),
        ValueError,
        r"noise_mse: level_weight is looked up by level and needs level=schedule\[t\]",
    ),
    "level_weight shape": (
        lambda: df.noise_mse(X, NOISE, level=SCHEDULE[3], level_weight=torch.ones(8)),
        ValueError,
        r"noise_mse: level_weight must be a tensor of shape \(1000,\), got \(8,\)",
    ),
    "mask type": (
        lambda: df.noise_mse(X, NOISE, mask=torch.ones(8, 4, dtype=torch.int64)),
        TypeError,
        "noise_mse: mask must be a bool tensor, weights or a corruption, got torch.int64",
    ),
    "mask dimensions": (  # would be taken for (C, H, W) where B = C
        lambda: df.noise_mse(X.reshape(2, 2, 4, 2), NOISE, mask=torch.ones(2, 4, 2, dtype=torch.bool)),
        ValueError,
        r"noise_mse: mask must have as many dimensions as \(2, 2, 4, 2\), .* got \(2, 4, 2\)",
    ),
    "mask shape": (
        lambda: df.noise_mse(X, NOISE, mask=torch.ones(8, 3, dtype=torch.bool)),
        ValueError,
        r"noise_mse: mask must be broadcastable to \(8, 4\), got \(8, 3\)",
    ),
    "x0_mse without level": (
        lambda: df.noise_mse(X, NOISE, return_x0_mse=True),
        ValueError,
        "noise_mse: return_x0_mse needs level",
    ),
    "x0 shape": (
        lambda: df.denoising_loss(X, X[:, :3], NOISE, LEVEL),
        ValueError,
        r"denoising_loss: x0 must have shape \(8, 4\), got \(8, 3\)",
    ),
    "kind": (
        lambda: df.denoising_loss(X, X, NOISE, LEVEL, kind="l2"),
        ValueError,
        "denoising_loss: kind must be one of 'mse', 'l1', 'huber', 'pseudo_huber', got 'l2'",
    ),
    "no delta": (
        lambda: df.denoising_loss(X, X, NOISE, LEVEL, kind="huber"),
        ValueError,
        "denoising_loss: delta must be given for kind='huber'",
    ),
    "delta of no Huber": (
        lambda: df.denoising_loss(X, X, NOISE, LEVEL, delta=1.0),
        ValueError,
        "denoising_loss: delta must be None for kind='mse'",
    ),
    "delta": (
        lambda: df.denoising_loss(X, X, NOISE, LEVEL, kind="huber", delta=0.0),
        ValueError,
        "denoising_loss: delta must be positive and finite, got 0.0",
    ),
    "delta's function": (
        lambda: df.denoising_loss(X, X, NOISE, LEVEL, kind="huber", delta=lambda alpha, sigma: alpha - 1),
        ValueError,
        "denoising_loss: delta must be positive, got -0.4.* from the function",
    ),
    "delta's type": (
        lambda: df.denoising_loss(X, X, NOISE, LEVEL, kind="huber", delta="1"),
        TypeError,
        "denoising_loss: delta must be a float or a tensor, got str",
    ),
    "no noise": (
        lambda: df.denoising_loss(X, X, None, LEVEL, predict="v"),
        ValueError,
        "denoising_loss: noise must be given for predict='v'",
    ),
    "no level": (
        lambda: df.denoising_loss(X, X, NOISE, None, predict="v"),
        ValueError,
        "denoising_loss: level must be given for predict='v'",
    ),
    "no level for delta": (
        lambda: df.denoising_loss(X, X, NOISE, None, kind="huber", delta=lambda alpha, sigma: alpha),
        ValueError,
        "denoising_loss: level must be given, of which this delta is a function",
    ),
    "level, not read": (
        lambda: df.denoising_loss(X, X, NOISE, SCHEDULE[torch.zeros(5, dtype=torch.int64)]),
        ValueError,
        r"denoising_loss: level must have one entry per sample \(8\), got 5",
    ),
    "log_variance": (
        lambda: df.denoising_loss(X, X, NOISE, LEVEL, log_variance=torch.zeros(4)),
        ValueError,
        r"denoising_loss: log_variance must be .* shape \(8,\), one per sample, got \(4,\)",
    ),
    "log_variance's type": (
        lambda: df.denoising_loss(X, X, NOISE, LEVEL, log_variance=0.5),
        TypeError,
        r"denoising_loss: log_variance must be a tensor \(B,\), got float",
    ),
    "empty mean with log_variance": (
        lambda: df.denoising_loss(X[:0], X[:0], NOISE, LEVEL, log_variance=torch.zeros(0)),
        ValueError,
        r"denoising_loss: the mean over an empty batch \(0, 4\) is not defined",
    ),
    "target where sigma is 0": (
        lambda: df.denoising_loss(X, X, NOISE, df.Level(1.0, 0.0), predict="score"),
        ValueError,
        "denoising_loss: has no finite value at alpha = 1.0, sigma = 0.0",
    ),
    "sample ids": (
        lambda: df.add_noise(X, df.Noise(0, sample=torch.arange(5)), LEVEL),
        ValueError,
        r"add_noise: noise.sample must have shape \(8,\), got \(5,\)",
    ),
    "sample ids' device": (
        lambda: df.noise_mse(X, df.Noise(0, sample=torch.arange(8, device="meta"))),
        ValueError,
        "noise_mse: noise.sample must be on cpu, got meta",
    ),
    "out of add_noise with a target": (
        lambda: df.add_noise(X, NOISE, LEVEL, target="v", out=torch.empty(8, 4)),
        ValueError,
        "add_noise: out= is of x_t alone; give no target with it",
    ),
    "out of add_noise with a gradient": (
        lambda: df.add_noise(X.clone().requires_grad_(), NOISE, LEVEL, out=torch.empty(8, 4)),
        ValueError,
        "add_noise: out= has no gradient; call it under torch.no_grad\\(\\) or without out",
    ),
    "out of add_noise, its shape": (
        lambda: df.add_noise(X, NOISE, LEVEL, out=torch.empty(8, 5)),
        ValueError,
        r"add_noise: out must have shape \(8, 4\), got \(8, 5\)",
    ),
    "out of add_noise, expanded": (
        lambda: df.add_noise(X, NOISE, LEVEL, out=torch.zeros(8, 1).expand(8, 4)),
        ValueError,
        "add_noise: out has several elements in one place of memory",
    ),
    "negative perturbation": (
        lambda: df.add_noise(X, NOISE, LEVEL, perturbation=-0.1),
        ValueError,
        "add_noise: perturbation must be finite and not negative, got -0.1",
    ),
    "perturbation type": (
        lambda: df.add_noise(X, NOISE, LEVEL, perturbation="0.1"),
        TypeError,
        "add_noise: perturbation must be a float or a tensor, got str",
    ),
    "perturbation of a tensor": (
        lambda: df.add_noise(X, X, LEVEL, perturbation=0.1),
        ValueError,
        "add_noise: a perturbation is drawn from the noise's key: noise must not be a tensor",
    ),
    "structured noise of structured noise": (
        lambda: df.PyramidNoise(df.OffsetNoise(NOISE)),
        TypeError,
        "PyramidNoise: noise must be a Noise, got OffsetNoise",
    ),
    "offset of a vector": (
        lambda: df.add_noise(torch.zeros(8), df.OffsetNoise(NOISE), LEVEL),
        ValueError,
        r"OffsetNoise: samples must be \(B, C, ...\), got shape \(8,\)",
    ),
    "pyramid of flat data": (
        lambda: df.add_noise(X, df.PyramidNoise(NOISE), LEVEL),
        ValueError,
        r"PyramidNoise: samples must be \(B, C, ...\) with one to three spatial dimensions, got shape \(8, 4\)",
    ),
    "pyramid levels": (
        lambda: df.PyramidNoise(NOISE, levels=0),
        ValueError,
        "PyramidNoise: levels must be at least 1, got 0",
    ),
    "pyramid discount": (
        lambda: df.PyramidNoise(NOISE, -1.0),
        ValueError,
        "PyramidNoise: discount must be finite and not negative, got -1.0",
    ),
    "structured noise, its dtype": (
        lambda: df.OffsetNoise(NOISE).normal((8, 4), dtype=torch.int64),
        TypeError,
        "OffsetNoise.normal: dtype must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "structured noise, its shape": (
        lambda: df.OffsetNoise(NOISE).normal(()),
        ValueError,
        r"OffsetNoise.normal: shape must be \(B, ...\), got \(\)",
    ),
    "structured noise, sample ids": (
        lambda: df.add_noise(X, df.OffsetNoise(df.Noise(0, sample=torch.arange(5))), LEVEL),
        ValueError,
        r"add_noise: noise.sample must have shape \(8,\), got \(5,\)",
    ),
    "masking above 1": (
        lambda: df.Masking(1.5, NOISE),
        ValueError,
        r"Masking: p must be in \[0, 1\], got 1.5",
    ),
    "masking of NaN": (
        lambda: df.Masking(torch.tensor([0.1, float("nan")]), NOISE),
        ValueError,
        r"Masking: p must be in \[0, 1\], got nan",
    ),
    "masking of integers": (
        lambda: df.Masking(torch.tensor([0, 1]), NOISE),
        ValueError,
        r"Masking: p must be a float or a floating tensor \(\) or \(B,\), got torch.int64 of \(2,\)",
    ),
    "masking of a tensor": (
        lambda: df.Masking(0.5, X),
        TypeError,
        "Masking: noise must be a Noise, got Tensor",
    ),
    "masking, its batch": (
        lambda: df.corrupt(X, df.Masking(torch.full((5,), 0.5), NOISE)),
        ValueError,
        r"corrupt: Masking's p must be a float or have shape \(8,\), one per sample, got \(5,\)",
    ),
    "masking, its shape": (
        lambda: df.Masking(0.5, NOISE).mask(()),
        ValueError,
        r"Masking.mask: shape must be \(B, ...\), got \(\)",
    ),
    "masking, its sample ids": (
        lambda: df.corrupt(X, df.Masking(0.5, df.Noise(0, sample=torch.arange(5)))),
        ValueError,
        r"corrupt: noise.sample must have shape \(8,\), got \(5,\)",
    ),
    "salt": (
        lambda: df.SaltAndPepper(0.5, NOISE, salt=-0.5),
        ValueError,
        r"SaltAndPepper: salt must be in \[0, 1\], got -0.5",
    ),
    "salt of tensors": (
        lambda: df.SaltAndPepper(0.5, NOISE, salt=torch.tensor(0.5)),
        TypeError,
        "SaltAndPepper: salt must be a float, got a tensor",
    ),
    "value with salt": (
        lambda: df.corrupt(X, df.SaltAndPepper(0.5, NOISE), 1.0),
        ValueError,
        "corrupt: value is for a Masking; SaltAndPepper has low and high, got value=1.0",
    ),
    "not a corruption": (
        lambda: df.corrupt(X, NOISE),
        TypeError,
        "corrupt: corruption must be a Masking or a SaltAndPepper, got Noise",
    ),
    "integers to corrupt": (
        lambda: df.corrupt(X.long(), df.Masking(0.5, NOISE)),
        TypeError,
        "corrupt: x must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "ratio": (
        lambda: df.patch_mask(NOISE, 8, 16, 75),
        ValueError,
        r"patch_mask: ratio must be in \[0, 1\], got 75.0",
    ),
    "patches": (
        lambda: df.patch_mask(NOISE, 8, -1, 0.75),
        ValueError,
        "patch_mask: B and patches must not be negative, got 8 and -1",
    ),
    "embedding of a float": (
        lambda: df.timestep_embedding(0.5, 8),
        TypeError,
        r"timestep_embedding: t must be a tensor \(B,\), got float",
    ),
    "embedding, its shape": (
        lambda: df.timestep_embedding(X, 8),
        ValueError,
        r"timestep_embedding: t must be integers or floats of shape \(B,\), got torch.float32 of \(8, 4\)",
    ),
    "embedding, its dim": (
        lambda: df.timestep_embedding(X[:, 0], 2),
        ValueError,
        r"timestep_embedding: dim // 2 must be at least 1 and above freq_shift \(1.0\), got dim = 2",
    ),
    "embedding, out": (
        lambda: df.timestep_embedding(X[:, 0], 8, out=torch.zeros(8, 9)),
        ValueError,
        r"timestep_embedding: out must have shape \(8, 8\) and be on cpu, got \(8, 9\) on cpu",
    ),
    "embedding, out of integers": (
        lambda: df.timestep_embedding(X[:, 0], 8, out=torch.zeros(8, 8).long()),
        TypeError,
        "timestep_embedding: out must be a floating tensor, got torch.int64",
    ),
    "embedding, out with gradient": (
        lambda: df.timestep_embedding(X[:, 0].clone().requires_grad_(), 8, out=torch.zeros(8, 8)),
        ValueError,
        "timestep_embedding: out= has no gradient",
    ),
    "Fourier features, odd": (
        lambda: df.fourier_embedding(X, NOISE, 7),
        ValueError,
        "fourier_embedding: dim must be even and at least 2, got 7",
    ),
    "Fourier features of integers": (
        lambda: df.fourier_embedding(X.long(), NOISE, 8),
        ValueError,
        r"fourier_embedding: x must be floats of shape \(B,\) or \(B, D\), got torch.int64 of \(8, 4\)",
    ),
    "l1 of nothing": (
        lambda: df.l1_penalty(torch.zeros(0, 4)),
        ValueError,
        r"l1_penalty: the mean over an empty batch \(0, 4\) is not defined; use reduction='sum'",
    ),
    "sparsity rate": (
        lambda: df.kl_sparsity(X, 1.0),
        ValueError,
        r"kl_sparsity: rate must be in \(0, 1\), got 1.0",
    ),
    "sparsity of activations outside": (
        lambda: df.kl_sparsity(X + 2),
        ValueError,
        r"kl_sparsity: h must lie in \(0, 1\), got a unit whose mean is 2.0",
    ),
    "sparsity of nothing": (
        lambda: df.kl_sparsity(torch.zeros(0, 4)),
        ValueError,
        r"kl_sparsity: the mean over an empty batch \(0, 4\) is not defined",
    ),
    "contraction, shapes": (
        lambda: df.sigmoid_contraction(X, X),
        ValueError,
        r"sigmoid_contraction: h must be \(B, H\) and W \(H, D\), got \(8, 4\) and \(8, 4\)",
    ),
    "contraction, draws": (
        lambda: df.contraction(lambda x: x, X, NOISE, samples=0),
        ValueError,
        "contraction: samples must be at least 1, got 0",
    ),
    "contraction to a number": (
        lambda: df.contraction(lambda x: x.sum(), X, NOISE),
        ValueError,
        r"contraction: f must return a tensor \(8, ...\), got \(\)",
    ),
    "contraction, noise": (
        lambda: df.contraction(lambda x: x, X, X),
        TypeError,
        "contraction: noise must be a Noise, got Tensor",
    ),
}


READ_ON_THE_CPU = ("level above", "level below", "level above, in a gradient")


@pytest.mark.parametrize("name", CALLS)
def test_message(backend: str, name: str) -> None:
    if backend in GPU_CODE and name in READ_ON_THE_CPU:
        pytest.skip("on a GPU nobody looks at the levels: test_schedule.py finds NaN")
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()


OVERLAPS = {
    "expanded": (lambda: torch.zeros(8, 1).expand(8, 4), "out has several elements in one place of memory"),
    "as_strided": (lambda: torch.zeros(64).as_strided((8, 4), (1, 1)), "out has several elements in one place"),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_a_target_that_overlaps_itself_is_refused(name: str) -> None:
    make, message = OVERLAPS[name]
    with pytest.raises(ValueError, match=message):
        df.langevin_step(X, X, 0.1, NOISE, out=make())


def test_a_target_that_partly_overlaps_an_input_is_refused() -> None:
    buffer = torch.zeros(40)
    x, out = buffer[:32].view(8, 4), buffer[4:36].view(8, 4)
    with pytest.raises(ValueError, match="langevin_step: out and x partly overlap in memory"):
        df.langevin_step(x, X, 0.1, NOISE, out=out)
    with pytest.raises(ValueError, match="langevin_step: out and score partly overlap in memory"):
        df.langevin_step(X, x, 0.1, NOISE, out=out)
    square = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="out and x partly overlap"):
        df.langevin_step(square, torch.zeros(4, 4), 0.1, NOISE, out=square.T)


def test_interleaved_targets_are_accepted() -> None:
    """Views of one storage that share no element."""
    buffer = torch.randn(8, 8)
    x, out = buffer[:, :4], buffer[:, 4:]
    expected = df.langevin_step(x.clone(), X, 0.1, NOISE)
    assert torch.equal(df.langevin_step(x, X, 0.1, NOISE, out=out), expected)


def test_nothing_is_written_when_a_level_is_bad(backend: str) -> None:
    """The check comes before the first store."""
    if backend in GPU_CODE:
        pytest.skip("on a GPU nobody looks at the levels: test_schedule.py finds NaN")
    x = torch.randn(8, 4).requires_grad_()
    with pytest.raises(ValueError, match="level must be in"):
        df.add_noise(x, NOISE, SCHEDULE[torch.full((8,), 5000)])
    assert x.grad is None


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"use_backend: name must be one of .* 'triton' or None, got 'gpu'"):
        df.use_backend("gpu")
