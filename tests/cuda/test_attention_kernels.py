"""Attention on a device, by cuDNN and by blocks of scores, beside the plain kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import meshtape.runtime.ops  # noqa: F401  (fills the table)
from meshtape.runtime.cuda import attention
from meshtape.runtime.op import TABLE, Sample

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}
CLOSE = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
ROWS = ("attention", "attention_grad", "self_attention", "self_attention_grad")


def attrs_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    return {**TABLE[name].attrs, **given}


def wide(dtype: Any) -> Any:
    return np.float64 if dtype == np.float64 else np.float32


def inputs(name: str, sample: Sample, dtype: Any) -> list[Any]:
    """A sample's inputs on the host: vectors in `dtype`, numbers of a query and masks in that of sums.

    Gradients get the delta and lse that belong to their inputs, so that weights are weights.
    """
    rng = np.random.default_rng(5)
    found = []
    for parameter, x in zip(names(name), sample.inputs, strict=True):
        kind = wide(dtype) if parameter in ("delta", "lse", "mask") else dtype
        if isinstance(x, tuple):
            found.append(rng.normal(size=x).astype(kind))
        elif isinstance(x, np.ndarray):
            found.append(x if x.dtype == bool else x.astype(kind))
        else:
            found.append(x)
    if name.endswith("grad"):
        g, delta, *vectors, lse, mask, seed, draw = found
        forward = {k: v for k, v in sample.attrs.items() if k != "lse_grad"}
        row = TABLE[name.removesuffix("_grad")]
        out, lse = row.kernel(np, *(v.astype(np.float64) for v in vectors), mask, seed, draw,
                              **attrs_of(row.name, forward))
        delta = (g.astype(np.float64) * out).sum(-1) - delta * sample.attrs.get("lse_grad", False)
        found = [g, delta.astype(wide(dtype)), *vectors, lse.astype(wide(dtype)), mask, seed, draw]
    return found


def names(name: str) -> list[str]:
    vectors = ["qkv"] if name.startswith("self") else ["q", "k", "v"]
    rest = ["mask", "seed", "draw"]
    return ["g", "delta", *vectors, "lse", *rest] if name.endswith("grad") else [*vectors, *rest]


def on(device: Any, x: Any) -> Any:
    return device.cp.asarray(x) if isinstance(x, np.ndarray) else x


def run(device: Any, name: str, given: list[Any], attrs: dict[str, Any],
        held: list[Any] | None = None) -> Any:
    """Results on the device; seed and draw as a worker hands them over."""
    row = TABLE[name]
    shapes = tuple(getattr(x, "shape", None) for x in given)
    types = tuple(getattr(x, "dtype", None) for x in given)
    assert row.device.supports(shapes, types, attrs)
    held = held or [on(device, x) for x in given[:-2]]
    numbers = [device.cp.asarray(np.int64(x)) for x in given[-2:]]
    out = row.device.run(device, *held, *numbers, **attrs)
    return out if isinstance(out, tuple) else (out,)


def wanted(name: str, given: list[Any], attrs: dict[str, Any]) -> Any:
    exact = (x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype != bool else x for x in given)
    out = TABLE[name].kernel(np, *exact, **attrs)
    return out if isinstance(out, tuple) else (out,)


def check(device: Any, name: str, sample: Sample, dtype: Any, held: Any = None) -> Any:
    attrs = attrs_of(name, sample.attrs)
    given = inputs(name, sample, dtype)
    if held is not None:
        held = held(given)
    found = run(device, name, given, attrs, held)
    for a, b in zip(found, wanted(name, given, attrs), strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(np.abs(b).max(initial=0)))
        np.testing.assert_allclose(a.get().astype(np.float64) / scale, b / scale,
                                   atol=CLOSE[np.dtype(dtype).name])
    types = [np.dtype(dtype)] * len(found)
    if not name.endswith("grad"):
        types[1] = np.dtype(wide(dtype))
    assert [a.dtype for a in found] == types
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS)
def test_every_sample(device: Any, name: str, dtype: str) -> None:
    for sample in TABLE[name].samples():
        if all(0 not in np.shape(np.zeros(x) if isinstance(x, tuple) else x) for x in sample.inputs):
            check(device, name, sample, DTYPES[dtype])


CASES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "plain": ((2, 3, 20, 16), (2, 3, 9, 16), 8, {"scale": 0.3}),
    "causal": ((2, 2, 17, 8), (2, 2, 17, 8), 16, {"is_causal": True}),
    "causal, fewer queries": ((1, 2, 5, 8), (1, 2, 12, 8), 8, {"is_causal": True}),
    "causal, later queries": ((1, 2, 5, 8), (1, 2, 12, 8), 8, {
        "is_causal": True, "offset": (0, 0, 4, 0), "whole": (1, 2, 12, 8)}),
    "three leading dimensions": ((2, 1, 3, 4, 8), (2, 1, 3, 6, 8), 8, {"scale": 0.5}),
    "no leading dimension": ((6, 8), (5, 8), 8, {}),
    "one query": ((2, 1, 1, 8), (2, 1, 7, 8), 8, {}),
    "one of all": ((1, 1, 1, 8), (1, 1, 1, 8), 8, {}),
    "odd width": ((1, 2, 4, 7), (1, 2, 5, 7), 3, {}),
    "long": ((1, 1, 3, 8), (1, 1, 1500, 8), 8, {}),
    "dropout": ((2, 2, 5, 8), (2, 2, 11, 8), 8, {"p": 0.4}),
    "dropout of a piece": ((1, 2, 3, 8), (1, 2, 11, 8), 8, {
        "p": 0.5, "is_causal": True, "offset": (1, 2, 2, 0), "whole": (3, 4, 6, 8)}),
    "everything dropped": ((1, 2, 3, 8), (1, 2, 4, 8), 8, {"p": 1.0}),
    "through lse": ((1, 2, 6, 8), (1, 2, 5, 8), 8, {"lse_grad": True}),
}


def sample_of(name: str, case: str) -> Sample:
    q, k, width, attrs = CASES[case]
    v = (*k[:-1], width)
    if name.endswith("grad"):
        return Sample(((*q[:-1], width), q[:-1], q, k, v, q[:-1], True, 5, 3), attrs)
    return Sample((q, k, v, True, 5, 3), {k: v for k, v in attrs.items() if k != "lse_grad"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["attention", "attention_grad"])
def test_harder_cases(device: Any, name: str, case: str, dtype: str) -> None:
    check(device, name, sample_of(name, case), DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["attention", "attention_grad"])
def test_blocks_of_queries(device: Any, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.fused, "takes", lambda *args: False)
    for scores in (30, 100, 700):
        monkeypatch.setattr(attention, "SCORES", scores)
        for case in ("plain", "causal", "dropout", "causal, later queries"):
            check(device, name, sample_of(name, case), DTYPES[dtype])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_as_projections_leave_it(device: Any, name: str, dtype: str) -> None:
    """(batch, length, [3,] heads, width) in memory; vectors that begin anywhere."""
    kind, cp = DTYPES[dtype], device.cp

    def lay(given: list[Any]) -> list[Any]:
        held = []
        for parameter, x in zip(names(name), given[:-2], strict=False):
            if parameter in ("q", "k", "v", "g"):
                room = cp.empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 1), x.dtype)
                room = (room if parameter == "g" else cp.empty(
                    (x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype))[..., -x.shape[3]:]
                view = room.transpose(0, 2, 1, 3)
            elif parameter == "qkv":
                view = cp.empty((x.shape[1], x.shape[3], 3, x.shape[2], x.shape[4]), x.dtype)
                view = view.transpose(2, 0, 3, 1, 4)
            else:
                held.append(on(device, x))
                continue
            view[...] = cp.asarray(x)
            held.append(view)
        return held

    attrs = {"is_causal": True, "scale": 0.4}
    if name.startswith("self"):
        qkv = (3, 2, 4, 9, 16)
        sample = Sample((qkv[1:], qkv[1:-1], qkv, qkv[1:-1], True, 0, 0) if name.endswith("grad")
                        else (qkv, True, 0, 0), attrs)
    else:
        q = (2, 4, 9, 16)
        sample = Sample((q, q[:-1], q, q, q, q[:-1], True, 0, 0) if name.endswith("grad")
                        else (q, q, q, True, 0, 0), attrs)
    found = check(device, name, sample, kind, lay)
    if name == "attention":
        assert found[0].strides == tuple(n * found[0].itemsize for n in (9 * 64, 16, 64, 1))


def test_cudnn_is_asked_once_and_may_refuse(device: Any) -> None:
    if device.libraries.cupy.__name__ != "cupy" or device.dnn is None:
        pytest.skip("no cuDNN here")
    if not hasattr(device.libraries.cudnn, "REFUSED"):
        pytest.skip("the real cuDNN does not refuse on command")
    fake = device.libraries.cudnn
    sample = sample_of("attention", "plain")
    before = len(fake.MADE)
    check(device, "attention", sample, bfloat16)
    check(device, "attention", sample, bfloat16)
    assert len(fake.MADE) == before + 1 and not device.dnn.refused
    fake.REFUSED.add("sdpa")
    try:
        other = Sample((*sample.inputs,), {"scale": 0.7})
        check(device, "attention", other, bfloat16)
        check(device, "attention", other, bfloat16)
    finally:
        fake.REFUSED.clear()
    assert len(fake.MADE) == before + 2 and len(device.dnn.refused) == 1
    assert "sdpa" in next(iter(device.dnn.refused.values()))


@pytest.mark.parametrize("name", ["attention", "attention_grad"])
@pytest.mark.parametrize("case", ["causal", "dropout"])
def test_a_graph_repeats_it_with_new_draws(device: Any, name: str, case: str) -> None:
    sample, cp = sample_of(name, case), device.cp
    attrs = attrs_of(name, sample.attrs)
    given = inputs(name, sample, bfloat16)
    held = [on(device, x) for x in given[:-2]]
    numbers = [cp.asarray(np.int64(x)) for x in given[-2:]]
    TABLE[name].device.run(device, *held, *numbers, **attrs)
    device.stream.begin_capture()
    found = TABLE[name].device.run(device, *held, *numbers, **attrs)
    graph = device.stream.end_capture()
    for draw in (3, 8):
        numbers[1][...] = draw
        graph.launch(device.stream)
        again = wanted(name, [*given[:-1], draw], attrs)
        for a, b in zip(found, again, strict=True):
            np.testing.assert_allclose(a.get().astype(np.float64), b, atol=6e-2)
