"""Small programs for the tests of fusion: steps made by hand, and run with NumPy or fused on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from meshtape.runtime.op import IO, TABLE
from meshtape.runtime.overlap import Placed
from meshtape.runtime.program import Call
from meshtape.runtime.shards import piece


class Steps:
    """Steps as a compiler of programs would make them; a Python number among operands becomes a scalar."""

    def __init__(self) -> None:
        self.steps: list[Placed] = []
        self.types: dict[int, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self.external: list[int] = []
        self.scalars: list[Any] = []

    def input(self, shape: tuple[int, ...], dtype: Any = "float32") -> int:
        slot = len(self.types)
        self.types[slot] = shape, np.dtype(dtype)
        self.external.append(slot)
        return slot

    def op(self, name: str, *operands: Any, **attrs: Any) -> int:
        """A step of a row; casts of operands are steps before it. Numbers are given as Number(value)."""
        op = TABLE[name]
        attrs = op.unpack(op.pack(attrs))
        given = [type(x.value) if type(x) is Number else self.types[x][1] for x in operands]
        casts, outs = op.dtype(*given, **attrs)
        if name != "astype":
            operands = tuple(
                x if type(x) is Number or self.types[x][1] == c else self.op("astype", x, dtype=c.name)
                for x, c in zip(operands, casts, strict=True))
        shapes = [() if type(x) is Number else self.types[x][0] for x in operands]
        shape, = op.shape(*shapes, **attrs)
        if op.local is not None:
            whole = [piece(s, (), (), ()) for s in (*shapes, shape)]
            attrs = op.local(attrs, IO(tuple(whole[:-1]), tuple(whole[-1:])))
        ins = []
        for x in operands:
            if type(x) is Number:
                self.scalars.append(x.value)
            ins.append(-len(self.scalars) if type(x) is Number else x)
        call = Call("op", name, op.kernel, attrs, op, False, (np.dtype(outs[0]),), (tuple(shape),))
        return self.place(call, tuple(ins))

    def boundary(self, *operands: int, name: str = "all_reduce", outputs: bool = True) -> int:
        """A step that is no chain's: it gives its first operand back."""
        kinds = (self.types[operands[0]],) if outputs else ()
        call = Call("collective", name, lambda x, *others: x, {}, None, False, tuple(d for _, d in kinds),
                    tuple(s for s, _ in kinds))
        return self.place(call, operands)

    def place(self, call: Call, ins: tuple[int, ...]) -> int:
        outs = tuple(range(len(self.types), len(self.types) + len(call.dtypes)))
        self.types.update(zip(outs, zip(call.shapes, call.dtypes, strict=True), strict=True))
        self.steps.append(Placed(call, ins, outs, len(self.steps)))
        return outs[0] if outs else -1

    def dead(self, *kept: int) -> set[int]:
        return set(self.types) - set(kept)

    def plain(self, values: Mapping[int, Any]) -> dict[int, Any]:
        """All slots, by the plain kernels, with the dtypes that the rows say."""
        slots: dict[int, Any] = dict(values)
        with np.errstate(all="ignore"):
            for call, ins, outs, _ in self.steps:
                args = [slots[s] if s >= 0 else self.scalars[-1 - s] for s in ins]
                result = call.function(*args) if call.op is None else call.function(np, *args, **call.attrs)
                for slot, dtype in zip(outs, call.dtypes, strict=True):
                    slots[slot] = np.asarray(result).astype(dtype)
        return slots


class Number:
    """A Python scalar among operands."""

    def __init__(self, value: Any) -> None:
        self.value = value


def run_fused(device: Any, steps: Sequence[Placed], values: Mapping[int, Any],
              scalars: Sequence[Any]) -> dict[int, Any]:
    """All slots that are made, as NumPy arrays; `values` are NumPy arrays or arrays of the device."""
    slots = {s: device.cp.asarray(x) for s, x in values.items()}
    for step in steps:
        arrays = [slots[s] for s in step.ins if s >= 0]
        if step.call.kind == "fused":
            result = step.call.function(device, *arrays, *numbers_of(device, step, scalars))
        elif step.call.op is None:
            result = step.call.function(*arrays)
        else:
            host = step.call.function(np, *map(device.cp.asnumpy, arrays), **step.call.attrs)
            result = device.cp.asarray(np.asarray(host, step.call.dtypes[0]))
        slots.update(zip(step.outs, result if step.call.many else (result,), strict=True))
    return {s: device.cp.asnumpy(x) for s, x in slots.items()}


def numbers_of(device: Any, step: Placed, scalars: Sequence[Any]) -> list[Any]:
    """The 0-d arrays that a fused step gets for its scalars."""
    found = [scalars[-1 - s] for s in step.ins if s < 0]
    return [device.cp.asarray(np.array(x, np.float64 if letter == "d" else np.int64))
            for x, letter in zip(found, step.call.numbers, strict=True)]


# --- random programs --------------------------------------------------------------------------------------

UNARY = ("negative", "abs", "tanh", "relu", "sigmoid", "square", "sign", "floor")
BINARY = ("add", "sub", "mul", "maximum", "minimum", "relu_grad")
OPERANDS = [(4, 6), (6,), (4, 1), (1, 6), (), (4, 6)]


def together(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(1 in (m, n) or m == n for m, n in zip(a[::-1], b[::-1], strict=False))


@st.composite
def programs(draw: Any, most: int) -> tuple[Steps, list[int]]:
    """Up to `most` pointwise ops over a few shapes that broadcast, with boundaries and reductions among them,
    and the slots that are kept.
    """
    p = Steps()
    slots = [p.input(shape) for shape in OPERANDS]
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from("uuubbbbbnrcx"))
        x, y = (draw(st.sampled_from(slots[-9:])) for _ in range(2))
        if kind == "u":
            slots.append(p.op(draw(st.sampled_from(UNARY)), x))
        elif kind == "n":
            number = draw(st.sampled_from((0.5, -1.25, 3.0)))
            slots.append(p.op(draw(st.sampled_from(("mul", "add", "maximum"))), x, Number(number)))
        elif kind == "r" and p.types[x][0]:
            slots.append(p.op(draw(st.sampled_from(("sum", "max", "mean"))), x, keepdims=draw(st.booleans()),
                              axis=draw(st.integers(0, len(p.types[x][0]) - 1))))
        elif kind == "x":
            slots.append(p.boundary(x))
        elif kind in "bc" and together(p.types[x][0], p.types[y][0]):
            slots.append(p.op(draw(st.sampled_from(BINARY)), x, y) if kind == "b" else
                         p.op("where", p.op("less", x, y), x, y))
    made = [s for s in slots if s not in p.external]
    return p, draw(st.lists(st.sampled_from(made), unique=True)) if made else []
