"""vmap: the vmapped dimension becomes part of the batch. Every instance gets the noise that it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Arguments with a row for each sample.
SAMPLES = ("x", "y", "z", "w", "v", "pred", "upstream", "mask", "mu", "log_var", "eps", "z_grad", "kl_grad")
Rule = Callable[..., tuple[Any, Any]]


def rule(op: Any) -> Rule:
    """For torch.library.register_vmap; `op` takes arguments of the names that library.py gives them."""
    names = [argument.name for argument in op._schema.arguments]

    def merged_call(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        V = info.batch_size
        given = dict(zip(names, arguments, strict=False))  # torch leaves out what is at its default
        dims = dict(zip(names, in_dims, strict=False))
        if dims.get("W") is not None:  # frequencies of its own for each instance: one call after another
            apart = [
                [a if d is None else a.select(d, v) for a, d in zip(arguments, in_dims, strict=True)] for v in range(V)
            ]
            return torch.stack([op(*each) for each in apart]), 0
        if any(dims.get(name) is not None for name in ("key", "mask_key", "data")):
            raise ValueError(
                "vmap over noise keys is not supported: share one key and vmap over its sample ids, "
                "Noise(seed, sample=ids)"
            )
        for name in SAMPLES:
            if name in given:
                given[name] = merge(given[name], dims[name], V)
        if "B" in given:
            B, given["B"] = given["B"], V * given["B"]
        else:
            B = next(given[name] for name in ("x", "pred", "mu") if name in given).shape[0] // V
        if "table" in given:
            table, index = merge_rows(V, B, given["table"], dims["table"], given["index"], dims["index"])
            given["table"], given["index"] = table, index
        if given.get("thresholds") is not None:
            given["thresholds"], _ = merge_rows(V, B, given["thresholds"], dims["thresholds"], None, None)
        for of in ("", "mask_"):
            key = given.get(f"{of}key")
            if key is None:
                continue
            ids = given[f"{of}sample"]
            if ids is None:
                count = B // given.get(f"{of}rows_per_sample", 1)
                ids = torch.arange(count, device=key.device) + given[f"{of}first_sample"]
            given[f"{of}sample"], given[f"{of}first_sample"] = merge(ids, dims[f"{of}sample"], V), 0
        outputs = op(**given)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (V, B)), 0
        return tuple(o.unflatten(0, (V, B)) for o in outputs), (0,) * len(outputs)

    return merged_call


def merge(t: Tensor | None, dim: int | None, V: int) -> Tensor | None:
    """(V, B, ...), the vmapped dimension at `dim`, or (B, ...) shared by all, to (V * B, ...)."""
    if t is None:
        return None
    spread = t.unsqueeze(0).expand(V, *t.shape) if dim is None else t.movedim(dim, 0)
    return spread.flatten(0, 1)


def merge_rows(
    V: int, B: int, table: Tensor, table_dim: int | None, index: Tensor | None, index_dim: int | None
) -> tuple[Tensor, Tensor | None]:
    """Those of the V * B samples: tables of the instances one below the other, indices moved along."""
    if table_dim is not None:
        table = table.movedim(table_dim, 0)
    if index is None:
        if table_dim is not None:
            table = table.expand(V, B, table.shape[-1]).flatten(0, 1)
        elif table.shape[0] != 1:
            table = table.repeat(V, 1)
        return table, None
    index = merge(index, index_dim, V)
    assert index is not None
    if table_dim is not None:
        levels = table.shape[1]
        outside = (index < 0) | (index >= levels)  # must stay outside the longer table
        own = torch.arange(V, device=index.device).repeat_interleave(B) * levels
        index = torch.where(outside, V * levels, index + own)
        table = table.flatten(0, 1)
    return table, index
