"""Memory that the driver writes arrays into and the workers of its host read them from.

An array that is fed in is copied once, into this memory; its message says only where it lies. A region is in
use for as long as an array over it lives: the caller's, and those that a mesh holds on to until the batch
that feeds them is answered. The memory is an anonymous file (memfd), which vanishes with the last process
that maps it; only pages that were written to cost memory, and low addresses are given out first.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from collections import deque
from threading import Lock
from typing import Any

import numpy as np

from meshtape.runtime.dtypes import canonical
from meshtape.runtime.errors import CommError
from meshtape.runtime.shards import Shape

SUPPORTED = sys.platform == "linux"
SIZE = 256 << 20
# An array below this travels in its message; one above, which no batch of a training loop is, as well.
SMALLEST, LARGEST = 1 << 12, 64 << 20
ALIGN = 128                 # bytes; two cache lines, which processors fetch in pairs

# Name of the dtype, shape, byte offset and strides.
Location = tuple[str, Shape, int, tuple[int, ...] | None]


class Region:
    """Where an array's memory comes from: the array keeps its region alive, and the end of it frees the
    bytes.
    """

    __slots__ = ("__array_interface__", "freed", "span")

    def __init__(
        self, freed: deque[tuple[int, int]], span: tuple[int, int], interface: dict[str, Any]
    ) -> None:
        self.freed = freed
        self.span = span
        self.__array_interface__ = interface

    def __del__(self) -> None:
        self.freed.append(self.span)


class FeedMemory:
    """The driver's side. `room` may be called from any thread."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("meshtape-feed")
        os.ftruncate(self.fd, SIZE)
        self._bytes = np.frombuffer(mmap.mmap(self.fd, SIZE), np.uint8)
        self._start = self._bytes.ctypes.data
        self._free = [(0, SIZE)]                    # (start, end), in order
        self._freed: deque[tuple[int, int]] = deque()
        self._lock = Lock()

    def room(self, shape: Shape, dtype: np.dtype[Any]) -> np.ndarray[Any, Any] | None:
        """A C-contiguous array that the workers can read, not initialised; None if there is no room for it,
        or it is too small to be worth it."""
        nbytes = dtype.itemsize
        for n in shape:
            nbytes *= n
        if not SMALLEST <= nbytes <= LARGEST or dtype.kind == "V":
            return None
        with self._lock:
            start = self._take(-(-nbytes // ALIGN) * ALIGN)
        if start is None:
            return None
        region = Region(
            self._freed,
            (start, start + -(-nbytes // ALIGN) * ALIGN),
            {"data": (self._start + start, False), "shape": shape, "typestr": dtype.str, "version": 3},
        )
        return np.asarray(region)

    def _take(self, nbytes: int) -> int | None:
        """The start of a free span of so many bytes."""
        self._collect()
        for k, (start, end) in enumerate(self._free):
            if end - start >= nbytes:
                if end - start == nbytes:
                    del self._free[k]
                else:
                    self._free[k] = (start + nbytes, end)
                return start
        return None

    def _collect(self) -> None:
        """Join what was freed to the free spans."""
        if not self._freed:
            return
        spans = self._free
        while self._freed:
            spans.append(self._freed.popleft())
        spans.sort()
        joined = spans[:1]
        for start, end in spans[1:]:
            if start == joined[-1][1]:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self._free = joined

    def locate(self, array: np.ndarray[Any, Any]) -> Location | None:
        """Where an array lies in this memory, None if it is elsewhere."""
        if array.base is None:
            return None
        offset = array.__array_interface__["data"][0] - self._start
        if not 0 <= offset < SIZE:
            return None
        return array.dtype.name, array.shape, offset, None if array.flags.c_contiguous else array.strides

    def send(self, sock: socket.socket) -> None:
        """Hand the memory to the worker at the other end of a Unix socket."""
        socket.send_fds(sock, [b"f"], [self.fd])

    def close(self) -> None:
        """No more workers will be given it. Arrays over it stay valid."""
        os.close(self.fd)


class FeedView:
    """A worker's side: the memory to read from."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over the memory that the driver sends. CommError if it does not."""
        _, fds, _, _ = socket.recv_fds(sock, 1, 1)
        if len(fds) != 1:
            raise CommError("the driver sent no memory to read its arrays from; install the same version of "
                            "meshtape everywhere")
        self._bytes = np.frombuffer(mmap.mmap(fds[0], SIZE, prot=mmap.PROT_READ), np.uint8)
        os.close(fds[0])

    def array(self, location: Any) -> np.ndarray[Any, Any]:
        """The array at a location, read-only."""
        name, shape, offset, strides = location
        return np.ndarray(shape, canonical(name), self._bytes, offset, strides)
