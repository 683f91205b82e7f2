"""Random numbers and dropout on CUDA: the bits of meshtape.runtime.philox, one thread for each of its blocks.

A piece lies in runs of elements that are neighbours in the whole tensor. A thread makes one Philox block of 4
words and from it the elements of a run that fall into the block: 8 if they take 32 bits each, otherwise 4.
Every number is made by the operations that philox.py names, each rounded, so that all bits are the CPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime import dtypes, philox
from meshtape.runtime.cuda.kernels.arrays import compact
from meshtape.runtime.cuda.kernels.exact import EXACT
from meshtape.runtime.cuda.kernels.sorting import sort_keys
from meshtape.runtime.cuda.source import ctype, source
from meshtape.runtime.op import DeviceKernel
from meshtape.runtime.shards import Shape

BLOCKS = EXACT + r"""
typedef exact<double> real;

// `count` runs of `length` elements. Run r, counted in C order over (.., n1, n2), begins at element `start`
// plus its indices times s0, s1, s2 of the whole tensor.
struct Runs {
  long long count, length, start, n1, n2, s0, s1, s2;
  __device__ long long first(long long run) const {
    if (count == 1) return start;
    const long long outer = run / n2;
    return start + outer / n1 * s0 + outer % n1 * s1 + run % n2 * s2;
  }
};

__device__ inline void philox(uint64 (&c)[4], uint64 block, uint64 k0, uint64 k1) {
  c[0] = block + 1, c[1] = c[2] = c[3] = 0;
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint64 hi0 = __umul64hi(MULTIPLIER0, c[0]), lo0 = MULTIPLIER0 * c[0];
    const uint64 hi1 = __umul64hi(MULTIPLIER1, c[2]), lo1 = MULTIPLIER1 * c[2];
    c[0] = hi1 ^ c[1] ^ k0, c[1] = lo1, c[2] = hi0 ^ c[3] ^ k1, c[3] = lo0;
    k0 += WEYL0, k1 += WEYL1;
  }
}

// use(words, at, lo, hi) for every block of N elements that a run touches: element lo <= i < hi of the block
// is element at + i of the piece.
template <int N, class F>
__device__ void each_block(const Runs& p, const long long* seed, const long long* draw, F use) {
  const uint64 k0 = *seed, k1 = *draw;
  const long long span = (p.length + 2 * N - 2) / N, items = p.count * span;
  for (long long item = blockIdx.x * (long long)blockDim.x + threadIdx.x; item < items;
       item += (long long)gridDim.x * blockDim.x) {
    const long long run = p.count == 1 ? 0 : item / span, first = p.first(run);
    const long long block = first / N + (item - run * span), from = block * N - first, left = p.length - from;
    if (left <= 0) continue;
    uint64 words[4];
    philox(words, block, k0, k1);
    use(words, run * p.length + from, from < 0 ? int(-from) : 0, left < N ? int(left) : N);
  }
}

__device__ inline unsigned half_of(const uint64* words, int i) {
  return unsigned(words[i / 2] >> 32 * (i % 2));
}

// Elements lo to hi of v, all at once where they are N and memory is aligned.
template <class A, int N> struct alignas(sizeof(A) * N < 16 ? sizeof(A) * N : 16) Pack { A v[N]; };

template <class A, int N> __device__ inline bool whole(const A* at, int lo, int hi) {
  return lo == 0 && hi == N && (uint64)at % alignof(Pack<A, N>) == 0;
}
template <class A, int N> __device__ inline void store(A* at, const Pack<A, N>& made, int lo, int hi) {
  if (whole<A, N>(at, lo, hi)) { *reinterpret_cast<Pack<A, N>*>(at) = made; return; }
#pragma unroll
  for (int i = 0; i < N; ++i) if (lo <= i && i < hi) at[i] = made.v[i];
}
template <class A, int N> __device__ inline void load(Pack<A, N>& found, const A* at, int lo, int hi) {
  if (whole<A, N>(at, lo, hi)) { found = *reinterpret_cast<const Pack<A, N>*>(at); return; }
#pragma unroll
  for (int i = 0; i < N; ++i) if (lo <= i && i < hi) found.v[i] = at[i];
}

// A double as NumPy rounds it: to half precision at once, to bfloat16 by way of float.
template <class A> __device__ inline A rounded(double x) { return A(x); }
template <> __device__ inline bfloat16 rounded<bfloat16>(double x) { return bfloat16(float(x)); }
template <> __device__ inline float16 rounded<float16>(double x) {
  float near = float(x);
  if (double(near) != x && x == x) {       // towards zero, and odd: the next rounding decides as for x
    unsigned bits = __float_as_uint(near);
    if (fabs(double(near)) > fabs(x)) --bits;
    near = __uint_as_float(bits | 1);
  }
  return float16(near);
}

template <int N> __device__ inline real polynomial(const double (&c)[N], real x) {
  real out = c[N - 1] * x;
#pragma unroll
  for (int i = N - 2; i > 0; --i) out = (out + c[i]) * x;
  return out + c[0];
}

// philox._log
__device__ inline real log_of(double a) {
  const double table[] = {LOG};
  const long long bits = __double_as_longlong(a) + ((1023ll << 52) - ROOT);
  const real k = double((bits >> 52) - 1023), f = __longlong_as_double((bits & ((1ll << 52) - 1)) + ROOT) - 1;
  const real s = f / (f + 2), half = 0.5 * f * f, square = s * s;
  const real rest = square * polynomial(table, square);
  return k * LN2_HIGH - ((half - (s * (half + rest) + k * LN2_LOW)) - f);
}

// philox._box_muller
__device__ inline void box_muller(uint64 first, uint64 second, double& z0, double& z1) {
  const double sines[] = {SIN}, cosines[] = {COS};
  const real radius = root(log_of(double((first >> 11) + 1) * 0x1p-53) * -2);
  const long long turns = second >> 11, q = (turns + (1ll << 50)) >> 51;
  const real u = real(double(turns - (q << 51))) * RADIANS, square = u * u;
  const real s = u + square * u * polynomial(sines, square);
  const real half = 0.5 * square, near = 1 - half;
  const real c = near + (((1 - near) - half) + square * (square * polynomial(cosines, square)));
  const real cosine = q & 1 ? s : c, sine = q & 1 ? c : s;
  z0 = (radius * ((q + 1) & 2 ? -cosine : cosine)).v;
  z1 = (radius * (q & 2 ? -sine : sine)).v;
}

"""

REALS = r"""
const int WIDE = sizeof(T) == 8, EACH = WIDE ? 4 : 8;

extern "C" __global__ void uniform(T* out, const long long* seed, const long long* draw, const double* low,
                                   const double* high, Runs p) {
  typedef exact<acc_t<T>> A;
  const A width = acc_t<T>(*high - *low), base = acc_t<T>(*low);
  const bool unit = *low == 0 && *high == 1;
  each_block<EACH>(p, seed, draw, [&](const uint64* words, long long at, int lo, int hi) {
    Pack<T, EACH> made;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      A u = WIDE ? acc_t<T>(double(words[i % 4] >> 11) * 0x1p-53)
                 : acc_t<T>(float(half_of(words, i) >> 8) * 0x1p-24f);
      if (!unit) u = u * width + base;
      made.v[i] = T(u.v);
    }
    store(out + at, made, lo, hi);
  });
}

extern "C" __global__ void normal(T* out, const long long* seed, const long long* draw, const double* mean,
                                  const double* std, Runs p) {
  const real shift = *mean, scale = *std;
  const bool standard = *mean == 0 && *std == 1;
  each_block<4>(p, seed, draw, [&](const uint64* words, long long at, int lo, int hi) {
    double z[4];
    Pack<T, 4> made;
    box_muller(words[0], words[1], z[0], z[1]);
    box_muller(words[2], words[3], z[2], z[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) made.v[i] = rounded<T>(standard ? z[i] : (z[i] * scale + shift).v);
    store(out + at, made, lo, hi);
  });
}

// x * kept * factor, each product rounded to T. Values may be written over x.
extern "C" __global__ void dropout(T* out, const T* x, const long long* seed, const long long* draw,
                                   uint64 threshold, double factor, Runs p) {
  typedef acc_t<T> A;
  each_block<8>(p, seed, draw, [&](const uint64* words, long long at, int lo, int hi) {
    Pack<T, 8> values;
    load(values, x + at, lo, hi);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const T kept = T(A(values.v[i]) * A(half_of(words, i) >= threshold));
      values.v[i] = T(A(kept) * A(factor));
    }
    store(out + at, values, lo, hi);
  });
}
"""

ANY = r"""
extern "C" __global__ void integers(T* out, const long long* seed, const long long* draw,
                                    const long long* low, const long long* high, Runs p) {
  const uint64 base = *low, extent = uint64(*high) - base;     // 0 stands for 2^64
  each_block<4>(p, seed, draw, [&](const uint64* words, long long at, int lo, int hi) {
    Pack<T, 4> made;
#pragma unroll
    for (int i = 0; i < 4; ++i) made.v[i] = T((extent ? __umul64hi(words[i], extent) : words[i]) + base);
    store(out + at, made, lo, hi);
  });
}

extern "C" __global__ void bernoulli(T* out, const long long* seed, const long long* draw,
                                     const double* p_true, Runs p) {
  const long long threshold = (long long)rint(*p_true * 4294967296.0);
  each_block<8>(p, seed, draw, [&](const uint64* words, long long at, int lo, int hi) {
    Pack<T, 8> made;
#pragma unroll
    for (int i = 0; i < 8; ++i) made.v[i] = T(float((long long)half_of(words, i) < threshold));
    store(out + at, made, lo, hi);
  });
}
"""


def _constants() -> str:
    """philox.py's numbers as macros."""
    words = [f"{name}{k} {value:#x}ull" for name, values in
             (("MULTIPLIER", philox.MULTIPLIERS), ("WEYL", philox.WEYL)) for k, value in enumerate(values)]
    tables = [f"{name} {', '.join(map(repr, values))}" for name, values in
              (("LOG", philox.LOG), ("SIN", philox.SIN), ("COS", philox.COS))]
    single = [f"ROUNDS {philox.ROUNDS}", f"ROOT {philox.ROOT:#x}ll", f"RADIANS {float(philox.RADIANS)!r}",
              f"LN2_HIGH {philox.LN2[0]!r}", f"LN2_LOW {philox.LN2[1]!r}"]
    return "".join(f"#define {line}\n" for line in (*words, *tables, *single))


INTEGERS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
FLOATS = ("float32", "float64", "float16", "bfloat16")
VALUES = source("random_values", _constants() + BLOCKS + REALS, ("uniform", "normal", "dropout"),
                tuple({"T": ctype(name)} for name in FLOATS))
CHOICES = source("random_choices", _constants() + BLOCKS + ANY, ("integers", "bernoulli"),
                 tuple({"T": ctype(name)} for name in (*INTEGERS, "float32", "bfloat16")))

RUNS = np.dtype([(name, np.int64) for name in ("count", "length", "start", "n1", "n2", "s0", "s1", "s2")])


# --- pieces as runs ---------------------------------------------------------------------------------

def runs_of(shape: Shape, offset: Shape | None, whole: Shape | None) -> tuple[int, ...] | None:
    """The fields of Runs for a piece; None if its runs begin in more than three nested loops."""
    whole, offset = shape if whole is None else whole, (0,) * len(shape) if offset is None else offset
    strides = [prod(whole[d + 1:]) for d in range(len(whole))]
    start = sum(o * s for o, s in zip(offset, strides, strict=True))
    inner = len(shape)
    while inner and shape[inner:] == whole[inner:]:
        inner -= 1
    length = prod(shape[inner:])
    loops: list[tuple[int, int]] = []               # extents and strides, outermost first
    for n, stride in zip(shape[:inner], strides, strict=False):
        if loops and loops[-1][1] == n * stride:
            loops[-1] = loops[-1][0] * n, stride
        elif n != 1:
            loops.append((n, stride))
    if len(loops) > 3:
        return None
    (_, s0), (n1, s1), (n2, s2) = [(1, 0)] * (3 - len(loops)) + loops
    return prod(n for n, _ in loops), length, start, n1, n2, s0, s1, s2


def _launch(dev: Any, made: Any, which: Any, name: str, each: int, args: Sequence[Any],
            offset: Shape | None, whole: Shape | None) -> Any:
    """Run a kernel over the piece that `made` is; returns `made`."""
    if made.size:
        fields = runs_of(made.shape, offset, whole)
        assert fields is not None
        items = fields[0] * ((fields[1] + 2 * each - 2) // each)
        kernel = dev.kernels(which, name, T=ctype(made.dtype))
        kernel((dev.kernels.blocks_for(items, 256),), (256,), (made, *args, np.array(fields, RUNS)))
    return made


# --- kernels of rows --------------------------------------------------------------------------------

def _row(name: str, which: Any, takes: Sequence[str], each: int, numbers: str) -> DeviceKernel:
    """A kernel that makes values from seed, draw and other numbers."""
    def run(dev: Any, *given: Any, shape: Shape, dtype: str, offset: Shape | None,
            whole: Shape | None) -> Any:
        made = dev.cp.empty(shape, dtypes.canonical(dtype))
        return _launch(dev, made, which, name, each, given, offset, whole)

    def supports(shapes: Any, given: Any, attrs: dict[str, Any]) -> bool:
        return dtypes.canonical(attrs["dtype"]).name in takes and _has_runs(attrs["shape"], attrs)
    return DeviceKernel(run, supports, numbers)


def _has_runs(shape: Shape, attrs: dict[str, Any]) -> bool:
    return runs_of(shape, attrs["offset"], attrs["whole"]) is not None


UNIFORM = _row("uniform", VALUES, FLOATS, 4, "iidd")
NORMAL = _row("normal", VALUES, FLOATS, 4, "iidd")
INTEGER = _row("integers", CHOICES, INTEGERS[1:], 4, "iiii")
BERNOULLI = _row("bernoulli", CHOICES, (*INTEGERS, *FLOATS), 8, "iid")


def _dropout(dev: Any, x: Any, seed: Any, draw: Any, p: float, offset: Shape | None,
             whole: Shape | None) -> Any:
    if p == 0:
        return x
    if p == 1:
        return dev.cp.zeros_like(x, order="C")
    x = compact(dev, x)
    threshold = np.uint64(round(p * 2**32))
    # NumPy rounds the factor as well: to float16 for that, but not to bfloat16.
    factor = np.float64(np.array(1 / (1 - p)).astype(np.float32 if x.dtype.name == "bfloat16" else x.dtype))
    return _launch(dev, dev.cp.empty_like(x), VALUES, "dropout", 8, (x, seed, draw, threshold, factor),
                   offset, whole)


DROPOUT = DeviceKernel(
    _dropout, lambda shapes, given, attrs: given[0].name in FLOATS and _has_runs(shapes[0], attrs), "ii")


def _permutation(dev: Any, seed: Any, draw: Any, n: int, offset: int, count: int | None) -> Any:
    """As the plain kernel: the stable order of n random words."""
    cp = dev.cp
    zero = cp.zeros((), cp.int64)
    words = _launch(dev, cp.empty(n, cp.uint64), CHOICES, "integers", 4, (seed, draw, zero, zero), None, None)
    order = sort_keys(dev, words, 64)[1].astype(cp.int64)
    return order[offset:] if count is None else order[offset:offset + count]


PERMUTATION = DeviceKernel(_permutation, lambda shapes, given, attrs: attrs["n"] < 2**31, "ii")
