"""Initialisation of parameters in place, by torch.nn.init's names.

The values depend on the seed and the draw, not on the mesh. Every function returns its tensor.
"""

from __future__ import annotations

import math

from meshtape import random
from meshtape.autograd import Tensor
from meshtape.creation import eye, full_like
from meshtape.elementwise import erf, exp, log1p, sign, sqrt
from meshtape.gradmode import no_grad
from meshtape.runtime.errors import ShapeError
from meshtape.scheduler.layout import Layout, Partial, Replicate


def _layout(t: Tensor) -> Layout | dict[str, object]:
    return {n: Replicate() if isinstance(p, Partial) else p for n, p in t.layout.items()}


def _set(t: Tensor, values: Tensor) -> Tensor:
    with no_grad():
        return t.assign(values, "nn.init")


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """Uniform on [a, b)."""
    return _set(tensor, random.uniform(a, b, tensor.shape, dtype=tensor.dtype, layout=_layout(tensor)))


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Normal with this mean and standard deviation."""
    return _set(tensor, random.normal(mean, std, tensor.shape, dtype=tensor.dtype, layout=_layout(tensor)))


def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0,
                  b: float = 2.0) -> Tensor:
    """Normal, restricted to [a, b] (bounds of the values, not multiples of std): the inverse of the
    distribution function at uniform numbers, computed in float64.
    """
    below, above = (math.erf((bound - mean) / std / math.sqrt(2.0)) for bound in (a, b))
    with no_grad():
        y = random.uniform(below, above, tensor.shape, dtype="float64", layout=_layout(tensor))
        values = inverse_erf(y) * (std * math.sqrt(2.0)) + mean
        return tensor.assign(values.clip(a, b), "nn.init")


def inverse_erf(y: Tensor) -> Tensor:
    """x with erf(x) = y, for float64 y in [-1, 1] (the ends give about +-5.9).

    Winitzki's approximation (relative error 2e-3) and two steps of Halley's method.
    """
    y = y.clip(-1 + 2.0 ** -53, 1 - 2.0 ** -53)
    k = 0.147
    logarithm = log1p(-y * y)
    half = logarithm * 0.5 + 2 / (math.pi * k)
    x = sign(y) * sqrt(sqrt(half * half - logarithm / k) - half)
    for _ in range(2):
        u = (erf(x) - y) * exp(x * x) * (math.sqrt(math.pi) / 2)
        x = x - u / (x * u + 1)
    return x


def constant_(tensor: Tensor, val: float) -> Tensor:
    """`val` everywhere."""
    with no_grad():
        return tensor.assign(full_like(tensor, val), "nn.init")


def zeros_(tensor: Tensor) -> Tensor:
    """0 everywhere."""
    return constant_(tensor, 0.0)


def ones_(tensor: Tensor) -> Tensor:
    """1 everywhere."""
    return constant_(tensor, 1.0)


def eye_(tensor: Tensor) -> Tensor:
    """The identity matrix, for a tensor of 2 dimensions."""
    if tensor.ndim != 2:
        raise ShapeError(f"eye_: needs 2 dimensions, got shape {tensor.shape}")
    return _set(tensor, eye(*tensor.shape, dtype=tensor.dtype))


def zero_row_(tensor: Tensor, row: int) -> Tensor:
    """0 in one row of a table; the others stay."""
    with no_grad():
        tensor[row] = 0.0
    return tensor


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The recommended gain of a nonlinearity, by torch's table; `param` is leaky_relu's negative slope."""
    table = {"linear": 1.0, "conv1d": 1.0, "conv2d": 1.0, "conv3d": 1.0, "sigmoid": 1.0, "tanh": 5.0 / 3.0,
             "relu": math.sqrt(2.0), "selu": 0.75}
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        return math.sqrt(2.0 / (1.0 + slope * slope))
    if nonlinearity not in table:
        raise ValueError(f"calculate_gain: {nonlinearity!r} is unknown; use one of {', '.join(table)}, "
                         f"leaky_relu")
    return table[nonlinearity]


def fans(tensor: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (out, in, *kernel)."""
    if tensor.ndim < 2:
        raise ShapeError(f"fan in and fan out need a weight of at least 2 dimensions, got shape "
                         f"{tensor.shape}")
    field = math.prod(tensor.shape[2:])
    return tensor.shape[1] * field, tensor.shape[0] * field


def xavier_uniform_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Uniform in +-gain sqrt(6 / (fan_in + fan_out)) (Glorot, Bengio 2010, eq. 16)."""
    bound = gain * math.sqrt(6.0 / max(sum(fans(tensor)), 1))
    return uniform_(tensor, -bound, bound)


def xavier_normal_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Normal with std gain sqrt(2 / (fan_in + fan_out)) (Glorot, Bengio 2010)."""
    return normal_(tensor, 0.0, gain * math.sqrt(2.0 / max(sum(fans(tensor)), 1)))


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"kaiming: mode is {mode!r}; use 'fan_in' or 'fan_out'")
    fan = fans(tensor)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(max(fan, 1))


def kaiming_uniform_(tensor: Tensor, a: float = 0.0, mode: str = "fan_in",
                     nonlinearity: str = "leaky_relu") -> Tensor:
    """Uniform in +-gain sqrt(3 / fan) (He et al. 2015, arXiv:1502.01852); `a` is leaky_relu's negative slope.
    """
    bound = math.sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound)


def kaiming_normal_(tensor: Tensor, a: float = 0.0, mode: str = "fan_in",
                    nonlinearity: str = "leaky_relu") -> Tensor:
    """Normal with std gain / sqrt(fan) (He et al. 2015, arXiv:1502.01852); `a` is leaky_relu's negative
    slope.
    """
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity))


__all__ = ["calculate_gain", "constant_", "eye_", "fans", "kaiming_normal_", "kaiming_uniform_", "normal_",
           "ones_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_", "zeros_"]
