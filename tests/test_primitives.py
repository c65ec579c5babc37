"""The two primitives in all that they can do, and corruption: every backend against the fp64 reference.

The ops of the shared case list use part of it each; here are the combinations.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import dae_fast as df
from benchmarks.cases import DTYPES
from dae_fast.kernels import reference
from dae_fast.kernels.spec import BLEND, Coefficients, Kind, compute_dtype
from dae_fast.primitives.masks import Drawn

from .conftest import GPU_CODE, module_of, some_longer
from .flat import Flat, affine, sums_of

SHAPES = ((5, 2, 3, 8), (3, 1301), (9, 5), (2, 3, 7, 5))
NOISE = df.Noise(5).fold_in(3)

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# Every shape in fp32, every other dtype in a long row that ends raggedly.
SETTINGS = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[1], dtype) for dtype in DTYPES[1:]]
settings = pytest.mark.parametrize(
    ("shape", "dtype"), SETTINGS, ids=[f"{'x'.join(map(str, s))}-{str(d)[6:]}" for s, d in SETTINGS]
)


def randn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def table_of(dtype: torch.dtype, B: int, columns: int = 7) -> Tensor:
    return randn((B, columns), compute_dtype(dtype), 9)


def assert_close(got: Tensor, wanted: Tensor, terms: Tensor) -> None:
    """Within a rounding to got's dtype and some roundings of the terms, in the compute type."""
    compute = torch.finfo(compute_dtype(got.dtype)).eps
    allowed = torch.finfo(got.dtype).eps * wanted.abs() + 8 * compute * terms + torch.finfo(got.dtype).tiny
    assert torch.isfinite(got).all()
    assert ((got.double() - wanted).abs() <= allowed).all()


AFFINE = {
    "four tensors": ((0, 1, 2, 3), None, False),
    "guidance and noise": ((0, 1, 2, 3), None, True),
    "w alone": ((-1, -1, -1, 3), None, False),
    "noise alone": ((-1, -1, 2, -1), None, True),
    "x and w": ((0, -1, -1, 3), None, False),
    "two outputs": ((0, 1, 2, 3, 4, 5, -1, -1), None, True),
    "w in the second": ((0, 1, 2, -1, -1, -1, -1, 3), None, False),
    "clamped": ((0, 1, -1, -1), (4, 5, -1, -0.5, 0.7), False),
    "clamped guidance": ((0, 1, 2, -1), (3, 4, 5, -0.5, 0.7), True),
    "clamped, w in both": ((0, 1, 2, 3), (4, 5, 6, -0.5, 0.7), True),
    "clamped, w outside": ((0, 1, -1, 3), (4, 5, -1, -1.0, 1.0), False),
    "clamped, two outputs": ((0, 1, 2, 3, -1, 1, -1, -1), (4, 5, -1, -0.5, 0.7), True),
    "five tensors": ((0, 1, 2, 3, 4), None, False),
    "four tensors and noise": ((0, 1, 2, 3, 4), None, True),
    "five, two outputs": ((0, 1, 2, -1, -1, 3, 0, 1, -1, 5), None, False),
    "five, clamped, two outputs": ((0, 1, 2, 3, -1, 1, 2, -1, 0, -1), (4, 5, 6, -0.5, 0.7), True),
}
BLENDED = {
    "blended": ((0, BLEND, 2, BLEND), None, False),
    "blended, noise": ((0, BLEND, 2, BLEND), None, True),
    "blended, one tensor": ((0, BLEND, -1, BLEND), None, False),
}


def streams(columns: tuple[int, ...], fresh: bool, z: Tensor, v: Tensor) -> tuple[Tensor | None, Any]:
    """z and the noise, which may be a tensor of five streams."""
    if len(columns) % 4:
        return z, NOISE if fresh else v
    return (None, NOISE) if fresh else (z, None)


@settings
@pytest.mark.parametrize("pattern", AFFINE)
def test_affine(backend: str, pattern: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    columns, clamp, fresh = AFFINE[pattern]
    x, y, z, w, v = (randn(shape, dtype, seed) for seed in range(5))
    third, noise = streams(columns, fresh, z, v)
    table = table_of(dtype, shape[0])
    got = module_of(backend).affine("op", x, y, third, noise, table, None, columns, clamp, w=w)
    eps = NOISE.normal(shape, dtype=torch.float64) if fresh else v
    exact = [t.double() for t in (x, y, eps if third is None else z, w, eps, table)]

    def judge(x: Tensor, y: Tensor, z: Tensor, w: Tensor, v: Tensor, table: Tensor, clamp: Any) -> tuple[Tensor, ...]:
        fifth = v if len(columns) % 4 else None
        return Flat(reference).affine("op", x, y, z, fifth, table, None, columns, clamp, w)

    wanted = judge(*exact, clamp)
    sizes = judge(*(t.abs() for t in exact), clamp and (*clamp[:3], -1e9, 1e9))
    assert len(got) == len(columns) // 4
    for g, value, terms in zip(got, wanted, sizes, strict=True):
        assert_close(g, value, terms)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in Triton's interpreter
@settings
@pytest.mark.parametrize("pattern", BLENDED)
def test_blended(backend: str, pattern: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """w + y*(v - w), v = c0*x + c2*z; where y is 0 or 1 the other of them may be anything."""
    columns, _, fresh = BLENDED[pattern]
    x, w, z = (randn(shape, dtype, seed) for seed in range(3))
    m = randn(shape, dtype, 3).clamp(0, 1)
    soft = (m > 0) & (m < 1)
    assert soft.any() and (m == 0).any() and (m == 1).any()
    x[m == 0], w[m == 1] = math.nan, math.inf
    third, noise = (None, NOISE) if fresh else (z if columns[2] >= 0 else None, None)
    table = table_of(dtype, shape[0])
    (got,) = module_of(backend).affine("op", x, m, third, noise, table, None, columns, None, w=w)
    c = [column.double().reshape(-1, *[1] * (len(shape) - 1)) for column in table.T]
    of_z = c[2] * (NOISE.normal(shape, dtype=torch.float64) if fresh else z.double()) if columns[2] >= 0 else 0 * c[2]
    v, w, m = c[0] * x.double() + of_z, w.double(), m.double()
    wanted = torch.where(m == 0, w, torch.where(m == 1, v, w + m * (v - w)))
    sizes = torch.where(soft, (c[0] * x.double()).abs() + of_z.abs() + 2 * w.abs(), wanted.abs() + of_z.abs())
    assert_close(got, wanted, sizes)


@pytest.mark.parametrize("clamped", [False, True])
def test_an_absent_product_changes_no_zero(backend: str, clamped: bool) -> None:
    """1 * -0 + 0 * eps has the sign of eps; a third product, 0 * 0, would make every one of them +0."""
    x, table = torch.full((3, 40), -0.0), torch.tensor([[1.0, 0.0]])
    clamp = (0, -1, -1, -1.0, 1.0) if clamped else None  # of an estimate that nothing reads
    got = module_of(backend).affine("op", x, None, None, NOISE, table, None, (0, -1, 1, -1), clamp)[0]
    assert torch.equal(got.signbit(), NOISE.normal((3, 40)) < 0)
    assert not got.any()


@all_dtypes
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (3, 5, 4, 8)], ids=["odd", "whole groups"])
def test_affine_of_four_tensors_in_any_layout(
    backend: str, shape: tuple[int, ...], fresh: bool, dtype: torch.dtype
) -> None:
    inputs = [randn(shape, dtype, seed) for seed in range(4)]
    table = table_of(dtype, 3)

    def call(x: Tensor, y: Tensor, z: Tensor, w: Tensor, **out: Tensor) -> Tensor:
        third, noise = (None, NOISE) if fresh else (z, None)
        module = module_of(backend)
        return module.affine("op", x, y, third, noise, table, None, (0, 1, 2, 3), (4, 5, 6, -1.0, 1.0), w=w, **out)[0]

    expected = call(*inputs)
    last = [t.contiguous(memory_format=torch.channels_last) for t in inputs]
    assert torch.equal(call(*last), expected)
    for k in range(4):
        mixed = [last[i] if i == k else t for i, t in enumerate(inputs)]
        assert torch.equal(call(*mixed), expected)
    if backend == "reference":  # it has no out
        return
    w = inputs[3].clone()
    assert torch.equal(call(*inputs[:3], w, out=w), expected)  # in place of an input
    assert torch.equal(w, expected)


def test_an_absent_w_is_not_read(backend: str) -> None:
    x, w = randn((3, 50), torch.float32, 0), torch.full((3, 50), float("nan"))
    table = table_of(torch.float32, 3)
    got = module_of(backend).affine("op", x, None, None, None, table, None, (0, -1, -1, -1), w=w)[0]
    assert torch.isfinite(got).all()


BOUNDS = (-0.5, 0.5)
GRADIENTS = {
    "two outputs": ((0, 1, 2, 3, -1, 4, -1, 5), None, False),
    "clamped": ((0, 1, 2, 3), (4, 5, 6, *BOUNDS), False),
    "clamped, noise": ((0, 1, 2, 3), (4, 5, 6, *BOUNDS), True),
    "clamped, two outputs": ((0, 1, 2, 3, 3, 2, 1, 0), (4, 5, 6, *BOUNDS), False),
    "clamped, two outputs, noise": ((0, 1, 2, -1, -1, 3, -1, 4), (4, 5, 6, *BOUNDS), True),
    "clamped, the second without it": ((-1, 1, -1, -1, 2, -1, 3, -1), (4, 5, -1, *BOUNDS), False),
    "clamped from below": ((0, 1, 2, 3), (4, 5, 6, -0.5, math.inf), False),
    "clamped from above": ((0, 1, 2, 3), (4, 5, 6, -math.inf, 0.5), False),
    "clamped by nothing": ((0, 1, 2, 3), (4, 5, 6, -math.inf, math.inf), False),
    "clamped, w outside": ((0, 1, -1, 3), (4, 5, -1, *BOUNDS), False),
    "blended": ((0, BLEND, 1, BLEND), None, False),
}
LEVELS = {"each its row": (2, None), "one row": (1, None), "levels": (3, torch.tensor([2, 0]))}


def mapped(
    pattern: str, x: Tensor, y: Tensor, z: Tensor, w: Tensor, table: Tensor, t: Tensor | None = None
) -> tuple[Tensor, ...]:
    columns, clamp, fresh = GRADIENTS[pattern]
    third, noise = (None, NOISE) if fresh else (z, None)
    return affine("op", x, y, third, noise, Coefficients(table, t), columns, clamp, w)


# How a table's rows are found has nothing to do with the bounds of a clamp.
EVERY_WAY = ("two outputs", "clamped, two outputs, noise", "clamped, w outside", "blended")


@pytest.mark.parametrize(
    ("pattern", "levels"),
    some_longer(
        product(GRADIENTS, LEVELS),
        [*product(EVERY_WAY, LEVELS), *product(GRADIENTS, ("levels",))],
    ),
)
def test_gradients_of_four_tensors(backend: str, pattern: str, levels: str) -> None:
    """Of every input and coefficient, with a clamp and without, first and second order, and batched."""
    count, t = LEVELS[levels]
    if backend in GPU_CODE and t is None:
        pytest.skip("slow there; what differs is not the backend's")
    tensors = [randn((2, 3), torch.float64, seed).requires_grad_() for seed in range(4)]
    table = randn((count, 7), torch.float64, 9).requires_grad_()

    def f(*inputs: Tensor) -> tuple[Tensor, ...]:
        return mapped(pattern, *inputs, t=t)

    assert torch.autograd.gradcheck(f, (*tensors, table), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (*tensors, table))


@pytest.mark.parametrize("pattern", [p for p in GRADIENTS if "clamped" in p])
def test_clamped_gradients_are_those_of_plain_torch(backend: str, pattern: str) -> None:
    """All of them, each alone, and from each output alone; the values are those of a call without gradients."""
    shape, (columns, clamp, fresh) = (3, 70), GRADIENTS[pattern]
    leaves = [randn(shape, torch.float64, seed).requires_grad_() for seed in range(4)]
    leaves.append(randn((3, 7), torch.float64, 9).requires_grad_())
    outputs = mapped(pattern, *leaves)
    with torch.no_grad():
        assert all(map(torch.equal, outputs, mapped(pattern, *leaves)))
    x, y, z, w, table = leaves
    c = [column[:, None] for column in table.T]
    a0, a1, a3, lo, hi = clamp
    within = sum(c[a] * t for a, t in ((a0, x), (a1, y), (a3, w)) if a >= 0).clamp(lo, hi)
    third = NOISE.normal(shape, dtype=torch.float64) if fresh else z
    plain = [
        sum(c[k] * t for k, t in zip(columns[i : i + 4], (x, within, third, w), strict=True) if k >= 0)
        for i in range(0, len(columns), 4)
    ]
    upstream = [randn(shape, torch.float64, 20 + k) for k in range(len(plain))]
    for chosen in (slice(None), slice(1), slice(1, None))[: 2 * len(plain) - 1]:
        arguments = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        want = torch.autograd.grad(plain[chosen], leaves, upstream[chosen], **arguments)
        got = torch.autograd.grad(outputs[chosen], leaves, upstream[chosen], **arguments)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        for leaf, g in zip(leaves, got, strict=True):
            alone = mapped(pattern, *(t if t is leaf else t.detach() for t in leaves))
            if all(a.requires_grad for a in alone[chosen]):
                (again,) = torch.autograd.grad(alone[chosen], leaf, upstream[chosen], **arguments)
                torch.testing.assert_close(again, g, rtol=1e-12, atol=1e-12)


LARGEST = torch.finfo(torch.float32).max
SIDES = [(-1.0, 1.0), (0.1, 0.1), (-math.inf, 1.0), (-1.0, math.inf), (-math.inf, math.inf), (-LARGEST, LARGEST)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("lo", "hi"), SIDES)
def test_gradients_at_the_bounds_are_torchs(backend: str, lo: float, hi: float, dtype: torch.dtype) -> None:
    """For estimates at a bound, beside it, infinite and NaN, in vectors and in the rest of a row."""
    special = [lo, hi, -0.0, 0.0, -math.inf, math.inf, math.nan, -2.0, 2.0, torch.finfo(dtype).max]
    one = torch.tensor(special, dtype=dtype)
    beside = [one.nextafter(torch.full_like(one, s * math.inf)) for s in (1, -1)]
    y = torch.cat((one, *beside)).repeat(1, 5)[:, :139].requires_grad_()
    table = torch.ones(1, 1, dtype=dtype)
    for upstream in (torch.arange(139, dtype=dtype)[None] - 50, torch.full_like(y, math.inf), y.detach()):
        (out,) = affine(
            "op", y.detach(), y, None, None, Coefficients(table, None), (-1, 0, -1, -1), (-1, 0, -1, lo, hi)
        )
        got = torch.autograd.grad(out, y, upstream)
        want = torch.autograd.grad(y.clamp(lo, hi), y, upstream)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_have_gradients_where_the_forward_does_not_clamp(backend: str, dtype: torch.dtype) -> None:
    """The estimate x + y/64 is exact in fp32; some of those outside the bounds would round to a bound."""
    x = torch.where(randn((3, 70), dtype, 0) > 0, 1, -1).to(dtype).requires_grad_()
    y = (0.1 * randn((3, 70), torch.float64, 1)).to(dtype).requires_grad_()
    table = torch.tensor([[1.0, 2.0**-6]])
    (out,) = affine("op", x, y, None, None, Coefficients(table, None), (-1, 0, -1, -1), (0, 1, -1, -1.0, 1.0))
    estimate = (x.double() + y.double() / 64).detach()
    inside = estimate.abs() <= 1
    assert (inside != (estimate.to(dtype).abs() <= 1)).any()
    for g, coefficient in zip(torch.autograd.grad(out.sum(), (x, y)), table[0], strict=True):
        assert torch.equal(g, inside.to(dtype) * coefficient.to(dtype))


KINDS = ("mse", "l1", "huber", "pseudo_huber")


def masks(shape: tuple[int, ...]) -> dict[str, Tensor | Drawn | None]:
    p = torch.rand(shape[0], generator=torch.Generator().manual_seed(0)).double()
    each = (p * 2**32).long()[:, None].expand(-1, 2).contiguous()
    some = torch.tensor([[2**31, 2**32 * 3 // 4]])
    return {
        "all": None,
        "tensor": torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5,
        "masked": Drawn(df.Noise(8), some, False),
        "left": Drawn(df.Noise(8, first_sample=3), some, True),
        "masked, each sample at its own rate": Drawn(df.Noise(8), each, False),
        "none": Drawn(df.Noise(8), torch.zeros(1, 2, dtype=torch.int64), False),
    }


@settings
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask_name", masks((1,)))
def test_residual(backend: str, mask_name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if backend == "reference":
        pytest.skip("the judge")
    B, mask = shape[0], masks(shape)[mask_name]
    pred, y = randn(shape, dtype, 0), randn(shape, dtype, 1)
    number = KINDS.index(kind)
    table = torch.cat((table_of(dtype, B, 3), table_of(dtype, B, 1).abs() + 0.3), 1)
    columns = (1, 2, 3 if number > 1 else -1)
    weight = torch.rand(B, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    got = module_of(backend).residual(
        "op", pred, y, None, NOISE, table, None, columns, mask, weight, 1, True, True, kind=number
    )
    wide_mask = mask.on(pred) if isinstance(mask, Drawn) else mask
    wide = pred.double().requires_grad_()
    eps = NOISE.normal(shape, dtype=torch.float64)
    sums, kept = sums_of("op", wide, y.double(), eps, None, table.double(), None, columns, wide_mask, number)
    means = sums / kept.clamp(min=1)
    loss = (weight * means).mean()
    (grad,) = torch.autograd.grad(loss, wide)
    eps32 = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got[0].double(), means.detach(), rtol=eps32, atol=eps32)
    torch.testing.assert_close(got[1].double(), loss.detach(), rtol=eps32, atol=eps32)
    # Of the residual's own roundings, then one to the dtype; rho' of l1 and Huber jumps or bends, but continuously
    # enough: l1's jump at 0 is not met by these values.
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(
        got[2].double(), grad, rtol=torch.finfo(dtype).eps, atol=float(eps32 * grad.abs().max()) + tiny
    )
    if wide_mask is not None:
        assert (got[2][~wide_mask] == 0).all()


# Short rows, rows of one tile, rows of several, and more rows than the last program takes at a time.
WEIGHED_SHAPES = ((9, 5), (70, 3, 8), (3, 9001), (131, 2500))


WEIGHED_INDICES = {"rows": None, "levels": torch.int64, "int32 levels": torch.int32}
WEIGHED_OPTIONS = ("alone", "weight and mask", "sum", "one row", "bf16", "fp64")


# Each option with each shape, and each index with each of both.
@pytest.mark.parametrize(
    ("shape", "index", "options"),
    [
        pytest.param(shape, list(WEIGHED_INDICES.values())[(i + j) % 3], options, id=f"{options}-{shape}")
        for i, options in enumerate(WEIGHED_OPTIONS)
        for j, shape in enumerate(WEIGHED_SHAPES)
    ],
)
def test_residual_weighing(backend: str, options: str, index: torch.dtype | None, shape: tuple[int, ...]) -> None:
    """One more factor of the weight and two further means, read from the table when the loss is summed."""
    if backend == "reference":
        pytest.skip("its means are weighed by torch")
    B, dtype = shape[0], {"bf16": torch.bfloat16, "fp64": torch.float64}.get(options, torch.float32)
    pred, y = randn(shape, dtype, 0), randn(shape, dtype, 1)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5 if "mask" in options else None
    weight = torch.rand(B, generator=torch.Generator().manual_seed(4)) if "weight" in options else None
    levels = 1 if options == "one row" and index is None else B if index is None else 7
    table = table_of(dtype, levels, 7)
    t = None if index is None else torch.randint(7, (B,), generator=torch.Generator().manual_seed(2)).to(index)
    reduction, also = 2 if options == "sum" else 1, table.new_full((2,), torch.nan)
    columns = (1, -1, -1, 3, 6, 5)
    per_sample, loss, grad = module_of(backend).residual(
        "op", pred, y, None, None, table, t, columns, mask, weight, reduction, True, True, also=also
    )
    wide = pred.double().requires_grad_()
    sums, kept = sums_of("op", wide, y.double(), None, None, table.double(), t, columns[:3], mask)
    means = sums / kept.clamp(min=1)
    factor, *others = (
        reference.coefficients(table.double(), t, "op", pred)[:, list(columns[3:])].expand(B, -1).unbind(1)
    )
    w = factor if weight is None else factor * weight.double()
    wanted = (w * sums).sum() if reduction == 2 else (w * means).mean()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert_sum(loss, wanted.detach(), (w * (sums if reduction == 2 else means / B)).abs().sum().detach(), tolerance)
    for got, other in zip(also, others, strict=True):
        assert_sum(got, (other * means).mean().detach(), (other * means).abs().mean().detach(), tolerance)
    torch.testing.assert_close(per_sample.double(), means.detach(), rtol=tolerance, atol=tolerance)
    (wanted_grad,) = torch.autograd.grad(wanted, wide)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        grad.double(), wanted_grad, rtol=rounding, atol=float(tolerance * wanted_grad.abs().max())
    )


def assert_sum(got: Tensor, wanted: Tensor, terms: Tensor, tolerance: float) -> None:
    """Terms of both signs may cancel: what they lost is measured by their size."""
    assert (got.double() - wanted).abs() <= tolerance * terms


@pytest.mark.parametrize("kind", KINDS)
def test_penalties_are_torchs(kind: str) -> None:
    r = torch.cat((torch.linspace(-3, 3, 1001, dtype=torch.float64), torch.tensor([0.0, 1e-9, -1e-9, 1e9]).double()))
    zero, delta = torch.zeros_like(r), torch.tensor(0.7, dtype=torch.float64)
    F = torch.nn.functional
    wanted = {
        "mse": F.mse_loss(r, zero, reduction="none"),
        "l1": F.l1_loss(r, zero, reduction="none"),
        "huber": F.huber_loss(r, zero, reduction="none", delta=0.7),
        "pseudo_huber": 2 * 0.7 * (torch.hypot(r, delta) - 0.7),
    }[kind]
    number = KINDS.index(kind)
    torch.testing.assert_close(reference.penalty(r, Kind(number), delta), wanted, rtol=1e-12, atol=1e-15)
    leaf = r.clone().requires_grad_()
    (grad,) = torch.autograd.grad(reference.penalty(leaf, Kind(number), delta).sum(), leaf)
    torch.testing.assert_close(reference.slope(r, Kind(number), delta), grad, rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow, numpy's, in Triton's interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_residual_of_nan_and_of_nothing(backend: str, kind: str) -> None:
    """NaN reaches the loss and its own gradient; a residual of 0 costs nothing and has no slope."""
    number = KINDS.index(kind)
    table = torch.tensor([[1.0, -1.0, 0.0, 0.5]])
    columns = (1, -1, 3 if number > 1 else -1)
    if backend == "reference":
        pytest.skip("it makes no gradient of its own")
    pred = randn((2, 70), torch.float32, 0)
    zero = module_of(backend).residual(
        "op", pred, pred.clone(), None, None, table, None, columns, None, None, 1, True, True, kind=number
    )
    assert zero[1] == 0 and (zero[2] == 0).all()
    bad = pred.clone()
    bad[1, 3] = float("nan")
    _, loss, grad = module_of(backend).residual(
        "op", bad, pred + 1, None, None, table, None, columns, None, None, 1, True, True, kind=number
    )
    assert loss.isnan() and grad.isnan().sum() == 1 and grad[1, 3].isnan()
    bad[1, 3], bad[0, 5] = -torch.inf, 3e38
    _, loss, grad = module_of(backend).residual(
        "op", bad, pred + 1, None, None, table, None, columns, None, None, 1, True, True, kind=number
    )
    assert loss == torch.inf
    slope = -torch.inf if kind == "mse" else grad[1, 2:5].min()
    assert grad[1, 3] == slope and grad[0, 5] > 0 and not grad.isnan().any()


@settings
def test_corrupt(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Exactly the reference's elements, in any layout; what is masked is not read."""
    x = randn(shape, dtype, 0)
    each = (torch.rand(shape[0], 2, generator=torch.Generator().manual_seed(3)).sort(1).values.double() * 2**32).long()
    for thresholds in (torch.tensor([[2**30, 2**31]]), torch.tensor([[0, 0]]), torch.tensor([[2**32, 2**32]]), each):
        wanted = Flat(reference).corrupt(x, NOISE, thresholds, -2.0, 0.3)
        got = module_of(backend).corrupt(x, NOISE, thresholds, -2.0, 0.3)
        assert got.dtype == dtype
        assert torch.equal(got, wanted)
        if x.dim() == 4:
            last = x.contiguous(memory_format=torch.channels_last)
            assert torch.equal(module_of(backend).corrupt(last, NOISE, thresholds, -2.0, 0.3), wanted)
    everything = torch.tensor([[0, 2**32]])
    assert (module_of(backend).corrupt(x * float("nan"), NOISE, everything, 0.0, 1.0) == 1).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_coefficients_pass_through_no_half(backend: str, compiled: bool) -> None:
    """The gradient of pred is beyond fp16 here, those of the coefficients are sums that are not."""
    noise = df.Noise(3)
    pred, y = (torch.randn(2, 4096, generator=torch.Generator().manual_seed(k)).half() for k in (1, 2))
    coefficients = [torch.tensor([0.6, 0.7], requires_grad=True), torch.tensor([0.8, 0.5], requires_grad=True)]
    leaf = y.clone().requires_grad_()

    def loss(pred: Tensor, leaf: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return 1e8 * df.residual_loss(pred, (a, leaf), (b, noise))

    run = torch.compile(loss, backend="aot_eager") if compiled else loss
    found = torch.autograd.grad(run(pred, leaf, *coefficients), (*coefficients, leaf))
    wide = [c.detach().double().requires_grad_() for c in (*coefficients, leaf)]
    eps = noise.normal(pred.shape, dtype=torch.float64)
    r = pred.double() - wide[0][:, None] * wide[2] - wide[1][:, None] * eps
    right = torch.autograd.grad(1e8 * r.square().mean(), wide)
    for f, e in zip(found[:2], right[:2], strict=True):
        torch.testing.assert_close(f.double(), e, rtol=2e-6, atol=0)
    inside = right[2].abs() < 65000
    assert 0 < inside.logical_not().sum() < 1000
    torch.testing.assert_close(found[2].double()[inside], right[2][inside], rtol=2**-10, atol=1e-3)
