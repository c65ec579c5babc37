"""Every primitive in plain torch: the judge of all other backends, and the one that runs anywhere.

Computes in fp32 for fp16/bf16/fp32 and in fp64 for fp64, like the kernels. Being plain torch, it has
every gradient, transform and device that torch has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._torch import dispatch_modes, in_functorch, jit_tracing
from .spec import (
    ABSENT,
    NOISE,
    Bounds,
    Coefficients,
    Found,
    Inputs,
    Kind,
    Loss,
    Map,
    Reduction,
    Residual,
    Wanted,
    Z,
    compute_dtype,
    on_device,
)

if TYPE_CHECKING:
    from ..noise import Noise

_MASK = 0xFFFF_FFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32_10(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Salmon et al. 2011. Words are int64 tensors in [0, 2**32); products wrap, which keeps their bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _low_high(bits: Tensor) -> tuple[Tensor, Tensor]:
    return bits & _MASK, (bits >> 32) & _MASK


def block_at(seed: Tensor, offset: Tensor, n: Tensor) -> Words:
    """Block n of the word stream of key (seed, offset), all int64 bits; they broadcast."""
    low, high = _low_high(offset + n)
    zero = torch.zeros_like(low)
    return philox4x32_10((low, high, zero, zero), _low_high(seed))


def fold_in_tensor(noise: Noise, data: Tensor | int) -> Tensor:
    """The key (2,) of noise.fold_in(data), data int64 bits ()."""
    if not isinstance(data, Tensor):
        data = torch.full((), data, dtype=torch.int64, device=noise._as_tensor().device)
    seed, offset = noise._as_tensor().to(data.device)
    r0, r1, r2, r3 = block_at(seed, offset, data)
    return torch.stack((r0 | r1 << 32, r2 | r3 << 32))


def fold_in(seed: int, offset: int, data: int) -> tuple[int, int]:
    """The same of a host key."""
    words = block_at(*(torch.tensor(v, dtype=torch.int64, device="cpu") for v in (seed, offset, data)))
    r0, r1, r2, r3 = (int(w) for w in words)
    return tuple(w - (w >> 63 << 64) for w in (r0 | r1 << 32, r2 | r3 << 32))  # type: ignore[return-value]


def words(noise: Noise, shape: tuple[int, int], device: torch.device, fold: bool = True, below: int = 2**32) -> Tensor:
    """(B, D) words w of the noise as floor(w * below / 2^32); with fold=False a row is the raw stream of the key."""
    B, D = shape
    key = noise._as_tensor().to(device)
    seed, offset = key[0].expand(B, 1), key[1].expand(B, 1)
    if fold:
        rows, first = noise._span or (1, 0)
        ids = noise._sample
        if ids is None:
            ids = torch.arange(B // rows, device=device) + noise._first_sample
        r0, r1, r2, r3 = block_at(key[0], key[1], ids)
        block = first // 4 + torch.arange(rows, device=device) * (D // 4)
        seed = (r0 | r1 << 32)[:, None].expand(-1, rows).reshape(B, 1)
        offset = ((r2 | r3 << 32)[:, None] + block).reshape(B, 1)
    n = torch.arange((D + 3) // 4, device=device)[None, :]
    made = torch.stack(block_at(seed, offset, n), -1).flatten(1)[:, :D]
    return made if below == 2**32 else (made * below) >> 32


def normal(noise: Noise, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, fold: bool = True) -> Tensor:
    """(B, D): Box-Muller in fp64, rounded once to fp32, which is the master value of every dtype."""
    B, D = shape
    pairs = (D + 3) // 4 * 2
    if noise._span is not None and noise._span[0] > 1:
        assert D % 4 == 0, "rows begin with a block"
    w = words(noise, (B, 2 * pairs), device, fold).double().reshape(B, pairs, 2)
    u = w * 2.0**-32 + 2.0**-33
    # ln u from the complement of the word where u is near 1, as the kernels do.
    log_u = torch.where(u > 0.5, torch.log1p(-((2.0**32 - 1 - w) * 2.0**-32 + 2.0**-33)), torch.log(u))[..., 0]
    s, angle = torch.sqrt(-2 * log_u), 2 * math.pi * u[..., 1]
    return torch.stack((s * torch.cos(angle), s * torch.sin(angle)), -1).flatten(1)[:, :D].float().to(dtype)


def available() -> str:
    """What keeps this backend from running here: nothing ever does."""
    return ""


def supports(device: torch.device) -> bool:
    """Plain torch runs everywhere."""
    return True


def noise_like(noise: Noise, x: Tensor) -> Tensor:
    """The noise of x's shape and device, in x's compute dtype."""
    B = x.shape[0]
    values = normal(noise, (B, x[0].numel() if B else 0), compute_dtype(x.dtype), x.device)
    return values.reshape(x.shape)


def coefficients(table: Tensor, index: Tensor | None, op: str, x: Tensor) -> Tensor:
    """(B or 1, K) rows of the table on x's device. A level outside it raises on the CPU and is NaN elsewhere."""
    if index is None:
        return on_device(table, x.device)
    unreadable = torch.compiler.is_compiling() or in_functorch() or dispatch_modes() or jit_tracing() is not None
    readable = not unreadable and type(index) is Tensor and index.device.type == "cpu"
    if readable:
        try:
            return table.index_select(0, index)  # which looks at each index by itself
        except IndexError:
            pass
    inside = (index >= 0) & (index < table.shape[0])
    if readable:
        raise_bad_level(op, table, index, int((~inside).nonzero()[0, 0]))
    rows = table[index.long().clamp(0, table.shape[0] - 1)]
    return torch.where(inside[:, None], rows, torch.nan)


def raise_bad_level(op: str, table: Tensor, index: Tensor, row: int) -> None:
    raise ValueError(
        f"{op}: level must be in [0, {table.shape[0]}), got {int(index[row])} for sample {row} of the batch"
    )


def affine(
    spec: Map,
    inputs: Inputs,
    noise: Noise | Tensor | None,
    rows: Coefficients,
    bounds: Bounds | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """c0*x + c1*y + c2*z + c3*w for each output (ABSENT: that coefficient is 0); z may be `noise`.

    Of a map of five streams + c4 times `noise`, which then may be a tensor.
    bounds: y becomes clamp(a0*x + a1*y + a3*w, low, high), the coefficients in the columns `inner`.
    """
    x = inputs[0]
    assert x is not None
    dtype = compute_dtype(x.dtype)
    table = coefficients(*rows.dense(spec.op, dtype), spec.op, x).to(dtype)
    column = [row_of(table, k, x) for k in range(table.shape[1])]
    wide = [None if t is None else t.to(dtype) for t in (*inputs, None)]
    if noise is not None:
        eps = noise.to(dtype) if isinstance(noise, Tensor) else noise_like(noise, x)
        wide[NOISE if spec.fifth else Z] = eps
    if spec.inner is not None:
        assert bounds is not None
        of_estimate = zip(spec.inner, (wide[0], wide[1], wide[3]), strict=True)
        terms = [column[a] * t for a, t in of_estimate if a >= 0 and t is not None]
        wide[1] = torch.clamp(sum(terms[1:], terms[0]), *bounds)
    outputs = []
    for k in range(spec.outputs):
        used = zip(spec.columns_of(k), wide, strict=True)
        terms = [column[c] * t for c, t in used if c >= 0 and t is not None]
        if spec.blends:
            terms = [_blend(wide[1], sum(terms[1:], terms[0]), wide[3])]
        outputs.append(sum(terms[1:], terms[0]).expand(x.shape).to(x.dtype))
    return tuple(outputs) if out is None else (out.copy_(outputs[0]),)


def _blend(m: Any, v: Any, w: Any) -> Any:
    """w + m*(v - w), differentiable where m is 0 or 1 too; what is not finite stays out where the other is taken."""
    v, w = torch.where((m == 0) & ~v.isfinite(), w, v), torch.where((m == 1) & ~w.isfinite(), v, w)
    return torch.where(m == 1, v + (m - 1) * (v - w), w + m * (v - w))


def residual(spec: Loss, operands: Residual, rows: Coefficients, wanted: Wanted) -> Found:
    """The means of rho(pred + n1*y + n2*z) over each sample's kept elements, the loss, the gradient of pred."""
    pred = operands.pred
    with torch.set_grad_enabled(wanted.grad or torch.is_grad_enabled()):
        leaf = pred.detach().requires_grad_() if wanted.grad else pred
        sums, kept = residual_sums(spec, operands._replace(pred=leaf), rows)
        means = sums / kept.clamp(min=1)
        if not (wanted.loss or wanted.grad or wanted.also is not None):
            return Found(means, None, None)
        table = coefficients(*rows.dense(spec.op, means.dtype), spec.op, pred).to(means.dtype)
        factor, *others = (None if c == ABSENT else table[:, c] for c in spec.columns[3:])
        each = sums if spec.reduction == Reduction.sum else means
        each = each if wanted.weight is None else each * wanted.weight.to(each.dtype)
        each = each if factor is None else each * factor
        loss = each.mean() if spec.reduction == Reduction.mean else each.sum()
        grad = None
        if wanted.grad:
            upstream = None if wanted.upstream is None else wanted.upstream.to(loss.dtype)
            (grad,) = torch.autograd.grad(loss, leaf, upstream)
            if wanted.made is not None:
                grad = wanted.made.copy_(grad)
    if wanted.also is not None:
        for k, other in enumerate(others):
            assert other is not None
            wanted.also[k] = (means.detach() * other).mean()
    if wanted.upstream is not None:
        return Found(None, None, grad)
    return Found(means.detach() if wanted.grad else means, loss.detach() if wanted.grad else loss, grad)


def residual_sums(spec: Loss, operands: Residual, rows: Coefficients) -> tuple[Tensor, Tensor]:
    """(B,) sums of rho(r) over each sample's kept elements, and how many those are."""
    pred, y, z, noise, mask = operands
    dtype = compute_dtype(pred.dtype)
    table = coefficients(*rows.dense(spec.op, dtype), spec.op, pred).to(dtype)
    r = pred.to(dtype)
    third = noise_like(noise, pred) if noise is not None else z
    for column, t in zip(spec.columns[:2], (y, third), strict=True):
        if column >= 0 and t is not None:
            r = r + row_of(table, column, pred) * t.to(dtype)
    B = pred.shape[0]
    if mask is None:
        kept = torch.full((B,), pred[0].numel() if B else 0, dtype=dtype, device=pred.device)
    else:
        mask = mask if isinstance(mask, Tensor) else mask.on(pred)
        r = torch.where(mask, r, 0)
        kept = per_sample_sum(mask).to(dtype)
    delta = row_of(table, spec.columns[2], r) if spec.columns[2] >= 0 else None
    return per_sample_sum(penalty(r, spec.kind, delta)), kept


def row_dots(g: Tensor, inputs: Inputs, noise: Noise | None) -> Tensor:
    """(B, 3) sums over each row of g*x, g*y, g*z; z may be `noise`."""
    wide = g.to(compute_dtype(g.dtype))
    x, y, z, _ = inputs
    third = noise_like(noise, g) if noise is not None else z
    sums = [torch.zeros_like(wide) if t is None else wide * t for t in (x, y, third)]
    return torch.stack([per_sample_sum(s).double() for s in sums], -1)


STRAIGHT = 1e18  # beyond it the pseudo-Huber penalty is straight: a square would overflow


def row_of(rows: Tensor, column: int, like: Tensor) -> Tensor:
    """A column of coefficients, shaped to multiply `like`."""
    return rows[:, column].reshape(-1, *[1] * (like.dim() - 1))


def penalty(r: Tensor, kind: Kind, delta: Tensor | None) -> Tensor:
    """rho(r), in a form that does not cancel."""
    if kind == Kind.mse:
        return r.square()
    if kind == Kind.l1:
        return r.abs()
    assert delta is not None
    size = r.abs()
    if kind == Kind.huber:
        return torch.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))
    assert kind == Kind.pseudo_huber, f"no penalty {kind}"
    far = size > STRAIGHT
    bent = torch.where(far, 0.0, r)  # not clamped: its slope of 1 would be added and taken off again, digits with it
    return 2 * delta * torch.where(far, size, bent * bent / (torch.sqrt(bent * bent + delta * delta) + delta))


def slope(r: Tensor, kind: Kind, delta: Tensor | None) -> Tensor:
    """d rho / dr."""
    if kind == Kind.mse:
        return 2 * r
    if kind == Kind.l1:
        return torch.sign(r)
    assert delta is not None
    if kind == Kind.huber:
        return torch.minimum(torch.maximum(r, -delta), delta)
    assert kind == Kind.pseudo_huber, f"no slope of {kind}"
    bent = r.clamp(-STRAIGHT, STRAIGHT)
    return 2 * delta * (bent / torch.sqrt(bent * bent + delta * delta))


def turns(x: Tensor, W: Tensor) -> Tensor:
    """(B, F) x W without whole turns. Not a product of matrices, which torch may run in tf32 or bf16."""
    u = (x[:, :, None] * W).sum(1)
    return u - u.detach().round()


def waves(x: Tensor, W: Tensor, D: int, flip: bool) -> Tensor:
    """(B, D) fp32: sines, then cosines of 2 pi x W, then a 0 where D is odd. x (B, K), W (K, D // 2): fp64."""
    angle = turns(x, W) * (2 * math.pi)
    parts = [angle.sin().float(), angle.cos().float()]
    if flip:
        parts.reverse()
    if D % 2:
        parts.append(parts[0].new_zeros(angle.shape[0], 1))
    return torch.cat(parts, 1)


def waves_gradient(g: Tensor, x: Tensor, W: Tensor, flip: bool) -> Tensor:
    """Of x, from the gradient of its waves."""
    angle = turns(x, W) * (2 * math.pi)
    of_sine, of_cosine = g.double().split((W.shape[1], g.shape[1] - W.shape[1]), 1)
    of_cosine = of_cosine[:, : W.shape[1]]
    if flip:
        of_sine, of_cosine = of_cosine, of_sine
    of_angle = of_sine * angle.cos() - of_cosine * angle.sin()
    return (2 * math.pi) * (of_angle[:, None] * W).sum(2)


def embedding(x: Tensor, W: Tensor, flip: bool, out: Tensor) -> None:
    """Waves of x, (B, K) or (B,), into out, (B, D) of any floating dtype and strides, which gets the fp32 values."""
    out.copy_(waves(x if x.dim() == 2 else x[:, None], W, out.shape[1], flip))


def corrupt(x: Tensor, noise: Noise, thresholds: Tensor, values: Bounds) -> Tensor:
    """x with `low` where its word is below thresholds[b, 0], `high` where it is below thresholds[b, 1]."""
    B, (low, high) = x.shape[0], values
    w = words(noise, (B, x[0].numel() if B else 0), x.device).reshape(x.shape)
    thresholds = on_device(thresholds, x.device)
    first, second = row_of(thresholds, 0, x), row_of(thresholds, 1, x)
    return torch.where(w < first, low, torch.where(w < second, high, x)).to(x.dtype)


def gaussian(mu: Tensor, log_var: Tensor, eps: Tensor | None, noise: Noise | None) -> tuple[Tensor, Tensor]:
    """mu + exp(log_var/2)*eps, eps perhaps `noise`, and (B,) divergences of N(mu, exp(log_var)) from N(0, 1)."""
    compute = compute_dtype(mu.dtype)
    wide, log_variance = mu.to(compute), log_var.to(compute)
    if noise is not None:
        eps = noise_like(noise, mu)
    scale = finite_slope(torch.exp, 0.5 * log_variance)
    z = wide if eps is None else wide + scale * eps.to(compute)
    kl = 0.5 * (wide.square() + exponential_rest(log_variance))
    return z.to(mu.dtype), per_sample_sum(kl)


def finite_slope(exponential: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """exp or expm1, whose gradient is 0 where nothing comes back: where it overflows torch has 0 * inf, NaN.

    There it is the square of e^(x/2), so that no factor is infinite alone. Not an autograd.Function, which forward
    mode cannot take inside torch's dispatcher.
    """
    limit = 0.999 * math.log(torch.finfo(x.dtype).max)
    far = x > limit
    half = torch.exp(torch.where(far, x - (x - 1.9 * limit).clamp(min=0, max=1e30).detach(), 0.0) / 2)
    return torch.where(far, half * half, exponential(torch.where(far, 0.0, x)))


def times(g: Tensor, slope: Tensor) -> Tensor:
    """A gradient through a slope that may not be finite: 0 stays 0."""
    return torch.where((g == 0) & ~slope.isfinite(), 0, g * slope)


def exponential_rest(x: Tensor) -> Tensor:
    """e^x - 1 - x, by its series on |x| < 2, where the difference would cancel."""
    inside = x.clamp(-2, 2)
    series = torch.zeros_like(x)
    for k in range(23, 1, -1):
        series = series * inside + 1 / math.factorial(k)
    return torch.where(x.abs() < 2, inside * inside * series, finite_slope(torch.expm1, x) - x)


def gaussian_grad(
    mu: Tensor,
    log_var: Tensor,
    eps: Tensor | None,
    noise: Noise | None,
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of mu and log_var from those of z and of the divergences; None is 0, and so is what 0 gives."""
    compute = compute_dtype(mu.dtype)
    mean, log_variance = mu.to(compute), log_var.to(compute)
    of_mu, of_log_var = torch.zeros_like(mean), torch.zeros_like(mean)
    if z_grad is not None:
        e = noise_like(noise, mu) if noise is not None else eps
        assert e is not None
        of_mu = z_grad.to(compute)
        of_log_var = 0.5 * times(of_mu, torch.exp(0.5 * log_variance)) * e.to(compute)
    if kl_grad is not None:
        each = kl_grad.reshape(-1, *[1] * (mu.dim() - 1))
        of_mu = of_mu + times(each, mean)
        of_log_var = of_log_var + times(0.5 * each, torch.expm1(log_variance))
    return of_mu.to(mu.dtype), of_log_var.to(mu.dtype)


def per_sample_sum(x: Tensor) -> Tensor:
    """(B,) over everything but the batch dimension."""
    return x.sum(tuple(range(1, x.dim()))) if x.dim() > 1 else x
