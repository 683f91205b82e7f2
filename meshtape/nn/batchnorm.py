"""Normalization layers over batches, groups of channels and instances, by torch.nn's names."""

from __future__ import annotations

from typing import Any

from meshtape.autograd import Tensor
from meshtape.creation import ones, zeros
from meshtape.nn import batchnorm_functions as functions
from meshtape.nn import init
from meshtape.nn.module import Module
from meshtape.nn.parameter import Parameter
from meshtape.runtime.dtypes import AnyDType
from meshtape.runtime.errors import ShapeError


class _Affine(Module):
    """A weight and a bias for every channel, or none."""

    def __init__(self, channels: int, affine: bool, dtype: AnyDType) -> None:
        super().__init__()
        self.affine = affine
        self.register_parameter("weight", Parameter(ones((channels,), dtype=dtype)) if affine else None)
        self.register_parameter("bias", Parameter(zeros((channels,), dtype=dtype)) if affine else None)

    def reset_parameters(self) -> None:
        """Weight 1 and bias 0."""
        if self.affine:
            init.ones_(self.weight)
            init.zeros_(self.bias)


def _check_input(module: Module, x: Any, ranks: tuple[int, ...], channels: int, axis: int = 1) -> None:
    if x.ndim not in ranks or x.shape[axis] != channels:
        needed = " or ".join(f"{r} dimensions" for r in ranks)
        raise ShapeError(f"{type(module).__name__}({channels}): needs {needed} with {channels} channels "
                         f"along dimension {axis}, got {x.shape}")


class _BatchNorm(_Affine):
    ranks: tuple[int, ...]

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
                 affine: bool = True,
                 track_running_stats: bool = True, dtype: AnyDType = None) -> None:
        super().__init__(num_features, affine, dtype)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        tracked = track_running_stats
        self.register_buffer("running_mean", zeros((num_features,), dtype=dtype) if tracked else None)
        self.register_buffer("running_var", ones((num_features,), dtype=dtype) if tracked else None)
        self.register_buffer("num_batches_tracked", zeros((), dtype="int64") if tracked else None)

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batches seen."""
        if self.track_running_stats:
            init.zeros_(self.running_mean)
            init.ones_(self.running_var)
            self.num_batches_tracked.assign(self.num_batches_tracked * 0, "reset_running_stats")

    def reset_parameters(self) -> None:
        """Weight 1 and bias 0, and running statistics as at first."""
        super().reset_parameters()
        self.reset_running_stats()

    def forward(self, x: Any) -> Tensor:
        _check_input(self, x, self.ranks, self.num_features)
        momentum: Any = self.momentum
        moving = self.training and self.running_mean is not None
        if moving:
            self.num_batches_tracked.assign(self.num_batches_tracked + 1, "batch_norm")
            if momentum is None:        # a plain average over all batches
                momentum = 1.0 / self.num_batches_tracked.astype(self.running_mean.dtype)
        return functions.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                    self.training or self.running_mean is None, momentum, self.eps)

    def extra_repr(self) -> str:
        return (f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
                f"track_running_stats={self.track_running_stats}")


class BatchNorm1d(_BatchNorm):
    """functional.batch_norm of (N, C) or (N, C, L), with statistics over the whole batch of all workers."""

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """functional.batch_norm of (N, C, H, W), with statistics over the whole batch of all workers."""

    ranks = (4,)


class GroupNorm(_Affine):
    """functional.group_norm with its own weight and bias (num_channels,)."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True,
                 dtype: AnyDType = None) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ShapeError(f"GroupNorm: {num_channels} channels do not divide into {num_groups} groups")
        super().__init__(num_channels, affine, dtype)
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps

    def forward(self, x: Any) -> Tensor:
        return functions.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"


class _InstanceNorm(_Affine):
    rank: int

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = False,
                 dtype: AnyDType = None) -> None:
        super().__init__(num_features, affine, dtype)
        self.num_features = num_features
        self.eps = eps

    def forward(self, x: Any) -> Tensor:
        _check_input(self, x, (self.rank,), self.num_features)
        return functions.instance_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class InstanceNorm1d(_InstanceNorm):
    """functional.instance_norm of (N, C, L)."""

    rank = 3


class InstanceNorm2d(_InstanceNorm):
    """functional.instance_norm of (N, C, H, W)."""

    rank = 4


__all__ = ["BatchNorm1d", "BatchNorm2d", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d"]
