"""Streams, events and graphs of the emulation.

Work is done at once, by the calling thread, unless its stream is being captured: then it is recorded, in
order, and done whenever the graph is launched, on the same addresses. What CUDA forbids inside a capture
(waiting for the device, reading it from the host, a stream that forks and is not joined) raises
CUDARuntimeError and makes the capture invalid. Clocks of streams and events tell what is ordered before what.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from emulator import order

Clock = dict[int, int]
Touches = tuple[tuple[int, int, str], ...]
Work = tuple[Callable[[], Any], Touches]


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime.CUDARuntimeError."""

    def __init__(self, name: str, why: str, status: int = 900) -> None:
        self.status = status
        super().__init__(f"{name}: {why}")


class Capture:
    """Work recorded from the stream that began it, and from those that joined it by events."""

    def __init__(self, origin: Stream) -> None:
        self.origin = origin
        self.work: list[Work] = []
        self.streams: list[Stream] = [origin]
        self.spoiled = ""


class Event:
    """cupy.cuda.Event."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        self.ptr = next(_numbers)
        self._clock: Clock = {}
        self._capture: Capture | None = None
        self._time = 0.0
        self._timing = not disable_timing
        self._recorded = False

    def record(self, stream: Stream | None = None) -> None:
        stream = stream if stream is not None else current_stream()
        self._clock, self._capture = dict(stream._clock), stream._capture
        self._time, self._recorded = time.perf_counter(), True

    @property
    def done(self) -> bool:
        if self._capture is not None:
            raise _spoil(self._capture, "an event recorded in a capture was asked whether it is done")
        order.host_waited(self._clock)
        return True

    def synchronize(self) -> None:
        if self._capture is not None:
            raise _spoil(self._capture, "an event recorded in a capture was waited for by the host")
        synchronises("Event.synchronize", self._clock)


def get_elapsed_time(start: Event, end: Event) -> float:
    """Milliseconds between two events."""
    for event in (start, end):
        if not event._recorded or not event._timing:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle", "an event has no time")
    return (end._time - start._time) * 1e3


class Stream:
    """cupy.cuda.Stream."""

    null: Stream
    ptds: Stream

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False,
                 priority: int | None = None) -> None:
        self.null_stream, self.ptr = null, 0 if null else next(_numbers)
        self.is_non_blocking, self.priority = non_blocking, priority or 0
        self._capture: Capture | None = None
        self._clock: Clock = {}
        _handles[self.ptr] = self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __enter__(self) -> Stream:
        _stack().append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _stack().pop()

    def use(self) -> Stream:
        _stack()[-1] = self
        return self

    @property
    def done(self) -> bool:
        if self._capture is not None:
            raise _spoil(self._capture, "Stream.done inside a capture")
        order.host_waited(self._clock)
        return True

    def synchronize(self) -> None:
        if self._capture is not None:
            raise _spoil(self._capture, "Stream.synchronize inside a capture")
        synchronises("Stream.synchronize", self._clock)

    def record(self, event: Event | None = None) -> Event:
        event = event if event is not None else Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if event._capture is not None and event._capture.origin._capture is event._capture:
            if self._capture is None:
                self._capture = event._capture
                self._capture.streams.append(self)
            elif self._capture is not event._capture:
                raise _spoil(self._capture, "an event of another capture was waited for")
        elif self._capture is not None:
            raise _spoil(self._capture, "an event from outside of the capture was waited for")
        for ptr, n in event._clock.items():
            self._clock[ptr] = max(n, self._clock.get(ptr, 0))

    def launch_host_func(self, callback: Callable[[Any], None], arg: Any) -> None:
        work(lambda: callback(arg), self)

    def begin_capture(self, mode: int | None = None) -> None:
        if self.ptr == 0:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported", "the default stream")
        if self._capture is not None:
            raise CUDARuntimeError("cudaErrorIllegalState", "the stream is captured already")
        self._capture = Capture(self)

    def is_capturing(self) -> bool:
        if self._capture is not None and self._capture.spoiled:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated", self._capture.spoiled)
        return self._capture is not None

    def end_capture(self) -> Graph:
        capture = self._capture
        if capture is None or capture.origin is not self:
            raise CUDARuntimeError("cudaErrorIllegalState", "this stream did not begin a capture")
        unjoined = [s for s in capture.streams if self._clock.get(s.ptr, 0) < s._clock.get(s.ptr, 0)]
        for stream in capture.streams:
            stream._capture = None
        if capture.spoiled:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated", capture.spoiled)
        if unjoined:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnjoined",
                                   f"work of {len(unjoined)} forked streams is not waited for by the first")
        return Graph(capture.work)


class Graph:
    """cupy.cuda.Graph: recorded work."""

    def __init__(self, work: list[Work]) -> None:
        self._work = work
        self.launches = 0

    @property
    def nodes(self) -> int:
        """Pieces of work in it (CuPy has no such attribute; for tests)."""
        return len(self._work)

    def launch(self, stream: Stream | None = None) -> None:
        def launch() -> None:
            self.launches += 1
            for does, touches in self._work:
                order.touch(there.ptr, there._clock, touches)
                does()
        there = stream if stream is not None else current_stream()
        work(launch, there)

    def upload(self, stream: Stream | None = None) -> None:
        pass


_numbers = itertools.count(1 << 20)
_handles: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
_local = threading.local()
Stream.null = Stream(null=True)
Stream.ptds = Stream()


class Synchronisations:
    """How often the host waited for the device, by what."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __len__(self) -> int:
        return len(self.seen)


SYNCHRONISATIONS = Synchronisations()


def _stack() -> list[Stream]:
    try:
        stack: list[Stream] = _local.streams
    except AttributeError:
        stack = _local.streams = [Stream.null]
    return stack


def current_stream() -> Stream:
    """The stream that this thread's work goes to."""
    return _stack()[-1]


def capturing() -> bool:
    """Whether work of this thread is being recorded now."""
    return _stack()[-1]._capture is not None


def _spoil(capture: Capture, why: str) -> CUDARuntimeError:
    capture.spoiled = capture.spoiled or why
    return CUDARuntimeError("cudaErrorStreamCaptureUnsupported", why)


def synchronises(what: str, clock: Clock | None = None) -> None:
    """The host waits for the work before `clock`; by default that of the current stream, if not captured."""
    stream = current_stream()
    if stream._capture is not None and clock is None:
        raise _spoil(stream._capture, f"{what} inside a capture waits for the device")
    SYNCHRONISATIONS.seen.append(what)
    order.host_waited(stream._clock if clock is None else clock)


def everything() -> Clock:
    """The clock of all work that was begun."""
    return {stream.ptr: stream._clock.get(stream.ptr, 0) for stream in order.living(_handles)}


def forbidden(what: str) -> None:
    """Raise if the current stream is captured: `what` is not allowed there."""
    capture = current_stream()._capture
    if capture is not None:
        raise _spoil(capture, f"{what} is not allowed inside a capture")


def work(does: Callable[[], Any], stream: Stream | None = None, touches: Iterable[Any] = ()) -> None:
    """Do a piece of device work on a stream (default: the current one), or record it in its capture.

    `touches` are what order.span gives, of the memory that it reads and writes.
    """
    stream = stream if stream is not None else current_stream()
    stream._clock[stream.ptr] = stream._clock.get(stream.ptr, 0) + 1
    if not stream.is_non_blocking:
        _meet_default(stream)
    touched = tuple(touches)
    order.touch(stream.ptr, stream._clock, touched)
    if stream._capture is not None:
        stream._capture.work.append((does, touched))
        return
    before, _local.executing = getattr(_local, "executing", None), stream
    try:
        does()
    finally:
        _local.executing = before


def executing() -> Stream:
    """The stream whose work is being done by this thread."""
    found: Stream | None = getattr(_local, "executing", None)
    return found if found is not None else current_stream()


def _meet_default(stream: Stream) -> None:
    """The default stream waits for blocking streams, and they for it."""
    everywhere = order.living(_handles) if stream.ptr == 0 else [Stream.null]
    others = [s for s in everywhere if not s.is_non_blocking]
    for other in others:
        for ptr, n in dict(other._clock).items():
            stream._clock[ptr] = max(n, stream._clock.get(ptr, 0))


def by_handle(ptr: int) -> Stream:
    """The living stream with a handle."""
    found = _handles.get(ptr)
    if found is None:
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle", f"there is no stream {ptr:#x}")
    return found
