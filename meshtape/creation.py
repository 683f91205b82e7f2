"""Tensors made from data and from nothing. What is made from nothing is made on the workers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.autograd.foreign import from_dlpack
from meshtape.runtime.dtypes import DEFAULT_FLOAT, DEFAULT_INT, AnyDType, canonical
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import integers, lookup
from meshtape.runtime.shards import Placements, Shape
from meshtape.scheduler import current
from meshtape.scheduler.layout import AnyLayout, parse_layout


def tensor(
    data: Any, dtype: AnyDType = None, layout: AnyLayout | None = None, requires_grad: bool = False
) -> Tensor:
    """A tensor with a copy of `data`: an array, a number, or nested lists of numbers.

    Python floats and lists of them become float32; arrays keep their dtype. Replicate unless `layout` says
    otherwise. Raises DTypeError, ShapeError, LayoutError.
    """
    out = as_tensor(data, dtype, layout)
    if isinstance(data, Tensor):
        out = out.detach()
    return out.requires_grad_() if requires_grad else out


def asarray(obj: Any, /, *, dtype: AnyDType = None, copy: bool | None = None) -> Tensor:
    """`obj` as a tensor (the Array API's name for tensor()); a tensor is returned as it is."""
    return as_tensor(obj, dtype)


def shape_tuple(shape: int | tuple[int, ...] | list[int]) -> Shape:
    """A shape as a tuple of ints; raises ShapeError on extents that are no integers, or negative."""
    out = integers(shape, "shape")
    if any(n < 0 for n in out):
        raise ShapeError(f"shape {out} has a negative extent")
    return out


def placements_for(layout: AnyLayout | None, ndim: int) -> Placements | None:
    return None if layout is None else parse_layout(layout, current.session().axes, ndim)


def create(name: str, inputs: tuple[Any, ...], ndim: int, layout: AnyLayout | None, requires_grad: bool,
           **attrs: Any) -> Tensor:
    """Record a creation op under the wanted layout (Replicate unless told)."""
    op = lookup(name)
    out: Tensor = apply(
        op, inputs, op.pack(attrs), placements_for(layout, ndim) or current.session().axes.replicated
    )
    return out.requires_grad_() if requires_grad else out


def full(
    shape: int | tuple[int, ...],
    fill_value: Any,
    *,
    dtype: AnyDType = None,
    layout: AnyLayout | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """A tensor of `shape` filled with a number; the dtype follows it (float32, int64, bool) unless given."""
    if isinstance(fill_value, Tensor):
        fill_value = fill_value.item()
    wanted = canonical(type(fill_value) if dtype is None else dtype)
    s = shape_tuple(shape)
    return create("full", (fill_value,), len(s), layout, requires_grad, shape=s, dtype=wanted.name)


def zeros(shape: int | tuple[int, ...], *, dtype: AnyDType = None, layout: AnyLayout | None = None,
          requires_grad: bool = False) -> Tensor:
    """A tensor of zeros (float32 unless `dtype` is given)."""
    return full(
        shape,
        0.0,
        dtype=DEFAULT_FLOAT if dtype is None else dtype,
        layout=layout,
        requires_grad=requires_grad,
    )


def ones(shape: int | tuple[int, ...], *, dtype: AnyDType = None, layout: AnyLayout | None = None,
         requires_grad: bool = False) -> Tensor:
    """A tensor of ones (float32 unless `dtype` is given)."""
    return full(
        shape,
        1.0,
        dtype=DEFAULT_FLOAT if dtype is None else dtype,
        layout=layout,
        requires_grad=requires_grad,
    )


def empty(shape: int | tuple[int, ...], *, dtype: AnyDType = None, layout: AnyLayout | None = None) -> Tensor:
    """A tensor of `shape`; its values are zeros (nothing in a program may depend on what memory held
    before).
    """
    return zeros(shape, dtype=dtype, layout=layout)


def full_like(x: Tensor, /, fill_value: Any, *, dtype: AnyDType = None) -> Tensor:
    """A tensor like `x` (shape, dtype, layout; Partial becomes Replicate) filled with a number."""
    placements = tuple(-1 if isinstance(p, str) else p for p in x.spec.placements)
    op = lookup("full")
    return apply(op, (fill_value,), op.pack(
        {"shape": x.shape, "dtype": (x.dtype if dtype is None else canonical(dtype)).name}), placements)


def zeros_like(x: Tensor, /, *, dtype: AnyDType = None) -> Tensor:
    """Zeros like `x`."""
    return full_like(x, 0, dtype=dtype)


def ones_like(x: Tensor, /, *, dtype: AnyDType = None) -> Tensor:
    """Ones like `x`."""
    return full_like(x, 1, dtype=dtype)


def empty_like(x: Tensor, /, *, dtype: AnyDType = None) -> Tensor:
    """Zeros like `x`."""
    return full_like(x, 0, dtype=dtype)


def arange(start: float, /, stop: float | None = None, step: float = 1, *, dtype: AnyDType = None,
           layout: AnyLayout | None = None) -> Tensor:
    """start, start + step, ... below stop; arange(n) counts from 0. int64 for integers, else float32."""
    if stop is None:
        start, stop = 0, start
    if step == 0:
        raise ShapeError("arange: step is 0")
    whole = all(isinstance(v, int | np.integer) for v in (start, stop, step))
    wanted = canonical(dtype) if dtype is not None else DEFAULT_INT if whole else DEFAULT_FLOAT
    n = max(0, -((start - stop) // step) if whole else math.ceil((stop - start) / step))
    return create("arange", (start, step), 1, layout, False, n=int(n), dtype=wanted.name)


def linspace(start: float, stop: float, /, num: int, *, dtype: AnyDType = None, endpoint: bool = True,
             layout: AnyLayout | None = None) -> Tensor:
    """`num` evenly spaced values from start to stop (included unless endpoint=False)."""
    wanted = DEFAULT_FLOAT if dtype is None else canonical(dtype)
    return create(
        "linspace",
        (float(start), float(stop)),
        1,
        layout,
        False,
        n=int(num),
        endpoint=bool(endpoint),
        dtype=wanted.name,
    )


def eye(n_rows: int, n_cols: int | None = None, /, *, k: int = 0, dtype: AnyDType = None,
        layout: AnyLayout | None = None) -> Tensor:
    """Ones on diagonal `k` of an (n_rows, n_cols) matrix, zeros elsewhere."""
    wanted = DEFAULT_FLOAT if dtype is None else canonical(dtype)
    return create(
        "eye",
        (),
        2,
        layout,
        False,
        n=int(n_rows),
        m=int(n_rows if n_cols is None else n_cols),
        k=int(k),
        dtype=wanted.name,
    )


__all__ = [
    "arange",
    "asarray",
    "empty",
    "empty_like",
    "eye",
    "from_dlpack",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "tensor",
    "zeros",
    "zeros_like",
]
