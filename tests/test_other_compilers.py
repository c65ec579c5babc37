"""clang as a second compiler of csrc/cuda: as CUDA for sm_90, as HIP for gfx942, against headers of our own.

It says what nvcc lets pass, and that nothing in the kernels is NVIDIA's alone but what math.h and batch.cuh name.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import cuda_on_cpu
from .conftest import some_longer

HERE = Path(__file__).parent / "other_compilers"
CLANG = next((found for name in ("clang++-19", "clang++") if (found := shutil.which(name))), None)
FLAGS = (
    *("-std=c++17", f"-I{HERE}", "-include", "cuda_runtime.h", "-nogpuinc", "-nogpulib", "-ffp-contract=off"),
    *("-Werror", "-Wall", "-Wextra", "-Wno-unknown-cuda-version", "-Wno-deprecated-declarations"),
)
CUDA = ("-x", "cuda", "--cuda-gpu-arch=sm_90", "-fsyntax-only")
HIP = ("-x", "hip", "--offload-arch=gfx942", "--offload-device-only", "-O3", "-S")

pytestmark = pytest.mark.skipif(CLANG is None, reason="there is no clang")


def clang(options: Sequence[object], part: str) -> None:
    source, *definitions = cuda_on_cpu.PARTS[part]
    command = [CLANG, *FLAGS, *options, *definitions, source]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if "unknown target triple" in done.stderr or "No available targets" in done.stderr:
        pytest.skip("this clang makes no code for GPUs")
    assert not done.returncode, done.stderr[-3000:]


@pytest.mark.parametrize("part", cuda_on_cpu.PARTS)
def test_clang_takes_it_for_cuda(part: str) -> None:
    clang(CUDA, part)


@pytest.mark.parametrize(
    "part", some_longer(["f32", "api", "chain"], ["api", "chain"])
)  # f64 would need a library's e^x
def test_clang_compiles_it_for_amd(part: str, tmp_path: Path) -> None:
    """Every kernel, and no register that did not fit but eight of each general map with any strides."""
    code = tmp_path / "code.s"
    clang([*HIP, "-o", code], part)
    spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", code.read_text())
    assert len(spills) == {"f32": 37, "api": 5, "chain": 4}[part]
    assert sorted(set(spills)) == (["0", "8"] if part == "f32" else ["0"])
    assert spills.count("8") <= 2  # of any strides: of four streams and of five
