"""erf against the standard library's, element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meshtape.runtime.op import lookup
from meshtape.runtime.special import erf, select

POINTS = np.concatenate([np.linspace(-7, 7, 20001), np.logspace(-300, 0, 2001), -np.logspace(-20, 1, 501)])


def reference(x: np.ndarray) -> np.ndarray:
    return np.array([math.erf(v) for v in x.ravel().tolist()]).reshape(x.shape)


@pytest.mark.parametrize(("dtype", "relative"), [("float64", 1e-15), ("float32", 5e-7), ("float16", 1e-3)])
def test_erf_is_accurate_relative_to_its_value(dtype: str, relative: float) -> None:
    x = POINTS.astype(dtype)
    x = x[(x != 0) & (np.abs(x.astype(np.float64)) >= np.finfo(dtype).tiny)]
    found, wanted = erf(np, x).astype(np.float64), reference(x.astype(np.float64))
    assert erf(np, x).dtype == dtype
    assert np.max(np.abs(found - wanted) / np.abs(wanted)) < relative


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_erf_at_the_ends(dtype: str) -> None:
    found = erf(np, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 30.0, -30.0], dtype))
    np.testing.assert_array_equal(found, np.array([0.0, -0.0, 1.0, -1.0, np.nan, 1.0, -1.0], dtype))
    assert np.signbit(found[1])
    assert np.max(np.abs(erf(np, POINTS.astype(dtype)))) <= 1


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (70, 501), (16384,), (16385,)])
def test_erf_keeps_the_shape_across_blocks_and_strides(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_allclose(erf(np, x), reference(x), rtol=1e-15)
    np.testing.assert_allclose(erf(np, x.T), reference(x.T), rtol=1e-15)


DTYPES = ["float16", "float32", "float64", "complex64", "complex128", "int8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [((90, 70),) * 3, ((90, 1), (70,), (90, 70)), ((90, 70), (1,), (90, 1)),
                                    ((90, 1), (1, 70), (70,)), ((3,), (3,), (3,)), ((), (5,), (5,))])
def test_select_is_where(dtype: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    rng = np.random.default_rng(0)
    c = rng.random(shapes[0]) < 0.5
    x, y = (np.asarray(rng.normal(size=s) * 3).astype(dtype) for s in shapes[1:])
    for a, b in ((x, y), (x, 0), (x, 0.0), (0, y), (x, -0.0), (1, y), (x[..., ::-1], y)):
        if np.result_type(a, b) == dtype:
            found, wanted = select(np, c, a, b), np.where(c, a, b)
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == wanted.dtype
            place = np.empty_like(wanted)
            np.testing.assert_array_equal(select(np, c, a, b, place), wanted)
            np.testing.assert_array_equal(place, wanted)
            if wanted.dtype.kind == "f":
                np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


def test_select_drops_what_is_not_finite() -> None:
    x = np.full(5000, np.inf, np.float32)
    np.testing.assert_array_equal(select(np, np.zeros(5000, bool), x, 0), np.zeros(5000))


def test_relu_of_many_elements_is_that_of_few() -> None:
    x = np.random.default_rng(0).normal(size=9000).astype(np.float32)
    x[:4] = np.nan, np.inf, -np.inf, -0.0
    relu = lookup("relu").kernel
    np.testing.assert_array_equal(relu(np, x), np.maximum(x, 0))
    assert relu(np, x).dtype == np.float32
    place = x.copy()
    assert relu(np, place, out=place) is place
    np.testing.assert_array_equal(place, np.maximum(x, 0))
