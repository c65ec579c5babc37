"""The site that `make docs` builds, opened in a browser; skipped where mkdocs or Chromium is not installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(not find_spec("mkdocs"), reason="needs the extra [docs]"),
    pytest.mark.skipif(not BROWSER, reason="needs Chromium"),
]
PAGES = {
    "index.html": "The first step",
    "migration/index.html": "Why the last digits differ.",
    "guide/index.html": "Noise that can be had again",
    "api/index.html": "x_t = alpha * x0 + sigma * eps",
    "vocabulary/index.html": "Parameterisations",
    "numerics/index.html": "The same bits everywhere",
    "performance/index.html": "When it pays.",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return place


def browse(*options: str) -> str:
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000")
    command = [str(BROWSER), *flags, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens(site: Path, page: str) -> None:
    shown = browse("--dump-dom", f"file://{site / page}")
    assert PAGES[page] in shown
    assert "md-content" in shown  # the theme's styles and script are there


def test_the_pictures_of_the_benchmark_are_shown(site: Path, tmp_path: Path) -> None:
    page = site / "performance" / "index.html"
    for name in page.read_text().split('src="')[1:]:
        source = name.partition('"')[0]
        if source.endswith(".svg"):
            assert (page.parent / source).exists(), source
    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,900", f"file://{page}")
    assert (tmp_path / "page.png").stat().st_size > 20_000
