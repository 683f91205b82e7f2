"""The six models for JAX: pure functions of the same named weights, and a jitted AdamW step, as torch's.

Images are (B, H, W, C) inside, which XLA prefers on CPUs; weights keep torch's shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _models import LR

Params = dict[str, jax.Array]
HEAD = 16       # features of one attention head


def linear(p: Params, name: str, x: Any) -> Any:
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def layer_norm(p: Params, name: str, x: Any) -> Any:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p[name + ".weight"] + p[name + ".bias"]


def gelu(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=False)


def mlp(p: Params, x: Any) -> Any:
    x = jax.nn.relu(linear(p, "0", x))
    return linear(p, "4", jax.nn.relu(linear(p, "2", x)))


def mlp_norm(p: Params, x: Any) -> Any:
    x = gelu(layer_norm(p, "1", linear(p, "0", x)))
    return linear(p, "6", gelu(layer_norm(p, "4", linear(p, "3", x))))


def conv(p: Params, name: str, x: Any) -> Any:
    y = jax.lax.conv_general_dilated(x, p[name + ".weight"], (1, 1), "SAME",
                                     dimension_numbers=("NHWC", "OIHW", "NHWC"))
    return y + p[name + ".bias"]


def pool(x: Any) -> Any:
    b, h, w, c = x.shape        # by reshape: the gradient of reduce_window is slower here
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))


def cnn(p: Params, x: Any) -> Any:
    x = x.transpose(0, 2, 3, 1)
    x = pool(jax.nn.relu(conv(p, "0", x)))
    x = pool(jax.nn.relu(conv(p, "3", x)))
    return linear(p, "7", x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))


def attention(p: Params, name: str, x: Any, width: int) -> Any:
    b, t, e = x.shape
    heads = e // width
    qkv = x @ p[name + ".in_proj_weight"].T + p[name + ".in_proj_bias"]
    q, k, v = (a.reshape(b, t, heads, width) for a in jnp.split(qkv, 3, axis=-1))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return linear(p, name + ".out_proj", out.reshape(b, t, e))


def transformer(p: Params, ids: Any) -> Any:
    x = p["token.weight"][ids] + p["position.weight"]
    for i in range(2):
        n = f"encoder.layers.{i}."
        x = layer_norm(p, n + "norm1", x + attention(p, n + "self_attn", x, HEAD))
        x = layer_norm(p, n + "norm2", x + linear(p, n + "linear2", gelu(linear(p, n + "linear1", x))))
    x = linear(p, "head", x)
    return x.reshape(-1, x.shape[-1])


def lstm(p: Params, x: Any) -> Any:
    inputs = x @ p["lstm.weight_ih_l0"].T + p["lstm.bias_ih_l0"] + p["lstm.bias_hh_l0"]

    def step(state: Any, given: Any) -> tuple[Any, None]:
        h, c = state
        i, f, g, o = jnp.split(given + h @ p["lstm.weight_hh_l0"].T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    zero = jnp.zeros((x.shape[0], p["lstm.weight_hh_l0"].shape[1]), x.dtype)
    (h, _), _ = jax.lax.scan(step, (zero, zero), inputs.swapaxes(0, 1))
    return linear(p, "head", h)


FORWARD: dict[str, Callable[[Params, Any], Any]] = {
    "mlp64": mlp, "mlp784": mlp, "mlpnorm": mlp_norm, "cnn28": cnn, "charlm": transformer, "lstm": lstm}


def train_step(forward: Callable[[Params, Any], Any]) -> Any:
    """Jitted (params, moments, step, x, y) -> (params, moments, step, loss): cross-entropy and AdamW."""
    def loss(p: Params, x: Any, y: Any) -> Any:
        logp = jax.nn.log_softmax(forward(p, x))
        return -jnp.take_along_axis(logp, y[:, None], axis=1).mean()

    def step(p: Params, moments: Any, t: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(p, x, y)
        t = t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, moments[1], grads)
        first, second = 1 - 0.9 ** t, 1 - 0.999 ** t

        def update(p: Any, m: Any, v: Any) -> Any:
            return p * (1 - LR * 0.01) - LR * (m / first) / (jnp.sqrt(v / second) + 1e-8)

        return jax.tree.map(update, p, m, v), (m, v), t, value

    return jax.jit(step, donate_argnums=(0, 1, 2))
