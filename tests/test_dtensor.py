"""Ops over DTensors against the same ops over the whole tensors, in worlds of gloo processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dae_fast as df
from dae_fast import weighting

from .worlds import in_processes

S = df.Schedule.linear(100)
NOISE = df.Noise(7, first_sample=3).fold_in(1)
SHAPE = (6, 4, 5, 3)
OTHER_SHAPES = {"odd": (5, 3, 7), "few": (3, 9), "flat": (8,)}
# Meshes and how x lies on them: R replicated, a number the dimension that is cut.
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "batch": ((4,), (0,)),
    "channels": ((4,), (1,)),
    "rows": ((4,), (2,)),
    "columns": ((4,), (3,)),
    "replicated": ((4,), ("R",)),
    "batch x replicated": ((2, 2), (0, "R")),
    "batch x channels": ((2, 2), (0, 1)),
    "rows x batch": ((2, 2), (2, 0)),
    "batch twice": ((2, 2), (0, 0)),
    "rows and columns": ((2, 2), (2, 3)),
}


def _x(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _per_sample(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape[:1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2


def _t(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(shape[0]) * 13 % 100


# An op of two samples and a tensor (B,) w; `cut` makes DTensors of what else the op reads.
Op = Callable[[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]], Any]
OPS: dict[str, Op] = {
    "add_noise": lambda x, y, w, cut: df.add_noise(x, NOISE, S[_t(x.shape)]),
    "add_noise of sharded levels": lambda x, y, w, cut: df.add_noise(x, NOISE, S[cut(_t(x.shape))]),
    "add_noise by hand": lambda x, y, w, cut: df.add_noise(x, NOISE, df.Level(w, 0.5)),
    "add_noise of a tensor": lambda x, y, w, cut: df.add_noise(x, y, df.Level(w, w)),
    "add_noise and target": lambda x, y, w, cut: df.add_noise(x, NOISE, S[_t(x.shape)], target="v", perturbation=0.1),
    "add_noise by ids": lambda x, y, w, cut: df.add_noise(x, df.Noise(1, sample=_t(x.shape)), S[5]),
    "add_noise offset": lambda x, y, w, cut: df.add_noise(x, df.OffsetNoise(NOISE, 0.3), S[50]),
    "to_x0": lambda x, y, w, cut: df.to_x0(x, y, S[_t(x.shape)], clamp=1.0),
    "langevin_step": lambda x, y, w, cut: df.langevin_step(x, y, w, NOISE),
    "weighted_sum": lambda x, y, w, cut: df.weighted_sum((w, x), (0.5, df.clamped((w, y), (1.0, x), low=-1, high=1))),
    "corrupt": lambda x, y, w, cut: df.corrupt(x, df.Masking(0.3, NOISE), value=2.0),
    "corrupt by p": lambda x, y, w, cut: df.corrupt(x, df.SaltAndPepper((w / 2).detach(), NOISE)),
    "reparameterise": lambda x, y, w, cut: df.reparameterise(x, y, NOISE),
    "reparameterise by a tensor": lambda x, y, w, cut: df.reparameterise(x, x * 0.1, y),
    "noise_mse": lambda x, y, w, cut: df.noise_mse(x, NOISE),
    "noise_mse weighted": lambda x, y, w, cut: df.noise_mse(x, y, weight=w, reduction="sum"),
    "noise_mse x0": lambda x, y, w, cut: df.noise_mse(x, NOISE, level=S[_t(x.shape)], return_x0_mse=True),
    "noise_mse by level": lambda x, y, w, cut: df.noise_mse(
        x, NOISE, level=S[cut(_t(x.shape))], level_weight=torch.linspace(1, 2, 100)
    ),
    "noise_mse of each": lambda x, y, w, cut: df.noise_mse(x, NOISE, weight=w, reduction="none"),
    "masked": lambda x, y, w, cut: df.noise_mse(x, NOISE, mask=cut(y.detach() > 0) if cut is not _whole else y > 0),
    "masked by a plain mask": lambda x, y, w, cut: df.noise_mse(x, NOISE, mask=_x(x.shape, 3) > 0, reduction="sum"),
    "weighed by element": lambda x, y, w, cut: df.noise_mse(x, NOISE, mask=_x(x.shape, 3).abs()),
    "masked by words": lambda x, y, w, cut: df.noise_mse(x, NOISE, mask=df.Masking(0.4, NOISE)),
    "masked by words, summed": lambda x, y, w, cut: df.noise_mse(
        x, NOISE, mask=df.Masking(0.4, NOISE).visible, reduction="sum"
    ),
    "denoising_loss": lambda x, y, w, cut: df.denoising_loss(
        x, y, NOISE, S[_t(x.shape)], predict="v", weight="min_snr", kind="huber", delta=0.5, return_per_sample=True
    ),
    "denoising_loss, x0's gradient": lambda x, y, w, cut: df.denoising_loss(
        x, y, df.OffsetNoise(NOISE), df.Level(w, 0.4), predict="v", weight=weighting.OnError("x0", w.detach())
    ),
    "denoising_loss, log variance": lambda x, y, w, cut: df.denoising_loss(
        x, y, NOISE, S[7], predict="flow", log_variance=w
    ),
    "residual_loss": lambda x, y, w, cut: df.residual_loss(x, (w, y), (0.5, NOISE), weight=w, kind="l1"),
    "l1_penalty": lambda x, y, w, cut: df.l1_penalty(x),
    "kl_sparsity": lambda x, y, w, cut: df.kl_sparsity(torch.sigmoid(x), 0.1),
    "module": lambda x, y, w, cut: tuple(
        df.nn.DenoisingLoss(S, weighting="snr")(lambda x_t, t: 0.5 * x_t + y, x, NOISE).values()
    ),
    "preconditioner": lambda x, y, w, cut: df.nn.EDMPreconditioner(lambda x_t, c: 0.5 * x_t + y)(x, df.Level(1.0, w)),
    "ddim": lambda x, y, w, cut: df.samplers.ddim(lambda x, t: 0.3 * x, x, S, NOISE, steps=4, eta=1.0, clamp=1.0),
    "thresholded": lambda x, y, w, cut: df.samplers.ddim(lambda x, t: 0.3 * x, x, S, NOISE, steps=3, threshold=0.9),
    "dpm": lambda x, y, w, cut: df.samplers.dpm_solver_pp_2m(lambda x, t: 0.3 * x, x, S, NOISE, steps=4),
    "path": lambda x, y, w, cut: df.samplers.ddim(
        lambda x, t: 0.3 * x, x, S, df.BrownianNoise(NOISE, 0.0, 200.0), steps=2, eta=1.0
    ),
    "langevin": lambda x, y, w, cut: df.samplers.langevin(lambda x: -x, x, 0.1, 3, NOISE),
}
OF_W = ("add_noise by hand", "noise_mse weighted", "residual_loss")  # whose w is tried as a plain tensor, too
ALL_OPS = ("batch", "rows", "batch x channels")  # here; elsewhere, and in other shapes, some
SOME_OPS = ("add_noise", "corrupt", "reparameterise", "noise_mse", "masked by words", "ddim")


@cache
def _mesh(sizes: tuple[int, ...]) -> Any:
    """Made once: each has its groups of processes, and those their threads."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes)


def _whole(t: Tensor) -> Tensor:
    return t


def _outputs(op: Op, x: Tensor, y: Tensor, w: Tensor, cut: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    made = op(x, y, w, cut)
    return made if isinstance(made, tuple) else (made,)


def _with_gradients(op: Op, inputs: list[Tensor], cut: Any, full: Any) -> list[Tensor]:
    """Outputs, and gradients of a function of them that takes all."""
    leaves = [t.requires_grad_() for t in inputs]
    made = _outputs(op, *leaves, cut)
    total = sum((full(m).double() * torch.linspace(0.5, 1.5, m.numel()).reshape(m.shape)).sum() for m in made)
    if not total.requires_grad:
        return [full(m).detach() for m in made]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [full(m).detach() for m in made] + [torch.zeros(()) if g is None else full(g) for g in grads]


def _check(name: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    sizes, cuts = LAYOUTS[layout]
    mesh = _mesh(sizes)

    def cut(t: Tensor) -> Tensor:
        whole = [Replicate() if c == "R" or c >= t.dim() else Shard(c) for c in cuts]
        return distribute_tensor(t.detach(), mesh, whole)

    def full(t: Tensor) -> Tensor:
        return t.full_tensor() if isinstance(t, DTensor) else t

    def inputs() -> list[Tensor]:
        return [_x(shape, 1, dtype), _x(shape, 2, dtype), _per_sample(shape, 3)]

    expected = _with_gradients(OPS[name], inputs(), _whole, _whole)
    for plain_w in (False, True)[: 1 + (name in OF_W)]:
        x, y, w = inputs()
        parts = [cut(x), cut(y), w if plain_w else cut(w)]
        found = _with_gradients(OPS[name], parts, cut, full)
        assert len(found) == len(expected)
        for k, (f, e) in enumerate(zip(found, expected, strict=True)):
            near = 1e-11 if dtype == torch.float64 else 2e-6
            where = f"{name}, {layout}, tensor {k}"
            torch.testing.assert_close(f, e, rtol=near, atol=near, msg=lambda m, where=where: f"{where}: {m}")


def _bits(layout: str) -> None:
    """The noise, bit for bit, in every dtype."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    sizes, cuts = LAYOUTS[layout]
    mesh = _mesh(sizes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = _x(SHAPE, 1, dtype)
        part = distribute_tensor(x, mesh, [Replicate() if c == "R" else Shard(c) for c in cuts])
        found = df.add_noise(part, NOISE, S[20])
        assert found.placements == part.placements
        assert torch.equal(found.full_tensor(), df.add_noise(x, NOISE, S[20])), (layout, dtype)


def _refused() -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh, other = _mesh((4,)), _mesh((2, 2))
    x = distribute_tensor(_x((8, 8, 2), 1), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="to_x0: all DTensors must be on one mesh"):
        df.to_x0(x, distribute_tensor(_x((8, 8, 2), 1), other, [Shard(0), Shard(1)]), S[3])
    local = torch.ones(1 + 2 * (mesh.get_local_rank() % 2), 2)
    uneven = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((8, 2)), stride=(2, 1))
    with pytest.raises(NotImplementedError, match="add_noise: a DTensor must be cut as distribute_tensor cuts it"):
        df.add_noise(uneven, NOISE, S[3])
    with pytest.raises(NotImplementedError, match="contraction: "):
        df.contraction(lambda x: x, x, NOISE)


def _frames() -> None:
    """Levels of several dimensions: sharded by samples."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = _mesh((4,))
    x, t = _x((8, 4, 6), 1, torch.float32), torch.arange(32).reshape(8, 4)
    part = distribute_tensor(x, mesh, [Shard(0)])
    assert torch.equal(df.add_noise(part, NOISE, S[t]).full_tensor(), df.add_noise(x, NOISE, S[t]))
    loss = df.denoising_loss(part, part, NOISE, S[t], predict="v")
    torch.testing.assert_close(loss.full_tensor(), df.denoising_loss(x, x, NOISE, S[t], predict="v"))
    cut_frames = distribute_tensor(x, mesh, [Shard(1)])
    for call in (lambda: df.add_noise(cut_frames, NOISE, S[t]), lambda: df.noise_mse(cut_frames, NOISE, level=S[t])):
        with pytest.raises(NotImplementedError, match="levels of 2 dimensions need samples that are whole"):
            call()


def _beside() -> None:
    """What is made of levels and losses."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = _mesh((4,))
    t, losses = torch.arange(8) % 5, _per_sample((8,), 1)
    cut_t, cut_losses = (distribute_tensor(v, mesh, [Shard(0)]) for v in (t, losses))
    assert torch.equal(df.timestep_embedding(cut_t, 7).full_tensor(), df.timestep_embedding(t, 7))
    embedded = df.fourier_embedding(cut_losses, NOISE, 8).full_tensor()
    assert torch.equal(embedded, df.fourier_embedding(losses, NOISE, 8))
    found, expected = df.LevelStatistics(5), df.LevelStatistics(5)
    found.update(cut_t, cut_losses)
    expected.update(t, losses)
    assert torch.equal(found.mean, expected.mean)
    x = _x((8, 3), 1, torch.float32)
    cut_x = distribute_tensor(x.clone(), mesh, [Shard(0)])
    assert df.add_noise(cut_x, NOISE, S[cut_t], out=cut_x) is cut_x
    assert torch.equal(cut_x.full_tensor(), df.add_noise(x, NOISE, S[t]))
    for shape, dim in (((8, 3), 0), ((5, 8), 0), ((5, 8), 1)):
        whole = _x(shape, 1, torch.float32).requires_grad_()
        part = distribute_tensor(whole.detach(), mesh, [Shard(dim)]).requires_grad_()
        for reduction in ("mean", "sum"):
            df.noise_mse(part, NOISE, reduction=reduction).backward()
            df.noise_mse(whole, NOISE, reduction=reduction).backward()
        assert part.grad.placements == part.placements
        torch.testing.assert_close(part.grad.full_tensor(), whole.grad)


def _compiled() -> None:
    """Whole graphs, the noise of a key in memory."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = _mesh((4,))
    x, key = _x((8, 4), 1, torch.float32), torch.tensor([3, 0])
    part = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    run = torch.compile(lambda x, key: df.noise_mse(x, df.Noise(key)), backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(run(part, key).full_tensor(), part)
    leaf = x.requires_grad_()
    (expected,) = torch.autograd.grad(df.noise_mse(leaf, df.Noise(key)), leaf)
    torch.testing.assert_close(grad.full_tensor(), expected)


def _run(case: str) -> None:
    if case not in LAYOUTS:
        OTHERS[case]()
        return
    _bits(case)
    for name in OPS if case in ALL_OPS else SOME_OPS:
        _check(name, case, SHAPE, torch.float64)
    for name in SOME_OPS if case in ALL_OPS else ():
        _check(name, case, SHAPE, torch.float32)
        for shape in OTHER_SHAPES.values():
            if all(c == "R" or c < len(shape) for c in LAYOUTS[case][1]):
                _check(name, case, shape, torch.float64)


OTHERS = {"refused": _refused, "frames": _frames, "beside": _beside, "compiled": _compiled}
CASES = (*LAYOUTS, *OTHERS)


@cache
def _failures(folder: Path) -> dict[str, str]:
    """What each case said in the world of four, which are started once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.test_dtensor", str(folder)]
    subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], timeout=600)
    return {path.name: path.read_text() for path in folder.glob("*")}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _failures(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("case", CASES)
def test_dtensors(case: str, failures: dict[str, str]) -> None:
    said = {name: text for name, text in failures.items() if name.startswith(f"{case},")}
    assert len(said) == 4, "a process ended early"
    assert not any(said.values()), "\n".join(text for text in said.values() if text)


def test_import_leaves_distributed_alone() -> None:
    code = "import sys, dae_fast; assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def _world(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/../store", 4)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=4)
    for case in CASES:
        said = ""
        try:
            _run(case)
        except BaseException:
            said = traceback.format_exc()
        Path(folder, f"{case}, {rank}").write_text(said)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import torch.distributed.tensor

    in_processes(partial(_world, sys.argv[1], rank) for rank in range(4))
