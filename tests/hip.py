"""The HIP library as setup.py builds it, for the tests: no AMD GPU is needed, and none is used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.gpu_pack import build_script

ROOT = Path(__file__).parents[1]
HIPCC = shutil.which("hipcc")
ARCHITECTURE = "gfx90a"  # which every hipcc since ROCm 4.5 knows; its wavefronts have 64 lanes


def build(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAE_HIP_ARCHS", ARCHITECTURE)
    script = build_script(ROOT)
    monkeypatch.setattr(script, "BUILD", place)
    script.build("hip", place / "_hip.so")
    return place / "_hip.so"
