"""Cases of the op table for tests on a device, and how results are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
from table import assert_same, in_dtype, make_case, samples, shapes_of

import meshtape.runtime.ops  # noqa: F401  fills the table
from meshtape.runtime.dtypes import canonical
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import IO, Op
from meshtape.runtime.shards import piece


def cases(op: Op, dtype: str) -> Any:
    """The samples, with float64 ones in `dtype`; all others only for float64."""
    rng = np.random.default_rng(0)
    for sample in samples(op):
        if sample.dtype == "float64" and dtype != "float64":
            try:
                yield make_case(op, in_dtype(sample, canonical(dtype)), rng)
            except DTypeError:
                continue
        elif dtype == "float64":
            yield make_case(op, sample, rng)


def local_attrs(case: Any) -> dict[str, Any]:
    """The attributes as a worker that holds everything sees them."""
    if case.op.local is None:
        return dict(case.attrs)
    whole = [piece(s, (), (), ()) for s in shapes_of(case.inputs)]
    found: dict[str, Any] = case.op.local(case.attrs, IO(
        tuple(p if isinstance(x, np.ndarray) else None for p, x in zip(whole, case.inputs, strict=True)),
        tuple(piece(s, (), (), ()) for s in case.out_shapes)))
    return found


def same(got: Any, wanted: Any, dtypes: Any, where: str) -> None:
    """Equal in the declared dtype; 16-bit floats to a few of their steps."""
    for g, w, dtype in zip(got, wanted, dtypes, strict=True):
        if dtype.itemsize == 2 and dtype.kind in "fV":
            tolerance = 1e-2 if dtype.kind == "f" else 8e-2
            np.testing.assert_allclose(g.astype(float), w.astype(float), tolerance, tolerance, err_msg=where)
        else:
            assert_same([g.astype(dtype)], [w.astype(dtype)], where)
