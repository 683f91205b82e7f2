"""Microseconds of driver time per recorded op with the tape on, beside torch eager's host time for the same
program.

    python benchmarks/record.py [--rounds 300] [--size 8]

The program is a two-layer network written with array operations, forward and backward, on tensors so small
that torch's host time is dispatch and not arithmetic. meshtape's time is what the driver spends until
everything is recorded (the batch is sent outside the timed part, to a worker in the same process); torch's
is the whole eager call, which includes its kernels. Both take turns; figures are medians. Also shown: the
driver's share of a flush, with and without a known digest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _runner
import numpy as np
import torch

import meshtape as mt
from meshtape.scheduler import current


def program(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, relu: Callable[[Any], Any]) -> Any:
    h = relu(x @ w1 + b1)
    h = h * h + h
    y = h @ w2 + b2
    return (y * y).mean()


def operands(size: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal(s, dtype=np.float32)
        for s in ((size, size), (size, size), (size,), (size, size), (size,))
    ]


class Meshtape:
    def __init__(self, size: int) -> None:
        x, *weights = operands(size)
        self.x = mt.tensor(x)
        self.weights = [mt.tensor(w, requires_grad=True) for w in weights]
        self.session = current.session()
        self.ops = 0
        self.flushes: list[float] = []

    def step(self) -> float:
        """Seconds to record forward and backward; counts the recorded instructions."""
        for w in self.weights:
            w.grad = None
        before = len(self.session.sites)
        start = time.perf_counter()
        program(self.x, *self.weights, mt.relu).backward()
        seconds = time.perf_counter() - start
        self.ops = len(self.session.sites) - before
        self.flushes.append(self.flush())
        return seconds

    def flush(self) -> float:
        """Driver seconds of a flush: the worker's own time is taken off."""
        worker = 0.0
        send = self.session.mesh.send

        def timed(runs: Any) -> None:
            nonlocal worker
            start = time.perf_counter()
            send(runs)
            worker = time.perf_counter() - start

        self.session.mesh.send = timed  # type: ignore[method-assign]
        start = time.perf_counter()
        self.session.flush()
        seconds = time.perf_counter() - start - worker
        self.session.mesh.send = send  # type: ignore[method-assign]
        return seconds


class Torch:
    def __init__(self, size: int) -> None:
        torch.set_num_threads(1)
        x, *weights = operands(size)
        self.x = torch.from_numpy(x)
        self.weights = [torch.from_numpy(w).requires_grad_() for w in weights]

    def step(self) -> float:
        for w in self.weights:
            w.grad = None
        start = time.perf_counter()
        program(self.x, *self.weights, torch.relu).backward()
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    ours, peer = Meshtape(options.size), Torch(options.size)
    times: _runner.Times = {"ours": [], "torch": []}
    for _ in range(options.rounds):
        times["ours"].append(1e6 * ours.step())
        times["torch"].append(1e6 * peer.step())
    found = _runner.medians(times)
    figures = {"ops": ours.ops, "per op": found["ours"] / ours.ops, "ours": found["ours"],
               "torch": found["torch"], "first flush": 1e6 * ours.flushes[0],
               "flush": 1e6 * statistics.median(ours.flushes[3:])}
    print(f"meshtape {mt.__version__}, torch {torch.__version__}, NumPy {np.__version__}; {ours.ops} ops")
    for name, label in (("per op", "recording, per op"), ("ours", "recording, whole program"),
                       ("torch", "torch eager, whole"), ("first flush", "flush, first sight"),
                       ("flush", "flush, known digest")):
        print(f"{label:26}{figures[name]:8.2f} us")
    print(f"torch eager / recording   {found['torch'] / found['ours']:8.2f}")
    _runner.write_json(options.json, figures)


if __name__ == "__main__":
    main()
