"""For tests that leave the GPU code to the shared cases: its stand-ins on the CPU take a second for a call."""

import pytest

from .conftest import BACKENDS

cpu_backends = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"], indirect=True)
