// CUDA C++ on one CPU core: what the text of a kernel needs so that g++ compiles it, and the threads of a
// block run as fibers. Blocks run one after another, in an order that looks random but is always the same; so
// do warps between barriers and lanes between warp operations. Nothing runs in lockstep: a missing barrier or
// __syncwarp gives wrong numbers here. Waiting for another block hangs.
//
// Reported as an error of the launch: a barrier or warp operation that not all threads reach, a shuffle from a
// lane that takes no part, an access that is misaligned (the compiler's sanitizer traps) or hits unmapped
// memory, dynamic shared memory written past its end, an overflowing stack; on request races (races.cpp).
#pragma once
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __managed__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __builtin_assume(x) ((void)0)
#define __builtin_assume_aligned(p, ...) (p)

// --- vector types ------------------------------------------------------------------------------------------

#define EMU_VECTORS(T, name, a1, a2, a4)                                                                     \
  struct alignas(a1) name##1 { T x; };                                                                       \
  struct alignas(a2) name##2 { T x, y; };                                                                    \
  struct alignas(a1) name##3 { T x, y, z; };                                                                 \
  struct alignas(a4) name##4 { T x, y, z, w; };                                                              \
  static inline name##1 make_##name##1(T x) { return {x}; }                                                  \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                          \
  static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                  \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(signed char, char, 1, 2, 4)
EMU_VECTORS(unsigned char, uchar, 1, 2, 4)
EMU_VECTORS(short, short, 2, 4, 8)
EMU_VECTORS(unsigned short, ushort, 2, 4, 8)
EMU_VECTORS(int, int, 4, 8, 16)
EMU_VECTORS(unsigned, uint, 4, 8, 16)
EMU_VECTORS(long long, longlong, 8, 16, 16)
EMU_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
EMU_VECTORS(float, float, 4, 8, 16)
EMU_VECTORS(double, double, 8, 16, 16)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;

// --- races -------------------------------------------------------------------------------------------------

// With EMU_RACES the text is compiled with calls before every load and store; see races.cpp.
#if EMU_RACES
extern "C" {
void emu_races_launch(const char* library, const char* library_end, const char* fibers,
                      const char* fibers_end, const unsigned* dims, void (*on_race)(const char*));
void emu_races_block(unsigned number);
void emu_races_thread(int number);
void emu_races_barrier();
void emu_races_warp(int first, unsigned mask);
void emu_races_shared(const void* at, size_t size, const char* name);
void emu_races_atomic(const void* at, size_t size, const void* code);
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}
#define EMU_CHECK(call) emu_races_##call
#define EMU_UNCHECKED __attribute__((noinline, no_sanitize("thread")))
#else
#define EMU_CHECK(call) ((void)0)
#define EMU_UNCHECKED
#endif

// --- fibers ------------------------------------------------------------------------------------------------

namespace emu {

enum State : unsigned char { READY, AT_BARRIER, AT_WARP, DONE };
enum Kind : int { BARRIER, SYNC, SHUFFLE, VOTE, MATCH, REDUCE };

struct Fiber {
  void* stack;
  State state;
  Kind kind;
  int line;
  unsigned mask;
  unsigned long long given;     // to the others of the block or warp
};

const size_t STACK = 128 << 10, SHARED = 232 << 10, THREADS = 1024;
const unsigned char GARBAGE = 0xdb;     // shared memory before it is written: large negative numbers
const unsigned long long CANARY = 0x5ca1ab1e0ddba115ull;

static Fiber fibers[THREADS];
static char* stacks;
static int current, threads;
static void* scheduler_stack;
static unsigned long long seen[THREADS];        // what every thread gave to the operation that ended last
static bool exchanged[THREADS];                 // whether a lane took part in it
static void (*body)(void**);
static void** arguments;
static char message[1024];
static sigjmp_buf out_of_kernel;
alignas(1024) static unsigned char shared_memory[SHARED];
static unsigned long long randomness;

static unsigned below(unsigned n) {
  randomness ^= randomness << 13;
  randomness ^= randomness >> 7;
  randomness ^= randomness << 17;
  return unsigned((randomness >> 20) % n);
}

// A permutation of n as i -> (i * step + start) % n with a step that has no factor in common with n.
struct Order {
  unsigned n, step, start;
  explicit Order(unsigned n) : n(n), step(1), start(below(n)) {
    unsigned wanted = below(n) | 1;
    for (unsigned a = wanted, b = n; ; a = ++wanted, b = n) {
      while (b) { unsigned r = a % b; a = b; b = r; }
      if (a == 1) break;
    }
    step = wanted;
  }
  unsigned operator[](unsigned i) const { return unsigned(((unsigned long long)i * step + start) % n); }
};

[[noreturn]] static void fail() { siglongjmp(out_of_kernel, 1); }

static int describe(char* to, size_t room, int thread) {
  unsigned x = blockDim.x, y = blockDim.y;
  return snprintf(to, room, "thread (%u, %u, %u) of block (%u, %u, %u)", thread % x, thread / x % y,
                  thread / x / y, blockIdx.x, blockIdx.y, blockIdx.z);
}

template <class... A> [[noreturn]] static void fail_here(const char* text, A... a) {
  int n = describe(message, sizeof message, current);
  n += snprintf(message + n, sizeof message - n, ": ");
  snprintf(message + n, sizeof message - n, text, a...);
  fail();
}

#if defined(__x86_64__)
extern "C" void emu_switch(void** from, void* to);
asm(R"(
.text
.local emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");

static void prepare(int thread, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stacks + (thread + 1) * STACK);
  memset(top - 8, 0, 8 * sizeof(void*));
  top[-2] = reinterpret_cast<void*>(entry);
  fibers[thread].stack = top - 8;
}
static void resume(int thread) { emu_switch(&scheduler_stack, fibers[thread].stack); }
static void suspend() { emu_switch(&fibers[current].stack, scheduler_stack); }
#else
}  // namespace emu
#include <ucontext.h>
namespace emu {
static ucontext_t contexts[THREADS], scheduler_context;

static void prepare(int thread, void (*entry)()) {
  getcontext(&contexts[thread]);
  contexts[thread].uc_stack.ss_sp = stacks + thread * STACK;
  contexts[thread].uc_stack.ss_size = STACK;
  contexts[thread].uc_link = nullptr;
  makecontext(&contexts[thread], entry, 0);
}
static void resume(int thread) { swapcontext(&scheduler_context, &contexts[thread]); }
static void suspend() { swapcontext(&contexts[current], &scheduler_context); }
#endif

static void begin() {
  body(arguments);
  fibers[current].state = DONE;
  suspend();
}

static void run(int thread) {
  current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
  EMU_CHECK(thread(thread));
  resume(thread);
  EMU_CHECK(thread(-1));
  if (*reinterpret_cast<unsigned long long*>(stacks + thread * STACK) != CANARY)
    fail_here("its stack of %zu bytes has overflowed", STACK);
}

static void wait(State state, Kind kind, unsigned mask, unsigned long long given, int line) {
  Fiber& f = fibers[current];
  f.state = state, f.kind = kind, f.mask = mask, f.given = given, f.line = line;
  suspend();
}

static const char* const NAMES[] = {"a barrier", "__syncwarp", "a shuffle", "a vote", "a match", "a reduction"};

static int place(char* to, size_t room, int thread) {
  const Fiber& f = fibers[thread];
  if (f.state == DONE) return snprintf(to, room, "thread %d has returned", thread);
  return snprintf(to, room, "thread %d waits at %s with mask %#x in line %d", thread, NAMES[f.kind], f.mask,
                  f.line);
}

[[noreturn]] static void disagree(int a, int b) {
  int n = snprintf(message, sizeof message, "threads of block (%u, %u, %u) diverge: ", blockIdx.x, blockIdx.y,
                   blockIdx.z);
  n += place(message + n, sizeof message - n, a);
  n += snprintf(message + n, sizeof message - n, "; ");
  place(message + n, sizeof message - n, b);
  fail();
}

// Let the lanes of a warp go on whose operation is complete; whether there were any.
static bool release(int first, int lanes) {
  bool any = false;
  for (int lane = 0; lane < lanes; ++lane) {
    Fiber& f = fibers[first + lane];
    if (f.state != AT_WARP) continue;
    unsigned missing = 0;
    for (int other = 0; other < lanes; ++other) {
      const Fiber& o = fibers[first + other];
      if (!(f.mask >> other & 1) || o.state == DONE) continue;
      if (o.state != AT_WARP) { missing |= 1u << other; continue; }
      if (o.mask != f.mask || o.kind != f.kind) {
        if (f.mask >> other & 1 && o.mask >> lane & 1) disagree(first + lane, first + other);
        missing |= 1u << other;
      }
    }
    if (missing) continue;
    const Kind kind = f.kind;
    const unsigned mask = f.mask;
    unsigned together = 0;
    for (int other = 0; other < 32; ++other) {
      if (!(mask >> other & 1)) continue;
      exchanged[first + other] = other < lanes && fibers[first + other].state == AT_WARP;
      if (!exchanged[first + other]) continue;
      seen[first + other] = fibers[first + other].given;
      fibers[first + other].state = READY;
      together |= 1u << other;
    }
    if (kind == SYNC) EMU_CHECK(warp(first, together));
    any = true;
  }
  return any;
}

static void run_warp(int first, int lanes) {
  do {
    Order order(lanes);
    for (int i = 0; i < lanes; ++i)
      if (fibers[first + order[i]].state == READY) run(first + order[i]);
  } while (release(first, lanes));
}

static void run_block(size_t shared) {
  memset(shared_memory, GARBAGE, SHARED);
  EMU_CHECK(block((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x));
  for (int t = 0; t < threads; ++t) {
    fibers[t].state = READY;
    *reinterpret_cast<unsigned long long*>(stacks + t * STACK) = CANARY;
    prepare(t, begin);
  }
  const int warps = (threads + 31) / 32;
  for (bool more = true; more;) {
    Order order(warps);
    for (int i = 0; i < warps; ++i) {
      const int first = 32 * order[i];
      run_warp(first, threads - first < 32 ? threads - first : 32);
    }
    more = fibers[0].state != DONE;
    for (int t = 0; t < threads; ++t) {
      const Fiber &f = fibers[t], &o = fibers[0];
      if (f.state == AT_WARP)      // a lane that it waits for has returned or waits elsewhere
        for (int u = t / 32 * 32; u < threads && u < t / 32 * 32 + 32; ++u)
          if (f.mask >> u % 32 & 1 && (fibers[u].state != AT_WARP || fibers[u].mask != f.mask)) disagree(t, u);
      if (f.state != o.state || (f.state == AT_BARRIER && f.line != o.line)) disagree(0, t);
    }
    for (int t = 0; t < threads; ++t) seen[t] = fibers[t].given;
    if (more) EMU_CHECK(barrier());
    if (more) for (int t = 0; t < threads; ++t) fibers[t].state = READY;
  }
  for (size_t i = shared; i < SHARED; ++i)
    if (shared_memory[i] != GARBAGE) {
      snprintf(message, sizeof message, "block (%u, %u, %u) wrote byte %zu of its dynamic shared memory, which "
               "has %zu", blockIdx.x, blockIdx.y, blockIdx.z, i, shared);
      fail();
    }
}

static void on_signal(int number, siginfo_t* info, void*) {
  int n = describe(message, sizeof message, current);
  if (number == SIGILL)
    snprintf(message + n, sizeof message - n, ": a misaligned access, or an index beyond a local array");
  else if (number == SIGFPE)
    snprintf(message + n, sizeof message - n, ": an integer division by zero");
  else
    snprintf(message + n, sizeof message - n, ": an access to %p, which is no memory of the device",
             info->si_addr);
  fail();
}

[[maybe_unused]] static void on_race(const char* text) {
  snprintf(message, sizeof message, "%s", text);
  fail();
}

static const int CAUGHT[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

// Run a grid; the error's text, or null.
static const char* launch(void (*f)(void**), const unsigned* dims, size_t shared, void** args) {
  gridDim = {dims[0], dims[1], dims[2]};
  blockDim = {dims[3], dims[4], dims[5]};
  threads = dims[3] * dims[4] * dims[5];
  body = f, arguments = args, randomness = 0x9e3779b97f4a7c15ull;
  stacks = static_cast<char*>(mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) return "no memory for stacks";
  EMU_CHECK(launch(__ehdr_start, _end, stacks, stacks + threads * STACK, dims, on_race));
  EMU_CHECK(shared(shared_memory, shared, "of the launch"));
  static char alternate[64 << 10];
  stack_t mine = {}, before = {};
  mine.ss_sp = alternate, mine.ss_size = sizeof alternate;
  sigaltstack(&mine, &before);
  struct sigaction action = {}, kept[4];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 4; ++i) sigaction(CAUGHT[i], &action, &kept[i]);
  const char* error = message;
  if (!sigsetjmp(out_of_kernel, 1)) {
    const unsigned blocks = dims[0] * dims[1] * dims[2];
    Order order(blocks);
    for (unsigned i = 0; i < blocks; ++i) {
      const unsigned b = order[i];
      blockIdx = {b % dims[0], b / dims[0] % dims[1], b / dims[0] / dims[1]};
      run_block(shared);
    }
    error = nullptr;
  }
  EMU_CHECK(thread(-1));
  for (int i = 0; i < 4; ++i) sigaction(CAUGHT[i], &kept[i], nullptr);
  sigaltstack(&before, nullptr);
  munmap(stacks, threads * STACK);
  return error;
}

// --- a kernel's parameters ---------------------------------------------------------------------------------

template <class A> static A argument(void* at) {
  A made;
  memcpy(static_cast<void*>(&made), at, sizeof made);
  return made;
}

template <class... A, size_t... I>
static void call(void (*f)(A...), void** args, std::index_sequence<I...>) { f(argument<A>(args[I])...); }
template <class... A> static void call(void (*f)(A...), void** args) {
  call(f, args, std::index_sequence_for<A...>());
}

template <class A> static void append(char* to) {
  const char kind = std::is_pointer<A>::value ? 'p' : std::is_same<A, bool>::value ? 'b'
      : std::is_floating_point<A>::value ? 'f' : !std::is_integral<A>::value ? 's'
      : std::is_signed<A>::value ? 'i' : 'u';
  sprintf(to + strlen(to), "%c%zu ", kind, sizeof(A));
}

// Kind and size of every parameter: "p8 i4 f4 ".
template <class... A> static const char* parameters(void (*)(A...)) {
  static char text[16 * sizeof...(A) + 1];
  text[0] = 0;
  (append<A>(text), ...);
  return text;
}

// --- operations of a warp ----------------------------------------------------------------------------------

static unsigned long long barrier(int line, unsigned long long given = 0) {
  wait(AT_BARRIER, BARRIER, 0, given, line);
  return 0;
}

static int lane() { return current % 32; }
static int warp() { return current / 32 * 32; }

static void exchange(Kind kind, unsigned mask, unsigned long long given, int line) {
  if (!(mask >> lane() & 1)) fail_here("line %d: lane %d is not in its own mask %#x", line, lane(), mask);
  wait(AT_WARP, kind, mask, given, line);
}

template <class T> static T from(int source, unsigned mask, int line) {
  if (!(mask >> source & 1) || !exchanged[warp() + source])
    fail_here("line %d: a value is taken from lane %d, which does not take part", line, source);
  T value;
  memcpy(&value, &seen[warp() + source], sizeof value);
  return value;
}

template <class T> static T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles take int, unsigned, long long, float and double");
  unsigned long long given = 0;
  memcpy(&given, &value, sizeof value);
  exchange(SHUFFLE, mask, given, line);
  return from<T>(source, mask, line);
}

template <class T> static T shfl(int line, unsigned mask, T value, int source, int width = 32) {
  const int start = lane() / width * width;
  return shuffle(mask, value, start + (source & (width - 1)), line);
}
template <class T> static T shfl_up(int line, unsigned mask, T value, unsigned delta, int width = 32) {
  const int start = lane() / width * width, at = lane() - int(delta);
  return shuffle(mask, value, at < start ? lane() : at, line);
}
template <class T> static T shfl_down(int line, unsigned mask, T value, unsigned delta, int width = 32) {
  const int end = lane() / width * width + width, at = lane() + int(delta);
  return shuffle(mask, value, at >= end ? lane() : at, line);
}
template <class T> static T shfl_xor(int line, unsigned mask, T value, int bits, int width = 32) {
  const int end = lane() / width * width + width, at = lane() ^ bits;
  return shuffle(mask, value, at >= end ? lane() : at, line);
}

static unsigned vote(int line, unsigned mask, int predicate) {
  exchange(VOTE, mask, predicate != 0, line);
  unsigned found = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && exchanged[warp() + i] && seen[warp() + i]) found |= 1u << i;
  return found;
}
static unsigned present(unsigned mask) {
  unsigned found = 0;
  for (int i = 0; i < 32; ++i) if (mask >> i & 1 && exchanged[warp() + i]) found |= 1u << i;
  return found;
}
static int all(int line, unsigned mask, int predicate) { return vote(line, mask, predicate) == present(mask); }

template <class T> static unsigned match_any(int line, unsigned mask, T value) {
  unsigned long long given = 0;
  memcpy(&given, &value, sizeof value);
  exchange(MATCH, mask, given, line);
  unsigned found = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && exchanged[warp() + i] && seen[warp() + i] == given) found |= 1u << i;
  return found;
}

template <class T, class F> static T reduce(int line, unsigned mask, T value, F combine) {
  static_assert(sizeof(T) == 4 && std::is_integral<T>::value, "warp reductions take int and unsigned");
  exchange(REDUCE, mask, (unsigned)value, line);
  bool first = true;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && exchanged[warp() + i]) {
      const T other = T(seen[warp() + i]);
      value = first ? other : combine(value, other);
      first = false;
    }
  return value;
}

static int count(int line, int predicate) {
  barrier(line, predicate != 0);
  int found = 0;
  for (int t = 0; t < threads; ++t) found += int(seen[t]);
  return found;
}

}  // namespace emu

#define __syncthreads() emu::barrier(__LINE__)
#define __syncthreads_count(p) emu::count(__LINE__, (p))
#define __syncthreads_or(p) (emu::count(__LINE__, (p)) != 0)
#define __syncthreads_and(p) (emu::count(__LINE__, (p)) == emu::threads)
#define EMU_FIRST(a, ...) a
#define __syncwarp(...) emu::exchange(emu::SYNC, EMU_FIRST(__VA_ARGS__ __VA_OPT__(,) 0xffffffffu), 0, __LINE__)
#define __shfl_sync(...) emu::shfl(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emu::shfl_up(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emu::shfl_down(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emu::shfl_xor(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, p) emu::vote(__LINE__, (mask), (p))
#define __any_sync(mask, p) (emu::vote(__LINE__, (mask), (p)) != 0)
#define __all_sync(mask, p) emu::all(__LINE__, (mask), (p))
#define __match_any_sync(mask, v) emu::match_any(__LINE__, (mask), (v))
#define __reduce_add_sync(mask, v) \
  emu::reduce(__LINE__, (mask), (v), [](auto a, auto b) { return decltype(a)((unsigned)a + (unsigned)b); })
#define __reduce_max_sync(mask, v) emu::reduce(__LINE__, (mask), (v), [](auto a, auto b) { return a > b ? a : b; })
#define __reduce_min_sync(mask, v) emu::reduce(__LINE__, (mask), (v), [](auto a, auto b) { return a < b ? a : b; })
#define __reduce_or_sync(mask, v) emu::reduce(__LINE__, (mask), (v), [](auto a, auto b) { return a | b; })
#define __reduce_and_sync(mask, v) emu::reduce(__LINE__, (mask), (v), [](auto a, auto b) { return a & b; })
#define __threadfence() ((void)0)
#define __threadfence_block() ((void)0)
#define __threadfence_system() ((void)0)
#define __nanosleep(ns) ((void)0)
#define __trap() emu::fail_here("line %d: __trap()", __LINE__)

// --- atomics, loads and stores -----------------------------------------------------------------------------

#define EMU_ATOMIC(name, T, expression)                                                                      \
  EMU_UNCHECKED static inline T name(T* at, T value) {                                                       \
    EMU_CHECK(atomic(at, sizeof(T), __builtin_return_address(0)));                                           \
    const T old = *at;                                                                                       \
    *at = (expression);                                                                                      \
    return old;                                                                                              \
  }
#define EMU_ATOMIC_INT(name, expression)                                                                     \
  EMU_ATOMIC(name, int, expression) EMU_ATOMIC(name, unsigned, expression)                                   \
  EMU_ATOMIC(name, unsigned long long, expression)
EMU_ATOMIC_INT(atomicAdd, old + value)
EMU_ATOMIC(atomicAdd, float, old + value)
EMU_ATOMIC(atomicAdd, double, old + value)
EMU_ATOMIC(atomicSub, int, old - value)
EMU_ATOMIC(atomicSub, unsigned, old - value)
EMU_ATOMIC_INT(atomicExch, value)
EMU_ATOMIC(atomicExch, float, value)
EMU_ATOMIC_INT(atomicMax, old > value ? old : value)
EMU_ATOMIC(atomicMax, long long, old > value ? old : value)
EMU_ATOMIC_INT(atomicMin, old < value ? old : value)
EMU_ATOMIC(atomicMin, long long, old < value ? old : value)
EMU_ATOMIC_INT(atomicAnd, old & value)
EMU_ATOMIC_INT(atomicOr, old | value)
EMU_ATOMIC_INT(atomicXor, old ^ value)
EMU_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
EMU_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
#define EMU_CAS(T)                                                                                           \
  EMU_UNCHECKED static inline T atomicCAS(T* at, T compare, T value) {                                       \
    EMU_CHECK(atomic(at, sizeof(T), __builtin_return_address(0)));                                           \
    const T old = *at;                                                                                       \
    if (old == compare) *at = value;                                                                         \
    return old;                                                                                              \
  }
EMU_CAS(int) EMU_CAS(unsigned) EMU_CAS(unsigned long long) EMU_CAS(unsigned short)

template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T __ldcs(const T* p) { return *p; }
template <class T> static inline T __ldcg(const T* p) { return *p; }
template <class T> static inline T __ldca(const T* p) { return *p; }
template <class T> static inline T __ldlu(const T* p) { return *p; }
template <class T> static inline void __stcs(T* p, T v) { *p = v; }
template <class T> static inline void __stcg(T* p, T v) { *p = v; }
template <class T> static inline void __stwb(T* p, T v) { *p = v; }
template <class T> static inline void __stwt(T* p, T v) { *p = v; }

// --- bits --------------------------------------------------------------------------------------------------

template <class To, class From> static inline To emu_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To r;
  memcpy(&r, &v, sizeof r);
  return r;
}
static inline float __int_as_float(int v) { return emu_cast<float>(v); }
static inline float __uint_as_float(unsigned v) { return emu_cast<float>(v); }
static inline int __float_as_int(float v) { return emu_cast<int>(v); }
static inline unsigned __float_as_uint(float v) { return emu_cast<unsigned>(v); }
static inline long long __double_as_longlong(double v) { return emu_cast<long long>(v); }
static inline double __longlong_as_double(long long v) { return emu_cast<double>(v); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
static inline int __mulhi(int a, int b) { return (long long)a * b >> 32; }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned __int128)a * b >> 64;
}
static inline long long __mul64hi(long long a, long long b) { return (__int128)a * b >> 64; }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
static inline int __clzll(long long v) { return v ? __builtin_clzll(v) : 64; }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __ffsll(long long v) { return __builtin_ffsll(v); }
static inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1) << (31 - i);
  return r;
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return ((unsigned long long)hi << 32 | lo) << (n & 31) >> 32;
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return ((unsigned long long)hi << 32 | lo) >> (n & 31);
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= unsigned(both >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return r;
}

// --- arithmetic --------------------------------------------------------------------------------------------

#define EMU_MINMAX(T)                                                                                        \
  static inline T min(T a, T b) { return b < a ? b : a; }                                                    \
  static inline T max(T a, T b) { return a < b ? b : a; }
EMU_MINMAX(int) EMU_MINMAX(unsigned) EMU_MINMAX(long) EMU_MINMAX(unsigned long)
EMU_MINMAX(long long) EMU_MINMAX(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }       // as on CUDA, not the NaN
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline double min(float a, double b) { return fmin(a, b); }
static inline double min(double a, float b) { return fmin(a, b); }
static inline double max(float a, double b) { return fmax(a, b); }
static inline double max(double a, float b) { return fmax(a, b); }
static inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
static inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
static inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }
static inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }

// Newer C libraries have functions of some of these names.
#define rsqrt emu_rsqrt
#define rsqrtf emu_rsqrtf
#define sinpi emu_sinpi
#define cospi emu_cospi
#define sinpif emu_sinpif
#define cospif emu_cospif
static const double EMU_PI = 3.14159265358979323846;
static inline float rsqrtf(float x) { return float(1 / sqrt(double(x))); }
static inline double rsqrt(double x) { return 1 / sqrt(x); }
static inline float rsqrt(float x) { return rsqrtf(x); }
static inline float rcbrtf(float x) { return float(1 / cbrt(double(x))); }
static inline double rcbrt(double x) { return 1 / cbrt(x); }
static inline double normcdf(double x) { return erfc(-x * 0.70710678118654752440) / 2; }
static inline float normcdff(float x) { return float(normcdf(double(x))); }
static inline double sinpi(double x) { return sin(EMU_PI * fmod(x, 2)); }
static inline double cospi(double x) { return cos(EMU_PI * fmod(x, 2)); }
static inline float sinpif(float x) { return float(sinpi(double(x))); }
static inline float cospif(float x) { return float(cospi(double(x))); }
static inline void sincospi(double x, double* s, double* c) { *s = sinpi(x), *c = cospi(x); }
static inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)
#define __sincosf(x, s, c) sincosf(x, s, c)
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __frsqrt_rn(float x) { return rsqrtf(x); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline double __dadd_rn(double x, double y) { return x + y; }
static inline double __dsub_rn(double x, double y) { return x - y; }
static inline double __dmul_rn(double x, double y) { return x * y; }
static inline double __ddiv_rn(double x, double y) { return x / y; }
static inline double __dsqrt_rn(double x) { return sqrt(x); }
static inline double __drcp_rn(double x) { return 1 / x; }
static inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
static inline float __saturatef(float x) { return fminf(fmaxf(x, 0.f), 1.f); }
static inline int __float2int_rn(float x) { return int(rintf(x)); }
static inline int __float2int_rz(float x) { return int(x); }
static inline unsigned __float2uint_rz(float x) { return unsigned(x); }
static inline float __int2float_rn(int x) { return float(x); }
static inline float __uint2float_rn(unsigned x) { return float(x); }
static inline float __ull2float_rn(unsigned long long x) { return float(x); }
static inline double __ull2double_rn(unsigned long long x) { return double(x); }
