"""Host time of a call on a GPU, its launch left out: `python -m tests.host_time`.

On CPU tensors, which are allocated about as fast as a GPU's from torch's cache. The CUDA code runs against a
library whose functions do nothing; for Triton its own launcher comes on top of what is printed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dae_fast as df
from dae_fast.kernels import native

CSRC = Path(__file__).parents[1] / "csrc"
NOTHING = """
#include "api.h"
using namespace dae;
static const Api kApi = {
    [](const AffineArgs&, Queue) -> const char* { return ERROR; },
    [](const ResidualArgs&, const LossArgs&, Scratch, Queue) -> const char* { return nullptr; },
    [](const RowDotsArgs&, double*, Scratch, Queue) -> const char* { return nullptr; },
    [](const MaskArgs&, double*, Scratch, Queue) -> const char* { return nullptr; },
    [](const CorruptArgs&, Queue) -> const char* { return nullptr; },
    [](const GaussianArgs&, void*, Scratch, Queue) -> const char* { return nullptr; },
    [](const GaussianGradArgs&, Queue) -> const char* { return nullptr; },
    [](const BitsArgs&, Queue) -> const char* { return nullptr; },
    [](const Noise&, uint64_t, const uint64_t*, Key*, Queue) -> const char* { return nullptr; },
    [](int* count) -> const char* { return *count = 1, nullptr; },
    [] { return CURRENT_DEVICE; },
    [](const ChainArgs&, Queue) -> const char* { return nullptr; },
    [](const NormalSumArgs&, Queue) -> const char* { return nullptr; },
    [](const EmbeddingArgs&, Queue) -> const char* { return nullptr; },
    true,
};
extern "C" const Api* dae_cuda_api() { return &kApi; }
"""


def microseconds(call: Callable[[], Any], number: int = 1000, rounds: int = 50) -> float:
    """The fastest round: what the machine does besides is not the call's."""
    return min(timeit.repeat(call, number=number, repeat=rounds)) / number * 1e6


def load_nothing(current_device: int = 0, error: str = "nullptr") -> None:
    """The CUDA library replaced by one that launches nothing. error: a C string, what the affine map's launch says."""
    with tempfile.TemporaryDirectory() as place:
        source, library = Path(place) / "nothing.cpp", Path(place) / "nothing.so"
        source.write_text(NOTHING)
        cxx = shlex.split(os.environ.get("CXX", "c++"))
        subprocess.run(
            [
                *cxx,
                "-std=c++17",
                "-shared",
                "-fPIC",
                f"-I{CSRC}",
                f"-DCURRENT_DEVICE={current_device}",
                f"-DERROR={error}",
                source,
                "-o",
                library,
            ],
            check=True,
        )
        native._core.load_cuda(str(library))


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
    x, noise, t = torch.randn(64, 784), df.Noise(0).fold_in(1), torch.zeros(64, dtype=torch.int64)
    pred = x.clone().requires_grad_()
    level = df.Schedule.linear(1000)[t]
    calls = {
        "add_noise": lambda: df.add_noise(x, noise, level),
        "add_noise, a tensor": lambda: df.add_noise(x, x, level),
        "to_x0": lambda: df.to_x0(x, x, level),
        "langevin_step": lambda: df.langevin_step(x, x, 0.1, noise),
        "noise_mse, no gradient": lambda: df.noise_mse(x, noise),
        "noise_mse, gradient kept for backward": lambda: df.noise_mse(pred, noise),
    }
    print(f"torch.empty_like alone {microseconds(lambda: torch.empty_like(x)):.2f} us")
    load_nothing()
    kept = torch.empty(4096, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    native.workspace = lambda device, doubles: kept  # as on a GPU, where it is kept from call to call
    cuda = {name: microseconds(call) for name, call in calls.items()}
    native._core.load_cuda(None)

    _pretend_triton()
    with df.use_backend("triton"):
        for name, call in calls.items():
            print(f"{name:40} CUDA {cuda[name]:6.2f} us   Triton {microseconds(call):6.2f} us")


def _pretend_triton() -> None:
    """The Triton backend on CPU tensors, launching nothing."""
    from dae_fast.kernels import triton

    triton._launch = lambda call, args: None
    kept = torch.empty(4096, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    triton.workspace = lambda device, doubles: kept  # as on a GPU, where it is kept from call to call
    triton.supports = lambda device: True
    df.kernels.dispatch._loaded["triton"] = triton, ""


if __name__ == "__main__":
    main()
