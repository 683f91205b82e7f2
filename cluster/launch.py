"""Choosing and starting the mesh that a program asks for, and ending it with the program."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from functools import partial
from math import ceil, prod

from meshtape.cluster.local import InlineMesh, ThreadMesh
from meshtape.cluster.mesh import Mesh, fraction_for
from meshtape.runtime.errors import MeshError
from meshtape.runtime.gpu import device_count, gpu_here, open_device

BACKENDS = (None, "local", "ray")
DEVICES = (None, "cpu", "gpu")
WORKERS, ADDRESS, BACKEND, MESH = (f"MESHTAPE_{name}" for name in ("WORKERS", "ADDRESS", "BACKEND", "MESH"))

# Meshes to close when the interpreter exits.
_open: set[Mesh] = set()


def make_mesh(workers: int | None = None, *, backend: str | None = None,
              mesh: Mapping[str, int] | None = None, address: str | None = None, devices: str | None = None,
              gpus_per_worker: float = 1.0, memory_fraction: float | None = None,
              threads_per_worker: int | None = None, heartbeat_timeout: float = 4.0, channel: str = "socket",
              timeout: float = 300.0) -> Mesh:
    """One worker in this process; `workers` threads of it (backend="local"); or Ray actors.

    mesh: extents of named axes, whose product is `workers`; {"data": workers} unless given.
    address: a Ray cluster to join ("auto", "host:port", "ray://host:port"); None starts one here.
    devices: "cpu" or "gpu"; None takes GPUs where every Ray worker can have one, and none in this process.
        Threads take the GPUs of this process in turn.
    gpus_per_worker: less than 1 lets Ray workers share a GPU: two at 0.5.
    memory_fraction: of its GPU's memory, the most that a worker's pool holds, in (0, 1]. None: all that there
        is for a worker with a GPU of its own, an equal share of nine tenths for those that share one.
    threads_per_worker: of the BLAS; None shares the cores among Ray workers, and is 1 for backend="local".
    heartbeat_timeout: seconds of silence after which a Ray worker counts as lost.
    channel: "socket", or "ray" where the workers' ports are closed to this process.
    timeout: seconds that a collective waits for its peers.

    If none of workers, backend and address are given, the environment variables MESHTAPE_WORKERS,
    MESHTAPE_BACKEND, MESHTAPE_ADDRESS and MESHTAPE_MESH ("data=4,model=2") stand in. Raises MeshError.
    """
    if workers is None and backend is None and address is None:
        workers, backend, address, mesh = from_environment(mesh)
    if backend not in BACKENDS or (backend == "local" and address is not None):
        raise MeshError(f'backend={backend!r}, address={address!r}: use backend="local" for threads of this '
                        'process, or backend="ray" with or without an address')
    if workers is None and mesh is not None:
        workers = prod(mesh.values())
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise MeshError(f"workers={workers!r}: needed a whole number of at least 1")
    check_devices(devices, gpus_per_worker, memory_fraction)
    _close_lost()
    made: Mesh
    inline = workers is None and backend is None and address is None
    gpus = count_gpus() if devices == "gpu" and (inline or backend == "local") else 0
    if backend == "local":
        workers = workers or gpus or os.cpu_count() or 1
        sharers = ceil(workers / gpus) if gpus else 1
        share = fraction_for(memory_fraction, 1 / sharers)
        made = ThreadMesh(workers, mesh, timeout, blas_threads=threads_per_worker, gpus=gpus,
                          open_device=partial(open_device, memory_fraction=share) if gpus else None)
    elif inline:
        made = InlineMesh(open_device=partial(open_device, memory_fraction=memory_fraction) if gpus else None)
    else:
        from meshtape.cluster import ray_mesh  # here, since it imports ray

        made = ray_mesh.start(workers, mesh, address=address, devices=devices, channel=channel,
                              gpus_per_worker=gpus_per_worker, memory_fraction=memory_fraction,
                              threads_per_worker=threads_per_worker, heartbeat_timeout=heartbeat_timeout,
                              timeout=timeout)
    _close_at_exit(made)
    return made


def check_devices(devices: str | None, gpus_per_worker: float, memory_fraction: float | None) -> None:
    """MeshError unless these can be what make_mesh says."""
    if devices not in DEVICES:
        raise MeshError(f'devices={devices!r}: use "cpu", "gpu", or None')
    for name, value in (("gpus_per_worker", gpus_per_worker), ("memory_fraction", memory_fraction)):
        if value is None and name == "memory_fraction":
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
            raise MeshError(f"{name}={value!r}: needed a number above 0, at most 1")


def count_gpus() -> int:
    """The GPUs of this process; MeshError if there is none."""
    _, reason = gpu_here()
    if reason:
        raise MeshError(f'devices="gpu": {reason}; run `meshtape doctor` for what to install')
    return device_count()


def from_environment(mesh: Mapping[str, int] | None) -> tuple[int | None, str | None, str | None,
                                                              Mapping[str, int] | None]:
    """workers, backend, address and mesh as `meshtape run` passes them on; a given `mesh` wins."""
    text = os.environ.get(WORKERS, "")
    if text and not text.isdigit():
        raise MeshError(f"{WORKERS}={text!r}: needed a whole number")
    if mesh is None and os.environ.get(MESH):
        mesh = parse_axes(os.environ[MESH])
    return int(text) if text else None, os.environ.get(BACKEND) or None, os.environ.get(ADDRESS) or None, mesh


def parse_axes(text: str) -> dict[str, int]:
    """{"data": 4, "model": 2} from "data=4,model=2"; raises MeshError."""
    axes = {}
    for part in text.split(","):
        name, _, extent = part.partition("=")
        if not extent.strip().isdigit():
            raise MeshError(f'mesh {text!r}: write axes as "data=4,model=2"')
        axes[name.strip()] = int(extent)
    return axes


def _close_lost() -> None:
    """Give back what meshes that lost a worker still hold, such as the Ray that was started for them."""
    for mesh in [mesh for mesh in _open if mesh.closed]:
        mesh.close()
        _open.discard(mesh)


def _close_at_exit(mesh: Mesh) -> None:
    _open.add(mesh)
    # Registered anew, to run before what `import ray` has registered: that ends Ray with all its noise.
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def _close_all() -> None:
    while _open:
        _open.pop().close()
