"""Cases of the ops that torch's own kernels run: what they save is not in a kernel, if they save anything."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import dae_fast as df
from dae_fast.ops.corruption import PATCH_TAG
from dae_fast.ops.penalties import CONTRACTION_TAG
from tests.cases import NORMAL, Case, Inputs, Law

RATIO, RATE, WIDTH = 0.75, 0.05, 8


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
