"""Which steps become one kernel, on programs made by hand. No device."""

from __future__ import annotations

from typing import Any

import numpy as np
from fused_programs import Number, Steps, programs
from hypothesis import given, settings

from meshtape.runtime.cuda.chains import MOST_ARRAYS, MOST_LINKS, group_steps
from meshtape.runtime.cuda.links import Chain
from meshtape.runtime.overlap import Placed

BIG = (1 << 10, 1 << 10)


def grouped(program: Steps, *kept: int) -> list[Placed]:
    return group_steps(program.steps, {s: program.types[s] for s in program.external}, program.dead(*kept),
                       lambda chain: lambda *args: chain)


def chain(step: Placed) -> Any:
    return step.call.function()


def names(steps: list[Placed]) -> list[str]:
    return [step.call.name.removeprefix("fused ") for step in steps]


def check_order(program: Steps, steps: list[Placed]) -> None:
    """Everything is made before it is read, and other steps are in the order in which they were."""
    made = set(program.external)
    for step in steps:
        assert made.issuperset(s for s in step.ins if s >= 0)
        assert made.isdisjoint(step.outs)
        made.update(step.outs)
    others = [s for s in program.steps if s.call.kind != "op"]
    assert [s for s in steps if s.call.kind not in ("op", "fused")] == others


def test_a_chain_writes_what_is_kept_and_nothing_else() -> None:
    p = Steps()
    x, y = p.input(BIG), p.input(BIG)
    out = p.op("tanh", p.op("add", p.op("mul", x, y), x))
    step, = grouped(p, out)
    assert (step.ins, step.outs, step.origin) == ((x, y), (out,), 0)
    assert step.call.kind == "fused" and step.call.on_device and step.call.op is None and not step.call.many
    assert step.call.shapes == (BIG,) and [d.name for d in step.call.dtypes] == ["float32"]
    assert len(chain(step).links) == 3 and chain(step).results == (4,)


def test_a_diamond_is_one_chain_with_two_results() -> None:
    p = Steps()
    x = p.input(BIG)
    top = p.op("exp", x)
    left, right = p.op("mul", top, Number(2.0)), p.op("add", top, Number(1.0))
    out = p.op("divide", left, right)
    step, = grouped(p, left, out)
    assert step.outs == (left, out) and step.call.many
    assert step.call.over == ((0, 0), (1, 0))


def test_a_chain_tells_which_results_need_which_arrays() -> None:
    p = Steps()
    x, y = p.input(BIG), p.input(BIG)
    first = p.op("mul", x, Number(2.0))
    second = p.op("add", first, y)
    outs = first, second, p.op("sum", y, axis=0)
    step, = grouped(p, *outs)
    wanted = {first: {x}, second: {x, y}, outs[2]: {y}}
    for slot, needs in zip(step.outs, chain(step).needs(), strict=True):
        assert {step.ins[k] for k in needs} == wanted[slot]


def test_scalars_come_behind_the_arrays_with_their_letters() -> None:
    p = Steps()
    x, n = p.input(BIG), p.input(BIG, "int64")
    flag = p.op("less", n, Number(3))
    out = p.op("where", flag, p.op("mul", x, Number(0.5)), Number(7.0))
    step, = grouped(p, out)
    assert step.ins == (n, x, -1, -2, -3) and step.call.numbers == "idd"


def test_casts_are_part_of_chains() -> None:
    p = Steps()
    x = p.input(BIG, "float16")
    out = p.op("astype", p.op("mul", p.op("astype", x, dtype="float32"), Number(2.0)), dtype="float16")
    step, = grouped(p, out)
    assert names([step]) == ["astype mul astype"] and step.call.over == ((0, 0),)


def test_a_value_that_a_collective_reads_is_written_and_the_chain_ends_there() -> None:
    p = Steps()
    x = p.input(BIG)
    a = p.op("mul", x, Number(2.0))
    b = p.op("add", a, Number(1.0))
    moved = p.boundary(b)
    out = p.op("sub", moved, a)
    steps = grouped(p, out)
    check_order(p, steps)
    assert names(steps) == ["mul add", "all_reduce", "sub"]
    assert steps[0].outs == (a, b)


def test_a_chain_may_wait_for_its_last_member_but_not_past_a_step_that_reads_it() -> None:
    p = Steps()
    x, y = p.input(BIG), p.input(BIG)
    a = p.op("mul", x, Number(2.0))
    moved = p.boundary(y)
    out = p.op("add", a, moved)
    steps = grouped(p, out)
    check_order(p, steps)
    assert names(steps) == ["all_reduce", "mul add"] and steps[1].origin == 0

    p = Steps()
    x, y = p.input(BIG), p.input(BIG)
    a = p.op("mul", x, Number(2.0))
    p.boundary(y)
    moved = p.boundary(a)
    out = p.op("add", a, moved)
    steps = grouped(p, out)
    check_order(p, steps)
    assert names(steps) == ["mul", "all_reduce", "all_reduce", "add"]


def test_waiting_does_not_keep_large_operands_alive_for_a_small_result() -> None:
    p = Steps()
    x, y, z = p.input(BIG), p.input(BIG), p.input(BIG)
    mask = p.op("greater", p.op("add", x, y), Number(0.0))      # a byte for two floats
    p.boundary(z)
    p.boundary(z)
    late = p.boundary(z)
    out = p.op("where", mask, late, Number(0.0))
    assert names(grouped(p, out)) == ["add greater", *["all_reduce"] * 3, "where"]
    p.external.remove(x)
    kept = group_steps(p.steps, p.types, p.dead(out, x, y), lambda chain: lambda: chain)
    assert names(kept) == [*["all_reduce"] * 3, "add greater where"]        # x and y stay anyway


def test_effects_without_results_keep_their_place_and_order() -> None:
    p = Steps()
    x = p.input(BIG)
    a = p.op("mul", x, Number(2.0))
    p.boundary(x, name="first", outputs=False)
    b = p.op("add", a, Number(1.0))
    p.boundary(x, name="second", outputs=False)
    out = p.op("exp", b)
    steps = grouped(p, out)
    check_order(p, steps)
    assert names(steps) == ["first", "second", "mul add exp"]


def test_two_chains_that_need_each_other_stay_apart() -> None:
    # A small tensor is made of a big one and read by the next one: one kernel for all would need itself.
    p = Steps()
    x = p.input(BIG)
    a = p.op("exp", x)
    total = p.op("sum", a, axis=None)
    small = p.op("sqrt", total)
    out = p.op("mul", a, small)
    steps = grouped(p, out)
    check_order(p, steps)
    assert names(steps) == ["exp sum", "sqrt", "mul"]


def test_reductions_end_chains() -> None:
    p = Steps()
    x, b = p.input((6, 4, 5)), p.input((5,))
    y = p.op("mul", x, b)
    rows, everything = p.op("mean", y, axis=-1, keepdims=True), p.op("max", y, axis=None)
    bias = p.op("sum_to", p.op("exp", x), shape=(5,))
    steps = grouped(p, rows, everything, bias)
    check_order(p, steps)
    maker = {slot: chain(step) for step in steps if step.call.kind == "fused" for slot in step.outs}
    assert maker[rows].reduced == (2,) and maker[bias].reduced == (0, 1)
    end, = maker[rows].ends
    assert (end.combine, end.divisor, end.shape) == ("sum", 5.0, (6, 4, 1))
    assert maker[bias].ends[0].shape == (5,) and everything not in maker


def test_reductions_over_the_same_axes_share_a_kernel_and_others_do_not() -> None:
    p = Steps()
    x = p.input(BIG)
    y = p.op("square", x)
    first, second, other = p.op("sum", y, axis=0), p.op("max", x, axis=0), p.op("sum", y, axis=1)
    steps = grouped(p, first, second, other)
    assert len(steps) == 2
    assert any({first, second} <= set(step.outs) for step in steps)
    assert all(other not in step.outs or first not in step.outs for step in steps)


def test_a_reduction_of_middle_axes_or_alone_stays_what_it_was() -> None:
    p = Steps()
    x = p.input((3, 4, 5))
    middle = p.op("sum", p.op("exp", x), axis=1)
    alone = p.op("sum", middle, axis=0)
    steps = grouped(p, alone)
    assert names(steps) == ["exp", "sum", "sum"] and steps[1:] == p.steps[1:]


def test_readers_of_one_array_share_a_kernel() -> None:
    p = Steps()
    g, x, y = p.input(BIG), p.input(BIG), p.input(BIG)
    outs = p.op("mul", g, x), p.op("mul", g, y), p.op("sum_to", g, shape=BIG[1:])
    step, = grouped(p, *outs)
    assert step.ins == (g, x, y) and step.outs == outs
    assert len(chain(step).links) == 2 and chain(step).ends[0].operand == 0


def test_broadcasting_happens_inside_a_chain_but_not_between_its_members() -> None:
    p = Steps()
    x, b = p.input(BIG), p.input(BIG[1:])
    scaled = p.op("exp", b)
    out = p.op("add", x, scaled)
    steps = grouped(p, out)
    assert names(steps) == ["exp", "add"] and chain(steps[1]).arrays[1][0] == BIG[1:]
    assert steps[1].call.over == ((0, 0),)


def test_complex_numbers_stay_with_the_plain_kernels() -> None:
    p = Steps()
    x = p.input((4,), "complex64")
    out = p.op("mul", x, x)
    assert grouped(p, out) == p.steps


def test_chains_do_not_grow_without_end() -> None:
    p = Steps()
    x = p.input((8,))
    for _ in range(3 * MOST_LINKS):
        x = p.op("add", x, Number(1.0))
    steps = grouped(p, x)
    check_order(p, steps)
    assert 3 <= len(steps) < 10
    p = Steps()
    total = p.input((8,))
    for _ in range(3 * MOST_ARRAYS):
        total = p.op("add", total, p.input((8,)))
    steps = grouped(p, total)
    check_order(p, steps)
    assert all(len(step.ins) + len(step.outs) <= MOST_ARRAYS for step in steps) and len(steps) < 10


def test_a_dead_result_that_nobody_reads_is_written_as_before() -> None:
    p = Steps()
    x = p.input((8,))
    unread = p.op("exp", x)
    out = p.op("mul", x, Number(2.0))
    step, = grouped(p, out)
    assert step.outs == (unread, out)


# --- random programs --------------------------------------------------------------------------------------

def interpreted(chain: Chain, operands: list[Any]) -> list[Any]:
    """What a chain is, by the plain kernels of its links."""
    values = list(operands)
    for link in chain.links:
        result = link.op.kernel(np, *(values[k] for k in link.operands), **link.attrs)
        values.append(np.asarray(result, link.dtype))
    found = [values[k] for k in chain.results]
    for end in chain.ends:
        total = getattr(np, end.combine)(values[end.operand].astype(end.total), axis=chain.reduced)
        total = total if end.divisor is None else total / end.divisor
        found.append(np.asarray(total, end.dtype).reshape(end.shape))
    assert all(value.shape == chain.shape for value in found[:len(chain.results)])
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(programs(60))
def test_random_programs_keep_their_meaning_and_their_order(made: tuple[Steps, list[int]]) -> None:
    program, kept = made
    rng = np.random.default_rng(1)
    values = {s: np.asarray(rng.normal(size=program.types[s][0]), np.float32) for s in program.external}
    wanted, slots = program.plain(values), dict(values)
    steps = group_steps(program.steps, {s: program.types[s] for s in program.external}, program.dead(*kept),
                        lambda chain: lambda *operands: interpreted(chain, list(operands)))
    check_order(program, steps)
    with np.errstate(all="ignore"):
        for call, ins, outs, _ in steps:
            args = [slots[s] if s >= 0 else program.scalars[-1 - s] for s in ins]
            result = call.function(*args) if call.op is None else [call.function(np, *args, **call.attrs)]
            results = [result] if call.kind == "collective" else result
            slots.update((s, np.asarray(x, d)) for s, x, d in zip(outs, results, call.dtypes, strict=True))
    assert set(kept) <= set(slots)
    for slot, value in slots.items():
        np.testing.assert_allclose(value, wanted[slot], rtol=1e-4, atol=1e-4)
