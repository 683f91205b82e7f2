"""Cross-entropy of logits and class indices in one pass over them, negative log-likelihood, derivatives.

A target that is no class gives NaN: looking at it on the host would stop the stream.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.kernels.rows import LAST, ROWS, floating, plan, variants, wide
from meshtape.runtime.cuda.kernels.softmax import STATISTICS
from meshtape.runtime.cuda.source import ctype, source
from meshtape.runtime.op import DeviceKernel

HELD = 32
BLOCKS_PER_MULTIPROCESSOR = 32
FINISH = 1024       # threads that add up what blocks found

CROSS_ENTROPY = source("cross_entropy", ROWS + STATISTICS + r'''
// Writes the softmax of every row (or, with LSE, the logarithm of its sum of exponentials), the sum of a
// block's losses, and how many of its targets count.
#if LSE
typedef A Kept;
#else
typedef T Kept;
#endif
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy(const T* x, const I* target, Kept* p, A* totals, long long* counts, index_t rows, int width,
              long long ignored, A smoothing) {
  __shared__ A room[32];
  __shared__ long long room_of_counts[32];
  A loss = 0;
  long long count = 0;
  each_row(rows, [&](index_t row, bool there) {
    const T* from = x + row * width;
    A sum = 0;
#if HELD
    A e[PER][V];
    read_row(from, width, there, e);
#if SMOOTH
    vectors(width, [&](int k, int c) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum += e[k][i];
    });
#endif
    const Statistics s = exponentials(e, room);
#else
#if SMOOTH
    vectors(width, [&](int k, int c) {
      const auto v = read(from + c);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += to_acc(v[i]);
    });
#endif
    const Statistics s = statistics(from, width, room);
#endif
#if SMOOTH
    sum = over_group(sum, room, A(0), Sum());
#endif
    if (!there) return;
#if LSE
    if (lane_of_group() == 0) p[row] = s.top + log(s.total);
#else
    const A scale = 1 / s.total;
    vectors(width, [&](int k, int c) {
      Vec<T, V> y;
#if HELD
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = T(e[k][i] * scale);
#else
      const auto v = read(from + c);
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = T(exp(to_acc(v[i]) - s.top) * scale);
#endif
      write(p + row * width + c, y);
    });
#endif
    const long long t = target[row];
    if (lane_of_group() == 0 && t != ignored) {
      const bool known = t >= 0 && t < width;
      A picked = known ? to_acc(from[t]) : __int_as_float(0x7fc00000);
#if SMOOTH
      picked = (1 - smoothing) * picked + smoothing / width * sum;
#endif
      loss += log(s.total) - (picked - s.top);
      ++count;
    }
  });
  loss = block_sum(loss, room);
  count = block_sum(count, room_of_counts);
  if (threadIdx.x == 0) totals[blockIdx.x] = loss, counts[blockIdx.x] = count;
}
''', ("cross_entropy",), variants(
    HELD, {"I": "int64", "SMOOTH": "0", "LSE": "0"}, {"I": "int32", "SMOOTH": "1", "LSE": "1"},
    {"I": "int64", "SMOOTH": "0", "LSE": "1"}))

TOTAL = source("cross_entropy_total", r'''
extern "C" __global__ void __launch_bounds__(1024)
cross_entropy_total(const A* totals, const long long* counts, A* total, A* count, int blocks) {
  __shared__ A room[32];
  __shared__ long long room_of_counts[32];
  A loss = 0;
  long long n = 0;
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) loss += totals[i], n += counts[i];
  loss = block_sum(loss, room);
  n = block_sum(n, room_of_counts);
  if (threadIdx.x == 0) *total = loss, *count = A(n);
}
''', ("cross_entropy_total",), ({"A": "float"}, {"A": "double"}))

GRADIENT = source("cross_entropy_grad", ROWS + r'''
// g * (p - q), with q the smoothed one-hot target; 0 where the target does not count. With LSE, p are the
// logits, of which `lse` is what cross_entropy found.
extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_grad(const G* g, const T* p, const A* lse, const I* target, T* out, index_t rows, int width,
                   long long ignored, A smoothing) {
  each_row(rows, [&](index_t row, bool there) {
    if (!there) return;
    const long long t = target[row];
    const bool counts = t != ignored;
    const A scale = !counts ? A(0) : t >= 0 && t < width ? A(*g) : A(__int_as_float(0x7fc00000));
    const A others = smoothing / width * scale, own = (1 - smoothing) * scale;
#if LSE
    const A bottom = lse[row];
#endif
    vectors(width, [&](int, int c) {
      const auto v = read(p + row * width + c);
      Vec<T, V> d;
#pragma unroll
      for (int i = 0; i < V; ++i) {
#if LSE
        A value = exp(to_acc(v[i]) - bottom) * scale - others;
#else
        A value = to_acc(v[i]) * scale - others;
#endif
        if (c + i == t) value -= own;
        d[i] = T(value);
      }
      write(out + row * width + c, d);
    });
  });
}
''', ("cross_entropy_grad",), variants(
    HELD, {"I": "int64", "G": "float", "LSE": "0"}, {"I": "int32", "G": "double", "LSE": "1"},
    {"I": "int64", "G": "float", "LSE": "1"}))

# Classes lie between `inner` elements of the samples' other dimensions.
NLL = source("nll", r'''
extern "C" __global__ void __launch_bounds__(256)
nll(const T* logp, const I* target, T* out, index_t samples, int classes, index_t inner,
    long long ignored) {
  const index_t stride = (index_t)gridDim.x * blockDim.x;
  for (index_t i = blockIdx.x * (index_t)blockDim.x + threadIdx.x; i < samples; i += stride) {
    const long long t = target[i];
    acc_t<T> loss = 0;
    if (t != ignored)
      loss = t >= 0 && t < classes ? -to_acc(logp[(i / inner * classes + t) * inner + i % inner])
                                   : acc_t<T>(__int_as_float(0x7fc00000));
    out[i] = T(loss);
  }
}
extern "C" __global__ void __launch_bounds__(256)
nll_grad(const T* g, const I* target, T* out, index_t samples, int classes, index_t inner,
         long long ignored) {
  const index_t stride = (index_t)gridDim.x * blockDim.x;
  for (index_t i = blockIdx.x * (index_t)blockDim.x + threadIdx.x; i < samples; i += stride) {
    const long long t = target[i];
    if (t != ignored && t >= 0 && t < classes)
      out[(i / inner * classes + t) * inner + i % inner] = T(-to_acc(g[i]));
  }
}
''', ("nll", "nll_grad"), tuple({"T": t, "I": i} for t in ("float", "double", "float16", "bfloat16")
                                for i in ("int64", "int32")))


def _class_axis(ndim: int) -> int:
    return min(1, ndim - 1)


def _class_rows(dev: Any, x: Any) -> Any:
    """`x` as a contiguous (samples, classes)."""
    last = x if x.ndim < 3 else dev.cp.moveaxis(x, 1, -1)
    return dev.cp.ascontiguousarray(last).reshape(prod(last.shape[:-1]), last.shape[-1])


def _like(dev: Any, rows: Any, shape: tuple[int, ...]) -> Any:
    """(samples, classes) as the logits lie."""
    if len(shape) < 3:
        return rows.reshape(shape)
    return dev.cp.moveaxis(rows.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


def _cross_entropy(dev: Any, logits: Any, target: Any, ignore_index: int, label_smoothing: float) -> Any:
    total, found, p = _loss(dev, logits, target, ignore_index, label_smoothing, lse=False)
    return total, found, _like(dev, p, logits.shape)


def cross_entropy_lse(dev: Any, logits: Any, target: Any, ignore_index: int, label_smoothing: float) -> Any:
    """As the row cross_entropy, but the third result is log(sum(exp)) of every sample, in the dtype that the
    first is in.
    """
    return _loss(dev, logits, target, ignore_index, label_smoothing, lse=True)


def _loss(dev: Any, logits: Any, target: Any, ignore_index: int, label_smoothing: float, lse: bool) -> Any:
    cp, rows, targets = dev.cp, _class_rows(dev, logits), dev.cp.ascontiguousarray(target)
    count, width = rows.shape
    acc = wide(rows.dtype)
    p = cp.empty(count, acc) if lse else cp.empty(rows.shape, rows.dtype)
    how = plan(width, rows.dtype, (rows,) if lse else (rows, p), HELD)
    blocks = dev.kernels.blocks_for(count, how.at_once, BLOCKS_PER_MULTIPROCESSOR)
    totals, counts = cp.empty(blocks, acc), cp.empty(blocks, np.int64)
    kernel = dev.kernels(CROSS_ENTROPY, "cross_entropy", **how.macros, I=ctype(targets.dtype),
                         SMOOTH=int(label_smoothing != 0), LSE=int(lse))
    kernel((blocks,), (how.threads,), (rows, targets, p, totals, counts, np.int64(count), np.int32(width),
                                       np.int64(ignore_index), acc.type(label_smoothing)))
    total, found = cp.empty((), acc), cp.empty((), acc)
    dev.kernels(TOTAL, "cross_entropy_total", A=ctype(acc))(
        (1,), (FINISH,), (totals, counts, total, found, np.int32(blocks)))
    return total, found, p


def _cross_entropy_grad(dev: Any, g: Any, p: Any, target: Any, ignore_index: int,
                        label_smoothing: float) -> Any:
    return _loss_grad(dev, g, p, None, target, ignore_index, label_smoothing)


def cross_entropy_grad_lse(dev: Any, g: Any, logits: Any, lse: Any, target: Any, ignore_index: int,
                           label_smoothing: float) -> Any:
    """As the row cross_entropy_grad, of the logits and what cross_entropy_lse found; in the logits' dtype."""
    return _loss_grad(dev, g, logits, lse, target, ignore_index, label_smoothing)


def _loss_grad(dev: Any, g: Any, p: Any, lse: Any, target: Any, ignore_index: int,
               label_smoothing: float) -> Any:
    rows, targets = _class_rows(dev, p), dev.cp.ascontiguousarray(target)
    count, width = rows.shape
    out = dev.cp.empty(rows.shape, rows.dtype)
    how = plan(width, rows.dtype, (rows, out), HELD)
    kernel = dev.kernels(GRADIENT, "cross_entropy_grad", **how.macros, I=ctype(targets.dtype),
                         G=ctype(g.dtype), LSE=int(lse is not None))
    kernel((min(LAST, -(-count // how.at_once)),), (how.threads,),
           (g, rows, lse, targets, out, np.int64(count), np.int32(width), np.int64(ignore_index),
            wide(rows.dtype).type(label_smoothing)))
    return _like(dev, out, p.shape)


def _nll(dev: Any, logp: Any, target: Any, ignore_index: int) -> Any:
    logp, out = dev.cp.ascontiguousarray(logp), dev.cp.empty(target.shape, logp.dtype)
    _per_sample(dev, "nll", logp, target, out, logp.shape, ignore_index)
    return out


def _nll_grad(dev: Any, g: Any, target: Any, classes: int, ignore_index: int) -> Any:
    axis = _class_axis(target.ndim + 1)
    out = dev.cp.zeros((*target.shape[:axis], classes, *target.shape[axis:]), g.dtype)
    _per_sample(dev, "nll_grad", dev.cp.ascontiguousarray(g), target, out, out.shape, ignore_index)
    return out


def _per_sample(dev: Any, function: str, given: Any, target: Any, out: Any, shape: tuple[int, ...],
                ignore_index: int) -> None:
    axis = _class_axis(len(shape))
    if target.size:
        kernel = dev.kernels(NLL, function, T=ctype(given.dtype), I=ctype(target.dtype))
        kernel((dev.kernels.blocks_for(target.size, 256),), (256,),
               (given, dev.cp.ascontiguousarray(target), out, np.int64(target.size), np.int32(shape[axis]),
                np.int64(prod(shape[axis + 1:])), np.int64(ignore_index)))


def _classified(x: Any, dtype: Any, target: Any) -> bool:
    """Whether these are classes in a floating dtype and targets of integers."""
    return (floating(dtype) and target is not None and dtypes.kind(target) == 1 and prod(x) > 0
            and x[_class_axis(len(x))] < 1 << 30)


cross_entropy = DeviceKernel(
    _cross_entropy, lambda shapes, given, attrs: _classified(shapes[0], given[0], given[1]))
cross_entropy_grad = DeviceKernel(
    _cross_entropy_grad, lambda shapes, given, attrs: _classified(shapes[1], given[1], given[2]), numbers="d")
nll = DeviceKernel(_nll, lambda shapes, given, attrs: _classified(shapes[0], given[0], given[1]))
nll_grad = DeviceKernel(
    _nll_grad, lambda shapes, given, attrs: (
        floating(given[0]) and given[1] is not None and dtypes.kind(given[1]) == 1))
