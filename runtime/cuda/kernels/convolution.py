"""Convolution on CUDA without cuDNN: windows gathered into a matrix, and a product; directly if depthwise.

Over one to three spatial dimensions. The geometry is that of pooling (kernels/pool.py). Nothing is added
atomically: backward by the input gathers as well, in the order of the taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels.arrays import compact
from meshtape.runtime.cuda.kernels.pool import CODE, FLOATS, fields_of
from meshtape.runtime.cuda.source import ctype, source
from meshtape.runtime.ops.windows import Pairs, counts, placed
from meshtape.runtime.shards import Shape

GATHER = r"""
// The windows of x (strides a): columns[n, c, tap, window], or [c, tap, n, window] if SAMPLES_INSIDE; 0 where
// a tap meets padding. `made` is (samples, channels, ..) of x.
extern "C" __global__ void __launch_bounds__(256) gather(T* columns, const T* x, Pool p) {
  const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  for (index_t i = blockIdx.x * (index_t)blockDim.x + threadIdx.x; i < p.total;
       i += (index_t)gridDim.x * blockDim.x) {
    index_t rest = i;
    int window[3], tap[3], n = 0;
#pragma unroll
    for (int d = 2; d >= 0; --d) window[d] = rest % p.count[d], rest /= p.count[d];
    if (SAMPLES_INSIDE) n = rest % p.made[0], rest /= p.made[0];
    int k = rest % taps;
    rest /= taps;
    const int c = rest % p.made[1];
    if (!SAMPLES_INSIDE) n = rest / p.made[1];
#pragma unroll
    for (int d = 2; d >= 0; --d) tap[d] = k % p.kernel[d], k /= p.kernel[d];
    long long from = n * p.a[0] + c * p.a[1];
    bool inside = true;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int at = window[d] * p.step[d] - p.before[d] + tap[d] * p.apart[d];
      inside = inside && at >= 0 && at < p.size[d];
      from += at * p.a[2 + d];
    }
    columns[i] = inside ? x[from] : T(W(0));
  }
}

// Every element of an input adds up what the windows send it: columns[n, c, tap, window].
extern "C" __global__ void __launch_bounds__(256, 4) collect(T* out, const W* columns, Pool p) {
  const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2], windows = p.count[0] * p.count[1] * p.count[2];
  each_result(p, [&](index_t at, const Place& e) {
    const W* from = columns + (e.n * (long long)p.made[1] + e.c) * taps * windows;
    W sum = 0;
    each_window(p, e, [&](int k, int x, int y, int z) {
      sum += from[(long long)k * windows + (x * p.count[1] + y) * p.count[2] + z];
    });
    out[at] = T(sum);
  });
}

// One channel per group; weight (outputs, taps), of which `each` outputs belong to a channel.
extern "C" __global__ void __launch_bounds__(256, 4) depthwise(T* out, const T* x, const T* weight, int each,
                                                               Pool p) {
  const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  each_result(p, [&](index_t at, const Place& o) {
    const T* from = x + o.n * p.a[0] + o.c / each * p.a[1];
    W sum = 0;
    each_element(p, o, p.a, [&](int k, long long where) {
      sum += W(weight[o.c * taps + k]) * W(from[where]);
    });
    out[at] = T(sum);
  });
}

extern "C" __global__ void __launch_bounds__(256, 4) depthwise_back(T* out, const T* g, const T* weight,
                                                                    int each, Pool p) {
  const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  each_result(p, [&](index_t at, const Place& e) {
    W sum = 0;
    for (int o = e.c * each; o < (e.c + 1) * each; ++o) {
      const T* from = g + e.n * p.a[0] + o * p.a[1];
      each_window(p, e, [&](int k, int x, int y, int z) {
        sum += W(weight[o * taps + k]) * W(from[offset(p.a, x, y, z)]);
      });
    }
    out[at] = T(sum);
  });
}

// One block for each output and tap: the sum over samples and windows of g (strides b) and x (strides a).
extern "C" __global__ void __launch_bounds__(256) depthwise_weight(T* out, const T* g, const T* x, int each,
                                                                   Pool p) {
  __shared__ W room[32];
  const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2], windows = p.count[0] * p.count[1] * p.count[2];
  const int o = blockIdx.x / taps, k = blockIdx.x % taps;
  const int tap[3] = {k / p.kernel[2] / p.kernel[1], k / p.kernel[2] % p.kernel[1], k % p.kernel[2]};
  W sum = 0;
  for (long long i = threadIdx.x; i < (long long)p.made[0] * windows; i += blockDim.x) {
    const int n = i / windows, w = i % windows;
    const int window[3] = {w / p.count[2] / p.count[1], w / p.count[2] % p.count[1], w % p.count[2]};
    long long from = n * p.a[0] + o / each * p.a[1];
    bool inside = true;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int at = window[d] * p.step[d] - p.before[d] + tap[d] * p.apart[d];
      inside = inside && at >= 0 && at < p.size[d];
      from += at * p.a[2 + d];
    }
    const long long to = n * p.b[0] + o * p.b[1] + offset(p.b, window[0], window[1], window[2]);
    if (inside) sum += W(g[to]) * W(x[from]);
  }
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) out[blockIdx.x] = T(sum);
}
"""

WINDOWS = source("convolution", CODE + GATHER,
                 ("gather", "collect", "depthwise", "depthwise_back", "depthwise_weight"), tuple(
    {"T": ctype(t), "I": "unsigned char", "LAST": "0", "VEC": "1", "WARP": "0", "SAMPLES_INSIDE": inside,
     "index_t": index} for t, inside, index in zip(FLOATS, "0101", ("int", "long long") * 2, strict=True)))
GATHERED = 1 << 26      # elements of a matrix of windows


class Windows:
    """The geometry of one convolution, and launches with it."""

    def __init__(self, dev: Any, size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                 count: Shape) -> None:
        self.dev, self.size, self.kernel, self.count = dev, size, kernel, count
        self.taps, self.windows = prod(kernel), prod(count)
        before, after = zip(*padding, strict=True)
        self.plain = self.taps == 1 and {*stride} == {1} and not any(before) and not any(after)
        self.geometry = {"size": size, "count": count, "kernel": kernel, "step": stride, "before": before,
                         "apart": dilation}

    def launch(self, name: str, arrays: Any, made: Shape, read: Any, total: int, numbers: Any = (),
               blocks: int = 0, inside: bool = False) -> None:
        """A kernel on `arrays`; `made` is the shape that Pool.made has, `read` gives the strides a and b."""
        fields = fields_of(made, total, read, self.geometry)
        kernel = self.dev.kernels(
            WINDOWS, name, T=ctype(arrays[0].dtype), I="unsigned char", LAST=0, VEC=1, WARP=0,
            SAMPLES_INSIDE=int(inside), index_t="int" if total < 2**30 else "long long")
        kernel((blocks or self.dev.kernels.blocks_for(total, 256),), (256,), (*arrays, *numbers, fields))

    def columns(self, x: Any, inside: bool = False) -> Any:
        """(n, c, taps, windows), or (c, taps, n, windows) if inside."""
        n, c = x.shape[:2]
        shape = (c, self.taps, n, self.windows) if inside else (n, c, self.taps, self.windows)
        made = self.dev.cp.empty(shape, x.dtype)
        self.launch("gather", (made, x), x.shape, (x,), made.size, inside=inside)
        return made

    def samples(self, n: int, channels: int) -> Iterator[slice]:
        """Runs of samples whose windows are few enough."""
        step = max(1, GATHERED // max(1, channels * self.taps * self.windows))
        return (slice(at, min(n, at + step)) for at in range(0, n, step))


def _wide(dtype: Any) -> Any:
    return np.float64 if dtype == np.float64 else np.float32


def forward(dev: Any, x: Any, w: Any, stride: Shape, padding: Pairs, dilation: Shape, groups: int,
            out: Any = None) -> Any:
    """The convolution, in C order."""
    count = counts("conv", x.shape[2:], w.shape[2:], stride, padding, dilation)
    p, w = Windows(dev, x.shape[2:], w.shape[2:], stride, padding, dilation, count), compact(dev, w)
    outputs, channels = w.shape[0] // groups, w.shape[1]
    y = dev.cp.empty((len(x), len(w), *count), x.dtype)
    if channels == 1:
        p.launch("depthwise", (y, x, w), y.shape, (x,), y.size, (np.int32(outputs),))
    else:
        filters = w.reshape(groups, outputs, channels * p.taps)
        for run in p.samples(len(x), x.shape[1]):
            columns = compact(dev, x[run]) if p.plain else p.columns(x[run])
            n = run.stop - run.start
            dev.blas.gemm(filters, columns.reshape(n, groups, channels * p.taps, p.windows),
                          y[run].reshape(n, groups, outputs, p.windows))
    return placed(y, y.dtype, out)


def forward_bias(dev: Any, x: Any, w: Any, b: Any, stride: Shape, padding: Pairs, dilation: Shape,
                 groups: int, out: Any = None) -> Any:
    y = forward(dev, x, w, stride, padding, dilation, groups, out)
    y += b.reshape(-1, *(1,) * len(stride))
    return y


def input_grad(dev: Any, g: Any, w: Any, size: Shape, stride: Shape, padding: Pairs, dilation: Shape,
               groups: int, out: Any = None) -> Any:
    p, w = Windows(dev, size, w.shape[2:], stride, padding, dilation, g.shape[2:]), compact(dev, w)
    outputs, channels = w.shape[0] // groups, w.shape[1]
    x = dev.cp.empty((len(g), channels * groups, *size), g.dtype)
    if channels == 1:
        p.launch("depthwise_back", (x, g, w), x.shape, (g,), x.size, (np.int32(outputs),))
        return placed(x, x.dtype, out)
    filters = w.reshape(groups, outputs, channels * p.taps)
    for run in p.samples(len(g), x.shape[1]):
        n = run.stop - run.start
        upstream = compact(dev, g[run]).reshape(n, groups, outputs, p.windows)
        if p.plain:
            dev.blas.gemm(filters, upstream, x[run].reshape(n, groups, channels, p.windows), transpose_a=True)
            continue
        columns = dev.cp.empty((n, groups, channels * p.taps, p.windows), _wide(g.dtype))
        dev.blas.gemm(filters, upstream, columns, transpose_a=True)
        p.launch("collect", (x[run], columns), x[run].shape, (), x[run].size)
    return placed(x, x.dtype, out)


def weight_grad(dev: Any, g: Any, x: Any, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                groups: int, out: Any = None) -> Any:
    p = Windows(dev, x.shape[2:], kernel, stride, padding, dilation, g.shape[2:])
    outputs, channels = g.shape[1] // groups, x.shape[1] // groups
    shape = (g.shape[1], channels, *kernel)
    if channels == 1:
        w = dev.cp.empty(shape, g.dtype)
        p.launch("depthwise_weight", (w, g, x), x.shape, (x, g), w.size, (np.int32(outputs),), blocks=w.size)
        return placed(w, w.dtype, out)
    total = dev.cp.empty((groups, outputs, channels * p.taps), _wide(g.dtype))
    for run in p.samples(len(x), x.shape[1]):
        n = run.stop - run.start
        columns = p.columns(x[run], inside=True).reshape(groups, channels * p.taps, n * p.windows)
        upstream = compact(dev, g[run].swapaxes(0, 1)).reshape(groups, outputs, n * p.windows)
        dev.blas.gemm(upstream, columns, total, transpose_b=True, beta=float(run.start > 0))
    return placed(total.reshape(shape), g.dtype, out)
