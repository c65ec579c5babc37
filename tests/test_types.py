"""mypy --strict and pyright are content with the README's blocks, the examples, and tests/typed.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent

import pytest

import dae_fast as df

from .test_readme import BLOCKS

ROOT = Path(__file__).parents[1]
# What a reader's loop has at hand, as tests/test_readme.py has it.
AT_HAND = """
from collections.abc import Callable, Iterable

import dae_fast as df
import torch
from torch import Tensor


def block_{k}(
    step: int, x0: Tensor, x_t: Tensor, t: Tensor, pred: Tensor, alpha: Tensor, sigma: Tensor, noise: df.Noise,
    schedule: df.Schedule, batches: Iterable[Tensor], net: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer, log: Callable[[Tensor, Tensor], None],
) -> None:
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("typed")
    for path in (*(ROOT / "examples").glob("*.py"), ROOT / "tests" / "typed.py"):
        shutil.copy(path, place)
    for k, block in enumerate(BLOCKS):
        (place / f"readme_{k}.py").write_text(AT_HAND.format(k=k) + indent(block, "    "))
    return place


def check(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_mypy(sources: Path) -> None:
    """strict, but for calls of what torch leaves untyped: the project's own settings."""
    pytest.importorskip("mypy")
    files = sorted(path.name for path in sources.glob("*.py"))
    cache = ROOT / ".mypy_cache"
    flags = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", cache)
    done = check(sys.executable, "-m", "mypy", *flags, *files, cwd=sources)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not find_spec("pyright"), reason="needs pyright, of the extra [test]")
def test_pyright(sources: Path) -> None:
    settings = {"include": ["."], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (sources / "pyrightconfig.json").write_text(json.dumps(settings))
    done = check(sys.executable, "-m", "pyright", "--pythonpath", sys.executable, cwd=sources)
    if "error" not in done.stdout and done.returncode:
        pytest.skip(f"pyright could not start: {done.stderr[-300:]}")  # it fetches node where there is none
    assert done.returncode == 0, done.stdout


def test_a_module_that_defines_a_public_name_lists_it() -> None:
    public = [getattr(df, name) for name in df.__all__]
    public += [getattr(df.nn, name) for name in df.nn.__all__]
    public += [getattr(df.weighting, name) for name in df.weighting.__all__]
    for value in public:
        if isinstance(value, type) or callable(value):
            assert value.__name__ in import_module(value.__module__).__all__, value


@pytest.mark.parametrize("module", ["", ".nn", ".samplers", ".ops.weighting", ".profiling", ".schedule", ".continuous"])
def test_what_a_module_lists_is_there(module: str) -> None:
    found = import_module(f"dae_fast{module}")
    assert len(set(found.__all__)) == len(found.__all__)
    for name in found.__all__:
        assert hasattr(found, name), name
