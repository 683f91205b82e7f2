"""Convolution and pooling of arrays whose samples are innermost in memory are the same operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from meshtape.runtime.blas import blas_core
from meshtape.runtime.op import lookup
from meshtape.runtime.ops import batch_norm, conv_rows, narrow
from meshtape.runtime.ops.windows import innermost
from meshtape.runtime.rowwise import row_blocks

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
NEVER = 1 << 60


def run(name: str, *arrays: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return op.kernel(np, *arrays, **op.unpack(op.pack(attrs)))


def samples_innermost(x: Array) -> Array:
    """`x` with the same values and shape."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0)


def all_four(x: Array, w: Array, b: Array, g: Array | None, attrs: dict[str, Any]) -> list[Array]:
    y = run("conv_bias", x, w, b, **attrs)
    g = np.ones_like(y) if g is None else g
    return [y, run("conv", x, w, **attrs), run("conv_input_grad", g, w, size=x.shape[2:], **attrs),
            run("conv_weight_grad", g, x, kernel=w.shape[2:], **attrs)]


SAME = ((1, 1), (1, 1))
GEOMETRIES: list[tuple[Any, Any, Any, Any, Any, int]] = [
    ((7, 5), (3, 3), (1, 1), SAME, (1, 1), 1), ((7, 5), (3, 3), (1, 1), SAME, (1, 1), 2),
    ((6, 8), (2, 3), (1, 2), ((0, 2), (3, 0)), (1, 1), 4),
    ((6, 7), (3, 2), (2, 1), ((3, 4), (0, 0)), (1, 3), 2), ((9, 6), (3, 3), (2, 2), SAME, (2, 1), 1),
    ((5, 5), (2, 2), (3, 3), ((1, 0), (0, 1)), (1, 1), 1),
    ((4, 4), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1), ((9,), (3,), (2,), ((1, 2),), (2,), 2),
    ((6,), (4,), (1,), ((3, 0),), (1,), 1), ((2, 2), (3, 3), (1, 1), ((4, 4), (4, 4)), (1, 1), 1)]


@pytest.mark.parametrize("limits", [(1, 1, 1), (300, 500, 3), (1 << 20, 10 ** 6, 64)])
@pytest.mark.parametrize("size, kernel, stride, padding, dilation, groups", GEOMETRIES)
def test_many_samples_are_convolved_like_few(monkeypatch: pytest.MonkeyPatch, size: Any, kernel: Any,
                                             stride: Any, padding: Any, dilation: Any, groups: int,
                                             limits: Any) -> None:
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x, b = RNG.normal(size=(5, 4, *size)), RNG.normal(size=8)
    w = RNG.normal(size=(8, 4 // groups, *kernel))
    monkeypatch.setattr(conv_rows, "SAMPLES", NEVER)
    g = RNG.normal(size=run("conv", x, w, **attrs).shape)
    wanted = all_four(x, w, b, g, attrs)
    monkeypatch.setattr(conv_rows, "SAMPLES", 1)
    places = (conv_rows, "GATHERED"), (narrow, "IN_PLACE"), (narrow, "BLOCK")
    for (module, name), limit in zip(places, limits, strict=True):
        monkeypatch.setattr(module, name, limit)
    monkeypatch.setattr(narrow, "CORES", (blas_core(),))
    for given in (x, samples_innermost(x)):
        for upstream in (g, samples_innermost(g)):
            for got, true in zip(all_four(given, w, b, upstream, attrs), wanted, strict=True):
                np.testing.assert_allclose(got, true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex128"])
def test_results_keep_their_dtype_and_lie_samples_innermost(dtype: str) -> None:
    x = RNG.normal(size=(conv_rows.SAMPLES, 2, 6, 5)).astype(dtype)
    w, b = RNG.normal(size=(3, 2, 3, 3)).astype(dtype), RNG.normal(size=3).astype(dtype)
    attrs = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
    y, _, dx, dw = all_four(x, w, b, None, attrs)
    assert {a.dtype.name for a in (y, dx, dw)} == {dtype}
    assert innermost(np, y) and innermost(np, dx)
    few = [run("conv_bias", x[i:i + 1], w, b, **attrs) for i in range(len(x))]
    np.testing.assert_allclose(y, np.concatenate(few), rtol=1e-2 if dtype == "float16" else 1e-5, atol=1e-3)


def test_outputs_of_an_empty_piece_of_the_weight() -> None:
    x, w = RNG.normal(size=(conv_rows.SAMPLES, 2, 4, 4)), np.zeros((0, 2, 3, 3))
    attrs = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
    y, _, dx, dw = all_four(x, w, np.zeros(0), None, attrs)
    assert y.shape == (len(x), 0, 4, 4) and dw.shape == w.shape
    np.testing.assert_array_equal(dx, np.zeros_like(x))


def test_a_broadcast_gradient() -> None:
    x, w = RNG.normal(size=(conv_rows.SAMPLES, 2, 4, 4)), RNG.normal(size=(3, 2, 3, 3))
    attrs = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}
    shape = (len(x), 3, 4, 4)
    one, ones = np.broadcast_to(1.0, shape), np.ones(shape)
    for got, wanted in zip(all_four(x, w, np.ones(3), one, attrs), all_four(x, w, np.ones(3), ones, attrs),
                           strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


@pytest.mark.parametrize("kernel, stride, padding, dilation, ceil_mode", [
    ((2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1), False), ((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), False),
    ((3, 2), (1, 3), ((0, 1), (1, 0)), (2, 1), True), ((2, 3), (2, 3), ((0, 0), (0, 0)), (1, 1), False)])
def test_pooling_keeps_the_order_in_memory(kernel: Any, stride: Any, padding: Any, dilation: Any,
                                           ceil_mode: bool) -> None:
    x = RNG.integers(-3, 3, (6, 4, 8, 9)).astype(float)          # many ties
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation,
             "ceil_mode": ceil_mode}
    best, tap = run("max_pool", x, **attrs)
    g = RNG.normal(size=best.shape)
    dx = run("max_pool_grad", g, tap, size=(8, 9), **attrs)
    other, number = run("max_pool", samples_innermost(x), **attrs)
    assert innermost(np, other) and innermost(np, number)
    np.testing.assert_array_equal(other, best)
    np.testing.assert_array_equal(number, tap)
    for upstream in (g, samples_innermost(g)):
        for taps in (tap, number):
            got = run("max_pool_grad", upstream, taps, size=(8, 9), **attrs)
            assert innermost(np, got) == innermost(np, taps)
            np.testing.assert_array_equal(got, dx)


def test_averages_keep_the_order_in_memory() -> None:
    x = RNG.normal(size=(6, 4, 8, 9))
    attrs = {"kernel": (2, 3), "stride": (2, 2), "padding": ((0, 0), (1, 1)), "ceil_mode": False}
    y = run("avg_pool", x, **attrs)
    got = run("avg_pool", samples_innermost(x), **attrs)
    assert innermost(np, got)
    np.testing.assert_allclose(got, y, rtol=1e-12)
    dx = run("avg_pool_grad", samples_innermost(y), size=(8, 9), **attrs)
    assert innermost(np, dx)
    np.testing.assert_allclose(dx, run("avg_pool_grad", y, size=(8, 9), **attrs), rtol=1e-12)


@pytest.mark.parametrize("limit, block", [(1, 1), (50, 4), (400, 64), (10 ** 6, 64)])
@pytest.mark.parametrize("rows, inner, columns", [(3, 7, 20), (1, 4, 9), (48, 5, 6), (49, 5, 6), (4, 0, 3),
                                                  (4, 3, 0), (5, 30, 129)])
def test_products_of_few_rows(monkeypatch: pytest.MonkeyPatch, rows: int, inner: int, columns: int,
                              limit: int, block: int) -> None:
    monkeypatch.setattr(narrow, "IN_PLACE", limit)
    monkeypatch.setattr(narrow, "BLOCK", block)
    monkeypatch.setattr(narrow, "CORES", (blas_core(),))
    left, right = RNG.normal(size=(2, rows, inner)), RNG.normal(size=(2, inner, columns))
    out = np.full((2, rows, columns + 3), np.nan)[:, :, :columns]
    narrow.multiply(left, right, out)
    np.testing.assert_allclose(out, left @ right, rtol=1e-12, atol=1e-12)
    long = RNG.normal(size=(2, 3, inner))
    wanted = left @ long.swapaxes(1, 2)
    np.testing.assert_allclose(narrow.inner_products(left, long), wanted, rtol=1e-12, atol=1e-12)
    turned = narrow.inner_products(long, left).swapaxes(1, 2)
    np.testing.assert_allclose(turned, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 40, 1 << 16])
@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (5, 3, 7), (4, 3), (1, 3, 4, 2), (6, 1, 2, 2)])
def test_batch_normalization_is_the_same_in_either_order(monkeypatch: pytest.MonkeyPatch, shape: Any,
                                                         limit: int) -> None:
    monkeypatch.setattr(batch_norm, "row_blocks", partial(row_blocks, cached=limit))
    x, g = RNG.normal(size=shape), RNG.normal(size=shape)
    mean, rstd, weight, bias = (RNG.normal(size=shape[1]) for _ in range(4))
    sums, count = RNG.normal(size=(2, shape[1])), x.size // shape[1]

    def everything(x: Array, g: Array) -> list[Array]:
        return [run("batch_mean", x, count=count), run("batch_variance", x, mean, count=count),
                run("batch_norm", x, mean, rstd, weight, bias), run("batch_norm_sums", g, x, mean, rstd),
                run("batch_norm", x, mean, rstd, 1.0, 0.0),
                run("batch_norm_grad", g, x, mean, rstd, weight, sums)]

    wanted = everything(x, g)
    for given in (x, samples_innermost(x), np.asfortranarray(x)):
        for upstream in (g, samples_innermost(g)):
            found = everything(given, upstream)
            assert innermost(np, found[2]) == innermost(np, given)
            for got, true in zip(found, wanted, strict=True):
                np.testing.assert_allclose(got, true, rtol=1e-10, atol=1e-12)
