"""Products of many matrices of few rows with the same matrix, in blocks that BLAS multiplies where they lie.

For a product OpenBLAS first copies both operands into an order of its own. With 64 rows that takes about a
third of the time, with 16 most of it. For AVX-512 it also has kernels that read operands in place, and takes
them for products of up to 100^3 multiplications: cut into such blocks, a product of 16 to 64 rows runs at the
speed of a large one. What is measured is in docs/decisions/0014-recurrent.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from meshtape.runtime.blas import blas_core

CORES = ("SkylakeX", "Cooperlake", "SapphireRapids")        # of OpenBLAS, that multiply in place
MULTIPLICATIONS = 100**3
LEAST = 512             # elements of a block's result below which whole products are as fast


@lru_cache(maxsize=1024)
def cut(rows: int, depth: int, width: int) -> tuple[int, int]:
    """Rows and columns of a block's result in a product (rows, depth) @ (depth, width).

    Blocks of 64 columns are the fastest, then 32. All of it where no such block divides the result.
    """
    for columns in (64, 32, width):
        if columns and depth and width % columns == 0 and columns <= 128:
            most = MULTIPLICATIONS // (columns * depth)
            height = next((h for h in range(min(most, rows), 0, -1) if rows % h == 0), 0)
            if height * columns >= LEAST:
                return height, columns
    return max(rows, 1), max(width, 1)


class Panels:
    """Matrices (G, K, N) prepared for products with x (..., R, K) into out (..., G, R, N):

        xp.matmul(panels.rows(x)[t], panels.blocks, out=panels.places(out)[t])

    makes out[t, g] = x[t] @ matrices[g]. `rows` and `places` are views, made once for all t.
    """

    def __init__(self, xp: Any, matrices: Any, rows: int) -> None:
        groups, depth, width = matrices.shape
        self.height: int = max(rows, 1)
        self.width: int = max(width, 1)
        if xp is np and blas_core() in CORES:
            self.height, self.width = cut(rows, depth, width)
        panels = matrices.reshape(groups, depth, width // self.width, self.width)
        self.blocks = xp.ascontiguousarray(panels.swapaxes(1, 2))

    def rows(self, x: Any) -> Any:
        """x (..., R, K) as (..., blocks of rows, 1, 1, height, K)."""
        *lead, rows, depth = x.shape
        return x.reshape(*lead, rows // self.height, 1, 1, self.height, depth)

    def places(self, out: Any) -> Any:
        """out (..., G, R, N) as (..., blocks of rows, G, blocks of columns, height, width)."""
        *lead, groups, rows, width = out.shape
        parts = out.reshape(*lead, groups, rows // self.height, self.height, width // self.width, self.width)
        n = len(lead)
        return parts.transpose(*range(n), n + 1, n, n + 3, n + 2, n + 4)
