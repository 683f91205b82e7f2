"""Multi-head attention and the Transformer's encoder, by torch.nn's names, shapes and default initialisation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from meshtape.autograd import Tensor, as_tensor
from meshtape.creation import empty, full
from meshtape.elementwise import logical_or, where
from meshtape.manipulation import triu
from meshtape.nn import functional, init
from meshtape.nn.containers import ModuleList
from meshtape.nn.layers import Dropout, LayerNorm, Linear
from meshtape.nn.module import Module
from meshtape.nn.parameter import Parameter
from meshtape.runtime.dtypes import AnyDType, is_floating
from meshtape.runtime.errors import DTypeError, ShapeError

Activation = Callable[[Tensor], Tensor]


class MultiheadAttention(Module):
    """Attention of `num_heads` heads between projections of query, key and value (arXiv:1706.03762, 3.2.2).

    Tensors are (length, batch, features), with batch_first (batch, length, features), or (length, features)
    without a batch. `kdim` and `vdim` are the features of key and value where they are not embed_dim.
    torch's add_bias_kv and add_zero_attn are not there.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True,
                 kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
                 dtype: AnyDType = None) -> None:
        super().__init__()
        if num_heads <= 0 or embed_dim % num_heads:
            raise ShapeError(f"MultiheadAttention: embed_dim {embed_dim} cannot be divided over {num_heads} "
                             f"heads; choose a multiple")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.packed = self.kdim == self.vdim == embed_dim
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        if self.packed:
            self.in_proj_weight = Parameter(empty((3 * embed_dim, embed_dim), dtype=dtype))
        else:
            for name, width in zip(names, (embed_dim, self.kdim, self.vdim), strict=True):
                self.register_parameter(name, Parameter(empty((embed_dim, width), dtype=dtype)))
        made = Parameter(empty((3 * embed_dim,), dtype=dtype)) if bias else None
        self.register_parameter("in_proj_bias", made)
        self.out_proj = Linear(embed_dim, embed_dim, bias, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new input projections; biases 0."""
        for name, p in self._parameters.items():
            if p is not None and name.endswith("weight"):
                init.xavier_uniform_(p)
        if self.in_proj_bias is not None:
            init.zeros_(self.in_proj_bias)
            init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any = None,
                need_weights: bool = True, attn_mask: Any = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        """(output, weights). Masks are torch's: of booleans *true where a query must not look*, or floating
        and added to the scores.

        key_padding_mask: (batch, S); attn_mask: (L, S) or (batch * heads, L, S). is_causal: query i looks at
        keys 0..i (an attn_mask given with it is taken for just that). Weights are (batch, L, S), the mean
        over heads, or (batch, heads, L, S) without average_attn_weights; need_weights=False gives None and is
        the fast way. Raises ShapeError, DTypeError.
        """
        single = query.ndim == 2
        if single:
            itself = query is key is value
            query, key, value = (x.reshape(1, *x.shape) for x in (query, key, value))
            key, value = (query, query) if itself else (key, value)
        elif query.ndim != 3:
            raise ShapeError(f"MultiheadAttention: the query is {query.shape}; give (length, batch, features)"
                             f", (batch, length, features) with batch_first, or (length, features)")
        batch_first = self.batch_first or single
        size = (query.shape[0], key.shape[1]) if batch_first else (query.shape[1], key.shape[0])
        mask = self._whole_mask(size, key_padding_mask, None if is_causal else attn_mask)
        heads, weights = self._attended(query, key, value, mask, need_weights, is_causal, batch_first)
        out = self.out_proj(self._merged(heads, batch_first))
        return _result(out, weights if need_weights else None, average_attn_weights, single)

    def _whole_mask(self, size: tuple[int, int], key_padding_mask: Any, attn_mask: Any) -> Tensor | None:
        """One mask that broadcasts to (batch, heads, L, S); `size` is (batch, S)."""
        padding = None if key_padding_mask is None else _mask(key_padding_mask, "key_padding_mask")
        if padding is not None:
            padding = padding.reshape(size[0], 1, 1, size[1])
        attn = None if attn_mask is None else _mask(attn_mask, "attn_mask")
        if attn is not None and attn.ndim == 3:
            attn = attn.reshape(size[0], self.num_heads, *attn.shape[1:])
        return _joined(padding, attn)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, need_weights: bool,
                  is_causal: bool, batch_first: bool) -> tuple[Tensor, Tensor | None]:
        """The attention of every head, and the weights if they had to be made."""
        drop = self.dropout if self.training else 0.0
        scale = 1 / math.sqrt(self.head_dim)
        if need_weights or (mask is not None and mask.requires_grad):
            q, k, v = (self._heads(x, batch_first) for x in self._projected(query, key, value))
            weights = functional.dropout(_weights(q, k, mask, is_causal, scale), drop)
            return weights @ v, weights
        if mask is not None and mask.dtype.kind == "b":
            mask = ~mask
        if self.packed and query is key is value:
            qkv = self._packed_heads(query, batch_first)
            return functional.fused_self_attention(qkv, mask, drop, is_causal, scale), None
        q, k, v = (self._heads(x, batch_first) for x in self._projected(query, key, value))
        return functional.fused_attention(q, k, v, mask, drop, is_causal, scale), None

    def _packed_heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """Query, key and value of one input by one projection: (3, batch, heads, length, E / heads)."""
        made = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        split = made.reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        order = (2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)
        return split.permute_dims(order)  # type: ignore[no-any-return]

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Each input times its part of the input projection."""
        e, bias = self.embed_dim, self.in_proj_bias
        parts = [slice(i * e, (i + 1) * e) for i in range(3)]
        weights = ([self.in_proj_weight[p] for p in parts] if self.packed else
                   [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight])
        return [functional.linear(x, w, None if bias is None else bias[p])
                for x, w, p in zip(inputs, weights, parts, strict=True)]

    def _heads(self, x: Tensor, batch_first: bool) -> Tensor:
        """(batch, length, E) or (length, batch, E) as (batch, heads, length, E / heads)."""
        split = x.reshape(*x.shape[:2], self.num_heads, self.head_dim)
        return split.permute_dims((0, 2, 1, 3) if batch_first else (1, 2, 0, 3))  # type: ignore[no-any-return]

    def _merged(self, heads: Tensor, batch_first: bool) -> Tensor:
        x = heads.permute_dims((0, 2, 1, 3) if batch_first else (2, 0, 1, 3))
        return x.reshape(*x.shape[:2], self.embed_dim)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"


def _mask(given: Any, name: str) -> Tensor:
    mask = given if isinstance(given, Tensor) else as_tensor(given)
    if mask.dtype.kind != "b" and not is_floating(mask.dtype):
        raise DTypeError(f"MultiheadAttention: {name} has dtype {mask.dtype}; use booleans (true where a "
                         f"query must not look) or floating numbers (added to the scores)")
    return mask


def _joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """One mask that does what both do."""
    if a is None or b is None:
        return b if a is None else a
    if a.dtype.kind == b.dtype.kind == "b":
        return logical_or(a, b)  # type: ignore[no-any-return]
    a, b = (where(m, -math.inf, 0.0) if m.dtype.kind == "b" else m for m in (a, b))
    return a + b


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """softmax(q k^T * scale + mask) as a tensor; zeros for a query that a boolean mask lets look nowhere."""
    scores = (q @ k.swapaxes(-1, -2)) * scale
    if is_causal:
        later = triu(full(scores.shape[-2:], True), k=1)
        mask = later if mask is None else _joined(mask, later)
    if mask is None:
        return functional.softmax(scores, -1)
    if mask.dtype.kind != "b":
        return functional.softmax(scores + mask.astype(scores.dtype), -1)
    # A finite floor instead of -inf: a row without any allowed place stays free of NaN, forward and backward.
    floor = -3e4 if scores.dtype.name == "float16" else -1e30
    return where(mask, 0.0, functional.softmax(where(mask, floor, scores), -1))


def _result(out: Tensor, weights: Tensor | None, average: bool, single: bool) -> tuple[Tensor, Tensor | None]:
    if weights is not None and average:
        weights = weights.mean(1)
    if single:
        return out[0], None if weights is None else weights[0]
    return out, weights


class TransformerEncoderLayer(Module):
    """Self-attention and a feed-forward network, each with a residual connection and a LayerNorm: after it,
    or with norm_first before (arXiv:1706.03762, arXiv:2002.04745).

    `activation` is "relu", "gelu" or a function of a tensor.
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 activation: str | Activation = "relu", layer_norm_eps: float = 1e-5,
                 batch_first: bool = False, norm_first: bool = False, bias: bool = True,
                 dtype: AnyDType = None) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, nhead, dropout, bias, batch_first=batch_first,
                                            dtype=dtype)
        self.linear1 = Linear(d_model, dim_feedforward, bias, dtype)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias, dtype)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, layer_norm_eps, bias=bias, dtype=dtype)
        self.norm2 = LayerNorm(d_model, layer_norm_eps, bias=bias, dtype=dtype)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.activation = _activation(activation)

    def forward(self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None,
                is_causal: bool = False) -> Tensor:
        """src (length, batch, d_model), or (batch, length, d_model) with batch_first; masks as in
        MultiheadAttention."""
        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(x, x, x, src_key_padding_mask, need_weights=False, attn_mask=src_mask,
                                    is_causal=is_causal)
            return self.dropout1(out)  # type: ignore[no-any-return]

        def feed(x: Tensor) -> Tensor:
            return self.dropout2(  # type: ignore[no-any-return]
                self.linear2(self.dropout(self.activation(self.linear1(x)))))

        if self.norm_first:
            src = src + attend(self.norm1(src))
            return src + feed(self.norm2(src))
        src = self.norm1(src + attend(src))
        return self.norm2(src + feed(src))  # type: ignore[no-any-return]


def _activation(given: str | Activation) -> Activation:
    if callable(given):
        return given
    found = {"relu": functional.relu, "gelu": functional.gelu}.get(given)
    if found is None:
        raise ValueError(f"TransformerEncoderLayer: activation is {given!r}; use 'relu', 'gelu' or a "
                         f"function")
    return found


class TransformerEncoder(Module):
    """`num_layers` copies of an encoder layer one after the other, then `norm` if given.

    As in torch the copies start out equal.
    """

    def __init__(self, encoder_layer: Module, num_layers: int, norm: Module | None = None) -> None:
        super().__init__()
        self.layers = ModuleList([copy.deepcopy(encoder_layer) for _ in range(num_layers)])
        self.num_layers = num_layers
        self.norm = norm

    def forward(self, src: Tensor, mask: Any = None, src_key_padding_mask: Any = None,
                is_causal: bool = False) -> Tensor:
        """As TransformerEncoderLayer; the masks go to every layer."""
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, is_causal=is_causal)
        return src if self.norm is None else self.norm(src)  # type: ignore[no-any-return]


__all__ = ["MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer"]
