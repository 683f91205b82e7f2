"""A worker process: join the collectives, then answer batches until the driver goes away.

Nobody may be left to end a worker from outside (the driver was killed, the raylet was killed), so a Guard
thread ends it from inside.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from meshtape.cluster.channel import Channel, Listener
from meshtape.cluster.health import BEAT_SECONDS
from meshtape.cluster.wire import BROKEN, READY, RUN, frame, pack, reply_frame, run_of
from meshtape.runtime.collectives.base import Communicator
from meshtape.runtime.collectives.joining import join_devices
from meshtape.runtime.gpu import open_device
from meshtape.runtime.shards import axis_ranks

if TYPE_CHECKING:
    from meshtape.runtime.collectives.endpoint import Endpoint

# How long a worker waits for its driver before it gives up.
CONNECT_SECONDS = 60.0
# How long a worker that must go may take to leave a kernel and close what it holds.
GRACE_SECONDS = 3.0


class Assignment(NamedTuple):
    """A worker's part in the mesh; `addresses` are the collectives' endpoints of all ranks.

    `device` is "cpu" or "gpu": then `transports` says per mesh axis how its collectives travel ("nccl",
    "staged"), and `memory_fraction` how much of its GPU's memory a worker may take.
    """

    rank: int
    mesh_shape: tuple[int, ...]
    addresses: list[Any]
    device: str
    timeout: float
    transports: tuple[str, ...] = ()
    memory_fraction: float | None = None


class Guard:
    """Beats for the worker, and ends its process when it has no driver or no parent any more.

    A thread, so that it also acts while the worker's own thread is inside a kernel.
    """

    def __init__(self, connect_within: float | None = CONNECT_SECONDS) -> None:
        self.leaving = threading.Event()
        self._parent = os.getppid()
        self._channel: Channel | None = None
        self._deadline = None if connect_within is None else time.monotonic() + connect_within
        self._communicators: Sequence[Communicator] = ()
        threading.Thread(target=self._watch, name="meshtape-guard", daemon=True).start()

    def watch_channel(self, channel: Channel) -> None:
        self._channel = channel

    def will_abort(self, communicators: Sequence[Communicator]) -> None:
        """Communicators to abort when the worker must go, so that its peers get errors instead of waiting."""
        self._communicators = communicators

    def _watch(self) -> None:
        reason = ""
        while not reason:
            reason = self._look()
        self.leaving.set()
        for communicator in self._communicators:
            communicator.abort(reason)
        if self._channel is not None:
            self._channel.close()
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    def _look(self) -> str:
        """Wait a beat; why this process has to go, or ""."""
        channel = self._channel
        if channel is None:
            time.sleep(BEAT_SECONDS)
            if self._deadline is not None and time.monotonic() > self._deadline and self._channel is None:
                return "no driver connected"
        elif self._hung_up(channel):
            return "the driver closed the connection"
        if os.getppid() != self._parent:
            return "the process that started this worker is gone"
        return ""

    def _hung_up(self, channel: Channel) -> bool:
        poller = select.poll()
        try:
            poller.register(channel.fileno(), select.POLLRDHUP)
            if poller.poll(BEAT_SECONDS * 1000):
                return True
            channel.beat()
        except OSError:
            return True
        return False


def join(endpoint: Endpoint, assignment: Assignment, device: Any = "cpu") -> list[Communicator]:
    """One communicator per mesh axis. Every rank forms its groups in the order of the axes."""
    endpoint.connect(assignment.rank, assignment.addresses)
    groups = [endpoint.group(axis_ranks(assignment.rank, assignment.mesh_shape, axis))
              for axis in range(len(assignment.mesh_shape))]
    if assignment.device == "cpu":
        return list(groups)
    return [join_devices(group, device, transport)
            for group, transport in zip(groups, assignment.transports, strict=True)]


def device_of(assignment: Assignment) -> Any:
    """What the worker computes on; Ray shows it the one GPU that it has."""
    return "cpu" if assignment.device == "cpu" else open_device(0, assignment.memory_fraction)


def serve(listener: Listener, endpoint: Endpoint, assignment: Assignment, guard: Guard,
          make_worker: Callable[..., Any]) -> None:
    """Be the worker `assignment` says until the driver closes the channel."""
    channel = listener.accept(CONNECT_SECONDS)
    listener.close()
    guard.watch_channel(channel)
    try:
        device = device_of(assignment)
        communicators = join(endpoint, assignment, device)
        guard.will_abort(communicators)
        worker = make_worker(assignment.rank, assignment.mesh_shape, communicators, device)
        channel.send(frame(READY, pack([communicator.kind for communicator in communicators])))
        answer(channel, worker, guard)
        worker.close()
    except BaseException as error:
        # A kernel's failure is part of a reply. What arrives here ends this worker, and the driver says why,
        # unless it is the driver that has gone.
        if not guard.leaving.is_set() and not isinstance(error, ConnectionError):
            report(channel, f"it broke with {type(error).__name__}: {error}")
            raise
    finally:
        endpoint.close()


def answer(channel: Channel, worker: Any, guard: Guard) -> None:
    """Run batches in the order they come, until the stream ends."""
    while not guard.leaving.is_set():
        message = channel.receive()
        if message is None:
            break
        if message.kind != RUN:
            raise ValueError(f"a driver sends runs, not messages of kind {message.kind}")
        run = run_of(message)
        reply = worker.run(run)
        if run.answer or reply.failures:
            channel.send(reply_frame(reply))


def report(channel: Channel, text: str) -> None:
    """Tell the driver why this worker ends, and stay until it has hung up, so that the message gets there."""
    try:
        channel.send(frame(BROKEN, pack(text)))
        while channel.receive() is not None:
            pass
    except OSError:
        pass                # the driver has gone: nobody to tell
