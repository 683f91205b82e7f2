"""Pointwise rows: arithmetic, elementary functions, comparisons, logic, selection, casts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from meshtape.runtime import dtypes, special
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import REQUIRED, Op, Sample
from meshtape.runtime.ops.rules import (
    BOOL,
    COMPLEX,
    FLOATING,
    DTypeRule,
    binary,
    binary_samples,
    conjugate,
    floated,
    no_slope,
    pointwise,
    promoted,
    real_part,
    tested,
    unary,
    unary_samples,
)
from meshtape.runtime.ops.rules import unbroadcast as unbroadcast

# --- arithmetic ---------------------------------------------------------------------------------------------

add = binary(
    "add", "add", promoted(), elementwise="x + y", linear=((0, 1),), samples=binary_samples(kinds="fibc"),
    vjp=(lambda g, out, x, y: unbroadcast(g, x), lambda g, out, x, y: unbroadcast(g, y)))

sub = binary(
    "sub", "subtract", promoted(BOOL), elementwise="x - y", linear=((0, 1),),
    vjp=(lambda g, out, x, y: unbroadcast(g, x), lambda g, out, x, y: unbroadcast(-g, y)),
    samples=binary_samples(kinds="fic"))

mul = binary(
    "mul", "multiply", promoted(), elementwise="x * y", linear=((0,), (1,)), keeps="x y",
    slopes=(lambda out, x, y: y, lambda out, x, y: x), samples=binary_samples(kinds="fibc"))

divide = binary(
    "divide", "divide", floated(), elementwise="x / y", linear=((0,),), keeps="x y",
    vjp=(lambda g, out, x, y: unbroadcast(g / conjugate(y), x),
         lambda g, out, x, y: unbroadcast(g * conjugate(-x / (y * y)), y)),
    samples=binary_samples(0.5, 2.0, kinds="fc"))

# The derivative of floor_divide is zero almost everywhere; that of remainder follows from
# remainder(x, y) = x - y * floor_divide(x, y).
floor_divide = binary("floor_divide", "floor_divide", promoted(BOOL, COMPLEX), vjp=(no_slope, no_slope),
                      elementwise="floor_divide(x, y)", samples=binary_samples(0.5, 3.0))
remainder = binary(
    "remainder", "remainder", promoted(BOOL, COMPLEX), elementwise="remainder(x, y)", keeps="x y",
    samples=binary_samples(0.5, 3.0),
    vjp=(lambda g, out, x, y: unbroadcast(g, x),
         lambda g, out, x, y: unbroadcast(-g * floor_divide(x, y), y)))


def _pow(xp: Any, x: Any, y: Any, out: Any = None) -> Any:
    if type(y) is int or type(y) is float:
        if y == 2:
            return xp.square(x, out=out)
        if y < 0 and x.dtype.kind in "iu":
            raise DTypeError(f"pow: an integer tensor to the negative power {y} is no integer; "
                             f"cast it to a floating dtype, or write {float(y)}")
    return xp.power(x, y, out=out)


def _pow_by_x(g: Any, out: Any, x: Any, y: Any) -> Any:
    if isinstance(y, int | float):
        if y == 0:
            return None
        return g * conjugate(x * 2 if y == 2 else pow_(x, y - 1) * y)
    slope = where(equal(y, 0), 0, y * pow_(x, y - 1))
    return unbroadcast(g * conjugate(slope), x)


def _pow_by_y(g: Any, out: Any, x: Any, y: Any) -> Any:
    # log(0) is replaced by 0, so that the slope of 0**y is 0 for y > 0 and stays differentiable.
    if isinstance(x, int | float):
        log_x: Any = math.log(x) if x > 0 else 0.0 if x == 0 else math.nan
    else:
        log_x = log(where(equal(x, 0), 1, x))
    return unbroadcast(g * conjugate(pow_(x, y) * log_x), y)


def _pow_samples() -> list[Sample]:
    zeros = np.array([0.0, 1.5, 0.0, 2.0])
    scalars = ((5, 3), 2), ((5,), -1), ((5,), 0), (zeros, 3), (zeros, 2.0)
    return [*binary_samples(0.5, 2.0, kinds="fic")(), *map(Sample, scalars),
            Sample(((5,), 3), dtype="int64", diff=False)]


pow_ = binary("pow", _pow, promoted(BOOL), elementwise="pow(x, y)", keeps="x y", vjp=(_pow_by_x, _pow_by_y),
              samples=_pow_samples, autocast="float32")

negative = unary("negative", "negative", promoted(BOOL), elementwise="-x", linear=((0,),),
                 vjp=(lambda g, out, x: -g,), samples=unary_samples(kinds="fic"))
positive = unary("positive", "positive", promoted(BOOL), elementwise="x", linear=((0,),),
                 vjp=(lambda g, out, x: g,), samples=unary_samples(kinds="fic"))
abs_ = unary("abs", "absolute", real_part(BOOL), elementwise="abs(x)", keeps="x",
             vjp=(lambda g, out, x: g * sign(x),), samples=unary_samples(kinds="fic"))
sign: Op = unary("sign", "sign", promoted(BOOL), elementwise="sign(x)", vjp=(no_slope,))
square = unary("square", "square", promoted(BOOL), elementwise="x * x", keeps="x", slope=lambda out, x: x * 2,
               samples=unary_samples(kinds="fic"), autocast="float32")
reciprocal = unary("reciprocal", "reciprocal", floated(), elementwise="1 / x", keeps="out",
                   slope=lambda out, x: -(out * out), samples=unary_samples(0.5, 2.0, kinds="fc"),
                   autocast="float32")
conj = unary("conj", "conjugate", promoted(BOOL), linear=((0,),), vjp=(lambda g, out, x: conjugate(g),),
             samples=unary_samples(kinds="fic"))
real = unary("real", lambda xp, x: x.real, real_part(), linear=((0,),), vjp=(lambda g, out, x: g,),
             samples=unary_samples(kinds="fc"))
imag = unary("imag", lambda xp, x: x.imag, real_part(), linear=((0,),), vjp=(lambda g, out, x: g * 1j,),
             samples=unary_samples(kinds="c"))

# --- elementary functions -----------------------------------------------------------------------------------

exp = unary("exp", "exp", floated(), elementwise="exp(x)", keeps="out", slope=lambda out, x: out,
            samples=unary_samples(kinds="fc"), autocast="float32")
expm1 = unary("expm1", "expm1", floated(), elementwise="expm1(x)", keeps="out", slope=lambda out, x: out + 1,
              autocast="float32")
log = unary("log", "log", floated(), elementwise="log(x)", keeps="x",
            vjp=(lambda g, out, x: g / conjugate(x),), samples=unary_samples(0.3, 3.0, kinds="fc"),
            autocast="float32")
log1p = unary("log1p", "log1p", floated(), elementwise="log1p(x)", keeps="x",
              vjp=(lambda g, out, x: g / conjugate(x + 1),), samples=unary_samples(-0.7, 3.0),
              autocast="float32")
log2 = unary("log2", "log2", floated(), elementwise="log2(x)", keeps="x",
             vjp=(lambda g, out, x: g / conjugate(x * math.log(2)),), samples=unary_samples(0.3, 3.0),
             autocast="float32")
log10 = unary("log10", "log10", floated(), elementwise="log10(x)", keeps="x",
              vjp=(lambda g, out, x: g / conjugate(x * math.log(10)),), samples=unary_samples(0.3, 3.0),
              autocast="float32")
sqrt = unary("sqrt", "sqrt", floated(), elementwise="sqrt(x)", keeps="out",
             vjp=(lambda g, out, x: g * 0.5 / conjugate(out),), samples=unary_samples(0.3, 3.0))
rsqrt = unary("rsqrt", lambda xp, x: 1 / xp.sqrt(x), floated(), elementwise="rsqrt(x)", keeps="out",
              slope=lambda out, x: out * out * out * -0.5, samples=unary_samples(0.3, 3.0),
              autocast="float32")

sin = unary("sin", "sin", floated(), elementwise="sin(x)", keeps="x", slope=lambda out, x: cos(x))
cos: Op = unary("cos", "cos", floated(), elementwise="cos(x)", keeps="x", slope=lambda out, x: -sin(x))
tan = unary("tan", "tan", floated(), elementwise="tan(x)", keeps="out", slope=lambda out, x: out * out + 1,
            samples=unary_samples(-1.2, 1.2), autocast="float32")
asin = unary("asin", "arcsin", floated(), elementwise="asin(x)", keeps="x",
             slope=lambda out, x: rsqrt(1 - x * x), samples=unary_samples(-0.9, 0.9), autocast="float32")
acos = unary("acos", "arccos", floated(), elementwise="acos(x)", keeps="x",
             slope=lambda out, x: -rsqrt(1 - x * x), samples=unary_samples(-0.9, 0.9), autocast="float32")
atan = unary("atan", "arctan", floated(), elementwise="atan(x)", keeps="x",
             slope=lambda out, x: reciprocal(x * x + 1))
sinh = unary("sinh", "sinh", floated(), elementwise="sinh(x)", keeps="x", slope=lambda out, x: cosh(x),
             autocast="float32")
cosh: Op = unary("cosh", "cosh", floated(), elementwise="cosh(x)", keeps="x", slope=lambda out, x: sinh(x),
                 autocast="float32")
tanh = unary("tanh", "tanh", floated(), elementwise="tanh(x)", keeps="out",
             slope=lambda out, x: 1 - out * out)
asinh = unary("asinh", "arcsinh", floated(), elementwise="asinh(x)", keeps="x",
              slope=lambda out, x: rsqrt(x * x + 1))
acosh = unary("acosh", "arccosh", floated(), elementwise="acosh(x)", keeps="x",
              slope=lambda out, x: rsqrt(x * x - 1), samples=unary_samples(1.3, 3.0))
atanh = unary("atanh", "arctanh", floated(), elementwise="atanh(x)", keeps="x",
              slope=lambda out, x: reciprocal(1 - x * x), samples=unary_samples(-0.9, 0.9))
atan2 = binary("atan2", "arctan2", floated(COMPLEX), elementwise="atan2(x, y)", keeps="x y",
               slopes=(lambda out, x, y: y / (x * x + y * y), lambda out, x, y: -x / (x * x + y * y)))
erf = unary("erf", lambda xp, x: special.erf(xp, x), floated(COMPLEX), elementwise="erf(x)", keeps="x",
            slope=lambda out, x: exp(-(x * x)) * (2 / math.sqrt(math.pi)))


# --- steps --------------------------------------------------------------------------------------------------

def _step(name: str) -> Any:
    def kernel(xp: Any, x: Any, out: Any = None) -> Any:
        return x if x.dtype.kind in "iu" else getattr(xp, name)(x, out=out)
    return kernel


floor = unary("floor", _step("floor"), promoted(BOOL, COMPLEX), elementwise="floor(x)", vjp=(no_slope,))
ceil = unary("ceil", _step("ceil"), promoted(BOOL, COMPLEX), elementwise="ceil(x)", vjp=(no_slope,))
trunc = unary("trunc", _step("trunc"), promoted(BOOL, COMPLEX), elementwise="trunc(x)", vjp=(no_slope,))
# Half to even; decimals as in NumPy.
round_ = unary(
    "round", lambda xp, x, decimals: xp.round(x, decimals), promoted(BOOL, COMPLEX), attrs={"decimals": 0},
    vjp=(no_slope,), samples=lambda: [*unary_samples()(), *unary_samples(kinds="f", decimals=1)()])


# --- comparison and logic -----------------------------------------------------------------------------------

_CHOICES = binary_samples(kinds="fib", diff=False)

equal = binary("equal", "equal", tested(), elementwise="x == y", samples=_CHOICES)
not_equal = binary("not_equal", "not_equal", tested(), elementwise="x != y", samples=_CHOICES)
less = binary("less", "less", tested(COMPLEX), elementwise="x < y", samples=_CHOICES)
less_equal = binary("less_equal", "less_equal", tested(COMPLEX), elementwise="x <= y", samples=_CHOICES)
greater = binary("greater", "greater", tested(COMPLEX), elementwise="x > y", samples=_CHOICES)
greater_equal = binary("greater_equal", "greater_equal", tested(COMPLEX), elementwise="x >= y",
                       samples=_CHOICES)

logical_and = binary("logical_and", "logical_and", tested(), elementwise="(x != 0) & (y != 0)",
                     samples=_CHOICES)
logical_or = binary("logical_or", "logical_or", tested(), elementwise="(x != 0) | (y != 0)",
                    samples=_CHOICES)
logical_xor = binary("logical_xor", "logical_xor", tested(), elementwise="(x != 0) ^ (y != 0)",
                     samples=_CHOICES)
logical_not = unary("logical_not", "logical_not", tested(), elementwise="x == 0",
                    samples=unary_samples(kinds="fib", diff=False))

_BITS = binary_samples(0, 5, kinds="ib", diff=False)
_bits = promoted(FLOATING, COMPLEX)

bitwise_and = binary("bitwise_and", "bitwise_and", _bits, elementwise="x & y", samples=_BITS)
bitwise_or = binary("bitwise_or", "bitwise_or", _bits, elementwise="x | y", samples=_BITS)
bitwise_xor = binary("bitwise_xor", "bitwise_xor", _bits, elementwise="x ^ y", samples=_BITS)
bitwise_invert = unary("bitwise_invert", "invert", _bits, elementwise="invert(x)",
                       samples=unary_samples(kinds="ib", diff=False))
bitwise_left_shift = binary("bitwise_left_shift", "left_shift", promoted(BOOL, FLOATING, COMPLEX),
                            elementwise="left_shift(x, y)",
                            samples=binary_samples(0, 5, kinds="i", diff=False))
bitwise_right_shift = binary("bitwise_right_shift", "right_shift", promoted(BOOL, FLOATING, COMPLEX),
                             elementwise="right_shift(x, y)",
                             samples=binary_samples(0, 5, kinds="i", diff=False))


def _odd_values() -> list[Sample]:
    odd = np.array([[0.0, np.nan, np.inf], [-np.inf, -1.5, 2.0]])
    return [Sample((odd,), diff=False), *unary_samples(diff=False)()]


isfinite = unary("isfinite", "isfinite", tested(), elementwise="isfinite(x)", samples=_odd_values)
isinf = unary("isinf", "isinf", tested(), elementwise="isinf(x)", samples=_odd_values)
isnan = unary("isnan", "isnan", tested(), elementwise="isnan(x)", samples=_odd_values)


# --- selection ----------------------------------------------------------------------------------------------

def _where_rule(name: str) -> DTypeRule:
    def rule(c: Any, x: Any, y: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        met = dtypes.promote(x, y)
        return (dtypes.bool_, met, met), (met,)
    return rule


def _where_samples() -> list[Sample]:
    c = np.array([[True, False, True], [False, False, True], [True, True, False], [False, True, False]])
    pairs = ((c, (4, 3), (4, 3)), (c, (3,), (4, 1)), (c, (4, 3), 0), (c, 1.5, (3,)), (c[0], (5, 3), ()),
             (c[:, :1], (3,), (1, 3)), (c[:0], (0, 3), (3,)))
    return [*map(Sample, pairs), Sample((c, 1.0, 0.0), diff=False),
            Sample((c, (4, 3), (3,)), dtype="int64", diff=False)]


where: Op = pointwise(
    "where", lambda xp, c, x, y: special.select(xp, c, x, y), _where_rule, elementwise="where(c, x, y)",
    linear=((1, 2),), keeps="c", samples=_where_samples,
    vjp=(None, lambda g, out, c, x, y: unbroadcast(where(c, g, 0), x),
         lambda g, out, c, x, y: unbroadcast(where(c, 0, g), y)))


def _larger(g: Any, x: Any, y: Any) -> Any:
    """`g` where x > y, half of it at ties, 0 elsewhere: the share of x in the gradient of maximum(x, y)."""
    return where(less(x, y), 0, where(equal(x, y), g * 0.5, g))


maximum = binary("maximum", "maximum", promoted(COMPLEX), elementwise="max(x, y)", keeps="x y",
                 vjp=(lambda g, out, x, y: unbroadcast(_larger(g, x, y), x),
                      lambda g, out, x, y: unbroadcast(_larger(g, y, x), y)),
                 samples=binary_samples(kinds="fib"))
minimum = binary("minimum", "minimum", promoted(COMPLEX), elementwise="min(x, y)", keeps="x y",
                 vjp=(lambda g, out, x, y: unbroadcast(_larger(g, y, x), x),
                      lambda g, out, x, y: unbroadcast(_larger(g, x, y), y)),
                 samples=binary_samples(kinds="fib"))


# As in torch.clamp, x keeps the gradient inside and on the bounds, and where lo > hi the result is hi.

clip_min = binary("clip_min", "maximum", promoted(COMPLEX), elementwise="max(x, y)", keeps="x y",
                  vjp=(lambda g, out, x, y: unbroadcast(where(less(x, y), 0, g), x),
                       lambda g, out, x, y: unbroadcast(where(less(x, y), g, 0), y)))
clip_max = binary("clip_max", "minimum", promoted(COMPLEX), elementwise="min(x, y)", keeps="x y",
                  vjp=(lambda g, out, x, y: unbroadcast(where(greater(x, y), 0, g), x),
                       lambda g, out, x, y: unbroadcast(where(greater(x, y), g, 0), y)))


def _clip_by_x(g: Any, out: Any, x: Any, lo: Any, hi: Any) -> Any:
    return unbroadcast(where(logical_and(greater_equal(x, lo), less_equal(x, hi)), g, 0), x)


def _clip_by_lo(g: Any, out: Any, x: Any, lo: Any, hi: Any) -> Any:
    return unbroadcast(where(logical_and(less(x, lo), less(lo, hi)), g, 0), lo)


def _clip_by_hi(g: Any, out: Any, x: Any, lo: Any, hi: Any) -> Any:
    return unbroadcast(where(logical_or(greater(x, hi), less(hi, lo)), g, 0), hi)


clip = pointwise(
    "clip", lambda xp, x, lo, hi, out=None: xp.minimum(xp.maximum(x, lo), hi, out=out), promoted(COMPLEX),
    elementwise="min(max(x, lo), hi)", keeps="x lo hi", vjp=(_clip_by_x, _clip_by_lo, _clip_by_hi),
    samples=lambda: [
        Sample(((5, 3), -1.0, 0.5)), Sample(((5, 3), (3,), (5, 1))), Sample(((4, 2), -0.5, (2,))),
        Sample(((), -1.0, 1.0)), Sample(((0, 2), -1.0, 1.0)),
        Sample(((7,), 0, 1), dtype="int64", diff=False)])


# --- casts --------------------------------------------------------------------------------------------------

def _cast_rule(name: str) -> DTypeRule:
    return lambda x, dtype: ((x,), (dtypes.canonical(dtype),))


# Addends that are widened stay addends of the same sum; a cast to an integer or a narrower float rounds.
astype = unary(
    "astype", lambda xp, x, dtype: x.astype(dtypes.canonical(dtype), copy=False), _cast_rule,
    attrs={"dtype": REQUIRED}, vjp=(lambda g, out, x, dtype: g,),
    linear=lambda x, dtype: ((0,),) if dtypes.widens(x, dtypes.canonical(dtype)) else (),
    samples=lambda: [*unary_samples(kinds="fi", dtype="float64")(),
                     *unary_samples(diff=False, dtype="float32")(),
                     *unary_samples(kinds="fib", diff=False, dtype="int32")(),
                     *unary_samples(kinds="fi", diff=False, dtype="bool")()])
