"""The machine code of the Triton kernels, for GPUs that are not here: compiled, disassembled and read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import TRITON_BEFORE_3_9

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Any:
    """What triton_sass.py found, in a process without the interpreter that the other tests may have on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_sass", "--json", *["--all"] * request.config.getoption("--longer")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_streaming_loops(compiled: Any) -> None:
    """128-bit loads and stores of every operand; nothing through shared memory or a stack."""
    assert len(compiled["nvidia"]) >= 27
    for kernel in compiled["nvidia"]:
        wanted = {
            "wide_loads": kernel["loads"] * kernel["turns"],
            "wide_stores": kernel["stores"] * kernel["turns"],
            "moves": 0,
            "stack": 0,
        }
        assert {key: kernel[key] for key in wanted} == wanted, kernel
        assert kernel["registers"] <= 64, kernel  # half of an SM's threads at the least


@pytest.mark.skipif(TRITON_BEFORE_3_9, reason="counted with Triton 3.9; 3.6 takes up to a sixth more")
def test_instructions_a_value(compiled: Any) -> None:
    for kernel in compiled["nvidia"]:
        assert kernel["instructions_a_value"] <= kernel["most"], kernel


def test_amd_compiles(compiled: Any) -> None:
    assert len(compiled["gfx942"]) >= 3
    assert not any(compiled["gfx942"].values()), "bytes of stack"


def test_every_way_compiles(compiled: Any) -> None:
    assert len(compiled["variants"]) >= 12
    assert not any(compiled["variants"].values()), "bytes of stack"


def test_penalties_round_as_ieee(compiled: Any) -> None:
    """As they do on the CPU, denormals included (no .ftz); fp64 is the mean's, by the number of elements."""
    of_mean = ["div.rn.f64"]
    assert compiled["roundings"] == {
        "huber": of_mean,
        "pseudo_huber": ["div.rn.f32", *of_mean, "sqrt.rn.f32"],
    }


def test_values_do_not_recompile(compiled: Any) -> None:
    """Neither a new seed nor another batch: integers are 64 bits wide, whatever they hold."""
    assert compiled["compilations"] == 1


def test_a_key_has_one_code(compiled: Any) -> None:
    """Compiled kernels are kept by dtypes, layouts and options, which must tell apart what was compiled."""
    assert compiled["keys of several codes"] == []


def test_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    """This backend's own tests, and some of the shared ones, where there is no GPU to run them.

    Of ops and losses that differ in coefficients alone, which other backends are shown with, one or two of a kind; all
    with --longer.
    """
    longer = request.config.getoption("--longer")
    alike = "min_snr or noise_mse-weight or ddim or sgld or underdamped or per-sample or dream or target-v or perturbed"
    few = "noise_mse-fresh or denoising_loss-v or to_eps-clamp or corrupt-salt"
    forward = "test_forward" if longer else f"test_forward and not ({alike})"
    ops = f"({forward} or test_gradient and ({few})) and float32"
    primitives = "9x5 and (float32 or corrupt) or any_layout and float32 or not_read or of_nothing or exponential"
    weighing = "test_residual_weighing and (70 or 9001) and (alone or mask)"
    losses = "huber-Noise-one or sum-Noise-one or snr-Noise-one or F-tensor-one or flow-tensor-one or mse-tensor-one"
    losses = "one" if longer else losses
    plain = f"test_plain_calls and (test_losses and ({losses}) or dtypes or memory or misaligned or what or launch)"
    wanted = f"test_triton or triton and ({ops} or {primitives} or {weighing} or {plain})"
    files = [f"tests/test_{name}.py" for name in ("triton", "ops", "primitives", "reparameterisation", "plain_calls")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *["--longer"] * longer, "-k", wanted, *files],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
