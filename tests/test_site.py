"""The site that `make docs` builds, opened in a browser; skipped where mkdocs or Chromium is not installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

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
    "scale/index.html": "Shards by samples",
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


@pytest.mark.parametrize(
    "code, wanted",
    [
        ("alpha*x0 + sigma*eps", r"\alpha\,x_0 + \sigma\,\varepsilon"),
        ("alpha = 1; sigma = a*(b - c)^(i/2)", r"\alpha = 1,\quad \sigma = a\,\left(b - c\right)^{\frac{i}{2}}"),
        ("-p0 - (a - b)", r"-p_{0} - \left(a - b\right)"),
        ("2^(-i)", "2^{-i}"),
    ],
)
def test_code_as_latex(code: str, wanted: str) -> None:
    assert formulas().latex(code) == wanted


@pytest.mark.parametrize("code", ["df.add_noise", "x", "mask=", "f(x)", "0.1 if a else b", '"eps"'])
def test_what_is_no_formula_stays_code(code: str) -> None:
    page = f"<p><code>{code}</code></p>"
    assert formulas().typeset(page, code=True) == page


def test_formulas_are_typeset_without_a_script(site: Path) -> None:
    page = (site / "vocabulary" / "index.html").read_text()
    assert page.count("<math") > 80 and "\\(" not in page and 'class="arithmatex"' not in page
    assert "<msqrt>" in page and "mathjax" not in page.lower() and "katex" not in page.lower()


def formulas() -> ModuleType:
    pytest.importorskip("latex2mathml")
    spec = spec_from_file_location("formulas", ROOT / "docs" / "formulas.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_of_the_benchmark_are_shown(site: Path, tmp_path: Path) -> None:
    page = site / "performance" / "index.html"
    for name in page.read_text().split('src="')[1:]:
        source = name.partition('"')[0]
        if source.endswith(".svg"):
            assert (page.parent / source).exists(), source
    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,900", f"file://{page}")
    assert (tmp_path / "page.png").stat().st_size > 20_000
