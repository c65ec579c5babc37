"""Measurements as rows, and the files that keep them."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

Environment = dict[str, str]
Group = dict[str, "Row"]  # the rows of a setting, by peer


@dataclass(frozen=True)
class Row:
    """One peer in one setting. Fields are None where they do not apply, all of them for a wrong result."""

    case: str
    mode: str
    shape: str
    dtype: str
    peer: str
    error: str = ""  # why the gate refused the peer
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    rounds: int | None = None
    calls_per_round: int | None = None
    least_bytes: int | None = None  # that must be read and written
    moved_bytes: int | None = None  # that the kernels read and write
    gigabytes_per_s: float | None = None  # least_bytes over the median
    copy_share: float | None = None  # of the copy bandwidth measured in the same rounds
    values_per_s: float | None = None  # elements of a sample tensor
    peak_bytes: int | None = None  # allocated in one call, results included
    tensors_allocated: int | None = None  # of at least half a sample tensor
    small_bytes_allocated: int | None = None
    launches: int | None = None  # on a GPU

    @property
    def setting(self) -> tuple[str, str, str, str]:
        return self.case, self.mode, self.shape, self.dtype

    @property
    def values(self) -> int:
        """Elements of a sample tensor."""
        return math.prod(int(size) for size in self.shape.split("x"))

    @property
    def sample_bytes(self) -> int:
        return self.values * getattr(torch, self.dtype).itemsize

    @property
    def passes(self) -> float | None:
        """The bytes moved against the least possible."""
        return self.moved_bytes / self.least_bytes if self.moved_bytes and self.least_bytes else None


def described(environment: Environment) -> str:
    """The machine, the versions and the date of a measurement, in a line."""
    return (
        "{device}, {threads} threads; dae_fast {dae_fast} at {commit}, torch {torch}, Python {python}; {date}".format(
            **environment
        )
    )


def by_setting(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], Group]:
    """Rows of each setting by peer, in the order they came."""
    groups: dict[tuple[str, str, str, str], Group] = {}
    for row in rows:
        groups.setdefault(row.setting, {})[row.peer] = row
    return groups


def ratio(group: Group, over: str, under: str) -> float | None:
    """How many times `under` is as fast as `over`: a ratio of medians."""
    slow, fast = (group[name].median_ms if name in group else None for name in (over, under))
    return slow / fast if slow and fast else None


R = TypeVar("R")
_PARSERS = {"str": str, "int": int, "float": float, "int | None": int, "float | None": float}


def write_csv(path: Path, rows: Iterable[Any], environment: Environment) -> None:
    """Dataclasses of one kind. Every line carries the environment: a line alone says where it was measured.

    Under another name first: a file of that name is whole whenever this process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".new-{path.name}")
    with new.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, row in enumerate(rows):
            if number == 0:
                writer.writerow([*(f.name for f in dataclasses.fields(row)), *environment])
            writer.writerow([*(_text(v) for v in dataclasses.astuple(row)), *environment.values()])
    new.replace(path)


def read_csv(path: Path, kind: type[R] = Row) -> tuple[list[R], Environment]:  # type: ignore[assignment]
    """Raises ValueError for a file that lacks a field of `kind`."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    names = {f.name for f in fields}
    if not lines or (lacking := names - lines[0].keys()):
        raise ValueError(f"{path} is no file of these results: {', '.join(sorted(lacking)) if lines else 'no lines'}")
    environment = {name: value for name, value in lines[0].items() if name not in names}
    return [kind(**{f.name: _parse(str(f.type), line[f.name]) for f in fields}) for line in lines], environment


def write_json(path: Path, rows: Sequence[Row], environment: Environment) -> None:
    """{"environment": ..., "rows": [...]}; what does not apply is left out."""
    lines = [{k: v for k, v in dataclasses.asdict(row).items() if v not in (None, "")} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "rows": lines}, indent=1) + "\n")


def _text(value: str | float | None) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _parse(kind: str, text: str) -> Any:
    return None if kind.endswith("None") and not text else _PARSERS[kind](text)
