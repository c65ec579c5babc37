"""Penalties of an autoencoder's code: sparse and contractive."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from .. import checks
from .._torch import DirectFunction, batchable, gradients_in_torch
from ..checks import as_number, can_read, function, integer
from ..coefficients import changing, stack_rows
from ..kernels.dispatch import kernels
from ..kernels.reference import per_sample_sum
from ..kernels.spec import ABSENT, REDUCTIONS, Kind, ReductionName, Residual, compute_dtype, loss_of
from ..noise import Noise
from ..primitives import loss_of_rows, reduction_of
from ..primitives.residuals import fast_residual_loss
from ..routing import Route, on_mesh, route, wants_grad

__all__ = ["contraction", "kl_sparsity", "l1_penalty", "sigmoid_contraction"]

_ALONE = (1.0, 0.0, 0.0)  # a residual's row: against nothing
_COLUMNS = (ABSENT,) * 6
_PLAIN = {name: loss_of("l1_penalty", Kind.l1, how, _COLUMNS) for name, how in REDUCTIONS.items()}
CONTRACTION_TAG = 0x6A61636F  # "jaco"; of the directions, so that they do not depend on a corruption of the same noise


def l1_penalty(h: Tensor, *, reduction: ReductionName = "mean") -> Tensor:
    """mean_b mean_j |h_bj|, and its gradient in one pass.

    h: (B, ...) fp16/bf16/fp32/fp64, a code
    reduction: "mean"; "sum" (of all elements); "none" (a sample's mean, one value per sample)
    returns: fp32 (fp64 for fp64) scalar, or (B,) for "none"
    Reads h once and writes its gradient in the same pass (fp16, and "none", in backward): sign(h) / (B N), 0 at 0.
    Raises ValueError for the mean of an empty batch. Tibshirani 1996; as a code's: Ranzato et al. 2008.
    """
    op, plain = "l1_penalty", _PLAIN.get(reduction) if isinstance(reduction, str) else None
    if plain is not None:
        done = fast_residual_loss(plain, Residual(h, None, None, None), _ALONE, None)
        if done is not None:
            return done[0]
    checks.samples(op, "h", h)
    fixed = loss_of(op, Kind.l1, reduction_of(op, h, reduction), _COLUMNS)
    rows = stack_rows(op, _ALONE, h, compute_dtype(h.dtype))
    return loss_of_rows(fixed, Residual(h, None, None, None), rows, None, 1)[0]


def kl_sparsity(h: Tensor, rate: float = 0.05) -> Tensor:
    """sum_j KL(rate || rho_j), rho_j = mean_b h_bj: every unit should be active at `rate` on average.

    h: (B, ...) fp16/bf16/fp32/fp64 in (0, 1), a code of sigmoids      rate: in (0, 1)
    KL(a || b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b)), of two Bernoulli variables
    returns: fp32 (fp64 for fp64) scalar, the sum over the units
    Finite for a unit that is at 0 or at 1 for the whole batch: its rho is taken as the next number inside, without
    gradient. Gradient: torch's. Raises ValueError for an empty batch, and for a rho outside [0, 1]: looked at on the
    CPU; elsewhere the result is NaN. Ng 2011, "Sparse autoencoder", CS294A lecture notes.
    """
    op = "kl_sparsity"
    checks.samples(op, "h", h)
    rate = as_number(op, "rate", rate)
    if not 0 < rate < 1:
        raise ValueError(f"{op}: rate must be in (0, 1), got {rate}")
    if not h.shape[0]:
        raise ValueError(f"{op}: the mean over an empty batch {tuple(h.shape)} is not defined")
    if h.device.type == "cpu" and route(op, h) is Route.DIRECT and hasattr(kernels(h, op), op):
        return _Sparsity.apply(h, rate) if wants_grad(h) else _sparsity(op, h, rate, False)[0]
    return _sparsity_in_torch(op, h, rate)


def _sparsity(op: str, h: Tensor, rate: float, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    loss, slope, outside = kernels(h, op).kl_sparsity(h, rate, with_slope)
    if outside:
        raise ValueError(f"{op}: h must lie in (0, 1), got a unit whose mean is {outside}")
    return loss, slope


class _Sparsity(DirectFunction):
    """Eager, on the CPU. The gradient is one row for all samples."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, rate: float) -> Tensor:
        loss, slope = _sparsity("kl_sparsity", h, rate, True)
        ctx.save_for_backward(h, slope)
        ctx.rate = rate
        return loss

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        h, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # which is wanted again: torch's, with a graph of its own
            again = _sparsity_in_torch("kl_sparsity", h, ctx.rate)
            return torch.autograd.grad(again, h, upstream, create_graph=True)[0], None
        return (upstream * slope).to(h.dtype).expand(h.shape), None


def _sparsity_in_torch(op: str, h: Tensor, rate: float) -> Tensor:
    rho = _total(h, compute_dtype(h.dtype)) / h.shape[0]
    outside = (rho < 0) | (rho > 1)
    if can_read(rho) and outside.any():
        raise ValueError(f"{op}: h must lie in (0, 1), got a unit whose mean is {float(rho[outside][0].detach())}")
    info = torch.finfo(rho.dtype)
    rho = torch.where(outside, torch.nan, rho).clamp(info.tiny, 1 - info.eps / 2)
    at: Any = changing(rate, rho)
    log, log1p = (torch.log, torch.log1p) if isinstance(at, Tensor) else (math.log, math.log1p)
    active = at * (log(at) - rho.log())
    inactive = (1 - at) * (log1p(-at) - (-rho).log1p())
    each = active + inactive
    return _total(each.reshape(-1), rho.dtype) if can_read(each) else each.sum()


def _total(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Over the first dimension; eager on the CPU by halves: the number of threads changes the bits of torch's sum."""
    if not can_read(x):
        return x.sum(0, dtype=dtype)
    x = x.to(dtype)
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        rest, x = x[2 * half :], x[:half] + x[half : 2 * half]
        if rest.shape[0]:
            x = torch.cat((x[:1] + rest, x[1:]))
    return x.sum(0)


def sigmoid_contraction(h: Tensor, W: Tensor, *, reduction: ReductionName = "mean") -> Tensor:
    """mean_b ||J_b||_F^2 of a layer h = sigmoid(W x + c), exact: sum_j (h_j (1 - h_j))^2 * sum_i W_ji^2.

    h: (B, H) fp16/bf16/fp32/fp64, the layer's output      W: (H, D), its weight, as torch.nn.Linear's
    reduction: "mean" or "sum" over the batch, or "none": (B,)
    returns: fp32 (fp64 for fp64) scalar, or (B,)
    Neither the Jacobian nor x is needed: B H + H D operations. Gradient: of h and W; on the CPU a pass each, elsewhere
    torch's. Raises ValueError on a shape mismatch or the mean of an empty batch. Rifai et al. 2011, eq. 7.
    """
    op = "sigmoid_contraction"
    checks.samples(op, "h", h)
    checks.samples(op, "W", W)
    if h.dim() != 2 or W.dim() != 2 or W.shape[0] != h.shape[1]:
        raise ValueError(f"{op}: h must be (B, H) and W (H, D), got {tuple(h.shape)} and {tuple(W.shape)}")
    if h.device != W.device:
        raise ValueError(f"{op}: W must be on {h.device} like h, got {W.device}")
    reduction_of(op, h, reduction)
    compute = torch.promote_types(compute_dtype(h.dtype), compute_dtype(W.dtype))
    in_kernel = h.device.type == "cpu" and compute == compute_dtype(h.dtype) and h.numel() and W.numel()
    if in_kernel and route(op, h, W) is Route.DIRECT and hasattr(kernels(h, op), "contraction"):
        found: Tensor = _Contraction.apply(h, W, reduction) if wants_grad(h, W) else _contracted(h, W, reduction)[0]
        return found
    return _contracted_in_torch(h, W, reduction)


def _contracted_in_torch(h: Tensor, W: Tensor, reduction: ReductionName) -> Tensor:
    compute = torch.promote_types(compute_dtype(h.dtype), compute_dtype(W.dtype))
    wide = h.to(compute)
    slope = wide * (1 - wide)
    # Not a product of matrices, which autocast would run in half precision.
    return _reduced((slope.square() * _squared_norms(W, compute)).sum(1), reduction)


def _squared_norms(W: Tensor, compute: torch.dtype) -> Tensor:
    return W.to(compute).square().sum(1)


def _contracted(h: Tensor, W: Tensor, reduction: ReductionName) -> tuple[Tensor, Tensor]:
    """The loss, and the squared norms of W's rows."""
    compute = compute_dtype(h.dtype)
    norms = _squared_norms(W, compute)
    return _reduced(kernels(h, "sigmoid_contraction").contraction(h, norms), reduction).to(compute), norms


class _Contraction(DirectFunction):
    """Eager, on the CPU."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, reduction: ReductionName) -> Tensor:
        loss, norms = _contracted(h, W, reduction)
        ctx.save_for_backward(h, W, norms)
        ctx.reduction = reduction
        return loss

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        h, W, norms = ctx.saved_tensors
        op, (of_h, of_W, _) = "sigmoid_contraction", ctx.needs_input_grad
        if torch.is_grad_enabled() or route(op, upstream, h, W) is not Route.DIRECT:
            again = partial(_contracted_in_torch, reduction=ctx.reduction)
            return *gradients_in_torch(again, (h, W), (of_h, of_W), upstream), None
        each = (upstream.double() / (len(h) if ctx.reduction == "mean" else 1)).expand(len(h))
        h_grad, norms_grad = kernels(h, op).contraction_grad(h, norms, each, (of_h, of_W))
        W_grad = None if norms_grad is None else (W * (2 * norms_grad).to(norms.dtype)[:, None]).to(W.dtype)
        return h_grad, W_grad, None


def contraction(
    f: Callable[[Tensor], Tensor], x: Tensor, noise: Noise, *, samples: int = 1, reduction: ReductionName = "mean"
) -> Tensor:
    """mean_b ||J_b||_F^2 of any encoder f, estimated without bias: E ||J_b^T v||^2, v ~ N(0, 1) (Hutchinson).

    f: maps (B, ...) to (B, ...), each sample on its own (no batch normalisation in training)
    x: (B, ...) fp16/bf16/fp32/fp64      noise: Noise; draw k of v is fold_in(CONTRACTION_TAG).fold_in(k), like f(x)
    samples: draws of v, at least 1, over which the estimate is averaged; a vector-Jacobian product each
    reduction: "mean" or "sum" over the batch, or "none": (B,)
    returns: fp32 (fp64 for fp64) scalar, or (B,)
    The variance of one draw is 2 ||J J^T||_F^2. Gradient: of x and of f's parameters, through torch.func.vjp.
    Raises ValueError on a shape mismatch or the mean of an empty batch. Rifai et al. 2011; Hutchinson 1990.
    """
    op = "contraction"
    checks.samples(op, "x", x)
    function(op, "f", f)
    if not isinstance(noise, Noise):
        raise TypeError(f"{op}: noise must be a Noise, got {type(noise).__name__}")
    if on_mesh(x) is not None:
        raise NotImplementedError(f"{op}: x must be no DTensor: f's vector-Jacobian product is torch.func's")
    samples = integer(op, "samples", samples)
    if samples < 1:
        raise ValueError(f"{op}: samples must be at least 1, got {samples}")
    reduction_of(op, x, reduction)
    noise._check(op, x.shape[0], x.device)

    def encoder(x: Tensor) -> Tensor:
        y = f(x)
        if not isinstance(y, Tensor):
            raise ValueError(f"{op}: f must return a tensor ({x.shape[0]}, ...), got {type(y).__name__}")
        return y

    pair: Any = vjp(encoder, x)
    y, pull = pair
    if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"{op}: f must return a tensor ({x.shape[0]}, ...), got {got}")
    stream, compute = noise.fold_in(CONTRACTION_TAG), compute_dtype(x.dtype)

    def draw(k: int) -> Tensor:
        v = stream.fold_in(k).normal(y.shape, dtype=y.dtype, device=y.device)
        return per_sample_sum(pull(v)[0].to(compute).square())

    total = draw(0)
    for k in range(1, samples):
        total = total + draw(k)
    return _reduced(total if samples == 1 else total / samples, reduction)


def _reduced(each: Tensor, reduction: ReductionName) -> Tensor:
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum()
