"""A mesh of workers, as the driver sees it: batches go out, replies come back, a lost worker is an error.

Only the scheduler's session talks to a mesh. Which process or thread a rank lives in, and how a message gets
there, is the business of the class behind this interface.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from types import TracebackType
from typing import Any

import numpy as np

from meshtape.runtime.errors import MeshError, SessionClosed
from meshtape.runtime.protocol import Reply, Run
from meshtape.runtime.shards import Shape

# Kinds of communicators, the fastest first.
SLOWNESS = ("self", "nccl", "shm", "threads", "staged+shm", "staged+threads", "tcp", "staged+tcp")
# Of a GPU that several workers share, the part that they may fill together: each also has a CUDA context.
SHARED_MEMORY = 0.9


class Mesh(ABC):
    """`size` workers laid out on named axes; rank r sits at shards.coordinate(r, shape).

    `nodes` and `devices` name, per rank, the machine ("this process", a hostname) and the device ("cpu",
    "gpu0") for messages and pictures. `links` gives, per mesh axis, the kind of the communicators along it
    ("self", "threads", "shm", "tcp", "nccl", "staged+shm"; the slowest if they differ), for the cost model.
    `reasons` says, per mesh axis, why it is this kind, "" where nothing was to be chosen.
    """

    kind: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    nodes: list[str]
    devices: list[str]
    links: list[str]
    reasons: list[str]

    def __init__(self, names: tuple[str, ...], shape: tuple[int, ...], nodes: list[str], devices: list[str],
                 links: list[str]) -> None:
        self.names = names
        self.shape = shape
        self.nodes = nodes
        self.devices = devices
        self.links = links
        self.reasons = [""] * len(names)
        self._closed_because = ""

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def closed(self) -> bool:
        """True after close(), or after a worker was lost."""
        return bool(self._closed_because)

    @abstractmethod
    def send(self, runs: Sequence[Run]) -> None:
        """Send runs[r] to rank r and return without waiting for results.

        The runs are one batch and differ only in `feeds`, whose arrays may be reused once send() returns on a
        mesh of processes, and must stay unchanged until the batch is answered on the others. Raises
        WorkerLost, or SessionClosed after close().
        """

    def room(self, shape: Shape, dtype: np.dtype[Any]) -> np.ndarray[Any, Any] | None:
        """A fresh C-contiguous array, not initialised, in memory that workers read without a copy, to be fed
        to them; None where there is none (then any array will do). May be called from any thread.
        """
        return None

    @abstractmethod
    def collect(self, timeout: float | None = None) -> Reply | None:
        """The next reply of any rank, or None after `timeout` seconds (None: wait for ever).

        Each rank answers its runs in order, those that ask for it and those that failed. Raises WorkerLost if
        a worker died, was stopped or broke, after which the mesh is closed; SessionClosed after close().
        """

    @abstractmethod
    def close(self) -> None:
        """End every worker; leave no thread, process or file behind. May be called again."""

    def _check_open(self) -> None:
        if self._closed_because:
            raise SessionClosed(f"the mesh of {self.size} workers is closed: {self._closed_because}; "
                                "call init() to make a new one")

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}={n}" for name, n in zip(self.names, self.shape, strict=True))
        return f"<mesh {axes}; {self.kind}, {self.size} workers on {len(set(self.nodes))} nodes>"


def slowest_links(kinds: Sequence[Sequence[str]]) -> list[str]:
    """Per mesh axis, the slowest kind of communicator that any rank has; kinds[rank][axis]."""
    return [max(along, key=SLOWNESS.index) for along in zip(*kinds, strict=True)]


def fraction_for(given: float | None, gpus_per_worker: float) -> float | None:
    """The part of a GPU's memory that a worker's pool may hold: what was given, its share, or no limit."""
    if given is not None or gpus_per_worker >= 1:
        return given
    return SHARED_MEMORY * gpus_per_worker


def mesh_axes(workers: int, mesh: Mapping[str, int] | None = None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and extents of the mesh axes (one axis "data" unless told); MeshError if they do not fit."""
    if workers < 1:
        raise MeshError(f"workers={workers}: a mesh needs at least 1 worker")
    axes = dict(mesh) if mesh else {"data": workers}
    if any(not name.isidentifier() or extent < 1 for name, extent in axes.items()):
        raise MeshError(f"mesh={axes}: each axis needs a name (an identifier) and an extent of at least 1")
    if prod(axes.values()) != workers:
        raise MeshError(f"mesh={axes} has {prod(axes.values())} places, but there are {workers} workers; "
                        "make the product of the axes equal to workers")
    return tuple(axes), tuple(axes.values())
