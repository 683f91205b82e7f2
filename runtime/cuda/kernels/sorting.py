"""A stable sort of unsigned keys, a digit of 8 bits at a time, the least first (LSD radix sort).

Every pass counts the digits of each tile of keys, adds the counts up to where each tile's keys of each digit
go, and moves them there. Nothing depends on the order in which blocks run, and nothing waits for the device,
so it can be part of a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meshtape.runtime.cuda.source import ctype, source

ITEMS = 8
TILE = 256 * ITEMS

CODE = f"#define ITEMS {ITEMS}\n#define TILE {TILE}\n" + r"""
__device__ inline unsigned digit_of(KEY key, int shift) { return unsigned(key >> shift) & 255u; }

// counts[digit][tile]
extern "C" __global__ void __launch_bounds__(256) count_digits(const KEY* keys, unsigned n, int shift,
                                                               unsigned* counts) {
  __shared__ unsigned found[256];
  found[threadIdx.x] = 0;
  __syncthreads();
  for (int j = 0; j < ITEMS; ++j) {
    const unsigned i = blockIdx.x * TILE + j * 256 + threadIdx.x;
    if (i < n) atomicAdd(&found[digit_of(keys[i], shift)], 1u);
  }
  __syncthreads();
  counts[threadIdx.x * gridDim.x + blockIdx.x] = found[threadIdx.x];
}

// counts[i] becomes the sum of those before it; one block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) add_up(unsigned* counts, unsigned n) {
  __shared__ unsigned sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned carry = 0;
  for (unsigned first = 0; first < n; first += 1024 * ITEMS) {
    const unsigned at = first + threadIdx.x * ITEMS;
    unsigned mine[ITEMS], total = 0;
    for (int j = 0; j < ITEMS; ++j) {
      mine[j] = total;
      total += at + j < n ? counts[at + j] : 0u;
    }
    unsigned through = total;                           // inclusive over the warp, then the block
    for (int step = 1; step < 32; step *= 2) {
      const unsigned below = __shfl_up_sync(0xffffffffu, through, step);
      if (lane >= step) through += below;
    }
    if (lane == 31) sums[warp] = through;
    __syncthreads();
    unsigned others = sums[lane];
    for (int step = 1; step < 32; step *= 2) {
      const unsigned below = __shfl_up_sync(0xffffffffu, others, step);
      if (lane >= step) others += below;
    }
    const unsigned before = __shfl_sync(0xffffffffu, others, warp ? warp - 1 : 0);
    const unsigned start = carry + (warp ? before : 0u) + through - total;
    for (int j = 0; j < ITEMS; ++j) if (at + j < n) counts[at + j] = start + mine[j];
    carry += __shfl_sync(0xffffffffu, others, 31);
    __syncthreads();
  }
}

// Keys and their places to where they go. `from` may be null: places are then 0 to n - 1. The keys of a warp
// are neighbours; each lane counts, 32 keys after 32, those before its own that have the same digit.
extern "C" __global__ void __launch_bounds__(256) move_keys(
    const KEY* keys, const unsigned* from, unsigned n, int shift, const unsigned* starts, KEY* sorted,
    unsigned* places) {
  __shared__ unsigned next[8][256];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int w = 0; w < 8; ++w) next[w][threadIdx.x] = 0;
  __syncthreads();
  const unsigned first = blockIdx.x * TILE + warp * 32 * ITEMS + lane;
  unsigned rank[ITEMS];
#pragma unroll
  for (int j = 0; j < ITEMS; ++j) {
    const unsigned i = first + 32 * j, digit = i < n ? digit_of(keys[i], shift) : 256u;
    const unsigned same = __match_any_sync(0xffffffffu, digit);
    const unsigned before = __popc(same & ((1u << lane) - 1));
    const unsigned had = i < n ? next[warp][digit] : 0u;
    rank[j] = had + before;
    __syncwarp();
    if (i < n && !before) next[warp][digit] = had + __popc(same);
    __syncwarp();
  }
  __syncthreads();
  unsigned start = starts[threadIdx.x * gridDim.x + blockIdx.x];
  for (int w = 0; w < 8; ++w) {
    const unsigned count = next[w][threadIdx.x];
    next[w][threadIdx.x] = start;
    start += count;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < ITEMS; ++j) {
    const unsigned i = first + 32 * j;
    if (i >= n) continue;
    const KEY key = keys[i];
    const unsigned to = next[warp][digit_of(key, shift)] + rank[j];
    sorted[to] = key;
    places[to] = from ? from[i] : i;
  }
}
"""

SORT = source("sort", CODE, ("count_digits", "add_up", "move_keys"),
              ({"KEY": "uint32"}, {"KEY": "uint64"}))


def sort_keys(dev: Any, keys: Any, bits: int) -> tuple[Any, Any]:
    """The keys in order and their places (uint32) before it; equal keys keep their order.

    `keys` is (n,) of uint32 or uint64 with n < 2**31, contiguous, of which the lowest `bits` are compared.
    """
    cp, n = dev.cp, keys.size
    if n == 0 or bits <= 0:
        return keys, cp.arange(n, dtype=cp.uint32)
    tiles = -(-n // TILE)
    counts = cp.empty(256 * tiles, cp.uint32)
    count, add, move = (dev.kernels(SORT, name, KEY=ctype(keys.dtype)) for name in SORT.functions)
    places = None
    size = np.uint32(n)
    for shift in range(0, bits, 8):
        sorted_keys, moved = cp.empty_like(keys), cp.empty(n, cp.uint32)
        count((tiles,), (256,), (keys, size, np.int32(shift), counts))
        add((1,), (1024,), (counts, np.uint32(counts.size)))
        move((tiles,), (256,), (keys, places, size, np.int32(shift), counts, sorted_keys, moved))
        keys, places = sorted_keys, moved
    return keys, places
