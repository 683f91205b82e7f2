"""Chains of pointwise ops as generated kernels: one launch for each chain, two where a reduction ends it in
parts.

Results do not depend on where arrays lie: alignment chooses between accesses of 16 bytes and of one element,
never the order in which a reduction adds. That order depends on shapes and dtypes alone.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.cuda.chain_source import THREADS, Form, extent_parameters, source_of, stride_parameters
from meshtape.runtime.cuda.chains import group_steps
from meshtape.runtime.cuda.links import Chain, Types
from meshtape.runtime.errors import MeshtapeError
from meshtape.runtime.overlap import Placed
from meshtape.runtime.shards import Shape

# Blocks per multiprocessor after which a launch strides over the grid; a multiprocessor holds 8 at a time.
WAVES = 64
# Bytes that a thread has under way, and statements in a loop's body, from which unrolling stops.
IN_FLIGHT, STATEMENTS = 64, 128
# Blocks that a reduction is divided into where its rows or columns are too few; the same on every device.
BLOCKS = 1024
# Elements of a row for which a warp does; longer ones take a block.
WARP_ROW = 1024
SHARED = 32 << 10
INT_RANGE = 1 << 30


def fuse(steps: Sequence[Placed], types: Types, dead: Container[int]) -> list[Placed]:
    """The steps with chains of pointwise ops (and reductions at their end) as one call each.

    `types[slot]` is the local (shape, dtype) of every slot that is bound before the program; `dead` are
    slots that nobody reads after it. The calls' functions are `(device, *arrays and numbers, out=None)`; a
    call's `over` and `numbers` say what may be written over what and how scalars arrive. Their attribute
    `chain` is what they compute.
    """
    return group_steps(steps, types, dead, Fused)


class Fused:
    """A chain as a kernel of one device, compiled for layouts of its inputs when they are first seen."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._launches: dict[Any, Launch] = {}
        self._outs = [(chain.shape, chain.dtype(value)) for value in chain.results]
        self._outs += [(end.shape, end.dtype) for end in chain.ends]

    def __call__(self, device: Any, *args: Any, out: Any = None) -> Any:
        """The results, then the reductions: an array if it is one, a tuple if there are several. `out`, or
        an entry of it, is where a result is written, also over an input of the same shape and dtype.
        """
        arrays = args[:len(self.chain.arrays)]
        strides = tuple([a.strides for a in arrays])
        launch = self._launches.get(strides)
        if launch is None:
            launch = self._launches[strides] = prepared(self.chain, strides, device)
        wanted = (None,) * len(self._outs) if out is None else out if len(self._outs) > 1 else (out,)
        empty = device.cp.empty
        made = [empty(*kind) if w is None or not w.flags.c_contiguous or launch.clashes(w, arrays) else w
                for w, kind in zip(wanted, self._outs, strict=True)]
        launch(device, args, made)
        for k, (w, m) in enumerate(zip(wanted, made, strict=True)):
            if w is not None and w is not m:
                w[...] = m
                made[k] = w
        return made[0] if len(made) == 1 else tuple(made)


class Launch(NamedTuple):
    """Everything about a launch that shapes and strides decide.

    source      None if there is nothing to do
    packed      positions of arrays that are read 16 bytes at a time
    bounds      of every array, the bytes before and behind its first element that belong to it
    partials    of every reduction in parts, how many there are, and their dtype
    functions   compiled, for arrays that are not aligned and for those that are
    """

    source: Any
    macros: dict[str, Any]
    grid: tuple[int, ...]
    numbers: tuple[Any, ...]
    packed: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]
    words: tuple[str, ...]
    results: int
    partials: tuple[tuple[int, Any], ...] = ()
    finish_grid: tuple[int, ...] = ()
    finish_numbers: tuple[Any, ...] = ()
    functions: tuple[list[Any], list[Any]] = ([], [])

    def clashes(self, out: Any, arrays: Sequence[Any]) -> bool:
        """Whether writing to `out` could change what has still to be read: it shares memory with an array,
        but not element for element.
        """
        start, stop = out.data.ptr, out.data.ptr + out.nbytes
        return any(a.data.ptr - before < stop and a.data.ptr + behind > start
                   and not (word == "c" and a.data.ptr == start and a.dtype.itemsize == out.dtype.itemsize)
                   for a, (before, behind), word in zip(arrays, self.bounds, self.words, strict=True))

    def __call__(self, device: Any, args: Sequence[Any], made: Sequence[Any]) -> None:
        if self.source is None:
            return
        bits = 0
        for k in self.packed:
            bits |= args[k].data.ptr
        results, totals = made[:self.results], made[self.results:]
        for array in results:
            bits |= array.data.ptr
        functions = self.functions[bits % 16 == 0]
        if not functions:
            macros = {**self.macros, "FAST": int(bits % 16 == 0)}
            functions += [device.kernels(self.source, name, **macros) for name in self.source.functions]
        parts = [device.cp.empty(count, dtype) for count, dtype in self.partials]
        functions[0](self.grid, (THREADS,), (*args, *results, *(parts or totals), *self.numbers))
        if parts:
            pairs = [array for pair in zip(parts, totals, strict=True) for array in pair]
            functions[1](self.finish_grid, (THREADS,), (*pairs, *self.finish_numbers))


# --- layouts ----------------------------------------------------------------------------------------

class Layout(NamedTuple):
    """A chain's shape with neighbouring dimensions that all arrays take alike made one, and the arrays'
    strides, in elements.
    """

    extents: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]


def layout_of(chain: Chain, strides: Sequence[Sequence[int]], cut: int) -> Layout:
    """Dimensions before `cut` are not joined with those from there on."""
    wide = [_stretched(chain.shape, shape, given, dtype.itemsize)
            for (shape, dtype), given in zip(chain.arrays, strides, strict=True)]
    extents: list[int] = []
    joined: list[list[int]] = [[] for _ in wide]
    was_before = True
    for d, n in enumerate(chain.shape):
        if n == 1:
            continue
        alike = all(s[-1] == w[d] * n for s, w in zip(joined, wide, strict=True)) if extents else False
        if alike and was_before == (d < cut):
            extents[-1] *= n
            for s, w in zip(joined, wide, strict=True):
                s[-1] = w[d]
        else:
            extents.append(n)
            for s, w in zip(joined, wide, strict=True):
                s.append(w[d])
        was_before = d < cut
    return Layout(tuple(extents), tuple(map(tuple, joined)))


def _stretched(to: Shape, shape: Shape, strides: Sequence[int], itemsize: int) -> list[int]:
    """Strides in elements of an array broadcast to a shape; 0 where it is stretched."""
    if any(s % itemsize for s, n in zip(strides, shape, strict=True) if n > 1):
        raise MeshtapeError(f"an array of {itemsize}-byte elements has strides of {strides} bytes; "
                            f"copy it first")
    own = [0 if n == 1 else s // itemsize for s, n in zip(strides, shape, strict=True)]
    return [0] * (len(to) - len(shape)) + own


def words_of(layout: Layout, width: int) -> tuple[str, ...]:
    """What chain_source calls the arrays' layouts, for threads that take `width` neighbours."""
    contiguous = tuple(prod(layout.extents[d + 1:]) for d in range(len(layout.extents)))
    return tuple("c" if s == contiguous else "o" if not any(s) else _letters(s, width)
                 for s in layout.strides)


def _letters(strides: tuple[int, ...], width: int) -> str:
    *outer, last = strides
    whole = all(s % width == 0 for s in outer)
    end = "0" if not last else "s" if last != 1 else "1" if whole else "u"
    return "".join("s" if s else "0" for s in outer) + end


def magic(by: int) -> tuple[np.uint32, np.int32]:
    """Multiplier and shift of a division by `by` < 2^31 (see chain_source)."""
    shift = (by - 1).bit_length()
    return np.uint32(((1 << 32) * ((1 << shift) - by)) // by + 1), np.int32(shift)


# --- launches ---------------------------------------------------------------------------------------

def prepared(chain: Chain, strides: Sequence[Sequence[int]], device: Any) -> Launch:
    """The launch of a chain whose arrays have these strides (in bytes)."""
    size, sizes = prod(chain.shape), [prod(end.shape) for end in chain.ends]
    if not size and not any(sizes):
        return Launch(None, {}, (), (), (), ((0, 0),) * len(strides), ("c",) * len(strides),
                      len(chain.results))
    kind, cut, rows, columns = geometry(chain)
    layout = layout_of(chain, strides, cut) if size else Layout((), ((),) * len(strides))
    form, grid, counts, finish = plan(chain, kind, rows, columns, layout, device)
    reach = max([size, *(_reach(layout, k) for k in range(len(strides)))])
    index = np.int32 if reach < INT_RANGE else np.int64
    extents = layout.extents if extent_parameters(form) else ()
    numbers = [index(c) for c in counts] + divisors(chain)
    for n in extents[1:]:
        multiplier = magic(n) if index is np.int32 else (np.uint32(0), np.int32(0))
        numbers += [index(n), *multiplier]
    numbers += [index(layout.strides[k][d]) for k, d in stride_parameters(form)]
    whole = not extents or extents[-1] % form.width == 0
    macros = {"index_t": "int" if index is np.int32 else "int64", "WHOLE": int(whole)}
    packed = tuple(k for k, word in enumerate(form.words) if word == "c" or word[-1] == "1")
    bounds = tuple(_bounds(layout, k, dtype.itemsize) for k, (_, dtype) in enumerate(chain.arrays))
    partials = [(n * finish.parts, end.total) for n, end in zip(sizes, chain.ends, strict=True)]
    return Launch(
        source_of(chain, form), macros, grid, tuple(numbers), packed, bounds, form.words, len(chain.results),
        tuple(partials) if form.split else (), finish.grid,
        (*(index(c) for c in finish.counts), *divisors(chain)), ([], []))


def geometry(chain: Chain) -> tuple[str, int, int, int]:
    """The kind of a chain's form, the dimension at which its shape is cut, and the sizes before and from
    there on.
    """
    if not chain.ends:
        return "flat", len(chain.shape), prod(chain.shape), 1
    kept = [d for d, n in enumerate(chain.shape) if n != 1 and d not in chain.reduced]
    first = bool(kept) and min(chain.reduced) < min(kept)
    cut = min(kept) if first else min(chain.reduced)
    return "columns" if first else "rows", cut, prod(chain.shape[:cut]), prod(chain.shape[cut:])


def divisors(chain: Chain) -> list[Any]:
    return [np.float64(end.divisor) for end in chain.ends if end.divisor is not None]


class Finish(NamedTuple):
    """The second launch of a reduction in parts."""

    parts: int = 1
    grid: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


def plan(chain: Chain, kind: str, rows: int, columns: int, layout: Layout,
         device: Any) -> tuple[Form, tuple[int, ...], tuple[int, ...], Finish]:
    """Form, grid and counts (the integers that the kernel takes) of a launch, and what follows it."""
    width = elements_at_once(chain)
    dims = len(layout.extents)
    if kind == "flat":
        words = words_of(layout, width)
        unroll = passes_at_once(chain, words, width)
        blocks = device.kernels.blocks_for(rows, THREADS * width * unroll, WAVES)
        return Form("flat", width, unroll, words, dims), (blocks,), (rows,), Finish()
    while columns % width or (kind == "columns" and shared(chain, width) > SHARED):
        width //= 2
    words = words_of(layout, width)
    unroll = min(2, passes_at_once(chain, words, width))
    form = Form(kind, width, unroll, words, dims)
    if kind == "rows":
        team = power_of_two(-(-columns // width), 32) if columns <= WARP_ROW else THREADS
        part, parts = divided(columns, team * width * 4, BLOCKS // max(rows, 1) if team == THREADS else 1)
        blocks = -(-rows * parts // (THREADS // team))
        return (form._replace(team=team, split=parts > 1), (blocks,), (rows, columns, part, parts),
                Finish(parts, (rows,), (parts,)))
    team = power_of_two(-(-columns // width), 32)
    tiles = -(-columns // (team * width))
    part, parts = divided(rows, THREADS // team * 8, BLOCKS // tiles)
    return (form._replace(team=team, split=parts > 1), (tiles, parts), (rows, columns, part),
            Finish(parts, (-(-columns // 32),), (columns, parts)))


def divided(n: int, least: int, most: int) -> tuple[int, int]:
    """n things in up to `most` parts of a multiple of `least`: the size of a part, and how many there
    are.
    """
    parts = max(1, min(-(-n // least), most))
    part = max(1, -(-n // parts // least)) * least
    return part, max(1, -(-n // part))


def power_of_two(at_least: int, at_most: int) -> int:
    return min(at_most, 1 << (max(at_least, 1) - 1).bit_length())


def shared(chain: Chain, width: int) -> int:
    return sum(THREADS * width * end.total.itemsize for end in chain.ends)


def elements_at_once(chain: Chain) -> int:
    """Neighbours that a thread takes: 16 bytes of the smallest dtype that is not one byte, fewer in long
    chains.
    """
    sizes = [dtype.itemsize for shape, dtype in chain.arrays if prod(shape) > 1 or prod(chain.shape) == 1]
    sizes += [chain.dtype(value).itemsize for value in chain.results]
    width = 16 // min((s for s in sizes if s > 1), default=1)
    while width > 2 and width * len(chain.links) > STATEMENTS:
        width //= 2
    return width


def passes_at_once(chain: Chain, words: Sequence[str], width: int) -> int:
    """How often a loop's body is unrolled, so that enough loads are under way at once."""
    read = sum(width * dtype.itemsize
               for (_, dtype), word in zip(chain.arrays, words, strict=True) if word != "o")
    work, unroll = width * len(chain.links), 1
    while unroll < 4 and 2 * unroll * read <= IN_FLIGHT and 2 * unroll * work <= STATEMENTS:
        unroll *= 2
    return unroll


def _reach(layout: Layout, k: int) -> int:
    """The greatest distance of an element from an array's first, in elements."""
    return sum(abs(s) * (n - 1) for s, n in zip(layout.strides[k], layout.extents, strict=True) if n)


def _bounds(layout: Layout, k: int, itemsize: int) -> tuple[int, int]:
    steps = [s * (n - 1) * itemsize for s, n in zip(layout.strides[k], layout.extents, strict=True)]
    return -sum(s for s in steps if s < 0), itemsize + sum(s for s in steps if s > 0)
