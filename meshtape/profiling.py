"""Measuring a program from inside: a timeline, and counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meshtape.runtime.errors import MeshtapeError
from meshtape.scheduler import current
from meshtape.scheduler.trace import Tracer

CLOCK_SAMPLES = 5


@contextmanager
def profile(path: str | Path) -> Iterator[None]:
    """Write what driver and workers do inside to `path`, on one clock, as a Chrome/Perfetto trace (JSON).

    The driver shows recording, flushes (with bytes fed) and waits; every worker its batches, compilation,
    each kernel and each collective. Workers run step by step while they are traced, so a step takes a little
    longer than otherwise. Open the file at ui.perfetto.dev or chrome://tracing. Raises MeshtapeError if a
    profile is being taken already.
    """
    from meshtape.creation import zeros
    session = current.session()
    if session.tracer is not None:
        raise MeshtapeError("profile(): one is being taken already; end it first")
    session.wait()
    tracer = Tracer(session.mesh.nodes, session.mesh.devices)
    session.trace(tracer)
    try:
        for _ in range(CLOCK_SAMPLES):      # short round trips, from which the clocks' offsets follow
            zeros(1).item()
        tracer.spans.clear()
        yield
        session.wait()
    finally:
        session.trace(None)
        tracer.write(path)


def stats() -> dict[str, Any]:
    """Counts since the current mesh was made.

    `ops` recorded, `batches` sent, `digest_hits` (batches that workers knew already), `messages` sent to
    workers, and per worker `peak_memory`, the most bytes its process held when it last answered.
    """
    session = current.session()
    counts = session.stats
    return {"ops": counts.recorded + len(session.sites), "batches": counts.batches,
            "digest_hits": counts.digest_hits, "messages": counts.messages,
            "peak_memory": list(session.inflight.peaks)}


__all__ = ["profile", "stats"]
