"""Starting and ending the mesh that the program's tensors live on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from meshtape.runtime.errors import MeshError
from meshtape.scheduler import current
from meshtape.scheduler.session import Session


class MeshHandle:
    """What init() returns: the mesh's axes and ranks, and a context manager that shuts it down."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def size(self) -> int:
        """Number of workers."""
        return self._session.mesh.size

    @property
    def axes(self) -> dict[str, int]:
        """Extent of every mesh axis by name."""
        return dict(zip(self._session.axes.names, self._session.axes.shape, strict=True))

    @property
    def backend(self) -> str:
        """"inline", "threads" or "ray"."""
        return self._session.mesh.kind

    @property
    def nodes(self) -> list[str]:
        """The machine of every rank."""
        return list(self._session.mesh.nodes)

    @property
    def devices(self) -> list[str]:
        """The device of every rank."""
        return list(self._session.mesh.devices)

    def shutdown(self) -> None:
        """End this mesh's workers; its tensors cannot be used any more. May be called again."""
        if current.active is self._session:
            current.use(None)
        self._session.close()

    def __enter__(self) -> MeshHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        axes = ", ".join(f"{k}={v}" for k, v in self.axes.items())
        state = " (shut down)" if self._session.closed else ""
        return f"<mesh {axes}: {self.size} workers, {self.backend}{state}>"


def init(workers: int | None = None, *, backend: str | None = None, mesh: Mapping[str, int] | None = None,
         address: str | None = None, devices: str | None = None, gpus_per_worker: float = 1.0,
         memory_fraction: float | None = None, threads_per_worker: int | None = None,
         heartbeat_timeout: float = 4.0, channel: str = "socket", timeout: float = 300.0) -> MeshHandle:
    """Start the workers that hold this program's tensors, and make them the current mesh.

    init() or no call at all: one worker inside this process. init(workers=N): N Ray actors, on a Ray started
    here unless `address` names a cluster ("auto", "host:port"). init(workers=N, backend="local"): N threads.
    `mesh` names the axes, e.g. {"data": 4, "model": 2}; default {"data": N}. devices="gpu": workers compute
    on GPUs, one each; Ray actors do so by themselves where there are enough. The other options are those of
    meshtape.cluster.launch.make_mesh. Raises MeshError: too few slots, no cluster at the address, no GPU, or
    already initialised; then everything is as it was.
    """
    from meshtape.cluster.launch import make_mesh
    old = current.active
    if old is not None and (old.closed or old.mesh.closed):
        old.close()
        current.use(None)
        old = None
    if old is not None and old.mesh.kind != "inline":
        raise MeshError(
            f"init(): a mesh of {old.mesh.size} workers is running; call meshtape.shutdown() first"
        )
    made = make_mesh(
        workers,
        backend=backend,
        mesh=None if mesh is None else dict(mesh),
        address=address,
        devices=devices,
        gpus_per_worker=gpus_per_worker,
        memory_fraction=memory_fraction,
        threads_per_worker=threads_per_worker,
        heartbeat_timeout=heartbeat_timeout,
        channel=channel,
        timeout=timeout,
    )
    if old is not None:
        if old.stats.batches or old.body:
            warnings.warn("init(): tensors made before init() stay with the worker in this process and "
                          "cannot be used with the new mesh", stacklevel=2)
        old.close()
    return MeshHandle(current.use(Session(made)))


def shutdown() -> None:
    """End the current mesh, if there is one. Its tensors cannot be used any more."""
    session = current.active
    if session is not None:
        current.use(None)
        session.close()


def current_mesh() -> MeshHandle:
    """The mesh in use; one worker inside this process if init() was not called."""
    return MeshHandle(current.session())


def flush() -> None:
    """Send what is pending to the workers, without waiting for it."""
    current.session().flush()


def synchronize() -> None:
    """Wait until the workers have done everything; raises what went wrong there."""
    current.session().wait()


def device_count() -> int:
    """How many GPUs this process can use; 0 without CuPy or without a driver. Takes none of them."""
    from meshtape.runtime.gpu import device_count as count
    return count()


def doctor(workers: int = 0) -> bool:
    """Print what this machine offers to meshtape (Python, Ray, GPUs and their links, CUDA libraries), what is
    wrong with it, and how to fix that; with `workers`, also start so many Ray workers and end them. True if
    nothing is wrong.

    The same as `meshtape doctor` on the command line.
    """
    from meshtape.cluster.doctor import report
    return report(workers) == 0


def manual_seed(seed: int) -> None:
    """Start the stream of random numbers again at `seed`: same seed, same program, same numbers on any mesh.
    """
    session = current.session()
    session.seed = int(seed) & 0xFFFFFFFFFFFFFFFF
    session.draws = 0
