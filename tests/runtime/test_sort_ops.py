"""Sorting, top-k and scans: values beside NumPy's and PyTorch's, order of ties and NaN, derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from eager import Eager, check_gradients, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from table import make_inputs, samples

from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import lookup


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return op.kernel(np, *inputs, **op.unpack(op.pack(attrs)))


@pytest.mark.parametrize("name", ["sort", "topk", "cumsum", "cumprod", "scan"])
def test_gradients_match_finite_differences_to_second_order(name: str) -> None:
    for sample in samples(lookup(name)):
        if sample.diff and sample.dtype == "float64":
            check_gradients(lookup(name), make_inputs(sample, np.random.default_rng(0)), sample.attrs)


special = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, np.inf, -np.inf, np.nan])
numbers = st.lists(special, min_size=1, max_size=12)


def reference(x: Any, descending: bool) -> list[int]:
    """A stable sort by Python, with NaN as the largest value."""
    def key(i: int) -> Any:
        return (1, 0.0) if np.isnan(x[i]) else (0, x[i])
    return sorted(range(len(x)), key=key, reverse=descending)


@settings(max_examples=100, deadline=None)
@given(numbers, st.booleans())
def test_sort_is_stable_both_ways_with_nan_as_the_largest(values: list[float], descending: bool) -> None:
    x = np.array(values)
    found, order = run("sort", x, axis=0, descending=descending)
    assert order.tolist() == reference(x, descending)
    np.testing.assert_array_equal(found, x[order])
    np.testing.assert_array_equal(run("argsort", x, axis=0, descending=descending), order)


@settings(max_examples=100, deadline=None)
@given(numbers, st.booleans(), st.data())
def test_topk_is_the_head_of_the_sorted_values(values: list[float], largest: bool, data: Any) -> None:
    x = np.array(values)
    k = data.draw(st.integers(0, len(x)))
    found, places = run("topk", x, k=k, axis=0, largest=largest)
    np.testing.assert_array_equal(found, run("sort", x, axis=0, descending=largest)[0][:k])
    np.testing.assert_array_equal(found, x[places])
    assert len(set(places.tolist())) == k


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int64", "float16", "float32", "bfloat16"])
def test_every_real_dtype_sorts(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    from meshtape.runtime.dtypes import canonical
    x = np.array([[3, 1, 2, 1], [0, 5, 5, 1]]).astype(canonical(dtype))
    for descending in (False, True):
        values, order = run("sort", x, axis=1, descending=descending)
        assert values.dtype == x.dtype
        for line in range(2):
            assert order[line].tolist() == reference(x[line].astype(float), descending)
        top, _ = run("topk", x, k=2, axis=1, largest=descending)
        np.testing.assert_array_equal(top, values[:, :2])


def test_complex_numbers_have_no_order() -> None:
    for name, attrs in (("sort", {}), ("argsort", {}), ("topk", {"k": 1})):
        op = lookup(name)
        with pytest.raises(DTypeError, match="no order"):
            op.dtype(np.dtype("complex64"), **op.unpack(op.pack(attrs)))


@pytest.mark.parametrize("k", [-1, 4])
def test_topk_refuses_more_than_there_are(k: int) -> None:
    op = lookup("topk")
    with pytest.raises(ShapeError, match="has 3 elements"):
        op.shape((3, 2), k=k, axis=0, largest=True)


# --- scans ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("dtype", "out"), [
    ("bool", "int64"), ("int32", "int64"), ("uint8", "uint64"), ("float16", "float16"),
    ("float32", "float32"),
    ("complex64", "complex64")])
def test_integers_are_summed_in_64_bits(dtype: str, out: str) -> None:
    assert lookup("cumsum").dtype(np.dtype(dtype), axis=0, reverse=False)[1] == [np.dtype(out)]


def test_half_precision_is_accumulated_in_float32() -> None:
    x = np.full(5000, 1e-3, np.float16)
    assert abs(float(run("cumsum", x, axis=0)[-1]) - 5 * float(x[0]) / 1e-3) < 0.01


def test_scans_run_from_either_end() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4))
    np.testing.assert_array_equal(run("cumsum", x, axis=1), np.cumsum(x, 1))
    np.testing.assert_array_equal(run("cumprod", x, axis=0), np.cumprod(x, 0))
    np.testing.assert_array_equal(run("cumsum", x, axis=1, reverse=True), np.cumsum(x[:, ::-1], 1)[:, ::-1])


def test_cumprod_gradient_is_exact_at_zeros() -> None:
    torch = pytest.importorskip("torch")
    values = np.array([[2.0, 0.0, 3.0, 0.0], [0.0, 1.0, -1.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    g = np.random.default_rng(0).standard_normal(values.shape)
    x = Eager(values)
    (found,) = gradients(lookup("cumprod")(x, axis=1), Eager(g), [x])
    t = torch.tensor(values, requires_grad=True)
    torch.cumprod(t, 1).backward(torch.tensor(g))
    np.testing.assert_allclose(found.array, t.grad.numpy(), rtol=1e-12, atol=1e-12)


def test_scan_solves_the_linear_recurrence() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 6, 3))
    s = np.zeros(3)
    for k in range(6):
        s = a[k] * s + b[k]
        np.testing.assert_allclose(run("scan", a, b, axis=0)[k], s)
    backwards = run("scan", a[::-1], b[::-1], axis=0)[::-1]
    np.testing.assert_allclose(run("scan", a, b, axis=0, reverse=True), backwards)


@pytest.mark.parametrize(("name", "attrs", "pick"), [
    ("sort", {"axis": 1, "descending": True},
     lambda t, torch: torch.sort(t, dim=1, descending=True, stable=True)),
    ("sort", {"axis": 0}, lambda t, torch: torch.sort(t, dim=0, stable=True)),
    ("topk", {"k": 3, "axis": 1}, lambda t, torch: torch.topk(t, 3, 1)),
    ("topk", {"k": 2, "axis": 0, "largest": False}, lambda t, torch: torch.topk(t, 2, 0, largest=False))])
def test_sorted_values_places_and_gradients_are_torchs(name: str, attrs: Any, pick: Any) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(3).standard_normal((5, 7))
    x, t = Eager(values), torch.tensor(values, requires_grad=True)
    out, places = lookup(name)(x, **attrs)
    wanted = pick(t, torch)
    np.testing.assert_array_equal(out.array, wanted.values.detach().numpy())
    np.testing.assert_array_equal(places.array, wanted.indices.numpy())
    g = np.random.default_rng(4).standard_normal(out.shape)
    wanted.values.backward(torch.tensor(g))
    np.testing.assert_array_equal(gradients(out, Eager(g), [x])[0].array, t.grad.numpy())
