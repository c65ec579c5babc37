"""Fixtures that the tests share."""

from __future__ import annotations

import pytest
import torch

import dae_fast as df

BACKENDS = df.backend_names()
ISAS = tuple(df.backends.native.isas()) if "native" in BACKENDS else ()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    """Each backend that can run here, forced."""
    with df.use_backend(request.param):
        yield request.param


@pytest.fixture
def restore_isa():
    """Leaves the instruction set as it was."""
    before = df.backends.native.isa()
    yield
    df.backends.native.use_isa(before)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
