"""Deadlines and bad news for collectives that a host has begun and does not wait for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from meshtape.runtime.collectives.call import describe
from meshtape.runtime.errors import CommAborted, CommError, CommTimeout, PeerLost

# Seconds between looks: an abort reaches everybody within a second.
LOOK = 0.1


class Watch:
    """A thread that looks after one communicator.

    ask(needed) raises what is known to have gone wrong (`needed`: the peers are); tell(error) is called once,
    from the thread, with the first error, and has to end whatever is under way. Work is under way from
    begin() until the event that done_by() gave is done; `timeout` seconds without progress are a CommTimeout.
    """

    def __init__(self, rank: int, timeout: float, ask: Callable[[bool], None],
                 tell: Callable[[CommError], None]) -> None:
        self._rank, self._timeout, self._ask, self._tell = rank, timeout, ask, tell
        self._under_way: deque[tuple[int, Any]] = deque()       # (call, event, None while it is being begun)
        self._since = time.monotonic()
        self._changed = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="meshtape-nccl-watch", daemon=True)
        self._thread.start()

    def begin(self, call: int) -> None:
        with self._changed:
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way.append((call, None))

    def done_by(self, event: Any) -> None:
        """What was begun last is done when `event` is; None: it is not this thread's to wait for."""
        with self._changed:
            call, _ = self._under_way.pop()
            if event is not None:
                self._under_way.append((call, event))

    def close(self) -> None:
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(10 * LOOK)

    def _work(self) -> None:
        while not self._closing.wait(LOOK):
            try:
                self._look()
            except CommError as error:
                self._tell(error)
                return
            except Exception as error:
                # A device that has failed answers every question with an error.
                self._tell(CommError(f"rank {self._rank}: the device failed: {error}"))
                return

    def _look(self) -> None:
        with self._changed:
            while self._under_way and self._under_way[0][1] is not None and self._under_way[0][1].done:
                self._under_way.popleft()
                self._since = time.monotonic()
            waiting = self._under_way[0][0] if self._under_way else None
            late = waiting is not None and time.monotonic() - self._since > self._timeout
        try:
            self._ask(waiting is not None)
        except (CommAborted, PeerLost) as error:
            doing = f" (in {describe(waiting)})" if waiting is not None else ""
            raise type(error)(f"{error}{doing}") from error
        if late and waiting is not None:
            raise CommTimeout(f"rank {self._rank}: {describe(waiting)} made no progress for "
                              f"{self._timeout:g} s; a peer may be in another collective, or stuck")
