"""Long chains of operations: no recursion, and memory that is given back."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
from meshes import on
from spy import blocks, watched

import meshtape as mt

LENGTH = 20_000


@pytest.mark.parametrize("workers", [1, 2])
def test_backward_through_a_chain_of_twenty_thousand_ops(workers: int) -> None:
    with on(workers):
        w = mt.tensor(np.ones(4), layout=mt.Shard(0), requires_grad=True)
        y = w
        for _ in range(LENGTH // 2):
            y = y * 1.0001 + 1.0
        y.sum().backward()
        np.testing.assert_allclose(w.grad.numpy(), np.full(4, 1.0001 ** (LENGTH // 2)), rtol=1e-9)


def test_the_second_walk_over_a_long_chain_gives_the_same() -> None:
    """The first is noted, the second replayed."""
    with on(1):
        w = mt.tensor(np.ones(4), requires_grad=True)
        for _ in range(3):
            w.grad = None
            y = w
            for _ in range(LENGTH // 4):
                y = y * w
            y.sum().backward()
            np.testing.assert_array_equal(w.grad.numpy(), np.full(4, LENGTH // 4 + 1.0))


@pytest.mark.parametrize("walked", [False, True], ids=["never walked", "walked"])
def test_a_long_chain_is_freed_without_recursion(walked: bool) -> None:
    limit = sys.getrecursionlimit()
    with watched(2) as (session, workers):
        w = mt.tensor(np.ones(4), requires_grad=True)
        y = w
        for _ in range(LENGTH):
            y = y * w
        if walked:
            y.sum().backward()
            w.grad = None
        assert blocks(session, workers) == ([2, 2] if walked else [LENGTH + 1] * 2)
        del y
        gc.collect()
        assert blocks(session, workers) == [1, 1]
    assert sys.getrecursionlimit() == limit


def test_a_second_order_gradient_of_a_long_chain() -> None:
    with on(1):
        w = mt.tensor(2.0, dtype=mt.float64, requires_grad=True)
        y = w * 1.0
        for _ in range(1000):
            y = y + w * w * 1e-3
        first, = mt.grad(y, w, create_graph=True)
        second, = mt.grad(first, w)
        assert first.item() == pytest.approx(5.0) and second.item() == pytest.approx(2.0)


def test_a_wide_graph_sums_ten_thousand_gradients() -> None:
    with on(2):
        w = mt.tensor(np.ones(3), requires_grad=True)
        parts = [w * float(k % 7) for k in range(10_000)]
        total = parts[0]
        for p in parts[1:]:
            total = total + p
        total.sum().backward()
        np.testing.assert_allclose(w.grad.numpy(), np.full(3, sum(k % 7 for k in range(10_000))))
