"""`python -m benchmarks.gpu_facts`: what a card is to show first, the most valuable first.

That noise, maps and gradients have the CPU's bits; then each op beside the bandwidth of a copy, every backend and
every build of the CUDA library in turns; clocks under load. `--host` shows what a call costs the host, and a captured
sampler. A fact is a line, flushed to a file as it comes: what is known stays known, however this ends.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import dae_fast as df

CUDA_LIBRARY = Path(df.__file__).with_name("_cuda.so")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((64, 784), (16, 4, 64, 64), (7, 333))  # whole groups, short and long; ragged rows
NORMALS = (16, 1 << 20)
QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
LOAD_S = 1.0

Call = Callable[[], object]


@dataclass(frozen=True)
class Candidate:
    """A backend, and for the native one the build of the CUDA library that it uses."""

    name: str
    backend: str
    library: Path | None = None

    @contextmanager
    def used(self) -> Iterator[None]:
        if self.library is not None:
            df.kernels.native._core.load_cuda(str(self.library))
        with df.use_backend(self.backend):
            yield


class Facts:
    """Lines, each flushed; and how many of them are failures."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.file = None if path is None else path.open("a")
        self.device = device
        self.failures = 0
        self.began = time.perf_counter()

    def say(self, *words: object) -> None:
        line = f"[{time.perf_counter() - self.began:5.1f} s] {' '.join(map(str, words))}"
        print(line, flush=True)
        if self.file is not None:
            print(line, file=self.file, flush=True)

    def fail(self, *words: object) -> None:
        self.failures += 1
        self.say(*words)

    @contextmanager
    def tried(self, what: str) -> Iterator[None]:
        """An error in one fact must not cost the others; it is counted."""
        try:
            yield
        except Exception as error:
            self.fail("ERROR in", what, type(error).__name__, str(error)[:300])

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def describe(facts: Facts) -> None:
    facts.say("torch", torch.__version__, "CUDA", torch.version.cuda)
    if facts.device.type == "cuda":
        properties = torch.cuda.get_device_properties(facts.device)
        facts.say(properties.name, f"{properties.multi_processor_count} multiprocessors")
    for name, what in df.info().items():
        facts.say(f"{name}: {what}")


def same_bits(facts: Facts, what: str, got: Tensor, wanted: Tensor) -> None:
    got, wanted = got.detach().cpu().contiguous(), wanted.detach().contiguous()
    if torch.equal(got.view(torch.uint8), wanted.view(torch.uint8)):
        facts.say("the CPU's bits:", what)
        return
    off = (got.double() - wanted.double()).abs()
    facts.fail("OTHER BITS than the CPU's:", what, f"{int((off != 0).sum())} of {off.numel()}, by {off.max():.3g}")


def compare(facts: Facts, candidate: Candidate) -> None:
    """Words, normals, a map with fresh noise, a clamp, and a loss's gradient, with what the CPU's code gives."""
    noise, schedule, device = df.Noise(2026).fold_in(3), df.Schedule.linear(1000), facts.device

    def case(what: str, call: Callable[[torch.device], Tensor]) -> None:
        with facts.tried(f"{candidate.name}: {what}"):
            with df.use_backend("native"):
                wanted = call(torch.device("cpu"))
            with candidate.used():
                same_bits(facts, f"{candidate.name}: {what}", call(device), wanted)

    def noised(x: Tensor, t: Tensor) -> Callable[[torch.device], Tensor]:
        return lambda device: df.add_noise(x.to(device), noise, schedule[t.to(device)])

    def gradient(x: Tensor, mask: Tensor | None) -> Callable[[torch.device], Tensor]:
        def call(device: torch.device) -> Tensor:
            pred = x.to(device).requires_grad_()
            loss = df.noise_mse(pred, noise, mask=None if mask is None else mask.to(device))
            return torch.autograd.grad(loss, pred)[0]

        return call

    case("words", lambda device: noise.bits((64, 4097), device=device))
    case("normals", lambda device: noise.normal(NORMALS, device=device))
    for dtype in DTYPES:
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(shape, generator=generator).to(dtype)
            t = torch.randint(1000, shape[:1], generator=generator)
            case(f"add_noise {dtype} {shape}", noised(x, t))
    x = torch.randn(16, 4, 64, 64, generator=torch.Generator().manual_seed(2))
    case("add_noise channels_last", noised(x.to(memory_format=torch.channels_last), torch.arange(16)))
    case("to_x0 with a clamp", lambda d: df.to_x0(x.to(d), x.to(d), schedule[torch.arange(16, device=d)], clamp=1.0))
    case("gradient of noise_mse", gradient(x, None))
    case("gradient of noise_mse with a mask", gradient(x, x > 0))


def timed(facts: Facts, call: Call, calls: int) -> float:
    """Seconds of one call; on a GPU by its own clock."""
    if facts.device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def copy_rate(facts: Facts, x: Tensor, calls: int) -> float:
    """Bytes a second, of the faster of the two ways to copy."""
    into = torch.empty_like(x)
    ways: tuple[Call, ...] = (lambda: into.copy_(x), x.clone)
    return 2 * x.nbytes / min(statistics.median(timed(facts, way, calls) for _ in range(9)) for way in ways)


def operations(x: Tensor, y: Tensor) -> dict[str, tuple[int, Call]]:
    """The tensors that an op reads and writes at the least, and the op."""
    noise, schedule, device = df.Noise(5), df.Schedule.linear(1000), x.device
    pred = x.clone().requires_grad_()
    last = x.to(memory_format=torch.channels_last)
    mask = x > 0
    long, short = x.view(max(x.numel() >> 18, 1), -1), x.view(-1, 256)

    def levels(tensor: Tensor) -> df.Level:
        return schedule[torch.randint(1000, tensor.shape[:1], device=device)]

    level, of_long, of_short = map(levels, (x, long, short))
    return {
        "add_noise, fresh": (2, lambda: df.add_noise(x, noise, level)),
        "noise_mse, fresh, with gradient": (2, lambda: torch.autograd.grad(df.noise_mse(pred, noise), pred)),
        "to_x0": (3, lambda: df.to_x0(x, y, level)),
        "langevin_step, fresh": (3, lambda: df.langevin_step(x, y, 0.1, noise)),
        "add_noise, tensor": (3, lambda: df.add_noise(x, y, level)),
        "noise_mse, tensor, with gradient": (3, lambda: torch.autograd.grad(df.noise_mse(pred, y), pred)),
        "noise_mse, fresh": (1, lambda: df.noise_mse(x, noise)),
        "noise_mse, tensor": (2, lambda: df.noise_mse(x, y)),
        "noise_mse, masked, with gradient": (
            2,
            lambda: torch.autograd.grad(df.noise_mse(pred, noise, mask=mask), pred),
        ),
        "normal": (1, lambda: noise.normal(x.shape, dtype=x.dtype, device=device)),
        "add_noise, fresh, long rows": (2, lambda: df.add_noise(long, noise, of_long)),
        "add_noise, fresh, rows of 256": (2, lambda: df.add_noise(short, noise, of_short)),
        "add_noise, fresh, channels_last": (2, lambda: df.add_noise(last, noise, level)),
        "to_x0 with a clamp": (3, lambda: df.to_x0(x, y, level, clamp=1.0)),
    }


def measure(facts: Facts, candidates: Sequence[Candidate], log2: int, dtype: torch.dtype) -> None:
    shape = max(1 << log2 >> 14, 1), 4, 64, 64
    x, y = (torch.randn(shape, device=facts.device, dtype=dtype) for _ in range(2))
    calls = 5 if log2 > 25 else 40
    copy = copy_rate(facts, x, calls)
    facts.say(f"copy, 2^{log2} {dtype}: {copy / 1e12:.3f} TB/s")
    for name, (streams, call) in operations(x, y).items():
        seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
        for round_ in range(9):  # in turns, so that a clock that falls is fair to all; the first is a warm-up
            for candidate in candidates:
                if candidate.name not in seconds:
                    continue
                with facts.tried(f"{name}, {candidate.name}"), candidate.used():
                    taken = timed(facts, call, calls)
                    if round_:
                        seconds[candidate.name].append(taken)
                    continue
                del seconds[candidate.name]
        facts.say(f"2^{log2} {dtype} {name}:", "; ".join(cells(seconds, streams * x.nbytes, copy)))


def cells(seconds: dict[str, list[float]], least_bytes: int, copy: float) -> Iterator[str]:
    for name, taken in seconds.items():
        median = statistics.median(taken)
        spread = (max(taken) - min(taken)) / median
        yield f"{name} {median * 1e3:.4f} ms ({least_bytes / median / copy:.0%} of copy, spread {spread:.0%})"


def clocks(facts: Facts, candidate: Candidate) -> None:
    """While add_noise runs: a share of the copy bandwidth is one at some clock."""
    x = torch.randn(1 << 12, 4, 64, 64, device=facts.device)
    level, noise = df.Level(1.0, 0.5), df.Noise(5)
    with candidate.used():
        end = time.perf_counter() + LOAD_S
        while time.perf_counter() < end:
            for _ in range(20):
                df.add_noise(x, noise, level)
            facts.synchronize()
        for _ in range(2000):
            df.add_noise(x, noise, level)
        query = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    facts.say(f"under add_noise, {candidate.name}: {QUERY}: {done.stdout.strip()}")
    facts.synchronize()


def host(facts: Facts, candidate: Candidate, calls: int = 500) -> None:
    """Microseconds of Python to a call whose kernel has next to nothing to do, and until all is done."""
    x, y = (torch.randn(64, 784, device=facts.device) for _ in range(2))
    noise, level = df.Noise(5), df.Schedule.linear(1000)[torch.zeros(64, dtype=torch.int64, device=facts.device)]
    pred = x.clone().requires_grad_()
    mse = torch.nn.functional.mse_loss
    ops: dict[str, Call] = {
        "empty_like": lambda: torch.empty_like(x),
        "x * 2": lambda: x * 2,
        "add_noise, fresh": lambda: df.add_noise(x, noise, level),
        "add_noise, tensor": lambda: df.add_noise(x, y, level),
        "noise_mse": lambda: df.noise_mse(x, noise),
        "noise_mse, with gradient": lambda: torch.autograd.grad(df.noise_mse(pred, noise), pred),
        "torch's mse_loss, with gradient": lambda: torch.autograd.grad(mse(pred, y), pred),
    }
    for name, call in ops.items():
        with facts.tried(f"host time of {name}, {candidate.name}"), candidate.used():
            call()
            facts.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            taken = time.perf_counter() - began
            facts.synchronize()
            done = time.perf_counter() - began
            facts.say(f"host, {candidate.name}, {name}: {taken / calls * 1e6:.1f} us, {done / calls * 1e6:.1f} done")


def sampler(facts: Facts, candidate: Candidate) -> None:
    """Fifty steps of DDIM with next to no network, launched one by one and as a captured graph."""
    schedule, noise = df.Schedule.linear(1000), df.Noise(7)
    start = noise.normal((64, 784), device=facts.device)

    def network(x: Tensor, t: Tensor) -> Tensor:  # one and the same: its graph is kept
        return x

    for graph in (False, *[True] * (facts.device.type == "cuda")):
        with facts.tried(f"ddim, graph={graph}"), candidate.used():

            def call(graph: bool = graph) -> Tensor:
                return df.samplers.ddim(network, start, schedule, noise, steps=50, graph=graph)

            call()
            facts.synchronize()
            began = time.perf_counter()
            for _ in range(5):
                call()
            facts.synchronize()
            facts.say(f"ddim, 50 steps, graph={graph}: {(time.perf_counter() - began) / 5 * 1e3:.3f} ms")


def found(facts: Facts, backends: Sequence[str], libraries: Sequence[Path]) -> list[Candidate]:
    """Those that run here; one that was asked for and does not is a failure."""
    candidates = []
    for backend in backends:
        why = df.kernels.dispatch.missing(backend)
        if not why and not df.kernels.dispatch.supports(backend, facts.device):
            why = df.info()["cuda"]
        if why:
            facts.fail(f"{backend} is missing: {why}")
        elif backend == "native" and facts.device.type == "cuda":
            builds = {"native": CUDA_LIBRARY, **{path.stem.removeprefix("_cuda-"): path for path in libraries}}
            candidates += [Candidate(name, backend, path) for name, path in builds.items()]
        else:
            candidates.append(Candidate(backend, backend))
    return candidates


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_facts", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--log2", nargs="*", type=int, default=[28, 24], help="sizes, in values")
    parser.add_argument("--backends", nargs="*", default=["native", "triton"])
    parser.add_argument("--libraries", nargs="*", type=Path, default=[], help="other builds of the CUDA library")
    parser.add_argument("--host", action="store_true", help="host time and a captured sampler, nothing else")
    parser.add_argument("--out", type=Path, help="a file that the facts are appended to")
    options = parser.parse_args(arguments)
    facts = Facts(options.out, torch.device(options.device))
    describe(facts)
    candidates = found(facts, options.backends, options.libraries)
    ours = [candidate for candidate in candidates if candidate.name in options.backends]
    if options.host:
        for candidate in ours:
            host(facts, candidate)
            sampler(facts, candidate)
    else:
        for candidate in candidates:
            compare(facts, candidate)
        for log2 in options.log2:
            for dtype in DTYPES[:2]:
                with facts.tried(f"2^{log2} {dtype}"):
                    measure(facts, candidates, log2, dtype)
        for candidate in ours if facts.device.type == "cuda" else []:
            with facts.tried("clocks"):
                clocks(facts, candidate)
    facts.say(f"{facts.failures} failures")
    return int(facts.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
