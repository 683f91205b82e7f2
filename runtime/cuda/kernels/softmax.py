"""Softmax and log-softmax along one dimension, and their derivatives: one pass over rows of up to 32768.

Longer rows are read twice: the maximum and the sum of a row are taken together, the sum rescaled whenever the
maximum grows (Milakov, Gimelshein 2018, arXiv:1805.02867).
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels.rows import LAST, ROWS, as_rows, equal_floats, plan, variants
from meshtape.runtime.cuda.source import Source, source
from meshtape.runtime.op import DeviceKernel, normalize_axes

HELD = 32           # elements of a row that a thread keeps

# The maximum of a row and the sum of exp(x - maximum), with which softmax and cross-entropy begin.
STATISTICS = r'''
struct Statistics { A top, total; };

// Values of a row that is HELD: -inf where there is no element.
__device__ __forceinline__ void read_row(const T* p, int width, bool there, A (&x)[PER][V]) {
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    if (there && column(k) < width) {
      const auto v = read(p + column(k));
#pragma unroll
      for (int i = 0; i < V; ++i) x[k][i] = to_acc(v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) x[k][i] = -infinity<A>();
    }
  }
}

// Puts exp(x - top) in place of x.
__device__ __forceinline__ Statistics exponentials(A (&x)[PER][V], A* room) {
  A top = -infinity<A>();
#pragma unroll
  for (int k = 0; k < PER; ++k)
#pragma unroll
    for (int i = 0; i < V; ++i) top = maximum(top, x[k][i]);
  top = over_group(top, room, -infinity<A>(), Max());
  A total = 0;
#pragma unroll
  for (int k = 0; k < PER; ++k)
#pragma unroll
    for (int i = 0; i < V; ++i) total += x[k][i] = exp(x[k][i] - top);
  return {top, over_group(total, room, A(0), Sum())};
}

// Of a row that is not HELD.
__device__ __forceinline__ Statistics statistics(const T* p, int width, A* room) {
  A top = -infinity<A>(), total = 0;
  for (int c = column(0); c < width; c += GROUP * V) {
    const auto v = read(p + c);
    A here = top;
#pragma unroll
    for (int i = 0; i < V; ++i) here = maximum(here, to_acc(v[i]));
    if (here == -infinity<A>()) continue;               // no number yet
    total *= exp(top - here);
#pragma unroll
    for (int i = 0; i < V; ++i) total += exp(to_acc(v[i]) - here);
    top = here;
  }
  const A highest = over_group(top, room, -infinity<A>(), Max());
  total = top == -infinity<A>() ? A(0) : total * exp(top - highest);
  return {highest, over_group(total, room, A(0), Sum())};
}
'''

SOFTMAX = source("softmax", ROWS + STATISTICS + r'''
extern "C" __global__ void __launch_bounds__(THREADS) softmax(const T* x, T* out, index_t rows, int width) {
  __shared__ A room[ROOM];
  each_row(rows, [&](index_t row, bool there) {
    const T* from = x + row * width;
    T* to = out + row * width;
#if HELD
    A e[PER][V];
    read_row(from, width, there, e);
#if LOG
    A kept[PER][V];
#pragma unroll
    for (int k = 0; k < PER; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) kept[k][i] = e[k][i];
#endif
    const Statistics s = exponentials(e, room);
#else
    const Statistics s = statistics(from, width, room);
#endif
    const A scale = LOG ? log(s.total) : 1 / s.total;
    if (!there) return;
    vectors(width, [&](int k, int c) {
      Vec<T, V> y;
#if !HELD
      const auto v = read(from + c);
#endif
#pragma unroll
      for (int i = 0; i < V; ++i) {
#if HELD && LOG
        y[i] = T(kept[k][i] - s.top - scale);
#elif HELD
        y[i] = T(e[k][i] * scale);
#elif LOG
        y[i] = T(to_acc(v[i]) - s.top - scale);
#else
        y[i] = T(exp(to_acc(v[i]) - s.top) * scale);
#endif
      }
      write(to + c, y);
    });
  });
}
''', ("softmax",), variants(HELD, {"LOG": "0"}, {"LOG": "0"}, {"LOG": "0"}, {"LOG": "0"})
   + variants(HELD // 2, {"LOG": "1"}, {"LOG": "1"}, {"LOG": "1"}, {"LOG": "1"}))

# y * (g - sum(g * y)), or g - exp(y) * sum(g) of log-softmax.
GRADIENT = source("softmax_grad", ROWS + r'''
extern "C" __global__ void __launch_bounds__(THREADS)
softmax_grad(const T* g, const T* y, T* out, index_t rows, int width) {
  __shared__ A room[ROOM];
  each_row(rows, [&](index_t row, bool there) {
    const T *gs = g + row * width, *ys = y + row * width;
    T* to = out + row * width;
    A total = 0;
#if HELD
    A u[PER][V], p[PER][V];
#endif
    if (there) vectors(width, [&](int k, int c) {
      const auto gv = read(gs + c);
#if HELD || !LOG
      const auto yv = read(ys + c);
#endif
#pragma unroll
      for (int i = 0; i < V; ++i) {
#if HELD
        u[k][i] = to_acc(gv[i]), p[k][i] = to_acc(yv[i]);
#endif
#if LOG
        total += to_acc(gv[i]);
#else
        total += to_acc(gv[i]) * to_acc(yv[i]);
#endif
      }
    });
    total = over_group(total, room, A(0), Sum());
    if (!there) return;
    vectors(width, [&](int k, int c) {
      Vec<T, V> d;
#if !HELD
      const auto gv = read(gs + c), yv = read(ys + c);
#endif
#pragma unroll
      for (int i = 0; i < V; ++i) {
#if HELD
        const A a = u[k][i], b = p[k][i];
#else
        const A a = to_acc(gv[i]), b = to_acc(yv[i]);
#endif
        d[i] = T(LOG ? a - exp(b) * total : b * (a - total));
      }
      write(to + c, d);
    });
  });
}
''', ("softmax_grad",), variants(HELD // 2, {"LOG": "0"}, {"LOG": "1"}, {"LOG": "0"}, {"LOG": "1"})
   + variants(HELD // 2, {"LOG": "1"}, {"LOG": "0"}, {"LOG": "1"}, {"LOG": "0"}))


def _along(given: Source, function: str, log: int, held: int) -> DeviceKernel:
    """A kernel over any axis of equal arrays."""
    def run(dev: Any, *arrays: Any, axis: int) -> Any:
        turned = [a if a.ndim < 2 else a.swapaxes(axis, -1) for a in arrays]
        rows = [as_rows(dev, a, min(1, a.ndim)) for a in turned]
        out = dev.cp.empty(rows[0].shape, rows[0].dtype)
        if out.size:
            count, width = out.shape
            how = plan(width, out.dtype, (*rows, out), held)
            kernel = dev.kernels(given, function, **how.macros, LOG=log)
            kernel((min(LAST, -(-count // how.at_once)),), (how.threads,),
                   (*rows, out, np.int64(count), np.int32(width)))
        out = out.reshape(turned[0].shape)
        return out if out.ndim < 2 else out.swapaxes(axis, -1)

    return DeviceKernel(run, _fits)


def _fits(shapes: Any, given: Any, attrs: Any) -> bool:
    shape = shapes[0]
    return equal_floats(shapes, given) and (not shape or shape[attrs["axis"]] < 1 << 30)


LOGSUMEXP = source("logsumexp", ROWS + STATISTICS + r'''
extern "C" __global__ void __launch_bounds__(THREADS) logsumexp(const T* x, T* out, index_t rows, int width) {
  __shared__ A room[ROOM];
  each_row(rows, [&](index_t row, bool there) {
#if HELD
    A e[PER][V];
    read_row(x + row * width, width, there, e);
    const Statistics s = exponentials(e, room);
#else
    const Statistics s = statistics(x + row * width, width, room);
#endif
    const bool finite = s.top - s.top == 0;
    if (there && lane_of_group() == 0) out[row] = T(finite ? log(s.total) + s.top : s.top);
  });
}
''', ("logsumexp",), variants(HELD))


def _logsumexp(dev: Any, x: Any, axis: Any, keepdims: bool) -> Any:
    axes = normalize_axes(axis, x.ndim)
    kept = [d for d in range(x.ndim) if d not in axes]
    rows = as_rows(dev, x.transpose(*kept, *axes), len(axes))
    count, width = rows.shape
    out = dev.cp.empty(count, x.dtype)
    how = plan(width, x.dtype, (rows,), HELD)
    dev.kernels(LOGSUMEXP, "logsumexp", **how.macros)(
        (min(LAST, -(-count // how.at_once)),), (how.threads,), (rows, out, np.int64(count), np.int32(width)))
    return out.reshape([1 if d in axes else n for d, n in enumerate(x.shape) if keepdims or d not in axes])


def _sums_fit(shapes: Any, given: Any, attrs: Any) -> bool:
    """An input with elements, in a floating dtype."""
    return equal_floats(shapes, given) and 0 < prod(shapes[0]) < 1 << 30


logsumexp = DeviceKernel(_logsumexp, _sums_fit)
softmax = _along(SOFTMAX, "softmax", 0, HELD)
log_softmax = _along(SOFTMAX, "softmax", 1, HELD // 2)
softmax_grad = _along(GRADIENT, "softmax_grad", 0, HELD // 2)
log_softmax_grad = _along(GRADIENT, "softmax_grad", 1, HELD // 2)
