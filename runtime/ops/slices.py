"""Rows that read and write at slices.

Each dimension has one (start, stop, step) with the meaning of range(): a stop of -1 lies before the first
element. A dimension that is taken whole may be split, the others may not.
"""

from __future__ import annotations

from typing import Any

from meshtape.runtime.dtypes import kind
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import ALPHABET, IO, REQUIRED, Axes, Op, Sample, register
from meshtape.runtime.ops.rules import unbroadcast
from meshtape.runtime.shards import Shape

Attrs = dict[str, Any]
Ints = tuple[int, ...]
SLICES: Attrs = {"starts": REQUIRED, "stops": REQUIRED, "steps": REQUIRED}


def normalize_slice(given: slice, extent: int) -> tuple[int, int, int]:
    """start, stop, step of `given` on a dimension of `extent` elements; equal for equal selections."""
    found = range(*given.indices(extent))
    if not found:
        return 0, 0, 1
    if len(found) == 1:
        return found[0], found[0] + 1, 1
    return found[0], found[-1] + (1 if found.step > 0 else -1), found.step


def slice_attrs(shape: Shape, key: tuple[slice, ...]) -> dict[str, Ints]:
    """Attributes of the rows below for one Python slice per dimension."""
    found = [normalize_slice(k, n) for k, n in zip(key, shape, strict=True)]
    return {name: tuple(f[i] for f in found) for i, name in enumerate(SLICES)}


def full_dims(shape: Shape, starts: Ints, stops: Ints, steps: Ints) -> tuple[bool, ...]:
    """True for every dimension that is taken whole and in order."""
    return tuple((a, b, s) == (0, n, 1) for n, a, b, s in zip(shape, starts, stops, steps, strict=True))


def sliced_shape(name: str, shape: Shape, starts: Ints, stops: Ints, steps: Ints) -> Shape:
    """Extents of the selection; raises ShapeError where it leaves `shape`."""
    if not len(shape) == len(starts) == len(stops) == len(steps):
        raise ShapeError(f"{name}: got {starts}, {stops}, {steps} for the {len(shape)} dimensions of "
                         f"{shape}; give one start, stop and step for each")
    out = []
    for d, (n, a, b, s) in enumerate(zip(shape, starts, stops, steps, strict=True)):
        found = range(a, b, s)
        if found and not (0 <= found[0] < n and 0 <= found[-1] < n):
            raise ShapeError(f"{name}: slice {(a, b, s)} leaves dimension {d} of {n} elements; clip it first")
        out.append(len(found))
    return tuple(out)


def key_of(starts: Ints, stops: Ints, steps: Ints) -> tuple[slice, ...]:
    return tuple(slice(a, None if b < 0 else b, s) for a, b, s in zip(starts, stops, steps, strict=True))


def slice_letters(shape: Shape, starts: Ints, stops: Ints, steps: Ints) -> str:
    full = full_dims(shape, starts, stops, steps)
    return "".join(ALPHABET[d] if whole else "." for d, whole in enumerate(full))


def local_slices(attrs: Attrs, whole: Shape, local: Shape) -> Attrs:
    """Of a dimension that is taken whole a worker takes its whole piece."""
    full = full_dims(whole, attrs["starts"], attrs["stops"], attrs["steps"])
    stops = tuple(m if f else b for f, m, b in zip(full, local, attrs["stops"], strict=True))
    return {**attrs, "stops": stops}


def _source_local(attrs: Attrs, io: IO) -> Attrs:
    source = io.ins[0]
    assert source is not None
    return local_slices(attrs, source.whole, source.shape)


def _target_local(attrs: Attrs, io: IO) -> Attrs:
    target = io.outs[0]
    return {**local_slices(attrs, target.whole, target.shape), "shape": target.shape}


def _cases() -> list[tuple[Shape, dict[str, Ints]]]:
    every = slice(None)
    cases: list[tuple[Shape, tuple[slice, ...]]] = [
        ((), ()), ((5,), (slice(1, 4),)), ((5,), (slice(None, None, -1),)), ((5, 4), (slice(2, 3), every)),
        ((5, 4), (every, slice(3, None, -2))), ((5, 4, 3), (every, slice(1, 3), every)),
        ((1, 7), (every, slice(0, 7, 3))), ((0, 3), (every, slice(1, 2))), ((4, 3), (slice(2, 2), every))]
    return [(shape, slice_attrs(shape, key)) for shape, key in cases]


# --- slice ------------------------------------------------------------------------------------------

def _slice_axes(x: Shape, starts: Ints, stops: Ints, steps: Ints) -> Axes:
    names = slice_letters(x, starts, stops, steps)
    return Axes((names,), (names,))


slice_: Op = register(Op(
    "slice",
    kernel=lambda xp, x, starts, stops, steps: x[key_of(starts, stops, steps)],
    attrs=SLICES,
    shape=lambda x, **slices: [sliced_shape("slice", x, **slices)],
    dtype=lambda x, **slices: ([x], [x]),
    axes=_slice_axes,
    linear=((0,),),
    local=_source_local,
    vjp=(lambda g, out, x, **slices: slice_scatter(g, shape=x.shape, **slices),),
    samples=lambda: [Sample((shape,), attrs) for shape, attrs in _cases()]))


def slice_along(x: Any, axis: int, start: int, stop: int) -> Any:
    """Elements start to stop of `x` along one axis (0 <= start <= stop <= extent, axis >= 0)."""
    n = len(x.shape)
    return slice_(x, starts=tuple(start if d == axis else 0 for d in range(n)),
                  stops=tuple(stop if d == axis else m for d, m in enumerate(x.shape)), steps=(1,) * n)


# --- slice_scatter: its derivative, zeros outside the slices ----------------------------------------

def _scatter(xp: Any, x: Any, shape: Shape, starts: Ints, stops: Ints, steps: Ints) -> Any:
    out = xp.zeros(shape, x.dtype)
    out[key_of(starts, stops, steps)] = x
    return out


def _scatter_shape(x: Shape, shape: Shape, **slices: Ints) -> list[Shape]:
    wanted = sliced_shape("slice_scatter", shape, **slices)
    if wanted != x:
        raise ShapeError(f"slice_scatter: the slices of {shape} have the shape {wanted}, got {x}")
    return [tuple(shape)]


slice_scatter: Op = register(Op(
    "slice_scatter",
    kernel=_scatter,
    attrs={"shape": REQUIRED, **SLICES},
    shape=_scatter_shape,
    dtype=lambda x, **attrs: ([x], [x]),
    axes=lambda x, shape, **slices: _slice_axes(shape, **slices),
    linear=((0,),),
    local=_target_local,
    vjp=(lambda g, out, x, shape, **slices: slice_(g, **slices),),
    samples=lambda: [Sample((sliced_shape("", shape, **attrs),), {"shape": shape, **attrs})
                     for shape, attrs in _cases()]))


# --- slice_update: a copy of x with a value written at the slices ------------------------------------

def written_dtype(name: str, x: Any, value: Any) -> Any:
    """What `value` is cast to before it is written into `x`; a weak scalar is left alone."""
    if kind(value) == 3 and kind(x) != 3:
        raise DTypeError(f"{name}: a complex value does not fit into a tensor of {x}; take its real part")
    return value if isinstance(value, type) else x


def check_stretch(name: str, value: Shape, target: Shape) -> None:
    """ShapeError unless `value` broadcasts to `target`."""
    tail = target[len(target) - len(value):]
    if len(value) > len(target) or any(m not in (1, n) for m, n in zip(value, tail, strict=True)):
        raise ShapeError(f"{name}: a value of shape {value} does not broadcast to the selected part, "
                         f"{target}; reshape it")


def stretch_letters(value: Shape, target: Shape, names: str) -> str:
    """Letters of `value`, which broadcasts to `target` with the letters `names`."""
    new = len(target) - len(value)
    return "".join(names[d] if n == target[d] else "." for d, n in enumerate(value, start=new))


def _update(xp: Any, x: Any, value: Any, starts: Ints, stops: Ints, steps: Ints) -> Any:
    out = x.copy()
    out[key_of(starts, stops, steps)] = value
    return out


def _update_shape(x: Shape, value: Shape, **slices: Ints) -> list[Shape]:
    check_stretch("slice_update", value, sliced_shape("slice_update", x, **slices))
    return [x]


def _update_axes(x: Shape, value: Shape, **slices: Ints) -> Axes:
    names = slice_letters(x, **slices)
    return Axes((names, stretch_letters(value, sliced_shape("", x, **slices), names)), (names,))


def _update_samples() -> list[Sample]:
    columns = slice_attrs((5, 4), (slice(None), slice(1, 3)))
    return [Sample((shape, sliced_shape("", shape, **attrs)), attrs) for shape, attrs in _cases()] + [
        Sample(((5, 4), value), columns) for value in ((), (2,), (5, 1), 1.5)]


slice_update: Op = register(Op(
    "slice_update",
    kernel=_update,
    attrs=SLICES,
    shape=_update_shape,
    dtype=lambda x, value, **slices: ([x, written_dtype("slice_update", x, value)], [x]),
    axes=_update_axes,
    linear=((0, 1),),
    local=_source_local,
    vjp=(lambda g, out, x, value, **slices: slice_update(g, 0.0, **slices),
         lambda g, out, x, value, **slices: unbroadcast(slice_(g, **slices), value)),
    samples=_update_samples))
