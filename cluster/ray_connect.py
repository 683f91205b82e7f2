"""The connection to Ray: one started here, one joined at an address, or the one the user has made."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path

import ray

from meshtape.runtime.errors import MeshError

# Where `ray start` notes the address that "auto" means.
CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")
# The smallest object store Ray accepts, near enough: tensors never go there.
OBJECT_STORE_BYTES = 80 * 2**20
REACH_SECONDS = 3.0


class RayConnection:
    """`started`: this Ray runs for us alone and ends with us. `joined`: we connected and will disconnect."""

    def __init__(self, started: bool, joined: bool, directory: str = "") -> None:
        self.started = started
        self.joined = joined
        self._directory = directory

    def close(self) -> None:
        """Undo what connect() did, and no more."""
        if (self.started or self.joined) and ray.is_initialized():
            ray.shutdown()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)      # its log writers may still hold files
            self._directory = ""


def connect(address: str | None) -> RayConnection:
    """Use the Ray this process is connected to, start one (address None), or join the one at `address`.

    Raises MeshError within seconds if there is nothing at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        _check_same(address)
        return RayConnection(started=False, joined=False)
    return _start() if address in (None, "local") else _join(str(address))


def _start() -> RayConnection:
    # A directory of its own keeps "auto" pointing at the user's clusters; it goes when this Ray goes. Not
    # under TMPDIR, which may be too deep for the 107 characters of a Unix socket's path.
    directory = tempfile.mkdtemp(prefix="meshtape-", dir="/tmp")
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                 object_store_memory=OBJECT_STORE_BYTES, _temp_dir=directory)
    except BaseException:
        RayConnection(started=True, joined=False, directory=directory).close()
        raise
    return RayConnection(started=True, joined=False, directory=directory)


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
