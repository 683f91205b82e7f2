"""Carrying out a redistribution: one collective (or local cut) per change of one placement on one mesh axis.

The scheduler chooses the path; here each hop between two neighbouring placements is turned into a call.
    Partial -> Replicate   all_reduce          Shard(d) -> Replicate  all_gather
    Partial -> Shard(d)    reduce_scatter      Shard(d) -> Shard(e)   all_to_all
    Replicate -> Shard(d)  cut, no traffic     any -> Partial         no traffic: coordinate 0 keeps
                                                                      the values, the others add nothing
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from meshtape.runtime.shards import REPLICATE, Placements, Shape, is_partial, piece, split, split_sizes

Hop = Callable[[Any], Any]
Bucket = Callable[..., list[Any]]


def changed_axis(before: Placements, after: Placements) -> int:
    """The one mesh axis on which two neighbouring placements of a path differ."""
    (axis,) = [a for a, (p, q) in enumerate(zip(before, after, strict=True)) if p != q]
    return axis


def communicates(before: Placements, after: Placements) -> bool:
    """Whether anything travels between two neighbouring placements."""
    axis = changed_axis(before, after)
    return before[axis] != REPLICATE and not is_partial(after[axis])


def verb(before: Placements, after: Placements) -> str:
    """What a hop between two neighbouring placements does."""
    axis = changed_axis(before, after)
    source, target = before[axis], after[axis]
    if not communicates(before, after):
        return "spread" if is_partial(target) else "cut"
    if is_partial(source):
        return "all_reduce" if target == REPLICATE else "reduce_scatter"
    return "all_gather" if target == REPLICATE else "all_to_all"


def compile_path(xp: Any, shape: Shape, path: Sequence[Placements], mesh_shape: Sequence[int],
                 coord: Sequence[int], communicators: Sequence[Any]) -> Hop:
    """A function from this worker's local array under path[0] to its local array under path[-1]."""
    hops = [compile_hop(xp, shape, before, after, mesh_shape, coord, communicators)
            for before, after in pairwise(path)]

    def run(x: Any) -> Any:
        for hop in hops:
            x = hop(x)
        return x

    return hops[0] if len(hops) == 1 else run


def compile_hop(xp: Any, shape: Shape, before: Placements, after: Placements, mesh_shape: Sequence[int],
                coord: Sequence[int], communicators: Sequence[Any]) -> Hop:
    axis = changed_axis(before, after)
    parts, index, comm = mesh_shape[axis], coord[axis], communicators[axis]
    source, target = before[axis], after[axis]
    without = (*before[:axis], REPLICATE, *before[axis + 1:])
    whole = piece(shape, without, mesh_shape, coord).shape      # local shape were it not for this axis
    if is_partial(target):
        return _to_partial(xp, source, str(target), whole, parts, index)
    if is_partial(source):
        if target == REPLICATE:
            return lambda x: comm.all_reduce(xp.asarray(x, order="C"), str(source))
        return _only(compile_scatter_bucket(xp, [whole], [int(target)], str(source), comm))
    if source == REPLICATE:
        return _cut(int(target), whole, parts, index)
    if target == REPLICATE:
        return _only(compile_gather_bucket(xp, [whole], [int(source)], comm))
    return _all_to_all(xp, int(source), int(target), whole, parts, index, comm)


def _cut(dim: int, whole: Shape, parts: int, index: int) -> Hop:
    start, stop = split(whole[dim], parts, index)
    key = (slice(None),) * dim + (slice(start, stop),)
    return lambda x: x[key]


def _to_partial(xp: Any, source: Any, combine: str, whole: Shape, parts: int, index: int) -> Hop:
    if source == REPLICATE:
        if combine in ("max", "min") or index == 0:
            return lambda x: x
        return lambda x: xp.zeros_like(x)
    if combine != "sum":
        raise ValueError(f"Shard({source}) -> Partial({combine!r}) goes through Replicate")
    start, stop = split(whole[source], parts, index)
    key = (slice(None),) * source + (slice(start, stop),)

    def embed(x: Any) -> Any:
        out = xp.zeros(whole, x.dtype)
        out[key] = x
        return out

    return embed


def _only(run: Bucket) -> Hop:
    """A bucket of one."""
    return lambda x: run(x)[0]


def _pack(xp: Any, x: Any, dim: int, extents: list[int]) -> Any:
    """`x` cut along `dim` into parts laid one after the other in one flat array."""
    if dim == 0 or all(n == 1 for n in x.shape[:dim]):
        return xp.ascontiguousarray(x).reshape(-1)
    out, at, start = xp.empty(x.size, x.dtype), 0, 0
    for n in extents:
        part = x[(slice(None),) * dim + (slice(start, start + n),)]
        out[at:at + part.size].reshape(part.shape)[...] = part
        at, start = at + part.size, start + n
    return out


def _unpack(xp: Any, flat: Any, dim: int, shape: Shape, extents: list[int]) -> Any:
    """The inverse of _pack."""
    if dim == 0 or all(n == 1 for n in shape[:dim]):
        return flat.reshape(shape)
    out, at, start = xp.empty(shape, flat.dtype), 0, 0
    for n in extents:
        view = out[(slice(None),) * dim + (slice(start, start + n),)]
        view[...] = flat[at:at + view.size].reshape(view.shape)
        at, start = at + view.size, start + n
    return out


def _all_to_all(xp: Any, source: int, target: int, whole: Shape, parts: int, index: int, comm: Any) -> Hop:
    given, wanted = split_sizes(whole[source], parts), split_sizes(whole[target], parts)
    rest = prod(n for d, n in enumerate(whole) if d not in (source, target))
    send = [given[index] * n * rest for n in wanted]
    receive = [n * wanted[index] * rest for n in given]
    mine = tuple(wanted[index] if d == target else n for d, n in enumerate(whole))

    def exchange(x: Any) -> Any:
        flat = comm.all_to_all(_pack(xp, x, target, wanted), send, receive)
        return _unpack(xp, flat, source, mine, given)

    return exchange


def compile_bucket(xp: Any, shapes: Sequence[Shape], combine: str, comm: Any, via: Any = None) -> Bucket:
    """All-reduce several local arrays of one dtype as one message: Partial -> Replicate.

    The function takes (*arrays, out=None) and returns a list; out[i] is where result i goes, arrays[i] itself
    perhaps, or None for a fresh array. `via`: resident arrays of the communicator's; operands that are these
    very arrays are not copied to be sent, and out[i] is none of them.
    """
    def run(*arrays: Any, out: Sequence[Any] | None = None) -> list[Any]:
        results = _room(xp, shapes, arrays[0].dtype, out)
        return list(comm.all_reduce_many(_contiguous(xp, arrays), combine, results, via))

    return run


def compile_scatter_bucket(xp: Any, shapes: Sequence[Shape], dims: Sequence[int], combine: str,
                           comm: Any, via: Any = None) -> Bucket:
    """Reduce-scatter several local arrays of one dtype as one message: Partial -> Shard(dims[i]).

    shapes: local ones were it not for this mesh axis. Calls are as for compile_bucket.
    """
    mine = _own_shapes(shapes, dims, comm)

    def run(*arrays: Any, out: Sequence[Any] | None = None) -> list[Any]:
        results = None if out is None else _room(xp, mine, arrays[0].dtype, out)
        return list(comm.reduce_scatter_many(_contiguous(xp, arrays), dims, combine, results, via))

    return run


def compile_gather_bucket(xp: Any, shapes: Sequence[Shape], dims: Sequence[int], comm: Any) -> Bucket:
    """All-gather several local arrays of one dtype as one message: Shard(dims[i]) -> Replicate.

    shapes: those of the results. Calls are as for compile_bucket.
    """
    def run(*arrays: Any, out: Sequence[Any] | None = None) -> list[Any]:
        results = None if out is None else _room(xp, shapes, arrays[0].dtype, out)
        return list(comm.all_gather_many(_contiguous(xp, arrays), dims, shapes, results))

    return run


def _contiguous(xp: Any, arrays: Sequence[Any]) -> list[Any]:
    return [x if x.flags.c_contiguous else xp.ascontiguousarray(x) for x in arrays]


def _room(xp: Any, shapes: Sequence[Shape], dtype: Any, out: Sequence[Any] | None) -> list[Any]:
    """Where results go: the arrays given, fresh ones in place of None."""
    if out is None:
        return [xp.empty(shape, dtype) for shape in shapes]
    return [xp.empty(shape, dtype) if x is None else x for shape, x in zip(shapes, out, strict=True)]


def _own_shapes(shapes: Sequence[Shape], dims: Sequence[int], comm: Any) -> list[Shape]:
    out = []
    for shape, dim in zip(shapes, dims, strict=True):
        start, stop = split(shape[dim], comm.size, comm.rank)
        out.append((*shape[:dim], stop - start, *shape[dim + 1:]))
    return out
