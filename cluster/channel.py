"""The control channel: one authenticated stream socket between the driver and one worker.

The worker listens, on an abstract Unix socket for a driver on the same host and on TCP otherwise. Both sides
prove that they know the session's secret (the collectives' handshake) before anything else is read.
"""

from __future__ import annotations

import secrets
import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress

from meshtape.cluster.feed import FeedMemory, FeedView
from meshtape.cluster.wire import BEAT, Assembler, Buffer, Message, consume
from meshtape.runtime.collectives import handshake
from meshtape.runtime.errors import CommError, MeshError

# An abstract Unix name (starting with a NUL byte), or (host, port).
Address = str | tuple[str, int]

# How long a worker listens to one peer that may never answer its challenge.
HANDSHAKE_SECONDS = 5.0
_GATHER = 64                # buffers per system call; Linux takes up to 1024
_BEAT = bytes([BEAT])


class Channel:
    """Messages over a connected socket. The driver uses put(), flush() and fill(), which never wait; a worker
    uses send(), receive() and, from another thread, beat()."""

    def __init__(self, sock: socket.socket, view: FeedView | None = None,
                 memory: FeedMemory | None = None) -> None:
        """Shared memory that arrays go through: a worker reads them from `view`, the driver writes `memory`.
        """
        self.memory = memory
        self._sock = sock
        self._inbox = Assembler(view=view)
        self._unsent: list[memoryview] = []
        self._writing = threading.Lock()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)

    @property
    def messages(self) -> deque[Message]:
        """What has arrived whole; the reader takes from the left."""
        return self._inbox.messages

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    def fileno(self) -> int:
        return self._sock.fileno()

    def put(self, buffers: list[Buffer]) -> None:
        """Write what the socket takes now, keep the rest for flush(). Raises OSError if the peer is gone."""
        self._unsent.extend(map(memoryview, buffers))
        self.flush()

    def flush(self) -> None:
        while self._unsent:
            try:
                n = self._sock.sendmsg(self._unsent[:_GATHER], [], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            consume(self._unsent, n)

    def fill(self, flags: int = socket.MSG_DONTWAIT) -> bool:
        """Read once, into `messages` as they complete; False at the end of the stream.

        Raises BlockingIOError if there is nothing to read, OSError if the connection broke.
        """
        space = self._inbox.space()
        if len(space) == 1:
            n = self._sock.recv_into(space[0], 0, flags)
        else:
            n = self._sock.recvmsg_into(space[:_GATHER], 0, flags)[0]
        self._inbox.took(n)
        return n > 0

    def send(self, buffers: list[Buffer]) -> None:
        """Write a whole frame, waiting for as long as the peer does not read."""
        with self._writing:
            self.put(buffers)
            if self._unsent:
                poller = select.poll()
                poller.register(self._sock, select.POLLOUT)
                while self._unsent:
                    poller.poll()
                    self.flush()

    def receive(self) -> Message | None:
        """The next message, waiting for it; None at the end of the stream."""
        while not self.messages:
            if not self.fill(flags=0):
                return None
        return self.messages.popleft()

    def beat(self) -> None:
        """A sign of life, unless a message is being written (a sign of life as well) or nobody reads."""
        if self._writing.acquire(blocking=False):
            try:
                self._sock.send(_BEAT, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass        # full of unread beats: one more would say nothing new
            finally:
                self._writing.release()

    def close(self) -> None:
        with suppress(OSError):                     # the peer may have closed first
            self._sock.shutdown(socket.SHUT_RDWR)   # wakes a thread that waits in receive()
        self._sock.close()


class Listener:
    """Where a worker waits for its driver: TCP at `host`, or an abstract Unix socket if host is None."""

    def __init__(self, host: str | None, secret: bytes) -> None:
        self._secret = secret
        if host is None:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sock.bind(f"\0meshtape-{secrets.token_hex(8)}")
            self.address: Address = self._sock.getsockname().decode()
        else:
            self._sock = socket.create_server((host, 0), family=_family(host))
            self.address = (host, self._sock.getsockname()[1])
        self._sock.listen()

    def accept(self, timeout: float) -> Channel:
        """The first peer that knows the secret; others are turned away. MeshError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._sock.settimeout(left)
            try:
                peer, _ = self._sock.accept()
            except TimeoutError:
                break
            try:
                peer.settimeout(HANDSHAKE_SECONDS)
                hello = handshake.answer(peer, self._secret, "the caller")
                view = FeedView(peer) if hello.get("feed") else None
            except (OSError, CommError, ValueError):
                peer.close()        # whoever it was learns nothing; the driver may still come
                continue
            peer.settimeout(None)
            return Channel(peer, view)
        raise MeshError(f"no driver connected to {self.address!r} within {timeout:g} s")

    def close(self) -> None:
        self._sock.close()


def dial(address: Address, secret: bytes, timeout: float, memory: FeedMemory | None = None) -> Channel:
    """Connect to a worker's Listener, and let it read `memory` if it is on this host. MeshError if it cannot
    be reached, CommError if secrets differ.
    """
    family = socket.AF_UNIX if isinstance(address, str) else _family(address[0])
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(address)
        share = memory is not None and family == socket.AF_UNIX
        handshake.call(sock, secret, {"feed": share}, f"the worker at {address!r}")
        if memory is not None and share:
            memory.send(sock)
        sock.settimeout(None)
    except CommError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise MeshError(f"the worker at {address!r} cannot be reached ({error}); if the workers' ports are "
                        'closed to this machine, use channel="ray"') from error
    return Channel(sock, memory=memory if share else None)


def _keep_alive(sock: socket.socket) -> None:
    """End the connection when the other host vanishes, though not when its process is only stopped."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
