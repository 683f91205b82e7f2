"""Arithmetic along the rows and columns of matrices, as fast as one CPU core does it through NumPy.

On a device every function here is the plain expression. For NumPy, with microseconds for 65536 float32 in
cache (AVX-512, OpenBLAS):

* A sum along rows or columns is a product with a vector of ones: 1024 x 64 takes 3.4; `sum` 22 and 15.
* A ufunc that stretches a column over rows, or a row over columns, copies it into its buffer first: 10, where
  equal operands take 4.3. For short rows the outer product comes out of BLAS in 4.1 (with an inner dimension
  of 2; of 1, in 7.2); for long ones a buffer shorter than a row makes the ufunc go row by row, in 4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import gcd, prod
from typing import Any

import numpy as np

from meshtape.runtime.shards import Shape

CACHED = 65536      # elements of a block over which several passes go: 256 KB of float32
LONG = 512          # elements of a row from which ufuncs go row by row
SMALL = 16384       # elements below which calls cost more than the passes that they save
EXACT = 4096        # elements of a row up to which a product with ones is as exact as one wants


def flat_blocks(xp: Any, size: int, cached: int = CACHED) -> Iterator[slice]:
    """Runs of elements that a kernel of several passes takes one after the other; all at once on a device."""
    step = cached if xp is np else max(1, size)
    return (slice(at, at + step) for at in range(0, size, step))


def row_blocks(xp: Any, shape: Shape, cached: int = CACHED) -> Iterator[slice]:
    """The same in whole rows of a matrix of `shape`."""
    rows, width = shape
    step = max(1, cached // max(1, width)) if xp is np else max(1, rows)
    return (slice(at, at + step) for at in range(0, rows, step))


def blockwise(xp: Any, function: Callable[..., None], arrays: Sequence[Any], out: Any = None) -> Any:
    """function(out, *arrays), which writes `out` last, on flat blocks of equal arrays; what it filled."""
    first = arrays[0]
    if out is None or not out.flags.c_contiguous:
        out = xp.empty(first.shape, first.dtype)
    flat, target = [a.reshape(-1) for a in arrays], out.reshape(-1)
    for block in flat_blocks(xp, first.size):
        function(target[block], *(a[block] for a in flat))
    return out


# --- sums -------------------------------------------------------------------------------------------

def sums(xp: Any, x: Any, axes: tuple[int, ...], keepdims: bool, dtype: Any) -> Any:
    """x.sum over sorted axes, in `dtype`."""
    if xp is np and x.size >= SMALL and 0 < len(axes) < x.ndim and x.dtype == dtype and x.dtype.char in "fd":
        found = _blas_sums(x, axes)
        if found is not None:
            return np.expand_dims(found, axes) if keepdims else found
    return x.sum(axis=axes, dtype=dtype, keepdims=keepdims)


def _blas_sums(x: Any, axes: tuple[int, ...]) -> Any:
    """The sum where `axes` come first or last in the memory of an array without gaps, else None."""
    order = sorted(range(x.ndim), key=lambda d: -x.strides[d])
    lying, summed = x.transpose(order), {order.index(a) for a in axes}
    first = len(axes)
    kept = x.ndim - first
    if not lying.flags.c_contiguous:
        return None
    if summed == set(range(first)):
        found = _column_sums(lying.reshape(prod(lying.shape[:first]), -1))
        rest, order = lying.shape[first:], order[first:]
    elif summed == set(range(kept, x.ndim)):
        found = _row_sums(lying.reshape(-1, prod(lying.shape[kept:])))
        rest, order = lying.shape[:kept], order[:kept]
    else:
        return None
    return found if found is None else found.reshape(rest).transpose(np.argsort(order))


def _column_sums(x: Any) -> Any:
    return np.ones(x.shape[0], x.dtype) @ x if x.shape[1] > 1 else None


def _row_sums(x: Any) -> Any:
    return x @ np.ones(x.shape[1], x.dtype) if 1 < x.shape[1] <= EXACT else None


# --- a column, or a row, over a matrix --------------------------------------------------------------

@contextmanager
def unbuffered(xp: Any, width: int) -> Iterator[None]:
    """Inside, ufuncs on this thread do not copy what they stretch over runs of so many elements, if these are
    long."""
    if xp is not np or width < LONG:
        yield
        return
    before = np.setbufsize(16)
    try:
        yield
    finally:
        np.setbufsize(before)


class Rows:
    """Arithmetic of blocks of rows of one width and dtype with columns and rows."""

    def __init__(self, xp: Any, width: int, dtype: Any) -> None:
        self.xp, self.width = xp, width
        self.blas = xp is np and width > 1 and dtype.char in "fd"
        self.short = self.blas and width < LONG
        self.ones = xp.ones(width, dtype)
        self.scratch: Any = None

    def sums(self, x: Any) -> Any:
        """The sum of every row, as a vector."""
        return x @ self.ones if self.blas and self.width <= EXACT else x.sum(axis=1)

    def squares(self, x: Any) -> Any:
        """The sum of every row's squares, as a vector."""
        if not self.blas:
            return self.xp.einsum("ij,ij->i", x, x)
        return np.square(x, out=self._room(len(x))) @ self.ones if self.short else np.vecdot(x, x)

    def scale(self, x: Any, column: Any, row: Any = None, out: Any = None) -> Any:
        """x[i, j] * column[i], times row[j] if a row is given."""
        if self.short:
            return np.multiply(x, self._outer(column, self.ones if row is None else row), out=out)
        out = self.xp.multiply(x, column[:, None], out=out)
        return out if row is None else self.xp.multiply(out, row, out=out)

    def shift(self, x: Any, column: Any, out: Any = None) -> Any:
        """x[i, j] + column[i]."""
        by = self._outer(column, self.ones) if self.short else column[:, None]
        return self.xp.add(x, by, out=out)

    def _outer(self, column: Any, row: Any) -> Any:
        """column[i] * row[j], by BLAS; overwritten by the next one."""
        left, right = np.zeros((2, len(column)), column.dtype), np.zeros((2, self.width), column.dtype)
        left[0], right[0] = column, row
        return np.dot(left.T, right, out=self._room(len(column)))

    def _room(self, rows: int) -> Any:
        """One buffer for all blocks, which stays in cache."""
        if self.scratch is None or len(self.scratch) < rows:
            self.scratch = np.empty((rows, self.width), self.ones.dtype)
        return self.scratch[:rows]


def add_row(xp: Any, x: Any, row: Any) -> Any:
    """x[i, j] + row[j], in place: several short rows of a contiguous matrix at a time."""
    width = len(row)
    if xp is np and 1 < width < LONG and x.size > SMALL and x.flags.c_contiguous:
        together = gcd(len(x), 1 << (1024 // width).bit_length())
        if together > 1:
            several = np.empty((together, width), row.dtype)
            several[...] = row
            long = x.reshape(-1, several.size)
            long += several.reshape(-1)
            return x
    x += row
    return x
