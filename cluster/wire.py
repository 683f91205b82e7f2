"""Messages as bytes: a prefix, a msgpack head, the types of the arrays, then the arrays' own memory.

A frame is `kind | head length | types length | payload length` (PREFIX), the head, the types and the payload:
the arrays end to end, never copied on the way out and received straight into fresh arrays. A heartbeat is the
single byte BEAT, which cannot arrive in part. Nothing is pickled.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]
import numpy as np

from meshtape.cluster.feed import FeedMemory, FeedView
from meshtape.runtime.dtypes import canonical
from meshtape.runtime.errors import MeshError
from meshtape.runtime.protocol import (
    Failure,
    Fetch,
    Reply,
    Run,
    Span,
    freeze,
    program_from_wire,
    type_from_wire,
)

BEAT, RUN, REPLY, READY, BROKEN = range(5)
PREFIX = struct.Struct("<BIIQ")
# A frame whose head is longer than this is noise: a body of a thousand instructions takes about 100 KB.
MAX_HEAD = 1 << 30
_COMPLEX, _BIG_INT = 1, 2

Buffer = bytes | memoryview


class Message(NamedTuple):
    """A frame as received: its kind, its unpacked head and its arrays."""

    kind: int
    head: Any
    arrays: list[Any]


def pack(value: Any) -> bytes:
    """msgpack of plain values; raises TypeError for what is none."""
    return msgpack.packb(value, default=_pack_extra)  # type: ignore[no-any-return]


def unpack(data: Buffer) -> Any:
    return msgpack.unpackb(data, ext_hook=_unpack_extra, strict_map_key=False)


def _pack_extra(value: Any) -> msgpack.ExtType:
    if isinstance(value, complex):
        return msgpack.ExtType(_COMPLEX, struct.pack("<dd", value.real, value.imag))
    if isinstance(value, int):
        return msgpack.ExtType(_BIG_INT, str(value).encode())
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot travel in a message; "
                    "use None, bool, int, float, complex, str, bytes or tuples of these")


def _unpack_extra(code: int, data: bytes) -> Any:
    if code == _COMPLEX:
        return complex(*struct.unpack("<dd", data))
    if code == _BIG_INT:
        return int(data)
    raise MeshError(f"a message holds an extension type {code} that this version of meshtape does not know; "
                    "install the same version everywhere")


def frame(
    kind: int, head: bytes, arrays: Sequence[Any] = (), memory: FeedMemory | None = None
) -> list[Buffer]:
    """The buffers that make up one frame. `arrays` holds NumPy arrays and None; they are not copied, and of
    those that lie in `memory` only the place is sent.
    """
    if not arrays:
        return [PREFIX.pack(kind, len(head), 0, 0) + head]
    types: list[Any] = []
    payload = []
    for a in arrays:
        place = None if a is None or memory is None else memory.locate(a)
        types.append(place or (a if a is None else (a.dtype.name, a.shape)))
        if place is None and a is not None and a.size:
            flat = np.ascontiguousarray(a, a.dtype.newbyteorder("=")).reshape(-1)
            payload.append(flat.view(np.uint8).data)
    packed = pack(types)
    prefix = PREFIX.pack(kind, len(head), len(packed), sum(p.nbytes for p in payload))
    return [prefix + head + packed, *payload]


def arrays_for(types: Buffer, payload: int, view: FeedView | None) -> tuple[list[Any], list[memoryview]]:
    """The arrays, and None, of a frame's packed types, and what of them is yet to be filled: all but those
    that lie in shared memory. MeshError unless that takes `payload` bytes.
    """
    arrays: list[Any] = []
    fill = []
    for t in unpack(types):
        if t is None:
            arrays.append(None)
        elif len(t) == 2:
            arrays.append(np.empty(t[1], canonical(t[0])))
            if arrays[-1].size:
                fill.append(memoryview(arrays[-1].reshape(-1).view(np.uint8)))
        elif view is not None:
            arrays.append(view.array(t))
        else:
            raise MeshError("a message names arrays in shared memory, but this connection has none; install "
                            "the same version of meshtape everywhere")
    if sum(f.nbytes for f in fill) != payload:
        raise MeshError(f"a message announces {payload} bytes of arrays, but its types take another number; "
                        "install the same version of meshtape everywhere")
    return arrays, fill


def run_frames(
    runs: Sequence[Run], memories: Sequence[FeedMemory | None] | None = None
) -> list[list[Buffer]]:
    """One frame per run of a batch, whose common part is packed once. `memories`: what each rank can read."""
    first = runs[0]
    head = pack((first.batch, first.digest, first.ids, first.scalars, first.fetch, first.frees, first.drop,
                 first.program, first.trace, first.answer))
    if not any(run.feeds for run in runs):
        return [frame(RUN, head)] * len(runs)
    return [frame(RUN, head, run.feeds, memory)
            for run, memory in zip(runs, memories or [None] * len(runs), strict=True)]


def run_of(message: Message) -> Run:
    batch, digest, ids, scalars, fetch, frees, drop, program, trace, answer = message.head
    return Run(batch, digest, ids, scalars, message.arrays, [Fetch(i, type_from_wire(t)) for i, t in fetch],
               frees, drop, None if program is None else program_from_wire(program), trace, answer)


def reply_frame(reply: Reply) -> list[Buffer]:
    head = pack((reply.rank, reply.batch, reply.failures, reply.peak, reply.clock, reply.spans,
                 reply.traffic, reply.graphs))
    return frame(REPLY, head, reply.values)


def reply_of(message: Message) -> Reply:
    rank, batch, failures, peak, (began, ended), spans, traffic, graphs = message.head
    return Reply(rank, batch, [Failure(*f) for f in failures], message.arrays, peak, (began, ended),
                 [Span(*s) for s in spans], [(calls, sent) for calls, sent in traffic], freeze(graphs))


class Assembler:
    """Cuts a stream of bytes into messages.

    Bytes go into `space()`, which is a list of memoryviews, and are reported by `took(n)`; what has arrived
    whole stands in `messages`. Array memory is filled in place.
    """

    def __init__(self, capacity: int = 1 << 16, view: FeedView | None = None) -> None:
        self.view = view
        self.messages: deque[Message] = deque()
        self._buffer = bytearray(max(capacity, PREFIX.size))
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._missing: list[memoryview] = []     # the parts of the last message's arrays yet to come
        self._partial: Message | None = None

    def space(self) -> list[memoryview]:
        return self._missing or [self._view[self._end:]]

    def took(self, n: int) -> None:
        if self._missing:
            consume(self._missing, n)
            if not self._missing:
                self._complete()
        else:
            self._end += n
            self._parse()

    def _complete(self) -> None:
        assert self._partial is not None
        self.messages.append(self._partial)
        self._partial = None

    def _parse(self) -> None:
        while self._start < self._end and self._partial is None:
            if self._buffer[self._start] == BEAT:
                self._start += 1
            elif not self._take_frame():
                break
        self._make_room()

    def _take_frame(self) -> bool:
        """Parse the frame at _start; False if its head has not arrived whole."""
        if self._end - self._start < PREFIX.size:
            return False
        kind, n_head, n_types, payload = PREFIX.unpack_from(self._buffer, self._start)
        if kind > BROKEN or n_head + n_types > MAX_HEAD:
            raise MeshError("what arrived is no message of meshtape; install the same version everywhere")
        head = self._start + PREFIX.size
        types, end = head + n_head, head + n_head + n_types
        if self._end < end:
            self._reserve(end - self._start)
            return False
        arrays, self._missing = arrays_for(self._view[types:end], payload, self.view) if n_types else ([], [])
        self._partial = Message(kind, unpack(self._view[head:types]), arrays)
        self._start = end
        self._fill()
        return True

    def _fill(self) -> None:
        """Move array bytes that came along in the buffer to where they belong."""
        while self._missing and self._start < self._end:
            n = min(self._missing[0].nbytes, self._end - self._start)
            self._missing[0][:n] = self._view[self._start:self._start + n]
            self._start += n
            consume(self._missing, n)
        if not self._missing:
            self._complete()

    def _make_room(self) -> None:
        rest = self._end - self._start
        if rest and self._start:
            self._view[:rest] = bytes(self._view[self._start:self._end])
        self._start, self._end = 0, rest

    def _reserve(self, n: int) -> None:
        """Make the buffer hold a frame head of n bytes."""
        if n > len(self._buffer):
            held = bytes(self._view[self._start:self._end])
            self._buffer = bytearray(max(n, 2 * len(self._buffer)))
            self._view = memoryview(self._buffer)
            self._view[:len(held)] = held
            self._start, self._end = 0, len(held)


def consume(views: list[memoryview], n: int) -> None:
    """Drop the first n bytes of a list of buffers, in place."""
    gone = 0
    for view in views:
        if n < view.nbytes:
            break
        n -= view.nbytes
        gone += 1
    del views[:gone]
    if n:
        views[0] = views[0][n:]


def from_bytes(data: Buffer) -> Message:
    """The one message in `data`, for channels that carry whole frames. Its arrays are copies."""
    assembler = Assembler(capacity=max(len(data), 1))
    assembler.space()[0][:len(data)] = data
    assembler.took(len(data))
    message, = assembler.messages
    return message
