"""Rows and elements picked by integers on CUDA: copies of 1 to 16 bytes at a time, whatever the dtype.

Indices outside of [-n, n) wrap around, as in CuPy: looking at them would stop the stream.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels.arrays import compact
from meshtape.runtime.cuda.source import source
from meshtape.runtime.op import DeviceKernel
from meshtape.runtime.shards import Shape

INTS = 2**31
STEP = 2**22            # more than a grid's threads: how far a loop may count beyond its end
UNITS = {1: "uint8", 2: "uint16", 4: "unsigned", 8: "uint64", 16: "uint4"}

WRAP = r"""
__device__ inline long long wrapped(long long i, long long n) {
  if (i < 0) i += n;
  if (i >= 0 && i < n) return i;
  i %= n;
  return i < 0 ? i + n : i;
}
"""

CODE = WRAP + r"""
// out (outer, m, width) = x (outer, n, width)[:, indices]
extern "C" __global__ void __launch_bounds__(256) take_rows(const U* x, const long long* indices, U* out,
                                                            index_t size, index_t n, index_t m,
                                                            index_t width) {
  const index_t step = (index_t)gridDim.x * 256;
  for (index_t at = (index_t)blockIdx.x * 256 + threadIdx.x; at < size; at += step) {
    const index_t row = at / width, outer = row / m;
    out[at] = x[(outer * n + (index_t)wrapped(indices[row - outer * m], n)) * width + (at - row * width)];
  }
}

// out (outer, m, width) = x (outer, n, width) at indices (outer, m, width) of the middle dimension
extern "C" __global__ void __launch_bounds__(256) take_elements(const U* x, const long long* indices, U* out,
                                                                index_t size, index_t n, index_t m,
                                                                index_t width) {
  const index_t step = (index_t)gridDim.x * 256;
  for (index_t at = (index_t)blockIdx.x * 256 + threadIdx.x; at < size; at += step) {
    const index_t outer = at / (m * width);
    out[at] = x[(outer * n + (index_t)wrapped(indices[at], n)) * width + at % width];
  }
}

// The reverse, for indices of which none occurs twice in a line: out (outer, n, width) at indices = x
extern "C" __global__ void __launch_bounds__(256) put_elements(const U* x, const long long* indices, U* out,
                                                               index_t size, index_t n, index_t m,
                                                               index_t width) {
  const index_t step = (index_t)gridDim.x * 256;
  for (index_t at = (index_t)blockIdx.x * 256 + threadIdx.x; at < size; at += step) {
    const index_t outer = at / (m * width);
    out[(outer * n + (index_t)wrapped(indices[at], n)) * width + at % width] = x[at];
  }
}
"""

TAKE = source("take", CODE, ("take_rows", "take_elements", "put_elements"),
              ({"U": "uint8", "index_t": "int"}, {"U": "uint16"}, {"U": "unsigned", "index_t": "int"},
               {"U": "uint64"}, {"U": "uint4", "index_t": "int"}, {"U": "uint4"}))


def _launch(dev: Any, name: str, unit: int, x: Any, indices: Any, out: Any, sizes: tuple[int, ...]) -> None:
    """One of the kernels; `sizes` are the loop's, n, m and width, in units of so many bytes."""
    size = sizes[0]
    small = max(size, x.nbytes // unit, out.nbytes // unit) + STEP < INTS
    integer = np.int32 if small else np.int64
    kernel = dev.kernels(TAKE, name, U=UNITS[unit], index_t="int" if small else "int64")
    kernel((dev.kernels.blocks_for(size, 256),), (256,), (x, indices, out, *map(integer, sizes)))


def unit_of(row: int, *arrays: Any) -> int:
    """The most bytes, up to 16, that divide a row of so many bytes and the arrays' addresses."""
    common = np.gcd.reduce([row, 16, *(a.data.ptr for a in arrays)])
    return int(common)


def outer_inner(shape: Shape, axis: int) -> tuple[int, int, int]:
    """Elements before, along and after a dimension."""
    d = axis % len(shape)
    return prod(shape[:d]), shape[d], prod(shape[d + 1:])


# --- kernels of rows --------------------------------------------------------------------------------

def take(dev: Any, x: Any, indices: Any, axis: int) -> Any:
    """As numpy.take."""
    d = axis % x.ndim
    shape = (*x.shape[:d], *indices.shape, *x.shape[d + 1:])
    if not x.flags.c_contiguous:
        return dev.cp.take(x, indices, axis=d)
    out, indices = dev.cp.empty(shape, x.dtype), compact(dev, indices)
    if out.size:
        outer, n, inner = outer_inner(x.shape, d)
        unit = unit_of(inner * x.itemsize, x, out)
        width = inner * x.itemsize // unit
        m = indices.size
        _launch(dev, "take_rows", unit, x, indices, out, (outer * m * width, n, m, width))
    return out


def _elements(dev: Any, name: str, x: Any, indices: Any, axis: int, out: Any, n: int) -> Any:
    if indices.size:
        _, m, inner = outer_inner(indices.shape, axis)
        _launch(dev, name, x.itemsize, compact(dev, x), compact(dev, indices), out,
                (indices.size, n, m, inner))
    return out


def _take_along(dev: Any, x: Any, indices: Any, axis: int, unique: bool) -> Any:
    out = dev.cp.empty(indices.shape, x.dtype)
    return _elements(dev, "take_elements", x, indices, axis, out, x.shape[axis])


def put_along(dev: Any, x: Any, indices: Any, extent: int, axis: int) -> Any:
    """Zeros of `extent` elements along an axis, with x at the indices; no two of these are equal."""
    d = axis % x.ndim
    out = dev.cp.zeros((*x.shape[:d], extent, *x.shape[d + 1:]), x.dtype)
    return _elements(dev, "put_elements", x, indices, d, out, extent)


EMBEDDING = DeviceKernel(
    lambda dev, weight, indices, padding_idx: take(dev, weight, indices, 0),
    lambda shapes, given, attrs: shapes[0][0] > 0)
TAKE_ROW = DeviceKernel(take, lambda shapes, given, attrs: shapes[0][attrs["axis"]] > 0)
TAKE_ALONG = DeviceKernel(_take_along, lambda shapes, given, attrs: shapes[0][attrs["axis"]] > 0)
