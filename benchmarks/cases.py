"""The shared case list: every op once per way of calling it.

Correctness, gradient and benchmark runs are all generated from it; a new op adds its cases here.
A case says how to make inputs, how dae_fast is called, and the same maths in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dae_fast as df
from dae_fast.ops.corruption import MASK_TAG
from dae_fast.ops.noising import PERTURBATION_TAG

SCHEDULE = df.Schedule.linear(1000)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# alpha and sigma of every level in the samples' dtype and place, as a loop written by hand keeps them ready.
TABLES = {
    (dtype, device): tuple(t.to(device, dtype) for t in (SCHEDULE.alpha, SCHEDULE.sigma))
    for dtype in DTYPES
    for device in DEVICES
}

Inputs = dict[str, Any]
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Law:
    """What a case's noise is, like the samples."""

    drawn: Callable[[Tensor], Tensor]  # as a loop written by hand draws it
    given: Callable[[df.Noise, Tensor, torch.dtype], Tensor]  # the same of a Noise
    draws: Callable[[Tensor], int] = Tensor.numel  # how many values its mean is made of


def _normal(noise: df.Noise, like: Tensor, dtype: torch.dtype) -> Tensor:
    return noise.normal(like.shape, dtype=dtype, device=like.device)


NORMAL = Law(torch.randn_like, _normal)
# In fp64: rounded, a word could cross a threshold.
UNIFORM = Law(torch.rand_like, lambda n, like, _: n.fold_in(MASK_TAG).bits(like.shape, device=like.device) * 2.0**-32)
PERTURBATION = 0.1
PERTURBED = Law(
    lambda like: torch.randn_like(like) + PERTURBATION * torch.randn_like(like),
    lambda n, like, dtype: _normal(n, like, dtype) + PERTURBATION * _normal(n.fold_in(PERTURBATION_TAG), like, dtype),
)


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable[[Inputs], Result]
    # The same in plain torch, as it would be written by hand, given eps for the noise; at the inputs'
    # own precision, so that fp64 inputs make it the judge and the others make it the eager baseline.
    plain: Callable[[Inputs, Tensor], Result]
    tensors: tuple[str, ...]  # the floating inputs of the samples' shape, in the order they are drawn
    grads: tuple[str, ...]  # which inputs have gradients
    fresh: bool = True  # noise is a Noise; else it is the tensor inputs["noise"]
    law: Law = NORMAL  # of the noise that `plain` is given
    loss: bool = False  # a reduction, whose point is its gradient
    sums: tuple[int, ...] = ()  # outputs that are sums over each sample, and so of the compute type
    widens: bool = False  # by launches of its own, which see the compute type
    launches: str = ""  # what its launches are called in a profile, where it is not what the case is
    # Tensors that must be read and written at the least, forward (and backward, for a loss).
    streams: int = 2
    extra: Callable[[Inputs, torch.Generator], None] = field(default=lambda inputs, g: None)

    def __str__(self) -> str:
        return self.name

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Inputs:
        """The same values on every device."""
        g = torch.Generator().manual_seed(seed)
        B = shape[0]
        made: Inputs = {n: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for n in self.tensors}
        made["t"] = torch.randint(len(SCHEDULE), (B,), generator=g)
        self.extra(made, g)
        made = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}
        made["level"] = SCHEDULE[made["t"]]
        if self.fresh:
            made["noise"] = df.Noise(seed).fold_in(7)
        return made

    def first(self, inputs: Inputs) -> Tensor:
        """The tensor whose shape the noise has."""
        return inputs[self.tensors[0]]

    def eps(self, inputs: Inputs, dtype: torch.dtype) -> Any:
        """The noise that `plain` needs, as a tensor; None where there is none."""
        if not self.fresh:
            return inputs.get("noise")
        return self.law.given(inputs["noise"], self.first(inputs), dtype)


def widen(inputs: Inputs) -> Inputs:
    """The same values in fp64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def alpha_sigma(i: Inputs, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = TABLES[like.dtype, like.device.type]
    return column(alpha[i["t"]], like), column(sigma[i["t"]], like)


def noised(i: Inputs, eps: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["x0"])
    return alpha * i["x0"] + sigma * eps


def _noised_and_v(i: Inputs, eps: Tensor) -> tuple[Tensor, Tensor]:
    alpha, sigma = alpha_sigma(i, i["x0"])
    return alpha * i["x0"] + sigma * eps, alpha * eps - sigma * i["x0"]


def _x0(i: Inputs, _: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["x_t"])
    return (i["x_t"] - sigma * i["pred"]) / alpha


def _x0_from_v(i: Inputs, _: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["x_t"])
    return alpha * i["x_t"] - sigma * i["pred"]


def _eps_clipped(i: Inputs, _: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["x_t"])
    return (i["x_t"] - alpha * _x0(i, _).clamp(-1, 1)) / sigma


def _eps_from_x0(i: Inputs, _: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["x_t"])
    return (i["x_t"] - alpha * i["pred"]) / sigma


def _score(i: Inputs, _: Tensor) -> Tensor:
    return -i["pred"] / alpha_sigma(i, i["x_t"])[1]


def _edm_from_eps(i: Inputs, _: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["x_t"])
    size = (sigma**2 + (0.5 * alpha) ** 2) ** 0.5
    return (sigma / size * i["x_t"] - size * i["pred"]) / (0.5 * alpha)


def _v(i: Inputs, _: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["x_t"])
    return alpha * i["pred"] - sigma * (i["x_t"] - sigma * i["pred"]) / alpha


def _stepped(i: Inputs, eps: Tensor) -> Tensor:
    h = i["step_size"]
    h = column(h, i["x"]) if isinstance(h, Tensor) else h
    return i["x"] + h * i["score"] + (2 * h) ** 0.5 * eps


def _per_sample(square: Tensor) -> Tensor:
    return square.reshape(square.shape[0], -1).mean(1)


def _weighted_mse(i: Inputs, eps: Tensor) -> Tensor:
    return (i["weight"].to(eps.dtype) * _per_sample((i["pred"] - eps) ** 2)).mean()


STRIKES = df.Masking(0.25, df.Noise(11))


def _struck(inputs: Inputs, g: torch.Generator) -> None:
    with df.use_backend(None):  # on the CPU, whatever backend the op itself is to have
        inputs["masked"] = STRIKES.mask(inputs["pred"].shape)


def _masked_mse(i: Inputs, eps: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = i["mask"] if mask is None else mask
    square = torch.where(mask, (i["pred"] - eps) ** 2, 0).reshape(mask.shape[0], -1)
    return (square.sum(1) / mask.reshape(mask.shape[0], -1).sum(1).clamp(min=1)).mean()


def _v_loss(i: Inputs, eps: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["pred"])
    return torch.nn.functional.mse_loss(i["pred"], alpha * eps - sigma * i["x0"])


def _edm_loss(i: Inputs, eps: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["pred"])
    size = (sigma**2 + (0.5 * alpha) ** 2).sqrt()
    return torch.nn.functional.mse_loss(i["pred"], (2 * sigma * i["x0"] - 0.5 * alpha * eps) / size)


def _flow_huber(i: Inputs, eps: Tensor) -> Tensor:
    return torch.nn.functional.huber_loss(i["pred"], eps - i["x0"], delta=0.5)


def _scheduled_delta(alpha: Tensor, sigma: Tensor) -> Tensor:
    return 0.9 * (alpha / (alpha + sigma)) ** 2 + 0.1


def _pseudo_huber(i: Inputs, eps: Tensor) -> Tensor:
    """In the form that does not cancel."""
    delta, r = _scheduled_delta(*alpha_sigma(i, i["pred"])), i["pred"] - eps
    bent = r**2 / ((r**2 + delta**2).sqrt() + delta)
    return (2 * delta * torch.where(r.isinf(), r.abs(), bent)).mean()


def _min_snr(i: Inputs, eps: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["pred"])
    snr = (alpha / sigma) ** 2
    return (snr.clamp(max=5) / (snr + 1) * (i["pred"] - (alpha * eps - sigma * i["x0"])) ** 2).mean()


def _x0_where_struck(i: Inputs, _: Tensor) -> Tensor:
    masked = i["masked"]
    square = torch.where(masked, (i["pred"] - i["x0"]) ** 2, 0).reshape(masked.shape[0], -1)
    return (square.sum(1) / masked.reshape(masked.shape[0], -1).sum(1).clamp(min=1)).mean()


def _loss(**options: Any) -> Callable[[Inputs], Tensor]:
    return lambda i: df.denoising_loss(i["pred"], i["x0"], i["noise"], i["level"], **options)


def _sample_and_divergence(i: Inputs, eps: Tensor) -> tuple[Tensor, Tensor]:
    mu, log_var = i["mu"], i["log_var"]
    each = 0.5 * (mu**2 + log_var.exp() - 1 - log_var)
    return mu + (0.5 * log_var).exp() * eps, each.sum(tuple(range(1, each.dim()))) if each.dim() > 1 else each


def _l1(i: Inputs, _: Tensor) -> Tensor:
    return i["pred"].abs().mean()


def _weight(inputs: Inputs, g: torch.Generator) -> None:
    inputs["weight"] = torch.rand(inputs["t"].shape, generator=g)


def _mask(inputs: Inputs, g: torch.Generator) -> None:
    inputs["mask"] = torch.rand(inputs["pred"].shape, generator=g) < 0.5


def _step_sizes(inputs: Inputs, g: torch.Generator) -> None:
    inputs["step_size"] = torch.rand(inputs["t"].shape, generator=g) * 0.1


def _step_size(inputs: Inputs, g: torch.Generator) -> None:
    inputs["step_size"] = 0.05


def _element_weights(inputs: Inputs, g: torch.Generator) -> None:
    inputs["mask"] = torch.rand(inputs["pred"].shape, generator=g)


def _weighed_mse(i: Inputs, eps: Tensor) -> Tensor:
    m, B = i["mask"].to(eps.dtype), len(eps)
    return ((m * (i["pred"] - eps) ** 2).reshape(B, -1).sum(1) / m.reshape(B, -1).sum(1)).mean()


def _inpainted(i: Inputs, eps: Tensor) -> Tensor:
    return i["x"] + i["region"].to(eps.dtype) * (0.8 * i["x0"] + 0.6 * eps - i["x"])


def _region(inputs: Inputs, g: torch.Generator) -> None:
    x = inputs["x"]
    inputs["region"] = torch.rand(x.shape[:1] + (1,) * (x.dim() > 2) + x.shape[1 + (x.dim() > 2) :], generator=g)


def _stepped_to(i: Inputs, eps: Tensor) -> Tensor:
    x, t = i["x"], i["t"]
    c_x, c_p, std = (column(c[t], x) for c in STEP_TABLES[x.dtype, x.device.type])
    return c_x * x + c_p * i["pred"] + std * eps


def _step_table() -> tuple[Tensor, ...]:
    """Of each level's step to NEXT: Song, Meng and Ermon 2021, eq. 12, with the noise of the posterior."""
    (alpha, sigma), (alpha_s, sigma_s) = (SCHEDULE.alpha, SCHEDULE.sigma), NEXT
    std = sigma_s / sigma * (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).sqrt()
    return alpha_s / alpha, (sigma_s**2 - std**2).sqrt() - alpha_s * sigma / alpha, std


NEXT = math.sqrt(1 - 1e-5), math.sqrt(1e-5)  # alpha and sigma below every level
STEP_TABLES = {(dtype, d): tuple(t.to(d, dtype) for t in _step_table()) for dtype in DTYPES for d in DEVICES}


def _flow_log_prob(i: Inputs, _: Tensor) -> Tensor:
    """As Flow-GRPO's sde_step_with_logprob has it: the density's mean over elements, given the step's mean and std."""
    look = FLOW_SDE._plan.launches
    c_x, c_p, std = look.affine_rows()[FLOW_LOOK]
    x, x_s = i["x"], i["x_s"]
    mean = c_x * x + c_p * i["pred"]
    each = -((x_s - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return _per_sample(each)


FLOW_SDE, FLOW_LOOK = df.samplers.FlowSDE(df.Schedule.flow(10), steps=10), 4


def _v_target(i: Inputs, eps: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(i, i["x0"])
    return alpha * eps - sigma * i["x0"]


def _dream(i: Inputs, eps: Tensor) -> tuple[Tensor, Tensor]:
    """With what x0 and eps have in eps_hat collected: an infinity that cancels is a NaN."""
    (alpha, sigma), x0, of_pred = alpha_sigma(i, i["x0"]), i["x0"], i["pred"].detach()
    of_eps = 1 + sigma - sigma**3
    x_t = alpha * (1 - sigma**3) * x0 + sigma * of_eps * eps - alpha * sigma**2 * of_pred
    return x_t, alpha * of_eps * eps - sigma * (1 + sigma * alpha**2) * x0 - sigma * alpha**2 * of_pred


def _preconditioned(i: Inputs, eps: Tensor) -> Tensor:
    return i["x"] + 0.05 * i["P"] * i["score"] + (0.1 * i["P"]).sqrt() * eps


def _positive(inputs: Inputs, g: torch.Generator) -> None:
    inputs["P"] = inputs["P"].exp()


def _baoab(i: Inputs, eps: Tensor) -> tuple[Tensor, Tensor]:
    c = math.exp(-0.05)
    w = i["v"] + 0.05 * i["score"]
    v = c * w + math.sqrt(1 - c * c) * eps
    return i["x"] + 0.025 * w + 0.025 * v, v


def _after_the_first(inputs: Inputs, g: torch.Generator) -> None:
    inputs["t"].clamp_(min=1)


def _divergence(i: Inputs, eps: Tensor) -> Tensor:
    """Bits an element, as Nichol and Dhariwal's code has them but for the data's likelihood."""
    x0, t = i["x0"], i["t"].cpu()
    alpha, sigma = alpha_sigma(i, x0)
    before = torch.cat((torch.ones(1), SCHEDULE.alpha_bar[:-1]))
    posterior = SCHEDULE.betas * (1 - before) / (1 - SCHEDULE.alpha_bar)
    small, large = (
        column(v.log()[t].to(x0.device), x0) for v in (torch.cat((posterior[1:2], posterior[1:])), SCHEDULE.betas)
    )
    c = column((SCHEDULE.betas * before.sqrt() / (1 - SCHEDULE.alpha_bar))[t].to(x0.device), x0)
    away = c * sigma / alpha * (eps - i["pred"])
    log_variance = (small + large) / 2 + (large - small) / 2 * i["v"]
    ratio = small - log_variance
    return (0.5 * (ratio.exp() - 1 - ratio + away**2 * (-log_variance).exp())).mean() / math.log(2)


def _convert(function: Callable[..., Tensor], **options: Any) -> Callable[[Inputs], Tensor]:
    return lambda i: function(i["x_t"], i["pred"], i["level"], **options)


def _step(i: Inputs) -> Tensor:
    return df.langevin_step(i["x"], i["score"], i["step_size"], i["noise"])


CASES = [
    Case("add_noise-fresh", lambda i: df.add_noise(i["x0"], i["noise"], i["level"]), noised, ("x0",), ("x0",)),
    Case(
        "add_noise-tensor",
        lambda i: df.add_noise(i["x0"], i["noise"], i["level"]),
        noised,
        ("x0", "noise"),
        ("x0", "noise"),
        fresh=False,
        streams=3,
    ),
    Case(
        "add_noise-target",
        lambda i: df.add_noise(i["x0"], i["noise"], i["level"], target="v"),
        _noised_and_v,
        ("x0",),
        ("x0",),
        streams=3,
    ),
    Case(
        "add_noise-perturbed",
        lambda i: df.add_noise(i["x0"], i["noise"], i["level"], perturbation=PERTURBATION),
        noised,
        ("x0",),
        ("x0",),
        law=PERTURBED,
    ),
    Case(
        "noise_mse-fresh",
        lambda i: df.noise_mse(i["pred"], i["noise"]),
        lambda i, eps: torch.nn.functional.mse_loss(i["pred"], eps),
        ("pred",),
        ("pred",),
        loss=True,
        streams=2,
    ),
    Case(
        "noise_mse-tensor",
        lambda i: df.noise_mse(i["pred"], i["noise"]),
        lambda i, eps: torch.nn.functional.mse_loss(i["pred"], eps),
        ("pred", "noise"),
        ("pred",),
        fresh=False,
        loss=True,
        streams=3,
    ),
    Case(
        "noise_mse-weight",
        lambda i: df.noise_mse(i["pred"], i["noise"], weight=i["weight"]),
        _weighted_mse,
        ("pred",),
        ("pred", "weight"),
        loss=True,
        extra=_weight,
    ),
    Case(
        "noise_mse-mask",
        lambda i: df.noise_mse(i["pred"], i["noise"], mask=i["mask"]),
        _masked_mse,
        ("pred",),
        ("pred",),
        loss=True,
        extra=_mask,
    ),
    Case(
        "noise_mse-drawn",
        lambda i: df.noise_mse(i["pred"], i["noise"], mask=STRIKES),
        lambda i, eps: _masked_mse(i, eps, i["masked"]),
        ("pred",),
        ("pred",),
        loss=True,
        extra=_struck,
    ),
    Case(
        "noise_mse-none",
        lambda i: df.noise_mse(i["pred"], i["noise"], reduction="none"),
        lambda i, eps: _per_sample((i["pred"] - eps) ** 2),
        ("pred", "noise"),
        ("pred", "noise"),
        fresh=False,
        loss=True,
        streams=3,
    ),
    Case("to_x0-eps", _convert(df.to_x0), _x0, ("x_t", "pred"), ("x_t", "pred"), fresh=False, streams=3),
    Case(
        "to_x0-v", _convert(df.to_x0, predict="v"), _x0_from_v, ("x_t", "pred"), ("x_t", "pred"), fresh=False, streams=3
    ),
    Case(
        "to_x0-clamp",
        _convert(df.to_x0, clamp=1.0),
        lambda i, e: _x0(i, e).clamp(-1, 1),
        ("x_t", "pred"),
        ("x_t", "pred"),
        fresh=False,
        streams=3,
    ),
    Case(
        "to_eps-x0",
        _convert(df.to_eps, predict="x0"),
        _eps_from_x0,
        ("x_t", "pred"),
        ("x_t", "pred"),
        fresh=False,
        streams=3,
    ),
    Case(
        "to_eps-clamp",
        _convert(df.to_eps, clamp=1.0),
        _eps_clipped,
        ("x_t", "pred"),
        ("x_t", "pred"),
        fresh=False,
        streams=3,
    ),
    Case("to_score-eps", _convert(df.to_score), _score, ("x_t", "pred"), ("pred",), fresh=False, streams=2),
    Case("to_v-eps", _convert(df.to_v), _v, ("x_t", "pred"), ("x_t", "pred"), fresh=False, streams=3),
    Case(
        "convert-F",
        lambda i: df.convert(i["x_t"], i["pred"], i["level"], predict="eps", to=df.EDM(0.5)),
        _edm_from_eps,
        ("x_t", "pred"),
        ("x_t", "pred"),
        fresh=False,
        streams=3,
    ),
    Case("langevin_step-fresh", _step, _stepped, ("x", "score"), ("x", "score"), streams=3, extra=_step_size),
    Case(
        "corrupt-mask",
        lambda i: df.corrupt(i["x"], df.Masking(0.25, i["noise"])),
        lambda i, u: torch.where(u < 0.25, 0.0, i["x"]),
        ("x",),
        ("x",),
        law=UNIFORM,
    ),
    Case(
        "corrupt-salt",
        lambda i: df.corrupt(i["x"], df.SaltAndPepper(0.5, i["noise"], low=-1.0)),
        lambda i, u: torch.where(u < 0.25, -1.0, torch.where(u < 0.5, 1.0, i["x"])),
        ("x",),
        ("x",),
        law=UNIFORM,
    ),
    Case(
        "langevin_step-tensor",
        _step,
        _stepped,
        ("x", "score", "noise"),
        ("x", "score", "noise"),
        fresh=False,
        streams=4,
        extra=_step_size,
    ),
    Case(
        "langevin_step-per-sample",
        _step,
        _stepped,
        ("x", "score"),
        ("x", "score", "step_size"),
        streams=3,
        extra=_step_sizes,
    ),
    Case(
        "reparameterise",
        lambda i: df.reparameterise(i["mu"], i["log_var"], i["noise"]),
        _sample_and_divergence,
        ("mu", "log_var"),
        ("mu", "log_var"),
        sums=(1,),
        streams=3,
    ),
    Case("l1_penalty", lambda i: df.l1_penalty(i["pred"]), _l1, ("pred",), ("pred",), fresh=False, loss=True),
    Case("denoising_loss-v", _loss(predict="v"), _v_loss, ("pred", "x0"), ("pred", "x0"), loss=True, streams=3),
    Case(
        "denoising_loss-F",
        _loss(predict=df.EDM(0.5)),
        _edm_loss,
        ("pred", "x0", "noise"),
        ("pred", "x0", "noise"),
        fresh=False,
        loss=True,
        streams=4,
    ),
    Case(
        "denoising_loss-huber",
        _loss(predict="flow", kind="huber", delta=0.5),
        _flow_huber,
        ("pred", "x0"),
        ("pred",),
        loss=True,
        streams=3,
    ),
    Case(
        "denoising_loss-pseudo_huber",
        _loss(kind="pseudo_huber", delta=_scheduled_delta),
        _pseudo_huber,
        ("pred", "x0"),
        ("pred",),
        loss=True,
    ),
    Case(
        "denoising_loss-min_snr",
        _loss(predict="v", weight="min_snr"),
        _min_snr,
        ("pred", "x0"),
        ("pred",),
        loss=True,
        streams=3,
    ),
    Case(
        "underdamped_step",
        lambda i: df.underdamped_step(i["x"], i["v"], i["score"], 0.05, i["noise"]),
        _baoab,
        ("x", "v", "score"),
        ("x", "v", "score"),
        streams=5,
    ),
    Case(
        "sgld_step",
        lambda i: df.sgld_step(i["x"], i["score"], 0.05, i["noise"], preconditioner=i["P"]),
        _preconditioned,
        ("x", "score", "P"),
        ("x", "score", "P"),
        widens=True,
        launches="normal",
        streams=4,
        extra=_positive,
    ),
    Case("target-v", lambda i: df.target(i["x0"], i["noise"], i["level"], "v"), _v_target, ("x0",), ("x0",)),
    Case(
        "dream-v",
        lambda i: df.dream(i["x0"], i["noise"], i["pred"], i["level"], predict="v"),
        _dream,
        ("x0", "pred"),
        ("x0",),
        streams=4,
    ),
    Case(
        "noise_mse-weights",
        lambda i: df.noise_mse(i["pred"], i["noise"], mask=i["mask"]),
        _weighed_mse,
        ("pred",),
        ("pred",),
        loss=True,
        widens=True,
        streams=3,
        extra=_element_weights,
    ),
    Case(
        "weighted_sum-where",
        lambda i: df.weighted_sum((0.8, i["x0"]), (0.6, i["noise"]), where=i["region"], otherwise=i["x"]),
        _inpainted,
        ("x0", "x"),
        ("x0", "x", "region"),
        streams=4,
        extra=_region,
    ),
    Case(
        "step-ddim",
        lambda i: df.step(i["x"], i["pred"], i["level"], df.Level(*NEXT), i["noise"], eta=1.0),
        _stepped_to,
        ("x", "pred"),
        ("x", "pred"),
        launches="weighted_sum",
        streams=3,
    ),
    Case(
        "log_prob-none",
        lambda i: FLOW_SDE.log_prob(FLOW_LOOK, i["x"], i["x_s"], i["pred"]),
        _flow_log_prob,
        ("pred", "x", "x_s"),
        ("pred",),
        fresh=False,
        loss=True,
        launches="residual_loss",
        streams=4,
    ),
    Case(
        "variational_bound",
        lambda i: df.variational_bound(i["pred"], i["v"], i["x0"], i["noise"], i["level"]),
        _divergence,
        ("pred", "v", "x0"),
        ("pred", "v"),
        loss=True,
        widens=True,
        streams=5,
        extra=_after_the_first,
    ),
    Case(
        "denoising_loss-masked",
        lambda i: df.denoising_loss(i["pred"], i["x0"], None, None, predict="x0", mask=STRIKES),
        _x0_where_struck,
        ("pred", "x0"),
        ("pred", "x0"),
        fresh=False,
        loss=True,
        streams=3,
        extra=_struck,
    ),
]
