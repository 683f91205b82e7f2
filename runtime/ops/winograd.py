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
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.ops.windows import Pairs, blocks
from meshtape.runtime.shards import Shape

TILE, PATCH = 4, 6

_A = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [1, -1, 1, -1], [1, 2, 4, 8], [1, -2, 4, -8], [0, 0, 0, 1]])
_B = np.array([[4, 0, 0, 0, 0, 0], [0, -4, 4, -2, 2, 4], [-5, -4, -4, -1, -1, 0], [0, 1, -1, 2, -2, -5],
               [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]])
_G = np.array([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
               [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]])
OF_OUTPUT, OF_INPUT, OF_WEIGHT = np.kron(_A.T, _A.T), np.kron(_B.T, _B.T), np.kron(_G, _G)

# From where on it is faster, as measured: the transforms cost per channel, the products per pair of channels.
CHANNELS, WINDOWS, SHARE = 32, 36, 0.7
AT_ONCE = 64            # patches of a block, at least: each block reads all transformed weights


def suits(xp: Any, w: Shape, stride: Shape, dilation: Shape, groups: int, count: Shape) -> bool:
    """Whether this is the faster way to a convolution with `count` windows."""
    if xp is not np or w[2:] != (3, 3) or {*stride, *dilation, groups} != {1}:
        return False
    filled = prod(count) / (prod(tiles_of(count)) * TILE * TILE) if prod(count) else 0
    return min(w[:2]) >= CHANNELS and prod(count) >= WINDOWS and filled >= SHARE


def tiles_of(count: Shape) -> Shape:
    return tuple(-(-n // TILE) for n in count)


def _matrix(xp: Any, matrix: Any, dtype: Any) -> Any:
    return xp.asarray(matrix.astype(dtype))


class Patches:
    """Overlapping patches of a padded input, transformed block by block to (36, channels, patches)."""

    def __init__(self, xp: Any, x: Any, padding: Pairs, count: Shape, limit: int) -> None:
        self.xp, self.tiles = xp, tiles_of(count)
        self.samples, self.channels = x.shape[:2]
        self.limit = max(limit, AT_ONCE * PATCH * PATCH * self.channels)
        room = xp.zeros((*x.shape[:2], *(TILE * n + PATCH - TILE for n in self.tiles)), x.dtype)
        (top, _), (left, _) = padding
        room[:, :, top:top + x.shape[2], left:left + x.shape[3]] = x
        sample, channel, row, column = room.strides
        self.view = xp.lib.stride_tricks.as_strided(
            room, (PATCH, PATCH, self.channels, self.samples, *self.tiles),
            (row, column, channel, sample, TILE * row, TILE * column))
        per_row = PATCH * PATCH * self.channels * self.tiles[1]
        self.buffer = xp.empty(max(per_row, min(self.limit, per_row * self.tiles[0] * self.samples)), x.dtype)
        self.matrix = _matrix(xp, OF_INPUT, x.dtype)

    def blocks(self) -> Any:
        return blocks(self.samples, self.tiles, PATCH * PATCH * self.channels, self.limit)

    def take(self, samples: slice, rows: slice) -> Any:
        block = self.view[:, :, :, samples, rows]
        held = self.buffer[:block.size].reshape(block.shape)
        held[...] = block
        patches = self.xp.matmul(self.matrix, held.reshape(PATCH * PATCH, block[0, 0].size))
        return patches.reshape(PATCH * PATCH, self.channels, prod(block.shape[3:]))


def correlate(xp: Any, x: Any, w: Any, bias: Any, padding: Pairs, count: Shape, limit: int) -> Any:
    """The (N, O, *count) correlation of x (N, C, H, W) with w (O, C, 3, 3), and `bias` (O,) or None added."""
    outputs, channels = w.shape[:2]
    patches = Patches(xp, x, padding, count, limit)
    filters = xp.matmul(_matrix(xp, OF_WEIGHT, w.dtype), w.reshape(outputs * channels, 9).T)
    filters = filters.reshape(PATCH * PATCH, outputs, channels)
    back = _matrix(xp, OF_OUTPUT, x.dtype)
    down, across = patches.tiles
    out = xp.empty((len(x), outputs, down, TILE, across, TILE), x.dtype)
    for samples, rows in patches.blocks():
        product = xp.matmul(filters, patches.take(samples, rows))
        tiles = xp.matmul(back, product.reshape(PATCH * PATCH, prod(product.shape[1:])))
        taken = (samples.stop - samples.start, rows.stop - rows.start)
        tiles = tiles.reshape(TILE, TILE, outputs, *taken, across)
        if bias is not None:
            tiles += bias.reshape(-1, 1, 1, 1)
        out[samples, :, rows] = tiles.transpose(3, 2, 4, 0, 5, 1)
    whole = out.reshape(len(x), outputs, TILE * down, TILE * across)
    return xp.ascontiguousarray(whole[:, :, :count[0], :count[1]])


def weight_grad(xp: Any, g: Any, x: Any, padding: Pairs, limit: int) -> Any:
    """The derivative by w, given the output's gradient g (N, O, *count)."""
    count, outputs = g.shape[2:], g.shape[1]
    patches = Patches(xp, x, padding, count, limit)
    down, across = patches.tiles
    room = g
    if count != (TILE * down, TILE * across):
        room = xp.zeros((len(g), outputs, TILE * down, TILE * across), g.dtype)
        room[:, :, :count[0], :count[1]] = g
    tiles = room.reshape(len(g), outputs, down, TILE, across, TILE).transpose(3, 5, 1, 0, 2, 4)
    forth = _matrix(xp, OF_OUTPUT.T, g.dtype)
    total = xp.zeros((PATCH * PATCH, outputs, x.shape[1]), g.dtype)
    for samples, rows in patches.blocks():
        block = tiles[:, :, :, samples, rows]
        upstream = xp.matmul(forth, block.reshape(TILE * TILE, block[0, 0].size))
        upstream = upstream.reshape(PATCH * PATCH, outputs, prod(block.shape[3:]))
        total += xp.matmul(upstream, patches.take(samples, rows).swapaxes(1, 2))
    found = xp.matmul(_matrix(xp, OF_WEIGHT.T, g.dtype), total.reshape(PATCH * PATCH, outputs * x.shape[1]))
    return xp.ascontiguousarray(found.reshape(3, 3, outputs, x.shape[1]).transpose(2, 3, 0, 1))
