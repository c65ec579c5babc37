"""The source of dae_fast/samplers/functions.py, the samplers' short forms: `python -m tests.short_forms` writes it.

A function for each class of SHORT, with the fields of the class and the arguments of its `sample`.
"""

from __future__ import annotations

import math
from dataclasses import fields
from inspect import getdoc, signature
from pathlib import Path
from typing import Any

import dae_fast as df

FILE = Path(df.samplers.__file__).with_name("functions.py")
SHORT = (
    "DDPM",
    "DDIM",
    "EulerAncestral",
    "DPMSolverPP2M",
    "DPMSolverPP2MSDE",
    "FlowEuler",
    "FlowMidpoint",
    "AnnealedLangevin",
    "Euler",
    "Heun",
    "PredictorCorrector",
    "ProbabilityFlow",
)
HEAD = '''"""The samplers' short forms, one call each. Written by `python -m tests.short_forms` from the classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..continuous import ContinuousSchedule
from ..ops.conversions import Bounds
from ..ops.parameterisation import Parameterisation
from ..schedule import Schedule
{imports}
'''


def imports() -> str:
    places: dict[str, list[str]] = {
        "arguments": ["Noises", "Start"],
        "levels": ["Conditioning", "Schedules"],
        "network": ["Guidance"],
        "base": ["Callback"],
    }
    for name in SHORT:
        places.setdefault(getattr(df.samplers, name).__module__.split(".")[-1], []).append(name)
    places["arguments"].insert(0, "Network")
    return "\n".join(f"from .{module} import {', '.join(sorted(names))}" for module, names in sorted(places.items()))


def shown(value: Any) -> str:
    return "math.inf" if value == math.inf else repr(value).replace("'", '"')


def function(name: str) -> str:
    cls = getattr(df.samplers, name)
    own = [f for f in fields(cls) if f.init and f.name != "schedule"]
    (schedule,) = (f for f in fields(cls) if f.name == "schedule")
    options = [(f.name, "Sequence[int] | None" if f.name == "levels" else f.type, shown(f.default)) for f in own]
    loop = [
        (p.name, p.annotation, shown(p.default))
        for p in signature(cls.sample).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    given = "".join(f"        {n}={n},\n" for n, *_ in options)
    run = "".join(f"        {n}={n},\n" for n, *_ in loop)
    parameters = "".join(f"    {n}: {annotation} = {default},\n" for n, annotation, default in [*options, *loop])
    summary = (getdoc(cls) or "").splitlines()[0]
    return f'''

def {cls.op}(
    {cls.net_name}: Network,
    x: Start,
    schedule: {schedule.type},
    noise: Noises,
    *,
{parameters}) -> Tensor:
    """{summary}

    The short form of {name}(schedule, ...).sample({cls.net_name}, x, noise, ...), which have the arguments, the result
    and the errors.
    """
    sampler = {name}(
        schedule,
{given}    )
    return sampler.sample(
        {cls.net_name},
        x,
        noise,
{run}    )
'''


def source() -> str:
    return HEAD.format(imports=imports()) + "".join(map(function, SHORT))


if __name__ == "__main__":
    FILE.write_text(source())
