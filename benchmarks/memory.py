"""What one call of a peer allocates and launches."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from .environment import CPU
from .measure import Peer

# The profiler announces every start and stop on stderr at lower levels.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
_MEMORY = "[memory]"  # the profiler's name for an allocation or its end


@dataclass(frozen=True)
class Usage:
    peak_bytes: int  # most held at once, results included
    tensors: int  # allocations of at least half a sample tensor
    small_bytes: int  # all other allocations together: (B,) coefficients, partial sums, scalars
    launches: int | None  # kernels, copies and fills on a GPU; None on the CPU, where nothing is launched


def usage(peer: Peer, sample_bytes: int, device: torch.device = CPU) -> Usage:
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, profile_memory=True) as record:
        result = peer()
        if on_gpu:
            torch.cuda.synchronize()
    del result
    events = record.profiler.kineto_results.events()
    here = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    held = peak = tensors = small = 0
    memory = [e for e in events if e.name() == _MEMORY and e.device_type() == here]
    for event in sorted(memory, key=lambda e: e.start_ns()):
        size = event.nbytes()
        held += size
        peak = max(peak, held)
        if 2 * size >= sample_bytes:
            tensors += 1
        elif size > 0:
            small += size
    launches = sum(e.device_type() == here and e.name() != _MEMORY and not e.is_user_annotation() for e in events)
    return Usage(peak, tensors, small, launches if on_gpu else None)


def warm_up(device: torch.device = CPU) -> None:
    """The profiler's first use takes long and allocates for itself."""
    usage(lambda: torch.empty(1, device=device), 1, device)
