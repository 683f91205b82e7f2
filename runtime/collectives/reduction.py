"""Elementwise reductions in rank order, the same bits on every rank and every transport."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

HostArray = NDArray[Any]

UFUNCS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}

# Elements reduced at a time when an accumulator is needed: it stays in the second-level cache.
BLOCK = 32 * 1024


@lru_cache(maxsize=256)
def accumulator(dtype: np.dtype[Any], op: str) -> np.dtype[Any]:
    """The dtype in which `op` accumulates values of `dtype`."""
    narrow = dtype.name in ("float16", "bfloat16") and op in ("sum", "prod")
    return np.dtype(np.float32) if narrow else dtype


def reduce_into(out: HostArray, parts: Sequence[HostArray], op: str) -> None:
    """out = parts[0] op parts[1] op ..., left to right; all of one shape.

    `out` may be the very memory of one of the parts.
    """
    if len(parts) == 1:
        np.copyto(out, parts[0])
        return
    ufunc = direct(out.dtype, op) if len(parts) == 2 else None
    if ufunc is not None:
        ufunc(parts[0], parts[1], out=out)
    else:
        _accumulate(out, parts, op)


@lru_cache(maxsize=256)
def direct(dtype: np.dtype[Any], op: str) -> Any:
    """The ufunc that reduces two arrays in one step, or None if it takes more."""
    one_step = accumulator(dtype, op) == dtype and not (op == "prod" and dtype.kind == "c")
    return UFUNCS[op] if one_step else None


def _accumulate(out: HostArray, parts: Sequence[HostArray], op: str) -> None:
    ufunc = complex_product if op == "prod" and out.dtype.kind == "c" else UFUNCS[op]
    wide = accumulator(out.dtype, op)
    if out.ndim != 1 and all(x.flags.c_contiguous for x in (out, *parts)):
        out, parts = out.reshape(-1), [part.reshape(-1) for part in parts]
    step = BLOCK if out.ndim == 1 else max(1, len(out))
    room = np.empty((min(step, len(out)), *out.shape[1:]), wide)
    for start in range(0, len(out), step):
        block = slice(start, min(start + step, len(out)))
        total = room[:block.stop - start]
        ufunc(parts[0][block], parts[1][block], out=total, dtype=wide)
        for part in parts[2:]:
            ufunc(total, part[block], out=total, dtype=wide)
        np.copyto(out[block], total, casting="unsafe")


def complex_product(a: HostArray, b: HostArray, out: HostArray | None = None,
                    dtype: np.dtype[Any] | None = None) -> HostArray:
    """a * b with every product and sum rounded.

    np.multiply fuses some of them or not, depending on whether its output is also an input, so ranks that
    reduce the same numbers in different memory would differ in the last bit.
    """
    real = a.real * b.real - a.imag * b.imag
    imag = a.real * b.imag + a.imag * b.real
    out = np.empty_like(a) if out is None else out
    out.real, out.imag = real, imag
    return out


def starts(counts: Sequence[int]) -> list[int]:
    """Offset of each chunk, and the end of the last."""
    at = [0]
    for count in counts:
        at.append(at[-1] + count)
    return at


def chunks(x: HostArray, counts: Sequence[int]) -> list[HostArray]:
    """Views of the consecutive chunks of a 1-D array."""
    at = starts(counts)
    return [x[a:b] for a, b in pairwise(at)]
