"""Milliseconds per training step of six models: meshtape on 1 and 2 workers beside torch eager and torch DDP.

    python benchmarks/train_step.py [--rounds 11] [--models mlp64,lstm] [--contenders torch,ddp,mesh1,mesh2]

Every contender runs in a process of its own with one thread per worker, and takes turns with the others: a
round is a few steps of each. A step is forward, cross-entropy, backward and AdamW on a batch that starts as
NumPy arrays. DDP is gloo with 2 processes on the same global batch. All start from the same weights, and
their losses are compared before anything is timed. Figures are medians over rounds; a ratio a/b above 1 says
that b is faster.
"""

from __future__ import annotations

import os
from typing import Any

import _runner
import numpy as np
from _models import BATCHES, LR, MODELS, Model, batches, weights

CONTENDERS = ("torch", "ddp", "mesh1", "mesh2")
RATIOS = (("torch", "mesh1"), ("ddp", "mesh2"), ("mesh1", "mesh2"))


class Data:
    """Batches of one rank by factor of the global batch: `get(i, factor)`."""

    def __init__(self, model: Model, rank: int = 0, ranks: int = 1) -> None:
        self.model, self.rank, self.ranks = model, rank, ranks
        self.made: dict[int, list[tuple[Any, Any]]] = {1: self.make(1)}

    def make(self, factor: int) -> list[tuple[Any, Any]]:
        def part(a: Any) -> Any:
            return a[self.rank * len(a) // self.ranks:(self.rank + 1) * len(a) // self.ranks]

        return [(part(x), part(y)) for x, y in batches(self.model, factor)]

    def get(self, i: int, factor: int) -> tuple[Any, Any]:
        if factor not in self.made:
            self.made[factor] = self.make(factor)
        return self.made[factor][i % BATCHES]


# --- contenders: run(n, factor) does n steps, waits for them, and returns the last loss --------------------

def meshtape_steps(model: Model, workers: int) -> tuple[_runner.Run, Any]:
    import meshtape as mt
    from meshtape import nn, optim

    if workers > 1:
        mt.init(workers=workers, threads_per_worker=1)
    data = Data(model)
    peak = peak_growth(mt)
    net = model.build(nn)
    net.load_state_dict(weights({k: v.shape for k, v in net.state_dict().items()}))
    opt = optim.AdamW(net.parameters(), lr=LR)

    def run(n: int, factor: int = 1) -> float:
        for i in range(n):
            x, y = data.get(i, factor)
            loss = nn.functional.cross_entropy(net(mt.tensor(x, layout=mt.Shard(0))),
                                               mt.tensor(y, layout=mt.Shard(0)))
            opt.zero_grad()
            loss.backward()
            opt.step()
        return float(loss.item())

    return run, peak


def torch_steps(model: Model, rank: int = 0, ranks: int = 1) -> tuple[_runner.Run, Any]:
    import torch

    torch.set_num_threads(1)
    data = Data(model, rank, ranks)
    peak = peak_growth()
    net: Any = model.build(torch.nn)
    made = weights({k: tuple(v.shape) for k, v in net.state_dict().items()})
    net.load_state_dict({k: torch.from_numpy(v) for k, v in made.items()})
    if ranks > 1:
        from torch.nn.parallel import DistributedDataParallel
        net = DistributedDataParallel(net)
    opt = torch.optim.AdamW(net.parameters(), lr=LR)

    def run(n: int, factor: int = 1) -> float:
        for i in range(n):
            x, y = data.get(i, factor)
            loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x)), torch.from_numpy(y))
            opt.zero_grad()
            loss.backward()
            opt.step()
        return float(loss.item())

    return run, peak


def peak_growth(mt: Any = None) -> Any:
    """A function that says by how many bytes the peak memory of a worker has grown since now: this process's,
    or that of meshtape's worker which grew most.
    """
    if mt is None or mt.current_mesh().size == 1:
        before = _runner.resident()
        return lambda: _runner.resident("VmHWM") - before
    mt.tensor(np.zeros(2), layout=mt.Shard(0)).numpy()
    first = mt.stats()["peak_memory"]
    return lambda: max(b - a for a, b in zip(first, mt.stats()["peak_memory"], strict=True))


def build(name: str, model: Model, rank: int, port: int) -> tuple[_runner.Run, dict[str, Any]]:
    """A contender, warm: its losses of the first steps and its memory are what it says about itself."""
    if name == "ddp":
        import torch.distributed as dist
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        run, peak = torch_steps(model, rank, 2)
    elif name == "torch":
        run, peak = torch_steps(model)
    else:
        run, peak = meshtape_steps(model, int(name.removeprefix("mesh")))
    losses = [run(1) for _ in range(3)]
    for _ in range(3):
        run(4)
    return run, {"losses": losses, "peak": peak()}


# --- comparing --------------------------------------------------------------------------------------------

def check_losses(model: str, contenders: dict[str, _runner.Contender]) -> None:
    """Equal work: the same losses in the first steps. A rank of DDP knows the loss of its part only."""
    losses = {name: np.mean([a["losses"] for a in c.about], axis=0) for name, c in contenders.items()}
    first, expected = next(iter(losses.items()))
    for name, found in losses.items():
        if not np.allclose(found, expected, rtol=1e-3):
            raise SystemExit(f"{model}: losses of {name} are {found}, those of {first} {expected}")


def compare(model: str, names: list[str], rounds: int) -> dict[str, Any]:
    running: dict[str, _runner.Contender] = {}
    try:
        for name in names:
            running[name] = _runner.Contender(__file__, name, model, 2 if name == "ddp" else 1)
        check_losses(model, running)
        steps = MODELS[model].steps
        turns = {name: (lambda c=c: 1e3 * c.seconds(steps)) for name, c in running.items()}
        times = _runner.take_turns(turns, rounds)
        return {"ms": times, "peak": {name: max(a["peak"] for a in c.about) for name, c in running.items()}}
    finally:
        for contender in running.values():
            contender.close()


def main() -> None:
    parser = _runner.parser(__doc__, MODELS, CONTENDERS, rounds=11, case="models")
    options = parser.parse_args()
    if options.serve:
        _runner.serve(lambda: build(options.serve, MODELS[options.case], options.rank, options.port))
        return
    names = options.contenders.split(",")
    ratios = [(a, b) for a, b in RATIOS if {a, b} <= set(names)]
    print(f"OPENBLAS_CORETYPE: {os.environ.get('OPENBLAS_CORETYPE', 'not set')}")
    print(_runner.row("ms per step", [*names, *(f"{a}/{b}" for a, b in ratios)]))
    figures = {}
    for model in options.models.split(","):
        figures[model] = compare(model, names, options.rounds)
        found = _runner.medians(figures[model]["ms"])
        print(_runner.row(model, [*found.values(), *(f"{found[a] / found[b]:.2f}" for a, b in ratios)]),
              flush=True)
    _runner.write_json(options.json, figures)


if __name__ == "__main__":
    main()
