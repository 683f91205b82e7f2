"""Optimizer updates on CUDA: one launch for up to 40 tensors of a dtype.

Addresses and sizes go to the kernel by value, as one struct: nothing is uploaded, so that a captured graph
replays with the addresses of its capture. Tensors are divided into chunks, and a block looks up whose chunk
it has. Numbers are read on the device (step 0 changes nothing), and the arithmetic is the plain kernels',
operation by operation: float32 results differ from theirs by the last bits of a power at most. A new value
may be written over the old one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels.arrays import compact
from meshtape.runtime.cuda.kernels.exact import EXACT
from meshtape.runtime.cuda.source import Source, ctype, source
from meshtape.runtime.op import DeviceKernel

TENSORS = 40            # whose table fits into the 4 KB that a kernel's arguments may take
CHUNK = 4096            # elements
FLOATS = ("float32", "float64", "float16", "bfloat16")

TABLE = np.dtype([("size", np.int64, TENSORS), ("old", np.uint64, (5, TENSORS)),
                  ("new", np.uint64, (4, TENSORS)), ("first", np.uint32, TENSORS + 1), ("count", np.int32)])

CODE = EXACT + f"#define TENSORS {TENSORS}\n#define CHUNK {CHUNK}\n" + r"""
typedef acc_t<T> A;
typedef exact<A> real;
const int EACH = 16 / sizeof(T);

// first[k]: the first chunk of tensor k; first[count]: how many there are.
struct Table {
  long long size[TENSORS];
  T* before[5][TENSORS];
  T* after[4][TENSORS];
  unsigned first[TENSORS + 1];
  int count;
};

__device__ inline int whose(const Table& table, unsigned chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first[middle] <= chunk) low = middle; else high = middle;
  }
  return low;
}

// work(k, begin, end) for the chunks of this block: elements begin to end of tensor k.
template <class F> __device__ void each_chunk(const Table& table, F work) {
  for (unsigned chunk = blockIdx.x; chunk < table.first[table.count]; chunk += gridDim.x) {
    const int k = whose(table, chunk);
    const long long begin = (chunk - table.first[k]) * (long long)CHUNK, end = begin + CHUNK;
    work(k, begin, end < table.size[k] ? end : table.size[k]);
  }
}
"""

UPDATE = r"""
// step(after, before) on every element: N numbers before, N - 2 or fewer (M) after.
template <int N, int M, class F> __device__ void update_all(const Table& table, F step) {
  each_chunk(table, [&](int k, long long begin, long long end) {
    uint64 address = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) address |= (uint64)table.before[i][k];
#pragma unroll
    for (int i = 0; i < M; ++i) address |= (uint64)table.after[i][k];
    long long at = begin;
    if (address % 16 == 0) {
      const long long whole = (end - begin) / EACH * EACH;
      for (long long i = begin + threadIdx.x * EACH; i < begin + whole; i += 256 * EACH) {
        Vec<T, EACH> given[N], made[M];
#pragma unroll
        for (int j = 0; j < N; ++j) given[j] = load<EACH>(table.before[j][k] + i);
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
          real before[N], after[M];
#pragma unroll
          for (int j = 0; j < N; ++j) before[j] = A(given[j][e]);
          step(after, before);
#pragma unroll
          for (int j = 0; j < M; ++j) made[j][e] = T(after[j].v);
        }
#pragma unroll
        for (int j = 0; j < M; ++j) store(table.after[j][k] + i, made[j]);
      }
      at += whole;
    }
    for (at += threadIdx.x; at < end; at += 256) {
      real before[N], after[M];
#pragma unroll
      for (int j = 0; j < N; ++j) before[j] = A(table.before[j][k][at]);
      step(after, before);
#pragma unroll
      for (int j = 0; j < M; ++j) table.after[j][k][at] = T(after[j].v);
    }
  });
}
"""

SGD = r"""
extern "C" __global__ void __launch_bounds__(256, 4) sgd(
    const __grid_constant__ Table table, const long long* step, const double* dampening, const double* lr,
    const double* momentum, const double* weight_decay) {
  const bool skips = *step == 0;
  const real rate = A(-*lr), slow = A(*momentum), kept = A(1 - *dampening), decay = A(*weight_decay);
  [[maybe_unused]] const bool damped = *dampening != 0;
  const bool decays = *weight_decay != 0;
  update_all<2 + MOMENTUM, 1 + MOMENTUM>(table, [&](real* after, const real* before) {
    const real p = before[0];
    if (skips) {
      after[0] = p;
#if MOMENTUM
      after[1] = before[2];
#endif
      return;
    }
    real g = MAXIMIZE ? -before[1] : before[1];
    if (decays) g = g + p * decay;
#if MOMENTUM
    const real buffer = before[2] * slow + (damped ? g * kept : g);
    after[1] = buffer;
    g = NESTEROV ? g + buffer * slow : buffer;
#endif
    after[0] = p + g * rate;
  });
}
"""

ADAM = r"""
extern "C" __global__ void __launch_bounds__(256, sizeof(T) == 8 ? 2 : 4) adam(
    const __grid_constant__ Table table, const long long* step, const double* lr, const double* beta1,
    const double* beta2, const double* eps, const double* weight_decay) {
  __shared__ A shared[2];
  if (threadIdx.x == 0) {
    const double correction = sqrt(1 - pow(*beta2, double(*step)));
    shared[0] = A(*lr * correction / (1 - pow(*beta1, double(*step))));
    shared[1] = A(*eps * correction);
  }
  __syncthreads();
  const real rate = shared[0], floor = shared[1];
  const real new1 = A(1 - *beta1), new2 = A(1 - *beta2), old2 = A(*beta2);
  const real shrink = A(1 - mul_rn(*lr, *weight_decay)), decay = A(*weight_decay);
  const bool decays = *weight_decay != 0, skips = *step == 0;
  update_all<4 + AMSGRAD, 3 + AMSGRAD>(table, [&](real* after, const real* before) {
    if (skips) {
      after[0] = before[0];
#pragma unroll
      for (int j = 1; j < 3 + AMSGRAD; ++j) after[j] = before[j + 1];
      return;
    }
    real p = before[0], g = MAXIMIZE ? -before[1] : before[1];
    if (decays && DECOUPLED) p = p * shrink;
    else if (decays) g = g + p * decay;
    const real m = before[2] + (g - before[2]) * new1;
    real v = before[3] * old2 + g * g * new2;
    after[1] = m, after[2] = v;
#if AMSGRAD
    after[3] = v = maximum(before[4].v, v.v);
#endif
    after[0] = p - m / (root(v) + floor) * rate;
  });
}
"""

SQUARES = r"""
// partial[block] = the sum of squares of the block's elements.
extern "C" __global__ void __launch_bounds__(256) squares(const __grid_constant__ Table table, A* partial) {
  __shared__ A room[32];
  A sum = 0;
  each_chunk(table, [&](int k, long long begin, long long end) {
    const T* x = table.before[0][k];
    long long at = begin;
    if ((uint64)x % 16 == 0) {
      const long long whole = (end - begin) / EACH * EACH;
      for (long long i = begin + threadIdx.x * EACH; i < begin + whole; i += 256 * EACH) {
        const Vec<T, EACH> given = load<EACH>(x + i);
#pragma unroll
        for (int e = 0; e < EACH; ++e) sum += A(given[e]) * A(given[e]);
      }
      at += whole;
    }
    for (at += threadIdx.x; at < end; at += 256) sum += A(x[at]) * A(x[at]);
  });
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// out = the sum of n numbers, by one block.
extern "C" __global__ void __launch_bounds__(1024) total(A* out, const A* partial, int n) {
  __shared__ A room[32];
  A sum = 0;
  for (int i = threadIdx.x; i < n; i += 1024) sum += partial[i];
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) *out = sum;
}
"""


NONFINITE_CODE = r"""
// partial[block] = 1 if the block has an element that is infinite or NaN, else 0.
extern "C" __global__ void __launch_bounds__(256) nonfinite(
    const __grid_constant__ Table table, float* partial) {
  bool bad = false;
  each_chunk(table, [&](int k, long long begin, long long end) {
    const T* x = table.before[0][k];
    auto look = [&](T value) { const A v = A(value); bad |= !(v - v == 0); };
    long long at = begin;
    if ((uint64)x % 16 == 0) {
      const long long whole = (end - begin) / EACH * EACH;
      for (long long i = begin + threadIdx.x * EACH; i < begin + whole; i += 256 * EACH) {
        const Vec<T, EACH> given = load<EACH>(x + i);
#pragma unroll
        for (int e = 0; e < EACH; ++e) look(given[e]);
      }
      at += whole;
    }
    for (at += threadIdx.x; at < end; at += 256) look(x[at]);
  });
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) partial[blockIdx.x] = bad;
}

// out = 1 if one of n numbers is not 0, else 0; by one block.
extern "C" __global__ void __launch_bounds__(256) any(float* out, const float* partial, int n) {
  bool bad = false;
  for (int i = threadIdx.x; i < n; i += 256) bad |= partial[i] != 0;
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) *out = bad;
}
"""


def _variants(*flags: dict[str, int]) -> tuple[dict[str, str], ...]:
    return tuple({"T": ctype(name), **{key: str(value) for key, value in given.items()}}
                 for name in FLOATS for given in flags)


SGD_SOURCE = source("sgd", CODE + UPDATE + SGD, ("sgd",), _variants(
    {"MOMENTUM": 0, "NESTEROV": 0, "MAXIMIZE": 1}, {"MOMENTUM": 1, "NESTEROV": 0, "MAXIMIZE": 0},
    {"MOMENTUM": 1, "NESTEROV": 1, "MAXIMIZE": 1}))
ADAM_SOURCE = source("adam", CODE + UPDATE + ADAM, ("adam",), _variants(
    {"DECOUPLED": 1, "AMSGRAD": 0, "MAXIMIZE": 0}, {"DECOUPLED": 0, "AMSGRAD": 1, "MAXIMIZE": 1}))
NONFINITE_SOURCE = source("nonfinite", CODE + NONFINITE_CODE, ("nonfinite", "any"), _variants({}))
SQUARES_SOURCE = source("sum_of_squares", CODE + SQUARES, ("squares", "total"), _variants({}))


# --- launches ---------------------------------------------------------------------------------------

def tables(old: Sequence[Sequence[Any]], new: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, Any, int]]:
    """(dtype, table, number of chunks) for tensors old[i][k] and new[j][k], all contiguous; of k those of one
    dtype together, at most TENSORS at a time, without empty ones.
    """
    alike: dict[Any, list[int]] = {}
    for k, x in enumerate(old[0]):
        if x.size:
            alike.setdefault(x.dtype, []).append(k)
    for dtype, members in alike.items():
        for start in range(0, len(members), TENSORS):
            part = members[start:start + TENSORS]
            table = np.zeros((), TABLE)
            sizes = np.array([old[0][k].size for k in part])
            table["size"][:len(part)] = sizes
            for field, arrays in (("old", old), ("new", new)):
                for row, group in enumerate(arrays):
                    table[field][row, :len(part)] = [group[k].data.ptr for k in part]
            ends = np.cumsum(-(-sizes // CHUNK))
            table["first"][1:len(part) + 1] = ends
            table["count"] = len(part)
            yield dtype, table, int(ends[-1])


def _update(dev: Any, which: Source, flags: dict[str, Any], scalars: Sequence[Any], tensors: Sequence[Any],
            n: int, out: Sequence[Any] | None) -> list[Any]:
    """Launch the updates of n parameters. Results are the arrays of `out` where these can be written to."""
    groups = len(tensors) // n
    old = [[compact(dev, x) for x in tensors[i * n:(i + 1) * n]] for i in range(groups)]
    given = list(out) if out is not None else [None] * (groups - 1) * n
    made = [x if x is not None and x.flags.c_contiguous and x.dtype == like.dtype
            else dev.cp.empty(like.shape, like.dtype)
            for x, like in zip(given, old[0] * (groups - 1), strict=True)]
    new = [made[i * n:(i + 1) * n] for i in range(groups - 1)]
    macros = {key: int(value) for key, value in flags.items()}
    for dtype, table, chunks in tables(old, new):
        kernel = dev.kernels(which, which.functions[0], T=ctype(dtype), **macros)
        kernel((dev.kernels.blocks_for(chunks, 1),), (256,), (table, *scalars))
    return made


def _all_floating(first: int) -> Any:
    return lambda shapes, given, attrs: all(d.name in FLOATS for d in given[first:])


def _sgd(dev: Any, *given: Any, n: int, nesterov: bool, maximize: bool, has_momentum: bool,
         out: Any = None) -> list[Any]:
    flags = {"MOMENTUM": has_momentum, "NESTEROV": nesterov, "MAXIMIZE": maximize}
    return _update(dev, SGD_SOURCE, flags, given[:5], given[5:], n, out)


def _adam(dev: Any, *given: Any, n: int, decoupled: bool, amsgrad: bool, maximize: bool,
          out: Any = None) -> list[Any]:
    flags = {"DECOUPLED": decoupled, "AMSGRAD": amsgrad, "MAXIMIZE": maximize}
    return _update(dev, ADAM_SOURCE, flags, given[:6], given[6:], n, out)


def accumulator(dtype: Any) -> Any:
    """What numbers of a floating dtype are summed in."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def _sum_of_squares(dev: Any, *tensors: Any) -> Any:
    cp, dtype = dev.cp, accumulator(tensors[0].dtype)
    held = [compact(dev, x) for x in tensors]       # copies live until their last launch
    launches = list(tables([held], []))
    if not launches:
        return cp.zeros((), dtype)
    blocks = [dev.kernels.blocks_for(chunks, 1) for _, _, chunks in launches]
    partial, made, at = cp.empty(sum(blocks), dtype), cp.empty((), dtype), 0
    for (kind, table, _), count in zip(launches, blocks, strict=True):
        kernel = dev.kernels(SQUARES_SOURCE, "squares", T=ctype(kind))
        kernel((count,), (256,), (table, partial[at:at + count]))
        at += count
    dev.kernels(SQUARES_SOURCE, "total", T=ctype(dtype))((1,), (1024,), (made, partial, np.int32(at)))
    return made


def _nonfinite(dev: Any, *tensors: Any) -> Any:
    cp = dev.cp
    held = [compact(dev, x) for x in tensors]       # copies live until their last launch
    launches = list(tables([held], []))
    if not launches:
        return cp.zeros((), np.float32)
    blocks = [dev.kernels.blocks_for(chunks, 1) for _, _, chunks in launches]
    partial, made, at = cp.empty(sum(blocks), np.float32), cp.empty((), np.float32), 0
    for (kind, table, _), count in zip(launches, blocks, strict=True):
        kernel = dev.kernels(NONFINITE_SOURCE, "nonfinite", T=ctype(kind))
        kernel((count,), (256,), (table, partial[at:at + count]))
        at += count
    dev.kernels(NONFINITE_SOURCE, "any", T=ctype(np.dtype(np.float32)))(
        (1,), (256,), (made, partial, np.int32(at)))
    return made


def _one_accumulator(shapes: Any, given: Any, attrs: Any) -> bool:
    return all(d.name in FLOATS for d in given) and len({accumulator(d) for d in given}) == 1


SGD_UPDATE = DeviceKernel(_sgd, _all_floating(5), "idddd")
ADAM_UPDATE = DeviceKernel(_adam, _all_floating(6), "iddddd")
NONFINITE = DeviceKernel(_nonfinite, _all_floating(0))
SUM_OF_SQUARES = DeviceKernel(_sum_of_squares, _one_accumulator)
