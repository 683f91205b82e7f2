"""The recurrent rows beside a step-by-step NumPy program, and their rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from eager import slope

import meshtape.runtime.ops  # noqa: F401  fills the table
from meshtape.runtime import panels
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import TABLE, Op
from meshtape.runtime.ops import recurrent_steps
from meshtape.runtime.ops.recurrent import Layer

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
Step = Callable[..., tuple[Any, ...]]


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def rnn_step(a: Any, b: Any, h: Any) -> tuple[Any]:
    return (np.tanh(a + b),)


def gru_step(a: Any, b: Any, h: Any) -> tuple[Any]:
    (ar, az, an), (br, bz, bn) = np.split(a, 3, axis=1), np.split(b, 3, axis=1)
    r, z = sigmoid(ar + br), sigmoid(az + bz)
    n = np.tanh(an + r * bn)
    return ((1 - z) * n + z * h,)


def lstm_step(a: Any, b: Any, h: Any, c: Any) -> tuple[Any, Any]:
    i, f, g, o = np.split(a + b, 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


STEPS: dict[str, Step] = {"rnn": rnn_step, "gru": gru_step, "lstm": lstm_step}


def attrs(name: str) -> dict[str, Any]:
    return dict(TABLE[name].attrs)


def inputs(name: str, steps: int = 4, batch: int = 3, features: int = 2, hidden: int = 5) -> list[Any]:
    rng, rows = np.random.default_rng(0), GATES[name] * hidden
    states = [(batch, hidden)] * (2 if name == "lstm" else 1)
    shapes = [(steps, batch, features), *states, (rows, features), (rows, hidden), (rows,), (rows,)]
    return [rng.normal(size=s) for s in shapes]


def by_steps(name: str, x: Any, *rest: Any) -> list[Any]:
    """Every state of every step."""
    *states, w_ih, w_hh, b_ih, b_hh = rest
    found = []
    for row in x:
        states = list(STEPS[name](row @ w_ih.T + b_ih, states[0] @ w_hh.T + b_hh, *states))
        found.append(states)
    return [np.stack(s) for s in zip(*found, strict=True)]


def forward(name: str, *given: Any) -> tuple[Any, ...]:
    out = TABLE[name].kernel(np, *given, **attrs(name))
    return out if isinstance(out, tuple) else (out,)


def gradients(name: str, *given: Any, **changed: Any) -> tuple[Any, ...]:
    op = TABLE[f"{name}_grad"]
    return op.kernel(np, *given, **{**op.attrs, **changed})


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("biased", [True, False])
def test_forward_is_the_steps_one_after_the_other(name: str, biased: bool) -> None:
    for steps in (1, 6):
        given = inputs(name, steps)
        if not biased:
            given[-2:] = 0.0, 0.0
        wanted = by_steps(name, *given)
        for a, b in zip(forward(name, *given), wanted, strict=False):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_are_the_slopes_of_the_steps(name: str, biased: bool) -> None:
    given = inputs(name)
    if not biased:
        given[-2:] = 0.0, 0.0
    outs, rng = forward(name, *given), np.random.default_rng(1)
    states = by_steps(name, *given)
    weights = [rng.normal(size=s.shape) for s in states]
    rest = [0.0] * (len(outs) - len(states))
    grads = gradients(name, *weights, *rest, *given, *outs)
    total = lambda: float(sum((w * s).sum() for w, s in zip(weights, by_steps(name, *given), strict=True)))
    for k, (x, g) in enumerate(zip(given, grads, strict=True)):
        if isinstance(x, np.ndarray):
            np.testing.assert_allclose(g, slope(total, x), rtol=1e-6, atol=1e-8, err_msg=f"input {k}")


@pytest.mark.parametrize("name", GATES)
def test_how_steps_and_products_are_divided_changes_nothing(name: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(name, 7, 32, 6, 64)
    monkeypatch.setattr(panels, "blas_core", lambda: "")
    monkeypatch.setattr(recurrent_steps, "ROWS", 1 << 20)
    monkeypatch.setattr(recurrent_steps, "CACHED", 1 << 20)
    outs = forward(name, *given)
    cotangents = [np.random.default_rng(k).normal(size=o.shape) for k, o in enumerate(outs)]
    wanted = gradients(name, *cotangents, *given, *outs)
    monkeypatch.setattr(panels, "blas_core", lambda: "SkylakeX")
    for rows, cached in ((1, 1), (3 * 32, 2 * 32 * 64), (5 * 32, 1 << 20)):
        monkeypatch.setattr(recurrent_steps, "ROWS", rows)
        monkeypatch.setattr(recurrent_steps, "CACHED", cached)
        for a, b in zip(forward(name, *given), outs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        for a, b in zip(gradients(name, *cotangents, *given, *outs), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GATES)
def test_the_gradient_of_the_input_can_be_left_out(name: str) -> None:
    given = inputs(name)
    outs = forward(name, *given)
    every = gradients(name, *outs, *given, *outs)
    none, *rest = gradients(name, *outs, *given, *outs, input_grad=False)
    assert none.shape == (0, *given[0].shape[1:])
    for a, b in zip(every[1:], rest, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", GATES)
def test_a_gradient_that_is_not_there_counts_as_zero(name: str) -> None:
    given = inputs(name)
    outs = forward(name, *given)
    zeros = gradients(name, *(np.zeros_like(o) for o in outs), *given, *outs)
    absent = gradients(name, *(0.0 for _ in outs), *given, *outs)
    for a, b in zip(zeros, absent, strict=True):
        assert not a.any() and not b.any() and a.shape == b.shape


@pytest.mark.parametrize("name", GATES)
def test_half_precision_is_accumulated_in_single(name: str) -> None:
    given = inputs(name, 20, hidden=8)
    half = [a.astype(np.float16) for a in given]
    wanted = by_steps(name, *(a.astype(np.float64) for a in half))
    out = forward(name, *half)
    assert out[0].dtype == np.float16
    np.testing.assert_allclose(out[0], wanted[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", GATES)
def test_saturated_gates_stay_finite(name: str) -> None:
    given = [np.float32(a * 1e4) for a in inputs(name)]
    outs = forward(name, *given)
    grads = gradients(name, *(np.ones_like(o) for o in outs), *given, *outs)
    assert all(np.isfinite(a).all() for a in outs[:1])
    assert not np.isnan(grads[0]).any()


def shape_of(op: Op, given: list[Any]) -> Any:
    return op.shape(*(np.shape(a) for a in given), **op.attrs)


@pytest.mark.parametrize("name", GATES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    op, given = TABLE[name], inputs(name)
    changes = {0: (given[0][:0], "at least one step"), 1: (given[1][:2], "states are"),
               -3: (given[-3][:, :2], "weights are"), -4: (given[-4][:, :1], "weights are"),
               -1: (given[-1][:2], "biases")}
    for at, (bad, text) in changes.items():
        wrong = list(given)
        wrong[at] = bad
        with pytest.raises(ShapeError, match=text):
            shape_of(op, wrong)
    with pytest.raises(DTypeError, match="takes floating tensors, got int64"):
        op.dtype(*[np.dtype("int64")] * len(given), **op.attrs)
    outs = forward(name, *given)
    with pytest.raises(ShapeError, match=f"{name}_grad"):
        shape_of(TABLE[f"{name}_grad"], [outs[0][1:], *outs[1:], *given, *outs])


def test_rules_name_the_batch_as_the_only_split() -> None:
    axes = Layer("lstm", gates=4, states=2, saved=4).axes(*(np.shape(a) for a in inputs("lstm")))
    assert axes.ins == (".a.", "a.", "a.", "..", "..", ".", ".") and axes.outs == (".a.", ".a.", "..a.")
