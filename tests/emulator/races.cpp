// Races inside a launch: the compiler calls __tsan_read4 and the like before every load and store of a
// kernel (g++ -fsanitize=thread, of which only these calls are used), and this says whether two accesses to
// one byte, of which one writes, could happen at once on a GPU, whatever the order they had here.
//
// Ordered are accesses of one thread; of two threads of a block with a barrier between them; of two lanes of
// a warp with a chain of __syncwarp between them. Shuffles, votes, matches and reductions of a warp order
// nothing: "these intrinsics do not imply a memory barrier" (CUDA C++ programming guide). Accesses of
// different blocks are never ordered, but two atomic ones are no race. Fences are not understood: what a
// block hands to another by means of them is reported.
//
// Every byte has a cell: who wrote it last, and two of those who have read it since. Who (a segment) is a
// thread between two of its synchronisations, and lanes have vector clocks of their warp, as in FastTrack
// (Flanagan and Freund, PLDI 2009). Two readers suffice unless three lanes meet in __syncwarp of different
// masks. Shared memory that is read and was not written in its block is reported as well.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unordered_map>
#include <vector>

namespace {

typedef uint32_t u32;
const u32 ATOMIC = 1u << 31, SEVERAL = 1u << 30, PLACE = SEVERAL - 1;
const size_t PAGE = 4096;

struct Access { u32 segment, place; };       // place: in the library's code, with flags
struct Cell { Access written, read[2]; };
struct Segment { u32 block, epoch, thread, clock; };
struct Page { Cell cells[PAGE]; };
struct Shared { const char *begin, *end, *name; std::vector<Cell> cells; };

std::vector<Segment> segments(1);
std::vector<Shared> arrays;
std::unordered_map<uintptr_t, Page*> pages;
std::vector<Page*> spare;
uintptr_t last_number;
Page* last_page;

const char *image, *image_end, *stacks, *stacks_end;
u32 sizes[6];
void (*found)(const char*);
int thread = -1, threads;
u32 block, epoch;
u32 segment_of[1024], lanes[1024][32];      // lanes[t]: the clocks of its warp that t knows of, and its own

u32 mine() {
  if (!segment_of[thread]) {
    segment_of[thread] = u32(segments.size());
    segments.push_back({block, epoch, u32(thread), lanes[thread][thread % 32]});
  }
  return segment_of[thread];
}

// Whether an access was over before what the current thread does now.
bool ordered(const Access& a) {
  if (!a.segment) return true;
  const Segment& s = segments[a.segment];
  if (s.block != block) return false;
  if (s.epoch < epoch) return true;
  if (a.place & SEVERAL) return false;
  if (s.thread == u32(thread)) return true;
  return s.thread / 32 == u32(thread) / 32 && lanes[thread][s.thread % 32] >= s.clock;
}

int who(char* to, size_t room, u32 t, u32 b) {
  return snprintf(to, room, "thread (%u, %u, %u) of block (%u, %u, %u)", t % sizes[3],
                  t / sizes[3] % sizes[4], t / sizes[3] / sizes[4], b % sizes[0], b / sizes[0] % sizes[1],
                  b / sizes[0] / sizes[1]);
}

int where(char* to, size_t room, const char* at, const Shared* in) {
  if (!in) return snprintf(to, room, "global memory at %p", static_cast<const void*>(at));
  return snprintf(to, room, "byte %zu of shared memory %s", size_t(at - in->begin), in->name);
}

[[noreturn]] void report(const char* at, const Shared* in, const Access& old, bool wrote, u32 place,
                         bool writes) {
  char text[512];
  int n = snprintf(text, sizeof text, "a race for ");
  n += where(text + n, sizeof text - n, at, in);
  n += snprintf(text + n, sizeof text - n, ": ");
  const Segment& s = segments[old.segment];
  n += who(text + n, sizeof text - n, s.thread, s.block);
  n += snprintf(text + n, sizeof text - n, " %s it at {%x}, ", wrote ? "writes" : "reads", old.place & PLACE);
  n += who(text + n, sizeof text - n, u32(thread), block);
  snprintf(text + n, sizeof text - n, " %s it at {%x}", writes ? "writes" : "reads", place & PLACE);
  found(text);
  abort();
}

[[noreturn]] void report_unwritten(const char* at, const Shared* in, u32 place) {
  char text[512];
  int n = who(text, sizeof text, u32(thread), block);
  n += snprintf(text + n, sizeof text - n, " reads ");
  n += where(text + n, sizeof text - n, at, in);
  snprintf(text + n, sizeof text - n, ", which was not written, at {%x}", place & PLACE);
  found(text);
  abort();
}

void add_reader(Cell& c, Access me) {
  Access &a = c.read[0], &b = c.read[1];
  if (ordered(b)) b = {};
  if (ordered(a)) a = b, b = {};
  if (!a.segment) { a = me; return; }
  if (!b.segment) { b = me; return; }
  const Segment &s = segments[a.segment], &t = segments[b.segment];
  if (s.block == t.block && s.thread / 32 == t.thread / 32) b = me;      // of another warp, perhaps
}

void touch(Cell& c, const char* at, const Shared* in, u32 segment, u32 place, bool writes) {
  const Access me = {segment, place};
  const bool both_atomic = c.written.place & place & ATOMIC;
  const bool alone = ordered(c.written);
  if (!alone && !both_atomic) report(at, in, c.written, true, place, writes);
  if (!writes) {
    if (in && !c.written.segment) report_unwritten(at, in, place);
    if (c.read[0].segment != segment && c.read[1].segment != segment) add_reader(c, me);
    return;
  }
  for (Access& r : c.read) {
    if (!ordered(r)) report(at, in, r, false, place, writes);
    r = {};
  }
  c.written = me;
  if (!alone) c.written.place |= SEVERAL;
}

Page& page_of(uintptr_t number) {
  if (last_page && last_number == number) return *last_page;
  Page*& p = pages[number];
  if (!p) {
    if (spare.empty()) {
      p = static_cast<Page*>(calloc(1, sizeof(Page)));
    } else {
      p = spare.back();
      spare.pop_back();
      memset(static_cast<void*>(p), 0, sizeof(Page));
    }
  }
  last_number = number, last_page = p;
  return *p;
}

void access(const void* address, size_t size, bool writes, const void* code, u32 flags = 0) {
  if (thread < 0) return;
  const char* at = static_cast<const char*>(address);
  if (at >= stacks && at < stacks_end) return;
  const u32 place = u32(static_cast<const char*>(code) - image - 1) | flags;
  const char* const end = at + size;
  for (Shared& a : arrays)
    if (at >= a.begin && at < a.end) {
      const u32 segment = mine();
      for (; at < end && at < a.end; ++at) touch(a.cells[at - a.begin], at, &a, segment, place, writes);
      return;
    }
  if (at >= image && at < image_end) return;
  const u32 segment = mine();
  for (; at < end; ++at) {
    const uintptr_t number = uintptr_t(at);
    touch(page_of(number / PAGE).cells[number % PAGE], at, nullptr, segment, place, writes);
  }
}

}  // namespace

extern "C" {

#define HIDDEN __attribute__((visibility("hidden")))

// A launch begins. Not checked is what lies in the library or on a stack.
HIDDEN void emu_races_launch(const char* library, const char* library_end, const char* fibers,
                             const char* fibers_end, const unsigned* dims, void (*on_race)(const char*)) {
  image = library, image_end = library_end, stacks = fibers, stacks_end = fibers_end, found = on_race;
  memcpy(sizes, dims, sizeof sizes);
  threads = dims[3] * dims[4] * dims[5], thread = -1;
  segments.resize(1);
  for (auto& p : pages) spare.push_back(p.second);
  pages.clear();
  last_page = nullptr;
}

HIDDEN void emu_races_block(unsigned number) {
  block = number, epoch = 0;
  memset(segment_of, 0, sizeof segment_of);
  memset(lanes, 0, sizeof lanes);
  for (int t = 0; t < threads; ++t) lanes[t][t % 32] = 1;
  for (Shared& a : arrays) memset(static_cast<void*>(a.cells.data()), 0, a.cells.size() * sizeof(Cell));
}

// What follows is done by this thread, or by none.
HIDDEN void emu_races_thread(int number) { thread = number; }

HIDDEN void emu_races_barrier() {
  ++epoch;
  memset(segment_of, 0, sizeof segment_of);
}

HIDDEN void emu_races_warp(int first, unsigned mask) {
  u32 all[32] = {};
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1)
      for (int k = 0; k < 32; ++k)
        if (all[k] < lanes[first + i][k]) all[k] = lanes[first + i][k];
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) {
      memcpy(lanes[first + i], all, sizeof all);
      ++lanes[first + i][i];
      segment_of[first + i] = 0;
    }
}

// An array of shared memory, declared again by every thread.
HIDDEN void emu_races_shared(const void* at, size_t size, const char* name) {
  const char* const begin = static_cast<const char*>(at);
  for (Shared& a : arrays)
    if (a.begin == begin) {
      if (a.end != begin + size) a.end = begin + size, a.cells.assign(size, Cell());
      return;
    }
  arrays.push_back({begin, begin + size, name, std::vector<Cell>(size)});
}

HIDDEN void emu_races_atomic(const void* at, size_t size, const void* code) {
  access(at, size, true, code, ATOMIC);
}

#define HERE __builtin_return_address(0)
#define HOOKS(size)                                                                          \
  HIDDEN void __tsan_read##size(void* at) { access(at, size, false, HERE); }                 \
  HIDDEN void __tsan_write##size(void* at) { access(at, size, true, HERE); }                 \
  HIDDEN void __tsan_unaligned_read##size(void* at) { access(at, size, false, HERE); }       \
  HIDDEN void __tsan_unaligned_write##size(void* at) { access(at, size, true, HERE); }       \
  HIDDEN void __tsan_volatile_read##size(void* at) { access(at, size, false, HERE); }        \
  HIDDEN void __tsan_volatile_write##size(void* at) { access(at, size, true, HERE); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
HIDDEN void __tsan_read_range(void* at, long size) { access(at, size, false, HERE); }
HIDDEN void __tsan_write_range(void* at, long size) { access(at, size, true, HERE); }
HIDDEN void __tsan_vptr_update(void*, void*) {}
HIDDEN void __tsan_func_entry(void*) {}
HIDDEN void __tsan_func_exit(void*) {}
HIDDEN void __tsan_init() {}

}
