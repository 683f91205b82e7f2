"""Softmax, classification losses and dropout: rows with a fused kernel and a derivative of their own.

Sums inside a row (softmax's, a sample's loss) run along the class dimension, which is never split; 16-bit
floats are accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.kernels import loss as cuda_loss
from meshtape.runtime.cuda.kernels import softmax as cuda_softmax
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import ALPHABET, REQUIRED, Axes, Op, Sample, normalize_axis, register
from meshtape.runtime.ops.contraction import count_rows, widen
from meshtape.runtime.ops.pointwise import add, exp, mul, negative, not_equal, sub
from meshtape.runtime.ops.reduce import accumulator, sum_
from meshtape.runtime.ops.rules import COMPLEX, floated
from meshtape.runtime.ops.shape import reshape
from meshtape.runtime.rowwise import Rows, row_blocks, unbuffered
from meshtape.runtime.shards import Shape

# --- softmax ----------------------------------------------------------------------------------------

def _axis_shape(name: str) -> Callable[..., list[Shape]]:
    def rule(*shapes: Shape, axis: int) -> list[Shape]:
        normalize_axis(axis, len(shapes[0]), name)
        if len(set(shapes)) > 1:
            raise ShapeError(f"{name}: shapes must be equal, got {' and '.join(map(str, shapes))}")
        return [shapes[0]]
    return rule


def _axis_axes(*shapes: Shape, axis: int) -> Axes:
    whole = normalize_axis(axis, len(shapes[0]))
    names = "".join("." if d == whole else ALPHABET[d] for d in range(len(shapes[0])))
    return Axes((names,) * len(shapes), (names,))


def _along(rowwise: Callable[..., None]) -> Callable[..., Any]:
    """A kernel over any axis from `rowwise(of, out, *rows)`, which fills `out` (rows, width) from equal
    arrays; `of` is their Rows."""
    def kernel(xp: Any, *arrays: Any, axis: int) -> Any:
        dtype, shape = arrays[0].dtype, arrays[0].shape
        turned = [widen(a) if a.ndim == 0 else widen(a).swapaxes(axis, -1) for a in arrays]
        rows = [a.reshape((count_rows(a.shape), a.shape[-1]) if shape else (1, 1)) for a in turned]
        out = xp.empty(rows[0].shape, rows[0].dtype)
        if out.size:
            of = Rows(xp, out.shape[1], out.dtype)
            with unbuffered(xp, of.width):
                for block in row_blocks(xp, out.shape):
                    rowwise(of, out[block], *(r[block] for r in rows))
        out = out.reshape(turned[0].shape).astype(dtype, copy=False)
        return out.swapaxes(axis, -1) if shape else out
    return kernel


# Sums of exp(x) between which rounding x - log(sum) costs no more than that of log(number of classes) does.
NEAR_ONE = (2.0 ** -16, 2.0 ** 16)


def exponentials(of: Rows, x: Any, out: Any) -> tuple[Any, Any]:
    """Fills `out` with exp(x - top); returns the sum of every row, and top: the row's maximum, or None for 0.

    A maximum takes as long as exp does, so 0 is tried first: the sums tell whether it will do. On a device,
    whose stream would have to be waited for, it is not tried.
    """
    xp = of.xp
    if xp is np:
        np.exp(x, out=out)
        total = of.sums(out)
        if total.min() > NEAR_ONE[0] and total.max() < NEAR_ONE[1]:
            return total, None
    top = x[xp.arange(len(x)), x.argmax(axis=-1)]       # NumPy's argmax has vector code for short rows
    of.shift(x, -top, out=out)
    xp.exp(out, out=out)
    return of.sums(out), top


def _softmax_rows(of: Rows, out: Any, x: Any) -> None:
    total, _ = exponentials(of, x, out)
    of.scale(out, 1 / total, out=out)


def _log_softmax_rows(of: Rows, out: Any, x: Any) -> None:
    total, top = exponentials(of, x, out)
    if top is None:
        of.shift(x, -of.xp.log(total), out=out)
    else:
        of.shift(x, -top, out=out)
        of.shift(out, -of.xp.log(total), out=out)


def _softmax_grad_rows(of: Rows, out: Any, g: Any, y: Any) -> None:
    of.xp.multiply(g, y, out=out)
    of.shift(g, -of.sums(out), out=out)
    out *= y


def _log_softmax_grad_rows(of: Rows, out: Any, g: Any, y: Any) -> None:
    of.xp.exp(y, out=out)
    of.scale(out, -of.sums(g), out=out)
    out += g


def _softmax_samples(inputs: int) -> Callable[[], list[Sample]]:
    cases = [((5,), 0), ((5, 3), 0), ((5, 3), -1), ((2, 4, 3), 1), ((2, 0, 0), -1), ((), 0), ((0, 3), 1),
             ((1, 1), 0)]
    return lambda: [Sample((shape,) * inputs, {"axis": axis}, low=-5, high=5) for shape, axis in cases]


def _rowwise(name: str, rowwise: Callable[..., None], inputs: int, **columns: Any) -> Op:
    return register(Op(
        name, kernel=_along(rowwise), attrs={"axis": -1}, shape=_axis_shape(name),
        dtype=floated(COMPLEX)(name), axes=_axis_axes, samples=_softmax_samples(inputs), **columns))


softmax: Op = _rowwise("softmax", _softmax_rows, 1, keeps="out", autocast="float32",
                   device=cuda_softmax.softmax,
                   vjp=(lambda g, out, x, axis: softmax_grad(g, out, axis=axis),))
log_softmax: Op = _rowwise("log_softmax", _log_softmax_rows, 1, keeps="out", autocast="float32",
                       device=cuda_softmax.log_softmax,
                       vjp=(lambda g, out, x, axis: log_softmax_grad(g, out, axis=axis),))


def _softmax_grad_by_y(u: Any, out: Any, g: Any, y: Any, axis: int) -> Any:
    gy, uy = (sum_(mul(t, y), axis=axis, keepdims=True) for t in (g, u))
    return sub(mul(u, sub(g, gy)), mul(g, uy))


def _log_softmax_grad_by_g(u: Any, out: Any, g: Any, y: Any, axis: int) -> Any:
    return sub(u, sum_(mul(u, exp(y)), axis=axis, keepdims=True))


def _log_softmax_grad_by_y(u: Any, out: Any, g: Any, y: Any, axis: int) -> Any:
    return negative(mul(mul(u, exp(y)), sum_(g, axis=axis, keepdims=True)))


# y * (g - sum(g * y)), with y the softmax: the Jacobian is symmetric, so its product with a vector is itself.
softmax_grad: Op = _rowwise(
    "softmax_grad", _softmax_grad_rows, 2, linear=((0,),), keeps="arrays",
    device=cuda_softmax.softmax_grad,
    vjp=(lambda u, out, g, y, axis: softmax_grad(u, y, axis=axis), _softmax_grad_by_y))
# g - exp(y) * sum(g), with y the log-softmax.
log_softmax_grad: Op = _rowwise(
    "log_softmax_grad", _log_softmax_grad_rows, 2, linear=((0,),), keeps="arrays",
    device=cuda_softmax.log_softmax_grad,
    vjp=(_log_softmax_grad_by_g, _log_softmax_grad_by_y))


# --- class indices ----------------------------------------------------------------------------------
# Classes lie along dimension 1, or 0 of a single sample. `ignore_index` marks samples that do not count.

def class_axis(ndim: int) -> int:
    return min(1, ndim - 1)


def target_dtype(name: str, target: Any) -> Any:
    if dtypes.kind(target) != 1:
        given = target.__name__ if isinstance(target, type) else np.dtype(target).name
        raise DTypeError(f"{name}: targets are class indices of an integer dtype, got {given}; "
                         "cast them with astype, or give probabilities of the logits' shape")
    return target


def _target_shape(name: str, x: Shape, target: Shape) -> None:
    if not x or target != x[:class_axis(len(x))] + x[class_axis(len(x)) + 1:]:
        raise ShapeError(f"{name}: classes lie along dimension {class_axis(max(1, len(x)))} of the input, "
                         f"and the target has the other dimensions, got input {x} and target {target}")


def _class_letters(ndim: int) -> tuple[str, str]:
    """Letters of the input and of the target."""
    axis = class_axis(ndim)
    names = ALPHABET[:ndim - 1]
    return names[:axis] + "." + names[axis:], names


def _class_rows(xp: Any, x: Any) -> Any:
    """`x` as (samples, classes); a view where classes are last already."""
    if x.ndim != 2:
        x = xp.moveaxis(x, class_axis(x.ndim), -1)
    return x.reshape(count_rows(x.shape), x.shape[-1])


def _from_class_rows(xp: Any, rows: Any, target: Any) -> Any:
    if target.ndim == 1:
        return rows
    return xp.moveaxis(rows.reshape(*target.shape, rows.shape[1]), -1, class_axis(target.ndim + 1))


def _counted(xp: Any, name: str, target: Any, classes: int, ignore_index: int) -> tuple[Any, Any]:
    """(index, valid): flat class indices, 0 where ignored, and a mask of the samples that count.

    Raises IndexError for a target out of range, but on a device: looking at values would stop its stream.
    """
    target = target.reshape(-1)
    valid = target != ignore_index
    index = xp.where(valid, target, 0)
    if xp is np and index.size and not (index.min() >= 0 and index.max() < max(classes, 1)):
        bad = index[(index < 0) | (index >= classes)][0]
        raise IndexError(f"{name}: target {bad} is not one of {classes} classes; use 0 to {classes - 1}, or "
                         f"ignore_index={ignore_index} for samples that do not count")
    return index, valid


# --- negative log-likelihood --------------------------------------------------------------------------

def _nll_shape(logp: Shape, target: Shape, ignore_index: int) -> list[Shape]:
    _target_shape("nll", logp, target)
    return [target]


def _nll_axes(logp: Shape, target: Shape, ignore_index: int) -> Axes:
    x, t = _class_letters(len(logp))
    return Axes((x, t), (t,))


def _nll(xp: Any, logp: Any, target: Any, ignore_index: int) -> Any:
    rows = _class_rows(xp, logp)
    index, valid = _counted(xp, "nll", target, rows.shape[1], ignore_index)
    losses = xp.where(valid, -rows[xp.arange(len(index)), index], 0)
    return losses.astype(logp.dtype, copy=False).reshape(target.shape)


def _nll_dtype(logp: Any, target: Any, ignore_index: int) -> tuple[list[Any], list[Any]]:
    found = floated(COMPLEX)("nll")(logp)[1][0]
    return [found, target_dtype("nll", target)], [found]


def _nll_grad(xp: Any, g: Any, target: Any, classes: int, ignore_index: int) -> Any:
    index, valid = _counted(xp, "nll", target, classes, ignore_index)
    rows = xp.zeros((len(index), classes), g.dtype)
    rows[xp.arange(len(index)), index] = xp.where(valid, -g.reshape(-1), 0)
    return _from_class_rows(xp, rows, target) if target.ndim else rows[0]


def _nll_grad_shape(g: Shape, target: Shape, classes: int, ignore_index: int) -> list[Shape]:
    if g != target:
        raise ShapeError(f"nll_grad: shapes must be equal, got {g} and {target}")
    axis = class_axis(len(target) + 1)
    return [(*target[:axis], classes, *target[axis:])]


def _nll_grad_axes(g: Shape, target: Shape, classes: int, ignore_index: int) -> Axes:
    x, t = _class_letters(len(target) + 1)
    return Axes((t, t), (x,))


def _target_cases() -> list[tuple[Shape, Any]]:
    return [((6, 4), np.array([0, 3, 1, 2, 2, -100])), ((4,), np.array(2)), ((0, 3), np.zeros(0, np.int64)),
            ((2, 3, 5), np.arange(10).reshape(2, 5) % 3), ((1, 3), np.array([1], np.int32)),
            ((2, 3, 2, 2), np.array([[[0, 1], [2, -100]], [[1, 1], [-100, 0]]])),
            ((3, 2), np.array([-100, -100, -100]))]


nll: Op = register(Op(
    "nll", kernel=_nll, attrs={"ignore_index": -100}, shape=_nll_shape, dtype=_nll_dtype, axes=_nll_axes,
    linear=((0,),), keeps="target", autocast="float32",
    device=cuda_loss.nll,
    vjp=(lambda g, out, logp, target, ignore_index: nll_grad(
        g, target, classes=logp.shape[class_axis(logp.ndim)], ignore_index=ignore_index), None),
    samples=lambda: [Sample((x, t)) for x, t in _target_cases()] + [
        Sample(((3, 3), np.array([0, 1, 2])), {"ignore_index": 1})]))
nll_grad: Op = register(Op(
    "nll_grad", kernel=_nll_grad, attrs={"classes": REQUIRED, "ignore_index": -100}, shape=_nll_grad_shape,
    dtype=lambda g, target, **attrs: ([g, target], [g]), axes=_nll_grad_axes, linear=((0,),), keeps="target",
    device=cuda_loss.nll_grad,
    vjp=(lambda u, out, g, target, classes, ignore_index: nll(u, target, ignore_index=ignore_index), None),
    samples=lambda: [Sample((t.shape, t), {"classes": x[class_axis(len(x))]}) for x, t in _target_cases()]))


# --- cross-entropy ----------------------------------------------------------------------------------

LOSS_ATTRS: dict[str, Any] = {"ignore_index": -100, "label_smoothing": 0.0}


def _cross_entropy_shape(logits: Shape, target: Shape, **attrs: Any) -> list[Shape]:
    _target_shape("cross_entropy", logits, target)
    return [(), (), logits]


def _cross_entropy_dtype(logits: Any, target: Any, **attrs: Any) -> tuple[list[Any], list[Any]]:
    found = floated(COMPLEX)("cross_entropy")(logits)[1][0]
    total = accumulator(found)
    return [found, target_dtype("cross_entropy", target)], [total, total, found]


def _cross_entropy_axes(logits: Shape, target: Shape, **attrs: Any) -> Axes:
    x, t = _class_letters(len(logits))
    return Axes((x, t), ("", "", x))


def _cross_entropy(xp: Any, logits: Any, target: Any, ignore_index: int, label_smoothing: float) -> Any:
    """One exp per logit: the probabilities that backward needs are left over from the normalization."""
    rows = _class_rows(xp, widen(logits))
    index, valid = _counted(xp, "cross_entropy", target, rows.shape[1], ignore_index)
    p = xp.empty(rows.shape, rows.dtype)
    losses = xp.zeros(len(rows), rows.dtype)
    if p.size:
        of = Rows(xp, p.shape[1], p.dtype)
        with unbuffered(xp, of.width):
            for block in row_blocks(xp, p.shape):
                losses[block] = _loss_rows(of, p[block], rows[block], index[block], label_smoothing)
    total = xp.where(valid, losses, 0).sum()
    count = valid.sum().astype(rows.dtype)
    p = _from_class_rows(xp, p, target).reshape(logits.shape)
    return total, count, p.astype(logits.dtype, copy=False)


def _loss_rows(of: Rows, p: Any, x: Any, index: Any, label_smoothing: float) -> Any:
    """Fills `p` with the rows' softmax and returns the loss of each row."""
    xp = of.xp
    total, top = exponentials(of, x, p)
    of.scale(p, 1 / total, out=p)
    picked = x[xp.arange(len(index)), index]
    if label_smoothing:
        picked = (1 - label_smoothing) * picked + label_smoothing / of.width * of.sums(x)
    return xp.log(total) - (picked if top is None else picked - top)


def _cross_entropy_vjp(g: Any, out: Any, logits: Any, target: Any, **attrs: Any) -> Any:
    by_total, _, by_p = g
    p = out[2]
    first = None if by_total is None else cross_entropy_grad(by_total, p, target, **attrs)
    second = None if by_p is None else softmax_grad(by_p, p, axis=class_axis(p.ndim))
    return first if second is None else second if first is None else add(first, second)


def _cross_entropy_samples() -> list[Sample]:
    return ([Sample((x, t)) for x, t in _target_cases()]
            + [Sample((x, t), {"label_smoothing": 0.3}) for x, t in _target_cases()[:3]]
            + [Sample(((4, 3), np.array([0, 1, 2, 1])), {"ignore_index": 1})])


# Outputs: the sum of the losses and the number of targets that count (both float32 or wider, so that 16-bit
# floats do not overflow), and the probabilities softmax(logits), which backward keeps. The mean loss is their
# quotient; as both are Partial under a split batch, one small all-reduce finishes them. The count has no
# derivative: detach it.
cross_entropy: Op = register(Op(
    "cross_entropy", kernel=_cross_entropy, attrs=LOSS_ATTRS, shape=_cross_entropy_shape,
    dtype=_cross_entropy_dtype, axes=_cross_entropy_axes, n_out=3, keeps="target out2",
    autocast="float32",
    device=cuda_loss.cross_entropy,
    vjp=(_cross_entropy_vjp, None), samples=_cross_entropy_samples))


# How many targets count, again: where a batch is split, cross-entropy's own count would have to be reduced
# between forward and backward, while this one needs no logits and is reduced before forward begins.
target_count: Op = register(Op(
    "target_count", attrs={"ignore_index": -100, "dtype": "float32"},
    kernel=lambda xp, target, ignore_index, dtype: xp.asarray(
        xp.count_nonzero(target != ignore_index), dtypes.canonical(dtype)),
    shape=lambda target, **attrs: [()],
    dtype=lambda target, ignore_index, dtype: (
        [target_dtype("target_count", target)], [dtypes.canonical(dtype)]),
    axes=lambda target, **attrs: Axes((_class_letters(len(target) + 1)[1],), ("",)),
    samples=lambda: [Sample((t,), diff=False) for _, t in _target_cases()]))


def _cross_entropy_grad_shape(g: Shape, p: Shape, target: Shape, **attrs: Any) -> list[Shape]:
    _target_shape("cross_entropy_grad", p, target)
    if g:
        raise ShapeError(f"cross_entropy_grad: the gradient of a sum of losses is one number, got shape {g}")
    return [p]


def _cross_entropy_grad_dtype(g: Any, p: Any, target: Any, **attrs: Any) -> tuple[list[Any], list[Any]]:
    return [g if isinstance(g, type) else accumulator(p), p, target], [p]


def _cross_entropy_grad_axes(g: Shape, p: Shape, target: Shape, **attrs: Any) -> Axes:
    x, t = _class_letters(len(p))
    return Axes(("", x, t), (x,))


def _cross_entropy_grad(xp: Any, g: Any, p: Any, target: Any, ignore_index: int,
                        label_smoothing: float) -> Any:
    """g * (p - q) with q the (smoothed) one-hot target; 0 for ignored samples."""
    rows = _class_rows(xp, p)
    index, valid = _counted(xp, "cross_entropy", target, rows.shape[1], ignore_index)
    scale = xp.multiply(valid, g, dtype=accumulator(p.dtype))
    out = Rows(xp, rows.shape[1], scale.dtype).scale(widen(rows), scale)
    if label_smoothing:
        out -= (label_smoothing / rows.shape[1] * scale)[:, None]
    out[xp.arange(len(index)), index] -= (1 - label_smoothing) * scale
    return _from_class_rows(xp, out, target).astype(p.dtype, copy=False).reshape(p.shape)


def _cross_entropy_grad_by_g(u: Any, out: Any, g: Any, p: Any, target: Any, **attrs: Any) -> Any:
    return sum_(mul(u, cross_entropy_grad(1.0, p, target, **attrs)))


def _cross_entropy_grad_by_p(u: Any, out: Any, g: Any, p: Any, target: Any, ignore_index: int,
                             **attrs: Any) -> Any:
    axis = class_axis(p.ndim)
    valid = reshape(not_equal(target, ignore_index), shape=(*p.shape[:axis], 1, *p.shape[axis + 1:]))
    return mul(mul(u, valid), g)


cross_entropy_grad: Op = register(Op(
    "cross_entropy_grad", kernel=_cross_entropy_grad, attrs=LOSS_ATTRS, shape=_cross_entropy_grad_shape,
    dtype=_cross_entropy_grad_dtype, axes=_cross_entropy_grad_axes, linear=((0,),), keeps="g p target",
    device=cuda_loss.cross_entropy_grad,
    vjp=(_cross_entropy_grad_by_g, _cross_entropy_grad_by_p, None),
    samples=lambda: [Sample(((), *s.inputs), s.attrs, low=0.1, high=1) for s in _cross_entropy_samples()]))
