"""Every differentiable row against finite differences, first and second order, through the real tape.

That a row's `keeps` is sufficient shows here as well: what it does not name reaches the vjp without values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from table import make_inputs, samples

import meshtape as mt
from meshtape.autograd import apply
from meshtape.runtime.op import TABLE, Op, Sample

STEP = 1e-6
DIFFERENTIABLE = [name for name, op in TABLE.items() if op.vjp is not None and
                  any(s.diff and np.dtype(s.dtype).kind == "f" for s in samples(op))]


def cases(op: Op) -> list[Sample]:
    """Samples that finite differences can judge: real, smooth, not too large."""
    return [s for s in samples(op) if s.diff and s.dtype == "float64"]


def run(op: Op, sample: Sample, inputs: list[Any]) -> list[mt.Tensor]:
    """The op's floating outputs."""
    outs = apply(op, tuple(inputs), op.pack(sample.attrs))
    outs = outs if isinstance(outs, tuple) else (outs,)
    return [o for o in outs if o.dtype.kind == "f"]


def smooth(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


class Weighted:
    """L(inputs) = sum of outputs times fixed weights, as a number and on the tape."""

    def __init__(self, op: Op, sample: Sample, arrays: list[Any], rng: np.random.Generator) -> None:
        self.op, self.sample = op, sample
        self.weights = [
            np.asarray(rng.uniform(-1, 1, o.shape)) for o in run(op, sample, [as_input(x) for x in arrays])
        ]

    def tensor(self, inputs: list[Any]) -> Any:
        total = 0.0
        for o, w in zip(run(self.op, self.sample, inputs), self.weights, strict=True):
            total = total + (o * mt.tensor(w)).sum()
        return total

    def value(self, arrays: list[Any]) -> float:
        return float(self.tensor([as_input(x) for x in arrays]))


def as_input(x: Any) -> Any:
    return mt.tensor(x) if isinstance(x, np.ndarray) else x


def moved(arrays: list[Any], direction: list[Any], by: float) -> list[Any]:
    return [np.asarray(x + by * d) if d is not None else x for x, d in zip(arrays, direction, strict=True)]


def along(grads: list[Any], direction: list[Any]) -> float:
    return float(
        sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if d is not None and g is not None)
    )


def first_grads(loss: Weighted, arrays: list[Any]) -> list[Any]:
    inputs = [mt.tensor(x, requires_grad=True) if smooth(x) else as_input(x) for x in arrays]
    out = loss.tensor(inputs)
    if not isinstance(out, mt.Tensor) or not out.requires_grad:
        return [np.zeros_like(x) if smooth(x) else None for x in arrays]
    out.backward()
    return [None if not smooth(x) else np.zeros_like(x) if t.grad is None else t.grad.numpy()
            for x, t in zip(arrays, inputs, strict=True)]


def second_grads(loss: Weighted, arrays: list[Any], direction: list[Any]) -> list[Any] | None:
    """Gradient of (first gradient . direction); None where the first does not depend on the inputs."""
    inputs = [mt.tensor(x, requires_grad=True) if smooth(x) else as_input(x) for x in arrays]
    wanted = [t for t, x in zip(inputs, arrays, strict=True) if smooth(x)]
    out = loss.tensor(inputs)
    if not isinstance(out, mt.Tensor) or not out.requires_grad:
        return None
    grads = mt.grad(out, wanted, create_graph=True, allow_unused=True)
    slope: Any = 0.0
    for g, d in zip(grads, [d for d in direction if d is not None], strict=True):
        if g is not None:
            slope = slope + (g * mt.tensor(d)).sum()
    if not isinstance(slope, mt.Tensor) or not slope.requires_grad:
        return None
    found = iter(mt.grad(slope, wanted, allow_unused=True))
    return [
        None if not smooth(x) else (lambda g, x=x: np.zeros_like(x) if g is None else g.numpy())(next(found))
        for x in arrays
    ]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_matches_finite_differences(name: str) -> None:
    op, rng = TABLE[name], np.random.default_rng(1)
    for sample in cases(op):
        arrays = make_inputs(sample, rng)
        if not any(smooth(x) and x.size for x in arrays):
            continue
        loss = Weighted(op, sample, arrays, rng)
        direction = [np.asarray(rng.uniform(-1, 1, x.shape)) if smooth(x) else None for x in arrays]
        got = along(first_grads(loss, arrays), direction)
        want = (loss.value(moved(arrays, direction, STEP)) - loss.value(moved(arrays, direction, -STEP))) / (
            2 * STEP
        )
        assert got == pytest.approx(want, rel=2e-5, abs=2e-7), (name, sample)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivative_matches_finite_differences_of_the_first(name: str) -> None:
    op, rng = TABLE[name], np.random.default_rng(2)
    for sample in cases(op)[:6]:
        arrays = make_inputs(sample, rng)
        if not any(smooth(x) and x.size for x in arrays):
            continue
        loss = Weighted(op, sample, arrays, rng)
        v = [np.asarray(rng.uniform(-1, 1, x.shape)) if smooth(x) else None for x in arrays]
        u = [np.asarray(rng.uniform(-1, 1, x.shape)) if smooth(x) else None for x in arrays]
        second = second_grads(loss, arrays, v)
        got = 0.0 if second is None else along(second, u)
        ahead = along(first_grads(loss, moved(arrays, u, STEP)), v)
        behind = along(first_grads(loss, moved(arrays, u, -STEP)), v)
        assert got == pytest.approx((ahead - behind) / (2 * STEP), rel=5e-5, abs=5e-7), (name, sample)
