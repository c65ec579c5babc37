r"""csrc/cuda compiled for the CPU, against the stand-in headers of this folder, so that its kernels run anywhere.

Under AddressSanitizer, which sees every tensor and all shared memory (-s, or its report is lost with the process):

    CXX="c++ -fsanitize=address -fno-omit-frame-pointer" ASAN_OPTIONS=detect_leaks=0 \
      LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
      python -m pytest -s tests/test_cuda.py -k "bits and (9x5 or 2x3x7x5)"
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dae_fast.kernels import native

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
ELEMENTS = {"f32": "float", "f64": "double", "bf16": "__nv_bfloat16", "f16": "__half"}
# Two such libraries may be loaded at once: of gcc's unique symbols the second would take those of the first.
OWN = () if "clang" in os.environ.get("CXX", "") else ("-fno-gnu-unique",)
FLAGS = ("-x", "c++", "-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", *OWN, f"-I{HERE}")


# Each object: its source, and its options.
PARTS = {
    **{
        name: (str(SOURCES / "kernels.cu"), f"-DDAE_ELEMENT={element}", f"-DDAE_NAME={name}")
        for name, element in ELEMENTS.items()
    },
    "api": (str(SOURCES / "api.cu"),),
    "chain": (str(SOURCES / "chain.cu"),),
}
LIBRARY = "_cuda_on_cpu.so"
# What hipcc would compile for an AMD GPU, in wavefronts of 64.
HIP = ("-D__HIP__", "-D__HIP_DEVICE_COMPILE__", "-include", "cuda_runtime.h")


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def build(place: Path, options: tuple[str, ...] = ()) -> None:
    """LIBRARY, in `place`."""
    running = [
        subprocess.Popen([*compiler(), *FLAGS, *options, *definitions, "-c", source, "-o", place / f"{name}.o"])
        for name, (source, *definitions) in PARTS.items()
    ]
    assert [process.wait() for process in running] == [0] * len(running)
    objects = [place / f"{name}.o" for name in PARTS]
    subprocess.run([*compiler(), "-shared", *objects, "-o", place / LIBRARY], check=True)


@contextmanager
def running(library: Path) -> Iterator[None]:
    """CPU tensors go through the CUDA code, of which the library says that it runs on the host."""
    native._core.load_cuda(str(library))
    try:
        yield
    finally:
        native._core.load_cuda(None)
