"""torch.compile and torch.export: the same values as eager, the native kernels in the graph, few compilations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import dae_fast as df
from benchmarks.cases import CASES, SCHEDULE, Case, Inputs

from .conftest import not_in_torch_2_11, some_longer

SHAPE = (3, 4, 5)
PREDICTIONS = ("eps", "x0", "v", "score", "flow")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A backend that counts its compilations and keeps the names of the ops it was given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.counter = CompileCounterWithBackend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return self.counter(graph, inputs)

    @property
    def compilations(self) -> int:
        return self.counter.frame_count

    @property
    def ops(self) -> set[str]:
        """Those of this library."""
        nodes = (n for g in self.counter.graphs for n in g.graph.nodes if n.op == "call_function")
        names = (str(n.target) for n in nodes)
        return {n.removeprefix("dae_fast.") for n in names if n.startswith("dae_fast.")}

    def compile(self, f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return torch.compile(f, fullgraph=True, backend=self, **options)


def leaves(inputs: Inputs) -> Inputs:
    return {
        k: v.detach().clone().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v
        for k, v in inputs.items()
    }


def outputs_and_gradients(
    f: Callable[[Inputs], Any], case: Case, inputs: Inputs
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    inputs = leaves(inputs)
    result = f(inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    torch.autograd.backward([o.square().sum() for o in outputs])
    return tuple(o.detach() for o in outputs), [inputs[n].grad for n in case.grads]


def assert_equal_to_eager(case: Case, compiled: Callable[[Inputs], Any], inputs: Inputs) -> None:
    want, want_grads = outputs_and_gradients(case.ours, case, inputs)
    got, grads = outputs_and_gradients(compiled, case, inputs)
    for a, b in zip(got, want, strict=True):
        if a.dim():
            assert torch.equal(a, b)
        else:  # the sum over the batch is torch's own when compiled
            torch.testing.assert_close(a, b)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradient_equal_eager(case: Case) -> None:
    """In one graph, which holds the native kernels."""
    recorder = Recorder()
    assert_equal_to_eager(case, recorder.compile(case.ours), case.inputs(SHAPE, torch.float32))
    made_by = {"fill"} if case.launches == "normal" else {"affine", "affine2", "sample_means", "corrupt", "gaussian"}
    assert recorder.ops & made_by


@pytest.mark.parametrize("name", ["add_noise-fresh", "noise_mse-mask", "langevin_step-per-sample"])
def test_inductor(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    assert_equal_to_eager(case, torch.compile(case.ours, fullgraph=True), case.inputs(SHAPE, torch.bfloat16))


DYNAMIC = [
    *CASES[:1],
    *CASES[3:4],
    pytest.param(CASES[-1], marks=not_in_torch_2_11("a second compilation, for the second batch size")),
]


@pytest.mark.parametrize("case", DYNAMIC, ids=str)
def test_dynamic_batch(case: Case) -> None:
    recorder = Recorder()
    compiled = recorder.compile(case.ours, dynamic=True)
    for B in (3, 5, 8, 13):
        assert_equal_to_eager(case, compiled, case.inputs((B, 6), torch.float32))
    assert recorder.compilations == 1


def train_step(x0: Tensor, noise: df.Noise, t: Tensor) -> Tensor:
    level = SCHEDULE[t]
    x_t = df.add_noise(x0, noise, level)
    return df.noise_mse(x_t.tanh(), noise, level=level)


HOST = df.Noise(2**63 + 11)
IN_MEMORY = HOST.to("cpu")
STEPS: dict[str, tuple[Callable[..., Tensor], Callable[[int], Any]]] = {
    "host key as an argument": (train_step, lambda k: HOST.fold_in(k)),
    "host key folded inside": (lambda x, k, t: train_step(x, HOST.fold_in(k), t), lambda k: k),
    "host key made inside": (lambda x, k, t: train_step(x, df.Noise(seed=k).fold_in(3), t), lambda k: k),
    "first sample": (lambda x, k, t: train_step(x, df.Noise(1, first_sample=k), t), lambda k: 1000 * k),
    "sample ids": (lambda x, k, t: train_step(x, df.Noise(1, sample=k), t), lambda k: torch.arange(4) + 4 * k),
    "key in memory folded inside": (lambda x, k, t: train_step(x, IN_MEMORY.fold_in(k), t), torch.tensor),
    "key in memory as an argument": (train_step, lambda k: IN_MEMORY.fold_in(torch.tensor(k))),
    "key tensor": (lambda x, k, t: train_step(x, df.Noise(k), t), lambda k: torch.tensor([k, -k])),
}


@pytest.mark.parametrize("first", some_longer([0, -3, 2**40], [0]))
@pytest.mark.parametrize("name", STEPS)
def test_new_keys_do_not_recompile(name: str, first: int) -> None:
    """Two compilations at most: the second makes a host key's ints inputs of the graph."""
    step, argument = STEPS[name]
    recorder = Recorder()
    compiled = recorder.compile(step)
    g = torch.Generator().manual_seed(0)
    for k in range(first, first + 6):
        x0 = torch.randn(4, 5, generator=g).requires_grad_()
        t = torch.randint(1000, (4,), generator=g)
        results = []
        for f in (step, compiled):
            loss = f(x0, argument(k), t)
            results.append((loss.detach(), *torch.autograd.grad(loss, x0)))
        torch.testing.assert_close(*results)
    in_memory = "memory" in name or "tensor" in name or "ids" in name
    assert recorder.compilations <= (1 if in_memory else 2)


def test_fold_in_is_one_op() -> None:
    """Not the hundreds of the formula."""
    recorder = Recorder()
    compiled = recorder.compile(lambda key, step: df.Noise(key).fold_in(step).fold_in(4).key)
    key, step = torch.tensor([5, 6]), torch.tensor(-7)
    assert torch.equal(compiled(key, step), df.Noise(key).fold_in(step).fold_in(4).key)
    assert recorder.ops == {"fold_in"}
    assert recorder.counter.op_count < 10


@pytest.mark.parametrize("integer", [0, 3, -1, 2**62, 2**63, 2**64 - 1, 2**70 + 5])
def test_host_integers_of_any_size(integer: int) -> None:
    """Seeds and steps are taken modulo 2**64, as in eager."""

    def draw(x: Tensor, k: int) -> Tensor:
        return df.add_noise(x, df.Noise(k).fold_in(k), df.Level(1.0, 0.5))

    x = torch.zeros(2, 3)
    assert torch.equal(Recorder().compile(draw)(x, integer), draw(x, integer))


def test_normal_and_bits() -> None:
    recorder = Recorder()

    def draw(x: Tensor, noise: df.Noise) -> tuple[Tensor, Tensor]:
        return noise.normal(x.shape, dtype=torch.float64), noise.fold_in(1).bits(x.shape)

    x = torch.empty(3, 7)
    for got, want in zip(recorder.compile(draw)(x, HOST), draw(x, HOST), strict=True):
        assert torch.equal(got, want)
    assert recorder.ops == {"fill", "fold_in"}


class TestSchedule:
    def test_tables_not_made_before(self) -> None:
        """The first, compiled, call makes them, plain tensors, and eager calls go on from there."""
        schedule = df.Schedule.linear(100)

        def f(x: Tensor, t: Tensor) -> Tensor:
            return df.to_x0(x, df.to_score(x, x, schedule[t]), schedule[t], predict="score")

        x, t = torch.randn(4, 3), torch.tensor([1, 5, 99, 0])
        recorder = Recorder()
        compiled = recorder.compile(f)
        got = compiled(x, t)
        assert schedule._tables
        assert all(type(table) is Tensor for table in schedule._tables.values())
        assert torch.equal(got, f(x, t))
        df.add_noise(x, HOST, schedule[t])  # one table more
        assert torch.equal(compiled(x + 1, t), f(x + 1, t))
        assert recorder.compilations == 1

    def test_another_schedule_is_another_table(self) -> None:
        def f(x: Tensor, t: Tensor, schedule: df.Schedule) -> Tensor:
            return df.add_noise(x, HOST, schedule[t])

        x, t = torch.randn(4, 3), torch.tensor([1, 5, 9, 0])
        recorder = Recorder()
        compiled = recorder.compile(f)
        schedules = df.Schedule.linear(10), df.Schedule.cosine(10)
        for schedule in schedules * 2:
            assert torch.equal(compiled(x, t, schedule), f(x, t, schedule))
        assert recorder.compilations == 2

    def test_level_as_an_argument(self) -> None:
        def f(x: Tensor, level: df.Level) -> Tensor:
            return df.add_noise(x, HOST, level)

        x = torch.randn(4, 3)
        compiled = Recorder().compile(f)
        for level in (SCHEDULE[torch.arange(4)], SCHEDULE[torch.arange(4) + 9]):
            assert torch.equal(compiled(x, level), f(x, level))

    def test_integer_level(self) -> None:
        def f(x: Tensor, t: int) -> Tensor:
            return df.add_noise(x, HOST, SCHEDULE[t])

        x = torch.randn(4, 3)
        recorder = Recorder()
        compiled = recorder.compile(f)
        for t in (0, 1, 500, 999, 30):
            assert torch.equal(compiled(x, t), f(x, t))
        assert recorder.compilations <= 2

    def test_alpha_and_sigma(self) -> None:
        def f(t: Tensor) -> tuple[Any, Any]:
            level = SCHEDULE[t]
            return level.alpha, level.sigma

        t = torch.tensor([0, 7, 999])
        for got, want in zip(Recorder().compile(f)(t), f(t), strict=True):
            assert torch.equal(got, want)

    def test_singular_level_raises_what_eager_raises(self) -> None:
        schedule = df.Schedule.linear(10).zero_terminal_snr()
        f = Recorder().compile(lambda x, t: df.to_x0(x, x, schedule[t]))
        with pytest.raises(Exception, match=r"to_x0: has no finite value at level 9 .* use predict='v'"):
            f(torch.zeros(1, 2), torch.tensor([9]))

    def test_level_out_of_range_raises(self) -> None:
        f = Recorder().compile(lambda x, t: df.add_noise(x, HOST, SCHEDULE[t]))
        with pytest.raises(ValueError, match=r"add_noise: level must be in \[0, 1000\), got 1000 for sample 1"):
            f(torch.zeros(2, 2), torch.tensor([9, 1000]))


class TestCoefficientsByHand:
    @pytest.mark.parametrize(
        "f",
        [
            lambda x, h: df.add_noise(x, HOST, df.Level(1.0, h)),
            pytest.param(
                lambda x, h: df.to_x0(x, x, df.Level(h, 1.0)),
                marks=not_in_torch_2_11("a float that divides is made a constant"),
            ),
            lambda x, h: df.langevin_step(x, x, h, HOST),
        ],
    )
    def test_floats_that_change_do_not_recompile(self, f: Callable[[Tensor, float], Tensor]) -> None:
        x = torch.randn(4, 3)
        recorder = Recorder()
        compiled = recorder.compile(f)
        for h in (0.5, 0.25, 0.75, 0.1, 1e-5):
            assert torch.equal(compiled(x, h), f(x, h))
        assert recorder.compilations <= 2

    def test_learned(self) -> None:
        def f(x: Tensor, log_sigma: Tensor) -> Tensor:
            return df.add_noise(x, HOST, df.Level(1.0, log_sigma.exp())).square().mean()

        x, log_sigma = torch.randn(4, 3), torch.randn(4).requires_grad_()
        got = torch.autograd.grad(Recorder().compile(f)(x, log_sigma), log_sigma)
        want = torch.autograd.grad(f(x, log_sigma), log_sigma)
        assert want[0].all()
        torch.testing.assert_close(got, want)


def test_langevin_in_place() -> None:
    def walk(x: Tensor, noise: df.Noise) -> Tensor:
        for k in range(3):
            df.langevin_step(x, -x, 0.1, noise.fold_in(k), out=x)
        return x

    x, compiled_x = torch.ones(4, 3), torch.ones(4, 3)
    want = walk(x, HOST)
    got = Recorder().compile(walk)(compiled_x, HOST)
    assert got is compiled_x
    assert torch.equal(got, want)


def small_net(channels: int) -> torch.nn.Module:
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(channels, channels)
            self.level = torch.nn.Embedding(50, channels)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.linear(x) + self.level(t)

    return Net()


@pytest.mark.parametrize("predict", some_longer(PREDICTIONS, ["eps", "v"]))
def test_denoising_loss(predict: str) -> None:
    """Levels drawn inside; values and the network's gradients equal to eager; no compilation for each step."""
    schedule = df.Schedule.linear(50)
    loss = df.nn.DenoisingLoss(schedule, predict, level_weight=torch.rand(50))
    nets = small_net(6), small_net(6)
    recorder = Recorder()
    compiled = recorder.compile(loss)
    x0 = torch.randn(8, 6)
    for step in range(4):
        noise = HOST.fold_in(step)
        results = loss(nets[0], x0, noise), compiled(nets[1], x0, noise)
        for r in results:
            r["loss"].backward()
        torch.testing.assert_close(*results)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad)
    assert recorder.compilations <= 2


def test_denoising_loss_inductor() -> None:
    loss = df.nn.DenoisingLoss(df.Schedule.linear(50))
    net = small_net(6)
    x0 = torch.randn(8, 6)
    want = loss(net, x0, HOST)
    got = torch.compile(loss, fullgraph=True)(net, x0, HOST)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got["loss"], list(net.parameters())),
        torch.autograd.grad(want["loss"], list(net.parameters())),
    )


@not_in_torch_2_11("refuses its own tensors inside a traced torch.func.grad")
def test_grad_inside_compile() -> None:
    """Without a registered formula this gave zeros, silently."""

    def f(pred: Tensor) -> Tensor:
        return df.noise_mse(df.add_noise(pred, HOST, SCHEDULE[torch.arange(3)]), HOST.fold_in(1))

    pred = torch.randn(3, 5)
    want = torch.func.grad(f)(pred)
    got = Recorder().compile(torch.func.grad(f))(pred)
    assert want.all()
    torch.testing.assert_close(got, want)


def test_forced_reference_has_no_native_op() -> None:
    recorder = Recorder()
    with df.use_backend("reference"):
        recorder.compile(train_step)(torch.randn(4, 5), HOST, torch.arange(4))
    assert not recorder.ops


class Objective(torch.nn.Module):
    """add_noise and noise_mse around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = df.Schedule.linear(20)
        self.layer = torch.nn.Linear(5, 5)

    def forward(self, x0: Tensor, t: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        noise = df.Noise(key)
        x_t = df.add_noise(x0, noise, self.schedule[t])
        return x_t, df.noise_mse(self.layer(x_t), noise)


class TestExport:
    @pytest.mark.parametrize("strict", [True, False])
    def test_key_is_an_input(self, strict: bool) -> None:
        model = Objective()
        t = torch.tensor([0, 5, 19])
        program = torch.export.export(model, (torch.randn(3, 5), t, torch.tensor([1, 2])), strict=strict)
        x0, key = torch.randn(3, 5), torch.tensor([-8, 9])
        for got, want in zip(program.module()(x0, t, key), model(x0, t, key), strict=True):
            torch.testing.assert_close(got, want)
        targets = {str(n.target) for n in program.graph.nodes}
        assert {"dae_fast.affine.default", "dae_fast.sample_means.default"} <= targets
        assert all(type(table) is Tensor for table in model.schedule._tables.values())

    def test_dynamic_batch_and_saving(self, tmp_path: Any) -> None:
        model = Objective()
        B = torch.export.Dim("B", min=2)
        arguments = torch.randn(3, 5), torch.tensor([0, 5, 19]), torch.tensor([1, 2])
        program = torch.export.export(model, arguments, dynamic_shapes=({0: B}, {0: B}, None))
        torch.export.save(program, tmp_path / "objective.pt2")
        loaded = torch.export.load(tmp_path / "objective.pt2").module()
        x0, t = torch.randn(7, 5), torch.arange(7)
        torch.testing.assert_close(loaded(x0, t, arguments[2]), model(x0, t, arguments[2]))

    def test_host_key_is_a_constant(self) -> None:
        class Fixed(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return df.add_noise(x, HOST.fold_in(3), df.Level(0.5, 2.0))

        x = torch.randn(3, 4)
        program = torch.export.export(Fixed(), (x,))
        assert torch.equal(program.module()(x + 1), Fixed()(x + 1))


X, Y, T = torch.rand(4, 8), torch.rand(4, 8), torch.arange(4) * 5
KEY = df.Noise(torch.tensor([1, 0]))
CHANGING: dict[str, Callable[[float], Tensor]] = {
    "corrupt": lambda v: df.corrupt(X.half(), df.Masking(0.3, KEY), value=v),
    "Masking": lambda v: df.corrupt(X, df.Masking(v, KEY)),
    "SaltAndPepper": lambda v: df.corrupt(X.double(), df.SaltAndPepper(0.5, KEY, low=v, high=2 * v, salt=v)),
    "kl_sparsity": lambda v: df.kl_sparsity(X, v),
    "EDM": lambda v: df.denoising_loss(X, Y, KEY, SCHEDULE[T], predict=df.EDM(v)),
    "EDM's target": lambda v: df.add_noise(X, KEY, SCHEDULE[T], target=df.EDM(v))[1],
    "EDM's weighting": lambda v: df.denoising_loss(X, Y, KEY, SCHEDULE[T], predict="v", weight=df.weighting.EDM(v)),
    "MinSNR": lambda v: df.denoising_loss(X, Y, KEY, SCHEDULE[T], predict="v", weight=df.weighting.MinSNR(v)),
    "P2": lambda v: df.denoising_loss(X, Y, KEY, SCHEDULE[T], predict="v", weight=df.weighting.P2(v, v)),
    "clamp": lambda v: df.to_x0(X, Y, SCHEDULE[T], clamp=v),
    "clamp of a pair": lambda v: df.to_eps(X, Y, SCHEDULE[T], predict="v", clamp=(-v, 2 * v)),
    "clamped": lambda v: df.weighted_sum((v, X), (1.0, df.clamped((v, Y), low=-v, high=v))),
    "delta": lambda v: df.denoising_loss(X, Y, KEY, SCHEDULE[T], kind="huber", delta=v),
    "residual_loss": lambda v: df.residual_loss(X, (v, Y), weight=v),
    "langevin_step": lambda v: df.langevin_step(X, Y, v, KEY, noise_scale=v),
    "Level": lambda v: df.to_x0(X, Y, df.Level(v, 1 - v)),
    "perturbation": lambda v: df.add_noise(X, KEY, SCHEDULE[T], perturbation=v),
    "OffsetNoise": lambda v: df.add_noise(X, df.OffsetNoise(KEY, v), SCHEDULE[T]),
    "PyramidNoise": lambda v: df.add_noise(X.reshape(4, 2, 4), df.PyramidNoise(KEY, v), SCHEDULE[T]),
    "fourier_embedding": lambda v: df.fourier_embedding(X[:, 0], KEY, 8, scale=v),
    "timestep_embedding": lambda v: df.timestep_embedding(T, 8, max_period=100 * v),
}


@not_in_torch_2_11("floats are constants")
@pytest.mark.parametrize("name", some_longer(CHANGING, ["SaltAndPepper", "EDM", "clamp", "residual_loss", "Level"]))
def test_a_float_that_changes_is_no_constant(name: str) -> None:
    """One graph for the first value and one for all others."""
    recorder, op = Recorder(), CHANGING[name]
    run = recorder.compile(op)
    for k in range(6):
        torch.testing.assert_close(run(0.13 + 0.057 * k), op(0.13 + 0.057 * k), rtol=2e-6, atol=2e-6)
    assert recorder.compilations <= 2


@pytest.mark.parametrize("name", some_longer(["corrupt", "SaltAndPepper", "clamp", "kl_sparsity"], ["clamp"]))
def test_a_float_that_changes_in_inductor(name: str) -> None:
    op = CHANGING[name]
    run = torch.compile(op, fullgraph=True)
    for v in (0.5, 0.75, 0.25, 0.6):
        torch.testing.assert_close(run(v), op(v), rtol=2e-6, atol=2e-6)


def test_compiled_copy_of_a_loss() -> None:
    """A deep copy is compiled on its own tables."""
    loss = df.nn.DenoisingLoss(df.Schedule.linear(50), "v")
    net, x0 = small_net(6), torch.randn(4, 6)
    for module in (loss, copy.deepcopy(loss)):
        torch.testing.assert_close(Recorder().compile(module)(net, x0, HOST), loss(net, x0, HOST))
