"""Matrix products and their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.manipulation import permute_dims, reshape
from meshtape.runtime.errors import ShapeError
from meshtape.runtime.op import integers, lookup, normalize_axis


def _t(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else as_tensor(x)


def matmul(x1: Any, x2: Any, /) -> Tensor:
    """Matrix product over the last two dimensions; leading dimensions broadcast, 1-D operands are vectors."""
    op = lookup("matmul")
    return apply(op, (_t(x1), _t(x2)), op.pack({}))


def einsum(equation: str, *operands: Any) -> Tensor:
    """Sums of products by index letters, as numpy.einsum ("ij,jk->ik", "...ii->...i")."""
    op = lookup("einsum")
    return apply(op, tuple(_t(x) for x in operands), op.pack({"equation": equation}))


def vecdot(x1: Any, x2: Any, /, *, axis: int = -1) -> Tensor:
    """Sum of conj(x1) * x2 along `axis`; the other dimensions broadcast."""
    a, b = _t(x1), _t(x2)
    left = apply(lookup("conj"), (a,)) if a.dtype.kind == "c" else a
    return (left * b).sum(axis)


def outer(x1: Any, x2: Any, /) -> Tensor:
    """All products of two vectors: (n,) and (m,) give (n, m)."""
    return einsum("i,j->ij", x1, x2)


def tensordot(x1: Any, x2: Any, /, *, axes: int | tuple[Sequence[int], Sequence[int]] = 2) -> Tensor:
    """Contract the last `axes` dimensions of x1 with the first of x2, or the two named lists of dimensions.
    """
    a, b = _t(x1), _t(x2)
    if not hasattr(axes, "__iter__"):
        axes, = integers(axes, "tensordot")
        left, right = list(range(a.ndim - axes, a.ndim)), list(range(axes))
    else:
        left = [normalize_axis(d, a.ndim, "tensordot") for d in axes[0]]
        right = [normalize_axis(d, b.ndim, "tensordot") for d in axes[1]]
    if [a.shape[d] for d in left] != [b.shape[d] for d in right]:
        raise ShapeError(
            f"tensordot: contracted extents differ, {a.shape} over {left} and {b.shape} over {right}"
        )
    free_a = [d for d in range(a.ndim) if d not in left]
    free_b = [d for d in range(b.ndim) if d not in right]
    inner = 1
    for d in left:
        inner *= a.shape[d]
    rows, columns = [a.shape[d] for d in free_a], [b.shape[d] for d in free_b]
    x = reshape(permute_dims(a, free_a + left), (_product(rows), inner))
    y = reshape(permute_dims(b, right + free_b), (inner, _product(columns)))
    return reshape(matmul(x, y), (*rows, *columns))


def _product(extents: Sequence[int]) -> int:
    out = 1
    for n in extents:
        out *= n
    return out


__all__ = ["einsum", "matmul", "outer", "tensordot", "vecdot"]
