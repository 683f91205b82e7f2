"""Picking by index and summing by index on a device, against the plain kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.kernels import embedding
from meshtape.runtime.cuda.kernels.scatter import FEW, PIECE
from meshtape.runtime.op import lookup

PICKS = ["embedding", "take", "take_along_axis"]
SUMS = ["embedding_grad", "take_grad", "take_along_axis_grad", "index_grad", "index_add", "index_update"]
FLOATS = ["float32", "float64", "float16", "bfloat16"]


def both(device: Any, name: str, given: Any, **attrs: Any) -> tuple[Any, Any]:
    """Results of the device kernel and of the plain one; given Python scalars go in as they are."""
    op = lookup(name)
    attrs = op.unpack(op.pack(attrs))
    assert op.device is not None
    assert op.device.supports([getattr(a, "shape", None) for a in given],
                              [getattr(a, "dtype", None) for a in given], attrs)
    wanted = op.kernel(np, *given, **attrs)
    arrays = [device.cp.asarray(a) if hasattr(a, "dtype") else a for a in given]
    found = op.device.run(device, *arrays, **attrs)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return found.get(), np.asarray(wanted)


def close(found: Any, wanted: Any) -> None:
    ulps = {"float32": 1e-5, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1e-2}[wanted.dtype.name]
    np.testing.assert_allclose(found.astype(np.float64), wanted.astype(np.float64), rtol=ulps, atol=ulps)


def values(shape: Any, dtype: str = "float32", seed: int = 0) -> Any:
    return np.asarray(np.random.default_rng(seed).normal(size=shape)).astype(dtypes.canonical(dtype))


@pytest.mark.parametrize("name", PICKS + SUMS)
def test_samples(device: Any, name: str) -> None:
    samples = lookup(name).samples
    assert samples is not None
    for sample in samples():
        given = [values(x, "float64", k) if isinstance(x, tuple) else x for k, x in enumerate(sample.inputs)]
        op = lookup(name)
        assert op.device is not None
        if op.device.supports([getattr(a, "shape", None) for a in given],
                              [getattr(a, "dtype", None) for a in given], op.unpack(op.pack(sample.attrs))):
            close(*both(device, name, given, **sample.attrs))
        else:
            assert 0 in given[0].shape or 0 in sample.attrs.get("shape", ()) or np.shape(given[1]) == ()


@pytest.mark.parametrize("dtype", [*FLOATS, "bool", "int8", "int64", "complex64", "complex128"])
@pytest.mark.parametrize("width", [1, 3, 8, 40])
def test_rows_of_every_dtype_and_width_are_copied(device: Any, dtype: str, width: int) -> None:
    kind = dtypes.canonical(dtype)
    x = np.arange(7 * width).astype(kind).reshape(7, width)
    indices = np.array([[6, 0, -7], [-1, 3, 3]])
    np.testing.assert_array_equal(*both(device, "embedding", (x, indices)))
    np.testing.assert_array_equal(*both(device, "take", (x.T.copy(), indices), axis=1))
    np.testing.assert_array_equal(*both(device, "take", (x.reshape(1, 7, width), indices[0]), axis=-2))
    along = np.random.default_rng(0).integers(-7, 7, (4, width))
    np.testing.assert_array_equal(*both(device, "take_along_axis", (x, along), axis=0))


def test_indices_of_64_bits(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "INTS", 0)
    x, indices = values((4, 9, 6)), np.random.default_rng(0).integers(-9, 9, (4, 7, 6))
    np.testing.assert_array_equal(*both(device, "take", (x, indices[0]), axis=1))
    np.testing.assert_array_equal(*both(device, "take_along_axis", (x, indices), axis=1))


def test_views_are_read_where_they_lie(device: Any) -> None:
    base, indices = values((9, 17)), np.array([3, -1, 0])
    on_device = device.cp.asarray(base)
    for view in (lambda a: a.reshape(-1)[1:145].reshape(9, 16), lambda a: a.T, lambda a: a[::2, 1:]):
        wanted = np.take(view(base), indices, axis=0)
        op = lookup("take")
        assert op.device is not None
        found = op.device.run(device, view(on_device), device.cp.asarray(indices), axis=0)
        np.testing.assert_array_equal(found.get(), wanted)


def test_indices_out_of_range_wrap_around(device: Any) -> None:
    op, x = lookup("embedding"), values((5, 4))
    assert op.device is not None
    wild = np.array([5, 12, -6, -2**40, 2**40])
    found = op.device.run(device, device.cp.asarray(x), device.cp.asarray(wild), padding_idx=None)
    np.testing.assert_array_equal(found.get(), x[wild % 5])
    grad = lookup("embedding_grad").device
    assert grad is not None
    sums = grad.run(device, device.cp.asarray(x), device.cp.asarray(wild), num_embeddings=5, padding_idx=None)
    close(sums.get(), lookup("embedding_grad").kernel(np, x, wild % 5, num_embeddings=5, padding_idx=None))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "rows", "width"), [
    (1, 3, 8), (PIECE, 1, 16), (5 * PIECE + 3, 2, 5), (300, 70000, 8), (700, 11, 1), (40, 300, 1100)])
def test_gradients_of_tables(device: Any, dtype: str, tokens: int, rows: int, width: int) -> None:
    if dtype not in ("float32", "bfloat16") and width > 100:
        width = 264
    rng = np.random.default_rng(tokens)
    indices = np.minimum(rng.zipf(1.3, tokens) - 1, rows - 1)
    g = values((tokens, width), dtype)
    found, wanted = both(device, "embedding_grad", (g, indices), num_embeddings=rows, padding_idx=None)
    close(found, wanted)
    padding = int(indices[0])
    without, _ = both(device, "embedding_grad", (g, indices), num_embeddings=rows, padding_idx=padding)
    assert not without[padding].any()
    found[padding] = 0
    np.testing.assert_array_equal(without, found)


def test_the_same_input_gives_the_same_bits_and_whole_numbers_are_exact(device: Any) -> None:
    indices = np.random.default_rng(0).integers(0, 3, 500)
    g = values((500, 12))
    first, _ = both(device, "embedding_grad", (g, indices), num_embeddings=3, padding_idx=None)
    again, _ = both(device, "embedding_grad", (g, indices), num_embeddings=3, padding_idx=None)
    assert first.tobytes() == again.tobytes()
    for dtype in ("int8", "int32", "int64", "uint8"):
        whole = np.random.default_rng(0).integers(0, 100, (500, 12)).astype(dtype)
        np.testing.assert_array_equal(
            *both(device, "take_grad", (whole, indices), shape=(3, 12), axis=0))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_along_every_axis(device: Any, axis: int, dtype: str) -> None:
    shape, rng = [3, 40, 6], np.random.default_rng(axis)
    for n in (1, FEW, 100):
        picked = [*shape]
        picked[axis] = n
        indices = rng.integers(-shape[axis], shape[axis], picked)
        close(*both(device, "take_along_axis_grad", (values(picked, dtype), indices), extent=shape[axis],
                    axis=axis))
        taken = (*shape[:axis], 2, n, *shape[axis + 1:])
        flat = rng.integers(-shape[axis], shape[axis], (2, n))
        close(*both(device, "take_grad", (values(taken, dtype), flat), shape=tuple(shape), axis=axis))


def test_gradients_of_strided_cotangents(device: Any) -> None:
    op, g, indices = lookup("embedding_grad"), values((8, 90)), np.random.default_rng(0).integers(0, 9, 90)
    assert op.device is not None
    found = op.device.run(device, device.cp.asarray(g).T, device.cp.asarray(indices), num_embeddings=9,
                          padding_idx=None)
    close(found.get(), op.kernel(np, g.T, indices, num_embeddings=9, padding_idx=None))


def test_many_index_arrays(device: Any) -> None:
    rng = np.random.default_rng(0)
    x, i, j = values((6, 7, 5)), rng.integers(-6, 6, (20, 1)), rng.integers(-5, 5, (1, 9))
    g = values((20, 9, 7))
    close(*both(device, "index_grad", (g, i, j), shape=(6, 7, 5), dims=(0, 2), at=0))
    close(*both(device, "index_add", (x, g, i, j), dims=(0, 2), at=0))
    close(*both(device, "index_add", (x, 2.5, i, j), dims=(0, 2), at=0))


def test_of_two_values_for_one_place_the_last_wins(device: Any) -> None:
    rng = np.random.default_rng(0)
    x, i, j = values((6, 7, 5)), rng.integers(-6, 6, (20, 1)), rng.integers(-5, 5, (1, 9))
    for at, shape in ((0, (20, 9, 7)), (1, (7, 20, 9)), (0, (9, 1))):
        np.testing.assert_array_equal(
            *both(device, "index_update", (x, values(shape, seed=1), i, j), dims=(0, 2), at=at))
    for dtype in ("bool", "int8", "bfloat16", "complex128"):
        kind = dtypes.canonical(dtype)
        whole, news = np.zeros((50, 3)).astype(kind), np.arange(900).reshape(300, 3).astype(kind)
        np.testing.assert_array_equal(
            *both(device, "index_update", (whole, news, rng.integers(0, 50, 300)), dims=(0,), at=0))


@pytest.mark.parametrize("name", ["embedding_grad", "take_along_axis_grad"])
def test_a_captured_gradient_reads_new_indices(device: Any, name: str) -> None:
    op, rng = lookup(name), np.random.default_rng(0)
    shape, attrs = {"embedding_grad": ((60,), {"num_embeddings": 9, "padding_idx": 1}),
                    "take_along_axis_grad": ((60, 4), {"extent": 9, "axis": 0, "unique": False})}[name]
    g = values((60, 4))
    arrays = [device.cp.asarray(g), device.cp.asarray(rng.integers(0, 9, shape))]
    assert op.device is not None
    op.device.run(device, *arrays, **attrs)
    device.stream.begin_capture()
    made = op.device.run(device, *arrays, **attrs)
    graph = device.stream.end_capture()
    for _ in range(2):
        indices = rng.integers(0, 9, shape)
        arrays[1].set(indices)
        graph.launch(device.stream)
        close(made.get(), op.kernel(np, g, indices, **attrs))
