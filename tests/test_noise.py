"""The noise contract: known answers, bit equality, accuracy, statistics."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import dae_fast as df
from dae_fast.kernels import native, reference

from .conftest import ISAS, module_of

VECTORS = json.loads(Path(__file__).with_name("noise_vectors.json").read_text())
CPU = torch.device("cpu")
LENGTHS = (1, 3, 4, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 4097)
# Of an fp32 normal: the contract's 4 ulp, or 2^-23 near zero.
MAX_ULPS, NEAR_ZERO = 4, 2.0**-23


def stream(kind: str, backend: str, seed: int, offset: int, n: int) -> torch.Tensor:
    """The first n elements of a key's own stream, no row folded in."""
    noise = df.Noise._make(*(torch.tensor([seed, offset], dtype=torch.uint64).view(torch.int64).tolist()))
    module = module_of(backend)
    if kind == "bits":
        return module.words(noise, 1, n, CPU, False)[0]
    return module.normal(noise, 1, n, torch.float32, CPU, False)[0]


def element(kind: str, backend: str, key: list[int], i: int) -> float:
    """Element i of a key's stream: block n of (seed, offset) is block 0 of (seed, offset + n)."""
    seed, offset = key
    return stream(kind, backend, seed, (offset + i // 4) % 2**64, 4)[i % 4].item()


def test_bits_below_a_limit(backend: str) -> None:
    noise = df.Noise(6, first_sample=9)
    words = noise.bits((5, 37)).flatten().tolist()
    for below in (1, 3, 1000, 2**31):
        assert noise.bits((5, 37), below=below).flatten().tolist() == [w * below >> 32 for w in words]
    for bad in (0, -1, 2**31 + 1):
        with pytest.raises(ValueError, match=rf"bits: below must be in \[1, 2\*\*31\], got {bad}"):
            noise.bits((5,), below=bad)


class TestKnownAnswers:
    @pytest.mark.parametrize("case", VECTORS["philox4x32_10"], ids=str)
    def test_philox(self, backend: str, case: dict) -> None:
        if backend == "native":
            got = native.philox4x32_10(case["counter"], case["key"])
        else:
            counter, key = (tuple(torch.tensor(w) for w in case[k]) for k in ("counter", "key"))
            got = [int(w) for w in reference.philox4x32_10(counter, key)]
        assert got == case["output"]

    @pytest.mark.parametrize("case", VECTORS["fold_in"], ids=lambda c: f"{c['key']}-{c['data']}")
    def test_fold_in(self, backend: str, case: dict) -> None:
        key = torch.tensor(case["key"], dtype=torch.uint64).view(torch.int64)
        signed = torch.tensor(case["data"], dtype=torch.uint64).view(torch.int64).item()
        got = module_of(backend).fold_in_tensor(df.Noise(key), torch.tensor(signed))
        assert [w % 2**64 for w in got.tolist()] == case["result"]
        on_device = df.Noise(key).fold_in(case["data"]).key
        assert [w % 2**64 for w in on_device.tolist()] == case["result"]
        if case["key"][1] == 0:
            assert list(df.Noise(case["key"][0]).fold_in(case["data"]).key) == case["result"]

    @pytest.mark.parametrize("case", VECTORS["bits"], ids=lambda c: str(c["key"]))
    def test_bits(self, backend: str, case: dict) -> None:
        got = [element("bits", backend, case["key"], i) for i in case["index"]]
        assert got == case["value"]

    @pytest.mark.parametrize("case", VECTORS["normal"], ids=lambda c: str(c["key"]))
    def test_normal(self, backend: str, case: dict) -> None:
        got = np.array([element("normal", backend, case["key"], i) for i in case["index"]])
        assert ulps(got, np.array(case["value"])).max() <= MAX_ULPS

    @pytest.mark.parametrize("case", VECTORS["rows"], ids=lambda c: str(c["seed"]))
    def test_rows(self, backend: str, case: dict) -> None:
        noise = df.Noise(case["seed"], sample=torch.tensor(case["sample"])).fold_in(case["fold_in"])
        z = noise.normal((len(case["sample"]), max(case["element"]) + 1))
        assert ulps(z[:, case["element"]].double().numpy(), np.array(case["value"])).max() <= MAX_ULPS


def ulps(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Error in units in the last place of fp32; 0 where it is below NEAR_ZERO."""
    error = np.abs(got - exact)
    return np.where(error <= NEAR_ZERO, 0, error / np.spacing(np.abs(exact).astype(np.float32))).astype(float)


def exact_normals(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Box-Muller of words in extended precision, the angle reduced in integers."""
    r, a = radius.astype(np.longdouble), angle.astype(np.longdouble)
    log_u = np.where(r >= 2**31, np.log1p(-(2**32 - r - 0.5) / 2**32), np.log((r + 0.5) / 2**32))
    quarter = np.floor((a + 0.5) / 2**30 + 0.5)
    theta = ((a + 0.5) - quarter * 2**30) / 2**32 * 2 * np.longdouble("3.14159265358979323846264338327950288")
    c, s = np.cos(theta), np.sin(theta)
    turn = quarter.astype(np.int64) % 4
    return np.sqrt(-2 * log_u)[:, None] * np.stack(
        (np.choose(turn, [c, -s, -c, s]), np.choose(turn, [s, c, -s, -c])), 1
    )


@pytest.mark.skipif(not ISAS, reason="the native core is not built")
def test_accuracy_at_chosen_words() -> None:
    """Random words, and the edges: u near 0, 1/2 and 1, angles near the eighths of a turn."""
    rng = np.random.default_rng(0)
    n = 1 << 17
    words = rng.integers(0, 2**32, n)
    near_zero = np.arange(n) // 4
    eighths = rng.integers(0, 8, n) * 2**29 + rng.integers(-64, 64, n)
    pairs = [(words, rng.integers(0, 2**32, n)), (near_zero, words), (2**32 - 1 - near_zero, words), (words, eighths)]
    pairs += [(2**31 + rng.integers(-512, 512, n), words), (words, np.zeros(n)), (words, np.full(n, 2**32 - 1))]
    for radius, angle in pairs:
        r, a = (np.ascontiguousarray(w.astype(np.int64) % 2**32, dtype=np.uint32) for w in (radius, angle))
        z = np.empty((n, 2), np.float32)
        native._core.box_muller(r.ctypes.data, a.ctypes.data, z.ctypes.data, n)
        assert ulps(z.astype(np.longdouble), exact_normals(r, a)).max() <= MAX_ULPS


def test_tail_reaches_6_76() -> None:
    z = np.empty((1, 2), np.float32)
    zero = np.zeros(1, np.uint32)
    native._core.box_muller(zero.ctypes.data, zero.ctypes.data, z.ctypes.data, 1)
    assert z[0, 0] == pytest.approx(math.sqrt(2 * 33 * math.log(2)), rel=1e-6)


@pytest.mark.usefixtures("restore_isa")
class TestSameBits:
    """Identical bits, whatever runs them and however the work is cut."""

    noise = df.Noise(2**63 + 12345).fold_in(9)

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("D", LENGTHS)
    def test_instruction_sets(self, isa: str, D: int) -> None:
        native.use_isa(ISAS[0])
        normals, words = self.noise.normal((33, D)), self.noise.bits((33, D))
        native.use_isa(isa)
        assert torch.equal(self.noise.normal((33, D)), normals)
        assert torch.equal(self.noise.bits((33, D)), words)

    @pytest.mark.parametrize("isa", ISAS)
    def test_instruction_sets_on_many_values(self, isa: str) -> None:
        native.use_isa(ISAS[0])
        expected = self.noise.normal((1, 2**21))
        native.use_isa(isa)
        assert torch.equal(self.noise.normal((1, 2**21)), expected)

    @pytest.mark.parametrize("D", LENGTHS)
    def test_words_of_every_backend(self, D: int) -> None:
        with df.use_backend("reference"):
            expected = self.noise.bits((19, D))
        assert torch.equal(self.noise.bits((19, D)), expected)

    @pytest.mark.parametrize("D", LENGTHS)
    def test_normals_near_the_reference(self, D: int) -> None:
        with df.use_backend("reference"):
            exact = self.noise.normal((19, D), dtype=torch.float64)
        # The reference is rounded as well: half an ulp more.
        assert ulps(self.noise.normal((19, D)).double().numpy(), exact.numpy()).max() <= MAX_ULPS + 0.5

    @pytest.mark.usefixtures("restore_threads")
    @pytest.mark.parametrize("shape", [(3, 100_000), (70_000, 3), (1, 2**20 + 1)])
    def test_thread_counts(self, backend: str, shape: tuple[int, ...]) -> None:
        torch.set_num_threads(1)
        one = self.noise.normal(shape)
        torch.set_num_threads(2)
        assert torch.equal(self.noise.normal(shape), one)

    def test_prefix_of_a_longer_row(self, backend: str) -> None:
        """Element i does not know how long its row is."""
        long = self.noise.normal((5, 4097))
        for D in LENGTHS:
            assert torch.equal(self.noise.normal((5, D)), long[:, :D])

    def test_batch_splits(self, backend: str) -> None:
        whole = self.noise.normal((12, 77))
        shards = [df.Noise(2**63 + 12345, first_sample=k).fold_in(9) for k in (0, 3, 6, 9)]
        parts = [noise.normal((3, 77)) for noise in shards]
        assert torch.equal(torch.cat(parts), whole)

    def test_sample_ids(self, backend: str) -> None:
        ids = torch.tensor([7, 0, 2**40, -1, 7])
        z = df.Noise(5, sample=ids).fold_in(1).normal((5, 31))
        for row, i in zip(z, ids.tolist(), strict=True):
            alone = df.Noise(5, first_sample=i % 2**64).fold_in(1).normal((1, 31))
            assert torch.equal(row, alone[0])
        assert torch.equal(z[0], z[4])

    def test_strides_and_shape_do_not_matter(self, backend: str) -> None:
        flat = self.noise.normal((4, 2 * 3 * 5))
        assert torch.equal(self.noise.normal((4, 2, 3, 5)).reshape(4, -1), flat)

    @pytest.mark.parametrize("offset", [2**32 - 3, 2**64 - 3, 2**64 - 2**32 - 1])
    @pytest.mark.parametrize("D", [9, 40, 200])
    def test_counters_carry_and_wrap(self, offset: int, D: int) -> None:
        """Rows whose 64-bit counters cross 2^32 or 2^64 among the lanes of one vector."""
        expected = stream("bits", "reference", 11, offset, D)
        for isa in ISAS:
            native.use_isa(isa)
            assert torch.equal(stream("bits", "native", 11, offset, D), expected)

    def test_ids_wrap(self, backend: str) -> None:
        last = df.Noise(1, first_sample=2**64 - 1).normal((2, 8))
        assert torch.equal(last[1], df.Noise(1).normal((1, 8))[0])
        assert torch.equal(last[0], df.Noise(1, sample=torch.tensor([-1])).normal((1, 8))[0])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("isa", ISAS)
    def test_dtypes_are_the_rounded_master(self, isa: str, dtype: torch.dtype) -> None:
        native.use_isa(isa)
        assert torch.equal(self.noise.normal((7, 333), dtype=dtype), self.noise.normal((7, 333)).to(dtype))

    def test_key_in_memory(self, backend: str) -> None:
        there = self.noise.to("cpu")
        assert isinstance(there.key, torch.Tensor)
        assert torch.equal(there.normal((3, 50)), self.noise.normal((3, 50)))
        step = torch.tensor(4)
        assert torch.equal(there.fold_in(step).normal((3, 50)), self.noise.fold_in(4).normal((3, 50)))
        assert torch.equal(self.noise.fold_in(step).normal((3, 50)), self.noise.fold_in(4).normal((3, 50)))

    def test_seed_is_taken_modulo(self) -> None:
        assert df.Noise(-1).key == df.Noise(2**64 - 1).key == (2**64 - 1, 0)
        assert df.Noise(3).fold_in(-1).key == df.Noise(3).fold_in(2**64 - 1).key


def test_numpy_integers_are_integers() -> None:
    assert df.Noise(np.uint64(2**63 + 5)).fold_in(np.int64(-3)).key == df.Noise(2**63 + 5).fold_in(-3).key


def test_from_generator_obeys_the_seed() -> None:
    torch.manual_seed(7)
    a, b = df.Noise.from_generator(), df.Noise.from_generator()
    torch.manual_seed(7)
    assert df.Noise.from_generator().key == a.key
    assert a.key != b.key
    g = torch.Generator().manual_seed(7)
    assert df.Noise.from_generator(g).key == a.key
    assert isinstance(a.key, tuple)
    assert df.Noise.from_generator(first_sample=5)._first_sample == 5


def test_equal_to_torchs_own_stateless_stream() -> None:
    random = pytest.importorskip("torch.func._random", reason="this torch has no torch.func._random")
    try:
        key = random.key(42)
        theirs = random.normal(key, (1 << 16,))
    except NotImplementedError as error:  # torch's dispatcher: before 2.14 the module has no kernel for the CPU
        pytest.skip(f"torch.func._random does not run on this torch's CPU: {str(error).splitlines()[0][:90]}")
    ours = stream("normal", "native", *(int(w) % 2**64 for w in key.tolist()), 1 << 16)
    difference = (ours - theirs).abs()
    # Its ln(u) takes a rounded u: off by up to 2e-5 near u = 1, below 1.5e-6 in all but 0.01 %.
    assert difference.max() < 2e-5
    assert (difference < 1.5e-6).double().mean() > 0.9998


class TestErrors:
    def test_messages(self) -> None:
        with pytest.raises(TypeError, match=r"Noise: seed must be an int or an int64 tensor \(2,\), got float"):
            df.Noise(1.5)
        with pytest.raises(ValueError, match=r"key tensor must be int64 of shape \(2,\), got torch.float32 of \(2,\)"):
            df.Noise(torch.zeros(2))
        with pytest.raises(ValueError, match=r"sample must be an int64 tensor \(B,\), got torch.int32 of \(3,\)"):
            df.Noise(0, sample=torch.zeros(3, dtype=torch.int32))
        with pytest.raises(ValueError, match="give sample or first_sample, not both"):
            df.Noise(0, sample=torch.zeros(3, dtype=torch.int64), first_sample=1)
        with pytest.raises(ValueError, match=r"normal: noise.sample must have shape \(4,\), got \(3,\)"):
            df.Noise(0, sample=torch.zeros(3, dtype=torch.int64)).normal((4, 2))
        with pytest.raises(ValueError, match=r"normal: shape must be \(B, ...\), got \(\)"):
            df.Noise(0).normal(())
        with pytest.raises(TypeError, match=r"normal: dtype must be float16, .* got torch.int64"):
            df.Noise(0).normal((2, 2), dtype=torch.int64)
        with pytest.raises(TypeError, match="fold_in: data must be an int or an int64 tensor, got float"):
            df.Noise(0).fold_in(0.5)

    @pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 0, 3)])
    def test_empty(self, backend: str, shape: tuple[int, ...]) -> None:
        assert df.Noise(0).normal(shape).shape == shape
        assert df.Noise(0).bits(shape).shape == shape


N = 10_000_000
ROW = 4_000


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    return df.Noise(20_240_101).fold_in(3).normal((N // ROW, ROW)).double().numpy()


class TestStatistics:
    """10^7 values. Thresholds are two-sided at about 1e-6 for this seed, so a pass means a fit."""

    Z_MAX = 4.9  # standard errors

    def test_moments(self, z: np.ndarray) -> None:
        flat = z.ravel()
        # Of a unit normal, E z^2k = (2k-1)!!; the standard error of the mean of z^k is sqrt(Var z^k / n).
        for k, double_factorial in ((1, 1), (2, 3), (3, 15), (4, 105), (5, 945), (6, 10395)):
            expected = 0 if k % 2 else {2: 1, 4: 3, 6: 15}[k]
            error = math.sqrt((double_factorial - expected**2) / N)
            assert abs((flat**k).mean() - expected) < self.Z_MAX * error, k

    def test_kolmogorov_smirnov(self, z: np.ndarray) -> None:
        for start in range(4):  # cos and sin of each pair of words, and all together below
            assert stats.kstest(z.ravel()[start::4], "norm").pvalue > 1e-4
        assert stats.kstest(z.ravel(), "norm").pvalue > 1e-4

    def test_tails(self, z: np.ndarray) -> None:
        flat = z.ravel()
        for limit in (3.0, 3.5, 4.0, 4.5, 5.0):
            p = stats.norm.sf(limit)
            for count in ((flat > limit).sum(), (flat < -limit).sum()):
                assert stats.binomtest(int(count), N, p).pvalue > 1e-5, limit

    def test_squares_within_a_block_are_independent(self, z: np.ndarray) -> None:
        blocks = z.reshape(-1, 4)
        for values in (blocks, blocks**2):
            centred = (values - values.mean(0)) / values.std(0)
            for a, b in itertools.combinations(range(4), 2):
                assert abs((centred[:, a] * centred[:, b]).mean()) * math.sqrt(len(blocks)) < self.Z_MAX

    def test_neighbouring_rows_steps_and_seeds(self, z: np.ndarray) -> None:
        rows = z[:500]
        others = {
            "next row": z[1:501],
            "next step": df.Noise(20_240_101).fold_in(4).normal(rows.shape).double().numpy(),
            "next seed": df.Noise(20_240_102).fold_in(3).normal(rows.shape).double().numpy(),
            "next block": np.roll(rows, 4, axis=1),
            "next element": np.roll(rows, 1, axis=1),
        }
        for name, other in others.items():
            assert abs((rows * other).mean()) * math.sqrt(rows.size) < self.Z_MAX, name

    def test_row_sums_spread_as_they_should(self, z: np.ndarray) -> None:
        """Row means have variance 1/ROW: rows are neither alike nor opposed."""
        assert stats.kstest(z.mean(1) * math.sqrt(ROW), "norm").pvalue > 1e-4
        assert stats.kstest(z.mean(0) * math.sqrt(len(z)), "norm").pvalue > 1e-4

    def test_duplicates(self) -> None:
        """Words collide as often as 32-bit words must: pairs are Poisson with mean n^2 / 2^33."""
        n = 1 << 20
        words = df.Noise(5).bits((n // 64, 64)).ravel()
        pairs = n - torch.unique(words).numel()
        mean = n * n / 2**33
        assert abs(pairs - mean) < self.Z_MAX * math.sqrt(mean)

    def test_rows_have_keys_of_their_own(self) -> None:
        first_blocks = df.Noise(5).bits((1 << 17, 4))
        assert torch.unique(first_blocks, dim=0).shape[0] == 1 << 17

    def test_bits_are_uniform(self) -> None:
        words = df.Noise(6).bits((1000, 1000))
        share = [((words >> k) & 1).double().mean().item() for k in range(32)]
        assert max(abs(s - 0.5) for s in share) < self.Z_MAX * 0.5 / 1000


def test_threads_of_python_obey_torch(restore_threads):
    """One that starts after torch.set_num_threads(1) had OpenMP's own number."""
    native = df.kernels.native
    for n in (1, 2):
        torch.set_num_threads(n)
        found: list[int] = []
        thread = threading.Thread(target=lambda found=found: found.append(native.max_threads()))
        thread.start(), thread.join()
        assert found == [n] == [native.max_threads()]


def test_an_empty_choice_of_instruction_set_is_none():
    done = subprocess.run(
        [sys.executable, "-c", "import dae_fast"],
        env={**os.environ, "DAE_FAST_CPU_ISA": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
