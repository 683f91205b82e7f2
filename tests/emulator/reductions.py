"""Reductions of the emulated CuPy, for the dtypes that CuPy has loops of, summed in the type that it sums in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from cupy._core import _routines_logic, _routines_math, _routines_statistics
from cupy._sorting import count

from emulator.array import ndarray, run, run_into

# CuPy's loops, by the dtype of the array, and where there is one, by the dtype that is asked for.
LOOPS = {
    "sum": (_routines_math.sum_auto_dtype, _routines_math._sum_keep_dtype),
    "prod": (_routines_math._prod_auto_dtype, _routines_math._prod_keep_dtype),
    "amax": (_routines_statistics.amax, None), "amin": (_routines_statistics.amin, None),
    "all": (_routines_logic.all, None), "any": (_routines_logic.any, None),
    "count_nonzero": (count._count_nonzero, None),
}
# Their loops cannot be asked for. CuPy's sources have none of bfloat16; some might take it in float32.
OTHERS = ("argmax", "argmin", "mean", "var", "std", "sort", "argsort", "argpartition", "partition", "lexsort",
          "searchsorted")


def loop(name: str, given: Any, dtype: Any) -> Any:
    """The loop of a reduction; raises TypeError where CuPy has none."""
    auto, keep = LOOPS[name]
    op = (auto._ops._guess_routine_from_in_types((given,)) if dtype is None or keep is None
          else keep._ops._guess_routine_from_dtype(np.dtype(dtype)))
    if op is None:
        raise TypeError(f"Wrong type ({dtype or given}) of arguments for {auto.name}")
    return op


def reduce(name: str, a: Any, axis: Any, dtype: Any, out: Any, keepdims: bool) -> Any:
    """numpy.<name> of a device array, by CuPy's loops."""
    if not isinstance(a, ndarray):
        raise TypeError(f"a cupy.ndarray is needed, got {type(a)}")
    op = loop(name, a.dtype, dtype)
    kind = np.dtype(op.out_types[0])
    inside = np.dtype(op.in_types[0])
    wide = np.dtype(np.float32) if inside.itemsize == 2 and inside.kind in "fV" else inside
    function: Callable[..., Any] = getattr(np, name)

    def compute(x: Any) -> Any:
        return np.asarray(function(x.astype(inside).astype(wide), axis=axis, keepdims=keepdims)).astype(kind)

    return finish(compute, a, out, kind)


def finish(compute: Callable[..., Any], a: ndarray, out: Any, kind: Any) -> Any:
    if out is None:
        return run(compute, a)
    shape = compute(np.ones(a.shape, a.dtype)).shape
    if not isinstance(out, ndarray):
        raise TypeError(f"out must be a cupy.ndarray, got {type(out)}")
    if out.shape != shape:
        raise ValueError(f"Out shape is mismatched: {out.shape} given, {shape} needed")
    if not np.can_cast(kind, out.dtype, "same_kind"):
        raise TypeError(f"output of {kind} does not go into {out.dtype}")
    run_into(lambda to, x: np.copyto(to, compute(x), casting="unsafe"), [out], out, a)
    return out


def sum(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return reduce("sum", a, axis, dtype, out, keepdims)


def prod(a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return reduce("prod", a, axis, dtype, out, keepdims)


def amax(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return reduce("amax", a, axis, None, out, keepdims)


def amin(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return reduce("amin", a, axis, None, out, keepdims)


def all(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return reduce("all", a, axis, None, out, keepdims)


def any(a: Any, axis: Any = None, out: Any = None, keepdims: bool = False) -> Any:
    return reduce("any", a, axis, None, out, keepdims)


def count_nonzero(a: Any, axis: Any = None) -> Any:
    return reduce("count_nonzero", a, axis, None, None, False)


def without_bfloat16(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that refuses bfloat16."""
    def called(a: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(a, ndarray) and a.dtype.kind == "V":
            raise TypeError(f"Wrong type (bfloat16) of arguments for cupy.{name}")
        return function(a, *args, **kwargs)

    return called


def scan(name: str) -> Callable[..., Any]:
    """cumsum or cumprod, which cast first; not in bfloat16."""
    function = getattr(np, name)

    def called(a: Any, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
        kind = np.dtype(dtype) if dtype is not None else function(np.ones(1, a.dtype)).dtype
        if kind.kind == "V":
            raise TypeError(f"Wrong type (bfloat16) of arguments for cupy.{name}")
        return finish(lambda x: function(x.astype(kind), axis), a, out, kind)

    return called


def table(functions: dict[str, Any]) -> dict[str, Any]:
    """These, and those of `functions` that CuPy does not have for bfloat16."""
    own = {"sum": sum, "prod": prod, "amax": amax, "amin": amin, "max": amax, "min": amin, "all": all,
           "any": any, "count_nonzero": count_nonzero, "cumsum": scan("cumsum"), "cumprod": scan("cumprod")}
    return own | {name: without_bfloat16(name, functions[name])
                  for name in OTHERS}
