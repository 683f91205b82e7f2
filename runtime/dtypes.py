"""Dtypes by name, promotion, and the default float.

Promotion follows the Python Array API standard inside a kind (int32 + int64 -> int64). Where the standard is
silent, between kinds, the higher kind wins with its own width (int64 + float16 -> float16), as in PyTorch.
Python scalars are weak: they set the kind at most, never the width. In the rules of the op table a weak
scalar is stood for by its Python type (`float`, `int`, `bool`, `complex`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from meshtape.runtime.errors import DTypeError

bool_ = np.dtype(np.bool_)
int8, int16, int32, int64 = (np.dtype(f"int{n}") for n in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (np.dtype(f"uint{n}") for n in (8, 16, 32, 64))
float16, float32, float64 = (np.dtype(f"float{n}") for n in (16, 32, 64))
complex64, complex128 = np.dtype("complex64"), np.dtype("complex128")

DEFAULT_FLOAT = float32
DEFAULT_INT = int64

NAMES = {d.name: d for d in (bool_, int8, int16, int32, int64, uint8, uint16, uint32, uint64,
                             float16, float32, float64, complex64, complex128)}
_KIND = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}
_WEAK = {bool: (0, bool_), int: (1, DEFAULT_INT), float: (2, DEFAULT_FLOAT), complex: (3, complex64)}

AnyDType = Any


def canonical(dtype: AnyDType) -> np.dtype[Any]:
    """The one np.dtype object that `dtype` (a name, a NumPy type, bool/int/float, bfloat16) stands for.

    Raises DTypeError for what no worker can hold, None among it (NumPy would take it for float64).
    """
    if dtype is float:
        return DEFAULT_FLOAT
    if dtype is int:
        return DEFAULT_INT
    if dtype is complex:
        return complex64
    if isinstance(dtype, str) and dtype == "bfloat16":
        return bfloat16()
    try:
        name = "" if dtype is None else np.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in NAMES and name != "bfloat16":
        raise DTypeError(f"dtype {dtype!r} is unknown; use one of {', '.join(NAMES)}, bfloat16")
    return bfloat16() if name == "bfloat16" else NAMES[name]


@lru_cache(maxsize=1)
def bfloat16() -> np.dtype[Any]:
    """ml_dtypes' bfloat16 (installed with the cuda extras)."""
    try:
        from ml_dtypes import bfloat16 as found
    except ImportError as error:
        raise DTypeError("dtype bfloat16 needs the package ml_dtypes: pip install ml_dtypes") from error
    dtype: np.dtype[Any] = np.dtype(found)
    return dtype


def kind(dtype: AnyDType) -> int:
    """0 bool, 1 integer, 2 floating, 3 complex. bfloat16 is told by name: its NumPy kind is 'V'."""
    if isinstance(dtype, type):
        return _WEAK[dtype][0]
    return 2 if dtype.name == "bfloat16" else _KIND[dtype.kind]


def is_floating(dtype: AnyDType) -> bool:
    return kind(dtype) == 2


def is_differentiable(dtype: AnyDType) -> bool:
    return kind(dtype) >= 2


@lru_cache(maxsize=4096)
def promote(*given: AnyDType) -> np.dtype[Any]:
    """The dtype in which arrays of the given dtypes (and weak scalars, as Python types) meet."""
    strong = [d for d in given if not isinstance(d, type)]
    top = max((kind(d) for d in strong), default=-1)
    weak = max((_WEAK[d] for d in given if isinstance(d, type)), default=(-1, bool_), key=lambda w: w[0])
    if weak[0] > top:
        if weak[0] == 3 and float64 in strong:
            return complex128
        return weak[1]
    out: np.dtype[Any] | None = None
    for d in strong:
        if kind(d) == top:
            out = d if out is None else _meet(out, d)
    if top == 3 and float64 in strong:
        return complex128
    assert out is not None
    return out


def _meet(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    if a == b:
        return a
    if "bfloat16" in (a.name, b.name):
        other = b if a.name == "bfloat16" else a
        return float32 if other == float16 else other
    met = np.promote_types(a, b)
    return int64 if met.kind == "f" and a.kind in "iu" else met


def widens(source: AnyDType, target: AnyDType) -> bool:
    """Whether every value of the floating (or complex) dtype `source` is one of `target`, a wider one."""
    return kind(target) >= kind(source) >= 2 and bool(source.itemsize < target.itemsize)


def floating(*given: AnyDType) -> np.dtype[Any]:
    """Like promote, but integers and booleans become the default float."""
    found = promote(*given)
    return found if kind(found) >= 2 else DEFAULT_FLOAT
