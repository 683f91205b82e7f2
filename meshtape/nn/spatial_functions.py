"""Convolution and pooling as functions, by torch.nn.functional's names and semantics.

Inputs are (N, C, L) or (N, C, H, W); without the batch dimension N, the result has none either. A number for
stride, padding, dilation or kernel size stands for every spatial dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.autograd.autocast import inside
from meshtape.creation import asarray
from meshtape.manipulation import take, take_along_axis
from meshtape.reductions import argmax
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import lookup
from meshtape.runtime.ops.conv import transposed_size
from meshtape.runtime.ops.pool import adaptive_bounds

Ints = int | Sequence[int]
Padding = str | int | Sequence[Any]


def _call(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return apply(op, inputs, op.pack(attrs))


def numbers(given: Ints, dims: int, what: str) -> tuple[int, ...]:
    """One number per spatial dimension; a single number stands for all."""
    found = (given,) * dims if isinstance(given, int) else tuple(given)
    found = found * dims if len(found) == 1 else found
    if len(found) != dims:
        raise ShapeError(f"{what} {given} needs one number, or one for each of {dims} spatial dimensions")
    return found


def _pairs(given: int | Sequence[Any], dims: int, what: str) -> tuple[tuple[int, int], ...]:
    """(before, after) per spatial dimension; a single number stands for both."""
    widths = (given,) * dims if isinstance(given, int) else tuple(given)
    widths = widths * dims if len(widths) == 1 else widths
    if len(widths) != dims:
        raise ShapeError(f"{what} {given} needs one width, or one for each of {dims} spatial dimensions")
    return tuple((w, w) if isinstance(w, int) else (int(w[0]), int(w[1])) for w in widths)


def batched(name: str, input: Any, dims: int) -> tuple[Tensor, bool]:
    """The input with a batch dimension, and whether it had none."""
    x = input if isinstance(input, Tensor) else as_tensor(input)
    if x.ndim not in (dims + 1, dims + 2):
        raise ShapeError(f"{name}: needs (N, C, *spatial) or (C, *spatial) with {dims} spatial dimensions, "
                         f"got {x.shape}")
    return (x, False) if x.ndim == dims + 2 else (x.expand_dims(0), True)


def _unbatched(y: Tensor, single: bool) -> Tensor:
    return y.squeeze(0) if single else y


# --- convolution ------------------------------------------------------------------------------------------

def conv1d(input: Any, weight: Tensor, bias: Tensor | None = None, stride: Ints = 1, padding: Padding = 0,
           dilation: Ints = 1, groups: int = 1) -> Tensor:
    """Cross-correlation of (N, C, L) with `weight` (O, C / groups, K): (N, O, L').

    padding: a width, a pair (before, after) in a sequence, "valid" (none), or "same" (L' = L, with stride 1).
    Raises ShapeError, DTypeError.
    """
    return _conv("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(input: Any, weight: Tensor, bias: Tensor | None = None, stride: Ints = 1, padding: Padding = 0,
           dilation: Ints = 1, groups: int = 1) -> Tensor:
    """Cross-correlation of (N, C, H, W) with `weight` (O, C / groups, KH, KW): (N, O, H', W').

    padding: a width, one width or pair (before, after) for each dimension, "valid" (none), or "same" (the
    input's size, with stride 1). Raises ShapeError, DTypeError.
    """
    return _conv("conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


def _conv(name: str, dims: int, input: Any, weight: Tensor, bias: Tensor | None, stride: Ints,
          padding: Padding,
          dilation: Ints, groups: int) -> Tensor:
    x, single = batched(name, input, dims)
    if weight.ndim != dims + 2:
        raise ShapeError(f"{name}: the weight is (outputs, channels / groups, *kernel) with {dims} kernel "
                         f"dimensions, got {weight.shape}")
    step, apart = numbers(stride, dims, f"{name}: stride"), numbers(dilation, dims, f"{name}: dilation")
    given = {"stride": step, "padding": _conv_padding(name, padding, weight.shape[2:], step, apart),
             "dilation": apart, "groups": int(groups)}
    y = _call("conv", x, weight, **given) if bias is None else _call("conv_bias", x, weight, bias, **given)
    return _unbatched(y, single)


def _conv_padding(name: str, padding: Padding, kernel: Sequence[int], stride: Sequence[int],
                  dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if not isinstance(padding, str):
        return _pairs(padding, len(kernel), f"{name}: padding")
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding != "same":
        raise ValueError(f"{name}: padding is {padding!r}; use 'same', 'valid' or numbers")
    if any(s != 1 for s in stride):
        raise ShapeError(f"{name}: padding='same' needs stride 1, got {tuple(stride)}; give the padding as "
                         f"numbers")
    total = [apart * (k - 1) for k, apart in zip(kernel, dilation, strict=True)]
    return tuple((n // 2, n - n // 2) for n in total)


def conv_transpose1d(input: Any, weight: Tensor, bias: Tensor | None = None, stride: Ints = 1,
                     padding: Ints = 0, output_padding: Ints = 0, groups: int = 1,
                     dilation: Ints = 1) -> Tensor:
    """The adjoint of conv1d: (N, C, L) and `weight` (C, O / groups, K) give (N, O, L').

    `output_padding` adds elements at the end of L', of which stride leaves the size open. Raises ShapeError.
    """
    return _conv_transpose("conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding,
                           groups, dilation)


def conv_transpose2d(input: Any, weight: Tensor, bias: Tensor | None = None, stride: Ints = 1,
                     padding: Ints = 0, output_padding: Ints = 0, groups: int = 1,
                     dilation: Ints = 1) -> Tensor:
    """The adjoint of conv2d: (N, C, H, W) and `weight` (C, O / groups, KH, KW) give (N, O, H', W').

    `output_padding` adds elements at the end of H' and W', whose size stride leaves open. Raises ShapeError.
    """
    return _conv_transpose("conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding,
                           groups, dilation)


def _conv_transpose(name: str, dims: int, input: Any, weight: Tensor, bias: Tensor | None, stride: Ints,
                    padding: Ints, output_padding: Ints, groups: int, dilation: Ints) -> Tensor:
    x, single = batched(name, input, dims)
    if weight.ndim != dims + 2:
        raise ShapeError(f"{name}: the weight is (channels, outputs / groups, *kernel) with {dims} kernel "
                         f"dimensions, got {weight.shape}")
    step, apart = numbers(stride, dims, f"{name}: stride"), numbers(dilation, dims, f"{name}: dilation")
    extra = numbers(output_padding, dims, f"{name}: output_padding")
    if any(not 0 <= e < max(s, d) for e, s, d in zip(extra, step, apart, strict=True)):
        raise ShapeError(f"{name}: output_padding {extra} must be at least 0 and less than stride {step} or "
                         f"dilation {apart}")
    widths = _pairs(padding, dims, f"{name}: padding")
    size = transposed_size(x.shape[2:], weight.shape[2:], step, widths, apart, extra)
    y = _call("conv_input_grad", x, weight, size=size, stride=step, padding=widths, dilation=apart,
              groups=int(groups))
    if bias is not None:
        y = y + (bias.astype(y.dtype) if inside() else bias).reshape(-1, *(1,) * dims)
    return _unbatched(y, single)


# --- pooling ----------------------------------------------------------------------------------------------

def max_pool1d(input: Any, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
               dilation: Ints = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:
    """Largest element of each window of (N, C, L); see max_pool2d."""
    return _max_pool("max_pool1d", 1, input, kernel_size, stride, padding, dilation, ceil_mode,
                     return_indices)


def max_pool2d(input: Any, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
               dilation: Ints = 1,
               ceil_mode: bool = False, return_indices: bool = False) -> Any:
    """Largest element of each window of (N, C, H, W); the first of equal ones gets the gradient.

    stride is kernel_size unless given. ceil_mode: windows that end outside the input count if they start
    inside. return_indices: also their int64 indices into the flattened H * W. Raises ShapeError, DTypeError.
    """
    return _max_pool("max_pool2d", 2, input, kernel_size, stride, padding, dilation, ceil_mode,
                     return_indices)


def _max_pool(name: str, dims: int, input: Any, kernel_size: Ints, stride: Ints | None, padding: Ints,
              dilation: Ints, ceil_mode: bool, return_indices: bool) -> Any:
    x, single = batched(name, input, dims)
    given = {**_windows(name, dims, kernel_size, stride, padding, ceil_mode),
             "dilation": numbers(dilation, dims, f"{name}: dilation")}
    y, tap = _call("max_pool", x, **given)
    if not return_indices:
        return _unbatched(y, single)
    index = _call("max_pool_index", tap, size=tuple(x.shape[2:]), **given)
    return _unbatched(y, single), _unbatched(index, single)


def _windows(name: str, dims: int, kernel_size: Ints, stride: Ints | None, padding: Ints,
             ceil_mode: bool) -> dict[str, Any]:
    kernel = numbers(kernel_size, dims, f"{name}: kernel_size")
    step = kernel if stride is None or stride in ((), []) else numbers(stride, dims, f"{name}: stride")
    return {"kernel": kernel, "stride": step,
            "padding": _pairs(padding, dims, f"{name}: padding"), "ceil_mode": bool(ceil_mode)}


def avg_pool1d(input: Any, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
               ceil_mode: bool = False, count_include_pad: bool = True) -> Tensor:
    """Average of each window of (N, C, L); see avg_pool2d."""
    return _avg_pool("avg_pool1d", 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(input: Any, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
               ceil_mode: bool = False, count_include_pad: bool = True,
               divisor_override: int | None = None) -> Tensor:
    """Average of each window of (N, C, H, W).

    stride is kernel_size unless given. Sums are divided by divisor_override, or by the elements of the
    window, of which padding counts if count_include_pad. Raises ShapeError, DTypeError.
    """
    return _avg_pool("avg_pool2d", 2, input, kernel_size, stride, padding, ceil_mode, count_include_pad,
                     divisor_override)


def _avg_pool(name: str, dims: int, input: Any, kernel_size: Ints, stride: Ints | None, padding: Ints,
              ceil_mode: bool, count_include_pad: bool, divisor: int | None) -> Tensor:
    x, single = batched(name, input, dims)
    given = _windows(name, dims, kernel_size, stride, padding, ceil_mode)
    return _unbatched(_call("avg_pool", x, **given, count_include_pad=bool(count_include_pad),
                            divisor=divisor), single)


def adaptive_avg_pool1d(input: Any, output_size: Any) -> Tensor:
    """Averages of (N, C, L) over `output_size` windows; see adaptive_avg_pool2d."""
    return _adaptive_avg("adaptive_avg_pool1d", 1, input, output_size)


def adaptive_avg_pool2d(input: Any, output_size: Any) -> Tensor:
    """Averages of (N, C, H, W) over a grid of `output_size` windows; None leaves a dimension as it is.

    Window i of m over n elements goes from floor(i n / m) to ceil((i + 1) n / m).
    """
    return _adaptive_avg("adaptive_avg_pool2d", 2, input, output_size)


def _adaptive_avg(name: str, dims: int, input: Any, output_size: Any) -> Tensor:
    x, single = batched(name, input, dims)
    count = _grid(name, x.shape[2:], output_size)
    if all(m == 1 for m in count):
        y = x.mean(tuple(range(2, x.ndim)), keepdims=True)
    else:
        y = _call("adaptive_avg_pool", x, count=count)
    return _unbatched(y, single)


def _grid(name: str, size: Sequence[int], output_size: Any) -> tuple[int, ...]:
    given = (output_size,) * len(size) if output_size is None or isinstance(output_size,
                                                                            int) else tuple(output_size)
    given = given * len(size) if len(given) == 1 else given
    if len(given) != len(size) or any(m is not None and m < 1 for m in given) or not all(size):
        raise ShapeError(f"{name}: output_size {output_size} needs a positive number or None for each "
                         f"spatial dimension of {tuple(size)}, none of which may be empty")
    return tuple(n if m is None else m for n, m in zip(size, given, strict=True))


def adaptive_max_pool1d(input: Any, output_size: Any) -> Tensor:
    """Largest elements of (N, C, L) in `output_size` windows; see adaptive_max_pool2d."""
    return _adaptive_max("adaptive_max_pool1d", 1, input, output_size)


def adaptive_max_pool2d(input: Any, output_size: Any) -> Tensor:
    """Largest elements of (N, C, H, W) in a grid of windows, which are those of adaptive_avg_pool2d."""
    return _adaptive_max("adaptive_max_pool2d", 2, input, output_size)


def _adaptive_max(name: str, dims: int, input: Any, output_size: Any) -> Tensor:
    x, single = batched(name, input, dims)
    size, count = x.shape[2:], _grid(name, x.shape[2:], output_size)
    if all(n % m == 0 for n, m in zip(size, count, strict=True)):
        kernel = tuple(n // m for n, m in zip(size, count, strict=True))
        return _unbatched(_max_pool(name, dims, x, kernel, None, 0, 1, False, False), single)
    for d, (n, m) in enumerate(zip(size, count, strict=True)):
        x = _largest_along(x, 2 + d, n, m)
    return _unbatched(x, single)


def _largest_along(x: Tensor, axis: int, n: int, m: int) -> Tensor:
    """One dimension after the other; windows are filled up to equal widths with their last element again."""
    bounds = adaptive_bounds(n, m)
    width = max(stop - start for start, stop in bounds)
    places = [min(start + k, stop - 1) for start, stop in bounds for k in range(width)]
    parts = take(x, asarray(places), axis=axis).reshape(*x.shape[:axis], m, width, *x.shape[axis + 1:])
    best = argmax(parts, axis=axis + 1, keepdims=True)
    found: Tensor = take_along_axis(parts, best, axis=axis + 1).squeeze(axis + 1)
    return found


__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "avg_pool1d",
    "avg_pool2d", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "max_pool1d", "max_pool2d",
]
