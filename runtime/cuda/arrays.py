"""The array module that plain kernels get on a device: CuPy, with what it lacks or does badly replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

# Functions of order that CuPy may have no loops of bfloat16 for.
_WITHOUT_BFLOAT16 = ("argmax", "argmin")


class ArrayModule:
    """CuPy's functions as attributes, products by the device's BLAS.

    CuPy's own products cannot be part of a CUDA graph, cast float16 to float32 when batched, refuse batched
    bfloat16, and copy strided operands.

    tables(make, *args): see runtime.tables; kept as long as the device, since graphs know their addresses.

    `__name__` is "cupy". All names are in the instance's dictionary, so looking one up costs what it costs on
    a module.
    """

    def __init__(self, device: Any) -> None:
        cp = device.cp
        self.__dict__.update((name, value) for name, value in vars(cp).items() if not name.startswith("_"))
        self.__name__ = "cupy"
        self.tables = cache(lambda make, *args: tuple(cp.asarray(a) for a in make(*args)))
        self.matmul: Callable[..., Any] = cp.matmul if device.blas is None else device.blas.matmul
        self.dot = self._dot
        self.tensordot = self._tensordot
        self.einsum = self._einsum
        self.erf = self._erf
        self.where = self._where
        self.round = _keeping(cp.round)
        self._device_where = cp.where
        for name in ("tril", "triu"):
            setattr(self, name, _on_bits(getattr(cp, name)))
        for name in _WITHOUT_BFLOAT16:
            setattr(self, name, _widening(getattr(cp, name)))
        self._device_erf = device.libraries.special.erf

    def _erf(self, x: Any) -> Any:
        """The error function of a real floating array, in its dtype; of 16-bit floats by float32."""
        if x.dtype.itemsize >= 4:
            return self._device_erf(x)
        return self._device_erf(x.astype(np.float32)).astype(x.dtype)

    def _where(self, condition: Any, *cases: Any) -> Any:
        """numpy.where; of bfloat16 on bits, as CuPy's would give float32."""
        dtypes = {x.dtype for x in cases if hasattr(x, "dtype")}
        if len(dtypes) != 1 or (dtype := dtypes.pop()).kind != "V":
            return self._device_where(condition, *cases)
        bits = (x.view(np.uint16) if hasattr(x, "dtype") else int(np.asarray(x, dtype).view(np.uint16))
                for x in cases)
        return self._device_where(condition, *bits).view(dtype)

    def _dot(self, a: Any, b: Any, out: Any = None) -> Any:
        """numpy.dot of arrays with at least one dimension."""
        if b.ndim <= 2:
            return self.matmul(a, b, out=out)
        return self._placed(self._tensordot(a, b, ((a.ndim - 1,), (b.ndim - 2,))), out)

    def _placed(self, result: Any, out: Any) -> Any:
        if out is None:
            return result
        out[...] = result
        return out

    def _tensordot(self, a: Any, b: Any, axes: Any = 2) -> Any:
        """numpy.tensordot: one product of matrices, of which operands are views where their strides allow."""
        left, right = _axis_lists(axes, a.ndim, b.ndim)
        rest_a = [i for i in range(a.ndim) if i not in left]
        rest_b = [i for i in range(b.ndim) if i not in right]
        inner = [a.shape[i] for i in left]
        if inner != [b.shape[i] for i in right]:
            raise ValueError(f"tensordot: summed dimensions differ, {a.shape} and {b.shape} over {axes}")
        rows, columns = [a.shape[i] for i in rest_a], [b.shape[i] for i in rest_b]
        count = int(np.prod(inner))
        x = a.transpose(rest_a + left).reshape(int(np.prod(rows)), count)
        y = b.transpose(right + rest_b).reshape(count, int(np.prod(columns)))
        return self.matmul(x, y).reshape(*rows, *columns)

    def _einsum(self, subscripts: str, *operands: Any) -> Any:
        """numpy.einsum of one or two arrays, explicit, without repeated letters in an operand."""
        left, wanted = subscripts.split("->")
        terms = left.split(",")
        summed = [self._sum_over(x, term, [c for c in term if c not in wanted + "".join(
            other for j, other in enumerate(terms) if j != i)]) for i, (x, term) in
            enumerate(zip(operands, terms, strict=True))]
        if len(summed) == 1:
            (x, term), = summed
            return x.transpose([term.index(c) for c in wanted])
        (x, a), (y, b) = summed
        batch = [c for c in a if c in b and c in wanted]
        inner = [c for c in a if c in b and c not in wanted]
        rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
        size = {c: n for x_, t in summed for c, n in zip(t, x_.shape, strict=True)}
        x = _as_matrices(x, a, batch, rows, inner, size)
        y = _as_matrices(y, b, batch, inner, columns, size)
        order = batch + rows + columns
        return self.matmul(x, y).reshape([size[c] for c in order]).transpose([order.index(c) for c in wanted])

    def _sum_over(self, x: Any, term: str, letters: Sequence[str]) -> tuple[Any, str]:
        """An operand without the letters that only it has."""
        if not letters:
            return x, term
        return x.sum(axis=tuple(term.index(c) for c in letters)), "".join(c for c in term if c not in letters)


def _widening(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on bfloat16 cast to float32, which does not change the order."""
    return lambda x, *args, **kwargs: function(
        x.astype(np.float32) if x.dtype.kind == "V" else x, *args, **kwargs)


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of floats, of bfloat16 by float32 and back."""
    return lambda x, *args: (function(x.astype(np.float32), *args).astype(x.dtype) if x.dtype.kind == "V"
                             else function(x, *args))


def _on_bits(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that moves elements or clears them, of bfloat16 on bits, as CuPy's would give float32."""
    return lambda x, *args: (function(x.view(np.uint16), *args).view(x.dtype) if x.dtype.kind == "V"
                             else function(x, *args))


def _axis_lists(axes: Any, na: int, nb: int) -> tuple[list[int], list[int]]:
    """The summed dimensions of both operands, as tensordot's `axes` names them."""
    if isinstance(axes, int):
        return list(range(na - axes, na)), list(range(axes))
    left, right = ([a] if isinstance(a, int) else list(a) for a in axes)
    return [i % na for i in left], [i % nb for i in right]


def _as_matrices(x: Any, term: str, batch: Sequence[str], rows: Sequence[str], columns: Sequence[str],
                 size: dict[str, int]) -> Any:
    """An operand as a stack of matrices."""
    order = [*batch, *rows, *columns]
    return x.transpose([term.index(c) for c in order]).reshape(
        *(size[c] for c in batch), int(np.prod([size[c] for c in rows])),
        int(np.prod([size[c] for c in columns])))
