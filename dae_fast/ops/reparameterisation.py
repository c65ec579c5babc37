"""The variational autoencoder's sample and divergence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import kernels, reference
from ..noise import Noise
from .checks import like, noise_for, promote, samples
from .routing import Route, batchable, route, wants_grad


def reparameterise(mu: Tensor, log_var: Tensor, noise: Noise | Tensor) -> tuple[Tensor, Tensor]:
    """(z, kl): z = mu + exp(log_var / 2) * eps, and kl_b = KL(N(mu_b, exp(log_var_b)) || N(0, 1)).

    mu, log_var: (B, ...) fp16/bf16/fp32/fp64      noise: Noise, or a tensor like mu
    returns: z like mu; kl (B,) in nats, summed over each sample, fp32 (fp64 for fp64)
    Reads mu and log_var once, writes z once; with a Noise, eps is never stored: backward makes it again.
    Gradient: of mu and log_var in one pass, and of a tensor noise. Raises ValueError on a shape mismatch.
    Kingma and Welling 2014, section 2.4 and appendix B.
    """
    op = "reparameterise"
    samples(op, "mu", mu)
    like(op, "log_var", log_var, "mu", mu)
    eps, generated = noise_for(op, noise, mu, "mu")
    mu, log_var, eps = promote(mu, log_var, eps)
    if route(op, mu, log_var, eps) is not Route.DIRECT:
        return _composed(mu, log_var, eps, generated)
    if wants_grad(mu, log_var, eps):
        return _Gaussian.apply(mu, log_var, eps, generated, op)
    return kernels(mu, op).gaussian(mu, log_var, eps, generated)


def _composed(mu: Tensor, log_var: Tensor, eps: Tensor | None, noise: Noise | None) -> tuple[Tensor, Tensor]:
    """In plain torch, which has every transform and derivative."""
    if noise is not None:
        eps, noise = noise.normal(mu.shape, dtype=reference.compute_dtype(mu.dtype), device=mu.device), None
    return reference.gaussian(mu, log_var, eps, noise)


class _Gaussian(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, log_var: Tensor, eps: Tensor | None, noise: Noise | None, op: str) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mu, log_var, eps)
        ctx.rest = noise, op
        return kernels(mu, op).gaussian(mu, log_var, eps, noise)

    @staticmethod
    @batchable
    def backward(ctx: Any, z_grad: Tensor | None, kl_grad: Tensor | None) -> Any:
        mu, log_var, eps = ctx.saved_tensors
        noise, op = ctx.rest
        if z_grad is None and kl_grad is None:
            return (None,) * 5
        if torch.is_grad_enabled() or route(op, mu, z_grad, kl_grad) is not Route.DIRECT:
            given = [t for t in (mu, log_var, eps) if t is not None and t.requires_grad]
            with torch.enable_grad():
                outputs = zip(_composed(mu, log_var, eps, noise), (z_grad, kl_grad), strict=True)
                made, upstream = zip(*[pair for pair in outputs if pair[1] is not None], strict=True)
                found = iter(torch.autograd.grad(made, given, upstream, create_graph=True, allow_unused=True))
            return *(next(found) if t is not None and t.requires_grad else None for t in (mu, log_var, eps)), None, None
        mu_grad, log_var_grad = kernels(mu, op).gaussian_grad(mu, log_var, eps, noise, z_grad, kl_grad)
        eps_grad = None
        if ctx.needs_input_grad[2] and z_grad is not None:
            eps_grad = z_grad * torch.exp(0.5 * log_var)
        return mu_grad, log_var_grad, eps_grad, None, None
