"""Rows that make tensors from numbers alone. Every dimension may be split: a worker makes its own piece."""

from __future__ import annotations

from typing import Any

from meshtape.runtime.dtypes import canonical, kind
from meshtape.runtime.op import ALPHABET, IO, REQUIRED, Axes, Op, Sample, register
from meshtape.runtime.shards import Shape

Attrs = dict[str, Any]


def made_dtype(*given: Any, dtype: str, **attrs: Any) -> tuple[list[Any], list[Any]]:
    return list(given), [canonical(dtype)]


def made_axes(out: Shape, inputs: int) -> Axes:
    """A letter for every dimension of what is made; the inputs are scalars."""
    return Axes(("",) * inputs, (ALPHABET[:len(out)],))


# --- constants --------------------------------------------------------------------------------------

# A 0-d tensor is taken as the value as well.
full = register(Op(
    "full", kernel=lambda xp, value, shape, dtype: xp.full(shape, value, canonical(dtype)),
    attrs={"shape": REQUIRED, "dtype": REQUIRED}, shape=lambda value, shape, dtype: [tuple(shape)],
    dtype=made_dtype, axes=lambda value, shape, dtype: made_axes(shape, 1),
    local=lambda attrs, io: {**attrs, "shape": io.outs[0].shape},
    samples=lambda: [Sample((v,), {"shape": s, "dtype": d}, diff=False) for v, s, d in [
        (1.5, (5, 3), "float32"), (0, (), "int64"), (True, (4,), "bool"), (2, (0, 3), "float64"),
        (1, (1, 7), "int8"), (1 + 2j, (3,), "complex64")]]))


# --- ranges -----------------------------------------------------------------------------------------

def _numbers(xp: Any, start: int, count: int, dtype: Any) -> Any:
    """start, start + 1, ... in a dtype wide enough to be scaled: that of an integer result, else float64."""
    work = dtype if kind(dtype) == 1 and dtype.itemsize == 8 else xp.int64 if kind(dtype) == 1 else xp.float64
    return xp.arange(start, start + count).astype(work)


def _local_run(attrs: Attrs, io: IO) -> Attrs:
    made = io.outs[0]
    return {**attrs, "n": made.shape[0], "offset": made.offset[0]}


def _arange(xp: Any, start: Any, step: Any, n: int, dtype: str, offset: int) -> Any:
    wanted = canonical(dtype)
    if kind(wanted) == 1 and not (isinstance(start, int) and isinstance(step, int)):
        return (_numbers(xp, offset, n, canonical("float64")) * step + start).astype(wanted)
    return (_numbers(xp, offset, n, wanted) * step + start).astype(wanted)


# Element i is start + i * step, computed in float64 (in integers where all are) and rounded once.
arange = register(Op(
    "arange", kernel=_arange, attrs={"n": REQUIRED, "dtype": REQUIRED, "offset": 0},
    shape=lambda start, step, n, **attrs: [(n,)], dtype=made_dtype,
    axes=lambda start, step, n, **attrs: made_axes((n,), 2), local=_local_run,
    samples=lambda: [Sample((a, s), {"n": n, "dtype": d}, diff=False) for a, s, n, d in [
        (0, 1, 7, "int64"), (3, -2, 5, "int32"), (0.5, 0.25, 9, "float32"), (0, 1, 0, "float64"),
        (5, 1, 1, "uint8"), (2**53, 1, 5, "int64"), (0, 1, 6, "float16"), (2**60, 2, 4, "uint64"),
        (0.5, 1.5, 4, "int64")]]))


def _linspace(xp: Any, start: Any, stop: Any, n: int, dtype: str, endpoint: bool, offset: int,
              whole: int | None) -> Any:
    """As numpy.linspace: i * step + start in float64, the last one exactly stop, integers rounded down."""
    count = n if whole is None else whole
    wanted = canonical(dtype)
    parts = max(1, count - 1 if endpoint else count)
    out = _numbers(xp, offset, n, canonical("float64")) * ((stop - start) / parts) + start
    if endpoint and count > 1 and n and offset + n == count:
        out[-1] = stop
    return (xp.floor(out) if kind(wanted) == 1 else out).astype(wanted)


def _local_linspace(attrs: Attrs, io: IO) -> Attrs:
    return {**_local_run(attrs, io), "whole": io.outs[0].whole[0]}


linspace = register(Op(
    "linspace", kernel=_linspace,
    attrs={"n": REQUIRED, "dtype": REQUIRED, "endpoint": True, "offset": 0, "whole": None},
    shape=lambda start, stop, n, **attrs: [(n,)], dtype=made_dtype,
    axes=lambda start, stop, n, **attrs: made_axes((n,), 2), local=_local_linspace,
    samples=lambda: [Sample((a, b), {"n": n, "dtype": d, "endpoint": e}, diff=False) for a, b, n, d, e in [
        (0.0, 1.0, 7, "float32", True), (0.0, 1.0, 5, "float64", False), (-2.5, 3.1, 10, "float64", True),
        (0.0, 1.0, 0, "float32", True), (4.0, 9.0, 1, "float32", True), (0.0, 9.5, 4, "int64", True)]]))


# --- identity -----------------------------------------------------------------------------------------

def _eye(xp: Any, n: int, m: int, k: int, dtype: str, offset: Shape) -> Any:
    rows, columns = xp.arange(offset[0], offset[0] + n), xp.arange(offset[1], offset[1] + m)
    return (rows[:, None] + k == columns).astype(canonical(dtype))


def _local_eye(attrs: Attrs, io: IO) -> Attrs:
    made = io.outs[0]
    return {**attrs, "n": made.shape[0], "m": made.shape[1], "offset": made.offset}


eye = register(Op(
    "eye", kernel=_eye, attrs={"n": REQUIRED, "m": REQUIRED, "k": 0, "dtype": REQUIRED, "offset": (0, 0)},
    shape=lambda n, m, **attrs: [(n, m)], dtype=made_dtype, axes=lambda n, m, **attrs: made_axes((n, m), 0),
    local=_local_eye,
    samples=lambda: [Sample((), {"n": n, "m": m, "k": k, "dtype": d}, diff=False) for n, m, k, d in [
        (5, 5, 0, "float32"), (3, 7, 2, "float64"), (7, 3, -1, "int64"), (0, 4, 0, "float32"),
        (1, 1, 5, "bool")]]))
