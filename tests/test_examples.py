"""The demo in a short form: it runs, writes its picture, and its verdict can be a refusal."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("sklearn")
pyplot = pytest.importorskip("matplotlib.pyplot")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    picture = tmp_path_factory.mktemp("demo") / "digits.png"
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), "--steps", "20", "--out", str(picture)]
    # One thread: on a busy machine small parallel loops wait for one another.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment), picture


def test_digits_runs(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    result, picture = run
    assert result.returncode == 0, result.stderr
    assert re.search(r"^demo: done in \d+ s", result.stdout, re.MULTILINE), result.stdout
    image = pyplot.imread(picture)
    assert min(image.shape[:2]) > 500
    assert image[..., :3].std() > 0.05
    assert len(set(image[..., :3].reshape(-1, 3).round(1).sum(1))) > 10


def test_digits_curves_agree_on_the_same_noise_alone(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    row = re.search(r"all steps, largest\W+([\d.e+-]+)\W+([\d.e+-]+)", run[0].stdout)
    assert row, run[0].stdout
    same_noise, other_noise = map(float, row.groups())
    assert same_noise < 1e-5
    assert other_noise > 1e-3


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_report", EXAMPLES / "digits_report.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits_report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("factor", "network_mse", "trained", "complaint"),
    [
        (1.0, 0.10, True, None),
        (1.0, 0.13, False, None),
        (1.0, 0.13, True, "not below the linear denoiser"),
        (1.0, float("nan"), True, "not below the linear denoiser"),
        (1.01, 0.10, True, "loss curves differ"),
        (float("nan"), 0.10, True, "loss curves differ"),
    ],
)
def test_digits_verdict(
    report: ModuleType, factor: float, network_mse: float, trained: bool, complaint: str | None
) -> None:
    curve = torch.linspace(1.0, 0.1, 30).expand(2, -1)
    curves = {"fused": curve, "same noise": curve * factor, "plain": curve}
    results = report.Results(curves, {}, network_mse, 0.12, {})
    problems = report.failures(results, trained=trained)
    assert len(problems) == (complaint is not None)
    assert complaint is None or complaint in problems[0]


def test_the_index_has_every_example_and_what_it_says_is_there() -> None:
    text = (EXAMPLES / "README.md").read_text()
    scripts = {p.name for p in EXAMPLES.glob("*.py") if "typer.run(main)" in p.read_text()}
    assert set(re.findall(r"`python examples/(\w+\.py)`", text)) == scripts
    for picture in re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text):
        assert (EXAMPLES / picture).exists(), picture
    for name in scripts:
        source = (EXAMPLES / name).read_text()
        assert all(option in source for option in ("steps:", "seed:", "out:")), name


def test_the_strip_is_drawn_for_light_and_dark_pages(report: ModuleType, tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 20 * 64).reshape(20, 64)
    report.draw_strip(tmp_path, images, images, images)
    light, dark = (pyplot.imread(tmp_path / f"digits-{theme}.png") for theme in ("light", "dark"))
    drawn = light[..., 3] == 1
    assert drawn.any() and (light[..., 3] == 0).any()
    assert light[drawn][:, :3].mean() < 0.3 < 0.7 < dark[drawn][:, :3].mean()
