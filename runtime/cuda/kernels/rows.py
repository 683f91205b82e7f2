"""Rows of a matrix in the registers of threads that share them: what softmax, losses and norms build on.

A row is shared by GROUP threads: part of a warp, a warp, or (more than 32) a block. If HELD, each keeps PER
vectors of V neighbouring elements, so a row is read once; longer rows are read once for every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.source import ctype

FLOATS = ("float32", "float64", "float16", "bfloat16")
BLOCK = 128             # threads of a block whose rows belong to a warp or less
MOST = 1024             # threads of a block; of float64 half as many, and half as many elements in each
LAST = 2**31 - 1        # blocks of a grid

# Macros: T, V, ALIGNED. `A` is what T is computed in.
ACCESS = r'''
typedef acc_t<T> A;

// V elements, in one access if rows are ALIGNED. Which thread has which elements does not depend on it.
template <class E_> __device__ __forceinline__ Vec<E_, V> read(const E_* p) {
#if ALIGNED
  return load<V>(p);
#else
  Vec<E_, V> x;
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = p[i];
  return x;
#endif
}
template <class E_> __device__ __forceinline__ void write(E_* p, const Vec<E_, V>& x) {
#if ALIGNED
  store(p, x);
#else
#pragma unroll
  for (int i = 0; i < V; ++i) p[i] = x[i];
#endif
}
'''

# Macros: those, GROUP, PER, HELD.
ROWS = ACCESS + r'''
constexpr int THREADS = GROUP > 32 ? GROUP : 128;
constexpr int AT_ONCE = THREADS / GROUP;            // rows of a block
[[maybe_unused]] constexpr int ROOM = GROUP > 32 ? 32 : 1;     // shared memory of a reduction over a group

// f over the threads of this one's group, of N numbers at once.
template <int N, class F> __device__ __forceinline__ void over_group(A (&x)[N], A* room, A neutral, F f) {
  if (GROUP > 32) {
    block_reduce(x, room, neutral, f);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = lanes_reduce<GROUP < 32 ? GROUP : 32>(x[k], f);
  }
}
template <class F> __device__ __forceinline__ A over_group(A x, A* room, A neutral, F f) {
  A one[1] = {x};
  over_group(one, room, neutral, f);
  return one[0];
}

__device__ __forceinline__ int lane_of_group() { return threadIdx.x % GROUP; }
// The column of this thread's vector k.
__device__ __forceinline__ int column(int k) { return (k * GROUP + lane_of_group()) * V; }

// f(k, column) for every vector of this thread in a row of so many columns; k counts to PER if HELD.
template <class F> __device__ __forceinline__ void vectors(int width, F f) {
#if HELD
#pragma unroll
  for (int k = 0; k < PER; ++k)
    if (column(k) < width) f(k, column(k));
#else
  for (int c = column(0); c < width; c += GROUP * V) f(0, c);
#endif
}

// Rows of this block, `AT_ONCE` at a time: f(row, whether there is such a row). All threads of a warp call f.
template <class F> __device__ __forceinline__ void each_row(index_t rows, F f) {
  for (index_t first = (index_t)blockIdx.x * AT_ONCE; first < rows; first += (index_t)gridDim.x * AT_ONCE) {
    const index_t row = first + threadIdx.x / GROUP;
    f(row, row < rows);
  }
}
'''


class Plan(NamedTuple):
    """How rows are shared: macros of the source, and threads of a block."""

    macros: dict[str, Any]
    threads: int
    at_once: int


def plan(width: int, dtype: Any, arrays: Sequence[Any], held: int, most_threads: int = MOST) -> Plan:
    """For rows of `width` > 0 elements of `dtype`, of which a thread keeps at most `held`; `arrays` are
    matrices of such rows, or vectors along them, perhaps of wider dtypes.
    """
    v, double = 16 // max(a.dtype.itemsize for a in arrays), dtype.itemsize // 8 + 1
    v = v if width % v == 0 else 1
    vectors, most, threads = -(-width // v), max(1, held // double // v), most_threads // double
    if vectors <= 32 * most:
        group = min(32, _power(vectors))
    else:
        group = min(threads, max(64, _power(-(-vectors // most))))
    keeps = vectors <= group * most
    macros = {"T": ctype(dtype), "V": v, "GROUP": group, "PER": -(-vectors // group) if keeps else 1,
              "HELD": int(keeps), "ALIGNED": int(v == 1 or not any(a.data.ptr % 16 for a in arrays))}
    threads = max(group, BLOCK) if group <= 32 else group
    return Plan(macros, threads, threads // group)


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def as_rows(dev: Any, x: Any, ndim: int) -> Any:
    """`x` as a contiguous matrix (rows, width) whose rows are its last `ndim` dimensions."""
    split = x.ndim - ndim
    return dev.cp.ascontiguousarray(x).reshape(prod(x.shape[:split]), prod(x.shape[split:]))


def wide(dtype: Any) -> Any:
    """The dtype in which elements of a floating `dtype` are summed."""
    return dtypes.float32 if dtype.itemsize == 2 else dtype


def floating(*given: Any) -> bool:
    """Whether all dtypes are floating; None, of a Python scalar, is not (and equals float64)."""
    return all(d is not None and d.name in FLOATS for d in given)


def short(*given: Any) -> bool:
    """Whether all dtypes are floating and computed in float32."""
    return floating(*given) and all(d.itemsize <= 4 for d in given)


def equal_floats(shapes: Sequence[Any], given: Sequence[Any], attrs: Any = None) -> bool:
    """Whether all inputs are tensors of one floating dtype: the usual `supports`."""
    return floating(*given) and len({d.name for d in given}) == 1


def variants(held: int, *more: dict[str, Any], most_threads: int = MOST) -> tuple[dict[str, str], ...]:
    """Macros that tests compile a source with: every dtype, the widest rows held and a longer one."""
    found = []
    for name in FLOATS:
        size = {"float64": 8, "float32": 4}.get(name, 2)
        v, double = 16 // size, size // 8 + 1
        most, threads = held // double, most_threads // double
        shapes = [(v, 32, max(1, most // v), 1), (1, 8, 1, 1), (1, threads, most, 1), (v, threads, 1, 0)]
        for k, (vec, group, per, kept) in enumerate(shapes):
            extra = more[k % len(more)] if more else {}
            found.append({"T": ctype(name), "V": str(vec), "GROUP": str(group), "PER": str(per),
                          "HELD": str(kept), "ALIGNED": "1", **extra})
    found.append({**found[0], "ALIGNED": "0"})
    return tuple(found)
