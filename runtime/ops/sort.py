"""Rows that order a dimension: sort, argsort, topk. That dimension is never split.

NaN counts as the largest value, as in NumPy and PyTorch. Sorting is stable in both directions: equal elements
keep their order. A tensor of 0 dimensions counts as one element along axis 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meshtape.runtime.dtypes import int64, kind
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import REQUIRED, Op, Sample, normalize_axis, register
from meshtape.runtime.ops.index import take_along_axis_grad
from meshtape.runtime.ops.lines import line_axes, line_shape
from meshtape.runtime.shards import Shape


def _ordered(name: str, x: Any) -> Any:
    if kind(x) == 3:
        raise DTypeError(f"{name}: complex numbers have no order, got {x.name}; take abs or the real part")
    return x


# --- sort, argsort ----------------------------------------------------------------------------------

def _comparable(xp: Any, x: Any) -> Any:
    """At least 1 dimension, and float32 for bfloat16, which NumPy cannot sort."""
    x = xp.atleast_1d(x)
    return x.astype(xp.float32) if x.dtype.kind == "V" else x


def _order(xp: Any, x: Any, axis: int, descending: bool) -> Any:
    """Positions of the sorted elements along `axis`."""
    if not descending:
        return xp.argsort(x, axis=axis, kind="stable")
    # Backwards twice: the flip before the sort keeps equal elements in order after the flip behind it.
    order = xp.flip(xp.argsort(xp.flip(x, axis), axis=axis, kind="stable"), axis)
    return x.shape[axis] - 1 - order


def _argsort(xp: Any, x: Any, axis: int, descending: bool) -> Any:
    return _order(xp, _comparable(xp, x), axis, descending).reshape(x.shape)


def _sort(xp: Any, x: Any, axis: int, descending: bool) -> tuple[Any, Any]:
    order = _order(xp, _comparable(xp, x), axis, descending)
    return xp.take_along_axis(xp.atleast_1d(x), order, axis).reshape(x.shape), order.reshape(x.shape)


def _picked_vjp(g: Any, out: Any, x: Any, axis: int, **attrs: Any) -> Any:
    """The gradient of elements picked along `axis` at the positions out[1], none of them twice."""
    if g[0] is None:
        return None
    if not x.shape:
        return g[0]
    return take_along_axis_grad(g[0], out[1], extent=x.shape[axis], axis=axis, unique=True)


def _sort_samples(diff: bool) -> list[Sample]:
    cases: list[tuple[Shape, int, bool]] = [
        ((7,), 0, False), ((7,), -1, True), ((5, 4), 0, True), ((5, 4), 1, False), ((2, 5, 3), -2, True),
        ((5, 1), 1, False), ((1, 5), 0, True), ((0, 3), 1, False), ((3, 0), 1, True), ((), 0, False)]
    attrs = [(shape, {"axis": axis, "descending": down}) for shape, axis, down in cases]
    return [Sample((x,), a, diff=diff, distinct=True) for x, a in attrs] + [
        Sample((np.array([[2, 0, 2, 1], [1, 1, 1, 0]]),), {"axis": 1, "descending": down}, "int64",
               diff=False)
        for down in (False, True)]


sort: Op = register(Op(
    "sort",
    kernel=_sort,
    attrs={"axis": -1, "descending": False},
    shape=line_shape("sort", 2),
    dtype=lambda x, **attrs: ([x], [_ordered("sort", x), int64]),
    axes=line_axes(n_out=2),
    vjp=(_picked_vjp,),
    keeps="out1",
    n_out=2,
    samples=lambda: _sort_samples(diff=True)))

argsort: Op = register(Op(
    "argsort",
    kernel=_argsort,
    attrs={"axis": -1, "descending": False},
    shape=line_shape("argsort", 1),
    dtype=lambda x, **attrs: ([_ordered("argsort", x)], [int64]),
    axes=line_axes(),
    samples=lambda: _sort_samples(diff=False)))


# --- topk -------------------------------------------------------------------------------------------

def _topk(xp: Any, x: Any, k: int, axis: int, largest: bool) -> tuple[Any, Any]:
    """The k extreme elements, most extreme first, picked elements of equal value in order of position.

    Partitioning before sorting takes 4 ms for 10 of 64 x 50257, sorting alone 216.
    """
    lines = xp.moveaxis(_comparable(xp, x), axis, -1)
    n = lines.shape[-1]
    if 0 < k < n:
        part = xp.argpartition(lines, n - k if largest else k - 1, axis=-1)
        near = xp.sort(part[..., n - k:] if largest else part[..., :k], axis=-1)
        order = _order(xp, xp.take_along_axis(lines, near, -1), -1, largest)
        found = xp.take_along_axis(near, order, -1)
    else:
        found = _order(xp, lines, -1, largest)[..., :k]
    found = xp.moveaxis(found, -1, axis)
    values = xp.take_along_axis(xp.atleast_1d(x), found, axis)
    return (values, found) if x.ndim else (values.reshape(()), found.reshape(()))


def _topk_shape(x: Shape, k: int, axis: int, largest: bool) -> list[Shape]:
    d = normalize_axis(axis, len(x), "topk")
    extent = x[d] if x else 1
    if not (0 <= k <= extent if x else k == 1):
        raise ShapeError(f"topk: k is {k}, but dimension {d} of {x} has {extent} elements; ask for at most "
                         f"{extent}")
    return [(*x[:d], k, *x[d + 1:]) if x else ()] * 2


topk: Op = register(Op(
    "topk",
    kernel=_topk,
    attrs={"k": REQUIRED, "axis": -1, "largest": True},
    shape=_topk_shape,
    dtype=lambda x, **attrs: ([x], [_ordered("topk", x), int64]),
    axes=line_axes(n_out=2),
    vjp=(_picked_vjp,),
    keeps="out1",
    n_out=2,
    samples=lambda: [
        Sample((x,), {"k": k, "axis": axis, "largest": largest}, distinct=True) for x, k, axis, largest in [
            ((7,), 3, 0, True), ((7,), 7, -1, False), ((5, 4), 2, 0, False), ((5, 4), 1, 1, True),
            ((), 1, 0, True), ((2, 6, 3), 4, -2, True), ((5, 1), 1, 1, True), ((0, 3), 2, 1, True),
            ((4, 3), 0, 1, True)]]))
