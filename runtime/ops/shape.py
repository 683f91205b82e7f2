"""Rows that change a tensor's shape and keep its data: reshape, permute, expand, squeeze, broadcast.

All of them are linear.
"""

from __future__ import annotations

from math import gcd, prod
from typing import Any

from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import (
    ALPHABET,
    IO,
    REQUIRED,
    Axes,
    Op,
    Sample,
    normalize_axes,
    normalize_axis,
    register,
)
from meshtape.runtime.ops.rules import unbroadcast
from meshtape.runtime.shards import Shape

Attrs = dict[str, Any]


def same_dtype(x: Any, **attrs: Any) -> tuple[list[Any], list[Any]]:
    return [x], [x]


def named(ndim: int, whole: tuple[int, ...] = ()) -> str:
    """A letter for every dimension, and "." for those of `whole`, which must not be split."""
    return "".join("." if d in whole else ALPHABET[d] for d in range(ndim))


def local_out_shape(attrs: Attrs, io: IO) -> Attrs:
    return {**attrs, "shape": io.outs[0].shape}


# --- reshape ----------------------------------------------------------------------------------------

def _reshape_shape(x: Shape, shape: Shape) -> list[Shape]:
    if any(n < 0 for n in shape) or prod(x) != prod(shape):
        raise ShapeError(f"reshape: {x} has {prod(x)} elements, {tuple(shape)} asks for {prod(shape)}; "
                         f"give a shape of {prod(x)} elements, or -1 for one dimension")
    return [tuple(shape)]


def _groups(x: Shape, shape: Shape) -> list[tuple[range, range]]:
    """Smallest runs of input and output dimensions that hold the same number of elements, none of them 0."""
    found, i, j = [], 0, 0
    while i < len(x) or j < len(shape):
        i0, j0 = i, j
        held, asked = 1, 1
        if i < len(x):
            held, i = x[i], i + 1
        if j < len(shape):
            asked, j = shape[j], j + 1
        while held != asked:
            if held < asked:
                held, i = held * x[i], i + 1
            else:
                asked, j = asked * shape[j], j + 1
        found.append((range(i0, i), range(j0, j)))
    return found


def _reshape_axes(x: Shape, shape: Shape) -> Axes:
    """A dimension that survives keeps its letter.

    Of merged or divided dimensions the leading one may be split when the mesh divides the leading extent on
    both sides: then each part is one run of elements on both. A tensor without elements keeps its first
    dimensions, up to where the shapes differ.
    """
    before, after, even = ["."] * len(x), ["."] * len(shape), {}
    if 0 in x:
        for d, (m, n) in enumerate(zip(x, shape, strict=False)):
            if m != n:
                break
            before[d] = after[d] = ALPHABET[d]
        return Axes(("".join(before),), ("".join(after),))
    for ins, outs in _groups(x, shape):
        i = next((d for d in ins if x[d] > 1), None)
        j = next((d for d in outs if shape[d] > 1), None)
        if i is None or j is None:
            if len(ins) == len(outs) == 1:              # 1 -> 1
                before[ins[0]] = after[outs[0]] = ALPHABET[ins[0]]
            continue
        common = gcd(x[i], shape[j])
        if common > 1:
            before[i] = after[j] = ALPHABET[i]
            if x[i] != shape[j]:
                even[ALPHABET[i]] = common
    return Axes(("".join(before),), ("".join(after),), even=even)


def _reshape_samples() -> list[Sample]:
    pairs = [((6, 4), (24,)), ((24,), (6, 4)), ((2, 3, 4), (6, 4)), ((6, 4), (2, 3, 4)), ((6, 4), (4, 6)),
             ((4, 2, 3, 3), (4, 18)), ((5, 1, 4), (5, 4)), ((5, 4), (1, 5, 1, 4)), ((1,), ()), ((), (1, 1)),
             ((1, 7), (7, 1)), ((3, 0, 2), (3, 0)), ((0, 4), (0,)), ((7, 3), (7, 3)),
             ((4, 1, 6), (2, 2, 3, 2))]
    return [Sample((x,), {"shape": shape}) for x, shape in pairs]


reshape: Op = register(Op(
    "reshape",
    kernel=lambda xp, x, shape: x.reshape(shape),
    attrs={"shape": REQUIRED},
    shape=_reshape_shape,
    dtype=same_dtype,
    axes=_reshape_axes,
    linear=((0,),),
    local=local_out_shape,
    vjp=(lambda g, out, x, shape: reshape(g, shape=x.shape),),
    samples=_reshape_samples))


# --- order and number of dimensions -----------------------------------------------------------------

def _permutation(x: Shape, axes: tuple[int, ...]) -> tuple[int, ...]:
    found = tuple(normalize_axis(a, len(x), "permute_dims") for a in axes)
    if sorted(found) != list(range(len(x))):
        raise ShapeError(f"permute_dims: axes {tuple(axes)} do not name each dimension of {x} once; "
                         f"give {len(x)} different axes")
    return found


def _permute_axes(x: Shape, axes: tuple[int, ...]) -> Axes:
    names = named(len(x))
    return Axes((names,), ("".join(names[a] for a in _permutation(x, axes)),))


def _unpermute(g: Any, out: Any, x: Any, axes: tuple[int, ...]) -> Any:
    order = _permutation(x.shape, axes)
    return permute_dims(g, axes=tuple(order.index(d) for d in range(len(order))))


permute_dims: Op = register(Op(
    "permute_dims",
    kernel=lambda xp, x, axes: xp.transpose(x, axes),
    attrs={"axes": REQUIRED},
    shape=lambda x, axes: [tuple(x[a] for a in _permutation(x, axes))],
    dtype=same_dtype,
    axes=_permute_axes,
    linear=((0,),),
    vjp=(_unpermute,),
    samples=lambda: [Sample((x,), {"axes": axes}) for x, axes in [
        ((), ()), ((3,), (0,)), ((5, 4), (1, 0)), ((2, 3, 5), (2, 0, 1)), ((2, 3, 5), (-1, -3, -2)),
        ((1, 0, 3), (1, 2, 0)), ((2, 3, 1, 4), (0, 2, 3, 1))]]))


def _new_dims(x: Shape, axis: tuple[int, ...]) -> tuple[int, ...]:
    return normalize_axes(axis, len(x) + len(axis), "expand_dims")


def _expand_dims_shape(x: Shape, axis: tuple[int, ...]) -> list[Shape]:
    rest, new = iter(x), _new_dims(x, axis)
    return [tuple(1 if d in new else next(rest) for d in range(len(x) + len(new)))]


def _expand_dims_axes(x: Shape, axis: tuple[int, ...]) -> Axes:
    names, new = iter(named(len(x))), _new_dims(x, axis)
    out = "".join("." if d in new else next(names) for d in range(len(x) + len(new)))
    return Axes((named(len(x)),), (out,))


expand_dims: Op = register(Op(
    "expand_dims",
    kernel=lambda xp, x, axis: xp.expand_dims(x, axis),
    attrs={"axis": REQUIRED},
    shape=_expand_dims_shape,
    dtype=same_dtype,
    axes=_expand_dims_axes,
    linear=((0,),),
    vjp=(lambda g, out, x, axis: squeeze(g, axis=_new_dims(x.shape, axis)),),
    samples=lambda: [Sample((x,), {"axis": axis}) for x, axis in [
        ((), (0,)), ((5,), (0,)), ((5,), (-1,)), ((5, 4), (1,)), ((5, 4), (0, -1)), ((0, 3), (2,)),
        ((5, 1), ())]]))


def _dropped(x: Shape, axis: tuple[int, ...]) -> tuple[int, ...]:
    found = normalize_axes(axis, len(x), "squeeze")
    for d in found:
        if x[d] != 1:
            raise ShapeError(f"squeeze: dimension {d} of {x} has {x[d]} elements, only one of 1 can be "
                             "removed; name another axis or use reshape")
    return found


def _squeeze_axes(x: Shape, axis: tuple[int, ...]) -> Axes:
    names = named(len(x), _dropped(x, axis))
    return Axes((names,), (names.replace(".", ""),))


squeeze: Op = register(Op(
    "squeeze",
    kernel=lambda xp, x, axis: xp.squeeze(x, axis),
    attrs={"axis": REQUIRED},
    shape=lambda x, axis: [tuple(n for d, n in enumerate(x) if d not in _dropped(x, axis))],
    dtype=same_dtype,
    axes=_squeeze_axes,
    linear=((0,),),
    vjp=(lambda g, out, x, axis: expand_dims(g, axis=_dropped(x.shape, axis)),),
    samples=lambda: [Sample((x,), {"axis": axis}) for x, axis in [
        ((1,), (0,)), ((5, 1), (1,)), ((5, 1), (-1,)), ((1, 5, 1, 3), (0, 2)), ((1, 0), (0,)),
        ((1, 5, 1), (0,)), ((5, 1), ())]]))


# --- broadcast --------------------------------------------------------------------------------------

def _broadcast_shape(x: Shape, shape: Shape) -> list[Shape]:
    tail = tuple(shape[len(shape) - len(x):])
    if len(x) > len(shape) or any(m not in (1, n) for m, n in zip(x, tail, strict=True)):
        raise ShapeError(f"broadcast_to: {x} does not broadcast to {tuple(shape)}; counted from the "
                         "last, every dimension must be equal or 1")
    return [tuple(shape)]


def _broadcast_axes(x: Shape, shape: Shape) -> Axes:
    """A stretched dimension is whole in the input; in the output each worker may hold its part of it."""
    new = len(shape) - len(x)
    names = named(len(shape))
    return Axes(("".join(names[d] if n == shape[d] else "." for d, n in enumerate(x, start=new)),), (names,))


broadcast_to: Op = register(Op(
    "broadcast_to",
    kernel=lambda xp, x, shape: xp.broadcast_to(x, shape),
    attrs={"shape": REQUIRED},
    shape=_broadcast_shape,
    dtype=same_dtype,
    axes=_broadcast_axes,
    linear=((0,),),
    local=local_out_shape,
    vjp=(lambda g, out, x, shape: unbroadcast(g, x),),
    samples=lambda: [Sample((x,), {"shape": shape}) for x, shape in [
        ((), ()), ((), (3, 2)), ((1,), (5,)), ((5, 1), (5, 4)), ((5, 1), (2, 5, 4)), ((1, 3, 1), (7, 3, 2)),
        ((4,), (5, 4)), ((1,), (0,)), ((0, 1), (0, 3)), ((1, 4), (1, 4))]]))
