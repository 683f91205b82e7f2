"""Recurrent layers and cells compute what PyTorch's do, on one worker and on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beside_torch import torch
from beside_torch_modules import compare, compare_penalty

import meshtape as mt
from meshtape import nn

RNG = np.random.default_rng(0)
KINDS = ("RNN", "GRU", "LSTM")
X = RNG.normal(size=(5, 4, 3))
pytestmark = pytest.mark.usefixtures("workers")


def pair(kind: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    return getattr(nn, kind)(*args, **options), getattr(torch.nn, kind)(*args, **options)


def states(kind: str, *shape: int) -> list[Any]:
    return [RNG.normal(size=shape) for _ in range(2 if "LSTM" in kind else 1)]


def with_states(kind: str) -> Callable[..., Any]:
    """A call that takes the states as further tensors."""
    return lambda module, x, *given: module(x, given if "LSTM" in kind else given[0])


# --- layers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"batch_first": True}, {"num_layers": 2}, {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
    {"num_layers": 2, "dropout": 0.5}], ids=str)
def test_layer(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(kind, 3, 6, **options)
    compare(ours.eval(), theirs.eval(), lambda module, x: module(x), [X])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_layer_from_given_states(kind: str, batch_first: bool) -> None:
    ours, theirs = pair(kind, 3, 2, 2, bidirectional=True, batch_first=batch_first)
    batch = X.shape[0 if batch_first else 1]
    compare(ours, theirs, with_states(kind), [X, *states(kind, 4, batch, 2)])


@pytest.mark.parametrize("kind", KINDS)
def test_layer_without_a_batch(kind: str) -> None:
    ours, theirs = pair(kind, 3, 2, 2)
    compare(ours, theirs, with_states(kind), [X[:, 0], *states(kind, 2, 2)])
    compare(ours, theirs, lambda module, x: module(x), [X[:1, 0]])


def test_relu_layer() -> None:
    compare(*pair("RNN", 3, 6, 2, "relu"), lambda module, x: module(x), [X])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_gradient(kind: str) -> None:
    compare_penalty(*pair(kind, 3, 4, bidirectional=True), lambda module, x: module(x), X[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_output_used_alone_gives_the_last_states_no_part(kind: str) -> None:
    compare(*pair(kind, 3, 5), lambda module, x: module(x)[0], [X])
    compare(*pair(kind, 3, 5), lambda module, x: module(x)[1], [X])


# --- cells ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell(kind: str, bias: bool) -> None:
    compare(*pair(kind, 3, 6, bias), lambda module, x: module(x), [X[0]])
    compare(*pair(kind, 3, 6, bias), with_states(kind), [X[0], *states(kind, 4, 6)])
    compare(*pair(kind, 3, 6, bias), with_states(kind), [X[0, 0], *states(kind, 6)])


def test_relu_cell() -> None:
    compare(*pair("RNNCell", 3, 6, True, "relu"), lambda module, x: module(x), [X[0]])


# --- initialisation, dropout, errors --------------------------------------------------------------------

def test_parameters_start_uniform_and_have_the_names_and_shapes_of_torch() -> None:
    ours, theirs = pair("LSTM", 30, 100, 2, bidirectional=True)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [
        (n, tuple(p.shape)) for n, p in theirs.named_parameters()]
    for p in ours.parameters():
        values = p.numpy()
        assert np.abs(values).max() <= 0.1 and values.std() == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_dropout_acts_between_layers_in_training_only(workers: int) -> None:
    layer = nn.GRU(3, 8, 2, dropout=0.5)
    x = mt.tensor(X, dtype="float32", layout=mt.Shard(1))
    first, second = (layer(x)[0].numpy() for _ in range(2))
    assert not np.array_equal(first, second)
    layer.eval()
    np.testing.assert_array_equal(layer(x)[0].numpy(), layer(x)[0].numpy())
    one = nn.GRU(3, 8, 1, dropout=0.5)
    np.testing.assert_array_equal(one(x)[0].numpy(), one(x)[0].numpy())


def test_a_split_batch_stays_split_and_weights_get_one_gradient(workers: int) -> None:
    layer = nn.LSTM(3, 8)
    y, _ = layer(mt.tensor(X, dtype="float32", layout=mt.Shard(1)))
    if workers > 1:
        assert y.layout == mt.tensor(X, layout=mt.Shard(1)).layout
    y.sum().backward()
    assert all(p.grad.layout == p.layout for p in layer.parameters())


def test_what_does_not_fit_is_refused_at_the_call() -> None:
    x = mt.zeros((5, 4, 3))
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: nn.LSTM(4, 2)(x), mt.ShapeError, "input_size 4 last"),
        (lambda: nn.LSTM(3, 2)(mt.zeros((3,))), mt.ShapeError, "steps, batch, features"),
        (lambda: nn.LSTM(3, 2)(mt.zeros((0, 4, 3))), mt.ShapeError, "at least one step"),
        (lambda: nn.LSTM(3, 2)(x, (mt.zeros((1, 4, 2)),)), mt.ShapeError, "2 states"),
        (lambda: nn.GRU(3, 2)(x, mt.zeros((4, 2))), mt.ShapeError, r"\(1, 4, 2\)"),
        (lambda: nn.GRU(3, 0), mt.ShapeError, "hidden_size is 0"),
        (lambda: nn.GRU(3, 2, 0), mt.ShapeError, "num_layers is 0"),
        (lambda: nn.GRU(3, 2, dropout=2), ValueError, "between 0 and 1"),
        (lambda: nn.RNN(3, 2, 1, "sigmoid"), ValueError, "'tanh' or 'relu'"),
        (lambda: nn.GRUCell(3, 2)(x), mt.ShapeError, "batch, features"),
    ]
    for call, kind, text in calls:
        with pytest.raises(kind, match=text):
            call()
