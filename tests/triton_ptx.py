"""Triton's PTX for sm_90, run on the CPU: `python -m tests.triton_ptx [short]` compares it with the CPU's kernels.

In a process of its own, in which Triton compiles: its interpreter must be off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: the interpreter compiles nothing

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from dae_fast.kernels import native as native_module
from dae_fast.kernels import triton as launcher
from dae_fast.kernels.spec import Update

from . import cuda_on_cpu, ptx_on_cpu
from .flat import Flat
from .test_primitives import NOISE, randn, table_of
from .triton_sass import NVIDIA

SHAPES = ((5, 64), (3, 784), (7, 333), (2, 5000), (40, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAPS: dict[str, tuple[int, bool, tuple[int, ...], Any]] = {  # tensors, fresh noise, columns, clamp
    "add_noise": (1, True, (0, -1, 1, -1), None),
    "langevin_step": (2, True, (0, 1, 2, -1), None),
    "to_x0 with a clamp": (2, False, (0, 1, -1, -1), (2, 3, -1, -1.0, 1.0)),
    "two outputs": (1, True, (0, -1, 1, -1, 2, -1, 3, -1), None),
}
Outputs = tuple[Tensor, ...]
native, backend = Flat(native_module), Flat(launcher)


class Machine:
    """Stands in the place of the backend's launch."""

    def __init__(self, place: Path) -> None:
        self.place, self.libraries, self.launches = place, {}, 0
        self.backwards = False  # the order of a launch's blocks

    def library(self, ptx: str) -> Any:
        name = hashlib.sha256(ptx.encode()).hexdigest()[:16]
        if name not in self.libraries:
            source, library = self.place / f"{name}.cpp", self.place / f"{name}.so"
            source.write_text(ptx_on_cpu.translate(ptx, "ptx_alone"))
            command = [*cuda_on_cpu.compiler(), *ptx_on_cpu.FLAGS, "-shared", source, ptx_on_cpu.HERE / "alone.cpp"]
            subprocess.run([*map(str, command), "-o", str(library)], check=True)
            self.libraries[name] = ctypes.CDLL(str(library))
        return self.libraries[name]

    def launch(self, call: Any, args: tuple[Any, ...]) -> None:
        args = (*args, *call.fixed)
        compiled = backend.compile_for(NVIDIA["sm_90"], call.kernel, args)
        constants = {parameter.name for parameter in call.kernel.params if parameter.is_constexpr}
        given = [value for name, value in zip(call.kernel.arg_names, args, strict=True) if name not in constants]
        values = [*numbers(given), 0, 0]  # Triton's own scratch, which is not used
        library = self.library(compiled.asm["ptx"])
        if library.ptx_parameters() != len(values):
            raise ValueError(f"{call.kernel.__name__} has {library.ptx_parameters()} parameters, given {len(values)}")
        grid = (ctypes.c_uint * 3)(*call.grid)
        array = (ctypes.c_uint64 * len(values))(*values)
        library.ptx_launch(grid, backend.THREADS, array, int(self.backwards))
        self.launches += 1


def numbers(values: Any) -> Iterator[int]:
    """As they lie in a launch's parameters."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.data_ptr()
        elif isinstance(value, tuple):
            yield from numbers(value)
        elif value is not None:
            yield int(value) % 2**64


def calls(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[tuple[str, Callable[[Any], Outputs]]]:
    """By either backend; of a loss, whose sums have another order, the gradient."""
    B, D = shape
    x, y = (randn(shape, dtype, seed) for seed in range(2))
    table = table_of(dtype, B, 5).abs() + 0.2
    cpu = torch.device("cpu")
    yield "normals", lambda module: (module.normal(NOISE, B, D, dtype, cpu),)
    yield "words", lambda module: (module.words(NOISE, B, D, cpu),)
    for name, (tensors, fresh, columns, clamp) in MAPS.items():
        given = x, y if tensors > 1 else None, None, NOISE if fresh else None, table, None, columns, clamp
        yield name, lambda module, given=given: module.affine("op", *given)
    if dtype == torch.float32 and D <= 128:
        yield "a chain of one Gaussian", lambda module: (gaussian_chain(module, x),)
        yield "a chain of a double well", lambda module: (well_chain(module, x),)
    loss = "op", x, None, None, NOISE, table, None, (-1, 1, -1), None, None, 1, True, True
    yield "gradient of a loss", lambda module: (module.residual(*loss)[2],)


def gaussian_chain(module: Any, x: Tensor) -> Tensor:
    """Five steps of a mean and a precision of each element."""
    out, width = torch.empty_like(x), 4 << max((x.shape[1] - 1) // 4, 0).bit_length()
    means, precisions = torch.linspace(-1, 1, width)[None], torch.linspace(0.5, 2, width)[None]
    module.chain(x, (means, precisions, torch.zeros(1)), Update(0.1, 0.4, 5), NOISE, out)
    return out


def well_chain(module: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    module.well_chain(x, (-1.2, 0.8), Update(0.05, 0.3, 5), NOISE, out)
    return out


def compare(machine: Machine, shapes: Any = SHAPES, dtypes: Any = DTYPES) -> tuple[int, list[str]]:
    """How many calls, and which have other bits than the CPU's."""
    count, others = 0, []
    for dtype in dtypes:
        for shape in shapes:
            for name, call in calls(shape, dtype):
                got, wanted = call(backend), call(native)
                count += 1
                if not all(map(same_bits, got, wanted)):
                    off = max(float((g.double() - w.double()).abs().max()) for g, w in zip(got, wanted, strict=True))
                    others.append(f"{name} {shape} {dtype}: by {off:.3g}")
            table = table_of(torch.float32, shape[0], 5).abs() + 0.2
            x = randn(shape, torch.float32, 0)
            losses = []
            for machine.backwards in (False, True):
                loss = "op", x, None, None, NOISE, table, None, (-1, 1, -1), None, None, 1, True, True
                losses.append(backend.residual(*loss)[1])
            machine.backwards = False
            if not same_bits(*losses):
                others.append(f"a loss {shape}, its programs in another order")
    return count, others


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def main() -> int:
    short = sys.argv[1:] == ["short"]
    with tempfile.TemporaryDirectory() as place:
        machine = Machine(Path(place))
        backend._launch = machine.launch
        count, others = compare(machine, SHAPES[2:3], DTYPES[:1]) if short else compare(machine)
        kernels = len(machine.libraries)
    for other in others:
        print(other)
    print(f"triton {triton.__version__}: {count - len(others)} of {count} calls have the CPU's bits; {kernels} kernels")
    return int(bool(others))


if __name__ == "__main__":
    sys.exit(main())
