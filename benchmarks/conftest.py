"""Options of `pytest benchmarks/`: those of `python -m dae_fast bench`, under the same names."""

from __future__ import annotations

import pytest
import torch
import typer

from . import suite
from .__main__ import chosen_device, chosen_plan
from .suite import Measurement


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dae_fast", "what is measured; without options the main ops in float32 at two shapes")
    for name, what in (
        ("case", "a case, or the start of its name"),
        ("shape", "such as 256x4x64x64"),
        ("dtype", "such as bfloat16"),
        ("peer", "such as eager, native or diffusers"),
    ):
        group.addoption(f"--{name}", action="append", help=f"{what}; repeatable")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--full", action="store_true", help="every op, shape and dtype, with all gradients: twenty minutes")


def _plan(config: pytest.Config) -> list[Measurement]:
    full = config.getoption("--full")
    asked = [config.getoption(f"--{name}") for name in ("case", "shape", "dtype", "peer")]
    try:
        device = chosen_device(config.getoption("--device"))
        if any(asked):
            return chosen_plan(*asked, device, full=full)
    except typer.BadParameter as error:
        raise pytest.UsageError(f"{error.param_hint}: {error.message}") from None
    return suite.full(device) if full else suite.quick(device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"setting", "name"} <= set(metafunc.fixturenames):
        pairs = [(setting, name) for setting, names in _plan(metafunc.config) for name in names]
        ids = [f"{setting}: {name}" for setting, name in pairs]
        metafunc.parametrize(("setting", "name"), pairs, ids=ids)


def pytest_report_header() -> str:
    threads = f"{torch.get_num_threads()} threads"
    return f"benchmarks: {threads}; peers run one after the other here, in turns under `python -m dae_fast bench`"
