"""The Triton kernels of a variational autoencoder's sample and divergence: Gaussian of csrc/ops.h."""

# mypy: ignore-errors

from __future__ import annotations

import math

import triton
import triton.language as tl

from .kernels import NO_NOISE, at, mul_add, narrow, normals, row_key, row_sums, rows_of, rows_there, tile_mask


@triton.jit
def parts(x):
    """n, f, p and the factors of e^x = 2^n (1 + f + f^2 p), operation for operation as csrc/math.h."""
    inside = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))
    shifted = tl.fma(inside, 1.44269504, 12582912.0)
    n = shifted - 12582912.0
    f = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, inside))
    p = tl.fma(f, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, f, 8.3334519073e-3)
    p = tl.fma(p, f, 4.1665795894e-2)
    p = tl.fma(p, f, 1.6666665459e-1)
    p = tl.fma(p, f, 5.0000001201e-1)
    power = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = power >> 1
    factor = ((half + 127) << 23).to(tl.float32, bitcast=True)
    other_factor = ((power - half + 127) << 23).to(tl.float32, bitcast=True)
    return n, f, p, factor, other_factor


@triton.jit
def exponential(x):
    _, f, p, factor, other_factor = parts(x)
    return (tl.fma(f * f, p, f) + 1.0) * factor * other_factor


@triton.constexpr_function
def reciprocal_factorial(k):
    return 1 / math.factorial(k)


@triton.jit
def growth(x):
    """e^x, e^x - 1 and e^x - 1 - x, the latter two without cancellation, as csrc/ops.h."""
    if x.dtype == tl.float64:
        value = tl.exp(x)
        small = (x > -1.0) & (x < 1.0)
        inside = tl.where(small, x, 0.0)
        series = tl.zeros_like(x)
        for k in tl.static_range(18):
            series = mul_add(series, inside, reciprocal_factorial(19 - k))
        near = inside * inside * series
    else:
        n, f, p, factor, other_factor = parts(x)
        value = (tl.fma(f * f, p, f) + 1.0) * factor * other_factor
        power = factor * other_factor
        more = power - 1.0
        near = tl.fma(more, f, tl.fma(power * (f * f), p, tl.fma(-n, 0.693147181, more)))
        small = n * n <= 1.0
    return value, tl.where(small, near + x, value - 1.0), tl.where(small, near, (value - 1.0) - x)


@triton.jit
def gaussian_kernel(
    mu,
    log_var,
    eps,
    z,
    kl,
    seed,
    offset,
    key,
    sample,
    first_sample,
    B,
    D,
    steps,
    sizes,
    mu_strides,
    log_var_strides,
    eps_strides,
    z_strides,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """z = mu + e^(log_var / 2) * eps; kl (B, tiles): this program's part of each row's divergence."""
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    if ALIGNED:
        D = D // V * V  # says that V divides D
    DTYPE: tl.constexpr = z.dtype.element_ty
    C: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    if NOISE != NO_NOISE:
        seed, offset = row_key(seed, offset, key, sample, first_sample, row, NOISE)
    total = tl.zeros([ROWS, LANES * V], C)
    begin = tl.program_id(0) * steps
    end = tl.minimum(begin + steps, tl.cdiv(D, LANES * V)).to(tl.int32)
    for step in range(begin.to(tl.int32), end):
        first = tl.cast(step, tl.int64) * LANES
        live = tile_mask(row0, first, B, D, ROWS, LANES, V)
        # What is not there is N(0, 1): its divergence is 0.
        mean = tl.load(at(mu, row, first, D, sizes, mu_strides, LANES, V), mask=live, other=0.0).to(C)
        log_variance = tl.load(at(log_var, row, first, D, sizes, log_var_strides, LANES, V), mask=live, other=0.0).to(C)
        if NOISE != NO_NOISE:
            e = normals(seed, offset, first, sizes, ROWS, LANES, V, NVIDIA).to(C)
        else:
            e = tl.load(at(eps, row, first, D, sizes, eps_strides, LANES, V), mask=live).to(C)
        scale, minus_1, rest = growth(0.5 * log_variance)
        total += 0.5 * mul_add(mean, mean, mul_add(minus_1, minus_1, 2.0 * rest))
        tl.store(at(z, row, first, D, sizes, z_strides, LANES, V), narrow(mul_add(scale, e, mean), DTYPE), mask=live)
    existing = rows_there(row0, B, ROWS)
    tl.store(kl + row * tl.num_programs(0) + tl.program_id(0), row_sums(total, ROWS, LANES, V), mask=existing)


@triton.jit
def gaussian_grad_kernel(
    mu,
    log_var,
    eps,
    z_grad,
    mu_grad,
    log_var_grad,
    kl_grad,
    seed,
    offset,
    key,
    sample,
    first_sample,
    B,
    D,
    steps,
    sizes,
    mu_strides,
    log_var_strides,
    eps_strides,
    z_grad_strides,
    mu_grad_strides,
    log_var_grad_strides,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """The gradients of mu and log_var from z_grad and kl_grad (B,), each of which may be None: 0."""
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    if ALIGNED:
        D = D // V * V  # says that V divides D
    DTYPE: tl.constexpr = mu.dtype.element_ty
    C: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    if NOISE != NO_NOISE:
        seed, offset = row_key(seed, offset, key, sample, first_sample, row, NOISE)
    of_kl = 0.0
    if kl_grad is not None:
        of_kl = tl.load(kl_grad + row)
    begin = tl.program_id(0) * steps
    end = tl.minimum(begin + steps, tl.cdiv(D, LANES * V)).to(tl.int32)
    for step in range(begin.to(tl.int32), end):
        first = tl.cast(step, tl.int64) * LANES
        live = tile_mask(row0, first, B, D, ROWS, LANES, V)
        mean = tl.load(at(mu, row, first, D, sizes, mu_strides, LANES, V), mask=live).to(C)
        log_variance = tl.load(at(log_var, row, first, D, sizes, log_var_strides, LANES, V), mask=live).to(C)
        if NOISE != NO_NOISE:
            e = normals(seed, offset, first, sizes, ROWS, LANES, V, NVIDIA).to(C)
        else:
            e = tl.load(at(eps, row, first, D, sizes, eps_strides, LANES, V), mask=live).to(C)
        if z_grad is not None:
            g = tl.load(at(z_grad, row, first, D, sizes, z_grad_strides, LANES, V), mask=live).to(C)
        else:
            g = tl.zeros([ROWS, LANES * V], C)
        # An upstream gradient of 0 gives 0, whatever overflows.
        of_kl_here = tl.zeros([ROWS, LANES * V], C) + of_kl
        of_mu = tl.where(of_kl_here == 0, g, mul_add(of_kl_here, mean, g))
        scale, minus_1, _ = growth(0.5 * log_variance)
        of_z = tl.where(g == 0, 0.0, g * scale)
        slope = mul_add(minus_1, minus_1, 2.0 * minus_1)
        of_log_var = 0.5 * mul_add(of_z, e, tl.where(of_kl_here == 0, 0.0, of_kl_here * slope))
        tl.store(at(mu_grad, row, first, D, sizes, mu_grad_strides, LANES, V), narrow(of_mu, DTYPE), mask=live)
        tl.store(
            at(log_var_grad, row, first, D, sizes, log_var_grad_strides, LANES, V),
            narrow(of_log_var, DTYPE),
            mask=live,
        )
