"""Batch normalization on CUDA: sums of each channel, and what is done with every element of it.

See meshtape.runtime.ops.batch_norm for the formulas. (cuDNN's fused kernels do not fit: statistics may be
those of many workers, so they are rows of their own.) Arrays are (samples, channels, ...) in C order or with
channels innermost, as convolutions leave them. In C order a block works on one channel, with channels
innermost on `groups` vectors of them, so that what belongs to a channel stays in registers. Sums are made in
chunks that a second launch adds up in order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.dnn.convolution import channels_last, in_order, lies, with_strides
from meshtape.runtime.cuda.kernels.arrays import compact
from meshtape.runtime.cuda.source import ctype, source
from meshtape.runtime.op import DeviceKernel
from meshtape.runtime.ops.windows import placed

CODE = r"""
// One number for every channel, or for all: a W at `at[channel]`, or (kind 1) a W, or (kind 2) a double.
struct PerChannel {
  const void* at;
  long long kind;
  __device__ W of(int c) const {
    if (kind == 2) return W(*static_cast<const double*>(at));
    return static_cast<const W*>(at)[kind ? 0 : c];
  }
};

// `rows` samples of `channels` planes of `inner` vectors; or, with channels innermost, rows of elements.
struct Shape { long long rows, channels, inner, groups, count; };

const int THREADS = 256, KEPT = LAST ? VEC : 1;

struct Mine {
  int first;                        // the first of this thread's KEPT channels
  __device__ Mine(const Shape& s) : first(LAST ? (blockIdx.x * s.groups + threadIdx.x % s.groups) * VEC
                                               : blockIdx.x) {}
  // f(offset of a vector) for this thread's vectors
  template <class F> __device__ void each(const Shape& s, F f) const {
#if LAST
    const index_t step = THREADS / s.groups;
    if (first >= s.channels) return;
    for (index_t r = blockIdx.y * step + threadIdx.x / s.groups; r < s.rows; r += gridDim.y * step)
      f(r * (index_t)s.channels + first);
#else
    const index_t inner = s.inner, items = s.rows * s.inner;
    for (index_t i = blockIdx.y * (index_t)THREADS + threadIdx.x; i < items; i += gridDim.y * THREADS)
      f(((i / inner * s.channels + first) * inner + i % inner) * VEC);
#endif
  }
};

// Which of this thread's channels element v of a vector belongs to.
__device__ inline int kept(int v) { return LAST ? v : 0; }
"""

SUMS = r"""
// Of sum `which` of a channel.
__device__ inline W finished(W sum, int which, int c, const Shape& s, PerChannel rstd) {
  if (KIND < 2) return sum / W(s.count);
  return KIND == 3 && which == 1 ? sum * rstd.of(c) : sum;
}

// KIND 0: sum x / count. 1: sum (x - mean)^2 / count. 2: sum x. 3: sum g and sum g (x - mean) rstd. With more
// than one chunk (gridDim.y) `partial` takes the unfinished sums, (chunks, SUMS, channels).
extern "C" __global__ void __launch_bounds__(THREADS) sums(O* out, W* partial, const T* x, const G* g,
                                                           PerChannel mean, PerChannel rstd, Shape s) {
  const int SUMS = KIND == 3 ? 2 : 1;
  __shared__ W room[LAST ? THREADS : 32 * SUMS];
  const Mine mine(s);
  W sum[SUMS * KEPT] = {}, about[KEPT];
#pragma unroll
  for (int v = 0; v < KEPT; ++v)
    about[v] = (KIND == 1 || KIND == 3) && mine.first + v < s.channels ? mean.of(mine.first + v) : W(0);
  mine.each(s, [&](index_t at) {
    const Vec<T, VEC> values = load<VEC>(x + at);
    Vec<G, VEC> upstream;
    if (KIND == 3) upstream = load<VEC>(g + at);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const W centered = W(values[v]) - about[kept(v)];
      if (KIND == 3) {
        sum[kept(v)] += W(upstream[v]);
        sum[KEPT * (SUMS - 1) + kept(v)] += W(upstream[v]) * centered;
      } else {
        sum[kept(v)] += KIND == 1 ? centered * centered : centered;
      }
    }
  });
#if LAST
  for (int k = 0; k < SUMS * KEPT; ++k) {
    room[threadIdx.x] = sum[0];
#pragma unroll
    for (int m = 1; m < SUMS * KEPT; ++m) if (m == k) room[threadIdx.x] = sum[m];
    __syncthreads();
    for (int far = THREADS / 2; far >= s.groups; far /= 2) {
      if (threadIdx.x < far) room[threadIdx.x] += room[threadIdx.x + far];
      __syncthreads();
    }
    const int c = mine.first + k % KEPT, which = k / KEPT;
    if (threadIdx.x < s.groups && c < s.channels) {
      if (gridDim.y == 1) out[which * s.channels + c] = O(finished(room[threadIdx.x], which, c, s, rstd));
      else partial[(blockIdx.y * (long long)SUMS + which) * s.channels + c] = room[threadIdx.x];
    }
  }
#else
  block_reduce(sum, room, W(0), Sum());
  if (threadIdx.x == 0) {
#pragma unroll
    for (int which = 0; which < SUMS; ++which) {
      const int c = mine.first;
      if (gridDim.y == 1) out[which * s.channels + c] = O(finished(sum[which], which, c, s, rstd));
      else partial[(blockIdx.y * (long long)SUMS + which) * s.channels + c] = sum[which];
    }
  }
#endif
}

// Adds up `chunks` partial sums, for each of SUMS * channels one thread.
extern "C" __global__ void __launch_bounds__(THREADS) finish(O* out, const W* partial, long long chunks,
                                                             PerChannel rstd, Shape s) {
  const long long all = (KIND == 3 ? 2 : 1) * s.channels, i = blockIdx.x * (long long)THREADS + threadIdx.x;
  if (i >= all) return;
  W sum = 0;
  for (long long k = 0; k < chunks; ++k) sum += partial[k * all + i];
  out[i] = O(finished(sum, i / s.channels, i % s.channels, s, rstd));
}
"""

EACH = r"""
// (x - mean) rstd weight + bias
extern "C" __global__ void __launch_bounds__(THREADS) normalize(T* out, const T* x, PerChannel mean,
                                                                PerChannel rstd, PerChannel weight,
                                                                PerChannel bias, Shape s) {
  const Mine mine(s);
  W about[KEPT], scale[KEPT], shift[KEPT];
#pragma unroll
  for (int v = 0; v < KEPT; ++v) {
    const int c = mine.first + v < s.channels ? mine.first + v : 0;
    about[v] = mean.of(c), scale[v] = rstd.of(c) * weight.of(c), shift[v] = bias.of(c);
  }
  mine.each(s, [&](index_t at) {
    Vec<T, VEC> values = load<VEC>(x + at);
#pragma unroll
    for (int v = 0; v < VEC; ++v)
      values[v] = T((W(values[v]) - about[kept(v)]) * scale[kept(v)] + shift[kept(v)]);
    store(out + at, values);
  });
}

// rstd weight (g - sum(g) / n - (x - mean) rstd sum(g h) / n)
extern "C" __global__ void __launch_bounds__(THREADS) normalize_back(T* out, const T* g, const T* x,
                                                                     PerChannel mean, PerChannel rstd,
                                                                     PerChannel weight, const W* sums,
                                                                     Shape s) {
  const Mine mine(s);
  W about[KEPT], scale[KEPT], slope[KEPT], shift[KEPT];
#pragma unroll
  for (int v = 0; v < KEPT; ++v) {
    const int c = mine.first + v < s.channels ? mine.first + v : 0;
    const W r = rstd.of(c), n = W(s.count);
    about[v] = mean.of(c), scale[v] = r * weight.of(c);
    slope[v] = r * (sums[s.channels + c] / n), shift[v] = sums[c] / n;
  }
  mine.each(s, [&](index_t at) {
    Vec<T, VEC> values = load<VEC>(x + at);
    const Vec<T, VEC> upstream = load<VEC>(g + at);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      const int k = kept(v);
      values[v] = T((W(upstream[v]) - ((W(values[v]) - about[k]) * slope[k] + shift[k])) * scale[k]);
    }
    store(out + at, values);
  });
}
"""

FLOATS = ("float16", "bfloat16", "float32", "float64")
PER_CHANNEL = np.dtype([("at", np.uint64), ("kind", np.int64)])
SHAPE = np.dtype([(name, np.int64) for name in ("rows", "channels", "inner", "groups", "count")])
NONE = np.zeros(1, PER_CHANNEL)
MEAN, VARIANCE, TOTAL, GRADIENT = range(4)
GROUPS = 32             # at most so many vectors of channels for a block


def _variants(kinds: Sequence[int]) -> tuple[dict[str, str], ...]:
    def of(t: str, last: int, vec: int, kind: int) -> dict[str, str]:
        wide = "double" if t == "float64" else "float"
        return {"T": ctype(t), "G": ctype(t), "W": wide, "O": wide, "KIND": str(kind), "LAST": str(last),
                "VEC": str(vec), "index_t": "int" if last else "long long"}
    return tuple(of(t, last, vec, kind) for kind in kinds for t, last, vec in (
        ("float32", 0, 4), ("float32", 1, 4), ("bfloat16", 0, 1), ("float16", 1, 8), ("float64", 1, 1)))


SUMS_SOURCE = source("batch_norm_sums", CODE + SUMS, ("sums", "finish"), _variants(range(4)))
EACH_SOURCE = source("batch_norm_each", CODE + EACH, ("normalize", "normalize_back"), _variants((0,)))


# --- launches -------------------------------------------------------------------------------------------

def per_channel(value: Any, wide: Any, kept: list[Any]) -> Any:
    """What the kernels take for a number of each channel; `kept` keeps copies alive until the launch."""
    if value.ndim == 0:
        kind = 2 if value.dtype == np.float64 and wide != np.float64 else 1
    else:
        kind = 0
        if not value.flags.c_contiguous or value.dtype != wide:
            value = value.astype(wide, order="C")
            kept.append(value)
    found = np.zeros(1, PER_CHANNEL)
    found["at"], found["kind"] = value.data.ptr, kind
    return found


class Layout:
    """How the elements of arrays that lie like x are shared out among threads."""

    def __init__(self, dev: Any, x: Any, arrays: Sequence[Any], count: int) -> None:
        samples, channels, inner = x.shape[0], x.shape[1], prod(x.shape[2:])
        self.last = inner == 1 or not x.flags.c_contiguous
        whole = 16 // max(a.itemsize for a in arrays)
        runs = channels if self.last else inner
        self.vec = whole if runs % whole == 0 and all(a.data.ptr % 16 == 0 for a in arrays) else 1
        groups = 1
        while self.last and groups < GROUPS and groups * self.vec < channels:
            groups *= 2
        rows = samples * inner if self.last else samples
        across = -(-channels // (groups * self.vec)) if self.last else channels
        items = -(-rows * groups // 256) if self.last else -(-rows * inner // self.vec // 256)
        # Four items for each thread, if there are as many, and some waves of blocks.
        chunks = max(1, min(-(-items // 4), dev.kernels.blocks_for(1 << 40, 1) // across))
        self.grid = across, chunks
        self.macros = {"LAST": int(self.last), "VEC": self.vec,
                       "index_t": "int" if x.size < 2**30 else "long long"}
        self.shape = np.array((rows, channels, 1 if self.last else inner // self.vec, groups, max(1, count)),
                              SHAPE)


def _laid(dev: Any, x: Any) -> Any:
    """`x` in one of the two orders."""
    return x if x.flags.c_contiguous or lies(x, channels_last(x.shape)) else compact(dev, x)


def _order(x: Any) -> Any:
    return in_order(x.shape) if x.flags.c_contiguous else channels_last(x.shape)


def _beside(dev: Any, x: Any, g: Any) -> Any:
    """`g` in the order of x."""
    if lies(g, _order(x)):
        return g
    copy = with_strides(dev, x.shape, _order(x), g.dtype)
    copy[...] = g
    return copy


def _wide(dtype: Any) -> Any:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _sums(dev: Any, kind: int, x: Any, g: Any, mean: Any, rstd: Any, wide: Any, out: Any, count: int) -> Any:
    layout, kept = Layout(dev, x, (x, g), count), list[Any]()
    sums, channels = 2 if kind == GRADIENT else 1, x.shape[1]
    across, chunks = layout.grid
    partial = None if chunks == 1 else dev.cp.empty((chunks, sums, channels), wide)
    macros = {"T": ctype(x.dtype), "G": ctype(g.dtype), "W": ctype(wide), "O": ctype(out.dtype), "KIND": kind,
              **layout.macros}
    mean, rstd = (NONE if a is None else per_channel(a, wide, kept) for a in (mean, rstd))
    dev.kernels(SUMS_SOURCE, "sums", **macros)((across, chunks), (256,),
                                               (out, partial, x, g, mean, rstd, layout.shape))
    if partial is not None:
        dev.kernels(SUMS_SOURCE, "finish", **macros)(
            (-(-sums * channels // 256),), (256,), (out, partial, np.int64(chunks), rstd, layout.shape))
    return out


def _batch_mean(dev: Any, x: Any, count: int) -> Any:
    x, wide = _laid(dev, x), _wide(x.dtype)
    return _sums(dev, MEAN, x, x, None, None, wide, dev.cp.empty(x.shape[1:2], wide), count)


def _batch_variance(dev: Any, x: Any, mean: Any, count: int) -> Any:
    x = _laid(dev, x)
    return _sums(dev, VARIANCE, x, x, mean, None, mean.dtype, dev.cp.empty(x.shape[1:2], mean.dtype), count)


def _batch_norm_sums(dev: Any, g: Any, x: Any, mean: Any, rstd: Any, training: bool) -> Any:
    x = _laid(dev, x)
    out = dev.cp.empty((2, x.shape[1]), mean.dtype)
    return _sums(dev, GRADIENT, x, _beside(dev, x, g), mean, rstd, mean.dtype, out, 1)


def _conv_bias_grad(dev: Any, g: Any) -> Any:
    g = _laid(dev, g)
    return _sums(dev, TOTAL, g, g, None, None, _wide(g.dtype), dev.cp.empty(g.shape[1:2], g.dtype), 1)


def _batch_norm(dev: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, training: bool,
                out: Any = None) -> Any:
    x, wide, kept = _laid(dev, x), _wide(x.dtype), list[Any]()
    made = with_strides(dev, x.shape, _order(x), x.dtype)
    layout = Layout(dev, x, (x, made), 1)
    numbers = (per_channel(a, wide, kept) for a in (mean, rstd, weight, bias))
    dev.kernels(EACH_SOURCE, "normalize", T=ctype(x.dtype), W=ctype(wide), **layout.macros)(
        layout.grid, (256,), (made, x, *numbers, layout.shape))
    return placed(made, x.dtype, out)


def _batch_norm_grad(dev: Any, g: Any, x: Any, mean: Any, rstd: Any, weight: Any, sums: Any,
                     count: int | None, out: Any = None) -> Any:
    x, wide, kept = _laid(dev, x), _wide(x.dtype), list[Any]()
    g, sums, made = _beside(dev, x, g), compact(dev, sums), with_strides(dev, x.shape, _order(x), x.dtype)
    n = x.shape[0] * prod(x.shape[2:]) if count is None else count
    layout = Layout(dev, x, (x, g, made), n)
    numbers = (per_channel(a, wide, kept) for a in (mean, rstd, weight))
    dev.kernels(EACH_SOURCE, "normalize_back", T=ctype(x.dtype), W=ctype(wide), **layout.macros)(
        layout.grid, (256,), (made, g, x, *numbers, sums, layout.shape))
    return placed(made, x.dtype, out)


# --- kernels of rows ------------------------------------------------------------------------------------

def _takes(shapes: tuple[Any, ...], dtypes: tuple[Any, ...], attrs: dict[str, Any]) -> bool:
    """Floats, nothing empty."""
    return all(dtype.name in FLOATS for dtype in dtypes if dtype is not None) and \
        all(n > 0 for shape in shapes if shape is not None for n in shape)


def _row(run: Any, arrays: int = 0, numbers: str = "") -> DeviceKernel:
    """Of the inputs the first `arrays` must be arrays; the last of the others may be `numbers`."""
    return DeviceKernel(run, lambda shapes, dtypes, attrs: None not in shapes[:arrays] and _takes(
        shapes, dtypes, attrs), numbers)


BATCH_MEAN = _row(_batch_mean, 1)
BATCH_VARIANCE = _row(_batch_variance, 2)
BATCH_NORM = _row(_batch_norm, 3, "dd")
BATCH_NORM_SUMS = _row(_batch_norm_sums, 4)
BATCH_NORM_GRAD = _row(_batch_norm_grad, 4, "d")
CONV_BIAS_GRAD = _row(_conv_bias_grad, 1)
