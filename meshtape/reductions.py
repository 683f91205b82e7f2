"""Reductions, by their Array API names. `axis` is None (all), an int, or a tuple of ints."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.autograd.autocast import wide
from meshtape.runtime.dtypes import AnyDType, canonical
from meshtape.runtime.op import lookup, normalize_axes, normalize_axis

Axis = int | Sequence[int] | None


def _reduce(name: str, x: Any, axis: Axis, keepdims: bool, *more: Any) -> Tensor:
    x = x if isinstance(x, Tensor) else as_tensor(x)
    where = None if axis is None else normalize_axes(axis, x.ndim, name)
    if where == () and axis != ():
        where = None
    return apply(lookup(name), (x,), (where, bool(keepdims), *more))


def sum(x: Any, /, axis: Axis = None, *, dtype: AnyDType = None, keepdims: bool = False) -> Tensor:
    """Sum over `axis`; booleans and integers sum in int64 (unsigned: uint64) unless `dtype` is given."""
    return _reduce("sum", x, axis, keepdims, None if dtype is None else canonical(dtype).name)


def prod(x: Any, /, axis: Axis = None, *, dtype: AnyDType = None, keepdims: bool = False) -> Tensor:
    """Product over `axis`; integers multiply in int64 (unsigned: uint64) unless `dtype` is given."""
    return _reduce("prod", x, axis, keepdims, None if dtype is None else canonical(dtype).name)


def mean(x: Any, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Arithmetic mean over `axis`; integers average in float32."""
    return _reduce("mean", x, axis, keepdims, None)


def max(x: Any, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Largest value over `axis`; NaN if there is one. Ties share the gradient evenly."""
    return _reduce("max", x, axis, keepdims)


def min(x: Any, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Smallest value over `axis`; NaN if there is one. Ties share the gradient evenly."""
    return _reduce("min", x, axis, keepdims)


def any(x: Any, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """True where any element over `axis` is not zero."""
    return _reduce("any", x, axis, keepdims)


def all(x: Any, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """True where all elements over `axis` are not zero."""
    return _reduce("all", x, axis, keepdims)


def count_nonzero(x: Any, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Number (int64) of elements over `axis` that are not zero."""
    return _reduce("count_nonzero", x, axis, keepdims)


def logsumexp(x: Any, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """log(sum(exp(x))) over `axis`, without overflow."""
    return _reduce("logsumexp", x, axis, keepdims)


def _arg(name: str, x: Any, axis: int | None, keepdims: bool) -> Tensor:
    x = x if isinstance(x, Tensor) else as_tensor(x)
    return apply(lookup(name), (x,), (
        None if axis is None or x.ndim == 0 else normalize_axis(axis, x.ndim, name), bool(keepdims)))


def argmax(x: Any, /, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
    """Index (int64) of the first largest value along `axis`, or in the flattened tensor."""
    return _arg("argmax", x, axis, keepdims)


def argmin(x: Any, /, axis: int | None = None, *, keepdims: bool = False) -> Tensor:
    """Index (int64) of the first smallest value along `axis`, or in the flattened tensor."""
    return _arg("argmin", x, axis, keepdims)


def var(x: Any, /, axis: Axis = None, *, correction: float = 0.0, keepdims: bool = False) -> Tensor:
    """Variance over `axis`: sum((x - mean)^2) / (n - correction).

    The mean is over the whole tensor, also where it is split.
    """
    given = x if isinstance(x, Tensor) else as_tensor(x)
    x = wide(given)
    over = normalize_axes(axis, x.ndim, "var")
    n = 1
    for a in over:
        n *= x.shape[a]
    centred = x - mean(x, over, keepdims=True)
    total = sum(centred * centred, over, keepdims=keepdims)
    out = total / builtins.max(n - correction, 0.0)
    return out if x is given else out.astype(given.dtype)


def std(x: Any, /, axis: Axis = None, *, correction: float = 0.0, keepdims: bool = False) -> Tensor:
    """Standard deviation over `axis`: the square root of var()."""
    return apply(lookup("sqrt"), (var(x, axis, correction=correction, keepdims=keepdims),))


def norm(x: Any, /, axis: Axis = None, *, keepdims: bool = False) -> Tensor:
    """Euclidean norm over `axis`."""
    x = wide(x if isinstance(x, Tensor) else as_tensor(x))
    return apply(lookup("sqrt"), (sum(x * x, axis, keepdims=keepdims),))


__all__ = [
    "all",
    "any",
    "argmax",
    "argmin",
    "count_nonzero",
    "logsumexp",
    "max",
    "mean",
    "min",
    "norm",
    "prod",
    "std",
    "sum",
    "var",
]
