"""Convolution with 3 x 3 kernels by minimal filtering, F(4 x 4, 3 x 3) (Lavin, Gray 2015, arXiv:1509.09308,
4.3).

An output is cut into tiles of 4 x 4, each of which depends on a patch d of 6 x 6 elements of the padded
input:

    y = A' [(G w G') * (B' d B)] A          (' transposes, * multiplies element by element, summed over
    channels)

so that 36 products take the place of 144. Transforming all patches (or tiles) is one matrix product with a
Kronecker square, as each works on both dimensions; what lies between is 36 products over the channels. The
weight's gradient is the adjoint of the same formula. In float32 the rounding error is some ten times that of
the direct sum, about 1e-5 of the largest result.

Samples are innermost in memory (see conv_rows.py), so that patches are copied in runs of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.ops import conv_rows
from meshtape.runtime.ops.narrow import multiply
from meshtape.runtime.ops.windows import Pairs, innermost, lay_innermost
from meshtape.runtime.shards import Shape

TILE, PATCH = 4, 6

_A = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [1, -1, 1, -1], [1, 2, 4, 8], [1, -2, 4, -8], [0, 0, 0, 1]])
_B = np.array([[4, 0, 0, 0, 0, 0], [0, -4, 4, -2, 2, 4], [-5, -4, -4, -1, -1, 0], [0, 1, -1, 2, -2, -5],
               [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]])
_G = np.array([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
               [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]])
OF_OUTPUT, OF_INPUT, OF_WEIGHT = np.kron(_A.T, _A.T), np.kron(_B.T, _B.T), np.kron(_G, _G)

# From where on it is faster, as measured: the transforms cost per channel, the products per pair of channels.
WINDOWS, CHANNELS, SHARE = 36, 48, 0.7
FEWER_CHANNELS, LARGER_SHARE = 32, 0.9
PATCHED = 1 << 18       # elements of a block of patches: 1 MB of float32
AT_ONCE = 64            # patches of a block, at least: each block reads all transformed weights
COLUMNS = 1024          # patches times channels that are gathered and transformed at once


def suits(xp: Any, w: Shape, stride: Shape, dilation: Shape, groups: int, count: Shape) -> bool:
    """Whether this is the faster way to a convolution with `count` windows."""
    if xp is not np or w[2:] != (3, 3) or {*stride, *dilation, groups} != {1} or prod(count) < WINDOWS:
        return False
    filled, channels = prod(count) / (prod(tiles_of(count)) * TILE * TILE), min(w[:2])
    return filled >= SHARE if channels >= CHANNELS else channels >= FEWER_CHANNELS and filled >= LARGER_SHARE


def tiles_of(count: Shape) -> Shape:
    return tuple(-(-n // TILE) for n in count)


def _lay(x: Any, target: Any) -> None:
    """Copy `x` (N, C, H, W) to `target` (C, H, W, N)."""
    if innermost(np, x):
        target[...] = x.transpose(1, 2, 3, 0)
        return
    for row in range(x.shape[2]):
        lay_innermost(x[:, :, row], target[:, row])


class Patches:
    """Overlapping patches of a padded input, transformed block by block to (36, channels, patches)."""

    def __init__(self, x: Any, padding: Pairs, count: Shape) -> None:
        self.tiles, (self.samples, self.channels) = tiles_of(count), x.shape[:2]
        (top, _), (left, _) = padding
        size = tuple(TILE * n + PATCH - TILE for n in self.tiles)
        room = np.zeros((self.channels, *size, self.samples), x.dtype)
        _lay(x, room[:, top:top + x.shape[2], left:left + x.shape[3]])
        channel, row, column, sample = room.strides
        self.view = np.lib.stride_tricks.as_strided(
            room, (PATCH, PATCH, self.channels, *self.tiles, self.samples),
            (row, column, channel, TILE * row, TILE * column, sample))
        most = max(PATCHED // (PATCH * PATCH * max(1, self.channels)), AT_ONCE) // max(1, self.samples)
        self.across = min(self.tiles[1], max(1, most))
        self.down = min(self.tiles[0], max(1, most // self.across))
        self.matrix = OF_INPUT.astype(x.dtype)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Runs of tiles down and across."""
        down, across = self.tiles
        return ((slice(i, min(i + self.down, down)), slice(j, min(j + self.across, across)))
                for i in range(0, down, self.down) for j in range(0, across, self.across))

    def take(self, down: slice, across: slice) -> Any:
        return transformed(self.matrix, self.view[:, :, :, down, across])


def transformed(matrix: Any, block: Any) -> Any:
    """`matrix` times every patch of a view (rows, columns, channels, ...): (rows, channels, patches)."""
    channels, patches = block.shape[2], prod(block.shape[3:])
    out = np.empty((len(matrix), channels, patches), matrix.dtype)
    step = max(1, COLUMNS // max(1, patches))
    for at in range(0, channels, step):
        target = out[:, at:at + step]
        width = target.shape[1] * patches
        gathered = block[:, :, at:at + step].reshape(1, matrix.shape[1], width)
        multiply(matrix[None], gathered, target.reshape(1, len(matrix), width))
    return out


def correlate(x: Any, w: Any, bias: Any, padding: Pairs, count: Shape) -> Any:
    """The (N, O, *count) correlation of x (N, C, H, W) with w (O, C, 3, 3), and `bias` (O,) or None added."""
    samples, (outputs, channels) = len(x), w.shape[:2]
    patches = Patches(x, padding, count)
    down, across = patches.tiles
    filters = np.matmul(OF_WEIGHT.astype(w.dtype), w.reshape(outputs * channels, 9).T)
    filters, back = filters.reshape(PATCH * PATCH, outputs, channels), OF_OUTPUT[None].astype(x.dtype)
    if samples < conv_rows.SAMPLES:
        out = np.empty((samples, outputs, down, TILE, across, TILE), x.dtype)
        target = np.moveaxis(out, 0, -1)
    else:
        target = np.empty((outputs, down, TILE, across, TILE, samples), x.dtype)
        out = np.moveaxis(target, -1, 0)
    for rows, columns in patches.blocks():
        product = np.matmul(filters, patches.take(rows, columns))
        product = product.reshape(1, PATCH * PATCH, prod(product.shape[1:]))
        tiles = np.empty((1, TILE * TILE, product.shape[2]), x.dtype)
        multiply(back, product, tiles)
        taken = (rows.stop - rows.start, columns.stop - columns.start, samples)
        tiles = tiles.reshape(TILE, TILE, outputs, *taken)
        if bias is not None:
            tiles += bias.reshape(-1, 1, 1, 1)
        target[:, rows, :, columns] = tiles.transpose(2, 3, 0, 4, 1, 5)
    whole = out.reshape(samples, outputs, TILE * down, TILE * across)
    return whole if whole.shape[2:] == count else whole[:, :, :count[0], :count[1]].copy("K")


def weight_grad(g: Any, x: Any, padding: Pairs) -> Any:
    """The derivative by w, given the output's gradient g (N, O, *count)."""
    (samples, outputs), count = g.shape[:2], g.shape[2:]
    patches = Patches(x, padding, count)
    down, across = patches.tiles
    room = np.moveaxis(g, 0, -1)
    if count != (TILE * down, TILE * across) or not room.flags.c_contiguous:
        room = np.zeros((outputs, TILE * down, TILE * across, samples), g.dtype)
        _lay(g, room[:, :count[0], :count[1]])
    tiles = room.reshape(outputs, down, TILE, across, TILE, samples).transpose(2, 4, 0, 1, 3, 5)
    forth = OF_OUTPUT.T.astype(g.dtype)
    total = np.zeros((PATCH * PATCH, outputs, x.shape[1]), g.dtype)
    for rows, columns in patches.blocks():
        upstream = transformed(forth, tiles[:, :, :, rows, columns])
        total += np.matmul(upstream, patches.take(rows, columns).swapaxes(1, 2))
    found = np.matmul(OF_WEIGHT.T.astype(g.dtype), total.reshape(PATCH * PATCH, outputs * x.shape[1]))
    return np.ascontiguousarray(found.reshape(3, 3, outputs, x.shape[1]).transpose(2, 3, 0, 1))
