"""What explain() and visualize() say, held against what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from meshes import on

import meshtape as mt
from meshtape import nn, optim
from meshtape.scheduler.report import bytes_text, verb


def step(net: nn.Module, opt: optim.Optimizer) -> None:
    x = mt.tensor(np.ones((8, 4), np.float32), layout=mt.Shard(0))
    opt.zero_grad()
    net(x).tanh().sum().backward()
    opt.step()


def test_explain_shows_a_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    with on(2):
        net = nn.Linear(4, 3)
        opt = optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            step(net, opt)
        text = mt.explain()
        assert capsys.readouterr().out.strip() == text.strip()
        lines = {line.split()[0]: line for line in text.splitlines()}
        assert "8x4 f32 [S0]" in lines["linear"] and "8x3 f32 [S0]" in lines["linear"]
        # 12 + 3 float32 gradients, all-reduced over two workers: each sends (2 - 1) / 2 * 2 * 60 bytes.
        assert (
            "all-reduce(sum) over data" in lines["all_reduce_bucket"] and "60 B" in lines["all_reduce_bucket"]
        )
        assert "test_explain.py" in lines["linear"]
        assert "1 collectives, each worker sends 60 B and is fed 64 B" in text


def test_explain_sends_what_is_pending_and_says_when_there_is_nothing() -> None:
    with on(1):
        assert mt.explain(show=False) == "nothing has been sent yet"
        x = mt.ones(3).exp()
        assert "exp" in mt.explain(show=False)
        del x


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ("sum", -1, "all-reduce(sum)"),
        ("max", 0, "reduce-scatter(max)"),
        (0, -1, "all-gather"),
        (0, 1, "all-to-all"),
        (-1, 0, "cut"),
        (-1, "sum", "spread"),
    ],
)
def test_moves_have_their_usual_names(before: Any, after: Any, word: str) -> None:
    assert verb(before, after) == word


def test_bytes_are_readable() -> None:
    assert [bytes_text(n) for n in (0, 12, 1500, 2_000_000, 3_400_000_000)] == [
        "",
        "12 B",
        "1.5 KB",
        "2.0 MB",
        "3.4 GB",
    ]


def test_visualize_names_every_slice_and_its_holders(tmp_path: Path) -> None:
    with on({"data": 2, "model": 2}):
        x = mt.tensor(np.ones((7, 5)), layout={"data": mt.Shard(0), "model": mt.Shard(1)})
        text = mt.visualize(x, tmp_path / "x.png", show=False)
        for where in ("[0:4, 0:3]  4 x 3", "[0:4, 3:5]  4 x 2", "[4:7, 0:3]  3 x 3", "[4:7, 3:5]  3 x 2"):
            assert where in text
        rows = mt.visualize(mt.tensor(np.ones((3, 4)), layout={"model": mt.Shard(0)}), show=False)
        assert "[0:2, 0:4]" in rows and "worker 0 (this process, cpu), 2 (this process, cpu)" in rows
        assert "hold addends" in mt.visualize(x.sum(), tmp_path / "scalar.png", show=False)
        for name in ("x.png", "scalar.png"):
            picture = pytest.importorskip("matplotlib.image").imread(tmp_path / name)
            assert picture.shape[0] > 100 and picture.std() > 0.01


def test_repr_shows_values_dtype_and_layout() -> None:
    with on(2):
        x = mt.tensor(np.arange(4.0), layout=mt.Shard(0), requires_grad=True)
        assert repr(x) == "tensor([0., 1., 2., 3.], dtype=float64, layout=Shard(0), requires_grad=True)"
        assert "grad_fn=<mul>" in repr(x * 2)
        assert x.layout == mt.Shard(0) and x.layout["data"] == mt.Shard(0)
        assert "shape=(200, 200)" in repr(mt.zeros((200, 200)))
