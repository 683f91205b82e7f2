"""Rows that multiply: their device kernels give what the plain kernels give."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import meshtape.runtime.ops  # noqa: F401  fills the op table
from meshtape.runtime.op import lookup

TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 4e-6, "float64": 1e-13, "complex64": 4e-6}
CASES = [(name, at) for name in ("matmul", "linear", "linear_weight_grad", "einsum")
         for at in range(len(lookup(name).samples()))]


def draw(shape, dtype, seed):
    rng = np.random.default_rng((seed, *shape))
    if dtype == "int32":
        return rng.integers(-9, 9, shape, dtype)
    x = rng.standard_normal(shape)
    x = x + 1j * rng.standard_normal(shape) if dtype.startswith("complex") else x
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("dtype", [*TOLERANCE, "int32"])
@pytest.mark.parametrize("name, at", CASES)
def test_the_device_kernel_agrees_with_the_plain_one(device, name, at, dtype):
    row = lookup(name)
    sample = row.samples()[at]
    arrays = [draw(shape, dtype, i) for i, shape in enumerate(sample.inputs)]
    attrs = {**row.attrs, **sample.attrs}
    want = row.kernel(np, *arrays, **attrs)
    given = [device.cp.asarray(x) for x in arrays]
    found = row.device.run(device, *given, **attrs)
    check(found, want, dtype)
    if row.takes_out:
        room = device.cp.empty(want.shape, want.dtype)
        found = row.device.run(device, *given, **attrs, out=room)
        check(found, want, dtype)
        check(room, want, dtype)
    for x, kept in zip(given, arrays, strict=True):
        np.testing.assert_array_equal(x.get(), kept)


def check(found, want, dtype):
    assert found.dtype == want.dtype and found.shape == want.shape
    if dtype == "int32":
        np.testing.assert_array_equal(found.get(), want)
        return
    tolerance = TOLERANCE[dtype]
    wide = np.complex128 if dtype.startswith("complex") else np.float64
    np.testing.assert_allclose(found.get().astype(wide), want.astype(wide), tolerance, 4 * tolerance)
