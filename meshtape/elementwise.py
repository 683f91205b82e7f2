"""Pointwise functions, by their Array API names. All broadcast; integers become float32 where a float comes
out.
"""

from __future__ import annotations

from typing import Any

from meshtape.autograd import Tensor, apply
from meshtape.autograd.record import as_operand
from meshtape.runtime.dtypes import kind
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import Op, lookup

UNARY = {
    "negative": "negative",
    "positive": "positive",
    "abs": "abs",
    "sign": "sign",
    "square": "square",
    "reciprocal": "reciprocal",
    "conj": "conj",
    "real": "real",
    "imag": "imag",
    "exp": "exp",
    "expm1": "expm1",
    "log": "log",
    "log1p": "log1p",
    "log2": "log2",
    "log10": "log10",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "sin": "sin",
    "cos": "cos",
    "tan": "tan",
    "asin": "asin",
    "acos": "acos",
    "atan": "atan",
    "sinh": "sinh",
    "cosh": "cosh",
    "tanh": "tanh",
    "asinh": "asinh",
    "acosh": "acosh",
    "atanh": "atanh",
    "erf": "erf",
    "floor": "floor",
    "ceil": "ceil",
    "trunc": "trunc",
    "isfinite": "isfinite",
    "isinf": "isinf",
    "isnan": "isnan",
    "logical_not": "logical_not",
    "bitwise_invert": "bitwise_invert",
    "sigmoid": "sigmoid",
    "relu": "relu",
}
BINARY = {
    "add": "add",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "divide",
    "floor_divide": "floor_divide",
    "remainder": "remainder",
    "pow": "pow",
    "atan2": "atan2",
    "maximum": "maximum",
    "minimum": "minimum",
    "equal": "equal",
    "not_equal": "not_equal",
    "less": "less",
    "less_equal": "less_equal",
    "greater": "greater",
    "greater_equal": "greater_equal",
    "logical_and": "logical_and",
    "logical_or": "logical_or",
    "logical_xor": "logical_xor",
    "bitwise_and": "bitwise_and",
    "bitwise_or": "bitwise_or",
    "bitwise_xor": "bitwise_xor",
    "bitwise_left_shift": "bitwise_left_shift",
    "bitwise_right_shift": "bitwise_right_shift",
}


def _unary(name: str, op: Op) -> Any:
    attrs = op.pack({})

    def function(x: Any, /) -> Tensor:
        return apply(op, (x if isinstance(x, Tensor) else _tensor(x),), attrs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{name} of every element of `x` (any shape); returns a tensor of the same shape."
    return function


def _binary(name: str, op: Op) -> Any:
    attrs = op.pack({})

    def function(x1: Any, x2: Any, /) -> Tensor:
        if not isinstance(x1, Tensor) and not isinstance(x2, Tensor):
            x1 = _tensor(x1)
        return apply(op, (x1, x2), attrs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"{name} of `x1` and `x2`, element by element; shapes broadcast (ShapeError if they do not)."
    )
    return function


def _tensor(x: Any) -> Tensor:
    from meshtape.autograd import as_tensor
    return as_tensor(x)


def where(condition: Any, x1: Any, x2: Any, /) -> Tensor:
    """x1 where `condition` is true, else x2; shapes broadcast."""
    condition = condition if isinstance(condition, Tensor) else _tensor(condition)
    return apply(lookup("where"), (condition, as_operand(x1), as_operand(x2)))


def clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """`x` with values below `min` raised to it and values above `max` lowered to it; None: no bound."""
    if min is None and max is None:
        return x
    if max is None:
        return apply(lookup("clip_min"), (x, as_operand(min)))
    if min is None:
        return apply(lookup("clip_max"), (x, as_operand(max)))
    return apply(lookup("clip"), (x, as_operand(min), as_operand(max)))


def round(x: Any, /, decimals: int = 0) -> Tensor:
    """`x` rounded half to even, to `decimals` places."""
    op = lookup("round")
    return apply(op, (x if isinstance(x, Tensor) else _tensor(x),), (decimals,))


def masked_fill(x: Tensor, mask: Any, value: Any) -> Tensor:
    """`value` where `mask` is true, else `x`; shapes broadcast, the dtype is that of `x`, which must hold
    the value (DTypeError for a fraction in an integer tensor, or a complex number in a real one).
    """
    out = where(mask, value, x)
    if kind(out.dtype) > max(kind(x.dtype), 1):
        raise DTypeError(
            f"masked_fill: a value of dtype {out.dtype} does not fit a tensor of dtype {x.dtype}; cast one"
        )
    return out if out.dtype == x.dtype else apply(lookup("astype"), (out,), (x.dtype.name,))


__all__ = [*UNARY, *BINARY, "clip", "masked_fill", "round", "where"]


def __getattr__(name: str) -> Any:
    """Make a function of the tables above the first time it is asked for."""
    if name in UNARY:
        function = _unary(name, lookup(UNARY[name]))
    elif name in BINARY:
        function = _binary(name, lookup(BINARY[name]))
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = function
    return function
