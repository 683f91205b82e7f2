"""cupy.cuda.nccl between threads of one process, one rank each.

Calls inside a group wait for its end. A rank's group then is one piece of work on its stream, recorded if
that is being captured: it lays down what it gives, and ends when all that it takes is there, or when its
communicator is aborted. Where NCCL would hang or mix up data because ranks make different calls, all of them
get an AssertionError. A maximum of floats loses NaNs here, as NCCL's may.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16

from emulator import streams
from emulator.memory import bytes_at
from emulator.order import READ, WRITE, span
from meshtape.runtime.collectives.reduction import reduce_into

available = True
NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN, NCCL_AVG = range(5)
DTYPES = ("int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", bfloat16)
UFUNCS = {NCCL_SUM: "sum", NCCL_PROD: "prod", NCCL_MAX: "max", NCCL_MIN: "min"}
# Seconds after which a test is told that a rank waits in vain; NCCL itself would wait for ever.
PATIENCE = 30.0
VERSION = [22803]

Bytes = np.ndarray[Any, Any]


class NcclError(RuntimeError):
    """As cupy.cuda.nccl.NcclError."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"NCCL_ERROR {status}: emulated")


def get_version() -> int:
    return VERSION[0]


def get_build_version() -> int:
    return 22707


def get_unique_id() -> bytes:
    return os.urandom(128)


class Call(NamedTuple):
    """One verb of one rank; `source` and `target` are device memory, None where it has none."""

    verb: str
    signature: tuple[Any, ...]
    source: Bytes | None
    target: Bytes | None
    peer: int = -1


class World:
    """What the communicators of one unique id share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.here: set[int] = set()
        self.turns = [0] * size                                 # collectives that each rank has begun
        self.tables: dict[int, dict[int, Call]] = {}            # what ranks laid down, by number
        self.left: dict[int, int] = {}
        self.mail: dict[tuple[int, int], deque[list[Any]]] = {}
        self.aborted: set[int] = set()
        self.failed: set[int] = set()                           # ranks with an asynchronous error
        self.wrong = ""

    def wait(self, rank: int, ready: Callable[[], bool], what: str) -> bool:
        """True when `ready`, False if the rank's communicator is aborted first."""
        def done() -> bool:
            return (ready() and rank not in self.failed) or rank in self.aborted or bool(self.wrong)

        assert self.changed.wait_for(done, PATIENCE), f"rank {rank} waits in vain in {what}"
        assert not self.wrong, self.wrong
        return rank not in self.aborted

    def run(self, rank: int, calls: list[Call]) -> None:
        """A group of calls, as the kernels of one rank do it."""
        with self.changed:
            begun = [self._begin(rank, call) for call in calls]
            self.changed.notify_all()
            # Within a group nothing waits for its turn; sends end last here, since they wait for others.
            pairs = sorted(zip(calls, begun, strict=True), key=lambda pair: pair[0].verb == "send")
            for at, (call, token) in enumerate(pairs):
                if not self._end(rank, call, token):
                    for spoiled, _ in pairs[at:]:
                        if spoiled.target is not None:
                            spoiled.target[:] = 0xEE
                    return

    def _begin(self, rank: int, call: Call) -> Any:
        given = None if call.source is None else call.source.copy()
        if call.verb == "send":
            letter = [call.signature, given, False]
            self.mail.setdefault((rank, call.peer), deque()).append(letter)
            return letter
        if call.verb == "recv":
            return None
        turn = self.turns[rank]
        self.turns[rank] += 1
        self.tables.setdefault(turn, {})[rank] = call._replace(source=given)
        return turn

    def _end(self, rank: int, call: Call, token: Any) -> bool:
        if call.verb == "send":
            return self.wait(rank, lambda: token[2], f"send to {call.peer}")
        if call.verb == "recv":
            box = self.mail.setdefault((call.peer, rank), deque())
            if not self.wait(rank, lambda: bool(box), f"recv from {call.peer}"):
                return False
            signature, data, _ = letter = box.popleft()
            self._agree(signature == call.signature,
                        f"rank {rank} receives {call.signature} from {call.peer}, which sends {signature}")
            assert call.target is not None
            call.target[:] = data
            letter[2] = True
            self.changed.notify_all()
            return True
        table = self.tables[token]
        if not self.wait(rank, lambda: len(table) == self.size, call.verb):
            return False
        self._agree(len({(c.verb, c.signature) for c in table.values()}) == 1,
                    f"ranks make different calls: { {r: (c.verb, c.signature) for r, c in table.items()} }")
        self._result(rank, call, [table[r] for r in range(self.size)])
        self.left[token] = self.left.get(token, 0) + 1
        if self.left[token] == self.size:
            del self.tables[token], self.left[token]
        return True

    def _agree(self, right: bool, text: str) -> None:
        if not right:
            self.wrong = self.wrong or text
            self.changed.notify_all()
            raise AssertionError(text)

    def _result(self, rank: int, call: Call, calls: list[Call]) -> None:
        given = [c.source for c in calls]
        count, kind, op, root, _ = call.signature
        match call.verb:
            case "allReduce":
                total = reduced(given, kind, op)
            case "reduce":
                total = reduced(given, kind, op) if rank == root else None
            case "reduceScatter":
                size = count * np.dtype(DTYPES[kind]).itemsize
                total = reduced([g[rank * size:(rank + 1) * size] for g in given if g is not None], kind, op)
            case "allGather":
                total = np.concatenate(given)       # type: ignore[arg-type]
            case "broadcast":
                total = given[root]
            case verb:
                raise AssertionError(verb)
        if total is not None:
            assert call.target is not None
            call.target[:] = total


def reduced(given: list[Any], kind: int, op: int) -> Bytes:
    """The reduction of arrays of bytes."""
    parts = [g.view(DTYPES[kind]) for g in given]
    if op in (NCCL_MAX, NCCL_MIN) and parts[0].dtype.kind not in "iu":
        total = parts[0]
        for part in parts[1:]:
            total = (np.fmax if op == NCCL_MAX else np.fmin)(total, part)
    else:
        total = np.empty_like(parts[0])
        with np.errstate(all="ignore"):
            reduce_into(total, parts, UFUNCS[op])
    found: Bytes = np.ascontiguousarray(total).view(np.uint8)
    return found


class Group(threading.local):
    """This thread's group: how deep it is, and what waits in it."""

    def __init__(self) -> None:
        self.depth = 0
        self.calls: list[tuple[NcclCommunicator, int, Call]] = []


_worlds: dict[bytes, World] = {}
_lock = threading.Lock()
_group = Group()


def groupStart() -> None:
    _group.depth += 1


def groupEnd() -> None:
    if not _group.depth:
        raise NcclError(5)
    _group.depth -= 1
    if not _group.depth:
        calls, _group.calls = _group.calls, []
        _begin(calls)


def _begin(calls: list[tuple[NcclCommunicator, int, Call]]) -> None:
    """Put the calls of a group on their streams, one piece of work for each communicator and stream."""
    together: dict[Any, list[Call]] = {}
    for comm, stream, call in calls:
        together.setdefault((comm, stream), []).append(call)
    for (comm, stream), group in together.items():
        current = streams.current_stream()
        assert current.ptr == stream, "NCCL's work belongs on the current stream"
        world, rank = comm._use()
        touches = [span(memory, how) for call in group
                   for memory, how in ((call.source, READ), (call.target, WRITE)) if memory is not None]
        streams.work(lambda world=world, rank=rank, group=group: world.run(rank, group), current, touches)


class NcclCommunicator:
    """As cupy.cuda.nccl.NcclCommunicator."""

    def __init__(self, ndev: int, commId: bytes, rank: int, config: Any = None) -> None:
        if not isinstance(commId, bytes) or len(commId) != 128:
            raise ValueError("commId must be the 128 bytes of get_unique_id()")
        with _lock:
            world = _worlds.setdefault(commId, World(ndev))
        assert world.size == ndev and 0 <= rank < ndev
        self._world: World | None = world
        self._rank = rank
        with world.changed:
            assert rank not in world.here, f"two ranks {rank}"
            world.here.add(rank)
            world.changed.notify_all()
            world.wait(rank, lambda: len(world.here) == ndev, "ncclCommInitRank")

    def _use(self) -> tuple[World, int]:
        assert self._world is not None, "a communicator is used after abort() or destroy()"
        return self._world, self._rank

    def rank_id(self) -> int:
        return self._use()[1]

    def size(self) -> int:
        return self._use()[0].size

    def destroy(self) -> None:
        self._world = None

    def abort(self) -> None:
        if self._world is not None:
            with self._world.changed:
                self._world.aborted.add(self._rank)
                self._world.changed.notify_all()
            self._world = None

    def check_async_error(self) -> None:
        if self._rank in self._use()[0].failed:
            raise NcclError(6)

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        self._call("allReduce", sendbuf, count, recvbuf, count, count, datatype, stream, op)

    def reduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int,
               stream: int) -> None:
        here = count if root == self._rank else 0
        self._call("reduce", sendbuf, count, recvbuf, here, count, datatype, stream, op, root)

    def broadcast(self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int,
                  stream: int) -> None:
        here = count if root == self._rank else 0
        self._call("broadcast", sendbuff, here, recvbuff, count, count, datatype, stream, root=root)

    def reduceScatter(self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int,
                      stream: int) -> None:
        size = self._use()[0].size
        self._call("reduceScatter", sendbuf, recvcount * size, recvbuf, recvcount, recvcount, datatype,
                   stream, op)

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        self._call("allGather", sendbuf, count, recvbuf, count * self._use()[0].size, count, datatype, stream)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._call("send", sendbuf, count, 0, 0, count, datatype, stream, peer=peer)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._call("recv", 0, 0, recvbuf, count, count, datatype, stream, peer=peer)

    def _call(self, verb: str, source: int, given: int, target: int, taken: int, count: int, datatype: int,
              stream: int, op: int = -1, root: int = -1, peer: int = -1) -> None:
        world, rank = self._use()
        for number in (source, target, count, datatype, op, root, peer, stream):
            assert isinstance(number, int), f"{verb}: CuPy takes integers, got {type(number).__name__}"
        assert count > 0 and (source or not given) and (target or not taken), f"{verb}: null pointer, no data"
        assert 0 <= datatype < len(DTYPES) and op < NCCL_AVG and peer != rank and peer < world.size
        itemsize = np.dtype(DTYPES[datatype]).itemsize
        recorded = streams.capturing()      # uniform over all ranks, says NCCL
        call = Call(verb, (count, datatype, op, root, recorded),
                    bytes_at(source, given * itemsize) if given else None,
                    bytes_at(target, taken * itemsize) if taken else None, peer)
        if _group.depth:
            _group.calls.append((self, stream, call))
        else:
            _begin([(self, stream, call)])


def fail(comm: NcclCommunicator) -> None:
    """Give a rank an asynchronous error, as a broken link would: its kernels stop until it aborts."""
    world, rank = comm._use()
    with world.changed:
        world.failed.add(rank)
        world.changed.notify_all()
