"""What communicators of device arrays share, how parts of such arrays are packed, and a group of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meshtape.runtime.collectives.base import Array
from meshtape.runtime.collectives.checked import CheckedCommunicator
from meshtape.runtime.collectives.many import Band, Plan


class DeviceCommunicator(CheckedCommunicator):
    """Takes and gives arrays of one CUDA device (runtime.cuda.device.Device).

    Work goes to the current stream of the thread that calls a verb.
    """

    def __init__(self, rank: int, size: int, timeout: float, device: Any) -> None:
        super().__init__(rank, size, timeout)
        self.device = device
        self.array = device.cp.ndarray

    def check(self) -> None:
        self._raise_failure()

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return self.device.cp.empty(shape, dtype)

    def _plain(self, x: Array) -> bool:
        return bool(x.flags.c_contiguous)

    def _overlap(self, a: Array, b: Array) -> bool:
        a_at, b_at = a.data.ptr, b.data.ptr
        return bool(a.size and b.size and a_at < b_at + b.nbytes and b_at < a_at + a.nbytes)


class OneDevice(DeviceCommunicator):
    """A group of one: every collective is a copy."""

    kind = "self"
    capturable = True

    def __init__(self, device: Any) -> None:
        super().__init__(rank=0, size=1, timeout=0.0, device=device)

    def _copy(self, call: int, plan: Plan, arrays: Sequence[Array], outs: Sequence[Array]) -> None:
        for x, out in zip(arrays, outs, strict=True):
            if x is not out:
                out[...] = x

    _all_reduce = _reduce_scatter = _all_gather = _copy

    def _all_to_all(self, call: int, x: Array, send: tuple[int, ...], recv: tuple[int, ...],
                    out: Array) -> None:
        out[...] = x

    def _broadcast(self, call: int, buffer: Array, root: int) -> None:
        pass

    def _send(self, call: int, x: Array, dst: int) -> None:
        raise AssertionError("no other rank to send to")

    def _recv(self, call: int, out: Array, src: int) -> None:
        raise AssertionError("no other rank to receive from")

    def _barrier(self, call: int) -> None:
        pass

    def _abort(self, reason: str) -> None:
        pass

    def _close(self) -> None:
        pass


def pack(flat: Array, x: Array, bands: Sequence[Band]) -> None:
    """Every rank's part of `x` into the 1-D `flat`, in rank order, each in C order; bands[r] is rank r's."""
    for ours, theirs in zip(_blocks(flat, bands), _columns(x, bands), strict=True):
        ours[...] = theirs


def unpack(flat: Array, out: Array, bands: Sequence[Band]) -> None:
    """The inverse of pack."""
    for ours, theirs in zip(_blocks(flat, bands), _columns(out, bands), strict=True):
        theirs[...] = ours


def _even(bands: Sequence[Band]) -> bool:
    return all(band.width == bands[0].width for band in bands)


def _columns(x: Array, bands: Sequence[Band]) -> list[Array]:
    """The parts of `x`, as one view if they are equal."""
    rows, columns = bands[0].rows, bands[0].columns
    if _even(bands):
        return [x.reshape(rows, len(bands), bands[0].width).transpose(1, 0, 2)]
    matrix = x.reshape(rows, columns)
    return [matrix[:, band.start:band.stop] for band in bands if band.width]


def _blocks(flat: Array, bands: Sequence[Band]) -> list[Array]:
    """Where the parts are in `flat`, shaped as in _columns."""
    rows = bands[0].rows
    if _even(bands):
        return [flat.reshape(len(bands), rows, bands[0].width)]
    return [flat[rows * band.start:rows * band.stop].reshape(rows, band.width)
            for band in bands if band.width]
