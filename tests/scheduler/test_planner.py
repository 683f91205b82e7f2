"""Plans, tested with tuples: no array, worker or clock takes part."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import meshtape  # noqa: F401  fills the op table
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import TABLE, Op
from meshtape.runtime.shards import REPLICATE as R
from meshtape.scheduler.cost import LINKS
from meshtape.scheduler.layout import Axes
from meshtape.scheduler.planner import Plan, Planner

F32, I64 = np.dtype("float32"), np.dtype("int64")


def planner(**axes: int) -> Planner:
    return Planner(Axes(tuple(axes), tuple(axes.values())), [LINKS["shm"]] * len(axes))


def plan(p: Planner, name: str | Op, *inputs: Any, **attrs: Any) -> Plan:
    """`inputs` are (shape, placements) of float32 tensors, or Python scalars."""
    op = TABLE[name] if isinstance(name, str) else name
    specs = tuple(p.specs.get(x[0], x[2] if len(x) > 2 else F32, x[1]) if isinstance(x, tuple) else
                  p.specs.weak[type(x)] for x in inputs)
    return p.plan(op, op.pack(attrs), specs)


def moved(found: Plan) -> bool:
    return found.before is not None


def test_data_parallel_layer_moves_nothing_forward() -> None:
    p = planner(data=4)
    found = plan(p, "linear", ((64, 32), (0,)), ((16, 32), (R,)), ((16,), (R,)))
    assert found.single is not None and found.single.placements == (0,) and not moved(found)


def test_weight_gradient_contracts_the_split_batch_to_partial() -> None:
    p = planner(data=4)
    found = plan(p, "linear_weight_grad", ((64, 16), (0,)), ((64, 32), (0,)))
    assert found.single is not None and found.single.placements == ("sum",) and not moved(found)


def test_megatron_pair_needs_no_move_until_the_second_result() -> None:
    p = planner(data=2, model=2)
    first = plan(p, "linear", ((64, 32), (0, R)), ((128, 32), (R, 0)), ((128,), (R, 0)))
    assert first.single is not None and first.single.placements == (0, 1) and not moved(first)
    second = plan(p, "matmul", ((64, 128), (0, 1)), ((128, 32), (R, 0)))
    assert second.single is not None and second.single.placements == (0, "sum") and not moved(second)


def test_partial_passes_through_linear_ops_only() -> None:
    p = planner(data=2)
    big = (64, 64)
    assert plan(p, "add", (big, ("sum",)), (big, ("sum",))).outs[0].placements == ("sum",)
    assert plan(p, "mul", (big, ("sum",)), 2.0).outs[0].placements == ("sum",)
    assert plan(p, "divide", (big, ("sum",)), ((), (R,))).outs[0].placements == ("sum",)
    for found in (plan(p, "relu", (big, ("sum",))), plan(p, "add", (big, ("sum",)), 2.0),
                  plan(p, "divide", 1.0, (big, ("sum",)))):
        assert found.outs[0].placements != ("sum",) and moved(found)
    product = plan(p, "mul", (big, ("sum",)), (big, ("sum",)))
    assert sum(bool(b) for b in product.before or ()) >= 1      # one factor at least must be whole


def test_a_nonlinear_op_after_partial_takes_the_cheaper_half() -> None:
    """Reduce-scatter and a split result cost less than an all-reduce of the whole."""
    p = planner(data=4)
    assert plan(p, "relu", ((1024, 1024), ("sum",))).outs[0].placements == (0,)


def test_small_replicated_work_stays_whole_and_large_is_divided() -> None:
    p = planner(data=4)
    assert plan(p, "matmul", ((16, 16), (R,)), ((16, 16), (R,))).outs[0].placements == (R,)
    assert plan(p, "matmul", ((4096, 4096), (R,)), ((4096, 4096), (R,))).outs[0].placements != (R,)
    assert plan(p, "add", ((8, 8), (R,)), ((8, 8), (R,))).outs[0].placements == (R,)


def test_max_over_a_split_dimension_is_partial_max() -> None:
    p = planner(data=2)
    assert plan(p, "max", ((1000, 64), (0,)), axis=(0,)).outs[0].placements == ("max",)


def test_reshape_keeps_what_survives_and_splits_leading_factors_evenly() -> None:
    p = planner(data=4)
    assert plan(p, "reshape", ((8, 3, 5, 5), (0,)), shape=(8, 75)).outs[0].placements == (0,)
    even = plan(p, "reshape", ((8, 64), (0,)), shape=(512,))
    assert even.outs[0].placements == (0,) and not moved(even)
    uneven = plan(p, "reshape", ((6, 64), (0,)), shape=(384,))
    assert moved(uneven)


def test_optimizer_updates_stay_where_the_parameters_lie() -> None:
    p = planner(data=2, model=2)
    w, b = (64, 32), (64,)
    inputs = [1, 0.1, 0.9, 0.99, 1e-8, 0.0, (w, (R, 0)), (b, (0, R)), (w, ("sum", 0)), (b, ("sum", "sum")),
              (w, (R, 0)), (b, (0, R)), (w, (R, 0)), (b, (0, R))]
    found = plan(p, "adam_update", *inputs, n=2)
    assert [o.placements for o in found.outs] == [(R, 0), (0, R)] * 3
    instr = p.instrs[found.number]
    assert [t.placements for t in instr.ins if t is not None] == [(R, 0), (0, R)] * 4


def test_mixed_dtypes_are_cast_before_the_kernel() -> None:
    p = planner(data=2)
    found = plan(p, "add", ((8, 8), (0,)), ((8, 8), (0,), I64))
    assert found.outs[0].dtype == F32
    assert found.before is not None and [p.instrs[n].op for n in found.before[1]] == ["astype"]


def test_an_op_without_a_split_rule_runs_whole_and_warns_once() -> None:
    p = planner(data=2)
    odd = replace(TABLE["exp"], name="no_rule", axes=None)
    with pytest.warns(UserWarning, match="no_rule has no split rule"):
        found = plan(p, odd, ((8, 8), (0,)))
    assert found.outs[0].placements == (R,) and moved(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(p, odd, ((9, 8), (0,)))


def test_shapes_fail_on_the_driver() -> None:
    p = planner(data=2)
    with pytest.raises(ShapeError, match=r"matmul.*\(4, 6\).*\(5, 2\)"):
        plan(p, "matmul", ((4, 6), (R,)), ((5, 2), (R,)))


def test_equal_instructions_share_a_number() -> None:
    p = planner(data=2)
    first, again = (plan(p, "exp", ((8, 8), (0,))) for _ in range(2))
    assert first.number == again.number
