"""Layer normalization forward and backward, with and without weight and bias.

Rows of up to 16384 (backward: 8192) are read once; the variance is that around the mean found before. A block
adds up its share of the gradients of weight and bias in registers; a second launch adds up blocks, in order.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels.columns import column_sums
from meshtape.runtime.cuda.kernels.rows import (
    LAST,
    ROWS,
    as_rows,
    equal_floats,
    floating,
    plan,
    short,
    variants,
    wide,
)
from meshtape.runtime.cuda.source import ctype, source
from meshtape.runtime.op import DeviceKernel

HELD = 16               # elements of a row that a thread keeps
GRADIENT_THREADS = 512  # of a block, at most: they keep five times as many numbers
RESIDENT = 512          # threads of a multiprocessor that are enough to keep its memory busy
LONG_THREADS = 256      # columns of a block that sums over rows which are not held



def mixtures(found: tuple[dict[str, str], ...],
             *mixed: tuple[str, dict[str, str]]) -> tuple[dict[str, str], ...]:
    """Variants whose types are all T, and for each (T, types) one where they are not."""
    same = {"G": "T", "W": "T", "O": "T"}
    return (*({**macros, **same} for macros in found),
            *({**found[0], **same, "T": t, "AFFINE": "1", **types} for t, types in mixed))


# W and O are the types of weight and bias, and of the result.
NORM = source("layer_norm", ROWS + r'''
extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm(const T* x, const W* weight, const W* bias, O* out, A* means, A* rstds, index_t rows, int width,
           A eps) {
  __shared__ A room[ROOM];
  each_row(rows, [&](index_t row, bool there) {
    const T* from = x + row * width;
    A sum = 0, squares = 0;
#if HELD
    A h[PER][V];
#endif
    if (there) vectors(width, [&](int k, int c) {
      const auto v = read(from + c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum += to_acc(v[i]);
#if HELD
        h[k][i] = to_acc(v[i]);
#endif
      }
    });
    const A mean = over_group(sum, room, A(0), Sum()) / width;
    if (there) vectors(width, [&](int k, int c) {
#if !HELD
      const auto v = read(from + c);
#endif
#pragma unroll
      for (int i = 0; i < V; ++i) {
#if HELD
        const A d = h[k][i] -= mean;
#else
        const A d = to_acc(v[i]) - mean;
#endif
        squares += d * d;
      }
    });
    const A rstd = 1 / sqrt(over_group(squares, room, A(0), Sum()) / width + eps);
    if (!there) return;
    vectors(width, [&](int k, int c) {
      Vec<O, V> y;
#if !HELD
      const auto v = read(from + c);
#endif
#if AFFINE
      const auto w = read(weight + c), b = read(bias + c);
#endif
#pragma unroll
      for (int i = 0; i < V; ++i) {
#if HELD
        A value = h[k][i] * rstd;
#else
        A value = (to_acc(v[i]) - mean) * rstd;
#endif
#if AFFINE
        value = value * to_acc(w[i]) + to_acc(b[i]);
#endif
        y[i] = O(value);
      }
      write(out + row * width + c, y);
    });
    if (lane_of_group() == 0) means[row] = mean, rstds[row] = rstd;
  });
}
''', ("layer_norm",), mixtures(
    variants(HELD, {"AFFINE": "1"}, {"AFFINE": "0"}), ("float", {"W": "float", "O": "bfloat16"}),
    ("bfloat16", {"W": "float", "O": "bfloat16"}), ("float16", {"W": "float", "O": "float"})))

# G, W and O are the types of the upstream gradient, of the weight and of the result.
# partial: (blocks, 2, width), each block's gradients of weight and bias; only of rows that are HELD.
GRADIENT = source("layer_norm_grad", ROWS + r'''
extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm_grad(const G* g, const T* x, const A* means, const A* rstds, const W* weight, O* dx, A* partial,
                index_t rows, int width) {
  __shared__ A room[2 * ROOM];
#if HELD
  A u[PER][V], h[PER][V];
#if AFFINE
  A dweight[PER][V], dbias[PER][V], w[PER][V];
  vectors(width, [&](int k, int c) {
    const auto v = read(weight + c);
#pragma unroll
    for (int i = 0; i < V; ++i) w[k][i] = to_acc(v[i]), dweight[k][i] = dbias[k][i] = 0;
  });
#endif
#endif
  each_row(rows, [&](index_t row, bool there) {
    const A mean = there ? means[row] : A(0), rstd = there ? rstds[row] : A(0);
    A sums[2] = {0, 0};
    if (there) vectors(width, [&](int k, int c) {
      const auto gv = read(g + row * width + c);
      const auto xv = read(x + row * width + c);
#if AFFINE && !HELD
      const auto wv = read(weight + c);
#endif
#pragma unroll
      for (int i = 0; i < V; ++i) {
        A a = to_acc(gv[i]);
        const A hat = (to_acc(xv[i]) - mean) * rstd;
#if HELD && AFFINE
        dweight[k][i] += a * hat, dbias[k][i] += a;
        a *= w[k][i];
#elif AFFINE
        a *= to_acc(wv[i]);
#endif
#if HELD
        u[k][i] = a, h[k][i] = hat;
#endif
        sums[0] += a, sums[1] += a * hat;
      }
    });
    over_group(sums, room, A(0), Sum());
    if (!there) return;
    const A of_g = sums[0] / width, of_gh = sums[1] / width;
    vectors(width, [&](int k, int c) {
      Vec<O, V> d;
#if !HELD
      const auto gv = read(g + row * width + c);
      const auto xv = read(x + row * width + c);
#if AFFINE
      const auto wv = read(weight + c);
#endif
#endif
#pragma unroll
      for (int i = 0; i < V; ++i) {
#if HELD
        const A a = u[k][i], hat = h[k][i];
#else
        const A hat = (to_acc(xv[i]) - mean) * rstd;
#if AFFINE
        const A a = to_acc(gv[i]) * to_acc(wv[i]);
#else
        const A a = to_acc(gv[i]);
#endif
#endif
        d[i] = O(rstd * (a - of_g - hat * of_gh));
      }
      write(dx + row * width + c, d);
    });
  });
#if HELD && AFFINE
  A* to = partial + 2 * (index_t)blockIdx.x * width;
  constexpr int WIDE = GROUP * PER * V;
  __shared__ A kept[AT_ONCE > 1 ? AT_ONCE * WIDE : 1];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    if (AT_ONCE == 1) {
      vectors(width, [&](int k, int c) {
#pragma unroll
        for (int i = 0; i < V; ++i) to[which * width + c + i] = which ? dbias[k][i] : dweight[k][i];
      });
    } else {
      __syncthreads();
      vectors(width, [&](int k, int c) {
#pragma unroll
        for (int i = 0; i < V; ++i)
          kept[threadIdx.x / GROUP * WIDE + c + i] = which ? dbias[k][i] : dweight[k][i];
      });
      __syncthreads();
      for (int c = threadIdx.x; c < width; c += THREADS) {
        A sum = 0;
        for (int group = 0; group < AT_ONCE; ++group) sum += kept[group * WIDE + c];
        to[which * width + c] = sum;
      }
    }
  }
#endif
}
''', ("layer_norm_grad",), mixtures(
    tuple({**macros, "AFFINE": affine} for affine in "01"
          for macros in variants(HELD, most_threads=GRADIENT_THREADS)),
    ("float", {"G": "bfloat16", "W": "float", "O": "float"}),
    ("bfloat16", {"G": "float", "W": "float", "O": "bfloat16"})))

# partial: (parts, 2, width), for rows too long to be held: part p has the rows p, p + parts, ...
AFFINE_GRADIENT = source("layer_norm_affine_grad", r'''
extern "C" __global__ void __launch_bounds__(256)
layer_norm_affine_grad(const G* g, const T* x, const acc_t<T>* means, const acc_t<T>* rstds,
                       acc_t<T>* partial, index_t rows, int width) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= width) return;
  acc_t<T> dweight = 0, dbias = 0;
  for (index_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const acc_t<T> a = to_acc(g[row * width + c]);
    dweight += a * ((to_acc(x[row * width + c]) - means[row]) * rstds[row]), dbias += a;
  }
  partial[2 * (index_t)blockIdx.y * width + c] = dweight;
  partial[(2 * (index_t)blockIdx.y + 1) * width + c] = dbias;
}
''', ("layer_norm_affine_grad",), tuple(
    {"T": t, "G": g} for t, g in (("float", "float"), ("double", "double"), ("float16", "float16"),
                                  ("bfloat16", "bfloat16"), ("float", "bfloat16"))))


def _normalized(dev: Any, x: Any, affine: Any, ndim: int, eps: float, dtype: Any) -> Any:
    rows = as_rows(dev, x, ndim)
    count, width = rows.shape
    acc = wide(x.dtype)
    out = dev.cp.empty(rows.shape, dtype)
    means, rstds = (dev.cp.empty(count, acc) for _ in range(2))
    weight, bias = affine
    how = plan(width, x.dtype, [a for a in (rows, out, weight, bias) if a is not None], HELD)
    kernel = dev.kernels(NORM, "layer_norm", **how.macros, AFFINE=int(weight is not None),
                         W=ctype(x.dtype if weight is None else weight.dtype), O=ctype(dtype))
    kernel((min(LAST, -(-count // how.at_once)),), (how.threads,),
           (rows, weight, bias, out, means, rstds, np.int64(count), np.int32(width), acc.type(eps)))
    shape = x.shape[:x.ndim - ndim] + (1,) * ndim
    return out.reshape(x.shape), means.reshape(shape), rstds.reshape(shape)


def _layer_norm(dev: Any, x: Any, weight: Any, bias: Any, ndim: int, eps: float,
                result_dtypes: Any = None) -> Any:
    dtype = x.dtype if result_dtypes is None else result_dtypes[0]
    return _normalized(dev, x, [dev.cp.ascontiguousarray(a) for a in (weight, bias)], ndim, eps, dtype)


def _normalize(dev: Any, x: Any, ndim: int, eps: float) -> Any:
    return _normalized(dev, x, (None, None), ndim, eps, x.dtype)


def _gradient(dev: Any, g: Any, x: Any, means: Any, rstds: Any, weight: Any, ndim: int, dtype: Any) -> Any:
    """(dx, gradients of weight and bias as (2, width), or None without weight)."""
    cp, upstream, rows = dev.cp, as_rows(dev, g, ndim), as_rows(dev, x, ndim)
    means, rstds = cp.ascontiguousarray(means), cp.ascontiguousarray(rstds)
    count, width = rows.shape
    acc, affine = wide(x.dtype), weight is not None
    dx = cp.empty(rows.shape, dtype)
    how = plan(width, x.dtype, [a for a in (upstream, rows, dx, weight) if a is not None], HELD,
               GRADIENT_THREADS)
    blocks, partial = min(LAST, -(-count // how.at_once)), None
    if affine and how.macros["HELD"]:
        blocks = dev.kernels.blocks_for(count, how.at_once, max(1, RESIDENT // how.threads))
        partial = cp.empty((blocks, 2 * width), acc)
    kernel = dev.kernels(GRADIENT, "layer_norm_grad", **how.macros, AFFINE=int(affine), G=ctype(g.dtype),
                         W=ctype(weight.dtype if affine else x.dtype), O=ctype(dtype))
    kernel((blocks,), (how.threads,),
           (upstream, rows, means, rstds, weight, dx, partial, np.int64(count), np.int32(width)))
    if not affine:
        return dx.reshape(x.shape), None
    if partial is None:
        columns = -(-width // LONG_THREADS)
        parts = min(count, max(1, 4 * dev.kernels.multiprocessors // columns))
        partial = cp.empty((parts, 2 * width), acc)
        dev.kernels(AFFINE_GRADIENT, "layer_norm_affine_grad", T=ctype(x.dtype), G=ctype(g.dtype))(
            (columns, parts), (LONG_THREADS,),
            (upstream, rows, means, rstds, partial, np.int64(count), np.int32(width)))
    return dx.reshape(x.shape), column_sums(dev, partial, weight.dtype)


def _layer_norm_grad(dev: Any, g: Any, x: Any, mean_: Any, rstd: Any, weight: Any, ndim: int,
                     result_dtypes: Any = None) -> Any:
    dtype = x.dtype if result_dtypes is None else result_dtypes[0]
    dx, both = _gradient(dev, g, x, mean_, rstd, dev.cp.ascontiguousarray(weight), ndim, dtype)
    dweight, dbias = both.reshape(2, *weight.shape)
    return dx, dweight, dbias


def _normalize_grad(dev: Any, g: Any, x: Any, mean_: Any, rstd: Any, ndim: int) -> Any:
    return _gradient(dev, g, x, mean_, rstd, None, ndim, x.dtype)[0]


def _fits(shape: Any, attrs: Any) -> bool:
    return bool(prod(shape) > 0 and prod(shape[len(shape) - attrs["ndim"]:]) < 1 << 30)


def _forward_fits(shapes: Any, given: Any, attrs: Any) -> bool:
    return equal_floats(shapes, given) and _fits(shapes[0], attrs)


def _backward_fits(shapes: Any, given: Any, attrs: Any) -> bool:
    """Gradient, input and weight of one dtype, statistics of that of its sums."""
    rest = (*given[:2], *given[4:])
    return (equal_floats(shapes, rest) and floating(*given[2:4])
            and all(d.name == wide(given[0]).name for d in given[2:4]) and _fits(shapes[1], attrs))


def _forward_mixes(given: Any, results: Any) -> bool:
    x, weight, bias = given
    return short(x, weight, bias, *results) and weight == bias and all(r.itemsize == 4 for r in results[1:])


def _backward_mixes(given: Any, results: Any) -> bool:
    _, _, mean_, rstd, weight = given
    return (short(*given, *results) and mean_.itemsize == rstd.itemsize == 4
            and results[1] == results[2] == weight)


layer_norm = DeviceKernel(_layer_norm, _forward_fits, mixes=_forward_mixes)
normalize = DeviceKernel(_normalize, _forward_fits)
layer_norm_grad = DeviceKernel(_layer_norm_grad, _backward_fits, mixes=_backward_mixes)
normalize_grad = DeviceKernel(_normalize_grad, _backward_fits)
