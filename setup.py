"""Builds dae_fast._core, and the libraries for GPUs beside it, as csrc/libraries.py says; metadata: pyproject.toml.

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

BESIDE = ("_cuda.so", "_hip.so", "_build.json")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        core = Path(self.get_ext_fullpath(ext.name)).resolve()
        for part, error in build_all(core, self.built()).items():
            if error:
                self.warn(f"{part} not built: {error}")

    def built(self) -> Path:
        return Path(self.build_lib).resolve() / "dae_fast"

    def get_outputs(self) -> list[str]:
        paths = [*super().get_outputs(), *(str(self.built() / name) for name in BESIDE)]
        return [path for path in paths if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:  # an editable install
        package = ROOT / "dae_fast"
        for stale in [*package.glob("_core*.so"), *(package / name for name in BESIDE)]:
            stale.unlink(missing_ok=True)
        super().copy_extensions_to_source()
        for name in BESIDE:
            if (self.built() / name).exists():
                shutil.copy2(self.built() / name, package)


if __name__ == "__main__":
    setup(ext_modules=[Extension("dae_fast._core", sources=[], optional=True)], cmdclass={"build_ext": NinjaBuild})
