"""The CUDA kernels under ThreadSanitizer: a part of `make prove-gpu`, which takes more shapes and orders."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from . import cuda_on_cpu, races


def missing(place: Path) -> str:
    source = place / "empty.cpp"
    source.write_text("#include <sanitizer/tsan_interface.h>\nint main() { return 0; }\n")
    command = [*cuda_on_cpu.compiler(), "-fsanitize=thread", str(source), "-o", str(place / "empty")]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode:
        done = subprocess.run([str(place / "empty")], capture_output=True, text=True)
    return done.stderr[-300:] if done.returncode else ""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("races")
    if why := missing(place):
        pytest.skip(f"no ThreadSanitizer: {why}")
    return races.build(place)


@pytest.mark.parametrize("shape", [(3, 5), (257, 4), (2, 16_384)], ids=str)
def test_there_are_none(program: Path, shape: tuple[int, int]) -> None:
    """And the order of threads and blocks changes no bit. Rows of a few segments take the ticket."""
    first, second = (races.run(program, shape, order) for order in races.ORDERS[1:3])
    assert (first.races, second.races) == (0, 0)
    assert first.checksum == second.checksum


def test_missing_fences_are_seen(program: Path) -> None:
    assert races.run(program, (2, 16_384), without="no-fences").races > 0


def test_missing_barriers_are_seen(program: Path) -> None:
    assert races.run(program, (3, 5), without="no-barriers").races > 0
