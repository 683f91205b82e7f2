"""Batches under way: replies taken in, failures traced to what they spoil, fetched values put together."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np

from meshtape.cluster.mesh import Mesh
from meshtape.runtime.errors import WorkerError
from meshtape.runtime.protocol import Failure, Fetch, Reply, TensorType
from meshtape.runtime.shards import REPLICATE, Placements, coordinate, is_partial, piece
from meshtape.scheduler.body import Body
from meshtape.scheduler.sites import Site, site_text
from meshtape.scheduler.trace import Tracer

COMBINE = {"sum": np.add, "max": np.maximum, "min": np.minimum}


class Sent(NamedTuple):
    """A batch under way, with what is needed to read its replies."""

    body: Body | None
    ids: list[int]
    sites: list[Site]
    fetch: list[Fetch]
    frees: list[int]
    replies: list[Reply]


class Inflight:
    """What was sent to a mesh and not yet answered, and what the answers said."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.shape = tuple(mesh.shape)
        self.coords = [coordinate(r, mesh.shape) for r in range(mesh.size)]
        self.sent: dict[int, Sent] = {}
        self.answered = 0                   # all ranks have run the batches up to this one
        self._ran = [0] * mesh.size         # and each rank those up to this one
        self.values: dict[int, Any] = {}            # by id: fetched values that nobody has asked for yet
        self.poisoned: dict[int, WorkerError] = {}
        self.errors: list[WorkerError] = []
        # Values that come though nobody asked this time: who foresaw it, as a body and its slot.
        self.unread: dict[int, tuple[Body, int]] = {}
        self._unwanted: set[int] = set()
        self.peaks = [0] * mesh.size        # bytes, by rank
        self.traffic: list[Sequence[tuple[int, int]]] = [()] * mesh.size    # (calls, bytes) by rank and axis
        self.graphs: list[Sequence[Any]] = [()] * mesh.size     # (captured, replays, reasons) by rank
        self.tracer: Tracer | None = None

    def add(self, batch: int, sent: Sent) -> None:
        """Note a batch that is about to be sent.

        A value that came unasked, and whose tensor goes without anyone having looked, is not sent for again.
        """
        coming = {f.id for s in self.sent.values() for f in s.fetch}
        for name in sent.frees if coming or self.values or self.unread else ():
            guess = self.unread.pop(name, None)
            if guess is not None:
                guess[0].asked.discard(guess[1])
            if name in coming:
                self._unwanted.add(name)
            else:
                self.values.pop(name, None)
        self.sent[batch] = sent

    def take(self, name: int) -> Any:
        """The fetched value of an id."""
        self.unread.pop(name, None)
        return self.values.pop(name)

    def expected(self, name: int) -> int | None:
        """The batch whose reply will bring (or brought) the value of an id, if one does."""
        if name in self.values:
            return self.answered
        return next((b for b, s in self.sent.items() if any(f.id == name for f in s.fetch)), None)

    def collect(self) -> None:
        """Take in one reply."""
        start = perf_counter_ns() if self.tracer is not None else 0
        reply = self.mesh.collect(None)
        if reply is None:
            return
        self.peaks[reply.rank] = reply.peak
        self.traffic[reply.rank] = reply.traffic
        self.graphs[reply.rank] = reply.graphs
        if self.tracer is not None:
            self.tracer.driver("wait", start)
            self.tracer.replied(reply)
        rank = reply.rank
        for batch in range(self._ran[rank] + 1, reply.batch):
            self._ran_by(Reply(rank, batch, [], []))        # nothing was asked for, and nothing failed
        self._ran_by(reply)

    def _ran_by(self, reply: Reply) -> None:
        """One rank has run one batch."""
        self._ran[reply.rank] = reply.batch
        sent = self.sent[reply.batch]
        sent.replies.append(reply)
        if len(sent.replies) == self.mesh.size:
            self.answered = reply.batch
            del self.sent[reply.batch]
            self._settle(sent)
            for k, fetch in enumerate(sent.fetch):
                if fetch.id in self._unwanted:
                    self._unwanted.discard(fetch.id)
                elif fetch.id not in self.poisoned:
                    self.values[fetch.id] = self._assembled(k, fetch.type, sent.replies)

    def wait_for(self, batch: int) -> None:
        """Until a batch is answered; raises the first failure that came in since the last wait."""
        while self.answered < batch:
            self.collect()
        if self.errors:
            first = self.errors[0]
            self.errors.clear()
            raise first

    # --- values -------------------------------------------------------------------------------------

    def _assembled(self, k: int, kind: TensorType, replies: Sequence[Reply]) -> np.ndarray[Any, Any]:
        """A fetched tensor from its slices; addends of a Partial one are combined in rank order."""
        values = sorted((r.rank, r.values[k]) for r in replies if r.values[k] is not None)
        if len(values) == 1:
            only: np.ndarray[Any, Any] = values[0][1]
            return only
        whole: np.ndarray[Any, Any] = np.empty(kind.shape, values[0][1].dtype)
        out: Any = whole
        combine = next((COMBINE[p] for p in kind.placements if isinstance(p, str)), None)
        for rank, value in values:
            mine = piece(kind.shape, kind.placements, self.shape, self.coords[rank])
            here = out[..., *mine.slices]
            if mine.addend or combine is None:
                here[...] = value
            else:
                combine(here, value, out=here)
        return whole

    # --- failures -----------------------------------------------------------------------------------

    def _settle(self, sent: Sent) -> None:
        """All ranks answered a batch: note its failures and everything that they spoil."""
        body = sent.body
        for name in sent.frees if self.poisoned else ():
            self.poisoned.pop(name, None)
        failures = [f for r in sent.replies for f in r.failures]
        if body is None or (not failures and not self.poisoned):
            return
        bad = {s: self.poisoned[sent.ids[s]] for s in body.external if sent.ids[s] in self.poisoned}
        first: dict[int, Failure] = {}
        for f in sorted(failures, key=lambda f: (f.step, f.kind == "CommError", f.rank)):
            first.setdefault(f.step, f)
        made: dict[int, WorkerError] = {}
        for at, (_, ins, outs) in enumerate(body.program.steps):
            error = next((bad[s] for s in ins if s in bad), None)
            if at in first and error is None:
                error = made[at] = explain(first[at], sent)
            if error is not None:
                bad.update(dict.fromkeys(outs, error))
        if made:
            self.errors.append(made[min(made)])
        dead = set(body.program.dead)
        for slot, error in bad.items():
            if slot in dead:
                self.poisoned.pop(sent.ids[slot], None)
            else:
                self.poisoned[sent.ids[slot]] = error


def explain(failure: Failure, sent: Sent) -> WorkerError:
    """A worker's failure in the user's terms: op, shapes, layouts, rank, and the line that called it."""
    assert sent.body is not None
    instr = sent.body.program.instrs[sent.body.program.steps[failure.step][0]]
    shapes = ", ".join("scalar" if t is None else f"{t.shape} {t.dtype} {placements_text(t.placements)}"
                       for t in instr.ins)
    where = site_text(sent.sites[sent.body.origin[failure.step]])
    return WorkerError(f"{instr.op}({shapes}) failed on rank {failure.rank}: {failure.kind}: "
                       f"{failure.message} ({where})")


def placements_text(placements: Placements) -> str:
    """Short: S0 for Shard(0), R for Replicate, P(sum) for Partial; one per mesh axis."""
    return "[" + ",".join(f"P({p})" if is_partial(p) else "R" if p == REPLICATE else f"S{p}"
                          for p in placements) + "]"
