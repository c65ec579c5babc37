"""Builds dae_fast._core with ninja; metadata is in pyproject.toml.

A machine without a C++ compiler still gets a working package: the reason is kept in
dae_fast/_build.json, `python -m dae_fast info` shows it, and the reference backend runs.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
from ninja import BIN_DIR
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

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


def write_ninja(build: Path, target: Path) -> None:
    includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    extra = os.environ.get("CXXFLAGS", "")
    with (build / "build.ninja").open("w") as stream:
        ninja = Writer(stream, width=110)
        ninja.variable("cxx", os.environ.get("CXX", "c++"))
        ninja.variable("cflags", f"{CFLAGS} {includes} {extra}")
        ninja.rule("compile", "$cxx -MMD -MF $out.d $cflags $isa -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"$cxx -shared {extra} {os.environ.get('LDFLAGS', '')} $in -ldl -o $out")
        csrc = ROOT / "csrc"
        objects = [
            ninja.build(f"{name}.o", "compile", str(csrc / source), variables={"isa": flags})[0]
            for name, source, flags in [
                *((f"kernels_{isa}", "cpu/kernels.cpp", f"-DDAE_ISA={isa} {flags}") for isa, flags in ISAS.items()),
                ("dispatch", "cpu/dispatch.cpp", ""),
                ("bind", "bind.cpp", ""),
            ]
        ]
        ninja.build(str(target), "link", objects)


def compile_core(build: Path, target: Path) -> str | None:
    """Returns why it failed, or None."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        return f"no C++ compiler: {compiler!r} is not on the PATH; install one or set CXX, then reinstall"
    write_ninja(build, target)
    run = subprocess.run([Path(BIN_DIR) / "ninja", "-C", build], capture_output=True, text=True)
    return f"the C++ build failed:\n{run.stdout[-2000:]}{run.stderr[-2000:]}" if run.returncode else None


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        error = compile_core(build, target)
        if error:
            target.unlink(missing_ok=True)  # an older build must not pass for this one
            self.warn(f"native CPU backend not built, the reference backend will run: {error}")
        self.note.write_text(json.dumps({"native": error}, indent=1) + "\n")

    @property
    def note(self) -> Path:
        return Path(self.build_lib) / "dae_fast" / "_build.json"

    def get_outputs(self) -> list[str]:
        return [path for path in [*super().get_outputs(), str(self.note)] if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:  # an editable install
        package = ROOT / "dae_fast"
        for stale in package.glob("_core*.so"):
            stale.unlink()
        super().copy_extensions_to_source()
        shutil.copy2(self.note, package)


setup(ext_modules=[Extension("dae_fast._core", sources=[], optional=True)], cmdclass={"build_ext": NinjaBuild})
