"""Collectives between hosts, over one TCP connection per pair of ranks.

Reductions must run in rank order, which the classic ring does not give: each of its chunks starts its sum at
another rank. So rank r receives everybody's chunk r, reduces it in order, and sends the result to everybody:
the ring's bytes per rank, in two hops instead of 2 (n - 1).

Nobody waits in a send: what the kernel does not take at once stays in an outbox, and whoever waits for data
also empties its outboxes. A frame is a head (call, number of the frame on this connection, bytes that
follow), then the array's bytes, so ranks in different calls find out instead of hanging or mixing up data.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice

import numpy as np

from meshtape.runtime.collectives.call import describe, mismatch, uneven, verb_of
from meshtape.runtime.collectives.links import Links
from meshtape.runtime.collectives.packing import PackingCommunicator
from meshtape.runtime.collectives.reduction import HostArray, chunks, reduce_into
from meshtape.runtime.errors import CommError, CommTimeout, PeerLost
from meshtape.runtime.shards import split_sizes

_HEAD = struct.Struct("<QQQ")
# Up to this many bytes sent, sending everybody the whole array is faster than a second hop.
ONE_HOP = 128 * 1024
# Bytes received before they are reduced, per peer.
PIECE = 1024 * 1024
# Seconds between looks at an abort from this process's other threads.
LOOK = 0.1
# Seconds without progress after which any death is taken for the reason: a rank waited for may itself have
# failed because of a death that this one was not concerned with.
STALL = 0.5
# Seconds that news may arrive after the end of a connection that it explains.
GRACE = 0.2
_NOTHING = np.empty(0, np.uint8)


class _Inbound:
    """A frame being received: first its head, then the bytes of `into`."""

    def __init__(self, into: HostArray) -> None:
        self.head = bytearray(_HEAD.size)
        self.body = into.view(np.uint8).data
        self.rest = memoryview(self.head)
        self.in_head = True


class TcpCommunicator(PackingCommunicator):
    """One rank of a group; `data` and `links` map every other rank to a connected socket."""

    kind = "tcp"

    def __init__(self, rank: int, size: int, data: dict[int, socket.socket], links: Links,
                 timeout: float = 60.0) -> None:
        super().__init__(rank, size, timeout)
        self._data = data
        self._links = links
        self._outbox: dict[int, deque[memoryview]] = {peer: deque() for peer in data}
        self._sent = dict.fromkeys(data, 0)
        self._received = dict.fromkeys(data, 0)
        self._scratch: dict[int, HostArray] = {}
        for sock in data.values():
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # -- moving frames

    def _post(self, call: int, peer: int, x: HostArray) -> None:
        """Put a frame into the outbox and send what goes at once; `x` must stay as it is until _flush()."""
        self._outbox[peer].append(memoryview(_HEAD.pack(call, self._sent[peer], x.nbytes)))
        self._sent[peer] += 1
        if x.nbytes:
            self._outbox[peer].append(x.view(np.uint8).data)
        self._push(peer)

    def _fetch(self, call: int, into: dict[int, HostArray]) -> None:
        """Receive a frame from each peer in `into`, which maps it to the array to fill."""
        self._pump(call, {peer: _Inbound(array) for peer, array in into.items()})

    def _flush(self, call: int) -> None:
        """Wait until the kernel has taken all frames."""
        if any(self._outbox.values()):
            self._pump(call, {})

    def _pump(self, call: int, inbound: dict[int, _Inbound]) -> None:
        """Move bytes both ways until nothing is inbound or, if nothing was, until the outboxes are empty."""
        flushing = not inbound
        deadline = time.monotonic() + self.timeout
        while True:
            moved = [peer for peer in list(inbound) if self._pull(call, peer, inbound)]
            moved += [peer for peer, box in self._outbox.items() if box and self._push(peer)]
            if not inbound and not (flushing and any(self._outbox.values())):
                return
            if moved:
                deadline = time.monotonic() + self.timeout
            else:
                self._block(call, inbound, deadline)

    def _pull(self, call: int, peer: int, inbound: dict[int, _Inbound]) -> bool:
        """Receive what is there; True if that was anything. A complete frame leaves `inbound`."""
        frame, moved = inbound[peer], False
        while True:
            while frame.rest:
                try:
                    count = self._data[peer].recv_into(frame.rest)
                except BlockingIOError:
                    return moved
                except OSError as error:
                    raise self._lost(peer, str(error)) from error
                if count == 0:
                    raise self._lost(peer, "end of file")
                frame.rest, moved = frame.rest[count:], True
            if not frame.in_head:
                del inbound[peer]
                return True
            self._check_head(call, peer, frame)
            frame.rest, frame.in_head = frame.body, False

    def _check_head(self, call: int, peer: int, frame: _Inbound) -> None:
        theirs, number, size = _HEAD.unpack(frame.head)
        if theirs != call:
            raise mismatch(self.rank, call, peer, theirs)
        if size != len(frame.body):
            if verb_of(call) == "all_to_all":
                raise uneven(self.rank, len(frame.body), peer, size, "bytes")
            raise CommError(f"{describe(call)}: rank {peer} sent {size} bytes to rank {self.rank}, which "
                            f"expects {len(frame.body)}; run the same version everywhere")
        if number != self._received[peer]:
            raise CommError(f"{describe(call)}: rank {peer} sent frame {number} to rank {self.rank}, which "
                            f"expects frame {self._received[peer]}; run the same version everywhere")
        self._received[peer] += 1

    def _push(self, peer: int) -> bool:
        """Send what the kernel takes; True if that was anything."""
        box, moved = self._outbox[peer], False
        while box:
            try:
                count = self._data[peer].sendmsg(list(islice(box, 8)))
            except BlockingIOError:
                return moved
            except OSError as error:
                raise self._lost(peer, str(error)) from error
            moved = True
            while box and count >= len(box[0]):
                count -= len(box.popleft())
            if count:
                box[0] = box[0][count:]
        return moved

    def _block(self, call: int, inbound: dict[int, _Inbound], deadline: float) -> None:
        """Sleep until a socket is ready; raise what there is to raise."""
        poll, news, stalled = select.poll(), self._links.filenos(), time.monotonic() + STALL
        needed = []
        for peer, sock in self._data.items():
            events = (select.POLLIN if peer in inbound else 0) | (select.POLLOUT if self._outbox[peer] else 0)
            if events:
                poll.register(sock, events)
                needed.append(peer)
        for fileno in news:
            poll.register(fileno, select.POLLIN)
        while not (ready := poll.poll(LOOK * 1000)):
            self._raise_failure()
            now = time.monotonic()
            if now > stalled and verb_of(call) != "send":
                self._links.raise_news(self._links.died())
            if now > deadline:
                raise CommTimeout(f"rank {self.rank}: {describe(call)} waited {self.timeout:g} s for ranks "
                                  f"{needed}")
        self._raise_failure()
        if any(fileno in news for fileno, _ in ready):
            # Whoever said goodbye may have sent its part before: the end of its data tells.
            self._links.read_news()
            self._links.raise_news([])

    def _lost(self, peer: int, why: str) -> CommError:
        """The error for a connection that ended. Raises the abort, or the goodbye, that explains it."""
        until = time.monotonic() + GRACE
        while True:
            self._raise_failure()
            self._links.read_news()
            self._links.raise_news([peer])
            if time.monotonic() > until:
                return PeerLost(f"rank {peer} ended its connection while rank {self.rank} needed it ({why})")
            time.sleep(0.002)

    def _enter(self) -> None:
        """Notice an abort even where nothing has to be waited for."""
        self._links.read_news()
        self._links.raise_news([])

    # -- verbs

    def _all_reduce_flat(self, call: int, x: HostArray, out: HostArray, op: str) -> None:
        self._enter()
        if x.nbytes * (self.size - 1) > ONE_HOP:
            counts = split_sizes(x.size, self.size)
            self._reduce_chunks(call, x, counts, chunks(out, counts)[self.rank], op)
            self._gather_chunks(call, counts, out)
        else:
            for peer in self._data:
                self._post(call, peer, x)
            parts = {peer: self._room(peer, x) for peer in self._data}
            self._fetch(call, parts)
            self._flush(call)  # before out, which may be x, changes
            reduce_into(out, self._in_order(parts, x), op)
        self._flush(call)

    def _in_order(self, parts: dict[int, HostArray], mine: HostArray) -> list[HostArray]:
        return [mine if r == self.rank else parts[r] for r in range(self.size)]

    def _room(self, peer: int, like: HostArray) -> HostArray:
        """Memory for what comes from a peer: at most PIECE bytes, warm from the last time."""
        if peer not in self._scratch:
            self._scratch[peer] = np.empty(PIECE, np.uint8)
        view: HostArray = self._scratch[peer][:like.nbytes].view(like.dtype)
        return view

    def _reduce_chunks(self, call: int, x: HostArray, counts: Sequence[int], out: HostArray, op: str) -> None:
        """Send every peer its chunk of x, a frame per piece, and reduce this rank's chunk into `out`."""
        step, mine = PIECE // x.itemsize, chunks(x, counts)
        for peer in self._data:
            for start in range(0, max(1, counts[peer]), step):
                self._post(call, peer, mine[peer][start:start + step])
        for start in range(0, max(1, out.size), step):
            piece = mine[self.rank][start:start + step]
            parts = {peer: self._room(peer, piece) for peer in self._data}
            self._fetch(call, parts)
            reduce_into(out[start:start + step], self._in_order(parts, piece), op)

    def _gather_chunks(self, call: int, counts: Sequence[int], out: HostArray) -> None:
        """Every rank's chunk of `out` to every rank."""
        parts = chunks(out, counts)
        for peer in self._data:
            self._post(call, peer, parts[self.rank])
        self._fetch(call, {peer: parts[peer] for peer in self._data})

    def _reduce_scatter_flat(self, call: int, x: HostArray, counts: tuple[int, ...], out: HostArray,
                             op: str) -> None:
        self._enter()
        self._reduce_chunks(call, x, counts, out, op)
        self._flush(call)

    def _all_gather_flat(self, call: int, x: HostArray, counts: tuple[int, ...], out: HostArray) -> None:
        self._enter()
        np.copyto(chunks(out, counts)[self.rank], x)
        self._gather_chunks(call, counts, out)
        self._flush(call)

    def _all_to_all(self, call: int, x: HostArray, send: tuple[int, ...], recv: tuple[int, ...],
                    out: HostArray) -> None:
        self._enter()
        outgoing, incoming = chunks(x, send), chunks(out, recv)
        for peer in self._data:
            self._post(call, peer, outgoing[peer])
        np.copyto(incoming[self.rank], outgoing[self.rank])
        self._fetch(call, {peer: incoming[peer] for peer in self._data})
        self._flush(call)

    def _broadcast(self, call: int, buffer: HostArray, root: int) -> None:
        """Small: the root sends all to everyone. Large: a chunk to each, which sends it on to the rest."""
        self._enter()
        small = buffer.nbytes * (self.size - 1) <= ONE_HOP or self.size == 2
        parts = chunks(buffer, split_sizes(buffer.size, self.size))
        if self.rank == root:
            for peer in self._data:
                for part in [buffer] if small else [parts[peer], parts[root]]:
                    self._post(call, peer, part)
        elif small:
            self._fetch(call, {root: buffer})
        else:
            self._fetch(call, {root: parts[self.rank]})
            for peer in self._data:
                if peer != root:
                    self._post(call, peer, parts[self.rank])
            self._fetch(call, {peer: parts[peer] for peer in self._data})
        self._flush(call)

    def _send(self, call: int, x: HostArray, dst: int) -> None:
        self._enter()
        self._post(call, dst, x)
        self._flush(call)

    def _recv(self, call: int, out: HostArray, src: int) -> None:
        self._enter()
        self._fetch(call, {src: out})

    def _barrier(self, call: int) -> None:
        self._enter()
        for peer in self._data:
            self._post(call, peer, _NOTHING)
        self._fetch(call, dict.fromkeys(self._data, _NOTHING))
        self._flush(call)

    # -- the end

    def poll(self, needed: bool) -> None:
        self._links.read_news()
        self._links.raise_news([r for r in range(self.size) if r != self.rank] if needed else [])

    def _abort(self, reason: str) -> None:
        self._links.abort(reason)

    def _close(self) -> None:
        self._links.close()
        for sock in self._data.values():
            sock.close()
