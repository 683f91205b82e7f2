"""Fused kernels compute what the steps compute one by one, for every way in which arrays can lie."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from fused_programs import Number, Steps, programs, run_fused
from hypothesis import HealthCheck, given, settings
from nvrtc import compiled, ptx

from meshtape.runtime.cuda import fusion
from meshtape.runtime.cuda.fusion import fuse
from meshtape.runtime.cuda.source import text
from meshtape.runtime.dtypes import canonical

RNG = np.random.default_rng(0)
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 5e-6, "float64": 1e-13}


def values_for(program: Steps, low: float = -2.0, high: float = 2.0) -> dict[int, Any]:
    found = {}
    for slot in program.external:
        shape, dtype = program.types[slot]
        values = RNG.uniform(low, high, shape)
        found[slot] = np.asarray(values > 0 if dtype.kind == "b" else values, dtype)
    return found


def assert_close(got: Any, wanted: Any, what: str = "") -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, what
    tolerance = TOLERANCE.get(got.dtype.name, 0.0)
    np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), err_msg=what,
                               equal_nan=True, rtol=tolerance, atol=10 * tolerance)


def check(device: Any, program: Steps, *outs: int, values: dict[int, Any] | None = None) -> None:
    """The program as one fused step gives what it gives step by step."""
    given = values_for(program) if values is None else values
    fused, = fuse(program.steps, program.types, program.dead(*outs))
    assert fused.call.kind == "fused"
    wanted = program.plain(given)
    got = run_fused(device, [fused], given, program.scalars)
    for slot in outs:
        assert_close(got[slot], wanted[slot], f"slot {slot}")


# --- how arrays lie -----------------------------------------------------------------------------------------

def chain_of_six(program: Steps, x: int, y: int) -> int:
    a = program.op("mul", x, y)
    b = program.op("tanh", program.op("add", a, Number(0.25)))
    return program.op("sub", program.op("maximum", b, y), program.op("mul", a, b))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1023,), (4, 1024), (7, 3, 5), (0, 3)])
def test_contiguous_arrays(shape: tuple[int, ...], device: Any) -> None:
    p = Steps()
    check(device, p, chain_of_six(p, p.input(shape), p.input(shape)))


@pytest.mark.parametrize(("a", "b"), [
    ((6, 8), (8,)), ((6, 8), (6, 1)), ((5, 7), (7,)), ((6, 1), (1, 8)), ((4, 3, 8), (3, 1)), ((4, 3, 8), ()),
    ((2, 1, 3, 1), (4, 1, 8)), ((0, 3), (3,))])
def test_broadcasting(a: tuple[int, ...], b: tuple[int, ...], device: Any) -> None:
    p = Steps()
    x, y = p.input(a), p.input(b)
    product = p.op("mul", x, y)
    check(device, p, p.op("add", p.op("exp", product), y))


def test_strided_arrays(device: Any) -> None:
    def views(x: Any) -> list[Any]:
        return [x[:8, :16].T, x[2:10, 3:19].T, x[::-1, ::2][:8, :16].T, x[:8, 8:24].T]

    base = RNG.normal(size=(12, 40)).astype(np.float32)
    for k in range(4):
        p = Steps()
        x, y = p.input((16, 8)), p.input((16, 8))
        out = chain_of_six(p, x, y)
        fused, = fuse(p.steps, p.types, p.dead(out))
        mine, host = views(device.cp.asarray(base))[k], views(base)[k]
        other = RNG.normal(size=(16, 8)).astype(np.float32)
        got = run_fused(device, [fused], {x: mine, y: other}, p.scalars)[out]
        assert_close(got, p.plain({x: host, y: other})[out], f"view {k}")


def test_rows_of_a_wider_array_are_read_whole_where_they_are_aligned(device: Any) -> None:
    p = Steps()
    x, y = p.input((4, 8)), p.input((4, 8))
    out = p.op("mul", x, y)
    step, = fuse(p.steps, p.types, p.dead(out))
    wide = device.cp.asarray(RNG.normal(size=(4, 32)).astype(np.float32))
    narrow = device.cp.asarray(RNG.normal(size=(4, 9)).astype(np.float32))
    for first, word in ((wide[:, 8:16], "s1"), (narrow[:, :8], "su")):
        other = device.cp.asarray(RNG.normal(size=(4, 8)).astype(np.float32))
        got = step.call.function(device, first, other)
        assert list(step.call.function._launches.values())[-1].words == (word, "c")
        wanted = device.cp.asnumpy(first) * device.cp.asnumpy(other)
        np.testing.assert_array_equal(device.cp.asnumpy(got), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "float64"])
def test_results_do_not_depend_on_where_arrays_lie(dtype: str, device: Any) -> None:
    p = Steps()
    x = p.input((3, 64), dtype)
    y = p.op("mul", x, x)
    outs = y, p.op("sum", y, axis=1)
    step, = fuse(p.steps, p.types, p.dead(*outs))
    values = RNG.uniform(0, 9, 192).astype(dtype)
    aligned = device.cp.asarray(values).reshape(3, 64)
    room = device.cp.empty(193, dtype)
    room[1:] = aligned.reshape(192)
    first, second = (step.call.function(device, a) for a in (aligned, room[1:].reshape(3, 64)))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(device.cp.asnumpy(a), device.cp.asnumpy(b))


def test_indices_of_64_bits(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "INT_RANGE", 8)
    p = Steps()
    x, y = p.input((5, 12)), p.input((5, 1))
    a = p.op("mul", x, y)
    check(device, p, a, p.op("sum", a, axis=0))


def test_dtypes_of_different_widths_go_together(device: Any) -> None:
    p = Steps()
    x, half, mask = p.input((3, 50)), p.input((3, 50), "float16"), p.input((3, 50), "bool")
    wide = p.op("astype", p.op("add", p.op("where", mask, x, Number(0.0)), half), dtype="float64")
    positive = p.op("greater", wide, Number(0.5))
    small = p.op("astype", p.op("mul", wide, Number(10.0)), dtype="int8")
    check(device, p, wide, positive, small)


# --- out and reuse ----------------------------------------------------------------------------------------

def test_results_are_written_over_inputs(device: Any) -> None:
    p = Steps()
    x, y = p.input((5, 33)), p.input((5, 33))
    a = p.op("mul", x, y)
    b = p.op("sub", a, p.op("exp", x))
    step, = fuse(p.steps, p.types, p.dead(a, b))
    assert set(step.call.over) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    values = values_for(p)
    wanted = p.plain(values)
    first, second = (device.cp.asarray(values[s]) for s in (x, y))
    found = step.call.function(device, first, second, out=(second, first))
    assert found[0] is second and found[1] is first
    assert_close(device.cp.asnumpy(second), wanted[a])
    assert_close(device.cp.asnumpy(first), wanted[b])


def test_a_result_is_not_written_over_what_is_still_to_be_read(device: Any) -> None:
    p = Steps()
    x, y = p.input((6, 6)), p.input((6, 6))
    out = p.op("sub", x, y)
    step, = fuse(p.steps, p.types, p.dead(out))
    value = RNG.normal(size=(6, 6)).astype(np.float32)
    mine = device.cp.asarray(value)
    result = step.call.function(device, mine, mine.T, out=mine)
    assert result is mine
    np.testing.assert_array_equal(device.cp.asnumpy(mine), value - value.T)
    ragged = device.cp.asarray(np.zeros((6, 12), np.float32))[:, ::2]
    result = step.call.function(device, mine, mine, out=ragged)
    assert result is ragged and not device.cp.asnumpy(ragged).any()


def test_a_view_of_an_input_that_is_overwritten_is_read_as_it_was(device: Any) -> None:
    p = Steps()
    x, row = p.input((4, 8)), p.input((8,))
    out = p.op("add", x, row)
    step, = fuse(p.steps, p.types, p.dead(out))
    value = RNG.normal(size=(4, 8)).astype(np.float32)
    mine = device.cp.asarray(value)
    step.call.function(device, mine, mine[1], out=mine)
    np.testing.assert_array_equal(device.cp.asnumpy(mine), value + value[1])


# --- reductions -------------------------------------------------------------------------------------------

SHAPES = [((5, 7), 1), ((5, 7), 0), ((5, 7), None), ((3, 200), 1), ((200, 3), 0), ((2, 5000), 1),
          ((4, 3, 10), 2), ((4, 3, 10), (0, 1)), ((4, 3, 10), (1, 2)), ((1, 9), 1), ((9, 1), 0),
          ((700, 40), 0), ((40, 128), 0)]


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_reductions_of_a_chain(shape: tuple[int, ...], axis: Any, device: Any) -> None:
    p = Steps()
    x, y = p.input(shape), p.input(shape[-1:])
    a = p.op("mul", p.op("exp", x), y)
    outs = [a, p.op("sum", a, axis=axis), p.op("mean", a, axis=axis, keepdims=True),
            p.op("max", a, axis=axis), p.op("min", x, axis=axis)]
    check(device, p, *outs)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "uint64", "float16", "bfloat16",
                                   "float64"])
@pytest.mark.parametrize("axis", [0, 1])
def test_reductions_of_dtypes(dtype: str, axis: int, device: Any) -> None:
    p = Steps()
    x = p.input((40, 24), canonical(dtype))
    y = p.op("maximum", x, x)
    outs = [p.op("sum", y, axis=axis), p.op("max", y, axis=axis), p.op("min", y, axis=axis)]
    values = RNG.integers(0, 2 if dtype == "bool" else 90, (40, 24)).astype(canonical(dtype))
    if dtype == "bfloat16":     # ml_dtypes has no max and min of NumPy's
        outs = outs[:1]
    check(device, p, *outs, values={x: values})


def test_nan_wins_and_is_not_invented(device: Any) -> None:
    p = Steps()
    x = p.input((4, 70))
    y = p.op("mul", x, Number(1.0))
    outs = [p.op(name, y, axis=1) for name in ("max", "min", "sum")]
    value = RNG.normal(size=(4, 70)).astype(np.float32)
    value[0, 33] = np.nan
    value[1, :] = -np.inf
    value[2, 5], value[2, 9] = np.inf, -np.inf
    check(device, p, *outs, values={x: value})


@pytest.mark.parametrize(("shape", "axis"), [((0, 3), 0), ((3, 0), 1), ((0,), None), ((0, 3), 1),
                                             ((3, 0), 0)])
def test_reductions_of_nothing(shape: tuple[int, ...], axis: Any, device: Any) -> None:
    p = Steps()
    x = p.input(shape)
    y = p.op("exp", x)
    check(device, p, y, p.op("sum", y, axis=axis), p.op("mean", y, axis=axis))


def test_a_worker_without_elements_gives_the_identity_of_an_extreme(device: Any) -> None:
    # The shape rule refuses an empty tensor, but a worker may hold none of one.
    for dtype, least in (("float32", -np.inf), ("int16", -2**15), ("bool", False), ("uint8", 0)):
        p = Steps()
        x = p.input((1, 4), dtype)
        out = p.op("max", p.op("maximum", x, x), axis=0)
        p.types[x] = (0, 4), p.types[x][1]
        first = p.steps[0]
        p.steps[0] = first._replace(call=first.call._replace(shapes=((0, 4),)))
        step, = fuse(p.steps, {x: p.types[x]}, p.dead(out))
        got = device.cp.asnumpy(step.call.function(device, device.cp.empty((0, 4), dtype)))
        assert got.tolist() == [least] * 4 and got.dtype == dtype


@pytest.mark.parametrize("axis", [0, 1, None])
def test_reductions_in_parts_are_the_same_every_time(axis: int | None, device: Any,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "WARP_ROW", 16)
    p = Steps()
    x = p.input((2, 9000) if axis != 0 else (9000, 2))
    y = p.op("mul", x, Number(1.5))
    outs = [p.op("sum", y, axis=axis), p.op("mean", y, axis=axis), p.op("max", y, axis=axis)]
    fused, = fuse(p.steps, p.types, p.dead(*outs))
    values = values_for(p, 0.5, 2.0)
    first, second = (run_fused(device, [fused], values, p.scalars) for _ in range(2))
    wanted = p.plain(values)
    launch, = fused.call.function._launches.values()
    assert len(launch.partials) == 3
    for slot in outs:
        assert_close(first[slot], wanted[slot])
        assert first[slot].tobytes() == second[slot].tobytes()


def test_sums_of_many_floats_are_as_accurate_as_numpys(device: Any) -> None:
    p = Steps()
    x = p.input((30000,))
    out = p.op("sum", p.op("square", x), axis=None)
    value = RNG.normal(size=30000).astype(np.float32) + 10
    fused, = fuse(p.steps, p.types, p.dead(out))
    got = run_fused(device, [fused], {x: value}, [])[out]
    exact = float((value.astype(np.float64) ** 2).sum())
    assert abs(got - exact) / exact < 3e-7


# --- graphs -----------------------------------------------------------------------------------------------

def test_a_captured_chain_reads_new_numbers_when_it_is_replayed(device: Any) -> None:
    p = Steps()
    x = p.input((64,))
    y = p.op("mul", x, Number(2.0))
    outs = y, p.op("sum", y, axis=0)
    step, = fuse(p.steps, p.types, p.dead(*outs))
    cp = device.cp
    value, number = cp.asarray(np.arange(64, dtype=np.float32)), cp.asarray(np.array(2.0))
    plain = [cp.asnumpy(a) for a in step.call.function(device, value, number)]
    device.stream.begin_capture()
    captured = step.call.function(device, value, number)
    graph = device.stream.end_capture()
    graph.launch(device.stream)
    device.stream.synchronize()
    assert [cp.asnumpy(a).tobytes() for a in captured] == [a.tobytes() for a in plain]
    number[...] = 3.0
    graph.launch(device.stream)
    np.testing.assert_array_equal(cp.asnumpy(captured[0]), np.arange(64, dtype=np.float32) * 3)


# --- random programs --------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(programs(14))
def test_random_programs_give_what_their_steps_give(device: Any, made: tuple[Steps, list[int]]) -> None:
    program, kept = made
    values = values_for(program)
    fused = fuse(program.steps, {s: program.types[s] for s in program.external}, program.dead(*kept))
    wanted = program.plain(values)
    got = run_fused(device, fused, values, program.scalars)
    assert set(kept) <= set(got)
    for slot, value in got.items():
        np.testing.assert_allclose(value, wanted[slot], rtol=1e-4, atol=1e-4)


# --- sources ----------------------------------------------------------------------------------------------

def representative() -> list[Any]:
    """(name, program, *results): of shapes that are worth a device."""
    found = []
    for name in ("float32", "bfloat16", "float64", "int8"):
        p = Steps()
        x, y = (p.input((4096, 4096), canonical(name)) for _ in range(2))
        out = p.op("mul", p.op("add", x, y), x) if name == "int8" else chain_of_six(p, x, y)
        found.append((f"six {name}", p, out))
    p = Steps()
    found.append(("bias", p, chain_of_six(p, p.input((4096, 4096)), p.input((4096,)))))
    for axis in (0, 1, None):
        p = Steps()
        out = chain_of_six(p, p.input((4096, 4096)), p.input((4096, 1)))
        found.append((f"sum {axis}", p, p.op("sum", out, axis=axis)))
    for approximate in ("none", "tanh"):
        p = Steps()
        g, x = (p.input((4096, 4096), canonical("bfloat16")) for _ in range(2))
        slope = p.op("gelu_grad", g, x, approximate=approximate)
        found.append((f"bias {approximate}", p, slope, p.op("sum_to", slope, shape=(4096,))))
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", representative(), ids=lambda case: case[0])
def test_generated_sources_compile_without_spills(case: Any, arch: str) -> None:
    import emulator
    _, program, *outs = case
    step, = fuse(program.steps, program.types, program.dead(*outs))
    chain = step.call.function.chain
    strides = [contiguous(shape, dtype.itemsize) for shape, dtype in chain.arrays]
    launch = fusion.prepared(chain, strides, emulator.device())
    for fast in (0, 1):
        log = compiled(text(launch.source, {**launch.macros, "FAST": fast}), f"--gpu-architecture={arch}",
                       "--ptxas-options=-v")
        assert len(re.findall(r"Compiling entry function", log)) == len(launch.source.functions)
        assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}, log
        assert set(re.findall(r"(\d+) bytes stack frame", log)) == {"0"}, log


def test_products_are_not_contracted_and_division_and_roots_are_exact() -> None:
    import emulator
    p = Steps()
    x, y = p.input((4096,)), p.input((4096,))
    out = p.op("rsqrt", p.op("divide", p.op("add", p.op("mul", x, y), x), y))
    step, = fuse(p.steps, p.types, p.dead(out))
    launch = fusion.prepared(step.call.function.chain, ((4,), (4,)), emulator.device())
    made = ptx(text(launch.source, {**launch.macros, "FAST": 1}), "--gpu-architecture=compute_90")
    assert "fma" not in made and "approx" not in made
    found = set(re.findall(r"\w+\.(?:rn\.)?f32", made))
    assert {"mul.rn.f32", "add.f32", "div.rn.f32", "sqrt.rn.f32"} <= found
    assert "ld.global.v4" in made and "st.global.v4" in made


def contiguous(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    found = [itemsize]
    for n in reversed(shape[1:]):
        found.insert(0, found[0] * n)
    return tuple(found[:len(shape)])
