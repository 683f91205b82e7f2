"""Profiles and counts: what a trace holds, that clocks agree, that results do not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meshes import on

import meshtape as mt
from meshtape.runtime.protocol import Reply, Span
from meshtape.scheduler.trace import Tracer


def work() -> float:
    x = mt.tensor(np.arange(12.0).reshape(6, 2), layout=mt.Shard(0))
    w = mt.tensor(np.ones((2, 3)), requires_grad=True)
    loss = (x @ w).tanh().sum()
    loss.backward()
    return float(w.grad.sum()) + float(loss)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_profile_shows_driver_and_workers_on_one_clock(workers: int, tmp_path: Path) -> None:
    with on(workers):
        want = work()
        with mt.profile(tmp_path / "trace.json"):
            got = work()
        assert got == want
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
        assert len(names) == workers + 1 and "driver" in names
        spans = [e for e in events if e["ph"] == "X"]
        assert {"record", "flush"} <= {e["name"] for e in spans if e["pid"] == 0}
        for rank in range(1, workers + 1):
            mine = [e for e in spans if e["pid"] == rank]
            assert {"matmul", "tanh", "feed"} <= {e["name"] for e in mine}
            assert workers == 1 or any(e["cat"] == "collective" for e in mine)
            batches = [e for e in mine if e["cat"] == "batch"]
            for e in mine:
                inside = any(
                    b["ts"] - 1 <= e["ts"] and e["ts"] + e["dur"] <= b["ts"] + b["dur"] + 1 for b in batches
                )
                assert inside, e
        assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in spans)


def test_one_profile_at_a_time(tmp_path: Path) -> None:
    with on(1), mt.profile(tmp_path / "a.json"), pytest.raises(mt.MeshtapeError, match="already"), \
            mt.profile(tmp_path / "b.json"):
        pass


def test_offsets_come_from_the_shortest_round_trip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker whose clock is 5 s ahead: its spans land where they happened."""
    ahead, times = 5_000_000_000, iter([0, 10_000, 120_000])
    monkeypatch.setattr("meshtape.scheduler.trace.perf_counter_ns", lambda: next(times))
    tracer = Tracer(["here"], ["cpu"])
    tracer.sent[1], tracer.sent[2] = 5_000, 100_000
    tracer.replied(
        Reply(0, 1, [], [], 0, (6_000 + ahead, 9_000 + ahead), [Span("exp", 7_000 + ahead, 1_000)])
    )
    tracer.replied(Reply(0, 2, [], [], 0, (110_000 + ahead, 111_000 + ahead), []))
    assert abs(tracer._offset(0) - ahead) < 1_000
    tracer.write(tmp_path / "t.json")
    events: list[Any] = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    exp = next(e for e in events if e["name"] == "exp")
    assert exp["dur"] == 1.0 and 0 <= exp["ts"] < 200


def test_stats_count() -> None:
    with on(2):
        before = mt.stats()
        work()
        after = mt.stats()
        assert after["ops"] > before["ops"] and after["messages"] == 2 * after["batches"]
        assert len(after["peak_memory"]) == 2 and all(n > 1 << 20 for n in after["peak_memory"])
