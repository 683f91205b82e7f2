"""Where a process is reached, and how processes that know each other's addresses form groups.

Two phases: every rank makes an Endpoint, whose `address` travels over whatever channel the ranks already
share; then every rank calls connect() with all addresses. After that, group() needs no other channel. In a
group each rank calls those before it: one control socket per pair, and for TCP one more for data.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from meshtape.runtime.collectives import handshake
from meshtape.runtime.collectives.arena import SUPPORTED, Arena
from meshtape.runtime.collectives.host import HostCommunicator, SelfCommunicator
from meshtape.runtime.collectives.links import Links
from meshtape.runtime.collectives.shm import ShmCommunicator
from meshtape.runtime.collectives.tcp import TcpCommunicator
from meshtape.runtime.errors import CommError, CommTimeout, MeshError, PeerLost, ShapeError

_BACKLOG = 512
# Seconds between looks whether a peer that has not called yet is alive, and for such a look.
_PROBE = 0.5
_SHM, _TCP = b"S", b"T"


class Endpoint:
    """Listens for peers on a TCP port of `host` (an address that peers can reach; 127.0.0.1 if None) and, on
    Linux, on an abstract unix socket.

    secret: shared by all ranks of a session. timeout: seconds, for forming groups and for waits in them.
    """

    def __init__(self, host: str | None = None, secret: bytes = b"", timeout: float = 60.0) -> None:
        if not secret:
            raise MeshError("an endpoint needs the session's secret; pass the same random bytes to all ranks")
        self._secret = secret
        self._timeout = timeout
        self._rank: int | None = None
        self._addresses: list[dict[str, Any]] = []
        self._groups: Counter[tuple[int, ...]] = Counter()
        self._arrived: dict[tuple[str, int, str], socket.socket] = {}
        self._refused: list[str] = []
        self._changed = threading.Condition()
        self._closed = False
        host = host or "127.0.0.1"
        self._listeners = [socket.create_server((host, 0), family=_family(host), backlog=_BACKLOG)]
        name = ""
        if SUPPORTED:
            name = f"meshtape-{secrets.token_hex(16)}"
            unix = socket.socket(socket.AF_UNIX)
            unix.bind("\0" + name)
            unix.listen(_BACKLOG)
            self._listeners.append(unix)
        self.address: dict[str, Any] = {
            "host": host, "port": self._listeners[0].getsockname()[1], "unix": name, "machine": machine()}
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def connect(self, rank: int, addresses: Sequence[dict[str, Any]]) -> None:
        """Say who this is and where everybody is: addresses[r] is rank r's `address`."""
        if not 0 <= rank < len(addresses) or addresses[rank] != self.address:
            raise ShapeError(f"connect: addresses[{rank}] of {len(addresses)} is not this endpoint's address")
        self._rank = rank
        self._addresses = list(addresses)

    def group(self, ranks: Sequence[int], timeout: float | None = None) -> HostCommunicator:
        """The communicator among `ranks` (global ranks; their order gives the ranks inside the group).

        Every member calls this, in the same order of groups. Raises CommTimeout if a member does not,
        PeerLost if one is dead.
        """
        ranks = tuple(int(r) for r in ranks)
        if self._rank is None or self._rank not in ranks or len(set(ranks)) != len(ranks):
            raise ShapeError(f"group: {list(ranks)} must name rank {self._rank} and no rank twice; call "
                             "connect() before")
        if len(ranks) == 1:
            return SelfCommunicator()
        timeout = self._timeout if timeout is None else timeout
        key = f"{'.'.join(map(str, ranks))}#{self._groups[ranks]}"
        self._groups[ranks] += 1
        return _Forming(self, self._rank, ranks, key, timeout).communicator()

    def close(self) -> None:
        """Stop listening. Communicators stay as they are; a group() in progress fails."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            waiting = list(self._arrived.values())
            self._arrived.clear()
            self._changed.notify_all()
        for sock in waiting:
            sock.close()
        for listener in self._listeners:
            listener.shutdown(socket.SHUT_RDWR)  # close() alone would leave the accepting thread asleep
            listener.close()

    # -- called by the groups being formed

    def dial(self, peer: int, hello: dict[str, Any], near: bool, deadline: float) -> socket.socket:
        """A connection to global rank `peer`, by unix socket if it is `near`."""
        whom = f"rank {peer} at {self._addresses[peer]['host']}:{self._addresses[peer]['port']}"
        sock, where = self._socket_to(peer, near)
        try:
            sock.settimeout(_left(deadline))
            sock.connect(where)
            handshake.call(sock, self._secret, hello, whom)
        except TimeoutError as error:
            sock.close()
            raise CommTimeout(f"{whom} did not answer rank {self._rank} before the deadline") from error
        except OSError as error:
            sock.close()
            message = f"{whom} refused rank {self._rank}'s connection ({error}); it has died or was closed"
            raise PeerLost(message) from error
        except CommError:
            sock.close()
            raise
        return sock

    def answers(self, peer: int, near: bool) -> bool:
        """False if nobody listens where global rank `peer` should."""
        sock, where = self._socket_to(peer, near)
        with sock:
            try:
                sock.settimeout(_PROBE)
                sock.connect(where)
            except TimeoutError:
                return True  # busy or far away; whoever dials finds out
            except OSError:
                return False
            return True

    def near(self, peers: Sequence[int]) -> bool:
        """True if all `peers` say that they share this machine and its network namespace."""
        machine = self.address["machine"]
        return bool(machine) and all(self._addresses[r]["machine"] == machine for r in peers)

    def crowded(self) -> bool:
        """True if this machine runs more ranks than it has processors."""
        here = [a for a in self._addresses if a["machine"] == self.address["machine"]]
        return len(here) > len(os.sched_getaffinity(0))

    def take(self, key: str, peer: int, purpose: str, deadline: float) -> socket.socket:
        """The connection that global rank `peer` makes for this group and purpose."""
        wanted = (key, peer, purpose)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: wanted in self._arrived or self._closed,
                                       min(_PROBE, _left(deadline)))
                if wanted in self._arrived:
                    return self._arrived.pop(wanted)
                if self._closed:
                    raise CommError(f"rank {self._rank}: the endpoint was closed while forming group {key}")
            if not self.answers(peer, near=False):
                raise PeerLost(f"rank {self._rank}: rank {peer} died or was closed before it joined group "
                               f"{key}")
            if time.monotonic() > deadline:
                refused = f"; refused meanwhile: {'; '.join(self._refused)}" if self._refused else ""
                raise CommTimeout(f"rank {self._rank}: rank {peer} did not join group {key} before the "
                                  f"deadline; every member must call group() in the same order{refused}")

    def _socket_to(self, peer: int, near: bool) -> tuple[socket.socket, Any]:
        address = self._addresses[peer]
        if near:
            return socket.socket(socket.AF_UNIX), "\0" + address["unix"]
        return socket.socket(_family(address["host"])), (address["host"], address["port"])

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, whence = listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.05)  # out of descriptors, or the caller hung up; others may still come
                continue
            threading.Thread(target=self._receive, args=(sock, whence), daemon=True).start()

    def _receive(self, sock: socket.socket, whence: Any) -> None:
        whom = f"the caller at {whence[0]}:{whence[1]}" if whence else "a caller on this machine"
        try:
            sock.settimeout(self._timeout)
            if not sock.recv(1, socket.MSG_PEEK):
                sock.close()  # somebody only looked whether this endpoint is alive
                return
            hello = handshake.answer(sock, self._secret, whom)
            wanted = (str(hello["group"]), int(hello["rank"]), str(hello["purpose"]))
        except (OSError, CommError, ValueError, KeyError) as error:
            sock.close()
            with self._changed:
                self._refused = [*self._refused[-3:], str(error)]
            return
        with self._changed:
            if self._closed:
                sock.close()
            else:
                self._arrived[wanted] = sock
                self._changed.notify_all()


class _Forming:
    """One member's part in forming one group."""

    def __init__(self, endpoint: Endpoint, rank: int, ranks: tuple[int, ...], key: str,
                 timeout: float) -> None:
        self.endpoint = endpoint
        self.ranks = ranks
        self.key = key
        self.timeout = timeout
        self.deadline = time.monotonic() + timeout
        self.me = ranks.index(rank)
        self.near = endpoint.near(ranks)
        self.opened: list[socket.socket] = []

    def communicator(self) -> HostCommunicator:
        try:
            return self._join()
        except BaseException as error:
            for sock in self.opened:
                sock.close()
            if isinstance(error, TimeoutError):
                raise CommTimeout(f"group {self.key} was not formed within {self.timeout:g} s") from error
            if isinstance(error, ConnectionError):
                raise PeerLost(f"a member died while group {self.key} was being formed: {error}") from error
            raise

    def _join(self) -> HostCommunicator:
        control = self._connect("control", self.near)
        fd = self._agree(control)
        if fd is None:
            data = self._connect("data", near=False)
            return TcpCommunicator(self.me, len(self.ranks), data, Links(self.me, control), self.timeout)
        try:
            arena = Arena(fd, len(self.ranks))
        finally:
            os.close(fd)
        return ShmCommunicator(self.me, len(self.ranks), arena, Links(self.me, control), self.timeout,
                               self.endpoint.crowded())

    def _connect(self, purpose: str, near: bool) -> dict[int, socket.socket]:
        """One socket per peer, by rank inside the group."""
        hello = {"group": self.key, "rank": self.ranks[self.me], "purpose": purpose}
        sockets = {}
        for member, peer in enumerate(self.ranks):
            if member < self.me:
                by_unix = near and self.endpoint.answers(peer, near=True)
                sockets[member] = self.endpoint.dial(peer, hello, by_unix, self.deadline)
            elif member > self.me:
                sockets[member] = self.endpoint.take(self.key, peer, purpose, self.deadline)
            else:
                continue
            self.opened.append(sockets[member])
        return sockets

    def _agree(self, control: dict[int, socket.socket]) -> int | None:
        """Shared memory if every pair is joined by unix sockets: a descriptor of it, else None.

        The first member asks all others, decides, and hands out the memory.
        """
        if not self.near:
            return None
        willing = all(sock.family == socket.AF_UNIX for sock in control.values())
        for sock in control.values():
            sock.settimeout(_left(self.deadline))
        if self.me != 0:
            control[0].sendall(_SHM if willing else _TCP)
            answer, fds, _, _ = socket.recv_fds(control[0], 1, 1)
            if answer not in (_SHM, _TCP):
                raise PeerLost(f"rank {self.ranks[0]} died while group {self.key} was being formed")
            return fds[0] if answer == _SHM else None
        for member, sock in control.items():
            answer = sock.recv(1)
            if not answer:
                raise PeerLost(f"rank {self.ranks[member]} died while group {self.key} was being formed")
            willing = willing and answer == _SHM
        fd = Arena.create(len(self.ranks)) if willing else None
        for sock in control.values():
            if fd is None:
                sock.sendall(_TCP)
            else:
                socket.send_fds(sock, [_SHM], [fd])
        return fd


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def machine() -> str:
    """What two processes have in common if unix sockets and memory can join them; empty if nothing can.

    MESHTAPE_TRANSPORT=tcp in the environment makes every process a machine of its own.
    """
    if not SUPPORTED or os.environ.get("MESHTAPE_TRANSPORT") == "tcp":
        return ""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    network = os.stat("/proc/self/ns/net")
    return f"{boot}/{network.st_dev}/{network.st_ino}"
