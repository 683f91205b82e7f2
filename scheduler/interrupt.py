"""Ctrl-C between two batches instead of in the middle of one."""

from __future__ import annotations

# The functions under those of `signal`, which spend 5 us on making enums: here they run for every batch.
from _signal import SIGINT, getsignal, signal  # type: ignore[import-not-found]
from threading import get_ident, main_thread
from types import FrameType
from typing import Any


class Whole:
    """A block that Ctrl-C does not break in two: the first is acted on after the block, a second one at once.

    Without effect outside the main thread, where Python handles no signals, and where the program has no
    handler for SIGINT.
    """

    __slots__ = ("_before", "_pressed")

    def __enter__(self) -> None:
        self._before: Any = None
        self._pressed = False
        if get_ident() == main_thread().ident:
            before = getsignal(SIGINT)
            if callable(before):
                self._before = before
                signal(SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            self._before(number, frame)
        self._pressed = True

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            signal(SIGINT, self._before)
            if self._pressed:
                self._before(SIGINT, None)
