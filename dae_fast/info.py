"""What this installation can run, and what is missing and why."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["info", "noise_hash", "noise_version", "package_version"]


def build_error(part: str) -> str | None:
    """Why "native", the CPU core, or "cuda" or "hip", its library for GPUs, was not built; None when it was."""
    note = Path(__file__).with_name("_build.json")
    if not note.exists():
        return (
            f"{note.parent} is a source folder in which nothing was built: run `pip install -e .` there, or leave it, "
            "since it hides what is installed elsewhere"
        )
    error: str | None = json.loads(note.read_text())[part]
    return error


# Of the noise contract: it changes when a key gives other bits, which `python -m dae_fast hash` shows.
noise_version = "1"


def noise_hash() -> str:
    """SHA-256 of the first 2^24 normals of seed 0, sample 0, as little-endian fp32: one value for all machines."""
    from .noise import Noise

    normals = Noise(0).normal((1, 2**24)).numpy().astype("<f4", copy=False)
    return hashlib.sha256(normals.tobytes()).hexdigest()


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
        for name in ("cuda", "hip"):
            missing = native.library_missing(name)
            facts[name] = f"missing: {missing}" if missing else "built"
        facts["nvtx"] = "built" if native.nvtx_built else "missing: no NVTX headers when this was built"
    for device, what in (("cpu", "on CPU"), ("cuda", "on a GPU")):
        facts[f"default {what}"] = dispatch.default_name(device)
    facts["default elsewhere"] = "reference"
    return facts
