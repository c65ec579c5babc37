"""The pytest-benchmark form: `pytest benchmarks/ --case add_noise --benchmark-autosave`, a table for each setting.

Here peers run one after the other; `python -m dae_fast bench` interleaves them and is what the README quotes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from .gate import Gate
from .peers import Setting
from .suite import least_bytes, peer


@lru_cache(maxsize=1)  # the peers of a setting come one after the other
def gate(setting: Setting) -> Gate:
    return Gate(setting)


def test_op(benchmark: Any, setting: Setting, name: str) -> None:
    benchmark.group = str(setting)
    benchmark.name = name  # what the table shows; --benchmark-compare goes by the test's full name
    with torch.set_grad_enabled(bool(setting.leaves)):
        call = peer(setting, name)
        benchmark.extra_info["least_bytes"] = least_bytes(setting, gate(setting).check(name, call))
        benchmark(_finished(call) if setting.device.type == "cuda" else call)


def _finished(call: Callable[[], object]) -> Callable[[], None]:
    """The clock of pytest-benchmark does not wait for a GPU."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run
