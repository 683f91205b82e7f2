"""Long short-term memory over a whole sequence (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

    a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o),   g = tanh(a_g)
    c_t = f * c_{t-1} + i * g,   h_t = o * tanh(c_t)

Weights have torch's order of gates, i, f, g, o; kernels work in the order o, i, f, g, which has sigmoids
together, and the gates that are reached through the cell.
"""

from __future__ import annotations

from typing import Any

from meshtape.runtime.cuda.kernels import recurrent as device_kernels
from meshtape.runtime.op import lookup
from meshtape.runtime.ops.activation import sigmoid
from meshtape.runtime.ops.contraction import matmul
from meshtape.runtime.ops.pointwise import add, mul, tanh
from meshtape.runtime.ops.recurrent import Layer
from meshtape.runtime.ops.recurrent_steps import Sweep, halve_and_shift, joint_input, joint_weights, wide
from meshtape.runtime.panels import Panels

ORDER = (3, 0, 1, 2)


def _lstm(xp: Any, x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    dtype = x.dtype
    x, h0, c, w_ih, w_hh, b_ih, b_hh = map(wide, (x, h0, c0, w_ih, w_hh, b_ih, b_hh))
    y, cells = (xp.empty((len(x), *h0.shape), x.dtype) for _ in range(2))
    gates = xp.empty((len(x), 4, *h0.shape), x.dtype)
    joint = joint_input(xp, x, h0)
    a, u = xp.empty((4, *h0.shape), x.dtype), xp.empty(h0.shape, x.dtype)
    weights = joint_weights(xp, w_ih, w_hh, b_ih + b_hh, ORDER, 3)
    multiply = Panels(xp, weights, len(h0)).into(joint, a)
    following = joint[1:, :, :h0.shape[1]]
    for t, (kept, cell, h, later) in enumerate(zip(gates, cells, y, following, strict=True)):
        multiply(t)
        xp.tanh(a, out=kept)
        halve_and_shift(kept[:3])
        o, i, f, g = kept
        c = xp.multiply(f, c, out=cell)
        c += xp.multiply(i, g, out=u)
        xp.multiply(o, xp.tanh(c, out=u), out=h)
        later[...] = h
    return y.astype(dtype, copy=False), cells.astype(dtype, copy=False), gates


def _lstm_grad(xp: Any, g_y: Any, g_c: Any, g_gates: Any, x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any,
               b_ih: Any, b_hh: Any, y: Any, c: Any, gates: Any, input_grad: bool) -> Any:
    dtype = x.dtype
    g_y, g_c, x, h0, c0, w_ih, w_hh, y, c = map(wide, (g_y, g_c, x, h0, c0, w_ih, w_hh, y, c))
    dh, dc, u = (xp.zeros(h0.shape, h0.dtype) for _ in range(3))
    sweep = Sweep(xp, x, h0, y, w_ih, w_hh, ORDER, ORDER, 4, dh, input_grad)
    for run in sweep.runs():
        for steps in sweep.parts(run):
            factors, by_cell, direct = _factors(xp, steps, gates, y, c, c0, g_gates)
            for k in reversed(range(len(by_cell))):
                t = steps.start + k
                if hasattr(g_y, "dtype"):
                    dh += g_y[t]
                if hasattr(g_c, "dtype"):
                    dc += g_c[t]
                dc += xp.multiply(dh, by_cell[k], out=u)
                d = sweep.by_block[t - run.start]
                xp.multiply(factors[k, 0], dh, out=d[0])
                xp.multiply(factors[k, 1:], dc, out=d[1:])
                if direct is not None:
                    d += direct[k]
                dc *= gates[t, 2]
                sweep.back(t - run.start)
    dx, *rest = sweep.results()
    return tuple(a.astype(dtype, copy=False) for a in (dx, dh, dc, *rest))


def _factors(xp: Any, steps: slice, gates: Any, y: Any, c: Any, c0: Any,
             g_gates: Any) -> tuple[Any, Any, Any]:
    """What does not depend on dh and dc, for a few steps.

    The factors (steps, 4, B, H) from dc (of o: from dh) to the pre-activations; the factor from dh to dc; and
    what reaches the pre-activations from gradients of the gates themselves, if any. A sigmoid s has the slope
    s * (1 - s), so a product s * v has the derivative s * v - s * (s * v) by its pre-activation.
    """
    s = gates[steps]
    o, i, f, g = s.swapaxes(0, 1)
    products, found = xp.empty((len(s), 3, *c0.shape), s.dtype), xp.empty(s.shape, s.dtype)
    hidden, fed, cell = products.swapaxes(0, 1)
    hidden[...] = y[steps]
    xp.multiply(i, g, out=fed)
    xp.multiply(f[0], c[steps.start - 1] if steps.start else c0, out=cell[0])
    xp.multiply(f[1:], c[steps.start:steps.stop - 1], out=cell[1:])
    xp.multiply(s[:, :3], products, out=found[:, :3])
    xp.subtract(products, found[:, :3], out=found[:, :3])
    by_g = xp.multiply(g, fed, out=found[:, 3])
    xp.subtract(i, by_g, out=by_g)                      # i * (1 - g^2)
    by_cell = xp.tanh(c[steps])
    by_cell *= hidden
    xp.subtract(o, by_cell, out=by_cell)                # o * (1 - tanh(c)^2) = o - tanh(c) * y
    direct = None
    if hasattr(g_gates, "dtype"):
        slopes = xp.concatenate([s[:, :3] * (1 - s[:, :3]), 1 - s[:, 3:] * s[:, 3:]], axis=1)
        direct = g_gates[steps] * slopes
    return found, by_cell, direct


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
        gates.append(stack(o, i, f, g, axis=0))
    return stack(*hs, axis=0), stack(*cs, axis=0), stack(*gates, axis=0)


# Outputs: all hidden states, all cells, and the gates (T, 4, B, H), o, i, f, g, for backward.
lstm, lstm_grad = Layer("lstm", gates=4, states=2, saved=4).declare(
    _lstm, _lstm_grad, _lstm_steps, "y c gates", (device_kernels.LSTM, device_kernels.LSTM_GRAD))
