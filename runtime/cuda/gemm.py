"""A matrix product in cuBLAS's terms: from shapes and strides to sizes, leading dimensions, offsets. Pure.

cuBLAS multiplies column-major matrices, C (m, n) = op(A) (m, k) op(B) (k, n), each stored with a leading
dimension, the distance of its columns. A row-major matrix is the transpose of a column-major one, so where
the result is row-major, C.T = b.T a.T is computed: cuBLAS's A is our b. Transposed views and slices are
multiplied where they lie. What has no stride of 1, or batch dimensions that no single stride steps through,
is either copied or gone through call by call, whichever is estimated to be faster.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

Ints = tuple[int, ...]

# Microseconds: a call or a launch, and a byte that is read and written (H200: 4.8 TB/s).
CALL, COPIED_BYTE = 4.0, 2 / 4e6
MOST_AT_ONCE = 65535        # batches in one call; some kernels have their number in gridDim.z


class Plan(NamedTuple):
    """How to multiply; all distances in elements.

    swapped   cuBLAS's A is our b, and its B our a
    calls     offsets of cuBLAS's (A, B, C) and the number of batches from there, for each call
    copy_a    the shape to which our a is to be broadcast and copied in C order first; None: leave it
    copy_b    the same for our b
    through   the result must go to a C-contiguous array first, and be copied from there
    zero      the sum is over nothing: the result is zeros
    """

    swapped: bool
    transa: bool
    transb: bool
    m: int
    n: int
    k: int
    lda: int
    ldb: int
    ldc: int
    stride_a: int
    stride_b: int
    stride_c: int
    calls: tuple[tuple[int, int, int, int], ...]
    copy_a: Ints | None = None
    copy_b: Ints | None = None
    through: bool = False
    zero: bool = False


class Dim(NamedTuple):
    """One loop around or inside the product: its extent and what a step means in a, b and c."""

    size: int
    a: int
    b: int
    c: int

    def turned(self) -> Dim:
        return Dim(self.size, self.b, self.a, self.c)


class Problem(NamedTuple):
    """c[..., m, n] = a[..., m, k] b[..., k, n]; `row` and `col` step through m and n, `inner` through k (as
    in a's column and b's row), `batch` through all else, outermost first."""

    row: Dim
    col: Dim
    inner: Dim
    batch: tuple[Dim, ...]

    def turned(self) -> Problem:
        """c.T = b.T a.T."""
        return Problem(self.col.turned(), self.row.turned(), self.inner.turned(),
                       tuple(dim.turned() for dim in self.batch))


@lru_cache(maxsize=4096)
def plan(a_shape: Ints, a_strides: Ints, b_shape: Ints, b_strides: Ints, c_strides: Ints,
         itemsize: int, c_itemsize: int = 0) -> Plan:
    """The plan for c = a @ b, (..., m, k) @ (..., k, n), with batch dimensions that broadcast.

    Strides in bytes, as NumPy gives them; c has the broadcast shape. Shapes must fit (NumPy's rules).
    """
    batch = broadcast(a_shape[:-2], b_shape[:-2])
    m, k, n = a_shape[-2], a_shape[-1], b_shape[-1]
    if not (m and n and k and prod(batch)):
        zero = not k and bool(m and n and prod(batch))
        return Plan(False, False, False, m, n, k, 1, 1, 1, 0, 0, 0, (), zero=zero)
    c_item = c_itemsize or itemsize
    found: Plan | None = None
    least = 0.0
    for ways in WAYS:
        a_used, a_steps, a_copied = as_used(ways[0], a_shape, a_strides, batch, itemsize)
        b_used, b_steps, b_copied = as_used(ways[1], b_shape, b_strides, batch, itemsize)
        c_shape = (*batch, m, n)
        through = ways[2] == THROUGH
        c_steps = contiguous(c_shape) if through else elements(c_strides, c_item)
        made = None if c_steps is None or a_steps is None or b_steps is None else lay_out(
            problem(a_used, a_steps, b_used, b_steps, c_shape, c_steps))
        if made is None:
            continue
        copied = (a_copied + b_copied) * itemsize + through * prod(c_shape) * c_item
        cost = CALL * (len(made.calls) + sum(way > KEEP for way in ways)) + COPIED_BYTE * copied
        if found is None or cost < least:
            least = cost
            found = made._replace(copy_a=a_used if ways[0] else None, copy_b=b_used if ways[1] else None,
                                  through=through)
        if len(made.calls) == 1 and ways == WAYS[0]:
            break
    assert found is not None        # copies of everything have a layout
    return found


# What can be done with an operand: left as it is, copied, or broadcast to all batches and copied.
KEEP, COPY, SPREAD = 0, 1, 2
THROUGH = 1
WAYS = tuple(sorted(product((KEEP, COPY, SPREAD), (KEEP, COPY, SPREAD), (KEEP, THROUGH)), key=sum))


def as_used(way: int, shape: Ints, strides: Ints, batch: Ints,
            itemsize: int) -> tuple[Ints, Ints | None, int]:
    """Shape, strides in elements (None if there are none) and copied elements of an operand."""
    if way == KEEP:
        return shape, elements(strides, itemsize), 0
    used = shape if way == COPY else (*batch, *shape[-2:])
    return used, contiguous(used), prod(used)


def broadcast(a: Ints, b: Ints) -> Ints:
    """The common shape of batch dimensions that fit."""
    ndim = max(len(a), len(b))
    a, b = (1,) * (ndim - len(a)) + a, (1,) * (ndim - len(b)) + b
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def contiguous(shape: Ints) -> Ints:
    """Strides in elements of an array in C order."""
    return tuple(prod(shape[i + 1:]) for i in range(len(shape)))


def elements(strides: Ints, itemsize: int) -> Ints | None:
    """Strides in elements; None if there is a negative one, or one between elements."""
    if any(s < 0 or s % itemsize for s in strides):
        return None
    return tuple(s // itemsize for s in strides)


def problem(a_shape: Ints, a: Ints, b_shape: Ints, b: Ints, c_shape: Ints, c: Ints) -> Problem:
    """Dims of a product, merged where one stride steps through two of them."""
    batch = []
    for at in range(len(c_shape) - 2):
        back = at - len(c_shape)
        steps = [strides[back] if len(shape) >= -back and shape[back] != 1 else 0
                 for shape, strides in ((a_shape, a), (b_shape, b))]
        if c_shape[at] != 1:
            batch.append(Dim(c_shape[at], steps[0], steps[1], c[at]))
    row = Dim(a_shape[-2], a[-2], 0, c[-2])
    col = Dim(b_shape[-1], 0, b[-1], c[-1])
    given = Problem(row, col, Dim(a_shape[-1], a[-1], b[-2], 0), tuple(merged(batch)))
    return absorbed(absorbed(given).turned()).turned()


def merged(dims: list[Dim]) -> list[Dim]:
    """Neighbours made one where the outer step is the inner one times its extent, in a, b and c."""
    out: list[Dim] = []
    for dim in dims:
        if out and out[-1][1:] == tuple(dim.size * step for step in dim[1:]):
            dim = dim._replace(size=out.pop().size * dim.size)
        out.append(dim)
    return out


def absorbed(given: Problem) -> Problem:
    """Batches that share b as further rows of a, where rows are evenly spaced then."""
    row, batch = given.row, list(given.batch)
    while batch and batch[-1].b == 0:
        outer = batch[-1]
        if row.size == 1:
            wider = outer
        elif (outer.a, outer.c) == (row.size * row.a, row.size * row.c):
            wider = row._replace(size=outer.size * row.size)
        else:
            break
        if stored(wider.size, given.inner.size, wider.a, given.inner.a) is None or (
                stored(wider.size, given.col.size, wider.c, given.col.c) is None):
            break
        row = wider
        batch.pop()
    return given._replace(row=row, batch=tuple(batch))


def stored(rows: int, cols: int, row: int, col: int) -> tuple[bool, int] | None:
    """How cuBLAS may read a matrix with these steps: whether by rows, and the leading dimension."""
    if (col == 1 or cols == 1) and (rows == 1 or row >= cols):
        return True, row if rows > 1 else cols
    if (row == 1 or rows == 1) and (cols == 1 or col >= rows):
        return False, col if cols > 1 else rows
    return None


def lay_out(given: Problem) -> Plan | None:
    """The calls for a problem; None if a matrix has no leading dimension."""
    c = stored(given.row.size, given.col.size, given.row.c, given.col.c)
    if c is not None and not c[0]:
        return lay_out_by_columns(given)
    made = lay_out_by_columns(given.turned())
    return None if made is None else made._replace(swapped=True)


def lay_out_by_columns(given: Problem) -> Plan | None:
    """The calls for a problem whose c is column-major."""
    row, col, inner, batch = given
    a = stored(row.size, inner.size, row.a, inner.a)
    b = stored(inner.size, col.size, inner.b, col.b)
    c = stored(col.size, row.size, col.c, row.c)    # c.T by rows
    if a is None or b is None or c is None or not c[0]:
        return None
    widest = max(range(len(batch)), key=lambda i: batch[i].size, default=-1)
    at_once = batch[widest] if batch else Dim(1, 0, 0, 0)
    loops = [d for i, d in enumerate(batch) if i != widest]
    calls = []
    for index in product(*(range(d.size) for d in loops)):
        start = [sum(i * d[which] for i, d in zip(index, loops, strict=True)) for which in (1, 2, 3)]
        for first in range(0, at_once.size, MOST_AT_ONCE):
            calls.append((start[0] + first * at_once.a, start[1] + first * at_once.b,
                          start[2] + first * at_once.c, min(MOST_AT_ONCE, at_once.size - first)))
    return Plan(False, a[0], b[0], row.size, col.size, inner.size, a[1], b[1], c[1],
                at_once.a, at_once.b, at_once.c, tuple(calls))
