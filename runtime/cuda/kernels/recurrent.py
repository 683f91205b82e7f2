"""Recurrent layers on CUDA: a product and one pointwise kernel for each step.

Forward, the inputs of all steps are multiplied at once, and a step adds the product of its state. Backward, a
step turns the gradient of its state into those of its pre-activations, (T, B, gates * H), and one product
takes them to the step before; the gradients of weights, biases and inputs are products over all steps at the
end. Of 16-bit floats products read 16 bits, and everything else, what they sum included, is float32.

Nothing here waits for the device, so a layer can be part of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from meshtape.runtime.cuda.kernels.arrays import compact
from meshtape.runtime.cuda.source import ctype, source
from meshtape.runtime.op import DeviceKernel

FLOATS = ("float32", "float64", "float16", "bfloat16")

CODE = r"""
typedef acc_t<T> A;

__device__ inline A sigmoid(A a) { return tanh(a * A(0.5)) * A(0.5) + A(0.5); }
// Element k of an array that may not be there.
template <class X> __device__ inline A given(const X* x, long long k) { return x ? A(x[k]) : A(0); }

// What belongs to element `at` of a state (B, H): a column, and its place in rows of `gates` blocks of H.
struct Place {
  int column;
  long long row;
  __device__ Place(int at, int width, int gates)
      : column(at % width), row((long long)(at / width) * gates * width) {}
  __device__ long long operator()(int gate, int width) const { return row + gate * width + column; }
};
#define EACH_ELEMENT const int at = blockIdx.x * 256 + threadIdx.x; if (at >= n) return
"""

FORWARD = r"""
// pre (B, H) are the products, without biases; relu or tanh of them.
extern "C" __global__ void __launch_bounds__(256) rnn_step(const A* pre, const T* b_ih, const T* b_hh, T* y,
                                                           int n, int width, int relu) {
  EACH_ELEMENT;
  const int k = at % width;
  const A a = pre[at] + given(b_ih, k) + given(b_hh, k);
  y[at] = T(relu ? maximum(a, A(0)) : A(tanh(a)));
}

// pre (B, 4 H): i, f, g, o. `cell` (B, H) becomes the new one; gates (4, B, H) are o, i, f, g.
extern "C" __global__ void __launch_bounds__(256) lstm_step(const A* pre, const T* b_ih, const T* b_hh,
                                                            A* cell, T* y, T* c, A* gates, int n,
                                                            int width) {
  EACH_ELEMENT;
  const Place p(at, width, 4);
  A a[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const long long bias = (long long)k * width + p.column;
    a[k] = pre[p(k, width)] + given(b_ih, bias) + given(b_hh, bias);
  }
  const A i = sigmoid(a[0]), f = sigmoid(a[1]), g = tanh(a[2]), o = sigmoid(a[3]);
  const A next = f * cell[at] + i * g;
  cell[at] = next;
  c[at] = T(next);
  y[at] = T(o * A(tanh(next)));
  gates[at] = o, gates[at + (long long)n] = i, gates[at + 2ll * n] = f, gates[at + 3ll * n] = g;
}

// x_part and h_part (B, 3 H): r, z, n of the input's and the state's products. `state` becomes the new one;
// saved (4, B, H) are r, z, n and the hidden part of n with its bias, m.
extern "C" __global__ void __launch_bounds__(256) gru_step(const A* x_part, const A* h_part, const T* b_ih,
                                                           const T* b_hh, A* state, T* y, A* saved, int n,
                                                           int width) {
  EACH_ELEMENT;
  const Place p(at, width, 3);
  A from_x[3], from_h[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const long long bias = (long long)k * width + p.column;
    from_x[k] = x_part[p(k, width)] + given(b_ih, bias);
    from_h[k] = h_part[p(k, width)] + given(b_hh, bias);
  }
  const A r = sigmoid(from_x[0] + from_h[0]), z = sigmoid(from_x[1] + from_h[1]), m = from_h[2];
  const A fresh = tanh(from_x[2] + r * m);
  const A next = fresh + z * (state[at] - fresh);
  state[at] = next;
  y[at] = T(next);
  saved[at] = r, saved[at + (long long)n] = z, saved[at + 2ll * n] = fresh, saved[at + 3ll * n] = m;
}
"""

BACKWARD = r"""
// dh (B, H) is what later steps say, g_y what this step's output gets (null: nothing); d is the gradient of
// the pre-activations.
extern "C" __global__ void __launch_bounds__(256) rnn_back(const A* dh, const T* g_y, const T* y, T* d, int n,
                                                           int relu) {
  EACH_ELEMENT;
  const A h = A(y[at]), slope = relu ? A(h > A(0)) : 1 - h * h;
  d[at] = T(slope * (dh[at] + given(g_y, at)));
}

// d (B, 4 H): i, f, g, o. dc (B, H) becomes the gradient of the cell `before`. As y = o tanh(c), its
// derivative by c is o - tanh(c) y.
extern "C" __global__ void __launch_bounds__(256) lstm_back(const A* dh, A* dc, const T* g_y, const T* g_c,
                                                            const A* g_gates, const A* gates, const T* y,
                                                            const T* c, const T* before, T* d, int n,
                                                            int width) {
  EACH_ELEMENT;
  const Place p(at, width, 4);
  const long long at_i = at + (long long)n, at_f = at + 2ll * n, at_g = at + 3ll * n;
  const A h = A(y[at]), o = gates[at], i = gates[at_i], f = gates[at_f], g = gates[at_g];
  const A by_h = dh[at] + given(g_y, at), by_c = dc[at] + given(g_c, at) + by_h * (o - A(tanh(A(c[at]))) * h);
  const A fed = i * g, kept = f * A(before[at]);
  d[p(0, width)] = T(by_c * (fed - i * fed) + given(g_gates, at_i) * (i - i * i));
  d[p(1, width)] = T(by_c * (kept - f * kept) + given(g_gates, at_f) * (f - f * f));
  d[p(2, width)] = T(by_c * (i - g * fed) + given(g_gates, at_g) * (1 - g * g));
  d[p(3, width)] = T(by_h * (h - o * h) + given(g_gates, at) * (o - o * o));
  dc[at] = by_c * f;
}

// d (B, 4 H): m, r, z, n, of which the first three are the state's part and the last three the input's. dh
// becomes what goes to the state before without a product.
extern "C" __global__ void __launch_bounds__(256) gru_back(A* dh, const T* g_y, const A* g_saved,
                                                           const A* saved, const T* y, T* d, int n,
                                                           int width) {
  EACH_ELEMENT;
  const Place p(at, width, 4);
  const long long at_z = at + (long long)n, at_n = at + 2ll * n, at_m = at + 3ll * n;
  const A r = saved[at], z = saved[at_z], fresh = saved[at_n], m = saved[at_m];
  const A by_h = dh[at] + given(g_y, at);
  const A by_n = (by_h * (1 - z) + given(g_saved, at_n)) * (1 - fresh * fresh);
  d[p(0, width)] = T(by_n * r + given(g_saved, at_m));
  d[p(1, width)] = T((by_n * m + given(g_saved, at)) * (r - r * r));
  d[p(2, width)] = T(by_h * ((A(y[at]) - fresh) * (1 - z)) + given(g_saved, at_z) * (z - z * z));
  d[p(3, width)] = T(by_n);
  dh[at] = by_h * z;
}
"""

STEPS = source("recurrent", CODE + FORWARD + BACKWARD,
               ("rnn_step", "lstm_step", "gru_step", "rnn_back", "lstm_back", "gru_back"),
               tuple({"T": ctype(name)} for name in FLOATS))


# --- what the layers share --------------------------------------------------------------------------

class Layer:
    """One run of a layer: x (T, B, I) and states (B, H) in C order, and the dtype that is summed in."""

    def __init__(self, dev: Any, x: Any, h0: Any) -> None:
        self.dev, self.cp, self.gemm = dev, dev.cp, dev.blas.gemm
        self.x, self.h0 = compact(dev, x), compact(dev, h0)
        self.steps, self.batch, self.features = x.shape
        self.width, self.dtype = h0.shape[1], x.dtype
        self.wide = np.dtype(np.float32) if x.dtype.itemsize == 2 else x.dtype
        self.size = self.batch * self.width

    def room(self, *shape: int, wide: bool = False) -> Any:
        return self.cp.empty(shape, self.wide if wide else self.dtype)

    def launch(self, name: str, *args: Any) -> None:
        """A kernel over the elements of a state; numbers among the arguments are its ints."""
        if self.size:
            kernel = self.dev.kernels(STEPS, name, T=ctype(self.dtype))
            kernel((-(-self.size // 256),), (256,), tuple(np.int32(a) if type(a) is int else a for a in args))

    def rows(self, a: Any) -> Any:
        """(T, B, K) as (T * B, K)."""
        return a.reshape(a.shape[0] * a.shape[1], a.shape[2])

    def of_input(self, w_ih: Any) -> Any:
        """The products (T, B, gates * H) of all steps' inputs."""
        made = self.room(self.steps, self.batch, w_ih.shape[0], wide=True)
        self.gemm(self.rows(self.x), w_ih, self.rows(made), transpose_b=True)
        return made

    def widened(self, state: Any) -> Any:
        """A copy of a state (B, H) that steps write to."""
        made = self.room(self.batch, self.width, wide=True)
        made[...] = state
        return made

    def zeros(self) -> Any:
        return self.cp.zeros((self.batch, self.width), self.wide)

    # --- gradients from those of the pre-activations, d (T, B, gates * H) -------------------------------

    def inner(self, d: Any, rows: Any) -> Any:
        """The gradient of a weight that multiplied `rows`."""
        found = self.room(d.shape[1], rows.shape[1], wide=True)
        return self.gemm(d, rows, found, transpose_a=True)

    def of_weights(self, d_x: Any, d_h: Any, y: Any) -> tuple[Any, Any]:
        """Gradients of weight_ih and weight_hh; d_x and d_h are d of their products."""
        by_h = self.inner(d_h[0], self.h0)
        if self.steps > 1:
            self.gemm(self.rows(d_h[1:]), self.rows(y[:-1]), by_h, transpose_a=True, beta=1.0)
        return self.inner(self.rows(d_x), self.rows(self.x)), by_h

    def of_bias(self, d: Any) -> Any:
        rows = self.rows(d)
        ones = self.cp.ones((1, len(rows)), self.dtype)
        return self.gemm(ones, rows, self.room(1, rows.shape[1], wide=True))[0]

    def of_x(self, d: Any, w_ih: Any, wanted: bool) -> Any:
        made = self.room(self.steps if wanted else 0, self.batch, self.features)
        if wanted:
            self.gemm(self.rows(d), w_ih, self.rows(made))
        return made

    def narrow(self, *found: Any) -> tuple[Any, ...]:
        return tuple(a.astype(self.dtype, copy=False) for a in found)


def _array(dev: Any, x: Any) -> Any:
    """An operand in C order; None for a Python number, which is 0.0 here."""
    return compact(dev, x) if hasattr(x, "dtype") else None


def _steps(x: Any) -> Callable[[int], Any]:
    """What an array or None is at step t."""
    return lambda t: None if x is None else x[t]


def _takes(cotangents: int) -> Callable[[Any, Any, Any], bool]:
    """Floats, and states whose elements an int counts."""
    def supports(shapes: Any, given: Any, attrs: dict[str, Any]) -> bool:
        batch, width = shapes[cotangents + 1]
        return given[cotangents].name in FLOATS and 4 * batch * width < 2**31
    return supports


# --- plain RNN --------------------------------------------------------------------------------------

def _rnn(dev: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, nonlinearity: str) -> Any:
    layer = Layer(dev, x, h0)
    pre, y, h = layer.of_input(w_ih), layer.room(layer.steps, layer.batch, layer.width), layer.h0
    b_ih, b_hh = _array(dev, b_ih), _array(dev, b_hh)
    for t in range(layer.steps):
        layer.gemm(h, w_hh, pre[t], transpose_b=True, beta=1.0)
        h = y[t]
        layer.launch("rnn_step", pre[t], b_ih, b_hh, h, layer.size, layer.width, int(nonlinearity == "relu"))
    return y


def _rnn_grad(dev: Any, g_y: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, y: Any,
              nonlinearity: str, input_grad: bool) -> Any:
    layer = Layer(dev, x, h0)
    dh, d, y = layer.zeros(), layer.room(*y.shape), compact(dev, y)
    by_y = _steps(_array(dev, g_y))
    for t in reversed(range(layer.steps)):
        layer.launch("rnn_back", dh, by_y(t), y[t], d[t], layer.size, int(nonlinearity == "relu"))
        layer.gemm(d[t], w_hh, dh)
    bias = layer.of_bias(d)
    dx = layer.of_x(d, w_ih, input_grad)
    return layer.narrow(dx, dh, *layer.of_weights(d, d, y), bias, bias)


# --- LSTM -------------------------------------------------------------------------------------------

def _lstm(dev: Any, x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    layer = Layer(dev, x, h0)
    steps, batch, width = layer.steps, layer.batch, layer.width
    pre, cell, h = layer.of_input(w_ih), layer.widened(c0), layer.h0
    y, c = (layer.room(steps, batch, width) for _ in range(2))
    gates = layer.room(steps, 4, batch, width, wide=True)
    b_ih, b_hh = _array(dev, b_ih), _array(dev, b_hh)
    for t in range(steps):
        layer.gemm(h, w_hh, pre[t], transpose_b=True, beta=1.0)
        h = y[t]
        layer.launch("lstm_step", pre[t], b_ih, b_hh, cell, h, c[t], gates[t], layer.size, width)
    return y, c, gates


def _lstm_grad(dev: Any, g_y: Any, g_c: Any, g_gates: Any, x: Any, h0: Any, c0: Any, w_ih: Any, w_hh: Any,
               b_ih: Any, b_hh: Any, y: Any, c: Any, gates: Any, input_grad: bool) -> Any:
    layer = Layer(dev, x, h0)
    dh, dc = layer.zeros(), layer.zeros()
    d = layer.room(layer.steps, layer.batch, 4 * layer.width)
    c0, y, c, gates = (compact(dev, a) for a in (c0, y, c, gates))
    by_y, by_c, by_gates = (_steps(_array(dev, g)) for g in (g_y, g_c, g_gates))
    for t in reversed(range(layer.steps)):
        layer.launch("lstm_back", dh, dc, by_y(t), by_c(t), by_gates(t), gates[t], y[t], c[t],
                     c[t - 1] if t else c0, d[t], layer.size, layer.width)
        layer.gemm(d[t], w_hh, dh)
    bias = layer.of_bias(d)
    dx = layer.of_x(d, w_ih, input_grad)
    return layer.narrow(dx, dh, dc, *layer.of_weights(d, d, y), bias, bias)


# --- GRU --------------------------------------------------------------------------------------------

def _gru(dev: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
    layer = Layer(dev, x, h0)
    steps, batch, width = layer.steps, layer.batch, layer.width
    from_x, state, h = layer.of_input(w_ih), layer.widened(h0), layer.h0
    from_h = layer.room(batch, 3 * width, wide=True)
    y, saved = layer.room(steps, batch, width), layer.room(steps, 4, batch, width, wide=True)
    b_ih, b_hh = _array(dev, b_ih), _array(dev, b_hh)
    for t in range(steps):
        layer.gemm(h, w_hh, from_h, transpose_b=True)
        h = y[t]
        layer.launch("gru_step", from_x[t], from_h, b_ih, b_hh, state, h, saved[t], layer.size, width)
    return y, saved


def _gru_grad(dev: Any, g_y: Any, g_saved: Any, x: Any, h0: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any,
              y: Any, saved: Any, input_grad: bool) -> Any:
    layer = Layer(dev, x, h0)
    width = layer.width
    dh, d = layer.zeros(), layer.room(layer.steps, layer.batch, 4 * width)
    y, saved = compact(dev, y), compact(dev, saved)
    by_y, by_saved = _steps(_array(dev, g_y)), _steps(_array(dev, g_saved))
    d_h, d_x = d[:, :, :3 * width], d[:, :, width:]         # m, r, z and r, z, n
    turned = _rolled(dev, w_hh, width)                      # n, r, z
    for t in reversed(range(layer.steps)):
        layer.launch("gru_back", dh, by_y(t), by_saved(t), saved[t], y[t], d[t], layer.size, width)
        layer.gemm(d_h[t], turned, dh, beta=1.0)
    dx = layer.of_x(d_x, w_ih, input_grad)
    by_x, by_h = layer.of_weights(d_x, d_h, y)
    bias = layer.of_bias(d)
    by_h, b_h = (_rolled(dev, a, 2 * width) for a in (by_h, bias[:3 * width]))
    return layer.narrow(dx, dh, by_x, by_h, bias[width:], b_h)


def _rolled(dev: Any, a: Any, by: int) -> Any:
    """A copy with the last `by` rows in front."""
    made = dev.cp.empty(a.shape, a.dtype)
    made[:by] = a[len(a) - by:]
    made[by:] = a[:len(a) - by]
    return made


RNN, RNN_GRAD = DeviceKernel(_rnn, _takes(0)), DeviceKernel(_rnn_grad, _takes(1))
LSTM, LSTM_GRAD = DeviceKernel(_lstm, _takes(0)), DeviceKernel(_lstm_grad, _takes(3))
GRU, GRU_GRAD = DeviceKernel(_gru, _takes(0)), DeviceKernel(_gru_grad, _takes(2))
