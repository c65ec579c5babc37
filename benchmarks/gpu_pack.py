"""`make gpu-pack`: the extension built here for the Python of a machine with a GPU, whose minutes are dear.

`python -m benchmarks.gpu_pack`, run by a Python of that version, fills build/gpu-pack: the core, the CUDA library of
one architecture, variants of it that are to be timed beside it, Triton's kernels (gpu_triton.py) where torch and triton
are those of that machine, and a manifest. `--here` puts the first two into dae_fast/ instead, for a machine on which
what was packed does not load. Needs pybind11, ninja, setuptools and nvcc.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .gpu_triton import open_cache

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT / "build" / "gpu-pack"
CORE = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
CUDA, NOTE, MANIFEST, TRITON = "_cuda.so", "_build.json", "manifest.json", "triton"
MEBIBYTES = 60  # that may be carried


class Change(NamedTuple):
    file: str
    old: str
    new: str


# Of csrc/cuda, what only a card can judge; an H200's answers are in docs/gpu.md.
VARIANTS = {
    "early fetch": (
        Change("kernels.cu", "if (!kFresh) fetch(ahead);", "fetch(ahead);"),
        Change("kernels.cu", "if (kFresh) fetch(ahead);", ""),
    ),
    "128 threads": (
        Change("batch.cuh", "constexpr int kThreads = 256;", "constexpr int kThreads = 128;"),
        Change("batch.cuh", "kMaxIterations = 16;", "kMaxIterations = 32;"),
    ),
    "8 values": (
        Change("batch.cuh", "sizeof(T) == 8 ? 4 : 16 / sizeof(T);", "sizeof(T) == 8 ? 4 : sizeof(T) == 1 ? 16 : 8;"),
    ),
}


def changed(csrc: Path, changes: Sequence[Change]) -> None:
    for change in changes:
        path = csrc / "cuda" / change.file
        text = path.read_text()
        if text.count(change.old) != 1:
            raise ValueError(f"{change.file} has {text.count(change.old)} times what a variant changes: {change.old}")
        path.write_text(text.replace(change.old, change.new))


def sources_hash() -> str:
    """Of all that is compiled: a pack of other sources must not pass for one of these."""
    paths = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file() and path.suffix != ".pyc")
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def build_script(source: Path) -> ModuleType:
    """How a tree builds its libraries; without setuptools, of which the other machine's may be too old."""
    spec = importlib.util.spec_from_file_location("dae_fast_libraries", source / "csrc" / "libraries.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_into(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    notes = build_script(ROOT).build_all(place / CORE, place)
    if errors := [f"{part}: {error}" for part in ("native", "cuda") if (error := notes[part])]:
        sys.exit("\n".join(errors))


def variant_library(name: str) -> str:
    return f"_cuda-{name.replace(' ', '-')}.so"


def compile_variant(name: str, changes: Sequence[Change]) -> None:
    with tempfile.TemporaryDirectory() as place:
        source = Path(place)
        shutil.copytree(ROOT / "csrc", source / "csrc")
        changed(source / "csrc", changes)
        script = build_script(source)
        try:
            script.build("cuda", PACK / variant_library(name))
        except script.NotBuilt as error:
            sys.exit(f"{name}: {error}")


def compile_triton() -> str:
    """What came of it."""
    if missing := [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]:
        return f"no kernels of Triton: there is no {' and no '.join(missing)}"
    command = [sys.executable, "-m", "benchmarks.gpu_triton", str(PACK / TRITON)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def opened_triton() -> Path:
    """Where the cache is once the pack is opened."""
    return ROOT / "build" / "gpu-triton"


def pack(variants: Sequence[str]) -> None:
    shutil.rmtree(PACK, ignore_errors=True)
    compile_into(PACK)
    for name in variants:
        compile_variant(name, VARIANTS[name])
    print(compile_triton())
    facts = {"sources": sources_hash(), "python": sys.version.split()[0], "variants": list(variants)}
    (PACK / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(path.stat().st_size for path in PACK.rglob("*")) / 2**20
    if size > MEBIBYTES:
        sys.exit(f"{PACK} has {size:.0f} MiB, more than {MEBIBYTES}")
    place = PACK.relative_to(ROOT)
    print(
        f"{place}: {', '.join(sorted(path.name for path in PACK.iterdir()))}; {size:.1f} MiB, Python {facts['python']}"
    )
    print(
        f"Take the tree with {place} to the machine with the GPU, and there, in two calls, each with a folder to fill:"
    )
    for call, seconds in (("a", 330), ("b", 270)):
        print(f"  python3 -m benchmarks.gpu_check {call} --out FOLDER   # at most {seconds} s")


def unpack() -> str:
    """Puts the pack into dae_fast/; returns why it could not be, or ""."""
    manifest = PACK / MANIFEST
    if not manifest.exists():
        return f"there is no {manifest.relative_to(ROOT)}"
    if json.loads(manifest.read_text())["sources"] != sources_hash():
        return "the pack is of other sources"
    if not (PACK / CORE).exists():
        return f"the pack is for another Python: it has no {CORE}"
    for name in (CORE, CUDA, NOTE):
        shutil.copy2(PACK / name, ROOT / "dae_fast")
    if (PACK / TRITON).exists():
        open_cache(PACK / TRITON, opened_triton())
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make gpu-pack", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--here", action="store_true", help="into dae_fast/")
    parser.add_argument("--architectures", default="90", help="of the CUDA library; 90 by default, an H100's or H200's")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS, help="all by default")
    options = parser.parse_args(arguments)
    os.environ["DAE_CUDA_ARCHS"] = options.architectures
    if options.here:
        compile_into(ROOT / "dae_fast")
    else:
        pack(options.variants)


if __name__ == "__main__":
    main()
