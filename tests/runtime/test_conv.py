"""Kernels of convolution and pooling against their definitions, and what they refuse."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest

from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import lookup
from meshtape.runtime.ops import conv, pool, winograd
from meshtape.runtime.ops.windows import blocks, meetings, pool_counts

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
PLAIN = {"stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1), "groups": 1}


def run(name: str, *arrays: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return op.kernel(np, *arrays, **op.unpack(op.pack(attrs)))


def by_definition(x: Array, w: Array, stride: Any, padding: Any, dilation: Any, groups: int) -> Array:
    """y[n, o, p] = sum over c, t of w[o, c, t] * x[n, c, p * stride + t * dilation - padding], element by
    element.
    """
    x = np.pad(x, ((0, 0), (0, 0), *padding))
    count = [(n - d * (k - 1) - 1) // s + 1
             for n, k, s, d in zip(x.shape[2:], w.shape[2:], stride, dilation, strict=True)]
    y = np.zeros((len(x), len(w), *count))
    width = w.shape[1]
    for o, p in itertools.product(range(len(w)), itertools.product(*map(range, count))):
        first = o // (len(w) // groups) * width
        where = tuple(slice(a * s, a * s + d * (k - 1) + 1, d)
                      for a, s, d, k in zip(p, stride, dilation, w.shape[2:], strict=True))
        taken = x[(slice(None), slice(first, first + width), *where)]
        y[(slice(None), o, *p)] = (taken * w[o]).sum(axis=tuple(range(1, x.ndim)))
    return y


CASES = [(s, p, d, g) for s in ((1, 1), (2, 3)) for p in (((0, 0), (0, 0)), ((2, 1), (0, 3)))
         for d in ((1, 1), (2, 1)) for g in (1, 2)]


@pytest.mark.parametrize("limit", [1, 60, 1 << 18])
@pytest.mark.parametrize("stride, padding, dilation, groups", CASES)
def test_convolution_is_its_definition_whatever_the_blocks(
        monkeypatch: pytest.MonkeyPatch, limit: int, stride: Any, padding: Any, dilation: Any,
        groups: int) -> None:
    monkeypatch.setattr(conv, "GATHERED", limit)
    x, w = RNG.normal(size=(3, 4, 6, 7)), RNG.normal(size=(6, 4 // groups, 2, 3))
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = by_definition(x, w, **attrs)
    np.testing.assert_allclose(run("conv", x, w, **attrs), y, rtol=1e-12, atol=1e-12)
    # <g, conv(x, w)> = <conv_input_grad(g, w), x> = <conv_weight_grad(g, x), w>
    g = RNG.normal(size=y.shape)
    dx = run("conv_input_grad", g, w, size=x.shape[2:], **attrs)
    dw = run("conv_weight_grad", g, x, kernel=w.shape[2:], **attrs)
    assert (dx.shape, dw.shape) == (x.shape, w.shape)
    other = RNG.normal(size=x.shape)
    assert (g * by_definition(other, w, **attrs)).sum() == pytest.approx((dx * other).sum(), rel=1e-10)
    other = RNG.normal(size=w.shape)
    assert (g * by_definition(x, other, **attrs)).sum() == pytest.approx((dw * other).sum(), rel=1e-10)


@pytest.mark.parametrize("name", ["conv", "conv_input_grad", "conv_weight_grad"])
def test_memory_of_the_window_matrix_is_bounded(name: str) -> None:
    x, w = np.zeros((8, 8, 64, 64), np.float32), np.zeros((8, 8, 3, 3), np.float32)
    inputs = {"conv": (x, w), "conv_input_grad": (x, w), "conv_weight_grad": (x, x)}[name]
    attrs = {"conv": {}, "conv_input_grad": {"size": (64, 64)}, "conv_weight_grad": {"kernel": (3, 3)}}[name]
    tracemalloc.start()
    run(name, *inputs, **PLAIN, **attrs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * x.nbytes + 8 * conv.GATHERED        # all windows at once would take 9 * x.nbytes


@pytest.mark.parametrize("limit", [1, 1 << 18])
@pytest.mark.parametrize("samples", [1, 5, 16])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (1, 0))])
@pytest.mark.parametrize("size", [(6, 6), (7, 9), (3, 14)])
def test_minimal_filtering_is_the_same_convolution(monkeypatch: pytest.MonkeyPatch, size: Any, padding: Any,
                                                   samples: int, limit: int) -> None:
    x, w = RNG.normal(size=(samples, 2, *size)), RNG.normal(size=(3, 2, 3, 3))
    attrs, b = {**PLAIN, "padding": padding}, RNG.normal(size=3)
    g = RNG.normal(size=run("conv", x, w, **attrs).shape)

    def all_three(x: Array, g: Array) -> list[Array]:
        return [run("conv_bias", x, w, b, **attrs), run("conv_input_grad", g, w, size=size, **attrs),
                run("conv_weight_grad", g, x, kernel=(3, 3), **attrs)]

    direct = all_three(x, g)
    for name, value in (("WINDOWS", 1), ("CHANNELS", 1), ("SHARE", 0.0), ("AT_ONCE", 1), ("PATCHED", limit),
                        ("COLUMNS", limit)):
        monkeypatch.setattr(winograd, name, value)
    assert winograd.suits(np, w.shape, (1, 1), (1, 1), 1, g.shape[2:])
    for given in (x, np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0)):
        for upstream in (g, np.moveaxis(np.ascontiguousarray(np.moveaxis(g, 0, -1)), -1, 0)):
            for got, wanted in zip(all_three(given, upstream), direct, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)


def test_many_channels_in_single_precision() -> None:
    x, w = RNG.normal(size=(2, 64, 12, 12)), RNG.normal(size=(48, 64, 3, 3))
    single = run("conv", x.astype(np.float32), w.astype(np.float32), **PLAIN)
    double = run("conv", x, w, **PLAIN)
    assert single.dtype == np.float32
    assert np.abs(single - double).max() < 3e-5 * np.abs(double).max()


def test_blocks_cover_every_window_once_within_the_limit() -> None:
    cases = [(5, (4, 3), 2, 50), (5, (4, 3), 2, 7), (3, (10,), 1, 4), (0, (2,), 1, 9)]
    for samples, count, per_window, limit in cases:
        seen = np.zeros((samples, count[0]), int)
        for s, r in blocks(samples, count, per_window, limit):
            seen[s, r] += 1
            held = (s.stop - s.start) * (r.stop - r.start) * int(np.prod(count[1:])) * per_window
            assert held <= max(limit, per_window * int(np.prod(count[1:])))
        assert (seen == 1).all()


def test_halves_are_accumulated_in_float32() -> None:
    x, w = np.full((1, 4096, 1), 0.01, np.float16), np.ones((1, 4096, 1), np.float16)
    y = run("conv", x, w, stride=(1,), padding=((0, 0),), dilation=(1,))
    assert y.dtype == np.float16
    assert float(y[0, 0, 0]) == pytest.approx(40.96, rel=2e-3)


def test_strided_inputs_are_read_as_they_lie() -> None:
    x, w = RNG.normal(size=(5, 6, 3, 4)), RNG.normal(size=(2, 3, 3, 3))
    turned = x.transpose(3, 2, 1, 0)[::-1]
    same = run("conv", turned.copy(), w, **PLAIN)
    np.testing.assert_allclose(run("conv", turned, w, **PLAIN), same, rtol=1e-12)


# --- pooling ----------------------------------------------------------------------------------------------

def pooled(x: Array, kernel: Any, stride: Any, padding: Any, dilation: Any,
           ceil_mode: bool) -> tuple[Array, Array]:
    """Largest elements and their flat indices, window by window."""
    count = pool_counts("", x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    best, index = np.zeros((*x.shape[:2], *count)), np.zeros((*x.shape[:2], *count), np.int64)
    for n, c, i, j in np.ndindex(*best.shape):
        at = [(a, b) for a in (i * stride[0] - padding[0][0] + t * dilation[0] for t in range(kernel[0]))
              for b in (j * stride[1] - padding[1][0] + t * dilation[1] for t in range(kernel[1]))
              if 0 <= a < x.shape[2] and 0 <= b < x.shape[3]]
        a, b = max(at, key=lambda p: x[n, c, p[0], p[1]])       # max() keeps the first of equal ones
        best[n, c, i, j], index[n, c, i, j] = x[n, c, a, b], a * x.shape[3] + b
    return best, index


@pytest.mark.parametrize("kernel, stride, padding, dilation, ceil_mode", [
    ((2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1), False), ((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), False),
    ((3, 2), (1, 3), ((0, 1), (1, 0)), (2, 1), True), ((17, 17), (5, 5), ((8, 8), (8, 8)), (1, 1), True),
    ((1, 3), (1, 3), ((0, 0), (1, 0)), (1, 1), False), ((7, 3), (7, 3), ((0, 0), (0, 0)), (1, 1), False)])
def test_max_pool_takes_the_first_of_the_largest(kernel: Any, stride: Any, padding: Any, dilation: Any,
                                                 ceil_mode: bool) -> None:
    x = RNG.integers(-3, 3, (2, 2, 7, 9)).astype(float)          # many ties
    attrs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation,
             "ceil_mode": ceil_mode}
    best, tap = run("max_pool", x, **attrs)
    wanted, index = pooled(x, **attrs)
    np.testing.assert_array_equal(best, wanted)
    assert tap.dtype == pool.tap_dtype(kernel)
    np.testing.assert_array_equal(run("max_pool_index", tap, size=x.shape[2:], **attrs), index)
    np.testing.assert_array_equal(run("max_pool_take", x, tap, **attrs), wanted)
    g = RNG.normal(size=best.shape)
    dx = np.zeros((2, 2, 63))
    for n, c in np.ndindex(2, 2):
        np.add.at(dx[n, c], index[n, c].ravel(), g[n, c].ravel())
    np.full(x.shape, np.nan)        # what malloc gives next has seen other numbers
    got = run("max_pool_grad", g, tap, size=(7, 9), **attrs)
    np.testing.assert_allclose(got, dx.reshape(x.shape), rtol=1e-12)


def test_max_pool_of_infinities_and_nan() -> None:
    x = np.array([[[-np.inf, -np.inf, np.nan, 1.0, np.inf, 2.0]]])
    attrs = {"kernel": (2,), "stride": (2,), "padding": ((0, 0),), "dilation": (1,)}
    best, _ = run("max_pool", x, **attrs)
    np.testing.assert_array_equal(best, [[[-np.inf, np.nan, np.inf]]])


def test_meetings_are_the_elements_inside() -> None:
    cases = itertools.product((1, 4, 5), (1, 3), (1, 2, 4), (0, 1), (1, 2))
    for n, kernel, stride, before, dilation in cases:
        count = 4
        for tap, met in enumerate(meetings(n, kernel, stride, before, dilation, count)):
            wanted = [(i, i * stride + tap * dilation - before) for i in range(count)]
            wanted = [(i, e) for i, e in wanted if 0 <= e < n]
            got = [] if met is None else list(zip(range(count)[met[0]], range(n)[met[1]], strict=True))
            assert got == wanted


# --- what is refused --------------------------------------------------------------------------------------

def shape(name: str, *shapes: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return op.shape(*shapes, **op.unpack(op.pack(attrs)))


@pytest.mark.parametrize("x, w, change, words", [
    ((2, 3, 5, 5), (4, 2, 3, 3), {}, "3 input channels"), ((2, 3, 5), (4, 3, 3, 3), {}, "as many dimensions"),
    ((2, 3, 5, 5), (4, 3, 9, 3), {}, "spans 9"), ((2, 3, 5, 5), (4, 3, 3, 3), {"stride": (0, 1)}, "stride"),
    ((2, 3, 5, 5), (4, 3, 3, 3), {"dilation": (1,)}, "dilation"),
    ((2, 3, 5, 5), (4, 3, 3, 3), {"padding": ((-1, 0), (0, 0))}, "padding"),
    ((2, 4, 5, 5), (3, 2, 3, 3), {"groups": 2}, "multiple of 2")])
def test_convolution_says_what_does_not_fit(x: Any, w: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        shape("conv", x, w, **{**PLAIN, **change})


def test_pooling_says_what_does_not_fit() -> None:
    attrs = {"kernel": (2,), "stride": (2,), "padding": ((2, 2),), "dilation": (1,)}
    with pytest.raises(ShapeError, match="half a window"):
        shape("max_pool", (1, 1, 5), **attrs)
    with pytest.raises(ShapeError, match="meets no element"):
        shape("max_pool", (1, 1, 1), kernel=(3,), stride=(3,), padding=((1, 1),), dilation=(2,),
              ceil_mode=True)
    with pytest.raises(DTypeError, match="complex"):
        lookup("conv").dtype(np.dtype("complex64"), np.dtype("float32"), **PLAIN)
