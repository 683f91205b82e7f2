"""The connection to Ray: one started here, one joined at an address, or the one the user has made."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import ray

from meshtape.runtime.errors import MeshError

# Where `ray start` notes the address that "auto" means.
CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")
# The smallest object store Ray accepts, near enough: tensors never go there.
OBJECT_STORE_BYTES = 80 * 2**20
REACH_SECONDS = 3.0
# For a Ray that is started here. Its workers are what the machine is for, so they need not yield to all else
# (niceness 15 by default). Workers that it starts in advance lack the environment that ours need, and compete
# with ours for the processor: without them a mesh of 2 is up about a second earlier on 2 cores.
SETTINGS = {"RAY_worker_niceness": "0", "RAY_prestart_worker_first_driver": "0"}
# A directory younger than this may be about to be locked.
SWEEP_AFTER_SECONDS = 60.0


class RayConnection:
    """`started`: this Ray runs for us alone and ends with us. `joined`: we connected and will disconnect."""

    def __init__(self, started: bool, joined: bool, directory: Directory | None = None) -> None:
        self.started = started
        self.joined = joined
        self._directory = directory

    def close(self) -> None:
        """Undo what connect() did, and no more."""
        if (self.started or self.joined) and ray.is_initialized():
            ray.shutdown()
        if self._directory is not None:
            self._directory.remove()
            self._directory = None


class Directory:
    """Where a Ray started here keeps its sockets and logs: apart, so that "auto" finds the user's clusters.

    Not under TMPDIR, which may be too deep for the 107 characters of a Unix socket's path. It is locked while
    its driver lives; those that killed drivers left behind go when the next one starts.
    """

    def __init__(self, parent: str = "/tmp") -> None:
        for old in Path(parent).glob("meshtape-*/lock"):
            sweep(old)
        self.path = tempfile.mkdtemp(prefix="meshtape-", dir=parent)
        self._lock = open(Path(self.path, "lock"), "w")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)        # Ray's log writers may still hold files
        self._lock.close()


def sweep(lock: Path) -> None:
    """Remove the directory of `lock` if it is old, ours, and its driver is gone."""
    with suppress(OSError):
        if lock.stat().st_uid == os.getuid() and time.time() - lock.stat().st_mtime > SWEEP_AFTER_SECONDS:
            with open(lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # BlockingIOError if the driver lives
                shutil.rmtree(lock.parent, ignore_errors=True)


def connect(address: str | None, workers: int = 0) -> RayConnection:
    """Use the Ray this process is connected to, start one (address None), or join the one at `address`.

    One that is started here gets a slot for each of `workers`, even if the cores are fewer. Raises MeshError
    within seconds if there is nothing at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        _check_same(address)
        return RayConnection(started=False, joined=False)
    return _start(workers) if address in (None, "local") else _join(str(address))


def _start(workers: int) -> RayConnection:
    directory = Directory()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    slots = workers if workers > len(os.sched_getaffinity(0)) else None     # None: what Ray counts
    try:
        with interrupts_deferred():
            ray.init(address="local", num_cpus=slots, object_store_memory=OBJECT_STORE_BYTES,
                     _temp_dir=directory.path, include_dashboard=False, log_to_driver=False,
                     logging_level=logging.ERROR)
    except BaseException:
        RayConnection(started=True, joined=False, directory=directory).close()
        raise
    return RayConnection(started=True, joined=False, directory=directory)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """A first Ctrl-C takes effect when the block is done, a second at once.

    A ray.init() that is interrupted half-way leaves processes that ray.shutdown() does not know of.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.getsignal(signal.SIGINT)
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if noted:
        signal.raise_signal(signal.SIGINT)


def _join(address: str) -> RayConnection:
    target = resolve(address)
    if target:
        check_reachable(address, target)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        raise MeshError(f"address={address!r}: Ray cannot be joined ({first_line(error)}); start one with "
                        "`ray start --head`, or leave address out to start one here") from error
    return RayConnection(started=False, joined=True)


def resolve(address: str) -> str:
    """The host:port that an address means, "" if only Ray can tell."""
    if address != "auto":
        return address
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    return CURRENT_CLUSTER.read_text().strip() if CURRENT_CLUSTER.exists() else ""


def check_reachable(address: str, target: str) -> None:
    """MeshError unless something listens at `target`: Ray itself would retry for two minutes."""
    host, _, port = target.removeprefix("ray://").rpartition(":")
    if not host:
        host, port = port, "10001" if target.startswith("ray://") else "6379"
    meaning = "" if target.endswith(address) else f" (which means {target})"
    if not port.isdigit():
        raise MeshError(f"address={address!r}{meaning}: give host:port, ray://host:port or \"auto\"")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise MeshError(f"address={address!r}{meaning}: no Ray head answers there ({error}); start one with "
                        "`ray start --head`, or leave address out to start one here") from error


def _check_same(address: str | None) -> None:
    """MeshError if this process is connected to another Ray than the one asked for."""
    if address in (None, "auto", "local") or str(address).startswith("ray://"):
        return
    here = ray.get_runtime_context().gcs_address
    host, _, port = str(address).rpartition(":")
    try:
        same = here == f"{socket.gethostbyname(host)}:{port}"
    except OSError:
        same = False
    if not same and here != address:
        raise MeshError(f"address={address!r}, but this process is already connected to the Ray at {here}; "
                        "call ray.shutdown() first, or leave address out to use that one")


def first_line(error: BaseException) -> str:
    """An error in one line; Ray's run over many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
