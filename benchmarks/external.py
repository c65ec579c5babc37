"""Other people's libraries as peers: diffusers, denoising-diffusion-pytorch, torchsde, torch.func._random, numpy.

Each entry is the library's own call for the maths of one case, on the same inputs, in the same dtype, drawing its
own noise where the case draws it. What the library makes once per run (its tables) is made once here too.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dae_fast as df
from dae_fast.ops.structured import OFFSET_TAG

from .cases import NORMAL, SCHEDULE, TABLES, Case, Inputs, Law, Result, alpha_sigma, noised

if TYPE_CHECKING:
    from .peers import Setting, Tensors

Call = Callable[[Inputs], Result]
Calls = dict[str, Call]  # by the name of the case

CPU = torch.device("cpu")
# For the gate, of the largest value: these libraries keep tables in float32, and where sigma is the square root of
# 1 - alpha_bar in it, low levels have lost digits (diffusers is off by 3.7e-6, plain torch with good tables by 2e-7).
TABLE_ERROR = 1e-5
GUIDANCE, OFFSET = 3.0, 0.1
TREE_STEPS = 50
STEP_LEVEL = 500  # of the sampler steps: any level will do, it changes coefficients alone


def missing(device: torch.device = CPU) -> dict[str, str]:
    """The libraries that cannot run on `device` here, and why."""
    reasons = {library.name: _why_missing(library, device) for library in LIBRARIES}
    return {name: why for name, why in reasons.items() if why}


def peers(setting: Setting) -> dict[str, Callable[[], Tensors]]:
    """By library: its outputs and then the gradients, as every peer of the setting gives them."""
    from .peers import results  # which lists these peers beside its own

    inputs = setting.inputs()
    leaves = [inputs[name] for name in setting.leaves]
    device = setting.case.first(inputs).device
    found = {}
    for library in LIBRARIES:
        if _why_missing(library, device) or not library.fits(setting):
            continue
        call = library.calls(setting.dtype, device).get(setting.case.name)
        if call is not None:
            found[library.name] = results(lambda call=call: call(inputs), leaves, setting.dtype)  # type: ignore[misc]
    return found


# Cases beyond the shared list, which is of single ops: here because other libraries have them as one call.


def _noise_alone(i: Inputs) -> Tensor:
    x0 = i["x0"]
    return i["noise"].normal(x0.shape, dtype=x0.dtype, device=x0.device)


STEP_ENDS = 0.3, 0.55  # of time in [0, 1]


def _brownian(i: Inputs) -> Tensor:
    x = i["x0"]
    return df.BrownianNoise(i["noise"], 0.0, 1.0).increment(*STEP_ENDS, x.shape, dtype=x.dtype, device=x.device)


def _by_hand(like: Tensor) -> Tensor:
    """The same tree of bridges, each node's normals from a generator of its seed: an increment of a path too."""
    terms, apart = df.BrownianNoise(df.Noise(0), 0.0, 1.0)._moved("increment", *STEP_ENDS)
    generator = torch.Generator(like.device)
    total = torch.zeros(like.shape, device=like.device)
    entropy = int(torch.randint(2**31, ()))
    for node, c in terms.items():
        eps = torch.randn(like.shape, device=like.device, generator=generator.manual_seed(hash((entropy, node))))
        total.add_(eps, alpha=c / apart**0.5)
    return total.to(like.dtype)


def _given_brownian(noise: df.Noise, like: Tensor, dtype: torch.dtype) -> Tensor:
    return _brownian({"x0": like.to(dtype), "noise": noise})


BROWNIAN = Law(_by_hand, _given_brownian)


MALA_STEP = 0.05


def _gaussian_target(y: Tensor) -> tuple[Tensor, Tensor]:
    return -0.5 * y.flatten(1).square().sum(1), -y


def _unlikely(inputs: Inputs, g: torch.Generator) -> None:
    """A start whose proposal is always taken: the result does not hang on uniform numbers, which no law gives."""
    inputs["log_prob"] = torch.full(inputs["t"].shape, -1e30)


def _mala(i: Inputs) -> Tensor:
    return df.mala_step(_gaussian_target, i["x"], i["log_prob"], i["score"], MALA_STEP, i["noise"]).x


def _plain_mala(i: Inputs, eps: Tensor) -> Tensor:
    x, h = i["x"], MALA_STEP
    y = x + h * i["score"] + (2 * h) ** 0.5 * eps
    log_prob, score = _gaussian_target(y)
    there, back = ((to - at - h * s).flatten(1).square().sum(1) for to, at, s in ((y, x, i["score"]), (x, y, score)))
    log_ratio = log_prob - i["log_prob"] + (there - back) / (4 * h)
    taken = torch.rand_like(log_ratio).log() < log_ratio
    return torch.where(taken.reshape(-1, *[1] * (x.dim() - 1)), y, x)


def _sampler_step(eta: float, clamp: float, guidance: float | None = None) -> Call:
    """One turn of a sampler's loop, the network's output (outputs, under guidance) being given."""
    sampler = df.samplers.DDIM(
        SCHEDULE,
        levels=[STEP_LEVEL, STEP_LEVEL - 1],
        eta=eta,
        clamp=None if clamp == math.inf else clamp,
        use_clipped_model_output=True,
        guidance=guidance,
    )
    launches = sampler._plan.launches

    def step(i: Inputs) -> Tensor:
        x = i["x"]
        prediction = (i["pred"],) if guidance is None else (i["pred"], i["unconditional"])
        return launches(sampler._table(x), 0, x, prediction, i.get("noise"))[0]

    return step


def _plain_guided(i: Inputs, eps: Tensor) -> Tensor:
    """Ho and Salimans 2022, then the DDPM step."""
    u = i["unconditional"]
    return _plain_ddpm({**i, "pred": u + GUIDANCE * (i["pred"] - u)}, eps)


def _offset(i: Inputs) -> Tensor:
    return df.add_noise(i["x0"], df.OffsetNoise(i["noise"], OFFSET), i["level"])


def _with_offset(eps: Tensor, n: Tensor) -> Tensor:
    return eps + OFFSET * n.reshape(*n.shape, *[1] * (eps.dim() - 2))


def _given_offset(noise: df.Noise, like: Tensor, dtype: torch.dtype) -> Tensor:
    n = noise.fold_in(OFFSET_TAG).normal(like.shape[:2], dtype=dtype, device=like.device)
    return _with_offset(NORMAL.given(noise, like, dtype), n)


WITH_OFFSET = Law(
    lambda like: _with_offset(
        torch.randn_like(like), torch.randn(like.shape[:2], dtype=like.dtype, device=like.device)
    ),
    _given_offset,
    lambda like: like.shape[:2].numel(),
)


def _at_step(x: Tensor) -> tuple[Tensor, ...]:
    """alpha and sigma before and after the step, as a loop written by hand keeps them ready."""
    levels = [STEP_LEVEL, STEP_LEVEL - 1]
    return tuple(value for t in levels for value in (table[t] for table in TABLES[x.dtype, x.device.type]))


def _plain_ddpm(i: Inputs, eps: Tensor) -> Tensor:
    """Ho et al. 2020, eq. 7, with x0 clipped."""
    x, pred = i["x"], i["pred"]
    alpha, sigma, alpha_s, sigma_s = _at_step(x)
    kept = alpha / alpha_s
    beta = 1 - kept**2
    x0_hat = ((x - sigma * pred) / alpha).clamp(-1, 1)
    mean = (alpha_s * beta * x0_hat + kept * sigma_s**2 * x) / sigma**2
    return mean + beta**0.5 * sigma_s / sigma * eps


def _plain_ddim(i: Inputs, _: Tensor) -> Tensor:
    """Song, Meng and Ermon 2021, eq. 12, without noise."""
    x, pred = i["x"], i["pred"]
    alpha, sigma, alpha_s, sigma_s = _at_step(x)
    return alpha_s * (x - sigma * pred) / alpha + sigma_s * pred


def _objective(i: Inputs) -> Tensor:
    x_t = df.add_noise(i["x0"], i["noise"], i["level"])
    return df.noise_mse(_network(x_t, i["pred"]), i["noise"])


def _plain_objective(i: Inputs, eps: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["x0"])
    return torch.nn.functional.mse_loss(_network(alpha * i["x0"] + sigma * eps, i["pred"]), eps)


def _network(x_t: Tensor, pred: Tensor) -> Tensor:
    """As little of a network as makes the loss need x_t."""
    return x_t + pred


CASES = (
    Case("normal-fresh", _noise_alone, lambda i, eps: eps, ("x0",), (), streams=1),
    Case("brownian_increment", _brownian, lambda i, eps: eps, ("x0",), (), law=BROWNIAN, streams=1),
    Case("mala_step", _mala, _plain_mala, ("x", "score"), (), streams=3, extra=_unlikely),
    Case("ddpm_step-fresh", _sampler_step(1.0, 1.0), _plain_ddpm, ("x", "pred"), (), streams=3),
    Case(
        "guided_step-fresh",
        _sampler_step(1.0, 1.0, GUIDANCE),
        _plain_guided,
        ("x", "pred", "unconditional"),
        (),
        streams=4,
    ),
    Case("add_noise-offset", _offset, noised, ("x0",), ("x0",), law=WITH_OFFSET),
    Case("ddim_step", _sampler_step(0.0, math.inf), _plain_ddim, ("x", "pred"), (), fresh=False, streams=3),
    Case("objective-fresh", _objective, _plain_objective, ("pred", "x0"), ("pred",), loss=True, streams=3),
)


@dataclass(frozen=True)
class Library:
    name: str
    calls: Callable[[torch.dtype, torch.device], Calls]
    install: str
    fits: Callable[[Setting], bool] = lambda setting: True


@lru_cache
def _diffusers(dtype: torch.dtype, device: torch.device) -> Calls:
    from diffusers import DDIMScheduler, DDPMScheduler

    T = len(SCHEDULE)
    betas: dict[str, Any] = {"num_train_timesteps": T, "trained_betas": SCHEDULE.betas.tolist()}
    ddpm = DDPMScheduler(**betas, clip_sample=True)
    ddim = DDIMScheduler(**betas, clip_sample=False)
    ddim.set_timesteps(T)

    def noise_and_velocity(i: Inputs) -> Tensors:
        eps = torch.randn_like(i["x0"])
        return ddpm.add_noise(i["x0"], eps, i["t"]), ddpm.get_velocity(i["x0"], eps, i["t"])

    return {
        "add_noise-fresh": lambda i: ddpm.add_noise(i["x0"], torch.randn_like(i["x0"]), i["t"]),
        "add_noise-tensor": lambda i: ddpm.add_noise(i["x0"], i["noise"], i["t"]),
        "add_noise-target": noise_and_velocity,
        "ddpm_step-fresh": lambda i: ddpm.step(i["pred"], STEP_LEVEL, i["x"], return_dict=False)[0],
        "ddim_step": lambda i: ddim.step(i["pred"], STEP_LEVEL, i["x"], return_dict=False)[0],
    }


class _OneAddition(torch.nn.Module):
    """`_network` with the attributes that GaussianDiffusion asks of one."""

    channels = out_dim = 1
    self_condition = False
    pred: Tensor

    def forward(self, x_t: Tensor, t: Tensor, self_condition: Tensor | None) -> Tensor:
        return _network(x_t, self.pred)


@lru_cache
def _lucidrains(dtype: torch.dtype, device: torch.device) -> Calls:
    from denoising_diffusion_pytorch import GaussianDiffusion

    network = _OneAddition()
    options: dict[str, Any] = {"objective": "pred_noise", "beta_schedule": "linear", "auto_normalize": False}
    diffusion = GaussianDiffusion(network, image_size=1, timesteps=len(SCHEDULE), **options).to(device, dtype)

    def loss(i: Inputs) -> Tensor:
        network.pred = i["pred"]
        return diffusion.p_losses(i["x0"], i["t"])

    return {
        "add_noise-fresh": lambda i: diffusion.q_sample(i["x0"], i["t"]),
        "add_noise-tensor": lambda i: diffusion.q_sample(i["x0"], i["t"], i["noise"]),
        "to_x0-eps": lambda i: diffusion.predict_start_from_noise(i["x_t"], i["t"], i["pred"]),
        "to_x0-v": lambda i: diffusion.predict_start_from_v(i["x_t"], i["t"], i["pred"]),
        "to_eps-x0": lambda i: diffusion.predict_noise_from_start(i["x_t"], i["t"], i["pred"]),
        "objective-fresh": loss,
    }


@lru_cache
def _torchsde(dtype: torch.dtype, device: torch.device) -> Calls:
    """The steps of a sampler, as k-diffusion's and diffusers' BrownianTreeNoiseSampler take them; then a new path."""
    from torchsde import BrownianTree

    def steps(like: Tensor) -> Iterator[Tensor]:
        for entropy in itertools.count():
            path = BrownianTree(0.0, torch.zeros_like(like), 1.0, entropy=entropy)
            for k in range(TREE_STEPS):
                t, s = k / TREE_STEPS, (k + 1) / TREE_STEPS
                yield path(t, s) / (s - t) ** 0.5

    # Of the last shape.
    of = lru_cache(maxsize=1)(lambda shape: steps(torch.empty(shape, dtype=dtype, device=device)))
    return {"brownian_increment": lambda i: next(of(i["x0"].shape))}


@lru_cache
def _torch_random(dtype: torch.dtype, device: torch.device) -> Calls:
    """The same stream as ours, made into a tensor."""
    from .peers import STEP

    random = import_module("torch.func._random")
    random.normal(random.key(0, device=device), 1)  # older torch has it on a GPU alone, and says so here

    def normal(x: Tensor) -> Tensor:
        rows = random.split(random.fold_in(random.key(0, device=x.device), STEP), x.shape[0])
        return random.normal(rows.reshape(-1, *[1] * (x.dim() - 1), 2), x.shape, dtype=x.dtype)

    def noised(i: Inputs) -> Tensor:
        alpha, sigma = alpha_sigma(i, i["x0"])
        return alpha * i["x0"] + sigma * normal(i["x0"])

    return {"normal-fresh": lambda i: normal(i["x0"]), "add_noise-fresh": noised}


@lru_cache
def _numpy(dtype: torch.dtype, device: torch.device) -> Calls:
    import numpy as np

    if device.type != "cpu":
        raise ImportError(f"numpy does not run on {device}")
    generator = np.random.default_rng(0)
    alphas, sigmas = (table.to(dtype).numpy() for table in (SCHEDULE.alpha, SCHEDULE.sigma))

    def normal(x: Any) -> Any:
        return generator.standard_normal(x.shape, x.dtype)

    def of(i: Inputs, name: str) -> tuple[Any, Any, Any]:
        x, t = i[name].detach().numpy(), i["t"].numpy()
        alpha, sigma = (np.expand_dims(table[t], tuple(range(1, x.ndim))) for table in (alphas, sigmas))
        return x, alpha, sigma

    def noised(i: Inputs) -> Tensor:
        x0, alpha, sigma = of(i, "x0")
        eps = i["noise"].numpy() if isinstance(i["noise"], Tensor) else normal(x0)
        return torch.from_numpy(alpha * x0 + sigma * eps)

    def to_x0(i: Inputs) -> Tensor:
        x_t, alpha, sigma = of(i, "x_t")
        return torch.from_numpy((x_t - sigma * i["pred"].numpy()) / alpha)

    return {
        "normal-fresh": lambda i: torch.from_numpy(normal(i["x0"].numpy())),
        "add_noise-fresh": noised,
        "add_noise-tensor": noised,
        "to_x0-eps": to_x0,
    }


def _numpy_fits(setting: Setting) -> bool:
    """No gradients, and no bfloat16; its generator makes no float16."""
    return not setting.leaves and setting.dtype in (torch.float32, torch.float64)


def _lucidrains_fits(setting: Setting) -> bool:
    """Its loss unpacks b, c, h, w."""
    return setting.case.name != "objective-fresh" or len(setting.shape) == 4


LIBRARIES = (
    Library("diffusers", _diffusers, "pip install .[peers]"),
    Library(
        "denoising-diffusion-pytorch",
        _lucidrains,
        "pip install .[peers-torchvision], which brings the torch that torchvision wants",
        _lucidrains_fits,
    ),
    Library("torchsde", _torchsde, "pip install .[peers]"),
    Library("torch.func._random", _torch_random, "on the CPU it comes with torch 2.14"),
    Library("numpy", _numpy, "pip install numpy", _numpy_fits),
)


@lru_cache
def _why_missing(library: Library, device: torch.device) -> str:
    try:
        library.calls(torch.float32, device)
    # A package built for another torch fails in its import with whatever its own registrations raise.
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return f"{textwrap.shorten(str(error).splitlines()[0], 90)} ({library.install})"
    return ""
