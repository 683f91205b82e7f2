"""Products of many rows with a small matrix, in pieces that BLAS multiplies where they lie.

OpenBLAS copies operands into an order of its own, except in products of up to 100^3 multiplications where it
has kernels for AVX-512 that read them in place (see runtime/panels.py). So 2048 x 64 by 64 x 64 takes 75
instead of 94 us in pieces of 128 rows, 2048 x 256 by 256 x 64 takes 304 instead of 340, and 64 x 2048 by
2048 x 64, a gradient by a weight, 91 instead of 108. Wider results gain nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meshtape.runtime.blas import blas_core
from meshtape.runtime.panels import CORES, MULTIPLICATIONS

MANY = 512              # rows from which on
WIDEST = 192            # columns of a result up to which pieces are faster
LEAST, MOST = 16, 128   # rows of a piece
TOGETHER = 16           # products of pieces that are added up at a time


def _height(xp: Any, dtype: Any, rows: int, depth: int, width: int) -> int:
    """Rows of a piece of a product (rows, depth) @ (depth, width); 0 where whole products are as fast, as
    they are where rows of the result lie a multiple of 512 bytes apart."""
    if xp is not np or dtype.char != "f" or rows < MANY or not 32 <= width <= WIDEST or depth < 32:
        return 0
    if width % 128 == 0:
        return 0
    height = MOST
    while height * depth * width > MULTIPLICATIONS:
        height //= 2
    return height if height >= LEAST and blas_core() in CORES else 0


def times(xp: Any, x: Any, matrix: Any, out: Any = None) -> Any:
    """x @ matrix."""
    rows, (depth, width) = len(x), matrix.shape
    height = _height(xp, x.dtype, rows, depth, width)
    if not height or not x.flags.c_contiguous:
        return xp.matmul(x, matrix, out=out)
    matrix = np.ascontiguousarray(matrix)
    if out is None:
        out = np.empty((rows, width), x.dtype)
    end = rows // height * height
    np.matmul(_cut(x[:end], height), matrix, out=_cut(out[:end], height))
    if end < rows:
        np.matmul(x[end:], matrix, out=out[end:])
    return out


def inner(xp: Any, x: Any, y: Any, out: Any = None) -> Any:
    """x.T @ y."""
    rows, width = x.shape
    height = _height(xp, x.dtype, rows, y.shape[1], width) if y.shape[1] <= WIDEST else 0
    if height < 64 or not x.flags.c_contiguous or not y.flags.c_contiguous:
        return xp.matmul(x.T, y, out=out)
    size = width * y.shape[1]
    total, end = np.zeros(size, x.dtype), rows // height * height
    products = np.empty((TOGETHER, width, y.shape[1]), x.dtype)
    ones = np.ones(TOGETHER, x.dtype)
    for at in range(0, end, TOGETHER * height):
        run = slice(at, min(end, at + TOGETHER * height))
        count = (run.stop - run.start) // height
        np.matmul(_cut(x[run], height).swapaxes(1, 2), _cut(y[run], height), out=products[:count])
        total += ones[:count] @ products[:count].reshape(count, size)
    total = total.reshape(products.shape[1:])
    return np.add(total, x[end:].T @ y[end:] if end < rows else 0, out=out)


def _cut(x: Any, height: int) -> Any:
    return x.reshape(len(x) // height, height, x.shape[1])
