"""torch.func, forward mode, gradcheck and opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import dae_fast as df
from benchmarks.cases import CASES, SCHEDULE, Case, Inputs, widen

NOISE = df.Noise(5).fold_in(2)
V, B, D = 3, 2, 5


def scalar(f: Callable[..., Any]) -> Callable[..., Tensor]:
    """A sum of squares over all that f returns, so that a gradient depends on the input."""

    def total(*args: Any) -> Tensor:
        result = f(*args)
        outputs = result if isinstance(result, tuple) else (result,)
        return torch.stack([o.double().square().sum() for o in outputs]).sum()

    return total


def of(case: Case, inputs: Inputs, names: tuple[str, ...] | None = None) -> tuple[Callable[..., Any], list[Tensor]]:
    """The case as a function of its differentiable tensors alone, and these."""
    names = case.grads if names is None else names
    return lambda *values: case.ours({**inputs, **dict(zip(names, values, strict=True))}), [inputs[n] for n in names]


def plain_of(case: Case, inputs: Inputs) -> Callable[..., Any]:
    eps = case.eps(inputs, torch.float64)

    def plain(*values: Tensor) -> Any:
        given = {**inputs, **dict(zip(case.grads, values, strict=True))}
        return case.plain(given, eps if case.fresh else given.get("noise"))

    return plain


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, check_dtype=False)


def double(case: Case) -> Inputs:
    """Small and fp64; at levels where a clamp limits some elements and not others."""
    inputs = widen(case.inputs((B, 3), torch.float64))
    inputs["t"] = torch.tensor([10, 400])
    inputs["level"] = SCHEDULE[inputs["t"]]
    return inputs


cases = pytest.mark.parametrize("case", CASES, ids=str)


class TestFunc:
    @cases
    def test_grad(self, case: Case) -> None:
        inputs = case.inputs((B, D), torch.float32)
        f, values = of(case, inputs)
        everything = tuple(range(len(values)))
        got = grad(scalar(f), argnums=everything)(*values)
        values = [v.clone().requires_grad_() for v in values]
        close(got, torch.autograd.grad(scalar(f)(*values), values))

    @cases
    def test_grad_of_grad(self, case: Case) -> None:
        inputs = double(case)
        f, values = of(case, inputs)

        def second(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return grad(scalar(grad(scalar(f))))

        want = second(plain_of(case, inputs))(*values)
        assert want.any()
        close(second(f)(*values), want)

    @cases
    def test_vjp_and_jacobians(self, case: Case) -> None:
        inputs = double(case)
        f, values = of(case, inputs)
        plain = plain_of(case, inputs)
        close(jacrev(f)(*values), jacrev(plain)(*values))
        close(jacfwd(f)(*values), jacfwd(plain)(*values))
        output, pull = vjp(f, *values)
        output, plain_pull = vjp(plain, *values)
        close(pull(output), plain_pull(output))

    @cases
    def test_jvp(self, case: Case) -> None:
        """Forward mode goes through the plain formula."""
        inputs = double(case)
        f, values = of(case, inputs)
        tangents = tuple(torch.randn_like(v) for v in values)
        close(jvp(f, tuple(values), tangents), jvp(plain_of(case, inputs), tuple(values), tangents))

    @cases
    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_vmap_over_samples(self, case: Case, dim: int) -> None:
        """Each instance as alone, its noise too: the same bits."""
        instances = [case.inputs((B, D), torch.float32, seed) for seed in range(V)]
        f, _ = of(case, instances[0], case.tensors)
        stacked = [torch.stack([i[n] for i in instances], dim) for n in case.tensors]
        got = vmap(f, in_dims=dim)(*stacked)
        alone = [f(*(i[n] for n in case.tensors)) for i in instances]
        assert_stacked(got, alone, exact=not case.loss)

    @cases
    def test_per_sample_gradients(self, case: Case) -> None:
        instances = [case.inputs((B, D), torch.float32, seed) for seed in range(V)]
        f, _ = of(case, instances[0])
        stacked = [torch.stack([i[n] for i in instances]) for n in case.grads]
        everything = tuple(range(len(stacked)))
        got = vmap(grad(scalar(f), argnums=everything))(*stacked)
        alone = [grad(scalar(f), argnums=everything)(*(i[n] for n in case.grads)) for i in instances]
        assert_stacked(got, alone, exact=False)

    @pytest.mark.parametrize("table_dim", [None, 0])
    @pytest.mark.parametrize("index_dim", [None, 0, 1])
    def test_vmap_over_levels(self, table_dim: int | None, index_dim: int | None) -> None:
        """Indices, and level weights that are a table for each instance."""
        t = torch.tensor([[0, 3, 7], [9, 2, 1]]) if index_dim is not None else torch.tensor([4, 6])
        instances_t = {None: [t] * V, 0: list(t.T), 1: list(t.T)}[index_dim]
        t = t.T if index_dim == 0 else t
        schedule = df.Schedule.linear(10)
        weights = torch.rand(V, 10) if table_dim == 0 else torch.rand(10)
        pred = torch.randn(B, D)

        def f(t: Tensor, weights: Tensor) -> Tensor:
            level = schedule[t]
            return df.noise_mse(df.add_noise(pred, NOISE, level), NOISE, level=level, level_weight=weights)

        if index_dim is None and table_dim is None:
            return
        got = vmap(f, in_dims=(index_dim, table_dim))(t, weights)
        each = list(weights) if table_dim == 0 else [weights] * V
        assert_stacked(got, [f(*p) for p in zip(instances_t, each, strict=True)], exact=False)

    def test_vmap_over_levels_by_hand(self) -> None:
        x, sigma = torch.randn(B, D), torch.rand(V, B)
        got = vmap(lambda s: df.add_noise(x, NOISE, df.Level(1.0, s)))(sigma)
        assert_stacked(got, [df.add_noise(x, NOISE, df.Level(1.0, s)) for s in sigma])
        got = vmap(lambda s: df.add_noise(x, NOISE, df.Level(1.0, s)))(sigma[:, 0])
        assert_stacked(got, [df.add_noise(x, NOISE, df.Level(1.0, s)) for s in sigma[:, 0]])

    @pytest.mark.parametrize("schedule_index", [-1, 10])
    def test_vmap_level_out_of_range(self, schedule_index: int) -> None:
        schedule = df.Schedule.linear(10)
        t = torch.tensor([[0], [schedule_index]])
        with pytest.raises(ValueError, match=r"add_noise: level must be in \[0, 10\)"):
            vmap(lambda t: df.add_noise(torch.zeros(1, 2), NOISE, schedule[t]))(t)

    @pytest.mark.parametrize("ids", [torch.arange(6).reshape(3, 2), torch.arange(12).reshape(2, 6).T[::2]])
    def test_vmap_over_sample_ids(self, ids: Tensor) -> None:
        x = torch.randn(B, D)

        def f(i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            noise = df.Noise(3, sample=i)
            return (
                df.add_noise(x, noise, df.Level(1.0, 0.5)),
                noise.normal((B, 4)),
                noise.bits((B, 3)),
            )

        assert_stacked(vmap(f)(ids), [f(i) for i in ids])

    def test_vmap_over_masks_and_weights(self) -> None:
        pred, mask, weight = torch.randn(B, D), torch.rand(V, B, D) < 0.5, torch.rand(V, B)

        def f(mask: Tensor, weight: Tensor) -> Tensor:
            return df.noise_mse(pred, NOISE, mask=mask, weight=weight)

        for dims in ((0, 0), (0, None), (None, 0)):
            arguments = [a if d == 0 else a[0] for a, d in zip((mask, weight), dims, strict=True)]
            each = [[a[v] if d == 0 else a for a, d in zip(arguments, dims, strict=True)] for v in range(V)]
            assert_stacked(vmap(f, in_dims=dims)(*arguments), [f(*e) for e in each], exact=False)

    def test_nested_vmap(self) -> None:
        x = torch.randn(2, V, B, D)

        def f(x: Tensor) -> Tensor:
            return df.add_noise(x, NOISE, SCHEDULE[torch.tensor([4, 900])])

        got = vmap(vmap(f))(x)
        for a in range(2):
            assert_stacked(got[a], [f(x[a, v]) for v in range(V)])

    def test_batched_gradients_of_an_eager_loss(self) -> None:
        pred = torch.randn(B, D, requires_grad=True)
        loss = df.noise_mse(pred, NOISE, reduction="none")
        (got,) = torch.autograd.grad(loss, pred, torch.eye(B), retain_graph=True, is_grads_batched=True)
        for row, g in zip(torch.eye(B), got, strict=True):
            close(g, torch.autograd.grad(loss, pred, row, retain_graph=True)[0])

    @pytest.mark.parametrize("use", ["key", "fold_in"])
    def test_vmap_over_keys_is_refused(self, use: str) -> None:
        def of_key(key: Tensor) -> Tensor:
            return df.add_noise(torch.zeros(B, D), df.Noise(key), df.Level(1.0, 0.5))

        def of_step(step: Tensor) -> Tensor:
            return df.add_noise(torch.zeros(B, D), NOISE.fold_in(step), df.Level(1.0, 0.5))

        f, argument = {"key": (of_key, torch.ones(V, 2).long()), "fold_in": (of_step, torch.arange(V))}[use]
        with pytest.raises(
            ValueError,
            match=r"vmap over noise keys is not supported: share one key and vmap over its sample ids, "
            r"Noise\(seed, sample=ids\)",
        ):
            vmap(f)(argument)

    def test_functional_call_of_a_loss(self) -> None:
        net = torch.nn.Linear(D, D)
        loss = df.nn.DenoisingLoss(df.Schedule.linear(10), "v")
        x0 = torch.randn(V, B, D)

        def of_parameters(parameters: dict[str, Tensor], x0: Tensor) -> Tensor:
            result: Tensor = loss(lambda x, t: functional_call(net, parameters, (x,)), x0, NOISE)["loss"]
            return result

        parameters = dict(net.named_parameters())
        detached = {k: v.detach() for k, v in parameters.items()}
        got = vmap(grad(of_parameters), in_dims=(None, 0))(detached, x0)
        for v in range(V):
            want = torch.autograd.grad(of_parameters(parameters, x0[v]), list(parameters.values()))
            close([g[v] for g in got.values()], list(want))

    @pytest.mark.parametrize("transform", [grad, lambda f: vmap(grad(f)), lambda f: lambda x: jvp(f, (x,), (x,))])
    def test_caches_first_filled_inside_hold_plain_tensors(self, transform: Callable[..., Any]) -> None:
        schedule = df.Schedule.linear(10)
        x = torch.randn(B, B, D)
        levels = schedule[torch.tensor([2, 3])], df.Level(1.0, 0.0625)
        for level in levels:
            transform(lambda x, level=level: df.add_noise(x, NOISE, level).square().sum())(x)
            assert torch.equal(df.add_noise(x, NOISE, level), df.add_noise(x.clone(), NOISE, level))
        tables = list(schedule._tables.values())
        assert tables
        assert not any(torch._C._functorch.is_functorch_wrapped_tensor(table) for table in tables)


def assert_stacked(got: Any, alone: list[Any], *, exact: bool = True) -> None:
    """got is the outputs of the instances alone, stacked."""
    if isinstance(got, tuple):
        for k, part in enumerate(got):
            assert_stacked(part, [a[k] for a in alone], exact=exact)
        return
    want = torch.stack(alone)
    if exact:
        assert torch.equal(got, want)
    else:
        close(got, want)


@cases
def test_dual_tensors(case: Case) -> None:
    inputs = double(case)
    f, values = of(case, inputs)
    tangents = tuple(torch.randn_like(v) for v in values)
    _, want = jvp(plain_of(case, inputs), tuple(values), tangents)
    with forward_ad.dual_level():
        result = f(*(forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)))
        outputs = result if isinstance(result, tuple) else (result,)
        got = tuple(forward_ad.unpack_dual(o).tangent for o in outputs)
    close(got if isinstance(want, tuple) else got[0], want)


@cases
def test_gradcheck(case: Case) -> None:
    """Twice: fp64 is computed in double, or this fails."""
    f, values = of(case, double(case))
    values = [v.requires_grad_() for v in values]
    assert torch.autograd.gradcheck(f, values, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, values)


OTHER_GRADIENTS: dict[str, Callable[..., Any]] = {
    "learned alpha and sigma": lambda x, a, s: df.add_noise(x, NOISE, df.Level(a.exp(), s.exp())),
    "learned sigma of the loss target": lambda x, a, s: df.add_noise(x, NOISE, df.Level(1.0, s.exp()), target="v"),
    "one sigma for all": lambda x, a, s: df.add_noise(x, NOISE, df.Level(1.0, s[0].exp())),
    "learned level of a conversion": lambda x, a, s: df.to_x0(x, x.sin(), df.Level(a.exp(), s.exp())),
    "learned level of a clamped conversion": lambda x, a, s: df.to_eps(
        x, x.sin(), df.Level(a.exp(), s.exp()), clamp=50.0
    ),
    "step and noise scale": lambda x, a, s: df.langevin_step(x, x.sin(), a.exp(), NOISE, s.exp()),
    "weight and tensor noise": lambda x, a, s: df.noise_mse(x, x.sin(), weight=a * s),
    "level weight": lambda x, a, s: df.noise_mse(
        x, NOISE, level=df.Schedule.linear(2)[torch.tensor([1, 0])], level_weight=a
    ),
    "sum": lambda x, a, s: df.noise_mse(x, NOISE, weight=s, reduction="sum"),
    "masked": lambda x, a, s: df.noise_mse(x, x.cos(), mask=x.detach() > 0, weight=s),
}


@pytest.mark.parametrize("name", OTHER_GRADIENTS)
def test_gradcheck_of_coefficients(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, a, s = (torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in ((2, 3), 2, 2))
    f = OTHER_GRADIENTS[name]
    assert torch.autograd.gradcheck(f, (x, a, s))
    assert torch.autograd.gradgradcheck(f, (x, a, s))


def affine_arguments(**given: Any) -> list[Any]:
    x = torch.randn(2, 3, 4)
    named: dict[str, Any] = {
        "x": x,
        "y": None,
        "z": None,
        "w": None,
        "v": None,
        "table": torch.rand(2, 6),
        "index": None,
        "key": None,
        "sample": None,
        "first_sample": 0,
        "rows_per_sample": 1,
        "first_element": 0,
        "columns": [0, 1, 2, -1],
        "op": "affine",
    }
    return list({**named, **given}.values())


def means_arguments(**given: Any) -> list[Any]:
    named: dict[str, Any] = {
        "pred": torch.randn(2, 3, 4),
        "y": None,
        "z": None,
        "table": torch.rand(1, 3),
        "index": None,
        "mask": None,
        "mask_key": None,
        "mask_sample": None,
        "mask_first_sample": 0,
        "thresholds": None,
        "keeps": False,
        "key": None,
        "sample": None,
        "first_sample": 0,
        "rows_per_sample": 1,
        "first_element": 0,
        "kind": 0,
        "columns": [1, 2, -1],
        "op": "noise_mse",
    }
    return list({**named, **given}.values())


KEY, IDS, INDEX = torch.tensor([3, -4]), torch.tensor([9, 2]), torch.tensor([1, 0])
STRUCK = torch.tensor([[2**30, 2**31], [0, 2**32]])


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 3, 4), dtype=dtype, requires_grad=True)


MASK = torch.rand(2, 3, 4) < 0.5
OP_CALLS: dict[str, tuple[str, list[Any]]] = {
    "affine": ("affine", affine_arguments(columns=[0, -1, -1, -1])),
    "affine noise": ("affine", affine_arguments(x=leaf(), key=KEY, first_sample=7)),
    "affine ids": ("affine", affine_arguments(x=leaf(), key=KEY, sample=IDS, index=INDEX)),
    "affine three tensors": ("affine", affine_arguments(x=leaf(), y=leaf(), z=leaf(), index=INDEX.int())),
    "affine four tensors": (
        "affine",
        affine_arguments(x=leaf(), y=leaf(), z=leaf(), w=leaf(), table=leaf(2, 6), columns=[0, 1, 2, 4]),
    ),
    "affine learned": (
        "affine",
        affine_arguments(x=leaf(), y=leaf(), key=KEY, table=leaf(2, 3)),
    ),
    "affine strided": (
        "affine",
        affine_arguments(x=leaf().detach().transpose(1, 2).requires_grad_(), y=torch.randn(2, 4, 3)),
    ),
    "affine bf16": ("affine", affine_arguments(x=leaf(dtype=torch.bfloat16), key=KEY)),
    "affine double": (
        "affine",
        affine_arguments(x=leaf(dtype=torch.float64), key=KEY, table=torch.rand(2, 3).double()),
    ),
    "embedding": ("embedding", [leaf(3, 2, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64), 9, True, "f"]),
    "affine2": ("affine2", affine_arguments(x=leaf(), key=KEY, columns=[0, -1, 1, -1, 2, -1, 3, -1])),
    "affine2 learned": (
        "affine2",
        affine_arguments(x=leaf(), y=leaf(), table=leaf(5, 6), index=INDEX, columns=[0, 1, -1, -1, 3, 4, -1, -1]),
    ),
    "sample_means": ("sample_means", means_arguments(key=KEY)),
    "sample_means tensors": ("sample_means", means_arguments(pred=leaf(), y=leaf(), z=leaf())),
    "sample_means mask": ("sample_means", means_arguments(pred=leaf(), key=KEY, sample=IDS, mask=MASK)),
    "sample_means drawn mask": (
        "sample_means",
        means_arguments(pred=leaf(), key=KEY, mask_key=torch.tensor([5, 6]), mask_sample=IDS, thresholds=STRUCK),
    ),
    "residual_grad drawn mask": (
        "residual_grad",
        [torch.rand(2), *means_arguments(key=KEY, mask_key=KEY, mask_first_sample=4, thresholds=STRUCK, keeps=True)],
    ),
    "sample_means learned": (
        "sample_means",
        means_arguments(pred=leaf(), y=leaf(), key=KEY, index=INDEX, table=leaf(4, 3)),
    ),
    "sample_means huber": (
        "sample_means",
        means_arguments(pred=leaf(), y=leaf(), key=KEY, table=torch.rand(2, 4), kind=2, columns=[1, 2, 3]),
    ),
    "residual_grad pseudo-huber": (
        "residual_grad",
        [torch.rand(2), *means_arguments(y=torch.randn(2, 3, 4), table=torch.rand(2, 4), kind=3, columns=[1, 2, 3])],
    ),
    "residual_grad": ("residual_grad", [torch.rand(2), *means_arguments(key=KEY, mask=MASK)]),
    "residual_grad tensors": ("residual_grad", [torch.rand(2), *means_arguments(y=torch.randn(2, 3, 4))]),
    "gaussian": ("gaussian", [leaf(), leaf(), None, KEY, IDS, 0, 1, 0, "reparameterise"]),
    "gaussian eps": ("gaussian", [leaf(), leaf(), leaf(), None, None, 0, 1, 0, "reparameterise"]),
    "gaussian_grad": (
        "gaussian_grad",
        [torch.randn(2, 3, 4), torch.randn(2), *torch.randn(2, 2, 3, 4), None, KEY, None, 5, 1, 0, "reparameterise"],
    ),
    "gaussian_grad of one": (
        "gaussian_grad",
        [None, torch.randn(2), *torch.randn(2, 2, 3, 4), torch.randn(2, 3, 4), None, None, 0, 1, 0, "reparameterise"],
    ),
    "corrupt": ("corrupt", [leaf(), torch.tensor([[2**30, 2**31]]), KEY, None, 5, 1, 0, -1.0, 0.5, "corrupt"]),
    "corrupt ids": (
        "corrupt",
        [leaf(), torch.tensor([[0, 2**31], [2**32, 2**32]]), KEY, IDS, 0, 1, 0, 0.0, 1.0, "corrupt"],
    ),
    "fold_in": ("fold_in", [KEY, torch.tensor(3)]),
    "fill normal": ("fill", ["normal", KEY, None, 5, 1, 8, 2, 7, torch.float16]),
    "fill bits": ("fill", ["bits", KEY, IDS, 0, 1, 4, 2, 7, torch.int64]),
}


def test_every_op_is_checked() -> None:
    from dae_fast import library

    assert {op for op, _ in OP_CALLS.values()} == set(library._SCHEMAS)


@pytest.mark.parametrize("name", OP_CALLS)
def test_opcheck(name: str) -> None:
    """Schema, fake kernel, autograd registration, and AOT dispatch with static and dynamic shapes."""
    op, arguments = OP_CALLS[name]
    torch.library.opcheck(getattr(torch.ops.dae_fast, op).default, arguments)


def test_ops_take_any_strides() -> None:
    """The kernels read tables, indices, keys and ids through bare addresses."""
    x = torch.randn(2, 3, 4)
    strided = {
        "x": x,
        "table": torch.rand(3, 5).T,
        "index": torch.tensor([[4, 0], [1, 0]])[:, 0],
        "key": torch.tensor([7, 0, 9, 0])[::2],
        "sample": torch.tensor([7, 0, 9, 0])[::2],
    }
    dense = {k: v.contiguous() for k, v in strided.items()}
    affine = torch.ops.dae_fast.affine
    assert torch.equal(affine(*affine_arguments(**strided)), affine(*affine_arguments(**dense)))
    for given in (strided, dense):
        given["pred"] = given.pop("x")
        given |= {"mask_key": given["key"], "mask_sample": given["sample"]}
    strided["thresholds"], dense["thresholds"] = STRUCK.T.contiguous().T, STRUCK
    means = torch.ops.dae_fast.sample_means
    assert torch.equal(means(*means_arguments(**strided)), means(*means_arguments(**dense)))
    fill = torch.ops.dae_fast.fill
    draws = [fill("normal", i["key"], i["sample"], 0, 1, 0, 2, 5, torch.float32) for i in (strided, dense)]
    assert torch.equal(*draws)


def test_what_is_kept_from_a_transform_that_has_ended(backend):
    """It is a tensor without memory of its own, which torch unwraps."""
    kept = []

    def remembered(x):
        kept.append(2 * x)
        return x.square().sum()

    x = torch.randn(4, 6)
    torch.func.grad(remembered)(x)
    leaf, level = torch.randn(4, 6, requires_grad=True), df.Level(0.6, 0.8)
    for y in (leaf, leaf.detach()):
        for call in (
            lambda t, y=y: df.noise_mse(y, t),
            lambda t, y=y: df.to_x0(y, t, level),
            lambda t: df.noise_mse(t, df.Noise(0)),
            lambda t: df.add_noise(t, df.Noise(0), level),
        ):
            torch.testing.assert_close(call(kept[0]), call(2 * x), rtol=1e-6, atol=0)
