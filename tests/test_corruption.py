"""Corruptions: what is masked, how many, with which bits; gradients; masks of losses; patch masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import dae_fast as df
from benchmarks.cases import DTYPES
from dae_fast.coefficients import stack_rows
from dae_fast.kernels import native
from dae_fast.ops.corruption import MASK_TAG, PATCH_TAG
from dae_fast.ops.losses import MINUS_TARGET

from .conftest import ISAS, not_in_torch_2_11
from .flat import residual_loss

NOISE = df.Noise(2**63 + 77).fold_in(4)
PER_SAMPLE = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
KINDS: dict[str, Callable[[df.Noise], Any]] = {
    "masking": lambda noise: df.Masking(0.3, noise),
    "salt": lambda noise: df.SaltAndPepper(0.3, noise, low=-2.0, high=3.0, salt=0.25),
}
kinds = pytest.mark.parametrize("kind", KINDS)
SURE = 1e-9  # of a two-sided test: the probability that a right law fails it


def within_binomial(count: int, n: int, p: float) -> bool:
    low, high = stats.binom.ppf([SURE / 2, 1 - SURE / 2], n, p)
    return bool(low <= count <= high)


class TestWhatIsStruck:
    def test_the_words_below_the_threshold(self, backend: str) -> None:
        """The contract: anybody can say what is masked from the words of the stream."""
        words = NOISE.fold_in(MASK_TAG).bits((5, 333))
        for p in (0.0, 2.0**-32, 0.1, 0.5, 1 - 2.0**-32, 1.0):
            assert torch.equal(df.Masking(p, NOISE).mask((5, 333)), words < round(p * 2**32))
        thresholds = (PER_SAMPLE.double() * 2**32).round().long()
        assert torch.equal(df.Masking(PER_SAMPLE, NOISE).mask((5, 333)), words < thresholds[:, None])

    @pytest.mark.parametrize("p", [0.0, 2.0**-33, 0.1, 1 / 3, 0.7, 1 - 2.0**-34, 1.0])
    def test_thresholds_are_rounded_to_the_nearest(self, p: float) -> None:
        like = torch.empty(2, 3)
        nearest = int(p * 2**32 + 0.5)
        for given in (p, torch.full((2,), p, dtype=torch.float64)):
            thresholds = df.Masking(given, NOISE)._drawn("op", like).thresholds
            assert (thresholds == nearest).all()

    @pytest.mark.parametrize("p", [0.0, 0.001, 0.3, 0.75, 1.0])
    def test_fraction(self, p: float) -> None:
        """Binomial over everything, and over each row and column."""
        B, D = 500, 2000
        masked = df.Masking(p, NOISE).mask((B, D))
        assert within_binomial(int(masked.sum()), B * D, p)
        for d, n in ((0, B), (1, D)):
            low, high = stats.binom.ppf([SURE / 4000, 1 - SURE / 4000], n, p)
            counts = masked.sum(d)
            assert ((counts >= low) & (counts <= high)).all()

    def test_fraction_of_each_sample(self) -> None:
        masked = df.Masking(PER_SAMPLE, NOISE).mask((5, 100, 1000)).flatten(1).sum(1)
        for count, p in zip(masked.tolist(), PER_SAMPLE.tolist(), strict=True):
            assert within_binomial(count, 100_000, p)

    @pytest.mark.parametrize("salt", [0.0, 0.25, 0.5, 1.0])
    def test_share_of_salt(self, backend: str, salt: float) -> None:
        x = torch.zeros(20, 5000)
        got = df.corrupt(x, df.SaltAndPepper(0.4, NOISE, low=-1.0, high=2.0, salt=salt))
        high, low = int((got == 2).sum()), int((got == -1).sum())
        assert within_binomial(high + low, x.numel(), 0.4)
        assert within_binomial(high, high + low, salt)

    def test_salt_and_pepper_strikes_what_masking_strikes(self, backend: str) -> None:
        x = torch.full((7, 99), 0.5)
        masked = df.Masking(0.4, NOISE).mask(x.shape)
        assert torch.equal(df.corrupt(x, df.SaltAndPepper(0.4, NOISE)) != 0.5, masked)
        assert torch.equal(df.SaltAndPepper(0.4, NOISE).mask(x.shape), masked)

    def test_not_the_words_of_the_normals(self) -> None:
        """Struck or not, the normals of the same noise are standard: their words are others."""
        shape = 100, 10_000
        z = NOISE.normal(shape)[df.Masking(0.5, NOISE).mask(shape)]
        assert stats.kstest(z[:200_000].numpy(), "norm").pvalue > SURE

    def test_more_is_struck_at_a_higher_rate(self) -> None:
        """The same elements and others: the curves of a sweep over p are paired."""
        few, many = (df.Masking(p, NOISE).mask((9, 100)) for p in (0.2, 0.6))
        assert (many | ~few).all()
        assert (many & ~few).any()


class TestSameBits:
    @kinds
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
    def test_batch_splits_and_dtypes(self, backend: str, kind: str, dtype: torch.dtype) -> None:
        x = torch.randn(12, 77)
        whole = df.corrupt(x, KINDS[kind](NOISE))
        parts = []
        for first in (0, 3, 6, 9):
            shard = df.Noise(2**63 + 77, first_sample=first).fold_in(4)
            parts.append(df.corrupt(x[first : first + 3].to(dtype), KINDS[kind](shard)))
        assert torch.equal(torch.cat(parts), torch.where(x == whole, x, whole).to(dtype))
        ids = torch.tensor([5, 2, 5])
        chosen = df.corrupt(x[ids], KINDS[kind](df.Noise(2**63 + 77, sample=ids).fold_in(4)))
        assert torch.equal(chosen, whole[ids])

    @kinds
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.usefixtures("restore_isa")
    def test_instruction_sets_and_lengths(self, kind: str, isa: str) -> None:
        x = torch.randn(9, 4097)
        with df.use_backend("reference"):
            expected = df.corrupt(x, KINDS[kind](NOISE))
        native.use_isa(isa)
        for D in (1, 3, 4, 15, 16, 17, 63, 64, 65, 1023, 1025, 4097):
            assert torch.equal(df.corrupt(x[:, :D].contiguous(), KINDS[kind](NOISE)), expected[:, :D])

    @kinds
    def test_keys_and_folds(self, kind: str) -> None:
        x = torch.randn(6, 50)
        expected = df.corrupt(x, KINDS[kind](NOISE))
        assert torch.equal(df.corrupt(x, KINDS[kind](NOISE.to("cpu"))), expected)
        assert not torch.equal(df.corrupt(x, KINDS[kind](NOISE.fold_in(1))), expected)


class TestCorrupt:
    def test_values_and_what_is_left(self, backend: str) -> None:
        x = torch.randn(8, 3, 7, 5)
        masking = df.Masking(PER_SAMPLE.repeat(2)[:8], NOISE)
        masked = masking.mask(x.shape)
        assert torch.equal(df.corrupt(x, masking), torch.where(masked, 0, x))
        assert torch.equal(df.corrupt(x, masking, -0.7), torch.where(masked, -0.7, x))
        assert torch.equal(df.corrupt(x, masking, float("inf")), torch.where(masked, float("inf"), x))

    def test_what_is_struck_is_not_read(self, backend: str) -> None:
        x = torch.randn(6, 100)
        masking = df.Masking(0.5, NOISE)
        x[masking.mask(x.shape)] = float("nan")
        x.requires_grad_()
        got = df.corrupt(x, masking)
        assert got.isfinite().all()
        (gradient,) = torch.autograd.grad(got.square().sum(), x)
        assert gradient.isfinite().all()

    @kinds
    def test_gradient(self, backend: str, kind: str) -> None:
        """The upstream gradient where x is kept, exactly, and twice differentiable."""
        x = torch.randn(6, 4, 9, requires_grad=True)
        g = torch.randn(6, 4, 9, requires_grad=True)
        corruption = KINDS[kind](NOISE)
        (gradient,) = torch.autograd.grad(df.corrupt(x, corruption), x, g, create_graph=True)
        masked = corruption.mask(x.shape)
        assert torch.equal(gradient, torch.where(masked, 0, g))
        (second,) = torch.autograd.grad(gradient.square().sum(), g)
        assert torch.equal(second, torch.where(masked, 0, 2 * g))

    def test_gradcheck(self, backend: str) -> None:
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        for corruption in (df.Masking(PER_SAMPLE[1:4], NOISE), KINDS["salt"](NOISE)):
            assert torch.autograd.gradcheck(lambda x, c=corruption: df.corrupt(x, c).square(), x)
            assert torch.autograd.gradgradcheck(lambda x, c=corruption: df.corrupt(x, c).square(), x)

    def test_no_mask_is_stored(self) -> None:
        """For backward either: two numbers to a batch, or to a row."""
        x = torch.randn(8, 1000, requires_grad=True)
        saved: list[Tensor] = []

        def keep(t: Tensor) -> Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            df.corrupt(x, df.Masking(0.5, NOISE))
        assert [tuple(t.shape) for t in saved] == [(1, 2)]

    def test_odd_shapes(self, backend: str) -> None:
        for shape in ((0, 4), (5, 0), (3,), (2, 1, 3, 1, 2, 1)):
            x = torch.randn(shape)
            for p in (0.5, torch.full(shape[:1], 0.5)):
                masking = df.Masking(p, NOISE)
                assert torch.equal(df.corrupt(x, masking), torch.where(masking.mask(shape), 0, x))


class TestMasksOfLosses:
    def residual(self, pred: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        rows = stack_rows("op", MINUS_TARGET, pred, pred.dtype)
        return residual_loss("op", pred, None, None, NOISE, rows, None, mask, "mean")[:2]

    def test_selections(self, backend: str) -> None:
        """The masked, the kept, in each of their spellings, as a mask in memory."""
        masking = df.Masking(PER_SAMPLE, NOISE)
        pred = torch.randn(5, 3, 41)
        masked = masking.mask(pred.shape)
        spellings = ((masking, masked), (masking.masked, masked), (~masking.visible, masked), (~(~masking), masked))
        for selection, mask in (*spellings, (masking.visible, ~masked), (~masking, ~masked)):
            drawn = selection._drawn("op", pred)
            assert torch.equal(drawn.on(pred), mask)
            if backend == "reference":
                drawn = drawn.on(pred)
            loss, each = self.residual(pred, drawn)
            wanted, wanted_each = self.residual(pred, mask)
            torch.testing.assert_close(each, wanted_each)
            torch.testing.assert_close(loss, wanted)

    def test_sample_ids_must_fit(self) -> None:
        masking = df.Masking(0.5, df.Noise(0, sample=torch.arange(4)))
        with pytest.raises(ValueError, match=r"noise_mse: noise.sample must have shape \(5,\), got \(4,\)"):
            masking._drawn("noise_mse", torch.zeros(5, 3))


class TestTransforms:
    @not_in_torch_2_11("a float that becomes an integer is made a constant")
    @kinds
    def test_compile(self, kind: str) -> None:
        """In one graph, with the kernel in it; new keys are no new compilation."""
        counter = CompileCounterWithBackend("aot_eager")

        def step(x: Tensor, noise: df.Noise, p: float) -> Tensor:
            if kind == "masking":
                return df.corrupt(x, df.Masking(p, noise), 0.5).square().sum()
            return df.corrupt(x, df.SaltAndPepper(p, noise, salt=0.3)).square().sum()

        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        for k in range(5):
            x = torch.randn(4, 7, requires_grad=True)
            for p in (0.2, 0.7):
                found = []
                for f in (step, compiled):
                    loss = f(x, NOISE.fold_in(k), p)
                    found.append((loss.detach(), *torch.autograd.grad(loss, x)))
                torch.testing.assert_close(*found)
        assert counter.frame_count <= 3  # the ints of a host key, then p, become inputs of the graph
        targets = {str(n.target) for g in counter.graphs for n in g.graph.nodes if n.op == "call_function"}
        assert {t for t in targets if "dae_fast" in t} == {"dae_fast.corrupt", "dae_fast.fold_in"}
        torch._dynamo.reset()

    @kinds
    def test_vmap_and_grad(self, kind: str) -> None:
        x, p = torch.randn(3, 4, 6), torch.rand(3, 4)
        corruption = KINDS[kind](NOISE)
        got = torch.vmap(lambda x: df.corrupt(x, corruption))(x)
        assert torch.equal(got, torch.stack([df.corrupt(row, corruption) for row in x]))
        for rates, dim in ((p, 0), (p.T, 1), (p[0], None)):
            got = torch.vmap(lambda x, p: df.corrupt(x, df.Masking(p, NOISE)), (0, dim))(x, rates)
            each = p if dim is not None else [p[0]] * 3
            assert torch.equal(
                got, torch.stack([df.corrupt(a, df.Masking(b, NOISE)) for a, b in zip(x, each, strict=True)])
            )
        gradient = torch.func.grad(lambda x: df.corrupt(x, corruption).square().sum())(x[0])
        assert torch.equal(gradient, torch.where(corruption.mask((4, 6)), 0, 2 * x[0]))

    def test_vmap_over_sample_ids(self) -> None:
        x, ids = torch.randn(4, 6), torch.arange(12).reshape(3, 4)

        def of(ids: Tensor) -> Tensor:
            return df.corrupt(x, df.Masking(0.5, df.Noise(3, sample=ids)))

        assert torch.equal(torch.vmap(of)(ids), torch.stack([of(i) for i in ids]))

    def test_vmap_over_keys_is_refused(self) -> None:
        def of(key: Tensor) -> Tensor:
            return df.corrupt(torch.zeros(2, 3), df.Masking(0.5, df.Noise(key)))

        with pytest.raises(ValueError, match="vmap over noise keys is not supported"):
            torch.vmap(of)(torch.ones(3, 2).long())

    def test_checkpointing(self) -> None:
        x = torch.randn(4, 50, requires_grad=True)

        def f(x: Tensor) -> Tensor:
            return df.corrupt(x.sin(), df.Masking(0.5, NOISE)).exp().sum()

        (want,) = torch.autograd.grad(f(x), x)
        (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False), x)
        assert torch.equal(got, want)


class TestMasksOfTracedLosses:
    """A drawn mask stays a key under torch.compile and torch.func: its words are made in the loss's kernel."""

    def loss(self, pred: Tensor, noise: df.Noise, p: float | Tensor, *, kept: bool = False) -> Tensor:
        masking = df.Masking(p, noise)
        mask = masking.visible if kept else masking
        return df.denoising_loss(pred, torch.zeros_like(pred), None, None, predict="x0", mask=mask)

    @pytest.mark.parametrize("kept", [False, True])
    def test_compile(self, kept: bool) -> None:
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        compiled = torch.compile(self.loss, fullgraph=True, backend=counter)
        pred = torch.randn(4, 7, requires_grad=True)
        for k in range(4):
            noise = NOISE.fold_in(k)
            found = []
            for f in (self.loss, compiled):
                loss = f(pred, noise, PER_SAMPLE[:4], kept=kept)
                found.append((loss.detach(), *torch.autograd.grad(loss, pred)))
            torch.testing.assert_close(*found)
        nodes = [n for g in counter.graphs for n in g.graph.nodes]
        assert not any(n.meta.get("example_value", torch.zeros(())).dtype == torch.bool for n in nodes if has_shape(n))
        assert not any("dae_fast.fill" in str(n.target) for n in nodes)
        torch._dynamo.reset()

    def test_vmap_and_grad(self) -> None:
        pred, ids = torch.randn(3, 4, 6), torch.arange(12).reshape(3, 4)
        p = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))

        def of(pred: Tensor, p: Tensor, ids: Tensor) -> Tensor:
            return self.loss(pred, df.Noise(3, sample=ids), p)

        arguments = list(zip(pred, p, ids, strict=True))
        torch.testing.assert_close(torch.vmap(of)(pred, p, ids), torch.stack([of(*a) for a in arguments]))
        got = torch.vmap(torch.func.grad(of))(pred, p, ids)
        for gradient, given in zip(got, arguments, strict=True):
            leaf = given[0].clone().requires_grad_()
            torch.testing.assert_close(gradient, torch.autograd.grad(of(leaf, *given[1:]), leaf)[0])
        shared = torch.vmap(lambda pred: self.loss(pred, NOISE, 0.4))(pred)
        torch.testing.assert_close(shared, torch.stack([self.loss(each, NOISE, 0.4) for each in pred]))

    def test_vmap_over_keys_is_refused(self) -> None:
        with pytest.raises(ValueError, match="vmap over noise keys is not supported"):
            torch.vmap(lambda key: self.loss(torch.zeros(2, 3), df.Noise(key), 0.5))(torch.ones(3, 2).long())


def has_shape(node: torch.fx.Node) -> bool:
    """Of the samples, in what torch.compile traced."""
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() == 2


class TestPatchMask:
    def test_counts_are_exact(self) -> None:
        """Of decimal fractions: in floats 10 * (1 - 0.9) is less than 1, and 29 of these pairs were off by one."""
        for patches in (1, 3, 10, 20, 30, 49, 50, 64, 100, 196, 256, 300, 576, 784, 1000, 1024):
            for digits in range(101):
                exact = math.floor(patches * (1 - Fraction(digits, 100)))
                made = df.patch_mask(df.Noise(0), 2, patches, digits / 100)
                assert made.ids_keep.shape == (2, exact) and int(made.mask[0].sum()) == patches - exact
        assert df.patch_mask(df.Noise(0), 2, 10, 0.1 + 0.2).ids_keep.shape == (2, 7)
        assert df.patch_mask(df.Noise(0), 0, 10, 0.9).mask.shape == (0, 10)

    @pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 0.75, 1.0])
    @pytest.mark.parametrize("N", [0, 1, 49, 196])
    def test_exact_number_and_order(self, backend: str, N: int, ratio: float) -> None:
        B = 6
        ids_keep, ids_restore, mask = df.patch_mask(NOISE, B, N, ratio)
        K = int(N * (1 - ratio))
        assert ids_keep.shape == (B, K)
        assert ((~mask).sum(1) == K).all()
        assert torch.equal(mask, torch.ones_like(mask).scatter(1, ids_keep, False))
        # What is kept, then what is removed, put back in order.
        order = torch.argsort(ids_restore, 1)
        assert torch.equal(order[:, :K], ids_keep)
        patches = torch.randn(B, N, 3)
        shuffled = patches.gather(1, order[:, :, None].expand(-1, -1, 3))
        assert torch.equal(shuffled.gather(1, ids_restore[:, :, None].expand(-1, -1, 3)), patches)

    def test_sorted_by_the_words(self) -> None:
        words = NOISE.fold_in(PATCH_TAG).bits((4, 30))
        assert torch.equal(df.patch_mask(NOISE, 4, 30, 0.5).ids_keep, words.argsort(dim=1, stable=True)[:, :15])

    def test_ties_go_by_index(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(df.Noise, "bits", lambda self, shape, *, device: torch.zeros(shape, dtype=torch.int64))
        assert torch.equal(df.patch_mask(NOISE, 2, 100, 0.0).ids_keep, torch.arange(100).expand(2, 100))

    def test_depends_on_the_sample_alone(self) -> None:
        whole = df.patch_mask(NOISE, 8, 20, 0.5)
        shard = df.patch_mask(df.Noise(2**63 + 77, first_sample=5).fold_in(4), 3, 20, 0.5)
        for a, b in zip(whole, shard, strict=True):
            assert torch.equal(a[5:], b)

    def test_every_patch_equally_often(self) -> None:
        B, N = 4000, 20
        kept = (~df.patch_mask(NOISE, B, N, 0.75).mask).sum(0)
        for count in kept.tolist():
            assert within_binomial(count, B, 0.25)

    def test_loss_on_the_removed_patches_has_no_full_mask(self) -> None:
        pred, target = torch.randn(4, 20, 48), torch.randn(4, 20, 48)
        mask = df.patch_mask(NOISE, 4, 20, 0.75).mask
        loss = df.noise_mse(pred, target, mask=mask[:, :, None])
        of_patches = (pred - target).square().mean(-1)
        torch.testing.assert_close(loss, (of_patches * mask).sum() / mask.sum())

    def test_compile(self) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(lambda key: df.patch_mask(df.Noise(key), 3, 10, 0.5), fullgraph=True, backend="eager")
        key = torch.tensor([4, 5])
        for a, b in zip(compiled(key), df.patch_mask(df.Noise(key), 3, 10, 0.5), strict=True):
            assert torch.equal(a, b)
