"""What the libraries are made of and how: compilers, flags, and the table of objects; ninja compiles what has changed.

What cannot be built is left out, and `build_all` notes why. setup.py calls it, and so can whoever has no setuptools.
Read from the environment: CXX, CXXFLAGS, LDFLAGS; CUDACXX (nvcc; "none" for no CUDA); DAE_CUDA_ARCHS ("90;100");
HIPCXX (hipcc; "none" for no HIP); DAE_HIP_ARCHS ("gfx90a;gfx942").
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pybind11
from ninja import BIN_DIR
from ninja.ninja_syntax import Writer

CSRC = Path(__file__).parent.resolve()
# Kept for the next build.
BUILD = CSRC.parent / "build" / f"ninja-{sysconfig.get_platform()}-{sysconfig.get_config_var('SOABI')}"

# The results must be the same on every instruction set: no contraction, no fast-math.
CFLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-strict-aliasing "
    "-ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-missing-field-initializers"
)
# The x86 baseline is v2 (2009), which numpy's own wheels need as well: plain SSE2 has no 64-bit compare,
# and without it the emulated fma does not vectorise.
# gcc 12 takes the "undefined" operands inside its own AVX-512 intrinsics for uninitialised variables.
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512"
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS = {"baseline": "-march=x86-64-v2", "avx2": AVX2, "avx512": f"{AVX512} -Wno-maybe-uninitialized"}
# Of the CUDA library: a binary for each, of those that nvcc knows, and PTX of the first for what lies between or after.
CUDA_ARCHS = "80;90;100;120"
CUDA_FLAGS = "-std=c++17 -O3 -fmad=false -Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden"
# Of the HIP library, those that hipcc and its device libraries know. ROCm's default would fuse products and sums.
HIP_ARCHS = "gfx90a;gfx942;gfx1030;gfx1100"
HIP_FLAGS = (
    "-x hip -std=c++17 -O3 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off "
    "-fno-gpu-flush-denormals-to-zero -Wall -Wextra"
)
GPU_ELEMENTS = {"f32": "float", "f64": "double", "bf16": "__nv_bfloat16", "f16": "__half"}

GPU_OBJECTS = [
    *((f"kernels_{n}", "cuda/kernels.cu", f"-DDAE_ELEMENT={e} -DDAE_NAME={n}") for n, e in GPU_ELEMENTS.items()),
    ("api", "cuda/api.cu", ""),
    ("chain", "cuda/chain.cu", ""),
]
# Of each library: (object, source, flags of its own).
OBJECTS = {
    "native": [
        *((f"kernels_{isa}", "cpu/kernels.cpp", f"-DDAE_ISA={isa} {flags}") for isa, flags in ISAS.items()),
        *((Path(s).stem, s, "") for s in ("cpu/dispatch.cpp", "cpu/run.cpp", "tensor.cpp", "call.cpp", "bind.cpp")),
    ],
    "cuda": GPU_OBJECTS,
    "hip": GPU_OBJECTS,
}


class NotBuilt(Exception):  # noqa: N818
    """Why a library is left out."""


def include(name: str, headers: Path) -> str:
    """The compiler's flag for headers, through a link: an isolated build has them in a new folder each time."""
    link = BUILD / "include" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(headers)
    return f"-isystem {link}"


def nvtx() -> str:
    """The same of the nvidia-nvtx wheel or a CUDA toolkit; "" without them."""
    spec = find_spec("nvidia")
    homes = [Path(place) / "cu13" for place in (spec.submodule_search_locations or ())] if spec else []
    found = (home / "include" for home in (*homes, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))))
    return next((include("nvtx", headers) for headers in found if (headers / "nvtx3" / "nvToolsExt.h").exists()), "")


def native_commands() -> tuple[str, str]:
    """How the core is compiled and linked."""
    cxx, extra = os.environ.get("CXX", "c++"), os.environ.get("CXXFLAGS", "")
    if not shutil.which(shlex.split(cxx)[0]):
        raise NotBuilt(f"no C++ compiler: {cxx!r} is not on the PATH; install one or set CXX, then reinstall")
    own = include(f"pybind11-{pybind11.__version__}", Path(pybind11.get_include()))
    headers = f"{own} -isystem {sysconfig.get_path('include')} {nvtx()}"
    link = f"{cxx} -shared {extra} {os.environ.get('LDFLAGS', '')} $in -ldl -o $out"
    return f"{cxx} -MMD -MF $out.d {CFLAGS} {headers} {extra}", link


def torch_version(runtime: str) -> str:
    """Of "cuda" or "hip", "" for none, of the torch that is installed into, which an isolated build cannot import."""
    version = Path(sysconfig.get_path("purelib"), "torch", "version.py")
    text = version.read_text() if version.exists() else ""
    found = re.search(rf"^{runtime}\b.*=\s*['\"](.*)['\"]", text, re.MULTILINE)
    return found[1] if found else ""


def gpu_compiler(runtime: str, title: str, variables: tuple[str, str], name: str, home: str) -> str:
    """Where nvcc or hipcc is. variables: those that name it and its architectures; either asks for the library."""
    compiler, toolkit = os.environ.get(variables[0], name), Path(home) / "bin"
    if not set(variables) & set(os.environ) and not torch_version(runtime):
        raise NotBuilt(
            f"no torch with {title} is installed here; to build it all the same set {variables[0]}={name}, "
            "then reinstall"
        )
    path = shutil.which(compiler) or shutil.which(compiler, path=toolkit)
    if not path:
        raise NotBuilt(
            f"no {title} compiler: {compiler!r} is neither on the PATH nor in {toolkit}; "
            "install the toolkit, then reinstall"
        )
    return path


def wanted_architectures(variable: str, default: str) -> list[str]:
    return re.split("[;, ]+", os.environ.get(variable, default).strip("; "))


def cuda_commands() -> tuple[str, str]:
    """How the CUDA library is compiled and linked."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = gpu_compiler("cuda", "CUDA", ("CUDACXX", "DAE_CUDA_ARCHS"), "nvcc", home)
    known = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = wanted_architectures("DAE_CUDA_ARCHS", CUDA_ARCHS)
    archs = [a for a in wanted if f"sm_{a}" in known]
    if "DAE_CUDA_ARCHS" in os.environ and archs != wanted:
        raise SystemExit(f"DAE_CUDA_ARCHS={';'.join(wanted)}: {path} knows {', '.join(known)}")
    codes = [*(f"arch=compute_{a},code=sm_{a}" for a in archs), f"arch=compute_{archs[0]},code=compute_{archs[0]}"]
    flags = " ".join([CUDA_FLAGS, *(f"-gencode {code}" for code in codes)])
    return f"{path} -MD -MF $out.d {flags}", f"{path} -shared -cudart static $in -o $out"


def hip_commands() -> tuple[str, str]:
    """How the HIP library is compiled and linked, from the sources of the CUDA library."""
    home = os.environ.get("ROCM_PATH", "/opt/rocm")
    path = gpu_compiler("hip", "ROCm", ("HIPCXX", "DAE_HIP_ARCHS"), "hipcc", home)
    hipcc = f"env HIP_PLATFORM=amd {path}"  # where it finds an nvcc it would compile for NVIDIA's GPUs
    said = subprocess.run(shlex.split(f"{hipcc} --version"), capture_output=True, text=True).stdout
    version, torchs = re.search(r"HIP version: (\d+)", said), torch_version("hip")
    if version and torchs and version[1] != torchs.partition(".")[0]:
        raise NotBuilt(
            f"{path} has HIP {version[1]}, torch HIP {torchs}: one process would have two runtimes; install torch's"
        )
    probe = BUILD / "probe.hip"
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text("")
    failures = {}
    for arch in wanted_architectures("DAE_HIP_ARCHS", HIP_ARCHS):
        asks = f"{hipcc} -x hip --offload-arch={arch} --offload-device-only -c {probe} -o {probe}.o"
        done = subprocess.run(shlex.split(asks), capture_output=True, text=True)
        failures[arch] = done.stderr.strip() if done.returncode else ""
    archs = [arch for arch, failure in failures.items() if not failure]
    if "DAE_HIP_ARCHS" in os.environ and len(archs) < len(failures):
        raise SystemExit("DAE_HIP_ARCHS: " + "\n".join(filter(None, failures.values())))
    if not archs:
        raise NotBuilt("\n".join(failures.values()))
    targets = " ".join(f"--offload-arch={arch}" for arch in archs)
    return f"{hipcc} -MD -MF $out.d {HIP_FLAGS} {targets}", f"{hipcc} -shared {targets} $in -o $out"


COMMANDS = {"native": native_commands, "cuda": cuda_commands, "hip": hip_commands}


def build(part: str, target: Path) -> None:
    """Compiles and links what has changed, saying so file by file."""
    folder = BUILD / part
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.ninja").open("w") as stream:
        ninja = Writer(stream, width=110)
        compiles, links = COMMANDS[part]()
        ninja.rule("compile", f"{compiles} $flags -c $in -o $out", "compiling $out", "$out.d", deps="gcc")
        ninja.rule("link", links, "linking $out")
        made = [ninja.build(f"{n}.o", "compile", str(CSRC / s), variables={"flags": f})[0] for n, s, f in OBJECTS[part]]
        ninja.build("library.so", "link", made)
    lines = []
    with subprocess.Popen(
        [Path(BIN_DIR) / "ninja", "-C", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        for line in run.stdout:
            print(f"{part}: {line}", end="", flush=True)
            lines.append(line)
    if run.returncode:
        first = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), 0)
        raise NotBuilt(f"the {part} build failed:\n{''.join(lines[first : first + 20])}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(folder / "library.so", target)


def build_all(core: Path, package: Path) -> dict[str, str | None]:
    """Builds the libraries, those for GPUs into `package`, and notes there why one is left out."""
    errors: dict[str, str | None] = {}
    for part, target in (("native", core), ("cuda", package / "_cuda.so"), ("hip", package / "_hip.so")):
        target.unlink(missing_ok=True)  # an older build must not pass for this one
        try:
            if part != "native" and errors["native"]:
                raise NotBuilt("the native core is missing")  # nothing would load it
            build(part, target)
            errors[part] = None
        except NotBuilt as error:
            errors[part] = str(error)
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(errors, indent=1) + "\n")
    return errors
