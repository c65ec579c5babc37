"""The Triton kernels: what csrc/math.h and csrc/ops.h say, for a tile of a batch.

A tile is ROWS rows by LANES lanes, one lane to a thread; a lane is V = 16 bytes / element size
neighbouring elements of a row. Normals are made lane by lane and joined, so that a thread's values lie
where its 128-bit loads and stores want them and nothing moves between threads. A program walks `steps`
tiles along its rows. ROWS is 1 for long rows: everything that belongs to a row is then a scalar.

An argument that is None does not exist for the compiled kernel; within a tuple Triton 3.6 has no None, and what a
function returns is not compile-time there. Names in capitals are compile-time.
"""

# mypy: ignore-errors
# ruff: noqa: RET505, SIM102, SIM108
# Triton's own language: without types, and one in which `if` at compile time and at run time are two things.

from __future__ import annotations

import triton
import triton.language as tl

from ..spec import Kind

PHILOX_M0 = tl.constexpr(0xD2511F53)
PHILOX_M1 = tl.constexpr(0xCD9E8D57)
PHILOX_W0 = tl.constexpr(0x9E3779B9)
PHILOX_W1 = tl.constexpr(0xBB67AE85)

# How a row's noise key comes from the stream's; NO_NOISE where z is a tensor or absent.
NO_NOISE = tl.constexpr(0)
FOLDED = tl.constexpr(1)
RAW = tl.constexpr(2)
BLEND = tl.constexpr(-2)  # as in spec.py
SPANNED = tl.constexpr(3)  # first_sample: that, rows of a sample, its first block, blocks from row to row

# What is written of a loss.
REDUCE_NONE = tl.constexpr(0)
REDUCE_MEAN = tl.constexpr(1)
REDUCE_SUM = tl.constexpr(2)

# What a residual costs.
MSE = tl.constexpr(int(Kind.mse))
L1 = tl.constexpr(int(Kind.l1))
HUBER = tl.constexpr(int(Kind.huber))
PSEUDO_HUBER = tl.constexpr(int(Kind.pseudo_huber))

# The interpreter truncates fp32 to bf16, where every GPU rounds to nearest.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# The last program of a loss reads FINAL sums at a time, one a thread, and so many times before it waits for any: tiles
# of rows that were cut, or parts of a loss whose rows were not.
FINAL = tl.constexpr(128)
TILES_AT_ONCE = tl.constexpr(4)
PARTS_AT_ONCE = tl.constexpr(16)


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
    """sin and cos of 2 pi (r + 1/2) 2^-32 without the sign that multiplies both, and that sign in the last's top bit.

    Operation for operation as csrc/math.h.
    """
    y = ((r << 2) | 2).to(tl.int32, bitcast=True).to(tl.float32) * 5.820766091346741e-11
    y2 = y * y
    s = tl.fma(y2, -7.5393562317e01, 8.1592353821e01)
    s = tl.fma(s, y2, -4.1341663361e01)
    s = tl.fma(y, 6.2831855, y * tl.fma(s, y2, -1.7484556e-07))
    c = tl.fma(y2, 5.9229240417e01, -8.5443237305e01)
    c = tl.fma(c, y2, 6.4939323425e01)
    c = tl.fma(c, y2, -1.9739208221e01)
    c = tl.fma(c, y2, 1.0)
    sign = r + 0x20000000
    swap = (sign & 0x40000000) != 0
    return tl.where(swap, c, s), tl.where(swap, -s, c), sign


@triton.jit
def sqrt_rn(a, NVIDIA: tl.constexpr):
    """As square_root, for a in [2^-32, 46].

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
    sine, cosine, sign = sincos_2pi_u(angle)
    s = sqrt_rn(neg2_log_u(radius), NVIDIA)
    s = (s.to(tl.uint32, bitcast=True) ^ (sign & 0x80000000)).to(tl.float32, bitcast=True)
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
    elif NOISE == SPANNED:
        rows = first_sample[1]
        of_sample = row // rows
        id = first_sample[0] + of_sample if sample is None else tl.load(sample + of_sample)
        seed, offset = fold_in(seed, offset, id.to(tl.uint64))
        offset += (first_sample[2] + (row - of_sample * rows) * first_sample[3]).to(tl.uint64)
    return seed, offset


@triton.jit
def lane_tile(ROWS: tl.constexpr, LANES: tl.constexpr):
    return tl.arange(0, LANES)[None, :] + tl.zeros([ROWS, 1], tl.int32)


@triton.jit
def logical(lane, sizes):
    """Which lane of its row, in logical order, the lane of a strided tile is; uint32.

    By channels, where neighbouring lanes take neighbouring channels: sizes[2] of these lie side by side in memory,
    sizes[3] lanes of each.
    """
    lane = lane.to(tl.uint32)
    if sizes is not None and len(sizes) == 4:
        channels = sizes[2].to(tl.uint32)
        each = sizes[3].to(tl.uint32)
        outer = lane // (channels * each)
        rest = lane % (channels * each)
        lane = (outer * channels + rest % channels) * each + rest // channels
    return lane


@triton.jit
def lane_block(
    seed, offset, first, sizes, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr
):
    """The words of block BLOCK of each of lanes `first`..., in tensors (ROWS, LANES); of half a block where V is 2."""
    lane = lane_tile(ROWS, LANES)
    if sizes is not None and len(sizes) == 4:
        lane = logical(first + lane, sizes)
        first = first ^ first
    if V == 2:
        # A lane makes the block of its pair and takes its half.
        r0, r1, r2, r3 = block_at(seed, offset + (first // 2).to(tl.uint64), (lane // 2).to(tl.uint64))
        odd = lane % 2 == 1
        return tl.where(odd, r2, r0), tl.where(odd, r3, r1)
    elif V == 4:
        return block_at(seed, offset + first.to(tl.uint64), lane.to(tl.uint64))
    else:
        return block_at(seed, offset + (2 * first).to(tl.uint64), (2 * lane).to(tl.uint64) + BLOCK)


@triton.jit
def side_by_side(values, ROWS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr):
    """(ROWS, LANES * V) of the V values of each lane.

    tl.join puts its two tensors side by side in a new last dimension: the last one joined is the lowest
    bit of an element's place in its lane. What is computed from a lane's words is computed before: joined
    first, two blocks would be laid out anew.
    """
    if V == 2:
        tile = tl.join(values[0], values[1])
    elif V == 4:
        tile = tl.join(tl.join(values[0], values[2]), tl.join(values[1], values[3]))
    else:
        even = tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6]))
        odd = tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7]))
        tile = tl.join(even, odd)
    return tl.reshape(tile, [ROWS, LANES * V])


@triton.jit
def block_normals(r, V: tl.constexpr, NVIDIA: tl.constexpr):
    z = normal_pair(r[0], r[1], NVIDIA)
    return z if V == 2 else z + normal_pair(r[2], r[3], NVIDIA)


@triton.jit
def normals(seed, offset, first, sizes, ROWS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, NVIDIA: tl.constexpr):
    """(ROWS, LANES * V) fp32: the noise of lanes `first`... of each row."""
    z = block_normals(lane_block(seed, offset, first, sizes, 0, ROWS, LANES, V), V, NVIDIA)
    if V == 8:
        z += block_normals(lane_block(seed, offset, first, sizes, 1, ROWS, LANES, V), V, NVIDIA)
    return side_by_side(z, ROWS, LANES, V)


@triton.jit
def words(seed, offset, first, sizes, ROWS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr):
    """(ROWS, LANES * V) uint32: the words of lanes `first`... of each row."""
    r = lane_block(seed, offset, first, sizes, 0, ROWS, LANES, V)
    if V == 8:
        r += lane_block(seed, offset, first, sizes, 1, ROWS, LANES, V)
    return side_by_side(r, ROWS, LANES, V)


@triton.jit
def below(words, threshold):
    """words < threshold, which is in [0, 2^32], in 32 bits."""
    return (words < threshold.to(tl.uint32)) | (threshold > 0xFFFFFFFF)


@triton.jit
def counted(
    seed,
    offset,
    second,
    first,
    sizes,
    KEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
):
    """(ROWS, LANES * V): what a drawn mask has of lanes `first`..., the elements that it strikes or (KEEPS) leaves."""
    masked = below(words(seed, offset, first, sizes, ROWS, LANES, V), second)
    return ~masked if KEEPS else masked


@triton.jit
def rows_of(B, ROWS: tl.constexpr):
    """This program's first row, and its rows: a scalar, or (ROWS, 1) where those past the end repeat the last."""
    first = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * ROWS
    if ROWS == 1:
        return first, first
    else:
        return first, tl.minimum(first + tl.arange(0, ROWS)[:, None], B - 1)


@triton.jit
def rows_there(row0, B, ROWS: tl.constexpr):
    """Which of a program's rows the batch has: a scalar, or (ROWS, 1)."""
    if ROWS == 1:
        return row0 < B
    else:
        return row0 + tl.arange(0, ROWS)[:, None] < B


@triton.jit
def tile_mask(row0, first, B, D, ROWS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr):
    """(ROWS or 1, LANES * V): which elements of lanes `first`... exist."""
    left = tl.minimum(D - first * V, LANES * V).to(tl.int32)
    live = tl.arange(0, LANES * V)[None, :] < left
    if ROWS > 1:
        live = live & rows_there(row0, B, ROWS)
    return live


@triton.jit
def at(pointer, row, first, D, sizes, strides, LANES: tl.constexpr, V: tl.constexpr):
    """Addresses of the elements of lanes `first`...; strides None: rows of D contiguous elements.

    Else strides are those of the batch and of three dimensions of a row, sizes those of the last two and the order of
    lanes, which is one for all operands.
    """
    element = tl.arange(0, LANES * V)[None, :]
    if sizes is not None and len(sizes) == 4:
        i = logical(first + element // V, sizes) * V + (element % V).to(tl.uint32)
    elif strides is not None:
        i = (first * V).to(tl.uint32) + element.to(tl.uint32)
    if strides is None:
        if sizes is not None and len(sizes) == 4:
            return pointer + row * D + i
        else:
            return pointer + (row * D + first * V) + element
    else:
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
def coefficients(table, index, levels, row, K: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr):
    """Four columns of each row's level: index[row], or the row itself, or (SHARED) one for all.

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
    return (
        coefficient(table, inside, COLUMNS[0]),
        coefficient(table, inside, COLUMNS[1]),
        coefficient(table, inside, COLUMNS[2]),
        coefficient(table, inside, COLUMNS[3]),
    )


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
def affine(c, x, y, z, w, COLUMNS: tl.constexpr):
    """c0*x + c1*y + c2*z + c3*w without the products whose column is negative or whose input is None; 0 without any."""
    total = None
    if COLUMNS[3] >= 0 and w is not None:
        total = c[3] * w
    if COLUMNS[2] >= 0 and z is not None:
        total = mul_add(c[2], z, total)
    if COLUMNS[1] >= 0 and y is not None:
        total = mul_add(c[1], y, total)
    if COLUMNS[0] >= 0 and x is not None:
        total = mul_add(c[0], x, total)
    if total is None:
        total = tl.zeros([1, 1], tl.float32)
    return total


@triton.jit
def square_root(a):
    """IEEE, of any argument."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def divide(a, b):
    """IEEE."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


# Beyond it the pseudo-Huber penalty is straight: a square would overflow.
STRAIGHT = tl.constexpr(1e18)


@triton.jit
def add_penalty(total, r, delta, KIND: tl.constexpr):
    """total + rho(r), operation for operation as csrc/ops.h."""
    if KIND == MSE:
        return mul_add(r, r, total)
    elif KIND == L1:
        return total + tl.abs(r)
    elif KIND == HUBER:
        size = tl.abs(r)
        return total + tl.where(size > delta, delta * (size - 0.5 * delta), 0.5 * (r * r))
    else:
        tl.static_assert(KIND == PSEUDO_HUBER)
        bent = clamp(r, -STRAIGHT, STRAIGHT)  # signed, for one root to serve the slope too
        root = square_root(mul_add(bent, bent, delta * delta))
        return total + 2.0 * delta * (divide(bent * bent, root + delta) + (tl.abs(r) - tl.abs(bent)))


@triton.jit
def half_slope(r, delta, KIND: tl.constexpr):
    """rho'(r) / 2, operation for operation as csrc/ops.h."""
    if KIND == MSE:
        return r
    elif KIND == L1:
        return tl.where(r > 0.0, 0.5, tl.where(r < 0.0, -0.5, r))
    elif KIND == HUBER:
        return 0.5 * clamp(r, -delta, delta)
    else:
        tl.static_assert(KIND == PSEUDO_HUBER)
        bent = clamp(r, -STRAIGHT, STRAIGHT)
        return delta * divide(bent, square_root(mul_add(bent, bent, delta * delta)))


@triton.jit
def blend(m, v, w):
    """w + m*(v - w); where m is 0 or 1 the one or the other, as csrc/ops.h."""
    return tl.where(m == 0, w, tl.where(m == 1, v, mul_add(m, v - w, w)))


@triton.jit
def clamp(v, low, high):
    """Comparisons, not minimum and maximum: NaN passes through."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


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
    w,
    v,
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
    w_strides,
    v_strides,
    out_strides,
    out2_strides,
    COLUMNS: tl.constexpr,
    COLUMNS2: tl.constexpr,
    CLAMP: tl.constexpr,
    FIFTH: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """out = c0*x + c1*y + c2*z + c3*w by COLUMNS, out2 by COLUMNS2; with CLAMP y becomes clamp(a0*x + a1*y + a3*w).

    FIFTH: of five streams, the columns of c4 in out and out2, which v has; noise is then v and not z.
    BLEND as the column of y and w: the sum of x and z is blended into w by y.
    """
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    if ALIGNED:
        D = D // V * V  # says that V divides D
    DTYPE: tl.constexpr = out.dtype.element_ty
    C: tl.constexpr = table.dtype.element_ty  # the compute type
    if NOISE != NO_NOISE:
        seed, offset = row_key(seed, offset, key, sample, first_sample, row, NOISE)
    c = coefficients(table, index, levels, row, K, SHARED, COLUMNS)
    if out2 is not None:
        d = coefficients(table, index, levels, row, K, SHARED, COLUMNS2)
    if CLAMP is not None:
        a = coefficients(table, index, levels, row, K, SHARED, CLAMP)
        low = as_double(low).to(C)
        high = as_double(high).to(C)
    if FIFTH is not None:
        e = coefficients(table, index, levels, row, K, SHARED, FIFTH)
    begin = tl.program_id(0) * steps
    end = tl.minimum(begin + steps, tl.cdiv(D, LANES * V)).to(tl.int32)
    for step in range(begin.to(tl.int32), end):
        first = tl.cast(step, tl.int64) * LANES
        live = tile_mask(row0, first, B, D, ROWS, LANES, V)
        xv = None
        yv = None
        zv = None
        wv = None
        if x is not None:
            xv = tl.load(at(x, row, first, D, sizes, x_strides, LANES, V), mask=live).to(C)
        if y is not None:
            yv = tl.load(at(y, row, first, D, sizes, y_strides, LANES, V), mask=live).to(C)
        if z is not None:
            zv = tl.load(at(z, row, first, D, sizes, z_strides, LANES, V), mask=live).to(C)
        if w is not None:
            wv = tl.load(at(w, row, first, D, sizes, w_strides, LANES, V), mask=live).to(C)
        if NOISE != NO_NOISE:
            fresh = normals(seed, offset, first, sizes, ROWS, LANES, V, NVIDIA).to(C)
            if FIFTH is None:
                zv = fresh
            else:
                vv = fresh
        elif FIFTH is not None:
            vv = tl.load(at(v, row, first, D, sizes, v_strides, LANES, V), mask=live).to(C)
        if CLAMP is not None:
            yv = clamp(affine(a, xv, yv, None, wv, CLAMP), low, high)
        if out2 is not None:
            v2 = affine(d, xv, yv, zv, wv, COLUMNS2)
            if FIFTH is not None and FIFTH[1] >= 0:
                v2 = mul_add(e[1], vv, v2)
            tl.store(at(out2, row, first, D, sizes, out2_strides, LANES, V), narrow(v2, DTYPE), mask=live)
        v1 = affine(c, xv, yv, zv, wv, COLUMNS)
        if COLUMNS[1] == BLEND:
            v1 = blend(yv, v1, wv)
        if FIFTH is not None and FIFTH[0] >= 0:
            v1 = mul_add(e[0], vv, v1)
        tl.store(at(out, row, first, D, sizes, out_strides, LANES, V), narrow(v1, DTYPE), mask=live)


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
    mask_seed,
    mask_offset,
    mask_key,
    mask_sample,
    mask_first_sample,
    thresholds,
    threshold_step,
    sums,
    counter,
    per_sample,
    loss,
    also,
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
    COLUMNS: tl.constexpr,
    FURTHER: tl.constexpr,
    KIND: tl.constexpr,
    KEEPS: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    NOISE: tl.constexpr,
    REDUCTION: tl.constexpr,
    MADE: tl.constexpr,
    FINAL_ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """r = mask * (pred + n1*y + n2*z); its gradient factor * weight * upstream / kept * rho'(r) / 2, and the loss.

    COLUMNS: an absent one, those of n1 and n2, and of rho's delta. FURTHER: that of one more factor of the weight, the
    two whose products with the samples' means are averaged in `also` (None without them), and an absent one.
    thresholds: (1 or B, 2) where the mask is drawn, else None; threshold_step: from row to row.
    kept: (B,) int64, the elements that count, or None for all (factor then holds 1 / D).
    Each program leaves its sums in `sums`; the last to come to `counter` adds them, in one order
    whoever comes last. per_sample None: no sums are wanted; loss None: no loss.
    MADE: grad holds the gradient for an upstream of 1. FINAL_ROWS: where rows are cut, of how many samples the last
    program adds the sums side by side; 0 where a program has whole rows.
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
    if thresholds is not None:
        mask_seed, mask_offset = row_key(mask_seed, mask_offset, mask_key, mask_sample, mask_first_sample, row, FOLDED)
        second = tl.load(thresholds + row * threshold_step + 1)
    c = coefficients(table, index, levels, row, K, SHARED, COLUMNS)
    further = coefficients(table, index, levels, row, K, SHARED, FURTHER)
    if grad is not None:
        scale = as_double(factor)
        if FURTHER[0] >= 0:
            scale *= further[0].to(tl.float64)
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
            zv = normals(seed, offset, first, sizes, ROWS, LANES, V, NVIDIA).to(C)
        r += affine(c, None, yv, zv, None, COLUMNS)
        keep = live
        if mask is not None:
            keep = live & (tl.load(at(mask, row, first, D, sizes, mask_strides, LANES, V), mask=live, other=0) != 0)
        if thresholds is not None:
            keep = live & counted(mask_seed, mask_offset, second, first, sizes, KEEPS, ROWS, LANES, V)
        # A select, not a product: what is masked out may be NaN.
        r = tl.where(keep, r, 0.0)
        if grad is not None:
            g = narrow(scale * half_slope(r, c[3], KIND), grad.dtype.element_ty)
            tl.store(at(grad, row, first, D, sizes, grad_strides, LANES, V), g, mask=live)
        if per_sample is not None:
            total = add_penalty(total, r, c[3], KIND)
    if per_sample is not None:
        mine = row_sums(total, ROWS, LANES, V)
        existing = rows_there(row0, B, ROWS)
        if FINAL_ROWS == 0:
            part, mean = finish_rows(mine, row, existing, further, weight, kept, per_sample, D, FURTHER, REDUCTION)
            if loss is not None:
                programs = tl.cdiv(B, ROWS)
                tl.store(sums + row0 // ROWS, sum_of_rows(part, existing, ROWS))
                if also is not None:
                    for k in tl.static_range(2):
                        weighed = sum_of_rows(mean * further[k + 1], existing, ROWS)
                        tl.store(sums + (k + 1) * programs + row0 // ROWS, weighed)
                if last_to_finish(counter, programs):
                    write_loss(loss, add_parts(sums, programs), B, REDUCTION)
                    if also is not None:
                        for k in tl.static_range(2):
                            write_loss(also + k, add_parts(sums + (k + 1) * programs, programs), B, REDUCE_MEAN)
        else:
            tiles = tl.num_programs(0)
            tl.store(sums + row * tiles + tl.program_id(0), mine, mask=existing)
            if last_to_finish(counter, tl.cdiv(B, ROWS) * tiles):
                finish_tiles(
                    sums,
                    tiles,
                    table,
                    index,
                    levels,
                    weight,
                    kept,
                    per_sample,
                    loss,
                    also,
                    B,
                    D,
                    K,
                    SHARED,
                    FURTHER,
                    REDUCTION,
                    FINAL_ROWS,
                )


@triton.jit
def reciprocal(kept):
    """1 / kept, 0 for none."""
    return tl.where(kept > 0, 1.0 / tl.maximum(kept, 1).to(tl.float64), 0.0)


@triton.jit
def finish_rows(sums, row, existing, c, weight, kept, per_sample, D, FURTHER: tl.constexpr, REDUCTION: tl.constexpr):
    """Writes the mean of each row's sum; returns what it adds to the loss, and the mean. c: its columns FURTHER."""
    if kept is None:
        mean = sums / D.to(tl.float64)
    else:
        mean = sums * reciprocal(tl.load(kept + row, mask=existing, other=0))
    tl.store(per_sample + row, mean.to(per_sample.dtype.element_ty), mask=existing)
    part = sums if REDUCTION == REDUCE_SUM else mean
    if weight is not None:
        part *= tl.load(weight + row, mask=existing, other=0.0).to(tl.float64)
    if FURTHER[0] >= 0:
        part *= c[0].to(tl.float64)
    return part, mean


@triton.jit
def sum_of_rows(values, existing, ROWS: tl.constexpr):
    """A program's rows, added."""
    return values if ROWS == 1 else tl.sum(tl.where(existing, values, 0.0))


@triton.jit
def last_to_finish(counter, programs):
    """Whether all other programs have left their sums. The count starts again for the next launch."""
    # This program's sums are written before it counts itself. On AMD GPUs, too, the barrier is a fence of the
    # work-group for global memory; the addition's acq_rel passes all its threads' writes on to the device.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def add_parts(sums, count):
    """The sum of `count` doubles, past the caches that other programs do not write through."""
    lanes = tl.arange(0, FINAL)
    total = tl.zeros([FINAL], tl.float64)
    for first in range(0, count.to(tl.int32), PARTS_AT_ONCE * FINAL):
        for k in tl.static_range(PARTS_AT_ONCE):
            part = first + k * FINAL + lanes
            total += tl.load(sums + part, mask=part < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def finish_tiles(
    sums,
    tiles,
    table,
    index,
    levels,
    weight,
    kept,
    per_sample,
    loss,
    also,
    B,
    D,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    FURTHER: tl.constexpr,
    REDUCTION: tl.constexpr,
    FINAL_ROWS: tl.constexpr,
):
    """The loss from the (B, tiles) sums, the further means, and the mean of each row on the way."""
    total = tl.zeros([FINAL_ROWS], tl.float64)
    also0 = tl.zeros([FINAL_ROWS], tl.float64)
    also1 = tl.zeros([FINAL_ROWS], tl.float64)
    for first in range(0, B.to(tl.int32), FINAL_ROWS):
        row = first + tl.arange(0, FINAL_ROWS)
        existing = row < B
        c = coefficients(table, index, levels, tl.minimum(row, B - 1), K, SHARED, FURTHER)
        row_total = add_tiles(sums, tiles, row, B, FINAL_ROWS)
        part, mean = finish_rows(row_total, row, existing, c, weight, kept, per_sample, D, FURTHER, REDUCTION)
        total += tl.where(existing, part, 0.0)
        if also is not None:
            also0 += tl.where(existing, mean * c[1], 0.0)
            also1 += tl.where(existing, mean * c[2], 0.0)
    if loss is not None:
        write_loss(loss, tl.sum(total), B, REDUCTION)
    if also is not None:
        write_loss(also, tl.sum(also0), B, REDUCE_MEAN)
        write_loss(also + 1, tl.sum(also1), B, REDUCE_MEAN)


@triton.jit
def add_tiles(sums, tiles, row, B, FINAL_ROWS: tl.constexpr):
    """The sum over each row's tiles, of FINAL_ROWS rows."""
    TILES: tl.constexpr = FINAL // FINAL_ROWS
    total = tl.zeros([FINAL_ROWS, TILES], tl.float64)
    address = sums + row[:, None].to(tl.int64) * tiles
    for first in range(0, tiles, TILES_AT_ONCE * TILES):
        for k in tl.static_range(TILES_AT_ONCE):
            tile = first + k * TILES + tl.arange(0, TILES)[None, :]
            live = (row[:, None] < B) & (tile < tiles)
            total += tl.load(address + tile, mask=live, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 1)


@triton.jit
def write_loss(loss, value, B, REDUCTION: tl.constexpr):
    if REDUCTION == REDUCE_MEAN:
        value /= B.to(tl.float64)
    tl.store(loss, value.to(loss.dtype.element_ty))


@triton.jit
def count_kernel(
    kept,
    mask,
    seed,
    offset,
    key,
    sample,
    first_sample,
    thresholds,
    threshold_step,
    upstream,
    B,
    D,
    steps,
    times,
    sizes,
    mask_strides,
    KEEPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
):
    """kept (B,) int64, zeros before: `times` the elements of each row that a mask has, which is in memory or drawn.

    The counts are for a gradient that was made before; where its upstream is 1 nobody asks for them.
    """
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    if upstream is not None:
        if tl.load(upstream) == 1.0:
            return
    if ALIGNED:
        D = D // V * V  # says that V divides D
    if mask is None:
        seed, offset = row_key(seed, offset, key, sample, first_sample, row, FOLDED)
        second = tl.load(thresholds + row * threshold_step + 1)
    total = tl.zeros([ROWS, LANES * V], tl.int32)
    begin = tl.program_id(0) * steps
    end = tl.minimum(begin + steps, tl.cdiv(D, LANES * V)).to(tl.int32)
    for step in range(begin.to(tl.int32), end):
        first = tl.cast(step, tl.int64) * LANES
        live = tile_mask(row0, first, B, D, ROWS, LANES, V)
        if mask is None:
            counts = counted(seed, offset, second, first, None, KEEPS, ROWS, LANES, V)
        else:
            counts = tl.load(at(mask, row, first, D, sizes, mask_strides, LANES, V), mask=live, other=0) != 0
        total += (live & counts).to(tl.int32)
    if ROWS == 1:
        tl.atomic_add(kept + row, tl.sum(total).to(tl.int64) * times, sem="relaxed")
    else:
        existing = rows_there(row0, B, ROWS)
        tl.atomic_add(kept + row, tl.sum(total, 1, keep_dims=True).to(tl.int64) * times, mask=existing, sem="relaxed")


@triton.jit
def corrupt_kernel(
    x,
    out,
    seed,
    offset,
    key,
    sample,
    first_sample,
    thresholds,
    threshold_step,
    low,
    high,
    B,
    D,
    steps,
    sizes,
    x_strides,
    out_strides,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
):
    """out = x, or `low` where its word is below a row's first threshold, or `high` below its second."""
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    if ALIGNED:
        D = D // V * V  # says that V divides D
    DTYPE: tl.constexpr = out.dtype.element_ty
    C: tl.constexpr = tl.float64 if tl.float64 == DTYPE else tl.float32
    low = narrow(as_double(low).to(C), DTYPE)
    high = narrow(as_double(high).to(C), DTYPE)
    seed, offset = row_key(seed, offset, key, sample, first_sample, row, FOLDED)
    threshold = thresholds + row * threshold_step
    threshold0 = tl.load(threshold)
    threshold1 = tl.load(threshold + 1)
    begin = tl.program_id(0) * steps
    end = tl.minimum(begin + steps, tl.cdiv(D, LANES * V)).to(tl.int32)
    for step in range(begin.to(tl.int32), end):
        first = tl.cast(step, tl.int64) * LANES
        live = tile_mask(row0, first, B, D, ROWS, LANES, V)
        xv = tl.load(at(x, row, first, D, sizes, x_strides, LANES, V), mask=live)
        drawn = words(seed, offset, first, sizes, ROWS, LANES, V)
        v = tl.where(below(drawn, threshold1), tl.where(below(drawn, threshold0), low, high), xv)
        tl.store(at(out, row, first, D, sizes, out_strides, LANES, V), v, mask=live)


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
    """out (B, tiles, 3): sums over this program's part of each row of g*x, g*y, g*z; 0 for those that are absent."""
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
            gz = mul_add(gv, normals(seed, offset, first, sizes, ROWS, LANES, V, NVIDIA).to(C), gz)
        elif z is not None:
            zv = tl.load(at(z, row, first, D, sizes, z_strides, LANES, V), mask=live, other=0.0).to(C)
            gz = mul_add(gv, zv, gz)
    existing = rows_there(row0, B, ROWS)
    address = out + (row * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(address, row_sums(gx, ROWS, LANES, V) if x is not None else 0.0, mask=existing)
    tl.store(address + 1, row_sums(gy, ROWS, LANES, V) if y is not None else 0.0, mask=existing)
    tl.store(address + 2, row_sums(gz, ROWS, LANES, V) if NOISE != NO_NOISE or z is not None else 0.0, mask=existing)


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
    limit,
    NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """out (B, D): the normals, or for an int64 `out` words w as floor(w * limit / 2^32)."""
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
            word = words(seed, offset, first, None, ROWS, LANES, V).to(tl.uint64)
            value = (word * limit.to(tl.uint64) >> 32).to(tl.int64)
        else:
            value = narrow(normals(seed, offset, first, None, ROWS, LANES, V, NVIDIA), DTYPE)
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
