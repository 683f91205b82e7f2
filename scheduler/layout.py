"""Layouts: how a tensor lies on a mesh of workers.

A user writes `Shard(0)`, `Replicate()`, `Partial("sum")` (DTensor's words), one per mesh axis. Inside, a
Spec carries the same as a tuple of placements (meshtape.runtime.shards). Specs are interned: equal means
identical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.errors import LayoutError
from meshtape.runtime.protocol import TensorType
from meshtape.runtime.shards import REPLICATE, Placement, Placements, Shape, is_partial


@dataclass(frozen=True)
class Shard:
    """Dimension `dim` is divided over the mesh axis; parts differ by at most one element."""

    dim: int

    def __repr__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True)
class Replicate:
    """Every worker along the mesh axis holds the same values."""

    def __repr__(self) -> str:
        return "Replicate()"


@dataclass(frozen=True)
class Partial:
    """Every worker along the mesh axis holds an addend; the value is their sum (or max, or min)."""

    combine: str = "sum"

    def __post_init__(self) -> None:
        if self.combine not in ("sum", "max", "min"):
            raise LayoutError(f"Partial({self.combine!r}): use 'sum', 'max' or 'min'")

    def __repr__(self) -> str:
        return f"Partial({self.combine!r})"


AnyPlacement = Shard | Replicate | Partial
AnyLayout = AnyPlacement | Sequence[AnyPlacement] | Mapping[str, AnyPlacement]


@dataclass(frozen=True)
class Axes:
    """The named axes of a mesh, e.g. names ("data", "model") and shape (4, 2)."""

    names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def replicated(self) -> Placements:
        return (REPLICATE,) * len(self.shape)


class Layout(Mapping[str, AnyPlacement]):
    """One placement per named mesh axis; reads like a dict."""

    def __init__(self, names: Sequence[str], placements: Placements) -> None:
        self._items = {n: to_public(p) for n, p in zip(names, placements, strict=True)}

    def __getitem__(self, name: str) -> AnyPlacement:
        return self._items[name]

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Shard | Replicate | Partial):
            return len(self._items) == 1 and other in self._items.values()
        return isinstance(other, Mapping) and dict(self) == dict(other)

    def __repr__(self) -> str:
        if len(self._items) == 1:
            return repr(next(iter(self._items.values())))
        return "{" + ", ".join(f"{n}: {p}" for n, p in self._items.items()) + "}"


def to_public(placement: Placement) -> AnyPlacement:
    if isinstance(placement, str):
        return Partial(placement)
    return Replicate() if placement == REPLICATE else Shard(placement)


def parse_layout(layout: AnyLayout, axes: Axes, ndim: int) -> Placements:
    """The placements that `layout` means for a tensor of `ndim` dimensions on a mesh with `axes`.

    A single placement applies to the axis named "data" (else the first), and the other axes replicate; a
    mapping names its axes; a sequence gives one placement per axis. Raises LayoutError on an unknown axis or
    dimension.
    """
    out: list[Placement] = list(axes.replicated)
    if isinstance(layout, Mapping):
        for name, placement in layout.items():
            if name not in axes.names:
                raise LayoutError(f"layout names the mesh axis {name!r}; this mesh has {list(axes.names)}")
            out[axes.names.index(name)] = to_code(placement, ndim)
    elif isinstance(layout, Shard | Replicate | Partial):
        out[data_axis(axes)] = to_code(layout, ndim)
    elif isinstance(layout, Sequence) and not isinstance(layout, str):
        if len(layout) != len(axes.names):
            raise LayoutError(f"layout {list(layout)} has {len(layout)} placements; the mesh has "
                              f"{len(axes.names)} axes {list(axes.names)}: give one for each")
        out = [to_code(p, ndim) for p in layout]
    else:
        raise LayoutError(f"layout {layout!r} is none; use Shard(dim), Replicate(), Partial(), a dict by "
                          f"axis name, or a sequence with one placement per mesh axis")
    return tuple(p if n > 1 else REPLICATE for p, n in zip(out, axes.shape, strict=True))


def data_axis(axes: Axes) -> int:
    """The mesh axis that batches are split over: the one named "data", else the first."""
    return axes.names.index("data") if "data" in axes.names else 0


def to_code(placement: AnyPlacement, ndim: int) -> Placement:
    match placement:
        case Shard(dim):
            if not isinstance(dim, int | np.integer) or not -ndim <= dim < ndim:
                raise LayoutError(f"Shard({dim}) splits a dimension that a tensor of {ndim} dimensions lacks"
                                  + (f"; use {-ndim} to {ndim - 1}" if ndim else "; use Replicate()"))
            return int(dim) % ndim
        case Replicate():
            return REPLICATE
        case Partial(combine):
            return combine
    raise LayoutError(f"{placement!r} is no placement; use Shard(dim), Replicate() or Partial()")


class Spec:
    """Shape, dtype and placements of a tensor on one mesh. Interned by Specs.get: compare with `is`."""

    __slots__ = (
        "differentiable",
        "dtype",
        "ndim",
        "owner",
        "partial",
        "placements",
        "shape",
        "weak",
        "weak_type",
        "wire",
    )

    def __init__(self, owner: Any, shape: Shape, dtype: Any, placements: Placements, weak: bool) -> None:
        self.owner = owner
        self.shape = shape
        self.dtype = dtype
        self.placements = placements
        self.partial = any(is_partial(p) for p in placements)
        self.ndim = len(shape)
        self.weak = weak
        self.weak_type = dtype if weak else None
        # What travels to the workers; a scalar has none there and is never asked for it.
        self.wire = TensorType(shape, "" if weak else dtype.name, placements)
        self.differentiable = not weak and (dtype.kind in "fc" or dtype.name == "bfloat16")

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * int(self.dtype.itemsize)

    def __repr__(self) -> str:
        return f"Spec({self.shape}, {self.dtype}, {self.placements})"


class Specs:
    """The interned specs of one session."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self._known: dict[Any, Spec] = {}
        self._parsed: dict[Any, Placements] = {}
        none = axes.replicated
        self.weak = {t: Spec(self, (), t, none, True) for t in (bool, int, float, complex)}

    def placements(self, layout: AnyLayout, ndim: int) -> Placements:
        """parse_layout for this mesh; remembered for single placements, which every batch is fed with."""
        if not isinstance(layout, Shard | Replicate | Partial):
            return parse_layout(layout, self.axes, ndim)
        found = self._parsed.get((layout, ndim))
        if found is None:
            found = self._parsed[layout, ndim] = parse_layout(layout, self.axes, ndim)
        return found

    def get(self, shape: Shape, dtype: np.dtype[Any], placements: Placements) -> Spec:
        key = (shape, dtype, placements)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Spec(self, shape, dtype, placements, False)
        return found
