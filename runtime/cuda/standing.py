"""Where arrays stand, and cheap answers to whether others stand there now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import ref


class Spot(NamedTuple):
    """Where an array stands: equal spots can stand in for each other in a graph."""

    address: int
    strides: tuple[int, ...]


def spot(array: Any) -> Spot:
    return Spot(array.data.ptr, array.strides)


def moved(before: Sequence[Spot], now: Sequence[Spot]) -> tuple[int, ...]:
    """Positions whose arrays stand elsewhere than in the run before."""
    return tuple(k for k, (a, b) in enumerate(zip(before, now, strict=True)) if a != b)


class Standing:
    """Which of the arrays at numbered positions are others than those that were seen there. An object that is
    still there stands where it stood, and finding that out costs much less than looking.
    """

    def __init__(self, count: int) -> None:
        self._ids = [0] * count
        self._refs: list[Any] = [None] * count

    def others(self, arrays: Sequence[Any]) -> Sequence[int]:
        """Their positions."""
        now = list(map(id, arrays))
        if now == self._ids:
            return ()
        return [k for k, (a, b) in enumerate(zip(now, self._ids, strict=True)) if a != b]

    def see(self, k: int, array: Any) -> None:
        """From now on, `array` is no other at position k; when it goes, whatever has its id is."""
        ids = self._ids

        def gone(_: Any) -> None:
            ids[k] = 0

        ids[k], self._refs[k] = id(array), ref(array, gone)


def picker(slots: Sequence[int]) -> Callable[[Sequence[int]], Iterable[int]]:
    """The function that takes ids[slot] for each of the slots."""
    if len(slots) > 1:
        return itemgetter(*slots)
    return lambda ids: [ids[slot] for slot in slots]
