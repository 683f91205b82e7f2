"""Every exception that meshtape raises on purpose. A message says what was given, what was needed, what to
do.
"""

from __future__ import annotations


class MeshtapeError(Exception):
    """Root of all errors raised on purpose."""


class ShapeError(MeshtapeError, ValueError):
    """Shapes, axes or indices do not fit an operation."""


class DTypeError(MeshtapeError, TypeError):
    """A dtype is unknown, or an operation does not take it."""


class LayoutError(MeshtapeError, ValueError):
    """A layout names a mesh axis or a dimension that does not exist, or cannot hold the tensor."""


class GradError(MeshtapeError, RuntimeError):
    """A rule of the tape is broken: backward twice, backward on a non-scalar, in-place on a leaf."""


class StateError(MeshtapeError, ValueError):
    """A checkpoint or state dict does not fit the model."""


class MeshError(MeshtapeError, RuntimeError):
    """The mesh of workers cannot be made, reached or used."""


class SessionClosed(MeshError):
    """A tensor was used after the mesh that holds it was shut down."""


class WorkerLost(MeshError):
    """A worker process died, was stopped, or no longer answers."""

    def __init__(self, message: str, rank: int = -1, node: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.node = node


class WorkerError(MeshtapeError, RuntimeError):
    """A kernel failed on a worker; the message names op, shapes, layouts, rank and the user's line."""


class CommError(MeshError):
    """A collective failed."""


class CommTimeout(CommError):
    """A collective did not finish before its deadline."""


class CommAborted(CommError):
    """A collective was aborted on purpose."""


class PeerLost(CommError):
    """A peer of a collective died."""
