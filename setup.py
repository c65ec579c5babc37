"""Builds dae_fast._core, and the CUDA library beside it, with ninja; metadata is in pyproject.toml.

A machine without a compiler for one of them still gets a working package: the reason is kept in
dae_fast/_build.json, `python -m dae_fast info` shows it, and other backends run.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pybind11
from ninja import BIN_DIR
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

# The results must be the same on every instruction set: no contraction, no fast-math.
CFLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-strict-aliasing "
    "-ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra"
)
# The x86 baseline is v2 (2009), which numpy's own wheels need as well: plain SSE2 has no 64-bit compare,
# and without it the emulated fma does not vectorise.
# gcc 12 takes the "undefined" operands inside its own AVX-512 intrinsics for uninitialised variables.
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["baseline"] = "-march=x86-64-v2"
    ISAS["avx2"] = "-mavx2 -mfma -mf16c"
    ISAS["avx512"] = (
        "-mavx2 -mfma -mf16c -mavx512f -mavx512dq -mavx512bw -mavx512vl "
        "-mprefer-vector-width=512 -Wno-maybe-uninitialized"
    )


# Of the CUDA library: a binary for each, of those that nvcc knows, and PTX of the first for what lies between or after.
# DAE_CUDA_ARCHS names others, "90" or "80;90": a third of the time for one of four.
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
CUDA_ELEMENTS = {"f32": "float", "f64": "double", "bf16": "__nv_bfloat16", "f16": "__half"}
CUDA_FLAGS = "-std=c++17 -O3 -fmad=false -Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden"


def nvtx_include() -> str:
    """The compiler's flag for the NVTX headers, of the nvidia-nvtx wheel or of a CUDA toolkit; "" without them."""
    nvidia = find_spec("nvidia")
    wheels = [Path(place) / "cu13" for place in (nvidia.submodule_search_locations or ())] if nvidia else []
    for home in (*wheels, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))):
        if (home / "include" / "nvtx3" / "nvToolsExt.h").exists():
            return f"-isystem {home / 'include'}"
    return ""


def core_ninja(ninja: Writer, target: Path) -> None:
    includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')} {nvtx_include()}"
    extra = os.environ.get("CXXFLAGS", "")
    ninja.variable("cxx", os.environ.get("CXX", "c++"))
    ninja.variable("cflags", f"{CFLAGS} {includes} {extra}")
    ninja.rule("compile", "$cxx -MMD -MF $out.d $cflags $isa -c $in -o $out", depfile="$out.d", deps="gcc")
    ninja.rule("link", f"$cxx -shared {extra} {os.environ.get('LDFLAGS', '')} $in -ldl -o $out")
    kernels = [(f"kernels_{isa}", "cpu/kernels.cpp", f"-DDAE_ISA={isa} {flags}") for isa, flags in ISAS.items()]
    others = [
        (Path(source).stem, source, "")
        for source in ("cpu/dispatch.cpp", "cpu/run.cpp", "tensor.cpp", "plain.cpp", "bind.cpp")
    ]
    objects = [
        ninja.build(f"{name}.o", "compile", str(CSRC / source), variables={"isa": flags})[0]
        for name, source, flags in [*kernels, *others]
    ]
    ninja.build(str(target), "link", objects)


def cuda_architectures(nvcc: str) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = os.environ.get("DAE_CUDA_ARCHS", "").replace(",", ";").split(";")
    named = [name for part in wanted if (name := part.strip())]
    if unknown := [name for name in named if f"sm_{name}" not in known]:
        raise SystemExit(f"DAE_CUDA_ARCHS: {nvcc} does not know {', '.join(unknown)}; it knows {', '.join(known)}")
    return named or [a for a in CUDA_ARCHITECTURES if f"sm_{a}" in known]


def cuda_ninja(ninja: Writer, target: Path, nvcc: str) -> None:
    architectures = cuda_architectures(nvcc)
    codes = [f"-gencode arch=compute_{a},code=sm_{a}" for a in architectures]
    first = architectures[0]
    ninja.variable("nvflags", " ".join([CUDA_FLAGS, *codes, f"-gencode arch=compute_{first},code=compute_{first}"]))
    ninja.rule("compile", f"{nvcc} -MD -MF $out.d $nvflags $element -c $in -o $out", depfile="$out.d", deps="gcc")
    ninja.rule("link", f"{nvcc} -shared -cudart static $in -o $out")
    kernels = [
        (f"kernels_{name}", "kernels.cu", f"-DDAE_ELEMENT={element} -DDAE_NAME={name}")
        for name, element in CUDA_ELEMENTS.items()
    ]
    objects = [
        ninja.build(f"{name}.o", "compile", str(CSRC / "cuda" / source), variables={"element": flags})[0]
        for name, source, flags in [*kernels, ("api", "api.cu", ""), ("chain", "chain.cu", "")]
    ]
    ninja.build(str(target), "link", objects)


def run_ninja(what: str, build: Path, write: Callable[[Writer], None]) -> str | None:
    """Returns why it failed, or None."""
    build.mkdir(parents=True, exist_ok=True)
    with (build / "build.ninja").open("w") as stream:
        write(Writer(stream, width=110))
    run = subprocess.run([Path(BIN_DIR) / "ninja", "-C", build], capture_output=True, text=True)
    return f"the {what} build failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}" if run.returncode else None


def compile_core(build: Path, target: Path) -> str | None:
    """Returns why it failed, or None."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        return f"no C++ compiler: {compiler!r} is not on the PATH; install one or set CXX, then reinstall"
    return run_ninja("C++", build / "core", lambda ninja: core_ninja(ninja, target))


def compile_cuda(build: Path, target: Path) -> str | None:
    """Returns why it failed, or None. CUDACXX names the compiler, as for CMake."""
    wanted = os.environ.get("CUDACXX", "nvcc")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    nvcc = shutil.which(wanted) or shutil.which(wanted, path=toolkit)
    if not nvcc:
        return (
            f"no CUDA compiler: {wanted!r} is neither on the PATH nor in {toolkit}; install the toolkit, then reinstall"
        )
    return run_ninja("CUDA", build / "cuda", lambda ninja: cuda_ninja(ninja, target, nvcc))


def compile_parts(build: Path, core: Path, cuda: Path, note: Path) -> dict[str, str | None]:
    """Returns why each of "native" and "cuda" was not built, or None, and keeps it in `note`."""
    core.parent.mkdir(parents=True, exist_ok=True)
    notes: dict[str, str | None] = {}
    for part, target, compile_part in (("native", core, compile_core), ("cuda", cuda, compile_cuda)):
        without = part == "cuda" and notes["native"]  # nothing would load it
        notes[part] = error = "the native core is missing" if without else compile_part(build, target.resolve())
        if error:
            target.unlink(missing_ok=True)  # an older build must not pass for this one
    note.write_text(json.dumps(notes, indent=1) + "\n")
    return notes


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        core, build = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for part, error in compile_parts(build.resolve(), core.resolve(), self.cuda, self.note).items():
            if error:
                self.warn(f"{part} not built: {error}")

    @property
    def cuda(self) -> Path:
        return Path(self.build_lib) / "dae_fast" / "_cuda.so"

    @property
    def note(self) -> Path:
        return Path(self.build_lib) / "dae_fast" / "_build.json"

    def get_outputs(self) -> list[str]:
        paths = [*super().get_outputs(), str(self.cuda), str(self.note)]
        return [path for path in paths if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:  # an editable install
        package = ROOT / "dae_fast"
        for stale in [*package.glob("_core*.so"), *package.glob("_cuda.so")]:
            stale.unlink()
        super().copy_extensions_to_source()
        for path in (self.cuda, self.note):
            if path.exists():
                shutil.copy2(path, package)


if __name__ == "__main__":  # benchmarks/gpu_pack.py calls compile_parts
    setup(ext_modules=[Extension("dae_fast._core", sources=[], optional=True)], cmdclass={"build_ext": NinjaBuild})
