"""Which settings are measured, and how one of them becomes rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from . import composed, external, peers
from .cases import CASES as OPS
from .cases import Case
from .environment import CPU, default_backend
from .gate import Gate, WrongResultError
from .measure import Peer, interleave
from .memory import usage
from .peers import CLONE, COMPILE, COPY_INTO, EAGER, Setting, Tensors, baselines, own_leaves
from .report import Row
from .traffic import compiled_bytes, moved_bytes

CASES = (*OPS, *external.CASES, *composed.CASES)

LATENT, FLAT = (256, 4, 64, 64), (64, 784)
SHAPES = (FLAT, LATENT)
# With SHAPES, from 128 bytes to 256 MiB of float32: flat data, images, video, latents.
FURTHER_SHAPES = (
    (16, 2),
    (64, 64),
    (32, 3, 64, 64),
    (2, 4, 16, 64, 64),
    (64, 3, 256, 256),
    (256, 16, 128, 128),
)
DTYPES = (torch.float32, torch.bfloat16)
FURTHER_DTYPES = (torch.float16, torch.float64)
# Measured against all peers; the other cases without torch.compile: compiling takes most of the time.
MAIN = (
    "add_noise-fresh",
    "add_noise-tensor",
    "to_x0-eps",
    "to_score-eps",
    "langevin_step-fresh",
    "noise_mse-fresh",
    "noise_mse-tensor",
)
# Bytes of a sample tensor from which one call of a compiled op that draws noise takes half a second on a CPU.
SLOW_TO_COMPILE = 1 << 27


class Measurement(NamedTuple):
    """One setting and the peers it is measured with."""

    setting: Setting
    peers: tuple[str, ...]


def quick(device: torch.device = CPU) -> list[Measurement]:
    """The main ops in float32: a minute."""
    chosen = settings(_main(), SHAPES, (torch.float32,), device, gradients=False)
    return [Measurement(s, (EAGER, COMPILE, default_backend(device), *external_names(s))) for s in chosen]


def full(device: torch.device = CPU) -> list[Measurement]:
    """Every op with every gradient at two shapes and dtypes; the main ops from tiny to huge, and in all dtypes."""
    plan = []
    for setting in settings(CASES, SHAPES, DTYPES, device):
        central = setting.case.name in MAIN and setting.leaves == own_leaves(setting.case)
        ours = peers.names(device) if central else (EAGER, default_backend(device))
        plan.append(Measurement(setting, (*ours, *external_names(setting))))
    for setting in settings(_main(), FURTHER_SHAPES, (torch.float32,), device, gradients=False):
        slow = setting.case.fresh and device.type == "cpu" and setting.sample_bytes >= SLOW_TO_COMPILE
        plan.append(Measurement(setting, (EAGER, *(() if slow else (COMPILE,)), default_backend(device))))
    for setting in settings(_main(), SHAPES, FURTHER_DTYPES, device, gradients=False):
        plan.append(Measurement(setting, (EAGER, default_backend(device))))
    return plan


def chosen(
    cases: Iterable[Case],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    names: Sequence[str] | None = None,
    device: torch.device = CPU,
) -> list[Measurement]:
    """What a person asked for, with the peers that were named, or all of them."""
    plan = []
    for setting in settings(list(cases), shapes, dtypes, device):
        can = (*peers.names(device), *external_names(setting))
        plan.append(Measurement(setting, tuple(n for n in can if names is None or n in names)))
    return plan


def settings(
    cases: Sequence[Case] = CASES,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: torch.device = CPU,
    *,
    gradients: bool = True,
) -> list[Setting]:
    """Ops forward; losses with the gradient of the prediction; at small shapes everything with all gradients."""
    every = [(case, shape, dtype) for case in cases for shape in shapes for dtype in dtypes]
    found = [Setting(*inputs, (), device) for inputs in every if not inputs[0].loss]
    found += [Setting(*inputs, own_leaves(inputs[0]), device) for inputs in every if inputs[0].loss]
    if gradients:
        found += [
            Setting(case, shape, dtype, case.grads, device)
            for case, shape, dtype in every
            if math.prod(shape) <= math.prod(FLAT) and case.grads not in ((), own_leaves(case))
        ]
    return found


def _main() -> list[Case]:
    return [case for case in CASES if case.name in MAIN]


def external_names(setting: Setting) -> tuple[str, ...]:
    """The other libraries that can run the setting."""
    # That does not hang on the sizes, and small inputs cost nothing to make.
    return tuple(external.peers(replace(setting, shape=(1,) * len(setting.shape))))


def peer(setting: Setting, name: str) -> Callable[[], Tensors]:
    """Returns the outputs, then the gradients."""
    if name in peers.names(setting.device):
        return peers.peer(setting, name)
    return external.peers(setting)[name]


def run(setting: Setting, names: Sequence[str], *, budget_s: float) -> list[Row]:
    """Gate, then memory, then the timing of all that passed, with the baselines, in one run of rounds."""
    key = (setting.case.name, setting.mode, setting.shape_name, setting.dtype_name)
    x = setting.case.first(setting.inputs())
    refused: list[Row] = []
    calls: dict[str, Peer] = baselines(setting)
    copied: dict[str, Any] = {"least_bytes": 2 * x.nbytes, "moved_bytes": 2 * x.nbytes}
    facts = {CLONE: copied, COPY_INTO: copied}
    with torch.set_grad_enabled(bool(setting.leaves)):
        gate = Gate(setting)
        for name in names:
            try:
                with compiled_bytes() as compiled:
                    call = peer(setting, name)
                    least = least_bytes(setting, gate.check(name, call))
            except WrongResultError as error:
                refused.append(Row(*key, name, error=str(error)))
                continue
            except Exception as error:  # of a compiler, say: the other peers are measured all the same
                refused.append(Row(*key, name, error=f"{type(error).__name__}: {error}"))
                continue
            used = usage(call, x.nbytes, setting.device)
            calls[name] = call
            facts[name] = {
                "least_bytes": least,
                # None where torch sees nothing of it, as in numpy.
                "moved_bytes": (compiled.count if name == COMPILE else moved_bytes(call, x.numel())) or None,
                "peak_bytes": used.peak_bytes,
                "tensors_allocated": used.tensors,
                "small_bytes_allocated": used.small_bytes,
                "launches": used.launches,
            }
        timings = interleave(calls, budget_s=budget_s, device=setting.device)

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
    masks = inputs["mask"].nbytes if "mask" in inputs else 0
    return (case.streams + further) * case.first(inputs).nbytes + masks
