"""The timing core: peers take turns, so that a noisy machine is fair to all of them."""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

Peer = Callable[[], object]

MIN_ROUNDS, MAX_ROUNDS = 5, 300


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


def interleave(peers: Mapping[str, Peer], *, budget_s: float, sample_s: float = 1e-3) -> dict[str, Timing]:
    """Round after round, every peer once, for about `budget_s` in all.

    A sample is as many calls as take `sample_s`, so that the clock's own cost does not count.
    """
    calls = {name: _calls_in(sample_s, peer) for name, peer in peers.items()}
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
                # Not timed: a peer must not pay for what the one before it left in the caches.
                peers[name]()
                seconds[name].append(_time(peers[name], calls[name]) / calls[name])
    finally:
        gc.enable()
    return {name: Timing(tuple(seconds[name]), calls[name]) for name in peers}


def _time(peer: Peer, calls: int) -> float:
    began = perf_counter()
    for _ in range(calls):
        peer()
    return perf_counter() - began


def _calls_in(sample_s: float, peer: Peer) -> int:
    peer()
    calls = 1
    while (taken := _time(peer, calls)) < sample_s:
        calls = max(2 * calls, math.ceil(calls * sample_s / max(taken, 1e-7)))
    return calls
