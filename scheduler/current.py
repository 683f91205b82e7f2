"""The one current session. Without init() it is a single worker inside this process."""

from __future__ import annotations

from meshtape.cluster.local import InlineMesh
from meshtape.scheduler.session import Session

active: Session | None = None


def session() -> Session:
    """The current session; starts one in this process if there is none."""
    return active or use(Session(InlineMesh()))


def use(new: Session | None) -> Session:
    """Make `new` the current session (None: there is none)."""
    global active
    active = new
    return new  # type: ignore[return-value]
