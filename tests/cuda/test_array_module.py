"""Plain kernels on a device: every row's kernel runs with the device's array module as it does with NumPy."""

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

every_op = pytest.mark.parametrize("op", TABLE.values(), ids=TABLE.keys())


def on_device(device: Any, case: Any, **out: Any) -> list[Any]:
    """What the plain kernel gives with the device's module, as device arrays."""
    inputs = [device.cp.asarray(x) if isinstance(x, np.ndarray) else x for x in case.inputs]
    result = case.op.kernel(device.xp, *inputs, **local_attrs(case), **out)
    found = result if case.op.n_out != 1 else (result,)
    for x in found:
        assert type(x) is device.cp.ndarray, f"{case.op.name} gives {type(x)}"
    return [x.get() for x in found]


@every_op
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_kernel_computes_on_a_device_what_it_computes_on_the_host(op: Op, dtype: str, device: Any) -> None:
    for case in cases(op, dtype):
        wanted = run_whole(case)
        got = on_device(device, case)
        where = f"{op.name}{shapes_of(case.inputs)} {case.attrs}"
        assert [g.shape for g in got] == [w.shape for w in wanted], where
        same(got, wanted, case.out_dtypes, where)


@every_op
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_kernel_takes_out(op: Op, dtype: str, device: Any) -> None:
    if not op.takes_out or op.n_out != 1:
        return
    for case in cases(op, dtype):
        out = device.cp.empty(case.out_shapes[0], case.out_dtypes[0])
        same(on_device(device, case, out=out), run_whole(case), case.out_dtypes, f"{op.name} with out")


@every_op
def test_kernel_writes_over_the_inputs_it_names(op: Op, device: Any) -> None:
    """The column `over`: all its pairs at once."""
    if op.over is None:
        return
    for case in cases(op, "float32"):
        inputs = [device.cp.asarray(x) if isinstance(x, np.ndarray) else x for x in case.inputs]
        out: list[Any] = [None] * len(case.out_shapes)
        for result, operand in op.over(len(inputs), case.attrs):
            out[result] = inputs[operand]
        given = out[0] if op.n_out == 1 else tuple(out)
        found = op.kernel(device.xp, *inputs, **local_attrs(case), out=given)
        got = [x.get() for x in (found if op.n_out != 1 else (found,))]
        same(got, run_whole(case), case.out_dtypes, op.name)


# Rows whose plain kernels wait for the device: CuPy sorts by Thrust, which waits for its stream; a step that
# is a tensor is read. Such a row can be part of a CUDA graph only by a kernel of its own.
WAITING = ("sort", "argsort", "topk", "random_permutation", "sgd_update", "adam_update")
CAPTURED = [op for op in TABLE.values() if op.name not in WAITING]


@pytest.mark.parametrize("op", CAPTURED, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_kernel_can_be_part_of_a_graph(op: Op, dtype: str, device: Any) -> None:
    """Recorded, then replayed after its inputs were filled again: the same numbers."""
    for case in cases(op, dtype):
        inputs = [device.cp.asarray(x) if isinstance(x, np.ndarray) else x for x in case.inputs]
        kernel_attrs = local_attrs(case)
        case.op.kernel(device.xp, *inputs, **kernel_attrs)      # tables are made, kernels compiled
        device.stream.begin_capture()
        try:
            result = case.op.kernel(device.xp, *inputs, **kernel_attrs)
        finally:
            graph = device.stream.end_capture()
        for x, given in zip(inputs, case.inputs, strict=True):
            if isinstance(given, np.ndarray):
                x.set(given)
        graph.launch()
        got = [x.get() for x in (result if op.n_out != 1 else (result,))]
        same(got, run_whole(case), case.out_dtypes, f"{op.name}{shapes_of(case.inputs)} {case.attrs}")
