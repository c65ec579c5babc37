"""The rest of what a torch citizen does: autograd's fine print, modes, subclasses, copies, threads and forks."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import dae_fast as df
from benchmarks.cases import CASES, SCHEDULE, Case, Inputs

NOISE = df.Noise(5).fold_in(2)
SHAPE = (3, 4, 5)

cases = pytest.mark.parametrize("case", CASES, ids=str)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def with_leaves(case: Case, inputs: Inputs) -> Inputs:
    return {**inputs, **{n: inputs[n].detach().clone().requires_grad_() for n in case.grads}}


def losses_by_reduction(pred: Tensor) -> list[Tensor]:
    """Each way a loss makes its gradient: at once, or in backward."""
    weight = torch.linspace(0.5, 2, pred.shape[0])
    return [
        df.noise_mse(pred, NOISE),
        df.noise_mse(pred, NOISE, weight=weight),
        df.noise_mse(pred, NOISE, reduction="sum"),
        df.noise_mse(pred, NOISE, weight=weight.clone().requires_grad_()),
        df.noise_mse(pred, NOISE, reduction="none").mean(),
    ]


class TestAutograd:
    @cases
    def test_no_graph_unless_wanted(self, case: Case) -> None:
        inputs = case.inputs(SHAPE, torch.float32)
        assert not any(o.requires_grad for o in outputs(case.ours(inputs)))
        leaves = with_leaves(case, inputs)
        with torch.no_grad():
            quiet = outputs(case.ours(leaves))
        assert not any(o.requires_grad for o in quiet)
        loud = outputs(case.ours(leaves))
        assert all(o.requires_grad and o.grad_fn is not None for o in loud)
        for a, b in zip(loud, quiet, strict=True):
            torch.testing.assert_close(a, b)

    @cases
    def test_some_gradients(self, case: Case) -> None:
        """Each input alone has the gradient that it has among the others."""
        inputs = case.inputs(SHAPE, torch.float32)
        leaves = with_leaves(case, inputs)
        total = sum(o.square().sum() for o in outputs(case.ours(leaves)))
        want = torch.autograd.grad(total, [leaves[n] for n in case.grads])
        for name, gradient in zip(case.grads, want, strict=True):
            one = {**inputs, name: inputs[name].clone().requires_grad_()}
            total = sum(o.square().sum() for o in outputs(case.ours(one)))
            (got,) = torch.autograd.grad(total, one[name])
            torch.testing.assert_close(got, gradient)

    @cases
    def test_expanded_upstream_gradient(self, case: Case) -> None:
        """sum().backward() hands down a gradient of stride 0; one output of two may have none at all."""
        leaves = with_leaves(case, case.inputs(SHAPE, torch.float32))
        for output in outputs(case.ours(leaves)):
            values = [leaves[n] for n in case.grads]
            got = torch.autograd.grad(output.sum(), values, retain_graph=True)
            want = torch.autograd.grad(output, values, torch.ones_like(output), retain_graph=True)
            for g, w in zip(got, want, strict=True):
                assert torch.equal(g, w)
                assert g.any() or case.name == "underdamped_step"  # its v is no function of x

    @pytest.mark.parametrize("way", range(5))
    def test_backward_twice(self, way: int) -> None:
        pred = torch.randn(SHAPE, requires_grad=True)
        loss = losses_by_reduction(pred)[way]
        first, second = (torch.autograd.grad(loss, pred, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()
        (third,) = torch.autograd.grad(loss, pred)
        assert torch.equal(first, third)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, pred)

    @pytest.mark.parametrize("way", range(5))
    def test_upstream_gradient(self, way: int) -> None:
        pred = torch.randn(SHAPE, requires_grad=True)
        (once,) = torch.autograd.grad(losses_by_reduction(pred)[way], pred)
        (scaled,) = torch.autograd.grad(losses_by_reduction(pred)[way], pred, torch.tensor(-3.0))
        assert once.any()
        torch.testing.assert_close(scaled, -3 * once)

    @pytest.mark.parametrize("way", range(5))
    def test_accumulates(self, way: int) -> None:
        pred = torch.randn(SHAPE, requires_grad=True)
        (want,) = torch.autograd.grad(losses_by_reduction(pred)[way], pred)
        pred.grad = torch.ones_like(pred)
        kept = pred.grad
        losses_by_reduction(pred)[way].backward()
        assert pred.grad is kept
        torch.testing.assert_close(kept, 1 + want)
        # The first gradient becomes .grad itself: a second loss must not write into it twice.
        pred.grad = None
        loss = losses_by_reduction(pred)[way]
        loss.backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(pred.grad, 2 * want)

    @pytest.mark.parametrize("way", range(5))
    def test_create_graph(self, way: int) -> None:
        pred = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
        loss = losses_by_reduction(pred)[way]
        (plain,) = torch.autograd.grad(loss, pred, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, pred, create_graph=True)
        torch.testing.assert_close(gradient, plain)
        (second,) = torch.autograd.grad(gradient.square().sum(), pred)
        per_row = (gradient / (pred - NOISE.normal(SHAPE, dtype=torch.float64))).detach()
        torch.testing.assert_close(second, 2 * gradient.detach() * per_row)

    def test_hooks(self) -> None:
        seen: list[Tensor] = []
        leaf = torch.randn(SHAPE, requires_grad=True)
        pred = leaf * 2
        pred.register_hook(seen.append)
        leaf.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad))
        df.noise_mse(pred, NOISE).backward()
        torch.testing.assert_close(seen[1], 2 * seen[0])

    def test_saved_tensors_pass_through_hooks(self) -> None:
        """What backward reads is saved where offloading and checkpointing can see it."""
        names: list[tuple[int, ...]] = []

        def pack(t: Tensor) -> Tensor:
            names.append(tuple(t.shape))
            return t.clone()

        x = torch.randn(SHAPE, requires_grad=True)
        z = torch.randn(SHAPE, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = df.noise_mse(x, z, reduction="none")
        assert names.count(SHAPE) == 2
        loss.sum().backward()
        torch.testing.assert_close(x.grad, 2 * (x - z).detach() / 20)

    @pytest.mark.parametrize("scale", [1.0, 2.0**16])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_loss_scale_reaches_the_gradient_before_rounding(self, scale: float, weighted: bool) -> None:
        """fp16: a gradient of 1e-8 is lost, 2**16 times it is not."""
        wide = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
        pred = wide.half().requires_grad_()
        weight = torch.full((64,), 0.1) if weighted else None
        df.noise_mse(pred, NOISE, weight=weight).mul(scale).backward()
        double = pred.detach().double().requires_grad_()
        df.noise_mse(double, NOISE, weight=weight).mul(scale).backward()
        assert pred.grad is not None and double.grad is not None
        torch.testing.assert_close(pred.grad.double(), double.grad, rtol=2e-3, atol=6e-8)
        if scale > 1:
            assert (pred.grad != 0).float().mean() > 0.999

    @pytest.mark.parametrize(
        ("op", "changed"),
        [
            (lambda x, z: df.noise_mse(x, z, reduction="none").sum(), 0),
            (lambda x, z: df.noise_mse(x, z, reduction="none").sum(), 1),
            (lambda x, z: df.noise_mse(x, z.detach()), 0),
            (lambda x, z: df.add_noise(x, NOISE, df.Level(1.0, z[:, 0, 0].abs())).sum(), 0),
        ],
    )
    def test_input_changed_before_backward(self, op: Callable[..., Tensor], changed: int) -> None:
        leaves = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE, requires_grad=True)
        x, z = (t * 1 for t in leaves)
        loss = op(x, z)
        (x, z)[changed].detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=True)
            loss.backward()  # the loss made at once needs its input from the second time on

    def test_inputs_not_read_may_change(self) -> None:
        x = torch.randn(SHAPE, requires_grad=True)
        middle = x * 1
        y = df.add_noise(middle, NOISE, df.Level(0.5, 0.5))
        middle.detach().zero_()
        y.sum().backward()
        assert torch.equal(x.grad, torch.full(SHAPE, 0.5))

    def test_out_bumps_the_version(self) -> None:
        x = torch.randn(SHAPE)
        w = torch.randn(SHAPE, requires_grad=True)
        y = w * x  # saves x
        before = x._version
        df.langevin_step(x, torch.zeros_like(x), 0.1, NOISE, out=x)
        assert x._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_out_wants_no_gradient(self) -> None:
        x = torch.randn(SHAPE)
        with pytest.raises(ValueError, match=r"out= has no gradient; call it under torch\.no_grad\(\) or without out"):
            df.langevin_step(x, torch.zeros(SHAPE, requires_grad=True), 0.1, NOISE, out=x)

    def test_parameters(self) -> None:
        p = torch.nn.Parameter(torch.randn(SHAPE))
        df.noise_mse(df.add_noise(p, NOISE, SCHEDULE[torch.arange(3)]), NOISE).backward()
        assert type(df.add_noise(p, NOISE, SCHEDULE[3])) is Tensor
        assert p.grad is not None and p.grad.any()

    def test_zero_samples(self) -> None:
        x = torch.zeros(0, 4, requires_grad=True)
        y = df.add_noise(x, NOISE, SCHEDULE[torch.zeros(0, dtype=torch.int64)])
        loss = df.noise_mse(y, NOISE, reduction="sum")
        loss.backward()
        assert loss == 0
        assert x.grad is not None and x.grad.shape == (0, 4)


class TestCheckpoint:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_same_noise_when_recomputed(self, use_reentrant: bool) -> None:
        """Without the random state of any generator, which a key has no part in."""
        layer = torch.nn.Linear(5, 5)
        x = torch.randn(3, 5, requires_grad=True)
        drawn: list[Tensor] = []

        def block(x: Tensor) -> Tensor:
            y = df.add_noise(x, NOISE, SCHEDULE[torch.arange(3)])
            drawn.append(y.detach())
            return layer(y).tanh()

        results = []
        for f in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant, preserve_rng_state=False)):
            loss = df.noise_mse(f(x), NOISE)
            loss.backward()
            results.append((loss.detach(), x.grad, layer.weight.grad))
            x.grad = layer.weight.grad = None
        assert len(drawn) == 3
        assert torch.equal(drawn[1], drawn[2])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


class TestInference:
    @cases
    def test_inference_mode(self, case: Case) -> None:
        inputs = case.inputs(SHAPE, torch.float32)
        want = outputs(case.ours(inputs))
        with torch.inference_mode():
            fresh = case.inputs(SHAPE, torch.float32)
            for i in (inputs, fresh):
                got = outputs(case.ours(i))
                assert all(o.is_inference() for o in got)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def test_in_place(self) -> None:
        x = torch.randn(SHAPE)
        want = df.langevin_step(x, x.sin(), 0.1, NOISE)
        with torch.inference_mode():
            y = x.clone()
            df.langevin_step(y, y.sin(), 0.1, NOISE, out=y)
            df.langevin_step(x, x.sin(), 0.1, NOISE, out=x)
        assert torch.equal(y, want)
        assert torch.equal(x, want)

    def test_tables_made_there_can_be_differentiated(self) -> None:
        """A cached inference tensor could never be saved for backward."""
        schedule = df.Schedule.linear(7)
        sigma = 0.123456
        with torch.inference_mode():
            df.add_noise(torch.zeros(SHAPE), NOISE, schedule[torch.arange(3)])
            df.add_noise(torch.zeros(SHAPE), NOISE, df.Level(1.0, sigma))
        x = torch.zeros(SHAPE, requires_grad=True)
        df.add_noise(x, NOISE, schedule[torch.arange(3)]).sum().backward()
        df.add_noise(x, NOISE, df.Level(1.0, sigma)).sum().backward()


def test_autocast() -> None:
    """Ops compute in fp32 whatever autocast is on, and promote like torch: a bf16 prediction works with fp32 data."""
    layer = torch.nn.Linear(5, 5)
    x0 = torch.randn(3, 5)
    eps = torch.randn(3, 5)
    level = SCHEDULE[torch.arange(3)]
    with torch.autocast("cpu", torch.bfloat16):
        x_t = df.add_noise(x0, NOISE, level)
        pred = layer(x_t)
        assert (x_t.dtype, pred.dtype) == (torch.float32, torch.bfloat16)
        fresh, stored = df.noise_mse(pred, NOISE), df.noise_mse(pred, eps)
        x0_hat = df.to_x0(x_t, pred, level)
        objective = df.nn.DenoisingLoss(SCHEDULE, "v")(lambda x, t: layer(x), x0, NOISE)["loss"]
    assert torch.equal(x_t, df.add_noise(x0, NOISE, level))
    assert fresh.dtype == stored.dtype == x0_hat.dtype == objective.dtype == torch.float32
    assert torch.equal(x0_hat, df.to_x0(x_t, pred.float(), level))
    torch.testing.assert_close(stored, torch.nn.functional.mse_loss(pred.float(), eps))
    (fresh + stored + objective).backward()
    assert layer.weight.grad is not None and layer.weight.grad.any()


class TestShapesOnly:
    @cases
    @pytest.mark.parametrize("kind", ["fake", "meta"])
    def test_shapes_strides_dtypes(self, case: Case, kind: str) -> None:
        """As the real ones', also of the gradients, and nothing is computed."""
        inputs = case.inputs((3, 4, 5, 2), torch.bfloat16)
        for name in case.tensors:
            inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last)
        real = outputs(case.ours(with_leaves(case, inputs)))
        if kind == "meta":
            unreal = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
            unreal["level"] = SCHEDULE[unreal["t"]]
            self.compare(case, unreal, real, lambda t: t.is_meta)
        else:
            with FakeTensorMode() as mode:
                unreal = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
                unreal["level"] = SCHEDULE[unreal["t"]]
                self.compare(case, unreal, real, lambda t: isinstance(t, FakeTensor))

    @staticmethod
    def compare(case: Case, inputs: Inputs, real: tuple[Tensor, ...], unreal: Callable[[Tensor], bool]) -> None:
        leaves = with_leaves(case, inputs)
        got = outputs(case.ours(leaves))
        for a, b in zip(got, real, strict=True):
            assert unreal(a)
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        for name, g in zip(
            case.grads, torch.autograd.grad([o.sum() for o in got], [leaves[n] for n in case.grads]), strict=True
        ):
            assert unreal(g)
            assert (g.shape, g.dtype) == (leaves[name].shape, leaves[name].dtype)

    def test_caches_stay_real(self) -> None:
        schedule = df.Schedule.linear(7)
        level = df.Level(0.25, 0.123)
        with FakeTensorMode():
            assert isinstance(df.add_noise(torch.empty(SHAPE), NOISE, level), FakeTensor)
            df.add_noise(torch.empty(SHAPE), NOISE, schedule[torch.empty(3, dtype=torch.int64)])
        assert type(df.add_noise(torch.zeros(SHAPE), NOISE, level)) is Tensor
        assert type(df.add_noise(torch.zeros(SHAPE), NOISE, schedule[torch.arange(3)])) is Tensor

    def test_noise(self) -> None:
        with FakeTensorMode():
            key = torch.empty(2, dtype=torch.int64)
            assert df.Noise(key).fold_in(3).normal((3, 4), dtype=torch.float16).shape == (3, 4)
            assert df.Noise(3).bits((3, 4)).dtype == torch.int64


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@cases
def test_dispatch_mode_sees_the_ops(case: Case) -> None:
    inputs = case.inputs(SHAPE, torch.float32)
    with Recorder() as recorder:
        got = outputs(case.ours(with_leaves(case, inputs)))
    assert any(n.startswith("dae_fast.") for n in recorder.names)
    for a, b in zip(got, outputs(case.ours(inputs)), strict=True):
        torch.testing.assert_close(a.detach(), b)


class Wrapped(Tensor):
    """A wrapper without storage of its own: a kernel that read its address would read nothing."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        unwrap = torch.utils._pytree.tree_map_only
        result = func(*unwrap(Wrapped, lambda t: t.inner, args), **unwrap(Wrapped, lambda t: t.inner, kwargs))
        return return_and_correct_aliasing(func, args, kwargs, unwrap(Tensor, Wrapped, result))


class Named(Tensor):
    """A subclass with memory and the default __torch_function__."""


@cases
@pytest.mark.parametrize("which", ["all", "last"])
def test_wrapper_subclass(case: Case, which: str) -> None:
    inputs = case.inputs(SHAPE, torch.float32)
    names = case.tensors if which == "all" else case.tensors[-1:]
    got = outputs(case.ours({**inputs, **{n: Wrapped(inputs[n]) for n in names}}))
    for a, b in zip(got, outputs(case.ours(inputs)), strict=True):
        assert isinstance(a, Wrapped) or which == "last"
        torch.testing.assert_close(a.inner if isinstance(a, Wrapped) else a, b)


@cases
def test_subclass_with_memory(case: Case) -> None:
    inputs = case.inputs(SHAPE, torch.float32)
    leaves = with_leaves(case, inputs)
    got = outputs(case.ours({**leaves, **{n: leaves[n].as_subclass(Named) for n in case.tensors}}))
    for a, b in zip(got, outputs(case.ours(inputs)), strict=True):
        torch.testing.assert_close(a.detach().as_subclass(Tensor), b)
    torch.stack([o.sum() for o in got]).sum().backward()
    assert all(leaves[n].grad is not None for n in case.grads)


def copied(value: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(value)
    if how == "pickle":
        return pickle.loads(pickle.dumps(value))
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
class TestCopies:
    @pytest.mark.parametrize(
        "noise",
        [NOISE, NOISE.to("cpu"), df.Noise(2**64 - 1, sample=torch.tensor([4, 1, 9])), df.Noise(3, first_sample=7)],
    )
    def test_noise(self, noise: df.Noise, how: str) -> None:
        assert torch.equal(copied(noise, how).normal((3, 4)), noise.normal((3, 4)))

    @pytest.mark.parametrize(
        "level",
        [SCHEDULE[torch.arange(3)], SCHEDULE[5], df.Level(0.5, 0.25), df.Level(torch.tensor(0.5), torch.rand(3))],
    )
    def test_level(self, level: df.Level, how: str) -> None:
        x = torch.randn(SHAPE)
        assert torch.equal(df.add_noise(x, NOISE, copied(level, how)), df.add_noise(x, NOISE, level))

    def test_loss(self, how: str) -> None:
        loss = df.nn.DenoisingLoss(df.Schedule.cosine(20), "v", level_weight=torch.rand(20))
        x0 = torch.randn(SHAPE)
        other = copied(loss, how)
        assert other(lambda x, t: x, x0, NOISE)["loss"] == loss(lambda x, t: x, x0, NOISE)["loss"]
        assert other.level_weight is not loss.level_weight


def test_loss_module_state() -> None:
    loss = df.nn.DenoisingLoss(df.Schedule.cosine(20), level_weight=torch.rand(20))
    assert list(loss.state_dict()) == ["level_weight"]
    other = df.nn.DenoisingLoss(df.Schedule.cosine(20), level_weight=torch.zeros(20))
    other.load_state_dict(loss.state_dict())
    x0 = torch.randn(SHAPE)
    want = loss(lambda x, t: x, x0, NOISE)["loss"]
    assert other(lambda x, t: x, x0, NOISE)["loss"] == want
    double = other.to(torch.float64)(lambda x, t: x, x0.double(), NOISE)["loss"]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), want)
    meta = other.to("meta")(lambda x, t: x, x0.to("meta"), NOISE)["loss"]
    assert meta.is_meta


def work(seed: int) -> tuple[Tensor, Tensor]:
    """Large enough for more than one thread; forward and backward."""
    x = torch.linspace(-1, 1, 40 * 5000).reshape(40, 5000).requires_grad_()
    noise = df.Noise(seed)
    loss = df.noise_mse(df.add_noise(x, noise, SCHEDULE[torch.arange(40)]), noise.fold_in(1))
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def test_number_of_threads_changes_no_bit(restore_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(work(1))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_concurrent_threads() -> None:
    want = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(work, list(range(4)) * 3))
    for k, results in enumerate(got):
        for a, b in zip(results, want[k % 4], strict=True):
            assert torch.equal(a, b)


def _in_child(results: Any) -> None:
    torch.set_num_threads(1)  # as a DataLoader's worker does
    results.put([t.tolist() for t in (work(1)[0], work(2)[0])])


def test_fork() -> None:
    """A child of a process whose OpenMP threads have run must not wait for them."""
    want = [work(seed)[0].tolist() for seed in (1, 2)]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_child, args=(results,))
    child.start()
    try:
        assert results.get(timeout=60) == want
    finally:
        child.join(10)
        child.kill()


class Noised(Dataset[Tensor]):
    """Sample i noised under its own id."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        noise = df.Noise(7, first_sample=i)
        return df.add_noise(torch.full((1, 9), float(i)), noise, SCHEDULE[100])[0]


def test_data_loader_workers() -> None:
    """A sample's noise is that of the whole batch made at once."""
    loader = DataLoader(Noised(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    x0 = torch.arange(6.0)[:, None].expand(6, 9)
    assert torch.equal(torch.cat(list(loader)), df.add_noise(x0, df.Noise(7), SCHEDULE[100]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_device(device: str, backend: str) -> None:
    """It governs nothing here: schedules and host keys live on the CPU, ops run where their tensors are."""

    def draw(x: Tensor) -> list[Tensor]:
        schedule = df.Schedule.linear(9)
        pred = x.detach().clone().requires_grad_()
        loss = df.noise_mse(pred, NOISE, weight=x[:, 0, 0].abs())
        return [
            df.add_noise(x, NOISE, schedule[t]),
            df.add_noise(x, df.Noise(3).fold_in(t[0]), df.Level(1.0, 0.4321)),
            df.langevin_step(x, x, x[:, 0, 0].abs(), NOISE),
            df.nn.DenoisingLoss(schedule)(lambda x, t: x, x, NOISE)["loss"],
            NOISE.normal((3, 4)),
            NOISE.bits((3, 4)),
            *torch.autograd.grad(loss, pred),
        ]

    x, t = torch.randn(SHAPE), torch.tensor([5, 1, 8])
    want = draw(x)
    with torch.device(device):
        got = draw(x)
        assert df.Schedule.linear(9).betas.device.type == "cpu"
        for other in (df.Schedule.scaled_linear(9), df.Schedule.cosine(9), df.Schedule.geometric()):
            assert other.alpha.device.type == other.sigma.device.type == "cpu"
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_negated_views(backend: str) -> None:
    """The imaginary part of a conjugate: torch negates it when it is read."""
    x0 = torch.randn(6, 8, dtype=torch.complex64).conj().imag
    assert x0.is_neg()
    noise, level = df.Noise(0), df.Level(0.6, 0.8)
    dense = x0.clone()
    for a, b in ((x0, dense), (x0.contiguous(), dense)):
        assert torch.equal(df.add_noise(a, noise, level), df.add_noise(b, noise, level))
        assert torch.equal(df.add_noise(dense, a, level), df.add_noise(dense, b, level))
        assert torch.equal(df.langevin_step(a, b, 0.1, noise), df.langevin_step(b, b, 0.1, noise))


def test_indices_keys_and_ids_of_inference_mode_can_be_trained_with() -> None:
    """As those of plain indexing."""
    with torch.inference_mode():
        t, ids, key = torch.tensor([3, 9]), torch.tensor([4, 5]), torch.tensor([1, 2])
    p = torch.randn(2, 4, requires_grad=True)
    schedule, noise = df.Schedule.linear(20), df.Noise(key, sample=ids)
    (found,) = torch.autograd.grad(df.denoising_loss(p, p.detach(), noise, schedule[t], predict="v"), p)
    eps = df.Noise((1, 2), sample=torch.tensor([4, 5])).normal((2, 4), dtype=torch.float64)
    alpha, sigma = (v[[3, 9], None] for v in (schedule.alpha, schedule.sigma))
    right = 2 / p.numel() * (p.double() - alpha * eps + sigma * p.double())
    torch.testing.assert_close(found.double(), right.detach(), rtol=1e-5, atol=1e-6)
    for made in (
        df.corrupt(p, df.Masking(0.3, noise)),
        df.reparameterise(p, p, noise)[0],
        df.add_noise(p, noise, schedule[t]),
    ):
        made.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ids_of_a_mask_changed_before_backward_raise(reduction: str) -> None:
    """Its words are drawn again in backward: they would be others."""
    ids, p = torch.tensor([4, 5]), torch.randn(2, 6, requires_grad=True)
    mask = df.Masking(0.4, df.Noise(3, sample=ids))
    loss = df.noise_mse(p, df.Noise(1), mask=mask, reduction=reduction).sum() / 3
    ids += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
