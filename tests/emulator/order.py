"""What is ordered before what: accesses to device memory by streams, and copies that the host waits for.

The emulation does work at once, so a wait that was forgotten would not show in numbers. It shows here: two
streams that touch the same bytes, at least one of them writing, raise RaceError unless an event or the host
orders them. What a stream copies to page-locked memory arrives there when the host has waited for it and not
before, and what it copies from there must stay as it is until then.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

Clock = dict[int, int]

READ, WRITE, UNKNOWN = "read", "write", "read or write"


class RaceError(AssertionError):
    """Two streams use the same memory, and nothing says which of them does so first."""


class Access(NamedTuple):
    """Bytes low to high of memory were touched by the piece of work number `at` of a stream."""

    low: int
    high: int
    how: str
    stream: int
    at: int

    def clashes(self, other: Access) -> bool:
        return (self.low < other.high and other.low < self.high and self.stream != other.stream
                and WRITE in (self.how, other.how))


class _Record:
    """Accesses by block of memory, and copies to the host that have not arrived."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.starts: list[int] = []
        self.blocks: dict[int, tuple[int, list[Access]]] = {}
        self.host: Clock = {}
        self.arriving: list[tuple[int, int, Callable[[], None]]] = []


_RECORD = _Record()


def living(kept: weakref.WeakValueDictionary[int, Any]) -> list[Any]:
    """The values, while other threads add some: going through values() would raise."""
    return [found for ref in kept.valuerefs() if (found := ref()) is not None]


def span(a: np.ndarray[Any, Any], how: str) -> tuple[int, int, str]:
    """What a piece of work that reads or writes an array touches: (address, bytes, how)."""
    low, high = np.lib.array_utils.byte_bounds(a)
    return (low, high - low, how) if a.size else (0, 0, how)


def add_block(start: int, size: int) -> object:
    """Device memory was allocated; a token for remove_block."""
    past: list[Access] = []
    with _RECORD.lock:
        if start not in _RECORD.blocks:
            insort(_RECORD.starts, start)
        _RECORD.blocks[start] = (start + size, past)
    return past


def remove_block(start: int, token: object) -> None:
    """Device memory was freed, which waits for the device; others may have been allocated there since."""
    with _RECORD.lock:
        if _RECORD.blocks[start][1] is token:
            _RECORD.starts.remove(start)
            del _RECORD.blocks[start]


def touch(stream: int, clock: Clock, touches: Iterable[tuple[int, int, str]]) -> None:
    """A stream's newest piece of work touches (address, bytes, how)...; raises RaceError."""
    with _RECORD.lock:
        for low, size, how in touches:
            at = bisect_right(_RECORD.starts, low) - 1
            if not size or at < 0:
                continue
            end, past = _RECORD.blocks[_RECORD.starts[at]]
            if low >= end:
                continue
            # Making an object may collect others, and with them blocks: from here on the list may be another.
            new = Access(low, low + size, how, stream, clock[stream])
            for old in past:
                if new.clashes(old) and not _before(old, clock):
                    raise RaceError(f"a {new.how} of {size} bytes at {low:#x} on stream {stream:#x} is not "
                                    f"ordered behind a {old.how} on stream {old.stream:#x}: an event must be "
                                    f"waited for")
            past[:] = [old for old in past if not _covered(old, new, clock)]
            past.append(new)


def _before(old: Access, clock: Clock) -> bool:
    """Whether an access is ordered before work that begins now, on a stream with this clock."""
    return max(clock.get(old.stream, 0), _RECORD.host.get(old.stream, 0)) >= old.at


def _covered(old: Access, new: Access, clock: Clock) -> bool:
    """Whether what clashes with `old` later would clash with `new` as well."""
    return (new.low <= old.low and old.high <= new.high and new.how in (WRITE, old.how)
            and (old.stream == new.stream or (new.how == WRITE and _before(old, clock))))


def host_waited(clock: Clock) -> None:
    """The host knows that all work before `clock` is done: it orders what the host begins from now on."""
    with _RECORD.lock:
        host = _RECORD.host
        for stream, at in dict(clock).items():      # other threads may add to it
            host[stream] = max(at, host.get(stream, 0))
        due = [a for a in _RECORD.arriving if host.get(a[0], 0) >= a[1]]
        _RECORD.arriving = [a for a in _RECORD.arriving if host.get(a[0], 0) < a[1]]
    for _, _, arrive in due:
        arrive()


def arrives(stream: int, at: int, arrive: Callable[[], None]) -> None:
    """Call `arrive` when the host has waited for piece of work `at` of a stream."""
    with _RECORD.lock:
        _RECORD.arriving.append((stream, at, arrive))


__all__ = ["READ", "UNKNOWN", "WRITE", "RaceError", "add_block", "arrives", "host_waited", "living",
           "remove_block", "span", "touch"]
