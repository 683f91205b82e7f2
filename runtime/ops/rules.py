"""What the pointwise rows share: dtype rules, samples, and how a unary or binary row is declared.

An `elementwise` expression uses operators that C and Python share (+ - * / < <= > >= == != & | ^), numbers,
the kernel's parameter names, and the functions of `EXPRESSION_FUNCTIONS`. `max` and `min` propagate NaN,
`where(c, a, b)` is C's `c ? a : b`; `a if attribute == "value" else b` chooses when the row is translated.
Operands have the dtypes that the row's dtype rule gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from meshtape.runtime import dtypes
from meshtape.runtime.errors import DTypeError
from meshtape.runtime.op import Op, Sample, broadcast_shapes, lookup, pointwise_axes, register

EXPRESSION_FUNCTIONS = (
    "max", "min", "abs", "sign", "where", "pow", "sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "log2",
    "log10", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh",
    "atanh", "erf", "floor", "ceil", "trunc", "isfinite", "isinf", "isnan", "floor_divide", "remainder",
    "invert", "left_shift", "right_shift",
)

BOOL, INTEGER, FLOATING, COMPLEX = 0, 1, 2, 3
_KIND_NAMES = ("bool", "integer", "floating", "complex")

DTypeRule = Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]


# --- dtype rules: each takes the op's name first (for its error) and returns the rule ----------------------

def check_kind(name: str, dtype: Any, refuse: tuple[int, ...]) -> Any:
    """`dtype`, unless its kind is refused: then DTypeError."""
    found = dtypes.kind(dtype)
    if found in refuse:
        takes = " and ".join(k for i, k in enumerate(_KIND_NAMES) if i not in refuse)
        raise DTypeError(f"{name} takes {takes} tensors, got {np.dtype(dtype).name}; cast with astype first")
    return dtype


def promoted(*refuse: int) -> Callable[[str], DTypeRule]:
    """Inputs meet in one dtype, which is also the output's."""
    def of(name: str) -> DTypeRule:
        def rule(*given: Any, **attrs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            met = check_kind(name, dtypes.promote(*given), refuse)
            return (met,) * len(given), (met,)
        return rule
    return of


def floated(*refuse: int) -> Callable[[str], DTypeRule]:
    """Like promoted, but integers and booleans become the default float."""
    def of(name: str) -> DTypeRule:
        def rule(*given: Any, **attrs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            met = check_kind(name, dtypes.floating(*given), refuse)
            return (met,) * len(given), (met,)
        return rule
    return of


def tested(*refuse: int) -> Callable[[str], DTypeRule]:
    """Inputs meet in one dtype, the output is bool."""
    def of(name: str) -> DTypeRule:
        def rule(*given: Any, **attrs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            met = check_kind(name, dtypes.promote(*given), refuse)
            return (met,) * len(given), (dtypes.bool_,)
        return rule
    return of


def real_part(*refuse: int) -> Callable[[str], DTypeRule]:
    """One input; a complex input gives its real counterpart, any other keeps its dtype."""
    def of(name: str) -> DTypeRule:
        def rule(given: Any, **attrs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            check_kind(name, given, refuse)
            out = {"complex64": dtypes.float32, "complex128": dtypes.float64}.get(given.name, given)
            return (given,), (out,)
        return rule
    return of


# --- pieces of derivatives ----------------------------------------------------------------------------------

def unbroadcast(g: Any, x: Any) -> Any:
    """`g` summed to the shape of `x`, which broadcasting had stretched to the shape of `g`."""
    return g if g.shape == x.shape else lookup("sum_to")(g, shape=tuple(x.shape))


def conjugate(value: Any) -> Any:
    """`value`, conjugated where it is complex: the gradient of a holomorphic f is g * conj(f')."""
    if isinstance(value, bool | int | float | complex):
        return value.conjugate()
    return lookup("conj")(value) if dtypes.kind(value.dtype) == COMPLEX else value


def no_slope(g: Any, out: Any, *inputs: Any, **attrs: Any) -> None:
    """The vjp of a step function: differentiable, with derivative zero almost everywhere."""


# --- declarations -------------------------------------------------------------------------------------------

def ufunc(name: str, arity: int) -> Callable[..., Any]:
    """The kernel of a row that is one ufunc of NumPy and CuPy."""
    if arity == 1:
        def kernel(xp: Any, x: Any, out: Any = None) -> Any:
            return getattr(xp, name)(x, out=out)
        return kernel

    def kernel2(xp: Any, x: Any, y: Any, out: Any = None) -> Any:
        return getattr(xp, name)(x, y, out=out)
    return kernel2


def pointwise(name: str, kernel: Callable[..., Any], dtype: Callable[[str], DTypeRule], **columns: Any) -> Op:
    """Declare a row whose inputs broadcast and whose output element depends on one element of each."""
    return register(Op(
        name, kernel, dtype=dtype(name), axes=pointwise_axes,
        shape=lambda *shapes, **attrs: [broadcast_shapes(name, *shapes)], **columns))


def unary(name: str, kernel: str | Callable[..., Any], dtype: Callable[[str], DTypeRule], *,
          slope: Callable[..., Any] | None = None, samples: Callable[[], list[Sample]] | None = None,
          **columns: Any) -> Op:
    """Declare a pointwise row of one input; `slope(out, x, **attrs)` is its derivative.

    `kernel` may name a ufunc.
    """
    if slope is not None:
        columns["vjp"] = (lambda g, out, x, **attrs: g * conjugate(slope(out, x, **attrs)),)
    run = ufunc(kernel, 1) if isinstance(kernel, str) else kernel
    return pointwise(name, run, dtype, samples=samples or unary_samples(), **columns)


def binary(name: str, kernel: str | Callable[..., Any], dtype: Callable[[str], DTypeRule], *,
           slopes: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
           samples: Callable[[], list[Sample]] | None = None, **columns: Any) -> Op:
    """Declare a pointwise row of two inputs. `slopes[i](out, x, y, **attrs)` is the derivative by input i."""
    if slopes is not None:
        by_x, by_y = slopes
        columns["vjp"] = (
            lambda g, out, x, y, **attrs: unbroadcast(g * conjugate(by_x(out, x, y, **attrs)), x),
            lambda g, out, x, y, **attrs: unbroadcast(g * conjugate(by_y(out, x, y, **attrs)), y))
    run = ufunc(kernel, 2) if isinstance(kernel, str) else kernel
    return pointwise(name, run, dtype, samples=samples or binary_samples(), **columns)


# --- samples ------------------------------------------------------------------------------------------------

def unary_samples(low: float = -2.0, high: float = 2.0, *, kinds: str = "fi", diff: bool = True,
                  **attrs: Any) -> Callable[[], list[Sample]]:
    """Shapes that every unary row meets, with values in [low, high].

    `kinds` has f for floating, i for integer, b for bool, c for complex.
    """
    def make() -> list[Sample]:
        found = []
        if "f" in kinds:
            found += [Sample((shape,), attrs, low=low, high=high, diff=diff)
                      for shape in ((5, 3), (), (2, 1, 4), (0, 3))]
        for letter, dtype in (("i", "int64"), ("i", "int32"), ("b", "bool"), ("c", "complex128")):
            if letter in kinds:
                found.append(Sample(((7,),), attrs, dtype, low, high, diff=False))
        return found
    return make


def binary_samples(low: float = -2.0, high: float = 2.0, *, kinds: str = "fi", diff: bool = True,
                   **attrs: Any) -> Callable[[], list[Sample]]:
    """Shapes that every binary row meets: equal, broadcast both ways, weak scalars, 0-d, empty."""
    def make() -> list[Sample]:
        found = []
        if "f" in kinds:
            pairs: tuple[tuple[Any, Any], ...] = (
                ((5, 3), (5, 3)), ((5, 3), (3,)), ((3, 1), (1, 4)), ((2, 1, 3), (4, 1)), ((7,), 1.5),
                (1.5, (7,)), ((), (2,)), ((), ()), ((0, 3), (3,)), ((0,), 1.5))
            found += [Sample(pair, attrs, low=low, high=high, diff=diff) for pair in pairs]
        for letter, dtype in (("i", "int64"), ("i", "int32"), ("b", "bool"), ("c", "complex128")):
            if letter in kinds:
                found.append(Sample(((3, 5), (5,)), attrs, dtype, low, high, diff=False))
        if "i" in kinds:
            found.append(Sample(((7,), 2), attrs, "int64", low, high, diff=False))
        return found
    return make
