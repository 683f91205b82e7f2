"""What changes from run to run of a program on a device, at addresses that stay: fed arrays and numbers.

The host's arrays are free when a call returns; the device sees the values in the order of its stream. Up to
64 KiB the CUDA driver takes the bytes from ordinary memory at once. With more it would wait for all work
before, so these go by way of page-locked memory: two rooms in turn, so that the host can be a run ahead.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

MASK64 = 2**64 - 1
# Bytes up to which an array is copied from where it is, and a program's arrays are page-locked, twice.
AT_ONCE, PAGE_LOCKED = 64 << 10, 1 << 30
ALIGN = 512


class Room:
    """Page-locked memory for arrays of the given (shape, dtype), and the event behind copies from it."""

    def __init__(self, cuda: Any, kinds: Mapping[int, tuple[Any, Any]]) -> None:
        self.copied = cuda.Event(disable_timing=True)
        self.arrays, at = {}, 0
        size = sum(_aligned(nbytes(*kind)) for kind in kinds.values())
        whole = np.ndarray(size, np.uint8, cuda.alloc_pinned_memory(size))
        for k, (shape, dtype) in kinds.items():
            self.arrays[k] = whole[at:at + nbytes(shape, dtype)].view(dtype).reshape(shape)
            at += _aligned(nbytes(shape, dtype))


def nbytes(shape: Sequence[int], dtype: Any) -> int:
    return prod(shape) * int(np.dtype(dtype).itemsize)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class Inputs:
    """Fed arrays of the given (shape, dtype), and the scalars named by (index, letter): "d" are float64, "i"
    int64 (of unsigned numbers the bits), each a 0-d array in `numbers` under that key.
    """

    def __init__(self, device: Any, feeds: Sequence[tuple[Any, Any]],
                 wanted: Sequence[tuple[int, str]]) -> None:
        cp = device.cp
        self._device = device
        self._feeds = [cp.empty(shape, dtype) for shape, dtype in feeds]
        large = {k: kind for k, kind in enumerate(feeds) if nbytes(*kind) > AT_ONCE}
        self._large = large if sum(nbytes(*kind) for kind in large.values()) <= PAGE_LOCKED else {}
        self._rooms: list[Room] = []
        self._runs = 0
        self._wanted = tuple(wanted)
        self._format = struct.Struct("=" + "".join("d" if letter == "d" else "Q" for _, letter in wanted))
        self._words = cp.empty(max(1, len(wanted)), np.int64)
        floats = self._words.view(np.float64)
        self.numbers = {(index, letter): (floats if letter == "d" else self._words)[k:k + 1].reshape(())
                        for k, (index, letter) in enumerate(wanted)}
        self._sent = b""

    def load(self, feeds: Sequence[Any], scalars: Sequence[Any]) -> list[Any]:
        """Copy one run's values to the device; the fed arrays there. They are good until the next run."""
        if self._wanted:
            packed = self._format.pack(*[
                float(scalars[index]) if letter == "d" else int(scalars[index]) & MASK64
                for index, letter in self._wanted])
            if packed != self._sent:
                self._copy(self._words, np.frombuffer(packed, np.int64))
                self._sent = packed
        room = self._room()
        for k, (target, given) in enumerate(zip(self._feeds, feeds, strict=True)):
            if type(given) is not np.ndarray:
                target[...] = given                     # an array of this device's
            elif given.size:
                if room is not None and k in room.arrays:
                    room.arrays[k][...] = given
                    given = room.arrays[k]
                self._copy(target, np.ascontiguousarray(given))
        if room is not None:
            room.copied.record(self._device.stream)
        return list(self._feeds)

    def close(self) -> None:
        """Give page-locked memory back, once nothing is copied from it."""
        for room in self._rooms:
            room.copied.synchronize()
        self._rooms.clear()

    def _room(self) -> Room | None:
        """Where large arrays go first, in all runs but the first: many programs run once."""
        self._runs += 1
        if not self._large or self._runs == 1:
            return None
        if len(self._rooms) < 2:
            self._rooms.append(Room(self._device.cp.cuda, self._large))
        room = self._rooms[self._runs % len(self._rooms)]
        room.copied.synchronize()
        return room

    def _copy(self, target: Any, host: Any) -> None:
        target.data.copy_from_host_async(host.ctypes.data, host.nbytes, self._device.stream)
