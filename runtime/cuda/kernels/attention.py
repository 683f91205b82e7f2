"""What attention does with scores, between products of matrices: see meshtape.runtime.ops.attention.

Scores are rows (entries, queries, keys) of one block; a row is one query's. ROW threads go over a row, a warp
or a block. `first` is the number of a row's first weight among the elements of the whole tensor of weights,
from which dropout takes its bits.
"""

from __future__ import annotations

import numpy as np

from meshtape.runtime.cuda.kernels.random import BLOCKS, _constants
from meshtape.runtime.cuda.source import source

CODE = r"""
const int THREADS = 256, ROWS = THREADS / ROW;

// One block of scores: `entries` matrices of queries x keys, from entry `entry` and query `row` on, of all
// (.., heads, length, all_keys). If it is causal, query i looks at keys 0 .. shift + i. The mask has strides
// of 0 where it is stretched.
struct Shape {
  long long entries, queries, keys, entry, row, heads, length, all_keys;
  long long mask_n, mask_h, mask_l, mask_s, shift;
};

struct Query {
  long long at, mask, seen, first;      // its number among all, its mask's, keys it sees, its first weight's
  __device__ Query(const Shape& s, long long row, const long long* starts) {
    const long long e = s.entry + row / s.queries, i = s.row + row % s.queries;
    at = e * s.length + i;
    mask = e / s.heads * s.mask_n + e % s.heads * s.mask_h + i * s.mask_l;
    seen = CAUSAL && s.shift + i + 1 < s.keys ? s.shift + i + 1 : s.keys;
    first = DROP ? (starts[e] + i) * s.all_keys : 0;
  }
};

// What is added to a score, or -inf where a query must not look.
__device__ inline W masked(W score, const Shape& s, const Query& q, long long j,
                                              const M* mask) {
#if MASK
  const M m = mask[q.mask + j * s.mask_s];
  return MASK == 1 ? (m ? score : -infinity<W>()) : score + W(m);
#else
  return score;
#endif
}

// f(j, d) for the keys j of a query, by ROW threads, where d is 1, or with dropout 0 or `factor`: element e
// of all weights takes half e % 8 of Philox block e / 8.
template <class F>
__device__ inline void each_key(long long keys, const Query& q, uint64 seed, uint64 draw, uint64 threshold,
                                W factor, F f) {
  const int lane = threadIdx.x % ROW;
#if DROP
  for (long long block = q.first / 8 + lane; block * 8 < q.first + keys; block += ROW) {
    uint64 words[4];
    philox(words, block, seed, draw);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const long long j = block * 8 + i - q.first;
      if (0 <= j && j < keys) f(j, half_of(words, i) >= threshold ? factor : W(0));
    }
  }
#else
  for (long long j = lane; j < keys; j += ROW) f(j, W(1));
#endif
}

template <class F> __device__ inline W row_reduce(W x, W neutral, W* room, F f) {
  if (ROW == 32) {
    x = lanes_reduce<32>(x, f);
    __syncwarp();       // shuffles do not order memory, and weights go over scores that other lanes read
    return x;
  }
  W one[1] = {x};
  block_reduce(one, room, neutral, f);
  return one[0];
}

// weights = D exp(scale * scores + mask - lse), and lse: 0 and no weights where a query looks nowhere.
// Weights may be written over the scores.
extern "C" __global__ void __launch_bounds__(THREADS) weigh(
    const W* scores, T* weights, W* lse, const M* mask, const long long* starts, const long long* seed,
    const long long* draw, W scale, uint64 threshold, W factor, Shape s) {
  __shared__ W room[32];
  const int lane = threadIdx.x % ROW;
  const long long rows = s.entries * s.queries;
  const uint64 k0 = DROP ? *seed : 0, k1 = DROP ? *draw : 0;
  for (long long at = blockIdx.x * (long long)ROWS; at < rows; at += gridDim.x * (long long)ROWS) {
    const long long row = at + threadIdx.x / ROW;
    const bool real = row < rows;
    const Query q(s, real ? row : 0, starts);
    const W* from = scores + (real ? row : 0) * s.keys;
    T* to = weights + (real ? row : 0) * s.keys;
    const long long seen = real ? q.seen : 0;
    W top = -infinity<W>();
    for (long long j = lane; j < seen; j += ROW) top = maximum(top, masked(scale * from[j], s, q, j, mask));
    top = row_reduce(top, -infinity<W>(), room, Max());
    if (top == -infinity<W>()) top = 0;
    W sum = 0;
    for (long long j = lane; j < seen; j += ROW) sum += exp(masked(scale * from[j], s, q, j, mask) - top);
    sum = row_reduce(sum, W(0), room, Sum());
    const W share = sum == 0 ? W(0) : 1 / sum;
    if (real && lane == 0) lse[q.at] = sum == 0 ? W(0) : log(sum) + top;
    each_key(real ? s.keys : 0, q, k0, k1, threshold, factor, [&](long long j, W d) {
      const W w = j < seen ? exp(masked(scale * from[j], s, q, j, mask) - top) * share : W(0);
      to[j] = T(w * d);
    });
  }
}

// From scores and through = g v^T: weights D P, and E = scale P (D through - delta). Both may be written over
// what they are made from.
extern "C" __global__ void __launch_bounds__(THREADS) weigh_back(
    const W* scores, const W* through, T* weights, T* e, const W* lse, const W* delta, const M* mask,
    const long long* starts, const long long* seed, const long long* draw, W scale, uint64 threshold,
    W factor, Shape s) {
  const long long rows = s.entries * s.queries;
  const uint64 k0 = DROP ? *seed : 0, k1 = DROP ? *draw : 0;
  for (long long row = blockIdx.x * (long long)ROWS + threadIdx.x / ROW; row < rows;
       row += gridDim.x * (long long)ROWS) {
    const Query q(s, row, starts);
    const W about = lse[q.at], less = delta[q.at];
    each_key(s.keys, q, k0, k1, threshold, factor, [&](long long j, W d) {
      const long long k = row * s.keys + j;
      const W p = j < q.seen ? exp(masked(scale * scores[k], s, q, j, mask) - about) : W(0);
      const W u = through[k] * d;
      weights[k] = T(p * d);
      e[k] = T(j < q.seen ? p * (u - less) * scale : W(0));
    });
  }
}
"""

# o, along g, such that the sum of o g over a vector is delta; 0 where g is. cuDNN takes delta in this form.
# |o| is at most that of any other such vector, so it is in range where the attention is.
PROJECT = r"""
extern "C" __global__ void __launch_bounds__(256) project(T* o, const T* g, const float* delta,
                                                          long long rows, int width) {
  const int lane = threadIdx.x % 32;
  for (long long row = blockIdx.x * 8ll + threadIdx.x / 32; row < rows; row += gridDim.x * 8ll) {
    float top = 0, sum = 0;
    for (int k = lane; k < width; k += 32) top = maximum(top, fabsf(float(g[row * width + k])));
    top = warp_max(top);
    const float unit = top == 0 ? 0.0f : 1 / top;
    for (int k = lane; k < width; k += 32) {
      const float x = float(g[row * width + k]) * unit;
      sum += x * x;
    }
    sum = warp_sum(sum);
    const float along = sum == 0 ? 0.0f : delta[row] * unit / sum;
    for (int k = lane; k < width; k += 32) o[row * width + k] = T(float(g[row * width + k]) * unit * along);
  }
}
"""

FLOATS = (("float", "float"), ("float16", "float"), ("bfloat16", "float"), ("double", "double"))
WEIGHTS = source("attention_weights", _constants() + BLOCKS + CODE, ("weigh", "weigh_back"), tuple(
    {"T": t, "W": a, "M": m, "MASK": kind, "CAUSAL": causal, "DROP": drop, "ROW": row}
    for (t, a), m, kind, causal, drop, row in (
        (FLOATS[0], "bool", "0", "1", "1", "32"), (FLOATS[1], "bool", "1", "0", "0", "256"),
        (FLOATS[2], "float", "2", "0", "1", "256"), (FLOATS[3], "double", "2", "0", "0", "32"))))
ALONG = source("attention_along", PROJECT, ("project",), ({"T": "float16"}, {"T": "bfloat16"}))
SHAPE = np.dtype([(name, np.int64) for name in (
    "entries", "queries", "keys", "entry", "row", "heads", "length", "all_keys", "mask_n", "mask_h", "mask_l",
    "mask_s", "shift")])
