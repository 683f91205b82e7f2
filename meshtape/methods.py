"""Tensor's array methods: the functions of this package with the tensor as their first argument."""

from __future__ import annotations

from typing import Any

from meshtape import contraction, elementwise, manipulation, reductions
from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import lookup

POINTWISE = (
    "abs",
    "exp",
    "expm1",
    "log",
    "log1p",
    "log2",
    "log10",
    "sqrt",
    "rsqrt",
    "square",
    "reciprocal",
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "tanh",
    "sigmoid",
    "relu",
    "erf",
    "floor",
    "ceil",
    "trunc",
    "sign",
    "isfinite",
    "isnan",
    "isinf",
    "maximum",
    "minimum",
    "clip",
    "masked_fill",
    "round",
    "pow",
)
REDUCING = (
    "sum",
    "prod",
    "mean",
    "max",
    "min",
    "any",
    "all",
    "argmax",
    "argmin",
    "var",
    "std",
    "logsumexp",
    "norm",
    "count_nonzero",
)
SHAPING = (
    "astype",
    "flatten",
    "swapaxes",
    "moveaxis",
    "squeeze",
    "broadcast_to",
    "flip",
    "roll",
    "split",
    "tril",
    "triu",
    "take",
    "take_along_axis",
    "sort",
    "argsort",
    "topk",
    "unstack",
)


def _axes_or_star(function: Any) -> Any:
    """Methods that take a shape either as one sequence or as several ints."""
    def method(self: Tensor, *shape: Any) -> Tensor:
        one = len(shape) == 1 and isinstance(shape[0], list | tuple)
        return function(self, shape[0] if one else shape)
    return method


def _expand_dims(self: Tensor, axis: Any = 0) -> Tensor:
    return manipulation.expand_dims(self, axis)


def _expand(self: Tensor, *shape: Any) -> Tensor:
    """`x` stretched to `shape`; -1 keeps an extent."""
    wanted = list(shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape)
    offset = len(wanted) - self.ndim
    if offset < 0:
        raise ShapeError(f"expand: {tuple(wanted)} has fewer dimensions than {self.shape}")
    return manipulation.broadcast_to(self, [self.shape[i - offset] if n == -1 and i >= offset else n
                                            for i, n in enumerate(wanted)])


def _permute(self: Tensor, *axes: Any) -> Tensor:
    one = len(axes) == 1 and isinstance(axes[0], list | tuple)
    return manipulation.permute_dims(self, axes[0] if one else axes)


def _transpose(self: Tensor, *axes: Any) -> Tensor:
    """All dimensions reversed, two exchanged (two ints), or permuted (one sequence)."""
    if not axes:
        return manipulation.permute_dims(self, range(self.ndim)[::-1])
    if len(axes) == 2 and all(isinstance(a, int) for a in axes):
        return manipulation.swapaxes(self, *axes)
    return _permute(self, *axes)


def _to(self: Tensor, target: Any) -> Tensor:
    """The tensor in another dtype."""
    return manipulation.astype(self, target)


# --- indexing -------------------------------------------------------------------------------------------

def _getitem(self: Tensor, key: Any) -> Tensor:
    """NumPy's indexing: ints, slices, None, Ellipsis, integer arrays and tensors, boolean masks.

    A boolean mask decides the result's shape, so reading one waits for its values.
    """
    from meshtape.runtime import indexing
    out: Tensor = indexing.read(self, _plain_key(key))
    return out


def _setitem(self: Tensor, key: Any, value: Any) -> None:
    """Write into the places that `key` names: this handle is rebound to the changed tensor."""
    from meshtape.runtime import indexing
    if not isinstance(value, Tensor | bool | int | float | complex):
        value = as_tensor(value, dtype=self.dtype)
    self.assign(indexing.write(self, _plain_key(key), value), "item assignment")


def _plain_key(key: Any) -> Any:
    """The key with the values of boolean tensors in it, for which this waits."""
    parts = key if isinstance(key, tuple) else (key,)
    return tuple([k.numpy() if isinstance(k, Tensor) and k.dtype.kind == "b" else k for k in parts])


def _iter(self: Tensor) -> Any:
    if not self.ndim:
        raise TypeError("iteration over a tensor of 0 dimensions")
    return (self[i] for i in range(self.shape[0]))  # type: ignore[index]


# --- in place -------------------------------------------------------------------------------------------

def _fill_(self: Tensor, value: Any) -> Tensor:
    from meshtape.creation import full_like
    return self.assign(full_like(self, value), "fill_")


def _copy_(self: Tensor, source: Any) -> Tensor:
    """Take the values of `source` (broadcast); keeps shape, dtype and layout."""
    source = as_tensor(source, dtype=self.dtype)
    return self.assign(manipulation.broadcast_to(source, self.shape), "copy_")


def _in_place(name: str) -> Any:
    op = lookup(name)
    return lambda self, *others: self.assign(apply(op, (self, *others), op.pack({})), f"{name}_")


def _numel(self: Tensor) -> int:
    return self.size


def _clone(self: Tensor) -> Tensor:
    """A tensor of the same values with a gradient of its own path."""
    return apply(lookup("positive"), (self,)) if self.dtype.kind != "b" else self.detach()


def _namespace(self: Tensor, api_version: str | None = None) -> Any:
    import meshtape
    return meshtape


def install() -> None:
    """Give Tensor its array methods."""
    for module, names in ((elementwise, POINTWISE), (reductions, REDUCING), (manipulation, SHAPING)):
        for name in names:
            setattr(Tensor, name, getattr(module, name))
    plain = {
        "reshape": _axes_or_star(manipulation.reshape),
        "permute": _permute,
        "permute_dims": _permute,
        "transpose": _transpose,
        "expand": _expand,
        "expand_dims": _expand_dims,
        "unsqueeze": _expand_dims,
        "matmul": contraction.matmul,
        "cumsum": manipulation.cumulative_sum,
        "to": _to,
        "clone": _clone,
        "numel": _numel,
        "__getitem__": _getitem,
        "__setitem__": _setitem,
        "__iter__": _iter,
        "fill_": _fill_,
        "zero_": lambda self: _fill_(self, 0),
        "copy_": _copy_,
        "__array_namespace__": _namespace,
        "add_": _in_place("add"),
        "sub_": _in_place("sub"),
        "mul_": _in_place("mul"),
        "div_": _in_place("divide"),
    }
    for name, method in plain.items():
        setattr(Tensor, name, method)
    properties = {
        "T": lambda self: manipulation.permute_dims(self, range(self.ndim)[::-1]),
        "mT": manipulation.matrix_transpose,
        "real": lambda self: elementwise.real(self), "imag": lambda self: elementwise.imag(self),  # type: ignore[attr-defined]
    }
    for name, getter in properties.items():
        setattr(Tensor, name, property(getter))


__all__ = ["install"]
