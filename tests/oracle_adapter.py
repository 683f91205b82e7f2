"""meshtape by PyTorch's operator names, for replaying recorded samples of PyTorch's own operator tests.

Run as `python check_ops.py torch_ops.pkl oracle_adapter`; tests/front/test_oracle.py does the same when the
environment variable MESHTAPE_ORACLE names such a file. MESHTAPE_ORACLE_WORKERS=n runs it on n threads, with
every input split along its first dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import meshtape as mt
from meshtape.nn import functional as F

CHECK_DTYPE = True
WORKERS = int(os.environ.get("MESHTAPE_ORACLE_WORKERS", "1"))
if WORKERS > 1:
    mt.shutdown()
    mt.init(workers=WORKERS, backend="local")


def tensor(array: Any, requires_grad: bool) -> mt.Tensor:
    return mt.tensor(array, layout=mt.Shard(0) if np.ndim(array) else None, requires_grad=requires_grad)


def numpy(t: mt.Tensor) -> Any:
    return t.numpy()


def vjp(outs: Sequence[Any], cotangents: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Gradients of the inputs for the cotangents that are given (None: of an output that has none)."""
    chosen = [k for k, c in enumerate(cotangents) if c is not None]
    found = mt.grad([outs[k] for k in chosen], list(inputs), [mt.tensor(cotangents[k]) for k in chosen],
                    allow_unused=True)
    return [None if g is None else g.numpy() for g in found]


# --- PyTorch's arguments ----------------------------------------------------------------------------------

def axes(dim: Any) -> Any:
    """torch reduces over everything where `dim` is an empty tuple."""
    return None if dim == () else tuple(dim) if isinstance(dim, list | tuple) else dim


def reducing(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, dim=None, keepdim=False: function(x, axis=axes(dim), keepdims=keepdim)


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """var and std: torch divides by n - 1 unless told."""
    def call(x: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *,
             correction: Any = "unset") -> Any:
        one = float(unbiased) if correction == "unset" else 1.0 if correction is None else correction
        return function(x, axis=axes(dim), correction=one, keepdims=keepdim)
    return call


def gather(x: Any, dim: int, index: Any) -> Any:
    """The index may be smaller than x outside `dim`."""
    if x.ndim == 0 or index.ndim == 0:
        return mt.take_along_axis(x.reshape(-1), index.reshape(-1), axis=0).reshape(index.shape)
    if index.size == 0:
        return x.reshape(-1)[:0].reshape(index.shape)
    d = dim % x.ndim
    cut = tuple(slice(None) if k == d else slice(0, n) for k, n in enumerate(index.shape))
    return mt.take_along_axis(x[cut], index, axis=d)


def index_select(x: Any, dim: int, index: Any) -> Any:
    return mt.take(x.reshape(-1), index, axis=0).reshape(()) if x.ndim == 0 else mt.take(x, index, axis=dim)


def cat(tensors: Any, dim: int = 0) -> Any:
    """torch passes over empty vectors among tensors of more dimensions."""
    kept = [t for t in tensors if t.shape != (0,)]
    return mt.concat(kept or tensors, axis=dim)


def pad(x: Any, widths: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    """torch names the last dimension first."""
    pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)][::-1]
    return mt.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs, 0.0 if value is None else value)


def getitem(x: Any, key: Any) -> Any:
    """torch takes a list of sequences as a tuple of them."""
    return x[tuple(key) if isinstance(key, list) and any(not isinstance(k, int) for k in key) else key]


def squeeze(x: Any, dim: Any = None) -> Any:
    """torch leaves a dimension that is not 1."""
    if dim is None:
        return mt.squeeze(x)
    given = dim if isinstance(dim, tuple) else (dim,)
    return mt.squeeze(x, tuple(d for d in given if x.ndim and x.shape[d] == 1))


def cumsum(x: Any, dim: int, dtype: Any = None) -> Any:
    x = x if dtype is None else x.astype(dtype["dtype"])
    return mt.cumulative_sum(x, axis=dim)


def sort(x: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    return mt.sort_with_indices(x, axis=dim, descending=descending)


def topk(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return mt.topk(x, k, axis=dim, largest=largest)


def argmax(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return mt.argmax(x, axis=dim, keepdims=keepdim)


MAP: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, alpha=1: mt.add(x, y if alpha == 1 else y * alpha),
    "sub": lambda x, y, alpha=1: mt.subtract(x, y if alpha == 1 else y * alpha),
    "mul": mt.multiply, "true_divide": mt.divide, "pow": mt.pow, "exp": mt.exp, "log": mt.log,
    "sqrt": mt.sqrt, "tanh": mt.tanh, "sigmoid": mt.sigmoid, "abs": mt.abs, "sign": mt.sign,
    "floor": mt.floor, "round": mt.round, "maximum": mt.maximum, "minimum": mt.minimum, "clamp": mt.clip,
    "where": lambda x, condition, other: mt.where(condition, x, other),
    "masked_fill": mt.masked_fill,
    "matmul": mt.matmul, "bmm": mt.matmul,
    "einsum": lambda operands, equation: mt.einsum(equation, *operands),
    "sum": reducing(mt.sum), "mean": reducing(mt.mean), "amax": reducing(mt.max),
    "logsumexp": reducing(mt.logsumexp), "var": spread(mt.var), "std": spread(mt.std), "argmax": argmax,
    "sort": sort, "topk": topk, "cumsum": cumsum, "gather": gather, "take": mt.take,
    "index_select": index_select, "__getitem__": getitem,
    "cat": cat,
    "stack": lambda tensors, dim=0: mt.stack(tensors, axis=dim),
    "split": lambda x, size, dim=0: mt.split(x, size, axis=dim),
    "transpose": mt.swapaxes, "permute": mt.permute_dims, "reshape": mt.reshape,
    "broadcast_to": mt.broadcast_to, "squeeze": squeeze, "unsqueeze": mt.expand_dims,
    "expand": lambda x, shape: x.expand(shape),
    "tril": lambda x, k=0: mt.tril(x, k=k),
    "triu": lambda x, k=0: mt.triu(x, k=k),
    "softmax": F.softmax, "log_softmax": F.log_softmax,
    "nn.functional.relu": F.relu, "nn.functional.gelu": F.gelu, "nn.functional.pad.constant": pad,
    "nn.functional.layer_norm": F.layer_norm,
    "nn.functional.embedding": lambda weight, index, **options: F.embedding(index, weight, **options),
    "nn.functional.cross_entropy": F.cross_entropy, "nn.functional.nll_loss": F.nll_loss,
    "nn.functional.conv1d": F.conv1d, "nn.functional.conv2d": F.conv2d,
    "nn.functional.max_pool2d": F.max_pool2d, "nn.functional.avg_pool2d": F.avg_pool2d,
    "nn.functional.batch_norm": F.batch_norm,
    "nn.functional.mse_loss": F.mse_loss, "nn.functional.dropout": F.dropout,
    "nn.functional.scaled_dot_product_attention": F.scaled_dot_product_attention,
}
