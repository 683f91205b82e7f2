"""What changes from run to run of a program on a device, at addresses that stay: fed arrays and numbers.

Copies from ordinary host memory: the driver takes the bytes before the call returns, so the host's arrays
are free at once, while the device sees them in the order of its stream.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

MASK64 = 2**64 - 1


class Inputs:
    """Fed arrays of the given (shape, dtype), and the scalars named by (index, letter): "d" are float64, "i"
    int64 (of unsigned numbers the bits), each a 0-d array in `numbers` under that key.
    """

    def __init__(self, device: Any, feeds: Sequence[tuple[Any, Any]],
                 wanted: Sequence[tuple[int, str]]) -> None:
        cp = device.cp
        self._device = device
        self._feeds = [cp.empty(shape, dtype) for shape, dtype in feeds]
        self._wanted = tuple(wanted)
        self._format = struct.Struct("=" + "".join("d" if letter == "d" else "Q" for _, letter in wanted))
        self._words = cp.empty(max(1, len(wanted)), np.int64)
        floats = self._words.view(np.float64)
        self.numbers = {(index, letter): (floats if letter == "d" else self._words)[k:k + 1].reshape(())
                        for k, (index, letter) in enumerate(wanted)}
        self._sent = b""

    def load(self, feeds: Sequence[Any], scalars: Sequence[Any]) -> list[Any]:
        """Copy one run's values to the device; the fed arrays there. They are good until the next run."""
        if self._wanted:
            packed = self._format.pack(*[
                float(scalars[index]) if letter == "d" else int(scalars[index]) & MASK64
                for index, letter in self._wanted])
            if packed != self._sent:
                self._copy(self._words, np.frombuffer(packed, np.int64))
                self._sent = packed
        for target, given in zip(self._feeds, feeds, strict=True):
            if type(given) is not np.ndarray:
                target[...] = given                     # an array of this device's
            elif given.size:
                self._copy(target, np.ascontiguousarray(given))
        return list(self._feeds)

    def _copy(self, target: Any, host: Any) -> None:
        target.data.copy_from_host_async(host.ctypes.data, host.nbytes, self._device.stream)
