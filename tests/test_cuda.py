"""The CUDA library without a GPU: it loads, it says so, and its machine code is what was meant.

What its kernels compute is tested by the shared tests, compiled for the CPU ("cuda on cpu" in conftest.py), and on
a GPU by test_gpu.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import dae_fast as df
from dae_fast.info import build_error

from .cuda_sass import ARCHITECTURES, GROUP, LIBRARY, STREAMS, instructions_a_value, kernels

pytestmark = pytest.mark.skipif(build_error("cuda") is not None, reason=f"no CUDA library: {build_error('cuda')}")

# Instructions a value in the loop of one long row, on sm_90: a little above what was measured.
MOST = {
    "affine_kernel<fresh, 1>": 54,
    "affine_kernel<fresh, 2>": 54,
    "affine_kernel<read, 1>": 8,
    "affine_kernel<read, 2>": 12,
    "affine_kernel<read, 3>": 15,
    "residual_kernel<fresh, 1>": 67,
    "residual_kernel<fresh, 2>": 68,
    "residual_kernel<read, 2>": 23,
    "residual_kernel<read, 3>": 25,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_library_loads_and_says_so() -> None:
    code = f"from dae_fast import _core; _core.load_cuda({str(LIBRARY)!r})"
    done = subprocess.run([sys.executable, "-c", f"import torch; {code}"], capture_output=True, text=True)
    assert "RuntimeError: " in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "driver" in last or "device" in last, last


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_a_torch_without_cuda_has_no_use_for_it() -> None:
    assert df.info()["cuda"] == f"missing: torch {torch.__version__} is not built for CUDA"
    assert not df.backends.supports("native", torch.device("cuda"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def code(request: pytest.FixtureRequest):
    pytest.importorskip("triton", reason="its disassembler is used")
    return request.param, kernels(request.param)


def test_no_kernel_uses_local_memory(code) -> None:
    _, found = code
    assert {(k.name, k.element) for k in found if k.access == "Whole"} == {(n, e) for n in STREAMS for e in GROUP}
    assert [(k.name, k.element, k.access) for k in found if k.stack or k.through_local_memory] == []


def test_streams_are_16_bytes_a_thread(code) -> None:
    """Every operand, in every loop that streams; what else is loaded there is a mask's bytes."""
    _, found = code
    for kernel in found:
        if kernel.access != "Whole":
            continue
        loads, stores = STREAMS[kernel.name]
        doubled = 2 if kernel.element == "f64" else 1  # four doubles are two accesses
        assert kernel.loops, kernel
        for loop in kernel.loops:
            turns, rest = divmod(loop.wide_loads, loads * doubled)
            assert turns and not rest, kernel
            assert loop.wide_stores == stores * doubled * turns, kernel
            mask = 4 if kernel.name.startswith("residual") else 0
            assert loop.narrow_loads <= mask * turns, kernel


def test_instructions_a_value(code) -> None:
    architecture, found = code
    if architecture != "sm_90":
        pytest.skip("counted on sm_90")
    for kernel in found:
        if kernel.access == "Whole" and kernel.name in MOST and kernel.element != "f64":
            assert instructions_a_value(kernel) <= MOST[kernel.name], kernel
