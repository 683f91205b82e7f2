"""Products of many matrices of few rows with the same matrix, in blocks that BLAS multiplies where they lie.

For a product OpenBLAS first copies both operands into an order of its own. With 64 rows that takes about a
third of the time, with 16 most of it. For AVX-512 it also has kernels that read operands in place, and takes
them for products of up to 100^3 multiplications: cut into such blocks, a product of 16 to 64 rows runs at the
speed of a large one. What was measured is in docs/decisions/0014-recurrent.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from meshtape.runtime.blas import blas_core

CORES = ("SkylakeX", "Cooperlake", "SapphireRapids")        # of OpenBLAS, that multiply in place
MULTIPLICATIONS = 100**3
COLUMNS = 64            # of a block: four vectors of 16 floats, the fastest
FEW = 64                # rows up to which blocks of four rows are faster than a whole product


@lru_cache(maxsize=1024)
def cut(rows: int, depth: int, width: int) -> tuple[int, int]:
    """Rows and columns of a block's result in a product (rows, depth) @ (depth, width).

    All of it where whole products are as fast. Otherwise what is left over makes smaller blocks.
    """
    columns = width if width < COLUMNS or (width % COLUMNS and width <= 2 * COLUMNS) else COLUMNS
    most = MULTIPLICATIONS // max(1, columns * depth)
    if rows < 4 or most < (4 if rows <= FEW else 8) or not depth * width:
        return max(rows, 1), max(width, 1)
    return rows // -(-rows // most), columns


def _runs(extent: int, size: int) -> Iterator[tuple[slice, int]]:
    """As many whole blocks as there are, and what is left over as one: where they lie, the size of a block.
    """
    end = extent // size * size
    if end or not extent:
        yield slice(0, end), size
    if end < extent:
        yield slice(end, extent), extent - end


class Panels:
    """Matrices (G, K, N) prepared for products with matrices of about `rows` rows."""

    def __init__(self, xp: Any, matrices: Any, rows: int) -> None:
        groups, depth, self.width = matrices.shape
        self.xp, self.in_place = xp, xp is np and blas_core() in CORES
        _, columns = self._cut(rows, depth)
        self.parts = []
        for at, size in _runs(self.width, columns):
            panels = matrices[:, :, at].reshape(groups, depth, (at.stop - at.start) // size, size)
            self.parts.append((at, xp.ascontiguousarray(panels.swapaxes(1, 2))[:, :, None]))

    def _cut(self, rows: int, depth: int) -> tuple[int, int]:
        return cut(rows, depth, self.width) if self.in_place else (max(rows, 1), max(self.width, 1))

    def into(self, x: Any, out: Any) -> Callable[[int], None]:
        """A function of t that writes the products of x[t] to out[t], for x (T, R, K) and out (T, G, R, N):
        out[t, g] = x[t] @ matrices[g]. With out (G, R, N) it writes there for every t.

        Views are made once. Blocks go column by column, so that a panel stays in the cache.
        """
        steps, rows, depth = x.shape
        places = out[None] if out.ndim == 3 else out
        calls: list[tuple[Any, Any, Any]] = []
        for lines, height in _runs(rows, self._cut(rows, depth)[0]):
            blocks = (lines.stop - lines.start) // height
            left = x[:, lines].reshape(steps, 1, 1, blocks, height, depth)
            for at, panels in self.parts:
                groups, columns, _, _, size = panels.shape
                right = places[:, :, lines, at].reshape(len(places), groups, blocks, height, columns, size)
                right = right.transpose(0, 1, 4, 2, 3, 5)
                calls.append((left, panels, [right[0]] * steps if out.ndim == 3 else right))
        matmul = self.xp.matmul

        def multiply(t: int) -> None:
            for left, panels, right in calls:
                matmul(left[t], panels, out=right[t])
        return multiply
