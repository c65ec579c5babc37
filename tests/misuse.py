"""Calls of every public callable with one argument wrong: what they raise must say which.

A call is a function and arguments that are right; each argument in turn is each of WRONG.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

import dae_fast as df

S = df.Schedule.linear(6, 0.01, 0.3)
VE = df.Schedule.geometric(4, 0.1, 2.0)
C = df.ContinuousSchedule.vp()
X = torch.linspace(-1, 1, 12).reshape(2, 3, 2)
U = torch.sigmoid(X)
T = torch.tensor([1, 4])
N0 = df.Noise(0)
LEVEL = S[T]
MASK = X > 0
WEIGHT = torch.ones(2)
LOSS = df.nn.DenoisingLoss(S, "v")
STATISTICS = df.LevelStatistics(6)
PRECONDITIONER = df.nn.EDMPreconditioner(lambda x, c: x)


class Call(NamedTuple):
    """`function` with `arguments` by name; the first `positional` of them can be given by place alone."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    name: str
    positional: int = 0

    def __call__(self, **changed: Any) -> Any:
        arguments = {**self.arguments, **changed}
        values = list(arguments.values())
        return self.function(*values[: self.positional], **dict(list(arguments.items())[self.positional :]))


def net(x: torch.Tensor, t: torch.Tensor, x_self_cond: torch.Tensor | None = None) -> torch.Tensor:
    return 0.5 * x


def target(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_zeros(len(y)), y


def pair(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return 0.5 * x, 0.3 * x


# Of the samplers, what their defaults are not.
OPTIONS: dict[str, dict[str, Any]] = {
    "ddim": {"eta": 0.5},
    "flow_sde": {"schedule": df.Schedule.flow(6)},
    "heun": {"S_tmax": 1.0},
    "predictor_corrector": {"predictor": "ancestral", "snr": 0.1, "steps": 3},
    "probability_flow": {"schedule": C, "method": "euler"},
    "annealed_langevin": {"schedule": VE, "step_size": 1e-3, "steps_per_level": 2},
}


def sampler_classes() -> list[Any]:
    found = (getattr(df.samplers, name) for name in df.samplers.__all__)
    return [c for c in found if hasattr(c, "op") and c is not df.samplers.Sampler]


def _samplers() -> Iterator[Call]:
    """Each class and its short form."""
    for cls in sampler_classes():
        options = {n: p.default for n, p in inspect.signature(cls).parameters.items() if n != "schedule"}
        if options.get("steps"):
            options["steps"] = 3
        options |= {"schedule": S, **OPTIONS.get(cls.op, {})}
        schedule = options.pop("schedule")
        yield Call(cls, {"schedule": schedule, **options}, cls.op, 1)
        if cls.op in df.samplers.__all__:
            loop = {"net_arguments": None, "progress": False, "graph": False, "gradients": False, "callback": None}
            first = {cls.net_name: net, "x": X, "schedule": schedule, "noise": N0}
            yield Call(getattr(df.samplers, cls.op), {**first, **options, **loop}, cls.op)
    inpainting = {"sampler": df.samplers.DDIM(S, steps=2), "known": X, "mask": MASK, "noise": N0}
    yield Call(df.samplers.Inpainting, inpainting, "Inpainting")
    yield Call(df.samplers.RePaint, {**inpainting, "jump_length": 1, "jump_n_sample": 2}, "RePaint")
    yield Call(df.samplers.Trajectory, {}, "Trajectory")
    step = {"x": X, "pred": U, "level": S[4], "next_level": S[1], "noise": N0}
    own = {"solver": "ddim", "eta": 0.5, "predict": "eps", "clamp": None, "return_x0": False}
    yield Call(df.step, {**step, **own}, "step")
    loop = {"progress": False, "callback": None}
    last = {"guidance": None, "net_arguments": None, "graph": False, **loop}
    yield Call(
        df.samplers.langevin,
        {"score": torch.neg, "x": X, "step_size": 0.1, "steps": 2, "noise": N0, "noise_scale": 1.0, **last},
        "langevin",
    )
    chain = {"x": X, "step_size": 0.1, "steps": 2, "noise": N0, **loop}
    yield Call(df.samplers.sgld, {"score": torch.neg, **chain, "temperature": 1.0, "preconditioner": None}, "sgld")
    own = {"v": None, "friction": 1.0, "temperature": 1.0}
    yield Call(df.samplers.underdamped, {"score": torch.neg, **chain, **own}, "underdamped")
    yield Call(df.samplers.mala, {"target": target, **chain}, "mala")


def _ops() -> Iterator[Call]:
    yield Call(
        df.add_noise,
        {"x0": X, "noise": N0, "level": LEVEL, "target": None, "perturbation": None, "out": None},
        "add_noise",
    )
    loss = {"mask": None, "normalise": "sum", "reduction": "mean"}
    yield Call(
        df.noise_mse,
        {"pred": X, "noise": N0, "level": LEVEL, "weight": None, "level_weight": None, **loss, "return_x0_mse": False},
        "noise_mse",
    )
    yield Call(
        df.denoising_loss,
        {
            "pred": X,
            "x0": X,
            "noise": N0,
            "level": LEVEL,
            "predict": "v",
            "weight": None,
            "kind": "mse",
            "delta": None,
            **loss,
            "log_variance": None,
            "return_per_sample": False,
        },
        "denoising_loss",
    )
    yield Call(df.target, {"x0": X, "noise": N0, "level": LEVEL, "to": "v"}, "target")
    yield Call(df.dream, {"x0": X, "noise": N0, "pred": X, "level": LEVEL, "predict": "v", "p": 1.0}, "dream")
    learned = {"pred": X, "v": X, "x0": X, "noise": N0, "level": LEVEL, "predict": "v"}
    yield Call(df.variational_bound, {**learned, "variance": "range", "reduction": "mean"}, "variational_bound")
    yield Call(df.hybrid_loss, {**learned, "weight": None, "variance": "range", "bound_weight": 0.1}, "hybrid_loss")
    for name in ("to_x0", "to_eps", "to_score", "to_v"):
        yield Call(getattr(df, name), {"x_t": X, "pred": X, "level": LEVEL, "predict": "v", "clamp": 1.0}, name)
    yield Call(df.convert, {"x_t": X, "pred": X, "level": LEVEL, "predict": "v", "to": "eps", "clamp": 1.0}, "convert")
    yield Call(
        df.langevin_step,
        {"x": X, "score": X, "step_size": 0.1, "noise": N0, "noise_scale": 1.0, "out": None},
        "langevin_step",
    )
    yield Call(
        df.residual_loss,
        {"pred": X, "term": (0.5, X), "weight": None, "kind": "mse", "delta": None, "mask": None, "reduction": "mean"},
        "residual_loss",
        2,
    )
    mixed = {"where": X > 0, "otherwise": X}
    yield Call(df.weighted_sum, {"term": (0.5, X), "also": None, "out": None, **mixed}, "weighted_sum", 1)
    yield Call(df.clamped, {"term": (0.5, X), "low": -1.0, "high": 1.0}, "clamped", 1)
    yield Call(
        df.LevelOp,
        {"name": "scaled", "coefficients": lambda a, s: {"x": a}, "also": None, "estimate": None},
        "LevelOp",
    )
    mixture = {"weights": [1.0, 2.0], "means": [[0.0], [1.0]], "stds": [1.0, 1.0]}
    yield Call(df.samplers.GaussianMixture, mixture, "GaussianMixture")
    yield Call(df.samplers.DoubleWell, {"height": 2.0, "b": 1.0}, "DoubleWell")
    step = {"x": X, "score": X, "step_size": 0.1, "noise": N0, "temperature": 1.0}
    yield Call(df.sgld_step, {**step, "preconditioner": None}, "sgld_step")
    yield Call(df.underdamped_step, {**step, "v": X, "friction": 1.0}, "underdamped_step")
    chain = {"target": lambda y: (y.sum((1, 2)), y), "x": X, "log_prob": WEIGHT, "score": X, "step_size": 0.1}
    yield Call(df.mala_step, {**chain, "noise": N0}, "mala_step")
    path = df.BrownianNoise(N0, 0.0, 3.0)
    yield Call(df.BrownianNoise, {"noise": N0, "t0": 0.0, "t1": 3.0, "depth": 8}, "BrownianNoise")
    for name in ("between", "increment"):
        given = {"t": 2.0, "s": 1.5, "shape": (2, 3), "dtype": torch.float32, "device": "cpu"}
        yield Call(getattr(path, name), given, name)
    yield Call(path.fold_in, {"data": 3}, "fold_in")
    yield Call(df.corrupt, {"x": X, "corruption": df.Masking(0.5, N0), "value": 0.0}, "corrupt")
    yield Call(df.Masking, {"p": 0.5, "noise": N0}, "Masking")
    yield Call(df.SaltAndPepper, {"p": 0.5, "noise": N0, "low": 0.0, "high": 1.0, "salt": 0.5}, "SaltAndPepper")
    yield Call(df.Masking(0.5, N0).mask, {"shape": (2, 3), "device": "cpu"}, "mask")
    yield Call(df.patch_mask, {"noise": N0, "B": 2, "patches": 9, "ratio": 0.75, "device": "cpu"}, "patch_mask")
    latents = {"clamp_log_var": None, "scale": 1.0, "shift": 0.0, "kl": True}
    yield Call(df.reparameterise, {"mu": X, "log_var": X, "noise": N0, **latents}, "reparameterise")
    yield Call(df.l1_penalty, {"h": X, "reduction": "mean"}, "l1_penalty")
    yield Call(df.kl_sparsity, {"h": U, "rate": 0.05}, "kl_sparsity")
    flat = U.reshape(2, 6)
    yield Call(df.sigmoid_contraction, {"h": flat, "W": torch.ones(6, 4), "reduction": "mean"}, "sigmoid_contraction")
    yield Call(df.contraction, {"f": torch.tanh, "x": X, "noise": N0, "samples": 1, "reduction": "mean"}, "contraction")
    yield Call(
        df.timestep_embedding,
        {"t": T, "dim": 8, "max_period": 1e4, "flip": False, "freq_shift": 1.0, "out": None},
        "timestep_embedding",
    )
    yield Call(
        df.fourier_embedding,
        {"x": WEIGHT, "noise": N0, "dim": 8, "scale": 1.0, "flip": False, "out": None},
        "fourier_embedding",
    )
    yield Call(df.OffsetNoise, {"noise": N0, "strength": 0.1}, "OffsetNoise")
    yield Call(df.PyramidNoise, {"noise": N0, "discount": 0.8, "levels": 2}, "PyramidNoise")
    for structured in (df.OffsetNoise(N0), df.PyramidNoise(N0)):
        yield Call(structured.normal, {"shape": (2, 3, 4), "dtype": torch.float32, "device": "cpu"}, "normal")
        yield Call(structured.fold_in, {"data": 3}, "fold_in")


def _values() -> Iterator[Call]:
    yield Call(df.Noise, {"seed": 0, "sample": None, "first_sample": 0, "first_element": 0}, "Noise")
    yield Call(N0.fold_in, {"data": 3}, "fold_in")
    yield Call(N0.normal, {"shape": (2, 3), "dtype": torch.float32, "device": "cpu"}, "normal")
    yield Call(N0.bits, {"shape": (2, 3), "below": 7, "device": "cpu"}, "bits")
    yield Call(N0.to, {"device": "cpu"}, "to")
    yield Call(df.Noise.from_state_dict, {"state": N0.state_dict()}, "from_state_dict")
    yield Call(df.Level, {"alpha": 0.5, "sigma": 0.5}, "Level")
    yield Call(df.EDM, {"sigma_data": 0.5}, "EDM")
    column = torch.tensor([0.1, 0.5])
    yield Call(df.Schedule, {"alpha": torch.ones(2), "sigma": column, "name": "Schedule", "times": None}, "Schedule")
    yield Call(df.Schedule.from_betas, {"betas": column, "name": "Schedule.from_betas"}, "from_betas")
    yield Call(df.Schedule.from_alpha_bar, {"alpha_bar": column.flip(0), "name": "Schedule.from_alpha_bar"}, "from_alp")
    yield Call(df.Schedule.linear, {"T": 5, "beta_start": 1e-4, "beta_end": 0.02}, "linear")
    yield Call(df.Schedule.scaled_linear, {"T": 5, "beta_start": 1e-4, "beta_end": 0.02}, "scaled_linear")
    yield Call(df.Schedule.cosine, {"T": 5, "s": 0.008, "max_beta": 0.999}, "cosine")
    yield Call(df.Schedule.sigmoid, {"T": 5, "start": -3.0, "end": 3.0, "tau": 1.0, "max_beta": 0.999}, "sigmoid")
    yield Call(
        df.TimedSchedule, {"alpha": torch.ones(2), "sigma": column, "times": column, "name": "TimedSchedule"}, "Ti"
    )
    yield Call(df.Schedule.geometric, {"T": 5, "sigma_min": 0.1, "sigma_max": 1.0}, "geometric")
    yield Call(df.Schedule.karras, {"T": 5, "sigma_min": 0.1, "sigma_max": 1.0, "rho": 7.0}, "karras")
    yield Call(df.Schedule.laplace, {"T": 5, "mu": 0.0, "b": 0.5}, "laplace")
    yield Call(df.Schedule.flow, {"T": 5, "shift": 1.0}, "flow")
    yield Call(S.shifted, {"shift": 2.0}, "shifted")
    yield Call(S.draw, {"noise": N0, "B": 3, "device": "cpu"}, "draw")
    yield Call(S.__getitem__, {"t": T}, "Schedule.linear", 1)
    yield Call(C.__getitem__, {"t": WEIGHT}, "ContinuousSchedule", 1)
    for method in (C.alpha, C.sigma, C.drift, C.diffusion):
        yield Call(method, {"t": 0.5}, "t must be")
    yield Call(C.discretise, {"T": 4, "rho": 1.0, "times": None}, "discretise")
    yield Call(C.draw, {"noise": N0, "B": 3, "density": None, "device": "cpu"}, "draw")
    yield Call(
        df.ContinuousSchedule,
        {
            "alpha": lambda t: 1 - t,
            "sigma": lambda t: t,
            "t_min": 0.0,
            "t_max": 1.0,
            "density": None,
            "shift": 1.0,
            "name": "ContinuousSchedule",
        },
        "ContinuousSchedule",
    )
    drawn = {"density": None}
    yield Call(df.ContinuousSchedule.flow, {"shift": 1.0, **drawn}, "flow")
    yield Call(df.ContinuousSchedule.vp, {"beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5, **drawn}, "vp")
    yield Call(df.ContinuousSchedule.sub_vp, {"beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5, **drawn}, "sub_vp")
    yield Call(df.ContinuousSchedule.ve, {"sigma_min": 0.1, "sigma_max": 20.0, **drawn}, "ve")
    yield Call(df.ContinuousSchedule.edm, {"sigma_min": 0.1, "sigma_max": 20.0, **drawn}, "edm")
    yield Call(df.ContinuousSchedule.cosine, drawn, "cosine")
    yield Call(df.ContinuousSchedule.laplace, {"mu": 0.0, "b": 0.5, **drawn}, "laplace")
    yield Call(df.Uniform, {"low": 0.1, "high": 0.9}, "Uniform")
    yield Call(df.LogNormal, {"P_mean": -1.2, "P_std": 1.2}, "LogNormal")
    yield Call(df.LogitNormal, {"mean": 0.0, "std": 1.0}, "LogitNormal")
    yield Call(df.Mode, {"s": 1.29}, "Mode")
    yield Call(df.weighting.MinSNR, {"gamma": 5.0}, "MinSNR")
    yield Call(df.weighting.P2, {"k": 1.0, "gamma": 1.0}, "P2")
    yield Call(df.weighting.OnError, {"of": "x0", "weight": WEIGHT}, "OnError")


def _modules() -> Iterator[Call]:
    yield Call(
        df.nn.DenoisingLoss,
        {
            "schedule": S,
            "predict": "v",
            "weighting": None,
            "level_weight": torch.ones(6),
            "kind": "mse",
            "delta": None,
            "density": None,
            "self_condition": 0.0,
        },
        "DenoisingLoss",
    )
    yield Call(
        LOSS.forward,
        {"net": net, "x0": X, "noise": N0, "t": T, "weight": None, "mask": None},
        "DenoisingLoss",
    )
    yield Call(df.nn.EDMPreconditioner, {"net": net, "sigma_data": 0.5}, "EDM")
    yield Call(PRECONDITIONER.forward, {"x_t": X, "level": 0.5}, "EDMPreconditioner")
    yield Call(df.LevelStatistics, {"bins": 4, "decay": 0.9}, "LevelStatistics")
    yield Call(STATISTICS.update, {"t": T, "loss": WEIGHT}, "LevelStatistics")
    yield Call(STATISTICS.probabilities, {"least": 10.0, "uniform": 0.001}, "LevelStatistics")
    yield Call(df.use_backend, {"name": "reference"}, "backend")


def calls() -> list[Call]:
    return [*_ops(), *_values(), *_modules(), *_samplers()]


WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "a word": "nonsense",
    "nothing": "",
    "bytes": b"1",
    "-1": -1,
    "0": 0,
    "2.5": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "1e300": 1e300,
    "10^400": 10**400,
    "2^70": 2**70,
    "-inf": -float("inf"),
    "1j": 1j,
    "a fraction": Fraction(1, 3),
    "[]": [],
    "[1, 2]": [1, 2],
    "(1, 2, 3)": (1, 2, 3),
    "('a',)": ("a",),
    "(-1, 2)": (-1, 2),
    "{}": {},
    "a set": {1},
    "an object": object(),
    "a class": int,
    "a function": lambda *_: None,
    "an iterator": iter(()),
    "an array": np.ones((2, 3)),
    "a numpy scalar": np.float32(0.25),
    "a dtype": torch.int64,
    "a layout": torch.sparse_coo,
    "a device": torch.device("meta"),
    "ids": torch.tensor([0, 1]),
    "a number": torch.tensor(0.5),
    "an int tensor": torch.tensor(3),
    "bools": torch.ones(2, 3, 2, dtype=torch.bool),
    "ints": torch.ones(2, 3, 2, dtype=torch.int64),
    "complex": torch.ones(2, 3, 2, dtype=torch.complex64),
    "float8": torch.ones(2, 3, 2).to(torch.float8_e4m3fn),
    "another shape": torch.ones(2, 3, 3),
    "fewer dimensions": torch.ones(2, 3),
    "another batch": torch.ones(3),
    "empty": torch.ones(0),
    "sparse": torch.ones(2, 3, 2).to_sparse(),
    "quantized": torch.quantize_per_tensor(torch.ones(2, 3, 2), 0.1, 0, torch.quint8),
    "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "elsewhere": torch.ones(2, 3, 2, device="meta"),
    "NaNs": torch.full((2,), float("nan")),
    "a schedule": S,
    "a level": LEVEL,
    "noise": N0,
}


# Of these no number is too large, only long.
COUNTS = {"steps", "steps_per_level", "corrector_steps", "samples", "levels", "T", "B", "patches", "dim", "bins"}
LONG = {"2^70", "10^400"}
# A class may be called too; what it raises is its own.
FUNCTIONS = {
    "target",
    "f",
    "callback",
    "conditioning",
    "guidance",
    "net",
    "score",
    "density",
    "alpha",
    "sigma",
    "weight",
    "weighting",
    "coefficients",
    "also",
    "estimate",
}


# What an argument is made into, which says so.
ALSO = {
    ("EDMPreconditioner", "level"): ("Level: sigma",),
    **{("LevelOp", name): ("scaled: coefficients must",) for name in ("coefficients", "also", "estimate")},
    ("normal", "shape"): ("OffsetNoise: samples must be", "PyramidNoise: samples must be"),
    ("DenoisingLoss", "x0"): ("add_noise: level must",),
}


class Outcome(NamedTuple):
    call: str
    argument: str
    wrong: str
    error: Exception | None

    def __str__(self) -> str:
        return f"{self.call}({self.argument}={self.wrong}): {type(self.error).__name__}: {str(self.error)[:150]}"


def outcomes() -> Iterator[Outcome]:
    """Of every call with every argument wrong."""
    for call in calls():
        call()  # as it is it works
        for argument in call.arguments:
            for wrong, value in WRONG.items():
                if (argument in COUNTS and wrong in LONG) or (argument in FUNCTIONS and wrong == "a class"):
                    continue
                error = None
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        call(**{argument: value})
                    except Exception as raised:
                        error = raised
                yield Outcome(call.name, argument, wrong, error)


def is_named(outcome: Outcome) -> bool:
    """A TypeError or ValueError that says the function or the argument."""
    error = outcome.error
    if not isinstance(error, (TypeError, ValueError)):
        return False
    return any(name in str(error) for name in (outcome.call, f"{outcome.argument} must", *ALSO.get(outcome[:2], ())))
