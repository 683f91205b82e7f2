"""The control sockets between the ranks of one group: aborts, goodbyes, and the silence of the dead."""

from __future__ import annotations

import select
import socket
import struct

from meshtape.runtime.errors import CommAborted, CommError, PeerLost

_HEAD = struct.Struct("<cI")
_ABORT, _BYE = b"A", b"B"
_GOODBYE = "closed its communicator"
# An abort must fit into an idle socket's buffer, so that sending it never waits.
_LONGEST_REASON = 4096


class Links:
    """One connected, otherwise idle socket per peer rank.

    A peer that dies closes its end whatever else happened to it, so end-of-file here is the notice of death.
    """

    def __init__(self, rank: int, sockets: dict[int, socket.socket]) -> None:
        self.rank = rank
        self.lost: dict[int, str] = {}
        self.aborted: str | None = None
        self._sockets = sockets
        self._pending = dict.fromkeys(sockets, b"")
        self._peer_of = {sock.fileno(): peer for peer, sock in sockets.items()}
        self._poll = select.poll()
        for sock in sockets.values():
            sock.setblocking(False)
            self._poll.register(sock, select.POLLIN)

    def filenos(self) -> list[int]:
        """Descriptors that become readable when there is news."""
        return [fileno for fileno, peer in self._peer_of.items() if peer not in self.lost]

    def read_news(self) -> None:
        """Take in what has arrived, without waiting."""
        for fileno, _ in self._poll.poll(0):
            self._read(self._peer_of[fileno])

    def died(self) -> list[int]:
        """Ranks that are gone without a goodbye."""
        return [peer for peer, how in self.lost.items() if how != _GOODBYE]

    def raise_news(self, needed: list[int]) -> None:
        """Raise CommAborted if anyone aborted, PeerLost if one of the ranks `needed` is gone."""
        if self.aborted is not None:
            raise CommAborted(self.aborted)
        for peer in needed:
            if peer in self.lost:
                raise PeerLost(f"rank {peer} {self.lost[peer]} while rank {self.rank} needed it")

    def abort(self, reason: str) -> None:
        """Tell every peer that is still there."""
        text = reason.encode()[:_LONGEST_REASON]
        self._tell(_HEAD.pack(_ABORT, len(text)) + text)

    def close(self) -> None:
        self._tell(_HEAD.pack(_BYE, 0))
        for sock in self._sockets.values():
            sock.close()

    def _tell(self, message: bytes) -> None:
        for peer, sock in self._sockets.items():
            if peer not in self.lost:
                try:
                    sock.send(message)
                except OSError as error:
                    self.lost[peer] = f"cannot be reached ({error})"

    def _read(self, peer: int) -> None:
        try:
            data = self._sockets[peer].recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a reset is a death as well
        if not data:
            self._poll.unregister(self._sockets[peer])
            self.lost.setdefault(peer, "died")
            return
        pending = self._pending[peer] + data
        while len(pending) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(pending)
            if len(pending) < _HEAD.size + length:
                break
            self._take(peer, kind, pending[_HEAD.size:_HEAD.size + length])
            pending = pending[_HEAD.size + length:]
        self._pending[peer] = pending

    def _take(self, peer: int, kind: bytes, body: bytes) -> None:
        if kind == _BYE:
            self.lost[peer] = _GOODBYE
        elif kind == _ABORT:
            self.aborted = self.aborted or body.decode(errors="replace")
        else:
            raise CommError(f"rank {self.rank}: rank {peer} sent a control message of unknown kind {kind!r}; "
                            "run the same version everywhere")
