"""Rows for tables looked up by integers: embedding and one_hot."""

from __future__ import annotations

from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels import embedding as device_kernels
from meshtape.runtime.cuda.kernels import scatter
from meshtape.runtime.dtypes import canonical
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import ALPHABET, IO, REQUIRED, Axes, Op, Sample, register
from meshtape.runtime.ops.index import accumulate, index_dtype, out_of_range, wrapped
from meshtape.runtime.ops.slices import slice_attrs, slice_update
from meshtape.runtime.shards import Shape

Attrs = dict[str, Any]


# --- embedding --------------------------------------------------------------------------------------
# The table is (V, E), indices are n.., the result is n..E. Row `padding_idx` gets no gradient.

def _embedding_shape(weight: Shape, indices: Shape, padding_idx: int | None) -> list[Shape]:
    if len(weight) != 2:
        raise ShapeError(f"embedding: the table must be (rows, features), got the shape {weight}")
    _check_padding(weight[0], padding_idx)
    return [(*indices, weight[1])]


def _check_padding(rows: int, padding_idx: int | None) -> None:
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ShapeError(f"embedding: padding_idx {padding_idx} is out of range for a table of {rows} rows; "
                         f"use {-rows} to {rows - 1}, or None")


def _embedding_axes(weight: Shape, indices: Shape, padding_idx: int | None) -> Axes:
    rows, e = ALPHABET[:len(indices)], ALPHABET[len(indices)]
    return Axes(("." + e, rows), (rows + e,))


def _embedding(xp: Any, weight: Any, indices: Any, padding_idx: int | None) -> Any:
    try:
        return xp.take(weight, indices, axis=0)
    except IndexError:
        raise out_of_range("embedding", indices, weight.shape[0], 0) from None


def _cases() -> list[tuple[Any, int, int, int | None]]:
    """Indices, rows, features, padding_idx."""
    tokens = np.random.default_rng(0).integers(0, 6, (3, 5))
    return [(np.array([4, 0, 0, 1]), 5, 3, None), (tokens, 6, 4, None), (tokens, 6, 4, 2), (tokens, 6, 1, -1),
            (np.array(2), 5, 3, None), (np.zeros((0, 3), np.int64), 5, 3, 0),
            (np.zeros((1, 7), np.int64), 2, 3, None)]


embedding: Op = register(Op(
    "embedding",
    kernel=_embedding,
    device=device_kernels.EMBEDDING,
    attrs={"padding_idx": None},
    shape=_embedding_shape,
    dtype=lambda weight, indices, **attrs: ([weight, index_dtype("embedding", indices)], [weight]),
    axes=_embedding_axes,
    linear=((0,),),
    vjp=(lambda g, out, weight, indices, padding_idx: embedding_grad(
        g, indices, num_embeddings=weight.shape[0], padding_idx=padding_idx), None),
    keeps="indices",
    samples=lambda: [Sample(((rows, e), tokens), {"padding_idx": padding}, diff=padding is None)
                     for tokens, rows, e, padding in _cases()]))


# Numbers for each row of the table from which on sorting them is faster than adding them one by one.
_OFTEN = 1024


def _embedding_grad(xp: Any, g: Any, indices: Any, num_embeddings: int, padding_idx: int | None) -> Any:
    rows = wrapped(xp, indices.reshape(-1), num_embeddings)
    values = g.reshape(rows.size, g.shape[-1])
    if xp is np and values.dtype.char in "fd" and values.size >= _OFTEN * num_embeddings:
        out = _sums_by_row(values, rows, num_embeddings)
    else:
        out = accumulate(xp, values, rows, num_embeddings)
    if padding_idx is not None:
        out[padding_idx] = 0
    return out


def _sums_by_row(values: Any, rows: Any, n: int) -> Any:
    """What `accumulate` gives, in one product with ones for each row.

    8192 x 256 values into 256 rows take 0.7 ms, one by one 2.5; 2048 x 64 into 65 take 0.11 and 0.15.
    """
    counts = np.bincount(rows, minlength=n)
    if len(counts) > n:
        raise out_of_range("embedding_grad", rows, n, 0)
    # NumPy sorts 16-bit integers by radix.
    order = np.argsort(rows.astype(np.uint16) if n <= 1 << 16 else rows, kind="stable")
    lying, ones = values[order], np.ones(int(counts.max()), values.dtype)
    out = np.zeros((n, values.shape[1]), values.dtype)
    start = 0
    for row, count in enumerate(counts.tolist()):
        if count:
            np.dot(ones[:count], lying[start:start + count], out=out[row])
            start += count
    return out


def _embedding_grad_shape(g: Shape, indices: Shape, num_embeddings: int,
                          padding_idx: int | None) -> list[Shape]:
    if not g or g[:-1] != indices:
        raise ShapeError(f"embedding_grad: gradient {g} must have the indices' shape {indices} and one "
                         "more dimension")
    _check_padding(num_embeddings, padding_idx)
    return [(num_embeddings, g[-1])]


def _embedding_grad_axes(g: Shape, indices: Shape, num_embeddings: int, padding_idx: int | None) -> Axes:
    names = ALPHABET[:len(g)]
    return Axes((names, names[:-1]), ("." + names[-1],))


def _embedding_grad_vjp(g: Any, out: Any, x: Any, indices: Any, num_embeddings: int,
                        padding_idx: int | None) -> Any:
    if padding_idx is not None:
        row = padding_idx % num_embeddings
        g = slice_update(g, 0.0, **slice_attrs(g.shape, (slice(row, row + 1), slice(None))))
    return embedding(g, indices, padding_idx=padding_idx)


embedding_grad: Op = register(Op(
    "embedding_grad",
    kernel=_embedding_grad,
    device=scatter.EMBEDDING_GRAD,
    attrs={"num_embeddings": REQUIRED, "padding_idx": None},
    shape=_embedding_grad_shape,
    dtype=lambda g, indices, **attrs: ([g, index_dtype("embedding_grad", indices)], [g]),
    axes=_embedding_grad_axes,
    linear=((0,),),
    vjp=(_embedding_grad_vjp, None),
    keeps="indices",
    samples=lambda: [Sample(((*tokens.shape, e), tokens), {"num_embeddings": rows, "padding_idx": padding})
                     for tokens, rows, e, padding in _cases()]))


# --- one_hot ----------------------------------------------------------------------------------------

def _one_hot(xp: Any, indices: Any, num_classes: int, dtype: str, first: int, count: int | None) -> Any:
    """`first` and `count` name the classes of this worker's piece."""
    if xp is np and indices.size and not (indices.min() >= 0 and indices.max() < num_classes):
        bad = indices[(indices < 0) | (indices >= num_classes)].reshape(-1)[0]
        raise IndexError(f"one_hot: {bad} is no class; {num_classes} classes have the numbers 0 to "
                         f"{num_classes - 1}")
    classes = xp.arange(first, first + (num_classes if count is None else count))
    return (indices[..., None] == classes).astype(canonical(dtype))


def _one_hot_shape(indices: Shape, num_classes: int, **attrs: Any) -> list[Shape]:
    if num_classes < 1:
        raise ShapeError(f"one_hot: num_classes is {num_classes}; give at least 1")
    return [(*indices, num_classes)]


def _one_hot_axes(indices: Shape, **attrs: Any) -> Axes:
    names = ALPHABET[:len(indices) + 1]
    return Axes((names[:-1],), (names,))


def _one_hot_local(attrs: Attrs, io: IO) -> Attrs:
    out = io.outs[0]
    return {**attrs, "first": out.offset[-1], "count": out.shape[-1]}


one_hot: Op = register(Op(
    "one_hot",
    kernel=_one_hot,
    attrs={"num_classes": REQUIRED, "dtype": "int64", "first": 0, "count": None},
    shape=_one_hot_shape,
    dtype=lambda indices, dtype, **attrs: ([index_dtype("one_hot", indices)], [canonical(dtype)]),
    axes=_one_hot_axes,
    local=_one_hot_local,
    samples=lambda: [
        Sample((np.asarray(i),), {"num_classes": n, "dtype": dtype}, diff=False) for i, n, dtype in [
            ([0, 2, 1, 2], 3, "int64"), (1, 2, "float32"), ([[0, 5, 3], [6, 6, 1]], 7, "float64"),
            (np.zeros((0, 2), int), 3, "int64"), ([0] * 5, 1, "bool")]]))
