"""Products in blocks beside whole ones."""

from __future__ import annotations

import numpy as np
import pytest

from meshtape.runtime import panels
from meshtape.runtime.panels import Panels, cut


@pytest.mark.parametrize("core", ["SkylakeX", "Haswell", ""])
@pytest.mark.parametrize("shape", [(2, 64, 193, 128), (1, 24, 512, 96), (3, 5, 7, 11), (1, 0, 3, 64),
                                   (2, 4, 0, 3), (1, 7, 3, 0), (4, 31, 40, 100), (2, 61, 512, 200),
                                   (1, 9, 3000, 130)])
def test_products_in_blocks_are_the_products(core: str, shape: tuple[int, ...],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "blas_core", lambda: core)
    groups, rows, depth, width = shape
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(groups, width, depth)).swapaxes(1, 2)
    x = rng.normal(size=(3, rows, depth + 2))[:, :, 1:-1]
    out = np.zeros((3, groups, rows, width + 1))
    made = Panels(np, matrices, rows)
    multiply = made.into(x, out[..., :width])
    for t in range(3):
        multiply(t)
    wanted = x[:, None] @ matrices
    np.testing.assert_allclose(out[..., :width], wanted, rtol=1e-11, atol=1e-11)
    assert not out[..., width:].any()
    multiply = made.into(x, out[0, ..., :width])
    for t in range(3):
        multiply(t)
        np.testing.assert_allclose(out[0, ..., :width], wanted[t], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 2, 8, 31, 50, 64, 97, 3200])
@pytest.mark.parametrize("width", [1, 32, 48, 64, 100, 128, 650])
@pytest.mark.parametrize("depth", [1, 100, 193, 512, 5000])
def test_blocks_stay_within_bounds_or_are_all_of_it(rows: int, width: int, depth: int) -> None:
    height, columns = cut(rows, depth, width)
    assert 0 < height <= rows and 0 < columns <= width
    assert (height, columns) == (rows, width) or height * columns * depth <= panels.MULTIPLICATIONS
