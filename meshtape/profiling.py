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
    each kernel, and each collective with the bytes it sends. Collectives that run beside kernels have a row
    of their own, and the kernels' row shows how long they are waited for. Workers run step by step while they
    are traced, so a step takes a little longer than otherwise. Open the file at ui.perfetto.dev or
    chrome://tracing. Raises MeshtapeError if a profile is being taken already.
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
    workers, and per worker `peak_memory`, the most bytes its process ever held. `links` tells, per mesh axis,
    the `kind` of its communicators, how many `collectives` each worker has taken part in, and the
    `bytes_sent` by each to others in them. With GPU workers, `graphs` tells per worker how many programs are
    `captured` as CUDA graphs, how many `replays` there were, and for which `reasons` others are not captured,
    and `peak_memory` is that of the device. Waits for what was sent.
    """
    session = current.session()
    session.wait()
    along = {name: [t[axis] for t in session.inflight.traffic if t]
             for axis, name in enumerate(session.mesh.names)}
    counts = session.stats
    graphs = [dict(zip(("captured", "replays", "reasons"), found, strict=True))
              for found in session.inflight.graphs if found]
    return {"ops": counts.recorded + len(session.sites), "batches": counts.batches,
            "digest_hits": counts.digest_hits, "messages": counts.messages,
            "peak_memory": list(session.inflight.peaks),
            "links": {name: {"kind": kind, "collectives": [calls for calls, _ in along[name]],
                             "bytes_sent": [sent for _, sent in along[name]]}
                      for name, kind in zip(session.mesh.names, session.mesh.links, strict=True)},
            **({"graphs": graphs} if graphs else {})}


__all__ = ["profile", "stats"]
