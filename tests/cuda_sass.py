"""The CUDA library's machine code: `python -m tests.cuda_sass` prints the instructions of its streaming loops."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import dae_fast as df

LIBRARY = Path(df.__file__).with_name("_cuda.so")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
GROUP = {"f32": 4, "f64": 4, "bf16": 8, "f16": 8}  # values of one thread at a time
# The kernels that stream contiguous tensors: the inputs and outputs of every element, by template arguments.
STREAMS = {
    "affine_kernel<fresh, 0>": (0, 1),
    "affine_kernel<fresh, 1>": (1, 1),
    "affine_kernel<fresh, 2>": (2, 1),
    "affine_kernel<read, 1>": (1, 1),
    "affine_kernel<read, 2>": (2, 1),
    "affine_kernel<read, 2, clamped>": (2, 1),
    "affine_kernel<read, 3>": (3, 1),
    "affine_kernel<fresh, 3>": (3, 1),
    "affine_kernel<read, 4>": (4, 1),
    "affine_kernel<fresh, blended>": (3, 1),
    "affine_kernel<read, blended>": (4, 1),
    "affine_kernel<any>": (4, 2),
    "affine_kernel<five>": (5, 2),
    "residual_kernel<fresh, 1>": (1, 1),
    "residual_kernel<fresh, 2>": (2, 1),
    "residual_kernel<read, 2>": (2, 1),
    "residual_kernel<read, 3>": (3, 1),
    "residual_kernel<fresh, 1, masked>": (1, 1),
    "residual_kernel<fresh, 2, masked>": (2, 1),
    "residual_kernel<read, 2, masked>": (2, 1),
    "residual_kernel<read, 3, masked>": (3, 1),
    "residual_kernel<any>": (3, 1),
    "row_dots_kernel<fresh>": (3, 0),
    "row_dots_kernel<read>": (4, 0),
    "corrupt_kernel": (1, 1),
    "gaussian_kernel": (3, 1),
    "gaussian_grad_kernel": (4, 2),
}


FLAG = {"affine_kernel": "clamped", "residual_kernel": "masked"}  # what the last flag of a kernel's arguments says


@dataclass(frozen=True)
class Loop:
    """One that streams 16 bytes a thread: a turn may handle several groups."""

    instructions: int
    wide_loads: int
    wide_stores: int
    narrow_loads: int


@dataclass(frozen=True)
class Function:
    """Any kernel of the library."""

    mangled: str
    registers: int
    stack: int
    through_local_memory: int
    lines: tuple[tuple[int, str], ...]  # address and instruction


@dataclass(frozen=True)
class Kernel:
    """One that streams tensors."""

    name: str  # such as affine_kernel<fresh, 1>
    element: str
    access: str  # Whole or Strided
    registers: int
    loops: tuple[Loop, ...]


def tool(name: str) -> Path:
    """NVIDIA's disassembler comes with triton."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


@lru_cache
def functions(architecture: str) -> tuple[Function, ...]:
    def run(*options: str) -> str:
        command = [tool("cuobjdump"), "-arch", architecture, *options, LIBRARY]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"Function (\w+):\s+(REG:.*)", run("-res-usage")))
    found = []
    for function in run("-sass").split("Function : ")[1:]:
        mangled, code = function.split(maxsplit=1)
        lines = tuple((int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(\S.*?)\s*;", code))
        registers, stack = (int(re.findall(rf"{key}:(\d+)", usage[mangled])[0]) for key in ("REG", "STACK"))
        local = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for _, text in lines)
        found.append(Function(mangled, registers, stack, local, lines))
    return tuple(found)


@lru_cache
def kernels(architecture: str) -> tuple[Kernel, ...]:
    described = ((_describe(f.mangled), f) for f in functions(architecture))
    return tuple(Kernel(*names, f.registers, _streaming_loops(f.lines)) for names, f in described if names)


def _describe(mangled: str) -> tuple[str, str, str] | None:
    """Name, element type and access; None for a kernel that streams nothing."""
    match = re.search(r"cuda\d(f32|f64)|cuda\d(bf16|f16)", mangled)
    kernel = re.search(r"\d([a-z_]+_kernel)I(?:Lb([01])E)?(?:Lin?(\d+)E)?(?:Lb([01])E)?NS\w*?(Whole|Strided)", mangled)
    if not match or not kernel:
        return None
    name, fresh, inputs, flag, access = kernel.groups()
    arguments = [] if fresh is None else ["fresh" if fresh == "1" else "read"]
    if "Lin2E" in kernel[0]:
        arguments.append("blended")
    elif inputs:  # -1 is for all that has no kernel of its own, with fresh noise or without
        general = "five" if fresh == "1" and name == "affine_kernel" else "any"
        arguments = [general] if "Lin" in kernel[0] else [*arguments, inputs, *[FLAG[name]] * (flag == "1")]
    return name + f"<{', '.join(arguments)}>" * bool(arguments), match[1] or match[2], access


def _streaming_loops(lines: tuple[tuple[int, str], ...]) -> tuple[Loop, ...]:
    loops = []
    for at, text in lines:
        branch = re.search(r"\bBRA.*?0x([0-9a-f]+)", text)
        if not branch or int(branch[1], 16) >= at:
            continue
        body = [t for a, t in lines if int(branch[1], 16) <= a <= at]

        def count(pattern: str, body: list[str] = body) -> int:
            return sum(bool(re.search(pattern, t)) for t in body)

        loads, stores = count(r"\bLDG\S*\.128"), count(r"\bSTG\S*\.128")
        if loads or stores:
            loops.append(Loop(len(body), loads, stores, count(r"\bLDG\b") - loads))
    return tuple(loops)


def instructions_a_value(kernel: Kernel) -> float:
    """Of its best loop: that of one long row."""
    loads, stores = STREAMS[kernel.name]
    doubled = 2 if kernel.element == "f64" else 1  # four doubles are two accesses
    turns = (loop.wide_loads / loads if loads else loop.wide_stores / stores for loop in kernel.loops)
    return min(
        loop.instructions * doubled / turn / GROUP[kernel.element]
        for loop, turn in zip(kernel.loops, turns, strict=True)
    )


def main() -> None:
    for architecture in ARCHITECTURES:
        for kernel in sorted(kernels(architecture), key=lambda k: (k.element, k.name)):
            if kernel.access == "Whole":
                print(
                    f"{architecture:7}{kernel.name:34}{kernel.element:5}{kernel.registers:4} registers, "
                    f"{instructions_a_value(kernel):5.1f} instructions a value"
                )


if __name__ == "__main__":
    main()
