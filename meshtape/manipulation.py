"""Shapes, joining, cutting, indexing and sorting, by their Array API names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.runtime.dtypes import AnyDType, canonical
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import broadcast_shapes, integers, lookup, normalize_axes, normalize_axis

Axis = int | Sequence[int]


def _t(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else as_tensor(x)


def astype(x: Tensor, dtype: AnyDType, /) -> Tensor:
    """`x` with its elements converted to `dtype`. Raises DTypeError."""
    wanted = canonical(dtype)
    return x if x.dtype == wanted else apply(lookup("astype"), (x,), (wanted.name,))


def reshape(x: Any, /, shape: int | Sequence[int]) -> Tensor:
    """`x` with the same elements in the same order under another shape; one extent may be -1 (worked out)."""
    t = _t(x)
    wanted = list(integers(shape, "reshape"))
    if wanted.count(-1) > 1 or any(n < -1 for n in wanted):
        raise ShapeError(f"reshape: {tuple(wanted)} leaves more than one extent open; at most one may be -1")
    if -1 in wanted:
        known = 1
        for n in wanted:
            known *= n if n != -1 else 1
        if known == 0 or t.size % known:
            raise ShapeError(f"reshape: {t.size} elements of shape {t.shape} do not fill {tuple(wanted)}")
        wanted[wanted.index(-1)] = t.size // known
    if tuple(wanted) == t.shape:
        return t
    return apply(lookup("reshape"), (t,), (tuple(wanted),))


def flatten(x: Tensor, start: int = 0, end: int = -1) -> Tensor:
    """`x` with the dimensions `start` to `end` (both included) merged into one."""
    first, last = normalize_axis(start, x.ndim, "flatten"), normalize_axis(end, x.ndim, "flatten")
    if x.ndim == 0:
        return reshape(x, (1,))
    merged = 1
    for n in x.shape[first:last + 1]:
        merged *= n
    return reshape(x, (*x.shape[:first], merged, *x.shape[last + 1:]))


def permute_dims(x: Any, /, axes: Sequence[int]) -> Tensor:
    """`x` with dimension axes[i] in place i."""
    t = _t(x)
    order = tuple(normalize_axis(a, t.ndim, "permute_dims") for a in axes)
    if sorted(order) != list(range(t.ndim)):
        raise ShapeError(f"permute_dims: axes {tuple(axes)} is no permutation of the {t.ndim} dimensions")
    if order == tuple(range(t.ndim)):
        return t
    return apply(lookup("permute_dims"), (t,), (order,))


def swapaxes(x: Tensor, axis1: int, axis2: int, /) -> Tensor:
    """`x` with two dimensions exchanged."""
    if x.ndim == 0:
        return x
    a, b = normalize_axis(axis1, x.ndim, "swapaxes"), normalize_axis(axis2, x.ndim, "swapaxes")
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return permute_dims(x, order)


def matrix_transpose(x: Tensor, /) -> Tensor:
    """`x` with its last two dimensions exchanged."""
    if x.ndim < 2:
        raise ShapeError(f"matrix_transpose: needs at least 2 dimensions, got shape {x.shape}")
    return swapaxes(x, -1, -2)


def moveaxis(x: Tensor, source: Axis, destination: Axis, /) -> Tensor:
    """`x` with the dimensions `source` moved to the places `destination`; the others keep their order."""
    src = [normalize_axis(a, x.ndim, "moveaxis") for a in integers(source, "moveaxis")]
    dst = [normalize_axis(a, x.ndim, "moveaxis") for a in integers(destination, "moveaxis")]
    if len(src) != len(dst) or len(set(src)) != len(src) or len(set(dst)) != len(dst):
        raise ShapeError(f"moveaxis: source {source} and destination {destination} do not pair up")
    order = [d for d in range(x.ndim) if d not in src]
    for to, from_ in sorted(zip(dst, src, strict=True)):
        order.insert(to, from_)
    return permute_dims(x, order)


def expand_dims(x: Any, /, axis: Axis = 0) -> Tensor:
    """`x` with new dimensions of extent 1 at the places `axis` of the result."""
    x = _t(x)
    given = integers(axis, "expand_dims")
    places = normalize_axes(given, x.ndim + len(given), "expand_dims")
    return apply(lookup("expand_dims"), (x,), (places,))


def squeeze(x: Tensor, /, axis: Axis | None = None) -> Tensor:
    """`x` without the dimensions `axis`, which must have extent 1; None: without all such."""
    if axis is None:
        over = tuple(d for d, n in enumerate(x.shape) if n == 1)
    else:
        over = normalize_axes(axis, x.ndim, "squeeze")
        for a in over:
            if x.shape[a] != 1:
                raise ShapeError(f"squeeze: dimension {a} of shape {x.shape} is not 1")
    return apply(lookup("squeeze"), (x,), (over,)) if over else x


def broadcast_to(x: Any, /, shape: Sequence[int]) -> Tensor:
    """`x` stretched to `shape` by NumPy's rules."""
    x = _t(x)
    wanted = tuple(int(n) for n in shape)
    return x if wanted == x.shape else apply(lookup("broadcast_to"), (x,), (wanted,))


def broadcast_arrays(*tensors: Any) -> list[Tensor]:
    """All tensors stretched to their common shape."""
    ts = [_t(x) for x in tensors]
    shape = broadcast_shapes("broadcast_arrays", *(t.shape for t in ts))
    return [broadcast_to(t, shape) for t in ts]


def _joined(tensors: Sequence[Any], what: str) -> tuple[Tensor, ...]:
    ts = tuple(_t(x) for x in tensors)
    if not ts:
        raise ShapeError(f"{what}: an empty list of tensors; give at least one")
    return ts


def concat(tensors: Sequence[Any], /, *, axis: int | None = 0) -> Tensor:
    """The tensors one after the other along `axis` (None: flattened first)."""
    ts = _joined(tensors, "concat")
    if axis is None:
        ts, axis = tuple(reshape(t, (-1,)) for t in ts), 0
    return apply(lookup("concat"), ts, (normalize_axis(axis, ts[0].ndim, "concat"),))


def stack(tensors: Sequence[Any], /, *, axis: int = 0) -> Tensor:
    """The tensors (of one shape) side by side along a new dimension at `axis`."""
    ts = _joined(tensors, "stack")
    return apply(lookup("stack"), ts, (normalize_axis(axis, ts[0].ndim + 1, "stack"),))


def split(x: Tensor, size_or_sections: int | Sequence[int], /, axis: int = 0) -> list[Tensor]:
    """`x` cut along `axis` into pieces of the given size (the last may be shorter) or sizes (as
    torch.split).
    """
    a = normalize_axis(axis, x.ndim, "split")
    n = x.shape[a]
    sizes = list(integers(size_or_sections, "split"))
    if not hasattr(size_or_sections, "__iter__"):
        size = sizes[0]
        if size <= 0:
            raise ShapeError(f"split: size {size}; use a positive number of elements")
        sizes = [min(size, n - at) for at in range(0, n, size)] or [0]
    else:
        if sum(sizes) != n:
            raise ShapeError(f"split: sizes {sizes} sum to {sum(sizes)}, but dimension {a} has {n}")
    out, at = [], 0
    for size in sizes:
        out.append(x[(slice(None),) * a + (slice(at, at + size),)])  # type: ignore[index]
        at += size
    return out


def unstack(x: Tensor, /, *, axis: int = 0) -> tuple[Tensor, ...]:
    """The slices of `x` along `axis`, without that dimension."""
    a = normalize_axis(axis, x.ndim, "unstack")
    return tuple(x[(slice(None),) * a + (i,)] for i in range(x.shape[a]))  # type: ignore[index]


def flip(x: Tensor, /, *, axis: Axis | None = None) -> Tensor:
    """`x` with the order along `axis` (None: all) reversed."""
    over = normalize_axes(axis, x.ndim, "flip")
    return apply(lookup("flip"), (x,), (over,)) if over else x


def roll(x: Tensor, /, shift: int | Sequence[int], *, axis: Axis | None = None) -> Tensor:
    """`x` shifted along `axis` with wrap-around; None: in the flattened order."""
    if axis is None:
        return reshape(roll(reshape(x, (-1,)), shift, axis=0), x.shape)
    axes, shifts = integers(axis, "roll"), integers(shift, "roll")
    if not hasattr(shift, "__iter__"):
        shifts *= len(axes)
    over = tuple(normalize_axis(a, x.ndim, "roll") for a in axes)
    return apply(lookup("roll"), (x,), (shifts, over))


def pad(x: Tensor, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`x` with `widths[d] = (before, after)` elements of `value` around each dimension; negative widths
    crop.
    """
    pairs = tuple((int(a), int(b)) for a, b in widths)
    if len(pairs) != x.ndim:
        raise ShapeError(f"pad: {len(pairs)} pairs of widths for {x.ndim} dimensions; give one pair for each")
    op = lookup("pad")
    return apply(op, (x,), op.pack({"widths": pairs, "value": value}))


def tril(x: Tensor, /, *, k: int = 0) -> Tensor:
    """The lower triangle of the last two dimensions, up to diagonal `k`; zeros above."""
    return apply(lookup("tril"), (x,), (int(k),))


def triu(x: Tensor, /, *, k: int = 0) -> Tensor:
    """The upper triangle of the last two dimensions, from diagonal `k`; zeros below."""
    return apply(lookup("triu"), (x,), (int(k),))


def take(x: Tensor, indices: Any, /, *, axis: int | None = None) -> Tensor:
    """The elements of `x` at integer `indices` along `axis` (None: of the flattened tensor)."""
    x, indices = (reshape(x, (-1,)), _t(indices)) if axis is None else (x, _t(indices))
    return apply(lookup("take"), (x, indices), (normalize_axis(axis or 0, x.ndim, "take"),))


def take_along_axis(x: Tensor, indices: Any, /, *, axis: int = -1) -> Tensor:
    """out[.., i, ..] = x[.., indices[.., i, ..], ..] along `axis`; the other dimensions broadcast."""
    op, indices = lookup("take_along_axis"), _t(indices)
    a = normalize_axis(axis, x.ndim, "take_along_axis")
    if x.ndim == indices.ndim:
        rest = broadcast_shapes("take_along_axis", (*x.shape[:a], 1, *x.shape[a + 1:]),
                                (*indices.shape[:a], 1, *indices.shape[a + 1:]))
        x = broadcast_to(x, (*rest[:a], x.shape[a], *rest[a + 1:]))
        indices = broadcast_to(indices, (*rest[:a], indices.shape[a], *rest[a + 1:]))
    return apply(op, (x, indices), op.pack({"axis": a}))


def cumulative_sum(x: Tensor, /, *, axis: int | None = None) -> Tensor:
    """Running sums along `axis` (None: of a 1-D tensor)."""
    op = lookup("cumsum")
    return apply(op, (x,), op.pack(
        {"axis": normalize_axis(0 if axis is None else axis, x.ndim, "cumulative_sum")}))


def sort(x: Tensor, /, *, axis: int = -1, descending: bool = False) -> Tensor:
    """The values along `axis` in order; NaN counts as largest."""
    return sort_with_indices(x, axis=axis, descending=descending)[0]


def sort_with_indices(x: Tensor, /, *, axis: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """(values in order, their int64 indices) along `axis`; stable."""
    return apply(lookup("sort"), (x,), (normalize_axis(axis, x.ndim, "sort"), bool(descending)))


def argsort(x: Tensor, /, *, axis: int = -1, descending: bool = False) -> Tensor:
    """Indices (int64) that sort along `axis`; stable."""
    return apply(lookup("argsort"), (x,), (normalize_axis(axis, x.ndim, "argsort"), bool(descending)))


def topk(x: Tensor, k: int, /, *, axis: int = -1, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) values along `axis`, in order, and their int64 indices."""
    op = lookup("topk")
    return apply(op, (x,), op.pack(
        {"k": int(k), "axis": normalize_axis(axis, x.ndim, "topk"), "largest": bool(largest)}))



__all__ = [
    "argsort",
    "astype",
    "broadcast_arrays",
    "broadcast_to",
    "concat",
    "cumulative_sum",
    "expand_dims",
    "flatten",
    "flip",
    "matrix_transpose",
    "moveaxis",
    "pad",
    "permute_dims",
    "reshape",
    "roll",
    "sort",
    "sort_with_indices",
    "split",
    "squeeze",
    "stack",
    "swapaxes",
    "take",
    "take_along_axis",
    "topk",
    "tril",
    "triu",
    "unstack",
]
