"""Random collectives and what they must give, computed on one rank with plain NumPy."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import numpy as np

NARROW: tuple[Any, ...] = ("float16",)
try:
    from ml_dtypes import bfloat16
    NARROW += (bfloat16,)
except ImportError:
    pass

OPS = ("sum", "max", "min", "prod")
VERBS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send", "barrier",
         "all_reduce_many", "reduce_scatter_many", "all_gather_many")
DTYPES: tuple[Any, ...] = ("bool", "int8", "uint8", "int16", "int32", "int64", "uint64", "float32", "float64",
                           "complex64", "complex128", *NARROW)
UFUNCS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


class Case(NamedTuple):
    """One collective on `size` ranks. counts[s][r] is how many elements rank s has for rank r."""

    verb: str
    size: int
    dtype: Any
    op: str
    counts: tuple[tuple[int, ...], ...]
    root: int
    in_place: bool
    seed: int


def random_case(seed: int, size: int, largest: int) -> Case:
    """A case whose chunks have up to `largest` elements; every third one is small, every tenth empty."""
    draw = random.Random(f"{seed} {size}")
    top = draw.choice((0, 5, 40, 3000, 30_000, largest, largest, largest))
    row = [draw.choice((0, top, draw.randint(0, top))) for _ in range(size)]
    table = [row if draw.random() < 0.5 else [draw.randint(0, top) for _ in range(size)] for _ in range(size)]
    return Case(draw.choice(VERBS), size, draw.choice(DTYPES), draw.choice(OPS), tuple(map(tuple, table)),
                draw.randrange(size), draw.random() < 0.5, seed)


def values(case: Case, rank: int, count: int) -> Any:
    """What `rank` brings. No zeros of either sign: which of them max() returns is NumPy's business."""
    rng = np.random.default_rng([case.seed, rank])
    dtype = np.dtype(case.dtype)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, count, dtype, endpoint=True)
    if dtype.kind == "b":
        return rng.random(count) < 0.5
    drawn = rng.standard_normal(count) + 1e-3
    if dtype.kind == "c":
        drawn = drawn + 1j * rng.standard_normal(count)
    return drawn.astype(dtype)


def reduced(parts: list[Any], op: str) -> Any:
    """Left to right, one rounding at the end for 16-bit floats."""
    dtype = parts[0].dtype
    wide = np.dtype(np.float32) if dtype.itemsize == 2 and dtype.kind in "fV" else dtype
    total = parts[0].astype(wide)
    with np.errstate(all="ignore"):
        for part in parts[1:]:
            part = part.astype(wide)
            if op == "prod" and dtype.kind == "c":  # np.multiply may fuse a multiplication and an addition
                real = total.real * part.real - total.imag * part.imag
                total = (real + 1j * (total.real * part.imag + total.imag * part.real)).astype(dtype)
            else:
                total = UFUNCS[op](total, part)
        return total.astype(dtype)


def check(got: Any, want: Any, case: Case) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape, case
    assert got.tobytes() == want.tobytes(), f"{case}: {got} is not {want}"


def run(comm: Any, case: Case) -> None:
    """Run `case` on this rank and compare every bit of the result."""
    assert comm.size == case.size
    RUN[case.verb](comm, case)


def _all_reduce(comm: Any, case: Case) -> None:
    count = sum(case.counts[0])
    parts = [values(case, r, count) for r in range(case.size)]
    x = parts[comm.rank].reshape((1, count) if case.seed % 2 else (count,)).copy()
    got = comm.all_reduce(x, case.op, out=x if case.in_place else None)
    assert (got is x) == case.in_place
    check(got.reshape(-1), reduced(parts, case.op), case)


def _reduce_scatter(comm: Any, case: Case) -> None:
    counts = case.counts[0]
    parts = [values(case, r, sum(counts)) for r in range(case.size)]
    x, start = parts[comm.rank].copy(), sum(counts[:comm.rank])
    mine = slice(start, start + counts[comm.rank])
    got = comm.reduce_scatter(x, counts, case.op, out=x[mine] if case.in_place else None)
    check(got, reduced([part[mine] for part in parts], case.op), case)


def _all_gather(comm: Any, case: Case) -> None:
    counts = case.counts[0]
    parts = [values(case, r, counts[r]) for r in range(case.size)]
    want = np.concatenate(parts)
    x, out = parts[comm.rank], None
    if case.in_place:
        out = np.zeros_like(want)
        start = sum(counts[:comm.rank])
        x = out[start:start + counts[comm.rank]]
        x[...] = parts[comm.rank]
    check(comm.all_gather(x, counts, out=out), want, case)


def _all_to_all(comm: Any, case: Case) -> None:
    me, received = comm.rank, []
    for r in range(case.size):
        start = sum(case.counts[r][:me])
        received.append(values(case, r, sum(case.counts[r]))[start:start + case.counts[r][me]])
    want = np.concatenate(received)
    x = values(case, me, sum(case.counts[me]))
    out = np.empty_like(want) if case.in_place else None
    check(comm.all_to_all(x, case.counts[me], [row[me] for row in case.counts], out=out), want, case)


def _broadcast(comm: Any, case: Case) -> None:
    want = values(case, case.root, case.counts[0][0]).reshape(-1, 1)
    x = want.copy() if comm.rank == case.root else np.zeros_like(want)
    got = comm.broadcast(x, case.root, out=x if case.in_place else None)
    assert (got is x) == case.in_place
    check(got, want, case)


def _send(comm: Any, case: Case) -> None:
    """Once round the ring, rank 0 first, so that it works however little a transport buffers."""
    count, before, after = case.counts[0][0], (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    want = values(case, before, count)
    if comm.rank == 0:
        comm.send(values(case, comm.rank, count), after)
    check(comm.recv(np.empty_like(want), before), want, case)
    if comm.rank != 0:
        comm.send(values(case, comm.rank, count), after)


def _shapes(case: Case) -> tuple[list[tuple[int, ...]], list[int]]:
    """Shapes of several arrays of up to as many elements as the case's first counts say, and dims to cut."""
    draw, shapes, dims = random.Random(case.seed), [], []
    for count in (*case.counts[0], *case.counts[-1]):
        ndim = draw.randint(1, 3)
        shape = [1] * ndim
        for _ in range(3):
            d = draw.randrange(ndim)
            shape[d] = max(1, min(draw.choice((1, 2, 3, 7, 64, count)), count // prod(shape) * shape[d]))
        if draw.random() < 0.1:
            shape[draw.randrange(ndim)] = 0
        shapes.append(tuple(shape))
        dims.append(draw.randrange(ndim))
    return shapes, dims


def _of_each(case: Case, rank: int, shapes: list[tuple[int, ...]]) -> list[Any]:
    flat, at, out = values(case, rank, sum(map(prod, shapes))), 0, []
    for shape in shapes:
        out.append(flat[at:at + prod(shape)].reshape(shape).copy())
        at += prod(shape)
    return out


def part(x: Any, dim: int, size: int, rank: int) -> Any:
    """Rank's part of x, the larger parts first."""
    return np.ascontiguousarray(np.array_split(x, size, dim)[rank])


def _in_resident_memory(comm: Any, case: Case, given: list[Any]) -> tuple[list[Any], Any]:
    """The arrays, in every third case some of them in memory that peers read, and that memory."""
    via = comm.resident([x.shape for x in given], case.dtype, case.seed % 999) if case.seed % 3 == 0 else None
    if via is None:
        return given, None
    for i, home in enumerate(via.arrays):
        home[...] = given[i]
    return [x if (i + case.seed) % 3 else home for i, (x, home) in enumerate(
        zip(given, via.arrays, strict=True))], via


def _spoil(via: Any) -> None:
    """What was resident may be written when the collective is over."""
    for home in via.arrays if via is not None else ():
        home.reshape(-1).view(np.uint8)[...] = 77


def _all_reduce_many(comm: Any, case: Case) -> None:
    shapes, _ = _shapes(case)
    shapes += [()] * (case.seed % 2)
    parts = [_of_each(case, r, shapes) for r in range(case.size)]
    given = [x.copy() for x in parts[comm.rank]]
    given, via = _in_resident_memory(comm, case, given)
    out = None if case.in_place else [np.empty_like(x) for x in given]
    got = comm.all_reduce_many(given, case.op, out=out, via=via)
    _spoil(via)
    for i, x in enumerate(got):
        assert x is (out or given)[i] or (out is None and via is not None)
        check(x, reduced([part[i] for part in parts], case.op), case)
        if via is None:
            check(given[i], x if case.in_place else parts[comm.rank][i], case)


def _reduce_scatter_many(comm: Any, case: Case) -> None:
    shapes, dims = _shapes(case)
    parts = [_of_each(case, r, shapes) for r in range(case.size)]
    given = [x.copy() for x in parts[comm.rank]]
    want = [part(reduced([p[i] for p in parts], case.op), dim, case.size, comm.rank)
            for i, dim in enumerate(dims)]
    out = [np.empty_like(w) for w in want] if case.in_place else None
    given, via = _in_resident_memory(comm, case, given)
    got = comm.reduce_scatter_many(given, dims, case.op, out=out, via=via)
    _spoil(via)
    for i, x in enumerate(got):
        assert out is None or x is out[i]
        assert x.flags.c_contiguous
        check(x, want[i], case)
        if via is None:
            check(given[i], parts[comm.rank][i], case)


def _all_gather_many(comm: Any, case: Case) -> None:
    shapes, dims = _shapes(case)
    want = _of_each(case, 0, shapes)
    mine = [part(w, dim, case.size, comm.rank) for w, dim in zip(want, dims, strict=True)]
    out = [np.empty_like(w) for w in want] if case.in_place else None
    if out is not None and case.seed % 3 == 0:      # where the part belongs, if that is contiguous
        places = [np.array_split(x, case.size, d)[comm.rank] for x, d in zip(out, dims, strict=True)]
        for i, place in enumerate(places):
            if place.flags.c_contiguous:
                place[...] = mine[i]
                mine[i] = place
    got = comm.all_gather_many(mine, dims, shapes, out=out)
    for i, x in enumerate(got):
        assert out is None or x is out[i]
        assert x.flags.c_contiguous
        check(x, want[i], case)


def _barrier(comm: Any, case: Case) -> None:
    comm.barrier()


RUN: dict[str, Callable[[Any, Case], None]] = {
    "all_reduce": _all_reduce, "reduce_scatter": _reduce_scatter, "all_gather": _all_gather,
    "all_to_all": _all_to_all, "broadcast": _broadcast, "send": _send, "barrier": _barrier,
    "all_reduce_many": _all_reduce_many, "reduce_scatter_many": _reduce_scatter_many,
    "all_gather_many": _all_gather_many,
}
