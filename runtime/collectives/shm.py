"""Collectives between processes of one host, through shared memory.

Everything happens in *turns*. In a turn a rank writes into its own area, posts its turn counter, waits until
all peers have posted theirs, and reads from their areas. Areas come in pairs, used at even and odd turns: a
rank that writes for turn t has seen all peers post t - 1, which they do after reading what was there since
t - 2. So one post and one wait per turn are all the synchronisation there is.

Which piece of which array goes where in which turn depends on shapes alone: it is written down once, as a
script (turns.py), and replayed. Arrays are copied straight into areas and reduced straight out of them. What
is small, or shared by two ranks, is all-reduced by letting everyone read and reduce everything; otherwise
each rank reduces a share, and the shares are gathered.

Addends may also be *resident*: every rank has a region that its peers map, at the same offsets, and arrays in
it are not copied into areas. A turn says that they are complete, the peers reduce straight out of them, and
the post of the next turn says that this rank has read: after one more turn (of a gather, if there is one) the
region belongs to its rank again. So nobody has to wait before writing to it between collectives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.collectives.arena import AREA, CALLS, MAIL, RESIDENT, TURN, Arena
from meshtape.runtime.collectives.call import describe, mismatch, uneven
from meshtape.runtime.collectives.host import HostCommunicator
from meshtape.runtime.collectives.links import Links
from meshtape.runtime.collectives.many import Plan, Resident
from meshtape.runtime.collectives.reduction import HostArray, reduce_into, starts
from meshtape.runtime.collectives.turns import (
    LINE,
    Homes,
    Script,
    Stage,
    Turn,
    exchange,
    gather,
    in_place,
    scatter,
    shares,
    wholes,
)
from meshtape.runtime.errors import CommTimeout
from meshtape.runtime.shards import Shape

# Bytes that a rank may read beyond what it must, if that spares turns: everybody's whole arrays instead of a
# share of everybody's and everybody's reduced shares. Two ranks read the same amount either way.
BEYOND = 256 * 1024
# Polls of a counter, then seconds in which the processor is offered to others between polls, before sleeping.
# A driver on the same processors finds its turn there, and waking up costs more than a collective. With more
# ranks than processors, sleep soon: the peers need them.
POLLS, OFFERS = 100, 0.002
POLLS_IN_A_CROWD, OFFERS_IN_A_CROWD = 0, 20e-6
# The first sleeps are short, since a wake-up can be missed; later ones spare the processor.
SHORT_SLEEP, SHORT_SLEEPS, LONG_SLEEP = 0.001, 50, 0.005


class ShmCommunicator(HostCommunicator):
    """One rank of a group on one host. `links` maps every other rank to its control socket.

    crowded: more ranks than processors on this host, so that waiting by spinning would hold up the others.
    """

    kind = "shm"

    def __init__(self, rank: int, size: int, arena: Arena, links: Links, timeout: float = 60.0,
                 crowded: bool = False) -> None:
        super().__init__(rank, size, timeout)
        self._arena = arena
        self._links = links
        self._words = arena.words
        self._line = arena.progress(rank)
        self._peers = [(peer, arena.progress(peer)) for peer in range(size) if peer != rank]
        self._turn = 0
        self._mailed: dict[tuple[int, int], int] = {}
        self._polls, self._offers = (
            (POLLS_IN_A_CROWD, OFFERS_IN_A_CROWD) if crowded else (POLLS, OFFERS))
        self._areas = [[arena.area(r, parity) for r in range(size)] for parity in (0, 1)]

    # -- turns

    def _areas_of_next_turn(self) -> list[HostArray]:
        return self._areas[(self._turn + 1) & 1]

    def _take_turn(self, call: int) -> None:
        """Publish this rank's area and wait until all peers have published theirs."""
        self._post(call)
        self._await(call)

    def _post(self, call: int) -> None:
        self._turn = turn = self._turn + 1
        self._words[self._line + CALLS + (turn & 1)] = call
        self._arena.post(self._line, turn)

    def _await(self, call: int) -> None:
        words, turn = self._words, self._turn
        note = CALLS + (turn & 1)
        for peer, line in self._peers:
            if words[line] < turn:
                self._wait(line, turn, call)
            if words[line + note] != call:
                raise mismatch(self.rank, call, peer, words[line + note])

    def _wait(self, at: int, turn: int, call: int, peer: int | None = None) -> None:
        """Return when the counter at word `at` has reached `turn`. It is rank peer's; in a collective,
        where all peers are needed, `peer` is None.
        """
        words = self._words
        for _ in range(self._polls):
            if words[at] >= turn:
                return
        until = time.monotonic() + self._offers
        while time.monotonic() < until:
            os.sched_yield()
            if words[at] >= turn:
                return
        self._sleep(at, turn, call, peer)

    def _sleep(self, at: int, turn: int, call: int, peer: int | None) -> None:
        words, sleeps = self._words, 0
        deadline = time.monotonic() + self.timeout
        while words[at] < turn:
            sleeps += 1
            self._arena.sleep(at, turn, SHORT_SLEEP if sleeps <= SHORT_SLEEPS else LONG_SLEEP)
            if words[at] >= turn:
                return
            self._raise_failure()
            self._links.read_news()
            # After the news: whoever posted and then went away has done its part.
            missing = [r for r, line in self._peers if words[line] < turn] if peer is None else [peer]
            if words[at] < turn:
                self._links.raise_news(missing)
                if time.monotonic() > deadline:
                    raise CommTimeout(f"rank {self.rank}: {describe(call)} waited {self.timeout:g} s for "
                                      f"ranks {missing}")

    def _enter(self) -> None:
        """Notice an abort even where nothing has to be waited for."""
        if self._words[self._arena.aborted]:
            self._links.read_news()
            self._links.raise_news([])

    # -- verbs that play scripts

    def _all_reduce(self, call: int, plan: Plan, arrays: Sequence[HostArray],
                    outs: Sequence[HostArray]) -> None:
        self._enter()
        first, *rest = self._scripts(plan, _reducing)
        self._play(call, plan, first, arrays, outs)
        for script in rest:
            self._play(call, plan, script, outs, outs)

    def _reduce_scatter(self, call: int, plan: Plan, arrays: Sequence[HostArray],
                        outs: Sequence[HostArray]) -> None:
        self._enter()
        self._play(call, plan, self._scripts(plan, _scattering)[0], arrays, outs)

    def _all_gather(self, call: int, plan: Plan, arrays: Sequence[HostArray],
                    outs: Sequence[HostArray]) -> None:
        self._enter()
        self._play(call, plan, self._scripts(plan, _gathering)[0], arrays, outs)

    def _scripts(self, plan: Plan, write: Callable[[Stage, Plan, int, Homes], list[Script]]) -> list[Script]:
        """The plan's scripts for areas that begin at the next turn's parity."""
        first = self._turn + 1 & 1
        scripts: list[Script] | None = plan.scripts.get(first)
        if scripts is None:
            view = partial(self._view, {}, plan.dtype)
            stage = Stage(self.rank, self.size, AREA, plan.dtype.itemsize, view)
            scripts = plan.scripts[first] = write(stage, plan, first, self._homes_of_peers(plan))
        return scripts

    def _view(self, known: dict[tuple[int, int, int, Shape], HostArray], dtype: np.dtype[Any],
              rank: int, turn: int, start: int, shape: Shape) -> HostArray:
        """An array in an area; the same object for the same place, since turns of a script resemble."""
        key = (rank, turn & 1, start, shape)
        if key not in known:
            area = self._areas[turn & 1][rank]
            known[key] = area[start:start + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return known[key]

    def resident(self, shapes: Sequence[Shape], dtype: Any, start: int = 0) -> Resident | None:
        dtype, starts, stop = np.dtype(dtype), [], start
        for shape in shapes:
            starts.append(-(-stop // LINE) * LINE)
            stop = starts[-1] + prod(shape) * dtype.itemsize
        if stop > RESIDENT:
            return None
        return Resident(tuple(self._homes(self.rank, shapes, dtype, starts)), tuple(starts), stop)

    def _homes(self, rank: int, shapes: Sequence[Shape], dtype: np.dtype[Any],
               starts: Sequence[int]) -> list[HostArray]:
        region = self._arena.resident(rank)
        return [region[start:start + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
                for shape, start in zip(shapes, starts, strict=True)]

    def _homes_of_peers(self, plan: Plan) -> Homes:
        """Where the addends are resident, if they are: by rank, None in this rank's place."""
        if not plan.homes:
            return []
        return [None if r == self.rank else self._homes(r, plan.shapes, plan.dtype, plan.homes)
                for r in range(self.size)]

    def _play(self, call: int, plan: Plan, script: Script, given: Sequence[HostArray],
              outs: Sequence[HostArray]) -> None:
        # A part that is a view of its result lies where it belongs.
        own = [(i, key) for i, key in script.own if given[i].base is not outs[i]]
        if script.given is not None:
            given = [x if form is None else x.reshape(form)
                     for x, form in zip(given, script.given, strict=True)]
        if script.outs is not None:
            outs = [x if form is None else x.reshape(form) for x, form in zip(outs, script.outs, strict=True)]
        for turn in script.turns:
            for i, key, room in turn.puts:
                room[...] = given[i] if key is None else given[i][key]
            self._post(call)
            for i, key in own:
                outs[i][... if key is None else key] = given[i]
            own = []
            self._await(call)
            if turn.reductions:
                self._reduce(plan, turn, given, outs)
            for i, key, room in turn.takes:
                outs[i][... if key is None else key] = room

    def _reduce(self, plan: Plan, turn: Turn, given: Sequence[HostArray], outs: Sequence[HostArray]) -> None:
        ufunc = plan.ufunc
        for i, key, rooms, to in turn.reductions:
            mine = given[i] if key is None else given[i][key]
            out = outs[i] if to is None else outs[i][to]
            first, second, *rest = [mine if room is None else room for room in rooms]
            if ufunc is None or (self.rank > 1 and np.may_share_memory(mine, out)):
                reduce_into(out, (first, second, *rest), plan.op)
                continue
            ufunc(first, second, out=out)
            for part in rest:
                ufunc(out, part, out=out)

    # -- other verbs

    def _all_to_all(self, call: int, x: HostArray, send: tuple[int, ...], recv: tuple[int, ...],
                    out: HostArray) -> None:
        """The head of the first area says how much its rank sends to whom, hence how many turns all take."""
        self._enter()
        me, head, size = self.rank, 64 * self.size, self.size
        room = (AREA - head) // size // 64 * 64
        step, x_at, out_at = room // x.itemsize, starts(send), starts(recv)
        np.copyto(out[out_at[me]:out_at[me + 1]], x[x_at[me]:x_at[me + 1]])
        turns, j = 1, 0
        while j < turns:
            areas = self._areas_of_next_turn()
            areas[me][:8 * size].view(np.int64)[...] = send
            for peer, _ in self._peers:
                piece = x[_piece(x_at, peer, j, step)]
                np.copyto(areas[me][head + peer * room:][:piece.nbytes].view(x.dtype), piece)
            self._take_turn(call)
            table = [area[:8 * size].view(np.int64) for area in areas]
            for peer, _ in self._peers:
                if table[peer][me] != recv[peer]:
                    raise uneven(me, recv[peer], peer, int(table[peer][me]))
                theirs = out[_piece(out_at, peer, j, step)]
                np.copyto(theirs, areas[peer][head + me * room:][:theirs.nbytes].view(x.dtype))
            turns = max(-(-int(row.max()) // step) for row in table)
            j += 1

    def _broadcast(self, call: int, buffer: HostArray, root: int) -> None:
        self._enter()
        step = AREA // buffer.itemsize
        for j in range(max(1, -(-buffer.size // step))):
            area = self._areas_of_next_turn()[root]
            piece = buffer[j * step:(j + 1) * step]
            shared = area[:piece.nbytes].view(buffer.dtype)
            if self.rank == root:
                np.copyto(shared, piece)
            self._take_turn(call)
            if self.rank != root:
                np.copyto(piece, shared)

    def _barrier(self, call: int) -> None:
        self._enter()
        self._take_turn(call)

    # -- from one rank to another

    def _send(self, call: int, x: HostArray, dst: int) -> None:
        self._enter()
        written, read = self._arena.mail(self.rank, dst)
        data = x.view(np.uint8)
        for start in range(0, max(1, data.size), MAIL):
            turn = self._next_mail(self.rank, dst)
            if self._words[read + TURN] < turn - 2:
                self._wait(read, turn - 2, call, dst)
            piece = data[start:start + MAIL]
            np.copyto(self._arena.mail_slot(self.rank, dst, turn)[:piece.size], piece)
            self._words[written + CALLS + (turn & 1)] = call
            self._arena.post(written, turn)

    def _recv(self, call: int, out: HostArray, src: int) -> None:
        self._enter()
        written, read = self._arena.mail(src, self.rank)
        data = out.view(np.uint8)
        for start in range(0, max(1, data.size), MAIL):
            turn = self._next_mail(src, self.rank)
            if self._words[written + TURN] < turn:
                self._wait(written, turn, call, src)
            sent = self._words[written + CALLS + (turn & 1)]
            if sent != call:
                raise mismatch(self.rank, call, src, sent)
            piece = data[start:start + MAIL]
            np.copyto(piece, self._arena.mail_slot(src, self.rank, turn)[:piece.size])
            self._arena.post(read, turn)

    def _next_mail(self, src: int, dst: int) -> int:
        self._mailed[src, dst] = turn = self._mailed.get((src, dst), 0) + 1
        return turn

    # -- the end

    def poll(self, needed: bool) -> None:
        self._links.read_news()
        self._links.raise_news([r for r in range(self.size) if r != self.rank] if needed else [])

    def _abort(self, reason: str) -> None:
        self._links.abort(reason)
        self._words[self._arena.aborted] = 1

    def _close(self) -> None:
        self._links.close()


def _reducing(stage: Stage, plan: Plan, first: int, homes: Homes) -> list[Script]:
    size, nbytes = stage.size, plan.total * plan.dtype.itemsize
    if (size - 1) * (size - 2) * nbytes <= size * BEYOND:
        if homes:
            return [in_place(stage, wholes(plan.shapes), homes, whole=True)]
        return [exchange(stage, plan.shapes, first)]
    bands = shares(plan.shapes, stage.size)
    if homes:
        scattering = in_place(stage, bands[stage.me], homes, whole=True, last=False)
    else:
        scattering = scatter(stage, bands, first, whole=True)
    return [scattering, gather(stage, bands, first + len(scattering.turns), whole=True)]


def _scattering(stage: Stage, plan: Plan, first: int, homes: Homes) -> list[Script]:
    if homes:
        return [in_place(stage, plan.bands[stage.me], homes)]
    return [scatter(stage, plan.bands, first)]


def _gathering(stage: Stage, plan: Plan, first: int, homes: Homes) -> list[Script]:
    return [gather(stage, plan.bands, first)]


def _piece(at: list[int], chunk: int, j: int, step: int) -> slice:
    """Piece j, of `step` elements or what is left, of a chunk of a 1-D array; `at` are the chunks' starts."""
    start, end = at[chunk], at[chunk + 1]
    return slice(min(start + j * step, end), min(start + (j + 1) * step, end))
