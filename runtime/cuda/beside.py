"""Collectives on a stream of their own, beside the kernels of the compute stream."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any


class Pending:
    """A collective that was put on the communication stream; `began` and `ended` frame the host's part."""

    __slots__ = ("_beside", "_done", "_value", "began", "ended")

    def __init__(self, beside: Beside, value: Any, done: Any, began: int) -> None:
        self._beside, self._value, self._done = beside, value, done
        self.began, self.ended = began, perf_counter_ns()

    def result(self) -> Any:
        """What it returned; the compute stream goes on only when it is done."""
        self._beside.compute.wait_event(self._done)
        return self._value


class Beside:
    """The communication stream of one device.

    A collective starts when all that was put on the compute stream before is done, so it may read any of it,
    and take memory that the compute stream was the last to use. Nobody gives back its operands before
    result() was called.
    """

    def __init__(self, device: Any) -> None:
        self._cuda = device.cp.cuda
        self.compute = device.stream
        with device.handle:
            self.stream = self._cuda.Stream(non_blocking=True)

    def start(self, function: Callable[..., Any], *args: Any) -> Pending:
        """Put `function(*args)` on the communication stream, after all that was put there before."""
        began = perf_counter_ns()
        ready, done = (self._cuda.Event(disable_timing=True) for _ in range(2))
        ready.record(self.compute)
        self.stream.wait_event(ready)
        with self.stream:
            value = function(*args)
        done.record(self.stream)
        return Pending(self, value, done, began)

    def close(self) -> None:
        """Wait for what is under way."""
        self.stream.synchronize()
