"""Pooling on CUDA: the windows of one to three spatial dimensions, gathered by one thread for each result.

Backward gathers as well: an element adds up what the windows that it lies in send it, in the order of the
taps, so nothing is added atomically. Results lie in memory like the input, in C order or with channels
innermost; in that order a thread takes VEC neighbouring channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.dnn.convolution import channels_last, in_order, lies, with_strides
from meshtape.runtime.cuda.source import ctype, source
from meshtape.runtime.op import DeviceKernel
from meshtape.runtime.ops.windows import Pairs, placed, pool_counts
from meshtape.runtime.shards import Shape

CODE = r"""
// Arrays are (samples, channels, 3 spatial dimensions). `total` results of shape `made` are numbered in their
// memory order; a and b are the strides of what is read. Along a dimension lie `size` elements and `count`
// windows, which begin every `step` elements from -before on, and their taps `apart`.
struct Pool {
  long long total, a[5], b[5];
  int made[5], size[3], count[3], kernel[3], step[3], before[3], after[3], apart[3], padded, divisor;
};

typedef Vec<T, VEC> Values;
typedef Vec<I, VEC> Taps;
typedef acc_t<T> W;

struct Place {
  int n, c, at[3];
  __device__ Place(const Pool& p, index_t i) {
    index_t rest = i;
#if LAST
    c = rest % (p.made[1] / VEC) * VEC, rest /= p.made[1] / VEC;
#endif
#pragma unroll
    for (int d = 2; d >= 0; --d) at[d] = rest % p.made[2 + d], rest /= p.made[2 + d];
#if LAST
    n = rest;
#else
    c = rest % p.made[1], n = rest / p.made[1];
#endif
  }
  __device__ long long base(const long long (&strides)[5]) const { return n * strides[0] + c * strides[1]; }
};

// f(number of the result, its place) for every result of this thread, or of this warp.
template <class F> __device__ inline void each_result(const Pool& p, F f) {
  const index_t threads = WARP ? 32 : 1, many = p.total / VEC;
  for (index_t i = (blockIdx.x * (index_t)blockDim.x + threadIdx.x) / threads; i < many;
       i += (index_t)gridDim.x * blockDim.x / threads) f(i, Place(p, i));
}

// f(tap's number, offset of its element) for the taps of a window that meet an element, in order.
template <class F>
__device__ inline void each_element(const Pool& p, const Place& o, const long long (&strides)[5], F f) {
  const int first[3] = {o.at[0] * p.step[0] - p.before[0], o.at[1] * p.step[1] - p.before[1],
                        o.at[2] * p.step[2] - p.before[2]};
  for (int i = 0, x = first[0]; i < p.kernel[0]; ++i, x += p.apart[0]) {
    if (x < 0 || x >= p.size[0]) continue;
    for (int j = 0, y = first[1]; j < p.kernel[1]; ++j, y += p.apart[1]) {
      if (y < 0 || y >= p.size[1]) continue;
      const long long row = x * strides[2] + y * strides[3];
      for (int k = 0, z = first[2]; k < p.kernel[2]; ++k, z += p.apart[2])
        if (z >= 0 && z < p.size[2]) f((i * p.kernel[1] + j) * p.kernel[2] + k, row + z * strides[4]);
    }
  }
}

// The window whose tap `tap` meets element `at` of dimension d, or -1.
__device__ inline int window_of(const Pool& p, int d, int at, int tap) {
  const int from = at + p.before[d] - tap * p.apart[d];
  return from < 0 || from % p.step[d] || from / p.step[d] >= p.count[d] ? -1 : from / p.step[d];
}

// f(tap's number, windows) for the windows that meet an element, in the order of the taps.
template <class F> __device__ inline void each_window(const Pool& p, const Place& e, F f) {
  for (int i = 0; i < p.kernel[0]; ++i) {
    const int x = window_of(p, 0, e.at[0], i);
    if (x < 0) continue;
    for (int j = 0; j < p.kernel[1]; ++j) {
      const int y = window_of(p, 1, e.at[1], j);
      if (y < 0) continue;
      for (int k = 0; k < p.kernel[2]; ++k) {
        const int z = window_of(p, 2, e.at[2], k);
        if (z >= 0) f((i * p.kernel[1] + j) * p.kernel[2] + k, x, y, z);
      }
    }
  }
}

__device__ inline long long offset(const long long (&strides)[5], int x, int y, int z) {
  return x * strides[2] + y * strides[3] + z * strides[4];
}
"""

LARGEST = r"""
extern "C" __global__ void __launch_bounds__(256, 4) largest(T* best, I* tap, const T* x, Pool p) {
  each_result(p, [&](index_t at, const Place& o) {
    const T* from = x + o.base(p.a);
    Values top;
    Taps number;
    bool begun = false;
    each_element(p, o, p.a, [&](int k, long long where) {
      const Values value = load<VEC>(from + where);
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        const bool larger = !begun || W(value[v]) > W(top[v]);
        if (larger) number[v] = k;
        if (larger || value[v] != value[v]) top[v] = value[v];
      }
      begun = true;
    });
    store(best + at * VEC, top);
    store(tap + at * VEC, number);
  });
}

extern "C" __global__ void __launch_bounds__(256, 4) largest_back(T* out, const T* g, const I* tap, Pool p) {
  each_result(p, [&](index_t at, const Place& e) {
    const T* from = g + e.base(p.a);
    const I* taps = tap + e.base(p.b);
    W sum[VEC] = {};
    each_window(p, e, [&](int k, int x, int y, int z) {
      const Taps number = load<VEC>(taps + offset(p.b, x, y, z));
      const Values value = load<VEC>(from + offset(p.a, x, y, z));
#pragma unroll
      for (int v = 0; v < VEC; ++v) if (int(number[v]) == k) sum[v] += W(value[v]);
    });
    Values made;
#pragma unroll
    for (int v = 0; v < VEC; ++v) made[v] = T(sum[v]);
    store(out + at * VEC, made);
  });
}

// Of each window the element at its tap.
extern "C" __global__ void __launch_bounds__(256, 4) taken(T* out, const T* x, const I* tap, Pool p) {
  each_result(p, [&](index_t at, const Place& o) {
    const T* from = x + o.base(p.a);
    const Taps number = load<VEC>(tap + o.base(p.b) + offset(p.b, o.at[0], o.at[1], o.at[2]));
    Values made;
#pragma unroll
    for (int v = 0; v < VEC; ++v) made[v] = T(W(0));
    each_element(p, o, p.a, [&](int k, long long where) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) if (int(number[v]) == k) made[v] = from[where + v];
    });
    store(out + at * VEC, made);
  });
}
"""

AVERAGE = r"""
// What a window's sum is divided by along one dimension.
__device__ inline int counted(const Pool& p, int d, int window) {
  int start = window * p.step[d] - p.before[d], stop = min(start + p.kernel[d], p.size[d] + p.after[d]);
  if (!p.padded) start = max(start, 0), stop = min(stop, p.size[d]);
  return stop - start;
}
__device__ inline W divisor(const Pool& p, int x, int y, int z) {
  return p.divisor ? W(p.divisor) : W(counted(p, 0, x)) * W(counted(p, 1, y)) * W(counted(p, 2, z));
}

template <class F> __device__ inline void sums(T* out, const Pool& p, index_t at, F f) {
  Values made;
  W sum[VEC] = {};
  f(sum);
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    if (WARP) sum[v] = warp_sum(sum[v]);
    made[v] = T(sum[v]);
  }
  if (!WARP || threadIdx.x % 32 == 0) store(out + at * VEC, made);
}

extern "C" __global__ void __launch_bounds__(256, 4) average(T* out, const T* x, Pool p) {
  each_result(p, [&](index_t at, const Place& o) {
    const T* from = x + o.base(p.a);
    sums(out, p, at, [&](W (&sum)[VEC]) {
      each_element(p, o, p.a, [&](int k, long long where) {
        const Values value = load<VEC>(from + where);
#pragma unroll
        for (int v = 0; v < VEC; ++v) sum[v] += W(value[v]);
      });
      const W by = divisor(p, o.at[0], o.at[1], o.at[2]);
#pragma unroll
      for (int v = 0; v < VEC; ++v) sum[v] /= by;
    });
  });
}

extern "C" __global__ void __launch_bounds__(256, 4) average_back(T* out, const T* g, Pool p) {
  each_result(p, [&](index_t at, const Place& e) {
    const T* from = g + e.base(p.a);
    sums(out, p, at, [&](W (&sum)[VEC]) {
      each_window(p, e, [&](int k, int x, int y, int z) {
        const Values value = load<VEC>(from + offset(p.a, x, y, z));
        const W by = divisor(p, x, y, z);
#pragma unroll
        for (int v = 0; v < VEC; ++v) sum[v] += W(value[v]) / by;
      });
    });
  });
}

// Window i of m over n elements goes from floor(i n / m) to ceil((i + 1) n / m). Element e of n lies in the
// windows that would be window e of n over m elements.
__device__ inline int begin_of(int i, int n, int m) { return int((long long)i * n / m); }
__device__ inline int end_of(int i, int n, int m) { return int(((i + 1ll) * n + m - 1) / m); }

template <bool BACK> __device__ inline void adapted(T* out, const T* x, const Pool& p) {
  const int* sources = BACK ? p.count : p.size;     // along which is read
  const int* results = BACK ? p.size : p.count;
  each_result(p, [&](index_t at, const Place& o) {
    const T* from = x + o.base(p.a);
    int start[3], stop[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      start[d] = begin_of(o.at[d], sources[d], results[d]);
      stop[d] = end_of(o.at[d], sources[d], results[d]);
    }
    sums(out, p, at, [&](W (&sum)[VEC]) {
      const int rows = stop[1] - start[1], columns = stop[2] - start[2];
      const int all = (stop[0] - start[0]) * rows * columns;
      for (int i = WARP ? threadIdx.x % 32 : 0; i < all; i += WARP ? 32 : 1) {
        const int where[3] = {start[0] + i / columns / rows, start[1] + i / columns % rows,
                              start[2] + i % columns};
        const Values value = load<VEC>(from + offset(p.a, where[0], where[1], where[2]));
        W by = 1;
        if (BACK) {
#pragma unroll
          for (int d = 0; d < 3; ++d)
            by *= W(end_of(where[d], p.size[d], p.count[d]) - begin_of(where[d], p.size[d], p.count[d]));
        }
#pragma unroll
        for (int v = 0; v < VEC; ++v) sum[v] += BACK ? W(value[v]) / by : W(value[v]);
      }
      if (!BACK) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) sum[v] /= W(all);
      }
    });
  });
}

extern "C" __global__ void __launch_bounds__(256, 4) adaptive(T* out, const T* x, Pool p) {
  adapted<false>(out, x, p);
}
extern "C" __global__ void __launch_bounds__(256, 4) adaptive_back(T* out, const T* g, Pool p) {
  adapted<true>(out, g, p);
}
"""

FLOATS = ("float16", "bfloat16", "float32", "float64")
NUMBERS = (*FLOATS, "int8", "uint8", "int16", "int32", "int64")
POOL = np.dtype([("total", np.int64), ("a", np.int64, 5), ("b", np.int64, 5), *(
    (name, np.int32, n) for name, n in (
        ("made", 5), ("size", 3), ("count", 3), ("kernel", 3), ("step", 3), ("before", 3), ("after", 3),
        ("apart", 3), ("padded", ()), ("divisor", ())))], align=True)


def _variants(types: Sequence[str]) -> tuple[dict[str, str], ...]:
    orders = (("1", "1", "int"), ("0", "1", "long long"))
    found = [{"T": ctype(t), "I": "unsigned char", "LAST": last, "VEC": vec, "WARP": "0", "index_t": index}
             for t in types for last, vec, index in orders]
    wide = {"float16": "8", "float32": "4"}
    return *found, *({"T": ctype(t), "I": "int", "LAST": "1", "VEC": n, "WARP": "0", "index_t": "int"}
                     for t, n in wide.items())


LARGEST_SOURCE = source("pool_largest", CODE + LARGEST, ("largest", "largest_back", "taken"),
                        _variants(("float16", "bfloat16", "float32", "float64", "int32")))
AVERAGE_SOURCE = source(
    "pool_average", CODE + AVERAGE, ("average", "average_back", "adaptive", "adaptive_back"),
    (*_variants(FLOATS), {"T": "float", "I": "unsigned char", "LAST": "0", "VEC": "1", "WARP": "1",
                          "index_t": "int"}))
WARPED = 128            # elements of a window from which a warp adds them up


# --- launches -------------------------------------------------------------------------------------------

def _three(given: Sequence[int], fill: int) -> list[int]:
    """Numbers of one to three spatial dimensions as those of three."""
    return [fill] * (3 - len(given)) + list(given)


def _strides(x: Any) -> list[int]:
    sample, channel, *spatial = (s // x.itemsize for s in x.strides)
    return [sample, channel, *_three(spatial, 0)]


def _innermost(x: Any) -> bool:
    """Whether channels are innermost in memory."""
    return not x.flags.c_contiguous and lies(x, channels_last(x.shape))


def fields_of(made: Shape, total: int, read: Sequence[Any], geometry: Mapping[str, Any]) -> Any:
    """The struct Pool; what `geometry` leaves out is that of a kernel of one tap."""
    fields = np.zeros(1, POOL)
    fields["total"] = total
    for key, x in zip("ab", read, strict=False):
        fields[key] = _strides(x)
    fields["made"] = [*made[:2], *_three(made[2:], 1)]
    for key, fill in (("size", 1), ("count", 1), ("kernel", 1), ("step", 1), ("before", 0), ("after", 0),
                      ("apart", 1)):
        fields[key] = _three(geometry.get(key, ()), fill)
    fields["padded"], fields["divisor"] = geometry.get("padded", 1), geometry.get("divisor") or 0
    return fields


def _launch(dev: Any, which: Any, name: str, made: Sequence[Any], read: Sequence[Any], last: bool,
            taps: Any = np.uint8, window: int = 0, **geometry: Any) -> None:
    """A kernel that writes `made`, which lie alike, and reads `read`."""
    first = made[0]
    if not first.size:
        return
    channels, vec = first.shape[1], 1
    if last:
        whole = 16 // first.itemsize
        fits = channels % whole == 0 and all(       # taps may be wider than values
            _innermost(x) and x.data.ptr % (whole * x.itemsize) == 0 for x in (*made, *read))
        vec = whole if fits else 1
    warp = window >= WARPED and not last
    fields = fields_of(first.shape, first.size, read, geometry)
    small = first.size * (32 if warp else 1) < 2**30
    kernel = dev.kernels(which, name, T=ctype(first.dtype), I=ctype(taps), LAST=int(last), VEC=vec,
                         WARP=int(warp), index_t="int" if small else "long long")
    blocks = dev.kernels.blocks_for(first.size // vec * (32 if warp else 1), 256)
    kernel((blocks,), (256,), (*made, *read, fields))


def _windows(size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape | None,
             count: Shape) -> dict[str, Any]:
    before, after = zip(*padding, strict=True)
    return {"size": size, "count": count, "kernel": kernel, "step": stride, "before": before, "after": after,
            "apart": dilation or (1,) * len(size)}


def _empty(dev: Any, shape: Shape, dtype: Any, last: bool) -> Any:
    return with_strides(dev, shape, channels_last(shape) if last else in_order(shape), dtype)


def _tap_dtype(kernel: Shape) -> Any:
    return np.dtype(np.uint8) if prod(kernel) <= 256 else np.dtype(np.int32)


def _max_pool(dev: Any, x: Any, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
              ceil_mode: bool) -> Any:
    size, last = x.shape[2:], _innermost(x)
    count = pool_counts("max_pool", size, kernel, stride, padding, dilation, ceil_mode)
    shape, taps = (*x.shape[:2], *count), _tap_dtype(kernel)
    best, tap = _empty(dev, shape, x.dtype, last), _empty(dev, shape, taps, last)
    _launch(dev, LARGEST_SOURCE, "largest", (best, tap), (x,), last, taps,
            **_windows(size, kernel, stride, padding, dilation, count))
    return best, tap


def _max_grad(dev: Any, g: Any, tap: Any, size: Shape, kernel: Shape, stride: Shape, padding: Pairs,
              dilation: Shape, ceil_mode: bool, out: Any = None) -> Any:
    last = _innermost(tap)
    made = _empty(dev, (*g.shape[:2], *size), g.dtype, last)
    _launch(dev, LARGEST_SOURCE, "largest_back", (made,), (g, tap), last, tap.dtype,
            **_windows(size, kernel, stride, padding, dilation, g.shape[2:]))
    return placed(made, made.dtype, out)


def _max_take(dev: Any, x: Any, tap: Any, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
              ceil_mode: bool) -> Any:
    last = _innermost(tap)
    made = _empty(dev, tap.shape, x.dtype, last)
    _launch(dev, LARGEST_SOURCE, "taken", (made,), (x, tap), last, tap.dtype,
            **_windows(x.shape[2:], kernel, stride, padding, dilation, tap.shape[2:]))
    return made


def _avg_pool(dev: Any, x: Any, kernel: Shape, stride: Shape, padding: Pairs, ceil_mode: bool,
              count_include_pad: bool, divisor: int | None) -> Any:
    size, last = x.shape[2:], _innermost(x)
    count = pool_counts("avg_pool", size, kernel, stride, padding, (1,) * len(kernel), ceil_mode)
    made = _empty(dev, (*x.shape[:2], *count), x.dtype, last)
    _launch(dev, AVERAGE_SOURCE, "average", (made,), (x,), last, padded=count_include_pad, divisor=divisor,
            **_windows(size, kernel, stride, padding, None, count))
    return made


def _avg_pool_grad(dev: Any, g: Any, size: Shape, kernel: Shape, stride: Shape, padding: Pairs,
                   ceil_mode: bool, count_include_pad: bool, divisor: int | None) -> Any:
    last = _innermost(g)
    made = _empty(dev, (*g.shape[:2], *size), g.dtype, last)
    _launch(dev, AVERAGE_SOURCE, "average_back", (made,), (g,), last, padded=count_include_pad,
            divisor=divisor, **_windows(size, kernel, stride, padding, None, g.shape[2:]))
    return made


def _adaptive(dev: Any, x: Any, count: Shape) -> Any:
    size, last = x.shape[2:], _innermost(x)
    made = _empty(dev, (*x.shape[:2], *count), x.dtype, last)
    window = prod(-(-n // m) for n, m in zip(size, count, strict=True))
    _launch(dev, AVERAGE_SOURCE, "adaptive", (made,), (x,), last, window=window, size=size, count=count)
    return made


def _adaptive_grad(dev: Any, g: Any, size: Shape) -> Any:
    last = _innermost(g)
    made = _empty(dev, (*g.shape[:2], *size), g.dtype, last)
    _launch(dev, AVERAGE_SOURCE, "adaptive_back", (made,), (g,), last, size=size, count=g.shape[2:])
    return made


# --- kernels of rows ------------------------------------------------------------------------------------

def _kernel(run: Callable[..., Any], takes: Sequence[str]) -> DeviceKernel:
    return DeviceKernel(run, lambda shapes, dtypes, attrs: len(shapes[0]) <= 5 and dtypes[0].name in takes)


MAX_POOL = _kernel(_max_pool, NUMBERS)
MAX_POOL_GRAD = _kernel(_max_grad, NUMBERS)
MAX_POOL_TAKE = _kernel(_max_take, NUMBERS)
AVG_POOL = _kernel(_avg_pool, FLOATS)
AVG_POOL_GRAD = _kernel(_avg_pool_grad, FLOATS)
ADAPTIVE_AVG_POOL = _kernel(_adaptive, FLOATS)
ADAPTIVE_AVG_POOL_GRAD = _kernel(_adaptive_grad, FLOATS)
