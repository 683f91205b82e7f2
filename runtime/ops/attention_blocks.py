"""Blocks of attention scores: which queries and keys to take together, and the scores of one block.

All leading dimensions of an attention are one here: queries (N, L, E), keys (N, S, E).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime import philox
from meshtape.runtime.shards import Shape

CACHED = 131072         # scores of a block, which stays in the cache while several passes go over it
DEVICE = 1 << 27        # the same on a device: bounds the memory for scores
CAUSAL_ROWS = 128       # queries of a causal block: fewer skip more keys, more make better matrix products


class Block(NamedTuple):
    """Queries `rows` of the entries `at`, which look at the first `keys` keys."""

    at: slice
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
        self.q = q * scale
        self.batch = batch
        self.n, self.queries, self.keys = q.shape[0], q.shape[1], k.shape[1]
        self.offset = (0,) * (len(batch) + 2) if offset is None else offset
        self.whole = (*batch, self.queries, 0) if whole is None else whole
        self.first = self.offset[-2]
        self.mask: Any = None if isinstance(mask, bool) else spread_mask(xp, mask, batch)
        self.buffers: dict[str, Any] = {}

    # --- which ----------------------------------------------------------------------------------------

    def blocks(self) -> Iterator[Block]:
        budget = CACHED if self.xp is np else DEVICE
        rows = max(1, min(self.queries, budget // max(1, self.keys)))
        if self.xp is np:
            rows = min(self.queries, max(rows, 16))
            if self.is_causal:
                rows = min(rows, CAUSAL_ROWS)
        step = max(1, budget // max(1, rows * self.keys))
        for n in range(0, self.n, step):
            for i in range(0, self.queries, rows):
                stop = min(self.queries, i + rows)
                keys = min(self.keys, self.first + stop) if self.is_causal else self.keys
                yield Block(slice(n, min(self.n, n + step)), slice(i, stop), keys)

    # --- what -----------------------------------------------------------------------------------------

    def of(self, block: Block) -> Any:
        """The scores of a block, -inf where a query must not look; overwritten by the next block's."""
        at, rows, keys = block
        s = self.product("scores", self.q[at, rows], self.k[at, :keys])
        if self.is_causal:
            diagonal = self.first + rows.start
            if diagonal < keys:
                s[:, :, diagonal:] += self.above_diagonal(s.shape[1], keys - diagonal)
        if self.mask is not None:
            s += self.mask_of(block, s.dtype)
        return s

    def product(self, name: str, left: Any, right: Any) -> Any:
        """left right^T for every entry, in the buffer `name`."""
        shape = (left.shape[0], left.shape[1], right.shape[1])
        held = self.buffers.get(name)
        if held is None or held.size < prod(shape):
            held = self.buffers[name] = self.xp.empty(prod(shape), left.dtype)
        return self.xp.matmul(left, right.swapaxes(1, 2), out=held[:prod(shape)].reshape(shape))

    def above_diagonal(self, rows: int, keys: int) -> Any:
        held = self.buffers.get("triangle")
        if held is None or held.shape[0] < rows or held.shape[1] < keys:
            full = self.xp.full((max(rows, keys),) * 2, -math.inf, self.q.dtype)
            held = self.buffers["triangle"] = self.xp.triu(full, 1)
        return held[:rows, :keys]

    def mask_of(self, block: Block, dtype: Any) -> Any:
        """What the mask adds to a block; a boolean one adds log 1 or log 0."""
        mask = self.mask
        part = mask[block.at if len(mask) > 1 else slice(None),
                    block.rows if mask.shape[1] > 1 else slice(None), :block.keys]
        return self.xp.log(part.astype(dtype)) if mask.dtype == bool else part

    def bounded(self) -> bool:
        """True if exp(S) can neither overflow nor vanish, so that no row's maximum need be subtracted.

        |q . k| <= |q| |k|, and sums stay far inside the dtype's range where that is at most 0.45 of its
        logarithm (40 in float32). Never on a device, whose stream would have to be waited for.
        """
        if self.xp is not np or (self.mask is not None and self.mask.dtype != bool):
            return False
        longest = [float(np.einsum("nij,nij->ni", x, x).max()) for x in (self.q, self.k)]
        limit = 0.45 * math.log(float(np.finfo(self.q.dtype).max))
        return math.sqrt(longest[0]) * math.sqrt(longest[1]) <= limit

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
        starts = [self.row_number(n) + rows.start for n in range(at.start, at.stop)]
        count = rows.stop - rows.start
        xp, (p, seed, draw) = self.xp, self.dropout
        together = all(b - a == count for a, b in pairwise(starts))
        runs = [(starts[0], count * len(starts))] if together else [(s, count) for s in starts]
        bits = [philox.chosen(xp, seed, draw, start * self.keys, n * self.keys, p) for start, n in runs]
        chosen = bits[0] if together else xp.concatenate(bits)
        return ~chosen.reshape(len(starts), count, self.keys)[:, :, :keys]

    def row_number(self, n: int) -> int:
        """The number of entry n's first query among the rows of the whole tensor of weights."""
        index: list[Any] = [i + o for i, o in zip(np.unravel_index(n, self.batch), self.offset, strict=False)]
        number = 0
        for i, extent in zip([*index, self.first], self.whole[:-1], strict=True):
            number = number * extent + int(i)
        return number


def spread_mask(xp: Any, mask: Any, batch: Shape) -> Any:
    """`mask`, which broadcasts to (*batch, L, S), as (N or 1, L or 1, S); its last dimension is stretched."""
    mask = mask.reshape((1,) * (len(batch) + 2 - mask.ndim) + mask.shape)
    if prod(mask.shape[:-2]) == 1:
        return mask.reshape(1, *mask.shape[-2:])
    return xp.broadcast_to(mask, (*batch, *mask.shape[-2:])).reshape(prod(batch), *mask.shape[-2:])
