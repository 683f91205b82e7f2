"""Milliseconds per training step of three MLPs: meshtape on 1 and 2 workers beside torch eager and torch DDP.

    python benchmarks/train_step.py [--rounds 15] [--models mlp64,mlp784] [--contenders torch,ddp,mesh1,mesh2]

Every contender runs in a process of its own with one BLAS thread per worker, and takes turns with the
others: a round is a few steps of each. A step is forward, cross-entropy, backward and AdamW on a batch that
starts as NumPy arrays. DDP is gloo with 2 processes on the same global batch. Figures are medians over
rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np

CONTENDERS = ("torch", "ddp", "mesh1", "mesh2")
BATCHES = 8


class Model(NamedTuple):
    """Layer widths, whether LayerNorm and GELU stand between layers (else ReLU), global batch, steps a
    round.
    """

    widths: tuple[int, ...]
    norm: bool
    batch: int
    steps: int


MODELS = {
    "mlp64": Model((64, 128, 128, 10), False, 64, 60),
    "mlp784": Model((784, 512, 512, 10), False, 256, 12),
    "mlpnorm": Model((256, 1024, 1024, 10), True, 256, 6),
}


def batches(model: Model) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((model.batch, model.widths[0]), dtype=np.float32),
             rng.integers(0, model.widths[-1], model.batch)) for _ in range(BATCHES)]


def layers(nn: Any, model: Model) -> Any:
    """The same Sequential in torch's nn and in meshtape's."""
    parts: list[Any] = []
    for i, (a, b) in enumerate(zip(model.widths, model.widths[1:], strict=False)):
        parts.append(nn.Linear(a, b))
        if i < len(model.widths) - 2:
            parts += [nn.LayerNorm(b), nn.GELU()] if model.norm else [nn.ReLU()]
    return nn.Sequential(*parts)


# --- contenders: each returns run(n), which does n steps and waits for them -------------------------------

def meshtape_steps(model: Model, workers: int) -> Callable[[int], None]:
    import meshtape as mt
    from meshtape import nn, optim

    if workers > 1:
        mt.init(workers=workers, threads_per_worker=1)
    net = layers(nn, model)
    opt = optim.AdamW(net.parameters(), lr=1e-3)
    data = batches(model)

    def run(n: int) -> None:
        for i in range(n):
            x, y = data[i % BATCHES]
            loss = nn.functional.cross_entropy(net(mt.tensor(x, layout=mt.Shard(0))),
                                               mt.tensor(y, layout=mt.Shard(0)))
            opt.zero_grad()
            loss.backward()
            opt.step()
        loss.item()

    return run


def torch_steps(model: Model, rank: int = 0, size: int = 1) -> Callable[[int], None]:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net: Any = layers(torch.nn, model)
    if size > 1:
        from torch.nn.parallel import DistributedDataParallel
        net = DistributedDataParallel(net)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
    part = slice(rank * model.batch // size, (rank + 1) * model.batch // size)
    data = [(x[part], y[part]) for x, y in batches(model)]

    def run(n: int) -> None:
        for i in range(n):
            x, y = data[i % BATCHES]
            loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y))
            opt.zero_grad()
            loss.backward()
            opt.step()
        loss.item()

    return run


def serve(contender: str, model: Model, rank: int, port: int) -> None:
    """A contender's process: do as many steps as each line asks for, answer with seconds a step."""
    if contender == "ddp":
        import torch.distributed as dist
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        run = torch_steps(model, rank, 2)
    elif contender == "torch":
        run = torch_steps(model)
    else:
        run = meshtape_steps(model, int(contender.removeprefix("mesh")))
    run(5)
    print("ready", flush=True)
    for line in sys.stdin:
        n = int(line)
        start = time.perf_counter()
        run(n)
        print((time.perf_counter() - start) / n, flush=True)


class Contender:
    """A contender's processes (two for DDP), driven through their standard input."""

    def __init__(self, name: str, model: str) -> None:
        ranks, port = (2 if name == "ddp" else 1), 29500 + os.getpid() % 1000
        command = [
            sys.executable,
            str(Path(__file__)),
            "--serve",
            name,
            "--models",
            model,
            "--port",
            str(port),
        ]
        self.processes = [subprocess.Popen([*command, "--rank", str(r)], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, text=True) for r in range(ranks)]
        for p in self.processes:
            while self.answer(p) != "ready":
                pass

    def answer(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended with status {process.wait()}")
        return line.strip()

    def measure(self, steps: int) -> float:
        """Milliseconds a step."""
        for p in self.processes:
            assert p.stdin is not None
            p.stdin.write(f"{steps}\n")
            p.stdin.flush()
        return 1e3 * max(float(self.answer(p)) for p in self.processes)

    def close(self) -> None:
        for p in self.processes:
            assert p.stdin is not None
            p.stdin.close()
        for p in self.processes:
            p.wait(30)


def compare(name: str, names: list[str], rounds: int) -> dict[str, float]:
    running = {c: Contender(c, name) for c in names}
    times: dict[str, list[float]] = {c: [] for c in names}
    try:
        for _ in range(rounds):
            for c, contender in running.items():
                times[c].append(contender.measure(MODELS[name].steps))
    finally:
        for contender in running.values():
            contender.close()
    return {c: statistics.median(t) for c, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, MODELS[options.models], options.rank, options.port)
        return
    names = options.contenders.split(",")
    print(
        f"{'ms per step':10}" + "".join(f"{c:>10}" for c in names) + f"{'mesh1/torch':>13}{'mesh2/ddp':>11}"
    )
    for model in options.models.split(","):
        found = compare(model, names, options.rounds)
        ratios = [f"{found[a] / found[b]:.2f}" if a in found and b in found else "-"
                  for a, b in (("mesh1", "torch"), ("mesh2", "ddp"))]
        print(f"{model:10}" + "".join(f"{found[c]:10.3f}" for c in names) + f"{ratios[0]:>13}{ratios[1]:>11}",
              flush=True)


if __name__ == "__main__":
    main()
