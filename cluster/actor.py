"""What runs inside a Ray actor: a plain class, imported by name, that turns the actor into a worker."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from meshtape.cluster import wire
from meshtape.cluster.channel import Address, Listener
from meshtape.cluster.serve import Assignment, Guard, device_of, join, serve
from meshtape.runtime.collectives.endpoint import Endpoint, machine
from meshtape.runtime.gpu import Gpu, describe, gpu_here


class Order(NamedTuple):
    """What every worker is told first. `driver` is the driver's machine()."""

    secret: bytes
    driver: str
    channel: str
    timeout: float
    wants_gpu: bool
    make_worker: Callable[..., Any]


class Site(NamedTuple):
    """What a worker found where Ray put it, and where it is reached. `gpu_index` is Ray's number of its GPU;
    `no_gpu` says why it found none.
    """

    node_id: str
    host: str
    ip: str
    pid: int
    gpu: Gpu | None
    gpu_index: int
    no_gpu: str
    channel: Address | None
    endpoint: Any


class WorkerActor:
    """One worker. The driver calls prepare() on all, assigns ranks, then calls run(), or with channel="ray"
    begin() and a deliver() for every batch."""

    def prepare(self, order: Order) -> Site:
        """Listen for the driver and for the other workers."""
        import ray

        context = ray.get_runtime_context()
        ip = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._order = order
        # Calls that arrive through Ray end with the driver, so only a channel can be missing.
        self._guard = Guard() if order.channel == "socket" else Guard(connect_within=None)
        self._endpoint = Endpoint(ip, order.secret, order.timeout)
        self._listener = None
        if order.channel == "socket":
            near = order.driver and order.driver == machine()
            self._listener = Listener(None if near else ip, order.secret)
        name, no_gpu = gpu_here() if order.wants_gpu else ("", "")
        granted = [int(i) for i in context.get_accelerator_ids().get("GPU", []) if str(i).isdigit()]
        gpu = describe() if name else None
        return Site(context.get_node_id(), socket.gethostname(), ip, os.getpid(), gpu,
                    granted[0] if granted else 0, no_gpu, self._listener.address if self._listener else None,
                    self._endpoint.address)

    def run(self, assignment: Assignment) -> None:
        """Be a worker until the driver hangs up."""
        assert self._listener is not None
        serve(self._listener, self._endpoint, assignment, self._guard, self._order.make_worker)

    def begin(self, assignment: Assignment) -> list[str]:
        """Join the collectives, and say by which kinds of communicators; deliver() follows."""
        device = device_of(assignment)
        communicators = join(self._endpoint, assignment, device)
        self._endpoint.close()
        self._guard.will_abort(communicators)
        self._worker = self._order.make_worker(assignment.rank, assignment.mesh_shape, communicators,
                                               device)
        self._delivered = 0
        return [communicator.kind for communicator in communicators]

    def deliver(self, number: int, data: bytes) -> bytes:
        """Run batch `number` (counted from 0) and answer it; both are frames of the control channel."""
        if number != self._delivered:
            raise RuntimeError(f"batch {number} arrived where {self._delivered} was due: Ray reordered calls")
        self._delivered += 1
        return b"".join(wire.reply_frame(self._worker.run(wire.run_of(wire.from_bytes(data)))))

    def beat(self) -> None:
        """Answer that this process runs; called in a concurrency group of its own."""
