"""The Triton backend: its kernels against the reference, in the interpreter or on a GPU, and its machine code.

The shared tests run every op on it too; here is what only this backend has: tiles, lanes, layouts, tickets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dae_fast as df
from dae_fast.kernels import reference
from dae_fast.kernels.spec import compute_dtype
from dae_fast.primitives.masks import Drawn

from .conftest import TRITON_BEFORE_3_9, some_longer

pytest.importorskip("triton")
import triton
import triton.language as tl

from dae_fast.kernels import triton as launcher
from dae_fast.kernels.triton import kernels

from .flat import KINDS, Flat, sums_of

backend = Flat(launcher)

if backend.available():
    pytest.skip(backend.available(), allow_module_level=True)

gpu = pytest.mark.gpu
on_a_gpu = pytest.mark.skipif(backend.INTERPRETED, reason="needs a GPU")


@triton.jit
def add_tiles_kernel(sums, tiles, out, B, ROWS: tl.constexpr):
    for first in range(0, B, ROWS):
        row = first + tl.arange(0, ROWS)
        tl.store(out + row, kernels.add_tiles(sums, tiles, row, B, ROWS), mask=row < B)


@triton.jit
def add_parts_kernel(sums, count, out):
    tl.store(out, kernels.add_parts(sums, count))


DEVICE = torch.device("cpu" if backend.INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Around the lanes of every element size, the short-row tiles and the long ones.
LENGTHS = (1, 3, 4, 15, 16, 17, 63, 64, 65, 784, 1025, 4097)


def few(cases: Iterable[Any], shown_always: Container[Any]) -> list[Any]:
    """All of the cases on a GPU; in the interpreter, where one takes up to seconds, the rest only with --longer."""
    return some_longer(cases, shown_always) if backend.INTERPRETED else list(cases)


VECTORS = json.loads((Path(__file__).parent / "noise_vectors.json").read_text())


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)


def table_of(dtype: torch.dtype, rows: int = 7, columns: int = 5) -> Tensor:
    return randn(rows, columns, dtype=compute_dtype(dtype), seed=9)


def levels(B: int, rows: int = 7) -> Tensor:
    return (torch.arange(B) * 5 % rows).to(DEVICE)


def normals(noise: df.Noise, like: Tensor) -> Tensor:
    """As this backend makes them, for the judge to use: their bits are tested by themselves."""
    B, D = like.shape[0], like[0].numel()
    return backend.normal(noise, B, D, torch.float64, DEVICE).reshape(like.shape)


def magnitude(tensors: tuple[Tensor | None, ...], table: Tensor) -> float:
    return float(sum(t.abs().max() for t in tensors if t is not None) * table.nan_to_num().abs().max()) * 4


def assert_close(got: Tensor, wanted: Tensor, scale: float) -> None:
    """Within half a unit of got's dtype, and a few roundings of the compute type at the terms' magnitude."""
    compute = torch.finfo(compute_dtype(got.dtype)).eps
    own = torch.finfo(got.dtype)
    bound = wanted.abs() * own.eps / 2 + own.smallest_normal * own.eps + 2 * compute * scale
    assert got.shape == wanted.shape
    assert torch.equal(got.isnan(), wanted.isnan())
    assert (((got.double() - wanted).abs() <= bound) | wanted.isnan()).all(), (got.double() - wanted).abs().max()


def check_affine(x, y, z, noise, table, index, columns, clamp=None, w=None) -> None:
    got = backend.affine("op", x, y, z, noise, table, index, columns, clamp, w=w)
    wide = [None if t is None else t.double() for t in (x, y, z, w)]
    fifth = None
    if isinstance(noise, Tensor):
        fifth = noise.double()
    elif len(columns) % 4:
        fifth = normals(noise, x)
    elif noise is not None:
        wide[2] = normals(noise, x)
    inside = None if index is None else (index >= 0) & (index < table.shape[0])
    safe = None if index is None else torch.where(inside, index, 0)
    wanted = Flat(reference).affine("op", *wide[:3], fifth, table.double(), safe, columns, clamp, wide[3])
    for g, o in zip(got, wanted, strict=True):
        assert g.dtype == x.dtype
        if inside is not None:
            o = torch.where(inside.reshape(-1, *[1] * (x.dim() - 1)), o, torch.nan)
        assert_close(
            g, o, magnitude((*wide, fifth, torch.ones(1)), table) * max(1.0, float(table.nan_to_num().abs().max()))
        )


PATTERNS = {
    "noise": ((0, -1, 1, -1), None),
    "two": ((0, 1, -1, -1), None),
    "three": ((0, 1, 2, -1), None),
    "scaled": ((1, -1, -1, -1), None),
    "second": ((-1, 1, -1, -1), None),
    "noise-and-target": ((0, -1, 1, -1, 2, -1, 3, -1), None),
    "noise-itself": ((0, -1, 1, -1, -1, -1, 3, -1), None),
    "tensor-and-target": ((0, 1, -1, -1, 2, 3, -1, -1), None),
    "gradients": ((0, 2, -1, -1, -1, 3, -1, -1), None),
    "clamp": ((-1, 1, -1, -1), (2, 3, -1, -1.0, 1.0)),
    "clamp-both": ((0, 1, -1, -1), (2, 3, -1, -1 / 3, 0.7)),
    "clamp-one": ((0, 1, -1, -1), (-1, 3, -1, -1.0, 1.0)),
    "clamp-step": ((0, 1, 2, -1), (3, 4, -1, -1.0, 1.0)),
    "four": ((0, 1, 2, 3), None),
    "fourth": ((-1, -1, -1, 3), None),
    "noise-and-fourth": ((0, -1, 1, 3), None),
    "fourth-of-the-second": ((0, 1, -1, -1, 2, -1, 3, 4), None),
    "clamp-of-the-fourth": ((0, 1, -1, -1), (2, 3, 4, -1.0, 1.0)),
    "clamp-step-of-four": ((0, 1, 2, 3), (3, -1, 4, -1.0, 1.0)),
}


@pytest.mark.parametrize("dtype", few(DTYPES, DTYPES[:3]), ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_affine_columns(pattern: str, dtype: torch.dtype) -> None:
    columns, clamp = PATTERNS[pattern]
    x, y, z, w = (randn(3, 2, 12, dtype=dtype, seed=s) for s in range(4))
    noise = df.Noise(5) if "noise" in pattern or "clamp-step" in pattern else None
    w = w if "four" in pattern else None
    check_affine(x, y, None if noise else z, noise, table_of(dtype), levels(3), columns, clamp, w)


@pytest.mark.parametrize("dtype", few(DTYPES, DTYPES[:3]), ids=str)
@pytest.mark.parametrize("drawn", [False, True], ids=["tensor", "noise"])
@pytest.mark.parametrize("shape", [(3, 2, 12), (3, 5, 7)], ids=str)
def test_affine_of_five_streams(shape: tuple[int, ...], drawn: bool, dtype: torch.dtype) -> None:
    x, y, z, w, v = (randn(*shape, dtype=dtype, seed=s) for s in range(5))
    noise = df.Noise(5) if drawn else v
    for columns, clamp in (((0, 1, 2, 3, 4), None), ((0, 1, 2, 3, 4, -1, 1, 0, -1, 2), (3, 4, 0, -1.0, 1.0))):
        check_affine(x, y, z, noise, table_of(dtype), levels(3), columns, clamp, w)
        mixed = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (y, w))
        check_affine(x, next(mixed), z, noise, table_of(dtype), levels(3), columns, clamp, next(mixed))


@pytest.mark.parametrize("D", few(LENGTHS, {*LENGTHS} - {784, 4097}))
def test_affine_lengths(D: int) -> None:
    x, y = randn(3, D), randn(3, D, seed=1)
    check_affine(x, y, None, df.Noise(5), table_of(x.dtype), levels(3), (0, 1, 2, -1))


@pytest.mark.parametrize("dtype", few(DTYPES[1:], DTYPES[1:3]), ids=str)
@pytest.mark.parametrize("D", (1, 3, 15, 65, 784))
def test_affine_lengths_of_other_types(D: int, dtype: torch.dtype) -> None:
    x = randn(2, D, dtype=dtype)
    check_affine(x, None, None, df.Noise(5), table_of(dtype), levels(2), (0, -1, 1, -1))


def test_affine_programs_take_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend._module, "_PROGRAMS", 4)
    backend._affine_call.cache_clear()
    for D in (1000, 5000):
        x = randn(2, D)
        check_affine(x, None, None, df.Noise(5), table_of(x.dtype), levels(2), (0, -1, 1, -1))
    backend._affine_call.cache_clear()


def test_affine_many_short_rows() -> None:
    x = randn(300, 2)
    check_affine(x, None, None, df.Noise(5), table_of(x.dtype, rows=300), None, (0, -1, 1, -1))


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: torch.cat((x, x), -1)[..., ::2],
    "rows-apart": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "permuted": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, :, ::1],
    "expanded-batch": lambda x: x[:1].expand(x.shape),
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].reshape(x.shape),
    "reversed": lambda x: x.transpose(2, 3),
}


SOME_LAYOUTS = ("channels_last", "rows-apart", "permuted", "misaligned")


@pytest.mark.parametrize(
    ("layout", "mixed"),
    few(product(LAYOUTS, (False, True)), [*product(LAYOUTS, (False,)), *product(SOME_LAYOUTS[::2], (True,))]),
)
def test_affine_layouts(layout: str, mixed: bool) -> None:
    x, y, w = (randn(2, 4, 6, 6, seed=s) for s in range(3))
    x, y, w = LAYOUTS[layout](x), y if mixed else LAYOUTS[layout](y), LAYOUTS[layout](w)
    table = table_of(x.dtype)
    check_affine(x, y, None, df.Noise(5), table, levels(2), (0, 1, 2, -1))
    check_affine(x, y, None, None, table, levels(2), (0, 1, -1, 2), w=w)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_have_no_none(layout: str) -> None:
    """Triton 3.6 compiles none in a tuple: by channels or not is told by the length."""
    sizes, _ = backend._batch((LAYOUTS[layout](randn(2, 4, 6, 6)),), True).layout
    assert sizes is None or (len(sizes) in (2, 4) and None not in sizes)


def unmergeable(seed: int) -> Tensor:
    """(2, 4, 3, 6, 2), no two dimensions of a row one in memory."""
    x = randn(2, 4, 7, 12, 4, seed=seed)[:, :, :6:2, ::2, ::2]
    assert backend._batch((x,), True).layout is backend.SCATTERED
    return x


@pytest.mark.parametrize("copied", (None, "x", "y", "w"))
def test_affine_video(copied: str | None) -> None:
    """(B, T, C, H, W) read as (B, C, T, H, W); a row of four dimensions that do not merge is copied."""
    video = {name: randn(2, 3, 4, 6, 2, seed=s).transpose(1, 2) for s, name in enumerate("xyw")}
    if copied:
        video[copied] = unmergeable(3)
    table = table_of(torch.float32)
    check_affine(video["x"], video["y"], None, df.Noise(5), table, levels(2), (0, 1, 2, 3), w=video["w"])


@pytest.mark.parametrize("which", ("x", "y", "z", "other"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced", "unmergeable"))
def test_affine_out(which: str, layout: str) -> None:
    if layout == "unmergeable":
        operands = [unmergeable(s) for s in range(4)]
    else:
        make = LAYOUTS.get(layout, lambda x: x)
        operands = [make(randn(2, 4, 6, 6, seed=s)) for s in range(4)]
    table = table_of(torch.float32)
    x, y, z, other = operands
    wanted = backend.affine("op", x, y, z, None, table, None, (0, 1, 2, -1, 2, 1, 0, -1))
    wanted = [w.clone() for w in wanted]
    out = {"x": x, "y": y, "z": z, "other": other}[which]
    got = backend.affine("op", x, y, z, None, table, None, (0, 1, 2, -1, 2, 1, 0, -1), out=out)
    assert got[0] is out
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_level_out_of_range_is_nan() -> None:
    x = randn(5, 17)
    for index in (torch.tensor([0, 7, 2, -1, 2**40]), torch.tensor([0, 7, 2, -1, -(2**31)], dtype=torch.int32)):
        check_affine(x, x, None, None, table_of(x.dtype), index.to(DEVICE), (0, 1, -1, -1))
        assert (
            backend.affine("op", x, x, None, None, table_of(x.dtype), index.to(DEVICE), (0, 1, -1, -1))[0][1]
            .isnan()
            .all()
        )


def test_absent_inputs_are_not_read() -> None:
    x, bad = randn(2, 8), torch.full((2, 8), torch.inf, device=DEVICE)
    table = table_of(x.dtype)
    assert backend.affine("op", x, bad, bad, None, table, None, (0, -1, -1, -1))[0].isfinite().all()
    two = backend.affine("op", bad, x, None, None, table, None, (-1, 1, -1, -1, 0, 1, -1, -1))
    assert two[0].isfinite().all() and not two[1].isfinite().any()


def test_coefficients_of_absent_inputs() -> None:
    x = randn(2, 8)
    table = table_of(x.dtype, rows=2)
    check_affine(x, None, None, None, table, None, (0, 1, 2, -1))
    check_affine(x, None, None, df.Noise(1), table, None, (0, 1, 2, -1))
    check_residual(x, None, None, None, table, None, (1, 2, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_coefficient_gives_zeros(dtype: torch.dtype) -> None:
    """The gradient of an input that only one of two outputs reads, or none."""
    x = randn(2, 8, dtype=dtype)
    for columns in ((-1,) * 4, (-1, -1, -1, -1, 1, -1, -1, -1), (1, *[-1] * 7)):
        got = backend.affine("op", x, None, None, None, table_of(dtype), None, columns)
        for k, o in enumerate(got):
            assert (o == 0).all() == (columns[4 * k] < 0)


def test_nan_passes_the_clamp() -> None:
    x = randn(2, 8)
    x[0, 3] = torch.nan
    (got,) = backend.affine("op", x, x, None, None, table_of(x.dtype), None, (-1, 1, -1, -1), (2, 3, -1, -1.0, 1.0))
    assert got.isnan().sum() == 1 and got[0, 3].isnan()


# Noise


@pytest.mark.parametrize("D", few(LENGTHS, {*LENGTHS} - {784, 4097}))
def test_words_are_the_reference_s(D: int) -> None:
    noise = df.Noise(3, first_sample=2**33).fold_in(2)
    assert torch.equal(backend.words(noise, 3, D, DEVICE), Flat(reference).words(noise, 3, D, DEVICE))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", VECTORS["rows"], ids=lambda c: f"seed-{c['seed']}")
def test_normals_of_the_vectors(case: dict, dtype: torch.dtype) -> None:
    """Within 4 units in the last place of the exact normal, or 2^-23 near zero."""
    noise = df.Noise(case["seed"], sample=torch.tensor(case["sample"], device=DEVICE)).fold_in(case["fold_in"])
    got = backend.normal(noise, len(case["sample"]), max(case["element"]) + 1, dtype, DEVICE)
    wanted = torch.tensor(case["value"], dtype=torch.float64, device=DEVICE)
    error = (got[:, case["element"]] - wanted).abs()
    assert (error <= torch.clamp(wanted.abs() * 4 * 2.0**-24, min=2.0**-23)).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_normals_are_those_of_fp32(dtype: torch.dtype) -> None:
    """Each type has lanes of its own."""
    noise = df.Noise(8)
    for B, D in ((2, 1025), (5, 9)):
        wanted = backend.normal(noise, B, D, torch.float32, DEVICE).to(dtype)
        assert torch.equal(backend.normal(noise, B, D, dtype, DEVICE), wanted)


@pytest.mark.skipif(TRITON_BEFORE_3_9 and backend.INTERPRETED, reason="that interpreter rounds an fma twice")
@pytest.mark.parametrize("dtype", few(DTYPES, DTYPES[:1]), ids=str)
def test_normals_have_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    native = Flat(pytest.importorskip("dae_fast.kernels.native"))
    noise = df.Noise(11).fold_in(1)
    for B, D in ((3, 4096), (5, 65), (130, 2)):
        here = backend.normal(noise, B, D, dtype, DEVICE).cpu()
        assert torch.equal(here, native.normal(noise, B, D, dtype, torch.device("cpu")))


def test_keys_and_samples() -> None:
    seed, first = -(2**63), 2**40 + 3
    noise = df.Noise(seed, first_sample=first).fold_in(7)
    wanted = Flat(reference).words(noise, 4, 21, DEVICE)
    ids = torch.arange(4, device=DEVICE) + first
    for same in (
        noise,
        noise.to(DEVICE),
        noise.to("cpu"),
        df.Noise(seed, sample=ids).fold_in(7),
        df.Noise(seed, sample=ids).fold_in(7).to(DEVICE),
    ):
        assert torch.equal(backend.words(same, 4, 21, DEVICE), wanted)
    raw = backend.words(noise, 3, 21, DEVICE, fold=False)
    assert torch.equal(raw, Flat(reference).words(noise, 3, 21, DEVICE, fold=False))
    assert torch.equal(raw[0], raw[2])


@pytest.mark.parametrize("data", (0, 1, 5, -1, 2**40, -(2**63)))
def test_fold_in_tensor(data: int) -> None:
    noise = df.Noise(12345).fold_in(3)
    wanted = torch.tensor(reference.fold_in(noise._seed, noise._offset, data))
    on_device = torch.tensor(data, device=DEVICE)
    assert torch.equal(backend.fold_in_tensor(noise, on_device).cpu(), wanted)
    assert torch.equal(backend.fold_in_tensor(noise.to(DEVICE), on_device).cpu(), wanted)
    assert torch.equal(backend.fold_in_tensor(noise.to(DEVICE), data).cpu(), wanted)


# Losses


def judge_residual(pred, y, z, noise, table, index, columns, mask, weight, reduction):
    wide = [None if t is None else t.double() for t in (pred, y, z)]
    if noise is not None:
        wide[2] = normals(noise, pred)
    wide[0].requires_grad_()
    sums, kept = sums_of("op", *wide, None, table.double(), index, columns, mask)
    means = sums / kept.clamp(min=1)
    w = 1 if weight is None else weight.double()
    loss = {0: (w * means).sum(), 1: (w * means).mean(), 2: (w * sums).sum()}[reduction]
    (grad,) = torch.autograd.grad(loss, wide[0])
    return means.detach(), loss.detach(), grad


def check_residual(
    pred, y, z, noise, table, index, columns, mask=None, weight=None, reduction=1, want=(True, True)
) -> None:
    call = "op", pred, y, z, noise, table, index, columns, mask, weight, reduction, *want
    per_sample, loss, grad = backend.residual(*call)
    means, wanted, wanted_grad = judge_residual(*call[1:-2])
    compute = compute_dtype(pred.dtype)
    assert (per_sample is None) == (want == (False, True)) and (loss is not None) == want[0]
    assert all(made is None or made.dtype == compute for made in (per_sample, loss))
    # Sums of squares: relative, of the running sums in the compute type.
    tolerance = {"rtol": 8 * torch.finfo(compute).eps, "atol": 0}
    if per_sample is not None:
        torch.testing.assert_close(per_sample.double(), means, **tolerance)
    if want[0] and reduction:
        torch.testing.assert_close(loss.double(), wanted, **tolerance)
    assert (grad is not None) == want[1]
    if grad is not None:
        assert_close(grad, wanted_grad, float(wanted_grad.abs().max()) + 1e-30)


@pytest.mark.parametrize("dtype", few(DTYPES, DTYPES[:3]), ids=str)
@pytest.mark.parametrize("reduction", (0, 1, 2))
def test_residual_reductions(reduction: int, dtype: torch.dtype) -> None:
    pred = randn(5, 40, dtype=dtype)
    weight = torch.rand(5, dtype=torch.float64, device=DEVICE).to(torch.float32 if reduction == 1 else torch.float64)
    check_residual(pred, None, None, df.Noise(2), table_of(dtype), levels(5), (1, 2, -1), None, weight, reduction)


@pytest.mark.parametrize("want", ((True, False), (False, True), (False, False)), ids=("loss", "grad", "means"))
@pytest.mark.parametrize("D", (40, 4097))
def test_residual_parts(D: int, want: tuple[bool, bool]) -> None:
    pred, y = randn(3, D), randn(3, D, seed=1)
    check_residual(pred, y, None, None, table_of(pred.dtype, rows=1), None, (1, -1, -1), want=want)


@pytest.mark.parametrize("D", LENGTHS)
def test_residual_lengths(D: int) -> None:
    pred, z = randn(3, D), randn(3, D, seed=1)
    check_residual(pred, None, z, None, table_of(pred.dtype), levels(3), (1, 2, -1))


@pytest.mark.parametrize("shape", ((3, 2, 33), (2, 4097), (130, 3)))
@pytest.mark.parametrize("expanded", (False, True))
@pytest.mark.parametrize("reduction", (1, 2))
def test_residual_mask(shape: tuple[int, ...], expanded: bool, reduction: int) -> None:
    pred, y = randn(*shape), randn(*shape, seed=1)
    mask = randn(*shape, seed=2) < 0
    if expanded:
        mask = mask[:1].expand(shape)
    else:
        mask[1] = False  # nothing counts: mean 0, gradient 0
    pred = torch.where(mask, pred, torch.nan)
    table = table_of(pred.dtype)
    index = levels(shape[0])
    per_sample, loss, grad = backend.residual(
        "op", pred, y, None, None, table, index, (1, -1, -1), mask, None, reduction, True, True
    )
    clean = torch.where(mask, pred, 0.0)
    means, wanted, wanted_grad = judge_residual(clean, y, None, None, table, index, (1, -1, -1), mask, None, reduction)
    torch.testing.assert_close(per_sample.double(), means, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    assert_close(grad, wanted_grad, float(wanted_grad.abs().max()))


@pytest.mark.parametrize("layout", few(LAYOUTS, SOME_LAYOUTS))
def test_residual_layouts(layout: str) -> None:
    pred, y = LAYOUTS[layout](randn(2, 4, 6, 6)), randn(2, 4, 6, 6, seed=1)
    check_residual(pred, y, None, df.Noise(5), table_of(pred.dtype), levels(2), (1, 2, -1))


@pytest.mark.parametrize("shape", ((3, 16), (2, 4, 6, 6)))
def test_residual_made(shape: tuple[int, ...]) -> None:
    pred, y = randn(*shape), randn(*shape, seed=1)
    table = table_of(pred.dtype)
    call = "op", pred, y, None, None, table, levels(shape[0]), (1, -1, -1), None, None, 1
    made = backend.residual(*call, True, True)[2]
    assert backend.residual(*call, False, True, None, made)[2] is made
    poisoned = torch.full_like(made, torch.nan)
    one = torch.ones((), device=DEVICE)
    assert backend.residual(*call, False, True, one, poisoned)[2] is poisoned
    assert poisoned.isnan().all(), "an upstream of 1 leaves the gradient alone"
    assert backend.residual(*call, False, True, 2 * one, poisoned)[2] is poisoned
    assert torch.equal(poisoned, 2 * made)
    assert torch.equal(backend.residual(*call, False, True, 2 * one)[2], 2 * made)


@pytest.mark.parametrize(("D", "kept"), ((40, False), (40, True), (2100, True)))
def test_residual_drawn_mask(D: int, kept: bool) -> None:
    """As with the same mask in memory; a long row's count is put together from several programs."""
    pred, y = randn(3, D), randn(3, D, seed=1)
    thresholds = torch.tensor([[0, 2**30], [0, 0], [0, 2**32]], device=DEVICE)
    drawn = Drawn(df.Noise(8, sample=torch.tensor([5, -1, 2**40], device=DEVICE)), thresholds, kept)
    mask = (Flat(reference).words(drawn.noise, 3, D, DEVICE) < thresholds[:, 1:]) != kept
    choice = backend._choice(*drawn[:2], DEVICE)
    assert torch.equal(backend._count_drawn(pred.shape, choice, kept, DEVICE), mask.sum(1))
    call = "op", pred, y, None, df.Noise(2), table_of(pred.dtype), levels(3), (1, 2, -1)
    got, wanted = (backend.residual(*call, m, None, 1, True, True, kind=1) for m in (drawn, mask))
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_counted_in_any_layout(layout: str) -> None:
    mask = LAYOUTS[layout](randn(2, 4, 6, 6)) > 0
    for m in (mask, mask[:, :1].expand(2, 4, 6, 6), mask[:1].expand(2, 4, 6, 6), mask[..., :1].expand(2, 4, 6, 6)):
        assert torch.equal(backend._count_stored(m), m.sum((1, 2, 3)))


@pytest.mark.parametrize("shape", ((3, 40), (2, 70_000), (130, 3), (5, 2048), (7,), (3, 1)))
def test_masks_are_counted(shape: tuple[int, ...]) -> None:
    """In whole groups and ragged, on 16 bytes and not; a long row's count is put together from several programs."""
    room = randn(math.prod(shape) + 1) > 0
    for mask in (room[1:].view(shape), room[:-1].view(shape)):
        assert torch.equal(backend._count_stored(mask), mask.reshape(shape[0], -1).sum(1))


def test_nothing_is_counted_for_a_gradient_that_stands() -> None:
    mask, one = randn(3, 40) > 0, torch.ones((), device=DEVICE)
    choice = backend._choice(df.Noise(8), torch.tensor([[0, 2**30]], device=DEVICE), DEVICE)
    assert not backend._count_stored(mask, one).any()
    assert not backend._count_drawn(mask.shape, choice, True, DEVICE, one).any()
    assert torch.equal(backend._count_stored(mask, 2 * one), mask.sum(1))
    assert backend._count_drawn(mask.shape, choice, True, DEVICE, one.double() / 2).all()


@pytest.mark.parametrize("layout", few(LAYOUTS, SOME_LAYOUTS))
def test_drawn_masks_and_corruption_in_any_layout(layout: str) -> None:
    """Words belong to an element's logical place, whatever lies where in memory."""
    pred, y = (LAYOUTS[layout](randn(2, 4, 6, 6, seed=s)) for s in range(2))
    thresholds = torch.tensor([[2**30, 2**31]], device=DEVICE)
    drawn = Drawn(df.Noise(8).to("cpu"), thresholds, False)
    mask = (Flat(reference).words(drawn.noise, 2, 144, DEVICE) < 2**31).reshape(pred.shape)
    call = "op", pred, y, None, None, table_of(pred.dtype).abs(), levels(2), (1, -1, 3)
    got, wanted = (backend.residual(*call, m, None, 1, True, True, kind=2) for m in (drawn, mask))
    assert torch.equal(got[2], wanted[2])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=0)
    assert torch.equal(
        backend.corrupt(pred, drawn.noise, thresholds, 0.0, 1.0),
        Flat(reference).corrupt(pred, drawn.noise, thresholds, 0.0, 1.0),
    )


def test_drawn_masks_and_corruption_of_copied_rows() -> None:
    pred, y = unmergeable(0), unmergeable(1)
    drawn = Drawn(df.Noise(8), torch.tensor([[2**30, 2**31]], device=DEVICE), True)
    call = "op", pred, y, None, None, table_of(pred.dtype).abs(), levels(2), (1, -1, 3)
    dense = "op", pred.contiguous(), y.contiguous(), *call[3:]
    got, wanted = (backend.residual(*c, drawn, None, 1, True, True, kind=3) for c in (call, dense))
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
    corruption = drawn.noise, drawn.thresholds, 0.0, 1.0
    assert torch.equal(backend.corrupt(pred, *corruption), Flat(reference).corrupt(pred, *corruption))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", range(4), ids=KINDS)
def test_gradients_have_the_bits_of_the_cpu(kind: int, dtype: torch.dtype) -> None:
    """Division and square root included. An interpreter that rounds an fma twice would show in pseudo_huber."""
    native = Flat(pytest.importorskip("dae_fast.kernels.native"))
    if backend.INTERPRETED and kind == 3 and dtype != torch.float64:
        pytest.skip("needs a GPU")
    pred, y = randn(4, 256, dtype=dtype), randn(4, 256, dtype=dtype, seed=1)
    table = torch.tensor([[1.0, -1.0, 0.0, 0.7]], dtype=compute_dtype(dtype), device=DEVICE)
    rest = (1, -1, 3 if kind > 1 else -1), None, None, 1, True, True
    here = backend.residual("op", pred, y, None, None, table, None, *rest, kind=kind)[2]
    there = native.residual("op", pred.cpu(), y.cpu(), None, None, table.cpu(), None, *rest, kind=kind)[2]
    assert torch.equal(here.cpu(), there)


def test_residual_level_out_of_range_is_nan() -> None:
    pred = randn(3, 16)
    index = torch.tensor([0, 99, 1], device=DEVICE)
    per_sample, loss, grad = backend.residual(
        "op", pred, pred, None, None, table_of(pred.dtype), index, (1, -1, -1), None, None, 1, True, True
    )
    assert per_sample.isnan().tolist() == [False, True, False]
    assert loss.isnan()
    assert grad.isnan().all(1).tolist() == [False, True, False]


def test_rows_are_not_cut_where_there_are_enough() -> None:
    """For sums: each row that is cut is one more to add up. No running sum has more than 64 terms."""
    for B, D in ((4096, 784), (1024, 3072), (2**20, 64), (1024, 2**15)):
        assert backend._plan(B, D, 4, backend._STEPS_SUM)[0][0] == 1
    for B, D in ((64, 784), (4, 2**20), (1024, 2**15 + 1)):
        (along, _, _), steps, _, _ = backend._plan(B, D, 4, backend._STEPS_SUM)
        assert along > 1 and steps <= 64


@pytest.mark.parametrize(("B", "tiles"), ((1, 2048), (2, 1024), (8, 256), (16, 128), (64, 32), (128, 16), (512, 4)))
def test_last_program_takes_few_turns(B: int, tiles: int) -> None:
    rows = backend._final_rows(B, tiles)
    assert -(-B // rows) * -(-tiles * rows // 512) <= 8


def cut_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """The last program adds up `rows` at a time."""
    monkeypatch.setattr(backend._module, "_final_rows", lambda B, tiles: rows)
    backend._residual_call.cache_clear()


@pytest.fixture
def planned_again():
    yield
    backend._residual_call.cache_clear()


FINAL_ROWS = (1, 16, 128)
TILES = (1, 3, 4, 5, 8, 31, 33, 127, 128, 129, 513, 1025)


@pytest.mark.usefixtures("planned_again")
@pytest.mark.parametrize("rows, B", [(1, 15), (16, 1), (16, 15), (16, 16), (16, 17), (128, 129)])
def test_residual_of_cut_rows(rows: int, B: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_rows(monkeypatch, rows)
    pred = randn(B, 300)
    assert backend._plan(B, 300, 4, 64)[0][0] == 3
    weight = torch.rand(B, dtype=torch.float64, device=DEVICE)
    check_residual(pred, None, pred, None, table_of(pred.dtype), levels(B), (-1, 1, -1), None, weight)


@pytest.mark.parametrize(
    ("rows", "tiles"), few(product(FINAL_ROWS, TILES), [*product(FINAL_ROWS, TILES[:-2]), (16, 1025)])
)
def test_tiles_are_added(rows: int, tiles: int) -> None:
    B = rows + 1
    sums = randn(B, tiles, dtype=torch.float64)
    out = torch.zeros(B, dtype=torch.float64, device=DEVICE)
    add_tiles_kernel[(1,)](sums, tiles, out, B, rows)
    torch.testing.assert_close(out, sums.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", (1, 127, 128, 129, 2047, 2048, 2049, 4097))
def test_parts_are_added(count: int) -> None:
    sums, out = randn(count, dtype=torch.float64), torch.zeros(1, dtype=torch.float64, device=DEVICE)
    add_parts_kernel[(1,)](sums, count, out)
    torch.testing.assert_close(out[0], sums.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("planned_again")
@pytest.mark.parametrize(("D", "rows"), few(((40, 0), *((5000, rows) for rows in FINAL_ROWS)), ((40, 0), (5000, 16))))
def test_residual_ticket_starts_again(D: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace serves call after call, and only the last program reads it: here it is poisoned before each."""
    cut_rows(monkeypatch, rows)
    pred = randn(3 if rows else 300, D)
    sums = torch.empty(4096, dtype=torch.float64, device=DEVICE)
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(backend._module, "workspace", lambda device, doubles: (sums, ticket))
    losses = []
    for _ in range(2):
        sums.fill_(torch.nan)
        table = table_of(pred.dtype, rows=1)
        losses.append(
            backend.residual("op", pred, None, pred, None, table, None, (-1, 1, -1), None, None, 1, True, False)[1]
        )
        assert ticket == 0
    assert torch.equal(losses[0], losses[1]) and losses[0].isfinite()


def test_row_dots() -> None:
    for shape in ((3, 5), (2, 4, 6, 6), (2, 4097)):
        g, x, y = (randn(*shape, seed=s) for s in range(3))
        noise = df.Noise(4)
        got = backend.row_dots(g, x, y.flip(0).transpose(1, -1).transpose(1, -1), None, noise)
        wide = [g.double() * t.double() for t in (x, y.flip(0), normals(noise, g))]
        wanted = torch.stack([reference.per_sample_sum(t) for t in wide], -1)
        bound = torch.stack([reference.per_sample_sum(t.abs()) for t in wide], -1)
        assert got.dtype == torch.float64 and got.shape == (shape[0], 3)
        # Running sums in fp32 of at most a few terms each, then fp64.
        assert ((got - wanted).abs() <= 4 * torch.finfo(torch.float32).eps * bound).all()
    assert torch.equal(backend.row_dots(g, None, y, None, None)[:, [0, 2]], torch.zeros(2, 2, device=DEVICE))


def test_row_dots_of_absent_ones_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory that held something else."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    for shape in ((3, 5), (130, 2), (2, 4097)):
        g, y = randn(*shape), randn(*shape, seed=1)
        got = backend.row_dots(g, None, y, None, None)
        torch.testing.assert_close(got[:, 1], (g.double() * y.double()).sum(1), rtol=1e-4, atol=1e-4)
        assert (got[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("shape", ((0, 4), (3, 0), (0,)))
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    table = table_of(x.dtype)
    assert backend.affine("op", x, x, None, None, table, None, (0, 1, -1, -1))[0].shape == shape
    per_sample, loss, grad = backend.residual(
        "op", x, x, None, None, table, None, (1, -1, -1), None, None, 2, True, True
    )
    assert torch.equal(per_sample, torch.zeros(shape[0], device=DEVICE)) and loss == 0 and grad.shape == shape
    assert torch.equal(backend.row_dots(x, x, None, None, None), x.new_zeros(shape[0], 3, dtype=torch.float64))
    assert backend.normal(df.Noise(0), shape[0], 0, x.dtype, DEVICE).shape == (shape[0], 0)


def test_capture_of_what_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver would refuse to load it then, in words of its own."""
    monkeypatch.setattr(backend._module, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    call = backend._Call(backend.kernels.fill_kernel, torch.device("cuda", 0), (1, 1, 1), ("none like it",), (), ())
    with pytest.raises(RuntimeError, match=r"fill_kernel is not compiled yet .* once before the capture"):
        backend._launch(call, ())


# What only a GPU has


@gpu
@on_a_gpu
def test_no_synchronisation_and_no_recompilation() -> None:
    x, table = randn(64, 784), table_of(torch.float32, rows=64)
    index = levels(64, 64)

    def calls(seed: int) -> None:
        backend.affine("op", x, None, None, df.Noise(seed), table, index, (0, -1, 1, -1))
        backend.residual("op", x, None, None, df.Noise(seed), table, index, (1, 2, -1), None, None, 1, True, True)

    calls(1)
    compiled = len(backend._compiled)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in (2, 16, 2**40):
            calls(seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(backend._compiled) == compiled


@gpu
@on_a_gpu
def test_graphs_replay_with_new_keys_on_two_streams() -> None:
    x, table = randn(64, 784), table_of(torch.float32, rows=64)
    keys = [torch.tensor([seed, 0], device=DEVICE) for seed in (1, 2)]

    def loss(key: Tensor) -> Tensor:
        return backend.residual("op", x, None, None, df.Noise(key), table, None, (1, 2, -1), None, None, 1, True, True)[
            1
        ]

    loss(keys[0])
    graphs, results = [], []
    for key in keys:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(loss(key))
        graphs.append(graph)
    for key in keys:
        key += 5
    torch.cuda.synchronize()
    for graph in graphs:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.replay()
    torch.cuda.synchronize()
    for key, result in zip(keys, results, strict=True):
        assert torch.equal(result, loss(key))


@gpu
@on_a_gpu
def test_losses_have_the_same_bits_every_run() -> None:
    x = randn(256, 16384)
    call = "op", x, None, None, df.Noise(1), table_of(x.dtype, rows=1), None, (1, 2, -1), None, None, 1, True, False
    wanted = backend.residual(*call)[1]
    assert all(torch.equal(backend.residual(*call)[1], wanted) for _ in range(50))
