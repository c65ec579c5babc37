"""A loss whose elements have weights of their own: sum_i m_i rho(r_i) / sum_i m_i.

The CPU's kernels take the weights in their one pass (residuals.py), unless these want a gradient. The GPU's select
elements and weigh whole samples, so this takes two launches, with r in memory between them, and torch's arithmetic for
rho.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import DirectFunction, batchable
from ..coefficients import gather
from ..kernels import reference
from ..kernels.dispatch import kernels
from ..kernels.reference import row_of
from ..kernels.spec import ABSENT, Coefficients, Kind, Loss, Residual, map_of
from ..routing import Route, route
from .sums import affine, row_dots, widened

COLUMNS = (0, 1, 2, ABSENT)  # of the table (1, n1, n2): r = 1*pred + n1*y + n2*z


def sample_means(spec: Loss, operands: Residual, rows: Coefficients) -> Tensor:
    """(B,) as residuals.sample_means, where the mask is floating: 0 for a sample whose weights add up to 0."""
    pred, y, z, noise, weights = operands
    r = affine(map_of(spec.op, COLUMNS), (widened(pred), widened(y), widened(z), None), noise, rows)[0]
    m = compact(weights.to(r.dtype))
    column = spec.columns[2]
    delta = None if column == ABSENT else row_of(gather(spec.op, rows, r).detach(), column, r)
    if route(spec.op, r, m, delta) is Route.DIRECT:
        sums = _Sums.apply(r, m, delta, spec.kind, spec.op)
    else:
        sums = reference.per_sample_sum(m * reference.penalty(r, spec.kind, delta))
    total = totals(weights).to(sums.dtype)
    counts = total != 0
    return torch.where(counts, sums / torch.where(counts, total, 1), 0)


def compact(weights: Tensor) -> Tensor:
    """With one element along each dimension that is expanded; the batch's stays."""
    for d in range(1, weights.dim()):
        if weights.stride(d) == 0 and weights.shape[d] > 1:
            weights = weights.narrow(d, 0, 1)
    return weights


def totals(weights: Tensor) -> Tensor:
    """(B,) sums of each sample's weights."""
    small = compact(weights)
    times = weights.numel() // max(small.numel(), 1)
    one = torch.ones((), dtype=small.dtype, device=small.device).expand(small.shape)
    return times * row_dots("mask", small, (one, None, None, None), None)[:, 0]


class _Sums(DirectFunction):
    """(B,) sums of m * rho(r); eager. m: broadcastable to r."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, m: Tensor, delta: Tensor | None, kind: Kind, op: str) -> Tensor:
        ctx.save_for_backward(r, m, delta)
        ctx.kind = kind
        rho = reference.penalty(r, kind, delta)
        return kernels(r, op).row_dots(rho, (m.expand(r.shape), None, None, None), None)[:, 0].to(r.dtype)

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        r, m, delta = ctx.saved_tensors
        each = upstream.reshape(-1, *[1] * (r.dim() - 1))
        of_r = (each * m) * reference.slope(r, ctx.kind, delta) if ctx.needs_input_grad[0] else None
        of_m = None
        if ctx.needs_input_grad[1]:
            of_m = (each * reference.penalty(r, ctx.kind, delta)).sum_to_size(m.shape)
        return of_r, of_m, None, None, None
