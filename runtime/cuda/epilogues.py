"""Linear layers with their activations, and gradients with the sums of biases, as one product each.

`epilogue_pattern` finds them among the steps of a program; the functions below do them, with one kernel of
cublasLt where it has one, else step by step.

    linear, relu                                relu(x @ w.T + b), and perhaps the bits of what is positive
    linear, gelu(approximate="tanh")            before and after GELU
    matmul, relu_grad, sum                      g @ w where bits say so, and the sum over its rows
    matmul, gelu_grad(approximate="tanh"), sum  the same with GELU's slope
    linear_weight_grad, sum                     g.T @ x, and the sum over g's rows

cublasLt's GELU is that by tanh, and approximate: it is used for 16-bit floats only.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from meshtape.runtime import dtypes
from meshtape.runtime.cuda import lt
from meshtape.runtime.cuda.blas import as_rows
from meshtape.runtime.op import lookup, normalize_axes
from meshtape.runtime.overlap import Placed
from meshtape.runtime.shards import Shape

Types = Mapping[int, tuple[Shape, Any]]


# --- what runs ----------------------------------------------------------------------------------------------

def mask_shape(rows: int, n: int) -> Shape:
    """The bytes of ReLU's bit mask: one bit for each element, rows of whole 128 bits."""
    return rows, -(-n // lt.MASK_LD) * lt.MASK_LD // 8


def linear_relu(dev: Any, x: Any, w: Any, b: Any, out: Any = None) -> Any:
    """relu(x @ w.T + b)."""
    y = out if out is not None else dev.cp.empty((*x.shape[:-1], w.shape[0]), x.dtype)
    if not dev.blas.finished(as_rows(x), w.T, y, lt.RELU_BIAS, bias=b):
        dev.blas.linear(x, w, b, y)
        _row(dev, "relu", y, out=y)
    return y


def linear_relu_mask(dev: Any, x: Any, w: Any, b: Any, out: Any = None) -> tuple[Any, Any]:
    """relu(x @ w.T + b), and a bit mask of what is positive (or no bytes, where cublasLt makes none)."""
    y, mask = _places(out, 2)
    y = y if y is not None else dev.cp.empty((*x.shape[:-1], w.shape[0]), x.dtype)
    shape = mask_shape(prod(x.shape[:-1]), w.shape[0])
    mask = mask if mask is not None else dev.cp.empty(shape, np.uint8)
    if dev.blas.finished(as_rows(x), w.T, y, lt.RELU_AUX_BIAS, bias=b, aux=mask, aux_ld=shape[1] * 8):
        return y, mask
    return linear_relu(dev, x, w, b, y), mask[:0]


def linear_gelu(dev: Any, x: Any, w: Any, b: Any, out: Any = None) -> Any:
    """GELU of x @ w.T + b."""
    y = out if out is not None else dev.cp.empty((*x.shape[:-1], w.shape[0]), x.dtype)
    if not dev.blas.finished(as_rows(x), w.T, y, lt.GELU_BIAS, bias=b):
        return _row(dev, "gelu", dev.blas.linear(x, w, b), out=y, approximate="tanh")
    return y


def linear_gelu_both(dev: Any, x: Any, w: Any, b: Any, out: Any = None) -> tuple[Any, Any]:
    """x @ w.T + b, and its GELU."""
    before, y = _places(out, 2)
    shape = *x.shape[:-1], w.shape[0]
    before = before if before is not None else dev.cp.empty(shape, x.dtype)
    y = y if y is not None else dev.cp.empty(shape, x.dtype)
    if not dev.blas.finished(as_rows(x), w.T, y, lt.GELU_AUX_BIAS, bias=b, aux=before, aux_ld=w.shape[0]):
        dev.blas.linear(x, w, b, before)
        y = _row(dev, "gelu", before, out=y, approximate="tanh")
    return before, y


def matmul_relu_grad(dev: Any, g: Any, w: Any, y: Any, mask: Any, out: Any = None) -> Any:
    """g @ w where y > 0, else 0; `mask` says the same."""
    to = out if out is not None else dev.cp.empty(y.shape, g.dtype)
    if mask.size and dev.blas.finished(as_rows(g), w, to, lt.DRELU, aux=mask, aux_ld=mask.shape[1] * 8):
        return to
    return _row(dev, "relu_grad", dev.blas.matmul(g, w), y, out=to)


def matmul_relu_grad_sum(dev: Any, g: Any, w: Any, y: Any, mask: Any, out: Any = None) -> tuple[Any, Any]:
    """g @ w where y > 0, else 0, and the sum over its rows."""
    to, total = _with_sum(dev, y, g.dtype, out)
    if mask.size and dev.blas.finished(as_rows(g), w, to, lt.DRELU_BGRAD, bias=total, aux=mask,
                                       aux_ld=mask.shape[1] * 8):
        return to, total
    return _summed(dev, matmul_relu_grad(dev, g, w, y, mask, to), total)


def matmul_gelu_grad(dev: Any, g: Any, w: Any, x: Any, out: Any = None) -> Any:
    """g @ w times the slope of GELU at x."""
    to = out if out is not None else dev.cp.empty(x.shape, g.dtype)
    if dev.blas.finished(as_rows(g), w, to, lt.DGELU, aux=x, aux_ld=x.shape[-1]):
        return to
    return _row(dev, "gelu_grad", dev.blas.matmul(g, w), x, out=to, approximate="tanh")


def matmul_gelu_grad_sum(dev: Any, g: Any, w: Any, x: Any, out: Any = None) -> tuple[Any, Any]:
    """g @ w times the slope of GELU at x, and the sum over its rows."""
    to, total = _with_sum(dev, x, g.dtype, out)
    if dev.blas.finished(as_rows(g), w, to, lt.DGELU_BGRAD, bias=total, aux=x, aux_ld=x.shape[-1]):
        return to, total
    return _summed(dev, matmul_gelu_grad(dev, g, w, x, to), total)


def weight_and_bias_grad(dev: Any, g: Any, x: Any, out: Any = None) -> tuple[Any, Any]:
    """g.T @ x over all leading dimensions, and the sum of g over them."""
    found: tuple[Any, Any] = dev.blas.weight_and_bias_grad(g, x, *_places(out, 2))
    return found


def _row(dev: Any, name: str, *arrays: Any, out: Any, **attrs: Any) -> Any:
    """A row's result in `out`, by its kernel for the device if that takes these."""
    op = lookup(name)
    if op.device is not None and op.device.supports(
            tuple(x.shape for x in arrays), tuple(x.dtype for x in arrays), attrs):
        found = op.device.run(dev, *arrays, out=out, **attrs)
    else:
        found = op.kernel(dev.xp, *arrays, out=out, **attrs)
    if found is not out:
        out[...] = found
    return out


def _places(out: Any, count: int) -> Sequence[Any]:
    return (None,) * count if out is None else out


def _with_sum(dev: Any, like: Any, dtype: Any, out: Any) -> tuple[Any, Any]:
    """Room for an array and for the sum over its rows."""
    to, total = _places(out, 2)
    return (to if to is not None else dev.cp.empty(like.shape, dtype),
            total if total is not None else dev.cp.empty(like.shape[-1:], dtype))


def _summed(dev: Any, x: Any, total: Any) -> tuple[Any, Any]:
    attrs = {"axis": tuple(range(x.ndim - 1)), "keepdims": False, "dtype": None}
    op = lookup("sum")
    if op.device is not None and op.device.supports((x.shape,), (x.dtype,), attrs):
        total[...] = op.device.run(dev, x, **attrs)
    else:
        total[...] = op.kernel(dev.xp, x, **attrs)
    return x, total


# --- what is found ------------------------------------------------------------------------------------------

def epilogue_pattern(steps: Sequence[Placed], types: Types, dead: Container[int],
                     n_slots: int) -> tuple[list[Placed], int]:
    """The steps with products and what follows them as one call each, and the number of slots then. Pure.

    `types` gives local shape and dtype of the slots that are there before the first step; `dead` are slots
    that nobody reads after the last. New slots, of bit masks, begin at `n_slots`; nobody reads them later.
    A call takes the place of its product, so that its other results are there no later than they were.
    """
    found = Patterns(steps, types, dead, n_slots)
    for at, step in enumerate(steps):
        if step.call.name == "linear":
            found.forward(at)
    for at, step in enumerate(steps):
        if step.call.name in ("relu_grad", "gelu_grad"):
            found.backward(at)
    for at, step in enumerate(steps):
        if step.call.name == "linear_weight_grad":
            found.weight(at)
    return found.result(), found.n_slots


class Patterns:
    """Steps, and what becomes of some: `placed` at a step stands for it and for those in `gone`."""

    def __init__(self, steps: Sequence[Placed], types: Types, dead: Container[int], n_slots: int) -> None:
        self.steps, self.dead, self.n_slots = steps, dead, n_slots
        self.types = dict(types)
        self.producer: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        self.placed: dict[int, Placed] = {}
        self.gone: set[int] = set()
        self.activated: dict[int, int] = {}     # slot of a ReLU's result: the step of its product
        for at, step in enumerate(steps):
            for slot in step.ins:
                self.readers.setdefault(slot, []).append(at)
            self.producer.update(dict.fromkeys(step.outs, at))
            kinds = zip(step.call.shapes, step.call.dtypes, strict=True)
            self.types.update(zip(step.outs, kinds, strict=True))

    def result(self) -> list[Placed]:
        return [self.placed.get(at, step) for at, step in enumerate(self.steps) if at not in self.gone]

    def forward(self, at: int) -> None:
        """linear with a ReLU or GELU of its result."""
        slot, = self.steps[at].outs
        shape, dtype = self.types[slot]
        reader = self._first(slot, "relu")
        if reader is not None and self._free(slot, reader) and dtype.name in lt.DTYPES:
            result, = self.steps[reader].outs
            self._place(at, (reader,), "linear relu", linear_relu, self.steps[at].ins, (result,))
            self.activated[result] = at
            return
        reader = self._first(slot, "gelu")
        if reader is None or not self._sixteen(dtype):
            return
        ins, outs, attrs = self.steps[at].ins, self.steps[reader].outs, self.steps[reader].call.attrs
        if attrs["approximate"] == "tanh" and self._free(slot, reader):
            self._place(at, (reader,), "linear gelu", linear_gelu, ins, outs)
        elif attrs["approximate"] == "tanh" and shape[-1] % 8 == 0:
            self._place(at, (reader,), "linear gelu", linear_gelu_both, ins, (slot, *outs))

    def backward(self, at: int) -> None:
        """The gradient of an activation, of a product that nothing else reads."""
        gradient, kept = self.steps[at].ins
        maker = self.producer.get(gradient, -1)
        if maker < 0 or not self._product(maker) or not self._free(gradient, at) or kept == gradient:
            return
        slot, = self.steps[at].outs
        name = self.steps[at].call.name
        shape, dtype = self.types[slot]
        ins = (*self.steps[maker].ins, kept)
        alone: Any
        summed: Any
        if name == "relu_grad":
            forward = self.activated.get(kept)
            if forward is None or forward > maker or self.types[kept] != (shape, dtype):
                return
            ins = (*ins, self._mask(forward, shape))
            alone, summed = matmul_relu_grad, matmul_relu_grad_sum
        else:
            attrs = self.steps[at].call.attrs
            if not self._sixteen(dtype) or attrs["approximate"] != "tanh" or shape[-1] % 8 or (
                    self.producer.get(kept, -1) > maker):
                return
            alone, summed = matmul_gelu_grad, matmul_gelu_grad_sum
        total = self._sum_of(slot)
        if total is None:
            self._place(maker, (at,), f"matmul {name}", alone, ins, (slot,))
        else:
            self._place(maker, (at, total), f"matmul {name} sum", summed, ins,
                        (slot, *self.steps[total].outs))

    def weight(self, at: int) -> None:
        """A weight's gradient and its bias's, which is summed no earlier."""
        total = self._sum_of(self.steps[at].ins[0])
        if total is not None and total > at and self.types[self.steps[at].ins[0]][1].name in lt.DTYPES:
            self._place(at, (total,), "linear_weight_grad sum", weight_and_bias_grad, self.steps[at].ins,
                        (*self.steps[at].outs, *self.steps[total].outs))

    def _mask(self, at: int, shape: Shape) -> int:
        """The slot of a ReLU's bit mask, which its product writes from now on."""
        placed = self.placed[at]
        if len(placed.outs) == 1:
            slot, self.n_slots = self.n_slots, self.n_slots + 1
            call = placed.call
            self.placed[at] = placed._replace(outs=(*placed.outs, slot), call=call._replace(
                function=linear_relu_mask, many=True, dtypes=(*call.dtypes, dtypes.uint8),
                shapes=(*call.shapes, mask_shape(prod(shape[:-1]), shape[-1]))))
        return self.placed[at].outs[1]

    def _place(self, at: int, others: tuple[int, ...], name: str, function: Any, ins: tuple[int, ...],
               outs: tuple[int, ...]) -> None:
        """Let a call stand for the step `at` and others."""
        kinds = [self.types[slot] for slot in outs]
        call = self.steps[at].call._replace(
            kind="fused", name=name, function=function, attrs={}, op=None, many=len(outs) > 1, over=(),
            shapes=tuple(shape for shape, _ in kinds), dtypes=tuple(dtype for _, dtype in kinds),
            on_device=True, numbers="")
        self.placed[at] = Placed(call, ins, outs, self.steps[at].origin)
        self.gone.update(others)

    def _first(self, slot: int, name: str) -> int | None:
        """The first step of a name that reads a slot, if it takes no part in anything yet."""
        return next((at for at in self.readers.get(slot, ()) if self.steps[at].call.name == name
                     and self.steps[at].call.kind == "op" and at not in self.gone), None)

    def _free(self, slot: int, reader: int) -> bool:
        """Whether a step is all that reads a slot."""
        return slot in self.dead and self.readers[slot] == [reader]

    def _sixteen(self, dtype: Any) -> bool:
        return dtypes.is_floating(dtype) and dtype.itemsize == 2

    def _product(self, at: int) -> bool:
        """Whether a step is rows times a matrix, of a dtype that has epilogues."""
        step = self.steps[at]
        if step.call.name != "matmul" or step.call.kind != "op" or at in self.placed:
            return False
        attrs = step.call.attrs
        x, y = (self.types[slot] for slot in step.ins)
        plain = not attrs["transpose_x"] and not attrs["transpose_y"]
        return plain and len(x[0]) > 1 and len(y[0]) == 2 and x[1].name in lt.DTYPES

    def _sum_of(self, slot: int) -> int | None:
        """The step that sums a slot over all dimensions but the last."""
        at = self._first(slot, "sum")
        if at is None:
            return None
        shape, dtype = self.types[slot]
        attrs = self.steps[at].call.attrs
        leading = tuple(range(len(shape) - 1))
        fits = (leading and normalize_axes(attrs["axis"], len(shape)) == leading and not attrs["keepdims"]
                and self.types[self.steps[at].outs[0]] == (shape[-1:], dtype))
        return at if fits else None
