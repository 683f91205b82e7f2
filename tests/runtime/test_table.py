"""What every row of the op table must satisfy. A new op is tested by being declared."""

from __future__ import annotations

import ast
from dataclasses import replace
from inspect import signature
from typing import Any

import msgpack
import numpy as np
import pytest
from table import (
    assert_same,
    check_layouts,
    in_dtype,
    make_case,
    run_whole,
    samples,
    shapes_of,
)

import meshtape.runtime.ops  # noqa: F401  fills the table
from meshtape.runtime import special
from meshtape.runtime.dtypes import canonical, kind
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import TABLE, Axes, Op, Sample, pointwise_axes
from meshtape.runtime.ops import activation, pointwise, reduce
from meshtape.runtime.ops.rules import EXPRESSION_FUNCTIONS
from meshtape.runtime.protocol import freeze

every_op = pytest.mark.parametrize("op", TABLE.values(), ids=TABLE.keys())


def cases(op: Op) -> Any:
    rng = np.random.default_rng(0)
    for sample in samples(op):
        yield make_case(op, sample, rng)
        if sample.dtype == "float64":
            yield make_case(op, in_dtype(sample, "float32"), rng)


@every_op
def test_every_row_has_samples(op: Op) -> None:
    assert samples(op), f"{op.name} has no samples: no generic test covers it"


@every_op
def test_columns_fit_the_kernel(op: Op) -> None:
    if isinstance(op.vjp, tuple) and not op.variadic:
        for sample in samples(op):
            assert len(op.vjp) == len(sample.inputs)
    if op.kept_outputs or op.kept_inputs:
        assert op.vjp is not None, f"{op.name} keeps values for a vjp that it does not have"


@every_op
def test_attributes_travel(op: Op) -> None:
    for sample in samples(op):
        packed = op.pack(sample.attrs)
        hash(packed)
        assert freeze(msgpack.unpackb(msgpack.packb(packed), strict_map_key=False)) == packed


@every_op
def test_rules_say_what_the_kernel_returns(op: Op) -> None:
    for case in cases(op):
        results = run_whole(case)
        where = f"{op.name}{shapes_of(case.inputs)} {case.attrs}"
        assert [r.shape for r in results] == case.out_shapes, where
        weak = all(not isinstance(x, np.ndarray) or x.dtype == bool for x in case.inputs)
        for result, dtype in zip(results, case.out_dtypes, strict=True):
            assert result.dtype == dtype or weak, f"{where} gives {result.dtype}, its rule says {dtype}"


@every_op
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_kernels_take_half_precision(op: Op, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    for sample in samples(op):
        if sample.dtype == "float64":
            try:
                case = make_case(op, in_dtype(sample, canonical(dtype)), rng)
            except DTypeError:
                continue
            results = run_whole(case)
            assert [r.shape for r in results] == case.out_shapes
            assert all(kind(r.dtype) == kind(d) for r, d in zip(results, case.out_dtypes, strict=True))


@every_op
def test_rules_give_plain_tuples_of_ints(op: Op) -> None:
    for case in cases(op):
        for shape in op.shape(*shapes_of(case.inputs), **case.attrs):
            assert isinstance(shape, tuple) and all(type(n) is int for n in shape), shape


@every_op
def test_expression_computes_what_the_kernel_computes(op: Op) -> None:
    if op.elementwise is None:
        return
    code = compile(op.elementwise, op.name, "eval")
    names = {node.id for node in ast.walk(ast.parse(op.elementwise)) if isinstance(node, ast.Name)}
    params = [p for p in list(signature(op.kernel).parameters)[1:] if p != "out" and p not in op.attrs]
    assert names <= {*params, *op.attrs, *EXPRESSION_FUNCTIONS}, f"{op.elementwise} uses unknown names"
    for case in cases(op):
        known = {**FUNCTIONS, **case.attrs, **dict(zip(params, case.inputs, strict=False))}
        with np.errstate(all="ignore"):
            found = np.asarray(eval(code, {"__builtins__": {}}, known))
        wanted = [r.astype(d) for r, d in zip(run_whole(case), case.out_dtypes, strict=True)]
        assert_same([found.astype(case.out_dtypes[0])], wanted, f"{op.name}: {op.elementwise}")


FUNCTIONS = {name: getattr(np, name, None) for name in EXPRESSION_FUNCTIONS} | {
    "max": np.maximum, "min": np.minimum, "rsqrt": lambda x: 1 / np.sqrt(x),
    "erf": lambda x: special.erf(np, x)}


@every_op
def test_kernel_writes_into_out(op: Op) -> None:
    """Where the kernel takes `out`, the result is there; a pointwise one may even write over an input."""
    if not op.takes_out or op.n_out != 1:
        return
    for case in cases(op):
        wanted = run_whole(case)
        out = np.empty(case.out_shapes[0], case.out_dtypes[0])
        with np.errstate(all="ignore"):
            result = op.kernel(np, *case.inputs, **case.attrs, out=out)
            assert_same([result], wanted, f"{op.name} with out")
            for i, x in enumerate(case.inputs if op.axes is pointwise_axes else []):
                if isinstance(x, np.ndarray) and (x.shape, x.dtype) == (out.shape, out.dtype):
                    inputs = [y.copy() if j == i else y for j, y in enumerate(case.inputs)]
                    result = op.kernel(np, *inputs, **case.attrs, out=inputs[i])
                    assert_same([result], wanted, f"{op.name} over input {i}")


@every_op
def test_kernel_writes_over_the_inputs_it_names(op: Op) -> None:
    """The column `over`: all its pairs at once, and bit for bit."""
    if op.over is None:
        return
    for case in cases(op):
        wanted = run_whole(case)
        inputs = [x.copy() if isinstance(x, np.ndarray) else x for x in case.inputs]
        out: list[Any] = [None] * len(wanted)
        for result, operand in op.over(len(inputs), case.attrs):
            out[result] = inputs[operand]
        with np.errstate(all="ignore"):
            found = op.kernel(np, *inputs, **case.attrs, out=out[0] if op.n_out == 1 else tuple(out))
        for got, want in zip((found,) if op.n_out == 1 else found, wanted, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=op.name)


@every_op
def test_every_split_computes_the_dense_answer(op: Op) -> None:
    """Every index letter, and every set of linear inputs with random addends, on 1-D and 2-D meshes."""
    if op.axes is None:
        assert not op.linear or op.n_out == -1
        return
    for sample in samples(op):
        check_layouts(op, sample)


# --- the harness itself: a wrong declaration must not pass -----------------------------------------------

def assert_caught(op: Op, *wrong: Sample) -> None:
    with pytest.raises(AssertionError):
        for sample in wrong or samples(op):
            check_layouts(op, sample)


def test_harness_catches_relu_declared_linear() -> None:
    assert_caught(replace(activation.relu, linear=((0,),)), Sample(((5, 3),)))


def test_harness_catches_mul_declared_jointly_linear() -> None:
    assert_caught(replace(pointwise.mul, linear=((0, 1),)), Sample(((5, 3), (3,))))


def test_harness_catches_add_declared_linear_in_each_alone() -> None:
    assert_caught(replace(pointwise.add, linear=((0,), (1,))), Sample(((5, 3), (3,))))


def test_harness_catches_a_split_of_the_reduced_dimension() -> None:
    assert_caught(replace(reduce.argmax, axes=reduce.axes_of("sum")), Sample(((5, 3),), {"axis": 0}))


def test_harness_catches_the_wrong_reduction() -> None:
    assert_caught(replace(reduce.max_, axes=reduce.axes_of("sum")), Sample(((5, 3),), {"axis": 0}))


def test_harness_catches_a_mean_over_the_local_count() -> None:
    assert_caught(replace(reduce.mean, local=None), Sample(((5, 3),), {"axis": 0}))


def test_harness_catches_letters_that_do_not_move_together() -> None:
    crossed = replace(pointwise.add, axes=lambda *shapes, **attrs: Axes(("ab", "ba"), ("ab",)))
    assert_caught(crossed, Sample(((4, 4), (4, 4))))


def test_harness_catches_global_shapes_left_in_attributes() -> None:
    forgetful = replace(reduce.broadcast_reduced, local=None)
    assert_caught(forgetful, Sample(((3,),), {"shape": (5, 3), "axis": 0}))


def test_harness_catches_a_bias_added_by_every_worker() -> None:
    def kernel(xp: Any, x: Any, w: Any, b: Any) -> Any:
        return x @ w + b
    forgetful = Op("biased", kernel, shape=lambda x, w, b: [(x[0], w[1])], dtype=lambda *d: (d, d[:1]),
                   axes="mk,kn,n->mn")
    correct = replace(forgetful, axes=lambda *s: Axes(("mk", "kn", "n"), ("mn",), additive=(2,)))
    check_layouts(correct, Sample(((3, 5), (5, 4), (4,))))
    assert_caught(forgetful, Sample(((3, 5), (5, 4), (4,))))


def test_harness_catches_a_kernel_that_writes_over_its_input() -> None:
    def kernel(xp: Any, x: Any) -> Any:
        x += 1
        return x
    with pytest.raises(ValueError, match="read-only"):
        check_layouts(replace(pointwise.exp, kernel=kernel), Sample(((5, 3),)))
