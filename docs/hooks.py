"""Puts the benchmark's pictures into the site; in the repository the pages link to where they lie."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from formulas import typeset

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    for picture in RESULTS.glob("*.svg"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_content(content: str, page: Page, **_: Any) -> str:
    return typeset(content, code=page.file.src_uri == "vocabulary.md")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("../benchmarks/results/", "results/")
