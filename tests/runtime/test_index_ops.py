"""Rows that read and write at slices and indices, and NumPy's keys taken apart into them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from eager import Eager, check_gradients, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from table import make_inputs, samples

from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.indexing import parse_index, read, write
from meshtape.runtime.op import lookup
from meshtape.runtime.ops.index import BLOCK, accumulate
from meshtape.runtime.ops.slices import normalize_slice

ROWS = ["slice", "slice_scatter", "slice_update", "take", "take_grad", "take_along_axis",
        "take_along_axis_grad", "index", "index_grad", "index_update", "index_add", "embedding",
        "embedding_grad"]


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return op.kernel(np, *inputs, **op.unpack(op.pack(attrs)))


@pytest.mark.parametrize("name", ROWS)
def test_gradients_match_finite_differences_to_second_order(name: str) -> None:
    for sample in samples(lookup(name)):
        if sample.diff and sample.dtype == "float64":
            check_gradients(lookup(name), make_inputs(sample, np.random.default_rng(0)), sample.attrs)


# --- keys -------------------------------------------------------------------------------------------

KINDS = ["int", "slice", "slice", "array", "array", "new", "gap", "mask", "truth"]


@st.composite
def keys(draw: Any, bad: bool = False) -> tuple[tuple[int, ...], Any]:
    """A shape and a key of ints, slices, None, Ellipsis, integer and boolean arrays, True and False."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    index_shape = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    key: list[Any] = []
    d, gap = 0, False
    for _ in range(draw(st.integers(0, len(shape) + 2))):
        kind = draw(st.sampled_from(KINDS))
        if kind == "new":
            key.append(None)
        elif kind == "truth":
            key.append(draw(st.booleans()))
        elif kind == "gap" and not gap:
            gap = True
            key.append(Ellipsis)
            d = draw(st.integers(d, len(shape)))
        elif d < len(shape):
            n, d = shape[d], d + 1
            low, high = (-n - 1, n) if bad else (-n, n - 1)
            key.append(draw(entry(kind, n, low, high, index_shape)))
    return shape, key[0] if len(key) == 1 and draw(st.booleans()) else tuple(key)


def entry(kind: str, n: int, low: int, high: int, index_shape: tuple[int, ...]) -> Any:
    if kind == "slice" or (kind in ("int", "gap") and not n):
        ends = st.none() | st.integers(-n - 1, n + 1)
        return st.builds(slice, ends, ends, st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3]))
    if kind == "mask":
        return st.lists(st.booleans(), min_size=n, max_size=n).map(lambda v: np.array(v, bool))
    if kind == "array":
        size = int(np.prod(index_shape)) if n else 0
        shape = index_shape if n else (0,)
        dtype = st.sampled_from([np.int64, np.int32])
        return st.tuples(st.lists(st.integers(low, max(low, high)), min_size=size, max_size=size), dtype).map(
            lambda v: np.array(v[0], v[1]).reshape(shape))
    return st.integers(low, high) if n else st.just(slice(None))


def outcome(function: Any) -> Any:
    try:
        return function()
    except IndexError:
        return IndexError


@settings(max_examples=300, deadline=None)
@given(keys())
def test_reading_is_numpys(case: Any) -> None:
    shape, key = case
    x = np.arange(float(np.prod(shape))).reshape(shape)
    wanted = outcome(lambda: x[key])
    found = outcome(lambda: read(Eager(x), key).array)
    if wanted is IndexError:
        assert found is IndexError
    elif found is IndexError:
        assert not wanted.size      # of an empty selection NumPy checks neither indices nor masks
    else:
        np.testing.assert_array_equal(found, wanted)
        assert found.shape == np.shape(wanted) == parse_index(key, shape).result


@settings(max_examples=200, deadline=None)
@given(keys(bad=True))
def test_a_key_that_numpy_refuses_is_refused(case: Any) -> None:
    shape, key = case
    x = np.zeros(shape)
    wanted, found = outcome(lambda: x[key]), outcome(lambda: parse_index(key, shape))
    if wanted is IndexError:
        assert found is IndexError
    elif found is IndexError:
        assert not wanted.size


@settings(max_examples=300, deadline=None)
@given(keys(), st.data())
def test_writing_is_numpys(case: Any, data: Any) -> None:
    shape, key = case
    x = np.arange(float(np.prod(shape))).reshape(shape)
    wanted = x.copy()
    part = outcome(lambda: x[key])
    if part is IndexError or outcome(lambda: parse_index(key, shape)) is IndexError:
        return
    extents = [data.draw(st.sampled_from([1, n])) for n in np.shape(part)]
    leading = extents and not parse_index(key, shape).indices     # NumPy refuses them for some masks
    drop = data.draw(st.integers(-1 if leading else 0, len(extents)))
    value_shape = (1, *extents) if drop < 0 else tuple(extents[drop:])
    value: Any = np.asarray(-1 - np.arange(float(np.prod(value_shape))).reshape(value_shape))
    if data.draw(st.booleans()):
        value = 0.5
    wanted[key] = value
    found = write(Eager(x), key, Eager(value) if isinstance(value, np.ndarray) else value)
    np.testing.assert_array_equal(found.array, wanted)


@pytest.mark.parametrize("key", [
    (slice(1, 3), 0), (0, slice(None, None, -2)), (None, 2), ([2, 0], slice(1, 3)), (0, [1, 3]),
    (..., [0, 1], [1, 2]), (slice(1, None), None, [3, 0]), (np.array([True, False, True]), slice(1, 4))])
def test_reading_and_writing_have_gradients(key: Any) -> None:
    shape = (2, 3, 4) if key[0] is Ellipsis else (3, 4)
    values = np.arange(float(np.prod(shape))).reshape(shape)
    g = np.random.default_rng(0).standard_normal(values[key].shape)
    x = Eager(values)
    wanted = np.zeros(shape)
    np.add.at(wanted, key, g)
    np.testing.assert_array_equal(gradients(read(x, key), Eager(g), [x])[0].array, wanted)
    value, seed = Eager(g), np.random.default_rng(1).standard_normal(shape)
    by_x, by_value = gradients(write(x, key, value), Eager(seed), [x, value])
    kept = seed.copy()
    kept[key] = 0
    np.testing.assert_array_equal(by_x.array, kept)
    np.testing.assert_array_equal(by_value.array, seed[key])


def test_a_plain_key_takes_one_step_at_most() -> None:
    assert parse_index((slice(None), ...), (3, 4)).takes_all
    steps = parse_index((slice(1, 3), slice(None)), (3, 4))
    assert not steps.takes_all and steps.viewed == steps.sliced and not steps.indices
    steps = parse_index(([0, 1],), (3, 4))
    assert steps.takes_all and steps.viewed == steps.sliced and steps.dims == (0,)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 6), st.data())
def test_equal_selections_have_equal_slices(n: int, data: Any) -> None:
    ends = st.none() | st.integers(-8, 8)
    steps = st.none() | st.integers(-4, 4).filter(bool)
    a, b = (slice(data.draw(ends), data.draw(ends), data.draw(steps)) for _ in range(2))
    x = list(range(n))
    for s in (a, b):
        assert [x[i] for i in range(*normalize_slice(s, n))] == x[s]
    if x[a] == x[b]:
        assert normalize_slice(a, n) == normalize_slice(b, n)


class Mask:
    shape, dtype = (3,), np.dtype(bool)


@pytest.mark.parametrize(("key", "says"), [
    (3, "index 3 is out of range for dimension 0 of 3"), ([0, 7], "index 7 is out of range"),
    ((0, -5), "index -5 is out of range for dimension 1 of 4"), ((0, 0, 0), "3 indices"),
    ((..., ...), "2 Ellipsis"), (1.5, "must be an int"), ([0.5], "must be of integers"),
    ([False] * 4, "mask has 4 elements along dimension 0 of 3"),
    (Mask(), "use nonzero"), (([0, 1], [0, 1, 2]), "do not broadcast")])
def test_refused_keys_say_why(key: Any, says: str) -> None:
    with pytest.raises(IndexError, match=says):
        parse_index(key, (3, 4))


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(2,\) does not broadcast"):
        write(Eager(np.zeros((3, 4))), slice(1, 2), Eager(np.zeros(2)))
    with pytest.raises(DTypeError, match="complex"):
        write(Eager(np.zeros((3, 4))), 0, Eager(np.zeros(4, complex)))


# --- gathers and scatter-adds -------------------------------------------------------------------------

@pytest.mark.parametrize(("m", "k", "n"), [
    (0, 3, 4), (5, 0, 4), (1, 1, 1), (50, 3, 7), (7, BLOCK + 5, 2), (BLOCK + 9, 1, 5)])
def test_accumulate_is_add_at(m: int, k: int, n: int) -> None:
    rng = np.random.default_rng(0)
    values, rows = rng.standard_normal((m, k)), rng.integers(0, n, m)
    wanted = np.zeros((n, k))
    np.add.at(wanted, rows, values)
    np.testing.assert_allclose(accumulate(np, values, rows, n), wanted, rtol=1e-12)


def test_half_precision_is_accumulated_in_float32() -> None:
    ones = np.ones((4096, 1), np.float16)
    found = accumulate(np, ones, np.zeros(4096, np.int64), 1)
    assert found.dtype == np.float16 and found[0, 0] == 4096


@pytest.mark.parametrize(("name", "inputs", "attrs"), [
    ("take", [np.array([0, 5])], {"axis": 0}), ("take_along_axis", [np.array([[0, 5, 0, 0]])], {"axis": 0}),
    ("index", [np.array([0, 5])], {"dims": (0,), "at": 0}), ("embedding", [np.array([[5]])], {}),
    ("index_update", [1.0, np.array([5])], {"dims": (0,), "at": 0}),
    ("index_add", [1.0, np.array([5])], {"dims": (0,), "at": 0})])
def test_an_index_out_of_range_is_named(name: str, inputs: Any, attrs: Any) -> None:
    with pytest.raises(IndexError, match=f"^{name}: index 5 is out of range for dimension 0 of 3 elements"):
        run(name, np.zeros((3, 4)), *inputs, **attrs)


def test_one_hot_refuses_what_is_no_class() -> None:
    np.testing.assert_array_equal(run("one_hot", np.array([2, 0]), num_classes=3), [[0, 0, 1], [1, 0, 0]])
    for bad in (-1, 3):
        with pytest.raises(IndexError, match=f"^one_hot: {bad} is no class"):
            run("one_hot", np.array([0, bad]), num_classes=3)


def test_indices_must_be_integers() -> None:
    for name, attrs in (("take", {"axis": 0}), ("index", {"dims": (0,), "at": 0}), ("embedding", {})):
        op = lookup(name)
        for dtype in ("float32", "bool"):
            with pytest.raises(DTypeError, match="indices must be integers"):
                op.dtype(np.dtype("float32"), np.dtype(dtype), **op.unpack(op.pack(attrs)))
        assert op.dtype(np.dtype("float32"), np.dtype("uint8"), **op.unpack(op.pack(attrs)))[0][1] == np.int64


def test_take_and_take_along_axis_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 5))
    rows = rng.integers(-4, 4, (2, 3))
    np.testing.assert_array_equal(run("take", x, rows, axis=1), np.take(x, rows, axis=1))
    lines = rng.integers(-4, 4, (3, 6, 5))
    np.testing.assert_array_equal(run("take_along_axis", x, lines, axis=1), np.take_along_axis(x, lines, 1))


def test_written_elements_selected_twice_keep_the_last_value() -> None:
    out = run("index_update", np.zeros(4), np.array([1.0, 2.0, 3.0]), np.array([2, 2, 0]), dims=(0,), at=0)
    np.testing.assert_array_equal(out, [3, 0, 2, 0])
    out = run("index_add", np.zeros(4), np.array([1.0, 2.0, 3.0]), np.array([2, -2, 0]), dims=(0,), at=0)
    np.testing.assert_array_equal(out, [3, 0, 3, 0])


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding_and_its_gradient_are_torchs(padding_idx: int | None) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    table, tokens = rng.standard_normal((6, 3)), rng.integers(0, 6, (4, 5))
    weight, t = Eager(table), torch.tensor(table, requires_grad=True)
    out = lookup("embedding")(weight, tokens, padding_idx=padding_idx)
    wanted = torch.nn.functional.embedding(torch.tensor(tokens), t, padding_idx=padding_idx)
    np.testing.assert_array_equal(out.array, wanted.detach().numpy())
    g = rng.standard_normal(out.shape)
    wanted.backward(torch.tensor(g))
    np.testing.assert_allclose(gradients(out, Eager(g), [weight])[0].array, t.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize(("tokens", "rows", "width"), [(3000, 7, 5), (3000, 1, 64), (50, 40, 2000)])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embedding_gradient_of_rows_that_come_often(tokens: int, rows: int, width: int,
                                                    padding_idx: int | None) -> None:
    rng = np.random.default_rng(0)
    found_at, g = rng.integers(-rows, rows, (2, tokens)), rng.normal(size=(2, tokens, width))
    found_at[found_at % rows == 3] = 2                  # a row that does not come at all
    wanted = np.zeros((rows, width))
    np.add.at(wanted, found_at % rows, g)
    if padding_idx is not None:
        wanted[padding_idx] = 0
    found = lookup("embedding_grad").kernel(np, g, found_at, rows, padding_idx)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_embedding_gradient_leaves_out_the_padding_row_in_every_order() -> None:
    op = lookup("embedding_grad")
    tokens = np.array([[0, 2, 1], [2, 2, 0]])
    check_gradients(op, [np.random.default_rng(0).standard_normal((2, 3, 4)), tokens],
                    {"num_embeddings": 3, "padding_idx": -1})
    assert not run("embedding_grad", np.ones((2, 3, 4)), tokens, num_embeddings=3, padding_idx=2)[2].any()
