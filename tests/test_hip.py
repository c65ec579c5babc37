"""csrc/cuda as HIP, without an AMD GPU: what is built, that it loads and says that there is none, and who uses it.

That its arithmetic in wavefronts of 64 has the CPU's bits is tests/test_cuda.py with --hip: `make prove-hip`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import dae_fast as df
from dae_fast.info import build_error
from dae_fast.kernels import dispatch

from . import hip
from .conftest import BACKENDS, LONGER

pytestmark = pytest.mark.skipif("native" not in BACKENDS, reason="needs the native backend")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
ON_ROCM = "import torch; torch.version.cuda, torch.version.hip = None, '6.4'; import dae_fast as df; "


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@LONGER
@no_gpu
@pytest.mark.skipif(hip.HIPCC is None, reason="there is no hipcc")
def test_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled and linked without a word; every kernel is in it by name; it loads, and says that there is no GPU."""
    library = hip.build(tmp_path, monkeypatch)
    assert "warning" not in capsys.readouterr().out
    kernels = set(re.findall(rb"_ZN3dae4cuda\w+_kernel\w+\.kd", library.read_bytes()))
    assert len(kernels) == 4 * 37 + 5 + 4
    code = f"""
import torch
from dae_fast import _core
_core.load_cuda({str(library)!r})
try:
    print(_core.cuda_devices())
except RuntimeError as error:
    print(error)
"""
    assert run(code) == "no GPU device"


def test_a_torch_without_rocm_has_no_use_for_it() -> None:
    if torch.version.hip is None:
        assert df.info()["hip"] == f"missing: torch {torch.__version__} is not built for ROCm"


@no_gpu
def test_a_torch_for_rocm_asks_for_it() -> None:
    """And has none for CUDA; Triton is the default where it is installed."""
    info = json.loads(run(ON_ROCM + "import json; print(json.dumps(df.info()))"))
    assert info["cuda"] == f"missing: torch {torch.__version__} is not built for CUDA"
    assert info["hip"] == f"missing: {build_error('hip') or 'no GPU device'}"
    assert info["default on a GPU"] == ("triton" if find_spec("triton") else "reference")


def test_it_is_used_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by default, as it has run on no GPU."""
    native, gpu = df.kernels.native, torch.device("cuda")
    monkeypatch.setattr(native, "library_missing", lambda name: "")
    assert native.supports(gpu) and dispatch._default_on_gpu() == "native"
    monkeypatch.setattr(native, "GPU", "hip")
    assert native.supports(gpu) and dispatch._default_on_gpu() != "native"
