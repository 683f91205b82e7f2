"""What all transports share: checking arguments, making results, remembering a failure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextvars import copy_context
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.collectives.base import Array, Communicator
from meshtape.runtime.collectives.call import encode, verb_of
from meshtape.runtime.collectives.many import Bands, Plan, Resident, cut, cut_by_counts
from meshtape.runtime.collectives.reduction import UFUNCS, direct
from meshtape.runtime.errors import CommAborted, CommError, DTypeError, ShapeError

_NOTHING = np.dtype(np.uint8)
_Shapes = tuple[tuple[int, ...], ...]
# Plans that a communicator keeps.
_PLANS = 512


class CheckedCommunicator(Communicator):
    """Turns each verb into one call of a transport's hook, with checked arrays and complete counts.

    Hooks get the `call` word and raise nothing but CommError on purpose. Reductions and gathers of one array
    and of many are the same to them; other hooks get 1-D arrays.

    `array` is the class of arrays that the communicator takes, `capturable` says whether its verbs can be
    recorded in a CUDA graph: they begin work on the current stream and wait for nothing.
    """

    array: Any
    capturable = False

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        if not 0 <= rank < size:
            raise ShapeError(f"rank {rank} is not in a group of {size}; use 0 to {size - 1}")
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.calls = 0
        self.bytes_sent = 0
        self._failure: CommError | None = None
        self._closed = False
        self._plans: dict[tuple[Any, ...], Plan] = {}
        # Overflow to infinity is the caller's result, never a warning: one raised as an error would stop this
        # rank alone and leave the others waiting. A context costs less per call than np.errstate.
        self._quiet = copy_context()
        self._quiet.run(np.seterr, all="ignore")

    def all_reduce(self, x: Array, op: str = "sum", out: Array | None = None) -> Array:
        plan = self._plan("all_reduce", (x,), None, None, op)
        outs = self._results("all_reduce", plan, plan.shapes, None if out is None else (out,))
        self._run(self._all_reduce, plan.call, plan.sent, plan, (x,), outs)
        return outs[0]

    def reduce_scatter(self, x: Array, counts: Sequence[int], op: str = "sum",
                       out: Array | None = None) -> Array:
        self._check("reduce_scatter", x, op)
        counts = self._counts("reduce_scatter", counts, x, sum(counts))
        plan = self._counted_plan("reduce_scatter", op, x.dtype, counts)
        out = self._result("reduce_scatter", (counts[self.rank],), x.dtype, out)
        self._run(self._reduce_scatter, plan.call, plan.sent, plan, (x,), (out,))
        return out

    def all_gather(self, x: Array, counts: Sequence[int], out: Array | None = None) -> Array:
        self._check("all_gather", x)
        counts = self._counts("all_gather", counts, x, None)
        plan = self._counted_plan("all_gather", "", x.dtype, counts)
        out = self._result("all_gather", plan.shapes[0], x.dtype, out)
        self._run(self._all_gather, plan.call, plan.sent, plan, (x,), (out,))
        return out

    def all_reduce_many(self, arrays: Sequence[Array], op: str = "sum", out: Sequence[Array] | None = None,
                        via: Resident | None = None) -> list[Array]:
        plan = self._plan("all_reduce_many", arrays, None, None, op, via)
        if via is None:
            outs = self._results("all_reduce_many", plan, plan.shapes, arrays if out is None else out)
        else:
            outs = self._results("all_reduce_many", plan, plan.shapes, out)
            arrays = _brought_home(arrays, via)
        self._run(self._all_reduce, plan.call, plan.sent, plan, arrays, outs)
        return outs

    def reduce_scatter_many(self, arrays: Sequence[Array], dims: Sequence[int], op: str = "sum",
                            out: Sequence[Array] | None = None, via: Resident | None = None) -> list[Array]:
        plan = self._plan("reduce_scatter_many", arrays, tuple(dims), None, op, via)
        outs = self._results("reduce_scatter_many", plan, plan.mine, out)
        if via is not None:
            arrays = _brought_home(arrays, via)
        self._run(self._reduce_scatter, plan.call, plan.sent, plan, arrays, outs)
        return outs

    def all_gather_many(self, parts: Sequence[Array], dims: Sequence[int], shapes: Sequence[tuple[int, ...]],
                        out: Sequence[Array] | None = None) -> list[Array]:
        plan = self._plan("all_gather_many", parts, tuple(dims), tuple(shapes), "")
        outs = self._results("all_gather_many", plan, plan.shapes, out)
        self._run(self._all_gather, plan.call, plan.sent, plan, parts, outs)
        return outs

    def all_to_all(self, x: Array, send_counts: Sequence[int], recv_counts: Sequence[int],
                   out: Array | None = None) -> Array:
        self._check("all_to_all", x)
        send = self._counts("all_to_all send", send_counts, x, sum(send_counts))
        recv = self._counts("all_to_all receive", recv_counts, None, None)
        if send[self.rank] != recv[self.rank]:
            raise ShapeError(f"all_to_all: rank {self.rank} sends itself {send[self.rank]} elements but "
                             f"expects {recv[self.rank]}; make send_counts and recv_counts agree there")
        out = self._result("all_to_all", (sum(recv),), x.dtype, out)
        if self._overlap(x, out):
            raise ShapeError("all_to_all: out overlaps x; give it memory of its own")
        sent = (x.size - send[self.rank]) * x.itemsize
        self._run(self._all_to_all, encode("all_to_all", "", x.dtype, 0), sent, x, send, recv, out)
        return out

    def broadcast(self, x: Array, root: int, out: Array | None = None) -> Array:
        self._check("broadcast", x)
        if not 0 <= root < self.size:
            raise ShapeError(f"broadcast: root {root} is not in a group of {self.size}")
        out = self._result("broadcast", x.shape, x.dtype, out)
        call = encode("broadcast", "", x.dtype, x.size, (root,))
        if root == self.rank and out is not x:
            out[...] = x
        sent = x.nbytes * (self.size - 1) if root == self.rank else 0
        self._run(self._broadcast, call, sent, out.reshape(-1), root)
        return out

    def send(self, x: Array, dst: int) -> None:
        self._check("send", x)
        self._peer("send", dst)
        self._run(self._send, encode("send", "", x.dtype, x.size), x.nbytes, x.reshape(-1), dst)

    def recv(self, out: Array, src: int) -> Array:
        self._check_out("recv", out)
        self._peer("recv", src)
        self._run(self._recv, encode("send", "", out.dtype, out.size), 0, out.reshape(-1), src)
        return out

    def barrier(self) -> None:
        self._run(self._barrier, encode("barrier", "", _NOTHING, 0), 0)

    def abort(self, reason: str) -> None:
        self._failure = self._failure or CommAborted(reason)
        if not self._closed:
            self._abort(reason)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._failure = self._failure or CommError(f"rank {self.rank}: this communicator was closed")
            self._close()

    def _run(self, hook: Callable[..., None], call: int, sent: int, *args: Any) -> None:
        if self._failure is not None:
            self._raise_failure()
        try:
            self._quiet.run(hook, call, *args)
            self.calls += 1
            self.bytes_sent += sent
        except CommError as error:
            self._failure = self._failure or error
            if type(error) is CommError:
                # The ranks disagree on what they do. The others need not have seen it, and would wait.
                self.abort(str(error))
            raise
        except BaseException as error:
            # The peers are in the middle of this verb and would wait for their whole timeout.
            self.abort(f"rank {self.rank} failed in {verb_of(call)}: {error!r}")
            raise

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))

    def _check(self, verb: str, x: Array, op: str = "sum") -> None:
        if not isinstance(x, self.array):
            raise DTypeError(f"{verb}: got {type(x).__module__}.{type(x).__name__}, needs a "
                             f"{self.array.__module__.partition('.')[0]} array")
        if not x.flags.c_contiguous:
            raise ShapeError(f"{verb}: an array of shape {x.shape} with strides {x.strides} is not "
                             "C-contiguous; pass ascontiguousarray(x)")
        if op not in UFUNCS:
            raise ShapeError(f"{verb}: unknown reduction {op!r}; use one of {', '.join(UFUNCS)}")

    def _check_out(self, verb: str, out: Array) -> None:
        self._check(verb, out)

    def _result(self, verb: str, shape: tuple[int, ...], dtype: np.dtype[Any],
                out: Array | None) -> Array:
        if out is None:
            return self._empty(shape, dtype)
        self._check_out(verb, out)
        if out.shape != shape or out.dtype != dtype:
            raise ShapeError(f"{verb}: out is {out.dtype}{list(out.shape)}, the result {dtype}{list(shape)}")
        return out

    def _counts(self, verb: str, counts: Sequence[int], x: Array | None,
                total: int | None) -> tuple[int, ...]:
        """`counts` as a tuple; x must hold `total` elements, or counts[rank] of them if total is None."""
        counts = tuple(int(c) for c in counts)
        if len(counts) != self.size or min(counts) < 0:
            raise ShapeError(f"{verb}: counts {list(counts)} must be {self.size} numbers, none negative")
        if x is not None and (x.ndim != 1 or x.size != (counts[self.rank] if total is None else total)):
            raise ShapeError(f"{verb}: x of shape {x.shape} does not fit counts {list(counts)} on rank "
                             f"{self.rank}; pass a 1-D array of that many elements")
        return counts

    def _plan(self, verb: str, arrays: Sequence[Array], dims: tuple[int, ...] | None,
              wholes: _Shapes | None, op: str, via: Resident | None = None) -> Plan:
        """The plan of a call with these arrays, once they are checked."""
        dtype = getattr(arrays[0], "dtype", None) if len(arrays) else None
        for x in arrays:
            if type(x) is not self.array or not x.flags.c_contiguous:
                self._check(verb, x)
            if x.dtype is not dtype and x.dtype != dtype:
                dtype = None
        if dtype is None:
            given = ", ".join(str(x.dtype) for x in arrays) or "nothing"
            raise DTypeError(f"{verb}: got arrays of {given}; pass one or more, all of one dtype")
        homes = () if via is None else via.starts
        key = (verb, op, dtype, tuple([x.shape for x in arrays]), dims, wholes, homes)
        plan = self._plans.get(key)
        if plan is not None:
            return plan
        if via is not None and [(x.shape, x.dtype) for x in via.arrays] != [(x.shape, dtype) for x in arrays]:
            raise ShapeError(f"{verb}: `via` holds {[x.shape for x in via.arrays]}, the arrays are "
                             f"{[x.shape for x in arrays]} of {dtype}; make it for these")
        return self._remember(key, self._new_plan(*key))

    def _new_plan(self, verb: str, op: str, dtype: np.dtype[Any], shapes: _Shapes,
                  dims: tuple[int, ...] | None, wholes: _Shapes | None, homes: tuple[int, ...]) -> Plan:
        if op not in UFUNCS and verb != "all_gather_many":
            raise ShapeError(f"{verb}: unknown reduction {op!r}; use one of {', '.join(UFUNCS)}")
        whole = shapes if wholes is None else wholes
        if len(whole) != len(shapes) or (dims is not None and len(dims) != len(shapes)):
            raise ShapeError(f"{verb}: got {len(shapes)} arrays, {len(dims or ())} dims and {len(whole)} "
                             "shapes; pass as many of each")
        bands = () if dims is None else cut(whole, dims, self.size)
        # Of a single array only the elements count.
        detail = () if verb == "all_reduce" else (whole, dims, homes)
        plan = self._planned(verb, op, dtype, whole, bands, detail)
        plan.homes = homes
        if wholes is not None and shapes != plan.mine:
            raise ShapeError(f"{verb}: rank {self.rank} of {self.size} gave parts of shapes {list(shapes)}; "
                             f"its parts of {list(whole)} along {list(dims or ())} are {list(plan.mine)}")
        return plan

    def _counted_plan(self, verb: str, op: str, dtype: np.dtype[Any], counts: tuple[int, ...]) -> Plan:
        """The plan of a call with a 1-D array that is cut by counts."""
        key = (verb, op, dtype, counts)
        plan = self._plans.get(key)
        if plan is None:
            bands = cut_by_counts(counts)
            plan = self._remember(key, self._planned(verb, op, dtype, ((sum(counts),),), bands, counts))
        return plan

    def _planned(self, verb: str, op: str, dtype: np.dtype[Any], shapes: _Shapes, bands: tuple[Bands, ...],
                 detail: tuple[Any, ...]) -> Plan:
        total = sum(map(prod, shapes))
        counts = tuple(sum(band.size for band in row) for row in bands)
        if not bands:
            sent = 2 * (self.size - 1) * total // self.size
        elif verb in ("all_gather", "all_gather_many"):
            sent = (self.size - 1) * counts[self.rank]
        else:
            sent = total - counts[self.rank]
        return Plan(encode(verb, op, dtype, total, detail), op, dtype, shapes, bands, counts,
                    tuple(band.shape for band in bands[self.rank]) if bands else (), sent * dtype.itemsize,
                    direct(dtype, op) if op else None)

    def _remember(self, key: tuple[Any, ...], plan: Plan) -> Plan:
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        self._plans[key] = plan
        return plan

    def _results(self, verb: str, plan: Plan, shapes: _Shapes, out: Sequence[Array] | None) -> list[Array]:
        if out is None:
            return [self._empty(shape, plan.dtype) for shape in shapes]
        if len(out) != len(shapes):
            raise ShapeError(f"{verb}: got {len(out)} arrays for {len(shapes)} results; pass one for each")
        for x, shape in zip(out, shapes, strict=True):
            if type(x) is not self.array or x.shape != shape or x.dtype != plan.dtype or not self._plain(x):
                self._result(verb, shape, plan.dtype, x)
        return list(out)

    def _peer(self, verb: str, rank: int) -> None:
        if not 0 <= rank < self.size or rank == self.rank:
            raise ShapeError(f"{verb}: {rank} is not another rank of a group of {self.size}; this is rank "
                             f"{self.rank}")

    @abstractmethod
    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """A fresh C-contiguous array, not initialised."""

    @abstractmethod
    def _plain(self, x: Array) -> bool:
        """Whether an array is C-contiguous and can be written."""

    @abstractmethod
    def _overlap(self, a: Array, b: Array) -> bool:
        """Whether two arrays may share memory."""

    @abstractmethod
    def _all_reduce(self, call: int, plan: Plan, arrays: Sequence[Array],
                    outs: Sequence[Array]) -> None: ...

    @abstractmethod
    def _reduce_scatter(self, call: int, plan: Plan, arrays: Sequence[Array],
                        outs: Sequence[Array]) -> None: ...

    @abstractmethod
    def _all_gather(self, call: int, plan: Plan, arrays: Sequence[Array],
                    outs: Sequence[Array]) -> None: ...

    @abstractmethod
    def _all_to_all(self, call: int, x: Array, send: tuple[int, ...], recv: tuple[int, ...],
                    out: Array) -> None: ...

    @abstractmethod
    def _broadcast(self, call: int, buffer: Array, root: int) -> None: ...

    @abstractmethod
    def _send(self, call: int, x: Array, dst: int) -> None: ...

    @abstractmethod
    def _recv(self, call: int, out: Array, src: int) -> None: ...

    @abstractmethod
    def _barrier(self, call: int) -> None: ...

    @abstractmethod
    def _abort(self, reason: str) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


def _brought_home(arrays: Sequence[Array], via: Resident) -> Sequence[Array]:
    """The resident arrays, once they hold what is in `arrays`."""
    for x, home in zip(arrays, via.arrays, strict=True):
        if x is not home:
            home[...] = x
    return via.arrays
