"""Attention over blocks of scores: which queries and keys to take together, and the arithmetic of one block.

All leading dimensions of an attention are two here: queries (N, H, L, E), keys (N, H, S, E). They may lie in
memory in any order, as projections leave them; results lie like the queries, or where the caller says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime import philox
from meshtape.runtime.blas import blas_core
from meshtape.runtime.panels import CORES, MULTIPLICATIONS
from meshtape.runtime.rowwise import Rows, unbuffered
from meshtape.runtime.shards import Shape

CACHED = 262144         # scores of a block, which stays in the cache while several passes go over it
DEVICE = 1 << 27        # the same on a device: bounds the memory for scores
CAUSAL_ROWS = 128       # queries of a causal block: fewer skip more keys, more make better matrix products
FEWEST = 32             # queries up to which causal blocks are not halved, and from which on keys are turned


class Block(NamedTuple):
    """Queries `rows` of the entries `at` (of N and of H), which look at the first `keys` keys."""

    at: tuple[slice, slice]
    rows: slice
    keys: int


class Dropout(NamedTuple):
    """Zero each attention weight with probability `p`; bits are those of element (..., query, key) of the
    whole (*batch, L, S) tensor of weights, of which a worker has the piece at `offset`."""

    p: float
    seed: int
    draw: int

    @property
    def factor(self) -> float:
        """What the weights that are kept are multiplied by."""
        return 0.0 if self.p == 1 else 1 / (1 - self.p)


class Scores:
    """Scores S = scale * q k^T + mask of a worker's queries, block by block.

    `offset` and `whole` are those of the output, (*batch, L, .): where this worker's queries lie.
    """

    def __init__(self, xp: Any, q: Any, k: Any, mask: Any, batch: Shape, *, is_causal: bool, scale: float,
                 dropout: Dropout, offset: Shape | None, whole: Shape | None) -> None:
        self.xp, self.k, self.is_causal, self.dropout = xp, k, is_causal, dropout
        self.q, self.scale = q * scale, scale
        self.turned_k = turned(xp, k, q.shape[2])
        self.batch = batch
        self.n, self.heads, self.queries = q.shape[:3]
        self.keys = k.shape[2]
        self.offset = (0,) * (len(batch) + 2) if offset is None else offset
        self.whole = (*batch, self.queries, 0) if whole is None else whole
        self.first = self.offset[-2]
        self.mask: Any = None if isinstance(mask, bool) else spread_mask(xp, mask, batch)
        self.buffers: dict[str, Any] = {}

    # --- which ----------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[Block]:
        """Causal blocks have at most half of the queries; those that see most keys come first."""
        budget = CACHED if self.xp is np else DEVICE
        rows = max(1, min(self.queries, budget // max(1, self.keys)))
        if self.xp is np:
            rows = min(self.queries, max(rows, 16))
            if self.is_causal:
                rows = min(rows, max(FEWEST, self.queries // 2), CAUSAL_ROWS)
        together = max(1, budget // max(1, rows * self.keys))
        heads = min(self.heads, together)
        step = max(1, together // max(1, self.heads))
        for n, h in product(range(0, self.n, step), range(0, self.heads, heads)):
            for i in reversed(range(0, self.queries, rows)):
                stop = min(self.queries, i + rows)
                keys = min(self.keys, self.first + stop) if self.is_causal else self.keys
                yield Block((slice(n, min(self.n, n + step)), slice(h, min(self.heads, h + heads))),
                            slice(i, stop), keys)

    # --- what -----------------------------------------------------------------------------------------

    def of(self, block: Block) -> Any:
        """The scores of a block, -inf where a query must not look; overwritten by the next block's."""
        at, rows, keys = block
        s = self.product("scores", self.q[(*at, rows)], self.turned_k[at][..., :keys])
        if self.is_causal:
            diagonal = self.first + rows.start
            if diagonal < keys:
                # From the first key on, unless most of them are left of the diagonal: whole rows are one run.
                start = 0 if keys <= 4 * s.shape[2] else diagonal
                triangle = self.above_diagonal(s.shape[2], keys - start, diagonal - start)
                with unbuffered(self.xp, triangle.size):
                    s[..., start:] += triangle
        if self.mask is not None:
            s += self.mask_of(block, s.dtype)
        return s

    def product(self, name: str, left: Any, right: Any) -> Any:
        """left @ right for every entry, in the buffer `name`."""
        shape = (*left.shape[:3], right.shape[3])
        held = self.buffers.get(name)
        if held is None or held.size < prod(shape):
            held = self.buffers[name] = self.xp.empty(prod(shape), left.dtype)
        return self.xp.matmul(left, right, out=held[:prod(shape)].reshape(shape))

    def above_diagonal(self, rows: int, keys: int, shift: int) -> Any:
        """-inf where query i must not look at key j > i + shift, else 0."""
        name = f"triangle {rows} {keys} {shift}"
        if name not in self.buffers:
            full = self.xp.full((rows, keys), -math.inf, self.q.dtype)
            self.buffers[name] = self.xp.triu(full, 1 + shift)
        return self.buffers[name]

    def mask_of(self, block: Block, dtype: Any) -> Any:
        """What the mask adds to a block; a boolean one adds log 1 or log 0."""
        mask, every = self.mask, slice(None)
        places = (*block.at, block.rows, slice(block.keys))
        part = mask[tuple(p if n > 1 else every for p, n in zip(places[:3], mask.shape, strict=False))]
        part = part[..., :block.keys]
        return self.xp.log(part.astype(dtype)) if mask.dtype == bool else part

    # --- dropout --------------------------------------------------------------------------------------

    def drop(self, weights: Any, block: Block) -> Any:
        """`weights` of a block with dropout, in place."""
        if self.dropout.p:
            weights *= self.kept(block)
            weights *= self.dropout.factor
        return weights

    def kept(self, block: Block) -> Any:
        """True for the weights of a block that are not dropped."""
        at, rows, keys = block
        shape = tuple(s.stop - s.start for s in (*at, rows))
        starts = [self.row_number(n * self.heads + h) + rows.start
                  for n in range(at[0].start, at[0].stop) for h in range(at[1].start, at[1].stop)]
        xp, (p, seed, draw) = self.xp, self.dropout
        together = all(b - a == shape[2] for a, b in pairwise(starts))
        runs = [(starts[0], prod(shape))] if together else [(s, shape[2]) for s in starts]
        bits = [philox.chosen(xp, seed, draw, start * self.keys, n * self.keys, p) for start, n in runs]
        chosen = bits[0] if together else xp.concatenate(bits)
        return ~chosen.reshape(*shape, self.keys)[..., :keys]

    def row_number(self, entry: int) -> int:
        """The number of an entry's first query among the rows of the whole tensor of weights."""
        index: list[Any] = [i + o for i, o in zip(np.unravel_index(entry, self.batch), self.offset,
                                                  strict=False)]
        number = 0
        for i, extent in zip([*index, self.first], self.whole[:-1], strict=True):
            number = number * extent + int(i)
        return number


def two(batch: Shape) -> Shape:
    """The two dimensions that stand for the leading dimensions `batch`."""
    return (prod(batch[:-1]), batch[-1]) if batch else (1, 1)


def entries(x: Any, batch: Shape) -> Any:
    """`x`, whose leading dimensions are `batch`, with two instead: a view where those can be merged."""
    return x.reshape(*two(batch), *x.shape[len(batch):])


def turned(xp: Any, x: Any, queries: int) -> Any:
    """(N, H, E, S) from (N, H, S, E). Small products that BLAS makes in place are faster if it lies so: 128
    of 64 x 16 by 16 x 64 take 80 instead of 148 us, and turning 32.
    """
    small = queries >= FEWEST and queries * x.shape[2] * x.shape[3] <= MULTIPLICATIONS
    view = x.swapaxes(2, 3)
    return np.ascontiguousarray(view) if xp is np and small and blas_core() in CORES else view


def spread_mask(xp: Any, mask: Any, batch: Shape) -> Any:
    """`mask`, which broadcasts to (*batch, L, S), as (N or 1, H or 1, L or 1, S); its last dimension is
    stretched."""
    mask = mask.reshape((1,) * (len(batch) + 2 - mask.ndim) + mask.shape)
    if prod(mask.shape[:-3]) != 1:
        mask = xp.broadcast_to(mask, (*batch[:-1], *mask.shape[len(batch) - 1:]))
    return entries(mask, mask.shape[:-2])


# --- passes over a block ----------------------------------------------------------------------------

def forward(scores: Scores, v: Any, out: Any, lse: Any) -> None:
    """Fills the attention `out` and the log-sum-exp of every query's scores, which lie alike in memory."""
    xp = scores.xp
    total = xp.empty_like(lse)
    for block in scores.blocks():
        at, rows, keys = block
        weights, sums, top = _weights(scores, block)
        if top is not None:
            seen = sums != 0                    # a query that may look nowhere gives zeros
            sums, top = xp.where(seen, sums, 1), xp.where(seen, top, 0)
        total[(*at, rows)] = sums
        lse[(*at, rows)] = xp.log(sums) if top is None else xp.log(sums) + top
        xp.matmul(scores.drop(weights, block), v[at][:, :, :keys], out=out[(*at, rows)])
    scale_queries(xp, out, 1 / total, out)


def _weights(scores: Scores, block: Block) -> tuple[Any, Any, Any]:
    """exp(S - top), the sum of every row, and top: the maximum of the row, or None for 0.

    NumPy's maximum along rows takes longer than exp. So 0 is tried first; sums tell whether it will do.
    On a device, whose stream would have to be waited for, it is not tried.
    """
    xp = scores.xp
    if xp is np:
        s = scores.of(block)
        sums = _exponentials(xp, s)
        least = math.sqrt(float(np.finfo(s.dtype).tiny))
        if sums.min() > least and sums.max() < 1 / least:
            return s, sums, None
    s = scores.of(block)
    top = s.max(axis=-1)
    top = xp.where(top == -xp.inf, 0, top)
    s -= top[..., None]
    return s, _exponentials(xp, s), top


def _exponentials(xp: Any, s: Any) -> Any:
    """exp(s) in place, and the sum of every row."""
    xp.exp(s, out=s)
    return Rows(xp, s.shape[-1], s.dtype).sums(s.reshape(-1, s.shape[-1])).reshape(s.shape[:-1])


def backward(scores: Scores, g: Any, delta: Any, v: Any, lse: Any, results: Sequence[Any]) -> None:
    """Fills the gradients by q, k and v.

    Where exp(S) cannot overflow, P is exp(S) / exp(lse), and the divisor is left to g and delta.
    """
    xp, k = scores.xp, scores.k * scores.scale
    dq, dk, dv = results
    turned_v = turned(xp, v, scores.queries)
    limit = -0.5 * math.log(float(np.finfo(g.dtype).tiny))
    plain = xp is np and bool(lse.min() > -limit and lse.max() < limit)
    if plain:
        share = xp.exp(-lse)
        g, delta = scale_queries(xp, g, share, xp.empty_like(g)), delta * share
    begun: Any = None
    for block in scores.blocks():
        at, rows, keys = block
        kept = scores.kept(block) if scores.dropout.p else None
        weights, u = scores.of(block), g[(*at, rows)]
        if not plain:
            weights -= lse[(*at, rows)][..., None]
        xp.exp(weights, out=weights)
        through = scores.product("through", u, turned_v[at][..., :keys])
        if kept is not None:
            through *= kept
            through *= scores.dropout.factor
        shift_queries(xp, through, -delta[(*at, rows)])
        through *= weights
        if kept is not None:
            weights *= kept
            weights *= scores.dropout.factor
        _collect(xp, weights, u, dv[at], keys, at != begun)
        _collect(xp, through, scores.q[(*at, rows)], dk[at], keys, at != begun)
        xp.matmul(through, k[at][:, :, :keys], out=dq[(*at, rows)])
        begun = at


def _collect(xp: Any, left: Any, right: Any, target: Any, keys: int, first: bool) -> None:
    """left^T right as the first `keys` vectors of `target`, or added to what later queries left there."""
    if first:
        xp.matmul(left.swapaxes(2, 3), right, out=target[:, :, :keys])
        target[:, :, keys:] = 0
    else:
        target[:, :, :keys] += xp.matmul(left.swapaxes(2, 3), right)


# --- a number for every query ---------------------------------------------------------------------------

def scale_queries(xp: Any, x: Any, by: Any, out: Any) -> Any:
    """Every vector x[n, h, i] times by[n, h, i] in `out`, which lies in memory like x."""
    if not x.size:
        return out
    column = xp.empty_like(x[..., 0])
    column[...] = by
    order = sorted(range(3), key=lambda d: -column.strides[d])
    source, target = x.transpose(*order, 3), out.transpose(*order, 3)
    if xp is np and source.flags.c_contiguous and target.flags.c_contiguous:
        width = x.shape[3]
        Rows(xp, width, x.dtype).scale(source.reshape(-1, width), column.transpose(order).reshape(-1),
                                       out=target.reshape(-1, width))
    else:
        xp.multiply(x, by[..., None], out=out)
    return out


def shift_queries(xp: Any, x: Any, by: Any) -> None:
    """Adds by[n, h, i] to every number of x[n, h, i], which is contiguous."""
    rows = Rows(xp, x.shape[-1], x.dtype)
    with unbuffered(xp, rows.width):
        flat = x.reshape(-1, x.shape[-1])
        rows.shift(flat, by.reshape(-1), out=flat)
