"""Plans of products, carried out on raw memory as cuBLAS would, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshtape.runtime.cuda import gemm


def column_major(memory, offset, rows, cols, ld):
    """A view of flat memory as cuBLAS reads a matrix; fails where the matrix would leave the memory."""
    assert ld >= max(1, rows)
    assert offset >= 0
    assert offset + ld * (cols - 1) + rows <= memory.size
    step = memory.itemsize
    return np.lib.stride_tricks.as_strided(memory[offset:], (rows, cols), (step, ld * step))


def flat(array):
    """The whole memory that an array lies in, and where in it the array begins, in elements."""
    base = array
    while base.base is not None:
        base = base.base
    start = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // array.itemsize
    return base.reshape(-1), start


def carry_out(a, b, c):
    """c[...] = a @ b by the plan, with column-major arithmetic only."""
    plan = gemm.plan(a.shape, a.strides, b.shape, b.strides, c.strides, a.itemsize)
    if plan.copy_a is not None:
        a = np.broadcast_to(a, plan.copy_a).copy()
    if plan.copy_b is not None:
        b = np.broadcast_to(b, plan.copy_b).copy()
    if plan.zero:
        c[...] = 0
    to = np.full(c.shape, np.nan) if plan.through else c
    (am, a0), (bm, b0), (cm, c0) = (flat(b), flat(a), flat(to)) if plan.swapped else (
        flat(a), flat(b), flat(to))
    p = plan
    for a_at, b_at, c_at, count in plan.calls:
        for i in range(count):
            first, second = (p.k, p.m) if p.transa else (p.m, p.k), (p.n, p.k) if p.transb else (p.k, p.n)
            left = column_major(am, a0 + a_at + i * p.stride_a, *first, p.lda)
            right = column_major(bm, b0 + b_at + i * p.stride_b, *second, p.ldb)
            out = column_major(cm, c0 + c_at + i * p.stride_c, p.m, p.n, p.ldc)
            out[...] = (left.T if p.transa else left) @ (right.T if p.transb else right)
    if plan.through:
        c[...] = to
    return plan


@st.composite
def laid(draw, shape):
    """An array of the shape, in any order of dimensions, sliced, stepped, reversed or broadcast."""
    order = draw(st.permutations(range(len(shape)))) if draw(st.booleans()) else list(range(len(shape)))
    if draw(st.booleans()) and len(shape) > 1:
        order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    steps = [draw(st.sampled_from((1, 1, 1, 1, 2, -1))) for _ in shape]
    margins = [draw(st.sampled_from((0, 0, 0, 1, 3))) for _ in shape]
    repeated = [draw(st.sampled_from((False,) * 7 + (True,))) for _ in shape]
    stored = [abs(steps[d]) * (1 if repeated[d] else shape[d]) + margins[d] for d in order]
    base = np.arange(1.0, 1 + np.prod(stored, dtype=int)) * 0.37 % 5
    whole = base.reshape(stored).transpose(np.argsort(order))
    view = whole[tuple(slice(None, n and abs(s) * n, abs(s)) if not r else slice(0, 1)
                       for n, s, r in zip(shape, steps, repeated, strict=True))]
    view = view[tuple(slice(None, None, 1 if s > 0 else -1) for s in steps)]
    return np.broadcast_to(view, shape)


@st.composite
def operands(draw):
    size = st.sampled_from((1, 2, 3, 5, 0)) if draw(st.integers(0, 9)) == 0 else st.sampled_from((1, 2, 3, 5))
    m, n, k = draw(size), draw(size), draw(size)
    batch = draw(st.lists(size, max_size=3))
    side = lambda: [n if draw(st.integers(0, 3)) else 1 for n in batch][draw(st.integers(0, len(batch))):]
    a, b = side(), side()
    return draw(laid((*a, m, k))), draw(laid((*b, k, n)))


@settings(max_examples=600, deadline=None)
@given(operands(), st.data())
def test_every_layout_multiplies_as_numpy_does(pair, data):
    a, b = pair
    want = a @ b
    c = np.full(want.shape, np.nan)
    way = data.draw(st.sampled_from(("rows", "columns", "wide", "stepped")))
    if way == "columns":
        c = np.full((*want.shape[:-2], want.shape[-1], want.shape[-2]), np.nan).swapaxes(-1, -2)
    elif way == "wide":
        c = np.full((*want.shape[:-1], want.shape[-1] + 3), np.nan)[..., 1:want.shape[-1] + 1]
    elif way == "stepped":
        c = np.full((*want.shape[:-1], want.shape[-1] * 2), np.nan)[..., ::2]
    carry_out(a, b, c)
    np.testing.assert_allclose(c, want, rtol=1e-12)


def planned(a, b, c=None):
    c = np.empty((a @ b).shape) if c is None else c
    return carry_out(a, b, c)


def test_transposes_and_slices_are_not_copied():
    x, w = np.ones((6, 5)), np.ones((7, 5))
    for a, b in ((x, w.T), (x.T[1:4], x[:, :2]), (w[::2], x[1:].T), (np.ones((1, 5)), w.T), (x, w.T[:, :1])):
        plan = planned(a, b)
        assert plan.copy_a is plan.copy_b is None
        assert len(plan.calls) == 1 and not plan.through


def test_batches_that_share_a_matrix_are_rows_of_one_product():
    plan = planned(np.ones((2, 3, 4, 5)), np.ones((5, 7)))
    assert (plan.n, plan.calls) == (24, ((0, 0, 0, 1),))
    assert planned(np.ones((6, 1, 5)), np.ones((5, 7))).n == 6


def test_heads_between_the_rows_of_a_sequence_are_one_strided_call_per_sample_or_a_copy():
    """(batch, sequence, heads, depth) seen as (batch, heads, sequence, depth), as attention has it."""
    q = np.ones((2, 8, 3, 4)).transpose(0, 2, 1, 3)
    plan = planned(q, q.swapaxes(-1, -2))
    assert plan.copy_a is plan.copy_b is None and [c[3] for c in plan.calls] == [3, 3]
    many = np.ones((20, 3, 16, 4)).transpose(0, 2, 1, 3)
    assert len(planned(many, many.swapaxes(-1, -2)).calls) == 1
    one = np.ones((1, 8, 3, 4)).transpose(0, 2, 1, 3)
    plan = planned(one, one.swapaxes(-1, -2))
    assert plan.copy_a is plan.copy_b is None and len(plan.calls) == 1


def test_a_broadcast_operand_has_a_batch_stride_of_zero():
    plan = planned(np.ones((2, 4, 5)).transpose(0, 2, 1), np.ones((4, 3)))
    assert 0 in (plan.stride_a, plan.stride_b) and plan.calls == ((0, 0, 0, 2),)


def test_no_rows_no_columns_and_nothing_to_sum():
    assert not planned(np.ones((0, 3)), np.ones((3, 2))).calls
    assert not planned(np.ones((2, 3)), np.ones((3, 0))).zero
    assert planned(np.ones((2, 0)), np.ones((0, 3))).zero


def test_more_batches_than_a_grid_has_go_in_several_calls():
    n = gemm.MOST_AT_ONCE + 2
    plan = gemm.plan((n, 2, 3), (48, 24, 8), (n, 3, 2), (48, 16, 8), (32, 16, 8), 8)
    assert [c[3] for c in plan.calls] == [gemm.MOST_AT_ONCE, 2]
    assert plan.calls[1][:3] == (6 * gemm.MOST_AT_ONCE, 6 * gemm.MOST_AT_ONCE, 4 * gemm.MOST_AT_ONCE)


@pytest.mark.parametrize("itemsize", [2, 4, 8, 16])
def test_strides_are_counted_in_elements(itemsize):
    plan = gemm.plan((4, 3), (8 * itemsize, itemsize), (3, 2), (2 * itemsize, itemsize),
                     (2 * itemsize, itemsize), itemsize)
    assert plan.swapped and (plan.m, plan.n, plan.k, plan.lda, plan.ldb, plan.ldc) == (2, 4, 3, 2, 8, 2)
