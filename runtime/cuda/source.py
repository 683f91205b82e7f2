"""CUDA C++ as text, compiled by NVRTC for the device it runs on, once for each set of macros.

Compiled code is kept on disk (see runtime.cuda.nvrtc), where all workers of a host find it.

Every source is compiled behind PRELUDE and its macros, which are usually types, T=float16. Macros come after
the PRELUDE, so they may have any name. There are no host headers and none of CUDA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from meshtape.runtime import dtypes
from meshtape.runtime.errors import DTypeError, MeshtapeError

OPTIONS = ("-std=c++17",)
WAVES = 8           # blocks per multiprocessor after which loops stride over the grid

# What every source may use. Blocks that reduce are one-dimensional and of whole warps.
PRELUDE = r'''
typedef signed char int8;      typedef unsigned char uint8;
typedef short int16;           typedef unsigned short uint16;
typedef int int32;             typedef unsigned int uint32;
typedef long long int64;       typedef unsigned long long uint64;
typedef float float32;         typedef double float64;

// 16-bit floats: storage only. They turn into float by themselves, and float into them when asked, T(x),
// rounded to nearest even.
struct float16 {
  unsigned short bits;
  float16() = default;
  __device__ __forceinline__ explicit float16(float x) {
#ifdef __CUDA_ARCH__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    const unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) bits = 0x7fff;
    else if (a >= 0x477ff000u) bits = sign | 0x7c00u;          // 65520 and more round to infinity
    else if (a < 0x38800000u)                                  // subnormal: adding 0.5 leaves its bits
      bits = sign | (__float_as_uint(__uint_as_float(a) + 0.5f) - 0x3f000000u);
    else bits = sign | (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
#endif
  }
  __device__ __forceinline__ operator float() const {
#ifdef __CUDA_ARCH__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    const unsigned sign = (bits & 0x8000u) << 16, a = bits & 0x7fffu;
    if (a >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (a & 0x3ffu) << 13);
    const float size = a < 0x400u ? a * 5.9604644775390625e-8f : __uint_as_float((a << 13) + 0x38000000u);
    return sign ? -size : size;
#endif
  }
};

struct bfloat16 {
  unsigned short bits;
  bfloat16() = default;
  __device__ __forceinline__ explicit bfloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    const unsigned u = __float_as_uint(x);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
#endif
  }
  __device__ __forceinline__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
};

// acc_t<T>: what T is computed and summed in.
template <class A_> struct Accumulator { typedef A_ type; };
template <> struct Accumulator<float16> { typedef float type; };
template <> struct Accumulator<bfloat16> { typedef float type; };
template <class A_> using acc_t = typename Accumulator<A_>::type;
template <class A_> __device__ __forceinline__ acc_t<A_> to_acc(A_ x) { return acc_t<A_>(x); }
template <class A_> __device__ __forceinline__ A_ from_acc(acc_t<A_> x) { return A_(x); }

template <class A_> __device__ __forceinline__ A_ infinity() { return A_(__int_as_float(0x7f800000)); }
template <class A_> struct Limits {       // of integers
  static constexpr bool SIGNED = A_(-1) < A_(0);
  static constexpr A_ greatest = SIGNED ? A_(~(uint64(1) << 63) >> (64 - 8 * sizeof(A_))) : A_(-1);
  static constexpr A_ least = SIGNED ? A_(-greatest - 1) : A_(0);
};

// Of two numbers; a NaN wins, unlike with max and min.
template <class A_> __device__ __forceinline__ A_ maximum(A_ a, A_ b) { return a > b || a != a ? a : b; }
template <class A_> __device__ __forceinline__ A_ minimum(A_ a, A_ b) { return a < b || a != a ? a : b; }

struct Sum {
  template <class A_> __device__ __forceinline__ A_ operator()(A_ a, A_ b) const { return a + b; }
};
struct Max {
  template <class A_> __device__ __forceinline__ A_ operator()(A_ a, A_ b) const { return maximum(a, b); }
};
struct Min {
  template <class A_> __device__ __forceinline__ A_ operator()(A_ a, A_ b) const { return minimum(a, b); }
};

// Over LANES neighbouring lanes of a warp (all 32 take part); each of them gets the same bits.
template <int LANES_, class A_, class F_> __device__ __forceinline__ A_ lanes_reduce(A_ x, F_ f) {
#pragma unroll
  for (int step = LANES_ / 2; step > 0; step /= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
template <class A_> __device__ __forceinline__ A_ warp_sum(A_ x) { return lanes_reduce<32>(x, Sum()); }
template <class A_> __device__ __forceinline__ A_ warp_max(A_ x) { return lanes_reduce<32>(x, Max()); }
template <class A_> __device__ __forceinline__ A_ warp_min(A_ x) { return lanes_reduce<32>(x, Min()); }

// N numbers over all threads of a block; each thread gets the same bits. `room` is shared memory for 32 N of
// them, and free again afterwards.
template <int N_, class A_, class F_>
__device__ __forceinline__ void block_reduce(A_ (&x)[N_], A_* room, A_ neutral, F_ f) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < N_; ++k) x[k] = lanes_reduce<32>(x[k], f);
  if (warps == 1) return;
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < N_; ++k) room[32 * k + warp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N_; ++k) x[k] = lanes_reduce<32>(lane < warps ? room[32 * k + lane] : neutral, f);
  __syncthreads();
}
template <class A_> __device__ __forceinline__ A_ block_sum(A_ x, A_* room) {
  A_ one[1] = {x};
  block_reduce(one, room, A_(0), Sum());
  return one[0];
}
template <class A_> __device__ __forceinline__ A_ block_max(A_ x, A_* room) {      // of floats
  A_ one[1] = {x};
  block_reduce(one, room, -infinity<A_>(), Max());
  return one[0];
}

// N elements that are loaded and stored at once, from an address that is a multiple of their size (<= 16).
template <class A_, int N_> struct alignas(sizeof(A_) * N_) Vec {
  A_ at[N_];
  __device__ __forceinline__ A_& operator[](int i) { return at[i]; }
  __device__ __forceinline__ const A_& operator[](int i) const { return at[i]; }
};
template <int N_, class A_> __device__ __forceinline__ Vec<A_, N_> load(const A_* p) {
  return *reinterpret_cast<const Vec<A_, N_>*>(p);
}
template <int N_, class A_> __device__ __forceinline__ void store(A_* p, const Vec<A_, N_>& x) {
  *reinterpret_cast<Vec<A_, N_>*>(p) = x;
}
'''

# Behind the macros: the type of indices is 64 bits wide unless a launch says -Dindex_t=int.
_AFTER_MACROS = """
#ifndef index_t
#define index_t long long
#endif
"""


def ctype(dtype: Any) -> str:
    """The name in sources of a dtype's elements. Raises DTypeError for complex numbers."""
    name = dtypes.canonical(dtype).name
    if name.startswith("complex"):
        raise DTypeError(f"CUDA sources have no {name}")
    return {"float32": "float", "float64": "double"}.get(name, name)


class Source(NamedTuple):
    """Text with `extern "C" __global__` functions; tests compile it with each of `variants`."""

    name: str
    code: str
    functions: tuple[str, ...]
    variants: tuple[Mapping[str, str], ...] = ({},)


def text(given: Source, macros: Mapping[str, Any]) -> str:
    """What is compiled."""
    defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    return PRELUDE + defines + _AFTER_MACROS + given.code


SOURCES: dict[str, Source] = {}


def source(name: str, code: str, functions: tuple[str, ...],
           variants: tuple[Mapping[str, str], ...] = ({},)) -> Source:
    """Declare a source, so that tests find it. Raises MeshtapeError if another one has its name."""
    if name in SOURCES and SOURCES[name].code != code:
        raise MeshtapeError(f"CUDA source {name!r} is declared twice")
    SOURCES[name] = made = Source(name, code, functions, variants)
    return made


class Kernels:
    """Compiled functions by source, name and macros."""

    def __init__(self, libraries: Any) -> None:
        self._cupy, self._load = libraries.cupy, libraries.module
        self._modules: dict[Any, Any] = {}
        self._made: dict[Any, Any] = {}

    def __call__(self, given: Source, function: str, **macros: Any) -> Any:
        """The function, to be called as f(grid, block, args, shared_mem=0).

        Arguments are arrays of the device (passed as pointers) and NumPy scalars (passed by value, of
        exactly their type), or a NumPy array of one element of a structured dtype for a struct.
        """
        key = given.name, function, tuple(macros.items())
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = self._module(given, key[2]).get_function(function)
        return found

    def _module(self, given: Source, macros: Any) -> Any:
        key = given.name, macros
        if key not in self._modules:
            self._modules[key] = self._load(text(given, dict(macros)), OPTIONS)
        return self._modules[key]

    @cached_property
    def multiprocessors(self) -> int:
        """How many the device has."""
        return int(self._cupy.cuda.Device().attributes["MultiProcessorCount"])

    def blocks_for(self, count: int, per_block: int, waves: int = WAVES) -> int:
        """Blocks for `count` items, `per_block` each, for a kernel that strides over the grid: at least 1,
        at most `waves` for every multiprocessor."""
        return max(1, min(-(-count // per_block), waves * self.multiprocessors))
