"""Rows that reduce dimensions: sums, means, products, extremes and their positions, any and all.

`axis` is None (all dimensions), an int or a tuple of ints; with `keepdims` a reduced dimension stays as 1.
Sums and products of booleans and signed integers are int64, those of unsigned integers uint64 (Array API).
float16 and bfloat16 are accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.kernels import softmax as cuda_softmax
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import (
    ALPHABET,
    IO,
    REQUIRED,
    Axes,
    Op,
    Sample,
    broadcast_shapes,
    lookup,
    normalize_axes,
    normalize_axis,
    register,
)
from meshtape.runtime.ops.pointwise import equal, exp
from meshtape.runtime.ops.rules import COMPLEX, conjugate, floated
from meshtape.runtime.ops.scan import product_of_others
from meshtape.runtime.rowwise import sums
from meshtape.runtime.shards import Shape

Axis = int | tuple[int, ...] | None
Rule = tuple[tuple[Any, ...], tuple[Any, ...]]


# --- shape and axes -----------------------------------------------------------------------------------------

def reduced_shape(name: str, x: Shape, axis: Axis, keepdims: bool) -> Shape:
    axes = normalize_axes(axis, len(x), name)
    return tuple(1 if i in axes else n for i, n in enumerate(x) if keepdims or i not in axes)


def shape_of(name: str) -> Callable[..., list[Shape]]:
    return lambda x, axis, keepdims, **attrs: [reduced_shape(name, x, axis, keepdims)]


def shape_of_nonempty(name: str) -> Callable[..., list[Shape]]:
    """The shape rule of reductions without an identity."""
    def rule(x: Shape, axis: Axis, keepdims: bool, **attrs: Any) -> list[Shape]:
        for i in normalize_axes(axis, len(x), name):
            if x[i] == 0:
                raise ShapeError(f"{name}: dimension {i} of {x} is empty, and there is no {name} of no "
                                 f"elements; reduce dimensions that have elements")
        return [reduced_shape(name, x, axis, keepdims)]
    return rule


def axes_of(combine: str) -> Callable[..., Axes]:
    """A split of a reduced dimension makes the output Partial(combine); with "" it is never split."""
    def rule(x: Shape, axis: Axis, keepdims: bool, **attrs: Any) -> Axes:
        axes = normalize_axes(axis, len(x))
        names = "".join("." if i in axes and not combine else ALPHABET[i] for i in range(len(x)))
        out = "".join("." if i in axes else names[i] for i in range(len(x)) if keepdims or i not in axes)
        return Axes((names,), (out,), combine)
    return rule


# --- dtype --------------------------------------------------------------------------------------------------

def _summed(x: Any, dtype: str | None = None) -> np.dtype[Any]:
    """The dtype of a sum or product over `x`."""
    if dtype is not None:
        return dtypes.canonical(dtype)
    if dtypes.kind(x) >= 2:
        return x  # type: ignore[no-any-return]
    return dtypes.uint64 if x.kind == "u" else dtypes.int64


def accumulator(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which values of `dtype` are added up."""
    return dtypes.float32 if dtype.itemsize == 2 and dtypes.is_floating(dtype) else dtype


def _sum_rule(x: Any, dtype: str | None, **attrs: Any) -> Rule:
    return (x,), (_summed(x, dtype),)


def _same_rule(name: str) -> Callable[..., Rule]:
    def rule(x: Any, **attrs: Any) -> Rule:
        refuse_complex(name, x)
        return (x,), (x,)
    return rule


def refuse_complex(name: str, x: Any) -> None:
    floated(COMPLEX)(name)(x)


# --- samples ------------------------------------------------------------------------------------------------

AXES: tuple[tuple[Shape, Axis], ...] = (
    ((), None), ((5,), None), ((5,), 0), ((4, 3), None), ((4, 3), 0), ((4, 3), -1), ((2, 3, 5), (0, 2)),
    ((2, 3, 5), (1,)), ((3, 1, 4), 1), ((4, 0), 0), ((4, 3), ()),
)


def reductions(*, empty: bool = True, diff: bool = True, distinct: bool = False, kinds: str = "ib",
               low: float = -2.0, **attrs: Any) -> Callable[[], list[Sample]]:
    """Samples over shapes, axes and keepdims; `empty` adds reductions over no elements."""
    def make() -> list[Sample]:
        found = [Sample((x,), {"axis": axis, "keepdims": keepdims, **attrs}, low=low, diff=diff,
                        distinct=distinct) for x, axis in AXES for keepdims in (False, True)]
        if empty:
            found += [Sample(((0, 3),), {"axis": axis, **attrs}, diff=diff) for axis in (0, None)]
        for letter, dtype in (("i", "int32"), ("i", "uint8"), ("b", "bool"), ("c", "complex128")):
            if letter in kinds:
                least = 0 if dtype == "uint8" else -5
                found += [Sample(((4, 3),), {"axis": axis, **attrs}, dtype, least, 5, diff=False)
                          for axis in (1, None)]
        return found
    return make


# --- sums ---------------------------------------------------------------------------------------------------

def _sum(xp: Any, x: Any, axis: Axis, keepdims: bool, dtype: str | None) -> Any:
    acc = accumulator(_summed(x.dtype, dtype))
    return sums(xp, x, normalize_axes(axis, x.ndim), keepdims, acc)


def _unsum(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool, **attrs: Any) -> Any:
    return broadcast_reduced(g, shape=tuple(x.shape), axis=axis, keepdims=keepdims)


sum_ = register(Op(
    "sum", _sum, attrs={"axis": None, "keepdims": False, "dtype": None}, shape=shape_of("sum"),
    dtype=_sum_rule, axes=axes_of("sum"), linear=((0,),), vjp=(_unsum,), autocast="float32",
    samples=lambda: [*reductions(kinds="ibc")(), *reductions(kinds="ib", diff=False, dtype="float32")()]))


def _broadcast_reduced(xp: Any, x: Any, shape: Shape, axis: Axis, keepdims: bool) -> Any:
    if not keepdims:
        x = xp.expand_dims(x, normalize_axes(axis, len(shape)))
    return xp.broadcast_to(x, shape)


def _broadcast_reduced_shape(x: Shape, shape: Shape, axis: Axis, keepdims: bool) -> list[Shape]:
    needed = reduced_shape("broadcast_reduced", shape, axis, keepdims)
    if x != needed:
        raise ShapeError(f"broadcast_reduced: {x} is not {shape} reduced over {axis}; "
                         f"give a tensor of shape {needed}")
    return [tuple(shape)]


def _broadcast_reduced_axes(x: Shape, shape: Shape, axis: Axis, keepdims: bool) -> Axes:
    forward = axes_of("sum")(shape, axis, keepdims)
    return Axes(forward.outs, forward.ins)


# The derivative of a sum: puts the reduced dimensions back with extents `shape[axis]`.
broadcast_reduced = register(Op(
    "broadcast_reduced", _broadcast_reduced, attrs={"shape": REQUIRED, "axis": None, "keepdims": False},
    shape=_broadcast_reduced_shape, dtype=lambda x, **attrs: ((x,), (x,)), axes=_broadcast_reduced_axes,
    linear=((0,),), local=lambda attrs, io: {**attrs, "shape": io.outs[0].shape},
    vjp=(lambda g, out, x, shape, axis, keepdims: sum_(g, axis=axis, keepdims=keepdims),),
    samples=lambda: [Sample((reduced_shape("", x, axis, keepdims),),
                            {"shape": x, "axis": axis, "keepdims": keepdims})
                     for x, axis in AXES for keepdims in (False, True)]))


def _stretched(x: Shape, shape: Shape) -> tuple[int, ...]:
    """The dimensions of `x` that summing to `shape` must sum over."""
    lead = len(x) - len(shape)
    return tuple(i for i in range(len(x)) if i < lead or x[i] != shape[i - lead])


def _sum_to(xp: Any, x: Any, shape: Shape) -> Any:
    axes = _stretched(x.shape, shape)
    return sums(xp, x, axes, True, accumulator(x.dtype)).reshape(shape)


def _sum_to_shape(x: Shape, shape: Shape) -> list[Shape]:
    if broadcast_shapes("sum_to", x, shape) != x:
        raise ShapeError(f"sum_to: {shape} does not broadcast to {x}; "
                         f"give a shape whose dimensions match or are 1")
    return [tuple(shape)]


def _sum_to_axes(x: Shape, shape: Shape) -> Axes:
    summed, lead, names = _stretched(x, shape), len(x) - len(shape), ALPHABET[:len(x)]
    return Axes((names,), ("".join("." if i in summed else names[i] for i in range(lead, len(x))),))


# The adjoint of broadcasting: sums the dimensions along which a tensor of `shape` was stretched.
sum_to = register(Op(
    "sum_to", _sum_to, attrs={"shape": REQUIRED}, shape=_sum_to_shape, dtype=lambda x, shape: ((x,), (x,)),
    axes=_sum_to_axes, linear=((0,),), local=lambda attrs, io: {**attrs, "shape": io.outs[0].shape},
    vjp=(lambda g, out, x, shape: lookup("broadcast_to")(g, shape=tuple(x.shape)),),
    samples=lambda: [Sample((x,), {"shape": shape}) for x, shape in [
        ((5, 3), (3,)), ((5, 3), (5, 1)), ((5, 3), ()), ((2, 3, 4), (3, 1)), ((2, 3, 4), (1, 3, 4)),
        ((1, 4), (1, 1)), ((0, 3), (3,)), ((0, 3), (1, 3)), ((4, 3), (4, 3)), ((), ())]]))


def _mean(xp: Any, x: Any, axis: Axis, keepdims: bool, count: int | None) -> Any:
    axes = normalize_axes(axis, x.ndim)
    n = prod(x.shape[i] for i in axes) if count is None else count
    return sums(xp, x, axes, keepdims, accumulator(x.dtype)) / float(n)


def _mean_local(attrs: dict[str, Any], io: IO) -> dict[str, Any]:
    whole = io.ins[0].whole  # type: ignore[union-attr]
    return {**attrs, "count": prod(whole[i] for i in normalize_axes(attrs["axis"], len(whole)))}


def _mean_vjp(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool, count: int | None) -> Any:
    n = prod(x.shape[i] for i in normalize_axes(axis, x.ndim))
    return broadcast_reduced(g / n, shape=tuple(x.shape), axis=axis, keepdims=keepdims)


# `count` is how many elements of the whole tensor each mean is over; a worker holds only some of them.
mean = register(Op(
    "mean", _mean, attrs={"axis": None, "keepdims": False, "count": None}, shape=shape_of("mean"),
    dtype=floated()("mean"), axes=axes_of("sum"), linear=((0,),), local=_mean_local, vjp=(_mean_vjp,),
    samples=reductions(kinds="ic")))


def _logsumexp(xp: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    axes = normalize_axes(axis, x.ndim)
    x = x.astype(accumulator(x.dtype), copy=False)
    top = _max(xp, x, axis, True)
    top = xp.where(xp.isfinite(top), top, 0).astype(x.dtype, copy=False)
    out = xp.log(xp.exp(x - top).sum(axis=axes, keepdims=True)) + top
    return out if keepdims else out.reshape(reduced_shape("", x.shape, axes, False))


def _logsumexp_vjp(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    wide = {"shape": tuple(x.shape), "axis": axis, "keepdims": keepdims}
    return broadcast_reduced(g, **wide) * exp(x - broadcast_reduced(out, **wide))


logsumexp = register(Op(
    "logsumexp", _logsumexp, attrs={"axis": None, "keepdims": False}, shape=shape_of("logsumexp"),
    device=cuda_softmax.logsumexp,
    dtype=floated(COMPLEX)("logsumexp"), axes=axes_of(""), vjp=(_logsumexp_vjp,), keeps="x out",
    samples=reductions(kinds="i"), autocast="float32"))


# --- products -----------------------------------------------------------------------------------------------

def _prod(xp: Any, x: Any, axis: Axis, keepdims: bool, dtype: str | None) -> Any:
    acc = accumulator(_summed(x.dtype, dtype))
    return x.prod(axis=normalize_axes(axis, x.ndim), dtype=acc, keepdims=keepdims)


def _prod_vjp(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool, dtype: str | None) -> Any:
    """d prod / d x[i] is the product of the others. Nothing is divided, so zeros are exact in all orders."""
    shape = tuple(x.shape)
    axes = normalize_axes(axis, len(shape))
    if not axes:
        return g
    wide = broadcast_reduced(g, shape=shape, axis=axis, keepdims=keepdims)
    if x.dtype.itemsize == 2:
        x = lookup("astype")(x, dtype="float32")
    if len(axes) == 1:
        return wide * conjugate(product_of_others(x, axes[0]))
    order = (*(i for i in range(len(shape)) if i not in axes), *axes)
    permuted = tuple(shape[i] for i in order)
    kept = permuted[:-len(axes)]
    lines = _reshape(lookup("permute_dims")(x, axes=order), (*kept, prod(permuted[len(kept):])))
    others = _reshape(product_of_others(lines, len(kept)), permuted)
    back = tuple(order.index(i) for i in range(len(shape)))
    return wide * conjugate(lookup("permute_dims")(others, axes=back))


def _reshape(x: Any, shape: Shape) -> Any:
    return x if tuple(x.shape) == shape else lookup("reshape")(x, shape=shape)


def _prod_samples() -> list[Sample]:
    zeros = np.array([[1.5, 0.0, 2.0], [0.0, 3.0, 0.0], [1.0, -2.0, 0.5]])
    return [*reductions(kinds="ibc")(), *(Sample((zeros,), {"axis": axis}) for axis in (0, 1, None))]


prod_ = register(Op(
    "prod", _prod, attrs={"axis": None, "keepdims": False, "dtype": None}, shape=shape_of("prod"),
    dtype=_sum_rule, axes=axes_of(""), vjp=(_prod_vjp,), keeps="x", samples=_prod_samples,
    autocast="float32"))


# --- extremes -----------------------------------------------------------------------------------------------

def _worst(xp: Any, dtype: Any, sign: int) -> Any:
    """The identity of max (sign -1) or min (sign 1) in `dtype`."""
    if dtype.kind == "b":
        return sign > 0
    if dtype.kind in "iu":
        return xp.iinfo(dtype).max if sign > 0 else xp.iinfo(dtype).min
    return sign * float("inf")


def _max(xp: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    if x.size == 0:
        return xp.full(reduced_shape("max", x.shape, axis, keepdims), _worst(xp, x.dtype, -1), dtype=x.dtype)
    return x.max(axis=normalize_axes(axis, x.ndim), keepdims=keepdims)


def _min(xp: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    if x.size == 0:
        return xp.full(reduced_shape("min", x.shape, axis, keepdims), _worst(xp, x.dtype, 1), dtype=x.dtype)
    return x.min(axis=normalize_axes(axis, x.ndim), keepdims=keepdims)


def _extreme_vjp(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    """Elements that tie for the extreme share its gradient evenly, as in torch.amax."""
    wide = {"shape": tuple(x.shape), "axis": axis, "keepdims": keepdims}
    hit = equal(x, broadcast_reduced(out, **wide))
    ties = sum_(hit, axis=axis, keepdims=keepdims)
    return broadcast_reduced(g / ties, **wide) * hit


def _with_nan() -> list[Sample]:
    x = np.array([[1.0, np.nan, 3.0], [4.0, 5.0, 6.0], [-np.inf, -1.0, np.inf], [0.0, 0.0, 0.0]])
    return [Sample((x,), {"axis": axis}, diff=False) for axis in (None, 0, 1)]


_EXTREMES = reductions(empty=False, distinct=True)

max_ = register(Op(
    "max", _max, attrs={"axis": None, "keepdims": False}, shape=shape_of_nonempty("max"),
    dtype=_same_rule("max"), axes=axes_of("max"), vjp=(_extreme_vjp,), keeps="x out",
    samples=lambda: _EXTREMES() + _with_nan()))
min_ = register(Op(
    "min", _min, attrs={"axis": None, "keepdims": False}, shape=shape_of_nonempty("min"),
    dtype=_same_rule("min"), axes=axes_of("min"), vjp=(_extreme_vjp,), keeps="x out",
    samples=lambda: _EXTREMES() + _with_nan()))


def _position(name: str) -> Op:
    """The row of argmax or argmin: int64 position of the first extreme (or first NaN) along one axis."""
    def kernel(xp: Any, x: Any, axis: int | None, keepdims: bool) -> Any:
        return getattr(xp, name)(x, axis=axis, keepdims=keepdims)

    def shape(x: Shape, axis: int | None, keepdims: bool) -> list[Shape]:
        if axis is not None:
            normalize_axis(axis, len(x), name)
        return shape_of_nonempty(name)(x, axis, keepdims)

    def dtype(x: Any, **attrs: Any) -> Rule:
        refuse_complex(name, x)
        return (x,), (dtypes.int64,)

    def samples() -> list[Sample]:
        found = [Sample((x,), {"axis": axis, "keepdims": keepdims}, diff=False)
                 for x, axis in AXES for keepdims in (False, True) if axis is None or isinstance(axis, int)]
        ties = np.array([[1, 3, 3], [2, 2, 2], [0, -1, 0]])
        return [*found, *(Sample((ties,), {"axis": axis}, diff=False) for axis in (None, 0, 1)), *_with_nan()]

    return register(Op(name, kernel, attrs={"axis": None, "keepdims": False}, shape=shape, dtype=dtype,
                       axes=axes_of(""), samples=samples))


argmax = _position("argmax")
argmin = _position("argmin")


# --- truth --------------------------------------------------------------------------------------------------

_TRUTHS = reductions(diff=False, kinds="ib", low=-1)


def _bool_rule(x: Any, **attrs: Any) -> Rule:
    return (x,), (dtypes.bool_,)


any_ = register(Op(
    "any", lambda xp, x, axis, keepdims: xp.any(x, axis=normalize_axes(axis, x.ndim), keepdims=keepdims),
    attrs={"axis": None, "keepdims": False}, shape=shape_of("any"), dtype=_bool_rule, axes=axes_of("max"),
    samples=_TRUTHS))
all_ = register(Op(
    "all", lambda xp, x, axis, keepdims: xp.all(x, axis=normalize_axes(axis, x.ndim), keepdims=keepdims),
    attrs={"axis": None, "keepdims": False}, shape=shape_of("all"), dtype=_bool_rule, axes=axes_of("min"),
    samples=_TRUTHS))
count_nonzero = register(Op(
    "count_nonzero", lambda xp, x, axis, keepdims: _sum(xp, x != 0, axis, keepdims, None),
    attrs={"axis": None, "keepdims": False}, shape=shape_of("count_nonzero"),
    dtype=lambda x, **attrs: ((x,), (dtypes.int64,)), axes=axes_of("sum"), samples=_TRUTHS))
