"""Fixtures that the tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Container, Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

if os.environ.get("PYTEST_XDIST_WORKER"):
    # Two tests at a time: short parallel loops would wait for one another's threads. Read by libgomp when it loads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock

import dae_fast as df

from .flat import Flat

with suppress(ImportError):  # which is not needed on a GPU machine
    from hypothesis import HealthCheck, settings

    _ours = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
    settings.register_profile("test", max_examples=25, derandomize=True, database=None, **_ours)
    settings.register_profile("fuzz", max_examples=1000, **_ours)  # a round of `make fuzz`
    settings.load_profile("test")

gc.disable()  # until all tests are collected

BACKENDS = tuple(name for name in df.backend_names() if df.kernels.dispatch.supports(name, torch.device("cpu")))
ISAS = tuple(df.kernels.native.isas()) if "native" in BACKENDS else ()
CUDA_ON_CPU = "cuda on cpu"  # the native backend's CUDA code, compiled for the CPU
GPU_CODE = (CUDA_ON_CPU, "triton")


def module_of(backend: str) -> Flat:
    return Flat(df.kernels.dispatch.module("native" if backend == CUDA_ON_CPU else backend))


# The longest files, longest first: begun last, one would keep a worker busy while the other has nothing left.
LONG = tuple(
    f"test_{name}.py"
    for name in ("triton_code", "install", "compile", "races", "gpu_check", "benchmarks", "ptx_on_cpu", "types")
)


# Cases that are dear and show what a cheaper one beside them shows too, or nearly: `make test-long` runs them.
LONGER = pytest.mark.longer


def some_longer(cases: Iterable[Any], shown_always: Container[Any]) -> list[Any]:
    """For parametrize: all of the cases, tuples for several arguments; those that are not named only with --longer."""

    def marked(case: Any) -> Any:
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=LONGER)

    return [case if case in shown_always else marked(case) for case in cases]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--longer", action="store_true", help="run what is marked so, too")
    parser.addoption("--ptx", action="store_true", help="run the CUDA kernels' PTX where their source is compiled")
    parser.addoption("--hip", action="store_true", help="compile that source as for an AMD GPU, in wavefronts of 64")


def pytest_collection_finish() -> None:
    """Of the objects that thousands of collected tests are made of, the garbage collector need look at none again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Last what makes a capture fail: torch 2.11 does not clean up after one.
    order = {name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: (order.get(item.path.name, len(LONG)), "gpu_refusal" in item.name))
    for item in items:
        if item.get_closest_marker("longer") and not item.config.getoption("--longer"):
            item.add_marker(pytest.mark.skip(reason="dear; `make test-long` runs it"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="its tensors are on a CUDA device; `make gpu-check` runs it"))


@pytest.fixture(scope="session")
def cuda_on_cpu_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the first of the session's processes that asks. With --ptx its kernels are nvcc's PTX."""
    from . import cuda_on_cpu, ptx_on_cpu

    base = tmp_path_factory.getbasetemp()
    place = (base.parent if hasattr(request.config, "workerinput") else base) / "cuda_on_cpu"
    ptx = place / "ptx"
    with FileLock(f"{place}.lock"):
        library = place / cuda_on_cpu.LIBRARY
        if not library.exists():
            place.mkdir(exist_ok=True)
            cuda_on_cpu.build(place, cuda_on_cpu.HIP if request.config.getoption("--hip") else ())
        if request.config.getoption("--ptx"):
            library = ptx / ptx_on_cpu.LIBRARY
            if not library.exists():
                ptx_on_cpu.compile_ptx(ptx)
                ptx_on_cpu.build(ptx, ptx, place)
    return library


@pytest.fixture(params=[*BACKENDS, *[CUDA_ON_CPU] * ("native" in BACKENDS)])
def backend(request: pytest.FixtureRequest):
    """Each backend that can run here, forced."""
    if request.param == CUDA_ON_CPU:
        from . import cuda_on_cpu

        with df.use_backend("native"), cuda_on_cpu.running(request.getfixturevalue("cuda_on_cpu_library")):
            yield CUDA_ON_CPU
    else:
        with df.use_backend(request.param):
            yield request.param


@pytest.fixture
def restore_isa():
    """Leaves the instruction set as it was, and where outputs go past the caches."""
    before, share = df.kernels.native.isa(), df.kernels.native.use_cache_share(0)
    df.kernels.native.use_cache_share(share)
    yield
    df.kernels.native.use_isa(before)
    df.kernels.native.use_cache_share(share)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def not_in_torch_2_11(why: str) -> pytest.MarkDecorator:
    """For what torch.compile of that release cannot do and later ones can; eager calls are the same in both."""
    return pytest.mark.xfail(torch.__version__.startswith("2.11."), reason=f"torch 2.11: {why}", strict=True)


def _triton() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:
        return (3, 9)


TRITON_BEFORE_3_9 = _triton() < (3, 9)  # torch pins it: 2.11 has 3.6
