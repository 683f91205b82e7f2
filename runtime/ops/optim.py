"""Optimizer updates: one instruction for all parameters of a model.

Inputs are the hyperparameters as Python scalars (so that a schedule changes no program), then n parameters, n
gradients and n of each state; outputs are n new parameters and n of each new state. Nothing is updated in
place. Every tensor has its own letters, which a parameter shares with its gradient and its states: n_out is
-1, so each parameter is updated where its shards lie, whatever the layouts of the others. The arithmetic is
that of torch.optim's single-tensor functions.

`step` counts from 1; step 0 changes nothing. What depends on values that only the workers know (steps are not
taken when gradients overflowed) may be a tensor of shape () instead of a number: step (int64), and dampening.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from typing import Any

import numpy as np

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.kernels import optim as device_kernels
from meshtape.runtime.errors import DTypeError, ShapeError
from meshtape.runtime.op import REQUIRED, Axes, Op, Sample, register
from meshtape.runtime.ops.contraction import widen
from meshtape.runtime.ops.reduce import accumulator
from meshtape.runtime.shards import Shape

CACHED = 32768          # elements of a block that stays in a core's cache while several passes go over it
SMALL = 16384           # elements below which calls cost more than their work: such tensors are joined


def flat_blocks(xp: Any, size: int) -> Iterator[slice]:
    """Runs of elements that several passes go over while they are in cache; all at once on a device."""
    step = CACHED if xp is np else max(1, size)
    return (slice(at, at + step) for at in range(0, size, step))


def own_letters(shapes: Sequence[Shape], n: int) -> tuple[str, ...]:
    """Letters of tensors of which every n-th has the same: unlike an alphabet, they do not run out."""
    found, code = [], 0x100
    for shape in shapes[:n]:
        found.append("".join(chr(code + d) for d in range(len(shape))))
        code += len(shape)
    return tuple(found[k % n] for k in range(len(shapes)))


# --- rules that the updates share -----------------------------------------------------------------------

def _columns(name: str, scalars: int, states: Callable[..., int]) -> dict[str, Any]:
    """Shape, dtype and axes rules of an update with so many scalars; `states(**attrs)` per parameter."""
    def shape(*shapes: Shape, n: int, **attrs: Any) -> list[Shape]:
        tensors, groups = shapes[scalars:], 2 + states(**attrs)
        if len(tensors) != groups * n:
            raise ShapeError(f"{name}: needs {groups} tensors for each of {n} parameters, got {len(tensors)}")
        for k, found in enumerate(tensors):
            if found != tensors[k % n]:
                raise ShapeError(f"{name}: parameter {k % n} has shape {tensors[k % n]}, but its gradient or "
                                 f"state has {found}; all must agree")
        return [*tensors[:n], *tensors[2 * n:]]

    def dtype(*given: Any, n: int, **attrs: Any) -> tuple[list[Any], list[Any]]:
        tensors = given[scalars:]
        for d in tensors[:n]:
            if not dtypes.is_floating(d):
                raise DTypeError(f"{name}: parameters must be floating, got {d}")
        met = [tensors[k % n] for k in range(len(tensors))]
        return [*given[:scalars], *met], [*met[:n], *met[2 * n:]]

    def axes(*shapes: Shape, n: int, **attrs: Any) -> Axes:
        named = own_letters(shapes[scalars:], n)
        return Axes(("",) * scalars + named, (*named[:n], *named[2 * n:]), combine="")

    return {"shape": shape, "dtype": dtype, "axes": axes, "n_out": -1}


def _packs(params: Sequence[Any]) -> list[list[int]]:
    """Which parameters are updated as one array: small ones of a dtype together, each large one alone."""
    small: dict[Any, list[int]] = {}
    large = []
    for k, p in enumerate(params):
        if p.size <= SMALL:
            small.setdefault(p.dtype, []).append(k)
        else:
            large.append([k])
    return [*small.values(), *large]


def _joined(xp: Any, tensors: Sequence[Any]) -> Any:
    """The elements of all tensors in one flat array, 16-bit floats as float32."""
    flat = [t.reshape(-1) for t in tensors]
    return widen(flat[0] if len(flat) == 1 else xp.concatenate(flat))


def _update_all(xp: Any, tensors: Sequence[Any], n: int, groups: int,
                update: Callable[[list[Any], list[Any]], None], out: Sequence[Any] | None) -> list[Any]:
    """Call `update(new, old)` on cache-sized flat blocks of every parameter and what belongs to it.

    `old` is [parameter, gradient, *states], `new` is [parameter, *states]; they may share memory, as they do
    where `out` names arrays to write to.
    """
    results: list[Any] = [None] * (groups - 1) * n
    for pack in _packs(tensors[:n]):
        old = [_joined(xp, [tensors[k + i * n] for k in pack]) for i in range(groups)]
        new = [_target(xp, None if out is None or len(pack) > 1 else out[pack[0] + i * n], old[0])
               for i in range(groups - 1)]
        for block in flat_blocks(xp, old[0].size):
            update([a[block] for a in new], [a[block] for a in old])
        at = 0
        for k in pack:
            p = tensors[k]
            for i, a in enumerate(new):
                results[k + i * n] = a[at:at + p.size].reshape(p.shape).astype(p.dtype, copy=False)
            at += p.size
    return results


def _unchanged(xp: Any, tensors: Sequence[Any], n: int, out: Sequence[Any] | None) -> list[Any]:
    """The results of an update that is left out: arrays of their own with the old values."""
    old = [*tensors[:n], *tensors[2 * n:]]
    return [x if x is given else xp.array(x) for x, given in zip(old, out or [None] * len(old), strict=True)]


def _target(xp: Any, given: Any, like: Any) -> Any:
    """A flat array to write to: `given` itself if it is laid out flat and of the dtype that is computed in.
    """
    if given is not None and given.flags.c_contiguous and given.dtype == like.dtype:
        return given.reshape(-1)
    return xp.empty_like(like)


def _over(scalars: int, gradients: int) -> Callable[[int, dict[str, Any]], list[tuple[int, int]]]:
    """A parameter's result may be written over the parameter, a state's over the state: all but gradients."""
    def over(inputs: int, attrs: dict[str, Any]) -> list[tuple[int, int]]:
        n = attrs["n"]
        tensors = [k for k in range(inputs - scalars) if not n <= k < n * (1 + gradients)]
        return [(out, scalars + k) for out, k in enumerate(tensors)]
    return over


class Scratch:
    """Temporaries that are made once for blocks of one size and dtype."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.kept: dict[Any, Any] = {}

    def __call__(self, number: int, like: Any) -> Any:
        key = number, like.dtype, like.size
        if key not in self.kept:
            self.kept[key] = self.xp.empty_like(like)
        return self.kept[key]


# --- SGD --------------------------------------------------------------------------------------------

def _sgd(xp: Any, step: Any, dampening: Any, lr: float, momentum: float, weight_decay: float, *tensors: Any,
         n: int, nesterov: bool, maximize: bool, has_momentum: bool, out: Any = None) -> list[Any]:
    """On the first step torch's buffer is the gradient itself: a buffer of zeros and a dampening of 0."""
    if not step:
        return _unchanged(xp, tensors, n, out)
    dampening = float(dampening)        # may be a tensor, as the step
    scratch = Scratch(xp)

    def update(new: list[Any], old: list[Any]) -> None:
        p, g = old[:2]
        t = scratch(0, p)
        if maximize:
            g = xp.negative(g, out=scratch(1, p))
        if weight_decay:
            g = xp.add(g, xp.multiply(p, weight_decay, out=t), out=scratch(1, p))
        if has_momentum:
            buffer = xp.multiply(old[2], momentum, out=new[1])
            buffer += xp.multiply(g, 1 - dampening, out=t) if dampening else g
            g = xp.add(g, xp.multiply(buffer, momentum, out=t), out=scratch(1, p)) if nesterov else buffer
        xp.add(p, xp.multiply(g, -lr, out=t), out=new[0])

    return _update_all(xp, tensors, n, 3 if has_momentum else 2, update, out)


sgd_update: Op = register(Op(
    "sgd_update", kernel=_sgd, over=_over(5, 1), device=device_kernels.SGD_UPDATE,
    attrs={"n": REQUIRED, "nesterov": False, "maximize": False, "has_momentum": False},
    **_columns("sgd_update", 5, lambda has_momentum, **attrs: int(has_momentum)),
    samples=lambda: [
        Sample((2, 0.1, 0.1, 0.9, 0.01, *((5, 3), (4,)) * 3), {"n": 2, "has_momentum": True}, diff=False),
        Sample((1, 0.0, 0.1, 0.9, 0.0, *((), (7,)) * 3),
               {"n": 2, "has_momentum": True, "nesterov": True, "maximize": True}, diff=False),
        Sample((np.array(3), 0.0, 0.1, 0.9, 0.1, (5, 3), (5, 3), (5, 3)), {"n": 1, "has_momentum": True},
               diff=False),
        Sample((np.array(0), 0.0, 0.1, 0.0, 0.1, *((0, 3), (1, 3)) * 2), {"n": 2, "maximize": True},
               diff=False)]))


# --- Adam and AdamW ---------------------------------------------------------------------------------

def _adam(
    xp: Any,
    step: Any,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    *tensors: Any,
    n: int,
    decoupled: bool,
    amsgrad: bool,
    maximize: bool,
    out: Any = None,
) -> list[Any]:
    """With c = sqrt(1 - beta2**step), the update lr / (1 - beta1**step) * m / (sqrt(v)
    / c + eps) is computed as (lr * c / (1 - beta1**step)) * m / (sqrt(v) + eps * c): one pass less."""
    step = int(step)
    if not step:
        return _unchanged(xp, tensors, n, out)
    correction = sqrt(1 - beta2**step)
    rate, floor = lr * correction / (1 - beta1**step), eps * correction
    scratch = Scratch(xp)

    def update(new: list[Any], old: list[Any]) -> None:
        p, g, m, v = old[:4]
        out, new_m, new_v = new[:3]
        t = scratch(0, p)
        if maximize:
            g = xp.negative(g, out=scratch(1, p))
        if weight_decay and decoupled:
            p = xp.multiply(p, 1 - lr * weight_decay, out=out)
        elif weight_decay:
            g = xp.add(g, xp.multiply(p, weight_decay, out=t), out=scratch(1, p))
        xp.subtract(g, m, out=t)
        t *= 1 - beta1
        xp.add(m, t, out=new_m)
        xp.multiply(g, g, out=t)
        t *= 1 - beta2
        xp.multiply(v, beta2, out=new_v)
        new_v += t
        xp.sqrt(xp.maximum(old[4], new_v, out=new[3]) if amsgrad else new_v, out=t)
        t += floor
        xp.divide(new_m, t, out=t)
        t *= rate
        xp.subtract(p, t, out=out)

    return _update_all(xp, tensors, n, 5 if amsgrad else 4, update, out)


def _adam_samples() -> list[Sample]:
    several: list[Shape] = [(5, 3), (4,), (), (0, 2)]
    found = []
    cases = [{}, {"decoupled": True}, {"amsgrad": True}, {"decoupled": True, "maximize": True}]
    for k, flags in enumerate(cases):
        for shapes in (several, several[:1]):
            rng = np.random.default_rng(k)
            squares = [np.asarray(rng.uniform(0, 1, s)) for s in shapes]
            inputs = (*shapes, *shapes, *shapes, *squares, *(squares if "amsgrad" in flags else ()))
            found.append(Sample((3, 1e-2, 0.9, 0.99, 1e-8, 0.1, *inputs), {"n": len(shapes), **flags},
                                diff=False))
    for step in (0, 2):
        found.append(Sample((np.array(step), 1e-2, 0.9, 0.99, 1e-8, 0.1, (5,), (5,), (5,),
                             np.linspace(0, 1, 5)), {"n": 1}, diff=False))
    return found


adam_update: Op = register(Op(
    "adam_update", kernel=_adam, over=_over(6, 1), device=device_kernels.ADAM_UPDATE,
    attrs={"n": REQUIRED, "decoupled": False, "amsgrad": False, "maximize": False},
    **_columns("adam_update", 6, lambda amsgrad, **attrs: 3 if amsgrad else 2), samples=_adam_samples))


# --- clipping ---------------------------------------------------------------------------------------

def _sum_of_squares(xp: Any, *tensors: Any) -> Any:
    total = xp.zeros((), accumulator(tensors[0].dtype))
    for t in tensors:
        flat = widen(t).reshape(-1)
        total = total + xp.dot(flat, flat)
    return total


def _squares_dtype(*given: Any) -> tuple[list[Any], list[Any]]:
    for d in given:
        if not dtypes.is_floating(d):
            raise DTypeError(f"sum_of_squares: takes floating tensors, got {d}; cast them with astype first")
    met = dtypes.promote(*given)
    return list(given), [accumulator(met)]


def _squares_axes(*shapes: Shape) -> Axes:
    """One tensor may be split, and gives Partial sums. Several are whole: a worker cannot tell which of them
    the others count as well."""
    return Axes(own_letters(shapes, len(shapes)), ("",), combine="sum" if len(shapes) == 1 else "")


# The squared 2-norm of all tensors together, for clipping gradients by their norm. The square of a sum is not
# the sum of squares, so a Partial input is reduced first. Sharded tensors are best given one by one.
sum_of_squares: Op = register(Op(
    "sum_of_squares", kernel=_sum_of_squares, shape=lambda *shapes: [()], dtype=_squares_dtype,
    axes=_squares_axes, device=device_kernels.SUM_OF_SQUARES,
    samples=lambda: [Sample(((5, 3), (4,), ()), diff=False), Sample(((5, 3),), diff=False),
                     Sample(((0, 3), (1,)), diff=False)]))


# --- loss scaling -----------------------------------------------------------------------------------

def _nonfinite(xp: Any, *tensors: Any) -> Any:
    found = xp.zeros((), xp.bool_)
    for t in tensors:
        found = found | ~xp.isfinite(widen(t)).all()
    return xp.asarray(found, xp.float32)


def _nonfinite_dtype(*given: Any) -> tuple[list[Any], list[Any]]:
    for d in given:
        if not dtypes.is_floating(d):
            raise DTypeError(f"nonfinite: takes floating tensors, got {d}")
    return list(given), [dtypes.float32]


def _nonfinite_samples() -> list[Sample]:
    bad = [np.array([[1.0, value, 0.0], [2.0, 3.0, 4.0]]) for value in (np.inf, -np.inf, np.nan)]
    return [Sample(((5, 3), (4,), ()), diff=False), Sample(((0, 3), (1,)), diff=False),
            *(Sample((x,), diff=False) for x in bad), Sample((bad[0], (3,), bad[2]), diff=False)]


# Above 0 if an element of any tensor is infinite or NaN, else 0. Where one tensor is split, the sum over its
# parts; give several only if they are whole, as for sum_of_squares.
nonfinite: Op = register(Op(
    "nonfinite", kernel=_nonfinite, shape=lambda *shapes: [()], dtype=_nonfinite_dtype, axes=_squares_axes,
    device=device_kernels.NONFINITE, samples=_nonfinite_samples))


def _update_scale(xp: Any, found: Any, scale: Any, streak: Any, growth: float, backoff: float,
                  interval: int) -> Any:
    longer = streak + 1
    grown = scale * growth
    grows = xp.equal(longer, interval)
    up = xp.where(grows & xp.isfinite(grown), grown, scale)
    bad = found > 0
    return (xp.where(bad, scale * backoff, up).astype(scale.dtype, copy=False),
            xp.where(bad | grows, 0, longer).astype(streak.dtype, copy=False))


# A loss scale after a step, and the number of steps in a row in which nothing was found infinite or NaN: the
# scale shrinks when something was, and grows after `interval` steps (torch.amp's _amp_update_scale_).
update_scale: Op = register(Op(
    "update_scale", kernel=_update_scale, shape=lambda *shapes: [(), ()], n_out=2,
    dtype=lambda found, scale, streak, *rest: ([found, scale, streak, *rest], [scale, streak]),
    axes=lambda *shapes: Axes(("",) * 6, ("", ""), combine=""),
    samples=lambda: [Sample((np.array(found), np.array(scale), np.array(streak), 2.0, 0.5, 4), diff=False)
                     for found in (0.0, 2.0) for streak in (0, 2, 3) for scale in (8.0,)]))
