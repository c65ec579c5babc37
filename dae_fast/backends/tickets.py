"""The counter by which the last block of a reduction knows itself: 0 before and after every launch, one at a time."""

from __future__ import annotations

from threading import Thread

import torch
from torch import Tensor

_kept: dict[tuple[int, int], Tensor] = {}  # by device and stream, whose launches come one after the other


def ticket(device: torch.device) -> Tensor:
    """An int32 tensor (1,) for a launch on the device's current stream."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # Graphs may be replayed side by side on several streams: each has its own.
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    if stream not in _kept:
        # What this thread allocates may belong to the pool of a graph that is being warmed up.
        maker = Thread(target=_make, args=(device, stream))
        maker.start()
        maker.join()
    return _kept[stream]


def _make(device: torch.device, stream: tuple[int, int]) -> None:
    with torch.cuda.stream(torch.cuda.ExternalStream(stream[1], device=device)):
        _kept[stream] = torch.zeros(1, dtype=torch.int32, device=device)
