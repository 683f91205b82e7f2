"""Rows of activation functions, with PyTorch's attributes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from meshtape.runtime import special
from meshtape.runtime.op import Op, Sample
from meshtape.runtime.ops.pointwise import exp, greater, mul, tanh, where
from meshtape.runtime.ops.reduce import accumulator
from meshtape.runtime.ops.rules import BOOL, COMPLEX, binary, floated, promoted, unary, unary_samples
from meshtape.runtime.rowwise import blockwise


def _sigmoid(xp: Any, x: Any) -> Any:
    out = xp.exp(-x)
    out += 1
    return xp.reciprocal(out)


sigmoid = unary("sigmoid", _sigmoid, floated(COMPLEX), elementwise="1 / (1 + exp(-x))", keeps="out",
                slope=lambda out, x: out * (1 - out))

_CLIPPED = 8192     # elements from which on np.clip is faster: np.maximum has no vector code for scalars


def _relu(xp: Any, x: Any, out: Any = None) -> Any:
    if xp is np and x.dtype.kind == "f" and x.size >= _CLIPPED:
        return np.clip(x, 0, np.inf, out=out)
    return xp.maximum(x, 0, out=out)


relu = unary("relu", _relu, promoted(BOOL, COMPLEX),
             elementwise="max(x, 0)", keeps="out", vjp=(lambda g, out, x: relu_grad(g, out),))
# Unlike where(y > 0, x, 0), whose 0 is an operand, it is declared linear in the gradient x.
relu_grad: Op = binary(
    "relu_grad", lambda xp, x, y, out=None: special.select(xp, y > 0, x, 0, out), promoted(BOOL, COMPLEX),
    linear=((0,),), elementwise="where(y > 0, x, 0)", keeps="y",
    vjp=(lambda g, out, x, y: relu_grad(g, y), None),
    samples=lambda: [Sample((shape, shape)) for shape in ((5, 3), (), (2, 1, 4), (0, 3))])

leaky_relu = unary(
    "leaky_relu", lambda xp, x, negative_slope: special.select(xp, x > 0, x, x * negative_slope),
    floated(COMPLEX), attrs={"negative_slope": 0.01}, keeps="x",
    elementwise="where(x > 0, x, x * negative_slope)",
    vjp=(lambda g, out, x, negative_slope: where(greater(x, 0), g, g * negative_slope),),
    samples=lambda: [*unary_samples()(), *unary_samples(kinds="f", negative_slope=0.3)()])


def _silu_slope(out: Any, x: Any) -> Any:
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


silu = unary("silu", lambda xp, x: x * _sigmoid(xp, x), floated(COMPLEX), elementwise="x / (1 + exp(-x))",
             keeps="x", slope=_silu_slope)


def _softplus(xp: Any, x: Any, beta: float, threshold: float) -> Any:
    """log(1 + exp(beta x)) / beta, and x where beta x > threshold, without overflow."""
    z = x * beta
    smooth = xp.maximum(z, 0) + xp.log1p(xp.exp(-xp.absolute(z)))
    return xp.where(z > threshold, x, smooth / beta)


def _softplus_vjp(g: Any, out: Any, x: Any, beta: float, threshold: float) -> Any:
    z = x * beta
    return where(greater(z, threshold), g, g * sigmoid(z))


softplus = unary(
    "softplus", _softplus, floated(COMPLEX), attrs={"beta": 1.0, "threshold": 20.0}, keeps="x",
    autocast="float32",
    elementwise="where(x * beta > threshold, x, (max(x * beta, 0) + log1p(exp(-abs(x * beta)))) / beta)",
    vjp=(_softplus_vjp,),
    samples=lambda: [*unary_samples()(), *unary_samples(-8, 8, kinds="f", beta=2.0, threshold=5.0)()])


# --- GELU ---------------------------------------------------------------------------------------------------
# approximate="none": x Phi(x) with the normal distribution Phi(x) = (1 + erf(x / sqrt 2)) / 2;
# "tanh": x (1 + tanh(u)) / 2 with u = k (x + c x^3). Hendrycks and Gimpel, arXiv:1606.08415.

_K, _C = math.sqrt(2 / math.pi), 0.044715
_ERF, _TANH = f"erf(x * {math.sqrt(0.5)!r})", f"tanh(x * (x * x * {_K * _C!r} + {_K!r}))"
_GELU = f'(({_TANH} if approximate == "tanh" else {_ERF}) + 1) * x * 0.5'
_GELU_GRAD = (
    f'g * 0.5 * (({_TANH} + 1 + x * (1 - {_TANH} * {_TANH}) * (x * x * {3 * _K * _C!r} + {_K!r}))'
    f' if approximate == "tanh" else ({_ERF} + 1 + x * exp(x * x * -0.5) * {_K!r}))')


def _gelu_rule(name: str) -> Callable[..., Any]:
    def rule(x: Any, approximate: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        if approximate not in ("none", "tanh"):
            raise ValueError(f'{name}: approximate is {approximate!r}; use "none" or "tanh"')
        return floated(COMPLEX)(name)(x)
    return rule


def _odd_part(xp: Any, x: Any, square: Any, approximate: str) -> Any:
    """2 Phi(x) - 1: erf(x / sqrt 2), or tanh(u)."""
    if approximate == "tanh":
        return special.tanh_of(xp, (_K * _C, _K), x, square)
    if xp is np and x.dtype == np.float32:
        return special.tanh_of(xp, special.HALF_NORMAL, x, square)
    return special.erf(xp, x * math.sqrt(0.5))


def _gelu(xp: Any, x: Any, approximate: str, out: Any = None) -> Any:
    def block(out: Any, x: Any) -> None:
        twice = _odd_part(xp, x, x * x, approximate)
        twice += 1
        twice *= x
        xp.multiply(twice, 0.5, out=out)

    return _widely(xp, block, (x,), out)


def _gelu_grad(xp: Any, g: Any, x: Any, approximate: str, out: Any = None) -> Any:
    """g times d GELU / dx: Phi(x) + x phi(x), or with p = (1 + tanh(u)) / 2, p + 2 x p (1 - p) du/dx."""
    def block(out: Any, g: Any, x: Any) -> None:
        square = x * x
        twice = _odd_part(xp, x, square, approximate)
        if approximate == "tanh":
            square *= 3 * _K * _C
            square += _K
            square *= 1 - twice * twice
        else:
            square *= -0.5
            xp.exp(square, out=square)
            square *= math.sqrt(2 / math.pi)
        square *= x
        twice += 1
        twice += square
        twice *= 0.5
        xp.multiply(twice, g, out=out)

    return _widely(xp, block, (g, x), out)


def _widely(xp: Any, block: Callable[..., None], arrays: tuple[Any, ...], out: Any) -> Any:
    """Block by block, 16-bit floats in float32."""
    dtype = arrays[0].dtype
    wide = accumulator(dtype)
    if wide == dtype:
        return blockwise(xp, block, arrays, out)
    return blockwise(xp, block, [a.astype(wide) for a in arrays]).astype(dtype)


def _gelu_curvature(x: Any, approximate: str) -> Any:
    """The second derivative of GELU: phi(x) (2 - x^2), or its counterpart with tanh."""
    square = x * x
    if approximate == "none":
        return exp(square * -0.5) * (2 - square) * (1 / math.sqrt(2 * math.pi))
    t = tanh(x * (_K + _K * _C * square))
    du, steepness = _K * (1 + 3 * _C * square), 1 - t * t
    return steepness * (du + x * (x * (3 * _K * _C) - t * du * du))


def _gelu_samples() -> list[Sample]:
    return [*unary_samples(approximate="none")(), *unary_samples(approximate="tanh")()]


def _gelu_grad_by_x(u: Any, out: Any, g: Any, x: Any, approximate: str) -> Any:
    return mul(mul(u, g), _gelu_curvature(x, approximate))


def _gelu_grad_rule(name: str) -> Callable[..., Any]:
    def rule(g: Any, x: Any, approximate: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        (found,), outs = _gelu_rule(name)(x, approximate)
        return (found, found), outs
    return rule


gelu = unary("gelu", _gelu, _gelu_rule, attrs={"approximate": "none"}, keeps="x", samples=_gelu_samples,
             elementwise=_GELU, over=lambda inputs, attrs: [(0, 0)],
             vjp=(lambda g, out, x, approximate: gelu_grad(g, x, approximate=approximate),))
# One row, so that the backward of GELU is one pass. Its inputs have one shape.
gelu_grad: Op = binary(
    "gelu_grad", _gelu_grad, _gelu_grad_rule, attrs={"approximate": "none"}, keeps="g x", linear=((0,),),
    elementwise=_GELU_GRAD, over=lambda inputs, attrs: [(0, 0)],
    vjp=(lambda u, out, g, x, approximate: gelu_grad(u, x, approximate=approximate), _gelu_grad_by_x),
    samples=lambda: [Sample((shape, shape), {"approximate": approximate}) for approximate in ("none", "tanh")
                     for shape in ((5, 3), (), (2, 1, 4), (0, 3))])
