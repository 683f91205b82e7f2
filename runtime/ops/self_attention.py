"""Attention of a sequence to itself, whose queries, keys and values are one tensor.

One projection makes all three, and one array takes the gradients of all three, where they lie: nothing is cut
apart, joined or copied. The input is (3, ..., L, E); in memory it lies as the projection left it. Leading
dimensions may be split, the sequence never: its queries are also its keys. The formulas are those of
`meshtape.runtime.ops.attention`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from meshtape.runtime.cuda import attention as device_kernels
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import ALPHABET, IO, Axes, Op, Sample, broadcast_shapes, register
from meshtape.runtime.ops.attention import (
    ATTENTION,
    GRADIENT,
    Attrs,
    attend,
    attend_back,
    attention_local,
    delta_of,
    mask_dtype,
    second_derivative,
)
from meshtape.runtime.ops.attention_blocks import Dropout, two
from meshtape.runtime.ops.contraction import widen
from meshtape.runtime.ops.join import stack
from meshtape.runtime.ops.reduce import accumulator
from meshtape.runtime.ops.rules import COMPLEX, floated
from meshtape.runtime.ops.shape import squeeze
from meshtape.runtime.ops.slices import slice_along
from meshtape.runtime.shards import Shape

# --- rules ------------------------------------------------------------------------------------------

def _check(name: str, qkv: Shape, mask: Shape, p: float) -> Shape:
    """The output's shape."""
    if len(qkv) < 3 or qkv[0] != 3:
        raise ShapeError(f"{name}: query, key and value are one tensor (3, ..., length, width), got {qkv}")
    scores = (*qkv[1:-1], qkv[-2])
    if broadcast_shapes(name, scores, mask) != scores:
        raise ShapeError(f"{name}: the mask is {mask}, which does not broadcast to the scores {scores}")
    if not 0 <= p <= 1:
        raise ShapeError(f"{name}: p is the probability of a zero, 0 to 1, got {p}")
    return qkv[1:]


def _letters(qkv: Shape, mask: Shape) -> tuple[str, str, str, str]:
    """Of the input, the output, the numbers of a query, and the mask: dimensions that are not stretched move
    with the batch, and the sequence is whole."""
    batch = ALPHABET[:len(qkv) - 3]
    scores, whole = (*qkv[1:-1], qkv[-2]), batch + ".."
    lead = len(scores) - len(mask)
    return "." + whole, whole, batch + ".", "".join(whole[d] if n == scores[d] else "."
                                                    for d, n in enumerate(mask, start=lead))


def _shape(qkv: Shape, mask: Shape, seed: Shape, draw: Shape, p: float, **attrs: Any) -> list[Shape]:
    out = _check("self_attention", qkv, mask, p)
    return [out, out[:-1]]


def _dtype(qkv: Any, mask: Any, seed: Any, draw: Any, **attrs: Any) -> tuple[Any, Any]:
    found = floated(COMPLEX)("self_attention")(qkv)[1][0]
    return (found, mask_dtype("self_attention", mask, found), seed, draw), (found, accumulator(found))


def _axes(qkv: Shape, mask: Shape, seed: Shape, draw: Shape, **attrs: Any) -> Axes:
    packed, out, queries, masked = _letters(qkv, mask)
    return Axes((packed, masked, "", ""), (out, queries))


def _grad_shape(g: Shape, delta: Shape, qkv: Shape, lse: Shape, mask: Shape, seed: Shape, draw: Shape,
                p: float, **attrs: Any) -> list[Shape]:
    out = _check("self_attention_grad", qkv, mask, p)
    if g != out or delta != out[:-1] or lse != out[:-1]:
        raise ShapeError(f"self_attention_grad: gradient must be {out}, delta and log-sum-exp {out[:-1]}; "
                         f"got {g}, {delta} and {lse}")
    return [qkv]


def _grad_dtype(g: Any, delta: Any, qkv: Any, lse: Any, mask: Any, seed: Any, draw: Any,
                **attrs: Any) -> tuple[Any, Any]:
    found = floated(COMPLEX)("self_attention_grad")(qkv)[1][0]
    wide = accumulator(found)
    return (found, wide, found, wide, mask_dtype("self_attention_grad", mask, found), seed, draw), (found,)


def _grad_axes(g: Shape, delta: Shape, qkv: Shape, lse: Shape, mask: Shape, seed: Shape, draw: Shape,
               **attrs: Any) -> Axes:
    packed, out, queries, masked = _letters(qkv, mask)
    return Axes((out, queries, packed, queries, masked, "", ""), (packed,))


def _grad_local(attrs: Attrs, io: IO) -> Attrs:
    gradient = io.ins[0]
    assert gradient is not None
    return {**attrs, "offset": gradient.offset, "whole": gradient.whole}


# --- kernels ----------------------------------------------------------------------------------------

def _kernel(xp: Any, qkv: Any, mask: Any, seed: int, draw: int, is_causal: bool, scale: float, p: float,
            offset: Shape | None, whole: Shape | None) -> Any:
    q, k, v = qkv
    return attend(xp, q, k, v, mask, Dropout(p, seed, draw), is_causal=is_causal, scale=scale, offset=offset,
                  whole=whole)


def _grad_kernel(xp: Any, g: Any, delta: Any, qkv: Any, lse: Any, mask: Any, seed: int, draw: int,
                 is_causal: bool, scale: float, p: float, offset: Shape | None, whole: Shape | None,
                 lse_grad: bool = False) -> Any:
    entries = widen(qkv).reshape(3, *two(qkv.shape[1:-2]), *qkv.shape[-2:])
    results = xp.empty_like(entries)
    q, k, v = qkv
    attend_back(xp, g, delta, q, k, v, lse, mask, Dropout(p, seed, draw), results, is_causal=is_causal,
                scale=scale, offset=offset, whole=whole)
    return results.reshape(qkv.shape).astype(qkv.dtype, copy=False)


# --- derivatives ------------------------------------------------------------------------------------

def _vjp(g: Any, out: Any, qkv: Any, mask: Any, seed: Any, draw: Any, **attrs: Any) -> Any:
    by_out, delta = delta_of(g, out)
    by_qkv = self_attention_grad(by_out, delta, qkv, out[1], mask, seed, draw, **attrs,
                                 lse_grad=g[1] is not None)
    return by_qkv, None, None, None


def _parts(x: Any) -> list[Any]:
    return [squeeze(slice_along(x, 0, i, i + 1), axis=(0,)) for i in range(3)]


def _grad_vjp(u: Any, out: Any, g: Any, delta: Any, qkv: Any, lse: Any, mask: Any, seed: Any, draw: Any,
              **attrs: Any) -> Any:
    q, k, v = _parts(qkv)
    by_g, by_delta, by_q, by_k, by_v, by_lse, *_ = second_derivative(
        _parts(u), out, g, delta, q, k, v, lse, mask, seed, draw, **attrs)
    return by_g, by_delta, stack(by_q, by_k, by_v, axis=0), by_lse, None, None, None


# --- rows -------------------------------------------------------------------------------------------

_CASES: tuple[tuple[Shape, Any, Attrs], ...] = (
    ((3, 2, 3, 5, 4), True, {"scale": 0.5}), ((3, 5, 4), True, {"is_causal": True, "scale": 0.7}),
    ((3, 2, 7, 3), True, {"is_causal": True}), ((3, 3, 2, 4, 2), np.arange(16).reshape(4, 4) % 3 != 0, {}),
    ((3, 3, 2, 4, 2), np.arange(12).reshape(3, 1, 1, 4) % 4 != 1, {"p": 0.4}),
    ((3, 2, 2, 5, 2), True, {"p": 0.3, "is_causal": True}), ((3, 0, 4, 2), True, {}), ((3, 1, 2), True, {}),
    ((3, 2, 0, 3), True, {}), ((3, 3, 2), np.tril(np.ones((3, 3), bool), -1), {}))


def _samples() -> list[Sample]:
    found = [Sample((qkv, mask, 5, 3), attrs) for qkv, mask, attrs in _CASES]
    added = np.linspace(-3, 3, 3 * 5 * 5).reshape(3, 5, 5)
    return [*found, Sample(((3, 2, 3, 5, 2), added, 0, 0), diff=False)]


def _grad_samples() -> list[Sample]:
    found = []
    for sample in _samples():
        qkv, *rest = sample.inputs
        found.append(Sample((qkv[1:], qkv[1:-1], qkv, np.full(qkv[1:-1], 1.0), *rest), sample.attrs,
                            diff=sample.diff))
    return found


# Outputs and masks are those of `attention`.
self_attention: Op = register(Op(
    "self_attention", kernel=_kernel, attrs=ATTENTION, shape=_shape, dtype=_dtype, axes=_axes,
    local=attention_local, n_out=2, vjp=_vjp, keeps="qkv mask out0 out1", samples=_samples,
    autocast="low", device=device_kernels.SELF_ATTENTION))
self_attention_grad: Op = register(Op(
    "self_attention_grad", kernel=_grad_kernel, attrs=GRADIENT, shape=_grad_shape, dtype=_grad_dtype,
    axes=_grad_axes, local=_grad_local, linear=((0, 1),), vjp=_grad_vjp, keeps="g delta qkv lse mask",
    samples=_grad_samples, device=device_kernels.SELF_ATTENTION_GRAD))
