"""Networks with convolution, normalization, pooling and attention, trained on a device as on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import meshtape as mt
from meshtape import nn, optim
from meshtape.cluster.local import InlineMesh
from meshtape.runtime.collectives.threads import ThreadGroup
from meshtape.runtime.worker import Worker
from meshtape.scheduler import current
from meshtape.scheduler.session import Session

STEPS = 5


@pytest.fixture
def use(device: Any) -> Iterator[Callable[..., Any]]:
    """use(**options) makes a worker on the device the current mesh."""
    mt.shutdown()

    def start(**options: Any) -> None:
        mt.shutdown()
        made = Worker(0, (1,), [ThreadGroup(1).communicator(0)], device, **options)
        mesh = InlineMesh(worker=lambda *args: made)
        mesh.devices[0] = "gpu0"
        current.use(Session(mesh))

    yield start
    mt.shutdown()


def images(dtype: str) -> list[Any]:
    """Losses of a small network on images."""
    mt.manual_seed(3)
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4))
    return trained(model, lambda: rng.standard_normal((4, 3, 10, 10), dtype=np.float32), rng, dtype)


def sequences(dtype: str, dropout: float = 0.0) -> list[Any]:
    """Losses of a small Transformer."""
    mt.manual_seed(4)
    rng = np.random.default_rng(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)
            self.out = nn.Linear(16, 4)

        def forward(self, x: Any) -> Any:
            return self.out(self.layer(x, is_causal=True).mean(axis=1))
    return trained(Model(), lambda: rng.standard_normal((3, 6, 16), dtype=np.float32), rng, dtype)


def trained(model: Any, batch: Any, rng: Any, dtype: str) -> list[Any]:
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        x = mt.tensor(batch())
        y = mt.tensor(rng.integers(0, 4, len(x)))
        if dtype == "float32":
            loss = nn.functional.cross_entropy(model(x), y)
        else:
            with mt.autocast(dtype):
                loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.item()))
    return losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [images, sequences])
def test_training_is_as_on_a_cpu(use: Any, model: Any, dtype: str) -> None:
    mt.shutdown()
    wanted = model("float32")
    use()
    np.testing.assert_allclose(model(dtype), wanted, rtol=1e-4 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replays_draw_anew_and_give_the_bits_of_steps_that_are_not_captured(use: Any, dtype: str) -> None:
    use(graphs=False)
    wanted = sequences(dtype, 0.3), images(dtype)
    use()
    got = sequences(dtype, 0.3), images(dtype)
    assert mt.stats()["graphs"][0]["replays"] >= 2
    assert got == wanted
