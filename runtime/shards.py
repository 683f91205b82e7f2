"""Who holds which slice: pure arithmetic on shapes, placements and mesh coordinates.

A *placement* says how a tensor lies along one mesh axis, in the form that travels to the workers:
an int `d >= 0` is Shard(d), `REPLICATE` (-1) is Replicate, and a string ("sum", "max", "min") is Partial
under that reduction. `placements` holds one placement per mesh axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Placement = int | str
Placements = tuple[Placement, ...]
Shape = tuple[int, ...]

REPLICATE = -1


class Piece(NamedTuple):
    """The part of a tensor that one worker holds.

    `shape` and `offset` are in elements along each dimension of the whole tensor, whose shape is `whole`.
    `addend` is True where this worker contributes the values of a Partial tensor that the others leave out
    (coordinate 0 on every Partial mesh axis).
    """

    shape: Shape
    offset: Shape
    whole: Shape
    addend: bool = True

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))


def split(extent: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of part `index` when `extent` elements are divided over `parts`, larger parts first."""
    base, extra = divmod(extent, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


def split_sizes(extent: int, parts: int) -> list[int]:
    """Sizes of all parts; they differ by at most one and sum to `extent`."""
    base, extra = divmod(extent, parts)
    return [base + 1] * extra + [base] * (parts - extra)


def is_partial(placement: Placement) -> bool:
    return type(placement) is str


def coordinate(rank: int, mesh_shape: Sequence[int]) -> tuple[int, ...]:
    """Mesh coordinate of a rank; the last axis varies fastest."""
    out = []
    for n in reversed(mesh_shape):
        rank, c = divmod(rank, n)
        out.append(c)
    return tuple(reversed(out))


def axis_ranks(rank: int, mesh_shape: Sequence[int], axis: int) -> list[int]:
    """The ranks that differ from `rank` only along mesh `axis`, in order of their coordinate there."""
    stride = 1
    for n in mesh_shape[axis + 1:]:
        stride *= n
    first = rank - coordinate(rank, mesh_shape)[axis] * stride
    return [first + i * stride for i in range(mesh_shape[axis])]


def piece(shape: Shape, placements: Placements, mesh_shape: Sequence[int], coord: Sequence[int]) -> Piece:
    """What the worker at `coord` holds of a tensor of `shape`.

    Where several mesh axes split one dimension, the earlier axis divides first.
    """
    local, offset, addend = list(shape), [0] * len(shape), True
    for placement, parts, index in zip(placements, mesh_shape, coord, strict=True):
        if isinstance(placement, str):
            addend = addend and index == 0
        elif placement >= 0:
            start, stop = split(local[placement], parts, index)
            offset[placement] += start
            local[placement] = stop - start
    return Piece(tuple(local), tuple(offset), tuple(shape), addend)


def is_owner(placements: Placements, coord: Sequence[int]) -> bool:
    """True on the one worker of each distinct slice (or addend of it) that answers for it in a fetch."""
    return all(p != REPLICATE or c == 0 for p, c in zip(placements, coord, strict=True))
