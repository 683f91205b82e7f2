"""Running the same thing in meshtape and in PyTorch and comparing values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import meshtape as mt

torch = pytest.importorskip("torch")

Array = np.ndarray[Any, Any]


def split(array: Any, requires_grad: bool = False) -> mt.Tensor:
    """A tensor divided over the mesh by its first dimension, if it has one."""
    return mt.tensor(array, layout=mt.Shard(0) if np.ndim(array) else None, requires_grad=requires_grad)


def same(ours: Any, theirs: Any, tolerance: float = 1e-10, what: str = "") -> None:
    """Equal shape, dtype and values."""
    a, b = np.asarray(ours), theirs.detach().numpy()
    assert (a.shape, a.dtype) == (b.shape, b.dtype), what
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=what)


def check(ours: Callable[..., Any], theirs: Callable[..., Any], arrays: Sequence[Any],
          tolerance: float = 1e-10) -> None:
    """Value and gradients of `ours(*tensors)` are those of `theirs(*tensors)`; integers get no gradient."""
    floating = [np.asarray(a).dtype.kind == "f" for a in arrays]
    xs = [split(a, f) for a, f in zip(arrays, floating, strict=True)]
    ts = [torch.tensor(a, requires_grad=f) for a, f in zip(arrays, floating, strict=True)]
    out, wanted = ours(*xs), theirs(*ts)
    same(out, wanted, tolerance, "value")
    cotangent = np.random.default_rng(9).normal(size=wanted.shape).astype(wanted.detach().numpy().dtype)
    out.backward(mt.tensor(cotangent))
    wanted.backward(torch.tensor(cotangent))
    for k, (x, t) in enumerate(zip(xs, ts, strict=True)):
        if t.grad is not None:
            same(x.grad, t.grad, tolerance, f"gradient of input {k}")


def check_modules(ours: Any, theirs: Any, x: Array, tolerance: float = 1e-10) -> None:
    """Two modules of float64 parameters agree forward and backward, ours with the other's weights."""
    theirs = theirs.double()
    ours.double().load_state_dict(theirs.state_dict())
    check(ours, theirs, [x], tolerance)
    wanted = dict(theirs.named_parameters())
    assert [n for n, _ in ours.named_parameters()] == list(wanted)
    for name, p in ours.named_parameters():
        same(p.grad, wanted[name].grad, tolerance, f"gradient of {name}")
