"""What a step of a program is to a chain of pointwise ops: a link, an end, or nothing. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.expression import operand_dtypes
from meshtape.runtime.op import Op, normalize_axes
from meshtape.runtime.overlap import Placed
from meshtape.runtime.shards import Shape

Types = Mapping[int, tuple[Shape, Any]]


class Link(NamedTuple):
    """One pointwise op of a chain. `operands` are indices into the chain's values (see Chain), `given` the
    dtypes as which they take part, `dtype` is the result's.
    """

    op: Op
    attrs: dict[str, Any]
    operands: tuple[int, ...]
    given: tuple[Any, ...]
    dtype: Any


class End(NamedTuple):
    """A reduction of one of the chain's values: "sum", "max" or "min", in `total`, divided by `divisor` if it
    is given, as an array of `shape` and `dtype`.
    """

    combine: str
    operand: int
    total: Any
    divisor: float | None
    shape: Shape
    dtype: Any


class Chain(NamedTuple):
    """What one kernel computes. Its values are `arrays` (shape and dtype; they broadcast to `shape`), then
    `numbers` (letters as in DeviceKernel.numbers), then results of `links`. Of these, `results` are
    written, in `shape`; then come the `ends`, which reduce the axes `reduced`.
    """

    shape: Shape
    arrays: tuple[tuple[Shape, Any], ...]
    numbers: str
    links: tuple[Link, ...]
    results: tuple[int, ...]
    ends: tuple[End, ...] = ()
    reduced: tuple[int, ...] = ()

    def dtype(self, value: int) -> Any:
        """The dtype of an array or a link's result."""
        first = len(self.arrays) + len(self.numbers)
        return self.arrays[value][1] if value < len(self.arrays) else self.links[value - first].dtype

    def needs(self) -> list[frozenset[int]]:
        """For every output, results before ends, the arrays that it is computed from."""
        found = [frozenset((k,)) for k in range(len(self.arrays))]
        found += [frozenset()] * len(self.numbers)
        for link in self.links:
            found.append(frozenset().union(*(found[k] for k in link.operands)))
        return [found[k] for k in (*self.results, *(end.operand for end in self.ends))]


# --- what a step is ---------------------------------------------------------------------------------

class Pointwise(NamedTuple):
    """A step that can be a link."""

    shape: Shape
    given: tuple[Any, ...]


class Reduction(NamedTuple):
    """A step that can be an end, of a value of `shape`."""

    shape: Shape
    reduced: tuple[int, ...]
    combine: str
    total: Any
    divisor: float | None


def describe(step: Placed, types: Types) -> Pointwise | Reduction | None:
    """What a chain can make of a step; None: nothing."""
    call = step.call
    if call.kind != "op" or len(step.outs) != 1:
        return None
    if call.op.elementwise is not None or call.op.name == "astype":
        given = [None if s < 0 else types[s][1] for s in step.ins]
        found = operand_dtypes(call.op, call.attrs, given, call.dtypes[0])
        arrays = any(s >= 0 for s in step.ins)
        return Pointwise(call.shapes[0], found) if found is not None and arrays else None
    rule = REDUCTIONS.get(call.op.name)
    return None if rule is None else rule(*types[step.ins[0]], call.dtypes[0], call.attrs)


def _ends(shape: Shape, axes: Iterable[int], combine: str, dtype: Any, total: Any,
          count: float | None = None) -> Reduction | None:
    """A reduction over leading, trailing or all axes, if that is what it is over."""
    reduced = tuple(i for i in axes if shape[i] != 1)
    kept = [i for i, n in enumerate(shape) if n != 1 and i not in reduced]
    ordered = not kept or not reduced or max(kept) < min(reduced) or max(reduced) < min(kept)
    complex_ = max(dtypes.kind(dtype), dtypes.kind(total)) > 2
    return Reduction(shape, reduced, combine, total, count) if ordered and reduced and not complex_ else None


def total_dtype(dtype: Any) -> Any:
    """In what sums that become `dtype` are taken."""
    if dtypes.is_floating(dtype):
        return dtypes.float64 if dtype.itemsize == 8 else dtypes.float32
    return dtypes.uint64 if dtype.kind == "u" else dtypes.int64


def _extreme_total(dtype: Any) -> Any:
    return total_dtype(dtype) if dtypes.kind(dtype) else dtypes.uint64


def _sum(shape: Shape, dtype: Any, out: Any, attrs: Mapping[str, Any]) -> Reduction | None:
    if not dtypes.kind(out):
        return None
    return _ends(shape, normalize_axes(attrs["axis"], len(shape)), "sum", dtype, total_dtype(out))


def _mean(shape: Shape, dtype: Any, out: Any, attrs: Mapping[str, Any]) -> Reduction | None:
    axes = normalize_axes(attrs["axis"], len(shape))
    count = prod(shape[i] for i in axes) if attrs["count"] is None else attrs["count"]
    return _ends(shape, axes, "sum", dtype, total_dtype(out), float(count))


def _sum_to(shape: Shape, dtype: Any, out: Any, attrs: Mapping[str, Any]) -> Reduction | None:
    wanted = (1,) * (len(shape) - len(attrs["shape"])) + tuple(attrs["shape"])
    return _ends(shape, [i for i, n in enumerate(shape) if n != wanted[i]], "sum", dtype, total_dtype(out))


def _extreme(combine: str) -> Callable[..., Reduction | None]:
    def rule(shape: Shape, dtype: Any, out: Any, attrs: Mapping[str, Any]) -> Reduction | None:
        axes = normalize_axes(attrs["axis"], len(shape))
        return _ends(shape, axes, combine, dtype, _extreme_total(dtype))
    return rule


REDUCTIONS = {"sum": _sum, "mean": _mean, "sum_to": _sum_to, "max": _extreme("max"), "min": _extreme("min")}
