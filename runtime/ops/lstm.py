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
from meshtape.runtime.ops.recurrent import Layer, halve_and_shift, projected, stacked, weight_grads, wide

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
    dh, dc = xp.zeros(h0.shape, h0.dtype), xp.zeros(h0.shape, h0.dtype)
    slopes, u = xp.empty((3, *h0.shape), h0.dtype), xp.empty(h0.shape, h0.dtype)
    for t in reversed(range(len(y))):
        if hasattr(g_y, "dtype"):
            dh += g_y[t]
        if hasattr(g_c, "dtype"):
            dc += g_c[t]
        through = g_gates[:, t] if hasattr(g_gates, "dtype") else None
        _step_grad(xp, d[t], dh, dc, gates[:, t], y[t], c[t], c[t - 1] if t else c0, through, slopes, u)
        dc *= gates[1, t]
        xp.matmul(d[t], w_hh, out=dh)
    dx, *rest = weight_grads(xp, d, x, h0, y, w_ih)
    return tuple(a.astype(dtype, copy=False) for a in (dx, dh, dc, *rest))


def _step_grad(xp: Any, d: Any, dh: Any, dc: Any, gates: Any, y: Any, c: Any, before: Any, through: Any,
               slopes: Any, u: Any) -> None:
    """Fills `d` (B, 4H) with the gradients of one step's pre-activations, and adds to dc what comes through
    h.

    `through` are gradients that reach the gates (4, B, H) themselves; `slopes` and `u` are room to work in.
    """
    width = dh.shape[1]
    d_i, d_f, d_g, d_o = (d[:, k * width:(k + 1) * width] for k in range(4))
    i, _, o, g = gates
    s = gates[:3]
    xp.multiply(s, s, out=slopes)
    xp.subtract(s, slopes, out=slopes)
    xp.tanh(c, out=u)
    by_o = xp.multiply(dh, u, out=d_o)
    u *= y                                  # dh/dc = o * (1 - tanh(c)^2) = o - tanh(c) * y
    xp.subtract(o, u, out=u)
    u *= dh
    dc += u
    for k, (out, factor) in enumerate(((d_i, g), (d_f, before))):
        xp.multiply(dc, factor, out=u)
        if through is not None:
            u += through[k]
        xp.multiply(u, slopes[k], out=out)
    if through is not None:
        by_o += through[2]
    by_o *= slopes[2]
    xp.multiply(g, g, out=slopes[0])
    xp.subtract(1, slopes[0], out=slopes[0])
    xp.multiply(dc, i, out=u)
    if through is not None:
        u += through[3]
    xp.multiply(u, slopes[0], out=d_g)


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
