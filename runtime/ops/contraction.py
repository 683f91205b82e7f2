"""Products that sum over shared dimensions: matmul, linear layers, einsum.

Every row here is multilinear, so Partial passes through each input alone, and a split contraction letter
makes the output Partial: tensor parallelism and the gradient all-reduce are both this rule.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from meshtape.runtime import pieces
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import ALPHABET, Axes, DeviceKernel, Op, Sample, broadcast_shapes, register
from meshtape.runtime.ops.pointwise import mul
from meshtape.runtime.ops.reduce import accumulator, sum_
from meshtape.runtime.ops.rules import BOOL, conjugate, promoted, unbroadcast
from meshtape.runtime.ops.shape import reshape
from meshtape.runtime.rowwise import add_row
from meshtape.runtime.shards import Shape


def widen(x: Any) -> Any:
    """`x` in the dtype in which its sums are accumulated: float32 for 16-bit floats, which BLAS lacks."""
    return x.astype(accumulator(x.dtype), copy=False)


def by_blas(run: Any) -> DeviceKernel:
    """A device kernel of products by Device.blas, which takes all shapes and dtypes."""
    return DeviceKernel(run, lambda shapes, dtypes, attrs: True)


def count_rows(shape: Shape) -> int:
    """How many vectors along the last dimension there are (reshape's -1 cannot tell for empty arrays)."""
    return prod(shape[:-1])


# --- matmul -----------------------------------------------------------------------------------------

def _transposed(shape: Shape, flag: bool) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2]) if flag else shape


def _check_matrices(x: Shape, y: Shape, transpose_x: bool, transpose_y: bool) -> None:
    if not x or not y:
        raise ShapeError(f"matmul: needs at least one dimension, got {x} @ {y}; multiply by a scalar with *")
    if (transpose_x and len(x) < 2) or (transpose_y and len(y) < 2):
        raise ShapeError(f"matmul: a vector cannot be transposed, got {x} @ {y}")


def _matmul_shape(x: Shape, y: Shape, transpose_x: bool, transpose_y: bool) -> list[Shape]:
    _check_matrices(x, y, transpose_x, transpose_y)
    a, b = _transposed(x, transpose_x), _transposed(y, transpose_y)
    if a[-1] != b[-2 if len(b) > 1 else 0]:
        raise ShapeError(f"matmul: inner axes differ, {a} @ {b}; transpose an operand or check the layer "
                         f"sizes")
    return [broadcast_shapes("matmul", a[:-2], b[:-2]) + a[-2:-1] + (b[-1:] if len(b) > 1 else ())]


def _matmul_axes(x: Shape, y: Shape, transpose_x: bool, transpose_y: bool) -> Axes:
    batch = broadcast_shapes("matmul", x[:-2], y[:-2])
    names = ALPHABET[:len(batch)]
    k, m, n = "KMN"

    def stretch(shape: Shape) -> str:
        lead = len(batch) - len(shape[:-2])
        return "".join(names[i] if size == batch[i] else "." for i, size in enumerate(shape[:-2], start=lead))

    left = k if len(x) == 1 else stretch(x) + (k + m if transpose_x else m + k)
    right = k if len(y) == 1 else stretch(y) + (n + k if transpose_y else k + n)
    return Axes((left, right), (names + (m if len(x) > 1 else "") + (n if len(y) > 1 else ""),))


def _matmul(xp: Any, x: Any, y: Any, transpose_x: bool, transpose_y: bool, out: Any = None) -> Any:
    """Transposes stay views, which BLAS reads in place; leading dimensions of x become rows of a matrix."""
    dtype = x.dtype
    x, y = widen(x), widen(y)
    if transpose_x:
        x = x.swapaxes(-1, -2)
    if transpose_y:
        y = y.swapaxes(-1, -2)
    if x.dtype != dtype:
        return xp.matmul(x, y).astype(dtype)
    if x.ndim > 2 and y.ndim == 2:
        rows = x.reshape(count_rows(x.shape), x.shape[-1])
        return pieces.times(xp, rows, y).reshape(*x.shape[:-1], y.shape[-1])
    return pieces.times(xp, x, y, out) if x.ndim == y.ndim == 2 else xp.matmul(x, y, out=out)


def _matmul_on_device(dev: Any, x: Any, y: Any, transpose_x: bool, transpose_y: bool, out: Any = None) -> Any:
    x = x.swapaxes(-1, -2) if transpose_x else x
    return dev.blas.matmul(x, y.swapaxes(-1, -2) if transpose_y else y, out)


def _matmul_vjp_x(g: Any, out: Any, x: Any, y: Any, transpose_x: bool, transpose_y: bool) -> Any:
    y = conjugate(y)
    if x.ndim == y.ndim == 1:
        return mul(g, y)
    if y.ndim == 1:
        return unbroadcast(_outer(y, g) if transpose_x else _outer(g, y), x)
    if x.ndim == 1:
        return unbroadcast(_times_vectors(y, g, transpose_y), x)
    if transpose_x:
        return unbroadcast(matmul(y, g, transpose_x=transpose_y, transpose_y=True), x)
    return unbroadcast(matmul(g, y, transpose_y=not transpose_y), x)


def _matmul_vjp_y(g: Any, out: Any, x: Any, y: Any, transpose_x: bool, transpose_y: bool) -> Any:
    x = conjugate(x)
    if x.ndim == y.ndim == 1:
        return mul(g, x)
    if x.ndim == 1:
        return unbroadcast(_outer(g, x) if transpose_y else _outer(x, g), y)
    if y.ndim == 1:
        return unbroadcast(_times_vectors(x, g, not transpose_x), y)
    if y.ndim == 2 and not transpose_x:
        return linear_weight_grad(g, x) if transpose_y else linear_weight_grad(x, g)
    if transpose_y:
        return unbroadcast(matmul(g, x, transpose_x=True, transpose_y=transpose_x), y)
    return unbroadcast(matmul(x, g, transpose_x=not transpose_x), y)


def _outer(left: Any, right: Any) -> Any:
    """left[..., i] * right[..., j]; either may lack the other's batch dimensions."""
    rows = reshape(right, shape=(*right.shape[:-1], 1, right.shape[-1]))
    return mul(reshape(left, shape=(*left.shape, 1)), rows)


def _times_vectors(matrices: Any, vectors: Any, transpose: bool) -> Any:
    """Each matrix (transposed if asked) times the vector of the same batch index."""
    columns = matmul(matrices, reshape(vectors, shape=(*vectors.shape, 1)), transpose_x=transpose)
    return reshape(columns, shape=columns.shape[:-1])


def _matmul_samples() -> list[Sample]:
    shapes = [((5,), (5,)), ((4, 5), (5,)), ((5,), (5, 3)), ((4, 5), (5, 3)), ((1, 5), (5, 1)),
              ((4, 0), (0, 3)), ((2, 4, 5), (5, 3)), ((2, 4, 5), (5,)), ((5,), (2, 5, 3)),
              ((4, 5), (2, 5, 3)), ((2, 4, 5), (2, 5, 3)), ((2, 1, 4, 5), (3, 5, 2)), ((3, 4, 5), (1, 5, 2))]
    turned = [((5, 4), (5, 3), True, False), ((4, 5), (3, 5), False, True), ((5, 4), (3, 5), True, True),
              ((2, 5, 4), (5, 3), True, False), ((2, 4, 5), (3, 5), False, True),
              ((2, 5, 4), (3, 5), True, True), ((2, 5, 4), (5,), True, False), ((5,), (2, 3, 5), False, True),
              ((2, 1, 5, 4), (3, 2, 5), True, True)]
    return [Sample(s) for s in shapes] + [
        Sample((x, y), {"transpose_x": tx, "transpose_y": ty}) for x, y, tx, ty in turned]


matmul: Op = register(Op(
    "matmul", kernel=_matmul, attrs={"transpose_x": False, "transpose_y": False}, shape=_matmul_shape,
    dtype=promoted(BOOL)("matmul"), axes=_matmul_axes, linear=((0,), (1,)), keeps="x y", autocast="low",
    vjp=(_matmul_vjp_x, _matmul_vjp_y), samples=_matmul_samples, device=by_blas(_matmul_on_device)))


# --- linear layers ----------------------------------------------------------------------------------

def _linear_shape(x: Shape, w: Shape, b: Shape) -> list[Shape]:
    if len(w) != 2 or not x or x[-1] != w[1]:
        raise ShapeError(f"linear: weight is (out, in) and the input's last dimension must be in, got input "
                         f"{x} and weight {w}; check the layer sizes")
    if b != (w[0],):
        raise ShapeError(f"linear: bias must be ({w[0]},) for weight {w}, got {b}")
    return [(*x[:-1], w[0])]


def _linear_axes(x: Shape, w: Shape, b: Shape) -> Axes:
    lead = ALPHABET[:len(x) - 1]
    return Axes((lead + "K", "NK", "N"), (lead + "N",), additive=(2,))


def turns(rows: int, n: int, k: int) -> bool:
    """Whether x @ w.T, with few rows, is better computed as (w @ x.T).T.

    OpenBLAS packs the whole of w for few rows otherwise. Turned around while the bias is added, 128 rows of
    1024 by 1024 took 1.42 ms instead of 1.74, 128 of 784 by 512 took 0.52 instead of 0.57, and 256 of 784 by
    512 no less than 0.99 (EPYC, AVX-512, one thread).
    """
    return 16 <= rows <= 160 and n >= max(256, 2 * rows) and k >= 128


def _linear(xp: Any, x: Any, w: Any, b: Any, out: Any = None) -> Any:
    dtype = x.dtype
    x, w, b = widen(x), widen(w), widen(b)
    rows = x.reshape(count_rows(x.shape), x.shape[-1]) if x.ndim != 2 else x
    out = out if x.ndim == 2 and x.dtype == dtype else None
    if xp is np and turns(rows.shape[0], *w.shape):
        room = np.empty((len(rows), len(w)), w.dtype) if out is None else out
        y = np.add(np.matmul(w, rows.T).T, b, out=room)
    else:
        y = pieces.times(xp, rows, w.T, out)
        add_row(xp, y, b)
    return y.reshape(*x.shape[:-1], w.shape[0]).astype(dtype, copy=False)


linear: Op = register(Op(
    "linear", kernel=_linear, shape=_linear_shape, dtype=promoted(BOOL)("linear"), axes=_linear_axes,
    linear=((0, 2), (1, 2)), keeps="x w", autocast="low",
    device=by_blas(lambda dev, x, w, b, out=None: dev.blas.linear(x, w, b, out)),
    vjp=(lambda g, out, x, w, b: matmul(g, conjugate(w)),
         lambda g, out, x, w, b: linear_weight_grad(g, conjugate(x)),
         lambda g, out, x, w, b: sum_(g, axis=tuple(range(g.ndim - 1))) if g.ndim > 1 else g),
    samples=lambda: [Sample(s) for s in (((6, 5), (3, 5), (3,)), ((5,), (3, 5), (3,)), ((0, 5), (3, 5), (3,)),
                                         ((2, 4, 5), (3, 5), (3,)), ((1, 1), (1, 1), (1,)))]))


def _weight_grad_shape(g: Shape, x: Shape) -> list[Shape]:
    if not g or not x or g[:-1] != x[:-1]:
        raise ShapeError(f"linear_weight_grad: all dimensions but the last must agree, got {g} and {x}")
    return [(g[-1], x[-1])]


def _weight_grad_axes(g: Shape, x: Shape) -> Axes:
    lead = ALPHABET[:len(x) - 1]
    return Axes((lead + "N", lead + "K"), ("NK",))


def _linear_weight_grad(xp: Any, g: Any, x: Any, out: Any = None) -> Any:
    """sum over all leading dimensions of g[..., n] * x[..., k], as one matrix product."""
    dtype = g.dtype
    g, x = widen(g), widen(x)
    n, k = g.shape[-1], x.shape[-1]
    rows = count_rows(g.shape)
    found = pieces.inner(xp, g.reshape(rows, n), x.reshape(rows, k), out if g.dtype == dtype else None)
    return found.astype(dtype, copy=False)


def _weight_grad_on_device(dev: Any, g: Any, x: Any, out: Any = None) -> Any:
    rows = count_rows(g.shape)
    return dev.blas.gemm(g.reshape(rows, g.shape[-1]), x.reshape(rows, x.shape[-1]), out, transpose_a=True)


linear_weight_grad: Op = register(Op(
    "linear_weight_grad", kernel=_linear_weight_grad, shape=_weight_grad_shape,
    dtype=promoted(BOOL)("linear_weight_grad"), axes=_weight_grad_axes, linear=((0,), (1,)), keeps="g x",
    device=by_blas(_weight_grad_on_device),
    vjp=(lambda u, out, g, x: matmul(conjugate(x), u, transpose_y=True),
         lambda u, out, g, x: matmul(conjugate(g), u)),
    samples=lambda: [Sample(s) for s in (((6, 3), (6, 5)), ((3,), (5,)), ((2, 4, 3), (2, 4, 5)),
                                         ((0, 3), (0, 5)), ((1, 1), (1, 2)))]))
