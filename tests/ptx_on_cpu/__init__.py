"""The CUDA kernels' PTX, nvcc's own output for sm_90, run on the CPU: what reading the source cannot show.

In the place of each kernel that tests/cuda_on_cpu compiles, its PTX runs, translated to C++. What ptxas makes of it
is read in tests/cuda_sass.py, what the card does is for the card.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .. import cuda_on_cpu
from .translate import translate

HERE = Path(__file__).parent
NVCC = ("nvcc", "-std=c++17", "-O3", "-fmad=false", "-ptx", "-arch=sm_90")
# An fma in one instruction, not a call of libm's.
FMA = ("-mfma", "-mf16c") if platform.machine() in ("x86_64", "AMD64") else ()
FLAGS = (*cuda_on_cpu.FLAGS, "-w", f"-I{HERE}", *FMA)
LIBRARY = "_ptx_on_cpu.so"


def missing() -> str:
    """What is needed and not here, or ""."""
    return "" if shutil.which(NVCC[0]) else "there is no nvcc, whose PTX is run"


def compile_all(commands: Sequence[Sequence[object]]) -> None:
    """Two at a time."""
    for k in range(0, len(commands), 2):
        running = [subprocess.Popen([str(word) for word in command]) for command in commands[k : k + 2]]
        assert [process.wait() for process in running] == [0] * len(running)


def compile_ptx(place: Path, parts: Sequence[str] = tuple(cuda_on_cpu.PARTS)) -> None:
    """A .ptx of each part, in `place`."""
    place.mkdir(exist_ok=True)
    sources = {name: cuda_on_cpu.PARTS[name] for name in parts}
    compile_all(
        [[*NVCC, *options, source, "-o", place / f"{name}.ptx"] for name, (source, *options) in sources.items()]
    )


def build(place: Path, ptx: Path, objects: Path, wanted: str = "", define: str = "") -> Path:
    """The library, in `place`, of all PTX in `ptx` and of cuda_on_cpu's objects.

    wanted: the kernels, by a regular expression; no other may be launched then. define: for machine.h.
    """
    place.mkdir(exist_ok=True)
    sources = {}
    for path in ptx.glob("*.ptx"):
        sources[path.stem] = place / f"{path.stem}.cpp"
        sources[path.stem].write_text(translate(path.read_text(), f"ptx_{path.stem}", wanted))
    tables = " ".join(f"TABLE(ptx_{name})" for name in sources)
    sources["run"] = HERE / "run.cpp"
    compiler = [*cuda_on_cpu.compiler(), *FLAGS, f"-DTABLES={tables}", *[f"-D{define}"] * bool(define)]
    compile_all([[*compiler, "-c", source, "-o", place / f"ptx_{name}.o"] for name, source in sources.items()])
    made = [*(place / f"ptx_{name}.o" for name in sources), *(objects / f"{name}.o" for name in cuda_on_cpu.PARTS)]
    compile_all([[*cuda_on_cpu.compiler(), "-shared", *made, "-ldl", "-o", place / LIBRARY]])
    return place / LIBRARY


def launches(library: Path) -> int:
    """Of PTX, so far."""
    return ctypes.c_uint.in_dll(ctypes.CDLL(str(library)), "ptx_launches").value
