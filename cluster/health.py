"""When silence means that a worker is lost.

Workers beat every BEAT_SECONDS from a thread of their own. The driver has no thread: it looks when it waits.
What arrived while it was busy elsewhere is still unread then, so silence is counted only over time in which
the driver was looking.
"""

from __future__ import annotations

import time

BEAT_SECONDS = 0.5


class Pulse:
    """The time of each worker's last sign of life, and the judgement. Times are time.monotonic() seconds."""

    def __init__(self, workers: int, timeout: float) -> None:
        self.timeout = timeout
        now = time.monotonic()
        self._heard = [now] * workers
        self._looking_since = now
        self._looked = now

    def look(self, waited: float = 0.0) -> float:
        """Note that the driver looks again, after a wait meant to last `waited` seconds; returns the time."""
        now = time.monotonic()
        if now - self._looked > waited + 2 * BEAT_SECONDS:
            self._looking_since = now       # it was busy elsewhere, or itself stopped
        self._looked = now
        return now

    def heard(self, rank: int, now: float) -> None:
        self._heard[rank] = now

    def silent(self, now: float) -> int | None:
        """A rank that has been silent for `timeout` seconds, or None."""
        limit = now - self.timeout
        if self._looking_since > limit:
            return None
        return next((rank for rank, heard in enumerate(self._heard) if heard < limit), None)
