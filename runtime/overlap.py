"""Collectives beside kernels: a thread of the worker's runs them one after the other.

A collective whose results are needed only some steps later is *started* where the program has it, and
*waited for* where a result is first read. All collectives of such a program go through the thread, in the
order of the program, which is the same on every rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from time import perf_counter_ns
from typing import Any, NamedTuple

CLOSE_SECONDS = 1.0
# Kinds of communicators that wait for a network, or have a stream of their own, rather than compute: theirs
# run beside kernels. Copying through shared memory takes a processor that kernels could use.
BESIDE = ("tcp", "nccl")


class Pending:
    """A collective under way; `began` and `ended` are nanoseconds of the worker's clock."""

    __slots__ = ("_done", "_error", "_value", "began", "ended")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self._value: Any = None
        self._error: BaseException | None = None
        self.began = self.ended = 0

    def result(self) -> Any:
        """What it returned or raised, when it is done."""
        with self._done:
            if self._error is not None:
                raise self._error
            return self._value

    def run(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        self.began = perf_counter_ns()
        try:
            self._value = function(*args)
        except BaseException as error:
            self._error = error             # raised where the result is asked for
        self.ended = perf_counter_ns()
        self._done.release()


class Overlap:
    """The thread; it is made when it is first needed."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Pending, Callable[..., Any], Sequence[Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, function: Callable[..., Any], *args: Any) -> Pending:
        """Have `function(*args)` run after all that was started before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="meshtape-collectives", daemon=True)
            self._thread.start()
        pending = Pending()
        self._jobs.put((pending, function, args))
        return pending

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_SECONDS)
            self._thread = None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            pending, function, args = job
            pending.run(function, args)
            del job, pending, function, args        # arrays go when the program lets them go


class Placed(NamedTuple):
    """A step of a worker's program: `origin` is the step of the body that it comes from."""

    call: Any
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    origin: int


def split_collectives(steps: Sequence[Placed], n_slots: int, beside: Sequence[bool],
                      make: Callable[[Any, str], Any]) -> tuple[list[Placed], int]:
    """The steps with collectives started and waited for apart, and the number of slots then.

    beside[k]: step k may run beside others. `make(call, what)` gives the call that starts it ("start"), that
    waits for it ("wait"), or that does both ("through") for a collective which is needed at once. A wait
    reads the collective's operands as well: their memory stays theirs till then.
    """
    first = {}                              # the first step that reads a slot
    for at in range(len(steps) - 1, -1, -1):
        first.update(dict.fromkeys(steps[at].ins, at))
    apart: dict[int, list[int]] = {}        # where collectives are waited for: before which step
    for at, step in enumerate(steps):
        needed = min((first.get(s, len(steps)) for s in step.outs), default=len(steps))
        if beside[at] and needed > at + 1:
            apart.setdefault(needed, []).append(at)
    if not apart:
        return list(steps), n_slots
    token = {at: n_slots + k for k, at in enumerate(at for found in apart.values() for at in found)}
    out: list[Placed] = []
    for at in range(len(steps) + 1):
        for begun in apart.get(at, ()):
            step = steps[begun]
            out.append(Placed(make(step.call, "wait"), (token[begun], *step.ins), step.outs, step.origin))
        if at < len(steps):
            step = steps[at]
            if at in token:
                out.append(Placed(make(step.call, "start"), step.ins, (token[at],), step.origin))
            elif step.call.kind == "collective":
                out.append(step._replace(call=make(step.call, "through")))
            else:
                out.append(step)
    return out, n_slots + len(token)
