"""Casts that norms and losses do themselves, and probabilities that are never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import meshtape as mt
from meshtape import nn
from meshtape.cluster.local import InlineMesh
from meshtape.runtime.collectives.threads import ThreadGroup
from meshtape.runtime.dtypes import bfloat16, canonical
from meshtape.runtime.op import TABLE
from meshtape.runtime.worker import Worker
from meshtape.scheduler import current
from meshtape.scheduler.session import Session

SHORT = "bfloat16"


@pytest.fixture
def use(device: Any) -> Iterator[Callable[..., Any]]:
    """use(**options) makes a worker on the device the current mesh and returns it."""
    def start(**options: Any) -> Any:
        mt.shutdown()
        made = Worker(0, (1,), [ThreadGroup(1).communicator(0)], device, **options)
        current.use(Session(InlineMesh(worker=lambda *args: made)))
        return made

    yield start
    mt.shutdown()


def names(worker: Any) -> list[str]:
    """What the longest program of a worker consists of."""
    steps = max((body.program.steps for body in worker.programs.values()), key=len)
    return [step.call.name for step in steps]


def classify(reader: bool = False) -> list[np.ndarray[Any, Any]]:
    """Loss and gradients of norm, product and cross-entropy under autocast; `reader`: the logits are used as
    float32 elsewhere, too.
    """
    rng = np.random.default_rng(0)
    norm, layer = nn.LayerNorm(12), nn.Linear(12, 7)
    layer.load_state_dict({"weight": rng.standard_normal((7, 12), dtype=np.float32),
                           "bias": rng.standard_normal(7, dtype=np.float32)})
    x = mt.tensor(rng.standard_normal((5, 12), dtype=np.float32), requires_grad=True)
    y = mt.tensor(np.array([0, 6, 3, -100, 2]))
    with mt.autocast(mt.bfloat16):
        logits = layer(norm(x))
        loss = nn.functional.cross_entropy(logits, y)
        if reader:
            loss = loss + nn.functional.log_softmax(logits, axis=-1).mean()
    loss.backward()
    grads = [t.grad for t in (x, *norm.parameters(), *layer.parameters())]
    mt.flush()
    return [t.numpy() for t in (loss, *grads)]


@pytest.mark.parametrize("reader", [False, True])
def test_results_are_those_with_casts(use: Any, reader: bool) -> None:
    use(fuse=False)
    wanted = classify(reader)
    use()
    for got, want in zip(classify(reader), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0.03, atol=0.01)


def test_no_cast_is_left_around_norms_and_losses(use: Any) -> None:
    worker = use()
    classify()
    steps = max((body.program.steps for body in worker.programs.values()), key=len)
    for step in steps:
        if step.call.name == "layer_norm":
            assert step.call.dtypes[0] == bfloat16()
        if step.call.name == "cross_entropy":
            assert step.call.shapes[2] == (5,) and step.call.op is None
        if step.call.name == "cross_entropy_grad":
            assert step.call.dtypes == (bfloat16(),)
    found = names(worker)
    assert {"layer_norm", "cross_entropy", "cross_entropy_grad", "layer_norm_grad"} <= set(found)


def test_probabilities_that_somebody_reads_are_written(use: Any) -> None:
    """A second derivative needs them, and so does a gradient in another batch."""
    use()
    x = mt.tensor(np.random.default_rng(0).standard_normal((4, 3), dtype=np.float32), requires_grad=True)
    loss = nn.functional.cross_entropy(x, mt.tensor(np.array([0, 2, 1, 1])))
    value = loss.item()                     # ends the batch between loss and gradient
    loss.backward()
    p = np.exp(x.numpy() - np.log(np.exp(x.numpy()).sum(1, keepdims=True)))
    p[np.arange(4), [0, 2, 1, 1]] -= 1
    np.testing.assert_allclose(x.grad.numpy(), p / 4, rtol=1e-4, atol=1e-6)
    assert value > 0


def rounded(x: Any, dtype: str) -> Any:
    return x.astype(canonical(dtype))


@pytest.mark.parametrize("given", ["float32", SHORT])
@pytest.mark.parametrize("result", ["float32", SHORT])
@pytest.mark.parametrize("width", [8, 12, 7, 16400])
def test_layer_norm_reads_and_writes_either(device: Any, given: str, result: str, width: int) -> None:
    """The kernel's bits are those of casting before and after it."""
    op, rng, cp = TABLE["layer_norm"], np.random.default_rng(0), device.cp
    x = rounded(rng.standard_normal((3, width)), given)
    w, b = (cp.asarray(rng.standard_normal(width).astype(np.float32)) for _ in range(2))
    short, wide = cp.asarray(x), cp.asarray(x.astype(np.float32))
    run = op.device.run
    found = run(device, short, w, b, ndim=1, eps=1e-5, result_dtypes=(canonical(result),) * 3)
    plain = run(device, wide, w, b, ndim=1, eps=1e-5)
    np.testing.assert_array_equal(found[0].get(), rounded(plain[0].get(), result))
    for a, c in zip(found[1:], plain[1:], strict=True):
        np.testing.assert_allclose(a.get(), c.get(), rtol=1e-6)


@pytest.mark.parametrize("upstream", ["float32", SHORT])
@pytest.mark.parametrize("result", ["float32", SHORT])
@pytest.mark.parametrize("width", [8, 7, 8200])
def test_its_gradient_does_as_well(device: Any, upstream: str, result: str, width: int) -> None:
    op, rng, cp = TABLE["layer_norm_grad"], np.random.default_rng(0), device.cp
    g = rounded(rng.standard_normal((3, width)), upstream)
    x, mean, rstd, w = (cp.asarray(rng.standard_normal(s).astype(np.float32))
                        for s in ((3, width), (3, 1), (3, 1), (width,)))
    kinds = (canonical(result), canonical("float32"), canonical("float32"))
    found = op.device.run(device, cp.asarray(g), x, mean, rstd, w, ndim=1, result_dtypes=kinds)
    plain = op.device.run(device, cp.asarray(g.astype(np.float32)), x, mean, rstd, w, ndim=1)
    assert [a.dtype for a in found] == list(kinds)
    tolerance = 1e-5 if result == "float32" else 1e-2
    for a, c in zip(found, plain, strict=True):
        np.testing.assert_allclose(a.get().astype(np.float32), c.get(), rtol=tolerance, atol=tolerance)
