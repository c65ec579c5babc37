"""What one call of a peer allocates."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from .measure import Peer

# The profiler announces every start and stop on stderr at lower levels.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Memory:
    peak_bytes: int  # most held at once, results included
    tensors: int  # allocations of at least half a sample tensor
    small_bytes: int  # all other allocations together: (B,) coefficients, partial sums, scalars


def allocations(peer: Peer, sample_bytes: int) -> Memory:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = peer()
    del result
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = tensors = small = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        size = event.nbytes()
        held += size
        peak = max(peak, held)
        if 2 * size >= sample_bytes:
            tensors += 1
        elif size > 0:
            small += size
    return Memory(peak, tensors, small)


def warm_up() -> None:
    """The profiler's first use takes long and allocates for itself."""
    allocations(lambda: torch.empty(1), 1)
