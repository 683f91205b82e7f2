"""Random numbers and dropout on a device have the CPU's bits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from meshtape.runtime import dtypes
from meshtape.runtime.cuda.kernels.sorting import TILE, sort_keys
from meshtape.runtime.op import IO, lookup
from meshtape.runtime.shards import piece

SEED, DRAW = 2**63 + 11, 5
ROWS: dict[str, tuple[Any, ...]] = {
    "random_uniform": (-1.0, 3.0), "random_normal": (1.0, 2.0), "random_integers": (-5, 100),
    "random_bernoulli": (0.3,)}


def numbers(device: Any, op: Any, scalars: Any) -> list[Any]:
    """Scalars as the worker hands them over: 0-d arrays where the kernel wants them."""
    found = []
    for letter, x in zip(op.device.numbers, scalars, strict=True):
        host = np.array(x, np.float64) if letter == "d" else np.array(x % 2**64, np.uint64).view(np.int64)
        found.append(device.cp.asarray(host))
    return found


def both(device: Any, name: str, arrays: Any, scalars: Any, **given: Any) -> tuple[Any, Any]:
    """Results of the device kernel and of the plain one."""
    op = lookup(name)
    attrs = op.unpack(op.pack(given))
    shapes = [*(a.shape for a in arrays), *(None for _ in scalars)]
    kinds = [*(a.dtype for a in arrays), *(None for _ in scalars)]
    assert op.device is not None and op.device.supports(shapes, kinds, attrs)
    with np.errstate(all="ignore"):
        wanted = op.kernel(np, *arrays, *scalars, **attrs)
    wanted = np.asarray(wanted, op.dtype(*(a.dtype for a in arrays), *map(type, scalars), **attrs)[1][0])
    given = *(device.cp.asarray(a) for a in arrays), *numbers(device, op, scalars)
    made = op.device.run(device, *given, **attrs)
    assert made.shape == wanted.shape and made.dtype == wanted.dtype
    return made.get(), wanted


def same_bits(found: Any, wanted: Any) -> None:
    """Equal bits; a NaN need only be one."""
    bits, number = f"u{wanted.itemsize}", wanted == wanted
    np.testing.assert_array_equal(found == found, number)
    np.testing.assert_array_equal(found[number].view(bits), wanted[number].view(bits))


@pytest.mark.parametrize(("name", "dtype"), [
    *itertools.product(("random_uniform", "random_normal"), ("float32", "float64", "float16", "bfloat16")),
    *itertools.product(("random_integers",), ("int8", "uint8", "int32", "int64", "uint64")),
    *itertools.product(("random_bernoulli",), ("bool", "int16", "float32", "float16"))])
def test_numbers_have_the_cpus_bits(device: Any, name: str, dtype: str) -> None:
    for shape in ((), (1,), (7,), (0, 3), (5, 3), (1024,), (3, 701)):
        for scalars in (ROWS[name], (0, 1) if name != "random_bernoulli" else (1.0,)):
            same_bits(*both(device, name, (), (SEED, DRAW, *scalars), shape=shape, dtype=dtype))


def test_samples_have_the_cpus_bits(device: Any) -> None:
    for name in (*ROWS, "random_permutation"):
        samples = lookup(name).samples
        assert samples is not None
        for sample in samples():
            same_bits(*both(device, name, (), sample.inputs, **sample.attrs))


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_has_the_cpus_bits(device: Any, name: str) -> None:
    op = lookup(name)
    dtype = {"random_integers": "int64", "random_bernoulli": "bool"}.get(name, "float32")
    for shape, mesh in (((7, 5, 11), (3,)), ((6, 4, 9), (2, 2)), ((33,), (4,)), ((3, 1), (4,)),
                        ((2, 3, 4, 5), (2,))):
        attrs = op.unpack(op.pack({"shape": shape, "dtype": dtype}))
        assert op.local is not None
        for placements in itertools.product(range(len(shape)), repeat=len(mesh)):
            for coord in itertools.product(*map(range, mesh)):
                local = op.local(attrs, IO((), (piece(shape, placements, mesh, coord),)))
                same_bits(*both(device, name, (), (SEED, DRAW, *ROWS[name]), **local))


def test_integers_of_all_64_bits_and_from_the_ends(device: Any) -> None:
    for low, high in ((0, 2**64), (-2**63, 2**63), (2**64 - 5, 2**64), (-3, -2)):
        same_bits(*both(device, "random_integers", (), (1, 2, low, high), shape=(37,), dtype="uint64"))


def test_certain_draws(device: Any) -> None:
    for p in (0.0, 1.0, 2.0**-40, 1 - 2.0**-40):
        same_bits(*both(device, "random_bernoulli", (), (1, 2, p), shape=(100,), dtype="bool"))


def test_far_out_in_a_large_tensor(device: Any) -> None:
    whole = (2**40, 2**20)
    for name, dtype in (("random_normal", "float32"), ("random_uniform", "float32")):
        same_bits(*both(device, name, (), (SEED, DRAW, 0.0, 1.0), shape=(3, 50), dtype=dtype,
                        offset=(2**39 + 1, 12345), whole=whole))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_has_the_cpus_bits(device: Any, dtype: str, p: float) -> None:
    for shape, offset, whole in (((5, 67), None, None), ((), None, None), ((0, 3), None, None),
                                 ((4, 6, 5), (1, 2, 3), (9, 8, 8)), ((3, 16), (2, 8), (9, 32))):
        x = np.random.default_rng(0).normal(size=shape).astype(dtypes.canonical(dtype))
        x.reshape(-1)[:2] = [np.inf, -0.0][:x.size]
        same_bits(*both(device, "dropout", (x,), (SEED, DRAW), p=p, offset=offset, whole=whole))


def test_dropout_of_views(device: Any) -> None:
    op = lookup("dropout")
    base = np.random.default_rng(0).normal(size=(9, 33)).astype(np.float32)
    on_device = device.cp.asarray(base)
    attrs = op.unpack(op.pack({"p": 0.4}))
    assert op.device is not None
    for view in (lambda a: a.reshape(-1)[1:], lambda a: a.T, lambda a: a[::2, 3:]):
        found = op.device.run(device, view(on_device), *numbers(device, op, (3, 4)), **attrs)
        same_bits(found.get(), op.kernel(np, view(base), 3, 4, **attrs))


@pytest.mark.parametrize(("dtype", "bits"), [("uint32", 5), ("uint32", 20), ("uint64", 64)])
def test_the_sort_is_stable(device: Any, dtype: str, bits: int) -> None:
    for n in (0, 1, 33, TILE, TILE + 1, 3 * TILE + 77):
        keys = np.random.default_rng(n).integers(0, 2**bits - 1, n, np.uint64).astype(dtype)
        found, places = sort_keys(device, device.cp.asarray(keys), bits)
        order = np.argsort(keys, kind="stable")
        np.testing.assert_array_equal(found.get(), keys[order])
        np.testing.assert_array_equal(places.get(), order)


def test_equal_numbers_of_another_draw_are_captured_and_replayed(device: Any) -> None:
    """The numbers are read when the kernel runs."""
    op = lookup("random_normal")
    attrs = op.unpack(op.pack({"shape": (50,)}))
    given = numbers(device, op, (SEED, DRAW, 0.0, 1.0))
    assert op.device is not None
    op.device.run(device, *given, **attrs)
    device.stream.begin_capture()
    made = op.device.run(device, *given, **attrs)
    graph = device.stream.end_capture()
    for draw in (1, 2):
        given[1][...] = draw
        graph.launch(device.stream)
        same_bits(made.get(), op.kernel(np, SEED, draw, 0.0, 1.0, **attrs))
