"""Sums of the columns of a matrix, in an order that depends on its shape alone; many blocks if it is long."""

from __future__ import annotations

from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels.rows import wide
from meshtape.runtime.cuda.source import ctype, source

ACROSS, DOWN = 32, 16       # columns and rows of a block of threads
ROWS_EACH = 32              # rows that are worth a thread of their own

# x: (rows, width), out: (parts, width); part p has the rows p * share, ..., (p + 1) * share - 1.
COLUMN_SUMS = source("column_sums", r'''
typedef acc_t<T> A;
constexpr int ACROSS = 32, DOWN = 16;
extern "C" __global__ void __launch_bounds__(512)
column_sums(const T* x, OUT* out, index_t rows, index_t width, index_t share) {
  __shared__ A kept[DOWN][ACROSS + 1];
  const int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS;
  const index_t c = (index_t)blockIdx.x * ACROSS + across;
  const index_t first = blockIdx.y * share, end = min(rows, first + share);
  A sums[4] = {0, 0, 0, 0};
  if (c < width) {
    index_t row = first + down;
    for (; row + 3 * DOWN < end; row += 4 * DOWN)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] += to_acc(x[(row + k * DOWN) * width + c]);
    for (; row < end; row += DOWN) sums[0] += to_acc(x[row * width + c]);
  }
  kept[down][across] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  __syncthreads();
  if (down == 0 && c < width) {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < DOWN; ++k) sum += kept[k][across];
    out[blockIdx.y * width + c] = OUT(sum);
  }
}
''', ("column_sums",), ({"T": "float", "OUT": "float"}, {"T": "double", "OUT": "double"},
                        {"T": "float16", "OUT": "float"}, {"T": "float", "OUT": "bfloat16"}))

PARTS = 256                 # blocks of threads for every column, at most


def column_sums(dev: Any, x: Any, dtype: Any) -> Any:
    """Sums over the rows of a contiguous (rows, width) of a floating dtype: (width,) of `dtype`."""
    rows, width = x.shape
    columns = -(-width // ACROSS)
    parts = min(PARTS, -(-rows // (DOWN * ROWS_EACH)), max(1, 2048 // columns))
    if parts == 1:
        return _sums(dev, x, dtype, columns, 1)[0]
    return _sums(dev, _sums(dev, x, wide(x.dtype), columns, parts), dtype, columns, 1)[0]


def _sums(dev: Any, x: Any, dtype: Any, columns: int, parts: int) -> Any:
    rows, width = x.shape
    out = dev.cp.empty((parts, width), dtype)
    kernel = dev.kernels(COLUMN_SUMS, "column_sums", T=ctype(x.dtype), OUT=ctype(dtype))
    kernel((columns, parts), (ACROSS * DOWN,),
           (x, out, np.int64(rows), np.int64(width), np.int64(-(-rows // parts))))
    return out
