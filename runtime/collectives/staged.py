"""Collectives of device arrays by way of the host: for workers that share a GPU, or have no NCCL.

Arrays are copied into page-locked memory, a host communicator does the rest, and results are copied back.
Each array is a copy of its own each way: packing them on the device would take as many kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from meshtape.runtime.collectives.base import Array
from meshtape.runtime.collectives.device import DeviceCommunicator
from meshtape.runtime.collectives.host import HostCommunicator
from meshtape.runtime.collectives.many import Plan
from meshtape.runtime.collectives.reduction import HostArray


class Pinned:
    """Page-locked host memory, kept between calls and grown when a call needs more."""

    def __init__(self, cupy: Any) -> None:
        self._cp = cupy
        self._bytes: HostArray = np.empty(0, np.uint8)

    def rooms(self, like: Sequence[Array]) -> list[HostArray]:
        """Arrays of these shapes and their one dtype, one behind the other."""
        size = sum(x.nbytes for x in like)
        if size > self._bytes.size:
            size = max(size, 2 * self._bytes.size)
            self._bytes = np.ndarray(size, np.uint8, self._cp.cuda.alloc_pinned_memory(size))
        out, at = [], 0
        for x in like:
            out.append(self._bytes[at:at + x.nbytes].view(x.dtype).reshape(x.shape))
            at += x.nbytes
        return out


class StagedCommunicator(DeviceCommunicator):
    """One rank's end of a group, over `inner`, which joins the same ranks on the host and is closed with it.

    Reductions are those of `inner`, in rank order. A verb waits for the current stream, so that none can be
    recorded in a CUDA graph.
    """

    def __init__(self, inner: HostCommunicator, device: Any) -> None:
        super().__init__(inner.rank, inner.size, inner.timeout, device)
        self.inner = inner
        self.kind = f"staged+{inner.kind}"
        self._given, self._made = Pinned(device.cp), Pinned(device.cp)
        self._taken = device.cp.cuda.Event(disable_timing=True)

    def _all_reduce(self, call: int, plan: Plan, arrays: Sequence[Array], outs: Sequence[Array]) -> None:
        brought = self._bring(arrays)
        self._through(self.inner._all_reduce, call, plan, brought, brought)
        self._take(outs, brought)

    def _reduce_scatter(self, call: int, plan: Plan, arrays: Sequence[Array], outs: Sequence[Array]) -> None:
        brought, made = self._bring(arrays), self._made.rooms(outs)
        self._through(self.inner._reduce_scatter, call, plan, brought, made)
        self._take(outs, made)

    def _all_gather(self, call: int, plan: Plan, arrays: Sequence[Array], outs: Sequence[Array]) -> None:
        brought, made = self._bring(arrays), self._made.rooms(outs)
        self._through(self.inner._all_gather, call, plan, brought, made)
        self._take(outs, made)

    def _all_to_all(self, call: int, x: Array, send: tuple[int, ...], recv: tuple[int, ...],
                    out: Array) -> None:
        brought, made = self._bring([x]), self._made.rooms([out])
        self._through(self.inner._all_to_all, call, brought[0], send, recv, made[0])
        self._take([out], made)

    def _broadcast(self, call: int, buffer: Array, root: int) -> None:
        if root == self.rank:
            self._through(self.inner._broadcast, call, self._bring([buffer])[0], root)
        else:
            self._taken.synchronize()
            made = self._made.rooms([buffer])
            self._through(self.inner._broadcast, call, made[0], root)
            self._take([buffer], made)

    def _send(self, call: int, x: Array, dst: int) -> None:
        self._through(self.inner._send, call, self._bring([x])[0], dst)

    def _recv(self, call: int, out: Array, src: int) -> None:
        self._taken.synchronize()
        made = self._made.rooms([out])
        self._through(self.inner._recv, call, made[0], src)
        self._take([out], made)

    def _barrier(self, call: int) -> None:
        self._through(self.inner._barrier, call)

    def _abort(self, reason: str) -> None:
        self.inner.abort(reason)

    def _close(self) -> None:
        self.inner.close()

    def _through(self, hook: Callable[..., None], call: int, *args: Any) -> None:
        """A hook of the host communicator, with the same plan: arrays are cut alike wherever they are."""
        self.inner._run(hook, call, 0, *args)

    def _bring(self, arrays: Sequence[Array]) -> list[HostArray]:
        """The arrays' values on the host, when all that the current stream has been given is done."""
        self._taken.synchronize()       # what was copied from this memory last is on the device
        stream, rooms = self.device.cp.cuda.get_current_stream(), self._given.rooms(arrays)
        for x, room in zip(arrays, rooms, strict=True):
            if x.size:
                x.data.copy_to_host_async(room.ctypes.data, x.nbytes, stream)
        stream.synchronize()
        return rooms

    def _take(self, outs: Sequence[Array], rooms: Sequence[HostArray]) -> None:
        """Begin copying values from the host to the device."""
        stream = self.device.cp.cuda.get_current_stream()
        for out, room in zip(outs, rooms, strict=True):
            if out.size:
                out.data.copy_from_host_async(room.ctypes.data, out.nbytes, stream)
        self._taken.record(stream)
