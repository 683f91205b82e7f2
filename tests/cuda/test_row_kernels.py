"""CUDA kernels of rows (softmax, losses, norms, columns) compute what the plain kernels compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from table import in_dtype, make_case, samples

from meshtape.runtime import dtypes
from meshtape.runtime.op import TABLE

# Relative and absolute: both sides compute 16-bit floats in float32 and round once.
TOLERANCE = {"float64": (1e-12, 1e-13), "float32": (4e-6, 4e-7), "float16": (2e-3, 1e-6),
             "bfloat16": (1.6e-2, 1e-6)}
FLOATS = list(TOLERANCE)


def to_device(dev: Any, x: Any) -> Any:
    """`x` on the device; a number as the kernels here ask for it."""
    return dev.cp.asarray(np.asarray(x, None if isinstance(x, np.ndarray) else np.float64))


def unaligned(dev: Any, x: np.ndarray[Any, Any]) -> Any:
    """`x` on the device, one element behind an aligned address."""
    whole = dev.cp.empty(x.size + 1, x.dtype)
    whole[1:] = dev.cp.asarray(x.reshape(-1))
    return whole[1:].reshape(x.shape)


def spread(dev: Any, x: np.ndarray[Any, Any]) -> Any:
    """`x` on the device with gaps between elements of its last dimension."""
    whole = dev.cp.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    whole[..., ::2] = dev.cp.asarray(x)
    return whole[..., ::2]


def same(got: Sequence[Any], wanted: Sequence[Any], what: str, loose: float = 1) -> None:
    for k, (a, b) in enumerate(zip(got, wanted, strict=True)):
        a = a.get()
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{what}, output {k}"
        rtol, atol = (loose * t for t in TOLERANCE.get(np.dtype(b.dtype).name, (0, 0)))
        wide = np.float64 if dtypes.is_floating(b.dtype) else b.dtype
        np.testing.assert_allclose(a.astype(wide), b.astype(wide), rtol, atol, err_msg=f"{what}, output {k}")


def check(dev: Any, name: str, inputs: Sequence[Any], attrs: dict[str, Any] | None = None, loose: float = 1,
          place: Any = to_device) -> None:
    """The row's CUDA kernel on these NumPy arrays and scalars against its plain kernel."""
    op = TABLE[name]
    given = {**op.attrs, **(attrs or {})}
    shapes = tuple(x.shape if isinstance(x, np.ndarray) else None for x in inputs)
    assert op.device is not None
    assert op.device.supports(shapes, tuple(getattr(x, "dtype", None) for x in inputs), given)
    with np.errstate(all="ignore"):
        wanted = op.kernel(np, *inputs, **given)
    got = op.device.run(dev, *(place(dev, x) if isinstance(x, np.ndarray) and x.ndim else to_device(dev, x)
                               for x in inputs), **given)
    many = op.n_out != 1
    _, outs = op.dtype(*(getattr(x, "dtype", type(x)) for x in inputs), **given)
    same(got if many else [got],
         [np.asarray(w).astype(d) for w, d in zip(wanted if many else [wanted], outs, strict=True)],
         f"{name}{shapes} {given}", loose)


def normal(seed: int, shape: tuple[int, ...], dtype: str, low: float = 0, spread: float = 2) -> Any:
    return np.random.default_rng(seed).normal(low, spread, shape).astype(dtypes.canonical(dtype))


# --- every sample of every row ------------------------------------------------------------------------

ROWS = ["softmax", "log_softmax", "softmax_grad", "log_softmax_grad", "cross_entropy", "cross_entropy_grad",
        "nll", "nll_grad", "layer_norm", "normalize", "layer_norm_grad", "normalize_grad", "logsumexp"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ROWS)
def test_samples_of_the_row_agree_with_its_plain_kernel(device: Any, name: str, dtype: str) -> None:
    op, ran = TABLE[name], 0
    assert op.device is not None
    for sample in samples(op):
        case = make_case(op, in_dtype(sample, dtypes.canonical(dtype)), np.random.default_rng(0))
        found = [x for x in case.inputs if isinstance(x, np.ndarray)]
        if op.device.supports(tuple(x.shape if isinstance(x, np.ndarray) else None for x in case.inputs),
                              tuple(getattr(x, "dtype", None) for x in case.inputs), case.attrs):
            check(device, name, case.inputs, case.attrs)
            ran += 1
        assert found
    assert ran


# --- softmax --------------------------------------------------------------------------------------------

WIDTHS = [1, 2, 7, 8, 33, 64, 129, 1000, 1024, 2048, 4100]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_of_rows_of_every_width(device: Any, name: str, dtype: str) -> None:
    for width in WIDTHS:
        check(device, name, [normal(width, (5, width), dtype)], {"axis": -1})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["softmax_grad", "log_softmax_grad"])
def test_softmax_gradient_of_rows_of_every_width(device: Any, name: str, dtype: str) -> None:
    for width in WIDTHS:
        x = normal(width, (5, width), "float64")
        y = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        y = (np.log(y) if name == "log_softmax_grad" else y).astype(dtypes.canonical(dtype))
        check(device, name, [normal(width + 1, (5, width), dtype), y], {"axis": -1}, loose=4)


@pytest.mark.parametrize("place", [unaligned, spread])
@pytest.mark.parametrize("name", ["softmax", "log_softmax_grad"])
def test_softmax_of_what_is_not_aligned_or_contiguous(device: Any, name: str, place: Any) -> None:
    for shape, axis in (((6, 40), -1), ((3, 8, 16), 1)):
        inputs = [normal(k, shape, "float32") for k in range(2 if "grad" in name else 1)]
        check(device, name, inputs, {"axis": axis}, place=place, loose=8)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_of_very_long_rows_and_of_infinities(device: Any, name: str) -> None:
    x = normal(0, (2, 40004), "float32", spread=30)
    x[0, :30000] = -np.inf
    check(device, name, [x], loose=4)
    x = normal(1, (4, 50), "float32")
    x[0] = -np.inf
    x[1, 5] = np.inf
    x[2, 7] = np.nan
    x[3, :49] = -np.inf
    check(device, name, [x])


def test_softmax_of_long_rows_reads_them_again(device: Any) -> None:
    for dtype in FLOATS:
        for width in (40000, 34001):
            x = normal(width, (1, width), dtype)
            x[0, :9000] = -np.inf
            check(device, "softmax", [x], loose=4)
            y = (np.exp(normal(2, (1, width), "float64")) / width).astype(x.dtype)
            check(device, "softmax_grad", [normal(3, (1, width), dtype), y], loose=8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_logsumexp_over_any_axes_and_of_infinities(device: Any, dtype: str) -> None:
    for axis in (None, 0, (0, 2), -1):
        for keepdims in (False, True):
            attrs = {"axis": axis, "keepdims": keepdims}
            check(device, "logsumexp", [normal(0, (5, 4, 66), dtype)], attrs, loose=2)
    x = normal(1, (5, 40), dtype)
    x[0], x[1, 3], x[2, 3], x[3, :39] = -np.inf, np.inf, np.nan, -np.inf
    check(device, "logsumexp", [x], {"axis": 1})
    check(device, "logsumexp", [normal(2, (1, 40000), dtype, low=50)], {"axis": 1}, 4)


# --- losses ---------------------------------------------------------------------------------------------

def targets(seed: int, shape: tuple[int, ...], classes: int, dtype: str = "int64") -> Any:
    found = np.random.default_rng(seed).integers(0, classes, shape).astype(dtype)
    return np.where(np.random.default_rng(seed + 1).random(shape) < 0.2, -100, found).astype(dtype)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_cross_entropy_of_rows_of_every_width(device: Any, dtype: str, smoothing: float) -> None:
    attrs = {"label_smoothing": smoothing}
    for width in (1, 7, 64, 1000, 4100):
        x, t = normal(width, (70, width), dtype), targets(width, (70,), width)
        check(device, "cross_entropy", [x, t], attrs, loose=8)
        g, p = np.array(0.3, "float64" if dtype == "float64" else "float32"), np.abs(x) / np.abs(x).max()
        check(device, "cross_entropy_grad", [g, p.astype(x.dtype), t], attrs, loose=4)


def test_cross_entropy_of_long_rows_pixels_and_small_targets(device: Any) -> None:
    check(device, "cross_entropy", [normal(0, (2, 40000), "float32"), targets(1, (2,), 40000, "int32")],
          loose=8)
    check(device, "cross_entropy", [normal(0, (2, 34001), "bfloat16"), targets(1, (2,), 40, "int16")],
          {"label_smoothing": 0.2}, loose=8)
    x, t = normal(2, (3, 5, 4, 6), "float32"), targets(3, (3, 4, 6), 5)
    check(device, "cross_entropy", [x, t], loose=8)
    check(device, "cross_entropy_grad", [np.array(2, "float32"), np.abs(x), t], loose=4)
    check(device, "nll", [x, t], place=spread)
    check(device, "nll_grad", [normal(4, (3, 4, 6), "float16"), t], {"classes": 5})


def test_cross_entropy_gradient_takes_a_number_from_the_device(device: Any) -> None:
    p, t = np.abs(normal(0, (6, 10), "float32")), targets(1, (6,), 10)
    op = TABLE["cross_entropy_grad"]
    assert op.device is not None
    attrs = {"ignore_index": -100, "label_smoothing": 0.0}
    wanted = op.kernel(np, 1.5, p, t, **attrs)
    g = device.cp.asarray(np.array(1.5))
    same([op.device.run(device, g, *map(device.cp.asarray, (p, t)), **attrs)], [wanted], "cross_entropy_grad")


def test_a_target_that_is_no_class_gives_nan_and_touches_no_other_memory(device: Any) -> None:
    x, t = normal(0, (4, 8), "float32"), np.array([1, 8, 2, -3])
    op, grad, nll = (TABLE[name].device for name in ("cross_entropy", "cross_entropy_grad", "nll"))
    assert op is not None and grad is not None and nll is not None
    attrs = {"ignore_index": -100, "label_smoothing": 0.0}
    given = [device.cp.asarray(a) for a in (x, t)]
    total, count, p = op.run(device, *given, **attrs)
    assert np.isnan(total.get()) and count.get() == 4
    d = grad.run(device, device.cp.ones((), "float32"), p, given[1], **attrs).get()
    assert np.isnan(d).all(1).tolist() == [False, True, False, True]
    assert np.isnan(nll.run(device, *given, ignore_index=-100).get()).tolist() == [False, True, False, True]


def test_the_sum_of_losses_is_the_same_every_time(device: Any) -> None:
    given = [device.cp.asarray(a) for a in (normal(0, (3000, 10), "float32"), targets(1, (3000,), 10))]
    op = TABLE["cross_entropy"].device
    assert op is not None
    first, again = (op.run(device, *given, ignore_index=-100, label_smoothing=0.0)[0].get() for _ in range(2))
    assert first.tobytes() == again.tobytes()


# --- layer norm -----------------------------------------------------------------------------------------

NORM_SHAPES = [(9, 1), (200, 7), (300, 16), (40, 64), (6, 130), (9, 768), (3, 1025), (3, 4096)]


def norm_inputs(shape: tuple[int, ...], dtype: str) -> list[Any]:
    """x with a mean that is not small, weight and bias."""
    return [normal(0, shape, dtype, low=10), *(normal(k, shape[1:], dtype, low=1) for k in (1, 2))]


def grad_inputs(shape: tuple[int, ...], dtype: str, affine: bool) -> list[Any]:
    x, weight, _ = norm_inputs(shape, dtype)
    wide = x.astype("float64")
    acc = "float64" if dtype == "float64" else "float32"
    mean, rstd = wide.mean(1, keepdims=True), 1 / np.sqrt(wide.var(1, keepdims=True) + 1)
    return [normal(3, shape, dtype), x, mean.astype(acc), rstd.astype(acc), *([weight] if affine else [])]


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm_of_rows_of_every_width(device: Any, dtype: str) -> None:
    for shape in NORM_SHAPES:
        x, weight, bias = norm_inputs(shape, dtype)
        check(device, "layer_norm", [x, weight, bias], {"eps": 1e-5}, loose=20)
        if shape[1] > 1:
            check(device, "normalize", [x], {"eps": 1e-5}, loose=20)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm_gradient_of_rows_of_every_width(device: Any, dtype: str) -> None:
    for shape in NORM_SHAPES:
        check(device, "layer_norm_grad", grad_inputs(shape, dtype, True), loose=40)
        check(device, "normalize_grad", grad_inputs(shape, dtype, False), loose=40)


def test_layer_norm_of_rows_that_are_read_again_and_of_several_dimensions(device: Any) -> None:
    for dtype in ("float32", "bfloat16", "float64"):
        check(device, "layer_norm", norm_inputs((2, 17000), dtype), loose=20)
        check(device, "layer_norm_grad", grad_inputs((3, 17000), dtype, True), loose=40)
    x = normal(0, (3, 5, 4, 6), "float32")
    check(device, "layer_norm", [x, x[0, 0], x[1, 1]], {"ndim": 2}, loose=20)
    check(device, "normalize", [x], {"ndim": 3}, loose=20)


@pytest.mark.parametrize("place", [unaligned, spread])
def test_layer_norm_of_what_is_not_aligned_or_contiguous(device: Any, place: Any) -> None:
    check(device, "layer_norm", norm_inputs((6, 64), "float32"), place=place, loose=20)
    check(device, "layer_norm_grad", grad_inputs((70, 64), "float16", True), place=place, loose=40)


@pytest.mark.parametrize("name", ["softmax", "layer_norm_grad"])
def test_results_do_not_depend_on_alignment(device: Any, name: str) -> None:
    inputs = [normal(0, (40, 64), "float32")] if name == "softmax" else grad_inputs((40, 64), "float32", True)
    op = TABLE[name]
    assert op.device is not None
    first, second = (op.device.run(device, *(place(device, x) for x in inputs), **op.attrs)
                     for place in (to_device, unaligned))
    pairs = zip(first, second, strict=True) if op.n_out > 1 else [(first, second)]
    assert all(a.get().tobytes() == b.get().tobytes() for a, b in pairs)


def test_column_sums_of_long_matrices(device: Any) -> None:
    from meshtape.runtime.cuda.kernels.columns import column_sums
    for shape in ((1, 1), (3, 40), (2000, 3), (1500, 70)):
        for dtype in ("float32", "float16", "float64"):
            x = normal(0, shape, dtype)
            got = column_sums(device, device.cp.asarray(x), np.dtype(dtype)).get()
            np.testing.assert_allclose(got, x.astype("float64").sum(0), 2e-3 if dtype == "float16" else 1e-5,
                                       1e-3 if dtype == "float16" else 1e-4)
