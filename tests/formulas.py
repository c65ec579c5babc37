"""The library's formulas in numpy float64, for the fuzzer: no code of the library, nor torch's arithmetic.

Each returns (value, size), size the sum of its terms' sizes, of which a rounding is a share.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
MASK32 = np.uint64(0xFFFFFFFF)


def philox(counter: Array, key: tuple[Array, Array]) -> Array:
    """Salmon et al. 2011: (..., 4) uint64 words of (..., 4) and a key of two; Philox4x32-10."""
    c = [np.asarray(counter[..., i], np.uint64) for i in range(4)]
    k0, k1 = (np.asarray(k, np.uint64) for k in key)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & MASK32, (p0 >> 32) ^ c[3] ^ k1, p0 & MASK32]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & MASK32, (k1 + np.uint64(0xBB67AE85)) & MASK32
    return np.stack(c, -1)


def blocks(seed: Array, offset: Array, n: Array) -> Array:
    """(..., 4) words: block n of key (seed, offset)."""
    seed, at = np.asarray(seed, np.uint64), np.asarray(offset, np.uint64) + np.asarray(n, np.uint64)
    zero = np.zeros_like(at)
    return philox(np.stack((at & MASK32, at >> np.uint64(32), zero, zero), -1), (seed & MASK32, seed >> np.uint64(32)))


def fold(seed: Array, offset: Array, data: Array) -> tuple[Array, Array]:
    r = blocks(seed, offset, data)
    return r[..., 0] | r[..., 1] << np.uint64(32), r[..., 2] | r[..., 3] << np.uint64(32)


def words(seed: int, offset: int, ids: Array, D: int) -> Array:
    """(B, D) uint64: row b is the stream of the key folded with its id."""
    with np.errstate(over="ignore"):
        keys = fold(np.uint64(seed), np.uint64(offset), np.asarray(ids).astype(np.int64).astype(np.uint64))
        n = np.arange((D + 3) // 4, dtype=np.uint64)[None]
        return blocks(keys[0][:, None], keys[1][:, None], n).reshape(len(ids), 4 * n.size)[:, :D]


def normals(seed: int, offset: int, ids: Array, D: int) -> Array:
    """Box and Muller 1958, of words (radius, angle)."""
    pairs = 2 * ((D + 3) // 4)
    w = words(seed, offset, ids, 2 * pairs).reshape(len(ids), pairs, 2)
    u = w.astype(np.float64) * 2.0**-32 + 2.0**-33
    rest = (np.float64(2**32 - 1) - w.astype(np.float64)) * 2.0**-32 + 2.0**-33  # 1 - u, exactly
    log = np.where(u > 0.5, np.log1p(-rest), np.log(u))[..., 0]
    s, angle = np.sqrt(-2 * log), 2 * np.pi * u[..., 1]
    return np.stack((s * np.cos(angle), s * np.sin(angle)), -1).reshape(len(ids), 2 * pairs)[:, :D]


def column(c: Array, like: Array) -> Array:
    """Of each sample, to multiply."""
    return np.asarray(c, np.float64).reshape(-1, *[1] * (like.ndim - 1))


def mixture(*terms: tuple[Array, Array]) -> tuple[Array, Array]:
    """sum_k c_k[b] * t_k."""
    products = [column(c, t) * t for c, t in terms]
    return sum(products), sum(np.abs(p) for p in products)


# p0, p1 of prediction = p0*x0 + p1*eps.
PREDICTIONS = {
    "eps": lambda a, s: (0 * a, 0 * a + 1),
    "x0": lambda a, s: (0 * a + 1, 0 * a),
    "v": lambda a, s: (-s, a),
    "score": lambda a, s: (0 * a, -1 / s),
    "flow": lambda a, s: (0 * a - 1, 0 * a + 1),
}


def estimates(x_t: Array, pred: Array, predict: str, a: Array, s: Array) -> tuple[Array, Array]:
    """x0 and its terms' size: x_t = a*x0 + s*eps and the prediction solved for x0 by Cramer's rule."""
    p0, p1 = PREDICTIONS[predict](a, s)
    det = a * p1 - s * p0
    return mixture((p1 / det, x_t), (-s / det, pred))


def from_x0(x_t: Array, x0: Array, to: str, a: Array, s: Array) -> tuple[Array, Array]:
    q0, q1 = PREDICTIONS[to](a, s)
    return mixture((q1 / s, x_t), (q0 - q1 * a / s, x0))


def rho(r: Array, kind: str, delta: Array) -> Array:
    size = np.abs(r)
    if kind == "mse":
        return r * r
    if kind == "l1":
        return size
    if kind == "huber":
        return np.where(size <= delta, r * r / 2, delta * (size - delta / 2))
    return 2 * delta * (np.hypot(r, delta) - delta)


def slope(r: Array, kind: str, delta: Array) -> Array:
    if kind == "mse":
        return 2 * r
    if kind == "l1":
        return np.sign(r)
    if kind == "huber":
        return np.clip(r, -delta, delta)
    return 2 * delta * r / np.hypot(r, delta)
