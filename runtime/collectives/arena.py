"""Memory shared by the ranks of one host: counters to wait on, and room for data.

The memory is an anonymous file (memfd): it needs no name, is not bounded by /dev/shm, and vanishes with the
last process that maps it, however that ends. Layout, for n ranks:

    n lines              rank r's progress: turn, sleepers, call at even turns, call at odd turns
    1 line               aborted
    2 n^2 lines          mail from s to d: written (turn, sleepers, calls as above), read (turn, sleepers)
    2 n areas            AREA bytes each, rank r's at even and odd turns
    2 n^2 mail slots     MAIL bytes each, from s to d, message pieces at even and odd turns
    n resident regions   RESIDENT bytes each, where rank r keeps addends for its peers to read

A line is 128 bytes, two cache lines, because processors fetch them in pairs. Only touched pages cost memory.
A store to a counter publishes the data stored before it: true of x86-64, which orders stores among themselves
and loads among themselves, and not of other processors.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

AREA = 512 * 1024
MAIL = 128 * 1024
RESIDENT = 256 * 1024 * 1024

LINE = 16  # in 8-byte words
TURN, SLEEPERS, CALLS = 0, 1, 2

_FUTEX = 202
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_ALL = 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class Arena:
    """One mapping of the memory of a group of `size` ranks; `fd` comes from create() in one of them."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = size
        memory = mmap.mmap(fd, _length(size))
        self.words = memoryview(memory).cast("Q")
        self.bytes: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self.aborted = size * LINE
        self._address = self.bytes.ctypes.data
        self._syscall: Any = ctypes.CDLL(None).syscall
        word, pointer = ctypes.c_long, ctypes.c_void_p
        self._syscall.argtypes = (word, pointer, word, word, pointer)

    @staticmethod
    def create(size: int) -> int:
        """A descriptor of fresh, zeroed memory for `size` ranks; the caller closes it."""
        fd = os.memfd_create("meshtape", os.MFD_CLOEXEC)
        os.ftruncate(fd, _length(size))
        return fd

    def progress(self, rank: int) -> int:
        """Index of the first word of rank's progress line."""
        return rank * LINE

    def mail(self, src: int, dst: int) -> tuple[int, int]:
        """Indices of the lines that count pieces written by src and read by dst."""
        line = self.size + 1 + 2 * (src * self.size + dst)
        return line * LINE, (line + 1) * LINE

    def area(self, rank: int, turn: int) -> NDArray[np.uint8]:
        start = _control(self.size) + (2 * rank + (turn & 1)) * AREA
        return self.bytes[start:start + AREA]

    def mail_slot(self, src: int, dst: int, turn: int) -> NDArray[np.uint8]:
        pair = src * self.size + dst
        start = _control(self.size) + 2 * self.size * AREA + (2 * pair + (turn & 1)) * MAIL
        return self.bytes[start:start + MAIL]

    def resident(self, rank: int) -> NDArray[np.uint8]:
        start = _length(self.size) - (self.size - rank) * RESIDENT
        return self.bytes[start:start + RESIDENT]

    def post(self, at: int, turn: int) -> None:
        """Set the counter at word `at` and wake who sleeps on it."""
        words = self.words
        words[at] = turn
        if words[at + SLEEPERS]:
            words[at + SLEEPERS] = 0
            self._syscall(_FUTEX, self._address + 8 * at, _FUTEX_WAKE, _ALL, None)

    def sleep(self, at: int, turn: int, seconds: float) -> None:
        """Sleep until the counter at word `at` moves, at most `seconds`; return at once if it has `turn`.

        A waker may miss a sleeper that is just lying down, hence short sleeps.
        """
        words = self.words
        words[at + SLEEPERS] = 1
        seen = words[at]
        if seen < turn:
            limit = _Timespec(0, int(seconds * 1e9))
            self._syscall(_FUTEX, self._address + 8 * at, _FUTEX_WAIT, seen & 0xFFFFFFFF, ctypes.byref(limit))


def _control(size: int) -> int:
    lines = size + 1 + 2 * size * size
    return -(-lines * LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


def _length(size: int) -> int:
    return _control(size) + 2 * size * AREA + 2 * size * size * MAIL + size * RESIDENT
