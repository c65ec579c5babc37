"""clang as a second compiler of csrc/cuda: as CUDA for sm_90 and as HIP for gfx942, against headers of ours; where
there is hipcc, that as HIP against its own.

It says what nvcc lets pass, and that nothing in the kernels is NVIDIA's alone but what math.h, batch.cuh and reduce.cuh
name.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from . import cuda_on_cpu
from .conftest import some_longer
from .hip import ARCHITECTURE, HIPCC

HERE = Path(__file__).parent / "other_compilers"
CLANG = next((found for name in ("clang++-19", "clang++") if (found := shutil.which(name))), None)
STRICT = ("-std=c++17", "-ffp-contract=off", "-Werror", "-Wall", "-Wextra")
OURS = (
    *(f"-I{HERE}", "-include", "cuda_runtime.h", "-nogpuinc", "-nogpulib"),
    *("-Wno-unknown-cuda-version", "-Wno-deprecated-declarations"),
)
CUDA = ("-x", "cuda", "--cuda-gpu-arch=sm_90", "-fsyntax-only")
HIP = ("-x", "hip", "--offload-device-only", "-O3", "-S")
needs_clang = pytest.mark.skipif(CLANG is None, reason="there is no clang")
# Of each part whose registers are counted; those of f64 do not always fit.
KERNELS = {"f32": 37, "bf16": 37, "f16": 37, "api": 5, "chain": 4}


def compiles(command: Sequence[object], part: str) -> None:
    source, *definitions = cuda_on_cpu.PARTS[part]
    command = [*command, *STRICT, *definitions, source]
    environment = {**os.environ, "HIP_PLATFORM": "amd"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if "unknown target triple" in done.stderr or "No available targets" in done.stderr:
        pytest.skip("this clang makes no code for GPUs")
    assert not done.returncode, done.stderr[-3000:]


@needs_clang
@pytest.mark.parametrize("part", cuda_on_cpu.PARTS)
def test_clang_takes_it_for_cuda(part: str) -> None:
    compiles([CLANG, *OURS, *CUDA], part)


def spills(code: Path, part: str) -> list[int]:
    """Of each kernel, registers that did not fit."""
    found = [int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", code.read_text())]
    assert len(found) == KERNELS[part]
    return sorted(found)


@needs_clang
@pytest.mark.parametrize("part", some_longer(["f32", "api", "chain"], ["api", "chain"]))
def test_clang_compiles_it_for_amd(part: str, tmp_path: Path) -> None:
    """For a GPU that an older hipcc may not know. No register spilled but a few where strides are any, in f32."""
    code = tmp_path / "code.s"
    compiles([CLANG, *OURS, *HIP, "-U__HIPCC__", "--offload-arch=gfx942", "-o", code], part)
    found = spills(code, part)
    assert found[:-2] == [0] * len(found[:-2]) and found[-1] <= (8 if part == "f32" else 0)


@pytest.mark.skipif(HIPCC is None, reason="there is no hipcc")
@pytest.mark.parametrize("part", some_longer(KERNELS, ["api", "chain"]))
def test_hipcc_compiles_it(part: str, tmp_path: Path) -> None:
    """Without a warning, with no register spilled, rounding to nearest and keeping subnormals. Before a ticket
    every wave fences, and only then the barrier joins them."""
    code = tmp_path / "code.s"
    unused = "-Wno-unused-command-line-argument"  # of what hipcc itself adds
    compiles([HIPCC, *HIP, unused, f"--offload-arch={ARCHITECTURE}", "-o", code], part)
    assert set(spills(code, part)) == {0}
    text = code.read_text()
    modes = re.findall(r"\.amdhsa_float_(round|denorm)_mode_(?:32|16_64) (\d)", text)
    assert len(modes) == 4 * KERNELS[part] and set(modes) == {("round", "0"), ("denorm", "3")}
    before_tickets = [lines[: lines.rindex("s_barrier")] for lines in text.split("global_atomic_add")[:-1]]
    assert bool(before_tickets) == (part != "chain")
    for before in before_tickets:
        fence = "".join(before.splitlines()[-4:])
        assert "vmcnt(0)" in fence and "buffer_wbinvl1" in fence
