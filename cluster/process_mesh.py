"""What meshes of worker processes share, however messages reach them: waiting, judging, closing."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, NoReturn, Protocol

from meshtape.cluster.health import BEAT_SECONDS, Pulse
from meshtape.cluster.mesh import Mesh
from meshtape.runtime.errors import WorkerLost
from meshtape.runtime.protocol import Reply


class Place(NamedTuple):
    """Where a rank runs, for messages."""

    rank: int
    node: str
    pid: int
    device: str

    def __str__(self) -> str:
        return f"worker {self.rank} ({self.device}, process {self.pid} on {self.node})"


class Processes(Protocol):
    """Who started the workers' processes, and can say why one ended."""

    def ended(self) -> int | None:
        """A rank whose process is known to have ended."""

    def cause(self, rank: int) -> str:
        """Why rank's process ended, "" if it has not or nobody knows."""

    def kill(self) -> None:
        """Have all of them ended soon, without waiting for it."""

    def close(self) -> None:
        """Return when all of them have ended and what they used is given back. May be called again."""


class ProcessMesh(Mesh):
    """Nothing is read or judged but while the driver sends or collects: it has no thread of its own."""

    def __init__(self, kind: str, names: tuple[str, ...], shape: tuple[int, ...], places: Sequence[Place],
                 links: list[str], processes: Processes, heartbeat_timeout: float) -> None:
        super().__init__(names, shape, [p.node for p in places], [p.device for p in places], links)
        self.kind = kind
        self.places = list(places)
        self._processes = processes
        self._pulse = Pulse(len(places), heartbeat_timeout)
        self._judged = 0.0
        self._replies: deque[Reply] = deque()
        self._explained_batch = -1

    @abstractmethod
    def _pump(self, timeout: float) -> None:
        """Wait at most `timeout` s for something from a worker; take in what is there, and judge silences."""

    @abstractmethod
    def _hang_up(self) -> None:
        """Let go of the workers."""

    def collect(self, timeout: float | None = None) -> Reply | None:
        self._check_open()
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._replies:
            left = BEAT_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
            self._pump(min(left, BEAT_SECONDS))
            if not self._replies and deadline is not None and time.monotonic() >= deadline:
                return None
        reply = self._replies.popleft()
        if reply.failures and reply.batch != self._explained_batch and is_collective_failure(reply):
            self._explain(reply)
        return reply

    def _explain(self, reply: Reply) -> None:
        """A collective that fails often means that a peer is lost: wait for that notice, which says more."""
        self._explained_batch = reply.batch
        deadline = time.monotonic() + self._pulse.timeout + BEAT_SECONDS
        while time.monotonic() < deadline:
            self._pump(BEAT_SECONDS)

    def _judge(self, now: float) -> None:
        """Raise WorkerLost if a worker is silent or has ended; looks every half beat."""
        if now - self._judged < BEAT_SECONDS / 2:
            return
        self._judged = now
        silent = self._pulse.silent(now)
        if silent is not None:
            self._lose(silent, f"no heartbeat for {self._pulse.timeout:g} s")
        ended = self._processes.ended()
        if ended is not None:
            self._lose(ended, "its process ended")

    def _lose(self, rank: int, noticed: str) -> NoReturn:
        """Close the mesh and raise WorkerLost."""
        place = self.places[rank]
        cause = self._processes.cause(rank)
        message = f"{place} was lost: {noticed}{f' ({cause})' if cause and cause != noticed else ''}"
        self._shut(message)
        raise WorkerLost(f"{message}; the mesh is closed, call init() to make a new one", rank, place.node)

    def close(self) -> None:
        self._shut("it was shut down")
        self._processes.close()

    def _shut(self, reason: str) -> None:
        """Have all workers end; close() also waits for it and gives back the rest, which may take seconds."""
        if not self._closed_because:
            self._closed_because = reason
            self._replies.clear()
            self._hang_up()
            self._processes.kill()


def is_collective_failure(reply: Reply) -> bool:
    return any(failure.kind in ("CommError", "PeerLost", "CommAborted") for failure in reply.failures)
