"""Modules of several inputs and outputs beside PyTorch's: values, and gradients of inputs and parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from beside_torch import same, split, torch

import meshtape as mt

Call = Callable[..., Any]


def tensors_of(value: Any) -> list[Any]:
    """Outputs, however nested, without None."""
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors_of(v)]
    return [] if value is None else [value]


def compare(ours: Any, theirs: Any, call: Call, arrays: Sequence[Any], tolerance: float = 1e-9) -> None:
    """`call(module, *tensors)` gives equal outputs and gradients on both, ours with the other's weights."""
    theirs = theirs.double()
    ours.double().load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    xs, ts = [split(a, True) for a in arrays], [torch.tensor(a, requires_grad=True) for a in arrays]
    outs, wanted = tensors_of(call(ours, *xs)), tensors_of(call(theirs, *ts))
    assert len(outs) == len(wanted)
    rng = np.random.default_rng(3)
    total: Any = 0.0
    target: Any = 0.0
    for k, (o, w) in enumerate(zip(outs, wanted, strict=True)):
        same(o, w, tolerance, f"output {k}")
        g = rng.normal(size=tuple(w.shape))
        total, target = total + (o * mt.tensor(g)).sum(), target + (w * torch.tensor(g)).sum()
    total.backward()
    target.backward()
    for k, (x, t) in enumerate(zip(xs, ts, strict=True)):
        if t.grad is not None:
            same(x.grad, t.grad, tolerance, f"gradient of input {k}")
    named = dict(theirs.named_parameters())
    assert [n for n, _ in ours.named_parameters()] == list(named)
    for name, p in ours.named_parameters():
        same(p.grad, named[name].grad, tolerance, f"gradient of {name}")


def penalty(module: Any, call: Call, x: Any, grad: Call) -> Any:
    """The squared norm of the gradient by `x` of the squared outputs."""
    loss: Any = 0.0
    for out in tensors_of(call(module, x)):
        loss = loss + (out * out).sum()
    (slope,) = grad(loss, [x], create_graph=True)
    return (slope * slope).sum()


def compare_penalty(ours: Any, theirs: Any, call: Call, array: Any, tolerance: float = 1e-9) -> None:
    """Gradients of a gradient penalty agree, twice in a row (the second walk may repeat the first)."""
    theirs = theirs.double()
    ours.double().load_state_dict(theirs.state_dict())
    t = torch.tensor(array, requires_grad=True)
    wanted = penalty(theirs, call, t, torch.autograd.grad)
    wanted.backward()
    named = dict(theirs.named_parameters())
    for _ in range(2):
        x = split(array, True)
        ours.zero_grad()
        found = penalty(ours, call, x, mt.grad)
        found.backward()
        same(found, wanted, tolerance, "penalty")
        same(x.grad, t.grad, tolerance, "second derivative by the input")
        for name, p in ours.named_parameters():
            if named[name].grad is not None:
                same(p.grad, named[name].grad, tolerance, f"second derivative by {name}")
