"""Puts the benchmark's pictures into the site; in the repository the pages link to where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    for picture in RESULTS.glob("*.svg"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("../benchmarks/results/", "results/")
