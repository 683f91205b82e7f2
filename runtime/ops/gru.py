"""Gated recurrent unit over a whole sequence (Cho et al. 2014, arXiv:1406.1078; in the form of cuDNN and
torch).

    r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)[r, z],   m = W_hn h_{t-1} + b_hn
    n = tanh(W_in x_t + b_in + r * m),   h_t = n + z * (h_{t-1} - n)

Weights have torch's order of gates, r, z, n.
"""

from __future__ import annotations

from typing import Any

from meshtape.runtime.cuda.kernels import recurrent as device_kernels
from meshtape.runtime.op import lookup
from meshtape.runtime.ops.activation import sigmoid
from meshtape.runtime.ops.contraction import matmul
from meshtape.runtime.ops.pointwise import add, mul, sub, tanh
from meshtape.runtime.ops.recurrent import Layer
from meshtape.runtime.ops.recurrent_steps import Sweep, halve_and_shift, joint_input, joint_weights, wide
from meshtape.runtime.panels import Panels

ORDER = (0, 1, 2)


def _gru(xp: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    dtype, (batch, width) = x.dtype, h0.shape
    x, h, w_ih, w_hh, b_ih, b_hh = map(wide, (x, h0, w_ih, w_hh, b_ih, b_hh))
    y, saved = xp.empty((len(x), batch, width), x.dtype), xp.empty((len(x), 4, batch, width), x.dtype)
    joint = joint_input(xp, x, h)
    of_both, of_hidden, of_input = _weights(xp, w_ih, w_hh, b_ih, b_hh, batch)
    a, u = xp.empty((3, batch, width), x.dtype), xp.empty((batch, width), x.dtype)
    multiply = of_both.into(joint, a[:2])
    multiply_hidden = of_hidden.into(joint[:-1, :, :width + 1], saved[:, 3:])
    multiply_input = of_input.into(joint[:, :, width:], a[2:])
    gates, n_sum = a[:2], a[2]
    for t in range(len(x)):
        s, n, m = saved[t, :2], saved[t, 2], saved[t, 3]
        multiply(t)
        multiply_hidden(t)
        multiply_input(t)
        xp.tanh(gates, out=s)
        halve_and_shift(s)
        n_sum += xp.multiply(s[0], m, out=u)
        xp.tanh(n_sum, out=n)
        xp.subtract(h, n, out=u)
        u *= s[1]
        h = xp.add(n, u, out=y[t])
        joint[t + 1, :, :width] = h
    return y.astype(dtype, copy=False), saved


def _weights(xp: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, batch: int) -> list[Panels]:
    """For r and z from (h, 1, x), for m from (h, 1), and for the input's part of n from (1, x)."""
    width = w_hh.shape[1]
    both = joint_weights(xp, w_ih, w_hh, b_ih + b_hh, (0, 1), 2)
    new_hidden, new_input = (joint_weights(xp, w_ih, w_hh, b, (2,), 0) for b in (b_hh, b_ih))
    return [Panels(xp, w, batch) for w in (both, new_hidden[:, :width + 1], new_input[:, width:])]


def _gru_grad(xp: Any, g_y: Any, g_saved: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any,
              y: Any, saved: Any, input_grad: bool) -> Any:
    """Gradients of the pre-activations lie as m, r, z, n: the first three are the hidden part's, the last
    three the input's."""
    dtype = x.dtype
    g_y, x, h0, w_ih, w_hh, y = map(wide, (g_y, x, h0, w_ih, w_hh, y))
    dh, back, u = (xp.zeros(h0.shape, h0.dtype) for _ in range(3))
    sweep = Sweep(xp, x, h0, y, w_ih, w_hh, (2, 0, 1), ORDER, 4, back, input_grad)
    for run in sweep.runs():
        for steps in sweep.parts(run):
            factors = _factors(xp, saved[steps], y[steps])
            direct = _direct(xp, g_saved[steps], saved[steps]) if hasattr(g_saved, "dtype") else None
            for k in reversed(range(len(factors))):
                t = steps.start + k
                if hasattr(g_y, "dtype"):
                    dh += g_y[t]
                d = sweep.by_block[t - run.start]
                xp.multiply(factors[k], dh, out=d)
                if direct is not None:
                    d += direct[k]
                sweep.back(t - run.start)
                xp.multiply(dh, saved[t, 1], out=u)
                xp.add(back, u, out=dh)
    dx, *rest = sweep.results()
    return tuple(a.astype(dtype, copy=False) for a in (dx, dh, *rest))


def _factors(xp: Any, saved: Any, y: Any) -> Any:
    """Factors (steps, 4, B, H) from dh to the gradients of m, r, z and n, before weight_hh is gone back
    through.
    """
    r, z, n, m = saved.swapaxes(0, 1)
    found, u = xp.empty(saved.shape, saved.dtype), xp.subtract(1, z)
    by_m, by_r, by_z, by_n = found.swapaxes(0, 1)
    xp.subtract(y, n, out=by_z)
    by_z *= u                                   # z * (1 - z) * (h_{t-1} - n)
    xp.multiply(u, n, out=by_n)
    by_n *= n
    xp.subtract(u, by_n, out=by_n)              # (1 - z) * (1 - n^2)
    xp.multiply(by_n, r, out=by_m)
    xp.multiply(by_m, m, out=u)
    xp.multiply(u, r, out=by_r)
    xp.subtract(u, by_r, out=by_r)              # (1 - z) * (1 - n^2) * m * r * (1 - r)
    return found


def _direct(xp: Any, g: Any, saved: Any) -> Any:
    """What gradients of r, z, n, m themselves add to those of m and the pre-activations of r, z, n."""
    (g_r, g_z, g_n, g_m), (r, z, n, m) = g.swapaxes(0, 1), saved.swapaxes(0, 1)
    by_n = g_n * (1 - n * n)
    return xp.stack([by_n * r + g_m, (by_n * m + g_r) * (r - r * r), g_z * (z - z * z), by_n], axis=1)


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
    return stack(*hs, axis=0), stack(*saved, axis=0)


# Outputs: all hidden states, and r, z, n, m (T, 4, B, H) for backward.
gru, gru_grad = Layer("gru", gates=3, states=1, saved=4).declare(
    _gru, _gru_grad, _gru_steps, "y saved", (device_kernels.GRU, device_kernels.GRU_GRAD))
