"""The CUDA C++ of a chain, for one layout of its inputs.

A thread takes V neighbouring elements of the chain's shape at a time, U times over: all are loaded, then
computed and written, so that a result may lie over an input. What an element's inputs are is said by one
word for each array:

c        as the result, at the element's own index
o        one element for all
letters  one for each dimension (dimensions that lie alike are one): 0 the array is stretched, s a stride that
         the launch gives; in the last dimension also 1 neighbours are neighbours in memory, V of them
         aligned, and u neighbours are, but aligned no more than an element
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.expression import (
    LIBRARY,
    link_text,
    loaded,
    memory_type,
    register_type,
    rounded,
    stored,
)
from meshtape.runtime.cuda.links import Chain, End
from meshtape.runtime.cuda.source import Source, ctype

THREADS = 256
KERNEL = f'extern "C" __global__ void __launch_bounds__({THREADS})'

_HELPERS = r'''
namespace chain {
struct Add {
  template <class A_> __device__ __forceinline__ A_ operator()(A_ a, A_ b) const { return add(a, b); }
};
struct Larger {
  template <class A_> __device__ __forceinline__ A_ operator()(A_ a, A_ b) const { return larger(a, b); }
};
struct Smaller {
  template <class A_> __device__ __forceinline__ A_ operator()(A_ a, A_ b) const { return smaller(a, b); }
};

// V_ elements from index i on, of n; FAST: aligned.
template <int V_, class A_>
__device__ __forceinline__ void get(A_ (&to)[V_], const A_* from, index_t i, index_t n) {
  constexpr int FULL = 16 / sizeof(A_), PACK = FULL < V_ ? FULL : V_;
  if (FAST && i + V_ <= n) {
#pragma unroll
    for (int k = 0; k < V_; k += PACK) {
      const Vec<A_, PACK> pack = load<PACK>(from + i + k);
#pragma unroll
      for (int j = 0; j < PACK; ++j) to[k + j] = pack[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < V_; ++j) to[j] = i + j < n ? from[i + j] : A_(0);
  }
}
template <int V_, class A_>
__device__ __forceinline__ void put(A_* to, const A_ (&from)[V_], index_t i, index_t n) {
  constexpr int FULL = 16 / sizeof(A_), PACK = FULL < V_ ? FULL : V_;
  if (FAST && i + V_ <= n) {
#pragma unroll
    for (int k = 0; k < V_; k += PACK) {
      Vec<A_, PACK> pack;
#pragma unroll
      for (int j = 0; j < PACK; ++j) pack[j] = from[k + j];
      store(to + i + k, pack);
    }
  } else {
#pragma unroll
    for (int j = 0; j < V_; ++j)
      if (i + j < n) to[i + j] = from[j];
  }
}

// i / by for 0 <= i < 2^31 by a multiplication (Granlund and Montgomery, PLDI 1994, figure 4.1).
__device__ __forceinline__ index_t quotient(index_t i, index_t by, uint32 magic, int shift) {
  if constexpr (sizeof(index_t) == 4) return index_t((__umulhi(uint32(i), magic) + uint32(i)) >> shift);
  return i / by;
}
}
'''


class Form(NamedTuple):
    """How the elements are gone through: "flat", or with the last ("rows") or the first ("columns")
    dimensions reduced, by `team` threads for each row, or each column of V elements, as one part or `split`
    in several. V elements are taken `unroll` times at once. `words` and `dims` describe the inputs.
    """

    kind: str
    width: int
    unroll: int
    words: tuple[str, ...]
    dims: int
    team: int = THREADS
    split: bool = False


def extent_parameters(form: Form) -> list[str]:
    """Dimensions whose extents the launch gives: as extent, magic number and shift."""
    return [str(d) for d in range(1, form.dims)] if any(_wandering(w) for w in form.words) else []


def stride_parameters(form: Form) -> list[tuple[int, int]]:
    """(array, dimension) of strides that the launch gives."""
    return [(k, d) for k, word in enumerate(form.words) if _wandering(word)
            for d, letter in enumerate(word) if letter == "s"]


def _wandering(word: str) -> bool:
    return word not in ("c", "o")


def source_of(chain: Chain, form: Form) -> Source:
    """Functions `fused` and, of a split reduction, `finish`. Macros: FAST (arrays "c" and results are
    aligned to 16 bytes), WHOLE (V divides the last dimension), index_t.
    """
    body = _Body(chain, form)
    text = {"flat": body.flat, "rows": body.rows, "columns": body.columns}[form.kind]()
    if form.split:
        text += body.finish_rows() if form.kind == "rows" else body.finish_columns()
    constants = (f"constexpr int V = {form.width}, U = {form.unroll};\n"
                 f"constexpr int TEAM = {form.team}, THREADS = {THREADS};\n")
    code = LIBRARY + _HELPERS + constants + text
    name = "chain_" + hashlib.blake2b(code.encode(), digest_size=12).hexdigest()
    return Source(name, code, ("fused", "finish") if form.split else ("fused",))


# --- pieces of text ---------------------------------------------------------------------------------

def _total(end: End) -> str:
    return ctype(end.total)


def _function(end: End) -> str:
    return {"sum": "chain::Add()", "max": "chain::Larger()", "min": "chain::Smaller()"}[end.combine]


def _neutral(chain: Chain, end: End) -> str:
    """What a reduction of nothing is."""
    total, dtype = _total(end), chain.dtype(end.operand)
    if end.combine == "sum":
        return f"{total}(0)"
    if dtypes.is_floating(dtype):
        return f"{'-' if end.combine == 'max' else ''}infinity<{total}>()"
    if dtype == dtypes.bool_:
        return f"{total}({int(end.combine == 'min')})"
    return f"{total}(Limits<{ctype(dtype)}>::{'least' if end.combine == 'max' else 'greatest'})"


def _final(k: int, end: End, text: str) -> str:
    """A total as an element of the output."""
    if end.divisor is not None:
        text = f"({text} / {_total(end)}(d{k}))"
    return stored(f"chain::cast<{register_type(end.dtype)}>({text})", end.dtype)


def _indented(lines: list[str], by: int) -> str:
    return "".join(f"{'  ' * by}{line}\n" for line in lines)


class _Body:
    """The functions of one chain. In their text `i` is the index of V elements, `n` the end of the indices
    that are taken; x, n, y, z name arrays, numbers, results and reductions; v the values of one element.
    """

    def __init__(self, chain: Chain, form: Form) -> None:
        self.chain, self.form = chain, form
        self.first_link = len(chain.arrays) + len(chain.numbers)
        self.read = [k for k, word in enumerate(form.words) if word != "o"]

    def parameters(self, *more: str) -> str:
        chain, form = self.chain, self.form
        found = [f"const {memory_type(dtype)}* x{k}" for k, (_, dtype) in enumerate(chain.arrays)]
        found += [f"const {'double' if letter == 'd' else 'int64'}* n{k}"
                  for k, letter in enumerate(chain.numbers, len(chain.arrays))]
        found += [f"{memory_type(chain.dtype(value))}* y{k}" for k, value in enumerate(chain.results)]
        found += [f"{_total(end) if form.split else memory_type(end.dtype)}* z{k}"
                  for k, end in enumerate(chain.ends)]
        found += [*more, *(f"double d{k}" for k, end in enumerate(chain.ends) if end.divisor is not None)]
        found += [f"index_t e{d}, uint32 m{d}, int h{d}" for d in extent_parameters(form)]
        found += [f"index_t s{k}_{d}" for k, d in stride_parameters(form)]
        return ", ".join(found)

    def head(self, *more: str) -> str:
        return f"{KERNEL} fused({self.parameters(*more)}) {{\n" + _indented(self.constants(), 1)

    def constants(self) -> list[str]:
        """Values that are the same for all elements."""
        chain = self.chain
        lines = [f"const {register_type(dtype)} v{k} = {loaded(f'*x{k}', dtype)};"
                 for k, (_, dtype) in enumerate(chain.arrays) if self.form.words[k] == "o"]
        wanted = dict.fromkeys((value, dtype) for link in chain.links
                               for value, dtype in zip(link.operands, link.given, strict=True)
                               if len(chain.arrays) <= value < self.first_link)
        for value, dtype in wanted:
            kind = register_type(dtype)
            lines.append(f"const {kind} v{value}_{dtype.name} = "
                         f"{rounded(f'chain::cast<{kind}>(*n{value})', dtype)};")
        return lines

    # --- loads ---

    def declared(self) -> list[str]:
        return [f"{memory_type(self.chain.arrays[k][1])} a{k}[U][V];" for k in self.read]

    def loads(self) -> list[str]:
        """The inputs of the V elements at index i, which may lie at n or beyond."""
        lines = [f"chain::get<V>(a{k}[u], x{k}, i, n);" for k in self.read if self.form.words[k] == "c"]
        wander = [k for k in self.read if _wandering(self.form.words[k])]
        if wander:
            lines += ["#if WHOLE", "if (i < n) {", *("  " + line for line in self.coordinates("i"))]
            lines += ["  " + line for k in wander for line in self.neighbours(k)]
            lines += ["}", "#else", "#pragma unroll", "for (int j = 0; j < V; ++j) {",
                      "  const index_t at = i + j < n ? i + j : 0;"]
            lines += ["  " + line for line in self.coordinates("at")]
            lines += [*(f"  a{k}[u][j] = x{k}[{self.offset(k)}];" for k in wander), "}", "#endif"]
        return lines

    def coordinates(self, index: str) -> list[str]:
        """The coordinates c0, c1, ... of an index."""
        lines, rest = [], index
        for d in range(self.form.dims - 1, 0, -1):
            lines += [f"const index_t r{d} = chain::quotient({rest}, e{d}, m{d}, h{d});",
                      f"const index_t c{d} = {rest} - r{d} * e{d};"]
            rest = f"r{d}"
        return [*lines, f"const index_t c0 = {rest};"]

    def offset(self, k: int) -> str:
        terms = [f"c{d}" if letter in "1u" else f"c{d} * s{k}_{d}"
                 for d, letter in enumerate(self.form.words[k]) if letter != "0"]
        return " + ".join(terms)

    def neighbours(self, k: int) -> list[str]:
        """V elements that differ in the last coordinate."""
        last = self.form.words[k][-1]
        if last == "1":
            return [f"const index_t o{k} = {self.offset(k)};",
                    f"chain::get<V>(a{k}[u], x{k}, o{k}, o{k} + V);"]
        step = {"0": "", "u": " + j", "s": f" + j * s{k}_{self.form.dims - 1}"}[last]
        return [f"const {memory_type(self.chain.arrays[k][1])}* p{k} = x{k} + ({self.offset(k)});",
                "#pragma unroll", f"for (int j = 0; j < V; ++j) a{k}[u][j] = p{k}[0{step}];"]

    # --- values ---

    def operand(self, value: int, dtype: Any) -> str:
        numbered = len(self.chain.arrays) <= value < self.first_link
        return f"v{value}_{dtype.name}" if numbered else f"v{value}"

    def values(self) -> list[str]:
        """All values of element j, written where they are results."""
        chain = self.chain
        read = [(k, chain.arrays[k][1]) for k in self.read]
        lines = [f"const {register_type(d)} v{k} = {loaded(f'a{k}[u][j]', d)};" for k, d in read]
        for value, link in enumerate(chain.links, self.first_link):
            operands = [self.operand(v, d) for v, d in zip(link.operands, link.given, strict=True)]
            text = link_text(link.op, link.attrs, operands, link.given, link.dtype)
            if value in chain.results:
                k = chain.results.index(value)
                lines += [f"b{k}[j] = {stored(text, link.dtype)};",
                          f"const {register_type(link.dtype)} v{value} = {loaded(f'b{k}[j]', link.dtype)};"]
            else:
                lines.append(f"const {register_type(link.dtype)} v{value} = {text};")
        return lines

    def work(self, totals: list[str]) -> list[str]:
        """What is done with V elements that were loaded; `totals` are lines for the reductions."""
        chain = self.chain
        lines = [f"{memory_type(chain.dtype(value))} b{k}[V];" for k, value in enumerate(chain.results)]
        lines += ["#pragma unroll", "for (int j = 0; j < V; ++j) {",
                  *("  " + line for line in (*self.values(), *totals)), "}"]
        return lines + [f"chain::put<V>(y{k}, b{k}, i, n);" for k in range(len(chain.results))]

    def passes(self, index: str, totals: list[str]) -> str:
        """U times V elements; `index` is i for the u-th of them, n or beyond where there is none."""
        each = ["#pragma unroll", "for (int u = 0; u < U; ++u) {", f"  const index_t i = {index};"]
        lines = [*self.declared(), *each, *("  " + line for line in self.loads()), "}",
                 *each, "  if (i >= n) break;", *("  " + line for line in self.work(totals)), "}"]
        return _indented(lines, 2)

    # --- functions ---

    def flat(self) -> str:
        return (self.head("index_t n") +
                "  const index_t all = index_t(gridDim.x) * (U * THREADS * V);\n"
                "  index_t start = (index_t(blockIdx.x) * (U * THREADS) + threadIdx.x) * V;\n"
                "  for (; start < n; start += all) {\n"
                + self.passes("start + u * (THREADS * V)", []) + "  }\n}\n")

    def rows(self) -> str:
        """TEAM threads for each part of each row."""
        ends = list(enumerate(self.chain.ends))
        lines = ["const int lane = threadIdx.x % TEAM;",
                 "const index_t item = index_t(blockIdx.x) * (THREADS / TEAM) + threadIdx.x / TEAM;",
                 "const index_t row = item / parts, start0 = (item - row * parts) * part;",
                 "const bool mine = row < rows;",
                 "const index_t stop = start0 + part < width ? start0 + part : width;",
                 "const index_t n = mine ? row * width + stop : 0;",
                 *(f"{_total(end)} t{k} = {_neutral(self.chain, end)};" for k, end in ends),
                 "index_t start = mine ? row * width + start0 + lane * V : 0;",
                 "for (; start < n; start += TEAM * U * V) {"]
        totals = [f"t{k} = {_function(end)}(t{k}, chain::cast<{_total(end)}>({self.operand_of(end)}));"
                  for k, end in ends]
        after = [line for k, end in ends for line in self.gather_team(k, end)]
        written = [f"z{k}[item] = {f't{k}' if self.form.split else _final(k, end, f't{k}')};"
                   for k, end in ends]
        return (self.head("index_t rows", "index_t width", "index_t part", "index_t parts")
                + _indented(lines, 1) + self.passes("start + u * (TEAM * V)", totals) + "  }\n"
                + _indented([*after, "if (mine && lane == 0) {", *("  " + line for line in written), "}"], 1)
                + "}\n")

    def operand_of(self, end: End) -> str:
        return f"v{end.operand}"

    def gather_team(self, k: int, end: End) -> list[str]:
        if self.form.team <= 32:
            return [f"t{k} = lanes_reduce<TEAM>(t{k}, {_function(end)});"]
        return self.gather_block(k, end)

    def gather_block(self, k: int, end: End) -> list[str]:
        return [f"__shared__ {_total(end)} room{k}[32];", f"{_total(end)} one{k}[1] = {{t{k}}};",
                f"block_reduce(one{k}, room{k}, {_neutral(self.chain, end)}, {_function(end)});",
                f"t{k} = one{k}[0];"]

    def columns(self) -> str:
        """Tiles of TEAM times V columns, through the rows of one part."""
        ends = list(enumerate(self.chain.ends))
        lines = ["constexpr int LINES = THREADS / TEAM;",
                 "const int across = threadIdx.x % TEAM, down = threadIdx.x / TEAM;",
                 "const index_t column = (index_t(blockIdx.x) * TEAM + across) * V, n = rows * width;",
                 "const index_t begin = blockIdx.y * part, stop = begin + part < rows ? begin + part : rows;"]
        for k, end in ends:
            lines += [f"{_total(end)} t{k}[V];", "#pragma unroll",
                      f"for (int j = 0; j < V; ++j) t{k}[j] = {_neutral(self.chain, end)};"]
        lines.append("if (column < width) "
                     "for (index_t row = begin + down; row < stop; row += LINES * U) {")
        totals = [f"t{k}[j] = {_function(end)}(t{k}[j], chain::cast<{_total(end)}>({self.operand_of(end)}));"
                  for k, end in ends]
        after = [line for k, end in ends for line in self.gather_columns(k, end)]
        return (self.head("index_t rows", "index_t width", "index_t part") + _indented(lines, 1)
                + self.passes("row + u * LINES < stop ? (row + u * LINES) * width + column : n", totals)
                + "  }\n" + _indented(after, 1) + "}\n")

    def gather_columns(self, k: int, end: End) -> list[str]:
        """Totals of a tile's lines, added from the first line to the last."""
        result = "sum" if self.form.split else _final(k, end, "sum")
        place = "index_t(blockIdx.y) * width + at" if self.form.split else "at"
        return [f"__shared__ {_total(end)} room{k}[THREADS * V];", "#pragma unroll",
                f"for (int j = 0; j < V; ++j) room{k}[threadIdx.x * V + j] = t{k}[j];", "__syncthreads();",
                "for (int c = threadIdx.x; c < TEAM * V; c += THREADS) {",
                f"  {_total(end)} sum = room{k}[c];",
                "  for (int line = 1; line < LINES; ++line)",
                f"    sum = {_function(end)}(sum, room{k}[line * (TEAM * V) + c]);",
                "  const index_t at = index_t(blockIdx.x) * (TEAM * V) + c;",
                f"  if (at < width) z{k}[{place}] = {result};", "}"]

    def finish_parameters(self, *more: str) -> str:
        ends = list(enumerate(self.chain.ends))
        found = [f"const {_total(end)}* p{k}, {memory_type(end.dtype)}* z{k}" for k, end in ends]
        found += [*more, *(f"double d{k}" for k, end in ends if end.divisor is not None)]
        return ", ".join(found)

    def finish_rows(self) -> str:
        """A block for each row, over its parts."""
        lines = ["const index_t row = blockIdx.x;"]
        for k, end in enumerate(self.chain.ends):
            lines += [f"{_total(end)} t{k} = {_neutral(self.chain, end)};",
                      "for (index_t k = threadIdx.x; k < parts; k += THREADS) "
                      f"t{k} = {_function(end)}(t{k}, p{k}[row * parts + k]);",
                      *self.gather_block(k, end),
                      f"if (threadIdx.x == 0) z{k}[row] = {_final(k, end, f't{k}')};"]
        return f"{KERNEL} finish({self.finish_parameters('index_t parts')}) {{\n{_indented(lines, 1)}}}\n"

    def finish_columns(self) -> str:
        """Tiles of 32 columns, 8 parts at a time."""
        lines = ["const int across = threadIdx.x % 32, down = threadIdx.x / 32;",
                 "const index_t at = index_t(blockIdx.x) * 32 + across;"]
        for k, end in enumerate(self.chain.ends):
            lines += [
                f"__shared__ {_total(end)} room{k}[THREADS];",
                f"{_total(end)} t{k} = {_neutral(self.chain, end)};",
                "if (at < width) for (index_t k = down; k < parts; k += THREADS / 32) "
                f"t{k} = {_function(end)}(t{k}, p{k}[k * width + at]);",
                f"room{k}[threadIdx.x] = t{k};", "__syncthreads();", "if (down == 0 && at < width) {",
                f"  for (int line = 1; line < THREADS / 32; ++line) "
                f"t{k} = {_function(end)}(t{k}, room{k}[line * 32 + across]);",
                f"  z{k}[at] = {_final(k, end, f't{k}')};", "}"]
        given = self.finish_parameters("index_t width", "index_t parts")
        return f"{KERNEL} finish({given}) {{\n{_indented(lines, 1)}}}\n"
