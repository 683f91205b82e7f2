"""The same program gives the same bits; what is random does not depend on the mesh."""

from __future__ import annotations

from typing import Any

import digits
import numpy as np
import pytest
from meshes import on

import meshtape as mt
from meshtape import nn, optim

MESHES: list[Any] = [2, 3, 4, {"data": 2, "model": 2}, {"data": 3, "model": 2}]


def train(workers: Any, plan: Any = None) -> list[np.ndarray]:
    """Losses and final parameters of a short run with dropout and shuffled batches."""
    with on(workers):
        mt.manual_seed(5)
        net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.3), nn.Linear(48, 10))
        if plan:
            nn.parallelize(net, plan)
        opt = optim.AdamW(net.parameters(), lr=1e-2)
        losses = []
        for x, y in mt.data.DataLoader(digits.data(), 100, shuffle=True, seed=1):
            loss = nn.functional.cross_entropy(net(x.astype(mt.float32)), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss)
        return [*(v.numpy() for v in losses), *(p.numpy() for p in net.parameters())]


@pytest.mark.parametrize("workers", [1, *MESHES], ids=str)
def test_two_runs_on_the_same_mesh_agree_to_the_bit(workers: Any) -> None:
    first, second = train(workers), train(workers)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_runs_with_sharded_parameters_agree_to_the_bit() -> None:
    plan = {"*": {"data": mt.Shard(0)}}
    assert all(np.array_equal(a, b) for a, b in zip(train(3, plan), train(3, plan), strict=True))


@pytest.mark.parametrize("workers", MESHES, ids=str)
def test_a_run_with_dropout_agrees_with_one_worker_to_rounding(workers: Any) -> None:
    for a, b in zip(train(1), train(workers), strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-3, atol=2e-4)


def draws(workers: Any) -> dict[str, np.ndarray]:
    """Everything random that a program can ask for, in uneven shapes and in several layouts."""
    out: dict[str, np.ndarray] = {}
    with on(workers) as session:
        mt.manual_seed(2 ** 40 + 17)
        layouts = {"whole": mt.Replicate(), "rows": mt.Shard(0), "columns": mt.Shard(1)}
        if len(session.axes.names) == 2:
            layouts["both"] = {"data": mt.Shard(1), "model": mt.Shard(0)}
            layouts["rows twice"] = {"data": mt.Shard(0), "model": mt.Shard(0)}
        for name in ("whole", "rows", "columns", "both", "rows twice"):
            layout = layouts.get(name, mt.Shard(0))
            for kind, call in {
                "rand": lambda layout: mt.random.rand(7, 5, layout=layout),
                "randn": lambda layout: mt.random.randn(7, 5, layout=layout),
                "randint": lambda layout: mt.random.randint(0, 1000, (7, 5), layout=layout),
                "float64": lambda layout: mt.random.randn(7, 5, dtype=mt.float64, layout=layout),
            }.items():
                out[f"{kind} {name}"] = call(layout).numpy()
            x = mt.ones((7, 5), layout=layout)
            out[f"dropout {name}"] = nn.functional.dropout(x, 0.5).numpy()
        out["permutation"] = mt.random.permutation(23).numpy()
        for name, value in nn.Linear(7, 5).state_dict().items():
            out[f"initial {name}"] = value.numpy()
        w = nn.Parameter(mt.zeros((9, 4), layout=mt.Shard(0)))
        out["kaiming_normal_"] = nn.init.kaiming_normal_(w).numpy()
    return out


@pytest.mark.parametrize("workers", MESHES, ids=str)
def test_random_numbers_initial_weights_and_dropout_masks_are_the_same_bits(workers: Any) -> None:
    one, many = draws(1), draws(workers)
    different = [name for name in one if not np.array_equal(one[name], many[name])]
    assert not different and one.keys() == many.keys()


def test_seeds_and_draws_differ() -> None:
    with on(2):
        found = []
        for seed in (0, 1, 2 ** 63):
            mt.manual_seed(seed)
            found += [mt.random.rand(50).numpy() for _ in range(3)]
        assert len({a.tobytes() for a in found}) == 9
        mt.manual_seed(1)
        np.testing.assert_array_equal(mt.random.rand(50).numpy(), found[3])
