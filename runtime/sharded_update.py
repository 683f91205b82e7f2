"""An optimizer's update of replicated parameters, each worker doing a part of every one of them.

Gradients arrive as addends: they are reduce-scattered, a worker updates its slices of the parameters with its
parts of the states, and the slices are all-gathered (Xu et al. 2020, arXiv:2004.13336). New slices are
written into the old parameters where nobody else holds these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from meshtape.runtime.op import Op
from meshtape.runtime.shards import Shape, split

Update = Callable[..., list[Any]]


def sharded_update(xp: Any, op: Op, kernel: Callable[..., Any], attrs: dict[str, Any], dims: Sequence[int],
                   comm: Any, shapes: Sequence[Shape | None],
                   via: Any = None) -> tuple[Update, tuple[tuple[int, int], ...]]:
    """The function of a sharded update, and what it may write over what, as (output, input) positions.

    kernel: that of `op`, with the array module or the device as its first argument bound.

    Inputs are those of `op` (scalars, n parameters, n gradients, states), outputs n new parameters and the
    new states. Parameters with dims[k] >= 0 and their outputs are whole, their gradients addends, and their
    states this rank's parts along dims[k]; the others are updated as they are. `shapes` are the inputs',
    `via` arrays that the peers can read, for the addends.
    """
    n, scalars = len(dims), sum(s is None for s in shapes)
    split_ones = [k for k in range(n) if dims[k] >= 0]
    cuts = [dims[k] for k in split_ones]
    wholes: list[Any] = [shapes[scalars + k] for k in split_ones]
    keys = [_own(shape, dim, comm) for shape, dim in zip(wholes, cuts, strict=True)]
    assert op.over is not None
    over = tuple(op.over(len(shapes), attrs))
    grads = scalars + n
    room: list[Any] = []                # for the reduced gradients, the same in every run

    def run(*given: Any, out: Sequence[Any] | None = None) -> list[Any]:
        args, targets = list(given), list(out or [None] * len(over))
        addends = [xp.asarray(args[grads + k], order="C") for k in split_ones]
        if not room:
            room.extend(xp.empty(w[key].shape, w.dtype) for w, key in zip(addends, keys, strict=True))
        news = []
        for k, key, reduced in zip(
                split_ones, keys, comm.reduce_scatter_many(addends, cuts, "sum", room, via), strict=True):
            new = targets[k]
            if new is None or not new.flags.c_contiguous:
                new = xp.array(args[scalars + k], order="C")
            news.append(new)
            args[scalars + k] = targets[k] = new[key]
            args[grads + k] = reduced
        try:
            results = list(kernel(*args, out=tuple(targets), **attrs))
            for k in split_ones:
                if results[k] is not targets[k]:
                    targets[k][...] = results[k]
        finally:
            # Also after an error: the other ranks wait for this one's parts.
            whole = comm.all_gather_many(
                [xp.ascontiguousarray(targets[k]) for k in split_ones], cuts, wholes, news)
        for k, new in zip(split_ones, whole, strict=True):
            results[k] = new
        return results

    return run, over


def _own(shape: Shape, dim: int, comm: Any) -> tuple[slice, ...]:
    """The part of an array that is this rank's."""
    return (slice(None),) * dim + (slice(*split(shape[dim], comm.size, comm.rank)),)
