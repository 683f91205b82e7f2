"""The attention rows: blocks, masks, dropout and memory, beside the formula in NumPy."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import meshtape.runtime.ops  # noqa: F401  fills the table
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import TABLE
from meshtape.runtime.ops import attention_blocks

FORWARD, BACKWARD = TABLE["attention"], TABLE["attention_grad"]


def arrays(batch: tuple[int, ...], queries: int, keys: int, width: int = 4, value: int = 3) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = ((queries, width), (keys, width), (keys, value), (queries, value))
    return [rng.normal(size=batch + s) for s in shapes]


def formula(q: Any, k: Any, v: Any, mask: Any = True, *, is_causal: bool = False, scale: float = 1.0,
            kept: Any = 1.0) -> tuple[Any, Any]:
    """(weights, output) with a whole matrix of scores; `kept` is dropout's mask times its factor."""
    scores = scale * (q @ k.swapaxes(-1, -2))
    if np.asarray(mask).dtype == bool:
        scores = np.where(mask, scores, -np.inf)
    else:
        scores = scores + mask
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    return weights, (kept * weights) @ v


def formula_grads(g: Any, q: Any, k: Any, v: Any, weights: Any, scale: float, kept: Any = 1.0) -> list[Any]:
    by_weights = kept * (g @ v.swapaxes(-1, -2))
    e = weights * (by_weights - (by_weights * weights).sum(-1, keepdims=True))
    return [scale * (e @ k), scale * (e.swapaxes(-1, -2) @ q), (kept * weights).swapaxes(-1, -2) @ g]


def run(q: Any, k: Any, v: Any, g: Any, mask: Any = True, draws: tuple[int, int] = (0, 0),
        **attrs: Any) -> tuple[Any, list[Any]]:
    """Output and gradients of the kernels."""
    named = FORWARD.attrs | attrs
    with np.errstate(all="ignore"):
        out, lse = FORWARD.kernel(np, q, k, v, mask, *draws, **named)
        return out, list(BACKWARD.kernel(np, g, (g * out).sum(-1), q, k, v, lse, mask, *draws, **named))


def same(found: tuple[Any, list[Any]], wanted: tuple[Any, list[Any]]) -> None:
    for a, b in zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("room", [1, 40, 300, 10**6])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", ["no", "bool", "float", "of keys", "of heads"])
@pytest.mark.parametrize("scale", [0.5, 300.0])
def test_blocks_of_any_size_compute_the_formula(monkeypatch: pytest.MonkeyPatch, room: int, is_causal: bool,
                                                masked: str, scale: float) -> None:
    monkeypatch.setattr(attention_blocks, "CACHED", room)
    monkeypatch.setattr(attention_blocks, "CAUSAL_ROWS", 5)
    q, k, v, g = arrays((2, 3), 37, 29)
    rng = np.random.default_rng(1)
    masks = {"no": True,
             "bool": rng.uniform(size=(37, 29)) < 0.4,
             "float": rng.normal(size=(2, 1, 37, 29)),
             "of keys": rng.uniform(size=(2, 1, 1, 29)) < 0.4,
             "of heads": rng.uniform(size=(3, 37, 29)) < 0.5}
    mask = masks[masked]
    weights, out = formula(q, k, v, mask, is_causal=is_causal, scale=scale)
    same(run(q, k, v, g, mask, is_causal=is_causal, scale=scale),
         (out, formula_grads(g, q, k, v, weights, scale)))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    q, k, v, g = (a.astype(np.float32) for a in arrays((2,), 8, 8))
    for scale in (1e-3, 1.0, 10.0, 1e3, 1e30):
        _, out = formula(q, k, v, scale=scale)
        found, grads = run(q, k, v, g, scale=scale)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, out, rtol=1e-4, atol=1e-5)
        if scale < 1e30:
            assert all(np.isfinite(d).all() for d in grads)
    bias = np.where(np.arange(8) < 4, 0, -1e30).astype(np.float32)
    half = formula(q, k[:, :4], v[:, :4])[1]
    np.testing.assert_allclose(run(q, k, v, g, bias)[0], half, rtol=1e-5, atol=1e-6)
    assert np.isnan(run(q * np.nan, k, v, g)[0]).all()


@pytest.mark.parametrize("room", [1, 10**6])
def test_dropout_takes_the_bits_of_the_whole_tensor_of_weights(monkeypatch: pytest.MonkeyPatch,
                                                               room: int) -> None:
    monkeypatch.setattr(attention_blocks, "CACHED", room)
    q, k, v, g = arrays((2, 3), 21, 6)
    ones = np.ones((2, 3, 21, 6))
    kept = TABLE["dropout"].kernel(np, ones, 5, 7, p=0.3, offset=None, whole=None)
    weights, out = formula(q, k, v, scale=0.5, kept=kept)
    wanted = out, formula_grads(g, q, k, v, weights, 0.5, kept)
    same(run(q, k, v, g, draws=(5, 7), scale=0.5, p=0.3), wanted)
    part = (slice(1, 2), slice(1, 3), slice(4, 15))         # one worker's batch entry, heads and queries
    found, (dq, _, _) = run(q[part], k[part[:2]], v[part[:2]], g[part], draws=(5, 7), scale=0.5, p=0.3,
                            offset=(1, 1, 4, 0), whole=(2, 3, 21, 3))
    np.testing.assert_allclose(found, wanted[0][part], rtol=1e-10)
    np.testing.assert_allclose(dq, wanted[1][0][part], rtol=1e-9, atol=1e-12)


def test_a_piece_of_the_queries_looks_at_keys_before_its_place() -> None:
    q, k, v, g = arrays((2,), 9, 7)
    whole, grads = run(q, k, v, g, is_causal=True)
    by_k, by_v = np.zeros_like(k), np.zeros_like(v)
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        part, (dq, dk, dv) = run(q[:, start:stop], k, v, g[:, start:stop], is_causal=True,
                                 offset=(0, start, 0), whole=(2, 9, 3))
        np.testing.assert_allclose(part, whole[:, start:stop], rtol=1e-10)
        np.testing.assert_allclose(dq, grads[0][:, start:stop], rtol=1e-9, atol=1e-12)
        by_k += dk
        by_v += dv
    np.testing.assert_allclose(by_k, grads[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(by_v, grads[2], rtol=1e-9, atol=1e-12)


def test_no_whole_matrix_of_scores_is_made() -> None:
    n = 2048
    q, k, v, g = (a.astype(np.float32) for a in arrays((), n, n, 16, 16))
    tracemalloc.start()
    try:
        run(q, k, v, g, is_causal=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < n * n * 4 / 4


def test_what_does_not_fit_is_refused() -> None:
    def shape(*shapes: Any, **attrs: Any) -> Any:
        return FORWARD.shape(*shapes, **FORWARD.attrs | attrs)

    q = (2, 5, 4)
    for bad, text in ((((4,), q, q, ()), "length, width"), ((q, (3, 5, 4), q, ()), "leading dimensions"),
                      ((q, (2, 5, 3), q, ()), "equally wide"), ((q, q, (2, 6, 4), ()), "equally long"),
                      ((q, q, q, (5, 4)), "broadcast"), ((q, q, q, (3, 1, 5, 5)), "does not broadcast")):
        with pytest.raises(ShapeError, match=text):
            shape(*bad, (), ())
    with pytest.raises(ShapeError, match="probability"):
        shape(q, q, q, (), (), (), p=1.5)
    with pytest.raises(ShapeError, match="log-sum-exp"):
        BACKWARD.shape(q, q[:1], q, q, q, q[:2], (), (), (), **BACKWARD.attrs)
    f64, i64 = np.dtype("float64"), np.dtype("int64")
    with pytest.raises(DTypeError, match="mask has dtype int64"):
        FORWARD.dtype(f64, f64, f64, i64, int, int, **FORWARD.attrs)
    with pytest.raises(DTypeError, match="complex"):
        FORWARD.dtype(*[np.dtype("complex64")] * 3, bool, int, int, **FORWARD.attrs)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (2, 0, 3, 1, 4), (2, 1, 3, 0, 4)])
@pytest.mark.parametrize("scale", [0.5, 300.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention_of_a_sequence_to_itself_wherever_it_lies(order: tuple[int, ...], scale: float,
                                                            dtype: str) -> None:
    """Query, key and value as one tensor, in the order of memory of various projections."""
    shape = (3, 2, 5, 37, 4)
    lying = np.random.default_rng(0).normal(size=[shape[order.index(d)] for d in range(5)]).astype(dtype)
    qkv, itself = lying.transpose(order), TABLE["self_attention"]
    assert qkv.shape == shape
    g = np.random.default_rng(1).normal(size=shape[1:]).astype(dtype)
    mask = np.random.default_rng(2).uniform(size=(2, 1, 37, 37)) < 0.6
    attrs = itself.attrs | {"scale": scale, "p": 0.3, "is_causal": True}
    with np.errstate(all="ignore"):
        out, lse = itself.kernel(np, qkv, mask, 5, 7, **attrs)
        delta = (g * out).sum(-1)
        d = TABLE["self_attention_grad"].kernel(np, g, delta, qkv, lse, mask, 5, 7, **attrs)
    wanted, grads = run(*(np.ascontiguousarray(x) for x in qkv), g, mask, (5, 7), scale=scale, p=0.3,
                        is_causal=True)
    assert (out.dtype, d.dtype, d.shape) == (qkv.dtype, qkv.dtype, shape)
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype == "float32" else {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(out, wanted, **close)
    for a, b in zip(d, grads, strict=True):
        np.testing.assert_allclose(a, b, **close)
    if order != (0, 1, 2, 3, 4):            # results lie as the inputs do: a projection copies nothing
        assert d.transpose(np.argsort(order)).flags.c_contiguous


def test_a_query_may_look_nowhere_beside_others_that_look() -> None:
    q, k, v, g = (a.astype(np.float32) for a in arrays((2, 3), 40, 40))
    mask = np.ones((40, 40), bool)
    mask[7] = False
    weights, out = formula(q, k, v, mask)
    found, grads = run(q, k, v, g, mask)
    assert (found[:, :, 7] == 0).all()
    assert (grads[0][:, :, 7] == 0).all()
    np.testing.assert_allclose(found, out, rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, formula_grads(g, q, k, v, weights, 1.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
