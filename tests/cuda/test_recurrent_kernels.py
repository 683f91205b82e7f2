"""Recurrent layers on a device, against the plain kernels, which compute 16-bit floats in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from table import make_inputs

from meshtape.runtime import dtypes
from meshtape.runtime.op import lookup

ROWS = ["rnn", "lstm", "gru"]
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
# Steps, batch, features, width.
CASES = [(1, 3, 5, 4), (4, 3, 5, 7), (3, 1, 1, 33), (2, 0, 2, 2), (6, 9, 40, 32)]
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}


def layer(name: str, case: tuple[int, ...], dtype: str, biased: bool = True) -> list[Any]:
    """Inputs of a layer."""
    t, b, i, h = case
    rng, rows = np.random.default_rng(0), GATES[name] * h
    states = [(b, h)] * (1 + (name == "lstm"))
    shapes = [(t, b, i), *states, (rows, i), (rows, h), *[(rows,)] * 2 * biased]
    given: list[Any] = [rng.uniform(-1, 1, s) * (1 if k <= len(states) else h**-0.5)
                        for k, s in enumerate(shapes)]
    return [*(a.astype(dtypes.canonical(dtype)) for a in given), *[0.0] * 2 * (not biased)]


def both(device: Any, name: str, given: Any, attrs: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Results of the device kernel, of the dtypes that the row says, and of the plain one."""
    op = lookup(name)
    attrs = op.unpack(op.pack(attrs))
    kinds = [getattr(a, "dtype", None) for a in given]
    assert op.device is not None
    assert op.device.supports([getattr(a, "shape", None) for a in given], kinds, attrs)
    arrays = [device.cp.asarray(a) if hasattr(a, "dtype") else a for a in given]
    found, wanted = op.device.run(device, *arrays, **attrs), op.kernel(np, *given, **attrs)
    found, wanted = (found, wanted) if op.n_out > 1 else ((found,), (wanted,))
    made = op.dtype(*(float if k is None else k for k in kinds), **attrs)[1]
    for a, b, kind in zip(found, wanted, made, strict=True):
        assert a.shape == b.shape and a.dtype == kind
    return [a.get() for a in found], [np.asarray(b) for b in wanted]


def close(found: Any, wanted: Any, dtype: str) -> None:
    for a, b in zip(found, wanted, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        atol = TOLERANCE[dtype] * max(1.0, abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("name", [f"{n}{g}" for n in ROWS for g in ("", "_grad")])
def test_samples(device: Any, name: str) -> None:
    op = lookup(name)
    assert op.samples is not None
    for k, sample in enumerate(op.samples()):
        close(*both(device, name, make_inputs(sample, np.random.default_rng(k)), sample.attrs), "float64")


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_and_gradients_are_those_of_the_plain_kernels(
        device: Any, name: str, dtype: str, case: tuple[int, ...]) -> None:
    for biased, attrs in ((True, {}), (False, {"nonlinearity": "relu"} if name == "rnn" else {})):
        given = layer(name, case, dtype, biased)
        found, outs = both(device, name, given, attrs)
        close(found, outs, dtype)
        rng = np.random.default_rng(1)
        full = [rng.uniform(-1, 1, o.shape).astype(o.dtype) for o in outs]
        for there in ([True] * 3, [True, False, False], [False, True, False], [False, False, True]):
            cotangents = [g if k else 0.0 for g, k in zip(full, there, strict=False)]
            more = {**attrs, "input_grad": biased}
            close(*both(device, f"{name}_grad", [*cotangents, *given, *outs], more), dtype)


@pytest.mark.parametrize("name", ROWS)
def test_inputs_may_be_views(device: Any, name: str) -> None:
    given, op = layer(name, (3, 4, 5, 6), "float32"), lookup(name)
    wanted = op.kernel(np, *given, **op.attrs)
    strided = [device.cp.asarray(np.ascontiguousarray(a.T)).T for a in given]
    assert op.device is not None
    found = op.device.run(device, *strided, **op.attrs)
    many = op.n_out > 1
    close([a.get() for a in (found if many else (found,))], wanted if many else (wanted,), "float32")


@pytest.mark.parametrize("name", ROWS)
def test_a_captured_layer_reads_new_inputs(device: Any, name: str) -> None:
    given, op = layer(name, (3, 2, 5, 6), "float32"), lookup(name)
    arrays = [device.cp.asarray(a) for a in given]
    assert op.device is not None
    op.device.run(device, *arrays, **op.attrs)
    device.stream.begin_capture()
    made = op.device.run(device, *arrays, **op.attrs)
    graph = device.stream.end_capture()
    first = made if op.n_out == 1 else made[0]
    for k in range(2):
        given[0] = np.random.default_rng(k).uniform(-1, 1, given[0].shape).astype(np.float32)
        arrays[0].set(given[0])
        graph.launch(device.stream)
        wanted = op.kernel(np, *given, **op.attrs)
        close([first.get()], [wanted if op.n_out == 1 else wanted[0]], "float32")
