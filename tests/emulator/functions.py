"""Functions of the emulated CuPy: those of NumPy that the installed CuPy also has, with CuPy's signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cupy as real
import numpy as np

from emulator import streams
from emulator.array import Capsule, arrays_in, dtype_of, from_host, ndarray, plain, run, run_into
from emulator.ufuncs import CLIP, WHERE

# What only looks at shapes and dtypes, and gives a value of Python.
ABOUT = ("can_cast", "promote_types", "result_type", "issubdtype", "isscalar", "iscomplexobj", "isrealobj",
         "broadcast_shapes", "ndim", "size", "shape", "may_share_memory", "shares_memory", "min_scalar_type",
         "common_type", "isfortran", "iterable", "index_exp")

# What waits for the device, since the shape of its result depends on values.
WAITS = ("nonzero", "argwhere", "flatnonzero", "unique", "unique_all", "unique_counts", "unique_inverse",
         "unique_values", "extract", "compress", "setdiff1d", "intersect1d", "union1d", "setxor1d", "in1d",
         "bincount", "histogram", "trim_zeros", "place", "delete", "array_equal", "allclose", "isin",
         "sort", "argsort", "lexsort", "argpartition", "partition", "msort",  # thrust waits for its stream
         "array_repr", "array_str", "median", "percentile", "quantile", "choose", "interp", "digitize",
         "array2string")

# Products that CuPy gives to cuBLAS, which it refuses inside a capture.
PRODUCTS = ("dot", "vdot", "inner", "tensordot", "einsum")

# Written by hand below.
OWN: dict[str, Callable[..., Any]] = {}


def own(function: Callable[..., Any]) -> Callable[..., Any]:
    OWN[function.__name__.rstrip("_")] = function
    return function


def wrap(name: str) -> Callable[..., Any]:
    """NumPy's function `name` for device arrays, called as CuPy's is."""
    numpy, cupys = getattr(np, name), getattr(real, name)
    try:
        signature: inspect.Signature | None = inspect.signature(cupys)
    except (TypeError, ValueError):
        signature = None

    def called(*args: Any, **kwargs: Any) -> Any:
        if signature is not None:
            signature.bind(*args, **kwargs)
        if name in ABOUT:
            return numpy(*(host_like(a) for a in args), **{k: host_like(v) for k, v in kwargs.items()})
        if name in WAITS:
            streams.synchronises(f"cupy.{name}")
        if name in PRODUCTS:
            streams.forbidden(f"cupy.{name} by CuPy's cuBLAS")
        if kwargs.get("dtype") is not None:
            dtype_of(kwargs["dtype"])
        out = kwargs.pop("out", None)
        if out is None and signature is not None and "out" in signature.parameters:
            bound = signature.bind(*args, **kwargs)
            out = bound.arguments.get("out")
            if out is not None:
                args = tuple(a for a in args if a is not out)
        if out is not None:
            return into(numpy, out, args, kwargs)
        return run(numpy, *args, **kwargs)

    called.__name__ = name
    return called


def into(function: Callable[..., Any], out: Any, args: Any, kwargs: Any) -> Any:
    if not isinstance(out, ndarray):
        raise TypeError(f"out must be a cupy.ndarray, got {type(out)}")
    def write(to: Any, *a: Any, **k: Any) -> None:
        np.copyto(to, function(*a, **k), casting="unsafe")

    run_into(write, [out], out, *args, **kwargs)
    return out


def host_like(x: Any) -> Any:
    return plain(x) if arrays_in(x) else x


# --- making arrays --------------------------------------------------------------------------------------

@own
def array(obj: Any, dtype: Any = None, copy: bool = True, order: str = "K", subok: bool = False,
          ndmin: int = 0, *, blocking: bool = False) -> ndarray:
    if isinstance(obj, ndarray):
        fits = (dtype is None or obj.dtype == np.dtype(dtype)) and obj.ndim >= ndmin
        if not copy and fits and (order in ("K", "A", None) or (order == "C" and obj.flags.c_contiguous)):
            return obj
        kind = obj.dtype if dtype is None else dtype_of(dtype)
        return run(lambda a: np.array(a, kind, order=order, ndmin=ndmin), obj)
    inside = arrays_in(obj)
    if inside:
        shaped = [getattr(o, "shape", None) for o in inside]
        if len(set(shaped)) > 1 and not isinstance(obj, (list, tuple)):
            raise ValueError("inhomogeneous arrays")
        return run(lambda *a: np.array(plain(obj), dtype, ndmin=ndmin), *inside)
    if np.asarray(obj, dtype).ndim < ndmin:
        obj = np.array(obj, dtype, ndmin=ndmin)
    return from_host(obj, dtype, order)


@own
def asarray(a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None,
            blocking: bool = False) -> ndarray:
    return array(a, dtype, copy=bool(copy), order=order or "K", blocking=blocking)


@own
def asanyarray(a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None,
               blocking: bool = False) -> ndarray:
    return asarray(a, dtype, order, copy=copy, blocking=blocking)


@own
def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    if isinstance(a, ndarray) and a.flags.c_contiguous and dtype in (None, a.dtype) and a.ndim:
        return a
    if not isinstance(a, ndarray):
        a = array(a, dtype)
    return run(lambda x: np.array(x, dtype, order="C", ndmin=1), a)


@own
def asfortranarray(a: Any, dtype: Any = None) -> ndarray:
    if isinstance(a, ndarray) and a.flags.f_contiguous and dtype in (None, a.dtype):
        return a
    return run(lambda x: np.array(x, dtype, order="F"), a)


@own
def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> Any:
    if isinstance(a, ndarray):
        return a.get(stream, order, out, blocking)
    return np.asarray(a, order=order)  # type: ignore[call-overload]


@own
def copy_(a: Any, order: str = "K") -> ndarray:
    return array(a, order=order)


@own
def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return ndarray(shape, dtype, order=order)


def _like(a: Any, dtype: Any, order: str, shape: Any) -> ndarray:
    if not isinstance(a, ndarray):
        raise TypeError(f"a device array is needed, got {type(a)}")
    probe = np.empty_like(a._a, dtype=None if dtype is None else dtype_of(dtype), order=order, shape=shape)
    if probe.flags.c_contiguous or probe.flags.f_contiguous or not probe.size:
        return ndarray(probe.shape, probe.dtype, order="C" if probe.flags.c_contiguous else "F")
    return ndarray(probe.shape, probe.dtype, strides=probe.strides)


@own
def empty_like(prototype: Any, dtype: Any = None, order: str = "K", subok: Any = None,
               shape: Any = None) -> ndarray:
    return _like(prototype, dtype, order, shape)


@own
def zeros(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 0, dtype, order)


@own
def zeros_like(a: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    return full_like(a, 0, dtype, order, subok, shape)


@own
def ones(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return full(shape, 1, dtype, order)


@own
def ones_like(a: Any, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None) -> ndarray:
    return full_like(a, 1, dtype, order, subok, shape)


@own
def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> ndarray:
    if dtype is None:
        dtype = fill_value.dtype if isinstance(fill_value, ndarray) else np.asarray(fill_value).dtype
    new = ndarray(shape, dtype, order=order)
    _fill(new, fill_value)
    return new


@own
def full_like(a: Any, fill_value: Any, dtype: Any = None, order: str = "K", subok: Any = None,
              shape: Any = None) -> ndarray:
    new = _like(a, dtype, order, shape)
    _fill(new, fill_value)
    return new


def _fill(new: ndarray, value: Any) -> None:
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    run_into(lambda to, v: np.copyto(to, v, casting="unsafe"), [new], new, value)


@own
def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> ndarray:
    for x in (start, stop, step):
        if isinstance(x, (ndarray, np.ndarray)):
            raise TypeError(f"Unsupported type {type(x)}: cupy.arange takes numbers of Python")
    first, last = (0, start) if stop is None else (start, stop)
    return run(lambda: np.arange(first, last, step, dtype))


@own
def copyto(dst: Any, src: Any, casting: str = "same_kind", where: Any = None) -> None:
    if isinstance(src, np.ndarray) or isinstance(where, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    kind = src.dtype if hasattr(src, "dtype") else type(src)
    if not isinstance(src, (int, float, complex, bool)) and not np.can_cast(kind, dst.dtype, casting):  # type: ignore
        raise TypeError(f"Cannot cast {kind} to {dst.dtype} in {casting} casting mode")
    keep = True if where is None else where
    run_into(lambda to, v, w: np.copyto(to, v, casting="unsafe", where=w), [dst], dst, src, keep)


@own
def from_dlpack(x: Any, *, device: Any = None, copy: Any = None) -> ndarray:
    capsule = x.__dlpack__() if hasattr(x, "__dlpack__") else x
    if not isinstance(capsule, Capsule):
        raise TypeError(f"from_dlpack: the emulation only takes its own arrays, got {type(x)}")
    return ndarray._view(capsule.array._a, capsule.array)


@own
def where_(condition: Any, x: Any = None, y: Any = None) -> Any:
    if (x is None) != (y is None):
        raise ValueError("Must provide both 'x' and 'y' or neither.")
    if x is None:
        streams.synchronises("cupy.where of one argument")
        return run(np.nonzero, condition)
    if not isinstance(condition, ndarray):
        raise AttributeError(f"{type(condition).__name__!r} object has no attribute 'astype'")
    return WHERE(condition.astype("?", copy=False), x, y)


@own
def clip(a: Any, a_min: Any, a_max: Any, out: Any = None) -> Any:
    kind = a.dtype.kind
    if a_min is None and kind in "fiu":
        a_min = -np.inf if kind == "f" else np.iinfo(a.dtype).min
    if a_max is None and kind in "fiu":
        a_max = np.inf if kind == "f" else np.iinfo(a.dtype).max
    return CLIP(a, a_min, a_max, out=out)


@own
def tril(m: Any, k: int = 0) -> Any:
    m = asarray(m)
    mask = run(lambda: np.tri(*m.shape[-2:], k=k, dtype=bool))
    return where_(mask, m, m.dtype.type(0))


@own
def triu(m: Any, k: int = 0) -> Any:
    m = asarray(m)
    mask = run(lambda: np.tri(*m.shape[-2:], k=k - 1, dtype=bool))
    return where_(mask, m.dtype.type(0), m)


@own
def around(a: Any, decimals: int = 0, out: Any = None) -> Any:
    """In half precision for booleans, in float32 for bfloat16: CuPy has no other loops for them."""
    kind = np.dtype({"b": np.float16, "V": np.float32}.get(a.dtype.kind, a.dtype))
    return run(lambda x: np.round(x.astype(kind), decimals), a) if out is None else into(
        lambda x: np.round(x.astype(kind), decimals), out, (a,), {})


OWN["round"] = around


@own
def matmul(x1: Any, x2: Any, /, out: Any = None, **kwargs: Any) -> Any:
    streams.forbidden("cupy.matmul by CuPy's cuBLAS")
    if max(x1.ndim, x2.ndim) > 2 and "V" in (x1.dtype.kind, x2.dtype.kind):
        raise TypeError("batched products of bfloat16 fail in CuPy")
    return run(np.matmul, x1, x2) if out is None else into(np.matmul, out, (x1, x2), {})


@own
def take(a: Any, indices: Any, axis: Any = None, out: Any = None) -> Any:
    if not isinstance(indices, ndarray):
        if not np.isscalar(indices):
            streams.forbidden("cupy.take with indices of the host")
        indices_ = np.asarray(indices)
    else:
        indices_ = indices._a

    def taken(x: Any, *_: Any) -> Any:
        return np.take(x, indices_, axis, mode="wrap")

    operands = (a, indices) if isinstance(indices, ndarray) else (a,)
    return run(taken, *operands) if out is None else into(taken, out, operands, {})


@own
def put_along_axis(arr: Any, indices: Any, values: Any, axis: Any) -> None:
    if not isinstance(indices, ndarray) or indices.dtype.kind not in "iu":
        raise IndexError("`indices` must be an integer array")
    if arr.ndim != indices.ndim:
        raise ValueError("`indices` and `arr` must have the same number of dimensions")
    kept = arr.shape[axis] if arr.ndim else 1

    def put(to: Any, i: Any, v: Any) -> None:
        np.put_along_axis(to, i % kept if kept else i, v, axis)

    run_into(put, [arr], arr, indices, values)


@own
def take_along_axis(a: Any, indices: Any, axis: Any = None) -> Any:
    if not isinstance(indices, ndarray) or indices.dtype.kind not in "iu":
        raise IndexError("`indices` must be an integer array")
    if axis is not None and a.ndim != indices.ndim:
        raise ValueError("`indices` and `a` must have the same number of dimensions")
    kept = a.size if axis is None else a.shape[axis]
    return run(lambda x, i: np.take_along_axis(x, i % kept if kept else i, axis), a, indices)


def _unsupported(name: str) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the emulation has no cupy.{name}")
    return called


for _name in ("put", "putmask", "place", "fill_diagonal", "apply_along_axis", "apply_over_axes", "piecewise",
              "vectorize", "fromfunction", "frombuffer", "fromiter", "fromstring", "fromfile", "load",
              "save"):
    OWN[_name] = _unsupported(_name)


@own
def get_array_module(*args: Any) -> Any:
    from emulator import libraries
    return libraries().cupy if any(isinstance(a, ndarray) for a in args) else np


def table() -> dict[str, Any]:
    """All public names."""
    found: dict[str, Any] = {}
    for name in dir(real):
        there = getattr(real, name)
        if name.startswith("_") or inspect.ismodule(there):
            continue
        if name in OWN:
            found[name] = OWN[name]
        elif isinstance(there, type) or not callable(there):
            if getattr(there, "__module__", "").startswith("cupy"):
                continue
            found[name] = there
        elif name in real.__dict__ and hasattr(np, name) and type(there).__name__ != "ufunc":
            found[name] = there if there is getattr(np, name) else wrap(name)
    return found


def lib() -> Any:
    """cupy.lib."""
    def as_strided(x: Any, shape: Any = None, strides: Any = None) -> ndarray:
        shape = x.shape if shape is None else tuple(shape)
        strides = x.strides if strides is None else tuple(strides)
        return ndarray._view(np.lib.stride_tricks.as_strided(x._a, shape, strides), x)

    def sliding_window_view(x: Any, window_shape: Any, axis: Any = None, *, subok: bool = False,
                            writeable: bool = False) -> ndarray:
        return ndarray._view(np.lib.stride_tricks.sliding_window_view(x._a, window_shape, axis), x)

    return SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=as_strided,
                                                         sliding_window_view=sliding_window_view))
