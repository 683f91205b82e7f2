"""Starting a mesh of Ray actors: connect, place, rank, let the workers find each other."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import floor
from typing import Any

import ray

from meshtape.cluster import feed
from meshtape.cluster.actor import Order, Site
from meshtape.cluster.call_mesh import CallMesh
from meshtape.cluster.channel import Channel, dial
from meshtape.cluster.feed import FeedMemory
from meshtape.cluster.mesh import fraction_for, mesh_axes, slowest_links
from meshtape.cluster.placement import transports
from meshtape.cluster.process_mesh import Place, ProcessMesh
from meshtape.cluster.ray_actors import RayActors, alive_nodes
from meshtape.cluster.ray_connect import connect
from meshtape.cluster.serve import Assignment
from meshtape.cluster.socket_mesh import SocketMesh
from meshtape.runtime.collectives.choice import SHARING_VARIABLE
from meshtape.runtime.collectives.endpoint import machine
from meshtape.runtime.errors import MeshError
from meshtape.runtime.worker import Worker

CHANNELS = ("socket", "ray")
# How long the workers may take to find each other and to connect.
JOIN_SECONDS = 60.0
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def start(workers: int | None, mesh: Mapping[str, int] | None = None, *, address: str | None = None,
          devices: str | None = None, gpus_per_worker: float = 1.0, memory_fraction: float | None = None,
          threads_per_worker: int | None = None, heartbeat_timeout: float = 4.0, channel: str = "socket",
          timeout: float = 300.0, make_worker: Callable[..., Any] = Worker) -> ProcessMesh:
    """A mesh of `workers` Ray actors; None: one per GPU of the cluster, or one per node if it has none.

    address: None starts a Ray here that ends with the mesh (or uses the one the process has).
    devices: "cpu", "gpu", or None for GPUs where every worker can have one (or `gpus_per_worker`, if less).
    memory_fraction: of its GPU's memory, for each worker. channel: how messages travel.
    timeout: seconds after which a collective gives up. Raises MeshError with nothing left running.
    """
    if channel not in CHANNELS:
        raise MeshError(f"channel={channel!r}: needed one of {CHANNELS}")
    if workers is not None:
        mesh_axes(workers, mesh)        # raises before anything is started
    actors = RayActors(connect(address, workers or 0))
    try:
        gpus = floor(ray.cluster_resources().get("GPU", 0) / gpus_per_worker)  # type: ignore[no-untyped-call]
        if workers is None:
            workers = gpus if gpus and devices != "cpu" else len(alive_nodes())
        names, shape = mesh_axes(workers, mesh)
        gpu = devices == "gpu" or (devices is None and gpus >= workers)
        actors.spawn(workers, gpus_per_worker if gpu else 0.0, environment(workers, gpu, threads_per_worker),
                     health=channel == "ray")
        secret = secrets.token_bytes(32)
        actors.prepare(Order(secret, machine(), channel, timeout, gpu, make_worker), shape[-1])
        device = common_device(actors.sites, devices)
        choices = [] if device == "cpu" else transports(actors.sites, shape, wish())
        assignments = [Assignment(rank, shape, [site.endpoint for site in actors.sites], device, timeout,
                                  tuple(choice.transport for choice in choices),
                                  fraction_for(memory_fraction, gpus_per_worker)) for rank in range(workers)]
        where = places(actors.sites, device)
        if channel == "ray":
            made = join_by_calls(names, shape, where, actors, assignments, heartbeat_timeout)
        else:
            made = join_by_sockets(names, shape, where, actors, assignments, heartbeat_timeout, secret)
        made.reasons = [choice.reason for choice in choices] or made.reasons
        return made
    except BaseException:
        actors.close()
        raise


def join_by_sockets(names: tuple[str, ...], shape: tuple[int, ...], where: list[Place], actors: RayActors,
                    assignments: list[Assignment], heartbeat_timeout: float, secret: bytes) -> ProcessMesh:
    """Let each actor run as a worker, and connect to it."""
    actors.watch([handle.run.remote(assignment)
                  for handle, assignment in zip(actors.handles, assignments, strict=True)])
    channels: list[Channel] = []
    near = any(isinstance(site.channel, str) for site in actors.sites)
    memory = FeedMemory() if near and feed.SUPPORTED else None
    try:
        for site in actors.sites:
            assert site.channel is not None
            channels.append(dial(site.channel, secret, JOIN_SECONDS, memory))
    except BaseException:
        for opened in channels:
            opened.close()
        if memory is not None:
            memory.close()
        raise
    mesh = SocketMesh("ray", names, shape, where, channels, actors, heartbeat_timeout, memory)
    mesh.wait_until_ready(JOIN_SECONDS)
    return mesh


def join_by_calls(names: tuple[str, ...], shape: tuple[int, ...], where: list[Place], actors: RayActors,
                  assignments: list[Assignment], heartbeat_timeout: float) -> ProcessMesh:
    """Let each actor join its collectives; from then on it is called per batch."""
    begun = [handle.begin.remote(assignment)
             for handle, assignment in zip(actors.handles, assignments, strict=True)]
    kinds = actors.get(begun, JOIN_SECONDS)
    return CallMesh(names, shape, where, slowest_links(kinds), actors, heartbeat_timeout)


def environment(workers: int, gpu: bool, threads: int | None) -> dict[str, str]:
    """Environment variables of the workers: their share of the cores, and no GPU for those that have none."""
    if threads is None:
        cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        if len(alive_nodes()) == 1:
            cores = min(cores, len(os.sched_getaffinity(0)))
        threads = max(1, cores // workers)
    found = {name: str(threads) for name in BLAS_THREADS}
    if not gpu:
        found["CUDA_VISIBLE_DEVICES"] = ""
    if wish():
        found["MESHTAPE_TRANSPORT"] = wish()
    if wish() == "nccl":
        found[SHARING_VARIABLE] = "1"
    return found


def wish() -> str:
    """What the user wants of the transports, see runtime.collectives.choice."""
    return os.environ.get("MESHTAPE_TRANSPORT", "")


def common_device(sites: Sequence[Site], wanted: str | None) -> str:
    """"gpu" if every worker has one; MeshError if GPUs were asked for and one has none."""
    without = [site for site in sites if not site.gpu]
    if without and wanted == "gpu":
        raise MeshError(f'devices="gpu", but on {without[0].host} {without[0].no_gpu}; install the extra '
                        "meshtape[cuda12] or meshtape[cuda13] on every node")
    return "cpu" if without else "gpu"


def places(sites: Sequence[Site], device: str) -> list[Place]:
    """Names for messages; a hostname that several Ray nodes share gets the start of the node's id."""
    nodes = Counter(host for host, _ in {(site.host, site.node_id) for site in sites})
    return [Place(rank, site.host if nodes[site.host] == 1 else f"{site.host}:{site.node_id[:6]}", site.pid,
                  f"gpu{site.gpu_index}" if device == "gpu" else "cpu") for rank, site in enumerate(sites)]
