"""Several arrays in one message: how each is cut into one part per rank, and the packing that needs no more.

An array of shape (..., extent, ...) that is cut along that dimension is a matrix of `rows` rows, a row being
`extent` times what lies behind it; a rank's part is a band of columns. A message to a rank holds its parts of
all arrays, each in C order, one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.collectives.reduction import HostArray
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.shards import Shape, split_sizes


class Band(NamedTuple):
    """One rank's part of one array: columns start:stop of the array as a matrix of `rows` by `columns`."""

    rows: int
    columns: int
    start: int
    stop: int
    shape: Shape

    @property
    def size(self) -> int:
        return self.rows * (self.stop - self.start)

    def of(self, x: HostArray) -> HostArray:
        """This part of the whole array `x`, as a matrix view."""
        view: HostArray = x.reshape(self.rows, self.columns)[:, self.start:self.stop]
        return view


class Plan(NamedTuple):
    """A call of one of the *_many verbs, as far as its shapes say: made once, kept by the communicator.

    bands[r][i] is rank r's part of array i, counts[r] the elements of rank r's parts together, `mine` the
    shapes of this rank's parts; all empty for all_reduce_many.
    """

    call: int
    op: str
    dtype: np.dtype[Any]
    shapes: tuple[Shape, ...]
    bands: tuple[tuple[Band, ...], ...]
    counts: tuple[int, ...]
    mine: tuple[Shape, ...]

    @property
    def total(self) -> int:
        return sum(map(prod, self.shapes))


def cut(shapes: Sequence[Shape], dims: Sequence[int], size: int) -> tuple[tuple[Band, ...], ...]:
    """Part r of every array, for every rank r of `size`; raises ShapeError where a dimension is not there."""
    by_array = [_bands(shape, dim, size) for shape, dim in zip(shapes, dims, strict=True)]
    return tuple(zip(*by_array, strict=True))


def _bands(shape: Shape, dim: int, size: int) -> list[Band]:
    if not 0 <= dim < len(shape):
        raise ShapeError(f"an array of shape {shape} cannot be cut along dimension {dim}; use 0 to "
                         f"{len(shape) - 1}")
    rows, behind, start, out = prod(shape[:dim]), prod(shape[dim + 1:]), 0, []
    for extent in split_sizes(shape[dim], size):
        stop = start + extent * behind
        out.append(Band(rows, shape[dim] * behind, start, stop, (*shape[:dim], extent, *shape[dim + 1:])))
        start = stop
    return out


def pack(plan: Plan, arrays: Sequence[HostArray]) -> HostArray:
    """The messages to all ranks, in rank order, in one flat array."""
    flat, at = np.empty(plan.total, plan.dtype), 0
    for bands in plan.bands:
        for x, band in zip(arrays, bands, strict=True):
            view = band.of(x)
            flat[at:at + band.size].reshape(view.shape)[...] = view
            at += band.size
    return flat


def unpack(plan: Plan, flat: HostArray, outs: Sequence[HostArray]) -> None:
    """The inverse of pack."""
    at = 0
    for bands in plan.bands:
        for out, band in zip(outs, bands, strict=True):
            view = band.of(out)
            view[...] = flat[at:at + band.size].reshape(view.shape)
            at += band.size


def join(plan: Plan, arrays: Sequence[HostArray]) -> HostArray:
    """Whole arrays end to end, in one flat array."""
    flat: HostArray = np.empty(sum(x.size for x in arrays), plan.dtype)
    np.concatenate(arrays, axis=None, out=flat)
    return flat


def part_ways(flat: HostArray, outs: Sequence[HostArray]) -> None:
    """The inverse of join."""
    ends = accumulate(out.size for out in outs)
    for out, end in zip(outs, ends, strict=True):
        out.reshape(-1)[...] = flat[end - out.size:end]
