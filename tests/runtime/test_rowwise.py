"""Sums and stretched rows and columns, beside NumPy's plain expressions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshtape.runtime.rowwise import LONG, SMALL, Rows, add_row, blockwise, sums, unbuffered

SHAPES = ((7, 3), (300, 64), (40, LONG), (3, 5000), (300, 1), (0, 3), (4, 0))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_columns_are_stretched_over_a_matrix(shape: tuple[int, int], dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, column, row = (rng.normal(size=s).astype(dtype) for s in (shape, shape[:1], shape[1:]))
    rows = Rows(np, shape[1], x.dtype)
    close = {"rtol": 1e-2 if dtype == "float16" else 1e-4, "atol": 1e-1 if dtype == "float16" else 1e-4}
    with unbuffered(np, shape[1]):
        for found, wanted in ((rows.sums(x), x.sum(1)), (rows.squares(x), (x * x).sum(1)),
                              (rows.scale(x, column), x * column[:, None]),
                              (rows.scale(x, column, row), x * column[:, None] * row),
                              (rows.shift(x, column), x + column[:, None])):
            assert found.dtype == dtype
            np.testing.assert_allclose(found, wanted, **close)
        place = x.copy()
        assert rows.scale(place, column, row, out=place) is place
        np.testing.assert_allclose(place, x * column[:, None] * row, **close)


@pytest.mark.parametrize("rows", [1, 6, 7, 4096])
def test_a_row_is_added_in_place(rows: int) -> None:
    rng = np.random.default_rng(0)
    x, row = rng.normal(size=(rows, 96)).astype(np.float32), rng.normal(size=96).astype(np.float32)
    for given in (x.copy(), np.array(x, order="F"), np.repeat(x, 2, axis=1)[:, ::2]):
        assert add_row(np, given, row) is given
        np.testing.assert_array_equal(given, x + row)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "complex64"])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize(("shape", "axes"), [
    ((40, 30, 20), (0,)), ((40, 30, 20), (0, 1)), ((40, 30, 20), (2,)), ((40, 30, 20), (1, 2)),
    ((40, 30, 20), (1,)), ((40, 30, 20), (0, 2)), ((40, 30, 20), (0, 1, 2)), ((40, 30, 20), ()),
    ((SMALL, 1), (0,)), ((SMALL, 1), (1,)), ((2, 3 * SMALL), (1,)), ((0, 3), (0,)), ((3,), (0,))])
def test_sums_are_numpys(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool, dtype: str) -> None:
    x = (np.random.default_rng(0).normal(size=shape) * 4).astype(dtype)
    wide = np.dtype("float32" if dtype == "float16" else dtype)
    for given in (x, np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 0, -1)), 0, -1), x[::-1]):
        found, wanted = sums(np, given, axes, keepdims, wide), given.sum(axes, dtype=wide, keepdims=keepdims)
        assert (found.shape, found.dtype) == (wanted.shape, wide)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-2)


def test_a_sum_of_infinities_and_nans_touches_its_own_row_only() -> None:
    x = np.ones((1000, 32), np.float32)
    x[3, 4], x[5, 6] = np.inf, np.nan
    wanted = np.full(1000, 32.0)
    wanted[3], wanted[5] = np.inf, np.nan
    np.testing.assert_array_equal(sums(np, x, (1,), False, x.dtype), wanted)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 70000), (2, 65536)])
def test_blocks_cover_everything_and_may_be_written_over(shape: tuple[int, ...]) -> None:
    x, y = (np.random.default_rng(k).normal(size=shape) for k in range(2))

    def function(out: Any, x: Any, y: Any) -> None:
        np.add(x * 2, y, out=out)

    np.testing.assert_array_equal(blockwise(np, function, (x, y)), x * 2 + y)
    np.testing.assert_array_equal(blockwise(np, function, (x.T, y.T)), (x * 2 + y).T)
    place = x.copy()
    assert blockwise(np, function, (place, y), place) is place
    np.testing.assert_array_equal(place, x * 2 + y)


def test_buffers_are_as_before_after_an_error() -> None:
    before = np.getbufsize()
    with pytest.raises(ZeroDivisionError), unbuffered(np, LONG):
        assert np.getbufsize() != before
        raise ZeroDivisionError
    assert np.getbufsize() == before
