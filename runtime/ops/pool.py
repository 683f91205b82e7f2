"""Pooling over windows of the spatial dimensions: the largest element, or the average.

x is (samples, channels, *spatial). A kernel goes over the taps of the window, each of which is one strided
slice of the input, so that nothing is gathered or padded. Samples and channels may be split, spatial
dimensions never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.kernels import pool as device_kernels
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import REQUIRED, Axes, Op, Sample, register
from meshtape.runtime.ops.contraction import widen
from meshtape.runtime.ops.rules import COMPLEX, floated, promoted
from meshtape.runtime.ops.windows import Pairs, in_order_of, meetings, placed, pool_counts, span, tap_meetings
from meshtape.runtime.shards import Shape
from meshtape.runtime.tables import tables

Attrs = dict[str, Any]

POOL: Attrs = {"kernel": REQUIRED, "stride": REQUIRED, "padding": REQUIRED, "dilation": REQUIRED,
               "ceil_mode": False}
CACHED = 1 << 17        # elements of a run of samples over which all taps go before the next run


# --- rules that the rows share --------------------------------------------------------------------------

def _check_rank(name: str, x: Shape) -> None:
    if len(x) < 3:
        raise ShapeError(f"{name}: needs (samples, channels, *spatial), got {x}")


def _letters(ndim: int) -> str:
    return "nc" + "." * (ndim - 2)


def _pool_axes(*shapes: Shape, **attrs: Any) -> Axes:
    names = _letters(len(shapes[0]))
    return Axes((names,) * len(shapes), (names,))


def _same_size(name: str, given: Shape, needed: Shape) -> None:
    if given != needed:
        raise ShapeError(f"{name}: the windows of this input are {needed}, got {given}")


def _runs(xp: Any, x: Any) -> Iterator[tuple[slice, ...]]:
    """Runs of samples, or of channels if they are outermost in memory, that stay in cache."""
    axis = int(x.strides[1] > x.strides[0])
    step = max(1, CACHED // max(1, x.size // max(1, x.shape[axis]))) if xp is np else max(1, x.shape[axis])
    return ((slice(None),) * axis + (slice(at, at + step),) for at in range(0, x.shape[axis], step))


# --- the largest ----------------------------------------------------------------------------------------
# The second output is, for every window, the number of the tap that holds its largest element (the first of
# equal ones, in row-major order): one byte, where the element's index would take eight.

def tap_dtype(kernel: Shape) -> Any:
    return dtypes.uint8 if prod(kernel) <= 256 else dtypes.int32


def _max_shape(x: Shape, **geometry: Any) -> list[Shape]:
    _check_rank("max_pool", x)
    count = pool_counts("max_pool", x[2:], **geometry)
    for d, first in enumerate(_first_taps(x[2:], count=count, **geometry)):
        if None in first:
            raise ShapeError(f"max_pool: a window meets no element of spatial dimension {d} of {x}; use less "
                             f"padding or dilation")
    return [(*x[:2], *count)] * 2


def _first_taps(size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape, count: Shape,
                **rest: Any) -> list[list[int | None]]:
    """For each dimension, every window's first tap that meets an element."""
    found = []
    for n, k, s, (lo, _), apart, windows in zip(size, kernel, stride, padding, dilation, count, strict=True):
        first: list[int | None] = [None] * windows
        for tap, met in reversed(list(enumerate(meetings(n, k, s, lo, apart, windows)))):
            if met is not None:
                first[met[0]] = [tap] * (met[0].stop - met[0].start)
        found.append(first)
    return found


def _max_dtype(x: Any, kernel: Shape, **attrs: Any) -> tuple[Any, Any]:
    (x,), _ = promoted(COMPLEX)("max_pool")(x)
    return (x,), (x, tap_dtype(kernel))


def _max_pool(xp: Any, x: Any, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
              ceil_mode: bool) -> Any:
    size = x.shape[2:]
    count = pool_counts("max_pool", size, kernel, stride, padding, dilation, ceil_mode)
    shape = (*x.shape[:2], *count)
    # In the memory order of x, as samples may be innermost.
    best, tap = xp.empty_like(x, shape=shape), xp.empty_like(x, dtype=tap_dtype(kernel), shape=shape)
    starts, numbers = _first_elements(xp, size, kernel, stride, padding, dilation, count)
    # The first tap is the first element of every window that meets it.
    met = [case for case in tap_meetings(size, kernel, stride, padding, dilation, count) if case[0]]
    for run in _runs(xp, x):
        block, top, number = x[run], best[run], tap[run]
        top[...] = block[(..., *starts)]
        number[...] = numbers
        for k, windows, elements in met:
            value, here = block[(..., *elements)], (..., *windows)
            larger = (value > top[here]).view(dtypes.uint8).astype(tap.dtype, copy=False)
            larger *= tap.dtype.type(k)
            # Taps come in order: the last that was larger has the largest number.
            xp.maximum(number[here], larger, out=number[here])
            xp.maximum(top[here], value, out=top[here])
    return best, tap


def _first_elements(xp: Any, size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                    count: Shape) -> tuple[tuple[Any, ...], Any]:
    """Index of every window's first element, and the number of the tap that meets it."""
    places = tables(xp, _first_places, size, kernel, stride, padding, dilation, count)
    if not places:
        return tuple(slice(0, (n - 1) * s + 1, s) for n, s in zip(count, stride, strict=True)), 0
    return places[:-1], places[-1]


def _first_places(size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                  count: Shape) -> tuple[np.ndarray[Any, Any], ...]:
    """The indices and the numbers of _first_elements, or nothing if every window begins with its tap 0."""
    first = [np.array(f, np.int64) for f in _first_taps(size, kernel, stride, padding, dilation, count)]
    numbers = np.zeros((), np.int64)
    for k, f in zip(kernel, first, strict=True):
        numbers = numbers[..., None] * k + f
    if not numbers.any():
        return ()
    places = [np.arange(n) * s - lo + f * apart for n, s, (lo, _), f, apart
              in zip(count, stride, padding, first, dilation, strict=True)]
    return *np.ix_(*places), numbers


def _max_grad_shape(g: Shape, tap: Shape, size: Shape, **geometry: Any) -> list[Shape]:
    _check_rank("max_pool_grad", g)
    x = (*g[:2], *size)
    _same_size("max_pool_grad", g, _max_shape(x, **geometry)[0])
    _same_size("max_pool_grad", tap, g)
    return [x]


def _max_grad(xp: Any, g: Any, tap: Any, size: Shape, kernel: Shape, stride: Shape, padding: Pairs,
              dilation: Shape, ceil_mode: bool, out: Any = None) -> Any:
    dtype = g.dtype
    g = in_order_of(xp, tap, widen(g))
    apart = all(s >= span(k, d) for s, k, d in zip(stride, kernel, dilation, strict=True))
    # Windows side by side from the first element to the last leave none out.
    tiled = apart and stride == kernel and not any(lo for lo, _ in padding) and all(
        n * s == m for n, s, m in zip(g.shape[2:], stride, size, strict=True))
    total = (xp.empty_like if tiled else xp.zeros_like)(tap, dtype=g.dtype, shape=(*g.shape[:2], *size))
    met = list(tap_meetings(size, kernel, stride, padding, dilation, g.shape[2:]))
    for run in _runs(xp, total):
        upstream, number, target = g[run], tap[run], total[run]
        for k, windows, elements in met:
            here, there = (..., *windows), (..., *elements)
            if apart:
                xp.multiply(upstream[here], number[here] == k, out=target[there])
            else:
                target[there] += upstream[here] * (number[here] == k)
    return placed(total, dtype, out)


def _max_take_shape(x: Shape, tap: Shape, **geometry: Any) -> list[Shape]:
    _same_size("max_pool_take", tap, _max_shape(x, **geometry)[0])
    return [tap]


def _max_take(xp: Any, x: Any, tap: Any, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
              ceil_mode: bool) -> Any:
    """Of each window the element at its tap."""
    out = xp.zeros(tap.shape, x.dtype)
    for k, windows, elements in tap_meetings(x.shape[2:], kernel, stride, padding, dilation, tap.shape[2:]):
        here = (..., *windows)
        out[here] += x[(..., *elements)] * (tap[here] == k)
    return out


def _max_index(xp: Any, tap: Any, size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
               ceil_mode: bool) -> Any:
    """The row-major index of each window's largest element among the spatial elements."""
    rest, out, step = tap.astype(dtypes.int64), xp.zeros(tap.shape, dtypes.int64), 1
    for d in reversed(range(len(size))):
        shape = (-1, *(1,) * (len(size) - 1 - d))
        start = (xp.arange(tap.shape[2 + d]) * stride[d] - padding[d][0]).reshape(shape)
        out += (start + rest % kernel[d] * dilation[d]) * step
        rest //= kernel[d]
        step *= size[d]
    return out


def _with_taps(name: str) -> Callable[..., Any]:
    def rule(x: Any, tap: Any, **attrs: Any) -> tuple[Any, Any]:
        (x,), out = promoted(COMPLEX)(name)(x)
        return (x, tap), out
    return rule


# --- averages -------------------------------------------------------------------------------------------
# `divisor` is what the sums are divided by; None: the elements of the window, with the padding if asked for.

AVERAGE: Attrs = {"kernel": REQUIRED, "stride": REQUIRED, "padding": REQUIRED, "ceil_mode": False,
                  "count_include_pad": True, "divisor": None}


def _average_counts(size: Shape, kernel: Shape, stride: Shape, padding: Pairs, ceil_mode: bool) -> Shape:
    return pool_counts("avg_pool", size, kernel, stride, padding, (1,) * len(kernel), ceil_mode)


def _avg_shape(x: Shape, count_include_pad: bool, divisor: int | None, **geometry: Any) -> list[Shape]:
    _check_rank("avg_pool", x)
    if divisor == 0:
        raise ShapeError("avg_pool: the divisor is 0; give another number, or None")
    return [(*x[:2], *_average_counts(x[2:], **geometry))]


def _avg_grad_shape(g: Shape, size: Shape, **attrs: Any) -> list[Shape]:
    _check_rank("avg_pool_grad", g)
    x = (*g[:2], *size)
    _same_size("avg_pool_grad", g, _avg_shape(x, **attrs)[0])
    return [x]


def _divided(xp: Any, sums: Any, size: Shape, kernel: Shape, stride: Shape, padding: Pairs,
             count_include_pad: bool, divisor: int | None) -> Any:
    """`sums` over the windows, divided by what each window counts."""
    if divisor is not None:
        return sums / sums.dtype.type(divisor)
    counted, = tables(xp, _counted, size, kernel, stride, padding, sums.shape[2:], count_include_pad,
                      sums.dtype)
    return sums / counted


def _counted(size: Shape, kernel: Shape, stride: Shape, padding: Pairs, count: Shape, count_include_pad: bool,
             dtype: Any) -> tuple[np.ndarray[Any, Any]]:
    """How many elements every window counts."""
    counted = np.ones(())
    for n, k, s, (lo, hi), many in zip(size, kernel, stride, padding, count, strict=True):
        start = np.arange(many) * s - lo
        stop = np.minimum(start + k, n + hi)
        if not count_include_pad:
            start, stop = np.maximum(start, 0), np.minimum(stop, n)
        counted = counted[..., None] * (stop - start)
    return counted.astype(dtype),


def _avg_pool(xp: Any, x: Any, kernel: Shape, stride: Shape, padding: Pairs, ceil_mode: bool,
              count_include_pad: bool, divisor: int | None) -> Any:
    """Sums along one dimension after the other."""
    dtype, size = x.dtype, x.shape[2:]
    count = _average_counts(size, kernel, stride, padding, ceil_mode)
    x = widen(x)
    for d, (n, k, s, (lo, _), many) in enumerate(zip(size, kernel, stride, padding, count, strict=True)):
        lead = (slice(None),) * (2 + d)
        sums = xp.zeros_like(x, shape=(*x.shape[:2 + d], many, *x.shape[3 + d:]))
        for met in meetings(n, k, s, lo, 1, many):
            if met is not None:
                sums[(*lead, met[0])] += x[(*lead, met[1])]
        x = sums
    x = _divided(xp, x, size, kernel, stride, padding, count_include_pad, divisor)
    return x.astype(dtype, copy=False)


def _avg_pool_grad(xp: Any, g: Any, size: Shape, kernel: Shape, stride: Shape, padding: Pairs,
                   ceil_mode: bool, count_include_pad: bool, divisor: int | None) -> Any:
    dtype, count = g.dtype, g.shape[2:]
    g = _divided(xp, widen(g), size, kernel, stride, padding, count_include_pad, divisor)
    for d, (n, k, s, (lo, _), many) in enumerate(zip(size, kernel, stride, padding, count, strict=True)):
        lead = (slice(None),) * (2 + d)
        out = xp.zeros_like(g, shape=(*g.shape[:2 + d], n, *g.shape[3 + d:]))
        for met in meetings(n, k, s, lo, 1, many):
            if met is not None:
                out[(*lead, met[1])] += g[(*lead, met[0])]
        g = out
    return g.astype(dtype, copy=False)


# --- averages over as many windows as asked for -----------------------------------------------------------
# Window i of m over n elements goes from floor(i n / m) to ceil((i + 1) n / m), as in torch.

def adaptive_bounds(n: int, m: int) -> list[tuple[int, int]]:
    return [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]


def _averaging(n: int, m: int, dtype: Any) -> tuple[np.ndarray[Any, Any]]:
    """The (m, n) matrix that averages n elements over m windows."""
    found = np.zeros((m, n))
    for row, (start, stop) in zip(found, adaptive_bounds(n, m), strict=True):
        row[start:stop] = 1 / (stop - start)
    return found.astype(dtype),


def _adaptive_shape(x: Shape, count: Shape) -> list[Shape]:
    _check_rank("adaptive_avg_pool", x)
    if len(count) != len(x) - 2 or any(m < 1 for m in count) or not all(x[2:]):
        raise ShapeError(f"adaptive_avg_pool: output size {tuple(count)} needs {len(x) - 2} positive "
                         f"numbers, one for each spatial dimension of {x}, none of which may be empty")
    return [(*x[:2], *count)]


def _adaptive_grad_shape(g: Shape, size: Shape) -> list[Shape]:
    _adaptive_shape((*g[:2], *size), g[2:])
    return [(*g[:2], *size)]


def _adaptive(backward: bool) -> Callable[..., Any]:
    def kernel(xp: Any, x: Any, **attrs: Any) -> Any:
        dtype = x.dtype
        x = widen(x)
        (wanted,) = attrs.values()
        for d, m in enumerate(wanted, start=2):
            n = x.shape[d]
            matrix, = tables(xp, _averaging, *((m, n) if backward else (n, m)), x.dtype)
            product = xp.tensordot(x, matrix, axes=(d, 0 if backward else 1))
            x = xp.moveaxis(product, -1, d)
        return x.astype(dtype, copy=False)
    return kernel


# --- rows -----------------------------------------------------------------------------------------------

def _geometry(x: Shape, kernel: Shape, given: Attrs) -> Attrs:
    d = len(kernel)
    return {"kernel": kernel, "stride": kernel, "padding": ((0, 0),) * d, "dilation": (1,) * d,
            "ceil_mode": False, **given}


def _max_cases() -> list[tuple[Shape, Attrs]]:
    cases: tuple[tuple[Shape, Shape, Attrs], ...] = (
        ((2, 3, 4, 6), (2, 2), {}), ((3, 2, 7), (3,), {"stride": (2,), "padding": ((1, 1),)}),
        ((2, 2, 5, 6), (3, 2), {"stride": (2, 1), "ceil_mode": True, "padding": ((1, 0), (0, 1))}),
        ((1, 3, 7), (2,), {"dilation": (3,), "stride": (1,)}), ((0, 2, 4), (2,), {}),
        ((2, 1, 5, 5), (2, 2), {"ceil_mode": True}), ((2, 2, 3, 3), (1, 2), {"stride": (2, 3)}))
    return [(x, _geometry(x, kernel, given)) for x, kernel, given in cases]


def _max_samples() -> list[Sample]:
    ties = np.array([[[2.0, 2.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 2.0, 2.0, 1.0]]])
    attrs = _geometry((1, 3, 5), (3,), {"stride": (1,), "padding": ((1, 1),)})
    return [*(Sample((x,), a, distinct=True) for x, a in _max_cases()), Sample((ties,), attrs, diff=False),
            Sample(((3, 2, 6),), _geometry((3, 2, 6), (2,), {}), "int32", -5, 5, diff=False)]


def _tapped(x: Shape, attrs: Attrs) -> Any:
    return _max_pool(np, np.random.default_rng(0).normal(size=x), **attrs)[1]


def _avg_samples(of: Callable[[Shape, Attrs], Sample]) -> Callable[[], list[Sample]]:
    options: tuple[Attrs, ...] = ({}, {"count_include_pad": False}, {"count_include_pad": False}, {}, {},
                                  {"divisor": 3}, {"divisor": -2})
    cases = [(x, {k: v for k, v in a.items() if k != "dilation"}, o)
             for (x, a), o in zip(_max_cases(), options, strict=True)]
    return lambda: [of(x, {"count_include_pad": True, "divisor": None, **a, **o}) for x, a, o in cases]


_ADAPTIVE: tuple[tuple[Shape, Shape], ...] = (
    ((2, 3, 5, 7), (2, 3)), ((3, 2, 4), (4,)), ((1, 2, 3), (5,)), ((0, 2, 3, 3), (1, 1)))

max_pool: Op = register(Op(
    "max_pool", kernel=_max_pool, attrs=POOL, shape=_max_shape, dtype=_max_dtype, n_out=2,
    axes=lambda x, **attrs: Axes((_letters(len(x)),), (_letters(len(x)),) * 2), keeps="out1",
    vjp=(lambda g, out, x, **attrs: None if g[0] is None else max_pool_grad(
        g[0], out[1], size=tuple(x.shape[2:]), **attrs),),
    samples=_max_samples, device=device_kernels.MAX_POOL))
max_pool_grad: Op = register(Op(
    "max_pool_grad", kernel=_max_grad, attrs={"size": REQUIRED, **POOL}, shape=_max_grad_shape,
    dtype=_with_taps("max_pool_grad"), axes=_pool_axes, linear=((0,),), keeps="tap",
    vjp=(lambda u, out, g, tap, size, **attrs: max_pool_take(u, tap, **attrs), None),
    samples=lambda: [Sample((_max_shape(x, **a)[0], _tapped(x, a)), {"size": x[2:], **a})
                     for x, a in _max_cases()], device=device_kernels.MAX_POOL_GRAD))
max_pool_take: Op = register(Op(
    "max_pool_take", kernel=_max_take, attrs=POOL, shape=_max_take_shape, dtype=_with_taps("max_pool_take"),
    axes=_pool_axes, linear=((0,),), keeps="tap",
    vjp=(lambda g, out, x, tap, **attrs: max_pool_grad(g, tap, size=tuple(x.shape[2:]), **attrs), None),
    samples=lambda: [Sample((x, _tapped(x, a)), a) for x, a in _max_cases()],
    device=device_kernels.MAX_POOL_TAKE))
max_pool_index: Op = register(Op(
    "max_pool_index", kernel=_max_index, attrs={"size": REQUIRED, **POOL}, shape=lambda tap, **attrs: [tap],
    dtype=lambda tap, **attrs: ((tap,), (dtypes.int64,)), axes=_pool_axes,
    samples=lambda: [Sample((_tapped(x, a),), {"size": x[2:], **a}) for x, a in _max_cases()]))

avg_pool: Op = register(Op(
    "avg_pool", kernel=_avg_pool, attrs=AVERAGE, shape=_avg_shape, dtype=floated(COMPLEX)("avg_pool"),
    axes=_pool_axes, linear=((0,),),
    vjp=(lambda g, out, x, **attrs: avg_pool_grad(g, size=tuple(x.shape[2:]), **attrs),),
    samples=_avg_samples(lambda x, a: Sample((x,), a)), device=device_kernels.AVG_POOL))
avg_pool_grad: Op = register(Op(
    "avg_pool_grad", kernel=_avg_pool_grad, attrs={"size": REQUIRED, **AVERAGE}, shape=_avg_grad_shape,
    dtype=floated(COMPLEX)("avg_pool_grad"), axes=_pool_axes, linear=((0,),),
    vjp=(lambda u, out, g, size, **attrs: avg_pool(u, **attrs),),
    samples=_avg_samples(lambda x, a: Sample((_avg_shape(x, **a)[0],), {"size": x[2:], **a})),
    device=device_kernels.AVG_POOL_GRAD))

adaptive_avg_pool: Op = register(Op(
    "adaptive_avg_pool", kernel=_adaptive(False), attrs={"count": REQUIRED}, shape=_adaptive_shape,
    dtype=floated(COMPLEX)("adaptive_avg_pool"), axes=_pool_axes, linear=((0,),),
    vjp=(lambda g, out, x, count: adaptive_avg_pool_grad(g, size=tuple(x.shape[2:])),),
    samples=lambda: [Sample((x,), {"count": m}) for x, m in _ADAPTIVE],
    device=device_kernels.ADAPTIVE_AVG_POOL))
adaptive_avg_pool_grad: Op = register(Op(
    "adaptive_avg_pool_grad", kernel=_adaptive(True), attrs={"size": REQUIRED}, shape=_adaptive_grad_shape,
    dtype=floated(COMPLEX)("adaptive_avg_pool_grad"), axes=_pool_axes, linear=((0,),),
    vjp=(lambda u, out, g, size: adaptive_avg_pool(u, count=tuple(g.shape[2:])),),
    samples=lambda: [Sample(((*x[:2], *m),), {"size": x[2:]}) for x, m in _ADAPTIVE],
    device=device_kernels.ADAPTIVE_AVG_POOL_GRAD))
