"""docs/trainers.md: each recipe ends in the weights of a plain loop; skipped where its trainer is not installed."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

import dae_fast as df

PAGE = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text()
STEPS = 4
pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers'


@pytest.mark.parametrize(
    ("needed", "recipe"),
    [
        ("transformers", "train_with_trainer"),
        ("accelerate", "train_with_accelerate"),
        ("lightning", "train_with_lightning"),
    ],
)
def test_a_recipe_is_the_plain_loop(needed: str, recipe: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(needed)
    pytest.importorskip("accelerate")  # the Trainer's too
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    names: dict = {}
    for block in (blocks[0], next(b for b in blocks if recipe in b)):
        exec(block, names)
    torch.manual_seed(0)
    theirs, plain = names["Network"](), names["Network"]()
    plain.load_state_dict(theirs.state_dict())
    names[recipe](theirs, STEPS)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for step in range(STEPS):
        noise = df.Noise(0).fold_in(step)
        names["objective"](plain, names["data"].x, noise)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    before = names["Network"]().state_dict()
    for name, mine in plain.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], mine, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(mine, before[name])
