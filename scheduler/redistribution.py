"""From one layout to another: the cheapest sequence of collectives, found by search over layouts."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from meshtape.runtime.shards import REPLICATE, Placement, Placements, Shape, is_partial
from meshtape.scheduler.cost import Link, move_bytes, move_seconds


class Route(NamedTuple):
    """`path` starts at the given placements and ends at the wanted ones; neighbours differ on one mesh axis.

    `seconds` and `wire` (bytes sent per worker) are the model's.
    """

    path: tuple[Placements, ...]
    seconds: float
    wire: float


@lru_cache(maxsize=8192)
def route(shape: Shape, itemsize: int, before: Placements, after: Placements, mesh_shape: tuple[int, ...],
          links: tuple[Link, ...]) -> Route:
    """The cheapest path between two layouts of a tensor; ties go to fewer hops, then to a fixed order."""
    def hop(here: Placements, axis: int, target: Placement) -> tuple[float, float]:
        """Seconds and bytes on the wire of one change."""
        source, n = here[axis], mesh_shape[axis]
        whole = bytes_without(shape, itemsize, here, axis, mesh_shape)
        return move_seconds(source, target, whole, n, links[axis]), move_bytes(source, target, whole, n)

    dims = {p for p in (*before, *after) if not is_partial(p) and p != REPLICATE}
    if shape:
        dims.add(max(range(len(shape)), key=shape.__getitem__))     # to scatter over on the way, if that pays
    changed = [axis for axis, p in enumerate(before) if p != after[axis]]
    if len(changed) == 1 and (changed[0], after[changed[0]]) in neighbours(before, after, dims):
        return Route((before, after), *hop(before, changed[0], after[changed[0]]))     # nothing beats one hop
    queue: list[tuple[float, int, int, Placements, tuple[Placements, ...], float]] = [
        (0.0, 0, 0, before, (before,), 0.0)]
    seen: set[Placements] = set()
    count = 0
    while queue:
        seconds, hops, _, here, path, wire = heapq.heappop(queue)
        if here == after:
            return Route(path, seconds, wire)
        if here in seen:
            continue
        seen.add(here)
        for axis, target in neighbours(here, after, dims):
            there = (*here[:axis], target, *here[axis + 1:])
            if there not in seen:
                more, sent = hop(here, axis, target)
                count += 1
                heapq.heappush(queue, (seconds + more, hops + 1, count, there, (*path, there), wire + sent))
    raise AssertionError(f"no path from {before} to {after}")


def bytes_without(shape: Shape, itemsize: int, placements: Placements, axis: int,
                  mesh_shape: Sequence[int]) -> float:
    """Local bytes of the tensor if mesh `axis` did not split it."""
    size = float(itemsize * prod(shape))
    for a, p in enumerate(placements):
        if a != axis and not is_partial(p) and p != REPLICATE:
            size /= mesh_shape[a]
    return size


def neighbours(here: Placements, goal: Placements,
               dims: Iterable[Placement]) -> Iterator[tuple[int, Placement]]:
    """Legal changes of one placement, to a split of one of `dims`, to Replicate, or to the goal's Partial.

    Where two mesh axes split one dimension the earlier divides first, so only the last of them may be taken
    away or added. Partial is entered only where the goal asks for it, and "max"/"min" only from Replicate.
    """
    for axis, current in enumerate(here):
        later = [p for p in here[axis + 1:] if not is_partial(p) and p != REPLICATE]
        if not is_partial(current) and current in later:
            continue
        if current != REPLICATE:
            yield axis, REPLICATE
        for dim in sorted(dims, key=int):
            if dim != current and dim not in later:
                yield axis, dim
        want = goal[axis]
        if is_partial(want) and current != want and not is_partial(current) and (
                current == REPLICATE or want == "sum"):
            yield axis, want
