"""What all transports of NumPy arrays share, and the transport of a group of one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from meshtape.runtime.collectives.base import Array
from meshtape.runtime.collectives.checked import CheckedCommunicator
from meshtape.runtime.collectives.many import Plan
from meshtape.runtime.collectives.reduction import HostArray
from meshtape.runtime.errors import ShapeError


class HostCommunicator(CheckedCommunicator):
    """Takes and gives NumPy arrays."""

    array = np.ndarray

    @abstractmethod
    def poll(self, needed: bool) -> None:
        """Without waiting: raise CommAborted if anyone aborted, and PeerLost if one of the peers is gone and
        they are `needed`. Another thread than that of the verbs may call it while no verb is under way.
        """

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
        return np.empty(shape, dtype)

    def _plain(self, x: Array) -> bool:
        return bool(x.flags.carray)

    def _overlap(self, a: Array, b: Array) -> bool:
        return np.may_share_memory(a, b)

    def _check_out(self, verb: str, out: Array) -> None:
        super()._check_out(verb, out)
        if not out.flags.writeable:
            raise ShapeError(f"{verb}: out is read-only; pass an array that can be written")


class SelfCommunicator(HostCommunicator):
    """A group of one: every collective is a copy."""

    kind = "self"

    def __init__(self) -> None:
        super().__init__(rank=0, size=1, timeout=0.0)

    def poll(self, needed: bool) -> None:
        pass

    def _copy(self, call: int, plan: Plan, arrays: Sequence[HostArray], outs: Sequence[HostArray]) -> None:
        for x, out in zip(arrays, outs, strict=True):
            np.copyto(out, x)

    _all_reduce = _reduce_scatter = _all_gather = _copy

    def _all_to_all(self, call: int, x: HostArray, send: tuple[int, ...], recv: tuple[int, ...],
                    out: HostArray) -> None:
        np.copyto(out, x)

    def _broadcast(self, call: int, buffer: HostArray, root: int) -> None:
        pass

    def _send(self, call: int, x: HostArray, dst: int) -> None:
        raise AssertionError("no other rank to send to")

    def _recv(self, call: int, out: HostArray, src: int) -> None:
        raise AssertionError("no other rank to receive from")

    def _barrier(self, call: int) -> None:
        pass

    def _abort(self, reason: str) -> None:
        pass

    def _close(self) -> None:
        pass
