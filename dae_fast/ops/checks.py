"""Argument checks that the ops share: each says the op, the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..level import Level
from ..noise import Noise

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


def samples(op: str, name: str, x: Tensor) -> None:
    """A floating tensor (B, ...)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {x.layout}")
    if x.dim() == 0:
        raise ValueError(f"{op}: {name} must have a batch dimension, got shape ()")


def like(op: str, name: str, t: Tensor, ref_name: str, ref: Tensor) -> None:
    """A floating tensor of ref's shape and device."""
    samples(op, name, t)
    if t.shape != ref.shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(ref.shape)}, got {tuple(t.shape)}")
    if t.device != ref.device:
        raise ValueError(f"{op}: {name} must be on {ref.device} like {ref_name}, got {t.device}")


def noise_for(op: str, noise: Noise | Tensor, x: Tensor, x_name: str) -> tuple[Tensor | None, Noise | None]:
    """(tensor, None) or (None, Noise), fit for batch x."""
    if isinstance(noise, Tensor):
        like(op, "noise", noise, x_name, x)
        return noise, None
    if not isinstance(noise, Noise):
        raise TypeError(f"{op}: noise must be a Noise or a tensor like {x_name}, got {type(noise).__name__}")
    noise._check(op, x.shape[0], x.device)
    return None, noise


def level_for(op: str, level: Level) -> None:
    if not isinstance(level, Level):
        got = type(level).__name__
        raise TypeError(f"{op}: level must be a Level, as schedule[t] or Level(alpha, sigma), got {got}")


def promote(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors (None stays None) to their common dtype, as torch's own arithmetic would."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if len(dtypes) == 1:
        return tensors
    common = dtypes.pop()
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return tuple(None if t is None else t.to(common) for t in tensors)
