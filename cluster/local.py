"""Meshes inside the driver's own process: one worker in the calling thread, or one thread per worker.

Nothing is serialised here, arrays pass by reference.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

from meshtape.cluster.mesh import Mesh, mesh_axes, slowest_links
from meshtape.runtime import blas
from meshtape.runtime.collectives.host import HostCommunicator
from meshtape.runtime.collectives.joining import join_devices
from meshtape.runtime.collectives.threads import ThreadGroup
from meshtape.runtime.errors import WorkerLost
from meshtape.runtime.protocol import Failure, Reply, Run
from meshtape.runtime.shards import axis_ranks
from meshtape.runtime.worker import Worker

HERE = "this process"
# A device by its number, for work of the calling thread.
OpenDevice = Callable[[int], Any]
# How long close() waits for a thread that is inside a kernel; it is a daemon thread, so the process can end.
JOIN_SECONDS = 5.0


class InlineMesh(Mesh):
    """One worker that runs each batch inside send(), on the device that `open_device(0)` gives, if any."""

    kind = "inline"

    def __init__(self, names: tuple[str, ...] = ("data",), worker: Callable[..., Any] = Worker,
                 open_device: OpenDevice | None = None) -> None:
        super().__init__(names, (1,) * len(names), [HERE], ["cpu" if open_device is None else "gpu0"],
                         ["self"] * len(names))
        alone = [ThreadGroup(1).communicator(0) for _ in names]
        self._device = "cpu" if open_device is None else open_device(0)
        self._worker = worker(0, self.shape, on_device(alone, self._device), self._device)
        self._replies: deque[Reply] = deque()

    def send(self, runs: Sequence[Run]) -> None:
        self._check_open()
        run, = runs
        try:
            reply = self._worker.run(run)
            if run.answer or reply.failures:
                self._replies.append(reply)
        except KeyboardInterrupt:
            # The batch is answered as failed, so that whoever counts replies stays in step.
            failure = Failure(run.batch, 0, 0, "KeyboardInterrupt", "interrupted by the user")
            self._replies.append(Reply(0, run.batch, [failure], [None] * len(run.fetch)))
            raise

    def collect(self, timeout: float | None = None) -> Reply | None:
        """As Mesh.collect, but never waits: what was sent has been answered."""
        self._check_open()
        return self._replies.popleft() if self._replies else None

    def close(self) -> None:
        if not self._closed_because:
            self._closed_because = "it was shut down"
            self._replies.clear()
            self._worker.close()
            close_device(self._device)


class ThreadMesh(Mesh):
    """`workers` threads of this process, each with its own queue of batches.

    blas_threads: how many threads each call of the BLAS in this process uses meanwhile. One unless told:
    OpenBLAS lets one caller at a time use its threads, and several callers were up to 20 times slower.

    gpus: of this process, of which worker i takes number i % gpus by open_device(number), in its thread;
    none if 0. Their collectives go through the host: NCCL between threads can wait for ever where one of them
    makes the driver wait for the devices of all.
    """

    kind = "threads"

    def __init__(self, workers: int, mesh: Mapping[str, int] | None = None, timeout: float = 300.0,
                 worker: Callable[..., Any] = Worker, blas_threads: int | None = None, gpus: int = 0,
                 open_device: OpenDevice | None = None) -> None:
        names, shape = mesh_axes(workers, mesh)
        self._communicators = thread_communicators(shape, timeout)
        links = slowest_links([[c.kind for c in mine] for mine in self._communicators])
        self._gpus, self._open_device = gpus, open_device
        if gpus:
            links = [kind if kind == "self" else f"staged+{kind}" for kind in links]
        super().__init__(names, shape, [HERE] * workers,
                         [f"gpu{rank % gpus}" if gpus else "cpu" for rank in range(workers)], links)
        if gpus:
            self.reasons = ["threads of one process"] * len(names)
        self._inboxes: list[SimpleQueue[Run | None]] = [SimpleQueue() for _ in range(workers)]
        self._replies: SimpleQueue[Reply | WorkerLost] = SimpleQueue()
        self._stopping = threading.Event()
        self._blas_before = blas.blas_threads()
        blas.set_blas_threads(blas_threads or 1)
        self._threads = [threading.Thread(target=self._serve, args=(rank, worker), daemon=True,
                                          name=f"meshtape-worker-{rank}") for rank in range(workers)]
        for thread in self._threads:
            thread.start()

    def send(self, runs: Sequence[Run]) -> None:
        self._check_open()
        for inbox, run in zip(self._inboxes, runs, strict=True):
            inbox.put(run)

    def collect(self, timeout: float | None = None) -> Reply | None:
        self._check_open()
        try:
            reply = self._replies.get(timeout=timeout)
        except Empty:
            return None
        if isinstance(reply, WorkerLost):
            self._shut(str(reply))
            raise reply
        return reply

    def close(self) -> None:
        self._shut("it was shut down")

    def _shut(self, reason: str) -> None:
        if not self._closed_because and self._blas_before is not None:
            blas.set_blas_threads(self._blas_before)
        self._closed_because = self._closed_because or reason
        self._stopping.set()
        for inbox in self._inboxes:
            inbox.put(None)
        for communicators in self._communicators:
            for communicator in communicators:
                communicator.abort("the mesh is being closed")
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _serve(self, rank: int, make: Callable[..., Any]) -> None:
        """The body of worker thread `rank`."""
        worker, device = None, "cpu"
        try:
            if self._open_device is not None:
                device = self._open_device(rank % self._gpus)
            worker = make(rank, self.shape, on_device(self._communicators[rank], device), device)
            while (run := self._inboxes[rank].get()) is not None and not self._stopping.is_set():
                reply = worker.run(run)
                if run.answer or reply.failures:
                    self._replies.put(reply)
        except BaseException as error:
            # A worker reports kernels' failures in its replies; what escapes is the end of this worker.
            self._replies.put(WorkerLost(f"worker {rank} (a thread of this process) broke: "
                                         f"{type(error).__name__}: {error}", rank, HERE))
        finally:
            if worker is not None:
                worker.close()
            close_device(device)


def close_device(device: Any) -> None:
    """Give back what a device holds, if it is one."""
    if device != "cpu":
        device.close()


def on_device(communicators: Sequence[HostCommunicator], device: Any) -> list[Any]:
    """What stands between the arrays of workers on `device`."""
    if device == "cpu":
        return list(communicators)
    return [join_devices(communicator, device, "staged") for communicator in communicators]


def thread_communicators(shape: tuple[int, ...], timeout: float) -> list[list[HostCommunicator]]:
    """Per rank, one communicator per mesh axis, between the threads that differ only along that axis."""
    groups: dict[tuple[int, ...], ThreadGroup] = {}
    size = 1
    for extent in shape:
        size *= extent
    out: list[list[HostCommunicator]] = []
    for rank in range(size):
        mine: list[HostCommunicator] = []
        for axis in range(len(shape)):
            members = axis_ranks(rank, shape, axis)
            group = groups.setdefault((axis, *members), ThreadGroup(len(members), timeout))
            mine.append(group.communicator(members.index(rank)))
        out.append(mine)
    return out
