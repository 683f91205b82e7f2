"""Several arrays in one message: how each is cut into one part per rank.

An array of shape (..., extent, ...) that is cut along that dimension is a matrix of `rows` rows, a row being
`extent` times what lies behind it; a rank's part is a *band* of columns. The message to a rank holds its
parts of all arrays, each in C order, one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.collectives.reduction import HostArray
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.shards import Shape, split_sizes

Key = tuple[slice, ...]


class Band(NamedTuple):
    """Columns start:stop of an array of `rows` rows and `columns` columns.

    `shape` is that of the part; `key` picks it from the array as it is, None if it is no box of the array.
    """

    rows: int
    columns: int
    start: int
    stop: int
    shape: Shape
    key: Key | None

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def size(self) -> int:
        return self.rows * self.width


Bands = tuple[Band, ...]


@dataclass(eq=False, frozen=True, slots=True)
class Resident:
    """Arrays in memory of this rank's that its peers can read, at the same places on every rank.

    `starts` are the places in bytes, `stop` is the first byte behind the last array.
    """

    arrays: tuple[HostArray, ...]
    starts: tuple[int, ...]
    stop: int


@dataclass(eq=False, slots=True)
class Plan:
    """A collective of one or several arrays, as far as shapes say: made once, kept by the communicator.

    bands[r][i] is rank r's part of array i and counts[r] the elements of rank r's parts together; both are
    empty for an all-reduce. `mine` are the shapes of this rank's parts, `sent` the payload bytes that it
    moves to its peers, `ufunc` what reduces two arrays in one step, if anything does, `homes` where the
    addends are resident, if they are, and `scripts` what a transport wants to remember.
    """

    call: int
    op: str
    dtype: np.dtype[Any]
    shapes: tuple[Shape, ...]
    bands: tuple[Bands, ...] = ()
    counts: tuple[int, ...] = ()
    mine: tuple[Shape, ...] = ()
    sent: int = 0
    ufunc: Any = None
    homes: tuple[int, ...] = ()
    scripts: dict[int, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(map(prod, self.shapes))


def cut(shapes: Sequence[Shape], dims: Sequence[int], size: int) -> tuple[Bands, ...]:
    """Part r of every array, for every rank r of `size`; raises ShapeError where a dimension is not there."""
    by_array = [_cut_one(shape, dim, size) for shape, dim in zip(shapes, dims, strict=True)]
    return tuple(zip(*by_array, strict=True))


def _cut_one(shape: Shape, dim: int, size: int) -> list[Band]:
    if not 0 <= dim < len(shape):
        raise ShapeError(f"an array of shape {shape} cannot be cut along dimension {dim}; use a dimension "
                         "that it has, counted from 0")
    rows, behind, at, out = prod(shape[:dim]), prod(shape[dim + 1:]), 0, []
    for extent in split_sizes(shape[dim], size):
        key = (*[slice(None)] * dim, slice(at, at + extent))
        part = (*shape[:dim], extent, *shape[dim + 1:])
        out.append(Band(rows, shape[dim] * behind, at * behind, (at + extent) * behind, part, key))
        at += extent
    return out


def cut_by_counts(counts: Sequence[int]) -> tuple[Bands, ...]:
    """The parts of one 1-D array, counts[r] elements for rank r."""
    total, ends = sum(counts), accumulate(counts)
    return tuple((Band(1, total, end - n, end, (n,), (slice(end - n, end),)),)
                 for n, end in zip(counts, ends, strict=True))
