"""The timing core: peers take turns, so that a noisy machine is fair to all of them."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

from .environment import CPU

Peer = Callable[[], object]
Clock = Callable[[Peer, int], float]  # seconds that so many calls take

MIN_ROUNDS, MAX_ROUNDS = 5, 300
# A call this long refills the caches by itself.
LONG_S = 20e-3


@dataclass(frozen=True)
class Timing:
    seconds: tuple[float, ...]  # of one call, one entry per round
    calls: int  # timed together in each round

    @property
    def quartiles(self) -> tuple[float, float, float]:
        q1, median, q3 = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return q1, median, q3

    @property
    def median(self) -> float:
        return self.quartiles[1]


def interleave(
    peers: Mapping[str, Peer],
    *,
    budget_s: float,
    sample_s: float = 1e-3,
    device: torch.device = CPU,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Round after round, every peer once, for about `budget_s` in all.

    A sample is as many calls as take `sample_s`, so that the clock's own cost does not count.
    """
    clock = clock or (_events if device.type == "cuda" else _wall)
    calls, long = {}, set()
    for name, peer in peers.items():
        calls[name], once = _calls_in(sample_s, peer, clock)
        if once > LONG_S:
            long.add(name)
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    shuffle = random.Random(0).shuffle
    order = list(peers)
    gc.collect()
    gc.disable()
    try:
        began = perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and perf_counter() - began > budget_s:
                break
            shuffle(order)
            for name in order:
                if name not in long:
                    # Not timed: a peer must not pay for what the one before it left in the caches.
                    peers[name]()
                seconds[name].append(clock(peers[name], calls[name]) / calls[name])
    finally:
        gc.enable()
    return {name: Timing(tuple(seconds[name]), calls[name]) for name in peers}


def _wall(peer: Peer, calls: int) -> float:
    began = perf_counter()
    for _ in range(calls):
        peer()
    return perf_counter() - began


def _events(peer: Peer, calls: int) -> float:
    """Between two events of the stream: the host's work counts only where the device waits for it."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(calls):
        peer()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


def _calls_in(sample_s: float, peer: Peer, clock: Clock) -> tuple[int, float]:
    """How many calls take `sample_s`, and the seconds of one."""
    peer()
    calls = 1
    while (taken := clock(peer, calls)) < sample_s:
        calls = max(2 * calls, math.ceil(calls * sample_s / max(taken, 1e-7)))
    return calls, taken / calls
