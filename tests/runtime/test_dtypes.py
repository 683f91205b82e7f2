"""Promotion, weak scalars, kinds, and the dtype rules that rows share."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import meshtape.runtime.ops  # noqa: F401  fills the table
from meshtape.runtime import dtypes
from meshtape.runtime.dtypes import canonical, floating, is_differentiable, is_floating, kind, promote
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import lookup

ALL = list(dtypes.NAMES.values())
ml_dtypes = pytest.importorskip("ml_dtypes")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# The Python Array API standard, "Type promotion rules": inside a kind, and between signed and unsigned.
STANDARD = {
    ("int8", "int16"): "int16", ("int8", "int64"): "int64", ("int32", "int64"): "int64",
    ("uint8", "uint16"): "uint16", ("uint32", "uint64"): "uint64", ("uint8", "int8"): "int16",
    ("uint8", "int16"): "int16", ("uint8", "int64"): "int64", ("uint16", "int8"): "int32",
    ("uint16", "int32"): "int32", ("uint32", "int8"): "int64", ("uint32", "int64"): "int64",
    ("float32", "float64"): "float64", ("float32", "complex64"): "complex64",
    ("float32", "complex128"): "complex128", ("float64", "complex64"): "complex128",
    ("complex64", "complex128"): "complex128", ("bool", "bool"): "bool",
}


@pytest.mark.parametrize("pair", STANDARD, ids="-".join)
def test_promotion_follows_the_array_api_standard(pair: tuple[str, str]) -> None:
    a, b = map(np.dtype, pair)
    assert promote(a, b) == promote(b, a) == STANDARD[pair]


def test_promotion_commutes_and_keeps_a_dtype_that_meets_itself() -> None:
    for a, b in itertools.product([*ALL, BFLOAT16], repeat=2):
        assert promote(a, b) == promote(b, a)
    for a in [*ALL, BFLOAT16]:
        assert promote(a) == promote(a, a) == a


def test_promotion_never_lowers_the_kind() -> None:
    for a, b in itertools.product([*ALL, BFLOAT16], repeat=2):
        assert kind(promote(a, b)) == max(kind(a), kind(b))


@pytest.mark.parametrize(("given", "met"), [
    (("int64", "float16"), "float16"), (("int32", "float32"), "float32"), (("bool", "float16"), "float16"),
    (("uint8", "complex64"), "complex64"), (("bool", "int8"), "int8"), (("int64", "bfloat16"), "bfloat16"),
    (("float16", "bfloat16"), "float32"), (("float32", "bfloat16"), "float32"), (("uint64", "int8"), "int64"),
    (("float64", "bfloat16"), "float64"),
])
def test_a_higher_kind_wins_with_its_own_width(given: tuple[str, str], met: str) -> None:
    assert promote(*map(canonical, given)).name == met


@pytest.mark.parametrize(("dtype", "scalar", "met"), [
    ("float16", float, "float16"), ("float32", float, "float32"), ("bfloat16", float, "bfloat16"),
    ("float32", int, "float32"), ("int8", int, "int8"), ("uint8", bool, "uint8"), ("bool", bool, "bool"),
    ("bool", int, "int64"), ("bool", float, "float32"), ("int64", float, "float32"),
    ("float32", complex, "complex64"), ("float64", complex, "complex128"), ("complex64", float, "complex64"),
])
def test_a_python_scalar_sets_the_kind_at_most(dtype: str, scalar: type, met: str) -> None:
    assert promote(canonical(dtype), scalar).name == met
    assert promote(scalar, canonical(dtype)).name == met


def test_no_python_scalar_makes_float64_of_something_else() -> None:
    for dtype, scalar in itertools.product([*ALL, BFLOAT16], (bool, int, float)):
        assert (promote(dtype, scalar) == np.float64) == (dtype == np.float64)


@pytest.mark.parametrize(("given", "met"), [
    (("int64",), "float32"), (("bool",), "float32"), (("int8", "uint8"), "float32"),
    (("float16",), "float16"),
    (("float64", "int32"), "float64"), (("complex64",), "complex64"),
])
def test_floating_makes_the_default_float_of_integers(given: tuple[str, ...], met: str) -> None:
    assert floating(*map(np.dtype, given)) == met
    assert floating(int) == floating(bool) == floating(float) == "float32"


def test_canonical_understands_names_types_and_python_types() -> None:
    assert canonical("float32") is canonical(np.float32) is canonical(float) is dtypes.float32
    assert canonical(int) is dtypes.int64 and canonical(bool) is dtypes.bool_
    assert canonical(complex) is dtypes.complex64
    assert canonical(">f4") == dtypes.float32 and canonical(">f4").isnative
    assert canonical("bfloat16") == canonical(ml_dtypes.bfloat16) == BFLOAT16


@pytest.mark.parametrize("unknown", ["float31", "object", "U3", "datetime64[s]", 3.5, object, None, "f4,i4"])
def test_canonical_refuses_what_no_worker_holds(unknown: Any) -> None:
    with pytest.raises(DTypeError, match="unknown; use one of"):
        canonical(unknown)


def test_kinds_of_bfloat16() -> None:
    assert kind(BFLOAT16) == 2 and is_floating(BFLOAT16) and is_differentiable(BFLOAT16)
    assert not is_differentiable(dtypes.int64) and is_differentiable(dtypes.complex64)


# --- rules of rows ------------------------------------------------------------------------------------------

def rule(op: str, *given: Any, **attrs: Any) -> str:
    row = lookup(op)
    dtypes_or_weak = [canonical(d) if isinstance(d, str) else d for d in given]
    _, (out,) = row.dtype(*dtypes_or_weak, **row.unpack(row.pack(attrs)))
    return str(np.dtype(out).name)


@pytest.mark.parametrize(("op", "given", "out"), [
    ("add", ("int32", "int64"), "int64"), ("add", ("bool", "bool"), "bool"),
    ("add", ("int32", float), "float32"),
    ("divide", ("int64", "int64"), "float32"), ("divide", ("float64", "int8"), "float64"),
    ("floor_divide", ("int8", "int8"), "int8"), ("exp", ("int8",), "float32"),
    ("sqrt", ("float16",), "float16"),
    ("equal", ("float32", "int64"), "bool"), ("maximum", ("int16", "uint8"), "int16"),
    ("abs", ("complex64",), "float32"), ("real", ("complex128",), "float64"),
    ("sigmoid", ("bool",), "float32"),
    ("where", ("bool", "float16", float), "float16"), ("where", ("int64", "int8", "int16"), "int16"),
    ("bitwise_and", ("bool", "bool"), "bool"), ("round", ("int32",), "int32"), ("relu", ("int8",), "int8"),
    ("sum", ("bool",), "int64"), ("sum", ("int8",), "int64"), ("sum", ("uint8",), "uint64"),
    ("sum", ("float16",), "float16"), ("mean", ("int64",), "float32"), ("mean", ("bfloat16",), "bfloat16"),
    ("max", ("uint8",), "uint8"), ("argmax", ("float32",), "int64"), ("any", ("float32",), "bool"),
    ("count_nonzero", ("float32",), "int64"), ("logsumexp", ("float16",), "float16"),
])
def test_output_dtype(op: str, given: tuple[Any, ...], out: str) -> None:
    assert rule(op, *given) == out


def test_attributes_set_the_output_dtype() -> None:
    assert rule("sum", "float32", dtype="float64") == "float64"
    assert rule("astype", "float32", dtype="bfloat16") == "bfloat16"


@pytest.mark.parametrize(("op", "given"), [
    ("sub", ("bool", "bool")), ("negative", ("bool",)), ("pow", ("bool", "bool")), ("floor", ("complex64",)),
    ("less", ("complex64", "float32")), ("maximum", ("complex64", "complex64")),
    ("bitwise_or", ("float32", "int32")),
    ("bitwise_invert", ("float32",)), ("atan2", ("complex64", "complex64")), ("relu", ("complex64",)),
    ("remainder", ("bool", "bool")), ("max", ("complex64",)), ("argmin", ("complex64",)),
])
def test_a_refused_kind_is_named_with_what_is_taken(op: str, given: tuple[str, ...]) -> None:
    with pytest.raises(DTypeError, match=rf"{op} takes .* tensors, got .*; cast with astype first"):
        rule(op, *given)
