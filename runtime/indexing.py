"""NumPy-style indexing, x[key], taken apart into rows of the op table. Pure arithmetic on the driver.

A key becomes, in this order: one `slice` (ints are slices of one element), one `reshape` (drops the ints'
dimensions, adds those of None), one `index` with the integer arrays. Whatever does nothing is left out. The
dimensions of the index arrays are placed as NumPy does it: where the arrays (and ints, if there are arrays)
stand side by side, in their place; else first (https://numpy.org/doc/stable/user/basics.indexing.html).
"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.dtypes import kind
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import broadcast_shapes, dispatcher
from meshtape.runtime.ops.gather import index, index_update
from meshtape.runtime.ops.index import out_of_range
from meshtape.runtime.ops.shape import reshape
from meshtape.runtime.ops.slices import check_stretch, full_dims, normalize_slice, slice_, slice_update
from meshtape.runtime.shards import Shape

Ints = tuple[int, ...]


class Indexing(NamedTuple):
    """The steps of x[key] for an x of shape `whole`."""

    whole: Shape
    starts: Ints            # attributes of `slice`, one each per dimension of x
    stops: Ints
    steps: Ints
    sliced: Shape           # shape after `slice`
    sources: tuple[int | None, ...]     # dimensions of x that `reshape` keeps, None for a new one
    viewed: Shape           # shape after `reshape`
    dims: Ints              # attributes of `index`, and its index arrays
    at: int
    indices: tuple[Any, ...]
    result: Shape

    @property
    def slices(self) -> dict[str, Ints]:
        return {"starts": self.starts, "stops": self.stops, "steps": self.steps}

    @property
    def places(self) -> dict[str, Any]:
        return {"dims": self.dims, "at": self.at}

    @property
    def takes_all(self) -> bool:
        """True where `slice` changes nothing."""
        return all(full_dims(self.whole, self.starts, self.stops, self.steps))


class _Part(NamedTuple):
    """One entry of a key, and the dimension of x it stands for."""

    kind: str               # "int", "slice", "new", "array", or "gap" for an Ellipsis of no dimensions
    dim: int | None         # None for "new", "gap", and the array of a single True or False
    value: Any = None


def parse_index(key: Any, shape: Shape) -> Indexing:
    """The steps of x[key] for x of the given shape.

    A key is made of ints, slices, None, at most one Ellipsis, and integer arrays: anything with shape and
    dtype, or a (nested) list. Boolean lists and NumPy arrays stand for their nonzero() positions. Raises
    IndexError where NumPy does.
    """
    parts = _parts(key, shape)
    slices = [(0, n, 1) for n in shape]
    for kind_, d, value in parts:
        if d is not None and kind_ == "int":
            slices[d] = (value, value + 1, 1)
        elif d is not None and kind_ == "slice":
            slices[d] = normalize_slice(value, shape[d])
    sliced = tuple(len(range(*s)) for s in slices)
    kept = [p for p in parts if p.kind not in ("int", "gap")]
    viewed = tuple(1 if p.dim is None else sliced[p.dim] for p in kept)
    dims = tuple(d for d, p in enumerate(kept) if p.kind == "array")
    indices = tuple(p.value for p in kept if p.kind == "array")
    at = _placement(parts) if dims else 0
    rest = [n for d, n in enumerate(viewed) if d not in dims]
    starts, stops, steps = (tuple(s[i] for s in slices) for i in range(3))
    result = (*rest[:at], *_index_shape(indices), *rest[at:])
    sources = tuple(p.dim for p in kept)
    return Indexing(shape, starts, stops, steps, sliced, sources, viewed, dims, at, indices, result)


def _index_shape(indices: tuple[Any, ...]) -> Shape:
    try:
        return broadcast_shapes("index", *(tuple(i.shape) for i in indices))
    except ShapeError as error:
        raise IndexError(str(error)) from None


def _placement(parts: list[_Part]) -> int:
    """How many result dimensions stand before those of the index arrays."""
    advanced = [i for i, p in enumerate(parts) if p.kind in ("int", "array")]
    if advanced[-1] - advanced[0] + 1 != len(advanced):
        return 0
    return sum(p.kind != "gap" for p in parts[:advanced[0]])


def _parts(key: Any, shape: Shape) -> list[_Part]:
    """The entries of a key, one for every dimension of x, with the Ellipsis and what is missing filled in."""
    given = [k for entry in (key if isinstance(key, tuple) else (key,)) for k in _entry(entry)]
    used = sum(_extent(k) for k in given)
    gaps = sum(k is Ellipsis for k in given)
    if gaps > 1 or used > len(shape):
        have, most = (f"{gaps} Ellipsis", 1) if gaps > 1 else (f"{used} indices", len(shape))
        raise IndexError(f"x[...]: {have} for a tensor of shape {shape}; use at most {most}")
    fill = [slice(None)] * (len(shape) - used)
    if gaps:
        i = next(i for i, k in enumerate(given) if k is Ellipsis)
        parts = [*given[:i], *fill, *given[i + 1:]]
        # An Ellipsis for no dimension still keeps the arrays on its two sides apart.
        found = _numbered(parts, shape)
        return found if fill else [*found[:i], _Part("gap", None), *found[i:]]
    return _numbered([*given, *fill], shape)


def _extent(entry: Any) -> int:
    """Dimensions of x that an entry stands for."""
    return 0 if entry is None or entry is Ellipsis or isinstance(entry, _Truth) else 1


class _Truth(NamedTuple):
    """A single True or False as an index: a new dimension, of which 1 or 0 elements are taken."""

    array: Any


class _Mask(NamedTuple):
    """Positions of a boolean mask's true elements along one of its dimensions, and the extent of that."""

    array: Any
    extent: int


def _entry(entry: Any) -> list[Any]:
    """What one entry of a key stands for: an int, a slice, None, Ellipsis, a _Truth, _Masks, or an array."""
    if entry is None or entry is Ellipsis or isinstance(entry, slice):
        return [entry]
    if isinstance(entry, bool | np.bool_):
        return [_Truth(np.zeros(int(entry), np.int64))]
    if isinstance(entry, list | tuple | range):
        array = np.asarray(entry)
        entry = array.astype(np.int64) if not array.size else array
    if not hasattr(entry, "shape"):
        try:
            return [operator.index(entry)]
        except TypeError:
            raise IndexError(f"x[{entry!r}]: an index must be an int, a slice, None, Ellipsis, or an array "
                             "of integers or booleans") from None
    known = isinstance(entry, np.ndarray | np.generic)
    of = kind(np.dtype(entry.dtype))
    if of == 0 and known:
        if not np.ndim(entry):
            return [_Truth(np.zeros(int(entry), np.int64))]
        return [_Mask(i, n) for i, n in zip(np.nonzero(entry), entry.shape, strict=True)]
    if of != 1:
        raise IndexError(f"x[...]: an index array must be of integers, got {np.dtype(entry.dtype).name}; "
                         + ("use nonzero, whose result's shape depends on values" if of == 0 else "cast it"))
    return [int(entry)] if known and not entry.shape else [entry]


def _numbered(entries: list[Any], shape: Shape) -> list[_Part]:
    """Entries with the dimensions of x they stand for, ints and NumPy arrays checked against its extent."""
    parts, d = [], 0
    for entry in entries:
        if entry is None:
            parts.append(_Part("new", None))
            continue
        if isinstance(entry, _Truth):
            parts.append(_Part("array", None, entry.array))
            continue
        n = shape[d]
        if isinstance(entry, slice):
            parts.append(_Part("slice", d, entry))
        elif isinstance(entry, _Mask):
            if entry.extent != n:
                raise IndexError(f"x[...]: the mask has {entry.extent} elements along dimension {d} of {n}; "
                                 "give a mask of equal extent")
            parts.append(_Part("array", d, entry.array))
        elif isinstance(entry, int):
            if not -n <= entry < n:
                raise out_of_range("x[...]", entry, n, d)
            parts.append(_Part("int", d, entry % n))
        else:
            if isinstance(entry, np.ndarray) and entry.size and not (-n <= entry.min() and entry.max() < n):
                raise out_of_range("x[...]", entry, n, d)
            parts.append(_Part("array", d, entry))
        d += 1
    return parts


# --- carrying the steps out -------------------------------------------------------------------------

def read(x: Any, key: Any) -> Any:
    """x[key], recorded as rows. Raises IndexError."""
    plain = _without_arrays(key)
    if plain is not None:
        cut, view = _plain_reading(plain, x.shape)
        record = dispatcher((x,))
        x = record(slice_, (x,), cut) if cut is not None else x
        return record(reshape, (x,), view) if view is not None else x
    steps = parse_index(key, tuple(x.shape))
    if not steps.takes_all:
        x = slice_(x, **steps.slices)
    if steps.viewed != steps.sliced:
        x = reshape(x, shape=steps.viewed)
    if steps.indices:
        x = index(x, *steps.indices, **steps.places)
    return x


def _without_arrays(key: Any) -> tuple[Any, ...] | None:
    """A hashable form of a key of ints, slices, None and Ellipsis; None for any other."""
    found: list[Any] = []
    for k in key if type(key) is tuple else (key,):
        if type(k) is slice:
            ends = (k.start, k.stop, k.step)
            if any(n is not None and type(n) is not int for n in ends):
                return None
            found.append(ends)
        elif type(k) is int or k is None or k is Ellipsis:
            found.append(k)
        else:
            return None
    return tuple(found)


@lru_cache(maxsize=4096)
def _plain_steps(key: tuple[Any, ...], shape: Shape) -> Indexing:
    return parse_index(tuple(slice(*k) if type(k) is tuple else k for k in key), shape)


@lru_cache(maxsize=4096)
def _plain_reading(key: tuple[Any, ...], shape: Shape) -> tuple[Any, Any]:
    """Attribute values of the slice and the reshape that read `key`, None for a step that does nothing."""
    steps = _plain_steps(key, shape)
    return (None if steps.takes_all else slice_.pack(steps.slices),
            None if steps.viewed == steps.sliced else reshape.pack({"shape": steps.viewed}))


def write(x: Any, key: Any, value: Any) -> Any:
    """A copy of `x` with `value` (a tensor or a Python scalar) written at `key`.

    Where index arrays select an element more than once the last value wins, as in NumPy, and every one of
    those values gets the element's gradient, as in PyTorch. Raises IndexError, ShapeError.
    """
    plain = _without_arrays(key)
    steps = parse_index(key, tuple(x.shape)) if plain is None else _plain_steps(plain, tuple(x.shape))
    if not steps.indices:
        return slice_update(x, _fitted(steps, value), **steps.slices)
    value = _unled(value, steps.result)
    part = x if steps.takes_all else slice_(x, **steps.slices)
    if steps.viewed != steps.sliced:
        part = reshape(part, shape=steps.viewed)
    part = index_update(part, value, *steps.indices, **steps.places)
    if steps.viewed != steps.sliced:
        part = reshape(part, shape=steps.sliced)
    return part if steps.takes_all else slice_update(x, part, **steps.slices)


def _unled(value: Any, target: Shape) -> Any:
    """`value` without leading dimensions of 1 that `target` has no place for (NumPy drops them)."""
    shape = tuple(getattr(value, "shape", ()))
    extra = max(len(shape) - len(target), 0)
    if extra and all(n == 1 for n in shape[:extra]):
        value, shape = reshape(value, shape=shape[extra:]), shape[extra:]
    check_stretch("x[...] = value", shape, target)
    return value


def _fitted(steps: Indexing, value: Any) -> Any:
    """`value`, which broadcasts to the result, reshaped so that it broadcasts to the sliced part of x."""
    value = _unled(value, steps.result)
    shape = tuple(getattr(value, "shape", ()))
    if steps.viewed == steps.sliced or not shape:
        return value
    full = (1,) * (len(steps.viewed) - len(shape)) + shape
    extents = dict(zip(steps.sources, full, strict=True))
    wanted = tuple(extents.get(d, 1) for d in range(len(steps.whole)))
    return value if wanted == shape else reshape(value, shape=wanted)
