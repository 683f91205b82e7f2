"""Losses as functions, with torch's arguments. `reduction` is "mean", "sum" or "none"."""

from __future__ import annotations

from typing import Any

from meshtape.autograd import Tensor, apply, as_tensor
from meshtape.autograd.autocast import wide
from meshtape.elementwise import where
from meshtape.manipulation import broadcast_to
from meshtape.runtime.dtypes import is_floating
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import lookup

CROSS_ENTROPY = lookup("cross_entropy")
TARGET_COUNT = lookup("target_count")


def _t(x: Any) -> Any:
    return x if isinstance(x, Tensor) else as_tensor(x)


def _call(name: str, *inputs: Any, **attrs: Any) -> Any:
    op = lookup(name)
    return apply(op, inputs, op.pack(attrs))


def _check(name: str, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction is {reduction!r}; use 'mean', 'sum' or 'none'")


def reduce(loss: Any, reduction: str) -> Tensor:
    """The losses' mean or sum, or all of them."""
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


# --- classification -------------------------------------------------------------------------------------

def cross_entropy(input: Any, target: Any, weight: Tensor | None = None, ignore_index: int = -100,
                  reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    """-log softmax(input)[target], averaged over the targets that are not `ignore_index` (by weight, if
    given).

    input: logits (N, C), (C,) or (N, C, d1, ...); target: class indices, integers of that shape without C, or
    probabilities of the input's shape. label_smoothing (0 to 1) mixes in the uniform distribution
    (arXiv:1512.00567, section 7). Raises ShapeError, DTypeError, ValueError.
    """
    _check("cross_entropy", reduction)
    x, y = wide(_t(input)), _t(target)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing is {label_smoothing}; use a number between 0 and 1")
    if y.shape == x.shape and is_floating(y.dtype):
        return _by_probabilities(x, y, weight, reduction, label_smoothing)
    if weight is None and reduction != "none":
        total, count, _ = apply(CROSS_ENTROPY, (x, y), (int(ignore_index), float(label_smoothing)))
        if count.spec.partial:
            count = apply(TARGET_COUNT, (y,), (int(ignore_index), count.dtype.name))
        return _cast(total / count.detach() if reduction == "mean" else total, x.dtype)
    logp = _call("log_softmax", x, axis=_class_axis(x, "cross_entropy"))
    if not label_smoothing:
        return nll_loss(logp, y, weight, ignore_index, reduction)
    return _smoothed(logp, y, weight, int(ignore_index), reduction, float(label_smoothing))


def _class_axis(x: Tensor, name: str) -> int:
    if not x.ndim:
        raise ShapeError(f"{name}: the input is a number; give logits of shape (N, C), (C,) or (N, C, d1, "
                         f"...)")
    return min(1, x.ndim - 1)


def _along_classes(weight: Any, x: Tensor, name: str) -> Tensor:
    """The weight of every class, shaped to multiply `x`."""
    axis, w = _class_axis(x, name), _t(weight)
    if w.shape != (x.shape[axis],):
        raise ShapeError(f"{name}: weight has shape {w.shape}; give one number for each of {x.shape[axis]} "
                         f"classes")
    return _cast(w, x.dtype).reshape((1,) * axis + w.shape + (1,) * (x.ndim - axis - 1))


def _by_probabilities(x: Tensor, y: Tensor, weight: Tensor | None, reduction: str,
                      smoothing: float) -> Tensor:
    axis = _class_axis(x, "cross_entropy")
    logp = _call("log_softmax", x, axis=axis)
    if smoothing:
        y = y * (1 - smoothing) + smoothing / x.shape[axis]
    weighted = logp * y if weight is None else logp * y * _along_classes(weight, x, "cross_entropy")
    return reduce(-weighted.sum(axis), reduction)


def nll_loss(input: Any, target: Any, weight: Tensor | None = None, ignore_index: int = -100,
             reduction: str = "mean") -> Tensor:
    """-input[target]: the negative log-likelihood of log-probabilities (N, C), (C,) or (N, C, d1, ...).

    The mean is over the targets that are not `ignore_index`, by the weight of their class if given.
    """
    _check("nll_loss", reduction)
    logp, y = wide(_t(input)), _t(target)
    _class_axis(logp, "nll_loss")
    losses = _call("nll", logp, y, ignore_index=int(ignore_index))
    if weight is None:
        return _averaged(losses, y != ignore_index, reduction)
    picked = _weights_of(weight, logp, y, int(ignore_index))
    return _averaged(losses * picked, picked, reduction)


def _averaged(losses: Any, weights: Any, reduction: str) -> Tensor:
    """The losses, their sum, or their sum over that of the weights; 16-bit floats average in float32."""
    if reduction != "mean":
        return reduce(losses, reduction)
    wide = "float32" if losses.dtype.itemsize == 2 else losses.dtype
    total = weights.sum() if weights.dtype.kind == "b" else _cast(weights, wide).sum()
    return _cast(_cast(losses, wide).sum() / _cast(total, wide), losses.dtype)


def _cast(x: Any, dtype: Any) -> Any:
    return x if x.dtype == dtype else x.astype(dtype)


def _weights_of(weight: Any, logp: Tensor, y: Tensor, ignore_index: int) -> Tensor:
    """weight[target], 0 for ignored targets: what nll picks of the negated weights."""
    w = _along_classes(weight, logp, "nll_loss").detach()
    return _call("nll", broadcast_to(-w, logp.shape), y, ignore_index=ignore_index)


def _smoothed(logp: Tensor, y: Tensor, weight: Tensor | None, ignore_index: int, reduction: str,
              smoothing: float) -> Tensor:
    """(1 - s) * nll + s / C * sum over classes, as torch defines it together with class weights."""
    axis = _class_axis(logp, "cross_entropy")
    weighted = logp if weight is None else logp * _along_classes(weight, logp, "cross_entropy")
    counted = y != ignore_index
    uniform = where(counted, -weighted.sum(axis), 0.0)
    plain = nll_loss(logp, y, weight, ignore_index, "none")
    losses = plain * (1 - smoothing) + uniform * (smoothing / logp.shape[axis])
    weights = counted if weight is None else _weights_of(weight, logp, y, ignore_index)
    return _averaged(losses, weights, reduction)


def binary_cross_entropy_with_logits(input: Any, target: Any, weight: Tensor | None = None,
                                     reduction: str = "mean", pos_weight: Tensor | None = None) -> Tensor:
    """-(y log sigmoid(x) + (1 - y) log(1 - sigmoid(x))), without overflow; `pos_weight` multiplies the first
    term.
    """
    name = "binary_cross_entropy_with_logits"
    _check(name, reduction)
    x, y = wide(_t(input)), wide(_t(target))
    if x.shape != y.shape:
        raise ShapeError(f"{name}: input {x.shape} and target {y.shape} must have one shape")
    if not is_floating(y.dtype):
        raise DTypeError(f"{name}: targets are probabilities of a floating dtype, got {y.dtype}; cast them "
                         f"with astype")
    # -log sigmoid(x) = softplus(-x). Beyond 1e4, softplus(x) is x in every dtype, so that threshold is exact.
    positive = _call("softplus", -x, threshold=1e4)
    if pos_weight is None:
        loss = x * (1 - y) + positive
    else:
        loss = x * (1 - y) + positive * (y * (pos_weight - 1) + 1)
    return reduce(loss if weight is None else loss * weight, reduction)


# --- regression -----------------------------------------------------------------------------------------

def _difference(name: str, input: Any, target: Any, reduction: str) -> Tensor:
    _check(name, reduction)
    return wide(_t(input)) - wide(_t(target))


def mse_loss(input: Any, target: Any, reduction: str = "mean") -> Tensor:
    """(input - target)^2; shapes broadcast."""
    return reduce(_difference("mse_loss", input, target, reduction).square(), reduction)


def l1_loss(input: Any, target: Any, reduction: str = "mean") -> Tensor:
    """|input - target|; shapes broadcast."""
    return reduce(_difference("l1_loss", input, target, reduction).abs(), reduction)


def smooth_l1_loss(input: Any, target: Any, reduction: str = "mean", beta: float = 1.0) -> Tensor:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = input - target; shapes broadcast."""
    if beta < 0:
        raise ValueError(f"smooth_l1_loss: beta is {beta}; it is a distance, use 0 or more")
    if beta == 0:
        return l1_loss(input, target, reduction)
    d = _difference("smooth_l1_loss", input, target, reduction)
    size = d.abs()
    return reduce(where(size < beta, d.square() * (0.5 / beta), size - 0.5 * beta), reduction)


def huber_loss(input: Any, target: Any, reduction: str = "mean", delta: float = 1.0) -> Tensor:
    """d^2 / 2 where |d| < delta, else delta (|d| - delta / 2), with d = input - target; shapes broadcast."""
    if delta <= 0:
        raise ValueError(f"huber_loss: delta is {delta}; it is a distance, use more than 0")
    d = _difference("huber_loss", input, target, reduction)
    size = d.abs()
    return reduce(where(size < delta, d.square() * 0.5, (size - 0.5 * delta) * delta), reduction)


__all__ = ["binary_cross_entropy_with_logits", "cross_entropy", "huber_loss", "l1_loss", "mse_loss",
           "nll_loss", "smooth_l1_loss"]
