"""Mixed precision takes the dtypes that PyTorch's takes, and its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from meshes import on
from spy import Spy

import meshtape as mt

RNG = np.random.default_rng(0)


# --- precision of float32 products ------------------------------------------------------------------------

def test_the_precision_of_products_is_part_of_the_program() -> None:
    assert mt.get_float32_matmul_precision() == "highest"
    try:
        with on(2) as session:
            spy, x = Spy(session), mt.ones((4, 4))
            for precision in ("highest", "high", "high"):
                mt.set_float32_matmul_precision(precision)
                y = x @ x
                mt.flush()
                del y
            mt.set_float32_matmul_precision("medium")
            assert mt.get_float32_matmul_precision() == "medium"
            (x @ x).numpy()
            found = [(b.program.precision, b.fresh) for b in spy.take()
                     if b.program and "matmul" in [i.op for i in b.program.instrs]]
            assert [p for p, _ in found] == ["highest", "high", "high", "medium"]
        with on(1) as session:
            assert session.precision == "medium"
        with pytest.raises(ValueError, match="'low' given; use one of"):
            mt.set_float32_matmul_precision("low")
    finally:
        mt.set_float32_matmul_precision("highest")


def test_what_is_pending_keeps_its_precision() -> None:
    try:
        with on(1) as session:
            spy = Spy(session)
            y = mt.ones((4, 4)) @ mt.ones((4, 4))
            mt.set_float32_matmul_precision("high")
            (y @ y).numpy()
            assert [b.program.precision for b in spy.take()] == ["highest", "high"]
    finally:
        mt.set_float32_matmul_precision("highest")
