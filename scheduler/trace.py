"""A timeline of driver and workers on one clock, in the format of Chrome's and Perfetto's trace viewers.

Workers time their steps by their own clocks. How far those are off follows from a batch's times as in NTP:
with the driver's times of sending and reading, t0 and t3, and the worker's of beginning and ending, t1 and
t2, the offset is ((t1 - t0) + (t2 - t3)) / 2, most exact where (t3 - t0) - (t2 - t1) is least (RFC 5905,
section 8).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from meshtape.runtime.protocol import Reply

DRIVER = -1
LANES = ("kernels", "collectives beside them")


class Tracer:
    """Collects spans; times in nanoseconds of the driver's clock, per rank for workers' spans until written.
    """

    def __init__(self, nodes: Sequence[str], devices: Sequence[str]) -> None:
        self.names = [f"worker {r} ({n}, {d})" for r, (n, d) in enumerate(zip(nodes, devices, strict=True))]
        # rank, lane, category, name, start, duration, args; lane 1 is what a worker does beside its kernels
        self.spans: list[tuple[int, int, str, str, int, int, dict[str, Any]]] = []
        self.sent: dict[int, int] = {}
        self.best: dict[int, tuple[int, int]] = {}      # by rank: (uncertainty, offset)
        self.mark = perf_counter_ns()

    def driver(self, name: str, start: int, **args: Any) -> None:
        """The driver did something from `start` until now."""
        self.spans.append((DRIVER, 0, "driver", name, start, perf_counter_ns() - start, args))

    def flushed(self, batch: int, start: int, ops: int, known: bool, fed: int) -> None:
        """A batch was sent; what lies between two flushes is recording (and the user's own code)."""
        self.spans.append((DRIVER, 0, "driver", "record", self.mark, max(0, start - self.mark), {"ops": ops}))
        self.driver("flush", start, batch=batch, ops=ops, digest="known" if known else "new", bytes_fed=fed)
        self.sent[batch] = start
        self.mark = perf_counter_ns()

    def replied(self, reply: Reply) -> None:
        """A worker's reply was read."""
        now, (began, ended) = perf_counter_ns(), reply.clock
        start = self.sent.get(reply.batch)
        if start is None or not began:
            return
        uncertainty = (now - start) - (ended - began)
        offset = ((began - start) + (ended - now)) // 2
        if reply.rank not in self.best or uncertainty < self.best[reply.rank][0]:
            self.best[reply.rank] = (uncertainty, offset)
        self.spans.append((reply.rank, 0, "batch", f"batch {reply.batch}", began, ended - began, {}))
        self.spans += [(reply.rank, int(s.beside), s.kind, s.name, s.start, s.duration,
                        {"bytes_sent": s.sent} if s.sent else {}) for s in reply.spans]

    def write(self, path: str | Path) -> None:
        """One JSON file; open it at ui.perfetto.dev or chrome://tracing."""
        zero = min((start - self._offset(rank) for rank, *_, start, _, _ in self.spans), default=0)
        events: list[dict[str, Any]] = []
        for pid, name in enumerate(["driver", *self.names]):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
            events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0,
                           "args": {"sort_index": pid}})
        for pid, lane in sorted({(span[0] + 1, span[1]) for span in self.spans}):
            events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": lane,
                           "args": {"name": "driver" if not pid else LANES[lane]}})
        for rank, lane, kind, name, start, duration, args in self.spans:
            events.append(
                {
                    "ph": "X",
                    "name": name,
                    "cat": kind,
                    "pid": rank + 1,
                    "tid": lane,
                    "ts": (start - self._offset(rank) - zero) / 1e3,
                    "dur": duration / 1e3,
                    "args": args,
                }
            )
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def _offset(self, rank: int) -> int:
        return self.best[rank][1] if rank in self.best else 0
