"""Rows that frame a tensor or keep a part of it: pad, tril, triu, diagonal, diag_embed. All are linear."""

from __future__ import annotations

from typing import Any

from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import IO, REQUIRED, Axes, Op, Sample, register
from meshtape.runtime.ops.shape import Attrs, named, same_dtype
from meshtape.runtime.shards import Shape

Widths = tuple[tuple[int, int], ...]


# --- pad --------------------------------------------------------------------------------------------

def _pad_shape(x: Shape, widths: Widths, value: Any) -> list[Shape]:
    if len(widths) != len(x):
        raise ShapeError(f"pad: {len(widths)} pairs of widths for a tensor of {len(x)} dimensions; "
                         "give (before, after) for every dimension")
    for d, (n, (lo, hi)) in enumerate(zip(x, widths, strict=True)):
        if n + min(lo, 0) + min(hi, 0) < 0:
            raise ShapeError(f"pad: widths {(lo, hi)} remove more than the {n} elements of dimension {d}; "
                             "negative widths may remove a dimension's elements once")
    return [tuple(n + lo + hi for n, (lo, hi) in zip(x, widths, strict=True))]


def _pad_axes(x: Shape, widths: Widths, value: Any) -> Axes:
    names = named(len(x), tuple(d for d, w in enumerate(widths) if tuple(w) != (0, 0)))
    return Axes((names,), (names,))


def _pad_local(attrs: Attrs, io: IO) -> Attrs:
    """Of a Partial result only one addend carries the padding value."""
    return attrs if io.outs[0].addend else {**attrs, "value": 0}


def _pad(xp: Any, x: Any, widths: Widths, value: Any) -> Any:
    out = xp.full([n + lo + hi for n, (lo, hi) in zip(x.shape, widths, strict=True)], value, x.dtype)
    inner = tuple(slice(max(lo, 0), n - max(hi, 0)) for n, (lo, hi) in zip(out.shape, widths, strict=True))
    kept = tuple(slice(max(-lo, 0), n - max(-hi, 0)) for n, (lo, hi) in zip(x.shape, widths, strict=True))
    out[inner] = x[kept]
    return out


pad: Op = register(Op(
    "pad",
    kernel=_pad,
    attrs={"widths": REQUIRED, "value": 0},
    shape=_pad_shape,
    dtype=same_dtype,
    axes=_pad_axes,
    linear=((0,),),
    local=_pad_local,
    vjp=(lambda g, out, x, widths, value: pad(g, widths=tuple((-lo, -hi) for lo, hi in widths)),),
    samples=lambda: [Sample((x,), {"widths": widths, "value": value}) for x, widths, value in [
        ((), (), 0), ((5,), ((1, 2),), 0), ((5, 4), ((0, 0), (2, 0)), 1.5), ((5, 4), ((-1, 2), (0, -3)), 0),
        ((5, 3), ((0, 0), (-2, -1)), 2.0), ((0, 3), ((1, 1), (0, 0)), 0.5),
        ((1, 4, 2), ((0, 3), (0, 0), (1, 1)), 0)]]))


# --- triangles --------------------------------------------------------------------------------------

def _matrix_shape(name: str, x: Shape) -> list[Shape]:
    if len(x) < 2:
        raise ShapeError(f"{name}: needs matrices in the last two dimensions, got the shape {x}")
    return [x]


def _triangle_local(attrs: Attrs, io: IO) -> Attrs:
    """Element (i, j) of the piece is (i + rows, j + columns) of the whole matrix."""
    rows, columns = io.outs[0].offset[-2:]
    return {**attrs, "k": attrs["k"] + rows - columns}


def _triangle_axes(x: Shape, k: int) -> Axes:
    return Axes((named(len(x)),), (named(len(x)),))


def _triangle_samples() -> list[Sample]:
    return [Sample((x,), {"k": k}) for x, k in [
        ((5, 5), 0), ((5, 4), 1), ((4, 6), -2), ((3, 5, 4), 2), ((1, 4), 0), ((4, 1), -1), ((0, 3), 0),
        ((2, 3, 0), 1), ((4, 4), 9)]]


tril: Op = register(Op(
    "tril",
    kernel=lambda xp, x, k: xp.tril(x, k),
    attrs={"k": 0},
    shape=lambda x, k: _matrix_shape("tril", x),
    dtype=same_dtype,
    axes=_triangle_axes,
    linear=((0,),),
    local=_triangle_local,
    vjp=(lambda g, out, x, k: tril(g, k=k),),
    samples=_triangle_samples))

triu: Op = register(Op(
    "triu",
    kernel=lambda xp, x, k: xp.triu(x, k),
    attrs={"k": 0},
    shape=lambda x, k: _matrix_shape("triu", x),
    dtype=same_dtype,
    axes=_triangle_axes,
    linear=((0,),),
    local=_triangle_local,
    vjp=(lambda g, out, x, k: triu(g, k=k),),
    samples=_triangle_samples))


# --- diagonals --------------------------------------------------------------------------------------

def diagonal_length(rows: int, columns: int, offset: int) -> int:
    """Elements on the diagonal of a matrix that starts `offset` columns right of its corner."""
    return max(min(rows + min(offset, 0), columns - max(offset, 0)), 0)


def _diagonal_shape(x: Shape, offset: int) -> list[Shape]:
    _matrix_shape("diagonal", x)
    return [(*x[:-2], diagonal_length(x[-2], x[-1], offset))]


def _diag_embed_shape(x: Shape, shape: Shape, offset: int) -> list[Shape]:
    rows, columns = shape
    if not x or x[-1] != diagonal_length(rows, columns, offset):
        raise ShapeError(f"diag_embed: the diagonal {offset} of a {rows} x {columns} matrix has "
                         f"{diagonal_length(rows, columns, offset)} elements, got the shape {x}")
    return [(*x[:-1], rows, columns)]


def _diag_embed(xp: Any, x: Any, shape: Shape, offset: int) -> Any:
    out = xp.zeros((*x.shape[:-1], *shape), x.dtype)
    along = xp.arange(x.shape[-1])
    out[..., along + max(-offset, 0), along + max(offset, 0)] = x
    return out


def _batch_axes(n_in: int, n_out: int) -> Any:
    """Leading dimensions may be split; the last `n_in` of the input and `n_out` of the output may not."""
    def axes(x: Shape, **attrs: Any) -> Axes:
        names = named(len(x) - n_in)
        return Axes((names + "." * n_in,), (names + "." * n_out,))
    return axes


diagonal: Op = register(Op(
    "diagonal",
    kernel=lambda xp, x, offset: xp.diagonal(x, offset, -2, -1),
    attrs={"offset": 0},
    shape=_diagonal_shape,
    dtype=same_dtype,
    axes=_batch_axes(2, 1),
    linear=((0,),),
    vjp=(lambda g, out, x, offset: diag_embed(g, shape=x.shape[-2:], offset=offset),),
    samples=lambda: [Sample((x,), {"offset": offset}) for x, offset in [
        ((4, 4), 0), ((5, 3), -1), ((2, 3, 5), 2), ((2, 0, 4), 0), ((1, 3, 3), 5), ((3, 1, 4), -1)]]))

diag_embed: Op = register(Op(
    "diag_embed",
    kernel=_diag_embed,
    attrs={"shape": REQUIRED, "offset": 0},
    shape=_diag_embed_shape,
    dtype=same_dtype,
    axes=_batch_axes(1, 2),
    linear=((0,),),
    vjp=(lambda g, out, x, shape, offset: diagonal(g, offset=offset),),
    samples=lambda: [Sample((x,), {"shape": shape, "offset": offset}) for x, shape, offset in [
        ((4,), (4, 4), 0), ((5, 3), (5, 3), -1), ((2, 3), (3, 5), 2), ((0,), (0, 4), 0),
        ((1, 3), (3, 4), 0)]]))
