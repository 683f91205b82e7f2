"""Random bits and numbers: the stream, the recipe from bits to numbers, the same bits in every layout,
statistics.

Statistical tests use fixed seeds and bounds of about five standard deviations.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest

from meshtape.runtime import philox
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import IO, lookup
from meshtape.runtime.shards import piece

SEED, DRAW = 2**63 + 11, 5
DRAWS: dict[str, tuple[tuple[Any, ...], str]] = {
    "random_uniform": ((-1.0, 3.0), "float32"), "random_normal": ((1.0, 2.0), "float32"),
    "random_integers": ((-5, 100), "int64"), "random_bernoulli": ((0.3,), "bool")}


def draw(name: str, *scalars: Any, seed: int = SEED, draw: int = DRAW, **attrs: Any) -> Any:
    op = lookup(name)
    return op.kernel(np, seed, draw, *scalars, **op.unpack(op.pack(attrs)))


def stream(seed: int, draw: int, count: int) -> Any:
    """NumPy's own stream of this key."""
    return np.random.Philox(key=np.array([seed, draw], np.uint64)).random_raw(count)


# --- bits -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [philox._numpy_words, lambda *a: philox._array_words(np, *a)])
def test_words_are_numpys_philox_stream_from_any_start(words: Any) -> None:
    wanted = stream(SEED, DRAW, 500)
    for start, count in ((0, 500), (1, 7), (4, 4), (6, 1), (257, 243), (3, 0)):
        np.testing.assert_array_equal(words(SEED, DRAW, start, count), wanted[start:start + count])


def test_array_words_agree_with_numpys_far_out_and_for_any_key() -> None:
    for seed, number, start in ((-1, 2**64 - 1, 2**40 + 3), (0, 0, 2**52), (2**64 + 7, -2**63, 0)):
        np.testing.assert_array_equal(philox._array_words(np, seed, number, start, 99),
                                      philox._numpy_words(seed, number, start, 99))


def test_array_words_meet_the_authors_known_answer() -> None:
    # kat_vectors of Random123: philox4x64 with 10 rounds, counter 0 and key 0.
    wanted = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox._array_words(np, 0, 0, -4, 4).tolist() == wanted


def test_wide_products_are_exact() -> None:
    rng = np.random.default_rng(0)
    a = np.append(rng.integers(0, 2**64, 50, dtype=np.uint64), np.array([0, 1, 2**64 - 1, 2**32], np.uint64))
    for b in (0, 1, 2**32 - 1, 2**32, 2**64 - 1, int(a[7])):
        with np.errstate(over="ignore"):
            high, low = philox.wide_product(np, a, b)
        assert [(int(h) << 64) + int(v) for h, v in zip(high, low, strict=True)] == [int(x) * b for x in a]


def test_numbers_follow_the_recipe_from_bits() -> None:
    words = stream(SEED, DRAW, 10).tolist()
    halves = [w >> s & 0xFFFFFFFF for w in words for s in (0, 32)]
    assert philox.halves(np, SEED, DRAW, 0, 20).tolist() == halves
    assert philox.halves(np, SEED, DRAW, 3, 8).tolist() == halves[3:11]
    single = philox.uniform(np, SEED, DRAW, 3, 8, np.dtype("float32"))
    assert single.dtype == np.float32 and single.tolist() == [(h >> 8) * 2.0**-24 for h in halves[3:11]]
    double = philox.uniform(np, SEED, DRAW, 2, 5, np.dtype("float64"))
    assert double.tolist() == [(w >> 11) * 2.0**-53 for w in words[2:7]]
    assert philox.below(np, SEED, DRAW, 1, 4, 1000).tolist() == [w * 1000 >> 64 for w in words[1:5]]
    assert philox.below(np, SEED, DRAW, 1, 4, 2**64).tolist() == words[1:5]
    assert philox.chosen(np, SEED, DRAW, 1, 9, 0.25).tolist() == [h < 2**30 for h in halves[1:10]]
    a = [((w >> 11) + 1) * 2.0**-53 for w in words[::2]]
    b = [(w >> 11) * 2.0**-53 for w in words[1::2]]
    pairs = [np.sqrt(-2 * np.log(u)) * f(2 * np.pi * v)
             for u, v in zip(a, b, strict=True) for f in (np.cos, np.sin)]
    np.testing.assert_allclose(philox.normal(np, SEED, DRAW, 1, 8), pairs[1:9], rtol=1e-14)


def test_probabilities_0_and_1_are_certain() -> None:
    assert not philox.chosen(np, 1, 1, 0, 100, 0.0).any() and philox.chosen(np, 1, 1, 0, 100, 1.0).all()


# --- pieces -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("jump", [0, 10, 2048])
def test_every_layout_gives_the_same_bits(name: str, jump: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "JUMP", jump)
    monkeypatch.setattr(philox, "CHUNK", 64)
    scalars, dtype = DRAWS[name]
    op = lookup(name)
    cases = ((7, 5, 11), (3,)), ((7, 5, 11), (2, 2)), ((33,), (4,)), ((3, 1), (4,)), ((0, 3), (2,))
    for shape, mesh in cases:
        whole = draw(name, *scalars, shape=shape, dtype=dtype)
        attrs = op.unpack(op.pack({"shape": shape, "dtype": dtype}))
        for placements in itertools.product(range(len(shape)), repeat=len(mesh)):
            for coord in itertools.product(*map(range, mesh)):
                part = piece(shape, placements, mesh, coord)
                assert op.local is not None
                found = op.kernel(np, SEED, DRAW, *scalars, **op.local(attrs, IO((), (part,))))
                np.testing.assert_array_equal(found, whole[part.slices])


def test_a_split_of_a_long_last_dimension_makes_only_its_own_numbers() -> None:
    made = 0

    def values(start: int, count: int) -> Any:
        nonlocal made
        made += count
        return np.arange(start, start + count, dtype=np.float64)
    out = philox.fill(np, values, np.empty((8, 3000)), (4, 50_000), (20, 100_000))
    np.testing.assert_array_equal(out, np.arange(2e6).reshape(20, -1)[4:12, 50_000:53_000])
    assert made == out.size


# --- statistics ---------------------------------------------------------------------------------------

def chi_square(counts: Any, expected: Any) -> float:
    """Normalized to mean 0 and standard deviation 1."""
    n = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - n) / np.sqrt(2 * n))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_uniform_numbers_are_uniform_and_in_range(dtype: str) -> None:
    x = draw("random_uniform", 0.0, 1.0, shape=(200_000,), dtype=dtype)
    assert x.dtype == dtype and x.min() >= 0 and x.max() < 1
    counts = np.histogram(x, 100, (0, 1))[0]
    assert abs(chi_square(counts, x.size / 100)) < 5
    assert abs(np.corrcoef(x[::2], x[1::2])[0, 1]) < 5 / np.sqrt(x.size / 2)
    y = draw("random_uniform", -3.0, 5.0, shape=(200_000,), dtype=dtype)
    np.testing.assert_allclose(y, x.astype(float) * 8 - 3, rtol=1e-6, atol=1e-6)


def test_normal_numbers_have_the_moments_and_the_distribution() -> None:
    n = 400_000
    x = draw("random_normal", 0.0, 1.0, shape=(n,), dtype="float64")
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - mean) < 5 * np.sqrt(variance / n)
    edges = np.array([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    below = np.array([0.022750131948, 0.158655253931, 0.308537538726, 0.5])      # of the standard normal
    cumulative = np.concatenate([[0], below, 1 - below[2::-1], [1]])
    counts = np.bincount(np.searchsorted(edges, x), minlength=8)
    assert abs(chi_square(counts, np.diff(cumulative) * n)) < 5
    y = draw("random_normal", 3.0, 0.5, shape=(n,), dtype="float64")
    np.testing.assert_allclose(y, x * 0.5 + 3, rtol=1e-12)


def test_single_precision_normals_are_rounded_doubles() -> None:
    exact = draw("random_normal", 1.0, 2.0, shape=(1000,), dtype="float64")
    for dtype in ("float32", "float16"):
        rounded = draw("random_normal", 1.0, 2.0, shape=(1000,), dtype=dtype)
        np.testing.assert_array_equal(rounded, exact.astype(dtype))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (5.0, 1e-3), (0, -1.5), (1e30, 1e38), (0.0, 1e-42),
                                           (2.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_single_precision_normals_have_the_bits_of_rounded_doubles(mean: float, std: float) -> None:
    with np.errstate(all="ignore"):
        exact = philox.normal(np, SEED, DRAW, 3, 150_001) * std + mean
        found = philox.normal_single(SEED, DRAW, 3, 150_001, mean, std)
        np.testing.assert_array_equal(found, exact.astype(np.float32))


def test_cosines_and_sines_from_polynomials_are_as_close_as_is_relied_upon() -> None:
    turns = np.append(stream(SEED, DRAW, 100_000), np.array([0, 2**62, 2**63, 2**64 - 1], np.uint64))
    angle = (turns >> np.uint64(11)).astype(np.float64) * (2.0**-53 * 2 * np.pi)
    for found, wanted in zip(philox._cos_sin(turns), (np.cos(angle), np.sin(angle)), strict=True):
        assert abs(found - wanted).max() < 2.0**-46


def test_logarithms_cosines_and_sines_in_float64_are_as_good_as_the_library_s() -> None:
    corners = np.array([0, 2**62, 2**63, 3 * 2**62, 2**64 - 1], np.uint64)
    words = np.append(stream(SEED, DRAW, 100_000), corners)
    a = ((words >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53
    np.testing.assert_allclose(philox._log(np, a), np.log(a), rtol=4e-16)
    angle = (words >> np.uint64(11)).astype(np.float64) * (2.0**-53 * 2 * np.pi)
    cosine, sine = philox._turn(np, words)
    assert max(abs(cosine - np.cos(angle)).max(), abs(sine - np.sin(angle)).max()) < 2.0**-50
    assert cosine[-5:-1].tolist() == [1, 0, -1, 0] and sine[-5:-1].tolist() == [0, 1, 0, -1]


def test_the_bits_of_normal_numbers_are_these_on_every_processor() -> None:
    found = philox.normal(np, 1, 2, 0, 100_000)
    assert [x.hex() for x in found[:2].tolist()] == ["-0x1.e84fce2f0d3b0p-1", "0x1.32e639c1600b4p+0"]
    assert hashlib.sha256(found.astype("<f8").tobytes()).hexdigest()[:16] == "bde6d5f84543a005"


def test_integers_cover_their_range_evenly() -> None:
    x = draw("random_integers", -3, 47, shape=(100_000,), dtype="int32")
    assert x.dtype == np.int32 and x.min() == -3 and x.max() == 46
    assert abs(chi_square(np.bincount(x + 3), x.size / 50)) < 5
    wide = draw("random_integers", -2**63, 2**63, shape=(1000,))
    assert wide.min() < -2**62 and wide.max() > 2**62
    large = draw("random_integers", 2**63, 2**64, shape=(1000,), dtype="uint64")
    assert large.min() >= 2**63 and (draw("random_integers", 4, 5, shape=(9,)) == 4).all()


def test_integers_of_an_empty_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no integers in \[3, 3\)"):
        draw("random_integers", 3, 3, shape=(2,))


def test_bernoulli_is_true_with_its_probability() -> None:
    for p in (0.01, 0.5, 0.999):
        x = draw("random_bernoulli", p, shape=(100_000,))
        assert abs(x.mean() - p) < 5 * np.sqrt(p * (1 - p) / x.size)


def test_a_permutation_has_every_number_once_and_differs_by_draw() -> None:
    x = draw("random_permutation", n=1000)
    assert sorted(x.tolist()) == list(range(1000)) and x.dtype == np.int64
    y = draw("random_permutation", draw=DRAW + 1, n=1000)
    assert (x == y).mean() < 0.02 and (x == np.arange(1000)).mean() < 0.02
    firsts = [int(draw("random_permutation", draw=k, n=5)[0]) for k in range(2000)]
    assert abs(chi_square(np.bincount(firsts), 400.0)) < 5


def test_streams_of_neighbouring_draws_and_seeds_are_unrelated() -> None:
    base = draw("random_normal", 0.0, 1.0, shape=(50_000,))
    for seed, number in ((SEED, DRAW + 1), (SEED + 1, DRAW), (DRAW, SEED)):
        other = draw("random_normal", 0.0, 1.0, shape=(50_000,), seed=seed, draw=number)
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / np.sqrt(50_000)


def test_dtypes_that_cannot_be_drawn_are_refused() -> None:
    cases = ("random_uniform", "int64"), ("random_normal", "bool"), ("random_integers", "float32")
    for name, dtype in cases:
        op = lookup(name)
        with pytest.raises(DTypeError, match=f"{name}: cannot make random numbers of dtype {dtype}"):
            op.dtype(int, int, float, float, shape=(2,), dtype=dtype)


# --- tensors made from numbers ------------------------------------------------------------------------------

def make(name: str, *scalars: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return op.kernel(np, *scalars, **op.unpack(op.pack(attrs)))


def test_ranges_are_numpys() -> None:
    cases = (0, 1, 9, "int64"), (5, -2, 4, "int32"), (0.5, 0.1, 50, "float64"), (0, 1, 0, "int8")
    for start, step, n, dtype in cases:
        wanted = (start + np.arange(n) * step).astype(dtype)
        np.testing.assert_array_equal(make("arange", start, step, n=n, dtype=dtype), wanted)
    spaces = (0.0, 1.0, 11, True), (-2.0, 7.0, 6, False), (3.0, 3.0, 4, True), (1.0, 2.0, 1, True)
    for start, stop, n, endpoint in spaces:
        np.testing.assert_array_equal(make("linspace", start, stop, n=n, dtype="float64", endpoint=endpoint),
                                      np.linspace(start, stop, n, endpoint=endpoint))
    np.testing.assert_array_equal(make("linspace", 0.0, 9.5, n=4, dtype="int64"),
                                  np.linspace(0, 9.5, 4, dtype="int64"))


def test_integer_ranges_are_exact_beyond_53_bits() -> None:
    assert make("arange", 2**60 + 1, 3, n=3, dtype="int64").tolist() == [2**60 + 1, 2**60 + 4, 2**60 + 7]
    assert make("arange", 2**63 + 1, 1, n=2, dtype="uint64").tolist() == [2**63 + 1, 2**63 + 2]


def test_eye_is_numpys() -> None:
    for n, m, k in ((3, 3, 0), (2, 5, 1), (5, 2, -3), (4, 4, 9)):
        np.testing.assert_array_equal(make("eye", n=n, m=m, k=k, dtype="float32"), np.eye(n, m, k, "float32"))
