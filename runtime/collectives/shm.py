"""Collectives between processes of one host, through shared memory.

Everything happens in *turns*. In a turn a rank writes into its own area, posts its turn counter, waits until
all peers have posted theirs, and reads from their areas. Areas come in pairs, used at even and odd turns: a
rank that writes for turn t has seen all peers post t - 1, which they do after reading what was there since
t - 2. So one post and one wait per turn are all the synchronisation there is.

Small arrays take one turn: everyone writes all of it and reduces everything. Large ones are cut into chunks,
one for each rank to reduce, and these into pieces that fit an area divided by the ranks; a turn carries piece
j to the ranks that reduce it and the reduced piece j - 1 back to everyone.
"""

from __future__ import annotations

import os
import time

import numpy as np

from meshtape.runtime.collectives.arena import AREA, CALLS, MAIL, TURN, Arena
from meshtape.runtime.collectives.call import describe, mismatch, uneven
from meshtape.runtime.collectives.host import HostCommunicator
from meshtape.runtime.collectives.links import Links
from meshtape.runtime.collectives.reduction import HostArray, reduce_into, starts
from meshtape.runtime.errors import CommTimeout
from meshtape.runtime.shards import split_sizes

# Up to this many bytes, reading everybody's whole array is faster than a second turn.
ONE_TURN = 64 * 1024
# Polls of a counter before the processor is offered to others, such offers before sleeping.
SPINS, YIELDS = 150, 20
# The first sleeps are short, since a wake-up can be missed; later ones spare the processor.
SHORT_SLEEP, SHORT_SLEEPS, LONG_SLEEP = 0.001, 50, 0.005
_REMEMBERED = 512


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
        self._spins, self._yields = (0, 0) if crowded else (SPINS, YIELDS)
        self._areas = [[arena.area(r, parity) for r in range(size)] for parity in (0, 1)]
        self._small: dict[tuple[int, int], list[HostArray]] = {}
        # Room for a piece, cut so that pieces of every dtype stay aligned.
        self._room = AREA // size // 64 * 64

    # -- turns

    def _areas_of_next_turn(self) -> list[HostArray]:
        return self._areas[(self._turn + 1) & 1]

    def _take_turn(self, call: int) -> None:
        """Publish this rank's area and wait until all peers have published theirs."""
        words = self._words
        self._turn = turn = self._turn + 1
        note = CALLS + (turn & 1)
        words[self._line + note] = call
        self._arena.post(self._line, turn)
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
        for _ in range(self._spins):
            if words[at] >= turn:
                return
        for _ in range(self._yields):
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

    # -- verbs

    def _all_reduce(self, call: int, x: HostArray, out: HostArray, op: str) -> None:
        self._enter()
        if x.nbytes > ONE_TURN:
            self._all_reduce_pieces(call, x, out, op)
            return
        parts = self._small_parts(call, x)
        np.copyto(parts[self.rank], x)
        self._take_turn(call)
        reduce_into(out, parts, op)

    def _small_parts(self, call: int, x: HostArray) -> list[HostArray]:
        """Every rank's array of the next turn, as views made once for each kind of call."""
        key = (call, self._turn & 1)
        parts = self._small.get(key)
        if parts is None:
            if len(self._small) >= _REMEMBERED:
                self._small.clear()
            parts = [area[:x.nbytes].view(x.dtype) for area in self._areas_of_next_turn()]
            self._small[key] = parts
        return parts

    def _all_reduce_pieces(self, call: int, x: HostArray, out: HostArray, op: str) -> None:
        me, step = self.rank, self._room // x.itemsize
        at = starts(split_sizes(x.size, self.size))
        turns = -(-(at[1] - at[0]) // step)
        incoming = self._areas_of_next_turn()
        for j in range(turns + 1):
            areas = self._areas_of_next_turn()
            if j < turns:
                for peer, _ in self._peers:
                    self._write(areas[me], peer, x[_piece(at, peer, j, step)])
            if j > 0:
                mine = _piece(at, me, j - 1, step)
                parts = self._parts(incoming, x[mine])
                result = self._read(areas[me], me, x[mine])
                reduce_into(result, parts, op)
                np.copyto(out[mine], result)
            self._take_turn(call)
            incoming = areas
            if j > 0:
                for peer, _ in self._peers:
                    theirs = out[_piece(at, peer, j - 1, step)]
                    np.copyto(theirs, self._read(areas[peer], peer, theirs))

    def _parts(self, areas: list[HostArray], mine: HostArray) -> list[HostArray]:
        """The pieces that this rank reduces, in rank order; its own never left its array."""
        return [mine if r == self.rank else self._read(areas[r], self.rank, mine) for r in range(self.size)]

    def _write(self, area: HostArray, slot: int, piece: HostArray) -> None:
        np.copyto(self._read(area, slot, piece), piece)

    def _read(self, area: HostArray, slot: int, like: HostArray) -> HostArray:
        """The piece in a slot of an area, as long as `like` and of its dtype."""
        start = slot * self._room
        view: HostArray = area[start:start + like.nbytes].view(like.dtype)
        return view

    def _reduce_scatter(self, call: int, x: HostArray, counts: tuple[int, ...], out: HostArray,
                        op: str) -> None:
        self._enter()
        me, step, at = self.rank, self._room // x.itemsize, starts(counts)
        for j in range(max(1, -(-max(counts) // step))):
            areas = self._areas_of_next_turn()
            for peer, _ in self._peers:
                self._write(areas[me], peer, x[_piece(at, peer, j, step)])
            self._take_turn(call)
            mine = x[_piece(at, me, j, step)]
            reduce_into(out[j * step:j * step + mine.size], self._parts(areas, mine), op)

    def _all_gather(self, call: int, x: HostArray, counts: tuple[int, ...], out: HostArray) -> None:
        self._enter()
        me, step, at = self.rank, AREA // x.itemsize, starts(counts)
        np.copyto(out[at[me]:at[me + 1]], x)
        for j in range(max(1, -(-max(counts) // step))):
            areas = self._areas_of_next_turn()
            mine = x[j * step:(j + 1) * step]
            np.copyto(areas[me][:mine.nbytes].view(x.dtype), mine)
            self._take_turn(call)
            for peer, _ in self._peers:
                theirs = out[_piece(at, peer, j, step)]
                np.copyto(theirs, areas[peer][:theirs.nbytes].view(x.dtype))

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

    def _abort(self, reason: str) -> None:
        self._links.abort(reason)
        self._words[self._arena.aborted] = 1

    def _close(self) -> None:
        self._links.close()


def _piece(at: list[int], chunk: int, j: int, step: int) -> slice:
    """Piece j, of `step` elements or what is left, of a chunk of a 1-D array; `at` are the chunks' starts."""
    start, end = at[chunk], at[chunk + 1]
    return slice(min(start + j * step, end), min(start + (j + 1) * step, end))
