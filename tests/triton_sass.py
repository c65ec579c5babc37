"""The Triton kernels' machine code, compiled without a GPU.

`python -m tests.triton_sass [sm_80 sm_90 sm_100]` prints the instructions of each streaming loop;
`--json [--all]` what test_triton_code.py asserts, from a process of its own: here the interpreter must be off.

The calls are the ops' own; only the launch is replaced, by one that keeps what would have been launched.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: the interpreter compiles nothing

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import dae_fast as df
from dae_fast.kernels import triton as launcher
from dae_fast.kernels.spec import BLEND, Update, compute_dtype
from dae_fast.primitives.masks import Drawn

from .flat import KINDS, Flat

NVIDIA = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
AMD = GPUTarget("hip", "gfx942", 64)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

backend = Flat(launcher)
LONG, SHORT = (64, 4, 64, 64), (64, 784)
NOISE = df.Noise(1)
LEVELS = torch.arange(64)
THRESHOLDS = torch.zeros(64, 2, dtype=torch.int64)
PSEUDO_HUBER = KINDS.index("pseudo_huber")


def table(dtype: torch.dtype, columns: int = 5) -> Tensor:
    return torch.ones(64, columns, dtype=compute_dtype(dtype))


def _affine(
    columns: tuple[int, ...], inputs: int, noise: bool = False, clamp: Any = None, w: bool = False
) -> Callable[[Tensor], Any]:
    def call(x: Tensor) -> Any:
        y, z = x if inputs > 1 else None, x if inputs > 2 else None
        fresh = NOISE if noise else None
        return backend.affine("op", x, y, z, fresh, table(x.dtype), LEVELS, columns, clamp, w=x if w else None)

    return call


def _residual(tensor: bool, mask: Any = None, kind: str = "mse") -> Callable[[Tensor], Any]:
    columns = 1, 2, 3 if "huber" in kind else -1

    def call(x: Tensor) -> Any:
        y, noise = (x, None) if tensor else (None, NOISE)
        kept = torch.ones_like(x, dtype=torch.bool) if mask is True else mask
        given = "op", x, y, None, noise, table(x.dtype), LEVELS, columns, kept, None, 1, True, True
        return backend.residual(*given, kind=KINDS.index(kind))

    return call


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[Tensor], Any]
    loads: int  # operands read, and written, by every element
    stores: int
    # Instructions a value in the streaming loop of the types up to fp32: a little above what was measured.
    most: float
    shape: tuple[int, ...] = LONG


CASES = [
    Case("add_noise", _affine((0, -1, 1, -1), 1, noise=True), 1, 1, 46),
    Case("add_noise, short rows", _affine((0, -1, 1, -1), 1, noise=True), 1, 1, 48, SHORT),
    Case("add_noise with target", _affine((0, -1, 1, -1, 2, -1, 3, -1), 1, noise=True), 1, 2, 50),
    Case("langevin_step", _affine((0, 1, 2, -1), 2, noise=True), 2, 1, 50),
    Case("an input without a coefficient", _affine((-1, 1, -1, -1), 2), 1, 1, 9),
    Case("to_x0", _affine((0, 1, -1, -1), 2), 2, 1, 10),
    Case("to_eps with clamp", _affine((0, 1, -1, -1), 2, clamp=(2, 3, -1, -1.0, 1.0)), 2, 1, 16),
    Case("guidance", _affine((0, 1, -1, 2), 2, w=True), 3, 1, 14),
    Case("guidance, clamp and noise", _affine((0, 1, 2, 3), 2, True, (2, 3, 4, -1.0, 1.0), w=True), 3, 1, 61),
    Case("a blend with noise", _affine((0, BLEND, 1, BLEND), 2, noise=True, w=True), 3, 1, 56),
    Case("noise_mse", _residual(tensor=False), 1, 1, 50),
    Case("noise_mse, short rows", _residual(tensor=False), 1, 1, 52, SHORT),
    Case("noise_mse on tensors", _residual(tensor=True), 2, 1, 13),
    Case("noise_mse with mask", _residual(tensor=False, mask=True), 1, 1, 54),
    Case("noise_mse with drawn mask", _residual(tensor=False, mask=Drawn(NOISE, THRESHOLDS, True)), 1, 1, 75),
    Case("mse with drawn mask", _residual(tensor=True, mask=Drawn(NOISE, THRESHOLDS[:1], False)), 2, 1, 33),
    Case("l1", _residual(tensor=True, kind="l1"), 2, 1, 18),
    Case("huber", _residual(tensor=True, kind="huber"), 2, 1, 23),
    Case("pseudo_huber", _residual(tensor=True, kind="pseudo_huber"), 2, 1, 68),
    Case("corrupt", lambda x: backend.corrupt(x, NOISE, THRESHOLDS, 0.0, 1.0), 1, 1, 27),
    Case("reparameterise", lambda x: backend.gaussian(x, x, None, NOISE), 2, 1, 90),
    Case("its gradient", lambda x: backend.gaussian_grad(x, x, None, NOISE, x, x[:, 0, 0, 0]), 3, 2, 97),
    Case("row_dots", lambda x: backend.row_dots(x, x, None, None, NOISE), 2, 0, 48),
    Case("normal", lambda x: backend.normal(NOISE, len(x), x[0].numel(), x.dtype, "cpu"), 0, 1, 43),
]


def _variants() -> dict[str, Callable[[], Any]]:
    """Calls that take the kernels' other ways; what is asked of them is that they compile, without a stack.

    The interpreter runs these ways too, but takes Python that the compiler does not.
    """
    x = torch.empty(LONG)
    short, odd, half = torch.empty(64, 2), torch.empty(64, 4097), torch.empty(64, 785, dtype=torch.bfloat16)
    last = torch.empty(LONG).to(memory_format=torch.channels_last)
    video = torch.empty(64, 3, 4, 8, 8).transpose(1, 2)
    f32, f64 = table(torch.float32, 4), table(torch.float64, 4)
    in_memory = df.Noise(1, sample=LEVELS).to("cpu")
    mask = torch.ones(64, 1, 64, 64, dtype=torch.bool).expand(LONG)
    whole = torch.empty(1024, 2**14)  # a row to a program, uncut
    thin = torch.empty(64, 64, 8, 8, dtype=torch.bool).to(memory_format=torch.channels_last)[:, :32]
    one, weight = torch.ones(()), torch.ones(64, dtype=torch.float64)
    masked, left = Drawn(NOISE, THRESHOLDS[:1], False), Drawn(in_memory, THRESHOLDS, True)

    mean = None, 1, True, True  # of a loss: no weight, its reduction, with its gradient

    def affine(x: Tensor, y: Tensor | None = None, index: Tensor | None = LEVELS, noise: Any = NOISE) -> Any:
        return backend.affine("op", x, y, None, noise, f32, index, (0, 1, 2, 3), w=y)

    def residual(pred: Tensor, *rest: Any, noise: Any = NOISE, **options: Any) -> Any:
        return backend.residual("op", pred, None, None, noise, f32, LEVELS, (1, 2, 3), *rest, **options)

    def weighed(pred: Tensor, table: Tensor, mask: Any = None, weight: Tensor | None = None) -> Any:
        columns, also = (1, 2, -1, 3, 0, 1), table.new_empty(2)
        given = "op", pred, pred, None, NOISE, table, LEVELS, columns, mask, weight, 1, True, True
        return backend.residual(*given, also=also)

    def of_cut_rows(pred: Tensor) -> Any:
        return backend.residual("op", pred, None, None, NOISE, f32[:1], None, (1, 2, -1), None, *mean)

    def of_fp64(kind: int) -> Any:
        wide = x.double()
        return backend.residual("op", wide, wide, None, None, f64, None, (1, 2, 3), left, *mean, kind=kind)

    def corrupt(x: Tensor, noise: Any = NOISE) -> Any:
        return backend.corrupt(x, noise, THRESHOLDS, 0.0, 1.0)

    def choice(mask: Drawn) -> Any:
        return backend._choice(*mask[:2], x.device)

    def chain(K: int) -> Any:
        tables = torch.empty(K, 32), torch.empty(K, 32), torch.empty(K)
        return backend.chain(odd[:, :32], tables, Update(0.1, 0.2, 9), in_memory, torch.empty(64, 32))

    return {
        "chain of one Gaussian": lambda: chain(1),
        "chain of a mixture": lambda: chain(3),
        "chain of a double well": lambda: backend.well_chain(
            short, (-1.0, 1.0), Update(0.1, 0.2, 9), NOISE, torch.empty(64, 2)
        ),
        "rows of 2": lambda: affine(short),
        "rows of 4097": lambda: affine(odd, odd),
        "bf16 rows of 785": lambda: affine(half),
        "channels_last": lambda: affine(last, last),
        "channels_last without noise": lambda: affine(last, x, noise=None),
        "video": lambda: affine(video),
        "misaligned": lambda: affine(torch.empty(x.numel() + 1)[1:].view(LONG)),
        "int32 levels": lambda: affine(x, index=LEVELS.int()),
        "a level for each row": lambda: affine(short, index=None),
        "key and samples in memory": lambda: affine(x, noise=in_memory),
        "loss of channels_last": lambda: residual(last, None, None, 1, True, True),
        "loss of rows of 2": lambda: residual(short, None, weight, 1, True, True),
        "loss with expanded mask": lambda: residual(x, mask, weight.float(), 1, True, True),
        "sum with mask": lambda: residual(x, mask, weight, 2, True, True),
        "loss of one row": lambda: of_cut_rows(torch.empty(1, 2**20)),
        "loss of many cut rows": lambda: of_cut_rows(torch.empty(512, 2**14)),
        "means": lambda: residual(odd, None, None, 0, False, False),
        "means of rows of 2": lambda: residual(short, None, None, 0, False, False),
        "gradient for an upstream": lambda: residual(x, None, weight, 1, False, True, one),
        "gradient made again": lambda: residual(x, None, None, 1, False, True, one, torch.empty(LONG)),
        "weighed": lambda: weighed(x, f32),
        "weighed rows of 2": lambda: weighed(short, f32, left, weight),
        "weighed odd rows": lambda: weighed(odd, f32, weight=weight),
        "weighed fp64": lambda: weighed(x.double(), f64),
        "penalties of rows of 2": lambda: residual(short, left, *mean, kind=PSEUDO_HUBER),
        "penalties of odd rows": lambda: residual(odd, masked, *mean, kind=KINDS.index("huber")),
        "penalties of channels_last": lambda: residual(last, left, *mean, kind=KINDS.index("l1")),
        "pseudo_huber in fp64": lambda: of_fp64(PSEUDO_HUBER),
        "huber in fp64": lambda: of_fp64(KINDS.index("huber")),
        "sum with drawn mask": lambda: residual(half, left, weight, 2, True, True),
        "loss of whole rows": lambda: weighed(whole, f32, torch.empty(whole.shape, dtype=torch.bool), weight),
        "count of a drawn mask": lambda: backend._count_drawn(LONG, choice(masked), False, x.device),
        "count of short rows": lambda: backend._count_drawn((64, 2), choice(left), True, x.device, one),
        "count of a mask": lambda: backend._count_stored(torch.empty(whole.shape, dtype=torch.bool)),
        "count of an expanded mask": lambda: backend._count_stored(mask, one),
        "count of a mask in channels_last": lambda: backend._count_stored(thin),
        "count of a mask's short rows": lambda: backend._count_stored(short.bool(), one.double()),
        "corrupted rows of 2": lambda: corrupt(short, in_memory),
        "corrupted rows of 4097": lambda: corrupt(odd),
        "corrupted bf16 rows of 785": lambda: corrupt(half),
        "corrupted channels_last": lambda: corrupt(last),
        "corrupted fp64": lambda: corrupt(x.double()),
        "row_dots of rows of 2": lambda: backend.row_dots(short, short, None, short, None),
        "row_dots of channels_last": lambda: backend.row_dots(last, x, None, None, in_memory),
        "no coefficient": lambda: backend.affine("op", x, None, None, None, f32, None, (-1, -1, -1, -1, 0, -1, -1, -1)),
        "words": lambda: backend.words(NOISE, 64, 785, "cpu", fold=False),
        "levels": lambda: backend.words(NOISE, 64, 1, "cpu", below=1000),
        "normals": lambda: backend.normal(in_memory, 64, 2, torch.float16, "cpu"),
        "fold_in": lambda: backend.fold_in_tensor(in_memory, 3),
        "fold_in of a tensor": lambda: backend.fold_in_tensor(NOISE, LEVELS[0]),
    }


VARIANTS = _variants()
# Every case where it counts most, then each other type and architecture once for each kind of loop.
_TYPICAL = [case for case in CASES if case.name in ("add_noise", "to_x0", "noise_mse")]
ON_AMD = ("add_noise", "to_x0", "noise_mse", "guidance", "noise_mse with drawn mask", "pseudo_huber", "corrupt")
TESTED = [
    *((case, dtype, "sm_90") for case in CASES for dtype in (torch.float32, torch.bfloat16)),
    *((case, torch.float64, "sm_90") for case in _TYPICAL),
    *((case, torch.bfloat16, arch) for case in _TYPICAL for arch in ("sm_80", "sm_100")),
    (_TYPICAL[0], torch.float16, "sm_90"),
]


# Of `make test`: every case in one type, each other type and architecture once, and what runs the least like the cases.
QUICK = [
    *((case, torch.float32, "sm_90") for case in CASES),
    *((_TYPICAL[0], dtype, "sm_90") for dtype in (torch.bfloat16, torch.float16, torch.float64)),
    *((_TYPICAL[2], torch.bfloat16, arch) for arch in ("sm_80", "sm_90", "sm_100")),
]
QUICK_ON_AMD = ("add_noise", "noise_mse", "pseudo_huber")
QUICK_VARIANTS = (
    *("bf16 rows of 785", "channels_last", "video", "key and samples in memory", "loss of rows of 2", "sum with mask"),
    *("loss of one row", "means", "gradient made again", "weighed odd rows", "huber in fp64", "count of a mask"),
    *("corrupted channels_last", "row_dots of channels_last", "levels", "fold_in of a tensor"),
)


@dataclass(frozen=True)
class Code:
    """A kernel's streaming loop, and its registers and bytes of stack.

    turns: tiles that one turn of the loop handles. moves: instructions through shared or local memory.
    """

    instructions_a_value: float
    turns: int
    wide_loads: int
    wide_stores: int
    moves: int
    registers: int
    stack: int


def launches(call: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """(the backend's _Call, the kernel's arguments) of each launch, on tensors that nothing reads."""
    caught: list[tuple[Any, tuple[Any, ...]]] = []
    launch, backend._launch = backend._launch, lambda call, args: caught.append((call, (*args, *call.fixed)))
    try:
        call()
    finally:
        backend._launch = launch
    return caught


def launched(call: Callable[[], Any]) -> tuple[Any, tuple[Any, ...]]:
    """(kernel, arguments) of what a call launches last."""
    last, args = launches(call)[-1]
    return last.kernel, args


def compile_case(case: Case, dtype: torch.dtype, target: GPUTarget) -> Any:
    kernel, args = launched(lambda: case.call(torch.empty(case.shape, dtype=dtype)))
    if target.backend == "hip":
        args = tuple(False if name == "NVIDIA" else a for name, a in zip(kernel.arg_names, args, strict=True))
    return backend.compile_for(target, kernel, args)


def sources_of(calls: list[Callable[[], Any]]) -> int:
    """How many compilations the calls make."""
    return len({backend.source(*launched(call)).hash() for call in calls})


def values_that_differ() -> list[Callable[[], Any]]:
    """Calls alike in all but values: 1 and multiples of 16, which Triton would compile for, 32 bits and 64."""
    x = torch.empty(LONG)
    noises = [df.Noise(seed, first_sample=first) for seed, first in ((1, 1), (16, 0), (2**40, 2**40), (-1, 3))]
    calls = [
        lambda noise=noise: backend.affine("op", x, None, None, noise, table(x.dtype), LEVELS, (0, -1, 1, -1))
        for noise in noises
    ]
    for B, D in ((1, 4096), (16, 4096), (17, 8192), (64, 2**16)):
        given = torch.empty(B, D), df.Noise(B), LEVELS[:1].expand(B)
        calls.append(
            lambda given=given: backend.affine(
                "op", given[0], None, None, given[1], table(x.dtype), given[2], (0, -1, 1, -1)
            )
        )
    return calls


def in_other_layouts(dtype: torch.dtype) -> dict[str, Tensor]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    last = torch.channels_last
    return {
        "channels_last": empty(64, 8, 16, 16).to(memory_format=last),
        "channels_last of 15x15": empty(64, 8, 15, 15).to(memory_format=last),
        "half the channels": empty(64, 16, 8, 8).to(memory_format=last)[:, :8],
        "half of each row": empty(64, 8, 16, 32)[..., :16],
        "transposed": empty(64, 8, 16, 16).transpose(2, 3),
        "misaligned": empty(64 * 8 * 16 + 1)[1:].view(64, 8, 4, 4),
    }


def keys_of_several_codes() -> list[list[str]]:
    """Calls that share a key of the backend's compiled kernels, though what is to be compiled for them differs."""
    calls = dict(VARIANTS)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = in_other_layouts(dtype)
        dense = torch.empty(64, 8, 16, 16, dtype=dtype)
        for name in ("channels_last", "half of each row"):
            calls[f"contiguous x, y {name} {dtype}"] = lambda x=dense, y=given[name]: backend.affine(
                "op", x, y, None, NOISE, table(x.dtype), LEVELS, (0, 1, 2, -1)
            )
        for case in CASES:
            for name, x in {"": torch.empty(case.shape, dtype=dtype), **given}.items():
                calls[f"{case.name} {name} {dtype}"] = lambda case=case, x=x: case.call(x)
    codes: dict[Any, dict[str, str]] = {}
    for name, call in calls.items():
        for made, args in launches(call):
            codes.setdefault(made.key, {}).setdefault(backend.source(made.kernel, args).hash(), name)
    return [list(names.values()) for names in codes.values() if len(names) > 1]


def stack_of(call: Callable[[], Any]) -> int:
    """Bytes of stack of what a call launches, on sm_90."""
    usage = tool("cuobjdump", "-res-usage", cubin=backend.compile_for(NVIDIA["sm_90"], *launched(call)).asm["cubin"])
    return int(re.findall(r"STACK:(\d+)", usage)[0])


def tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def streaming_loop(sass: str) -> list[str]:
    """The instructions of the loop that walks a row's tiles: the first backward branch's."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", sass)]
    for at, text in lines:
        branch = re.search(r"\bBRA(?:\.\S+)? .*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            return [t for a, t in lines if int(branch[1], 16) <= a <= at]
    raise AssertionError("no loop found")


def code(case: Case, dtype: torch.dtype, target: GPUTarget) -> Code:
    cubin = compile_case(case, dtype, target).asm["cubin"]
    sass = tool("cuobjdump", "-sass", cubin=cubin)
    usage = tool("cuobjdump", "-res-usage", cubin=cubin)
    loop = streaming_loop(sass)

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, instruction)) for instruction in loop)

    loads, stores = count(r"\bLDG\S*\.128"), count(r"\bSTG\S*\.128")
    turns = max(1, (loads + stores) // (case.loads + case.stores))
    return Code(
        instructions_a_value=round(len(loop) / turns / backend._LANE[dtype], 1),
        turns=turns,
        wide_loads=loads,
        wide_stores=stores,
        moves=count(r"\b(LDS|STS|LDSM|STSM|LDL|STL|BAR)\b"),
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
    )


def amd_scratch(case: Case) -> int:
    """Bytes of stack of the kernel for gfx942; what is asked of it there is that it compiles without."""
    assembly = compile_case(case, torch.bfloat16, AMD).asm["amdgcn"]
    return int(re.findall(r"ScratchSize: (\d+)", assembly)[0])


def roundings(case: Case) -> list[str]:
    """The divisions and square roots of a case in fp32, as PTX names them."""
    ptx = compile_case(case, torch.float32, NVIDIA["sm_90"]).asm["ptx"]
    return sorted(set(re.findall(r"\b(?:div|sqrt|rcp|rsqrt)\.\S+(?=\s)", ptx)))


def main() -> None:
    if sys.argv[1:2] == ["--json"]:
        everything = sys.argv[2:] == ["--all"]
        made = [
            {
                "case": f"{case.name} {dtype} {arch}",
                "loads": case.loads,
                "stores": case.stores,
                "most": case.most * (2 if dtype == torch.float64 else 1),
                **asdict(code(case, dtype, NVIDIA[arch])),
            }
            for case, dtype, arch in (TESTED if everything else QUICK)
        ]
        on_amd, variants = (ON_AMD, VARIANTS) if everything else (QUICK_ON_AMD, QUICK_VARIANTS)
        scratch = {case.name: amd_scratch(case) for case in CASES if case.name in on_amd}
        stacks = {name: stack_of(VARIANTS[name]) for name in variants}
        print(
            json.dumps(
                {
                    "nvidia": made,
                    "gfx942": scratch,
                    "variants": stacks,
                    "keys of several codes": keys_of_several_codes(),
                    "compilations": sources_of(values_that_differ()),
                    "roundings": {c.name: roundings(c) for c in CASES if c.name in ("huber", "pseudo_huber")},
                }
            )
        )
        return
    print(f"triton {triton.__version__}")
    for arch in sys.argv[1:] or ["sm_90"]:
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16):
                c = code(case, dtype, NVIDIA[arch])
                kind = str(dtype).removeprefix("torch.")
                values = f"{c.instructions_a_value:5} instructions a value, {c.registers} registers"
                print(f"{arch:7}{case.name:24}{kind:9}{values}")


if __name__ == "__main__":
    main()
