"""Batch normalization on a device beside the plain kernels, in both memory orders and with any chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import meshtape.runtime.ops  # noqa: F401  (fills the table)
from meshtape.runtime.cuda.dnn import batch_norm
from meshtape.runtime.op import TABLE

TYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": bfloat16}
CLOSE = {"float32": 1e-5, "float64": 1e-13, "float16": 2e-3, "bfloat16": 2e-2}
ROWS = ("batch_mean", "batch_variance", "batch_norm", "batch_norm_sums", "batch_norm_grad", "conv_bias_grad")
SHAPES = ((5, 3), (70, 9), (300, 64), (4, 3, 2), (3, 8, 4, 5), (2, 16, 8, 8), (33, 5, 7, 3), (1, 1, 1, 1),
          (7, 1), (2, 300, 3), (1, 2, 1500), (2, 3, 4, 3, 2))


def laid(device: Any, x: Any, order: str) -> Any:
    """`x` on the device: in C order, with channels innermost, or as every second of more elements."""
    cp = device.cp
    held = cp.asarray(x)
    if x.ndim < 2 or order == "C":
        return held
    if order == "channels innermost":
        return cp.moveaxis(cp.ascontiguousarray(cp.moveaxis(held, 1, -1)), -1, 1)
    room = cp.zeros((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
    room[..., 1::2] = held
    return room[..., 1::2]


def given(name: str, shape: Any, dtype: Any) -> tuple[list[Any], dict[str, Any]]:
    rng = np.random.default_rng(len(shape))
    wide = np.float64 if dtype == np.float64 else np.float32
    x, g = (rng.normal(1, 2, shape).astype(dtype) for _ in range(2))
    over = (0, *range(2, len(shape)))
    mean = x.astype(np.float64).mean(over).astype(wide)
    rstd = (1 / np.sqrt(x.astype(np.float64).var(over) + 0.1)).astype(wide)
    weight, bias = (rng.normal(size=shape[1]).astype(wide) for _ in range(2))
    sums = rng.normal(size=(2, shape[1])).astype(wide) * x.size / shape[1]
    count = 3 * x.size // shape[1]
    return {
        "batch_mean": ([x], {"count": count}), "batch_variance": ([x, mean], {"count": count}),
        "batch_norm": ([x, mean, rstd, weight, bias], {"training": True}),
        "batch_norm_sums": ([g, x, mean, rstd], {"training": True}),
        "batch_norm_grad": ([g, x, mean, rstd, weight, sums], {"count": count}), "conv_bias_grad": ([x], {}),
    }[name]


def check(device: Any, name: str, arrays: list[Any], attrs: dict[str, Any], held: list[Any]) -> Any:
    row = TABLE[name]
    shapes = tuple(None if np.ndim(a) == 0 else a.shape for a in arrays)
    types = tuple(None if np.ndim(a) == 0 else a.dtype for a in arrays)
    assert row.device.supports(shapes, types, attrs)
    found = row.device.run(device, *held, **attrs)
    wanted = row.kernel(np, *(np.asarray(a).astype(np.float64) for a in arrays), **attrs)
    dtype = row.dtype(*(a.dtype if isinstance(a, np.ndarray) else float for a in arrays), **attrs)[1][0]
    assert found.shape == wanted.shape and found.dtype == dtype
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(found.get().astype(np.float64) / scale, wanted / scale, atol=CLOSE[dtype.name])
    return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", ["C", "channels innermost", "apart"])
@pytest.mark.parametrize("name", ROWS)
def test_every_shape(device: Any, name: str, order: str, dtype: str) -> None:
    for shape in SHAPES:
        if name == "conv_bias_grad" and len(shape) < 3:
            continue
        arrays, attrs = given(name, shape, TYPES[dtype])
        found = check(device, name, arrays, attrs, [laid(device, a, order) for a in arrays])
        if found.ndim > 3 and order == "channels innermost" and found.size > 100:
            assert found.strides[1] == found.itemsize       # a result lies like its input


def test_numbers_for_weight_and_bias(device: Any) -> None:
    for dtype in TYPES.values():
        arrays, attrs = given("batch_norm", (3, 8, 4, 5), dtype)
        arrays[3:] = [1.5, -0.25]
        check(device, "batch_norm", arrays, attrs, [device.cp.asarray(np.asarray(a)) for a in arrays])
        arrays, attrs = given("batch_norm_grad", (3, 8, 4, 5), dtype)
        arrays[4] = 0.5
        check(device, "batch_norm_grad", arrays, attrs, [device.cp.asarray(np.asarray(a)) for a in arrays])


def test_input_and_gradient_that_lie_differently(device: Any) -> None:
    for name in ("batch_norm_sums", "batch_norm_grad"):
        for orders in (("C", "channels innermost"), ("channels innermost", "apart"), ("apart", "C")):
            arrays, attrs = given(name, (3, 8, 4, 5), np.float32)
            held = [laid(device, a, order) for a, order in zip(arrays, orders, strict=False)]
            check(device, name, arrays, attrs, held + [device.cp.asarray(a) for a in arrays[2:]])


def test_a_gradient_of_another_dtype(device: Any) -> None:
    arrays, attrs = given("batch_norm_sums", (3, 8, 4, 5), bfloat16)
    arrays[0] = arrays[0].astype(np.float32)
    check(device, "batch_norm_sums", arrays, attrs, [device.cp.asarray(a) for a in arrays])


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("name", ROWS)
def test_any_number_of_chunks(device: Any, name: str, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = batch_norm.Layout.__init__

    def init(self: Any, *args: Any) -> None:
        begin(self, *args)
        self.grid = self.grid[0], chunks
    monkeypatch.setattr(batch_norm.Layout, "__init__", init)
    for order in ("C", "channels innermost"):
        for shape in ((9, 40, 5, 7), (2, 3, 40, 40)):
            arrays, attrs = given(name, shape, np.float32)
            check(device, name, arrays, attrs, [laid(device, a, order) for a in arrays])


def test_out_is_filled(device: Any) -> None:
    for name in ("batch_norm", "batch_norm_grad"):
        arrays, attrs = given(name, (3, 8, 4, 5), np.float32)
        held = [device.cp.asarray(a) for a in arrays]
        out = device.cp.empty(arrays[0].shape, np.float32)
        made = TABLE[name].device.run(device, *held, out=out, **attrs)
        assert made is out
        np.testing.assert_allclose(out.get(), TABLE[name].kernel(np, *arrays, **attrs), atol=1e-5)
