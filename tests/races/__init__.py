"""The CUDA kernels under ThreadSanitizer: `python -m tests.races` runs every kernel in many shapes and orders.

What is looked for is what two threads do to the same memory without an order that CUDA promises; without its fences, or
its barriers, the same code must be reported. Needs a C++ compiler with ThreadSanitizer.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import cuda_on_cpu

HERE = Path(__file__).parent
FLAGS = (
    *("-x", "c++", "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-fno-omit-frame-pointer", "-w"),
    *("-ffp-contract=off", "-fno-strict-aliasing", f"-I{HERE}", f"-I{cuda_on_cpu.HERE}"),
)
SOURCES = {
    **{name: cuda_on_cpu.PARTS[name] for name in ("f32", "bf16", "api")},
    "main": (str(HERE / "main.cpp"),),
    "others": (str(HERE / "others.cpp"),),
}
# Rows of less than a group to several segments, units of one row and of many, whole groups and ragged.
SHAPES = (
    (1, 1),
    (3, 5),
    (31, 4),
    (257, 4),
    (1100, 1),
    (33, 784),
    (9, 2048),
    (2, 4100),
    (3, 20_001),
    (2, 16_384),
    (0, 8),
)
# The order in which a block's threads take turns (emulator::Order), blocks at a time, and a seed for the blocks' order.
# The second and the third cut a batch alike: they must give the same bits.
ORDERS = ((0, 1, 1), (1, 2, 2), (2, 2, 3), (2, 3, 4))


@dataclass(frozen=True)
class Run:
    races: int
    checksum: str  # of all results


def build(place: Path) -> Path:
    """The program, in `place`."""
    commands = [
        [*cuda_on_cpu.compiler(), *FLAGS, *options, "-c", source, "-o", place / f"{name}.o"]
        for name, (source, *options) in SOURCES.items()
    ]
    for k in range(0, len(commands), 2):  # two at a time
        running = [subprocess.Popen([str(word) for word in command]) for command in commands[k : k + 2]]
        assert [process.wait() for process in running] == [0] * len(running)
    objects = [str(place / f"{name}.o") for name in SOURCES]
    program = place / "races"
    subprocess.run([*cuda_on_cpu.compiler(), "-fsanitize=thread", *objects, "-o", str(program)], check=True)
    return program


def run(program: Path, shape: Sequence[int], order: Sequence[int] = ORDERS[1], without: str = "") -> Run:
    """without: "no-fences" or "no-barriers", to see that they are missed."""
    command = [str(program), *map(str, (*shape, *order)), *[without] * bool(without)]
    options = {"TSAN_OPTIONS": "report_bugs=1 history_size=2 exitcode=0"}
    done = subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return Run(done.stderr.count("WARNING: ThreadSanitizer: data race"), done.stdout.strip())


def main() -> int:
    failed = False
    with tempfile.TemporaryDirectory() as place:
        program = build(Path(place))
        for shape in SHAPES:
            runs = [run(program, shape, order) for order in ORDERS]
            races, same = sum(r.races for r in runs), runs[1].checksum == runs[2].checksum
            failed |= bool(races) or not same
            print(f"{shape}: {races} races in {len(runs)} orders, {'the same' if same else 'OTHER'} bits", flush=True)
    return int(failed)
