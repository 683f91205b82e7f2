"""Matrix products, linear layers and einsum: values beside NumPy's and torch's, derivatives, split rules,
errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from eager import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from table import check_layouts, make_inputs, samples

import meshtape as mt
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import Axes, Sample, lookup
from meshtape.runtime.ops.einsum import parse

torch = pytest.importorskip("torch")

ROWS = ["matmul", "linear", "linear_weight_grad", "einsum"]


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return op.kernel(np, *inputs, **op.unpack(op.pack(attrs)))


def shape(name: str, *shapes: tuple[int, ...], **attrs: Any) -> Any:
    op = lookup(name)
    return op.shape(*shapes, **op.unpack(op.pack(attrs)))


def axes(name: str, *shapes: tuple[int, ...], **attrs: Any) -> Axes:
    op = lookup(name)
    assert op.axes is not None
    return op.axes(*shapes, **op.unpack(op.pack(attrs)))


@pytest.mark.parametrize("name", ROWS)
def test_gradients_match_finite_differences_to_second_order(name: str) -> None:
    for sample in samples(lookup(name)):
        check_gradients(lookup(name), make_inputs(sample, np.random.default_rng(0)), sample.attrs)


# --- matmul -----------------------------------------------------------------------------------------

def test_matmul_is_numpys_also_transposed() -> None:
    rng = np.random.default_rng(0)
    for sample in samples(lookup("matmul")):
        x, y = make_inputs(sample, rng)
        a = x.swapaxes(-1, -2) if sample.attrs.get("transpose_x") else x
        b = y.swapaxes(-1, -2) if sample.attrs.get("transpose_y") else y
        found = run("matmul", x, y, **sample.attrs)
        np.testing.assert_allclose(found, np.matmul(a, b), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("x, y, wanted", [
    ((4, 5), (5, 3), Axes(("MK", "KN"), ("MN",))), ((5,), (5,), Axes(("K", "K"), ("",))),
    ((2, 4, 5), (5, 3), Axes(("aMK", "KN"), ("aMN",))),
    ((2, 1, 4, 5), (3, 5, 6), Axes(("a.MK", "bKN"), ("abMN",))),
    ((5,), (2, 5, 3), Axes(("K", "aKN"), ("aN",)))])
def test_matmul_splits_every_dimension_but_stretched_ones(x: Any, y: Any, wanted: Axes) -> None:
    assert axes("matmul", x, y) == wanted


@pytest.mark.parametrize("x, y, attrs, message", [
    ((4, 6), (5, 2), {}, r"matmul: inner axes differ, \(4, 6\) @ \(5, 2\)"),
    ((4, 6), (6, 2), {"transpose_y": True}, r"matmul: inner axes differ, \(4, 6\) @ \(2, 6\)"),
    ((), (5,), {}, "multiply by a scalar with *"),
    ((5,), (5, 2), {"transpose_x": True}, "a vector cannot be"),
    ((3, 4, 5), (2, 5, 6), {}, "matmul: shapes")])
def test_matmul_says_which_shapes_do_not_fit(x: Any, y: Any, attrs: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        shape("matmul", x, y, **attrs)


def test_products_of_booleans_are_refused() -> None:
    for name in ROWS[:1] + ROWS[2:]:
        op = lookup(name)
        with pytest.raises(DTypeError, match=f"{name} takes"):
            op.dtype(np.dtype(bool), np.dtype(bool), **dict.fromkeys(op.attrs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_products_are_accumulated_in_float32(dtype: str) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x, y = np.ones((1, 5000), dtype), np.ones((5000, 1), dtype)
    wanted = np.float32(5000).astype(dtype)
    for found in (run("matmul", x, y), run("matmul", x, x, transpose_y=True), run("linear_weight_grad", y, y),
                  run("einsum", x, y, equation="ij,jk->ik"), run("linear", x, x, np.zeros(1, dtype))):
        assert found.dtype == dtype and found.item() == wanted


@pytest.mark.parametrize("equation", ["ij,jk->ik", "ij,kj->i", "iij,jk->ik"])
def test_complex_gradients_are_torchs(equation: str) -> None:
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)
    arrays = [make(3, 3, 3) if equation[2] == "j" and equation[1] == "i" else make(3, 3), make(3, 3)]
    xs = [mt.tensor(a, requires_grad=True) for a in arrays]
    ts = [torch.tensor(a, requires_grad=True) for a in arrays]
    for x, t, out, wanted in ((xs, ts, mt.einsum(equation, *xs), torch.einsum(equation, *ts)),
                              (xs[1:], ts[1:], mt.matmul(xs[1], xs[1]), ts[1] @ ts[1])):
        g = make(*wanted.shape)
        out.backward(mt.tensor(g))
        wanted.backward(torch.tensor(g))
        for a, b in zip(x, t, strict=True):
            np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-12)


# --- linear -----------------------------------------------------------------------------------------

def test_linear_is_torchs_and_keeps_leading_dimensions() -> None:
    rng = np.random.default_rng(0)
    for lead in ((), (7,), (2, 3), (0,)):
        x, w, b = rng.normal(size=(*lead, 5)), rng.normal(size=(4, 5)), rng.normal(size=4)
        wanted = torch.nn.functional.linear(*map(torch.tensor, (x, w, b))).numpy()
        np.testing.assert_allclose(run("linear", x, w, b), wanted, rtol=1e-12)


def test_a_split_contraction_of_linear_makes_the_bias_partial_too() -> None:
    found = axes("linear", (6, 5), (3, 5), (3,))
    assert found == Axes(("aK", "NK", "N"), ("aN",), additive=(2,))


@pytest.mark.parametrize("shapes, message", [
    (((6, 5), (5, 3), (3,)), r"weight is \(out, in\).*input \(6, 5\) and weight \(5, 3\)"),
    (((6, 5), (3, 5), (5,)), r"bias must be \(3,\)"), (((), (3, 5), (3,)), "weight is")])
def test_linear_says_which_shapes_do_not_fit(shapes: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        shape("linear", *shapes)


# --- einsum -----------------------------------------------------------------------------------------

EXTENTS = {"a": 2, "b": 3, "c": 4, "d": 1}


@st.composite
def equations(draw: Any) -> tuple[list[str], str]:
    """One to three operands over four letters, repeated ones included, and an output of letters they have."""
    terms = draw(st.lists(st.text("abcd", max_size=3), min_size=1, max_size=3))
    found = sorted(set("".join(terms)))
    return terms, "".join(draw(st.permutations(found)))[:draw(st.integers(0, len(found)))]


@settings(max_examples=150, deadline=None)
@given(equations())
def test_einsum_is_numpys(found: tuple[list[str], str]) -> None:
    terms, out = found
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=[EXTENTS[c] for c in term]) for term in terms]
    equation = ",".join(terms) + "->" + out
    np.testing.assert_allclose(run("einsum", *arrays, equation=equation), np.einsum(equation, *arrays),
                               rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(equations())
def test_einsum_splits_over_every_letter(found: tuple[list[str], str]) -> None:
    terms, out = found
    shapes = tuple(tuple(EXTENTS[c] for c in term) for term in terms)
    check_layouts(lookup("einsum"), Sample(shapes, {"equation": ",".join(terms) + "->" + out}))


@pytest.mark.parametrize("equation, shapes", [
    ("...ik, ...j -> ij", [(2, 3, 4), (5,)]), ("i...->...", [(3, 4)]), ("ij,j->i", [(4, 1), (5,)]),
    ("...ij,...jk->...ik", [(2, 1, 3, 4), (5, 4, 2)]), ("ba", [(2, 3)]), ("ij,jk", [(2, 3), (3, 4)]),
    ("a...b,b...->...a", [(2, 5, 3), (3, 1)]), ("...,...->...", [(4, 3), (3,)])])
def test_einsum_with_ellipses_and_stretched_dimensions_is_torchs(equation: str, shapes: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in shapes]
    wanted = torch.einsum(equation, *map(torch.tensor, arrays)).numpy()
    assert shape("einsum", *shapes, equation=equation) == [wanted.shape]
    np.testing.assert_allclose(run("einsum", *arrays, equation=equation), wanted, rtol=1e-12)


def test_a_diagonal_is_never_split() -> None:
    assert axes("einsum", (3, 4, 3), (4, 2), equation="iji,jk->ik") == Axes((".j.", "jk"), (".k",))


def test_an_equation_is_read_once_for_all_extents() -> None:
    assert parse("b ... i, i j -> b ... j", (4, 2)) == (("bĀāi", "ij"), "bĀāj")


@pytest.mark.parametrize("equation, shapes, message", [
    ("ij,jk->ik", [(2, 3)], "names 2 operands, got 1"),
    ("ij->i", [(2, 3, 4)], "does not fit an operand of 3"),
    ("ij,jk->ik", [(2, 3), (4, 5)], "'j' the extents 3 and 4"),
    ("ij->ik", [(2, 3)], "'k', which no operand has"),
    ("ij->ii", [(2, 3)], "'i' twice"), ("i1->i", [(2, 3)], "'1' in 'i1->i' is not an index")])
def test_einsum_says_what_is_wrong_with_an_equation(equation: str, shapes: Any, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        shape("einsum", *shapes, equation=equation)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("rows", [15, 16, 33, 128, 160, 161])
def test_few_rows_times_a_wide_weight(rows: int, dtype: str) -> None:
    """Computed the other way round, with the same layout and values."""
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype(dtype) for s in ((rows, 130), (330, 130), (330,)))
    got = lookup("linear").kernel(np, x, w, b)
    wanted = x.astype(float) @ w.T.astype(float) + b
    assert got.dtype == dtype and got.shape == wanted.shape and got.flags.c_contiguous
    np.testing.assert_allclose(got, wanted, rtol=1e-2 if dtype == "float16" else 1e-4,
                               atol=1e-1 if dtype == "float16" else 1e-4)
