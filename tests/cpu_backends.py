"""For modules that leave the GPU code to the shared cases: its stand-ins on the CPU take a second for a call."""

from __future__ import annotations

import pytest

from .conftest import BACKENDS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """pytest calls it in a module that imports it."""
    if "backend" in metafunc.fixturenames:
        names = [name for name in BACKENDS if name != "triton"]
        metafunc.parametrize("backend", names, indirect=True)
