"""The row of the op table: everything that every room knows about one operation.

A row imports nothing above itself. Its columns:

name         the wire name; ops travel by name
kernel       `(xp, *arrays, **attrs) -> array | tuple`, one body for NumPy and CuPy. Never mutates its inputs;
             may return a view of them. If it has a parameter `out`, it can write there.
attrs        attribute names with their defaults, in wire order (REQUIRED where there is none)
shape        `(*shapes, **attrs) -> list of output shapes`; raises ShapeError
dtype        `(*dtypes, **attrs) -> (input dtypes, output dtypes)`: what the inputs are cast to first, and
             what comes out; raises DTypeError. A weak Python scalar is stood for by its type and never cast.
axes         `(*shapes, **attrs) -> Axes`, or a string like "mk,kn->mn": how dimensions move together
linear       sets of inputs through which Partial("sum") may pass: if exactly the inputs of one set are
             Partial and the others replicated, the output is Partial. `((0, 1),)` add, `((0,), (1,))` mul;
             "joint" means all inputs together. Or `(*dtypes, **attrs) -> sets`
local        `(attrs, io) -> attrs` as one worker sees them; default: unchanged
elementwise  the op as an expression in the kernel's parameter names; set for pointwise ops only
vjp          one function `(g, out, *inputs, **attrs) -> tensor | None` per input (None: no derivative), or a
             single function returning a tuple, where the inputs' gradients share work. Written in terms of
             other rows, so that derivatives of derivatives work. Of several outputs `g` and `out` are tuples.
keeps        names of the kernel's parameters that the vjp reads, and "out" (or "out0", "out1"); everything
             else arrives as its Spec, which has shape and dtype but no values
n_out        number of outputs; -1: as many as the shape rule says
over         `(number of inputs, attrs) -> pairs (output, input)`: inputs that an output may be written over,
             when nobody else reads them. Pointwise ops (with `elementwise`) need none.
samples      `() -> list of Sample`: what the generic tests run
device       a second kernel, for CUDA, with the first as its oracle (see DeviceKernel)
autocast     inside autocast(): "low" if floating inputs are cast to its 16-bit dtype, "float32" if 16-bit
             inputs are cast to float32 (or the attribute `dtype` is set, where there is one), "" if neither
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, NamedTuple

from meshtape.runtime.errors import MeshtapeError, ShapeError
from meshtape.runtime.shards import Piece, Shape

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "REQUIRED"})()


class Axes(NamedTuple):
    """Index letters of every input and output dimension.

    Equal letters are split together; "." is never split. A letter split on a mesh axis makes an output that
    has it Shard there, and an output that lacks it Partial(combine) (or forbids the split if combine is "").
    `even` maps a letter to an extent that the product of its mesh axes must divide (the leading factor of a
    merged or divided dimension). `additive` inputs are added to the result, so where the output becomes
    Partial they must be Partial too. `forbid` lists letters that may appear but not be split.
    """

    ins: tuple[str, ...]
    outs: tuple[str, ...]
    combine: str = "sum"
    even: dict[str, int] = {}
    additive: tuple[int, ...] = ()


class IO(NamedTuple):
    """What `local` sees: this worker's piece of every input (None for a scalar) and output."""

    ins: tuple[Piece | None, ...]
    outs: tuple[Piece, ...]


@dataclass(frozen=True)
class Sample:
    """One case for the generic tests: input arrays' shapes (or arrays, or Python scalars) and attrs.

    `dtype` is that of generated inputs; `low` and `high` bound their values; `diff` says whether finite
    differences apply; `distinct` asks for values that are all different (max, sort).
    """

    inputs: tuple[Any, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float64"
    low: float = -2.0
    high: float = 2.0
    diff: bool = True
    distinct: bool = False


class DeviceKernel(NamedTuple):
    """A kernel for CUDA, `run(device, *arrays, **attrs)`, where `supports(shapes, dtypes, attrs)` says
    that it takes such arrays (shape and dtype are None for a Python scalar). `device` is a
    runtime.cuda.device.Device; attrs, `out`, and results are as for the plain kernel.

    numbers: how Python scalars arrive, one letter for each in the order of inputs: "d" and "i" as a 0-d array
    on the device, of float64 or int64, "h" as the Python scalar itself. Where fewer inputs are scalars than
    there are letters, the last letters are theirs. By default all are "h". A kernel that takes arrays need
    not be captured again when a number changes.

    mixes: whether inputs of these dtypes (None for a scalar) go with results of these, where 16-bit floats
    have taken the place of float32, or float32 theirs. `run` is then told by `result_dtypes`, and computes in
    float32 as ever, so that casts before and after it need not be carried out.
    """

    run: Callable[..., Any]
    supports: Callable[[tuple[Any, ...], tuple[Any, ...], dict[str, Any]], bool]
    numbers: str = ""
    mixes: Callable[[Sequence[Any], Sequence[Any]], bool] | None = None


LinearSets = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Op:
    """One row. Calling it with tensors records it: `mul(g, x)`, `softmax(x, axis=-1)`."""

    name: str
    kernel: Callable[..., Any]
    shape: Callable[..., list[Shape]]
    dtype: Callable[..., tuple[Sequence[Any], Sequence[Any]]]
    axes: Callable[..., Axes] | None = None
    attrs: dict[str, Any] = field(default_factory=dict)
    linear: LinearSets | Literal["joint"] | Callable[..., LinearSets] = ()
    local: Callable[[dict[str, Any], IO], dict[str, Any]] | None = None
    elementwise: str | None = None
    vjp: tuple[Callable[..., Any] | None, ...] | Callable[..., Any] | None = None
    keeps: str = ""
    samples: Callable[[], list[Sample]] | None = None
    n_out: int = 1
    over: Callable[[int, dict[str, Any]], list[tuple[int, int]]] | None = None
    device: DeviceKernel | None = None
    autocast: Literal["", "low", "float32"] = ""
    takes_out: bool = field(default=False, init=False)
    kept_inputs: tuple[int, ...] = field(default=(), init=False)
    kept_outputs: tuple[int, ...] = field(default=(), init=False)
    variadic: bool = field(default=False, init=False)
    plain: tuple[Any, ...] | None = field(default=None, init=False)
    packed: dict[Any, tuple[Any, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        params = list(inspect.signature(self.kernel).parameters.values())[1:]

        def put(key: str, value: Any) -> None:
            object.__setattr__(self, key, value)

        put("takes_out", any(p.name == "out" for p in params))
        put("variadic", any(p.kind is p.VAR_POSITIONAL for p in params))
        arrays = [p.name for p in params if p.name != "out" and p.name not in self.attrs]
        kept = self.keeps.split()
        outs = {"out": 0, **{f"out{i}": i for i in range(self.n_out)}}
        put("kept_outputs", tuple(sorted(outs[k] for k in kept if k in outs)))
        put("kept_inputs", tuple(sorted(arrays.index(k) for k in kept if k not in outs)))
        if not any(v is REQUIRED for v in self.attrs.values()):
            put("plain", tuple(self.attrs.values()))
        if isinstance(self.axes, str):
            put("axes", letters(self.axes))

    def __call__(self, *inputs: Any, **attrs: Any) -> Any:
        packed = self.plain if not attrs and self.plain is not None else self.pack(attrs)
        return dispatcher(inputs)(self, inputs, packed)

    def pack(self, attrs: dict[str, Any]) -> tuple[Any, ...]:
        """Attribute values in wire order; unknown or missing names are errors of the caller."""
        key = tuple(attrs.items())
        found = self.packed.get(key)
        if found is not None:
            return found
        values = {**self.attrs, **attrs}
        if len(values) != len(self.attrs) or any(v is REQUIRED for v in values.values()):
            raise TypeError(f"{self.name} needs the attributes {list(self.attrs)}, got {sorted(attrs)}")
        out = tuple(values[k] for k in self.attrs)
        if len(self.packed) < 1024:
            self.packed[key] = out
        return out

    def unpack(self, values: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(self.attrs, values, strict=True))

    def linear_sets(self, dtypes: Sequence[Any], attrs: dict[str, Any]) -> LinearSets:
        """The column `linear` for inputs of these dtypes."""
        if callable(self.linear):
            return self.linear(*dtypes, **attrs)
        return (tuple(range(len(dtypes))),) if self.linear == "joint" else self.linear

    def __repr__(self) -> str:
        return f"<op {self.name}>"


def dispatcher(inputs: Iterable[Any]) -> Callable[..., Any]:
    """What records an op on these inputs: the `_apply` of the first tensor's class."""
    for x in inputs:
        found = getattr(x, "_apply", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise TypeError(f"no tensor among the inputs {tuple(type(x).__name__ for x in inputs)}")


def letters(text: str) -> Callable[..., Axes]:
    """Axes of fixed rank: "mk,kn->mn"."""
    left, right = text.split("->")
    axes = Axes(tuple(left.split(",")), tuple(right.split(",")))
    return lambda *shapes, **attrs: axes


TABLE: dict[str, Op] = {}


def register(op: Op) -> Op:
    if op.name in TABLE:
        raise MeshtapeError(f"op {op.name!r} is declared twice")
    TABLE[op.name] = op
    return op


def lookup(name: str) -> Op:
    return TABLE[name]


# --- rules that many rows share ---------------------------------------------------------------------

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def integers(given: Any, name: str = "") -> tuple[int, ...]:
    """One integer or several (also NumPy's) as a tuple of Python's; raises ShapeError on anything else."""
    try:
        return tuple(map(index, given)) if hasattr(given, "__iter__") else (index(given),)
    except TypeError as error:
        raise ShapeError(f"{name + ': ' if name else ''}{given!r} given where an integer or a tuple of "
                         f"integers is needed") from error


def normalize_axis(axis: int, ndim: int, name: str = "") -> int:
    """`axis` as 0 <= axis < ndim; raises ShapeError. A 0-d tensor accepts 0 and -1."""
    if type(axis) is not int:
        axis, = integers(axis, name)
    bound = max(ndim, 1)
    if not -bound <= axis < bound:
        raise ShapeError(f"{name + ': ' if name else ''}axis {axis} is out of range for a tensor of "
                         f"{ndim} dimensions; use {-bound} to {bound - 1}")
    return axis % bound


def normalize_axes(axis: int | Sequence[int] | None, ndim: int, name: str = "") -> tuple[int, ...]:
    """All named axes as sorted non-negative ints; None means all. Raises ShapeError on repeats."""
    if axis is None:
        return tuple(range(ndim))
    found = sorted(normalize_axis(a, ndim, name) for a in integers(axis, name))
    if len(set(found)) != len(found):
        raise ShapeError(f"{name}: axis {axis} names a dimension twice")
    return tuple(a for a in found if a < ndim)


def broadcast_shapes(name: str, *shapes: Shape) -> Shape:
    """NumPy's broadcasting; raises ShapeError naming the operation and the shapes."""
    ndim = max((len(s) for s in shapes), default=0)
    out = [1] * ndim
    for s in shapes:
        for i, n in enumerate(s, start=ndim - len(s)):
            if n != 1 and out[i] not in (1, n):
                raise ShapeError(f"{name}: shapes {' and '.join(map(str, shapes))} do not broadcast; "
                                 f"dimension {i - ndim} is {out[i]} in one and {n} in another")
            if n != 1:
                out[i] = n
    return tuple(out)


def pointwise_axes(*shapes: Shape, **attrs: Any) -> Axes:
    """Letters of broadcasting inputs: a dimension of 1 that is stretched is never split."""
    ndim = max((len(s) for s in shapes), default=0)
    out_shape = broadcast_shapes("", *shapes)
    names = ALPHABET[:ndim]
    ins = tuple("".join(names[i] if n == out_shape[i] else "." for i, n in enumerate(s, start=ndim - len(s)))
                for s in shapes)
    return Axes(ins, (names,))
