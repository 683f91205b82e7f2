"""Batch normalization over the whole batch, however it is split (Ioffe, Szegedy 2015, arXiv:1502.03167).

x is (samples, channels, ...); statistics are per channel, over the n elements of all other dimensions:

    mean = sum(x) / n,   var = sum((x - mean)^2) / n,   rstd = 1 / sqrt(var + eps),   h = (x - mean) * rstd
    y = h * weight + bias
    dx = rstd * weight * (g - sum(g) / n - h * sum(g * h) / n),  dweight = sum(g * h),  dbias = sum(g)

Where samples are split, the sums are Partial: the mean is reduced before the variance is taken around it,
which loses nothing to cancellation, and sum(g) and sum(g * h) are one tensor, so that one
reduction serves both.

With training=True, `mean` and `rstd` are those of x itself, and a derivative by x is the total one, through
them as well; they get none of their own. With training=False they are constants. `weight` and `bias` may be
Python scalars.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.dnn import batch_norm as device_kernels
from meshtape.runtime.dtypes import is_floating
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import ALPHABET, IO, Axes, Op, Sample, register
from meshtape.runtime.ops.contraction import widen
from meshtape.runtime.ops.pointwise import add, mul, sub
from meshtape.runtime.ops.reduce import accumulator, sum_
from meshtape.runtime.ops.rules import COMPLEX, floated
from meshtape.runtime.ops.shape import reshape
from meshtape.runtime.ops.slices import slice_, slice_attrs
from meshtape.runtime.ops.windows import channel_rows, in_order_of, innermost, placed
from meshtape.runtime.rowwise import row_blocks
from meshtape.runtime.shards import Shape

Attrs = dict[str, Any]


# --- rules ----------------------------------------------------------------------------------------------

def check_channels(name: str, x: Shape, *channels: Shape) -> None:
    if len(x) < 2:
        raise ShapeError(f"{name}: needs (samples, channels, ...), got {x}")
    for given in channels:
        if given not in ((), (x[1],)):
            raise ShapeError(f"{name}: an input {x} has {x[1]} channels, and statistics, weight and bias one "
                             f"number for each; got {given}")


def _names(x: Shape) -> str:
    return ALPHABET[:len(x)]


CHANNEL = ALPHABET[1]


def _of_channel(*given: Shape) -> tuple[str, ...]:
    return tuple(CHANNEL * len(s) for s in given)


def per_channel(x: Shape) -> int:
    """How many elements each channel has."""
    return x[0] * prod(x[2:])


def _count(attrs: Attrs, io: IO) -> Attrs:
    return {**attrs, "count": per_channel(io.ins[0].whole)}  # type: ignore[union-attr]


def _wide(name: str, outs: int = 1) -> Any:
    """All inputs in the dtype of sums, which is also the output's."""
    def rule(*dtypes: Any, **attrs: Any) -> tuple[Any, Any]:
        found = floated(COMPLEX)(name)(*dtypes)[1][0]
        return (found, *(accumulator(found) for _ in dtypes[1:])), (accumulator(found),)
    return rule


# --- kernels: x as planes (rows, channels, elements) ------------------------------------------------------

def _runs(xp: Any, planes: Any) -> Iterator[tuple[tuple[slice, slice], slice]]:
    """Parts of planes that stay in cache, (rows, channels), and again their channels."""
    every = slice(None)
    if planes.strides[1] > planes.strides[0]:
        for run in row_blocks(xp, (planes.shape[1], prod(planes.shape[::2]))):
            yield (every, run), run
    else:
        for run in row_blocks(xp, (planes.shape[0], prod(planes.shape[1:]))):
            yield (run, every), every


def _column(value: Any, channels: slice) -> Any:
    """A number per channel, to broadcast against planes of these channels."""
    return value[channels, None] if getattr(value, "ndim", 0) else value


def _like(xp: Any, x: Any) -> Any:
    """Memory for a result that lies like x, so that its planes are a view."""
    return xp.empty_like(x) if innermost(xp, x) else xp.empty(x.shape, x.dtype)


def _batch_mean(xp: Any, x: Any, count: int) -> Any:
    return xp.einsum("ncp->nc", channel_rows(xp, widen(x))).sum(axis=0) / max(1, count)


def _batch_variance(xp: Any, x: Any, mean: Any, count: int) -> Any:
    planes = channel_rows(xp, x)
    total = xp.zeros(planes.shape[1], mean.dtype)
    for run, channels in _runs(xp, planes):
        centered = planes[run] - _column(mean, channels)
        total[channels] += xp.einsum("ncp,ncp->nc", centered, centered).sum(axis=0)
    return total / max(1, count)


def _batch_norm(xp: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, training: bool,
                out: Any = None) -> Any:
    planes, scale = channel_rows(xp, x), rstd * weight
    result = _like(xp, x)
    target = channel_rows(xp, result)
    for run, channels in _runs(xp, planes):
        centered = planes[run] - _column(mean, channels)
        centered *= _column(scale, channels)
        centered += _column(bias, channels)
        target[run] = centered
    return placed(result, x.dtype, out)


def _batch_norm_sums(xp: Any, g: Any, x: Any, mean: Any, rstd: Any, training: bool) -> Any:
    upstream, planes = channel_rows(xp, in_order_of(xp, x, g)), channel_rows(xp, x)
    out = xp.zeros((2, planes.shape[1]), mean.dtype)
    for run, channels in _runs(xp, planes):
        u = widen(upstream[run])
        out[0, channels] += xp.einsum("ncp->nc", u).sum(axis=0)
        out[1, channels] += xp.einsum("ncp,ncp->nc", u, planes[run] - _column(mean, channels)).sum(axis=0)
    out[1] *= rstd
    return out


def _batch_norm_grad(xp: Any, g: Any, x: Any, mean: Any, rstd: Any, weight: Any, sums: Any,
                     count: int | None, out: Any = None) -> Any:
    upstream, planes = channel_rows(xp, in_order_of(xp, x, g)), channel_rows(xp, x)
    n = per_channel(x.shape) if count is None else count
    scale, means = rstd * weight, sums / max(1, n)
    slope, offset = rstd * means[1], means[0]
    result = _like(xp, x)
    target = channel_rows(xp, result)
    for run, channels in _runs(xp, planes):
        taken = planes[run] - _column(mean, channels)
        taken *= _column(slope, channels)
        taken += _column(offset, channels)
        xp.subtract(upstream[run], taken, out=taken)
        taken *= _column(scale, channels)
        target[run] = taken
    return placed(result, x.dtype, out)


# --- derivatives ----------------------------------------------------------------------------------------

def _aligned(value: Any, like: Any) -> Any:
    """A number per channel, to broadcast against a tensor of the shape of `like`."""
    return reshape(value, shape=(value.shape[0], *(1,) * (like.ndim - 2)))


def _row_of(sums: Any, k: int) -> Any:
    row = slice_(sums, **slice_attrs(sums.shape, (slice(k, k + 1), slice(None))))
    return reshape(row, shape=(sums.shape[1],))


def _hat(x: Any, mean: Any, rstd: Any) -> Any:
    return mul(sub(x, _aligned(mean, x)), _aligned(rstd, x))


def _over_channel(product: Any) -> Any:
    return sum_(product, axis=(0, *range(2, product.ndim)))


def _through_hat(v: Any, x: Any, mean: Any, rstd: Any, training: bool) -> Any:
    """The cotangent of x, given that of h."""
    if not training:
        return mul(v, _aligned(rstd, x))
    sums = batch_norm_sums(v, x, mean, rstd, training=True)
    return batch_norm_grad(v, x, mean, rstd, 1.0, sums)


def _batch_norm_vjp(g: Any, out: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any,
                    training: bool) -> Any:
    sums = batch_norm_sums(g, x, mean, rstd, training=training)
    if training:
        by_x = batch_norm_grad(g, x, mean, rstd, weight, sums)
    else:
        by_x = mul(g, _aligned(mul(rstd, weight), x))
    return by_x, None, None, _row_of(sums, 1), _row_of(sums, 0)


def _sums_vjp(u: Any, out: Any, g: Any, x: Any, mean: Any, rstd: Any, training: bool) -> Any:
    by_sum, by_product = _aligned(_row_of(u, 0), g), _aligned(_row_of(u, 1), g)
    by_g = add(by_sum, mul(_hat(x, mean, rstd), by_product))
    return by_g, _through_hat(mul(g, by_product), x, mean, rstd, training), None, None


def _grad_vjp(u: Any, out: Any, g: Any, x: Any, mean: Any, rstd: Any, weight: Any, sums: Any,
              count: int | None) -> Any:
    """Of sum(u * dx): x counts through h, and through the factor rstd (drstd/dx = -rstd^2 * h / n)."""
    n = float(max(1, per_channel(x.shape)))
    scale = mul(rstd, weight)
    by_sums = mul(batch_norm_sums(u, x, mean, rstd, training=True), mul(scale, -1 / n))
    by_weight = _over_channel(mul(u, batch_norm_grad(g, x, mean, rstd, 1.0, sums)))
    by_hat = mul(u, _aligned(mul(scale, mul(_row_of(sums, 1), -1 / n)), x))
    through_rstd = mul(_hat(x, mean, rstd), _aligned(mul(mul(scale, by_weight), -1 / n), x))
    by_x = add(_through_hat(by_hat, x, mean, rstd, True), through_rstd)
    return mul(u, _aligned(scale, x)), by_x, None, None, by_weight, by_sums


# --- rows -----------------------------------------------------------------------------------------------

def _statistic_shape(name: str) -> Any:
    def rule(x: Shape, *mean: Shape, **attrs: Any) -> list[Shape]:
        check_channels(name, x, *mean)
        return [x[1:2]]
    return rule


def _statistic_axes(x: Shape, *mean: Shape, **attrs: Any) -> Axes:
    return Axes((_names(x), *_of_channel(*mean)), (CHANNEL,))


def _norm_shape(x: Shape, *channels: Shape, training: bool) -> list[Shape]:
    check_channels("batch_norm", x, *channels)
    return [x]


def _norm_dtype(x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, training: bool) -> tuple[Any, Any]:
    low = is_floating(x) and x.itemsize == 2        # weights of float32 do not widen an input of 16 bits
    found = floated(COMPLEX)("batch_norm")(*((x,) if low else (x, weight, bias)))[1][0]
    return (found, *(accumulator(found),) * 4), (found,)


def _norm_axes(x: Shape, *channels: Shape, training: bool) -> Axes:
    return Axes((_names(x), *_of_channel(*channels)), (_names(x),))


def _sums_shape(g: Shape, x: Shape, *channels: Shape, training: bool) -> list[Shape]:
    _check_gradient("batch_norm_sums", g, x, *channels)
    return [(2, x[1])]


def _check_gradient(name: str, g: Shape, x: Shape, *channels: Shape) -> None:
    check_channels(name, x, *channels)
    if g != x:
        raise ShapeError(f"{name}: gradient and input must agree, got {g} and {x}")


def _sums_dtype(g: Any, x: Any, *channels: Any, training: bool) -> tuple[Any, Any]:
    wide = accumulator(floated(COMPLEX)("batch_norm_sums")(g, x)[1][0])
    return (g, x, *(wide for _ in channels)), (wide,)


def _sums_axes(g: Shape, x: Shape, *channels: Shape, training: bool) -> Axes:
    return Axes((_names(x), _names(x), *_of_channel(*channels)), ("." + CHANNEL,))


def _grad_shape(g: Shape, x: Shape, mean: Shape, rstd: Shape, weight: Shape, sums: Shape,
                count: int | None) -> list[Shape]:
    _check_gradient("batch_norm_grad", g, x, mean, rstd, weight)
    if sums != (2, x[1]):
        raise ShapeError(f"batch_norm_grad: sums must be {(2, x[1])}, got {sums}")
    return [x]


def _grad_dtype(g: Any, x: Any, *channels: Any, count: int | None) -> tuple[Any, Any]:
    found = floated(COMPLEX)("batch_norm_grad")(g, x)[1][0]
    return (found, found, *(accumulator(found) for _ in channels)), (found,)


def _grad_axes(g: Shape, x: Shape, mean: Shape, rstd: Shape, weight: Shape, sums: Shape,
               count: int | None) -> Axes:
    channels = _of_channel(mean, rstd, weight)
    return Axes((_names(x), _names(x), *channels, "." + CHANNEL), (_names(x),))


_SHAPES: tuple[Shape, ...] = ((5, 3), (4, 3, 2), (3, 2, 2, 5), (7, 1), (0, 3), (1, 4, 3))


def _given(shape: Shape) -> tuple[Any, Any, Any]:
    """An input and its statistics, which finite differences of x alone would leave behind."""
    x = np.random.default_rng(len(shape)).normal(1, 2, shape)
    over = (0, *range(2, len(shape)))
    n = max(1, per_channel(shape))
    mean = x.sum(over) / n
    return x, mean, 1 / np.sqrt((x * x).sum(over) / n - mean * mean + 0.1)


def _norm_samples() -> list[Sample]:
    found = []
    for shape in _SHAPES:
        x, mean, rstd = _given(shape)
        found += [Sample((x, mean, rstd, shape[1:2], shape[1:2]), {"training": True}, diff=False),
                  Sample((x, mean, rstd, 1.0, shape[1:2]), {"training": False}, diff=False)]
    return found


batch_mean: Op = register(Op(
    "batch_mean", kernel=_batch_mean, attrs={"count": None}, shape=_statistic_shape("batch_mean"),
    dtype=_wide("batch_mean"), axes=_statistic_axes, linear=((0,),), local=_count,
    samples=lambda: [Sample((s,), diff=False) for s in _SHAPES], device=device_kernels.BATCH_MEAN))
batch_variance: Op = register(Op(
    "batch_variance", kernel=_batch_variance, attrs={"count": None}, shape=_statistic_shape("batch_variance"),
    dtype=_wide("batch_variance"), axes=_statistic_axes, local=_count,
    samples=lambda: [Sample((s, s[1:2]), diff=False) for s in _SHAPES],
    device=device_kernels.BATCH_VARIANCE))
batch_norm: Op = register(Op(
    "batch_norm", kernel=_batch_norm, attrs={"training": True}, shape=_norm_shape, dtype=_norm_dtype,
    axes=_norm_axes, keeps="x mean rstd weight", vjp=_batch_norm_vjp, samples=_norm_samples,
    device=device_kernels.BATCH_NORM))
batch_norm_sums: Op = register(Op(
    "batch_norm_sums", kernel=_batch_norm_sums, attrs={"training": True}, shape=_sums_shape,
    dtype=_sums_dtype, axes=_sums_axes, linear=((0,),), keeps="g x mean rstd", vjp=_sums_vjp,
    samples=lambda: [Sample((s, *_given(s)), diff=False) for s in _SHAPES],
    device=device_kernels.BATCH_NORM_SUMS))
batch_norm_grad: Op = register(Op(
    "batch_norm_grad", kernel=_batch_norm_grad, attrs={"count": None}, shape=_grad_shape, dtype=_grad_dtype,
    axes=_grad_axes, local=_count, keeps="g x mean rstd weight sums",
    vjp=_grad_vjp,
    samples=lambda: [Sample((s, *_given(s), s[1:2], (2, s[1])), diff=False) for s in _SHAPES],
    device=device_kernels.BATCH_NORM_GRAD))
