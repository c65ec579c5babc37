"""nvcc's and Triton's PTX, run on the CPU: a part of `make prove-gpu`, which runs tests/test_cuda.py on all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dae_fast as df

from . import cuda_on_cpu, ptx_on_cpu
from .test_primitives import NOISE, randn, table_of

pytestmark = pytest.mark.skipif(bool(ptx_on_cpu.missing()), reason=ptx_on_cpu.missing())

# Fresh noise with one tensor, in whole groups, and words.
WANTED = r"affine_kernelILb1ELi1|residual_kernelILb1ELi1ELb0|bits_kernel"


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ptx")
    ptx_on_cpu.compile_ptx(place, ("f32", "api"))
    return place


def calls(D: int) -> tuple[Tensor, ...]:
    native, x, table = df.backends.native, randn((3, D), torch.float32, 0), table_of(torch.float32, 3)
    loss = "op", x, None, None, NOISE, table, None, (-1, 0, -1), None, None, 1, True, True
    noised = native.affine("op", x, None, None, NOISE, table, None, (0, -1, 1, -1))
    return *noised, native.residual(*loss)[2], native.words(NOISE, 3, D, torch.device("cpu"))


def test_it_has_the_cpus_bits(tmp_path: Path, ptx: Path, cuda_on_cpu_library: Path) -> None:
    objects = cuda_on_cpu_library.parent
    library = ptx_on_cpu.build(tmp_path, ptx, objects, WANTED)
    before = ptx_on_cpu.launches(library)
    for D in (8, 8192, 20_004):
        wanted = calls(D)
        with cuda_on_cpu.running(library):
            got = calls(D)
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g.view(torch.uint8), w.view(torch.uint8))
    assert ptx_on_cpu.launches(library) - before == 9


def test_an_unfused_fma_shows(tmp_path: Path, ptx: Path, cuda_on_cpu_library: Path) -> None:
    library = ptx_on_cpu.build(tmp_path, ptx, cuda_on_cpu_library.parent, WANTED, "UNFUSED")
    wanted = calls(8192)
    with cuda_on_cpu.running(library):
        got = calls(8192)
    assert [torch.equal(g, w) for g, w in zip(got, wanted, strict=True)] == [False, False, True]  # words have none


def test_tritons_has_the_cpus_bits() -> None:
    """Maps, a clamp, normals, words and a gradient in fp32; in a process in which Triton compiles."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.triton_ptx", "short"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "7 of 7 calls have the CPU's bits" in done.stdout


def test_what_is_not_known_is_refused() -> None:
    kernel = ".visible .entry k(.param .u64 p)\n{{\n\t.reg .b32 %r<3>;\n\t{}\n\tret;\n\n}}\n"
    assert "ptx::add_" in ptx_on_cpu.translate(kernel.format("add.s32 %r1, %r2, 1;"), "table")
    unknown = "sin.approx.f32 %r1, %r2;", "setp.lt.and.s32 %r1, %r2, 1, %r0;", "cvt.rzi.s32.f32 %r1, %r2;"
    for statement in (*unknown, "shfl.sync.up.b32 %r1, %r2, 1, 0, -1;", "bar.sync 1;", "add.sat.s32 %r1, %r2, 1;"):
        with pytest.raises(ValueError):
            ptx_on_cpu.translate(kernel.format(statement), "table")
