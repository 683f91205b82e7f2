"""Rows that join tensors or reorder their elements: concat, stack, flip, roll. All of them are linear."""

from __future__ import annotations

from typing import Any

from meshtape.runtime.dtypes import promote
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import REQUIRED, Axes, Op, Sample, normalize_axes, normalize_axis, register
from meshtape.runtime.ops.shape import named, same_dtype, squeeze
from meshtape.runtime.ops.slices import slice_along
from meshtape.runtime.shards import Shape


def _joined_dtype(*xs: Any, **attrs: Any) -> tuple[list[Any], list[Any]]:
    met = promote(*xs)
    return [met] * len(xs), [met]


# --- joining ----------------------------------------------------------------------------------------

def _concat_shape(*xs: Shape, axis: int) -> list[Shape]:
    first = xs[0]
    if not first:
        raise ShapeError("concat: tensors of 0 dimensions cannot be joined; use stack")
    d = normalize_axis(axis, len(first), "concat")
    for x in xs[1:]:
        if len(x) != len(first) or (*x[:d], *x[d + 1:]) != (*first[:d], *first[d + 1:]):
            raise ShapeError(f"concat: shapes {first} and {x} differ outside axis {axis}; "
                             "they must be equal except along the joined axis")
    return [(*first[:d], sum(x[d] for x in xs), *first[d + 1:])]


def _concat_axes(*xs: Shape, axis: int) -> Axes:
    names = named(len(xs[0]), (normalize_axis(axis, len(xs[0])),))
    return Axes((names,) * len(xs), (names,))


def _concat_vjp(g: Any, out: Any, *xs: Any, axis: int) -> tuple[Any, ...]:
    d, start, parts = normalize_axis(axis, len(xs[0].shape)), 0, []
    for x in xs:
        parts.append(slice_along(g, d, start, start + x.shape[d]))
        start += x.shape[d]
    return tuple(parts)


concat: Op = register(Op(
    "concat",
    kernel=lambda xp, *xs, axis: xp.concatenate(xs, axis=axis),
    attrs={"axis": 0},
    shape=_concat_shape,
    dtype=_joined_dtype,
    axes=_concat_axes,
    linear="joint",
    vjp=_concat_vjp,
    samples=lambda: [Sample(xs, {"axis": axis}) for xs, axis in [
        (((3,),), 0), (((3,), (4,)), 0), (((5, 4), (5, 1), (5, 2)), 1), (((5, 4), (5, 1)), -1),
        (((0, 4), (3, 4)), 0), (((2, 1, 3), (2, 5, 3)), -2), (((1, 5), (1, 5)), 0)]]))


def _stack_shape(*xs: Shape, axis: int) -> list[Shape]:
    first = xs[0]
    for x in xs[1:]:
        if x != first:
            raise ShapeError(f"stack: shapes {first} and {x} differ; stack needs equal shapes, use concat to "
                             "join others")
    d = normalize_axis(axis, len(first) + 1, "stack")
    return [(*first[:d], len(xs), *first[d:])]


def _stack_axes(*xs: Shape, axis: int) -> Axes:
    names, d = named(len(xs[0])), normalize_axis(axis, len(xs[0]) + 1)
    return Axes((names,) * len(xs), (names[:d] + "." + names[d:],))


def _stack_vjp(g: Any, out: Any, *xs: Any, axis: int) -> tuple[Any, ...]:
    d = normalize_axis(axis, len(xs[0].shape) + 1)
    return tuple(squeeze(slice_along(g, d, i, i + 1), axis=(d,)) for i in range(len(xs)))


stack: Op = register(Op(
    "stack",
    kernel=lambda xp, *xs, axis: xp.stack(xs, axis=axis),
    attrs={"axis": 0},
    shape=_stack_shape,
    dtype=_joined_dtype,
    axes=_stack_axes,
    linear="joint",
    vjp=_stack_vjp,
    samples=lambda: [Sample(xs, {"axis": axis}) for xs, axis in [
        (((),) * 2, 0), (((3,),), 0), (((5, 4),) * 3, 1), (((5, 4),) * 2, -1), (((0, 1),) * 2, 0),
        (((1, 3),) * 2, -2)]]))


# --- order of elements ------------------------------------------------------------------------------

def _flip_axes(x: Shape, axis: tuple[int, ...]) -> Axes:
    names = named(len(x), normalize_axes(axis, len(x)))
    return Axes((names,), (names,))


def _flip_shape(x: Shape, axis: tuple[int, ...]) -> list[Shape]:
    normalize_axes(axis, len(x), "flip")
    return [x]


flip: Op = register(Op(
    "flip",
    kernel=lambda xp, x, axis: xp.flip(x, axis),
    attrs={"axis": REQUIRED},
    shape=_flip_shape,
    dtype=same_dtype,
    axes=_flip_axes,
    linear=((0,),),
    vjp=(lambda g, out, x, axis: flip(g, axis=axis),),
    samples=lambda: [Sample((x,), {"axis": axis}) for x, axis in [
        ((), ()), ((5,), (0,)), ((5, 4), (-1,)), ((5, 4, 3), (0, 2)), ((0, 3), (0,)), ((1, 3), (0,))]]))


def _roll_shape(x: Shape, shift: tuple[int, ...], axis: tuple[int, ...]) -> list[Shape]:
    if len(shift) != len(axis):
        raise ShapeError(f"roll: {len(shift)} shifts {tuple(shift)} for {len(axis)} axes {tuple(axis)}; "
                         "give one shift per axis")
    for a in axis:
        normalize_axis(a, len(x), "roll")
    return [x]


def _roll_axes(x: Shape, shift: tuple[int, ...], axis: tuple[int, ...]) -> Axes:
    names = named(len(x), tuple(normalize_axis(a, len(x)) for a in axis))
    return Axes((names,), (names,))


roll: Op = register(Op(
    "roll",
    kernel=lambda xp, x, shift, axis: xp.roll(x, shift, axis) if axis else x,
    attrs={"shift": REQUIRED, "axis": REQUIRED},
    shape=_roll_shape,
    dtype=same_dtype,
    axes=_roll_axes,
    linear=((0,),),
    vjp=(lambda g, out, x, shift, axis: roll(g, shift=tuple(-s for s in shift), axis=axis),),
    samples=lambda: [Sample((x,), {"shift": shift, "axis": axis}) for x, shift, axis in [
        ((5,), (2,), (0,)), ((5, 4), (-1,), (-1,)), ((5, 4, 3), (1, -7), (0, 2)), ((0, 3), (1,), (0,)),
        ((5,), (1, 1), (0, 0)), ((5, 4), (), ())]]))
