"""Layers, activations and losses as functions, by torch.nn.functional's names and semantics.

Where torch says `dim`, `axis` is accepted too. The losses come from meshtape.nn.loss_functions, convolution
and pooling from spatial_functions, batch normalization from batchnorm_functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.autograd.autocast import wide
from meshtape.elementwise import where
from meshtape.manipulation import broadcast_to
from meshtape.nn.batchnorm_functions import batch_norm, group_norm, instance_norm
from meshtape.nn.loss_functions import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
)
from meshtape.nn.spatial_functions import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    avg_pool1d,
    avg_pool2d,
    conv1d,
    conv2d,
    conv_transpose1d,
    conv_transpose2d,
    max_pool1d,
    max_pool2d,
)
from meshtape.runtime.dtypes import AnyDType, canonical, is_floating
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import broadcast_shapes, integers, lookup, normalize_axis
from meshtape.scheduler import current

LINEAR, RELU, GELU, LAYER_NORM = (lookup(name) for name in ("linear", "relu", "gelu", "layer_norm"))


def _t(x: Any) -> Any:
    return x if isinstance(x, Tensor) else as_tensor(x)


def _call(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return apply(op, inputs, op.pack(attrs))


def pick_axis(axis: int | None, dim: int | None, default: int = -1) -> int:
    """The dimension that `axis` (the Array API's word) or `dim` (torch's) names."""
    if axis is not None and dim is not None and axis != dim:
        raise ShapeError(f"axis={axis} and dim={dim} name different dimensions; give one of them")
    return axis if axis is not None else dim if dim is not None else default


# --- layers ---------------------------------------------------------------------------------------------

def linear(input: Any, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input @ weight.T + bias, over the last dimension: (..., in), (out, in), (out,) give (..., out)."""
    if bias is None:
        return _call("matmul", _t(input), weight, transpose_y=weight.ndim > 1)
    return apply(LINEAR, (input if isinstance(input, Tensor) else as_tensor(input), weight, bias))


def embedding(input: Any, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of `weight` (V, E) at integer `input` (...): (..., E). Row `padding_idx` gets no gradient."""
    return _call("embedding", weight, _t(input), padding_idx=padding_idx)


def one_hot(input: Any, num_classes: int = -1, dtype: AnyDType = "int64") -> Tensor:
    """(...) class indices as (..., num_classes) of ones and zeros. -1 reads the values (waits) for the
    largest.
    """
    indices = _t(input)
    if num_classes == -1:
        num_classes = int(indices.max().item()) + 1 if indices.size else 1
    return _call("one_hot", indices, num_classes=int(num_classes), dtype=canonical(dtype).name)


def layer_norm(input: Any, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
               bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimensions, whose shape is
    `normalized_shape`.

    Ba, Kiros, Hinton 2016, arXiv:1607.06450; the variance is biased.
    """
    x = _t(input)
    over = _normalized(x, normalized_shape, "layer_norm")
    if weight is not None and bias is not None:
        return apply(LAYER_NORM, (x, weight, bias), (over, float(eps)))[0]  # type: ignore[no-any-return]
    out = _call("normalize", x, ndim=over, eps=float(eps))[0]
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def rms_norm(input: Any, normalized_shape: int | Sequence[int], weight: Tensor | None = None,
             eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimensions; eps: that of the dtype unless given.

    Zhang, Sennrich 2019, arXiv:1910.07467.
    """
    x = wide(_t(input))
    over = _normalized(x, normalized_shape, "rms_norm")
    axes = tuple(range(x.ndim - over, x.ndim))
    long = x.astype("float32") if x.dtype.itemsize == 2 else x
    small = float(np.finfo("float32" if x.dtype.itemsize == 2 else x.dtype).eps) if eps is None else eps
    out = long * _call("rsqrt", (long * long).mean(axes, keepdims=True) + small)
    out = out.astype(x.dtype)
    return out if weight is None else out * weight


def _normalized(x: Tensor, normalized_shape: int | Sequence[int], name: str) -> int:
    shape = normalized_shape if type(normalized_shape) is tuple else integers(normalized_shape, name)
    if not shape or x.shape[-len(shape):] != shape:
        raise ShapeError(f"{name}: normalized_shape {shape} must be the last dimensions of the input, which "
                         f"is {x.shape}")
    return len(shape)


def dropout(input: Any, p: float = 0.5, training: bool = True) -> Tensor:
    """In training, zeroes elements with probability `p` and scales the others by 1 / (1 - p); else the input.

    The mask depends on the seed, the draw and each element's place in the whole tensor, not on the mesh.
    """
    x = _t(input)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p is {p}; a probability lies between 0 and 1")
    if not training or p == 0.0:
        return x
    if p == 1.0:
        return x * 0.0
    session = current.session()
    return _call("dropout", x, session.seed, session.draw(), p=float(p))


def normalize(input: Any, p: float = 2.0, dim: int | None = None, eps: float = 1e-12,
              axis: int | None = None) -> Tensor:
    """x / max(p-norm of x along `dim`, eps); dim is 1 unless given."""
    x = wide(_t(input))
    over = normalize_axis(pick_axis(axis, dim, 1), x.ndim, "normalize")
    if p == 2.0:
        length = (x * x).sum(over, keepdims=True).sqrt()
    elif p == 1.0:
        length = x.abs().sum(over, keepdims=True)
    elif p == math.inf:
        length = x.abs().max(over, keepdims=True)
    else:
        length = (x.abs() ** p).sum(over, keepdims=True) ** (1 / p)
    return x / length.clip(min=eps)


def flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """The dimensions start_dim to end_dim (both included) merged into one."""
    return _t(input).flatten(start_dim, end_dim)


# --- activations ----------------------------------------------------------------------------------------

def relu(input: Any) -> Tensor:
    """max(x, 0)."""
    return apply(RELU, (input if isinstance(input, Tensor) else as_tensor(input),))


def gelu(input: Any, approximate: str = "none") -> Tensor:
    """x Phi(x), Phi the normal distribution; approximate="tanh" for its approximation (arXiv:1606.08415)."""
    return apply(GELU, (input if isinstance(input, Tensor) else as_tensor(input),), (approximate,))


def silu(input: Any) -> Tensor:
    """x * sigmoid(x)."""
    return _call("silu", _t(input))


def sigmoid(input: Any) -> Tensor:
    """1 / (1 + exp(-x))."""
    return _call("sigmoid", _t(input))


def tanh(input: Any) -> Tensor:
    """Hyperbolic tangent."""
    return _call("tanh", _t(input))


def leaky_relu(input: Any, negative_slope: float = 0.01) -> Tensor:
    """x where x > 0, else negative_slope * x."""
    return _call("leaky_relu", _t(input), negative_slope=float(negative_slope))


def softplus(input: Any, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(beta x)) / beta; x itself where beta x > threshold."""
    return _call("softplus", _t(input), beta=float(beta), threshold=float(threshold))


def elu(input: Any, alpha: float = 1.0) -> Tensor:
    """x where x > 0, else alpha * (exp(x) - 1) (arXiv:1511.07289)."""
    x = _t(input)
    below = _call("expm1", _call("clip_max", x, 0.0)) * alpha
    return where(x > 0, x, below)


def softmax(input: Any, axis: int | None = None, dtype: AnyDType = None, *, dim: int | None = None) -> Tensor:
    """exp(x) / sum(exp(x)) along `axis` (the last unless given)."""
    return _along("softmax", input, axis, dim, dtype)


def log_softmax(input: Any, axis: int | None = None, dtype: AnyDType = None, *,
                dim: int | None = None) -> Tensor:
    """log(softmax(x)) along `axis` (the last unless given), without overflow."""
    return _along("log_softmax", input, axis, dim, dtype)


def _along(name: str, input: Any, axis: int | None, dim: int | None, dtype: AnyDType) -> Tensor:
    x = _t(input)
    if dtype is not None:
        x = x.astype(dtype)
    return _call(name, x, axis=normalize_axis(pick_axis(axis, dim), x.ndim, name))


# --- attention ------------------------------------------------------------------------------------------

def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None,
                                 dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                                 enable_gqa: bool = False) -> Tensor:
    """softmax(query @ key.T * scale + mask) @ value (arXiv:1706.03762, eq. 1).

    query (..., L, E), key (..., S, E), value (..., S, V) give (..., L, V); scale is 1/sqrt(E) unless given. A
    boolean `attn_mask` (..., L, S) is true where a query may look; a floating one is added. is_causal: query
    i looks at keys 0..i. A query that may look nowhere gives zeros. enable_gqa: the query has a multiple of
    the key's heads (dimension -3). Raises ShapeError, DTypeError.
    """
    if is_causal and attn_mask is not None:
        raise ShapeError("scaled_dot_product_attention: give attn_mask or is_causal=True, not both")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"scaled_dot_product_attention: dropout_p is {dropout_p}; a probability lies "
                         f"between 0 and 1")
    mask = None if attn_mask is None else _attention_mask(attn_mask)
    if enable_gqa:
        key, value = (_repeat_heads(x, query.shape[-3]) for x in (key, value))
    query, key, value = _same_batch((query, key, value), () if mask is None else mask.shape[:-2])
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if mask is not None and mask.requires_grad:
        return _composed_attention(query, key, value, mask, dropout_p, scale)
    return fused_attention(query, key, value, mask, dropout_p, is_causal, scale)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float,
                    is_causal: bool, scale: float) -> Tensor:
    """The row: equal leading dimensions, a mask that wants no gradient, and is_causal beside it."""
    return _call("attention", query, key, value, True if mask is None else mask, *_draws(dropout_p),
                 is_causal=is_causal, scale=scale, p=float(dropout_p))[0]


def fused_self_attention(qkv: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
                         scale: float) -> Tensor:
    """The same of a sequence to itself: query, key and value are one tensor (3, ..., length, width)."""
    return _call("self_attention", qkv, True if mask is None else mask, *_draws(dropout_p),
                 is_causal=is_causal, scale=scale, p=float(dropout_p))[0]


def _draws(dropout_p: float) -> tuple[Any, Any]:
    session = current.session()
    return (session.seed, session.draw()) if dropout_p else (0, 0)


def _attention_mask(given: Any) -> Tensor:
    mask = _t(given)
    if mask.dtype.kind != "b" and not is_floating(mask.dtype):
        raise DTypeError(f"scaled_dot_product_attention: attn_mask has dtype {mask.dtype}; use a boolean "
                         f"mask (true where a query may look) or a floating one (added to the scores)")
    return mask


def _same_batch(tensors: Sequence[Tensor], mask: tuple[int, ...]) -> list[Tensor]:
    """The tensors with their leading dimensions stretched to what they and the mask have together."""
    name = "scaled_dot_product_attention"
    for x in tensors:
        if x.ndim < 2:
            raise ShapeError(f"{name}: query, key and value are (..., length, width), got {x.shape}")
    batch = broadcast_shapes(name, *(x.shape[:-2] for x in tensors), mask)
    return [x if x.shape[:-2] == batch else broadcast_to(x, (*batch, *x.shape[-2:])) for x in tensors]


def _composed_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout_p: float,
                        scale: float) -> Tensor:
    """Attention with an additive mask that wants a gradient, by elementary operations."""
    scores = _call("matmul", query, key, transpose_y=True) * scale
    scores = scores + (mask if mask.dtype == scores.dtype else mask.astype(scores.dtype))
    weights = _call("softmax", scores, axis=scores.ndim - 1)
    return _call("matmul", dropout(weights, dropout_p), value)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(..., H, S, E) with every head repeated side by side up to `heads`."""
    *batch, have, length, width = x.shape
    if not have or heads % have:
        raise ShapeError(f"scaled_dot_product_attention: {heads} query heads are no multiple of {have} "
                         f"key heads")
    if heads == have:
        return x
    stretched = broadcast_to(x.reshape(*batch, have, 1, length, width),
                             (*batch, have, heads // have, length, width))
    return stretched.reshape(*batch, heads, length, width)


__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "avg_pool1d", "avg_pool2d", "batch_norm", "binary_cross_entropy_with_logits", "conv1d", "conv2d",
    "conv_transpose1d", "conv_transpose2d", "cross_entropy", "dropout", "elu", "embedding", "flatten",
    "gelu", "group_norm", "huber_loss", "instance_norm", "l1_loss", "layer_norm", "leaky_relu",
    "linear", "log_softmax", "max_pool1d", "max_pool2d", "mse_loss", "nll_loss", "normalize", "one_hot",
    "relu", "rms_norm", "scaled_dot_product_attention", "sigmoid", "silu", "smooth_l1_loss", "softmax",
    "softplus", "tanh",
]
