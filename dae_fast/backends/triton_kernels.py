"""The Triton kernels: what csrc/math.h and csrc/ops.h say, for a tile of a batch.

A tile is ROWS rows by LANES lanes, one lane to a thread; a lane is V = 16 bytes / element size
neighbouring elements of a row. Normals are made lane by lane and joined, so that a thread's values lie
where its 128-bit loads and stores want them and nothing moves between threads. A program walks `steps`
tiles along its rows. ROWS is 1 for long rows: everything that belongs to a row is then a scalar.

An argument that is None does not exist for the compiled kernel. Names in capitals are compile-time.
"""

# mypy: ignore-errors
# ruff: noqa: RET505, SIM102, SIM108
# Triton's own language: without types, and one in which `if` at compile time and at run time are two things.

from __future__ import annotations

import triton
import triton.language as tl

PHILOX_M0 = tl.constexpr(0xD2511F53)
PHILOX_M1 = tl.constexpr(0xCD9E8D57)
PHILOX_W0 = tl.constexpr(0x9E3779B9)
PHILOX_W1 = tl.constexpr(0xBB67AE85)

# How a row's noise key comes from the stream's; NO_NOISE where z is a tensor or absent.
NO_NOISE = tl.constexpr(0)
FOLDED = tl.constexpr(1)
RAW = tl.constexpr(2)

# What is written of a loss.
REDUCE_NONE = tl.constexpr(0)
REDUCE_MEAN = tl.constexpr(1)
REDUCE_SUM = tl.constexpr(2)

# The interpreter truncates fp32 to bf16, where every GPU rounds to nearest.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# The last program of a loss reads the sums of FINAL_ROWS samples by FINAL_TILES tiles at a time.
FINAL_ROWS = tl.constexpr(64)
FINAL_TILES = tl.constexpr(8)


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, PHILOX_M0), c0 * PHILOX_M0
        high1, low1 = tl.umulhi(c2, PHILOX_M1), c2 * PHILOX_M1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += PHILOX_W0
        k1 += PHILOX_W1
    return c0, c1, c2, c3


@triton.jit
def block_at(seed, offset, n):
    """Block n of the word stream of key (seed, offset); uint64."""
    counter = offset + n
    low = counter.to(tl.uint32)
    zero = low ^ low
    return philox4x32_10(low, (counter >> 32).to(tl.uint32), zero, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def fold_in(seed, offset, data):
    r0, r1, r2, r3 = block_at(seed, offset, data)
    return r0.to(tl.uint64) | r1.to(tl.uint64) << 32, r2.to(tl.uint64) | r3.to(tl.uint64) << 32


@triton.jit
def neg2_log_u(r):
    """-2 ln((r + 1/2) 2^-32), operation for operation as csrc/math.h."""
    i = r.to(tl.int32, bitcast=True)
    sign = i >> 31
    x = tl.fma((i ^ sign).to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    u = tl.where(sign != 0, 1.0 - x, x)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    f = tl.where(exponent == 0, -x, (bits - exponent).to(tl.float32, bitcast=True) - 1.0)
    q = tl.fma(f, -1.7469501495e-01, 2.8614965081e-01)
    q = tl.fma(q, f, -2.9835978150e-01)
    q = tl.fma(q, f, 3.3141028881e-01)
    q = tl.fma(q, f, -3.9924141765e-01)
    q = tl.fma(q, f, 5.0003510714e-01)
    q = tl.fma(q, f, -6.6667902470e-01)
    q = tl.fma(q, f, 9.9999982119e-01)
    # fp32(-2 ln 2) 2^-23, as exponent is e << 23.
    linear = tl.fma(exponent.to(tl.float32), -1.6525916635146132e-07, -2.0 * f)
    return tl.fma(f * f, q, linear)


@triton.jit
def sincos_2pi_u(r):
    """sin and cos of 2 pi (r + 1/2) 2^-32, operation for operation as csrc/math.h."""
    y = ((r << 2) | 2).to(tl.int32, bitcast=True).to(tl.float32) * 5.820766091346741e-11
    y2 = y * y
    s = tl.fma(y2, -7.5393562317e01, 8.1592353821e01)
    s = tl.fma(s, y2, -4.1341663361e01)
    s = tl.fma(y, 6.2831855, y * tl.fma(s, y2, -1.7484556e-07))
    c = tl.fma(y2, 5.9229240417e01, -8.5443237305e01)
    c = tl.fma(c, y2, 6.4939323425e01)
    c = tl.fma(c, y2, -1.9739208221e01)
    c = tl.fma(c, y2, 1.0)
    quarter = r + 0x20000000
    swap = (quarter & 0x40000000) != 0
    a = tl.where(swap, c, s).to(tl.uint32, bitcast=True) ^ (quarter & 0x80000000)
    b = tl.where(swap, s, c).to(tl.uint32, bitcast=True) ^ ((quarter + 0x40000000) & 0x80000000)
    return a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)


@triton.jit
def sqrt_rn(a, NVIDIA: tl.constexpr):
    """Correctly rounded, for a in [2^-32, 46].

    On NVIDIA the hardware's estimate with one Newton step: what sqrt.rn does for such an argument,
    without its branch to a slow path for the others.
    """
    if NVIDIA:
        y = tl.rsqrt(a)
        s = a * y
        return tl.fma(tl.fma(-s, s, a), 0.5 * y, s)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def normal_pair(radius, angle, NVIDIA: tl.constexpr):
    """Box-Muller 1958: two normals from two words."""
    sine, cosine = sincos_2pi_u(angle)
    s = sqrt_rn(neg2_log_u(radius), NVIDIA)
    return s * cosine, s * sine


@triton.jit
def row_key(seed, offset, key, sample, first_sample, row, NOISE: tl.constexpr):
    """(seed, offset) of each row's stream; the stream's own are in memory at `key` unless that is None."""
    if key is not None:
        seed = tl.load(key)
        offset = tl.load(key + 1)
    seed = seed.to(tl.uint64)
    offset = offset.to(tl.uint64)
    if NOISE == FOLDED:
        id = first_sample + row if sample is None else tl.load(sample + row)
        seed, offset = fold_in(seed, offset, id.to(tl.uint64))
    return seed, offset


@triton.jit
def lane_tile(ROWS: tl.constexpr, LANES: tl.constexpr):
    return tl.arange(0, LANES)[None, :] + tl.zeros([ROWS, 1], tl.int32)


@triton.jit
def half_blocks(seed, offset, first, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Two words for each of lanes `first`...: a lane makes the block of its pair and takes its half."""
    lane = lane_tile(ROWS, LANES)
    r0, r1, r2, r3 = block_at(seed, offset + (first // 2).to(tl.uint64), (lane // 2).to(tl.uint64))
    odd = lane % 2 == 1
    return tl.where(odd, r2, r0), tl.where(odd, r3, r1)


@triton.jit
def block_normals(seed, offset, n, NVIDIA: tl.constexpr):
    r0, r1, r2, r3 = block_at(seed, offset, n)
    z0, z1 = normal_pair(r0, r1, NVIDIA)
    z2, z3 = normal_pair(r2, r3, NVIDIA)
    return z0, z1, z2, z3


@triton.jit
def normals(seed, offset, first, ROWS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, NVIDIA: tl.constexpr):
    """(ROWS, LANES * V) fp32: the noise of lanes `first`... of each row.

    tl.join puts its two tensors side by side in a new last dimension: the last one joined is the lowest
    bit of an element's place in its lane.
    """
    if V == 2:
        radius, angle = half_blocks(seed, offset, first, ROWS, LANES)
        z0, z1 = normal_pair(radius, angle, NVIDIA)
        z = tl.join(z0, z1)
    elif V == 4:
        lane = lane_tile(ROWS, LANES).to(tl.uint64)
        z0, z1, z2, z3 = block_normals(seed, offset + first.to(tl.uint64), lane, NVIDIA)
        z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    else:
        # Two blocks in tensors of their own: joined before the arithmetic, they would be laid out anew.
        offset += (2 * first).to(tl.uint64)
        lane = (2 * lane_tile(ROWS, LANES)).to(tl.uint64)
        z0, z1, z2, z3 = block_normals(seed, offset, lane, NVIDIA)
        z4, z5, z6, z7 = block_normals(seed, offset, lane + 1, NVIDIA)
        even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
        odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
        z = tl.join(even, odd)
    return tl.reshape(z, [ROWS, LANES * V])


@triton.jit
def rows_of(B, ROWS: tl.constexpr):
    """This program's first row, and its rows: a scalar, or (ROWS, 1) where those past the end repeat the last."""
    first = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * ROWS
    if ROWS == 1:
        return first, first
    else:
        return first, tl.minimum(first + tl.arange(0, ROWS)[:, None], B - 1)


@triton.jit
def tile_mask(row0, first, B, D, ROWS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr):
    """(ROWS or 1, LANES * V): which elements of lanes `first`... exist."""
    left = tl.minimum(D - first * V, LANES * V).to(tl.int32)
    live = tl.arange(0, LANES * V)[None, :] < left
    if ROWS > 1:
        live = live & (row0 + tl.arange(0, ROWS)[:, None] < B)
    return live


@triton.jit
def at(pointer, row, first, D, sizes, strides, LANES: tl.constexpr, V: tl.constexpr):
    """Addresses of the elements of lanes `first`...; strides None: rows of D contiguous elements.

    Else strides are those of the batch and of three dimensions of a row, sizes those of the last two.
    """
    element = tl.arange(0, LANES * V)[None, :]
    if strides is None:
        return pointer + (row * D + first * V) + element
    else:
        i = (first * V).to(tl.uint32) + element.to(tl.uint32)
        n1 = sizes[0].to(tl.uint32)
        n2 = sizes[1].to(tl.uint32)
        rest = i // n2
        i0 = (rest // n1).to(tl.int64)
        i1 = (rest % n1).to(tl.int64)
        i2 = (i % n2).to(tl.int64)
        return pointer + (row * strides[0] + i0 * strides[1] + i1 * strides[2] + i2 * strides[3])


@triton.jit
def coefficient(address, inside, COLUMN: tl.constexpr):
    if COLUMN < 0:
        return 0.0
    elif inside is None:
        return tl.load(address + COLUMN)
    else:
        return tl.load(address + COLUMN, mask=inside, other=float("nan"))


@triton.jit
def coefficients(
    table,
    index,
    levels,
    row,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
):
    """Three columns of each row's level: index[row], or the row itself, or (SHARED) one for all.

    NaN for a level outside the table, of which nothing is read; 0 for a negative column. Read before the
    loop: in it the compiler would have to read them again after every store.
    """
    inside = None
    if index is not None:
        level = tl.load(index + row).to(tl.int64)
        inside = (level >= 0) & (level < levels)
        table += level * K
    elif not SHARED:
        table += row * K
    return coefficient(table, inside, C0), coefficient(table, inside, C1), coefficient(table, inside, C2)


@triton.jit
def mul_add(a, b, c):
    """a*b + c, fused in fp32 and unfused in fp64, as csrc/math.h; c None: a*b."""
    if c is None:
        return a * b
    elif b.dtype == tl.float32:
        return tl.fma(a, b, c)
    else:
        return a * b + c


@triton.jit
def affine(c0, x, c1, y, c2, z, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    """c0*x + c1*y + c2*z without the products whose column is negative or whose input is None; 0 without any."""
    total = None
    if C2 >= 0 and z is not None:
        total = c2 * z
    if C1 >= 0 and y is not None:
        total = mul_add(c1, y, total)
    if C0 >= 0 and x is not None:
        total = mul_add(c0, x, total)
    if total is None:
        total = tl.zeros([1, 1], tl.float32)
    return total


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """Rounded to nearest."""
    if INTERPRETED and DTYPE.is_bf16():
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(DTYPE)


@triton.jit
def as_double(bits):
    """A double that came as an integer: a float argument would be rounded to fp32 on its way."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def affine_kernel(
    x,
    y,
    z,
    out,
    out2,
    table,
    index,
    seed,
    offset,
    key,
    sample,
    first_sample,
    levels,
    low,
    high,
    B,
    D,
    steps,
    sizes,
    x_strides,
    y_strides,
    z_strides,
    out_strides,
    out2_strides,
    COLUMNS: tl.constexpr,
    CLAMP: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """out = c0*x + c1*y + c2*z for each three of COLUMNS; CLAMP (a0, a1): y becomes clamp(a0*x + a1*y)."""
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    if ALIGNED:
        D = D // V * V  # says that V divides D
    DTYPE: tl.constexpr = out.dtype.element_ty
    C: tl.constexpr = table.dtype.element_ty  # the compute type
    if NOISE != NO_NOISE:
        seed, offset = row_key(seed, offset, key, sample, first_sample, row, NOISE)
    C0: tl.constexpr = COLUMNS[0]
    C1: tl.constexpr = COLUMNS[1]
    C2: tl.constexpr = COLUMNS[2]
    c0, c1, c2 = coefficients(table, index, levels, row, K, SHARED, C0, C1, C2)
    if out2 is not None:
        D0: tl.constexpr = COLUMNS[3]
        D1: tl.constexpr = COLUMNS[4]
        D2: tl.constexpr = COLUMNS[5]
        d0, d1, d2 = coefficients(table, index, levels, row, K, SHARED, D0, D1, D2)
    if CLAMP is not None:
        A0: tl.constexpr = CLAMP[0]
        A1: tl.constexpr = CLAMP[1]
        a0, a1, _ = coefficients(table, index, levels, row, K, SHARED, A0, A1, -1)
        low = as_double(low).to(C)
        high = as_double(high).to(C)
    begin = tl.program_id(0) * steps
    end = tl.minimum(begin + steps, tl.cdiv(D, LANES * V)).to(tl.int32)
    for step in range(begin.to(tl.int32), end):
        first = tl.cast(step, tl.int64) * LANES
        live = tile_mask(row0, first, B, D, ROWS, LANES, V)
        xv = None
        yv = None
        zv = None
        if x is not None:
            xv = tl.load(at(x, row, first, D, sizes, x_strides, LANES, V), mask=live).to(C)
        if y is not None:
            yv = tl.load(at(y, row, first, D, sizes, y_strides, LANES, V), mask=live).to(C)
        if z is not None:
            zv = tl.load(at(z, row, first, D, sizes, z_strides, LANES, V), mask=live).to(C)
        if NOISE != NO_NOISE:
            zv = normals(seed, offset, first, ROWS, LANES, V, NVIDIA).to(C)
        if CLAMP is not None:
            yv = affine(a0, xv, a1, yv, 0.0, None, A0, A1, -1)
            # Comparisons, not minimum and maximum: NaN passes through.
            yv = tl.where(yv < low, low, tl.where(yv > high, high, yv))
        if out2 is not None:
            v2 = affine(d0, xv, d1, yv, d2, zv, D0, D1, D2)
            tl.store(at(out2, row, first, D, sizes, out2_strides, LANES, V), narrow(v2, DTYPE), mask=live)
        v = affine(c0, xv, c1, yv, c2, zv, C0, C1, C2)
        tl.store(at(out, row, first, D, sizes, out_strides, LANES, V), narrow(v, DTYPE), mask=live)


@triton.jit
def row_sums(lanes, ROWS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr):
    """fp64 sum of each row's (ROWS, LANES * V) running sums: within a thread as they are, between threads in fp64."""
    sums = tl.sum(tl.sum(tl.reshape(lanes, [ROWS, LANES, V]), 2).to(tl.float64), 1, keep_dims=True)
    if ROWS == 1:
        return tl.sum(sums)
    else:
        return sums


@triton.jit
def residual_kernel(
    pred,
    y,
    z,
    mask,
    grad,
    table,
    index,
    weight,
    kept,
    upstream,
    seed,
    offset,
    key,
    sample,
    first_sample,
    sums,
    ticket,
    per_sample,
    loss,
    levels,
    factor,
    B,
    D,
    steps,
    sizes,
    pred_strides,
    y_strides,
    z_strides,
    mask_strides,
    grad_strides,
    N1: tl.constexpr,
    N2: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    NOISE: tl.constexpr,
    REDUCTION: tl.constexpr,
    MADE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """r = mask * (pred + n1*y + n2*z); its gradient factor * weight * upstream / kept * r, and the loss.

    kept: (B,) int64, the elements that count, or None for all (factor then holds 1 / D).
    Each program leaves its sums in `sums`; the one that draws the last ticket adds them, in one order
    whoever comes last. per_sample None: no sums are wanted; loss None: no loss.
    MADE: grad holds the gradient for an upstream of 1.
    """
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    if MADE:
        if tl.load(upstream) == 1.0:
            return
    if ALIGNED:
        D = D // V * V  # says that V divides D
    C: tl.constexpr = table.dtype.element_ty  # the compute type
    if NOISE != NO_NOISE:
        seed, offset = row_key(seed, offset, key, sample, first_sample, row, NOISE)
    _, n1, n2 = coefficients(table, index, levels, row, K, SHARED, -1, N1, N2)
    if grad is not None:
        scale = as_double(factor)
        if weight is not None:
            scale *= tl.load(weight + row).to(tl.float64)
        if upstream is not None:
            scale *= tl.load(upstream).to(tl.float64)
        if kept is not None and REDUCTION != REDUCE_SUM:
            scale *= reciprocal(tl.load(kept + row))
        scale = scale.to(C)
    total = tl.zeros([ROWS, LANES * V], C)
    begin = tl.program_id(0) * steps
    end = tl.minimum(begin + steps, tl.cdiv(D, LANES * V)).to(tl.int32)
    for step in range(begin.to(tl.int32), end):
        first = tl.cast(step, tl.int64) * LANES
        live = tile_mask(row0, first, B, D, ROWS, LANES, V)
        r = tl.load(at(pred, row, first, D, sizes, pred_strides, LANES, V), mask=live).to(C)
        yv = None
        zv = None
        if y is not None:
            yv = tl.load(at(y, row, first, D, sizes, y_strides, LANES, V), mask=live).to(C)
        if z is not None:
            zv = tl.load(at(z, row, first, D, sizes, z_strides, LANES, V), mask=live).to(C)
        if NOISE != NO_NOISE:
            zv = normals(seed, offset, first, ROWS, LANES, V, NVIDIA).to(C)
        r = affine(1.0, r, n1, yv, n2, zv, 0, N1, N2)
        keep = live
        if mask is not None:
            keep = live & (tl.load(at(mask, row, first, D, sizes, mask_strides, LANES, V), mask=live, other=0) != 0)
        # A select, not a product: what is masked out may be NaN.
        r = tl.where(keep, r, 0.0)
        if grad is not None:
            g = narrow(scale * r, grad.dtype.element_ty)
            tl.store(at(grad, row, first, D, sizes, grad_strides, LANES, V), g, mask=live)
        if per_sample is not None:
            total = mul_add(r, r, total)
    if per_sample is not None:
        mine = row_sums(total, ROWS, LANES, V)
        existing = row0 + tl.arange(0, ROWS)[:, None] < B if ROWS > 1 else None
        if ONE_TILE:
            part = finish_rows(mine, row, existing, weight, kept, per_sample, D, REDUCTION)
            if loss is not None:
                if ROWS > 1:
                    part = tl.sum(tl.where(existing, part, 0.0))
                tl.store(sums + row0 // ROWS, part)
                if last_to_finish(ticket, tl.cdiv(B, ROWS)):
                    write_loss(loss, add_parts(sums, tl.cdiv(B, ROWS)), B, REDUCTION)
        else:
            tiles = tl.num_programs(0)
            tl.store(sums + row * tiles + tl.program_id(0), mine, mask=existing)
            if last_to_finish(ticket, tl.cdiv(B, ROWS) * tiles):
                value = add_tiles(sums, tiles, weight, kept, per_sample, B, D, REDUCTION)
                if loss is not None:
                    write_loss(loss, value, B, REDUCTION)


@triton.jit
def reciprocal(kept):
    """1 / kept, 0 for none."""
    return tl.where(kept > 0, 1.0 / tl.maximum(kept, 1).to(tl.float64), 0.0)


@triton.jit
def finish_rows(sums, row, existing, weight, kept, per_sample, D, REDUCTION: tl.constexpr):
    """Writes the mean of each row's sum; returns what it adds to the loss."""
    if kept is None:
        mean = sums / D.to(tl.float64)
    else:
        mean = sums * reciprocal(tl.load(kept + row, mask=existing, other=0))
    tl.store(per_sample + row, mean.to(per_sample.dtype.element_ty), mask=existing)
    part = sums if REDUCTION == REDUCE_SUM else mean
    if weight is not None:
        part *= tl.load(weight + row, mask=existing, other=0.0).to(tl.float64)
    return part


@triton.jit
def last_to_finish(ticket, programs):
    """Whether all other programs have left their sums. The count starts again for the next launch."""
    tl.debug_barrier()  # this program's sums are written before its ticket is drawn
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def add_parts(sums, count):
    """The sum of `count` doubles, past the caches that other programs do not write through."""
    lanes = tl.arange(0, FINAL_ROWS * FINAL_TILES)
    total = tl.zeros([FINAL_ROWS * FINAL_TILES], tl.float64)
    for first in range(0, count.to(tl.int32), FINAL_ROWS * FINAL_TILES):
        total += tl.load(sums + first + lanes, mask=first + lanes < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def add_tiles(sums, tiles, weight, kept, per_sample, B, D, REDUCTION: tl.constexpr):
    """The loss from the (B, tiles) sums, and the mean of each row on the way."""
    total = tl.zeros([FINAL_ROWS], tl.float64)
    for first in range(0, B.to(tl.int32), FINAL_ROWS):
        row = first + tl.arange(0, FINAL_ROWS)
        row_total = tl.zeros([FINAL_ROWS], tl.float64)
        for tile0 in range(0, tiles, FINAL_TILES):
            tile = tile0 + tl.arange(0, FINAL_TILES)[None, :]
            live = (row[:, None] < B) & (tile < tiles)
            address = sums + row[:, None].to(tl.int64) * tiles + tile
            row_total += tl.sum(tl.load(address, mask=live, other=0.0, cache_modifier=".cg"), 1)
        total += finish_rows(row_total, row, row < B, weight, kept, per_sample, D, REDUCTION)
    return tl.sum(total)


@triton.jit
def write_loss(loss, value, B, REDUCTION: tl.constexpr):
    if REDUCTION == REDUCE_MEAN:
        value /= B.to(tl.float64)
    tl.store(loss, value.to(loss.dtype.element_ty))


@triton.jit
def row_dots_kernel(
    g,
    x,
    y,
    z,
    out,
    seed,
    offset,
    key,
    sample,
    first_sample,
    B,
    D,
    steps,
    sizes,
    g_strides,
    x_strides,
    y_strides,
    z_strides,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """out (B, tiles, 3): sums over this program's part of each row of g*x, g*y, g*z; absent ones are not written."""
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    if ALIGNED:
        D = D // V * V  # says that V divides D
    C: tl.constexpr = tl.float64 if g.dtype.element_ty == tl.float64 else tl.float32
    if NOISE != NO_NOISE:
        seed, offset = row_key(seed, offset, key, sample, first_sample, row, NOISE)
    gx = tl.zeros([ROWS, LANES * V], C)
    gy = tl.zeros([ROWS, LANES * V], C)
    gz = tl.zeros([ROWS, LANES * V], C)
    begin = tl.program_id(0) * steps
    end = tl.minimum(begin + steps, tl.cdiv(D, LANES * V)).to(tl.int32)
    for step in range(begin.to(tl.int32), end):
        first = tl.cast(step, tl.int64) * LANES
        live = tile_mask(row0, first, B, D, ROWS, LANES, V)
        gv = tl.load(at(g, row, first, D, sizes, g_strides, LANES, V), mask=live, other=0.0).to(C)
        if x is not None:
            xv = tl.load(at(x, row, first, D, sizes, x_strides, LANES, V), mask=live, other=0.0).to(C)
            gx = mul_add(gv, xv, gx)
        if y is not None:
            yv = tl.load(at(y, row, first, D, sizes, y_strides, LANES, V), mask=live, other=0.0).to(C)
            gy = mul_add(gv, yv, gy)
        if NOISE != NO_NOISE:
            gz = mul_add(gv, normals(seed, offset, first, ROWS, LANES, V, NVIDIA).to(C), gz)
        elif z is not None:
            zv = tl.load(at(z, row, first, D, sizes, z_strides, LANES, V), mask=live, other=0.0).to(C)
            gz = mul_add(gv, zv, gz)
    existing = row0 + tl.arange(0, ROWS)[:, None] < B if ROWS > 1 else None
    address = out + (row * tl.num_programs(0) + tl.program_id(0)) * 3
    if x is not None:
        tl.store(address, row_sums(gx, ROWS, LANES, V), mask=existing)
    if y is not None:
        tl.store(address + 1, row_sums(gy, ROWS, LANES, V), mask=existing)
    if NOISE != NO_NOISE or z is not None:
        tl.store(address + 2, row_sums(gz, ROWS, LANES, V), mask=existing)


@triton.jit
def fill_kernel(
    out,
    seed,
    offset,
    key,
    sample,
    first_sample,
    B,
    D,
    steps,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """out (B, D): the normals, or for an int64 `out` the words behind them."""
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    if ALIGNED:
        D = D // V * V  # says that V divides D
    DTYPE: tl.constexpr = out.dtype.element_ty
    seed, offset = row_key(seed, offset, key, sample, first_sample, row, NOISE)
    begin = tl.program_id(0) * steps
    end = tl.minimum(begin + steps, tl.cdiv(D, LANES * V)).to(tl.int32)
    for step in range(begin.to(tl.int32), end):
        first = tl.cast(step, tl.int64) * LANES
        if tl.int64 == DTYPE:
            w0, w1 = half_blocks(seed, offset, first, ROWS, LANES)
            value = tl.reshape(tl.join(w0, w1), [ROWS, LANES * V]).to(tl.int64)
        else:
            value = narrow(normals(seed, offset, first, ROWS, LANES, V, NVIDIA), DTYPE)
        tl.store(at(out, row, first, D, None, None, LANES, V), value, mask=tile_mask(row0, first, B, D, ROWS, LANES, V))


@triton.jit
def fold_in_kernel(seed, offset, key, data, folded):
    """folded (2,): the key, here or in memory, folded with `data`, an integer or the address of one."""
    seed, offset = row_key(seed, offset, key, None, None, None, RAW)
    if data.dtype.is_ptr():
        data = tl.load(data)
    seed, offset = fold_in(seed, offset, data.to(tl.uint64))
    tl.store(folded, seed.to(tl.int64))
    tl.store(folded + 1, offset.to(tl.int64))
