"""A kernel that slides over the spatial dimensions: the geometry that convolution and pooling share.

Arrays are (samples, channels, *spatial). Per spatial dimension of `n` elements, with a kernel of `k` taps
that lie `dilation` apart, windows start every `stride` elements of the padded dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.errors import ShapeError
from meshtape.runtime.shards import Shape

Pairs = tuple[tuple[int, int], ...]
SPREAD = 1024           # bytes


def check_geometry(name: str, size: Shape, kernel: Shape, stride: Shape, padding: Sequence[Any],
                   dilation: Shape) -> None:
    """Raises ShapeError unless there is one positive number (or pair of widths) per spatial dimension."""
    for what, given, least in (("kernel", kernel, 1), ("stride", stride, 1), ("dilation", dilation, 1)):
        if len(given) != len(size) or any(n < least for n in given):
            raise ShapeError(f"{name}: {what} {tuple(given)} needs {len(size)} numbers of at least {least}, "
                             f"one for each spatial dimension of {tuple(size)}")
    if len(padding) != len(size) or any(n < 0 for pair in padding for n in pair):
        raise ShapeError(f"{name}: padding {tuple(padding)} needs {len(size)} pairs (before, after) of at "
                         f"least 0, one for each spatial dimension of {tuple(size)}")


def span(kernel: int, dilation: int) -> int:
    """Elements from a window's first to its last tap."""
    return dilation * (kernel - 1) + 1


def counts(name: str, size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape) -> Shape:
    """How many windows lie within each padded dimension; raises ShapeError where there is no room for one."""
    check_geometry(name, size, kernel, stride, padding, dilation)
    found = []
    for d, (n, k, s, (lo, hi), apart) in enumerate(zip(size, kernel, stride, padding, dilation, strict=True)):
        if n + lo + hi < span(k, apart):
            raise no_room(name, d, n, lo + hi, span(k, apart))
        found.append((n + lo + hi - span(k, apart)) // s + 1)
    return tuple(found)


def no_room(name: str, dimension: int, n: int, padding: int, window: int) -> ShapeError:
    return ShapeError(f"{name}: a window spans {window} elements, spatial dimension {dimension} has {n} and "
                      f"{padding} of padding; use more padding, or a smaller kernel or dilation")


def placed(result: Any, dtype: Any, out: Any) -> Any:
    """`result` in `dtype`, in `out` if there is one."""
    if out is None:
        return result.astype(dtype, copy=False)
    out[...] = result
    return out


def innermost(xp: Any, x: Any) -> bool:
    """Whether the samples of `x` are innermost in memory, behind the spatial dimensions."""
    return not x.flags.c_contiguous and bool(xp.moveaxis(x, 0, -1).flags.c_contiguous)


def in_order_of(xp: Any, like: Any, x: Any) -> Any:
    """`x` in the memory order of `like`: arrays that are stepped through together should lie alike."""
    if innermost(xp, x) == innermost(xp, like):
        return x
    out = xp.empty_like(like, dtype=x.dtype)
    if xp is np and x.ndim > 3 and innermost(xp, out):
        turned = np.moveaxis(out, 0, -1)
        for row in range(x.shape[2]):
            lay_innermost(x[:, :, row], turned[:, row])
    else:
        out[...] = x
    return out


def lay_innermost(x: Any, target: Any) -> None:
    """Copy `x` (samples, ...), that fits into a cache, to `target` (..., samples).

    Elements of different samples that lie a multiple of a large power of two apart share few cache lines, and
    reading them in turns takes 2 to 4 ns each; over a copy that spreads them, 0.6 ns.
    """
    if x.strides[0] % SPREAD == 0:
        spread = np.empty((len(x), prod(x.shape[1:]) + 16), x.dtype)[:, :-16].reshape(x.shape)
        spread[...] = x
        x = spread
    target[...] = np.moveaxis(x, 0, -1)


def channel_rows(xp: Any, x: Any) -> Any:
    """`x` as (rows, channels, elements): a row is one sample or, with samples innermost, of all samples."""
    if innermost(xp, x):
        x = xp.moveaxis(xp.moveaxis(x, 0, -1), 0, 1)
    return x.reshape(*x.shape[:2], prod(x.shape[2:]))


def products(xp: Any, left: Any, right: Any) -> Any:
    """Matrix products; those of one column and one row are faster by broadcasting than by BLAS."""
    return left * right if left.shape[-1] == 1 else xp.matmul(left, right)


def padded(xp: Any, x: Any, padding: Pairs) -> Any:
    """`x` with zeros around its spatial dimensions."""
    if not any(lo or hi for lo, hi in padding):
        return x
    out = xp.zeros((*x.shape[:2], *(n + lo + hi for n, (lo, hi) in zip(x.shape[2:], padding, strict=True))),
                   x.dtype)
    unpadded(out, padding)[...] = x
    return out


def unpadded(x: Any, padding: Pairs) -> Any:
    """The part of a padded array that is not padding, as a view."""
    return x[(..., *(slice(lo, n - hi) for n, (lo, hi) in zip(x.shape[2:], padding, strict=True)))]


def windows(xp: Any, x: Any, kernel: Shape, stride: Shape, dilation: Shape, count: Shape) -> Any:
    """The windows of a padded `x` as a view (channels, *kernel, samples, *count)."""
    sample, channel, *steps = x.strides
    taps = [step * apart for step, apart in zip(steps, dilation, strict=True)]
    moves = [step * s for step, s in zip(steps, stride, strict=True)]
    return xp.lib.stride_tricks.as_strided(x, (x.shape[1], *kernel, x.shape[0], *count),
                                           (channel, *taps, sample, *moves))


def tap_slices(kernel: Shape, stride: Shape, dilation: Shape, count: Shape,
               first: int = 0) -> Iterator[tuple[Shape, tuple[slice, ...]]]:
    """For each tap, the elements of the padded dimensions that it meets, window after window.

    `first` is the number of the first window along the first spatial dimension.
    """
    skipped = (first,) + (0,) * (len(count) - 1)
    for tap in product(*(range(k) for k in kernel)):
        yield tap, tuple(slice(t * apart + f * s, t * apart + (f + n - 1) * s + 1, s) if n else slice(0, 0)
                         for t, apart, s, n, f in zip(tap, dilation, stride, count, skipped, strict=True))


def blocks(samples: int, count: Shape, per_window: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Runs of samples, and of windows along the first spatial dimension, that hold at most `limit` elements.

    `per_window` is what one window position needs. A block is several whole samples, or some rows of one.
    """
    per_row = per_window * prod(count[1:])
    rows = max(1, limit // max(1, per_row))
    if rows < count[0]:
        for at in range(samples):
            for row in range(0, count[0], rows):
                yield slice(at, at + 1), slice(row, min(row + rows, count[0]))
        return
    step = max(1, limit // max(1, per_row * count[0]))
    for at in range(0, samples, step):
        yield slice(at, min(at + step, samples)), slice(0, count[0])


# --- pooling: windows that may reach beyond the input -----------------------------------------------------

def pool_counts(name: str, size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                ceil_mode: bool) -> Shape:
    """Windows along each dimension. With ceil_mode the last may end outside if it starts inside."""
    check_geometry(name, size, kernel, stride, padding, dilation)
    found = []
    for d, (n, k, s, (lo, hi), apart) in enumerate(zip(size, kernel, stride, padding, dilation, strict=True)):
        window = span(k, apart)
        if 2 * max(lo, hi) > window:
            raise ShapeError(f"{name}: padding {(lo, hi)} is more than half a window of {window} elements "
                             f"(spatial dimension {d}); use less, or pad the input first")
        many, left = divmod(n + lo + hi - window, s)
        many += 1 + (ceil_mode and left > 0 and (many + 1) * s < n + lo)
        if many < 1:
            raise no_room(name, d, n, lo + hi, window)
        found.append(many)
    return tuple(found)


def meetings(n: int, kernel: int, stride: int, before: int, dilation: int,
             count: int) -> list[tuple[slice, slice] | None]:
    """For each tap of one dimension: the windows in which it meets one of `n` elements, and those."""
    found: list[tuple[slice, slice] | None] = []
    for t in range(kernel):
        shift = t * dilation - before
        first = max(0, -(shift // stride))
        last = min(count - 1, (n - 1 - shift) // stride)
        found.append(None if last < first else (slice(first, last + 1), slice(
            first * stride + shift, last * stride + shift + 1, stride)))
    return found


def tap_meetings(size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                 count: Shape) -> Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
    """(tap's number in row-major order, windows, elements) of every tap that meets an element."""
    along = [meetings(*axis) for axis in zip(size, kernel, stride, (lo for lo, _ in padding), dilation, count,
                                             strict=True)]
    for number, pairs in enumerate(product(*along)):
        met = [pair for pair in pairs if pair is not None]
        if len(met) == len(pairs):
            yield number, tuple(w for w, _ in met), tuple(e for _, e in met)
