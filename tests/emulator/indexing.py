"""Reading and writing parts of device arrays, with CuPy's rules: indices out of range wrap around."""

from __future__ import annotations

from typing import Any

import numpy as np

from emulator import streams
from emulator.array import ndarray, run, run_into


def prepare(key: Any) -> tuple[tuple[Any, ...], bool]:
    """The key with lists and host arrays as NumPy index arrays, and whether a boolean mask is in it."""
    parts = list(key) if isinstance(key, tuple) else [key]
    masked = False
    for i, s in enumerate(parts):
        if s is None or s is Ellipsis:
            continue
        if isinstance(s, slice):
            parts[i] = slice(*(None if v is None else index(v) for v in (s.start, s.stop, s.step)))
            continue
        if isinstance(s, ndarray):
            a = s._a
        elif np.isscalar(s) and not isinstance(s, (bool, np.bool_)):
            parts[i] = index(s)
            continue
        else:
            streams.forbidden("an index that lies on the host")
            a = np.asarray(s)
            if isinstance(s, (list, tuple)) and not a.size:
                a = a.astype(np.int32)
        if a.dtype.kind not in "biu":
            raise IndexError(f"arrays used as indices must be of integer or boolean type, not {a.dtype}")
        masked = masked or a.dtype.kind == "b"
        parts[i] = a
    return tuple(parts), masked


def index(x: Any) -> int:
    if isinstance(x, ndarray):
        streams.synchronises("an index on the device")
        return int(x._a)
    if isinstance(x, (float, np.floating)):
        raise IndexError("only integers, slices, ellipsis, None and integer or boolean arrays are indices")
    return int(x)


def wrapped(a: np.ndarray[Any, Any], parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Index arrays taken modulo the length of the axis that they index."""
    def axes(s: Any) -> int:
        return s.ndim if isinstance(s, np.ndarray) and s.dtype.kind == "b" else 1

    used = sum(axes(s) for s in parts if s is not None and s is not Ellipsis)
    axis, out = 0, []
    for s in parts:
        if s is None:
            out.append(s)
            continue
        if s is Ellipsis:
            out.append(s)
            axis += a.ndim - used
            continue
        if isinstance(s, np.ndarray) and s.dtype.kind in "iu" and axis < a.ndim and a.shape[axis]:
            s = s % a.shape[axis]
        out.append(s)
        axis += axes(s)
    return tuple(out)


def getitem(x: ndarray, key: Any) -> Any:
    parts, masked = prepare(key)
    if not any(isinstance(s, np.ndarray) for s in parts):
        found = x._a[(*parts, Ellipsis) if Ellipsis not in parts else parts]
        return ndarray._view(found, x)
    if masked:
        streams.synchronises("indexing with a mask")
    return run(lambda a: np.array(a[wrapped(a, parts)]), x)


def setitem(x: ndarray, key: Any, value: Any) -> None:
    parts, masked = prepare(key)
    arrays = [s for s in parts if isinstance(s, np.ndarray)]
    if isinstance(value, np.ndarray):
        everything = isinstance(key, slice) and key == slice(None)
        if everything and value.dtype == x.dtype and value.shape == x.shape:
            x.set(value)
            return
        raise TypeError(f"Unsupported type {type(value)}: an array of the host cannot be set here")
    if not isinstance(value, (ndarray, np.generic, int, float, complex, bool)):
        raise TypeError(f"Unsupported type {type(value)}")
    if masked:
        streams.synchronises("setting by a mask")
    if not arrays:
        target = x._a[(*parts, Ellipsis) if Ellipsis not in parts else parts]
        full = target.shape
        given = value.shape if isinstance(value, ndarray) else ()
        while len(given) > len(full) and given[0] == 1:
            given = given[1:]
        if np.broadcast_shapes(full, given) != full:
            raise ValueError(f"could not broadcast input array from shape {given} into shape {full}")
        check_overlap(ndarray._view(target, x), value)

    def put(a: Any, v: Any) -> None:
        a[wrapped(a, parts)] = v

    run_into(put, [x], x, value)


def check_overlap(to: ndarray, value: Any) -> None:
    """CuPy copies between equal dense layouts by memcpy, which must not overlap."""
    if (isinstance(value, ndarray) and to.shape == value.shape and to.strides == value.strides
            and to.flags.c_contiguous and to.dtype == value.dtype and to.data.ptr != value.data.ptr):
        apart = abs(to.data.ptr - value.data.ptr)
        assert not to.size or apart >= to.nbytes, "memory copied to overlaps with memory copied from"


def scatter(function: Any, name: str, x: ndarray, key: Any, value: Any) -> None:
    """function.at(x, key, value), for the dtypes that have atomics."""
    kinds = {"cupy_add": "iILQlqefdFD"}.get(name, "iILQlqfd")
    if x.dtype.char not in kinds:
        raise TypeError(f"{name}.at does not support {x.dtype}")
    parts, masked = prepare(key)
    if masked:
        streams.synchronises("scatter by a mask")
    run_into(lambda a, v: function.at(a, wrapped(a, parts), v), [x], x, value)
