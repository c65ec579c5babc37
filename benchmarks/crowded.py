"""What a call takes while other processes have the cores: `python -m benchmarks.crowded --neighbours 2`.

Each call's own time on the wall, as the mean and the slowest hundredth are what the neighbours change.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, sleep

import torch

import dae_fast as df

SHAPES = ((64, 784), (64, 3, 32, 32), (64, 4, 64, 64))


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that do nothing else than run."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        sleep(0.3)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def seconds_of(call: Callable[[], object], budget_s: float) -> list[float]:
    """Of each call, the shortest first."""
    call()
    found, end = [], perf_counter() + budget_s
    while not found or perf_counter() < end:
        began = perf_counter()
        call()
        found.append(perf_counter() - began)
    return sorted(found)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crowded", description=__doc__)
    parser.add_argument("--neighbours", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row")
    given = parser.parse_args(arguments)
    level, noise, threads = df.Level(alpha=0.6, sigma=0.8), df.Noise(0), torch.get_num_threads()
    print(f"{threads} threads; us a call: mean, median, 99th of 100")
    for count in dict.fromkeys((0, given.neighbours)):
        with neighbours(count):
            for shape in SHAPES:
                x = torch.randn(shape)
                out = torch.empty(shape)
                calls = {
                    "eager": lambda x=x: 0.6 * x + 0.8 * torch.randn_like(x),
                    "dae_fast": lambda x=x, out=out: df.add_noise(x, noise, level, out=out),
                }
                for name, call in calls.items():
                    took = seconds_of(call, given.seconds)
                    mean, median, slow = sum(took) / len(took), took[len(took) // 2], took[len(took) * 99 // 100]
                    print(
                        f"{count} neighbours, {'x'.join(map(str, shape)):11} {name:9}"
                        f"{mean * 1e6:8.0f} {median * 1e6:8.0f} {slow * 1e6:8.0f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
