"""Rows that move data: their split rules, their values beside NumPy's, their derivatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from eager import check_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from table import check_layouts, make_inputs, samples

from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import IO, Axes, Sample, lookup
from meshtape.runtime.ops import shape as shape_rows
from meshtape.runtime.shards import piece

ROWS = ["reshape", "permute_dims", "expand_dims", "squeeze", "broadcast_to", "concat", "stack", "flip",
        "roll", "pad", "tril", "triu", "diagonal", "diag_embed"]


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return op.kernel(np, *inputs, **op.unpack(op.pack(attrs)))


def axes(name: str, *shapes: tuple[int, ...], **attrs: Any) -> Axes:
    op = lookup(name)
    assert op.axes is not None
    return op.axes(*shapes, **op.unpack(op.pack(attrs)))


@pytest.mark.parametrize("name", ROWS)
def test_gradients_match_finite_differences_to_second_order(name: str) -> None:
    for sample in samples(lookup(name)):
        if sample.diff and sample.dtype == "float64":
            check_gradients(lookup(name), make_inputs(sample, np.random.default_rng(0)), sample.attrs)


def test_gradient_check_catches_a_wrong_vjp() -> None:
    wrong = replace(lookup("flip"), vjp=(lambda g, out, x, axis: g,))
    with pytest.raises(AssertionError):
        check_gradients(wrong, [np.arange(5.0)], {"axis": (0,)})


# --- reshape ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("x", "shape", "ins", "outs", "even"), [
    ((6, 4), (24,), "a.", "a", {"a": 6}), ((24,), (6, 4), "a", "a.", {"a": 6}),
    ((2, 3, 4), (6, 4), "a.c", "ac", {"a": 2}), ((8, 2, 3, 3), (8, 18), "ab..", "ab", {"b": 2}),
    ((6, 4), (4, 6), "a.", "a.", {"a": 2}), ((5, 1, 4), (5, 4), "a.c", "ac", {}),
    ((5, 4), (1, 5, 1, 4), "ab", ".a.b", {}), ((1,), (), ".", "", {}),
    ((3, 5), (5, 3), "..", "..", {}), ((1, 4, 3), (4, 3), ".bc", "bc", {}),
    ((0, 4), (0, 2, 2), "a.", "a..", {}), ((3, 0, 2), (3, 7, 0), "a..", "a..", {}),
    ((0, 3), (5, 0), "..", "..", {}), ((1, 5), (1, 5), "ab", "ab", {})])
def test_reshape_keeps_the_splits_that_survive(x: Any, shape: Any, ins: str, outs: str, even: Any) -> None:
    assert axes("reshape", x, shape=shape) == Axes((ins,), (outs,), even=even)


extents = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(extents, st.randoms(use_true_random=False))
def test_reshape_between_any_two_shapes_commutes_with_its_splits(factors: list[int], random: Any) -> None:
    def grouped() -> tuple[int, ...]:
        shape: list[int] = []
        for n in factors:
            if shape and random.random() < 0.5:
                shape[-1] *= n
            else:
                shape.append(n)
            if random.random() < 0.2:
                shape.append(1)
        return tuple(shape)

    check_layouts(shape_rows.reshape, Sample((grouped(),), {"shape": grouped()}))


def test_groups_hold_equal_numbers_of_elements() -> None:
    found = shape_rows._groups((2, 3, 4, 1, 5), (6, 2, 2, 5))
    assert [(list(i), list(j)) for i, j in found] == [([0, 1], [0]), ([2], [1, 2]), ([3, 4], [3])]


# --- the others beside NumPy ------------------------------------------------------------------------

x34 = np.arange(12.0).reshape(3, 4)
x234 = np.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(("found", "wanted"), [
    (run("permute_dims", x234, axes=(2, 0, 1)), x234.transpose(2, 0, 1)),
    (run("expand_dims", x34, axis=(0, -1)), x34[None, :, :, None]),
    (run("squeeze", x34[:, None], axis=(1,)), x34),
    (run("broadcast_to", x34[:, :1], shape=(2, 3, 4)), np.broadcast_to(x34[:, :1], (2, 3, 4))),
    (run("concat", x34, x34[:, :1], axis=-1), np.concatenate([x34, x34[:, :1]], 1)),
    (run("stack", x34, x34 + 1, axis=-1), np.stack([x34, x34 + 1], -1)),
    (run("flip", x234, axis=(0, 2)), x234[::-1, :, ::-1]),
    (run("roll", x34, shift=(1, -2), axis=(0, 1)), np.roll(x34, (1, -2), (0, 1))),
    (run("pad", x34, widths=((1, 0), (2, 3)), value=7.0), np.pad(x34, ((1, 0), (2, 3)), constant_values=7.0)),
    (run("pad", x34, widths=((-1, 2), (0, -3)), value=7.0),
     np.pad(x34[1:, :1], ((0, 2), (0, 0)), constant_values=7.0)),
    (run("tril", x234, k=-1), np.tril(x234, -1)), (run("triu", x234, k=1), np.triu(x234, 1)),
    (run("diagonal", x234, offset=1), np.diagonal(x234, 1, 1, 2)),
    (run("diag_embed", np.arange(3.0), shape=(3, 3)), np.diag(np.arange(3.0))),
    (run("diag_embed", np.arange(3.0), shape=(4, 4), offset=-1), np.diag(np.arange(3.0), -1))])
def test_kernels_agree_with_numpy(found: Any, wanted: Any) -> None:
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("name", "shapes", "attrs", "says"), [
    ("reshape", [(3, 4)], {"shape": (5, 2)}, "has 12 elements"),
    ("reshape", [(3, 4)], {"shape": (-1, 4)}, "asks for"),
    ("permute_dims", [(3, 4)], {"axes": (0, 0)}, "each dimension"),
    ("squeeze", [(3, 4)], {"axis": (0,)}, "only one of 1"),
    ("broadcast_to", [(3,)], {"shape": (4,)}, "does not broadcast"),
    ("broadcast_to", [(1, 3)], {"shape": (3,)}, "does not broadcast"),
    ("concat", [(3, 4), (3, 5)], {"axis": 0}, "differ outside axis 0"), ("concat", [(), ()], {}, "use stack"),
    ("stack", [(3,), (4,)], {}, "equal shapes"), ("flip", [(3,)], {"axis": (1,)}, "out of range"),
    ("roll", [(3,)], {"shift": (1, 2), "axis": (0,)}, "one shift per axis"),
    ("pad", [(3,)], {"widths": ()}, "every dimension"),
    ("pad", [(3,)], {"widths": ((-2, -2),)}, "remove more"), ("tril", [(3,)], {}, "last two dimensions"),
    ("diag_embed", [(3,)], {"shape": (4, 4)}, "has 4 elements")])
def test_shapes_that_do_not_fit_are_refused(name: str, shapes: Any, attrs: Any, says: str) -> None:
    op = lookup(name)
    with pytest.raises(ShapeError, match=says):
        op.shape(*shapes, **op.unpack(op.pack(attrs)))


def test_padding_value_enters_a_partial_sum_once() -> None:
    op = lookup("pad")
    attrs = {"widths": ((1, 1),), "value": 5.0}
    values = []
    for rank in range(3):
        part = piece((4,), ("sum",), (3,), (rank,))
        assert op.local is not None
        values.append(op.local(attrs, IO((part,), (piece((6,), ("sum",), (3,), (rank,)),)))["value"])
    assert values == [5.0, 0, 0]


def test_triangle_of_a_piece_is_shifted_by_its_place() -> None:
    whole = np.arange(20.0).reshape(4, 5)
    op = lookup("tril")
    part = piece((4, 5), (0, 1), (2, 2), (1, 1))
    assert op.local is not None
    attrs = op.local({"k": 0}, IO((part,), (part,)))
    np.testing.assert_array_equal(op.kernel(np, whole[part.slices], **attrs), np.tril(whole)[part.slices])
