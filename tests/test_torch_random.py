"""Keys of torch.func._random: exact where they are made, and within rounding where this torch draws from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dae_fast as df
from dae_fast.integrations.torch_random import from_key, sample_keys, to_key
from dae_fast.kernels import reference


def key(seed: int, offset: int = 0) -> Tensor:
    """As torch.func._random.key and fold_in make them, which not every torch can on a CPU."""
    return torch.tensor([seed, offset], dtype=torch.uint64)


def test_there_and_back() -> None:
    for seed, offset in ((0, 0), (42, 7), (2**64 - 1, 2**63 + 5)):
        noise = from_key(key(seed, offset), first_sample=3)
        assert noise == df.Noise((seed, offset), first_sample=3)
        assert noise.key == (seed, offset)
        assert to_key(noise).tolist() == [seed, offset]
    ids = torch.tensor([5, 9])
    assert from_key(key(1), sample=ids) == df.Noise(1, sample=ids)
    in_memory = df.Noise(torch.tensor([3, -1]))
    assert to_key(in_memory).tolist() == [3, 2**64 - 1]


@pytest.mark.parametrize("noise", [df.Noise(7).fold_in(2), df.Noise(7, first_sample=2**63 - 2), df.Noise(7).to("cpu")])
def test_keys_of_samples(noise: df.Noise) -> None:
    """A sample's key draws what the sample has, with nothing folded in."""
    keys = sample_keys(noise, 4)
    assert keys.dtype == torch.uint64 and keys.shape == (4, 2)
    whole = noise.normal((4, 12))
    for b, row in enumerate(keys.view(torch.int64).tolist()):
        alone = reference.normal(df.Noise(tuple(row)), (1, 12), torch.float32, torch.device("cpu"), fold=False)
        torch.testing.assert_close(alone[0], whole[b], rtol=0.0, atol=2e-6)


def test_keys_of_ids_and_of_a_part() -> None:
    ids = torch.tensor([9, 2])
    assert torch.equal(sample_keys(df.Noise(1, sample=ids), 2)[1], sample_keys(df.Noise(1), 3)[2])
    whole, part = sample_keys(df.Noise(1), 2), sample_keys(df.Noise(1, first_element=8), 2)
    assert part[:, 0].equal(whole[:, 0])
    assert [b - a for a, b in zip(whole[:, 1].tolist(), part[:, 1].tolist(), strict=True)] == [2, 2]
    assert sample_keys(df.Noise(1), 0).shape == (0, 2)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"from_key: key must be uint64 of shape \(2,\), got torch.int64 of \(2,\)"):
        from_key(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"from_key: key must be uint64 .* got int"):
        from_key(3)
    with pytest.raises(ValueError, match="sample_keys: first_element must be a multiple of 4, got 6"):
        sample_keys(df.Noise(1, first_element=6), 2)


def test_torch_draws_the_same() -> None:
    random = pytest.importorskip("torch.func._random", reason="this torch has no torch.func._random")
    try:
        made = random.normal(key(42), (4,))
    except NotImplementedError as error:
        pytest.skip(f"torch.func._random does not run on this torch's CPU: {str(error).splitlines()[0][:90]}")
    assert made.shape == (4,)
    noise = from_key(random.fold_in(random.key(42), 3))
    assert noise == df.Noise(42).fold_in(3)
    assert torch.equal(to_key(noise), random.fold_in(random.key(42), 3))
    theirs = random.normal(sample_keys(noise, 6)[:, None], (6, 10_000))
    apart = (noise.normal((6, 10_000)) - theirs).abs()
    assert apart.max() < 2e-5
    assert (apart < 1.5e-6).double().mean() > 0.9998
