"""Gradients that kernels write where the peers read them: nobody sees them change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import meshtape as mt
from meshtape import nn, optim

X = np.random.default_rng(0).standard_normal((64, 300), dtype=np.float32)
Y = np.arange(64) % 7


def train(steps: int) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]], list[Any]]:
    """Parameters, the gradients of every step as read at the end, and as read at once."""
    mt.manual_seed(2)
    model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 301), nn.ReLU(), nn.Linear(301, 7))
    opt = optim.AdamW(model.parameters(), lr=1e-3)
    held: list[mt.Tensor] = []
    at_once: list[Any] = []
    for step in range(steps):
        x, y = mt.tensor(X, layout=mt.Shard(0)), mt.tensor(Y, layout=mt.Shard(0))
        loss = nn.functional.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        held += [p.raw_grad for p in model.parameters() if p.raw_grad is not None]
        if step % 2:
            at_once += [p.grad.numpy() for p in model.parameters() if p.grad is not None]
    return [p.numpy() for p in model.parameters()], [h.numpy() for h in held], at_once


@pytest.mark.ray
def test_gradients_that_are_held_keep_their_values() -> None:
    mt.shutdown()
    wanted = train(8)
    mt.shutdown()
    mt.init(workers=2, threads_per_worker=1)
    try:
        found = train(8)
    finally:
        mt.shutdown()
    for got, want in zip(found, wanted, strict=True):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
