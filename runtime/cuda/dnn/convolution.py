"""Convolution and its two derivatives by cuDNN, over one to three spatial dimensions.

Operands go as they lie in memory. Results of 16-bit floats have channels innermost (N, H, W, C), the order in
which tensor cores read them; of float32 they lie like the first operand. Weights and their gradients are
always in C order: cuDNN turns them, which is little beside the rest, and optimizers take them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from meshtape.runtime.cuda.dnn.graphs import DATA_TYPES, Building, Operand, Plan, aligned
from meshtape.runtime.op import DeviceKernel
from meshtape.runtime.ops.windows import Pairs, counts, placed
from meshtape.runtime.shards import Shape

Geometry = tuple[Shape, Pairs, Shape]       # stride, padding, dilation


# --- memory order ---------------------------------------------------------------------------------------

def channels_last(shape: Shape) -> Shape:
    """Strides in elements of an array (N, C, *spatial) whose channels are innermost."""
    strides, step = [0] * len(shape), 1
    for d in (1, *reversed(range(2, len(shape))), 0):
        strides[d] = step
        step *= shape[d]
    return tuple(strides)


def in_order(shape: Shape) -> Shape:
    """Strides in elements of an array in C order."""
    strides, step = [0] * len(shape), 1
    for d in reversed(range(len(shape))):
        strides[d] = step
        step *= shape[d]
    return tuple(strides)


def lies(x: Any, strides: Shape) -> bool:
    """Whether `x` has these strides, where they matter."""
    return all(n == 1 or have == want * x.itemsize
               for n, have, want in zip(x.shape, x.strides, strides, strict=True))


def with_strides(dev: Any, shape: Shape, strides: Shape, dtype: Any) -> Any:
    """New memory for a result with its channels innermost, or in C order."""
    if strides == in_order(shape):
        return dev.cp.empty(shape, dtype)
    turned = (shape[0], *shape[2:], shape[1])
    return dev.cp.moveaxis(dev.cp.empty(turned, dtype), -1, 1)


def _operand(shape: Shape, strides: Shape, dtype: str) -> Operand:
    """With a dimension of one before a single spatial dimension: cuDNN has no fewer than two."""
    if len(shape) == 3:
        shape, strides = (*shape[:2], 1, shape[2]), (*strides[:2], shape[2] * strides[2], strides[2])
    return Operand(shape, strides, dtype)


def _readable(dev: Any, x: Any) -> tuple[Any, Operand]:
    """`x`, copied if it is in neither order, and what cuDNN is told of it."""
    for order in (in_order, channels_last):
        strides = order(x.shape)
        if lies(x, strides) and aligned(x):
            return x, _operand(x.shape, strides, x.dtype.name)
    x = dev.cp.array(x, order="C")
    return x, _operand(x.shape, in_order(x.shape), x.dtype.name)


def _result_strides(like: Any, shape: Shape) -> Shape:
    """Of a result beside the operand `like`."""
    innermost = not like.flags.c_contiguous and lies(like, channels_last(like.shape))
    return channels_last(shape) if innermost or like.itemsize == 2 else in_order(shape)


# --- graphs ---------------------------------------------------------------------------------------------

def _spatial(geometry: Geometry) -> dict[str, list[int]]:
    stride, padding, dilation = geometry
    before, after = ([pair[i] for pair in padding] for i in (0, 1))
    if len(stride) == 1:
        stride, dilation, before, after = (1, *stride), (1, *dilation), [0, *before], [0, *after]
    return {"pre_padding": before, "post_padding": after, "stride": list(stride), "dilation": list(dilation)}


def _fprop(b: Building, x: Operand, w: Operand, y: Operand, geometry: Geometry) -> None:
    b.give(b.graph.conv_fprop(image=b.take(x), weight=b.take(w), **_spatial(geometry)), y)


def _fprop_bias(b: Building, x: Operand, w: Operand, bias: Operand, y: Operand, geometry: Geometry) -> None:
    product = b.graph.conv_fprop(image=b.take(x), weight=b.take(w), **_spatial(geometry))
    product.set_data_type(b.data_type("float32"))
    b.give(b.graph.add(a=product, b=b.take(bias)), y)


def _dgrad(b: Building, g: Operand, w: Operand, x: Operand, geometry: Geometry) -> None:
    b.give(b.graph.conv_dgrad(loss=b.take(g), filter=b.take(w), **_spatial(geometry)), x)


def _wgrad(b: Building, g: Operand, x: Operand, w: Operand, geometry: Geometry) -> None:
    b.give(b.graph.conv_wgrad(loss=b.take(g), image=b.take(x), **_spatial(geometry)), w)


class Result(NamedTuple):
    """Of a graph: where it goes is known before cuDNN is asked."""

    shape: Shape
    strides: Shape
    out: Any


def _convolved(dev: Any, describe: Callable[..., None], arrays: Sequence[Any], result: Result,
               geometry: Geometry) -> Any:
    """The result of one of the graphs above; None if cuDNN refuses it."""
    read = [_readable(dev, x) for x in arrays]
    shape, strides, out = result
    dtype = arrays[0].dtype
    operands = *(operand for _, operand in read), _operand(shape, strides, dtype.name)
    plan: Plan | None = dev.dnn.plan((describe.__name__, operands, geometry),
                                     lambda building: describe(building, *operands, geometry), dtype.name,
                                     exact=True)
    if plan is None:
        return None
    fits = out is not None and lies(out, strides) and aligned(out)
    made = out if fits else with_strides(dev, shape, strides, dtype)
    dev.dnn.run(plan, (*(x for x, _ in read), made))
    return made if fits else placed(made, dtype, out)


# --- kernels of rows: None where cuDNN refuses ----------------------------------------------------------

def forward(dev: Any, x: Any, w: Any, stride: Shape, padding: Pairs, dilation: Shape, groups: int,
            out: Any = None) -> Any:
    geometry = stride, padding, dilation
    return _convolved(dev, _fprop, (x, w), _output(x, w, geometry, out), geometry)


def forward_bias(dev: Any, x: Any, w: Any, b: Any, stride: Shape, padding: Pairs, dilation: Shape,
                 groups: int, out: Any = None) -> Any:
    """On tensor cores the bias is added before the sum is rounded."""
    geometry = stride, padding, dilation
    result = _output(x, w, geometry, out)
    bias = b.reshape(1, -1, *(1,) * len(stride))
    if x.itemsize == 2 or dev.dnn.tf32:
        return _convolved(dev, _fprop_bias, (x, w, bias), result, geometry)
    y = _convolved(dev, _fprop, (x, w), result, geometry)
    if y is not None:
        y += bias
    return y


def _output(x: Any, w: Any, geometry: Geometry, out: Any) -> Result:
    shape = (len(x), len(w), *counts("conv", x.shape[2:], w.shape[2:], *geometry))
    return Result(shape, _result_strides(x, shape), out)


def input_grad(dev: Any, g: Any, w: Any, size: Shape, stride: Shape, padding: Pairs, dilation: Shape,
               groups: int, out: Any = None) -> Any:
    shape = (len(g), w.shape[1] * groups, *size)
    return _convolved(dev, _dgrad, (g, w), Result(shape, _result_strides(g, shape), out),
                      (stride, padding, dilation))


def weight_grad(dev: Any, g: Any, x: Any, kernel: Shape, stride: Shape, padding: Pairs, dilation: Shape,
                groups: int, out: Any = None) -> Any:
    shape = (g.shape[1], x.shape[1] // groups, *kernel)
    return _convolved(dev, _wgrad, (g, x), Result(shape, in_order(shape), out), (stride, padding, dilation))


def supports(shapes: tuple[Any, ...], dtypes: tuple[Any, ...], attrs: dict[str, Any]) -> bool:
    """Real floats, nothing empty, up to three spatial dimensions."""
    return (len({d.name for d in dtypes}) == 1 and dtypes[0].name in (*DATA_TYPES, "float64")
            and len(shapes[0]) <= 5 and all(n > 0 for shape in shapes for n in shape))


def by_cudnn(kernel: Callable[..., Any], other: Callable[..., Any]) -> DeviceKernel:
    """`kernel` of the above where there is cuDNN and it takes the case; else `other`."""
    def run(dev: Any, *arrays: Any, out: Any = None, **attrs: Any) -> Any:
        asked = dev.dnn is not None and arrays[0].dtype.name in DATA_TYPES
        result = kernel(dev, *arrays, out=out, **attrs) if asked else None
        return other(dev, *arrays, out=out, **attrs) if result is None else result
    return DeviceKernel(run, supports)
