"""Pooling layers, by torch.nn's names."""

from __future__ import annotations

from typing import Any

from meshtape.autograd import Tensor
from meshtape.nn import spatial_functions as functions
from meshtape.nn.module import Module
from meshtape.nn.spatial_functions import Ints


class _MaxPool(Module):
    def __init__(self, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0, dilation: Ints = 1,
                 return_indices: bool = False, ceil_mode: bool = False) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.return_indices = return_indices
        self.ceil_mode = ceil_mode

    def extra_repr(self) -> str:
        return (f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
                f"dilation={self.dilation}, ceil_mode={self.ceil_mode}")


class MaxPool1d(_MaxPool):
    """functional.max_pool1d."""

    def forward(self, x: Any) -> Any:
        return functions.max_pool1d(x, self.kernel_size, self.stride, self.padding, self.dilation,
                                    self.ceil_mode, self.return_indices)


class MaxPool2d(_MaxPool):
    """functional.max_pool2d."""

    def forward(self, x: Any) -> Any:
        return functions.max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation,
                                    self.ceil_mode, self.return_indices)


class _AvgPool(Module):
    def __init__(self, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
                 ceil_mode: bool = False,
                 count_include_pad: bool = True) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AvgPool1d(_AvgPool):
    """functional.avg_pool1d."""

    def forward(self, x: Any) -> Tensor:
        return functions.avg_pool1d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode,
                                    self.count_include_pad)


class AvgPool2d(_AvgPool):
    """functional.avg_pool2d."""

    def __init__(self, kernel_size: Ints, stride: Ints | None = None, padding: Ints = 0,
                 ceil_mode: bool = False,
                 count_include_pad: bool = True, divisor_override: int | None = None) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad)
        self.divisor_override = divisor_override

    def forward(self, x: Any) -> Tensor:
        return functions.avg_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode,
                                    self.count_include_pad, self.divisor_override)


class _Adaptive(Module):
    def __init__(self, output_size: Any) -> None:
        super().__init__()
        self.output_size = output_size

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class AdaptiveAvgPool1d(_Adaptive):
    """functional.adaptive_avg_pool1d."""

    def forward(self, x: Any) -> Tensor:
        return functions.adaptive_avg_pool1d(x, self.output_size)


class AdaptiveAvgPool2d(_Adaptive):
    """functional.adaptive_avg_pool2d."""

    def forward(self, x: Any) -> Tensor:
        return functions.adaptive_avg_pool2d(x, self.output_size)


class AdaptiveMaxPool1d(_Adaptive):
    """functional.adaptive_max_pool1d."""

    def forward(self, x: Any) -> Tensor:
        return functions.adaptive_max_pool1d(x, self.output_size)


class AdaptiveMaxPool2d(_Adaptive):
    """functional.adaptive_max_pool2d."""

    def forward(self, x: Any) -> Tensor:
        return functions.adaptive_max_pool2d(x, self.output_size)


__all__ = ["AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AvgPool1d",
           "AvgPool2d", "MaxPool1d", "MaxPool2d"]
