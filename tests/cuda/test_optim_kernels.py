"""Optimizer updates on a device compute what the plain kernels do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.kernels.optim import CHUNK, TENSORS
from meshtape.runtime.op import lookup

FLAGS: dict[str, list[dict[str, Any]]] = {
    "sgd_update": [{"has_momentum": False}, {"has_momentum": True}, {"has_momentum": True, "nesterov": True},
                   {"has_momentum": False, "maximize": True}],
    "adam_update": [{}, {"decoupled": True}, {"amsgrad": True}, {"decoupled": True, "maximize": True}]}
SCALARS: dict[str, tuple[Any, ...]] = {
    "sgd_update": (2, 0.1, 0.1, 0.9, 0.01), "adam_update": (3, 1e-2, 0.9, 0.99, 1e-8, 0.1)}
UPDATES = [(name, flags) for name, several in FLAGS.items() for flags in several]
SHAPES = [(5, 3), (4,), (), (0, 2), (CHUNK + 5,), (2, CHUNK), (1,)]


def on_device(device: Any, scalars: Any) -> list[Any]:
    return [device.cp.asarray(np.array(x, np.int64 if isinstance(x, int) else np.float64)) for x in scalars]


def tensors(name: str, flags: dict[str, Any], shapes: Any, dtype: str = "float32") -> list[Any]:
    """Parameters, gradients and states; Adam's second moments are not negative."""
    rng = np.random.default_rng(0)
    signed, squares = {"sgd_update": (2 + flags.get("has_momentum", False), 0),
                       "adam_update": (3, 1 + flags.get("amsgrad", False))}[name]
    made = [rng.normal(size=s) for _ in range(signed) for s in shapes]
    made += [rng.uniform(0, 1, s) for _ in range(squares) for s in shapes]
    return [np.asarray(a, dtypes.canonical(dtype)) for a in made]


def both(device: Any, name: str, scalars: Any, given: Any, attrs: Any) -> tuple[list[Any], list[Any]]:
    """Results on the device and of the plain kernel."""
    op = lookup(name)
    attrs = op.unpack(op.pack(attrs))
    assert op.device is not None
    assert op.device.supports([*(None for _ in scalars), *(a.shape for a in given)],
                              [*(None for _ in scalars), *(a.dtype for a in given)], attrs)
    found = op.device.run(device, *on_device(device, scalars), *map(device.cp.asarray, given), **attrs)
    wanted = op.kernel(np, *scalars, *given, **attrs)
    return [a.get() for a in found], [np.asarray(a) for a in wanted]


def close(found: list[Any], wanted: list[Any], dtype: str = "float32") -> None:
    ulps = {"float32": 3e-7, "float64": 1e-15, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == dtypes.canonical(dtype)
        np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=ulps, atol=ulps / 10)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("name", "flags"), UPDATES)
def test_updates_agree_with_the_plain_kernels(device: Any, name: str, flags: Any, dtype: str) -> None:
    given = tensors(name, flags, SHAPES, dtype)
    close(*both(device, name, SCALARS[name], given, {"n": len(SHAPES), **flags}), dtype)


@pytest.mark.parametrize("name", FLAGS)
def test_samples(device: Any, name: str) -> None:
    samples = lookup(name).samples
    assert samples is not None
    for sample in samples():
        rng = np.random.default_rng(0)
        first = len(SCALARS[name])
        numbers = [x.item() if isinstance(x, np.ndarray) else x for x in sample.inputs[:first]]
        given = [rng.uniform(-1, 1, x) if isinstance(x, tuple) else x for x in sample.inputs[first:]]
        close(*both(device, name, numbers, [np.asarray(a) for a in given], sample.attrs), "float64")


@pytest.mark.parametrize("name", FLAGS)
def test_weight_decay_and_damping_of_0(device: Any, name: str) -> None:
    scalars = {"sgd_update": (1, 0.0, 0.1, 0.9, 0.0), "adam_update": (1, 1e-2, 0.9, 0.99, 1e-8, 0.0)}[name]
    flags = FLAGS[name][1]
    close(*both(device, name, scalars, tensors(name, flags, SHAPES), {"n": len(SHAPES), **flags}))


def test_more_tensors_than_a_launch_takes_and_of_several_dtypes(device: Any) -> None:
    shapes = [(k % 7,) for k in range(2 * TENSORS + 3)]
    given = tensors("adam_update", {}, shapes)
    kinds = ["float32", "float64", "bfloat16"]
    given = [a.astype(dtypes.canonical(kinds[k % len(shapes) % 3])) for k, a in enumerate(given)]
    found, wanted = both(device, "adam_update", SCALARS["adam_update"], given, {"n": len(shapes)})
    for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
        close([a], [b], kinds[k % len(shapes) % 3])


@pytest.mark.parametrize(("name", "flags"), UPDATES)
@pytest.mark.parametrize("start", [0, 1])
def test_in_place_on_slices_gives_the_same_bits(device: Any, name: str, flags: Any, start: int) -> None:
    """Parts of larger arrays, whose addresses may be no multiple of 16."""
    op, shapes = lookup(name), [(3, 50), (CHUNK + 9,)]
    given = tensors(name, flags, shapes)
    attrs = op.unpack(op.pack({"n": 2, **flags}))
    numbers = on_device(device, SCALARS[name])
    assert op.device is not None and op.over is not None
    apart = op.device.run(device, *numbers, *map(device.cp.asarray, given), **attrs)
    places = []
    for a in given:
        room = device.cp.zeros(a.size + start, a.dtype)
        places.append(room[start:].reshape(a.shape))
        places[-1][...] = device.cp.asarray(a)
    over = op.over(len(numbers) + len(given), attrs)
    out = [places[i - len(numbers)] for _, i in sorted(over)]
    found = op.device.run(device, *numbers, *places, out=tuple(out), **attrs)
    for target, a, b in zip(out, found, apart, strict=True):
        assert a is target
        np.testing.assert_array_equal(a.get(), b.get())


def test_strided_tensors_and_targets_that_cannot_be_written_flat(device: Any) -> None:
    given = tensors("sgd_update", {}, [(6, 8)])
    op = lookup("sgd_update")
    attrs = op.unpack(op.pack({"n": 1}))
    wanted = op.kernel(np, *SCALARS["sgd_update"], *(a[:, ::2] for a in given), **attrs)[0]
    arrays = [device.cp.asarray(a)[:, ::2] for a in given]
    assert op.device is not None
    numbers = on_device(device, SCALARS["sgd_update"])
    for out in (None, (None,), (arrays[0],)):
        found = op.device.run(device, *numbers, *arrays, out=out, **attrs)
        close([found[0].get()], [wanted])


def test_a_captured_update_reads_new_rates(device: Any) -> None:
    op = lookup("adam_update")
    attrs = op.unpack(op.pack({"n": 1, "decoupled": True}))
    given = tensors("adam_update", {}, [(40,)])
    numbers, arrays = on_device(device, SCALARS["adam_update"]), [device.cp.asarray(a) for a in given]
    out = (arrays[0], arrays[2], arrays[3])
    assert op.device is not None
    op.device.run(device, *numbers, *map(device.cp.copy, arrays), **attrs)
    device.stream.begin_capture()
    op.device.run(device, *numbers, *arrays, out=out, **attrs)
    graph = device.stream.end_capture()
    for step in (1, 2, 3):
        scalars = (step, 0.01 / step, 0.9, 0.99, 1e-8, 0.1)
        numbers[0][...], numbers[1][...] = scalars[:2]
        graph.launch(device.stream)
        p, m, v = op.kernel(np, *scalars, *given, **attrs)
        given = [p, given[1], m, v]
        close([a.get() for a in out], [p, m, v])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_sums_of_squares(device: Any, dtype: str) -> None:
    op = lookup("sum_of_squares")
    assert op.device is not None
    for shapes in (SHAPES, [(0, 3)], [()], [(3,)] * (TENSORS + 1)):
        given = [np.random.default_rng(k).normal(size=s).astype(dtypes.canonical(dtype))
                 for k, s in enumerate(shapes)]
        wanted = sum((a.astype(np.float64) ** 2).sum() for a in given)
        assert op.device.supports([a.shape for a in given], [a.dtype for a in given], {})
        found = op.device.run(device, *map(device.cp.asarray, given))
        assert found.shape == () and found.dtype == (dtype if dtype == "float64" else "float32")
        np.testing.assert_allclose(found.get(), wanted, rtol=2e-6 if dtype != "float64" else 1e-14)
        again = op.device.run(device, *map(device.cp.asarray, given))
        assert again.get().tobytes() == found.get().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_element_that_is_not_finite_is_found(device: Any, dtype: str, value: float) -> None:
    op = lookup("nonfinite")
    assert op.device is not None
    for shapes in (SHAPES, [(0, 3)], [()], [(3,)] * (TENSORS + 1)):
        given = [np.full(s, -3e4).astype(dtypes.canonical(dtype)) for s in shapes]
        arrays = [device.cp.asarray(a) for a in given]
        assert op.device.supports([a.shape for a in given], [a.dtype for a in given], {})
        assert op.device.run(device, *arrays).get() == 0 == op.kernel(np, *given)
        for k in {0, len(shapes) // 2, len(shapes) - 1}:
            for at in {0, given[k].size - 1} if given[k].size else ():
                bad = given[k].copy()
                bad.reshape(-1)[at] = value
                found = op.device.run(device, *arrays[:k], device.cp.asarray(bad), *arrays[k + 1:])
                assert found.get() == 1 == op.kernel(np, bad) and found.dtype == np.float32


@pytest.mark.parametrize("name", ["sum_of_squares", "nonfinite"])
def test_copies_of_strided_tensors_live_until_they_are_read(device: Any, name: str) -> None:
    """Their memory could become that of a result: here the blocks have the same size."""
    op = lookup(name)
    assert op.device is not None
    given = np.random.default_rng(0).normal(size=(2, 3, 4))
    for width in (1, 2, 4):
        cut = device.cp.asarray(given)[..., :width]
        assert width == 4 or not cut.flags.c_contiguous
        np.testing.assert_allclose(op.device.run(device, cut).get(), op.kernel(np, given[..., :width]), 1e-14)
