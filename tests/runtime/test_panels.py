"""Products in blocks beside whole ones."""

from __future__ import annotations

import numpy as np
import pytest

from meshtape.runtime import panels
from meshtape.runtime.panels import Panels, cut


@pytest.mark.parametrize("core", ["SkylakeX", "Haswell", ""])
@pytest.mark.parametrize("shape", [(2, 64, 193, 128), (1, 24, 512, 96), (3, 5, 7, 11), (1, 0, 3, 64),
                                   (2, 4, 0, 3), (1, 7, 3, 0), (4, 31, 40, 100)])
def test_products_in_blocks_are_the_products(core: str, shape: tuple[int, ...],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "blas_core", lambda: core)
    groups, rows, depth, width = shape
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(groups, width, depth)).swapaxes(1, 2)
    x = rng.normal(size=(3, rows, depth + 2))[:, :, 1:-1]
    out = np.zeros((3, groups, rows, width + 1))
    made = Panels(np, matrices, rows)
    left, places = made.rows(x), made.places(out[..., :width])
    for t in range(3):
        np.matmul(left[t], made.blocks, out=places[t])
    np.testing.assert_allclose(out[..., :width], x[:, None] @ matrices, rtol=1e-12, atol=1e-12)
    assert not out[..., width:].any()


@pytest.mark.parametrize("rows", [1, 2, 8, 31, 50, 64, 97, 3200])
@pytest.mark.parametrize("width", [1, 32, 48, 64, 100, 128, 650])
@pytest.mark.parametrize("depth", [1, 100, 193, 512, 5000])
def test_blocks_divide_the_result_and_stay_within_bounds_or_are_all_of_it(rows: int, width: int,
                                                                          depth: int) -> None:
    height, columns = cut(rows, depth, width)
    assert rows % height == 0 and width % columns == 0
    assert (height, columns) == (rows, width) or height * columns * depth <= panels.MULTIPLICATIONS
