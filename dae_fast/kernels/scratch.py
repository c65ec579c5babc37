"""What a reduction on a GPU needs besides its operands, kept by stream: launches there come one after the other.

Room for partial sums, and the counter by which the last block knows itself: 0 before and after every launch.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .._torch import current_raw_stream

_kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by device and stream


def workspace(device: torch.device, doubles: int) -> tuple[Tensor, Tensor]:
    """(fp64 of at least `doubles`, int32 (1,)) for a launch on the device's current stream."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # Graphs may be replayed side by side on several streams: each has its own.
        return _made(device, doubles)
    stream = device.index, current_raw_stream(device.index)
    kept = _kept.get(stream)
    if kept is None or kept[0].numel() < doubles:
        # What this thread allocates may belong to the pool of a graph that is being warmed up.
        with ThreadPoolExecutor(1) as other:
            current = torch.cuda.current_stream(device)
            kept = _kept[stream] = other.submit(_made_on, current, device, max(doubles, 4096)).result()
    return kept


def _made_on(stream: torch.cuda.Stream, device: torch.device, doubles: int) -> tuple[Tensor, Tensor]:
    """Zeroed before what comes next on the stream."""
    with torch.cuda.stream(stream):
        return _made(device, doubles)


def _made(device: torch.device, doubles: int) -> tuple[Tensor, Tensor]:
    sums = torch.empty(doubles, dtype=torch.float64, device=device)
    return sums, torch.zeros(1, dtype=torch.int32, device=device)
