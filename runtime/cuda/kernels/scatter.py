"""Sums by index on CUDA, in an order that is always the same: no atomic additions of floats.

Rows of values are sorted by the row of the result that they go to (runtime.cuda.kernels.sorting, stable), and
each segment of equal keys is summed in order. Segments may be of very different lengths, so blocks do not
take segments, but pieces of the sorted order: what lies wholly inside a piece goes to the result, the sums of
the segments that a piece shares with its neighbours to a buffer, and a second kernel adds those up.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels.arrays import compact
from meshtape.runtime.cuda.kernels.embedding import UNITS, WRAP, outer_inner, put_along, unit_of
from meshtape.runtime.cuda.kernels.sorting import sort_keys
from meshtape.runtime.cuda.source import ctype, source
from meshtape.runtime.op import DeviceKernel
from meshtape.runtime.shards import Shape

PIECE = 32              # sorted rows that are summed by one thread for each vector of columns
FEW = 8                 # indices in a line up to which every element of the result looks at all of them

KEYS = WRAP + r"""
// keys[i] = row * n + index, of m indices in every row; `shared` ones are the same for all rows.
extern "C" __global__ void __launch_bounds__(256) row_keys(const long long* indices, unsigned* keys,
                                                           unsigned count, unsigned m, long long n,
                                                           int shared) {
  for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) {
    const unsigned row = i / m;
    keys[i] = unsigned(row * n + wrapped(indices[shared ? i - row * m : i], n));
  }
}
"""

SUMS = f"#define PIECE {PIECE}\n" + r"""
typedef acc_t<T> A;
typedef Vec<T, EACH> Row;
typedef Vec<A, EACH> Total;

__device__ inline void put(T* out, unsigned key, long long skip, unsigned k, unsigned column,
                           const Total& sum) {
  if (key == skip) return;
  Row made;
#pragma unroll
  for (int e = 0; e < EACH; ++e) made[e] = T(sum[e]);
  store(out + key * (long long)k + column, made);
}

__device__ inline void keep(A* to, const Total& sum) {
#pragma unroll
  for (int e = 0; e < EACH; ++e) to[e] = sum[e];
}

// edges (pieces, 2, k): the sum of what a piece has of the segment that began before it, and of the one that
// goes on after it. Threads are (columns, pieces).
extern "C" __global__ void segment_sums(const T* values, const unsigned* keys, const unsigned* places,
                                        unsigned m, unsigned k, long long skip, T* out, A* edges) {
  const unsigned piece = blockIdx.x * blockDim.y + threadIdx.y;
  const unsigned begin = piece * PIECE, end = m - begin < PIECE ? m : begin + PIECE;
  if (begin >= m) return;
  for (unsigned column = (blockIdx.y * blockDim.x + threadIdx.x) * EACH; column < k;
       column += gridDim.y * blockDim.x * EACH) {
    unsigned key = keys[begin];
    bool began_before = begin > 0 && keys[begin - 1] == key;
    A* edge = edges + (long long)piece * 2 * k + column;
    Total sum = {};
    for (unsigned first = begin; first < end; first += 4) {
      Row given[4];
      unsigned here[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < end) {
          here[j] = keys[first + j];
          given[j] = load<EACH>(values + places[first + j] * (long long)k + column);
        }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + j >= end) continue;
        if (here[j] != key) {
          if (began_before) keep(edge, sum); else put(out, key, skip, k, column, sum);
          began_before = false, key = here[j], sum = {};
        }
#pragma unroll
        for (int e = 0; e < EACH; ++e) sum[e] += A(given[j][e]);
      }
    }
    if (began_before) keep(edge, sum);
    else if (end < m && keys[end] == key) keep(edge + k, sum);
    else put(out, key, skip, k, column, sum);
  }
}

// Add up the segments that go on after the piece they begin in.
extern "C" __global__ void join_sums(const unsigned* keys, unsigned m, unsigned k, long long skip, T* out,
                                     const A* edges) {
  const unsigned piece = blockIdx.x * blockDim.y + threadIdx.y;
  const unsigned begin = piece * PIECE, end = m - begin < PIECE ? m : begin + PIECE;
  if (begin >= m || end >= m) return;
  const unsigned key = keys[end - 1];
  if (keys[end] != key || (begin > 0 && keys[begin - 1] == key)) return;
  for (unsigned column = (blockIdx.y * blockDim.x + threadIdx.x) * EACH; column < k;
       column += gridDim.y * blockDim.x * EACH) {
    const A* edge = edges + (long long)piece * 2 * k + column;
    Total sum;
#pragma unroll
    for (int e = 0; e < EACH; ++e) sum[e] = edge[k + e];
    for (unsigned at = end; at < m && keys[at] == key; at += PIECE) {
      edge += 2 * k;
#pragma unroll
      for (int e = 0; e < EACH; ++e) sum[e] += edge[e];
    }
    put(out, key, skip, k, column, sum);
  }
}
"""

FEW_CODE = WRAP + r"""
// out (outer, n, width): every element is the sum of those of the m values of its line with its index.
extern "C" __global__ void __launch_bounds__(256) sums_of_few(const T* values, const long long* indices,
                                                              T* out, long long size, long long n,
                                                              int m, long long width) {
  for (long long at = blockIdx.x * 256ll + threadIdx.x; at < size; at += gridDim.x * 256ll) {
    const long long row = at / width, outer = row / n, first = outer * m * width + (at - row * width);
    acc_t<T> sum = 0;
    for (int j = 0; j < m; ++j)
      if (wrapped(indices[first + j * width], n) == row - outer * n)
        sum += acc_t<T>(values[first + j * width]);
    out[at] = T(sum);
  }
}
"""

PUT_CODE = r"""
// out[key] = the last of the rows with that key; rows of `width` units
extern "C" __global__ void __launch_bounds__(256) put_last(const U* values, const unsigned* keys,
                                                           const unsigned* places, U* out, long long m,
                                                           long long width) {
  for (long long at = blockIdx.x * 256ll + threadIdx.x; at < m * width; at += gridDim.x * 256ll) {
    const long long i = at / width, unit = at - i * width;
    if (i + 1 == m || keys[i + 1] != keys[i]) out[keys[i] * width + unit] = values[places[i] * width + unit];
  }
}
"""

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16",
          "uint32", "uint64")
ROW_KEYS = source("row_keys", KEYS, ("row_keys",))
SEGMENTS = source("segment_sums", SUMS, ("segment_sums", "join_sums"), (
    {"T": "float", "EACH": "4"}, {"T": "float", "EACH": "1"}, {"T": "bfloat16", "EACH": "8"},
    {"T": "float16", "EACH": "1"}, {"T": "double", "EACH": "2"}, {"T": "int64", "EACH": "1"}))
SUMS_OF_FEW = source("sums_of_few", FEW_CODE, ("sums_of_few",), tuple({"T": ctype(d)} for d in DTYPES[:4]))
PUT_LAST = source("put_last", PUT_CODE, ("put_last",), tuple({"U": name} for name in UNITS.values()))


# --- sums -------------------------------------------------------------------------------------------

def row_keys(dev: Any, indices: Any, rows: int, n: int) -> Any:
    """Keys (uint32) r * n + index of `rows` rows: of the same indices if there is one set of them."""
    m = indices.shape[-1]
    keys = dev.cp.empty(rows * m, dev.cp.uint32)
    if keys.size:
        shared = np.int32(indices.ndim == 1)
        dev.kernels(ROW_KEYS, "row_keys")((dev.kernels.blocks_for(keys.size, 256),), (256,), (
            compact(dev, indices), keys, np.uint32(keys.size), np.uint32(m), np.int64(n), shared))
    return keys


def sums_by_key(dev: Any, values: Any, keys: Any, n: int, skip: int = -1) -> Any:
    """(n, k): row r is the sum of the rows of `values` (m, k) whose key is r; row `skip` is 0. The sum of
    16-bit floats is rounded once.
    """
    cp, (m, k) = dev.cp, values.shape
    out = cp.zeros((n, k), values.dtype)
    if not m or not k:
        return out
    values = compact(dev, values)
    each = unit_of(k * values.itemsize, values, out) // values.itemsize
    keys, places = sort_keys(dev, keys, (n - 1).bit_length())
    pieces, columns = -(-m // PIECE), k // each
    wide = values.dtype if values.itemsize != 2 or values.dtype.kind in "iu" else cp.float32
    edges = cp.empty((pieces, 2, k), wide)
    width = min(columns, 128)
    height = 128 // width
    grid, block = (-(-pieces // height), min(-(-columns // width), 1024)), (width, height)
    macros = {"T": ctype(values.dtype), "EACH": each}
    size, depth, skipped = np.uint32(m), np.uint32(k), np.int64(skip)
    dev.kernels(SEGMENTS, "segment_sums", **macros)(
        grid, block, (values, keys, places, size, depth, skipped, out, edges))
    dev.kernels(SEGMENTS, "join_sums", **macros)(grid, block, (keys, size, depth, skipped, out, edges))
    return out


def fits(dtype: str, items: int, rows: int) -> bool:
    """Whether so many rows of values of a dtype can be sorted by so many keys."""
    return dtype in DTYPES and items < 2**31 and 0 < rows < 2**32


# --- kernels of rows --------------------------------------------------------------------------------

def _embedding_grad(dev: Any, g: Any, indices: Any, num_embeddings: int, padding_idx: int | None) -> Any:
    keys = row_keys(dev, indices.reshape(-1), 1, num_embeddings)
    skip = -1 if padding_idx is None else padding_idx % num_embeddings
    return sums_by_key(dev, g.reshape(keys.size, g.shape[-1]), keys, num_embeddings, skip)


EMBEDDING_GRAD = DeviceKernel(_embedding_grad, lambda shapes, given, attrs: fits(
    given[0].name, prod(shapes[1]), attrs["num_embeddings"]))


def _take_grad(dev: Any, g: Any, indices: Any, shape: Shape, axis: int) -> Any:
    outer, n, inner = outer_inner(shape, axis)
    keys = row_keys(dev, indices.reshape(-1), outer, n)
    return sums_by_key(dev, g.reshape(keys.size, inner), keys, outer * n).reshape(shape)


def _takes(shapes: Any, given: Any, attrs: dict[str, Any]) -> bool:
    outer, n, _ = outer_inner(attrs["shape"], attrs["axis"])
    return fits(given[0].name, outer * prod(shapes[1]), outer * n)


TAKE_GRAD = DeviceKernel(_take_grad, _takes)


def _along_grad(dev: Any, g: Any, indices: Any, extent: int, axis: int, unique: bool) -> Any:
    d = axis % g.ndim
    if unique:
        return put_along(dev, g, indices, extent, d)
    if g.shape[d] <= FEW:
        return _sums_of_few(dev, g, indices, extent, d)
    last, values = (dev.cp.moveaxis(a, d, -1) for a in (indices, g))
    *rest, n = last.shape
    keys = row_keys(dev, compact(dev, last).reshape(prod(rest), n), prod(rest), extent)
    out = sums_by_key(dev, compact(dev, values).reshape(keys.size, 1), keys, prod(rest) * extent)
    return dev.cp.moveaxis(out.reshape(*rest, extent), -1, d)


def _sums_of_few(dev: Any, g: Any, indices: Any, extent: int, d: int) -> Any:
    out = dev.cp.empty((*g.shape[:d], extent, *g.shape[d + 1:]), g.dtype)
    if out.size:
        _, m, width = outer_inner(g.shape, d)
        kernel = dev.kernels(SUMS_OF_FEW, "sums_of_few", T=ctype(g.dtype))
        kernel((dev.kernels.blocks_for(out.size, 256),), (256,), (
            compact(dev, g), compact(dev, indices), out, np.int64(out.size), np.int64(extent), np.int32(m),
            np.int64(width)))
    return out


ALONG_GRAD = DeviceKernel(_along_grad, lambda shapes, given, attrs: fits(
    given[0].name, prod(shapes[0]), attrs["extent"] * prod(shapes[0]) // max(1, shapes[0][attrs["axis"]])))


class Places:
    """Where the selection by index arrays lies in a tensor, as the plain kernels go about it: the tensor as
    (n, inner), with the indexed dimensions in front.
    """

    def __init__(self, dev: Any, shape: Shape, indices: Sequence[Any], dims: Sequence[int], at: int) -> None:
        self.dev, self.shape, self.at = dev, shape, at
        rest = [d for d in range(len(shape)) if d not in dims]
        self.order = [*dims, *rest]
        self.n, self.inner = prod(shape[d] for d in dims), prod(shape[d] for d in rest)
        flat: Any = 0
        for d, i in zip(dims, indices, strict=True):
            flat = flat * shape[d] + i % shape[d]
        self.ndim = flat.ndim
        self.selected = (*(shape[d] for d in rest[:at]), *flat.shape, *(shape[d] for d in rest[at:]))
        self.keys = flat.astype(dev.cp.uint32).reshape(-1)

    def rows(self, values: Any) -> Any:
        """Values in the shape of the selection as (indices, inner)."""
        ends = tuple(range(self.ndim))
        turned = self.dev.cp.moveaxis(values, tuple(self.at + d for d in ends), ends)
        return compact(self.dev, turned).reshape(self.keys.size, self.inner)

    def back(self, found: Any) -> Any:
        """(n, inner) in the tensor's shape."""
        turned = found.reshape([self.shape[d] for d in self.order])
        return turned.transpose([self.order.index(d) for d in range(len(self.shape))])


def _index_grad(dev: Any, g: Any, *indices: Any, shape: Shape, dims: tuple[int, ...], at: int) -> Any:
    places = Places(dev, shape, indices, dims, at)
    return places.back(sums_by_key(dev, places.rows(g), places.keys, places.n))


def _indexes(shape: Shape, shapes: Any, given: Any, dims: tuple[int, ...]) -> bool:
    items = prod(np.broadcast_shapes(*shapes))
    return fits(given.name, items, prod(shape[d] for d in dims))


INDEX_GRAD = DeviceKernel(_index_grad, lambda shapes, given, attrs: _indexes(
    attrs["shape"], shapes[1:], given[0], attrs["dims"]))


def _spread(dev: Any, value: Any, dtype: Any, shape: Shape) -> Any:
    """An array or a number in a dtype, broadcast."""
    given = value.astype(dtype, copy=False) if hasattr(value, "dtype") else dev.cp.full((), value, dtype)
    return dev.cp.broadcast_to(given, shape)


def _index_add(dev: Any, x: Any, value: Any, *indices: Any, dims: tuple[int, ...], at: int) -> Any:
    places = Places(dev, x.shape, indices, dims, at)
    values = places.rows(_spread(dev, value, x.dtype, places.selected))
    return x + places.back(sums_by_key(dev, values, places.keys, places.n))


INDEX_ADD = DeviceKernel(_index_add, lambda shapes, given, attrs: _indexes(
    shapes[0], shapes[2:], given[0], attrs["dims"]))


def _index_update(dev: Any, x: Any, value: Any, *indices: Any, dims: tuple[int, ...], at: int) -> Any:
    """Of two values for one place the last wins, which CuPy's indexing leaves open."""
    places = Places(dev, x.shape, indices, dims, at)
    out = dev.cp.array(x.transpose(places.order), order="C").reshape(places.n, places.inner)
    values = places.rows(_spread(dev, value, x.dtype, places.selected))
    if values.size:
        keys, order = sort_keys(dev, places.keys, (places.n - 1).bit_length())
        unit = unit_of(places.inner * x.itemsize, values, out)
        width = places.inner * x.itemsize // unit
        dev.kernels(PUT_LAST, "put_last", U=UNITS[unit])(
            (dev.kernels.blocks_for(keys.size * width, 256),), (256,),
            (values, keys, order, out, np.int64(keys.size), np.int64(width)))
    return places.back(out)


# One number for all places is the same whichever wins.
INDEX_UPDATE = DeviceKernel(_index_update, lambda shapes, given, attrs: bool(shapes[1]) and fits(
    DTYPES[0], prod(np.broadcast_shapes(*shapes[2:])), prod(shapes[0][d] for d in attrs["dims"])))
