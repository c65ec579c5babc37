"""The pages of docs/: their blocks run, in order and page by page, and the API page names all that is public."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dae_fast as df

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("index.md", "migration.md", "guide.md", "api.md", "scale.md")
# Pages about what need not be installed.
OTHERS = {
    "diffusers.md": ("diffusers",),
    "trainers.md": ("transformers", "accelerate", "lightning"),
    "clients.md": ("denoising_diffusion_pytorch", "k_diffusion"),
}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", (*PAGES, *OTHERS))
def test_the_blocks_run(page: str) -> None:
    for needed in OTHERS.get(page, ()):
        pytest.importorskip(needed)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    found = blocks(page)
    assert found
    for number, block in enumerate(found):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_pages_with_blocks_are_run() -> None:
    with_blocks = {path.name for path in DOCS.glob("*.md") if blocks(path.name)}
    assert with_blocks - {"profiling.md"} == {*PAGES, *OTHERS}  # that one's block is a part of a loop


def test_the_api_page_has_every_public_name_with_an_example() -> None:
    text = (DOCS / "api.md").read_text()
    for name in df.__all__:
        if not isinstance(getattr(df, name), str):
            assert f"::: dae_fast.{name}" in text, name
        assert re.search(rf"\bdf\.{name}\b", "".join(blocks("api.md"))), name


def test_the_numerical_contract_has_every_op() -> None:
    rows = re.findall(r"^\| (.*?) \|", (DOCS / "numerics.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    values = {"EDM", "Level", "LevelStatistics", "LogNormal", "LogitNormal", "Masking", "Mode", "Noise", "OffsetNoise"}
    values |= {"PyramidNoise", "SaltAndPepper", "TimedSchedule", "Uniform", "backend_names", "info", "nn"}
    values |= {"noise_version", "samplers", "use_backend", "weighting"}
    assert set(df.__all__) - values == named
