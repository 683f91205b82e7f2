"""Collectives between threads of one process, which read each other's arrays directly.

Ranks meet: each lays down what it brings, the last to arrive opens the gates of the others, and all read what
lies there. Nobody spins, since a spinning thread would hold the interpreter lock that the others need.
Small arrays are copied when laid down, which makes one meeting enough: a rank that lays down its next array
uses the other of two tables, and nobody reaches the one after that before all have left this one. Large
arrays are lent, and a second meeting gives them back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from meshtape.runtime.collectives.call import describe, mismatch, uneven
from meshtape.runtime.collectives.host import HostCommunicator, SelfCommunicator
from meshtape.runtime.collectives.many import Plan
from meshtape.runtime.collectives.reduction import HostArray, chunks, reduce_into, starts
from meshtape.runtime.errors import CommAborted, CommError, CommTimeout, PeerLost, ShapeError
from meshtape.runtime.shards import split_sizes

# Bytes up to which copying an array is cheaper than meeting a second time.
LEND_ABOVE = 64 * 1024
# Elements that a rank reduces, then copies to all, while they are in its cache.
BLOCK = 32 * 1024
# Messages that wait for their recv() before send() waits.
MAILBOX = 8


class Brought(NamedTuple):
    """What one rank lays down: its call, its arrays, whether those are lent, and what else its peers need.

    `beside` is where the rank's results go (all_reduce) or how many elements go to whom (all_to_all).
    """

    call: int
    arrays: Sequence[HostArray]
    lent: bool
    beside: Sequence[HostArray]


class ThreadGroup:
    """The meeting place of `size` ranks; make one per mesh axis group and give each thread its communicator.

    timeout: seconds after which a wait raises CommTimeout.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        if size < 1:
            raise ShapeError(f"a group of {size} ranks cannot exist; use at least 1")
        self.size = size
        self.timeout = timeout
        self.failure: CommError | None = None
        self.tables: tuple[list[Brought | None], ...] = ([None] * size, [None] * size)
        self._mutex = threading.Lock()
        self._gates = [threading.Lock() for _ in range(size)]
        for gate in self._gates:
            gate.acquire()
        self._here: set[int] = set()
        self._asleep: set[int] = set()
        self._mail = {(s, d): Mailbox(self) for s in range(size) for d in range(size) if s != d}

    def communicator(self, rank: int) -> HostCommunicator:
        """The end of the group that rank's thread uses."""
        return SelfCommunicator() if self.size == 1 else ThreadCommunicator(self, rank)

    def mailbox(self, src: int, dst: int) -> Mailbox:
        return self._mail[src, dst]

    def meet(self, rank: int, call: int) -> None:
        """Return when all ranks have called meet()."""
        with self._mutex:
            if self.failure is not None:
                raise type(self.failure)(str(self.failure))
            self._here.add(rank)
            if len(self._here) == self.size:
                self._here.clear()
                self._wake()
                return
            self._asleep.add(rank)
        if not self._gates[rank].acquire(timeout=self.timeout):
            self._late(rank, call)
        elif self.failure is not None and rank in self._here:
            raise type(self.failure)(str(self.failure))

    def fail(self, error: CommError) -> None:
        """Make every rank that waits, now or later, raise `error`; the first failure stays."""
        with self._mutex:
            self.failure = self.failure or error
            self._wake()
        for mailbox in self._mail.values():
            mailbox.wake()

    def _wake(self) -> None:
        for sleeper in self._asleep:
            self._gates[sleeper].release()
        self._asleep.clear()

    def _late(self, rank: int, call: int) -> None:
        with self._mutex:
            if rank not in self._asleep:
                self._gates[rank].acquire()  # woken between the timeout and the mutex
                if self.failure is not None and rank in self._here:
                    raise type(self.failure)(str(self.failure))
                return
            self._asleep.discard(rank)
            missing = sorted(set(range(self.size)) - self._here)
            error = CommTimeout(f"rank {rank}: {describe(call)} waited {self.timeout:g} s for ranks "
                                f"{missing}")
            # Whoever arrives later must not wait for a rank that has given up; those asleep keep their
            # own deadline.
            self.failure = self.failure or CommAborted(str(error))
        raise error


class Mailbox:
    """Copies of arrays on their way from one rank to another."""

    def __init__(self, group: ThreadGroup) -> None:
        self._group = group
        self._queue: deque[tuple[int, HostArray]] = deque()
        self._changed = threading.Condition()

    def put(self, call: int, x: HostArray, rank: int, dst: int) -> None:
        with self._changed:
            self._wait(lambda: len(self._queue) < MAILBOX, f"rank {rank}: {describe(call)} to rank {dst}")
            self._queue.append((call, x))
            self._changed.notify_all()

    def get(self, call: int, rank: int, src: int) -> tuple[int, HostArray]:
        with self._changed:
            self._wait(lambda: bool(self._queue), f"rank {rank}: recv ({describe(call)}) from rank {src}")
            self._changed.notify_all()
            return self._queue.popleft()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        group = self._group
        if not self._changed.wait_for(lambda: ready() or group.failure is not None, group.timeout):
            raise CommTimeout(f"{what} waited {group.timeout:g} s")
        if group.failure is not None and not ready():
            raise type(group.failure)(str(group.failure))


class ThreadCommunicator(HostCommunicator):
    """One rank's end of a ThreadGroup."""

    kind = "threads"

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        super().__init__(rank, group.size, group.timeout)
        self._group = group
        self._turn = 0

    def _exchange(self, call: int, arrays: Sequence[HostArray], beside: Sequence[HostArray] = (),
                  ) -> list[Brought]:
        """What every rank brought, in rank order; _give_back() must follow when its arrays have been read."""
        group = self._group
        table = group.tables[self._turn & 1]
        self._turn += 1
        lent = sum(x.nbytes for x in arrays) > LEND_ABOVE
        table[self.rank] = Brought(call, arrays if lent else [x.copy() for x in arrays], lent, beside)
        group.meet(self.rank, call)
        brought = [entry for entry in table if entry is not None]
        for peer, entry in enumerate(brought):
            if entry.call != call:
                raise mismatch(self.rank, call, peer, entry.call)
        return brought

    def _give_back(self, call: int, brought: list[Brought]) -> None:
        if any(entry.lent for entry in brought):
            self._group.meet(self.rank, call)

    def _all_reduce(self, call: int, plan: Plan, arrays: Sequence[HostArray],
                    outs: Sequence[HostArray]) -> None:
        brought = self._exchange(call, arrays, beside=outs)
        for i, out in enumerate(outs):
            if brought[0].lent:
                self._reduce_share([entry.arrays[i].reshape(-1) for entry in brought],
                                   [entry.beside[i].reshape(-1) for entry in brought], plan.op)
            else:
                reduce_into(out, [entry.arrays[i] for entry in brought], plan.op)
        self._give_back(call, brought)

    def _reduce_share(self, parts: Sequence[HostArray], outs: Sequence[HostArray], op: str) -> None:
        """Reduce this rank's share of the elements into everybody's result."""
        mine = outs[self.rank]
        at = starts(split_sizes(mine.size, self.size))
        for start in range(at[self.rank], at[self.rank + 1], BLOCK):
            block = slice(start, min(start + BLOCK, at[self.rank + 1]))
            reduce_into(mine[block], [part[block] for part in parts], op)
            for peer, out in enumerate(outs):
                if peer != self.rank:
                    np.copyto(out[block], mine[block])

    def _reduce_scatter(self, call: int, plan: Plan, arrays: Sequence[HostArray],
                        outs: Sequence[HostArray]) -> None:
        brought = self._exchange(call, arrays)
        for i, (out, band) in enumerate(zip(outs, plan.bands[self.rank], strict=True)):
            reduce_into(out, [entry.arrays[i][band.key] for entry in brought], plan.op)
        self._give_back(call, brought)

    def _all_gather(self, call: int, plan: Plan, arrays: Sequence[HostArray],
                    outs: Sequence[HostArray]) -> None:
        brought = self._exchange(call, arrays)
        for bands, entry in zip(plan.bands, brought, strict=True):
            for part, out, band in zip(entry.arrays, outs, bands, strict=True):
                if part.base is not out:    # the own part may lie where it belongs
                    out[band.key] = part
        self._give_back(call, brought)

    def _all_to_all(self, call: int, x: HostArray, send: tuple[int, ...], recv: tuple[int, ...],
                    out: HostArray) -> None:
        brought = self._exchange(call, (x,), beside=(np.array(send, np.int64),))
        for peer, (chunk, entry) in enumerate(zip(chunks(out, recv), brought, strict=True)):
            table, theirs = entry.beside[0], entry.arrays[0]
            start, count = int(table[:self.rank].sum()), int(table[self.rank])
            if count != chunk.size:
                raise uneven(self.rank, chunk.size, peer, count)
            np.copyto(chunk, theirs[start:start + count])
        self._give_back(call, brought)

    def _broadcast(self, call: int, buffer: HostArray, root: int) -> None:
        brought = self._exchange(call, (buffer if self.rank == root else buffer[:0],))
        if self.rank != root:
            np.copyto(buffer, brought[root].arrays[0])
        self._give_back(call, brought)

    def _send(self, call: int, x: HostArray, dst: int) -> None:
        self._group.mailbox(self.rank, dst).put(call, x.copy(), self.rank, dst)

    def _recv(self, call: int, out: HostArray, src: int) -> None:
        sent, x = self._group.mailbox(src, self.rank).get(call, self.rank, src)
        if sent != call:
            raise mismatch(self.rank, call, src, sent)
        np.copyto(out, x)

    def _barrier(self, call: int) -> None:
        self._exchange(call, ())

    def poll(self, needed: bool) -> None:
        failure = self._group.failure
        if failure is not None and (needed or not isinstance(failure, PeerLost)):
            raise type(failure)(str(failure))

    def _abort(self, reason: str) -> None:
        self._group.fail(CommAborted(reason))

    def _close(self) -> None:
        self._group.fail(PeerLost(f"rank {self.rank} closed its communicator"))
