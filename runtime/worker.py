"""The worker: a table of blocks, a cache of compiled programs, and the loop that runs a batch.

The same plain class runs in the driver's thread, in a thread of its own, and inside a Ray actor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from resource import RUSAGE_SELF, getrusage
from time import perf_counter_ns
from typing import Any

import numpy as np

import meshtape.runtime.ops  # noqa: F401  fills the op table
from meshtape.runtime.codegen import Code, failed_step, generate
from meshtape.runtime.errors import CommError
from meshtape.runtime.memory import keep_pages
from meshtape.runtime.overlap import BESIDE, Overlap, Pending
from meshtape.runtime.program import Compiled, Site, Step, compile_program, placeholder
from meshtape.runtime.protocol import Failure, Fetch, Reply, Run, Span
from meshtape.runtime.shards import coordinate, is_owner


class Poison:
    """Stands in the block table for a value that a failed step could not make."""

    __slots__ = ("failure",)

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class Body:
    """A program as this worker knows it: interpreted at first sight, a generated function from the second."""

    def __init__(self, program: Compiled) -> None:
        self.program = program
        self.code: Code | None = None
        self.convert = [False] * len(program.steps)


class Worker:
    """Runs batches for one rank of a mesh, one communicator per mesh axis.

    A kernel that fails makes its outputs, and what is computed from them, Poison; the batch goes on, so that
    the other ranks' collectives find a partner, and the failures travel back in the reply.

    `generate=False` interprets every batch, `reuse=False` gives every result memory of its own, for
    comparison. `overlap` names the kinds of communicators whose collectives run beside kernels.
    """

    def __init__(self, rank: int, mesh_shape: Sequence[int], communicators: Sequence[Any],
                 device: str = "cpu", *, generate: bool = True, reuse: bool = True,
                 overlap: Collection[str] = BESIDE) -> None:
        keep_pages()
        self.rank = rank
        self.overlap = Overlap()
        self.site = Site(np, tuple(mesh_shape), coordinate(rank, mesh_shape), tuple(communicators),
                         self.overlap.start, tuple(c.kind in overlap for c in communicators), reuse)
        self.device = device
        self.blocks: dict[int, Any] = {}
        self.programs: dict[bytes, Body] = {}
        self.lent: list[int] = []           # blocks that lie in memory which later programs write to
        self.poisoned = 0
        self.spans: list[Span] | None = None
        self.generate = generate

    def run(self, run: Run) -> Reply:
        """Run one batch and answer with its failures and the fetched slices this worker owns."""
        began = perf_counter_ns() if run.trace else 0
        self.spans = [] if run.trace else None
        blocks = self.blocks
        for name in run.frees:
            if type(blocks.pop(name, None)) is Poison:
                self.poisoned -= 1
        for digest in run.drop:
            self.programs.pop(digest, None)
        if run.program is not None:
            self.programs[run.digest] = Body(compile_program(run.program, self.site))
            self._note("compile", began, "compile")
        failures: list[Failure] = []
        if run.digest:
            with np.errstate(all="ignore"):
                self._execute(self.programs[run.digest], run, failures)
        values = [self._fetched(f) for f in run.fetch]
        peak = getrusage(RUSAGE_SELF).ru_maxrss << 10
        traffic = tuple((c.calls, c.bytes_sent) for c in self.site.communicators)
        return Reply(self.rank, run.batch, failures, values, peak,
                     (began, perf_counter_ns() if run.trace else 0), self.spans or (), traffic)

    def _note(self, name: str, start: int, kind: str = "kernel", sent: int = 0) -> None:
        """In a traced batch: something that began at `start` is done."""
        if self.spans is not None:
            self.spans.append(Span(name, start, perf_counter_ns() - start, kind, sent))

    def _trace(self, step: Step, args: Sequence[Any], start: int, before: int) -> None:
        """Note a step that began at `start`, when this rank had sent `before` bytes to others."""
        call = step.call
        kind = {"op": "kernel", "start": "collective"}.get(call.kind, call.kind)
        sent = self._sent() - before if call.kind in ("collective", "wait") else 0
        if call.kind == "wait" and type(args[0]) is Pending and self.spans is not None:
            began, ended = args[0].began, args[0].ended
            self.spans.append(Span(call.name.removeprefix("wait for "), began, ended - began, "collective",
                                   sent, beside=True))
            sent = 0
        self._note(f"start {call.name}" if call.kind == "start" else call.name, start, kind, sent)

    def _sent(self) -> int:
        """Bytes that this rank's collectives have sent to others."""
        return sum(c.bytes_sent for c in self.site.communicators)

    def _execute(self, body: Body, run: Run, failures: list[Failure]) -> None:
        """Run a body, after giving memory of their own to blocks that stand where programs write."""
        for name in self.lent:
            value = self.blocks.get(name)
            if value is not None and type(value) is not Poison:
                self.blocks[name] = self.site.xp.array(value)
        self.lent.clear()
        self._perform(body, run, failures)
        self.lent += [run.ids[slot] for slot in body.program.lent]

    def _perform(self, body: Body, run: Run, failures: list[Failure]) -> None:
        if body.code is None or self.poisoned or run.trace:
            slots = self._bind(body.program, run)
            self._interpret(body, run, slots, 0, iter(run.feeds), failures)
            if self.generate and body.code is None and not failures and not run.trace:
                body.code = generate(body.program, self.site.xp, body.convert)
            return
        try:
            body.code.run(self.blocks, run.ids, run.scalars, run.feeds)
        except Exception as error:
            # Whatever a kernel raises is the user's to see, at the driver, as a value.
            at, values = failed_step(body.code, error.__traceback__)
            slots = [values.get(slot) for slot in range(body.program.n_slots)]
            step = body.program.steps[at]
            self._fail(step, error, slots, run.batch, failures)
            for slot in step.release:
                slots[slot] = None
            fed = sum(s.call.kind == "feed" for s in body.program.steps[:at + 1])
            self._interpret(body, run, slots, at + 1, iter(run.feeds[fed:]), failures)

    def _bind(self, program: Compiled, run: Run) -> list[Any]:
        """All slots, the external ones filled from the block table."""
        slots: list[Any] = [None] * program.n_slots
        for slot in program.external:
            name = run.ids[slot]
            slots[slot] = self.blocks.pop(name) if slot in program.taken else self.blocks[name]
            if slot in program.taken and type(slots[slot]) is Poison:
                self.poisoned -= 1
        return slots

    def _interpret(self, body: Body, run: Run, slots: list[Any], start: int, feeds: Iterator[Any],
                   failures: list[Failure]) -> None:
        """Steps from `start`, one by one."""
        program = body.program
        spoiled = any(type(x) is Poison for x in slots)
        for at, step in enumerate(program.steps[start:], start):
            if step.call.kind == "feed":
                args = [next(feeds)]
            else:
                args = [slots[s] if s >= 0 else run.scalars[-1 - s] for s in step.ins]
            start_ns, before = (perf_counter_ns(), self._sent()) if run.trace else (0, 0)
            if (spoiled or failures) and any(type(a) is Poison for a in args):
                self._skip(step, args, slots)
            else:
                self._call(body, step, at, args, slots, run.batch, failures)
            if run.trace:
                self._trace(step, args, start_ns, before)
            for slot in step.release:
                slots[slot] = None
        for slot in program.kept:
            value = slots[slot]
            if type(value) is Poison:
                self.poisoned += 1
            elif slot in program.sharing.feeds or (slot in program.sharing.views and value.base is not None):
                value = self.site.xp.array(value)
            self.blocks[run.ids[slot]] = value

    def _call(self, body: Body, step: Step, at: int, args: list[Any], slots: list[Any], batch: int,
              failures: list[Failure]) -> None:
        call = step.call
        try:
            result = (
                call.function(*args) if call.op is None else call.function(self.site.xp, *args, **call.attrs)
            )
            for slot, dtype, value in zip(
                step.outs, call.dtypes, result if call.many else (result,), strict=True
            ):
                if dtype is not None and (type(value) is not np.ndarray or value.dtype is not dtype):
                    body.convert[at] = True
                    value = self.site.xp.asarray(value, dtype)
                slots[slot] = value
        except Exception as error:
            # Whatever a kernel raises is the user's to see, at the driver, as a value.
            self._fail(step, error, slots, batch, failures)

    def _fail(self, step: Step, error: Exception, slots: list[Any], batch: int,
              failures: list[Failure]) -> None:
        kind = "CommError" if isinstance(error, CommError) else type(error).__name__
        failure = Failure(batch, step.origin, self.rank, kind, str(error))
        failures.append(failure)
        for slot in step.outs:
            slots[slot] = Poison(failure)

    def _skip(self, step: Step, args: list[Any], slots: list[Any]) -> None:
        """A step with a poisoned input: outputs are poisoned; a collective still keeps its appointment."""
        poison = next(a for a in args if type(a) is Poison)
        if step.call.kind in ("collective", "start"):
            step.call.function(*[a if type(a) is not Poison or t is None else placeholder(t, self.site)
                                 for a, t in zip(args, step.call.meets, strict=True)])
        for slot in step.outs:
            slots[slot] = poison

    def _fetched(self, fetch: Fetch) -> Any:
        if not is_owner(fetch.type.placements, self.site.coord):
            return None
        value = self.blocks[fetch.id]
        # A copy: the next batch may write over the block before the driver has read the reply.
        return None if type(value) is Poison else self.site.xp.array(value)

    def close(self) -> None:
        self.overlap.close()
        self.blocks.clear()
        self.programs.clear()
        for comm in self.site.communicators:
            comm.close()
