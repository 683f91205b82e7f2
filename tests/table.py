"""Running rows of the op table on samples, whole and cut over the workers of a mesh, in plain NumPy.

No workers, no tape: what a row declares (`axes`, `linear`, `local`) is applied by hand, so that a wrong
declaration shows as a number that differs from the dense kernel's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.op import IO, Axes, Op, Sample
from meshtape.runtime.shards import REPLICATE, Placement, Placements, is_partial, piece

MESHES_1D = ((2,), (3,), (4,))
MESHES_2D = ((2, 2), (3, 2))
COMBINE = {"sum": np.add, "max": np.maximum, "min": np.minimum}
TOLERANCE = {"float64": 1e-10, "complex128": 1e-10, "float32": 2e-5, "complex64": 2e-5, "float16": 1e-2}


# --- samples ------------------------------------------------------------------------------------------------

def make_inputs(sample: Sample, rng: np.random.Generator) -> list[Any]:
    """Fresh inputs of a sample: an array for a shape, a copy of an array, a Python scalar as it is."""
    return [random_array(x, sample, rng) if isinstance(x, tuple) else
            x.copy() if isinstance(x, np.ndarray) else x for x in sample.inputs]


def random_array(shape: tuple[int, ...], sample: Sample, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    low, high, size = sample.low, sample.high, int(np.prod(shape))
    kind = np.dtype(sample.dtype).kind
    if kind == "b":
        return rng.random(shape) < 0.5
    if kind in "iu":
        whole = np.arange(size) + int(low) if sample.distinct else rng.integers(int(low), int(high) + 1, size)
        return rng.permutation(whole).reshape(shape).astype(sample.dtype)
    if sample.distinct:
        return rng.permutation(np.linspace(low, high, size)).reshape(shape).astype(sample.dtype)
    values = rng.uniform(low, high, shape)
    if kind == "c":
        values = values + 1j * rng.uniform(low, high, shape)
    return np.asarray(values, sample.dtype)


def samples(op: Op) -> list[Sample]:
    return op.samples() if op.samples is not None else []


def in_dtype(sample: Sample, dtype: Any) -> Sample:
    """A float64 case in another floating dtype, its given arrays included."""
    inputs = tuple(x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x
                   for x in sample.inputs)
    return replace(sample, dtype=dtype, inputs=inputs)


def shapes_of(inputs: Sequence[Any]) -> list[tuple[int, ...]]:
    return [np.shape(x) if isinstance(x, np.ndarray) else () for x in inputs]


# --- running ------------------------------------------------------------------------------------------------

class Case(NamedTuple):
    """A row on inputs that have the dtypes its rule asks for, and what its rules say comes out."""

    op: Op
    attrs: dict[str, Any]
    inputs: list[Any]
    out_shapes: list[tuple[int, ...]]
    out_dtypes: list[np.dtype[Any]]


def make_case(op: Op, sample: Sample, rng: np.random.Generator) -> Case:
    """Inputs of a sample, cast as the planner would cast them, and made read-only."""
    attrs = op.unpack(op.pack(sample.attrs))
    inputs = make_inputs(sample, rng)
    casts, outs = op.dtype(*(x.dtype if isinstance(x, np.ndarray) else type(x) for x in inputs), **attrs)
    cast = [x.astype(d) if isinstance(x, np.ndarray) and d is not None else x
            for x, d in zip(inputs, casts, strict=True)]
    for x in cast:
        if isinstance(x, np.ndarray):
            x.flags.writeable = False
    return Case(op, attrs, cast, [tuple(s) for s in op.shape(*shapes_of(cast), **attrs)],
                [np.dtype(d) for d in outs])


def call(op: Op, attrs: dict[str, Any], inputs: Sequence[Any], io: IO) -> list[Any]:
    """What the kernel gives on one worker."""
    if op.local is not None:
        attrs = op.local(attrs, io)
    with np.errstate(all="ignore"):
        result = op.kernel(np, *inputs, **attrs)
    return [np.asarray(r) for r in (result if op.n_out != 1 else (result,))]


def run_whole(case: Case) -> list[Any]:
    """What the kernel gives on a worker that holds everything."""
    whole = [piece(s, (), (), ()) for s in shapes_of(case.inputs)]
    io = IO(tuple(p if isinstance(x, np.ndarray) else None for p, x in zip(whole, case.inputs, strict=True)),
            tuple(piece(s, (), (), ()) for s in case.out_shapes))
    return call(case.op, case.attrs, case.inputs, io)


# --- layouts ------------------------------------------------------------------------------------------------

class Way(NamedTuple):
    """One way to run a row along one mesh axis: a placement for every input and output."""

    name: str
    ins: tuple[Placement, ...]
    outs: tuple[Placement, ...]


def letter_ways(case: Case) -> Iterator[Way]:
    """Every index letter that may be split."""
    axes = axes_of(case)
    for letter in dict.fromkeys("".join((*axes.ins, *axes.outs)).replace(".", "")):
        lacking = any(letter not in text for text in axes.outs)
        if any(text.count(letter) > 1 for text in (*axes.ins, *axes.outs)) or (lacking and not axes.combine):
            continue
        additive = axes.additive if lacking else ()
        if any(not isinstance(case.inputs[i], np.ndarray) for i in additive):
            continue
        yield Way(letter, tuple(t.index(letter) if letter in t else "sum" if i in additive else REPLICATE
                                for i, t in enumerate(axes.ins)),
                  tuple(t.index(letter) if letter in t else axes.combine for t in axes.outs))


def linear_ways(case: Case) -> Iterator[Way]:
    """Every set of inputs through which Partial("sum") passes. Booleans are never Partial("sum")."""
    n = len(case.inputs)
    eligible = {i for i, x in enumerate(case.inputs) if isinstance(x, np.ndarray) and x.dtype != bool}
    dtypes = [x.dtype if isinstance(x, np.ndarray) else type(x) for x in case.inputs]
    for group in case.op.linear_sets(dtypes, case.attrs):
        if eligible.issuperset(group):
            yield Way(f"linear{group}", tuple("sum" if i in group else REPLICATE for i in range(n)),
                      ("sum",) * len(case.out_shapes))


def axes_of(case: Case) -> Axes:
    assert case.op.axes is not None
    axes = case.op.axes(*shapes_of(case.inputs), **case.attrs)
    given = [*shapes_of(case.inputs), *case.out_shapes]
    assert len(axes.ins) == len(case.inputs) and len(axes.outs) == len(case.out_shapes), (case.op.name, axes)
    for text, shape in zip((*axes.ins, *axes.outs), given, strict=True):
        assert len(text) == len(shape), f"{case.op.name}: letters {text!r} for a tensor of shape {shape}"
    return axes


def legal(axes: Axes, mesh: Sequence[int], ways: Sequence[Way]) -> bool:
    """Whether these ways go together: equal parts where asked for, one reduction for an output."""
    parts: dict[str, int] = {}
    for n, way in zip(mesh, ways, strict=True):
        parts[way.name] = parts.get(way.name, 1) * n
    if any(axes.even[c] % n for c, n in parts.items() if c in axes.even):
        return False
    return all(len({p for p in placements if is_partial(p)}) <= 1
               for placements in zip(*(way.outs for way in ways), strict=True))


def layouts(case: Case) -> Iterator[tuple[tuple[int, ...], tuple[Way, ...]]]:
    """Every legal way on 1-D meshes, and every pair of them on 2-D meshes."""
    axes = axes_of(case)
    ways = [*letter_ways(case), *linear_ways(case)]
    for mesh in (*MESHES_1D, *MESHES_2D):
        for chosen in itertools.product(ways, repeat=len(mesh)):
            if legal(axes, mesh, chosen):
                yield mesh, chosen


def run_split(case: Case, mesh: tuple[int, ...], ways: Sequence[Way], rng: np.random.Generator) -> list[Any]:
    """Cut the inputs, run the kernel for every worker, and put its outputs together again."""
    ins = [tuple(way.ins[i] for way in ways) for i in range(len(case.inputs))]
    outs = [tuple(way.outs[i] for way in ways) for i in range(len(case.out_shapes))]
    parts = [addends(x, p, mesh, rng) if isinstance(x, np.ndarray) else None
             for x, p in zip(case.inputs, ins, strict=True)]
    whole = [np.full(s, -77).astype(d) for s, d in zip(case.out_shapes, case.out_dtypes, strict=True)]
    for coord in itertools.product(*(range(n) for n in mesh)):
        in_pieces = [None if a is None else piece(a[coord].shape, p, mesh, coord)
                     for a, p in zip(parts, ins, strict=True)]
        out_pieces = [piece(s, p, mesh, coord) for s, p in zip(case.out_shapes, outs, strict=True)]
        local = [x if a is None or p is None else np.asarray(a[coord][p.slices])
                 for x, a, p in zip(case.inputs, parts, in_pieces, strict=True)]
        results = call(case.op, case.attrs, local, IO(tuple(in_pieces), tuple(out_pieces)))
        for total, value, p, placements in zip(whole, results, out_pieces, outs, strict=True):
            assert value.shape == p.shape, f"worker {coord} gives {value.shape}, its piece is {p.shape}"
            first = all(c == 0 for c, q in zip(coord, placements, strict=True) if is_partial(q))
            combine = next((q for q in placements if is_partial(q)), "sum")
            value = value.astype(total.dtype)
            total[p.slices] = value if first else COMBINE[str(combine)](total[p.slices], value)
    return whole


def addends(x: np.ndarray[Any, Any], placements: Placements, mesh: tuple[int, ...],
            rng: np.random.Generator) -> dict[tuple[int, ...], Any]:
    """For every worker, the whole array that it contributes: random addends along Partial axes, else `x`.

    The addends are independent of each other: proportional ones would let any positively homogeneous op pass.
    """
    partial = [is_partial(p) for p in placements]
    found: dict[tuple[int, ...], Any] = {}
    rest, last = x, tuple(n - 1 if q else 0 for n, q in zip(mesh, partial, strict=True))
    for key in itertools.product(*(range(n if q else 1) for n, q in zip(mesh, partial, strict=True))):
        found[key] = rest if key == last else random_addend(rest, rng)
        found[key].flags.writeable = False
        rest = rest if key == last else np.asarray(rest - found[key])
    return {coord: found[tuple(c if q else 0 for c, q in zip(coord, partial, strict=True))]
            for coord in itertools.product(*(range(n) for n in mesh))}


def random_addend(x: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    if x.dtype.kind == "u":
        return np.asarray(rng.integers(0, x, endpoint=True), x.dtype)
    if x.dtype.kind == "i":
        return np.asarray(rng.integers(-9, 10, x.shape), x.dtype)
    values = rng.normal(size=x.shape)
    return np.asarray(values + 1j * rng.normal(size=x.shape) if x.dtype.kind == "c" else values, x.dtype)


def assert_same(got: Sequence[Any], wanted: Sequence[Any], what: str) -> None:
    """Equal up to the order of summation; exactly equal for integers and booleans."""
    for k, (a, b) in enumerate(zip(got, wanted, strict=True)):
        tolerance = TOLERANCE.get(a.dtype.name, 0.0)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True,
                                   err_msg=f"{what}, output {k}", strict=False)


def check_layouts(op: Op, sample: Sample, seed: int = 0) -> int:
    """Every layout of a sample computes what the whole computes; returns how many there were."""
    rng = np.random.default_rng(seed)
    case = make_case(op, sample, rng)
    wanted = [w.astype(d) for w, d in zip(run_whole(case), case.out_dtypes, strict=True)]
    count = 0
    for mesh, ways in layouts(case):
        names = " x ".join(way.name for way in ways)
        what = f"{op.name}{shapes_of(case.inputs)} {case.attrs} split by {names} over {mesh}"
        try:
            got = run_split(case, mesh, ways, rng)
        except Exception as error:
            raise AssertionError(f"{what}: a worker raises {type(error).__name__}: {error}") from error
        assert_same(got, wanted, what)
        count += 1
    return count
