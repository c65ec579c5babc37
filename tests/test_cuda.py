"""The CUDA library without a GPU: it loads, it says so, and its machine code is what was meant.

What its kernels compute is tested by the shared tests, compiled for the CPU ("cuda on cpu" in conftest.py), and on
a GPU by test_gpu.py; that it is the CPU's to the bit, here.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dae_fast as df
from benchmarks.cases import DTYPES
from dae_fast.info import build_error
from dae_fast.kernels import native, scratch

from . import cuda_on_cpu, host_time
from .cuda_sass import ARCHITECTURES, GROUP, LIBRARY, STREAMS, functions, instructions_a_value, kernels
from .flat import Flat
from .test_gpu import noise_at
from .test_primitives import AFFINE, BLENDED, KINDS, NOISE, masks, randn, streams, table_of

needs_library = pytest.mark.skipif(build_error("cuda") is not None, reason=f"no CUDA library: {build_error('cuda')}")

# Instructions a value in the loop of one long row, on sm_90: a little above what was counted.
MOST = {
    "affine_kernel<fresh, 0>": 38,
    "affine_kernel<fresh, 1>": 40,
    "affine_kernel<fresh, 2>": 42.5,
    "affine_kernel<fresh, 3>": 47,
    "affine_kernel<read, 1>": 5,
    "affine_kernel<read, 2>": 7.5,
    "affine_kernel<read, 2, clamped>": 38,
    "affine_kernel<read, 3>": 10,
    "affine_kernel<read, 4>": 13,
    "affine_kernel<fresh, blended>": 52,
    "affine_kernel<read, blended>": 17.5,
    "residual_kernel<fresh, 1>": 42.5,
    "residual_kernel<fresh, 2>": 46,  # of 64 registers, which were faster on an H200 than 80
    "residual_kernel<read, 2>": 9,
    "residual_kernel<read, 3>": 11.5,
    "residual_kernel<fresh, 1, masked>": 46.5,
    "residual_kernel<fresh, 2, masked>": 48.5,
    "residual_kernel<read, 2, masked>": 12.5,
    "residual_kernel<read, 3, masked>": 15,
    "row_dots_kernel<fresh>": 46,
    "row_dots_kernel<read>": 12,
    "corrupt_kernel": 24.5,
    "gaussian_kernel": 83.5,
    "gaussian_grad_kernel": 97,
}


@needs_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_library_loads_and_says_so() -> None:
    code = f"from dae_fast import _core; _core.load_cuda({str(LIBRARY)!r}); _core.cuda_devices()"
    done = subprocess.run([sys.executable, "-c", f"import torch; {code}"], capture_output=True, text=True)
    assert "RuntimeError: " in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "driver" in last or "device" in last, last


@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA")
def test_a_torch_without_cuda_has_no_use_for_it() -> None:
    assert df.info()["cuda"] == f"missing: torch {torch.__version__} is not built for CUDA"
    assert not df.kernels.dispatch.supports("native", torch.device("cuda"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def code(request: pytest.FixtureRequest):
    if build_error("cuda"):
        pytest.skip(f"no CUDA library: {build_error('cuda')}")
    pytest.importorskip("triton", reason="its disassembler is used")
    return request.param, kernels(request.param)


def test_no_kernel_uses_local_memory(code) -> None:
    architecture, found = code
    assert {(k.name, k.element) for k in found if k.access == "Whole"} == {(n, e) for n in STREAMS for e in GROUP}
    assert [f.mangled for f in functions(architecture) if f.stack or f.through_local_memory] == []


def test_streams_are_16_bytes_a_thread(code) -> None:
    """Every operand, in every loop that streams; what else is loaded there is a mask's bytes or a number of the row."""
    _, found = code
    for kernel in found:
        if kernel.access != "Whole":
            continue
        loads, stores = STREAMS[kernel.name]
        doubled = 2 if kernel.element == "f64" else 1  # four doubles are two accesses
        assert kernel.loops, kernel
        for loop in kernel.loops:
            turns = max(loop.wide_loads // max(loads * doubled, 1), loop.wide_stores // max(stores * doubled, 1))
            assert turns and loop.wide_loads == loads * doubled * turns, kernel
            assert loop.wide_stores == stores * doubled * turns, kernel
            narrow = 4 if kernel.name == "residual_kernel<any>" else int("masked" in kernel.name)
            narrow += kernel.name == "gaussian_grad_kernel"
            assert loop.narrow_loads <= narrow * turns, kernel


def test_one_thread_fences(code) -> None:
    """Barrier, fence, ticket, fence, barrier, and a branch past it all for every thread but one; the counter, which is
    stored last, behind the second fence."""
    architecture, _ = code
    tickets = 0
    for function in functions(architecture):
        kinds = ("BAR.SYNC", "MEMBAR", "ATOMG", "STG")
        at = {kind: [a for a, text in function.lines if kind in text] for kind in kinds}
        for ticket in at["ATOMG"]:
            before, after = max(a for a in at["BAR.SYNC"] if a < ticket), min(a for a in at["BAR.SYNC"] if a > ticket)
            first, second = (a for a in at["MEMBAR"] if before < a < after)
            assert first < ticket < second, function.mangled
            assert [second < a for a in at["STG"] if ticket < a < after] == [True], function.mangled
            branches = [(a, re.search(r"@\S+ BRA 0x([0-9a-f]+)", text)) for a, text in function.lines]
            past = [int(b[1], 16) for a, b in branches if b and before < a < first]
            assert any(second < target <= after for target in past), function.mangled
        assert len(at["MEMBAR"]) == 2 * len(at["ATOMG"]), function.mangled
        tickets += len(at["ATOMG"])
    assert tickets


def test_instructions_a_value(code) -> None:
    architecture, found = code
    if architecture != "sm_90":
        pytest.skip("counted on sm_90")
    for kernel in found:
        if kernel.access == "Whole" and kernel.name in MOST and kernel.element != "f64":
            assert instructions_a_value(kernel) <= MOST[kernel.name], kernel


SHAPES = ((5, 2, 3, 8), (2, 2053), (3, 1304), (9, 5), (2, 3, 7, 5))  # whole groups and ragged, long rows and short
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
Outputs = tuple[Tensor, ...]


@pytest.fixture
def same_bits(request: pytest.FixtureRequest) -> Callable[[Callable[[], Outputs]], None]:
    """Whether a call of the native backend gives the same bits from the CPU's code and from CUDA's, on the CPU."""
    pytest.importorskip("dae_fast.kernels.native")
    library = request.getfixturevalue("cuda_on_cpu_library")

    def compare(call: Callable[[], Outputs]) -> None:
        wanted = call()
        with cuda_on_cpu.running(library):
            got = call()
        assert got is not wanted and len(got) == len(wanted)
        for g, w in zip(got, wanted, strict=True):
            assert torch.equal(g.contiguous().view(torch.uint8), w.contiguous().view(torch.uint8))

    return compare


def strided(t: Tensor) -> Tensor:
    """The same values, the last dimension not the innermost."""
    return t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else torch.stack((t, t), -1)[..., 0]


layouts = pytest.mark.parametrize("layout", [torch.Tensor.contiguous, strided], ids=["contiguous", "strided"])


@layouts
@dtypes
@shapes
@pytest.mark.parametrize("pattern", [*AFFINE, *BLENDED])
def test_affine_has_the_cpus_bits(same_bits, pattern: str, shape: tuple[int, ...], dtype: torch.dtype, layout) -> None:
    columns, clamp, fresh = {**AFFINE, **BLENDED}[pattern]
    x, y, z, w, v = (layout(randn(shape, dtype, seed)) for seed in range(5))
    table, (third, noise) = table_of(dtype, shape[0]), streams(columns, fresh, z, v)
    affine = Flat(df.kernels.native).affine
    same_bits(lambda: affine("op", x, y, third, noise, table, None, columns, clamp, w=w))


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, 16), (torch.float16, 13)], ids=["bfloat16", "float16"])
def test_ties_have_the_cpus_bits(same_bits, dtype: torch.dtype, lost: int) -> None:
    """Sums that lie half way between two numbers of the type, of which there are many."""
    x, y = randn((4, 4096), dtype, 0), (randn((4, 4096), torch.float32, 1) / 64).to(dtype)
    exact = (x.float() + y.float()).view(torch.int32)
    assert ((exact & (1 << lost) - 1) == 1 << lost - 1).sum() > 100
    affine, ones = Flat(df.kernels.native).affine, torch.ones(1, 1)
    same_bits(lambda: affine("op", x, y, None, None, ones, None, (0, 0, -1, -1)))


@layouts
@dtypes
def test_rows_of_many_turns(same_bits, dtype: torch.dtype, layout) -> None:
    """A thread goes from group to group of one row by pointers and counters, to a ragged end; sums of all of it."""
    x = layout(randn((2, 3, 20, 700), dtype, 0))
    table = table_of(dtype, 2)

    def call() -> Outputs:
        native = Flat(df.kernels.native)
        _, _, grad = native.residual("op", x, None, None, NOISE, table, None, (-1, 0, -1), None, None, 1, True, True)
        dots = native.row_dots(x.double(), x.double(), None, None, NOISE)  # added in another order
        return *native.affine("op", x, None, None, NOISE, table, None, (0, -1, 1, -1)), grad, dots.round(decimals=6)

    same_bits(call)


@layouts
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask_name", ["all", "tensor", "masked, each sample at its own rate"])
def test_residual_gradients_have_the_cpus_bits(
    same_bits, mask_name: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...], layout
) -> None:
    """Not the losses: what they add is the same, in another order."""
    B, number = shape[0], KINDS.index(kind)
    pred, y = (layout(randn(shape, dtype, seed)) for seed in range(2))
    table = torch.cat((table_of(dtype, B, 3), table_of(dtype, B, 1).abs() + 0.3), 1)
    columns, weight = (1, 2, 3 if number > 1 else -1), torch.linspace(0.5, 2, B)
    mask, residual = masks(shape)[mask_name], Flat(df.kernels.native).residual

    def gradient() -> Outputs:
        call = "op", pred, y, None, NOISE, table, None, columns, mask, weight, 1, True, True
        return (residual(*call, kind=number)[2],)

    same_bits(gradient)


@layouts
@dtypes
@shapes
def test_corruption_has_the_cpus_bits(same_bits, shape: tuple[int, ...], dtype: torch.dtype, layout) -> None:
    x = randn(shape, dtype, 0)
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    thresholds = torch.tensor([[2**30, 2**31]])
    same_bits(lambda: (Flat(df.kernels.native).corrupt(layout(x), NOISE, thresholds, -2.0, 0.3),))


@layouts
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fresh", [False, True], ids=["read", "fresh"])
def test_gaussians_have_the_cpus_bits(same_bits, fresh: bool, dtype, shape: tuple[int, ...], layout) -> None:
    mu, log_var, eps, z_grad = (layout(randn(shape, dtype, seed)) for seed in range(4))
    kl_grad, noise = randn(shape[:1], torch.float32, 4), NOISE if fresh else None
    native, read = Flat(df.kernels.native), None if fresh else eps
    same_bits(
        lambda: (
            native.gaussian(mu, log_var, read, noise)[0],
            *native.gaussian_grad(mu, log_var, read, noise, z_grad, kl_grad),
        )
    )


# Around the rows of a warp, a unit and a launch, of less than a group to several; then rows that a block adds up, a
# thread adds up from units, a warp, and again a block.
SUMMED = [(B, D) for B in (1, 2, 32, 33, 256, 257) for D in (1, 4, 7, 64)]
SUMMED += [(1, 784), (33, 784), (4097, 1), (4097, 7), (0, 5), (5, 2048), (3, 70_001), (2, 600_000), (1, 4_300_000)]


@pytest.mark.parametrize("shape", SUMMED, ids=str)
def test_sums_of_rows(cuda_on_cpu_library: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    """Each row's and the batch's, as the CPU's code has them; the same bits twice, no more scratch than was asked."""
    native, B = Flat(df.kernels.native), shape[0]
    rooms = []

    def workspace(device: torch.device, doubles: int) -> tuple[Tensor, Tensor]:
        rooms.append((torch.full((doubles + 8,), torch.nan, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)))
        return rooms[-1][0][:doubles], rooms[-1][1]

    monkeypatch.setattr(native._module, "workspace", workspace)
    pred, y = (randn(shape, torch.float32, seed) for seed in range(2))
    table, weight = table_of(torch.float32, B, 4).abs(), torch.linspace(0.5, 2, B)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5

    def sums() -> Outputs:
        dots = native.row_dots(pred, pred, 2 * pred, 3 * pred, None)
        if pred.numel() > 2_000_000:  # all other sums are added by the same code
            return (dots,)
        also = torch.empty(2)
        call = "op", pred, y, None, None, table, None, (0, -1, -1, 1, 2, 3)
        means, loss, _ = native.residual(*call, mask, weight, 1, True, False, also=also)
        alone = native.residual(*call[:-1], (0, -1, -1), None, None, 2, True, False)
        _, kl = native.gaussian(pred, y, pred, None)
        return means, loss, also, *alone[:2], kl, dots

    wanted = sums()
    with cuda_on_cpu.running(cuda_on_cpu_library):
        got, again = sums(), sums()
    for g, a, w in zip(got, again, wanted, strict=True):
        assert torch.equal(g, a) or not B
        torch.testing.assert_close(g, w, rtol=2e-6, atol=1e-7, equal_nan=not B)
    assert rooms and all(room[-8:].isnan().all() and counter == 0 for room, counter in rooms)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "8 bytes off"])
@pytest.mark.parametrize("fold", [True, False], ids=["rows", "raw"])
@pytest.mark.parametrize("shape", [(300, 6), (257, 1), (5, 8), (3, 1027), (2, 20_002)], ids=str)
def test_words_have_the_cpus_bits(same_bits, shape: tuple[int, int], fold: bool, aligned: bool) -> None:
    """In the pieces that the alignment allows, and nothing beside them."""
    first = 2 if aligned else 1

    def call() -> Outputs:
        room = torch.full((first + shape[0] * shape[1] + 1,), -1)
        df.kernels.native._core.bits(NOISE, not fold, 10**9, room[first:-1].view(shape))
        return (room,)

    same_bits(call)


def test_a_failed_query_is_made_again(cuda_on_cpu_library: Path) -> None:
    """By how many thread blocks a launch has. In a process of its own, which has asked nothing before."""
    code = f"""
import ctypes, torch
from dae_fast.kernels import native
from tests import cuda_on_cpu

library, x, blocks = {str(cuda_on_cpu_library)!r}, torch.ones(2, 1024), []
failing, launched = (ctypes.c_int.in_dll(ctypes.CDLL(library), name) for name in ("failing_queries", "blocks_launched"))
with cuda_on_cpu.running(library):
    for fails in (1, 0, 1):
        failing.value = fails
        native.row_dots(x, (x, None, None, None), None)
        blocks.append((launched.value, failing.value))
assert blocks == [(1, 0), (2, 0), (2, 1)], blocks  # the last call did not ask
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_an_import_leaves_the_driver_alone() -> None:
    """A process that has asked it cannot fork; a CPU's ops do not ask either."""
    code = (
        "import torch, dae_fast as df; df.add_noise(torch.ones(2, 3), df.Noise(0), df.Level(1.0, 1.0)); "
        "df.noise_mse(torch.ones(2, 3), df.Noise(0)); assert not df.kernels.native.library_missing.cache_info().misses"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_changes_the_device_for_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a library whose functions do nothing: its current device is another than the tensors'."""
    host_time.load_nothing(current_device=1)
    entered: list[Any] = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *_: object) -> None:
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Device)
    x = torch.ones(2, 3)
    try:
        df.add_noise(x, df.Noise(0), df.Level(1.0, 1.0))
        assert entered == [0, "left"]
        df.add_noise(x.t(), df.Noise(0), df.Level(1.0, 1.0))  # no plain call
        assert entered == [0, "left"] * 2
    finally:
        native._core.load_cuda(None)


def test_a_launch_that_fails_elsewhere_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has to go back to another device, with its error still to be raised."""
    host_time.load_nothing(current_device=1, error='"no kernel image"')
    left: list[int] = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            left.append(self.index)

    monkeypatch.setattr(torch.cuda, "device", Device)
    x = torch.ones(2, 3)
    try:
        for tensor in (x, x.t()):  # a plain call, and one that is none
            with pytest.raises(RuntimeError, match="CUDA error: no kernel image"):
                df.add_noise(tensor, df.Noise(0), df.Level(1.0, 1.0))
        assert left == [0, 0]
    finally:
        native._core.load_cuda(None)


def test_a_torch_that_cannot_be_read() -> None:
    """It lacks the table of C functions: the backend is missing, with the reason, and the reference runs."""
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import dae_fast as df
assert df.backend_names() == ("reference",), df.backend_names()
assert df.info()["native"] == "missing: torch must have DLPack's table of C functions, version 1, as torch 2.11 has"
df.noise_mse(df.add_noise(torch.ones(2, 3), df.Noise(0), df.Level(1.0, 1.0)), df.Noise(0))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("D", "first"), [(2**31 + 1, 0), (2**31, 1), (2**32 + 6, 2)], ids=["ragged", "off", "beyond"])
def test_rows_of_2_to_the_31_elements(
    cuda_on_cpu_library: Path, monkeypatch: pytest.MonkeyPatch, D: int, first: int
) -> None:
    """Contiguous, not in whole groups. Only the last thread blocks run: of the rest no memory is touched."""
    flat = Flat(native)
    room = torch.empty(2**24, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)  # no ticket comes back to 0
    monkeypatch.setattr(native, "workspace", lambda device, doubles: room)
    last = ctypes.c_uint.in_dll(ctypes.CDLL(str(cuda_on_cpu_library)), "last_blocks_only")
    tail = slice((D - 1000) // 4 * 4, None)
    pred = torch.empty(first + D, dtype=torch.bfloat16)[first:].view(1, D)
    pred[:, -8192:] = randn((1, 8192), torch.bfloat16, 0)
    table = torch.tensor([[0.7, -1.3, 1.0]])
    last.value = 4
    try:
        with cuda_on_cpu.running(cuda_on_cpu_library):
            (mapped,) = flat.affine("op", pred, None, None, NOISE, table, None, (0, -1, 1, -1))
            call = "op", pred, None, None, NOISE, table, None, (-1, 1, -1), None, None, 2, False, True
            _, _, grad = flat.residual(*call)
    finally:
        last.value = 0
    x, z = pred[:, tail].float(), noise_at(NOISE, 0, tail.start)[None, : D - tail.start]
    (wanted,) = flat.affine("op", x, None, z, None, table, None, (0, -1, 1, -1))
    assert torch.equal(mapped[:, tail], wanted.bfloat16())
    (residual,) = flat.affine("op", x, None, z, None, table, None, (2, -1, 1, -1))
    assert torch.equal(grad[:, tail], (2 * residual).bfloat16())


class TestScratch:
    """Of a reduction, on a machine that passes for one with a GPU."""

    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What asks for memory: the stream that is current there, the thread, and how much."""
        asked: list[Any] = []
        current: list[object] = [None]

        @contextmanager
        def stream(entered: object) -> Iterator[None]:
            current[0] = entered
            yield
            current[0] = None

        def make(device: torch.device, doubles: int) -> tuple[Tensor, Tensor]:
            if doubles > 2**20:
                raise torch.OutOfMemoryError("no room")
            asked.append((current[0], threading.current_thread() is threading.main_thread(), doubles))
            return torch.empty(doubles, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)

        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
        monkeypatch.setattr(scratch, "_kept", {})
        monkeypatch.setattr(scratch, "_made", make)
        return asked

    def test_is_made_on_the_stream_that_is_current(self, made: list[Any]) -> None:
        """The default one too, whose handle is 0."""
        device = torch.device("cuda", 0)
        first = scratch.workspace(device, 10)
        assert scratch.workspace(device, 4096) is first
        assert made == [("stream of cuda:0", False, 4096)]
        assert scratch.workspace(device, 5000)[0].numel() == 5000
        assert made[1:] == [("stream of cuda:0", False, 5000)]

    def test_where_there_is_no_room_it_says_so(self, made: list[Any]) -> None:
        """And nothing smaller is handed out."""
        device = torch.device("cuda", 0)
        scratch.workspace(device, 10)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="no room"):
                scratch.workspace(device, 2**21)
