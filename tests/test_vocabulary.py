"""docs/vocabulary.md: its formulas are what the code does, and it names all that the library exports."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dae_fast as df
from dae_fast.kernels import reference
from dae_fast.kernels.spec import Kind
from dae_fast.ops.parameterisation import MIXES, errors, mix

TEXT = (Path(__file__).parents[1] / "docs" / "vocabulary.md").read_text()
# Of the library itself rather than of the literature, and what the page says in its text.
INFRASTRUCTURE = {
    "Level",
    "LevelOp",
    "Noise",
    "backend_names",
    "clamped",
    "info",
    "nn",
    "noise_version",
    "residual_loss",
    "samplers",
    "use_backend",
    "weighted_sum",
    "weighting",
}
Array = NDArray[np.float64]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose first column is so headed."""
    lines = TEXT.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    assert found
    return found


def by_clipped_betas(alpha_bar: Array, max_beta: float) -> Array:
    before = np.concatenate(([1.0], alpha_bar[:-1]))
    return np.cumprod(1 - np.minimum(1 - alpha_bar / before, max_beta))


FUNCTIONS: dict[str, Any] = {
    name: getattr(np, name)
    for name in (
        "sqrt",
        "exp",
        "log",
        "cos",
        "sin",
        "abs",
        "sign",
        "cumprod",
        "linspace",
        "minimum",
        "maximum",
        "where",
    )
} | {"pi": np.pi, "S": lambda x: 1 / (1 + np.exp(-x)), "by_clipped_betas": by_clipped_betas}


def evaluated(cell: str, **values: Any) -> dict[str, Any]:
    """What the formulas of a cell give: an expression as "", assignments by name, the later ones first."""
    for code in reversed(re.findall(r"`([^`]*)`", cell)):
        for part in code.split(";"):
            name, _, formula = part.rpartition(" = ")
            values[name.strip()] = eval(formula.replace("^", "**"), {"__builtins__": {}}, {**FUNCTIONS, **values})
    return values


def formula(cell: str, **values: Any) -> Any:
    return evaluated(cell, **values)[""]


def defaults(function: Any) -> dict[str, Any]:
    given = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in given if p.default is not inspect.Parameter.empty}


def test_every_name_resolves() -> None:
    names = re.findall(r"`df((?:\.\w+)+)", TEXT)
    assert len(names) > 50
    for name in names:
        found: Any = df
        for part in name[1:].split("."):
            found = getattr(found, part)


def test_nothing_is_missing() -> None:
    mentioned = set(re.findall(r"`df\.([\w.]+)", TEXT))
    assert set(df.__all__) - INFRASTRUCTURE <= mentioned
    assert {f"samplers.{name}" for name in df.samplers.__all__} <= mentioned
    assert {f"nn.{name}" for name in ("DenoisingLoss", "EDMPreconditioner")} <= mentioned
    for cls in (df.Schedule, df.ContinuousSchedule):
        made = {name for name, value in vars(cls).items() if isinstance(value, classmethod) and name[0] != "_"}
        assert {f"{cls.__name__}.{name}" for name in made} <= mentioned
    assert [row[0] for row in rows("kind")] == [f'`"{kind}"`' for kind in Kind.__members__]
    assert [row[0] for row in rows("weight")] == [f'`"{name}"`' for name in ("uniform", *df.weighting.NAMES)]
    assert {row[0] for row in rows("predict")} == {*(f'`"{name}"`' for name in MIXES), "`df.EDM(sigma_data)`"}


def test_every_row_has_a_source() -> None:
    for line in re.findall(r"^\| [^-].*\|$", TEXT, re.MULTILINE):
        *_, source = line.strip("|").split("|")
        neutral = ("from_alpha_bar" in line) or ('"uniform"' in line) or source.strip() == "source"
        assert neutral or re.search(r"(1[89]|20)\d\d", source), line


ALPHA, SIGMA = (torch.tensor(v, dtype=torch.float64) for v in ([0.9, 0.5, 1.0], [0.4, 1.5, 3.0]))


@pytest.mark.parametrize("cells", rows("predict"), ids=lambda c: c[0])
def test_parameterisations(cells: list[str]) -> None:
    name = eval(cells[0].strip("`"), {"df": df, "sigma_data": 0.7})
    values = {"alpha": ALPHA.numpy(), "sigma": SIGMA.numpy(), "sigma_data": 0.7}
    for cell, made in zip(cells[1:3], mix(name, ALPHA, SIGMA), strict=True):
        np.testing.assert_allclose(np.asarray(made), formula(cell, **values), rtol=1e-12)


@pytest.mark.parametrize("cells", rows("schedule")[:-2], ids=lambda c: c[0])
def test_schedules(cells: list[str]) -> None:
    T = 12
    constructor = eval(cells[0].strip("`"), {"df": df})
    arguments = defaults(constructor) | {"T": T} if "T" in inspect.signature(constructor).parameters else {}
    if "betas" in inspect.signature(constructor).parameters:
        arguments = {"betas": np.linspace(0.1, 0.5, T)}
    elif "alpha_bar" in inspect.signature(constructor).parameters:
        arguments = {"alpha_bar": np.linspace(0.9, 0.1, T)}
    if "shift" in arguments:
        arguments["shift"] = 3.0
    schedule = constructor(**{k: v for k, v in arguments.items() if k != "name"})
    i = np.arange(T, dtype=np.float64)
    check_columns(schedule, cells[1], i=i, u=(i + 1) / T, **arguments)


@pytest.mark.parametrize("cells", rows("density"), ids=lambda c: c[0])
def test_densities(cells: list[str]) -> None:
    name = re.search(r"df\.(\w+)", cells[0])
    assert name
    density = getattr(df, name[1])(*((0.2, 0.7) if name[1] == "Uniform" else ()))
    stream, B = df.Noise(5), 9
    u = (stream.bits((B,)).double().numpy() + 0.5) / 2**32
    z = stream.normal((B,), dtype=torch.float64).numpy()
    made = density(stream, B, torch.device("cpu"))
    np.testing.assert_allclose(made, formula(cells[1], u=u, z=z, **vars(density)), rtol=1e-12)


def check_columns(schedule: df.Schedule, cell: str, **values: Any) -> None:
    made = evaluated(cell, **values)
    if "alpha_bar" in made:
        made["alpha"], made["sigma"] = np.sqrt(made["alpha_bar"]), np.sqrt(np.maximum(1 - made["alpha_bar"], 0))
    np.testing.assert_allclose(schedule.alpha, np.broadcast_to(made["alpha"], len(schedule)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(schedule.sigma, np.broadcast_to(made["sigma"], len(schedule)), rtol=1e-9, atol=1e-12)


def test_changes_of_a_schedule() -> None:
    (shifted, terminal), before = rows("schedule")[-2:], df.Schedule.linear(12)
    assert (shifted[0], terminal[0]) == ("`schedule.shifted(shift)`", "`schedule.zero_terminal_snr()`")
    check_columns(before.shifted(3.0), shifted[1], shift=3.0, snr=before.snr.numpy())
    check_columns(before.zero_terminal_snr(), terminal[1], a=before.alpha.numpy())


CONTINUOUS = re.findall(r"^\| `df\.ContinuousSchedule.*\|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("line", CONTINUOUS, ids=lambda line: line.split("`")[1])
def test_continuous_schedules(line: str) -> None:
    name, coefficients, drawn, _ = (cell.strip() for cell in line.strip("|").split("|"))
    constructor = eval(name.strip("`"), {"df": df})
    schedule = constructor()
    low, high = schedule.t_min, schedule.t_max
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64) * (high - low) + low
    known = defaults(constructor)
    if "beta_min" in known:
        known["I"] = known["beta_min"] * t.numpy() + (known["beta_max"] - known["beta_min"]) * t.numpy() ** 2 / 2
    made = evaluated(coefficients, t=t.numpy(), **known)
    np.testing.assert_allclose(schedule.alpha(t), np.broadcast_to(made["alpha"], 9), rtol=1e-9)
    np.testing.assert_allclose(schedule.sigma(t), np.broadcast_to(made["sigma"], 9), rtol=1e-9)
    density = type(schedule.density).__name__
    assert drawn.startswith("uniform" if density == "Uniform" else f"`df.{density}(")


@pytest.mark.parametrize("cells", rows("kind"), ids=lambda c: c[0])
def test_penalties(cells: list[str]) -> None:
    r, delta = torch.linspace(-2, 2, 41, dtype=torch.float64), 0.3
    number = Kind[cells[0].strip('`"')]
    made = reference.penalty(r, number, torch.tensor(delta, dtype=torch.float64))
    np.testing.assert_allclose(made, formula(cells[1], r=r.numpy(), delta=delta), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("cells", rows("weight")[1:], ids=lambda c: c[0])
def test_weights(cells: list[str]) -> None:
    """Through the loss itself: its value for a residual of 1 is the weight."""
    name = cells[0].strip('`"')
    schedule = df.Schedule.linear(7)
    t = torch.arange(1, 7)
    snr = schedule.snr.numpy()
    weighting = df.weighting.NAMES[name]
    values = {**vars(weighting), "snr": snr[1:], "snr_before": snr[:-1]}
    zero, one = torch.zeros(6, 5, dtype=torch.float64), torch.ones(6, 5, dtype=torch.float64)
    for predict, cell in (("x0", cells[1]), ("eps", cells[2])):
        loss = df.denoising_loss(one, zero, zero, schedule[t], predict=predict, weight=name, reduction="none")
        np.testing.assert_allclose(loss, np.broadcast_to(formula(cell, **values), 6), rtol=1e-9)


def test_errors_are_of_the_units_that_the_page_has() -> None:
    """snr times the error of x0 is that of eps."""
    eps_error, x0_error = errors("v")(ALPHA, SIGMA)
    np.testing.assert_allclose(eps_error / x0_error, (ALPHA / SIGMA) ** 2)


@pytest.mark.parametrize("cells", rows("sampler"), ids=lambda c: c[0])
def test_steps(cells: list[str]) -> None:
    """The network sees x_s at its second look: what the first step made of x_t, its own x0_hat and the noise."""
    name = cells[0].split(".")[-1].strip("`")
    sampler = getattr(df.samplers, name)
    known = inspect.signature(sampler).parameters
    schedule = df.Schedule.linear(5)
    eta = {"eta": 0.6} if "eta" in known else {}
    chosen = {"levels": [4, 1]} if "levels" in known else {}
    t, s = chosen.get("levels", [4, 3])
    x, x0_hat = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    noise, seen = df.Noise(3), []

    def net(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(x_t.clone())
        return x0_hat

    sampler(net, x, schedule, noise, predict="x0", **chosen, **eta)
    values = {"alpha_t": schedule.alpha[t], "sigma_t": schedule.sigma[t]}
    values |= {"alpha_s": schedule.alpha[s], "sigma_s": schedule.sigma[s], **eta}
    values = {k: float(v) for k, v in values.items()}
    values["v"] = values["sigma_t"] ** 2 - (values["alpha_t"] / values["alpha_s"] * values["sigma_s"]) ** 2
    values["e"] = values["alpha_t"] * values["sigma_s"] / (values["alpha_s"] * values["sigma_t"])
    for column, cell in (("c_z", cells[3]), ("c_x", cells[1]), ("c_m", cells[2])):
        values[column] = float(formula(cell, **values))
    z = noise.fold_in(t).normal((3, 4), dtype=torch.float64)
    expected = values["c_x"] * x + values["c_m"] * x0_hat + values["c_z"] * z
    torch.testing.assert_close(seen[1], expected, rtol=1e-10, atol=1e-12)
