"""The one current session. Without init() it is a single worker inside this process."""

from __future__ import annotations

from meshtape.cluster.local import InlineMesh
from meshtape.scheduler.session import Session

active: Session | None = None
precision = "highest"       # of products of float32, in all sessions of this program


def session() -> Session:
    """The current session; starts one in this process if there is none."""
    return active or use(Session(InlineMesh()))


def set_precision(wanted: str) -> None:
    """Compute products of float32 that are recorded from now on so, in this session and in later ones."""
    global precision
    if active is not None and not active.closed:
        active.flush()
        active.precision = wanted
    precision = wanted


def use(new: Session | None) -> Session:
    """Make `new` the current session (None: there is none)."""
    global active
    active = new
    if new is not None:
        new.precision = precision
    return new  # type: ignore[return-value]
