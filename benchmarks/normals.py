"""Normals of one thread beside other libraries': `make bench-normals`, which makes an environment with them.

65,536 of float32 at a time, in cache, into memory that is there already where the library can (`noise.normal` makes a
tensor), in turns within one process, by its CPU time. oneMKL is called in its library: its wrappers have doubles alone.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from time import process_time
from typing import Any

import torch

import dae_fast as df

from .environment import device_name
from .measure import interleave

COUNT, BUDGET_S, SAMPLE_S = 1 << 16, 20.0, 2e-3
Peer = Callable[[], object]
# Of oneMKL's vector statistics: generators by their number, methods of a Gaussian by theirs.
GENERATORS = {"Philox4x32-10": 16 << 20, "ARS5": 15 << 20}
METHODS = {"Box-Muller": 0, "ICDF": 2}


def one_thread(isa: str | None) -> None:
    """Before what reads the environment is imported; torch is already."""
    torch.set_num_threads(1)
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    if isa:
        os.environ["MKL_ENABLE_INSTRUCTIONS"] = isa.upper()
        df.kernels.native.use_isa(isa)


def dae_fast() -> dict[str, Peer]:
    out, x = torch.empty(1, COUNT), torch.zeros(1, COUNT)
    level, noise = df.Level(alpha=0.0, sigma=1.0), df.Noise(0)
    generator = torch.Generator().manual_seed(0)
    return {
        f"dae_fast, {df.kernels.native.isa()}": lambda: noise.normal((1, COUNT)),
        "dae_fast, add_noise of zeros": lambda: df.add_noise(x, noise, level, out=out),
        "torch, normal_": lambda: out.normal_(generator=generator),
    }


def onemkl() -> dict[str, Peer]:
    numpy, places = import_module("numpy"), [Path(sys.prefix, "lib"), *(Path(p).parent.parent for p in sys.path)]
    found = [library for place in places for library in sorted(place.glob("libmkl_rt.so*"))]
    if not found:
        raise ImportError("no libmkl_rt.so; pip install mkl")
    library = ctypes.CDLL(str(found[0]))
    library.MKL_Set_Threading_Layer(1)  # none
    out, peers = numpy.empty(COUNT, numpy.float32), {}
    place = numpy.ctypeslib.as_ctypes(out)  # which keeps `out`
    for generator, number in GENERATORS.items():
        stream = ctypes.c_void_p()
        if library.vslNewStream(ctypes.byref(stream), number, 1):
            raise RuntimeError(f"no stream of {generator}")
        for method, which in METHODS.items():

            def call(which: int = which, stream: ctypes.c_void_p = stream) -> None:
                status = library.vsRngGaussian(which, stream, COUNT, place, ctypes.c_float(0), ctypes.c_float(1))
                assert status == 0, status

            peers[f"oneMKL {generator} {method}"] = call
    return peers


def mkl_random() -> dict[str, Peer]:
    module: Any = import_module("mkl_random")
    state = module.MKLRandomState(1, brng="philox4x32x10")
    return {"mkl_random Philox ICDF (float64)": lambda: state.standard_normal(COUNT, method="ICDF")}


def randompack() -> dict[str, Peer]:
    numpy, module = import_module("numpy"), import_module("randompack")
    out = numpy.empty(COUNT, numpy.float32)
    generators = {name: module.Rng(engine) for name, engine in (("Philox", "philox"), ("its own", None))}
    return {f"randompack, {name}": lambda rng=rng: rng.normal(out=out) for name, rng in generators.items()}


def numpy() -> dict[str, Peer]:
    module = import_module("numpy")
    out = module.empty(COUNT, module.float32)
    bits = {"PCG64": module.random.PCG64(0), "Philox": module.random.Philox(0)}
    generators = {name: module.random.Generator(of) for name, of in bits.items()}
    return {
        f"numpy, {name}": lambda rng=rng: rng.standard_normal(dtype=module.float32, out=out)
        for name, rng in generators.items()
    }


def jax() -> dict[str, Peer]:
    module = import_module("jax")
    key = module.random.key(0)
    draw = module.jit(lambda key: module.random.normal(key, (COUNT,)))
    return {"jax, threefry": lambda: draw(key).block_until_ready()}


def onemkl_code() -> str:
    """The library of vector statistics that oneMKL chose for this processor."""
    maps = Path("/proc/self/maps").read_text()
    return ", ".join(sorted(set(re.findall(r"libmkl_vml_\w+", maps)))) or "not loaded"


def measured(peers: dict[str, Peer], budget_s: float) -> dict[str, Any]:
    """One after another, round after round, of process CPU time."""

    def clock(peer: Peer, calls: int) -> float:
        began = process_time()
        for _ in range(calls):
            peer()
        return process_time() - began

    return interleave(peers, budget_s=budget_s, sample_s=SAMPLE_S, clock=clock)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.normals", description=__doc__)
    parser.add_argument("--isa", choices=("avx2", "avx512"), help="of dae_fast and of oneMKL; each one's own choice")
    parser.add_argument("--seconds", type=float, default=BUDGET_S)
    given = parser.parse_args(arguments)
    one_thread(given.isa)
    peers: dict[str, Peer] = {}
    for library in (dae_fast, onemkl, mkl_random, randompack, numpy, jax):
        try:
            peers |= library()
        except (ImportError, OSError, RuntimeError) as error:
            print(f"not measured: {library.__name__}: {type(error).__name__}: {error}")
    timings = measured(peers, given.seconds)
    load = os.getloadavg()[0]
    print(f"{device_name()}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, load {load:.1f}; oneMKL: {onemkl_code()}")
    print("G normals/s of one thread's CPU time: median (quartiles)")
    for name, timing in sorted(timings.items(), key=lambda item: item[1].median):
        slow, median, fast = (COUNT / s / 1e9 for s in reversed(timing.quartiles))
        print(f"{name:34} {median:6.3f} ({slow:.3f} to {fast:.3f})")


if __name__ == "__main__":
    main()
