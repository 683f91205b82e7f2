"""What a session sends, seen at its mesh, and what its workers hold."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import meshtape as mt
from meshtape.cluster.local import InlineMesh, ThreadMesh
from meshtape.runtime.protocol import Program, Run
from meshtape.runtime.worker import Worker
from meshtape.scheduler import current
from meshtape.scheduler.session import Session


class Batch(NamedTuple):
    """One batch as rank 0 got it. `fresh` says whether its program travelled with it."""

    program: Program | None
    fresh: bool
    ids: list[int]
    n_feeds: int
    n_fetches: int
    frees: list[int]

    @property
    def moves(self) -> list[tuple[Any, ...]]:
        """(placements before, after) of every move; (combine, axis) of every bucket of reductions."""
        found: list[tuple[Any, ...]] = []
        for number, _, _ in self.program.steps if self.program else ():
            instr = self.program.instrs[number]  # type: ignore[union-attr]
            if instr.op == "redistribute":
                found.append((instr.attrs[0][0], instr.attrs[0][-1]))
            elif instr.op.endswith("_bucket"):
                axis, combine = instr.attrs[:2]
                found.append((combine or "gather", axis))
        return found


class Spy:
    """Notes every batch that `session` sends from now on."""

    def __init__(self, session: Session) -> None:
        self.batches: list[Batch] = []
        self.most_in_flight = 0
        self._inflight = session.inflight
        self._mesh = session.mesh
        self._programs: dict[bytes, Program] = {}
        self._send = session.mesh.send
        vars(session.mesh).update(send=self.send)

    def send(self, runs: Sequence[Run]) -> None:
        run = runs[0]
        if run.program is not None:
            self._programs[run.digest] = run.program
        self.batches.append(Batch(self._programs.get(run.digest), run.program is not None, list(run.ids),
                                  len(run.feeds), len(run.fetch), list(run.frees)))
        self.most_in_flight = max(self.most_in_flight, len(self._inflight.sent))
        self._send(runs)

    def take(self) -> list[Batch]:
        """The batches noted since the last call."""
        taken, self.batches = self.batches, []
        return taken


@contextmanager
def watched(workers: int) -> Iterator[tuple[Session, list[Worker]]]:
    """A session on threads of this process (for 1: in this thread), and the workers themselves."""
    made: list[Worker] = []

    def make(*args: Any) -> Worker:
        made.append(Worker(*args))
        return made[-1]

    mt.shutdown()
    mesh = InlineMesh(worker=make) if workers == 1 else ThreadMesh(workers, worker=make)
    session = current.use(Session(mesh))
    try:
        yield session, made
    finally:
        mt.shutdown()


def blocks(session: Session, workers: list[Worker]) -> list[int]:
    """How many blocks each worker holds, once everything that was let go has been freed."""
    gc.collect()
    session.wait()
    return [len(w.blocks) for w in sorted(workers, key=lambda w: w.rank)]
