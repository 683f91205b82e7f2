"""One training step in torch, meshtape and JAX: forward, cross-entropy, backward, AdamW.

Each function returns run(n, factor), which does n steps on batches that start as NumPy arrays and are
`factor` times the model's size, waits for them, and returns the last loss. All start from the same weights.
"""

from __future__ import annotations

from typing import Any

import _runner
import numpy as np
from _models import BATCHES, LR, Model, batches, weights


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


def meshtape_run(model: Model) -> _runner.Run:
    """On the current mesh: batches are split over its workers."""
    import meshtape as mt
    from meshtape import nn, optim

    data = Data(model)
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

    return run


def torch_run(model: Model, rank: int = 0, ranks: int = 1, way: str = "") -> _runner.Run:
    """torch eager; with AdamW(fused=True) ("fused"), or with loss and optimizer compiled ("compile"); on
    several ranks under DistributedDataParallel.
    """
    import torch

    torch.set_num_threads(1)
    data = Data(model, rank, ranks)
    net: Any = model.build(torch.nn)
    made = weights({k: tuple(v.shape) for k, v in net.state_dict().items()})
    net.load_state_dict({k: torch.from_numpy(v) for k, v in made.items()})
    if ranks > 1:
        from torch.nn.parallel import DistributedDataParallel
        net = DistributedDataParallel(net)
    opt = torch.optim.AdamW(net.parameters(), lr=LR, fused=way == "fused" or None)

    def forward(x: Any, y: Any) -> Any:
        return torch.nn.functional.cross_entropy(net(x), y)

    update = opt.step
    if way == "compile":
        forward, update = torch.compile(forward), torch.compile(opt.step)

    def run(n: int, factor: int = 1) -> float:
        for i in range(n):
            x, y = data.get(i, factor)
            loss = forward(torch.from_numpy(x), torch.from_numpy(y))
            opt.zero_grad()
            loss.backward()
            update()
        return float(loss.item())

    return run


def jax_run(model: Model, forward: Any) -> _runner.Run:
    """Batches split over all of JAX's devices, parameters whole on each; XLA adds the all-reduce."""
    import jax
    from _jax_models import train_step
    from jax.sharding import NamedSharding, PartitionSpec

    from meshtape import nn

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    data = Data(model)
    made = weights({k: v.shape for k, v in model.build(nn).state_dict().items()})
    zeros = [{k: np.zeros_like(v) for k, v in made.items()} for _ in range(2)]
    state = jax.device_put((made, tuple(zeros), np.float32(0)), whole)
    step = train_step(forward)

    def run(n: int, factor: int = 1) -> float:
        nonlocal state
        for i in range(n):
            *state, loss = step(*state, *jax.device_put(data.get(i, factor), split))
        return float(loss)

    return run
