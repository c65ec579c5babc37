"""Training in worlds of one and of four gloo processes ends in the weights of a plain loop; so does one that restarts.

Samples are noised by their index in the data set and the epoch: each rank draws its own part of the global noise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dae_fast as df

from .worlds import in_processes

SAMPLES, BATCH, EPOCHS = 24, 8, 2
STEPS = EPOCHS * SAMPLES // BATCH
STOP = 4  # steps before a restart, in the middle of the second epoch
OBJECTIVE = df.nn.DenoisingLoss(df.Schedule.cosine(100), predict="v", weighting="min_snr")
CASES = ("ddp", "ddp accumulated", "fsdp", "restarted", "sequence")
TOKENS = 8  # of the samples that are cut along the sequence


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.SiLU(), torch.nn.Linear(32, 16)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x + t.view(-1, *[1] * (x.dim() - 1)) / 100)


def data(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batch(step: int) -> tuple[int, Tensor]:
    """The epoch, and the indices of a step's samples in the data set: shuffled, each once an epoch."""
    epoch, place = divmod(step, SAMPLES // BATCH)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
    return epoch, order[place * BATCH : (place + 1) * BATCH]


def loss_of(net: Any, noise: df.Noise, step: int, part: slice) -> Tensor:
    """Of a part of the step's batch."""
    epoch, ids = batch(step)
    own = ids[part].contiguous()
    loss: Tensor = OBJECTIVE(net, data()[own], df.Noise(noise.key, sample=own).fold_in(epoch))["loss"]
    return loss


def sequence_loss(net: Any, step: int, rank: int, world: int) -> Tensor:
    """Of the rank's tokens of every sample of the batch."""
    epoch, ids = batch(step)
    size = TOKENS // world
    noise = df.Noise(5, sample=ids, first_element=rank * size * 16).fold_in(epoch)
    loss: Tensor = OBJECTIVE(net, data(TOKENS)[ids, rank * size : (rank + 1) * size], noise)["loss"]
    return loss


def train(net: Any, optimizer: Any, noise: df.Noise, steps: range, rank: int, world: int, micro: int = 1) -> None:
    size = BATCH // world // micro
    for step in steps:
        for k in range(micro):
            first = rank * size * micro + k * size
            last = k == micro - 1
            if micro > 1:
                net.require_backward_grad_sync = last  # what no_sync() sets
            (loss_of(net, noise, step, slice(first, first + size)) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()


def made(net: Any) -> tuple[Any, Any]:
    return net, torch.optim.Adam(net.parameters(), 0.01)


def run(case: str, folder: Path, rank: int, world: int) -> dict[str, Tensor]:
    """The weights at the end."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    noise, steps = df.Noise(5), range(STEPS)
    if case == "fsdp":
        plain = Network()
        fully_shard(plain.layers[0])
        net, optimizer = made(fully_shard(plain))
        train(net, optimizer, noise, steps, rank, world)
        return {name: p.full_tensor() for name, p in net.state_dict().items()}
    net, optimizer = made(DistributedDataParallel(Network()))
    if case == "sequence":
        for step in steps:
            sequence_loss(net, step, rank, world).backward()
            optimizer.step()
            optimizer.zero_grad()
        return dict(net.module.state_dict())
    if case != "restarted":
        train(net, optimizer, noise, steps, rank, world, micro=2 if "accumulated" in case else 1)
        return dict(net.module.state_dict())
    train(net, optimizer, noise, range(STOP), rank, world)
    model, optim = get_state_dict(net, optimizer)
    saved = {"model": model, "optimizer": optim, "noise": noise.state_dict(), "step": STOP}
    place = folder / f"checkpoint-{world}"
    checkpoint.save(saved, checkpoint_id=place)
    net, optimizer = made(DistributedDataParallel(Network()))
    model, optim = get_state_dict(net, optimizer)
    loaded = {"model": model, "optimizer": optim, "noise": df.Noise(0).state_dict(), "step": 0}
    checkpoint.load(loaded, checkpoint_id=place)
    set_state_dict(net, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(net, optimizer, df.Noise.from_state_dict(loaded["noise"]), range(loaded["step"], STEPS), rank, world)
    return dict(net.module.state_dict())


def process(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for case in CASES:
        weights = run(case, folder, rank, world)
        if rank == 0:
            torch.save(weights, folder / f"{case}-{world}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the weights of both worlds, which run side by side."""
    place = tmp_path_factory.mktemp("worlds")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_distributed", str(place)]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], timeout=300)
    return place


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Tensor]]:
    """The weights of a plain loop over whole batches, of rows and of sequences."""
    weights = {}
    for kind in ("rows", "sequence"):
        net, optimizer = made(Network())
        for step in range(STEPS):
            loss = (
                sequence_loss(net, step, 0, 1) if kind == "sequence" else loss_of(net, df.Noise(5), step, slice(None))
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        weights[kind] = net.state_dict()
    return weights


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_world_ends_in_the_plain_weights(case: str, world: int, folder: Path, plain: dict) -> None:
    weights = torch.load(folder / f"{case}-{world}.pt")
    start = Network().state_dict()
    for name, wanted in plain["sequence" if case == "sequence" else "rows"].items():
        torch.testing.assert_close(weights[name], wanted, rtol=1e-9, atol=1e-11)
        assert (wanted - start[name]).abs().max() > 1e-3


def test_four_ranks_are_followed_by_one(folder: Path, plain: dict) -> None:
    """From the checkpoint of four, without a process group."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net, optimizer = made(Network())
    model, optim = get_state_dict(net, optimizer)
    loaded = {"model": model, "optimizer": optim, "noise": df.Noise(0).state_dict(), "step": 0}
    checkpoint.load(loaded, checkpoint_id=folder / "checkpoint-4", no_dist=True)
    set_state_dict(net, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(net, optimizer, df.Noise.from_state_dict(loaded["noise"]), range(loaded["step"], STEPS), 0, 1)
    for name, wanted in plain["rows"].items():
        torch.testing.assert_close(net.state_dict()[name], wanted, rtol=1e-9, atol=1e-11)


def test_other_noise_ends_elsewhere(plain: dict) -> None:
    """As it would were ranks to draw the same noise, or a restart other noise."""
    net, optimizer = made(Network())
    train(net, optimizer, df.Noise(6), range(STEPS), 0, 1)
    assert (net.state_dict()["layers.0.weight"] - plain["rows"]["layers.0.weight"]).abs().max() > 1e-3


if __name__ == "__main__":
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp

    place = Path(sys.argv[1])
    in_processes(partial(process, place, rank, world) for world in (1, 4) for rank in range(world))
