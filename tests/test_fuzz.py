"""The ops against tests/formulas.py on what hypothesis thinks of: shapes, strides, dtypes, kinds, masks, threads.

`make test` takes few examples, the same every time; `make fuzz` takes as many as its hours allow.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import assume, given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import dae_fast as df  # noqa: E402

from . import formulas  # noqa: E402
from .conftest import BACKENDS, ISAS  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCHEDULES = (df.Schedule.linear(50), df.Schedule.cosine(30), df.Schedule.flow(20), df.Schedule.karras(T=12))
LENGTHS = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 341, 512, 1023, 1024, 1025, 2100])


@st.composite
def shapes(draw, least=1):
    """(B, ...) of up to some 10,000 elements."""
    B = draw(st.integers(0, 5))
    rest = draw(st.one_of(st.tuples(LENGTHS), st.lists(st.integers(0, 9), min_size=least - 1, max_size=4).map(tuple)))
    return (B, *rest)


@st.composite
def laid_out(draw, values):
    """The same tensor in other memory: transposed, a slice of more, expanded, misaligned."""
    how = draw(st.sampled_from(["as it is", "permuted", "sliced", "offset", "expanded"]))
    if how == "permuted" and values.dim() > 1:
        order = draw(st.permutations(range(values.dim())))
        back = [order.index(d) for d in range(values.dim())]
        return values.permute(order).contiguous().permute(back)
    if how == "sliced":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), math.nan)
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if how == "offset":
        wide = values.new_full((values.numel() + 1,), math.nan)
        wide[1:] = values.reshape(-1)
        return wide[1:].view(values.shape)
    if how == "expanded" and values.shape[0] > 0:
        values.copy_(values[:1].clone().expand(values.shape))
        return values[:1].expand(values.shape)
    return values


@st.composite
def tensors(draw, shape, dtype, scale=1.0):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return draw(laid_out((scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)))


@st.composite
def levels(draw, B):
    """(Level, alpha (B,), sigma (B,)), sigma not 0 and alpha not 0, where float32 keeps them apart."""
    way = draw(st.sampled_from(["schedule", "int", "floats", "tensors"]))
    if way in ("schedule", "int"):
        schedule = draw(st.sampled_from(SCHEDULES))
        fine = ((schedule.alpha > 0.02) & (schedule.sigma > 0.005)).nonzero()[:, 0].tolist()
        if way == "int":
            t = draw(st.sampled_from(fine))
            return schedule[t], np.full(B, float(schedule.alpha[t])), np.full(B, float(schedule.sigma[t]))
        t = torch.tensor([draw(st.sampled_from(fine)) for _ in range(B)], dtype=torch.int64)
        t = t.to(draw(st.sampled_from([torch.int32, torch.int64])))
        return schedule[t], schedule.alpha[t.long()].numpy(), schedule.sigma[t.long()].numpy()
    if way == "floats":
        a, s = draw(st.floats(0.1, 2)), draw(st.floats(0.1, 2))
        return df.Level(a, s), np.full(B, a), np.full(B, s)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, s = 0.2 + torch.rand(2, B, generator=g, dtype=torch.float64)
    return df.Level(a, s), a.numpy(), s.numpy()


@st.composite
def noises(draw, B):
    """(Noise, seed, offset, ids)."""
    seed, first = draw(st.integers(0, 2**64 - 1)), draw(st.integers(-(2**63), 2**63 - 6))
    noise, key = df.Noise(seed), (seed, 0)
    if draw(st.booleans()):
        data = draw(st.integers(0, 2**64 - 1))
        with np.errstate(over="ignore"):
            key = tuple(int(k) for k in formulas.fold(np.uint64(seed), np.uint64(0), np.uint64(data)))
        noise = noise.fold_in(data)
    if draw(st.booleans()):
        ids = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(B)], dtype=torch.int64)
        noise = df.Noise(noise.key, sample=ids)
        return noise, *key, ids.numpy()
    return df.Noise(noise.key, first_sample=first), *key, first + np.arange(B, dtype=np.int64)


@pytest.fixture(autouse=True)
def restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if ISAS:
        df.kernels.native.use_isa(ISAS[-1])
        df.kernels.native.use_cache_share(math.inf)


@st.composite
def machines(draw):
    """Threads, instruction set and backend, set."""
    backend = draw(st.sampled_from([name for name in BACKENDS if name in ("native", "reference")]))
    torch.set_num_threads(draw(st.integers(1, 3)))
    if ISAS:
        df.kernels.native.use_isa(draw(st.sampled_from(ISAS)))
        df.kernels.native.use_cache_share(draw(st.sampled_from((0, math.inf))))
    return backend


def compute_eps(dtype):
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def wide(t):
    return t.detach().double().numpy()


def close(got, exact, size, roundings=8, off=0.0):
    """Within a rounding to got's dtype and some of the terms' in the compute type; off: what else it may be off by."""
    assert tuple(got.shape) == exact.shape
    info = torch.finfo(got.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        allowed = info.eps * np.abs(exact) + roundings * compute_eps(got.dtype) * size + off + 2 * info.smallest_normal
        fine = (np.abs(wide(got) - exact) <= allowed) | (np.abs(exact) > 0.99 * info.max)
    assert fine.all(), (wide(got)[~fine][:3], exact[~fine][:3])


@given(st.data())
def test_words_and_normals(data):
    shape = data.draw(shapes())
    noise, seed, offset, ids = data.draw(noises(shape[0]))
    D = math.prod(shape[1:])
    with df.use_backend(data.draw(machines())):
        words, z = noise.bits(shape), noise.normal(shape)
        assert np.array_equal(
            words.numpy().astype(np.uint64).reshape(shape[0], D), formulas.words(seed, offset, ids, D)
        )
        exact = formulas.normals(seed, offset, ids, D).reshape(shape)
        assert (np.abs(wide(z) - exact) <= 2.0**-22 * np.abs(exact) + 2.0**-23).all()
        for dtype in DTYPES:
            assert torch.equal(noise.normal(shape, dtype=dtype), z.to(dtype))


def eps_of(data, shape, dtype):
    """(as an op takes it, its values, what these may be off by): a normal is an fp32, within 4 ulp."""
    if data.draw(st.booleans()):
        z = data.draw(tensors(shape, dtype))
        return z, wide(z), np.zeros(shape)
    noise, seed, offset, ids = data.draw(noises(shape[0]))
    z = formulas.normals(seed, offset, ids, math.prod(shape[1:])).reshape(shape)
    return noise, z, 2.0**-21 * np.abs(z) + 2.0**-23


@given(st.data())
def test_add_noise(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    x0 = data.draw(tensors(shape, dtype))
    noise, eps, off = eps_of(data, shape, dtype)
    level, a, s = data.draw(levels(shape[0]))
    target = data.draw(st.sampled_from([None, *formulas.PREDICTIONS]))
    with df.use_backend(data.draw(machines())):
        made = df.add_noise(x0, noise, level, target=target)
    x_t = made if target is None else made[0]
    close(x_t, *formulas.mixture((a, wide(x0)), (s, eps)), off=np.abs(column_of(s, eps)) * off)
    if target is not None:
        p0, p1 = formulas.PREDICTIONS[target](a, s)
        close(made[1], *formulas.mixture((p0, wide(x0)), (p1, eps)), off=np.abs(column_of(p1, eps)) * off)


def column_of(c, like):
    return formulas.column(c, like) * np.ones_like(like)


def rest_of(values):
    return tuple(range(1, values.ndim))


@given(st.data())
def test_conversions(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    x_t, pred = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    level, a, s = data.draw(levels(shape[0]))
    assume(level._schedule is None or bool((level._schedule.alpha > 0).all()))  # else refused, whatever the levels
    predict, to = (data.draw(st.sampled_from(list(formulas.PREDICTIONS))) for _ in range(2))
    low, high = sorted(data.draw(st.tuples(st.floats(-3, 3), st.floats(-3, 3))))
    clamp = data.draw(st.sampled_from([None, (low, high)]))
    with df.use_backend(data.draw(machines())):
        got = df.convert(x_t, pred, level, predict=predict, to=to, clamp=clamp)
    if clamp is None and predict == to:
        assert got is pred
        return
    x0, size = formulas.estimates(wide(x_t), wide(pred), predict, a, s)
    if clamp is not None:
        x0 = np.clip(x0, low, high)
    exact, outer = formulas.from_x0(wide(x_t), x0, to, a, s)
    q0, q1 = formulas.PREDICTIONS[to](a, s)
    close(got, exact, outer + np.abs(column_of(q0 - q1 * a / s, size)) * size, roundings=16)


@given(st.data())
def test_losses(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    B, D = shape[0], math.prod(shape[1:])
    pred, x0 = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    noise, eps, off = eps_of(data, shape, dtype)
    level, a, s = data.draw(levels(B))
    predict, kind = (
        data.draw(st.sampled_from(["eps", "x0", "v", "flow"])),
        data.draw(st.sampled_from(["mse", "l1", "huber", "pseudo_huber"])),
    )
    delta = data.draw(st.floats(0.05, 3)) if "huber" in kind else None
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"] if B * D else ["sum", "none"]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weight = 0.2 + torch.rand(B, generator=g) if data.draw(st.booleans()) else None
    mask = None
    if data.draw(st.booleans()):
        small = [n if data.draw(st.booleans()) else 1 for n in shape]
        mask = torch.rand(small, generator=g) < 0.6
    leaf = pred.detach().requires_grad_()
    with df.use_backend(data.draw(machines())):
        loss = df.denoising_loss(
            leaf,
            x0,
            noise,
            level,
            predict=predict,
            kind=kind,
            delta=delta,
            weight=weight,
            mask=mask,
            reduction=reduction,
        )
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
    p0, p1 = formulas.PREDICTIONS[predict](a, s)
    target, size = formulas.mixture((p0, wide(x0)), (p1, eps))
    r, size = wide(pred) - target, np.abs(wide(pred)) + size
    kept = np.ones(shape, bool) if mask is None else np.broadcast_to(mask.numpy(), shape)
    d = 1.0 if delta is None else delta
    slopes = np.where(kept, formulas.slope(r, kind, d), 0.0)
    # An error e of r is one of slope * e + e^2 of rho.
    off = 8 * compute_eps(dtype) * size + np.abs(column_of(p1, eps)) * off
    each = np.where(kept, formulas.rho(r, kind, d), 0.0).reshape(B, D).sum(1)
    error = np.where(kept, np.abs(slopes) * off + off**2 + 8 * compute_eps(dtype) * formulas.rho(r, kind, d), 0.0)
    error = error.reshape(B, D).sum(1)
    count = kept.reshape(B, D).sum(1)
    w = np.ones(B) if weight is None else wide(weight)
    share = 1 / np.maximum(count, 1) if reduction != "sum" else np.ones(B)
    factor = w * share / (B if reduction == "mean" else 1)
    wanted, allowed = factor * each, factor * error
    if reduction != "none":
        wanted, allowed = wanted.sum(), allowed.sum()
    allowed = allowed + 16 * compute_eps(dtype) * np.abs(wanted) + 1e-300
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (np.abs(wide(loss) - wanted) <= allowed).all(), (wide(loss), wanted)
    curve = {"mse": 2.0, "l1": 0.0, "huber": 1.0, "pseudo_huber": 2.0}[kind]
    near_zero = (np.abs(r) <= off) & (kind == "l1")  # where the sign may be either
    exact, extra = formulas.mixture((factor, slopes))
    fine = np.abs(wide(grad) - exact) <= (
        torch.finfo(dtype).eps * np.abs(exact)
        + 8 * compute_eps(dtype) * extra
        + np.abs(column_of(factor, off)) * curve * off
        + 2 * torch.finfo(dtype).smallest_normal
    )
    assert (fine | near_zero).all(), (wide(grad)[~fine][:3], exact[~fine][:3])


@given(st.data())
def test_langevin_step(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    x, score = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    noise, eps, off = eps_of(data, shape, dtype)
    h, scale = data.draw(st.floats(0, 2)), data.draw(st.floats(0, 2))
    step = torch.full(shape[:1], h, dtype=torch.float64) if data.draw(st.booleans()) else h
    with df.use_backend(data.draw(machines())):
        got = df.langevin_step(x, score, step, noise, scale)
    one = np.ones(shape[0])
    c = scale * math.sqrt(2 * h)
    close(got, *formulas.mixture((one, wide(x)), (h * one, wide(score)), (c * one, eps)), off=c * off)


@given(st.data())
def test_corruption(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    x = data.draw(tensors(shape, dtype))
    noise, seed, offset, ids = data.draw(noises(shape[0]))
    p, salt = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1))
    with df.use_backend(data.draw(machines())):
        corruption = df.SaltAndPepper(p, noise, low=-2.0, high=3.0, salt=salt)
        got, masked = df.corrupt(x, corruption), corruption.mask(shape)
    with np.errstate(over="ignore"):
        key = formulas.fold(np.uint64(seed), np.uint64(offset), np.uint64(0x6D61736B))
    w = formulas.words(int(key[0]), int(key[1]), ids, math.prod(shape[1:])).reshape(shape).astype(np.float64)
    below, pepper = w < math.floor(p * 2.0**32 + 0.5), w < math.floor((1 - salt) * p * 2.0**32 + 0.5)
    assert np.array_equal(masked.numpy(), below)
    assert np.array_equal(wide(got), np.where(pepper, -2.0, np.where(below, 3.0, wide(x))))


@given(st.data())
def test_reparameterise(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    mu, log_var = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype, scale=data.draw(st.floats(0, 3))))
    noise, eps, off = eps_of(data, shape, dtype)
    m, v = mu.detach().requires_grad_(), log_var.detach().requires_grad_()
    with df.use_backend(data.draw(machines())):
        z, kl = df.reparameterise(m, v, noise)
        of_z = torch.autograd.grad(z.sum(), (m, v), retain_graph=True)
        of_kl = torch.autograd.grad(kl.sum(), (m, v))
    wm, wv = wide(mu), wide(log_var)
    spread = np.exp(wv / 2)
    close(z, wm + spread * eps, np.abs(wm) + np.abs(spread * eps), off=spread * off)
    # e^v - 1 - v by its series where it cancels.
    terms = np.cumprod([wv / k for k in range(1, 25)], 0)[1:].sum(0)
    rest = np.where(np.abs(wv) < 1, terms, np.expm1(wv) - wv)
    each = (wm * wm + rest) / 2
    close(kl, each.sum(rest_of(each)), np.abs(each).sum(rest_of(each)), roundings=24)
    for got, exact, extra in zip(
        (*of_z, *of_kl),
        (np.ones(shape), spread * eps / 2, wm, np.expm1(wv) / 2),
        (0, spread * off, 0, 0),
        strict=True,
    ):
        close(got, exact, np.abs(exact), roundings=16, off=extra)


@given(st.data())
def test_strides_threads_and_instruction_sets_change_no_bit(data):
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    if "native" not in BACKENDS:
        return
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    noise, *_ = data.draw(noises(shape[0]))
    other = data.draw(laid_out(x.clone()))
    x = other.clone(memory_format=torch.contiguous_format)
    found = []
    for given_x in (x, other):
        data.draw(machines())
        with df.use_backend("native"):
            found.append(
                (df.add_noise(given_x, noise, df.Level(0.7, 0.4)), df.noise_mse(given_x, noise, reduction="sum"))
            )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
