"""The variational autoencoder's sample and divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import checks
from .._torch import DirectFunction, batchable
from ..checks import like, promote, samples
from ..kernels import reference
from ..kernels.dispatch import kernels
from ..kernels.spec import compute_dtype
from ..noise import FlatNoise, Noise, noise_for
from ..routing import Route, on_mesh, route, wants_grad

__all__ = ["reparameterise"]


@overload
def reparameterise(
    mu: Tensor,
    log_var: Tensor,
    noise: Noise | Tensor,
    *,
    clamp_log_var: tuple[float, float] | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    kl: Literal[True] = True,
) -> tuple[Tensor, Tensor]: ...
@overload
def reparameterise(
    mu: Tensor,
    log_var: Tensor,
    noise: Noise | Tensor,
    *,
    clamp_log_var: tuple[float, float] | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    kl: Literal[False],
) -> Tensor: ...
def reparameterise(
    mu: Tensor,
    log_var: Tensor,
    noise: Noise | Tensor,
    *,
    clamp_log_var: tuple[float, float] | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    kl: bool = True,
) -> tuple[Tensor, Tensor] | Tensor:
    """(z, kl): z = mu + exp(log_var / 2) * eps, and kl_b = KL(N(mu_b, exp(log_var_b)) || N(0, 1)).

    mu, log_var: (B, ...) fp16/bf16/fp32/fp64      noise: Noise, or a tensor like mu
    clamp_log_var: (low, high), the limits of log_var, in both results; (-30, 20) in Rombach et al. 2022: a pass more
    scale, shift: z becomes (z - shift) * scale, latents as a diffusion model takes them: a pass more
    kl: False returns z alone
    returns: z like mu; kl (B,) in nats, summed over each sample, fp32 (fp64 for fp64)
    Reads mu and log_var once, writes z once; with a Noise, eps is never stored: backward makes it again.
    Gradient: of mu and log_var in one pass, 0 beyond the limits, and of a tensor noise. Raises ValueError on a shape
    mismatch. Kingma and Welling 2014, section 2.4 and appendix B.
    """
    op = "reparameterise"
    samples(op, "mu", mu)
    like(op, "log_var", log_var, "mu", mu)
    eps, generated = noise_for(op, noise, mu, "mu")
    scale, shift = checks.number(op, "scale", scale, "finite"), checks.number(op, "shift", shift, "finite")
    divergence = checks.flag(op, "kl", kl)
    mu, log_var, eps = promote(mu, log_var, eps)
    if clamp_log_var is not None:
        log_var = log_var.clamp(*_limits(op, clamp_log_var))
    drawn: Any = eps if generated is None else generated
    mesh = on_mesh(mu, log_var, eps)
    z, each = _sampled(mu, log_var, drawn) if mesh is None else mesh.gaussian(_sampled, op, mu, log_var, drawn)
    if scale != 1 or shift != 0:
        z = z * scale if shift == 0 else (z - shift) * scale
    return (z, each) if divergence else z


def _limits(op: str, given: Any) -> tuple[float, float]:
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"{op}: clamp_log_var must be a pair (low, high), got {given!r}")
    low, high = (checks.number(op, "clamp_log_var", value, "no NaN") for value in given)
    if not low <= high:
        raise ValueError(f"{op}: clamp_log_var must be (low, high) with low <= high, got {given}")
    return low, high


def _sampled(mu: Tensor, log_var: Tensor, noise: Noise | Tensor) -> tuple[Tensor, Tensor]:
    """z and kl of what is checked and no DTensor."""
    op = "reparameterise"
    eps, generated = (noise, None) if isinstance(noise, Tensor) else (None, noise)
    if generated is not None and not generated._whole_blocks(math.prod(mu.shape[1:])):
        dtype = compute_dtype(mu.dtype)
        eps = generated.normal(mu.shape, dtype=dtype, device=mu.device)
        z, kl = _sampled(mu.to(dtype), log_var.to(dtype), eps)
        return z.to(mu.dtype), kl
    way = route(op, mu, log_var, eps)
    if way is Route.REFERENCE:
        return reference.gaussian(mu, log_var, eps, generated)
    if way is Route.DISPATCHER:
        return torch.ops.dae_fast.gaussian(mu, log_var, eps, *_flat(generated), op)
    if wants_grad(mu, log_var, eps):
        return _Gaussian.apply(mu, log_var, eps, generated, op)
    return kernels(mu, op).gaussian(mu, log_var, eps, generated)


def _flat(noise: Noise | None) -> FlatNoise:
    return FlatNoise() if noise is None else noise._flat()


def gradients(
    op: str,
    needs: Sequence[bool],
    grads: tuple[Tensor | None, Tensor | None],
    mu: Tensor,
    log_var: Tensor,
    eps: Tensor | None,
    noise: Noise | None,
) -> list[Tensor | None]:
    """Of mu, log_var and eps, from those of z and kl; `needs` says which."""
    found: list[Tensor | None] = [None] * 3
    z_grad, kl_grad = grads
    if z_grad is None and kl_grad is None:
        return found
    way = route(op, mu, log_var, eps, z_grad, kl_grad)
    if needs[2] and z_grad is not None:
        compute = compute_dtype(mu.dtype)  # in half precision the scale alone may overflow
        found[2] = (z_grad.to(compute) * torch.exp(0.5 * log_var.to(compute))).to(log_var.dtype)
    if torch.is_grad_enabled() or way is Route.REFERENCE:
        found[:2] = _differentiable(z_grad, kl_grad, mu, log_var, eps, noise)
    elif way is Route.DISPATCHER:
        found[:2] = torch.ops.dae_fast.gaussian_grad(z_grad, kl_grad, mu, log_var, eps, *_flat(noise), op)
    else:
        found[:2] = kernels(mu, op).gaussian_grad(mu, log_var, eps, noise, z_grad, kl_grad)
    return found


def _differentiable(
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
    mu: Tensor,
    log_var: Tensor,
    eps: Tensor | None,
    noise: Noise | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of mu and log_var in plain torch, for double backward."""
    if noise is not None:
        eps = noise.normal(mu.shape, dtype=compute_dtype(mu.dtype), device=mu.device)
    return reference.gaussian_grad(mu, log_var, eps, None, z_grad, kl_grad)


class _Gaussian(DirectFunction):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, log_var: Tensor, eps: Tensor | None, noise: Noise | None, op: str) -> Any:
        ctx.set_materialize_grads(False)
        key = (None, None) if noise is None else (noise._key_tensor, noise._sample)
        ctx.save_for_backward(mu, log_var, eps, *key)
        ctx.rest = noise, op
        return kernels(mu, op).gaussian(mu, log_var, eps, noise)

    @staticmethod
    @batchable
    def backward(ctx: Any, z_grad: Tensor | None, kl_grad: Tensor | None) -> Any:
        (mu, log_var, eps, *_), (noise, op) = ctx.saved_tensors, ctx.rest
        return *gradients(op, ctx.needs_input_grad, (z_grad, kl_grad), mu, log_var, eps, noise), None, None
