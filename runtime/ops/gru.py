"""Gated recurrent unit over a whole sequence (Cho et al. 2014, arXiv:1406.1078; in the form of cuDNN and
torch).

    r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)[r, z],   m = W_hn h_{t-1} + b_hn
    n = tanh(W_in x_t + b_in + r * m),   h_t = n + z * (h_{t-1} - n)

Weights have torch's order of gates, r, z, n.
"""

from __future__ import annotations

from typing import Any

from meshtape.runtime.op import lookup
from meshtape.runtime.ops.activation import sigmoid
from meshtape.runtime.ops.contraction import matmul
from meshtape.runtime.ops.pointwise import add, mul, sub, tanh
from meshtape.runtime.ops.recurrent import Layer, halve_and_shift, projected, stacked, weight_grads, wide

ORDER = (0, 1, 2)


def _gru(xp: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    dtype, width = x.dtype, w_hh.shape[1]
    x, h, w_ih, w_hh, b_ih, b_hh = map(wide, (x, h0, w_ih, w_hh, b_ih, b_hh))
    y = xp.empty((*x.shape[:2], width), x.dtype)
    saved = xp.empty((4, *y.shape), x.dtype)
    bias, bias_m = b_ih, b_hh
    if hasattr(b_hh, "dtype"):
        bias_m = b_hh[2 * width:]
        bias = xp.concatenate([b_hh[:2 * width], xp.zeros(width, b_hh.dtype)]) + b_ih
    projected(xp, x, w_ih, bias, ORDER, 2, saved[:3])
    weight, held = stacked(xp, w_hh, ORDER, 2), xp.empty((3, *h.shape), h.dtype)
    u = xp.empty(h.shape, h.dtype)
    for t in range(len(x)):
        xp.matmul(h, weight, out=held)
        a = saved[:2, t]
        a += held[:2]
        xp.tanh(a, out=a)
        halve_and_shift(a)
        r, z = a
        m = xp.add(held[2], bias_m, out=saved[3, t])
        n = saved[2, t]
        n += xp.multiply(r, m, out=u)
        xp.tanh(n, out=n)
        xp.subtract(h, n, out=u)
        u *= z
        h = xp.add(n, u, out=y[t])
    return y.astype(dtype, copy=False), saved


def _gru_grad(xp: Any, g_y: Any, g_saved: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any,
              y: Any, saved: Any) -> Any:
    """Gradients of the pre-activations lie as m, r, z, n: the first three are the hidden part's, the last
    three the input's."""
    dtype, width = x.dtype, w_hh.shape[1]
    g_y, x, h0, w_ih, w_hh, y = map(wide, (g_y, x, h0, w_ih, w_hh, y))
    d = xp.empty((*y.shape[:2], 4 * width), y.dtype)
    dh, room = xp.zeros(h0.shape, h0.dtype), xp.empty((4, *h0.shape), h0.dtype)
    turned = xp.concatenate([w_hh[2 * width:], w_hh[:2 * width]])
    for t in reversed(range(len(y))):
        if hasattr(g_y, "dtype"):
            dh += g_y[t]
        through = g_saved[:, t] if hasattr(g_saved, "dtype") else None
        _step_grad(xp, d[t], dh, saved[:, t], y[t - 1] if t else h0, through, room)
        dh *= saved[1, t]
        dh += xp.matmul(d[t, :, :3 * width], turned, out=room[0])
    hidden, inputs = d[:, :, :3 * width], d[:, :, width:]
    dx, dw_ih, dw_hh, db_ih, db_hh = weight_grads(xp, inputs, x, h0, y, w_ih, hidden)
    dw_hh, db_hh = (xp.concatenate([a[width:], a[:width]]) for a in (dw_hh, db_hh))
    return tuple(a.astype(dtype, copy=False) for a in (dx, dh, dw_ih, dw_hh, db_ih, db_hh))


def _step_grad(xp: Any, d: Any, dh: Any, saved: Any, before: Any, through: Any, room: Any) -> None:
    """Fills `d` (B, 4H) with the gradients of one step's pre-activations; `room` is overwritten.

    `through` are gradients that reach what was saved (4, B, H) itself.
    """
    width = dh.shape[1]
    d_m, d_r, d_z, d_n = (d[:, k * width:(k + 1) * width] for k in range(4))
    (r, z, n, m), s, slopes, u, v = saved, saved[:2], room[:2], room[2], room[3]
    xp.multiply(s, s, out=slopes)
    xp.subtract(s, slopes, out=slopes)
    xp.subtract(before, n, out=u)
    u *= dh
    if through is not None:
        u += through[1]
    xp.multiply(u, slopes[1], out=d_z)
    xp.subtract(1, z, out=u)
    u *= dh
    if through is not None:
        u += through[2]
    xp.multiply(n, n, out=v)
    xp.subtract(1, v, out=v)
    u *= v
    d_n[...] = u
    xp.multiply(u, r, out=d_m)
    u *= m
    if through is not None:
        d_m += through[3]
        u += through[0]
    xp.multiply(u, slopes[0], out=d_r)


def _gru_steps(x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    stack, width = lookup("stack"), w_hh.shape[1]
    inputs = add(matmul(x, w_ih, transpose_y=True), b_ih)
    h, hs, saved = h0, [], []
    for t in range(x.shape[0]):
        a, b = inputs[t], add(matmul(h, w_hh, transpose_y=True), b_hh)
        r, z = (sigmoid(add(a[:, k:k + width], b[:, k:k + width])) for k in (0, width))
        m = b[:, 2 * width:]
        n = tanh(add(a[:, 2 * width:], mul(r, m)))
        h = add(n, mul(z, sub(h, n)))
        hs.append(h)
        saved.append(stack(r, z, n, m, axis=0))
    return stack(*hs, axis=0), stack(*saved, axis=1)


# Outputs: all hidden states, and r, z, n, m (4, T, B, H) for backward.
gru, gru_grad = Layer("gru", gates=3, states=1, saved=4).declare(_gru, _gru_grad, _gru_steps, "y saved")
