"""Each module imports only what lies below it, type-checking imports included; nothing here imports benchmarks."""

from __future__ import annotations

import ast
from pathlib import Path

import dae_fast
from dae_fast.kernels import dispatch, native, reference
from dae_fast.kernels.spec import FUNCTIONS, Backend

PACKAGE = Path(dae_fast.__file__).parent
# Lowest first; modules of one line do not import one another, but for those of a package.
LAYERS = (
    ("_torch",),
    ("checks", "profiling"),
    ("kernels",),
    ("routing", "torch_noise"),
    ("noise",),
    ("info",),
    ("coefficients",),
    ("schedule",),
    ("continuous",),
    ("primitives",),
    ("dtensor",),
    ("ops",),
    ("library", "graphs"),
    ("samplers", "nn"),
    ("saved", "integrations"),
    ("__init__",),
    ("__main__",),
)
# A noise is named where it is read, as a type, and a schedule where a level is; why a library was not built is asked
# of info when it is missing. The way of DTensors, which are made of all these, is imported when one is met.
NAMED_AS_TYPES = {("kernels", "noise"), ("kernels", "info"), ("coefficients", "schedule"), ("routing", "dtensor")}
BELOW = {name: k for k, line in enumerate(LAYERS) for name in line}


def layer(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The layers that a file imports."""
    package = ("dae_fast", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {parts[1] for name in names if (parts := name.split("."))[0] == "dae_fast" and len(parts) > 1}
        assert not any(name.split(".")[0] in ("benchmarks", "tests") for name in names), path
    return found


def test_layers() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = layer(path)
        if path.name == "__init__.py" and own == "__init__":
            continue
        for other in imported(path) & set(BELOW):
            if other != own and (own, other) not in NAMED_AS_TYPES:
                assert BELOW[other] < BELOW[own], f"{path.relative_to(PACKAGE)} imports {other}, which is not below it"


def test_benchmarks_do_not_import_tests() -> None:
    for path in (PACKAGE.parent / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] != "tests", path


def test_backends_have_one_contract() -> None:
    """Every function of the protocol, with its parameters and annotations."""
    import inspect

    for module in (native, reference, *([dispatch.module("triton")] if dispatch.module("triton") else [])):
        for name in FUNCTIONS:
            wanted = list(inspect.signature(getattr(Backend, name)).parameters.values())[1:]
            assert list(inspect.signature(getattr(module, name)).parameters.values()) == wanted, (module, name)
