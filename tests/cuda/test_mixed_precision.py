"""Training with autocast, scaled losses and 16-bit parameters takes the same steps on a device as on a CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import meshtape as mt
from meshtape import nn, optim
from meshtape.cluster.local import InlineMesh
from meshtape.scheduler import current
from meshtape.scheduler.session import Session

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 7)).astype(np.float32)
Y = RNG.integers(0, 5, 12)
BAD = 5             # the step that overflows; by then steps are replayed as a graph
OPTIONS: dict[str, dict[str, Any]] = {"AdamW": {}, "SGD": {"momentum": 0.9, "dampening": 0.2}, "RMSprop": {}}


def train(name: str, dtype: str, low: bool, device: Any = None) -> tuple[list[float], list[Any], float, int]:
    """Losses, parameters, the scale, and how often a graph was replayed. `low`: parameters are of 16 bits."""
    mt.shutdown()
    session = current.use(Session(InlineMesh(open_device=None if device is None else lambda index: device)))
    mt.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 5))
    model = model.to(dtype) if low else model
    opt = getattr(optim, name)(model.parameters(), lr=1e-2, **OPTIONS[name])
    scaler, losses = mt.amp.GradScaler(init_scale=256.0, growth_interval=3), []
    for step in range(9):
        x = mt.tensor(X * np.float32(np.inf if step == BAD else 1))
        with mt.autocast(dtype, enabled=not low):
            loss = nn.functional.cross_entropy(model(x.astype(dtype) if low else x), mt.tensor(Y))
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    found = losses, [p.astype("float32").numpy() for p in model.parameters()], scaler.get_scale()
    graphs = session.mesh._worker.graphs  # type: ignore[attr-defined]
    mt.shutdown()
    return *found, 0 if graphs is None else graphs.report()[1]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("low", [False, True], ids=["autocast", "16 bits"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_a_cpu(device: Any, name: str, dtype: str, low: bool) -> None:
    wanted, found = train(name, dtype, low), train(name, dtype, low, device)
    assert found[2] == wanted[2] == 512.0 and found[3] >= 4
    bad = np.arange(9) == BAD
    assert np.isnan(found[0])[bad].all() and np.isfinite(found[0])[~bad].all()
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-2)
    for a, b in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2)
