"""Long short-term memory over a whole sequence (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o),   g = tanh(a_g)
    c_t = f * c_{t-1} + i * g,   h_t = o * tanh(c_t)

Weights have torch's order of gates, i, f, g, o; kernels work in the order i, f, o, g, sigmoids together.
"""

from __future__ import annotations

from typing import Any

from meshtape.runtime.op import lookup
from meshtape.runtime.ops.activation import sigmoid
from meshtape.runtime.ops.contraction import matmul
from meshtape.runtime.ops.pointwise import add, mul, tanh
from meshtape.runtime.ops.recurrent import (
    Layer,
    halve_and_shift,
    projected,
    stacked,
    step_runs,
    weight_grads,
    wide,
)

ORDER = (0, 1, 3, 2)


def _lstm(xp: Any, x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    dtype = x.dtype
    x, h, c, w_ih, w_hh, b_ih, b_hh = map(wide, (x, h0, c0, w_ih, w_hh, b_ih, b_hh))
    y_shape = (*x.shape[:2], w_hh.shape[1])
    gates = projected(xp, x, w_ih, b_ih + b_hh, ORDER, 3, xp.empty((4, *y_shape), x.dtype))
    y, cells = xp.empty(y_shape, x.dtype), xp.empty(y_shape, x.dtype)
    weight, held = stacked(xp, w_hh, ORDER, 3), xp.empty((4, *h.shape), h.dtype)
    u = xp.empty(h.shape, h.dtype)
    for t in range(len(x)):
        a = gates[:, t]
        a += xp.matmul(h, weight, out=held)
        xp.tanh(a, out=a)
        halve_and_shift(a[:3])
        i, f, o, g = a
        c = xp.multiply(f, c, out=cells[t])
        c += xp.multiply(i, g, out=u)
        h = xp.multiply(o, xp.tanh(c, out=u), out=y[t])
    return y.astype(dtype, copy=False), cells.astype(dtype, copy=False), gates


def _lstm_grad(xp: Any, g_y: Any, g_c: Any, g_gates: Any, x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any,
               b_ih: Any, b_hh: Any, y: Any, c: Any, gates: Any) -> Any:
    dtype, width = x.dtype, w_hh.shape[1]
    g_y, g_c, x, h0, c0, w_ih, w_hh, y, c = map(wide, (g_y, g_c, x, h0, c0, w_ih, w_hh, y, c))
    d = xp.empty((*y.shape[:2], 4 * width), y.dtype)
    dh, dc, u = (xp.zeros(h0.shape, h0.dtype) for _ in range(3))
    for steps in step_runs(xp, y.shape):
        factors, by_cell, direct = _factors(xp, steps, gates, y, c, c0, g_gates)
        for k in reversed(range(len(by_cell))):
            t = steps.start + k
            by_gate = d[t].reshape(-1, 4, width).swapaxes(0, 1)
            if hasattr(g_y, "dtype"):
                dh += g_y[t]
            if hasattr(g_c, "dtype"):
                dc += g_c[t]
            dc += xp.multiply(dh, by_cell[k], out=u)
            xp.multiply(factors[:3, k], dc, out=by_gate[:3])
            xp.multiply(factors[3, k], dh, out=by_gate[3])
            if direct is not None:
                by_gate += direct[:, k]
            dc *= gates[1, t]
            xp.matmul(d[t], w_hh, out=dh)
    dx, *rest = weight_grads(xp, d, x, h0, y, w_ih)
    return tuple(a.astype(dtype, copy=False) for a in (dx, dh, dc, *rest))


def _factors(xp: Any, steps: slice, gates: Any, y: Any, c: Any, c0: Any,
             g_gates: Any) -> tuple[Any, Any, Any]:
    """What does not depend on dh and dc, for a run of steps.

    The factors (4, steps, B, H), in torch's order of gates, from dc (of o: from dh) to the pre-activations;
    the factor from dh to dc; and what reaches the pre-activations from gradients of the gates themselves, if
    any.
    """
    i, _, o, g = gates[:, steps]
    found = xp.empty((4, *i.shape), i.dtype)
    by_i, by_f, by_g, by_o = found
    xp.multiply(gates[:2, steps], gates[:2, steps], out=found[:2])
    xp.subtract(gates[:2, steps], found[:2], out=found[:2])
    xp.multiply(o, o, out=by_o)
    xp.subtract(o, by_o, out=by_o)
    xp.multiply(g, g, out=by_g)
    xp.subtract(1, by_g, out=by_g)
    direct = found * g_gates[list(ORDER), steps] if hasattr(g_gates, "dtype") else None
    cell = xp.tanh(c[steps])
    by_i *= g
    by_f[0] *= c[steps.start - 1] if steps.start else c0
    by_f[1:] *= c[steps.start:steps.stop - 1]
    by_g *= i
    by_o *= cell
    cell *= y[steps]                        # dh/dc = o * (1 - tanh(c)^2) = o - tanh(c) * y
    return found, xp.subtract(o, cell, out=cell), direct


def _lstm_steps(x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    stack, width = lookup("stack"), w_hh.shape[1]
    inputs = add(add(matmul(x, w_ih, transpose_y=True), b_ih), b_hh)
    h, c, hs, cs, gates = h0, c0, [], [], []
    for t in range(x.shape[0]):
        a = add(inputs[t], matmul(h, w_hh, transpose_y=True))
        i, f, g, o = (a[:, k * width:(k + 1) * width] for k in range(4))
        i, f, o, g = sigmoid(i), sigmoid(f), sigmoid(o), tanh(g)
        c = add(mul(f, c), mul(i, g))
        h = mul(o, tanh(c))
        hs.append(h)
        cs.append(c)
        gates.append(stack(i, f, o, g, axis=0))
    return stack(*hs, axis=0), stack(*cs, axis=0), stack(*gates, axis=1)


# Outputs: all hidden states, all cells, and the gates (4, T, B, H), i, f, o, g, for backward.
lstm, lstm_grad = Layer("lstm", gates=4, states=2, saved=4).declare(
    _lstm, _lstm_grad, _lstm_steps, "y c gates")
