"""Random numbers: rows of (seed, draw) whose every element is the same on any mesh and in any layout.

`seed` and `draw` are Python ints (taken modulo 2**64) and operands, so that a loop that draws again and again
has one program. meshtape.runtime.philox says how bits become numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from meshtape.runtime import philox
from meshtape.runtime.cuda.kernels import random as device_kernels
from meshtape.runtime.dtypes import canonical, is_floating
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import ALPHABET, IO, REQUIRED, Axes, DeviceKernel, Op, Sample, register
from meshtape.runtime.ops.create import made_axes, made_dtype
from meshtape.runtime.ops.reduce import accumulator
from meshtape.runtime.ops.rules import BOOL, INTEGER, promoted
from meshtape.runtime.shards import Shape

Attrs = dict[str, Any]
RANDOM_ATTRS: Attrs = {"shape": REQUIRED, "dtype": "float32", "offset": None, "whole": None}
INT_NAMES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def local_piece(attrs: Attrs, io: IO) -> Attrs:
    made = io.outs[0]
    return {**attrs, "shape": made.shape, "offset": made.offset, "whole": made.whole}


def _make(xp: Any, values: philox.Fill, dtype: Any, shape: Shape, offset: Shape | None,
          whole: Shape | None) -> Any:
    """A piece of random values; the whole tensor where no worker was named."""
    out = xp.empty(shape, dtype)
    return philox.fill(xp, values, out, (0,) * len(shape) if offset is None else offset,
                       shape if whole is None else whole)


def _row(name: str, kernel: Callable[..., Any], takes: Callable[[Any], bool],
         device: DeviceKernel, samples: Callable[[], list[Sample]], *scalars: str, **defaults: Any) -> Op:
    """A row of seed, draw and these scalars; `takes` says which dtypes can be made."""
    def dtype(*given: Any, dtype: str, **attrs: Any) -> tuple[list[Any], list[Any]]:
        if not takes(canonical(dtype)):
            raise DTypeError(f"{name}: cannot make random numbers of dtype {dtype}")
        return made_dtype(*given, dtype=dtype)

    return register(Op(
        name, kernel=kernel, attrs={**RANDOM_ATTRS, **defaults}, dtype=dtype,
        shape=lambda *given, shape, **attrs: [tuple(shape)],
        axes=lambda *given, shape, **attrs: made_axes(shape, 2 + len(scalars)), local=local_piece,
        samples=samples, device=device))


_SHAPES: tuple[Shape, ...] = ((5, 3), (), (7,), (2, 3, 4), (0, 3), (1, 6))


def _samples(*scalars: Any, dtypes: tuple[str, ...] = ("float32",)) -> Callable[[], list[Sample]]:
    return lambda: [Sample((7, 2**63 + 1, *scalars), {"shape": s, "dtype": d}, diff=False)
                    for d in dtypes for s in _SHAPES]


# --- rows -------------------------------------------------------------------------------------------

def _uniform(xp: Any, seed: int, draw: int, low: float, high: float, shape: Shape, dtype: str,
             offset: Shape | None, whole: Shape | None) -> Any:
    """low + u * (high - low), each operation rounded to the dtype (float32 for 16-bit floats)."""
    wanted = canonical(dtype)
    work = accumulator(wanted)

    def values(start: int, count: int) -> Any:
        u = philox.uniform(xp, seed, draw, start, count, work)
        if (low, high) != (0, 1):
            u *= high - low
            u += low
        return u
    return _make(xp, values, wanted, shape, offset, whole)


def _normal(xp: Any, seed: int, draw: int, mean: float, std: float, shape: Shape, dtype: str,
            offset: Shape | None, whole: Shape | None) -> Any:
    """mean + std * z in float64, then rounded."""
    wanted = canonical(dtype)

    def values(start: int, count: int) -> Any:
        if xp is np and wanted == np.float32:
            return philox.normal_single(seed, draw, start, count, mean, std)
        z = philox.normal(xp, seed, draw, start, count)
        if (mean, std) != (0, 1):
            z *= std
            z += mean
        return z
    return _make(xp, values, wanted, shape, offset, whole)


def _integers(xp: Any, seed: int, draw: int, low: int, high: int, shape: Shape, dtype: str,
              offset: Shape | None, whole: Shape | None) -> Any:
    if not 0 < high - low <= 2**64:
        raise ValueError(f"random_integers: no integers in [{low}, {high}); high must be above low")
    base = xp.uint64(low & philox.MASK64)
    wanted = canonical(dtype)

    def values(start: int, count: int) -> Any:
        found = philox.below(xp, seed, draw, start, count, high - low) + base
        return found.view(xp.int64).astype(wanted)
    return _make(xp, values, wanted, shape, offset, whole)


def _bernoulli(xp: Any, seed: int, draw: int, p: float, shape: Shape, dtype: str, offset: Shape | None,
               whole: Shape | None) -> Any:
    values = lambda start, count: philox.chosen(xp, seed, draw, start, count, p)
    return _make(xp, values, canonical(dtype), shape, offset, whole)


random_uniform = _row("random_uniform", _uniform, is_floating, device_kernels.UNIFORM,
                      _samples(-1.0, 2.0, dtypes=("float32", "float64", "float16")), "low", "high")
random_normal = _row("random_normal", _normal, is_floating, device_kernels.NORMAL,
                     _samples(1.0, 2.0, dtypes=("float32", "float64", "float16")), "mean", "std")
random_integers = _row("random_integers", _integers, lambda d: d.name in INT_NAMES, device_kernels.INTEGER,
                       _samples(-3, 9, dtypes=("int64", "int32")), "low", "high", dtype="int64")
random_bernoulli = _row("random_bernoulli", _bernoulli, lambda d: True, device_kernels.BERNOULLI,
                        _samples(0.3, dtypes=("bool", "float32")), "p", dtype="bool")


def _permutation(xp: Any, seed: int, draw: int, n: int, offset: int, count: int | None) -> Any:
    """The order of n random words, ties in order of position. Every worker sorts all of them and takes its
    part."""
    order = xp.argsort(philox.words(xp, seed, draw, 0, n), kind="stable").astype(xp.int64, copy=False)
    return order[offset:] if count is None else order[offset:offset + count]


def _local_permutation(attrs: Attrs, io: IO) -> Attrs:
    return {**attrs, "offset": io.outs[0].offset[0], "count": io.outs[0].shape[0]}


random_permutation = register(Op(
    "random_permutation", kernel=_permutation, attrs={"n": REQUIRED, "offset": 0, "count": None},
    shape=lambda seed, draw, n, **attrs: [(n,)],
    dtype=lambda seed, draw, **attrs: ([seed, draw], [canonical("int64")]),
    axes=lambda seed, draw, n, **attrs: made_axes((n,), 2), local=_local_permutation,
    samples=lambda: [Sample((3, 4), {"n": n}, diff=False) for n in (7, 0, 1, 64)],
    device=device_kernels.PERMUTATION))


# --- dropout ------------------------------------------------------------------------------------------

def _dropout_shape(x: Shape, seed: Shape, draw: Shape, p: float, **attrs: Any) -> list[Shape]:
    if not 0 <= p <= 1:
        raise ShapeError(f"dropout: p is the probability of a zero, 0 to 1, got {p}")
    return [x]


def _dropout_dtype(x: Any, seed: Any, draw: Any, **attrs: Any) -> tuple[list[Any], list[Any]]:
    found = promoted(BOOL, INTEGER)("dropout")(x)[1][0]
    return [found, seed, draw], [found]


def _dropout_axes(x: Shape, seed: Shape, draw: Shape, **attrs: Any) -> Axes:
    return Axes((ALPHABET[:len(x)], "", ""), (ALPHABET[:len(x)],))


def _dropout(xp: Any, x: Any, seed: int, draw: int, p: float, offset: Shape | None,
             whole: Shape | None) -> Any:
    if p == 0:
        return x
    if p == 1:
        return xp.zeros_like(x)
    kept = xp.empty(x.shape, bool)
    philox.fill(xp, lambda start, count: ~philox.chosen(xp, seed, draw, start, count, p), kept,
                (0,) * x.ndim if offset is None else offset, x.shape if whole is None else whole)
    out = xp.multiply(x, kept)
    out *= 1 / (1 - p)
    return out


def _dropout_local(attrs: Attrs, io: IO) -> Attrs:
    return {**attrs, "offset": io.outs[0].offset, "whole": io.outs[0].whole}


# Linear in x with a mask that depends on (seed, draw) alone, so it is its own derivative and keeps nothing.
dropout: Op = register(Op(
    "dropout", kernel=_dropout, attrs={"p": 0.5, "offset": None, "whole": None}, shape=_dropout_shape,
    dtype=_dropout_dtype, axes=_dropout_axes, linear=((0,),), local=_dropout_local,
    device=device_kernels.DROPOUT,
    vjp=(lambda g, out, x, seed, draw, p, **attrs: dropout(g, seed, draw, p=p), None, None),
    samples=lambda: [Sample((s, 3, 5), {"p": p}) for s, p in [
        ((5, 3), 0.5), ((6,), 0.0), ((6,), 1.0), ((), 0.3), ((2, 3, 4), 0.1), ((0, 3), 0.5)]]))
