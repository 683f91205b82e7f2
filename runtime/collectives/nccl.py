"""Collectives between GPUs by NCCL.

A verb puts work on the current stream and returns: nothing here waits for the device, so verbs can be
recorded in CUDA graphs. A host communicator between the same ranks stays beside it, for barriers and bad
news. What goes wrong is found by a thread (watch.py), which then aborts NCCL's communicator: kernels that
wait for a lost peer end, and check() says why.

NCCL reduces in an order of its own, and 16-bit floats with a rounding at every hop: all ranks get the same
bits, though not those of the other transports. What NCCL has no reduction for, and maxima and minima of
floats, where it would lose NaNs, is exchanged by NCCL and reduced here, in rank order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.collectives.base import Array
from meshtape.runtime.collectives.call import encode
from meshtape.runtime.collectives.device import DeviceCommunicator, pack, unpack
from meshtape.runtime.collectives.host import HostCommunicator
from meshtape.runtime.collectives.many import Bands, Plan
from meshtape.runtime.collectives.ordered import reduce_stack
from meshtape.runtime.collectives.reduction import starts
from meshtape.runtime.collectives.watch import Watch
from meshtape.runtime.errors import CommAborted, CommError, MeshError
from meshtape.runtime.shards import split_sizes

# ncclDataType_t and ncclRedOp_t (nccl.h).
BYTE = 1
TYPES = {"int8": 0, "uint8": 1, "int32": 2, "uint32": 3, "int64": 4, "uint64": 5, "float16": 6, "float32": 7,
         "float64": 8, "bfloat16": 9}
OPS = {"sum": 0, "prod": 1, "max": 2, "min": 3}
ID_BYTES = 128
# Bytes that all ranks together may send to each before a reduction done here is divided among them.
WHOLE_BYTES = 1 << 20
# Seconds that an abort waits for a verb that is being begun; NCCL may be stuck in it.
PATIENCE = 0.5
_GRAPH = encode("all_reduce", "", np.dtype(np.uint8), 0)


class Native(NamedTuple):
    """How NCCL names a reduction; an element counts `units`."""

    dtype: int
    op: int
    units: int = 1


def native(dtype: np.dtype[Any], op: str) -> Native | None:
    """NCCL's own reduction, where it means the same as NumPy's."""
    if dtype.kind == "b":       # bytes 0 and 1: a sum is "or", a product "and"
        return Native(BYTE, OPS["max" if op in ("sum", "max") else "min"])
    if dtype.kind == "c" and op == "sum":
        return Native(TYPES["float32" if dtype.itemsize == 8 else "float64"], OPS[op], 2)
    if dtype.name not in TYPES or (dtype.kind not in "iu" and op in ("max", "min")):
        return None
    return Native(TYPES[dtype.name], OPS[op])


class NcclCommunicator(DeviceCommunicator):
    """One rank's end of a group whose ranks have a GPU each; `inner` joins the same ranks on the host, and is
    closed with it.

    Made by all ranks at once, each in the thread that will call its verbs. Raises MeshError if NCCL cannot
    join them.
    """

    kind = "nccl"
    capturable = True

    def __init__(self, inner: HostCommunicator, device: Any) -> None:
        super().__init__(inner.rank, inner.size, inner.timeout, device)
        self.inner = inner
        self._nccl = device.libraries.nccl
        self._cp = device.cp
        self._beginning = threading.Lock()      # held while NCCL is given work
        self._living = threading.Lock()         # held while NCCL's communicator is asked, or ended
        self._asking = threading.Lock()         # held while the host communicator is used
        self._comm = self._join()
        self._watch = Watch(self.rank, self.timeout, self._ask, self._give_up)

    def _join(self) -> Any:
        name = np.zeros(ID_BYTES, np.uint8)
        if self.rank == 0:
            name[:] = np.frombuffer(self._nccl.get_unique_id(), np.uint8)
        name = self.inner.broadcast(name, 0)
        try:
            with self.device.handle:
                return self._nccl.NcclCommunicator(self.size, name.tobytes(), self.rank)
        except self._nccl.NcclError as error:
            self.inner.abort(f"rank {self.rank} cannot join NCCL")
            raise MeshError(f"rank {self.rank}: NCCL cannot join the {self.size} GPUs of this mesh axis "
                            f"({error}); run with NCCL_DEBUG=WARN to see why, or with "
                            "MESHTAPE_TRANSPORT=staged to do without it") from error

    # -- what goes wrong

    def check(self) -> None:
        if self._failure is None and self._comm is not None:
            self._check_async()
        self._raise_failure()

    def launched(self, calls: int, sent: int) -> None:
        super().launched(calls, sent)
        if calls and self._failure is None:
            self._watch.begin(_GRAPH)
            self._watch.done_by(self._mark())

    def agree(self, proposal: int) -> int:
        self._raise_failure()
        with self._asking:
            return int(self.inner.all_reduce(np.array([proposal], np.int64), "min")[0])

    def _mark(self) -> Any:
        """An event behind all work of the current stream; None where that is being recorded in a graph."""
        stream = self._cp.cuda.get_current_stream()
        if stream.is_capturing():
            return None
        event = self._cp.cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    def _ask(self, needed: bool) -> None:
        if self._asking.acquire(blocking=False):
            try:
                self.inner.poll(needed)
            finally:
                self._asking.release()
        self._check_async()

    def _check_async(self) -> None:
        with self._living:
            if self._comm is not None:
                try:
                    self._comm.check_async_error()
                except self._nccl.NcclError as error:
                    raise CommError(f"rank {self.rank}: NCCL failed: {error}") from error

    def _give_up(self, error: CommError) -> None:
        """From the watching thread: fail, end what is under way, and tell the peers."""
        self._failure = self._failure or error
        self._end()
        if not isinstance(error, CommAborted):
            self.inner.abort(str(error))

    def _end(self) -> None:
        """Abort NCCL's communicator: its kernels end, whatever they wait for."""
        free = self._beginning.acquire(timeout=PATIENCE)
        try:
            with self._living:
                comm, self._comm = self._comm, None
                if comm is not None:
                    comm.abort()
        finally:
            if free:
                self._beginning.release()

    def _abort(self, reason: str) -> None:
        self.inner.abort(reason)
        self._end()

    def _close(self) -> None:
        self._watch.close()
        self._end()
        self.inner.close()

    @contextmanager
    def _group(self, call: int) -> Iterator[Any]:
        """Inside, NCCL's verbs are collected; they begin together, on the current stream, at the end."""
        with self._beginning:
            if self._comm is None:
                self._raise_failure()
            self._watch.begin(call)
            event = None
            try:
                self._nccl.groupStart()
                try:
                    yield self._comm
                finally:
                    self._nccl.groupEnd()
                event = self._mark()
            except self._nccl.NcclError as error:
                raise CommError(f"rank {self.rank}: NCCL failed: {error}") from error
            finally:
                self._watch.done_by(event)

    def _stream(self) -> int:
        return int(self._cp.cuda.get_current_stream().ptr)

    # -- verbs

    def _all_reduce(self, call: int, plan: Plan, arrays: Sequence[Array], outs: Sequence[Array]) -> None:
        how = native(plan.dtype, plan.op)
        if how is None:
            self._all_reduce_here(call, plan, arrays, outs)
            return
        with self._group(call) as comm:
            stream = self._stream()
            for x, out in zip(arrays, outs, strict=True):
                if x.size:
                    comm.allReduce(x.data.ptr, out.data.ptr, x.size * how.units, how.dtype, how.op, stream)

    def _reduce_scatter(self, call: int, plan: Plan, arrays: Sequence[Array], outs: Sequence[Array]) -> None:
        how = native(plan.dtype, plan.op)
        if how is None:
            self._reduce_scatter_here(call, plan, arrays, outs)
            return
        bands = _by_array(plan.bands)
        packed = [self._packed(x, parts) for x, parts in zip(arrays, bands, strict=True)]
        with self._group(call) as comm:
            stream = self._stream()
            for x, parts, out in zip(packed, bands, outs, strict=True):
                counts = [band.size * how.units for band in parts]
                if len(set(counts)) == 1 and counts[0]:
                    comm.reduceScatter(x.data.ptr, out.data.ptr, counts[0], how.dtype, how.op, stream)
                    continue
                step = plan.dtype.itemsize // how.units
                for root, (count, start) in enumerate(zip(counts, starts(counts), strict=False)):
                    if count:
                        to = out.data.ptr if root == self.rank else 0
                        comm.reduce(x.data.ptr + start * step, to, count, how.dtype, how.op, root, stream)

    def _all_gather(self, call: int, plan: Plan, arrays: Sequence[Array], outs: Sequence[Array]) -> None:
        bands = _by_array(plan.bands)
        packed = [out if _in_order(parts) else self._cp.empty(out.size, plan.dtype)
                  for out, parts in zip(outs, bands, strict=True)]
        with self._group(call) as comm:
            for x, parts, whole in zip(arrays, bands, packed, strict=True):
                self._gather(comm, x, [band.size * plan.dtype.itemsize for band in parts], whole)
        for flat, out, parts in zip(packed, outs, bands, strict=True):
            if flat is not out and out.size:
                unpack(flat, out, parts)

    def _gather(self, comm: Any, x: Array, sizes: Sequence[int], out: Array) -> None:
        """In a group: every rank's `x`, of sizes[rank] bytes, end to end."""
        stream = self._stream()
        if len(set(sizes)) == 1 and sizes[0]:
            comm.allGather(x.data.ptr, out.data.ptr, sizes[0], BYTE, stream)
            return
        for root, (size, start) in enumerate(zip(sizes, starts(sizes), strict=False)):
            if size:
                to = out.data.ptr + start
                comm.broadcast(x.data.ptr if root == self.rank else to, to, size, BYTE, root, stream)

    def _all_to_all(self, call: int, x: Array, send: tuple[int, ...], recv: tuple[int, ...],
                    out: Array) -> None:
        given, made, unit = starts(send), starts(recv), x.itemsize
        out[made[self.rank]:made[self.rank + 1]] = x[given[self.rank]:given[self.rank + 1]]
        with self._group(call) as comm:
            stream = self._stream()
            for step in range(1, self.size):        # everybody begins with another peer
                to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
                if send[to]:
                    comm.send(x.data.ptr + given[to] * unit, send[to] * unit, BYTE, to, stream)
                if recv[source]:
                    comm.recv(out.data.ptr + made[source] * unit, recv[source] * unit, BYTE, source, stream)

    def _broadcast(self, call: int, buffer: Array, root: int) -> None:
        if buffer.size:
            with self._group(call) as comm:
                comm.broadcast(buffer.data.ptr, buffer.data.ptr, buffer.nbytes, BYTE, root, self._stream())

    def _send(self, call: int, x: Array, dst: int) -> None:
        if x.size:
            with self._group(call) as comm:
                comm.send(x.data.ptr, x.nbytes, BYTE, dst, self._stream())

    def _recv(self, call: int, out: Array, src: int) -> None:
        if out.size:
            with self._group(call) as comm:
                comm.recv(out.data.ptr, out.nbytes, BYTE, src, self._stream())

    def _barrier(self, call: int) -> None:
        """Between hosts: streams may be behind."""
        with self._asking:
            self.inner.barrier()

    def _packed(self, x: Array, bands: Bands) -> Array:
        """`x` with the parts of all ranks end to end."""
        if _in_order(bands) or not x.size:
            return x
        flat = self._cp.empty(x.size, x.dtype)
        pack(flat, x, bands)
        return flat

    # -- reductions that NCCL does not do

    def _all_reduce_here(self, call: int, plan: Plan, arrays: Sequence[Array], outs: Sequence[Array]) -> None:
        """Exchange everything where that is little; else reduce a share each and gather the shares."""
        flat = arrays[0].reshape(-1) if len(arrays) == 1 else (
            self._cp.concatenate([x.reshape(-1) for x in arrays]))
        if not flat.size:
            return
        if flat.nbytes * self.size <= WHOLE_BYTES:
            stack = self._cp.empty((self.size, flat.size), flat.dtype)
            with self._group(call) as comm:
                self._gather(comm, flat, [flat.nbytes] * self.size, stack)
            total = self._cp.empty(flat.size, flat.dtype)
            reduce_stack(self._cp, stack, plan.op, total)
        else:
            counts = split_sizes(flat.size, self.size)
            mine = self._cp.empty(counts[self.rank], flat.dtype)
            self._reduce_share(call, flat, counts, plan.op, mine)
            total = self._cp.empty(flat.size, flat.dtype)
            with self._group(call) as comm:
                self._gather(comm, mine, [n * flat.itemsize for n in counts], total)
        _part(total, outs)

    def _reduce_scatter_here(self, call: int, plan: Plan, arrays: Sequence[Array],
                             outs: Sequence[Array]) -> None:
        packed = [self._packed(x, parts) for x, parts in zip(arrays, _by_array(plan.bands), strict=True)]
        if len(packed) == 1:
            self._reduce_share(call, packed[0].reshape(-1), plan.counts, plan.op, outs[0].reshape(-1))
            return
        ends = [starts([band.size for band in parts]) for parts in _by_array(plan.bands)]
        flat = self._cp.concatenate([x.reshape(-1)[at[r]:at[r + 1]] for r in range(self.size)
                                     for x, at in zip(packed, ends, strict=True)])
        mine = self._cp.empty(plan.counts[self.rank], plan.dtype)
        self._reduce_share(call, flat, plan.counts, plan.op, mine)
        _part(mine, outs)

    def _reduce_share(self, call: int, flat: Array, counts: Sequence[int], op: str, out: Array) -> None:
        """Chunk `rank` of the reduction of every rank's `flat`, whose chunk r has counts[r] elements."""
        mine = counts[self.rank]
        stack = self._cp.empty(self.size * mine, flat.dtype)
        self._all_to_all(call, flat, tuple(counts), (mine,) * self.size, stack)
        if mine:
            reduce_stack(self._cp, stack.reshape(self.size, mine), op, out)


def _by_array(bands: Sequence[Bands]) -> list[Bands]:
    """The parts of every array, by rank, from those of every rank, by array."""
    return list(zip(*bands, strict=True))


def _in_order(bands: Bands) -> bool:
    """Whether the parts of an array lie end to end in it."""
    return bands[0].rows == 1


def _part(flat: Array, outs: Sequence[Array]) -> None:
    """Cut a 1-D array into these."""
    at = 0
    for out in outs:
        if out.size:
            out[...] = flat[at:at + prod(out.shape)].reshape(out.shape)
        at += out.size
