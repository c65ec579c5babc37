"""`make matrix`: what builds and runs on this machine, compiler by compiler, Python by Python; writes docs/matrix.md.

Every row is a build of its own whose noise is compared with that of the others. What is not here says so.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tests.test_install import NOISE_HASH, copy_sources

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "matrix.md"
COMPILERS = ("g++", "g++-11", "g++-12", "g++-13", "clang++-14", "clang++-16", "clang++-19")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.13t", "3.14", "3.14t")
ISAS = ("baseline", "avx2", "avx512")
QUICK = ("tests/test_noise.py", "tests/test_plain_calls.py")

# Without torch: the core alone, its words and its Box-Muller.
CORE_ALONE = """
import array, hashlib, random
from dae_fast import _core
assert list(_core.philox4x32_10([0] * 4, [0] * 2)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
draw = random.Random(0)
words = [array.array("I", (draw.getrandbits(32) for _ in range(1 << 16))) for _ in range(2)]
z = array.array("f", bytes(8 << 16))
_core.box_muller(words[0].buffer_info()[0], words[1].buffer_info()[0], z.buffer_info()[0], 1 << 16)
print(hashlib.sha256(z.tobytes()).hexdigest())
"""


@dataclass(frozen=True)
class Row:
    what: str
    version: str
    result: str


class Failed(Exception):  # noqa: N818
    """Why a row has no result."""


def output(*command: object, cwd: Path = ROOT, **environment: object) -> str:
    """What it printed."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CUDACXX", "DAE_FAST_CPU_ISA")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise Failed(f"{Path(str(command[0])).name}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    return done.stdout.strip()


def version(program: str) -> str:
    return output(program, "--version").splitlines()[0]


def of_compiler(name: str, folder: Path) -> str:
    """The library built by it, under this Python: the hash on every instruction set, and the tests of the noise."""
    source = copy_sources(folder)
    shutil.copytree(ROOT / "tests", source / "tests")
    output(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source, CXX=name, CUDACXX="none")
    done = []
    for isa in ISAS if platform.machine() == "x86_64" else ISAS[:1]:
        got = output(sys.executable, "-m", "dae_fast", "hash", cwd=source, DAE_FAST_CPU_ISA=isa, PYTHONPATH=source)
        if got != NOISE_HASH:
            raise Failed(f"other noise on {isa}: {got}")
        done.append(isa)
    last = output(sys.executable, "-m", "pytest", *QUICK, "-q", cwd=source, PYTHONPATH=source).splitlines()[-1]
    return f"same noise on {', '.join(done)}; tests of the noise and the plain calls {last.partition(']')[2] or 'pass'}"


def of_python(number: str, folder: Path) -> str:
    """The core built for it, in an environment without torch."""
    python = next(Path(found) for found in interpreters(number))
    source = copy_sources(folder)
    output(python, "-m", "venv", folder / "venv")
    its = folder / "venv" / "bin" / "python"
    output(its, "-m", "pip", "install", "-q", "pybind11>=3.0", "ninja", "setuptools>=77")
    output(its, "setup.py", "-q", "build_ext", "--inplace", cwd=source, CUDACXX="none")
    (source / "dae_fast" / "__init__.py").write_text("")  # it imports torch
    got = output(its, "-c", CORE_ALONE, cwd=source)
    if got != output(sys.executable, "-c", CORE_ALONE):
        raise Failed(f"other normals: {got}")
    return "the core builds, loads without torch and has the same words and normals"


def interpreters(number: str) -> Iterator[str]:
    """Those of pyenv first: what it puts on the PATH may be a stand-in that runs another version."""
    name = f"python{number}"
    homes = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from map(str, sorted(homes.glob(f"{number.rstrip('t')}.*/bin/{name}")))
    if (found := shutil.which(name)) and not homes.exists():
        yield found


def of_aarch64(_: str, folder: Path) -> str:
    """The CPU code cross-compiled and run by qemu: the first 2^24 normals of seed 0."""
    folder.mkdir()
    sources = [*(ROOT / "csrc" / "cpu").glob("*.cpp"), ROOT / "tests" / "aarch64" / "normals.cpp"]
    flags = ["-std=c++17", "-O3", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    program = folder / "normals"
    output("aarch64-linux-gnu-g++", *flags, "-DDAE_ISA=baseline", *sources, "-ldl", "-o", program)
    got = output("sh", "-c", f"qemu-aarch64 -L /usr/aarch64-linux-gnu {program} | sha256sum").split()[0]
    if got != NOISE_HASH:
        raise Failed(f"other noise: {got}")
    return "same noise under qemu"


def of_no_compiler(_: str, folder: Path) -> str:
    source = copy_sources(folder)
    output(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source, CXX="none", CUDACXX="none")
    shown = output(sys.executable, "-m", "dae_fast", "info", cwd=source, PYTHONPATH=source)
    if "no C++ compiler: 'none' is not on the PATH" not in shown:
        raise Failed(shown)
    return "installs, warns at import, runs as plain torch"


def rows() -> Iterator[Row]:
    for name in COMPILERS:
        if shutil.which(name):
            yield attempt(name, version(name), of_compiler)
    for number in PYTHONS:
        found = next(interpreters(number), None)
        yield (
            attempt(f"Python {number}", version(found), of_python) if found else Row(f"Python {number}", "", "not here")
        )
    if shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64"):
        yield attempt("aarch64", version("aarch64-linux-gnu-g++"), of_aarch64)
    else:
        yield Row("aarch64", "", "not here: needs aarch64-linux-gnu-g++ and qemu-aarch64")
    yield attempt("no compiler", "", of_no_compiler)


def attempt(what: str, of: str, check: Callable[[str, Path], str]) -> Row:
    print(f"== {what}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        try:
            return Row(what, of, check(what.removeprefix("Python "), Path(place) / "source"))
        except Failed as error:
            return Row(what, of, f"FAILED: {error}")


def page(found: list[Row]) -> str:
    import torch

    lines = [
        "# What builds and runs where",
        "",
        f"Made by `make matrix` on {date.today()}: {platform.system()} {platform.machine()}, torch {torch.__version__} "
        f"under Python {platform.python_version()}. The same noise is that of `python -m dae_fast hash`,",
        f"`{NOISE_HASH}`.",
        "",
        "| build | version | result |",
        "| --- | --- | --- |",
        *(f"| {row.what} | {row.version} | {row.result} |" for row in found),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    made = list(rows())
    PAGE.write_text(page(made))
    print(PAGE.read_text())
    sys.exit(any(row.result.startswith("FAILED") for row in made))
