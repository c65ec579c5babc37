"""What a release says of itself agrees: versions, the noise's hash, the wheels' configuration, the policies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dae_fast as df

from .test_install import NOISE_HASH

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer")
ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
RELEASE = (ROOT / "docs" / "release.md").read_text()


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^cff-version: 1\.2\.0$", text, re.MULTILINE)
    for field in ("title", "message", "authors", "license"):
        assert re.search(rf"^{field}:", text, re.MULTILINE), field
    assert re.search(rf"^version: {re.escape(SETTINGS['project']['version'])}$", text, re.MULTILINE)


def test_wheels_are_tested_by_the_noise() -> None:
    wheels = SETTINGS["tool"]["cibuildwheel"]
    assert NOISE_HASH in wheels["test-command"] and "-m dae_fast hash" in wheels["test-command"]
    linux = wheels["linux"]
    assert linux["archs"] == ["x86_64", "aarch64"] and linux["environment"]["CUDACXX"] == "none"
    assert {linux[f"manylinux-{arch}-image"] for arch in linux["archs"]} == {"manylinux_2_28"}
    oldest = SETTINGS["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert wheels["build"].startswith(f"cp{oldest}-*")


def test_the_noise_contract_is_the_one_that_the_page_has() -> None:
    assert NOISE_HASH in RELEASE and f"`df.noise_version` is {df.noise_version!r}".replace("'", '"') in RELEASE


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first and first[1] == SETTINGS["project"]["version"]


def test_policies_and_templates() -> None:
    assert "**Deprecation.**" in RELEASE and "private" in (ROOT / "SECURITY.md").read_text()
    templates = sorted(path.name for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert templates == ["bug.md", "speed.md"]
    for name in templates:
        assert "python -m dae_fast info" in (ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text()
