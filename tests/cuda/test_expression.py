"""Every pointwise row, translated to C++, computes what its plain kernel computes.

Many rows go into one program, which becomes few kernels: what takes time here is the compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fused_programs import Number, Steps, run_fused
from table import samples

import meshtape.runtime.ops  # noqa: F401  fills the op table
from meshtape.runtime.cuda.expression import link_text, number_text
from meshtape.runtime.cuda.fusion import fuse
from meshtape.runtime.dtypes import canonical
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import TABLE, Op

ROWS = [op for op in TABLE.values() if op.elementwise is not None]
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
REALS = ["float16", "bfloat16", "float32", "float64"]
every_dtype = pytest.mark.parametrize("dtype", ["bool", *INTEGERS, *REALS])
# How far functions of CUDA (CUDA C++ Programming Guide, tables) and NumPy's may lie apart, and results
# so small that they may be rounded to 0.
RELATIVE = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6, "float64": 4e-15}
SMALLEST = {"float16": 1e-6, "bfloat16": 1e-37, "float32": 1e-37, "float64": 1e-307}


def odd_values(dtype: Any) -> np.ndarray[Any, Any]:
    """Values of a dtype at which things go wrong, and some at which they should not."""
    rng = np.random.default_rng(2)
    if dtype == np.bool_:
        return np.array([False, True, True, False])
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        edges = [0, 1, 2, 3, 7, info.max, info.min, info.max - 1, info.max // 2 + 1, -1 if info.min else 5]
        return np.array([*edges, *rng.integers(-9 if info.min else 0, 10, 4)], dtype)
    info = np.finfo(np.float32 if dtype.name == "bfloat16" else dtype)
    tiny = 1e-40 if dtype.name == "bfloat16" else float(info.smallest_subnormal)
    large = float(info.max) / 4
    edges = [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1.5, 3.0, np.inf, -np.inf, np.nan, tiny, -tiny,
             float(info.tiny), large, -large, 10.0, 88.0, 0.999]
    return np.array([*edges, *rng.normal(size=6)]).astype(dtype)


def assert_close(got: Any, wanted: Any, what: str) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, what
    if got.dtype == np.bool_ or got.dtype.kind in "iu":
        np.testing.assert_array_equal(got, wanted, what)
        return
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(
            got.astype(np.float64), wanted.astype(np.float64), err_msg=what, equal_nan=True,
            rtol=RELATIVE[got.dtype.name], atol=SMALLEST[got.dtype.name])


def check(device: Any, program: Steps, values: dict[int, Any], results: dict[int, str]) -> None:
    """Fused, the program gives what it gives step by step; every step is fused."""
    fused = fuse(program.steps, program.types, program.dead(*results))
    assert all(step.call.kind == "fused" for step in fused)
    wanted = program.plain(values)
    got = run_fused(device, fused, values, program.scalars)
    for slot, what in results.items():
        assert_close(got[slot], wanted[slot], what)


def takes(op: Op, dtype: Any) -> bool:
    sample = samples(op)[0]
    try:
        casts, _ = op.dtype(*(dtype,) * len(sample.inputs), **op.unpack(op.pack(sample.attrs)))
    except DTypeError:
        return False
    return casts[-1] == dtype


@every_dtype
def test_rows_take_odd_values_as_their_plain_kernels_do(dtype: str, device: Any) -> None:
    kind, rng = canonical(dtype), np.random.default_rng(5)
    x, y = (g.ravel() for g in np.meshgrid(odd_values(kind), odd_values(kind), indexing="ij"))
    program = Steps()
    given = [x, y, rng.permutation(x)]
    slots = [program.input(a.shape, kind) for a in given]
    condition, exponent = program.input(x.shape, "bool"), program.input(x.shape, kind)
    integers = kind.kind in "iu"
    values = {**dict(zip(slots, given, strict=True)), condition: rng.random(x.size) < 0.5,
              exponent: (y % 9).astype(kind) if integers else y}
    results = {}
    for op in (op for op in ROWS if takes(op, kind)):
        count = len(samples(op)[0].inputs)
        operands = [condition, *slots][:3] if op.name == "where" else slots[:count]
        if op.name == "pow":
            operands = [slots[0], exponent]
        results[program.op(op.name, *operands, **samples(op)[0].attrs)] = f"{op.name} of {dtype}"
    check(device, program, values, results)


@every_dtype
def test_casts_are_numpys(dtype: str, device: Any) -> None:
    kind = canonical(dtype)
    values = odd_values(kind)
    if kind.kind not in "biu":      # beyond an integer's range a cast is undefined
        wide = np.abs(values.astype(np.float64))
        values = values[wide < 100]
    program = Steps()
    x = program.input(values.shape, kind)
    real = kind.kind not in "biu"
    results = {program.op("astype", x, dtype=target): f"{dtype} to {target}"
               for target in ("bool", *INTEGERS, *REALS) if not (real and target.startswith("uint"))}
    check(device, program, {x: values}, results)


def test_negative_floats_wrap_when_they_become_unsigned(device: Any) -> None:
    program = Steps()
    x = program.input((3,))
    results = {program.op("astype", x, dtype=f"uint{bits}"): bits for bits in (8, 16, 32, 64)}
    got = run_fused(device, fuse(program.steps, program.types, program.dead(*results)),
                    {x: np.array([-1.0, 2.9, -3.5], np.float32)}, [])
    for slot, bits in results.items():
        assert got[slot].tolist() == [2**bits - 1, 2, 2**bits - 3]


@pytest.mark.parametrize("dtype", ["int64", "int16", "uint8", "float16", "bfloat16", "float32", "float64"])
def test_python_numbers_take_part_in_the_dtype_of_the_array(dtype: str, device: Any) -> None:
    kind = canonical(dtype)
    program = Steps()
    x = program.input((9,), kind)
    results = {}
    for number in (2, 3) if kind.kind in "iu" else (2, 0.1):
        for name in ("add", "mul", "maximum", "less", "equal", "pow", "clip_min"):
            results[program.op(name, x, Number(number))] = f"{name}({dtype}, {number})"
        results[program.op("sub", Number(number), x)] = f"sub({number}, {dtype})"
    check(device, program, {x: np.arange(9).astype(kind)}, results)


def test_small_integers_are_compared_with_numbers_beyond_their_range(device: Any) -> None:
    program = Steps()
    x = program.input((3,), "uint8")
    results = {program.op(name, x, Number(number)): f"{name} {number}"
               for name, number in (("less", 300), ("equal", 256), ("greater", -1), ("not_equal", 100))}
    check(device, program, {x: np.array([0, 100, 255], np.uint8)}, results)


def test_two_numbers_chosen_by_a_condition_have_the_default_dtype(device: Any) -> None:
    program = Steps()
    c = program.input((2,), "bool")
    out = program.op("where", c, Number(1.5), Number(-2.0))
    check(device, program, {c: np.array([True, False])}, {out: "where"})
    assert program.types[out][1] == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_chains_of_16_bit_floats_are_rounded_once(dtype: str, device: Any) -> None:
    kind = canonical(dtype)
    program = Steps()
    x, y = program.input((200,), kind), program.input((200,), kind)
    out = program.op("sub", program.op("silu", program.op("mul", x, y)), program.op("leaky_relu", x))
    rng = np.random.default_rng(0)
    values = {s: rng.normal(size=200).astype(kind) for s in (x, y)}
    fused, = fuse(program.steps, program.types, program.dead(out))
    a, b = (values[s].astype(np.float64) for s in (x, y))
    wanted = a * b / (1 + np.exp(-a * b)) - np.where(a > 0, a, a * 0.01)
    got = run_fused(device, [fused], values, [])[out].astype(np.float64)
    unit = 2.0 ** -11 if dtype == "float16" else 2.0 ** -8
    np.testing.assert_allclose(got, wanted, rtol=unit * 1.01, atol=1e-6)


def test_a_result_that_others_read_is_read_rounded_in_its_own_chain_too(device: Any) -> None:
    kind = canonical("bfloat16")
    program = Steps()
    x = program.input((50,), kind)
    third = program.op("mul", x, Number(1 / 3))
    out = program.op("sub", program.op("mul", third, Number(3.0)), x)
    value = np.linspace(1, 2, 50).astype(kind)
    fused, = fuse(program.steps, program.types, program.dead(third, out))
    got = run_fused(device, [fused], {x: value}, program.scalars)
    wanted = (got[third].astype(np.float32) * 3 - value.astype(np.float32)).astype(kind)
    np.testing.assert_array_equal(got[out], wanted)
    assert got[out].any()


def test_constants_are_exact_in_their_dtype() -> None:
    assert number_text(0.1, np.dtype("float32")) == "0.10000000149011612f"
    assert number_text(1, np.dtype("float64")) == "1.0"
    assert number_text(0.1, np.dtype("float16")) == "0.10000000149011612f"
    assert number_text(1e300, np.dtype("float32")) == "infinity<float>()"
    assert number_text(-float("inf"), np.dtype("float64")) == "(-infinity<double>())"
    assert number_text(3, np.dtype("uint8")) == "uint8(3)"
    assert number_text(True, np.dtype("bool")) == "bool(true)"


def test_an_expression_that_cpp_does_not_share_is_refused() -> None:
    real = np.dtype("float32")
    odd = Op("odd", lambda xp, x: x, lambda x: [x], lambda x: ((x,), (x,)), elementwise="x ** 2")
    with pytest.raises(NotImplementedError, match=r"odd: x \*\* 2 has no counterpart"):
        link_text(odd, {}, ["v0"], [real], real)
