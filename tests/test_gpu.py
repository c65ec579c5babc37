"""What only a GPU can show, on both of its backends: `make gpu-check`, or `pytest -m gpu tests/test_gpu.py`.

The judge is fp64 arithmetic on the CPU; what must be equal bit for bit is compared with the CPU's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import dae_fast as df
from benchmarks.cases import CASES, DTYPES, SCHEDULE, Case, Inputs, widen
from benchmarks.memory import usage
from dae_fast.noise import to_signed

from .test_ops import LENGTHS, assert_as_good, cut, outputs, require_grads

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
GPU_BACKENDS = ("native", "triton")
SHAPE = (40, 3, 17, 16)
FLAT = (64, 784)

all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# Those of which the noise contract promises the same bits everywhere.
noising = pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith(("add_noise", "langevin"))], ids=str)
losses = pytest.mark.parametrize("case", [c for c in CASES if c.loss], ids=str)
# Every way of reading and writing: noise, a second output, a clamp, three tensors; a loss of noise, of tensors, masked.
# Not all cases: Triton compiles each anew for every length and layout, at half a second and more.
WAYS = ("add_noise-fresh", "add_noise-target", "to_x0-clamp", "langevin_step-tensor")
LOSS_WAYS = ("noise_mse-fresh", "noise_mse-tensor", "noise_mse-mask")
ways = pytest.mark.parametrize("case", [c for c in CASES if c.name in (*WAYS, *LOSS_WAYS)], ids=str)
map_ways = pytest.mark.parametrize("case", [c for c in CASES if c.name in WAYS], ids=str)
loss_ways = pytest.mark.parametrize("case", [c for c in CASES if c.name in LOSS_WAYS], ids=str)


@pytest.fixture(params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend of a GPU, forced."""
    name = request.param
    if df.kernels.dispatch.missing(name):
        pytest.skip(df.kernels.dispatch.missing(name))
    if not df.kernels.dispatch.supports(name, torch.device(DEVICE)):
        pytest.skip(df.info()["cuda"])
    with df.use_backend(name):
        yield name


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory is NaN, so that an element which is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_the_cpu(call: Callable[[], Tensor]) -> Tensor:
    """Whatever backend is forced around it."""
    with df.use_backend("native"):
        return call()


def assert_same_bits(got: Tensor, wanted: Tensor, what: str) -> None:
    as_ints = {8: torch.int64, 4: torch.int32, 2: torch.int16}[wanted.itemsize]
    got, wanted = (t.to(DEVICE).contiguous().view(as_ints) for t in (got, wanted))
    assert got.shape == wanted.shape
    differ = int((got != wanted).sum())
    assert differ == 0, f"{what}: {differ} of {wanted.numel()} differ"


def gradients(case: Case, inputs: Inputs, call: Callable[[Inputs], object], scale: float = 1.0) -> list[Tensor]:
    """For random upstream gradients, the same on every device."""
    wanted = require_grads(case, inputs)
    made = outputs(call(inputs))
    g = torch.Generator().manual_seed(1)
    upstream = [scale * (torch.ones(()) if not m.dim() else torch.randn(m.shape, generator=g)) for m in made]
    return list(torch.autograd.grad(made, wanted, [u.to(m) for u, m in zip(upstream, made, strict=True)]))


def judged(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Inputs, Inputs, Tensor, Tensor]:
    """On the CPU: the inputs, the same in fp64, and the noise for either; None where there is none."""
    inputs = case.inputs(shape, dtype)
    wide = widen(inputs)
    eps, eps_wide = (on_the_cpu(lambda i=i, d=d: case.eps(i, d)) for i, d in ((inputs, dtype), (wide, torch.float64)))
    return inputs, wide, eps, eps_wide


class TestOps:
    @all_cases
    @all_dtypes
    @pytest.mark.usefixtures("poison")
    def test_forward(self, backend: str, case: Case, dtype: torch.dtype) -> None:
        inputs, wide, eps, eps_wide = judged(case, SHAPE, dtype)
        ours = outputs(case.ours(case.inputs(SHAPE, dtype, device=DEVICE)))
        plain, exact = outputs(case.plain(inputs, eps)), outputs(case.plain(wide, eps_wide))
        for k, (a, b, e) in enumerate(zip(ours, plain, exact, strict=True)):
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            assert a.dtype == (compute if case.loss or k in case.sums else dtype)
            assert a.is_cuda
            assert_as_good(a.cpu(), b, e, f"output {k}", clamped="clamp" in case.name)

    @all_cases
    @all_dtypes
    @pytest.mark.parametrize("scale", [1.0, 3.7])
    @pytest.mark.usefixtures("poison")
    def test_gradient(self, backend: str, case: Case, dtype: torch.dtype, scale: float) -> None:
        inputs, wide, eps, eps_wide = judged(case, SHAPE, dtype)

        def plain(noise: Tensor | None) -> Callable[[Inputs], object]:
            return lambda i: case.plain(i, i["noise"] if not case.fresh and "noise" in i else noise)

        ours = gradients(case, case.inputs(SHAPE, dtype, device=DEVICE), case.ours, scale)
        usual, exact = gradients(case, inputs, plain(eps), scale), gradients(case, wide, plain(eps_wide), scale)
        for name, a, b, e in zip(case.grads, ours, usual, exact, strict=True):
            assert a.dtype == inputs[name].dtype
            assert_as_good(a.cpu(), b, e, f"gradient of {name}", clamped="clamp" in case.name)

    @map_ways
    @all_dtypes
    @pytest.mark.usefixtures("poison")
    def test_every_length(self, backend: str, case: Case, dtype: torch.dtype) -> None:
        """An element does not know how long its row is: whatever path a length takes, the bits are the same."""
        inputs = case.inputs((19, LENGTHS[-1]), dtype, device=DEVICE)
        whole = outputs(case.ours(inputs))
        for D in LENGTHS:
            for a, b in zip(outputs(case.ours(cut(inputs, D))), whole, strict=True):
                assert_same_bits(a, b[:, :D], f"{D} elements")

    @loss_ways
    @pytest.mark.usefixtures("poison")
    def test_every_length_of_a_loss(self, backend: str, case: Case) -> None:
        inputs, wide, _, eps = judged(case, (19, LENGTHS[-1]), torch.float32)
        for D in LENGTHS:
            part = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in cut(inputs, D).items()}
            exact = case.plain(cut(wide, D), eps[:, :D].contiguous())
            # Sums of squares in fp32, of some 64 terms at a time: as in test_ops.
            torch.testing.assert_close(case.ours(part).double().cpu(), exact, rtol=1e-6, atol=0)

    @all_dtypes
    def test_nothing_is_written_outside(self, backend: str, dtype: torch.dtype) -> None:
        for B, D in [(1, 1), (3, 5), (2, 63), (5, 65), (3, 1023), (2, 1025), (2, 5000)]:
            buffer = torch.full((B * D + 64,), 7.0, dtype=dtype, device=DEVICE)
            out = buffer[32 : 32 + B * D].view(B, D)
            x, score = torch.randn(2, B, D, device=DEVICE).to(dtype)
            df.langevin_step(x, score, 0.1, df.Noise(0), out=out)
            assert_same_bits(out, df.langevin_step(x, score, 0.1, df.Noise(0)), f"{B}x{D}")
            assert (buffer[:32] == 7).all()
            assert (buffer[32 + B * D :] == 7).all()

    def test_a_level_out_of_range_is_nan(self, backend: str) -> None:
        t = torch.tensor([0, 1000, -1, 999, 2**40, -(2**40)], device=DEVICE)
        outside = [False, True, True, False, True, True]
        x = torch.randn(6, 77, device=DEVICE)
        for result in (
            df.add_noise(x, df.Noise(0), SCHEDULE[t]),
            df.add_noise(x, x, SCHEDULE[t]),
            df.to_x0(x, x, SCHEDULE[t]),
            df.to_x0(x, x, SCHEDULE[t], clamp=1.0),
        ):
            assert result.isnan().all(1).tolist() == outside
            assert result.isnan().any(1).tolist() == outside
        assert SCHEDULE[t].alpha.isnan().tolist() == outside


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, -1).contiguous().transpose(1, -1)


def sliced(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan") if x.is_floating_point() else True)
    wide[..., ::2] = x
    return wide[..., ::2]


def misaligned(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


def cropped(x: Tensor) -> Tensor:
    """A window of a larger image."""
    return torch.nn.functional.pad(x, (3, 5, 1, 2))[..., 1:-2, 3:-5]


LAYOUTS = (channels_last, transposed, sliced, misaligned, expanded, cropped)


@ways
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(6, 3, 18, 16), (2, 4, 5, 18, 16)], ids=["image", "video"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.usefixtures("poison")
def test_layouts(backend: str, case: Case, layout, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Maps and their gradients have the same bits whatever the strides, of all inputs or of one."""
    inputs = case.inputs(shape, dtype, device=DEVICE)
    full = [name for name, v in inputs.items() if isinstance(v, Tensor) and v.shape == shape]
    for moved_names in (full, full[-1:]):
        moved = {k: layout(v) if k in moved_names else v for k, v in inputs.items()}
        dense = {k: v.contiguous() if k in moved_names else v for k, v in moved.items()}
        # The sums of a loss follow the order in memory where that is one stretch.
        rtol = 1e-6 if case.loss or case.sums else 0
        for a, b in zip(outputs(case.ours(moved)), outputs(case.ours(dense)), strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=0)
        if layout is not expanded and not case.loss:
            for a, b in zip(gradients(case, moved, case.ours), gradients(case, dense, case.ours), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


class TestTheSameBits:
    """CPU = CUDA = Triton."""

    def test_a_hundred_million_normals(self, backend: str) -> None:
        rows, D = 10, 1_000_000
        for first in range(0, 100, rows):
            noise = df.Noise(2026, first_sample=first).fold_in(3)
            wanted = on_the_cpu(lambda noise=noise: noise.normal((rows, D)))
            assert_same_bits(noise.normal((rows, D), device=DEVICE), wanted, f"rows from {first}")

    @all_dtypes
    @pytest.mark.parametrize("D", [1, 3, 4, 6, 63, 784, 4097])
    def test_normals_in_every_dtype(self, backend: str, dtype: torch.dtype, D: int) -> None:
        ids = torch.tensor([5, -1, 2**40, 0, 2**63 - 1] * 20)
        for seed in (0, 2**64 - 1):
            wanted = on_the_cpu(lambda seed=seed: df.Noise(seed, sample=ids).normal((100, D), dtype=dtype))
            got = df.Noise(seed, sample=ids.to(DEVICE)).normal((100, D), dtype=dtype, device="cuda:0")
            assert_same_bits(got, wanted, f"seed {seed}")

    def test_words(self, backend: str) -> None:
        wanted = on_the_cpu(lambda: df.Noise(7).bits((100, 4097)))
        assert_same_bits(df.Noise(7).bits((100, 4097), device=DEVICE), wanted, "words")

    @noising
    @all_dtypes
    def test_noising_and_langevin(self, backend: str, case: Case, dtype: torch.dtype) -> None:
        for shape in ((64, 784), (16, 4, 64, 64), (7, 333)):
            for a, b in zip(
                outputs(case.ours(case.inputs(shape, dtype, device=DEVICE))),
                outputs(on_the_cpu(lambda shape=shape: case.ours(case.inputs(shape, dtype)))),
                strict=True,
            ):
                if case.name == "langevin_step-per-sample" and dtype == torch.float64:
                    # A coefficient is a root, and torch's root of doubles is MKL's on an Intel CPU: of 100,000 683 were
                    # an ulp off, on the GPU none.
                    torch.testing.assert_close(a.cpu(), b, rtol=2**-51, atol=2**-51)
                else:
                    assert_same_bits(a, b, str(shape))

    def test_a_folded_key(self, backend: str) -> None:
        for data in (0, 1, -1, 2**40, -(2**63)):
            wanted = list(df.Noise(5).fold_in(data).key)
            key = df.Noise(5).fold_in(torch.tensor(data, device=DEVICE)).key
            assert [k % 2**64 for k in key.tolist()] == wanted
            key = df.Noise(5).to(DEVICE).fold_in(data).key
            assert [k % 2**64 for k in key.tolist()] == wanted

    @pytest.mark.parametrize("device", ["cuda", "cuda:0"])
    def test_a_key_in_memory(self, backend: str, device: str) -> None:
        noise = df.Noise(5).fold_in(2)
        got = noise.to(DEVICE).normal((9, 100), device=device)
        assert_same_bits(got, on_the_cpu(lambda: noise.normal((9, 100))), "key in memory")


class TestDeterminism:
    @losses
    @pytest.mark.parametrize("shape", [FLAT, (3, 1_000_003)], ids=str)
    def test_a_loss_has_the_same_bits_every_run(self, backend: str, case: Case, shape: tuple[int, ...]) -> None:
        inputs = case.inputs(shape, torch.float32, device=DEVICE)
        (pred,) = require_grads(case, inputs)[:1]

        def run() -> tuple[Tensor, Tensor]:
            loss = case.ours(inputs)
            return loss.detach(), torch.autograd.grad(loss.sum(), pred)[0]

        loss, grad = run()
        for k in range(20):
            # Other work in between, so that blocks finish in another order.
            torch.randn(1000 * (k + 1), device=DEVICE).square_()
            for a, b in zip(run(), (loss, grad), strict=True):
                assert_same_bits(a, b, f"run {k}")

    def test_two_streams_at_once(self, backend: str) -> None:
        """Each has its own counters: a loss would be cut short, or left out, by another's blocks."""
        streams = [torch.cuda.Stream() for _ in range(2)]
        preds = [torch.randn(64, 65536, device=DEVICE) for _ in streams]
        noises = [df.Noise(k) for k in range(2)]
        wanted = [df.noise_mse(p, n) for p, n in zip(preds, noises, strict=True)]
        torch.cuda.synchronize()
        made: list[list[Tensor]] = [[], []]
        for _ in range(50):
            for k, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    made[k].append(df.noise_mse(preds[k], noises[k]))
        torch.cuda.synchronize()
        for k in range(2):
            assert_same_bits(torch.stack(made[k]), wanted[k].expand(50), f"stream {k}")


class TestGraphs:
    def test_a_replay_has_fresh_noise(self, backend: str) -> None:
        """The step counter lives on the device and is counted up by the graph itself."""
        x0, pred = torch.randn(2, *FLAT, device=DEVICE)
        pred.requires_grad_()
        t = torch.randint(1000, FLAT[:1], device=DEVICE)
        step, one = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.ones((), device=DEVICE)

        def bookkeeping(noise: df.Noise) -> tuple[Tensor, ...]:
            loss = df.noise_mse(pred, noise)
            return df.add_noise(x0, noise, SCHEDULE[t]), loss, *torch.autograd.grad(loss, pred, one)

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels and tables are loaded before the capture
            bookkeeping(df.Noise(0).fold_in(step))
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = bookkeeping(df.Noise(0).fold_in(step))
            step += 1
        seen = []
        for k in range(4):
            graph.replay()
            for a, b in zip(captured, bookkeeping(df.Noise(0).fold_in(k)), strict=True):
                assert_same_bits(a, b, f"replay {k}")
            seen.append(captured[0].clone())
        assert all(not torch.equal(a, b) for a, b in pairwise(seen))

    def test_constants_are_the_graphs_own(self, backend: str) -> None:
        """Whatever other constants come and go between its replays."""
        x, noise = torch.randn(FLAT, device=DEVICE), df.Noise(0)

        def call() -> tuple[Tensor, ...]:
            masked = df.corrupt(x, df.Masking(0.25, noise))
            return df.noise_mse(x, noise), df.langevin_step(x, x, 0.1, noise), masked

        wanted = call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for k in range(40):
            df.langevin_step(x, x, 1.0 + k, noise)
            df.corrupt(x, df.Masking(k / 40, noise))
        rubbish = [torch.full((1, 4), torch.nan, device=DEVICE) for _ in range(100)]
        graph.replay()
        for ours, theirs in zip(captured, wanted, strict=True):
            assert_same_bits(ours, theirs, f"beside {len(rubbish)} others")

    def test_two_graphs_at_once(self, backend: str) -> None:
        """Graphs replayed side by side do not share their counters."""
        preds = [torch.randn(64, 65536, device=DEVICE) for _ in range(2)]
        wanted = [df.noise_mse(p, df.Noise(0)) for p in preds]
        graphs, made, streams = [], [], [torch.cuda.Stream() for _ in preds]
        for pred in preds:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made.append([df.noise_mse(pred, df.Noise(0)) for _ in range(20)])
            graphs.append(graph)
        for _ in range(5):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for losses_, loss in zip(made, wanted, strict=True):
            assert_same_bits(torch.stack(losses_), loss.expand(20), "a graph's losses")


@all_cases
def test_no_synchronisation(backend: str, case: Case) -> None:
    inputs = case.inputs(FLAT, torch.float32, device=DEVICE)
    wanted = require_grads(case, inputs)
    upstream = [torch.ones_like(o) for o in outputs(case.ours(inputs))]

    def step(k: int) -> None:
        given = {**inputs, "level": SCHEDULE[inputs["t"]]}
        if case.fresh:
            given["noise"] = df.Noise(k).fold_in(k)
        torch.autograd.grad(outputs(case.ours(given)), wanted, upstream)
        with torch.no_grad():
            case.ours(given)

    step(0)  # kernels are compiled and tables copied at their first use
    with no_synchronisation():
        for k in (1, 2**40):
            step(k)


def test_a_key_on_the_device_does_not_synchronise(backend: str) -> None:
    step, x = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.randn(FLAT, device=DEVICE)

    def call() -> None:
        noise = df.Noise(0).fold_in(step)
        df.noise_mse(x, noise.fold_in(2))
        df.Noise.from_generator(device=DEVICE).normal(FLAT, device=x.device)

    call()
    with no_synchronisation():
        call()


def test_numbers_that_change_do_not_synchronise(backend: str) -> None:
    x, sigma = torch.randn(FLAT, device=DEVICE), torch.rand(FLAT[0], device=DEVICE) + 0.1
    level = SCHEDULE[torch.zeros(FLAT[0], dtype=torch.int64, device=DEVICE)]

    def call(h: float) -> None:
        noise = df.Noise(0)
        df.langevin_step(x, x, h, noise)
        df.add_noise(x, noise, df.Level(1.0, h))
        df.add_noise(x, noise, df.Level(1.0, sigma))
        df.corrupt(x, df.Masking(h / 100, noise))
        df.denoising_loss(x, x, noise, level, predict="v", kind="huber", delta=h)
        df.denoising_loss(x, x, noise, level, predict="v", weight=lambda alpha, sigma: h)

    call(0.5)
    with no_synchronisation():
        for k in range(40):
            call(1.0 + k)


# Cases of more than one launch.
MORE = (
    *("noise_mse-mask", "noise_mse-drawn", "denoising_loss-masked"),  # a mask must be counted first
    *("langevin_step-per-sample", "denoising_loss-pseudo_huber"),  # coefficients worked out by torch
    "add_noise-perturbed",  # noise twice
    *("step-ddim", "sgld_step"),  # coefficients, and the root of what is preconditioned
    *("log_prob-none", "noise_mse-weights", "variational_bound"),  # torch's arithmetic after a launch or two
)


class TestLaunches:
    """As the profiler counts them: kernels, copies and fills."""

    @pytest.mark.parametrize("case", [c for c in CASES if c.name not in MORE], ids=str)
    def test_one_to_an_op(self, backend: str, case: Case) -> None:
        inputs = case.inputs(FLAT, torch.float32, device=DEVICE)
        with torch.no_grad():
            case.ours(inputs)
            parted = backend == "triton" and case.name == "reparameterise"  # its rows are cut: a sum and a cast follow
            assert usage(lambda: case.ours(inputs), 1, torch.device(DEVICE)).launches == (3 if parted else 1)

    def test_two_to_a_loss_and_its_gradient(self, backend: str) -> None:
        pred, one = torch.randn(FLAT, device=DEVICE, requires_grad=True), torch.ones((), device=DEVICE)

        def call() -> object:
            return torch.autograd.grad(df.noise_mse(pred, df.Noise(0)), pred, one)

        call()
        assert usage(call, 1, torch.device(DEVICE)).launches <= 2

    def test_four_to_a_training_step(self, backend: str) -> None:
        """All but the network: noising, the loss, torch's own 1 for its gradient, and the gradient."""
        x0, pred = torch.randn(2, *FLAT, device=DEVICE)
        pred.requires_grad_()
        t = torch.randint(1000, FLAT[:1], device=DEVICE)

        def step() -> object:
            noise = df.Noise(0).fold_in(5)
            return df.add_noise(x0, noise, SCHEDULE[t]), torch.autograd.grad(df.noise_mse(pred, noise), pred)

        step()
        assert usage(step, 1, torch.device(DEVICE)).launches <= 4

    @pytest.mark.parametrize("weighting", [None, "min_snr"])
    def test_three_to_the_objective(self, backend: str, weighting: str | None) -> None:
        """Levels, noising, and the loss with its weights, errors and gradient."""
        x0, pred = torch.randn(2, *FLAT, device=DEVICE)
        pred.requires_grad_()
        objective = df.nn.DenoisingLoss(SCHEDULE, "v", weighting=weighting)

        def step() -> object:
            return objective(lambda x, t: pred, x0, df.Noise(0).fold_in(5))

        step()
        assert usage(step, 1, torch.device(DEVICE)).launches == 3


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled(backend: str, mode: str | None) -> None:
    """Noising, a network and the loss in one graph; with CUDA graphs every replay sees its own key."""
    torch._dynamo.reset()
    w = torch.randn(784, 784, device=DEVICE, requires_grad=True)
    x0, t = torch.randn(FLAT, device=DEVICE), torch.randint(1000, FLAT[:1], device=DEVICE)

    def loss(x0: Tensor, t: Tensor, key: Tensor) -> Tensor:
        noise = df.Noise(key)
        return df.noise_mse(df.add_noise(x0, noise, SCHEDULE[t]) @ w, noise)

    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    losses_ = []
    for seed in range(4):
        key = df.Noise(seed).to(DEVICE).key
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(x0, t, key)
        (grad,) = torch.autograd.grad(got, w)
        wanted = loss(x0, t, key)
        # The same kernels; the means over the batch, and the products, are torch's own, in another order.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad, torch.autograd.grad(wanted, w)[0], rtol=1e-3, atol=1e-4 * grad.abs().max())
        losses_.append(got.item())
    assert len(set(losses_)) == 4
    torch._dynamo.reset()


def noise_at(noise: df.Noise, row: int, first: int) -> Tensor:
    """1024 normals of a row from element `first` (a multiple of 4) on, from the CPU without all that come before."""
    key = noise.fold_in(row)
    there = df.Noise._make(key._seed, to_signed(key._offset + first // 4))
    native = df.kernels.native
    return native.normal(there, (1, 1024), torch.float32, torch.device("cpu"), fold=False)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("B", "ragged", "offset"),
    [(1, 0, 0), (3, 0, 0), (1, 1, 0), (1, 0, 1)],
    ids=["one row", "rows", "one ragged row", "one misaligned row"],
)
def test_more_than_2_to_the_31_elements(backend: str, dtype: torch.dtype, B: int, ragged: int, offset: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free / 2**30:.0f}")
    D = (2**31 + 4096) // B // 8 * 8 + ragged
    noise = df.Noise(3).fold_in(1)
    x0 = torch.zeros(B * D + offset, dtype=dtype, device=DEVICE)[offset:].view(B, D)
    x_t = df.add_noise(x0, noise, df.Level(1.0, 1.0))
    checked = [(0, 0), (B - 1, D // 2 // 4 * 4), (B - 1, (D - 1024) // 4 * 4)]
    if B == 1:
        checked.append((0, 2**31 - 512))
    for row, first in checked:
        assert_same_bits(
            x_t[row, first : first + 1024], noise_at(noise, row, first).to(dtype), f"row {row} from {first}"
        )
    del x_t
    # The mean of 2^31 squares of normals: 1 within a few times sqrt(2 / 2^31) = 3e-5.
    assert abs(df.noise_mse(x0, noise).item() - 1) < 3e-4
    if dtype == torch.bfloat16:  # fp16's smallest number is above the gradient
        pred = x0.requires_grad_()
        (grad,) = torch.autograd.grad(df.noise_mse(pred, noise), pred)
        row, first = checked[-1]
        exact = -2 / (B * D) * noise_at(noise, row, first).double()
        # One rounding to bf16.
        torch.testing.assert_close(grad[row, first : first + 1024].cpu().double(), exact, rtol=2**-8, atol=0)


def test_the_second_of_two_gpus(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for case in CASES:
        first, second = (
            outputs(case.ours(case.inputs(FLAT, torch.float32, device=device))) for device in ("cuda:0", "cuda:1")
        )
        assert torch.cuda.current_device() == 0
        for a, b in zip(first, second, strict=True):
            assert b.device.index == 1
            assert_same_bits(b, a, case.name)


def test_a_short_run_of_each_op(backend: str) -> None:
    """What compute-sanitizer runs: every kernel, on the paths for whole and for broken rows."""
    for shape in ((3, 64), (2, 3, 5, 7)):
        for case in (c for c in CASES if c.name in (*WAYS, *LOSS_WAYS)):
            for dtype in (torch.float32, torch.bfloat16):
                inputs = case.inputs(shape, dtype, device=DEVICE)
                moved = {k: transposed(v) if isinstance(v, Tensor) and v.dim() == 4 else v for k, v in inputs.items()}
                found = gradients(case, moved, case.ours)
                assert all(g.isfinite().all() for g in found)
    df.Noise(0).to(DEVICE).fold_in(1).normal((3, 70), device="cuda:0")
    df.Noise(0).bits((3, 70), device=DEVICE)
    torch.cuda.synchronize()


def test_continuous_times_out_of_range_are_nan() -> None:
    outside = [False, True, True, True, False]
    edm = df.ContinuousSchedule.edm()
    t = torch.tensor([0.5, -1.0, 81.0, float("nan"), 80.0], device=DEVICE)
    level = edm[t]
    assert level.alpha.isnan().tolist() == level.sigma.isnan().tolist() == outside
    assert df.add_noise(torch.zeros(5, 3, device=DEVICE), df.Noise(0), level).isnan().all(1).tolist() == outside
    # exp of another device may differ in its last bit, before the rounding to fp32.
    drawn = edm.draw(df.Noise(0), 100, device=DEVICE)
    torch.testing.assert_close(drawn.cpu(), edm.draw(df.Noise(0), 100), rtol=2e-7, atol=0)
    times = torch.tensor([0.5, 1.0], device=DEVICE)
    assert df.ContinuousSchedule.flow().drift(times).isnan().tolist() == [False, True]
