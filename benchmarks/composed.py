"""Cases of the ops that torch's own kernels run: what they save is not in a kernel, if they save anything."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import dae_fast as df
from dae_fast.ops.corruption import PATCH_TAG
from dae_fast.ops.penalties import CONTRACTION_TAG
from dae_fast.ops.structured import PYRAMID_TAG, enlarge

from .cases import NORMAL, Case, Inputs, Law, noised

RATIO, RATE, WIDTH, DISCOUNT = 0.75, 0.05, 8, 0.8


def _patches(x: Tensor) -> Tensor:
    """(B, N, D)."""
    return x[:, :, None] if x.dim() == 2 else x.flatten(1, -2)


def _taken(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def _visible(i: Inputs) -> Tensor:
    x = _patches(i["x"])
    return _taken(x, df.patch_mask(i["noise"], x.shape[0], x.shape[1], RATIO, device=x.device).ids_keep)


def _plain_visible(i: Inputs, u: Tensor) -> Tensor:
    """The official code's random_masking, with the order of its mask tokens too."""
    x = _patches(i["x"])
    order = u.argsort(1)
    restore = order.argsort(1)
    kept = int(x.shape[1] * (1 - RATIO))
    mask = torch.ones_like(u)
    mask[:, :kept] = 0
    mask.gather(1, restore)
    return _taken(x, order[:, :kept])


ORDER = Law(
    lambda like: torch.rand(_patches(like).shape[:2], device=like.device),
    lambda n, like, _: n.fold_in(PATCH_TAG).bits(_patches(like).shape[:2], device=like.device) * 2.0**-32,
)


def _embedded(i: Inputs) -> Tensor:
    """As many features as the samples have elements, for the bytes to be those of a sample tensor."""
    return df.timestep_embedding(i["t"], i["x"][0].numel()).reshape(i["x"].shape)


def _plain_embedded(i: Inputs, _: Tensor) -> Tensor:
    """Ho et al.'s code."""
    x, half = i["x"], i["x"][0].numel() // 2
    frequencies = torch.exp(torch.arange(half, device=x.device, dtype=x.dtype) * (-math.log(10000.0) / (half - 1)))
    angles = i["t"].to(x.dtype)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), 1).reshape(x.shape)


def _features(i: Inputs) -> Tensor:
    x = i["x"]
    return df.fourier_embedding(i["t"].double() / 1000, i["noise"], x[0].numel()).reshape(x.shape)


def _plain_features(i: Inputs, W: Tensor) -> Tensor:
    """score_sde's GaussianFourierProjection."""
    x = i["x"]
    angles = 2 * math.pi * (i["t"].to(x.dtype) / 1000)[:, None] * W
    return torch.cat((angles.sin(), angles.cos()), 1).reshape(x.shape)


FREQUENCIES = Law(
    lambda like: torch.randn(1, like[0].numel() // 2, dtype=like.dtype, device=like.device),
    lambda n, like, dtype: n.normal((1, like[0].numel() // 2), dtype=dtype, device=like.device),
    lambda like: like[0].numel() // 2,
)


def _signal(x: Tensor) -> Tensor:
    """With a spatial dimension at least."""
    return x[:, None] if x.dim() == 2 else x


def _pyramid_noised(i: Inputs) -> Tensor:
    x0 = i["x0"]
    x_t = df.add_noise(_signal(x0), df.PyramidNoise(i["noise"], DISCOUNT), i["level"])
    return x_t.reshape(x0.shape)


def _pyramid(like: Tensor, normal: Callable[[int, torch.Size], Tensor]) -> Tensor:
    """Of normal(k, shape) at each level k."""
    whole = _signal(like)
    total, norm, size = normal(0, whole.shape), 1.0, list(whole.shape[2:])
    for k in range(1, max(size).bit_length()):
        size = [max(1, s // 2) for s in size]
        total = total + DISCOUNT**k * enlarge(normal(k, torch.Size((*whole.shape[:2], *size))), tuple(whole.shape[2:]))
        norm += DISCOUNT ** (2 * k)
    return (total / norm**0.5).reshape(like.shape)


def _pyramid_of(noise: df.Noise, like: Tensor, dtype: torch.dtype) -> Tensor:
    lower = noise.fold_in(PYRAMID_TAG)
    return _pyramid(like, lambda k, s: (lower.fold_in(k) if k else noise).normal(s, dtype=dtype, device=like.device))


PYRAMID = Law(
    lambda like: _pyramid(like, lambda k, shape: torch.randn(shape, dtype=like.dtype, device=like.device)),
    _pyramid_of,
    lambda like: _signal(like).shape[:2].numel(),
)


def _code(inputs: Inputs, g: torch.Generator) -> None:
    inputs["x"] = torch.sigmoid(inputs["x"].double()).to(inputs["x"].dtype)


def _plain_sparsity(i: Inputs, _: Tensor) -> Tensor:
    rho = i["x"].mean(0)
    return (RATE * torch.log(RATE / rho) + (1 - RATE) * torch.log((1 - RATE) / (1 - rho))).sum()


def _layer(inputs: Inputs, g: torch.Generator) -> None:
    """A layer's sigmoids, and its weight of WIDTH inputs."""
    _code(inputs, g)
    x = inputs["x"]
    inputs["W"] = torch.randn(x[0].numel(), WIDTH, generator=g, dtype=torch.float64).to(x.dtype)


def _plain_sigmoid_contraction(i: Inputs, _: Tensor) -> Tensor:
    h, W = i["x"].flatten(1), i["W"]
    return ((h * (1 - h)).square() @ W.square().sum(1)).mean()


def _plain_contraction(i: Inputs, v: Tensor) -> Tensor:
    _, pull = torch.func.vjp(torch.tanh, i["x"])
    return pull(v)[0].square().flatten(1).sum(1).mean()


DIRECTIONS = Law(
    torch.randn_like,
    lambda n, like, dtype: NORMAL.given(n.fold_in(CONTRACTION_TAG).fold_in(0), like, dtype),
)

CASES = (
    Case("patch_mask", _visible, _plain_visible, ("x",), (), law=ORDER),
    Case("timestep_embedding", _embedded, _plain_embedded, ("x",), (), fresh=False, streams=1, sums=(0,)),
    Case("fourier_embedding", _features, _plain_features, ("x",), (), streams=1, sums=(0,), law=FREQUENCIES),
    Case("add_noise-pyramid", _pyramid_noised, noised, ("x0",), ("x0",), law=PYRAMID),
    Case(
        "kl_sparsity",
        lambda i: df.kl_sparsity(i["x"], RATE),
        _plain_sparsity,
        ("x",),
        ("x",),
        fresh=False,
        loss=True,
        extra=_code,
    ),
    Case(
        "sigmoid_contraction",
        lambda i: df.sigmoid_contraction(i["x"].flatten(1), i["W"]),
        _plain_sigmoid_contraction,
        ("x",),
        ("x", "W"),
        fresh=False,
        loss=True,
        extra=_layer,
    ),
    Case(
        "contraction",
        lambda i: df.contraction(torch.tanh, i["x"], i["noise"]),
        _plain_contraction,
        ("x",),
        ("x",),
        loss=True,
        law=DIRECTIONS,
    ),
)
