"""Rows that run along a dimension: cumulative sums and products, and linear recurrences."""

from __future__ import annotations

from typing import Any

from meshtape.runtime.dtypes import float32, int64, kind, promote, uint64
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import REQUIRED, Op, Sample, normalize_axis, register
from meshtape.runtime.ops.lines import line_axes, line_shape
from meshtape.runtime.ops.pad import pad
from meshtape.runtime.ops.rules import conjugate
from meshtape.runtime.shards import Shape

# --- cumsum, cumprod --------------------------------------------------------------------------------

def _accumulator(x: Any) -> Any:
    """Integers are summed in 64 bits (Array API), half precision in float32."""
    if kind(x) < 2:
        return uint64 if x.kind == "u" else int64
    return float32 if kind(x) == 2 and x.itemsize == 2 else x


def _scanned_dtype(x: Any, **attrs: Any) -> tuple[list[Any], list[Any]]:
    return [x], [x if kind(x) >= 2 else _accumulator(x)]


def _scan(ufunc: str) -> Any:
    """The kernel of a cumulative ufunc, from the last element on if `reverse`."""
    def kernel(xp: Any, x: Any, axis: int, reverse: bool) -> Any:
        lines = xp.atleast_1d(x)
        if reverse:
            lines = xp.flip(lines, axis)
        out = getattr(xp, ufunc)(lines, axis=axis, dtype=_accumulator(x.dtype))
        return (xp.flip(out, axis) if reverse else out).reshape(x.shape)
    return kernel


def _scan_samples(low: float, high: float) -> list[Sample]:
    cases: list[tuple[Shape, int, bool]] = [
        ((7,), 0, False), ((7,), -1, True), ((5, 4), 0, True), ((5, 4), 1, False), ((2, 5, 3), -2, False),
        ((5, 1), 1, False), ((1, 5), 0, True), ((0, 3), 1, False), ((3, 0), 1, True), ((), 0, False)]
    return [Sample((x,), {"axis": axis, "reverse": reverse}, low=low, high=high)
            for x, axis, reverse in cases] + [
        Sample(((4, 3),), {"axis": 0}, dtype, diff=False) for dtype in ("int32", "uint8", "bool", "float32")]


cumsum: Op = register(Op(
    "cumsum",
    kernel=_scan("cumsum"),
    attrs={"axis": REQUIRED, "reverse": False},
    shape=line_shape("cumsum"),
    dtype=_scanned_dtype,
    axes=line_axes(),
    linear=((0,),),
    autocast="float32",
    vjp=(lambda g, out, x, axis, reverse: cumsum(g, axis=axis, reverse=not reverse),),
    samples=lambda: _scan_samples(-2.0, 2.0)))


def _shifted(x: Any, axis: int, by: int, value: float) -> Any:
    """`x` moved by one element (`by` is 1 or -1) along `axis`; `value` takes the free place."""
    d = normalize_axis(axis, len(x.shape))
    if not x.shape[d]:
        return x
    return pad(x, widths=tuple((by, -by) if e == d else (0, 0) for e in range(len(x.shape))), value=value)


def _cumprod_vjp(g: Any, out: Any, x: Any, axis: int, reverse: bool) -> Any:
    """With p the product of the elements before x[k]: p * (g[k] + x[k+1] * (g[k+1] + x[k+2] * ...)).

    No division, so zeros are exact.
    """
    if not x.shape:
        return g
    by = -1 if reverse else 1
    later = scan(_shifted(conjugate(x), axis, -by, 0.0), g, axis=axis, reverse=not reverse)
    return _shifted(conjugate(out), axis, by, 1.0) * later


cumprod: Op = register(Op(
    "cumprod",
    kernel=_scan("cumprod"),
    attrs={"axis": REQUIRED, "reverse": False},
    shape=line_shape("cumprod"),
    dtype=_scanned_dtype,
    axes=line_axes(),
    autocast="float32",
    vjp=(_cumprod_vjp,),
    keeps="x out",
    samples=lambda: _scan_samples(-1.5, 1.5)))


def product_of_others(x: Any, axis: int) -> Any:
    """For every element the product of the others along `axis`: of those before it and those after it."""
    before = _shifted(cumprod(x, axis=axis), axis, 1, 1.0)
    after = _shifted(cumprod(x, axis=axis, reverse=True), axis, -1, 1.0)
    return before * after


# --- linear recurrence ------------------------------------------------------------------------------

def _recurrence(xp: Any, a: Any, b: Any, axis: int, reverse: bool) -> Any:
    """s[k] = a[k] * s[k-1] + b[k] along `axis`, starting from zero; from the last element on if `reverse`."""
    out = xp.empty_like(b)
    a_lines, b_lines, lines = (xp.moveaxis(v, axis, 0) for v in (a, b, out))
    n = lines.shape[0]
    before = None
    for k in range(n - 1, -1, -1) if reverse else range(n):
        lines[k] = b_lines[k] if before is None else a_lines[k] * lines[before] + b_lines[k]
        before = k
    return out


def _scan_shape(a: Shape, b: Shape, axis: int, reverse: bool) -> list[Shape]:
    normalize_axis(axis, len(a), "scan")
    if a != b or not a:
        raise ShapeError(f"scan: factors {a} and addends {b} must have one shape of at least 1 dimension")
    return [b]


def _scan_dtype(a: Any, b: Any, **attrs: Any) -> tuple[list[Any], list[Any]]:
    met = promote(a, b)
    return [met, met], [met]


def _scan_vjp(g: Any, out: Any, a: Any, b: Any, axis: int, reverse: bool) -> tuple[Any, Any]:
    """The adjoint runs the other way: h[k] = g[k] + a[k+1] * h[k+1]; then db = h, da[k] = h[k] * s[k-1]."""
    by = -1 if reverse else 1
    h = scan(_shifted(conjugate(a), axis, -by, 0.0), g, axis=axis, reverse=not reverse)
    return h * _shifted(conjugate(out), axis, by, 0.0), h


scan: Op = register(Op(
    "scan",
    kernel=_recurrence,
    attrs={"axis": REQUIRED, "reverse": False},
    shape=_scan_shape,
    dtype=_scan_dtype,
    axes=line_axes(n_in=2),
    linear=((1,),),
    vjp=_scan_vjp,
    keeps="a out",
    samples=lambda: [Sample((x, x), {"axis": axis, "reverse": reverse}) for x, axis, reverse in [
        ((7,), 0, False), ((5, 4), -1, True), ((2, 5, 3), 1, False), ((1, 3), 0, False), ((0, 3), 1, True),
        ((3, 0), 1, False)]]))
