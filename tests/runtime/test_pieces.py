"""Products in pieces are the products."""

from __future__ import annotations

import numpy as np
import pytest

from meshtape.runtime import pieces

SHAPES = [(512, 64, 64), (2048, 64, 192), (1000, 256, 64), (777, 40, 65), (2100, 96, 96), (600, 128, 128),
          (511, 64, 64), (600, 4000, 64), (0, 64, 64), (600, 64, 0)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rows", "depth", "width"), SHAPES)
def test_products_in_pieces_are_the_products(monkeypatch: pytest.MonkeyPatch, rows: int, depth: int,
                                             width: int, dtype: str) -> None:
    monkeypatch.setattr(pieces, "blas_core", lambda: pieces.CORES[0])
    rng = np.random.default_rng(0)
    x, g, w = (rng.normal(size=s).astype(dtype) for s in ((rows, depth), (rows, width), (width, depth)))
    close = {"rtol": 1e-4, "atol": 1e-2} if dtype == "float32" else {"rtol": 1e-10, "atol": 1e-10}
    for given in (x, np.asfortranarray(x)):
        for matrix in (w.T, np.ascontiguousarray(w.T)):
            out = np.empty((rows, width), dtype)
            assert pieces.times(np, given, matrix, out) is out
            np.testing.assert_allclose(out, x @ w.T, **close)
            np.testing.assert_allclose(pieces.times(np, given, matrix), x @ w.T, **close)
        out = np.empty((width, depth), dtype)
        assert pieces.inner(np, g, given, out) is out
        np.testing.assert_allclose(out, g.T @ x, **close)
        np.testing.assert_allclose(pieces.inner(np, g, given), g.T @ x, **close)
