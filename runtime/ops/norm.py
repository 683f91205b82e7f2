"""Layer normalization: one fused row forward and one backward, with and without the affine part.

With x over the last `ndim` dimensions (n elements), mean and rstd = 1 / sqrt(var + eps) of each row are
outputs that backward keeps. With h = (x - mean) * rstd, m(.) the mean over a row, and a = g * weight:

    dx = rstd * (a - m(a) - h * m(a * h)),   dweight = sum over rows of g * h,   dbias = sum over rows of g

(Ba, Kiros, Hinton 2016, arXiv:1607.06450). The normalized dimensions are never split; where the others are,
dweight and dbias are Partial.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels import norm as cuda_norm
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import ALPHABET, Axes, Op, Sample, register
from meshtape.runtime.ops.contraction import widen
from meshtape.runtime.ops.pointwise import add, mul, negative, sub
from meshtape.runtime.ops.reduce import accumulator, mean, sum_
from meshtape.runtime.ops.rules import COMPLEX, floated
from meshtape.runtime.ops.shape import broadcast_to
from meshtape.runtime.rowwise import Rows, add_row, row_blocks, unbuffered
from meshtape.runtime.shards import Shape

NORM_ATTRS: dict[str, Any] = {"ndim": 1, "eps": 1e-5}


def check_normalized(name: str, x: Shape, ndim: int, *affine: Shape) -> None:
    if not 0 < ndim <= len(x):
        raise ShapeError(f"{name}: {ndim} normalized dimensions, the input is {x}")
    for given in affine:
        if given != x[len(x) - ndim:]:
            raise ShapeError(f"{name}: weight and bias have the shape {x[len(x) - ndim:]} of the normalized "
                             f"dimensions of {x}, got {given}")


def statistics_shape(x: Shape, ndim: int) -> Shape:
    return x[:len(x) - ndim] + (1,) * ndim


def letters(x: Shape, ndim: int) -> tuple[str, str]:
    """Letters of the input, and dots of the normalized dimensions."""
    return ALPHABET[:len(x) - ndim] + "." * ndim, "." * ndim


def as_rows(x: Any, ndim: int) -> Any:
    return widen(x).reshape(prod(x.shape[:x.ndim - ndim]), prod(x.shape[x.ndim - ndim:]))


# --- forward ----------------------------------------------------------------------------------------

def _normalize_shape(x: Shape, *affine: Shape, ndim: int, eps: float) -> list[Shape]:
    check_normalized("layer_norm", x, ndim, *affine)
    return [x, statistics_shape(x, ndim), statistics_shape(x, ndim)]


def _normalize_dtype(*dtypes: Any, **attrs: Any) -> tuple[Any, Any]:
    ins, (found,) = floated(COMPLEX)("layer_norm")(*dtypes)
    return ins, (found, accumulator(found), accumulator(found))


def _normalize_axes(x: Shape, *affine: Shape, ndim: int, eps: float) -> Axes:
    names, whole = letters(x, ndim)
    return Axes((names, *(whole for _ in affine)), (names,) * 3)


def _layer_norm(xp: Any, x: Any, weight: Any, bias: Any, ndim: int, eps: float) -> Any:
    return _normalize_rows(xp, x, (widen(weight).reshape(-1), widen(bias).reshape(-1)), ndim, eps)


def _normalize(xp: Any, x: Any, ndim: int, eps: float) -> Any:
    return _normalize_rows(xp, x, None, ndim, eps)


def _normalize_rows(xp: Any, x: Any, affine: tuple[Any, Any] | None, ndim: int, eps: float) -> Any:
    x_rows = as_rows(x, ndim)
    rows = Rows(xp, x_rows.shape[1], x_rows.dtype)
    out = xp.empty(x_rows.shape, x_rows.dtype)
    mean_, rstd = (xp.empty(len(x_rows), x_rows.dtype) for _ in range(2))
    with unbuffered(xp, rows.width):
        for block in row_blocks(xp, x_rows.shape):
            here, center = out[block], rows.sums(x_rows[block])
            center /= rows.width
            rows.shift(x_rows[block], -center, out=here)
            scale = rows.squares(here)
            scale /= rows.width
            scale += eps
            scale = 1 / xp.sqrt(scale)
            mean_[block], rstd[block] = center, scale
            rows.scale(here, scale, None if affine is None else affine[0], out=here)
            if affine is not None:
                add_row(xp, here, affine[1])
    shape = statistics_shape(x.shape, ndim)
    return out.reshape(x.shape).astype(x.dtype, copy=False), mean_.reshape(shape), rstd.reshape(shape)


# --- first derivative -------------------------------------------------------------------------------

def _grad_shape(g: Shape, x: Shape, mean_: Shape, rstd: Shape, *weight: Shape, ndim: int) -> list[Shape]:
    check_normalized("layer_norm_grad", x, ndim, *weight)
    if g != x or mean_ != statistics_shape(x, ndim) or rstd != mean_:
        raise ShapeError(f"layer_norm_grad: gradient and input must agree, and statistics be "
                         f"{statistics_shape(x, ndim)}; got {g}, {x}, {mean_}, {rstd}")
    return [x, *weight, *weight]


def _grad_dtype(g: Any, x: Any, mean_: Any, rstd: Any, *weight: Any, ndim: int) -> tuple[Any, Any]:
    found = floated(COMPLEX)("layer_norm_grad")(g, x, *weight)[1][0]
    wide = accumulator(found)
    return (found, found, wide, wide, *(found for _ in weight)), (found, *weight, *weight)


def _grad_axes(g: Shape, x: Shape, mean_: Shape, rstd: Shape, *weight: Shape, ndim: int) -> Axes:
    names, whole = letters(x, ndim)
    affine = (whole,) * len(weight)
    return Axes((names,) * 4 + affine, (names, *affine, *affine))


def _layer_norm_grad(xp: Any, g: Any, x: Any, mean_: Any, rstd: Any, weight: Any, ndim: int) -> Any:
    dx, dweight, dbias = _grad_rows(xp, g, x, mean_, rstd, widen(weight).reshape(-1), ndim)
    dweight, dbias = (d.reshape(weight.shape).astype(weight.dtype, copy=False) for d in (dweight, dbias))
    return dx, dweight, dbias


def _normalize_grad(xp: Any, g: Any, x: Any, mean_: Any, rstd: Any, ndim: int) -> Any:
    return _grad_rows(xp, g, x, mean_, rstd, None, ndim)[0]


def _grad_rows(xp: Any, g: Any, x: Any, mean_: Any, rstd: Any, weight: Any,
               ndim: int) -> tuple[Any, Any, Any]:
    """(dx, dweight, dbias); the last two are zeros without a weight. Row sums are matrix-vector products."""
    x_rows, upstream = as_rows(x, ndim), as_rows(g, ndim)
    center, scale = mean_.reshape(-1), rstd.reshape(-1)
    rows = Rows(xp, x_rows.shape[1], x_rows.dtype)
    factor = rows.ones if weight is None else weight
    out = xp.empty(x_rows.shape, x_rows.dtype)
    dweight, dbias = (xp.zeros(rows.width, x_rows.dtype) for _ in range(2))
    blocks = list(row_blocks(xp, x_rows.shape))
    room = xp.empty_like(out[blocks[0]]) if blocks else out
    with unbuffered(xp, rows.width):
        for block in blocks:
            u, v, m, r, dx = upstream[block], x_rows[block], center[block], scale[block], out[block]
            h = rows.shift(v, -m, out=dx)           # times r it is h; the factor is left to columns
            product = xp.multiply(u, h, out=room[:len(u)])
            if weight is not None:
                dweight += xp.matmul(r, product)
                dbias += xp.matmul(xp.ones_like(r), u)
            mean_g, mean_gh = (xp.matmul(a, factor) / rows.width for a in (u, product))
            rows.scale(h, -r * r * r * mean_gh, out=dx)
            rows.shift(dx, -r * mean_g, out=dx)
            dx += rows.scale(u, r, weight, out=product)
    return out.reshape(x.shape).astype(x.dtype, copy=False), dweight, dbias


# --- second derivative ------------------------------------------------------------------------------
# mean and rstd are functions of x: what would flow into them is part of the derivative by x. Each cotangent u
# below gives (by_g, by_x, by_weight), None where it does not reach.

Grads = tuple[Any, Any, Any]


def _through_dx(u: Any, g: Any, x: Any, mean_: Any, rstd: Any, weight: Any, ndim: int) -> Grads:
    """Of sum(u * dx). The projection a -> a - m(a) - h * m(a * h) is symmetric, so its adjoint is itself."""
    over = {"axis": tuple(range(x.ndim - ndim, x.ndim)), "keepdims": True}
    h = mul(sub(x, mean_), rstd)
    back = normalize_grad(u, x, mean_, rstd, ndim=ndim)
    a = g if weight is None else mul(g, weight)
    m_ah, m_uh = mean(mul(a, h), **over), mean(mul(u, h), **over)
    through_h = negative(mul(rstd, add(mul(u, m_ah), mul(a, m_uh))))
    product = sub(sub(mean(mul(u, a), **over), mul(mean(u, **over), mean(a, **over))), mul(m_uh, m_ah))
    through_rstd = mul(mul(mul(rstd, rstd), product), h)
    by_x = sub(normalize_grad(through_h, x, mean_, rstd, ndim=ndim), through_rstd)
    if weight is None:
        return back, by_x, None
    return mul(back, weight), by_x, sum_(mul(g, back), axis=tuple(range(x.ndim - ndim)))


def _through_dweight(u: Any, g: Any, x: Any, mean_: Any, rstd: Any, ndim: int) -> Grads:
    """Of sum(u * dweight)."""
    h = mul(sub(x, mean_), rstd)
    return mul(h, u), normalize_grad(mul(g, u), x, mean_, rstd, ndim=ndim), None


def _plus(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else add(a, b)


def _layer_norm_grad_vjp(u: Any, out: Any, g: Any, x: Any, mean_: Any, rstd: Any, weight: Any,
                         ndim: int) -> Any:
    total: Grads = (None, None, None)
    terms: list[Grads] = []
    if u[0] is not None:
        terms.append(_through_dx(u[0], g, x, mean_, rstd, weight, ndim))
    if u[1] is not None:
        terms.append(_through_dweight(u[1], g, x, mean_, rstd, ndim))
    if u[2] is not None:
        terms.append((broadcast_to(u[2], shape=tuple(g.shape)), None, None))
    for term in terms:
        total = tuple(_plus(a, b) for a, b in zip(total, term, strict=True))  # type: ignore[assignment]
    return total[0], total[1], None, None, total[2]


def _normalize_grad_vjp(u: Any, out: Any, g: Any, x: Any, mean_: Any, rstd: Any, ndim: int) -> Any:
    by_g, by_x, _ = _through_dx(u, g, x, mean_, rstd, None, ndim)
    return by_g, by_x, None, None


def _layer_norm_vjp(g: Any, out: Any, x: Any, weight: Any, bias: Any, ndim: int, eps: float) -> Any:
    found: Grads = (None, None, None)
    if g[0] is not None:
        found = layer_norm_grad(g[0], x, out[1], out[2], weight, ndim=ndim)
    return _plus(found[0], _through_statistics(g, out, x, ndim)), found[1], found[2]


def _normalize_vjp(g: Any, out: Any, x: Any, ndim: int, eps: float) -> Any:
    found = None if g[0] is None else normalize_grad(g[0], x, out[1], out[2], ndim=ndim)
    return (_plus(found, _through_statistics(g, out, x, ndim)),)


def _through_statistics(g: Any, out: Any, x: Any, ndim: int) -> Any:
    """The part of dx that comes from use of mean and rstd: dmean/dx = 1 / n, drstd/dx = -rstd**2 * h / n."""
    n = prod(x.shape[x.ndim - ndim:])
    by_mean = None if g[1] is None else broadcast_to(mul(g[1], 1 / n), shape=tuple(x.shape))
    if g[2] is None:
        return by_mean
    cube = mul(mul(out[2], out[2]), out[2])
    by_rstd = mul(mul(cube, mul(g[2], -1 / n)), sub(x, out[1]))
    return _plus(by_mean, by_rstd)


# --- rows -------------------------------------------------------------------------------------------

_SHAPES: tuple[tuple[Shape, int], ...] = (
    ((6, 5), 1), ((5,), 1), ((2, 3, 4), 1), ((2, 3, 4), 2), ((2, 3, 4), 3), ((0, 3), 1), ((1, 2), 1))


def _grad_samples(affine: bool) -> Callable[[], list[Sample]]:
    def make() -> list[Sample]:
        found = []
        for seed, (shape, ndim) in enumerate(_SHAPES):
            x = np.random.default_rng(seed).normal(size=shape)
            over = tuple(range(x.ndim - ndim, x.ndim))
            center, scale = x.mean(over, keepdims=True), 1 / np.sqrt(x.var(over, keepdims=True) + 0.1)
            weight = (shape[x.ndim - ndim:],) if affine else ()
            # mean and rstd are computed from x, so moving x alone would not be the total derivative.
            found.append(Sample((shape, x, center, scale, *weight), {"ndim": ndim}, diff=False))
        return found
    return make


layer_norm: Op = register(Op(
    "layer_norm", kernel=_layer_norm, attrs=NORM_ATTRS, shape=_normalize_shape, dtype=_normalize_dtype,
    device=cuda_norm.layer_norm,
    axes=_normalize_axes, n_out=3, vjp=_layer_norm_vjp, keeps="x weight out1 out2",
    autocast="float32",
    samples=lambda: [Sample((s, s[len(s) - n:], s[len(s) - n:]), {"ndim": n, "eps": 0.1})
                     for s, n in _SHAPES]))
normalize: Op = register(Op(
    "normalize", kernel=_normalize, attrs=NORM_ATTRS, shape=_normalize_shape, dtype=_normalize_dtype,
    device=cuda_norm.normalize,
    axes=_normalize_axes, n_out=3, vjp=_normalize_vjp, keeps="x out1 out2", autocast="float32",
    samples=lambda: [Sample((s,), {"ndim": n, "eps": 0.1}) for s, n in _SHAPES]))
layer_norm_grad: Op = register(Op(
    "layer_norm_grad", kernel=_layer_norm_grad, attrs={"ndim": 1}, shape=_grad_shape, dtype=_grad_dtype,
    device=cuda_norm.layer_norm_grad,
    axes=_grad_axes, n_out=3, linear=((0,),), vjp=_layer_norm_grad_vjp, keeps="g x mean_ rstd weight",
    samples=_grad_samples(True)))
normalize_grad: Op = register(Op(
    "normalize_grad", kernel=_normalize_grad, attrs={"ndim": 1}, shape=_grad_shape, dtype=_grad_dtype,
    device=cuda_norm.normalize_grad,
    axes=_grad_axes, linear=((0,),), vjp=_normalize_grad_vjp, keeps="g x mean_ rstd",
    samples=_grad_samples(False)))
