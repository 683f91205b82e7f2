"""What a collective is, whatever carries it.

A communicator joins `size` ranks. Every rank calls the same verbs in the same order with matching
arguments; sums run in rank order, so all ranks, and all transports but NCCL (see nccl.py), get the same bits.
A wait ends after `timeout` seconds without progress (CommTimeout), when a peer it needs dies (PeerLost) or
when anyone aborts (CommAborted). After any of these the communicator stays unusable: what was exchanged is no
longer known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from meshtape.runtime.collectives.many import Resident

Array = Any


class Communicator(ABC):
    """Arrays are C-contiguous, NumPy's or, for some transports, of one device. A result is the caller's own
    memory; `out`, where given, receives it instead.

    One thread at a time calls the verbs; abort() may come from any other thread. Wrong arguments raise
    ShapeError or DTypeError before anything is sent.

    `calls` counts the verbs that ended well, `bytes_sent` the payload they moved from this rank to others:
    2 (n - 1)/n of an all-reduced array, everybody else's parts of a reduce-scatter, the own part n - 1 times
    in an all-gather, likewise a broadcast at its root. `capturable`: whether verbs can be part of a CUDA
    graph, since all they do is put work on the current stream.
    """

    capturable: bool = False
    rank: int
    size: int
    kind: str
    calls: int
    bytes_sent: int

    @abstractmethod
    def all_reduce(self, x: Array, op: str = "sum", out: Array | None = None) -> Array:
        """The reduction of every rank's `x`, of any shape, by sum, max, min or prod; `out` may be `x`.

        float16 and bfloat16 sums and products accumulate in float32; booleans follow NumPy (sum is "or").
        """

    @abstractmethod
    def reduce_scatter(self, x: Array, counts: Sequence[int], op: str = "sum",
                       out: Array | None = None) -> Array:
        """Chunk `rank` of the reduction of every rank's 1-D `x`, whose chunk r has counts[r] elements.

        `out` may be x's own chunk `rank`.
        """

    @abstractmethod
    def all_gather(self, x: Array, counts: Sequence[int], out: Array | None = None) -> Array:
        """Every rank's 1-D `x` (counts[rank] elements) end to end; `x` may be chunk `rank` of `out`."""

    def resident(self, shapes: Sequence[tuple[int, ...]], dtype: Any, start: int = 0) -> Resident | None:
        """Arrays in memory that the peers can read, for addends of all_reduce_many or reduce_scatter_many
        (`via`), which then need not be copied to be sent. None if the transport has no such memory, or no
        more of it.

        The memory is one for all callers; arrays stand in it from byte `start` on, and what is used at the
        same time must not overlap (Resident.stop tells where to go on). All ranks ask for the same. It may be
        written at any time but during a collective that it goes through.
        """
        return None

    def check(self) -> None:
        """Raise what has gone wrong with verbs that were begun and not waited for.

        On a stream, a collective that fails only ends, with values that mean nothing: ask after waiting for
        the stream, before its results are believed, and before a graph with collectives is launched.
        """
        return None

    def launched(self, calls: int, sent: int) -> None:
        """A graph was launched on the current stream, in which `calls` verbs that move `sent` bytes were
        recorded.
        """
        self.calls += calls
        self.bytes_sent += sent

    def agree(self, proposal: int) -> int:
        """The least of all ranks' proposals, small numbers, where ranks must do alike what each decides by
        itself: whether verbs are recorded or replayed in CUDA graphs has to be uniform. The host waits for
        its peers; streams do not.
        """
        return proposal

    @abstractmethod
    def all_reduce_many(self, arrays: Sequence[Array], op: str = "sum", out: Sequence[Array] | None = None,
                        via: Resident | None = None) -> list[Array]:
        """all_reduce of each of several arrays of one dtype, in one message: the same bits.

        Results go to `out`, one array for each given one and of its shape; by default over the given arrays.
        out[i] may be arrays[i], and overlaps no other of `arrays`.

        via: resident arrays of these shapes, the same on all ranks. Peers read the addends there; where
        arrays[i] is not via.arrays[i] itself, it is copied there. Then `out` is outside resident memory, and
        fresh arrays by default.
        """

    @abstractmethod
    def reduce_scatter_many(self, arrays: Sequence[Array], dims: Sequence[int], op: str = "sum",
                            out: Sequence[Array] | None = None, via: Resident | None = None) -> list[Array]:
        """This rank's parts of the reductions of several arrays of one dtype, in one message.

        arrays[i] is cut along dims[i] into one part per rank, of extents split_sizes(extent, size). Every
        part is a C-contiguous array, out[i] if given, which overlaps none of `arrays`. `via` as above.
        """

    @abstractmethod
    def all_gather_many(self, parts: Sequence[Array], dims: Sequence[int], shapes: Sequence[tuple[int, ...]],
                        out: Sequence[Array] | None = None) -> list[Array]:
        """Whole arrays of `shapes`, of one dtype, from every rank's parts, in one message.

        parts[i] is this rank's part of array i, cut as in reduce_scatter_many; inside `out` it may lie only
        where it belongs. Results are C-contiguous, out[i] if given.
        """

    @abstractmethod
    def all_to_all(self, x: Array, send_counts: Sequence[int], recv_counts: Sequence[int],
                   out: Array | None = None) -> Array:
        """Chunk r of the 1-D `x` goes to rank r; the chunks received stand in the result in rank order."""

    @abstractmethod
    def broadcast(self, x: Array, root: int, out: Array | None = None) -> Array:
        """The root's `x`. Elsewhere `x` gives shape and dtype, and is written only if it is also `out`."""

    @abstractmethod
    def send(self, x: Array, dst: int) -> None:
        """Send `x` to rank `dst`, which calls recv(); a large send may wait for that call."""

    @abstractmethod
    def recv(self, out: Array, src: int) -> Array:
        """Fill `out` with what rank `src` sent, and return it."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called barrier()."""

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Make every rank that waits, now or later, raise CommAborted(reason) within a second."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. A peer that still needs this rank gets PeerLost."""
