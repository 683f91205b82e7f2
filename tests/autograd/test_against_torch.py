"""First and second derivatives of pointwise and reducing rows on their own samples, beside PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from table import make_inputs, samples

import meshtape as mt
from meshtape.runtime.op import TABLE, Op, Sample

torch = pytest.importorskip("torch")
F = torch.nn.functional

SAME_NAME = (
    "add", "sub", "mul", "divide", "remainder", "pow", "negative", "square", "reciprocal", "real", "imag",
    "exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "sin", "cos", "tan", "asin", "acos",
    "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "atan2", "erf", "floor", "ceil", "trunc",
    "where", "sigmoid", "relu")


def over(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch's reduction over all the axes that NumPy's `axis` names."""
    def reduced(x: Any, axis: Any, keepdims: bool, **attrs: Any) -> Any:
        axes = tuple(range(x.ndim)) if axis is None or x.ndim == 0 else (axis,) if type(axis) is int else axis
        return function(x, axes, keepdims) if axes else x.clone()
    return reduced


def prod(x: Any, axes: tuple[int, ...], keepdims: bool) -> Any:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(axis, keepdims)
    return x


REFERENCE: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in SAME_NAME},
    "abs": torch.abs, "sign": torch.sgn, "conj": lambda x: torch.conj(x).resolve_conj(),
    "round": lambda x, decimals: torch.round(x, decimals=decimals),
    "maximum": torch.maximum, "minimum": torch.minimum, "clip": torch.clamp,
    "clip_min": lambda x, y: torch.clamp(x, min=y), "clip_max": lambda x, y: torch.clamp(x, max=y),
    "leaky_relu": F.leaky_relu, "silu": F.silu, "softplus": F.softplus, "gelu": F.gelu,
    "sum": over(torch.sum), "mean": over(torch.mean), "max": over(torch.amax), "min": over(torch.amin),
    "logsumexp": over(torch.logsumexp), "prod": over(prod),
}
# torch takes no Python scalar there, or has no derivative by that operand.
TENSORS_ONLY = {"atan2", "maximum", "minimum", "clip", "clip_min", "clip_max", "remainder"}
# The second derivative of prod is exact only where no element is 0: see its vjp.
FIRST_ONLY = {"prod"}


def differentiable(op: Op) -> list[Sample]:
    return [s for s in samples(op) if s.dtype in ("float64", "complex128") and not (
        op.name in TENSORS_ONLY and any(isinstance(x, float) for x in s.inputs)) and "dtype" not in s.attrs]


def arrays(values: Any, like: Any) -> list[Any]:
    """Gradients as arrays; None counts as zeros."""
    return [np.zeros(x.shape) if v is None else v.numpy() if isinstance(v, mt.Tensor) else plain(v)
            for v, x in zip(values, like, strict=True)]


def plain(t: Any) -> Any:
    """The values of a torch tensor, its lazy zeros and conjugates worked out."""
    return (torch.zeros_like(t) if t._is_zerotensor() else t.detach().resolve_conj()).numpy()


def assert_close(mine: list[Any], theirs: list[Any], what: str) -> None:
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9, err_msg=what)


@pytest.mark.parametrize("name", REFERENCE)
def test_derivatives_agree_with_torch(name: str) -> None:
    op, rng = TABLE[name], np.random.default_rng(1)
    for sample in differentiable(op):
        inputs = make_inputs(sample, rng)
        attrs = op.unpack(op.pack(sample.attrs))
        what = f"{name} {[getattr(x, 'shape', x) for x in inputs]} {attrs}"
        floats = [i for i, x in enumerate(inputs) if isinstance(x, np.ndarray) and x.dtype.kind in "fc"]
        xs = [mt.tensor(x) if isinstance(x, np.ndarray) else x for x in inputs]
        ts = [torch.tensor(x) if isinstance(x, np.ndarray) else x for x in inputs]
        for i in floats:
            xs[i].requires_grad_(True)
            ts[i].requires_grad_(True)
        y, t = op(*xs, **attrs), REFERENCE[name](*ts, **attrs)
        if not t.requires_grad:
            continue
        assert_close([y.numpy()], [plain(t)], what)
        g = rng.normal(size=y.shape) + (1j * rng.normal(size=y.shape) if y.dtype.kind == "c" else 0)
        cotangent = np.asarray(g).astype(y.dtype)
        wanted_by = [xs[i] for i in floats], [ts[i] for i in floats]
        mine = mt.grad(y, wanted_by[0], mt.tensor(cotangent), create_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(t, wanted_by[1], torch.tensor(cotangent), create_graph=True,
                                     allow_unused=True)
        assert_close(arrays(mine, wanted_by[0]), arrays(theirs, wanted_by[1]), f"{what}: first derivative")
        if name not in FIRST_ONLY and sample.dtype == "float64":
            check_second(mine, theirs, wanted_by, rng, what)


def check_second(mine: Any, theirs: Any, by: tuple[list[Any], list[Any]], rng: np.random.Generator,
                 what: str) -> None:
    """The same random combination of first derivatives, differentiated again."""
    seeds = [rng.normal(size=x.shape) for x in by[0]]
    ours = [(m, mt.tensor(np.asarray(s))) for m, s in zip(mine, seeds, strict=True)
            if m is not None and m.requires_grad]
    torchs = [(m, torch.tensor(s)) for m, s in zip(theirs, seeds, strict=True)
              if m is not None and m.requires_grad]
    second: Any = [None] * len(by[0])
    if ours:
        second = mt.grad([m for m, _ in ours], by[0], [s for _, s in ours], allow_unused=True)
    other: Any = [None] * len(by[1])
    if torchs:
        other = torch.autograd.grad([m for m, _ in torchs], by[1], [s for _, s in torchs], allow_unused=True)
    assert_close(arrays(second, by[0]), arrays(other, by[1]), f"{what}: second derivative")


def test_ties_share_the_gradient_as_in_torch() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 2.0]), np.array([2.0, 2.0, 1.0, 2.0])
    for name in ("maximum", "minimum"):
        a, b = mt.tensor(x, requires_grad=True), mt.tensor(y, requires_grad=True)
        TABLE[name](a, b).sum().backward()
        s, t = torch.tensor(x, requires_grad=True), torch.tensor(y, requires_grad=True)
        getattr(torch, name)(s, t).sum().backward()
        assert_close([a.grad.numpy(), b.grad.numpy()], [s.grad.numpy(), t.grad.numpy()], name)
    for name, reference in (("max", torch.amax), ("min", torch.amin)):
        both = np.array([x, y])
        a, s = mt.tensor(both, requires_grad=True), torch.tensor(both, requires_grad=True)
        TABLE[name](a, axis=1).sum().backward()
        reference(s, 1).sum().backward()
        assert_close([a.grad.numpy()], [s.grad.numpy()], name)


def test_bounds_of_a_clip_get_the_gradient_of_what_they_stopped() -> None:
    x = np.array([-3.0, -1.0, 0.0, 1.0, 5.0])
    lo, hi = np.array([-1.0, -1.0, 2.0, -1.0, -1.0]), np.array([1.0, 1.0, 1.0, 1.0, 1.0])
    ours = [mt.tensor(v, requires_grad=True) for v in (x, lo, hi)]
    theirs = [torch.tensor(v, requires_grad=True) for v in (x, lo, hi)]
    TABLE["clip"](*ours).sum().backward()
    torch.clamp(*theirs).sum().backward()
    assert_close([v.grad.numpy() for v in ours], [v.grad.numpy() for v in theirs], "clip")


def test_gradient_of_a_square_does_not_pass_for_that_of_a_product() -> None:
    """x * x and x * y have the same shapes and dtypes, but not the same derivative."""
    for _ in range(3):
        x, y = mt.tensor([2.0, 3.0], requires_grad=True), mt.tensor([5.0, 7.0], requires_grad=True)
        (x * x).sum().backward()
        np.testing.assert_array_equal(x.grad.numpy(), [4.0, 6.0])
        x.grad = None
        (x * y).sum().backward()
        np.testing.assert_array_equal(x.grad.numpy(), [5.0, 7.0])
        np.testing.assert_array_equal(y.grad.numpy(), [2.0, 3.0])
