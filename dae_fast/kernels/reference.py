"""Every primitive in plain torch: the judge of all other backends, and the one that runs anywhere.

Computes in fp32 for fp16/bf16/fp32 and in fp64 for fp64, like the kernels. Being plain torch, it has
every gradient, transform and device that torch has.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._torch import in_functorch
from ..rows import on_device

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


def fold_in_tensor(noise: Noise, data: Tensor) -> Tensor:
    """The key (2,) of noise.fold_in(data), data int64 bits ()."""
    seed, offset = noise._as_tensor().to(data.device)
    r0, r1, r2, r3 = block_at(seed, offset, data)
    return torch.stack((r0 | r1 << 32, r2 | r3 << 32))


def fold_in(seed: int, offset: int, data: int) -> tuple[int, int]:
    """The same of a host key."""
    words = block_at(*(torch.tensor(v, dtype=torch.int64, device="cpu") for v in (seed, offset, data)))
    r0, r1, r2, r3 = (int(w) for w in words)
    return tuple(w - (w >> 63 << 64) for w in (r0 | r1 << 32, r2 | r3 << 32))  # type: ignore[return-value]


def words(noise: Noise, B: int, D: int, device: torch.device, fold: bool = True, below: int = 2**32) -> Tensor:
    """(B, D) words w of the noise as floor(w * below / 2^32); with fold=False a row is the raw stream of the key."""
    key = noise._as_tensor().to(device)
    seed, offset = key[0].expand(B, 1), key[1].expand(B, 1)
    if fold:
        ids = noise._sample
        if ids is None:
            ids = torch.arange(B, device=device) + noise._first_sample
        r0, r1, r2, r3 = block_at(key[0], key[1], ids)
        seed, offset = (r0 | r1 << 32)[:, None], (r2 | r3 << 32)[:, None]
    n = torch.arange((D + 3) // 4, device=device)[None, :]
    made = torch.stack(block_at(seed, offset, n), -1).flatten(1)[:, :D]
    return made if below == 2**32 else (made * below) >> 32


def normal(noise: Noise, B: int, D: int, dtype: torch.dtype, device: torch.device, fold: bool = True) -> Tensor:
    """(B, D): Box-Muller in fp64, rounded once to fp32, which is the master value of every dtype."""
    pairs = (D + 3) // 4 * 2
    w = words(noise, B, 2 * pairs, device, fold).double().reshape(B, pairs, 2)
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


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def noise_like(noise: Noise, x: Tensor) -> Tensor:
    """The noise of x's shape and device, in x's compute dtype."""
    B = x.shape[0]
    values = normal(noise, B, x[0].numel() if B else 0, compute_dtype(x.dtype), x.device)
    return values.reshape(x.shape)


def coefficients(table: Tensor, index: Tensor | None, op: str, x: Tensor) -> Tensor:
    """(B or 1, K) rows of the table on x's device. A level outside it raises on the CPU and is NaN elsewhere."""
    if index is None:
        return on_device(table, x.device)
    inside = (index >= 0) & (index < table.shape[0])
    unreadable = torch.compiler.is_compiling() or in_functorch()
    if not unreadable and type(index) is Tensor and index.device.type == "cpu" and not inside.all():
        raise_bad_level(op, table, index, int((~inside).nonzero()[0, 0]))
    rows = table[index.long().clamp(0, table.shape[0] - 1)]
    return torch.where(inside[:, None], rows, torch.nan)


def raise_bad_level(op: str, table: Tensor, index: Tensor, row: int) -> None:
    raise ValueError(
        f"{op}: level must be in [0, {table.shape[0]}), got {int(index[row])} for sample {row} of the batch"
    )


def affine(
    op: str,
    x: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    table: Tensor,
    index: Tensor | None,
    columns: tuple[int, ...],
    clamp: tuple[int, int, int, float, float] | None = None,
    w: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """c0*x + c1*y + c2*z + c3*w for each four of `columns` (-1: that coefficient is 0); z may be `noise`.

    clamp (a0, a1, a3, lo, hi): y becomes clamp(a0*x + a1*y + a3*w, lo, hi).
    """
    compute = compute_dtype(x.dtype)
    rows = coefficients(table, index, op, x).to(compute)
    column = [row_of(rows, k, x) for k in range(rows.shape[1])]
    inputs = [None if t is None else t.to(compute) for t in (x, y, z, w)]
    if noise is not None:
        inputs[2] = noise_like(noise, x)
    if clamp is not None:
        a0, a1, a3, lo, hi = clamp
        of_estimate = ((a0, inputs[0]), (a1, inputs[1]), (a3, inputs[3]))
        terms = [column[a] * t for a, t in of_estimate if a >= 0 and t is not None]
        inputs[1] = torch.clamp(sum(terms[1:], terms[0]), lo, hi)
    outputs = []
    for first in range(0, len(columns), 4):
        used = zip(columns[first : first + 4], inputs, strict=True)
        terms = [column[c] * t for c, t in used if c >= 0 and t is not None]
        outputs.append(sum(terms[1:], terms[0]).expand(x.shape).to(x.dtype))
    return tuple(outputs)


def residual(
    op: str,
    pred: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    noise: Noise | None,
    table: Tensor,
    index: Tensor | None,
    columns: tuple[int, ...],
    mask: Tensor | None,
    kind: int = 0,
) -> tuple[Tensor, Tensor]:
    """(B,) sums of rho(pred + n1*y + n2*z) over each sample's kept elements, and how many those are.

    columns: of n1, n2 and rho's delta. kind: rho's place in KINDS.
    """
    compute = compute_dtype(pred.dtype)
    rows = coefficients(table, index, op, pred).to(compute)
    r = pred.to(compute)
    third = noise_like(noise, pred) if noise is not None else z
    for column, t in zip(columns[:2], (y, third), strict=True):
        if column >= 0 and t is not None:
            r = r + row_of(rows, column, pred) * t.to(compute)
    B = pred.shape[0]
    if mask is None:
        kept = torch.full((B,), pred[0].numel() if B else 0, dtype=compute, device=pred.device)
    else:
        r = torch.where(mask, r, 0)
        kept = per_sample_sum(mask).to(compute)
    delta = row_of(rows, columns[2], r) if columns[2] >= 0 else None
    return per_sample_sum(penalty(r, kind, delta)), kept


def columns_of_residual(columns: tuple[int, ...]) -> tuple[int, ...]:
    """All six: of n1, n2, delta; then, absent (-1) where not given, those that a loss reads when it is summed."""
    return columns + (-1,) * (6 - len(columns))


# What a residual costs, rho(r): a kind's place here is its number in the kernels.
KINDS = ("mse", "l1", "huber", "pseudo_huber")
STRAIGHT = 1e18  # beyond it the pseudo-Huber penalty is straight: a square would overflow


def row_of(rows: Tensor, column: int, like: Tensor) -> Tensor:
    """A column of coefficients, shaped to multiply `like`."""
    return rows[:, column].reshape(-1, *[1] * (like.dim() - 1))


def penalty(r: Tensor, kind: int, delta: Tensor | None) -> Tensor:
    """rho(r): r^2, |r|, Huber's, or 2 delta (sqrt(r^2 + delta^2) - delta), in a form that does not cancel."""
    if kind == 0:
        return r.square()
    if kind == 1:
        return r.abs()
    assert delta is not None
    if kind == 2:
        size = r.abs()
        return torch.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))
    size = r.abs()
    bent = size.clamp(max=STRAIGHT)
    return 2 * delta * (bent * bent / (torch.sqrt(bent * bent + delta * delta) + delta) + (size - bent))


def slope(r: Tensor, kind: int, delta: Tensor | None) -> Tensor:
    """d rho / dr."""
    if kind == 0:
        return 2 * r
    if kind == 1:
        return torch.sign(r)
    assert delta is not None
    if kind == 2:
        return torch.minimum(torch.maximum(r, -delta), delta)
    bent = r.clamp(-STRAIGHT, STRAIGHT)
    return 2 * delta * (bent / torch.sqrt(bent * bent + delta * delta))


def corrupt(x: Tensor, noise: Noise, thresholds: Tensor, low: float, high: float) -> Tensor:
    """x with `low` where its word is below thresholds[b, 0], `high` where it is below thresholds[b, 1]."""
    B = x.shape[0]
    w = words(noise, B, x[0].numel() if B else 0, x.device).reshape(x.shape)
    thresholds = on_device(thresholds, x.device)
    first, second = row_of(thresholds, 0, x), row_of(thresholds, 1, x)
    return torch.where(w < first, low, torch.where(w < second, high, x)).to(x.dtype)


def gaussian(mu: Tensor, log_var: Tensor, eps: Tensor | None, noise: Noise | None) -> tuple[Tensor, Tensor]:
    """mu + exp(log_var/2)*eps, eps perhaps `noise`, and (B,) divergences of N(mu, exp(log_var)) from N(0, 1)."""
    compute = compute_dtype(mu.dtype)
    wide, log_variance = mu.to(compute), log_var.to(compute)
    if noise is not None:
        eps = noise_like(noise, mu)
    scale = torch.exp(0.5 * log_variance)
    z = wide if eps is None else wide + scale * eps.to(compute)
    kl = 0.5 * (wide.square() + torch.expm1(log_variance) - log_variance)
    return z.to(mu.dtype), per_sample_sum(kl)


def per_sample_sum(x: Tensor) -> Tensor:
    """(B,) over everything but the batch dimension."""
    return x.sum(tuple(range(1, x.dim()))) if x.dim() > 1 else x
