"""Builds dae_fast._core, and the CUDA library beside it, as csrc/libraries.py says; metadata is in pyproject.toml.

What cannot be built is left out: dae_fast/_build.json keeps the reason, `python -m dae_fast info` shows it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))

from libraries import build_all  # noqa: E402


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        core = Path(self.get_ext_fullpath(ext.name)).resolve()
        for part, error in build_all(core, self.beside("_cuda.so"), self.beside("_build.json")).items():
            if error:
                self.warn(f"{part} not built: {error}")

    def beside(self, name: str) -> Path:
        return Path(self.build_lib).resolve() / "dae_fast" / name

    def get_outputs(self) -> list[str]:
        paths = [*super().get_outputs(), str(self.beside("_cuda.so")), str(self.beside("_build.json"))]
        return [path for path in paths if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:  # an editable install
        package = ROOT / "dae_fast"
        for stale in [*package.glob("_core*.so"), *package.glob("_cuda.so")]:
            stale.unlink()
        super().copy_extensions_to_source()
        for name in ("_cuda.so", "_build.json"):
            if self.beside(name).exists():
                shutil.copy2(self.beside(name), package)


if __name__ == "__main__":
    setup(ext_modules=[Extension("dae_fast._core", sources=[], optional=True)], cmdclass={"build_ext": NinjaBuild})
