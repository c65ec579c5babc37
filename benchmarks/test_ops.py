"""The pytest-benchmark form: `pytest benchmarks/ -k "add_noise and float32"`, one table for each setting.

Here peers run one after the other; `python -m benchmarks` interleaves them and is what the README quotes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from .gate import Gate
from .peers import PEERS, Setting, peer
from .suite import settings


@lru_cache(maxsize=1)  # the peers of a setting come one after the other
def gate(setting: Setting) -> Gate:
    return Gate(setting)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("setting", settings(), ids=str)
def test_op(benchmark: Any, setting: Setting, name: str) -> None:
    benchmark.group = str(setting)
    with torch.set_grad_enabled(bool(setting.leaves)):
        call = peer(setting, name)
        gate(setting).check(name, call)
        benchmark(call)
