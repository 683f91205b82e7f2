"""Softmax, losses, layer norm and dropout: values and derivatives beside torch's, extremes, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from eager import check_gradients
from table import make_inputs, samples

from meshtape.runtime import rowwise
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import lookup

torch = pytest.importorskip("torch")
F = torch.nn.functional

ROWS = ["softmax", "log_softmax", "softmax_grad", "log_softmax_grad", "nll", "nll_grad", "cross_entropy",
        "cross_entropy_grad", "layer_norm", "normalize", "dropout"]
RNG = np.random.default_rng(0)


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    with np.errstate(all="ignore"):
        return op.kernel(np, *inputs, **op.unpack(op.pack(attrs)))


def check(name: str, *given: Any, **attrs: Any) -> Any:
    """Input and output dtypes of a row."""
    op = lookup(name)
    return op.dtype(*map(np.dtype, given), **op.unpack(op.pack(attrs)))


@pytest.mark.parametrize("name", ROWS)
def test_gradients_match_finite_differences_to_second_order(name: str) -> None:
    for sample in samples(lookup(name)):
        if sample.diff:
            check_gradients(lookup(name), make_inputs(sample, np.random.default_rng(0)), sample.attrs)


# --- softmax ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, axis", [
    ((5, 3), 1), ((5, 3), 0), ((2, 7, 3), 1), ((300, 1000), -1), ((), 0)])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_is_torchs(name: str, shape: Any, axis: int) -> None:
    x = RNG.normal(size=shape) * 10
    wanted = getattr(torch, name)(torch.tensor(x), axis).numpy()
    np.testing.assert_allclose(run(name, np.asarray(x), axis=axis), wanted, rtol=1e-12, atol=1e-13)


def test_softmax_neither_overflows_nor_hides_nan() -> None:
    x = np.array([[1e4, 1e4, -1e4], [-np.inf, 0.0, 0.0], [np.nan, 0.0, 0.0], [-1e300, 1e300, 0.0]])
    wanted = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [np.nan] * 3, [0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(run("softmax", x), wanted)
    np.testing.assert_allclose(run("log_softmax", x[:1]), [[np.log(0.5), np.log(0.5), np.log(0.5) - 2e4]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_softmax_of_halves_sums_in_float32(dtype: str) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    found = run("softmax", np.zeros((1, 4096), dtype))
    assert found.dtype == dtype and (found.astype("float32") == 2.0**-12).all()


def test_a_block_of_rows_is_no_boundary() -> None:
    rows = rowwise.CACHED // 100 * 2 + 17
    x = RNG.normal(size=(rows, 100))
    target = RNG.integers(0, 100, rows)
    total, count, p = run("cross_entropy", x, target)
    wanted = F.cross_entropy(torch.tensor(x), torch.tensor(target), reduction="sum").item()
    np.testing.assert_allclose(total, wanted)
    assert count == rows
    np.testing.assert_allclose(p, torch.softmax(torch.tensor(x), 1).numpy(), rtol=1e-12)
    y, mean, rstd = run("normalize", x)
    np.testing.assert_allclose(y, F.layer_norm(torch.tensor(x), (100,)).numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mean[:, 0], x.mean(1), atol=1e-12)
    np.testing.assert_allclose(rstd[:, 0], 1 / np.sqrt(x.var(1) + 1e-5), rtol=1e-12)


@pytest.mark.parametrize("offset", [-300.0, -100.0, -12.0, -5.0, 0.0, 5.0, 12.0, 30.0, 100.0, 300.0])
@pytest.mark.parametrize("width", [3, 65, 600])
def test_logits_of_any_size_lose_no_more_than_rounding(offset: float, width: int) -> None:
    """Whether or not a maximum is subtracted; relative to float64, as good as float32 can be."""
    x = (np.random.default_rng(0).normal(size=(50, width)) * 2 + offset).astype(np.float32)
    x[7] += 40
    x[9, 1] = -np.inf
    target = np.random.default_rng(1).integers(2, width, 50)
    wide = torch.tensor(x.astype(np.float64))
    np.testing.assert_allclose(run("softmax", x), torch.softmax(wide, 1), rtol=2e-6)
    exact = torch.log_softmax(wide, 1).numpy()
    np.testing.assert_allclose(run("log_softmax", x), exact, rtol=2e-7, atol=2e-6 + 1.2e-7 * abs(offset))
    total, _, p = run("cross_entropy", x, target)
    np.testing.assert_allclose(p, torch.softmax(wide, 1), rtol=2e-6)
    np.testing.assert_allclose(total, -exact[np.arange(50), target].sum(), rtol=2e-6)


# --- classification losses ----------------------------------------------------------------------------

CASES: list[tuple[Any, Any, dict[str, Any]]] = [
    (RNG.normal(size=(6, 4)), RNG.integers(0, 4, 6), {}), (RNG.normal(size=4), np.array(3), {}),
    (RNG.normal(size=(2, 4, 3, 5)), RNG.integers(0, 4, (2, 3, 5)), {"label_smoothing": 0.2}),
    (RNG.normal(size=(6, 4)), np.array([0, 1, -100, 3, -100, 2]), {}),
    (RNG.normal(size=(6, 4)), np.array([0, 1, 1, 3, 1, 2]), {"ignore_index": 1, "label_smoothing": 0.1}),
    (RNG.normal(size=(3, 4)), np.full(3, -100), {}),
    (RNG.normal(size=(2, 3, 0)), np.zeros((2, 0), np.int64), {})]


@pytest.mark.parametrize("x, target, attrs", CASES)
def test_cross_entropy_and_its_gradient_are_torchs(x: Any, target: Any, attrs: Any) -> None:
    t = torch.tensor(x, requires_grad=True)
    wanted = F.cross_entropy(t, torch.tensor(target), reduction="sum", **attrs)
    (3 * wanted).backward()
    total, count, p = run("cross_entropy", x, target, **attrs)
    np.testing.assert_allclose(total, wanted.item(), rtol=1e-12)
    assert count == (target != attrs.get("ignore_index", -100)).sum()
    grad = run("cross_entropy_grad", np.array(3.0), p, target, **attrs)
    np.testing.assert_allclose(grad, t.grad.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("x, target, attrs", CASES)
def test_nll_is_torchs(x: Any, target: Any, attrs: Any) -> None:
    ignore = {k: v for k, v in attrs.items() if k == "ignore_index"}
    wanted = F.nll_loss(torch.tensor(x), torch.tensor(target), reduction="none", **ignore).numpy()
    np.testing.assert_array_equal(run("nll", x, target, **ignore), wanted)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_targets_may_be_any_integers(dtype: str) -> None:
    x, target = RNG.normal(size=(5, 3)), np.array([0, 2, 1, 1, 0], dtype)
    np.testing.assert_array_equal(run("nll", x, target), -x[np.arange(5), target.astype(int)])


@pytest.mark.parametrize("name", ["nll", "cross_entropy"])
def test_a_target_that_is_no_class_is_named(name: str) -> None:
    for bad in (3, -1, 1000):
        with pytest.raises(IndexError, match=f"target {bad} is not one of 3 classes; use 0 to 2"):
            run(name, np.zeros((4, 3)), np.array([0, 1, bad, 2]))


@pytest.mark.parametrize("dtype", ["float32", "bool"])
@pytest.mark.parametrize("name", ["nll", "cross_entropy"])
def test_targets_that_are_no_integers_are_refused(name: str, dtype: str) -> None:
    with pytest.raises(DTypeError, match=f"{name}: targets are class indices .* integer dtype, got {dtype}"):
        check(name, "float32", dtype)


@pytest.mark.parametrize("name", ["nll", "cross_entropy"])
def test_a_target_of_another_shape_is_refused(name: str) -> None:
    op = lookup(name)
    for x, target in (((6, 4), (4,)), ((6, 4), (6, 1)), ((2, 4, 3), (2, 4)), ((), ())):
        with pytest.raises(ShapeError, match="classes lie along dimension"):
            op.shape(x, target, **op.attrs)


def test_losses_of_halves_are_added_up_in_float32() -> None:
    _, outs = check("cross_entropy", "float16", "int64")
    assert outs == [np.dtype("float32"), np.dtype("float32"), np.dtype("float16")]
    total, count, p = run("cross_entropy", np.zeros((70000, 2), np.float16), np.zeros(70000, np.int64))
    assert count == 70000 and p.dtype == np.float16
    np.testing.assert_allclose(total, 70000 * np.log(2), rtol=1e-5)


# --- layer norm -------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, ndim", [((6, 5), 1), ((2, 3, 4), 2), ((4,), 1), ((0, 3), 1)])
def test_layer_norm_and_its_gradient_are_torchs(shape: Any, ndim: int) -> None:
    inner = shape[len(shape) - ndim:]
    arrays = [RNG.normal(size=s) for s in (shape, inner, inner)]
    x, w, b = (torch.tensor(a, requires_grad=True) for a in arrays)
    wanted = F.layer_norm(x, inner, w, b, eps=1e-3)
    g = RNG.normal(size=shape)
    wanted.backward(torch.tensor(g))
    out, mean, rstd = run("layer_norm", *arrays, ndim=ndim, eps=1e-3)
    np.testing.assert_allclose(out, wanted.detach().numpy(), rtol=1e-10, atol=1e-12)
    grads = run("layer_norm_grad", g, arrays[0], mean, rstd, arrays[1], ndim=ndim)
    for found, t in zip(grads, (x, w, b), strict=True):
        np.testing.assert_allclose(found, t.grad.numpy(), rtol=1e-9, atol=1e-11)


def test_layer_norm_keeps_small_variations_on_a_large_mean() -> None:
    x = (1e4 + RNG.normal(size=(4, 256))).astype(np.float32)
    exact = x.astype(np.float64)
    wanted = (exact - exact.mean(1, keepdims=True)) / exact.std(1, keepdims=True)
    np.testing.assert_allclose(run("normalize", x)[0], wanted, atol=2e-3)


def test_layer_norm_of_halves_keeps_its_statistics_in_float32() -> None:
    x = np.full((2, 4096), 60000, np.float16)
    out, mean, rstd = run("normalize", x)
    assert out.dtype == np.float16 and mean.dtype == rstd.dtype == np.float32
    assert (mean == 60000).all() and (out == 0).all()


def test_layer_norm_says_which_shapes_do_not_fit() -> None:
    op = lookup("layer_norm")
    with pytest.raises(ShapeError, match=r"weight and bias have the shape \(4,\).*got \(3,\)"):
        op.shape((2, 3, 4), (3,), (4,), ndim=1, eps=1e-5)
    with pytest.raises(ShapeError, match="3 normalized dimensions"):
        op.shape((2, 3), (3,), (3,), ndim=3, eps=1e-5)


# --- dropout ----------------------------------------------------------------------------------------

def test_dropout_zeroes_a_share_p_and_keeps_the_mean() -> None:
    x = np.ones((200, 500), np.float32)
    for p in (0.1, 0.5, 0.9):
        out = run("dropout", x, 3, 7, p=p)
        assert set(np.unique(out)) == {np.float32(0), np.float32(1 / (1 - p))}
        dropped = (out == 0).mean()
        assert abs(dropped - p) < 5 * np.sqrt(p * (1 - p) / x.size)


def test_dropout_with_p_0_is_the_input_and_with_p_1_zero() -> None:
    x = RNG.normal(size=(3, 4))
    np.testing.assert_array_equal(run("dropout", x, 1, 1, p=0.0), x)
    np.testing.assert_array_equal(run("dropout", x, 1, 1, p=1.0), np.zeros((3, 4)))


def test_every_draw_drops_other_elements() -> None:
    x = np.ones(1000)
    masks = [run("dropout", x, seed, draw) for seed, draw in ((1, 1), (1, 2), (2, 1), (1, 1))]
    assert (masks[0] == masks[3]).all()
    for other in masks[1:3]:
        assert 400 < (masks[0] != other).sum() < 600


def test_dropout_refuses_what_is_no_probability() -> None:
    with pytest.raises(ShapeError, match=r"p is the probability of a zero, 0 to 1, got 1\.5"):
        lookup("dropout").shape((3,), (), (), p=1.5, offset=None, whole=None)
