"""Convolution of many samples on a CPU, over arrays that lie in memory as channels, rows, columns, samples.

Shapes stay (samples, channels, rows, columns), only the strides differ (the order "CHWN" of cuda-convnet). A
row of a plane is then one run of columns * samples elements, so that gathering windows moves whole runs, and
products with the weight land where the result lies. The windows of one row of outputs make one matrix; from
row to row only the rows of x that are new are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.ops.narrow import inner_products, multiply
from meshtape.runtime.ops.windows import Pairs, innermost, lay_innermost, meetings, products
from meshtape.runtime.shards import Shape

SAMPLES = 16            # from how many samples on runs are long enough, as measured
GATHERED = 1 << 20      # elements of the window matrix: 4 MB of float32


def suits(xp: Any, x: Any, kernel: Shape, stride: Shape) -> bool:
    """Whether to work samples innermost: for windows that overlap, or where x lies like that already."""
    if xp is not np or len(kernel) > 2 or len(x) < SAMPLES or not x.size:
        return False
    return any(k > s for k, s in zip(kernel, stride, strict=True)) or innermost(np, x)


@dataclass(frozen=True)
class Geometry:
    """Of two dimensions: extents of the kernel, stride, padding, dilation, and how many windows there are."""

    kernel: Shape
    stride: Shape
    padding: Pairs
    dilation: Shape
    count: Shape
    groups: int

    def parts(self, samples: int, taps: int) -> Iterator[slice]:
        """Runs of windows along a row, such that `taps` of all of them stay within the limit."""
        width = self.count[1]
        most = max(1, min(width, GATHERED // max(1, taps * samples)))
        step = -(-width // -(-width // most))
        return (slice(at, min(at + step, width)) for at in range(0, width, step))


def geometry(kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape, count: Shape,
             groups: int) -> Geometry:
    """The geometry of one or two dimensions; to one, another of extent 1 is added."""
    if len(kernel) == 1:
        kernel, stride, dilation, count = (1, *kernel), (1, *stride), (1, *dilation), (1, *count)
        padding = ((0, 0), *padding)
    return Geometry(kernel, stride, padding, dilation, count, groups)


def planes(x: Any) -> Any:
    """`x` with two spatial dimensions."""
    return x[:, :, None] if x.ndim == 3 else x


class Rows:
    """Rows of an (N, C, H, W) array as (C, columns, N), with the samples innermost."""

    def __init__(self, x: Any, columns: slice) -> None:
        self.x = x[:, :, :, columns]
        samples, channels, _, width = self.x.shape
        self.scratch = None if innermost(np, x) else np.empty((channels, width, samples), x.dtype)

    def take(self, at: int) -> Any:
        """The next call may overwrite it."""
        row = self.x[:, :, at]
        if self.scratch is None:
            return row.transpose(1, 2, 0)
        lay_innermost(row, self.scratch)
        return self.scratch


class Columns:
    """Windows of a row of outputs as a matrix (groups, taps, windows * samples), row after row.

    The rows of x that the windows meet lie in a ring of slots, one for each row of the kernel. Slot j holds
    what tap row (j - turn) % slots meets; `turn` comes with each matrix. If `constant`, a last tap is 1
    everywhere.
    """

    def __init__(self, x: Any, g: Geometry, part: slice, constant: bool) -> None:
        (high, wide), channels = g.kernel, x.shape[1] // g.groups
        windows, self.height, self.geometry = part.stop - part.start, x.shape[2], g
        before = g.padding[1][0] - part.start * g.stride[1]
        along = meetings(x.shape[3], wide, g.stride[1], before, g.dilation[1], windows)
        met = [(tap, *pair) for tap, pair in enumerate(along) if pair is not None]
        first = min((elements.start for _, _, elements in met), default=0)
        self.along = [(tap, at, slice(e.start - first, e.stop - first, e.step)) for tap, at, e in met]
        self.rows = Rows(x, slice(first, max((e.stop for _, _, e in met), default=0)))
        taps = high * channels * wide
        self.matrix = np.zeros((g.groups, taps + constant, windows * len(x)), x.dtype)
        self.matrix[:, taps:] = 1
        self.slots = self.matrix[:, :taps].reshape(g.groups, high, channels, wide, windows, len(x))
        self.held: list[int | None] = [None] * high     # which row each slot holds; None: zeros

    def take(self, at: int) -> tuple[int, Any]:
        """`turn` and the matrix of the row of windows `at`. The next call overwrites it."""
        g, slots = self.geometry, len(self.held)
        start, apart = at * g.stride[0] - g.padding[0][0], g.dilation[0]
        for tap in range(slots):
            row = start + tap * apart
            self._hold(row % slots if apart == 1 else tap, row if 0 <= row < self.height else None)
        return (start % slots if apart == 1 else 0), self.matrix

    def _hold(self, slot: int, row: int | None) -> None:
        if self.held[slot] == row:
            return
        self.held[slot], target = row, self.slots[:, slot]
        if row is None:
            target[...] = 0
            return
        taken = self.rows.take(row)
        taken = taken.reshape(*target.shape[:2], *taken.shape[1:])
        # Windows at the border, which a tap does not meet, stay zero.
        for tap, windows, elements in self.along:
            target[:, :, tap, windows] = taken[:, :, elements]


def _filters(w: Any, bias: Any, groups: int, turn: int) -> Any:
    """The weight as (groups, outputs of a group, taps) for `Columns` turned by `turn`; the bias is a tap."""
    outputs, channels, high, wide = w.shape
    order = [(slot - turn) % high for slot in range(high)]
    taps = w[:, :, order].transpose(0, 2, 1, 3).reshape(groups, outputs // groups, high * channels * wide)
    if bias is not None:
        taps = np.concatenate([taps, bias.reshape(groups, outputs // groups, 1)], axis=2)
    return taps


def correlate(x: Any, w: Any, bias: Any, g: Geometry) -> Any:
    """The correlation of x (N, C, *size) with w (O, C / groups, *kernel) and bias (O,) or None."""
    outputs, shape = len(w), (len(x), len(w), *g.count[2 - w.ndim:])
    x, w = planes(x), planes(w)
    out = np.empty((outputs, *g.count, len(x)), x.dtype)
    filters = [_filters(w, bias, g.groups, turn) for turn in range(g.kernel[0])]
    for part in g.parts(len(x), x.shape[1] * prod(g.kernel)):
        columns = Columns(x, g, part, bias is not None)
        for at in range(g.count[0]):
            turn, matrix = columns.take(at)
            target = out[:, at, part].reshape(g.groups, outputs // g.groups, matrix.shape[2])
            multiply(filters[turn], matrix, target)
    return np.moveaxis(out, -1, 0).reshape(shape)


def weight_grad(upstream: Any, x: Any, g: Geometry) -> Any:
    """The derivative by the weight, (O, C / groups, *kernel)."""
    kernel = g.kernel[4 - x.ndim:]
    upstream, x = planes(upstream), planes(x)
    outputs, channels, high = upstream.shape[1] // g.groups, x.shape[1] // g.groups, g.kernel[0]
    taps = channels * prod(g.kernel)
    totals = np.zeros((high, g.groups, taps, outputs), x.dtype)
    for part in g.parts(len(x), taps * g.groups):
        rows, columns = Rows(upstream, part), Columns(x, g, part, False)
        for at in range(g.count[0]):
            turn, matrix = columns.take(at)
            right = rows.take(at).reshape(g.groups, outputs, matrix.shape[2])
            totals[turn] += inner_products(matrix, right)
    totals = totals.reshape(high, g.groups, high, channels, g.kernel[1], outputs)
    turns = np.arange(high)
    # What tap row t meets lies in slot (t + turn) % high.
    found = np.stack([totals[turns, :, (tap + turns) % high].sum(axis=0) for tap in range(high)])
    return found.transpose(1, 4, 2, 0, 3).reshape(g.groups * outputs, channels, *kernel)


def scatter(upstream: Any, w: Any, size: Shape, g: Geometry) -> Any:
    """The derivative by x, (N, C, *size): each window's product with the weight, added where its taps lie."""
    shape = (len(upstream), w.shape[1] * g.groups, *size)
    upstream, w, size = planes(upstream), planes(w), shape[2:] if len(size) == 2 else (1, *size)
    outputs, channels, (high, wide), samples = len(w) // g.groups, w.shape[1], g.kernel, len(upstream)
    filters = w.reshape(g.groups, outputs, channels, high, wide).transpose(0, 3, 4, 2, 1)
    filters = filters.reshape(g.groups, high * wide * channels, outputs)
    (top, bottom), (left, right) = g.padding
    room = np.zeros((g.groups, channels, top + size[0] + bottom, left + size[1] + right, samples), w.dtype)
    (down, across), (row, column) = g.stride, g.dilation
    for part in g.parts(samples, shape[1] * high * wide):
        rows, many = Rows(upstream, part), part.stop - part.start
        for at in range(g.count[0]):
            product = products(np, filters, rows.take(at).reshape(g.groups, outputs, many * samples))
            product = product.reshape(g.groups, high, wide, channels, many, samples)
            for i, j in np.ndindex(high, wide):
                first = part.start * across + j * column
                where = slice(first, first + (many - 1) * across + 1, across)
                room[:, :, at * down + i * row, where] += product[:, i, j]
    found = room[:, :, top:top + size[0], left:left + size[1]]
    return np.moveaxis(found.reshape(shape[1], *size, samples), -1, 0).reshape(shape)

