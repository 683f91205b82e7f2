"""Which piece of which array goes where in which turn of a collective through shared memory.

Pure arithmetic on shapes, then views of the areas, made once for every kind of call: playing a script only
copies and reduces. A *message*, the parts of several arrays for one rank, is cut into pieces that fill a
slot of an area turn by turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

from meshtape.runtime.collectives.many import Band, Bands, Key
from meshtape.runtime.collectives.reduction import HostArray
from meshtape.runtime.shards import Shape, split_sizes

# Pieces start on cache lines, which also aligns every dtype.
LINE = 64


class Move(NamedTuple):
    """A piece of array number `array`, all of it if `key` is None, and its place in an area."""

    array: int
    key: Key | None
    room: HostArray


class Reduction(NamedTuple):
    """A piece to reduce: where this rank's addend is in the array given, those of the others by rank (None
    for its own), and where the result goes in the array of results.
    """

    array: int
    key: Key | None
    rooms: tuple[HostArray | None, ...]
    out: Key | None


class Turn(NamedTuple):
    """Copies into the own area; then, when all ranks have done that, reductions and copies out of theirs."""

    puts: tuple[Move, ...] = ()
    reductions: tuple[Reduction, ...] = ()
    takes: tuple[Move, ...] = ()


Forms = tuple[Shape | None, ...] | None


class Script(NamedTuple):
    """The turns of a collective on one rank.

    `given`, `outs`: shapes in which the arrays are seen, None where that is as they are. `own`: arrays that
    are copied as given to a piece of the results.
    """

    given: Forms
    outs: Forms
    turns: tuple[Turn, ...]
    own: tuple[tuple[int, Key | None], ...] = ()


class Piece(NamedTuple):
    """Rows and columns of a band of array number `array`, and where in the slot they are, in bytes."""

    array: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    at: int


# Resident arrays by rank, None in this rank's place; empty if there are none.
Homes = Sequence[Sequence[HostArray] | None]

# view(rank, turn, start, shape): an array in rank's area of a turn, `start` bytes from its beginning.
View = Callable[[int, int, int, Shape], HostArray]


class Stage(NamedTuple):
    """Where scripts play: rank `me` of `size`, with areas of `area` bytes for elements of `itemsize`."""

    me: int
    size: int
    area: int
    itemsize: int
    view: View

    @property
    def peers(self) -> list[int]:
        return [r for r in range(self.size) if r != self.me]

    @property
    def slot(self) -> int:
        """Bytes of an area for each peer."""
        return self.area // (self.size - 1) // LINE * LINE

    def slot_at(self, src: int, dst: int) -> int:
        """Where in its area rank src puts what is for rank dst."""
        return (dst - (dst > src)) * self.slot


def cut_message(bands: Bands, itemsize: int, room: int) -> list[list[Piece]]:
    """Pieces of `bands`, by turn, in each of which they take at most `room` bytes."""
    turns: list[list[Piece]] = [[]]
    at = 0
    for i, band in enumerate(bands):
        row, column = 0, 0
        while row < band.rows and band.width:
            left = (room - at) // itemsize
            if column == 0 and left >= band.width:
                taken = min(band.rows - row, left // band.width)
                piece = Piece(i, (row, row + taken), (0, band.width), at)
                row += taken
            elif band.width * itemsize > room and left > 0:
                end = min(band.width, column + left)
                piece = Piece(i, (row, row + 1), (column, end), at)
                row, column = (row + 1, 0) if end == band.width else (row, end)
            else:
                turns.append([])
                at = 0
                continue
            turns[-1].append(piece)
            size = (piece.rows[1] - piece.rows[0]) * (piece.columns[1] - piece.columns[0]) * itemsize
            at += -(-size // LINE) * LINE
    return turns


class _Cut:
    """The messages to (or from) all ranks, and how arrays and parts must be seen to cut them."""

    def __init__(self, bands: Sequence[Bands], itemsize: int, room: int) -> None:
        self.bands = bands
        self.messages = [cut_message(row, itemsize, room) for row in bands]
        self.turns = max(map(len, self.messages))
        count = len(bands[0])
        plain = [all(row[i].key is not None for row in bands) for i in range(count)]
        for row, message in zip(bands, self.messages, strict=True):
            for piece in (p for turn in message for p in turn):
                band = row[piece.array]
                if (*piece.rows, *piece.columns) != (0, band.rows, 0, band.width):
                    plain[piece.array] = False
        self.plain = plain  # arrays whose parts all travel in one piece, and need not be seen as matrices

    def wholes(self) -> Forms:
        """How whole arrays are seen."""
        return None if all(self.plain) else tuple(
            None if p else (b.rows, b.columns) for p, b in zip(self.plain, self.bands[0], strict=True))

    def parts(self, rank: int) -> Forms:
        """How a rank's parts are seen."""
        return None if all(self.plain) else tuple(
            None if p else (b.rows, b.width) for p, b in zip(self.plain, self.bands[rank], strict=True))

    def pieces(self, rank: int, turn: int) -> list[Piece]:
        return self.messages[rank][turn] if turn < len(self.messages[rank]) else []

    def in_whole(self, rank: int, piece: Piece) -> Key | None:
        band = self.bands[rank][piece.array]
        if self.plain[piece.array]:
            return None if band.width == band.columns else band.key
        return (slice(*piece.rows), slice(band.start + piece.columns[0], band.start + piece.columns[1]))

    def in_part(self, piece: Piece) -> Key | None:
        return None if self.plain[piece.array] else (slice(*piece.rows), slice(*piece.columns))

    def shape(self, rank: int, piece: Piece) -> Shape:
        if self.plain[piece.array]:
            return self.bands[rank][piece.array].shape
        return (piece.rows[1] - piece.rows[0], piece.columns[1] - piece.columns[0])


def scatter(stage: Stage, bands: Sequence[Bands], first: int, whole: bool = False) -> Script:
    """Reduce-scatter from turn number `first` on. whole: results lie in whole arrays, not in parts."""
    cut, me, turns = _Cut(bands, stage.itemsize, stage.slot), stage.me, []
    for j in range(cut.turns):
        def room(src: int, dst: int, piece: Piece, turn: int = first + j) -> HostArray:
            return stage.view(src, turn, stage.slot_at(src, dst) + piece.at, cut.shape(dst, piece))

        puts = [Move(p.array, cut.in_whole(r, p), room(me, r, p))
                for r in stage.peers for p in cut.pieces(r, j)]
        reductions = [
            Reduction(p.array, cut.in_whole(me, p),
                      tuple(None if r == me else room(r, me, p) for r in range(stage.size)),
                      cut.in_whole(me, p) if whole else cut.in_part(p)) for p in cut.pieces(me, j)]
        turns.append(Turn(tuple(puts), tuple(reductions)))
    return Script(cut.wholes(), cut.wholes() if whole else cut.parts(me), tuple(turns))


def gather(stage: Stage, bands: Sequence[Bands], first: int, whole: bool = False) -> Script:
    """All-gather of the peers' parts from turn number `first` on. whole: the own part lies in the array."""
    cut, me, turns = _Cut(bands, stage.itemsize, stage.area), stage.me, []
    for j in range(cut.turns):
        puts = [Move(p.array, cut.in_whole(me, p) if whole else cut.in_part(p),
                     stage.view(me, first + j, p.at, cut.shape(me, p))) for p in cut.pieces(me, j)]
        takes = [Move(p.array, cut.in_whole(r, p), stage.view(r, first + j, p.at, cut.shape(r, p)))
                 for r in stage.peers for p in cut.pieces(r, j)]
        turns.append(Turn(tuple(puts), takes=tuple(takes)))
    own = [] if whole else [
        (i, cut.in_whole(me, Piece(i, (0, band.rows), (0, band.width), 0)))
        for i, band in enumerate(bands[me]) if band.size]
    return Script(cut.wholes() if whole else cut.parts(me), cut.wholes(), tuple(turns), tuple(own))


def exchange(stage: Stage, shapes: Sequence[Shape], first: int) -> Script:
    """All-reduce in which everybody reads and reduces everything, from turn number `first` on."""
    cut, turns = _Cut([wholes(shapes)], stage.itemsize, stage.area), []
    for j in range(cut.turns):
        pieces = cut.pieces(0, j)
        puts = [Move(p.array, cut.in_whole(0, p), stage.view(stage.me, first + j, p.at, cut.shape(0, p)))
                for p in pieces]
        reductions = [
            Reduction(put.array, put.key,
                      tuple(None if r == stage.me else stage.view(r, first + j, p.at, cut.shape(0, p))
                            for r in range(stage.size)), put.key)
            for p, put in zip(pieces, puts, strict=True)]
        turns.append(Turn(tuple(puts), tuple(reductions)))
    return Script(cut.wholes(), cut.wholes(), tuple(turns))


def in_place(stage: Stage, bands: Bands, homes: Homes, whole: bool = False, last: bool = True) -> Script:
    """Reduction of `bands` of resident arrays straight out of the peers' memory. whole: results lie in whole
    arrays.

    last: with a turn after which all have read, so that their memory may be written again.
    """
    cut = _Cut([bands], stage.itemsize, stage.area)
    forms = cut.wholes()
    reductions = []
    for piece in (p for turn in cut.messages[0] for p in turn):
        key, form = cut.in_whole(0, piece), None if forms is None else forms[piece.array]
        rooms: list[HostArray | None] = []
        for arrays in homes:
            if arrays is None:
                rooms.append(None)
            else:
                home = arrays[piece.array] if form is None else arrays[piece.array].reshape(form)
                rooms.append(home if key is None else home[key])
        reductions.append(Reduction(piece.array, key, tuple(rooms), key if whole else cut.in_part(piece)))
    reading = Turn(reductions=tuple(reductions))
    return Script(forms, forms if whole else cut.parts(0), (reading, Turn()) if last else (reading,))


def wholes(shapes: Sequence[Shape]) -> Bands:
    """Arrays that are not cut."""
    return tuple(Band(1, prod(s), 0, prod(s), s, ()) for s in shapes)


def shares(shapes: Sequence[Shape], size: int) -> list[Bands]:
    """Arrays laid end to end and cut into `size` equal shares, whatever their shapes."""
    ends = list(accumulate(map(prod, shapes), initial=0))
    cuts = accumulate(split_sizes(ends[-1], size), initial=0)
    return [tuple(_share(shape, start - at, stop - at) for shape, at in zip(shapes, ends, strict=False))
            for start, stop in pairwise(cuts)]


def _share(shape: Shape, start: int, stop: int) -> Band:
    """Elements start:stop of an array, as far as it has them."""
    count = prod(shape)
    start, stop = min(max(start, 0), count), min(max(stop, 0), count)
    return Band(1, count, start, stop, (stop - start,), None)
