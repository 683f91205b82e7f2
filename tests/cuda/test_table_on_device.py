"""Every kernel for CUDA computes what its row's plain kernel computes, on every sample and in every dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from table import run_whole, shapes_of

sys.path.insert(0, str(Path(__file__).parent))
from device_cases import cases, local_attrs, same

from meshtape.runtime.op import TABLE, Op

SPECIAL = [op for op in TABLE.values() if op.device is not None]
every_op = pytest.mark.parametrize("op", SPECIAL, ids=lambda op: op.name)
MASK64 = 2**64 - 1


SIXTEEN = {"float16": 1e-2, "bfloat16": 8e-2}      # a few of their steps


def agree(found: list[Any], case: Any) -> None:
    """16-bit floats with what the plain kernel gives in float64, which does not round on the way; then all
    floating results to a few steps of the coarsest dtype among them.
    """
    where = f"{case.op.name}{shapes_of(case.inputs)} {case.attrs}"
    named = {x.dtype.name for x in (*case.inputs, *found) if hasattr(x, "dtype")}
    if not named.intersection(SIXTEEN):
        same([x.get() for x in found], run_whole(case), case.out_dtypes, where)
        return
    tolerance = max(SIXTEEN[name] for name in named if name in SIXTEEN)
    wanted = run_whole(case._replace(inputs=[
        x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype.name in (*SIXTEEN, "float32") else x
        for x in case.inputs]))
    for x, want in zip(found, wanted, strict=True):
        if x.dtype.kind in "biu":
            np.testing.assert_array_equal(x.get(), want, err_msg=where)
        else:
            np.testing.assert_allclose(x.get().astype(np.float64), want, tolerance, tolerance, err_msg=where)


def supported(case: Any, attrs: dict[str, Any]) -> bool:
    arrays = [x if isinstance(x, np.ndarray) else None for x in case.inputs]
    return bool(case.op.device.supports(tuple(None if x is None else x.shape for x in arrays),
                                        tuple(None if x is None else x.dtype for x in arrays), attrs))


def given(device: Any, case: Any, turned: bool = False) -> list[Any]:
    """Inputs as a worker hands them over: numbers as the kernel takes them. `turned`: arrays of two and more
    dimensions lie in memory as their transposes.
    """
    cp, letters = device.cp, case.op.device.numbers
    scalars = [i for i, x in enumerate(case.inputs) if not isinstance(x, np.ndarray)]
    kinds = dict(zip(scalars[::-1], letters[::-1], strict=False))
    found = []
    for i, x in enumerate(case.inputs):
        kind = kinds.get(i, "h")
        if isinstance(x, np.ndarray):
            found.append(cp.asarray(np.ascontiguousarray(x.T)).T if turned and x.ndim > 1 else cp.asarray(x))
        elif kind == "h":
            found.append(x)
        else:
            found.append(cp.asarray(np.float64(x)) if kind == "d" else
                         cp.asarray(np.uint64(int(x) & MASK64)).view(np.int64))
    return found


def results(device: Any, case: Any, inputs: list[Any], attrs: dict[str, Any], **out: Any) -> list[Any]:
    made = case.op.device.run(device, *inputs, **attrs, **out)
    found = list(made) if case.op.n_out != 1 else [made]
    assert [x.shape for x in found] == case.out_shapes
    assert [x.dtype for x in found] == case.out_dtypes, case.op.name
    return found


@every_op
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_kernels_agree(op: Op, dtype: str, device: Any) -> None:
    for case in cases(op, dtype):
        attrs = local_attrs(case)
        if supported(case, attrs):
            agree(results(device, case, given(device, case), attrs), case)
            agree(results(device, case, given(device, case, turned=True), attrs), case)


@pytest.mark.parametrize("op", [op for op in SPECIAL if op.over is not None], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_may_be_written_over_the_inputs_that_the_row_names(op: Op, dtype: str, device: Any) -> None:
    assert op.over is not None
    for case in cases(op, dtype):
        attrs = local_attrs(case)
        if not supported(case, attrs):
            continue
        inputs = given(device, case)
        out: list[Any] = [None] * len(case.out_shapes)
        for result, operand in op.over(len(inputs), case.attrs):
            x = inputs[operand]
            if (x.shape, x.dtype) == (case.out_shapes[result], case.out_dtypes[result]):
                out[result] = x
        agree(results(device, case, inputs, attrs, out=out[0] if op.n_out == 1 else tuple(out)), case)


@every_op
def test_kernels_can_be_part_of_a_graph(op: Op, device: Any) -> None:
    """Recorded, then replayed after the inputs were filled: the same bits as without a graph."""
    for case in cases(op, "float32"):
        attrs = local_attrs(case)
        if not supported(case, attrs):
            continue
        inputs = given(device, case)
        wanted = [x.get() for x in results(device, case, inputs, attrs)]     # compiled, tables made
        kept = [x.copy() if isinstance(x, device.cp.ndarray) else x for x in inputs]
        device.stream.begin_capture()
        try:
            found = results(device, case, inputs, attrs)
        finally:
            graph = device.stream.end_capture()
        for x, before in zip(inputs, kept, strict=True):
            if isinstance(x, device.cp.ndarray):
                x[...] = before
        graph.launch(device.stream)
        for x, want in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(x.get(), want, err_msg=op.name)
