"""Scaled dot-product attention: one fused row forward and one backward, without a matrix of all scores.

For each query i over the keys j, with S = scale * q k^T + mask:

    lse_i = log sum_j exp(S_ij),   P_ij = exp(S_ij - lse_i),   out_i = sum_j D_ij P_ij v_j

(Vaswani et al. 2017, arXiv:1706.03762, eq. 1; D is dropout's 0 or 1 / (1 - p)). Backward keeps out and lse
alone and computes P again (Dao et al. 2022, arXiv:2205.14135, algorithm 4): with
delta_i = sum_k g_ik out_ik - g_lse_i

    dA = D * (g v^T),   E = P * (dA - delta),   dv = (D * P)^T g,   dq = scale * E k,   dk = scale * E^T q

Both go over blocks of queries whose scores stay in the cache. Leading dimensions (batch, heads) and the
queries may be split, the keys never: where the queries are split, dk and dv are Partial.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meshtape.runtime import dtypes
from meshtape.runtime.cuda import attention as device_kernels
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import ALPHABET, IO, Axes, Op, Sample, broadcast_shapes, register
from meshtape.runtime.ops.attention_blocks import Dropout, Scores, backward, entries, forward
from meshtape.runtime.ops.contraction import matmul, widen
from meshtape.runtime.ops.pad import tril
from meshtape.runtime.ops.pointwise import add, exp, mul, negative, sub, where
from meshtape.runtime.ops.random import dropout
from meshtape.runtime.ops.reduce import accumulator, sum_
from meshtape.runtime.ops.rules import COMPLEX, floated
from meshtape.runtime.ops.shape import expand_dims
from meshtape.runtime.shards import Shape

Attrs = dict[str, Any]
ATTENTION: Attrs = {"is_causal": False, "scale": 1.0, "p": 0.0, "offset": None, "whole": None}
GRADIENT: Attrs = {**ATTENTION, "lse_grad": False}      # whether delta has a part from lse


# --- rules ------------------------------------------------------------------------------------------

def _check(name: str, q: Shape, k: Shape, v: Shape, mask: Shape, p: float) -> None:
    if len(q) < 2 or len(k) < 2 or len(v) < 2:
        raise ShapeError(f"{name}: query, key and value are (..., length, width), got {q}, {k} and {v}")
    if not q[:-2] == k[:-2] == v[:-2]:
        raise ShapeError(f"{name}: leading dimensions must be equal, got {q}, {k} and {v}; stretch them with "
                         f"broadcast_to")
    if q[-1] != k[-1] or k[-2] != v[-2]:
        raise ShapeError(f"{name}: query and key must be equally wide, key and value equally long; got query "
                         f"{q}, key {k}, value {v}")
    if broadcast_shapes(name, (*q[:-1], k[-2]), mask) != (*q[:-1], k[-2]):
        raise ShapeError(f"{name}: the mask is {mask}, which does not broadcast to the scores "
                         f"{(*q[:-1], k[-2])}")
    if not 0 <= p <= 1:
        raise ShapeError(f"{name}: p is the probability of a zero, 0 to 1, got {p}")


def mask_dtype(name: str, mask: Any, found: Any) -> Any:
    """Booleans stay, floating masks meet the scores."""
    if mask is bool or mask == dtypes.bool_:
        return mask
    if isinstance(mask, type) or not dtypes.is_floating(mask):
        raise DTypeError(f"{name}: the mask has dtype {mask}; use a boolean mask (true where a query may "
                         f"look) or a floating one (added to the scores)")
    return accumulator(found)


def _mask_letters(q: Shape, keys: int, mask: Shape) -> str:
    """Dimensions that are not stretched move with the queries'; keys are whole."""
    scores = (*q[:-1], keys)
    names = ALPHABET[:len(q) - 1] + "."
    lead = len(scores) - len(mask)
    return "".join(names[d] if n == scores[d] else "." for d, n in enumerate(mask, start=lead))


def _attention_shape(q: Shape, k: Shape, v: Shape, mask: Shape, seed: Shape, draw: Shape, p: float,
                     **attrs: Any) -> list[Shape]:
    _check("attention", q, k, v, mask, p)
    return [(*q[:-1], v[-1]), q[:-1]]


def _attention_dtype(q: Any, k: Any, v: Any, mask: Any, seed: Any, draw: Any,
                     **attrs: Any) -> tuple[Any, Any]:
    found = floated(COMPLEX)("attention")(q, k, v)[1][0]
    mask = mask_dtype("attention", mask, found)
    return (found, found, found, mask, seed, draw), (found, accumulator(found))


def _attention_axes(q: Shape, k: Shape, v: Shape, mask: Shape, seed: Shape, draw: Shape,
                    **attrs: Any) -> Axes:
    rows = ALPHABET[:len(q) - 1]
    whole = rows[:-1] + ".."
    return Axes((rows + ".", whole, whole, _mask_letters(q, k[-2], mask), "", ""), (rows + ".", rows))


def attention_local(attrs: Attrs, io: IO) -> Attrs:
    return {**attrs, "offset": io.outs[0].offset, "whole": io.outs[0].whole}


# --- forward ----------------------------------------------------------------------------------------

def _attention(xp: Any, q: Any, k: Any, v: Any, mask: Any, seed: int, draw: int, is_causal: bool,
               scale: float, p: float, offset: Shape | None, whole: Shape | None) -> Any:
    return attend(xp, q, k, v, mask, Dropout(p, seed, draw), is_causal=is_causal, scale=scale, offset=offset,
                  whole=whole)


def attend(xp: Any, q: Any, k: Any, v: Any, mask: Any, dropout: Dropout, **attrs: Any) -> tuple[Any, Any]:
    """The attention, which lies in memory like the queries, and the log-sum-exp of every query's scores."""
    batch, dtype = q.shape[:-2], q.dtype
    q, k, v = (entries(widen(x), batch) for x in (q, k, v))
    out, lse = xp.empty_like(q, shape=(*q.shape[:3], v.shape[3])), xp.empty_like(q, shape=(*q.shape[:3], 1))
    if lse.size and k.shape[2]:
        forward(Scores(xp, q, k, mask, batch, dropout=dropout, **attrs), v, out, lse[..., 0])
    else:
        out[...] = lse[...] = 0
    length = q.shape[2]
    return out.reshape(*batch, length, v.shape[3]).astype(dtype, copy=False), lse.reshape(*batch, length)


def delta_of(g: Any, out: Any) -> tuple[Any, Any]:
    """The gradient by the attention, and delta."""
    by_out = mul(out[0], 0.0) if g[0] is None else g[0]
    delta = sum_(mul(by_out, out[0]), axis=out[0].ndim - 1, dtype=accumulator(out[0].dtype).name)
    return by_out, delta if g[1] is None else sub(delta, g[1])


def _attention_vjp(g: Any, out: Any, q: Any, k: Any, v: Any, mask: Any, seed: Any, draw: Any,
                   **attrs: Any) -> Any:
    by_out, delta = delta_of(g, out)
    dq, dk, dv = attention_grad(by_out, delta, q, k, v, out[1], mask, seed, draw, **attrs,
                                lse_grad=g[1] is not None)
    return dq, dk, dv, None, None, None


# --- first derivative -------------------------------------------------------------------------------
# A function of g, delta, q, k, v and lse as if they were independent: what ties them together is on the tape.

def _grad_shape(g: Shape, delta: Shape, q: Shape, k: Shape, v: Shape, lse: Shape, mask: Shape, seed: Shape,
                draw: Shape, p: float, **attrs: Any) -> list[Shape]:
    _check("attention_grad", q, k, v, mask, p)
    if g != (*q[:-1], v[-1]) or delta != q[:-1] or lse != q[:-1]:
        raise ShapeError(f"attention_grad: gradient must be {(*q[:-1], v[-1])}, delta and log-sum-exp "
                         f"{q[:-1]}; got {g}, {delta} and {lse}")
    return [q, k, v]


def _grad_dtype(g: Any, delta: Any, q: Any, k: Any, v: Any, lse: Any, mask: Any, seed: Any, draw: Any,
                **attrs: Any) -> tuple[Any, Any]:
    found = floated(COMPLEX)("attention_grad")(q, k, v)[1][0]
    wide = accumulator(found)
    return ((found, wide, found, found, found, wide, mask_dtype("attention_grad", mask, found), seed, draw),
            (found, found, found))


def _grad_axes(g: Shape, delta: Shape, q: Shape, k: Shape, v: Shape, lse: Shape, mask: Shape, seed: Shape,
               draw: Shape, **attrs: Any) -> Axes:
    rows = ALPHABET[:len(q) - 1]
    whole = rows[:-1] + ".."
    return Axes((rows + ".", rows, rows + ".", whole, whole, rows, _mask_letters(q, k[-2], mask), "", ""),
                (rows + ".", whole, whole))


def _attention_grad(xp: Any, g: Any, delta: Any, q: Any, k: Any, v: Any, lse: Any, mask: Any, seed: int,
                    draw: int, is_causal: bool, scale: float, p: float, offset: Shape | None,
                    whole: Shape | None, lse_grad: bool = False) -> Any:
    results = [xp.empty_like(entries(widen(x), q.shape[:-2])) for x in (q, k, v)]
    attend_back(xp, g, delta, q, k, v, lse, mask, Dropout(p, seed, draw), results, is_causal=is_causal,
                scale=scale, offset=offset, whole=whole)
    return tuple(d.reshape(x.shape).astype(x.dtype, copy=False)
                 for d, x in zip(results, (q, k, v), strict=True))


def attend_back(xp: Any, g: Any, delta: Any, q: Any, k: Any, v: Any, lse: Any, mask: Any, dropout: Dropout,
                results: Sequence[Any], **attrs: Any) -> None:
    """Fills the gradients by q, k and v: arrays that are entries, of the dtype of sums, in any memory order.
    """
    batch = q.shape[:-2]
    g, delta, q, k, v, lse = (entries(widen(x), batch) for x in (g, delta, q, k, v, lse))
    if lse.size and k.shape[2]:
        backward(Scores(xp, q, k, mask, batch, dropout=dropout, **attrs), g, delta, v, lse, results)
    else:
        for d in results:
            d[...] = 0


# --- second derivative ------------------------------------------------------------------------------

def _weights(q: Any, k: Any, lse: Any, mask: Any, is_causal: bool, scale: float) -> Any:
    """P, by elementary rows."""
    s = mul(matmul(q, k, transpose_y=True), scale)
    if not isinstance(mask, bool) and dtypes.is_floating(mask.dtype):
        s = add(s, mask)
    weights = exp(sub(s, expand_dims(lse, axis=(-1,))))
    if not isinstance(mask, bool) and mask.dtype == dtypes.bool_:
        weights = where(mask, weights, 0.0)
    return tril(weights) if is_causal else weights


def second_derivative(u: Any, out: Any, g: Any, delta: Any, q: Any, k: Any, v: Any, lse: Any, mask: Any,
                        seed: Any, draw: Any, is_causal: bool, scale: float, p: float, **attrs: Any) -> Any:
    """By elementary rows, with whole matrices of scores. X is the cotangent of E, Y that of S."""
    u_q, u_k, u_v = (mul(x, 0.0) if w is None else w for w, x in zip(u, (q, k, v), strict=True))

    def drop(x: Any) -> Any:
        return dropout(x, seed, draw, p=p) if p else x

    weights = _weights(q, k, lse, mask, is_causal, scale)
    dropped = drop(weights)
    centered = sub(drop(matmul(g, v, transpose_y=True)), expand_dims(delta, axis=(-1,)))
    e = mul(weights, centered)
    x = mul(add(matmul(u_q, k, transpose_y=True), matmul(q, u_k, transpose_y=True)), scale)
    xw = mul(x, weights)
    x_dropped = drop(xw)
    y = mul(weights, add(drop(matmul(g, u_v, transpose_y=True)), mul(x, centered)))
    last = q.ndim - 1
    return (add(matmul(dropped, u_v), matmul(x_dropped, v)),
            negative(sum_(xw, axis=last)),
            mul(add(matmul(e, u_k), matmul(y, k)), scale),
            mul(add(matmul(e, u_q, transpose_x=True), matmul(y, q, transpose_x=True)), scale),
            matmul(x_dropped, g, transpose_x=True),
            negative(sum_(y, axis=last)), None, None, None)


# --- rows -------------------------------------------------------------------------------------------

_CASES: tuple[tuple[Shape, Shape, int, Any, Attrs], ...] = (
    ((2, 3, 5, 4), (2, 3, 6, 4), 3, True, {"scale": 0.5}),
    ((5, 4), (5, 4), 4, True, {"is_causal": True, "scale": 0.7}),
    ((2, 7, 3), (2, 4, 3), 2, True, {"is_causal": True}),
    ((2, 3, 5, 2), (2, 3, 4, 2), 2, np.arange(20).reshape(5, 4) % 3 != 0, {}),
    ((3, 2, 3, 2), (3, 2, 4, 2), 2, np.arange(12).reshape(3, 1, 1, 4) % 4 != 1, {"p": 0.4}),
    ((2, 2, 5, 2), (2, 2, 5, 2), 2, True, {"p": 0.3, "is_causal": True}),
    ((0, 3, 2), (0, 4, 2), 2, True, {}), ((1, 2), (1, 2), 1, True, {}), ((2, 1, 3), (2, 0, 3), 2, True, {}),
    ((3, 2), (3, 2), 2, np.tril(np.ones((3, 3), bool), -1), {}))


def _samples() -> list[Sample]:
    found = [Sample((q, k, (*k[:-1], width), mask, 5, 3), attrs) for q, k, width, mask, attrs in _CASES]
    # The row has no derivative by an additive mask (nn.functional composes attention for that).
    added = np.linspace(-3, 3, 3 * 5 * 4).reshape(3, 5, 4)
    added[0, 2] = -np.inf
    return [*found, Sample(((2, 3, 5, 2), (2, 3, 4, 2), (2, 3, 4, 2), added, 0, 0), diff=False)]


def _grad_samples() -> list[Sample]:
    found = []
    for sample in _samples():
        q, k, v, mask, *draws = sample.inputs
        lse = np.full(q[:-1], 1.0)
        found.append(Sample(((*q[:-1], v[-1]), q[:-1], q, k, v, lse, mask, *draws), sample.attrs,
                            diff=sample.diff))
    return found


# Outputs: the attention and, for backward, the log-sum-exp of every query's scores (0 where it may look
# nowhere). A mask of True is none.
attention: Op = register(Op(
    "attention", kernel=_attention, attrs=ATTENTION, shape=_attention_shape, dtype=_attention_dtype,
    axes=_attention_axes, local=attention_local, n_out=2, vjp=_attention_vjp, keeps="q k v mask out0 out1",
    autocast="low", samples=_samples, device=device_kernels.ATTENTION))
attention_grad: Op = register(Op(
    "attention_grad", kernel=_attention_grad, attrs=GRADIENT, shape=_grad_shape, dtype=_grad_dtype,
    axes=_grad_axes, local=attention_local, n_out=3, linear=((0, 1),), vjp=second_derivative,
    keeps="g delta q k v lse mask", samples=_grad_samples, device=device_kernels.ATTENTION_GRAD))
