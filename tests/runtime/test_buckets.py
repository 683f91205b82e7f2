"""Several tensors' moves as one message give what each alone gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshtape.runtime import moves

sys.path.insert(0, str(Path(__file__).parent))
import collective_cases as cases
from test_collectives import succeed

SHAPES = [(6, 4), (3,), (1, 5), (2, 3, 4), (0, 2)]
DIMS = [1, 0, 0, 2, 1]


def arrays(rank: int) -> list[Any]:
    rng = np.random.default_rng(rank)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_scatter_and_a_gather_make_an_all_reduce(size: int) -> None:
    def body(comm: Any) -> None:
        given = arrays(comm.rank)
        wide = [np.repeat(x, 2, -1)[..., ::2] for x in given]      # not contiguous
        reduced = moves.compile_bucket(np, SHAPES, "sum", comm)(*wide)
        parts = moves.compile_scatter_bucket(np, SHAPES, DIMS, "sum", comm)(*wide)
        whole = moves.compile_gather_bucket(np, SHAPES, DIMS, comm)(*parts)
        for i, x in enumerate(reduced):
            want = sum((arrays(r)[i] for r in range(1, size)), start=arrays(0)[i])
            assert x.tobytes() == want.tobytes() == whole[i].tobytes() and x.shape == SHAPES[i]
            assert parts[i].tobytes() == cases.part(want, DIMS[i], size, comm.rank).tobytes()
            assert wide[i].tobytes() == given[i].tobytes()

    succeed(size, body)


def test_results_go_where_out_says() -> None:
    def body(comm: Any) -> None:
        given = arrays(comm.rank)
        room = [given[0], None, None, given[3], None]
        got = moves.compile_bucket(np, SHAPES, "max", comm)(*given, out=room)
        assert got[0] is given[0] and got[3] is given[3] and got[1] is not given[1]
        parts = [cases.part(x, dim, 2, comm.rank) for x, dim in zip(got, DIMS, strict=True)]
        room = [None, np.empty(SHAPES[1], np.float32), None, None, None]
        whole = moves.compile_gather_bucket(np, SHAPES, DIMS, comm)(*parts, out=room)
        assert whole[1] is room[1]
        assert all(np.array_equal(a, b) for a, b in zip(got, whole, strict=True))

    succeed(2, body)
