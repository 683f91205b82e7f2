"""Fused attention by cuDNN: queries (N, H, L, E), keys (N, H, S, E), values (N, H, S, V) of 16-bit floats.

The functions give None or False where cuDNN does not take a case. Backward is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.dnn.graphs import Building, Operand, Plan, aligned
from meshtape.runtime.cuda.kernels.arrays import compact
from meshtape.runtime.cuda.kernels.attention import ALONG
from meshtape.runtime.cuda.source import ctype

WIDEST = 256


def takes(dev: Any, q: Any, v: Any) -> bool:
    """Vectors of 16-bit floats whose widths are multiples of 8."""
    return dev.dnn is not None and q.itemsize == 2 and all(x.shape[3] % 8 == 0 and x.shape[3] <= WIDEST
                                                           for x in (q, v))


def _operand(x: Any) -> Operand | None:
    """What cuDNN is told of an array; None if it does not lie so that kernels can load 16 bytes at once."""
    strides = [s // x.itemsize for s in x.strides]
    whole = max(n * s for n, s in zip(x.shape, strides, strict=True))
    strides = [whole if n == 1 else s for n, s in zip(x.shape[:3], strides, strict=False)] + strides[3:]
    good = strides[3] == 1 and all(s > 0 and s % 8 == 0 for s in strides[:3]) and aligned(x)
    return Operand(x.shape, tuple(strides), x.dtype.name) if good else None


def _readable(dev: Any, x: Any) -> tuple[Any, Operand]:
    found = _operand(x)
    if found is None:
        x = dev.cp.array(x, order="C")
        found = _operand(x)
        assert found is not None
    return x, found


def _statistic(x: Any) -> Operand:
    """A number for each query, in C order, as (N, H, L, 1)."""
    _, heads, length = x.shape[:3]
    return Operand((*x.shape[:3], 1), (heads * length, length, 1, 1), "float32")


def _causal(b: Building, is_causal: bool, first: int) -> dict[str, Any]:
    """Query i looks at keys 0 .. first + i."""
    if not is_causal:
        return {}
    return {"diagonal_alignment": b.cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": first}


def _describe(b: Building, operands: Sequence[Operand], is_causal: bool, scale: float, first: int) -> None:
    q, k, v, out, lse = operands
    made = b.graph.sdpa(q=b.take(q), k=b.take(k), v=b.take(v), attn_scale=scale, generate_stats=True,
                        **_causal(b, is_causal, first))
    b.give(made[0], out)
    b.give(made[1], lse)


def _describe_back(b: Building, operands: Sequence[Operand], is_causal: bool, scale: float,
                   first: int) -> None:
    q, k, v, o, g, lse = (b.take(x) for x in operands[:6])
    made = b.graph.sdpa_backward(q=q, k=k, v=v, o=o, dO=g, stats=lse, attn_scale=scale,
                                 use_deterministic_algorithm=True, **_causal(b, is_causal, first))
    for tensor, operand in zip(made, operands[6:], strict=True):
        b.give(tensor, operand)


def forward(dev: Any, q: Any, k: Any, v: Any, is_causal: bool, scale: float,
            first: int) -> tuple[Any, Any] | None:
    """The attention (N, H, L, V), which lies like the queries, and the log-sum-exp (N, H, L) in C order.

    Query i is number `first` + i.
    """
    if not takes(dev, q, v):
        return None
    (q, q_at), (k, k_at), (v, v_at) = (_readable(dev, x) for x in (q, k, v))
    out = dev.cp.empty_like(q, shape=(*q.shape[:3], v.shape[3]))
    out_at = _operand(out)
    lse = dev.cp.empty(q.shape[:3], "float32")
    if out_at is None:
        out = dev.cp.empty(out.shape, out.dtype)
        out_at = Operand.of(out)
    operands = q_at, k_at, v_at, out_at, _statistic(lse)
    given = bool(is_causal), float(scale), int(first)
    plan: Plan | None = dev.dnn.plan(("attention", operands, given), lambda b: _describe(b, operands, *given),
                                     q.dtype.name)
    if plan is None:
        return None
    dev.dnn.run(plan, (q, k, v, out, lse))
    return out, lse


def backward(dev: Any, g: Any, delta: Any, q: Any, k: Any, v: Any, lse: Any, results: Sequence[Any],
             is_causal: bool, scale: float, first: int) -> bool:
    """Fills the gradients by q, k and v, if cuDNN does; delta and lse (N, H, L) are in C order."""
    if not takes(dev, q, v):
        return False
    (q, q_at), (k, k_at), (v, v_at) = (_readable(dev, x) for x in (q, k, v))
    g = compact(dev, g)
    g = g if aligned(g) else g.copy()
    targets = [x if _operand(x) is not None else dev.cp.empty(x.shape, x.dtype) for x in results]
    vectors = Operand.of(g)
    operands = (q_at, k_at, v_at, vectors, vectors, _statistic(lse), *(_readable(dev, x)[1] for x in targets))
    given = bool(is_causal), float(scale), int(first)
    plan: Plan | None = dev.dnn.plan(("attention_grad", operands, given),
                                     lambda b: _describe_back(b, operands, *given), q.dtype.name)
    if plan is None:
        return False
    dev.dnn.run(plan, (q, k, v, _along(dev, g, delta), g, lse, *targets))
    for target, result in zip(targets, results, strict=True):
        if target is not result:
            result[...] = target
    return True


def _along(dev: Any, g: Any, delta: Any) -> Any:
    """Vectors o, multiples of g, such that the sum of o g over each is delta.

    cuDNN wants the attention itself there, of which it uses nothing but delta = sum(o g). That of g alone has
    no larger error: rounding changes each addend of the sum by a part in 2^9 or 2^12 either way.
    """
    o, rows = dev.cp.empty_like(g), prod(g.shape[:3])
    dev.kernels(ALONG, "project", T=ctype(g.dtype))(
        (dev.kernels.blocks_for(rows, 8),), (256,), (o, g, delta, np.int64(rows), np.int32(g.shape[3])))
    return o
