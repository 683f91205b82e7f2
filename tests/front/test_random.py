"""Random numbers depend on seed and draw, not on the mesh, and are distributed as they are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beside_torch import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import meshtape as mt
from meshtape import nn
from meshtape.nn import init
from meshtape.nn.init import inverse_erf

DRAWS: list[Callable[[], Any]] = [
    lambda: mt.random.uniform(-1, 2, (7, 3), layout=mt.Shard(0)),
    lambda: mt.random.normal(1, 3, (5, 4), layout=mt.Shard(1)), lambda: mt.random.rand(3, 5),
    lambda: mt.random.randn((4,), dtype="float64"),
    lambda: mt.random.integers(-4, 9, (7, 2), layout=mt.Shard(0)), lambda: mt.random.randint(5, shape=(3,)),
    lambda: mt.random.bernoulli(0.3, (11,), layout=mt.Shard(0)),
    lambda: mt.random.permutation(13, layout=mt.Shard(0)), lambda: mt.random.choice(6, (4,)),
    lambda: mt.random.choice(mt.arange(9) * 2, (3, 2), replace=False), lambda: nn.Linear(5, 7).weight,
    lambda: nn.functional.dropout(mt.ones((6, 5), layout=mt.Shard(1)), 0.4)]


def test_the_same_numbers_on_every_mesh() -> None:
    found = []
    for workers in (1, 2, 3):
        mt.shutdown()
        if workers > 1:
            mt.init(workers=workers, backend="local")
        mt.random.seed(11)
        found.append([draw().numpy() for draw in DRAWS])
    for a, b, c in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_seed_starts_again_and_draws_differ() -> None:
    mt.random.seed(3)
    a, b = mt.random.rand(50).numpy(), mt.random.rand(50).numpy()
    mt.random.manual_seed(3)
    assert np.array_equal(mt.random.rand(50).numpy(), a) and not np.array_equal(a, b)
    mt.manual_seed(4)
    assert not np.array_equal(mt.random.rand(50).numpy(), a)


def test_distributions() -> None:
    u = mt.random.uniform(2, 5, (40000,)).numpy()
    assert u.dtype == np.float32 and u.min() >= 2 and u.max() < 5 and abs(u.mean() - 3.5) < 0.02
    z = mt.random.normal(1, 2, (40000,), dtype="float64").numpy()
    assert z.dtype == np.float64 and abs(z.mean() - 1) < 0.05 and abs(z.std() - 2) < 0.05
    i = mt.random.integers(3, 8, (40000,)).numpy()
    assert i.dtype == np.int64 and np.abs(np.bincount(i, minlength=8)[3:] - 8000).max() < 500 and i.max() == 7
    assert mt.random.integers(5, dtype="uint8", shape=(3,)).dtype == np.uint8
    b = mt.random.bernoulli(0.2, (40000,)).numpy()
    assert b.dtype == bool and abs(b.mean() - 0.2) < 0.01
    assert mt.random.bernoulli(1.0, 3, dtype="float32").tolist() == [1, 1, 1]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 60))
def test_a_permutation_has_every_number_once(n: int) -> None:
    assert sorted(mt.random.permutation(n).tolist()) == list(range(n))


def test_choice() -> None:
    assert sorted(mt.random.choice(5, 5, replace=False).tolist()) == [0, 1, 2, 3, 4]
    assert set(mt.random.choice(mt.tensor([3.0, 4.0]), (30,)).tolist()) == {3.0, 4.0}
    with pytest.raises(mt.ShapeError, match="at most 5"):
        mt.random.choice(5, 6, replace=False)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(mt.ShapeError, match="high must be above low"):
        mt.random.integers(3, 3)
    for call in (lambda: mt.random.uniform(dtype="int32"), lambda: mt.random.randn(2, dtype="bool"),
                 lambda: mt.random.integers(3, dtype="float32")):
        with pytest.raises(mt.DTypeError):
            call()
    with pytest.raises(ValueError, match="between 0 and 1"):
        mt.random.bernoulli(1.5)
    with pytest.raises(mt.ShapeError):
        mt.random.rand(-1)


# --- initialisation ---------------------------------------------------------------------------------------

def moments(t: Any) -> tuple[float, float, float, float]:
    a = t.detach().numpy()
    return float(a.mean()), float(a.std()), float(a.min()), float(a.max())


INITS: list[tuple[str, dict[str, Any]]] = [
    ("uniform_", {"a": -2.0, "b": 5.0}), ("normal_", {"mean": 3.0, "std": 0.5}),
    ("xavier_uniform_", {"gain": 2.0}), ("xavier_normal_", {}), ("kaiming_uniform_", {"a": math.sqrt(5)}),
    ("kaiming_normal_", {"nonlinearity": "relu"}), ("kaiming_normal_", {"mode": "fan_out"}),
    ("trunc_normal_", {"std": 2.0, "a": -1.0, "b": 3.0}), ("constant_", {"val": 3}), ("zeros_", {}),
    ("ones_", {}), ("eye_", {})]


@pytest.mark.parametrize("name, options", INITS, ids=[n for n, _ in INITS])
def test_initialisation_has_torch_s_distribution(name: str, options: dict[str, Any]) -> None:
    mt.init(workers=2, backend="local")
    ours = nn.Parameter(mt.zeros((120, 160), layout=mt.Shard(1)))
    theirs = torch.empty(120, 160)
    torch.manual_seed(0)
    assert getattr(init, name)(ours, **options) is ours
    getattr(torch.nn.init, name)(theirs, **options)
    spread = max(float(theirs.std()), 1e-3)
    np.testing.assert_allclose(moments(ours)[:2], moments(theirs)[:2], atol=0.03 * spread)
    if "normal_" not in name or "trunc" in name:
        np.testing.assert_allclose(moments(ours)[2:], moments(theirs)[2:], atol=0.01 * spread)
    assert ours.layout == mt.Shard(1) and ours.is_leaf and ours.requires_grad


def test_default_initialisation_is_distributed_as_torch_s() -> None:
    torch.manual_seed(0)
    for ours, theirs in ((nn.Linear(300, 200), torch.nn.Linear(300, 200)),
                         (nn.Embedding(200, 100), torch.nn.Embedding(200, 100)),
                         (nn.LayerNorm(5), torch.nn.LayerNorm(5)), (nn.RMSNorm(5), torch.nn.RMSNorm(5))):
        wanted = dict(theirs.named_parameters())
        for name, p in ours.named_parameters():
            t = wanted[name]
            assert p.shape == tuple(t.shape) and p.dtype == np.float32
            spread = float(t.detach().std()) or 1e-3
            np.testing.assert_allclose(moments(p)[:2], moments(t)[:2], atol=0.2 * spread)
            if isinstance(ours, nn.Linear):
                bound = 1 / math.sqrt(300)
                assert -bound <= moments(p)[2] < -0.95 * bound and 0.95 * bound < moments(p)[3] <= bound


@pytest.mark.parametrize("name, param", [
    ("linear", None), ("conv2d", None), ("sigmoid", None), ("tanh", None), ("relu", None),
    ("leaky_relu", None), ("leaky_relu", 0.3), ("selu", None)])
def test_gains(name: str, param: float | None) -> None:
    assert init.calculate_gain(name, param) == torch.nn.init.calculate_gain(name, param)


def test_inverse_erf() -> None:
    y = np.concatenate([np.linspace(-0.999999, 0.999999, 999), [0.0, 1e-9, -1e-300, 1 - 1e-8]])
    np.testing.assert_allclose(inverse_erf(mt.tensor(y)).numpy(), torch.erfinv(torch.tensor(y)).numpy(),
                               rtol=1e-7, atol=1e-15)
    assert np.isfinite(inverse_erf(mt.tensor(np.array([-1.0, 1.0]))).numpy()).all()


def test_wrong_initialisations_are_refused() -> None:
    p = nn.Parameter(mt.zeros((3,)))
    for call in (lambda: init.xavier_uniform_(p), lambda: init.kaiming_normal_(p), lambda: init.eye_(p)):
        with pytest.raises(mt.ShapeError, match="2 dimensions"):
            call()
    with pytest.raises(ValueError, match="fan_in"):
        init.kaiming_normal_(mt.zeros((2, 2)), mode="out")
    with pytest.raises(ValueError, match="unknown"):
        init.calculate_gain("wave")
