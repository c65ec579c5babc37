"""The Triton kernel of Langevin chains of a known score: all steps in one launch, as csrc/cuda/chain.cu."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .gaussian import exponential
from .kernels import RAW, as_double, at, fold_in, normals, row_key, rows_of, tile_mask

# A double well, one Gaussian, several.
WELL = tl.constexpr(0)
ONE = tl.constexpr(1)
MIXTURE = tl.constexpr(2)


@triton.jit
def pull_of(x, means, precisions, log_weights, k, WIDTH: tl.constexpr):
    """Of component k: (mean - x) * precision, and its log density (ROWS, 1)."""
    element = tl.arange(0, WIDTH)[None, :]
    away = tl.load(means + k * WIDTH + element) - x
    by = away * tl.load(precisions + k * WIDTH + element)
    square = tl.sum(away * by, 1, keep_dims=True)
    return by, tl.fma(square, -0.5, tl.load(log_weights + k))


@triton.jit
def score_of(x, means, precisions, log_weights, components, WIDTH: tl.constexpr, KIND: tl.constexpr):
    pull, largest = pull_of(x, means, precisions, log_weights, 0, WIDTH)
    if KIND == MIXTURE:
        # The largest density is kept out of every exponent.
        total = tl.zeros_like(largest) + 1.0
        for k in range(1, components):
            by, density = pull_of(x, means, precisions, log_weights, k, WIDTH)
            top = tl.maximum(largest, density)
            old = exponential(largest - top)
            next = exponential(density - top)
            pull = tl.fma(next, by, old * pull)
            total = tl.fma(total, old, next)
            largest = top
        pull = pull * tl.div_rn(tl.full([1, 1], 1.0, tl.float32), total)
    return pull


@triton.jit
def chain_kernel(
    x,
    out,
    means,
    precisions,
    log_weights,
    seed,
    offset,
    key,
    sample,
    first_sample,
    step,
    spread,
    slope,
    square,
    turns,
    components,
    B,
    D,
    NOISE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    V: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """out: x + step*score + spread*eps, `turns` times; turn k has the noise of the key folded with k.

    x, out: (B, D), a row in LANES lanes. A mixture's tables are as csrc/chain.h has them; a double well has slope and
    square. Numbers are the bits of doubles.
    """
    row0, row = rows_of(B, ROWS)
    if row0 >= B:
        return
    first = row0 ^ row0
    live = tile_mask(row0, first, B, D, ROWS, LANES, V)
    state = tl.load(at(x, row, first, D, None, None, LANES, V), mask=live, other=0.0)
    step = as_double(step).to(tl.float32)
    spread = as_double(spread).to(tl.float32)
    if KIND == WELL:
        slope = as_double(slope).to(tl.float32)
        square = as_double(square).to(tl.float32)
    seed, offset = row_key(seed, offset, key, None, None, None, RAW)
    for turn in range(turns):
        own_seed, own_offset = fold_in(seed, offset, tl.cast(turn, tl.uint64))
        own_seed, own_offset = row_key(own_seed, own_offset, None, sample, first_sample, row, NOISE)
        z = normals(own_seed, own_offset, first, None, ROWS, LANES, V, NVIDIA)
        if KIND == WELL:
            score = (state * (state * state - square)) * slope
        else:
            score = score_of(state, means, precisions, log_weights, components, LANES * V, KIND)
        state = state + tl.fma(score, step, spread * z)
    tl.store(at(out, row, first, D, None, None, LANES, V), state, mask=live)
