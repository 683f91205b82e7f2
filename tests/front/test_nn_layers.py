"""Layers and losses compute what PyTorch's do, forward and backward, on one worker and on several."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from beside_torch import check, check_modules, torch

import meshtape as mt
from meshtape import nn
from meshtape.nn import functional as F

TF = torch.nn.functional
RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 6))
pytestmark = pytest.mark.usefixtures("workers")


# --- layers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(5, 6), (6,), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    check_modules(nn.Linear(6, 4, bias=bias), torch.nn.Linear(6, 4, bias=bias), RNG.normal(size=shape))


def test_linear_without_outputs_or_inputs() -> None:
    assert nn.Linear(3, 0)(mt.zeros((2, 3))).shape == (2, 0)
    assert nn.Linear(0, 3, bias=False)(mt.zeros((2, 0))).numpy().tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("normalized, options",
                         [(6, {}), ((5, 6), {"eps": 0.1}), (6, {"elementwise_affine": False}),
                                                 (6, {"bias": False})])
def test_layer_norm(normalized: Any, options: dict[str, Any]) -> None:
    check_modules(nn.LayerNorm(normalized, **options), torch.nn.LayerNorm(normalized, **options),
                  RNG.normal(size=(4, 5, 6)))


@pytest.mark.parametrize("normalized, options",
                         [(6, {}), ((5, 6), {"eps": 0.1}), (6, {"elementwise_affine": False})])
def test_rms_norm(normalized: Any, options: dict[str, Any]) -> None:
    check_modules(nn.RMSNorm(normalized, **options), torch.nn.RMSNorm(normalized, **options),
                  RNG.normal(size=(4, 5, 6)))


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding(padding_idx: int | None) -> None:
    theirs = torch.nn.Embedding(7, 3, padding_idx=padding_idx).double()
    ours = nn.Embedding(7, 3, padding_idx=padding_idx).double()
    assert padding_idx is None or not ours.weight.numpy()[padding_idx].any()
    ours.load_state_dict(theirs.state_dict())
    tokens = RNG.integers(0, 7, (5, 4))
    out, wanted = ours(mt.tensor(tokens, layout=mt.Shard(0))), theirs(torch.tensor(tokens))
    np.testing.assert_array_equal(out.numpy(), wanted.detach().numpy())
    (out * out).sum().backward()
    (wanted * wanted).sum().backward()
    np.testing.assert_allclose(ours.weight.grad.numpy(), theirs.weight.grad.numpy(), rtol=1e-12)


ACTIVATIONS: list[tuple[Any, Any]] = [
    (nn.ReLU(), torch.nn.ReLU()), (nn.GELU(), torch.nn.GELU()), (nn.GELU("tanh"), torch.nn.GELU("tanh")),
    (nn.SiLU(), torch.nn.SiLU()), (nn.Tanh(), torch.nn.Tanh()), (nn.Sigmoid(), torch.nn.Sigmoid()),
    (nn.LeakyReLU(0.2), torch.nn.LeakyReLU(0.2)), (nn.Softplus(2.0, 5.0), torch.nn.Softplus(2.0, 5.0)),
    (nn.ELU(0.7), torch.nn.ELU(0.7)), (nn.Softmax(0), torch.nn.Softmax(0)),
    (nn.Softmax(dim=-1), torch.nn.Softmax(-1)), (nn.LogSoftmax(axis=1), torch.nn.LogSoftmax(1)),
    (nn.Identity(), torch.nn.Identity()), (nn.Flatten(0), torch.nn.Flatten(0)),
    (nn.Dropout(0.0), torch.nn.Dropout(0.0))]


@pytest.mark.parametrize("pair", ACTIVATIONS, ids=lambda pair: repr(pair[0]))
def test_activation(pair: tuple[Any, Any]) -> None:
    check(*pair, [np.concatenate([X * 3, np.zeros((1, 6)), X * 30])])


@pytest.mark.parametrize("p, dim", [(2.0, 1), (1.0, 0), (math.inf, -1), (3.0, 1)])
def test_normalize(p: float, dim: int) -> None:
    check(lambda x: F.normalize(x, p, dim), lambda x: TF.normalize(x, p, dim), [X])


def test_a_whole_model() -> None:
    ours = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3),
                         nn.LogSoftmax(-1))
    t = torch.nn
    theirs = t.Sequential(t.Flatten(), t.Linear(12, 8), t.GELU(), t.LayerNorm(8), t.Linear(8, 3),
                          t.LogSoftmax(-1))
    check_modules(ours, theirs, RNG.normal(size=(7, 3, 4)))


def test_dropout_keeps_the_expected_share_and_scales_it() -> None:
    layer = nn.Dropout(0.25)
    x = mt.ones((200, 100), layout=mt.Shard(0), requires_grad=True)
    y = layer(x)
    values = y.numpy()
    assert set(np.unique(values)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((values != 0).mean() - 0.75) < 0.01
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), values)      # the gradient goes where the values went
    assert not np.array_equal(layer(x).numpy(), values)         # a new draw every time
    assert layer.eval()(x) is x
    assert not F.dropout(x, 1.0).numpy().any()


# --- losses ---------------------------------------------------------------------------------------------

REDUCTIONS = ("mean", "sum", "none")
WEIGHT = RNG.uniform(0.5, 2.0, 4)


def logits(shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(1).normal(size=shape) * 2


def labels(shape: tuple[int, ...], ignored: bool) -> Any:
    found = np.asarray(np.random.default_rng(2).integers(0, 4, shape))
    if ignored and found.size:
        found.reshape(-1)[::3] = -100
    return found


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(7, 4), (4,), (3, 4, 2), (2, 4, 3, 2)])
def test_cross_entropy_of_indices(reduction: str, weighted: bool, smoothing: float,
                                  shape: tuple[int, ...]) -> None:
    options = {"reduction": reduction, "label_smoothing": smoothing}
    y = labels(shape[:1] + shape[2:] if len(shape) > 1 else (), len(shape) > 1)
    check(lambda x, y: F.cross_entropy(x, y, mt.tensor(WEIGHT) if weighted else None, **options),
          lambda x, y: TF.cross_entropy(x, y, torch.tensor(WEIGHT) if weighted else None, **options),
          [logits(shape), y])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(7, 4), (4,), (3, 4, 2)])
def test_cross_entropy_of_probabilities(reduction: str, weighted: bool, smoothing: float,
                                        shape: tuple[int, ...]) -> None:
    options = {"reduction": reduction, "label_smoothing": smoothing}
    y = RNG.uniform(0, 1, shape)
    check(lambda x, y: F.cross_entropy(x, y, mt.tensor(WEIGHT) if weighted else None, **options),
          lambda x, y: TF.cross_entropy(x, y, torch.tensor(WEIGHT) if weighted else None, **options),
          [logits(shape), y])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(7, 4), (4,), (3, 4, 2)])
def test_nll_loss(reduction: str, weighted: bool, shape: tuple[int, ...]) -> None:
    y = labels(shape[:1] + shape[2:] if len(shape) > 1 else (), len(shape) > 1)
    check(lambda x, y: F.nll_loss(x, y, mt.tensor(WEIGHT) if weighted else None, reduction=reduction),
          lambda x, y: TF.nll_loss(x, y, torch.tensor(WEIGHT) if weighted else None, reduction=reduction),
          [logits(shape), y])


def test_ignore_index_may_be_any_number() -> None:
    y = np.array([0, 2, 3, 2, 1])
    for reduction in REDUCTIONS:
        check(lambda x, y, r=reduction: F.cross_entropy(x, y, ignore_index=2, reduction=r),
              lambda x, y, r=reduction: TF.cross_entropy(x, y, ignore_index=2, reduction=r),
              [logits((5, 4)), y])


LOSSES: list[tuple[str, Callable[..., Any], Callable[..., Any], dict[str, Any]]] = [
    ("mse", nn.MSELoss, torch.nn.MSELoss, {}), ("l1", nn.L1Loss, torch.nn.L1Loss, {}),
    ("smooth_l1", nn.SmoothL1Loss, torch.nn.SmoothL1Loss, {"beta": 0.7}),
    ("huber", nn.HuberLoss, torch.nn.HuberLoss, {"delta": 0.7}),
    ("bce", nn.BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss, {})]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name, ours, theirs, options", LOSSES, ids=[loss[0] for loss in LOSSES])
def test_loss_of_pairs(name: str, ours: Any, theirs: Any, options: dict[str, Any], reduction: str) -> None:
    target = RNG.uniform(0, 1, (5, 6))
    check(ours(reduction=reduction, **options), theirs(reduction=reduction, **options), [X * 2, target])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_binary_cross_entropy_weights(reduction: str) -> None:
    w, pos, y = RNG.uniform(0, 1, (5, 1)), RNG.uniform(0.5, 3, 6), RNG.uniform(0, 1, (5, 6))
    check(lambda x, y: F.binary_cross_entropy_with_logits(x, y, mt.tensor(w), reduction, mt.tensor(pos)),
          lambda x, y: TF.binary_cross_entropy_with_logits(x, y, torch.tensor(w), reduction=reduction,
                                                           pos_weight=torch.tensor(pos)), [X * 50, y])


def test_losses_as_modules_hold_their_weights() -> None:
    ours = nn.CrossEntropyLoss(mt.tensor(WEIGHT), ignore_index=1, label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(torch.tensor(WEIGHT), ignore_index=1, label_smoothing=0.1)
    assert list(ours.state_dict()) == ["weight"]
    check(ours, theirs, [logits((6, 4)), labels((6,), False)])
    check(nn.NLLLoss(mt.tensor(WEIGHT)), torch.nn.NLLLoss(torch.tensor(WEIGHT)),
          [logits((6, 4)), labels((6,), True)])


# --- attention and one-hot --------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["plain", "causal", "bool", "float", "scale", "gqa"])
def test_attention(case: str) -> None:
    q, k, v = RNG.normal(size=(3, 4, 5, 6)), RNG.normal(size=(3, 4, 7, 6)), RNG.normal(size=(3, 4, 7, 2))
    if case == "gqa":
        k, v = k[:, :2], v[:, :2]
    allowed = RNG.uniform(size=(5, 7)) < 0.6
    allowed[2] = False
    mask = {"bool": allowed, "float": RNG.normal(size=(3, 1, 5, 7))}.get(case)
    options: dict[str, Any] = {"is_causal": case == "causal", "scale": 0.3 if case == "scale" else None,
                               "enable_gqa": case == "gqa"}
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, **options),
          lambda q, k, v: TF.scaled_dot_product_attention(
              q, k, v, None if mask is None else torch.tensor(mask), **options), [q, k, v])


def test_one_hot() -> None:
    y = labels((5, 2), False)
    for classes in (-1, 4, 6):
        wanted = TF.one_hot(torch.tensor(y), classes).numpy()
        np.testing.assert_array_equal(F.one_hot(mt.tensor(y), classes).numpy(), wanted)


# --- half precision and errors ----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_losses_of_16_bit_floats_keep_their_dtype_and_do_not_overflow(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    n = 70000                                       # more than float16 can count
    x = mt.zeros((n, 2), dtype=dtype, layout=mt.Shard(0))
    y = mt.zeros((n,), dtype="int64", layout=mt.Shard(0))
    weight = mt.tensor([2.0, 1.0])
    for loss in (F.cross_entropy(x, y), F.cross_entropy(x, y, weight), F.nll_loss(F.log_softmax(x), y),
                 F.cross_entropy(x, y, label_smoothing=0.1), F.cross_entropy(x, x + 0.5),
                 F.binary_cross_entropy_with_logits(x, x + 0.5)):
        assert loss.dtype.name == dtype
        np.testing.assert_allclose(float(loss.item()), math.log(2), rtol=0.01)
    layer = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.RMSNorm(4)).to(dtype)
    assert layer(mt.ones((2, 6), dtype=dtype)).dtype.name == dtype


def test_what_does_not_fit_is_refused_at_the_call() -> None:
    x, y = mt.zeros((4, 3)), mt.zeros((4,), dtype="int64")
    q = mt.zeros((2, 3, 4))
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: nn.Linear(5, 2)(x), mt.ShapeError, "check the layer sizes"),
        (lambda: nn.LayerNorm(4)(x), mt.ShapeError, r"normalized_shape \(4,\)"),
        (lambda: F.cross_entropy(x, y[:3]), mt.ShapeError, r"target \(3,\)"),
        (lambda: F.cross_entropy(x, y.astype("float32")), mt.DTypeError, "class indices"),
        (lambda: F.cross_entropy(x, y, mt.ones(2)), mt.ShapeError, "one number for each of 3 classes"),
        (lambda: F.cross_entropy(x, y, reduction="average"), ValueError, "'mean', 'sum' or 'none'"),
        (lambda: F.cross_entropy(x, y, label_smoothing=2.0), ValueError, "between 0 and 1"),
        (lambda: F.nll_loss(mt.zeros(()), y[0]), mt.ShapeError, "is a number"),
        (lambda: F.mse_loss(x, mt.zeros((5, 3))), mt.ShapeError, "broadcast"),
        (lambda: F.binary_cross_entropy_with_logits(x, y), mt.ShapeError, "one shape"),
        (lambda: F.binary_cross_entropy_with_logits(y * 1.0, y), mt.DTypeError, "floating"),
        (lambda: F.smooth_l1_loss(x, x, beta=-1), ValueError, "beta"),
        (lambda: F.huber_loss(x, x, delta=0), ValueError, "delta"),
        (lambda: F.softmax(x, 2), mt.ShapeError, "axis 2"),
        (lambda: F.softmax(x, 0, dim=1), mt.ShapeError, "axis=0 and dim=1"),
        (lambda: F.dropout(x, 1.5), ValueError, "between 0 and 1"),
        (lambda: nn.Dropout(-0.1), ValueError, "between 0 and 1"),
        (lambda: F.gelu(x, "fast"), ValueError, "approximate"),
        (lambda: nn.Embedding(4, 3, padding_idx=4), mt.ShapeError, "padding_idx 4"),
        (lambda: F.embedding(x, mt.zeros((4, 3))), mt.DTypeError, "integers"),
        (lambda: F.scaled_dot_product_attention(q, q, q, mt.ones((3, 3)), is_causal=True), mt.ShapeError,
         "not both"),
        (lambda: F.scaled_dot_product_attention(q, q, q, y[:3]), mt.DTypeError, "boolean mask"),
        (lambda: F.scaled_dot_product_attention(mt.zeros((5, 2, 4)), q, q, enable_gqa=True), mt.ShapeError,
         "no multiple"),
    ]
    for call, kind, text in calls:
        with pytest.raises(kind, match=text):
            call()


def test_a_class_out_of_range_is_reported_with_the_line_of_the_call() -> None:
    loss = F.cross_entropy(mt.zeros((4, 3)), mt.tensor(np.array([0, 1, 3, 0])))
    with pytest.raises(mt.WorkerError, match=r"target 3 is not one of 3 classes.*test_nn_layers\.py"):
        loss.item()
    assert F.cross_entropy(mt.zeros((2, 3)), mt.tensor(np.array([0, 1]))).item() > 1
