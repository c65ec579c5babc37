"""The Triton kernels that a GPU's first minutes need, compiled where there is no GPU: a part of `make gpu-pack`.

`python -m benchmarks.gpu_triton FOLDER` fills FOLDER with Triton's cache for sm_90: what gpu_facts measures and what
tests/test_gpu.py calls of the shared cases. Its key holds the contents of Triton, the kernel's source and types, the
options, ptxas's version and the architecture: nothing of a driver or a place. What does hold places is written when the
pack is opened (`open_cache`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPE = (40, 3, 17, 16)  # of tests/test_gpu.py
LOG2 = 24  # of gpu_facts; its larger tensors are of the same rows


def open_cache(packed: Path, place: Path) -> None:
    """The cache as Triton reads it: each group of files says where they are."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(packed, place)
    for group in place.glob("*/__grp__*"):
        here = [group.parent / name for name in json.loads(group.read_text())["child_paths"]]
        group.write_text(json.dumps({"child_paths": {path.name: str(path) for path in here if path.exists()}}))


def calls() -> Iterator[Callable[[], object]]:
    import torch

    import dae_fast as df

    from .cases import CASES, DTYPES, Case
    from .gpu_facts import operations

    def gradient(case: Case, dtype: torch.dtype) -> None:
        inputs = case.inputs(SHAPE, dtype)
        wanted = [inputs[name].requires_grad_() for name in case.grads]
        made = case.ours(inputs)
        made = made if isinstance(made, tuple) else (made,)
        torch.autograd.grad(made, wanted, [torch.ones_like(m) for m in made])

    for dtype in DTYPES[0], torch.bfloat16:
        x = torch.zeros(1 << LOG2 >> 14, 4, 64, 64, dtype=dtype)
        for _, call in operations(x, x).values():
            yield call
    noise = df.Noise(2026).fold_in(3)
    for dtype in DTYPES:
        for case in CASES:
            yield lambda case=case, dtype=dtype: case.ours(case.inputs(SHAPE, dtype))
            yield lambda case=case, dtype=dtype: gradient(case, dtype)
        for shape in ((64, 784), (16, 4, 64, 64), (7, 333)):
            x = torch.zeros(shape, dtype=dtype)
            yield lambda x=x: df.add_noise(x, noise, df.Schedule.linear(1000)[torch.arange(len(x))])
    yield lambda: noise.bits((64, 4097))


def compile_all() -> int:
    """How many kernels; each call is made on CPU tensors, and what it would launch compiled instead."""
    from triton.backends.compiler import GPUTarget

    import dae_fast as df
    from dae_fast.kernels import triton as backend
    from dae_fast.primitives import residuals

    target, compiled = GPUTarget("cuda", 90, 32), set()

    def launch(call: Any, args: tuple[Any, ...]) -> None:
        if call.key not in compiled:
            backend.compile_for(target, call.kernel, (*args, *call.fixed))
            compiled.add(call.key)

    # As on a GPU, where a gradient from upstream is not looked at by the host.
    backend._launch, backend.available, backend.supports = launch, lambda: "", lambda device: True
    residuals.is_one = lambda upstream: False
    with df.use_backend("triton"):
        for call in calls():
            call()
    return len(compiled)


def main() -> None:
    place = Path(sys.argv[1]).resolve()
    os.environ |= {"TRITON_CACHE_DIR": str(place), "TRITON_STORE_BINARY_ONLY": "1"}
    os.environ.pop("TRITON_INTERPRET", None)
    print(f"{compile_all()} kernels of Triton")
    for left in place.glob("*/*.source"):
        left.unlink()


if __name__ == "__main__":
    main()
