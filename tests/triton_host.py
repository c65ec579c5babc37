"""Host time of the Triton backend with the launch left out: `python -m tests.triton_host`.

On CPU tensors, which are allocated about as fast as a GPU's from torch's cache. Triton's launcher comes on top.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import timeit
from collections.abc import Callable
from typing import Any

import torch

import dae_fast as df
from dae_fast.backends import triton as backend


def microseconds(call: Callable[[], Any], number: int = 1000, rounds: int = 50) -> float:
    """The fastest round: what the machine does besides is not the call's."""
    return min(timeit.repeat(call, number=number, repeat=rounds)) / number * 1e6


def main() -> None:
    backend._launch = lambda call, args: None
    kept = backend._new_workspace(torch.device("cpu"), 64)
    backend._workspace = lambda call: kept  # as on a GPU, where it is kept from call to call
    x, noise, t = torch.empty(64, 784), df.Noise(0).fold_in(1), torch.zeros(64, dtype=torch.int64)
    table, row = torch.ones(1000, 2), torch.ones(1, 3)
    calls = {
        "empty_like": lambda: torch.empty_like(x),
        "affine, fresh noise": lambda: backend.affine("op", x, None, None, noise, table, t, (0, -1, 1)),
        "affine, two tensors": lambda: backend.affine("op", x, x, None, None, table, t, (0, 1, -1)),
        "residual, with gradient": lambda: backend.residual(
            "op", x, None, None, noise, row, None, (1, 2), None, None, 1, True, True
        ),
    }
    for name, call in calls.items():
        print(f"{name:26}{microseconds(call):6.2f} us")


if __name__ == "__main__":
    main()
