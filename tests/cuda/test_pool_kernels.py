"""Pooling on a device beside the plain kernels: every sample, and harder shapes in both memory orders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import meshtape.runtime.ops  # noqa: F401  (fills the table)
from meshtape.runtime.op import TABLE

TYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": bfloat16}
CLOSE = {"float32": 5e-6, "float64": 1e-14, "float16": 1e-3, "bfloat16": 1e-2, "int32": 0}
ROWS = ("max_pool", "max_pool_grad", "max_pool_take", "avg_pool", "avg_pool_grad", "adaptive_avg_pool",
        "adaptive_avg_pool_grad")


def laid(device: Any, x: Any, order: str) -> Any:
    """`x` on the device: in C order, with channels innermost, or as every second of more elements."""
    cp = device.cp
    held = cp.asarray(x)
    if order == "channels innermost":
        return cp.moveaxis(cp.ascontiguousarray(cp.moveaxis(held, 1, -1)), -1, 1)
    if order == "apart":
        room = cp.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
        room[..., 1::2] = held
        return room[..., 1::2]
    return held


def check(device: Any, name: str, arrays: list[Any], attrs: dict[str, Any], order: str = "C",
          exact: bool = False) -> Any:
    row = TABLE[name]
    assert row.device.supports(tuple(a.shape for a in arrays), tuple(a.dtype for a in arrays), attrs)
    found = row.device.run(device, *(laid(device, a, order) for a in arrays), **attrs)
    wanted = row.kernel(np, *arrays, **attrs)
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype
        if exact or b.dtype.kind in "iu":
            np.testing.assert_array_equal(a.get(), b)
        else:
            close = CLOSE[b.dtype.name]
            np.testing.assert_allclose(a.get().astype(np.float64), b.astype(np.float64), close, close)
    return found


def given(sample: Any, dtype: Any, rng: Any) -> list[Any]:
    found = []
    for x in sample.inputs:
        if isinstance(x, tuple):
            distinct = rng.permutation(int(np.prod(x))).reshape(x) / 8 - 3
            found.append((distinct if sample.distinct else rng.normal(size=x)).astype(dtype))
        else:
            found.append(x if x.dtype.kind in "iu" else x.astype(dtype))
    return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ROWS)
def test_every_sample(device: Any, name: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for sample in TABLE[name].samples():
        kind = np.dtype(sample.dtype) if sample.dtype.startswith("int") else TYPES[dtype]
        arrays = given(sample, kind, rng)
        for order in ("C", "channels innermost", "apart"):
            check(device, name, arrays, sample.attrs, order)


WINDOWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "overlapping": ((2, 16, 7, 6), {"kernel": (3, 3), "stride": (2, 2), "padding": ((1, 1), (1, 1))}),
    "apart": ((1, 8, 9, 9), {"kernel": (2, 2), "stride": (4, 3), "padding": ((0, 0), (1, 0))}),
    "spread": ((1, 3, 9, 8), {"kernel": (3, 2), "stride": (1, 2), "padding": ((1, 2), (0, 1)),
                              "dilation": (2, 3)}),
    "uneven": ((1, 5, 6, 7), {"kernel": (3, 3), "stride": (2, 2), "padding": ((0, 1), (1, 0)),
                              "ceil_mode": True}),
    "line": ((2, 8, 21), {"kernel": (4,), "stride": (3,), "padding": ((2, 1),)}),
    "room": ((1, 8, 4, 5, 3), {"kernel": (2, 3, 2), "stride": (2, 1, 1),
                               "padding": ((0, 0), (1, 1), (0, 1))}),
    "many taps": ((1, 2, 20, 20), {"kernel": (17, 17), "stride": (2, 1), "padding": ((8, 8), (0, 0))}),
    "one element": ((1, 1, 1, 1), {"kernel": (1, 1), "stride": (1, 1), "padding": ((0, 0), (0, 0))}),
}


def geometry(case: str, averages: bool) -> tuple[Any, dict[str, Any]]:
    x, attrs = WINDOWS[case]
    attrs = {"ceil_mode": False, **attrs}
    if averages:
        attrs.pop("dilation", None)
        return x, {"count_include_pad": True, "divisor": None, **attrs}
    return x, {"dilation": (1,) * (len(x) - 2), **attrs}


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32"])
@pytest.mark.parametrize("order", ["C", "channels innermost", "apart"])
@pytest.mark.parametrize("case", WINDOWS)
def test_the_largest(device: Any, case: str, order: str, dtype: str) -> None:
    x, attrs = geometry(case, False)
    rng = np.random.default_rng(2)
    values = rng.integers(-3, 4, x).astype(dtype)
    _, tap = check(device, "max_pool", [values], attrs, order, exact=True)
    g = rng.integers(-9, 9, tap.shape).astype(dtype)
    check(device, "max_pool_grad", [g, tap.get()], {"size": x[2:], **attrs}, order, exact=True)
    check(device, "max_pool_take", [values, tap.get()], attrs, order, exact=True)


def test_taps_of_more_bytes_than_values_are_read_whole_only_where_they_are_aligned(device: Any) -> None:
    """Eight taps of float16 values take 32 bytes; here they begin at 16."""
    attrs, rng = geometry("many taps", False)[1], np.random.default_rng(2)
    x = rng.normal(size=(1, 8, 20, 20)).astype(np.float16)
    tap = TABLE["max_pool"].kernel(np, x, **attrs)[1].astype(np.int32)
    room = device.cp.empty(tap.size + 4, np.int32)
    room[4:] = device.cp.asarray(np.moveaxis(tap, 1, -1).reshape(-1))
    view = device.cp.moveaxis(room[4:].reshape(1, *tap.shape[2:], 8), -1, 1)
    made = TABLE["max_pool_take"].device.run(device, laid(device, x, "channels innermost"), view, **attrs)
    np.testing.assert_array_equal(made.get(), TABLE["max_pool_take"].kernel(np, x, tap, **attrs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ["C", "channels innermost", "apart"])
@pytest.mark.parametrize("case", [case for case in WINDOWS if case != "spread"])
def test_averages(device: Any, case: str, order: str, dtype: str) -> None:
    x, attrs = geometry(case, True)
    rng = np.random.default_rng(3)
    for option in ({}, {"count_include_pad": False}, {"divisor": 7}):
        y = check(device, "avg_pool", [rng.normal(size=x).astype(TYPES[dtype])], {**attrs, **option}, order)
        check(device, "avg_pool_grad", [rng.normal(size=y.shape).astype(TYPES[dtype])],
              {"size": x[2:], **attrs, **option}, order)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("order", ["C", "channels innermost", "apart"])
@pytest.mark.parametrize("count", [(1, 1), (3, 5), (20, 2), (13, 17)])
def test_averages_over_as_many_windows_as_asked_for(device: Any, count: Any, order: str, dtype: str) -> None:
    rng, x = np.random.default_rng(4), (2, 8, 13, 17)
    check(device, "adaptive_avg_pool", [rng.normal(size=x).astype(dtype)], {"count": count}, order)
    check(device, "adaptive_avg_pool_grad", [rng.normal(size=(*x[:2], *count)).astype(dtype)],
          {"size": x[2:]}, order)


def test_nothing_and_nan(device: Any) -> None:
    attrs = geometry("line", False)[1]
    x = np.ones((2, 8, 21), np.float32)
    x[0, 1, 5] = x[1, 0, 0] = x[1, 3, 20] = np.nan
    check(device, "max_pool", [x], attrs)
    check(device, "max_pool", [x[:0]], attrs)
    check(device, "max_pool", [-np.inf * np.ones_like(x)], attrs)


def test_out_is_filled(device: Any) -> None:
    x, attrs = geometry("overlapping", False)
    rng = np.random.default_rng(2)
    tap = TABLE["max_pool"].kernel(np, rng.normal(size=x), **attrs)[1]
    g = rng.normal(size=tap.shape).astype(np.float32)
    attrs["size"] = x[2:]
    out = device.cp.empty(x, np.float32)
    arrays = (device.cp.asarray(a) for a in (g, tap))
    made = TABLE["max_pool_grad"].device.run(device, *arrays, out=out, **attrs)
    assert made is out
    np.testing.assert_allclose(out.get(), TABLE["max_pool_grad"].kernel(np, g, tap, **attrs), rtol=1e-6)
