"""The diffs of CONTRIBUTING.md: each is applied to a copy of the tree, and what it adds is run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIFFS = re.findall(r"^\*\*An? ([^*]*)\*\*.*?```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S | re.M)

OP = """
import torch
from benchmarks.cases import CASES, widen
case = next(c for c in CASES if c.name == "half_way-fresh")
inputs = case.inputs((3, 40), torch.float32, 0)
torch.testing.assert_close(case.ours(inputs), case.plain(inputs, case.eps(inputs, torch.float32)))
"""
CORRUPTION = """
import torch, dae_fast as df
x, salt = torch.zeros(2, 500), df.Salt(0.25, df.Noise(1))
assert torch.equal(df.corrupt(x, salt), salt.mask(x.shape).float())
assert df.noise_mse(x, x + 1, mask=salt) == 1
torch.save(salt, "salt.pt")
assert torch.equal(torch.load("salt.pt").mask(x.shape), salt.mask(x.shape))
"""
BACKEND = """
import torch, dae_fast as df
x, level = torch.randn(3, 8), df.Schedule.linear(10)[torch.tensor([1, 2, 3])]
wanted = df.add_noise(x, df.Noise(1), level)
with df.use_backend("mine"):
    torch.testing.assert_close(df.add_noise(x, df.Noise(1), level), wanted)
"""
KIND = """
import warnings
import torch
warnings.simplefilter("ignore", RuntimeWarning)  # the core that is beside it does not know the kind
import dae_fast as df
assert "geman_mcclure" in df.info()["native"], df.info()["native"]
delta, y = 0.7, torch.zeros(2, 37)
r = torch.randn(2, 37, requires_grad=True)
wanted = (delta**2 * r**2 / (r**2 + delta**2)).mean()
for backend in ("reference", *["triton"] * ("triton" in df.backend_names())):
    with df.use_backend(backend):
        loss = df.residual_loss(r, (1.0, y), kind="geman_mcclure", delta=delta)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(made, r, retain_graph=True)[0] for made in (loss, wanted)))
"""
RHO = """
#include <cstdio>
#include "ops.h"
int main() {
  const dae::Rho<dae::Penalty::geman_mcclure, double> rho{0.5};
  std::printf("%.17g %.17g", rho.value(1.0), rho.half_slope(1.0));
}
"""


def apply(diff: str, tree: Path) -> None:
    for name, hunks in re.findall(r"^--- .*\n\+\+\+ b/(.*)\n((?:(?!--- ).*\n)*)", diff, re.M):
        path = tree / name
        text = path.read_text() if path.exists() else ""
        for hunk in hunks.split("@@\n")[1:]:
            lines = hunk.splitlines(keepends=True)
            old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            assert text.count(old) == 1 or not text, f"{name} has no such place, or several:\n{old}"
            text = text.replace(old, new) if text else new
        path.write_text(text)


def copied(tree: Path, *diffs: str) -> Path:
    for folder in ("dae_fast", "benchmarks", "csrc"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for diff in diffs:
        apply(diff, tree)
    return tree


def run(tree: Path, *programs: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(programs)],
        cwd=tree,
        env={"PYTHONPATH": str(tree), **environment},
        text=True,
        stderr=subprocess.PIPE,
    )
    assert not done.returncode, done.stderr


def test_what_is_shown() -> None:
    assert [name for name, _ in DIFFS] == ["op", "corruption", "kind of loss", "backend"]


def test_an_op_a_corruption_and_a_backend(tmp_path: Path) -> None:
    run(copied(tmp_path, *(diff for name, diff in DIFFS if name != "kind of loss")), OP, CORRUPTION, BACKEND)


def test_a_kind_of_loss(tmp_path: Path) -> None:
    """In plain torch and in Triton's interpreter; in C++ its formula alone, which all its kernels are made from."""
    tree = copied(tmp_path, dict(DIFFS)["kind of loss"])
    run(tree, KIND, TRITON_INTERPRET="1")
    (tree / "rho.cpp").write_text(RHO)
    subprocess.run(["c++", "-std=c++17", "-Icsrc", "rho.cpp", "-o", "rho"], cwd=tree, check=True)
    value, half_slope = map(float, subprocess.check_output([tree / "rho"], text=True).split())
    assert abs(value - 0.2) < 1e-15 and abs(half_slope - 0.04) < 1e-15
