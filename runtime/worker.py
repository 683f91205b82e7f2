"""The worker: a table of blocks, a cache of compiled programs, and the loop that runs a batch.

The same plain class runs in the driver's thread, in a thread of its own, and inside a Ray actor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import meshtape.runtime.ops  # noqa: F401  fills the op table
from meshtape.runtime.errors import CommError
from meshtape.runtime.memory import keep_pages
from meshtape.runtime.program import Compiled, Site, Step, compile_program, placeholder
from meshtape.runtime.protocol import Failure, Reply, Run
from meshtape.runtime.shards import coordinate, is_owner


class Poison:
    """Stands in the block table for a value that a failed step could not make."""

    __slots__ = ("failure",)

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class Worker:
    """Runs batches for one rank of a mesh, one communicator per mesh axis.

    A kernel that fails makes its outputs, and what is computed from them, Poison; the batch goes on, so that
    the other ranks' collectives find a partner, and the failures travel back in the reply.
    """

    def __init__(self, rank: int, mesh_shape: Sequence[int], communicators: Sequence[Any],
                 device: str = "cpu") -> None:
        keep_pages()
        self.rank = rank
        self.site = Site(np, tuple(mesh_shape), coordinate(rank, mesh_shape), tuple(communicators))
        self.device = device
        self.blocks: dict[int, Any] = {}
        self.programs: dict[bytes, Compiled] = {}
        self.poisoned = 0

    def run(self, run: Run) -> Reply:
        """Run one batch and answer with its failures and the fetched slices this worker owns."""
        blocks = self.blocks
        for name in run.frees:
            if type(blocks.pop(name, None)) is Poison:
                self.poisoned -= 1
        for digest in run.drop:
            self.programs.pop(digest, None)
        if run.program is not None:
            self.programs[run.digest] = compile_program(run.program, self.site)
        failures: list[Failure] = []
        if run.digest:
            with np.errstate(all="ignore"):
                self._execute(self.programs[run.digest], run, failures)
        return Reply(self.rank, run.batch, failures, [self._fetched(f) for f in run.fetch])

    def _execute(self, program: Compiled, run: Run, failures: list[Failure]) -> None:
        blocks, ids, scalars, feeds = self.blocks, run.ids, run.scalars, iter(run.feeds)
        slots: list[Any] = [None] * program.n_slots
        for slot in program.external:
            slots[slot] = blocks[ids[slot]]
        for slot in program.taken:
            if type(blocks.pop(ids[slot])) is Poison:
                self.poisoned -= 1
        for at, step in enumerate(program.steps):
            if step.feed:
                args = [next(feeds)]
            else:
                args = [slots[s] if s >= 0 else scalars[-1 - s] for s in step.ins]
            if (self.poisoned or failures) and any(type(a) is Poison for a in args):
                self._skip(step, args, slots)
            else:
                self._call(step, at, args, slots, run.batch, failures)
            for slot in step.release:
                slots[slot] = None
        for slot in program.kept:
            value = blocks[ids[slot]] = slots[slot]
            if type(value) is Poison:
                self.poisoned += 1

    def _call(self, step: Step, at: int, args: list[Any], slots: list[Any], batch: int,
              failures: list[Failure]) -> None:
        try:
            result = step.call(*args)
            results = result if step.many else (result,)
            for slot, dtype, value in zip(step.outs, step.dtypes, results, strict=True):
                if type(value) is not np.ndarray or value.dtype is not dtype:
                    value = self.site.xp.asarray(value, dtype)
                slots[slot] = value
        except Exception as error:
            # Whatever a kernel raises is the user's to see, at the driver, as a value.
            kind = "CommError" if isinstance(error, CommError) else type(error).__name__
            failure = Failure(batch, at, self.rank, kind, str(error))
            failures.append(failure)
            for slot in step.outs:
                slots[slot] = Poison(failure)

    def _skip(self, step: Step, args: list[Any], slots: list[Any]) -> None:
        """A step with a poisoned input: its outputs are poisoned; a collective still keeps its appointment."""
        poison = next(a for a in args if type(a) is Poison)
        if step.meets:
            step.call(*[placeholder(t, self.site) if type(a) is Poison else a
                        for a, t in zip(args, step.meets, strict=True)])
        for slot in step.outs:
            slots[slot] = poison

    def _fetched(self, fetch: Any) -> Any:
        if not is_owner(fetch.type.placements, self.site.coord):
            return None
        value = self.blocks[fetch.id]
        return None if type(value) is Poison else value

    def close(self) -> None:
        self.blocks.clear()
        self.programs.clear()
        for comm in self.site.communicators:
            comm.close()

