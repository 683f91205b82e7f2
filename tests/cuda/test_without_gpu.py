"""Where there is no GPU, nothing is said about it, and CuPy is not even imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import numpy as np
import meshtape as mt
from meshtape import nn, optim

mt.init({arguments})
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
opt = optim.AdamW(model.parameters(), lr=1e-2)
x, y = mt.tensor(np.ones((6, 4), np.float32)), mt.tensor(np.arange(6) % 3)
losses = []
for _ in range(3):
    loss = nn.functional.cross_entropy(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    losses.append(loss.item())
assert losses[2] < losses[0], losses
assert not {{"cupy", "cupyx", "cudnn"}} & set(sys.modules), "a GPU's libraries were imported"
mt.shutdown()
"""


@pytest.mark.parametrize("arguments", ["", "workers=2, backend='local'"], ids=["in process", "local"])
def test_a_machine_with_cupy_and_no_gpu_trains_quietly(arguments: str) -> None:
    program = PROGRAM.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], text=True, capture_output=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
