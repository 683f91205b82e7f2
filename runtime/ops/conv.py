"""Convolution over any number of spatial dimensions, and its two derivatives, which are convolutions again.

x is (samples N, channels C, *spatial), w is (outputs O, C / groups, *kernel), the result (N, O, *windows):

    y[n, o, p] = sum over c, t of w[o, c, t] * x[n, c, p * stride + t * dilation - padding]

(a cross-correlation, as everywhere in deep learning). All three rows are bilinear. The kernels gather windows
into a matrix ("im2col") block by block, so that the matrix stays in cache, and multiply once per block. Many
samples on a CPU go row by row, and come out innermost in memory (conv_rows.py); dense 3 x 3 kernels between
many channels go by minimal filtering (winograd.py). What was measured stands in
docs/decisions/0003-convolution.md.

Samples, input and output channels may be split: a split sum over the channels, or over the samples in a
weight's gradient, is Partial. With groups, the groups may be split. Spatial dimensions are never split.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.dnn import convolution
from meshtape.runtime.cuda.dnn.batch_norm import CONV_BIAS_GRAD
from meshtape.runtime.cuda.kernels import convolution as own
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import IO, REQUIRED, Axes, Op, Sample, register
from meshtape.runtime.ops import conv_rows, winograd
from meshtape.runtime.ops.contraction import widen
from meshtape.runtime.ops.reduce import broadcast_reduced
from meshtape.runtime.ops.rules import COMPLEX, floated
from meshtape.runtime.ops.windows import (
    Pairs,
    blocks,
    channel_rows,
    counts,
    padded,
    placed,
    products,
    span,
    tap_slices,
    unpadded,
    windows,
)
from meshtape.runtime.shards import Shape

Attrs = dict[str, Any]

GEOMETRY: Attrs = {"stride": REQUIRED, "padding": REQUIRED, "dilation": REQUIRED, "groups": 1}
GATHERED = 1 << 18      # elements of the window matrix: 1 MB of float32, a core's second-level cache
GATHERED_DEVICE = 1 << 26


def gathered(xp: Any) -> int:
    return GATHERED if xp is np else GATHERED_DEVICE


# --- shapes, letters ------------------------------------------------------------------------------------

def check_channels(name: str, channels: int, w: Shape, groups: int) -> None:
    if groups < 1 or channels % groups or w[0] % groups or w[1] * groups != channels:
        raise ShapeError(f"{name}: {channels} input channels in {groups} groups need a weight of shape "
                         f"(outputs, {channels} / {groups}, *kernel) with outputs a multiple of {groups}, "
                         f"got {w}")


def check_ranks(name: str, x: Shape, w: Shape) -> None:
    if len(x) < 3 or len(w) != len(x):
        raise ShapeError(f"{name}: needs (samples, channels, *spatial) and a weight (outputs, channels, "
                         f"*kernel) of as many dimensions, got {x} and {w}")


def _conv_shape(x: Shape, w: Shape, *bias: Shape, groups: int, **geometry: Any) -> list[Shape]:
    check_ranks("conv", x, w)
    check_channels("conv", x[1], w, groups)
    if bias and bias[0] != w[:1]:
        raise ShapeError(f"conv: bias must be {w[:1]} for a weight of shape {w}, got {bias[0]}")
    return [(x[0], w[0], *counts("conv", x[2:], w[2:], **geometry))]


def _input_grad_shape(g: Shape, w: Shape, size: Shape, groups: int, **geometry: Any) -> list[Shape]:
    check_ranks("conv_input_grad", g, w)
    needed = _conv_shape((g[0], w[1] * groups, *size), w, groups=groups, **geometry)[0]
    if g != needed:
        raise ShapeError(f"conv_input_grad: for an input of spatial size {tuple(size)} and the weight {w} "
                         f"the gradient is {needed}, got {g}")
    return [(g[0], w[1] * groups, *size)]


def _weight_grad_shape(g: Shape, x: Shape, kernel: Shape, groups: int, **geometry: Any) -> list[Shape]:
    check_ranks("conv_weight_grad", x, g)
    w = (g[1], x[1] // groups, *kernel)
    needed = _conv_shape(x, w, groups=groups, **geometry)[0]
    if g != needed:
        raise ShapeError(f"conv_weight_grad: for the input {x} and a kernel of {tuple(kernel)} the gradient "
                         f"is {needed}, got {g}")
    return [w]


def _bias_grad_shape(g: Shape) -> list[Shape]:
    if len(g) < 3:
        raise ShapeError(f"conv_bias_grad: needs (samples, channels, *spatial), got {g}")
    return [(g[1],)]


def _letters(ndim: int, groups: int) -> tuple[str, str, str, dict[str, int]]:
    """Letters of x, w and y, and `even`: a split of the groups gives each worker whole groups."""
    rest = "." * (ndim - 2)
    if groups == 1:
        return "nc" + rest, "oc" + rest, "no" + rest, {}
    return "ng" + rest, "g." + rest, "ng" + rest, {"g": groups}


def _conv_axes(x: Shape, w: Shape, *bias: Shape, groups: int, **geometry: Any) -> Axes:
    left, right, out, even = _letters(len(x), groups)
    return Axes((left, right, *(right[0] for _ in bias)), (out,), even=even, additive=(2,) if bias else ())


def _input_grad_axes(g: Shape, w: Shape, groups: int, **attrs: Any) -> Axes:
    left, right, out, even = _letters(len(g), groups)
    return Axes((out, right), (left,), even=even)


def _weight_grad_axes(g: Shape, x: Shape, groups: int, **attrs: Any) -> Axes:
    left, right, out, even = _letters(len(x), groups)
    return Axes((out, left), (right,), even=even)


def _own_groups(weight: Callable[[IO], Any]) -> Callable[[Attrs, IO], Attrs]:
    """The groups of which this worker holds the weights."""
    def local(attrs: Attrs, io: IO) -> Attrs:
        piece = weight(io)
        if attrs["groups"] == 1 or not piece.whole[0]:
            return attrs
        return {**attrs, "groups": attrs["groups"] * piece.shape[0] // piece.whole[0]}
    return local


# --- kernels --------------------------------------------------------------------------------------------

def _grouped(w: Any, groups: int) -> Any:
    """The weight as (groups, outputs of a group, taps of a group's channels)."""
    return w.reshape(groups, w.shape[0] // groups, prod(w.shape[1:]))


def _correlate(xp: Any, x: Any, w: Any, bias: Any, stride: Shape, padding: Pairs, dilation: Shape,
               groups: int, out: Any) -> Any:
    dtype, kernel = x.dtype, w.shape[2:]
    count = counts("conv", x.shape[2:], kernel, stride, padding, dilation)
    x, w, bias = widen(x), widen(w), None if bias is None else widen(bias)
    if winograd.suits(xp, w.shape, stride, dilation, groups, count):
        return placed(winograd.correlate(x, w, bias, padding, count), dtype, out)
    if conv_rows.suits(xp, x, kernel, stride):
        geometry = conv_rows.geometry(kernel, stride, padding, dilation, count, groups)
        return placed(conv_rows.correlate(x, w, bias, geometry), dtype, out)
    x, filters = padded(xp, x, padding), _grouped(w, groups)
    if out is None:
        out = xp.empty((len(x), len(w), *count), dtype)
    columns = WindowMatrix(xp, x, kernel, stride, dilation, count, groups)
    for samples, rows in columns.blocks():
        product = xp.matmul(filters, columns.take(samples, rows))
        product = product.reshape(len(w), samples.stop - samples.start, rows.stop - rows.start, *count[1:])
        if bias is not None:
            product += bias.reshape(-1, *(1,) * (len(count) + 1))
        out[samples, :, rows] = product.swapaxes(0, 1)
    return out


class WindowMatrix:
    """Windows of a padded x, gathered block by block into one buffer as (groups, taps, windows)."""

    def __init__(self, xp: Any, x: Any, kernel: Shape, stride: Shape, dilation: Shape, count: Shape,
                 groups: int) -> None:
        self.view = windows(xp, x, kernel, stride, dilation, count)
        self.lead = (slice(None),) * (1 + len(kernel))
        self.groups, self.taps = groups, x.shape[1] // groups * prod(kernel)
        self.samples, self.count = len(x), count
        self.limit = gathered(xp)
        per_row = self.taps * groups * prod(count[1:])
        self.buffer = xp.empty(max(per_row, min(self.limit, per_row * count[0] * len(x))), x.dtype)

    def blocks(self) -> Any:
        return blocks(self.samples, self.count, self.taps * self.groups, self.limit)

    def take(self, samples: slice, rows: slice) -> Any:
        block = self.view[(*self.lead, samples, rows)]
        held = self.buffer[:block.size].reshape(block.shape)
        held[...] = block
        width = (samples.stop - samples.start) * (rows.stop - rows.start) * prod(self.count[1:])
        return held.reshape(self.groups, self.taps, width)


def _grad_columns(g: Any, samples: slice, rows: slice, groups: int) -> Any:
    """A block of an output's gradient as (groups, outputs of a group, windows)."""
    block = g[samples, :, rows].swapaxes(0, 1)
    return block.reshape(groups, len(block) // groups, prod(block.shape[1:]))


def _conv(xp: Any, x: Any, w: Any, stride: Shape, padding: Pairs, dilation: Shape, groups: int,
          out: Any = None) -> Any:
    return _correlate(xp, x, w, None, stride, padding, dilation, groups, out)


def _conv_bias(xp: Any, x: Any, w: Any, b: Any, stride: Shape, padding: Pairs, dilation: Shape,
               groups: int, out: Any = None) -> Any:
    return _correlate(xp, x, w, b, stride, padding, dilation, groups, out)


def _conv_input_grad(xp: Any, g: Any, w: Any, size: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                     groups: int, out: Any = None) -> Any:
    """With stride 1 a correlation again, of g with the weight turned around; else products are scattered."""
    spans = [span(k, apart) for k, apart in zip(w.shape[2:], dilation, strict=True)]
    around = tuple((n - 1 - lo, n - 1 - hi) for n, (lo, hi) in zip(spans, padding, strict=True))
    turns = set(stride) == {1} and min(map(min, around)) >= 0
    # Gathering moves w.shape[0] channels and writes them; scattering adds up as many as x has.
    if turns and (w.shape[0] <= 2 * w.shape[1] * groups
                  or winograd.suits(xp, w.shape, stride, dilation, groups, size)):
        return _correlate(xp, g, _turned(xp, w, groups), None, stride, around, dilation, groups, out)
    return placed(_scatter(xp, g, w, size, stride, padding, dilation, groups), g.dtype, out)


def _turned(xp: Any, w: Any, groups: int) -> Any:
    """The weight of the adjoint: taps in reverse, outputs and channels of each group exchanged."""
    kernel = w.shape[2:]
    flipped = xp.flip(w, axis=tuple(range(2, w.ndim)))
    grouped = flipped.reshape(groups, w.shape[0] // groups, w.shape[1], *kernel).swapaxes(1, 2)
    return xp.ascontiguousarray(grouped.reshape(groups * w.shape[1], w.shape[0] // groups, *kernel))


def _scatter(xp: Any, g: Any, w: Any, size: Shape, stride: Shape, padding: Pairs, dilation: Shape,
             groups: int) -> Any:
    """Each window's product with the weight, added where the window's taps lie ("col2im")."""
    kernel, count = w.shape[2:], g.shape[2:]
    g, w = widen(g), widen(w)
    if conv_rows.suits(xp, g, kernel, stride):
        geometry = conv_rows.geometry(kernel, stride, padding, dilation, count, groups)
        return conv_rows.scatter(g, w, size, geometry)
    filters = _grouped(w, groups).swapaxes(1, 2)
    channels = w.shape[1] * groups
    room = tuple(n + lo + hi for n, (lo, hi) in zip(size, padding, strict=True))
    out = xp.zeros((len(g), channels, *room), g.dtype)
    for samples, rows in blocks(len(g), count, channels * prod(kernel), gathered(xp)):
        taken = (samples.stop - samples.start, rows.stop - rows.start, *count[1:])
        columns = products(xp, filters, _grad_columns(g, samples, rows, groups))
        columns = columns.reshape(channels, *kernel, *taken)
        target = out[samples]
        for tap, where in tap_slices(kernel, stride, dilation, taken[1:], rows.start):
            target[(..., *where)] += columns[(slice(None), *tap)].swapaxes(0, 1)
    return unpadded(out, padding)


def _conv_weight_grad(xp: Any, g: Any, x: Any, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                      groups: int, out: Any = None) -> Any:
    dtype, count = g.dtype, g.shape[2:]
    g, x = widen(g), widen(x)
    if winograd.suits(xp, (g.shape[1], x.shape[1], *kernel), stride, dilation, groups, count):
        return placed(winograd.weight_grad(g, x, padding), dtype, out)
    if conv_rows.suits(xp, x, kernel, stride):
        geometry = conv_rows.geometry(kernel, stride, padding, dilation, count, groups)
        return placed(conv_rows.weight_grad(g, x, geometry), dtype, out)
    x = padded(xp, x, padding)
    outputs, channels = g.shape[1] // groups, x.shape[1] // groups
    total = xp.zeros((groups, outputs, channels * prod(kernel)), g.dtype)
    columns = WindowMatrix(xp, x, kernel, stride, dilation, count, groups)
    for samples, rows in columns.blocks():
        gradient = _grad_columns(g, samples, rows, groups)
        total += xp.matmul(gradient, columns.take(samples, rows).swapaxes(1, 2))
    return placed(total.reshape(groups * outputs, channels, *kernel), dtype, out)


def _conv_bias_grad(xp: Any, g: Any) -> Any:
    return xp.einsum("ncp->nc", channel_rows(xp, widen(g))).sum(axis=0)


# --- rows -----------------------------------------------------------------------------------------------

def _by_x(g: Any, out: Any, x: Any, w: Any, *bias: Any, **attrs: Any) -> Any:
    return conv_input_grad(g, w, size=tuple(x.shape[2:]), **attrs)


def _by_w(g: Any, out: Any, x: Any, w: Any, *bias: Any, **attrs: Any) -> Any:
    return conv_weight_grad(g, x, kernel=tuple(w.shape[2:]), **attrs)


def _by_bias(g: Any, out: Any, *inputs: Any, **attrs: Any) -> Any:
    return conv_bias_grad(g)


_CASES: tuple[tuple[Shape, Shape, Attrs], ...] = (
    ((2, 3, 5, 6), (4, 3, 3, 2), {}), ((3, 2, 7), (2, 2, 3), {"stride": (2,), "padding": ((2, 1),)}),
    ((2, 4, 5, 5), (6, 2, 3, 3), {"padding": ((1, 1), (1, 1)), "groups": 2}),
    ((1, 2, 6, 5), (3, 2, 2, 2), {"stride": (3, 2), "padding": ((0, 1), (2, 0)), "dilation": (2, 3)}),
    ((2, 6, 4), (6, 1, 2), {"groups": 6, "dilation": (2,)}), ((0, 2, 3), (1, 2, 2), {}),
    ((2, 3, 4, 4), (2, 3, 1, 1), {"stride": (2, 1)}), ((2, 1, 3, 3, 2), (2, 1, 2, 2, 1), {}))


def _geometry(x: Shape, given: Attrs) -> Attrs:
    d = len(x) - 2
    return {"stride": (1,) * d, "padding": ((0, 0),) * d, "dilation": (1,) * d, "groups": 1, **given}


def _cases() -> list[tuple[Shape, Shape, Shape, Attrs]]:
    """Shapes of x, w and y, and attrs."""
    found = []
    for x, w, given in _CASES:
        attrs = _geometry(x, given)
        found.append((x, w, _conv_shape(x, w, **attrs)[0], attrs))
    return found


conv: Op = register(Op(
    "conv", kernel=_conv, attrs=GEOMETRY, shape=_conv_shape, dtype=floated(COMPLEX)("conv"), axes=_conv_axes,
    linear=((0,), (1,)), local=_own_groups(lambda io: io.ins[1]), keeps="x w", vjp=(_by_x, _by_w),
    autocast="low",
    samples=lambda: [Sample((x, w), attrs) for x, w, _, attrs in _cases()],
    device=convolution.by_cudnn(convolution.forward, own.forward)))
conv_bias: Op = register(Op(
    "conv_bias", kernel=_conv_bias, attrs=GEOMETRY, shape=_conv_shape, dtype=floated(COMPLEX)("conv_bias"),
    axes=_conv_axes, linear=((0, 2), (1, 2)), local=_own_groups(lambda io: io.ins[1]), keeps="x w",
    vjp=(_by_x, _by_w, _by_bias), autocast="low",
    samples=lambda: [Sample((x, w, w[:1]), attrs) for x, w, _, attrs in _cases()],
    device=convolution.by_cudnn(convolution.forward_bias, own.forward_bias)))
conv_input_grad: Op = register(Op(
    "conv_input_grad", kernel=_conv_input_grad, attrs={"size": REQUIRED, **GEOMETRY}, shape=_input_grad_shape,
    dtype=floated(COMPLEX)("conv_input_grad"), axes=_input_grad_axes, linear=((0,), (1,)),
    local=_own_groups(lambda io: io.ins[1]), keeps="g w", autocast="low",
    vjp=(lambda u, out, g, w, size, **attrs: conv(u, w, **attrs),
         lambda u, out, g, w, size, **attrs: conv_weight_grad(g, u, kernel=tuple(w.shape[2:]), **attrs)),
    samples=lambda: [Sample((y, w), {"size": x[2:], **attrs}) for x, w, y, attrs in _cases()],
    device=convolution.by_cudnn(convolution.input_grad, own.input_grad)))
conv_weight_grad: Op = register(Op(
    "conv_weight_grad", kernel=_conv_weight_grad, attrs={"kernel": REQUIRED, **GEOMETRY},
    shape=_weight_grad_shape, dtype=floated(COMPLEX)("conv_weight_grad"), axes=_weight_grad_axes,
    linear=((0,), (1,)), local=_own_groups(lambda io: io.outs[0]), keeps="g x",
    vjp=(lambda u, out, g, x, kernel, **attrs: conv(x, u, **attrs),
         lambda u, out, g, x, kernel, **attrs: conv_input_grad(g, u, size=tuple(x.shape[2:]), **attrs)),
    samples=lambda: [Sample((y, x), {"kernel": w[2:], **attrs}) for x, w, y, attrs in _cases()],
    device=convolution.by_cudnn(convolution.weight_grad, own.weight_grad)))

# The sum over samples and spatial dimensions.
conv_bias_grad: Op = register(Op(
    "conv_bias_grad", kernel=_conv_bias_grad, shape=_bias_grad_shape,
    dtype=floated(COMPLEX)("conv_bias_grad"),
    axes=lambda g: Axes(("no" + "." * (len(g) - 2),), ("o",)), linear=((0,),),
    vjp=(lambda u, out, g: broadcast_reduced(u, shape=tuple(g.shape), axis=(0, *range(2, g.ndim))),),
    samples=lambda: [Sample((y,)) for _, _, y, _ in _cases()], device=CONV_BIAS_GRAD))


def transposed_size(size: Shape, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                    extra: Shape) -> Shape:
    """Spatial size of a transposed convolution: the largest input that gives `size`, and `extra` elements."""
    return tuple((n - 1) * s - lo - hi + span(k, apart) + more for n, k, s, (lo, hi), apart, more
                 in zip(size, kernel, stride, padding, dilation, extra, strict=True))
