"""Turns this project's docstrings into Markdown: an argument becomes a list item."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

import griffe

ARGUMENT = re.compile(r"([A-Za-z_]\w*)((?:, \w+)*): (?=\S)")
BESIDE = re.compile(r" {4,}(?=[A-Za-z_]\w*: )")  # two arguments on a line


def markdown(text: str, names: Container[str]) -> str:
    made: list[str] = []
    for line in text.splitlines():
        in_list = bool(made) and made[-1].startswith(("- ", "  "))
        found = ARGUMENT.match(line)
        if found and found[1] in names:
            made += [] if in_list else [""]
            made += [ARGUMENT.sub(r"- **\1\2**: ", part, count=1) for part in BESIDE.split(line)]
        elif in_list and line.startswith(" "):
            made.append(f"  {line.strip()}")
        else:
            made += ["", line] if in_list and line else [line]
    return "\n".join(made)


class Docstrings(griffe.Extension):
    """Before mkdocstrings renders them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            known = obj.members.get("__init__") if obj.is_class else obj
            parameters = getattr(known, "parameters", ())
            obj.docstring.value = markdown(obj.docstring.value, {p.name for p in parameters} | {"returns"})
