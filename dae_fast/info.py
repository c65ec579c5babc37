"""What this installation can run, and what is missing and why."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def build_error() -> str | None:
    """Why the native core was not built, or None."""
    note = Path(__file__).with_name("_build.json")
    if not note.exists():
        return "the package was never built: run `pip install .`"
    error: str | None = json.loads(note.read_text())["native"]
    return error


def package_version() -> str:
    try:
        return version("dae-fast")
    except PackageNotFoundError:
        return "not installed"


def info() -> dict[str, str]:
    """Versions, backends, instruction set and threads, by name."""
    import torch

    from . import backends

    facts = {"dae_fast": package_version(), "torch": torch.__version__}
    native = backends.native_module
    if native is None:
        facts["native"] = f"missing: {backends.native_missing}"
        facts["default on CPU"] = "reference"
    else:
        facts["native"] = f"built; instruction set {native.isa()} of {', '.join(native.isas())}"
        facts["default on CPU"] = "native"
        facts["threads"] = f"{native.max_threads()} (torch.set_num_threads governs it)"
    facts["default elsewhere"] = "reference"
    return facts
