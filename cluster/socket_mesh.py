"""The mesh of worker processes that the driver reaches over control channels."""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from meshtape.cluster import wire
from meshtape.cluster.channel import Channel
from meshtape.cluster.feed import FeedMemory
from meshtape.cluster.health import BEAT_SECONDS
from meshtape.cluster.mesh import slowest_links
from meshtape.cluster.process_mesh import Place, Processes, ProcessMesh
from meshtape.cluster.wire import Message
from meshtape.runtime.errors import MeshError
from meshtape.runtime.protocol import Run
from meshtape.runtime.shards import Shape

CLOSED = "connection closed"


class SocketMesh(ProcessMesh):
    """One channel per rank."""

    def __init__(self, kind: str, names: tuple[str, ...], shape: tuple[int, ...], places: Sequence[Place],
                 channels: Sequence[Channel], processes: Processes, heartbeat_timeout: float = 4.0,
                 memory: FeedMemory | None = None) -> None:
        super().__init__(kind, names, shape, places, [], processes, heartbeat_timeout)
        self._channels = list(channels)
        self._memory = memory
        self._memories = [channel.memory for channel in channels]
        # Batches that feed arrays in that memory, with these; and the last batch that each rank answered.
        self._fed: deque[tuple[int, list[Any]]] = deque()
        self._answered = [0] * len(channels)
        self._ready: list[list[str]] = []       # the kinds of the communicators of each rank that is ready
        self._rank_of = {channel.fileno(): rank for rank, channel in enumerate(channels)}
        self._poller = select.poll()
        for channel in channels:
            self._poller.register(channel.fileno(), select.POLLIN)

    def wait_until_ready(self, timeout: float) -> None:
        """Return when every worker has joined its collectives; MeshError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while len(self._ready) < self.size:
            if time.monotonic() > deadline:
                self.close()
                raise MeshError(f"{len(self._ready)} of {self.size} workers got ready within {timeout:g} s; "
                                "the others may be unable to reach them over the network")
            self._pump(BEAT_SECONDS)
        self.links = slowest_links(self._ready)

    def room(self, shape: Shape, dtype: np.dtype[Any]) -> np.ndarray[Any, Any] | None:
        return None if self._memory is None else self._memory.room(shape, dtype)

    def send(self, runs: Sequence[Run]) -> None:
        self._check_open()
        frames = wire.run_frames(runs, self._memories)
        if runs[0].feeds and self._memory is not None:
            self._fed.append((runs[0].batch, [run.feeds for run in runs]))
        try:
            for rank, (channel, buffers) in enumerate(zip(self._channels, frames, strict=True)):
                try:
                    channel.put(buffers)
                except OSError:
                    self._lose(rank, CLOSED)
        except KeyboardInterrupt:
            self._shut("a message was interrupted half-way")
            raise
        while any(channel.unsent for channel in self._channels):
            self._pump(BEAT_SECONDS)

    def _pump(self, timeout: float) -> None:
        for channel in self._channels:
            if channel.unsent:
                self._poller.modify(channel.fileno(), select.POLLIN | select.POLLOUT)
        self._pulse.look()
        events = self._poller.poll(timeout * 1000)
        now = self._pulse.look(timeout)
        try:
            for fd, event in events:
                rank = self._rank_of[fd]
                trouble = self._exchange(self._channels[rank], rank, event, now)
                if trouble:
                    self._lose(rank, trouble)
        except KeyboardInterrupt:
            self._shut("a message was interrupted half-way")
            raise
        self._judge(now)

    def _exchange(self, channel: Channel, rank: int, event: int, now: float) -> str:
        """Read from and write to a channel that is ready; what is wrong with it, or ""."""
        try:
            if event & select.POLLOUT:
                channel.flush()
                if not channel.unsent:
                    self._poller.modify(channel.fileno(), select.POLLIN)
            if event & ~select.POLLOUT:
                more = channel.fill()
                self._pulse.heard(rank, now)
                while channel.messages:
                    trouble = self._take(channel.messages.popleft())
                    if trouble:
                        return trouble
                return "" if more else CLOSED
        except BlockingIOError:
            return ""           # the kernel's readiness was a false report
        except OSError:
            return CLOSED
        except MeshError as error:
            return str(error)   # what arrived is no message
        return ""

    def _take(self, message: Message) -> str:
        """Act on a message; what is wrong with the worker that sent it, or ""."""
        match message.kind:
            case wire.REPLY:
                reply = wire.reply_of(message)
                self._replies.append(reply)
                self._answered[reply.rank] = reply.batch
                while self._fed and self._fed[0][0] <= min(self._answered):
                    self._fed.popleft()
            case wire.READY:
                self._ready.append(message.head)
            case wire.BROKEN:
                return str(message.head)
            case kind:
                return f"it sent a message of kind {kind}, which only a driver sends"
        return ""

    def _hang_up(self) -> None:
        for channel in self._channels:
            channel.close()
        if self._memory is not None:
            self._memory.close()
