"""Which settings are measured, and how one of them becomes rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.cases import CASES, Case

from .gate import Gate, WrongResultError
from .measure import Peer, interleave
from .memory import allocations
from .peers import CLONE, COMPILE, COPY_INTO, EAGER, OURS, PEERS, Setting, Tensors, baselines, own_leaves, peer
from .report import Row

LARGE, SMALL = (256, 4, 64, 64), (64, 784)
SHAPES = (LARGE, SMALL)
DTYPES = (torch.float32, torch.bfloat16)
# Measured against all peers; the other cases against eager only, compilation taking most of the time.
MAIN = (
    "add_noise-fresh",
    "add_noise-tensor",
    "to_x0-eps",
    "to_score-eps",
    "langevin_step-fresh",
    "noise_mse-fresh",
    "noise_mse-tensor",
)


def settings(
    cases: Sequence[Case] = CASES,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> list[Setting]:
    """Ops forward; losses with the gradient of the prediction; at small shapes everything with all gradients."""
    every = [(case, shape, dtype) for case in cases for shape in shapes for dtype in dtypes]
    return [
        *(Setting(*inputs) for inputs in every if not inputs[0].loss),
        *(Setting(*inputs, own_leaves(inputs[0])) for inputs in every if inputs[0].loss),
        *(
            Setting(case, shape, dtype, case.grads)
            for case, shape, dtype in every
            if math.prod(shape) <= math.prod(SMALL) and case.grads != own_leaves(case)
        ),
    ]


def default_peers(setting: Setting, *, full: bool) -> tuple[str, ...]:
    if setting.case.name not in MAIN or setting.leaves != own_leaves(setting.case):
        return (EAGER, OURS)
    return PEERS if full else (EAGER, COMPILE, OURS)


def run(setting: Setting, names: Sequence[str], *, budget_s: float) -> list[Row]:
    """Gate, then memory, then the timing of all that passed, with the baselines, in one run of rounds."""
    key = (setting.case.name, setting.mode, setting.shape_name, setting.dtype_name)
    x = setting.case.first(setting.inputs())
    refused: list[Row] = []
    calls: dict[str, Peer] = baselines(setting)
    facts: dict[str, dict[str, Any]] = {CLONE: {"least_bytes": 2 * x.nbytes}, COPY_INTO: {"least_bytes": 2 * x.nbytes}}
    with torch.set_grad_enabled(bool(setting.leaves)):
        gate = Gate(setting)
        for name in names:
            call = peer(setting, name)
            try:
                least = least_bytes(setting, gate.check(name, call))
            except WrongResultError as error:
                refused.append(Row(*key, name, error=str(error)))
                continue
            memory = allocations(call, x.nbytes)
            calls[name] = call
            facts[name] = {
                "least_bytes": least,
                "peak_bytes": memory.peak_bytes,
                "tensors_allocated": memory.tensors,
                "small_bytes_allocated": memory.small_bytes,
            }
        timings = interleave(calls, budget_s=budget_s)

    # The faster of the two ways to copy, which asks more of the others.
    copy_rate = 2 * x.nbytes / min(timings[CLONE].median, timings[COPY_INTO].median)
    rows = []
    for name, timing in timings.items():
        q1, median, q3 = timing.quartiles
        rate = facts[name]["least_bytes"] / median if name in facts else None
        rows.append(
            Row(
                *key,
                name,
                median_ms=median * 1e3,
                q1_ms=q1 * 1e3,
                q3_ms=q3 * 1e3,
                rounds=len(timing.seconds),
                calls_per_round=timing.calls,
                gigabytes_per_s=rate and rate / 1e9,
                copy_share=rate and rate / copy_rate,
                values_per_s=x.numel() / median,
                **facts.get(name, {}),
            )
        )
    return refused + rows


def least_bytes(setting: Setting, results: Tensors) -> int:
    """What must be read and written at the least: every input and result once, boolean masks included."""
    case, inputs = setting.case, setting.inputs()
    gradients = sum(name in case.tensors for name in setting.leaves)
    if case.loss:
        further = max(gradients - 1, 0)  # streams counts the gradient of the prediction
    else:
        outputs = len(results) - len(setting.leaves)
        further = outputs + gradients if setting.leaves else 0  # the outputs' gradients are read
    masks = sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor) and v.dtype == torch.bool)
    return (case.streams + further) * case.first(inputs).nbytes + masks
