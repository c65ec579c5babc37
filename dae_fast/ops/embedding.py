"""Features of a level for a network: sinusoids of it, written straight where they are wanted."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .._torch import outside_modes
from ..checks import DTYPES, Array
from ..coefficients import changing
from ..kernels import reference
from ..kernels.dispatch import kernels
from ..noise import Noise
from ..primitives.memory import overlaps_itself, partly_overlap
from ..primitives.sums import written
from ..routing import Route, on_mesh, route, wants_grad

__all__ = ["fourier_embedding", "timestep_embedding"]


def timestep_embedding(
    t: Tensor | Array,
    dim: int,
    *,
    max_period: float = 10000.0,
    flip: bool = False,
    freq_shift: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """[sin(t * w_i), cos(t * w_i)], w_i = max_period^(-i / (dim // 2 - freq_shift)), i = 0 .. dim // 2 - 1.

    t: (B,) integers or floats      dim: at least 2; where it is odd the last column is 0
    flip: the cosines first (diffusers' flip_sin_to_cos)
    freq_shift: 1 in Ho et al.'s code, 0 in Vaswani et al. and in most since (diffusers' downscale_freq_shift)
    out: (B, dim) of any floating dtype and strides, which gets the fp32 values: the columns beside the noised input,
            say, so that nothing is concatenated (add_noise has an out too)
    returns: (B, dim) fp32, or out
    The angles and their sines are as of float64 and rounded once, for t up to 1e6. Gradient: of a floating t, without
    out. Raises ValueError on a shape mismatch or a gradient with out. Vaswani et al. 2017, section 3.5; Ho et al. 2020,
    appendix B.
    """
    op = "timestep_embedding"
    t = checks.as_tensor(t)
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: t must be a tensor (B,), got {type(t).__name__}")
    if t.dim() != 1 or t.dtype == torch.bool or t.is_complex():
        raise ValueError(f"{op}: t must be integers or floats of shape (B,), got {t.dtype} of {tuple(t.shape)}")
    dim, half = checks.integer(op, "dim", dim), checks.integer(op, "dim", dim) // 2
    max_period = checks.number(op, "max_period", max_period, "positive and finite")
    freq_shift = checks.number(op, "freq_shift", freq_shift, "finite")
    checks.flag(op, "flip", flip)
    if half < 1 or half <= freq_shift:
        raise ValueError(f"{op}: dim // 2 must be at least 1 and above freq_shift ({freq_shift}), got dim = {dim}")
    way = route(op, t, out)
    if way is Route.DIRECT:
        W = _kept_frequencies(half, max_period, freq_shift, t.device)
    else:
        W = _frequencies(half, max_period, freq_shift, t)
    return _waves(op, way, t, W, dim, flip, out)


def _frequencies(half: int, max_period: float, freq_shift: float, like: Tensor) -> Tensor:
    """(1, half) fp64, in turns."""
    i = torch.arange(half, dtype=torch.float64, device=like.device)
    period: Any = changing(max_period, like)
    log = period.log() if isinstance(period, Tensor) else math.log(period)
    return torch.exp(i * (-log / (half - freq_shift)))[None] / (2 * math.pi)


@lru_cache(maxsize=64)
def _kept_frequencies(half: int, max_period: float, freq_shift: float, device: torch.device) -> Tensor:
    with outside_modes():
        return _frequencies(half, max_period, freq_shift, torch.empty(0, device=device))


def fourier_embedding(
    x: Tensor, noise: Noise, dim: int, *, scale: float = 1.0, flip: bool = False, out: Tensor | None = None
) -> Tensor:
    """[sin(2 pi x W), cos(2 pi x W)], W of independent N(0, scale^2): Gaussian random Fourier features.

    x: (B,) or (B, D) floats: a level's log sigma, say, or coordinates      noise: Noise, whose normals of shape
    (D, dim // 2) are W / scale: the same features as long as the key is the same, no buffer to keep
    dim: even      flip: the cosines first      out, returns, gradient, errors: as timestep_embedding
    Tancik et al. 2020, section 3; for a level Song et al. 2021, appendix C.
    """
    op = "fourier_embedding"
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor (B,) or (B, D), got {type(x).__name__}")
    if x.dtype not in DTYPES or x.layout != torch.strided or x.dim() not in (1, 2):
        raise ValueError(f"{op}: x must be floats of shape (B,) or (B, D), got {x.dtype} of {tuple(x.shape)}")
    if not isinstance(noise, Noise):
        raise TypeError(f"{op}: noise must be a Noise, got {type(noise).__name__}")
    dim, scale = checks.integer(op, "dim", dim), checks.number(op, "scale", scale, "finite")
    checks.flag(op, "flip", flip)
    if dim < 2 or dim % 2:
        raise ValueError(f"{op}: dim must be even and at least 2, got {dim}")
    K = x.shape[1] if x.dim() == 2 else 1
    noise._check(op, K, x.device)
    W = noise.normal((K, dim // 2), dtype=torch.float64, device=x.device)
    return _waves(op, route(op, x, W, out), x, W if scale == 1 else W * scale, dim, flip, out)


def _waves(op: str, way: Route, x: Tensor, W: Tensor, D: int, flip: bool, out: Tensor | None) -> Tensor:
    """Sines and cosines of 2 pi x W, in out or in fp32. x (B,) or (B, K), W (K, D // 2) fp64."""
    shape = (x.shape[0], D)
    if out is not None:
        _check_out(op, out, shape, x)
    if (mesh := on_mesh(x)) is not None:
        made = mesh.of_samples(lambda part: _waves(op, route(op, part), part, W, D, flip, None), op, x, shape)
        return made if out is None else out.copy_(made)
    columns = x.double()
    if way is Route.DIRECT and not wants_grad(x):
        if out is None:
            made = torch.empty(shape, dtype=torch.float32, device=x.device)
            kernels(x, op).embedding(columns, W, flip, made)
            return made
        if overlaps_itself(out):
            raise ValueError(f"{op}: out has several elements in one place of memory (an expanded tensor?)")
        kernels(x, op).embedding(columns.clone() if partly_overlap(out, columns) else columns, W, flip, out)
        written(out)
        return out
    columns = columns if x.dim() == 2 else columns[:, None]
    if way is Route.REFERENCE:
        made = reference.waves(columns, W, D, flip)
    else:
        made = torch.ops.dae_fast.embedding(columns, W, D, flip, op)
    return made if out is None else out.copy_(made)


def _check_out(op: str, out: Tensor, shape: tuple[int, int], x: Tensor) -> None:
    if not isinstance(out, Tensor) or out.dtype not in DTYPES:
        raise TypeError(f"{op}: out must be a floating tensor, got {getattr(out, 'dtype', type(out).__name__)}")
    if out.shape != shape or out.device != x.device:
        raise ValueError(
            f"{op}: out must have shape {shape} and be on {x.device}, got {tuple(out.shape)} on {out.device}"
        )
    if wants_grad(x, out):
        raise ValueError(f"{op}: out= has no gradient; call it under torch.no_grad() or without out")
