"""Recurrent layers over a whole sequence: what their rows share, and the plain RNN.

One row runs all T steps. Inputs are x (T, B, I), the first state h0 (B, H) (and c0), weight_ih (G*H, I),
weight_hh (G*H, H) and two biases, (G*H,) or 0.0 for none, with torch's order of the G gates. The input's
products with weight_ih are one matrix product for all steps; a step is one with weight_hh, written gate by
gate, (G, B, H), so that each gate is contiguous. Backward walks the steps again with what forward saved,
collects the gradients of all pre-activations in one array (T, B, G*H), and ends with one matrix product for
each weight.

The batch may be split (then the weights' gradients are Partial), nothing else. Derivatives of the gradient
rows come from differentiating the layer written step by step in elementary rows: correct, and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from meshtape.runtime.dtypes import promote
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import Axes, Op, Sample, lookup, register
from meshtape.runtime.ops.activation import relu
from meshtape.runtime.ops.contraction import matmul, widen
from meshtape.runtime.ops.nested import differentiate
from meshtape.runtime.ops.pointwise import add, tanh
from meshtape.runtime.ops.reduce import accumulator
from meshtape.runtime.ops.rules import BOOL, COMPLEX, INTEGER, check_kind
from meshtape.runtime.shards import Shape

Vjp = Callable[..., Any]
CACHED = 16384          # elements of a run of steps; about ten arrays of this size are in use at a time
NONLINEARITY: dict[str, Any] = {"nonlinearity": "tanh"}


# --- rules ------------------------------------------------------------------------------------------

class Layer:
    """The rules of a recurrent layer's two rows.

    `gates` matrices are stacked in a weight; `states` is how many states go from step to step (y is the
    first); `saved` how many arrays (B, H) each step leaves for backward besides them.
    """

    def __init__(self, name: str, gates: int, states: int, saved: int) -> None:
        self.name, self.gates, self.states, self.saved = name, gates, states, saved
        self.n_out = states + (saved > 0)
        self.n_in = states + 5

    def shape(self, x: Shape, *rest: Shape, **attrs: Any) -> list[Shape]:
        states, (w_ih, w_hh), biases = rest[:self.states], rest[self.states:-2], rest[-2:]
        if len(x) != 3 or x[0] == 0:
            raise ShapeError(f"{self.name}: the input is (steps, batch, features) with at least one step, "
                             f"got {x}")
        if len(w_hh) != 2 or w_hh[0] != self.gates * w_hh[1] or w_ih != (w_hh[0], x[2]):
            rows = f"{self.gates} * hidden"
            raise ShapeError(f"{self.name}: weights are ({rows}, features) and ({rows}, hidden), got {w_ih} "
                             f"and {w_hh} for an input of {x[2]} features")
        if any(s != (x[1], w_hh[1]) for s in states) or any(b not in ((), w_hh[:1]) for b in biases):
            raise ShapeError(f"{self.name}: states are {(x[1], w_hh[1])} and biases {w_hh[:1]} for an input "
                             f"{x}, got states {states} and biases {biases}")
        y = (*x[:2], w_hh[1])
        return [y] * self.states + [(self.saved, *y)] * (self.saved > 0)

    def dtype(self, *given: Any, **attrs: Any) -> tuple[Any, Any]:
        found = check_kind(self.name, promote(*given), (BOOL, INTEGER, COMPLEX))
        return (found,) * len(given), (found,) * self.states + (accumulator(found),) * (self.saved > 0)

    def ins(self, *shapes: Shape) -> tuple[str, ...]:
        biases = tuple("." * len(b) for b in shapes[-2:])
        return (".a.", *("a.",) * self.states, "..", "..", *biases)

    def outs(self) -> tuple[str, ...]:
        return (".a.",) * self.states + ("..a.",) * (self.saved > 0)

    def axes(self, *shapes: Shape, **attrs: Any) -> Axes:
        return Axes(self.ins(*shapes), self.outs())

    # The gradient row: cotangents of the outputs (0.0 where there is none), the inputs, the outputs.

    def grad_shape(self, *shapes: Shape, **attrs: Any) -> list[Shape]:
        ins, outs = shapes[self.n_out:-self.n_out], list(shapes[-self.n_out:])
        wanted = self.shape(*ins)
        if outs != wanted or any(c not in ((), s) for c, s in zip(shapes, wanted, strict=False)):
            raise ShapeError(f"{self.name}_grad: outputs and their gradients are {wanted}, got {outs} and "
                             f"{shapes[:self.n_out]}")
        weight = ins[self.states + 2]
        return [*ins[:-2], weight[:1], weight[:1]]

    def grad_dtype(self, *given: Any, **attrs: Any) -> tuple[Any, Any]:
        ins, outs = self.dtype(*given[self.n_out:-self.n_out])
        return (*outs, *ins, *outs), ins

    def grad_axes(self, *shapes: Shape, **attrs: Any) -> Axes:
        ins, outs = self.ins(*shapes[self.n_out:-self.n_out]), self.outs()
        cotangents = tuple(t if s else "" for t, s in zip(outs, shapes, strict=False))
        return Axes((*cotangents, *ins, *outs), (*ins[:-2], ".", "."))

    # --- derivatives --------------------------------------------------------------------------------

    def vjp(self, g: Any, out: Any, *inputs: Any, **attrs: Any) -> Any:
        cotangents, outs = (g, out) if self.n_out > 1 else ((g,), (out,))
        given = (0.0 if c is None else c for c in cotangents)
        return lookup(f"{self.name}_grad")(*given, *inputs, *outs, **attrs)

    def grad_vjp(self, steps: Callable[..., Any]) -> Vjp:
        """The gradient row's vjp: `steps`, the layer in elementary rows, differentiated twice."""
        def vjp(u: Any, out: Any, *inputs: Any, **attrs: Any) -> Any:
            def first(*given: Any) -> list[Any]:
                cotangents = [None if isinstance(c, float) else c for c in given[:self.n_out]]
                return differentiate(partial(steps, **attrs), given[self.n_out:], cotangents)
            return [*differentiate(first, inputs[:-self.n_out], u), *(None,) * self.n_out]
        return vjp

    # --- rows ---------------------------------------------------------------------------------------

    def declare(self, kernel: Callable[..., Any], grad_kernel: Callable[..., Any], steps: Callable[..., Any],
                saved: str, **columns: Any) -> tuple[Op, Op]:
        """The layer's row and its gradient row; `saved` names the grad kernel's parameters that are outputs.
        """
        inputs = "x h0 c0" if self.states > 1 else "x h0"
        inputs += " w_ih w_hh b_ih b_hh"
        outs = "out" if self.n_out == 1 else " ".join(f"out{i}" for i in range(self.n_out))
        cotangents = " ".join(f"g_{s}" for s in saved.split())
        row = register(Op(
            self.name, kernel=kernel, shape=self.shape, dtype=self.dtype, axes=self.axes, n_out=self.n_out,
            vjp=self.vjp, keeps=f"{inputs} {outs}", samples=self.samples(False),
            **columns))
        grad = register(Op(
            f"{self.name}_grad", kernel=grad_kernel, shape=self.grad_shape, dtype=self.grad_dtype,
            axes=self.grad_axes, n_out=self.n_in, linear=(tuple(range(self.n_out)),),
            vjp=self.grad_vjp(steps), keeps=f"{cotangents} {inputs} {saved}", samples=self.samples(True),
            **columns))
        return row, grad

    def samples(self, grad: bool) -> Callable[[], list[Sample]]:
        cases = [(3, 4, 2, 3, True), (2, 1, 3, 2, True), (1, 5, 1, 1, False), (2, 0, 2, 2, True),
                 (4, 3, 2, 2, False)]

        def make() -> list[Sample]:
            found = []
            for t, b, i, h, biased in cases:
                rows = self.gates * h
                bias: Any = (rows,) if biased else 0.0
                inputs = ((t, b, i), *((b, h),) * self.states, (rows, i), (rows, h), bias, bias)
                outs = ((t, b, h),) * self.states + ((self.saved, t, b, h),) * (self.saved > 0)
                # y and what was saved are functions of the inputs: moving those alone is no derivative.
                given = (*outs, *inputs, *outs) if grad else inputs
                found.append(Sample(given, low=-1, high=1, diff=not grad))
            return found
        return make


# --- pieces of kernels ------------------------------------------------------------------------------

def stacked(xp: Any, w: Any, order: Sequence[int], halved: int = 0) -> Any:
    """(G*H, K) as contiguous (G, K, H), gates in `order`; the first `halved` of them times 1/2.

    sigmoid(a) = (1 + tanh(a / 2)) / 2, and tanh is the faster function.
    """
    gates = max(order) + 1
    blocks = w.reshape(gates, w.shape[0] // gates, w.shape[1])
    found = xp.ascontiguousarray(blocks[list(order)].swapaxes(1, 2))
    found[:halved] *= 0.5
    return found


def projected(xp: Any, x: Any, w: Any, bias: Any, order: Sequence[int], halved: int, out: Any) -> Any:
    """x @ w.T + bias of all steps, written to `out` (G, T, B, H); the bias is one more column."""
    rows = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
    if getattr(bias, "ndim", 0):
        rows = xp.concatenate([rows, xp.ones((len(rows), 1), x.dtype)], axis=1)
        w = xp.concatenate([w, bias[:, None]], axis=1)
    xp.matmul(rows, stacked(xp, w, order, halved), out=out.reshape(len(order), len(rows), out.shape[-1]))
    return out


def step_runs(xp: Any, shape: Shape) -> Iterator[slice]:
    """Runs of steps of an array (T, B, H), the last first, that the cache holds with what belongs to them."""
    steps, batch, width = shape
    size = max(1, CACHED // max(1, batch * width)) if xp is np else steps
    return (slice(max(0, stop - size), stop) for stop in range(steps, 0, -size))


def halve_and_shift(s: Any) -> None:
    """tanh(a / 2) to sigmoid(a), in place."""
    s *= 0.5
    s += 0.5


def wide(x: Any) -> Any:
    """widen, for what may be a Python scalar."""
    return widen(x) if hasattr(x, "dtype") else x


def weight_grads(xp: Any, d: Any, x: Any, h0: Any, y: Any, w_ih: Any, d_hidden: Any = None) -> list[Any]:
    """dx, dw_ih, dw_hh, db_ih, db_hh from the pre-activations' gradients, (T, B, G*H).

    `d_hidden` are those of the part that comes from the hidden state, where they differ.
    """
    d_hidden = d if d_hidden is None else d_hidden
    flat, hidden = (a.reshape(a.shape[0] * a.shape[1], a.shape[2]) for a in (d, d_hidden))
    batch, ones = len(h0), xp.ones(len(flat), d.dtype)
    dx = xp.matmul(flat, w_ih).reshape(x.shape)
    dw_ih = xp.matmul(flat.T, x.reshape(len(flat), x.shape[2]))
    dw_hh = xp.matmul(hidden[batch:].T, y.reshape(len(flat), y.shape[2])[:len(flat) - batch])
    dw_hh += xp.matmul(hidden[:batch].T, h0)
    db = ones @ flat
    return [dx, dw_ih, dw_hh, db, db.copy() if d_hidden is d else ones @ hidden]


# --- plain RNN --------------------------------------------------------------------------------------

def _rnn(xp: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, nonlinearity: str) -> Any:
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu of that."""
    dtype = x.dtype
    x, h, w_ih, w_hh, b_ih, b_hh = map(wide, (x, h0, w_ih, w_hh, b_ih, b_hh))
    y = projected(xp, x, w_ih, b_ih + b_hh, (0,), 0, xp.empty((1, *x.shape[:2], w_hh.shape[1]), x.dtype))[0]
    weight, held = stacked(xp, w_hh, (0,))[0], xp.empty(h.shape, h.dtype)
    for step in y:
        step += xp.matmul(h, weight, out=held)
        h = xp.tanh(step, out=step) if nonlinearity == "tanh" else xp.maximum(step, 0, out=step)
    return y.astype(dtype, copy=False)


def _rnn_grad(xp: Any, g_y: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, y: Any,
              nonlinearity: str) -> Any:
    dtype = x.dtype
    g_y, x, h0, w_ih, w_hh, y = map(wide, (g_y, x, h0, w_ih, w_hh, y))
    d, dh = xp.empty(y.shape, y.dtype), xp.zeros(h0.shape, h0.dtype)
    for t in reversed(range(len(y))):
        dh += g_y[t] if hasattr(g_y, "dtype") else g_y
        if nonlinearity == "tanh":
            slope = xp.multiply(y[t], y[t], out=d[t])
            xp.subtract(1, slope, out=slope)
            slope *= dh
        else:
            xp.multiply(dh, y[t] > 0, out=d[t])
        xp.matmul(d[t], w_hh, out=dh)
    dx, *rest = weight_grads(xp, d, x, h0, y, w_ih)
    return tuple(a.astype(dtype, copy=False) for a in (dx, dh, *rest))


def _rnn_steps(x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, nonlinearity: str) -> Any:
    inputs = add(add(matmul(x, w_ih, transpose_y=True), b_ih), b_hh)
    h, ys = h0, []
    for t in range(x.shape[0]):
        a = add(inputs[t], matmul(h, w_hh, transpose_y=True))
        h = tanh(a) if nonlinearity == "tanh" else relu(a)
        ys.append(h)
    return (lookup("stack")(*ys, axis=0),)


rnn, rnn_grad = Layer("rnn", gates=1, states=1, saved=0).declare(
    _rnn, _rnn_grad, _rnn_steps, "y", attrs=NONLINEARITY)
