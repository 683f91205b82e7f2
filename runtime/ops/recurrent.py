"""Recurrent layers over a whole sequence: what their rows share, and the plain RNN.

One row runs all T steps. Inputs are x (T, B, I), the first state h0 (B, H) (and c0), weight_ih (G*H, I),
weight_hh (G*H, H) and two biases, (G*H,) or 0.0 for none, with torch's order of the G gates. How kernels go
about it is told in meshtape.runtime.ops.recurrent_steps.

The batch may be split (then the weights' gradients are Partial), nothing else. Derivatives of the gradient
rows come from differentiating the layer written step by step in elementary rows: correct, and slow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from meshtape.runtime.cuda.kernels import recurrent as device_kernels
from meshtape.runtime.dtypes import promote
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import Axes, DeviceKernel, Op, Sample, lookup, register
from meshtape.runtime.ops.activation import relu
from meshtape.runtime.ops.contraction import matmul
from meshtape.runtime.ops.nested import differentiate
from meshtape.runtime.ops.pointwise import add, tanh
from meshtape.runtime.ops.recurrent_steps import Sweep, joint_input, joint_weights, wide
from meshtape.runtime.ops.reduce import accumulator
from meshtape.runtime.ops.rules import BOOL, COMPLEX, INTEGER, check_kind
from meshtape.runtime.panels import Panels
from meshtape.runtime.shards import Shape

Vjp = Callable[..., Any]


# --- rules ------------------------------------------------------------------------------------------

class Layer:
    """The rules of a recurrent layer's two rows.

    `gates` matrices are stacked in a weight; `states` is how many states go from step to step (y is the
    first); `saved` how many arrays (B, H) each step leaves for backward besides them. Without
    `input_grad` the gradient row computes none for x: that output has no steps.
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
        return [y] * self.states + [(x[0], self.saved, *y[1:])] * (self.saved > 0)

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

    def grad_shape(self, *shapes: Shape, input_grad: bool, **attrs: Any) -> list[Shape]:
        ins, outs = shapes[self.n_out:-self.n_out], list(shapes[-self.n_out:])
        wanted = self.shape(*ins)
        if outs != wanted or any(c not in ((), s) for c, s in zip(shapes, wanted, strict=False)):
            raise ShapeError(f"{self.name}_grad: outputs and their gradients are {wanted}, got {outs} and "
                             f"{shapes[:self.n_out]}")
        weight = ins[self.states + 2]
        x = ins[0] if input_grad else (0, *ins[0][1:])
        return [x, *ins[1:-2], weight[:1], weight[:1]]

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
        wanted = inputs[0].requires_grad
        dx, *rest = lookup(f"{self.name}_grad")(*given, *inputs, *outs, input_grad=wanted, **attrs)
        return [dx if wanted else None, *rest]

    def grad_vjp(self, steps: Callable[..., Any]) -> Vjp:
        """The gradient row's vjp: `steps`, the layer in elementary rows, differentiated twice."""
        def vjp(u: Any, out: Any, *inputs: Any, input_grad: bool, **attrs: Any) -> Any:
            def first(*given: Any) -> list[Any]:
                cotangents = [None if isinstance(c, float) else c for c in given[:self.n_out]]
                return differentiate(partial(steps, **attrs), given[self.n_out:], cotangents)
            return [*differentiate(first, inputs[:-self.n_out], u), *(None,) * self.n_out]
        return vjp

    # --- rows ---------------------------------------------------------------------------------------

    def declare(self, kernel: Callable[..., Any], grad_kernel: Callable[..., Any], steps: Callable[..., Any],
                saved: str, device: tuple[DeviceKernel, DeviceKernel], **attrs: Any) -> tuple[Op, Op]:
        """The layer's row and its gradient row. `saved` names the grad kernel's parameters that are outputs;
        `device` are both rows' kernels for CUDA, `attrs` attributes with their defaults.
        """
        inputs = "x h0 c0" if self.states > 1 else "x h0"
        inputs += " w_ih w_hh b_ih b_hh"
        outs = "out" if self.n_out == 1 else " ".join(f"out{i}" for i in range(self.n_out))
        cotangents = " ".join(f"g_{s}" for s in saved.split())
        row = register(Op(
            self.name, kernel=kernel, shape=self.shape, dtype=self.dtype, axes=self.axes, n_out=self.n_out,
            vjp=self.vjp, keeps=f"{inputs} {outs}", samples=self.samples(False),
            attrs=attrs, autocast="low", device=device[0]))
        grad = register(Op(
            f"{self.name}_grad", kernel=grad_kernel, shape=self.grad_shape, dtype=self.grad_dtype,
            axes=self.grad_axes, n_out=self.n_in, linear=(tuple(range(self.n_out)),),
            vjp=self.grad_vjp(steps), keeps=f"{cotangents} {inputs} {saved}", samples=self.samples(True),
            attrs={**attrs, "input_grad": True}, device=device[1]))
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
                outs = ((t, b, h),) * self.states + ((t, self.saved, b, h),) * (self.saved > 0)
                # y and what was saved are functions of the inputs: moving those alone is no derivative.
                given = (*outs, *inputs, *outs) if grad else inputs
                attrs = {"input_grad": i != h} if grad else {}
                found.append(Sample(given, attrs, low=-1, high=1, diff=not grad))
            return found
        return make


# --- plain RNN --------------------------------------------------------------------------------------

def _rnn(xp: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, nonlinearity: str) -> Any:
    """h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), or relu of that."""
    dtype = x.dtype
    x, h0, w_ih, w_hh, b_ih, b_hh = map(wide, (x, h0, w_ih, w_hh, b_ih, b_hh))
    joint, y = joint_input(xp, x, h0), xp.empty((len(x), *h0.shape), x.dtype)
    a, zero = xp.empty(h0.shape, x.dtype), xp.zeros(h0.shape, x.dtype)
    weights = joint_weights(xp, w_ih, w_hh, b_ih + b_hh, (0,), 0)
    multiply = Panels(xp, weights, len(h0)).into(joint, a[None])
    for t, (h, later) in enumerate(zip(y, joint[1:, :, :h0.shape[1]], strict=True)):
        multiply(t)
        if nonlinearity == "tanh":
            xp.tanh(a, out=h)
        else:
            xp.maximum(a, zero, out=h)          # four times as fast in NumPy as with a scalar
        later[...] = h
    return y.astype(dtype, copy=False)


def _rnn_grad(xp: Any, g_y: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, y: Any,
              nonlinearity: str, input_grad: bool) -> Any:
    dtype = x.dtype
    g_y, x, h0, w_ih, w_hh, y = map(wide, (g_y, x, h0, w_ih, w_hh, y))
    dh = xp.zeros(h0.shape, h0.dtype)
    sweep = Sweep(xp, x, h0, y, w_ih, w_hh, (0,), (0,), 1, dh, input_grad)
    for run in sweep.runs():
        for steps in sweep.parts(run):
            if nonlinearity == "tanh":
                slopes = xp.multiply(y[steps], y[steps])
                xp.subtract(1, slopes, out=slopes)
            else:
                slopes = (y[steps] > 0).astype(y.dtype)
            for k in reversed(range(len(slopes))):
                t = steps.start + k
                if hasattr(g_y, "dtype"):
                    dh += g_y[t]
                xp.multiply(slopes[k], dh, out=sweep.d[t - run.start])
                sweep.back(t - run.start)
    dx, *rest = sweep.results()
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
    _rnn, _rnn_grad, _rnn_steps, "y", (device_kernels.RNN, device_kernels.RNN_GRAD), nonlinearity="tanh")
