"""Several arrays through a transport that moves one: packed into a flat array, at a copy each way."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from meshtape.runtime.collectives.host import HostCommunicator
from meshtape.runtime.collectives.many import Band, Plan
from meshtape.runtime.collectives.reduction import HostArray, starts


class PackingCommunicator(HostCommunicator):
    """Hooks get the `call` word and 1-D arrays. A single array travels without being packed."""

    def _all_reduce(self, call: int, plan: Plan, arrays: Sequence[HostArray],
                    outs: Sequence[HostArray]) -> None:
        if len(arrays) == 1:
            self._all_reduce_flat(call, arrays[0].reshape(-1), outs[0].reshape(-1), plan.op)
            return
        flat = _join(plan, arrays)
        self._all_reduce_flat(call, flat, flat, plan.op)
        _part(flat, outs)

    def _reduce_scatter(self, call: int, plan: Plan, arrays: Sequence[HostArray],
                        outs: Sequence[HostArray]) -> None:
        if arrays[0].ndim == len(arrays) == 1:
            self._reduce_scatter_flat(call, arrays[0], plan.counts, outs[0], plan.op)
            return
        flat, at = _pack(plan, arrays), starts(plan.counts)
        mine = flat[at[self.rank]:at[self.rank + 1]]
        self._reduce_scatter_flat(call, flat, plan.counts, mine, plan.op)
        _part(mine, outs)

    def _all_gather(self, call: int, plan: Plan, arrays: Sequence[HostArray],
                    outs: Sequence[HostArray]) -> None:
        if arrays[0].ndim == len(arrays) == 1:
            self._all_gather_flat(call, arrays[0], plan.counts, outs[0])
            return
        flat = np.empty(sum(plan.counts), plan.dtype)
        self._all_gather_flat(call, _join(plan, arrays), plan.counts, flat)
        _unpack(plan, flat, outs)

    @abstractmethod
    def _all_reduce_flat(self, call: int, x: HostArray, out: HostArray, op: str) -> None: ...

    @abstractmethod
    def _reduce_scatter_flat(self, call: int, x: HostArray, counts: tuple[int, ...], out: HostArray,
                             op: str) -> None: ...

    @abstractmethod
    def _all_gather_flat(self, call: int, x: HostArray, counts: tuple[int, ...], out: HostArray) -> None: ...


def _columns(x: HostArray, band: Band) -> HostArray:
    view: HostArray = x.reshape(band.rows, band.columns)[:, band.start:band.stop]
    return view


def _pack(plan: Plan, arrays: Sequence[HostArray]) -> HostArray:
    """The messages to all ranks, in rank order, in one flat array."""
    flat, at = np.empty(sum(plan.counts), plan.dtype), 0
    for bands in plan.bands:
        for x, band in zip(arrays, bands, strict=True):
            flat[at:at + band.size].reshape(band.rows, band.width)[...] = _columns(x, band)
            at += band.size
    return flat


def _unpack(plan: Plan, flat: HostArray, outs: Sequence[HostArray]) -> None:
    """The inverse of _pack."""
    at = 0
    for bands in plan.bands:
        for out, band in zip(outs, bands, strict=True):
            _columns(out, band)[...] = flat[at:at + band.size].reshape(band.rows, band.width)
            at += band.size


def _join(plan: Plan, arrays: Sequence[HostArray]) -> HostArray:
    """Whole arrays end to end, in one flat array."""
    flat: HostArray = np.empty(sum(x.size for x in arrays), plan.dtype)
    np.concatenate(arrays, axis=None, out=flat)
    return flat


def _part(flat: HostArray, outs: Sequence[HostArray]) -> None:
    """The inverse of _join."""
    ends = accumulate(out.size for out in outs)
    for out, end in zip(outs, ends, strict=True):
        out.reshape(-1)[...] = flat[end - out.size:end]
