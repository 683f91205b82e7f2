"""What makes programs fast changes no bit: generated code, memory used again, collectives beside kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

import meshtape as mt
from meshtape import nn, optim
from meshtape.cluster.local import ThreadMesh
from meshtape.optim import optimizer
from meshtape.runtime.worker import Worker
from meshtape.scheduler import cost, current
from meshtape.scheduler.cost import Link
from meshtape.scheduler.session import Session

FLAGS = [{"generate": True}, {"generate": False}, {"reuse": False}, {"overlap": ("threads",)},
         {"overlap": ("threads",), "generate": False}, {"overlap": ("threads",), "reuse": False}]


@contextmanager
def flagged(workers: int, monkeypatch: pytest.MonkeyPatch, **flags: object) -> Iterator[Session]:
    """A mesh of threads whose workers have these flags, small buckets where collectives overlap."""
    mt.shutdown()
    beside = "overlap" in flags
    # Links slow enough to be worth a bucket of 2 KB.
    monkeypatch.setitem(cost.LINKS, "threads", Link(1e-6, 1e8, True) if beside else Link(30e-6, 6e9))
    session = current.use(Session(ThreadMesh(workers, worker=partial(Worker, **flags))))
    try:
        yield session
    finally:
        mt.shutdown()


def train(steps: int = 5, spoil: tuple[int, ...] = ()) -> tuple[list[object], list[np.ndarray]]:
    """Losses (or the error that a step raised), and parameters."""
    mt.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 33), nn.LayerNorm(33), nn.GELU(),
                          nn.Dropout(0.2), nn.Linear(33, 5))
    opt = optim.AdamW(model.parameters(), lr=1e-2)
    rng, losses = np.random.default_rng(0), []
    for step in range(steps):
        y = rng.integers(0, 5, 14)
        x = mt.tensor(rng.standard_normal((14, 20), dtype=np.float32), layout=mt.Shard(0))
        if step in spoil:
            y[13] = 7
        before = {k: v.numpy() for k, v in model.state_dict().items()}
        loss = nn.functional.cross_entropy(model(x), mt.tensor(y, layout=mt.Shard(0)))
        opt.zero_grad()
        loss.backward()
        try:
            opt.step()
            losses.append(loss.item())
        except mt.WorkerError as error:
            losses.append(str(error).split(" on rank")[0])
            model.load_state_dict(before)
            opt = optim.AdamW(model.parameters(), lr=1e-2)
    return losses, [p.numpy() for p in model.parameters()]


@pytest.mark.parametrize("split_from", [0, 1 << 60], ids=["parts", "whole"])
@pytest.mark.parametrize("workers", [2, 3])
def test_training_has_the_same_bits_under_all_flags(workers: int, split_from: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "SPLIT_FROM", split_from)
    found = []
    for flags in FLAGS:
        with flagged(workers, monkeypatch, **flags):
            found.append(train())
    for losses, params in found[1:]:
        assert losses == found[0][0]
        assert all(np.array_equal(a, b) for a, b in zip(params, found[0][1], strict=True))


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_failing_kernel_is_named_and_training_goes_on(flags: dict[str, object],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first and in later steps, when programs are generated and collectives under way."""
    monkeypatch.setattr(optimizer, "SPLIT_FROM", 0)
    with flagged(2, monkeypatch, **flags):
        losses, params = train(8, spoil=(0, 4, 5))
        assert [type(x) for x in losses] == [str] + [float] * 3 + [str] * 2 + [float] * 2, losses
        assert all("cross_entropy" in x for x in losses if isinstance(x, str))
        assert all(np.isfinite(p).all() for p in params)


def test_a_timeline_shows_collectives_beside_kernels(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flagged(2, monkeypatch, overlap=("threads",)):
        train(2)
        with mt.profile(tmp_path / "trace.json"):
            train(2)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    beside = [e for e in events if e["ph"] == "X" and e["pid"] and e["tid"] == 1]
    kernels = [e for e in events if e["ph"] == "X" and e["pid"] and e["cat"] == "kernel"]
    waits = [e for e in events if e["ph"] == "X" and e["cat"] == "wait"]
    assert beside and all(e["cat"] == "collective" for e in beside) and len(waits) == len(beside)
    assert any(e["args"].get("bytes_sent", 0) > 0 for e in beside)

    def started(w):
        """Kernels that begin between the start of a collective and the wait for it."""
        begin = max((e for e in events if e["ph"] == "X" and e["pid"] == w["pid"] and e["cat"] == "collective"
                     and e["name"] == "start " + w["name"].removeprefix("wait for ") and e["ts"] <= w["ts"]),
                    key=lambda e: e["ts"])
        return [k for k in kernels if k["pid"] == w["pid"] and begin["ts"] <= k["ts"] < w["ts"]]

    assert any(started(w) for w in waits)
