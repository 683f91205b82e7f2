"""Rows for indexing with integer arrays on several dimensions at once, reading and writing.

Index array i addresses dimension dims[i] of the tensor. The arrays broadcast against each other to the index
shape; in the selection its dimensions stand together, `at` dimensions of the tensor before them.
`slices` and `index` keep to what NumPy calls basic and advanced indexing; see runtime/indexing.py.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels import scatter
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import ALPHABET, REQUIRED, Axes, Op, Sample, broadcast_shapes, register
from meshtape.runtime.ops.index import accumulate, index_dtype, local_shape, require_in_range, wrapped
from meshtape.runtime.ops.rules import unbroadcast
from meshtape.runtime.ops.slices import check_stretch, stretch_letters, written_dtype
from meshtape.runtime.shards import Shape

Ints = tuple[int, ...]
PLACES: dict[str, Any] = {"dims": REQUIRED, "at": REQUIRED}


# --- where what stands ------------------------------------------------------------------------------

def selected_shape(name: str, x: Shape, indices: tuple[Shape, ...], dims: Ints, at: int) -> Shape:
    """Shape of the selection; raises ShapeError where dims, at or the index shapes do not fit."""
    if len(indices) != len(dims) or len(set(dims)) != len(dims) or not all(0 <= d < len(x) for d in dims):
        raise ShapeError(f"{name}: {len(indices)} index arrays for the dimensions {dims} of {x}; give one "
                         f"for each dimension, all different, 0 to {len(x) - 1}")
    rest = [n for d, n in enumerate(x) if d not in dims]
    if not 0 <= at <= len(rest):
        raise ShapeError(f"{name}: at is {at}, but {len(rest)} dimensions of {x} are not indexed")
    return (*rest[:at], *broadcast_shapes(name, *indices), *rest[at:])


def _letters(x: Shape, indices: tuple[Shape, ...], dims: Ints, at: int) -> tuple[str, list[str], str]:
    """Letters of the tensor (indexed dimensions are whole), of every index array, and of the selection."""
    names = "".join("." if d in dims else ALPHABET[d] for d in range(len(x)))
    shape = broadcast_shapes("", *indices)
    rows = ALPHABET[len(x):len(x) + len(shape)]
    rest = names.replace(".", "")
    return names, [stretch_letters(i, shape, rows) for i in indices], rest[:at] + rows + rest[at:]


def _selected(xp: Any, x: Any, indices: tuple[Any, ...], dims: Ints, at: int, name: str) -> Any:
    """The selection, read by NumPy's own indexing and moved to `at`."""
    key: list[Any] = [slice(None)] * x.ndim
    for d, i in zip(dims, indices, strict=True):
        key[d] = i
    try:
        out = x[tuple(key)]
    except IndexError:
        for d, i in zip(dims, indices, strict=True):
            require_in_range(xp, name, i, x.shape[d], d)
        raise
    first = min(dims)
    natural = first if sorted(dims) == list(range(first, first + len(dims))) else 0
    r = out.ndim - x.ndim + len(dims)
    if natural == at or not r:
        return out
    return xp.moveaxis(out, range(natural, natural + r), range(at, at + r))


def _rows(xp: Any, x: Shape, indices: tuple[Any, ...], dims: Ints) -> Any:
    """Flat positions in the indexed dimensions, taken in the order of `dims`; in the index shape."""
    flat: Any = 0
    for d, i in zip(dims, indices, strict=True):
        flat = flat * x[d] + wrapped(xp, i, x[d])
    return flat


# --- index and its derivative -----------------------------------------------------------------------

def _index_axes(x: Shape, *indices: Shape, dims: Ints, at: int) -> Axes:
    names, rows, out = _letters(x, indices, dims, at)
    return Axes((names, *rows), (out,))


def _index_dtype(x: Any, *indices: Any, **attrs: Any) -> tuple[list[Any], list[Any]]:
    return [x, *(index_dtype("index", i) for i in indices)], [x]


def _cases() -> list[tuple[Shape, tuple[Any, ...], Ints, int]]:
    i = np.array
    return [((5,), (i([4, 0, 0, -1]),), (0,), 0), ((5, 4), (i([1, 3]), i([2, -1])), (0, 1), 0),
            ((5, 4), (i([[1], [3]]), i([2, -1, 2])), (0, 1), 0), ((5, 4, 3), (i([[0, 1]]),), (1,), 1),
            ((5, 3, 4), (i([1, 4, 1]), i([0, 3, 0])), (0, 2), 0), ((5, 4), (i(2),), (0,), 0),
            ((2, 5, 4), (i([1, -3]), i([3, 3])), (1, 2), 1), ((5, 3), (i([], np.int64),), (1,), 1),
            ((0, 3), (i([1, 1]),), (1,), 1),
            ((2, 3, 2, 3), (i([0, 1, 1, 0]), i([2, 0, 0, 1])), (1, 3), 2), ((1, 5), (i([0, 0, 0]),), (0,), 1)]


def _selection(x: Shape, indices: tuple[Any, ...], dims: Ints, at: int) -> Shape:
    return selected_shape("", x, tuple(i.shape for i in indices), dims, at)


index: Op = register(Op(
    "index",
    kernel=lambda xp, x, *indices, dims, at: _selected(xp, x, indices, dims, at, "index"),
    attrs=PLACES,
    shape=lambda x, *indices, dims, at: [selected_shape("index", x, indices, dims, at)],
    dtype=_index_dtype,
    axes=_index_axes,
    linear=((0,),),
    vjp=(lambda g, out, x, *indices, **places: index_grad(g, *indices, shape=x.shape, **places), None),
    keeps="indices",
    samples=lambda: [Sample((x, *i), {"dims": dims, "at": at}) for x, i, dims, at in _cases()]))


def _index_grad(xp: Any, g: Any, *indices: Any, shape: Shape, dims: Ints, at: int) -> Any:
    rest = [d for d in range(len(shape)) if d not in dims]
    rows = _rows(xp, shape, indices, dims)
    r = rows.ndim
    inner = prod(shape[d] for d in rest)
    values = xp.moveaxis(g, range(at, at + r), range(r)).reshape(rows.size, inner)
    order = [*dims, *rest]
    sums = accumulate(xp, values, rows.reshape(-1), prod(shape[d] for d in dims))
    return sums.reshape([shape[d] for d in order]).transpose([order.index(d) for d in range(len(shape))])


def _index_grad_shape(g: Shape, *indices: Shape, shape: Shape, dims: Ints, at: int) -> list[Shape]:
    wanted = selected_shape("index_grad", shape, indices, dims, at)
    if wanted != g:
        raise ShapeError(f"index_grad: the selection from {shape} has the shape {wanted}, got {g}")
    return [tuple(shape)]


def _index_grad_axes(g: Shape, *indices: Shape, shape: Shape, dims: Ints, at: int) -> Axes:
    names, rows, selection = _letters(shape, indices, dims, at)
    return Axes((selection, *rows), (names,))


index_grad: Op = register(Op(
    "index_grad",
    kernel=_index_grad,
    device=scatter.INDEX_GRAD,
    attrs={"shape": REQUIRED, **PLACES},
    shape=_index_grad_shape,
    dtype=_index_dtype,
    axes=_index_grad_axes,
    linear=((0,),),
    local=local_shape,
    vjp=(lambda g, out, x, *indices, shape, **places: index(g, *indices, **places), None),
    keeps="indices",
    samples=lambda: [Sample((_selection(x, i, dims, at), *i), {"shape": x, "dims": dims, "at": at})
                     for x, i, dims, at in _cases()]))


# --- writing: index_update replaces, index_add adds --------------------------------------------------

def _written_shape(name: str) -> Any:
    def shape(x: Shape, value: Shape, *indices: Shape, dims: Ints, at: int) -> list[Shape]:
        check_stretch(name, value, selected_shape(name, x, indices, dims, at))
        return [x]
    return shape


def _written_dtype(name: str) -> Any:
    def dtype(x: Any, value: Any, *indices: Any, **attrs: Any) -> tuple[list[Any], list[Any]]:
        return [x, written_dtype(name, x, value), *(index_dtype(name, i) for i in indices)], [x]
    return dtype


def _update_axes(x: Shape, value: Shape, *indices: Shape, dims: Ints, at: int) -> Axes:
    """The index arrays are whole: of two writes to one element the last must win."""
    names, _, selection = _letters(x, indices, dims, at)
    selection = "".join(c if c in names else "." for c in selection)
    places = stretch_letters(value, selected_shape("", x, indices, dims, at), selection)
    return Axes((names, places, *("." * len(i) for i in indices)), (names,))


def _index_update(xp: Any, x: Any, value: Any, *indices: Any, dims: Ints, at: int) -> Any:
    """Written through a view whose first dimensions are the indexed ones, in the order of `dims`."""
    out = x.copy()
    front = xp.moveaxis(out, dims, range(len(dims)))
    r = max(i.ndim for i in indices)
    if hasattr(value, "ndim") and value.ndim:
        size = front.ndim - len(dims) + r
        value = value.reshape((1,) * (size - value.ndim) + value.shape)
        value = xp.moveaxis(value, range(at, at + r), range(r))
    try:
        front[indices] = value
    except IndexError:
        for d, i in zip(dims, indices, strict=True):
            require_in_range(xp, "index_update", i, x.shape[d], d)
        raise
    return out


def _write_samples(cases: list[tuple[Shape, tuple[Any, ...], Ints, int]]) -> list[Sample]:
    pair = (np.array([1, 3]), np.array([0, -1]))
    found = [Sample((x, _selection(x, i, dims, at), *i), {"dims": dims, "at": at})
             for x, i, dims, at in cases]
    return found + [Sample(((5, 3, 4), value, *pair), {"dims": (0, 2), "at": 0}) for value in
                    ((), (3,), (2, 1), (1, 3), 0.5)]


def _unique_cases() -> list[tuple[Shape, tuple[Any, ...], Ints, int]]:
    """The cases in which no element is selected twice."""
    found = []
    for case in _cases():
        x, indices, dims, _ = case
        rows = np.broadcast_to(_rows(np, x, indices, dims), broadcast_shapes("", *(i.shape for i in indices)))
        if len(np.unique(rows)) == rows.size:
            found.append(case)
    return found


index_update: Op = register(Op(
    "index_update",
    kernel=_index_update,
    device=scatter.INDEX_UPDATE,
    attrs=PLACES,
    shape=_written_shape("index_update"),
    dtype=_written_dtype("index_update"),
    axes=_update_axes,
    linear=((0, 1),),
    vjp=(lambda g, out, x, value, *indices, **places: index_update(g, 0.0, *indices, **places),
         lambda g, out, x, value, *indices, **places: unbroadcast(index(g, *indices, **places), value), None),
    keeps="indices",
    samples=lambda: _write_samples(_unique_cases())))


def _add_axes(x: Shape, value: Shape, *indices: Shape, dims: Ints, at: int) -> Axes:
    """Split index arrays: every worker adds its part of the values, so x must be Partial as the result is."""
    names, rows, selection = _letters(x, indices, dims, at)
    places = stretch_letters(value, selected_shape("", x, indices, dims, at), selection)
    return Axes((names, places, *rows), (names,), additive=(0,))


def _index_add(xp: Any, x: Any, value: Any, *indices: Any, dims: Ints, at: int) -> Any:
    for d, i in zip(dims, indices, strict=True):
        require_in_range(xp, "index_add", i, x.shape[d], d)
    values = xp.broadcast_to(xp.asarray(value, x.dtype), _selection(x.shape, indices, dims, at))
    return x + _index_grad(xp, values, *indices, shape=x.shape, dims=dims, at=at)


index_add: Op = register(Op(
    "index_add",
    kernel=_index_add,
    device=scatter.INDEX_ADD,
    attrs=PLACES,
    shape=_written_shape("index_add"),
    dtype=_written_dtype("index_add"),
    axes=_add_axes,
    linear=((0, 1),),
    vjp=(lambda g, out, x, value, *indices, **places: g,
         lambda g, out, x, value, *indices, **places: unbroadcast(index(g, *indices, **places), value), None),
    keeps="indices",
    samples=lambda: _write_samples(_cases())))
