"""Attention on a device: by cuDNN where it takes the case, else by products of matrices around own kernels.

cuDNN takes 16-bit floats without mask or dropout. Everything else goes by blocks of scores, which are in
float32 (float64 for that): a product, one kernel that makes weights of the scores, a product. Dropout has
the bits of meshtape.runtime.ops.attention_blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.cuda.dnn import attention as fused
from meshtape.runtime.cuda.kernels.arrays import compact
from meshtape.runtime.cuda.kernels.attention import SHAPE, WEIGHTS
from meshtape.runtime.cuda.source import ctype
from meshtape.runtime.op import DeviceKernel
from meshtape.runtime.ops.attention_blocks import entries, spread_mask, two
from meshtape.runtime.shards import Shape
from meshtape.runtime.tables import tables

SCORES = 1 << 27        # elements of a block
FLOATS = ("float16", "bfloat16", "float32", "float64")


class Block(NamedTuple):
    """Matrices of scores made together: entries `n` and `h`, and queries `rows` of each."""

    n: slice
    h: slice
    rows: slice

    @property
    def at(self) -> tuple[slice, slice, slice]:
        return self.n, self.h, self.rows


class Draws(NamedTuple):
    """Dropout's probability, and seed and draw as arrays of the device."""

    p: float
    seed: Any
    draw: Any


def blocks(shape: Shape, keys: int) -> Iterator[Block]:
    """Over queries (N, H, L, .): whole entries, or queries of one entry if its scores are too many."""
    n, heads, length = shape[:3]
    rows = max(1, min(length, SCORES // keys))
    some = max(1, SCORES // (rows * keys)) if rows == length else 1
    step, part = max(1, some // heads), min(heads, some)
    for i in range(0, n, step):
        for h in range(0, heads, part):
            for row in range(0, length, rows):
                yield Block(slice(i, min(n, i + step)), slice(h, min(heads, h + part)),
                            slice(row, min(length, row + rows)))


def _starts(batch: Shape, offset: Shape, whole: Shape) -> tuple[np.ndarray[Any, Any]]:
    """The number of every entry's first query among the queries of the whole tensor."""
    number = np.zeros(batch, np.int64)
    for d, extent in enumerate(whole[:-2]):
        along = np.arange(batch[d]) + offset[d]
        number = number * extent + along.reshape(-1, *(1,) * (len(batch) - 1 - d))
    return ((number * whole[-2] + offset[-2]).reshape(-1),)


class Weights:
    """The kernels that make weights of scores, for one attention."""

    def __init__(self, dev: Any, q: Any, k: Any, batch: Shape, mask: Any, draws: Draws, *, is_causal: bool,
                 scale: float, offset: Shape | None, whole: Shape | None) -> None:
        self.dev, self.q, self.k, self.batch = dev, q, k, batch
        self.wide = np.float64 if q.dtype == np.float64 else np.float32
        self.scale, self.draws, self.is_causal = self.wide(scale), draws, is_causal
        self.offset = (0,) * (len(batch) + 2) if offset is None else offset
        self.whole = (*batch, q.shape[2], 0) if whole is None else whole
        self.mask = None if isinstance(mask, bool) else spread_mask(dev.xp, mask, batch)
        self.starts = None
        if draws.p:
            self.starts, = tables(dev.xp, _starts, batch, self.offset, self.whole)

    def scores(self, block: Block) -> Any:
        """q k^T of a block."""
        return self.product(self.q[block.at], self.k[block.at[:2]])

    def product(self, left: Any, right: Any) -> Any:
        """left right^T in the dtype of sums."""
        made = self.dev.cp.empty((*left.shape[:3], right.shape[2]), self.wide)
        return self.dev.blas.gemm(left, right, made, transpose_b=True)

    def room(self, like: Any) -> Any:
        """Memory for weights: that of the scores where they have its dtype."""
        return like if like.dtype == self.q.dtype else self.dev.cp.empty(like.shape, self.q.dtype)

    def launch(self, name: str, block: Block, arrays: Any, shape: Shape) -> None:
        """A kernel on a block's scores of `shape`; `arrays` are its first arguments."""
        macros = {"T": ctype(self.q.dtype), "W": ctype(self.wide), "M": "bool", "MASK": 0,
                  "CAUSAL": int(self.is_causal), "DROP": int(self.draws.p > 0)}
        strides: tuple[int, ...] = (0, 0, 0, 0)
        if self.mask is not None:
            kind = 1 if self.mask.dtype == np.bool_ else 2
            macros.update(M=ctype(self.mask.dtype), MASK=kind)
            strides = tuple(0 if n == 1 else s // self.mask.itemsize
                            for n, s in zip(self.mask.shape, self.mask.strides, strict=True))
        rows, keys = prod(shape[:3]), shape[3]
        macros["ROW"] = row = 32 if keys <= 1024 else 256
        heads, length = self.q.shape[1:3]
        entry = block.n.start * heads + block.h.start
        fields = (shape[0] * shape[1], shape[2], keys, entry, block.rows.start, heads, length,
                  self.k.shape[2], *strides, self.offset[-2])
        p, seed, draw = self.draws
        drop = (self.starts, seed, draw) if p else (None, None, None)
        factor = 0.0 if p == 1 else 1 / (1 - p)
        self.dev.kernels(WEIGHTS, name, **macros)(
            (self.dev.kernels.blocks_for(rows, 256 // row),), (256,),
            (*arrays, self.mask, *drop, self.scale, np.uint64(round(p * 2**32)), self.wide(factor),
             np.array(fields, SHAPE)))


def attend(dev: Any, q: Any, k: Any, v: Any, mask: Any, draws: Draws, is_causal: bool, scale: float,
           offset: Shape | None, whole: Shape | None) -> tuple[Any, Any]:
    """As meshtape.runtime.ops.attention.attend."""
    batch, length = q.shape[:-2], q.shape[-2]
    q, k, v = (entries(x, batch) for x in (q, k, v))
    if draws.p == 0 and isinstance(mask, bool):
        found = fused.forward(dev, q, k, v, is_causal, scale, 0 if offset is None else offset[-2])
        if found is not None:
            return tuple(x.reshape(*batch, length, *x.shape[3:]) for x in found)  # type: ignore[return-value]
    weights = Weights(dev, q, k, batch, mask, draws, is_causal=is_causal, scale=scale, offset=offset,
                      whole=whole)
    out = dev.cp.empty_like(q, shape=(*q.shape[:3], v.shape[3]))
    lse = dev.cp.empty(q.shape[:3], weights.wide)
    for block in blocks(q.shape, k.shape[2]):
        scores = weights.scores(block)
        made = weights.room(scores)
        weights.launch("weigh", block, (scores, made, lse), scores.shape)
        dev.blas.gemm(made, v[block.at[:2]], out[block.at])
    return out.reshape(*batch, length, v.shape[3]), lse.reshape(*batch, length)


def attend_back(dev: Any, g: Any, delta: Any, q: Any, k: Any, v: Any, lse: Any, mask: Any, draws: Draws,
                results: Any, is_causal: bool, scale: float, offset: Shape | None, whole: Shape | None,
                lse_grad: bool) -> None:
    """Fills the gradients by q, k and v: arrays (N, H, ., .) of their dtype in any memory order."""
    batch = q.shape[:-2]
    g, q, k, v = (entries(x, batch) for x in (g, q, k, v))
    delta, lse = (compact(dev, entries(x, batch)) for x in (delta, lse))
    if draws.p == 0 and isinstance(mask, bool) and not lse_grad and fused.backward(
            dev, g, delta, q, k, v, lse, results, is_causal, scale, 0 if offset is None else offset[-2]):
        return
    weights = Weights(dev, q, k, batch, mask, draws, is_causal=is_causal, scale=scale, offset=offset,
                      whole=whole)
    dq, dk, dv = results
    every = list(blocks(q.shape, k.shape[2]))
    parts = any(block.rows != slice(0, q.shape[2]) for block in every)
    sums = [dev.cp.zeros(x.shape, weights.wide) for x in (k, v)] if parts else [dk, dv]
    for block in every:
        u, keys = g[block.at], block.at[:2]
        scores, through = weights.scores(block), weights.product(u, v[keys])
        p, e = weights.room(scores), weights.room(through)
        weights.launch("weigh_back", block, (scores, through, p, e, lse, delta), scores.shape)
        dev.blas.gemm(e, k[keys], dq[block.at])
        for left, right, target in ((e, q[block.at], sums[0]), (p, u, sums[1])):
            dev.blas.gemm(left, right, target[keys], transpose_a=True, beta=float(parts))
    if parts:
        dk[...], dv[...] = sums


# --- kernels of rows ------------------------------------------------------------------------------------

def _attention(dev: Any, q: Any, k: Any, v: Any, mask: Any, seed: Any, draw: Any, p: float,
               **attrs: Any) -> Any:
    return attend(dev, q, k, v, mask, Draws(p, seed, draw), **attrs)


def _attention_grad(dev: Any, g: Any, delta: Any, q: Any, k: Any, v: Any, lse: Any, mask: Any, seed: Any,
                    draw: Any, p: float, **attrs: Any) -> Any:
    results = [dev.cp.empty_like(entries(x, q.shape[:-2])) for x in (q, k, v)]
    attend_back(dev, g, delta, q, k, v, lse, mask, Draws(p, seed, draw), results, **attrs)
    return tuple(d.reshape(x.shape) for d, x in zip(results, (q, k, v), strict=True))


def _self_attention(dev: Any, qkv: Any, mask: Any, seed: Any, draw: Any, p: float, **attrs: Any) -> Any:
    return attend(dev, qkv[0], qkv[1], qkv[2], mask, Draws(p, seed, draw), **attrs)


def _self_attention_grad(dev: Any, g: Any, delta: Any, qkv: Any, lse: Any, mask: Any, seed: Any, draw: Any,
                         p: float, **attrs: Any) -> Any:
    results = dev.cp.empty_like(qkv.reshape(3, *two(qkv.shape[1:-2]), *qkv.shape[-2:]))
    attend_back(dev, g, delta, qkv[0], qkv[1], qkv[2], lse, mask, Draws(p, seed, draw),
                [results[0], results[1], results[2]], **attrs)
    return results.reshape(qkv.shape)


def _supports(shapes: tuple[Any, ...], dtypes: tuple[Any, ...], attrs: dict[str, Any]) -> bool:
    """Nothing empty; numbers (seed and draw) as such."""
    arrays = [shape for shape in shapes if shape is not None]
    return dtypes[0].name in FLOATS and all(n > 0 for shape in arrays for n in shape) and \
        shapes[-1] is None and shapes[-2] is None


# Of the scalars, a mask of True comes by value.
ATTENTION = DeviceKernel(_attention, _supports, "hii")
ATTENTION_GRAD = DeviceKernel(_attention_grad, _supports, "hii")
SELF_ATTENTION = DeviceKernel(_self_attention, _supports, "hii")
SELF_ATTENTION_GRAD = DeviceKernel(_self_attention_grad, _supports, "hii")
