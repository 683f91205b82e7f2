"""A reverse-mode tape in a page, over NumPy arrays: checks the vjps of rows without scheduler or workers.

An input or output that a row does not keep reaches its vjp as a Spec without values, as on the real tape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from meshtape.runtime.op import Op, lookup


class Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Eager:
    """An array and the call that made it: (op, attrs, inputs, outputs)."""

    requires_grad = True

    def __init__(self, array: Any, made: Any = None) -> None:
        self.array = np.asarray(array)
        self.made = made

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)

    def __mul__(self, other: Any) -> Any:
        return lookup("mul")(self, other)

    def __add__(self, other: Any) -> Any:
        return lookup("add")(self, other)

    def __neg__(self) -> Any:
        return lookup("negative")(self)

    @staticmethod
    def _apply(op: Op, inputs: tuple[Any, ...], packed: tuple[Any, ...]) -> Any:
        attrs = op.unpack(packed)
        inputs = tuple(Eager(x) if isinstance(x, np.ndarray) else x for x in inputs)
        shapes = op.shape(*(x.shape if isinstance(x, Eager) else () for x in inputs), **attrs)
        casts, dtypes = op.dtype(*(x.dtype if isinstance(x, Eager) else type(x) for x in inputs), **attrs)
        arrays = [x.array.astype(c) if isinstance(x, Eager) else x
                  for x, c in zip(inputs, casts, strict=True)]
        made = op.kernel(np, *arrays, **attrs)
        results = made if op.n_out != 1 else [made]
        outs = [Eager(np.asarray(r, d)) for r, d in zip(results, dtypes, strict=True)]
        assert [o.shape for o in outs] == shapes, op.name
        for out in outs:
            out.made = (op, attrs, inputs, outs)
        return outs[0] if op.n_out == 1 else tuple(outs)


def backward(op: Op, attrs: dict[str, Any], inputs: Sequence[Any], outs: Sequence[Eager],
             grads: list[Any]) -> Sequence[Any]:
    """Gradients of the inputs of one call, None where there is none."""
    kept = range(len(inputs)) if op.variadic and op.kept_inputs else op.kept_inputs
    seen = [Spec(x.shape, x.dtype) if isinstance(x, Eager) and i not in kept else x
            for i, x in enumerate(inputs)]
    shown = [o if i in op.kept_outputs else Spec(o.shape, o.dtype) for i, o in enumerate(outs)]
    g, out = (grads[0], shown[0]) if op.n_out == 1 else (tuple(grads), tuple(shown))
    if callable(op.vjp):
        return op.vjp(g, out, *seen, **attrs)
    vjps = op.vjp or (None,) * len(inputs)
    vjps = (*vjps, *[vjps[-1]] * (len(inputs) - len(vjps)))
    wanted = [isinstance(x, Eager) and x.dtype.kind in "fc" for x in inputs]
    return [f(g, out, *seen, **attrs) if f is not None and w else None
            for f, w in zip(vjps, wanted, strict=True)]


def gradients(root: Eager, seed: Eager, wrt: Sequence[Eager]) -> list[Eager]:
    """Gradients of sum(root * seed) by `wrt`, themselves on the tape; zeros where nothing flows."""
    order: list[Eager] = []

    def visit(x: Any) -> None:
        if isinstance(x, Eager) and x not in order:
            for y in x.made[2] if x.made else ():
                visit(y)
            order.append(x)

    visit(root)
    found: dict[int, Any] = {id(root): seed}
    done: set[int] = set()
    for x in reversed(order):
        if x.made is None or id(x.made[3]) in done:
            continue
        op, attrs, inputs, outs = x.made
        done.add(id(outs))
        here = [found.get(id(o)) for o in outs]
        if all(g is None for g in here):
            continue
        for y, g in zip(inputs, backward(op, attrs, inputs, outs, here), strict=True):
            if g is not None and isinstance(y, Eager):
                assert g.shape == y.shape, f"{op.name}: gradient {g.shape} of an input {y.shape}"
                found[id(y)] = g if id(y) not in found else found[id(y)] + g
    return [found.get(id(x), Eager(np.zeros(x.shape))) for x in wrt]


def slope(function: Callable[[], float], array: Any, step: float = 1e-6) -> Any:
    """Central differences of `function()` by every element of `array`, which it reads."""
    out = np.zeros(array.shape)
    for i in np.ndindex(array.shape):
        old = array[i]
        array[i] = old + step
        high = function()
        array[i] = old - step
        out[i] = (high - function()) / (2 * step)
        array[i] = old
    return out


def check_gradients(op: Op, inputs: Sequence[Any], attrs: dict[str, Any]) -> None:
    """The vjp, and the vjp of the vjp by inputs and by the incoming gradient, match finite differences."""
    rng = np.random.default_rng(1)
    leaves = [Eager(x) if isinstance(x, np.ndarray) else x for x in inputs]
    wrt = [x for x in leaves if isinstance(x, Eager) and x.dtype.kind == "f"]

    def run() -> Eager:
        result = op(*leaves, **attrs)
        return result[0] if op.n_out != 1 else result

    seed = Eager(rng.standard_normal(run().shape))
    again = [Eager(rng.standard_normal(x.shape)) for x in wrt]

    def second() -> float:
        return float(sum((g.array * v.array).sum()
                         for g, v in zip(gradients(run(), seed, wrt), again, strict=True)))

    for x, g in zip(wrt, gradients(run(), seed, wrt), strict=True):
        close(g, slope(lambda: float((run().array * seed.array).sum()), x.array), f"{op.name} {attrs}")
    first = gradients(run(), seed, wrt)
    for target in (*wrt, seed):
        total = Eager(np.zeros(target.shape))
        for g, v in zip(first, again, strict=True):
            total = total + gradients(g, v, [target])[0]
        close(total, slope(second, target.array), f"second order of {op.name} {attrs}")


def close(found: Eager, wanted: Any, what: str) -> None:
    np.testing.assert_allclose(found.array, wanted, rtol=1e-5, atol=1e-7, err_msg=what)
