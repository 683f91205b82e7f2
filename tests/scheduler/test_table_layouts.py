"""Every row under every kind of layout, on 1-D and 2-D meshes, computes what one worker computes.

Inputs lie as Replicate, as Shard of each dimension (also uneven and empty), and as Partial with *random*
addends: proportional ones would let a nonlinear op pass for a linear one.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from meshes import MESHES, on
from table import TOLERANCE, make_inputs, samples

import meshtape as mt
from meshtape.autograd import apply
from meshtape.runtime.op import TABLE, Op, Sample
from meshtape.scheduler.session import Session

WAYS = 4        # layouts tried per sample and mesh; a row has several samples and there are five meshes


@pytest.fixture(scope="module", params=MESHES)
def session(request: pytest.FixtureRequest) -> Any:
    with on(MESHES[request.param]) as found:
        yield found


def placements(x: Any, n_axes: int) -> list[tuple[Any, ...]]:
    """Every combination of placements for one input."""
    one = [-1, *range(x.ndim)] + (["sum"] if x.dtype.kind == "f" else [])
    return list(itertools.product(one, repeat=n_axes))


def coarse(x: Any) -> Any:
    """Rounded so that sums of a few such numbers are exact, and ties stay ties."""
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return x
    unit = {"float64": 2.0**20, "float32": 2.0**8}.get(x.dtype.name, 2.0**3)
    return np.asarray(np.round(x * unit) / unit, x.dtype)


def laid_out(
    x: np.ndarray[Any, Any], where: tuple[Any, ...], session: Session, rng: np.random.Generator
) -> mt.Tensor:
    """`x` under the given placements; a Partial axis gets random addends that sum to x."""
    if "sum" not in where:
        return mt.tensor(x).to_placements(where)
    n = 1
    for size, p in zip(session.axes.shape, where, strict=True):
        n *= size if p == "sum" else 1
    addends = coarse(rng.uniform(-3, 3, (n, *x.shape)).astype(x.dtype))
    addends[-1] = x - addends[:-1].sum(0, dtype=x.dtype)
    # A stack split over the Partial axes and summed leaves exactly one addend with each worker.
    split = tuple(0 if p == "sum" else p if p == -1 else p + 1 for p in where)
    stacked = mt.tensor(addends).to_placements(split)
    summed = apply(TABLE["sum"], (stacked,), ((0,), False, None))
    assert summed.spec.placements == where, (summed.spec.placements, where)
    return summed  # type: ignore[no-any-return]


def outputs(op: Op, sample: Sample, inputs: list[Any]) -> list[mt.Tensor]:
    out = apply(op, tuple(inputs), op.pack(sample.attrs))
    return list(out) if isinstance(out, tuple) else [out]


def dense(op: Op, sample: Sample, arrays: list[Any]) -> list[Any]:
    return [
        o.numpy()
        for o in outputs(op, sample, [mt.tensor(x) if isinstance(x, np.ndarray) else x for x in arrays])
    ]


def tolerance(dtype: np.dtype[Any]) -> float:
    return TOLERANCE.get(dtype.name, 0.0) * 100


@pytest.mark.filterwarnings("ignore:.*has no split rule")
@pytest.mark.parametrize("name", [n for n, op in TABLE.items() if samples(op)])
def test_every_layout_computes_the_dense_answer(name: str, session: Session) -> None:
    op, rng = TABLE[name], np.random.default_rng(3)
    tried: list[tuple[Any, list[mt.Tensor], list[Any]]] = []
    for sample in samples(op):
        arrays = [coarse(x) for x in make_inputs(sample, rng)]
        want = dense(op, sample, arrays)
        choices = [
            placements(x, len(session.axes.shape)) if isinstance(x, np.ndarray) else [None] for x in arrays
        ]
        for _ in range(WAYS):
            ways = [c[rng.integers(len(c))] for c in choices]
            inputs = [
                x if w is None else laid_out(x, w, session, rng) for x, w in zip(arrays, ways, strict=True)
            ]
            tried.append(((sample, ways), outputs(op, sample, inputs), want))
    flat = session.fetch([(o.block, o.spec) for _, outs, _ in tried for o in outs])
    at = iter(flat)
    for what, outs, want in tried:
        for o, w in zip(outs, want, strict=True):
            got = next(at)
            assert got.dtype == w.dtype and got.shape == w.shape, (name, what)
            if w.dtype.kind in "fc":
                scale = max(1.0, float(np.max(np.abs(w[np.isfinite(w)]), initial=0.0)))
                np.testing.assert_allclose(got, w, rtol=tolerance(w.dtype), atol=tolerance(w.dtype) * scale,
                                           err_msg=f"{name} {what} -> {o.layout}")
            else:
                np.testing.assert_array_equal(got, w, err_msg=f"{name} {what} -> {o.layout}")
