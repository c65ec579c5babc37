"""Private names of torch are in dae_fast/_torch.py alone; this runs with the oldest and the newest torch."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dae_fast import _torch

PACKAGE = Path(_torch.__file__).parent
PRIVATE = re.compile(r"\btorch(?:\.\w+)*\._(?!_version__|random)\w|from torch(?:\.\w+)*\._|\b_C\b")
# Names that C++ looks up by itself, of the public face.
PUBLIC = {"Tensor", "Parameter", "float32", "float64", "is_grad_enabled", "empty_like", "empty", "device"}


def test_no_private_name_elsewhere() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.name != "_torch.py":
            found += [f"{path.name}: {line}" for line in path.read_text().splitlines() if PRIVATE.search(line)]
    assert not found
    assert PRIVATE.search((PACKAGE / "_torch.py").read_text())


def test_cpp_takes_them_from_there() -> None:
    for path in (PACKAGE.parent / "csrc").glob("*.cpp"):
        for module, name in re.findall(r'member\("([^"]+)", "([^"]+)"\)', path.read_text()):
            if module == "dae_fast._torch":
                assert hasattr(_torch, name), f"{path.name} asks for {name}"
            elif not module.startswith("dae_fast."):
                assert name in PUBLIC, f"{path.name} takes {module}.{name} past dae_fast/_torch.py"


def test_what_they_say() -> None:
    assert not _torch.in_functorch() and not _torch.dispatch_modes() and not _torch.function_modes()
    assert not _torch.dual_level() and _torch.fake_mode() is None and not _torch.profiling()
    assert torch.func.vmap(lambda x: x + _torch.in_functorch())(torch.zeros(2)).all()
    with torch.autograd.forward_ad.dual_level():
        assert _torch.dual_level()
    with torch.autograd.profiler.profile():
        assert _torch.profiling()
