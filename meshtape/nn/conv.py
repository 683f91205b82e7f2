"""Convolution layers, by torch.nn's names and default initialisation."""

from __future__ import annotations

import math
from typing import Any

from meshtape.autograd import Tensor
from meshtape.creation import empty
from meshtape.nn import init
from meshtape.nn import spatial_functions as functions
from meshtape.nn.module import Module
from meshtape.nn.parameter import Parameter
from meshtape.nn.spatial_functions import Ints, Padding, numbers
from meshtape.runtime.dtypes import AnyDType
from meshtape.runtime.errors import ShapeError


class _Conv(Module):
    """What all convolutions share: `dims` spatial dimensions, and whether the weight is that of the
    adjoint.
    """

    dims: int
    transposed = False

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Ints, stride: Ints, padding: Padding,
                 dilation: Ints, groups: int, bias: bool, dtype: AnyDType) -> None:
        super().__init__()
        name = type(self).__name__
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ShapeError(f"{name}: {in_channels} input and {out_channels} output channels do not divide "
                             f"into {groups} groups")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = numbers(kernel_size, self.dims, f"{name}: kernel_size")
        self.stride = numbers(stride, self.dims, f"{name}: stride")
        widths: Any = padding
        if not isinstance(padding, str):
            widths = numbers(widths, self.dims, f"{name}: padding")
        self.padding = widths
        self.dilation = numbers(dilation, self.dims, f"{name}: dilation")
        self.groups = groups
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        self.weight = Parameter(empty((first, second // groups, *self.kernel_size), dtype=dtype))
        self.register_parameter("bias", Parameter(empty((out_channels,), dtype=dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights and biases, uniformly in +-1/sqrt(fan in)."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in, _ = init.fans(self.weight)
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        given: list[tuple[str, Any, Any]] = [
            ("padding", self.padding, (0,) * self.dims), ("dilation", self.dilation, (1,) * self.dims),
            ("groups", self.groups, 1), ("bias", self.bias is not None, True)]
        options = "".join(f", {name}={value}" for name, value, default in given if value != default)
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
                f"stride={self.stride}{options}")


class _Forward(_Conv):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: Ints, stride: Ints = 1,
                 padding: Padding = 0, dilation: Ints = 1, groups: int = 1, bias: bool = True,
                 padding_mode: str = "zeros", dtype: AnyDType = None) -> None:
        if padding_mode != "zeros":
            raise ValueError(f"{type(self).__name__}: padding_mode {padding_mode!r} is not supported; use "
                             f"'zeros', or pad the input first")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                         dtype)


class Conv1d(_Forward):
    """functional.conv1d with its own weight (out_channels, in_channels / groups, kernel_size) and bias."""

    dims = 1

    def forward(self, x: Any) -> Tensor:
        return functions.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation,
                                self.groups)


class Conv2d(_Forward):
    """functional.conv2d with its own weight (out_channels, in_channels / groups, *kernel_size) and bias."""

    dims = 2

    def forward(self, x: Any) -> Tensor:
        return functions.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation,
                                self.groups)


class _Transposed(_Conv):
    transposed = True

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Ints, stride: Ints = 1,
                 padding: Ints = 0, output_padding: Ints = 0, groups: int = 1, bias: bool = True,
                 dilation: Ints = 1, dtype: AnyDType = None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                         dtype)
        self.output_padding = numbers(output_padding, self.dims, f"{type(self).__name__}: output_padding")


class ConvTranspose1d(_Transposed):
    """functional.conv_transpose1d with its own weight (in_channels, out_channels / groups, kernel_size)."""

    dims = 1

    def forward(self, x: Any) -> Tensor:
        return functions.conv_transpose1d(x, self.weight, self.bias, self.stride, self.padding,
                                          self.output_padding, self.groups, self.dilation)


class ConvTranspose2d(_Transposed):
    """functional.conv_transpose2d with its own weight (in_channels, out_channels / groups, *kernel_size)."""

    dims = 2

    def forward(self, x: Any) -> Tensor:
        return functions.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding,
                                          self.output_padding, self.groups, self.dilation)


__all__ = ["Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"]
