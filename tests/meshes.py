"""Meshes for tests: the current session on one inline worker or on threads of this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import meshtape as mt
from meshtape.scheduler import current
from meshtape.scheduler.session import Session

MESHES: dict[str, dict[str, int]] = {
    "2": {"data": 2}, "3": {"data": 3}, "4": {"data": 4}, "2x2": {"data": 2, "model": 2},
    "3x2": {"data": 3, "model": 2},
}


@contextmanager
def on(axes: dict[str, int] | int) -> Iterator[Session]:
    """A fresh mesh of threads (one inline worker for 1), shut down afterwards."""
    mt.shutdown()
    axes = {"data": axes} if isinstance(axes, int) else axes
    size = 1
    for n in axes.values():
        size *= n
    if size > 1:
        mt.init(workers=size, backend="local", mesh=axes)
    try:
        yield current.session()
    finally:
        mt.shutdown()
