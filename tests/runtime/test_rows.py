"""Values of pointwise and reducing kernels that the generic tests do not compare with anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import lookup


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    """The kernel alone, with the row's default attributes."""
    op = lookup(name)
    with np.errstate(all="ignore"):
        return op.kernel(np, *inputs, **op.unpack(op.pack(attrs)))


def shape(name: str, *shapes: tuple[int, ...], **attrs: Any) -> Any:
    op = lookup(name)
    return op.shape(*shapes, **op.unpack(op.pack(attrs)))


UFUNCS = {"sub": "subtract", "mul": "multiply", "abs": "absolute", "conj": "conjugate", "asin": "arcsin",
          "acos": "arccos", "atan": "arctan", "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh",
          "atan2": "arctan2", "pow": "power", "bitwise_invert": "invert", "clip_min": "maximum",
          "clip_max": "minimum"}


@pytest.mark.parametrize("name", [
    "add", "sub", "mul", "divide", "floor_divide", "remainder", "pow", "negative", "positive", "abs",
    "sign", "square", "reciprocal", "conj", "exp", "expm1", "log", "log1p", "log2", "log10", "sqrt",
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "atan2", "floor", "ceil", "trunc", "maximum", "minimum", "equal", "not_equal", "less", "less_equal",
    "greater", "greater_equal", "logical_and", "logical_or", "logical_xor", "logical_not", "isfinite",
    "isinf", "isnan", "clip_min", "clip_max"])
def test_rows_named_like_a_ufunc_compute_it(name: str) -> None:
    rng = np.random.default_rng(0)
    ufunc = getattr(np, UFUNCS.get(name, name))
    inputs = [rng.uniform(-3, 3, (4, 5)) for _ in range(ufunc.nin)]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(run(name, *inputs), ufunc(*inputs))


@pytest.mark.parametrize(("x", "wanted"), [
    (-1e4, 0.0), (-50.0, np.exp(-50.0)), (0.0, 0.5), (1e4, 1.0), (np.nan, np.nan)])
def test_sigmoid_is_accurate_far_out(x: float, wanted: float) -> None:
    np.testing.assert_allclose(run("sigmoid", np.array([x])), [wanted], rtol=1e-14)


def test_softplus_and_silu_do_not_overflow() -> None:
    x = np.array([-1e4, -30.0, 0.0, 30.0, 1e4])
    wanted = [0, np.exp(-30.0), np.log(2), 30, 1e4]
    np.testing.assert_allclose(run("softplus", x, threshold=1e9), wanted, rtol=1e-12)
    np.testing.assert_allclose(run("silu", x), [0, -30 * np.exp(-30.0), 0, 30, 1e4], rtol=1e-12, atol=1e-300)


def test_relu_and_extremes_propagate_nan() -> None:
    x = np.array([1.0, np.nan, -1.0])
    np.testing.assert_array_equal(run("relu", x), [1.0, np.nan, 0.0])
    assert np.isnan(run("max", x)) and np.isnan(run("min", x))
    assert run("argmax", x) == run("argmin", x) == 1


def test_round_is_half_to_even() -> None:
    np.testing.assert_array_equal(run("round", np.array([0.5, 1.5, 2.5, -0.5])), [0, 2, 2, -0.0])


def test_integers_pass_through_steps_unchanged() -> None:
    x = np.array([2**53 + 1, -7])
    for name in ("floor", "ceil", "trunc", "round"):
        np.testing.assert_array_equal(run(name, x), x)


def test_pow_of_integers_to_a_negative_power_says_what_to_do() -> None:
    with pytest.raises(DTypeError, match=r"pow: .*negative power -2.*cast it to a floating dtype"):
        run("pow", np.array([1, 2]), -2)


def test_clip_with_crossed_bounds_gives_the_upper() -> None:
    np.testing.assert_array_equal(run("clip", np.array([0.0, 5.0, 9.0]), 6.0, 2.0), [2.0, 2.0, 2.0])


def test_gelu_of_unknown_approximation_names_the_known() -> None:
    op = lookup("gelu")
    with pytest.raises(ValueError, match='approximate is \'fast\'; use "none" or "tanh"'):
        op.dtype(np.dtype("float32"), approximate="fast")


# --- reductions ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["max", "min", "argmax", "argmin"])
def test_an_extreme_of_nothing_is_refused_at_the_shape_rule(name: str) -> None:
    for axis in (0, None):
        with pytest.raises(ShapeError, match=rf"{name}: dimension 0 of \(0, 3\) is empty"):
            shape(name, (0, 3), axis=axis)
    assert shape(name, (0, 3), axis=1) == [(0,)]


@pytest.mark.parametrize(("name", "dtype", "identity"), [
    ("max", "float32", -np.inf), ("min", "float16", np.inf), ("max", "int8", -128), ("min", "uint8", 255),
    ("max", "bool", False), ("min", "bool", True)])
def test_an_empty_piece_gives_the_identity(name: str, dtype: str, identity: Any) -> None:
    found = run(name, np.zeros((0, 2), dtype), axis=0)
    np.testing.assert_array_equal(found, np.full(2, identity, dtype))
    assert found.dtype == dtype


def test_reductions_over_nothing_give_the_identity() -> None:
    empty = np.zeros((0, 2))
    for name, wanted in (("sum", 0), ("prod", 1), ("any", False), ("all", True), ("count_nonzero", 0),
                         ("logsumexp", -np.inf), ("mean", np.nan)):
        np.testing.assert_array_equal(run(name, empty, axis=0), [wanted, wanted])


@pytest.mark.parametrize("name", ["sum", "mean"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_added_up_in_float32(name: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    from meshtape.runtime.dtypes import canonical
    x = np.ones(5000, canonical(dtype))  # 2048 + 1 is 2048 in float16, 256 + 1 is 256 in bfloat16
    assert run(name, x) == (5000 if name == "sum" else 1)


def test_large_logsumexp_does_not_overflow() -> None:
    x = np.array([[1000.0, 1000.0], [-1000.0, -np.inf], [-np.inf, -np.inf], [np.inf, 0.0]])
    np.testing.assert_allclose(run("logsumexp", x, axis=1), [1000 + np.log(2), -1000, -np.inf, np.inf])


def test_the_first_of_equal_extremes_is_the_position() -> None:
    x = np.array([[1, 3, 3], [2, 2, 2]])
    np.testing.assert_array_equal(run("argmax", x, axis=1), [1, 0])
    assert run("argmax", x) == 1 and run("argmin", x[1:]) == 0


@pytest.mark.parametrize("name", ["sum", "mean", "prod", "max", "any", "argmax"])
def test_a_wrong_axis_is_named(name: str) -> None:
    with pytest.raises(ShapeError, match=f"{name}: axis 2 is out of range for a tensor of 2 dimensions"):
        shape(name, (3, 4), axis=2)


def test_a_repeated_axis_is_refused() -> None:
    with pytest.raises(ShapeError, match="names a dimension twice"):
        shape("sum", (3, 4), axis=(1, -1))


def test_shapes_that_do_not_broadcast_name_the_operation() -> None:
    with pytest.raises(ShapeError, match=r"add: shapes \(3, 4\) and \(3,\) do not broadcast"):
        shape("add", (3, 4), (3,))
    with pytest.raises(ShapeError, match=r"sum_to: \(2,\) does not broadcast to|do not broadcast"):
        shape("sum_to", (3, 4), shape=(2,))
