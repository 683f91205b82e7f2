"""The worker: a table of blocks, a cache of compiled programs, and the loop that runs a batch.

The same plain class runs in the driver's thread, in a thread of its own, and inside a Ray actor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from resource import RUSAGE_SELF, getrusage
from time import perf_counter_ns
from typing import Any

import numpy as np

import meshtape.runtime.ops  # noqa: F401  fills the op table
from meshtape.runtime.codegen import Code, failed_step, generate, ran
from meshtape.runtime.cuda.beside import Beside
from meshtape.runtime.cuda.fusion import Fused
from meshtape.runtime.cuda.graphs import GraphCounts, Replay, note_lent
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
        self.replay: Replay | None = None
        self.convert = [False] * len(program.steps)


class Worker:
    """Runs batches for one rank of a mesh, one communicator per mesh axis.

    A kernel that fails makes its outputs, and what is computed from them, Poison; the batch goes on, so that
    the other ranks' collectives find a partner, and the failures travel back in the reply.

    `device` is the CUDA device to work on, a runtime.cuda.device.Device, or "cpu" for NumPy.

    `generate=False` interprets every batch, `reuse=False` gives every result memory of its own, `fuse=False`
    runs pointwise ops one by one on a device, and `graphs=False` replays nothing as a CUDA graph, for
    comparison. `overlap` names the kinds of communicators
    whose collectives run beside kernels.
    """

    def __init__(self, rank: int, mesh_shape: Sequence[int], communicators: Sequence[Any],
                 device: Any = "cpu", *, generate: bool = True, reuse: bool = True, fuse: bool = True,
                 graphs: bool = True, overlap: Collection[str] = BESIDE) -> None:
        keep_pages()
        self.rank = rank
        self.device: Any = None if device == "cpu" else device
        device = self.device
        self.overlap: Any = Overlap() if device is None else Beside(device)
        self.array = np.ndarray if device is None else device.cp.ndarray
        self.site = Site(np if device is None else device.xp, tuple(mesh_shape), coordinate(rank, mesh_shape),
                         tuple(communicators), self.overlap.start,
                         tuple(c.kind in overlap for c in communicators), reuse, device,
                         fuse and device is not None)
        self.graphs = GraphCounts() if graphs and device is not None else None
        self.blocks: dict[int, Any] = {}
        self.programs: dict[bytes, Body] = {}
        self.lent: list[int] = []           # blocks that lie in memory which later programs write to
        self.poisoned = 0
        self.spans: list[Span] | None = None
        self.generate = generate

    def run(self, run: Run) -> Reply:
        """Run one batch and answer with its failures and the fetched slices this worker owns."""
        if self.device is None:
            with np.errstate(all="ignore"):
                return self._run(run)
        with self.device.active():
            return self._run(run)

    def _run(self, run: Run) -> Reply:
        began = perf_counter_ns() if run.trace else 0
        self.spans = [] if run.trace else None
        blocks = self.blocks
        for name in run.frees:
            if type(blocks.pop(name, None)) is Poison:
                self.poisoned -= 1
        for digest in run.drop:
            self._drop(digest)
        if run.program is not None:
            body = self.programs[run.digest] = Body(compile_program(run.program, self.site))
            if self.graphs is not None:
                body.replay = self.graphs.add(self.device, body.program, self.site.communicators)
            self._note("compile", began, "compile")
        failures: list[Failure] = []
        if run.digest:
            self._execute(self.programs[run.digest], run, failures)
        values = self._values(run, failures)
        peak = getrusage(RUSAGE_SELF).ru_maxrss << 10 if self.device is None else self.device.peak()
        traffic = tuple((c.calls, c.bytes_sent) for c in self.site.communicators)
        return Reply(self.rank, run.batch, failures, values, peak,
                     (began, perf_counter_ns() if run.trace else 0), self.spans or (), traffic,
                     () if self.graphs is None else self.graphs.report())

    def _values(self, run: Run, failures: list[Failure]) -> list[Any]:
        """The fetched slices; None for all if a collective that they may come from has failed."""
        values = [self._fetched(f) for f in run.fetch]
        if self.device is not None and any(value is not None for value in values):
            try:
                for comm in self.site.communicators:
                    comm.check()
            except CommError as error:
                failures.append(Failure(run.batch, 0, self.rank, "CommError", str(error)))
                return [None] * len(values)
        return values

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
        if body.program.inputs is not None:
            self.device.blas.tf32 = body.program.tf32
            run = run._replace(feeds=body.program.inputs.load(run.feeds, run.scalars))
        self._perform(body, run, failures)
        self.lent += [run.ids[slot] for slot in body.program.lent]

    def _perform(self, body: Body, run: Run, failures: list[Failure]) -> None:
        if body.code is None or self.poisoned or run.trace:
            if run.program is None and not self._stands_aside(body, run, failures):
                return
            slots = self._bind(body.program, run)
            self._interpret(body, run, slots, 0, iter(run.feeds), failures)
            if self.generate and body.code is None and not failures and not run.trace:
                body.code = generate(body.program, self.site.xp, body.convert, self.device)
            return
        try:
            if body.replay is not None:
                body.replay.run(body.code.run, self.blocks, run.ids, run.scalars, run.feeds)
            else:
                body.code.run(self.blocks, run.ids, run.scalars, run.feeds)
        except Exception as error:
            # Whatever a kernel raises is the user's to see, at the driver, as a value.
            if ran(error.__traceback__):
                self._resume(body, run, error, failures)
            elif isinstance(error, CommError):
                self._spoil(body, run, error, failures)
            else:
                raise

    def _stands_aside(self, body: Body, run: Run, failures: list[Failure]) -> bool:
        """Tell the other ranks that this one runs step by step; False if they are not there any more."""
        try:
            if body.replay is not None:
                body.replay.stand_aside()
        except CommError as error:
            self._spoil(body, run, error, failures)
            return False
        return True

    def _spoil(self, body: Body, run: Run, error: CommError, failures: list[Failure]) -> None:
        """Nothing of a program could be run, since the other ranks do not answer."""
        failure = Failure(run.batch, body.program.steps[0].origin, self.rank, "CommError", str(error))
        failures.append(failure)
        for slot in body.program.taken:
            if type(self.blocks.pop(run.ids[slot], None)) is Poison:
                self.poisoned -= 1
        for slot in body.program.kept:
            self.blocks[run.ids[slot]] = Poison(failure)
            self.poisoned += 1

    def _resume(self, body: Body, run: Run, error: Exception, failures: list[Failure]) -> None:
        """Carry on after a step of a generated function failed. Without memory it is tried once more."""
        assert body.code is not None
        at, values = failed_step(body.code, error.__traceback__)
        slots = [values.get(slot) for slot in range(body.program.n_slots)]
        step = body.program.steps[at]
        if self._out_of_memory(error):
            error.__traceback__ = None      # whose frames hold arrays
            args = [slots[s] if s >= 0 else run.scalars[-1 - s] for s in step.ins]
            self._call(body, step, at, args, slots, run.batch, failures)
        else:
            self._fail(step, error, slots, run.batch, failures)
        for slot in step.release:
            slots[slot] = None
        fed = sum(s.call.kind == "feed" for s in body.program.steps[:at + 1])
        self._interpret(body, run, slots, at + 1, iter(run.feeds[fed:]), failures)

    def _out_of_memory(self, error: Exception) -> bool:
        return self.device is not None and self.device.is_out_of_memory(error)

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
                if self.device is not None:
                    self.device.synchronize()
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
        if self.graphs is not None:
            note_lent(self.graphs.owners, self.blocks, [run.ids[slot] for slot in program.kept])

    def _call(self, body: Body, step: Step, at: int, args: list[Any], slots: list[Any], batch: int,
              failures: list[Failure]) -> None:
        try:
            self._results(body, step, at, self._apply(step, args, slots), slots)
        except Exception as error:
            # Whatever a kernel raises is the user's to see, at the driver, as a value.
            self._fail(step, error, slots, batch, failures)

    def _apply(self, step: Step, args: list[Any], slots: Sequence[Any]) -> Any:
        """Call a step's function; a second time, after giving back what is unused, if memory is short."""
        call = step.call
        for i, array in step.given:
            args[i] = array
        if call.on_device:
            args = [self.device, *args]
        elif call.op is not None:
            args = [self.site.xp, *args]
        try:
            return call.function(*args, **call.attrs)
        except Exception as error:
            if not self._out_of_memory(error):
                raise
        device: Any = self.device
        if self.graphs is not None:
            self.graphs.drop()
        device.give_back()
        try:
            return call.function(*args, **call.attrs)
        except Exception as error:
            if not self._out_of_memory(error):
                raise
            live = [x for x in (*self.blocks.values(), *slots) if type(x) is self.array]
            raise MemoryError(device.shortage(call.name, call.shapes, call.dtypes, live)) from None

    def _results(self, body: Body, step: Step, at: int, result: Any, slots: list[Any]) -> None:
        found = result if step.call.many else (result,)
        for slot, dtype, value in zip(step.outs, step.call.dtypes, found, strict=True):
            if dtype is not None and (type(value) is not self.array or value.dtype is not dtype):
                body.convert[at] = True
                value = self.site.xp.asarray(value, dtype)
            slots[slot] = value

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
        if step.call.kind == "fused" and len(step.outs) > 1 and isinstance(step.call.function, Fused):
            self._unspoiled(step, args, slots)

    def _unspoiled(self, step: Step, args: list[Any], slots: list[Any]) -> None:
        """Results of a fused chain that do not depend on what is poisoned."""
        chain = step.call.function.chain  # type: ignore[attr-defined]
        bad = {i for i, a in enumerate(args) if type(a) is Poison}
        good = [k for k, needed in enumerate(chain.needs()) if not bad.intersection(needed)]
        if good:
            given = [self.site.xp.zeros(*chain.arrays[i]) if i in bad else a for i, a in enumerate(args)]
            made = self._apply(step, given, slots)
            for k in good:
                slots[step.outs[k]] = made[k]

    def _fetched(self, fetch: Fetch) -> Any:
        if not is_owner(fetch.type.placements, self.site.coord):
            return None
        value = self.blocks[fetch.id]
        if type(value) is Poison:
            return None
        # A copy: the next batch may write over the block before the driver has read the reply.
        return np.array(value) if self.device is None else value.get()

    def _drop(self, digest: bytes) -> None:
        body = self.programs.pop(digest, None)
        if body is None:
            return
        if body.replay is not None and self.graphs is not None:
            self.graphs.remove(body.replay)
        if body.program.inputs is not None:
            body.program.inputs.close()

    def close(self) -> None:
        self.overlap.close()
        with nullcontext() if self.device is None else self.device.active():
            for digest in list(self.programs):
                self._drop(digest)
            self.blocks.clear()
        for comm in self.site.communicators:
            comm.close()
