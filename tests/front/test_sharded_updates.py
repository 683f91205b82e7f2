"""Replicated parameters updated by parts: the same numbers as when every worker updates all of them."""

from __future__ import annotations

import numpy as np
import pytest

import meshtape as mt
from meshtape import nn, optim
from meshtape.optim import optimizer
from tests.meshes import on
from tests.spy import Spy

OPTIMIZERS = {
    "adamw": lambda ps: optim.AdamW(ps, lr=1e-2),
    "amsgrad": lambda ps: optim.Adam(ps, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "momentum": lambda ps: optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd": lambda ps: optim.SGD(ps, lr=1e-2),
}
X = np.random.default_rng(0).standard_normal((12, 7), dtype=np.float32)
Y = np.arange(12) % 3


def net():
    """Extents below, at and above the number of workers; and a parameter without a dimension."""
    mt.manual_seed(1)
    made = nn.Sequential(nn.Linear(7, 130), nn.Tanh(), nn.Linear(130, 3), nn.LayerNorm(3))
    made.scale = nn.Parameter(mt.tensor(1.5))
    return made


def train(make, steps=4, look=lambda model, opt: None):
    model = net()
    opt = make(model.parameters())
    for _ in range(steps):
        x, y = mt.tensor(X, layout=mt.Shard(0)), mt.tensor(Y, layout=mt.Shard(0))
        loss = nn.functional.cross_entropy(model(x) * model.scale, y)
        opt.zero_grad()
        loss.backward()
        look(model, opt)
        opt.step()
    return model, opt


def values(model, opt):
    states = opt.state_dict()["state"]
    return ([p.numpy() for p in model.parameters()],
            {(i, k): v.numpy() for i, s in states.items() for k, v in s.items() if k != "step"},
            [p.grad.numpy() for p in model.parameters()])


def assert_same(a, b):
    for one, other in zip(a[0] + a[2], b[0] + b[2], strict=True):
        assert np.array_equal(one, other)
    assert a[1].keys() == b[1].keys() and all(np.array_equal(a[1][k], b[1][k]) for k in a[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("axes", [2, 3, {"data": 2, "model": 2}], ids=str)
def test_parts_give_the_same_bits_as_the_whole(axes, name, monkeypatch):
    found = []
    for split_from in (0, 1 << 60):
        monkeypatch.setattr(optimizer, "SPLIT_FROM", split_from)
        with on(axes):
            found.append(values(*train(OPTIMIZERS[name])))
    assert_same(*found)


def test_one_step_is_one_exchange_of_all_parameters(monkeypatch):
    monkeypatch.setattr(optimizer, "SPLIT_FROM", 0)
    with on(2) as session:
        spy = Spy(session)
        model, opt = train(OPTIMIZERS["adamw"])
        program = spy.take()[-1].program
        names = [program.instrs[k].op for k, _, _ in program.steps]
        assert names.count("sharded_update") == 1 and not {"adam_update", "reduce_scatter_bucket"} & set(
            names
        )
        assert "reduce-scatter(sum), all-gather over data" in mt.explain(show=False)
        assert opt.state[model[0].weight]["exp_avg"].layout == mt.Shard(0)
        assert all(p.layout == mt.Replicate() for p in model.parameters())


def test_gradients_that_the_user_reads_are_whole(monkeypatch):
    monkeypatch.setattr(optimizer, "SPLIT_FROM", 0)
    seen = []

    def look(model, opt):
        assert all(p.grad.layout == p.layout for p in model.parameters())
        seen.append([p.grad.numpy() for p in model.parameters()])

    results = []
    for workers in (1, 3):
        seen.clear()
        with on(workers):
            results.append((values(*train(OPTIMIZERS["adamw"], look=look))[0], list(seen)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_parameter_held_by_somebody_else_keeps_its_values(monkeypatch):
    monkeypatch.setattr(optimizer, "SPLIT_FROM", 0)
    held = []

    def look(model, opt):
        held.append(([p.detach() for p in model.parameters()], [p.numpy() for p in model.parameters()]))

    with on(2):
        train(OPTIMIZERS["adamw"], look=look)
        for tensors, arrays in held:
            assert all(np.array_equal(t.numpy(), a) for t, a in zip(tensors, arrays, strict=True))


def test_accumulated_addends_are_reduced_once(monkeypatch):
    monkeypatch.setattr(optimizer, "SPLIT_FROM", 0)
    with on(2) as session:
        model = net()
        opt = OPTIMIZERS["sgd"](model.parameters())
        spy = Spy(session)
        for part in np.split(np.arange(12), 3):
            loss = nn.functional.cross_entropy(model(mt.tensor(X[part], layout=mt.Shard(0))) * model.scale,
                                               mt.tensor(Y[part], layout=mt.Shard(0)))
            (loss / 3).backward()
        opt.step()
        names = [b.program.instrs[k].op for b in spy.take() if b.program for k, _, _ in b.program.steps]
        assert names.count("sharded_update") == 1 and "reduce_scatter_bucket" not in names


def test_state_goes_to_another_mesh(monkeypatch):
    monkeypatch.setattr(optimizer, "SPLIT_FROM", 0)
    with on(3):
        model, opt = train(OPTIMIZERS["adamw"])
        kept = values(model, opt)[1]
        state = {"state": {i: {k: v if k == "step" else v.numpy() for k, v in s.items()}
                           for i, s in opt.state_dict()["state"].items()},
                 "param_groups": opt.state_dict()["param_groups"]}
    with on(2):
        model = net()
        opt = OPTIMIZERS["adamw"](model.parameters())
        opt.load_state_dict(state)
        again = {(i, k): v.numpy() for i, s in opt.state_dict()["state"].items() for k, v in s.items()
                 if k != "step"}
        assert kept.keys() == again.keys() and all(np.array_equal(kept[k], again[k]) for k in kept)
