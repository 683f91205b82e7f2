"""Expressions of pointwise rows as CUDA C++.

A row's `elementwise` text is Python that C++ nearly shares (see runtime.ops.rules). What is computed is
what NumPy computes, operation by operation: no contraction into fused multiply-adds, IEEE division and
square roots, integers that wrap, division of integers by zero that gives 0, NaN that wins in max and min.
Elementary functions are CUDA's, with their errors of an ulp or two.

16-bit floats are computed in float32 and rounded where they are stored. Python scalars that float16 meets are
rounded to it first, as in NumPy; those that bfloat16 meets are float32, as with ml_dtypes.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.source import ctype
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import Op

# What the translated text calls. W_ is the unsigned type in which integers of type A_ wrap.
LIBRARY = r'''
namespace chain {
template <class A_> struct Floating { static constexpr bool value = false; };
template <> struct Floating<float> { static constexpr bool value = true; };
template <> struct Floating<double> { static constexpr bool value = true; };
template <bool B_, class X_, class Y_> struct Choose { typedef X_ type; };
template <class X_, class Y_> struct Choose<false, X_, Y_> { typedef Y_ type; };
template <class A_> using wide = typename Choose<sizeof(A_) == 8, uint64, uint32>::type;
#define FUNCTION template <class A_> __device__ __forceinline__

FUNCTION A_ add(A_ a, A_ b) { return A_(wide<A_>(a) + wide<A_>(b)); }
FUNCTION A_ sub(A_ a, A_ b) { return A_(wide<A_>(a) - wide<A_>(b)); }
FUNCTION A_ mul(A_ a, A_ b) { return A_(wide<A_>(a) * wide<A_>(b)); }
__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float sub(float a, float b) { return a - b; }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return a + b; }
__device__ __forceinline__ double sub(double a, double b) { return a - b; }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }

// Bits by bits, since comparing a NaN gives false: of equal numbers, and of a NaN and another, the first.
FUNCTION A_ larger(A_ a, A_ b) { return a >= b || a != a ? a : b; }
FUNCTION A_ smaller(A_ a, A_ b) { return a <= b || a != a ? a : b; }

FUNCTION A_ negative(A_ a) { if constexpr (Floating<A_>::value) return -a; else return sub(A_(0), a); }
FUNCTION A_ magnitude(A_ a) { return a < A_(0) ? negative(a) : a; }
__device__ __forceinline__ float magnitude(float a) { return fabsf(a); }
__device__ __forceinline__ double magnitude(double a) { return fabs(a); }
FUNCTION A_ sign(A_ a) { return a > A_(0) ? A_(1) : a < A_(0) ? A_(-1) : a == A_(0) ? A_(0) : a; }
FUNCTION bool is_nan(A_ a) { return a != a; }
FUNCTION bool is_finite(A_ a) { if constexpr (Floating<A_>::value) return a - a == A_(0); else return true; }
FUNCTION bool is_inf(A_ a) { return a == a && !is_finite(a); }

FUNCTION A_ invert(A_ a) { return A_(~a); }
__device__ __forceinline__ bool invert(bool a) { return !a; }
FUNCTION A_ left_shift(A_ a, A_ b) {
  return wide<A_>(b) < 8 * sizeof(A_) ? A_(wide<A_>(a) << wide<A_>(b)) : A_(0);
}
FUNCTION A_ right_shift(A_ a, A_ b) {
  return wide<A_>(b) < 8 * sizeof(A_) ? A_(a >> b) : a < A_(0) ? A_(-1) : A_(0);
}

__device__ __forceinline__ float c_pow(float a, float b) { return powf(a, b); }
__device__ __forceinline__ double c_pow(double a, double b) { return pow(a, b); }
__device__ __forceinline__ float c_fmod(float a, float b) { return fmodf(a, b); }
__device__ __forceinline__ double c_fmod(double a, double b) { return fmod(a, b); }
__device__ __forceinline__ float c_floor(float a) { return floorf(a); }
__device__ __forceinline__ double c_floor(double a) { return floor(a); }
__device__ __forceinline__ float c_copysign(float a, float b) { return copysignf(a, b); }
__device__ __forceinline__ double c_copysign(double a, double b) { return copysign(a, b); }

// Integers to a negative power, which NumPy refuses, are rounded towards zero.
FUNCTION A_ power(A_ a, A_ b) {
  if constexpr (Floating<A_>::value) {
    return b == A_(2) ? mul(a, a) : c_pow(a, b);
  } else {
    if (b < A_(0)) return a == A_(1) ? A_(1) : a == A_(-1) ? (b & A_(1) ? A_(-1) : A_(1)) : A_(0);
    A_ out = 1;
    for (; b; b = A_(b >> 1), a = mul(a, a)) if (b & A_(1)) out = mul(out, a);
    return out;
  }
}

// The sign is the divisor's, of a zero remainder as well.
FUNCTION A_ remainder(A_ a, A_ b) {
  if constexpr (Floating<A_>::value) {
    const A_ rest = c_fmod(a, b);
    if (b == A_(0) || rest != rest) return rest;
    if (rest == A_(0)) return c_copysign(A_(0), b);
    return (b < A_(0)) != (rest < A_(0)) ? rest + b : rest;
  } else {
    if (b == A_(0) || (b < A_(0) && b == A_(-1))) return A_(0);
    const A_ rest = A_(a % b);
    return rest != A_(0) && (rest < A_(0)) != (b < A_(0)) ? A_(rest + b) : rest;
  }
}
FUNCTION A_ floor_divide(A_ a, A_ b) {
  if constexpr (Floating<A_>::value) {
    if (b == A_(0)) return a / b;
    A_ rest = c_fmod(a, b), out = (a - rest) / b;
    if (rest != A_(0) && (b < A_(0)) != (rest < A_(0))) out -= A_(1);
    if (out == A_(0)) return c_copysign(A_(0), a / b);
    const A_ low = c_floor(out);
    return out - low > A_(0.5) ? low + A_(1) : low;
  } else {
    if (b == A_(0)) return A_(0);
    if (b < A_(0) && b == A_(-1)) return negative(a);
    const A_ out = A_(a / b);
    return A_(a % b) != A_(0) && (a < A_(0)) != (b < A_(0)) ? A_(out - A_(1)) : out;
  }
}

// A cast. Floats beyond the range of an integer type are undefined, as in NumPy, but negative ones wrap.
template <class T_, class F_> struct Cast {
  static __device__ __forceinline__ T_ of(F_ a) {
    if constexpr (Floating<F_>::value && !Floating<T_>::value) {
      if constexpr (sizeof(T_) < 4) return T_(int32(a));
      if constexpr (sizeof(T_) == 4) return T_(int64(a));
      return a < F_(0) ? T_(int64(a)) : T_(a);
    }
    return T_(a);
  }
};
template <class F_> struct Cast<bool, F_> {
  static __device__ __forceinline__ bool of(F_ a) { return a != F_(0); }
};
template <class T_, class F_> __device__ __forceinline__ T_ cast(F_ a) { return Cast<T_, F_>::of(a); }
#undef FUNCTION
}
'''

_BINARY = {ast.Add: "chain::add({}, {})", ast.Sub: "chain::sub({}, {})", ast.Mult: "chain::mul({}, {})",
           ast.Div: "({} / {})"}
_BITS = {ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^"}
_COMPARE = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_GENERIC = {"max": "larger", "min": "smaller", "abs": "magnitude", "sign": "sign", "pow": "power",
            "isfinite": "is_finite", "isinf": "is_inf", "isnan": "is_nan", "invert": "invert",
            "left_shift": "left_shift", "right_shift": "right_shift", "remainder": "remainder",
            "floor_divide": "floor_divide"}
_STEPS = ("floor", "ceil", "trunc", "rint")     # integers stay as they are
_ELEMENTARY = ("sqrt", "exp", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "asin", "acos",
               "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", *_STEPS)
_WEAK = (bool, int, float)


def register_type(dtype: Any) -> str:
    """The C++ type in which values of a dtype are computed."""
    return "float" if dtype.itemsize == 2 and dtypes.is_floating(dtype) else ctype(dtype)


def memory_type(dtype: Any) -> str:
    """The C++ type of an array's elements."""
    return "uint8" if dtype == dtypes.bool_ else ctype(dtype)


def loaded(text: str, dtype: Any) -> str:
    """The value of an element that was read, in its register type."""
    if dtype == dtypes.bool_:
        return f"({text} != 0)"
    return text if register_type(dtype) == ctype(dtype) else f"float({text})"


def stored(text: str, dtype: Any) -> str:
    """A value as an element to write, from its register type."""
    return f"{memory_type(dtype)}({text})"


def rounded(text: str, dtype: Any) -> str:
    """A value as it is read back after it was written."""
    return text if register_type(dtype) == ctype(dtype) else f"float({ctype(dtype)}({text}))"


def number_dtype(dtype: Any) -> Any:
    """What Python scalars become that meet arrays of a dtype."""
    return dtypes.float32 if dtype.name == "bfloat16" else dtype


def number_text(value: bool | int | float, dtype: Any) -> str:
    """A constant of an expression in `dtype`'s register type."""
    kind = register_type(dtype)
    if not dtypes.is_floating(dtype):
        return f"{kind}({value!r})".replace("True", "true").replace("False", "false")
    with np.errstate(over="ignore"):
        exact = float(np.float32(value) if kind == "float" else value)
    if math.isfinite(exact):
        return f"{exact!r}{'f' if kind == 'float' else ''}"
    endless = f"infinity<{kind}>()"
    return f"({endless} - {endless})" if math.isnan(exact) else endless if exact > 0 else f"(-{endless})"


# --- rows -------------------------------------------------------------------------------------------

def supported(dtype: Any) -> bool:
    return dtypes.kind(dtype) < 3


def operand_dtypes(op: Op, attrs: Mapping[str, Any], given: Sequence[Any],
                   out: Any) -> tuple[Any, ...] | None:
    """The dtypes that a row's operands have: those of the arrays given, and of scalars (None in `given`)
    what they take part as. None if an array is not of the dtype that the row asks for, or none of this
    module's.
    """
    top = max(dtypes.kind(d) for d in (*given, out) if d is not None)
    if top > 2:
        return None
    try:
        found, outs = op.dtype(*(_WEAK[top] if d is None else d for d in given), **attrs)
    except DTypeError:
        return None
    same = all(d is None or d == f for d, f in zip(given, found, strict=True))
    return tuple(found) if same and tuple(outs) == (out,) else None


@lru_cache(maxsize=1024)
def parameters(op: Op) -> tuple[str, ...]:
    """Names of a row's operands."""
    names = list(inspect.signature(op.kernel).parameters)[1:]
    return tuple(n for n in names if n != "out" and n not in op.attrs)


def scalar_dtype(dtype: Any, out: Any) -> Any:
    """What a Python scalar that stands for an operand of `dtype` is in registers: where small integers are
    compared with it, all of it, since it may lie beyond them.
    """
    compared = out == dtypes.bool_ and dtypes.kind(dtype) == 1 and dtype.itemsize < 8
    return dtypes.int64 if compared else number_dtype(dtype)


def link_text(op: Op, attrs: Mapping[str, Any], operands: Sequence[str], given: Sequence[Any],
              out: Any) -> str:
    """C++ for one row applied to operands (C++ texts in the register types of `given`), in the register
    type of `out`.
    """
    if op.name == "astype":
        made = f"chain::cast<{register_type(out)}>({operands[0]})"
        narrows = out.itemsize == 2 and given[0] != out
        return rounded(made, out) if narrows else made
    assert op.elementwise is not None
    names = dict(zip(parameters(op), operands, strict=True))
    # What a condition chooses from, or what is compared: the operands but for a condition.
    wide = given[-1]
    return Translation(op.name, names, attrs, wide).of(ast.parse(op.elementwise, mode="eval").body)


class Translation:
    """From a Python expression to C++: `names` are texts of operands, `attrs` constants, `dtype` that of
    all numbers in the expression. Raises NotImplementedError for syntax that expressions do not have.
    """

    def __init__(self, row: str, names: Mapping[str, str], attrs: Mapping[str, Any], dtype: Any) -> None:
        self.row, self.names, self.attrs, self.dtype = row, names, attrs, dtype
        self.floats = dtypes.is_floating(dtype)

    def of(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.Name(id=name) if name in self.attrs:
                return number_text(self.attrs[name], self.dtype)
            case ast.Constant(value=bool() | int() | float() as value):
                return number_text(value, self.dtype)
            case ast.UnaryOp(op=ast.USub(), operand=x):
                return f"chain::negative({self.of(x)})"
            case ast.BinOp(left=x, op=op, right=y) if type(op) in _BINARY:
                return _BINARY[type(op)].format(self.of(x), self.of(y))
            case ast.BinOp(left=x, op=op, right=y) if type(op) in _BITS:
                return f"({self.of(x)} {_BITS[type(op)]} {self.of(y)})"
            case ast.Compare(left=x, ops=[op], comparators=[y]):
                return f"({self.of(x)} {_COMPARE[type(op)]} {self.of(y)})"
            case ast.IfExp(test=ast.Compare(left=ast.Name(id=name), ops=[ast.Eq()],
                                            comparators=[ast.Constant(value=value)]), body=x, orelse=y):
                return self.of(x if self.attrs[name] == value else y)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self.call(name, [self.of(a) for a in args])
        raise NotImplementedError(f"{self.row}: {ast.unparse(node)} has no counterpart in C++")

    def call(self, name: str, args: list[str]) -> str:
        given = ", ".join(args)
        if name == "where":
            return "({} ? {} : {})".format(*args)
        if name in _GENERIC:
            return f"chain::{_GENERIC[name]}({given})"
        if name in _STEPS and not self.floats:
            return given
        suffix = "f" if register_type(self.dtype) == "float" else ""
        if name == "rsqrt":
            return f"({number_text(1, self.dtype)} / sqrt{suffix}({given}))"
        if name in _ELEMENTARY and self.floats:
            return f"{name}{suffix}({given})"
        raise NotImplementedError(f"{self.row}: {name}() of {self.dtype}")
