"""What this installation can run, and what is missing and why."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def build_error(part: str) -> str | None:
    """Why "native", the CPU core, or "cuda", its CUDA library, was not built; None when it was."""
    note = Path(__file__).with_name("_build.json")
    if not note.exists():
        return "the package was never built: run `pip install .`"
    error: str | None = json.loads(note.read_text())[part]
    return error


def package_version() -> str:
    try:
        return version("dae-fast")
    except PackageNotFoundError:
        return "not installed"


def info() -> dict[str, str]:
    """Versions, backends, instruction set and threads, by name."""
    import torch

    from .kernels import dispatch

    facts = {"dae_fast": package_version(), "torch": torch.__version__}
    for name in dispatch.NAMES[1:]:
        why = dispatch.missing(name)
        facts[name] = f"missing: {why}" if why else dispatch.module(name).describe()
    native = dispatch.module("native")
    if native is not None:
        missing = native.cuda_missing()
        facts["cuda"] = f"missing: {missing}" if missing else "built"
        facts["nvtx"] = "built" if native.nvtx_built else "missing: no NVTX headers when this was built"
    for device, what in (("cpu", "on CPU"), ("cuda", "on a GPU")):
        facts[f"default {what}"] = dispatch.default_name(device)
    facts["default elsewhere"] = "reference"
    return facts
